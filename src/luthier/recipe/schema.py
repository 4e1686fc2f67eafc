"""The recipe language: what a recipe may say, as strict pydantic models.

A recipe is read by `luthier.recipe.source.load_recipe`, which tells the line of every fault and checks what
only the whole recipe or the disk can tell (`luthier.recipe.validate`). A stage is written as a mapping of one
key, its kind: `- tune: {data: train.jsonl, method: lora}`; in Python it is a `TuneStage`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from luthier import taxonomy
from luthier.data.spec import DataSpec
from luthier.errors import LuthierError, MethodError, did_you_mean
from luthier.evaluation.names import METRICS
from luthier.models.names import attention_fault, device_fault
from luthier.options import Option
from luthier.recipe.arguments import generation_fault, training_fault, training_schema
from luthier.recipe.expectation import EXPECTATION

Task = Literal["causal", "classification", "seq2seq", "masked"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Objectives that decide the kind of model; all others train a causal language model.
TASK_OF_OBJECTIVE: dict[str, Task] = {"classification": "classification", "seq2seq": "seq2seq"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def fault(message: str, fix: str | None = None) -> PydanticCustomError:
    """A fault in our own words; `fix` says what to write instead."""
    return PydanticCustomError("luthier", "{message}", {"message": message, "fix": fix})


def faults(found: list[tuple[tuple[str | int, ...], str, str | None]], title: str) -> ValidationError:
    """Several faults below one value, each (place, message, fix), as the one error that pydantic merges."""
    return ValidationError.from_exception_data(
        title, [InitErrorDetails(type=fault(text, fix), loc=loc, input=None) for loc, text, fix in found]
    )


def _plain_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise fault(
            f"must be a plain name (it becomes a folder), not {name!r}", "Use letters, digits, '.', '_', '-'."
        )
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]


def _known(find: Callable[[str], tuple[str, str] | None]) -> AfterValidator:
    """A string that is one of some names; `find` says what is wrong with it and what to write instead."""

    def check(name: str) -> str:
        if found := find(name):
            raise fault(*found)
        return name

    return AfterValidator(check)


class Strict(BaseModel):
    """No unknown keys and no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ModelSpec(Strict):
    """The model to start from. A plain string is its name."""

    name: str = Field(min_length=1)
    """Alias, folder, GGUF file, run folder or Hub id."""
    task: Task | None = None
    """What the model does; by default as the objective or the metrics ask."""
    dtype: Dtype = "auto"
    """Precision of the weights; auto picks the fastest that is safe on this machine."""
    device: Annotated[str, _known(device_fault)] = "auto"
    """cpu, cuda, cuda:1, mps, xpu; auto picks a GPU where there is one."""
    attn: Annotated[str, _known(attention_fault)] = "auto"
    """Attention of transformers (sdpa, eager, flash_attention_2 ...), or a kernel of the Hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with a Hub model. Only for code that you have read."""
    num_labels: int | None = Field(None, ge=1)
    """Classes of a classification model; by default counted in the data."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "description": "Name of the model."}, handler(core)]}


class MethodSpec(Strict):
    """A method of the tree and its options. Written as a name, or as `{name: lora, r: 16}`."""

    branch: ClassVar[str] = ""
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            raise fault("must name a method", f"Write {{name: {cls._names()[0]}, ...}}.")
        try:
            method = taxonomy.find(value["name"], cls.branch)
            options = method.options()
        except MethodError as error:
            raise faults([(("name",), error.message, error.fix)], cls.__name__) from error
        given = {key: item for key, item in value.items() if key != "name"}
        if found := _option_faults(method.name, options, given):
            raise faults(found, cls.__name__)
        return {"name": value["name"], "options": given}

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name

    @property
    def method(self) -> taxonomy.Method:
        return taxonomy.find(self.name, self.branch)

    @property
    def artefacts(self) -> dict[str, list[str]]:
        """Options that name folders or earlier stages, with what they name."""
        known = [option.name for option in self.method.options() if option.artefacts]
        return {name: self.options[name] for name in known if name in self.options}

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}

    @classmethod
    def _names(cls) -> list[str]:
        return [m.name for m in taxonomy.serving(cls.branch)]

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A name, or a mapping whose other keys depend on the name: `if name is lora then these options`."""
        found = [m for m in taxonomy.serving(cls.branch) if not m.fault]
        names = {"enum": [m.name for m in found], "description": cls.__doc__}
        cases = [
            {
                "if": {"properties": {"name": {"const": m.name}}, "required": ["name"]},
                "then": {
                    "properties": {"name": {"description": m.title}} | _option_schemas(m.options()),
                    "additionalProperties": False,
                },
            }
            for m in found
        ]
        mapping = {"type": "object", "properties": {"name": names}, "required": ["name"], "allOf": cases}
        return {"anyOf": [names, mapping]}


