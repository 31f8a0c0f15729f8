"""Textual inversion: only the classes of a batch move, nothing else ever does, and resuming equals never stopping."""

import copy
import dataclasses
import math

import pytest
import torch
from diffusers import DDPMScheduler, LatentConsistencyModelPipeline

from modules.config import Inversion as Settings
from modules.config import Pipeline
from modules.diffusion.denoising import Denoising, stratified
from modules.diffusion.inversion import Inversion, learn, schedule, token_cache_key
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.prompts import class_initializers
from modules.diffusion.token_report import token_report
from modules.diffusion.tokens import Tokens, load_tokens, save_tokens
from modules.errors import ConfigError, DataError, NonFinite, OutOfMemory
from modules.runtime import stream
from tests.tiny import pipeline_folder

CLASSES = ("bolt", "gear", "nut")
SETTINGS = Settings(images_per_class=10, batch_size=8, lr=2e-3)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(Pipeline(path=str(pipeline_folder())))


def make_moments(pipeline, images, name="moments"):
    """Random moments [2, D, 8, h, w]: the latents of different classes lie apart."""
    size = pipeline.latent_size
    mean = torch.randn(2, images, 4, size, size, generator=stream(0, name)) * 4
    mean += torch.arange(images)[None, :, None, None, None] % len(CLASSES)
    return torch.cat([mean, torch.full_like(mean, -6.0)], 2).half()


def make(pipeline, settings=SETTINGS, images=9, seed=0, **options):
    labels = [row % len(CLASSES) for row in range(images)]
    return Inversion(pipeline, make_moments(pipeline, images), labels, CLASSES, settings, seed, **options)


def run(inversion, steps):
    return [inversion.step() for _ in range(steps)]


@pytest.mark.parametrize("images, budget", [(7, 10), (30, 4), (3, 1), (9, 8)])
def test_the_schedule_gives_every_class_its_exact_budget_and_uses_images_evenly(images, budget):
    labels = [row % 3 for row in range(images)]
    order = schedule(labels, CLASSES, budget, seed=1)
    assert len(order) == 3 * budget
    for label in range(3):
        uses = [order.count(row) for row in range(images) if labels[row] == label]
        assert sum(uses) == budget and max(uses) - min(uses) <= 1
    first_round = [labels[row] for row in order[: 3 * min(4, budget)]]
    assert [first_round.count(label) for label in range(3)] == [min(4, budget)] * 3


def test_the_schedule_is_drawn_from_the_seed():
    first, same, other = (schedule([0, 1, 2] * 5, CLASSES, 10, seed) for seed in (1, 1, 2))
    assert first == same != other


def test_a_class_without_training_images_is_an_error(pipeline):
    with pytest.raises(DataError, match="'nut' has no training image"):
        schedule([0, 1, 0], CLASSES, 4, 0)


def test_stratified_timesteps_are_uniform_and_spread_within_a_class():
    labels = [1, 0, 1, 1, 0, 1]
    draws = torch.stack([stratified(labels, stream(0, "t", i)) for i in range(4000)])
    assert draws.min() >= 0 and draws.max() < 1
    for row in range(6):
        histogram = torch.histc(draws[:, row], 10, 0, 1)
        assert (histogram - 400).abs().max() < 90, f"row {row}: {histogram.tolist()}"  # 4.5 sd of 400 in 4,000
    of_class_1 = draws[:, [0, 2, 3, 5]].sort(1).values
    assert torch.allclose(of_class_1.diff(dim=1), torch.tensor(0.25), atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_and_target_are_those_of_diffusers(kind):
    pipeline = load_pipeline(Pipeline(path=str(pipeline_folder(prediction_type=kind))))
    scheduler = DDPMScheduler.from_config(pipeline.scheduler)
    z_0, eps = torch.randn(2, 5, 4, 8, 8, generator=stream(0, "noising"))
    u = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0 - 2**-24])
    z_t, target, t = Denoising(pipeline).noised(z_0, eps, u)
    assert t.tolist() == [0, 100, 500, 900, 999]
    assert torch.allclose(z_t, scheduler.add_noise(z_0, eps, t), atol=1e-6)
    expected = eps if kind == "epsilon" else scheduler.get_velocity(z_0, eps, t)
    assert torch.allclose(target, expected, atol=1e-6)


