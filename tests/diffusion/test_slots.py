"""The slot engine: equal to diffusers one by one, blind to slots and neighbors, even in cost, exact in resuming."""

import dataclasses

import pytest
import torch

from modules.data.masks import latent_edit_mask
from modules.data.synthetic import jigsaw
from modules.diffusion.requests import Prompt
from modules.diffusion.schedule import alphas_cumprod
from modules.errors import DataError
from modules.runtime import stream
from modules.state import load_newest, save_checkpoint
from tests.diffusion.engine import Engine


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "euler", "lcm"])
def test_four_strengths_in_one_call_equal_diffusers_one_by_one(solver, prediction_type, monkeypatch):
    engine = Engine(solver, 8, options=(("prediction_type", prediction_type),))
    engine.slots.tick()
    assert sorted(request.strength for request in engine.slots.occupants) == [0.25, 0.5, 0.75, 1.0]
    engine.make(8)
    images = torch.stack([engine.finished[i] for i in range(8)])
    expected = torch.stack([engine.by_diffusers(engine.request(i), monkeypatch) for i in range(8)])
    error = (images - expected).abs().max().item()
    assert error <= 1e-4, error
    inside = (expected > 0.01) & (expected < 0.99)
    assert inside.float().mean() > 0.8  # clamping hides nothing
    assert (images[1:] - images[:-1]).abs().amax((1, 2, 3)).min() > 0.02


@pytest.mark.parametrize("count", [3, 15, 20])
def test_dpm_solver_orders_at_both_ends(count, monkeypatch):
    engine = Engine("dpmpp_2m", count, strengths=(0.35, 0.7, 1.0), slots=3)
    engine.make(3)
    for i in range(3):
        expected = engine.by_diffusers(engine.request(i), monkeypatch)
        assert (engine.finished[i] - expected).abs().max() <= 1e-4


def test_an_image_does_not_depend_on_its_slot_or_neighbors():
    alone, crowded = Engine(slots=1), Engine(slots=5, decode_batch=2)
    alone.make(7)
    crowded.make(7)
    for i in range(7):
        assert (alone.finished[i] - crowded.finished[i]).abs().max() <= 1e-5


def test_the_unet_sees_one_shape_and_the_decoder_one_batch(monkeypatch):
    engine, shapes, decoded = Engine(), [], []
    unet, vae = engine.pipeline.unet, engine.pipeline.vae
    forward, decode = unet.forward, vae.decode
    monkeypatch.setattr(
        unet, "forward", lambda x, t, c, **k: shapes.append((x.shape, t.shape)) or forward(x, t, c, **k)
    )
    monkeypatch.setattr(vae, "decode", lambda z: decoded.append(len(z)) or decode(z))
    engine.make(5)
    assert set(shapes) == {((4, 4, 8, 8), (4,))}  # unconditional rows join within, see shared_rows
    assert set(decoded) == {3} and engine.batches[-1] < 3


def test_images_enter_in_index_order_and_every_slot_is_refilled_before_the_next_tick():
    engine = Engine(slots=3)
    for _ in range(10):
        engine.slots.tick()
        assert engine.slots.counts["busy_rows"] == 3 * engine.slots.counts["ticks"]
    begun = {r.image_index for r in engine.order} | {r.image_index for _, r in engine.slots.ready}
    begun |= {r.image_index for r in engine.slots.occupants if r}
    assert begun == set(range(engine.slots.next_index - len(engine.slots.drawn)))


def arrivals(engine, ticks: int) -> list[int]:
    """Images that arrive in each of a number of ticks."""
    counts = []
    for _ in range(ticks):
        engine.slots.tick()
        counts.append(sum(request is None for request in engine.slots.occupants))
    return counts


def test_staggered_slots_are_left_evenly_and_the_others_all_at_once():
    """Three slots on a grid of eight steps: filled within it, then left one at a time, with none idle in any tick."""
    staggered, at_once = (Engine(slots=3, strengths=(1.0,), staggered=on) for on in (True, False))
    arrivals(staggered, 8)
    before = staggered.slots.counts["busy_rows"]
    even = arrivals(staggered, 16)
    assert sum(even) == 6 and max(even) == 1 and staggered.slots.counts["busy_rows"] - before == 16 * 3
    bursts = arrivals(at_once, 16)
    assert sum(bursts) == 6 and max(bursts) == 3


def test_staggered_slots_of_mixed_strengths_are_full_after_the_longest_grid():
    engine = Engine(slots=4, staggered=True)
    arrivals(engine, 8)
    before = engine.slots.counts["busy_rows"]
    arrivals(engine, 12)
    assert engine.slots.counts["busy_rows"] - before == 12 * 4


