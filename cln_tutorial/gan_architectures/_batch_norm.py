"""Batch norm with what follows it in the same pass: what norms with and without condition share."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.gan_architectures._conditions import (
    require_not_negative,
    require_one_of,
    require_sizes,
)
from cln_tutorial.gan_architectures.functional import ACTIVATIONS, modulated_batch_norm


class FusedNorm2d(_BatchNorm):
    """PyTorch's batch norm, with activation and upsampling, and running statistics kept wide."""

    def __init__(
        self,
        num_features: int,
        *,
        affine: bool,
        track_running_stats: bool,
        eps: float | int,
        momentum: float | int | None,
        activation: str | None,
        negative_slope: float | int,
        upsample: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        require_sizes(num_features=num_features)
        require_one_of("activation", activation, ACTIVATIONS)
        require_one_of("upsample", upsample, (1, 2))
        require_not_negative(eps=eps, negative_slope=negative_slope)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` must lie in 0..1, or be None; got {momentum}.")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.activation, self.negative_slope, self.upsample = activation, negative_slope, upsample
        self._keep_wide(self._buffers)

    def extra_repr(self) -> str:
        """Name the sizes, and what follows the norm."""
        after = "" if self.activation is None else f", activation={self.activation!r}"
        after += "" if self.upsample == 1 else f", upsample={self.upsample}"
        return f"{self.num_features}, eps={self.eps}{after}"

    @property
    def _after(self) -> dict[str, str | float | int | None]:
        return {
            "gain_offset": 0.0,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "upsample": self.upsample,
        }

    def _batch_norm(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        count = self.num_batches_tracked if self.training and self.track_running_stats else None
        momentum = self.momentum
        if momentum is None:  # the average over all batches, each with the same weight
            momentum = 0.0 if count is None else 1.0 / (int(count) + 1)
        stats = (self.running_mean, self.running_var)
        if self.training and not self.track_running_stats:
            stats = (None, None)
        out = modulated_batch_norm(
            x,
            gamma,
            beta,
            *stats,
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.eps,
            **self._after,
        )
        if count is not None:
            count.add_(1)  # last: a batch that was refused is not counted
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._keep_wide(before)
        return self

    def _keep_wide(self, before: Mapping[str, Tensor | None]) -> None:
        for name in ("running_mean", "running_var"):
            new = self._buffers.get(name)
            if new is not None and new.dtype != (wide := wide_dtype(new.dtype)):
                self._buffers[name] = before[name].to(new.device, wide)  # moved, but not narrowed
