r"""Annealed importance sampling: an estimate of log Z, with a bound on either side.

.. math:: E_\beta = (1-\beta) E_0 + \beta E, \qquad
    \log w = \log Z_0 - \sum_{k=1}^K \bigl(E_{\beta_k} - E_{\beta_{k-1}}\bigr)(x_{k-1})

where :math:`x_k` follows from :math:`x_{k-1}` by a transition that keeps :math:`e^{-E_{\beta_k}}`.

Source: Neal 2001 (arXiv physics/9803008); Salakhutdinov & Murray 2008; Burda, Grosse &
Salakhutdinov 2015 (arXiv 1412.8566) for the reverse pass.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.energy_models._checks import (
    Energy,
    choose_seed,
    energy_and_gradient,
    frozen,
    require_count,
    require_energy,
    require_points,
    require_positive,
)
from cln_tutorial.energy_models._closed_form import float64
from cln_tutorial.energy_models.boltzmann import RBMEnergy
from cln_tutorial.energy_models.philox import counter_normal, counter_uniform
from cln_tutorial.energy_models.steps import langevin_step, mala_accept, mala_proposal

KERNELS = ("mala", "ula", "gibbs")
# Streams of the counters: noise, and the uniform numbers that decide, of each kind of pass. Chains
# with the same seed have 0 to 2.
_FORWARD, _REVERSE, _PILOT, _RESAMPLE = (3, 4), (5, 6), (7, 8), 9
_LEAST_ESS = 0.9  # of the pilot: what a step along the path leaves of the chains
_MOST_RUNGS = 10_000


@dataclass(frozen=True)
class AISOutput:
    r"""What annealed importance sampling has found.

    Args:
        log_z: :math:`\log\frac1n\sum_i w_i`. Its exponential has the mean Z, exactly, whatever the
            temperatures; it is itself too low on average.
        stderr: standard error of ``log_z`` from the spread of the weights. Do not trust it where
            ``ess`` is a handful.
        lower: :math:`\frac1n\sum_i\log w_i`, whose mean is at most :math:`\log Z`.
        upper: mean of the reverse :math:`\log w`, whose mean is at least :math:`\log Z` if
            ``reverse_from`` were exact samples; NaN without them.
        reverse_log_z: estimate of the reverse pass, :math:`-\log\frac1m\sum_i w_i^{-1}`.
        ess: effective sample size of the weights, :math:`(\sum w)^2/\sum w^2`, from 1 to n.
        log_w: logarithms of the weights, with :math:`\log Z_0`, ``(n,)``, float64.
        reverse_log_w: those of the reverse pass, ``(m,)``, or None.
        accept: share of accepted proposals at each temperature but the first, ``(n_temps - 1,)``.
        betas: the temperatures, ``(n_temps,)``, float64.
        valid: False for a kernel that does not keep the bridges; then nothing above holds.
        x: last points, ``(n, *event)``, weighted by ``log_w``; of equal weight with ``resample``.
    """

    log_z: float
    stderr: float
    lower: float
    upper: float
    reverse_log_z: float
    ess: float
    log_w: Float[Tensor, " n"]
    reverse_log_w: Float[Tensor, " m"] | None
    accept: Float[Tensor, " n_moves"]
    betas: Float[Tensor, " n_temps"]
    valid: bool
    x: Float[Tensor, "n *event"]


def ais_log_partition(
    energy: Energy,
    base: Energy,
    n_chains: int,
    betas: int | Shaped[Tensor, "..."] = 1000,
    *,
    kernel: str = "mala",
    step_size: float | int | Shaped[Tensor, "..."] | None = None,
    n_steps_per_temp: int = 1,
    reverse_from: Shaped[Tensor, "..."] | None = None,
    resample: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> AISOutput:
    r"""Estimate :math:`\log Z = \log\int e^{-E(x)}\,dx` by annealed importance sampling.

    .. math:: \log\hat Z = \log\frac1n\sum_i w_i, \qquad
        \mathbb E[\log w] \le \log Z \le \mathbb E_\mathrm{reverse}[\log w]

    Args:
        energy: from points ``(n, *event)`` to energies; its parameters get no gradient.
        base: an energy with ``log_z()`` and exact ``sample(n, generator)``, as ``GaussianEnergy``.
            It should be wider than ``energy``: where its samples never are, nothing is found.
        n_chains: number of independent weights.
        betas: number of equidistant temperatures, or the temperatures themselves, ``(n_temps,)``,
            increasing from 0 to 1. :func:`ais_schedule` makes better ones.
        kernel: what moves the chains at each temperature.

            - "mala": Langevin steps with the decision that keeps each bridge exactly.
            - "ula": without the decision. More temperatures do not cure its bias, and the result is
              marked ``valid=False``.
            - "gibbs": block Gibbs steps between two ``RBMEnergy`` of the same shape. The bridge is
              that of visible and hidden units together, the hidden ones summed out.
        step_size: of "mala" and "ula", one number or one for each temperature, ``(n_temps,)``; the
            first is not used. Steps must not be tuned on the run itself.
        n_steps_per_temp: transitions at each temperature.
        reverse_from: exact samples of ``energy``, ``(m, *event)``, for the reverse pass. Samples
            that have not equilibrated give no bound.
        resample: return ``x`` drawn by the weights (systematic resampling).
        seed: key of the counters; same seed, same result.
        generator: where the key is drawn from if there is no seed.

    Returns:
        An :class:`AISOutput`; chains run in the dtype of the samples of ``base``, float32 for half
        types, and weights are added up in float64.

    Raises:
        TypeError: for an ``energy`` that cannot be called, a ``base`` without ``log_z`` and
            ``sample``, and points that are not floating.
        ValueError: for temperatures that do not increase from 0 to 1, an unknown kernel, or a step
            that is missing, not positive, or of another shape.
        RuntimeError: if an energy on the way is NaN.

    Source:
        Neal 2001; Burda, Grosse & Salakhutdinov 2015 for the reverse pass.

    Example:
        >>> from cln_tutorial.energy_models.energies import GaussianEnergy
        >>> energy, base = GaussianEnergy(torch.ones(2), 4.0), GaussianEnergy(torch.zeros(2), 1.0)
        >>> out = ais_log_partition(energy, base, 500, betas=50, step_size=0.1, seed=0)
        >>> abs(out.log_z - energy.log_z()) < 0.1
        True
    """
    _require_ends(energy, base, kernel)
    require_count("n_chains", n_chains, least=1)
    require_count("n_steps_per_temp", n_steps_per_temp, least=1)
    schedule = _schedule(betas)
    steps = _step_sizes(step_size, len(schedule), kernel)
    if reverse_from is not None:
        require_points("reverse_from", reverse_from)
    seed = choose_seed(seed, generator)
    with torch.no_grad(), frozen(energy):
        path = (_GibbsPath if kernel == "gibbs" else _LangevinPath)(energy, base, kernel)
        start = _samples(base, n_chains, seed)
        x, log_w, accept = _anneal(path, start, schedule, steps, n_steps_per_temp, seed)
        log_w += base.log_z()
        reverse_log_w = None
        if reverse_from is not None:
            last = reverse_from.to(start)
            reverse_log_w = _reverse(path, last, schedule, steps, n_steps_per_temp, seed)
            reverse_log_w += base.log_z()
        if resample:
            x = x[_systematic(log_w, counter_uniform(seed, 0, 1, stream=_RESAMPLE).item())]
    return _summary(log_w, reverse_log_w, accept, schedule, kernel, x)


def ais_schedule(
    energy: Energy,
    base: Energy,
    n_temps: int,
    *,
    step_size: float | int,
    n_chains: int = 256,
    target_accept: float = 0.574,
    n_steps_per_rung: int = 10,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, " n_temps"], Float[Tensor, " n_temps"]]:
    r"""Choose temperatures and step sizes for :func:`ais_log_partition` by a pilot run.

    From :math:`\beta` the pilot goes as far as its weights keep nine tenths of their effective
    size, resamples, moves, and steers the step towards the wanted share of accepted proposals. The
    rungs so found are equally hard; the temperatures divide each in equal parts.

    The pilot has random numbers of its own: what it chose is fixed before the run, which therefore
    stays unbiased, also with the same seed.

    Args:
        energy: as in :func:`ais_log_partition`, on real points.
        base: likewise.
        n_temps: number of temperatures wanted.
        step_size: where the search for a step starts.
        n_chains: chains of the pilot.
        target_accept: wanted share of accepted proposals; .574 is best in many dimensions.
        n_steps_per_rung: moves of the pilot on each rung.
        seed: key of the counters.
        generator: where the key is drawn from if there is no seed.

    Returns:
        ``(betas, step_size)``, each ``(n_temps,)`` in float64.

    Raises:
        TypeError: as :func:`ais_log_partition`.
        ValueError: for counts, a step or a share out of range.
        RuntimeError: if an energy is NaN, or the path does not come to its end, as where the energy
            is infinite at more than a tenth of the samples of ``base``.

    Source:
        Zhou, Johansen & Aston 2016 (arXiv 1303.3123) for the conditional effective size; Roberts &
        Rosenthal 1998 for .574.

    Example:
        >>> from cln_tutorial.energy_models.energies import GaussianEnergy
        >>> energy, base = GaussianEnergy(torch.ones(2), 400.0), GaussianEnergy(torch.zeros(2), 1.0)
        >>> betas, step_size = ais_schedule(energy, base, 100, step_size=0.1, seed=0)
        >>> bool(step_size[-1] < 0.1 * step_size[0])  # the last bridges are narrow
        True
    """
    _require_ends(energy, base, "mala")
    require_count("n_temps", n_temps, least=2)
    require_count("n_chains", n_chains, least=2)
    require_count("n_steps_per_rung", n_steps_per_rung, least=1)
    require_positive("step_size", step_size)
    if not 0 < target_accept < 1:
        raise ValueError(f"`target_accept` must lie between 0 and 1; got {target_accept}.")
    seed = choose_seed(seed, generator)
    betas, steps, move = [0.0], [float(step_size)], 0
    with torch.no_grad(), frozen(energy):
        path = _LangevinPath(energy, base, "mala")
        state = path.start(_samples(base, n_chains, seed, pilot=True))
        while betas[-1] < 1:
            work = float64(path.difference(state, 0.0, 1.0))
            _require_numbers(work)
            beta = min(1.0, betas[-1] + _longest_step(work, 1 - betas[-1]))
            if beta == betas[-1] or len(betas) > _MOST_RUNGS:
                raise RuntimeError(f"the path came to a stop at beta = {beta}.")
            place = counter_uniform(seed, len(betas), 1, stream=_RESAMPLE + 1).item()
            rows = _systematic((betas[-1] - beta) * work, place)
            state, log_step = tuple(part[rows] for part in state), math.log(steps[-1])
            for _ in range(n_steps_per_rung):
                h = math.exp(log_step)
                state, accepted = path.move(state, beta, h, seed, move, _PILOT)
                log_step += float(accepted) - target_accept
                move += 1
            betas.append(beta)
            steps.append(math.exp(log_step))
    steps[0] = steps[1]
    return _refine(betas, n_temps), _refine([math.log(h) for h in steps], n_temps).exp()


class _LangevinPath:
    """The bridge ``(1 - beta) E_0 + beta E``.

    A state holds the points and, of both ends, energies and gradients: every bridge is a sum of
    them, so that a new temperature costs no evaluation.
    """

    def __init__(self, energy: Energy, base: Energy, kernel: str) -> None:
        self.energy, self.base, self.adjusted = energy, base, kernel == "mala"

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            x,
            *energy_and_gradient(self.base, x),
            *energy_and_gradient(self.energy, x),
        )

    def difference(self, state: tuple[Tensor, ...], before: float, after: float) -> Tensor:
        _, e0, _, e1, _ = state
        return (after - before) * (e1 - e0)

    def move(
        self,
        state: tuple[Tensor, ...],
        beta: float,
        step_size: float,
        seed: int,
        step: int,
        streams: tuple[int, int],
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        x, e, g = _bridge(state, beta)
        place = {"dtype": x.dtype, "device": x.device}
        noise = counter_normal(seed, step, x.shape, stream=streams[0], **place)
        if not self.adjusted:
            scale = math.sqrt(2 * step_size)
            return self.start(langevin_step(x, g, noise, step_size, scale)), x.new_ones(())
        new = self.start(mala_proposal(x, g, noise, step_size))
        uniform = counter_uniform(seed, step, len(x), stream=streams[1], **place)
        *_, accepted = mala_accept((x, e, g), _bridge(new, beta), uniform, step_size)
        chosen = tuple(
            torch.where(accepted.reshape(-1, *(1,) * (b.ndim - 1)), b, a)
            for a, b in zip(state, new, strict=True)
        )
        return chosen, accepted.to(x.dtype).mean()


class _GibbsPath:
    """The bridge of the energies of visible and hidden units of two Boltzmann machines."""

    def __init__(self, energy: RBMEnergy, base: RBMEnergy, kernel: str) -> None:
        self.energy, self.base = energy, base
        # Each is asked for three times: by two weights, and by the moves between them.
        self._machine = lru_cache(maxsize=2)(self._mix)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def difference(self, state: tuple[Tensor, ...], before: float, after: float) -> Tensor:
        return self._machine(after)(state[0]) - self._machine(before)(state[0])

    def move(
        self,
        state: tuple[Tensor, ...],
        beta: float,
        step_size: float,
        seed: int,
        step: int,
        streams: tuple[int, int],
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        (x,) = state
        n_hidden = self.energy.n_hidden
        shape = (len(x), n_hidden + x.shape[1])
        noise = counter_normal(seed, step, shape, stream=streams[0], dtype=x.dtype, device=x.device)
        hidden, visible = torch.special.ndtr(noise).split([n_hidden, x.shape[1]], dim=1)
        return (self._machine(beta).gibbs_step(x, hidden, visible),), x.new_ones(())

    def _mix(self, beta: float) -> RBMEnergy:
        names = ("weights", "visible_bias", "hidden_bias")
        ends = [(getattr(self.base, name), getattr(self.energy, name)) for name in names]
        return RBMEnergy(*((1 - beta) * a + beta * b for a, b in ends))


def _bridge(state: tuple[Tensor, ...], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    x, e0, g0, e1, g1 = state
    return x, (1 - beta) * e0 + beta * e1, (1 - beta) * g0 + beta * g1


def _anneal(
    path: Any, x: Tensor, betas: list[float], steps: list[float], n_steps: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Go from the base to the energy; return last points, log weights and acceptance."""
    state, log_w, accept = path.start(x), float64(x.new_zeros(len(x))), []
    for k in range(1, len(betas)):
        # First the weight, at the points of the last temperature, then the move to the new one.
        log_w -= path.difference(state, betas[k - 1], betas[k])
        rates = []
        for step in range((k - 1) * n_steps, k * n_steps):
            state, accepted = path.move(state, betas[k], steps[k], seed, step, _FORWARD)
            rates.append(accepted)
        accept.append(torch.stack(rates).mean())
    _require_numbers(log_w)
    return state[0], log_w, torch.stack(accept)


