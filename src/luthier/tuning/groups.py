"""Ordered layer groups: which of a model's own weights learn, at which rates, on which schedule.

The partial methods share this engine. Groups run from the lowest (embeddings) over the blocks to the
highest (final norm and head), as `luthier.models.structure.groups` reads them from the module tree.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from luthier import checks
from luthier.errors import MethodError
from luthier.models import structure

Named = list[tuple[str, nn.Parameter]]


def set_trainable(model: nn.Module, names: Collection[str]) -> None:
    """Exactly the parameters called `names` learn from now on.

    A frozen parameter loses its gradient at once: with a stale one left, the next step would still move it.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if not parameter.requires_grad:
            parameter.grad = None


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def top_names(
    model: nn.Module, blocks: int, *, embeddings: bool, final_norm: bool, head: bool = True
) -> set[str]:
    """Names of the weights in the top `blocks` blocks, the head, and the ends that are asked for.

    A head that is tied to the embeddings belongs to them: it learns only with `embeddings`.

    Raises:
        MethodError: the model has fewer blocks.
    """
    groups = structure.groups(model)
    bottom, middle, top = groups[0], groups[1:-1], groups[-1]
    if blocks > len(middle):
        raise MethodError(
            f"{blocks} blocks were asked for, but {type(model).__name__} has {len(middle)}.",
            fix=f"Write a number between 0 and {len(middle)}.",
        )
    head_names = module_names(model, structure.head(model))
    names = {name for _, members in middle[len(middle) - blocks :] for name, _ in members}
    names |= {name for name, _ in top[1] if (head if name in head_names else final_norm)}
    if embeddings:
        names |= {name for name, _ in bottom[1]}
    return names


