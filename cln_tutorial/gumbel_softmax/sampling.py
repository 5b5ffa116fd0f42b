r"""Exact draws of one class or several, with noise that has no floor and seldom one per class.

.. math:: \arg\max_i (o_i + G_i) \sim \mathrm{Cat}(\mathrm{softmax}(o)), \qquad
    \max_i (o_i + G_i) \sim \mathrm{Gumbel}(\mathrm{LSE}(o)), \text{ independent of it}

By the second fact the maximum over the classes of a tile is one Gumbel variable, so the race can be
run among the tiles, and then within the one that wins: noise for about :math:`2\sqrt V` of
:math:`V` classes.

Source: Su Jianlin, article 6705 (https://kexue.fm/archives/6705), 2019; Maddison, Tarlow & Minka
2014; Kool, van Hoof & Welling 2019.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from cln_tutorial._transforms import transforms_are_active
from cln_tutorial.gumbel_softmax._checks import (
    checks_values,
    require_axis,
    require_distributions,
    require_temperature,
    wide_dtype,
)
from cln_tutorial.gumbel_softmax.tiles import draw, log_sums

FEWEST_FOR_TILES = 512  # classes; below, the noise of all of them is cheaper than two races
BACKENDS = ("reference", "tiled", "triton")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_WIDTH = 4096  # classes of a tile; reasoned, not measured yet
LARGEST_PORTION = 2**20  # numbers at a time, of many draws; more leave the caches


def gumbel_noise(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw standard Gumbel noise :math:`G = -\log E`, :math:`E \sim \mathrm{Exp}(1)`.

    :math:`E` is made of 64 random bits, from the end of the uniform distribution that is nearer:
    :math:`-\log(1-u)` or :math:`-\log u` with :math:`0 < u < 1/2`, so both tails go on to
    :math:`2^{-65}` and no value is infinite. A uniform number of 24 bits would end at
    :math:`G = 16.6`, and with it all classes that need more.

    Args:
        size: shape of the result.
        dtype: any floating dtype, the default one if None. Half types are computed in float32 and
            rounded once.
        device: of the result.
        generator: of the random bits; on ``device``.

    Raises:
        TypeError: if ``dtype`` is not floating.

    Source:
        Article 6705, "Gumbel max"; the floor is known from vLLM's pull request 43150.

    Example:
        >>> noise = gumbel_noise((200_000,), generator=torch.Generator().manual_seed(0))
        >>> round(noise.mean().item(), 1)  # Euler's constant, 0.577
        0.6
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be floating; got {dtype}.")
    return _gumbel_of_bits(_bits(size, device, generator), wide_dtype(dtype)).to(dtype)


def gumbel_max_sample(
    logits: Shaped[Tensor, "..."],
    sample_shape: Sequence[int] = (),
    *,
    tau: float | int | Tensor = 1.0,
    dim: int = -1,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    return_max: bool = False,
    return_log_prob: bool = False,
    validate_args: bool | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Draw classes from :math:`\mathrm{softmax}(o / \tau)`, exactly.

    Args:
        logits: log-probabilities up to a constant per row, any floating dtype. A class of
            :math:`-\infty` is never drawn, one of :math:`+\infty` always.
        sample_shape: how many draws of each row.
        tau: temperature of the distribution, 0 or at least 1e-30; a tensor broadcasts to the rows.
            At 0 the first of the largest classes is taken. It divides the logits, before the noise.
        dim: the axis of the classes.
        generator: one for all rows: a row's draw does not depend on the logits of the others, but
            on how many there are before it.
        backend: "reference" draws one noise per class in plain PyTorch; "tiled" and "triton" race
            between tiles first. "auto" takes the fastest that runs here. All have the same
            distribution, and make other draws of it from one state of the generator.
        return_max: also return the largest perturbed logit, :math:`\max_i(o_i/\tau + G_i)`.
        return_log_prob: also return the log-probability of the class drawn.
        validate_args: look at values; None does on a CPU only. Shapes and dtypes are always
            checked.

    Returns:
        int64 of shape ``sample_shape`` + that of ``logits`` without ``dim``; then, if asked for,
        the maxima and the log-probabilities of the same shape, in float32 for half types. Neither
        carries a gradient.

    Raises:
        TypeError: if ``logits`` or ``tau`` are not floating.
        ValueError: for NaN, two :math:`+\infty` in a row, a row of :math:`-\infty`, no classes,
            a negative or tiny ``tau``, ``return_max`` at ``tau`` 0.

    Source:
        Article 6705, "Gumbel max". The race between tiles follows from the two facts above.

    Example:
        >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
        >>> generator = torch.Generator().manual_seed(0)
        >>> draws = gumbel_max_sample(logits, (100_000,), generator=generator)
        >>> draws.bincount() / 100_000
        tensor([0.5001, 0.3001, 0.1998])
    """
    dim = require_axis("logits", logits, dim)
    rows = logits.detach().movedim(dim, -1)
    require_temperature(tau, rows[..., 0], zero=not return_max)
    backend = _choose(backend, rows)
    shape = (*sample_shape, *rows.shape[:-1])
    count = math.prod(sample_shape)
    if isinstance(tau, Tensor):
        tau = tau.detach().to(wide_dtype(rows.dtype)).expand(rows.shape[:-1]).reshape(-1)
    rows = rows.reshape(-1, rows.shape[-1])
    greedy = _is_zero(tau)
    race = _RACES[backend](rows, _positive(tau))
    if checks_values(validate_args, rows):
        race.require_distributions()
    index, largest = race.run(count, generator)
    if greedy is not None:
        index = torch.where(greedy, rows.argmax(-1), index)
    found = [index]
    if return_max:
        found.append(race.shift.back(largest))
    if return_log_prob:
        log_prob = race.log_prob(index)
        found.append(log_prob if greedy is None else log_prob.masked_fill(greedy, 0.0))
    found = [each.view(shape) for each in found]
    return found[0] if len(found) == 1 else tuple(found)


