"""SupCon with near-OOD rows, SimCLR and cross-entropy behind one call: `objective(outputs, labels, is_ood)`.

The contrastive formula itself is in kernels/supcon.py. This module adds what surrounds it: which labels are used, the
term that pushes near-OOD rows away from the class means, and the logged metrics. Everything stays on the device; a loss
that is not finite is detected by the guard in modules/optim.py, not here.

Legend: B images, V = 2 views, R = V*B rows view-major, E embedding width, C classes; I the ID rows, O the near-OOD
rows.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.supcon import supcon
from modules.config import Learning
from modules.data.views import VIEWS
from modules.learning.geometry import describe_embeddings

Logs = dict[str, torch.Tensor]


def build_objective(learning: Learning) -> "Contrastive | CrossEntropy":
    """The objective that `learning.method` names."""
    if learning.method == "cross_entropy":
        return CrossEntropy(learning.outlier_exposure)
    return Contrastive(learning)


@dataclass(frozen=True)
class Contrastive:
    """SupCon or SimCLR on embeddings, with near-OOD rows in the denominator.

        supcon              kernels.supcon; positives are the other view and the rows of the same class
        simclr              the same with each image as its own class: the only positive is the other view
        ood_instance        near-OOD rows are anchors too, with their other view as the only positive
        prototype_push      adds mean_{o in O} log sum_c e^{z_o.mu_c/tau}, with mu_c the mean of class c's rows in I,
                            scaled to unit length and not differentiated; with q_c = softmax_c(z_o.mu_c/tau) its
                            gradient is dL/dz_o = (1/(|O| tau)) sum_c q_c mu_c on O and 0 on I

    Source: Khosla et al. 2020 (2004.11362) eq. 2; Chen et al. 2020 (2002.05709) eq. 1.
    """

    learning: Learning

    output = "embeddings"  # what the encoder is asked for

    def __call__(
        self, z_RE: torch.Tensor, labels_B: torch.Tensor, is_ood_B: torch.Tensor, *, log: bool = True
    ) -> tuple[torch.Tensor, Logs]:
        """(loss, logs) of unit embeddings, all scalars on the device.

        Logs: loss and, if it is on, prototype_push; with `log` also reference_level (chance: the loss if all embeddings
        coincided) and the metrics of `describe_embeddings`.
        """
        if self.learning.method == "simclr":
            labels_B = torch.arange(len(labels_B), device=labels_B.device)
        labels_R, is_ood_R = labels_B.repeat(VIEWS), is_ood_B.repeat(VIEWS)
        loss = self._contrast(z_RE, labels_R, is_ood_R)
        logs = {}
        if log:
            with torch.no_grad():
                same_R1 = torch.ones_like(z_RE[:, :1])
                logs["reference_level"] = self._contrast(same_R1, labels_R, is_ood_R)
                if self.learning.ood_variant == "prototype_push":  # 1 / temperature + log C, or 0
                    logs["reference_level"] += prototype_push(same_R1, labels_R, is_ood_R, self.learning.temperature)
            logs |= describe_embeddings(
                z_RE,
                labels_R,
                is_ood_R,
                num_views=VIEWS,
                temperature=self.learning.temperature,
                ood_columns=self.learning.ood_columns,
                ood_weight=self.learning.ood_weight,
            )
        if self.learning.ood_variant == "prototype_push":
            push = prototype_push(z_RE, labels_R, is_ood_R, self.learning.temperature)
            logs["prototype_push"] = push.detach()
            loss = loss + push
        return loss, {"loss": loss.detach(), **logs}

    def _contrast(self, z_RE, labels_R, is_ood_R) -> torch.Tensor:
        return supcon(
            z_RE,
            labels_R,
            is_ood_R,
            num_views=VIEWS,
            temperature=self.learning.temperature,
            ood_columns=self.learning.ood_columns,
            ood_weight=self.learning.ood_weight,
            hardness=self.learning.hardness,
            ood_anchors=self.learning.ood_variant == "ood_instance",
            check_values=False,
        )


def prototype_push(
    z_RE: torch.Tensor, labels_R: torch.Tensor, is_ood_R: torch.Tensor, temperature: float
) -> torch.Tensor:
    """mean_{o in O} log sum_c e^{z_o.mu_c/temperature} over the classes among the ID rows; 0 without near-OOD rows.

    The sum over classes is computed as a sum over ID rows weighted by 1/|class|, which needs no list of classes and so
    no sync. Formula and gradient: `Contrastive`.
    """
    with torch.autocast(z_RE.device.type, enabled=False):
        z_RE = z_RE.float()
        id_R = ~is_ood_R
        mate_RR = ((labels_R[:, None] == labels_R) & id_R[:, None] & id_R).float()
        size_R = mate_RR.sum(1)
        mean_RE = F.normalize(mate_RR @ z_RE.detach(), dim=1)
        log_weight_R = torch.where(id_R, -size_R.clamp(min=1).log(), -torch.inf)
        push_R = (z_RE @ mean_RE.T / temperature + log_weight_R).logsumexp(1)
        return torch.where(is_ood_R, push_R, 0.0).sum() / is_ood_R.sum().clamp(min=1)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy over both views of ID rows, plus outlier exposure: a uniform target for near-OOD rows.

        L = 1/|I| sum_{i in I} -log p_i,y_i  +  outlier_exposure 1/|O| sum_{o in O} -1/C sum_c log p_o,c

    Gradient with respect to logits: (p_i - onehot(y_i)) / |I| on I, outlier_exposure (p_o - 1/C) / |O| on O.
    Source: Hendrycks et al. 2019 (1812.04606) section 3.
    """

    outlier_exposure: float

    output = "logits"

    def __call__(
        self, logits_RC: torch.Tensor, labels_B: torch.Tensor, is_ood_B: torch.Tensor, *, log: bool = True
    ) -> tuple[torch.Tensor, Logs]:
        """(loss, logs) of fp32 logits, all scalars on the device; without `log`, only the loss is logged.

        Logs: loss, reference_level (chance: log C, plus outlier_exposure log C if there are near-OOD rows),
        batch_accuracy of ID rows, id_confidence and ood_confidence (mean max-softmax of ID and near-OOD rows).
        """
        labels_R, is_ood_R = labels_B.repeat(VIEWS), is_ood_B.repeat(VIEWS)
        id_R, ood_R = (~is_ood_R).float(), is_ood_R.float()
        log_p_RC = logits_RC.float().log_softmax(1)
        own_R = -log_p_RC.gather(1, labels_R[:, None]).squeeze(1)
        loss = _mean(own_R, id_R) + self.outlier_exposure * _mean(-log_p_RC.mean(1), ood_R)
        logs = {"loss": loss.detach()}
        if log:
            with torch.no_grad():
                chance = math.log(logits_RC.shape[1])
                confidence_R, guess_R = log_p_RC.exp().max(1)
                logs["reference_level"] = chance * (1 + self.outlier_exposure * ood_R.amax())
                logs["batch_accuracy"] = _mean((guess_R == labels_R).float(), id_R)
                logs["id_confidence"] = _mean(confidence_R, id_R)
                logs["ood_confidence"] = _mean(confidence_R, ood_R)
        return loss, logs


def _mean(values_R: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
    """Weighted mean, 0 if all weights are 0. Values of weight 0 must be finite too."""
    return (values_R * weight_R).sum() / weight_R.sum().clamp(min=1)
