"""Small arrays of the host on the device, without waiting for what the device is at."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of the array; on the CPU it is a view of it.

    Through page-locked memory: to copy from any other, CUDA may first wait for all that the stream has been given.
    """
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
