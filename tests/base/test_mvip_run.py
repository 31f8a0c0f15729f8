"""The seed's experiment in small: a whole run on an MVIP tree, cropped to its masks, edited within them."""

import io
import json

import trainer
from modules.console import Console
from modules.settings import load_config
from tests.base.tinyset import write_config
from tests.data.trees import disc, mvip_tree, picture, put

CARS = ("Bolt", "Gear", "Nut", "Ring", "Screw", "Thing")  # words that the pipeline knows
CLASSES = dict.fromkeys(CARS, "CarComponent") | {"Drill": "Tool", "Saw": "Tool"}


def test_a_run_on_an_mvip_tree_from_masks_to_far_ood(tmp_path):
    root = mvip_tree(tmp_path / "MVIP", CLASSES, cameras=1)
    for label in CLASSES:
        put(root / label / "train_data/background/0/cam_00/00_rgb.png", picture())
    put(root / "Gear/train_data/0/0/cam_00/00_rgb_mask_gen.png", disc(radius=0))
    path = write_config(
        tmp_path,
        "mvip",
        data={
            "root": root,
            "image_size": 16,
            "super_class": "CarComponent",
            "num_classes": 3,
            "class_seed": 0,  # draws Bolt, Gear and Nut
            "crop_to_mask": "true",
        },
        pipeline={"resolution": 16},
        inversion={"images_per_class": 8, "batch_size": 8, "initializer": "keywords"},
        generation={"mask_edit": "background", "prefill": 0.5, "conditions": "{keywords: 1.0, old: 1.0}"},
        near_ood={"recipes": "{mask_split: 1.0, foreign: 1.0}"},
        learning={"steps": 2, "warmup_steps": 1},
        evaluation={"bootstrap": 40, "judge_steps": 1, "knn_every": 0},
    )
    results = trainer.run(*load_config(path), Console(io.StringIO()))
    run = tmp_path / "runs/mvip"
    data = json.loads((run / "data.json").read_text())
    chosen = set(data["classes"])
    sets = {}
    for name, file in data["files"].items():
        assert "background" not in name
        sets.setdefault(file["set"], set()).add(file["label"])
    assert sets["train"] == sets["val"] == sets["test"] == chosen and len(chosen) == 3
    assert sets["near_ood_val"] | sets["near_ood_test"] == set(CARS) - chosen
    assert sets["near_ood_val"].isdisjoint(sets["near_ood_test"])
    assert sets["far_ood_test"] == {"Drill", "Saw"}
    assert any("images of the position `background` left out" in note for note in data["notes"])
    assert [path for path, reason in data["skipped"] if reason.endswith("is empty")] == [
        "Gear/train_data/0/0/cam_00/00_rgb.png"
    ]
    assert {f"test.{role}.knn.auroc_low" for role in ("near_ood", "far_ood")} <= results.keys()
    recipes = {row["recipe"] for row in json.loads((run / "gate.json").read_text())}
    assert recipes == {"positive", "mask_split", "foreign"}
    table = [row for row in json.loads((run / "recipes.json").read_text()) if row["class"] == "all"]
    assert {row["recipe"] for row in table} == recipes
    assert all(isinstance(row["agreement"], float) and row["distance_share"] > 0 for row in table)
    tokens = {row["class"]: row["initializer"] for row in json.loads((run / "tokens/report.json").read_text())}
    assert tokens == {"Bolt": "bolt", "Gear": "gear", "Nut": "nut"}
    provenance = (run / "report.html").read_text()
    assert any(f"&quot;condition&quot;: &quot;{word}&quot;" in provenance for word in ("metal", "bolt", "gear", "nut"))