def test_staggering_changes_no_image():
    staggered, at_once = Engine(staggered=True), Engine()
    for engine in (staggered, at_once):
        engine.make(8)
    for i in range(8):
        assert (staggered.finished[i] - at_once.finished[i]).abs().max() <= 1e-5


def test_guidance_that_ends_early_needs_fewer_rows_and_changes_nothing():
    full = Engine(guided_steps=4, slots=4)
    lean = Engine(guided_steps=4, slots=4, unconditional_rows=2)
    everywhere = Engine(slots=4)
    for engine in (full, lean, everywhere):
        engine.make(8)
    for i in range(8):
        assert (full.finished[i] - lean.finished[i]).abs().max() <= 1e-5
    assert (full.finished[3] - everywhere.finished[3]).abs().max() > 1e-3


def test_guided_slots_never_exceed_their_rows(monkeypatch):
    engine = Engine(guided_steps=5, slots=4, unconditional_rows=2)
    guided, step = [], engine.slots.in_flight.step

    def count():
        table, tick = engine.slots.table, engine.slots.in_flight
        guided.append(table.guided_R[tick.row_S].sum().item())
        step()

    monkeypatch.setattr(engine.slots.in_flight, "step", count)
    engine.make(10)
    assert max(guided) == 2


def test_images_that_start_after_guidance_ended_wait_for_none_of_its_rows():
    engine = Engine(guided_steps=4, strengths=(0.5,), slots=4, unconditional_rows=1)
    engine.slots.tick()
    assert engine.slots.busy == 4


