"""Every option, once: its type, its default and its help text. Flags and recipe keys are derived from this file.

A flag is a field's name with dashes (`--queue-size`), a recipe key is the name itself (`queue_size`); the sections
below only group them. The defaults are those of the alignment+uniformity MoCo (Wang & Isola, arXiv 2005.10242).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fastssl.config_checks import check
from fastssl.loss_config import LossConfig


def flag(*names: str) -> object:
    """Other spellings of a field's flag: the reference projects' names for the same thing."""
    return tyro.conf.arg(aliases=names)


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    loader: Literal["auto", "folder", "beton", "dali", "resident", "synthetic"] = "auto"
    """How images are read. auto decides by the data, keeps a small data set decoded in memory, and logs its choice."""
    workers: Annotated[int | None, flag("-j")] = None
    """Decoding threads per process (0: one); by default this machine's cores divided by its processes."""
    read_ahead: int | None = None
    """Batches decoded while the device trains; by default 2 on a GPU and 0 on a CPU, where training needs the cores."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """skip: an unreadable image is logged and the next readable one takes its place; error: it stops the run."""
    shuffle: Literal["full", "blocks"] = "full"
    """blocks: reads blocks of neighbouring images and shuffles within a window of blocks, for data beyond memory."""
    block_size: int = 128
    """Images in a block of --shuffle blocks; 128 blocks make up a window."""
    beton_cache: Literal["page", "process"] = "page"
    """page: a .beton file is memory-mapped; process: its images are read with read(), for slow network file systems."""
    resident_shard: bool = False
    """The resident loader keeps only 1/N of the images on each of N ranks, and each rank shuffles its own."""
    val: str | None = None
    """Held-out images for the k-NN probe: a folder or a .beton file; by default val, valid, ... beside the data."""
    synthetic_images: int = 4096
    """Number of images of the synthetic loader."""
    synthetic_size: int = 256
    """Height and width of the synthetic images in pixels."""


@dataclass(frozen=True)
class AugmentConfig:
    """How an image becomes two views."""

    policy: Literal["v1", "v2", "small", "none"] = "v1"
    """v1: MoCo v1; v2: MoCo v2 (adds blur); small: arXiv 2107.14762, for small encoders; none: resize, centre crop."""
    image_size: int = 224
    """Height and width of a view in pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    cj: float | None = None
    """Strength of the colour jitter of --policy small; by default 1.5."""
    grey_scale: float | None = None
    """Probability of greyscale; by default the policy's own."""
    gaussian_blur: float | None = None
    """Probability of blur; by default the policy's own."""
    hide_and_seek: Annotated[bool, flag("--aug-has")] = False
    """Set random cells of a random grid to zero after normalisation."""
    has_p: float = 0.5
    """Probability that hide-and-seek hides a cell."""
    crop_pair: Literal["free", "easy", "hard", "super-hard"] = "free"
    """IoU of an image's two crops: easy .25 to 1, hard .05 to .25, super-hard below .05; free: unconstrained."""
    crop_pair_p: float = 1.0
    """Probability that an image gets such a pair of crops; otherwise its crops are free."""
    policy_set: tuple[str, ...] = ()
    """Any other settings of the policy, such as solarise_p=0.2 blur_sigma=0.1,1.5 (see fastssl/augment/policy.py)."""
    augment_kernel: Literal["auto", "triton", "numba", "reference"] = "auto"
    """Implementation of the augmentation; auto picks the fastest that runs here, and logs its choice."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: a backbone and a projection head."""

    arch: Annotated[str, flag("-a")] = "resnet50"
    """Name of the backbone; `fastssl models` lists them."""
    head: Literal["linear", "simple", "deep", "wide", "dropout"] = "linear"
    """Layer widths of the projection head: linear c-d; simple and dropout c-c-d; deep c-c-c-d; wide c-2c-d."""
    dim: Annotated[int, flag("--moco-dim")] = 128
    """Dimension d of the projection."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: the first convolution is 3x3 with stride 1 and there is no max-pool, for 32-pixel images."""
    bn_splits: int = 1
    """Batch norm over this many parts of each device's batch, as if they were on that many GPUs."""
    sync_bn: bool = False
    """Batch norm over all ranks: CUDA only; the host waits in every layer. Keys need no shuffle then, and get none."""


