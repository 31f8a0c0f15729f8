"""Computes frozen features, and metrics that need no trained classifier: kNN accuracy, alignment, uniformity.

Everything later (probe, scores, report) reads the features made here, once per image set. The encoder is passed as a
callable, so that evaluation depends on no architecture and treats a saved run, an exported encoder and a test double
alike.

Shapes: D images, B rows of a batch, F feature width, N training images, H W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from modules.errors import NonFinite

Embed = Callable[[Tensor], Tensor]
Progress = Callable[[int, int, str], None]

KNN_TEMPERATURE = 0.07  # a neighbor's vote has the weight exp(cosine / KNN_TEMPERATURE), as in Wu et al. 2018
KNN_NEIGHBORS = 20  # upper bound; a class with fewer training images lowers it further
ROW_BLOCK = 1024  # rows whose similarities to all others are held at once: 1024 x 60,000 floats are 246 MB


@torch.no_grad()
def embed_images(embed: Embed, images_DHWC: Tensor, batch_size: int = 256, progress: Progress | None = None) -> Tensor:
    """features_DF (float32, CPU) of uint8 images, in their order, computed by `embed(images_BHWC) -> features_BF`.

    `embed` may return features on any device and of any float dtype. The last batch is smaller, not padded.

    Raises NonFinite naming the first image whose features are not finite, ValueError for an empty set.
    """
    total = len(images_DHWC)
    if total == 0:
        raise ValueError("images_DHWC: holds no image, expected at least one")
    features = []
    for start in range(0, total, batch_size):
        features.append(embed(images_DHWC[start : start + batch_size]).detach().float().cpu())
        if progress is not None:
            progress(min(start + batch_size, total), total, "features")
    features_DF = torch.cat(features)
    bad_D = ~torch.isfinite(features_DF).all(dim=1)
    if bad_D.any():
        first = int(bad_D.nonzero()[0])
        raise NonFinite(
            f"features of {int(bad_D.sum())} of {total} images are not finite (first: image {first} of the set); "
            "the encoder diverged: lower learning.lr or start again from an earlier checkpoint"
        )
    return features_DF


def smallest_class(labels_N: Tensor) -> int:
    """The number of images of the rarest class that occurs in labels_N (int64, class ids)."""
    return int(labels_N.unique(return_counts=True)[1].min())


def knn_predict(train_NF: Tensor, train_labels_N: Tensor, features_DF: Tensor, num_classes: int) -> Tensor:
    """Predicted class ids_D (int64), by a weighted vote of the nearest training images.

    The k = max(1, min(20, n_min)) neighbors of largest cosine vote with weight exp(cosine / .07). n_min is the size of
    the rarest class: with a larger k, that class could be outvoted because it has fewer than k images.

    Source: Wu et al. 2018 (1805.01978), section 3.4.
    """
    train_NF, features_DF = normalize(train_NF, dim=1), normalize(features_DF, dim=1)
    k = max(1, min(KNN_NEIGHBORS, smallest_class(train_labels_N)))
    votes_NC = one_hot(train_labels_N, num_classes).to(features_DF.dtype)
    predictions = []
    for rows_BF in features_DF.split(ROW_BLOCK):
        cosine_Bk, index_Bk = (rows_BF @ train_NF.T).topk(k, dim=1)
        # scaled so that the largest weight is 1: exp(1 / .07) fits float32, but differences of such votes would be lost
        weight_Bk = ((cosine_Bk - cosine_Bk[:, :1]) / KNN_TEMPERATURE).exp()
        predictions.append((weight_Bk[:, :, None] * votes_NC[index_Bk]).sum(dim=1).argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    train_NF: Tensor, train_labels_N: Tensor, features_DF: Tensor, labels_D: Tensor, num_classes: int
) -> float:
    """The share of images, in [0, 1], whose class is predicted right by their neighbors (see knn_predict)."""
    predicted_D = knn_predict(train_NF, train_labels_N, features_DF, num_classes)
    return float((predicted_D == labels_D).double().mean())


def alignment(features_DF: Tensor, labels_D: Tensor) -> float:
    """Mean squared distance of unit features over all ordered pairs of different images of one class, in [0, 4].

    mean over y_i = y_j, i != j of ||z_i - z_j||^2, in float64. A class of n unit vectors with sum s contributes 2 n
    (n-1) - 2 (||s||^2 - n), so pairs need not be formed. nan if no class has two images or a feature vector is zero.

    Source: Wang and Isola 2020 (2005.10242), eq. 2 with alpha = 2; positives are images of one class.
    """
    unit_DF = normalize(features_DF.double(), dim=1)
    if not _have_directions(unit_DF):
        return float("nan")
    total, pairs = 0.0, 0
    for label in labels_D.unique():
        members_nF = unit_DF[labels_D == label]
        n = len(members_nF)
        total += 2 * n * (n - 1) - 2 * (float(members_nF.sum(dim=0).square().sum()) - n)
        pairs += n * (n - 1)
    return max(0.0, total / pairs) if pairs else float("nan")


def _have_directions(unit_DF: Tensor) -> bool:
    return bool((unit_DF != 0).any(1).all())


def uniformity(features_DF: Tensor) -> float:
    """The log of the mean Gaussian potential of unit features over all pairs of different images, in [-8, 0].

    log mean over i != j of exp(-2 ||z_i - z_j||^2), in float64; lower is more uniform. nan for a single image, or if a
    feature vector is zero and so has no direction.

    Source: Wang and Isola 2020 (2005.10242), eq. 3 with t = 2.
    """
    unit_DF = normalize(features_DF.double(), dim=1)
    n = len(unit_DF)
    if n < 2 or not _have_directions(unit_DF):
        return float("nan")
    # ||a - b||^2 = 2 - 2 a.b; the n pairs of an image with itself contribute exp(0) each and are subtracted again
    total = sum(float((4 * (rows_BF @ unit_DF.T) - 4).exp().sum()) for rows_BF in unit_DF.split(ROW_BLOCK))
    return float(torch.tensor((total - n) / (n * (n - 1)), dtype=torch.float64).clamp(min=1e-300).log())
