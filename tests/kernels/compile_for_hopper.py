"""Compile every kernel for sm_90, as launched on an H200, and print what it needs. Needs no GPU.

python -m tests.kernels.compile_for_hopper: registers a thread, spilled bytes, shared memory of a program.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import group_norm, guided_step, pixels, supcon_kernels, views_kernel

HALF = ("x", "y", "dx", "dy", "weight", "bias", "conditional", "unconditional")
POINTERS = {f"{name}_ptr": "*fp16" for name in HALF} | {
    "halves_ptr": "*fp16",
    "keys_ptr": "*i32",
    "labels_ptr": "*i64",
    "is_ood_ptr": "*i1",
    "op_ptr": "*i32",
    "images_ptr": "*u8",
    "row_ptr": "*i64",
    "unconditional_row_ptr": "*i64",
    "noise_step_ptr": "*i64",
}  # the others are fp32
INTEGERS = {
    "R",
    "E",
    "images",
    "P",
    "C",
    "K",
    "size",
    "width",
    "groups",
    "B",
    "V",
    "H",
    "W",
    "out_H",
    "out_W",
    "run",
    "splits",
}
INTEGERS |= {
    "latent",
    "plane",
    "rows",
    "unconditional_rows",
    "noise_steps",
    "stride_n",
    "stride_c",
    "stride_h",
    "stride_w",
}
INTEGERS |= {"conditional_c", "conditional_p", "unconditional_c", "unconditional_p"}
ALIGNED = INTEGERS - {
    "V",
    "K",
    "images",
    "width",
    "groups",
    "noise_steps",
    "stride_w",
    "conditional_p",
    "unconditional_p",
}  # multiples of 16 in real shapes

STEP = dict.fromkeys(("GUIDED", "MAPPED", "EPSILON", "NOISE", "MASK"), True) | {"BLOCK": 512}
TILE = {"BLOCK_C": 64, "BLOCK_P": 32}


def loss_cases(E: int, pairs: bool = True, **changes) -> list[tuple]:
    """The kernels of the loss as launched at width E, with the ordinary rules or changes of them."""
    rules = {"COLUMNS": 1, "OOD_ANCHORS": False, "HARD": False} | changes
    blocks = supcon_kernels._blocks(E, rules["HARD"])
    rules |= {"PAIRS": pairs, "GROUP": blocks["group"], "WIDTH": blocks["width"]}
    cases = []
    for name in ("prepare", "forward", "merge", "backward"):
        kernel = getattr(supcon_kernels, f"_{name}_kernel")
        constants = {rule: value for rule, value in rules.items() if rule in kernel.arg_names}
        constants |= {key: value for key, value in blocks[name].items() if key in kernel.arg_names}
        options = {key: value for key, value in blocks[name].items() if key not in constants}
        cases.append((kernel, constants, options))
    return cases


MOST_RULES = {"COLUMNS": 2, "OOD_ANCHORS": True, "HARD": True}  # those that need most registers


def view_case(side: int, **constants) -> tuple:
    """The kernel of the views as launched for an output of this side."""
    settings = views_kernel.launch_settings(side, side)
    options = {"num_warps": settings.pop("num_warps")}
    return views_kernel._views_kernel, {"READ_WORDS": True, "STRIPS": 32} | settings | constants, options


def pixel_case_of(size: int, channels: int) -> tuple:
    """512 px to size; channels: 3 in channels_last, as a compiled decoder answers, 1 in planes."""
    blocks = pixels._blocks(512, size, channels)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages") if name in blocks}
    taps = pixels._taps(512, size)
    constants = {"CHANNELS": channels, "TAPS_Y": taps, "TAPS_X": taps, "NAN_STAYS": False, "stride_j": 1} | blocks
    return pixels._pixels_kernel, constants | ({"stride_c": 1} if channels == 3 else {}), options


CASES = (
    *loss_cases(128),
    *loss_cases(128, pairs=False),
    *loss_cases(128, **MOST_RULES),
    *loss_cases(256),
    *loss_cases(256, **MOST_RULES),
    (group_norm._statistics_kernel, TILE, {}),
    (group_norm._affine_kernel, {"BLOCK_C": 16, "BLOCK_K": 1, "K": 1}, {}),  # one chunk: an extent of 1 is a constant
    (group_norm._affine_kernel, {"BLOCK_C": 16, "BLOCK_K": 256}, {}),
    (group_norm._normalize_kernel, TILE | {"SILU": True}, {}),
    (group_norm._backward_sums_kernel, TILE | {"SILU": True}, {}),
    (group_norm._backward_groups_kernel, {"BLOCK_C": 16, "BLOCK_K": 64}, {"num_warps": 1}),
    (group_norm._backward_kernel, TILE | {"SILU": True}, {}),
    *(pixel_case_of(size, channels) for size in (224, 64) for channels in (1, 3)),
    (guided_step._guided_step_kernel, STEP | {"conditional_p": 1, "unconditional_p": 1, "FLAT": True}, {}),
    (guided_step._guided_step_kernel, STEP | {"conditional_c": 1, "unconditional_c": 1, "FLAT": False}, {}),
    view_case(224, TAPS=2, MEANS=False),
    view_case(224, TAPS=2, MEANS=True),
    view_case(224, TAPS=2, MEANS=False, READ_WORDS=False),
    view_case(224, TAPS=7, MEANS=False),  # 720 to 224 px
)


def compile_for_hopper(kernel, constants: dict, options: dict):
    """The compiled kernel, its signature as a launch on fp16 tensors of ordinary shapes would make it."""
    names = kernel.arg_names
    pointers = POINTERS | {"out_ptr": "*u8" if kernel is pixels._pixels_kernel else "*fp16"}
    kinds = {name: pointers.get(name, "*fp32") if name.endswith("_ptr") else "fp32" for name in names}
    signature = kinds | {name: "i32" for name in names if name in INTEGERS} | dict.fromkeys(constants, "constexpr")
    multiples = {n for n in names if n.endswith("_ptr") or n in ALIGNED}
    multiples -= {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in multiples}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread, from the compiled code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr).groups()
    return int(registers), int(stack)


if __name__ == "__main__":
    for kernel, constants, options in CASES:
        compiled = compile_for_hopper(kernel, constants, options)
        registers, stack = resources(compiled)
        name = f"{kernel.__module__}.{kernel.__name__}"
        print(f"{name} registers {registers} shared {compiled.metadata.shared} spilled {stack}")