@dataclass(frozen=True)
class MoCoConfig:
    """Momentum contrast (He et al., arXiv 1911.05722)."""

    queue_size: Annotated[int, flag("--moco-k")] = 65536
    """Keys in the queue; need not be a multiple of the batch size."""
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the keys in the queue; auto: --precision on a GPU, fp32 on a CPU."""
    ema_momentum: Annotated[float, flag("--moco-m")] = 0.999
    """Momentum of the key encoder's moving average."""
    ema_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the momentum rises to 1 over the run."""
    symmetric: bool = False
    """Use each view once as query and once as key, and the mean of both losses; a step has twice as many views."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """The optimiser; sgd and adamw are torch's fused ones, or NVIDIA apex's SGD where that is faster."""
    lr: Annotated[float, flag("--learning-rate")] = 0.03
    """Base learning rate; not scaled with the batch size or the number of GPUs."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    weight_decay: Annotated[float, flag("--wd")] = 1e-4
    """Weight decay, of every parameter unless --exclude-norm-bias."""
    exclude_norm_bias: bool = False
    """No weight decay on biases and norm layers (lars always leaves them out)."""
    lr_schedule: Literal["step", "cosine", "constant"] = "step"
    """The learning rate changes once per epoch, as in the reference code; step: at --milestones."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs at which --lr-schedule step multiplies the learning rate by --lr-drop."""
    lr_drop: float = 0.1
    """Factor of --lr-schedule step."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from 0, step by step; keeps features apart at the start."""
    clip_grad: float | None = None
    """Clip the norm of the gradient to this; by default it is not clipped."""
    accumulate: int = 1
    """Micro-batches per step, into which --batch-size is divided."""


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    epochs: int = 200
    """Passes over the images; the last images of a pass, too few for a batch, are dropped."""
    batch_size: Annotated[int, flag("-b")] = 128
    """Images per step, over all nodes, GPUs and micro-batches."""
    steps: int | None = None
    """Stop after this many steps; the schedules still follow --epochs."""
    start_epoch: int = 0
    """First epoch of a run that does not resume one."""
    seed: int = 0
    """Seed of the order, the augmentation, the initial weights and dropout."""
    deterministic: bool = False
    """Make runs repeatable bit by bit; slower on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the encoders' arithmetic; weights and losses are fp32. auto: bf16 where supported, fp16 on older GPUs."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile of the encoders; graphs: with CUDA graphs; auto: on with a GPU, or what proves faster there."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Channels-last (NHWC) memory format of the encoders; auto: whichever is faster in a trial at the start."""
    loss_kernel: Literal["auto", "triton", "tiled", "reference"] = "auto"
    """Implementation of the losses; auto picks the fastest that runs here, and logs its choice."""
    debug: bool = False
    """Check the inputs of the losses in every step, not only in the first; each check waits for the GPU."""
    output: Annotated[str | None, flag("--ckpt-dir")] = None
    """Run folder; by default runs/<arch>-<date>-<time>."""
    resume: str = "no"
    """auto: the newest intact checkpoint in --output, if any; PATH: that one; auto:PATH: PATH while there is none."""
    restart: bool = False
    """With --resume PATH: load only the weights, which may be another project's, and begin at step 0."""
    log_every: Annotated[int, flag("-p", "--print-freq")] = 20
    """Steps between log lines; only these steps wait for the GPU."""
    save_every_epochs: int = 1
    """Epochs between checkpoints; one is also saved before each k-NN probe."""
    save_every_steps: int | None = None
    """Steps between checkpoints, in addition to --save-every-epochs."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every_epochs: int = 50
    """Also keep the checkpoints at multiples of this many epochs; 0: none."""


@dataclass(frozen=True)
class EvalConfig:
    """The k-NN probe during training."""

    knn_every: int = 10
    """Epochs between probes, whose time does not count as training; 0: no probe."""
    knn_k: int = 20
    """Number of neighbours that vote."""
    knn_images: int = 20_000
    """How many training images, at most, make up the feature bank, and how many held-out images are classified."""
    eval_resize: int | None = None
    """Short side before the centre crop; by default 8/7 of the image size, or the image size with --stem cifar."""


@dataclass(frozen=True)
class Config:
    """Pretrain an image encoder by MoCo with the alignment, uniformity and contrastive losses.

    --config RECIPE starts from a recipe (see fastssl recipes), which flags override.
    --print-config prints all settings and exits.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")] = ""
    """Folder of images (train/<class>/*, <class>/* or a flat folder), .beton file, or tar shards."""
    input: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check(self, flat(self))


def flat(config: Config) -> dict[str, object]:
    """All options by field name, without their sections, in the order of this file."""
    values: dict[str, object] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        values.update(vars(value) if dataclasses.is_dataclass(value) else {f.name: value})
    return values


def replace(config: Config, **values: object) -> Config:
    """The same configuration with options changed, by field name."""
    sections = {}
    for f in dataclasses.fields(config):
        section = getattr(config, f.name)
        if dataclasses.is_dataclass(section):
            mine = {k: values.pop(k) for k in list(values) if k in vars(section)}
            sections[f.name] = dataclasses.replace(section, **mine)
    return dataclasses.replace(config, **sections, **values)
