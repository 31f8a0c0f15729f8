"""The linear probe: softmax regression on frozen features, at several learning rates in one pass.

A representation is judged by how well a linear classifier reads the classes from it. The one setting that matters, the
learning rate, is chosen on val. All candidates are trained side by side on the same batches, which costs one matrix
product per step and removes the temptation to tune by hand. The gradient of softmax regression has a closed form, so no
autograd graph is built. The result is a pure function of features, settings and seed.

Shapes: D images, B rows of a batch, F feature width, C classes, L learning rates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from modules import config
from modules.errors import DataError, NonFinite
from modules.runtime import stream

MOMENTUM = 0.9


@dataclass(frozen=True)
class Probe:
    """An affine map from raw features to logits, and how it was chosen."""

    weight_FC: Tensor  # float32; the standardization of the features is folded in
    bias_C: Tensor  # float32
    lr: float  # the learning rate chosen on val
    val_accuracy: dict[float, float]  # learning rate -> weighted val accuracy in [0, 1]

    def logits(self, features_DF: Tensor) -> Tensor:
        """logits_DC = features_DF weight_FC + bias_C, float32."""
        return features_DF.float() @ self.weight_FC + self.bias_C


def train_probe(
    train_DF: Tensor,
    labels_D: Tensor,
    val_DF: Tensor,
    val_labels_D: Tensor,
    *,
    num_classes: int,
    settings: config.Probe,
    seed: int,
    name: str = "probe",
    weights_D: Tensor | None = None,
    val_weights_D: Tensor | None = None,
) -> Probe:
    """The probe of the learning rate with the highest val accuracy (ties: lower val loss, then the smaller rate).

    For all rates l at once: W_l, b_l minimize mean_i w_i [-log softmax((x_i - mean)/sd W_l + b_l)[y_i]] by SGD with
    momentum .9, cosine decay to 0 and `settings.weight_decay` on W, starting from W = 0. The batches of an epoch split
    a permutation drawn from stream(seed, name, epoch), shared by all rates. mean and sd are those of the train
    features; a constant feature is centered but not scaled.

    features float32 [D, F], labels int64 in [0, C), weights >= 0 [D] (default 1; scaled to mean 1).

    Raises DataError if val is empty, NonFinite if training diverged at every learning rate.
    """
    if len(val_DF) == 0:
        raise DataError(
            "the val split holds no image: the probe's settings are chosen on it; give val images or raise data.val_fraction"
        )
    train_DF, val_DF = train_DF.float(), val_DF.float()
    mean_F, sd_F = train_DF.mean(dim=0), train_DF.std(dim=0, correction=0)
    sd_F = torch.where(sd_F > 1e-6, sd_F, torch.ones_like(sd_F))
    weight_LFC, bias_LC = _descend(
        (train_DF - mean_F) / sd_F, labels_D, _mean_one(weights_D, labels_D), num_classes, settings, seed, name
    )
    # x / sd W + (b - mean / sd W): the probe takes features as the encoder outputs them
    weight_LFC = weight_LFC / sd_F[:, None]
    bias_LC = bias_LC - torch.einsum("f,lfc->lc", mean_F, weight_LFC)

    val_weights_D = _mean_one(val_weights_D, val_labels_D)
    accuracies, ranking = {}, []
    for index, lr in enumerate(settings.lrs):
        logits_DC = val_DF @ weight_LFC[index] + bias_LC[index]
        loss = float((val_weights_D * cross_entropy(logits_DC, val_labels_D, reduction="none")).mean())
        accuracies[lr] = float((val_weights_D * (logits_DC.argmax(dim=1) == val_labels_D)).mean())
        if math.isfinite(loss):
            ranking.append((-accuracies[lr], loss, lr, index))
    if not ranking:
        raise NonFinite(
            f"the linear probe diverged at every learning rate of probe.lrs {list(settings.lrs)}: lower them"
        )
    _, _, lr, index = min(ranking)
    return Probe(weight_LFC[index].contiguous(), bias_LC[index].contiguous(), lr, accuracies)


def train_binary_head(
    id_DF: Tensor, ood_DF: Tensor, val_id_DF: Tensor, val_ood_DF: Tensor, *, settings: config.Probe, seed: int
) -> Probe:
    """A probe with classes (0 OOD, 1 ID); both sides have equal weight in training and in the choice on val.

    The OOD rows come from generated negatives or from near-OOD classes reserved for choosing settings, never from test.
    """
    train_labels_D, train_weights_D = _two_sides(ood_DF, id_DF)
    val_labels_D, val_weights_D = _two_sides(val_ood_DF, val_id_DF)
    return train_probe(
        torch.cat([ood_DF, id_DF]),
        train_labels_D,
        torch.cat([val_ood_DF, val_id_DF]),
        val_labels_D,
        num_classes=2,
        settings=settings,
        seed=seed,
        name="binary head",
        weights_D=train_weights_D,
        val_weights_D=val_weights_D,
    )


def _descend(
    inputs_DF: Tensor,
    labels_D: Tensor,
    weights_D: Tensor,
    num_classes: int,
    settings: config.Probe,
    seed: int,
    name: str,
) -> tuple[Tensor, Tensor]:
    """weight_LFC and bias_LC after the last epoch, on standardized inputs."""
    D, F = inputs_DF.shape
    device = inputs_DF.device
    lr_L11 = torch.tensor(settings.lrs, dtype=torch.float32, device=device)[:, None, None]
    weight_LFC = torch.zeros(len(settings.lrs), F, num_classes, device=device)
    bias_L1C = torch.zeros(len(settings.lrs), 1, num_classes, device=device)
    weight_velocity, bias_velocity = torch.zeros_like(weight_LFC), torch.zeros_like(bias_L1C)
    targets_DC = one_hot(labels_D, num_classes).float()
    batches = math.ceil(D / settings.batch_size)
    for epoch in range(settings.epochs):
        order_D = torch.randperm(D, generator=stream(seed, name, epoch)).to(device)
        for batch, rows_B in enumerate(order_D.split(settings.batch_size)):
            x_BF = inputs_DF[rows_B]
            probability_LBC = (x_BF @ weight_LFC + bias_L1C).softmax(dim=2)
            # d loss / d logits = w (softmax - target) / B
            slope_LBC = (probability_LBC - targets_DC[rows_B]) * (weights_D[rows_B] / len(rows_B))[:, None]
            weight_velocity.mul_(MOMENTUM).add_(x_BF.T @ slope_LBC).add_(weight_LFC, alpha=settings.weight_decay)
            bias_velocity.mul_(MOMENTUM).add_(slope_LBC.sum(dim=1, keepdim=True))
            progress = (epoch * batches + batch) / (settings.epochs * batches)
            step_L11 = lr_L11 * (0.5 * (1 + math.cos(math.pi * progress)))
            weight_LFC.sub_(step_L11 * weight_velocity)
            bias_L1C.sub_(step_L11 * bias_velocity)
    return weight_LFC, bias_L1C[:, 0]


def _two_sides(ood_DF: Tensor, id_DF: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (0 for the OOD rows, then 1 for the ID rows) and weights that sum to the same for both sides."""
    sizes = (len(ood_DF), len(id_DF))
    if min(sizes) == 0:
        raise DataError(f"the binary ID/OOD head needs rows of both kinds, got {sizes[1]} ID and {sizes[0]} OOD rows")
    labels_D = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor(sizes)).to(id_DF.device)
    weights_D = torch.tensor([1 / sizes[0], 1 / sizes[1]], device=id_DF.device)[labels_D]
    return labels_D, weights_D


def _mean_one(weights_D: Tensor | None, labels_D: Tensor) -> Tensor:
    if weights_D is None:
        return torch.ones(len(labels_D), device=labels_D.device)
    return weights_D.float() / weights_D.float().mean()
