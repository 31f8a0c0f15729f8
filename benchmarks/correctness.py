"""Is it right before it is fast? `python -m benchmarks.correctness`.

A quick set of parity checks on the device that is about to be benchmarked: every kernel against float64, and the slot
engine against diffusers' image-to-image pipeline from the same latents and noise. A kernel may have twice the error of
the plain definition in its dtype, and a little more. The last line printed is one JSON document, in which `wrong` names
what failed: ops, or the engine. The exit code is 1 if a check fails.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks import harness, inputs, peers
from benchmarks.engine import SlotEngine, first_images, psnr_db
from benchmarks.inputs import Setting
from benchmarks.kernel_case import Case
from benchmarks.kernel_cases import SWEEPS
from kernels.upsample import FORMS
from modules.diffusion.upsampling import set_forms

MORE_THAN_EAGER = 1e-4  # relative error that a kernel may have beyond twice the definition's
DEFINITION = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}  # relative error that a definition may have
ROUNDED = 1e-2  # the same for ops that round to uint8 levels
PIXELS_FP32, PSNR_FP16_DB = 1e-4, 40.0  # largest difference and least PSNR of the engine against diffusers
IMAGES = 4
ENGINE = "engine"


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, and in words what was found and what is allowed."""

    name: str
    passed: bool
    found: str
    of: str = ENGINE  # the op that is wrong if it fails, or the engine


def kernel_checks(device: torch.device) -> Iterator[Check]:
    """Each op at small sizes against float64: the definition, and on a GPU the kernel."""
    for op, sweep in SWEEPS.items():
        for size in sweep.reduced:
            with guarded(op, f"{op} {size}") as found:
                found += _case_checks(op, sweep.build(device, False, *size))
            yield from found


@contextlib.contextmanager
def guarded(of: str, name: str) -> Iterator[list[Check]]:
    """A list to put checks into; an exception becomes a failed check and does not end the others."""
    found: list[Check] = []
    try:
        yield found
    except Exception as error:
        found.append(Check(name, False, f"failed: {harness.described(error)}", of))


def _case_checks(op: str, case: Case) -> Iterator[Check]:
    truth = [value.double() for value in case.truth()]
    errors = {}
    for name in ("eager", "triton"):
        if name not in case.candidates:
            continue
        errors[name] = _relative(case.judged(case.outputs(name)), truth)
        if name == "eager":
            allowed = ROUNDED if op == "pixels" else DEFINITION[case.dtype]
        else:
            allowed = 2 * errors["eager"] + MORE_THAN_EAGER
        what = "definition" if name == "eager" else name
        yield Check(f"{op} {case.shape} {case.dtype} {what}", errors[name] <= allowed, _of(errors[name], allowed), op)


def _relative(outputs, truth: list[torch.Tensor]) -> float:
    """The largest ||out - truth|| / ||truth|| over the outputs; inf where one is not finite."""
    found = 0.0
    for out, true in zip(outputs, truth, strict=True):
        error = ((out.double() - true).norm() / true.norm()).item()
        found = max(found, error if error == error else float("inf"))
    return found


def _of(found: float, allowed: float) -> str:
    return f"relative error {found:.2e} of {allowed:.2e}"


def engine_checks(device: torch.device, source: str) -> Iterator[Check]:
    """Images of the slot engine against diffusers' pipeline: each solver, each form of upsampling."""
    with guarded(ENGINE, f"pipeline {source}") as found:
        pipeline = inputs.load(source, device)
        images = inputs.smooth_images(IMAGES, pipeline.resolution).to(device)
        texts = inputs.prompts(IMAGES)
        moments = pipeline.encode_moments(images)
    if found:
        yield from found
        return
    for solver, form in zip(("ddim", "euler", "dpmpp_2m"), FORMS, strict=True):
        setting = Setting(images=IMAGES, solver=solver, num_inference_steps=20)
        with guarded(ENGINE, _named(setting, form)) as found:
            found.append(_engine_check(pipeline, setting, form, moments, texts))
        yield from found


def _engine_check(pipeline, setting: Setting, form: str, moments: torch.Tensor, texts: list[str]) -> Check:
    engine = SlotEngine(inputs.own_copy(pipeline), setting, moments, texts, slots=IMAGES)
    set_forms(form, engine.pipeline.unet, engine.pipeline.vae)
    made, z0, eps = first_images(engine)
    reference = peers.from_noise(peers.image_to_image(pipeline, setting), z0, eps, texts, setting)
    largest = (made.float() - reference.float()).abs().max().item()
    psnr = psnr_db(made, reference)
    if pipeline.dtype == torch.float32:
        passed, allowed = largest <= PIXELS_FP32, f"{PIXELS_FP32:g} largest difference"
    else:
        passed, allowed = psnr >= PSNR_FP16_DB, f"{PSNR_FP16_DB:g} dB at least"
    found = f"PSNR {psnr:.1f} dB, largest difference {largest:.1e}; {allowed}"
    return Check(_named(setting, form), passed and made.isfinite().all().item(), found)


def _named(setting: Setting, form: str) -> str:
    return f"slots {setting.solver} {setting.num_inference_steps} steps, upsampling {form} = diffusers"


def main(argv: list[str] | None = None) -> dict:
    """Run the checks, print them and the JSON document; returns that document."""
    parser = argparse.ArgumentParser(prog="benchmarks.correctness", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--pipeline", default="", help="random | embedded | path; default: random on a GPU, else embedded"
    )
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    checks: list[Check] = []
    conditions, lost = harness.conditions(device), False
    source = options.pipeline or inputs.default_pipeline(device)
    for found in (engine_checks(device, source), kernel_checks(device)):  # last, as a kernel may take the device down
        for check in found:
            checks.append(check)
            print(f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.found}", flush=True)
            if lost := not check.passed and harness.is_lost(device):
                break  # all that follows would fail for this reason: it is untested, not wrong
        if lost:
            break
    document = {
        "benchmark": "correctness",
        **conditions,
        "passed": all(check.passed for check in checks),
        "device_lost": lost,
        "wrong": sorted({check.of for check in checks if not check.passed}),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    harness.finish(document)
    return document


if __name__ == "__main__":
    sys.exit(0 if main()["passed"] else 1)
