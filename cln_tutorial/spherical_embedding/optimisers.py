r"""Gradient descent for parameters whose rows are unit vectors: `SphereSGD` and `SphereAdam`.

What both share comes first: which rows have a gradient, what is refused, and the way of rows out
of a parameter and back. At the end stand the two updates, of a matrix of rows, in plain operations.

Source: article 7063; Meng et al. 2019 (arXiv 1911.01196); Bonnabel 2013; Bécigneul & Ganea 2019.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cln_tutorial.spherical_embedding.geometry import (
    UnitNorm,
    cos_factor,
    expmap,
    require_directions,
    retract,
    tangent_project,
    which_rows,
)

RETRACTIONS = {"projection": retract, "exp": expmap}
FACTORS = ("none", "jose")
SECOND_MOMENTS = ("row", "element")


class _SphereOptimizer(torch.optim.Optimizer):
    """Checks of parameters and gradients; a subclass says what its state is, and its update."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in PyTorch; rows that are not unit are normalised with a warning."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            norms = [_require_rows(name, p, group["dim"]) for name, p in _named(group)]
        except Exception:
            self.param_groups.pop()
            raise
        for (name, p), norm in zip(_named(group), norms, strict=True):
            _normalise(name, p, norm, group["dim"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state as in PyTorch; it stays float32 where the parameters are in 16 bits.

        Raises:
            ValueError: for options that this optimiser refuses, or other numbers of parameters.
        """
        for group in state_dict["param_groups"]:
            self._check({**self.defaults, **group})
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[p][key] = value.to(p.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: computes the loss anew and returns it, as in PyTorch.

        Raises:
            ValueError: if a row of a gradient is not finite, or too long for its square, or if a
                sparse gradient does not fit; in all cases before any parameter has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, list(self._pieces(group))) for group in self.param_groups]
        for group, pieces in work:
            for together in _batches(pieces, group["foreach"]):
                self._move(together, group)
        return loss

    def _pieces(self, group: dict[str, Any]) -> "Iterator[Piece]":
        for name, p in _named(group):
            if p.grad is not None:
                first = not self._state_keys(group).keys() <= self.state.get(p, {}).keys()
                yield Piece.of(name, p, group["dim"], first)

    def _move(self, together: "list[Piece]", group: dict[str, Any]) -> None:
        """Update pieces of one kind as one matrix of rows."""
        tensors = [[p.parameter, *self._state_of(p.parameter, group)] for p in together]
        columns = [
            _joined([piece.read(t) for piece, t in zip(together, column, strict=True)])
            for column in zip(*tensors, strict=True)
        ]
        gradient = _joined([piece.gradient for piece in together])
        moved = self._update(group, together[0].first, gradient, *columns)
        counts = [len(piece.gradient) for piece in together]
        for new, column in zip(moved, zip(*tensors, strict=True), strict=True):
            for piece, t, rows in zip(together, column, new.split(counts), strict=True):
                piece.write(t, rows)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> list[Tensor]:
        keys = self._state_keys(group)
        for key, per_entry in keys.items():
            if key not in self.state[p]:
                like = p if per_entry else p.narrow(group["dim"], 0, 1)
                self.state[p][key] = torch.zeros_like(like, dtype=_wide(p))
        return [self.state[p][key] for key in keys]

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse options; the subclass adds its own."""
        _require("lr", float(group["lr"]), 0, math.inf)
        _require_one_of("factor", group["factor"], FACTORS)
        _require_one_of("retraction", group["retraction"], tuple(RETRACTIONS))
        if group.get("weight_decay", 0) != 0:
            raise ValueError(
                f"`weight_decay` must be 0; got {group['weight_decay']}. It would shorten rows "
                f"whose norm is fixed: its gradient has no part that is tangent to the sphere."
            )

    def _state_keys(self, group: dict[str, Any]) -> dict[str, bool]:
        """Name the state in order, and whether it has a number per entry, or only per row."""
        raise NotImplementedError

    def _update(self, group: dict[str, Any], first: bool, gradient: Tensor, *rows: Tensor) -> Any:
        """Return what becomes of the rows of the parameter and of its state."""
        raise NotImplementedError


class SphereSGD(_SphereOptimizer):
    r"""Stochastic gradient descent on the sphere, for parameters whose rows are unit vectors.

    .. math::
        g_t &= \phi_t\, (I - x_t x_t^\top) \nabla f(x_t), \qquad
        b_t = \mu\, b_{t-1} + (1 - \tau)\, g_t \\
        x_{t+1} &= R_{x_t}(-\eta\, b_t), \qquad
        b_t \leftarrow (I - x_{t+1} x_{t+1}^\top)\, b_t

    The momentum is transported: projected to the tangent space of the new point. With a sparse
    gradient (``nn.Embedding(sparse=True)``) only rows that have one move, and only their momentum
    decays.

    Args:
        params: parameters or groups of them, as in PyTorch. Their rows are normalised with a
            warning if they are not unit. 16-bit parameters are updated in float32 and rounded, and
            their state is float32.
        lr: :math:`\eta`, a number or a tensor with one element.
        momentum: :math:`\mu`.
        dampening: :math:`\tau`; as in PyTorch not for the first gradient of a parameter.
        nesterov: take :math:`g_t + \mu b_t` in place of :math:`b_t`.
        factor: :math:`\phi`: "none" for 1, "jose" for :func:`cos_factor` of the gradient. With
            "jose" and *stochastic* gradients the fixed point moves: see the chapter.
        retraction: :math:`R`: "projection" for :func:`retract`, "exp" for :func:`expmap`.
        dim: the axis of the rows.
        maximize: ascend.
        foreach: update parameters with rows of one length as one matrix. ``None``: on accelerators.
        weight_decay: refused unless 0, because it has no meaning on the sphere.

    Raises:
        TypeError: if a parameter is not of a real floating dtype.
        ValueError: if an option is out of its range, or a row is zero or not finite.

    Source: Bonnabel 2013 (arXiv 1111.5280); article 7063; the factor of Meng et al. 2019.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimiser = SphereSGD([x], lr=0.75)
        >>> (-x[:, 1]).sum().backward()
        >>> optimiser.step()
        >>> x.data
        tensor([[0.8000, 0.6000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | int | Tensor,
        *,
        momentum: float | int = 0,
        dampening: float | int = 0,
        nesterov: bool = False,
        factor: str = "none",
        retraction: str = "projection",
        dim: int = -1,
        maximize: bool = False,
        foreach: bool | None = None,
        weight_decay: float | int = 0,
    ):
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        options |= {"factor": factor, "retraction": retraction, "dim": dim, "maximize": maximize}
        super().__init__(params, options | {"foreach": foreach, "weight_decay": weight_decay})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        _require("momentum", group["momentum"], 0, math.inf)
        _require("dampening", group["dampening"], -math.inf, math.inf)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"`nesterov` needs momentum and no dampening; got `momentum` {group['momentum']} "
                f"and `dampening` {group['dampening']}."
            )

    def _state_keys(self, group: dict[str, Any]) -> dict[str, bool]:
        return {"momentum_buffer": True} if group["momentum"] != 0 else {}

    def _pieces(self, group: dict[str, Any]) -> "Iterator[Piece]":
        for piece in super()._pieces(group):
            if piece.index is not None and group["dampening"] != 0:
                raise ValueError(
                    f"`dampening` must be 0 with sparse gradients, since rows have their first one "
                    f"at different times; got {group['dampening']}."
                )
            yield piece

    def _update(self, group: dict[str, Any], first: bool, gradient: Tensor, *rows: Tensor) -> Any:
        names = ("lr", "momentum", "nesterov", "factor", "retraction", "maximize")
        options = {name: group[name] for name in names}
        return sgd_update(gradient, *rows, dampening=0 if first else group["dampening"], **options)


class SphereAdam(_SphereOptimizer):
    r"""Adam on the sphere, with one second moment per row, or one per entry as usual.

    .. math::
        g_t &= \phi_t\, (I - x_t x_t^\top) \nabla f(x_t), \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \lVert g_t\rVert^2 \\
        x_{t+1} &= R_{x_t}\Bigl(-\eta\,
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}\Bigr), \qquad
        m_t \leftarrow (I - x_{t+1} x_{t+1}^\top)\, m_t

    With a moment per row the run turns with the coordinates: rotated data give rotated vectors. A
    moment per entry prefers the axes, and turns the step out of the tangent space, whence it is
    projected once more. The steps :math:`t` are counted row by row: with a sparse gradient each row
    moves as if its own gradients were all there are.

    Args:
        params, factor, retraction, dim, maximize, foreach, weight_decay: as in :class:`SphereSGD`.
        lr: :math:`\eta`; with a moment per row about the angle of a step, in radians.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: :math:`\epsilon`.
        second_moment: "row" or "element".
        amsgrad: divide by the largest second moment so far.

    Raises: as :class:`SphereSGD`.

    Source: Bécigneul & Ganea 2019 (arXiv 1810.00760); Kingma & Ba 2015.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimiser = SphereAdam([x], lr=0.75)
        >>> (-x[:, 1]).sum().backward()
        >>> optimiser.step()
        >>> x.data
        tensor([[0.8000, 0.6000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | int | Tensor = 1e-3,
        betas: tuple[float | int, float | int] = (0.9, 0.999),
        eps: float | int = 1e-8,
        *,
        second_moment: str = "row",
        amsgrad: bool = False,
        factor: str = "none",
        retraction: str = "projection",
        dim: int = -1,
        maximize: bool = False,
        foreach: bool | None = None,
        weight_decay: float | int = 0,
    ):
        options = {"lr": lr, "betas": betas, "eps": eps, "second_moment": second_moment}
        options |= {"amsgrad": amsgrad, "factor": factor, "retraction": retraction, "dim": dim}
        options |= {"maximize": maximize, "foreach": foreach, "weight_decay": weight_decay}
        super().__init__(params, options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for k, beta in enumerate(group["betas"]):
            _require(f"betas[{k}]", beta, 0, 1)
        _require("eps", group["eps"], 0, math.inf)
        _require_one_of("second_moment", group["second_moment"], SECOND_MOMENTS)

    def _state_keys(self, group: dict[str, Any]) -> dict[str, bool]:
        per_entry = group["second_moment"] == "element"
        keys = {"step": False, "exp_avg": True, "exp_avg_sq": per_entry}
        return keys | ({"max_exp_avg_sq": per_entry} if group["amsgrad"] else {})

    def _update(self, group: dict[str, Any], first: bool, gradient: Tensor, *rows: Tensor) -> Any:
        names = ("lr", "betas", "eps", "factor", "retraction", "maximize")
        return adam_update(gradient, *rows, **{name: group[name] for name in names})


def sgd_update(
    gradient: Float[Tensor, "rows dim"],
    x: Float[Tensor, "rows dim"],
    buffer: Float[Tensor, "rows dim"] | None = None,
    *,
    lr: float | int | Tensor,
    momentum: float | int = 0,
    dampening: float | int = 0,
    nesterov: bool = False,
    factor: str = "none",
    retraction: str = "projection",
    maximize: bool = False,
) -> tuple[Float[Tensor, "rows dim"], ...]:
    """Return the rows after a step of :class:`SphereSGD`, and their momentum if there is one.

    Args:
        gradient: in space, not yet projected.
        x: unit rows.
        buffer: the momentum, tangent at ``x``.
        lr, momentum, dampening, nesterov, factor, retraction, maximize: of the optimiser.

    Source: see :class:`SphereSGD`.

    Example:
        >>> sgd_update(torch.tensor([[9.0, -1.0]]), torch.tensor([[1.0, 0.0]]), lr=0.75)
        (tensor([[0.8000, 0.6000]]),)
    """
    direction = _tangent_gradient(gradient, x, factor, maximize)
    if buffer is None:
        return (RETRACTIONS[retraction](x, -lr * direction),)
    buffer = momentum * buffer + (1 - dampening) * direction
    direction = direction + momentum * buffer if nesterov else buffer
    moved = RETRACTIONS[retraction](x, -lr * direction)
    return moved, tangent_project(moved, buffer)


def adam_update(
    gradient: Float[Tensor, "rows dim"],
    x: Float[Tensor, "rows dim"],
    step: Float[Tensor, "rows 1"],
    exp_avg: Float[Tensor, "rows dim"],
    exp_avg_sq: Float[Tensor, "rows moments"],
    max_exp_avg_sq: Float[Tensor, "rows moments"] | None = None,
    *,
    lr: float | int | Tensor = 1e-3,
    betas: tuple[float | int, float | int] = (0.9, 0.999),
    eps: float | int = 1e-8,
    factor: str = "none",
    retraction: str = "projection",
    maximize: bool = False,
) -> tuple[Float[Tensor, "rows _"], ...]:
    """Return the rows after a step of :class:`SphereAdam`, and all their state.

    Args:
        gradient: in space, not yet projected.
        x: unit rows.
        step: how many steps each row has made.
        exp_avg: tangent at ``x``.
        exp_avg_sq: one column for a second moment per row, or as many as ``x`` has.
        max_exp_avg_sq: its largest value so far, with AMSGrad.
        lr, betas, eps, factor, retraction, maximize: of the optimiser.

    Source: see :class:`SphereAdam`.

    Example:
        >>> x, zero = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1)
        >>> adam_update(torch.tensor([[9.0, -1.0]]), x, zero, torch.zeros(1, 2), zero, lr=0.75)[0]
        tensor([[0.8000, 0.6000]])
    """
    per_row = exp_avg_sq.shape[-1] == 1
    direction = _tangent_gradient(gradient, x, factor, maximize)
    squares = direction.square()
    squares = squares.sum(-1, keepdim=True) if per_row else squares
    step = step + 1
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * direction
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * squares
    state = [step, exp_avg, exp_avg_sq]
    if max_exp_avg_sq is not None:
        state.append(torch.maximum(max_exp_avg_sq, exp_avg_sq))
    first = exp_avg / _one_minus_power(betas[0], step)
    second = state[-1] / _one_minus_power(betas[1], step)
    direction = first / (second.sqrt() + eps)
    if not per_row:
        direction = tangent_project(x, direction)
    moved = RETRACTIONS[retraction](x, -lr * direction)
    state[1] = tangent_project(moved, exp_avg)
    return (moved, *state)


def _tangent_gradient(gradient: Tensor, x: Tensor, factor: str, maximize: bool) -> Tensor:
    gradient = -gradient if maximize else gradient
    tangent = tangent_project(x, gradient)
    return tangent if factor == "none" else cos_factor(x, gradient).unsqueeze(-1) * tangent


def _one_minus_power(beta: float | int, step: Tensor) -> Tensor:
    # The difference of 1 and 0.999 has four good digits in float32.
    return -torch.expm1(step * (math.log(beta) if beta > 0 else -math.inf))


# --- rows out of a parameter and back -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Piece:
    """The rows of a parameter that have a gradient.

    Attributes:
        parameter: of any shape.
        gradient: ``(rows, dim)``, in float32 or float64.
        index: numbers of the rows along the first axis, from a sparse gradient; ``None`` for all.
        dim: the axis of the rows.
        first: whether the parameter has no state yet.
    """

    parameter: Tensor
    gradient: Tensor
    index: Tensor | None
    dim: int
    first: bool

    @classmethod
    def of(cls, name: str, p: Tensor, dim: int, first: bool) -> "Piece":
        """Take the gradient of a parameter, and refuse what is not finite."""
        gradient, index = p.grad, None
        if gradient.is_sparse:
            if gradient.sparse_dim() != 1 or dim % p.ndim == 0:
                raise ValueError(
                    f"the sparse gradient of {name} must be sparse along its first axis alone, and "
                    f"rows dense; got {gradient.sparse_dim()} sparse axes, and `dim` {dim}."
                )
            gradient = gradient.coalesce()
            gradient, index = gradient.values(), gradient.indices()[0]
        rows = gradient.movedim(dim, -1).reshape(-1, p.shape[dim]).to(_wide(p))
        # The norm, because the square of a finite number may not be finite.
        bad = ~torch.linalg.vector_norm(rows, dim=-1).isfinite()
        if bad.any():
            raise ValueError(
                f"the gradient of {name} must be finite, and so must its square; "
                f"{which_rows(_places(bad, p, index, dim))} not. Nothing has moved."
            )
        return cls(p, rows, index, dim, first)

    def read(self, t: Tensor) -> Tensor:
        """Return those rows of the parameter, or of a tensor of its state, as a matrix."""
        t = t if self.index is None else t.index_select(0, self.index)
        return t.movedim(self.dim, -1).reshape(-1, t.shape[self.dim]).to(self.gradient.dtype)

    def write(self, t: Tensor, rows: Tensor) -> None:
        """Put a matrix back where :meth:`read` has found it."""
        shape = list(t.movedim(self.dim, -1).shape)
        if self.index is None:
            t.copy_(rows.reshape(shape).movedim(-1, self.dim))
        else:
            shape[0] = len(self.index)
            t.index_copy_(0, self.index, rows.reshape(shape).movedim(-1, self.dim).to(t.dtype))


def _batches(pieces: list[Piece], foreach: bool | None) -> Iterable[list[Piece]]:
    """Sort pieces by what can be one matrix."""
    if foreach is None:
        foreach = all(piece.parameter.device.type != "cpu" for piece in pieces)
    if not foreach:
        return [[piece] for piece in pieces]
    kinds: dict[Any, list[Piece]] = {}
    for piece in pieces:
        rows = piece.gradient
        kinds.setdefault((rows.shape[1], rows.dtype, rows.device, piece.first), []).append(piece)
    return kinds.values()


def _joined(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _places(bad: Tensor, p: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """Mark the rows of the parameter that are marked among those with a gradient."""
    batch = [size for axis, size in enumerate(p.shape) if axis != dim % p.ndim]
    if index is None:
        return bad.reshape(batch)
    places = torch.zeros(batch, dtype=torch.bool, device=bad.device)
    places[index] = bad.reshape(-1, *batch[1:])
    return places


def _named(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    names = group.get("param_names") or [f"parameter {k}" for k in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


# --- what is refused ------------------------------------------------------------------------------


def _require_rows(name: str, p: Tensor, dim: int) -> Tensor:
    """Return the norms of the rows."""
    norms = require_directions(name, p, dim)
    if p.shape[dim] < 2:
        raise ValueError(
            f"`{name}` must have rows of at least 2 entries along axis {dim}; got shape "
            f"{tuple(p.shape)}."
        )
    return norms


def _normalise(name: str, p: Tensor, norms: Tensor, dim: int) -> None:
    # Rounding to p's dtype changes a norm by half a unit at most; the rest is for its computation.
    allowed = torch.finfo(p.dtype).eps / 2 + 16 * torch.finfo(norms.dtype).eps
    off = (norms - 1).abs() > allowed
    if off.any():
        largest = (norms - 1).abs().max().item()
        warnings.warn(
            f"{name}: {which_rows(off)} not unit along axis {dim} (the norm is off by up to "
            f"{largest:.2g}) and will be normalised.",
            stacklevel=5,
        )
        with torch.no_grad():
            p.copy_(torch.where(off.unsqueeze(dim), UnitNorm(dim)(p), p))


def _require(name: str, value: float | int, least: float | int, below: float | int) -> None:
    if not least <= value < below:
        raise ValueError(f"`{name}` must be in [{least}, {below}); got {value!r}.")


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {known}; got {value!r}.")
