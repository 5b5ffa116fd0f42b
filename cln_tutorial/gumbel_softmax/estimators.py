r"""Gradients of the mean over discrete variables: ten estimators with one signature.

.. math:: \nabla_\theta \mathbb E_{D \sim p_\theta} f(D), \qquad
    p_\theta(D) = \prod_{i \le N} \mathrm{softmax}(o_i)_{D_i}

All are called as ``est(logits, f, generator=...)``, with ``logits`` of shape ``(*batch, N, K)``:
``N`` independent variables of ``K`` classes. ``f`` maps ``S`` samples of each, one-hot vectors
``(S, *batch, N, K)``, to numbers ``(S, *batch)``, and all return an :class:`Estimate`, whose loss
takes one ``.sum().backward()``. Four attributes say what one gets and pays: ``unbiased`` (of the
gradient for the logits), ``n_evaluations`` of ``f`` (None: of all states), ``needs_f_gradient``,
and ``discrete_forward``: whether ``f`` sees vertices only.

Source: Su Jianlin, article 6705 (https://kexue.fm/archives/6705), 2019; Williams 1992; Bengio et
al. 2013; Jang, Gu & Poole 2017; Tucker et al. 2017; Dong, Mnih & Tucker 2020; Paulus et al. 2021;
Shekhovtsov 2023.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cln_tutorial.gumbel_softmax._checks import (
    checks_values,
    require_distributions,
    require_floating,
    require_temperature,
    wide_dtype,
)
from cln_tutorial.gumbel_softmax.relaxation import gumbel_softmax, one_hot
from cln_tutorial.gumbel_softmax.reparameterization import score_function_surrogate
from cln_tutorial.gumbel_softmax.sampling import (
    conditional_gumbel,
    gumbel_max_sample,
    gumbel_noise,
)

MOST_STATES = 2**16  # that are enumerated
EMA_DECAY = 0.9  # of the baseline, per call
LEARNING_RATE = 0.01  # of REBAR's eta and log tau

Logits = Float[Tensor, "*batch n_variables n_classes"]
Function = Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """What an estimator returns."""

    loss: Tensor
    """``(*batch,)``. Equal to ``value``, and with two gradients.

    For the logits the estimator's, for parameters inside ``f`` that of ``f`` at the samples. The
    latter is unbiased for all but :class:`GumbelSoftmax`, which trains ``f`` off the vertices.
    """
    value: Tensor
    """``(*batch,)``, an estimate of the mean of ``f``, without gradient.

    Unbiased again for all but :class:`GumbelSoftmax`.
    """
    sample: Tensor
    """``(S, *batch, N, K)``, without gradient."""


# --- by the score of the samples ------------------------------------------------------------------


class _ScoreFunction:
    """What needs numbers from ``f`` only."""

    unbiased = True
    n_evaluations: int | None = 1
    needs_f_gradient = False
    discrete_forward = True


class Exact(_ScoreFunction):
    r"""Sum over all states: the gradient that the others estimate.

    .. math:: \nabla_\theta \sum_D p_\theta(D) f(D)

    ``sample`` is all :math:`K^N` states, ``n_evaluations`` None.

    Raises:
        ValueError: for more than 65,536 states.

    Source:
        Article 6705, "discrete".

    Example:
        >>> Exact()(torch.tensor([[0.75, 0.25]]).log(), lambda y: y[..., 0, 1]).value
        tensor(0.2500)
    """

    n_evaluations = None

    def __call__(
        self, logits: Logits, f: Function, *, generator: torch.Generator | None = None
    ) -> Estimate:
        """Return the exact mean as an :class:`Estimate`; ``generator`` is not used."""
        _require_logits(logits)
        n_variables, n_classes = logits.shape[-2:]
        if n_classes**n_variables > MOST_STATES:
            raise ValueError(
                f"`logits` {tuple(logits.shape)} have {n_classes}^{n_variables} states; at most "
                f"{MOST_STATES} are enumerated."
            )
        classes = torch.arange(n_classes, device=logits.device).expand(n_variables, -1)
        index = torch.cartesian_prod(*classes).view(-1, *[1] * (logits.ndim - 2), n_variables)
        index = index.expand(-1, *logits.shape[:-1])
        sample = one_hot(index, logits)
        values = _evaluate(f, sample)
        return _estimate((_log_prob(logits, index).exp() * values).sum(0), sample)


class Reinforce(_ScoreFunction):
    r"""Score function, with or without a baseline that does not see the sample.

    .. math:: (f(D) - b)\, \nabla_\theta \log p_\theta(D)

    Args:
        baseline: None is none. "ema" is a running mean of the values of earlier calls; one number,
            0 in the first call. A function gets the logits without their gradient and returns
            ``(*batch,)``; no gradient goes back to it, so if it has parameters, train them beside,
            towards ``Estimate.value``.

    Raises:
        ValueError: for another string, or a baseline of another shape.

    Source:
        Williams 1992; article 6705, which tells it as the story behind.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> loss, value, sample = Reinforce()(logits, lambda y: y[..., 0].sum(-1))
        >>> loss.backward()
        >>> bool(loss == value), sample.shape
        (True, torch.Size([1, 2, 3]))
    """

    def __init__(self, baseline: str | Callable[[Tensor], Tensor] | None = None) -> None:
        if not (baseline is None or baseline == "ema" or callable(baseline)):
            raise ValueError(f"`baseline` must be None, 'ema' or a function; got {baseline!r}.")
        self.baseline = baseline
        self._mean: Tensor | float = 0.0
        self._calls = 0

    def __call__(
        self, logits: Logits, f: Function, *, generator: torch.Generator | None = None
    ) -> Estimate:
        """Draw one sample and return an :class:`Estimate`."""
        _require_logits(logits)
        sample, log_prob = _draw(logits, 1, generator)
        values = _evaluate(f, sample)
        baseline = self._baseline(logits.detach(), values.detach())
        return _estimate(score_function_surrogate(values, log_prob, baseline).mean(0), sample)

    def _baseline(self, logits: Tensor, values: Tensor) -> Tensor | float:
        if self.baseline is None:
            return 0.0
        if self.baseline == "ema":
            before = self._mean
            if values.numel():
                share = 1 - EMA_DECAY if self._calls else 1.0
                self._mean = before + share * (values.mean() - before)
                self._calls += 1
            return before
        baseline = self.baseline(logits)
        wanted = tuple(logits.shape[:-2])
        if not isinstance(baseline, Tensor) or baseline.shape != wanted:
            got = tuple(baseline.shape) if isinstance(baseline, Tensor) else type(baseline)
            raise ValueError(
                f"`baseline` must return a tensor with one number per element of the batch, "
                f"{wanted}; it returned {got}."
            )
        return baseline


class RLOO(_ScoreFunction):
    r"""Score function whose baseline is the mean of the other samples: leave one out.

    .. math:: \frac1n \sum_i \Bigl(f(D_i) - \frac1{n-1} \sum_{j \ne i} f(D_j)\Bigr)
        \nabla_\theta \log p_\theta(D_i)

    Args:
        n: samples, at least 2.

    Raises:
        ValueError: for fewer than 2.

    Source:
        Salimans & Knowles 2014; Kool, van Hoof & Welling 2019.

    Example:
        >>> RLOO(4)(torch.zeros(2, 3), lambda y: y[..., 0].sum(-1)).sample.shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, n: int = 2) -> None:
        _require_at_least("n", n, 2)
        self.n_evaluations = n

    def __call__(
        self, logits: Logits, f: Function, *, generator: torch.Generator | None = None
    ) -> Estimate:
        """Draw ``n`` samples and return an :class:`Estimate`."""
        _require_logits(logits)
        n = self.n_evaluations
        sample, log_prob = _draw(logits, n, generator)
        values = _evaluate(f, sample)
        of_the_others = (values.sum(0) - values) / (n - 1)
        return _estimate(score_function_surrogate(values, log_prob, of_the_others).mean(0), sample)


