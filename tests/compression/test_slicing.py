"""What is left after units were cut out computes what the whole model did with their outputs at zero."""

import copy

import pytest
import small_training
import tiny
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import luthier
from luthier import checks
from luthier.compression import slicing, units
from luthier.errors import CheckError, MethodError
from luthier.models import per_layer, saving
from luthier.tuning.merge import merge

IDS = torch.arange(20, 44).reshape(2, 12)


def every_other(found):
    return {u: torch.arange(0, u.count, 2) for u in found}


@torch.no_grad()
def zeroed_logits(model, kept):
    """Logits with the columns that read the units at zero, by a copy of the model and plain indexing."""
    model = copy.deepcopy(model)
    for u, indices in kept.items():
        gone = [i for i in range(u.count) if i not in indices.tolist()]
        weight = model.get_submodule(u.name).weight
        for i in gone:
            part = slice(i * u.reads, (i + 1) * u.reads)
            if u.parts[-1].dim:
                weight[:, part] = 0
            else:
                weight[part] = 0
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (tiny.llama, ["mlp"]),
        (tiny.llama, ["attention"]),
        (tiny.llama, ["mlp", "attention"]),
        (lambda: tiny.llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True), ["mlp", "attention"]),
        (tiny.gpt2, ["mlp"]),
        (tiny.bert, ["mlp"]),
    ],
    ids=["llama-mlp", "llama-heads", "llama", "llama-biases", "gpt2", "bert"],
)
@torch.no_grad()
def test_cut_is_zeroed(make, kinds, widths):
    model = make()
    kept = every_other(units.find(model, kinds))
    expected = zeroed_logits(model, kept)
    slicing.cut(model, kept, widths=widths)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-6, rtol=1e-5)


def test_norms_of_single_heads_stay_whole():
    config = Qwen3Config(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    kept = every_other(units.find(model, ["mlp", "attention"]))
    expected = zeroed_logits(model, kept)
    slicing.cut(model, kept)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-6, rtol=1e-5)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)


@torch.no_grad()
def test_cut_channels_are_a_narrower_stream():
    model = tiny.llama(tie_word_embeddings=False, head_dim=8)
    kept = {u: torch.arange(16) * 2 for u in units.find(model, ["channel"])}
    whole = copy.deepcopy(model)
    slicing.cut(model, kept)
    # By hand: a stream whose other channels are 0, with norms over those that are left.
    keep = torch.zeros(32, dtype=torch.bool)
    keep[::2] = True
    for name, parameter in whole.named_parameters():
        if parameter.dim() == 2 and name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[~keep] = 0
    whole.model.embed_tokens.weight[:, ~keep] = 0

    class Narrow(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            mean = x[..., keep].pow(2).mean(-1, keepdim=True)
            return self.norm.weight * x * torch.rsqrt(mean + self.norm.variance_epsilon)

    for block in whole.model.layers:
        block.input_layernorm = Narrow(block.input_layernorm)
        block.post_attention_layernorm = Narrow(block.post_attention_layernorm)
    whole.model.norm = Narrow(whole.model.norm)
    expected = whole(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-6, rtol=1e-5)
    assert model.config.hidden_size == 16


def test_tied_embeddings_stay_tied_when_channels_go(tiny_llama):
    slicing.cut(tiny_llama, every_other(units.find(tiny_llama, ["channel"])))
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight
    assert tiny_llama.lm_head.in_features == 16


def test_nothing_to_cut_changes_nothing(tiny_llama):
    before = dict(tiny_llama.named_parameters())
    config = tiny_llama.config
    slicing.cut(tiny_llama, {u: torch.arange(u.count) for u in units.find(tiny_llama, ["mlp"])})
    assert all(p is before[n] for n, p in tiny_llama.named_parameters())
    assert tiny_llama.config is config


def test_a_wrong_cut_is_found_out(tiny_llama, monkeypatch):
    """The proof has teeth: one block loses the other head than the one whose output was zeroed."""
    take_out = slicing._take_out

    def crossed(model, kept):
        take_out(model, {u: 1 - i if u.block == 0 else i for u, i in kept.items()})

    monkeypatch.setattr(slicing, "_take_out", crossed)
    with pytest.raises(CheckError, match="cut model computes"):
        slicing.cut(tiny_llama, {u: torch.tensor([0]) for u in units.find(tiny_llama, ["attention"])})


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2], ids=["bert", "gpt2"])
def test_channels_under_a_layer_norm_are_refused(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MethodError, match="mean over all channels"):
        slicing.cut(model, every_other(units.find(model, ["channel"])))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_heads_whose_size_follows_from_the_width_are_refused_before_anything_changes(tiny_bert):
    before = copy.deepcopy(tiny_bert.state_dict())
    with pytest.raises(MethodError, match=r"cannot hold fewer attention units.*units: \[mlp\]"):
        slicing.cut(tiny_bert, every_other(units.find(tiny_bert, ["attention"])))
    assert all(torch.equal(before[n], t) for n, t in tiny_bert.state_dict().items())


