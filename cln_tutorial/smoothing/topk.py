r"""Smooth top-k: weights in [0, 1] that sum to k, in four ways that hold and one that does not.

Three of them shift a distribution function until the weights sum to k,

.. math:: p_i = f\bigl((x_i - \lambda) / \tau\bigr), \qquad \sum_i p_i = k

and one is the chance to be among k entries drawn together. The first derivative of all of them is
that of a covariance, and nothing in it is divided by what may be zero.

Source: Su Jianlin, articles 6620 (https://kexue.fm/archives/6620), 2019, and 10373, 2024.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cln_tutorial.smoothing._checks import choose_backend
from cln_tutorial.smoothing.maxima import rows_and_temperature, scaled, where_hard

METHODS = ("sigmoid", "esp", "exp", "laplace", "recursive")
_WITH_NUMBA = ("sigmoid", "esp")
_STEPS = 48  # half of them bisections: 20,000 temperatures become 0.001, and Newton does the rest
# In temperatures. Of exp(150) the fourth power is a number, which derivatives need; without them
# exp(600) is one, and exp(-150), the weight half way, is none.
_FARTHEST = {"esp": 150.0, "laplace": 300.0}


def soft_topk(
    x: Shaped[Tensor, "..."],
    k: int,
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    method: str = "sigmoid",
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Return weights of the k largest entries: near 1 for these, near 0 for others.

    - "sigmoid": :math:`p_i = \sigma((x_i - \lambda) / \tau)`, the threshold found by Newton's
      method between bounds.
    - "esp": :math:`p = \nabla_{x / \tau} \log e_k(e^{x / \tau})`, :math:`e_k` the elementary
      symmetric polynomial: the chance that :math:`i` is in a set of :math:`k` drawn with a
      probability proportional to :math:`\exp(\sum x_i / \tau)`. :math:`O(nk)`. For :math:`k = 1`
      it is softmax.
    - "exp": :math:`p_i = \min(1, e^{(x_i - \lambda) / \tau})`, in closed form after a sort. For
      :math:`k = 1` it is softmax.
    - "laplace": the distribution function of Laplace's density, in closed form after a sort. For
      :math:`k = 1` it is softmax only where no weight is above 1/2.
    - "recursive": the article's recursion, **broken**: it leaves [0, 1] and the order of ``x``. For
      [2, 1, 0, -1000] and k = 2 it selects the third entry: [0.665, 0.245, 1.090, 0]. Nor does a
      shift leave it alone. It is here to be looked at.

    The first four lie in [0, 1], sum to ``k``, keep the order of ``x`` and do not notice a shift.
    As the temperature falls they become the hard top-k. "sigmoid", "esp" and "laplace" treat both
    ends alike: the weights of the :math:`n - k` largest of :math:`-x` are :math:`1 - p`.

    Args:
        x: any shape and floating dtype. Entries of :math:`-\infty` get weight and gradient 0.
        k: from 0 to the number of entries.
        temperature: at least 0, in units of ``x``; a tensor broadcasts to ``x`` with 1 at ``dim``.
            0 is the hard top-k, with gradient 0; ties at its border share what is left.
        dim: the axis.
        method: see above.
        backend: "reference" is plain PyTorch; "numba" ("sigmoid" and "esp", CPU, extra ``fast``)
            gives the same weights; "auto" takes the faster that runs here.

    Returns:
        Shape and dtype of ``x``. Weights are right to :math:`10^{-12}` in float64, and sum to ``k``
        but for the rounding to the dtype. A row is NaN if it holds NaN, :math:`+\infty` or fewer
        than ``k`` entries above :math:`-\infty`; its gradient is 0.

    Raises:
        TypeError: if ``x`` or ``temperature`` is not floating.
        ValueError: for an unknown method, axis or backend, ``k`` out of range, or a temperature
            that is negative, infinite, NaN or does not broadcast.

    Source:
        Article 6620, "soft-k-max" ("recursive"); article 10373, GradTopK ("esp") and ThreTopK (the
        others), with the case of :math:`\lambda` below all entries that it leaves out.

    Example:
        >>> soft_topk(torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0]), 2, temperature=0.2)
        tensor([5.5276e-04, 3.7265e-06, 9.2414e-01, 9.9945e-01, 7.5856e-02])
    """
    rows, tau, dim = rows_and_temperature(x, temperature, dim)
    entries = rows.shape[-1]
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}; got {method!r}.")
    if not 0 <= k <= entries:
        raise ValueError(f"`k` must be from 0 to the {entries} entries of `dim`; got {k}.")
    if method not in _WITH_NUMBA and backend == "numba":
        raise ValueError(f"`backend` 'numba' runs {_WITH_NUMBA}; `method` is {method!r}.")
    backend = choose_backend(backend, x)
    if not rows.numel():
        return x.clone()
    masked = rows == -math.inf
    missing = masked.sum(-1, keepdim=True) > entries - k
    bad = missing | ~(rows.detach().amax(-1, keepdim=True) < math.inf)
    rows = rows.masked_fill(bad, 0.0)
    if k == 0 or (k == entries and method != "recursive"):
        weights = rows.masked_fill(torch.ones_like(masked), float(k > 0))
    elif method == "recursive":
        weights = _recursive(rows, masked, k, tau)
    else:
        border = rows.detach().kthvalue(entries - k + 1, -1, keepdim=True).values

        def soft() -> Tensor:
            distances = scaled(rows, border, tau)
            if method == "esp":
                return _esp(distances, k, backend)
            return _Threshold.apply(distances, k, method, backend)[0]

        weights = where_hard(tau, lambda: _hard(rows, border, k), soft)
    weights = weights.masked_fill(masked, 0.0).masked_fill(bad, math.nan)
    return weights.movedim(-1, dim).to(x.dtype)


