"""What only the whole recipe or the disk can tell: impossible pairs, models and files that are not there.

Nothing here loads torch. Each rule yields problems, (place, what is wrong, what to write instead);
`luthier.recipe.source` turns the places into lines of the file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from luthier.alignment import trackers
from luthier.data.spec import DataSpec
from luthier.errors import LuthierError, MethodError, did_you_mean, nearest
from luthier.evaluation.names import METRICS
from luthier.models import sources
from luthier.recipe.schema import (
    KINDS,
    TASK_OF_OBJECTIVE,
    CompressStage,
    EvaluateStage,
    ExportStage,
    ModelSpec,
    Stage,
    Task,
    TuneStage,
    implied_task,
    is_adapter,
    since_base,
)

Problem = tuple[tuple[str | int, ...], str, str | None]

# Settings of generation that transformers ignores unless `do_sample` is true.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


@dataclass
class Draft:
    """A recipe as far as it could be read: a part that the schema refused is None.

    Attributes:
        folder: the recipe's; relative paths are looked up in the working directory, then there.
    """

    model: ModelSpec | None
    stages: list[Stage | None]
    folder: Path
    task: Task = field(init=False)

    def __post_init__(self) -> None:
        self.task = (self.model and self.model.task) or implied_task(self.stages)

    def __iter__(self) -> Iterator[tuple[tuple[str | int, ...], Stage]]:
        """The readable stages, each with its place."""
        for index, stage in enumerate(self.stages):
            if stage is not None:
                yield ("stages", index, stage.kind), stage


def problems(draft: Draft) -> list[Problem]:
    """Everything that is wrong with a recipe whose parts are well formed, in the order of the file."""
    found = list(_model(draft))
    found += _names(draft)
    found += _order(draft)
    for place, stage in draft:
        if isinstance(stage, TuneStage):
            found += _tune(draft, place, stage)
        elif isinstance(stage, CompressStage):
            found += _compress(draft, place, stage)
        elif isinstance(stage, EvaluateStage):
            found += _evaluate(draft, place, stage)
        elif isinstance(stage, ExportStage):
            found += _export(draft, place, stage)
    return found


def _model(draft: Draft) -> Iterator[Problem]:
    if draft.model is None:
        return
    try:
        source = sources.locate(draft.model.name)
        config = sources.config(source)
    except LuthierError as error:
        yield ("model",), error.message, error.fix
        return
    if draft.model.revision is not None and source.kind != "hub":
        fix = "Leave it out."
        yield ("model", "revision"), f"revision has no effect: {draft.model.name} is not on the Hub", fix
    if draft.model.num_labels is not None and draft.task != "classification":
        fix = "Leave it out, or write task: classification."
        yield ("model", "num_labels"), f"num_labels has no effect on a {draft.task} model", fix
    if config is None:  # on the Hub, and not fetched yet
        return
    encoder_decoder = bool(config.get("is_encoder_decoder"))
    kind = config.get("model_type", "model")
    if encoder_decoder and draft.task == "causal":
        fix = "Use objective: seq2seq, or write model: {name: ..., task: seq2seq}."
        yield (
            ("model",),
            f"{draft.model.name} ({kind}) is an encoder-decoder, but it is to be tuned as causal",
            fix,
        )
    if draft.task == "seq2seq" and not encoder_decoder:
        yield (
            ("model",),
            f"{draft.model.name} ({kind}) is no encoder-decoder, but task is seq2seq",
            "Use objective: sft.",
        )


def _order(draft: Draft) -> Iterator[Problem]:
    """A prompt is found for the model as it is: what changes or writes the model comes before a search."""
    search = ""
    for place, stage in draft:
        if isinstance(stage, TuneStage) and stage.searches:
            search = stage.method.name
        elif search and not isinstance(stage, EvaluateStage):
            what = f"a stage '{stage.kind}' cannot follow {search}: its prompt is no part of the model"
            yield place, what, "Put it before the search."


def _names(draft: Draft) -> Iterator[Problem]:
    given: dict[str, str] = {}
    for place, stage in draft:
        if stage.name == stage.kind:
            continue
        if stage.name in KINDS:
            yield (*place, "name"), f"a {stage.kind} stage cannot be called '{stage.name}'", None
        elif stage.name in given:
            yield (*place, "name"), f"stage name '{stage.name}' is taken by {given[stage.name]}", None
        given[stage.name] = f"stages.{place[1]}"


def _tune(draft: Draft, place: tuple[str | int, ...], stage: TuneStage) -> Iterator[Problem]:
    if stage.searches:
        yield from _search(draft, place, stage)
        return
    objective = stage.objective.method.name
    task = TASK_OF_OBJECTIVE.get(objective, "causal")
    if task != draft.task:
        fitting = [name for name, needs in TASK_OF_OBJECTIVE.items() if needs == draft.task] or [
            "sft",
            "pretrain",
        ]
        yield (
            (*place, "objective"),
            f"objective {objective} trains a {task} model, but the recipe's model is {draft.task}",
            f"Use objective: {' or '.join(fitting)}, or change the model's task.",
        )
    yield from _data(draft, (*place, "data"), stage.data)
    yield from _data(draft, (*place, "eval_data"), stage.eval_data)
    yield from _method(place, stage)
    yield from _start(draft, place, stage)
    training = stage.training
    if stage.eval_data is None:
        for key in ("eval_strategy", "eval_steps", "load_best_model_at_end", "eval_on_start"):
            if training.get(key) not in (None, False, "no"):
                fix = "Add eval_data to the stage."
                yield (*place, "training", key), f"{key} needs data to evaluate on", fix
    elif training.get("load_best_model_at_end") and training.get("eval_strategy") == "no":
        fix = "Add eval_strategy: steps or epoch."
        yield (
            (*place, "training", "load_best_model_at_end"),
            "the best model is not known without evaluation",
            fix,
        )
    if found := trackers.missing(training.get("report_to")):
        yield (*place, "training", "report_to"), *found
    if training.get("bf16") and training.get("fp16"):
        yield (*place, "training", "fp16"), "bf16 and fp16 exclude each other", "Keep one."


def _start(draft: Draft, place: tuple[str | int, ...], stage: TuneStage) -> Iterator[Problem]:
    """What a tune stage stands on, and the stages or folders that its method names."""
    before = draft.stages[: int(place[1])]
    if None in before:
        return
    changed = next((s for s in reversed(since_base(before)) if isinstance(s, TuneStage | ExportStage)), None)
    if (
        isinstance(changed, TuneStage)
        and is_adapter(changed.method)
        and not (stage.from_base or changed.searches)
    ):
        fix = "Put `- export: {merge: true}` between the two, or write from_base: true."
        yield place, f"the model carries the adapter of stage '{changed.name}' already", fix
    adapters = [
        s.name for s in before if isinstance(s, TuneStage) and is_adapter(s.method) and not s.searches
    ]
    for option, names in stage.method.artefacts.items():
        for index, name in enumerate(names):
            if name not in adapters and not Path(name).expanduser().exists():
                known = f"Adapters of stages before: {', '.join(adapters)}." if adapters else None
                fix = known or "Name a folder with an adapter, or a stage before this one that trains one."
                at = (*place, "method", option, index)
                yield at, f"there is no adapter '{name}', neither of a stage before nor in such a folder", fix


def _search(draft: Draft, place: tuple[str | int, ...], stage: TuneStage) -> Iterator[Problem]:
    name = stage.method.name
    if draft.task == "classification":
        fix = "Write model: {name: ..., task: causal} (or masked, seq2seq)."
        yield ("model",), f"{name} reads the words of a language model, and the model is a classifier", fix
    for key in ("objective", "training"):
        if key in stage.model_fields_set:
            fix = "Leave it out; the options of the search stand under method."
            yield (*place, key), f"{key} has no effect: {name} searches and trains nothing", fix
    yield from _data(draft, (*place, "data"), stage.data)
    yield from _data(draft, (*place, "eval_data"), stage.eval_data)


def _method(place: tuple[str | int, ...], stage: TuneStage) -> Iterator[Problem]:
    """Options of tuning methods that exclude each other, or settings of the training."""
    options, training = stage.method.options, stage.training
    if options.get("cache_trunk"):
        for other in ("trunk_dropout", "train_embeddings"):
            if options.get(other):
                fix = "Keep one of the two."
                yield (
                    (*place, "method", other),
                    f"cache_trunk needs a frozen, steady trunk; {other} changes it",
                    fix,
                )
    if options.get("fused_backward"):
        wanted = {"max_grad_norm": 0, "gradient_accumulation_steps": 1}
        for key, value in wanted.items():
            if training.get(key, 1) != value:
                at = (*place, "training", key) if key in training else (*place, "method", "fused_backward")
                fix = f"Write training: {{{key}: {value}}}, or leave fused_backward out."
                yield at, f"fused_backward frees each gradient at once and needs {key}: {value}", fix


def _compress(draft: Draft, place: tuple[str | int, ...], stage: CompressStage) -> Iterator[Problem]:
    """A pass over the blocks changes weights: an adapter on them must be merged, and data be there."""
    if stage.calibration is not None:
        yield from _data(draft, (*place, "calibration", "data"), stage.calibration.data)
    else:
        for spec in stage.method:
            try:
                wants = getattr(spec.method(**spec.options), "wants_data", True)
            except MethodError as error:  # options that do not go together
                yield place, error.message, error.fix
                continue
            if wants:
                fix = "Add calibration: {data: some-text.txt} to the stage."
                yield place, f"{spec.name} needs calibration data", fix
    before = [] if stage.from_base else since_base(draft.stages[: int(place[1])])
    changed = next((s for s in reversed(before) if isinstance(s, TuneStage | ExportStage)), None)
    if isinstance(changed, TuneStage) and is_adapter(changed.method) and not changed.searches:
        fix = "Put `- export: {merge: true}` between the two, or write from_base: true."
        yield place, f"the model carries the adapter of stage '{changed.name}'", fix
    if draft.task == "seq2seq":
        yield place, "an encoder-decoder cannot be compressed block by block", "Use another model."


def _evaluate(draft: Draft, place: tuple[str | int, ...], stage: EvaluateStage) -> Iterator[Problem]:
    yield from _data(draft, (*place, "data"), stage.data)
    before = draft.stages[: int(place[1])]
    # With a text prompt any language model classifies.
    prompted = stage.prompt is not None or any(isinstance(s, TuneStage) and s.searches for s in before)
    if stage.prompt is not None:
        yield from _prompt(draft, (*place, "prompt"), stage.prompt)
    task = "classification" if prompted else draft.task
    for index, name in enumerate(stage.metrics):
        if task not in METRICS[name].tasks:
            fitting = [other for other, metric in METRICS.items() if task in metric.tasks]
            kind = "model with a text prompt" if prompted else f"{task} model"
            yield (
                (*place, "metrics", index),
                f"{name} cannot be measured on a {kind}",
                f"Metrics for it: {', '.join(fitting)}."
                if fitting
                else "Search a text prompt for it first (method: autoprompt).",
            )
    for name in stage.expect:
        if name not in stage.metrics:
            yield (
                (*place, "expect", name),
                f"'{name}' is not measured by this stage",
                did_you_mean(name, stage.metrics),
            )
    if stage.generation and not any(METRICS[name].generates for name in stage.metrics):
        fix = "Leave generation out, or add a metric that generates."
        yield (*place, "generation"), f"none of the metrics ({', '.join(stage.metrics)}) generates text", fix
    for key in _SAMPLING:
        if stage.generation.get(key) is not None and not stage.generation.get("do_sample"):
            fix = "Add do_sample: true, or leave it out."
            yield (*place, "generation", key), f"{key} has no effect without sampling", fix


def _prompt(draft: Draft, place: tuple[str | int, ...], name: str) -> Iterator[Problem]:
    if draft.task == "classification":
        fix = "Leave it out, or write task: causal (or masked) for the model."
        yield place, "a classifier has its own classes and reads no text prompt", fix
    if not any(Path(folder, Path(name).expanduser()).exists() for folder in (".", draft.folder)):
        yield (
            place,
            f"there is no text prompt {name}",
            "A search leaves one in the folder prompt of its stage.",
        )


def _export(draft: Draft, place: tuple[str | int, ...], stage: ExportStage) -> Iterator[Problem]:
    before = draft.stages[: int(place[1])]
    if None in before:  # what it would export is not known
        return
    tuned = next((s for s in reversed(since_base(before)) if isinstance(s, TuneStage)), None)
    adapter = tuned is not None and is_adapter(tuned.method)
    method = tuned.method.name if tuned else ""
    if not stage.whole and not adapter:
        what = f"{method} changes the model's own weights" if tuned else "no stage before it tunes the model"
        yield (*place, "format"), f"there is no adapter to export: {what}", "Write format: safetensors."
    elif not stage.whole and stage.merge:
        fix = "Write format: safetensors for the merged model, or leave merge out."
        yield (*place, "merge"), "a merged adapter cannot be exported as an adapter", fix
    elif stage.merge and not adapter:
        what = f"{method} leaves nothing to merge" if tuned else "no stage before it tunes the model"
        yield (*place, "merge"), f"merge: true, but {what}", "Leave merge out."
    elif stage.whole and adapter and stage.merge is False:
        fix = "Write merge: true, or format: adapter."
        yield (*place, "merge"), f"a whole model holds the adapter of {method} only if it is merged", fix


def _data(draft: Draft, place: tuple[str | int, ...], spec: DataSpec | None) -> Iterator[Problem]:
    if spec is None:
        return
    path = Path(spec.path).expanduser()
    if path.exists() or Path(draft.folder, path).exists():
        return
    # 'owner/name' without a suffix may be a Hub id; whether it is there is known when it is fetched.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec.path) and not path.suffix:
        return
    folders = [folder for folder in (path.parent, Path(draft.folder, path).parent) if folder.is_dir()]
    near = nearest(path.name, {file.name for folder in folders for file in folder.iterdir()})
    fix = did_you_mean(path.name, near) if near else None
    yield (
        place,
        f"there is no data file {spec.path}",
        fix or f"Looked in the working directory and in {draft.folder}.",
    )
