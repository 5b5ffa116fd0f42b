"""What the samplers share: their output, the checked arguments of a run, and what it keeps.

Source: Hoffman & Gelman 2014 for the adaptation of a step.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.energy_models._checks import (
    DivergenceError,
    Energy,
    choose_seed,
    energy_and_gradient,
    has_closed_form,
    require_count,
    require_energy,
    require_points,
    require_positive,
)
from cln_tutorial.energy_models.philox import counter_normal, counter_uniform
from cln_tutorial.energy_models.steps import PerChain, Preconditioner, all_finite

Backend = Literal["auto", "reference", "numba"]
Nonfinite = Literal["raise", "reject", "ignore"]
LOOK_EVERY = 64  # steps between two looks for what is not finite: each look waits for a GPU


@dataclass(frozen=True)
class SampleInfo:
    """What happened on the way.

    Args:
        accept_rate: ``(n,)``, the share of steps that each chain took; NaN after 0 steps.
        energy: ``(n_kept, n)``, the energies of the frames that a trajectory keeps.
        n_nonfinite: how many energies or gradients were not finite, over all steps and chains.
        n_grad: evaluations of the gradient per chain, warm-up included.
        step_size: the step of the last ``n_steps``: after an adaptation, what it found.
        velocity: ``(n, *event)``, where there are velocities.
    """

    accept_rate: Float[Tensor, "n"]
    energy: Float[Tensor, "n_kept n"]
    n_nonfinite: int
    n_grad: int
    step_size: PerChain
    velocity: Float[Tensor, "n *event"] | None = None


@dataclass(frozen=True)
class SampleOutput:
    """The chains, and what was asked for beside them.

    Args:
        x: ``(n, *event)``, the last state.
        trajectory: ``(n_kept, n, *event)``, the states after ``thin``, ``2 thin``, ... steps.
        info: what happened on the way.
    """

    x: Float[Tensor, "n *event"]
    trajectory: Float[Tensor, "n_kept n *event"] | None = None
    info: SampleInfo | None = None

    def to_arviz_dict(self) -> dict[str, Any]:
        """Return ``{"x": array (chains, draws, *event)}``, the order that ArviZ wants.

        Raises:
            ValueError: if no trajectory was kept.
        """
        if self.trajectory is None:
            raise ValueError("there is no trajectory: sample with `return_trajectory=True`.")
        return {
            "x": self.trajectory.transpose(0, 1).to(wide_dtype(self.trajectory.dtype)).cpu().numpy()
        }


@dataclass
class Run:
    """One run of a sampler: its checked arguments, its noise, and what it keeps.

    Args:
        energy: the energy as the chains see it.
        x: the first state, of float32 at least, without gaps in memory.
        dtype: that of the result.
        n_steps: how many steps are kept or counted.
        thin: one state of so many is kept.
        seed: key of the noise.
        first_chain: number of the first chain.
        first_step: number of the first step.
        trajectory: whether states are kept.
        info: whether energies are kept.
        chunk_size: points at once in the energy; None is all.
        nonfinite: what a gradient that is not finite does.
    """

    energy: Energy
    x: Shaped[Tensor, "n *event"]
    dtype: torch.dtype
    n_steps: int
    thin: int
    seed: int
    first_chain: int
    first_step: int
    trajectory: bool
    info: bool
    chunk_size: int | None
    nonfinite: Nonfinite
    n_grad: int = 0
    frames: Tensor | list[Tensor] = field(default_factory=list)
    energies: Tensor | list[Tensor] = field(default_factory=list)

    @classmethod
    def checked(
        cls,
        energy: Energy,
        x0: Any,
        n_steps: int,
        thin: int,
        seed: int | None,
        generator: torch.Generator | None,
        first_chain: int,
        first_step: int,
        trajectory: bool,
        info: bool,
        chunk_size: int | None,
        nonfinite: Nonfinite,
    ) -> "Run":
        """Check the arguments that all samplers share, and draw the seed if there is none."""
        require_energy(energy)
        require_points("x0", x0)
        require_count("n_steps", n_steps)
        require_count("thin", thin, 1)
        if n_steps % thin:
            raise ValueError(f"`thin` must divide `n_steps`; got thin={thin}, n_steps={n_steps}.")
        require_count("first_chain", first_chain)
        require_count("first_step", first_step)
        if chunk_size is not None:
            require_count("chunk_size", chunk_size, 1)
        if nonfinite not in ("raise", "reject", "ignore"):
            raise ValueError(f"`nonfinite` must be raise, reject or ignore; got {nonfinite!r}.")
        return cls(
            of_wide_points(energy),
            x0.detach().to(wide_dtype(x0.dtype)).contiguous(),
            x0.dtype,
            n_steps,
            thin,
            choose_seed(seed, generator),
            first_chain,
            first_step,
            trajectory,
            info,
            chunk_size,
            nonfinite,
        )

    def __post_init__(self) -> None:
        """Start to count."""
        self.bad = torch.zeros((), dtype=torch.int64, device=self.x.device)
        self.taken = torch.zeros(self.x.shape[0], device=self.x.device)

    @property
    def is_idle(self) -> bool:
        """Tell that there is nothing to do."""
        return self.n_steps == 0 or self.x.shape[0] == 0

    def per_chain(self, name: str, value: PerChain) -> PerChain:
        """Check a positive number, or one for each chain."""
        require_positive(name, value)
        if not isinstance(value, Tensor):
            return float(value)
        if value.shape != self.x.shape[:1]:
            raise ValueError(
                f"`{name}` must be a number or hold one per chain, shape ({self.x.shape[0]},); "
                f"got {tuple(value.shape)}."
            )
        return value.detach().to(self.x)

    def preconditioner(self, matrix: Any, fixed: Any) -> Preconditioner | None:
        """Factor the matrix; what is fixed has no drift and no noise, which is a row of zeros."""
        x, width = self.x, math.prod(self.x.shape[1:])
        p = None
        if matrix is not None:
            if tuple(matrix.shape) not in ((width,), (width, width)):
                raise ValueError(
                    f"`preconditioner` must have shape ({width},) or ({width}, {width}) for points "
                    f"of shape {tuple(x.shape)}; got {tuple(matrix.shape)}."
                )
            p = Preconditioner.of(matrix.detach().to(x))
        if fixed is None:
            return p
        if fixed.dtype != torch.bool or fixed.shape != x.shape[1:]:
            raise ValueError(
                f"`fixed` must be a boolean mask of the shape of one point, {tuple(x.shape[1:])}; "
                f"got {fixed.dtype} of shape {tuple(fixed.shape)}."
            )
        free = (~fixed).flatten().to(x)
        p = p or Preconditioner(torch.ones_like(free), torch.ones_like(free))
        if p.matrix.ndim == 1:
            return Preconditioner(free * p.matrix, free * p.root)
        return Preconditioner(free[:, None] * p.matrix * free, free[:, None] * p.root)

    def noise(self, step: int, stream: int = 0) -> Tensor:
        """Return the normal numbers of a step of this run."""
        return counter_normal(
            self.seed,
            self.first_step + step,
            self.x.shape,
            stream=stream,
            first_chain=self.first_chain,
            dtype=self.x.dtype,
            device=self.x.device,
        )

    def uniform(self, step: int) -> Tensor:
        """Return the uniform numbers of a step of this run."""
        return counter_uniform(
            self.seed,
            self.first_step + step,
            self.x.shape[0],
            first_chain=self.first_chain,
            dtype=self.x.dtype,
            device=self.x.device,
        )

    def evaluate(self, x: Tensor, *, needs_energy: bool = True) -> tuple[Tensor, Tensor]:
        """Return energies and gradients at the points, in the dtype of the chains.

        Energies that nobody needs are zeros where the gradient has a closed form of its own.
        """
        self.n_grad += 1
        chunks = x.split(self.chunk_size or len(x))
        if has_closed_form(self.energy) and not needs_energy:
            g = torch.cat([self.energy.grad(c) for c in chunks]).to(x.dtype)  # type: ignore[attr-defined]
            e = x.new_zeros(len(x))
        else:
            parts = [energy_and_gradient(self.energy, c) for c in chunks]
            e, g = (torch.cat(part).to(x.dtype) for part in zip(*parts, strict=True))
        if g.shape != x.shape:
            raise ValueError(
                f"`energy.grad` must return gradients of the shape of the points "
                f"{tuple(x.shape)}; got {tuple(g.shape)}."
            )
        return e, g

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate where the chains start, which must be finite unless that is ignored."""
        e, g = self.evaluate(x)
        self.count_finite(e, g)
        if self.nonfinite != "ignore":
            self.raise_if_bad(0)
        return e, g

    def count_finite(self, e: Tensor, g: Tensor) -> Tensor:
        """Tell for each chain whether all is finite, and count those where it is not."""
        finite = all_finite(e, g)
        self.bad += (~finite).sum()
        return finite

    def keep(self, step: int, x: Tensor, e: Tensor) -> None:
        """Keep a state and its energies, one of ``thin``; raise if it is time to look."""
        if (step + 1) % self.thin == 0:
            if self.trajectory:
                self.frames.append(x.to(self.dtype))
            if self.info:
                self.energies.append(e)
        if self.nonfinite == "raise" and (step + 1) % LOOK_EVERY == 0:
            self.raise_if_bad(step + 1)

    def raise_if_bad(self, steps: int) -> None:
        """Raise if an energy or a gradient was not finite so far."""
        if self.bad:
            where = f"within {self.first_step + steps} steps" if steps else "where the chains start"
            raise DivergenceError(
                f"the energy or its gradient was not finite {int(self.bad)} times, {where}: the "
                f"step is too large for the energy, or the energy is not finite there. "
                f"Langevin steps can go on with nonfinite='reject' or 'ignore'."
            )

    def output(
        self, x: Tensor, step_size: PerChain, velocity: Tensor | None = None
    ) -> "Tensor | SampleOutput":
        """Return what was asked for, in the dtype of the start."""
        if self.nonfinite == "raise":
            # Of the last state nobody may have asked for the energy.
            self.bad += (~x.isfinite()).flatten(1).any(1).sum()
            self.raise_if_bad(self.n_steps)
        # The state of a run without a step is the caller's own memory.
        last = x.to(self.dtype, copy=self.is_idle)
        if not (self.trajectory or self.info):
            return last
        n_kept, n = self.n_steps // self.thin, x.shape[0]
        trajectory = info = None
        if self.trajectory:
            trajectory = _stacked(self.frames, x.new_empty(n_kept, *x.shape)).to(self.dtype)
        if self.info:
            energies = _stacked(self.energies, x.new_empty(n_kept, n))
            rate = self.taken / self.n_steps
            if velocity is not None:
                velocity = velocity.to(self.dtype, copy=self.is_idle)
            info = SampleInfo(rate, energies, int(self.bad), self.n_grad, step_size, velocity)
        return SampleOutput(last, trajectory, info)


