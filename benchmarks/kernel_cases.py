"""What benchmarks/kernels.py times: each op against eager torch, torch.compile and its named peer, over sizes.

A case holds candidates that compute the same thing from the same random inputs, the bytes and operations the op cannot
do without, and how the error of a candidate's answer is judged. The first candidate is the baseline of the ratios.
Legend as in kernels/.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from kernels.group_norm import group_norm_silu
from kernels.guided_step import guided_step
from kernels.pixels import pixels
from kernels.supcon import supcon
from kernels.views import UNIFORMS, ViewParameters, draw_view_parameters, views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.4, 0.4, 0.4, 0.1)


def everything(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """All outputs of an op, where each is compared with its truth."""
    return outputs


@dataclass
class Case:
    """One op at one size: what is compared and what the hardware must at least do for it."""

    op: str
    shape: str
    dtype: str
    candidates: dict[str, Callable[[], tuple[torch.Tensor, ...]]]  # name -> call that returns its outputs
    bytes_moved: int  # each input read once, each output written once
    truth: Callable[[], tuple[torch.Tensor, ...]]  # of `judged` outputs, in float64 or by an independent library
    operations: int = 0  # 2 x multiply-adds of its matrix products; 0 where bytes are all that counts
    judged: Callable[[tuple], tuple] = everything  # the part of the outputs that is compared
    unjudged: dict[str, str] = field(default_factory=dict)  # candidates that answer another question, and which

    def error(self, name: str) -> str:
        """|out - truth| / |truth| of each output: the quality column."""
        if name in self.unjudged:
            return self.unjudged[name]
        pairs = zip(self.judged(self.candidates[name]()), self.truth(), strict=True)
        errors = [((out.double() - true.double()).norm() / true.double().norm()).item() for out, true in pairs]
        return "relative error " + " ".join(f"{error:.1e}" for error in errors)


def implementations(call: Callable[[str], tuple], device: torch.device, compiled: bool, eager: Callable | None = None):
    """The op's own candidates: eager definition, the same compiled, and the kernel where there is a GPU."""
    found = {"eager": lambda: call("torch")}
    if compiled:
        graph = torch.compile(eager or (lambda: call("torch")), dynamic=False)
        found["torch.compile"] = lambda: graph()
    if device.type == "cuda":
        found["triton"] = lambda: call("triton")
    return found


