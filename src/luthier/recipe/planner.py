"""What a recipe will take before it takes it: parameters, memory by parts, time and disk of each stage.

Parameters are exact: the model is built from its config without weights, and the method is put on it.
Memory and operations of a training step are found by running one on tensors without data
(`luthier.recipe.footprint`); time is operations over the speed of this machine's matrix products.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.checks import Check
from luthier.compression.calibration_data import TOKENS
from luthier.compression.linear import dimensions
from luthier.errors import LuthierError, ModelError
from luthier.evaluation.generation import MAX_NEW_TOKENS
from luthier.evaluation.likelihood import BLOCK
from luthier.evaluation.names import METRICS
from luthier.evaluation.perplexity import WINDOW
from luthier.models import quantized, sources, structure
from luthier.models.placement import Placement, place
from luthier.recipe import footprint, leakage, machine
from luthier.recipe.cheaper import argument, changes
from luthier.recipe.context import count_labels
from luthier.recipe.leakage import stage_data
from luthier.recipe.schema import (
    CompressStage,
    EvaluateStage,
    ExportStage,
    Recipe,
    TuneStage,
    is_adapter,
    since_base,
)
from luthier.recipe.survey import Amount, Batch, amount
from luthier.resources import resident_memory, show_bytes
from luthier.tuning.attach import trainable as trained
from luthier.tuning.merge import require_mergeable
from luthier.tuning.search import HELD_OUT

# Bytes of optimizer state for each trained parameter, by the beginning of `training.optim`.
_STATE = {
    "adamw_torch_8bit": 2, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adamw_torch_4bit": 1,
    "ademamix_8bit": 3, "paged_ademamix_8bit": 3, "ademamix": 12, "adafactor": 0.05, "sgd": 0, "lomo": 0,
    "adalomo": 0.05, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4, "lion_8bit": 1,
    "paged_lion_8bit": 1,
}  # fmt: skip
_ADAM = 8


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage, by what they are held for."""

    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take.

    Attributes:
        detail: what was assumed, in words.
        proofs: what was proven of the stage's data before anything is loaded.
    """

    name: str
    kind: str
    memory: Memory
    trainable: int | None = None
    total: int | None = None
    seconds: float = 0.0
    disk_bytes: int = 0
    artefact_bytes: int = 0
    detail: str = ""
    proofs: tuple[Check, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory_bytes": self.memory.total}


@dataclass
class Plan:
    """The stages, what this machine has, and whether the one fits the other.

    Attributes:
        available_bytes: memory that the run can have, this process's own included.
        free_disk_bytes: on the disk of the run's folder.
        change: the cheapest change of the recipe that would make it fit, or ''.
    """

    stages: list[StagePlan]
    available_bytes: int
    free_disk_bytes: int
    placement: str = ""
    change: str = ""

    @property
    def peak(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak.memory.total <= self.available_bytes and self.disk_bytes <= self.free_disk_bytes

    @property
    def verdict(self) -> str:
        """One paragraph: whether it fits, and if not, what would."""
        if self.peak.memory.total > self.available_bytes:
            largest = max(asdict(self.peak.memory).items(), key=lambda part: part[1])
            text = (
                f"Stage '{self.peak.name}' needs about {show_bytes(self.peak.memory.total)} of memory "
                f"({largest[0]}: {show_bytes(largest[1])}); {show_bytes(self.available_bytes)} are available."
            )
            return f"{text} {self.change}" if self.change else text
        if self.disk_bytes > self.free_disk_bytes:
            return (
                f"The run writes up to {show_bytes(self.disk_bytes)}, and the disk has "
                f"{show_bytes(self.free_disk_bytes)} free. Write "
                "training: {save_total_limit: 1}, or choose another output."
            )
        return (
            f"It fits: {show_bytes(self.peak.memory.total)} of {show_bytes(self.available_bytes)} memory, "
            f"{show_bytes(self.disk_bytes)} of {show_bytes(self.free_disk_bytes)} disk."
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "stages": [stage.as_dict() for stage in self.stages],
            "available_bytes": self.available_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "placement": self.placement,
            "fits": self.fits,
            "verdict": self.verdict,
        }


def plan(recipe: Recipe) -> Plan:
    """Estimate every stage of a recipe without loading its model.

    Raises:
        ModelError: the model's config is not on this machine and cannot be fetched.
        DataError: a data set cannot be read.
        MethodError: a method cannot be put on this model, or not be merged where an export would merge it.
        CheckError: an evaluation measures what a stage before it trains on.
    """
    base = _Base(recipe)
    with _quietly():
        stages = _with_proofs(base, [_stage(base, index) for index in range(len(recipe.stages))])
        placement = base.placement(
            train=any(isinstance(s, TuneStage) and not is_adapter(s.method) for s in recipe.stages)
        )
    folder = Path(recipe.output).expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    found = Plan(
        stages,
        available_bytes=_available(placement.device),
        free_disk_bytes=shutil.disk_usage(folder).free,
        placement=placement.reason,
    )
    if found.peak.memory.total > found.available_bytes:
        with _quietly():
            found.change = _cheapest_change(base, found)
    return found


def trainable(recipe: Recipe) -> int:
    """Parameters that learn in the recipe's first tune stage.

    Raises:
        MethodError: the method cannot be put on this model.
    """
    stage = next(s for s in recipe.stages if isinstance(s, TuneStage))
    base = _Base(recipe)
    with _quietly():
        placement = base.placement(train=not is_adapter(stage.method))
        method = stage.method.method(**stage.method.options)
        return trained(footprint.attach(base.model(placement), method))[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """What the parts log belongs to the stages that use them in earnest."""
    log = logging.getLogger("luthier")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _available(device: str) -> int:
    own = resident_memory() if device == "cpu" else 0
    return machine.available_memory(device) + own


@dataclass
class _Base:
    """The recipe's model as far as its config tells, and what is measured once for all stages."""

    recipe: Recipe
    amounts: dict[str, Amount] = field(default_factory=dict)

    @cached_property
    def source(self) -> sources.Source:
        return sources.locate(self.recipe.model.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        found = sources.config(self.source)
        if found is None:
            from transformers import AutoConfig

            try:
                found = AutoConfig.from_pretrained(
                    self.source.hub_id,
                    revision=self.recipe.model.revision,
                    trust_remote_code=self.recipe.model.trust_remote_code,
                ).to_dict()
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"The config of model '{self.source.name}' cannot be fetched: {error}",
                    fix="Check the name and the connection, or name a model that is on this machine.",
                ) from error
        return found

    def placement(self, *, train: bool) -> Placement:
        model = self.recipe.model
        return place(model.dtype, model.device, model.attn, train=train)

    def model(self, placement: Placement) -> Any:
        assert self.recipe.model.task is not None
        return footprint.skeleton(self.config, self.recipe.model.task, placement, self.num_labels)

    @cached_property
    def num_labels(self) -> int | None:
        """Classes, as the recipe says or as they are counted when the model is loaded."""
        if self.recipe.model.num_labels is None and self.recipe.model.task == "classification":
            return count_labels(self.recipe)
        return self.recipe.model.num_labels

    def amount(self, stage: TuneStage | EvaluateStage) -> Amount:
        held_out = getattr(stage, "eval_data", None)
        key = stage.data.model_dump_json() + (held_out.model_dump_json() if held_out is not None else "")
        if key not in self.amounts:
            self.amounts[key] = amount(stage_data(stage)[0], self.source)
        return self.amounts[key]


