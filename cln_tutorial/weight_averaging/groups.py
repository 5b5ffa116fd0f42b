"""Parameters that have been averaged since the same step, and where their averages lie."""

import torch
from torch import Tensor

from cln_tutorial.weight_averaging.functional import Plan
from cln_tutorial.weight_averaging.profiles import Clock


class Group:
    """Parameters that have been averaged since the same step."""

    def __init__(
        self,
        names: list[str],
        start: int,
        clocks: list[Clock],
        shadows: list[list[Tensor]],
        low: list[list[Tensor]] | None,
    ):
        self.names, self.start, self.clocks = names, start, clocks
        self.shadows, self.low = shadows, low
        self._plan: Plan | None = None

    def copy(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for each in self.shadows:
                for shadow, weight in zip(each, weights, strict=True):
                    shadow.copy_(weight)

    def plan_for(self, weights: list[Tensor], stochastic: bool, backend: str) -> Plan:
        """The plan of the last update, unless a tensor has moved since."""
        places = [w.data_ptr() for w in weights]
        if self._plan is None or self._plan.places != places:
            for name, weight, shadow in zip(self.names, weights, self.shadows[0], strict=True):
                if weight.shape != shadow.shape:
                    raise RuntimeError(
                        f"{name} had shape {tuple(shadow.shape)} and has {tuple(weight.shape)} now."
                    )
            devices = [w.device for w in weights]
            self.shadows = [_moved(each, devices) for each in self.shadows]
            self.low = None if self.low is None else [_moved(each, devices) for each in self.low]
            self._plan = Plan.of(self.shadows, weights, self.low, stochastic, backend)
        return self._plan


def _moved(tensors: list[Tensor], devices: list[torch.device]) -> list[Tensor]:
    return [t.to(device) for t, device in zip(tensors, devices, strict=True)]


def copied(weight: Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    return weight.detach().to(device=device or weight.device, dtype=dtype, copy=True)
