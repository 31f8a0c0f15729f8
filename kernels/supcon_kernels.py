"""The contrastive loss of supcon.py as Triton kernels, which never hold the R x R matrix.

Four launches: _prepare_kernel converts the rows, _forward_kernel streams blocks of anchors over the columns,
_merge_kernel turns each row's partial sums into its log-denominator and the loss, and _backward_kernel streams over the
columns again for the gradient, whose parts are summed if the columns were split. Memory is O(R E): a copy of z, some
numbers per row and, if R is small, up to MAX_SPLITS partial results per row, written by a constant number of
programs. There are no atomics: equal input gives equal bits.

A float32 product is computed as three float16 products with fp32 sums. Let x = 2^-k (high + low), with high the float16
nearest to 2^k x, low that nearest to the rest, and k such that a group's largest entry scaled lies in [2^13, 2^14):

    x.y = 2^-(k+l) (high.high' + high.low' + low.high' + low.low'),  the last term, 2^-22 of the first, being left out

Entries down to 2^-15 of the group's largest keep 22 bits, and smaller ones are exact to 2^-38 of that largest, whatever
the rows' norms. float16 and bfloat16 input, scaled by 2^k, needs only `high`. Exponentials are powers of two, with
log2(e) folded into the temperature.

Legend: P = R rounded up to whole groups (padding rows are zero and not anchors), W = E rounded up to a power of two.
"""

import math

import torch

from kernels import backend
from kernels.backend import jit, launch, tl

OOD_COLUMNS = ("none", "global", "own_class", "foreign_class")
MAX_SPLITS = 16
MATCH, KEY = tl.constexpr(0), tl.constexpr(1)  # rows of keys_2P
BIAS, UNIT, LSE, SHARE, SHIFT = (tl.constexpr(row) for row in range(5))  # rows of rows_5P
GAIN = tl.constexpr(2.0**14)  # |G| <= 2, so GAIN |G| stays below float16's largest, 65504; resolved to 2^-39 of it
LN2 = tl.constexpr(math.log(2))


