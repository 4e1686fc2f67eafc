"""APrompt: attention prompts: learnt rows before every layer, keys and values, and scores of attention.

Paper: Wang et al., 2023, "APrompt: Attention Prompt Tuning for Efficient Adaptation of Pre-trained Language
Models", EMNLP 2023, pages 9147-9160.
Pick it when prompt or prefix tuning learns too little and no weight may change; its scores cost speed, as
attention then needs a mask.
Cost: L (P width + 2 l H d + Q r (l + 2 P + 2 M)) numbers, for L layers of H key/value heads of width d under
Q heads of queries, P rows, l pairs, rank r and M positions. P more tokens in every text.

In layer j, for the text's states X (T, width), N = P + T positions, and each head of width d:

    rows      X' = [P_j; X],  P_j (P, width): the rows before layer j + 1 replace what layer j made of P_j
    pairs     K' = [P_K; K], V' = [P_V; V],  P_K, P_V (l, d) for each key/value head
    scores    S_ab = (q_a k_b + Q_p[a] K_p[b]) s,  Q_p (P + M, r), K_p (l + P + M, r) for each query head

a and b count positions in the layer's sequence: a query at position a has the row Q_p[a], the l prompt keys
have the first rows of K_p, the key at position b the row l + b. So the scores get a learnt bias of rank r by
position, the same as if Q_p and K_p were appended to the features of queries and keys. It knows texts of up
to M tokens (`max_positions`); longer ones are refused.

Trained: P_j of all layers, P_K, P_V, Q_p, K_p, and the new head of a classifier. Frozen: all else.
P_K, P_V and Q_p start from N(0, 0.02^2), and K_p = 0, so that the scores start as they were; Q_p learns from
the second step on. `init` says what the rows P_j start from:

    vocabulary   embeddings of frequent tokens, as in prompt tuning; above the first layer, what the layers
                 below make of those. So at the start the text stands behind a few words, and no more.
    random       N(0, 0.02^2). A decoder's attention rests on its first token; random states in its place
                 take that away, and it must be learnt again.

    decoder           rows in front of the text, as in prompt tuning
    encoder           rows behind the first token ([CLS]), which the classifier reads
    encoder-decoder   rows in the encoder, whose outputs for them the decoder reads too; pairs and scores in
                      the self-attention of both, none across

The paper gives no code. Two readings are ours: the scores' factors stand along the features of queries and
keys (queries along the sequence would have no effect, and keys would outnumber values), as in the later
E2VPT (Han et al., 2023); and positions, not contents, choose their rows. `num_virtual_tokens`, `kv_length`
and `qk_rank` of 0 leave a part out: with the first alone in one layer it is prompt tuning, with the second
alone P-tuning v2 without the shift of positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import MethodError, ModelError
from luthier.models import structure
from luthier.options import option
from luthier.tuning.attention_prompt_tuner import AttentionPromptConfig, AttentionPromptTuner
from luthier.tuning.attention_prompts import AttentionPrompt, Places, Site, find_sites, recording
from luthier.tuning.input_prompts import (
    InputPrompt,
    InputPromptConfig,
    InputPromptTuner,
    embedded,
    frequent_ids,
)
from luthier.tuning.probe import evaluating
from luthier.tuning.registration import register
from luthier.tuning.soft_prompts import get_own_names, text_of

STD = 0.02


@dataclass
class Config(AttentionPromptConfig, InputPromptConfig):
    """Options of APrompt."""

    num_virtual_tokens: int = option(10, "number P of rows before every layer", ge=0)
    kv_length: int = option(10, "number l of learnt keys and values in every attention", ge=0)
    qk_rank: int = option(4, "rank r of the learnt scores", ge=0)
    max_positions: int = option(512, "positions M that the learnt scores know: the longest text", ge=1)
    init: Literal["vocabulary", "random"] = option(
        "vocabulary",
        "where the rows start: vocabulary (what each layer gets of frequent tokens), random",
        choices=("vocabulary", "random"),
    )
    init_std: float = option(0.02, "standard deviation of what starts at random", ge=0)
    shift_positions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_virtual_tokens + self.kv_length + self.qk_rank:
            raise MethodError(
                "num_virtual_tokens, kv_length and qk_rank are all 0: nothing would learn.",
                fix="Give one of them.",
            )

    def check_model(self, model: nn.Module) -> None:
        find_sites(model)

    def initial(self, model: PreTrainedModel, width: int) -> Tensor:
        if self.starts_from(model):
            return embedded(model, frequent_ids(model, self.num_virtual_tokens))
        return self.init_std * torch.randn(self.num_virtual_tokens, width)

    def starts_from(self, model: PreTrainedModel) -> bool:
        """Whether the rows begin as states of the model: not where they are loaded, or it has no numbers."""
        return self.init == "vocabulary" and not self.inference_mode and model.device.type != "meta"


def score_bias(
    queries: Tensor, keys: Tensor, places: Places, length: int, count: int, scale: float
) -> Tensor:
    """s Q_p[a] K_p[b] for the positions of queries and keys: (1 or batch, heads, queries, length + count).

    Args:
        queries: Q_p (heads, M, r); keys: K_p (length + M, r) for each head, the prompt's first.
        count: keys that attention really has; a cache that slides has the last ones.
    """
    of_queries = queries[:, places.queries]  # (heads, batch, seq, r)
    of_text = keys[:, length:][:, places.keys[:, -count:]]  # (heads, batch, count, r)
    of_prompt = keys[:, None, :length].expand(-1, of_text.shape[1], -1, -1)
    scores = of_queries @ torch.cat([of_prompt, of_text], dim=2).mT
    return scores.transpose(0, 1) * scale


class ScoredPrompt(AttentionPrompt):
    """An attention's learnt pairs, with the factors of its learnt scores."""

    adapter_layer_names: tuple[str, ...] = (*AttentionPrompt.adapter_layer_names, "score_query", "score_key")

    def __init__(self, site: Site):
        super().__init__(site)
        self.score_query = nn.ParameterDict()
        self.score_key = nn.ParameterDict()

    def add_scores(self, adapter: str, positions: int, length: int, rank: int, std: float) -> None:
        heads = self.site.queries
        self.score_query[adapter] = nn.Parameter(std * torch.randn(heads, positions, rank))
        self.score_key[adapter] = nn.Parameter(torch.zeros(heads, length + positions, rank))

    def scores(self, places: Places, query: Tensor, key: Tensor, scale: float | None) -> Tensor | None:
        names = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.score_query]
        if not names:
            return None
        if len(self.active_adapters) > 1:
            raise MethodError("Of prompts with learnt scores one can be active.", fix="Use set_adapter.")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k = self.score_query[names[0]], self.score_key[names[0]]
        length = k.shape[1] - q.shape[1]
        if key.shape[2] > places.keys.shape[1]:
            raise ModelError(
                "Learnt scores need a cache that holds the text alone, not one with empty places.",
                fix="Generate without a static cache, or use method: prefix.",
            )
        return score_bias(q, k, places, length, key.shape[2], scale).to(query.dtype)


