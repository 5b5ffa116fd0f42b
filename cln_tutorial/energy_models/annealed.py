"""Langevin dynamics whose noise or temperature falls, and the denoising step at its end.

Source: Song & Ermon 2019 (arXiv 1907.05600); article 6612 and its readers ask for the last step.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.energy_models._chains import Backend, of_wide_points
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
from cln_tutorial.energy_models.samplers import langevin_sample
from cln_tutorial.energy_models.steps import PerChain, to_chains


class AnnealedLangevin:
    r"""Run Langevin dynamics down a ladder of noise levels, or of temperatures.

    .. math:: x' = x - h_i \nabla E_i(x) + \sqrt{2 h_i T_i}\,\xi

    With ``sigmas``, :math:`E_i` is the energy of the data blurred by noise :math:`\sigma_i`, and
    :math:`T_i = 1`. With ``temperatures``, :math:`E` is the same on all levels. A level starts
    where the one before ended: the first ones find the modes, the last ones their shape.

    Args:
        sigmas: noise levels, above 0, falling. The energy is called as ``energy(x, sigma)``.
        temperatures: falling, above 0, the last one usually 1. The energy is ``energy(x)``.
        steps_per_level: at least 1.
        step_size: ``h`` of the last level.
        step_rule: "ncsn" makes the step grow with the blur,
            :math:`h_i = h\,(\sigma_i / \sigma_{last})^2`; "fixed" takes the same on all levels, as
            temperatures always do.
        denoise: with ``sigmas``, end with :func:`tweedie`, which removes the last blur.

    Raises:
        ValueError: unless one ladder is given, and falls; for a step rule that is not known, a
            step that is not positive, or "ncsn" steps where the ladder has no sigmas.

    Source:
        Song & Ermon 2019, algorithm 1, where the step is ``alpha = 2 h``.

    Example:
        >>> from cln_tutorial.energy_models.annealed import AnnealedLangevin
        >>> blurred = lambda x, sigma: x.square().sum(1) / (2 * (1 + sigma**2))  # of N(0, 1)
        >>> ladder = AnnealedLangevin([3.0, 1.0, 0.3], steps_per_level=50, step_size=0.05)
        >>> x = ladder.sample(blurred, torch.zeros(2000, 1), seed=0)
        >>> 0.8 < x.var() < 1.1  # 1 / 1.09 + O(h)
        tensor(True)
    """

    def __init__(
        self,
        sigmas: Sequence[float | int] | None = None,
        *,
        temperatures: Sequence[float | int] | None = None,
        steps_per_level: int,
        step_size: float | int,
        step_rule: Literal["ncsn", "fixed"] = "ncsn",
        denoise: bool = True,
    ) -> None:
        if (sigmas is None) == (temperatures is None):
            raise ValueError("give `sigmas` or `temperatures`, one of them.")
        name, levels = ("sigmas", sigmas) if sigmas is not None else ("temperatures", temperatures)
        self.levels = [float(level) for level in levels]
        for level in self.levels:
            require_positive(name, level)
        if not self.levels or any(a <= b for a, b in itertools.pairwise(self.levels)):
            raise ValueError(f"`{name}` must fall from level to level; got {self.levels}.")
        require_count("steps_per_level", steps_per_level, 1)
        require_positive("step_size", step_size)
        if step_rule not in ("ncsn", "fixed"):
            raise ValueError(f"`step_rule` must be ncsn or fixed; got {step_rule!r}.")
        self.has_sigmas = sigmas is not None
        self.steps_per_level, self.denoise = steps_per_level, denoise
        grows = self.has_sigmas and step_rule == "ncsn"
        last = self.levels[-1]
        self.step_sizes = [
            step_size * (level / last) ** 2 if grows else float(step_size) for level in self.levels
        ]

    def sample(
        self,
        energy: Callable[..., Tensor],
        x0: Float[Tensor, "n *event"],
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        first_chain: int = 0,
        chunk_size: int | None = None,
        backend: Backend = "auto",
    ) -> Float[Tensor, "n *event"]:
        """Run all levels, and remove the last blur.

        Args:
            energy: ``energy(x, sigma)`` with sigma a number, or ``energy(x)`` for temperatures.
            x0: where the chains start, ``(n, *event)``: broad, as the first level is.
            seed: key of the noise, at least 0.
            generator: draws the seed, once; without both the global one does.
            first_chain: the number of the first chain.
            chunk_size: evaluate the energy on so many points at once.
            backend: "reference", "numba" or "auto", as in ``langevin_sample``.

        Returns:
            ``(n, *event)``, detached, of dtype and device of ``x0``.

        Raises:
            TypeError: if the energy cannot be called, or ``x0`` is not floating.
            ValueError: as ``langevin_sample``.
            DivergenceError: for a gradient that is not finite.
        """
        require_energy(energy)
        require_points("x0", x0)
        seed = choose_seed(seed, generator)
        # Half types stay float32 from level to level, too.
        x = x0.detach().to(wide_dtype(x0.dtype))
        with frozen(energy):  # at a level a network cannot be seen any more
            for i, (level, step_size) in enumerate(zip(self.levels, self.step_sizes, strict=True)):
                x = langevin_sample(
                    _at_level(energy, level) if self.has_sigmas else energy,
                    x,
                    step_size,
                    self.steps_per_level,
                    temperature=1.0 if self.has_sigmas else level,
                    seed=seed,
                    first_chain=first_chain,
                    first_step=i * self.steps_per_level,
                    chunk_size=chunk_size,
                    backend=backend,
                )
            if self.has_sigmas and self.denoise:
                x = tweedie(_at_level(energy, level), x, level, chunk_size=chunk_size)
        return x.to(x0.dtype)


def tweedie(
    energy: Energy,
    x: Float[Tensor, "n *event"],
    sigma: PerChain,
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, "n *event"]:
    r"""Return the mean of the clean point behind a noisy one: :math:`x - \sigma^2 \nabla E(x)`.

    It is exact where :math:`e^{-E}` is the density of clean points plus noise
    :math:`N(0, \sigma^2 I)` (Tweedie's formula).

    Args:
        energy: of the *noisy* points, from ``(n, *event)`` to ``(n,)``.
        x: noisy points, ``(n, *event)``, floating; not modified.
        sigma: standard deviation of the noise, above 0; a number or one per point ``(n,)``.
        chunk_size: evaluate the energy on so many points at once.

    Returns:
        Shape, dtype and device of ``x``, detached.

    Raises:
        TypeError: if the energy cannot be called, or ``x`` is not floating.
        ValueError: if ``sigma`` is not positive.

    Source:
        Robbins 1956; Efron 2011, "Tweedie's formula and selection bias".

    Example:
        >>> from cln_tutorial.energy_models.annealed import tweedie
        >>> noisy = lambda x: x.square().sum(1) / (2 * (4 + 1))  # clean N(0, 4) and noise N(0, 1)
        >>> tweedie(noisy, torch.tensor([[5.0]]), sigma=1.0)  # shrunk by 4 / 5
        tensor([[4.]])
    """
    require_energy(energy)
    require_points("x", x)
    require_positive("sigma", sigma)
    if isinstance(sigma, Tensor) and sigma.shape != x.shape[:1]:
        raise ValueError(
            f"`sigma` must be a number or hold one per point, shape ({x.shape[0]},); "
            f"got {tuple(sigma.shape)}."
        )
    wide = x.detach().to(wide_dtype(x.dtype))
    if isinstance(sigma, Tensor):
        sigma = to_chains(sigma.detach().to(wide), wide)
    if not len(x):
        return x.detach().clone()
    with frozen(energy):
        seen = of_wide_points(energy)
        parts = [energy_and_gradient(seen, part)[1] for part in wide.split(chunk_size or len(x))]
    return (wide - sigma**2 * torch.cat(parts)).to(x.dtype)


def _at_level(energy: Callable[..., Tensor], sigma: float) -> Energy:
    wide = of_wide_points(energy)
    return lambda x: wide(x, sigma)
