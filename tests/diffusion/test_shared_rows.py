"""Rows that are equal until the text is read, computed once: the same predictions, and nothing for other callers."""

import copy

import pytest
import torch

from modules.config import Pipeline
from modules.diffusion.attention import install, text_key_values
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.shared_rows import share_rows
from tests.tiny import build_parts

S = 5


@pytest.fixture(scope="module")
def embedded():
    """The embedded UNet, whose first block has no attention, with inputs of S slots and prompts of S + S rows."""
    pipeline = load_pipeline(Pipeline(path="embedded"))
    install(pipeline.unet)
    kv = text_key_values(pipeline.unet, pipeline.embed(["a photo of a ring"] * S + [""] * S).detach())
    return pipeline.unet, *slots_of(16), kv


@pytest.fixture(scope="module")
def like_sd():
    """A UNet whose first block has cross-attention, as Stable Diffusion's."""
    unet = build_parts()["unet"].eval().requires_grad_(False)
    install(unet)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    return unet, *slots_of(unet.config.sample_size), text_key_values(unet, text.repeat_interleave(S, 0))


@pytest.fixture(params=["embedded", "like_sd"])
def case(request):
    return request.getfixturevalue(request.param)


def slots_of(side):
    """Latents and timesteps of S slots."""
    x = torch.randn(S, 4, side, side, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([1.0, 200.0, 400.0, 600.0, 950.0])


@torch.no_grad()
def predict(unet, x, t, kv, call=None):
    arguments = {"cross_attention_kwargs": {"kv": kv}, "return_dict": False}
    return (call or unet)(x, t, None, **arguments)[0]


@pytest.mark.parametrize("slots", [None, [0, 3], [4]])
def test_predictions_are_those_of_rows_computed_twice(case, slots):
    unet, x, t, kv = case
    slot_U = None if slots is None else torch.tensor(slots)
    again = torch.arange(S) if slots is None else slot_U
    kv = kv[: S + len(again)]
    expected = predict(unet, torch.cat([x, x[again]]), torch.cat([t, t[again]]), kv)
    shared = share_rows(unet)
    found = predict(unet, x, t, kv, lambda *inputs, **named: shared.call(unet, S, slot_U, *inputs, **named))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


def test_the_blocks_before_the_text_see_each_slot_once_and_other_callers_see_no_change(embedded):
    unet, x, t, kv = embedded
    before = predict(unet, x, t, kv[:S])
    seen = []
    handle = unet.down_blocks[0].register_forward_pre_hook(
        lambda block, inputs, named: seen.append(len(named["hidden_states"])), with_kwargs=True
    )
    shared = share_rows(unet)
    assert share_rows(unet) is shared
    predict(unet, x, t, kv, lambda *inputs, **named: shared.call(unet, S, None, *inputs, **named))
    assert torch.equal(predict(unet, x, t, kv[:S]), before)
    handle.remove()
    assert seen == [S, S]


def test_a_call_that_fails_leaves_nothing_behind(case):
    unet, x, t, kv = case
    shared = share_rows(unet)
    with pytest.raises(RuntimeError):
        predict(unet, x, t, kv[:3], lambda *inputs, **named: shared.call(unet, S, None, *inputs, **named))
    assert shared.rows == shared.all_rows == 0 and shared.slot_U is None


def test_until_the_first_call_a_single_row_comes_as_it_is():
    unet = build_parts()["unet"].eval()
    install(unet)
    x, t = (rows[:1] for rows in slots_of(unet.config.sample_size))
    kv = text_key_values(unet, torch.ones(1, 7, unet.config.cross_attention_dim))
    before = predict(unet, x, t, kv)
    share_rows(unet)
    assert torch.equal(predict(unet, x, t, kv), before)


def test_a_copy_of_the_unet_has_a_sharing_of_its_own(case):
    unet, x, t, kv = case
    expected = predict(unet, torch.cat([x, x]), torch.cat([t, t]), kv)
    own = copy.deepcopy(unet)
    shared = share_rows(own)
    assert shared is not share_rows(unet)
    found = predict(own, x, t, kv, lambda *inputs, **named: shared.call(own, S, None, *inputs, **named))
    assert (found - expected).abs().max() < 1e-5


def test_what_comes_before_the_text_within_a_block_is_computed_once(case):
    unet, x, t, kv = case
    shared, seen = share_rows(unet), []
    block = next(block for block in unet.down_blocks if getattr(block, "has_cross_attention", False))
    layer = block.attentions[0].transformer_blocks[0]
    parts = [block.resnets[0].conv1, layer.attn1.to_q, layer.attn2.to_q, unet.mid_block.resnets[0].conv1]
    handles = [part.register_forward_hook(lambda part, inputs, made: seen.append(len(made))) for part in parts]
    predict(unet, x, t, kv, lambda *inputs, **named: shared.call(unet, S, None, *inputs, **named))
    for handle in handles:
        handle.remove()
    assert seen == [S, S, 2 * S, 2 * S]


def test_a_unet_without_cross_attention_is_left_alone():
    unet = build_parts()["unet"]
    for block in unet.down_blocks:
        block.has_cross_attention = False
    assert share_rows(unet) is None
