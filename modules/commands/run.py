"""`trainer.py run CONFIG [section.key=value ...]`: the main verb."""

from collections.abc import Callable

from modules.console import Console
from modules.settings import load_config


def command(
    path: str, overrides: list[str], console: Console, run: Callable[..., dict], step: Callable[..., None]
) -> None:
    """Start, resume or show the run that the settings describe."""
    config, origins = load_config(path, overrides)
    console.line("importing torch and diffusers")  # takes some seconds without other output
    run(config, origins, console)
