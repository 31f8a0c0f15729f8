"""Bad input to the method at the command line: its exit code, one message that names it, nothing made or overwritten."""

import pytest

import trainer
from modules.diffusion.pipeline import StableDiffusion
from modules.training.stages import VAE_CHECK_IMAGES
from tests.base.tinyset import contents, write_config
from tests.base.tinyset import rows as tiny_rows
from tests.data.trees import csv_set, declared_rows, disc, mvip_tree, put

WORK = ("results.json", "predictions.safetensors", "report.html", "metrics.jsonl", "checkpoints", "export", "tokens")
CAR = {"Axle": "CarComponent", "Belt": "CarComponent", "Cap": "CarComponent", "Drum": "CarComponent"}
MASKED = "near_ood.recipes={mask_split: 1}"


def masked(root, groups: int = 5, **masks):
    """A declared set in which every ID image has a mask; `masks` replaces those of bolt's first images by split."""
    rows = [row | {"mask": f"{row['path']}.mask.png"} for row in declared_rows(groups=groups) if row["role"] == "id"]
    path = csv_set(root, rows)
    for split, mask in masks.items():
        put(root / f"bolt/bolt-{split}-0-0.png.mask.png", mask)
    return path


def without_meta(root):
    mvip_tree(root, CAR)
    (root / "Belt/meta.json").unlink()
    return root


def one_group(root):
    """A class whose train images all show one model: none can be taken for val."""
    rows = [row for row in declared_rows(groups=5) if row["role"] == "id" and row["split"] != "val"]
    return csv_set(root, [row | {"group": "one"} if row["path"].startswith("nut/nut-train") else row for row in rows])


def prose(root):
    """A set in which one class is described at length."""
    rows = [
        row | {"keywords": ("rusty " * 80 if row["label"] == "nut" else "rusty")} for row in declared_rows(groups=5)
    ]
    return csv_set(root, rows)