def _stage(base: _Base, index: int) -> StagePlan:
    stage = base.recipe.stages[index]
    if isinstance(stage, TuneStage):
        before = [s for s in base.recipe.stages[:index] if isinstance(s, TuneStage)]
        return _search(base, stage) if stage.searches else _tune(base, stage, before)
    if isinstance(stage, CompressStage):
        return _compress(base, stage)
    tuned = next(
        (s for s in reversed(since_base(base.recipe.stages[:index])) if isinstance(s, TuneStage)), None
    )
    if isinstance(stage, EvaluateStage):
        return _evaluate(base, stage, tuned)
    return _export(base, stage, tuned)


def _with_proofs(base: _Base, plans: list[StagePlan]) -> list[StagePlan]:
    """The plans; that of an evaluation with the proof that it measures nothing that was trained on."""
    found = []
    tunes: list[TuneStage] = []
    for stage, plan in zip(base.recipe.stages, plans, strict=True):
        if isinstance(stage, TuneStage):
            tunes.append(stage)
        elif isinstance(stage, EvaluateStage):
            measured = base.amount(stage).prompts
            proofs = [leakage.prove(tune, stage, base.amount(tune).prompts, measured) for tune in tunes]
            plan = replace(plan, proofs=tuple(proofs))
        found.append(plan)
    return found


