"""Copies host values to the device without waiting for it.

A copy from pageable memory blocks the host until the device has caught up; a copy from pinned memory does not.
Bookkeeping is done on the host (see modules/data/reservoir.py); its decisions reach the device through `upload`.
"""

import numpy as np
import torch


def upload(
    values: torch.Tensor | np.ndarray | list, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`values` (a host tensor, array or list) as a tensor on `device`; on CUDA the copy is queued without blocking."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def in_use(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, after telling the allocator not to reuse its memory before the current stream's queued work is done.

    For tensors that were allocated on one stream and are read on another: otherwise, once freed on the host, they could
    be overwritten while they are still being read.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
