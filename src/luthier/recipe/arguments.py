"""What `training:` and `generation:` of a recipe may hold, read from transformers' source, not imported.

Importing transformers takes seconds; parsing one of its files takes milliseconds. The fields, types and
choices are therefore those of the installed version, whichever it is.
"""

import ast
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from luthier.alignment import trackers
from luthier.errors import did_you_mean, nearest
from luthier.installed import class_in, source

# Set by the recipe itself or by the runner; a second place to set them would contradict the first.
OWNED = {
    "output_dir": "The run's folder is made of `output` and `name` at the top of the recipe.",
    "seed": "Write `seed` at the top of the recipe.",
    "resume_from_checkpoint": "An interrupted stage resumes by itself; `luthier run --force` starts anew.",
    "use_cpu": "Write `device: cpu` under `model`.",
    "do_train": "A tune stage always trains.",
    "do_predict": "Add an evaluate stage.",
    "local_rank": "Start the run with `accelerate launch`.",
    "generation_config": "Write the generation settings of an evaluate stage under its `generation`.",
}
# Values outside these make the trainer or the generation fail late, or train nothing in silence.
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "max_steps": -1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "dataloader_num_workers": 0,
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "num_beams": 1,
    "top_k": 0,
    "top_p": 0,
    "min_p": 0,
    "temperature": 0,
    "repetition_penalty": 0,
    "no_repeat_ngram_size": 0,
}
# GenerationConfig declares no types; these are of the fields that are written often.
_GENERATION = {
    "max_new_tokens": "int", "max_length": "int", "min_new_tokens": "int", "num_beams": "int", "top_k": "int",
    "top_p": "float", "min_p": "float", "temperature": "float", "repetition_penalty": "float",
    "no_repeat_ngram_size": "int", "do_sample": "bool", "use_cache": "bool",
}  # fmt: skip
_ONE_ANSWER = ("num_return_sequences", "return_dict_in_generate")
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "dict": (dict,), "list": (list,),
    "None": (type(None),), "Path": (str,),
}  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """A field of a training arguments class: annotation, sentence of help ('' if none), choices, default."""

    name: str
    annotation: str
    help: str = ""
    choices: tuple[str, ...] = ()
    default: Any = None

    def types(self) -> tuple[type, ...]:
        """The Python types that the annotation allows; empty where it allows anything."""
        names = [part.split("[")[0].strip() for part in _alternatives(self.annotation)]
        if self.choices:
            names.append("str")
        if "Any" in names:
            return ()
        return tuple(t for name in names for t in _TYPES.get(name, ()))

    def fault(self, value: Any) -> str | None:
        """Why `value` cannot be given, or None. Transformers has the last word when the stage starts."""
        allowed = self.types()
        wrong = isinstance(value, bool) and bool not in allowed
        if allowed and (wrong or not isinstance(value, allowed)):
            return f"must be {self.annotation}, not {value!r}"
        if self.choices and isinstance(value, str) and value not in self.choices:
            near = list(nearest(value, self.choices, count=6) or self.choices)
            more = ["..."] if len(near) < len(self.choices) else []
            return f"must be one of {', '.join(near + more)}, not {value!r}"
        if self.name == "max_steps" and value == 0:
            return "must be at least 1, or -1 to count epochs, not 0"
        least = _AT_LEAST.get(self.name)
        if least is not None and isinstance(value, int | float) and not value >= least:
            return f"must be at least {least}, not {value!r}"
        return None


@cache
def training_arguments(seq2seq: bool = False) -> dict[str, Argument]:
    """The fields of `transformers.TrainingArguments`, and of `Seq2SeqTrainingArguments` if asked for."""
    found = _fields("transformers", "training_args.py", "TrainingArguments")
    if seq2seq:
        found |= _fields("transformers", "training_args_seq2seq.py", "Seq2SeqTrainingArguments")
    return found


@cache
def generation_arguments() -> frozenset[str]:
    """The names that `transformers.GenerationConfig` takes: what its `__init__` pops from its keywords."""
    tree = source("transformers", "generation/configuration_utils.py")
    found = set()
    for node in ast.walk(_function(class_in(tree, "GenerationConfig"), "__init__")):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "kwargs.pop":
            name = ast.literal_eval(node.args[0])
            if not name.startswith("_") and name != "transformers_version":
                found.add(name)
    return frozenset(found)


