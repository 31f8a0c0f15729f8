"""What benchmarks/kernels.py times: each op against eager torch, torch.compile and its named peer, over sizes.

A case holds candidates that compute the same thing from the same random inputs, the bytes and operations the op cannot
do without, and how the error of a candidate's answer is judged. The first candidate is the baseline of the ratios.
Legend as in kernels/.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.group_norm import group_norm_silu
from kernels.guided_step import guided_step
from kernels.pixels import pixels
from kernels.supcon import supcon
from kernels.views import UNIFORMS, draw_view_parameters, views, views_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.4, 0.4, 0.4, 0.1)


@dataclass
class Case:
    """One op at one size: what is compared and what the hardware must at least do for it."""

    op: str
    shape: str
    dtype: str
    candidates: dict[str, Callable[[], tuple[torch.Tensor, ...]]]  # name -> call that returns what is judged
    bytes_moved: int  # each input read once, each output written once
    operations: int  # 2 x multiply-adds of its matrix products; 0 where bytes are all that counts
    truth: Callable[[], tuple[torch.Tensor, ...]] | None  # of the same outputs in float64; None: peers differ by design
    note: str = ""

    def error(self, name: str) -> str:
        """|out - truth| / |truth| of each output; the quality column."""
        if self.truth is None:
            return self.note
        pairs = zip(self.candidates[name](), self.truth(), strict=True)
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


def view_cases(device: torch.device, compiled: bool, reduced: bool) -> Iterator[Case]:
    """Both views of a batch, parameters drawn beforehand; the peers draw their own, as they cannot be handed any."""
    for B, side in ((64, 64), (256, 64)) if reduced else ((256, 64), (1024, 64), (256, 224), (1024, 224)):
        g = torch.Generator().manual_seed(0)
        coarse = torch.rand(B, 3, side // 4, side // 4, generator=g)
        smooth = F.interpolate(coarse, (side, side), mode="bilinear").mul(255).to(torch.uint8)
        images = smooth.permute(0, 2, 3, 1).contiguous().to(device)
        parameters = draw_view_parameters(torch.rand(B, 2, UNIFORMS, generator=g, dtype=torch.float64), side, side)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

        def call(name, images=images, parameters=parameters, dtype=dtype):
            return (views(images, parameters, MEAN, STD, dtype, implementation=name),)

        def truth(images=images, parameters=parameters, side=side):
            return (views_reference(images, parameters, MEAN, STD, torch.float32, (side, side)),)

        candidates = implementations(call, device, compiled and device.type == "cuda")
        if B * side <= 256 * 64:
            candidates["torchvision v2 per row"] = torchvision_rows(images.cpu(), side)
        if importlib.util.find_spec("kornia"):
            candidates["kornia"] = kornia_batch(images, side, dtype)
        yield Case(
            op="views",
            shape=f"B={B} V=2 {side}px",
            dtype=str(dtype).removeprefix("torch."),
            candidates=candidates,
            bytes_moved=images.numel() + 2 * images.numel() * dtype.itemsize,
            operations=0,
            truth=truth,
        )


def torchvision_rows(images_BHWC: torch.Tensor, side: int) -> Callable[[], tuple[torch.Tensor]]:
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
    rows = images_BHWC.permute(0, 3, 1, 2)
    return lambda: (torch.stack([transform(row) for _ in range(2) for row in rows]),)


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


def supcon_cases(device: torch.device, compiled: bool, reduced: bool) -> Iterator[Case]:
    """Loss and gradient, normalization included, with a third of near-OOD rows; the peers have no OOD rows and get a label for each."""
    for R in (128, 512, 2048) if reduced else (512, 2048, 8192, 16384, 65536):
        g = torch.Generator().manual_seed(0)
        start = torch.randn(R, 128, generator=g).to(device)
        labels = torch.randint(0, 20, (R // 2,), generator=g).repeat(2).to(device)
        is_ood = (torch.rand(R // 2, generator=g) < 0.3).repeat(2).to(device)
        unique = torch.where(is_ood, 1000 + torch.arange(R, device=device), labels)

        def trained(loss_of, start=start):
            x = start.detach().clone().requires_grad_()
            loss = loss_of(F.normalize(x, dim=1))
            loss.backward()
            return loss.detach(), x.grad

        def call(name, trained=trained, labels=labels, is_ood=is_ood):
            return trained(lambda z: supcon(z, labels, is_ood, implementation=name, check_values=False))

        def truth(start=start, labels=labels, is_ood=is_ood):
            x = start.double().requires_grad_()
            loss = supcon(F.normalize(x, dim=1), labels, is_ood, implementation="torch")
            loss.backward()
            return loss.detach(), x.grad

        candidates = implementations(call, device, False)
        if compiled:
            graph = torch.compile(lambda z, y, o: supcon(z, y, o, implementation="torch", check_values=False))
            candidates["torch.compile"] = lambda t=trained, f=graph, y=labels, o=is_ood: t(lambda z: f(z, y, o))
        candidates["SupContrast's formula"] = lambda t=trained, y=unique: t(lambda z: supcontrast(z, y, 0.1))
        if R <= 2048:
            candidates["pytorch-metric-learning"] = lambda t=trained, y=unique: t(metric_learning(y))
        yield Case(
            op="supcon",
            shape=f"R={R} E=128",
            dtype="float32",
            candidates=candidates,
            bytes_moved=R * (128 * 4 * 2 + 9),
            operations=6 * R * R * 128,
            truth=truth if R <= 8192 else None,
            note="too large for float64 truth",
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


def step_cases(device: torch.device, compiled: bool, reduced: bool) -> Iterator[Case]:
    """Guidance and one DDIM-like update of S slots at their own steps; the peer is a diffusers call per slot."""
    from diffusers import DDIMScheduler

    for S, side in ((16, 32),) if reduced else ((16, 64), (64, 64)):
        g = torch.Generator().manual_seed(0)
        c, u, z, x0 = (torch.randn(S, 4, side, side, generator=g).to(device) for _ in range(4))
        table = (torch.rand(50, 8, generator=g) + 0.1).to(device)
        row, w = torch.randint(0, 50, (S,), generator=g).to(device), torch.full((S,), 7.5, device=device)
        half = torch.float16 if device.type == "cuda" else torch.float32
        c, u = c.to(half), u.to(half)

        def call(name, c=c, u=u, z=z, x0=x0, table=table, row=row, w=w):
            z, x0 = z.clone(), x0.clone()
            guided_step(c, u, z, x0, table, row, w, implementation=name)
            return z, x0

        def truth(c=c, u=u, z=z, x0=x0, table=table, row=row):
            c, u, z, x0 = c.double(), u.double(), z.double(), x0.double()
            alpha, sigma, a, b, k = table.double()[row][:, :5, None, None, None].unbind(1)
            clean = (z - sigma * (u + 7.5 * (c - u))) / alpha
            return a * z + b * clean + k * x0, clean

        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(50)
        times = [scheduler.timesteps[i] for i in row.tolist()]

        def per_slot(c=c, u=u, z=z, times=times, scheduler=scheduler):
            e = (u + 7.5 * (c - u)).float()
            return (torch.stack([scheduler.step(e[s], t, z[s]).prev_sample for s, t in enumerate(times)]),)

        candidates = implementations(call, device, compiled)
        candidates["diffusers step per slot"] = per_slot
        yield Case(
            op="guided_step",
            shape=f"S={S} 4x{side}x{side}",
            dtype=str(half).removeprefix("torch."),
            candidates=candidates,
            bytes_moved=c.numel() * (2 * half.itemsize + 4 * 4),
            operations=0,
            truth=truth,
        )


def norm_cases(device: torch.device, compiled: bool, reduced: bool) -> Iterator[Case]:
    """GroupNorm and SiLU of SD's activations in channels_last, forward, and forward with backward."""
    on_gpu = device.type == "cuda"
    sizes = ((2, 64, 32), (8, 32, 64)) if reduced else ((64, 320, 64), (64, 640, 32), (64, 1280, 16), (8, 128, 512))
    for (N, C, side), backward in ((size, backward) for size in sizes for backward in (False, True)):
        g = torch.Generator().manual_seed(0)
        dtype = torch.float16 if on_gpu else torch.float32
        x = torch.randn(N, C, side, side, generator=g).to(device, dtype).to(memory_format=torch.channels_last)
        weight, bias = (torch.randn(C, generator=g).to(device, dtype) for _ in range(2))

        def call(name, x=x, weight=weight, bias=bias, backward=backward):
            x = x.detach().requires_grad_(backward)
            y = group_norm_silu(x, 32, weight, bias, implementation=name)
            if on_gpu:
                y = y.contiguous(memory_format=torch.channels_last)  # what the next convolution needs
            return (y,) if not backward else (y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0])

        def truth(x=x, weight=weight, bias=bias, backward=backward):
            x = x[:2].double().requires_grad_(backward)
            y = F.silu(F.group_norm(x, 32, weight.double(), bias.double()))
            return (y,) if not backward else (y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0])

        passes = 5 if backward else 2
        yield Case(
            op="group_norm",
            shape=f"N={N} C={C} {side}x{side}" + (" forward+backward" if backward else ""),
            dtype=str(dtype).removeprefix("torch."),
            candidates=implementations(call, device, compiled and not backward),
            bytes_moved=passes * x.numel() * dtype.itemsize,
            operations=0,
            truth=truth if N == 2 else None,
            note="judged at N = 2" if N != 2 else "",
        )


