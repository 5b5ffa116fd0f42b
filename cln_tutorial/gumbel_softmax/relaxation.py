r"""The relaxation: a softmax in the place of the argmax, and five ways to go back through it.

.. math:: \tilde y = \mathrm{softmax}\bigl((o + G) / \tau\bigr)

Source: Su Jianlin, article 6705 (https://kexue.fm/archives/6705), 2019; Jang, Gu & Poole 2017;
Maddison, Mnih & Teh 2017; Paulus, Maddison & Krause 2021; Shekhovtsov 2023; Liu et al. 2023.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from cln_tutorial.gumbel_softmax._checks import (
    checks_values,
    require_axis,
    require_distributions,
    require_temperature,
    wide_dtype,
)
from cln_tutorial.gumbel_softmax.sampling import conditional_gumbel, gumbel_noise

ESTIMATORS = ("plain", "straight_through", "st", "rao_blackwell", "zgr", "reinmax")


def gumbel_softmax(
    logits: Shaped[Tensor, "..."],
    tau: float | int | Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    generator: torch.Generator | None = None,
    estimator: str | None = None,
    n_rb: int = 10,
    validate_args: bool | None = None,
) -> Float[Tensor, "..."]:
    r"""Draw a relaxed or one-hot sample that carries a gradient; as ``F.gumbel_softmax``, and more.

    Args:
        logits: log-probabilities up to a constant per row, any floating dtype.
        tau: positive temperature of the relaxation; a tensor broadcasts to the rows. It divides
            logits and noise, so that it does not change which class is the largest.
        hard: return one-hot vectors.
        eps: accepted for the sake of the signature, and without effect, as in PyTorch.
        dim: the axis of the classes.
        generator: of the noise.
        estimator: where the gradient of the sample :math:`D` comes from.

            - "plain" (default): the relaxed sample itself; not with ``hard``.
            - "straight_through" (default if ``hard``): the relaxed sample :math:`\tilde y` whose
              largest entry :math:`D` is.
            - "st": :math:`\pi = \mathrm{softmax}(o)`, without noise or temperature.
            - "rao_blackwell": the mean of ``n_rb`` relaxed samples whose largest entry is that of
              :math:`D`: the mean of "straight_through", with less variance.
            - "zgr", also called "reinmax": the trapezoid rule between :math:`D` and every other
              vertex, exact for a quadratic function; without a temperature.
        n_rb: relaxed samples of "rao_blackwell".
        validate_args: look at the values of ``logits``; None does on a CPU only.

    Returns:
        Shape and dtype of ``logits``. With an estimator other than "plain" each vector is one-hot
        to the last bit.

    Raises:
        TypeError: if ``logits`` are not floating.
        ValueError: for an unknown estimator, ``hard`` with "plain", a temperature that is not
            positive, ``n_rb`` below one, logits that are no distribution or hold :math:`+\infty`.

    Source:
        Article 6705, "Gumbel softmax"; Jang, Gu & Poole 2017, section 2.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> y = gumbel_softmax(logits, hard=True, generator=torch.Generator().manual_seed(1))
        >>> y.sum(-1)
        tensor([1., 1.], grad_fn=<SumBackward1>)
    """
    dim = require_axis("logits", logits, dim)
    estimator = ("straight_through" if hard else "plain") if estimator is None else estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {ESTIMATORS}; got {estimator!r}.")
    if hard and estimator == "plain":
        raise ValueError("`estimator` 'plain' is the relaxed sample; `hard` needs another one.")
    if n_rb < 1:
        raise ValueError(f"`n_rb` must be at least 1; got {n_rb}.")
    if eps != 1e-10:
        warnings.warn("`eps` has no effect.", stacklevel=2)
    rows = logits.movedim(dim, -1)
    require_temperature(tau, rows[..., 0], zero=False)
    rows = rows.to(wide_dtype(logits.dtype))
    if checks_values(validate_args, rows):
        require_distributions("logits", rows, certain=False)
    tau = tau.to(rows.dtype).unsqueeze(-1) if isinstance(tau, Tensor) else float(tau)
    sample = _SAMPLES[estimator](rows, tau, generator, n_rb)
    return sample.movedim(-1, dim).to(logits.dtype)


def _plain(logits: Tensor, tau: Tensor | float, generator: Any, n: int) -> Tensor:
    return _relax(_perturb(logits, generator), tau)


def _straight_through(logits: Tensor, tau: Tensor | float, generator: Any, n: int) -> Tensor:
    perturbed = _perturb(logits, generator)
    return _replace(_relax(perturbed, tau), one_hot(perturbed.argmax(-1), perturbed))


def _st(logits: Tensor, tau: Tensor | float, generator: Any, n: int) -> Tensor:
    drawn = one_hot(_perturb(logits.detach(), generator).argmax(-1), logits)
    return _replace(logits.softmax(-1), drawn)


def _rao_blackwell(logits: Tensor, tau: Tensor | float, generator: Any, n: int) -> Tensor:
    index = _perturb(logits.detach(), generator).argmax(-1)
    return _replace(relaxed_given_argmax(logits, index, tau, n, generator), one_hot(index, logits))


def _zgr(logits: Tensor, tau: Tensor | float, generator: Any, n: int) -> Tensor:
    drawn = one_hot(_perturb(logits.detach(), generator).argmax(-1), logits)
    return _Trapezoid.apply(logits, drawn)


_SAMPLES = {
    "plain": _plain,
    "straight_through": _straight_through,
    "st": _st,
    "rao_blackwell": _rao_blackwell,
    "zgr": _zgr,
    "reinmax": _zgr,
}


def relaxed_given_argmax(
    logits: Tensor,
    index: Tensor,
    tau: Tensor | float | int,
    n: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the mean of relaxed samples whose largest entry is given (Paulus et al. 2021).

    The perturbed logits given the argmax depend on the logits in two ways. Straight-through sees
    one of them, that they are a sum with the noise; through the other, the conditioning, it must
    not be differentiated, or it would be another estimator, with three times the bias.
    """
    perturbed = conditional_gumbel(
        logits.detach(), index, n, generator=generator, validate_args=False
    )
    # Of a class of -inf the noise is NaN; its gradient is zero.
    noise = torch.nan_to_num(perturbed - logits.detach(), nan=0.0)
    return _relax(logits + noise, tau).mean(0)


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    """Return the vertices, in the dtype of ``like`` and with its number of classes."""
    classes = torch.arange(like.shape[-1], device=like.device)
    return (classes == index.unsqueeze(-1)).to(like.dtype)


