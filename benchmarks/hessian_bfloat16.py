"""What does it cost that Hessians of large layers are summed from activations rounded to bfloat16?

    python benchmarks/hessian_bfloat16.py [--blocks 8]

GPTQ at 4 bits on some blocks of SmolLM2-135M, 16 x 512 tokens: what its change of every layer costs under the
exact Hessian of the same inputs, relative to what the change costs that the exact one leads to. Where our
kernels do not run, nothing is rounded, and the two are equal.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import luthier
from luthier.compression import calibration, statistics
from luthier.compression.block import Block
from luthier.compression.calibration_data import batches
from luthier.compression.linear import dimensions, matrix
from luthier.compression.records import Record
from luthier.data.load import load

DATA = Path(__file__).parents[1] / ".." / "shared" / "data" / "tinyshakespeare.txt"
GPTQ = luthier.method("gptq")(bits=4, group_size=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    given = parser.parse_args()
    model, windows = prepared(given.blocks)
    ratios: list[float] = []
    chosen = calibration.choose_layers(model, [], [])
    calibration.calibrate(model, windows, lambda block: compared(block, chosen, ratios))
    found = torch.tensor(ratios)
    print(
        f"cost with rounded activations, of that without, {len(ratios)} layers: "
        f"{found.mean():.5f} ({found.min():.5f} to {found.max():.5f})"
    )


def prepared(blocks: int) -> tuple[Any, list[dict[str, Tensor]]]:
    """The model cut to some blocks, and 16 x 512 tokens."""
    model, tokenizer = luthier.load("smollm2-135m", dtype="float32", device="cpu")
    del model.model.layers[blocks:]
    model.config.num_hidden_layers = blocks
    return model, list(batches(load(str(DATA)), tokenizer, samples=16, max_length=512))


def compared(block: Block, chosen: set[str], ratios: list[float]) -> Iterator[Record]:
    """GPTQ with rounded activations, and beside it, without a trace, with exact ones."""
    block.choose(chosen)
    for names in block.groups():
        layers = block.layers()
        rounded = hessian(block, names[0], layers)
        with patch.object(statistics, "LARGE", 2**31):
            exact = hessian(block, names[0], layers)
        for name in names:
            weight = matrix(layers[name])
            grid = GPTQ.fit(layers[name], weight)
            costs = [
                cost(GPTQ.settle(layers[name], weight, grid, h)[1].weight - weight, exact)
                for h in (rounded, exact)
            ]
            ratios.append(costs[0] / costs[1])
            yield GPTQ.change_layer(block, name, layers[name], rounded)


def hessian(block: Block, name: str, layers: dict[str, Any]) -> Tensor:
    found = statistics.Hessian(dimensions(layers[name])[1], block.device, GPTQ.token_cap)
    block.observe({name: found})
    return found.value


def cost(change: Tensor, exact: Tensor) -> float:
    """tr(D H D^T) in float64."""
    return float(((change.double() @ exact.double()) * change.double()).sum())


if __name__ == "__main__":
    main()
