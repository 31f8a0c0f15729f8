"""What the embedded pipeline can do: reconstruction, label agreement by strength, and the effect of a class token.

    python -m benchmarks.embedded [--judge-steps 1500] [--images-per-class 200] [--out benchmarks/results]

Image-to-image from parts64 val images, which neither pipeline nor tokens were trained on, judged by a classifier fitted
to all real train images, each also as the VAE gives it back. Rows are appended to embedded.csv; two sheets and one JSON line show the rest.
"""

import argparse
import csv
import json
import math
from datetime import date
from pathlib import Path

import torch

from kernels.pixels import pixels
from modules.config import Inversion
from modules.data.sets import load_sets
from modules.diffusion.conditioning import Conditioning
from modules.diffusion.inversion import Inversion as TextualInversion
from modules.diffusion.inversion import learn
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.requests import Prompt, Request
from modules.diffusion.schedule import time_grid
from modules.diffusion.slots import Slots, Sources
from modules.diffusion.suitability import judge_images
from modules.diffusion.token_report import token_report
from modules.diffusion.tokens import PromptBank
from modules.evaluation.sheets import sheet_png
from modules.learning.judge import load_judge
from modules.runtime import commit, environment, quiet_libraries, stream
from modules.settings import load_config

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)
TOKEN_STRENGTH = 0.75
RESAMPLES = 2000