def _method(base: _Base, stage: TuneStage, before: Sequence[TuneStage]) -> Any:
    """The config of a stage's method; adapters of earlier stages are told by the methods that train them."""
    method = stage.method.method(**stage.method.options)
    named = {name for names in stage.method.artefacts.values() for name in names}
    trained = {s.name: s.method.method(**s.method.options) for s in before if s.name in named}
    if trained:
        placement = base.placement(train=False)
        tuners = {name: footprint.attach(base.model(placement), made) for name, made in trained.items()}
        method.plan_with(tuners)
    return method


@dataclass(frozen=True)
class _Tuned:
    """A model under a method: parameters, bytes of the base, of what is added, and of a training step."""

    trainable: int
    total: int
    weights: int
    added: int
    step: footprint.Step


_known: dict[tuple[Any, ...], _Tuned] = {}  # the runs of a comparison or a race differ in other things


def _tuned(base: _Base, stage: TuneStage, before: Sequence[TuneStage], batch: Batch) -> _Tuned:
    placement = base.placement(train=not is_adapter(stage.method))
    checkpointing = bool(
        argument(stage, "gradient_checkpointing") or argument(stage, "activation_checkpointing")
    )
    key = (
        json.dumps(base.config, sort_keys=True, default=str),
        base.recipe.model.task,
        base.num_labels,
        placement,
        stage.method.model_dump_json(),
        stage.method.method.source,
        batch.rows,
        batch.length,
        batch.labelled,
        checkpointing,
    )
    if key in _known:
        return _known[key]
    method = _method(base, stage, before)
    model = footprint.attach(base.model(placement), method)
    trainable, total = trained(model)
    weights, added, _ = footprint.sizes(model)
    if hasattr(method, "quantization"):
        weights -= quantized.saved(structure.base(model), method.quantization)
    step = footprint.simulate(
        model, batch.rows, batch.length, placement, labelled=batch.labelled, checkpointing=checkpointing
    )
    found = _Tuned(trainable, total, weights, added, step)
    if not stage.method.artefacts:  # what other folders hold, or other stages of the recipe train
        _known[key] = found
    return found


def _tune(base: _Base, stage: TuneStage, before: Sequence[TuneStage] = ()) -> StagePlan:
    placement = base.placement(train=not is_adapter(stage.method))
    batch = Batch.of(stage, base.amount(stage))
    found = _tuned(base, stage, before, batch)
    step, added = found.step, found.added
    optim = str(argument(stage, "optim"))
    state = int(found.trainable * _STATE.get(optim, _ADAM))
    memory = Memory(
        weights=found.weights,
        adapter=added,
        gradients=step.gradients,
        optimizer=state,
        # Gradients come while activations go: what the pass holds at its peak is not on top of all of them.
        activations=int(machine.holes(placement.device) * max(0, step.peak - step.gradients)),
        logits=step.logits,
        runtime=machine.RUNTIME,
    )
    artefact = added or found.weights
    accumulation = argument(stage, "gradient_accumulation_steps")
    forward_backward = machine.step_seconds(step.operations, step.written, placement)
    update = 2 * (step.gradients * 2 + state) / machine.bandwidth(placement.device)
    return StagePlan(
        stage.name,
        stage.kind,
        memory,
        found.trainable,
        found.total,
        seconds=machine.START + batch.steps * (accumulation * batch.fill * forward_backward + update),
        disk_bytes=artefact + _checkpoints(stage, artefact, state),
        artefact_bytes=artefact,
        detail=f"{batch.steps} steps of {batch.rows * accumulation} x {batch.fill * batch.length:.0f} tokens",
    )


