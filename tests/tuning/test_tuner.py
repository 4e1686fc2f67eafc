"""The engine: what a method of a few lines gets from it, on any kind of linear layer."""

import copy
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import pytest
import small_training as training
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import luthier
from luthier import checks
from luthier.errors import MethodError
from luthier.models.saving import verify_export
from luthier.tuning.attach import attach, trainable
from luthier.tuning.merge import combine, merge
from luthier.tuning.registration import register
from luthier.tuning.tuner import Delta, DeltaConfig, DeltaLayer, DeltaTuner, FeedForwardLayer

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
every_model = pytest.mark.parametrize("kind", MODELS)


@dataclass
class Config(DeltaConfig):
    r: int = 2
    beside: bool = False

    @property
    def beside_ffn(self):
        return self.beside


class Pair(Delta):
    """A low-rank change of the simplest kind."""

    def __init__(self, config, out_features, in_features, name):
        super().__init__(config, out_features, in_features, name)
        self.down = nn.Linear(in_features, config.r, bias=False)
        self.up = nn.Linear(config.r, out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x, y):
        return self.up(self.down(x))

    def weight(self):
        return self.up.weight @ self.down.weight


class Tuner(DeltaTuner):
    prefix = "pair_"
    delta = Pair


class Bottleneck(Pair):
    """An adapter behind the layer: it reads what the layer wrote, and is no matrix."""

    weight = Delta.weight

    def __init__(self, config, out_features, in_features, name):
        super().__init__(config, out_features, out_features, name)

    def forward(self, x, y):
        return self.up(torch.relu(self.down(y)))


@dataclass
class BottleneckConfig(DeltaConfig):
    r: int = 2


class BottleneckTuner(DeltaTuner):
    prefix = "neck_"
    delta = Bottleneck


register("pair", Config, Tuner)
register("neck", BottleneckConfig, BottleneckTuner)


def pair(model, size=0.3, **options):
    """The model with a change on it, as if trained."""
    torch.manual_seed(0)
    return training.disturb(get_peft_model(model, Config(**options)), size)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, DeltaLayer)}


# --- on which layers