def _hard(rows: Tensor, border: Tensor, k: int) -> Tensor:
    above, at = rows > border, rows == border
    left = k - above.sum(-1, keepdim=True)
    weights = above + at * (left / at.sum(-1, keepdim=True))
    return rows.masked_fill(torch.ones_like(above), 0.0) + weights.to(rows.dtype)


# --- a threshold ----------------------------------------------------------------------------------


class _Threshold(torch.autograd.Function):
    r"""Weights and what they lack to one, of distances to the border in temperatures.

    .. math:: \frac{\partial p_i}{\partial s_j}
        = f'_i \Bigl(\delta_{ij} - \frac{f'_j}{\sum f'}\Bigr)

    The slope is known from the weights, and so all derivatives are.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, k: int, method: str, backend: str) -> tuple[Tensor, Tensor]:
        if method == "sigmoid" and backend == "numba":
            return _sigmoid_weights(s, k)
        # Sums over a row decide on the threshold: a float32 would be off by its own rounding.
        weights, rest = _THRESHOLDS[method](s.to(_finest(s)), k)
        return weights.to(s.dtype), rest.to(s.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.method = inputs[2]
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, of_weights: Tensor, of_rest: Tensor) -> tuple:
        weights, rest = ctx.saved_tensors
        gradient = of_weights - of_rest
        slope = _SLOPES[ctx.method](weights, rest)
        # Where all weights are 0 or 1 there is no slope, and no mean of anything.
        least = torch.finfo(slope.dtype).tiny ** 0.5
        share = slope / slope.sum(-1, keepdim=True).clamp_min(least)
        mean = (share * gradient).sum(-1, keepdim=True)
        return slope * (gradient - mean), None, None, None


def _finest(s: Tensor) -> torch.dtype:
    return s.dtype if s.device.type == "mps" else torch.float64


def _sigmoid(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # The border is at zero; all above it count as missing to one, so that no sum is near k.
    above = s > 0
    wanted = k - above.sum(-1, keepdim=True)
    margin = math.log(s.shape[-1])
    below = s.masked_fill(s >= 0, -math.inf).amax(-1, keepdim=True)
    low = torch.where(below > -math.inf, below, 0.0) - margin
    high = torch.zeros_like(low) + margin
    threshold = (low + high) / 2
    for step in range(_STEPS):
        p, q = (s - threshold).sigmoid(), (threshold - s).sigmoid()
        surplus = torch.where(above, -q, p).sum(-1, keepdim=True) - wanted
        low = torch.where(surplus > 0, threshold, low)
        high = torch.where(surplus < 0, threshold, high)
        # Newton's method may creep along a tail, or leave it with a leap; bisection does neither.
        newton = (threshold + surplus / (p * q).sum(-1, keepdim=True)).clamp(low, high)
        bisect = newton.isnan() | (step % 2 == 1 and step < _STEPS - 3)
        threshold = torch.where(bisect & (surplus != 0), (low + high) / 2, newton)
    return (s - threshold).sigmoid(), (threshold - s).sigmoid()


def _exp(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    entries = s.shape[-1]
    # What is further above the border than that has weight one, however far.
    powers = s.clamp_max(math.log(entries) + 1).exp()
    largest = powers.sort(-1, descending=True).values
    rests = largest.flip(-1).cumsum(-1).flip(-1)[..., :k]
    free = torch.arange(k, 0, -1, device=s.device)
    full = (largest[..., :k] * free > rests).sum(-1, keepdim=True).clamp_max(k - 1)
    unit = rests.gather(-1, full) / (k - full)
    weights = (powers / unit).clamp_max(1.0)
    return weights, ((unit - powers) / unit).clamp_min(0.0)


def _laplace(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    entries = s.shape[-1]
    farthest = _FARTHEST["laplace"]
    s = s.clamp(-farthest, farthest)
    largest = s.sort(-1, descending=True).values
    up, down = largest.exp(), (-largest).exp()
    above = down.cumsum(-1)
    at_least = up.flip(-1).cumsum(-1).flip(-1)
    below = torch.cat([at_least[..., 1:], torch.zeros_like(up[..., :1])], -1)
    # The sum of the weights, less k, with the threshold at each of the entries.
    count = torch.arange(1, entries + 1, device=s.device)
    surplus = (count - k) - up * above / 2 + down * below / 2
    m = (surplus <= 0).sum(-1, keepdim=True)
    a = torch.where(m > 0, above.gather(-1, (m - 1).clamp_min(0)), 0.0)
    c = torch.where(m < entries, at_least.gather(-1, m.clamp_max(entries - 1)), 0.0)
    # a y^2 - 2 (m - k) y - c = 0, y the exponential of the threshold; a or c may be zero.
    root = ((m - k).square() + a * c).sqrt()
    y = torch.where(m > k, ((m - k) + root) / a, c / ((k - m) + root))
    z = s - y.log()
    tail = (-z.abs()).exp() / 2
    return torch.where(z < 0, tail, 1 - tail), torch.where(z < 0, 1 - tail, tail)


_THRESHOLDS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "sigmoid": _sigmoid,
    "exp": _exp,
    "laplace": _laplace,
}
_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda weights, rest: weights * rest,
    "exp": lambda weights, rest: weights.masked_fill(rest == 0, 0.0),
    "laplace": torch.minimum,
}


# --- elementary symmetric polynomials -------------------------------------------------------------


def _esp(s: Tensor, k: int, backend: str) -> Tensor:
    entries = s.shape[-1]
    if k > entries - k:  # the others are drawn together too, and are fewer
        return 1 - _esp(-s, entries - k, backend)
    farthest = _FARTHEST["esp"]
    fine = s.to(_finest(s)).clamp(-farthest, farthest)
    weights = _Esp.apply(fine, k) if backend == "numba" else _esp_reference(fine, k)
    return weights.clamp_max(1.0).to(s.dtype)  # a sum of chances may be rounded up


def _esp_reference(s: Tensor, k: int) -> Tensor:
    r"""Return the chances by the ratios of neighbouring polynomials, all positive.

    .. math:: q_i(j) = \frac{e_j(w_1, \dots, w_i)}{e_{j-1}(w_1, \dots, w_i)}
        = \frac{q_{i-1}(j) + w_i}{q_{i-1}(j-1) + w_i}\, q_{i-1}(j-1)

    If :math:`j` of the first :math:`i` entries are drawn, the last of these is among them with the
    chance :math:`w_i / (q_{i-1}(j) + w_i)`: a walk back from all entries and :math:`k` of them
    gives each its chance. Nothing is subtracted, so nothing cancels, and the sum is :math:`k`.
    """
    each = s.exp().unsqueeze(-1).unbind(-2)
    ratios = torch.zeros_like(s[..., :1]).expand(*s.shape[:-1], k)
    one = torch.ones_like(s[..., :1])
    taken = []
    for w in each:
        sums = ratios + w
        taken.append(w / sums)
        left = ratios / sums
        ratios = sums * torch.cat([one, left[..., :-1]], -1)
    flow = torch.cat([torch.zeros_like(s[..., :1]).expand(*s.shape[:-1], k - 1), one], -1)
    nothing = torch.zeros_like(one)
    weights = []
    for chance in reversed(taken):
        drawn = flow * chance
        weights.append(drawn.sum(-1))
        flow = flow - drawn + torch.cat([drawn[..., 1:], nothing], -1)
    return torch.stack(weights[::-1], -1)


class _Esp(torch.autograd.Function):
    """The weights, with the loops for values and first derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, k: int) -> Tensor:
        return _esp_weights(s, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        s, ctx.k = inputs
        ctx.save_for_backward(s)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return _EspProduct.apply(s, gradient, ctx.k), None


class _EspProduct(torch.autograd.Function):
    """The Jacobian, which is symmetric, times a vector; further derivatives of the reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, g: Tensor, k: int) -> Tensor:
        return _esp_product(s, g, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        s, g, ctx.k = inputs
        ctx.save_for_backward(s, g)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        s, g = ctx.saved_tensors

        def product(s: Tensor) -> Tensor:
            return torch.func.vjp(lambda s: _esp_reference(s, ctx.k), s)[1](g)[0]

        (of_s,) = torch.func.vjp(product, s)[1](gradient)
        return of_s, _EspProduct.apply(s, gradient, ctx.k), None


# --- the loops as operators -----------------------------------------------------------------------


@torch.library.custom_op("cln_tutorial::topk_sigmoid", mutates_args=())
def _sigmoid_weights(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from cln_tutorial.smoothing.topk_loops import sigmoid

    return sigmoid(s, k)


@torch.library.custom_op("cln_tutorial::topk_esp", mutates_args=())
def _esp_weights(s: Tensor, k: int) -> Tensor:
    from cln_tutorial.smoothing.topk_loops import esp

    return esp(s, k)


@torch.library.custom_op("cln_tutorial::topk_esp_product", mutates_args=())
def _esp_product(s: Tensor, g: Tensor, k: int) -> Tensor:
    """Return the Jacobian of the weights, which is symmetric, times a vector."""
    from cln_tutorial.smoothing.topk_loops import esp_product

    return esp_product(s, g, k)


@_sigmoid_weights.register_fake
def _fake_pair(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty(s.shape, dtype=s.dtype), torch.empty(s.shape, dtype=s.dtype)


@_esp_weights.register_fake
def _fake_weights(s: Tensor, k: int) -> Tensor:
    return torch.empty(s.shape, dtype=s.dtype)


@_esp_product.register_fake
def _fake_product(s: Tensor, g: Tensor, k: int) -> Tensor:
    return torch.empty(s.shape, dtype=s.dtype)


def _mapped(operator: Callable) -> Callable:
    def over_the_batch(info: Any, dims: tuple, *arguments: Any) -> tuple:
        moved = [
            each
            if not isinstance(each, Tensor)
            else each.expand(info.batch_size, *each.shape)
            if dim is None
            else each.movedim(dim, 0)
            for each, dim in zip(arguments, dims, strict=True)
        ]
        found = operator(*moved)
        return found, 0 if isinstance(found, Tensor) else (0,) * len(found)

    return over_the_batch


for _operator in (_sigmoid_weights, _esp_weights, _esp_product):
    _operator.register_vmap(_mapped(_operator))


# --- the article's recursion ----------------------------------------------------------------------


def _recursive(rows: Tensor, masked: Tensor, k: int, tau: Tensor | float) -> Tensor:
    lowest = rows.masked_fill(masked, math.inf).amin(-1, keepdim=True)
    x = rows.masked_fill(masked, 0.0) - lowest
    weights = torch.zeros_like(x)
    for _ in range(k):
        y = ((1 - weights) * x).masked_fill(masked, -math.inf)
        weights = weights + scaled(y, y.detach().amax(-1, keepdim=True), tau).softmax(-1)
    return weights
