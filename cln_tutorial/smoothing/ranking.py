r"""Losses of a ranking: the area under the ROC curve by pairs, and Spearman's correlation.

.. math:: \mathrm{AUC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)

Source: Su Jianlin, article 6620 (https://kexue.fm/archives/6620), 2019, where a reader asks for
the AUC and another one answers: by pairs.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.smoothing._checks import (
    require_axis,
    require_floating,
    require_temperature,
    wide_dtype,
)
from cln_tutorial.smoothing.sorting import soft_rank

KINDS = ("logistic", "square", "squared_hinge")
TILE = 2**17  # pairs at a time: a few tiles of float32 stay in the cache of one core

Temperature = float | int | Float[Tensor, "..."]


def soft_auc_loss(
    scores: Shaped[Tensor, "... n"],
    target: Shaped[Tensor, "... n"],
    temperature: Temperature = 1.0,
    kind: str = "logistic",
    *,
    sample_weight: Shaped[Tensor, "... n"] | None = None,
) -> Float[Tensor, "..."]:
    r"""Average a loss over all pairs of a positive and a negative: a surrogate for 1 - AUC.

    .. math:: L = \frac{\sum_{ij} w_i w_j\, \ell\bigl((s_i^+ - s_j^-) / \tau\bigr)}
        {\sum_{ij} w_i w_j}, \qquad
        \ell(d) = \sigma(-d), \quad (1 - d)^2 \quad\text{or}\quad \max(0, 1 - d)^2

    "logistic" is 1 - AUC when the difference of two scores has logistic noise: for
    :math:`\tau \to 0` it is 1 - AUC, ties counting one half, and if no two scores are closer than
    :math:`\delta`, it is off by at most :math:`\sigma(-\delta / \tau)`. The two squares
    are at least 1 - AUC at every temperature.

    Cost of a row with :math:`n_+ + n_- = n`: "logistic" takes time :math:`O(n_+ n_-)` and memory
    :math:`O(n)`, for pairs are visited in tiles; "square" takes :math:`O(n)`, six sums;
    "squared_hinge" :math:`O(n \log n)`, a sort and three running sums. All are exact.

    Args:
        scores: ``(..., n)``; each row is ranked by itself. An entry of :math:`-\infty` is masked:
            it has weight 0 and gradient 0.
        target: same shape, 0 and 1.
        temperature: positive, or for "logistic" 0, which is 1 - AUC with gradient 0; a tensor
            broadcasts to ``(..., 1)``. In the squares it is the margin.
        kind: "logistic", "square" or "squared_hinge".
        sample_weight: same shape, at least 0.

    Returns:
        One loss per row, ``(...)``, dtype of ``scores``. A row without pairs has loss 0 and
        gradient 0. NaN and :math:`+\infty` make their row NaN.

    Raises:
        TypeError: if ``scores`` are not floating.
        ValueError: for an unknown kind, shapes that differ, a temperature that is negative, NaN, or
            0 in a square; and, on a CPU, for targets that are not 0 or 1 and negative weights.

    Source:
        Readers' comments of article 6620; Gültekin et al. 2018 (MBA) for the square by pairs.

    Example:
        >>> scores, target = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1, 0, 1])
        >>> soft_auc_loss(scores, target, temperature=0)
        tensor(0.5000)
        >>> soft_auc_loss(scores, target, kind="squared_hinge")
        tensor(2.)
    """
    require_axis("scores", scores, -1)
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}; got {kind!r}.")
    require_temperature(temperature, (*scores.shape[:-1], 1))
    hard = not isinstance(temperature, Tensor) and temperature == 0
    if kind != "logistic" and (hard or _has_zero(temperature)):
        raise ValueError(f"`temperature` is the margin of {kind!r}, and must be more than 0.")
    _require_pairs(scores, target, sample_weight)
    x, w = scores.to(wide_dtype(scores.dtype)), sample_weight
    w = torch.ones_like(x) if w is None else w.to(x.dtype)
    masked = scores == -math.inf
    x, w = x.masked_fill(masked, 0), w.masked_fill(masked, 0)
    chosen = target != 0
    positive, negative = torch.where(chosen, w, 0), torch.where(chosen, 0, w)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(x.dtype)
    if hard:
        loss = _hard(x, positive, negative)
    elif kind == "logistic":
        loss = _logistic(x, positive, negative, temperature)
    else:
        x, positive, negative = map(_to_exact, (x, positive, negative))
        x = x / (_to_exact(temperature) if isinstance(temperature, Tensor) else temperature)
        squares = _square if kind == "square" else _squared_hinge
        loss = squares(x, positive, negative)
    no_pairs = (positive.sum(-1) == 0) | (negative.sum(-1) == 0)
    return (torch.where(no_pairs, 0, loss) + _poison(x)).to(scores.dtype)


def soft_spearman(
    a: Shaped[Tensor, "..."],
    b: Shaped[Tensor, "..."],
    temperature: Temperature = 1.0,
    dim: int = -1,
    *,
    regularization: str = "l2",
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Correlate the soft ranks of two tensors.

    .. math:: \rho = \mathrm{corr}\bigl(r_\tau(a), r_\tau(b)\bigr)

    With "l2" it goes from Spearman's correlation, :math:`\tau \to 0`, to Pearson's,
    :math:`\tau \to \infty`, where soft ranks are affine. Both sides have the same temperature; if
    their scales differ, hand over ranks for the fixed side: at :math:`\tau \le 1` the soft ranks of
    distinct ranks are themselves.

    Args:
        a, b: same shape and dtype. Where one is :math:`-\infty`, the pair is masked.
        temperature, dim, regularization, backend: as in ``soft_rank``; 0 is Spearman's correlation,
            ties having their mean rank.

    Returns:
        A correlation per row, in [-1, 1] up to rounding, shape of ``a`` without ``dim``. A row
        whose ranks are all equal on one side has no correlation, and gets 0 with gradient 0.

    Raises:
        TypeError: if ``a`` or ``b`` is not floating.
        ValueError: for shapes or dtypes that differ, and as ``soft_rank``.

    Source:
        Blondel, Teboul, Berthet & Djolonga 2020 (2002.08871), section 6.

    Example:
        >>> a, b = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([30.0, 20.0, 10.0])
        >>> soft_spearman(a, b, temperature=0)
        tensor(0.5000)
    """
    dim = require_axis("a", a, dim)
    require_floating("b", b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise ValueError(
            f"`b` must be like `a`, {tuple(a.shape)} of {a.dtype}; "
            f"got {tuple(b.shape)} of {b.dtype}."
        )
    counts = (a != -math.inf) & (b != -math.inf)
    sides = []
    for x in (a, b):
        x = torch.where(counts, x, -math.inf).to(wide_dtype(a.dtype))
        ranks = soft_rank(x, temperature, dim, regularization=regularization, backend=backend)
        ranks = torch.where(counts, ranks, 0)
        mean = ranks.sum(dim, keepdim=True) / counts.sum(dim, keepdim=True).clamp(min=1)
        sides.append(torch.where(counts, ranks - mean, 0))
    first, second = sides
    product = (first * second).sum(dim)
    squares = [side.square().sum(dim) for side in sides]
    # Equal ranks leave a rounding of their mean behind, no spread.
    n = counts.sum(dim)
    least = n * (torch.finfo(first.dtype).eps * a.shape[dim]) ** 2
    flat = (squares[0] <= least) | (squares[1] <= least)
    scale = torch.where(flat, 1, squares[0]).sqrt() * torch.where(flat, 1, squares[1]).sqrt()
    return (torch.where(flat, 0, product) / scale).to(a.dtype)


# --- pairs through a sigmoid ----------------------------------------------------------------------


def _logistic(x: Tensor, positive: Tensor, negative: Tensor, tau: Tensor | float | int) -> Tensor:
    hard = None
    if isinstance(tau, Tensor):
        zero = tau == 0
        hard, tau = zero.squeeze(-1) if tau.ndim else zero, torch.where(zero, 1, tau)
    else:
        tau = torch.tensor(tau, dtype=x.dtype, device=x.device)
    tau = tau.expand(*x.shape[:-1], 1)
    # Positives first: then they and the negatives are two slices, though rows differ in number.
    order = (positive > 0).to(torch.int8) - (negative > 0).to(torch.int8)
    order = order.argsort(-1, descending=True)
    x, first, second = x.gather(-1, order), positive.gather(-1, order), negative.gather(-1, order)
    n_first = n_second = n = x.shape[-1]
    if n and x.numel() and not values_are_hidden():
        n_first = max(1, int((first > 0).sum(-1).max()))
        n_second = max(1, int((second > 0).sum(-1).max()))
    a, wa = x[..., :n_first], first[..., :n_first]
    b, wb = x[..., n - n_second :], second[..., n - n_second :]
    # The weights are shares, so that sums of pairs stay numbers of order one.
    wa, wb = _shares(wa), _shares(wb)
    loss = 0.5 + (wa * _PairSums.apply(a, b, wb, tau, 0)).sum(-1)
    if hard is not None:
        loss = torch.where(hard, _hard(x, first, second), loss)
    return loss


def _shares(weight: Tensor) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1, total)


