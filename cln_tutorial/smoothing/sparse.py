r"""Softmax with zeros: sparsemax, entmax and their losses.

.. math:: p = \arg\max_{p \in \Delta} \langle p, x \rangle + H_\alpha(p), \qquad
    p_i = \bigl((\alpha - 1) x_i - \theta\bigr)_+^{1 / (\alpha - 1)}

:math:`H_\alpha(p) = \sum_i (p_i - p_i^\alpha) / (\alpha (\alpha - 1))` is Tsallis's entropy:
softmax for :math:`\alpha = 1`, sparsemax for 2. The larger it is, the fewer weights are not zero.

Source: Martins & Astudillo 2016 (sparsemax); Peters, Niculae & Martins 2019 (entmax); Correia,
Niculae & Martins 2019 (learned alpha); Blondel, Martins & Niculae 2020 (Fenchel-Young losses).
"""

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.smoothing._checks import choose_backend, require_axis, wide_dtype

ALPHAS = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0}
LARGEST_ALPHA = 4  # beyond, float64 does not determine a weight near zero


def sparsemax(
    x: Shaped[Tensor, "..."], dim: int = -1, *, backend: str = "auto"
) -> Float[Tensor, "..."]:
    r"""Project each row on the simplex: :math:`p = (x - \theta)_+` with :math:`\sum_i p_i = 1`.

    The weight is zero of all that are further than 1 below the largest, and of more where several
    are near it. The Jacobian is that of centring on the support; the second derivative is zero
    almost everywhere.

    Args:
        x: floating tensor of any shape. :math:`-\infty` is masked: weight and gradient are 0.
        dim: the axis that shall sum to 1.
        backend: "reference" sorts, in plain PyTorch; "numba" does not sort (CPU, extra ``fast``);
            "auto" takes the faster that runs here.

    Returns:
        Shape and dtype of ``x``, computed in float32 for half types. The error of a weight in
        float32 is at most :math:`2^{-25}`, the rounding of a number below 1. A row with NaN or
        :math:`+\infty`, or of nothing but :math:`-\infty`, is NaN throughout, as is its gradient;
        other rows do not notice.

    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: for an axis that ``x`` has not, or a backend that cannot run here.

    Source:
        Martins & Astudillo 2016, algorithm 1 and proposition 2.

    Example:
        >>> sparsemax(torch.tensor([1.0, 0.5, -0.2]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    return _weights(x, 2.0, dim, backend)


def entmax15(
    x: Shaped[Tensor, "..."], dim: int = -1, *, backend: str = "auto"
) -> Float[Tensor, "..."]:
    r"""Halfway between softmax and sparsemax: :math:`p = (x / 2 - \theta)_+^2`, sum 1.

    The weight is zero of all that are further than 2 below the largest.

    Args:
        x: as of :func:`sparsemax`.
        dim: the axis that shall sum to 1.
        backend: as of :func:`sparsemax`.

    Returns:
        As :func:`sparsemax`, with the same bound of the error.

    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: for an axis that ``x`` has not, or a backend that cannot run here.

    Source:
        Peters, Niculae & Martins 2019, section 3.

    Example:
        >>> entmax15(torch.tensor([2.0, 0.0, -1.0]))
        tensor([1., 0., 0.])
        >>> entmax15(torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return _weights(x, 1.5, dim, backend)


def entmax(
    x: Shaped[Tensor, "..."],
    alpha: float | int | Shaped[Tensor, "..."] = 1.5,
    dim: int = -1,
    *,
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Softmax (:math:`\alpha = 1`), sparsemax (2), all between them and beyond.

    .. math:: p_i = \bigl((\alpha - 1) x_i - \theta\bigr)_+^{1 / (\alpha - 1)}, \qquad
        \sum_i p_i = 1

    As a tensor :math:`\alpha` has a gradient, and 1 is no special place. For :math:`\alpha > 2`
    the slope of a weight is infinite where it becomes zero: there rounding of float64 alone, in
    which the root is found, moves it by :math:`2^{-52 / (\alpha - 1)}`, 6e-6 for 4.

    Args:
        x: as of :func:`sparsemax`.
        alpha: from 1 to 4; a number, or a floating tensor that broadcasts to ``x`` with
            one entry along ``dim``, such as one alpha for each head.
        dim: the axis that shall sum to 1.
        backend: as of :func:`sparsemax`.

    Returns:
        As :func:`sparsemax`.

    Raises:
        TypeError: if ``x`` or ``alpha`` are not floating.
        ValueError: for an alpha that is not from 1 to 4, or of another shape; for an axis that
            ``x`` has not, or a backend that cannot run here.

    Source:
        Peters, Niculae & Martins 2019; Correia, Niculae & Martins 2019, proposition 1.

    Example:
        >>> x = torch.tensor([1.0, 0.5, -0.2])
        >>> for alpha in (1.0, 1.25, 1.5, 2.0):
        ...     print(entmax(x, alpha))
        tensor([0.5242, 0.3179, 0.1579])
        tensor([0.5800, 0.3125, 0.1076])
        tensor([0.6490, 0.3087, 0.0423])
        tensor([0.7500, 0.2500, 0.0000])
    """
    dim = require_axis("x", x, dim)
    _require_alpha(alpha, x, dim)
    return _weights(x, alpha if isinstance(alpha, Tensor) else float(alpha), dim, backend)


def fenchel_young_loss(
    x: Shaped[Tensor, "*batch classes"],
    target: Shaped[Tensor, "..."],
    kind: str | float | int = "softmax",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Float[Tensor, "..."]:
    r"""The loss whose gradient is :math:`p - y`, for the weights of softmax, sparsemax or entmax.

    .. math:: L(x, y) = \langle p, x \rangle + H_\alpha(p) - \langle y, x \rangle - H_\alpha(y)
        \ge 0

    It is zero iff :math:`p = y`. For a class :math:`y` this is so from a margin of
    :math:`1 / (\alpha - 1)` on: 1 for sparsemax, 2 for entmax15, never for softmax, of which it
    is the cross-entropy (for distributions less the entropy of the target).

    Args:
        x: logits, ``(*batch, classes)``. :math:`-\infty` is masked: the loss is finite and has no
            gradient there. It is infinite only if the target has weight on a masked class.
        target: int64 ``(*batch)``, or floating ``(*batch, classes)`` with rows that sum to 1.
        kind: "softmax", "entmax15", "sparsemax", or their alpha, a number from 1 to 4.
        reduction: "mean", "sum" or "none".
        ignore_index: class of rows that neither count nor have a gradient.

    Returns:
        Dtype of ``x``, computed in float32 for half types: one number, or ``(*batch)`` for "none".

    Raises:
        TypeError: if ``x`` is not floating, or ``target`` neither int64 nor floating.
        ValueError: for a target of another shape, a class that is not there, an unknown kind or
            reduction, an alpha that is not from 1 to 4.

    Source:
        Blondel, Martins & Niculae 2020, equation 14; Peters, Niculae & Martins 2019.

    Example:
        >>> x = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, -1.0]], requires_grad=True)
        >>> loss = fenchel_young_loss(x, torch.tensor([0, 0]), "sparsemax", reduction="none")
        >>> loss  # the first has a margin of 1
        tensor([0.0000, 0.5625], grad_fn=<WhereBackward0>)
    """
    require_axis("x", x, -1)
    alpha = _alpha_of(kind)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none'; got {reduction!r}.")
    rows = x.to(wide_dtype(x.dtype))
    if target.is_floating_point():
        _require_shape(target, x.shape)
        counted = None
        target = target.to(rows.dtype)
    else:
        _require_classes(target, x, ignore_index)
        counted = target != ignore_index
        rows = rows.where(counted.unsqueeze(-1), 0)  # whatever stands there, its gradient is 0
        target = target.where(counted, 0).unsqueeze(-1)
    rows = rows - rows.detach().amax(-1, keepdim=True)  # p - y sums to 0
    loss = _conjugate(rows, alpha) - _at_target(rows, target, alpha)
    if counted is not None:
        loss = loss.where(counted, 0)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.mean() if counted is None else loss.sum() / counted.sum()
    return loss.to(x.dtype)


class Sparsemax(nn.Module):
    """:func:`sparsemax` as a layer.

    Example:
        >>> Sparsemax(dim=-1)(torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the sparsemax of ``x``."""
        return sparsemax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Entmax15(nn.Module):
    """:func:`entmax15` as a layer.

    Example:
        >>> Entmax15(dim=-1)(torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the entmax of ``x`` at 1.5."""
        return entmax15(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _weights(x: Tensor, alpha: float | Tensor, dim: int, backend: str) -> Tensor:
    dim = require_axis("x", x, dim)
    backend = choose_backend(backend, x)
    if x.numel() == 0:
        return x.clone()
    rows = x.movedim(dim, -1)
    shape = rows.shape
    rows = rows.reshape(-1, shape[-1]).to(wide_dtype(x.dtype))
    if isinstance(alpha, Tensor):
        one_each = (*shape[:-1], 1)
        alpha = alpha.double().expand(_with_one(x, dim)).movedim(dim, -1).expand(one_each)
        alpha = alpha.reshape(-1, 1)
    if not isinstance(alpha, Tensor) and alpha == 1:
        found = rows.softmax(-1)
    elif backend == "numba":
        found = _by_numba(rows, alpha)
    else:
        found = _by_pytorch(rows, alpha)
    return found.view(shape).movedim(-1, dim).to(x.dtype)


# --- the reference --------------------------------------------------------------------------------
# Which weights are not zero has no gradient. Given that, the threshold is a formula of those alone,
# and everything is differentiable as often as one likes. In float64: sums of squares of long rows
# lose digits, and one rounding at the end is all that is left.


def _by_pytorch(rows: Tensor, alpha: float | Tensor) -> Tensor:
    top = rows.detach().amax(-1, keepdim=True)
    poison = torch.where(top.isfinite(), 1.0, math.nan)  # at both ends: of the gradient too
    depths = (rows.double() - top) * poison  # adding a number to a row changes nothing
    if isinstance(alpha, Tensor) or alpha not in (1.5, 2.0):
        found = _entmax(depths, alpha)
    else:
        found = _sparsemax(depths) if alpha == 2 else _entmax15(depths / 2)
    return (found * poison).to(rows.dtype)


def _sparsemax(depths: Tensor) -> Tensor:
    ranked = depths.detach().sort(-1, descending=True).values
    count = torch.arange(1, depths.shape[-1] + 1, device=depths.device)
    thresholds = (ranked.cumsum(-1) - 1) / count
    support = depths > _last(thresholds, thresholds < ranked)
    total = depths.where(support, 0).sum(-1, keepdim=True)
    threshold = (total - 1) / support.sum(-1, keepdim=True)
    return torch.where(support, depths - threshold, 0).relu()


def _entmax15(depths: Tensor) -> Tensor:
    # Below -1 the weight is zero anyway, and sums of squares of -inf would be NaN.
    ranked = depths.detach().sort(-1, descending=True).values.clamp(min=-1)
    count = torch.arange(1, depths.shape[-1] + 1, device=depths.device)
    means = ranked.cumsum(-1) / count
    squares = ranked.square().cumsum(-1) - count * means.square()
    thresholds = means - ((1 - squares) / count).clamp(min=0).sqrt()
    support = depths > _last(thresholds, thresholds < ranked)
    count = support.sum(-1, keepdim=True)
    mean = depths.where(support, 0).sum(-1, keepdim=True) / count
    squares = torch.where(support, depths - mean, 0).square().sum(-1, keepdim=True)
    threshold = mean - ((1 - squares) / count).sqrt()
    return torch.where(support, depths - threshold, 0).relu().square()


def _last(thresholds: Tensor, above: Tensor) -> Tensor:
    """The threshold of the largest support that is one; of a poisoned row, any."""
    return thresholds.gather(-1, above.sum(-1, keepdim=True).sub(1).clamp(min=0))


def _entmax(depths: Tensor, alpha: float | Tensor) -> Tensor:
    r"""Any alpha, with :math:`a = \alpha - 1` and :math:`p_i^a = (e^{-a m} + a x_i)_+`.

    The largest weight is :math:`e^{-m}`, hence :math:`0 \le m \le \log n`.
    """
    a = alpha - 1
    low = depths.new_zeros(*depths.shape[:-1], 1)
    high = low + math.log(depths.shape[-1])
    # Divided by; the root moves by less than the last steps bring back.
    divisor = a.detach().clamp(min=1e-8) if isinstance(a, Tensor) else max(a, 1e-8)
    scaled = divisor * depths.detach()
    for _ in range(60):  # halvings: all the bits of float64
        m = (low + high) / 2
        ratios = (scaled * (divisor * m).exp()).clamp(min=-1).log1p() / divisor
        too_large = (ratios - m).exp().sum(-1, keepdim=True) > 1
        low, high = low.where(~too_large, m), high.where(too_large, m)
    m = (low + high) / 2
    # The root is there; two steps of Newton's method give it all derivatives up to the third.
    for _ in range(2):
        log_p, support = _log_weights(depths, m, a)
        total = _summed(log_p, support)
        m = m + total.log() * total / _summed((1 - a) * log_p - a * m, support)
    log_p, support = _log_weights(depths, m, a)
    return log_p.exp().where(support, 0)


def _summed(logs: Tensor, support: Tensor) -> Tensor:
    return logs.exp().where(support, 0).sum(-1, keepdim=True)


def _log_weights(depths: Tensor, m: Tensor, a: float | Tensor) -> tuple[Tensor, Tensor]:
    """log p, and where that is so; elsewhere something finite."""
    factor = (a * m).exp()
    support = (a * depths * factor > -1) & (depths > -math.inf)
    return _log1p_over(depths.where(support, 0) * factor, a) - m, support


def _log1p_over(t: Tensor, a: float | Tensor) -> Tensor:
    """log(1 + a t) / a; its derivative by a would lose all digits where a t is small."""
    u = a * t
    small = u.abs() < 0.01
    v = u.where(small, 0)
    series = sum((-v) ** k / (k + 1) for k in range(9))
    exact = u.where(~small, 1).log1p() / (a if isinstance(a, float) else a.where(a != 0, 1))
    return torch.where(small, t * series, exact)


# --- numba ----------------------------------------------------------------------------------------


def _by_numba(rows: Tensor, alpha: float | Tensor) -> Tensor:
    if isinstance(alpha, Tensor):
        return _Weights.apply(rows, alpha, 0.0)
    return _Weights.apply(rows, None, alpha)


class _Weights(torch.autograd.Function):
    # The operators know their gradient from here, as `torch.func` refuses `register_autograd`.
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
        return torch.ops.cln_tutorial.sparse_weights(rows, alphas, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, alphas, ctx.alpha = inputs
        ctx.save_for_backward(output, alphas)

    @staticmethod
    def backward(ctx: Any, upwards: Tensor) -> tuple[Tensor, Tensor | None, None]:
        found, alphas = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient shall have one
            slopes = _power(found, 2 - (ctx.alpha if alphas is None else alphas))
            by_rows = (slopes * _centred(upwards, slopes)).to(found.dtype)
        else:
            by_rows = torch.ops.cln_tutorial.sparse_gradient(upwards, found, alphas, ctx.alpha)
        by_alphas = None
        if alphas is not None and ctx.needs_input_grad[1]:
            centred = _centred(upwards, _power(found, 2 - alphas))
            by_alphas = (_by_alpha(found, alphas - 1) * centred).sum(-1, keepdim=True)
        return by_rows, by_alphas, None


@torch.library.custom_op("cln_tutorial::sparse_weights", mutates_args=())
def _sparse_weights(rows: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    return _loops().weights(rows, alphas, alpha)


@torch.library.custom_op("cln_tutorial::sparse_gradient", mutates_args=())
def _sparse_gradient(upwards: Tensor, found: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    return _loops().gradient(upwards, found, alphas, alpha)


def _loops() -> ModuleType:
    return importlib.import_module("cln_tutorial.smoothing.sparse_loops")


@_sparse_weights.register_fake
def _no_weights(rows: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    del alphas, alpha
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@_sparse_gradient.register_fake
def _no_gradient(upwards: Tensor, found: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    del upwards, alphas, alpha
    return torch.empty_like(found, memory_format=torch.contiguous_format)


@_sparse_weights.register_vmap
def _weights_of_batches(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    return _over_batches(torch.ops.cln_tutorial.sparse_weights, info, in_dims, *arguments)


@_sparse_gradient.register_vmap
def _gradient_of_batches(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    return _over_batches(torch.ops.cln_tutorial.sparse_gradient, info, in_dims, *arguments)


def _over_batches(op: Any, info: Any, in_dims: tuple, *arguments: Any) -> tuple[Tensor, int]:
    """A batch more is rows more."""
    size, joined = info.batch_size, []
    for each, axis in zip(arguments, in_dims, strict=True):
        if isinstance(each, Tensor):
            each = each.expand(size, *each.shape) if axis is None else each.movedim(axis, 0)
            each = each.reshape(-1, each.shape[-1])
        joined.append(each)
    return op(*joined).unflatten(0, (size, -1)), 0


def _centred(upwards: Tensor, slopes: Tensor) -> Tensor:
    upwards = upwards.where(slopes > 0, 0)  # an infinite one there means nothing
    return upwards - (slopes * upwards).sum(-1, keepdim=True) / slopes.sum(-1, keepdim=True)


def _power(found: Tensor, exponent: float | Tensor) -> Tensor:
    """The power of what is positive, else zero: the root of zero has an infinite slope."""
    positive = found > 0
    return torch.where(positive, found.where(positive, 1) ** exponent, 0)


def _by_alpha(found: Tensor, a: Tensor) -> Tensor:
    r"""The derivative of the weights by alpha while the threshold stays.

    .. math:: p \log^2 p \cdot \varphi(a \log p), \quad \varphi(w) = (1 - e^{-w} - w) / w^2
    """
    log = found.where(found > 0, 1).double().log()
    w = a * log
    small = w.abs() < 0.01
    v = w.where(small, 0)
    series = sum((-1) ** (k + 1) * v**k / math.factorial(k + 2) for k in range(7))
    v = w.where(~small, 1)
    phi = torch.where(small, series, (-torch.expm1(-v) - v) / v.square())
    return found * log.square() * phi


# --- the loss -------------------------------------------------------------------------------------


class _Conjugate(torch.autograd.Function):
    """The largest value of a problem, whose gradient is where it is taken (envelope theorem)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, found: Tensor, alpha: float) -> Tensor:
        return (found * rows.where(found != 0, 0)).sum(-1) + _entropy(found, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, upwards: Tensor) -> tuple[Tensor, None, None]:
        (found,) = ctx.saved_tensors
        return upwards.unsqueeze(-1) * found, None, None


def _conjugate(rows: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        return rows.logsumexp(-1)
    return _Conjugate.apply(rows, _weights(rows, alpha, -1, "auto"), alpha)


def _at_target(rows: Tensor, target: Tensor, alpha: float) -> Tensor:
    if not target.is_floating_point():
        return rows.gather(-1, target).squeeze(-1)
    rows = rows.where((rows > -math.inf) | (target != 0), 0)
    return (target * rows).sum(-1) + _entropy(target, alpha)


def _entropy(p: Tensor, alpha: float) -> Tensor:
    """Tsallis's; Shannon's for alpha 1."""
    a = alpha - 1
    log = p.where(p != 0, 1).log()
    each = p * log if a == 0 else p * torch.expm1(a * log) / (a * alpha)
    return -each.sum(-1)


# --- checks ---------------------------------------------------------------------------------------


def _with_one(x: Tensor, dim: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[dim] = 1
    return tuple(shape)


def _require_alpha(alpha: float | int | Tensor, x: Tensor, dim: int) -> None:
    if not isinstance(alpha, Tensor):
        good = 1 <= alpha <= LARGEST_ALPHA
    else:
        if not alpha.is_floating_point():
            raise TypeError(f"`alpha` must be a number or floating; got {alpha.dtype}.")
        shape = _with_one(x, dim)
        try:
            fits = torch.broadcast_shapes(alpha.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"`alpha` must broadcast to {shape}; got {tuple(alpha.shape)}.")
        if values_are_hidden() or alpha.device.type != "cpu":
            return
        good = bool(((alpha >= 1) & (alpha <= LARGEST_ALPHA)).all())
    if not good:
        raise ValueError(f"`alpha` must be from 1 to {LARGEST_ALPHA}; got {alpha}.")


def _alpha_of(kind: str | float | int) -> float:
    if isinstance(kind, str):
        if kind not in ALPHAS:
            raise ValueError(f"`kind` must be one of {tuple(ALPHAS)} or an alpha; got {kind!r}.")
        return ALPHAS[kind]
    if not 1 <= kind <= LARGEST_ALPHA:
        raise ValueError(f"`kind` as an alpha must be from 1 to {LARGEST_ALPHA}; got {kind}.")
    return float(kind)


def _require_shape(target: Tensor, shape: torch.Size) -> None:
    if target.shape != shape:
        raise ValueError(f"`target` must be {tuple(shape)}; got {tuple(target.shape)}.")


def _require_classes(target: Tensor, x: Tensor, ignore_index: int) -> None:
    if target.dtype != torch.int64:
        raise TypeError(
            f"`target` must be int64 classes or floating distributions; got {target.dtype}."
        )
    _require_shape(target, x.shape[:-1])
    if values_are_hidden() or target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= x.shape[-1])) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"`target` must be from 0 to {x.shape[-1] - 1} or `ignore_index` {ignore_index}; "
            f"got {int(target[wrong][0])}."
        )
