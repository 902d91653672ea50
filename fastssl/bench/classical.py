"""The classical MoCo loop, written from its published description: the peer with which our loop is compared.

Worker processes make two augmented float views of each image with torchvision's ImageFolder and Pillow; encoders run in
NCHW; the key batch is shuffled as float images; the loss stores the N x K matrix (He et al., arXiv 1911.05722,
Algorithm 1, with the augmentation of arXiv 2003.04297).

A worker makes a whole batch, so batches come in waves, one from each worker at nearly the same time. A turn therefore
warms up for a wave and times whole waves: a few steps out of one wave would seem to cost the workers nothing. When the
clock has stopped, what the workers have begun is cut short: they would slow down whoever is timed next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets

from fastssl.bench.classical_views import TwoViews
from fastssl.bench.loops import WARM_UP, Loop, time_steps
from fastssl.bench.loss import published_loss
from fastssl.bench.photos import train_folder
from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.machine.precision import explain_precision
from fastssl.models.encoders import make_encoder


class Photos(datasets.ImageFolder):
    """ImageFolder with two views of each image; empty ones, at once, while they are not `wanted`."""

    def __init__(self, folder: str, size: int) -> None:
        try:
            super().__init__(folder, TwoViews(size))
        except FileNotFoundError as error:
            raise ValueError(f"the classical loop needs images in class folders: {error}") from None
        self.wanted = torch.ones(1, dtype=torch.bool).share_memory_()  # the workers see the same byte
        self.empty = torch.zeros(3, size, size)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        """((view_q, view_k), label). Raises ValueError for a file that cannot be decoded."""
        if not self.wanted:
            return (self.empty, self.empty), 0
        try:
            return super().__getitem__(index)
        except OSError as error:
            raise ValueError(f"{self.samples[index][0]} cannot be decoded ({error}): remove it") from None


def classical_loop(data: str, config: Config, ranks: Ranks, workers: int, amp: bool) -> Loop:
    """The loop over data/train/<class>/* or data/<class>/* with the settings of `config`, but always policy v2.

    Raises ValueError for a symmetric loss, for a folder without class folders or with fewer images than a batch, and
    for AMP where the device computes in 32 bits alone: a CPU without bf16 imitates it, many times slower.
    """
    if config.moco.symmetric:
        raise ValueError("its loss goes one way, and the recipe's is symmetric")
    precision, why = explain_precision("auto", ranks.device)
    if amp and precision == "fp32":
        raise ValueError(f"AMP would only slow it down: {why}")
    photos = Photos(train_folder(data), config.augment.image_size)
    check_fill(len(photos), config)
    batches: list[list[int]] = []  # of the next turn
    loader = DataLoader(
        photos,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,  # fork is unsafe beside the threads of other loops
        pin_memory=ranks.device.type == "cuda",
    )
    step = make_classical_step(config, ranks.device, amp)

    def loop(steps: int) -> float:
        wave = max(1, workers)
        warm_up, timed = max(WARM_UP, workers), -(-steps // wave) * wave
        ahead = 2 * workers  # batches that a DataLoader asks its workers for before they are wanted
        orders = (torch.randperm(len(photos)) for _ in range(warm_up + timed + ahead))
        batches[:] = (order[: config.train.batch_size].tolist() for order in orders)
        photos.wanted.fill_(True)
        found = iter(loader)
        try:
            seconds = time_steps((views for views, _ in found), lambda views, number: step(*views), timed, warm_up)
        except ValueError as error:  # from a worker it comes with the worker's traceback in its text
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
        photos.wanted.fill_(False)
        for _ in found:
            pass
        return seconds * steps / timed

    return loop


def check_fill(num: int, config: Config) -> None:
    """Raises ValueError if `num` images do not fill a batch, for which a loop would wait for ever."""
    if num < (size := config.train.batch_size):
        raise ValueError(f"{num} images do not fill a batch of {size}: use --batch-size {num} or less")


def make_classical_step(config: Config, device: torch.device, amp: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A function step(view_q, view_k) -> loss, which takes float views on the host."""
    m, o = config.model, config.optim
    encoder_q = make_encoder(m.arch, head=m.head, dim=m.dim, stem=m.stem).to(device).train()
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    queue = F.normalize(torch.randn(config.moco.queue_size, m.dim, device=device), dim=1)
    optimizer = torch.optim.SGD(encoder_q.parameters(), lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=amp and device.type == "cuda")
    pointer = 0

    def step(view_q: Tensor, view_k: Tensor) -> Tensor:
        nonlocal pointer
        view_q, view_k = (view.to(device, non_blocking=True) for view in (view_q, view_k))
        with torch.autocast(device.type, dtype=dtype, enabled=amp):
            q = F.normalize(encoder_q(view_q), dim=1)
            with torch.no_grad():
                for p_q, p_k in zip(encoder_q.parameters(), encoder_k.parameters()):
                    p_k.mul_(config.moco.ema_momentum).add_(p_q, alpha=1 - config.moco.ema_momentum)
                order = torch.randperm(view_k.shape[0], device=device)
                k = F.normalize(encoder_k(view_k[order]), dim=1)[torch.argsort(order)]
            loss = published_loss(q, k.to(q.dtype), queue.clone().to(q.dtype), config.loss)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        rows = (pointer + torch.arange(k.shape[0], device=device)) % queue.shape[0]
        queue[rows] = k.float()
        pointer = (pointer + k.shape[0]) % queue.shape[0]
        return loss.detach()

    return step