def test_every_vector_starts_as_the_initializers_row(pipeline):
    inversion = make(pipeline, dataclasses.replace(SETTINGS, initializer="gear", num_vectors=2))
    row = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("gear</w>")]
    assert torch.equal(inversion.vectors_CKE, row.expand(3, 2, -1))
    with pytest.raises(ConfigError, match=r"inversion\.initializer: 'gears'"):
        make(pipeline, dataclasses.replace(SETTINGS, initializer="gears"))


def test_every_class_may_start_from_a_word_of_its_own(pipeline, tmp_path):
    own = dataclasses.replace(SETTINGS, initializer="keywords")
    keywords = (("never seen", "gear"), (), ("rusty", "nut"))
    words = class_initializers(keywords, pipeline.tokenizer, None)
    assert words == ("gear", "object", "rusty")
    inversion = make(pipeline, own, initializers=words)
    table = pipeline.text_encoder.get_input_embeddings().weight
    rows = [table[pipeline.tokenizer.convert_tokens_to_ids(f"{word}</w>")] for word in words]
    assert torch.equal(inversion.vectors_CKE, torch.stack(rows)[:, None])
    save_tokens(inversion.tokens(), tmp_path)
    again = load_tokens(tmp_path, CLASSES, pipeline.digest)
    assert [again.initializer_of(c) for c in range(3)] == list(words)
    report = token_report(pipeline, again, make_moments(pipeline, 3)[0], [0, 1, 2], draws=2)
    assert [row["initializer"] for row in report] == list(words)
    assert [row["gain"] for row in report] == pytest.approx([0, 0, 0], abs=1e-5), "each against its own word"
    pixels = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    keys = [token_cache_key(pipeline, pixels, ["bolt"], own, 0, given) for given in ((), words, words[::-1])]
    assert len(set(keys)) == 3
    prose = (("a rusty gear with the hole",), ("turned gear", "nut"))
    assert class_initializers(prose, pipeline.tokenizer, None) == ("gear", "nut"), "single words before those of prose"
    with pytest.raises(ConfigError, match="nothing told the keywords"):
        make(pipeline, own)
    with pytest.raises(ConfigError, match="no class has a keyword that is one word"):
        class_initializers((("never seen",), ()), pipeline.tokenizer, None)
    with pytest.raises(ConfigError, match="no class has a keyword that is one word"):
        class_initializers((("gear",), ()), pipeline.tokenizer, frozenset({"object"}))


def test_no_weight_moves_by_one_bit_and_none_gets_a_gradient(pipeline):
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    generator = torch.get_rng_state()
    learn(make(pipeline))
    assert torch.equal(torch.get_rng_state(), generator), "something drew from the global generator"
    for part, state in zip(parts, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())


def test_a_class_absent_from_the_batch_keeps_its_vectors_and_its_adam_state(pipeline):
    inversion = make(pipeline, dataclasses.replace(SETTINGS, batch_size=4))
    for _ in range(6):
        rows = inversion.order[inversion.done * 4 :][:4]
        present = {inversion.labels_D[row] for row in rows}
        before = inversion.state_dict()
        inversion.step()
        after = inversion.state_dict()
        for label in range(3):
            for name in ("vectors", "exp_avg", "exp_avg_sq"):
                assert torch.equal(before[name][label], after[name][label]) == (label not in present)
            assert after["visits"][label] - before["visits"][label] == (label in present)


def test_the_update_is_adams(pipeline):
    inversion = make(pipeline)
    inversion.vectors_CKE.normal_(generator=stream(0, "start"))
    parameters = [torch.nn.Parameter(row.clone()) for row in inversion.vectors_CKE]
    optimizers = [torch.optim.Adam([p], lr=1.0) for p in parameters]
    visits = [0, 0, 0]
    for step, (present, counts) in enumerate([([0, 2], [4, 4]), ([1, 2], [4, 1]), ([0, 1, 2], [4, 4, 16])] * 3):
        gradients = torch.randn(len(present), *inversion.vectors_CKE.shape[1:], generator=stream(0, "gradient", step))
        inversion._update(present, torch.tensor(present), gradients, counts)
        for label, count, gradient in zip(present, counts, gradients, strict=True):
            visits[label] += 1
            optimizers[label].param_groups[0]["lr"] = 2e-3 * math.sqrt(count / 4) * min(1, visits[label] / 5)
            parameters[label].grad = gradient.clone()
            optimizers[label].step()
    assert torch.allclose(inversion.vectors_CKE, torch.stack(list(parameters)).detach(), atol=1e-6)


