"""Single steps of Langevin samplers as pure functions: the noise comes in, the next state goes out.

Source: article 6612 (with step eps = 2 h); Roberts & Tweedie 1996 (MALA); Leimkuhler & Matthews
2013 (BAOAB).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from cln_tutorial.energy_models._checks import Energy, energy_and_gradient

# A number for all chains, or one for each of them, shape (n,).
PerChain = float | int | Float[Tensor, "n"] | Float[Tensor, ""]
# Points, their energies, and their gradients.
State = tuple[Float[Tensor, "n *event"], Float[Tensor, "n"], Float[Tensor, "n *event"]]


@dataclass(frozen=True)
class Preconditioner:
    """A positive semi-definite matrix and its root, both over the flattened event.

    Args:
        matrix: ``P``, ``(d,)`` for a diagonal one or ``(d, d)``.
        root: ``L`` with ``L L^T = P``, of the same shape.

    Example:
        >>> from cln_tutorial.energy_models.steps import Preconditioner
        >>> p = Preconditioner.of(torch.tensor([4.0, 1.0]))
        >>> p.drift(torch.ones(1, 2)), p.noise(torch.ones(1, 2))
        (tensor([[4., 1.]]), tensor([[2., 1.]]))
    """

    matrix: Shaped[Tensor, "..."]
    root: Shaped[Tensor, "..."]

    @classmethod
    def of(cls, matrix: Shaped[Tensor, "..."]) -> "Preconditioner":
        """Factor a symmetric positive definite matrix ``(d, d)`` or a positive diagonal ``(d,)``.

        Raises:
            ValueError: if it is not symmetric, or not positive definite.
        """
        if matrix.ndim == 1:
            good, root = bool((matrix > 0).all() and matrix.isfinite().all()), matrix.sqrt()
        else:
            root, failed = torch.linalg.cholesky_ex(matrix)
            good = not failed and torch.allclose(matrix, matrix.mT) and bool(root.isfinite().all())
        if not good:
            raise ValueError("`preconditioner` must be symmetric and positive definite; it is not.")
        return cls(matrix, root)

    def drift(self, gradient: Float[Tensor, "n *event"]) -> Float[Tensor, "n *event"]:
        """Return ``P g`` for each chain."""
        return _times(self.matrix, gradient)

    def noise(self, noise: Float[Tensor, "n *event"]) -> Float[Tensor, "n *event"]:
        """Return ``L xi`` for each chain, of covariance ``P``."""
        return _times(self.root, noise)


def langevin_step(
    x: Float[Tensor, "n *event"],
    gradient: Float[Tensor, "n *event"],
    noise: Float[Tensor, "n *event"],
    step_size: PerChain,
    noise_scale: PerChain,
) -> Float[Tensor, "n *event"]:
    r"""Take one step of unadjusted Langevin dynamics: :math:`x' = x - h \nabla E(x) + s\,\xi`.

    The matched noise for temperature ``T`` is :math:`s = \sqrt{2hT}`.

    Args:
        x: points ``(n, *event)``.
        gradient: of the energy at ``x``, same shape; ``P g`` with a preconditioner.
        noise: standard normal, same shape; ``L xi`` with a preconditioner.
        step_size: ``h``, a number or one per chain, ``(n,)``.
        noise_scale: ``s``, a number or one per chain, ``(n,)``.

    Returns:
        The next points, same shape.

    Source:
        Article 6612, where the step is ``eps = 2 h`` and the temperature 1.

    Example:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> langevin_step(x, gradient=x, noise=torch.ones(2, 1), step_size=0.5, noise_scale=1.0)
        tensor([[1.5000],
                [2.0000]])
    """
    return x - to_chains(step_size, x) * gradient + to_chains(noise_scale, x) * noise


def mala_step(
    energy: Energy,
    x: Float[Tensor, "n *event"],
    e: Float[Tensor, "n"],
    g: Float[Tensor, "n *event"],
    noise: Float[Tensor, "n *event"],
    uniform: Float[Tensor, "n"],
    step_size: PerChain,
    temperature: PerChain = 1.0,
    preconditioner: Preconditioner | None = None,
) -> tuple[
    Float[Tensor, "n *event"], Float[Tensor, "n"], Float[Tensor, "n *event"], Bool[Tensor, "n"]
]:
    r"""Propose a Langevin step and accept it so that :math:`e^{-E/T}` is kept exactly (MALA).

    The proposal is :func:`langevin_step` with matched noise; it is accepted where
    :math:`\ln u < \ln a`, see :func:`mala_log_ratio`. What is not finite is never accepted.

    Args:
        energy: from points ``(n, *event)`` to energies ``(n,)``.
        x: points ``(n, *event)``.
        e: their energies ``(n,)``.
        g: their gradients, shape of ``x``.
        noise: standard normal, shape of ``x``.
        uniform: one number in (0, 1) per chain, ``(n,)``.
        step_size: ``h``, a number or ``(n,)``.
        temperature: ``T``, a number or ``(n,)``.
        preconditioner: drift ``h P g`` and noise of covariance ``2 h T P``.

    Returns:
        ``(x, e, g, accepted)``: the next points, energies, gradients, and who moved.

    Source:
        Roberts & Tweedie 1996. Article 6331 prints the proposal density without the half of its
        drift.

    Example:
        >>> x, noise, u = torch.ones(2, 1), torch.tensor([[0.5], [9.0]]), torch.full((2,), 0.5)
        >>> half_square = lambda x: x.square().sum(1) / 2
        >>> x, e, g, accepted = mala_step(half_square, x, half_square(x), x, noise, u, 0.5)
        >>> accepted
        tensor([ True, False])
    """
    proposal = mala_proposal(x, g, noise, step_size, temperature, preconditioner)
    values, gradient = energy_and_gradient(energy, proposal)
    new = (proposal, values.to(x.dtype), gradient)
    state, accepted = mala_accept((x, e, g), new, uniform, step_size, temperature, preconditioner)
    return *state, accepted


def mala_proposal(
    x: Float[Tensor, "n *event"],
    g: Float[Tensor, "n *event"],
    noise: Float[Tensor, "n *event"],
    step_size: PerChain,
    temperature: PerChain = 1.0,
    preconditioner: Preconditioner | None = None,
) -> Float[Tensor, "n *event"]:
    """Return the Langevin step with matched noise that :func:`mala_step` proposes."""
    scale = matched_noise_scale(step_size, temperature)
    if preconditioner is not None:
        g, noise = preconditioner.drift(g), preconditioner.noise(noise)
    return langevin_step(x, g, noise, step_size, scale)


def mala_accept(
    old: State,
    new: State,
    uniform: Float[Tensor, "n"],
    step_size: PerChain,
    temperature: PerChain = 1.0,
    preconditioner: Preconditioner | None = None,
) -> tuple[State, Bool[Tensor, "n"]]:
    """Choose per chain between two states ``(x, e, g)``, as :func:`mala_step` does."""
    log_ratio = mala_log_ratio(*old, *new, step_size, temperature, preconditioner)
    accepted = (uniform.log() < log_ratio) & all_finite(new[1], new[2])
    return choose(accepted, new, old), accepted


def mala_log_ratio(
    x: Float[Tensor, "n *event"],
    e: Float[Tensor, "n"],
    g: Float[Tensor, "n *event"],
    new_x: Float[Tensor, "n *event"],
    new_e: Float[Tensor, "n"],
    new_g: Float[Tensor, "n *event"],
    step_size: PerChain,
    temperature: PerChain = 1.0,
    preconditioner: Preconditioner | None = None,
) -> Float[Tensor, "n"]:
    r"""Return the logarithm of the ratio that decides whether MALA accepts ``x -> x'``.

    .. math:: T \ln a = -(E' - E) + \tfrac12 (g + g')^\top (x' - x)
        - \tfrac h4 \left(g'^\top P g' - g^\top P g\right)

    This is :math:`\ln \frac{p(x')\,q(x|x')}{p(x)\,q(x'|x)}` of the proposal
    :math:`q(x'|x) = N(x - hPg,\, 2hTP)` with its squares multiplied out: the large
    :math:`\|x'-x\|^2/4hT` of both directions is gone, and so is the inverse of ``P``. The first
    two terms are the error of the trapezoid rule along the step, 0 for a quadratic energy.

    Args:
        x: points ``(n, *event)``.
        e: their energies ``(n,)``.
        g: their gradients.
        new_x: proposed points.
        new_e: their energies.
        new_g: their gradients.
        step_size: ``h``, a number or ``(n,)``.
        temperature: ``T``, a number or ``(n,)``.
        preconditioner: ``P``; None is the identity.

    Returns:
        ``(n,)``; may be above 0.

    Source:
        Roberts & Tweedie 1996, with the squares multiplied out by us.

    Example:
        >>> x, y = torch.tensor([[1.0]]), torch.tensor([[3.0]])
        >>> mala_log_ratio(x, x[:, 0] ** 2 / 2, x, y, y[:, 0] ** 2 / 2, y, step_size=0.5)
        tensor([-1.])
    """
    work = 0.5 * _dot(g + new_g, new_x - x)
    old_p, new_p = (g, new_g) if preconditioner is None else map(preconditioner.drift, (g, new_g))
    squares = _dot(new_g, new_p) - _dot(g, old_p)
    return (e - new_e + work - 0.25 * step_size * squares) / temperature


def baoab_step(
    energy: Energy,
    x: Float[Tensor, "n *event"],
    v: Float[Tensor, "n *event"],
    g: Float[Tensor, "n *event"],
    noise: Float[Tensor, "n *event"],
    step_size: PerChain,
    friction: float | int,
    temperature: PerChain = 1.0,
) -> tuple[Float[Tensor, "n *event"], Float[Tensor, "n *event"], Float[Tensor, "n *event"]]:
    r"""Take one step of underdamped Langevin dynamics, split as BAOAB, with unit mass.

    .. math:: v \mathrel{-}= \tfrac h2 g,\quad x \mathrel{+}= \tfrac h2 v,\quad
        v = e^{-\gamma h} v + \sqrt{T(1 - e^{-2\gamma h})}\,\xi,\quad
        x \mathrel{+}= \tfrac h2 v,\quad v \mathrel{-}= \tfrac h2 g'

    Args:
        energy: from points ``(n, *event)`` to energies ``(n,)``.
        x: points ``(n, *event)``.
        v: velocities, same shape.
        g: gradients at ``x``, same shape.
        noise: standard normal, same shape.
        step_size: ``h``, a time, a number or ``(n,)``; stable below ``2 / sqrt(stiffness)``.
        friction: ``gamma``, per unit of time.
        temperature: ``T``, a number or ``(n,)``.

    Returns:
        ``(x, v, g)``: the next points and velocities, and the gradients there.

    Source:
        Leimkuhler & Matthews 2013: on a quadratic energy the positions are exact for every
        stable step.

    Example:
        >>> x = torch.ones(1, 1)
        >>> energy = lambda x: x.square().sum(1) / 2
        >>> x, v, g = baoab_step(energy, x, 0 * x, x, 0 * x, step_size=0.5, friction=0.0)
        >>> x, v
        (tensor([[0.8750]]), tensor([[-0.4688]]))
    """
    x, v = baoab_move(x, v, g, noise, step_size, friction, temperature)
    _, g = energy_and_gradient(energy, x)
    return x, baoab_kick(v, g, step_size), g


def baoab_move(
    x: Float[Tensor, "n *event"],
    v: Float[Tensor, "n *event"],
    g: Float[Tensor, "n *event"],
    noise: Float[Tensor, "n *event"],
    step_size: PerChain,
    friction: float | int,
    temperature: PerChain = 1.0,
) -> tuple[Float[Tensor, "n *event"], Float[Tensor, "n *event"]]:
    """Do all of :func:`baoab_step` up to the place where the new gradient is needed."""
    half = 0.5 * to_chains(step_size, x)
    functions = torch if isinstance(step_size, Tensor) else math
    keep = functions.exp(-friction * step_size)
    spread = (-temperature * functions.expm1(-2 * friction * step_size)) ** 0.5
    v = baoab_kick(v, g, step_size)
    x = x + half * v
    v = to_chains(keep, x) * v + to_chains(spread, x) * noise
    return x + half * v, v


def baoab_kick(
    v: Float[Tensor, "n *event"], g: Float[Tensor, "n *event"], step_size: PerChain
) -> Float[Tensor, "n *event"]:
    """Give velocities half a step of the force, the first and the last B of BAOAB."""
    return v - 0.5 * to_chains(step_size, v) * g


def matched_noise_scale(step_size: PerChain, temperature: PerChain) -> PerChain:
    r"""Return the noise of the step that keeps ``exp(-E/T)`` for small steps, ``sqrt(2 h T)``."""
    return (2 * step_size * temperature) ** 0.5


def all_finite(e: Float[Tensor, "n"], g: Float[Tensor, "n *event"]) -> Bool[Tensor, "n"]:
    """Tell for each chain whether its energy and its gradient are finite."""
    return e.isfinite() & g.isfinite().flatten(1).all(1)


def choose(
    mask: Bool[Tensor, "n"], new: Sequence[Tensor], old: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Take for each chain the new parts of its state where the mask is True, else the old ones."""
    return tuple(torch.where(to_chains(mask, n), n, o) for n, o in zip(new, old, strict=True))


def to_chains(value: float | int | Shaped[Tensor, "..."], x: Shaped[Tensor, "n *event"]) -> Any:
    """Shape one number per chain so that it meets all coordinates of its chain in ``x``."""
    if isinstance(value, Tensor):
        return value.reshape(-1, *(1,) * (x.ndim - 1))
    return value


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    if matrix.ndim == 1:
        return matrix.reshape(x.shape[1:]) * x
    with torch.autocast(x.device.type, enabled=False):
        return (x.flatten(1) @ matrix.mT).reshape(x.shape)