def module_names(model: nn.Module, module: nn.Module | None) -> set[str]:
    """Names, within `model`, of the parameters that `module` holds."""
    if module is None:
        return set()
    held = {id(parameter) for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def head_is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embeddings' weight."""
    head, embedding = structure.head(model), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is embedding.weight


def untie_head(model: nn.Module) -> None:
    """Give the head a weight of its own, equal to the embeddings', and say so in the model's config.

    Raises:
        MethodError: the architecture cannot be saved with an untied head.
    """
    require_untieable(model)
    head: Any = structure.head(model)
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def require_untieable(model: nn.Module) -> None:
    """Raise MethodError where a saved config would not keep the head untied (T5 ties it by construction)."""
    kept = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    # BART ties the embeddings of encoder and decoder by the same word: saved untied, they would be lost.
    beside = any(len(names) > 2 for names in structure.tie_groups(model))
    if kept.tie_word_embeddings or (model.config.is_encoder_decoder and beside):
        raise MethodError(
            f"{type(model).__name__} always ties its head to the embeddings; it cannot have one of its own.",
            fix="Leave the head and the embeddings out.",
        )


def still_trunk(model: nn.Module) -> None:
    """Turn dropout off in the frozen trunk, whatever mode the trainer sets (it calls `train()` each step).

    The trunk is what the model runs before its lowest block that learns. It then computes the same for
    the same row in every epoch.
    """
    release_trunk(model)

    def evaluate_trunk(module: nn.Module, _: Any) -> None:
        if module.training:
            for part in trunk_modules(module):
                part.eval()

    model.luthier_trunk_hook = model.register_forward_pre_hook(evaluate_trunk)


def release_trunk(model: nn.Module) -> None:
    """Take away what `still_trunk` did."""
    hook = model.__dict__.pop("luthier_trunk_hook", None)
    if hook is not None:
        hook.remove()


def trunk_depth(model: nn.Module) -> int:
    """Number of lowest blocks that run frozen on frozen inputs; 0 where the embeddings learn."""
    if any(p.requires_grad for _, p in structure.groups(model)[0][1]):
        return 0
    depth = 0
    for block in structure.blocks(model):
        if any(p.requires_grad for p in block.parameters()):
            break
        depth += 1
    return depth


def trunk_modules(model: nn.Module) -> list[nn.Module]:
    """The frozen blocks at the bottom, and what stands before the blocks in the module tree (embeddings,
    their norm and dropout)."""
    depth = trunk_depth(model)
    if depth == 0:
        return []
    blocks = structure.blocks(model)
    before = []
    for module in model.modules():
        if module is blocks[0]:
            break
        if not any(child is blocks[0] for child in module.modules()):
            before.append(module)
    return [*before, *blocks[:depth]]


def decay_groups(
    model: nn.Module,
    named: Iterable[tuple[str, nn.Parameter]],
    args: TrainingArguments,
    *,
    lr: float,
    **extra: Any,
) -> list[dict[str, Any]]:
    """Optimiser groups at rate `lr`: with weight decay, and without it (biases and norms).

    Which parameters decay is the Trainer's own rule; `extra` entries are kept in the groups.
    """
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # the method reads nothing of a trainer
    named = list(named)
    groups = [
        {
            "params": [p for name, p in named if (name in decayed) == decays],
            "weight_decay": args.weight_decay if decays else 0.0,
            "lr": lr,
            **extra,
        }
        for decays in (True, False)
    ]
    return [group for group in groups if group["params"]]


def layered_groups(
    model: nn.Module, args: TrainingArguments, decay: float, names: Collection[str]
) -> list[dict]:
    """Optimiser groups with discriminative rates: lr_l = lr * decay^(L - l), the top group L at `lr`.

    Source: Howard & Ruder, 2018, section 3.2 (decay = 1 / 2.6).
    """
    ordered = structure.groups(model)
    top = len(ordered) - 1
    return [
        group
        for level, (layer, members) in enumerate(ordered)
        for group in decay_groups(
            model,
            [(name, p) for name, p in members if name in names],
            args,
            lr=args.learning_rate * decay ** (top - level),
            layer=layer,
        )
    ]


def slanted_triangle(step: int, total: int, cut_frac: float = 0.1, ratio: float = 32) -> float:
    """The share of the highest rate at `step` of `total`: 1/ratio, up to 1 at the cut, down to 1/ratio.

    Howard & Ruder, 2018, equation 3, with two defects of the printed formula mended: no division by zero
    where total * cut_frac < 1, and the end is 1/ratio for every total. The two agree where total * cut_frac
    is whole.
    """
    # The small slack keeps products such as 0.1 * 30 from falling below the whole number they stand for.
    cut = max(1, int(total * cut_frac + 1e-9))
    if step < cut:
        slope = step / cut
    else:
        slope = max(0.0, 1 - (step - cut) / max(1, total - cut))
    return (1 + slope * (ratio - 1)) / ratio


def lost_share(parameters: Iterable[Tensor], lr: float) -> float:
    """The share of weights on which an update of size `lr` (a normalised Adam step) rounds to nothing.

    A weight moves if the update exceeds half the spacing of its dtype there: |w| in [2^e, 2^(e+1)) has
    spacing 2^e * eps.
    """
    lost = total = 0
    for parameter in parameters:
        exponent = torch.frexp(parameter.detach().float()).exponent - 1
        half_spacing = torch.exp2(exponent.float()) * (torch.finfo(parameter.dtype).eps / 2)
        lost += int(((half_spacing > lr) & (parameter != 0)).sum())
        total += parameter.numel()
    return lost / max(1, total)


class UpdatesSurvive(TrainerCallback):
    """Refuse to train half-precision weights at a rate that rounding swallows (bf16 near 1 loses 1e-3)."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        for group in optimizer.param_groups:
            half = [p for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
            if half:
                share = lost_share(half, group.get("initial_lr", group["lr"]))
                checks.record(
                    "before",
                    f"updates survive rounding to {str(half[0].dtype).removeprefix('torch.')}",
                    share <= 0.5,
                    share,
                    0.5,
                    "share of the weights that a step of the learning rate leaves unchanged",
                    fix="Load the model in float32 (training bf16: true computes in bfloat16), or raise "
                    "the learning rate.",
                )
