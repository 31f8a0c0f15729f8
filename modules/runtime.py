"""Device, dtype and threads, each a value with its reason; named random streams.

Randomness is a pure function of identity: `stream(seed, "image", 17)` is the same generator in every run, on every
machine, whatever was drawn before. Nothing in this project draws from torch's global generator.
"""

import hashlib
import os
import platform
from dataclasses import dataclass

import torch

from modules.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """A value the program chose and the reason it prints for it."""

    value: object
    reason: str


def stream(seed: int, name: str, *identity: int | str) -> torch.Generator:
    """A CPU generator that depends on (seed, name, identity) and on nothing else.

    Draws are made on the CPU and copied, so that a CPU and a GPU see the same numbers.
    """
    generator = torch.Generator()
    generator.manual_seed(stream_seed(seed, name, *identity))
    return generator


def stream_seed(seed: int, name: str, *identity: int | str) -> int:
    """The 63-bit seed of a named stream: blake2b over the parts, joined unambiguously."""
    text = "\x1f".join(str(part) for part in (seed, name, *identity))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