class _PairSums(torch.autograd.Function):
    r"""Sum a derivative of the sigmoid over one side of all pairs, tile by tile.

    .. math:: R_i = \sum_j w_j\, h^{(k)}\bigl((a_i - b_j) / \tau\bigr), \qquad
        h(d) = \sigma(-d) - \tfrac12

    Since :math:`h` is odd, sums over the other side are of the same form, and so are all
    derivatives: backward of order k calls order k + 1, and never keeps a tile.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, weight: Tensor, tau: Tensor, k: int) -> Tensor:
        rows = max(1, math.prod(a.shape[:-1]))
        width = max(1, min(b.shape[-1], TILE // rows))
        height = max(1, TILE // (rows * width))
        scale, parts = 1 / tau.unsqueeze(-1), []
        for top in a.split(height, -1):
            sums = torch.zeros_like(top)
            for right, w in zip(b.split(width, -1), weight.split(width, -1), strict=True):
                d = (top.unsqueeze(-1) - right.unsqueeze(-2)) * scale
                # No matrix product: autocast and TF32 would round it.
                sums = sums + (_derivative(d, k) * w.unsqueeze(-2)).sum(-1)
            parts.append(sums)
        return torch.cat(parts, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.k = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (a, b, weight, tau), k = ctx.saved_tensors, ctx.k
        # Odd for even k: h(d) with the sides exchanged is -h(-d).
        sign = -1 if k % 2 == 0 else 1
        slope = _PairSums.apply(a, b, weight, tau, k + 1)
        across = _PairSums.apply(b, a, g, tau, k + 1) * sign
        ga = g * slope / tau
        gb = weight * across / tau
        g_weight = g_tau = None
        if ctx.needs_input_grad[2]:
            g_weight = _PairSums.apply(b, a, g, tau, k) * sign
        if ctx.needs_input_grad[3]:
            # By homogeneity: the sums do not change when a, b and tau are scaled together, nor when
            # a and b are shifted, here to where less cancels.
            shift = a.detach().mean(-1, keepdim=True)
            scaled = ((a - shift) * ga).sum(-1, keepdim=True)
            g_tau = -(scaled + ((b - shift) * gb).sum(-1, keepdim=True)) / tau
        return ga, gb, g_weight, g_tau, None


def _derivative(d: Tensor, k: int) -> Tensor:
    q = torch.sigmoid(-d)
    if k == 0:
        return q - 0.5
    p = torch.sigmoid(d)  # not 1 - q, which is 0 for large d
    slope = -p * q
    z = q - p
    # h' = -pq; every further derivative is -pq times a polynomial of z, as (pq)' = pq z, and
    # z' = -2pq = -(1 - z^2) / 2.
    polynomial = [1.0]
    for _ in range(k - 1):
        following = [0.0, *polynomial]
        for power, c in enumerate(polynomial):
            if power:
                following[power - 1] -= power * c / 2
                following[power + 1] += power * c / 2
        polynomial = following
    value = torch.full_like(z, polynomial[-1])
    for c in reversed(polynomial[:-1]):
        value = value * z + c
    return slope * value


def _hard(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return 1 - AUC, ties counting one half, in O(n log n)."""
    positive, negative = _to_exact(positive), _to_exact(negative)
    ordered, order = x.detach().sort(-1)
    below = negative.gather(-1, order).cumsum(-1)
    below = torch.nn.functional.pad(below, (1, 0))
    values = x.detach().contiguous()
    less = below.gather(-1, torch.searchsorted(ordered, values))
    at_most = below.gather(-1, torch.searchsorted(ordered, values, right=True))
    above = below[..., -1:] - (less + at_most) / 2
    pairs = positive.sum(-1) * below[..., -1]
    return ((positive * above).sum(-1) / torch.where(pairs == 0, 1, pairs)).to(x.dtype)


