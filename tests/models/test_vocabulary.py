"""An adapter trained after tokens were added comes back with their rows, on a base that never had them."""

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier import checks
from luthier.errors import ModelError
from luthier.models import vocabulary
from luthier.models.keys import ADAPTER
from luthier.models.saving import verify_export
from luthier.tuning.merge import merge

NEW = torch.tensor([[5, 6, tiny.VOCAB, 7, tiny.VOCAB + 1]])
LORA = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
KINDS = {
    "tied llama": lambda: tiny.llama(),
    "untied llama": lambda: tiny.llama(tie_word_embeddings=False),
    "gpt2": lambda: tiny.gpt2(),
}


@pytest.fixture
def grown(tmp_path):
    """Loads a saved base, adds two tokens with rows of their own, and puts an adapter on it."""

    def make(kind="tied llama", rows=tiny.VOCAB + 2, config=None, **options):
        folder = luthier.save(KINDS[kind](), tmp_path / "base", tiny.tokenizer())
        model, tokenizer = luthier.load(folder, dtype="float32")
        tokenizer.add_tokens(["<a>", "<b>"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(rows, mean_resizing=False)
            for parameter in vocabulary.parameters(model).values():
                parameter.data[tiny.VOCAB :].normal_()
            config = config or peft.LoraConfig(task_type="CAUSAL_LM", **LORA | options)
            return peft.get_peft_model(model, config).eval(), tokenizer

    return make


def logits(model, ids=NEW):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": "both"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [tiny.VOCAB, tiny.VOCAB + 1]},
        {"target_modules": "embedding"},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_what_is_saved_is_what_is_loaded(grown, tmp_path, kind, options):
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    named = {"both": [embedding, "lm_head"], "embedding": [embedding]}
    options = {
        key: named.get(value, value) if isinstance(value, str) else value for key, value in options.items()
    }
    model, tokenizer = grown(kind, **options)
    path = luthier.save(model, tmp_path / "adapter", tokenizer)
    with checks.collect() as lines:
        loaded, found = luthier.load(path, dtype="float32")
    assert "rows of the embedding as trained" in [line.name for line in lines]
    assert len(found) == tiny.VOCAB + 2
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(loaded), logits(model))
    assert vocabulary.rows(loaded) == loaded.config.vocab_size == tiny.VOCAB + 2


def test_soft_prompts_too(grown, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, tokenizer = grown(config=config)
    loaded, _ = luthier.load(luthier.save(model, tmp_path / "adapter", tokenizer), dtype="float32")
    text = logits(model)[:, 3:]  # ours are the text's alone
    torch.testing.assert_close(logits(loaded), text, rtol=1e-5, atol=1e-5)


def test_a_vocabulary_can_shrink(grown, tmp_path):
    """The rows above the tokenizer's last id, as models round them up, may be cut off."""
    model, _ = grown(rows=300)
    loaded, _ = luthier.load(luthier.save(model, tmp_path / "adapter"), dtype="float32")
    ids = NEW.clamp(max=299)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["tied llama", "untied llama"])
def test_peft_alone_loads_it_once_the_base_has_the_size(grown, tmp_path, kind):
    """PEFT leaves the untied head out where the embedding is adapted: its new rows would be random."""
    model, tokenizer = grown(kind, target_modules=["embed_tokens"])
    path = luthier.save(model, tmp_path / "adapter", tokenizer)
    with checks.collect() as lines:
        verify_export(path, model, tokenizer, NEW)
    assert all(line.passed for line in lines)


def test_it_can_be_merged_and_saved_whole(grown, tmp_path):
    model, tokenizer = grown()
    loaded, _ = luthier.load(luthier.save(model, tmp_path / "adapter", tokenizer), dtype="float32")
    merged = luthier.save(merge(loaded), tmp_path / "merged", tokenizer)
    torch.testing.assert_close(logits(luthier.load(merged, dtype="float32")[0]), logits(model))


def test_a_classifier_whose_pad_token_was_added_on_loading_stands_alone(tmp_path):
    """The base's folder knows neither the token nor its row; who loads the adapter without us needs both."""
    tokenizer = tiny.tokenizer(pad="none", eos="<|im_end|>")
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    folder = luthier.save(tiny.llama(pad_token_id=None), tmp_path / "base", tokenizer)
    model, tokenizer = luthier.load(folder, task="classification", dtype="float32", num_labels=2)
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id == model.config.pad_token_id == tiny.VOCAB
    assert vocabulary.rows(model) == tiny.VOCAB + 1
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **LORA)).eval()
    path = luthier.save(adapted, tmp_path / "adapter", tokenizer)
    verify_export(path, adapted, tokenizer)
    loaded, _ = luthier.load(path, task="classification", dtype="float32")
    ids = torch.tensor([[5, 6, 7], [8, tiny.VOCAB, tiny.VOCAB]])
    assert torch.equal(logits(loaded, ids), logits(adapted, ids))


def test_a_file_without_the_new_rows_of_the_head_is_refused(grown, tmp_path):
    model, tokenizer = grown("untied llama")
    path = luthier.save(model, tmp_path / "adapter", tokenizer)
    tensors = load_file(path / ADAPTER)
    save_file({k: v for k, v in tensors.items() if "lm_head" not in k}, path / ADAPTER, {"format": "pt"})
    (path / "luthier.json").unlink()
    with pytest.raises(ModelError, match=r"386 rows.* its base has 384.* lacks lm_head.weight"):
        luthier.load(path, dtype="float32")


def test_a_base_whose_old_rows_were_trained_outside_the_adapter_is_told(grown, tmp_path):
    """Added rows do not hide a change of all the others."""
    model, tokenizer = grown()
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.add_(0.1)
    with pytest.raises(ModelError, match="its weights have changed"):
        luthier.save(model, tmp_path / "adapter", tokenizer)
