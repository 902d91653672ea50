"""The classical MoCo loop, written from its published description: the peer with which our loop is compared.

Worker processes make two augmented float views of each image with torchvision's ImageFolder and Pillow; encoders run in
NCHW; the key batch is shuffled as float images; the loss stores the N x K matrix (He et al., arXiv 1911.05722,
Algorithm 1, with the augmentation of arXiv 2003.04297).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets

from fastssl.bench.classical_views import TwoViews
from fastssl.bench.loops import Loop, time_steps
from fastssl.bench.loss import published_loss
from fastssl.bench.photos import train_folder
from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.models.encoders import make_encoder


def classical_loop(data: str, config: Config, ranks: Ranks, workers: int, amp: bool) -> Loop:
    """The loop over data/train/<class>/* or data/<class>/* with the settings of `config`, but always policy v2."""
    loader = DataLoader(
        datasets.ImageFolder(train_folder(data), TwoViews(config.augment.image_size)),
        batch_size=config.train.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,  # fork is unsafe beside the threads of other loops
        pin_memory=ranks.device.type == "cuda",
        drop_last=True,
    )
    step = make_classical_step(config, ranks.device, amp)
    return lambda steps: time_steps(endless(loader), lambda batch, number: step(*batch[0]), steps)


def endless(loader: Iterable) -> Iterator:
    """The batches of epoch after epoch."""
    while True:
        yield from loader


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