def _reverse(
    path: Any, x: Tensor, betas: list[float], steps: list[float], n_steps: int, seed: int
) -> Tensor:
    """Go from the energy to the base, every operation in the opposite order; return log weights."""
    state, log_w, step = path.start(x), float64(x.new_zeros(len(x))), 0
    for k in range(len(betas) - 1, 0, -1):
        for _ in range(n_steps):
            state, _ = path.move(state, betas[k], steps[k], seed, step, _REVERSE)
            step += 1
        log_w -= path.difference(state, betas[k - 1], betas[k])
    _require_numbers(log_w)
    return log_w


def _summary(
    log_w: Tensor,
    reverse_log_w: Tensor | None,
    accept: Tensor,
    betas: list[float],
    kernel: str,
    x: Tensor,
) -> AISOutput:
    n = len(log_w)
    log_z = float(log_w.logsumexp(0)) - math.log(n)
    w = (log_w - log_w.max()).exp()
    upper = reverse_log_z = math.nan
    if reverse_log_w is not None:
        upper = float(reverse_log_w.mean())
        reverse_log_z = math.log(len(reverse_log_w)) - float((-reverse_log_w).logsumexp(0))
    return AISOutput(
        log_z=log_z,
        stderr=float(w.std() / w.mean()) / math.sqrt(n) if n > 1 else math.nan,
        lower=float(log_w.mean()),
        upper=upper,
        reverse_log_z=reverse_log_z,
        ess=float(w.sum().square() / w.square().sum()),
        log_w=log_w,
        reverse_log_w=reverse_log_w,
        accept=accept,
        betas=torch.tensor(betas, dtype=torch.float64),
        valid=kernel != "ula",
        x=x,
    )


