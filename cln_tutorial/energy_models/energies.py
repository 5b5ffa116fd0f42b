r"""Energies whose every answer is known: a test bed for samplers and for estimates of log Z.

.. math:: p(x) = e^{-E(x)/T} / Z(T), \qquad Z(T) = \int e^{-E(x)/T}\,dx

Each brings its energy, the closed form of its gradient, :math:`\log Z`, and exact samples.

Source: Su Jianlin, article 6612 (https://kexue.fm/archives/6612), 2019; Hänggi, Talkner & Borkovec
1990 for the times of the double well; Salakhutdinov & Murray 2008 for the machine with exact Z.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.integrate import cumulative_simpson, simpson
from scipy.special import ive
from torch import Tensor

from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial.energy_models._checks import (
    Energy,
    energy_and_gradient,
    energy_values,
    frozen,
    require_count,
    require_energy,
    require_positive,
)
from cln_tutorial.energy_models._closed_form import (
    CHUNK,
    ClosedForm,
    categorical,
    float64,
    matmul,
    normal,
)

_MOST_CELLS = 2**22
# Beyond an energy of 40 above the least, exp(-E / T) is lost beside 1 in float64.
_FAR = 40.0


class GaussianEnergy(ClosedForm):
    r"""The harmonic well :math:`E(x) = \tfrac12 (x-\mu)^\top \Lambda (x-\mu)`.

    .. math:: \log Z(T) = \tfrac d2 \log 2\pi T - \tfrac12 \log\det\Lambda

    Args:
        mean: :math:`\mu`, ``(dim,)``, floating.
        precision: :math:`\Lambda`: one number, a diagonal ``(dim,)``, or a symmetric positive
            definite matrix ``(dim, dim)``. A number is kept as a diagonal.

    Raises:
        TypeError: if ``mean`` or a tensor ``precision`` is not floating.
        ValueError: for other shapes, and a precision that is not positive definite.

    Source:
        Article 6612; the stationary laws of the chapter are derived on it.

    Example:
        >>> energy = GaussianEnergy(torch.zeros(2), precision=4.0)
        >>> energy(torch.tensor([[1.0, 0.0]]))
        tensor([2.])
        >>> round(energy.log_z(), 4)  # log(2 pi / 4)
        0.4516
    """

    def __init__(
        self, mean: Shaped[Tensor, "*shape"], precision: float | int | Shaped[Tensor, "..."] = 1.0
    ) -> None:
        super().__init__()
        require_floating("mean", mean)
        if mean.ndim != 1 or mean.shape[0] == 0:
            raise ValueError(f"`mean` must be of shape (dim,); got {tuple(mean.shape)}.")
        self.dim = mean.shape[0]
        if not isinstance(precision, Tensor):
            precision = mean.new_tensor(float(precision))
        require_floating("precision", precision)
        if precision.ndim == 0:
            precision = precision.expand(self.dim)
        if precision.shape not in ((self.dim,), (self.dim, self.dim)):
            raise ValueError(
                f"`precision` must be a number, ({self.dim},) or ({self.dim}, {self.dim}); "
                f"got {tuple(precision.shape)}."
            )
        if precision.ndim == 1:
            require_positive("precision", precision)
        else:
            _require_positive_definite("precision", precision)
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("precision", precision.detach().to(mean).clone())

    def log_z(self, temperature: float | int = 1.0) -> float:
        """Return the exact logarithm of the partition function, computed in float64."""
        require_positive("temperature", temperature)
        precision = float64(self.precision)
        log_det = precision.log().sum() if precision.ndim == 1 else torch.logdet(precision)
        return 0.5 * (self.dim * math.log(2 * math.pi * temperature) - float(log_det))

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n_points dim"]:
        """Draw ``n`` points at temperature 1, ``(n, dim)``, of the dtype of ``mean``."""
        noise = normal(n, self.mean, generator)
        precision = self.precision.to(noise.dtype)
        if precision.ndim == 1:
            spread = noise / precision.sqrt()
        else:
            # With precision = L L', the covariance of L'^-1 xi is its inverse.
            factor = torch.linalg.cholesky(precision)
            spread = torch.linalg.solve_triangular(factor.mT, noise.mT, upper=True).mT
        return (self.mean.to(noise.dtype) + spread).to(self.mean.dtype)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"dim={self.dim}"

    def _energy(self, x: Tensor) -> Tensor:
        return 0.5 * ((x - self.mean.to(x.dtype)) * self._grad(x)).sum(-1)

    def _grad(self, x: Tensor) -> Tensor:
        centred, precision = x - self.mean.to(x.dtype), self.precision.to(x.dtype)
        return centred * precision if precision.ndim == 1 else matmul(centred, precision)


class GaussianMixtureEnergy(ClosedForm):
    r"""Wells that are Gaussian: :math:`E(x) = -\log\sum_k w_k e^{-\|x-\mu_k\|^2 / 2\sigma_k^2}`.

    .. math:: \log Z(1) = \log\sum_k w_k (2\pi\sigma_k^2)^{d/2}

    The weights are heights, so that a mode has the probability
    :math:`w_k\sigma_k^d / \sum_j w_j\sigma_j^d` (``mode_probs``). The largest exponent is taken out
    of the sum: far from all modes the energy is large, not infinite.

    Args:
        means: :math:`\mu_k`, ``(k, dim)``, floating.
        sigma: :math:`\sigma_k`, one number or ``(k,)``.
        weights: :math:`w_k`, ``(k,)``, positive; None stands for ones.

    Raises:
        TypeError: for tensors that are not floating.
        ValueError: for other shapes, and a ``sigma`` or weights that are not positive.

    Source:
        Article 6612; the ring is the usual test of samplers that must find modes.

    Example:
        >>> energy = GaussianMixtureEnergy.ring(n_modes=8, radius=4.0, sigma=0.5)
        >>> round(energy.log_z(), 5)  # log(8 * 2 pi sigma^2)
        2.53102
        >>> energy.sample(3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        means: Shaped[Tensor, "*shape"],
        sigma: float | int | Shaped[Tensor, "..."] = 1.0,
        weights: Shaped[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__()
        require_floating("means", means)
        if means.ndim != 2 or 0 in means.shape:
            raise ValueError(f"`means` must be of shape (k, dim); got {tuple(means.shape)}.")
        n_modes, self.dim = means.shape
        if not isinstance(sigma, Tensor):
            sigma = means.new_tensor(float(sigma))
        weights = means.new_ones(n_modes) if weights is None else weights
        sigma = sigma.expand(n_modes) if sigma.ndim == 0 else sigma
        for name, value in (("sigma", sigma), ("weights", weights)):
            require_floating(name, value)
            if value.shape != (n_modes,):
                raise ValueError(
                    f"`{name}` must hold one number for each of the {n_modes} modes, shape "
                    f"({n_modes},); got {tuple(value.shape)}."
                )
            require_positive(name, value)
        self.register_buffer("means", means.detach().clone())
        self.register_buffer("sigma", sigma.detach().to(means).clone())
        self.register_buffer("log_weights", weights.detach().to(means).log())

    @classmethod
    def ring(
        cls, n_modes: int = 8, radius: float | int = 4.0, sigma: float | int = 0.5
    ) -> "GaussianMixtureEnergy":
        """Return equal modes on a circle of the plane, the first at ``(radius, 0)``."""
        require_count("n_modes", n_modes, least=1)
        require_positive("radius", radius)
        angle = torch.arange(n_modes, dtype=torch.float64) * (2 * math.pi / n_modes)
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=-1)
        return cls(means.to(torch.get_default_dtype()), sigma)

    def mode_probs(self) -> Float[Tensor, " k"]:
        """Return the probability of each mode at temperature 1, ``(k,)``."""
        return self._log_masses().softmax(-1).to(self.means.dtype)

    def log_z(self, temperature: float | int = 1.0) -> float:
        r"""Return the logarithm of the partition function, computed in float64.

        Exact at temperature 1. At others no closed form is known: in one or two dimensions it is
        the midpoint rule with a step of :math:`\sigma_{\min}\sqrt T/8` out to 10 standard
        deviations, whose error on such integrands is below 1e-8.

        Raises:
            ValueError: for a temperature that is not positive; for one other than 1 in more than
                two dimensions, or where the grid would need more than 4 million cells.
        """
        require_positive("temperature", temperature)
        if temperature == 1:
            log_masses = self._log_masses() + self.dim / 2 * math.log(2 * math.pi)
            return float(log_masses.logsumexp(-1))
        means, sigma = float64(self.means), float64(self.sigma) * math.sqrt(temperature)
        margin = 10 * float(sigma.max())
        low, high = means.amin(0) - margin, means.amax(0) + margin
        step = float(sigma.min()) / 8
        counts = [math.ceil(width / step) for width in (high - low).tolist()]
        if self.dim > 2 or math.prod(counts) > _MOST_CELLS:
            raise ValueError(
                f"`temperature` {temperature} needs a grid of {math.prod(counts):.1e} cells in "
                f"{self.dim} dimensions; log Z is a closed form at 1 only."
            )
        return _midpoint_log_z(self, low, high, counts, temperature)

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n_points dim"]:
        """Draw ``n`` independent points at temperature 1, of the dtype of ``means``."""
        noise = normal(n, self.means, generator)
        mode = categorical(self._log_masses(), n, generator)
        spread = self.sigma.to(noise.dtype)[mode].unsqueeze(-1) * noise
        return (self.means.to(noise.dtype)[mode] + spread).to(self.means.dtype)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"n_modes={self.means.shape[0]}, dim={self.dim}"

    def _log_masses(self) -> Tensor:
        """Return ``log(w_k sigma_k^d)``, in float64: what a mode weighs, but for (2 pi)^(d/2)."""
        return float64(self.log_weights) + self.dim * float64(self.sigma).log()

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``x - mu_k``, ``sigma_k^-2``, and the logarithms of the terms of the sum."""
        centred = x.unsqueeze(-2) - self.means.to(x.dtype)
        precision = self.sigma.to(x.dtype) ** -2
        return (
            centred,
            precision,
            self.log_weights.to(x.dtype) - 0.5 * precision * (centred.square().sum(-1)),
        )

    def _energy(self, x: Tensor) -> Tensor:
        return -self._parts(x)[2].logsumexp(-1)

    def _grad(self, x: Tensor) -> Tensor:
        centred, precision, log_terms = self._parts(x)
        return ((log_terms.softmax(-1) * precision).unsqueeze(-1) * centred).sum(-2)


class DoubleWellEnergy(ClosedForm):
    r"""Two wells and a barrier: :math:`E(x) = b\,(x_0^2-1)^2 + \tfrac12\sum_{i\ge1} x_i^2`.

    .. math:: Z(T) = \tfrac\pi2 e^{-z}\bigl(I_{1/4}(z) + I_{-1/4}(z)\bigr) (2\pi T)^{(d-1)/2},
        \qquad z = \tfrac{b}{2T}

    Args:
        barrier: :math:`b`, the energy at 0 above that of the wells at -1 and 1.
        dim: number of coordinates; all but the first are harmonic.

    Raises:
        ValueError: if ``barrier`` is not positive or ``dim`` is below one.

    Source:
        Hänggi, Talkner & Borkovec 1990, "Reaction-rate theory: fifty years after Kramers".

    Example:
        >>> energy = DoubleWellEnergy(barrier=5.0)
        >>> energy(torch.tensor([[0.0], [1.0]]))
        tensor([5., 0.])
        >>> round(energy.mean_first_passage_time(), 2), round(energy.kramers_time(), 2)
        (36.48, 32.97)
    """

    def __init__(self, barrier: float | int, dim: int = 1) -> None:
        super().__init__()
        require_positive("barrier", barrier)
        require_count("dim", dim, least=1)
        self.barrier = float(barrier)
        self.dim = dim
        # Says where samples live and of which dtype they are, and follows `.to`.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def log_z(self, temperature: float | int = 1.0) -> float:
        """Return the exact logarithm of the partition function, computed in float64."""
        require_positive("temperature", temperature)
        z = self.barrier / (2 * temperature)
        well = math.log(math.pi / 2 * (ive(0.25, z) + ive(-0.25, z)))
        return well + (self.dim - 1) / 2 * math.log(2 * math.pi * temperature)

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n_points dim"]:
        """Draw ``n`` independent points at temperature 1, ``(n, dim)``.

        The first coordinate comes from its distribution function, tabulated at 20,001 points and
        inverted between them by a straight line: a law that is off by less than 1e-7.
        """
        noise = normal(n, self.like, generator, self.dim)
        # A uniform number of float32 is 0 once in 16 million draws, and that is no point of a well.
        exact = float64(noise).dtype
        uniform = torch.rand(n, generator=generator, device=noise.device, dtype=exact)
        places, density = self._density(temperature=1.0)
        cumulated = cumulative_simpson(density, x=places, initial=0)
        first = np.interp(uniform.cpu().numpy() * cumulated[-1], cumulated, places)
        noise[:, 0] = torch.from_numpy(first).to(noise)
        return noise.to(self.like.dtype)

    def mean_first_passage_time(
        self, start: float | int = -1.0, end: float | int = 1.0, temperature: float | int = 1.0
    ) -> float:
        r"""Return the exact mean time from ``start`` until the first coordinate reaches ``end``.

        .. math:: \tau = \frac1T \int_{\mathrm{start}}^{\mathrm{end}} e^{E(y)/T}
            \int_{-\infty}^{y} e^{-E(z)/T}\,dz\,dy

        Time is that of :math:`dx = -\nabla E\,dt + \sqrt{2T}\,dW`: steps of a sampler times its
        step size. Simpson's rule, with a relative error below 1e-7.

        Raises:
            ValueError: if ``end`` is not above ``start``, the temperature is not positive, or the
                energy on the way exceeds 700 temperatures.
        """
        require_positive("temperature", temperature)
        if not -math.inf < start < end < math.inf:
            raise ValueError(f"`end` must be above `start`; got {start} to {end}.")
        highest = float(self._energy(torch.tensor([[start], [end]], dtype=torch.float64)).max())
        if max(highest, self.barrier) > 700 * temperature:
            raise ValueError(
                f"the time from {start} to {end} overflows at temperature {temperature}."
            )
        edge = self._edge(temperature)
        below, density = self._density(temperature, low=min(-edge, start), high=start)
        path, along = self._density(temperature, low=start, high=end)
        inner = simpson(density, x=below) + cumulative_simpson(along, x=path, initial=0)
        return float(simpson(inner / along, x=path)) / temperature

    def kramers_time(self, temperature: float | int = 1.0) -> float:
        r"""Return Kramers' approximation of the time over the barrier, good where :math:`b \gg T`.

        .. math:: \tau \approx \frac{2\pi}{\sqrt{E''(1)\,|E''(0)|}} e^{b/T}, \qquad
            E''(1) = 8b,\quad E''(0) = -4b
        """
        require_positive("temperature", temperature)
        if self.barrier > 700 * temperature:
            raise ValueError(f"Kramers' time overflows at temperature {temperature}.")
        curvatures = 8 * self.barrier * 4 * self.barrier
        return 2 * math.pi / math.sqrt(curvatures) * math.exp(self.barrier / temperature)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"barrier={self.barrier}, dim={self.dim}"

    def _edge(self, temperature: float) -> float:
        return math.sqrt(1 + math.sqrt(_FAR * temperature / self.barrier))

    def _density(
        self, temperature: float, low: float | None = None, high: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return places and ``exp(-E / T)`` of the first coordinate there, in float64."""
        edge = self._edge(temperature)
        places = np.linspace(-edge if low is None else low, edge if high is None else high, 20_001)
        return places, np.exp(-self.barrier / temperature * (places**2 - 1) ** 2)

    def _energy(self, x: Tensor) -> Tensor:
        well = self.barrier * (x[..., 0].square() - 1).square()
        return well + 0.5 * x[..., 1:].square().sum(-1)

    def _grad(self, x: Tensor) -> Tensor:
        first = x[..., :1]
        return torch.cat([4 * self.barrier * first * (first.square() - 1), x[..., 1:]], dim=-1)


class GridEnergy2D(ClosedForm):
    r"""Any energy of the plane, a network's too, with its answers from a table of midpoints.

    .. math:: Z(T) \approx \Delta_0\Delta_1 \sum_{ij} e^{-E(x_{ij})/T}

    The midpoint rule is off by :math:`O(\Delta^2)`, and by far less where the density is smooth and
    vanishes at the border: then the error falls exponentially with the number of cells. What lies
    outside the box is missing. Samples are uniform within their cell, which adds
    :math:`\Delta_i^2/12` to the variance of coordinate i.

    Args:
        energy: from points ``(n, 2)`` to energies. It is read at construction; make a new table
            when its parameters have changed.
        low: lower left corner of the box, one number or a pair.
        high: upper right corner.
        n: cells along each axis.
        dtype: of the table and of samples.
        device: of the points handed to ``energy``.

    Raises:
        TypeError: if ``energy`` cannot be called.
        ValueError: if the box is empty, or an energy in it is NaN.

    Source:
        Article 6612: in two dimensions, and only there, what it calls intractable is a sum.

    Example:
        >>> exact = GaussianMixtureEnergy.ring()
        >>> table = GridEnergy2D(exact, -8.0, 8.0, 200)
        >>> abs(table.log_z() - exact.log_z()) < 1e-6
        True
    """

    def __init__(
        self,
        energy: Energy,
        low: float | int | tuple[float | int, float | int],
        high: float | int | tuple[float | int, float | int],
        n: int = 256,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        require_energy(energy)
        require_count("n", n, least=1)
        corners = [pair if isinstance(pair, tuple) else (pair, pair) for pair in (low, high)]
        if not all(-math.inf < a < b < math.inf for a, b in zip(*corners, strict=True)):
            raise ValueError(f"`high` must be above `low` on both axes; got {low} to {high}.")
        self.dim, self.n, self.of = 2, n, energy
        self.register_buffer("low", torch.tensor(corners[0], dtype=dtype, device=device))
        self.register_buffer("high", torch.tensor(corners[1], dtype=dtype, device=device))
        with torch.no_grad():
            parts = [energy_values(energy, part) for part in self.points().split(CHUNK)]
        table = torch.cat(parts).reshape(n, n)
        if table.isnan().any():
            raise ValueError("`energy` is NaN at a point of the box.")
        self.register_buffer("table", table)

    def points(self) -> Float[Tensor, "n_cells 2"]:
        """Return the midpoints of all cells, ``(n * n, 2)``; the second coordinate runs faster."""
        low, high = (corner.to(wide_dtype(corner.dtype)) for corner in (self.low, self.high))
        place = (torch.arange(self.n, device=low.device, dtype=low.dtype) + 0.5) / self.n
        axes = [a + (b - a) * place for a, b in zip(low, high, strict=True)]
        return torch.cartesian_prod(*axes)

    def probs(self, temperature: float | int = 1.0) -> Float[Tensor, "n n"]:
        """Return the probability of each cell, ``(n, n)``, in the order of ``points``."""
        require_positive("temperature", temperature)
        log_terms = -float64(self.table).flatten() / temperature
        return log_terms.softmax(0).reshape(self.n, self.n).to(self.table.dtype)

    def log_z(self, temperature: float | int = 1.0) -> float:
        """Return the logarithm of the midpoint sum, added up in float64."""
        require_positive("temperature", temperature)
        cell = ((float64(self.high) - float64(self.low)) / self.n).prod()
        log_terms = -float64(self.table).flatten() / temperature
        return float(log_terms.logsumexp(0) + cell.log())

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n_points 2"]:
        """Draw ``n`` independent points at temperature 1, ``(n, 2)``: a cell, a place in it."""
        require_count("n", n)
        wide = wide_dtype(self.low.dtype)
        cell = categorical(-float64(self.table).flatten(), n, generator)
        inside = torch.rand(n, 2, generator=generator, dtype=wide, device=self.low.device)
        place = torch.stack([cell // self.n, cell % self.n], dim=-1) + inside
        low, high = self.low.to(wide), self.high.to(wide)
        return (low + (high - low) * place / self.n).to(self.low.dtype)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"low={self.low.tolist()}, high={self.high.tolist()}, n={self.n}"

    def _energy(self, x: Tensor) -> Tensor:
        return energy_values(self.of, x)

    def _grad(self, x: Tensor) -> Tensor:
        with frozen(self.of):
            return energy_and_gradient(self.of, x)[1]


def _midpoint_log_z(
    energy: ClosedForm, low: Tensor, high: Tensor, counts: list[int], temperature: float
) -> float:
    """Return the logarithm of the midpoint sum over a box in float64."""
    steps = [(b - a) / m for a, b, m in zip(low.tolist(), high.tolist(), counts, strict=True)]
    axes = [
        a + step * (torch.arange(m, device=low.device, dtype=low.dtype) + 0.5)
        for a, step, m in zip(low.tolist(), steps, counts, strict=True)
    ]
    points = torch.cartesian_prod(*axes).reshape(-1, len(counts))
    log_terms = torch.cat([-energy.energy(part) / temperature for part in points.split(CHUNK)])
    return float(log_terms.logsumexp(0)) + sum(map(math.log, steps))


def _require_positive_definite(name: str, matrix: Tensor) -> None:
    wide = float64(matrix.detach())
    symmetric = torch.allclose(wide, wide.mT, rtol=1e-5, atol=1e-8)
    if not symmetric or int(torch.linalg.cholesky_ex(wide).info) != 0:
        raise ValueError(f"`{name}` must be a symmetric positive definite matrix.")
