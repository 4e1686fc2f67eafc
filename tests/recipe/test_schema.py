"""The JSON Schema accepts and refuses what the recipe language does, as far as a schema can tell."""

import pytest

from luthier.recipe.expectation import meets
from luthier.recipe.schema import Recipe, json_schema


@pytest.fixture(scope="module")
def schema():
    return json_schema()


def resolve(schema, node):
    return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node


def tune(schema):
    stage = resolve(schema, schema["properties"]["stages"]["items"])
    branch = next(b for b in stage["properties"]["tune"]["anyOf"] if "$ref" in b)
    assert (stage["minProperties"], stage["maxProperties"]) == (1, 1)
    return resolve(schema, branch)


def test_a_methods_options_follow_its_name(schema):
    word, mapping = resolve(schema, tune(schema)["properties"]["method"])["anyOf"]
    assert {"lora", "dora", "full"} <= set(word["enum"])
    assert "sft" not in word["enum"]
    cases = {c["if"]["properties"]["name"]["const"]: c["then"] for c in mapping["allOf"]}
    r = cases["lora"]["properties"]["r"]
    assert (r["type"], r["minimum"]) == ("integer", 1)
    assert r["description"]
    assert cases["lora"]["additionalProperties"] is False
    assert "r" not in cases["full"]["properties"]


def test_training_keys_are_those_of_the_installed_transformers(schema):
    training = tune(schema)["properties"]["training"]
    assert training["properties"]["learning_rate"]["type"] == "number"
    assert "cosine" in training["properties"]["lr_scheduler_type"]["enum"]
    assert "output_dir" not in training["properties"]
    assert training["additionalProperties"] is False


def test_data_model_and_methods_may_be_plain_strings(schema):
    for node in (schema["properties"]["model"], tune(schema)["properties"]["data"]):
        assert resolve(schema, node)["anyOf"][0]["type"] == "string"


def test_every_key_is_described(schema):
    for name in ("TuneStage", "EvaluateStage", "ExportStage"):
        for key, node in schema["$defs"][name]["properties"].items():
            target = resolve(schema, node)
            known = target.get("anyOf", [{}])[0].get("description")
            assert node.get("description") or target.get("description") or known, f"{name}.{key}"


def test_stages_written_in_python_are_those_written_in_yaml():
    from luthier.data.spec import DataSpec
    from luthier.recipe.schema import TuneStage, TuningSpec

    stage = TuneStage(
        data=DataSpec(path="a.jsonl"), method=TuningSpec.model_validate({"name": "lora", "r": 4})
    )
    written = {"tune": {"data": "a.jsonl", "method": {"name": "lora", "r": 4}}}
    recipes = [Recipe.model_validate({"name": "a", "model": "m", "stages": [s]}) for s in (stage, written)]
    assert recipes[0].as_dict() == recipes[1].as_dict()


@pytest.mark.parametrize(
    ("expectation", "value", "met"),
    [
        (">= 0.8", 0.8, True),
        ("> 0.8", 0.8, False),
        ("<=12.5", 13, False),
        ("< 1e-3", 1e-4, True),
        (">= 80%", 0.8, True),
    ],
)
def test_expectations_compare(expectation, value, met):
    assert meets(expectation, value) is met