def _longest_step(work: Tensor, rest: float) -> float:
    """Return by bisection how far beta may go until the weights lose a tenth of their size."""

    def size(step: float) -> float:
        log_w = -step * work
        return math.exp(float(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0))) / len(work)

    if size(rest) >= _LEAST_ESS:
        return rest
    low, high = 0.0, rest
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if size(middle) >= _LEAST_ESS else (low, middle)
    return low


def _refine(knots: Iterable[float], n: int) -> Tensor:
    """Return ``n`` values at equal distances along the line through the knots."""
    values = torch.tensor(list(knots), dtype=torch.float64)
    place = torch.linspace(0, len(values) - 1, n, dtype=torch.float64)
    left = place.floor().long().clamp(max=len(values) - 2)
    return torch.lerp(values[left], values[left + 1], place - left)


def _systematic(log_w: Tensor, uniform: float) -> Tensor:
    """Return rows so that each comes as often as its weight says, up to less than one."""
    n = len(log_w)
    cumulated = log_w.softmax(0).cumsum(0)
    ticks = (torch.arange(n, device=log_w.device, dtype=log_w.dtype) + uniform) / n
    return torch.searchsorted(cumulated, ticks).clamp(max=n - 1)


def _samples(base: Energy, n: int, seed: int, *, pilot: bool = False) -> Tensor:
    """Draw the starting points, those of a pilot from another key than those of a run."""
    buffers = base.buffers() if isinstance(base, nn.Module) else ()
    device = next((buffer.device for buffer in buffers), torch.device("cpu"))
    key = (seed + pilot * 0x9E3779B97F4A7C15) % 2**63
    x = base.sample(n, torch.Generator(device).manual_seed(key))
    return x.to(wide_dtype(x.dtype))


