"""The engine that benchmarks time: it makes what diffusers makes, in exactly the calls that it is charged for."""

import dataclasses

import pytest
import torch

from benchmarks import batches, engine, generator, harness, inputs, peers
from benchmarks.engine import SlotEngine, first_images, psnr_db
from benchmarks.inputs import Setting
from benchmarks.techniques import DIFFUSERS, SLOTS, Bench
from kernels.upsample import FORMS
from modules.diffusion import upsampling
from modules.diffusion.attention import BACKENDS
from modules.diffusion.frozen import FrozenLinear
from modules.diffusion.upsampling import FoldedUpsample
from modules.runtime import Choice
from tests.tiny import pipeline_folder

SETTING = Setting(images=4, num_inference_steps=6)


@pytest.fixture(scope="module")
def pipeline():
    return inputs.load(str(pipeline_folder()), torch.device("cpu"))


def test_engine_and_peers_make_the_same_images_from_the_same_noise(pipeline):
    texts = inputs.prompts(4)
    moments = pipeline.encode_moments(inputs.smooth_images(4, pipeline.resolution))
    made, z0, eps = first_images(SlotEngine(inputs.own_copy(pipeline), SETTING, moments, texts, slots=4))
    reference = peers.from_noise(peers.image_to_image(pipeline, SETTING), z0, eps, texts, SETTING)
    assert psnr_db(made, reference) > 90
    assert psnr_db(made, peers.from_noise(peers.image_to_image(pipeline, SETTING), z0, -eps, texts, SETTING)) < 40


def test_engines_leave_the_peers_models_and_the_count_of_work_as_they_are():
    """A peer that ran through an engine's layers would be no peer."""
    arguments = ["--device", "cpu", "--pipeline", str(pipeline_folder()), "--images", "2", "--batch", "2"]
    bench = Bench(generator._parse([*arguments, "--no-compile"]), harness.Budget(0.0))
    kinds = [type(layer) for part in (bench.pipeline.unet, bench.pipeline.vae) for layer in part.modules()]
    for name in (SLOTS, DIFFUSERS):
        bench.makers()[name]()
    engine = bench.engines[SLOTS].pipeline
    assert {FrozenLinear, FoldedUpsample} <= {type(layer) for layer in engine.unet.modules()}
    assert kinds == [type(layer) for part in (bench.pipeline.unet, bench.pipeline.vae) for layer in part.modules()]
    assert inputs.count_work(bench.pipeline) == bench.work


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_peer_is_judged_on_latents_laid_out_as_its_vae_gives_them(pipeline, layout):
    """Or what was compiled for one layout is compiled again for the other, for the quality column alone."""
    pipeline, seen = inputs.own_copy(pipeline), []
    pipeline.unet.to(memory_format=layout)
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].stride(1)), with_kwargs=True
    )
    z0, eps = torch.randn(2, 2, 4, pipeline.latent_size, pipeline.latent_size).unbind(0)
    peers.from_noise(peers.image_to_image(pipeline, SETTING), z0, eps, ["", ""], SETTING)
    assert {stride == 1 for stride in seen} == {layout == torch.channels_last}


def test_the_engine_takes_exactly_its_share_of_calls(pipeline):
    moments = pipeline.encode_moments(inputs.smooth_images(4, pipeline.resolution))
    engine = SlotEngine(inputs.own_copy(pipeline), SETTING, moments, inputs.prompts(4), slots=2)
    stored = engine.make(8)
    assert engine.slots.counts["ticks"] == 4 * 3 and stored.shape == (4, 32, 32, 3) and stored.dtype == torch.uint8
    assert stored.float().std() > 1


def test_a_tuned_engine_makes_the_same_images(pipeline):
    moments, texts = pipeline.encode_moments(inputs.smooth_images(2, pipeline.resolution)), inputs.prompts(2)
    plain, tuned = (
        SlotEngine(inputs.own_copy(pipeline), SETTING, moments, texts, slots=2, tune=tune) for tune in (False, True)
    )
    assert plain.attention == "auto" and "sdpa" in tuned.attention and " x" in tuned.attention
    assert psnr_db(first_images(tuned)[0], first_images(plain)[0]) > 90