class DualAveraging:
    """Move the logarithm of a step until the rate of acceptance is the target.

    Args:
        step_size: the first guess.
        target: the rate of acceptance.
    """

    def __init__(self, step_size: PerChain, target: float) -> None:
        self.is_shared = not isinstance(step_size, Tensor)
        self.step_size, self.target, self.count = step_size, target, 0
        self.error = self.mean_log = 0.0
        self.centre = math.log(10 * step_size) if self.is_shared else (10 * step_size).log()

    def update(self, log_ratio: Float[Tensor, "n"]) -> None:
        """Learn from the ratios of one step; the constants are those of Hoffman & Gelman."""
        rate = log_ratio.clamp(max=0).exp().nan_to_num(0.0)
        rate = rate.mean().item() if self.is_shared else rate
        self.count += 1
        share = 1 / (self.count + 10)
        self.error = (1 - share) * self.error + share * (self.target - rate)
        log = self.centre - math.sqrt(self.count) / 0.05 * self.error
        share = self.count**-0.75
        self.mean_log = (1 - share) * self.mean_log + share * log
        self.step_size = self._exp(log)

    def found(self) -> PerChain:
        """Return the average step of the whole warm-up."""
        return self._exp(self.mean_log)

    def _exp(self, log: PerChain) -> PerChain:
        return math.exp(log) if self.is_shared else log.exp()


def _stacked(kept: Tensor | list[Tensor], empty: Tensor) -> Tensor:
    """A run without a step kept nothing; a loop in numba hands on one tensor."""
    return kept if isinstance(kept, Tensor) else torch.stack(kept) if kept else empty


def of_wide_points(energy: Energy) -> Energy:
    """A network of a half type gets points of this type; its gradient comes back as float32."""
    if isinstance(energy, nn.Module) and not has_closed_form(energy):
        dtype = next((p.dtype for p in energy.parameters()), torch.float32)
        if wide_dtype(dtype) != dtype:
            return lambda x, *level: energy(x.to(dtype), *level)
    return energy
