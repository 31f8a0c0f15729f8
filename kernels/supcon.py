"""Supervised contrastive loss with near-OOD rows, which belong to no class.

The definition builds the R x R similarity matrix; the kernel (below it) streams over column blocks and keeps O(R)
numbers, so that large batches and banks of negatives fit. Legend: R = V*B rows, view-major, E embedding width.
"""

import math

import torch

from kernels import backend
from kernels.backend import jit, launch, tl
from kernels.checks import check_choice, check_number, check_tensor

OOD_COLUMNS = ("none", "global", "own_class", "foreign_class")
MAX_WIDTH = 256  # E up to which a block of rows fits in a program
LABELS = 2**30  # the kernel packs label and kind into 32 bits


def supcon(
    z_RE: torch.Tensor,
    labels_R: torch.Tensor,
    is_ood_R: torch.Tensor,
    *,
    num_views: int = 2,
    temperature: float = 0.1,
    ood_columns: str = "global",
    ood_weight: float = 1.0,
    hardness: float = 0.0,
    ood_anchors: bool = False,
    check_values: bool | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Mean contrastive loss (scalar, fp32; fp64 for fp64 input) of unit embeddings, differentiable in `z_RE`.

    I are the ID rows, O the near-OOD rows, s_ij = z_i.z_j / temperature, P(i) = {p in I\\{i}: y_p = y_i}, N(i) all
    other columns of i, O_i the columns of O it sees, I+ the anchors with P(i) not empty:

        L    = 1/|I+| sum_{i in I+} [ log D_i - 1/|P(i)| sum_{p in P(i)} s_ip ]
        D_i  = sum_{j in P(i)} e^{s_ij} + sum_{j in N(i)} c_j w_ij e^{s_ij}
        c_j  = 1 for j in I, ood_weight for j in O_i, 0 for the rest
        w_ij = e^{hardness s_ij} sum_{n in N(i)} c_n / sum_{n in N(i)} c_n e^{hardness s_in},  not differentiated

    O_i is empty (`none`), all of O (`global`), its rows of i's source class (`own_class`) or of the other classes
    (`foreign_class`). Rows of O are never anchors; with `ood_anchors` they are, their other views the one positive.
    Anchors without a positive leave the mean; if none has one, the loss is 0. With hardness 0 every w is 1.

    Gradient, with q_ij = c_j w_ij e^{s_ij} / D_i (c = w = 1 on positives) and G_ij = [q_ij - 1{j in P(i)}/|P(i)|]/|I+|
    on the rows of I+, zero elsewhere:

        dL/dz = (G + G^T) z / temperature

    z_RE: fp16, bf16, fp32 or fp64, unit rows; similarities and sums are fp32 (fp64 for fp64). labels_R: int64 source
    class in [0, 2^30), of OOD rows too. is_ood_R: bool. R is view-major, a multiple of num_views. `check_values` also checks
    labels and finiteness, None on CPU tensors only: on a GPU it waits for the device.

    Raises ValueError for a wrong shape, dtype, device, label or setting, for non-finite embeddings, and for one view
    of rows of which no two share a class. Source: Khosla et al. 2020 (2004.11362) eq. 2; Robinson et al. 2021
    (2010.04592) eq. 4; near-OOD columns as in OPSupCon (2310.01942).
    """
    _check(z_RE, labels_R, is_ood_R, num_views, temperature, ood_columns, ood_weight, hardness)
    if check_values or (check_values is None and z_RE.device.type == "cpu"):
        _check_values(z_RE, labels_R, is_ood_R, num_views)
    seen = ood_columns if ood_weight > 0 else "none"
    settings = (num_views, float(temperature), seen, float(ood_weight), float(hardness), ood_anchors)
    with torch.autocast(z_RE.device.type, enabled=False):  # autocast would round the similarities to half precision
        unable = backend.too_wide("z_RE", z_RE, MAX_WIDTH)
        if backend.choose("supcon", implementation, z_RE.device, unable=unable).name == "triton":
            return supcon_triton(z_RE, labels_R, is_ood_R, *settings)
        return supcon_reference(z_RE, labels_R, is_ood_R, *settings)


def supcon_reference(z_RE, labels_R, is_ood_R, num_views, temperature, ood_columns, ood_weight, hardness, ood_anchors):
    """The loss of `supcon` by its formula, with the whole similarity matrix."""
    z_RE = z_RE if z_RE.dtype == torch.float64 else z_RE.float()
    positive_RR, negative_RR, ood_negative_RR = masks(labels_R, is_ood_R, num_views, ood_columns, ood_anchors)
    count_R = positive_RR.sum(1)
    anchor_R = count_R > 0
    logits_RR = z_RE @ z_RE.T / temperature
    weighted_RR = logits_RR
    if ood_weight not in (0, 1):  # at weight 0 the caller passes ood_columns "none"
        weighted_RR = logits_RR + math.log(ood_weight) * ood_negative_RR.to(logits_RR.dtype)
    if hardness > 0:
        weighted_RR = weighted_RR + _log_hard_weights(logits_RR, weighted_RR, negative_RR, hardness)
    # Rows that are no anchors may have no column at all: all of theirs are let in, which keeps logsumexp finite.
    excluded_RR = ~(positive_RR | negative_RR) & anchor_R[:, None]
    log_denominator_R = weighted_RR.masked_fill(excluded_RR, -math.inf).logsumexp(1)
    mean_positive_R = (logits_RR * positive_RR).sum(1) / count_R.clamp(min=1)
    return ((log_denominator_R - mean_positive_R) * anchor_R).sum() / anchor_R.sum().clamp(min=1)


def _log_hard_weights(logits_RR, weighted_RR, negative_RR, hardness: float) -> torch.Tensor:
    """log w_ij of negatives, 0 of other columns; not differentiated. weighted_RR: s_ij + log c_j."""
    logits_RR, weighted_RR = logits_RR.detach(), weighted_RR.detach()
    log_c_RR = (weighted_RR - logits_RR).masked_fill(~negative_RR, -math.inf)
    hard_RR = hardness * logits_RR
    log_weight_RR = hard_RR - (hard_RR + log_c_RR).logsumexp(1, keepdim=True) + log_c_RR.logsumexp(1, keepdim=True)
    return torch.where(negative_RR, log_weight_RR, 0.0)


def masks(labels_R, is_ood_R, num_views: int, ood_columns: str, ood_anchors: bool = False):
    """Which columns j of each anchor i are positives, negatives, and negatives from O: three bool R x R tensors.

    Rows that are no anchors are False throughout. The sum over a row of the first two counts its denominator's terms.
    """
    # One number a row that is equal for positives: the class of ID rows, something no other row has for OOD rows.
    row_R = torch.arange(len(labels_R), device=labels_R.device)
    identity_R = row_R % (len(labels_R) // num_views) if ood_anchors else row_R
    key_R = torch.where(is_ood_R, -1 - identity_R, labels_R)
    positive_RR = (key_R[:, None] == key_R).fill_diagonal_(False)
    negative_RR = (~positive_RR).fill_diagonal_(False)
    if not ood_anchors:
        negative_RR &= ~is_ood_R[:, None]
    if ood_columns == "none":
        negative_RR &= ~is_ood_R
    elif ood_columns != "global":
        same_class_RR = labels_R[:, None] == labels_R
        negative_RR &= ~is_ood_R | (same_class_RR if ood_columns == "own_class" else ~same_class_RR)
    return positive_RR, negative_RR, negative_RR & is_ood_R


def reference_level(
    labels_R, is_ood_R, *, num_views: int = 2, ood_columns: str = "global", ood_weight: float = 1.0
) -> torch.Tensor:
    """The loss when all embeddings coincide: mean over I+ of log(|I| - 1 + ood_weight |O_i|), fp32, for any hardness."""
    positive_RR, negative_RR, ood_negative_RR = masks(labels_R, is_ood_R, num_views, ood_columns)
    anchor_R = positive_RR.any(1)
    ood_R = ood_negative_RR.sum(1)
    terms_R = positive_RR.sum(1) + negative_RR.sum(1) - ood_R + ood_weight * ood_R
    return (terms_R.clamp(min=1).log() * anchor_R).sum() / anchor_R.sum().clamp(min=1)


def _check(z_RE, labels_R, is_ood_R, num_views, temperature, ood_columns, ood_weight, hardness):
    check_tensor("z_RE", z_RE, shape=(None, None), dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.float64))
    R = z_RE.shape[0]
    check_tensor("labels_R", labels_R, shape=(R,), dtypes=(torch.int64,), device=z_RE.device)
    check_tensor("is_ood_R", is_ood_R, shape=(R,), dtypes=(torch.bool,), device=z_RE.device)
    if num_views < 1 or R == 0 or R % num_views:
        raise ValueError(f"z_RE has {R} rows; expected a positive multiple of num_views = {num_views}")
    check_number("temperature", temperature, 0, open_low=True)
    check_choice("ood_columns", ood_columns, OOD_COLUMNS)
    check_number("ood_weight", ood_weight, 0)
    check_number("hardness", hardness, 0)


def _check_values(z_RE, labels_R, is_ood_R, num_views):
    shape = list(z_RE.shape)
    finite_R = torch.isfinite(z_RE.detach()).all(1)
    if not finite_R.all():
        row = int(finite_R.logical_not().nonzero()[0])
        raise ValueError(
            f"z_RE {shape} is not finite in {int((~finite_R).sum())} rows, first {row}; expected unit rows"
        )
    outside_R = (labels_R < 0) | (labels_R >= LABELS)
    if outside_R.any():
        row = int(outside_R.nonzero()[0])
        raise ValueError(
            f"labels_R [{shape[0]}] is {int(labels_R[row])} in row {row}; expected source classes >= 0 and below 2**30"
        )
    id_labels = labels_R[~is_ood_R]
    if num_views == 1 and len(id_labels) and len(id_labels.unique()) == len(id_labels):
        raise ValueError(
            f"labels_R [{shape[0]}] has no two ID rows of one class and num_views is 1, so no anchor has a positive; "
            "expected two rows of some class, or two views"
        )


def supcon_triton(z_RE, labels_R, is_ood_R, num_views, temperature, ood_columns, ood_weight, hardness, ood_anchors):
    """The loss of `supcon` by the kernels: fp32 sums, O(R) memory, differentiable once."""
    key_R = (labels_R * 2 + is_ood_R).to(torch.int32)
    images = z_RE.shape[0] // num_views
    return _SupCon.apply(z_RE.contiguous(), key_R, images, temperature, ood_columns, ood_weight, hardness, ood_anchors)


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_RE, key_R, images, temperature, ood_columns, ood_weight, hardness, ood_anchors):
        R, E = z_RE.shape
        loss_R, lse_R, shift_R, count_R = torch.empty(4, R, dtype=torch.float32, device=z_RE.device).unbind()
        ctx.settings = dict(
            R=R,
            E=E,
            images=images,
            inverse_temperature=1 / temperature,
            ood_weight=ood_weight,
            hardness=hardness,
            COLUMNS=OOD_COLUMNS.index(ood_columns),
            OOD_ANCHORS=ood_anchors,
        )
        blocks = _blocks(E)[0]
        grid = (-(-R // blocks["BLOCK_I"]),)
        rows = (z_RE, key_R, loss_R, lse_R, shift_R, count_R)
        launch(_forward_kernel, grid, *rows, HARD=hardness > 0, **ctx.settings, **blocks)
        anchors = (count_R > 0).sum().clamp(min=1)
        ctx.save_for_backward(z_RE, key_R, lse_R, shift_R, count_R, anchors)
        return loss_R.sum() / anchors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z_RE, key_R, lse_R, shift_R, count_R, anchors = ctx.saved_tensors
        dz_RE = torch.empty(z_RE.shape, dtype=torch.float32, device=z_RE.device)
        scale = (grad * ctx.settings["inverse_temperature"] / anchors).float()  # stays on the device
        blocks = _blocks(z_RE.shape[1])[1]
        grid = (-(-z_RE.shape[0] // blocks["BLOCK_I"]), blocks["PARTS"])
        rows = (z_RE, key_R, lse_R, shift_R, count_R, scale, dz_RE)
        launch(_backward_kernel, grid, *rows, **ctx.settings, **blocks)
        return dz_RE.to(z_RE.dtype), None, None, None, None, None, None, None


def _blocks(E: int) -> tuple[dict, dict]:
    """Launch settings of forward and backward: the largest blocks found that fit into sm_90 without spilled registers.

    Beyond 128 columns the backward pass makes dz in parts: whole rows spilled whatever the block was.
    """
    whole = max(16, backend.next_power_of_2(E))
    part = min(whole, 16 if backend.interpreted() else 128)
    forward, backward = {"BLOCK_E": whole}, {"BLOCK_E": part, "PARTS": whole // part}
    if backend.interpreted():
        block = {"BLOCK_I": 16, "BLOCK_J": 16}
        return forward | block, backward | block
    forward |= {"BLOCK_I": 64, "BLOCK_J": 32, "num_warps": 8, "num_stages": 2}
    backward |= {"BLOCK_I": 32 if whole == part else 16, "BLOCK_J": 64, "num_warps": 8, "num_stages": 1}
    return forward, backward


@jit
def _rows(z_ptr, i, e, R, E):
    """Columns e of rows i of z in fp32; 0 where there is none."""
    inside = (i[:, None] < R) & (e[None, :] < E)
    return tl.load(z_ptr + i[:, None] * E + e[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
def _columns(key_i, key_j, i, j, R, images, COLUMNS: tl.constexpr, OOD_ANCHORS: tl.constexpr):
    """Positives, ID negatives and OOD negatives of anchors i among columns j, as in `masks`."""
    is_id_i, is_id_j = (key_i & 1) == 0, (key_j & 1) == 0
    other = (i != j) & (i < R) & (j < R)
    positive = other & is_id_i & (key_i == key_j)
    candidate = other
    if OOD_ANCHORS:
        positive = positive | (other & (i % images == j % images) & (is_id_i == 0) & (is_id_j == 0))
    else:
        candidate = other & is_id_i
    candidate = candidate & (positive == 0)
    ood_negative = candidate & (is_id_j == 0)
    if COLUMNS == 0:
        ood_negative = ood_negative & (i == j)  # none: never
    if COLUMNS == 2:
        ood_negative = ood_negative & ((key_i >> 1) == (key_j >> 1))
    if COLUMNS == 3:
        ood_negative = ood_negative & ((key_i >> 1) != (key_j >> 1))
    return positive, candidate & is_id_j, ood_negative


@jit(unspecialized=("R", "images"))  # both change with the batch
def _forward_kernel(
    z_ptr, key_ptr, loss_ptr, lse_ptr, shift_ptr, count_ptr,
    R, E, images, inverse_temperature, ood_weight, hardness,
    COLUMNS: tl.constexpr, OOD_ANCHORS: tl.constexpr, HARD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One block of anchors against all columns, a block at a time, with sums relative to running maxima.

    Positives and negatives keep a maximum each: hard weights e^{hardness s} of negatives far below a positive would
    vanish beside it.
    """
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    e = tl.arange(0, BLOCK_E)
    key_i = tl.load(key_ptr + i, mask=i < R, other=0)
    z_i = _rows(z_ptr, i, e, R, E)
    lowest = tl.full([BLOCK_I], -1e30, tl.float32)
    zero = tl.zeros([BLOCK_I], tl.float32)
    max_p, sum_p, count_p, exp_p = lowest, zero, zero, zero
    max_n, weight_n, hard_n, exp_n = lowest, zero, zero, zero
    for start in range(0, R, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key_j = tl.load(key_ptr + j, mask=j < R, other=0)
        s = tl.dot(z_i, tl.trans(_rows(z_ptr, j, e, R, E)), input_precision="tf32x3") * inverse_temperature
        positive, id_negative, ood_negative = _columns(
            key_i[:, None], key_j[None, :], i[:, None], j[None, :], R, images, COLUMNS, OOD_ANCHORS
        )
        new_p = tl.maximum(max_p, tl.max(tl.where(positive, s, -1e30), 1))
        exp_p = exp_p * tl.exp(max_p - new_p) + tl.sum(tl.where(positive, tl.exp(s - new_p[:, None]), 0.0), 1)
        sum_p += tl.sum(tl.where(positive, s, 0.0), 1)
        count_p += tl.sum(tl.where(positive, 1.0, 0.0), 1)
        max_p = new_p
        c = tl.where(id_negative, 1.0, tl.where(ood_negative, ood_weight, 0.0))
        new_n = tl.maximum(max_n, tl.max(tl.where(c > 0, s, -1e30), 1))
        below = tl.where(c > 0, s - new_n[:, None], 0.0)
        rise = max_n - new_n
        exp_n = exp_n * tl.exp((1 + hardness) * rise) + tl.sum(c * tl.exp((1 + hardness) * below), 1)
        if HARD:
            hard_n = hard_n * tl.exp(hardness * rise) + tl.sum(c * tl.exp(hardness * below), 1)
            weight_n += tl.sum(c, 1)
        max_n = new_n
    shift = zero
    if HARD:  # log of the factor that makes a row's hard weights sum to what plain ones would
        shift = tl.where(weight_n > 0, tl.log(weight_n) - tl.log(hard_n), 0.0)
    lse_p = tl.where(exp_p > 0, max_p + tl.log(exp_p), -1e30)
    lse_n = tl.where(exp_n > 0, max_n + tl.log(exp_n) + shift, -1e30)
    high = tl.maximum(lse_p, lse_n)
    lse = high + tl.log(tl.exp(lse_p - high) + tl.exp(lse_n - high))
    loss = tl.where(count_p > 0, lse - sum_p / tl.maximum(count_p, 1.0), 0.0)
    tl.store(loss_ptr + i, loss, mask=i < R)
    tl.store(lse_ptr + i, lse, mask=i < R)
    tl.store(shift_ptr + i, shift - hardness * max_n, mask=i < R)
    tl.store(count_ptr + i, count_p, mask=i < R)


@jit
def _share(s, positive, id_negative, ood_negative, lse, shift, count, ood_weight, hardness):
    """G of the docstring without its 1/|I+|: share of the denominator less share of the positives."""
    q_p = tl.exp(s - lse) - 1.0 / tl.maximum(count, 1.0)
    q_n = tl.exp((1 + hardness) * s + shift - lse)
    g = tl.where(positive, q_p, tl.where(id_negative, q_n, tl.where(ood_negative, ood_weight * q_n, 0.0)))
    return tl.where(count > 0, g, 0.0)


@jit(unspecialized=("R", "images"))
def _backward_kernel(
    z_ptr, key_ptr, lse_ptr, shift_ptr, count_ptr, scale_ptr, dz_ptr,
    R, E, images, inverse_temperature, ood_weight, hardness,
    COLUMNS: tl.constexpr, OOD_ANCHORS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dz of a block of rows: similarities once more, G as anchors plus G^T as columns, one product with z.

    A program makes BLOCK_E of the E columns of dz; with several PARTS of E it sums the similarities part by part and
    reads its rows again for each, which registers could not hold.
    """
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    key_i = tl.load(key_ptr + i, mask=i < R, other=0)
    lse_i = tl.load(lse_ptr + i, mask=i < R, other=0.0)
    shift_i = tl.load(shift_ptr + i, mask=i < R, other=0.0)
    count_i = tl.load(count_ptr + i, mask=i < R, other=0.0)
    if PARTS == 1:
        z_i = _rows(z_ptr, i, e, R, E)
    dz = tl.zeros([BLOCK_I, BLOCK_E], tl.float32)
    for start in range(0, R, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key_j = tl.load(key_ptr + j, mask=j < R, other=0)
        lse_j = tl.load(lse_ptr + j, mask=j < R, other=0.0)
        shift_j = tl.load(shift_ptr + j, mask=j < R, other=0.0)
        count_j = tl.load(count_ptr + j, mask=j < R, other=0.0)
        if PARTS == 1:
            z_j = _rows(z_ptr, j, e, R, E)
            s = tl.dot(z_i, tl.trans(z_j), input_precision="tf32x3")
        else:
            s = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
            for part in range(PARTS):
                d = part * BLOCK_E + tl.arange(0, BLOCK_E)
                s += tl.dot(_rows(z_ptr, i, d, R, E), tl.trans(_rows(z_ptr, j, d, R, E)), input_precision="tf32x3")
            z_j = _rows(z_ptr, j, e, R, E)
        s *= inverse_temperature
        positive, id_negative, ood_negative = _columns(
            key_i[:, None], key_j[None, :], i[:, None], j[None, :], R, images, COLUMNS, OOD_ANCHORS
        )
        g = _share(
            s, positive, id_negative, ood_negative, lse_i[:, None], shift_i[:, None], count_i[:, None],
            ood_weight, hardness,
        )  # fmt: skip
        positive, id_negative, ood_negative = _columns(
            key_j[None, :], key_i[:, None], j[None, :], i[:, None], R, images, COLUMNS, OOD_ANCHORS
        )
        g += _share(
            s, positive, id_negative, ood_negative, lse_j[None, :], shift_j[None, :], count_j[None, :],
            ood_weight, hardness,
        )  # fmt: skip
        dz += tl.dot(g, z_j, input_precision="tf32x3")
    inside = (i[:, None] < R) & (e[None, :] < E)
    tl.store(dz_ptr + i[:, None] * E + e[None, :], dz * tl.load(scale_ptr), mask=inside)
