"""What a stage's result depends on, hashed by content: model, data, own methods, the stage before."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.reading import files, resolve
from luthier.data.spec import DataSpec
from luthier.errors import DataError, ModelError
from luthier.evaluation.names import PROMPT_FILE
from luthier.models import sources
from luthier.recipe.manifest import hash_files, hash_json, versions
from luthier.recipe.schema import (
    CompressStage,
    EvaluateStage,
    MethodSpec,
    ModelSpec,
    Recipe,
    Stage,
    TuneStage,
)

# Files of a model folder that decide what it computes and how text becomes tokens.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class Upstream:
    """The output of the last stage that changed the model, which the next stages read.

    Attributes:
        artefact: its `model/`, `adapter/` or `prompt/` folder.
        sha256: `Manifest.output_hash()` of that stage.
        adapter, prompt: the artefact is an adapter, or a text prompt, which changes no weights. It stands on
            `base`; None is the recipe's model.
    """

    artefact: Path
    sha256: str
    adapter: bool
    base: "Upstream | None" = None
    prompt: bool = False


@dataclass
class Trail:
    """What the stages so far have left.

    Attributes:
        last: what the next stage reads, unless it starts `from_base`.
        outputs: the output of each stage that has one, by its name.
    """

    last: Upstream | None = None
    outputs: dict[str, Upstream] = field(default_factory=dict)

    def before(self, stage: Stage) -> Upstream | None:
        """What `stage` reads."""
        return None if isinstance(stage, TuneStage | CompressStage) and stage.from_base else self.last

    def add(self, stage: Stage, output: Upstream | None) -> None:
        """Take up what `stage` has left: None, or what it read, where it left nothing of its own."""
        if output is not self.before(stage) and output is not None:
            self.outputs[stage.name] = output
        self.last = output


def stage_identity(recipe: Recipe, stage: Stage, trail: Trail) -> dict[str, Any]:
    """Everything that decides whether `stage` must run again (`Manifest.identity`)."""
    upstream = trail.before(stage)
    inputs: dict[str, Any] = {"model": model_input(recipe.model)}
    if upstream is not None:
        inputs["upstream"] = {"sha256": upstream.sha256}
    for name in ("data", "eval_data"):
        spec = getattr(stage, name, None)
        if spec is not None:
            inputs[name] = data_input(spec)
    if isinstance(stage, EvaluateStage) and stage.prompt is not None:
        path = Path(stage.prompt).expanduser()
        inputs["prompt"] = {
            "sha256": hash_files([path / PROMPT_FILE if path.is_dir() else path], path.parent)
        }
    if isinstance(stage, TuneStage):
        named = [name for names in stage.method.artefacts.values() for name in names]
        for name in named:
            output = trail.outputs.get(name)
            sha256 = _model_hash(name, None) if output is None else output.sha256
            inputs[f"artefact {name}"] = {"sha256": sha256}
    for name, spec in _methods(stage):
        if spec.method.origin != "luthier":
            inputs[name] = {"sha256": hash_files([spec.method.source], spec.method.source.parent)}
    return {
        "stage": stage.kind,
        "config": stage.model_dump(mode="json", exclude={"name"}),
        "inputs": inputs,
        "versions": versions(),
        "seed": recipe.seed if _is_random(recipe, stage, upstream) else None,
    }


def _is_random(recipe: Recipe, stage: Stage, upstream: Upstream | None) -> bool:
    """Whether the recipe's seed matters: for training, calibration, and a classification head that is new."""
    new_head = recipe.model.task == "classification" and upstream is None
    return isinstance(stage, TuneStage | CompressStage) or new_head


def _methods(stage: Stage) -> list[tuple[str, MethodSpec]]:
    """The methods that a stage names, each under the key where it stands."""
    if isinstance(stage, TuneStage):
        return [("method", stage.method), ("objective", stage.objective)]
    if isinstance(stage, CompressStage):
        return [(f"method {spec.name}", spec) for spec in stage.method]
    return []


def model_input(spec: ModelSpec) -> dict[str, Any]:
    """How the recipe's model is loaded, and the hash of its files; on the Hub its commit."""
    try:
        return spec.model_dump(mode="json") | {"sha256": _model_hash(spec.name, spec.revision)}
    except OSError as error:
        raise ModelError(f"{error.filename or spec.name} cannot be read: {error.strerror}.") from error


def data_input(spec: DataSpec) -> dict[str, Any]:
    """The path and the hash of the files behind a data spec; of a Hub data set its revision."""
    place = resolve(spec)
    if place is None:
        return {"path": spec.path, "sha256": hash_json(["hub", spec.path, spec.subset, spec.revision])}
    root = place if place.is_dir() else place.parent
    try:
        return {"path": spec.path, "sha256": hash_files(files(spec, place), root)}
    except OSError as error:
        raise DataError(f"{error.filename or place} cannot be read: {error.strerror}.") from error


def _model_hash(name: str, revision: str | None) -> str:
    source = sources.locate(name)
    if source.gguf_file is not None:
        assert source.path is not None
        return hash_files([source.path / source.gguf_file], source.path)
    path = source.path
    if path is None:
        return hash_json(["hub", source.hub_id, revision or _cached_commit(source)])
    found = [file for pattern in _MODEL_FILES for file in path.glob(pattern)]
    own = hash_files(found, path)
    return own if source.base is None else hash_json([own, _model_hash(source.base, None)])


def _cached_commit(source: sources.Source) -> str | None:
    """The commit of a Hub model in the cache: its files lie in `snapshots/<commit>/`."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(str(source.hub_id), name)
        if isinstance(found, str):
            return Path(found).parent.name
    return None