def pixel_cases(device: torch.device, compiled: bool, reduced: bool) -> Iterator[Case]:
    """Decoded images to reservoir slots; the peer is diffusers' way: numpy, then Pillow's resize, image by image."""
    for N, side, size in ((8, 64, 64), (8, 256, 64)) if reduced else ((8, 512, 64), (32, 512, 64), (32, 512, 224)):
        g = torch.Generator().manual_seed(0)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        x = torch.randn(N, 3, side, side, generator=g).mul(0.5).to(device, dtype)

        def call(name, x=x, size=size):
            return (pixels(x, size, implementation=name),)

        def truth(x=x, size=size):
            wide = F.interpolate(x.double().clamp(-1, 1), (size, size), mode="bilinear", antialias=True)
            return ((wide * 127.5 + 127.5).permute(0, 2, 3, 1),)

        candidates = implementations(call, device, compiled)
        candidates["diffusers + Pillow"] = pillow_rows(x, size)
        yield Case(
            op="pixels",
            shape=f"N={N} {side}->{size}px",
            dtype=str(dtype).removeprefix("torch."),
            candidates=candidates,
            bytes_moved=x.numel() * dtype.itemsize + N * size * size * 3,
            operations=0,
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


CASES = {
    "views": view_cases,
    "supcon": supcon_cases,
    "guided_step": step_cases,
    "group_norm": norm_cases,
    "pixels": pixel_cases,
}