def test_without_guidance_there_are_no_unconditional_rows(monkeypatch):
    engine = Engine(guidance=1.0, empty_TE=None)
    assert engine.slots.in_flight.kv_RTX.shape[0] == 4
    engine.make(4)
    for i in range(4):
        expected = engine.by_diffusers(engine.request(i), monkeypatch)
        assert (engine.finished[i] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("edit", ["object", "background"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_masked_edit_keeps_the_source_outside_to_the_bit(edit, solver):
    engine = Engine(
        solver, masked=True, slots=2, request=lambda i: engine.request(i, mask_edit=edit, mask_dilation_px=1)
    )
    engine.make(3)
    mask = latent_edit_mask(engine.sources.masks_DHW[:1], edit, 1, 8)
    assert 0 < mask.mean() < 1
    for i in range(3):
        request = engine.request(i)
        z0, eps = engine.latent(request), engine.noise(request)[1][None]
        z = by_hand(engine, request, z0, eps, mask)
        expected = (engine.pipeline.decode(z)[0] / 2 + 0.5).clamp(0, 1)
        assert (engine.finished[i] - expected).abs().max() <= 1e-5
        assert torch.equal(z * (1 - mask), z0 * (1 - mask))


@torch.no_grad()
def by_hand(engine, request, z0, eps, mask):
    """A masked edit on one image: the solver's step, then the noised source outside the mask."""
    grid, text = engine.grid, engine.contexts[[int(request.prompt.template), 3]]
    abar = alphas_cumprod(engine.pipeline.scheduler)
    levels = [abar[int(t)].sqrt() for t in grid.timesteps] + [torch.tensor(1.0)]
    z, x0_prev = levels[request.start] * z0 + (1 - levels[request.start] ** 2).sqrt() * eps, torch.zeros_like(z0)
    for k in range(request.start, grid.num_inference_steps):
        t = torch.tensor([grid.timesteps[k]] * 2)
        c, u = engine.pipeline.unet(torch.cat([z, z]), t, text).sample[:, None]
        m = u + request.guidance_scale * (c - u)
        row = (grid.starts_N8 if k == request.start else grid.steps_N8)[k]
        x0 = (z - row[1] * m) / row[0]
        z, x0_prev = row[2] * z + row[3] * x0 + row[4] * x0_prev, x0
        z = mask * z + (1 - mask) * (levels[k + 1] * z0 + (1 - levels[k + 1] ** 2).sqrt() * eps)
    return z


def test_recipes_without_denoising_take_no_slot_and_cost_nothing():
    def request(i):
        kind = {1: "jigsaw", 2: "jigsaw_roundtrip"}.get(i % 3)
        return dataclasses.replace(engine.request(i), recipe=kind, jigsaw_grid=4) if kind else engine.request(i)

    engine = Engine(request=request, slots=2, decode_batch=1)
    engine.make(6)
    pixels = engine.sources.pixels_DHWC
    shuffled = jigsaw(pixels[1], 4, stream(5, "jigsaw", 1))
    torch.testing.assert_close(engine.finished[1], shuffled.permute(2, 0, 1) / 255)
    moments = engine.pipeline.encode_moments(jigsaw(pixels[2], 4, stream(5, "jigsaw", 2))[None])
    z = engine.pipeline.sample_latents(moments, engine.noise(engine.request(2))[0][None])
    torch.testing.assert_close(engine.finished[2], (engine.pipeline.decode(z)[0] / 2 + 0.5).clamp(0, 1))
    assert engine.slots.counts["busy_rows"] == sum(r.cost for r in engine.order) > 0


@pytest.mark.parametrize("images", [0.4, 1.7, 6.0])
def test_steps_make_what_they_promise_at_an_even_cost(images, monkeypatch):
    engine = Engine(slots=4, decode_batch=1)
    monkeypatch.setattr(engine.slots.in_flight, "step", lambda: None)
    monkeypatch.setattr(engine.pipeline, "decode", lambda z: z)
    ticks = [engine.slots.step(images) for _ in range(150)]
    assert abs(len(engine.finished) - 150 * images) <= 2 * 4 + 1
    mean = sum(ticks[20:]) / 130
    assert max(abs(t - mean) for t in ticks[20:]) <= 1 + 0.15 * mean
    assert engine.slots.counts["busy_rows"] == 4 * sum(ticks)


def test_steps_of_free_recipes_only_keep_the_rate():
    engine = Engine(request=lambda i: dataclasses.replace(engine.request(i), recipe="jigsaw", jigsaw_grid=2))
    for _ in range(30):
        engine.slots.step(1.5)
    assert 45 <= len(engine.finished) <= 45 + 2 * 4 + 2
    for _ in range(3):
        assert engine.slots.tick() == 0  # comes back although no image ever fills a slot
    assert engine.slots.counts["ticks"] == 0  # no UNet call
    assert engine.slots.counts["finished"] == len(engine.finished)


def test_a_rejected_image_is_drawn_again_before_any_new_one():
    engine = Engine(slots=2, decode_batch=1)
    engine.make(1)
    first = engine.order[0]
    credit = engine.slots.pace.credit
    again = dataclasses.replace(first, attempt=1)
    engine.slots.retry(again)
    assert engine.slots.pace.credit == credit + first.cost
    before, old = engine.slots.next_index, engine.finished[first.image_index]
    engine.slots.tick()
    assert again in engine.slots.occupants and engine.slots.next_index <= before + 1
    engine.slots.drain()
    assert (engine.finished[first.image_index] - old).abs().max() > 0.02


def test_keys_and_values_of_a_prompt_are_kept_once_whatever_the_source_is():
    engine = Engine(slots=2)
    first = engine.request(0)
    for prompt, expected in ((Prompt("0", classes=(1,), weights=(1.0,)), 1), (Prompt(""), 1), (Prompt("0"), 1)):
        engine.slots.context = lambda request: engine.contexts[0]
        before = engine.slots.key_values.misses
        for label in (0, 1, 0):
            engine.slots._key_values(dataclasses.replace(first, prompt=prompt, label=label))
        assert engine.slots.key_values.misses - before == expected


def test_drain_finishes_what_was_begun_and_nothing_else():
    engine = Engine(slots=4)
    engine.slots.step(3.0)
    begun = {r.image_index for r in engine.slots.occupants if r}
    engine.slots.drain()
    assert begun <= set(engine.finished) and not engine.slots.busy and not engine.slots.ready
    assert len(engine.finished) == engine.slots.counts["admitted"]


@pytest.mark.parametrize("solver", ["dpmpp_2m", "lcm"])
def test_resuming_in_flight_equals_never_having_stopped(solver, tmp_path):
    stopped, resumed = (Engine(solver, masked=True, slots=3, decode_batch=4) for _ in range(2))
    while not (stopped.slots.busy == 3 and stopped.slots.ready):
        stopped.slots.step(1.3)
    stopped.slots.retry(dataclasses.replace(stopped.request(0), attempt=1))
    save_checkpoint(tmp_path, 4, stopped.slots.state_dict())
    resumed.slots.load_state_dict(load_newest(tmp_path)[1])
    for engine in (stopped, resumed):
        engine.order.clear()
        for _ in range(5):
            engine.slots.step(1.3)
    assert stopped.order and stopped.order == resumed.order
    for request in resumed.order:
        assert torch.equal(stopped.finished[request.image_index], resumed.finished[request.image_index])
    assert stopped.slots.counts == resumed.slots.counts


def test_slots_in_flight_on_other_grids_are_refused():
    """The rows they stand at would mean other steps here."""
    state = Engine("ddim", 8).slots.state_dict()
    for solver, count in (("ddim", 10), ("dpmpp_2m", 8)):
        with pytest.raises(DataError, match="on other time grids than this version .* set run.name"):
            Engine(solver, count).slots.load_state_dict(state)
    del state["grids"]  # as written before grids were named
    Engine("ddim", 8).slots.load_state_dict(state)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    engine = Engine(options=(), device="cuda", slots=4)
    for _ in range(4):
        engine.slots.step(2.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            engine.slots.step(2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(engine.finished) >= 8