def _schedule(betas: int | Tensor) -> list[float]:
    if isinstance(betas, int):
        require_count("betas", betas, least=2)
        return torch.linspace(0, 1, betas, dtype=torch.float64).tolist()
    values = betas.tolist() if betas.ndim == 1 and betas.is_floating_point() else []
    rising = all(a < b for a, b in pairwise(values))
    if len(values) < 2 or values[0] != 0 or values[-1] != 1 or not rising:
        raise ValueError(
            "`betas` must be a number of temperatures of at least 2, or temperatures (n_temps,) "
            f"that increase from 0 to 1; got {betas if betas.numel() < 8 else tuple(betas.shape)}."
        )
    return values


def _step_sizes(step_size: float | int | Tensor | None, n_temps: int, kernel: str) -> list[float]:
    if kernel == "gibbs":
        if step_size is not None:
            raise ValueError("`step_size` has no meaning for the kernel 'gibbs'; leave it out.")
        return [0.0] * n_temps
    if step_size is None:
        raise ValueError(f"the kernel {kernel!r} needs a `step_size`.")
    if not isinstance(step_size, Tensor) or step_size.ndim == 0:
        require_positive("step_size", float(step_size))
        return [float(step_size)] * n_temps
    if step_size.shape != (n_temps,):
        raise ValueError(
            f"`step_size` must be one number or one for each temperature, ({n_temps},); "
            f"got {tuple(step_size.shape)}."
        )
    require_positive("step_size", step_size.cpu())
    return step_size.tolist()


def _require_ends(energy: Any, base: Any, kernel: str) -> None:
    require_energy(energy)
    if not all(callable(getattr(base, name, None)) for name in ("log_z", "sample", "__call__")):
        raise TypeError(
            "`base` must be an energy with `log_z()` and `sample(n, generator)`, as "
            f"GaussianEnergy; got {type(base).__name__}."
        )
    if kernel not in KERNELS:
        raise ValueError(f"`kernel` must be one of {KERNELS}; got {kernel!r}.")
    machines = [isinstance(end, RBMEnergy) for end in (energy, base)]
    if kernel == "gibbs" and not (all(machines) and energy.weights.shape == base.weights.shape):
        raise ValueError("the kernel 'gibbs' needs two RBMEnergy of the same shape.")
    if kernel != "gibbs" and any(machines):
        raise ValueError(f"visible units are 0 or 1: the kernel must be 'gibbs', not {kernel!r}.")


def _require_numbers(log_w: Tensor) -> None:
    if log_w.isnan().any():
        raise RuntimeError("an energy is NaN on the way from `base` to `energy`.")
