"""What a stage is given: the model in the state that it expects, its folder, and what came before.

One model is in memory at a time and serves all stages, and all runs of a comparison. Adapters are taken off
their base and put on it from their folders; the base is used again only if it is proven to be as it was
loaded, bit by bit. So a stage sees what a fresh process would see, and a tuned model is measured as it was
saved.
"""

import copy
import logging
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from luthier.data import load as data
from luthier.evaluation.text_prompt import TextPrompt
from luthier.models import sources
from luthier.models.bits import digest
from luthier.models.loading import load, load_onto, note_origin
from luthier.models.placement import Placement, place
from luthier.recipe.inputs import Upstream, model_input
from luthier.recipe.manifest import Manifest
from luthier.recipe.schema import MethodSpec, Recipe
from luthier.resources import release_memory

log = logging.getLogger("luthier.recipe")


@dataclass(frozen=True)
class State:
    """Weights and how they are held; two stages with equal states can use the same model object.

    Attributes:
        name: what `luthier.load` takes: the recipe's model, or an artefact folder.
        content: hash of what is behind the name, which may be written again under the same name.
        options: the other arguments of `luthier.load`, sorted pairs; dtype and device are settled ones.
        seed: of a new classification head; None where nothing is random.
        base: what the adapter in `name` stands on; None for a whole model.
    """

    name: str
    content: str
    options: tuple[tuple[str, Any], ...]
    seed: int | None = None
    base: "State | None" = None


@cache
def _placement(dtype: str, device: str, attn: str, train: bool) -> Placement:
    return place(dtype, device, attn, train=train)


class Models:
    """The one loaded model, its state, and the base under it."""

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._state: State | None = None
        self._base: _Pristine | None = None
        self.loads = 0

    def get(self, state: State) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model in `state`, in evaluation mode, and a tokenizer of the caller's own."""
        if self._state != state:
            if state.base is not None:
                self._put_on(state, state.base)
            elif not self._take_off(state):
                self._load(state)
        self._model.eval()
        return self._model, copy.deepcopy(self._tokenizer)

    def lend(self, state: State) -> tuple[Any, PreTrainedTokenizerBase]:
        """As `get`, for a stage that changes the model; it is used again only after `settle`."""
        model, tokenizer = self.get(state)
        self._model = self._state = None
        return model, tokenizer

    def settle(self, model: Any, tokenizer: PreTrainedTokenizerBase, state: State) -> None:
        """Take a lent model back: its weights are now those of `state`; all else is put back as loaded."""
        if self._base is None:
            return
        self._model = model
        if isinstance(model, PeftModel):
            return  # its base serves again; the adapter comes from its folder, as it does for everybody else
        if self._base.put_back(model):
            note_origin(model, str(Path(state.name).expanduser().resolve()))
            model.name_or_path = model.config._name_or_path = state.name
            self._tokenizer, self._state = tokenizer, state
        self._base = None  # its weights were trained

    def drop(self) -> None:
        """Forget the model, and give its memory back."""
        if self._model is not None:
            self._model = self._tokenizer = self._state = self._base = None
            release_memory()

    def _load(self, state: State) -> None:
        self.drop()
        if state.seed is not None:
            set_seed(state.seed)
        self._model, self._tokenizer = load(state.name, **dict(state.options))
        self.loads += 1
        self._state = state
        if isinstance(self._model, PreTrainedModel):
            self._base = _Pristine(self._model, self._tokenizer, state)

    def _put_on(self, state: State, base: State) -> None:
        """The adapter of `state` on its base."""
        model, tokenizer = self.lend(base)
        trust = dict(state.options)["trust_remote_code"]
        model, tokenizer = load_onto(model, tokenizer, Path(state.name), trust_remote_code=trust)
        self._model, self._tokenizer, self._state = model, tokenizer, state

    def _take_off(self, state: State) -> bool:
        """Take the adapter off; whether what is left is proven to be the model in `state`."""
        base = self._base
        if base is None or base.state != state or not isinstance(self._model, PeftModel):
            return False
        if not hasattr(self._model.base_model, "unload"):
            return False
        model = self._model.base_model.unload()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # weights in 4 bits cannot
        if not (base.put_back(model) and base.holds(model)):
            log.warning("the base model was changed by the stage before; it is loaded again")
            return False
        self._model, self._tokenizer, self._state = model, base.tokenizer, state
        return True


