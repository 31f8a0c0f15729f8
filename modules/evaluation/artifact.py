"""The warning light of the artifact shortcut: do frozen features see that an image went through the decoder?

Generated rows carry the decoder's traces. If mostly negatives carry them, an encoder can learn "decoded = OOD" and real
near-OOD images pass. So the same val images are shown twice, as they are and after encode and decode, with nothing else
changed: what tells the two apart is the trace.

Shapes: D images, F feature width.
"""

from collections.abc import Sequence

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from modules.evaluation.stored import Detector
from modules.runtime import stream

PROBE_LIGHT, SCORE_LIGHT = 0.75, 0.6  # AUROC from which the light is on


def artifact_light(
    real_DF: Tensor, decoded_DF: Tensor, groups: Sequence[str], detector: Detector, seed: int
) -> dict[str, float | int]:
    """`artifact.probe_auroc`, `artifact.score_auroc` and `artifact.images`, each AUROC .5 where nothing is seen.

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
    }


def artifact_warning(found: dict) -> str:
    """What a person should know of `artifact_light`'s figures; empty where the light is off."""
    probe, score = found.get("artifact.probe_auroc", 0.5), found.get("artifact.score_auroc", 0.5)
    if score >= SCORE_LIGHT:
        return (
            f"artifact shortcut: the OOD score ranks real val images above the same images after encode and decode (AUROC "
            f"{score:.2f}, a probe on the features {probe:.2f}; .5 is blind): 'decoded' counts as OOD. Try "
            "generation.roundtrip_fraction 0.25 or encoder.separate_batchnorm, and compare on near-OOD"
        )
    if probe >= PROBE_LIGHT:
        return (
            f"the decoder's trace can be read from the features (probe AUROC {probe:.2f}, .5 is blind), though the OOD "
            f"score does not follow it ({score:.2f}); generation.roundtrip_fraction would hide it"
        )
    return ""


def _probe_auroc(fit_real_DF: Tensor, fit_decoded_DF: Tensor, real_DF: Tensor, decoded_DF: Tensor) -> float:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    labels = [1] * len(fit_real_DF) + [0] * len(fit_decoded_DF)
    probe.fit(torch.cat([fit_real_DF, fit_decoded_DF]).double().numpy(), labels)
    return _auroc(*(torch.from_numpy(probe.decision_function(x.double().numpy())) for x in (real_DF, decoded_DF)))


def _auroc(real_D: Tensor, decoded_D: Tensor) -> float:
    labels = [1] * len(real_D) + [0] * len(decoded_D)
    return float(roc_auc_score(labels, torch.cat([real_D, decoded_D]).numpy()))
