r"""Isotonic regression, and the blocks that soft sorting and soft ranking share with it.

.. math:: \hat y = \arg\min_{v_1 \ge \dots \ge v_n} \tfrac12 \lVert v - y \rVert^2

The solution is constant on blocks of neighbours. Blocks are recorded where they are found, and
everything else is a composition over them: a mean in each block, a softmax in each block.

Source: Best & Chakravarti 1990 (pool adjacent violators); Blondel, Teboul, Berthet & Djolonga 2020,
section 4, for the two losses.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd import forward_ad

from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.smoothing._checks import choose_backend, require_axis, wide_dtype

WIDEST_SHORT = 2**15  # entries of a row whose layout needs 32 bits each, half of them an index
MOST_ROUNDS = 24  # of pooling everywhere at once, before a stack takes what is left
SMALLEST = 1e-300  # a strength of 0 compares as this one, whose quotients are defined


class Problem(NamedTuple):
    """Which blocks are wanted.

    ``kind`` is "mean" (isotonic regression itself, of rows as they stand), "rank" or "sort" (of
    rows times ``sign``, sorted downwards); ``kl`` takes the entropic loss for the quadratic one.
    """

    kind: str
    kl: bool = False
    sign: int = 1


def isotonic_regression(
    y: Shaped[Tensor, "..."],
    dim: int = -1,
    *,
    decreasing: bool = True,
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Return the monotone sequence that is nearest to each row, in linear time.

    .. math:: \hat y_i = \frac1{|B(i)|} \sum_{j \in B(i)} y_j

    with :math:`B(i)` the block of :math:`i`: neighbours that are out of order are pooled.

    Args:
        y: rows along ``dim``, any floating dtype; sums are in float64.
        dim: the axis along which the result is monotone.
        decreasing: the result falls; False: it rises, as in scikit-learn.
        backend: "numba", "reference" (plain PyTorch), or "auto", the faster one that is there.

    Returns:
        Shape and dtype of ``y``. The gradient is the mean of the incoming one in each block; the
        second derivative is zero. A row that holds NaN or an infinity is NaN.

    Raises:
        TypeError: if ``y`` is not floating.
        ValueError: for an axis that ``y`` does not have, or a backend that does not run here.

    Source:
        Best & Chakravarti 1990; Blondel et al. 2020, section 4.

    Example:
        >>> isotonic_regression(torch.tensor([3.0, 1.0, 2.0, 0.0]))
        tensor([3.0000, 1.5000, 1.5000, 0.0000])
    """
    dim = require_axis("y", y, dim)
    backend = choose_backend(backend, y)
    if y.numel() == 0:
        return y.clone()
    rows = y.movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1]).to(wide_dtype(y.dtype))
    problem = Problem("mean", sign=1 if decreasing else -1)
    zeros = torch.zeros(len(flat), dtype=torch.float64, device=y.device)
    fit = solve(flat, zeros, zeros.long(), problem, backend)
    return fit.reshape(rows.shape).movedim(-1, dim).to(y.dtype)


def solve(rows: Tensor, strength: Tensor, pads: Tensor, problem: Problem, backend: str) -> Tensor:
    """Solve a problem for rows ``(batch, n)``: fused where that can be, else composed.

    Args:
        rows: float32 or float64, at least one row and one entry.
        strength: of the regularisation, ``(batch,)``, float64.
        pads: how many of the entries of :math:`-\\infty` are padding, without a rank, ``(batch,)``.
    """
    if backend == "numba" and _fuses(strength):
        return _Fused.apply(rows, strength, pads, problem)
    layout = find_blocks(rows, strength, pads, problem, backend)
    return composed(rows, layout, strength, pads, problem)


