"""Recipes are read strictly: all faults of file and overrides at once, each with line and nearest name."""

import pytest

from luthier.errors import RecipeError
from luthier.recipe.source import load_recipe

GOOD = """\
name: tickets
model: smollm2-135m
seed: 3
stages:
  - evaluate: {name: before, data: test.jsonl, metrics: [exact_match], samples: 10}
  - tune:
      data: train.jsonl
      method: lora
      training:
        max_steps: 150
        learning_rate: 5e-4
  - evaluate:
      data: test.jsonl
      metrics: [exact_match, perplexity]
      expect: {exact_match: '>= 80%'}
  - export: {format: safetensors}
"""


@pytest.fixture
def write(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')

    def make(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return make


def faults(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(f).replace(str(path), "recipe.yaml") for f in caught.value.faults], str(caught.value)


def test_a_good_recipe_is_read_with_its_defaults(write, tmp_path):
    recipe = load_recipe(write(GOOD))
    assert [stage.name for stage in recipe.stages] == ["before", "tune", "evaluate", "export"]
    tune = recipe.stages[1]
    assert (tune.method.name, tune.method.options, tune.objective.name) == ("lora", {}, "sft")
    assert tune.training == {"max_steps": 150, "learning_rate": 0.0005}
    assert recipe.model.task == "causal"
    assert recipe.stages[3].merge is True
    assert recipe.stages[0].data.base == tmp_path
    assert recipe.file == tmp_path / "recipe.yaml"


def test_the_resolved_recipe_reads_back_as_itself(write):
    recipe = load_recipe(write(GOOD), ["tune.method.r=4"])
    again = type(recipe).model_validate(recipe.as_dict())
    assert again.as_dict() == recipe.as_dict()


def test_every_fault_is_told_at_once_with_line_and_nearest_name(write):
    text = GOOD.replace("seed: 3", "sed: 3").replace(
        "method: lora", "method: {name: lora, r: -1, lora_alfa: 2}"
    )
    text = text.replace("max_steps", "max_step").replace(
        "[exact_match, perplexity]", "[exact_match, perplexty]"
    )
    text = text.replace("train.jsonl", "trian.jsonl").replace("smollm2-135m", "smolm2-135m")
    found, message = faults(write(text))
    expected = [
        ("recipe.yaml:2:", "smolm2-135m", "smollm2-135m"),
        ("recipe.yaml:3:", "unknown key 'sed'", "'seed'"),
        ("recipe.yaml:7:", "trian.jsonl", "'train.jsonl'"),
        ("recipe.yaml:8:", "stages.1.tune.method.r must be >= 1, not -1", "rank"),
        ("recipe.yaml:8:", "lora has no option 'lora_alfa'", "'lora_alpha'"),
        ("recipe.yaml:10:", "unknown key 'max_step'", "'max_steps'"),
        ("recipe.yaml:14:", "unknown metric 'perplexty'", "'perplexity'"),
    ]
    assert len(found) == len(expected), message
    for line, (where, what, fix) in zip(found, expected, strict=True):
        assert line.startswith(where)
        assert what in line
        assert fix in line
    assert "has 7 faults" in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: tickets\n", "", "'name' is missing"),
        ("name: tickets", "name: a/b", "recipe.yaml:1: name must be a plain name"),
        ("seed: 3", "seed: -1", "recipe.yaml:3: seed must be greater than or equal to 0, not -1"),
        ("seed: 3", "seed: '3'", "seed must be integer, not '3'"),
        ("seed: 3", "seed: 3\nseed: 4", ":4: key 'seed' stands here twice, first at recipe.yaml:3"),
        ("method: lora", "method: lorra", "no method 'lorra' in tuning. Did you mean 'lora'"),
        ("method: lora", "method: sft", "'sft' is not a method of tuning, but alignment/sl/sft is"),
        ("method: lora", "method: {r: 8}", "stages.1.tune.method must name a method"),
        ("method: lora", "method: {name: lora, r: 8.5}", "method.r must be int, not 8.5"),
        ("method: lora", "method: {name: lora, r: true}", "method.r must be int, not True"),
        ("      data: train.jsonl\n", "", "recipe.yaml:6: 'stages.1.tune.data' is missing"),
        ("      data: train.jsonl\n", "      data:\n", "'stages.1.tune.data' is empty"),
        ("5e-4", "fast", "learning_rate must be float, not 'fast'"),
        ("max_steps: 150", "output_dir: x", "'output_dir' is not set under training. The run's folder"),
        ("max_steps: 150", "packing: true", "'packing' is an option of the objective"),
        ("max_steps: 150", "optim: adamw_trch", "optim must be"),
        ("max_steps: 150", "per_device_train_batch_size: 0", "must be at least 1, not 0"),
        ("'>= 80%'", "0.8", "must be a comparison such as '>= 0.8', not 0.8"),
        ("format: safetensors", "format: adaptr", "Did you mean 'adapter'?"),
        ("format: safetensors", "merge: yes", "must be boolean, not 'yes'. YAML writes true or false"),
        ("- export: {format: safetensors}", "- compress: {}", "'stages.3.compress.method' is missing"),
        ("- export: {format", "- exprot: {format", "unknown key 'exprot' in stages.3. Did you mean 'export'"),
        ("- export: {", "- tune: {}\n    export: {", "a stage is a mapping of one key, its kind; found 2"),
        ("samples: 10", "generation: {max_new_token: 4}", "Did you mean 'max_new_tokens'"),
    ],
)  # fmt: skip
def test_one_fault_is_one_paragraph(write, old, new, expected):
    assert old in GOOD
    found, message = faults(write(GOOD.replace(old, new)))
    assert len(found) == 1, message
    assert expected in found[0]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [a\n", "recipe.yaml:2: not YAML"),
        ("- a\n", "is not a mapping"),
        ("a: !!python/object:os.system {}\n", "recipe.yaml:1: not YAML"),
        ("a: &x [*x]\n", "contains itself"),
        ("base: &b {a: 1}\nname:\n  <<: *b\n", "merge keys"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(write, text, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write(text))


def test_a_missing_file_names_the_nearest(write):
    path = write(GOOD)
    with pytest.raises(RecipeError, match=r"There is no recipe .*recipes.yaml.*Did you mean 'recipe.yaml'"):
        load_recipe(path.with_name("recipes.yaml"))
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(path)


@pytest.mark.parametrize("number", ["5e-4", "5.0e-4", ".0005", "5E-4", "0.0005"])
def test_every_way_to_write_a_float_is_a_float(write, number):
    recipe = load_recipe(write(GOOD.replace("5e-4", number)))
    assert recipe.stages[1].training["learning_rate"] == 0.0005
    recipe = load_recipe(write(GOOD), [f"tune.training.learning_rate={number}"])
    assert recipe.stages[1].training["learning_rate"] == 0.0005


def test_anchors_may_be_shared(write):
    text = GOOD.replace("data: test.jsonl, metrics", "data: &test test.jsonl, metrics")
    text = text.replace("      data: test.jsonl\n", "      data: *test\n")
    assert load_recipe(write(text)).stages[2].data.path == "test.jsonl"


class TestOverrides:
    def test_reach_the_top_a_kind_a_name_and_an_index(self, write):
        recipe = load_recipe(
            write(GOOD),
            ["seed=7", "tune.method=dora", "tune.method.r=4", "evaluate.samples=5", "before.samples=2",
             "stages.2.evaluate.batch_size=1", "stages.1.tune.training.max_steps=3"],
        )  # fmt: skip
        assert recipe.seed == 7
        before, tune, after, _ = recipe.stages
        assert (tune.method.name, tune.method.options) == ("dora", {"r": 4})
        assert tune.training["max_steps"] == 3
        assert (before.samples, after.samples) == (2, 5)
        assert after.batch_size == 1

    def test_a_shorthand_becomes_a_mapping(self, write):
        recipe = load_recipe(
            write(GOOD), ["model.dtype=float32", "tune.data.limit=5", "tune.objective.name=sft"]
        )
        assert (recipe.model.name, recipe.model.dtype) == ("smollm2-135m", "float32")
        assert recipe.stages[1].data.limit == 5

    def test_take_lists_mappings_and_words_with_signs(self, write):
        recipe = load_recipe(
            write(GOOD),
            ["before.metrics=[exact_match, perplexity]", "evaluate.expect={exact_match: '>= 0.5'}"],
        )
        assert recipe.stages[0].metrics == ["exact_match", "perplexity"]
        assert recipe.stages[2].expect == {"exact_match": ">= 0.5"}

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("seed", "is not key=value"),
            ("sed=1", "nothing in the recipe is called 'sed'. Did you mean 'seed'?"),
            ("tune.trainig.max_steps=1", "unknown key 'trainig' in stages.1.tune. Did you mean 'training'"),
            ("tune.method.r=0", "stages.1.tune.method.r must be >= 1, not 0"),
            ("stages.9.tune.method=lora", "is a list of 4, counted from 0; it has no '9'"),
            ("stages.0.tune.method=lora", "stages.0 is 'evaluate', not 'tune'"),
            ("tune=lora", "replaces a whole stage"),
            ("tune.method=[a", "its value is not YAML"),
            ("seed.x=1", "'seed' is 3 and has no key 'x'"),
            ("compress.bits=4", "nothing in the recipe is called 'compress'"),
        ],
    )
    def test_wrong_ones_are_told_as_such(self, write, override, expected):
        found, _ = faults(write(GOOD), override)
        assert len(found) == 1
        assert found[0].startswith(f"override '{override}': ")
        assert expected in found[0]

    def test_a_missing_kind_is_said(self, write):
        found, _ = faults(write(GOOD.replace("  - export: {format: safetensors}\n", "")), "export.merge=true")
        assert "The recipe has no export stage." in found[0]


def test_a_method_file_of_the_user_joins_the_tree(write, tmp_path, monkeypatch):
    from luthier import taxonomy

    monkeypatch.setattr(taxonomy, "_added", {})
    (tmp_path / "mine.py").write_text(
        '"""Mine: a test.\n\nPaper: A, 2024.\nPick it when testing.\nFamily: tuning/lowrank\n"""\n'
        'class Config:\n    n: int = option(1, "number", ge=1)\n'
    )
    text = GOOD.replace("seed: 3", "methods: [mine.py]").replace("method: lora", "method: {name: mine, n: 2}")
    assert load_recipe(write(text)).stages[1].method.options == {"n": 2}
    found, _ = faults(write(text.replace("n: 2", "n: 0")))
    assert "must be >= 1" in found[0]
    found, _ = faults(write(text.replace("mine.py", "other.py")))
    assert "recipe.yaml:3: There is no method file" in found[0]
