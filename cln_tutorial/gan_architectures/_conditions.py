"""What a modulated norm makes of its arguments: classes, vectors, maps and sizes, or an error."""

import numbers
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cln_tutorial._dtypes import require_floating
from cln_tutorial._transforms import values_are_hidden


def of_classes(y: Tensor, *tables: Tensor) -> list[Tensor]:
    """Rows of tables ``(K, width)``: of integer labels, or averages with floating weights."""
    require_classes(y, len(tables[0]), tables[0])
    if y.is_floating_point():
        weights = y.to(tables[0].dtype)
        return [weights @ table for table in tables]
    return [F.embedding(y, table) for table in tables]


def require_classes(y: Tensor, classes: int, own: Tensor) -> None:
    """Refuse what :func:`of_classes` cannot read; ``own`` is a parameter like the tables."""
    if not isinstance(y, Tensor) or not (y.is_floating_point() or y.dtype == torch.int64):
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(
            f"`y` must be labels (batch,) of int64, or floating weights (batch, {classes}); got "
            f"{got}."
        )
    if y.device != own.device:
        raise ValueError(f"`y` is on {y.device}, the parameters on {own.device}.")
    if y.is_floating_point():
        if y.ndim != 2 or y.shape[1] != classes:
            raise ValueError(
                f"`y` must be (batch, {classes}) as floating weights of {classes} classes; got "
                f"{tuple(y.shape)}. Labels are int64."
            )
        _require_not_wider("y", y, own.dtype)
    elif y.ndim != 1:
        raise ValueError(f"`y` must be (batch,) as integer labels; got {tuple(y.shape)}.")
    # A look at the values would make a GPU wait; there the lookup itself refuses them.
    elif y.is_cpu and y.numel() and not values_are_hidden():
        low, high = y.aminmax()
        if low < 0 or high >= classes:
            raise ValueError(f"`y` must lie in 0..{classes - 1}; got {low}..{high}.")


def condition_vector(name: str, cond: Tensor, first: nn.Linear) -> Tensor:
    if isinstance(cond, Tensor) and not cond.is_floating_point():
        raise TypeError(
            f"`{name}` must hold a vector of floats per map; got {cond.dtype}. Labels go to "
            f"`ConditionalBatchNorm2d`, or to `y` of a norm with `num_classes`."
        )
    require_floating(name, cond)
    # Not `first.weight`: under spectral norm each look at it is a step of the power iteration.
    own = next(first.parameters())
    if cond.device != own.device:
        raise ValueError(f"`{name}` is on {cond.device}, the norm on {own.device}.")
    if cond.ndim != 2 or cond.shape[1] != first.in_features:
        raise ValueError(f"`{name}` must be (batch, {first.in_features}); got {tuple(cond.shape)}.")
    _require_not_wider(name, cond, own.dtype)
    return cond.to(own.dtype)


def _require_not_wider(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if torch.promote_types(value.dtype, dtype) != dtype:
        raise TypeError(
            f"`{name}` is {value.dtype}, the parameters {dtype}; write `{name}.to({dtype})`."
        )


def require_maps(x: Tensor, channels: int) -> None:
    require_floating("x", x)
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"`x` must be (batch, {channels}, height, width); got {tuple(x.shape)}.")


def require_rows(name: str, cond: Tensor | None, x: Tensor) -> None:
    if isinstance(cond, Tensor) and cond.ndim and len(cond) != len(x):
        raise ValueError(
            f"`{name}` must hold one row for each map of `x` {tuple(x.shape)}; got "
            f"{tuple(cond.shape)}."
        )


def require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`{name}` must be a whole number of 1 or more; got {size!r}.")


def require_not_negative(**values: float | int) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"`{name}` must be zero or positive; got {value}.")


def require_one_of(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}; got {value!r}.")
