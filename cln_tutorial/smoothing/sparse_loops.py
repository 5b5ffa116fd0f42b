r"""The CPU with a compiler: sparse weights without a sort, forward and backward (extra ``fast``).

The threshold of a row is the root of a decreasing function, convex for :math:`\alpha \le 2`:
Newton's steps from the left never pass it. Few entries are near the largest, so most rows are read
once; where all are, every pass over them is branch-free, and the compiler vectorises it.
"""

from collections.abc import Callable
from typing import no_type_check

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from cln_tutorial._numba import read_as
from cln_tutorial._threads import in_threads

FEWEST_FOR_A_THREAD = 2**17  # entries: about 50 µs, enough to pay for a task of the pool
BLOCK = 64  # entries that are passed over together where none of them is near the largest
FEWEST_FOR_BLOCKS = 8 * BLOCK  # a shorter row is read again in less time than its blocks take
# What takes -inf, the first number behind the negative NaN in the order of the bits, to zero.
BEHIND_NAN_32, BEHIND_NAN_64 = np.uint32(0x7F800001), np.uint64(0x7FF0000000000001)
PORTION = 4096  # entries that are summed in their own dtype; more would lose digits


def weights(rows: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """The weights of each row; ``alphas`` holds one float64 alpha per row, or is None."""
    rows = rows.contiguous()
    found = torch.empty_like(rows)
    arrays = rows.numpy(), found.numpy()
    if alphas is None and alpha in (1.5, 2.0):
        loop, extra = (_sparsemax if alpha == 2 else _entmax15), ()
    else:
        loop, extra = _entmax, (_one_per_row(rows, alphas, alpha),)
    _over_rows(rows, lambda start, stop: loop(*arrays, *extra, start, stop))
    return found


def gradient(upwards: Tensor, found: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """The gradient of the rows, from that of the weights that were found."""
    upwards, found = upwards.contiguous(), found.contiguous()
    downwards = torch.empty_like(found)
    arrays = upwards.numpy(), found.numpy(), downwards.numpy()
    if alphas is None and alpha in (1.5, 2.0):
        loop, extra = (_sparsemax_gradient if alpha == 2 else _entmax15_gradient), ()
    else:
        loop, extra = _entmax_gradient, (_one_per_row(found, alphas, alpha),)
    _over_rows(found, lambda start, stop: loop(*arrays, *extra, start, stop))
    return downwards


def _one_per_row(rows: Tensor, alphas: Tensor | None, alpha: float) -> np.ndarray:
    if alphas is None:
        return np.full(len(rows), alpha)
    return alphas.reshape(-1).numpy()


@no_type_check  # a check would compile its own code at each call
def _over_rows(rows: Tensor, run: Callable[[int, int], None]) -> None:
    threads = min(torch.get_num_threads(), len(rows), rows.numel() // FEWEST_FOR_A_THREAD)
    in_threads(len(rows), threads, run)


# --- forward --------------------------------------------------------------------------------------

_compile = numba.njit(nogil=True, cache=True, error_model="numpy")
# Sums in any order, so that they are vectorised. NaN and infinity stay what they are.
_compile_sums = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"}
)


@_compile
@no_type_check
def _sparsemax(rows, found, start, stop):
    numbers, blocks = _space(rows)
    for r in range(start, stop):
        row, out = rows[r], found[r]
        top = _largest(row, blocks)
        if not np.isfinite(top):
            out[:] = np.nan
            continue
        threshold = -1.0
        if len(row) >= FEWEST_FOR_BLOCKS:
            # The largest of each block are some of the entries, hence a bound from below.
            threshold = _sparsemax_threshold(blocks, top, threshold)
            near = _near(row, blocks, top, threshold, numbers)
            if near >= 0:
                threshold = _sparsemax_threshold(numbers[:near], top, threshold)
                out[:] = 0
                for b in range(len(blocks)):
                    if blocks[b] - top > threshold:
                        s = slice(b * BLOCK, (b + 1) * BLOCK)
                        _shifted(row[s], out[s], top, threshold)
                continue
        threshold = _sparsemax_threshold(row, top, threshold)
        _shifted(row, out, top, threshold)


@_compile
@no_type_check
def _entmax15(rows, found, start, stop):
    numbers, blocks = _space(rows)
    for r in range(start, stop):
        row, out = rows[r], found[r]
        top = _largest(row, blocks)
        if not np.isfinite(top):
            out[:] = np.nan
            continue
        threshold = -1.0
        if len(row) >= FEWEST_FOR_BLOCKS:
            threshold = _entmax15_threshold(blocks, top, threshold)
            near = _near(row, blocks, top, 2 * threshold, numbers)
            if near >= 0:
                threshold = _entmax15_threshold(numbers[:near], top, threshold)
                out[:] = 0
                for b in range(len(blocks)):
                    if blocks[b] - top > 2 * threshold:
                        s = slice(b * BLOCK, (b + 1) * BLOCK)
                        _squared(row[s], out[s], top, threshold)
                continue
        threshold = _entmax15_threshold(row, top, threshold)
        _squared(row, out, top, threshold)


@_compile
@no_type_check
def _entmax(rows, found, alphas, start, stop):
    """Any alpha: in float64, because the root of a small number has a steep slope."""
    _, blocks = _space(rows)
    depths = np.empty(rows.shape[1], np.float64)
    for r in range(start, stop):
        row, out = rows[r], found[r]
        top, a = _largest(row, blocks), alphas[r] - 1
        if not (np.isfinite(top) and np.isfinite(a)):
            out[:] = np.nan
            continue
        near = 0
        for i in range(len(row)):
            depths[near] = np.float64(row[i]) - np.float64(top)
            near += a * depths[near] > -1 and depths[near] > -np.inf
        depth = _entmax_depth(depths[:near], a)
        largest, factor = np.exp(-depth), np.exp(a * depth)
        for i in range(len(row)):
            out[i] = largest * _power((np.float64(row[i]) - np.float64(top)) * factor, a)


# --- the roots ------------------------------------------------------------------------------------
# In the dtype of the row, whose passes are the quickest; the last step in float64, so that only the
# rounding of the weights is left.


@_compile
@no_type_check
def _sparsemax_threshold(row, top, threshold):
    """Newton's method, which here is Michelot's: a mean over those above the threshold."""
    before = -1
    while True:
        total, count = _sum_above(row, top, row.dtype.type(threshold))
        if count == before or count == 0:
            break
        threshold = max(threshold, (total - 1) / count)
        before = count
    total, count = _sum_above(row, np.float64(top), threshold)
    return (total - 1) / count if count else threshold


@_compile
@no_type_check
def _sum_above(row, top, threshold):
    total, count = 0.0, 0
    for start in range(0, len(row), PORTION):
        t, k = _sum_of_portion(row[start : start + PORTION], top, threshold)
        total, count = total + t, count + int(k)
    return total, count


@_compile_sums
@no_type_check
def _sum_of_portion(row, top, threshold):
    zero, one = type(top)(0), type(top)(1)
    total, count = zero, zero
    for i in range(len(row)):
        depth = row[i] - top
        above = depth > threshold
        total += depth if above else zero
        count += one if above else zero
    return total, count


@_compile
@no_type_check
def _entmax15_threshold(row, top, threshold):
    """Newton's method for the 2-norm of what is above the threshold, which shall be 1.

    The norm is convex as its square is, and more nearly straight: for equal entries one step is
    exact. The quadratic equation of all that are above would pass the root while some of them must
    still go.
    """
    enough = 1e-6 if row.itemsize == 4 else 1e-10  # the last step squares it
    for _ in range(100):
        step = _entmax15_step(row, top, row.dtype.type(threshold))
        threshold = max(threshold, threshold + step)
        if not step > enough:
            break
    return threshold + _entmax15_step(row, np.float64(top), threshold)


@_compile
@no_type_check
def _entmax15_step(row, top, threshold):
    total, squares = 0.0, 0.0
    for start in range(0, len(row), PORTION):
        t, s = _powers_of_portion(row[start : start + PORTION], top, threshold)
        total, squares = total + t, squares + s
    norm = np.sqrt(squares)
    return norm * (norm - 1) / total if total else 0.0


@_compile_sums
@no_type_check
def _powers_of_portion(row, top, threshold):
    zero, half = type(top)(0), type(top)(0.5)
    total, squares = zero, zero
    for i in range(len(row)):
        height = (row[i] - top) * half - threshold
        height = height if height > zero else zero
        total += height
        squares += height * height
    return total, squares


@_compile
@no_type_check
def _entmax_depth(depths, a):
    r"""The m of which :math:`\sum_i p_i = 1` with :math:`p_i^a = (e^{-a m} + a x_i)_+`.

    The largest weight is :math:`e^{-m}`, so m is of the size of a logarithm for every alpha.
    Newton's method for the logarithm of the sum, which is straight in m if alpha is 1 or the
    entries are equal; between bounds, that are halved now and then, as nothing else is sure.
    """
    low, high = 0.0, np.log(len(depths))
    depth = 0.0
    for n in range(200):
        factor = np.exp(a * depth)
        total, slope = 0.0, 0.0
        for i in range(len(depths)):
            t = depths[i] * factor
            ratio = _power(t, a)  # to the largest
            total += ratio
            if ratio > 0:
                slope += ratio / (1 + a * t)
        excess = np.log(total) - depth
        if excess > 0:
            low = depth
        else:
            high = depth
        step = excess * total / slope
        after = depth + step
        if not low <= after <= high or (n > 8 and n % 2):
            after = 0.5 * (low + high)
        converged = abs(after - depth) <= 2.3e-16 * (1 + depth)  # one unit in the last place
        depth = after
        if converged:
            break
    return depth


@numba.njit(inline="always")
@no_type_check
def _power(t, a):
    """The alpha-exponential, ``(1 + a t)_+ ** (1 / a)``."""
    if a == 0:
        return np.exp(t)
    return np.exp(np.log1p(a * t) / a) if a * t > -1 else 0.0


# --- passes over a row ----------------------------------------------------------------------------


@numba.njit(inline="always")
@no_type_check
def _space(rows):
    columns = rows.shape[1]
    blocks = -(-columns // BLOCK) if columns >= FEWEST_FOR_BLOCKS else 0
    return np.empty(columns, rows.dtype), np.empty(blocks, rows.dtype)


# The maximum of floats is not vectorised, whatever is permitted; that of integers is.
@_compile
@no_type_check
def _largest(row, blocks):
    """The largest entry, of each block too; NaN is larger than all others."""
    if len(blocks) == 0:
        return _number(_largest_rank(row))
    top = _rank(row.dtype.type(-np.inf))
    for b in range(len(blocks)):
        rank = _largest_rank(row[b * BLOCK : (b + 1) * BLOCK])
        blocks[b] = _number(rank)
        top = max(top, rank)
    return _number(top)


@_compile
@no_type_check
def _largest_rank(row):
    top = _rank(row.dtype.type(-np.inf))
    for i in range(len(row)):
        top = max(top, _rank(row[i]))
    return top


@no_type_check
def _rank(x):
    """An unsigned integer in the order of the numbers, 0 for -inf; NaN of either sign is above."""


@overload(_rank, inline="always")
@no_type_check
def _rank_by_type(x):
    # Of negative numbers all bits but the sign: the larger they are, the less is the number. A
    # negative NaN would be below -inf: counting from there it wraps around.
    if x is types.float64:
        return lambda x: (
            np.uint64(
                read_as(x, np.int64)
                ^ ((read_as(x, np.int64) >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))
            )
            + BEHIND_NAN_64
        )
    return lambda x: np.uint32(
        np.uint32(
            read_as(x, np.int32) ^ ((read_as(x, np.int32) >> np.int32(31)) & np.int32(0x7FFFFFFF))
        )
        + BEHIND_NAN_32
    )


@no_type_check
def _number(rank):
    """The number of a rank."""


@overload(_number, inline="always")
@no_type_check
def _number_by_type(rank):
    if rank is types.uint64:
        return lambda rank: _back64(np.int64(rank - BEHIND_NAN_64))
    return lambda rank: _back32(np.int32(np.uint32(rank - BEHIND_NAN_32)))


@numba.njit(inline="always")
@no_type_check
def _back64(bits):
    turned = np.int64(bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)))
    return read_as(turned, np.float64)


@numba.njit(inline="always")
@no_type_check
def _back32(bits):
    turned = np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return read_as(turned, np.float32)


@_compile
@no_type_check
def _near(row, blocks, top, threshold, numbers):
    """Copy what is above the threshold, and return how many; -1 if too many blocks have such."""
    hit = 0
    for b in range(len(blocks)):
        hit += blocks[b] - top > threshold
    if 2 * hit > len(blocks):
        return -1
    near = 0
    for b in range(len(blocks)):
        if blocks[b] - top > threshold:
            for i in range(b * BLOCK, min((b + 1) * BLOCK, len(row))):
                numbers[near] = row[i]
                near += row[i] - top > threshold
    return near


@_compile
@no_type_check
def _shifted(row, out, top, threshold):
    top = np.float64(top)
    for i in range(len(row)):
        height = (row[i] - top) - threshold
        out[i] = height if height > 0.0 else 0.0


@_compile
@no_type_check
def _squared(row, out, top, threshold):
    top = np.float64(top)
    for i in range(len(row)):
        height = (row[i] - top) * 0.5 - threshold
        height = height if height > 0.0 else 0.0
        out[i] = height * height


# --- backward -------------------------------------------------------------------------------------
# A poisoned row is NaN throughout, so its first entry tells.


@_compile
@no_type_check
def _sparsemax_gradient(upwards, found, downwards, start, stop):
    zero = found.dtype.type(0)
    for r in range(start, stop):
        g, p, out = upwards[r], found[r], downwards[r]
        if np.isnan(p[0]):
            out[:] = np.nan
            continue
        total, count = 0.0, 0
        for s in range(0, len(p), PORTION):
            t, k = _sum_on_support(g[s : s + PORTION], p[s : s + PORTION])
            total, count = total + t, count + k
        mean = found.dtype.type(total / count)
        for i in range(len(p)):
            out[i] = g[i] - mean if p[i] > zero else zero


@_compile_sums
@no_type_check
def _sum_on_support(g, p):
    zero, one = p.dtype.type(0), p.dtype.type(1)
    total, count = zero, zero
    for i in range(len(p)):
        total += g[i] if p[i] > zero else zero
        count += one if p[i] > zero else zero
    return total, int(count)


@_compile
@no_type_check
def _entmax15_gradient(upwards, found, downwards, start, stop):
    zero = found.dtype.type(0)
    for r in range(start, stop):
        g, p, out = upwards[r], found[r], downwards[r]
        if np.isnan(p[0]):
            out[:] = np.nan
            continue
        total, roots = 0.0, 0.0
        for s in range(0, len(p), PORTION):
            t, k = _sum_of_roots(g[s : s + PORTION], p[s : s + PORTION])
            total, roots = total + t, roots + k
        mean = found.dtype.type(total / roots)
        for i in range(len(p)):
            out[i] = np.sqrt(p[i]) * (g[i] - mean) if p[i] > zero else zero


@_compile_sums
@no_type_check
def _sum_of_roots(g, p):
    zero = p.dtype.type(0)
    total, roots = zero, zero
    for i in range(len(p)):
        root = np.sqrt(p[i])
        roots += root
        total += root * g[i] if p[i] > zero else zero
    return total, roots


@_compile
@no_type_check
def _entmax_gradient(upwards, found, downwards, alphas, start, stop):
    slopes = np.empty(found.shape[1], np.float64)
    for r in range(start, stop):
        g, p, out, b = upwards[r], found[r], downwards[r], 2 - alphas[r]
        if np.isnan(p[0]):
            out[:] = np.nan
            continue
        total, sum_of_slopes = 0.0, 0.0
        for i in range(len(p)):
            if p[i] > 0:
                slopes[i] = np.float64(p[i]) ** b
                sum_of_slopes += slopes[i]
                total += slopes[i] * g[i]
        mean = total / sum_of_slopes
        for i in range(len(p)):
            out[i] = slopes[i] * (g[i] - mean) if p[i] > 0 else 0
