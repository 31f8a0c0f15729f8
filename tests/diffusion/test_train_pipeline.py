"""A pipeline made from scratch: exact resume, trained words, and a folder that diffusers and our loader both read."""

import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from modules.config import Pipeline, PipelineShape, PipelineTraining
from modules.diffusion import train_pipeline as training
from modules.diffusion.export_pipeline import export
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.prompts import OBJECT_TEMPLATES, fill
from modules.diffusion.schedule import alphas_cumprod
from modules.diffusion.shapes import SCHEDULER

SHAPE = PipelineShape(
    resolution=16, vae_channels=(16, 16), unet_channels=(16, 16), text_width=16, text_layers=1, text_heads=2,
    vocabulary=900,
)  # fmt: skip
TRAINING = PipelineTraining(
    vae_steps=4, vae_batch=4, unet_steps=4, unet_batch=4, warmup_steps=2, instance_tokens=0.5, bf16=False
)
CAPTIONS = ["a photo of a rusty bolt", "a photo of a clean bolt", "a photo of a blue ring"] * 2
NOUNS = ["bolt", "bolt", "ring"] * 2
OBJECTS = ["b1", "b2", "r1"] * 2


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return training.build_tokenizer(CAPTIONS, SHAPE)


def captions(tokenizer, **changes):
    return training.Captions(CAPTIONS, NOUNS, OBJECTS, tokenizer, dataclasses.replace(TRAINING, **changes))


def run(stage, step, steps):
    losses = []
    while stage.step < steps:
        losses.append(step(stage))
    return losses


def weights(stage):
    return [p.clone() for p in stage.parameters] + [p.clone() for m in stage.averages.values() for p in m.parameters()]


def vae_step(pixels):
    return lambda stage: training.vae_step(stage, pixels)


def test_every_word_of_every_template_is_one_trained_token(tokenizer):
    for template in OBJECT_TEMPLATES:
        for word in fill(template, "rusty bolt").split():
            assert all(len(tokenizer.tokenize(part)) == 1 for part in word.split("-")), word
    assert len(tokenizer) <= SHAPE.vocabulary
    ids = tokenizer("a photo of a rusty bolt", padding="max_length")["input_ids"]
    assert len(ids) == SHAPE.max_tokens
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a photo of a rusty bolt"


def test_captions_are_reworded_dropped_and_shown_by_their_own_token(tokenizer):
    draw = torch.Generator().manual_seed(0)
    rows = [0, 1, 2] * 400
    ids, own = captions(tokenizer, caption_dropout=0.25).ids(rows, draw)
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]
    dropped = [text == "" for text in texts]
    assert 0.2 < sum(dropped) / len(rows) < 0.3
    shown = own >= 0
    assert 0.3 < shown.float().mean() < 0.45  # half of those not dropped
    for row, text, instance, is_dropped in zip(rows, texts, own.tolist(), dropped, strict=True):
        if instance >= 0:
            assert instance == sorted(set(OBJECTS)).index(OBJECTS[row])
            assert "*" in text
            assert NOUNS[row] not in text.split()
        elif not is_dropped:
            assert "*" not in text
            assert NOUNS[row] in text.split() or "object" in text.split()
    beginnings = {text.split(" rusty")[0] for text in texts if " rusty" in text}
    assert len(beginnings) == len({template.split(" {}")[0] for template in OBJECT_TEMPLATES})


def test_own_token_stands_exactly_where_the_mark_is(tokenizer):
    text, _ = training.build_text_and_unet(SHAPE, tokenizer, 0)
    table = torch.randn(3, SHAPE.text_width)
    mark = tokenizer.convert_tokens_to_ids("*</w>")
    ids = torch.tensor([tokenizer("a photo of a *", padding="max_length")["input_ids"]] * 2)
    with torch.no_grad():
        spliced = training.text_with_rows(text, ids, mark, torch.tensor([1, -1]), table)
        plain = text(ids).last_hidden_state
        text.get_input_embeddings().weight[mark] = table[1]
        assert torch.allclose(spliced[0], text(ids).last_hidden_state[0], atol=1e-6)
    assert torch.equal(spliced[1], plain[1])


