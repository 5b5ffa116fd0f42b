r"""Which past weights an average holds, and how much of each: one recursion for all of them.

.. math:: \Theta \leftarrow \Theta + (1 - \beta)(\theta_t - \Theta)

A profile says what :math:`\beta` is for an update at step :math:`t` after one at step :math:`s`.
Steps are those of the optimiser, counted from where averaging starts, so that the average does not
depend on how often it is updated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64


class Profile:
    """What all profiles share; a new one defines ``decay(prev_step, step)``."""

    def decay(self, prev_step: int, step: int) -> float:
        r"""Return :math:`\beta` of an update at ``step``, the one before being at ``prev_step``.

        Both count from where averaging starts; ``prev_step`` is 0 for the first update. A result
        of 0 makes the average a copy of the weights, 1 leaves it as it is.
        """
        raise NotImplementedError

    def weights(
        self, n: int, *, update_every: int = 1, bias_correction: bool = True
    ) -> Float64[np.ndarray, "steps"]:
        r"""Return what the weights of each step are worth after step ``n``: :math:`w_{n,k}`.

        Args:
            n: steps done, at least 0.
            update_every: steps from one update to the next.
            bias_correction: as in :class:`ExponentialMovingAverage`.

        Returns:
            ``n + 1`` numbers; the first belongs to the weights before training. They sum to 1.

        Example:
            >>> Uniform().weights(4)
            array([0.  , 0.25, 0.25, 0.25, 0.25])
            >>> ConstantDecay(0.5).weights(3, bias_correction=False)
            array([0.125, 0.125, 0.25 , 0.5  ])
        """
        if n < 0 or update_every < 1:
            raise ValueError(
                f"`n` must be at least 0 and `update_every` 1; got {n}, {update_every}."
            )
        return weights_of(self, range(update_every, n + 1, update_every), n, bias_correction)


@dataclass(frozen=True)
class ConstantDecay(Profile):
    r"""The exponential moving average, :math:`\beta = \alpha^{t-s}`: ``alpha`` per optimiser step.

    Its horizon is :math:`1/(1-\alpha)` steps.

    Args:
        alpha: the decay, from 0 (a copy of the last weights) to less than 1.

    Example:
        >>> ConstantDecay(0.9).decay(prev_step=10, step=12)
        0.81
    """

    alpha: float | int

    def __post_init__(self) -> None:
        _require_decay("alpha", self.alpha)

    def decay(self, prev_step: int, step: int) -> float:
        return self.alpha ** (step - prev_step)


@dataclass(frozen=True)
class HalfLife(Profile):
    """A constant decay that halves what the average holds in this many optimiser steps.

    Args:
        steps: more than 0.

    Example:
        >>> HalfLife(10).decay(prev_step=0, step=20)
        0.25
    """

    steps: float | int

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, int | float) and 0 < self.steps < math.inf):
            raise ValueError(f"`steps` of a half-life must be more than 0; got {self.steps!r}.")

    def decay(self, prev_step: int, step: int) -> float:
        return 0.5 ** ((step - prev_step) / self.steps)


@dataclass(frozen=True)
class TensorFlowWarmup(Profile):
    r"""TensorFlow's warm-up: per step :math:`\min(\alpha, (1+t)/(10+t))`.

    Args:
        alpha: the decay that it ends at.

    Example:
        >>> TensorFlowWarmup(0.99).decay(prev_step=0, step=1)  # 2/11
        0.18181818181818182
    """

    alpha: float | int

    def __post_init__(self) -> None:
        _require_decay("alpha", self.alpha)

    def decay(self, prev_step: int, step: int) -> float:
        steps = np.arange(prev_step + 1, step + 1)
        return float(np.prod(np.minimum(self.alpha, (1 + steps) / (10 + steps))))


@dataclass(frozen=True)
class InverseGammaWarmup(Profile):
    r"""Katherine Crowson's warm-up: per step :math:`1-(1+t/\gamma)^{-p}`, between two limits.

    It is the one of timm, diffusers and ema-pytorch.

    Args:
        alpha: the decay that it ends at.
        inv_gamma: :math:`\gamma`, in steps.
        power: :math:`p`; 2/3 reaches 0.999 after 31,600 steps, 3/4 after 10,000.
        min: the decay that it begins at.

    Example:
        >>> InverseGammaWarmup(0.9999, power=1.0).decay(prev_step=0, step=1)
        0.5
    """

    alpha: float | int
    _: KW_ONLY
    inv_gamma: float | int = 1.0
    power: float | int = 2 / 3
    min: float | int = 0.0

    def __post_init__(self) -> None:
        _require_decay("alpha", self.alpha)
        _require_decay("min", self.min)
        if not (self.inv_gamma > 0 and self.power > 0):
            raise ValueError(
                f"`inv_gamma` and `power` must be more than 0; got {self.inv_gamma}, {self.power}."
            )
        if self.min > self.alpha:
            raise ValueError(f"`min` must be at most `alpha`; got {self.min} and {self.alpha}.")

    def decay(self, prev_step: int, step: int) -> float:
        steps = np.arange(prev_step + 1, step + 1)
        rising = 1 - (1 + steps / self.inv_gamma) ** -self.power
        return float(np.prod(np.clip(rising, self.min, self.alpha)))


@dataclass(frozen=True)
class Uniform(Profile):
    r"""The plain mean of the weights, :math:`\beta_i = 1 - 1/i`: Polyak-Ruppert, SWA.

    Until its first sample the average is a copy of the weights.

    Args:
        start: the step after which it begins.
        every: steps between two samples. Give each average's samples an update: ``update_every``
            must divide ``every``.

    Example:
        >>> Uniform(start=2, every=2).weights(7)  # the mean of the weights of steps 4 and 6
        array([0. , 0. , 0. , 0. , 0.5, 0. , 0.5, 0. ])
    """

    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1 or self.start <= -self.every:
            raise ValueError(
                f"`every` must be at least 1 and `start` 0; got {self.every} and {self.start}."
            )

    @classmethod
    def tail(cls, fraction: float | int, total_steps: int) -> "Uniform":
        """Return the mean of the last ``fraction`` of a run of ``total_steps``.

        Example:
            >>> Uniform.tail(0.25, total_steps=1000)
            Uniform(start=750, every=1)
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must lie in (0, 1]; got {fraction!r}.")
        return cls(start=min(round((1 - fraction) * total_steps), total_steps - 1))

    def decay(self, prev_step: int, step: int) -> float:
        before, now = ((each - self.start) // self.every for each in (prev_step, step))
        return max(before, 0) / now if now > 0 else 0.0


@dataclass(frozen=True)
class PowerFunction(Profile):
    r"""Weights that grow like :math:`t^\gamma`: a horizon that grows with the run.

    .. math:: \beta = (s/t)^{\gamma+1}, \qquad
        \sigma_{rel} = \sqrt{\frac{\gamma+1}{(\gamma+2)^2(\gamma+3)}}

    :math:`\sigma_{rel}` is the standard deviation of the profile, in lengths of the run so far.

    Args:
        sigma_rel: relative width, in (0, 0.2887]; or
        gamma: the exponent, at least 0. Zero is the plain mean.

    Source:
        Karras et al. 2024, arXiv 2312.02696, section 3.1 and algorithm 2.

    Example:
        >>> PowerFunction(gamma=1).decay(prev_step=5, step=10)
        0.25
    """

    sigma_rel: float | int | None = None
    gamma: float | int | None = None

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ValueError("give either `sigma_rel` or `gamma`, and not both.")
        if self.gamma is None:
            object.__setattr__(self, "gamma", sigma_rel_to_gamma(self.sigma_rel))
        else:
            object.__setattr__(self, "sigma_rel", gamma_to_sigma_rel(self.gamma))

    def decay(self, prev_step: int, step: int) -> float:
        return (prev_step / step) ** (self.gamma + 1)


def sigma_rel_to_gamma(sigma_rel: float | int) -> float:
    r"""Return the exponent of a relative width: the largest real root of

    .. math:: \gamma^3 + 7\gamma^2 + (16-\sigma^{-2})\gamma + (12-\sigma^{-2}) = 0.

    Args:
        sigma_rel: in (0, :math:`1/\sqrt{12}`]: from a peak to the plain mean.

    Raises:
        ValueError: outside of that.

    Example:
        >>> round(sigma_rel_to_gamma(0.05), 4)
        16.9722
    """
    widest = 12**-0.5
    if not 0 < sigma_rel <= widest * (1 + 1e-12):
        raise ValueError(
            f"`sigma_rel` must lie in (0, {widest:.4f}]; got {sigma_rel!r}. The widest profile is "
            f"the plain mean."
        )
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def gamma_to_sigma_rel(gamma: float | int) -> float:
    r"""Return the relative width of an exponent, :math:`\gamma \ge 0`.

    Example:
        >>> round(gamma_to_sigma_rel(0) ** -2, 9)
        12.0
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"`gamma` must be at least 0 and finite; got {gamma!r}.")
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


Profiles = (
    float | int | Profile | Mapping[str, float | int | Profile] | Sequence[float | int | Profile]
)


def named_profiles(
    decay: Profiles | None, half_life: float | int | None, profile: Profiles | None
) -> dict[str, Profile]:
    given = {"decay": decay, "half_life": half_life, "profile": profile}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one of {' and '.join(f'`{name}`' for name in given)}, not both.")
    if half_life is not None:
        return {"average": HalfLife(half_life)}
    value: Any = next(iter(given.values()), 0.999)
    if isinstance(value, Mapping):
        named = {str(name): each for name, each in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str):
        named = {
            str(n if isinstance(each, Profile) else each): each for n, each in enumerate(value)
        }
        if len(named) < len(value):
            raise ValueError(f"`decay` has an average twice: {value!r}.")
    else:
        named = {"average": value}
    if not named:
        raise ValueError("`decay` must hold at least one average.")
    if bad := [name for name in named if "/" in name]:
        raise ValueError(f"the name of an average may have no '/': {bad[0]!r}.")
    return {n: p if isinstance(p, Profile) else ConstantDecay(p) for n, p in named.items()}


class Clock:
    r"""The time of one average: turns a profile into the share of each update.

    With bias correction the stored tensor is the corrected average itself,

    .. math:: 1 - \beta' = \frac{1-\beta}{1-\beta B}, \qquad B \leftarrow \beta B, \quad B_0 = 1,

    which is the same as :math:`\Theta / (1 - \prod\beta)` of a sum that begins at zero, without a
    division when it is used. Without, :math:`B = 0`.

    Attributes:
        step: steps since the start, at the last update.
        product: :math:`B`, the share of the average that is still that of the initial weights
            before the correction.
    """

    def __init__(self, profile: Profile, bias_correction: bool):
        self.profile, self.step = profile, 0
        self.product = 1.0 if bias_correction else 0.0

    def advance(self, step: int) -> float:
        r"""Return :math:`1-\beta'` of an update at ``step``, which becomes the last one."""
        beta = self.profile.decay(self.step, step)
        share = (1 - beta) / (1 - beta * self.product) if beta < 1 else 0.0
        self.step, self.product = step, self.product * beta
        return share


def weights_of(
    profile: Profile, updates: Sequence[int], n: int, bias_correction: bool
) -> Float64[np.ndarray, "steps"]:
    """Return the weight of each step from 0 to ``n`` for updates at some of these steps."""
    clock, weights = Clock(profile, bias_correction), np.zeros(n + 1)
    weights[0] = 1.0
    for step in updates:
        share = clock.advance(step)
        weights[:step] *= 1 - share
        weights[step] = share
    return weights


def _require_decay(name: str, value: float | int) -> None:
    """Refuse what is no decay; 1 would never move."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number in [0, 1); got {value!r}.")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must lie in [0, 1); got {value!r}.")
