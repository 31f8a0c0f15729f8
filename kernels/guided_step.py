"""Guidance and one solver step for every slot, in place. Each slot has its own time, time grid and guidance scale.

The coefficients are in a table on the device (made by modules/diffusion/schedule.py), and each slot holds a row number.
One launch with the same arguments thus serves every step of every solver and can be part of a captured graph. Legend:
S slots, U unconditional rows, K table rows, N steps with noise, c h w latent.
"""

import torch

from kernels import backend
from kernels.backend import jit, launch, tl
from kernels.checks import check_choice, check_tensor

COLUMNS = 8  # the table's columns: alpha, sigma, a, b, c, d, alpha_next, sigma_next
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def guided_step(
    conditional_Schw: torch.Tensor,
    unconditional_Uchw: torch.Tensor | None,
    z_Schw: torch.Tensor,
    x0_prev_Schw: torch.Tensor,
    table_K8: torch.Tensor,
    row_S: torch.Tensor,
    guidance_S: torch.Tensor,
    *,
    unconditional_row_S: torch.Tensor | None = None,
    prediction_type: str = "epsilon",
    noise_SNchw: torch.Tensor | None = None,
    noise_step_S: torch.Tensor | None = None,
    mask_S1hw: torch.Tensor | None = None,
    source_Schw: torch.Tensor | None = None,
    eps_Schw: torch.Tensor | None = None,
    implementation: str = "auto",
) -> None:
    """Advance the latents z of every slot by one step, in place, and set x0_prev to the predicted images.

    For slot s, with e_c its conditional prediction, u the unconditional prediction in row unconditional_row_S[s] (None:
    row s), w its guidance scale, and (alpha, sigma, a, b, c, d, alpha', sigma') row row_S[s] of the table:

        e  = u + w (e_c - u), or e_c where w = 1 or unconditional_row_S[s] < 0
        x0 = (z - sigma e) / alpha  for epsilon,  alpha z - sigma e  for v_prediction
        z  <- a z + b x0 + c x0_prev + d noise[s, noise_step_S[s]];  x0_prev <- x0

    then, with a mask m (1 where the latent may change): z <- m z + (1 - m) (alpha' source + sigma' eps).

    Predictions are contiguous or channels_last. Predictions, noise, mask, source and eps: fp32, fp16 or bf16; z,
    x0_prev, table_K8 and guidance_S: fp32; row_S, unconditional_row_S and noise_step_S: int64. Arithmetic is fp32.

    Raises ValueError for a wrong shape, dtype, device or layout, if only some of the noise or mask arguments are given,
    and, on CPU tensors, for a row or step that does not exist. On a GPU, where this check would have to wait for the
    device, the kernel fills that slot with NaN instead. Source: DDIM 2010.02502 eq. 12; DPM-Solver++ 2211.01095;
    classifier-free guidance 2207.12598 eq. 6.
    """
    parts = dict(
        unconditional_Uchw=unconditional_Uchw,
        unconditional_row_S=unconditional_row_S,
        noise_SNchw=noise_SNchw,
        noise_step_S=noise_step_S,
        mask_S1hw=mask_S1hw,
        source_Schw=source_Schw,
        eps_Schw=eps_Schw,
    )
    _check(conditional_Schw, z_Schw, x0_prev_Schw, table_K8, row_S, guidance_S, prediction_type, parts)
    if z_Schw.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_rows(table_K8, row_S, parts)
    run = guided_step_reference
    if backend.choose("guided_step", implementation, z_Schw.device).name == "triton":
        run = guided_step_triton
    run(conditional_Schw, z_Schw, x0_prev_Schw, table_K8, row_S, guidance_S, prediction_type, **parts)


@torch.no_grad()
def guided_step_reference(
    conditional_Schw, z_Schw, x0_prev_Schw, table_K8, row_S, guidance_S, prediction_type, *,
    unconditional_Uchw, unconditional_row_S, noise_SNchw, noise_step_S, mask_S1hw, source_Schw, eps_Schw,
):  # fmt: skip
    """`guided_step` in plain torch."""
    alpha, sigma, a, b, c, d, alpha_next, sigma_next = table_K8[row_S][:, :, None, None, None].unbind(1)
    e = conditional_Schw.float()
    if unconditional_Uchw is not None:
        guided_S, u = guidance_S != 1, unconditional_Uchw
        if unconditional_row_S is not None:
            guided_S = guided_S & (unconditional_row_S >= 0)
            u = u[unconditional_row_S.clamp(min=0)]
        w = guidance_S[:, None, None, None]
        e = torch.where(guided_S[:, None, None, None], u.float() + w * (e - u.float()), e)
    x0 = (z_Schw - sigma * e) / alpha if prediction_type == "epsilon" else alpha * z_Schw - sigma * e
    z = a * z_Schw + b * x0 + c * x0_prev_Schw
    if noise_SNchw is not None:
        z += d * noise_SNchw[torch.arange(len(z), device=z.device), noise_step_S].float()
    if mask_S1hw is not None:
        mask = mask_S1hw.float()
        z = mask * z + (1 - mask) * (alpha_next * source_Schw.float() + sigma_next * eps_Schw.float())
    z_Schw.copy_(z)
    x0_prev_Schw.copy_(x0)


