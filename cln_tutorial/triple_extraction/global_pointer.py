r"""The loss of scores for pairs of tokens, one matrix per relation: nothing is subtracted.

.. math:: \ell = \sum_r \log\Bigl(1 + \sum_{(i,j) \notin P_r} e^{s_{rij}}\Bigr)
    + \log\Bigl(1 + \sum_{(i,j) \in P_r} e^{-s_{rij}}\Bigr)

Source: articles 7359 (the loss), 8373 and 8877 (GlobalPointer and its efficient form), 8888 (its
use for triples). Their sparse form takes the log-sum of all cells and subtracts the positives:
with one confident positive everything cancels, and the gradient has the wrong sign.
"""

import functools
import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.triple_extraction.losses import require_indices

# Below this a product of float64 may have lost digits of its terms.
_SAFE = 1e-280
_CELLS_PER_BLOCK = 2**22


def global_pointer_loss(
    scores: Float[Tensor, "b r l l"],
    positives: Int[Tensor, "p 4"],
    mask: Bool[Tensor, "b l"] | None = None,
    *,
    tril: bool = False,
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    r"""Return the multi-label softmax loss of a score for each pair of tokens.

    .. math:: \sum_r \log\Bigl(1 + \sum_{(i,j) \notin P_r} e^{s_{rij}}\Bigr)
        + \log\Bigl(1 + \sum_{(i,j) \in P_r} e^{-s_{rij}}\Bigr)

    The positives are left out of the first sum before it is taken. The first derivative is kept
    from the forward pass; the second one is right, too.

    Args:
        scores: ``(b, r, l, l)``, floating: of a span that starts at the row and ends at the column.
        positives: the indices (sentence, relation, start, end) of the true cells, ``(p, 4)``,
            int64. What stands there twice counts once; what is masked does not count.
        mask: True at real tokens, ``(b, l)``. A cell counts if both of its tokens do. What a
            masked cell holds is never used: NaN may stand there.
        tril: leave out the cells below the diagonal, whose end stands before the start.
        reduction: "mean" over the sentences of the sum over the relations, or "sum".

    Returns:
        A scalar in the dtype of ``scores``, float32 for half types.

    Raises:
        TypeError: if ``scores`` is not floating, or ``positives`` not int64.
        ValueError: for shapes that do not fit, an index out of range, with ``tril`` a positive
            whose end stands before its start, or an unknown ``reduction``. Indices are looked at on
            the CPU only.

    Source:
        Articles 7359 and 8373.

    Example:
        >>> scores = torch.zeros(1, 1, 2, 2)
        >>> global_pointer_loss(scores, torch.tensor([[0, 0, 0, 1]]))  # log 4 + log 2
        tensor(2.0794)
    """
    require_floating("scores", scores)
    if scores.ndim != 4 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"`scores` must have shape (b, r, l, l); got {tuple(scores.shape)}.")
    batch, relations, length, _ = scores.shape
    _require_rest(positives, mask, (batch, relations, length, length), tril, reduction)

    s = scores.to(wide_dtype(scores.dtype))
    cells = _cells(mask, (batch, length), tril, s.device)[:, None]
    where = positives.unbind(-1)
    if values_are_hidden():
        negative, true = _plain_negative(s, where, cells), s[where]
    else:
        negative, true = _Dense.apply(s, positives, cells)
    counts = cells[where[0], 0, where[2], where[3]] & _first_of_equals(positives, s.shape)
    return _reduced(negative + _positive(true, counts, where, negative), reduction)


