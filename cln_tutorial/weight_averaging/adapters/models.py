"""Stand-ins that hold a copy of the model with the average in it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cln_tutorial.weight_averaging.adapters.shell import Shell
from cln_tutorial.weight_averaging.naming import plain_name, unwrapped
from cln_tutorial.weight_averaging.profiles import (
    ConstantDecay,
    InverseGammaWarmup,
    Profile,
    Uniform,
)


class _OfModel(Shell):
    """A stand-in that holds a copy of the model with the average in it."""

    def __init__(self, model: nn.Module, **options: Any):
        super().__init__(model, **options)
        self._copy = copy.deepcopy(unwrapped(model)).to(self.average.device)
        self._read_at = self.average.step

    @property
    def module(self) -> nn.Module:
        """The averaged model: always the same object, brought up to date when it is read here."""
        if self._read_at != self.average.step:
            self.average.copy_to(self._copy)
            self._read_at = self.average.step
        return self._copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def eval(self) -> nn.Module:
        """Put the averaged model into evaluation mode, and return it."""
        return self.module.eval()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._read_at = -1

    def _require_own(self, model: nn.Module) -> None:
        if unwrapped(model) is not self.average.model:
            raise ValueError(
                f"`model` must be the one that the average was made of; got another "
                f"{type(unwrapped(model)).__name__}."
            )


class ModelEmaV3(_OfModel):
    """``timm.utils.ModelEmaV3``.

    With ``step`` the first ``update_after_step + 1`` updates copy; without, the decay is constant
    and the initial weights count. Different: a warm-up or ``update_after_step`` without ``step``
    counts the updates itself, where the peer drops it; the decay is per step, also if ``step``
    grows by more than one; ``foreach`` has no effect.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema = ModelEmaV3(model, decay=0.9)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema.update(model)
        >>> round(ema.module.weight.item(), 6)
        0.1
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | int = 0.9999,
        min_decay: float | int = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float | int = 1.0,
        warmup_power: float | int = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        **options: Any,
    ):
        profile: Profile = ConstantDecay(decay)
        if use_warmup:
            profile = InverseGammaWarmup(
                decay, inv_gamma=warmup_gamma, power=warmup_power, min=min_decay
            )
        half = dtype in (torch.bfloat16, torch.float16)
        self._options = options | {
            "profile": profile,
            "buffers": "copy" if exclude_buffers else "average",
            "device": device,
            "dtype": dtype or "auto",
            "stochastic_rounding": stochastic_rounding if half else None,
            "seed": stochastic_rounding_seed,
        }
        self._counts = use_warmup or update_after_step > 0
        super().__init__(model, start_step=update_after_step + 1, **self._options)
        self._copy.to(dtype=dtype).eval()

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Average the present weights of ``model``; ``step`` counts from 1, or from 0."""
        self._require_own(model)
        if step == 0:
            return self.set(model)
        if step is None and self.average.step == 0 and not self._counts:
            self._begin_at_once()
        self.average.update(step)

    def set(self, model: nn.Module) -> None:
        """Make the average a copy of the weights."""
        now = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        now |= dict(unwrapped(model).named_buffers(remove_duplicate=False))
        now = {plain_name(name): tensor for name, tensor in now.items()}
        with torch.no_grad():
            for name, average in self.average.named_averages().items():
                average.copy_(now[name])
        self._read_at = -1

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["about"]["options"]["start_step"] == 0:
            self._begin_at_once()
        super().load_state_dict(state)

    def _begin_at_once(self) -> None:
        with self.average.applied():  # the weights of the beginning
            Shell.__init__(self, self.average.model, **self._options)


class AveragedModel(_OfModel):
    """``torch.optim.swa_utils.AveragedModel``: the plain mean, or with ``decay`` an EMA.

    Different: a function cannot be averaged by (write ``decay=0.999`` in the place of
    ``multi_avg_fn=get_ema_multi_avg_fn(0.999)``); buffers of integers are copied, not averaged;
    the model must be the one of the beginning.

    Raises:
        TypeError: for ``avg_fn`` or ``multi_avg_fn``.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> swa = AveragedModel(model)
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     swa.update_parameters(model)
        >>> swa.module.weight.item(), swa.n_averaged
        (3.0, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | int | None = None,
        avg_fn: Any = None,
        multi_avg_fn: Any = None,
        use_buffers: bool = False,
        *,
        decay: float | int | None = None,
        **options: Any,
    ):
        for name, function in (("avg_fn", avg_fn), ("multi_avg_fn", multi_avg_fn)):
            if function is not None:
                raise TypeError(
                    f"`{name}`: a function does not tell which weights it gives to which step. "
                    f"Write decay=0.999 for get_ema_multi_avg_fn(0.999), or a `profile` of "
                    f"ExponentialMovingAverage."
                )
        super().__init__(
            model,
            profile=Uniform() if decay is None else ConstantDecay(decay),
            start_step=0 if decay is None else 1,
            buffers="average" if use_buffers else "copy",
            device=None if device is None else torch.device(device),
            **options,
        )

    @property
    def n_averaged(self) -> int:
        """Updates so far."""
        return self.average.step

    def update_parameters(self, model: nn.Module) -> None:
        """Take the present weights of ``model`` into the average."""
        self._require_own(model)
        self.average.update()


class EMA(_OfModel):
    """``ema_pytorch.EMA``.

    Different: ``beta`` is per step of the optimiser, whatever ``update_every`` is (the peer's is
    per update: with its default of 10 it averages over ten times as many steps); updates are
    counted from the end of ``update_after_step``; buffers of integers are copied; all arguments
    but the first one by keyword.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> ema = EMA(model, beta=0.9, update_after_step=0, update_every=1)
        >>> for value in (0.0, 1.0):  # the first one is copied; the second has 2^(-2/3)
        ...     _ = nn.init.constant_(model.weight, value)
        ...     ema.update()
        >>> round(ema.ema_model.weight.item(), 6)
        0.629961
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float | int = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float | int = 1.0,
        power: float | int = 2 / 3,
        min_value: float | int = 0.0,
        **options: Any,
    ):
        super().__init__(
            model,
            profile=InverseGammaWarmup(beta, inv_gamma=inv_gamma, power=power, min=min_value),
            start_step=update_after_step + 1,
            update_every=update_every,
            **({"buffers": "average"} | options),
        )

    @property
    def ema_model(self) -> nn.Module:
        """The averaged model, brought up to date when it is read here."""
        return self.module

    def update(self) -> None:
        """Count a step of the optimiser, and update when it is time."""
        self.average.update()
