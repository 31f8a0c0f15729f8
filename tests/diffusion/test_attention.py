"""Keys and values ahead of time, backends and their tuner: the same numbers as diffusers, chosen by measured time."""

import sys
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from modules.diffusion import attention
from modules.diffusion.attention import (
    BACKENDS,
    KeyValueCache,
    SlotAttention,
    Timing,
    attend,
    chosen,
    describe,
    install,
    layers_of,
    text_key_values,
    tune,
    unfuse,
)
from modules.errors import ConfigError
from tests.tiny import build_parts


@pytest.fixture(scope="module")
def unets():
    """The same UNet twice: as diffusers runs it, and with our processors."""
    plain, ours = build_parts()["unet"], build_parts()["unet"]
    plain.set_attn_processor(AttnProcessor2_0())
    install(ours)
    return plain, ours


def inputs(rows=3):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.tensor([10, 400, 900][:rows]),
        torch.randn(rows, 77, 32, generator=generator),
    )


@torch.no_grad()
def test_keys_and_values_ahead_of_time_change_nothing(unets):
    plain, ours = unets
    z, t, context = inputs()
    expected = plain(z, t, context).sample
    torch.testing.assert_close(ours(z, t, context).sample, expected)
    kv = text_key_values(ours, context)
    assert kv.shape == (3, 77, install(ours)) == (3, 77, 2 * 3 * 16 + 2 * 32)
    torch.testing.assert_close(ours(z, t, None, cross_attention_kwargs={"kv": kv}).sample, expected)
    assert (ours(z, t, None, cross_attention_kwargs={"kv": kv.flip(0)}).sample - expected).abs().max() > 1e-3


@torch.no_grad()
def test_fused_projections_change_nothing(unets):
    fused = build_parts()["unet"]
    install(fused, fuse=True)
    assert [layer.fused_projections for layer in layers_of(fused)] == [True, False] * (len(layers_of(fused)) // 2)
    z, t, context = inputs()
    expected = unets[0](z, t, context).sample
    torch.testing.assert_close(fused(z, t, context).sample, expected)
    more = sum(p.numel() for p in fused.parameters())
    unfuse(fused)
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in unets[0].parameters()) < more
    torch.testing.assert_close(fused(z, t, context).sample, expected)


def test_gradients_flow_through(unets):
    z, t, context = inputs()
    context.requires_grad_()
    unets[1](z, t, context).sample.square().sum().backward()
    assert context.grad.abs().sum() > 0


def test_attention_of_another_kind_is_refused():
    unet = build_parts()["unet"]
    layers_of(unet)[0].residual_connection = True
    with pytest.raises(ValueError, match="expected plain attention"):
        install(unet)


def test_prompts_are_kept_within_their_bytes(unets):
    contexts = torch.randn(4, 77, 32, generator=torch.Generator().manual_seed(2))
    size = text_key_values(unets[1], contexts[:1]).nbytes
    cache = KeyValueCache(unets[1], 2.5 * size / 2**30)
    asked = []

    def get(i, key):
        return cache.get(key, lambda: asked.append(i) or contexts[i])

    first = get(0, "a")
    for i, key in ((1, "b"), (0, "a"), (2, "c"), (0, "a"), (1, "b")):
        get(i, key)
    assert asked == [0, 1, 2, 1]  # b went when c came, since a was used after it
    assert cache.bytes == 2 * size and list(cache.kept) == ["a", "b"] and (cache.hits, cache.misses) == (2, 4)
    torch.testing.assert_close(first, text_key_values(unets[1], contexts[:1])[0])
    get(3, None)
    get(3, None)
    assert asked[-2:] == [3, 3] and None not in cache.kept
    nothing = KeyValueCache(unets[1], 0.0)
    nothing.get("a", lambda: contexts[0])
    assert not nothing.kept and nothing.bytes == 0


