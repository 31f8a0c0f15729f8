"""The engine that benchmarks time: it makes what diffusers makes, in exactly the calls that it is charged for."""

import dataclasses

import pytest
import torch

from benchmarks import inputs, peers
from benchmarks.engine import SlotEngine, first_images, psnr_db
from benchmarks.inputs import Setting
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


def test_the_engine_takes_exactly_its_share_of_calls(pipeline):
    moments = pipeline.encode_moments(inputs.smooth_images(4, pipeline.resolution))
    engine = SlotEngine(inputs.own_copy(pipeline), SETTING, moments, inputs.prompts(4), slots=2)
    stored = engine.make(8)
    assert engine.slots.counts["ticks"] == 4 * 3 and stored.shape == (4, 32, 32, 3) and stored.dtype == torch.uint8
    assert stored.float().std() > 1


def test_a_tuned_engine_makes_the_same_images(pipeline):
    moments, texts = pipeline.encode_moments(inputs.smooth_images(2, pipeline.resolution)), inputs.prompts(2)
    plain, tuned = (
        SlotEngine(inputs.own_copy(pipeline), SETTING, moments, texts, slots=2, tune_attention=tune)
        for tune in (False, True)
    )
    assert plain.attention == "auto" and "sdpa" in tuned.attention and " x" in tuned.attention
    assert psnr_db(first_images(tuned)[0], first_images(plain)[0]) > 90


def test_where_guidance_ends_early_a_call_has_fewer_unconditional_rows(pipeline):
    fast = dataclasses.replace(SETTING, solver="dpmpp_2m", num_inference_steps=8, guided_steps=6)
    assert fast.calls(pipeline.scheduler) == (4, 2)
    moments = pipeline.encode_moments(inputs.smooth_images(4, pipeline.resolution))
    engine = SlotEngine(inputs.own_copy(pipeline), fast, moments, inputs.prompts(4), slots=4)
    assert engine.slots.unconditional_rows == 3
    alone = SlotEngine(inputs.own_copy(pipeline), fast, moments, inputs.prompts(4), slots=1)
    assert psnr_db(engine.make(4) / 255, alone.make(4) / 255) > 60, "the same images, whatever they wait for"
