"""Supervised contrastive loss with near-OOD rows, which belong to no class.

The definition builds the R x R similarity matrix. The kernels (supcon_kernels.py) stream over blocks of columns and
keep only O(R E) numbers, so that large batches and banks of negatives fit. Legend: R = V*B rows, view-major, E
embedding width.
"""

import math

import torch

from kernels import backend
from kernels.checks import check_choice, check_number, check_tensor
from kernels.supcon_kernels import OOD_COLUMNS, supcon_triton

MAX_WIDTH = 256  # largest E at which a block of rows fits in a program
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

    I are the ID rows, O the near-OOD rows, s_ij = z_i.z_j / temperature, P(i) = {p in I\\{i}: y_p = y_i} the positives
    of anchor i, N(i) all its other columns, O_i the near-OOD columns it sees, I+ the anchors whose P(i) is not empty:

        L    = 1/|I+| sum_{i in I+} [ log D_i - 1/|P(i)| sum_{p in P(i)} s_ip ]
        D_i  = sum_{j in P(i)} e^{s_ij} + sum_{j in N(i)} c_j w_ij e^{s_ij}
        c_j  = 1 for j in I, ood_weight for j in O_i, 0 otherwise
        w_ij = e^{hardness s_ij} sum_{n in N(i)} c_n / sum_{n in N(i)} c_n e^{hardness s_in},  not differentiated

    `ood_columns` selects O_i: empty (`none`), all of O (`global`), or the rows of O whose source class is that of i
    (`own_class`) or another (`foreign_class`). Rows of O are anchors only with `ood_anchors`; their only positives are
    their other views. Anchors without a positive are left out of the mean; if no anchor has one, the loss is 0. With
    hardness 0 every w is 1.

    Gradient, with q_ij = c_j w_ij e^{s_ij} / D_i (c = w = 1 for positives) and G_ij = [q_ij - 1{j in P(i)}/|P(i)|]/|I+|
    for i in I+, 0 for other rows:

        dL/dz = (G + G^T) z / temperature

    z_RE: fp16, bf16, fp32 or fp64, unit rows; similarities and sums are fp32 (fp64 for fp64). labels_R: int64 source
    class in [0, 2^30), for OOD rows too. is_ood_R: bool. R is view-major, a multiple of num_views. check_values: also
    check labels and finiteness, which on a GPU waits for the device; None does so for CPU tensors only.

    Raises ValueError for a wrong shape, dtype, device or setting; with checked values also for a wrong label,
    non-finite embeddings, and a single view in which no two ID rows share a class. Source: Khosla et al. 2020
    (2004.11362) eq. 2; Robinson et al. 2021 (2010.04592) eq. 4; near-OOD columns as in OPSupCon (2310.01942).
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


def supcon_reference(
    z_RE: torch.Tensor,
    labels_R: torch.Tensor,
    is_ood_R: torch.Tensor,
    num_views: int,
    temperature: float,
    ood_columns: str,
    ood_weight: float,
    hardness: float,
    ood_anchors: bool,
) -> torch.Tensor:
    """`supcon` in plain torch: its formula on the whole similarity matrix."""
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
    # Rows that are not anchors may have no column at all; none of theirs is excluded, which keeps logsumexp finite.
    excluded_RR = ~(positive_RR | negative_RR) & anchor_R[:, None]
    log_denominator_R = weighted_RR.masked_fill(excluded_RR, -math.inf).logsumexp(1)
    mean_positive_R = (logits_RR * positive_RR).sum(1) / count_R.clamp(min=1)
    return ((log_denominator_R - mean_positive_R) * anchor_R).sum() / anchor_R.sum().clamp(min=1)


def _log_hard_weights(logits_RR, weighted_RR, negative_RR, hardness: float) -> torch.Tensor:
    """log w_ij for negatives, 0 for other columns; not differentiated. weighted_RR: s_ij + log c_j."""
    logits_RR, weighted_RR = logits_RR.detach(), weighted_RR.detach()
    log_c_RR = (weighted_RR - logits_RR).masked_fill(~negative_RR, -math.inf)
    hard_RR = hardness * logits_RR
    log_weight_RR = hard_RR - (hard_RR + log_c_RR).logsumexp(1, keepdim=True) + log_c_RR.logsumexp(1, keepdim=True)
    return torch.where(negative_RR, log_weight_RR, 0.0)


def masks(
    labels_R: torch.Tensor, is_ood_R: torch.Tensor, num_views: int, ood_columns: str, ood_anchors: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three bool R x R tensors: which columns j of each anchor i are positives, negatives, and negatives from O.

    Rows that are not anchors are all False. A row's True entries in the first two are the terms of its denominator.
    """
    # A key per row, equal for positives of each other: an ID row's class, an OOD row's own number (or its image's).
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
    labels_R: torch.Tensor,
    is_ood_R: torch.Tensor,
    *,
    num_views: int = 2,
    ood_columns: str = "global",
    ood_weight: float = 1.0,
) -> torch.Tensor:
    """The loss if all embeddings coincide, at any hardness: mean over I+ of log(|I| - 1 + ood_weight |O_i|), fp32."""
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
