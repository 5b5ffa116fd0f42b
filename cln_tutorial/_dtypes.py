"""What chapters ask of the dtype of a tensor, and the dtype in which they add up."""

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32 for half types, else the type itself."""
    return torch.float32 if dtype in _HALF else dtype


def require_floating(name: str, tensor: Tensor) -> None:
    """Refuse everything but real floating numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"`{name}` must be a tensor of floating numbers; got {got}.")
