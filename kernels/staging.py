"""Host values onto the device without waiting for it.

A copy from pageable memory makes the host wait until the device has caught up; a copy from pinned memory does not.
Bookkeeping lives on the host (see reservoir.py), so this is how its decisions reach the device.
"""

import numpy as np
import torch


def upload(
    values: torch.Tensor | np.ndarray | list, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`values` (a host tensor, array or list) as a tensor on `device`; on CUDA the copy is queued, the host goes on."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def in_use(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, whose memory is not handed out again before the present stream is done with what it was given to do.

    For tensors that one stream made and another reads: freed on the host, they could be overwritten while they are read.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
