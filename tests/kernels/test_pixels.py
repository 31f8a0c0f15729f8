"""Decoded images to uint8: rounding, resizing and hostile values, and the resampling matrices that the kernels use."""

import pytest
import torch
import torch.nn.functional as F

from kernels.pixels import pixels
from kernels.resample import resample_matrix


def test_levels_are_rounded_half_up_and_clamped():
    levels = torch.arange(256, dtype=torch.float32)
    x = (levels / 127.5 - 1).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(pixels(x, 16)[0, :, :, 0].flatten(), levels.to(torch.uint8))
    x = torch.tensor([0.0, -1.5, 2.0, torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 1 / 255])
    expected = torch.tensor([128, 0, 255, 0, 255, 0, 255, 0, 128], dtype=torch.uint8)
    assert torch.equal(pixels(x.view(1, 1, 3, 3).repeat(1, 3, 1, 1), 3)[0, :, :, 2].flatten(), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layout_and_type_of_the_result(layout, dtype):
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = pixels(x.to(memory_format=layout), 8)
    assert out.dtype == torch.uint8 and out.shape == (2, 8, 8, 3) and out.is_contiguous()
    assert torch.equal(out, pixels(x, 8))


def test_shrinking_clamps_first_and_averages_what_it_covers():
    """A checkerboard of far overshoots has a mean of zero only if it is clamped before it is averaged."""
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 10.0 - 1.0).expand(1, 3, 32, 32)
    assert (pixels(board, 4).int() - 128).abs().max() <= 1


@pytest.mark.parametrize("n, m", [(64, 16), (33, 20), (16, 16), (7, 19), (50, 1), (1, 4), (512, 64)])
def test_matrices_are_the_antialiased_resize_of_torch(n, m):
    x = torch.randn(1, 1, 5, n, generator=torch.Generator().manual_seed(n))
    expected = F.interpolate(x, (5, m), mode="bilinear", antialias=True, align_corners=False)
    (matrix_mn,) = resample_matrix(torch.zeros(1), torch.tensor([n]), n, m)
    torch.testing.assert_close(x @ matrix_mn.T, expected, rtol=0, atol=3e-6)


def test_matrices_of_crops_resize_the_crop_and_mirror_it():
    start, length = torch.tensor([0, 3, 9]), torch.tensor([12, 5, 1])
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    flip = torch.tensor([False, True, False])
    out = torch.einsum("rmn,rn->rm", resample_matrix(start, length, 12, 8, flip), x)
    for row in range(3):
        crop = x[row, start[row] : start[row] + length[row]].view(1, 1, 1, -1)
        expected = F.interpolate(crop, (1, 8), mode="bilinear", antialias=True, align_corners=False).flatten()
        torch.testing.assert_close(out[row], expected.flip(0) if flip[row] else expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "x, size, message",
    [
        (torch.zeros(1, 4, 8, 8), 8, r"decoded_N3HW is float32\[1, 4, 8, 8\] on cpu; expected .*\[any, 3, any, any\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 8, r"decoded_N3HW is uint8"),
        (torch.zeros(1, 3, 8, 8), 0, r"size is 0; expected \[1, inf\]"),
        (torch.zeros(1, 3, 8, 8), 8.5, r"size is float 8.5; expected an int >= 1"),
        (torch.zeros(1, 3, 8, 8), (8, 8), r"size is tuple \(8, 8\); expected an int"),
        (torch.zeros(1, 3, 0, 8), 4, r"decoded_N3HW is float32\[1, 3, 0, 8\] on cpu; .* at least one pixel"),
    ],
)
def test_bad_input_is_named(x, size, message):
    with pytest.raises(ValueError, match=message):
        pixels(x, size)
