"""Where the sub-layers of each block read from the stream of hidden states and write back to it.

Adapters that change hidden states stand at these places. A block is a chain of sub-layers, each an attention
or a feed-forward network (FFN), in one of two orders:

    pre-norm  (Llama, GPT-2, T5)    h <- h + F(N(h))
    post-norm (BERT, BART)          h <- N(h + F(h))

What a sub-layer ends with (a projection, the dropout behind it, a norm of its output as in Gemma 2), which
norm stands before it and which closes it is read from a run of the model on three tokens: who is handed the
very tensor that another has made. It works on the meta device.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from luthier.errors import MethodError
from luthier.models import structure
from luthier.tuning.feed_forward import feed_forwards
from luthier.tuning.probe import empty_inputs, evaluating


@dataclass(frozen=True)
class SubLayer:
    """An attention ("attention", or "cross" over an encoder's states) or an FFN ("ffn") of a block.

    Attributes, all but the first two names of modules:
        kind, index: of which block, counted within its stack.
        block: the whole block.
        first: the linear layer that reads the input of the sub-layer; `last` the one that leads back.
        end: whose output is the sub-layer's, before it is added to the stream.
        before: the norm that reads the stream, in a pre-norm block.
        after: the norm over the sum, in a post-norm block.
    """

    kind: str
    index: int
    block: str
    first: str
    last: str
    end: str
    before: str | None
    after: str | None

    @property
    def stream(self) -> str:
        """The module whose input is the stream that the sub-layer starts from."""
        return self.before or self.first


@dataclass(frozen=True)
class Call:
    """One module at work, by its name."""

    name: str
    module: nn.Module
    read: Tensor
    made: Tensor


def sub_layers(model: nn.Module) -> list[SubLayer]:
    """The sub-layers in the order of the model.

    Raises:
        MethodError: a block has no attention or no FFN of the usual kind.
    """
    ends = feed_forwards(model)
    calls, outputs = _run(model)
    found = []
    for stack, modules in structure.stacks(model):
        for index, block in enumerate(modules):
            place = f"{stack}.{index}"
            inside = [call for call in calls if call.name.startswith(f"{place}.")]
            closing = [c for c in inside if is_norm(c.module) and c.made is outputs.get(place)]
            pairs = [(kind, *_outer_linears(inside, path)) for kind, path in _attentions(block, place)]
            last = next(name for name in ends if name.startswith(f"{place}."))
            pairs.append(("ffn", ends[last], last))
            post = bool(closing) and not _makers(inside, closing[-1])
            found += [_sub_layer(inside, place, index, post, *pair) for pair in pairs]
    return found


def norms(model: nn.Module) -> list[str]:
    """Names of all layers of normalisation."""
    return [name for name, module in model.named_modules() if is_norm(module)]


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None


def _run(model: Any) -> tuple[list[Call], dict[str, Tensor]]:
    """Calls of the modules without parts, and what each block makes."""
    calls: list[Call] = []
    outputs: dict[str, Tensor] = {}
    hooks = []

    def hear(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        read = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(read, Tensor) and isinstance(output, Tensor):
            calls.append(Call(name, module, read, output))

    def keep(name: str, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    for stack, modules in structure.stacks(model):
        for index, block in enumerate(modules):
            place = f"{stack}.{index}"
            hooks.append(block.register_forward_hook(lambda _, args, out, n=place: keep(n, out)))
            for path, module in block.named_modules():
                if not any(True for _ in module.children()):
                    hooks.append(
                        module.register_forward_hook(
                            lambda m, args, kwargs, out, n=f"{place}.{path}": hear(n, m, args, kwargs, out),
                            with_kwargs=True,
                        )
                    )
    attention = model.config._attn_implementation
    # Other kernels look into the mask, to do without it, and on the meta device there is nothing to see.
    model.set_attn_implementation("eager")
    try:
        with evaluating(model):
            (model if model.config.is_encoder_decoder else model.base_model)(**empty_inputs(model))
    finally:
        model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()
    return calls, outputs


def _attentions(block: nn.Module, place: str) -> list[tuple[str, str]]:
    """(kind, path) of the outermost attention modules of a block; a second one is cross-attention."""
    found: list[str] = []
    for path, module in block.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if path and not inside and "attention" in type(module).__name__.lower():
            found.append(path)
    return [("cross" if i else "attention", f"{place}.{path}") for i, path in enumerate(found)]


def _outer_linears(calls: list[Call], path: str) -> tuple[str, str]:
    names = [c.name for c in calls if c.name.startswith(f"{path}.") and _is_linear(c.module)]
    if not names:
        raise MethodError(
            f"The attention '{path}' has no linear layers of its own: nothing can be put beside it.",
            fix="Choose a method that adapts linear layers, such as lora.",
        )
    return names[0], names[-1]


def _sub_layer(
    calls: list[Call], place: str, index: int, post: bool, kind: str, first: str, last: str
) -> SubLayer:
    start = next(c for c in calls if c.name == first)
    where = max(i for i, c in enumerate(calls) if c.name == last)
    end = calls[where]
    for call in calls[where + 1 :]:
        # One dropout may serve both sub-layers (Phi): what stands there would act twice.
        shared = sum(c.name == call.name for c in calls) > 1
        if call.read is not end.made or _is_linear(call.module) or shared:
            break
        end = call
    before = after = None
    if post:
        after = next((c.name for c in calls[calls.index(end) + 1 :] if is_norm(c.module)), None)
    else:
        before = next((c.name for c in _makers(calls, start) if is_norm(c.module)), None)
    return SubLayer(kind, index, place, first, last, end.name, before, after)


def _makers(calls: list[Call], reader: Call) -> list[Call]:
    """The calls before it whose output a call reads as it is."""
    return [c for c in calls[: calls.index(reader)] if c.made is reader.read]


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or hasattr(module, "nx")
