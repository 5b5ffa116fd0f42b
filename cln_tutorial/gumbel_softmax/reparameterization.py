r"""The continuous case: gradients through a sample, its distribution function, or around it.

.. math:: \nabla_\theta\, \mathbb E_{z \sim p_\theta} f(z)
    = \mathbb E_\varepsilon \nabla_\theta f(g_\theta(\varepsilon))
    = \mathbb E_z\, f(z)\, \nabla_\theta \log p_\theta(z)

Source: Su Jianlin, article 6705 (https://kexue.fm/archives/6705), 2019; Kingma & Welling 2014;
Figurnov, Mohamed & Mnih 2018; Mohamed et al. 2020.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cln_tutorial.gumbel_softmax._checks import require_floating


def normal_rsample(
    mean: Float[Tensor, "..."],
    std: Float[Tensor, "..."],
    sample_shape: Sequence[int] = (),
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    r"""Draw :math:`z = \mu + \sigma \varepsilon`, with the gradient of :math:`\mu, \sigma`.

    Args:
        mean, std: broadcast against each other; ``std`` is not negative.
        sample_shape: of independent draws, in front.
        generator: of the noise.

    Returns:
        Shape ``sample_shape`` + that of ``mean + std``.

    Raises:
        TypeError: if one of them is not floating.

    Source:
        Kingma & Welling 2014, section 2.4; article 6705.

    Example:
        >>> mean, std = torch.zeros(3, requires_grad=True), torch.ones(3)
        >>> normal_rsample(mean, std, (5,)).sum().backward()
        >>> mean.grad
        tensor([5., 5., 5.])
    """
    require_floating("mean", mean)
    require_floating("std", std)
    like = mean + std
    noise = torch.empty((*sample_shape, *like.shape), dtype=like.dtype, device=like.device)
    return mean + std * noise.normal_(generator=generator)


def implicit_rsample(
    z: Float[Tensor, "..."],
    cdf: Callable[[Tensor], Tensor],
    log_prob: Callable[[Tensor], Tensor],
) -> Float[Tensor, "..."]:
    r"""Give samples the gradient of their parameters, where no formula makes them from noise.

    A sample keeps its quantile when the parameters move: :math:`F_\theta(z) = u` stays. So

    .. math:: \nabla_\theta z = -\frac{\nabla_\theta F_\theta(z)}{p_\theta(z)}

    Args:
        z: samples of a continuous distribution on the line, made in any way.
        cdf: its distribution function, differentiable in the parameters; called with ``z``.
        log_prob: its log-density; only its value is used.

    Returns:
        ``z`` to the last bit, with that gradient, and no other.

    Raises:
        TypeError: if ``z`` is not floating.
        ValueError: if ``cdf`` or ``log_prob`` give another shape.

    Source:
        Figurnov, Mohamed & Mnih 2018, equation 5.

    Example:
        >>> scale = torch.tensor(2.0, requires_grad=True)
        >>> exponential = torch.distributions.Exponential(1 / scale)
        >>> z = torch.tensor([1.0, 3.0])
        >>> implicit_rsample(z, exponential.cdf, exponential.log_prob).sum().backward()
        >>> round(scale.grad.item(), 5)  # z is scale times noise: 1 / 2 + 3 / 2
        2.0
    """
    require_floating("z", z)
    z = z.detach()
    quantile, density = cdf(z), log_prob(z).detach().exp()
    for name, value in {"cdf": quantile, "log_prob": density}.items():
        if value.shape != z.shape:
            raise ValueError(f"`{name}` must return {tuple(z.shape)}; got {tuple(value.shape)}.")
    return z - (quantile - quantile.detach()) / density


def score_function_surrogate(
    value: Float[Tensor, "..."],
    log_prob: Float[Tensor, "..."],
    baseline: Float[Tensor, "..."] | float | int = 0.0,
) -> Float[Tensor, "..."]:
    r"""Return what has the value of :math:`f`, and the gradient that needs no derivative of it.

    .. math:: (f(z) - b)\, \nabla_\theta \log p_\theta(z) + \nabla_\theta f(z)

    It is right if the support does not move with :math:`\theta`, and if :math:`b` does not depend
    on :math:`z`.

    Args:
        value: :math:`f(z)` for samples without a gradient.
        log_prob: of these samples, with the gradient of the parameters; shape of ``value``.
        baseline: broadcasts to ``value``, and gets no gradient.

    Returns:
        Shape of ``value``; equal to it.

    Raises:
        ValueError: if the shapes differ.

    Source:
        Williams 1992; article 6705, "the story behind".

    Example:
        >>> p = torch.tensor(0.25, requires_grad=True)
        >>> log_prob = torch.stack([(1 - p).log(), p.log()])
        >>> value = torch.tensor([1.0, 5.0])
        >>> (log_prob.exp().detach() * score_function_surrogate(value, log_prob)).sum().backward()
        >>> p.grad  # of 1 + 4 p
        tensor(4.)
    """
    if value.shape != log_prob.shape:
        raise ValueError(
            f"`log_prob` must have the shape of `value` {tuple(value.shape)}; "
            f"got {tuple(log_prob.shape)}."
        )
    baseline = baseline.detach() if isinstance(baseline, Tensor) else baseline
    return value + (value.detach() - baseline) * (log_prob - log_prob.detach())


class GradientVariances(NamedTuple):
    """Variances of two estimators of one gradient, each from one sample."""

    score_function: float
    """Of the gradient by the score function."""
    pathwise: float
    """Of that through the sample."""
    best_baseline: float
    """The baseline that makes ``score_function`` smallest."""

    @property
    def ratio(self) -> float:
        """Score function over pathwise, above 1 if reparameterisation is the better one."""
        return self.score_function / self.pathwise


def gaussian_variance_ratio(
    kind: str,
    mean: float | int,
    std: float | int,
    *,
    omega: float | int | None = None,
    dims: int = 1,
    baseline: float | int = 0.0,
) -> GradientVariances:
    r"""Return in closed form how much two estimators of a gradient scatter, for a normal variable.

    The gradient is that of one coordinate of :math:`\mu`, and the function

    - "square": :math:`f = \sum_{i \le d} z_i^2`, all with one mean and deviation; or
    - "sine": :math:`f = \sin \omega z`, for which the pathwise gradient is the worse one as soon as
      :math:`\omega\sigma` is a little above 1.

    Args:
        kind: "square" or "sine".
        mean, std: of the normal distribution; ``std`` is positive.
        omega: of the sine.
        dims: :math:`d` of the square.
        baseline: what the score function's estimator subtracts from :math:`f`.

    Raises:
        ValueError: for another kind, a ``std`` that is not positive, or ``omega`` missing.

    Source:
        Article 6705 asks for the counterexample; the moments are those of the normal distribution.

    Example:
        >>> gaussian_variance_ratio("square", 1, 1)
        GradientVariances(score_function=30.0, pathwise=4.0, best_baseline=4.0)
        >>> round(gaussian_variance_ratio("sine", 0.3, 1, omega=2).ratio, 3)
        0.231
    """
    if std <= 0:
        raise ValueError(f"`std` must be positive; got {std}.")
    var = float(std) ** 2
    if kind == "square":
        rest_mean = (dims - 1) * (mean**2 + var)
        rest_square = rest_mean**2 + (dims - 1) * (2 * var**2 + 4 * mean**2 * var)
        own = mean**4 / var + 18 * mean**2 + 15 * var  # E z^4 (z - mu)^2 / sigma^4
        gradient, pathwise = 2 * mean, 4 * var
        best = mean**2 + 3 * var + rest_mean  # E f (z - mu)^2 / sigma^2
        second = own + 2 * rest_mean * (mean**2 + 3 * var) / var + rest_square / var
    elif kind == "sine":
        if omega is None or dims != 1:
            raise ValueError("`omega` must be given for 'sine', and `dims` be 1.")
        power = (omega * std) ** 2
        gradient = omega * math.cos(omega * mean) * math.exp(-power / 2)
        wave = math.cos(2 * omega * mean) * math.exp(-2 * power)
        pathwise = omega**2 / 2 * (1 + wave) - gradient**2
        second = (1 - (1 - 4 * power) * wave) / (2 * var)
        best = math.sin(omega * mean) * math.exp(-power / 2) * (1 - power)
    else:
        raise ValueError(f"`kind` must be 'square' or 'sine'; got {kind!r}.")
    score = second - gradient**2 - (2 * best - baseline) * baseline / var
    return GradientVariances(float(score), float(pathwise), float(best))
