"""Argument checks shared by the ops: each error names the argument, what it was and what was expected.

Shapes, dtypes and devices are known on the host and always checked. Checking values (finite, in range) would make the
host wait for a GPU, so by default ops check them on CPU tensors only.
"""

import torch


def describe(value: object) -> str:
    """A tensor as "float32[4, 3] on cpu"; anything else as its repr."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value!r}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"


def check_tensor(
    name: str,
    value: object,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] = (),
    device: torch.device | None = None,
) -> None:
    """Raise ValueError unless `value` is a tensor of this shape (None: any extent), dtype (one of these) and device."""
    wrong = not isinstance(value, torch.Tensor)
    wrong = wrong or (shape is not None and not _fits(tuple(value.shape), shape))
    wrong = wrong or bool(dtypes and value.dtype not in dtypes)
    wrong = wrong or (device is not None and value.device != device)
    if not wrong:
        return
    expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "a tensor"
    if shape is not None:
        expected += "[" + ", ".join("any" if extent is None else str(extent) for extent in shape) + "]"
    if device is not None:
        expected += f" on {device}"
    raise ValueError(f"{name} is {describe(value)}; expected {expected}")


def check_number(name: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (low < value with open_low); NaN never passes."""
    above = value > low if open_low else value >= low
    if not (above and value <= high):
        raise ValueError(f"{name} is {value}; expected {'(' if open_low else '['}{low}, {high}]")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e is None or s == e for s, e in zip(shape, expected, strict=True))
