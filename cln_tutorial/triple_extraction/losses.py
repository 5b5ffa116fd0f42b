r"""A tagger's probability is a power of a sigmoid; its loss, exact at every logit.

.. math:: p = \sigma(z)^n, \qquad \operatorname{logit} p = -\log\bigl((1 + e^{-z})^n - 1\bigr)

The power is a prior against the many zeros of a label tensor: the slope is n where the logit is
negative, and a constant shift where it is positive.

Source: article 7161. Its code takes p, clips it at 1e-7 and asks for the cross-entropy: below
z = -4.01 (n = 4) a positive has no gradient left. Here everything comes from the logits.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial._transforms import values_are_hidden

REDUCTIONS = ("mean", "sum", "none")
# Cells that one pass works on: they stay in the cache of a core from the first step to the last.
CELLS_PER_PASS = 65_536


def power_sigmoid_logit(z: Float[Tensor, "..."], power: float | int) -> Float[Tensor, "..."]:
    r"""Return the logit of a power of a sigmoid.

    .. math:: \operatorname{logit}\bigl(\sigma(z)^n\bigr) = -\log\bigl((1 + e^{-z})^n - 1\bigr)
        \;\to\; n z \;(z \to -\infty), \quad z - \log n \;(z \to \infty)

    Args:
        z: logits, any shape, floating.
        power: :math:`n > 0`.

    Returns:
        Shape and dtype of ``z``; computed in float32 for half types. Differentiable to any order.

    Raises:
        TypeError: if ``z`` is not floating.
        ValueError: if ``power`` is not a finite number above 0.

    Source:
        Article 7161, which says that the power helps and not what it is.

    Example:
        >>> power_sigmoid_logit(torch.tensor([-100.0, 0.0, 100.0]), 2)
        tensor([-200.0000,   -1.0986,   99.3069])
    """
    require_floating("z", z)
    _require_power(power)
    wide = z.to(wide_dtype(z.dtype))
    return (power * F.logsigmoid(wide) - _log_complement(wide, power)).to(z.dtype)


def power_bce_loss(
    logits: Float[Tensor, "..."],
    targets: Shaped[Tensor, "..."] | None = None,
    *,
    positives: Int[Tensor, "p ndim"] | None = None,
    power: float | int = 1.0,
    mask: Shaped[Tensor, "..."] | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Return the binary cross-entropy of a power of a sigmoid, exact at every logit.

    .. math:: -y \log \sigma(z)^n - (1 - y) \log\bigl(1 - \sigma(z)^n\bigr), \qquad
        \partial_z = -n\,(1 - \sigma) \;(y = 1), \quad
        \frac{n\,\sigma^n}{1 + \sigma + \dots + \sigma^{n-1}} \;(y = 0)

    Nothing is clipped, so that no positive is ever without gradient, and nothing cancels: the
    error is that of a few roundings in each element (for a power that is not whole, in the
    exponent of p). The first derivative is written by hand, in one pass with the loss; the second
    one is right, too.

    Args:
        logits: :math:`z`, any shape, floating.
        targets: the labels :math:`y`, dense, of the shape of ``logits``: bool, 0/1, or anything
            between. No gradient reaches them.
        positives: instead of ``targets`` the indices of the ones, ``(p, logits.ndim)``, int64;
            what stands there twice counts once.
        power: :math:`n > 0`. The article has 2 for subjects and 4 for objects.
        mask: which positions count, of the shape of the leading dimensions of ``logits``: bool, or
            weights of at least 0. What a masked position holds is never used: NaN may stand there.
        reduction: "mean" is the weighted sum over the positions, each with the sum of its trailing
            dimensions, divided by the sum of the weights; without a mask each element is a
            position. "sum", or "none" for the (weighted) elements.

    Returns:
        A scalar, or the shape of ``logits`` for "none"; in the dtype of ``logits``, but float32 for
        half types. 0 without gradients if nothing counts.

    Raises:
        TypeError: if ``logits`` is not floating, ``positives`` not int64, or ``mask`` complex or
            integer.
        ValueError: for both or neither of ``targets`` and ``positives``, shapes that do not fit, a
            label outside of [0, 1], an index out of range, a negative weight, a ``power`` that is
            not above 0, or an unknown ``reduction``. Values are looked at on the CPU only.

    Source:
        Article 7161, without its clip. With ``power=1`` it is
        ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Example:
        A positive at z = -20 has the slope -4; clipped at 1e-7 it would have none.

        >>> z = torch.tensor([[-20.0, 0.0]], requires_grad=True)
        >>> loss = power_bce_loss(z, positives=torch.tensor([[0, 0]]), power=4, reduction="sum")
        >>> loss
        tensor(80.0645, grad_fn=<SumBackward0>)
        >>> loss.backward()
        >>> z.grad
        tensor([[-4.0000,  0.1333]])
    """
    require_floating("logits", logits)
    _require_power(power)
    if reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {REDUCTIONS}; got {reduction!r}.")
    if (targets is None) == (positives is None):
        raise ValueError("Give either `targets` or `positives`, and not both.")
    if targets is not None:
        _require_labels(targets, logits)
    if positives is not None:
        require_indices("positives", positives, tuple(logits.shape))
    if mask is not None:
        _require_mask(mask, logits)

    z = logits.to(wide_dtype(logits.dtype))
    y = None if targets is None else targets.detach().to(z.dtype)
    hidden = None if mask is None else mask == 0
    loss = _elements(z, y, positives, hidden, float(power))
    if mask is None:
        if reduction == "none":
            return loss
        return loss.mean() if reduction == "mean" else loss.sum()
    weights = mask.to(z.dtype)
    if reduction == "none":
        return loss.masked_fill(_trailing(hidden, loss), 0.0) * _trailing(weights, loss)
    positions = loss[..., None].flatten(mask.ndim).sum(-1).masked_fill(hidden, 0.0)
    total = (positions * weights).sum()
    if reduction == "sum":
        return total
    count = weights.sum()
    return total / count.masked_fill(count == 0, 1.0)