class DisARM(_ScoreFunction):
    r"""Antithetic pair for binary variables, of which those that differ count.

    .. math:: \hat g_i = \tfrac12 \bigl(f(b) - f(\tilde b)\bigr)\, (b_i - \tilde b_i)\,
        \sigma(|\alpha_i|), \qquad b_i = [\alpha_i + L_i > 0], \quad
        \tilde b_i = [\alpha_i - L_i > 0]

    with logistic noise :math:`L`. The signature is that of the others: ``logits`` are
    ``(*batch, N, 2)``, :math:`\alpha` is the second minus the first, and ``f`` sees one-hot pairs.
    For Bernoulli logits ``a`` write ``torch.stack([torch.zeros_like(a), a], -1)``.

    Raises:
        ValueError: for a number of classes other than 2.

    Source:
        Dong, Mnih & Tucker 2020; the same estimator is U2G of Yin et al. 2020.

    Example:
        >>> DisARM()(torch.zeros(5, 2), lambda y: y[..., 1].sum(-1)).value  # b and 1 - b
        tensor(2.5000)
    """

    n_evaluations = 2

    def __call__(
        self, logits: Logits, f: Function, *, generator: torch.Generator | None = None
    ) -> Estimate:
        """Draw a pair of samples and return an :class:`Estimate`."""
        _require_logits(logits)
        if logits.shape[-1] != 2:
            raise ValueError(
                f"`DisARM` is for binary variables, `logits` (*batch, N, 2); got "
                f"{tuple(logits.shape)}."
            )
        rows = logits.to(wide_dtype(logits.dtype))
        noise = _noise_like(rows, generator)
        # Exchanging the two changes the sign of their difference, the logistic noise.
        index = torch.stack([rows + noise, rows + noise.flip(-1)]).argmax(-1)
        sample = one_hot(index, logits)
        values = _evaluate(f, sample)
        alpha = rows[..., 1] - rows[..., 0]
        b, antithetic = index
        weight = (b - antithetic) * alpha.abs().sigmoid() / 2
        difference = (values[0] - values[1]).unsqueeze(-1)
        # Beside an impossible class it is infinite, with a weight of zero.
        alpha = alpha.masked_fill(alpha.isinf(), 0.0)
        no_value = (difference * weight).detach() * (alpha - alpha.detach())
        return _estimate(values.mean(0) + no_value.sum(-1), sample)


