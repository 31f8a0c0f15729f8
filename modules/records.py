"""Reads the JSON files of a run directory."""

import json
from pathlib import Path

from modules.errors import DataError


def read_record(path: Path) -> dict:
    """The object in a JSON file that a run wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); a run wrote it: restore it, or move the run away and make it again"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no JSON object; restore it, or move the run away and make it again")
    return found
