"""What energies with known answers share: the check of points, exact arithmetic, random draws."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial.energy_models._checks import require_count

CHUNK = 2**16  # points or states looked at in one go


class ClosedForm(nn.Module):
    """What the energies share: the check of points, and half types held in float32."""

    dim: int

    def energy(self, x: Shaped[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        r"""Return :math:`E(x)`, one value per point; half types are computed in float32.

        Args:
            x: points, ``(*batch, dim)``, any floating dtype.

        Returns:
            ``(*batch,)``, in the dtype of ``x``.

        Raises:
            TypeError: if ``x`` is not floating.
            ValueError: if the last axis of ``x`` is not of length ``dim``.
        """
        return self._energy(self._wide(x)).to(x.dtype)

    def grad(self, x: Shaped[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        r"""Return the closed form of :math:`\nabla E(x)`; arguments as in ``energy``.

        Returns:
            Shape and dtype of ``x``.
        """
        return self._grad(self._wide(x)).to(x.dtype)

    def forward(self, x: Shaped[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Return ``energy(x)``."""
        return self.energy(x)

    def _energy(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _grad(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _wide(self, x: Tensor) -> Tensor:
        require_floating("x", x)
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"`x` must be points of {self.dim} coordinates, shape (n, {self.dim}); "
                f"got {tuple(x.shape)}."
            )
        return x.to(wide_dtype(x.dtype))


def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    # Under autocast a product of matrices would be rounded to a half type.
    with torch.autocast(x.device.type, enabled=False):
        return x @ matrix


def float64(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.to(torch.float64)


def normal(
    n: int, like: Tensor, generator: torch.Generator | None, dim: int | None = None
) -> Tensor:
    require_count("n", n)
    shape = (n, like.shape[-1] if dim is None else dim)
    dtype = wide_dtype(like.dtype)
    return torch.randn(shape, generator=generator, dtype=dtype, device=like.device)


def categorical(log_terms: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``n`` indices, with the probabilities of ``exp(log_terms)``."""
    if n == 0:
        return torch.zeros(0, dtype=torch.long, device=log_terms.device)
    return torch.multinomial(log_terms.softmax(0), n, replacement=True, generator=generator)
