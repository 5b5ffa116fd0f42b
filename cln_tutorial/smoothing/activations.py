r"""Element-wise smoothings of relu, absolute value, sign, step, rounding and clipping.

Smoothing by convolution: with a density :math:`\varphi` at the scale :math:`\tau` the step becomes
its distribution function, and the relu the integral of that.

.. math:: \mathrm{step}_\tau = \mathrm{step} * \varphi_\tau, \quad
    \mathrm{relu}_\tau = \mathrm{relu} * \varphi_\tau, \quad
    \mathrm{relu}_\tau' = \mathrm{step}_\tau

All functions keep shape and dtype (half types are computed in float32), take a temperature in units
of ``x`` as a number or a tensor that broadcasts to ``x`` and may be differentiated, are the hard
function with its almost-everywhere gradient at 0, hold for numbers up to 1e30 and temperatures from
1e-30 to 1e30, and work in forward mode too.

Source: Su Jianlin, articles 6620 and 8718 (https://kexue.fm/archives/8718), 2021.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cln_tutorial.smoothing._checks import require_floating, require_temperature, wide_dtype
from cln_tutorial.smoothing.maxima import FAR, scaled

_RELUS = ("softplus", "swish", "gelu", "normal", "sqrt", "quadratic")
_CONVOLUTIONS = ("softplus", "normal", "sqrt", "quadratic")
# In temperatures, for the long tail of the square root: what is left of it is 1e-8 of one.
_FAR_OF_SQRT = 1e8
_DENSITIES = ("logistic", "normal", "sqrt", "quadratic")


def smooth_relu(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    kind: str = "softplus",
) -> Float[Tensor, "..."]:
    r"""Return a smooth :math:`\max(x, 0)`.

    =========== ======================================================== ===========================
    kind        value, with :math:`s = x / \tau`                         largest error in
                                                                         :math:`\tau`, and where
    =========== ======================================================== ===========================
    "softplus"  :math:`\tau \log(1 + e^s)`, log-sum-exp of x and 0       0.693147 at 0
    "swish"     :math:`x\,\sigma(s)`, Boltzmann's mean of x and 0        0.278465 at 1.278465
    "gelu"      :math:`x\,\Phi(s)`                                       0.169971 at 0.751792
    "normal"    :math:`x\,\Phi(s) + \tau\,\phi(s)`                       0.398942 at 0
    "sqrt"      :math:`\frac12 (x + \sqrt{x^2 + 4 \tau^2})`              1 at 0
    "quadratic" :math:`(x + \tau)^2 / 4\tau` for :math:`|x| < \tau`      0.25 at 0
    =========== ======================================================== ===========================

    The errors are :math:`\log 2`, :math:`W(1/e)`, :math:`1/\sqrt{2\pi}`. "swish" and "gelu" lie
    below relu, and are no convolutions: they are not monotone. All others lie above it, rise with
    ``x`` and with the temperature. GELU is not relu smoothed by a normal density: it lacks
    :math:`\tau\phi`.

    Args:
        x: any shape and floating dtype.
        temperature: at least 0.
        kind: see the table.

    Raises:
        TypeError: if ``x`` or ``temperature`` is not floating.
        ValueError: for an unknown kind, or a temperature that is negative, infinite, NaN or does
            not broadcast.

    Source:
        Articles 6620 and 8718; Ramachandran et al. 2017 (swish); Hendrycks & Gimpel 2016 (GELU).

    Example:
        >>> smooth_relu(torch.tensor([-1.0, 0.0, 1.0]), kind="quadratic")
        tensor([0.0000, 0.2500, 1.0000])
    """
    x, tau, dtype = _wide(x, temperature, kind, _RELUS)
    return _relu(x, tau, kind).to(dtype)


def smooth_abs(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    kind: str = "softplus",
) -> Float[Tensor, "..."]:
    r"""Return a smooth :math:`|x|`.

    .. math:: \mathrm{relu}_\tau(x) + \mathrm{relu}_\tau(-x)

    For "sqrt" that is :math:`\sqrt{x^2 + 4\tau^2}`, and for "swish" :math:`x \tanh(x / 2\tau)`. The
    error is at most twice that of :func:`smooth_relu`, in the same place.

    Args:
        x, temperature, kind: as of :func:`smooth_relu`.

    Raises: as :func:`smooth_relu`.

    Source: article 6620, as the maximum of :math:`x` and :math:`-x`.

    Example:
        >>> smooth_abs(torch.tensor([-3.0, 0.0, 3.0]), temperature=2.0, kind="sqrt")
        tensor([5., 4., 5.])
    """
    x, tau, dtype = _wide(x, temperature, kind, _RELUS)
    return (_relu(x, tau, kind) + _relu(-x, tau, kind)).to(dtype)


def smooth_sign(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    kind: str = "logistic",
) -> Float[Tensor, "..."]:
    r"""Return a smooth sign: :math:`2\,\mathrm{step}_\tau(x) - 1`.

    =========== ================================================= ===========================
    kind        value, with :math:`s = x / \tau`                  error off zero, at most
    =========== ================================================= ===========================
    "logistic"  :math:`\tanh(s / 2)`                              :math:`2 e^{-|s|}`
    "normal"    :math:`\mathrm{erf}(s / \sqrt 2)`                 :math:`e^{-s^2 / 2}`
    "sqrt"      :math:`x / \sqrt{x^2 + 4 \tau^2}`                 :math:`2 / s^2`
    "quadratic" :math:`s`, clipped to [-1, 1]                     0 for :math:`|x| \ge \tau`
    =========== ================================================= ===========================

    Args:
        x: any shape and floating dtype.
        temperature: at least 0; 0 is the sign, with gradient 0.
        kind: see the table; each is the derivative of a :func:`smooth_abs`, "logistic" of
            "softplus".

    Raises: as :func:`smooth_relu`.

    Source: article 8718.

    Example:
        >>> smooth_sign(torch.tensor([-2.0, 0.0, 0.5]), kind="quadratic")
        tensor([-1.0000,  0.0000,  0.5000])
    """
    x, tau, dtype = _wide(x, temperature, kind, _DENSITIES)
    s = _distances(x, tau, kind)
    if kind == "logistic":
        value = torch.tanh(s / 2)
    elif kind == "normal":
        value = torch.erf(s * math.sqrt(0.5))
    elif kind == "sqrt":
        value = torch.where(s.abs() >= _FAR_OF_SQRT, s.sign(), s / (s.square() + 4).sqrt())
    else:
        value = s.clamp(-1.0, 1.0)
    return value.to(dtype)


def smooth_step(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    kind: str = "logistic",
) -> Float[Tensor, "..."]:
    r"""Return a smooth step: the distribution function of the density that smooths it.

    .. math:: \sigma(s), \quad \Phi(s), \quad \tfrac12\bigl(1 + x / \sqrt{x^2 + 4\tau^2}\bigr),
        \quad \tfrac12 (1 + s) \text{ clipped}, \qquad s = x / \tau

    The last density is uniform on :math:`[-\tau, \tau]`. Errors are half of those of
    :func:`smooth_sign`.

    Args:
        x: any shape and floating dtype.
        temperature: at least 0; 0 is the step, 1/2 at zero, with gradient 0.
        kind: "logistic", "normal", "sqrt" or "quadratic": the derivative of that
            :func:`smooth_relu`, "logistic" of "softplus".

    Raises: as :func:`smooth_relu`.

    Source: article 8718.

    Example:
        >>> smooth_step(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.2689, 0.5000, 0.7311])
    """
    x, tau, dtype = _wide(x, temperature, kind, _DENSITIES)
    s = _distances(x, tau, kind)
    if kind == "logistic":
        value = s.sigmoid()
    elif kind == "normal":
        value = _normal_cdf(s)
    elif kind == "sqrt":
        # Of a negative number 1 + cos would cancel; sin^2 / (1 - cos) does not.
        h, right = (s.square() + 4).sqrt(), s > 0
        cosine = s / h
        tail = 2 / (h.square() * (1 + torch.where(right, cosine, -cosine)))
        value = torch.where(right, (1 + cosine) / 2, tail)
        value = torch.where(s.abs() >= _FAR_OF_SQRT, (s.sign() + 1) / 2, value)
    else:
        value = (s.clamp(-1.0, 1.0) + 1) / 2
    return value.to(dtype)


def smooth_round(
    x: Shaped[Tensor, "..."], temperature: float | int | Tensor = 0.1
) -> Float[Tensor, "..."]:
    r"""Return a smooth rounding to whole numbers, which leaves these where they are.

    .. math:: \lfloor x \rfloor + \frac12 + \frac12\, \frac{\tanh(f / 2\tau)}{\tanh(1 / 4\tau)},
        \qquad f = x - \lfloor x \rfloor - \tfrac12

    It rises with ``x``, has a continuous derivative, and is the identity in the limit of a high
    temperature; at 1 it is within 0.005 of it, hence the other default. At a distance :math:`d`
    from the nearest half the error is at most :math:`e^{-d / \tau}`.

    Args:
        x: any shape and floating dtype.
        temperature: at least 0; 0 is ``torch.round``, with gradient 0. Everywhere else halves stay.

    Raises:
        TypeError: if ``x`` or ``temperature`` is not floating.
        ValueError: for a temperature that is negative, infinite, NaN or does not broadcast.

    Source: Agustsson & Theis 2020, equation of the soft rounding, with :math:`\alpha = 1 / 2\tau`.

    Example:
        >>> smooth_round(torch.tensor([1.0, 1.4, 1.5, 1.6]))
        tensor([1.0000, 1.2658, 1.5000, 1.7342])
    """
    x, tau, dtype = _wide(x, temperature)
    hard = _is_zero(tau, x) | x.isinf()
    finite = x.masked_fill(hard, 0.0)
    low = finite.detach().floor()
    rest = scaled(finite - low, 0.5, 2 * tau)
    end = scaled(x.new_tensor(1.0), 0.5, 2 * tau)
    value = low + (0.5 + rest.tanh() / (2 * end.tanh()))
    return torch.where(hard, x.detach().round(), value).to(dtype)


def smooth_clip(
    x: Shaped[Tensor, "..."],
    min: float | int,
    max: float | int,
    temperature: float | int | Tensor = 1.0,
    kind: str = "softplus",
) -> Float[Tensor, "..."]:
    r"""Return ``x`` between two bounds that it nears and, but for "quadratic", does not reach.

    .. math:: a + \mathrm{relu}_\tau(x - a) - \mathrm{relu}_\tau(x - b)

    It rises with ``x``, and is clipping smoothed by convolution. The error is at most that of
    :func:`smooth_relu`, for bounds far from each other in units of the temperature.

    Args:
        x: any shape and floating dtype.
        min, max: the bounds, finite.
        temperature: at least 0.
        kind: "softplus", "normal", "sqrt" or "quadratic", as of :func:`smooth_relu`.

    Raises:
        TypeError: if ``x`` or ``temperature`` is not floating.
        ValueError: for an unknown kind, a bad temperature, or bounds that are not finite or not in
            order.

    Source: article 8718, applied to clipping.

    Example:
        >>> smooth_clip(torch.tensor([-9.0, 0.0, 0.5, 9.0]), 0, 1, 0.5, kind="quadratic")
        tensor([0.0000, 0.1250, 0.5000, 1.0000])
    """
    x, tau, dtype = _wide(x, temperature, kind, _CONVOLUTIONS)
    if not -math.inf < min <= max < math.inf:
        raise ValueError(f"`min` and `max` must be finite and in order; got {min} and {max}.")
    # From the nearer end: far beyond the other one the two relus would cancel.
    below = min + _relu(x - min, tau, kind) - _relu(x - max, tau, kind)
    above = max - _relu(max - x, tau, kind) + _relu(min - x, tau, kind)
    return torch.where(x < min + (max - min) / 2, below, above).to(dtype)


# --- what they share ------------------------------------------------------------------------------


def _wide(
    x: Tensor, temperature: float | int | Tensor, kind: str = "", kinds: tuple[str, ...] = ("",)
) -> tuple[Tensor, Tensor | float, torch.dtype]:
    require_floating("x", x)
    require_temperature(temperature, x.shape)
    if kind not in kinds:
        raise ValueError(f"`kind` must be one of {kinds}; got {kind!r}.")
    wide = x.to(wide_dtype(x.dtype))
    if isinstance(temperature, Tensor):
        return wide, temperature.to(wide.dtype), x.dtype
    return wide, float(temperature), x.dtype


def _distances(x: Tensor, tau: Tensor | float, kind: str) -> Tensor:
    return scaled(x, 0.0, tau, _FAR_OF_SQRT if kind == "sqrt" else FAR)


def _relu(x: Tensor, tau: Tensor | float, kind: str) -> Tensor:
    s = _distances(x, tau, kind)
    if kind == "softplus":
        value = -tau * torch.nn.functional.logsigmoid(-s)
    elif kind == "swish":
        value = x * s.sigmoid()
    elif kind == "gelu":
        value = x * _normal_cdf(s)
    elif kind == "normal":
        value = x * _normal_cdf(s) + tau * torch.exp(-s.square() / 2) / math.sqrt(2 * math.pi)
    elif kind == "sqrt":
        # (h + s) / 2 cancels where s is negative; there it is one over (h - s) / 2.
        right = s > 0
        half = ((s.square() + 4).sqrt() + torch.where(right, s, -s)) / 2
        value = tau * torch.where(right, half, 1 / half)
    else:
        value = tau * (s.clamp(-1.0, 1.0) + 1).square() / 4 + (x - tau).relu()
    far = s.abs() >= (_FAR_OF_SQRT if kind == "sqrt" else FAR)
    return torch.where(far | _is_zero(tau, x), x.relu(), value)


def _is_zero(tau: Tensor | float, x: Tensor) -> Tensor:
    return tau == 0 if isinstance(tau, Tensor) else x.new_full((), tau == 0, dtype=torch.bool)


def _normal_cdf(s: Tensor) -> Tensor:
    return torch.erfc(-s * math.sqrt(0.5)) / 2
