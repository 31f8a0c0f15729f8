"""The warning light for the artifact shortcut: can frozen features tell that an image went through the decoder?

Generated rows carry the decoder's traces. If most rows with traces are negatives, an encoder can learn "decoded = OOD",
and real near-OOD images are then accepted. To detect this, each val image is embedded twice, as it is and after encode
and decode, with nothing else changed: only the trace can tell the two apart.

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

PROBE_LIGHT, SCORE_LIGHT = 0.75, 0.6  # the light is on from these AUROCs, if they are above what chance can reach
LEAST_GROUPS = 11  # with fewer, blind features reach PROBE_LIGHT by chance, so there is no verdict


def artifact_light(
    real_DF: Tensor, decoded_DF: Tensor, groups: Sequence[str], detector: Detector, seed: int
) -> dict[str, float | int]:
    """`artifact.probe_auroc`, `.score_auroc`, `.images` and `.groups`; an AUROC of .5 means that no trace is seen.

    probe_auroc: mean over both directions of a logistic regression on standardized features, fitted on one half of the
    groups and scored on the other; an image and its decoded twin are always in the same half. score_auroc: how well the
    detector's headline score ranks real images above their decoded twins. Empty with fewer than two groups.

    Raises ValueError if real_DF, decoded_DF and groups do not match row by row.
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
    scores = [detector.decide(features_DF).scores[detector.headline] for features_DF in (real_DF, decoded_DF)]
    return {
        "artifact.probe_auroc": sum(aurocs) / 2,
        "artifact.score_auroc": _auroc(*scores),
        "artifact.images": len(real_DF),
        "artifact.groups": len(names),
    }


def chance_auroc(groups: int) -> float:
    """The upper end of the 95 % interval of a blind feature's AUROC, with `groups` independent images on either side.

    .5 + 1.96 sd with var = (2 n + 1) / (12 n^2), that of the Mann-Whitney statistic. As twins resemble each other, the
    true interval is narrower.
    """
    return 0.5 + 1.96 * math.sqrt((2 * groups + 1) / (12 * groups**2))


def artifact_warning(found: dict) -> str:
    """The warning that `artifact_light`'s results call for; "" if the light is off or there is no verdict."""
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
    """Why there is no verdict, if the val images are too few for one; else ""."""
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
