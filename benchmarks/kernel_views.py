"""The views op against its peers: torchvision v2 row by row, and kornia's composition.

Separate from the other cases because there is more to compare: peers that draw their own parameters, peers that are
given ours, and a form of the definition without host-side selection of rows, which a compiler can trace. Legend as in
kernels/views.py.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import replayed
from benchmarks.kernel_case import Case, implementations
from kernels.resample import crop_centers
from kernels.staging import upload
from kernels.view_parameters import CONTRAST, HUE, SATURATION
from kernels.views import GRAY_3, UNIFORMS, ViewParameters, device_tables, draw_view_parameters, launch_views, views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.4, 0.4, 0.4, 0.1)
WITH_HOST = "triton, with checks and tables"  # a complete call, as in a training step


def view_case(device: torch.device, compiled: bool, B: int, side: int) -> Case:
    """Both views of a batch. The parameters are drawn beforehand; two peers are given none and draw their own.

    On a GPU "triton" and "torch.compile" are replays of a graph with the parameters on the device; the eager definition
    and WITH_HOST are complete calls.
    """
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(B, 3, side // 4, side // 4, generator=g)
    rows_B3HW = F.interpolate(coarse, (side, side), mode="bilinear").mul(255).to(torch.uint8)
    images = rows_B3HW.permute(0, 2, 3, 1).contiguous().to(device)
    parameters = draw_view_parameters(torch.rand(B, 2, UNIFORMS, generator=g, dtype=torch.float64), side, side)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    candidates = implementations(
        lambda name: (views(images, parameters, MEAN, STD, dtype, implementation=name),),
        device,
        compiled,
        eager=dense_views(images, parameters, dtype),
    )
    if device.type == "cuda":  # a call's host part takes longer than the device's: the kernel is timed without it
        tables = device_tables(parameters, device)
        candidates[WITH_HOST] = candidates["triton"]
        candidates["triton"] = replayed(lambda: (launch_views(images, tables, MEAN, STD, dtype, (side, side)),))
        if compiled:
            candidates["torch.compile"] = replayed(candidates["torch.compile"])
    if B * side <= 256 * 64:
        candidates["torchvision v2 per row"] = torchvision_rows(rows_B3HW, side)
        candidates["torchvision, same parameters"] = lambda: (same_rows(rows_B3HW, parameters, B),)
    candidates["kornia"] = kornia_batch(images, side, dtype)  # where it is not installed, its row says so
    return Case(
        op="views",
        shape=f"B={B} V=2 {side}px",
        dtype=str(dtype).removeprefix("torch."),
        candidates=candidates,
        bytes_moved=images.numel() + 2 * images.numel() * dtype.itemsize,
        judged=lambda outputs: (torch.cat([outputs[0][:16], outputs[0][B : B + 16]]).cpu(),),
        truth=lambda: (same_rows(rows_B3HW.float() / 255, parameters, 16),),
        unjudged=dict.fromkeys(("torchvision v2 per row", "kornia"), "draws its own parameters"),
    )


def dense_views(images_BHWC: torch.Tensor, parameters: ViewParameters, dtype: torch.dtype) -> Callable[[], tuple]:
    """A call of the definition in which every row goes through every step, for the compiler; the image size is kept.

    The definition turns the hue of selected rows only, and the selection is known to the host alone.
    """
    device, (B, H, W, _) = images_BHWC.device, images_BHWC.shape
    geometry_R6, op_R4, factor_R4 = (upload(table, device) for table in parameters.rows())
    top_R, left_R, height_R, width_R, flip_R, gray_R = geometry_R6.unbind(1)
    hue_R4 = op_R4 == HUE
    f_R4 = factor_R4.masked_fill(hue_R4, 1.0)
    mean_R4, own_R4 = (1 - f_R4) * (op_R4 == CONTRAST), (1 - f_R4) * (op_R4 == SATURATION)
    turned_R4, V = hue_R4 & (factor_R4 != 0), len(op_R4) // B
    mean_311, std_311 = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def column(table: torch.Tensor) -> torch.Tensor:
        return table[:, None, None, None]

    def call():
        source_R3HW = (images_BHWC.permute(0, 3, 1, 2).float() / 255).repeat(V, 1, 1, 1)
        y_RH = crop_centers(top_R, height_R, H).mul(2).add(1).div(H).sub(1)
        x_RW = crop_centers(left_R, width_R, W, flip_R != 0).mul(2).add(1).div(W).sub(1)
        shape = (V * B, H, W)
        grid_RHW2 = torch.stack([x_RW[:, None, :].expand(shape), y_RH[:, :, None].expand(shape)], dim=3)
        x = F.grid_sample(source_R3HW, grid_RHW2, mode="bilinear", padding_mode="border", align_corners=False)
        for place in range(4):
            gray = _gray(x)
            target = column(mean_R4[:, place]) * gray.mean((2, 3), keepdim=True) + column(own_R4[:, place]) * gray
            x = (column(f_R4[:, place]) * x + target).clamp(0, 1)
            x = torch.where(column(turned_R4[:, place]), _turned(x, column(factor_R4[:, place])), x)
        x = torch.where(column(gray_R) != 0, _gray(x), x)
        return (((x - mean_311) / std_311).to(dtype).contiguous(memory_format=torch.channels_last),)

    return call


def _gray(x_R3HW: torch.Tensor) -> torch.Tensor:
    r, g, b = x_R3HW.split(1, dim=1)
    return GRAY_3[0] * r + GRAY_3[1] * g + GRAY_3[2] * b


def _turned(x_R3HW: torch.Tensor, turn_R111: torch.Tensor) -> torch.Tensor:
    r, g, b = x_R3HW.split(1, dim=1)
    high, low = x_R3HW.amax(1, keepdim=True), x_R3HW.amin(1, keepdim=True)
    chroma = high - low
    hue = torch.where(g == high, b - r + 2 * chroma, r - g + 4 * chroma)
    hue = torch.where(r == high, g - b, hue) / chroma.clamp(min=1e-12) + 6 * turn_R111
    hue = hue - 6 * torch.floor(hue / 6)
    parts = [(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()]
    return low + chroma * torch.cat(parts, 1).clamp(0, 1)


def same_rows(images_B3HW: torch.Tensor, parameters: ViewParameters, count: int) -> torch.Tensor:
    """The views of the first `count` images by torchvision's functions, row by row, with our parameters."""
    from torchvision.transforms.v2 import functional as TF

    p, size = parameters, list(images_B3HW.shape[2:])
    jitters = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    out = []
    for v in range(p.top_BV.shape[1]):
        for b in range(count):
            box = (field[b, v].item() for field in (p.top_BV, p.left_BV, p.height_BV, p.width_BV))
            x = TF.resized_crop(images_B3HW[b], *box, size, antialias=True)
            x = TF.horizontal_flip(x) if p.flip_BV[b, v] else x
            factors = p.factor_BV4[b, v].tolist()
            if factors != [1.0, 1.0, 1.0, 0.0]:
                for op in p.order_BV4[b, v].tolist():
                    x = jitters[op](x, factors[op])
            x = TF.rgb_to_grayscale(x, 3) if p.gray_BV[b, v] else x
            out.append(TF.normalize(TF.to_dtype(x, torch.float32, scale=True), MEAN, STD))
    return torch.stack(out)


def torchvision_rows(images_B3HW: torch.Tensor, side: int) -> Callable[[], tuple[torch.Tensor]]:
    """torchvision's transforms, drawn and applied row by row on the CPU."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda: (torch.stack([transform(row) for _ in range(2) for row in images_B3HW]),)


def kornia_batch(images_BHWC: torch.Tensor, side: int, dtype: torch.dtype) -> Callable[[], tuple[torch.Tensor]]:
    """kornia's composition of the same augmentations, per row on the device."""

    @functools.cache
    def transform():
        try:
            import kornia.augmentation as K
        except ImportError as error:
            raise ImportError("kornia is not installed; the extra `bench` of pyproject.toml names it") from error

        return K.AugmentationSequential(
            K.RandomResizedCrop((side, side), scale=(0.2, 1.0)),
            K.RandomHorizontalFlip(),
            K.ColorJitter(*JITTER, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

    def call():
        x = images_BHWC.permute(0, 3, 1, 2).float() / 255
        return (torch.cat([transform()(x), transform()(x)]).to(dtype),)

    return call