def test_different_widths_need_the_class_for_them(tiny_llama):
    first, second = units.find(tiny_llama, ["mlp"])
    kept = {first: torch.arange(10), second: torch.arange(20)}
    with pytest.raises(MethodError, match="widths: per_layer"):
        slicing.cut(tiny_llama, kept)
    with pytest.raises(MethodError, match="widths: per_layer"):
        slicing.cut(tiny_llama, {first: torch.arange(10)})
    slicing.cut(tiny_llama, kept, widths="per_layer")
    assert [b.mlp.down_proj.in_features for b in tiny_llama.model.layers] == [10, 20]
    slicing.cut(
        tiny_llama, {u: torch.arange(5) for u in units.find(tiny_llama, ["mlp"])[1:]}, widths="per_layer"
    )
    assert [b.mlp.down_proj.in_features for b in tiny_llama.model.layers] == [10, 5]


def test_the_next_number_of_heads_that_the_class_allows():
    model = tiny.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8)
    group = units.find(model, ["attention"])
    assert slicing.valid_count(model, group, 4) == 4  # 48 = 4 x 12
    model = tiny.llama(hidden_size=48, num_attention_heads=12, num_key_value_heads=12, head_dim=4)
    assert slicing.valid_count(model, units.find(model, ["attention"]), 9) == 12
    with pytest.raises(MethodError, match="takes nothing out"):
        slicing.targets(model, units.find(model, ["attention"]), 0.1, "uniform")


def test_output_error_is_the_share_of_the_square(tiny_llama):
    place = units.find(tiny_llama, ["mlp"])[1]
    kept = {place: torch.arange(40)}
    seen = {}
    layer = tiny_llama.get_submodule(place.name)
    hook = layer.register_forward_hook(lambda m, x, y: seen.update(x=x[0].detach(), y=y.detach()))
    mask = torch.ones_like(IDS)
    mask[1, -4:] = 0
    with torch.no_grad():
        tiny_llama(input_ids=IDS, attention_mask=mask)
    hook.remove()
    real = mask.bool()
    lost = seen["x"][real][:, 40:] @ layer.weight.detach()[:, 40:].T
    expected = float(lost.square().sum() / seen["y"][real].square().sum())
    found = slicing.output_errors(tiny_llama, kept, [{"input_ids": IDS, "attention_mask": mask}])
    assert found[place] == pytest.approx(expected, rel=1e-4)
    assert slicing.output_errors(tiny_llama, kept, []) == {}


def test_generation_with_a_cache_is_generation_without(tiny_llama):
    kept = every_other(units.find(tiny_llama, ["mlp", "attention"]))
    first = {u: i for u, i in kept.items() if u.block == 0}
    slicing.cut(tiny_llama, first, widths="per_layer")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = tiny_llama.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, tiny_llama.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("widths", ["uniform", "per_layer"])
def test_lora_goes_on_and_merges(tiny_llama, widths):
    kept = every_other(units.find(tiny_llama, ["mlp", "attention"]))
    chosen = kept if widths == "uniform" else {u: i for u, i in kept.items() if u.block}
    slicing.cut(tiny_llama, chosen, widths=widths)
    tuned = luthier.attach(tiny_llama, luthier.method("lora")(r=2))
    small_training.disturb(tuned)
    before = tuned(input_ids=IDS).logits
    torch.testing.assert_close(merge(tuned)(input_ids=IDS).logits, before, atol=1e-5, rtol=1e-4)


def test_uniform_widths_reload_where_luthier_is_absent(tiny_llama, tiny_tokenizer, tmp_path):
    slicing.cut(tiny_llama, every_other(units.find(tiny_llama, ["mlp", "attention"])))
    folder = saving.save(tiny_llama, tmp_path / "model", tiny_tokenizer)
    with checks.collect() as lines:
        saving.verify_export(folder, tiny_llama, tiny_tokenizer)
    assert {line.name for line in lines} >= {"logits after reload", "generated tokens after reload"}
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__module__.startswith("transformers.")


def test_different_widths_reload_with_the_class_for_them(tiny_llama, tiny_tokenizer, tmp_path):
    first = units.find(tiny_llama, ["mlp", "attention"])[:2]
    slicing.cut(tiny_llama, every_other(first), widths="per_layer")
    folder = saving.save(tiny_llama, tmp_path / "model", tiny_tokenizer)
    saving.verify_export(folder, tiny_llama, tiny_tokenizer)
    loaded, _ = luthier.load(folder, dtype="float32")
    assert per_layer.is_per_layer(loaded)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, tiny_llama(input_ids=IDS).logits)