# --- squares --------------------------------------------------------------------------------------


def _square(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    r"""Return :math:`(1 - \bar d)^2 + \mathrm{Var}(s^+) + \mathrm{Var}(s^-)`, which it is."""
    means, spread = [], 0
    for weight in (_shares(positive), _shares(negative)):
        mean = (weight * x).sum(-1, keepdim=True)
        means.append(mean.squeeze(-1))
        spread = spread + (weight * (x - mean).square()).sum(-1)
    return (1 - means[0] + means[1]).square() + spread


def _squared_hinge(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    r"""Sum :math:`(a_j - b_i)_+^2` over negatives :math:`a_j` and :math:`b_i = s_i^+ - 1`.

    Down the merged list, in steps of :math:`\delta`, the sums over all negatives passed follow

    .. math:: S_1 \leftarrow S_1 + \delta S_0, \qquad
        S_2 \leftarrow S_2 + 2 \delta S_1 + \delta^2 S_0

    No term is negative, so nothing cancels, as it would in :math:`\sum a^2 - 2b \sum a + n b^2`.
    """
    positive, negative = _shares(positive), _shares(negative)
    merged, order = torch.where(positive > 0, x - 1, x).sort(-1, descending=True)
    count = negative.gather(-1, order).cumsum(-1)
    step = merged[..., :-1] - merged[..., 1:]
    first = (step * count[..., :-1]).cumsum(-1)
    before = torch.nn.functional.pad(first, (1, 0))[..., :-1]
    second = (2 * step * before + step.square() * count[..., :-1]).cumsum(-1)
    return (positive.gather(-1, order)[..., 1:] * second).sum(-1)


# --- arguments ------------------------------------------------------------------------------------


def _to_exact(x: Tensor) -> Tensor:
    """Return what running sums of many numbers need: float64, which Apple's GPU has not."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _poison(x: Tensor) -> Tensor:
    """Return 0 for each row, with gradient 0, and NaN where a row is not finite."""
    return (x * 0).sum(-1)


def _has_zero(temperature: Temperature) -> bool:
    visible = isinstance(temperature, Tensor) and temperature.device.type == "cpu"
    return visible and not values_are_hidden() and bool((temperature == 0).any())


def _require_pairs(scores: Tensor, target: Tensor, weight: Tensor | None) -> None:
    for name, other in (("target", target), ("sample_weight", weight)):
        if other is not None and other.shape != scores.shape:
            raise ValueError(
                f"`{name}` must have the shape of `scores` {tuple(scores.shape)}; "
                f"got {tuple(other.shape)}."
            )
    if scores.device.type != "cpu" or values_are_hidden():
        return
    if not ((target == 0) | (target == 1)).all():
        raise ValueError("`target` must be 0 or 1.")
    if weight is not None and not ((weight >= 0) & (weight < math.inf)).all():
        raise ValueError("`sample_weight` must be finite and at least 0.")
