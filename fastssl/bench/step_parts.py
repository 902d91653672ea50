"""The parts of the training step, each run by itself with the step's own weights and shapes, to see what they cost.

Their sum is not the time of the step, in which parts may overlap or find their data in a cache. The learning rate is 0,
so that the weights do not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from fastssl.augment.views import make_views
from fastssl.batch import split_batch
from fastssl.bench.device import wait
from fastssl.bench.loops import WARM_UP, Loop
from fastssl.build import Trainee, open_loader, open_policy
from fastssl.config import Config
from fastssl.distributed import Ranks
from fastssl.losses import moco_loss
from fastssl.machine.precision import compute_dtype
from fastssl.optim import set_lr
from fastssl.plan import directions

PART = "part: "  # the prefix of their names
REST = "optimiser + EMA + queue"


def step_parts(config: Config, trainee: Trainee, ranks: Ranks) -> dict[str, Loop]:
    """{name: a loop of that part alone}."""
    moco, device, seed = trainee.moco, ranks.device, config.train.seed
    dtype = compute_dtype(config.train.precision, device)
    policy, size, ways = open_policy(config), config.augment.image_size, directions(config)
    accumulate = config.optim.accumulate
    batch = split_batch(next(open_loader(config, ranks).batches()), accumulate)[0]

    def views() -> tuple[torch.Tensor, torch.Tensor]:
        found = make_views(batch, policy, size, seed, 0, dtype, config.augment.augment_kernel)
        return (torch.cat(found), torch.cat(found[::-1])) if ways == 2 else found

    def begin_step() -> None:
        if trainee.compiled == "graphs":
            torch.compiler.cudagraph_mark_step_begin()

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def encode_k() -> torch.Tensor:
        begin_step()
        with torch.no_grad(), autocast():
            return normalize(moco.encoder_k(view_k).float(), dim=1)

    def encode_q() -> None:
        begin_step()
        with autocast():
            z = trainee.encoder_q(view_q)
        z.backward(gradient.to(z.dtype))
        trainee.optimizer.zero_grad(set_to_none=True)  # the gradients of CUDA graphs must not be accumulated

    def loss() -> None:
        z.grad = None
        pairs = zip(normalize(z, dim=1).chunk(ways), k.chunk(ways))
        found = [moco_loss(*pair, moco.queue, config.loss, config.train.loss_kernel) for pair in pairs]
        sum(part.total for part in found).backward()

    def rest() -> None:
        set_lr(trainee.optimizer, 0.0)
        for p, zeros in gradients:
            p.grad = zeros
        moco.update_key_encoder(config.moco.ema_momentum)
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        moco.update_queue(keys)

    view_q, view_k = (view.contiguous(memory_format=moco.memory_format) for view in views())  # as the step's encoders
    k = encode_k()
    keys = k.repeat(accumulate, 1)
    gradient = torch.randn_like(k) / len(k)
    z = torch.randn_like(k).requires_grad_()
    gradients = [(p, torch.zeros_like(p)) for p in moco.encoder_q.parameters() if p.requires_grad]
    parts = {"augmentation": views, "encoder_k": encode_k, "encoder_q": encode_q, "loss": loss, REST: rest}
    return {PART + name: repeat(f, device, 1 if name == REST else accumulate) for name, f in parts.items()}


def repeat(function: Callable[[], object], device: torch.device, calls: int) -> Loop:
    """A loop of so many calls of `function` a step; after some warm-up, and waiting for the device at the end."""

    def loop(steps: int) -> float:
        for _ in range(WARM_UP):
            function()
        wait(device)
        start = time.perf_counter()
        for _ in range(steps * calls):
            function()
        wait(device)
        return time.perf_counter() - start

    return loop