# --- through the sample ---------------------------------------------------------------------------


class _ThroughTheSample:
    """One evaluation of a sample whose gradient :func:`gumbel_softmax` makes."""

    unbiased = False
    n_evaluations = 1
    needs_f_gradient = True
    discrete_forward = True
    _estimator: str

    def _options(self) -> dict[str, Any]:
        return {}

    def __call__(
        self, logits: Logits, f: Function, *, generator: torch.Generator | None = None
    ) -> Estimate:
        """Draw one sample and return an :class:`Estimate`."""
        _require_logits(logits)
        sample = gumbel_softmax(
            logits.unsqueeze(0),
            estimator=self._estimator,
            generator=generator,
            validate_args=False,
            **self._options(),
        )
        values = _evaluate(f, sample, needed_by=self)
        return _estimate(values.mean(0), sample)


class StraightThrough(_ThroughTheSample):
    r"""Go forward with the sample and back through the softmax.

    .. math:: \Bigl(\frac{\partial\, \mathrm{softmax}(o)}{\partial o}\Bigr)^{\!\top} f'(D)

    Biased, unless ``f`` is linear.

    Source:
        Bengio, Léonard & Courville 2013.

    Example:
        >>> StraightThrough()(torch.zeros(2, 3), lambda y: y.sum((-1, -2))).value
        tensor(2.)
    """

    _estimator = "st"


class ZGR(_ThroughTheSample):
    r"""Trapezoid rule between the sample and every other vertex; also called ReinMax.

    .. math:: \hat g_i = \tfrac12 [\pi_i v_i + D_i v_D - D_i\, \pi^\top v - \pi_i v_D],
        \quad v = f'(D)

    Exact in the mean if ``f`` is quadratic; no temperature.

    Source:
        Shekhovtsov 2023; Liu et al. 2023.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> ZGR()(logits, lambda y: y[..., 0].sum(-1) ** 2).loss.backward()
        >>> logits.grad.sum(-1).abs().max() < 1e-6
        tensor(True)
    """

    _estimator = "zgr"


class _WithTemperature(_ThroughTheSample):
    def __init__(self, tau: float | int = 1.0) -> None:
        require_temperature(tau, torch.empty(()), zero=False)
        self.tau = tau

    def _options(self) -> dict[str, Any]:
        return {"tau": self.tau}


