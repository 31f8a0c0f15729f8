"""What the embedded pipeline can do: reconstruction, label agreement by strength, and the effect of a class token.

    python -m benchmarks.embedded [--judges 4] [--judge-steps 900] [--out benchmarks/results]

Image-to-image from parts64 val images, on which neither the pipeline nor the tokens were trained. The images are judged
by classifiers fitted to all real train images, and to the same images after encode and decode. Judges that differ only
in their seed differ by several points, so every number is a mean over several judges. Rows are appended to
embedded.csv; two sheets and one JSON line show the rest.
"""

import argparse
import json
import math
from datetime import date
from pathlib import Path

import torch
from torch.nn.functional import pdist

from benchmarks.ledger import append_rows
from kernels.pixels import pixels
from modules.config import Inversion
from modules.data.sets import load_sets
from modules.diffusion.conditioning import Conditioning
from modules.diffusion.inversion import Inversion as TextualInversion
from modules.diffusion.inversion import learn
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.requests import Prompt, Request
from modules.diffusion.roundtrip import roundtrip
from modules.diffusion.schedule import time_grid
from modules.diffusion.slots import Slots, Sources
from modules.diffusion.suitability import Judged, judge_images
from modules.diffusion.token_report import token_report
from modules.diffusion.tokens import PromptBank
from modules.evaluation.sheets import sheet_png
from modules.learning.judge import load_judge
from modules.runtime import commit, environment, stream
from modules.settings import load_config

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)
TOKEN_STRENGTH = 0.75
RESAMPLES = 2000


