r"""Smooth maxima, and the smooth argmax as a vector and as a number.

.. math:: S_\tau(x) = \max_{p \in \Delta} \langle p, x \rangle + \tau\,\Omega(p), \qquad
    \nabla S_\tau(x) = p

With Shannon's entropy for :math:`\Omega` the maximum is log-sum-exp and the weights are softmax:
log-sum-exp for the value, softmax for the position. Rows are shifted by their largest entry before
the division by the temperature, so that neither overflows.

Source: Su Jianlin, article 6620 (https://kexue.fm/archives/6620), 2019, and 3290, 2015; Nesterov
2005; Asadi & Littman 2017 (mellowmax).
"""

import math
from collections.abc import Callable
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
from cln_tutorial.smoothing.sparse import entmax15, sparsemax

# In temperatures: exp of it is zero in every dtype, and k times it is still a modest number.
FAR = 1e4


def smooth_max(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    keepdim: bool = False,
    *,
    kind: str = "lse",
) -> Float[Tensor, "..."]:
    r"""Return a smooth maximum along an axis.

    .. math:: S_\tau(x) = \tau \log \sum_i e^{x_i / \tau}

    With :math:`n` entries, :math:`m` of them largest, and a gap :math:`\delta` to the next one:

    ============= ==================================================== =============================
    kind          value                                                minus the maximum
    ============= ==================================================== =============================
    "lse"         :math:`S_\tau`                                       :math:`\tau\log m` to
                                                                       :math:`\tau\log(m + (n - m)
                                                                       e^{-\delta/\tau})`
    "mellow"      :math:`S_\tau - \tau\log n`, between mean and        :math:`-\tau\log\frac nm`
                  maximum                                              to 0
    "boltzmann"   :math:`\sum_i x_i p_i`, :math:`p` softmax            :math:`-\tau\,
                                                                       W(\frac{n-1}{e})` to 0
    "sparse"      :math:`\langle p, x\rangle + \frac\tau2              0 to
                  (1 - \lVert p\rVert^2)`, :math:`p` sparsemax         :math:`\frac\tau2
                                                                       (1 - \frac1n)`
    "entmax15"    :math:`\langle p, x\rangle + \frac{4\tau}3           0 to :math:`\frac{4\tau}3
                  (1 - \sum_i p_i^{3/2})`, :math:`p` entmax-1.5        (1 - n^{-1/2})`
    "pnorm"       :math:`(\sum_i x_i^{1/\tau})^\tau`,                  0 to :math:`(n^\tau - 1)
                  :math:`x \ge 0`                                      \max x`
    ============= ==================================================== =============================

    :math:`W` is Lambert's function; its bound is attained when all others lie
    :math:`\tau (1 + W)` below. An error of :math:`\varepsilon` needs a temperature of
    :math:`\varepsilon / \log n` ("lse"). All but "pnorm" satisfy :math:`S(x + c) = S(x) + c`.
    "lse", "sparse", "entmax15" and "pnorm" rise with the temperature, "mellow" and "boltzmann"
    fall. The gradient is :math:`p`, but for "boltzmann" (where it may be negative) and "pnorm";
    that of "lse" is :math:`\frac1{2\tau}`-Lipschitz in the Euclidean norm.

    Args:
        x: any shape and floating dtype. Entries of :math:`-\infty` are masked: weight and gradient
            are 0.
        temperature: at least 0, in units of ``x`` ("pnorm": the inverse of :math:`p`, and above 1
            no norm); a tensor broadcasts to ``x`` with 1 at ``dim``. 0 is the maximum, whose
            gradient its ties share.
        dim: the axis.
        keepdim: keep it, with length 1.
        kind: see the table.

    Returns:
        Shape of ``x`` without ``dim``, dtype of ``x``. NaN for a row that holds NaN or
        :math:`+\infty`, or nothing but :math:`-\infty`; :math:`-\infty` for an axis without
        entries. At a row of zeros the gradient of "pnorm" is taken to be 0.

    Raises:
        TypeError: if ``x`` or ``temperature`` is not floating.
        ValueError: for an unknown kind or axis, a temperature that is negative, infinite, NaN or
            does not broadcast, or an entry below 0 with "pnorm" (looked at on a CPU only).

    Source:
        Article 6620, "max", and 3290; Blondel, Martins & Niculae 2020 ("sparse", "entmax15").

    Example:
        >>> smooth_max(torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0]))
        tensor(5.4519)
    """
    rows, tau, dim = rows_and_temperature(x, temperature, dim)
    if kind not in _MAXIMA:
        raise ValueError(f"`kind` must be one of {tuple(_MAXIMA)}; got {kind!r}.")
    if kind == "pnorm":
        _require_not_negative(rows)
    if rows.shape[-1]:
        value = _MAXIMA[kind](rows, tau)
    else:
        value = rows.new_full((*rows.shape[:-1], 1), -math.inf)
    value = value.movedim(-1, dim).to(x.dtype)
    return value if keepdim else value.squeeze(dim)