def _perturb(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    return logits + gumbel_noise(
        logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
    )


def _relax(perturbed: Tensor, tau: Tensor | float | int) -> Tensor:
    # Shifted before the division, or a small temperature would overflow; softmax undoes the shift.
    top = perturbed.detach().amax(-1, keepdim=True)
    return ((perturbed - top.masked_fill(top.isinf(), 0)) / tau).softmax(-1)


def _replace(soft: Tensor, value: Tensor) -> Tensor:
    """Return the value with the gradient of ``soft``, exactly: (1 - s) + s and (0 - s) + s are."""
    return (value - soft.detach()) + soft


class _Trapezoid(torch.autograd.Function):
    r"""ReinMax, which is ZGR, without temperature or logarithm.

    .. math:: \hat g_i = \tfrac12 [\pi_i v_i + D_i v_D - D_i\, \pi^\top v - \pi_i v_D],
        \quad v = f'(D)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, drawn: Tensor) -> Tensor:
        return drawn.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        logits, drawn = inputs
        ctx.save_for_backward(logits.softmax(-1), drawn)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        pi, drawn = ctx.saved_tensors
        at_drawn = (drawn * v).sum(-1, keepdim=True)
        mean = (pi * v).sum(-1, keepdim=True)
        return 0.5 * (pi * v + drawn * at_drawn - drawn * mean - pi * at_drawn), None


class ConcreteCategorical(Distribution):
    r"""The distribution of a relaxed sample, with a log-density that is finite where it is drawn.

    .. math:: p(y) = \Gamma(K)\, \tau^{K-1} \prod_k \alpha_k y_k^{-\tau-1}
        \Big/ \Bigl(\sum_k \alpha_k y_k^{-\tau}\Bigr)^{K}, \qquad \alpha_k = e^{o_k}

    At a low temperature most entries of a sample are smaller than any floating number. Their
    logarithms are not: ``log_prob`` of the last sample uses those, and ``log_prob_from_log`` takes
    them from :meth:`rsample_log`.

    Args:
        temperature: positive; a number, of the shape of the batch, or that with a last axis of 1.
        probs, logits: exactly one of them, ``(*batch, K)``. ``probs`` are normalised.
        validate_args: as in ``torch.distributions``.

    Raises:
        TypeError: if parameters are not floating.
        ValueError: for none or both of ``probs`` and ``logits``; a temperature of another shape, or
            not positive; in ``log_prob``, for a value outside of the open simplex.

    Source:
        Maddison, Mnih & Teh 2017, equation 10 and appendix C.

    Example:
        >>> coin = ConcreteCategorical(temperature=0.05, logits=torch.zeros(1000))
        >>> y = coin.rsample()
        >>> bool((y == 0).any()), bool(coin.log_prob(y).isfinite())
        (True, True)
    """

    arg_constraints = {  # noqa: RUF012, the form that torch.distributions asks for
        "temperature": constraints.positive,
        "probs": constraints.simplex,
        "logits": constraints.real_vector,
    }
    support = constraints.simplex
    has_rsample = True

    def __init__(
        self,
        temperature: Tensor | float | int,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("Exactly one of `probs` and `logits` must be given.")
        given = "logits" if probs is None else "probs"
        values = logits if probs is None else probs
        require_axis(given, values, -1)
        batch = values.shape[:-1]
        if isinstance(temperature, Tensor) and temperature.ndim == len(batch) + 1:
            if temperature.shape[-1] != 1:
                raise ValueError(
                    f"`temperature` must be one per distribution, {tuple(batch)}; "
                    f"got {tuple(temperature.shape)}."
                )
            temperature = temperature.squeeze(-1)
        temperature = torch.as_tensor(temperature, dtype=values.dtype, device=values.device)
        require_temperature(temperature, values[..., 0], zero=False)
        if probs is None:
            self.logits = logits - logits.logsumexp(-1, keepdim=True)
        else:
            self.probs = probs / probs.sum(-1, keepdim=True)
        self.temperature, self._last = temperature.expand(batch), None
        super().__init__(batch, values.shape[-1:], validate_args=validate_args)

    @lazy_property
    def logits(self) -> Tensor:
        return self.probs.log()

    @lazy_property
    def probs(self) -> Tensor:
        return self.logits.exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ConcreteCategorical":
        """Return the distribution with a batch of that shape."""
        batch_shape = torch.Size(batch_shape)
        logits = self.logits.expand(*batch_shape, *self.event_shape)
        return ConcreteCategorical(
            self.temperature.expand(batch_shape), logits=logits, validate_args=False
        )

    def rsample(
        self, sample_shape: Any = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw relaxed samples ``(*sample_shape, *batch, K)``, with a gradient."""
        log_value = self.rsample_log(sample_shape, generator=generator)
        value = log_value.exp()
        self._last = value, log_value
        return value

    def rsample_log(
        self, sample_shape: Any = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw the logarithms of relaxed samples."""
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        return (_perturb(logits, generator) / self.temperature.unsqueeze(-1)).log_softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``value`` ``(..., K)``, of shape ``(...)``."""
        if self._last is not None and value is self._last[0]:
            return self.log_prob_from_log(self._last[1])
        if self._validate_args:
            self._validate_sample(value)
            if (value == 0).any():
                raise ValueError(
                    "`value` has entries that are 0, on the border of the simplex, where the "
                    "density is not defined. Use `rsample_log` and `log_prob_from_log`."
                )
        return self.log_prob_from_log(value.log())

    def log_prob_from_log(self, value_log: Tensor) -> Tensor:
        r"""Return the log-density of :math:`y` (not of :math:`\log y`) from its logarithm."""
        classes, tau = self.event_shape[0], self.temperature
        scores = self.logits - tau.unsqueeze(-1) * value_log
        # Of each class its score, less the sum of all: K of these fit into a float, K sums do not.
        shares = (scores.log_softmax(-1) - value_log).sum(-1)
        return math.lgamma(classes) + (classes - 1) * tau.log() + shares
