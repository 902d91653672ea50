"""Measures candidate block sizes of the pass over the queue on the GPU at hand, for `kernels/row_lse_blocks.py`.

    python -m fastssl.bench.sweep_loss --dim 128 --dtype bf16

Prints every candidate, fastest first, and then the lines for the table. Timed is `row_lse` (the pass and the sum of its
parts), by default at N = 1024 and K = 65536; candidates for which the GPU lacks memory or registers are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F

from fastssl.bench.timing import time_in_turn
from fastssl.kernels.row_lse import row_lse
from fastssl.kernels.row_lse_blocks import DIMS, TABLE, Blocks, capability, family

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCALES = {1: [6.0], 2: [1 / 0.07, 6.0]}


def candidates() -> Iterator[Blocks]:
    """All combinations of some sizes, warps, stages and programs per multiprocessor."""
    for block_n, block_k, num_warps, num_stages, programs in product(
        (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3)
    ):
        yield Blocks(block_n, block_k, num_warps, num_stages, programs)


def time_blocks(blocks: Blocks, dim: int, scales: int, dtype: torch.dtype, num: int, queue_size: int) -> float | None:
    """Seconds of `row_lse` with these blocks, or None when the GPU cannot run them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    x, y = (F.normalize(torch.randn(n, dim, device=device, generator=generator), dim=1) for n in (num, queue_size))
    x, y = x.to(dtype), y.to(dtype)
    entry = TABLE[family(capability(device)), y.element_size(), scales]
    before, entry[dim] = entry[dim], blocks
    try:
        return time_in_turn({"row_lse": lambda: row_lse(x, y, SCALES[scales])}, device, rounds=10)["row_lse"].median
    except Exception as error:  # Triton raises another class for each resource that runs out
        print(f"  {tuple(blocks)}: {type(error).__name__}")
        return None
    finally:
        entry[dim] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dim", type=int, nargs="+", default=[128], choices=DIMS, help="feature dimensions (default 128)")
    add("--scales", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="scales per pass (default 1 2)")
    add("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES), help="of the queue (default bf16)")
    add("--num", type=int, default=1024, help="queries (default 1024)")
    add("--queue-size", type=int, default=65536, help="rows of the queue (default 65536)")
    args = parser.parse_args()
    lines = []
    for dtype, scales, dim in product(args.dtype, args.scales, args.dim):
        print(f"{dtype}, {scales} scales, D = {dim}")
        timed = [(time_blocks(b, dim, scales, DTYPES[dtype], args.num, args.queue_size), b) for b in candidates()]
        timed = sorted((seconds, blocks) for seconds, blocks in timed if seconds is not None)
        if not timed:
            sys.exit("sweep_loss: this machine can run none of the candidates; run `fastssl doctor` to learn why")
        for seconds, blocks in timed:
            print(f"  {seconds * 1e6:9.1f} us  {tuple(blocks)}")
        lines.append(f"{dtype}, {scales} scales: {dim}: Blocks{tuple(timed[0][1])},")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
