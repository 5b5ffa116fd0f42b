"""The CPU with a compiler: one pass over the memory for each direction (extra ``fast``).

Rows are independent, and a vector of a group is summed over its rows in a fixed order, so results
do not depend on the number of threads. The threads are Python's, since calls through ctypes release
the GIL: two of them may not enter the pool that Numba itself would start.
"""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import Tensor

ROWS_IN_A_CHUNK = 256  # of one group, summed together
FEWEST_FOR_A_THREAD = 2**17  # elements: about 50 µs, enough to pay for a task of the pool


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
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    y, mean, rstd = x.new_empty(x.shape), x.new_empty(rows), x.new_empty(rows)
    inputs = _ready(x.dtype, x, gamma, gamma if beta is None else beta)
    sizes, flags = (rows, dim, rows // len(gamma)), (eps, float(plus_one), rms, beta is not None)
    _in_threads(rows, x, _forward_rows, (*inputs, y, mean, rstd), *sizes, *flags)
    return y, x.new_empty(0), x.new_empty(0) if rms else mean, rstd


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
    groups, dim = gamma.shape
    rows = x.shape[:-1].numel()
    chunks = -(-rows // groups // ROWS_IN_A_CHUNK)
    dx, dgamma, dbeta = (x.new_empty(s) for s in (x.shape, *[(groups * chunks, dim)] * 2))
    tensors = *_ready(x.dtype, dy, x, gamma), rstd if rms else mean, rstd, dx, dgamma, dbeta
    sizes = rows, dim, rows // groups, chunks
    _in_threads(groups * chunks, x, _backward_chunks, tensors, *sizes, float(plus_one), rms)
    if chunks > 1:
        dgamma, dbeta = (t.view(groups, chunks, dim).sum(1) for t in (dgamma, dbeta))
    dbeta = x.new_empty(0) if beta_dtype is None else dbeta.to(beta_dtype)
    return dx, dgamma.to(gamma.dtype), dbeta, x.new_empty(0), x.new_empty(0)


# --- the loops ------------------------------------------------------------------------------------
# Compiled to functions of C, to which PyTorch's memory is passed by address: making arrays of eight
# tensors would take longer than the loops over 10,000 numbers.


@no_type_check
def _forward_rows(
    x_at, gamma_at, beta_at, y_at, mean_at, rstd_at,
    rows, dim, rows_per_group, eps, one, rms, has_beta, start, stop,
):  # fmt: skip
    groups = rows // rows_per_group
    x, y = carray(x_at, (rows, dim)), carray(y_at, (rows, dim))
    gamma, beta = carray(gamma_at, (groups, dim)), carray(beta_at, (groups, dim))
    mean, rstd = carray(mean_at, rows), carray(rstd_at, rows)
    zero, count = x.dtype.type(0), x.dtype.type(dim)
    for r in range(start, stop):
        group = r // rows_per_group
        row, out, scale, shift = x[r], y[r], gamma[group], beta[group]
        total, squares = zero, zero
        for d in range(dim):
            total += row[d]
            squares += row[d] * row[d]
        centre = zero if rms else total / count
        variance = squares / count - centre * centre
        if not centre * centre <= variance < np.inf:  # the difference would cancel more than a bit
            squares = zero
            for d in range(dim):
                squares += (row[d] - centre) * (row[d] - centre)
            variance = squares / count
        factor = x.dtype.type(1) / np.sqrt(variance + eps)
        mean[r] = centre
        rstd[r] = factor
        if has_beta:
            for d in range(dim):
                out[d] = (row[d] - centre) * factor * (scale[d] + one) + shift[d]
        else:
            for d in range(dim):
                out[d] = (row[d] - centre) * factor * (scale[d] + one)


@no_type_check
def _backward_chunks(
    dy_at, x_at, gamma_at, mean_at, rstd_at, dx_at, dgamma_at, dbeta_at,
    rows, dim, rows_per_group, chunks, one, rms, start, stop,
):  # fmt: skip
    groups = rows // rows_per_group
    x, dy, dx = carray(x_at, (rows, dim)), carray(dy_at, (rows, dim)), carray(dx_at, (rows, dim))
    gamma, mean, rstd = (
        carray(gamma_at, (groups, dim)),
        carray(mean_at, rows),
        carray(rstd_at, rows),
    )
    dgamma = carray(dgamma_at, (groups * chunks, dim))
    dbeta = carray(dbeta_at, (groups * chunks, dim))
    zero = x.dtype.type(0)
    share = x.dtype.type(1) / x.dtype.type(dim)
    for chunk in range(start, stop):
        group, number = chunk // chunks, chunk % chunks
        first = group * rows_per_group
        last = min(first + (number + 1) * ROWS_IN_A_CHUNK, first + rows_per_group)
        scale, scale_sum, shift_sum = gamma[group], dgamma[chunk], dbeta[chunk]
        for d in range(dim):
            scale_sum[d] = zero
            shift_sum[d] = zero
        for r in range(first + number * ROWS_IN_A_CHUNK, last):
            row, given, out, factor = x[r], dy[r], dx[r], rstd[r]
            centre = zero if rms else mean[r]
            w_mean, w_normalised_mean = zero, zero
            for d in range(dim):
                normalised = (row[d] - centre) * factor
                w = (scale[d] + one) * given[d]
                w_mean += w
                w_normalised_mean += w * normalised
                scale_sum[d] += given[d] * normalised
                shift_sum[d] += given[d]
            w_mean = zero if rms else w_mean * share
            w_normalised_mean *= share
            for d in range(dim):
                normalised = (row[d] - centre) * factor
                w = (scale[d] + one) * given[d]
                out[d] = factor * (w - w_mean - normalised * w_normalised_mean)


@functools.cache
def _compiled(loop: Callable, dtype: torch.dtype) -> Callable[..., None]:
    real, c_real = {
        torch.float32: (types.float32, ctypes.c_float),
        torch.float64: (types.float64, ctypes.c_double),
    }[dtype]
    address, size = (types.CPointer(real), ctypes.c_void_p), (types.intp, ctypes.c_ssize_t)
    flag, number = (types.boolean, ctypes.c_bool), (real, c_real)
    special = {"eps": number, "one": number, "rms": flag, "has_beta": flag}
    names = loop.__code__.co_varnames[: loop.__code__.co_argcount]
    kinds = [address if name.endswith("_at") else special.get(name, size) for name in names]
    # Sums may be reordered, which vectorises them; NaN and infinity keep their meaning.
    compiler = functools.partial(
        cfunc,
        types.void(*[kind for kind, _ in kinds]),
        error_model="numpy",
        fastmath={"reassoc", "nsz", "contract"},
    )
    try:
        compiled = compiler(cache=True)(loop)
    except RuntimeError:  # no folder to keep the compiled code in: compile in each process
        compiled = compiler()(loop)
    run = ctypes.CFUNCTYPE(None, *[kind for _, kind in kinds])(compiled.address)
    run.owner = compiled  # the code lives as long as this
    return run


def _ready(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [(t if t.dtype == dtype else t.to(dtype)).contiguous() for t in tensors]


_pool: ThreadPoolExecutor | None = None


def _in_threads(
    units: int, x: Tensor, loop: Callable, tensors: Sequence[Tensor], *numbers: int | float
) -> None:
    """Run a loop over all units, a range of them on each thread that PyTorch may use."""
    global _pool
    compiled, addresses = _compiled(loop, x.dtype), [t.data_ptr() for t in tensors]

    def run(start: int, stop: int, owners: Sequence[Tensor] = tensors) -> None:
        # A task that is still waiting when this call is interrupted must find the memory there.
        compiled(*addresses, *numbers, start, stop)

    threads = min(torch.get_num_threads(), units, x.numel() // FEWEST_FOR_A_THREAD)
    if threads <= 1:
        run(0, units)
        return
    borders = [units * n // threads for n in range(threads + 1)]
    mine, *others = itertools.pairwise(borders)
    try:
        _pool = _pool or ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cln_tutorial")
        tasks = [_pool.submit(run, *share) for share in others]
    except RuntimeError:  # the interpreter is shutting down, and takes no more tasks
        run(0, units)
        return
    run(*mine)
    for task in tasks:
        task.result()


def _forget_the_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # a forked child inherits the pool without its threads
    os.register_at_fork(after_in_child=_forget_the_pool)