@every_model
def test_all_linear_is_every_linear_layer_below_the_head(kind):
    base = MODELS[kind]()
    linear = {n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    head = {n for n in linear if n in ("lm_head", "classifier")}
    model = attach(base, Config())
    assert {n.removeprefix("base_model.model.") for n in layers(model)} == linear - head
    assert all(layer.training == layer.base_layer.training for layer in layers(model).values())


def test_targets_are_read_as_peft_reads_them():
    found = layers(pair(tiny.llama(), target_modules=["q_proj", "v_proj"], layers_to_transform=[1]))
    assert [n.removeprefix("base_model.model.model.layers.") for n in found] == [
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
    ]
    found = layers(pair(tiny.llama(), target_modules="all-linear", exclude_modules=["q_proj", "lm_head"]))
    assert len(found) == 12


def test_blocks_without_a_list_of_names_are_refused():
    with pytest.raises(MethodError, match=r"layers_to_transform does not go with .*all-linear.*\[q_proj"):
        Config(layers_to_transform=[0])


def test_an_embedding_is_refused():
    with pytest.raises(MethodError, match=r"'model\.embed_tokens' is a Embedding, not a linear layer"):
        attach(tiny.llama(), Config(target_modules=["embed_tokens"]))


@every_model
def test_a_conv1d_is_a_linear_layer_transposed(kind):
    """The same change on x W^T, whatever way W is stored."""
    model = pair(MODELS[kind]())
    for layer in layers(model).values():
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
        delta = layer.deltas["default"]
        expected = layer.base_layer(x) + x @ delta.down.weight.T @ delta.up.weight.T
        assert torch.allclose(layer(x), expected, atol=1e-6)
        assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape


# --- several adapters, on and off


def test_adapters_active_together_add_up():
    model = pair(tiny.llama(), target_modules=["q_proj"])
    model.add_adapter("more", Config(r=3, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("more")
    training.disturb(model, 0.3, seed=2)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    both, alone = (list(layers(model).values())[i] for i in (0, 1))
    assert sorted(both.deltas) == ["default", "more"]
    assert list(alone.deltas) == ["more"]
    base = both.base_layer(x)
    one, other = (both.deltas[n](x, base) for n in ("default", "more"))
    model.base_model.set_adapter(["default", "more"])
    assert torch.allclose(both(x), base + one + other, atol=1e-6)
    model.base_model.merge_adapter()
    assert torch.allclose(both(x), base + one + other, atol=1e-5)
    model.base_model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.allclose(both(x), base + one, atol=1e-6)
    assert torch.equal(alone(x), alone.base_layer(x))


def test_only_the_active_adapter_learns():
    model = pair(tiny.llama())
    model.add_adapter("more", Config())
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(learns) == 28
    assert all(".default." in n for n in learns)
    model.set_adapter("more")
    model(**training.batch(model)).loss.backward()
    assert all((p.grad is not None) == (".more." in n) for n, p in model.named_parameters())


def test_a_deleted_adapter_leaves_nothing():
    model = pair(tiny.llama())
    expected, state = training.logits(model), set(model.state_dict())
    model.add_adapter("more", Config(r=4))
    model.delete_adapter("more")
    assert set(model.state_dict()) == state
    assert torch.equal(training.logits(model), expected)


def test_a_batch_with_an_adapter_for_each_row_is_refused():
    model = pair(tiny.llama())
    with pytest.raises(MethodError, match=r"adapter_names.*set_adapter"):
        model(**training.batch(model), adapter_names=["default", "__base__"])


def test_a_copy_is_a_model_of_its_own():
    for options in ({}, {"beside": True}):
        model = pair(tiny.llama(), **options)
        expected = training.logits(model)
        other = copy.deepcopy(model)
        training.disturb(other, 0.5, seed=4)
        assert not torch.allclose(training.logits(other), expected, atol=1e-3)
        assert torch.equal(training.logits(model), expected)


# --- precision


def test_on_half_precision_the_factors_are_cast_and_not_the_activations():
    model = pair(training.half(tiny.llama()), target_modules=["q_proj"])
    layer = next(iter(layers(model).values()))
    delta = layer.deltas["default"]
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in kept if t.numel() >= x.numel()} == {torch.bfloat16}
    low = delta.down.weight.bfloat16(), delta.up.weight.bfloat16()
    assert torch.equal(y, layer.base_layer(x) + x @ low[0].T @ low[1].T)
    y.sum().backward()
    assert delta.up.weight.grad.dtype == torch.float32


def test_under_autocast_an_activation_is_cast_once():
    model = pair(tiny.llama(), target_modules=["q_proj"])
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        y = layer(x)
    casts = [e for e in profile.events() if e.name == "aten::_to_copy"]
    assert len(casts) == 4  # x, the base's weight and two factors
    with torch.autocast("cpu", torch.bfloat16):
        delta = layer.deltas["default"]
        assert torch.equal(y, layer.base_layer(x) + delta.up(delta.down(x)))


def test_a_model_in_double_precision_has_its_change_in_double_precision():
    model = attach(tiny.llama().double(), Config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}


def test_peft_may_ask_for_the_bases_precision():
    model = get_peft_model(training.half(tiny.llama()), Config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert training.logits(model).isfinite().all()


# --- merging


@every_model
def test_merging_and_unmerging_bring_the_weights_back(kind):
    model = pair(MODELS[kind]())
    expected, before = training.logits(model), training.weights(model)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(training.logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    for name, tensor in training.weights(model).items():
        assert torch.allclose(tensor, before[name], atol=1e-6)


def test_a_merged_model_that_is_disabled_is_the_base():
    model = pair(tiny.llama())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.allclose(training.logits(model), training.logits(tiny.llama()), atol=1e-5)


def test_several_adapters_are_rounded_once():
    model = pair(training.half(tiny.llama()), target_modules=["q_proj"])
    model.add_adapter("more", Config(target_modules=["q_proj"]))
    model.set_adapter("more")
    training.disturb(model, 0.3, seed=2)
    layer = next(iter(layers(model).values()))
    exact = layer.base_layer.weight.float() + sum(layer.get_delta_weight(n) for n in layer.deltas)
    layer.merge(adapter_names=["default", "more"])
    assert torch.equal(layer.base_layer.weight, exact.bfloat16())


def test_a_broken_adapter_is_not_merged_safely():
    model = pair(tiny.llama())
    before = layers(model)["base_model.model.model.layers.0.mlp.up_proj"].base_layer.weight.clone()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layers(model)["base_model.model.model.layers.0.mlp.up_proj"].base_layer.weight, before)


def test_a_tied_head_is_merged_by_the_house_and_refused_by_itself():
    model = pair(tiny.llama(), target_modules=["lm_head"])
    expected = training.logits(model)
    with pytest.raises(MethodError, match=r"'lm_head' is tied.*luthier\.tuning\.merge"):
        model.merge_and_unload()
    merged = merge(model)
    assert torch.allclose(training.logits(merged), expected, atol=1e-4)
    assert merged.config.tie_word_embeddings is False


def test_unloading_gives_the_base_back():
    for options in ({}, {"beside": True}):
        base = tiny.llama()
        model = pair(base, **options).unload()
        assert model is base
        assert torch.equal(training.logits(model), training.logits(tiny.llama()))
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_sum_of_adapters_is_a_sum_of_their_changes():
    model = pair(tiny.llama(), target_modules=["q_proj"])
    expected = training.logits(model)
    assert torch.allclose(training.logits(combine(model, {"default": 1.0})), expected, atol=1e-4)


def test_what_is_no_matrix_is_refused_before_anything_is_touched():
    model = training.disturb(attach(tiny.llama(), BottleneckConfig()), 0.3)
    expected = training.logits(model)
    for attempt in (merge, lambda m: m.merge_and_unload(), lambda m: m.merge_adapter()):
        with pytest.raises(MethodError, match=r"q_proj' cannot be merged: its change is not a matrix"):
            attempt(model)
    assert torch.equal(training.logits(model), expected)


def test_pefts_conversion_to_lora_takes_the_matrix():
    model = pair(tiny.gpt2())
    expected = training.logits(model)
    config, state = peft.convert_to_lora(model, rank=2)
    lora = get_peft_model(tiny.gpt2(), config)
    peft.set_peft_model_state_dict(lora, state)
    assert torch.allclose(training.logits(lora), expected, atol=1e-4)


# --- quantised bases


class Int8Linear(nn.Linear):
    """A layer whose weight cannot be computed with as it is, as quantisers make them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def quantised():
    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    return model


def test_a_quantised_layer_learns_and_is_not_merged(tmp_path):
    base = training.logits(quantised())
    model = attach(quantised(), Config(target_modules=["up_proj", "q_proj"]))
    assert torch.equal(training.logits(model), base)
    training.train(model, tmp_path)
    assert not torch.allclose(training.logits(model), base, atol=1e-3)
    weights = training.weights(model)
    with pytest.raises(
        MethodError, match=r"up_proj' cannot be merged: the weight of Int8Linear is quantised"
    ):
        model.merge_and_unload()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


# --- beside the FFN


@every_model
def test_beside_the_ffn_the_change_reads_what_the_ffn_reads(kind):
    model = attach(MODELS[kind](), Config(beside=True))
    found = layers(model)
    assert len(found) == (4 if kind == "t5" else 2)
    assert all(isinstance(layer, FeedForwardLayer) for layer in found.values())
    assert {(layer.out_features, layer.in_features) for layer in found.values()} == {(32, 32)}
    training.disturb(model, 0.3)
    read = []
    for layer in found.values():
        layer.deltas["default"].register_forward_hook(lambda m, args, out: read.append(args[0]))
    training.logits(model)
    assert len(read) == len(found)
    assert all(layer.read is None for layer in found.values()), "an activation is held after the forward"


def test_beside_the_ffn_nothing_is_held_when_disabled():
    model = attach(tiny.llama(), Config(beside=True))
    with model.disable_adapter():
        training.logits(model)
    assert all(layer.read is None for layer in layers(model).values())


def test_experts_have_no_ffn_to_be_put_beside():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_attention_heads=2, num_key_value_heads=2, **sizes)
    )
    with pytest.raises(MethodError, match=r"'model\.layers\.0' in MixtralForCausalLM has experts"):
        attach(model, Config(beside=True))


def test_layers_that_end_no_ffn_are_refused_beside_it():
    with pytest.raises(
        MethodError, match=r"q_proj' does not end the feed-forward part.*Leave target_modules"
    ):
        attach(tiny.llama(), Config(beside=True, target_modules=["q_proj"]))


def test_two_kinds_of_change_do_not_share_a_layer():
    model = pair(tiny.llama(), target_modules=["down_proj"])
    with pytest.raises(MethodError, match=r"down_proj' carries an adapter of another variant"):
        model.add_adapter("more", Config(beside=True))
    model.add_adapter("elsewhere", Config(target_modules=["up_proj"]))


# --- what methods of other kinds override


class Shared(Pair):
    """One factor of its own, the other of all layers together."""

    def __init__(self, config, out_features, in_features, bank, adapter):
        nn.Module.__init__(self)
        self.up = nn.Parameter(torch.zeros(out_features, config.r))
        # The holder, not the parameter: that would be a parameter of every layer.
        self.bank, self.adapter = (bank,), adapter
        self.repeats = in_features // 16

    def forward(self, x, y):
        return x @ self.bank[0][self.adapter]["down"].repeat(1, self.repeats).T @ self.up.T

    def weight(self):
        return self.up @ self.bank[0][self.adapter]["down"].repeat(1, self.repeats)


class SharedTuner(DeltaTuner):
    prefix = "shared_"
    uses_shared_state = True

    def make_delta(self, config, layer, name, adapter):
        if not hasattr(self, "shared_bank"):
            self.shared_bank = nn.ModuleDict()
        if adapter not in self.shared_bank:
            self.shared_bank[adapter] = nn.ParameterDict({"down": torch.randn(config.r, 16)})
        return Shared(config, layer.out_features, layer.in_features, self.shared_bank, adapter)


@dataclass
class SharedConfig(DeltaConfig):
    r: int = 2


class Behind(Bottleneck):
    """Behind a module that has no weight, by an input that comes with the batch."""

    def __init__(self, config, out_features, in_features, gate):
        super().__init__(config, out_features, in_features, "")
        self.gate = gate

    def forward(self, x, y):
        return self.gate["size"][:, None, None] * super().forward(x, y)


class BehindTuner(DeltaTuner):
    prefix = "behind_"

    def _prepare_adapter_config(self, peft_config, model_config):
        peft_config.target_modules = {"mlp.act_fn"}
        self.gate = {}
        return peft_config

    def make_layer(self, config, base_layer, name):
        width = self.model.get_submodule(name.replace("act_fn", "up_proj")).out_features
        return DeltaLayer(base_layer, "behind_delta", width, width)

    def make_delta(self, config, layer, name, adapter):
        return Behind(config, layer.out_features, layer.in_features, self.gate)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        self.gate["size"] = kwargs["size"]
        yield


@dataclass
class BehindConfig(DeltaConfig):
    r: int = 2


register("shared", SharedConfig, SharedTuner)
register("behind", BehindConfig, BehindTuner)


def test_changes_can_share_parameters(tmp_path):
    model = attach(tiny.llama(), SharedConfig(target_modules=["q_proj", "down_proj"]))
    assert trainable(model)[0] == 2 * 16 + 4 * 32 * 2
    training.train(model, tmp_path / "run")
    expected = training.logits(model)
    model.save_pretrained(tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert sum("down" in n.rsplit(".", 1)[1] for n in names) == 1
    other = attach(tiny.llama(), SharedConfig(target_modules=["q_proj", "down_proj"]))
    other.load_adapter(tmp_path / "adapter", "loaded")
    other.set_adapter("loaded")
    assert torch.equal(training.logits(other), expected)
    assert torch.allclose(training.logits(merge(model)), expected, atol=1e-4)


def test_modules_without_weights_and_inputs_of_the_batch_are_carried(tmp_path):
    model = get_peft_model(tiny.llama(), BehindConfig())
    model.special_peft_forward_args = model.special_peft_forward_args | {"size"}
    training.disturb(model, 0.3)
    inputs = training.batch(model)
    base = training.logits(tiny.llama())
    with torch.no_grad():
        found = model(**inputs, size=torch.tensor([0.0, 1.0])).logits
    assert torch.allclose(found[0], base[0], atol=1e-5)
    assert not torch.allclose(found[1], base[1], atol=1e-2)
    with pytest.raises(MethodError, match="not a matrix"):
        model.merge_and_unload()
    assert torch.equal(training.logits(model.unload()), base)


# --- files


def test_the_file_holds_the_adapters_tensors_alone(tmp_path):
    model = attach(tiny.bert(), Config())
    training.train(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert {n.rsplit("pair_delta.", 1)[1] for n in names if "pair_delta" in n} == {"down.weight", "up.weight"}
    assert {n for n in names if "pair_delta" not in n} == {
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    }
    assert not any("default" in n for n in names)


def test_equal_adapters_are_equal_files(tmp_path):
    texts = []
    for folder in ("a", "b"):
        pair(tiny.llama(), target_modules="all-linear").save_pretrained(tmp_path / folder)
        texts.append((tmp_path / folder / "adapter_config.json").read_text())
    assert texts[0] == texts[1]
    targets = json.loads(texts[0])["target_modules"]
    assert targets == sorted(targets)


@pytest.mark.parametrize("lean", [False, True], ids=["whole", "low_cpu_mem_usage"])
def test_an_adapter_comes_back_bit_by_bit_on_a_half_precision_base(lean, tmp_path):
    model = pair(training.half(tiny.llama()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(training.half(tiny.llama()), tmp_path, low_cpu_mem_usage=lean)
    state = {n: p for n, p in model.named_parameters() if "pair_" in n}
    for name, parameter in state.items():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert torch.equal(training.logits(loaded), training.logits(model))


def test_a_second_adapter_is_loaded_under_another_name(tmp_path):
    model = pair(tiny.llama())
    expected = training.logits(model)
    model.save_pretrained(tmp_path)
    other = pair(tiny.llama(), size=0.1)
    own = training.logits(other)
    other.load_adapter(tmp_path, "loaded")
    assert torch.equal(training.logits(other), own)
    other.set_adapter("loaded")
    assert torch.equal(training.logits(other), expected)


def test_peft_loads_our_adapters_once_our_package_is_imported(tmp_path):
    model = training.disturb(attach(tiny.llama(), luthier.method("krona")()), 0.3)
    model.save_pretrained(tmp_path / "adapter")
    tiny.llama().save_pretrained(tmp_path / "base")
    script = f"""
import sys, torch, transformers
import luthier.tuning
assert not any(m.startswith("luthier.tuning.lowrank.") for m in sys.modules)
from peft import PeftModel
base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
print(float(model(input_ids=torch.arange(5, 15)[None]).logits.double().sum()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = float(model.eval()(input_ids=torch.arange(5, 15)[None]).logits.double().sum())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_an_exported_adapter_is_proven_in_a_fresh_process(tmp_path):
    luthier.save(tiny.llama(), tmp_path / "base", tiny.tokenizer())
    base, tokenizer = luthier.load(tmp_path / "base")
    model = training.disturb(attach(base, luthier.method("krona")(variant="krona_b_res")), 0.3)
    luthier.save(model, tmp_path / "adapter", tokenizer)
    with checks.collect() as lines:
        verify_export(tmp_path / "adapter", model, tokenizer)
    assert all(line.passed for line in lines)
    loaded, _ = luthier.load(tmp_path / "adapter")
    assert torch.equal(training.logits(loaded), training.logits(model))


# --- training


def test_it_learns_in_a_trainer_of_trl(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in training.rows(tiny.llama())])
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        gradient_checkpointing=True, learning_rate=1e-2, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny.llama(), args, train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=Config()
    )
    before = training.weights(trainer.model)
    trainer.train()
    after = training.weights(trainer.model)
    moved = {n for n in after if not torch.equal(before[n], after[n])}
    assert moved == {n for n in after if "pair_" in n}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_gradients_are_the_same_with_checkpointing(beside, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = pair(tiny.llama(), beside=beside).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**training.batch(model)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_it_compiles_without_a_break_in_the_graph(half):
    for options in ({}, {"beside": True}):
        model = pair(training.half(tiny.llama()) if half else tiny.llama(), **options).eval()
        torch._dynamo.reset()
        inputs = {"input_ids": torch.arange(5, 15)[None], "use_cache": False}
        expected = model(**inputs).logits
        compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(**inputs).logits, expected, atol=1e-2 if half else 1e-5)


def test_changes_count_once_and_cost_their_size():
    model = attach(tiny.llama(), Config(r=3))
    shapes = [(layer.out_features, layer.in_features) for layer in layers(model).values()]
    assert trainable(model)[0] == sum(3 * (out + in_) for out, in_ in shapes)
