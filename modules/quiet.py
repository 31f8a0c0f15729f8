"""Silences chatty libraries before any of them is imported."""

import logging
import os


def quiet_libraries() -> None:
    """Silence messages at import that do not concern a run (our folder `kernels` shadows an optional package)."""
    for name in ("bitsandbytes", "transformers", "diffusers", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
