"""Every option once: its type, its default and one comment. The command line and the recipes are made from this file.

A flag is the field's name with dashes (`--queue-size`), a recipe key is the field's name (`queue_size`); the sections
below only group them. Defaults are those of the alignment+uniformity MoCo (Wang & Isola, arXiv 2005.10242).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from fastssl.config_checks import check
from fastssl.losses import LossConfig


def flag(*names: str) -> object:
    """Other spellings of a field's flag: the reference projects' names, with the same meaning."""
    return tyro.conf.arg(aliases=names)


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    loader: Literal["auto", "folder", "beton", "dali", "resident", "synthetic"] = "auto"
    """How images are read; auto decodes what is small once and holds it, and says what it chose and why."""
    workers: Annotated[int | None, flag("-j")] = None
    """Decoding threads per process; by default the cores, shared between the processes of this machine."""
    read_ahead: int | None = None
    """Batches decoded while the device trains; by default 2 on a GPU and 0 on a CPU, whose cores the step wants."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """An unreadable image is named, counted and replaced by its neighbour, or stops the run."""
    shuffle: Literal["full", "blocks"] = "full"
    """blocks: for data larger than memory, blocks of neighbouring images are read together and mixed in windows."""
    block_size: int = 128
    """Images of a block of --shuffle blocks; 128 blocks are mixed at a time."""
    beton_cache: Literal["page", "process"] = "page"
    """page: a .beton file is mapped; process: each image is read into memory first, for slow network file systems."""
    resident_shard: bool = False
    """The resident loader keeps on each GPU only its share of the images, and shuffles within the shares."""
    val: str | None = None
    """Held-out images of the k-NN probe, a .beton file or a folder; by default val, valid, ... beside the data."""
    synthetic_images: int = 4096
    """Images of the synthetic loader."""
    synthetic_size: int = 256
    """Their height and width in pixels."""


@dataclass(frozen=True)
class AugmentConfig:
    """How an image becomes two views."""

    policy: Literal["v1", "v2", "small", "none"] = "v1"
    """v1: MoCo v1; v2: MoCo v2 (with blur); small: the small-model project's; none: resize and centre crop."""
    image_size: int = 224
    """Height and width of a view in pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area a random crop covers, smallest and largest."""
    cj: float | None = None
    """Strength of the colour jitter of policy small (its own default is 1.5)."""
    grey_scale: float | None = None
    """Probability of greyscale; by default the policy's own."""
    gaussian_blur: float | None = None
    """Probability of blur; by default the policy's own."""
    hide_and_seek: Annotated[bool, flag("--aug-has")] = False
    """Black out random cells of a random grid after normalisation."""
    has_p: float = 0.5
    """Probability that hide-and-seek blacks out a cell."""
    crop_pair: Literal["free", "easy", "hard", "super-hard"] = "free"
    """How much the two crops share: IoU above .25, above .05, below .05, neither inside the other; free: anything."""
    crop_pair_p: float = 1.0
    """Share of the images with such a pair; the others get two free crops."""
    policy_set: tuple[str, ...] = ()
    """Any setting of the policy by name, such as solarise_p=0.2 blur_sigma=0.1,1.5 (fastssl/augment/policy.py)."""
    augment_kernel: Literal["auto", "triton", "numba", "reference"] = "auto"
    """Implementation of the views; auto says what it chose and why."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: a backbone and a projection head."""

    arch: Annotated[str, flag("-a")] = "resnet50"
    """Backbone by name; a misspelt one is answered with the nearest."""
    head: Literal["linear", "simple", "deep", "wide", "dropout"] = "linear"
    """Projection head: linear c-d; simple c-c-d; deep c-c-c-d; wide c-2c-d; dropout c-c-d with dropout."""
    dim: Annotated[int, flag("--moco-dim")] = 128
    """Dimension d of the projection."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: first convolution 3x3 with stride 1 and no max-pool, for 32-pixel images."""
    bn_splits: int = 1
    """Batch norm over this many sub-batches, as on so many GPUs, on each device."""
    sync_bn: bool = False
    """Batch norm over all ranks (CUDA only); the key shuffle is then of no use and off."""


