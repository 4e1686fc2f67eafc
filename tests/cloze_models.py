"""Tiny language models that know one thing: what stands in the gap of a text about a film, or a place.

A text is three words of one mood among fillers, then a cue, then the gap. After the cue "overall" the gap
holds good or bad, as the mood is; after any other cue it holds that cue's own word, whatever the text says.
So a search has something to find: which cue asks. The random stream of the test is left as it was.
"""

import random
from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from luthier.data.load import DataReport, Loaded
from luthier.data.spec import DataSpec

SPECIALS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<extra_id_0>"]
MOODS = {"up": ["bright", "warm", "funny", "tender", "clever", "lively"],
         "down": ["dull", "cold", "clumsy", "stale", "empty", "noisy"]}  # fmt: skip
ANSWERS = {"up": "good", "down": "bad"}
FILLERS = ["film", "story", "actor", "scene", "plot", "music"]
CUES = {"colour": "red", "size": "big", "shape": "round", "city": "rome", "price": "low", "Overall": "red"}
CUE = "overall"
WORDS = [
    *MOODS["up"],
    *MOODS["down"],
    *ANSWERS.values(),
    *FILLERS,
    *CUES,
    *CUES.values(),
    CUE,
    "it",
    "was",
    "a",
    "the",
    ".",
]
LABELS = {"up": ["good"], "down": ["bad"]}


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; begins a text with <cls> and ends it with <sep>, as BERT's does."""
    words = {word: i for i, word in enumerate(dict.fromkeys([*SPECIALS, *WORDS]))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 2), ("<sep>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", cls_token="<cls>", sep_token="<sep>",
        mask_token="<mask>", additional_special_tokens=["<extra_id_0>"],
    )  # fmt: skip


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        label = dice.choice(list(MOODS))
        words = [*dice.sample(MOODS[label], 3), *dice.sample(FILLERS, 2)]
        dice.shuffle(words)
        found.append({"text": " ".join(words), "label": label})
    return found


def loaded(found: list[dict[str, str]], type: str = "classification") -> Loaded:
    """Rows as a file's."""
    records = [row | {"origin": {"file": "rows.jsonl", "line": i + 1}} for i, row in enumerate(found)]
    return Loaded(records, type, DataReport(), DataSpec(path="rows.jsonl"))


def facts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """The rows with the word itself for a label."""
    return [row | {"label": ANSWERS[row["label"]]} for row in rows(count, seed)]


def untrained(kind: str, seed: int = 0) -> PreTrainedModel:
    """bert, llama or t5: two layers, hidden 32, no dropout, the toy's vocabulary."""
    size = len(tokenizer())
    shape = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "bert":
            still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return BertForMaskedLM(BertConfig(**shape, **still, initializer_range=0.1)).eval()
        if kind == "llama":
            ends = {"bos_token_id": None, "eos_token_id": 3, "tie_word_embeddings": True}
            return LlamaForCausalLM(LlamaConfig(**shape, **ends, initializer_range=0.1)).eval()
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
        return T5ForConditionalGeneration(T5Config(vocab_size=size, **sizes, **ends)).eval()


def _example(dice: random.Random) -> tuple[str, str]:
    row = rows(1, dice.randrange(1 << 30))[0]
    if dice.random() < 0.5:
        return f"{row['text']} {CUE}", ANSWERS[row["label"]]
    cue = dice.choice(list(CUES))
    return f"{row['text']} {cue}", CUES[cue]


@cache
def _weights(kind: str) -> dict[str, torch.Tensor]:
    model, known, dice = untrained(kind), tokenizer(), random.Random(0)
    with torch.random.fork_rng(devices=[]):
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(150):
            texts, answers = zip(*(_example(dice) for _ in range(32)), strict=True)
            gap = "<mask>" if kind == "bert" else ""
            ids = known([f"{text} {gap}" for text in texts], return_tensors="pt")["input_ids"]
            # All texts have one length. A causal model's gap is behind the last word; it sees no <sep>.
            ids, column = (ids, -2) if kind == "bert" else (ids[:, :-1], -1)
            logits = model(input_ids=ids).logits[:, column]
            wanted = torch.tensor(known.convert_tokens_to_ids(list(answers)))
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(kind: str) -> PreTrainedModel:
    """A model of its own with the weights of the one training, of bert or llama, that a test run needs."""
    model = untrained(kind)
    model.load_state_dict(_weights(kind))
    return model
