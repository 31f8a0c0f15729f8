"""Is it right before it is fast? `python -m benchmarks.correctness`.

A quick set of parity checks on the device that is about to be measured: every kernel against float64, and the slot
engine against diffusers' own image-to-image pipeline from the same latents and the same noise. A kernel may err as much
as the plain definition errs at that dtype, and a little more. The last line printed is one JSON document; the exit code
is 1 if a check fails.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks import harness, inputs, peers
from benchmarks.engine import SlotEngine, first_images, psnr_db
from benchmarks.inputs import Setting
from benchmarks.kernel_cases import SWEEPS, Case
from modules.runtime import quiet_libraries

MORE_THAN_EAGER = 1e-4  # relative error that a kernel may add to twice the definition's own
DEFINITION = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}  # relative error that a definition may have
ROUNDED = 1e-2  # of ops that round to uint8 levels
PIXELS_FP32, PSNR_FP16_DB = 1e-4, 40.0  # of the engine against diffusers
IMAGES = 4


@dataclass(frozen=True)
class Check:
    """One claim, what was found and what is allowed."""

    name: str
    passed: bool
    found: str


def kernel_checks(device: torch.device) -> Iterator[Check]:
    """Each op at small sizes against float64: the definition, and on a GPU the kernel."""
    for op, sweep in SWEEPS.items():
        for case in sweep.cases(device, False, True):
            yield from _case_checks(op, case)


def _case_checks(op: str, case: Case) -> Iterator[Check]:
    truth = [value.double() for value in case.truth()]
    errors = {
        name: _relative(case.judged(case.candidates[name]()), truth)
        for name in ("eager", "triton")
        if name in case.candidates
    }
    allowed = ROUNDED if op == "pixels" else DEFINITION[case.dtype]
    yield Check(f"{op} {case.shape} {case.dtype} definition", errors["eager"] <= allowed, _of(errors["eager"], allowed))
    if "triton" in errors:
        allowed = 2 * errors["eager"] + MORE_THAN_EAGER
        yield Check(
            f"{op} {case.shape} {case.dtype} triton", errors["triton"] <= allowed, _of(errors["triton"], allowed)
        )


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
    """Images of the slot engine against diffusers' pipeline, by solver."""
    pipeline = inputs.load(source, device)
    images = inputs.smooth_images(IMAGES, pipeline.resolution).to(device)
    texts = inputs.prompts(IMAGES)
    moments = pipeline.encode_moments(images)
    for solver, steps in (("ddim", 20), ("euler", 20), ("dpmpp_2m", 20)):
        setting = Setting(images=IMAGES, solver=solver, num_inference_steps=steps)
        engine = SlotEngine(inputs.own_copy(pipeline), setting, moments, texts, slots=IMAGES)
        made, z0, eps = first_images(engine)
        reference = peers.from_noise(peers.image_to_image(pipeline, setting), z0, eps, texts, setting)
        largest = (made.float() - reference.float()).abs().max().item()
        psnr = psnr_db(made, reference)
        if pipeline.dtype == torch.float32:
            passed, allowed = largest <= PIXELS_FP32, f"{PIXELS_FP32:g} largest difference"
        else:
            passed, allowed = psnr >= PSNR_FP16_DB, f"{PSNR_FP16_DB:g} dB at least"
        found = f"PSNR {psnr:.1f} dB, largest difference {largest:.1e}; {allowed}"
        yield Check(f"slots {solver} {steps} steps = diffusers", passed and made.isfinite().all().item(), found)


def main(argv: list[str] | None = None) -> dict:
    """Run the checks, print them and the JSON document; returns that document."""
    parser = argparse.ArgumentParser(prog="benchmarks.correctness", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--pipeline", default="", help="random | embedded | path; default: random on a GPU, else embedded"
    )
    options = parser.parse_args(argv)
    quiet_libraries()
    device = torch.device(options.device)
    checks: list[Check] = []
    for found in (kernel_checks(device), engine_checks(device, options.pipeline or inputs.default_pipeline(device))):
        for check in found:
            checks.append(check)
            print(f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.found}", flush=True)
    document = {
        "benchmark": "correctness",
        **harness.conditions(device),
        "passed": all(check.passed for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    harness.finish(document)
    return document


if __name__ == "__main__":
    sys.exit(0 if main()["passed"] else 1)
