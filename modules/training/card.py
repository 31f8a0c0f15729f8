"""The run card: every choice made for a run, by its settings or for its machine, with the reason."""

import torch

from kernels import backend
from modules.learning.encoder import choose_arch
from modules.rules import batch_rows, generated_rows
from modules.runtime import dtype_name
from modules.training.job import Job


def run_card(job: Job) -> list[tuple[str, str, str]]:
    """The rows of the card: (what, value, reason) for each choice."""
    config, runtime = job.config, job.runtime
    generation, learning = config.generation, config.learning
    counts = {name: len(images.items) for name, images in job.sets.images.items()}
    arch = choose_arch(config.encoder.arch, config.data.image_size)
    card = [
        ("data", config.data.root, ", ".join(f"{count} {name}" for name, count in counts.items())),
        ("device", str(runtime.device.value), runtime.device.reason),
        ("precision", dtype_name(runtime.precision.value), runtime.precision.reason),
        ("threads", str(runtime.threads.value), runtime.threads.reason),
        *_kernel_rows(job.device),
        ("encoder", str(arch.value), arch.reason),
        ("method", learning.method, f"{learning.steps} steps, {batch_rows(config):.4g} rows a batch, two views each"),
    ]
    if job.pipeline is None:
        return [*card, ("generation", "off", "generation.synthetic_fraction is 0")]
    needed, plan, choices = generated_rows(config), job.plan, job.choices
    reuse = needed / generation.images_per_step if generation.images_per_step else 0
    dtype = dtype_name(runtime.pipeline_dtype.value)
    return [
        *card,
        ("pipeline", config.pipeline.path, f"{job.pipeline.resolution} px, {dtype}: {runtime.pipeline_dtype.reason}"),
        ("generation", f"{generation.images_per_step:g} images a step",
         f"{100 * generation.synthetic_fraction:.0f} % of a batch, so each serves {reuse:.1f} times, those of the prefill apart"),
        ("preset", plan.preset, "; ".join(plan.reasons)),
        ("solver", plan.sampler, f"guidance {plan.guidance_scale:g}"),
        *((name.replace("_", " "), str(choice.value), choice.reason) for name, choice in choices.items()),
        ("positives", _shares(generation.strengths, "strength "), "shares of the positives"),
        ("near-OOD", _shares(config.near_ood.recipes),
         f"{100 * generation.near_ood_fraction:.0f} % of generated images, strength {config.near_ood.strength:g}"),
        *_noise_rows(job),
    ]  # fmt: skip


def _kernel_rows(device: torch.device) -> list[tuple[str, str, str]]:
    """One row per distinct choice of a kernel implementation, listing the ops it applies to."""
    by_choice: dict = {}
    for op, choice in backend.explain(device).items():
        by_choice.setdefault(choice, []).append(op)
    return [("kernels", f"{choice.name}: {', '.join(ops)}", choice.reason) for choice, ops in by_choice.items()]


def _noise_rows(job: Job) -> list[tuple[str, str, str]]:
    """near_ood.noise as a sigma per vector component, if token_noise is used: papers give sigma, not a length."""
    near_ood = job.config.near_ood
    if job.tokens is None or not near_ood.recipes.get("token_noise", 0) > 0:
        return []
    vectors_CKE = job.tokens.vectors_CKE
    sigma = near_ood.noise * vectors_CKE.norm(dim=-1).mean().item() / vectors_CKE.shape[-1] ** 0.5
    return [
        (
            "token noise",
            f"sigma {sigma:.3g}",
            f"of each number of a vector; near_ood.noise is {near_ood.noise:g} of its length",
        )
    ]


def _shares(weights: dict, prefix: str = "") -> str:
    """Weights as text: "strength 0.2", or "strength 50 %, token_mix 50 %"."""
    used = {key: weight for key, weight in weights.items() if weight > 0}
    if len(used) == 1:
        return f"{prefix}{next(iter(used))}"
    return ", ".join(f"{prefix}{key} {100 * weight / sum(used.values()):.0f} %" for key, weight in used.items())
