"""Views: real rows see the same ones in every arm; strong augmentation is torchvision's, row by row."""

import dataclasses
import math

import pytest
import torch
from torchvision.transforms.v2 import functional as vision

from modules.config import Learning
from modules.data import strong
from modules.data.views import MEAN, STD, plain_view, two_views
from modules.runtime import stream

STANDARD, STRONG = Learning(), Learning(augment="strong")


def images(count=6, size=16):
    return torch.randint(0, 256, (count, size, size, 3), generator=stream(0, "images"), dtype=torch.uint8)


@pytest.mark.parametrize("learning", [STANDARD, STRONG], ids=["standard", "strong"])
@pytest.mark.parametrize("few", [1, 4])
def test_views_of_a_row_do_not_depend_on_the_rows_that_follow(learning, few):
    every = two_views(images(), seed=3, step=5, learning=learning)
    first = two_views(images()[:few], seed=3, step=5, learning=learning)
    torch.testing.assert_close(first[:few], every[:few], rtol=0, atol=1e-6)
    torch.testing.assert_close(first[few:], every[6 : 6 + few], rtol=0, atol=1e-6)


@pytest.mark.parametrize("learning", [STANDARD, STRONG], ids=["standard", "strong"])
def test_seed_step_row_and_view_all_matter(learning):
    same = images(1, 64).expand(4, -1, -1, -1).contiguous()  # a shift by 32 pixels leaves part of 64
    runs = [two_views(same, seed=seed, step=step, learning=learning) for seed, step in ((0, 0), (0, 1), (1, 0))]
    rows = torch.cat(runs)
    assert rows.flatten(1).unique(dim=0).shape[0] == 24


@pytest.mark.parametrize("learning", [STANDARD, STRONG], ids=["standard", "strong"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_dtype_and_layout(learning, dtype):
    out = two_views(images(), seed=0, step=0, learning=learning, out_dtype=dtype)
    assert out.shape == (12, 3, 16, 16) and out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_nothing_random_but_the_crop_gives_the_plain_view():
    learning = dataclasses.replace(STANDARD, crop_scale=(1.0, 1.0), jitter_p=0.0, grayscale_p=0.0)
    flat = images(5, 1).expand(5, 16, 16, 3).contiguous()  # one color an image: a crop of it is the same image
    views = two_views(flat, seed=0, step=0, learning=learning)
    torch.testing.assert_close(views, plain_view(flat).repeat(2, 1, 1, 1), rtol=0, atol=2e-6)


def test_plain_view_by_hand():
    out = plain_view(images(2))
    expected = (images(2)[1, 3, 5].double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(out[1, :, 3, 5].double(), expected, rtol=0, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


def by_torchvision(name, x_3HW, magnitude):
    shear = math.degrees(math.atan(magnitude))
    corner = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "center": [0, 0]}
    slide = {"angle": 0.0, "scale": 1.0, "shear": [0.0, 0.0]}
    return {
        "shear_x": lambda: vision.affine(x_3HW, shear=[shear, 0.0], **corner),
        "shear_y": lambda: vision.affine(x_3HW, shear=[0.0, shear], **corner),
        "translate_x": lambda: vision.affine(x_3HW, translate=[int(magnitude), 0], **slide),
        "translate_y": lambda: vision.affine(x_3HW, translate=[0, int(magnitude)], **slide),
        "rotate": lambda: vision.rotate(x_3HW, magnitude),
        "brightness": lambda: vision.adjust_brightness(x_3HW, 1 + magnitude),
        "color": lambda: vision.adjust_saturation(x_3HW, 1 + magnitude),
        "contrast": lambda: vision.adjust_contrast(x_3HW, 1 + magnitude),
        "sharpness": lambda: vision.adjust_sharpness(x_3HW, 1 + magnitude),
        "posterize": lambda: vision.posterize(x_3HW, int(magnitude)),
        "solarize": lambda: vision.solarize(x_3HW, magnitude),
        "autocontrast": lambda: vision.autocontrast(x_3HW),
        "equalize": lambda: vision.equalize(x_3HW),
        "identity": lambda: x_3HW,
    }[name]()


@pytest.mark.parametrize("name", strong.OPERATIONS)
@pytest.mark.parametrize("size", [(33, 33), (24, 31)])
def test_each_operation_is_torchvisions(name, size):
    magnitudes = {
        "translate_x": (-7.9, 3.2),
        "translate_y": (-7.9, 3.2),
        "rotate": (-77.0, 131.0),
        "posterize": (3.0, 8.0),
        "solarize": (0.2, 0.8),
    }.get(name, (-0.63, 0.95))
    x_N3HW = torch.rand(2, 3, *size, generator=stream(0, "x"))
    ours = strong.apply(name, x_N3HW, torch.tensor(magnitudes))
    for row, magnitude in enumerate(magnitudes):
        expected = by_torchvision(name, x_N3HW[row], magnitude)
        differs = (ours[row] - expected).abs().amax(0) > 1e-5
        allowed = 0.01 if name in strong.GEOMETRIC else 0.0  # a sample between two pixels may round either way
        assert differs.float().mean() <= allowed, name
    assert name == "identity" or not torch.equal(ours, x_N3HW)


def test_a_row_gets_the_operation_magnitude_and_sign_of_its_uniforms():
    x_R3HW = torch.rand(3, 3, 8, 8, generator=stream(0, "x"))
    brightness = (strong.OPERATIONS.index("brightness") + 0.5) / len(strong.OPERATIONS)
    uniforms_RK = torch.zeros(3, strong.UNIFORMS, dtype=torch.float64)
    uniforms_RK[1] = torch.tensor([brightness, 0.999, 0.2] + [0.0] * (strong.UNIFORMS - 3))  # largest, negative
    uniforms_RK[2] = torch.tensor([brightness, 0.999, 0.7] + [0.0] * (strong.UNIFORMS - 3))  # largest, positive
    out_R3HW = strong.strong_augment(x_R3HW, uniforms_RK)
    assert torch.equal(out_R3HW[0], x_R3HW[0])
    torch.testing.assert_close(out_R3HW[1], 0.01 * x_R3HW[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out_R3HW[2], (1.99 * x_R3HW[2]).clamp(max=1), rtol=1e-5, atol=1e-6)


def test_erased_boxes_have_the_shares_that_were_asked_for():
    uniforms_RK = torch.rand(4000, strong.UNIFORMS, dtype=torch.float64, generator=stream(0, "u"))
    erased_RHW = strong.erase(torch.ones(4000, 3, 20, 20), uniforms_RK) == 0
    assert torch.equal(erased_RHW[:, 0], erased_RHW[:, 2])
    shares = erased_RHW[:, 0].float().mean((1, 2))
    hit = shares > 0
    assert torch.equal(hit, uniforms_RK[:, 3] < strong.ERASE_P)
    assert shares[hit].min() > 0.01 and shares[hit].max() < 0.36
    assert abs(shares[hit].mean() - 0.17) < 0.02
    for row in hit.nonzero().squeeze(1)[:50]:  # one box: as many pixels as its rows times its columns
        mask_HW = erased_RHW[row, 0]
        assert mask_HW.sum() == mask_HW.any(1).sum() * mask_HW.any(0).sum()


@pytest.mark.gpu
@pytest.mark.parametrize("learning", [STANDARD, STRONG], ids=["standard", "strong"])
def test_a_gpu_gives_the_same_views(learning):
    cpu = two_views(images(), seed=0, step=0, learning=learning)
    gpu = two_views(images().cuda(), seed=0, step=0, learning=learning).cpu()
    assert ((cpu - gpu).abs() > 1e-3).float().mean() < 0.01
