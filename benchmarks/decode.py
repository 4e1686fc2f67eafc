"""How many tokens a second does a quantised model yield, and how many are possible?

    python benchmarks/decode.py [--model smollm2|llama-2048] [--threads 1] [--rounds 4] [--layers 8]

One row at a time (batch 1), greedy: transformers' `generate` on the model in bfloat16 against `luthier`'s
loop on the same checkpoint in float32, bfloat16, int8 and int4 (round to nearest, `luthier.accelerate`). The
sides take turns, each in a process of its own; the best round counts. Under one thread it is processor time,
which other work on the machine disturbs less. The bound is what the memory allows: the bytes of the weights
that a token reads, at the speed at which a process adds up 512 MB. Then the prompt: a forward pass of 256
tokens. The memory is what loading and quantising leave.
Result: benchmarks/README.md.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import luthier
from luthier.acceleration.decoding import generate
from luthier.acceleration.straight import straight
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix, quantize_layer
from luthier.models import structure
from luthier.resources import release_memory, resident_memory

PROMPT, PREFILL = 32, 256  # tokens
SIDES = {
    "transformers bfloat16": (torch.bfloat16, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, Scheme(8, None)),
    "int8, inputs too": (torch.bfloat16, Scheme(8, None, activation_bits=8)),
    "int4": (torch.bfloat16, Scheme(4, 64)),
}


def build(name, side, layers):
    dtype, scheme = SIDES[side]
    if name == "smollm2":
        model, _ = luthier.load("smollm2-135m", dtype=dtype)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=4,
        )  # fmt: skip
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    if scheme is not None:
        for path, layer in structure.linears(model).items():
            weight = matrix(layer)
            grid = fit(weight, scheme, dtype)
            model.set_submodule(path, quantize_layer(layer, grid.quantize(weight), grid))
        luthier.accelerate(model)
    return model.eval()


def read_bytes(model):
    """Bytes of the weights that one token reads: all but the table of embeddings, of which it is a row."""
    table = structure.embeddings(model).weight
    tied = structure.head(model).weight is table
    tensors = [p for p in model.parameters() if p is not table or tied]
    # Scales are held as the kernel takes them and as they are saved; the kernel reads its own.
    return sum(
        t.numel() * t.element_size()
        for t in [*tensors, *(b for n, b in model.named_buffers() if not n.endswith((".scale", "inv_freq")))]
    )


def bandwidth():
    """Bytes a second at which one pass over 512 MB adds them up."""
    block = torch.ones(1 << 26, dtype=torch.int64)
    best = min(clock(block.sum) for _ in range(5))
    return block.numel() * 8 / best


def clock(run):
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    run()
    return now() - start


@torch.inference_mode()
def worker(name, side, layers, threads, tokens):
    """Answers each line on the standard input with a line of JSON."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    before = resident_memory()
    model = build(name, side, layers)
    release_memory()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (1, PREFILL), generator=generator)
    prompt = ids[:, :PROMPT]

    def run(count):
        if side.startswith("transformers"):
            return model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count,
                min_new_tokens=count,
            )  # fmt: skip
        return generate(model, prompt, max_new_tokens=count, eos_token_id=[])

    def prefill():
        if side.startswith("transformers"):
            model(ids, logits_to_keep=1)
        else:
            step.reserve(1, PREFILL)
            step(ids)

    step = straight(model)
    assert not isinstance(step, str), step
    run(4)
    answers = {
        "ready": lambda: {"bytes": read_bytes(model), "memory": resident_memory() - before},
        "bandwidth": lambda: {"bandwidth": bandwidth()},
        # The first token costs a pass over the prompt: the difference of two lengths is the decoding.
        "decode": lambda: {"decode": (clock(lambda: run(tokens + 4)) - clock(lambda: run(4))) / tokens},
        "prefill": lambda: {"prefill": clock(prefill)},
    }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


class Side:
    def __init__(self, given, name):
        command = [sys.executable, __file__, "--worker", name]
        command += [f"--{key}={value}" for key, value in vars(given).items() if key != "worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.values = {}

    def ask(self, what):
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def measure(self, what, best):
        found = self.ask(what)[what]
        self.values[what] = best(self.values.get(what, found), found)


def table(sides):
    base = sides["transformers bfloat16"].values
    print("| side | tokens/s | faster | of the bound | memory, MB | prompt, tokens/s | faster |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    speed = max(side.values["bandwidth"] for side in sides.values())
    for name, side in sides.items():
        v = side.values
        print(
            f"| {name} | {1 / v['decode']:.1f} | {base['decode'] / v['decode']:.2f}x "
            f"| {v['bytes'] / speed / v['decode']:.0%} | {v['memory'] / 1e6:.0f} "
            f"| {PREFILL / v['prefill']:.0f} | {base['prefill'] / v['prefill']:.2f}x |"
        )
    print(f"memory read at {speed / 1e9:.1f} GB/s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["smollm2", "llama-2048"], default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8, help="of llama-2048")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--sides", default="; ".join(SIDES), help="some of them; transformers' is the base")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.model, given.worker, given.layers, given.threads, given.tokens)
        return
    sides = {name: Side(given, name) for name in given.sides.split("; ")}
    for side in sides.values():
        side.values = side.ask("ready")
    for _ in range(given.rounds):
        for what, best in (("bandwidth", max), ("decode", min), ("prefill", min)):
            for side in sides.values():
                side.measure(what, best)
    table(sides)
    for side in sides.values():
        side.process.stdin.close()
        side.process.wait()


if __name__ == "__main__":
    main()
