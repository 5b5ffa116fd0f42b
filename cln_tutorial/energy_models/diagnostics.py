r"""What a set of chains is worth: R-hat, effective sample size, autocorrelation.

Chains are ``(n_steps, n_chains, *event)``. Every coordinate of the event is judged by itself.

.. math:: \tau = 1 + 2 \sum_{k \ge 1} \rho_k, \qquad \mathrm{ESS} = \frac{N}{\tau}, \qquad
    \hat R = \sqrt{\frac{n - 1}{n} + \frac{B}{n W}}

Source: Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021 (rank-normalised R-hat and bulk ESS);
Geyer 1992 (initial monotone sequence).
"""

import math
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial.energy_models._checks import require_count

METHODS = ("rank", "split")
# Numbers that are held at a time, as float64 and as the complex numbers of a transform.
BLOCK = 2**21

Chains = Float[Tensor, "n_steps n_chains *event"]


def rhat(chains: Chains, method: str = "rank") -> Float[Tensor, "*event"]:
    r"""Compare the spread between half chains to the spread within: 1 if they agree.

    .. math:: \hat R = \sqrt{\frac{n - 1}{n} + \frac{B}{n W}}, \qquad
        B = n \operatorname{Var}_c(\bar x_c), \quad W = \overline{\operatorname{Var}_t(x_{tc})}

    Each chain is cut into two halves of :math:`n` steps, so that a drift shows even in one chain.
    "rank" computes it of normal scores of the ranks, and again of those of
    :math:`|x - \operatorname{median}|`, and returns the larger one: the first sees chains at
    different places, the second chains of different width. It needs no finite variance. Below
    1.01 is the usual demand. Chains that all stand still at different places give infinity.

    Args:
        chains: ``(n_steps, n_chains, *event)``, any floating dtype; at least 4 steps, 1 chain.
        method: "rank", or "split" for the values as they are.

    Returns:
        One number per coordinate, ``(*event)``, computed in float64; float32 for half types. NaN,
        with a warning, where nothing ever changes or a number is not finite.

    Raises:
        TypeError, ValueError: for another dtype, shape or method.

    Source:
        Vehtari et al. 2021.

    Example:
        >>> chains = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        >>> round(rhat(chains).item(), 2), rhat(chains + 3 * torch.arange(4)).item() > 1.5
        (1.0, True)
    """
    _require_chains(chains)
    _require_method(method)
    return _by_coordinate(chains, _rank_rhat if method == "rank" else _split_rhat)


def effective_sample_size(chains: Chains, method: str = "rank") -> Float[Tensor, "*event"]:
    r"""Return how many independent draws would know the mean as well.

    .. math:: \mathrm{ESS} = \frac{N}{\hat\tau}, \qquad
        \hat\rho_k = 1 - \frac{W - \overline{c_k}}{\widehat{\operatorname{Var}}^+}, \qquad
        \hat\tau = -1 + 2 \sum_{j < K} \min_{i \le j} (\hat\rho_{2i} + \hat\rho_{2i+1})
        + \max(\hat\rho_{2K}, 0)

    The sum ends before the first pair that is not positive. The variance includes that between
    the half chains, so chains in different modes are worth little. "rank" is the bulk ESS, of
    normal scores of the ranks; "split" that of the mean of the values: its standard error is
    their deviation over :math:`\sqrt{\mathrm{ESS}}`. At most :math:`N \log_{10} N`, which only
    alternating chains reach.

    Args:
        chains: ``(n_steps, n_chains, *event)``, any floating dtype; at least 4 steps, 1 chain.
        method: "rank" or "split".

    Returns:
        One number per coordinate, ``(*event)``, computed in float64; float32 for half types. NaN,
        with a warning, where nothing ever changes or a number is not finite.

    Raises:
        TypeError, ValueError: for another dtype, shape or method.

    Source:
        Vehtari et al. 2021; Geyer 1992, section 3.3.

    Example:
        >>> steps = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
        >>> ess = effective_sample_size(steps.cumsum(0))  # a random walk never forgets
        >>> 3500 < effective_sample_size(steps).item() < 4500, ess.item() < 20
        (True, True)
    """
    _require_chains(chains)
    _require_method(method)

    def statistic(x: Tensor) -> Tensor:
        halves = _split(x)
        return _ess(_normal_scores(halves) if method == "rank" else halves)

    return _by_coordinate(chains, statistic)