def composed(
    rows: Tensor, layout: Tensor, strength: Tensor, pads: Tensor, problem: Problem
) -> Tensor:
    """Compute the solution from recorded blocks, in operations that PyTorch differentiates twice.

    In a block all is relative to its first entry, so that nothing large is subtracted: the error
    does not grow as the strength falls, and ties are ties to the last bit.
    """
    n, index_bits = rows.shape[-1], _index_bits(layout.dtype)
    order, start = (layout & (2**index_bits - 1)).long(), (layout >> index_bits).long()
    position = torch.arange(n, device=rows.device).expand(rows.shape)
    masked = start < 0
    start = torch.where(masked, position, start)
    # 0 is the limit from above. Divided by infinity what is 0 stays 0, and so do its derivatives.
    strength = strength.masked_fill(strength == 0, math.inf).unsqueeze(-1)
    s = problem.sign * rows.to(_sum_dtype(rows)).gather(-1, order).masked_fill(masked, 0)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(values).scatter_add(-1, start, values).gather(-1, start)

    first = s.gather(-1, start)
    fall, steps = s - first, (start - position).to(s.dtype)
    count = total(torch.ones_like(s))
    if problem.kind == "mean":
        solution = problem.sign * (first + total(fall) / count)
    elif problem.kind == "rank":
        rank_sum = count * (_top_rank(n, pads, problem) - start - (count - 1) / 2)
        if problem.kl:
            share = (fall / strength).exp()
            solution = rank_sum * (share / total(share))
        else:
            solution = (fall - total(fall) / count) / strength + rank_sum / count
        solution = torch.where(masked, _masked_rank(masked, pads, problem).to(s.dtype), solution)
    elif problem.kl:
        steps = steps / strength
        solution = steps - total(steps.exp()).log() + first + total(fall.exp()).log()
        solution = (problem.sign * solution).masked_fill(masked, -math.inf)
    else:
        solution = (steps + (count - 1) / 2) / strength + first + total(fall) / count
        solution = (problem.sign * solution).masked_fill(masked, -math.inf)
    if problem.kind != "sort":
        solution = torch.zeros_like(solution).scatter(-1, order, solution)
    solution = solution.masked_fill(_poisoned(rows, problem).unsqueeze(-1), math.nan)
    return solution.to(rows.dtype)


def _top_rank(n: int, pads: Tensor, problem: Problem) -> Tensor | int:
    # Ranks fall from this one. Entries of -inf are last (sign 1) and the padding among them has no
    # rank; or they are first, and above the finite ones, which then count from n - their number.
    return n if problem.sign < 0 else n - pads.unsqueeze(-1)


def _masked_rank(masked: Tensor, pads: Tensor, problem: Problem) -> Tensor:
    number = masked.sum(-1, keepdim=True)
    below = 0 if problem.sign > 0 else masked.shape[-1] - number
    return below + (number - pads.unsqueeze(-1) + 1) / 2


def _poisoned(rows: Tensor, problem: Problem) -> Tensor:
    bad = rows.isnan() | (rows == math.inf)
    return (bad | (rows == -math.inf) if problem.kind == "mean" else bad).any(-1)


def _sum_dtype(rows: Tensor) -> torch.dtype:
    return torch.float32 if rows.device.type == "mps" else torch.float64  # which has no float64


# --- what runs ------------------------------------------------------------------------------------


def _fuses(strength: Tensor) -> bool:
    """Whether no transform has to see into the operations, nor a gradient to reach the strength."""
    hidden = values_are_hidden() or forward_ad._current_level >= 0
    return not (hidden or strength.requires_grad)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, strength: Tensor, pads: Tensor, problem: Problem) -> Tensor:
        from cln_tutorial.smoothing.isotonic_loops import solve

        layout = _new_layout(rows)
        solution = solve(rows, strength, pads, layout, problem)
        # Only the entropic loss has a derivative that depends on the values.
        ctx.save_for_backward(rows, solution if problem.kl else None, layout, strength, pads)
        ctx.problem = problem
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, solution, layout, strength, pads = ctx.saved_tensors
        if torch.is_grad_enabled() or values_are_hidden():
            with torch.enable_grad():
                again = composed(rows, layout, strength, pads, ctx.problem)
            return (
                *torch.autograd.grad(again, rows, grad, create_graph=torch.is_grad_enabled()),
                *[None] * 3,
            )
        found = _gradient(grad, rows, solution, layout, strength, *ctx.problem)
        return found, None, None, None


