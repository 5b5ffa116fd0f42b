"""The CPU with a compiler: one pass over the memory for all averages (extra ``fast``).

Each entry is computed on its own, so results do not depend on the number of threads.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from cln_tutorial._numba import NUMPY_DTYPES, read_as, widen
from cln_tutorial._threads import in_threads

FEWEST_FOR_A_THREAD = 2**18  # weights: about 80 µs, enough to pay for a task of the pool


def update(table: Any, shares: Sequence[float | int] | Tensor, key: int) -> None:
    """Update the averages of one ``functional.Table``."""
    like = [np.empty(0, NUMPY_DTYPES[dtype]) for dtype in (table.weight_dtype, table.shadow_dtype)]
    shares = np.array([float(share) for share in shares])
    if table.shadow_dtype == torch.bfloat16:
        loop, extra = _stochastic, (np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32))
    else:
        loop, extra = (_compensated if table.compensated else _nearest), ()
    weights = int(table.rows[:, 2].sum())

    @no_type_check  # a check would compile its own code at each call
    def run(start: int, stop: int) -> None:
        loop(table.rows[start:stop], shares, *like, *extra)

    threads = min(torch.get_num_threads(), len(table.rows), weights // FEWEST_FOR_A_THREAD)
    in_threads(len(table.rows), threads, run)


# --- the loops ------------------------------------------------------------------------------------


@intrinsic
@no_type_check
def _pointer(typingctx, address, like):
    """The address as a pointer to entries of the type of the array ``like``."""

    @no_type_check
    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(signature.return_type)
        return builder.inttoptr(arguments[0], kind)

    del typingctx
    return types.CPointer(like.dtype)(address, like), generate


_compile = numba.njit(nogil=True, cache=True, error_model="numpy")


@numba.njit(inline="always")
@no_type_check
def _array(row, column, like):
    """The chunk of which a row has the address."""
    return carray(_pointer(row[column], like), row[2])


@numba.njit(inline="always")
@no_type_check
def _towards(weights, shadows, shares):
    """Several averages in one pass: the more streams, the more the memory gives."""
    for i in range(len(weights)):
        weight = widen(weights[i])
        for k in range(len(shadows)):
            shadows[k][i] += shares[k] * (weight - shadows[k][i])


@_compile
@no_type_check
def _nearest(rows, shares, weight_like, shadow_like):
    rounded = shares.astype(shadow_like.dtype)
    from_shadow = (shares > 0) & (shares < 0.5)
    for row in rows:
        weights = _array(row, 3, weight_like)
        k = 0
        while k < len(shares):
            near, shadow = rounded[k:], _array(row, 4 + k, shadow_like)
            if k + 4 <= len(shares) and from_shadow[k : k + 4].all():
                b, c = _array(row, 5 + k, shadow_like), _array(row, 6 + k, shadow_like)
                d = _array(row, 7 + k, shadow_like)
                _towards(weights, (shadow, b, c, d), (near[0], near[1], near[2], near[3]))
                k += 3
            elif k + 2 <= len(shares) and from_shadow[k : k + 2].all():
                b = _array(row, 5 + k, shadow_like)
                _towards(weights, (shadow, b), (near[0], near[1]))
                k += 1
            elif from_shadow[k]:
                _towards(weights, (shadow,), (near[0],))
            elif shares[k] == 1:
                for i in range(len(weights)):
                    shadow[i] = widen(weights[i])
            elif shares[k] > 0:
                rest = shadow.dtype.type(1 - shares[k])
                for i in range(len(weights)):
                    weight = shadow.dtype.type(widen(weights[i]))
                    shadow[i] = weight - rest * (weight - shadow[i])
            k += 1


@_compile
@no_type_check
def _compensated(rows, shares, weight_like, shadow_like):
    averages = len(shares)
    for row in rows:
        weights = _array(row, 3, weight_like)
        for k in range(averages):
            shadow = _array(row, 4 + k, shadow_like)
            low = _array(row, 4 + averages + k, shadow_like)
            share, rest = shadow.dtype.type(shares[k]), shadow.dtype.type(1 - shares[k])
            if shares[k] == 0:
                continue
            if shares[k] == 1:
                for i in range(len(weights)):
                    shadow[i] = widen(weights[i])
                    low[i] = 0
            else:
                near_shadow = shares[k] < 0.5
                for i in range(len(weights)):
                    weight = shadow.dtype.type(widen(weights[i]))
                    if near_shadow:
                        high = shadow[i]
                        step = low[i] + share * ((weight - high) - low[i])
                    else:
                        high = weight
                        step = rest * ((shadow[i] - weight) + low[i])
                    total = high + step  # and what the sum has lost, Knuth's two-sum
                    back = total - high
                    shadow[i] = total
                    low[i] = (high - (total - back)) + (step - back)


@numba.njit(inline="always")
@no_type_check
def _scramble(x, second):
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ second)
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(inline="always")
@no_type_check
def _rounded(near, step, index, key, second):
    """As ``functional.mix_stochastically``, to the last bit."""
    total = np.float32(near + step)
    lost = np.float32(step - np.float32(total - near))
    whole = read_as(total, np.uint32)
    lost_bits = np.int32(read_as(lost, np.uint32) ^ (whole & np.uint32(0x80000000)))
    bits = np.int32(whole & np.uint32(0x7FFFFFFF))
    exponent = np.int32(np.int32(bits + (lost_bits >> np.int32(31))) & np.int32(0x7F800000))
    exponent = max(exponent, np.int32(64 << 23))
    unit = read_as(np.uint32(np.uint32(291 << 23) - np.uint32(exponent)), np.float32)
    units = np.int32(read_as(np.uint32(lost_bits), np.float32) * unit)
    noise = _scramble(np.uint32(index ^ key), second)
    below = np.int32(np.int32(bits & np.int32(0xFFFF)) << np.int32(14))
    below = np.int32(below + np.int32(noise >> np.uint32(2)))
    carry = np.int32(np.int32(below + units) >> np.int32(30))
    carry = carry if bits < np.int32(0x7F7F0000) else np.int32(0)
    return np.uint16(np.int32(np.int32(whole >> np.uint32(16)) + carry))


@_compile
@no_type_check
def _stochastic(rows, shares, weight_like, shadow_like, key_low, key_high):
    for row in rows:
        first = row[1]
        start = np.uint32(first)
        key = _scramble(np.uint32(np.uint32(row[0]) ^ key_low), np.uint32(0))
        second = _scramble(np.uint32(key ^ key_high), np.uint32(0))
        second = np.uint32(second ^ np.uint32(first >> 32))
        weights = _array(row, 3, weight_like)
        for k in range(len(shares)):
            shadow = _array(row, 4 + k, shadow_like)
            share = np.float32(shares[k])
            if share == 0:
                continue
            if share < np.float32(0.5):
                for i in range(len(weights)):
                    old = widen(shadow[i])
                    step = share * (np.float32(widen(weights[i])) - old)
                    shadow[i] = _rounded(old, step, np.uint32(start + np.uint32(i)), key, second)
            else:
                share = np.float32(1) - share
                copy = share == 0
                for i in range(len(weights)):
                    weight = np.float32(widen(weights[i]))
                    step = share * (widen(shadow[i]) - weight)
                    step = np.float32(-0.0) if copy else step
                    shadow[i] = _rounded(weight, step, np.uint32(start + np.uint32(i)), key, second)
