"""Out-of-distribution scores: one table, one direction, float64 wherever few images make the numerics delicate.

Every score is a confidence, **higher = more in-distribution**, and has two functions: `fit` turns the training features
into a state (a dict of tensors, so that it can be exported), and `score` applies it. Distances are computed on the unit
sphere, where contrastive features are comparable. Mahalanobis distances use float64 and a Ledoit-Wolf covariance: with
few images per class the empirical covariance is singular, and in float32 such distances perform at chance.

Shapes: D images, N training images, C classes, F feature width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.nn.functional import normalize

from modules.errors import ConfigError, DataError
from modules.evaluation.features import ROW_BLOCK, smallest_class
from modules.evaluation.probe import Probe

State = dict[str, Tensor]

# Added to the variance of each dimension. Unit features have about 1 / F each (5e-4 at F = 2,048), so this only keeps
# the distance defined if an encoder collapsed.
VARIANCE_FLOOR = 1e-10
ACCEPTED_SHARE = 0.95  # every threshold accepts this share of the ID val images


@dataclass(frozen=True)
class Fitting:
    """What the scores are fitted to: the train split and, for the score `binary`, a trained head."""

    features_NF: Tensor  # float32, raw (not unit length)
    labels_N: Tensor  # int64, every class 0..C-1 occurs
    head: Probe | None = None  # classes (0 OOD, 1 ID)


@dataclass(frozen=True)
class Score:
    """One row of the table of scores."""

    fit: Callable[[Fitting], State]
    score: Callable[[State, Tensor, Tensor], Tensor]  # (state, features_DF, logits_DC) -> float64 [D]


def fit_scores(fitting: Fitting) -> dict[str, State]:
    """The fitted state of every score of SCORES; `binary` only if a head is given.

    Raises DataError if a class between 0 and the largest label has no training image.
    """
    counts_C = torch.bincount(fitting.labels_N)
    if (counts_C == 0).any():
        raise DataError(
            f"class id {int((counts_C == 0).nonzero()[0])} has no training image: OOD scores need every class"
        )
    return {name: row.fit(fitting) for name, row in SCORES.items() if name != "binary" or fitting.head is not None}


def apply_scores(states: dict[str, State], features_DF: Tensor, logits_DC: Tensor) -> dict[str, Tensor]:
    """name -> float64 [D]: every fitted score, of images with raw features_DF (float32) and logits_DC."""
    return {name: SCORES[name].score(state, features_DF, logits_DC) for name, state in states.items()}


def head_source(generated: int, near_ood_val_groups: Iterable[str]) -> str:
    """Where the OOD rows of the binary head come from: generated, near_ood_val, or none if too few to hold any out.

    Args:
        generated: the number of generated near-OOD images.
        near_ood_val_groups: the group of each near-OOD val image; half of the groups train the head, the others choose
        it.
    """
    groups = len(set(near_ood_val_groups))
    if generated > (0 if groups else 1):
        return "generated"
    return "near_ood_val" if groups > 1 else "none"


def check_score_name(name: str, with_head: bool) -> None:
    """Raise ConfigError if the headline score is `binary` and there is no binary head."""
    if name == "binary" and not with_head:
        raise ConfigError(
            "evaluation.score=binary needs OOD rows to train the head on, and there are neither generated near-OOD "
            "images nor two groups of near-OOD val images or more; add such groups (data.near_ood_classes holds classes "
            "out), or choose another score, for instance knn"
        )


def acceptance_threshold(id_scores_D: Tensor) -> float:
    """The largest threshold t such that at least 95 % of the ID images have score >= t."""
    ordered_D = id_scores_D.double().sort().values
    rejected = int(len(ordered_D) * (1 - ACCEPTED_SHARE) + 1e-9)
    return float(ordered_D[rejected])


def neighbor_count(labels_N: Tensor) -> int:
    """k = max(1, min(50, n_min // 10)), with n_min the image count of the rarest class; k = 50 needs 500 per class."""
    return max(1, min(50, smallest_class(labels_N) // 10))


def class_means(unit_NF: Tensor, labels_N: Tensor) -> Tensor:
    """The mean of the rows of each class, [C, F], in the dtype of unit_NF (not of unit length)."""
    counts_C = torch.bincount(labels_N)
    sums_CF = torch.zeros(len(counts_C), unit_NF.shape[1], dtype=unit_NF.dtype).index_add_(0, labels_N, unit_NF)
    return sums_CF / counts_C[:, None]


def _nothing(fitting: Fitting) -> State:
    return {}


def _msp(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """max_c softmax(logits)_c in (0, 1]; float64, as in float32 many tie at 1. Source: Hendrycks and Gimpel 2017."""
    return logits_DC.double().softmax(dim=1).amax(dim=1)


def _max_logit(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """max_c logits_c. Source: Hendrycks et al. 2022 (1911.11132)."""
    return logits_DC.double().amax(dim=1)


def _energy(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """log sum_c exp(logits_c), the negative free energy at T = 1. Source: Liu et al. 2020 (2010.03759), eq. 4."""
    return logits_DC.double().logsumexp(dim=1)


def _fit_knn(fitting: Fitting) -> State:
    k = neighbor_count(fitting.labels_N)
    return {"unit_NF": normalize(fitting.features_NF.float(), dim=1), "k": torch.tensor(k)}


def _knn(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """The cosine to the k-th nearest training image, in [-1, 1]; it orders images as minus their distance does.

    Source: Sun et al. 2022 (2204.06507), eq. 4, with k = max(1, min(50, n_min // 10)).
    """
    unit_DF, k = normalize(features_DF.float(), dim=1), int(state["k"])
    kth = [(rows_BF @ state["unit_NF"].T).topk(k, dim=1).values[:, -1] for rows_BF in unit_DF.split(ROW_BLOCK)]
    return torch.cat(kth).double()


def _fit_mahalanobis(fitting: Fitting) -> State:
    unit_NF = normalize(fitting.features_NF.double(), dim=1)
    mean_CF = class_means(unit_NF, fitting.labels_N)
    return {"mean_CF": mean_CF, "whiten_FF": _whitening(unit_NF - mean_CF[fitting.labels_N])}


def _mahalanobis(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """-min_c (z - mu_c)^T S^-1 (z - mu_c), for unit z and S the shared within-class Ledoit-Wolf covariance, in float64.

    Source: Lee et al. 2018 (1807.03888), eq. 2; Ledoit and Wolf 2004.
    """
    return -_class_distances(state, features_DF).amin(dim=1)


def _fit_relative(fitting: Fitting) -> State:
    unit_NF = normalize(fitting.features_NF.double(), dim=1)
    center_F = unit_NF.mean(dim=0)
    background = {"background_mean_F": center_F, "background_whiten_FF": _whitening(unit_NF - center_F)}
    return _fit_mahalanobis(fitting) | background


def _relative_mahalanobis(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """-min_c [d_c(z) - d_0(z)], d_c as in `_mahalanobis`, d_0 the distance to a single Gaussian of all training images.

    Source: Ren et al. 2021 (2106.09022), eq. 3.
    """
    unit_DF = normalize(features_DF.double(), dim=1)
    background_D = ((unit_DF - state["background_mean_F"]) @ state["background_whiten_FF"].T).square().sum(dim=1)
    return background_D - _class_distances(state, features_DF).amin(dim=1)


def _fit_cosine(fitting: Fitting) -> State:
    unit_NF = normalize(fitting.features_NF.double(), dim=1)
    return {"unit_mean_CF": normalize(class_means(unit_NF, fitting.labels_N), dim=1)}


def _cosine(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """max_c cosine(z, mu_c), in [-1, 1], with mu_c the mean of the unit features of class c.

    Source: Techapanurak et al. 2019 (1905.10628).
    """
    return (normalize(features_DF.double(), dim=1) @ state["unit_mean_CF"].T).amax(dim=1)


def _fit_binary(fitting: Fitting) -> State:
    return {"weight_F2": fitting.head.weight_FC.double(), "bias_2": fitting.head.bias_C.double()}


def _binary(state: State, features_DF: Tensor, logits_DC: Tensor) -> Tensor:
    """The log-odds of ID against OOD according to the binary head."""
    logits_D2 = features_DF.double() @ state["weight_F2"] + state["bias_2"]
    return logits_D2[:, 1] - logits_D2[:, 0]


def _whitening(centered_NF: Tensor) -> Tensor:
    """L^-1 [F, F] with L L^T the Ledoit-Wolf covariance: ||L^-1 x||^2 = x^T S^-1 x."""
    covariance, _ = ledoit_wolf(centered_NF.numpy(), assume_centered=True)
    covariance_FF = torch.from_numpy(covariance)
    identity_FF = torch.eye(len(covariance_FF), dtype=torch.float64)
    lower_FF = torch.linalg.cholesky(covariance_FF + VARIANCE_FLOOR * identity_FF)
    return torch.linalg.solve_triangular(lower_FF, identity_FF, upper=False).contiguous()


def _class_distances(state: State, features_DF: Tensor) -> Tensor:
    """Squared Mahalanobis distances [D, C] of unit features, float64.

    Features and class means are whitened first, so that D x C differences of width F are never held in memory.
    """
    whiten_FF = state["whiten_FF"]
    unit_DF = normalize(features_DF.double(), dim=1)
    # Euclidean distance in the whitened space, relative to the mean of the class means to reduce cancellation
    center_F = state["mean_CF"].mean(dim=0)
    white_DF, white_CF = (unit_DF - center_F) @ whiten_FF.T, (state["mean_CF"] - center_F) @ whiten_FF.T
    return torch.cdist(white_DF, white_CF, compute_mode="donot_use_mm_for_euclid_dist").square()


SCORES: dict[str, Score] = {
    "msp": Score(_nothing, _msp),
    "max_logit": Score(_nothing, _max_logit),
    "energy": Score(_nothing, _energy),
    "knn": Score(_fit_knn, _knn),
    "mahalanobis": Score(_fit_mahalanobis, _mahalanobis),
    "relative_mahalanobis": Score(_fit_relative, _relative_mahalanobis),
    "cosine": Score(_fit_cosine, _cosine),
    "binary": Score(_fit_binary, _binary),
}
