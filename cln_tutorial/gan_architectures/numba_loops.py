"""The CPU with a compiler: a few channels are reduced and applied while warm (extra ``fast``).

One thread has the whole of a channel, and sums in a fixed order: results do not depend on the
number of threads. The loops are functions of C, to which PyTorch's memory is passed by address:
making arrays of ten tensors would take longer than the loops over 10,000 numbers.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import no_type_check

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from cln_tutorial._threads import in_threads

FEWEST_FOR_A_THREAD = 2**17  # elements: about 50 µs, enough to pay for a task of the pool
TOGETHER = 2**15  # elements of each sample that are read in one go: memory likes long runs
SUMMED = 4096  # elements that are added in the type of x, before float64 takes over


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
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, channels, height * upsample, width * upsample)
    stats = x.new_empty(3, channels)
    fixed = mean is not None
    if fixed:
        stats[0].copy_(mean)
        stats[1].copy_(var)
    tensors = *_ready(x.dtype, x, gamma, beta), y, stats
    sizes = batch, channels, height * width, width, upsample, fixed
    _run(_forward_channels, x, tensors, eps, gain_offset, slope, *sizes)
    return y, *stats.unbind()


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
    batch, channels, height, width = x.shape
    dx, dgamma, dbeta = (x.new_empty(shape) for shape in (x.shape, gamma.shape, gamma.shape))
    tensors = *_ready(x.dtype, dy, x, gamma, beta, mean, rstd), dx, dgamma, dbeta
    sizes = batch, channels, height * width, width, upsample, training
    _run(_backward_channels, x, tensors, gain_offset, slope, *sizes)
    return dx, dgamma, dbeta


def _ready(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [(t if t.dtype == dtype else t.to(dtype)).contiguous() for t in tensors]


def _run(loop: Callable, x: Tensor, tensors: Sequence[Tensor], *numbers: float | int) -> None:
    """Run a loop over all channels, a range of them on each thread that PyTorch may use."""
    compiled, addresses = _compiled(loop, x.dtype), [t.data_ptr() for t in tensors]

    def run(start: int, stop: int, owners: Sequence[Tensor] = tensors) -> None:
        # A task that is still waiting when this call is interrupted must find the memory there.
        compiled(*addresses, *numbers, start, stop)

    channels = x.shape[1]
    threads = min(torch.get_num_threads(), channels, x.numel() // FEWEST_FOR_A_THREAD)
    in_threads(channels, threads, run)


@functools.cache
def _compiled(loop: Callable, dtype: torch.dtype) -> Callable[..., None]:
    real = {torch.float32: types.float32, torch.float64: types.float64}[dtype]
    kinds = {"at": (types.CPointer(real), ctypes.c_void_p)}
    kinds |= dict.fromkeys(("eps", "offset", "slope"), (types.float64, ctypes.c_double))
    names = loop.__code__.co_varnames[: loop.__code__.co_argcount]
    of_names = [kinds.get(n.split("_")[-1], (types.intp, ctypes.c_ssize_t)) for n in names]
    compiler = functools.partial(
        cfunc, types.void(*[kind for kind, _ in of_names]), error_model="numpy", fastmath=_FASTMATH
    )
    try:
        compiled = compiler(cache=True)(loop)
    except RuntimeError:  # no folder to keep the compiled code in: compile in each process
        compiled = compiler()(loop)
    run = ctypes.CFUNCTYPE(None, *[kind for _, kind in of_names])(compiled.address)
    run.owner = compiled  # the code lives as long as this
    return run


# --- the loops ------------------------------------------------------------------------------------


@no_type_check
def _forward_channels(
    x_at, gamma_at, beta_at, y_at, stats_at, eps, offset, slope,
    batch, channels, size, width, upsample, fixed, start, stop,
):  # fmt: skip
    x = carray(x_at, (batch, channels, size))
    y = carray(y_at, (batch, channels, size * upsample * upsample))
    gamma, beta = carray(gamma_at, (batch, channels)), carray(beta_at, (batch, channels))
    stats = carray(stats_at, (3, channels))
    offset, slope = x.dtype.type(offset), x.dtype.type(slope)
    together = max(1, TOGETHER // size)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        if not fixed:
            _moments(x, stats, first, last)
        for c in range(first, last):
            stats[2, c] = 1.0 / math.sqrt(np.float64(stats[1, c]) + eps)
        for n in range(batch):
            for c in range(first, last):
                mean, scale, shift = stats[0, c], (gamma[n, c] + offset) * stats[2, c], beta[n, c]
                if upsample == 2:
                    _apply_doubled(x[n, c], y[n, c], mean, scale, shift, slope, width)
                else:
                    _apply(x[n, c], y[n, c], mean, scale, shift, slope)


@no_type_check
def _backward_channels(
    dy_at, x_at, gamma_at, beta_at, mean_at, rstd_at, dx_at, dgamma_at, dbeta_at, offset, slope,
    batch, channels, size, width, upsample, training, start, stop,
):  # fmt: skip
    x, dx = carray(x_at, (batch, channels, size)), carray(dx_at, (batch, channels, size))
    dy = carray(dy_at, (batch, channels, size * upsample * upsample))
    gamma, beta = carray(gamma_at, (batch, channels)), carray(beta_at, (batch, channels))
    dgamma, dbeta = carray(dgamma_at, (batch, channels)), carray(dbeta_at, (batch, channels))
    mean, rstd = carray(mean_at, channels), carray(rstd_at, channels)
    offset, slope = x.dtype.type(offset), x.dtype.type(slope)
    together = min(max(1, TOGETHER // size), stop - start)
    summed = np.empty((batch if upsample == 2 else 0, together, size), x.dtype)
    parts = np.empty((2, together), np.float64)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        parts[:] = 0.0
        for n in range(batch):
            for c in range(first, last):
                if upsample == 2:
                    _sum_children(dy[n, c], summed[n, c - first], width)
                given = summed[n, c - first] if upsample == 2 else dy[n, c]
                gain = gamma[n, c] + offset
                total, moment = _two_sums(
                    x[n, c], given, mean[c], gain * rstd[c], beta[n, c], slope
                )
                dbeta[n, c] = total
                dgamma[n, c] = moment * rstd[c]
                parts[0, c - first] += gain * total / (batch * size)
                parts[1, c - first] += gain * moment * rstd[c] / (batch * size)
        for n in range(batch):
            for c in range(first, last):
                given = summed[n, c - first] if upsample == 2 else dy[n, c]
                constant = x.dtype.type(-rstd[c] * parts[0, c - first])
                along = x.dtype.type(-rstd[c] * rstd[c] * parts[1, c - first])
                scale = (gamma[n, c] + offset) * rstd[c]
                _apply_backward(
                    x[n, c], given, dx[n, c], mean[c], scale, beta[n, c], slope,
                    along, constant, training,
                )  # fmt: skip


# Sums may be reordered, which vectorises them; NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "nsz", "contract"}
_inlined = njit(error_model="numpy", fastmath=_FASTMATH)


@_inlined
@no_type_check
def _moments(x, stats, first, last):
    """Mean and biased variance, from distances to one of the values: then nothing cancels."""
    sums = np.zeros((3, last - first))
    for c in range(first, last):
        origin = np.float64(x[0, c, 0])
        sums[0, c - first] = origin if np.isfinite(origin) else 0.0
    for n in range(x.shape[0]):
        for c in range(first, last):
            total, squares = _distances(x[n, c], sums[0, c - first])
            sums[1, c - first] += total
            sums[2, c - first] += squares
    count = x.shape[0] * x.shape[2]
    for c in range(first, last):
        centre = sums[1, c - first] / count
        stats[0, c] = sums[0, c - first] + centre
        variance = sums[2, c - first] / count - centre * centre
        stats[1, c] = 0.0 if variance < 0.0 else variance


@_inlined
@no_type_check
def _distances(row, origin):
    total, squares = 0.0, 0.0
    for i in range(row.size):
        apart = np.float64(row[i]) - origin
        total += apart
        squares += apart * apart
    return total, squares


@_inlined
@no_type_check
def _activated(v, slope, zero):
    low = slope * v if slope != zero else zero  # a ReLU of minus infinity is 0
    return low if v <= zero else v


@_inlined
@no_type_check
def _apply(row, out, mean, scale, shift, slope):
    zero = row.dtype.type(0)
    for i in range(row.size):
        out[i] = _activated((row[i] - mean) * scale + shift, slope, zero)


@_inlined
@no_type_check
def _apply_doubled(row, out, mean, scale, shift, slope, width):
    zero = row.dtype.type(0)
    for i in range(0, row.size, width):
        top, bottom = out[4 * i : 4 * i + 2 * width], out[4 * i + 2 * width : 4 * i + 4 * width]
        for j in range(width):
            v = _activated((row[i + j] - mean) * scale + shift, slope, zero)
            top[2 * j] = v
            top[2 * j + 1] = v
        for j in range(2 * width):
            bottom[j] = top[j]


@_inlined
@no_type_check
def _sum_children(given, out, width):
    for i in range(0, out.size, width):
        top, bottom = given[4 * i : 4 * i + 2 * width], given[4 * i + 2 * width : 4 * i + 4 * width]
        for j in range(width):
            out[i + j] = top[2 * j] + top[2 * j + 1] + (bottom[2 * j] + bottom[2 * j + 1])


@_inlined
@no_type_check
def _two_sums(row, given, mean, scale, shift, slope):
    total, moment = 0.0, 0.0
    for i in range(0, row.size, SUMMED):
        x, dy = row[i : i + SUMMED], given[i : i + SUMMED]
        if slope == row.dtype.type(0):
            sums = _sums_of_part(x, dy, mean, scale, shift, None)
        else:
            sums = _sums_of_part(x, dy, mean, scale, shift, slope)
        total += sums[0]
        moment += sums[1]
    return total, moment


@_inlined
@no_type_check
def _sums_of_part(x, dy, mean, scale, shift, slope):
    zero = x.dtype.type(0)
    total, moment = zero, zero
    for i in range(x.size):
        apart = x[i] - mean
        d = _through(dy[i], apart * scale + shift, slope, zero)
        total += d
        moment += d * apart
    return np.float64(total), np.float64(moment)


@_inlined
@no_type_check
def _through(given, v, slope, zero):
    """What comes back through the activation; with None for a slope of 0 it takes half the time."""
    if slope is None:
        return zero if v <= zero else given  # infinity does not pass a closed ReLU
    return slope * given if v <= zero else given


@_inlined
@no_type_check
def _apply_backward(row, given, out, mean, scale, shift, slope, along, constant, training):
    zero = row.dtype.type(0)
    for i in range(row.size):
        apart = row[i] - mean
        v = apart * scale + shift
        low = slope * given[i] if slope != zero else zero
        d = scale * (low if v <= zero else given[i])
        # Fixed statistics do not depend on x, which may be infinite.
        out[i] = d + (along * apart + constant) if training else d
