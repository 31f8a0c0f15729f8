"""Views against torchvision v2 applied row by row: the same pixels from the same parameters, the same distribution."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from kernels.view_parameters import BRIGHTNESS, CONTRAST, HUE, SATURATION, UNIFORMS, draw_view_parameters
from kernels.views import views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise with gray, black, white and saturated pixels among it."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, height, width, 3), generator=g, dtype=torch.uint8)
    pixels[:, ::3] = pixels[:, ::3, :, :1]
    pixels[:, :, ::4] = (pixels[:, :, ::4] > 127) * 255
    return pixels.to(torch.uint8)


def uniforms(*leading: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*leading, UNIFORMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torchvision_row(pixels_HWC, parameters, b, v, size):
    p = {f.name.split("_")[0]: getattr(parameters, f.name)[b, v].tolist() for f in dataclasses.fields(parameters)}
    x = TF.resized_crop(
        pixels_HWC.permute(2, 0, 1), p["top"], p["left"], p["height"], p["width"], list(size), antialias=True
    )
    x = TF.horizontal_flip(x) if p["flip"] else x
    operations = {BRIGHTNESS: TF.adjust_brightness, CONTRAST: TF.adjust_contrast}
    operations |= {SATURATION: TF.adjust_saturation, HUE: TF.adjust_hue}
    for op in p["order"]:
        x = operations[op](x, p["factor"][op])
    x = TF.rgb_to_grayscale(x, 3) if p["gray"] else x
    return TF.normalize(TF.to_dtype(x, torch.float32, scale=True), MEAN, STD)


@pytest.mark.parametrize(
    "height, width, size",
    [(32, 32, (32, 32)), (24, 40, (24, 40)), (48, 33, (16, 20)), (10, 12, (31, 7)), (1, 1, (3, 3)), (17, 1, (17, 1))],
)
def test_pixels_equal_torchvision_row_by_row(height, width, size):
    x, parameters = (
        images(12, height, width),
        draw_view_parameters(uniforms(12, 3), height, width, crop_scale=(0.1, 1.0)),
    )
    out = views(x, parameters, MEAN, STD, size=size)
    assert out.shape == (36, 3, *size) and out.is_contiguous(memory_format=torch.channels_last)
    for b in range(12):
        for v in range(3):
            expected = torchvision_row(x[b].float() / 255, parameters, b, v, size)
            torch.testing.assert_close(out[v * 12 + b], expected, rtol=0, atol=1e-4)


def test_close_to_torchvision_on_uint8_which_rounds_after_every_operation():
    x, parameters = images(16, 32, 32), draw_view_parameters(uniforms(16, 2), 32, 32)
    out = views(x, parameters, MEAN, STD)
    rounded = torch.stack([torchvision_row(x[b], parameters, b, v, (32, 32)) for v in range(2) for b in range(16)])
    assert (
        (out - rounded).abs() * torch.tensor(STD)[:, None, None] * 255
    ).mean() < 2.0  # levels of 255, cut off up to five times


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30), st.integers(1, 20))
def test_any_draw_of_any_shape_equals_torchvision(seed, height, width, side):
    x = images(1, height, width, seed=seed)
    parameters = draw_view_parameters(uniforms(1, 1, seed=seed), height, width, jitter=(0.8, 0.8, 0.8, 0.5))
    out = views(x, parameters, MEAN, STD, size=side)
    expected = torchvision_row(x[0].float() / 255, parameters, 0, 0, (side, side))
    # hue is a step where two channels tie: what float rounding decides there may differ, and only there
    assert ((out[0] - expected).abs() > 1e-3).float().mean() <= 0.02
    torch.testing.assert_close(out[0].mean(), expected.mean(), atol=0.02, rtol=0)


def test_rows_do_not_depend_on_their_neighbors():
    x, parameters = images(40, 64, 64), draw_view_parameters(uniforms(40, 2), 64, 64)
    whole = views(x, parameters, MEAN, STD)
    part = views(x[30:33].contiguous(), draw_view_parameters(uniforms(40, 2)[30:33], 64, 64), MEAN, STD)
    torch.testing.assert_close(part, torch.cat([whole[30:33], whole[70:73]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    x, parameters = images(8, 16, 16), draw_view_parameters(uniforms(8, 2), 16, 16)
    assert torch.equal(views(x, parameters, MEAN, STD, dtype), views(x, parameters, MEAN, STD).to(dtype))


def test_nothing_drawn_is_the_plain_image():
    parameters = draw_view_parameters(
        uniforms(4, 1), 20, 20, crop_scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter_p=0, grayscale_p=0, flip_p=0
    )
    out = views(images(4, 20, 20), parameters, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    torch.testing.assert_close(out, images(4, 20, 20).permute(0, 3, 1, 2).float() / 255, rtol=0, atol=1e-6)


def test_parameters_are_distributed_as_torchvision_draws_them():
    """Mean and quantiles of 20,000 crops within the error of 2,000 of torchvision's own."""
    ours = draw_view_parameters(uniforms(20_000, 1), 64, 48, crop_scale=(0.3, 1.0))
    transform = v2.RandomResizedCrop(64, scale=(0.3, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transform.make_params([torch.empty(3, 64, 48)]) for _ in range(2_000)]
    for name in ("top", "left", "height", "width"):
        mine = getattr(ours, f"{name}_BV").double().squeeze(1)
        drawn = torch.tensor([float(p[name]) for p in theirs], dtype=torch.float64)
        assert (mine.mean() - drawn.mean()).abs() < 4 * drawn.std() / 2000**0.5, name
        for q in (0.1, 0.5, 0.9):
            assert (mine.quantile(q) - drawn.quantile(q)).abs() <= 2, (name, q)


def test_jitter_is_drawn_as_color_jitter_draws_it():
    p = draw_view_parameters(
        uniforms(20_000, 1), 8, 8, jitter=(0.4, 1.5, 0.0, 0.1), jitter_p=0.8, grayscale_p=0.2, flip_p=0.5
    )
    factor = p.factor_BV4[:, 0]
    still = (factor == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1)
    assert still.float().mean() == pytest.approx(0.2, abs=0.015)
    moved = factor[~still]
    for op, low, high in ((BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.0, 2.5), (SATURATION, 1.0, 1.0), (HUE, -0.1, 0.1)):
        assert low - 1e-6 <= moved[:, op].min() and moved[:, op].max() <= high + 1e-6
        assert moved[:, op].mean() == pytest.approx((low + high) / 2, abs=0.02)
    orders = p.order_BV4[:, 0] @ torch.tensor([64, 16, 4, 1])
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 20_000 / 24 * 0.85
    assert p.gray_BV.float().mean() == pytest.approx(0.2, abs=0.015)
    assert p.flip_BV.float().mean() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("height, width, expected", [(100, 10, (40, 0, 20, 10)), (10, 100, (0, 40, 10, 20))])
def test_where_no_attempt_fits_the_largest_central_crop_is_taken(height, width, expected):
    p = draw_view_parameters(uniforms(3, 1), height, width, crop_scale=(0.99, 1.0), ratio=(0.5, 2.0))
    for name, value in zip(("top", "left", "height", "width"), expected, strict=True):
        assert (getattr(p, f"{name}_BV") == value).all()


def test_a_view_depends_on_its_own_uniforms_alone():
    few, many = draw_view_parameters(uniforms(8, 2)[:3], 64, 64), draw_view_parameters(uniforms(8, 2), 64, 64)
    for field in dataclasses.fields(few):
        assert torch.equal(getattr(few, field.name), getattr(many, field.name)[:3])


def spoil(**changes):
    return dataclasses.replace(draw_view_parameters(uniforms(2, 2), 8, 8), **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(images_BHWC=images(2, 8, 8).float()), r"images_BHWC is float32\[2, 8, 8, 3\] on cpu; expected uint8"),
        (dict(images_BHWC=images(2, 8, 8).permute(0, 3, 1, 2)), r"images_BHWC is uint8\[2, 3, 8, 8\]"),
        (
            dict(images_BHWC=images(2, 8, 8).transpose(1, 2)),
            r"images_BHWC \[2, 8, 8, 3\] has strides .* expected contiguous",
        ),
        (dict(images_BHWC=images(3, 8, 8)), r"parameters.top_BV is int64\[2, 2\] on cpu; expected int64\[3, 2\]"),
        (
            dict(images_BHWC=images(2, 7, 8)),
            r"parameters has a crop whose top \+ height leaves images_BHWC \[2, 7, 8, 3\]",
        ),
        (dict(parameters=spoil(left_BV=torch.full((2, 2), -1))), r"left \+ width leaves"),
        (dict(parameters=spoil(width_BV=torch.zeros(2, 2, dtype=torch.int64))), r"left \+ width leaves"),
        (dict(parameters=spoil(flip_BV=torch.zeros(2, 2))), r"parameters.flip_BV is float32"),
        (
            dict(parameters=spoil(order_BV4=torch.zeros(2, 2, 3, dtype=torch.int64))),
            r"parameters.order_BV4 is .* expected int64\[2, 2, 4\]",
        ),
        (dict(parameters=spoil(order_BV4=torch.full((2, 2, 4), 7))), r"order_BV4 holds a row that is no order"),
        (dict(parameters=spoil(order_BV4=torch.ones(2, 2, 4, dtype=torch.int64))), r"order_BV4 holds a row"),
        (
            dict(parameters=spoil(factor_BV4=torch.full((2, 2, 4), float("nan")))),
            r"factor_BV4 holds a value that is not",
        ),
        (dict(size=0), r"size is 0; expected a whole number of pixels >= 1"),
        (dict(size=(4, -3)), r"size is \(4, -3\); expected"),
        (dict(out_dtype=torch.uint8), r"out_dtype is torch.uint8; expected float32, float16 or bfloat16"),
        (dict(std=(0.2, 0.0, 0.2)), r"std\[1\] is 0.0; expected \(0, inf\]"),
        (dict(mean=(0.5, 0.5, 128)), r"mean\[2\] is 128; expected \[0, 1\]"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = dict(
        images_BHWC=images(2, 8, 8), parameters=draw_view_parameters(uniforms(2, 2), 8, 8), mean=MEAN, std=STD
    )
    with pytest.raises(ValueError, match=message):
        views(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(uniforms_BVK=torch.rand(2, 2, UNIFORMS)), r"uniforms_BVK is float32\[2, 2, 33\]"),
        (dict(uniforms_BVK=torch.rand(2, 2, 5, dtype=torch.float64)), r"uniforms_BVK is float64\[2, 2, 5\]"),
        (dict(crop_scale=(0.0, 1.0)), r"crop_scale\[0\] is 0.0"),
        (dict(crop_scale=(0.8, 0.5)), r"crop_scale\[0\] is 0.8; expected \(0, 0.5\]"),
        (dict(ratio=(2.0, 1.0)), r"ratio\[0\] is 2.0; expected \(0, 1.0\]"),
        (dict(jitter=(0.4, 0.4, 0.4, 0.6)), r"jitter hue is 0.6; expected \[0, 0.5\]"),
        (dict(jitter_p=1.2), r"jitter_p is 1.2; expected \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        draw_view_parameters(**{**dict(uniforms_BVK=uniforms(2, 2), height=8, width=8), **changes})
