"""Augmentation policies: a readable table of which operations are applied, how often and how strongly."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence

from fastssl.augment.params import MAX_BLUR_SIGMA, MIN_BLUR_SIGMA


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy. Probabilities end in `_p`; jitter strengths are the arguments of torchvision's `ColorJitter`.

    Raises ValueError for a value out of range.
    """

    name: str
    crop_scale: tuple[float, float] | None = (0.2, 1.0)  # area of the crop / area of the image; None: central square
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    crop_iou: tuple[float, float] | None = None  # bounds on the two crops' IoU, neither inside the other; None: free
    crop_iou_p: float = 1.0  # of such a pair of crops; otherwise the two crops are free
    flip_p: float = 0.5
    jitter_p: float = 0.0
    brightness: float = 0.0  # factor from U(max(0, 1 - b), 1 + b); contrast and saturation alike
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift from U(-h, h), in turns of the colour circle
    grey_p: float = 0.0
    grey_first: bool = False  # greyscale before the jitter instead of after it
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view, uniform
    solarise_p: float = 0.0  # invert the values from 128 up
    hide_and_seek: bool = False  # zero cells of a grid of no, 16 x 16, 8 x 8 or 4 x 4 cells (14, 28, 56 of 224 pixels)
    hide_p: float = 0.5  # of each cell

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio", "crop_iou", "blur_sigma"):  # a policy must be hashable
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high - low) of every value that is drawn uniformly from a range, by name."""
        log_ratio = tuple(math.log(ratio) for ratio in self.crop_ratio)
        limits = {"area": self.crop_scale or (1.0, 1.0), "log_ratio": log_ratio}
        for name in ("brightness", "contrast", "saturation"):
            limits[name] = (max(0.0, 1.0 - getattr(self, name)), 1.0 + getattr(self, name))
        limits |= {"hue": (-self.hue, self.hue), "sigma": self.blur_sigma}
        return {name: (low, high - low) for name, (low, high) in limits.items()}


def _check(policy: Policy) -> None:
    for f in dataclasses.fields(policy):
        value = getattr(policy, f.name)
        if f.name.endswith("_p") and not 0 <= value <= 1:
            raise ValueError(f"augmentation setting {f.name} is a probability, so it must lie in [0, 1], got {value}")
        if f.name in ("brightness", "contrast", "saturation") and not 0 <= value <= 3:
            raise ValueError(f"augmentation setting {f.name} must lie in [0, 3], got {value}")
    if not 0 <= policy.hue <= 0.5:
        raise ValueError(f"augmentation setting hue must lie in [0, 0.5] turns, got {policy.hue}")
    scale, ratio, sigma, iou = policy.crop_scale, policy.crop_ratio, policy.blur_sigma, policy.crop_iou
    if iou is not None and scale is None:
        raise ValueError("crop_iou has no meaning for the policy 'none', which keeps the centre of every image")
    if iou is not None and not (len(iou) == 2 and 0 <= iou[0] < iou[1] <= 1):
        raise ValueError(f"crop_iou must be two numbers with 0 <= low < high <= 1, got {iou}")
    if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(f"crop_scale must be two numbers with 0 < low <= high <= 1, got {scale}")
    if iou is not None and iou[1] < 2 * scale[0] - 1:  # two crops of a share s each have at least 2s - 1 in common
        raise ValueError(
            f"two crops of at least {scale[0]:g} of an image share more than crop_iou's {iou[1]:g}: lower crop_scale"
        )
    if not (len(ratio) == 2 and 0.01 <= ratio[0] <= ratio[1] <= 100):
        raise ValueError(f"crop_ratio must be two numbers with 0.01 <= low <= high <= 100, got {ratio}")
    if not (len(sigma) == 2 and MIN_BLUR_SIGMA <= sigma[0] <= sigma[1] <= MAX_BLUR_SIGMA):
        limits = f"{MIN_BLUR_SIGMA} <= low <= high <= {MAX_BLUR_SIGMA} pixels"
        raise ValueError(f"blur_sigma must be two numbers with {limits}, got {sigma}")


def _jitter(strength: float, hue: float) -> dict[str, float]:
    return {"brightness": strength, "contrast": strength, "saturation": strength, "hue": hue}


# Order of operations: crop, flip, grey (if grey_first), jitter in random order, grey, blur, solarise, normalise, hide.
POLICIES = {
    # MoCo v1's, the default of the align+uniform reference
    "v1": Policy("v1", jitter_p=1.0, grey_first=True, grey_p=0.2, **_jitter(0.4, hue=0.4)),
    # MoCo v2's
    "v2": Policy("v2", jitter_p=0.8, grey_p=0.2, blur_p=0.5, **_jitter(0.4, hue=0.1)),
    # the small-model reference's, at its colour strength cj = 1.5
    "small": Policy("small", jitter_p=0.8, grey_p=0.5, blur_p=0.5, **_jitter(0.8 * 1.5, hue=0.5)),
    # the centre of the image, unchanged
    "none": Policy("none", crop_scale=None, flip_p=0.0),
}

# Bounds on the IoU of an image's two crops, by the small-model reference's names. (Its code can also mask the region
# that both crops share, but no option of its training script does so, and neither do we.)
CROP_PAIRS = {"free": None, "easy": (0.25, 1.0), "hard": (0.05, 0.25), "super-hard": (1e-4, 0.05)}


def make_policy(
    name: str,
    *,
    cj: float | None = None,
    grey_scale: float | None = None,
    gaussian_blur: float | None = None,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    **overrides: object,
) -> Policy:
    """The policy called `name` (v1, v2, small, none); keywords override any field of `Policy`.

    cj: the colour strength c of `small`, for a jitter of (.8c, .8c, .8c, min(.5, .4c)). grey_scale, gaussian_blur:
    probabilities of greyscale and blur. crop_scale: area range of the crop, for any policy but `none`.
    Raises ValueError for an unknown policy or field (naming the nearest) and for a value out of range.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown augmentation policy {name!r}{_nearest(name, POLICIES)}")
    fields = {f.name for f in dataclasses.fields(Policy)} - {"name"}
    for key in overrides:
        if key not in fields:
            raise ValueError(f"augmentation policy {name!r} has no setting {key!r}{_nearest(key, fields)}")
    if cj is not None:
        if name != "small":
            raise ValueError(f"cj is for the policy 'small': for {name!r} set brightness, contrast, saturation and hue")
        overrides = _jitter(0.8 * cj, hue=min(0.5, 0.4 * cj)) | overrides
    named = {"grey_p": grey_scale, "blur_p": gaussian_blur}
    if name != "none":
        named["crop_scale"] = tuple(crop_scale)
    elif tuple(crop_scale) != (0.2, 1.0):
        raise ValueError("crop_scale has no meaning for the policy 'none', which keeps the centre of every image")
    settings = {k: v for k, v in named.items() if v is not None} | overrides
    return dataclasses.replace(POLICIES[name], **settings)


def parse_settings(settings: Sequence[str]) -> dict[str, object]:
    """Fields of `Policy` from words like "solarise_p=0.2", "blur_sigma=0.1,1.5" or "grey_first=true".

    Raises ValueError that names the word, and the nearest field or the kind of value it takes.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Policy) if f.name != "name"}
    values: dict[str, object] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in defaults:
            raise ValueError(f"policy setting {setting!r}: there is no {key!r}{_nearest(key, defaults)}")
        if isinstance(defaults[key], bool):
            takes, value = "true or false, such as true", {"true": True, "false": False}.get(text)
        elif isinstance(defaults[key], float):
            takes, numbers = "a number, such as 0.2", _numbers(text)
            value = numbers[0] if len(numbers) == 1 else None
        else:
            quoted = f"in a recipe in quotes, since its lists are split at commas: '{key}=0.1,1.0'"
            takes, numbers = f"two numbers separated by a comma, such as 0.1,1.0 ({quoted})", _numbers(text)
            value = numbers if len(numbers) == 2 else None
        if value is None:
            raise ValueError(f"policy setting {setting!r}: {key} takes {takes}")
        values[key] = value
    return values


def _numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers; () if they are not numbers."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        return ()


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(sorted(known))}"
