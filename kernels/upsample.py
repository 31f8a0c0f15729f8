"""Nearest-neighbour upsampling by 2 followed by a 3 x 3 convolution, fused into one convolution of the small image.

Of the nine pixels that an output pixel reads, several are copies of one source pixel, so their weights can be summed
beforehand: four products remain of nine. The form `transposed` is a transposed convolution of stride 2 with the 4 x 4
summed weights; `phases` computes the four outputs of a source pixel as channels of a 2 x 2 convolution and rearranges
them in a second pass. The weights must be frozen, as `fold` sums them once.

Along rows and along columns, with weights w0 w1 w2: output 2j is w0 x[j-1] + (w1 + w2) x[j], output 2j + 1 is
(w0 + w1) x[j] + w2 x[j+1]. Legend: N images, I and O channels, h w pixels of the small image.
"""

import torch
import torch.nn.functional as F

from kernels.checks import check_choice, check_tensor

FORMS = ("torch", "transposed", "phases")
EVEN, ODD = (3, 1), (2, 0)  # taps of the transposed convolution that even and odd outputs use, in source order


def fold(weight_OI33: torch.Tensor, form: str) -> torch.Tensor:
    """The weights that `upsample_conv` takes for `form`, in the input's dtype; summed in float32 (float64 for float64).

    transposed: [I, O, 4, 4]. phases: [4 O, I, 2, 2], for the outputs (row, column) = (even, even), (even, odd), (odd,
    even), (odd, odd). torch: the weights as they are.

    Raises ValueError for an unknown form and for weights that are not [O, I, 3, 3].
    Source: Shi et al. 2016 (1609.07009).
    """
    check_choice("form", form, FORMS)
    check_tensor("weight_OI33", weight_OI33, shape=(None, None, 3, 3))
    if form == "torch":
        return weight_OI33
    wide = weight_OI33 if weight_OI33.dtype == torch.float64 else weight_OI33.float()
    for dim in (2, 3):
        w0, w1, w2 = wide.unbind(dim)
        wide = torch.stack([w2, w1 + w2, w0 + w1, w0], dim)
    taps_OI44 = wide.to(weight_OI33.dtype)
    if form == "transposed":
        return taps_OI44.transpose(0, 1).contiguous()
    return torch.cat([taps_OI44[:, :, rows][..., columns] for rows in (EVEN, ODD) for columns in (EVEN, ODD)])


def upsample_conv(
    x_NIhw: torch.Tensor, folded: torch.Tensor, bias_O: torch.Tensor | None = None, *, form: str
) -> torch.Tensor:
    """conv3x3(nearest(x, 2), weight, padding 1) + bias, [N, I, h, w] to [N, O, 2h, 2w]; differentiable in x.

    Args:
        folded: the weights as `fold` returns them for this form.

    Raises ValueError for an unknown form and if `folded` was made for another form.
    """
    check_choice("form", form, FORMS)
    extent = {"torch": 3, "transposed": 4, "phases": 2}[form]
    check_tensor("folded", folded, shape=(None, None, extent, extent), dtypes=(x_NIhw.dtype,), device=x_NIhw.device)
    if form == "torch":
        return upsample_conv_reference(x_NIhw, folded, bias_O)
    if form == "transposed":
        return F.conv_transpose2d(x_NIhw, folded, bias_O, stride=2, padding=1)
    return _phases(x_NIhw, folded, bias_O)


def upsample_conv_reference(
    x_NIhw: torch.Tensor, weight_OI33: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """`upsample_conv` in plain torch, from the unfolded weights."""
    return F.conv2d(F.interpolate(x_NIhw, scale_factor=2.0, mode="nearest"), weight_OI33, bias_O, padding=1)


def _phases(x_NIhw: torch.Tensor, phases_4OI22: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """The form `phases`: a 2 x 2 convolution to 4 O channels, interleaved to [N, O, 2h, 2w] in channels_last."""
    (N, _, h, w), O = x_NIhw.shape, len(phases_4OI22) // 4  # noqa: E741
    y = F.conv2d(x_NIhw, phases_4OI22, None if bias_O is None else bias_O.repeat(4), padding=1)
    y = y.permute(0, 2, 3, 1).contiguous()  # h + 1 rows, w + 1 columns: odd outputs start one row or column later
    n, i, j, _ = y.stride()
    y_Nh2w2O = y.as_strided((N, h, 2, w, 2, O), (n, i, i + 2 * O, j, j + O, 1))
    return y_Nh2w2O.reshape(N, 2 * h, 2 * w, O).permute(0, 3, 1, 2)
