"""Triton is interpreted where there is no GPU, and that is decided when it is first imported.

So the parity tests are collected only in a process that was started for them: by tests/kernels/test_triton.py with
TRITON_INTERPRET=1, or on a machine with a GPU, where the same tests run the compiled kernels.
"""

import os

import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["parity"]