def efficient_global_pointer_loss(
    q: Float[Tensor, "b l d"],
    k: Float[Tensor, "b l d"],
    bias_start: Float[Tensor, "b r l"],
    bias_end: Float[Tensor, "b r l"],
    positives: Int[Tensor, "p 4"],
    mask: Bool[Tensor, "b l"] | None = None,
    *,
    tril: bool = False,
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    r"""Return :func:`.global_pointer_loss` of separable scores, without a tensor of the scores.

    .. math:: s_{rij} = \frac{q_i \cdot k_j}{\sqrt d} + a_{ri} + b_{rj}, \qquad
        \sum_{ij} e^{s_{rij}} = \sum_i e^{a_{ri}} \sum_j e^{q_i \cdot k_j / \sqrt d}\, e^{b_{rj}}

    The inner sums of all relations are one product of matrices: :math:`l^2` exponentials and not
    :math:`r l^2`. The lines that hold positives are summed anew, without these.

    The product is taken in float64, which has no TF32 and a range of 700 instead of 87 for the
    exponents. A line beyond that is summed by the definition; so is everything while compiling,
    under ``torch.func``, and for second derivatives. To find such lines waits for the device once.

    Args:
        q: what the first tokens ask, ``(b, l, d)``, floating.
        k: what the last tokens answer, ``(b, l, d)``.
        bias_start: :math:`a`, one score for each relation and first token, ``(b, r, l)``.
        bias_end: :math:`b`, one for each relation and last token, ``(b, r, l)``.
        positives, mask, tril, reduction: as in :func:`.global_pointer_loss`.

    Returns:
        A scalar in the widest dtype of the four, float32 for half types.

    Raises:
        TypeError: if one of the four is not floating, or ``positives`` not int64.
        ValueError: as :func:`.global_pointer_loss`.

    Source:
        Article 8877 for the scores; the separable sum is ours.

    Example:
        >>> q = k = torch.zeros(1, 2, 3)
        >>> a = b = torch.zeros(1, 1, 2)
        >>> efficient_global_pointer_loss(q, k, a, b, torch.tensor([[0, 0, 0, 1]]))
        tensor(2.0794)
    """
    given = {"q": q, "k": k, "bias_start": bias_start, "bias_end": bias_end}
    for name, each in given.items():
        require_floating(name, each)
    batch, relations, length = bias_start.shape if bias_start.ndim == 3 else (0, 0, 0)
    if (
        bias_start.ndim != 3
        or bias_end.shape != bias_start.shape
        or q.shape != k.shape
        or q.ndim != 3
        or q.shape[:2] != (batch, length)
    ):
        got = ", ".join(f"`{name}` {tuple(each.shape)}" for name, each in given.items())
        raise ValueError(
            f"`q` and `k` must have shape (b, l, d), `bias_start` and `bias_end` (b, r, l); "
            f"got {got}."
        )
    _require_rest(positives, mask, (batch, relations, length, length), tril, reduction)

    dtype = wide_dtype(functools.reduce(torch.promote_types, [x.dtype for x in given.values()]))
    with torch.autocast(q.device.type, enabled=False):
        keep = torch.ones_like(q[..., 0], dtype=torch.bool) if mask is None else mask
        cells = _cells(keep, (batch, length), tril, q.device)
        q, k = (x.to(dtype).masked_fill(~keep[..., None], 0.0) for x in (q, k))
        a, b = (
            x.to(dtype).masked_fill(~keep[:, None], _floor(dtype)) for x in (bias_start, bias_end)
        )
        pairs = (q / math.sqrt(q.shape[-1]) @ k.mT).masked_fill(~cells, _floor(dtype))
        where = positives.unbind(-1)
        sentence, relation, start, end = where
        lines = _without_positives(_line_sums(pairs, b), pairs, b, where)
        negative = _log1p_sum_exp(a + lines, (-1,))
        true = pairs[sentence, start, end] + a[where[:3]] + b[sentence, relation, end]
        shape = (batch, relations, length, length)
        counts = cells[sentence, start, end] & _first_of_equals(positives, shape)
        return _reduced(negative + _positive(true, counts, where, negative), reduction)


# --- dense scores ---------------------------------------------------------------------------------


class _Dense(torch.autograd.Function):
    """The log-sums of the negatives and the scores of the positives, derivative kept at once."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, positives: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        where = positives.unbind(-1)
        work = s.masked_fill(~cells, -math.inf)
        work[where] = -math.inf
        top = work.amax((-2, -1), keepdim=True).clamp_min_(0.0)
        work.sub_(top).exp_()
        total = work.sum((-2, -1), keepdim=True) + torch.expm1(-top)
        ctx.save_for_backward(s, positives, cells, work, 1.0 + total)
        return (top + torch.log1p(total))[..., 0, 0], s[where]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_true: Tensor) -> tuple[Tensor, None, None]:
        s, positives, cells, work, total = ctx.saved_tensors
        where = positives.unbind(-1)
        if torch.is_grad_enabled():  # somebody will differentiate once more
            floor = _floor(s.dtype)
            log_sum = _plain_negative(s, where, cells)[..., None, None]
            shares = torch.exp(_negatives(s, where, cells, floor) - log_sum)
            return (gradient[..., None, None] * shares).index_put(where, of_true, True), None, None
        slope = work * (gradient[..., None, None] / total)
        return slope.index_put_(where, of_true, accumulate=True), None, None


def _plain_negative(s: Tensor, where: tuple[Tensor, ...], cells: Tensor) -> Tensor:
    return _log1p_sum_exp(_negatives(s, where, cells, _floor(s.dtype)), (-2, -1))


def _negatives(s: Tensor, where: tuple[Tensor, ...], cells: Tensor, value: float) -> Tensor:
    return s.masked_fill(~cells, value).index_put(where, s.new_tensor(value))


# --- separable scores -----------------------------------------------------------------------------


def _line_sums(pairs: Tensor, b: Tensor) -> Tensor:
    """Return log sum_j exp(pairs_ij + b_rj) for each relation r and line i, ``(b, r, l)``."""
    # MPS has no float64.
    if values_are_hidden() or pairs.device.type == "mps":
        return (pairs[:, None] + b[:, :, None]).logsumexp(-1)
    return _LineSums.apply(pairs, b)


class _LineSums(torch.autograd.Function):
    """The product of exponentials; where it underflows, silently, the definition."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, b: Tensor) -> Tensor:
        left, right = b.double(), pairs.double()
        top_left, top_right = left.amax(-1, keepdim=True), right.amax(-1, keepdim=True)
        left, right = (left - top_left).exp_(), (right - top_right).exp_()
        product = left @ right.mT
        sums = product.log() + top_left + top_right.mT
        low = (product < _SAFE).nonzero()
        for sentence, relation, line in _blocks(low, pairs.shape[-1]):
            exponents = pairs[sentence, line].double() + b[sentence, relation]
            sums[sentence, relation, line] = exponents.logsumexp(-1)
        ctx.save_for_backward(pairs, b, left, right, product, sums, low)
        return sums.to(pairs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        pairs, b, left, right, product, sums, low = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate once more
            shares = (pairs[:, None] + b[:, :, None]).softmax(-1) * gradient[..., None]
            return shares.sum(1), shares.sum(2)
        weights = gradient / product
        weights[low.unbind(-1)] = 0.0
        of_pairs, of_b = right * (weights.mT @ left), left * (weights @ right)
        for sentence, relation, line in _blocks(low, pairs.shape[-1]):
            where = sentence, relation, line
            exponents = pairs[sentence, line].double() + b[sentence, relation]
            shares = (exponents - sums[where][:, None]).exp_() * gradient[where][:, None]
            of_pairs.index_put_((sentence, line), shares, accumulate=True)
            of_b.index_put_((sentence, relation), shares, accumulate=True)
        return of_pairs.to(pairs.dtype), of_b.to(b.dtype)


def _blocks(lines: Tensor, length: int) -> list[tuple[Tensor, ...]]:
    if not len(lines):
        return []
    return [block.unbind(-1) for block in lines.split(max(1, _CELLS_PER_BLOCK // length))]


def _without_positives(
    lines: Tensor, pairs: Tensor, b: Tensor, where: tuple[Tensor, ...]
) -> Tensor:
    """Put in the log-sums of the lines that hold positives, taken without these."""
    sentence, relation, start, end = where
    line = (sentence * lines.shape[1] + relation) * lines.shape[2] + start
    number = torch.arange(len(line), device=line.device)
    # Of the positives on one line one stands for all.
    leader = line.new_zeros(lines.numel()).scatter(0, line, number)[line]
    held = torch.zeros(len(line), lines.shape[2], dtype=torch.bool, device=line.device)
    held = held.index_put((leader, end), held.new_ones(()))[leader]
    exponents = (pairs[sentence, start] + b[sentence, relation]).masked_fill(
        held, _floor(pairs.dtype)
    )
    anew = exponents.logsumexp(-1).masked_fill(leader != number, 0.0)
    return lines.reshape(-1).index_fill(0, line, 0.0).index_add(0, line, anew).view_as(lines)


# --- what both share ------------------------------------------------------------------------------


def _positive(true: Tensor, counts: Tensor, where: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Return log(1 + sum exp(-s)) over the positives of each sentence and relation."""
    row = where[0] * like.shape[1] + where[1]
    exponents = (-true).masked_fill(~counts, _floor(true.dtype))
    zeros = exponents.new_zeros(like.numel())
    top = zeros.scatter_reduce(0, row, exponents.detach(), "amax")
    total = zeros.index_add(0, row, (exponents - top[row]).exp())
    return (top + torch.log1p(total + torch.expm1(-top))).view_as(like)


def _log1p_sum_exp(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return log(1 + sum exp(x)): no overflow, and all digits of a small sum."""
    top = x.detach().amax(dim, keepdim=True).clamp_min(0.0)
    total = (x - top).exp().sum(dim, keepdim=True) + torch.expm1(-top)
    return (top + torch.log1p(total)).flatten(x.ndim - len(dim) - 1)


def _first_of_equals(positives: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return True at the first of equal rows, False at its repetitions."""
    key = positives.new_zeros(len(positives))
    for column, size in zip(positives.unbind(-1), shape, strict=True):
        key = key * size + column
    order = key.argsort()
    ordered = key[order]
    changes = torch.cat([key.new_ones(1), ordered.diff()])[: len(key)] != 0
    return torch.zeros_like(changes).scatter(0, order, changes)


def _cells(mask: Tensor | None, shape: tuple[int, int], tril: bool, device: torch.device) -> Tensor:
    """Return which cells count, ``(b, l, l)``."""
    keep = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    cells = keep[:, :, None] & keep[:, None]
    return cells.triu() if tril else cells


def _floor(dtype: torch.dtype) -> float:
    """Return what has no weight, and of which a few still add up to a finite number."""
    return torch.finfo(dtype).min / 16


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    total = losses.sum()
    return total / max(len(losses), 1) if reduction == "mean" else total


def _require_rest(
    positives: Tensor,
    mask: Tensor | None,
    shape: tuple[int, ...],
    tril: bool,
    reduction: str,
) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' or 'sum'; got {reduction!r}.")
    require_indices("positives", positives, shape)
    if mask is not None:
        expected = (shape[0], shape[2])
        if mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be bool; got {mask.dtype}.")
        if mask.shape != expected:
            raise ValueError(f"`mask` must have shape {expected}; got {tuple(mask.shape)}.")
    if not tril or values_are_hidden() or positives.device.type != "cpu":
        return
    wrong = (positives[:, 3] < positives[:, 2]).nonzero()[:, 0]
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"`positives[{first}]` is {positives[first].tolist()}: with `tril` no span ends before "
            f"it starts."
        )