class TuningSpec(MethodSpec):
    """Which parameters learn, and how."""

    branch = "tuning"


class CompressionSpec(MethodSpec):
    """How the model gets smaller."""

    branch = "compression"


class ObjectiveSpec(MethodSpec):
    """What the model learns from."""

    branch = "alignment"


def _option_faults(
    method: str, options: list[Option], given: dict[str, Any]
) -> list[tuple[tuple[str | int, ...], str, str | None]]:
    known = {option.name: option for option in options}
    found: list[tuple[tuple[str | int, ...], str, str | None]] = []
    for name, value in given.items():
        if name not in known:
            fix = did_you_mean(name, known) if known else f"{method} has no options."
            found.append(((name,), f"{method} has no option '{name}'", fix))
            continue
        option = known[name]
        try:
            TypeAdapter(option.annotation).validate_python(value, strict=True)
        except ValidationError:
            kind = f"one of {', '.join(map(_as_yaml, option.choices))}" if option.choices else option.type
            found.append(((name,), f"must be {kind}, not {value!r}", f"{name}: {option.help}."))
            continue
        if text := option.check(value):
            found.append(((name,), text, f"{name}: {option.help}."))
    return found


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option_schemas(options: list[Option]) -> dict[str, Any]:
    bounds = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    found = {}
    for option in options:
        schema = TypeAdapter(option.annotation).json_schema()
        schema |= {key: getattr(option, b) for b, key in bounds.items() if getattr(option, b) is not None}
        if option.choices:
            schema = {"enum": list(option.choices)}
        found[option.name] = schema | {"description": option.help, "default": option.default}
    return found


class Stage(Strict):
    """What all kinds of stage have. `kind` is the key that a recipe writes it under."""

    kind: ClassVar[str] = ""
    name: PlainName = ""
    """Name of the stage's folder, and of the stage in overrides; its kind by default."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        self.name = self.name or self.kind
        return self

    def summary(self) -> str:
        """What the stage does, in a few words."""
        raise NotImplementedError


class TuneStage(Stage):
    """Train the model: a method says which parameters learn, an objective what they learn from."""

    kind = "tune"
    data: DataSpec
    """Training data: a file, folder or Hub id, or a mapping that says how to read it."""
    eval_data: DataSpec | None = None
    """Held-out data on which the loss is measured during training."""
    method: TuningSpec
    """Which parameters learn: a tuning method."""
    objective: ObjectiveSpec = Field("sft", validate_default=True)
    """What the model learns from."""
    training: Annotated[dict[str, Any], WithJsonSchema(training_schema())] = Field(default_factory=dict)
    """Fields of transformers.TrainingArguments."""
    from_base: bool = False
    """Start from the recipe's model, whatever the stages before have left."""

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        objective = info.data.get("objective")
        name = objective.name if objective else "sft"
        options = {option.name for option in objective.method.options()} if objective else set()
        found = [(key, training_fault(key, value, name, options)) for key, value in training.items()]
        if any(text for _, text in found):
            raise faults([((key,), *text) for key, text in found if text], "training")
        return training

    @property
    def searches(self) -> bool:
        """Whether it finds a text prompt for the model instead of training it."""
        return self.method.method.searches

    def summary(self) -> str:
        by = "" if self.searches else f" by {self.objective}"
        return f"{self.method}{by} on {self.data.path}"


class Calibration(Strict):
    """What a compression method sees of the data that the model will work on."""

    data: DataSpec
    """Texts or rows like those that the model will see: a file, folder or Hub id, or how to read it."""
    samples: int = Field(64, ge=1)
    """Windows (of a classifier: rows) that are taken, spread over the data with the recipe's seed."""
    max_length: int = Field(512, ge=8)
    """Tokens of a window."""


class CompressStage(Stage):
    """Make the model smaller: round its weights, or remove some; several methods go in one pass."""

    kind = "compress"
    method: list[CompressionSpec] = Field(min_length=1)
    """A compression method, or a list of them, such as [smoothquant, gptq]."""
    calibration: Calibration | None = None
    """Data that the methods look at; methods that look at weights alone need none."""
    from_base: bool = False
    """Start from the recipe's model, whatever the stages before have left."""

    @field_validator("method", mode="before")
    @classmethod
    def _one_or_several(cls, method: Any) -> Any:
        return method if isinstance(method, list) else [method]

    @property
    def data(self) -> DataSpec | None:
        return None if self.calibration is None else self.calibration.data

    def summary(self) -> str:
        return " then ".join(map(str, self.method))


