"""The checks that all parts share: of dtypes and shapes always, of values where they are cheap."""

import math

import torch
from torch import Tensor

from cln_tutorial._transforms import values_are_hidden

LEAST_TEMPERATURE = 1e-30  # over less, and times less, even small logits leave float32
_HALF = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of noise and sums: float32 for half types, else the type itself."""
    return torch.float32 if dtype in _HALF else dtype


def require_floating(name: str, tensor: Tensor) -> None:
    """Refuse everything but real floating numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"`{name}` must be a tensor of floating numbers; got {got}.")


def require_axis(name: str, tensor: Tensor, dim: int) -> int:
    """Return the axis counted from the end, of a tensor that has it and classes along it."""
    require_floating(name, tensor)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"`dim` must be an axis of `{name}` {tuple(tensor.shape)}; got {dim}.")
    if tensor.shape[dim] == 0:
        raise ValueError(f"`{name}` {tuple(tensor.shape)} has no classes along `dim` {dim}.")
    return dim if dim < 0 else dim - tensor.ndim


def checks_values(validate_args: bool | None, tensor: Tensor) -> bool:
    """Whether to look at values: on a GPU that would wait for it, so only if asked for."""
    if values_are_hidden():
        return False
    return tensor.device.type == "cpu" if validate_args is None else validate_args


def require_distributions(name: str, rows: Tensor, *, certain: bool = True) -> None:
    """Refuse rows that are no distribution: NaN, nothing but -inf, +inf more than once.

    Without ``certain`` not even once: nothing can be differentiated there.
    """
    if rows.numel() == 0:
        return
    top = rows.amax(-1)  # NaN if there is one
    if bool(top.isfinite().all()):
        return
    if top.isnan().any():
        raise ValueError(f"`{name}` has {int(rows.isnan().sum())} entries that are NaN.")
    most = int((rows == math.inf).sum(-1).max())
    if most > certain:
        wanted = "at most one +inf in a row: it is the certain class" if certain else "no +inf"
        raise ValueError(f"`{name}` must have {wanted}; got {most}.")
    if (top == -math.inf).any():
        count = int((top == -math.inf).sum())
        raise ValueError(f"`{name}` has {count} rows in which all classes are -inf.")


def require_temperature(tau: "float | int | Tensor", rows: Tensor, *, zero: bool) -> None:
    """Refuse negative, tiny and infinite temperatures, zero unless allowed, other shapes."""
    if isinstance(tau, Tensor):
        require_floating("tau", tau)
        try:
            fits = torch.broadcast_shapes(tau.shape, rows.shape) == rows.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"`tau` must broadcast to the rows {tuple(rows.shape)}; got {tuple(tau.shape)}."
            )
        if not checks_values(None, tau):
            return
        good = (tau >= LEAST_TEMPERATURE) & (tau < math.inf)
        good = bool((good | (tau == 0) if zero else good).all())
    else:
        good = LEAST_TEMPERATURE <= tau < math.inf or (zero and tau == 0)
    if not good:
        least = f"{'0 or ' if zero else ''}at least {LEAST_TEMPERATURE}"
        raise ValueError(f"`tau` must be finite and {least}; got {tau}.")
