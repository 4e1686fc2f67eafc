"""The compress stage on a tiny model: what it leaves, what may stand around it, and that it goes on after a
kill."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import luthier
from luthier.compression.linear import quantized_layers
from luthier.errors import RecipeError
from luthier.models.saving import save
from luthier.recipe.planner import plan
from luthier.recipe.runner import run
from luthier.recipe.source import load_recipe

CALIBRATION = "calibration: {data: text.txt, samples: 4, max_length: 32}"
EVALUATE = "evaluate: {data: test.jsonl, metrics: [perplexity]}"
TUNE = (
    "tune: {data: train.jsonl, method: METHOD, training: {max_steps: 2, save_strategy: 'no', "
    "per_device_train_batch_size: 4}}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compress")
    save(tiny.llama(), folder / "base", tiny.tokenizer())
    (folder / "text.txt").write_text("\n".join(tiny.SENTENCES * 8))
    for name, first in (("train", 0), ("test", 50)):
        rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(first, first + 8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compress(method: str, calibration: str = CALIBRATION) -> str:
    return "compress: {" + ", ".join(filter(None, [f"method: {method}", calibration])) + "}"


def write(place: Path, *stages: str, name: str) -> Path:
    model = {"name": str(place / "base"), "dtype": "float32", "device": "cpu"}
    lines = [f"name: {name}", f"model: {json.dumps(model)}", f"output: {place / 'runs'}", "stages:"]
    path = place / f"{name}.yaml"
    path.write_text("\n".join([*lines, *(f"  - {stage}" for stage in stages)]) + "\n")
    return path


def ppl(stage) -> float:
    return stage.manifest.metrics["perplexity"]["value"]


def test_codes_can_leave_in_the_gptq_layout(place):
    save(tiny.llama(num_key_value_heads=4), place / "wide", tiny.tokenizer())
    stages = [compress("{name: gptq, bits: 4, group_size: 32}"), "export: {format: gptq}"]
    path = write(place, *stages, name="layout")
    path.write_text(path.read_text().replace(str(place / "base"), str(place / "wide")))
    done = run(path)
    assert "weights after reading" in str(done.stages[1].manifest.checks)
    config = json.loads((done.stages[1].artefact / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


def test_leaves_a_model_that_transformers_alone_loads_and_that_measures_the_same(place):
    done = run(write(place, compress("{name: gptq, bits: 4, group_size: 16}"), EVALUATE, name="gptq"))
    folder = done.stages[0].artefact
    assert (folder / "config.json").read_text().count("pack-quantized")
    assert done.passed
    assert any(check["name"] == "logits after reload" for check in done.checks)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 25)[None]
    ours, _ = luthier.load(folder, dtype="float32", device="cpu")
    assert len(quantized_layers(ours)) == 14
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)


def test_the_next_stage_sees_the_compressed_model_in_this_process_and_in_another(place):
    stages = [compress("{name: rtn, bits: 3, group_size: 16}"), EVALUATE]
    together = run(write(place, *stages, name="together"))
    run(write(place, stages[0], name="apart"))
    apart = run(write(place, *stages, name="apart"))
    assert apart.stages[0].status == "unchanged"
    assert ppl(together.stages[1]) == pytest.approx(ppl(apart.stages[1]), rel=1e-6)
    base = run(write(place, EVALUATE, name="base"))
    assert ppl(together.stages[1]) != pytest.approx(ppl(base.stages[0]), rel=1e-3)


def test_a_second_way_may_start_from_the_base_again(place):
    first, second = (
        compress("{name: rtn, bits: 3, group_size: 16}"),
        compress("{name: random, sparsity: 0.3}", ""),
    )
    again = second.replace("compress: {", "compress: {name: second, from_base: true, ")
    done = run(
        write(place, TUNE.replace("METHOD", "lora"), f"{first[:-1]}, from_base: true}}", again, name="ways")
    )
    alone = run(write(place, second, name="alone"))
    ours, theirs = (load_file(run_.artefact / "model.safetensors") for run_ in (done, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_records_every_layer_and_the_means(place):
    methods = "[{name: sparsegpt, pattern: '2:4'}, {name: gptq, group_size: 16}]"
    done = run(write(place, compress(methods), name="two"))
    manifest = done.stages[0].manifest
    layers = manifest.details["layers"]
    assert len(layers) == 28
    assert {layer["bits"] for layer in layers} == {None, 4}
    assert manifest.metrics["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert manifest.metrics["bits"] == 4
    assert manifest.details["calibration_tokens"] == 4 * 32
    assert manifest.details["bytes_before"] == sum(p.nbytes for p in tiny.llama().parameters())


def test_a_pruned_model_keeps_its_zeros_on_disk(place):
    done = run(write(place, compress("{name: magnitude, pattern: '2:4'}", ""), name="pruned"))
    weights = load_file(done.artefact / "model.safetensors")
    down = weights["model.layers.0.mlp.down_proj.weight"]
    assert (down.reshape(-1, 4) == 0).sum(1).eq(2).all()


def test_an_adapter_learns_on_a_quantised_base_and_is_loaded_on_it(place):
    stages = [compress("{name: rtn, group_size: 16}"), TUNE.replace("METHOD", "lora"), EVALUATE]
    done = run(write(place, *stages, name="lora"))
    assert done.passed
    again, _ = luthier.load(done.stages[1].artefact, dtype="float32", device="cpu")
    assert len(quantized_layers(again)) == 14


@pytest.mark.parametrize("method", ["wanda", "llm_pruner, units: [mlp], ratio: 0.25"])
def test_an_adapter_learns_on_a_pruned_base_and_is_loaded_on_it(place, method):
    name = method.partition(",")[0]
    stages = [compress(f"{{name: {method}}}"), TUNE.replace("METHOD", "lora"), EVALUATE]
    done = run(write(place, *stages, name=f"lora-on-{name}"))
    assert done.passed
    record = json.loads((done.stages[1].artefact / "luthier.json").read_text())
    assert record["base"]["name"] == str(done.stages[0].artefact.resolve())
    luthier.load(done.stages[1].artefact, dtype="float32", device="cpu")


def test_a_tuned_model_is_compressed_after_its_merge(place):
    stages = [TUNE.replace("METHOD", "lora"), "export: {merge: true}", compress("{name: wanda}"), EVALUATE]
    assert run(write(place, *stages, name="merged")).passed


def test_methods_and_lists_of_them_are_compared_by_bits_and_sparsity(place):
    path = write(place, compress("{name: rtn, group_size: 16}"), EVALUATE, name="several")
    methods = ["wanda", ["wanda", {"name": "gptq", "group_size": 16}]]
    rows = luthier.compare(path, vary={"compress.method": methods}).rows
    assert [row.bits for row in rows] == [None, 4]
    assert [row.sparsity for row in rows] == pytest.approx([0.5, 0.5], abs=0.02)
    assert rows[0].tune_seconds is None


def test_goes_on_after_a_kill_with_the_first_block_that_is_not_done(place, monkeypatch):
    from luthier.compression.quantization.gptq import Config

    straight = run(write(place, compress("{name: gptq, group_size: 16}"), name="straight"))
    path = write(place, compress("{name: gptq, group_size: 16}"), name="killed")
    own, seen = Config.change, []

    def change(self, block):
        seen.append(block.index)
        if block.index == 1 and len(seen) == 2:
            raise KeyboardInterrupt
        return own(self, block)

    monkeypatch.setattr(Config, "change", change)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    done = run(path)
    assert seen == [0, 1, 1]
    first, second = (load_file(stage.artefact / "model.safetensors") for stage in (straight, done))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([compress("gptq", "")], "needs calibration data"),
        ([compress("{name: rtn, activation_bits: 8, activation_per: static}", "")], "needs calibration data"),
        ([compress("{name: llm_pruner, importance: vector, taylor: second}", "")], "taylor: second has not"),
        ([TUNE.replace("METHOD", "lora"), compress("rtn", "")], "carries the adapter"),
        ([compress("{name: gptq, bits: 9}")], "<= 8"),
        ([compress("{name: wanda, sparsity: 1.5}")], "<= 1"),
        ([compress("gtpq")], "gptq"),
        ([compress("lora")], "not a method of compression"),
        ([compress("{name: gptq, group: 3}")], "group_size"),
        ([compress("gptq", "calibration: {data: texts.txt}")], "no data file"),
        ([compress("[]")], "at least 1"),
    ],
)
def test_refuses_before_anything_is_loaded(place, stages, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(place, *stages, name="bad"))
    assert said in str(caught.value)


def test_refuses_what_does_not_fill_one_window(place):
    long = "calibration: {data: text.txt, max_length: 4096}"
    with pytest.raises(luthier.errors.DataError, match="not one window of 4096"):
        run(write(place, compress("gptq", long), name="short"))


@pytest.mark.parametrize(
    "method", ["{name: zeroquant, steps: 0}", "{name: llm_pruner, importance: l2}", "zeroquant_v2", "llm_qat"]
)
def test_asks_for_data_only_where_the_options_need_them(place, method):
    load_recipe(write(place, compress(method, ""), name="without"))


class TestPlan:
    """What a compress stage will leave and train."""

    def planned(self, place, method, calibration=CALIBRATION):
        return plan(load_recipe(write(place, compress(method, calibration), name="planned"))).stages[0]

    def test_codes_and_scales_are_what_is_left_of_a_rounded_weight(self, place):
        found = self.planned(place, "{name: rtn, bits: 4, group_size: 16}")
        model = tiny.llama()
        inside = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("proj"))
        total = sum(p.numel() for p in model.parameters())
        assert found.artefact_bytes == 4 * (total - inside) + inside * (4 + 1) // 8  # a 16-bit scale for 16
        assert found.trainable == 0 == found.memory.optimizer

    def test_layers_that_are_left_out_stay_whole(self, place):
        whole = self.planned(place, "{name: rtn, group_size: 16}")
        part = self.planned(place, "{name: rtn, group_size: 16, exclude: [down_proj]}")
        assert whole.artefact_bytes < part.artefact_bytes < part.memory.weights

    def test_two_methods_count_together(self, place):
        one = self.planned(place, "{name: gptq, group_size: 16}")
        both = self.planned(place, "[{name: sparsegpt, pattern: '2:4'}, {name: gptq, group_size: 16}]")
        assert both.artefact_bytes == one.artefact_bytes  # zeros have codes, too

    def test_what_is_trained_takes_time_and_memory(self, place):
        rest = self.planned(place, "{name: zeroquant, steps: 0, group_size: 16}")
        block = self.planned(place, "{name: zeroquant, steps: 50, group_size: 16}")
        whole = self.planned(place, "{name: gum, steps: 50}")
        assert rest.trainable == 0
        assert whole.trainable == whole.total == block.trainable
        assert rest.seconds < block.seconds
        assert 0 < block.memory.optimizer < whole.memory.optimizer == 8 * whole.total

    def test_text_that_the_model_writes_takes_time(self, place):
        few, many = (self.planned(place, f"{{name: llm_qat, texts: {n}}}", "") for n in (64, 6400))
        assert many.seconds > few.seconds
