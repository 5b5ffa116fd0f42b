r"""A network as an energy, on a fixed Gaussian that makes its partition function finite.

.. math:: E_\theta(x) = f_\theta(x) + \frac{\|x - \mu\|^2}{2 s^2}

Source: article 6612; Du & Mordatch 2019 (arXiv 1903.08689) for the spectral normalisation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as add_spectral_norm

from cln_tutorial.energy_models._checks import (
    energy_and_gradient,
    energy_values,
    frozen,
    require_points,
    require_positive,
)
from cln_tutorial.energy_models.energies import GaussianEnergy
from cln_tutorial.energy_models.samplers import SampleOutput, langevin_sample

_NORMED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class EnergyModel(nn.Module):
    r"""The energy of a network plus one that is fixed.

    .. math:: E(x) = f(x) + E_0(x), \qquad p(x) = e^{-E(x)} / Z

    A network that grows more slowly than a parabola, as one with SiLU does, leaves Z infinite
    without the fixed part: nothing could be normalised, and chains would run away.

    Args:
        net: from ``(n, *event)`` to ``(n,)`` or ``(n, 1)``.
        base: the fixed energy, with ``.sample(n, generator)``, as :class:`.GaussianEnergy`; it
            serves as the base of :func:`.ais_log_partition`, too.

    Source:
        Article 6612; the fixed Gaussian after Xie et al. 2016 (arXiv 1602.03264).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))
        >>> model = EnergyModel.from_net(net, mean=torch.zeros(2), std=0.5)
        >>> model(torch.zeros(8, 2)).shape
        torch.Size([8])
        >>> model.sample(100, step_size=0.01, n_steps=20, seed=0).shape
        torch.Size([100, 2])
    """

    def __init__(self, net: nn.Module, base: nn.Module | None = None):
        super().__init__()
        self.net, self.base = net, base

    @classmethod
    def from_net(
        cls,
        net: nn.Module,
        base: str | None = "gaussian",
        spectral_norm: bool = False,
        *,
        mean: Float[Tensor, " dim"] | None = None,
        std: float | int = 1.0,
    ) -> "EnergyModel":
        """Put a network on a Gaussian.

        Args:
            net: from ``(n, dim)`` to ``(n,)`` or ``(n, 1)``. One for images begins with
                ``nn.Unflatten(1, (channels, height, width))``.
            base: "gaussian", or ``None`` for the network alone.
            spectral_norm: hold the largest singular value of each linear and convolutional layer
                at 1. The layers of ``net`` itself are changed, as torch's ``spectral_norm`` does.
            mean: of the Gaussian, ``(dim,)``; that of the data is a good one.
            std: of the Gaussian, in each coordinate; it should cover the data.

        Raises:
            ValueError: for another base, a Gaussian without a mean, or a ``std`` not above 0.
        """
        if base not in ("gaussian", None):
            raise ValueError(f"`base` must be 'gaussian' or None; got {base!r}.")
        if base == "gaussian" and mean is None:
            raise ValueError("`mean` must be given, (dim,), for a 'gaussian' base; got None.")
        require_positive("std", std)
        if spectral_norm:
            for layer in [each for each in net.modules() if isinstance(each, _NORMED)]:
                add_spectral_norm(layer)
        return cls(net, None if base is None else GaussianEnergy(mean, std**-2))

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, " n"]:
        """Return the energies ``(n,)`` of points ``(n, *event)``, differentiable in all."""
        values = energy_values(self.net, x)
        return values if self.base is None else values + self.base(x)

    def score(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        r"""Return :math:`\nabla \log p(x) = -\nabla E(x)`, of the shape of ``x``, without a graph.

        Layers stay in the mode, training or evaluation, in which they are.

        Raises:
            TypeError: if ``x`` is not floating.
        """
        require_points("x", x)
        with frozen(self):
            return -energy_and_gradient(self, x)[1]

    def log_prob(
        self, x: Shaped[Tensor, "..."], log_z: float | int | Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        r"""Return :math:`-E(x) - \log Z` in nats, ``(n,)``.

        Args:
            x: points ``(n, *event)``.
            log_z: from :func:`.ais_log_partition`. Its forward estimate is too low on average,
                which flatters the model: report what the upper bound gives as well.

        Raises:
            TypeError: if ``x`` is not floating.
        """
        require_points("x", x)
        return -self(x) - log_z

    def sample(
        self,
        n: int,
        step_size: float | int,
        n_steps: int,
        *,
        x0: Shaped[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Tensor | SampleOutput:
        """Run Langevin chains, in evaluation mode, from the base or from ``x0``.

        Args:
            n: number of chains.
            step_size: of :func:`.langevin_sample`.
            n_steps: of each chain.
            x0: where they start, ``(n, *event)``; exact samples of the base if not given.
            generator: of all randomness; or
            seed: instead of it.
            options: the others of :func:`.langevin_sample`.

        Returns:
            The states ``(n, *event)``, or what the options ask for.

        Raises:
            ValueError: if there is neither a base nor ``x0``, or for a generator and a seed.
        """
        if generator is not None and seed is not None:
            raise ValueError("give `seed` or `generator`, not both.")
        if x0 is None:
            if self.base is None:
                raise ValueError("`x0` must be given: the model has no base to start from.")
            if seed is not None:
                device = next(self.base.buffers()).device
                generator, seed = torch.Generator(device).manual_seed(seed), None
            x0 = self.base.sample(n, generator=generator)
        elif len(x0) != n:
            raise ValueError(f"`x0` must have `n` = {n} points; got {len(x0)}.")
        with evaluating(self):
            return langevin_sample(
                self, x0, step_size, n_steps, generator=generator, seed=seed, **options
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all layers into evaluation mode, and each one back into its own."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