# --- the elements ---------------------------------------------------------------------------------


def _elements(
    z: Tensor, y: Tensor | None, positives: Tensor | None, hidden: Tensor | None, n: float
) -> Tensor:
    if not values_are_hidden():
        return _OnePass.apply(z, y, positives, hidden, n)
    # A compiler makes one pass of the plain form by itself.
    z = z if hidden is None else z.masked_fill(_trailing(hidden, z), 0.0)
    y = _dense(z, positives) if y is None else y
    return -torch.lerp(_log_complement(z, n), n * F.logsigmoid(z), y)


class _OnePass(torch.autograd.Function):
    """Loss and derivative of each element together, in blocks that stay in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        y: Tensor | None,
        positives: Tensor | None,
        hidden: Tensor | None,
        n: float,
    ) -> Tensor:
        given, z = z, z.contiguous()
        loss, slope = torch.empty_like(z), torch.empty_like(z)
        cells = CELLS_PER_PASS * torch.get_num_threads() if z.device.type == "cpu" else z.numel()
        blocks = [each.view(-1).split(max(cells, 1)) for each in (z, loss, slope)]
        labels = [None] * len(blocks[0]) if y is None else y.reshape(-1).split(max(cells, 1))
        for block in zip(*blocks, labels, strict=True):
            _fill(*block, n)
        if positives is not None:
            where = positives.unbind(-1)
            loss[where] = -n * F.logsigmoid(z[where])
            slope[where] = -n * torch.sigmoid(-z[where])
        if hidden is not None:
            _clear(slope, hidden)
        ctx.n = n
        ctx.save_for_backward(given, y, positives, hidden, slope)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, y, positives, hidden, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate once more
            z = z if hidden is None else z.masked_fill(_trailing(hidden, z), 0.0)
            y = _dense(z, positives) if y is None else y
            slope = torch.lerp(_slope_of_zeros(z, ctx.n), -ctx.n * torch.sigmoid(-z), y)
        return gradient * slope, None, None, None, None


def _fill(z: Tensor, loss: Tensor, slope: Tensor, y: Tensor | None, n: float) -> None:
    """Write the loss and its derivative, with one exponential and one logarithm per cell.

    A zero costs -log(1 - p) where p is at most a half, and z - log(s + ... + s^n) above: the second
    form does not overflow, the first one does not cancel. Selecting by a weight of 0 or 1 is three
    times faster than by a bool.
    """
    sigmoid = torch.sigmoid(z, out=loss)  # what is written last serves as a place to work
    p, terms = _power(z, sigmoid, n), _geometric_sum(z, sigmoid, n)
    torch.div(p, terms, out=slope).mul_(n)
    terms.mul_(sigmoid).sub_(1.0)
    base = F.threshold_(loss.copy_(z), _switch(n), 0.0)
    base.sub_(p.neg_().lerp_(terms, base.sign()).log1p_())
    if y is not None:
        loss.lerp_(F.logsigmoid(z).mul_(-n), y)
        slope.lerp_(torch.sigmoid(-z).mul_(-n), y)


def _clear(slope: Tensor, hidden: Tensor) -> None:
    """Make the slope of masked positions 0, whatever it was: 0 times NaN is NaN."""
    if slope.device.type == "cpu":  # the other form costs a quarter of the loss there
        rows = hidden.reshape(-1).nonzero()[:, 0]
        slope.flatten(0, hidden.ndim - 1).index_fill_(0, rows, 0.0)
    else:
        slope.masked_fill_(_trailing(hidden, slope), 0.0)


def _dense(z: Tensor, positives: Tensor) -> Tensor:
    one = torch.ones((), dtype=z.dtype, device=z.device)
    return torch.zeros_like(z).index_put(positives.unbind(-1), one)


def _trailing(leading: Tensor, like: Tensor) -> Tensor:
    return leading.reshape(*leading.shape, *[1] * (like.ndim - leading.ndim))


# --- powers and sums of powers --------------------------------------------------------------------


def _log_complement(z: Tensor, n: float | int) -> Tensor:
    """Return log(1 - s^n), differentiable to any order."""
    sigmoid = torch.sigmoid(z)
    p = _power(z, sigmoid, n)
    small = p <= 0.5
    # Neither form is infinite where the other one is taken: 0 times infinity would be NaN.
    below = torch.log1p(-p.masked_fill(~small, 0.0))
    above = F.logsigmoid(-z) + _geometric_sum(z, sigmoid, n).log()
    return torch.where(small, below, above)


def _slope_of_zeros(z: Tensor, n: float) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return n * _power(z, sigmoid, n) / _geometric_sum(z, sigmoid, n)


def _power(z: Tensor, sigmoid: Tensor, n: float | int) -> Tensor:
    """Return s^n as a new tensor; products are faster than powers."""
    if n in (2, 4):
        square = sigmoid * sigmoid
        return square if n == 2 else square * square
    if n == int(n):
        return sigmoid.pow(n)
    # A power below 1, or its derivative, is infinite at 0, where the sigmoid has underflowed.
    return torch.exp(n * F.logsigmoid(z))


def _geometric_sum(z: Tensor, sigmoid: Tensor, n: float | int) -> Tensor:
    """Return (1 - s^n) / (1 - s) as a new tensor: 1 + s + ... + s^(n-1) for a whole n."""
    if n == 1:
        return torch.ones_like(sigmoid)
    if n in (2, 3, 4):
        one, terms = sigmoid.new_ones(()), sigmoid + 1.0
        for _ in range(int(n) - 2):
            terms = torch.addcmul(one, terms, sigmoid)
        return terms
    # Below eps the quotient is n to the last bit, and the quotient of its derivatives is 0 / 0.
    u = F.logsigmoid(z).clamp_max(-torch.finfo(z.dtype).eps / 4)
    return torch.expm1(n * u) / torch.expm1(u)


def _switch(n: float) -> float:
    """Return the z at which s^n is a half, but at least 0: then the sign tells the side."""
    return -math.log(math.expm1(math.log(2) / n)) if n > 1 else 0.0


# --- checks ---------------------------------------------------------------------------------------


def require_indices(name: str, indices: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what is not a table of indices into a tensor of this shape."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"`{name}` must be an int64 tensor of indices; got {got}.")
    if indices.ndim != 2 or indices.shape[1] != len(shape):
        raise ValueError(
            f"`{name}` must have shape (p, {len(shape)}), one column for each dimension of "
            f"{tuple(shape)}; got {tuple(indices.shape)}."
        )
    if values_are_hidden() or indices.device.type != "cpu":
        return
    wrong = ((indices < 0) | (indices >= torch.tensor(shape))).any(-1).nonzero()[:, 0]
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"`{name}[{first}]` is {indices[first].tolist()}, out of range for shape "
            f"{tuple(shape)}."
        )


def _require_power(power: float | int) -> None:
    if not 0 < power < math.inf:
        raise ValueError(f"`power` must be a finite number above 0; got {power}.")


def _require_labels(targets: Tensor, logits: Tensor) -> None:
    if targets.shape != logits.shape:
        raise ValueError(
            f"`targets` must have the shape of `logits`, {tuple(logits.shape)}; "
            f"got {tuple(targets.shape)}."
        )
    if values_are_hidden() or targets.device.type != "cpu" or not targets.numel():
        return
    low, high = targets.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`targets` must lie in [0, 1]; got {low.item()} to {high.item()}.")


def _require_mask(mask: Tensor, logits: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"`mask` must be bool, or floating weights; got {mask.dtype}.")
    if not mask.ndim or mask.shape != logits.shape[: mask.ndim]:
        raise ValueError(
            f"`mask` must have the shape of leading dimensions of `logits`, "
            f"{tuple(logits.shape)}; got {tuple(mask.shape)}."
        )
    if values_are_hidden() or mask.device.type != "cpu" or mask.dtype == torch.bool:
        return
    if not (mask >= 0).all():
        raise ValueError("`mask` must hold weights of at least 0.")
