"""Stand-ins that are made of a list of parameters and do not know their names."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cln_tutorial.weight_averaging.adapters.shell import Shell
from cln_tutorial.weight_averaging.profiles import (
    ConstantDecay,
    InverseGammaWarmup,
    Profile,
    TensorFlowWarmup,
)

Parameters = Iterable[Tensor]


class _OfParameters(Shell):
    """A stand-in that was made of a list of parameters and does not know their names."""

    def __init__(self, parameters: Parameters, **options: Any):
        self._own = list(parameters)
        super().__init__(self._own, **options)
        self._stored: list[Tensor] | None = None

    @property
    def shadow_params(self) -> list[Tensor]:
        """The averages, in the order of the parameters."""
        averages = self.average.named_averages()
        return [averages[str(number)] for number in range(len(self._own))]

    def to(self, device: torch.device | str) -> None:
        """Keep the averages on ``device`` from the next update on."""
        self.average.device = torch.device(device)

    def copy_to(self, parameters: Parameters | None = None) -> None:
        """Write the averages into these parameters, by default into their own."""
        self._fill(parameters, self.shadow_params)

    def store(self, parameters: Parameters | None = None) -> None:
        """Remember these parameters for :meth:`restore`."""
        self._stored = [p.detach().clone() for p in self._listed(parameters)]

    def restore(self, parameters: Parameters | None = None) -> None:
        """Write back what :meth:`store` has remembered."""
        if self._stored is None:
            raise RuntimeError("nothing to restore: call `store()` first.")
        self._fill(parameters, self._stored)

    def _listed(self, parameters: Parameters | None) -> list[Tensor]:
        listed = self._own if parameters is None else list(parameters)
        if [p.shape for p in listed] != [p.shape for p in self._own]:
            raise ValueError(
                f"`parameters` must have the shapes of the {len(self._own)} that are averaged; "
                f"got {len(listed)}."
            )
        return listed

    def _fill(self, parameters: Parameters | None, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._listed(parameters), values, strict=True):
                parameter.copy_(value)

    def _require_own(self, parameters: Parameters | None) -> None:
        for own, given in zip(self._own, self._listed(parameters), strict=True):
            if own is not given:
                raise ValueError("`parameters` must be those that the average was made of.")


class TorchEMA(_OfParameters):
    """``torch_ema.ExponentialMovingAverage``, with TensorFlow's warm-up unless switched off.

    Different: only the parameters of the beginning can be averaged.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> ema = TorchEMA([weight], decay=0.99)
        >>> _ = torch.nn.init.ones_(weight)
        >>> ema.update()
        >>> with ema.average_parameters():
        ...     print(round(weight.item(), 6))  # 1 - 2/11
        0.818182
    """

    def __init__(
        self,
        parameters: Parameters,
        decay: float | int,
        use_num_updates: bool = True,
        **options: Any,
    ):
        profile = TensorFlowWarmup(decay) if use_num_updates else ConstantDecay(decay)
        super().__init__(parameters, profile=profile, **options)

    def update(self, parameters: Parameters | None = None) -> None:
        """Take the present weights into the averages."""
        self._require_own(parameters)
        self.average.update()

    @contextlib.contextmanager
    def average_parameters(self, parameters: Parameters | None = None) -> Iterator[None]:
        """Put the averages in the place of the parameters for the length of a ``with`` block."""
        listed = self._listed(parameters)
        before = [p.detach().clone() for p in listed]
        try:
            self.copy_to(listed)
            yield
        finally:
            self._fill(listed, before)


class EMAModel(_OfParameters):
    """``diffusers.training_utils.EMAModel``.

    The first ``update_after_step + 1`` steps copy. Different: no ``save_pretrained``
    (``average.save`` writes a file), no ``foreach``; only the parameters of the beginning can be
    averaged.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> ema = EMAModel([weight], decay=0.9999)
        >>> ema.step([weight])
        >>> _ = torch.nn.init.ones_(weight)
        >>> ema.step([weight])
        >>> round(ema.cur_decay_value, 6), round(ema.shadow_params[0].item(), 6)  # 2/11
        (0.181818, 0.818182)
    """

    def __init__(
        self,
        parameters: Parameters,
        decay: float | int = 0.9999,
        min_decay: float | int = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float | int = 1.0,
        power: float | int = 2 / 3,
        **options: Any,
    ):
        profile: Profile = TensorFlowWarmup(decay)
        if use_ema_warmup:
            profile = InverseGammaWarmup(decay, inv_gamma=inv_gamma, power=power, min=min_decay)
        elif min_decay > 0:
            profile = _AtLeast(profile, min_decay)
        super().__init__(parameters, profile=profile, start_step=update_after_step + 1, **options)

    @property
    def optimization_step(self) -> int:
        """Steps so far."""
        return self.average.step

    @property
    def cur_decay_value(self) -> float | None:
        """The decay of the last step; before the first one ``None``."""
        step = self.average.step - self.average.start_step
        if self.average.step == 0:
            return None
        (profile,) = self.average.profiles.values()
        return profile.decay(step - 1, step) if step > 0 else 0.0

    def step(self, parameters: Parameters) -> None:
        """Take the present weights into the averages."""
        self._require_own(parameters)
        self.average.update()

    def restore(self, parameters: Parameters | None = None) -> None:
        super().restore(parameters)
        self._stored = None


@dataclass(frozen=True)
class _AtLeast(Profile):
    profile: Profile
    least: float | int

    def decay(self, prev_step: int, step: int) -> float:
        product = 1.0
        for t in range(prev_step + 1, step + 1):
            product *= max(self.profile.decay(t - 1, t), self.least)
        return product
