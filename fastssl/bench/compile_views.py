"""Compiles the kernels of the views for a GPU, which need not be there, and reports what the assembler made of them.

    python -m fastssl.bench.compile_views --arch 90 --dtype bf16

Prints one JSON object per kernel, as `compile_loss` does.
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
from fastssl.kernels.views_normalise import BLOCK, WARPS, normalise_rows

KINDS = dict.fromkeys(("pixels_ptr", "planes_ptr", "keys_ptr", "bytes_ptr"), "*u8")
KINDS |= {"rows_ptr": "*i16", "policy_ptr": "*fp64"}
KINDS |= {f"{name}_ptr": "*i32" for name in ("height", "width", "ints", "luma")}
KINDS |= {"offset_ptr": "*i64", "index_ptr": "*i64", "floats_ptr": "*fp32", "taps_ptr": "*fp32"}
KINDS |= dict.fromkeys(("B", "S", "tiles", "tiles_per_program", "rows_per_program", "epoch", "row"), "i32")
KINDS |= {"seed": "i64"}
KINDS |= {f"{name}{channel}": "fp32" for name in ("mean", "scale") for channel in range(3)}


def compile_views(arch: int, dtype: str) -> list[dict[str, object]]:
    """Compiles the kernels as they are launched for views of 224 pixels in `dtype`.

    The first kernel is compiled to draw its parameters and to read them; the third to normalise both views and to leave
    view_k as bytes, which the last one normalises.
    """
    tiles = triton.cdiv(224, COMPILED.tile) ** 2
    crop, jitter, finish = COMPILED.warps
    launches = (
        (crop_tiles, {"DRAW": True, "BLOCK": COMPILED.tile}, crop, None),
        (crop_tiles, {"DRAW": False, "BLOCK": COMPILED.tile}, crop, None),
        (jitter_rows, {"BLOCK": COMPILED.block, "BLOCK_TILES": triton.next_power_of_2(tiles)}, jitter, None),
        (finish_tiles, {"BLOCK": COMPILED.tile, "keys_ptr": None}, finish, False),
        (finish_tiles, {"BLOCK": COMPILED.tile}, finish, True),
        (normalise_rows, {"BLOCK": BLOCK, "plane": 1}, WARPS, None),
    )
    kinds = KINDS | {"out_ptr": f"*{dtype}"}
    return [
        {"dtype": dtype, "warps": warps, "draw": values.get("DRAW"), "key_bytes": key_bytes}
        | compile_kernel(kernel, arch, kinds, values, {"num_warps": warps} | OPTIONS)
        for kernel, values, warps, key_bytes in launches
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities times ten")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(BYTES), help="of the views (default bf16)")
    args = parser.parse_args()
    for arch, dtype in product(args.arch, args.dtype):
        print("\n".join(map(json.dumps, compile_views(arch, dtype))), flush=True)


if __name__ == "__main__":
    main()