class EvaluateStage(Stage):
    """Measure the model as the stages before left it."""

    kind = "evaluate"
    data: DataSpec
    """Held-out data: a file, folder or Hub id, or a mapping that says how to read it."""
    metrics: list[str] = Field(min_length=1)
    """What to measure."""
    samples: int | None = Field(None, ge=1)
    """Use so many rows only, drawn with the recipe's seed."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """Fields of transformers.GenerationConfig for the metrics that generate."""
    batch_size: int = Field(16, ge=1)
    """Rows that go through the model at once."""
    prompt: str | None = Field(None, min_length=1)
    """Text prompt (file or folder) with which a language model classifies; default: what a search found."""
    expect: dict[str, str] = Field(default_factory=dict)
    """What must come out, such as `exact_match: '>= 0.8'`; a miss fails the run."""

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: list[str]) -> list[str]:
        found: list[tuple[tuple[str | int, ...], str, str | None]] = []
        for index, name in enumerate(metrics):
            if name not in METRICS:
                found.append(((index,), f"unknown metric '{name}'", did_you_mean(name, METRICS)))
            elif name in metrics[:index]:
                found.append(((index,), f"metric '{name}' stands here twice", None))
        if found:
            raise faults(found, "metrics")
        return metrics

    @field_validator("generation")
    @classmethod
    def _known_generation(cls, generation: dict[str, Any]) -> dict[str, Any]:
        found = [(key, generation_fault(key, value)) for key, value in generation.items()]
        if any(text for _, text in found):
            raise faults([((key,), *text) for key, text in found if text], "generation")
        return generation

    @field_validator("expect", mode="before")
    @classmethod
    def _readable_expectations(cls, expect: Any) -> Any:
        if isinstance(expect, dict):
            found: list[tuple[tuple[str | int, ...], str, str | None]] = [
                ((key,), f"must be a comparison such as '>= 0.8', not {text!r}", None)
                for key, text in expect.items()
                if not (isinstance(text, str) and EXPECTATION.fullmatch(text))
            ]
            if found:
                raise faults(found, "expect")
        return expect

    def summary(self) -> str:
        return f"{', '.join(self.metrics)} on {self.data.path}"


class ExportStage(Stage):
    """Write the model as a folder that transformers or PEFT load."""

    kind = "export"
    format: Literal["safetensors", "adapter", "lora", "gguf", "gptq"] = "safetensors"
    """A whole model; what a PEFT method added to it; that as a LoRA, which more servers load; a whole model
    in one file for llama.cpp; or one with quantised layers as AutoGPTQ lays them out."""
    gguf_type: Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] | None = None
    """How a GGUF file holds the weights; Q8_0 by default (with format: gguf)."""
    rank: int | float | None = None
    """Of the LoRA: a number, or the share of each change to keep, such as 0.99 (with format: lora)."""
    merge: bool | None = None
    """Merge the adapter into the weights; by default exactly where the format needs it."""
    dtype: Dtype = "auto"
    """Precision of the written weights; auto keeps that of the model."""

    @field_validator("rank")
    @classmethod
    def _number_or_share(cls, rank: float | None) -> float | None:
        if rank is None or rank in range(1, 1 << 20) or 0 < rank < 1:
            return rank
        raise fault(
            f"rank: {rank} is neither a whole number from 1 nor a share between 0 and 1",
            "Write rank: 16, say, or rank: 0.99 to keep 99% of every change.",
        )

    @model_validator(mode="after")
    def _rank_of_a_lora(self) -> Self:
        if self.format == "lora" and self.rank is None:
            raise fault("format: lora needs a rank", "Add rank: 16, say, or rank: 0.99.")
        if self.format != "lora" and self.rank is not None:
            raise fault(f"format: {self.format} has no rank", "Write format: lora, or leave rank out.")
        return self

    @model_validator(mode="after")
    def _type_of_a_gguf(self) -> Self:
        if self.format == "gptq" and self.dtype != "auto":
            raise fault("format: gptq has no dtype", "Leave dtype out: scales are in half precision.")
        if self.format != "gguf":
            if self.gguf_type is not None:
                fix = "Write format: gguf, or leave gguf_type out."
                raise fault(f"format: {self.format} has no gguf_type", fix)
            return self
        if self.dtype != "auto":
            raise fault("format: gguf has no dtype", "Say with gguf_type how the weights are held.")
        self.gguf_type = self.gguf_type or "Q8_0"
        return self

    @property
    def whole(self) -> bool:
        """Whether it writes a whole model, and no adapter."""
        return self.format in ("safetensors", "gguf", "gptq")

    def summary(self) -> str:
        rank = f" of rank {self.rank}" if self.format == "lora" else ""
        held = f" {self.gguf_type}" if self.gguf_type else ""
        return f"{'merged ' if self.merge else ''}{self.format}{held}{rank}"


class StageItem(Strict):
    """One stage: a mapping of one key, its kind."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    tune: TuneStage | None = None
    compress: CompressStage | None = None
    evaluate: EvaluateStage | None = None
    export: ExportStage | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        if isinstance(value, Stage):
            return {value.kind: value}
        if isinstance(value, dict) and len(value) != 1:
            kinds = ", ".join(cls.model_fields)
            raise fault(
                f"a stage is a mapping of one key, its kind; found {len(value)}: {', '.join(value)}",
                f"Write '- tune:' and indent its keys below it; kinds are {kinds}.",
            )
        return value