def main() -> None:
    """Measure, append the rows, draw the sheets and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--judges", type=int, default=4, help="classifiers that differ in their seed")
    parser.add_argument("--judge-steps", type=int, default=900)
    parser.add_argument("--every", type=int, default=1, help="use every n-th val image")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config, _ = load_config(arguments.config, arguments.overrides)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(config, arguments.judges, arguments.judge_steps, arguments.every)
    found = {"vae_psnr_db": bench.psnr(), "real_agreement": bench.real_hits_N.mean().item()}
    curve = bench.strength_curve(out)
    found["curve"] = curve
    found |= bench.token_effect(out)
    rows = [("vae_psnr_db", "", found["vae_psnr_db"]), ("real_agreement", "", found["real_agreement"])]
    rows += [(name, strength, row[name]) for strength, row in curve.items() for name in row]
    rows += [(name, TOKEN_STRENGTH, found[name]) for name in found if name.startswith("token_")]
    conditions = bench.conditions(arguments)
    named = ({"metric": name, "strength": strength, "value": f"{value:.4f}"} for name, strength, value in rows)
    append_rows(out / "embedded.csv", [row | conditions for row in named])
    print(json.dumps(found | conditions))


class Bench:
    """The pipeline, the tokens learned from train images, val images as sources, and the judges."""

    def __init__(self, config, judges: int, judge_steps: int, every: int):
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
        self.judges = [
            load_judge(train, labels, len(self.classes), judge_steps, seed, cache, print, _dots(f"judge {seed}"))
            for seed in range(judges)
        ]
        self.real = [judge_images(judge, self.val) for judge in self.judges]
        self.real_hits_N = self.hits(self.real)
        self.spread_JC = torch.stack([self._class_spread(real.features_NF) for real in self.real])

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
        """The mean PSNR in dB of decode(mean of encode) over parts64 test images, on uint8 pixels as stored."""
        test = self.sets.images["test"].pixels_DHWC
        error = ((self.roundtrip(test).float() - test.float()) / 255).square().mean((1, 2, 3))
        return (-10 * error.log10()).mean().item()

    def roundtrip(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """uint8 images after encode (the mean) and decode, stored like generated ones."""
        return roundtrip(self.pipeline, images_NHWC, images_NHWC.shape[1], batch=32)

    def _class_spread(self, features_NF: torch.Tensor) -> torch.Tensor:
        """The median pairwise feature distance of the real val images of each class."""
        return torch.stack([pdist(features_NF[self.labels == c]).median() for c in range(len(self.classes))])

    def judged(self, images) -> list[Judged]:
        """Each judge's judgment of the images."""
        return [judge_images(judge, images) for judge in self.judges]

    def hits(self, judged: list[Judged]) -> torch.Tensor:
        """The share of judges that predict the source's class for each image, float64 [N]."""
        return torch.stack([one.predicted_N == self.labels for one in judged]).double().mean(0)

    def distance_share(self, judged: list[Judged]) -> float:
        """The median feature distance to the source as a share of the spread of its class, mean over the judges."""
        medians = [
            ((one.features_NF - real.features_NF).norm(dim=1) / spread_C[self.labels]).median()
            for one, real, spread_C in zip(judged, self.real, self.spread_JC, strict=True)
        ]
        return torch.stack(medians).mean().item()

    def generate(self, strength: float, token_of) -> torch.Tensor:
        """One image from each val image at a strength, with the token that `token_of(row)` returns; uint8 NHWC."""
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
        """By strength: agreement, its share of that of real images, distance to source as a share of class spread."""
        curve, columns = {}, []
        strengths = sorted({*STRENGTHS, *map(float, self.generation.strengths)})  # those of the config among them
        for strength in strengths:
            images = self.generate(strength, lambda index: int(self.labels[index]))
            judged = self.judged(images)
            hits_N = self.hits(judged)
            low, high = self._group_bootstrap(hits_N, self.real_hits_N)
            curve[strength] = {
                "agreement": hits_N.mean().item(),
                "agreement_share": (hits_N.mean() / self.real_hits_N.mean()).item(),
                "agreement_share_low": low,
                "agreement_share_high": high,
                "distance_share": self.distance_share(judged),
            }
            columns.append(images)
            print(strength, {name: round(value, 3) for name, value in curve[strength].items()}, flush=True)
        chosen = [(self.labels == c).nonzero()[0].item() for c in range(len(self.classes))]
        rows = [[self.val[i], *(images[i] for images in columns)] for i in chosen]
        labels = [
            f"{self.classes[int(self.labels[i])]}: source, then strength {', '.join(map(str, strengths))}"
            for i in chosen
        ]
        (out / "embedded_strengths.png").write_bytes(sheet_png(rows, labels, scale=1))
        return curve

    def token_effect(self, out: Path) -> dict[str, float]:
        """Agreement with the source's class at strength .75, with its own token and with another class's."""
        draw = stream(0, "wrong tokens")
        shift = torch.randint(1, len(self.classes), (len(self.val),), generator=draw)
        wrong = ((self.labels + shift) % len(self.classes)).tolist()
        images = [
            self.generate(TOKEN_STRENGTH, lambda index: int(self.labels[index])),
            self.generate(TOKEN_STRENGTH, lambda index: wrong[index]),
        ]
        hits = [self.hits(self.judged(x)) for x in images]
        gap = hits[0] - hits[1]
        low, high = self._group_bootstrap(gap, torch.ones_like(gap))
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

    def _group_bootstrap(self, values_N: torch.Tensor, per_N: torch.Tensor) -> tuple[float, float]:
        """The 2.5 % and 97.5 % quantiles of sum(values) / sum(per) when whole groups are drawn with replacement."""
        names = sorted(set(self.groups))
        member_GN = torch.tensor([[group == name for group in self.groups] for name in names], dtype=torch.float64)
        rows = torch.randint(len(names), (RESAMPLES, len(names)), generator=stream(0, "bootstrap"))
        ratios = (member_GN @ values_N)[rows].sum(1) / (member_GN @ per_N)[rows].sum(1)
        return ratios.quantile(0.025).item(), ratios.quantile(0.975).item()

    def conditions(self, arguments) -> dict:
        """The conditions that the numbers depend on."""
        g, versions = self.generation, environment()
        return {
            "val_images": len(self.val),
            "solver": f"{g.solver}-{g.num_inference_steps}",
            "guidance": g.guidance_scale,
            "vectors": self.config.inversion.num_vectors,
            "images_per_class": self.config.inversion.images_per_class,
            "judges": arguments.judges,
            "judge_steps": arguments.judge_steps,
            "pipeline": self.pipeline.digest[:12],
            "date": date.today().isoformat(),
            "commit": commit(),
            "device": versions["gpu"] or versions["cpu"],
            "torch": versions["packages"]["torch"],
        }


def _dots(name: str):
    def progress(done: int, total: int, note: str = "") -> None:
        if done == total or done % max(1, math.ceil(total / 10)) < 1:
            print(f"{name} {done}/{total} {note}", flush=True)

    return progress


if __name__ == "__main__":
    main()
