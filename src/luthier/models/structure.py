"""The parts of a transformer, found by structure: blocks, embeddings, head, tied weights, linear layers.

No architecture is named. A *stack* is the longest list of repeated modules inside the model (inside encoder
and decoder each); what stands beside it is either an embedding or belongs to the top. Works on meta tensors.
"""

from collections.abc import Iterable, Sequence

from accelerate.utils import find_tied_parameters
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from luthier.errors import MethodError, ModelError, did_you_mean

CLASSES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,  # the last: it lists encoder-decoders too
}

Group = tuple[str, list[tuple[str, nn.Parameter]]]


def base(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def task(model: nn.Module) -> str | None:
    """The task by the model's class, one of `CLASSES`; None for another, a bare trunk say."""
    names = [cls.__name__ for cls in type(base(model)).__mro__]  # subclasses have their base's task
    for kind, classes in CLASSES.items():
        if any(name in classes.values() for name in names):
            return kind
    return None


def stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Name and list of blocks of each stack: one, or for an encoder-decoder the encoder's and the decoder's.

    Raises:
        ModelError: the model has no list of blocks.
    """
    model = base(model)
    halves = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]
    names = {module: name for name, module in model.named_modules()}
    found = []
    for half in halves:
        lists = [m for m in half.modules() if isinstance(m, nn.ModuleList) and _size(m)]
        if not lists:
            raise ModelError(
                f"{type(model).__name__} has no list of blocks: there is no layer to choose among.",
                fix="Use a transformer of the transformers library, or a method without layers to choose.",
            )
        # A list inside a block (experts, sub-layers) is part of the longer one, hence never larger.
        stack = max(lists, key=_size)
        if (names[stack], stack) not in found:  # an encoder without decoder gives the same twice
            found.append((names[stack], stack))
    return found


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks, lowest first: the model's own `ModuleList`, or the chain of encoder's and decoder's.

    Raises:
        ModelError: the model has no list of blocks.
    """
    found = stacks(model)
    if len(found) == 1:
        return found[0][1]
    return [block for _, stack in found for block in stack]


def embeddings(model: nn.Module) -> nn.Module:
    """The layer that turns token ids into vectors; its weight is (vocab, hidden)."""
    return base(model).get_input_embeddings()


def final_norm(model: nn.Module) -> nn.Module | None:
    """The normalisation after the last block, or None where the blocks normalise their output (BERT)."""
    model = base(model)
    path = stacks(model)[-1][0].rpartition(".")[0]
    for name, module in model.get_submodule(path).named_children():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 1 and not _embeds(name, module):
            return module
    return None


def head(model: nn.Module) -> nn.Module | None:
    """What turns hidden states into logits: the language-model head or the classifier; None in a bare trunk.

    A classifier of several layers (RoBERTa) is one module.
    """
    model = base(model)
    output = model.get_output_embeddings()
    if output is not None or model.base_model is model:
        return output
    beside = [m for m in model.children() if m is not model.base_model and _size(m)]
    return beside[-1] if beside else None


def groups(model: nn.Module) -> list[Group]:
    """Every parameter once, in groups from lowest to highest: "embeddings", "block 0", ..., "head".

    "head" holds all that comes after the last block: final normalisation, pooler, head. What follows an
    encoder's last block goes with that block. A tied parameter belongs to the lowest group that uses it, and
    an adapter's parameters to the block that they adapt.

    Raises:
        ModelError: the model has no list of blocks.
    """
    trunk, top = base(model), head(model)
    owner: dict[int, int] = {}  # id of a parameter -> index of its group

    def claim(parameters: Iterable[nn.Parameter], index: int) -> None:
        for parameter in parameters:
            owner.setdefault(id(parameter), index)

    elsewhere = {m for part in [*blocks(model), *([top] if top else [])] for m in part.modules()}
    for path, module in trunk.named_modules():
        if module not in elsewhere and _embeds(path, module):
            claim(module.parameters(recurse=False), 0)
    index = 0
    for name, stack in stacks(model):
        for block in stack:
            index += 1
            claim(block.parameters(), index)
        if trunk.config.is_encoder_decoder and index < len(blocks(model)):
            claim(trunk.get_submodule(name.rpartition(".")[0]).parameters(), index)
    titles = ["embeddings", *(f"block {i}" for i in range(index)), "head"]
    found: list[Group] = [(title, []) for title in titles]
    for name, parameter in model.named_parameters():
        found[owner.get(id(parameter), -1)][1].append((name, parameter))
    return found


def tie_groups(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one and the same, such as the embedding's and the head's weight."""
    return find_tied_parameters(model)


def linears(model: nn.Module, *, with_head: bool = False) -> dict[str, nn.Module]:
    """Every linear layer (`nn.Linear`, GPT-2's `Conv1D`, a tuner's wrapper of one) by its full name.

    Args:
        with_head: the layers of the head too. Methods that change "all linear layers" mean those below it.
    """
    top = head(model)
    left_out = set() if top is None or with_head else set(top.modules())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            left_out.update(m for m in module.modules() if m is not module)
            is_linear = isinstance(module.get_base_layer(), nn.Linear | Conv1D)
        else:
            is_linear = isinstance(module, nn.Linear | Conv1D)
        if is_linear and module not in left_out:
            found[name] = module
    return found


def match_targets(model: nn.Module, patterns: Iterable[str]) -> dict[str, list[str]]:
    """Full names of the layers that each pattern matches; a pattern is a name or the end of one, as in PEFT.

    Raises:
        MethodError: a pattern matches nothing, or only modules that are not layers themselves.
    """
    modules = dict(model.named_modules())
    layers = sorted({n.rpartition(".")[2] for n, m in modules.items() if not _holds_layers(m)})
    found = {}
    for pattern in patterns:
        names = [n for n in modules if n == pattern or n.endswith(f".{pattern}")]
        if not names:
            raise MethodError(
                f"Target '{pattern}' matches no layer of {type(model).__name__}.",
                fix=did_you_mean(pattern.rpartition(".")[2], layers),
            )
        if all(_holds_layers(modules[n]) for n in names):
            inside = sorted({n for n, m in modules[names[0]].named_modules() if n and not _holds_layers(m)})
            raise MethodError(
                f"Target '{pattern}' ({type(modules[names[0]]).__name__}) holds layers but is none.",
                fix="Name the layers inside: " + ", ".join(inside) + ".",
            )
        found[pattern] = names
    return found


def _holds_layers(module: nn.Module) -> bool:
    """Whether parameters lie in the module's children only; a tuner's wrapper and a quantised linear layer,
    whose weights are no parameters, count as layers."""
    layer = isinstance(module, BaseTunerLayer | nn.Linear)
    return not layer and not any(True for _ in module.parameters(recurse=False))


def _embeds(path: str, module: nn.Module) -> bool:
    """Whether a module outside the blocks works on the input: an embedding, or what belongs to one.

    The normalisation of embeddings is known by name alone: models define it before or after the blocks.
    """
    return isinstance(module, nn.Embedding) or "emb" in path.lower()


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