def _search(base: _Base, stage: TuneStage) -> StagePlan:
    """A search trains nothing: texts go through the model, and gradients back through one batch at a time."""
    placement = base.placement(train=False)
    model = base.model(placement)
    weights, _, _ = footprint.sizes(model)
    parameters = sum(p.numel() for p in model.parameters())
    method = stage.method.method(**stage.method.options)
    data = base.amount(stage)
    count = method.rows_scored(len(data), round(HELD_OUT * len(data)))
    tokens = min(method.batch_size, len(data)) * data.quantile(1)
    kept = tokens * _width(model.config) * placement.dtype.itemsize * len(structure.blocks(model))
    logits = method.batch_size * model.config.vocab_size * 8
    speed = machine.product_speed(placement.dtype, placement.device)
    return StagePlan(
        stage.name,
        stage.kind,
        Memory(weights=weights, activations=kept, logits=logits, runtime=machine.RUNTIME),
        trainable=0,
        total=parameters,
        seconds=machine.START + 2 * parameters * count * data.tokens / len(data) / speed,
        disk_bytes=1 << 20,
        detail=f"{count} texts",
    )


def _checkpoints(stage: TuneStage, artefact: int, state: int) -> int:
    """Bytes of checkpoints at their most: those kept, and the one that is being written."""
    if str(argument(stage, "save_strategy")) == "no":
        return 0
    kept = stage.training.get("save_total_limit", 2)
    each = artefact + (0 if argument(stage, "save_only_model") else state)
    return (1 + (kept or 10)) * each


def _compress(base: _Base, stage: CompressStage) -> StagePlan:
    """One set of hidden states, the curvature of the widest layer with its factors, and what is trained."""
    placement = base.placement(train=False)
    model = base.model(placement)
    weights, _, _ = footprint.sizes(model)
    parameters = sum(p.numel() for p in model.parameters())
    methods = [spec.method(**spec.options) for spec in stage.method]
    kept = weights - footprint.compressed_away(model, methods)
    given = stage.calibration
    tokens = given.samples * given.max_length if given is not None else 0
    widest = max(dimensions(layer)[1] for layer in structure.linears(model).values())
    states = 2 * tokens * model.config.hidden_size * placement.dtype.itemsize
    batch = min(tokens, TOKENS) * _width(model.config) * placement.dtype.itemsize
    memory = Memory(
        weights=weights,
        activations=states + batch,
        logits=16 * widest**2,
        runtime=2 * machine.RUNTIME + weights,
    )
    # Two runs of each block; the sweep of a column touches all rows once.
    speed = machine.product_speed(placement.dtype, placement.device)
    seconds = 4 * parameters * tokens / speed + 4 * parameters * widest / speed + 30
    trainable = 0
    for method in methods:
        course = method.course(given and given.max_length) if hasattr(method, "course") else None
        if course is None:
            continue
        labelled = course.rows * course.length
        step = footprint.simulate(
            base.model(placement), course.rows, course.length, placement, labelled=labelled
        )
        share = 1.0 if course.at_once is None else course.at_once / len(structure.blocks(model))
        trainable = max(trainable, round(course.learns * parameters))
        memory = replace(
            memory,
            gradients=max(memory.gradients, round(course.learns * share * step.gradients)),
            optimizer=max(memory.optimizer, round(_ADAM * course.learns * share * parameters)),
            activations=max(memory.activations, round(share * max(0, step.peak - step.gradients))),
            logits=max(memory.logits, step.logits),
        )
        seconds += course.steps * machine.step_seconds(step.operations, step.written, placement)
        seconds += course.written * weights / machine.bandwidth(placement.device)
    return StagePlan(
        stage.name, stage.kind, memory, trainable, total=parameters, seconds=seconds,
        disk_bytes=weights + kept, artefact_bytes=kept, detail=stage.summary(),
    )  # fmt: skip