def test_vae_stage_resumes_bit_for_bit(pixels):
    whole = training.vae_stage(training.build_vae(SHAPE, 0), TRAINING.vae_steps, TRAINING, 0)
    losses = run(whole, vae_step(pixels), 4)
    first = training.vae_stage(training.build_vae(SHAPE, 0), TRAINING.vae_steps, TRAINING, 0)
    run(first, vae_step(pixels), 2)
    second = training.vae_stage(training.build_vae(SHAPE, 1), TRAINING.vae_steps, TRAINING, 1)
    second.seed = 0
    second.load_state_dict(first.state_dict())
    assert run(second, vae_step(pixels), 4) == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_unet_stage_resumes_bit_for_bit_and_trains_object_rows(pixels, tokenizer):
    vae = training.build_vae(SHAPE, 0)
    moments, scaling = training.latent_statistics(vae, pixels)
    assert moments.shape == (12, 8, 8, 8)
    assert scaling == pytest.approx(1 / moments[:, :4].float().std().item())
    alphas = alphas_cumprod(SCHEDULER)
    words = captions(tokenizer)

    def step(stage):
        return training.unet_step(stage, moments, scaling, words, alphas)

    def stage():
        text, unet = training.build_text_and_unet(SHAPE, tokenizer, 0)
        return training.unet_stage(text, unet, TRAINING, words.num_objects, 0)

    whole = stage()
    before = whole.extra[0].clone()
    losses = run(whole, step, 4)
    first = stage()
    run(first, step, 2)
    second = stage()
    second.load_state_dict(first.state_dict())
    assert run(second, step, 4) == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert not torch.equal(before, whole.extra[0])


class FakeGpu(FakeTensorMode):
    """A GPU that computes nothing but places: an operation refuses tensors of two devices, as on a real one.

    Tensors on the CPU stay real, so that draws have values.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        if any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type != "cpu") for x in leaves):
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", ["vae", "unet"])
def test_a_step_is_wholly_on_the_device_of_its_stage(tokenizer, monkeypatch, name):
    """Forward passes on a GPU that is not there: whatever is left on the CPU meets what is not, which is an error."""
    losses = []
    monkeypatch.setattr(training.Stage, "update", lambda stage, loss: losses.append(loss))
    words, alphas = captions(tokenizer), alphas_cumprod(SCHEDULER)
    with FakeGpu():
        if name == "vae":
            stage = training.vae_stage(training.build_vae(SHAPE, 0), 4, TRAINING, 0, "cuda")
            pixels = torch.zeros(6, 16, 16, 3, dtype=torch.uint8, device="cuda")
            step = vae_step(pixels)
        else:
            parts = training.build_text_and_unet(SHAPE, tokenizer, 0)
            stage = training.unet_stage(*parts, TRAINING, words.num_objects, 0, "cuda")
            moments = torch.zeros(12, 8, 8, 8, dtype=torch.float16, device="cuda")
            step = lambda stage: training.unet_step(stage, moments, 1.0, words, alphas)  # noqa: E731
        # what a step returns has no value here
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            step(stage)
    assert losses[0].device.type == stage.device.type == "cuda"
    assert {weight.device.type for weight in weights(stage)} == {"cuda"}


def test_the_export_loads_in_diffusers_and_here_and_says_what_it_was_made_from(tmp_path, tokenizer):
    text, unet = training.build_text_and_unet(SHAPE, tokenizer, 0)
    vae = training.build_vae(SHAPE, 0).to(memory_format=torch.channels_last)
    state = torch.random.get_rng_state()
    digests = export(tmp_path, vae, text, unet, tokenizer, 1.7, {"trained_words": ["bolt"]})
    assert torch.equal(state, torch.random.get_rng_state())
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["trained_words"] == ["bolt"]
    assert facts["sha256"] == digests
    assert len(digests) == 3
    assert not list(tmp_path.rglob("*.bin"))
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path, local_files_only=True)
    ours = load_pipeline(Pipeline(path=str(tmp_path)))
    assert ours.scaling_factor == theirs.vae.config.scaling_factor == 1.7
    assert ours.resolution == SHAPE.resolution
    for name, value in theirs.unet.state_dict().items():
        assert torch.equal(value.float(), ours.unet.state_dict()[name].float()), name
