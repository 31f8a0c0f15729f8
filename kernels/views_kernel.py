"""The Triton kernel of the views op: each program walks down one strip of one view, row by row.

A strip is COLUMNS output columns by ROWS output rows of a view. Values that depend only on the column (source pixel,
weight, address) are computed once; those that depend only on the row are scalars. If no crop can be larger than its
view, the program keeps two source rows, already interpolated horizontally. The next output row lies between the same
two or one row further down, so each source row is read and interpolated once per strip. Jitters that a view does not
have are skipped by a branch on which all lanes of a program agree.

Contrast needs the mean gray of a whole view. A first launch of the same kernel (MEANS) stores one sum per strip for the
views that have contrast; the second launch adds up the sums of its view in a fixed order. Without contrast there is
only one launch. Legend as in kernels/views.py; E entries per view in the table of `device_tables`.
"""

import math

import numpy as np
import torch

from kernels import backend
from kernels.backend import jit, tl
from kernels.staging import upload
from kernels.view_parameters import CONTRAST, ViewParameters


def device_tables(parameters: ViewParameters, device: torch.device) -> tuple[torch.Tensor, bool]:
    """table_BVE, the parameters as the kernel reads them, in one upload, and whether any view has contrast.

    table_BVE (fp32, E = 14): top, left, height, width, flip, gray, the factors of brightness, contrast, saturation and
    hue, the four jitters in the order they are applied.
    """
    factor_BV4 = parameters.factor_BV4.numpy()
    columns = [*(table.numpy()[..., None] for table in parameters.geometry()), factor_BV4, parameters.order_BV4.numpy()]
    table_BVE = np.concatenate(columns, axis=2, dtype=np.float32, casting="unsafe")
    return upload(table_BVE, device), bool((factor_BV4[..., CONTRAST] != 1).any())


def launch_settings(height: int, width: int) -> dict[str, int]:
    """How an output of this size is divided into programs: COLUMNS and ROWS of a strip, PIXELS per lane, num_warps."""
    pixels = 1 if width <= 32 else 2
    return {"COLUMNS": 32 * pixels, "ROWS": 32 if height > 64 else 16, "PIXELS": pixels, "num_warps": 1}


