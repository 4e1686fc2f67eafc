"""A LoRA that starts from its data: A holds the leading directions of what each layer reads."""

import json

import peft
import pytest
import small_training as training
import tiny
import torch
from safetensors.torch import load_file

import luthier
from luthier import checks, method
from luthier.errors import MethodError
from luthier.tuning import eva, hooks
from luthier.tuning.attach import attach


def adapted(make=tiny.llama, **options):
    torch.manual_seed(0)
    return attach(make(), method("lora")(**{"r": 3, "init_lora_weights": "eva", "eva_batches": 2} | options))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


def a_of(layer):
    return layer.lora_A["default"].weight.detach()


def read_by(model, batches, keep):
    """What each layer reads in the batches, where `keep` is true: (tokens, in), by a way of its own."""
    found = {}
    for name, layer in layers(model).items():
        layer.get_base_layer().register_forward_hook(
            lambda m, args, out, name=name: found.setdefault(name, []).append(args[0].detach())
        )
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    return {
        name: torch.cat([x[k] for x, k in zip(parts, keep, strict=True)]) for name, parts in found.items()
    }


def test_a_is_the_leading_right_singular_vectors_of_what_is_trained():
    batches = [training.batch(adapted(), 4, seed=seed) for seed in (1, 2, 3)]
    for batch in batches:
        batch["labels"][:, :5] = -100
    model = adapted()
    eva.start(model, batches, lambda batch: model(**batch).loss)
    inputs = read_by(adapted(), batches, [b["labels"] != -100 for b in batches])
    for name, layer in layers(model).items():
        a, x = a_of(layer), inputs[name]
        values = torch.linalg.svdvals(x)[:3]
        torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-5, rtol=0)
        # They catch as much of X as any three directions can, but for what is lost on the way.
        best, found = values.square().sum(), (x @ a.T).square().sum()
        assert 0.97 * best < found <= best * (1 + 1e-5), name
        assert not layer.lora_B["default"].weight.any()


def test_taking_in_rows_in_parts_is_exact_where_all_directions_fit():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 9)
    found = None
    for part in x.split(7):
        found = eva.take_in(found, part, 4)
    values = torch.linalg.svdvals(x)[:4]
    torch.testing.assert_close(found.norm(dim=1), values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.T @ found, x.T @ x, rtol=1e-3, atol=1e-3)


def test_fewer_tokens_than_rows_leave_the_others_as_they_were():
    model = adapted(r=8)
    before = {name: a_of(layer).clone() for name, layer in layers(model).items()}
    batch = training.batch(model, 1)
    batch["labels"][:, :-5] = -100
    with checks.collect() as lines:
        eva.start(model, [batch], lambda batch: model(**batch).loss)
    for name, layer in layers(model).items():
        assert torch.equal(a_of(layer)[5:], before[name][5:])
        assert not torch.equal(a_of(layer)[:5], before[name][:5])
    assert (lines[0].value, lines[0].tolerance) == (5 * 14, 8 * 14)


def test_through_a_trainer_of_ours_with_all_that_it_fuses(tmp_path):
    """The rows that the fused MLP reads count too, and the order of the training rows is not touched."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i} or so."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    args |= {"per_device_train_batch_size": 4}
    start = method("lora")(r=3, init_lora_weights="eva", eva_batches=2)
    plain = method("lora")(r=3)
    losses = []
    for config in (start, plain):
        made = luthier.trainer(
            "sft", tiny.llama(), tmp_path / "rows.jsonl", method=config, args=args, tokenizer=tiny.tokenizer()
        )
        with checks.collect() as lines:
            made.train()
        losses.append(made.step_loss)
        if config is start:
            (line,) = [line for line in lines if line.name == "start from the data"]
            assert line.value == line.tolerance == 3 * 14
            for layer in layers(made.model).values():
                a = a_of(layer)
                torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-5, rtol=0)
    assert losses[0] == losses[1]


def test_a_classifier_reads_all_that_is_no_padding(tmp_path):
    model = adapted(tiny.bert, target_modules=["query"])
    batch = training.batch(model, 4)
    batch["attention_mask"][:, 8:] = 0
    eva.start(model, [batch], lambda batch: model(**batch).loss)
    inputs = read_by(adapted(tiny.bert, target_modules=["query"]), [batch], [batch["attention_mask"].bool()])
    for name, layer in layers(model).items():
        values = torch.linalg.svdvals(inputs[name])[:3]
        assert (inputs[name] @ a_of(layer).T).square().sum() == pytest.approx(
            float(values.square().sum()), rel=1e-4
        )


def test_a_resumed_run_is_the_straight_one(tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = training.train(adapted(), tmp_path, **saving)
    resumed = adapted()
    training.trainer(resumed, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in training.weights(straight).items():
        assert torch.equal(tensor, resumed.get_parameter(name)), name


def test_the_file_is_an_ordinary_lora(tmp_path):
    model = training.train(adapted(), tmp_path / "run")
    hooks.save_adapter(model, tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["init_lora_weights"] is True
    assert "eva_batches" not in record
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    assert torch.equal(training.logits(loaded), training.logits(model))
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def test_pefts_own_loop_takes_our_config():
    torch.manual_seed(0)
    config = method("lora")(r=3, init_lora_weights="eva", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.llama(), config)
    batches = [training.batch(model, 4, seed=seed) for seed in range(4)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    assert all(len(a_of(layer)) == 3 for layer in layers(model).values())


def test_an_encoder_decoder_is_refused():
    with pytest.raises(MethodError, match="an encoder has others"):
        adapted(tiny.t5)


def test_a_stream_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from training.rows(tiny.llama())

    model = adapted()
    loader = torch.utils.data.DataLoader(Stream())
    state = type("State", (), {"global_step": 0})
    args = type("Args", (), {"world_size": 1, "deepspeed": None, "fsdp": None})
    with pytest.raises(MethodError, match="are a stream"):
        eva.StartFromData(model, 1).on_train_begin(args, state, None, train_dataloader=loader)
