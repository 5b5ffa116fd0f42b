r"""A restricted Boltzmann machine small enough to be summed up.

Source: Salakhutdinov & Murray 2008, "On the quantitative analysis of deep belief networks".
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial.energy_models._checks import require_count, require_positive
from cln_tutorial.energy_models._closed_form import (
    CHUNK,
    ClosedForm,
    categorical,
    float64,
    matmul,
)

_MOST_UNITS = 24  # 2^24 states take seconds, and are what `torch.multinomial` accepts


class RBMEnergy(ClosedForm):
    r"""Free energy of a restricted Boltzmann machine over its visible units, 0 or 1.

    .. math:: E(v) = -b^\top v - \sum_j \log\bigl(1 + e^{c_j + (W^\top v)_j}\bigr)

    It sums out the hidden units of :math:`-b^\top v - c^\top h - v^\top W h`. A sum over all states
    of one side gives Z, whichever side. ``grad`` is that of the same formula for real :math:`v`.

    Args:
        weights: :math:`W`, ``(n_visible, n_hidden)``, floating.
        visible_bias: :math:`b`, ``(n_visible,)``; None stands for zeros.
        hidden_bias: :math:`c`, ``(n_hidden,)``; None stands for zeros.

    Raises:
        TypeError: for tensors that are not floating.
        ValueError: for other shapes.

    Source:
        Salakhutdinov & Murray 2008, "On the quantitative analysis of deep belief networks".

    Example:
        >>> energy = RBMEnergy(torch.zeros(3, 2))
        >>> energy(torch.ones(1, 3))  # - 2 log 2
        tensor([-1.3863])
        >>> round(energy.log_z(), 4)  # 5 log 2
        3.4657
    """

    def __init__(
        self,
        weights: Shaped[Tensor, "*shape"],
        visible_bias: Shaped[Tensor, "..."] | None = None,
        hidden_bias: Shaped[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__()
        require_floating("weights", weights)
        if weights.ndim != 2 or 0 in weights.shape:
            raise ValueError(
                f"`weights` must be of shape (n_visible, n_hidden); got {tuple(weights.shape)}."
            )
        self.dim, self.n_hidden = weights.shape
        visible_bias = weights.new_zeros(self.dim) if visible_bias is None else visible_bias
        hidden_bias = weights.new_zeros(self.n_hidden) if hidden_bias is None else hidden_bias
        for name, bias, n in (
            ("visible_bias", visible_bias, self.dim),
            ("hidden_bias", hidden_bias, self.n_hidden),
        ):
            require_floating(name, bias)
            if bias.shape != (n,):
                raise ValueError(f"`{name}` must be of shape ({n},); got {tuple(bias.shape)}.")
        self.register_buffer("weights", weights.detach().clone())
        self.register_buffer("visible_bias", visible_bias.detach().to(weights).clone())
        self.register_buffer("hidden_bias", hidden_bias.detach().to(weights).clone())

    def log_z(self, temperature: float | int = 1.0, *, over: str | None = None) -> float:
        r"""Return the exact :math:`\log\sum_v e^{-E(v)/T}` by enumeration, in float64.

        Args:
            temperature: of the free energy. At temperatures other than 1 the hidden side does not
                help: the sum runs over the visible one.
            over: "visible", "hidden", or None for the smaller side where that is possible.

        Raises:
            ValueError: for a side of more than 24 units, another ``over``, "hidden" at a
                temperature other than 1, or a temperature that is not positive.
        """
        require_positive("temperature", temperature)
        if over is None:
            over = "hidden" if temperature == 1 and self.n_hidden < self.dim else "visible"
        if over not in ("visible", "hidden"):
            raise ValueError(f"`over` must be 'visible', 'hidden' or None; got {over!r}.")
        if over == "hidden" and temperature != 1:
            raise ValueError(f"`over` 'hidden' needs temperature 1; got {temperature}.")
        return float((self._log_terms(over) / temperature).logsumexp(0))

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n_points dim"]:
        """Draw ``n`` independent visible states at temperature 1, ``(n, n_visible)``, of 0 and 1.

        Exact: from the table of all states of the smaller side. If that is the hidden one, the
        visible units follow given the hidden ones.
        """
        require_count("n", n)
        side = "hidden" if self.n_hidden < self.dim else "visible"
        index = categorical(self._log_terms(side), n, generator)
        states = _bits(index, min(self.n_hidden, self.dim)).to(self.weights.dtype)
        if side == "visible":
            return states
        wide = wide_dtype(self.weights.dtype)
        uniform = torch.rand(
            n, self.dim, generator=generator, dtype=wide, device=self.weights.device
        )
        return (uniform < self._visible_probs(states.to(wide))).to(self.weights.dtype)

    def gibbs_step(
        self,
        x: Shaped[Tensor, "*batch dim"],
        hidden_uniform: Shaped[Tensor, "*batch n_hidden"],
        visible_uniform: Shaped[Tensor, "*batch dim"],
    ) -> Float[Tensor, "*batch dim"]:
        """Draw all hidden units given the visible ones, then all visible given the hidden.

        A reversible step of the visible units that leaves their law at temperature 1 unchanged.

        Args:
            x: visible states, ``(*batch, n_visible)``.
            hidden_uniform: numbers uniform in (0, 1), ``(*batch, n_hidden)``.
            visible_uniform: likewise, ``(*batch, n_visible)``.

        Returns:
            New visible states, in shape and dtype of ``x``.
        """
        hidden_probs = self._hidden_inputs(self._wide(x)).sigmoid()
        hidden = (hidden_uniform < hidden_probs).to(hidden_probs.dtype)
        return (visible_uniform < self._visible_probs(hidden)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"n_visible={self.dim}, n_hidden={self.n_hidden}"

    def _hidden_inputs(self, visible: Tensor) -> Tensor:
        weights = self.weights.to(visible.dtype)
        return self.hidden_bias.to(visible.dtype) + matmul(visible, weights)

    def _visible_probs(self, hidden: Tensor) -> Tensor:
        weights = self.weights.to(hidden.dtype)
        return (self.visible_bias.to(hidden.dtype) + matmul(hidden, weights.mT)).sigmoid()

    def _log_terms(self, side: str) -> Tensor:
        """Return what each state of a side adds to Z, its logarithm, in float64; state 0 first."""
        weights, own, other = map(float64, (self.weights, self.visible_bias, self.hidden_bias))
        if side == "hidden":
            weights, own, other = weights.mT, other, own
        n = len(own)
        if n > _MOST_UNITS:
            raise ValueError(
                f"enumeration takes at most {_MOST_UNITS} {side} units; this machine has {n}."
            )
        parts = []
        for index in torch.arange(2**n, device=own.device).split(CHUNK):
            states = _bits(index, n).to(own.dtype)
            parts.append(states @ own + _softplus(other + states @ weights).sum(-1))
        return torch.cat(parts)

    def _energy(self, x: Tensor) -> Tensor:
        linear = (x * self.visible_bias.to(x.dtype)).sum(-1)
        return -linear - _softplus(self._hidden_inputs(x)).sum(-1)

    def _grad(self, x: Tensor) -> Tensor:
        weights = self.weights.to(x.dtype)
        expected = self._hidden_inputs(x).sigmoid()
        return -self.visible_bias.to(x.dtype) - matmul(expected, weights.mT)


def _softplus(x: Tensor) -> Tensor:
    # torch's own is linear from 20 on: off by 2e-9, and then without a second derivative.
    return torch.logaddexp(x, torch.zeros_like(x))


def _bits(index: Tensor, n: int) -> Tensor:
    """Return the ``n`` lowest binary digits of whole numbers, along a new last axis."""
    return (index.unsqueeze(-1) >> torch.arange(n, device=index.device)) & 1
