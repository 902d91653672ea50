"""Compiles the loss kernels for a GPU, which need not be there, and reports what the assembler made of them.

    python -m fastssl.bench.compile_loss --arch 90 --dim 128 --scales 2 --dtype bf16

Needs Triton 3.3 or later (torch 2.7): 3.2 is asked for a compilation in another way, and does not know sm_100.
Registers, spilled bytes and shared memory limit how many programs fit on a multiprocessor; the number of tensor-core
instructions shows whether the fast path was taken. Prints one JSON object per kernel.
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
from triton.compiler import ASTSource

from fastssl.kernels.queue_loss_finish import finish_rows, finish_scalars
from fastssl.kernels.row_lse import _add_parts
from fastssl.kernels.row_lse_blocks import DIMS, Blocks, table_blocks
from fastssl.kernels.row_lse_pass import _pass_over_queue

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

# types of the arguments, other than compile-time constants, of all loss kernels
KINDS = {name: "*fp32" for name in ("q_ptr", "k_ptr", "lse_ptr", "terms_ptr", "parts_ptr", "total_ptr")}
KINDS |= {f"{name}_ptr": "*fp32" for name in ("positive", "sum", "mean", "part_mean", "inside_sum", "inside_mean")}
KINDS |= {f"{name}_ptr": "*fp32" for name in ("gradient", "uniform_gradient", "uniform_factor")}
KINDS |= {name: "*i32" for name in ("above_ptr", "part_above_ptr")}
KINDS |= {name: "i32" for name in ("N", "K", "keys_per_part", "num_parts", "num_inside")}
KINDS |= {name: "fp32" for name in ("scale0", "shift0", "scale1", "shift1", "offset0", "offset1", "pairs")}
KINDS |= {f"contrast_{name}": "fp32" for name in ("scale", "offset", "factor", "weight")}
KINDS |= {name: "fp32" for name in ("align_alpha", "align_factor", "align_weight")}
KINDS |= {f"uniform_{name}": "fp32" for name in ("offset", "scale", "weight")}


def compile_pass(arch: int, dtype: str, dim: int, scales: int, blocks: Blocks, **flags: object) -> dict[str, object]:
    """Compiles one variant of the pass over the queue.

    arch: compute capability times ten; dtype: of queries and queue; scales: 1 or 2; flags: other compile-time
    constants of the kernel. Returns the arguments and what `compile_kernel` reports.
    """
    constants = {"D": dim, "C": scales, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k}
    constants |= {"COUNT_ABOVE": scales == 2, "EXCLUDE_SELF": False, "EVEN_K": True}
    constants |= {"WIDEN_WEIGHTS": False, "PRECISION": "ieee"} | flags
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    kinds = KINDS | dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}")
    report = {"dtype": dtype, "scales": scales, **blocks._asdict()}
    return report | compile_kernel(_pass_over_queue, arch, kinds, constants, options)


def compile_finish(arch: int, dim: int) -> list[dict[str, object]]:
    """Compiles the small kernels that follow the pass, with all terms switched on."""
    rows = {"D": dim, "C": 2, "COUNT_ABOVE": True, "BLOCK_R": max(1, 256 // dim), "BLOCK_P": 16}
    terms = {"CONTRAST": True, "UNIFORM": True, "INSIDE": True, "SQUARED": False, "BLOCK": 1024}
    return [
        compile_kernel(kernel, arch, KINDS, rows | terms, {"num_warps": 4})
        for kernel in (_add_parts, finish_rows, finish_scalars)
    ]


def compile_kernel(kernel, arch: int, kinds: dict[str, str], constants: dict, options: dict) -> dict[str, object]:
    """Compiles one kernel. Returns its name, registers, spilled and shared bytes and tensor-core instructions."""
    ptxas = find_ptxas(arch)  # first of all, since a Triton without one cannot be asked to compile as below either
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    constants = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = [i for i, kind in enumerate(signature.values()) if kind == "i32" or kind.startswith("*")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = {"kernel": kernel.fn.__name__, "arch": arch, "dim": constants.get("D")}
    return report | _assemble(ptxas, compiled.asm["ptx"]) | {"shared": compiled.metadata.shared}


def find_ptxas(arch: int) -> str:
    """The path of Triton's own ptxas. Raises ValueError with a Triton that does not tell it."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError:
        raise ValueError(f"compiling without a GPU needs Triton 3.3 (torch 2.7), not {triton.__version__}") from None
    tool = get_ptxas(arch)
    return tool[0] if isinstance(tool, tuple) else tool.path  # a (path, version) pair in older Tritons


def _assemble(ptxas: str, ptx: str) -> dict[str, int]:
    """Registers and spilled bytes as ptxas tells them, and the number of tensor-core instructions in the PTX."""
    target = re.search(r"\.target (\w+)", ptx).group(1)
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
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities times ten")
    parser.add_argument(
        "--dim", type=int, nargs="+", default=[128], choices=DIMS, help="feature dimensions (default 128)"
    )
    parser.add_argument(
        "--scales", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="scales per pass (default 1 2)"
    )
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(BYTES), help="of the queue (default bf16)")
    args = parser.parse_args()
    for arch, dtype, dim, scales in product(args.arch, args.dtype, args.dim, args.scales):
        blocks = table_blocks(arch, dim, scales, BYTES[dtype])
        print(json.dumps(compile_pass(arch, dtype, dim, scales, blocks)), flush=True)
    for arch, dim in product(args.arch, args.dim):
        print("\n".join(map(json.dumps, compile_finish(arch, dim))), flush=True)


if __name__ == "__main__":
    main()