class _Pristine:
    """How a model was when it was loaded: enough to put back what training sets, and to prove the weights."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: State):
        self.state = state
        self.tokenizer = tokenizer
        self._settings = [
            (target, copy.deepcopy(vars(target)))
            for target in (model.config, getattr(model, "generation_config", None))
            if target is not None
        ]
        self._attributes = set(vars(model))
        self._weights = _digests(model)
        self._structure = _structure(model)

    def put_back(self, model: PreTrainedModel) -> bool:
        """Undo in place what a trainer sets beside the weights: configs, hooks, attributes.

        Returns:
            Whether the modules, with all that hangs on them, are those that were loaded.
        """
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        model.disable_input_require_grads()
        for target, saved in self._settings:
            vars(target).clear()
            vars(target).update(copy.deepcopy(saved))
        for name in set(vars(model)) - self._attributes:
            delattr(model, name)
        return _structure(model) == self._structure

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether all weights and buffers are those that were loaded, bit by bit."""
        return _digests(model) == self._weights


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """A hash of the bits of every parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: digest(tensor) for name, tensor in tensors}


def _structure(model: PreTrainedModel) -> list[tuple]:
    """The modules, with what can be put on them from outside: hooks, and a forward of the instance's own."""
    return [
        (
            name,
            type(module),
            "forward" in vars(module),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
        )
        for name, module in model.named_modules()
    ]


@dataclass
class Context:
    """What one stage is given.

    Attributes:
        run_folder: the run's folder.
        work: the folder that the stage writes in; it becomes the stage's folder when the stage is done.
        upstream: the output of the last stage that changed the model; None for the base.
        earlier: manifests of the stages before, in order.
        resume: whether `work/checkpoints` holds what an interrupted session left.
        expected_memory: the plan's estimate of this stage's peak in bytes.
        outputs: the artefact folder of each earlier stage that has one, by its name.
        trial: the run's models are compared and thrown away (`luthier.recipe.runner.run`).
        placement: how the model that the stage took is held; None before it took one.
    """

    recipe: Recipe
    run_folder: Path
    work: Path
    models: Models
    upstream: Upstream | None = None
    earlier: tuple[Manifest, ...] = ()
    resume: bool = False
    expected_memory: int | None = None
    outputs: dict[str, Path] = field(default_factory=dict)
    trial: bool = False
    placement: Placement | None = field(default=None, init=False)

    def method(self, spec: MethodSpec) -> Any:
        """The config of a method; where its options name stages, it gets their folders."""
        folders = {
            option: [str(self.outputs.get(name, name)) for name in names]
            for option, names in spec.artefacts.items()
        }
        return spec.method(**spec.options | folders)

    def model(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model as the stages before left it, to be read only, and a tokenizer."""
        self.placement = self._place(train=False)
        return self.models.get(self._state(self.upstream, train=False))

    def lend(self, *, train: bool, quantization: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model as the stages before left it, to be changed.

        Args:
            train: the model's own weights will learn (they are then held in float32).
            quantization: hold the base in 4 bits, as `luthier.load` does.
        """
        self.placement = self._place(train=train)
        return self.models.lend(self._state(self.upstream, train=train, quantization=quantization))

    def settle(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, output: Upstream, *, train: bool
    ) -> None:
        """Hand the lent model back as the output of this stage, so that the next need not load it."""
        self.models.settle(model, tokenizer, self._state(output, train=train))

    def prompt(self) -> TextPrompt | None:
        """The text prompt that a search of the stages before found for the model."""
        if self.upstream is None or not self.upstream.prompt:
            return None
        return TextPrompt.load(self.upstream.artefact)

    def _place(self, *, train: bool) -> Placement:
        spec = self.recipe.model
        return _placement(spec.dtype, spec.device, spec.attn, train)

    def _state(self, upstream: Upstream | None, *, train: bool, quantization: str | None = None) -> State:
        if upstream is not None and upstream.prompt:
            return self._state(upstream.base, train=train, quantization=quantization)
        spec = self.recipe.model
        task = spec.task or "causal"
        where = self._place(train=train)
        options: dict[str, Any] = {
            "task": task,
            "dtype": str(where.dtype).removeprefix("torch."),
            "device": where.device,
            "attn": where.attn,
            "trust_remote_code": spec.trust_remote_code,
        }
        seed = base = None
        if upstream is not None and upstream.adapter:
            held = sources.base_quantization(upstream.artefact)
            base = self._state(upstream.base, train=False, quantization=held)
        if quantization is not None:
            options["quantization"] = quantization
        if upstream is None:
            options["revision"] = spec.revision
            if task == "classification":
                options["num_labels"] = spec.num_labels or count_labels(self.recipe)
                seed = self.recipe.seed
        return State(
            name=str(upstream.artefact if upstream else spec.name),
            content=upstream.sha256 if upstream else model_input(spec)["sha256"],
            options=tuple(sorted(options.items())),
            seed=seed,
            base=base,
        )


def count_labels(recipe: Recipe) -> int | None:
    """The number of classes in the first stage's data that has classes; None if none has."""
    for stage in recipe.stages:
        spec = getattr(stage, "data", None)
        if spec is None:
            continue
        if spec.labels:
            return len(spec.labels)
        loaded = data.load(spec, rejected_file=Path(os.devnull))  # the stage that reads them keeps them
        if loaded.type == "classification":
            return len({row["label"] for row in loaded.records})
    return None