def autocorrelation(chains: Chains, max_lag: int | None = None) -> Float[Tensor, "n_lags *event"]:
    r"""Correlate each step with the steps after it, all chains together.

    .. math:: \hat\rho_k = \frac{c_k}{c_0}, \qquad c_k = \frac{1}{(n - k)\, m}
        \sum_{t, c} (x_{t, c} - \bar x)(x_{t + k, c} - \bar x)

    The mean is that of all chains: chains that stay at different places never decorrelate, and
    many short chains are as good as a long one. A single chain of :math:`n` steps knows its mean
    badly, which costs every :math:`\rho_k` about :math:`\tau / n`. Late lags are averages of few
    products, so they are noisy. Computed by the fast Fourier transform, in
    :math:`O(n \log n)` per chain.

    Args:
        chains: ``(n_steps, n_chains, *event)``, any floating dtype; at least 4 steps, 1 chain.
        max_lag: the last lag, at most ``n_steps - 1``, which is the default.

    Returns:
        Lags 0 to ``max_lag``, ``(max_lag + 1, *event)``, computed in float64; float32 for half
        types. NaN, with a warning, where nothing ever changes or a number is not finite.

    Raises:
        TypeError, ValueError: for another dtype or shape, or a lag that does not occur.

    Source:
        Sokal 1997, section 3.

    Example:
        >>> alternating = torch.tensor([[1.0], [-1.0]]).repeat(50, 1)
        >>> autocorrelation(alternating, max_lag=2)
        tensor([ 1., -1.,  1.])
    """
    _require_chains(chains)
    last = chains.shape[0] - 1
    if max_lag is not None:
        require_count("max_lag", max_lag)
        if max_lag > last:
            raise ValueError(
                f"`max_lag` must be below the number of steps, {last + 1}; got {max_lag}."
            )
    stop = (last if max_lag is None else max_lag) + 1
    return _by_coordinate(chains, lambda x: _pooled_autocorrelation(x)[:stop])


def integrated_autocorr_time(chains: Chains) -> Float[Tensor, "*event"]:
    r"""Return the number of steps that are worth one independent draw.

    .. math:: \tau = 1 + 2 \sum_{k \ge 1} \rho_k

    The sum over :func:`autocorrelation` is cut by the initial monotone sequence, as in
    :func:`effective_sample_size`. An autoregression :math:`x' = \rho x + \xi` has
    :math:`\tau = (1 + \rho) / (1 - \rho)`; unadjusted Langevin on a Gaussian is one, with
    :math:`\rho = 1 - h / \sigma^2`. Trust it where there are at least 50 :math:`\tau` steps, or
    many chains.

    Args:
        chains: ``(n_steps, n_chains, *event)``, any floating dtype; at least 4 steps, 1 chain.

    Returns:
        One number of steps per coordinate, ``(*event)``, computed in float64; float32 for half
        types. NaN, with a warning, where nothing ever changes or a number is not finite.

    Raises:
        TypeError, ValueError: for another dtype or shape.

    Source:
        Geyer 1992, section 3.3.

    Example:
        >>> noise = torch.randn(2001, 50, generator=torch.Generator().manual_seed(0))
        >>> moving_average = noise[1:] + noise[:-1]  # rho is 1/2 at lag 1, then 0
        >>> round(integrated_autocorr_time(moving_average).item(), 1)
        2.0
    """
    _require_chains(chains)
    return _by_coordinate(chains, lambda x: _geyer_sum(_pooled_autocorrelation(x)))