class STGumbelSoftmax(_WithTemperature):
    r"""Go forward with the sample and back through the relaxed one whose largest entry it is.

    .. math:: \Bigl(\frac{\partial \tilde y}{\partial o}\Bigr)^{\!\top} f'(D), \qquad
        \tilde y = \mathrm{softmax}\bigl((o + G) / \tau\bigr), \quad D = \arg\max \tilde y

    Biased; as :math:`\tau \to 0` its mean tends to that of :class:`ZGR`, not to the exact gradient,
    and its variance grows like :math:`1/\tau`.

    Args:
        tau: positive; may be assigned between calls.

    Raises:
        ValueError: if ``tau`` is not positive.

    Source:
        Jang, Gu & Poole 2017.

    Example:
        >>> STGumbelSoftmax(0.5)(torch.zeros(2, 3), lambda y: y.sum((-1, -2))).value
        tensor(2.)
    """

    _estimator = "straight_through"


class GumbelSoftmax(_WithTemperature):
    r"""Let ``f`` see the relaxed sample.

    .. math:: \nabla_\theta f(\tilde y), \qquad
        \tilde y = \mathrm{softmax}\bigl((o + G) / \tau\bigr)

    Biased, in ``value`` and in the gradient for parameters inside ``f`` too: ``f`` is evaluated off
    the vertices. The bias goes to zero with :math:`\tau`, the variance grows like :math:`1/\tau`.

    Args:
        tau: positive; may be assigned between calls.

    Raises:
        ValueError: if ``tau`` is not positive.

    Source:
        Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017; article 6705.

    Example:
        >>> sample = GumbelSoftmax(2.0)(torch.zeros(2, 3), lambda y: y[..., 0].sum(-1)).sample
        >>> bool((sample > 0).all())
        True
    """

    discrete_forward = False
    _estimator = "plain"


class GumbelRao(_WithTemperature):
    r"""Average the straight-through gradients of all relaxed samples with the same largest entry.

    .. math:: \frac1n \sum_{k \le n}
        \Bigl(\frac{\partial \tilde y_k}{\partial o}\Bigr)^{\!\top} f'(D), \qquad
        \tilde y_k \sim p(\tilde y \mid \arg\max \tilde y = D)

    The mean of :class:`STGumbelSoftmax` with no more variance, for one evaluation of ``f``.

    Args:
        tau: positive; may be assigned between calls.
        n: relaxed samples, at least 1.

    Raises:
        ValueError: if ``tau`` is not positive or ``n`` below 1.

    Source:
        Paulus, Maddison & Krause 2021.

    Example:
        >>> GumbelRao(0.5, 100)(torch.zeros(2, 3), lambda y: y.sum((-1, -2))).value
        tensor(2.)
    """

    _estimator = "rao_blackwell"

    def __init__(self, tau: float | int = 1.0, n: int = 10) -> None:
        super().__init__(tau)
        _require_at_least("n", n, 1)
        self.n = n

    def _options(self) -> dict[str, Any]:
        return {"tau": self.tau, "n_rb": self.n}


# --- both -----------------------------------------------------------------------------------------