def supcon_triton(z_RE, labels_R, is_ood_R, num_views, temperature, ood_columns, ood_weight, hardness, ood_anchors):
    """`supcon` by the kernels: fp32 sums, O(R E) memory, differentiable once."""
    images = z_RE.shape[0] // num_views
    rows = (z_RE.contiguous(), labels_R.contiguous(), is_ood_R.contiguous())
    return _SupCon.apply(*rows, images, temperature, ood_columns, ood_weight, hardness, ood_anchors)


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_RE, labels_R, is_ood_R, images, temperature, ood_columns, ood_weight, hardness, ood_anchors):
        (R, E), device, hard = z_RE.shape, z_RE.device, hardness > 0
        blocks = _blocks(E, hard)
        group, W = blocks["group"], blocks["width"]
        groups = -(-R // group)
        P, pairs = groups * group, z_RE.dtype == torch.float32
        rules = dict(COLUMNS=OOD_COLUMNS.index(ood_columns), OOD_ANCHORS=ood_anchors, PAIRS=pairs, GROUP=group, WIDTH=W)
        bias = -math.inf if ood_columns == "none" else math.log2(ood_weight)
        to_log2 = 1 / (temperature * math.log(2))
        halves_NPW = torch.empty(1 + pairs, P, W, dtype=torch.float16, device=device)
        keys_2P = torch.empty(2, P, dtype=torch.int32, device=device)
        rows_5P = torch.empty(5, P, dtype=torch.float32, device=device)
        inputs = (z_RE, labels_R, is_ood_R, halves_NPW, keys_2P, rows_5P)
        launch(_prepare_kernel, (groups,), *inputs, R, E, images, bias, **rules, **blocks["prepare"])
        settings = blocks["forward"]
        splits, run = _splits(P, blocks["programs"], **settings)
        partial_SFP = torch.empty(splits, 8 if hard else 4, P, dtype=torch.float32, device=device)
        grid = (P // settings["BLOCK_I"], splits)
        numbers = (groups, run, to_log2, hardness)
        launch(_forward_kernel, grid, *inputs[3:], partial_SFP, *numbers, HARD=hard, **rules, **settings)
        loss, anchors = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2))
        sums = (partial_SFP, rows_5P, loss, anchors, groups, splits, hardness)
        launch(_merge_kernel, (1,), *sums, HARD=hard, GROUP=group, **blocks["merge"])
        ctx.save_for_backward(halves_NPW, keys_2P, rows_5P, anchors)
        ctx.shape, ctx.dtype, ctx.numbers = (R, E, groups), z_RE.dtype, (to_log2, 1 / temperature, hardness)
        ctx.rules = rules | {"HARD": hard}
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        halves_NPW, keys_2P, rows_5P, anchors = ctx.saved_tensors
        (R, E, groups), (_, P, W) = ctx.shape, halves_NPW.shape
        blocks = _blocks(E, ctx.rules["HARD"])
        settings = blocks["backward"]
        splits, run = _splits(P, blocks["programs"], **settings)
        whole = splits == 1
        dz_SRE = torch.empty(splits, R, E, dtype=ctx.dtype if whole else torch.float32, device=grad.device)
        grid = (P // settings["BLOCK_I"], splits, W // settings["BLOCK_E"])
        rows = (halves_NPW, keys_2P, rows_5P, anchors, grad, dz_SRE)
        launch(_backward_kernel, grid, *rows, R, E, groups, run, *ctx.numbers, **ctx.rules, **settings)
        return dz_SRE[0] if whole else dz_SRE.sum(0).to(ctx.dtype), *[None] * 8


def _blocks(E: int, hard: bool) -> dict:
    """Launch settings for width E: each pass's blocks of rows I and columns J, and how many programs fill the device.

    On sm_90 they fit without register spills, two programs per multiprocessor up to width 128. The group size is a
    multiple of every block size. Above width 128 the backward pass makes dz in parts of BLOCK_E columns.
    """
    width = max(16, backend.next_power_of_2(E))
    if backend.interpreted():
        block = {"BLOCK_I": 16, "BLOCK_J": 16}
        own = {"group": 32, "programs": 12, "prepare": {}, "merge": {"BLOCK": 64}}
        return own | {"width": width, "forward": block, "backward": block | {"BLOCK_E": 16}}
    wide = width > 128
    block = {"BLOCK_I": 64, "num_warps": 4, "num_stages": 2}
    return {
        "width": width,
        "group": 128,
        "programs": 132 if wide else 264,
        "prepare": {"num_warps": 8},
        "forward": block | {"BLOCK_J": 32 if hard else 64},
        "merge": {"BLOCK": 2048, "num_warps": 16},
        "backward": block | {"BLOCK_J": 32 if wide else 64, "BLOCK_E": min(width, 64 if wide and hard else 128)},
    }


def _splits(P: int, programs: int, BLOCK_I: int, BLOCK_J: int, **_) -> tuple[int, int]:
    """How many runs the columns are split into so that about `programs` programs run, and the blocks in each run."""
    tiles = P // BLOCK_J
    wanted = max(1, min(MAX_SPLITS, tiles, programs // (P // BLOCK_I)))
    run = -(-tiles // wanted)
    return -(-tiles // run), run


@jit(unspecialized=("R", "images"))  # both change with the batch
def _prepare_kernel(
    z_ptr, labels_ptr, is_ood_ptr, halves_ptr, keys_ptr, rows_ptr, R, E, images, bias,
    COLUMNS: tl.constexpr, OOD_ANCHORS: tl.constexpr, PAIRS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The float16 halves of a group of rows, 0 beyond R and E, and each row's keys and numbers.

    match: equal for two rows that are positives of each other: an ID row's class; for others a number of their own.
    key: 2 class + (1 if near-OOD). bias: log2 of the row's weight as a column, -inf for padding rows. unit: 2^-k.
    """
    P = tl.num_programs(0) * GROUP
    i = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    e = tl.arange(0, WIDTH)
    label = tl.load(labels_ptr + i, mask=i < R, other=0).to(tl.int32)
    is_ood = tl.load(is_ood_ptr + i, mask=i < R, other=0).to(tl.int32)
    match = tl.where((i < R) & (is_ood == 0), label, -2 - i)
    if OOD_ANCHORS:
        match = tl.where((i < R) & (is_ood != 0), -2 - i % images, match)
    tl.store(keys_ptr + MATCH * P + i, match)
    tl.store(keys_ptr + KEY * P + i, label * 2 + is_ood)
    tl.store(rows_ptr + BIAS * P + i, tl.where(i < R, tl.where(is_ood != 0, bias, 0.0), float("-inf")))
    inside, cell = (i[:, None] < R) & (e[None, :] < E), i[:, None] * WIDTH + e[None, :]
    x = tl.load(z_ptr + i[:, None] * E + e[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    exponent = tl.minimum(13 + 127 - (largest.to(tl.int32, bitcast=True) >> 23), 40)  # 2^13 <= 2^k largest < 2^14
    x *= ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    high = x.to(tl.float16)
    tl.store(halves_ptr + cell, high)
    if PAIRS:
        tl.store(halves_ptr + P * WIDTH + cell, (x - high.to(tl.float32)).to(tl.float16))
    unit = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(rows_ptr + UNIT * P + i, tl.zeros([GROUP], tl.float32) + unit)


@jit
def _similarities(high_i, low_i, high_j, low_j, PAIRS: tl.constexpr):
    """z_i.z_j of two blocks of rows, in units of both (times 2^(k+l)); the small terms are added first."""
    if PAIRS:
        s = tl.dot(low_i, tl.trans(high_j))
        s = tl.dot(high_i, tl.trans(low_j), s)
        s = tl.dot(high_i, tl.trans(high_j), s)
    else:
        s = tl.dot(high_i, tl.trans(high_j))
    return s


@jit
def _add_three(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@jit
def _hidden(key_anchor, key_column, COLUMNS: tl.constexpr):
    """Which near-OOD columns are hidden from an anchor because of their source class (COLUMNS >= 2)."""
    same_class = ((key_anchor ^ key_column) >> 1) == 0
    return ((key_column & 1) != 0) & (same_class == (COLUMNS == 3))


@jit(unspecialized=("groups", "run"))
def _forward_kernel(
    halves_ptr, keys_ptr, rows_ptr, partial_ptr, groups, run, to_log2, hardness,
    COLUMNS: tl.constexpr, OOD_ANCHORS: tl.constexpr, HARD: tl.constexpr, PAIRS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One block of anchors against one run of columns: sums of powers of two relative to running maxima.

    With hard weights, positives and negatives have a maximum each: relative to a much larger positive, the negatives'
    weights e^{hardness s} would vanish. Without, one maximum and one sum serve both.
    """
    P = groups * GROUP
    start_i = tl.program_id(0) * BLOCK_I
    i = start_i + tl.arange(0, BLOCK_I)
    e = tl.arange(0, WIDTH)
    match_i = tl.load(keys_ptr + MATCH * P + i)[:, None]
    if COLUMNS >= 2:
        key_i = tl.load(keys_ptr + KEY * P + i)[:, None]
    unit_i = tl.load(rows_ptr + UNIT * P + start_i) * to_log2
    high_i = tl.load(halves_ptr + i[:, None] * WIDTH + e[None, :])
    low_i = high_i
    if PAIRS:
        low_i = tl.load(halves_ptr + P * WIDTH + i[:, None] * WIDTH + e[None, :])
    lowest = tl.full([BLOCK_I], -1e30, tl.float32)
    zero = tl.zeros([BLOCK_I], tl.float32)
    max_d, exp_d, sum_p, count_p = lowest, zero, zero, zero
    max_n, exp_n, hard_n, weight_n = lowest, zero, zero, zero
    begin = tl.program_id(1) * run * BLOCK_J
    for start in range(begin, tl.minimum(begin + run * BLOCK_J, P), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        match_j = tl.load(keys_ptr + MATCH * P + j)[None, :]
        bias_j = tl.load(rows_ptr + BIAS * P + j)[None, :]
        unit = tl.load(rows_ptr + UNIT * P + start) * unit_i
        high_j = tl.load(halves_ptr + j[:, None] * WIDTH + e[None, :])
        low_j = high_j
        if PAIRS:
            low_j = tl.load(halves_ptr + P * WIDTH + j[:, None] * WIDTH + e[None, :])
        raw = _similarities(high_i, low_i, high_j, low_j, PAIRS)
        other = i[:, None] != j[None, :]
        positive = (match_i == match_j) & other
        hidden = other == 0
        if COLUMNS >= 2:
            hidden = hidden | _hidden(key_i, tl.load(keys_ptr + KEY * P + j)[None, :], COLUMNS)
        if HARD:
            s = raw * unit
            new_d = tl.maximum(max_d, tl.max(tl.where(positive, s, -1e30), 1))
            share_d = tl.where(positive, tl.exp2(s - new_d[:, None]), 0.0)
            bias = tl.where(hidden | positive, float("-inf"), bias_j)
            new_n = tl.maximum(max_n, tl.max(tl.where(bias > float("-inf"), s, -1e30), 1))
            rise, below = max_n - new_n, tl.where(bias > float("-inf"), s - new_n[:, None], 0.0)
            exp_n = exp_n * tl.exp2((1 + hardness) * rise) + tl.sum(tl.exp2((1 + hardness) * below + bias), 1)
            hard_n = hard_n * tl.exp2(hardness * rise) + tl.sum(tl.exp2(hardness * below + bias), 1)
            weight_n += tl.sum(tl.exp2(bias), 1)
            max_n = new_n
        else:
            t = tl.where(hidden, float("-inf"), raw * unit + bias_j)
            if OOD_ANCHORS:
                t = tl.where(positive, raw * unit, t)
            new_d = tl.maximum(max_d, tl.max(t, 1))
            share_d = tl.exp2(t - new_d[:, None])
        # Reducing the three together keeps them in the layout in which the product left its block.
        sums = tl.reduce((share_d, tl.where(positive, raw, 0.0), tl.where(positive, 1.0, 0.0)), 1, _add_three)
        exp_d = exp_d * tl.exp2(max_d - new_d) + sums[0]
        sum_p += sums[1] * unit
        count_p += sums[2]
        max_d = new_d
    out_ptr = partial_ptr + tl.program_id(1) * (P * (8 if HARD else 4)) + i
    tl.store(out_ptr, max_d)
    tl.store(out_ptr + P, exp_d)
    tl.store(out_ptr + 2 * P, sum_p)
    tl.store(out_ptr + 3 * P, count_p)
    if HARD:
        tl.store(out_ptr + 4 * P, max_n)
        tl.store(out_ptr + 5 * P, exp_n)
        tl.store(out_ptr + 6 * P, hard_n)
        tl.store(out_ptr + 7 * P, weight_n)


@jit(unspecialized=("groups", "splits"))
def _merge_kernel(
    partial_ptr, rows_ptr, loss_ptr, anchors_ptr, groups, splits, hardness,
    HARD: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: log2 D_i, 1/|P(i)| and the shift of the hard weights of every row from its partial sums; the loss.

    Rows that are not anchors get D = inf and 1/|P| = 0, which makes their G zero.
    """
    P = groups * GROUP
    lowest = tl.full([BLOCK], -1e30, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    loss, anchors = zero, zero
    for start in range(0, P, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < P
        max_d, exp_d, sum_p, count_p = lowest, zero, zero, zero
        max_n, exp_n, hard_n, weight_n = lowest, zero, zero, zero
        for split in range(splits):
            in_ptr = partial_ptr + split * (P * (8 if HARD else 4)) + i
            part_max = tl.load(in_ptr, mask=inside, other=-1e30)
            new_d = tl.maximum(max_d, part_max)
            part_exp = tl.load(in_ptr + P, mask=inside, other=0.0)
            exp_d = exp_d * tl.exp2(max_d - new_d) + part_exp * tl.exp2(part_max - new_d)
            sum_p += tl.load(in_ptr + 2 * P, mask=inside, other=0.0)
            count_p += tl.load(in_ptr + 3 * P, mask=inside, other=0.0)
            max_d = new_d
            if HARD:
                part_max = tl.load(in_ptr + 4 * P, mask=inside, other=-1e30)
                new_n = tl.maximum(max_n, part_max)
                rise, part_rise = max_n - new_n, part_max - new_n
                exp_n = exp_n * tl.exp2((1 + hardness) * rise)
                exp_n += tl.load(in_ptr + 5 * P, mask=inside, other=0.0) * tl.exp2((1 + hardness) * part_rise)
                hard_n = hard_n * tl.exp2(hardness * rise)
                hard_n += tl.load(in_ptr + 6 * P, mask=inside, other=0.0) * tl.exp2(hardness * part_rise)
                weight_n += tl.load(in_ptr + 7 * P, mask=inside, other=0.0)
                max_n = new_n
        lse = tl.where(exp_d == 0, -1e30, max_d + tl.log2(exp_d))
        if HARD:  # the factor makes a row's hard weights sum to the same as weights of 1
            factor = tl.log2(weight_n) - tl.log2(hard_n)
            shift = tl.where(weight_n > 0, factor - hardness * max_n, float("-inf"))
            tl.store(rows_ptr + SHIFT * P + i, shift, mask=inside)
            lse_n = tl.where(exp_n == 0, -1e30, max_n + tl.log2(exp_n) + factor)
            high = tl.maximum(lse, lse_n)
            lse = high + tl.log2(tl.exp2(lse - high) + tl.exp2(lse_n - high))
        is_anchor = count_p > 0
        share = tl.where(is_anchor, 1.0 / tl.maximum(count_p, 1.0), 0.0)
        tl.store(rows_ptr + LSE * P + i, tl.where(is_anchor, lse, float("inf")), mask=inside)
        tl.store(rows_ptr + SHARE * P + i, share, mask=inside)
        loss += tl.where(is_anchor, lse - sum_p * share, 0.0)
        anchors += tl.where(is_anchor, 1.0, 0.0)
    total = tl.maximum(tl.sum(anchors, 0), 1.0)
    tl.store(anchors_ptr, total)
    tl.store(loss_ptr, tl.sum(loss, 0) * LN2 / total)


@jit
def _denominator_share(
    t, positive, bias, key_anchor, key_column, lse, shift, hardness,
    COLUMNS: tl.constexpr, OOD_ANCHORS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """q_ij of the docstring of `supcon`, meaningless on the diagonal. t: s_ij log2(e), bias: log2 c of the columns."""
    negative = t
    if HARD:
        negative = (1 + hardness) * t + shift
    negative += bias
    if COLUMNS >= 2:
        negative = tl.where(_hidden(key_anchor, key_column, COLUMNS), float("-inf"), negative)
    if HARD or OOD_ANCHORS:
        negative = tl.where(positive, t, negative)
    return tl.exp2(negative - lse)


@jit(unspecialized=("R", "groups", "run"))
def _backward_kernel(
    halves_ptr, keys_ptr, rows_ptr, anchors_ptr, grad_ptr, dz_ptr, R, E, groups, run,
    to_log2, inverse_temperature, hardness,
    COLUMNS: tl.constexpr, OOD_ANCHORS: tl.constexpr, HARD: tl.constexpr, PAIRS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dz of a block of rows from a run of columns: the similarities again, then G + G^T, then its product with z.

    A program makes BLOCK_E columns of dz. Each block's product is added to the sum outside the tensor cores, with
    rounding: they truncate their own sums, which over thousands of columns would shrink dz.
    """
    P = groups * GROUP
    start_i = tl.program_id(0) * BLOCK_I
    i = start_i + tl.arange(0, BLOCK_I)
    w = tl.arange(0, WIDTH)
    part = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    match_i = tl.load(keys_ptr + MATCH * P + i)[:, None]
    lse_i = tl.load(rows_ptr + LSE * P + i)[:, None]
    share_i = tl.load(rows_ptr + SHARE * P + i)[:, None]
    bias_i = tl.load(rows_ptr + BIAS * P + i)[:, None]
    key_i, shift_i = match_i, lse_i
    if COLUMNS >= 2:
        key_i = tl.load(keys_ptr + KEY * P + i)[:, None]
    if HARD:
        shift_i = tl.load(rows_ptr + SHIFT * P + i)[:, None]
    unit_i = tl.load(rows_ptr + UNIT * P + start_i) * to_log2
    low_ptr = halves_ptr + P * WIDTH
    high_i = tl.load(halves_ptr + i[:, None] * WIDTH + w[None, :])
    low_i = high_i
    if PAIRS:
        low_i = tl.load(low_ptr + i[:, None] * WIDTH + w[None, :])
    dz = tl.zeros([BLOCK_I, BLOCK_E], tl.float32)
    begin = tl.program_id(1) * run * BLOCK_J
    for start in range(begin, tl.minimum(begin + run * BLOCK_J, P), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        match_j = tl.load(keys_ptr + MATCH * P + j)[None, :]
        lse_j = tl.load(rows_ptr + LSE * P + j)[None, :]
        share_j = tl.load(rows_ptr + SHARE * P + j)[None, :]
        bias_j = tl.load(rows_ptr + BIAS * P + j)[None, :]  # -inf excludes padding rows
        key_j, shift_j = match_j, lse_j
        if COLUMNS >= 2:
            key_j = tl.load(keys_ptr + KEY * P + j)[None, :]
        if HARD:
            shift_j = tl.load(rows_ptr + SHIFT * P + j)[None, :]
        unit_j = tl.load(rows_ptr + UNIT * P + start)
        high_j = tl.load(halves_ptr + j[:, None] * WIDTH + w[None, :])
        low_j = high_j
        if PAIRS:
            low_j = tl.load(low_ptr + j[:, None] * WIDTH + w[None, :])
        t = _similarities(high_i, low_i, high_j, low_j, PAIRS) * (unit_i * unit_j)
        other = i[:, None] != j[None, :]
        positive = match_i == match_j
        g = _denominator_share(t, positive, bias_j, key_i, key_j, lse_i, shift_i, hardness, COLUMNS, OOD_ANCHORS, HARD)
        g += _denominator_share(t, positive, bias_i, key_j, key_i, lse_j, shift_j, hardness, COLUMNS, OOD_ANCHORS, HARD)
        g = tl.where(other, g - tl.where(positive, share_i + share_j, 0.0), 0.0) * GAIN
        high_g = g.to(tl.float16)
        low_g = (g - high_g.to(tl.float32)).to(tl.float16)
        if WIDTH != BLOCK_E:
            high_j = tl.load(halves_ptr + j[:, None] * WIDTH + part[None, :])
            if PAIRS:
                low_j = tl.load(low_ptr + j[:, None] * WIDTH + part[None, :])
        product = tl.dot(low_g, high_j)
        if PAIRS:
            product = tl.dot(high_g, low_j, product)
        product = tl.dot(high_g, high_j, product)
        dz += product * unit_j
    scale = tl.load(grad_ptr) * inverse_temperature / (tl.load(anchors_ptr) * GAIN)
    out_ptr = dz_ptr + tl.program_id(1) * R * E + i[:, None] * E + part[None, :]
    tl.store(out_ptr, (dz * scale).to(dz_ptr.dtype.element_ty), mask=(i[:, None] < R) & (part[None, :] < E))