def smooth_min(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    keepdim: bool = False,
    *,
    kind: str = "lse",
) -> Float[Tensor, "..."]:
    r"""Return a smooth minimum along an axis, the mirror image of :func:`smooth_max`.

    .. math:: \mathrm{smooth\_min}(x) = -\mathrm{smooth\_max}(-x)

    and for "pnorm" the norm of negative order :math:`(\sum_i x_i^{-1/\tau})^{-\tau}`.

    Args:
        x, temperature, dim, keepdim, kind: as of :func:`smooth_max`, mirrored: here :math:`+\infty`
            is the mask, and :math:`-\infty` makes its row NaN.

    Returns:
        As :func:`smooth_max`; :math:`+\infty` for an axis without entries. With "pnorm" a row with
        a zero is 0, with gradient 0.

    Raises: as :func:`smooth_max`.

    Source: article 6620, "max".

    Example:
        >>> smooth_min(torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0]))
        tensor(0.5481)
    """
    require_floating("x", x)
    if kind != "pnorm":
        return -smooth_max(-x, temperature, dim, keepdim, kind=kind)
    _require_not_negative(x)
    # At a zero the inverse and its gradient would be infinite, and the minimum is known.
    zero = x == 0
    inverse = x.to(wide_dtype(x.dtype)).masked_fill(zero, 1.0).reciprocal()
    inverse = inverse.masked_fill(x == math.inf, -math.inf)
    value = smooth_max(inverse, temperature, dim, keepdim, kind=kind).reciprocal()
    if x.shape[dim] == 0:
        return torch.full_like(value, math.inf, dtype=x.dtype)
    return value.masked_fill(zero.any(dim, keepdim), 0.0).to(x.dtype)


def soft_onehot(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    kind: str = "softmax",
) -> Float[Tensor, "..."]:
    r"""Return the smooth one-hot vector of the argmax: weights that sum to one.

    .. math:: p = \mathrm{softmax}(x / \tau), \qquad
        \lVert p - 1_{i^*} \rVert_1 = 2 (1 - p_{\max}) \le 2 (n - 1)\, e^{-\delta / \tau}

    for a gap :math:`\delta` below a single largest entry. Softmax is
    :math:`\frac{1}{2\tau}`-Lipschitz in the Euclidean norm: half of what is usually said, and
    reached at :math:`(\frac12, \frac12)`. The largest weight falls with the temperature.

    Args:
        x: any shape and floating dtype. Entries of :math:`-\infty` get weight and gradient 0.
        temperature: at least 0; 0 is the one-hot vector, shared by ties, with gradient 0.
        dim: the axis.
        kind: "softmax", or with weights that can be zero "sparsemax" or "entmax15".

    Returns:
        Shape and dtype of ``x``. A row is NaN if it holds NaN or :math:`+\infty`, or nothing but
        :math:`-\infty`.

    Raises:
        TypeError: if ``x`` or ``temperature`` is not floating.
        ValueError: for an unknown kind or axis, or a temperature that is negative, infinite, NaN or
            does not broadcast.

    Source:
        Article 6620, "onehot(argmax)"; Martins & Astudillo 2016; Peters, Niculae & Martins 2019.

    Example:
        >>> soft_onehot(torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0]), temperature=0.1)
        tensor([9.3572e-14, 4.2482e-18, 4.5398e-05, 9.9995e-01, 2.0611e-09])
    """
    rows, tau, dim = rows_and_temperature(x, temperature, dim)
    if kind not in _WEIGHTS:
        raise ValueError(f"`kind` must be one of {tuple(_WEIGHTS)}; got {kind!r}.")
    if not rows.numel():
        return x.clone()
    weights = _WEIGHTS[kind](scaled(rows, _largest(rows), tau))
    return weights.movedim(-1, dim).to(x.dtype)