class Rebar:
    r"""Score function with the relaxation as a control variate.

    .. math:: \bigl(f(D) - \eta f(\tilde y_D)\bigr)\, \nabla_\theta \log p_\theta(D)
        + \eta\, \nabla_\theta f(\tilde y) - \eta\, \nabla_\theta f(\tilde y_D)

    with :math:`D = \arg\max \tilde y`, and :math:`\tilde y_D` another relaxed sample drawn given
    :math:`D`. What comes with :math:`\eta` has mean zero, for the logits and for parameters inside
    ``f``, so that any :math:`\eta` and :math:`\tau` are unbiased. It is part of ``value`` too.

    Args:
        tau: positive temperature of the relaxation.
        eta: share of the control variate.
        learn: after each call that needs a gradient, step down that of the squared length of the
            estimate for both, which lowers the variance, as the mean depends on neither. It takes a
            second derivative of ``f``, and two to three times as long.

    Raises:
        ValueError: if ``tau`` is not positive.

    Source:
        Tucker et al. 2017.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> est = Rebar(eta=0.5)
        >>> est(logits, lambda y: y[..., 0].square().sum(-1)).loss.backward()
        >>> est.eta != 0.5, est.tau != 1
        (True, True)
    """

    unbiased = True
    n_evaluations = 3
    needs_f_gradient = True
    discrete_forward = False

    def __init__(self, tau: float | int = 1.0, eta: float | int = 1.0, learn: bool = True) -> None:
        require_temperature(tau, torch.empty(()), zero=False)
        # Without dimensions they go with logits of any device and dtype.
        self._log_tau = torch.tensor(float(tau), dtype=torch.float64).log().requires_grad_()
        self._eta = torch.tensor(float(eta), dtype=torch.float64, requires_grad=True)
        self._learner = torch.optim.Adam([self._log_tau, self._eta], LEARNING_RATE)
        self.learn = learn

    @property
    def tau(self) -> float:
        """The temperature as it is now."""
        return self._log_tau.exp().item()

    @property
    def eta(self) -> float:
        """The share of the control variate as it is now."""
        return self._eta.item()

    def __call__(
        self, logits: Logits, f: Function, *, generator: torch.Generator | None = None
    ) -> Estimate:
        """Draw one sample and two relaxed ones, and return an :class:`Estimate`."""
        _require_logits(logits)
        rows = logits.to(wide_dtype(logits.dtype))
        # Copies: the step below must not change what the loss remembers for its backward pass.
        tau, eta = self._log_tau.exp(), self._eta.clone()
        if not (self.learn and logits.requires_grad):
            tau, eta = tau.detach(), eta.detach()
        perturbed = rows + _noise_like(rows, generator)
        index = perturbed.argmax(-1)
        given = conditional_gumbel(rows, index, generator=generator, validate_args=False)
        # Of a logit of -inf the gradient for tau would be NaN.
        both = torch.cat([perturbed.unsqueeze(0), given]).clamp_min(-1e30)
        relaxed = (both / tau).softmax(-1)
        drawn = one_hot(index, rows)
        samples = torch.cat([drawn.unsqueeze(0), relaxed]).to(logits.dtype)
        at_drawn, at_free, at_given = _evaluate(f, samples, needed_by=self)
        control = eta * (at_free - at_given)
        log_prob = _log_prob(rows, index)
        loss = control + score_function_surrogate(at_drawn, log_prob, eta * at_given)
        if tau.requires_grad:
            pathwise = torch.autograd.grad(control.sum(), rows, create_graph=True)[0]
            score = drawn - rows.detach().softmax(-1)
            coefficient = (at_drawn - eta * at_given)[..., None, None]
            self._step(coefficient * score + pathwise)
        return _estimate(loss, samples[:1])

    def _step(self, gradient: Tensor) -> None:
        both = [self._log_tau, self._eta]
        downhill = torch.autograd.grad(gradient.square().sum(), both, retain_graph=True)
        for parameter, each in zip(both, downhill, strict=True):
            parameter.grad = each
        self._learner.step()


# --- what they share ------------------------------------------------------------------------------


def _draw(logits: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return n one-hot samples, and their log-probabilities with the gradient of the logits."""
    index = gumbel_max_sample(logits, (n,), generator=generator, validate_args=False)
    return one_hot(index, logits), _log_prob(logits, index)


def _log_prob(logits: Tensor, index: Tensor) -> Tensor:
    log_probs = logits.to(wide_dtype(logits.dtype)).log_softmax(-1)
    log_probs = log_probs.expand(*index.shape, -1)
    return log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1).sum(-1)


def _evaluate(f: Function, sample: Tensor, needed_by: object = None) -> Tensor:
    values = f(sample)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"`f` must return a tensor of floating numbers; it returned {got}.")
    if values.shape != sample.shape[:-2]:
        raise ValueError(
            f"`f` must return one number per sample, {tuple(sample.shape[:-2])} for samples of "
            f"shape {tuple(sample.shape)}; it returned {tuple(values.shape)}."
        )
    if needed_by is not None and sample.requires_grad and not values.requires_grad:
        raise ValueError(
            f"{type(needed_by).__name__} needs the gradient of `f` for its sample, and what `f` "
            f"returned has none; Reinforce, RLOO and DisARM do without."
        )
    return values


def _estimate(loss: Tensor, sample: Tensor) -> Estimate:
    return Estimate(loss, loss.detach(), sample.detach())


def _noise_like(rows: Tensor, generator: torch.Generator | None) -> Tensor:
    return gumbel_noise(rows.shape, dtype=rows.dtype, device=rows.device, generator=generator)


def _require_logits(logits: Tensor) -> None:
    require_floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"`logits` must be (*batch, N, K), N variables of K classes; got {tuple(logits.shape)}."
        )
    if checks_values(None, logits):
        require_distributions("logits", logits)
        if (logits == math.inf).any():
            raise ValueError("`logits` has a +inf: its class is certain, and has no gradient.")


def _require_at_least(name: str, number: int, least: int) -> None:
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}; got {number}.")