def _by_coordinate(chains: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``(n, m, e) -> (..., e)`` to blocks of coordinates; NaN where there is no answer."""
    n_steps, n_chains, *event = chains.shape
    flat = chains.detach().reshape(n_steps, n_chains, -1)
    results, constant, broken = [], 0, 0
    for block in flat.split(max(1, BLOCK // (n_steps * n_chains)), -1):
        finite = block.isfinite().all(0).all(0)
        changing = (block != block[:1, :1]).any(0).any(0)
        values = statistic(block.to(sum_dtype(block)))
        results.append(values.where(finite & changing, math.nan))
        constant += int((finite & ~changing).sum())
        broken += int((~finite).sum())
    if constant or broken:
        warnings.warn(
            f"NaN for {constant} constant coordinates and {broken} with numbers that are not "
            f"finite, of {flat.shape[-1]}: such chains say nothing about convergence.",
            stacklevel=3,
        )
    result = torch.cat(results, -1)
    return result.reshape([*result.shape[:-1], *event]).to(wide_dtype(chains.dtype))


def _split(x: Tensor) -> Tensor:
    """Make two chains of each; the middle step of an odd number is left out."""
    half = x.shape[0] // 2
    return torch.cat([x[:half], x[x.shape[0] - half :]], 1)


def _normal_scores(x: Tensor) -> Tensor:
    """Replace values by normal quantiles of their ranks among all steps and chains."""
    rows = x.flatten(0, 1).T.contiguous()
    ordered = rows.sort(-1).values
    # Values that are equal share the mean of their ranks.
    below = torch.searchsorted(ordered, rows)
    rank = (below + torch.searchsorted(ordered, rows, right=True) + 1) / 2
    # Blom's plotting positions: close to the means of the ordered draws of a normal law.
    scores = torch.special.ndtri((rank.to(x.dtype) - 3 / 8) / (rows.shape[-1] + 1 / 4))
    return scores.T.reshape(x.shape)


def _rank_rhat(x: Tensor) -> Tensor:
    halves = _split(x)
    ordered = halves.flatten(0, 1).sort(0).values
    n = ordered.shape[0]
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    bulk = _rhat(_normal_scores(halves))
    tail = _rhat(_normal_scores((halves - median).abs()))
    # Two values at equal distance from their median have no tail: NaN, which fmax leaves out.
    return torch.fmax(bulk, tail)


def _split_rhat(x: Tensor) -> Tensor:
    return _rhat(_split(x))


def _rhat(x: Tensor) -> Tensor:
    n = x.shape[0]
    within, between = x.var(0).mean(0), n * x.mean(0).var(0)
    return ((between / within + n - 1) / n).sqrt()


def _ess(x: Tensor) -> Tensor:
    n, m = x.shape[:2]
    means = x.mean(0)
    covariance = _autocovariance(x - means)
    within = covariance[0] * n / (n - 1)
    variance = covariance[0] + means.var(0)
    rho = 1 - (within - covariance) / variance
    rho[0] = 1
    return n * m / _geyer_sum(rho).clamp(min=1 / math.log10(n * m))


def _pooled_autocorrelation(x: Tensor) -> Tensor:
    n = x.shape[0]
    covariance = _autocovariance(x - x.mean((0, 1)))
    products = torch.arange(n, 0, -1, dtype=x.dtype, device=x.device)[:, None]
    return covariance / covariance[0] * (n / products)


def _autocovariance(centred: Tensor) -> Tensor:
    """Return ``(n, e)``: sums of products at each lag over the number of all steps and chains."""
    n, m, size = centred.shape
    length = 2 ** (2 * n - 1).bit_length()  # zeros behind, or late steps would meet early ones
    power = centred.new_zeros(length // 2 + 1, size)
    for part in centred.split(max(1, BLOCK // (length * size)), 1):
        spectrum = torch.view_as_real(torch.fft.rfft(part, length, dim=0))
        power += spectrum.square().sum((1, -1))
    return torch.fft.irfft(power, length, dim=0)[:n] / (n * m)


def _geyer_sum(rho: Tensor) -> Tensor:
    """Add up correlations ``(n, e)`` by pairs that are positive and never rise, to ``(e,)``."""
    n = rho.shape[0]
    last = max((n - 3) // 2, 0)
    pairs = rho[: 2 * last + 2].unflatten(0, (-1, 2)).sum(1)
    counted = (pairs > 0).long().cumprod(0)
    counted[-1] = 0
    # Half of what follows the last pair: its first correlation, where positive.
    rest = rho.gather(0, 2 * counted.sum(0, keepdim=True))[0].clamp(min=0)
    return -1 + 2 * (pairs.cummin(0).values * counted).sum(0) + rest


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # which has no float64


def _require_chains(chains: Tensor) -> None:
    require_floating("chains", chains)
    if chains.ndim < 2 or chains.shape[0] < 4 or 0 in chains.shape:
        raise ValueError(
            "`chains` must be (n_steps, n_chains, *event) with at least 4 steps, 1 chain and 1 "
            f"coordinate; got shape {tuple(chains.shape)}."
        )


def _require_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"`method` must be 'rank' or 'split'; got {method!r}.")
