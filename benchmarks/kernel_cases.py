"""The cases of benchmarks/kernels.py: each op against eager torch, torch.compile and its named peer, over sizes.

Legend as in kernels/.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.kernel_case import Case, implementations
from benchmarks.kernel_views import view_case
from kernels.group_norm import group_norm_silu
from kernels.guided_step import guided_step
from kernels.pixels import pixels
from kernels.supcon import supcon


def supcon_case(device: torch.device, compiled: bool, R: int) -> Case:
    """Loss and gradient, including normalization, with a third of near-OOD rows, each its own label for the peers."""
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
        torch._dynamo.reset()
        graph = torch.compile(loss_by("torch"), dynamic=False)
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
    """The loss as its authors' repository computes it: masks and log-probabilities of the whole R x R matrix.

    Rows without a positive are left out of the mean, as in kernels/supcon.py. Source: Khosla et al. 2020 (2004.11362)
    eq. 2.
    """
    logits = z_RE @ z_RE.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z_RE), device=z_RE.device)
    mask = (labels_R[:, None] == labels_R).float() * others
    log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    count = mask.sum(1)
    mean = (mask * log_probability).sum(1) / count.clamp(min=1)
    anchors = count > 0  # a mask, not indexing, which would wait for a GPU
    return -torch.where(anchors, mean, 0.0).sum() / anchors.sum()


def metric_learning(labels_R: torch.Tensor):
    """pytorch-metric-learning's SupConLoss on fixed labels."""
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=0.1)
    return lambda z: loss(z, labels_R)