def main() -> None:
    """Measure, append the rows, draw the sheets, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=1, help="use every n-th val image")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    quiet_libraries()
    config, _ = load_config(arguments.config, arguments.overrides)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(config, arguments.judge_steps, arguments.every)
    found = {"vae_psnr_db": bench.psnr(), "real_agreement": bench.agreement(bench.real, bench.labels)}
    curve = bench.strength_curve(out)
    found["curve"] = curve
    found |= bench.token_effect(out)
    rows = [("vae_psnr_db", "", found["vae_psnr_db"]), ("real_agreement", "", found["real_agreement"])]
    rows += [(name, strength, row[name]) for strength, row in curve.items() for name in row]
    rows += [(name, TOKEN_STRENGTH, found[name]) for name in found if name.startswith("token_")]
    conditions = bench.conditions(arguments)
    path = out / "embedded.csv"
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["metric", "strength", "value", *conditions])
        writer.writerows([*row[:2], f"{row[2]:.4f}", *conditions.values()] for row in rows)
    print(json.dumps(found | conditions))


class Bench:
    """The pipeline, tokens learned from the train images, val images as sources, and the judge."""

    def __init__(self, config, judge_steps: int, every: int):
        self.config, self.generation = config, config.generation
        sets = load_sets(config.data, config.run.seed, masks=False)
        self.sets, self.classes = sets, sets.index.classes
        self.pipeline = load_pipeline(config.pipeline)
        self.val = sets.images["val"].pixels_DHWC[::every]
        self.labels = sets.labels("val")[::every]
        self.groups = [item.group_id for item in sets.images["val"].items[::every]]
        self.tokens = self._learn(config.inversion)
        self.conditioning = Conditioning(PromptBank(self.pipeline, self.tokens, config.inversion.initializer), 0)
        self.sources = Sources(self.pipeline.encode_moments(self.val))
        cache = Path(config.run.cache_dir or "runs/cache")
        # Half of its images have been through encode and decode, so that it judges shapes and not the decoder's traces.
        train = torch.cat([sets.train.pixels_DHWC, self.roundtrip(sets.train.pixels_DHWC)])
        labels = sets.labels_D.repeat(2)
        self.judge = load_judge(train, labels, len(self.classes), judge_steps, 0, cache, print, _dots("judge"))
        self.real = judge_images(self.judge, self.val)
        self.spread_C = self._class_spread()

    def _learn(self, settings: Inversion):
        train = self.sets.train.pixels_DHWC
        moments = torch.stack([self.pipeline.encode_moments(x) for x in (train, train.flip(2))])
        tokens = learn(
            TextualInversion(self.pipeline, moments, self.sets.labels_D, self.classes, settings, 0), _dots("tokens")
        )
        report = token_report(self.pipeline, tokens, self.pipeline.encode_moments(self.val), self.labels)
        print("held-out gain of the token over its initializer:", [round(row["gain"], 4) for row in report])
        return tokens

    def psnr(self) -> float:
        """Mean PSNR in dB of decode(mean of encode) over parts64 test images, pixels as stored."""
        test = self.sets.images["test"].pixels_DHWC
        error = ((self.roundtrip(test).float() - test.float()) / 255).square().mean((1, 2, 3))
        return (-10 * error.log10()).mean().item()

    @torch.no_grad()
    def roundtrip(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """uint8 images after encode (the mean) and decode, stored like generated ones."""
        decoded = []
        for rows in images_NHWC.split(32):
            moments = self.pipeline.encode_moments(rows)
            zeros = torch.zeros_like(moments[:, :4], dtype=torch.float32)
            decoded.append(pixels(self.pipeline.decode(self.pipeline.sample_latents(moments, zeros)), rows.shape[1]))
        return torch.cat(decoded)

    def _class_spread(self) -> torch.Tensor:
        """Median pairwise feature distance of the real val images of each class."""
        features = self.real.features_NF
        return torch.stack(
            [torch.nn.functional.pdist(features[self.labels == c]).median() for c in range(len(self.classes))]
        )

    def agreement(self, judged, labels) -> float:
        return (judged.predicted_N == labels).float().mean().item()

    def generate(self, strength: float, token_of) -> torch.Tensor:
        """One image from each val image at a strength, under the token that `token_of(row)` names; uint8 NHWC."""
        g, pipeline = self.generation, self.pipeline
        grid = time_grid(pipeline.scheduler, g.solver, g.num_inference_steps)
        start = grid.start(strength)
        made: dict[int, torch.Tensor] = {}

        def request(index: int) -> Request:
            label = token_of(index)
            return Request(
                image_index=index, source=index, label=int(self.labels[index]), is_ood=False, recipe="positive",
                prompt=Prompt(g.templates[0], "", (label,), (1.0,)), strength=strength, start=start,
                solver=g.solver, num_inference_steps=g.num_inference_steps, guided_steps=grid.guided_steps,
                guidance_scale=g.guidance_scale, tokens=self.conditioning.tokens,
            )  # fmt: skip

        def finish(decoded_N3HW, requests) -> None:
            stored = pixels(decoded_N3HW, self.config.data.image_size)
            made.update((r.image_index, image) for r, image in zip(requests, stored, strict=True))

        empty = self.conditioning.empty() if g.guidance_scale != 1 else None
        slots = Slots(pipeline, self.sources, [grid], request, self.conditioning, finish, seed=0, slots=32,
                      decode_batch=8, empty_TE=empty)  # fmt: skip
        for index in range(len(self.val)):
            slots.retry(request(index))
        with torch.no_grad():
            slots.drain()
        return torch.stack([made[index] for index in range(len(self.val))])

    def strength_curve(self, out: Path) -> dict[float, dict[str, float]]:
        """By strength: agreement, its share of the real one, median distance to source as a share of class spread."""
        curve, columns = {}, []
        for strength in STRENGTHS:
            images = self.generate(strength, lambda index: int(self.labels[index]))
            judged = judge_images(self.judge, images)
            distance = (judged.features_NF - self.real.features_NF).norm(dim=1) / self.spread_C[self.labels]
            agreement = self.agreement(judged, self.labels)
            curve[strength] = {
                "agreement": agreement,
                "agreement_share": agreement / self.agreement(self.real, self.labels),
                "distance_share": distance.median().item(),
            }
            columns.append(images)
            print(strength, {name: round(value, 3) for name, value in curve[strength].items()}, flush=True)
        chosen = [(self.labels == c).nonzero()[0].item() for c in range(len(self.classes))]
        rows = [[self.val[i], *(images[i] for images in columns)] for i in chosen]
        labels = [f"{self.classes[int(self.labels[i])]}: source, then strength {STRENGTHS}" for i in chosen]
        (out / "embedded_strengths.png").write_bytes(sheet_png(rows, labels, scale=1))
        return curve

    def token_effect(self, out: Path) -> dict[str, float]:
        """Agreement with the source's class at strength .75 under its own and under another class's token."""
        draw = stream(0, "wrong tokens")
        shift = torch.randint(1, len(self.classes), (len(self.val),), generator=draw)
        wrong = ((self.labels + shift) % len(self.classes)).tolist()
        images = [
            self.generate(TOKEN_STRENGTH, lambda index: int(self.labels[index])),
            self.generate(TOKEN_STRENGTH, lambda index: wrong[index]),
        ]
        hits = [(judge_images(self.judge, x).predicted_N == self.labels).double() for x in images]
        gap = hits[0] - hits[1]
        low, high = _group_bootstrap(gap, self.groups)
        chosen = [(self.labels == c).nonzero()[0].item() for c in range(len(self.classes))]
        rows = [[self.val[i], images[0][i], images[1][i]] for i in chosen]
        labels = [f"{self.classes[int(self.labels[i])]}, then {self.classes[wrong[i]]}" for i in chosen]
        (out / "embedded_tokens.png").write_bytes(sheet_png(rows, labels))
        return {
            "token_own": hits[0].mean().item(),
            "token_wrong": hits[1].mean().item(),
            "token_gap": gap.mean().item(),
            "token_gap_low": low,
            "token_gap_high": high,
        }

    def conditions(self, arguments) -> dict:
        """What the figures depend on."""
        g, versions = self.generation, environment()
        return {
            "val_images": len(self.val),
            "solver": f"{g.solver}-{g.num_inference_steps}",
            "guidance": g.guidance_scale,
            "vectors": self.config.inversion.num_vectors,
            "images_per_class": self.config.inversion.images_per_class,
            "judge_steps": arguments.judge_steps,
            "pipeline": self.pipeline.digest[:12],
            "date": date.today().isoformat(),
            "commit": commit(),
            "device": versions["gpu"] or versions["cpu"],
            "torch": versions["packages"]["torch"],
        }


def _group_bootstrap(values: torch.Tensor, groups: list[str]) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of the mean when whole groups are drawn with replacement."""
    names = sorted(set(groups))
    sums = torch.tensor([sum(v for v, g in zip(values.tolist(), groups, strict=True) if g == name) for name in names])
    counts = torch.tensor([groups.count(name) for name in names], dtype=torch.float)
    rows = torch.randint(len(names), (RESAMPLES, len(names)), generator=stream(0, "bootstrap"))
    means = sums[rows].sum(1) / counts[rows].sum(1)
    return means.quantile(0.025).item(), means.quantile(0.975).item()


def _dots(name: str):
    def progress(done: int, total: int, note: str = "") -> None:
        if done == total or done % max(1, math.ceil(total / 10)) < 1:
            print(f"{name} {done}/{total} {note}", flush=True)

    return progress


if __name__ == "__main__":
    main()