@torch.library.custom_op("cln_tutorial::isotonic_gradient", mutates_args=())
def _gradient(
    grad: Tensor,
    rows: Tensor,
    solution: Tensor | None,
    layout: Tensor,
    strength: Tensor,
    kind: str,
    kl: bool,
    sign: int,
) -> Tensor:
    # An operator, because is_grads_batched loops over operators, and hides that it does.
    from cln_tutorial.smoothing.isotonic_loops import gradient

    problem = Problem(kind, kl, sign)
    return gradient(grad, rows, solution, layout, strength, problem)


def find_blocks(
    rows: Tensor, strength: Tensor, pads: Tensor, problem: Problem, backend: str
) -> Int[Tensor, "batch n"]:
    """Return the layout: at each sorted position an index, and the first position of its block.

    An entry is ``first << bits | index``, with half of the bits of its type; the first position of
    what is masked is -1.
    """
    with torch.no_grad():
        return _blocks(rows.detach(), strength.detach(), pads, *problem, backend == "numba")


@torch.library.custom_op("cln_tutorial::isotonic_blocks", mutates_args=())
def _blocks(
    rows: Tensor,
    strength: Tensor,
    pads: Tensor,
    kind: str,
    kl: bool,
    sign: int,
    use_numba: bool,
) -> Tensor:
    problem = Problem(kind, kl, sign)
    layout = _new_layout(rows)
    if rows.numel() == 0:
        return layout
    if use_numba:
        from cln_tutorial.smoothing.isotonic_loops import solve

        solve(rows, strength, pads, layout, problem)
        return layout
    return reference_blocks(rows, strength, pads, problem).to(layout.dtype)


@_blocks.register_fake
def _(rows, strength, pads, kind, kl, sign, use_numba):
    return _new_layout(rows)


@_blocks.register_vmap
def _(info, in_dims, rows, strength, pads, *rest):
    rows, strength, pads = (
        t.unsqueeze(0).expand(info.batch_size, *t.shape) if axis is None else t.movedim(axis, 0)
        for t, axis in zip((rows, strength, pads), in_dims[:3], strict=True)
    )
    layout = _blocks(rows.flatten(0, 1), strength.flatten(), pads.flatten(), *rest)
    return layout.reshape(rows.shape), 0


def _new_layout(rows: Tensor) -> Tensor:
    short = rows.shape[-1] <= WIDEST_SHORT
    return rows.new_empty(rows.shape, dtype=torch.int32 if short else torch.int64)


def _index_bits(dtype: torch.dtype) -> int:
    return dtype.itemsize * 4


# --- pool adjacent violators, without a compiler --------------------------------------------------


class _Pool(NamedTuple):
    """A block: one, of Python's numbers, or many, of tensors.

    ``rest`` is the sum over its entries of the difference to the first one; for the entropic loss,
    of the exponential of that difference. ``ranks`` is the sum of its ranks.
    """

    row: Any
    start: Any
    count: Any
    ranks: Any
    first: Any
    rest: Any


