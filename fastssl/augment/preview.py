"""A picture of what the encoder will see: each original beside its two views, with what was done to them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastssl.augment.jitter import OPERATIONS, jitter_order
from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.params import ViewParams, sample_params
from fastssl.augment.policy import Policy
from fastssl.augment.views import make_view
from fastssl.batch import ImageBatch, pack_images
from fastssl.data_prep.files import written_whole
from fastssl.loaders.make import Loader

TILE, GAP, TEXT = 224, 8, 40  # in pixels: side of a picture, space around it, height of the two lines below it
COLUMNS = 2  # images side by side, three pictures each
LETTERS = 38  # characters per line
COLOURS = ("red", "deepskyblue")  # of the crop boxes of view q and view k


def read_pictures(loader: Loader, count: int, data: str) -> ImageBatch:
    """`count` images spread evenly over `data`, without those that cannot be read, which are named on stderr.

    Raises ValueError when none of them can be read.
    """
    batch = next(loader.eval_batches(count, limit=count), None)
    for bad in loader.bad_images:
        print(f"left out: {bad}", file=sys.stderr)
    if batch is None:
        tried = min(count, loader.num_images)
        raise ValueError(f"no image in {data} can be read ({tried} tried): name a folder of readable images")
    return batch


def save_preview(batch: ImageBatch, policy: Policy, size: int, seed: int, epoch: int, path: Path) -> None:
    """Writes a PNG that shows each image with both crop boxes, then its view_q and view_k of `epoch`.

    The file appears whole or not at all. Raises ValueError for an empty batch.
    """
    if batch.size == 0:
        raise ValueError("a preview needs at least one image, got an empty batch")
    # only these images: a batch's bytes may be a whole data set on the GPU
    images = [batch.image(i).cpu().numpy() for i in range(batch.size)]
    batch = pack_images(images, batch.index.tolist(), batch.label.tolist())
    params = [sample_params(policy, batch, seed, epoch, view) for view in (0, 1)]
    views = [_to_bytes(make_view(batch, p, size)) for p in params]
    rows, columns = math.ceil(batch.size / COLUMNS), min(batch.size, COLUMNS)
    sheet = Image.new("RGB", (columns * (3 * (TILE + GAP) + GAP), rows * (TILE + TEXT) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(batch.size):
        left, top = (i % COLUMNS) * (3 * (TILE + GAP) + GAP) + GAP, (i // COLUMNS) * (TILE + TEXT) + GAP
        height, width = batch.image(i).shape[:2]
        tiles = [(_original(batch, params, i), f"image {int(batch.index[i])}, {width} x {height}", "black")]
        for name, view, p, colour in zip("qk", views, params, COLOURS):
            tiles.append((_fit(Image.fromarray(view[i])), _in_two_lines(f"{name}: {describe(p, i)}"), colour))
        for column, (tile, text, colour) in enumerate(tiles):
            at = left + column * (TILE + GAP)
            sheet.paste(tile, (at, top))
            draw.text((at, top + TILE + 2), text, fill="black")
            draw.text((at, top + TILE + 2), text[:2], fill=colour)  # the view's letter, in the colour of its box
    with written_whole(path) as partial:
        sheet.save(partial, format="PNG")


def describe(params: ViewParams, i: int) -> str:
    """The operations `params` applies to image i, in order."""
    steps = []
    if params.flip[i]:
        steps.append("flip")
    if params.grey_before[i]:
        steps.append("grey")
    if params.jitter[i]:
        for number in jitter_order(params.order[i : i + 1])[0].tolist():
            _, name, identity = OPERATIONS[number]
            value = float(getattr(params, name)[i])
            if value != identity:
                steps.append(f"{name[:3]} {value:.2f}")
    if params.grey_after[i]:
        steps.append("grey")
    if params.blur[i]:
        steps.append(f"blur {float(params.sigma[i]):.1f}")
    if params.solarise[i]:
        steps.append("solarise")
    if params.hide_cells[i]:
        steps.append(f"hide {int(params.hide_cells[i])}")
    return ", ".join(steps) or "crop"


def _to_bytes(view: torch.Tensor) -> np.ndarray:
    pixels = view.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
    return pixels.mul(255).round().clamp(0, 255).to(torch.uint8).numpy()


def _original(batch: ImageBatch, params: list[ViewParams], i: int) -> Image.Image:
    image = Image.fromarray(batch.image(i).numpy())
    tile = _fit(image)
    draw, (across, down) = ImageDraw.Draw(tile), (new / old for new, old in zip(tile.size, image.size))
    for p, colour in zip(params, COLOURS):
        top, left, height, width = (int(side[i]) for side in (p.top, p.left, p.crop_height, p.crop_width))
        x, y = round(left * across), round(top * down)
        far_x, far_y = round((left + width) * across) - 1, round((top + height) * down) - 1
        draw.rectangle((x, y, max(x, far_x), max(y, far_y)), outline=colour, width=2)
    return tile


def _fit(image: Image.Image) -> Image.Image:
    """The image with its long side at TILE pixels; a small one is enlarged without smoothing."""
    scale = TILE / max(image.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return image.resize([max(1, round(side * scale)) for side in image.size], how)


def _in_two_lines(text: str) -> str:
    """The text, broken after a comma if it is too long for one line."""
    if len(text) <= LETTERS:
        return text
    end = text.rfind(", ", 0, LETTERS) + 1
    return f"{text[:end]}\n{text[end + 1 :]}"
