"""The views kernel cut into many small strips: means over strips, ragged strips, each way to read."""

import dataclasses

import pytest
import torch

from kernels import backend, views_kernel
from kernels.views import UNIFORMS, draw_view_parameters, views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def drawn(B: int, V: int, height: int, width: int, **settings):
    uniforms_BVK = torch.rand(B, V, UNIFORMS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return draw_view_parameters(uniforms_BVK, height, width, crop_scale=(0.2, 1.0), **settings)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


def cut(monkeypatch, rows: int, columns: int, pixels: int):
    settings = {"ROWS": rows, "COLUMNS": columns, "PIXELS": pixels, "num_warps": 1}
    monkeypatch.setattr(views_kernel, "launch_settings", lambda height, width: settings)


@pytest.mark.parametrize(
    "height, width, size, dtype, settings",
    [
        (7, 12, None, torch.float32, (5, 8, 1)),
        (6, 12, None, torch.float32, (4, 8, 2)),
        (5, 7, None, torch.float32, (4, 4, 1)),  # rows that begin at any byte
        (6, 16, (6, 18), torch.bfloat16, (4, 8, 2)),
        (5, 8, (6, 22), torch.float16, (8, 8, 2)),
        (5, 7, (7, 11), torch.float16, (4, 8, 2)),
        (8, 6, (5, 4), torch.float16, (4, 4, 2)),  # shrinks
        (4, 10, (5, 6), torch.float32, (4, 4, 2)),  # shrinks across alone
    ],
)
def test_strips(height, width, size, dtype, settings, device, monkeypatch, as_good_as_eager):
    cut(monkeypatch, *settings)
    images, parameters = noise(2, height, width, 3).to(device), drawn(2, 2, height, width)
    truth = views(images, parameters, MEAN, STD, size=size, implementation="torch")
    kernel, eager = (
        views(images, parameters, MEAN, STD, dtype, size=size, implementation=name) for name in ("triton", "torch")
    )
    as_good_as_eager([kernel], [eager], [truth], dtype, f"{settings}")


def test_images_that_begin_at_any_byte(device, monkeypatch):
    """A word can be read at multiples of four bytes only."""
    cut(monkeypatch, 8, 8, 1)
    images = noise(3 * 8 * 8 * 3 + 1).to(device)[1:].view(3, 8, 8, 3)
    parameters = drawn(3, 1, 8, 8)
    shifted, aligned = (views(x, parameters, MEAN, STD, implementation="triton") for x in (images, images.clone()))
    assert images.data_ptr() % 4 and torch.equal(shifted, aligned)


def test_what_was_not_drawn_is_not_launched_for(device):
    """Without contrast no mean is taken."""
    images = noise(2, 6, 8, 3).to(device)
    for jitter_p, launches in ((0.0, 1), (1.0, 2)):
        parameters = drawn(2, 2, 6, 8, jitter_p=jitter_p)
        assert (
            backend.launches_of(lambda p=parameters: views(images, p, MEAN, STD, implementation="triton")) == launches
        )


@pytest.mark.parametrize("order", [(3, 0, 1, 2), (0, 3, 2, 1), (1, 2, 3, 0), (2, 1, 0, 3)])
def test_jitters_in_any_order(order, device, as_good_as_eager):
    """Strong ones; hue at each place, and contrast at each."""
    images, parameters = noise(2, 8, 8, 3).to(device), drawn(2, 1, 8, 8, jitter=(0.9, 0.9, 0.9, 0.5), jitter_p=1.0)
    parameters = dataclasses.replace(parameters, order_BV4=torch.tensor(order).expand(2, 1, 4))
    kernel, eager = (views(images, parameters, MEAN, STD, implementation=name) for name in ("triton", "torch"))
    torch.testing.assert_close(kernel, eager, rtol=0, atol=1e-4)