def guided_step_triton(
    conditional_Schw, z_Schw, x0_prev_Schw, table_K8, row_S, guidance_S, prediction_type, *,
    unconditional_Uchw, unconditional_row_S, noise_SNchw, noise_step_S, mask_S1hw, source_Schw, eps_Schw,
):  # fmt: skip
    """`guided_step` in one launch. For a tensor that is None another is passed, which the kernel never reads."""
    S = len(z_Schw)
    latent = z_Schw[0].numel()
    blocks = _blocks()
    block = blocks["BLOCK"]
    absent = z_Schw
    launch(
        _guided_step_kernel,
        (-(-latent // block), S),
        conditional_Schw,
        absent if unconditional_Uchw is None else unconditional_Uchw,
        z_Schw,
        x0_prev_Schw,
        table_K8,
        row_S,
        guidance_S,
        row_S if unconditional_row_S is None else unconditional_row_S,
        absent if noise_SNchw is None else noise_SNchw,
        row_S if noise_step_S is None else noise_step_S,
        *(absent if part is None else part for part in (mask_S1hw, source_Schw, eps_Schw)),
        latent,
        z_Schw[0, 0].numel(),
        *_strides(conditional_Schw),
        *_strides(conditional_Schw if unconditional_Uchw is None else unconditional_Uchw),
        len(table_K8),
        S if unconditional_Uchw is None else len(unconditional_Uchw),
        0 if noise_SNchw is None else noise_SNchw.shape[1],
        GUIDED=unconditional_Uchw is not None,
        MAPPED=unconditional_row_S is not None,
        EPSILON=prediction_type == "epsilon",
        NOISE=noise_SNchw is not None,
        MASK=mask_S1hw is not None,
        FLAT=all(part is None or part.is_contiguous() for part in (conditional_Schw, unconditional_Uchw)),
        **blocks,
    )


def _blocks() -> dict:
    """Launch settings: numbers per program, few enough that all programs of a typical tick run at once."""
    return {"BLOCK": 64} if backend.interpreted() else {"BLOCK": 512, "num_warps": 4}


@jit(unspecialized=("rows", "unconditional_rows"))
def _guided_step_kernel(
    conditional_ptr, unconditional_ptr, z_ptr, x0_prev_ptr, table_ptr, row_ptr, guidance_ptr, unconditional_row_ptr,
    noise_ptr, noise_step_ptr, mask_ptr, source_ptr, eps_ptr, latent, plane, conditional_c, conditional_p, unconditional_c, unconditional_p,
    rows, unconditional_rows, noise_steps,
    GUIDED: tl.constexpr, MAPPED: tl.constexpr, EPSILON: tl.constexpr, NOISE: tl.constexpr, MASK: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one slot's latent. A row or step that does not exist is never read; its numbers become NaN.

    FLAT: predictions have the memory layout of the latents. Loads that depend on no other load come first, to overlap.
    """
    s = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < latent
    at, channel, place = s * latent + k, k // plane, k % plane
    row = tl.load(row_ptr + s)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    x0_prev = tl.load(x0_prev_ptr + at, mask=inside, other=0.0)
    e_in_slot = k if FLAT else channel * conditional_c + place * conditional_p
    e = tl.load(conditional_ptr + s * latent + e_in_slot, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        w = tl.load(guidance_ptr + s)
        u_in_slot = k if FLAT else channel * unconditional_c + place * unconditional_p
        own = s
        guided = w != 1.0
        if MAPPED:
            own = tl.load(unconditional_row_ptr + s)
            guided = guided & (own >= 0)
            own = tl.where(guided, own, unconditional_rows)  # one past the last row, so nothing is read
        there = inside & (own < unconditional_rows)
        u = tl.load(unconditional_ptr + own * latent + u_in_slot, mask=there, other=float("nan")).to(tl.float32)
        e = tl.where(guided, u + w * (e - u), e)
    known = (row >= 0) & (row < rows)
    coefficient_ptr = table_ptr + row * 8
    alpha, sigma = _coefficient(coefficient_ptr, known), _coefficient(coefficient_ptr + 1, known)
    if EPSILON:
        x0 = (z - sigma * e) / alpha
    else:
        x0 = alpha * z - sigma * e
    a, b = _coefficient(coefficient_ptr + 2, known), _coefficient(coefficient_ptr + 3, known)
    z = a * z + b * x0 + _coefficient(coefficient_ptr + 4, known) * x0_prev
    if NOISE:
        step = tl.load(noise_step_ptr + s)
        there = inside & (step >= 0) & (step < noise_steps)
        noise = tl.load(noise_ptr + (s * noise_steps + step) * latent + k, mask=there, other=float("nan"))
        z += _coefficient(coefficient_ptr + 5, known) * noise.to(tl.float32)
    if MASK:
        m = tl.load(mask_ptr + s * plane + place, mask=inside, other=1.0).to(tl.float32)
        source = tl.load(source_ptr + at, mask=inside, other=0.0).to(tl.float32)
        eps = tl.load(eps_ptr + at, mask=inside, other=0.0).to(tl.float32)
        kept = _coefficient(coefficient_ptr + 6, known) * source + _coefficient(coefficient_ptr + 7, known) * eps
        z = m * z + (1 - m) * kept
    tl.store(z_ptr + at, z, mask=inside)
    tl.store(x0_prev_ptr + at, x0, mask=inside)


@jit
def _coefficient(ptr, known):
    return tl.load(ptr, mask=known, other=float("nan"))


def _strides(x_Schw: torch.Tensor) -> tuple[int, int]:
    """The strides of a channel and of a pixel: (h w, 1) if contiguous, (1, channels) in channels_last."""
    channels, plane = x_Schw.shape[1], x_Schw[0, 0].numel()
    return (plane, 1) if x_Schw.is_contiguous() else (1, channels)


def _check_rows(table_K8, row_S, parts):
    """Raise ValueError if a slot asks for a row or a step that does not exist."""
    u, noise_SNchw = parts["unconditional_Uchw"], parts["noise_SNchw"]
    asked = [("row_S", row_S, 0, len(table_K8), "table_K8")]
    if parts["unconditional_row_S"] is not None:  # any negative number means no unconditional row
        asked.append(("unconditional_row_S", parts["unconditional_row_S"], None, len(u), "unconditional_Uchw"))
    if noise_SNchw is not None:
        asked.append(("noise_step_S", parts["noise_step_S"], 0, noise_SNchw.shape[1], "noise_SNchw"))
    for name, at_S, low, high, of in asked:
        for s, at in enumerate(at_S.tolist()):
            if at >= high or (low is not None and at < low):
                raise ValueError(f"{name} is {at} in slot {s}; {of} has {high}")


def _check(conditional_Schw, z_Schw, x0_prev_Schw, table_K8, row_S, guidance_S, prediction_type, parts):
    check_tensor("z_Schw", z_Schw, shape=(None, None, None, None), dtypes=(torch.float32,))
    S, c, h, w = z_Schw.shape
    device, f32, i64 = z_Schw.device, (torch.float32,), (torch.int64,)
    check_tensor("conditional_Schw", conditional_Schw, shape=(S, c, h, w), dtypes=FLOATS, device=device)
    check_tensor("x0_prev_Schw", x0_prev_Schw, shape=(S, c, h, w), dtypes=f32, device=device)
    check_tensor("table_K8", table_K8, shape=(None, COLUMNS), dtypes=f32, device=device)
    check_tensor("row_S", row_S, shape=(S,), dtypes=i64, device=device)
    check_tensor("guidance_S", guidance_S, shape=(S,), dtypes=f32, device=device)
    check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction"))
    rows = S if parts["unconditional_row_S"] is None else None
    expected = dict(
        unconditional_Uchw=((rows, c, h, w), FLOATS),
        unconditional_row_S=((S,), i64),
        noise_SNchw=((S, None, c, h, w), FLOATS),
        noise_step_S=((S,), i64),
        mask_S1hw=((S, 1, h, w), FLOATS),
        source_Schw=((S, c, h, w), FLOATS),
        eps_Schw=((S, c, h, w), FLOATS),
    )
    present = {name: part for name, part in parts.items() if part is not None}
    for name, part in present.items():
        check_tensor(name, part, shape=expected[name][0], dtypes=expected[name][1], device=device)
    for group in (("noise_SNchw", "noise_step_S"), ("mask_S1hw", "source_Schw", "eps_Schw")):
        missing = [name for name in group if name not in present]
        if missing and len(missing) < len(group):
            raise ValueError(f"{missing[0]} is None; expected a tensor, as for {', '.join(set(group) - set(missing))}")
    if "unconditional_row_S" in present and "unconditional_Uchw" not in present:
        raise ValueError("unconditional_Uchw is None; expected a tensor, as for unconditional_row_S")
    always = {"z_Schw": z_Schw, "x0_prev_Schw": x0_prev_Schw, "table_K8": table_K8}
    always |= {"row_S": row_S, "guidance_S": guidance_S}
    for name, part in (present | always).items():
        if not part.is_contiguous() and name != "unconditional_Uchw":
            raise ValueError(f"{name} {list(part.shape)} has strides {part.stride()}; expected contiguous")
    for name, part in (("conditional_Schw", conditional_Schw), ("unconditional_Uchw", parts["unconditional_Uchw"])):
        layouts = (torch.contiguous_format, torch.channels_last)
        if part is not None and not any(part.is_contiguous(memory_format=layout) for layout in layouts):
            raise ValueError(
                f"{name} {list(part.shape)} has strides {part.stride()}; expected contiguous or channels_last"
            )
