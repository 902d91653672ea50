"""The tables through which a view's parameters reach the kernels: one row per view, columns by name.

Views are numbered n = view * B + image: first all of view q, then all of view k.
"""

from __future__ import annotations

import triton.language as tl

# int32 columns; booleans are 0 and 1
INT_FIELDS = (
    "top",  # the crop box in pixels of the image
    "left",
    "crop_height",
    "crop_width",
    "flip",
    "grey_before",
    "plan",  # four operations of three bits each, the first in the lowest; see views_color.py
    "contrast_at",  # which of the four is contrast; 4: none is
    "hue_levels",  # whole levels of 1/255 turn
    "grey_after",
    "blur",
    "solarise",
    "hide_cells",  # cells along a side of the hide-and-seek grid; 0 hides nothing
    "hide_key",  # below 2^24
)
FLOAT_FIELDS = ("brightness", "contrast", "saturation", "sigma", "hide_p")  # float32 columns

TOP, LEFT, CROP_HEIGHT, CROP_WIDTH, FLIP, GREY_BEFORE, PLAN, CONTRAST_AT = map(tl.constexpr, range(8))
HUE_LEVELS, GREY_AFTER, BLUR, SOLARISE, HIDE_CELLS, HIDE_KEY = map(tl.constexpr, range(8, 14))
BRIGHTNESS, CONTRAST, SATURATION, SIGMA, HIDE_P = map(tl.constexpr, range(5))
INTS, FLOATS = tl.constexpr(len(INT_FIELDS)), tl.constexpr(len(FLOAT_FIELDS))

NUM_TAPS = 16  # floats in a row of the blur's taps
BLUR_RADIUS = 8  # the farthest tap that may differ from 0