def gumbel_top_k(
    logits: Shaped[Tensor, "..."],
    k: int,
    *,
    dim: int = -1,
    generator: torch.Generator | None = None,
    return_perturbed: bool = False,
    validate_args: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Draw ``k`` different classes, one after another without replacement, in one race.

    The classes of the ``k`` largest perturbed logits, in their order, are a Plackett-Luce sample.
    With the next perturbed logit :math:`\kappa`, the threshold, the mean of a function over all
    classes has an unbiased estimate:

    .. math:: \mathbb E f \approx \sum_{i \in S} \frac{p_i}{1 - \exp(-\exp(\log p_i - \kappa))} f_i

    Args:
        logits: log-probabilities up to a constant per row; for the estimate, log-probabilities.
        k: how many classes, at most that of those that are not :math:`-\infty`.
        dim: the axis of the classes.
        generator: of the noise.
        return_perturbed: also return the perturbed logits, and :math:`\kappa`.
        validate_args: look at values; None does on a CPU only.

    Returns:
        int64 like ``logits`` with ``k`` entries along ``dim``, the largest perturbed logit first;
        then, if asked for, the perturbed logits of the same shape, and :math:`\kappa`, of the shape
        of ``logits`` without ``dim`` (:math:`-\infty` if no class is left). These are in float32
        for half types, and carry the gradient of the logits.

    Raises:
        TypeError: if ``logits`` are not floating.
        ValueError: if a row has fewer than ``k`` classes that can be drawn.

    Source:
        Kool, van Hoof & Welling 2019.

    Example:
        >>> logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        >>> gumbel_top_k(logits, 4, generator=torch.Generator().manual_seed(3)).sort().values
        tensor([0, 1, 2, 3])
    """
    dim = require_axis("logits", logits, dim)
    rows = logits.movedim(dim, -1)
    rows = rows.to(wide_dtype(logits.dtype))
    classes = rows.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"`k` must be from 1 to the {classes} classes; got {k}.")
    if checks_values(validate_args, rows):
        require_distributions("logits", rows)
        possible = (rows.detach() > -math.inf).sum(-1)
        if rows.numel() and int(possible.min()) < k:
            raise ValueError(
                f"`k` {k} classes without replacement need as many with a probability; a row of "
                f"`logits` has {int(possible.min())}."
            )
    noise = gumbel_noise(rows.shape, dtype=rows.dtype, device=rows.device, generator=generator)
    perturbed, index = (rows + noise).topk(min(k + 1, classes), -1)
    found = index[..., :k].movedim(-1, dim)
    if not return_perturbed:
        return found
    kappa = perturbed[..., k] if k < classes else perturbed[..., 0].detach() * 0 - math.inf
    return found, perturbed[..., :k].movedim(-1, dim), kappa


def conditional_gumbel(
    logits: Shaped[Tensor, "..."],
    index: Tensor,
    n: int = 1,
    *,
    dim: int = -1,
    generator: torch.Generator | None = None,
    validate_args: bool | None = None,
) -> Tensor:
    r"""Draw perturbed logits given which class is the largest.

    .. math:: \max = \mathrm{LSE}(o) + G, \qquad
        \tilde o_i = -\log\bigl(e^{-\max} + e^{-(o_i + G_i)}\bigr) \text{ for the others}

    all as logarithms of sums, so that no logit is too large. Differentiable in the logits, through
    the conditioning too, as REBAR needs it.

    Args:
        logits: log-probabilities up to a constant per row.
        index: int64, of the shape of ``logits`` without ``dim``: the class that shall be largest.
        n: how many draws.
        dim: the axis of the classes.
        generator: of the noise.
        validate_args: look at values; None does on a CPU only.

    Returns:
        ``(n, *logits.shape)``, in float32 for half types.

    Raises:
        TypeError: if ``logits`` are not floating or ``index`` is not int64.
        ValueError: if ``index`` has another shape, or names classes that are not there or have no
            probability.

    Source:
        Maddison, Tarlow & Minka 2014; Paulus, Maddison & Krause 2021, without its overflow.

    Example:
        >>> conditional_gumbel(torch.zeros(5, 3), torch.ones(5, dtype=torch.int64)).argmax(-1)
        tensor([[1, 1, 1, 1, 1]])
    """
    dim = require_axis("logits", logits, dim)
    rows = logits.movedim(dim, -1).to(wide_dtype(logits.dtype))
    if index.dtype != torch.int64:
        raise TypeError(f"`index` must be int64; got {index.dtype}.")
    if index.shape != rows.shape[:-1]:
        raise ValueError(f"`index` must be {tuple(rows.shape[:-1])}; got {tuple(index.shape)}.")
    if checks_values(validate_args, rows) and rows.numel():
        require_distributions("logits", rows)
        if not 0 <= int(index.min()) <= int(index.max()) < rows.shape[-1]:
            raise ValueError(f"`index` must be from 0 to {rows.shape[-1] - 1}.")
        if (rows.detach().gather(-1, index.unsqueeze(-1)) == -math.inf).any():
            raise ValueError("`index` names a class whose logit is -inf.")
    options = {"dtype": rows.dtype, "device": rows.device, "generator": generator}
    top = rows.logsumexp(-1) + gumbel_noise((n, *rows.shape[:-1]), **options)
    top = top.unsqueeze(-1)
    # The gradient at -inf would be NaN.
    impossible = rows == -math.inf
    others = rows.masked_fill(impossible, 0) + gumbel_noise((n, *rows.shape), **options)
    below = -torch.logaddexp(-top, -others)
    below = below.masked_fill(impossible, -math.inf)
    drawn = torch.arange(rows.shape[-1], device=rows.device) == index.unsqueeze(-1)
    return torch.where(drawn, top, below).movedim(-1, dim)


def available_backends() -> tuple[str, ...]:
    """Names of the backends of :func:`gumbel_max_sample` that run here.

    Example:
        >>> "tiled" in available_backends()
        True
    """
    return tuple(name for name in BACKENDS if name != "triton" or _missing_triton() is None)


# --- the races ------------------------------------------------------------------------------------
# Each gets the rows as a matrix, and the temperature as a number or one per row. Logits are shifted
# by the largest of the row before anything is done with them: at 10,000 the spacing of float32 is a
# thousandth, and noise would be rounded to it.


class _OneNoisePerClass:
    def __init__(self, rows: Tensor, tau: Tensor | float) -> None:
        self.rows = rows.to(wide_dtype(rows.dtype))
        self.shift = _Shift(self.rows.amax(-1), tau)
        self.scores = self.shift(self.rows)

    def require_distributions(self) -> None:
        require_distributions("logits", self.rows)

    def run(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the index of each draw of each row, and the largest of its shifted logits."""
        found = []
        for n in _portions(count, self.scores.numel()):
            noise = _noise((n, *self.scores.shape), self.scores, generator)
            largest, index = (self.scores + noise).max(-1)
            found.append((index, largest))
        return _joined(found)

    def log_prob(self, index: Tensor) -> Tensor:
        logits = self.rows.gather(-1, index.T).to(self.scores.dtype)
        log_prob = self.shift(logits) - self.scores.logsumexp(-1, keepdim=True)
        return log_prob.T.masked_fill(self.shift.certain, 0.0)


class _Tiles(_OneNoisePerClass):
    """The race among tiles, each of which runs at its log-sum-exp, and then within the winner."""

    def __init__(self, rows: Tensor, tau: Tensor | float) -> None:
        self.rows = rows
        self.width = self._width(rows.shape[-1])
        self.sums = log_sums(rows, tau, self.width)
        tops, rests = self.sums
        self.shift = _Shift(tops.amax(-1), tau)
        self.scores = self.shift(tops) + rests

    def _width(self, classes: int) -> int:
        return 2 ** math.ceil(math.log2(classes) / 2)  # as many numbers in each race

    def require_distributions(self) -> None:
        # Whatever is wrong in a row shows here; finding out what it is may then take its time.
        if not math.isfinite(self.scores.amax(-1).sum()):
            super().require_distributions()

    def run(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        scores, classes, width = self.scores, self.rows.shape[-1], self.width
        inside = torch.arange(width, device=scores.device)
        parts = scores.shape[-1], width
        found = []
        for n in _portions(count, len(scores) * sum(parts)):
            # One call for both races: of few rows the calls cost more than the numbers.
            noise = _noise((n, len(scores), sum(parts)), scores, generator)
            of_tiles, of_classes = noise.split(parts, -1)
            largest, tile = (scores + of_tiles).max(-1)
            start = tile * width
            of_tile = start.unsqueeze(-1) + inside
            rows = self.rows.expand(n, -1, -1)
            logits = rows.gather(-1, of_tile.clamp_max(classes - 1)).to(scores.dtype)
            logits = self.shift(logits)
            if classes % width:
                logits = logits.masked_fill(of_tile >= classes, -math.inf)
            found.append((start + (logits + of_classes).argmax(-1), largest))
        return _joined(found)


class _TilesOfGpu(_Tiles):
    """The same in one kernel, after the one of the sums; the noise comes from a seed."""

    def _width(self, classes: int) -> int:
        return GPU_WIDTH

    def run(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if self.rows.numel() == 0:
            return super().run(count, generator)
        seed = _bits((1,), self.rows.device, generator)
        tau = self.shift.tau
        each = (tau, 1.0) if isinstance(tau, Tensor) else (None, tau)
        return draw(self.rows, *self.sums, *each, self.width, count, seed)


_RACES = {"reference": _OneNoisePerClass, "tiled": _Tiles, "triton": _TilesOfGpu}


class _Shift:
    """Subtract the largest logit of each row, and divide by the temperature."""

    def __init__(self, top: Tensor, tau: Tensor | float) -> None:
        self.certain = top == math.inf
        # At -inf too, of a row that is no distribution: NaN would hide what is wrong with it.
        self.top, self.tau = top.nan_to_num(math.nan, 0.0, 0.0), tau

    def __call__(self, logits: Tensor) -> Tensor:
        shifted = logits - self.top.unsqueeze(-1)
        if isinstance(self.tau, Tensor):
            return shifted / self.tau.unsqueeze(-1)
        return shifted if self.tau == 1 else shifted / self.tau

    def back(self, largest: Tensor) -> Tensor:
        return largest + self.top / self.tau


def _joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))


def _portions(count: int, numbers: int) -> Iterator[int]:
    """How many draws at a time, so that there are never too many numbers in memory."""
    most = max(1, LARGEST_PORTION // max(numbers, 1))
    while count > most:
        yield most
        count -= most
    yield count


def _noise(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return gumbel_noise(shape, dtype=like.dtype, device=like.device, generator=generator)


def _bits(
    size: Sequence[int], device: torch.device | str | None, generator: torch.Generator | None
) -> Tensor:
    # All numbers of 64 bits but the largest, which `randint` cannot name.
    return torch.randint(-(2**63), 2**63 - 1, tuple(size), device=device, generator=generator)


def _gumbel_of_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    # A sign, and 63 bits of the distance to the nearer end of the uniform distribution. As it
    # becomes a floating number it keeps all its leading digits, however small it is.
    distance = (bits & 2**63 - 1).to(dtype).add_(0.5).mul_(2.0**-64)
    far = distance.log()
    return torch.where(bits < 0, far, distance.neg_().log1p_()).neg_().log_().neg_()


# --- the choice -----------------------------------------------------------------------------------


def _choose(backend: str, rows: Tensor) -> str:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"`backend` must be 'auto' or one of {BACKENDS}; got {backend!r}.")
    if backend == "triton" and (why := _missing_triton() or _no_triton_for(rows)):
        raise ValueError(f"`backend` 'triton' {why}")
    if backend != "auto":
        return backend
    if rows.shape[-1] < FEWEST_FOR_TILES:
        return "reference"
    # Under vmap the kernel would need a seed for each of its rows.
    kernel = rows.is_cuda and not (
        _missing_triton() or _no_triton_for(rows) or transforms_are_active()
    )
    return "triton" if kernel else "tiled"


def _missing_triton() -> str | None:
    if not _HAS_TRITON:
        return "needs triton, the extra `gpu`: pip install 'cln-tutorial[gpu]'."
    if not (torch.cuda.is_available() or _INTERPRETED):
        return "needs a GPU, or the environment variable TRITON_INTERPRET=1."
    return None


def _no_triton_for(rows: Tensor) -> str | None:
    if not (rows.is_cuda or _INTERPRETED):
        return f"runs on a GPU; `logits` are on {rows.device}."
    if rows.dtype == torch.float64:
        return "computes in float32; `logits` are float64."
    return None


def _is_zero(tau: Tensor | float | int) -> Tensor | None:
    """Where the temperature is zero, or None if that is known to be nowhere."""
    if not isinstance(tau, Tensor):
        return None if tau else torch.tensor(True)
    zero = tau == 0
    return None if checks_values(None, zero) and not bool(zero.any()) else zero


def _positive(tau: Tensor | float | int) -> Tensor | float:
    if isinstance(tau, Tensor):
        return tau.masked_fill(tau == 0, 1.0)
    return float(tau) or 1.0
