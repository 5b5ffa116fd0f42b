"""The CPU with a compiler: the log-sum-exp of each tile in one pass (extra ``fast``)."""

from typing import no_type_check

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from cln_tutorial._numba import read_as, widen
from cln_tutorial._threads import in_threads
from cln_tutorial.gumbel_softmax._checks import wide_dtype

FEWEST_FOR_A_THREAD = 2**17  # logits: about 80 µs


def log_sums(rows: Tensor, taus: Tensor | None, tau: float, width: int) -> tuple[Tensor, Tensor]:
    """As ``tiles.log_sums``; an exponential is right to 2e-7 of itself."""
    count, classes = rows.shape
    tops = rows.new_empty(count, -(-classes // width), dtype=wide_dtype(rows.dtype))
    sums = torch.empty_like(tops)
    inverse = torch.full((count,), 1 / tau, dtype=tops.dtype) if taus is None else 1 / taus
    bits = rows.contiguous()
    bits = bits.view(torch.uint16) if rows.dtype == torch.bfloat16 else bits
    arrays = [t.numpy() for t in (bits, inverse, tops, sums)]
    tiles = tops.numel()

    @no_type_check  # a check would compile its own code at each call
    def run(start: int, stop: int) -> None:
        _log_sums(*arrays, width, start, stop)

    threads = min(torch.get_num_threads(), tiles, rows.numel() // FEWEST_FOR_A_THREAD)
    in_threads(tiles, threads, run)
    return tops, sums.log_()


# --- the loops ------------------------------------------------------------------------------------


# The maximum of floats is not vectorised, whatever is permitted; that of integers is, eleven times
# as fast. NaN may come out as the largest or be passed over: the sum will show it.
@numba.njit(nogil=True, cache=True)
@no_type_check
def _largest(logits, like):
    top = _rank(like.dtype.type(-np.inf))
    for i in range(len(logits)):
        top = max(top, _rank(widen(logits[i])))
    return _number(top)


@no_type_check
def _rank(x):
    """An integer in the order of the numbers."""


@overload(_rank, inline="always")
@no_type_check
def _rank_by_type(x):
    if x is types.float64:
        return lambda x: x
    return lambda x: _turned(read_as(x, np.int32))


@no_type_check
def _number(rank):
    """The number of a rank."""


@overload(_number, inline="always")
@no_type_check
def _number_by_type(rank):
    if rank is types.float64:
        return lambda rank: rank
    return lambda rank: read_as(_turned(rank), np.float32)


@numba.njit(inline="always")
@no_type_check
def _turned(bits):
    # Of negative numbers all bits but the sign: the larger they are, the less is the number.
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
@no_type_check
def _sum_of_exponentials(logits, shift, inverse, like):
    total = like.dtype.type(0)
    for i in range(len(logits)):
        total += _exponential((widen(logits[i]) - shift) * inverse)
    return total


@no_type_check
def _exponential(x):
    """Of numbers up to zero."""


@overload(_exponential, inline="always")
@no_type_check
def _exponential_by_type(x):
    if x is types.float64:
        return lambda x: np.exp(x)
    return lambda x: _vectorised(x)


@numba.njit(inline="always")
@no_type_check
def _vectorised(x):
    x = np.float32(x * np.float32(1.4426950408889634))
    x = np.float32(-126) if x < np.float32(-126) else x  # and NaN stays
    whole = np.float32(np.floor(x))
    y = np.float32(x - whole)
    # The polynomial of degree 6 that has the least relative error of 2^y on [0, 1], 2e-9.
    power = np.float32(2.1702215870702616e-4)
    power = np.float32(power * y + np.float32(1.2439693715161212e-3))
    power = np.float32(power * y + np.float32(9.678841087389303e-3))
    power = np.float32(power * y + np.float32(5.548334147300113e-2))
    power = np.float32(power * y + np.float32(2.4022983653912386e-1))
    power = np.float32(power * y + np.float32(6.931469837963782e-1))
    power = np.float32(power * y + np.float32(1))
    return np.float32(power * read_as(np.int32((np.int32(whole) + 127) << 23), np.float32))


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def _log_sums(rows, inverse, tops, sums, width, start, stop):
    tiles = tops.shape[1]
    for unit in range(start, stop):
        row, tile = unit // tiles, unit % tiles
        logits = rows[row, tile * width : (tile + 1) * width]
        top = _largest(logits, tops)
        tops[row, tile] = top
        if top == np.inf:
            sums[row, tile] = np.inf
            continue
        shift = tops.dtype.type(0) if top == -np.inf else top
        sums[row, tile] = _sum_of_exponentials(logits, shift, inverse[row], tops)