def launch_views(
    images_BHWC: torch.Tensor,
    tables: tuple[torch.Tensor, bool],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out_dtype: torch.dtype,
    size: tuple[int, int],
) -> torch.Tensor:
    """The views, from tables already on the device: one launch, or two with contrast; a CUDA graph can capture it."""
    B, H, W, _ = images_BHWC.shape
    table_BVE, contrast = tables
    V, device = table_BVE.shape[1], images_BHWC.device
    settings = launch_settings(*size)
    strips = -(-size[0] // settings["ROWS"]) * -(-size[1] // settings["COLUMNS"])
    sums_BVs = torch.empty(B, V, strips, dtype=torch.float32, device=device)
    out_RHWC = torch.empty(V * B, *size, 3, dtype=out_dtype, device=device)
    for means in (True, False)[not contrast :]:
        backend.launch(
            _views_kernel,
            (B * V * strips,),
            images_BHWC,
            table_BVE,
            sums_BVs,
            out_RHWC,
            B,
            V,
            H,
            W,
            *size,
            *mean,
            *(1 / s for s in std),
            TAPS=math.ceil(2 * max(H / size[0], W / size[1], 1)),
            READ_WORDS=W % 4 == 0 and images_BHWC.data_ptr() % 4 == 0,
            MEANS=means,
            STRIPS=1 if means else max(32, backend.next_power_of_2(strips)),  # few values, so few kernels to compile
            **settings,
        )
    return out_RHWC.permute(0, 3, 1, 2)


@jit(unspecialized=("B",))
def _views_kernel(
    images_ptr, table_ptr, sums_ptr, out_ptr, B, V, H, W, out_H, out_W,
    mean_r, mean_g, mean_b, inverse_r, inverse_g, inverse_b, TAPS: tl.constexpr, READ_WORDS: tl.constexpr,
    MEANS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One strip of one view: the sum of its gray before contrast (MEANS), or its pixels."""
    across, strips = tl.cdiv(out_W, COLUMNS), tl.cdiv(out_W, COLUMNS) * tl.cdiv(out_H, ROWS)
    view, strip = tl.program_id(0) // strips, tl.program_id(0) % strips  # adjacent programs share an image in cache
    b, v = view // V, view % V
    table_ptr += view * 14
    top, left = tl.load(table_ptr), tl.load(table_ptr + 1)
    height, width = tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    flip, gray, turn = tl.load(table_ptr + 4), tl.load(table_ptr + 5), tl.load(table_ptr + 9)
    hue, jittered = 4, turn != 0.0  # hue: its place in the order of the jitters
    for place in tl.static_range(3):
        jittered |= tl.load(table_ptr + 6 + place) != 1.0
    for place in tl.static_range(4):
        hue = tl.where(tl.load(table_ptr + 10 + place) == 3.0, place, hue)
    factor_0, level_0, gray_0 = _blend_at(table_ptr, hue, 0)
    factor_1, level_1, gray_1 = _blend_at(table_ptr, hue, 1)
    factor_2, level_2, gray_2 = _blend_at(table_ptr, hue, 2)
    hue = tl.where(turn == 0.0, 4, hue)
    contrast = tl.where(level_0 != 0.0, 0, tl.where(level_1 != 0.0, 1, tl.where(level_2 != 0.0, 2, 3)))
    stop = 3  # blends from this one on are skipped
    if MEANS:
        stop = contrast
        hue = tl.where(hue > contrast, 4, hue)
    elif contrast < 3:
        part = tl.arange(0, STRIPS)
        parts = tl.load(sums_ptr + view.to(tl.int64) * strips + part, mask=part < strips, other=0.0)
        mean = tl.sum(parts, 0) / (out_H * out_W)
        level_0, level_1, level_2 = level_0 * mean, level_1 * mean, level_2 * mean
    turn = 6.0 * (turn - tl.floor(turn)) + 1.0  # >= 1 sixths of the circle
    shift_r, shift_g, shift_b = -mean_r * inverse_r, -mean_g * inverse_g, -mean_b * inverse_b

    # A lane has PIXELS adjacent pixels, on the last axis: for gathered loads the compiler does not spread it over
    # lanes.
    x = tl.arange(0, COLUMNS // PIXELS)[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    x += strip % across * COLUMNS
    out_ptr += (v * B + b).to(tl.int64) * out_H * out_W * 3
    image_ptr = images_ptr + b.to(tl.int64) * H * W * 3
    seen = tl.minimum(x, out_W - 1)  # lanes past the end repeat the last column
    seen = tl.where(flip != 0.0, out_W - 1 - seen, seen).to(tl.float32)
    step_y, step_x = height / out_H, width / out_W
    center_x = (seen + 0.5) * step_x + (left - 0.5)
    first_row = strip // across * ROWS
    stop_row = tl.minimum(first_row + ROWS, out_H)
    if MEANS:
        stop_row = tl.where(contrast < 3, stop_row, first_row)
    total = tl.zeros([COLUMNS // PIXELS, PIXELS], tl.float32)
    if TAPS == 2:
        center_x = tl.minimum(tl.maximum(center_x, left), left + width - 1.0)
    first_x = tl.floor(center_x)
    share_x = center_x - first_x
    at = -2.0  # the source row held in `upper`; the one below it is in `lower`
    upper_r, upper_g, upper_b = share_x * 0.0, share_x * 0.0, share_x * 0.0
    lower_r, lower_g, lower_b = upper_r, upper_g, upper_b
    for y in range(first_row, stop_row):
        center_y = (y + 0.5) * step_y + (top - 0.5)
        if TAPS == 2:
            center_y = tl.minimum(tl.maximum(center_y, top), top + height - 1.0)
            first_y = tl.floor(center_y)
            if first_y != at:
                if first_y == at + 1.0:
                    upper_r, upper_g, upper_b = lower_r, lower_g, lower_b
                else:
                    upper_r, upper_g, upper_b = _across(image_ptr, first_y, first_x, share_x, W, READ_WORDS)
                lower_y = tl.minimum(first_y + 1.0, top + height - 1.0)
                lower_r, lower_g, lower_b = _across(image_ptr, lower_y, first_x, share_x, W, READ_WORDS)
                at = first_y
            below = (center_y - first_y) * (1.0 / 255.0)
            above = 1.0 / 255.0 - below
            red, green, blue = upper_r * above, upper_g * above, upper_b * above
            red, green, blue = red + lower_r * below, green + lower_g * below, blue + lower_b * below
        else:
            red, green, blue = _shrunk(image_ptr, center_y, center_x, top, left, height, width, step_y, step_x, W, TAPS)
        if jittered:
            if hue == 0:
                red, green, blue = _turned(red, green, blue, turn)
            if stop > 0:
                red, green, blue = _blended(red, green, blue, factor_0, level_0, gray_0)
            if hue == 1:
                red, green, blue = _turned(red, green, blue, turn)
            if stop > 1:
                red, green, blue = _blended(red, green, blue, factor_1, level_1, gray_1)
            if hue == 2:
                red, green, blue = _turned(red, green, blue, turn)
            if stop > 2:
                red, green, blue = _blended(red, green, blue, factor_2, level_2, gray_2)
            if hue == 3:
                red, green, blue = _turned(red, green, blue, turn)
        if MEANS:
            total += _gray_of(red, green, blue)
        else:
            if gray != 0.0:
                level = _gray_of(red, green, blue)
                red, green, blue = level, level, level
            red, green, blue = red * inverse_r + shift_r, green * inverse_g + shift_g, blue * inverse_b + shift_b
            kind: tl.constexpr = out_ptr.dtype.element_ty
            row_ptr = out_ptr + (y * out_W + x) * 3
            tl.store(row_ptr, red.to(kind), mask=x < out_W)
            tl.store(row_ptr + 1, green.to(kind), mask=x < out_W)
            tl.store(row_ptr + 2, blue.to(kind), mask=x < out_W)
    if MEANS:
        total = tl.where(x < out_W, total, 0.0)
        tl.store(sums_ptr + view.to(tl.int64) * strips + strip, tl.sum(tl.sum(total, 1), 0))


@jit
def _blend_at(table_ptr, hue, j: tl.constexpr):
    """(f, a, g) of blend j, the j-th jitter without counting hue: x <- clamp(f x + a mean(gray(x)) + g gray(x))."""
    early, late = tl.load(table_ptr + 10 + j), tl.load(table_ptr + 11 + j)
    op = tl.where(hue <= j, late, early)
    brightness, contrast, saturation = tl.load(table_ptr + 6), tl.load(table_ptr + 7), tl.load(table_ptr + 8)
    factor = tl.where(op == 0.0, brightness, tl.where(op == 1.0, contrast, saturation))
    return factor, tl.where(op == 1.0, 1.0 - factor, 0.0), tl.where(op == 2.0, 1.0 - factor, 0.0)


@jit
def _across(image_ptr, y, first_x, share_x, W, READ_WORDS: tl.constexpr):
    """Colors in [0, 255] of source row y between pixels first_x and first_x + 1, the latter with weight share_x.

    READ_WORDS: rows start at multiples of four bytes, so the six bytes are extracted from two or three aligned words.
    """
    right = first_x < W - 1  # the right pixel exists; where it does not, its share is 0
    byte = first_x.to(tl.int32) * 3
    row_ptr = image_ptr + y.to(tl.int32) * (W * 3)
    if READ_WORDS:
        word_ptr = row_ptr.to(tl.pointer_type(tl.uint32)) + byte // 4
        shift = (byte % 4 * 8).to(tl.uint64)
        word_0 = tl.load(word_ptr).to(tl.uint64)
        word_1 = tl.load(word_ptr + 1, mask=right, other=0).to(tl.uint64)
        word_2 = tl.load(word_ptr + 2, mask=right & (byte % 4 == 3), other=0).to(tl.uint64)
        low, high = (word_0 | (word_1 << 32)) >> shift, (word_1 | (word_2 << 32)) >> shift
        low, high = low.to(tl.uint32), high.to(tl.uint32)
        red_0, green_0, blue_0 = low & 255, (low >> 8) & 255, (low >> 16) & 255
        red_1, green_1, blue_1 = low >> 24, high & 255, (high >> 8) & 255
    else:
        red_0, green_0, blue_0 = tl.load(row_ptr + byte), tl.load(row_ptr + byte + 1), tl.load(row_ptr + byte + 2)
        red_1 = tl.load(row_ptr + byte + 3, mask=right, other=0)
        green_1 = tl.load(row_ptr + byte + 4, mask=right, other=0)
        blue_1 = tl.load(row_ptr + byte + 5, mask=right, other=0)
    red, green, blue = red_0.to(tl.float32), green_0.to(tl.float32), blue_0.to(tl.float32)
    red += share_x * (red_1.to(tl.float32) - red)
    green += share_x * (green_1.to(tl.float32) - green)
    blue += share_x * (blue_1.to(tl.float32) - blue)
    return red, green, blue


@jit
def _shrunk(image_ptr, center_y, center_x, top, left, height, width, step_y, step_x, W, TAPS: tl.constexpr):
    """Colors in [0, 1] if an axis may shrink, by the weights of `resample_matrix` on TAPS x TAPS source pixels."""
    slope_y, slope_x = 1.0 / tl.maximum(step_y, 1.0), 1.0 / tl.maximum(step_x, 1.0)
    first_y = tl.floor(center_y - tl.maximum(step_y, 1.0)) + 1
    first_x = tl.floor(center_x - tl.maximum(step_x, 1.0)) + 1
    red, green, blue = center_x * 0.0, center_x * 0.0, center_x * 0.0
    sum_y, sum_x = 0.0, center_x * 0.0
    for j in range(TAPS):
        sum_x += _weight(first_x + j, left, width, center_x, slope_x)
    for i in range(TAPS):
        weight_y = _weight(first_y + i, top, height, center_y, slope_y)
        sum_y += weight_y
        for j in range(TAPS):
            weight = weight_y * _weight(first_x + j, left, width, center_x, slope_x)
            at = image_ptr + ((first_y + i).to(tl.int32) * W + (first_x + j).to(tl.int32)) * 3
            red += weight * tl.load(at, mask=weight > 0, other=0).to(tl.float32)  # without a weight it is not read
            green += weight * tl.load(at + 1, mask=weight > 0, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2, mask=weight > 0, other=0).to(tl.float32)
    scale = 1.0 / (255.0 * sum_y * sum_x)
    return red * scale, green * scale, blue * scale


@jit
def _weight(at, start, length, center, slope):
    """The triangle filter at source pixels `at` of one axis; 0 outside the crop."""
    weight = tl.maximum(1.0 - tl.abs(at - center) * slope, 0.0)
    return tl.where((at >= start) & (at < start + length), weight, 0.0)


@jit
def _gray_of(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@jit
def _blended(red, green, blue, factor, level, share):
    target = level + share * _gray_of(red, green, blue)
    red = tl.minimum(tl.maximum(factor * red + target, 0.0), 1.0)
    green = tl.minimum(tl.maximum(factor * green + target, 0.0), 1.0)
    blue = tl.minimum(tl.maximum(factor * blue + target, 0.0), 1.0)
    return red, green, blue


@jit
def _turned(red, green, blue, turn):
    """`_turn_hue` for one view, with the hue multiplied by the chroma, which avoids a division.

    turn: sixths of the circle plus 1, in [1, 7), so that no hue is negative before it is wrapped around.
    """
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    hue = tl.where(green == high, (blue - red) + 2 * chroma, (red - green) + 4 * chroma)
    hue = tl.where(red == high, green - blue, hue) + turn * chroma
    hue = tl.where(hue >= 6 * chroma, hue - 6 * chroma, hue)  # in [0, 6] chromas, still one sixth too far
    one, three = low - chroma, low + 2 * chroma
    red = tl.minimum(tl.maximum(one + tl.abs(hue - 4 * chroma), low), high)
    green = tl.minimum(tl.maximum(three - tl.abs(hue - 3 * chroma), low), high)
    blue = tl.minimum(tl.maximum(one + tl.abs(hue - 2 * chroma), low), high)
    return red, green, blue
