"""The generator as a whole: rings filled, the rate kept, provenance of all it holds, and a state that goes on exactly."""

import dataclasses

import pytest
import torch

from modules.config import Config
from modules.data.reservoir import Reservoir
from modules.diffusion.generator import Generator, prefill_target
from modules.diffusion.presets import plan
from modules.diffusion.recipes import Recipes
from modules.diffusion.slots import Sources
from modules.errors import ConfigError
from modules.settings import with_settings
from modules.state import load_newest, save_checkpoint
from tests.diffusion.engine import tiny_pipeline

CLASSES, IMAGES, SIZE = 3, 6, 16
LABELS = [i % CLASSES for i in range(IMAGES)]
BASE = {
    "data.image_size": SIZE,
    "generation.slots": 4,
    "generation.decode_batch": 3,
    "generation.num_inference_steps": 4,
    "generation.strengths": {0.5: 1.0, 0.75: 1.0},
    "generation.ring_size": 4,
    "generation.images_per_step": 1.5,
    "generation.synthetic_fraction": 0.1,
    "near_ood.recipes": {"strength": 1.0, "jigsaw": 1.0},
}


def build(embed=None, **settings) -> Generator:
    """A generator over six noise images of three classes, stored at half the pipeline's resolution; no learned tokens."""
    config = with_settings(Config(), BASE | {name.replace("__", "."): value for name, value in settings.items()})
    pipeline = tiny_pipeline()
    side = pipeline.resolution
    pixels = torch.randint(
        0, 256, (IMAGES, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    stored = pixels[:, ::2, ::2].contiguous()
    generation = config.generation
    reservoir = Reservoir(CLASSES, generation.ring_size, SIZE, "cpu", generation.max_uses, generation.max_age)
    sources = Sources(pipeline.encode_moments(pixels), pixels)
    preset = plan(config.pipeline.preset, config.generation, pipeline)
    settings = dataclasses.replace(generation, guidance_scale=preset.guidance_scale)
    grids = preset.grids(pipeline.scheduler)
    fixed = {"seed": config.run.seed, "resolution": side, "pipeline": pipeline.digest}
    recipes = Recipes(settings, config.near_ood, grids, LABELS, CLASSES, **fixed)
    return Generator(
        config,
        pipeline,
        None,
        recipes,
        sources,
        stored,
        reservoir,
        embed=embed,
    )


def embed(images_NHWC: torch.Tensor) -> torch.Tensor:
    """Mean color: a learner that never learns."""
    return images_NHWC.float().mean((1, 2))


def held(generator: Generator) -> dict[int, torch.Tensor]:
    return {request.image_index: pixels for pixels, request in generator.examples()}


def test_prefill_fills_every_ring_that_is_fed_and_tells_how_far_it_is():
    generator, calls = build(generation__prefill=0.5), []
    generator.prefill(lambda done, total, note="": calls.append((done, total)))
    for label in range(CLASSES):
        for is_ood in (False, True):
            assert generator.reservoir.fill(label, is_ood) >= 2
    assert calls == sorted(calls) and calls[-1] == (12, 12)


@pytest.mark.parametrize(("share", "fed"), [(0.0, False), (1.0, True)])
def test_rings_of_a_role_that_is_not_made_are_not_waited_for(share, fed):
    generator = build(generation__near_ood_fraction=share)
    generator.prefill()
    fills = {is_ood: [generator.reservoir.fill(c, is_ood) for c in range(CLASSES)] for is_ood in (False, True)}
    assert min(fills[fed]) >= 2 and fills[not fed] == [0] * CLASSES


def test_the_rarer_role_is_filled_less_so_that_little_is_made_for_nothing():
    generator = build(generation__near_ood_fraction=0.2, generation__ring_size=8)
    generator.prefill()
    fills = {is_ood: [generator.reservoir.fill(c, is_ood) for c in range(CLASSES)] for is_ood in (False, True)}
    assert min(fills[False]) >= 4 and min(fills[True]) >= 1
    assert generator.statistics()["images_finished"] <= 2 * CLASSES * (4 + 1)
    targets = [[prefill_target(build(generation__near_ood_fraction=f).config.generation, ood) for ood in (False, True)]
               for f in (0.5, 0.25, 0.0, 1.0)]  # fmt: skip
    assert targets == [[2, 2], [2, 1], [2, 0], [0, 2]]


def test_images_made_again_before_the_first_step_are_no_debt_of_it():
    generator = build(gate__retries=2)
    finish, rejected = generator.gate.finish, []

    def reject_some(pixels, requests):
        black = [request.attempt == 0 and request.image_index % 3 == 0 for request in requests]
        rejected.extend(request for request, bad in zip(requests, black, strict=True) if bad)
        finish(torch.where(torch.tensor(black)[:, None, None, None], -1.0, pixels), requests)

    generator.slots.finish = reject_some
    generator.prefill()
    assert len(rejected) > 2 and generator.slots.pace.credit == 0.0


def test_prefill_gives_up_where_nearly_all_is_rejected(monkeypatch):
    monkeypatch.setattr("modules.diffusion.generator.PREFILL_PATIENCE", 2)
    generator = build(gate__retries=0)
    generator.slots.finish = lambda pixels, requests: generator.gate.finish(torch.full_like(pixels, -1.0), requests)
    with pytest.raises(ConfigError, match=r"generation.prefill: .* places are still empty, .*black.* preview"):
        generator.prefill()


def test_over_many_steps_the_rate_is_kept():
    generator, steps = build(), 40
    for step in range(steps):
        generator.advance(step)
    in_flight = 4 + 3
    finished = generator.statistics()["images_finished"]
    assert abs(finished - 1.5 * steps) <= in_flight
    assert generator.reservoir.statistics()["images_put"] <= finished


def test_every_image_held_has_its_provenance_and_no_other_is_kept():
    generator = build(generation__prefill=0.0)
    for step in range(60):
        generator.advance(step)
    rows = generator.reservoir.filled()
    examples = generator.examples()
    assert len(examples) == len(rows)
    for row, (pixels, request) in zip(rows, examples, strict=True):
        entry = generator.reservoir.entry(row)
        assert (entry.image_index, entry.label, entry.is_ood) == (request.image_index, request.label, request.is_ood)
        assert request.label == LABELS[request.source] and request.pipeline == tiny_pipeline().digest
        assert torch.equal(pixels, generator.reservoir.pixels_SHWC[row])
    assert generator.statistics()["images_finished"] > 2 * len(generator.reservoir.pixels_SHWC)
    assert len(generator.provenance) <= 2 * len(generator.reservoir.pixels_SHWC) + 4


def test_the_train_split_is_judged_anew_at_its_steps_only():
    calls = []

    def watched(images_NHWC):
        calls.append(len(images_NHWC))
        return embed(images_NHWC)

    generator = build(watched, gate__enabled=True, gate__start_step=3, gate__refresh_every=4)
    refreshed = []
    for step in range(10):
        calls.clear()
        generator.advance(step)
        if IMAGES in calls:
            refreshed.append(step)
    assert refreshed == [3, 4, 8]


def test_without_gate_and_controller_the_learner_is_never_asked():
    def never(images_NHWC):
        raise AssertionError("the learner was asked")

    generator = build(never)
    for step in range(5):
        generator.advance(step)


def test_resuming_equals_never_having_stopped(tmp_path):
    settings = {"gate__enabled": True, "gate__start_step": 2, "gate__refresh_every": 3, "gate__quantile": 0.3}
    settings |= {"controller__enabled": True, "controller__update_every": 2}
    whole = build(embed, **settings)
    whole.prefill()
    for step in range(14):
        if step == 7:
            assert whole.slots.busy, "slots are in flight"
            save_checkpoint(tmp_path, step, whole.state_dict())
        whole.advance(step)
    _, tree, _ = load_newest(tmp_path)
    resumed = build(embed, **settings)
    resumed.load_state_dict(tree)
    for step in range(7, 14):
        resumed.advance(step)
    assert resumed.statistics() == whole.statistics()
    assert resumed.examples()[0][1] == whole.examples()[0][1]
    expected, made = held(whole), held(resumed)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[index], expected[index]) for index in expected)


def test_warmed_up_slots_make_what_the_ratio_says_from_the_first_step():
    """Idle ones would first have to fill: a window timed there sees ticks without arrivals and hardly a decode."""
    generator = build(near_ood__recipes={"strength": 1.0})
    generator.warm_up()
    counts = generator.slots.counts
    assert 0 < counts["ticks"] <= 4 and generator.slots.pace.credit == 0
    ticks, finished = counts["ticks"], counts["finished"]
    for step in range(8):
        generator.advance(step)
    assert counts["finished"] - finished == pytest.approx(8 * 1.5, abs=3)  # a decoded batch
    assert counts["ticks"] - ticks == pytest.approx(8, abs=1)  # 1.5 images of 2.7 calls by 4 slots


def test_warming_up_ends_where_nothing_takes_a_slot():
    generator = build(near_ood__recipes={"jigsaw": 1.0}, generation__near_ood_fraction=1.0)
    generator.warm_up()
    assert generator.slots.counts["ticks"] == 0 and generator.slots.busy == 0