class _StageList:
    """`list[Stage]` that is written as a list of one-key mappings."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda items: [getattr(item, kind) for item in items for kind in item.model_fields_set],
            handler(list[StageItem]),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda stages: [{stage.kind: stage.model_dump(mode="json")} for stage in stages]
            ),
        )


class Recipe(Strict):
    """From a base model to a tuned, evaluated, proven artefact: stages run in the order they are written."""

    name: PlainName
    """Name of the run's folder."""
    methods: list[str] = Field(default_factory=list)
    """Python files with methods of your own."""
    model: ModelSpec
    """The model to start from: alias, folder, GGUF file, run folder or Hub id."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything random in the run."""
    output: str = Field("runs", min_length=1)
    """Folder in which the run's folder is made."""
    stages: Annotated[list[TuneStage | CompressStage | EvaluateStage | ExportStage], _StageList()] = Field(
        min_length=1
    )
    """What is done, in this order."""
    _file: Path | None = PrivateAttr(None)

    @field_validator("methods")
    @classmethod
    def _join_the_tree(cls, files: list[str], info: ValidationInfo) -> list[str]:
        folder = (info.context or {}).get("folder")
        found: list[tuple[tuple[str | int, ...], str, str | None]] = []
        for index, file in enumerate(files):
            path = Path(file).expanduser()
            if folder is not None and not path.is_file():
                path = Path(folder, path)
            try:
                if broken := taxonomy.add_file(path).fault:
                    found.append(((index,), f"{path} is no method file: {broken}", None))
            except LuthierError as error:
                found.append(((index,), error.message, error.fix))
        if found:
            raise faults(found, "methods")
        return files

    @model_validator(mode="after")
    def _settle(self) -> Self:
        """Fill in what follows from the rest: the model's task, and whether an export merges."""
        if self.model.task is None:
            self.model.task = implied_task(self.stages)
        tuned: TuneStage | None = None
        for stage in self.stages:
            if isinstance(stage, TuneStage):
                tuned = stage
            elif isinstance(stage, CompressStage) and stage.from_base:
                tuned = None
            elif isinstance(stage, ExportStage) and stage.merge is None:
                stage.merge = stage.whole and tuned is not None and is_adapter(tuned.method)
        return self

    @model_validator(mode="after")
    def _look_beside_the_file(self, info: ValidationInfo) -> Self:
        """Data files are looked up in the working directory, then beside the recipe."""
        folder = (info.context or {}).get("folder")
        for stage in self.stages:
            for spec in (getattr(stage, "data", None), getattr(stage, "eval_data", None)):
                if spec is not None and spec.base is None:
                    spec.base = folder
            if isinstance(stage, EvaluateStage) and stage.prompt is not None and folder is not None:
                here, beside = Path(stage.prompt).expanduser(), Path(folder, stage.prompt)
                if not here.exists() and beside.exists():
                    stage.prompt = str(beside)
        return self

    @property
    def file(self) -> Path | None:
        """The file that the recipe was read from, if any; relative paths are looked up beside it too."""
        return self._file

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, every default filled in; `Recipe.model_validate` reads it back."""
        return self.model_dump(mode="json")


def implied_task(stages: Sequence[Stage | None]) -> Task:
    """The kind of model that the first objective trains; without one, the kind that the metrics need."""
    for stage in stages:
        if isinstance(stage, TuneStage) and not stage.searches:
            return TASK_OF_OBJECTIVE.get(stage.objective.method.name, "causal")
    if any(isinstance(stage, TuneStage) for stage in stages):
        return "causal"
    measured = [
        name
        for stage in stages
        if isinstance(stage, EvaluateStage) and stage.prompt is None
        for name in stage.metrics
    ]
    return (
        "classification" if any(METRICS[name].tasks == ("classification",) for name in measured) else "causal"
    )


def is_adapter(method: MethodSpec) -> bool:
    """Whether a tuning method leaves the model's own weights as they are: what it learns stands apart."""
    return method.method.path.split("/")[1] != "partial"


def since_base(stages: Sequence[Stage | None]) -> Sequence[Stage | None]:
    """Of these stages those that the model behind them comes from: the last `from_base`, and on."""
    starts = [index for index, stage in enumerate(stages) if getattr(stage, "from_base", False)]
    return stages[starts[-1] :] if starts else stages


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, with the methods and options of the tree as it is now."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


KINDS: dict[str, type[Stage]] = {
    kind: get_args(field.annotation)[0] for kind, field in StageItem.model_fields.items()
}
