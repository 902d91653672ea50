"""Compiles the loss kernel for a GPU that need not be there and reports what the assembler made of it.

    python -m fastssl.bench.compile_loss --arch 90 --dim 128 --scales 2 --dtype bf16

Registers, spilled bytes and shared memory bound how many programs fit a multiprocessor; the count of tensor-core
instructions shows whether the fast path was taken. One JSON object per kernel on standard output.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastssl.kernels.row_lse_blocks import DIMS, Blocks, table_blocks
from fastssl.kernels.row_lse_pass import _pass_over_queue

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def compile_pass(arch: int, dtype: str, dim: int, scales: int, blocks: Blocks, **flags: object) -> dict[str, object]:
    """Compiles one variant of the pass over the queue.

    arch: compute capability times ten; dtype: of queries and queue; scales: 1 or 2; flags: other compile-time
    constants of the kernel. Returns the arguments and what `_assemble` counts, with `shared` bytes.
    """
    constants = {"D": dim, "C": scales, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k}
    constants |= {"COUNT_ABOVE": scales == 2, "EXCLUDE_SELF": False, "EVEN_K": True}
    constants |= {"WIDEN_WEIGHTS": False, "PRECISION": "ieee"} | flags
    kinds = dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}") | {"above_ptr": "*i32"}
    kinds |= dict.fromkeys(("positive_ptr", "sum_ptr", "mean_ptr"), "*fp32")
    kinds |= dict.fromkeys(("N", "K", "keys_per_part"), "i32")
    kinds |= dict.fromkeys(("scale0", "shift0", "scale1", "shift1"), "fp32")
    signature = {name: kinds.get(name, "constexpr") for name in _pass_over_queue.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind == "i32" or kind.startswith("*")]
    source = ASTSource(_pass_over_queue, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = {"arch": arch, "dtype": dtype, "dim": dim, "scales": scales, **blocks._asdict()}
    return report | _assemble(compiled.asm["ptx"], arch) | {"shared": compiled.metadata.shared}


def _assemble(ptx: str, arch: int) -> dict[str, int]:
    """Registers, spilled bytes and tensor-core instructions, from ptxas and the text it is given."""
    target = re.search(r"\.target (\w+)", ptx).group(1)
    tool = get_ptxas(arch)
    ptxas = tool[0] if isinstance(tool, tuple) else tool.path  # a (path, version) pair in older Tritons
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", file, "-o", Path(scratch) / "kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dim", type=int, nargs="+", default=[128], choices=DIMS)
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(BYTES))
    args = parser.parse_args()
    for arch, dtype, dim, scales in product(args.arch, args.dtype, args.dim, args.scales):
        blocks = table_blocks(arch, dim, scales, BYTES[dtype])
        print(json.dumps(compile_pass(arch, dtype, dim, scales, blocks)), flush=True)


if __name__ == "__main__":
    main()