class DeepPrompt(InputPrompt):
    """The rows in the input, and those before every higher layer: `deep` (layers - 1, P, width)."""

    adapter_layer_names: tuple[str, ...] = (*InputPrompt.adapter_layer_names, "deep")

    def __init__(self, width: int):
        super().__init__(width)
        self.deep = nn.ParameterDict()

    def add_deep(self, adapter: str, layers: int, std: float) -> None:
        self.deep[adapter] = nn.Parameter(std * torch.randn(layers, self.lengths[adapter], self.width))

    def before(self, layer: int) -> Tensor:
        """Rows (P, width) that go into layer `layer` >= 1."""
        return torch.cat([self.deep[name][layer - 1] for name in self.active()])


class Tuner(AttentionPromptTuner, InputPromptTuner):
    """Both engines at once, and the hooks that carry positions and rows to the layers."""

    prefix = "aprompt_"

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        AttentionPromptTuner._pre_injection_hook(self, model, config, adapter_name)
        InputPromptTuner._pre_injection_hook(self, model, config, adapter_name)
        both = model.config.is_encoder_decoder
        trunks = [model.get_encoder(), model.get_decoder()] if both else [model.base_model]
        # Behind the hook that puts the rows in: this one sees the longer text.
        self._hooks += [trunk.register_forward_pre_hook(self._place, with_kwargs=True) for trunk in trunks]
        self._blocks = len(structure.stacks(model)[0][1])
        for number, block in enumerate(structure.stacks(model)[0][1]):
            if number:
                hook = partial(self._replace_rows, number)
                self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    def make_pairs(self, site: Site) -> ScoredPrompt:
        return ScoredPrompt(site)

    def make_prompt(self, width: int) -> DeepPrompt:
        return DeepPrompt(width)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        targets: set[str] = set()
        if peft_config.kv_length or peft_config.qk_rank:
            AttentionPromptTuner._prepare_model(self, peft_config, model)
            targets |= {s.path for s in self._chosen(peft_config) if s.kind != "cross"}
        if peft_config.num_virtual_tokens:
            InputPromptTuner._prepare_model(self, peft_config, model)
            targets |= peft_config.target_modules
        peft_config.target_modules = targets

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        arguments = (peft_config, adapter_name, target, target_name, parent, current_key)
        if not isinstance(target, nn.Embedding):
            AttentionPromptTuner._create_and_replace(self, *arguments)
            return
        InputPromptTuner._create_and_replace(self, *arguments)
        prompt = self.prompt[0]
        prompt.add_deep(adapter_name, self._blocks - 1, peft_config.init_std)
        prompt.deep.to(prompt.table[adapter_name])
        if self._blocks > 1 and peft_config.starts_from(self.model):
            prompt.deep[adapter_name].data.copy_(self._states(prompt.table[adapter_name]))

    def _states(self, rows: Tensor) -> Tensor:
        """What the layers above the first get if `rows` (P, width) are the text: (layers - 1, P, width)."""
        found: list[Tensor] = []

        def keep(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"])[0])

        hooks = [
            block.register_forward_pre_hook(keep, with_kwargs=True)
            for block in structure.stacks(self.model)[0][1][1:]
        ]
        with self._disabled_prompts(), evaluating(self.model):
            self.trunk[0](inputs_embeds=rows[None].to(self.model.dtype))
        for hook in hooks:
            hook.remove()
        return torch.stack(found)

    @contextmanager
    def _disabled_prompts(self) -> Iterator[None]:
        """The model as it is, whatever adapters are there already; nothing else of their state changes."""
        layers = [layer for layer in (*self.attentions, *self.prompt) if not layer.disable_adapters]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def _add(self, layer: AttentionPrompt, adapter: str, config: Any) -> None:
        if config.kv_length:
            layer.add_table(adapter, config.kv_length, config.init_std)
        if config.qk_rank:
            positions = config.num_virtual_tokens + config.max_positions
            layer.add_scores(adapter, positions, config.kv_length, config.qk_rank, config.init_std)

    # Hooks ----------------------------------------------------------------------------------------------

    def _place(self, trunk: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Tell the layers where tokens stand: positions that count real ones, and which are rows of ours."""
        active = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        if recording() or self._disabled() or not active:
            return None
        text, mask, cache = text_of(args, kwargs), kwargs.get("attention_mask"), kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        whole = past + text.shape[1]
        config = active[0]
        limit = config.max_positions + config.num_virtual_tokens
        keys = self._counted(text, mask, kwargs.get("position_ids"), past)
        # A row of packed documents may be longer than each of them is.
        if config.qk_rank and whole > limit and (longest := int(keys.max()) + 1) > limit:
            text_tokens = longest - self.prompt[0].length()
            raise ModelError(
                f"A text of {text_tokens} tokens is longer than the {config.max_positions} positions of the "
                "learnt scores.",
                fix=f"Train with max_positions: {text_tokens} or more, or cut the texts.",
            )
        where = self._longer[-1] if self._longer and trunk is self.trunk[0] else None
        rows = None if where is None else where.source.where(where.source < self.prompt[0].length(), -1)
        return args, kwargs | {"prompt_places": Places(keys[:, past:], keys, rows)}

    def _disabled(self) -> bool:
        layers = [*self.attentions, *self.prompt]
        return all(layer.disable_adapters for layer in layers)

    def _counted(self, text: Tensor, mask: Any, positions: Tensor | None, past: int) -> Tensor:
        """Positions (1 or batch, seq with the cache) of all tokens that attention sees."""
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ModelError(
                "Learnt scores need the mask of the text, (batch, seq), not one made of it.",
                fix="Generate without a static cache, or use method: prefix.",
            )
        whole = past + text.shape[1]
        if mask is not None and not bool(mask[:, 0].all()):  # padding on the left
            return (mask.long().cumsum(-1) - 1).clamp(min=0)
        if mask is None and positions is not None and not past and not self._behind:
            return positions - positions[:, :1]  # packed documents begin anew
        return torch.arange(whole, device=text.device)[None]

    def _replace_rows(
        self, layer: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        places = kwargs.get("prompt_places")
        if places is None or places.rows is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        rows = self.prompt[0].before(layer).to(states.dtype)
        here = (places.rows >= 0).unsqueeze(-1)
        states = torch.where(here, nn.functional.embedding(places.rows.clamp(min=0), rows), states)
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    # Files ----------------------------------------------------------------------------------------------

    def folded(self, adapter: str) -> dict[str, Tensor]:
        own = get_own_names(self, adapter)
        state = {f"base_model.model.{n}": p.detach() for n, p in self.model.state_dict().items()}
        named = {self._remove_adapter_name_from_key(n, adapter): p for n, p in state.items()}
        return {name: tensor for name, tensor in named.items() if name in own}

    def folded_config(self, adapter: str) -> PeftConfig:
        return super(AttentionPromptTuner, self).folded_config(adapter)

    def to_peft(self, adapter: str) -> None:
        return None

    def remove(self) -> None:
        AttentionPromptTuner.remove(self)
        InputPromptTuner.remove(self)


register("aprompt", Config, Tuner)
