"""A ruler for estimators: the bias and the variance of a gradient, against the exact one."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cln_tutorial.gumbel_softmax.estimators import Estimate, Exact, Function, Logits

NUMBERS_AT_A_TIME = 2**18  # logits in memory, of many repeats


class Measurement(NamedTuple):
    """What :func:`measure` finds; lengths are those of vectors of all logits."""

    bias: float
    """Length of mean gradient minus exact gradient, over the length of the exact one.

    Noise adds to it: one that is not several times ``standard_error`` may be none.
    """
    standard_error: float
    """Root mean square of what noise contributes to ``bias``."""
    variance: float
    """Of one gradient, summed over the logits."""
    cosine: float
    """Between mean gradient and exact gradient."""


def measure(
    est: Callable[..., Estimate],
    logits: Logits,
    f: Function,
    repeats: int,
    *,
    generator: torch.Generator | None = None,
    exact: Tensor | None = None,
) -> Measurement:
    r"""Measure bias and variance of an estimator's gradient for the logits against the exact one.

    With :math:`\bar g` the mean of :math:`R` gradients :math:`g_r`, and :math:`g^*` the exact one:

    .. math:: \mathrm{bias} = \frac{|\bar g - g^*|}{|g^*|}, \qquad
        \mathrm{variance} = \sum_r \frac{|g_r - \bar g|^2}{R - 1}, \qquad
        \mathrm{standard\ error} = \frac{\sqrt{\mathrm{variance} / R}}{|g^*|}

    The repeats run as one batch, in portions. Each portion has its own copy of ``est``: one with a
    memory (``Reinforce("ema")``, ``Rebar()``) is measured as it is, and stays so. Call it on the
    problem first if it has something to learn.

    Args:
        est: an estimator, or any function of their signature.
        logits: ``(*batch, N, K)``.
        f: as for the estimators. Repeats are more samples to it, ``S`` times as many; its
            parameters get no gradient.
        repeats: :math:`R`, at least 2.
        generator: of the noise.
        exact: the exact gradient, of the shape of ``logits``; None enumerates the states.

    Raises:
        ValueError: for fewer than 2 repeats, an ``exact`` of another shape, a gradient of zero, or
            too many states to enumerate.

    Source:
        The definitions of bias and variance of a vector.

    Example:
        >>> from cln_tutorial.gumbel_softmax.estimators import RLOO
        >>> logits, w = torch.zeros(2, 3), torch.tensor([0.0, 1.0, 3.0])
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = measure(RLOO(2), logits, lambda y: (y @ w).sum(-1) ** 2, 10_000,
        ...                 generator=generator)
        >>> found.bias < 4 * found.standard_error, found.cosine > 0.98
        (True, True)
    """
    if repeats < 2:
        raise ValueError(f"`repeats` must be at least 2; got {repeats}.")
    exact = exact_gradient(logits, f) if exact is None else exact
    if exact.shape != logits.shape:
        raise ValueError(
            f"`exact` must have the shape of `logits` {tuple(logits.shape)}; got "
            f"{tuple(exact.shape)}."
        )
    exact = exact.double()
    length = exact.norm().item()
    if length == 0:
        raise ValueError("the exact gradient is zero: there is no bias relative to it.")

    def f_of_repeats(samples: Tensor) -> Tensor:
        return f(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])

    errors, squares = torch.zeros_like(exact), torch.zeros_like(exact)
    at_a_time = max(1, NUMBERS_AT_A_TIME // logits.numel())
    for start in range(0, repeats, at_a_time):
        count = min(at_a_time, repeats - start)
        leaf = logits.detach().expand(count, *logits.shape).clone().requires_grad_()
        loss = copy.deepcopy(est)(leaf, f_of_repeats, generator=generator).loss
        # From the exact gradient, so that the squares do not cancel.
        error = _gradient(loss, leaf).double() - exact
        errors += error.sum(0)
        squares += error.square().sum(0)
    error = errors / repeats
    variance = ((squares - repeats * error.square()).sum() / (repeats - 1)).clamp_min(0).item()
    mean = exact + error
    return Measurement(
        bias=error.norm().item() / length,
        standard_error=(variance / repeats) ** 0.5 / length,
        variance=variance,
        cosine=((mean * exact).sum() / (mean.norm() * length)).item(),
    )


def exact_gradient(logits: Logits, f: Function) -> Tensor:
    r"""Return :math:`\nabla_o \mathbb E f` by enumeration of all :math:`K^N` states.

    Args:
        logits: ``(*batch, N, K)``.
        f: as for the estimators; its parameters get no gradient.

    Returns:
        Shape and dtype of ``logits``.

    Raises:
        ValueError: for more than 65,536 states.

    Source:
        Article 6705, "discrete": the sum that could be summed.

    Example:
        >>> w = torch.tensor([0.0, 4.0])  # p (1 - p) times the difference
        >>> exact_gradient(torch.zeros(1, 2), lambda y: (y @ w).sum(-1))
        tensor([[-1.,  1.]])
    """
    leaf = logits.detach().clone().requires_grad_()
    return _gradient(Exact()(leaf, f).loss, leaf)


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf)[0]
