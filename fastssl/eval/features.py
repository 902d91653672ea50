"""Features of images: the backbone in eval mode over views that are resized and cropped, not augmented."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.augment.views import make_eval_view
from fastssl.batch import ImageBatch
from fastssl.distributed import Ranks, gather_objects
from fastssl.eval.images import Images, rank_batches
from fastssl.eval.memory import DiskRows, Rows
from fastssl.eval.search import share_chunk
from fastssl.eval.session import Session

View = Callable[[ImageBatch], Tensor]
_AT_ONCE = 4096  # rows sent between ranks in one message


@torch.inference_mode()
def extract_features(
    backbone: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    size: int,
    resize: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Features (n, C) float32 and labels (n,) int64 of all images of `batches`, in their order, on `device`.

    size, resize: the centre crop and the short side before it, in pixels. dtype: of the computation (autocast unless
    float32). With several ranks, each passes its own share of the images.
    Without images the tensors are empty: (0, 0) and (0,).
    """
    features, labels = [], []
    with eval_mode(backbone):
        for batch in batches:
            view = make_eval_view(batch.to(device), size, resize, dtype)  # (B, 3, S, S)
            features.append(encode(backbone, view, dtype))
            labels.append(batch.label.to(device))
    if not features:
        return torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat(features), torch.cat(labels)


def encode(backbone: nn.Module, view: Tensor, dtype: torch.dtype) -> Tensor:
    """Features (B, C) float32 of a view (B, 3, S, S). dtype: of the computation (autocast unless float32)."""
    with torch.autocast(view.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return backbone(view).flatten(1).float()


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Gives all ranks the batch norm statistics of rank 0, as DDP does: each rank has computed its own."""
    if ranks.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def eval_view(session: Session) -> View:
    """The usual view for evaluation, with the sizes of the command line: resize, centre crop, normalise."""
    o = session.options
    return lambda batch: make_eval_view(batch, o.image_size, o.resize, session.dtype)


@torch.no_grad()
def collect_features(
    session: Session,
    backbone: nn.Module,
    images: Images,
    view: View,
    *,
    transform: Callable[[Tensor], Tensor] = lambda features: features,
    batches: list[Tensor] | None = None,
    what: str = "features",
) -> tuple[Rows, Tensor]:
    """This rank's features (n, C), wherever `Memory.make_rows` finds room, and their labels (n,) int64 on the CPU.

    transform: applied to each batch's features, (B, C) to (B, C). batches: the indices of this rank's images, by
    default its part of all images. what: the name of the progress bar. Unreadable images are left out.
    Raises ValueError for features that are not finite.
    """
    if batches is None:
        batches = rank_batches(images.num_images, session.options.batch_size, session.ranks)
    rows: Rows | None = None
    labels, done = [], 0
    with eval_mode(backbone):
        for batch in session.bar(images.read(iter(batches)), len(batches), what):
            features = encode(backbone, view(batch.to(session.ranks.device)), session.dtype)
            if not bool(torch.isfinite(features).all()):
                raise ValueError("the encoder's features are not finite: use another checkpoint, or --precision fp32")
            features = transform(features)
            if rows is None:
                rows = session.memory.make_rows(sum(map(len, batches)), features.shape[1])
            rows[done : done + len(features)] = features
            labels.append(batch.label.cpu())
            done += len(features)
    if rows is None:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    return rows.truncate(done) if isinstance(rows, DiskRows) else rows[:done], torch.cat(labels)


def gather_features(session: Session, features: Rows) -> Rows:
    """All ranks' features (n, C) in rank order, on every rank; n may differ from rank to rank."""
    ranks = session.ranks
    if ranks.world_size == 1:
        return features
    shapes = gather_objects(tuple(features.shape), ranks)
    everything = session.memory.make_rows(sum(n for n, _ in shapes), max(c for _, c in shapes))
    done = 0
    for owner, (num, _) in enumerate(shapes):
        for start in range(0, num, _AT_ONCE):
            chunk = share_chunk(features, start, min(_AT_ONCE, num - start), everything.shape[1], owner, ranks)
            everything[done : done + len(chunk)] = chunk
            done += len(chunk)
    return everything


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is back in its own mode."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
