"""`trainer.py run CONFIG [section.key=value ...]`: the main verb."""

from modules.settings import load_config


def command(path: str, overrides: list[str], console, run, step) -> None:
    """Start, go on with or show the run that the settings describe."""
    config, origins = load_config(path, overrides)
    console.line("importing torch and diffusers")  # takes some seconds, in which nothing else is seen
    run(config, origins, console)