def test_the_gradient_is_that_of_the_class_means_of_the_loss(pipeline):
    """Central differences of the documented objective, in float64, for a batch of unequal class counts."""
    double = copy.deepcopy(pipeline)
    double.dtype = torch.float64
    double.unet.double(), double.text_encoder.double()
    inversion = make(double)
    labels, draw = [0, 0, 0, 2], stream(0, "oracle")
    z, target = torch.randn(2, 4, 4, 8, 8, generator=draw, dtype=torch.float64)
    t = torch.tensor([10, 400, 700, 900])
    vectors = torch.randn(2, 1, 32, generator=draw, dtype=torch.float64) * 0.1
    position = torch.tensor([0, 0, 0, 1])

    def objective(vectors):
        context = double.embed_vectors(["a photo of a *"] * 2, vectors)
        loss = (double.unet(z, t, context[position]).sample - target).square().mean((1, 2, 3))
        return loss[:3].mean() + loss[3]

    context = double.embed_vectors(["a photo of a *"] * 2, vectors.requires_grad_())
    inversion.micro_batch = 3
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1], dtype=torch.float64)
    gradient, _ = inversion._denoise(z, target, t, context.detach(), position, weights)
    (gradient,) = torch.autograd.grad(context, vectors, gradient)
    with torch.no_grad():
        direction = torch.randn(vectors.shape, generator=draw, dtype=torch.float64)
        slope = (objective(vectors + 1e-4 * direction) - objective(vectors - 1e-4 * direction)) / 2e-4
    assert labels.count(0) == 3
    assert slope.abs() > 1e-4
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_learning_lowers_the_held_out_loss_of_every_class(kind):
    pipeline = load_pipeline(Pipeline(path=str(pipeline_folder(prediction_type=kind))))
    settings = dataclasses.replace(SETTINGS, images_per_class=160, batch_size=12, lr=1e-2)
    tokens = learn(make(pipeline, settings, images=24))
    assert tokens.images_seen == 160
    held_out = make_moments(pipeline, 12, "held out")[0]
    table = token_report(pipeline, tokens, held_out, [row % 3 for row in range(12)], draws=8, batch_size=5)
    for row in table:
        assert row["gain"] > 2 * row["gain_se"] > 0, row
        assert row["note"] == "" and row["images"] == 4


def test_a_unet_that_takes_its_guidance_as_an_input_is_told_one():
    pipeline = load_pipeline(Pipeline(path=str(pipeline_folder(time_cond_proj_dim=16))))
    told = []
    handle = pipeline.unet.register_forward_pre_hook(
        lambda m, args, kw: told.append(kw["timestep_cond"]), with_kwargs=True
    )
    make(pipeline).step()
    handle.remove()
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([7.5]), embedding_dim=16)
    assert torch.allclose(told[0], expected.expand(8, -1))


