"""The CPU without a compiler: PyTorch's own layer norm, whose backward runs once per group.

One native call returns dx, dgamma and dbeta of a group in one pass; a backward pass written from
separate operations reads and writes every intermediate product, and is slower than autograd.
"""

import torch
from torch import Tensor


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    h: None,
    gate: None,
    eps: float,
    rms: bool,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = torch.native_layer_norm(x.contiguous(), x.shape[-1:], None, None, eps)
    gamma = _scale(gamma, x, plus_one)[:, None]
    grouped = y.view(len(gamma), -1, x.shape[-1])
    if beta is None:
        grouped.mul_(gamma)
    else:
        torch.addcmul(beta[:, None].to(x.dtype), grouped, gamma, out=grouped)
    return y, x.new_empty(0), mean.view(-1), rstd.view(-1)


def backward(
    dy: Tensor,
    dx_new: None,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    h: None,
    gate: None,
    beta_dtype: torch.dtype | None,
    rms: bool,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (groups, dim), shape = gamma.shape, x.shape
    stats = mean[:, None], rstd[:, None]
    dy, x, mean, rstd = (t.reshape(groups, -1, t.shape[-1]) for t in (dy, x, *stats))
    dx, dgamma, dbeta = x.new_empty(x.shape), gamma.new_empty(groups, dim), x.new_empty(groups, dim)
    mask = [True, True, beta_dtype is not None]
    for g, scale in enumerate(_scale(gamma, x, plus_one)):
        found = torch.ops.aten.native_layer_norm_backward(
            dy[g], x[g], [dim], mean[g], rstd[g], scale, scale, mask
        )
        for all_groups, of_this_one in zip((dx, dgamma, dbeta), found, strict=True):
            if of_this_one is not None:
                all_groups[g] = of_this_one
    dbeta = x.new_empty(0) if beta_dtype is None else dbeta.to(beta_dtype)
    return dx.view(shape), dgamma, dbeta, x.new_empty(0), x.new_empty(0)


def _scale(gamma: Tensor, x: Tensor, plus_one: bool) -> Tensor:
    return gamma.to(x.dtype) + 1 if plus_one else gamma.to(x.dtype)