def soft_argmax(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    positions: Shaped[Tensor, "..."] | None = None,
    start: int | float = 0,
) -> Float[Tensor, "..."]:
    r"""Return the mean position under the weights of :func:`soft_onehot`.

    .. math:: \sum_i i\, \mathrm{softmax}(x / \tau)_i

    It is a mean and no argmax: of two equal peaks it gives the middle, at every temperature, and it
    depends on how positions are numbered. For a single peak it is off by at most
    :math:`(n - 1)^2 e^{-\delta / \tau}`.

    Args:
        x: any shape and floating dtype. Entries of :math:`-\infty` have no weight.
        temperature: at least 0; 0 is the argmax, or the mean of its ties, with gradient 0.
        dim: the axis.
        positions: ``(n,)``, what to average instead of numbers that count up; any real dtype.
        start: the number of the first position. The article counts from 1.

    Returns:
        Shape of ``x`` without ``dim``, dtype of ``x``; the mean is taken in float32 for half types.
        NaN for a row with NaN, :math:`+\infty` or without an entry above :math:`-\infty`.

    Raises:
        TypeError: if ``x`` or ``temperature`` is not floating.
        ValueError: for an unknown axis, a bad temperature, or ``positions`` of another shape or
            beside a ``start``.

    Source:
        Article 6620, "argmax".

    Example:
        >>> soft_argmax(torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0]), start=1)
        tensor(3.7336)
    """
    rows, tau, dim = rows_and_temperature(x, temperature, dim)
    entries = rows.shape[-1]
    if positions is None:
        positions = torch.arange(entries, dtype=rows.dtype, device=rows.device) + start
    elif positions.shape != (entries,):
        raise ValueError(
            f"`positions` must be ({entries},), one for each entry of `dim`; "
            f"got {tuple(positions.shape)}."
        )
    elif start != 0:
        raise ValueError("`start` numbers the entries; it has no meaning beside `positions`.")
    if not entries:
        return rows.new_full(rows.shape[:-1], math.nan).to(x.dtype)
    weights = scaled(rows, _largest(rows), tau).softmax(-1)
    return (weights * positions.to(rows.dtype)).sum(-1).to(x.dtype)