def step_case(device: torch.device, compiled: bool, S: int, side: int, production: bool = False) -> Case:
    """Guidance and one DDIM-like update of S slots at their own steps; the peer is a diffusers call per slot.

    production: a step with everything it can have in a tick: predictions in channels_last, half as many unconditional
    predictions as slots, noise, and a mask with the source outside it. diffusers' schedulers have no such step.
    """
    g = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    c, u, z, x0 = (torch.randn(S, 4, side, side, generator=g).to(device) for _ in range(4))
    c, u, state = c.to(dtype), u.to(dtype), (z.clone(), x0.clone())
    # a + b / alpha + c < 1, so that latents stay finite when they are stepped again and again
    table = (torch.rand(50, 8, generator=g) / 10 + torch.tensor([0.9, 0.4, 0.3, 0.2, 0.1, 0, 0, 0])).to(device)
    row, w = torch.randint(0, 50, (S,), generator=g).to(device), torch.full((S,), 7.5, device=device)
    parts = {}
    if production:
        c, u = (t.to(memory_format=torch.channels_last) for t in (c, u[: max(S // 2, 1)]))
        u_row = torch.arange(S) // 2  # every second slot is past its guided steps
        parts["unconditional_row_S"] = torch.where(torch.arange(S) % 2 == 0, u_row, -1).to(device)
        parts["noise_SNchw"] = torch.randn(S, 2, 4, side, side, generator=g).to(device, dtype)
        parts["noise_step_S"] = torch.randint(0, 2, (S,), generator=g).to(device)
        parts["mask_S1hw"] = (torch.rand(S, 1, side, side, generator=g) > 0.5).to(device, dtype)
        parts |= {
            name: torch.randn(S, 4, side, side, generator=g).to(device, dtype) for name in ("source_Schw", "eps_Schw")
        }

    def call(name):
        guided_step(c, u, *state, table, row, w, implementation=name, **parts)
        return state

    def prepare():
        for now, start in zip(state, (z, x0), strict=True):
            now.copy_(start)

    def truth():
        alpha, sigma, a, b, k, d, *after = table.double()[row][:, :, None, None, None].unbind(1)
        e, own = c.double(), slice(None, None, 2) if production else slice(None)
        e[own] = u.double() + 7.5 * (e[own] - u.double())
        clean = (z.double() - sigma * e) / alpha
        stepped = a * z.double() + b * clean + k * x0.double()
        if production:
            noise, mask, source, eps = (
                parts[n].double() for n in ("noise_SNchw", "mask_S1hw", "source_Schw", "eps_Schw")
            )
            stepped += d * noise[torch.arange(S, device=device), parts["noise_step_S"]]
            stepped = mask * stepped + (1 - mask) * (after[0] * source + after[1] * eps)
        return stepped, clean

    @functools.cache
    def peer():
        from diffusers import DDIMScheduler  # where it is not installed, the peer's row says so

        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(50)
        return scheduler, [scheduler.timesteps[i] for i in row.tolist()]

    def per_slot():
        scheduler, times = peer()
        e = (u + 7.5 * (c - u)).float()
        return (torch.stack([scheduler.step(e[s], t, z[s]).prev_sample for s, t in enumerate(times)]),)

    return Case(
        op="guided_step",
        shape=f"S={S} 4x{side}x{side}" + " channels_last, noise, mask" * production,
        dtype=str(dtype).removeprefix("torch."),
        candidates=implementations(call, device, compiled)
        | ({} if production else {"diffusers step per slot": per_slot}),
        bytes_moved=z.numel() * 4 * 4
        + dtype.itemsize * (c.numel() + u.numel() + production * (3 * z.numel() + z.numel() // 4)),
        truth=truth,
        unjudged={"diffusers step per slot": "its own coefficients"},
        prepare=prepare,
        captured=True,
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
        truth=lambda: run(
            functools.partial(group_norm_silu, implementation="torch"), x[:2].double(), weight.double(), bias.double()
        ),
        captured=not backward,
    )


def pixel_case(device: torch.device, compiled: bool, N: int, side: int, size: int, channels_last: bool = False) -> Case:
    """Decoded images to reservoir pixels; the peer is diffusers' way: numpy, then Pillow's resize, image by image.

    channels_last: input as a decoder in that layout outputs it, which is how it runs on a GPU.
    """
    g = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(N, 3, side, side, generator=g).mul(0.5).to(device, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)

    def truth():
        resized = F.interpolate(x.double().clamp(-1, 1), (size, size), mode="bilinear", antialias=True)
        return ((resized * 127.5 + 127.5).permute(0, 2, 3, 1).cpu(),)

    return Case(
        op="pixels",
        shape=f"N={N} {side}->{size}px" + " channels_last" * channels_last,
        dtype=str(dtype).removeprefix("torch."),
        candidates=implementations(lambda name: (pixels(x, size, implementation=name),), device, compiled)
        | {"diffusers + Pillow": pillow_rows(x, size)},
        bytes_moved=x.numel() * dtype.itemsize + N * size * size * 3,
        judged=lambda outputs: (outputs[0].cpu(),),
        truth=truth,
    )


def pillow_rows(x_N3HW: torch.Tensor, size: int) -> Callable[[], tuple[torch.Tensor]]:
    """The way of a pipeline that returns PIL images."""
    import numpy as np
    from PIL import Image

    @functools.cache
    def processor():
        from diffusers.image_processor import VaeImageProcessor  # where it is not installed, the peer's row says so

        return VaeImageProcessor()

    def call():
        images = processor().postprocess(x_N3HW.float(), output_type="pil")
        resized = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in images]
        return (torch.from_numpy(np.stack(resized)),)

    return call


@dataclass(frozen=True)
class Sweep:
    """How the cases of one op are made, and at which sizes, the most informative first."""

    build: Callable[..., Case]  # (device, whether to compile, *size)
    reduced: tuple[tuple, ...]  # on a CPU
    full: tuple[tuple, ...]  # on a GPU: sizes that fill it


SWEEPS = {
    "views": Sweep(view_case, ((256, 64), (64, 64)), ((256, 224), (256, 64), (1024, 224), (1024, 64))),
    "supcon": Sweep(supcon_case, ((512,), (128,), (2048,)), ((8192,), (65536,), (512,), (2048,), (16384,))),
    "guided_step": Sweep(step_case, ((16, 32), (16, 32, True)), ((64, 64), (64, 64, True), (16, 64))),
    "group_norm": Sweep(
        norm_case,
        ((2, 64, 32, False), (2, 64, 32, True), (8, 32, 64, False)),
        (
            (64, 320, 64, False),
            (8, 128, 512, False),
            (64, 1280, 16, False),
            (64, 640, 32, False),
            (64, 320, 64, True),
            (8, 128, 512, True),
        ),
    ),
    "pixels": Sweep(
        pixel_case,
        ((8, 256, 64), (8, 64, 64), (8, 256, 64, True)),
        ((32, 512, 224), (32, 512, 224, True), (32, 512, 64), (8, 512, 64)),
    ),
}
