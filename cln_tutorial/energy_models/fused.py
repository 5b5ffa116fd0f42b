"""All steps of all chains in one compiled loop, for energies with a closed form (extra ``fast``).

The noise has the same counters as that of the reference, so both follow the same paths, apart
from rounding.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.energy_models._checks import HAS_NUMBA, Energy
from cln_tutorial.energy_models.energies import (
    DoubleWellEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
)
from cln_tutorial.energy_models.philox import require_counter
from cln_tutorial.energy_models.steps import PerChain, matched_noise_scale

Method = Literal["ula", "mala", "baoab"]


@dataclass(frozen=True)
class FusedOutput:
    """Where the chains are, and what was counted and kept on the way.

    Args:
        x: ``(n, dim)``, the last states.
        v: ``(n, dim)``, the last velocities of BAOAB; of other methods None.
        accepted: ``(n,)``, how many proposals of MALA each chain took; of other methods all steps.
        trajectory: ``(n_kept, n, dim)``, the states after ``thin``, ``2 thin``, ... steps, or None.
        energy: ``(n_kept, n)``, their energies, or None.
        n_nonfinite_start: chains that start where energy or gradient is not finite.
        n_nonfinite: energies or gradients that were not finite, over all steps and chains.
        n_grad: evaluations of the gradient per chain.
    """

    x: Float[Tensor, "n dim"]
    v: Float[Tensor, "n dim"] | None
    accepted: Int[Tensor, "n"]
    trajectory: Float[Tensor, "n_kept n dim"] | None
    energy: Float[Tensor, "n_kept n"] | None
    n_nonfinite_start: int
    n_nonfinite: int
    n_grad: int


def supports(energy: Energy, x: Float[Tensor, "n *event"], method: str) -> bool:
    """Return True if ``run`` can do it: float32 on a CPU, and a closed form that it knows."""
    if not HAS_NUMBA or values_are_hidden() or method not in ("ula", "mala", "baoab"):
        return False
    # A subclass may be another energy.
    if type(energy) not in (GaussianMixtureEnergy, GaussianEnergy, DoubleWellEnergy):
        return False
    if isinstance(energy, GaussianEnergy) and energy.precision.ndim > 1:
        return False
    places = {x.device.type, *(b.device.type for b in energy.buffers())}
    return x.dtype == torch.float32 and places == {"cpu"} and x.shape[1:] == (energy.dim,)


def run(
    method: Method,
    energy: GaussianMixtureEnergy | GaussianEnergy | DoubleWellEnergy,
    x: Float[Tensor, "n dim"],
    *,
    step_size: PerChain,
    n_steps: int,
    seed: int,
    noise_scale: PerChain | None = None,
    temperature: PerChain = 1.0,
    friction: float | int = 1.0,
    v: Float[Tensor, "n dim"] | None = None,
    first_chain: int = 0,
    first_step: int = 0,
    thin: int = 1,
    keep: bool = False,
) -> FusedOutput:
    """Take ``n_steps`` steps of a method with the noise of ``(seed, step, chain)``.

    Args:
        method: "ula" takes ``noise_scale``, "mala" ``temperature``, "baoab" ``temperature``,
            ``friction`` and the velocities ``v``.
        energy: one for which ``supports`` returns True.
        x: first states; not modified.
        step_size: a number, or one per chain ``(n,)``, as are noise scale and temperature.
        n_steps: how many steps.
        seed: key of the noise.
        noise_scale: standard deviation of the noise; None is the matched one.
        temperature: above 0.
        friction: per unit of time.
        v: first velocities; not modified.
        first_chain: number of the first chain.
        first_step: number of the first step.
        thin: keep one state of ``thin``, which divides ``n_steps``.
        keep: return the states kept and their energies.

    Returns:
        What was found and kept.

    Raises:
        ValueError: if steps or chains are too many for their counters.
    """
    from cln_tutorial.energy_models.numba_loops import BAOAB, MALA, ULA, simulate

    require_counter(seed, first_step + max(n_steps - 1, 0), len(x), 0, first_chain)
    code = {"ula": ULA, "mala": MALA, "baoab": BAOAB}[method]
    h, t = (
        torch.as_tensor(r, device="cpu").double().expand(len(x)) for r in (step_size, temperature)
    )
    if method == "baoab":
        decay = -friction * h
        rates = 0.5 * h, decay.exp(), (-t * (2 * decay).expm1()).sqrt()
    else:
        rates = h, matched_noise_scale(h, t) if noise_scale is None else noise_scale, 1 / t
    table = x.new_empty(3, len(x))
    for row, rate in zip(table, rates, strict=True):
        row.copy_(torch.as_tensor(rate, device="cpu"))
    x = x.detach().clone(memory_format=torch.contiguous_format)
    v = (
        torch.zeros_like(x)
        if v is None
        else v.detach().clone(memory_format=torch.contiguous_format)
    )
    kept = n_steps // thin if keep else 0
    frames, energies = x.new_empty(kept, *x.shape), x.new_empty(kept, len(x))
    accepted, lost = simulate(
        code,
        _model(energy),
        (x, v, frames, energies),
        table,
        thin,
        (seed, first_chain, first_step, n_steps),
    )
    return FusedOutput(
        x,
        v if method == "baoab" else None,
        accepted if method == "mala" else torch.full_like(accepted, n_steps),
        frames if keep else None,
        energies if keep else None,
        *lost.sum(1).tolist(),
        n_steps + 1,
    )


def _model(energy: Energy) -> tuple[int, Tensor, Tensor, Tensor]:
    """The kind of an energy, its centres, precisions ``(k, dim)`` and offsets ``(k,)``."""
    from cln_tutorial.energy_models.numba_loops import DOUBLE_WELL, MIXTURE

    if isinstance(energy, DoubleWellEnergy):
        nothing = torch.empty(0, energy.dim, dtype=torch.float32, device="cpu")
        barrier = nothing.new_tensor([energy.barrier])
        return DOUBLE_WELL, nothing, nothing, barrier
    if isinstance(energy, GaussianEnergy):
        parts = energy.mean[None], energy.precision[None], energy.mean.new_zeros(1)
    else:
        precisions = energy.sigma.float()[:, None] ** -2
        parts = energy.means, precisions.expand_as(energy.means), energy.log_weights
    return MIXTURE, *(p.detach().float().contiguous() for p in parts)