def reference_blocks(rows: Tensor, strength: Tensor, pads: Tensor, problem: Problem) -> Tensor:
    """Return the layout from vectorised rounds; rows that need many of them go to a stack."""
    batch, n = rows.shape
    s = problem.sign * rows.to(_sum_dtype(rows))
    position = torch.arange(n, device=rows.device).expand(batch, n)
    if problem.kind == "mean":
        order = position
    else:
        s, order = s.sort(dim=-1, descending=True, stable=True)
    masked = s.isinf() | _poisoned(rows, problem).unsqueeze(-1)
    strength = strength.clamp(min=SMALLEST).to(s.dtype)
    row, start = (~masked).nonzero(as_tuple=True)
    first = s[row, start]
    ranks = (_top_rank(n, pads, problem) - position).to(s.dtype)[row, start]
    one = torch.ones_like(first)
    pools = _Pool(row, start, one, ranks, first, one if problem.kl else one - 1)
    for _ in range(MOST_ROUNDS):
        joined = _joined(pools, strength, problem)
        if not joined.any():
            break
        pools = _pooled(pools, joined, strength, problem)
    else:
        pools = _stacked(pools, strength, problem)
    starts = torch.full_like(order, -1)
    starts[pools.row, pools.start] = pools.start
    starts = starts.cummax(-1).values.masked_fill(masked, -1)
    return starts << _index_bits(_new_layout(rows).dtype) | order


def _joined(pools: _Pool, strength: Tensor, problem: Problem) -> Tensor:
    """Whether each block is out of order with the one before it."""
    before, after = (_Pool(*(t[part] for t in pools)) for part in (slice(-1), slice(1, None)))
    violates = _violates(before, after, strength[after.row], problem, torch)
    return violates & (before.row == after.row)


def _violates(a: _Pool, b: _Pool, strength: Any, problem: Problem, functions: Any) -> Any:
    """Whether the values of block ``a`` and of ``b``, the next one, are not in order."""
    fall = a.first - b.first
    if problem.kl and problem.kind == "rank":
        return a.rest * b.ranks <= b.rest * a.ranks * functions.exp(-fall / strength)
    if problem.kl:
        ratio = functions.expm1(-a.count / strength) / functions.expm1(-b.count / strength)
        return a.count / strength + functions.log(ratio) < fall + functions.log(a.rest / b.rest)
    fall, half = fall + a.rest / a.count - b.rest / b.count, (a.count + b.count) / 2
    if problem.kind == "sort":
        return half < strength * fall
    return fall <= (strength * half if problem.kind == "rank" else 0)


def _carried(rest: Any, count: Any, fall: Any, strength: Any, problem: Problem, exp: Any) -> Any:
    """Return the ``rest`` of a block relative to an entry that lies higher by ``fall``."""
    if not problem.kl:
        return rest - count * fall
    return rest * exp(-fall / strength if problem.kind == "rank" else -fall)


def _pooled(pools: _Pool, joined: Tensor, strength: Tensor, problem: Problem) -> _Pool:
    """Pool all runs of blocks that are out of order, which no solution can part."""
    leads = torch.cat([joined.new_ones(1), ~joined])
    run = leads.cumsum(0) - 1
    fall = pools.first[leads][run] - pools.first
    rest = _carried(pools.rest, pools.count, fall, strength[pools.row], problem, torch.exp)
    count, ranks, rest = (
        torch.zeros_like(pools.first[leads]).index_add(0, run, t)
        for t in (pools.count, pools.ranks, rest)
    )
    return _Pool(pools.row[leads], pools.start[leads], count, ranks, pools.first[leads], rest)


def _stacked(pools: _Pool, strength: Tensor, problem: Problem) -> _Pool:
    """Pool one block after the other, in linear time whatever the order."""
    strengths, stack = strength.tolist(), []
    for b in map(_Pool._make, zip(*(t.tolist() for t in pools), strict=True)):
        tau = strengths[b.row]
        while stack and stack[-1].row == b.row and _violates(stack[-1], b, tau, problem, math):
            a = stack.pop()
            rest = _carried(b.rest, b.count, a.first - b.first, tau, problem, math.exp)
            b = _Pool(*a[:2], a.count + b.count, a.ranks + b.ranks, a.first, a.rest + rest)
        stack.append(b)
    return _Pool(*(torch.tensor(t, device=strength.device) for t in zip(*stack, strict=True)))
