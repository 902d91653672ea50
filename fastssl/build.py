"""From the configuration to the parts of a run: loader, augmentation policy, model and optimiser."""

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
from fastssl.compile_encoders import compile_encoders
from fastssl.config import Config, DataConfig
from fastssl.distributed import Ranks, read_ranks
from fastssl.faster_sgd import choose_sgd
from fastssl.host_memory import keep_freed_memory
from fastssl.layout import choose_layout
from fastssl.loaders.make import Loader, make_loader
from fastssl.loaders.memory import is_small
from fastssl.moco import MoCo
from fastssl.models.batchnorm import convert_sync_batchnorm, split_batchnorm
from fastssl.models.cpu_conv import use_cpu_convolutions
from fastssl.models.encoders import make_encoder
from fastssl.models.tryout import build_without_memory, why_refused
from fastssl.optim import make_optimizer
from fastssl.plan import DTYPES, choose_precision, encoder_batch_size, rank_batch_size


def open_loader(config: Config, ranks: Ranks) -> Loader:
    """This rank's loader. --loader auto decodes what is small once and holds it, unless it is told how to read."""
    d = config.input
    loader = make_config_loader(config, d.loader, ranks)
    told_how = any(getattr(d, name) != getattr(DataConfig(), name) for name in ("shuffle", "read_ahead", "beton_cache"))
    if d.loader != "auto" or told_how or loader.name not in ("folder", "beton") or not is_small(loader, ranks.device):
        return loader
    loader.close()
    held = make_config_loader(config, "resident", ranks)
    held.reason = f"{loader.reason} and small; holds {held.held}"
    return held


def make_config_loader(config: Config, name: str, ranks: Ranks) -> Loader:
    """The loader `name` with the options of the configuration."""
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
    """The augmentation policy with the options that change it."""
    a = config.augment
    pair = {"crop_iou": CROP_PAIRS[a.crop_pair], "crop_iou_p": a.crop_pair_p}
    settings = {"crop_scale": a.crop_scale, "hide_and_seek": a.hide_and_seek, "hide_p": a.has_p, **pair}
    settings |= parse_settings(a.policy_set)  # which may name any of them
    return make_policy(a.policy, cj=a.cj, grey_scale=a.grey_scale, gaussian_blur=a.gaussian_blur, **settings)


def check_parts(config: Config) -> None:
    """Sends a batch through an encoder before images are read, both without memory where torch can do so.

    Raises ValueError for a policy, architecture, head or stem that does not exist, and for sizes with which no step can
    be made: batch norm of one value a channel, images too small or not divided by a ViT's patches.
    """
    open_policy(config)
    m, size, world_size = config.model, config.augment.image_size, read_ranks()[1]
    whole = encoder_batch_size(config, Ranks(0, world_size, 1, torch.device("meta")))
    images = whole * world_size if m.sync_bn else whole // m.bn_splits  # that are normalised together
    build = partial(make_encoder, m.arch, head=m.head, dim=m.dim, stem=m.stem)
    if not why_refused(build_without_memory(build).to("meta"), images, size, "meta"):
        return
    # torch knows some operations only with memory: asked again with it, and with little
    if reason := why_refused(build(), min(images, 2), size):
        fewer = "a larger --batch-size or --image-size, or fewer --bn-splits and --accumulate"
        mend = "take " + (fewer if images == 1 else "another --image-size, or another --arch")
        raise ValueError(f"{m.arch} cannot train on {images} x 3 x {size} x {size} pixels ({reason}): {mend}")


def make_deterministic(on: bool) -> None:
    """Bitwise repeatable kernels, or the fastest ones."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


class Trainee(NamedTuple):
    """State that training owns and checkpoints hold."""

    moco: MoCo
    encoder_q: nn.Module  # moco.encoder_q, or its DDP wrapper
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    why_layout: str = "asked for"  # of the memory format of moco's weights
    why_optimizer: str = "torch's"  # whose it is
    compiled: str = "off"  # how the encoders are: off, on or graphs
    why_compiled: str = "asked for"


def make_trainee(config: Config, ranks: Ranks) -> Trainee:
    """Fresh state on the device, the same on every rank: weights are a function of the seed."""
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
    fp16 = choose_precision(t.precision, ranks.device) == "fp16"
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
    return Trainee(moco, moco.encoder_q, optimizer, scaler, why_layout, whose)


def choose_queue_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The queue's dtype: that of the encoders, but on a CPU float32, in which the losses are computed there."""
    asked = config.moco.queue_dtype
    if asked == "auto":
        asked = "fp32" if device.type == "cpu" else choose_precision(config.train.precision, device)
    return DTYPES[asked]


def compile_and_wrap(config: Config, trainee: Trainee, ranks: Ranks) -> Trainee:
    """Compiles the encoders in place and wraps encoder_q in DDP.

    The key encoder, the queue and batch norm's buffers stay outside DDP: it would overwrite them with rank 0's.
    """
    how, why = compile_encoders(config, trainee.moco, ranks)
    trainee = trainee._replace(compiled=how, why_compiled=why)
    if ranks.world_size == 1:
        return trainee
    return trainee._replace(encoder_q=wrap_ddp(trainee.moco.encoder_q, ranks.device, config.train.deterministic))


def wrap_ddp(module: nn.Module, device: torch.device, deterministic: bool = False) -> DistributedDataParallel:
    """DDP that averages gradients and leaves each rank its own buffers.

    After its first step DDP sorts gradients into other buckets, which are summed in another order: a resumed run would
    differ in the last bits. Looking for unused parameters, of which there are none, keeps the first buckets.
    """
    if deterministic:
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # torch 2.15
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=deterministic,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )
