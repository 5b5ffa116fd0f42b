"""Training an energy: chains, losses, averages of the weights, and a guard that stops.

Source: article 6612; Tieleman 2008; Nijkamp et al. 2019 (arXiv 1904.09770) for short runs.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from cln_tutorial.energy_models._checks import (
    DivergenceError,
    choose_seed,
    require_count,
    require_points,
    require_positive,
)
from cln_tutorial.energy_models.buffer import ReplayBuffer
from cln_tutorial.energy_models.losses import (
    contrastive_divergence_loss,
    denoising_score_matching_loss,
)
from cln_tutorial.energy_models.model import evaluating
from cln_tutorial.weight_averaging import ExponentialMovingAverage

_OBJECTIVES = ("pcd", "cd", "short_run", "dsm")


@dataclass(frozen=True)
class DivergenceGuard:
    """Stop a training that diverges, and leave weights that can be used.

    It looks at each step before the optimiser does: at the loss, the energies and the norm of the
    gradient. Nothing is replaced by another number. At the first one that is not finite, or an
    energy beyond the bound, it raises; the step is not taken, the chains are not written back.

    Args:
        max_energy: largest absolute energy, of data or samples. Chains that run away and networks
            that grow are seen here long before the numbers overflow.
        restore: put the average of the weights into the model, if there is one. Without it the
            model keeps the weights from before the step.

    Raises:
        ValueError: for a bound that is not above 0.

    Source:
        Article 6612 tells of a training that needs many tricks. A loss of NaN that is replaced by
        a number, as one library does, leaves gradients of NaN behind it.

    Example:
        >>> try:
        ...     DivergenceGuard().check(3, loss=0.1, largest_energy=5.0, grad_norm=float("nan"))
        ... except DivergenceError as error:
        ...     print(error)
        the training diverges at step 3: the norm of the gradient is nan.
    """

    max_energy: float | int = 1e4
    restore: bool = True

    def __post_init__(self):
        if not self.max_energy > 0:
            raise ValueError(f"`max_energy` must be above 0; got {self.max_energy}.")

    def check(self, step: int, loss: float, largest_energy: float, grad_norm: float) -> None:
        """Raise if the training diverges.

        Args:
            step: number of the step, for the message.
            loss: of the step.
            largest_energy: in absolute value, of the data and the samples.
            grad_norm: of all gradients together, before they are clipped.

        Raises:
            DivergenceError: if one of them is not finite or the energy beyond its bound.
        """
        found = {
            "the largest energy": largest_energy,
            "the loss": loss,
            "the norm of the gradient": grad_norm,
        }
        for name, value in found.items():
            if not math.isfinite(value):
                raise DivergenceError(f"the training diverges at step {step}: {name} is {value}.")
        if largest_energy > self.max_energy:
            raise DivergenceError(
                f"the training diverges at step {step}: the largest energy is {largest_energy:.4g},"
                f" beyond `max_energy` {self.max_energy:.4g}. Smaller steps of the optimiser or of "
                "the sampler help, or a small `reg`."
            )


@dataclass
class History:
    """What happened in each step: lists of equal length, one number per step.

    Attributes:
        loss: value of the objective.
        e_pos: mean energy of the data; NaN for "dsm", which needs none.
        e_neg: mean energy of the samples; NaN for "dsm".
        grad_norm: norm of all gradients together, before they are clipped.
        lr: learning rate of the first group of parameters.
        seconds: wall time of all steps together.
    """

    loss: list[float] = field(default_factory=list)
    e_pos: list[float] = field(default_factory=list)
    e_neg: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.loss)

    def append(self, loss: float, e_pos: float, e_neg: float, grad_norm: float, lr: float) -> None:
        """Add one step."""
        self.loss.append(loss)
        self.e_pos.append(e_pos)
        self.e_neg.append(e_neg)
        self.grad_norm.append(grad_norm)
        self.lr.append(lr)

    @property
    def gap(self) -> list[float]:
        """Return the mean energy of the data less that of the samples, one per step."""
        return [pos - neg for pos, neg in zip(self.e_pos, self.e_neg, strict=True)]


class EnergyTrainer:
    r"""Teach an energy by chains or by score matching.

    Objectives: "pcd" takes the chains of ``buffer`` further, "cd" starts them at the data of each
    batch, "short_run" at samples of ``model.base``; all three lower
    :func:`.contrastive_divergence_loss`. "dsm" lowers :func:`.denoising_score_matching_loss` and
    needs no chains.

    Args:
        model: the energy, as :class:`.EnergyModel`.
        optimizer: over its parameters.
        objective: "pcd", "cd", "short_run" or "dsm".
        sampler: called ``sampler(model, x0, seed=...)``, with another seed in each step, in
            evaluation mode: ``partial(langevin_sample, step_size=0.0025, n_steps=20)``.
        buffer: the persistent chains of "pcd".
        data_noise: standard deviation of Gaussian noise on the data, in their units. With it the
            data have a density at all. For "dsm" it is :math:`\sigma` of the loss.
        reg: :math:`\alpha` of the contrastive loss.
        reg_mode: of the contrastive loss.
        batch_size: data per step, and chains per step.
        ema: decay of the running average of the weights per step, or ``None`` for no average.
        max_grad_norm: gradients are clipped to this norm, or ``None``.
        scheduler: of the learning rate; it makes a step after each of the optimiser.
        guard: what stops a training that diverges; ``None`` lets it go on.
        generator: the key of the trainer's own generator is drawn from it; from the global one if
            there is neither this nor a ``seed``.
        seed: the key itself.

    Attributes:
        step: steps so far.
        history: the :class:`.History` of all of them.
        average: the :class:`~cln_tutorial.weight_averaging.ExponentialMovingAverage`, or ``None``:
            evaluate ``with trainer.average.applied(): ...``.

    Raises:
        ValueError: for an unknown objective, or one that lacks its sampler, buffer, base or noise.

    Source:
        Article 6612; Tieleman 2008 ("pcd"); Hinton 2002 ("cd"); Nijkamp et al. 2019 ("short_run");
        Vincent 2011 ("dsm").

    Example:
        >>> from functools import partial
        >>> from cln_tutorial.energy_models.model import EnergyModel
        >>> from cln_tutorial.energy_models.samplers import langevin_sample
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
        >>> model = EnergyModel.from_net(net, mean=torch.zeros(2))
        >>> trainer = EnergyTrainer(
        ...     model,
        ...     torch.optim.Adam(model.parameters(), lr=1e-3),
        ...     sampler=partial(langevin_sample, step_size=0.1, n_steps=5),
        ...     buffer=ReplayBuffer(500, (2,), init=model.base.sample, seed=0),
        ...     seed=0,
        ... )
        >>> history = trainer.fit(1 + torch.randn(1000, 2), max_steps=20, progress=False)
        >>> len(history.loss)
        20
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        objective: str = "pcd",
        sampler: Callable[..., Tensor] | None = None,
        buffer: ReplayBuffer | None = None,
        data_noise: float | int = 0.0,
        reg: float | int = 0.0,
        reg_mode: str = "sum",
        batch_size: int = 128,
        ema: float | int | None = 0.999,
        max_grad_norm: float | int | None = 1.0,
        scheduler: LRScheduler | None = None,
        guard: DivergenceGuard | None = DivergenceGuard(),
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ):
        if objective not in _OBJECTIVES:
            raise ValueError(
                f"`objective` must be one of {', '.join(_OBJECTIVES)}; got {objective!r}."
            )
        require_positive("data_noise", data_noise, zero=True)
        require_positive("reg", reg, zero=True)
        require_count("batch_size", batch_size, 1)
        if max_grad_norm is not None:
            require_positive("max_grad_norm", max_grad_norm)
        if objective == "dsm" and not data_noise:
            raise ValueError("`data_noise` must be above 0 for 'dsm': it is the noise to undo.")
        if objective != "dsm" and sampler is None:
            raise ValueError(f"`sampler` must be given for {objective!r}.")
        if (objective == "pcd") != (buffer is not None):
            raise ValueError(f"`buffer` goes with 'pcd', and only with it; got {objective!r}.")
        if buffer is not None and batch_size > len(buffer):
            raise ValueError(f"`batch_size` {batch_size} is more than the {len(buffer)} chains.")
        if objective == "short_run" and getattr(model, "base", None) is None:
            raise ValueError("'short_run' starts chains at `model.base`, and there is none.")
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.sampler, self.buffer, self.data_noise = sampler, buffer, data_noise
        self.reg, self.reg_mode, self.batch_size = reg, reg_mode, batch_size
        self.max_grad_norm, self.scheduler, self.guard = max_grad_norm, scheduler, guard
        self.average = None if ema is None else ExponentialMovingAverage(model, decay=ema)
        self._weights = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self._weights[0].device
        self.generator = torch.Generator(self.device).manual_seed(choose_seed(seed, generator))
        self.step = 0
        self.history = History()
        # The order of the data in this epoch, and how many of them are used up.
        self._order, self._place = torch.empty(0, dtype=torch.int64), 0

    def fit(
        self,
        data: Shaped[Tensor, "..."] | Iterable[Any],
        *,
        max_steps: int | None = None,
        max_seconds: float | int | None = None,
        callback: Callable[["EnergyTrainer"], None] | None = None,
        progress: bool = True,
    ) -> History:
        """Train until a limit is reached, whichever comes first.

        Args:
            data: all of them as one tensor, ``(n, *event)``, in a new random order in each epoch,
                without the rest that fills no batch; or a loader of batches, read again and again,
                of tensors or of tuples that begin with one. A run that is resumed repeats its bits
                for a tensor; a loader has its own order.
            max_steps: number of steps **in all**, those of earlier calls included, so that a run
                that was killed goes on with the same call.
            max_seconds: wall time of this call. Such a run cannot be repeated to the same figures.
            callback: called with the trainer after each step: the place for checkpoints.
            progress: show a bar.

        Returns:
            The history of all steps so far.

        Raises:
            DivergenceError: from the guard or the sampler.
            TypeError: if the data are not floating.
            ValueError: if there is no limit, fewer data than a batch, or a loader without any.
        """
        if max_steps is None and max_seconds is None:
            raise ValueError("give `max_steps`, `max_seconds` or both: it must end.")
        if max_steps is not None:
            require_count("max_steps", max_steps)
        batches = self._rows(data) if isinstance(data, Tensor) else self._loaded(data)
        start, before = time.monotonic(), self.history.seconds
        bar = tqdm(total=max_steps, initial=self.step, unit=" steps", disable=not progress)
        with bar:
            while max_steps is None or self.step < max_steps:
                if max_seconds is not None and time.monotonic() - start >= max_seconds:
                    break
                self._train_on(next(batches))
                self.history.seconds = before + time.monotonic() - start
                bar.update()
                if progress and self.step % 50 == 0:
                    bar.set_postfix(loss=f"{self.history.loss[-1]:.4g}", refresh=False)
                if callback is not None:
                    callback(self)
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on with the same bits: tensors and plain values only.

        ``torch.save`` writes it, and ``torch.load(path, weights_only=True)`` reads it.
        """
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "average": self.average,
            "buffer": self.buffer,
        }
        states = {name: each.state_dict() for name, each in parts.items() if each is not None}
        return states | {
            "step": self.step,
            "generator": self.generator.get_state(),
            "order": self._order.clone(),
            "place": self._place,
            "history": asdict(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave, into a trainer that was made in the same way.

        Raises:
            KeyError: if a part is missing, as the chains are in the state of "dsm".
            ValueError: if a part does not fit.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.buffer is not None:
            self.buffer.load_state_dict(state["buffer"])
        self.step, self._place = state["step"], state["place"]
        self.generator.set_state(state["generator"].cpu())
        self._order = state["order"].to(self.device, copy=True)
        history = state["history"]
        self.history = History(
            **{k: list(v) if isinstance(v, list) else v for k, v in history.items()}
        )

    # --- inside -----------------------------------------------------------------------------------

    def _train_on(self, x: Tensor) -> None:
        with self._restored_if_it_diverges():
            loss, energies, chains = self._loss(x)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = get_total_norm([p.grad for p in self._weights if p.grad is not None])
            # One transfer for all: each would wait for the device.
            numbers = torch.stack([loss.detach(), norm, *energies]).tolist()
            loss_value, norm_value, e_pos, e_neg, largest = numbers
            if self.guard is not None:
                largest = 0.0 if self.objective == "dsm" else largest
                self.guard.check(self.step + 1, loss_value, largest, norm_value)
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(self._weights, self.max_grad_norm, norm)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update()
        if chains is not None:
            self.buffer.update(*chains)
        self.step += 1
        self.history.append(loss_value, e_pos, e_neg, norm_value, rate)

    def _loss(self, x: Tensor) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor] | None]:
        """Return the loss, three numbers about the energies, and the chains to write back."""
        if self.objective == "dsm":
            loss = denoising_score_matching_loss(
                self.model, x, self.data_noise, generator=self.generator
            )
            return loss, [loss.new_full((), math.nan)] * 3, None
        if self.data_noise:
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
            x = x + self.data_noise * noise
        rows = None
        if self.objective == "pcd":
            start, rows = self.buffer.sample(self.batch_size)
        elif self.objective == "cd":
            start = x
        else:
            start = self.model.base.sample(self.batch_size, generator=self.generator)
        with evaluating(self.model):
            x_neg = self.sampler(self.model, start, seed=choose_seed(None, self.generator))
        parts = contrastive_divergence_loss(
            self.model, x, x_neg, reg=self.reg, reg_mode=self.reg_mode, return_info=True
        )
        largest = torch.maximum(parts.e_pos.abs().max(), parts.e_neg.abs().max())
        chains = None if rows is None else (rows, x_neg)
        return parts.loss, [parts.e_pos.mean(), parts.e_neg.mean(), largest], chains

    @contextmanager
    def _restored_if_it_diverges(self) -> Iterator[None]:
        """A guard that stops, or a sampler that does, leaves the average in the model."""
        try:
            yield
        except DivergenceError:
            if self.guard is not None and self.guard.restore and self.average is not None:
                self.average.copy_to()
            raise

    def _rows(self, data: Tensor) -> Iterator[Tensor]:
        require_points("data", data)
        if len(data) < self.batch_size:
            raise ValueError(f"`data` must fill a batch of {self.batch_size}; got {len(data)}.")
        data = data.detach().to(self.device)
        while True:
            if len(self._order) != len(data) or self._place + self.batch_size > len(data):
                self._order = torch.randperm(
                    len(data), generator=self.generator, device=self.device
                )
                self._place = 0
            rows = self._order[self._place : self._place + self.batch_size]
            self._place += self.batch_size
            yield data.index_select(0, rows)

    def _loaded(self, loader: Iterable[Any]) -> Iterator[Tensor]:
        while True:
            empty = True
            for batch in loader:
                empty = False
                x = batch if isinstance(batch, Tensor) else batch[0]
                require_points("data", x)
                yield x.to(self.device)
            if empty:
                raise ValueError("`data` must be a loader that can be read again; it gave nothing.")
