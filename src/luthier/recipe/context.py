"""What a stage is given: the model in the state that it expects, its folder, and what came before.

One model is in memory at a time and serves all stages, and all runs of a comparison. When a stage asks for
another state, the adapter is taken off and the base is used again if it is proven to be as it was loaded;
otherwise the state is loaded from its folder. Either way a stage sees what a fresh process would see.
"""

import copy
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from luthier.data import load as data
from luthier.models.loading import load
from luthier.models.placement import Placement, place
from luthier.recipe.inputs import Upstream, model_input
from luthier.recipe.manifest import Manifest
from luthier.recipe.schema import Recipe
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
    """

    name: str
    content: str
    options: tuple[tuple[str, Any], ...]
    seed: int | None = None


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
        if self._state != state and not self._restored(state):
            self.drop()
            if state.seed is not None:
                set_seed(state.seed)
            self._model, self._tokenizer = load(state.name, **dict(state.options))
            self.loads += 1
            self._state = state
            if isinstance(self._model, PreTrainedModel):
                self._base = _Pristine(self._model, self._tokenizer, state)
        self._model.eval()
        return self._model, copy.deepcopy(self._tokenizer)

    def lend(self, state: State) -> tuple[Any, PreTrainedTokenizerBase]:
        """As `get`, for a stage that changes the model; it is used again only after `settle`."""
        model, tokenizer = self.get(state)
        self._model, self._state = None, None
        return model, tokenizer

    def settle(self, model: Any, tokenizer: PreTrainedTokenizerBase, state: State) -> None:
        """Take a lent model back: its weights are now those of `state`; all else is put back as loaded."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if self._base is None:
            return
        self._base.put_back(base)
        self._model, self._tokenizer, self._state = model, tokenizer, state
        if not isinstance(model, PeftModel):
            self._base = None  # its weights were trained

    def drop(self) -> None:
        """Forget the model, and give its memory back."""
        self._model = self._tokenizer = self._state = self._base = None
        release_memory()

    def _restored(self, state: State) -> bool:
        """Take the adapter off; whether what is left is the base in `state`, weight by weight."""
        base = self._base
        if base is None or base.state != state or not isinstance(self._model, PeftModel):
            return False
        if not hasattr(self._model.base_model, "unload"):
            return False
        model = self._model.base_model.unload()
        if not base.holds(model):
            log.warning("the base model was changed by the stage before; it is loaded again")
            return False
        base.put_back(model)
        model.requires_grad_(True)
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

    def put_back(self, model: PreTrainedModel) -> None:
        """Undo what a trainer sets beside the weights: config, generation config, hooks, checkpointing."""
        if model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        model.disable_input_require_grads()
        for target, saved in self._settings:
            vars(target).clear()
            vars(target).update(copy.deepcopy(saved))

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether weights (bit by bit), modules and hooks are those that were loaded."""
        for name in set(vars(model)) - self._attributes:
            delattr(model, name)  # PEFT leaves its config on the base
        return _structure(model) == self._structure and _digests(model) == self._weights


def _digests(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, int]]:
    """A hash of the bits of every parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (t.dtype, int(torch.hash_tensor(t.detach()).item())) for name, t in tensors if t.numel()}


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
    """

    recipe: Recipe
    run_folder: Path
    work: Path
    models: Models
    upstream: Upstream | None = None
    earlier: tuple[Manifest, ...] = ()
    resume: bool = False

    def model(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model as the stages before left it, to be read only, and a tokenizer."""
        return self.models.get(self._state(train=False))

    def lend(self, *, train: bool) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model as the stages before left it, to be changed.

        Args:
            train: the model's own weights will learn (they are then held in float32).
        """
        return self.models.lend(self._state(train=train))

    def settle(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, output: Upstream, *, train: bool
    ) -> None:
        """Hand the lent model back as the output of this stage, so that the next need not load it."""
        self.models.settle(model, tokenizer, self._state(train=train, upstream=output))

    def _state(self, *, train: bool, upstream: Upstream | None = None) -> State:
        spec = self.recipe.model
        upstream = upstream or self.upstream
        task = spec.task or "causal"
        where = _placement(spec.dtype, spec.device, spec.attn, train)
        options: dict[str, Any] = {
            "task": task,
            "dtype": str(where.dtype).removeprefix("torch."),
            "device": where.device,
            "attn": where.attn,
            "trust_remote_code": spec.trust_remote_code,
        }
        seed = None
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
        )


def count_labels(recipe: Recipe) -> int | None:
    """The number of classes in the first stage's data that has classes; None if none has."""
    for stage in recipe.stages:
        spec = getattr(stage, "data", None)
        if spec is None:
            continue
        if spec.labels:
            return len(spec.labels)
        loaded = data.load(spec)
        if loaded.type == "classification":
            return len({row["label"] for row in loaded.records})
    return None