CASES = {
    "mask of another size": (
        lambda root: masked(root, train=disc(16, 16, 4)),
        ["data.crop_to_mask=true"],
        3,
        ("bolt/bolt-train-0-0.png.mask.png", "16 x 16 pixels, the image 32 x 32", "data.on_bad_image=skip"),
    ),
    "empty mask, cropped to": (
        lambda root: masked(root, test=disc(radius=0)),
        ["data.crop_to_mask=true"],
        3,
        ("bolt/bolt-test-0-0.png: its mask", "is empty"),
    ),
    "empty mask, edited in": (
        lambda root: masked(root, train=disc(radius=0)),
        [MASKED],
        3,
        ("bolt/bolt-train-0-0.png: its mask", "is empty"),
    ),
    "MVIP class without meta.json": (without_meta, ["data.super_class=CarComponent"], 3, ("Belt", "no meta.json")),
    "unknown super class": (
        lambda root: mvip_tree(root, CAR, cameras=1),
        ["data.super_class=CarComponents"],
        2,
        ("`data.super_class` is 'CarComponents'", "this tree has CarComponent"),
    ),
    "a recipe that needs masks": (None, [MASKED], 2, ("masked recipes need object masks", "tiny.zip has none")),
    "a masked edit": (None, ["generation.mask_edit=background"], 2, ("need object masks", "tiny.zip has none")),
    "a crop": (None, ["data.crop_to_mask=true"], 2, ("`data.crop_to_mask` needs object masks", "has none")),
    "cross-entropy with near-OOD rows": (
        None,
        ["learning.method=cross_entropy"],
        2,
        ("cross_entropy with near-OOD rows needs learning.outlier_exposure > 0",),
    ),
    "cross-entropy with SupCon's settings": (
        None,
        ["learning.method=cross_entropy", "learning.outlier_exposure=0.5", "learning.hardness=0.5"],
        2,
        ("hardness 0.5, which learning.method cross_entropy does not read",),
    ),
    "outlier exposure under SupCon": (
        None,
        ["learning.outlier_exposure=0.5"],
        2,
        ("outlier_exposure is 0.5, which learning.method supcon does not read", "learning.ood_weight"),
    ),
    "unknown recipe": (
        None,
        ["near_ood.recipes={jigsav: 1}"],
        2,
        ("names 'jigsav'", "choose from", "jigsaw_roundtrip"),
    ),
    "simclr with columns by class": (
        None,
        ["learning.method=simclr", "learning.ood_columns=own_class"],
        2,
        ("simclr knows no classes",),
    ),
    "no val split": (
        one_group,
        [],
        3,
        ("'nut' has 10 images in 1 group (", "making the val split from it needs 2 groups and"),
    ),
    "a keyword too long for a prompt": (
        prose,
        ["generation.conditions={'': 99, keywords: 1}", "evaluation.bootstrap=0"],
        2,
        ("prompt 'a photo of a rusty rusty", "takes 85 tokens, the text encoder reads 75; shorten", "a keyword of"),
    ),
    "a binary head on near-OOD val images of one group": (
        lambda root: csv_set(root, declared_rows(groups=5)),
        ["evaluation.score=binary", "generation.synthetic_fraction=0", "evaluation.bootstrap=0"],
        2,
        ("evaluation.score=binary needs OOD rows", "nor two groups of near-OOD val images", "knn"),
    ),
    "too few groups": (
        lambda root: masked(root, groups=2),
        [],
        3,
        ("too few groups for an interval: test has 4, at least 5", "evaluation.bootstrap=0"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_run(name, tmp_path, capsys):
    build, overrides, code, phrases = CASES[name]
    (tmp_path / "data").mkdir()
    path = write_config(tmp_path, learning={"classes_per_batch": 2})
    if build is not None:
        overrides = [*overrides, f"data.root={build(tmp_path / 'data')}"]
    capsys.readouterr()  # making the pipeline may have spoken
    assert trainer.main(["run", str(path), *overrides]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    for phrase in phrases:
        assert phrase in err, err
    left = {file.split("/")[0] for file in contents(tmp_path / "runs" / "tiny")}
    assert not left & set(WORK) and not (tmp_path / "runs" / "cache").exists()


@pytest.mark.parametrize("mask", [disc(radius=0), disc(16, 16, 4)], ids=["empty", "of another size"])
@pytest.mark.parametrize("skip", [False, True])
def test_check_finds_the_masks_that_a_run_would_stop_at(mask, skip, tmp_path, capsys):
    """They are listed with all others, and where a run may leave such files out it does not stop at them."""
    (tmp_path / "data").mkdir()
    path = write_config(tmp_path, learning={"classes_per_batch": 2})
    overrides = [f"data.root={masked(tmp_path / 'data', train=mask)}", MASKED]
    skipping = ["data.on_bad_image=skip"] * skip
    assert trainer.main(["check", str(path), *overrides, "--untimed", *skipping]) == (0 if skip else 3)
    text, err = capsys.readouterr()
    assert ("bolt/bolt-train-0-0.png: " in text) is not skip
    assert ("error: check: a run would stop at 1 bad files" in err) is not skip
    assert ("nothing found that would stop a run" in text) is skip


@pytest.mark.parametrize("call", [0, 1], ids=["as it is", "mirrored"])
def test_an_image_on_which_the_vae_overflows(call, tmp_path, capsys, monkeypatch):
    """It is neither of the first two, which are decoded as well; nothing is learned from the others."""
    encode, calls = StableDiffusion.encode_moments, []

    def overflow(self, pixels_DHWC, *arguments, **options):
        moments = encode(self, pixels_DHWC, *arguments, **options)
        if len(moments) > VAE_CHECK_IMAGES:
            calls.append(len(moments))
            moments[9, 0, 0, 0] = float("nan") if len(calls) == call + 1 else 0
        return moments

    path = write_config(tmp_path, pipeline={"dtype": "fp32"})
    monkeypatch.setattr(StableDiffusion, "encode_moments", overflow)
    assert trainer.main(["run", str(path)]) == 3
    named = [row["path"] for row in sorted(tiny_rows(), key=lambda row: row["path"]) if "/train-" in row["path"]][9]
    err = capsys.readouterr().err
    assert f"non-finite values for {tmp_path}/tiny.zip/{named} in float32; set pipeline.vae" in err, err
    left = {file.split("/")[0] for file in contents(tmp_path / "runs" / "tiny")}
    assert not left & set(WORK) and not list((tmp_path / "runs").rglob("learned_embeds.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--arms", "positives,positive_ood"], "'positive_ood', which is no arm (did you mean positives_ood?)"),
        (["--arms", "positives_ood", "near_ood.recipes={dream: 1}"], "names 'dream'; choose from"),
        (["--arms", "positives_ood", MASKED.replace("mask_split", "mask_spit")], "names 'mask_spit'"),
    ],
)
def test_compare(arguments, phrase, tmp_path, capsys):
    assert trainer.main(["compare", str(write_config(tmp_path)), *arguments]) == 2
    assert phrase in capsys.readouterr().err and not (tmp_path / "runs").exists()
