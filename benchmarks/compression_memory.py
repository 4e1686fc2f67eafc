"""What memory does a calibration pass take? Peak over the loaded model, by depth and by calibration tokens.

    python benchmarks/compression_memory.py [--method wanda]

SmolLM2-135M, cut to some of its blocks, is compressed on windows of 256 tokens of Shakespeare's plays. The
pass holds one set of hidden states, tokens x 576 x 4 bytes, and what one block needs: the peak must grow with
the tokens by about that, and not with the blocks. Each figure is a process of its own; what was resident
when the model and the windows were there is taken off.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
CASES = ((10, 8192), (20, 8192), (30, 8192), (30, 4096), (30, 16384))  # blocks, tokens
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--case", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.method, *given.case)))
        return
    print("| blocks | tokens | hidden states, MB | peak over the loaded model, MB |\n|--:|--:|--:|--:|")
    for blocks, tokens in CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--method", given.method, "--case"]
        done = subprocess.run([*command, str(blocks), str(tokens)], check=True, stdout=subprocess.PIPE)
        peak = json.loads(done.stdout.splitlines()[-1])
        print(f"| {blocks} | {tokens} | {tokens * 576 * 4 / 1e6:.0f} | {peak / 1e6:.0f} |", flush=True)


def measure(method: str, blocks: int, tokens: int) -> int:
    """Bytes of resident memory that the pass adds at its peak."""
    import luthier
    from luthier.compression.calibration_data import batches
    from luthier.data.load import load
    from luthier.resources import resident_memory

    model, tokenizer = luthier.load("smollm2-135m", dtype="float32", device="cpu")
    del model.model.layers[blocks:]
    model.config.num_hidden_layers = blocks
    data = load(str(DATA / "tinyshakespeare.txt"))
    windows = batches(data, tokenizer, samples=tokens // LENGTH, max_length=LENGTH)
    del data
    # What loading took for a while goes back to the system, and the mark of the highest is set to now.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_memory()
    luthier.compress(model, luthier.method(method)(), calibration=windows)
    return highest() - before


def highest() -> int:
    """Peak of resident memory since the mark was set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
