"""Describes the geometry of the embeddings: metrics logged beside the loss, and the alarm for a collapse.

A SupCon loss that does not move may be normal or a collapse, and losses of differently composed batches are not
comparable. These metrics tell the difference and are comparable. They are computed at log time only.

Legend: R = V*B rows, view-major, I the ID rows, E embedding width.
"""

import math

import torch

from kernels.supcon import masks

COSINE_ALARM, SPREAD_ALARM = 0.98, 0.1


def describe_embeddings(
    z_RE: torch.Tensor,
    labels_R: torch.Tensor,
    is_ood_R: torch.Tensor,
    *,
    num_views: int,
    temperature: float,
    ood_columns: str,
    ood_weight: float,
) -> dict[str, torch.Tensor]:
    """Metrics of unit embeddings, as fp32 scalars on their device, without a sync.

    - alignment: mean of |z_i - z_p|^2 over ID rows i and their positives p (0: each class is a point);
    - uniformity: log mean of e^{-2 |z_i - z_j|^2} over pairs of ID rows (about -4: spread over the sphere; 0: a point);
    - ood_share: mean over anchors of the near-OOD rows' share of SupCon's denominator, without hard weights;
    - id_cosine: mean z_i.z_j over pairs of ID rows;
    - id_spread: sqrt(E) times the standard deviation over ID rows, mean over dimensions (1: isotropic, 0: a point).

    Source: Wang & Isola 2020 (2005.10242) eq. 1 and 2, alignment over SupCon's positives.
    """
    with torch.no_grad(), torch.autocast(z_RE.device.type, enabled=False):
        z_RE = z_RE.float()
        id_R = (~is_ood_R).float()
        count = id_R.sum()
        pairs = (count * (count - 1)).clamp(min=1)
        similarity_RR = z_RE @ z_RE.T
        id_pair_RR = id_R[:, None] * id_R
        id_pair_RR.fill_diagonal_(0)
        positive_RR, negative_RR, ood_RR = masks(labels_R, is_ood_R, num_views, ood_columns)
        distance_RR = (2 - 2 * similarity_RR).clamp(min=0)

        log_weight_RR = torch.zeros_like(similarity_RR).masked_fill_(~(positive_RR | negative_RR), -math.inf)
        log_weight_RR.masked_fill_(ood_RR, math.log(ood_weight) if ood_weight > 0 else -math.inf)
        share_RR = (similarity_RR / temperature + log_weight_RR).softmax(1).masked_fill(~ood_RR, 0)
        anchor_R = positive_RR.any(1)

        mean_E = (id_R @ z_RE) / count.clamp(min=1)
        variance_E = (id_R @ (z_RE - mean_E).square()) / count.clamp(min=1)
        return {
            "alignment": (distance_RR * positive_RR).sum() / positive_RR.sum().clamp(min=1),
            "uniformity": ((torch.exp(-2 * distance_RR) * id_pair_RR).sum() / pairs).log(),
            "ood_share": share_RR.sum() / anchor_R.sum().clamp(min=1),
            "id_cosine": (similarity_RR * id_pair_RR).sum() / pairs,
            "id_spread": variance_E.sqrt().mean() * z_RE.shape[1] ** 0.5,
        }


class CollapseAlarm:
    """Warns when the embeddings of ID rows have coincided for several logs in a row after warm-up."""

    def __init__(self, warmup_steps: int, patience: int = 3) -> None:
        """patience: how many logs in a row must look collapsed, >= 1."""
        self.warmup_steps, self.patience = warmup_steps, patience
        self.collapsed_logs = 0

    def update(self, step: int, id_cosine: float, id_spread: float) -> str:
        """Take the metrics of one log; a warning from `patience` collapsed logs on until they recover, else ""."""
        if step < self.warmup_steps:
            return ""
        collapsed = id_cosine > COSINE_ALARM or id_spread < SPREAD_ALARM
        self.collapsed_logs = self.collapsed_logs + 1 if collapsed else 0
        if self.collapsed_logs < self.patience:
            return ""
        return (
            f"collapse: at {self.collapsed_logs} logs in a row the embeddings of all images nearly coincide (mean "
            f"cosine {id_cosine:.3f}, alarm above {COSINE_ALARM}; spread {id_spread:.3f}, alarm below {SPREAD_ALARM}); "
            "lower learning.lr, lengthen learning.warmup_steps or raise learning.temperature"
        )

    def state_dict(self) -> dict:
        """How many logs in a row looked collapsed."""
        return {"collapsed_logs": self.collapsed_logs}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting from a `state_dict`."""
        self.collapsed_logs = state["collapsed_logs"]