def straight_through(
    hard: Shaped[Tensor, "..."], soft: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Return the value of ``hard``, to the last bit, with the gradient of ``soft``.

    The forward pass is exact and the gradient is that of another function: biased, and often good
    enough.

    Args:
        hard: any dtype; its gradient is not used.
        soft: of the same shape, floating and finite.

    Returns:
        Shape and dtype of ``soft``.

    Raises:
        TypeError: if ``soft`` is not floating.
        ValueError: if the shapes differ.

    Source: Bengio, Léonard & Courville 2013.

    Example:
        >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> straight_through(x.round(), x)
        tensor([0., 1.], grad_fn=<AddBackward0>)
    """
    require_floating("soft", soft)
    if hard.shape != soft.shape:
        raise ValueError(
            f"`hard` and `soft` must have one shape; got {tuple(hard.shape)} and "
            f"{tuple(soft.shape)}."
        )
    # A number minus itself is zero, and zero changes no number; (hard - soft) + soft would round.
    return hard.detach().to(soft.dtype) + (soft - soft.detach())


# --- what the functions of rows share -------------------------------------------------------------


def rows_and_temperature(
    x: Tensor, temperature: float | int | Tensor, dim: int
) -> tuple[Tensor, Tensor | float, int]:
    """Return the rows on the last axis, wide; a temperature that fits them; and the axis."""
    dim = require_axis("x", x, dim)
    shape = list(x.shape)
    shape[dim] = 1
    require_temperature(temperature, tuple(shape))
    rows = x.movedim(dim, -1).to(wide_dtype(x.dtype))
    if isinstance(temperature, Tensor):
        return rows, temperature.to(rows.dtype).expand(shape).movedim(dim, -1), dim
    return rows, float(temperature), dim


def scaled(x: Tensor, centre: Tensor | float, tau: Tensor | float, farthest: float = FAR) -> Tensor:
    r"""Return :math:`(x - c) / \tau`, held at ``farthest`` on both sides, without gradient there.

    At a temperature of zero all but the centre is far away; so is a mask. NaN stays.
    """
    difference = x - centre
    far = difference.abs() >= farthest * tau
    near = difference.masked_fill(far, 0.0) / positive(tau)
    return torch.where(far, difference.detach().sign() * farthest, near)


def positive(tau: Tensor | float) -> Tensor | float:
    """Return the temperature, and where it is zero a number to divide by."""
    return tau.masked_fill(tau == 0, 1.0) if isinstance(tau, Tensor) else tau or 1.0


def where_hard(
    tau: Tensor | float, hard: Callable[[], Tensor], soft: Callable[[], Tensor]
) -> Tensor:
    """Return what holds at the temperature: one of the two for a number, a mixture for a tensor."""
    if isinstance(tau, Tensor):
        return torch.where(tau == 0, hard(), soft())
    return soft() if tau else hard()


def _largest(rows: Tensor) -> Tensor:
    # A constant: what follows does not depend on the shift.
    return rows.detach().amax(-1, keepdim=True)


def _require_not_negative(x: Tensor) -> None:
    if values_are_hidden() or x.device.type != "cpu":
        return
    if ((x < 0) & (x > -math.inf)).any():
        raise ValueError("`x` must not be negative for `kind` 'pnorm'.")


# --- the maxima -----------------------------------------------------------------------------------
# Each gets rows with at least one entry, and returns one value for each, with the axis kept.


def _lse(rows: Tensor, tau: Tensor | float) -> Tensor:
    top = _largest(rows)
    return where_hard(
        tau,
        lambda: _mean(rows, top, scaled(rows, top, tau).softmax(-1)),
        lambda: top + tau * scaled(rows, top, tau).logsumexp(-1, keepdim=True),
    )


def _mellow(rows: Tensor, tau: Tensor | float) -> Tensor:
    top = _largest(rows)
    masked = rows == -math.inf
    entries = (~masked).sum(-1, keepdim=True).to(rows.dtype)

    def soft() -> Tensor:
        distances = scaled(rows, top, tau)
        # In a hot row the logarithms of sum and count are nearly equal, and tau is large.
        fall = distances.expm1().masked_fill(masked, 0.0).sum(-1, keepdim=True) / entries
        cold = distances.logsumexp(-1, keepdim=True) - entries.log()
        return top + tau * torch.where(fall < -0.5, cold, fall.clamp_min(-0.5).log1p())

    return where_hard(tau, lambda: _mean(rows, top, scaled(rows, top, tau).softmax(-1)), soft)


def _boltzmann(rows: Tensor, tau: Tensor | float) -> Tensor:
    top = _largest(rows)
    return _mean(rows, top, scaled(rows, top, tau).softmax(-1))


def _mean(rows: Tensor, top: Tensor, weights: Tensor) -> Tensor:
    differences = (rows - top).masked_fill(rows == -math.inf, 0.0)
    return top + (weights * differences).sum(-1, keepdim=True)


def _sparse(rows: Tensor, tau: Tensor | float) -> Tensor:
    return _regularised(rows, tau, sparsemax, lambda p: (1 - p.square().sum(-1, keepdim=True)) / 2)


def _entmax15(rows: Tensor, tau: Tensor | float) -> Tensor:
    return _regularised(
        rows, tau, entmax15, lambda p: (1 - p.pow(1.5).sum(-1, keepdim=True)) * (4 / 3)
    )


def _regularised(
    rows: Tensor,
    tau: Tensor | float,
    weights: Callable[[Tensor], Tensor],
    entropy: Callable[[Tensor], Tensor],
) -> Tensor:
    top = _largest(rows)
    p = weights(scaled(rows, top, tau))
    differences = (rows - top).masked_fill(rows == -math.inf, 0.0)
    tau = tau if isinstance(tau, Tensor) else rows.new_tensor(tau)
    return top + _Envelope.apply(differences, tau.expand_as(top), p, entropy(p))


class _Envelope(torch.autograd.Function):
    """The mean plus tau times the entropy, at weights that maximise it.

    There the weights' own derivative does not count, and the next one sees it once: autograd would
    go through a square root at zero, and count it twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(differences: Tensor, tau: Tensor, p: Tensor, entropy: Tensor) -> Tensor:
        return (p * differences).sum(-1, keepdim=True) + tau * entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        p, entropy = ctx.saved_tensors
        return gradient * p, gradient * entropy, None, None


def _pnorm(rows: Tensor, tau: Tensor | float) -> Tensor:
    top = _largest(rows)
    masked = rows == -math.inf

    def soft() -> Tensor:
        order = 1 / positive(tau)
        # Powers of numbers up to one do not overflow.
        ratios = rows.masked_fill(masked, 0.0) / top.masked_fill(top == 0, 1.0)
        sums = ratios.pow(order).sum(-1, keepdim=True)
        return top * sums.masked_fill(top == 0, 1.0).pow(tau)

    hard = scaled(rows, top, 0.0)
    return where_hard(tau, lambda: _mean(rows, top, hard.softmax(-1)), soft)


_MAXIMA = {
    "lse": _lse,
    "mellow": _mellow,
    "boltzmann": _boltzmann,
    "sparse": _sparse,
    "entmax15": _entmax15,
    "pnorm": _pnorm,
}
_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda distances: distances.softmax(-1),
    "sparsemax": sparsemax,
    "entmax15": entmax15,
}