def fake_xformers(monkeypatch, attention):
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_xformers_gets_its_own_layout_without_copies(monkeypatch):
    got = []

    def attention(q, k, v):
        got.extend((q, k, v))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    fake_xformers(monkeypatch, attention)
    q, k, v = torch.randn(3, 2, 6, 4, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(attend("xformers", q, k, v), attend("sdpa", q, k, v))
    assert [x.data_ptr() for x in got] == [x.data_ptr() for x in (q, k, v)] and got[0].shape == (2, 6, 4, 8)


def run(unet):
    z, t, context = inputs()
    with torch.no_grad():
        unet(z, t, context)


def sdpa_in_its_layout(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def test_the_tuner_sets_the_fastest_backend_of_each_shape(monkeypatch):
    unet = build_parts()["unet"]
    install(unet)

    def only_narrow_heads(q, k, v):
        if q.shape[-1] > 4:
            raise NotImplementedError("head width 8 is not supported\nlong trace")
        return sdpa_in_its_layout(q, k, v)

    fake_xformers(monkeypatch, only_narrow_heads)
    speed = {"sdpa": 2.0, "xformers": 1.0}
    found = tune(unet, lambda: run(unet), Timer(monkeypatch, speed), candidates=("sdpa", "xformers"))
    refused = {t.shape[-1]: t.reason for t in found if t.ms is None}
    assert refused == {8: "head width 8 is not supported"}
    taken = {layer.processor.backend: layer.to_q.out_features // layer.heads for layer in layers_of(unet)}
    assert taken == {"xformers": 4, "sdpa": 8}


@pytest.mark.parametrize("ms, taken", [(1.0, "sdpa"), (0.97, "sdpa"), (0.9, "xformers")])
def test_torchs_own_choice_stays_where_no_other_is_faster_by_more_than_chance(ms, taken, monkeypatch):
    unet = build_parts()["unet"]
    install(unet)
    fake_xformers(monkeypatch, sdpa_in_its_layout)
    speed = {"xformers": ms, "sdpa": 1.0}
    found = tune(unet, lambda: run(unet), Timer(monkeypatch, speed), candidates=("xformers", "sdpa"))
    assert {layer.processor.backend for layer in layers_of(unet)} == {taken} == set(chosen(found).values())


def test_what_was_chosen_is_taken_again_without_looking_at_the_others(monkeypatch):
    unet = build_parts()["unet"]
    install(unet)
    fake_xformers(monkeypatch, sdpa_in_its_layout)
    speed, backends = {"sdpa": 2.0, "xformers": 1.0}, ("sdpa", "xformers")
    kept = chosen(tune(unet, lambda: run(unet), Timer(monkeypatch, speed), candidates=backends))
    assert set(kept.values()) == {"xformers"} and "3x16x77x4x8" in kept
    faster = {"sdpa": 1.0, "xformers": 2.0}
    kept |= {"3x16x77x4x8": "sdpa"}
    again = tune(unet, lambda: run(unet), Timer(monkeypatch, faster), candidates=backends, kept=kept)
    assert chosen(again) == kept and len(again) == len(kept)


def test_timings_are_told_a_line_a_shape_the_fastest_first():
    shape = (4, 64, 77, 8, 40)
    found = [
        Timing(shape, "sdpa", 2.0, ""),
        Timing(shape, "xformers", None, "no CUDA"),
        Timing(shape, "sdpa_flash", 1.0, ""),
    ]
    assert describe(found) == [
        "attention, 4 rows of 64 x 77, 8 heads of 40: sdpa_flash 1.000 ms, sdpa 2.000 ms, xformers no (no CUDA)"
    ]


class Timer:
    """A timer that knows which backend it times, and its time."""

    def __init__(self, monkeypatch, speed):
        self.last, real = None, attend

        def note(backend, *qkv):
            self.last = backend
            return real(backend, *qkv)

        monkeypatch.setattr("modules.diffusion.attention.attend", note)
        self.speed = speed

    def __call__(self, function):
        function()
        return self.speed[self.last]


def test_a_named_backend_that_refuses_is_an_error_with_its_reason(monkeypatch):
    unet = build_parts()["unet"]
    install(unet)

    def refuses(q, k, v):
        raise NotImplementedError("xFormers wasn't build with CUDA support\nlong trace")

    fake_xformers(monkeypatch, refuses)
    with pytest.raises(ConfigError, match="pipeline.attention is xformers, .*wasn't build with CUDA support; set it"):
        tune(unet, lambda: run(unet), lambda function: 1.0, asked="xformers")


def test_the_tuner_keeps_one_input_of_each_shape_not_every_layers(monkeypatch):
    """All layers' inputs are several times what a call holds at once: memory that slots were not fitted to."""
    unet = build_parts()["unet"]
    install(unet)
    met, alive, layers = [], [], len(layers_of(unet))

    def noted(backend, q, k, v):
        met.append(weakref.ref(q))
        return attend(backend, q, k, v)

    def timer(function):
        alive.append(sum(one() is not None for one in met[:layers]))
        return 1.0

    monkeypatch.setattr(attention, "attend", noted)
    timings = tune(unet, lambda: run(unet), timer, candidates=("sdpa",))
    assert len(timings) == 4 < layers and set(alive) == {4}


def test_the_tuner_meets_every_shape_of_the_unet_once():
    unet = build_parts()["unet"]
    install(unet)
    timed = []
    timings = tune(unet, lambda: run(unet), lambda function: timed.append(function()) or 1.0, candidates=("sdpa",))
    assert len(timed) == len(timings)
    assert sorted(t.shape for t in timings) == [
        (3, 16, 16, 4, 8),
        (3, 16, 77, 4, 8),
        (3, 64, 64, 4, 4),
        (3, 64, 77, 4, 4),
    ]
    assert all(layer.processor.backend == "sdpa" and layer.processor.seen is None for layer in layers_of(unet))


@pytest.mark.gpu
def test_every_backend_that_runs_agrees_on_stable_diffusions_shapes():
    for tokens, keys, width in ((1024, 1024, 40), (256, 77, 80), (64, 64, 160)):
        generator = torch.Generator("cuda").manual_seed(1)
        q = torch.randn(2, tokens, 8, width, device="cuda", generator=generator)
        k, v = torch.randn(2, 2, keys, 8, width, device="cuda", generator=generator)
        truth = attend("sdpa", q.double(), k.double(), v.double())
        ran = []
        for backend in BACKENDS:
            try:
                out = attend(backend, q.half(), k.half(), v.half())
            except (RuntimeError, NotImplementedError, ImportError):
                continue
            ran.append(backend)
            assert (out.double() - truth).abs().max() < 5e-3
        assert "sdpa" in ran and len(ran) > 1


def test_a_refusal_is_told_by_its_reason_and_warns_of_nothing(monkeypatch, recwarn):
    def refuse(backend):
        warnings.warn(
            "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:988.)", stacklevel=1
        )
        warnings.warn("head_dim should be a multiple of 8 (Triggered internally at sdp_utils.cpp:528.)", stacklevel=1)
        warnings.warn("cuDNN attention has been runtime disabled. (Triggered internally at x:7.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention, "attend", refuse)
    timing = attention._time((1, 2, 3, 4, 20), "sdpa_cudnn", (), lambda call: 1.0)
    assert timing.reason == "head_dim should be a multiple of 8" and not recwarn.list


def test_processors_stay_when_installed_again():
    unet = build_parts()["unet"]
    width = install(unet)
    layers_of(unet)[1].processor.backend = "sdpa_flash"
    assert install(unet) == width
    assert isinstance(layers_of(unet)[1].processor, SlotAttention)
    assert layers_of(unet)[1].processor.backend == "sdpa_flash"
