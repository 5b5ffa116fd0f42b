"""What all parts of the chapter share: energies, their gradients, and the checks of arguments."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cln_tutorial._transforms import values_are_hidden

HAS_NUMBA = importlib.util.find_spec("numba") is not None
# From points (n, *event) to one energy each, (n,) or (n, 1). A closed form may offer `grad(x)` too.
Energy = Callable[[Tensor], Tensor]


class DivergenceError(RuntimeError):
    """Chains or a training have left the finite numbers, or the bound that was set for them."""


def energy_values(energy: Energy, x: Tensor) -> Tensor:
    """Return one energy per point, ``(n,)``, and refuse everything else."""
    values = energy(x)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"`energy` must return a tensor of floating numbers; got {got}.")
    if values.shape == (x.shape[0], 1):
        return values.squeeze(-1)
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"`energy` must return one value per point, shape ({x.shape[0]},) or ({x.shape[0]}, 1) "
            f"for points of shape {tuple(x.shape)}; got {tuple(values.shape)}."
        )
    return values


def has_closed_form(energy: Energy) -> bool:
    """Return True if the energy brings its own gradient, ``energy.grad(x)``."""
    return callable(getattr(energy, "grad", None))


def energy_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return energies ``(n,)`` and gradients of the shape of ``x``, both without a graph.

    Parameters get no gradient and stay as they are; call it inside :func:`frozen` to spare the
    work for theirs. It runs under ``no_grad`` and ``inference_mode`` of the caller.
    """
    if has_closed_form(energy):
        with torch.no_grad():
            return energy_values(energy, x), energy.grad(x)  # type: ignore[attr-defined]
    with torch.inference_mode(False), torch.enable_grad():
        point = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        values = energy_values(energy, point)
        if not values.requires_grad:  # an energy that is constant
            return values.detach(), torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(values.sum(), point, allow_unused=True)
    return values.detach(), torch.zeros_like(x) if gradient is None else gradient.detach()


@contextmanager
def frozen(energy: Energy) -> Iterator[None]:
    """Switch gradients of the parameters of a network off, and back to what they were."""
    modules = energy if isinstance(energy, nn.Module) else getattr(energy, "__self__", None)
    parameters = list(modules.parameters()) if isinstance(modules, nn.Module) else []
    flags = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def require_points(name: str, x: Any) -> None:
    """Refuse what is no batch of floating points ``(n, *event)`` with a non-empty event."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`{name}` must be a tensor of floating numbers; got {got}.")
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(
            f"`{name}` must be points (n, *event) with at least one coordinate; "
            f"got shape {tuple(x.shape)}."
        )


def require_energy(energy: Any) -> None:
    """Refuse what cannot be called."""
    if not callable(energy):
        raise TypeError(
            f"`energy` must be callable, from points (n, *event) to energies (n,); "
            f"got {type(energy).__name__}."
        )


def require_positive(name: str, value: "float | int | Tensor", *, zero: bool = False) -> None:
    """Refuse what is not finite and above 0 (or, with ``zero``, at least 0), in any entry."""
    word = "at least 0" if zero else "above 0"
    if isinstance(value, Tensor):
        if values_are_hidden() or value.device.type != "cpu":
            return
        low = value >= 0 if zero else value > 0
        good = bool((low & (value < math.inf)).all())
    else:
        good = (value >= 0 if zero else value > 0) and value < math.inf
    if not good:
        raise ValueError(f"`{name}` must be finite and {word}; got {value}.")


def require_count(name: str, value: int, least: int = 0) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number; got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}; got {value}.")


def choose_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """Return the key of the counters: the seed, or one draw from the generator or the global one.

    Raises:
        ValueError: if both are given, or the seed is no number of 63 bits.
    """
    if seed is not None and generator is not None:
        raise ValueError("give `seed` or `generator`, not both: the key comes from one of them.")
    if seed is None:
        device = None if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be at least 0 and below 2**63; got {seed}.")
    return seed
