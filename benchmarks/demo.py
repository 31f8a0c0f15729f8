"""The demo beside runs on real images only: `python -m benchmarks.demo [--runs runs/demo_rows]`.

Four runs of configs/demo.yaml with the same number of optimizer steps: as it is; without generated rows; the same at
the learning rate of the larger batch (rates scale with the batch, so the second run has .6 of the first's); and without
generated rows but filled up to the same batch with further real ones. Finished runs are read, not repeated. With one
seed each they support no claim; `trainer.py compare` compares arms. Rows are appended to benchmarks/results/demo.csv.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import yaml

from benchmarks.ledger import append_once

ROOT = Path(__file__).resolve().parents[1]
RUNS = {  # name in the rows -> what differs from configs/demo.yaml
    "demo": [],
    "real only, same real rows": ["generation.synthetic_fraction=0"],
    "real only, same real rows, rate of 80": ["generation.synthetic_fraction=0", "learning.lr=5.333e-3"],
    "real only, further real rows": ["generation.synthetic_fraction=0", "learning.extra_real_rows=32"],
}
METRICS = ("test.accuracy", "test.knn_accuracy", "val.accuracy", "test.near_ood.knn.auroc", "test.near_ood.msp.auroc")


def main() -> None:
    """Do the runs that are not finished, append the rows, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs/demo_rows", help="where the runs stand or are made")
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args()
    rows = []
    for name, settings in RUNS.items():
        slug = name.replace(",", "").replace(" ", "_")
        command = ["trainer.py", "run", "configs/demo.yaml", f"run.dir={options.runs}", f"run.name={slug}", *settings]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        rows += rows_of(name, ROOT / options.runs / slug)
    append_once(Path(options.out) / "demo.csv", rows)
    print(json.dumps({row["run"]: row["value"] for row in rows if row["metric"] == "test.accuracy"}))


def rows_of(name: str, run: Path) -> list[dict]:
    """One row per headline metric of a finished run, with its conditions."""
    results = json.loads((run / "results.json").read_text())
    records = ("environment.json", "data.json", "inputs.json")
    made, files, inputs = (json.loads((run / name).read_text()) for name in records)
    config = yaml.safe_load((run / "config.yaml").read_text())
    conditions = {
        "seed": config["run"]["seed"],
        "train_images": sum(file["set"] == "train" for file in files["files"].values()),
        "steps": results["learning.steps"],
        "seconds": round(results["cost.seconds"], 1),
        "forward_passes": results["cost.forward_passes"],
        "images_generated": results.get("cost.images_generated", 0),
        "peak_memory_gib": round(results["run.peak_memory_gib"], 2),
        "commit": made["commit"],
        "device": made["gpu"] or made["cpu"],
        "cores": made["cores"],
        "torch": made["packages"]["torch"],
        "precision": inputs["runtime"][-1]["precision"],
        "date": date.today().isoformat(),
    }
    rounded = lambda key: round(results[key], 4) if key in results else "nan"  # noqa: E731 - an interval may be absent
    return [
        {"run": name, "metric": m, "value": rounded(m), "low": rounded(f"{m}_low"), "high": rounded(f"{m}_high")}
        | conditions
        for m in METRICS
    ]


if __name__ == "__main__":
    main()