def training_fault(name: str, value: Any, objective: str, options: set[str]) -> tuple[str, str | None] | None:
    """What is wrong with `training: {name: value}` and what to write instead, or None.

    Args:
        options: names of the objective's own options, which users of TRL look for in the training arguments.
    """
    known = training_arguments(seq2seq=objective == "seq2seq")
    if name in OWNED:
        return f"'{name}' is not set under training", OWNED[name]
    if name not in known:
        if name in options:
            return (
                f"'{name}' is an option of the objective, not of the training",
                f"Write objective: {{name: {objective}, {name}: {json.dumps(value)}}}.",
            )
        valid = set(known) - set(OWNED)
        return f"unknown key '{name}' (not a field of TrainingArguments)", nearest_of(name, valid)
    if fault := known[name].fault(value):
        return fault, known[name].help or None
    return trackers.unknown(value) if name == "report_to" else None


def generation_fault(name: str, value: Any) -> tuple[str, str | None] | None:
    """What is wrong with `generation: {name: value}` and what to write instead, or None."""
    known = generation_arguments()
    if name not in known:
        return f"unknown key '{name}' (not a field of GenerationConfig)", nearest_of(name, known)
    if name in _ONE_ANSWER:
        return f"'{name}' cannot be set: each prompt gets one answer", "Leave it out."
    fault = Argument(name, _GENERATION[name]).fault(value) if name in _GENERATION else None
    return (fault, None) if fault else None


def nearest_of(name: str, choices: Iterable[str]) -> str:
    """`did_you_mean` for lists too long to print whole."""
    return did_you_mean(name, near) if (near := nearest(name, choices)) else "No valid name is near."


def training_schema() -> dict[str, Any]:
    """JSON Schema of `training:`, so that an editor completes its keys."""
    json_types = {
        int: "integer",
        float: "number",
        str: "string",
        bool: "boolean",
        dict: "object",
        list: "array",
    }
    properties: dict[str, Any] = {}
    for name, argument in training_arguments(seq2seq=True).items():
        if name in OWNED:
            continue
        types = dict.fromkeys(json_types.get(t, "null") for t in argument.types())
        if "number" in types:
            types.pop("integer", None)
        field: dict[str, Any] = {"description": argument.help} if argument.help else {}
        if argument.choices:
            field["enum"] = [*argument.choices, *([None] if "null" in types else [])]
        elif types:
            field["type"] = list(types) if len(types) > 1 else next(iter(types))
        properties[name] = field
    return {
        "type": "object",
        "description": "Fields of transformers.TrainingArguments.",
        "properties": properties,
        "additionalProperties": False,
    }


def _fields(package: str, file: str, name: str) -> dict[str, Argument]:
    tree = source(package, file)
    enums = _enums(tree) | _enums(source("transformers", "trainer_utils.py"))
    found = {}
    for node in class_in(tree, name).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        metadata = _metadata(node.value)
        type_ = ast.unparse(node.annotation)
        choices = next((enums[part] for part in _alternatives(type_) if part in enums), ())
        found[node.target.id] = Argument(
            node.target.id,
            type_,
            # The help texts are sentences for argparse: the first one says what the field is.
            str(metadata.get("help", "")).split(". ")[0].strip().rstrip("."),
            tuple(metadata.get("choices", choices)),
            _default(node.value),
        )
    return found


def _metadata(value: ast.expr | None) -> dict[str, Any]:
    for keyword in value.keywords if isinstance(value, ast.Call) else []:
        if keyword.arg == "metadata":
            try:
                return dict(ast.literal_eval(keyword.value))
            except ValueError:  # a computed help text
                return {}
    return {}


def _default(value: ast.expr | None) -> Any:
    """The default where it is a literal, else None."""
    for keyword in value.keywords if isinstance(value, ast.Call) else []:
        if keyword.arg == "default":
            try:
                return ast.literal_eval(keyword.value)  # -1 is no constant but an expression
            except ValueError:
                return None
    return None


def _enums(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """The string values of each enumeration in a module."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
            values = [child.value for child in node.body if isinstance(child, ast.Assign)]
            found[node.name] = tuple(
                value.value
                for value in values
                if isinstance(value, ast.Constant) and isinstance(value.value, str)
            )
    return found


def _alternatives(annotation: str) -> list[str]:
    """The members of a union annotation: 'dict[str, Any] | None' has 'dict[str, Any]' and 'None'."""
    node: ast.expr = ast.parse(annotation, mode="eval").body
    parts: list[str] = []
    while isinstance(node, ast.BinOp):
        parts.append(ast.unparse(node.right))
        node = node.left
    return [ast.unparse(node), *reversed(parts)]


def _function(node: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == name)
