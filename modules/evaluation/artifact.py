"""The warning light of the artifact shortcut: do frozen features see that an image went through the decoder?

Generated rows carry the decoder's traces. If mostly negatives carry them, an encoder can learn "decoded = OOD" and real
near-OOD images pass. So the same val images are shown twice, as they are and after encode and decode, with nothing else
changed: what tells the two apart is the trace.

Shapes: D images, F feature width.
"""

import math
from collections.abc import Sequence

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from modules.evaluation.stored import Detector
from modules.runtime import stream

PROBE_LIGHT, SCORE_LIGHT = 0.75, 0.6  # AUROC from which the light is on, where chance does not reach it
LEAST_GROUPS = 11  # of fewer, blind features reach PROBE_LIGHT by chance: nothing can be told


def artifact_light(
    real_DF: Tensor, decoded_DF: Tensor, groups: Sequence[str], detector: Detector, seed: int
) -> dict[str, float | int]:
    """`artifact.probe_auroc`, `.score_auroc`, `.images` and `.groups`, each AUROC .5 where nothing is seen.

    probe_auroc: logistic regression on standardized features, fitted on one half of the groups and read on the other,
    both ways, mean of the two; an image and its decoded twin are always in the same half. score_auroc: how well the
    detector's headline score ranks real images above their decoded twins. Empty with fewer than two groups.

    Raises ValueError where the rows do not match.
    """
    if real_DF.shape != decoded_DF.shape or len(real_DF) != len(groups):
        raise ValueError(
            f"real_DF {tuple(real_DF.shape)}, decoded_DF {tuple(decoded_DF.shape)}, groups {len(groups)}: expected a row "
            "each of every image"
        )
    names = sorted(set(groups))
    if len(names) < 2:
        return {}
    order = torch.randperm(len(names), generator=stream(seed, "artifact halves")).tolist()
    first = {names[position] for position in order[: len(names) // 2]}
    in_first_D = torch.tensor([group in first for group in groups])
    aurocs = [
        _probe_auroc(real_DF[fit_D], decoded_DF[fit_D], real_DF[~fit_D], decoded_DF[~fit_D])
        for fit_D in (in_first_D, ~in_first_D)
    ]
    scores = [detector.judge(features_DF).scores[detector.headline] for features_DF in (real_DF, decoded_DF)]
    return {
        "artifact.probe_auroc": sum(aurocs) / 2,
        "artifact.score_auroc": _auroc(*scores),
        "artifact.images": len(real_DF),
        "artifact.groups": len(names),
    }


def chance_auroc(groups: int) -> float:
    """The AUROC up to which 95 % intervals of blind features reach, with `groups` independent images on either side.

    .5 + 1.96 sd, var = (2 n + 1) / (12 n^2), that of the Mann-Whitney statistic. Twins resemble each other, which makes
    the true interval narrower.
    """
    return 0.5 + 1.96 * math.sqrt((2 * groups + 1) / (12 * groups**2))


def artifact_warning(found: dict) -> str:
    """What a person should know of `artifact_light`'s figures; empty where the light is off or nothing can be told."""
    if "artifact.probe_auroc" not in found:
        return ""
    probe, score, groups = (found[f"artifact.{name}"] for name in ("probe_auroc", "score_auroc", "groups"))
    if _is_on(score, SCORE_LIGHT, groups):
        return (
            f"artifact shortcut: the OOD score ranks real val images above the same images after encode and decode (AUROC "
            f"{score:.2f}, a probe on the features {probe:.2f}; .5 is blind): 'decoded' counts as OOD. Try "
            "generation.roundtrip_fraction 0.25 or encoder.separate_batchnorm, and compare on near-OOD"
        )
    if _is_on(probe, PROBE_LIGHT, groups):
        follows = f"though the OOD score does not follow it ({score:.2f})"
        if score >= SCORE_LIGHT:
            follows = f"and whether the OOD score follows it ({score:.2f}) cannot be told from {groups} groups"
        return (
            f"the decoder's trace can be read from the features (probe AUROC {probe:.2f}, .5 is blind), {follows}; "
            "generation.roundtrip_fraction would hide it"
        )
    return ""


def artifact_doubt(found: dict) -> str:
    """Why the light says nothing, where its val images are too few for it to be on or off; else empty."""
    if "artifact.probe_auroc" not in found or artifact_warning(found):
        return ""
    probe, score, groups = (found[f"artifact.{name}"] for name in ("probe_auroc", "score_auroc", "groups"))
    if groups >= LEAST_GROUPS and probe < PROBE_LIGHT and score < SCORE_LIGHT:
        return ""
    return (
        f"whether the decoder's trace is seen cannot be told from val images of {groups} groups: with so few, chance alone "
        f"takes an AUROC to {min(1.0, chance_auroc(groups)):.2f} (probe {probe:.2f}, OOD score {score:.2f})"
    )


def _is_on(auroc: float, light: float, groups: int) -> bool:
    return groups >= LEAST_GROUPS and auroc >= light and auroc > chance_auroc(groups)


def _probe_auroc(fit_real_DF: Tensor, fit_decoded_DF: Tensor, real_DF: Tensor, decoded_DF: Tensor) -> float:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    labels = [1] * len(fit_real_DF) + [0] * len(fit_decoded_DF)
    probe.fit(torch.cat([fit_real_DF, fit_decoded_DF]).double().numpy(), labels)
    return _auroc(*(torch.from_numpy(probe.decision_function(x.double().numpy())) for x in (real_DF, decoded_DF)))


def _auroc(real_D: Tensor, decoded_D: Tensor) -> float:
    labels = [1] * len(real_D) + [0] * len(decoded_D)
    return float(roc_auc_score(labels, torch.cat([real_D, decoded_D]).numpy()))
