"""Arms of a comparison: each is a named set of a few settings that override those of one config.

The comparison is fair: in every arm a batch has the same P x K real rows under the same views, and all arms take the
same number of optimizer steps. Arms with generated rows add these, up to B rows; arms without fill up to the same B
with further real rows, so that neither batch size nor learning rate (which scales with the batch) explains a
difference. `<arm>_small_batch` has B_real = P x K rows, `<arm>_long` takes more steps, as many as fit into equal wall
time. Arms are defined here, in a committed file, before any test split is read.
"""

import difflib

from modules.config import Config
from modules.errors import ConfigError
from modules.rules import generated_rows

ONLY_REAL = {"generation.synthetic_fraction": 0.0, "generation.roundtrip_fraction": 0.0}
CROSS_ENTROPY = {"learning.method": "cross_entropy", "learning.ood_variant": "none", "learning.hardness": 0.0}
CONTRASTIVE = {"learning.method": "supcon", "learning.outlier_exposure": 0.0}
SUPCON = CONTRASTIVE | {"controller.enabled": False}
CLASSIC = {  # arms without generated rows
    "ce": CROSS_ENTROPY,
    "ce_strong": CROSS_ENTROPY | {"learning.augment": "strong"},
    "simclr": CONTRASTIVE
    | {"learning.method": "simclr", "learning.ood_columns": "global", "learning.ood_variant": "none"},
    "supcon": CONTRASTIVE,
}
GENERATING = {  # arms with generated rows; other settings are those of the config
    "positives": SUPCON | {"generation.near_ood_fraction": 0.0},
    "positives_ood": SUPCON,
    "positives_half": SUPCON  # a control: the batches of positives_ood, but the loss ignores the negatives
    | {"learning.ood_columns": "none", "learning.ood_variant": "none"},
    "class_agnostic": SUPCON  # a control: every prompt uses the initializer word, as in Real Guidance (2210.07574)
    | {"inversion.class_agnostic": True, "inversion.initializer": "object", "generation.near_ood_fraction": 0.0},
    "ce_exposure": CROSS_ENTROPY | {"learning.outlier_exposure": 0.5, "controller.enabled": False},
    "jigsaw_roundtrip": SUPCON | {"near_ood.recipes": {"jigsaw_roundtrip": 1.0}},  # in place of generated negatives
    "adaptive": SUPCON | {"controller.enabled": True},
    "gated": SUPCON | {"gate.enabled": True},
    "roundtrip_rows": SUPCON | {"generation.roundtrip_fraction": 0.25},  # against the artifact shortcut
    "separate_batchnorm": SUPCON | {"encoder.separate_batchnorm": True},  # against it as well
}
SMALL_BATCH, LONG = "_small_batch", "_long"
ARMS = (*CLASSIC, *GENERATING, *(arm + ending for ending in (SMALL_BATCH, LONG) for arm in CLASSIC))
DEFAULT_ARMS = ("ce", "ce_strong", "supcon", "positives", "positives_ood", "jigsaw_roundtrip")


def arm_settings(arm: str, config: Config, long_steps: int = 0) -> dict[str, object]:
    """{"section.key": value} that turns the experiment described by `config` into its arm `arm`.

    Args:
        long_steps: optimizer steps of the `_long` arms.

    Raises:
        ConfigError: an unknown arm (with a suggestion), an arm with generated rows if the config has none, a `_long`
            arm if `long_steps` is not above the config's steps.
    """
    if arm not in ARMS:
        close = difflib.get_close_matches(arm, ARMS, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"--arms names {arm!r}, which is no arm{hint}; arms are {', '.join(ARMS)}")
    if arm in GENERATING:
        _check_generation(arm, config)
        return dict(GENERATING[arm])
    base = arm.removesuffix(SMALL_BATCH).removesuffix(LONG)
    further = 0 if arm.endswith(SMALL_BATCH) else round(generated_rows(config))
    settings = CLASSIC[base] | ONLY_REAL
    settings["learning.extra_real_rows"] = config.learning.extra_real_rows + further
    if arm.endswith(LONG):
        if long_steps <= config.learning.steps:
            raise ConfigError(
                f"--arms names {arm}, which needs --long-steps above learning.steps {config.learning.steps}; a finished "
                "comparison prints how many steps equal the wall time of its arms with generated rows"
            )
        settings["learning.steps"] = long_steps
    return settings


def _check_generation(arm: str, config: Config) -> None:
    generation = config.generation
    if generation.synthetic_fraction == 0:
        raise ConfigError(
            f"arm {arm} mixes generated rows into its batches, but generation.synthetic_fraction is 0 in this config; "
            "set the share all arms with generated rows shall have"
        )
    if GENERATING[arm].get("generation.near_ood_fraction") != 0 and generation.near_ood_fraction == 0:
        raise ConfigError(
            f"arm {arm} has near-OOD rows, but generation.near_ood_fraction is 0 in this config; set their share"
        )