@dataclass(frozen=True)
class MoCoConfig:
    """Momentum contrast (He et al., arXiv 1911.05722)."""

    queue_size: Annotated[int, flag("--moco-k")] = 65536
    """Keys in the queue, any number; a batch that does not divide it wraps around."""
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the keys in the queue; auto: on a GPU the encoders', since 16 bits make the losses fast; on a CPU fp32."""
    ema_momentum: Annotated[float, flag("--moco-m")] = 0.999
    """Momentum of the key encoder's moving average."""
    ema_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the momentum rises to 1 over the run."""
    symmetric: bool = False
    """Each view is once the query and once the key, and the loss is the mean of both: a step costs twice as much."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """SGD and AdamW are torch's fused ones where they exist."""
    lr: Annotated[float, flag("--learning-rate")] = 0.03
    """Base learning rate of the whole batch; never scaled behind your back."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    weight_decay: Annotated[float, flag("--wd")] = 1e-4
    """Weight decay, on every parameter unless --exclude-norm-bias."""
    exclude_norm_bias: bool = False
    """No weight decay on biases and norm layers (LARS always leaves them out)."""
    lr_schedule: Literal["step", "cosine", "constant"] = "step"
    """Set per epoch, as the references do."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs at which the step schedule multiplies the learning rate by --lr-drop."""
    lr_drop: float = 0.1
    """Factor of the step schedule."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0, per step."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    accumulate: int = 1
    """Micro-batches per step: --batch-size is divided by it."""


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    epochs: int = 200
    """Passes over the images; the tail of a pass that does not fill a batch is dropped."""
    batch_size: Annotated[int, flag("-b")] = 128
    """Images per step over all GPUs, nodes and micro-batches."""
    steps: int | None = None
    """Stop after this many steps; schedules still follow --epochs."""
    start_epoch: int = 0
    """First epoch of a run that resumes nothing."""
    seed: int = 0
    """Order, augmentation, initial weights and dropout are functions of it."""
    deterministic: bool = False
    """Bitwise repeatable, slower on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the encoders, with fp32 weights and losses; auto: bf16 on a GPU or CPU that has it, fp16 on an older GPU."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """torch.compile of the encoders (--compile, --no-compile); graphs: as CUDA graphs; auto: measured, on a GPU."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """NHWC memory format of the encoders (--channels-last, --no-channels-last); auto: measured at the start."""
    loss_kernel: Literal["auto", "triton", "tiled", "reference"] = "auto"
    """Implementation of the losses; auto says what it chose and why."""
    output: Annotated[str | None, flag("--ckpt-dir")] = None
    """Run folder; by default runs/<arch>-<date>-<time>."""
    resume: str = "no"
    """auto: go on from the newest good checkpoint of --output; or a checkpoint's path."""
    restart: bool = False
    """With --resume PATH: take its weights alone (also a SEED student's, or another project's) and begin at step 0."""
    log_every: Annotated[int, flag("-p", "--print-freq")] = 20
    """Steps between two lines of the log: the only steps that wait for the GPU."""
    save_every_epochs: int = 1
    """Epochs between two checkpoints."""
    save_every_steps: int | None = None
    """Steps between two checkpoints, besides."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every_epochs: int = 50
    """A checkpoint at a multiple of this many epochs is kept for good; 0 keeps none."""


@dataclass(frozen=True)
class EvalConfig:
    """The k-NN probe while training."""

    knn_every: int = 10
    """Epochs between two probes, off the clock; 0 for none."""
    knn_k: int = 20
    """Neighbours that vote."""
    knn_images: int = 20_000
    """Most training images in the bank, and most held-out images asked."""
    eval_resize: int | None = None
    """Short side before the centre crop; by default 256 for 224, in proportion (with the cifar stem: no resize)."""


@dataclass(frozen=True)
class Config:
    """Pretrain an image encoder without labels: MoCo with the alignment, uniformity and contrastive losses."""

    data: tyro.conf.Positional[str] = ""
    """Folder of images (train/<class>/*, <class>/* or a flat folder), or a .beton file."""
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
    """All options by field name, sections dissolved, in the order of this file."""
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
