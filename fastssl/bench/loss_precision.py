"""How accurate the loss is: its largest error against float64, by our code and by plain PyTorch in the queue's dtype.

    python -m fastssl.bench.loss_precision                        prints the table of kernels/README.md
    TRITON_INTERPRET=1 python -m fastssl.bench.loss_precision     the same without a GPU

Values and gradients at the unnormalised projection, for ordinary rows and for peaked ones (a queue with near-duplicates
of the queries). Without a GPU the kernels run in Triton's interpreter, whose bfloat16 products are wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.loss import published_loss
from fastssl.losses import LossConfig, moco_loss

TERMS = {
    "contrast": LossConfig(contrast_weight=1.0, align_weight=0.0, uniform_weight=0.0),
    "uniform": LossConfig(align_weight=0.0),
}
N, K, D = 64, 1024, 128


def make_rows(peaked: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Projections of queries and keys (N, D) and unit queue rows (K, D), float32."""
    generator = torch.Generator().manual_seed(0)
    z_q = torch.randn(N, D, generator=generator)
    z_k = z_q + torch.randn(N, D, generator=generator)
    queue = torch.randn(K, D, generator=generator)
    if peaked:
        queue[: N // 2] = z_q[: N // 2] + 0.1 * torch.randn(N // 2, D, generator=generator)
    return z_q.to(device), z_k.to(device), F.normalize(queue, dim=1).to(device)


def value_and_gradient(loss: Callable[[Tensor, Tensor], Tensor], z_q: Tensor, z_k: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at z_q, in float64."""
    z_q = z_q.detach().requires_grad_()
    value = loss(F.normalize(z_q, dim=1), F.normalize(z_k, dim=1))
    (gradient,) = torch.autograd.grad(value, z_q)
    return value.detach().double(), gradient.double()


def print_errors(dtype: torch.dtype, name: str, peaked: bool, device: str) -> None:
    """Prints a row of the table."""
    config = TERMS[name]
    z_q, z_k, queue = make_rows(peaked, device)
    low = queue.to(dtype)
    truth = value_and_gradient(lambda q, k: published_loss(q, k, low.double(), config), z_q.double(), z_k.double())
    plain = value_and_gradient(lambda q, k: published_loss(q.to(dtype), k.to(dtype), low, config), z_q, z_k)
    tiled = value_and_gradient(lambda q, k: moco_loss(q, k, low, config, "tiled").total, z_q, z_k)
    found = [plain, tiled]
    if device == "cuda" or dtype != torch.bfloat16:
        found.append(value_and_gradient(lambda q, k: moco_loss(q, k, low, config, "triton").total, z_q, z_k))
    largest = truth[1].abs().max()
    columns = []
    for value, gradient in found:
        columns += [f"{(value - truth[0]).abs():.1e}", f"{(gradient - truth[1]).abs().max() / largest:.1e}"]
    columns += ["not measured"] * (6 - len(columns))
    rows = "peaked" if peaked else "ordinary"
    print(f"| {str(dtype).removeprefix('torch.')} | {name} | {rows} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help, and no flags
    on_gpu = torch.cuda.is_available()
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("there is no CUDA device: run the kernels interpreted, with TRITON_INTERPRET=1 in the environment")
    where = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter on a CPU"
    print(f"N = {N}, K = {K}, D = {D}, torch {torch.__version__}, {where}; gradient errors over the largest entry\n")
    print("| queue | term | rows | plain value | gradient | tiled value | gradient | Triton value | gradient |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name in TERMS:
            for peaked in (False, True):
                print_errors(dtype, name, peaked, "cuda" if on_gpu else "cpu")


if __name__ == "__main__":
    main()
