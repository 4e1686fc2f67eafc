"""The table of faults that tests/test_planted_faults.py plants, and what its tests share."""

import contextlib
import warnings
from dataclasses import dataclass

import peft
import small_training as training
import tiny
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

import luthier


@dataclass(frozen=True)
class Fault:
    """What goes wrong in silence, what ours does, and what comes later, with the method that it is about."""

    wrong: str
    ours: str = ""
    later: str = ""


FAULTS = {
    "A1": Fault(
        "a merge on tied embeddings is another model", "merges each use, unties what differs, proves"
    ),
    "A2": Fault(
        "a method, or a part of it, is selected and does nothing",
        "refuses patterns without match, says what stays frozen, proves gradients at step 1",
        later="the tuners of experts beyond LoRA: with these methods",
    ),
    "A3": Fault(
        "the loss is on the wrong tokens, or on none", "masks by rendering; proves the trained share"
    ),
    "A4": Fault("the template of training is not the one that is served", "saves it; holds the export to it"),
    "A5": Fault("truncation hides answers and drops rows without a count", "counts, refuses, names a length"),
    "A6": Fault(
        "rounding loses what the adapter learnt",
        "adds in float32, rounds once, refuses above a tenth of the effect and says the two ways out",
        later="merging on other quantised weights than 4-bit ones; such a base is refused until then",
    ),
    "A7": Fault("weights that do not load stay random", "refuses, with the prefix that would fix the names"),
    "A8": Fault(
        "a pruned model is dense after LoRA",
        "refuses a merge that fills zeros",
        later="masks that adapters are trained with: with the pruning methods",
    ),
    "A9": Fault("results depend on the padding", "a pad token of its own; sides set by the operation"),
    "A10": Fault("the model never stops", "trains the end token and puts it into the generation config"),
    "A11": Fault("two beginning-of-text tokens", "one path to tokens; proves that there is at most one"),
    "A12": Fault("packed documents see each other", "positions restart; proves isolation on the model"),
    "A13": Fault("accumulated batches are not the large batch", "one mean over all items, in evaluation too"),
    "A14": Fault("thoughts of earlier turns are trained as they are never served", "renders turn by turn"),
    "A15": Fault(
        "prefix tuning breaks with caches and checkpointing", "learns in the attention, not in the cache"
    ),
    "A16": Fault("an adapter of weight 1.0 is not itself", "sums changes of weights, not factors"),
    "A17": Fault("the reference of DPO is another model", later="comes with the preference objectives"),
    "A18": Fault("distillation across vocabularies", later="comes with the distillation methods"),
    "A19": Fault("data of another tokenizer or mask come from the cache", "the code is part of the key"),
    "A20": Fault("the adapter is drawn before the seed is set", "seeds, then attaches"),
    "A21": Fault("unknown keys are ignored", "refuses them with the nearest name"),
}
PLANTED: dict[str, list[str]] = {}
MESSAGES = [
    {"role": "user", "content": "Question: what is 12 + 30?"},
    {"role": "assistant", "content": "Answer: 42."},
    {"role": "user", "content": "Please send my money back."},
    {"role": "assistant", "content": "The box was empty."},
]


def plants(*ids):
    def note(test):
        for id in ids:
            PLANTED.setdefault(id, []).append(test.__name__)
        return test

    return note


@contextlib.contextmanager
def silence():
    """No warning of Python's inside: what is shown there is silent indeed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def by_name(lines):
    return {line.name: line for line in lines}


def lora(model, size=0.05, **options):
    """Our LoRA with an effect."""
    torch.manual_seed(0)
    return training.disturb(luthier.attach(model, luthier.method("lora")(r=4, **options)), size)


def plain_lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options)


def far(one, other):
    """Difference of logits relative to the second."""
    return float(((one - other).norm() / other.norm()).detach())


def effect_lost(merged, adapted, base):
    """Difference of logits relative to what the adapter changes."""
    return float((merged - adapted).norm() / (adapted - base).norm())


def mixtral():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def trained_by_trl(found, folder, **options):
    """What TRL's SFT trains of each row, as text."""
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "bf16": False}
    tokenizer, data = tiny.tokenizer(), Dataset.from_list(list(found))
    trainer = SFTTrainer(
        tiny.llama(), SFTConfig(**settings, **options), train_dataset=data, processing_class=tokenizer
    )
    batches = [batch["labels"] for batch in trainer.get_train_dataloader()]
    return [tokenizer.decode([t for t in row if t >= 0]) for batch in batches for row in batch]