def view_case(device: torch.device, compiled: bool, B: int, side: int) -> Case:
    """Both views of a batch. The parameters are drawn beforehand; two peers draw their own, being handed none."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(B, 3, side // 4, side // 4, generator=g)
    rows_B3HW = F.interpolate(coarse, (side, side), mode="bilinear").mul(255).to(torch.uint8)
    images = rows_B3HW.permute(0, 2, 3, 1).contiguous().to(device)
    parameters = draw_view_parameters(torch.rand(B, 2, UNIFORMS, generator=g, dtype=torch.float64), side, side)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    candidates = implementations(
        lambda name: (views(images, parameters, MEAN, STD, dtype, implementation=name),),
        device,
        compiled and device.type == "cuda",  # on a CPU its compilation alone takes minutes
    )
    if B * side <= 256 * 64:
        candidates["torchvision v2 per row"] = torchvision_rows(rows_B3HW, side)
        candidates["torchvision, same parameters"] = lambda: (same_rows(rows_B3HW, parameters, B),)
    if importlib.util.find_spec("kornia"):
        candidates["kornia"] = kornia_batch(images, side, dtype)
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


def same_rows(images_B3HW: torch.Tensor, parameters: ViewParameters, count: int) -> torch.Tensor:
    """Views of the first `count` images by torchvision's functions, row by row, with our parameters."""
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
            x = TF.rgb_to_grayscale(x, 3) if p.grey_BV[b, v] else x
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
    import kornia.augmentation as K

    transform = K.AugmentationSequential(
        K.RandomResizedCrop((side, side), scale=(0.2, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*JITTER, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )

    def call():
        x = images_BHWC.permute(0, 3, 1, 2).float() / 255
        return (torch.cat([transform(x), transform(x)]).to(dtype),)

    return call


def supcon_case(device: torch.device, compiled: bool, R: int) -> Case:
    """Loss and gradient, normalization included, with a third of near-OOD rows; peers get a label for each of those."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(R, 128, generator=g).to(device)
    labels = torch.randint(0, 20, (R // 2,), generator=g).repeat(2).to(device)
    is_ood = (torch.rand(R // 2, generator=g) < 0.3).repeat(2).to(device)
    unique = torch.where(is_ood, 1000 + torch.arange(R, device=device), labels)

    def trained(loss_of, dtype=torch.float32):
        x = start.detach().to(dtype, copy=True).requires_grad_()
        loss = loss_of(F.normalize(x, dim=1))
        loss.backward()
        return loss.detach(), x.grad

    def loss_by(name):
        return lambda z: supcon(z, labels, is_ood, implementation=name, check_values=False)

    candidates = implementations(lambda name: trained(loss_by(name)), device, compiled=False)
    if compiled:
        graph = torch.compile(loss_by("torch"))
        candidates["torch.compile"] = lambda: trained(graph)
    candidates["SupContrast's formula"] = lambda: trained(lambda z: supcontrast(z, unique, 0.1))
    if R <= 2048:
        candidates["pytorch-metric-learning"] = lambda: trained(metric_learning(unique))
    return Case(
        op="supcon",
        shape=f"R={R} E=128",
        dtype="float32",
        candidates=candidates,
        bytes_moved=R * (128 * 4 * 2 + 9),
        operations=6 * R * R * 128,
        truth=lambda: trained(loss_by("torch"), torch.float64),
        unjudged=dict.fromkeys(candidates, "too large for float64 truth") if R > 8192 else {},
    )


def supcontrast(z_RE: torch.Tensor, labels_R: torch.Tensor, temperature: float) -> torch.Tensor:
    """The loss as its authors' repository arranges it: masks and log-probabilities of the whole R x R matrix.

    Rows without a positive leave the mean, as in kernels/supcon.py. Source: Khosla et al. 2020 (2004.11362) eq. 2.
    """
    logits = z_RE @ z_RE.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z_RE), device=z_RE.device)
    mask = (labels_R[:, None] == labels_R).float() * others
    log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    count = mask.sum(1)
    mean = (mask * log_probability).sum(1) / count.clamp(min=1)
    return -mean[count > 0].mean()


def metric_learning(labels_R: torch.Tensor):
    """pytorch-metric-learning's SupConLoss on fixed labels."""
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=0.1)
    return lambda z: loss(z, labels_R)


def step_case(device: torch.device, compiled: bool, S: int, side: int) -> Case:
    """Guidance and one DDIM-like update of S slots at their own steps; the peer is a diffusers call per slot."""
    from diffusers import DDIMScheduler

    g = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    c, u, z, x0 = (torch.randn(S, 4, side, side, generator=g).to(device) for _ in range(4))
    c, u = c.to(dtype), u.to(dtype)
    table = (torch.rand(50, 8, generator=g) + 0.1).to(device)
    row, w = torch.randint(0, 50, (S,), generator=g).to(device), torch.full((S,), 7.5, device=device)

    def call(name):
        state = z.clone(), x0.clone()
        guided_step(c, u, *state, table, row, w, implementation=name)
        return state

    def truth():
        alpha, sigma, a, b, k = table.double()[row][:, :5, None, None, None].unbind(1)
        clean = (z.double() - sigma * (u.double() + 7.5 * (c.double() - u.double()))) / alpha
        return a * z.double() + b * clean + k * x0.double(), clean

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    times = [scheduler.timesteps[i] for i in row.tolist()]

    def per_slot():
        e = (u + 7.5 * (c - u)).float()
        return (torch.stack([scheduler.step(e[s], t, z[s]).prev_sample for s, t in enumerate(times)]),)

    return Case(
        op="guided_step",
        shape=f"S={S} 4x{side}x{side}",
        dtype=str(dtype).removeprefix("torch."),
        candidates=implementations(call, device, compiled) | {"diffusers step per slot": per_slot},
        bytes_moved=c.numel() * (2 * dtype.itemsize + 4 * 4),
        truth=truth,
        unjudged={"diffusers step per slot": "its own coefficients"},
    )


def norm_case(device: torch.device, compiled: bool, N: int, C: int, side: int, backward: bool) -> Case:
    """GroupNorm and SiLU of an SD activation in channels_last, forward or forward with backward."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(N, C, side, side, generator=g).to(device, dtype).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(C, generator=g).to(device, dtype) for _ in range(2))

    def run(norm, x, weight, bias):
        x = x.detach().requires_grad_(backward)
        y = norm(x, 32, weight, bias)
        if device.type == "cuda":
            y = y.contiguous(memory_format=torch.channels_last)  # what the next convolution needs
        return (y.detach(), *(torch.autograd.grad(y, x, torch.ones_like(y)) if backward else ()))

    return Case(
        op="group_norm",
        shape=f"N={N} C={C} {side}x{side}" + (" forward+backward" if backward else ""),
        dtype=str(dtype).removeprefix("torch."),
        candidates=implementations(
            lambda name: run(functools.partial(group_norm_silu, implementation=name), x, weight, bias),
            device,
            compiled and not backward,
        ),
        bytes_moved=(5 if backward else 2) * x.numel() * dtype.itemsize,
        judged=lambda outputs: tuple(t[:2] for t in outputs),
        truth=lambda: run(group_norm_silu, x[:2].double(), weight.double(), bias.double()),
    )


def pixel_case(device: torch.device, compiled: bool, N: int, side: int, size: int) -> Case:
    """Decoded images to reservoir slots; the peer is diffusers' way: numpy, then Pillow's resize, image by image."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(N, 3, side, side, generator=g).mul(0.5).to(device, dtype)

    def truth():
        resized = F.interpolate(x.double().clamp(-1, 1), (size, size), mode="bilinear", antialias=True)
        return ((resized * 127.5 + 127.5).permute(0, 2, 3, 1).cpu(),)

    return Case(
        op="pixels",
        shape=f"N={N} {side}->{size}px",
        dtype=str(dtype).removeprefix("torch."),
        candidates=implementations(lambda name: (pixels(x, size, implementation=name),), device, compiled)
        | {"diffusers + Pillow": pillow_rows(x, size)},
        bytes_moved=x.numel() * dtype.itemsize + N * size * size * 3,
        judged=lambda outputs: (outputs[0].cpu(),),
        truth=truth,
    )


def pillow_rows(x_N3HW: torch.Tensor, size: int) -> Callable[[], tuple[torch.Tensor]]:
    """The route of a pipeline that answers in PIL images."""
    import numpy as np
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    processor = VaeImageProcessor()

    def call():
        images = processor.postprocess(x_N3HW.float(), output_type="pil")
        resized = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in images]
        return (torch.from_numpy(np.stack(resized)),)

    return call


