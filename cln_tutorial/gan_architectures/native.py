"""The CPU without a compiler: few calls of PyTorch, each one pass over contiguous maps.

What PyTorch calls batch norm reduces slowly. Group norm reduces each map fast, and the moments of
maps combine to those of channels. With all maps as channels of one sample, batch norm of fixed
statistics is a scale and a shift for each map, and its backward pass the two sums. These are added
in the dtype of ``x``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    gain_offset: float,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    if mean is None:
        mean, var = _moments(x)
    else:
        mean, var = (stat.to(x.dtype, copy=True) for stat in (mean, var))
    rstd = (var + eps).rsqrt()
    scale = (gamma.to(x.dtype) + gain_offset) * rstd
    y = _scale_and_shift(x, scale, beta.to(x.dtype) - mean * scale)
    if slope == 0:
        y.relu_()
    elif slope != 1:
        F.leaky_relu_(y, slope)
    return y if upsample == 1 else _doubled(y), mean, var, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    gain_offset: float,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x, dz = x.contiguous(), dy.contiguous()
    if upsample == 2:
        dz = torch.ops.aten.upsample_nearest2d_backward(dz, dz.shape[2:], x.shape, 2.0, 2.0)
    if slope == 0:
        dz = torch.ops.aten.threshold_backward(dz, y[:, :, ::upsample, ::upsample], 0)
    elif slope != 1:
        of_maps = y[:, :, ::upsample, ::upsample]
        dz = torch.ops.aten.leaky_relu_backward(dz, of_maps, slope, True)
    # Copies: the kernel reads through bare addresses, and an expanded view has one element.
    of_maps = [stat.repeat(len(gamma)) for stat in (mean, rstd)]
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        _one_sample(dz), _one_sample(x), None, *of_maps, *of_maps, True, 0.0, [False, True, True]
    )
    dgamma, dbeta = dgamma.view(gamma.shape), dbeta.view(gamma.shape)
    gain = gamma.to(x.dtype) + gain_offset
    if not training:  # mean and variance do not depend on x
        return _scale_and_shift(dz, gain * rstd, torch.zeros_like(gain)), dgamma, dbeta
    count = x.numel() // x.shape[1]
    constant = -rstd * (gain * dbeta).sum(0) / count
    along = -rstd.square() * (gain * dgamma).sum(0) / count
    dx = _scale_and_shift(dz, gain * rstd, (constant - along * mean).repeat(len(gamma)))
    return dx.addcmul_(x, along[:, None, None]), dgamma, dbeta


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the channels: within their maps, and between these."""
    batch, channels, height, width = x.shape
    _, means, rstds = torch.native_group_norm(
        x, None, None, batch, channels, height * width, channels, 0.0
    )
    var, mean = torch.var_mean(means, 0, correction=0)
    return mean, var + rstds.square().reciprocal().mean(0)


def _scale_and_shift(maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    zero, one = maps.new_zeros(scale.numel()), maps.new_ones(scale.numel())
    row = _one_sample(maps)
    y, _, _ = torch.native_batch_norm(
        row, scale.view(-1), shift.view(-1), zero, one, False, 0.0, 0.0
    )
    # No view for autograd, which would refuse that the caller writes into it.
    return torch.ops.aten._unsafe_view(y, maps.shape)


def _one_sample(maps: Tensor) -> Tensor:
    """View the maps of all samples as channels of one."""
    return maps.view(1, -1, *maps.shape[2:])


def _doubled(y: Tensor) -> Tensor:
    """Nearest upsampling, each row written twice; ``F.interpolate`` takes four times as long."""
    batch, channels, height, width = y.shape
    rows = y.repeat_interleave(2, -1)[:, :, :, None]
    return rows.expand(-1, -1, -1, 2, -1).reshape(batch, channels, 2 * height, 2 * width)
