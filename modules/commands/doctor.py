"""`trainer.py doctor`: reports what this machine has and which accelerators work, as text to paste into an issue.

Needs no config. Every accelerator is tested by the call that training would make; a compiler may take half a minute.

    --device=cpu|cuda      the device to test (cuda if there is one)
"""

from collections.abc import Callable

from kernels import backend
from modules.commands.flags import FLAGS, split_flags
from modules.config import Pipeline, Run
from modules.console import Console
from modules.errors import ConfigError
from modules.probes import Probe, accelerators, hardware
from modules.ranges import CHOICES
from modules.runtime import Runtime, dtype_name, environment, resolve_runtime
from modules.training.timing import measure_ceilings


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[..., None]
) -> list[Probe]:
    """Probe everything and print the results; returns the probes. `path` may be empty or a flag: there is no config.

    Raises:
        ConfigError: an unknown flag, a setting (there is no config to change), or --device=cuda without a GPU.
    """
    flags, rest = split_flags([path, *overrides] if path else overrides, FLAGS["doctor"])
    if rest:
        raise ConfigError(f"doctor takes no CONFIG and no settings, found {rest[0]!r}; leave it out")
    name = flags.get("device", "auto")
    if name not in CHOICES["run.device"]:
        raise ConfigError(f"command line: --device is {name!r}; choose one of {', '.join(CHOICES['run.device'])}")
    runtime = resolve_runtime(Run(device=name), Pipeline())
    device = runtime.device.value
    found = environment()
    console.line("```")
    console.line(f"commit {found['commit'] or 'unknown'}, python {found['python']}, {found['platform']}")
    console.line(
        f"{found['cpu']}, {found['cores']} cores, torch uses {runtime.threads.value}: {runtime.threads.reason}"
    )
    console.line(f"GPU: {found['gpu'] or 'none'}; torch was built for CUDA {found['cuda'] or '-'}")
    console.line(f"device: {device} ({runtime.device.reason})")
    for what, value in hardware(device):
        console.line(f"  {what}: {value}")
    console.line(
        "packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in found["packages"].items())
    )
    console.line("defaults: " + _defaults(runtime))
    ceilings = measure_ceilings(device, runtime.precision.value)
    console.line(f"measured: {ceilings.tflop_per_s:.3g} TFLOP/s, {ceilings.gib_per_s:.3g} GiB/s ({ceilings.what})")
    console.line("accelerators, each asked by a real call:")
    probes = accelerators(device)
    for probe in probes:
        console.line(f"  {'works' if probe.works else 'no   '}  {probe.name}: {probe.detail}")
    console.line("kernels under run.kernels auto:")
    by_choice: dict[backend.Choice, list[str]] = {}
    for op, choice in backend.explain(device).items():
        by_choice.setdefault(choice, []).append(op)
    for choice, ops in by_choice.items():
        console.line(f"  {', '.join(ops)}: {choice.name} ({choice.reason})")
    console.line("```")
    return probes


def _defaults(runtime: Runtime) -> str:
    parts = {"precision": runtime.precision, "pipeline": runtime.pipeline_dtype}
    return "; ".join(f"{name} {dtype_name(choice.value)} ({choice.reason})" for name, choice in parts.items())