def _evaluate(base: _Base, stage: EvaluateStage, tuned: TuneStage | None) -> StagePlan:
    placement = base.placement(train=tuned is not None and not is_adapter(tuned.method))
    model = base.model(placement)
    weights, _, _ = footprint.sizes(model)
    parameters = sum(p.numel() for p in model.parameters())
    data = base.amount(stage)
    count = min(len(data), stage.samples or len(data))
    rows = min(stage.batch_size, count)
    longest = data.quantile(1)
    size = placement.dtype.itemsize
    speed = machine.product_speed(placement.dtype, placement.device)
    # Every row goes through the model once for each kind of metric.
    once = 2 * parameters * count * data.tokens / len(data) / speed
    seconds = 0.0
    held = logits = 0
    if any(not METRICS[name].generates for name in stage.metrics):
        window = min(longest, WINDOW)
        at_once = min(stage.batch_size, -(-count * longest // window))  # windows of long texts are rows
        held = at_once * window * _width(model.config) * size
        logits = BLOCK * model.config.vocab_size * 8 if "perplexity" in stage.metrics else 0
        seconds += once
    if any(METRICS[name].generates for name in stage.metrics):
        new = stage.generation.get("max_new_tokens") or MAX_NEW_TOKENS
        prompts = rows * longest * _width(model.config) * size
        held = max(held, prompts) + _cache_bytes(model.config, rows * (longest + new), size)
        token = max(weights / machine.bandwidth(placement.device), 2 * parameters * rows / speed)
        token += len(structure.blocks(model)) * machine.TOKEN_OVERHEAD
        seconds += once + -(-count // rows) * new * token
    return StagePlan(
        stage.name,
        stage.kind,
        Memory(weights=weights, activations=held, logits=logits, runtime=machine.RUNTIME),
        total=parameters,
        seconds=seconds,
        disk_bytes=count * 4096,
        detail=f"{count} rows, {', '.join(stage.metrics)}",
    )


def _width(config: Any) -> int:
    """Numbers that a block holds for a token: its states, queries to values, the wide middle."""
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 6 * config.hidden_size + 3 * wide


def _cache_bytes(config: Any, tokens: int, size: int) -> int:
    """Keys and values of all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * size * tokens


def _export(base: _Base, stage: ExportStage, tuned: TuneStage | None) -> StagePlan:
    placement = base.placement(train=tuned is not None and not is_adapter(tuned.method))
    model = base.model(placement)
    weights, _, _ = footprint.sizes(model)
    parameters = sum(p.numel() for p in model.parameters())
    artefact = weights
    reloaded = None
    if stage.format == "gguf":
        artefact, reloaded = _gguf_bytes(stage, model), 4 * parameters
    elif not stage.whole and tuned is not None:
        _, artefact, _ = footprint.sizes(footprint.attach(model, tuned.method.method(**tuned.method.options)))
    if stage.merge and tuned is not None:
        require_mergeable(footprint.attach(model, tuned.method.method(**tuned.method.options)))
    # A merge runs in float32, as a GGUF file is compared; the proof loads what was written once more, in a
    # process of its own.
    merged = parameters * 4 if stage.merge or reloaded else 0
    memory = Memory(weights=weights, activations=merged, runtime=2 * machine.RUNTIME + (reloaded or artefact))
    return StagePlan(
        stage.name, stage.kind, memory, total=parameters, seconds=20 + artefact / 1e8,
        disk_bytes=artefact, artefact_bytes=artefact, detail=stage.summary(),
    )  # fmt: skip


def _gguf_bytes(stage: ExportStage, model: Any) -> int:
    """Size of the GGUF file; raises ModelError where the model cannot be written as one."""
    from luthier.models.gguf_writing import file_size, require_writable

    assert stage.gguf_type is not None
    require_writable(model, stage.gguf_type)
    return file_size(model, stage.gguf_type)


def _cheapest_change(base: _Base, found: Plan) -> str:
    """The first of the changes, cheapest for the result first, with which the largest stage fits."""
    index = found.stages.index(found.peak)
    stage = base.recipe.stages[index]
    for text, changed in changes(stage):
        recipe = base.recipe.model_copy(
            update={"stages": [*base.recipe.stages[:index], changed, *base.recipe.stages[index + 1 :]]}
        )
        try:
            needed = _stage(_Base(recipe, base.amounts), index).memory.total
        except LuthierError:
            continue
        if needed <= found.available_bytes:
            return f"It would fit ({show_bytes(needed)}) with {text}."
    return "No change of batch, checkpointing, optimizer or method would make it fit: choose a smaller model."
