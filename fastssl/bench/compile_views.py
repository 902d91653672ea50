"""Compiles the kernels of the views for a GPU that need not be there and reports what the assembler made of them.

    python -m fastssl.bench.compile_views --arch 90 --dtype bf16

One JSON object per kernel on standard output, as from `compile_loss`.
"""

from __future__ import annotations

import argparse
import json
from itertools import product

import triton

from fastssl.bench.compile_loss import BYTES, compile_kernel
from fastssl.kernels.views import COMPILED, OPTIONS
from fastssl.kernels.views_crop import crop_tiles
from fastssl.kernels.views_finish import finish_tiles
from fastssl.kernels.views_jitter import jitter_rows

KINDS = {"pixels_ptr": "*u8", "planes_ptr": "*u8", "rows_ptr": "*i16", "offset_ptr": "*i64"}
KINDS |= {f"{name}_ptr": "*i32" for name in ("width", "ints", "luma")} | {
    f"{n}_ptr": "*fp32" for n in ("floats", "taps")
}
KINDS |= dict.fromkeys(("B", "S", "tiles", "rows_per_program"), "i32")
KINDS |= {f"{name}{channel}": "fp32" for name in ("mean", "scale") for channel in range(3)}


def compile_views(arch: int, dtype: str, size: int = 224) -> list[dict[str, object]]:
    """Compiles the three kernels as they are launched for views of `size` pixels in `dtype`."""
    tiles = triton.cdiv(size, COMPILED.tile) ** 2
    constants = (
        {"BLOCK": COMPILED.tile},
        {"BLOCK": COMPILED.block, "BLOCK_TILES": triton.next_power_of_2(tiles)},
        {"BLOCK": COMPILED.tile},
    )
    kinds = KINDS | {"out_ptr": f"*{dtype}"}
    return [
        {"dtype": dtype, "warps": warps} | compile_kernel(kernel, arch, kinds, values, {"num_warps": warps} | OPTIONS)
        for kernel, values, warps in zip((crop_tiles, jitter_rows, finish_tiles), constants, COMPILED.warps)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(BYTES))
    args = parser.parse_args()
    for arch, dtype in product(args.arch, args.dtype):
        print("\n".join(map(json.dumps, compile_views(arch, dtype))), flush=True)


if __name__ == "__main__":
    main()
