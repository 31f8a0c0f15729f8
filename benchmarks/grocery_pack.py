"""The image set that the pipeline of configs/grocery.yaml is made from: `python -m benchmarks.grocery_pack`.

It holds photographs of groceries that are neither ID nor near-OOD classes (role `pretrain`), captioned with their
labels, each class counting as one object, and captioned renders of other things. A pipeline trained on it has seen
photographs and words, but no class of the experiment. Then

    python trainer.py train-pipeline configs/train_pipeline.yaml data.root=grocery_pretrain.zip
    run.name=grocery_pipeline \\
        training.start=embedded training.further_vae_steps=1200 training.unet_steps=2000

makes the pipeline in runs/grocery_pipeline. Members are copied byte for byte; the renders are chosen at random from a
seed.
"""

import argparse
import csv
import io
import random
import zipfile
from pathlib import Path

COLUMNS = ("path", "caption", "noun", "model")


def main(argv: list[str] | None = None) -> Path:
    """Write the zip; returns its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", default="grocery96.zip", help="pack with a column role")
    parser.add_argument("--renders", default="pretrain64.zip", help="pack with columns caption, noun, model")
    parser.add_argument("--renders-taken", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grocery_pretrain.zip"))
    options = parser.parse_args(argv)
    rows = []
    with (
        zipfile.ZipFile(options.photographs) as photographs,
        zipfile.ZipFile(options.renders) as renders,
        zipfile.ZipFile(options.out, "w", zipfile.ZIP_STORED) as pack,
    ):
        for row in _index(photographs):
            if row["role"] == "pretrain":
                noun = row["label"].replace("-", " ").lower()
                rows.append(
                    _copy(photographs, pack, row["path"], "photographs", f"a photo of a {noun}", noun, row["label"])
                )
        taken = random.Random(options.seed).sample(_index(renders), options.renders_taken)
        for row in sorted(taken, key=lambda row: row["path"]):
            rows.append(_copy(renders, pack, row["path"], "renders", row["caption"], row["noun"], row["model"]))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        pack.writestr("index.csv", text.getvalue())
    photos = sum(row["path"].startswith("photographs") for row in rows)
    print(f"{options.out}: {photos} photographs, {len(rows) - photos} renders")
    return options.out


def _index(pack: zipfile.ZipFile) -> list[dict[str, str]]:
    return list(csv.DictReader(io.TextIOWrapper(pack.open("index.csv"), newline="")))


def _copy(source, pack, path: str, folder: str, caption: str, noun: str, model: str) -> dict[str, str]:
    """Copy a member into `folder` of the new pack; returns its index row there."""
    pack.writestr(f"{folder}/{path}", source.read(path))
    return {"path": f"{folder}/{path}", "caption": caption, "noun": noun, "model": f"{folder} {model}"}


if __name__ == "__main__":
    main()
