"""Builds the parts of a run from its configuration: loader, augmentation policy, model and optimiser."""

from __future__ import annotations

import os
import warnings
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.augment.policy import CROP_PAIRS, Policy, make_policy, parse_settings
from fastssl.config import Config, DataConfig
from fastssl.distributed import Ranks, read_ranks
from fastssl.loaders.make import Loader, make_loader
from fastssl.loaders.memory import is_small
from fastssl.machine.host_memory import keep_freed_memory
from fastssl.machine.precision import DTYPES, choose_precision
from fastssl.moco import MoCo
from fastssl.models.batchnorm import convert_sync_batchnorm, split_batchnorm
from fastssl.models.cpu_conv import use_cpu_convolutions
from fastssl.models.encoders import make_encoder
from fastssl.models.tryout import build_without_memory, why_refused
from fastssl.optim import make_optimizer
from fastssl.plan import encoder_batch_size, rank_batch_size
from fastssl.same_on_ranks import check_images
from fastssl.trials.compile_encoders import compile_encoders
from fastssl.trials.faster_sgd import choose_sgd
from fastssl.trials.layout import choose_layout

READING_OPTIONS = ("shuffle", "read_ahead", "beton_cache")  # who sets one of these wants the files read


def open_loader(config: Config, ranks: Ranks) -> Loader:
    """This rank's loader. --loader auto decodes a small data set once and keeps it, unless a reading option is set.

    Call on all ranks. Raises ValueError, beside what `make_loader` raises, when they see different images.
    """
    d, defaults = config.input, DataConfig()
    loader = make_config_loader(config, d.loader, ranks)
    check_images(loader, "training", ranks)
    may_choose = d.loader == "auto" and all(getattr(d, name) == getattr(defaults, name) for name in READING_OPTIONS)
    if not may_choose or loader.name not in ("folder", "beton") or not is_small(loader, ranks.device):
        return loader
    loader.close()
    resident = make_config_loader(config, "resident", ranks)
    resident.reason = f"{loader.reason}, and it is small: holds {resident.held}"
    return resident


def make_config_loader(config: Config, name: str, ranks: Ranks) -> Loader:
    """The loader called `name`, with the configuration's options."""
    d = config.input
    return make_loader(
        name,
        config.data,
        batch_size=rank_batch_size(config, ranks),
        seed=config.train.seed,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=d.workers,
        read_ahead=d.read_ahead,
        on_bad_image=d.on_bad_image,
        shuffle=d.shuffle,
        block_size=d.block_size,
        beton_cache=d.beton_cache,
        resident_shard=d.resident_shard,
        synthetic_images=d.synthetic_images,
        synthetic_size=d.synthetic_size,
    )


def open_policy(config: Config) -> Policy:
    """The augmentation policy, with everything the options change in it."""
    a = config.augment
    settings = {"crop_scale": a.crop_scale, "hide_and_seek": a.hide_and_seek, "hide_p": a.has_p}
    settings |= {"crop_iou": CROP_PAIRS[a.crop_pair], "crop_iou_p": a.crop_pair_p}
    settings |= parse_settings(a.policy_set)  # --policy-set may override any of them
    return make_policy(a.policy, cj=a.cj, grey_scale=a.grey_scale, gaussian_blur=a.gaussian_blur, **settings)


def check_parts(config: Config) -> None:
    """Builds the policy and sends a batch through the encoder before any image is read, on torch's meta device.

    Raises ValueError for a policy, architecture, head or stem that does not exist, and for sizes that cannot be
    trained on: a single value per channel in batch norm, images too small, or not a multiple of a ViT's patch.
    """
    open_policy(config)
    m, size, world_size = config.model, config.augment.image_size, read_ranks()[1]
    per_rank = encoder_batch_size(config, Ranks(0, world_size, torch.device("meta")))
    images = per_rank * world_size if m.sync_bn else per_rank // m.bn_splits  # normalised together by batch norm
    build = partial(make_encoder, m.arch, head=m.head, dim=m.dim, stem=m.stem)
    if not why_refused(build_without_memory(build).to("meta"), images, size, "meta"):
        return
    # The meta device lacks some operations, so a refusal counts only if real memory repeats it, on a small batch.
    if reason := why_refused(build(), min(images, 2), size):
        fix = "use another --image-size or another --arch"
        if images == 1:
            fix = "use a larger --batch-size or --image-size, or a smaller --bn-splits or --accumulate"
        raise ValueError(f"{m.arch} cannot train on {images} x 3 x {size} x {size} pixels ({reason}): {fix}")


