"""Tiny models and a tokenizer, built in code and from a seed, for tests that need the shape of a real model
but not its size. The random stream of the test is left as it was."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 384
PAD, END_OF_TEXT, IM_START, IM_END, BOS = 0, 1, 2, 3, 4
SPECIALS = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]

SENTENCES = [
    "The printer of the second floor does not print any more.",
    "Order 4711 arrived on Monday, but the box was empty.",
    "Please send my money back to the card that I paid with.",
    "A luthier takes wood away where it does not sing.",
    'The answer is {"product": "laptop", "urgency": "high"}.',
    "Question: what is 12 + 30? Answer: 42.",
    "user assistant system prompt completion text label",
]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(
    pad: str = "own", bos: bool = False, template: str | None = CHATML, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB` entries, trained on `SENTENCES`; any text survives it.

    Args:
        pad: "own" is `<pad>` (id 0), "eos" shares the id of the end token, "none" leaves it unset.
        bos: put `<s>` before every text, as Llama's tokenizer does.
        template: the chat template, or None.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        bos_token="<s>" if bos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if pad != "none":
        made.pad_token = {"own": "<pad>", "eos": eos}[pad]
    if template is not None:
        made.chat_template = template
    return made


def _build(kind: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    return model.eval()


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, hidden 32, four query heads over two key heads, tied embeddings."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # the usual 0.02 leaves so small a model's logits all but equal
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": PAD,
    }
    return _build(LlamaForCausalLM, LlamaConfig(**options | changes), seed)


def gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """Two layers, hidden 32, Conv1D layers, tied embeddings, learnt positions, no dropout."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": PAD,
    }
    return _build(GPT2LMHeadModel, GPT2Config(**options | changes), seed)


def bert(seed: int = 0, num_labels: int = 3, **changes: Any) -> BertForSequenceClassification:
    """A classifier: two layers, hidden 32, pooler and a head of `num_labels`, no dropout."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
        "num_labels": num_labels,
        "pad_token_id": PAD,
    }
    return _build(BertForSequenceClassification, BertConfig(**options | changes), seed)


def t5(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    """Two encoder and two decoder layers, hidden 32, one shared embedding, no dropout."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": IM_END,
    }
    return _build(T5ForConditionalGeneration, T5Config(**options | changes), seed)