def test_two_halves_with_a_resume_equal_one_run_bit_for_bit(pipeline):
    whole = make(pipeline)
    losses = run(whole, whole.steps)
    first = make(pipeline)
    half = run(first, whole.steps // 2)
    state = copy.deepcopy(first.state_dict())
    run(first, 1)  # the state is a copy: what the first process did after it must not show
    second = make(pipeline)
    second.load_state_dict(state)
    rest = run(second, whole.steps - second.done)
    assert torch.equal(torch.stack(half + rest), torch.stack(losses))
    for name, value in whole.state_dict().items():
        other = second.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_the_state_of_other_classes_is_refused(pipeline):
    state = make(pipeline, dataclasses.replace(SETTINGS, num_vectors=2)).state_dict()
    with pytest.raises(DataError, match="belongs to other settings"):
        make(pipeline).load_state_dict(state)


def test_the_seed_decides_the_tokens(pipeline):
    first, same, other = (learn(make(pipeline, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.vectors_CKE, same.vectors_CKE)
    assert not torch.equal(first.vectors_CKE, other.vectors_CKE)


def test_the_text_encoder_sees_each_class_of_a_batch_once(pipeline):
    inversion, prompts = make(pipeline), []
    handle = pipeline.text_encoder.register_forward_pre_hook(lambda module, args: prompts.append(len(args[0])))
    run(inversion, inversion.steps)
    handle.remove()
    expected = [
        len({inversion.labels_D[row] for row in inversion.order[8 * step :][:8]}) for step in range(inversion.steps)
    ]
    assert prompts == expected


@pytest.mark.parametrize("flip, uses_mirror, uses_plain", [(0.0, False, True), (1.0, True, False), (0.5, True, True)])
def test_mirror_images_are_used_as_often_as_asked(pipeline, flip, uses_mirror, uses_plain):
    for plane, used in ((1, uses_mirror), (0, uses_plain)):
        inversion = make(pipeline, dataclasses.replace(SETTINGS, flip=flip))
        inversion.moments_FD8hw = inversion.moments_FD8hw.clone()
        inversion.moments_FD8hw[plane] = torch.nan
        run(inversion, 2)
        assert bool(inversion.finite) != used


def test_flips_without_mirror_moments_are_refused(pipeline):
    moments = make_moments(pipeline, 3)[:1]
    with pytest.raises(ValueError, match=r"moments_FD8hw: \(1, 3, 8, 8, 8\) lacks the mirror images"):
        Inversion(pipeline, moments, [0, 1, 2], CLASSES, SETTINGS, 0)
    Inversion(pipeline, moments, [0, 1, 2], CLASSES, dataclasses.replace(SETTINGS, flip=0.0), 0).step()


def test_a_loss_that_is_not_finite_moves_nothing_and_is_raised(pipeline):
    inversion = make(pipeline)
    run(inversion, 1)
    before = inversion.vectors_CKE.clone()
    inversion.moments_FD8hw = torch.full_like(inversion.moments_FD8hw, torch.inf)
    run(inversion, 1)
    assert torch.equal(inversion.vectors_CKE, before)
    with pytest.raises(NonFinite, match="not finite within the first 2 steps"):
        inversion.state_dict()
    with pytest.raises(NonFinite):
        learn(inversion)


class Small(torch.nn.Module):
    """A UNet on a device with room for `limit` rows."""

    def __init__(self, unet, limit):
        super().__init__()
        self.unet, self.config, self.limit, self.calls = unet, unet.config, limit, []

    def forward(self, z, t, context, timestep_cond=None):
        if len(z) > self.limit:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        self.calls.append(len(z))
        return self.unet(z, t, context)


def test_a_batch_that_does_not_fit_is_split_without_changing_what_is_learned(pipeline):
    whole = make(pipeline)
    losses = run(whole, 3)
    narrow = copy.copy(pipeline)
    narrow.unet = Small(pipeline.unet, 3)
    said = []
    split = make(narrow, say=said.append)
    split_losses = run(split, 3)
    assert split.micro_batch == 2 and set(narrow.unet.calls) == {2}
    assert [text.split(", which")[0] for text in said] == [
        f"{rows} rows of inversion.batch_size 8 ran out of memory at once: {rows // 2} at a time from here on"
        for rows in (8, 4)
    ]
    assert torch.allclose(torch.stack(losses), torch.stack(split_losses), atol=1e-6)
    assert torch.allclose(whole.vectors_CKE, split.vectors_CKE, atol=1e-5)


def test_one_row_that_does_not_fit_is_an_error_with_the_knobs(pipeline):
    narrow = copy.copy(pipeline)
    narrow.unet = Small(pipeline.unet, 0)
    with pytest.raises(OutOfMemory, match=r"pipeline\.resolution"):
        make(narrow).step()


def test_progress_counts_to_the_end(pipeline):
    seen = []
    learn(make(pipeline), lambda done, total, note: seen.append((done, total, note)), log_every=3)
    assert [done for done, _, _ in seen] == [3, 4] and all(total == 4 for _, total, _ in seen)
    assert all("denoising loss" in note for _, _, note in seen)


def test_the_cache_key_changes_with_everything_tokens_depend_on(pipeline, monkeypatch):
    pixels, labels = torch.arange(24, dtype=torch.uint8).reshape(2, 2, 2, 3), ["bolt", "gear"]
    key = token_cache_key(pipeline, pixels, labels, SETTINGS, 0)
    assert key == token_cache_key(copy.copy(pipeline), pixels.clone(), tuple(labels), copy.copy(SETTINGS), 0)
    other_model, other_size, other_type = (copy.copy(pipeline) for _ in range(3))
    other_model.digest, other_size.resolution, other_type.dtype = "0" * 64, 64, torch.float16
    changed = [
        token_cache_key(pipeline, pixels, labels, SETTINGS, 1),
        token_cache_key(pipeline, pixels.flip(0), labels, SETTINGS, 0),
        token_cache_key(pipeline, pixels + 1, labels, SETTINGS, 0),  # the same files, cropped otherwise
        token_cache_key(pipeline, pixels[:1], labels[:1], SETTINGS, 0),
        token_cache_key(pipeline, pixels, labels[::-1], SETTINGS, 0),
        *(token_cache_key(p, pixels, labels, SETTINGS, 0) for p in (other_model, other_size, other_type)),
        *(
            token_cache_key(pipeline, pixels, labels, dataclasses.replace(SETTINGS, **{name: value}), 0)
            for name, value in {"images_per_class": 11, "lr": 1e-3, "initializer": "gear", "num_vectors": 2}.items()
        ),
    ]
    monkeypatch.setattr("modules.diffusion.inversion.placeholder", lambda label: f"<{label}>")
    changed.append(token_cache_key(pipeline, pixels, labels, SETTINGS, 0))  # files name a class otherwise
    assert len({key, *changed}) == 1 + len(changed)


def test_the_report_names_a_token_that_did_nothing_and_a_class_without_held_out_images(pipeline):
    row = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("object</w>")]
    vectors = torch.stack([row, row * 3, -row]).detach()[:, None]
    tokens = Tokens(CLASSES, vectors, pipeline.digest, "object", 10, 0)
    table = token_report(pipeline, tokens, make_moments(pipeline, 4)[0], [0, 0, 1, 1], draws=3)
    assert [r["class"] for r in table] == list(CLASSES)
    assert table[0]["gain"] == pytest.approx(0, abs=1e-5) and "did not move" in table[0]["note"]
    assert table[1]["norm"] == pytest.approx(3 * table[0]["norm"], rel=1e-5) and table[1]["images"] == 2
    assert [r["cosine"] for r in table] == pytest.approx([1, 1, -1], abs=1e-5)
    assert table[2]["loss_token"] is None and table[2]["images"] == 0 and "no held-out" in table[2]["note"]


@pytest.mark.gpu
def test_half_precision_learns_on_a_gpu():
    pipeline = load_pipeline(Pipeline(path=str(pipeline_folder())), "cuda", torch.float16)
    settings = dataclasses.replace(SETTINGS, images_per_class=160, batch_size=12, lr=1e-2)
    inversion = make(pipeline, settings, images=24)
    inversion.moments_FD8hw = inversion.moments_FD8hw.cuda()
    tokens = learn(inversion)
    held_out = make_moments(pipeline, 12, "held out")[0]
    assert all(r["gain"] > 0 for r in token_report(pipeline, tokens, held_out, [row % 3 for row in range(12)]))


def test_labels_may_be_a_tensor(pipeline):
    """Entries of a tensor are objects of their own: taken as they are, no two rows would share a class."""
    labels = torch.arange(9) % len(CLASSES)
    given = Inversion(pipeline, make_moments(pipeline, 9), labels, CLASSES, SETTINGS, 0)
    expected = make(pipeline)
    assert run(given, 2) == run(expected, 2)
    assert torch.equal(given.vectors_CKE, expected.vectors_CKE)