def test_what_is_found_before_compiling_is_all_that_a_compiled_engine_times(monkeypatch):
    """Processes that compile beside each other are told all of it: what they had to time they would time wrongly."""
    arguments = ["--device", "cpu", "--pipeline", str(pipeline_folder()), "--images", "2", "--batch", "2"]
    bench = Bench(generator._parse(arguments), harness.Budget(0.0))
    bench.tune()
    found, timed = dict(bench.found), []
    assert all(set(found.values()) & set(known) for known in (BACKENDS, FORMS)), "attention and upsampling"
    real = upsampling._time
    monkeypatch.setattr(upsampling, "_time", lambda *a: timed.append(a) or real(*a))
    monkeypatch.setattr(engine, "accelerate", lambda slots, how: Choice("compiled", how))
    for setting in (bench.setting, bench._fast()):
        assert bench._built(setting, compile_setting="on", tune=True).compiled.reason == "on"
    assert not timed and bench.found == found
    assert bench._fast().calls(bench.pipeline.scheduler) == (10, 7), "as many as the preset takes at this strength"


def test_where_guidance_ends_early_a_call_has_fewer_unconditional_rows(pipeline):
    fast = dataclasses.replace(SETTING, solver="dpmpp_2m", num_inference_steps=8, guided_steps=6)
    assert fast.calls(pipeline.scheduler) == (4, 2)
    moments = pipeline.encode_moments(inputs.smooth_images(4, pipeline.resolution))
    engine = SlotEngine(inputs.own_copy(pipeline), fast, moments, inputs.prompts(4), slots=4)
    assert engine.slots.unconditional_rows == 3
    alone = SlotEngine(inputs.own_copy(pipeline), fast, moments, inputs.prompts(4), slots=1)
    assert psnr_db(engine.make(4) / 255, alone.make(4) / 255) > 60, "the same images, whatever they wait for"


def test_the_cheapest_batch_is_the_smallest_that_is_as_good(capsys):
    costs = {2: 12.0, 4: 10.1, 8: 10.0, 16: RuntimeError("out of memory")}

    def cost(batch):
        if isinstance(costs[batch], Exception):
            raise costs[batch]
        return costs[batch]

    best, tried = batches.cheapest(cost, list(costs), "slots", float("inf"))
    assert best == 4 and tried == (
        "batches tried: 2 12 ms an image, 4 10.1 ms an image, 8 10 ms an image, 16 does not run"
    )
    assert batches.cheapest(cost, list(costs), "slots", float("inf"), pick=max)[0] == 8
    assert batches.cheapest(cost, [2, 4], "slots", -1.0)[1] == "batches tried: 2 12 ms an image, 4 no time"
    assert "slots, batch 16: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no batch of \[16\] runs"):
        batches.cheapest(cost, [16], "slots", float("inf"))


def test_slots_are_weighed_by_what_an_image_costs(pipeline, monkeypatch):
    """As the batches of diffusers are: all calls of an image, not one tick."""
    moments, texts = pipeline.encode_moments(inputs.smooth_images(4, pipeline.resolution)), inputs.prompts(4)
    monkeypatch.setattr(batches, "_medians", lambda calls, device: [8.0])
    monkeypatch.setattr(batches, "possible", lambda images, device: [2, 4])
    build = lambda slots: SlotEngine(inputs.own_copy(pipeline), SETTING, moments, texts, slots=slots)  # noqa: E731
    best, tried = batches.best_slots(build, 4, pipeline.device, "slots")
    assert SETTING.calls(pipeline.scheduler)[0] == 3
    assert (best, tried) == (4, "batches tried: 2 12 ms an image, 4 6 ms an image")