def make_deterministic(on: bool) -> None:
    """Makes torch use bitwise repeatable kernels, or the fastest ones."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


class Trainee(NamedTuple):
    """The state that training changes and checkpoints save, and why its parts were chosen."""

    moco: MoCo
    encoder_q: nn.Module  # moco.encoder_q, or its DDP wrapper
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    why_layout: str = "requested"  # the memory format of moco's weights
    whose_optimizer: str = "torch's"  # torch's or apex's, and why
    compiled: str = "off"  # off, on or graphs
    why_compiled: str = "requested"


def make_trainee(config: Config, ranks: Ranks) -> Trainee:
    """Fresh state on the device, the same on every rank: the weights are a function of the seed."""
    t, m, o = config.train, config.model, config.optim
    torch.manual_seed(t.seed)
    encoder = make_encoder(m.arch, head=m.head, dim=m.dim, stem=m.stem)
    if ranks.device.type == "cpu":
        keep_freed_memory()
        use_cpu_convolutions(encoder)
    if m.bn_splits > 1:
        split_batchnorm(encoder, m.bn_splits)
    if m.sync_bn:
        encoder = convert_sync_batchnorm(encoder, ranks.device)
    moco = MoCo(encoder, m.dim, config.moco.queue_size, t.seed).to(ranks.device).train()
    moco.queue = moco.queue.to(choose_queue_dtype(config, ranks.device))
    layout, why_layout = choose_layout(config, moco.encoder_q, ranks)
    moco.set_memory_format(layout)
    moco.take_counters()
    options = dict(momentum=o.momentum, weight_decay=o.weight_decay, exclude_norm_bias=o.exclude_norm_bias)
    optimizer, whose = choose_sgd(config, make_optimizer(moco.encoder_q, o.optimizer, lr=o.lr, **options), ranks)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=choose_precision(t.precision, ranks.device) == "fp16")
    return Trainee(moco, moco.encoder_q, optimizer, scaler, why_layout, whose)


def choose_queue_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The queue's dtype: the encoders' on a GPU; float32 on a CPU, where the losses are computed in it."""
    requested = config.moco.queue_dtype
    if requested == "auto":
        requested = "fp32" if device.type == "cpu" else choose_precision(config.train.precision, device)
    return DTYPES[requested]


def compile_and_wrap(config: Config, trainee: Trainee, ranks: Ranks) -> Trainee:
    """Compiles the encoders in place and wraps encoder_q in DDP.

    The key encoder, the queue and batch norm's buffers stay outside DDP, which would overwrite them with rank 0's.
    """
    how, why = compile_encoders(config, trainee.moco, ranks)
    trainee = trainee._replace(compiled=how, why_compiled=why)
    if ranks.world_size == 1:
        return trainee
    return trainee._replace(encoder_q=wrap_ddp(trainee.moco.encoder_q, ranks.device, config.train.deterministic))


def wrap_ddp(module: nn.Module, device: torch.device, deterministic: bool = False) -> DistributedDataParallel:
    """DDP that averages gradients and leaves each rank its own buffers.

    After its first step DDP rebuilds its gradient buckets, which changes the order of summation: a resumed run would
    differ in the last bits. Looking for unused parameters (there are none) makes it keep the first buckets.
    """
    if deterministic:
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # those of 1 x 1 kernels do not match where they mean nothing; autograd lays all others out as their weights
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # torch 2.15
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=deterministic,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )
