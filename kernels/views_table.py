"""The columns of the tables that hold the views' parameters for the kernels, one row per view.

Views are numbered n = view * B + image: first all of view q, then all of view k. The settings of a policy are a table
of one row.
"""

from __future__ import annotations

import triton.language as tl

# int32 columns; booleans are 0 or 1
INT_FIELDS = (
    "top",  # the crop box in pixels of the image
    "left",
    "crop_height",
    "crop_width",
    "flip",
    "grey_before",
    "plan",  # four operations of three bits each, the first in the lowest; see views_color.py
    "contrast_at",  # which of the four is contrast; 4 if none is
    "hue_levels",  # in 1/255 of a turn
    "grey_after",
    "blur",
    "solarise",
    "hide_cells",  # cells along a side of the hide-and-seek grid; 0 hides nothing
    "hide_key",  # below 2^24
)
FLOAT_FIELDS = ("brightness", "contrast", "saturation", "sigma", "hide_p")  # float32 columns
# float64; a range is given by its low end and its span; booleans are 0 or 1
POLICY_FIELDS = (
    *("central", "ratio_low", "ratio_high", "ratio_low_inverse"),  # central: the largest square instead of a crop
    *("area_low", "area_span", "log_ratio_low", "log_ratio_span"),
    *("brightness_low", "brightness_span", "contrast_low", "contrast_span", "saturation_low", "saturation_span"),
    *("hue_low", "hue_span", "sigma_low", "sigma_span"),
    *("flip_p", "jitter_p", "grey_p", "grey_first", "blur_p", "solarise_p", "hide_and_seek", "hide_p"),
)

TOP, LEFT, CROP_HEIGHT, CROP_WIDTH, FLIP, GREY_BEFORE, PLAN, CONTRAST_AT = map(tl.constexpr, range(8))
HUE_LEVELS, GREY_AFTER, BLUR, SOLARISE, HIDE_CELLS, HIDE_KEY = map(tl.constexpr, range(8, 14))
BRIGHTNESS, CONTRAST, SATURATION, SIGMA, HIDE_P = map(tl.constexpr, range(5))
CENTRAL, RATIO_LOW, RATIO_HIGH, RATIO_LOW_INVERSE = map(tl.constexpr, range(4))
AREA_LOW, AREA_SPAN, LOG_RATIO_LOW, LOG_RATIO_SPAN = map(tl.constexpr, range(4, 8))
BRIGHTNESS_LOW, BRIGHTNESS_SPAN, CONTRAST_LOW, CONTRAST_SPAN = map(tl.constexpr, range(8, 12))
SATURATION_LOW, SATURATION_SPAN, HUE_LOW, HUE_SPAN, SIGMA_LOW, SIGMA_SPAN = map(tl.constexpr, range(12, 18))
FLIP_P, JITTER_P, GREY_P, GREY_FIRST = map(tl.constexpr, range(18, 22))
BLUR_P, SOLARISE_P, HIDE_AND_SEEK, HIDE_PROBABILITY = map(tl.constexpr, range(22, 26))
INTS, FLOATS = tl.constexpr(len(INT_FIELDS)), tl.constexpr(len(FLOAT_FIELDS))

NUM_TAPS = 16  # taps stored for the blur of a view, a power of two
BLUR_RADIUS = 8  # distance of the farthest tap that may differ from 0