@dataclass(frozen=True)
class Sweep:
    """How cases of one op are made, and from which sizes."""

    build: Callable[..., Case]
    reduced: tuple[tuple, ...]  # on a CPU
    full: tuple[tuple, ...]  # on a GPU: sizes that fill it

    def cases(self, device: torch.device, compiled: bool, reduced: bool) -> Iterator[Case]:
        """One case at a time, so that the tensors of the last are free before the next is made."""
        for size in self.reduced if reduced else self.full:
            yield self.build(device, compiled, *size)


SWEEPS = {
    "views": Sweep(view_case, ((64, 64), (256, 64)), ((256, 64), (1024, 64), (256, 224), (1024, 224))),
    "supcon": Sweep(supcon_case, ((128,), (512,), (2048,)), ((512,), (2048,), (8192,), (16384,), (65536,))),
    "guided_step": Sweep(step_case, ((16, 32),), ((16, 64), (64, 64))),
    "group_norm": Sweep(
        norm_case,
        ((2, 64, 32, False), (2, 64, 32, True), (8, 32, 64, False)),
        (
            (64, 320, 64, False),
            (64, 320, 64, True),
            (64, 640, 32, False),
            (64, 1280, 16, False),
            (8, 128, 512, False),
            (8, 128, 512, True),
        ),
    ),
    "pixels": Sweep(pixel_case, ((8, 64, 64), (8, 256, 64)), ((8, 512, 64), (32, 512, 64), (32, 512, 224))),
}
