"""The CPU with a compiler: sort, pool adjacent violators and write, in few passes (extra ``fast``).

A float32 and its index go into one number of 64 bits. Short rows of these are sorted by numpy's
vector instructions, long ones by their digits, in four linear passes. After the sort the number
still holds the value, so that the loop over the sorted row gathers nothing. It leaves the index and
the first position of the block: all that a gradient needs.
"""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from cln_tutorial._numba import read_as
from cln_tutorial._threads import in_threads

FEWEST_FOR_A_THREAD = 2**13  # entries: about 100 µs
FEWEST_FOR_DIGITS = 400  # entries of a row that are sorted by their digits
CHUNK = 2**14  # entries that are sorted and pooled while they are in the cache
SMALLEST = 1e-300  # as in isotonic.py
MEAN, RANK, SORT, ENTROPIC_RANK, ENTROPIC_SORT = range(5)


def solve(rows: Tensor, strength: Tensor, pads: Tensor, layout: Tensor, problem: Any) -> Tensor:
    """Return the solution, and write the layout of ``isotonic.find_blocks``."""
    rows = rows.contiguous()
    batch, n = rows.shape
    solution = torch.empty_like(rows)
    packed, sorts = rows.dtype == torch.float32, problem.kind != "mean"
    order = None if packed else _order(rows, problem).numpy().view(np.uint64)
    arrays = [t.numpy() for t in (rows, layout, strength, pads, solution)]
    row_array, layout_array = arrays[:2]
    code, several = _code(problem), max(1, CHUNK // n)

    @no_type_check  # a check would compile its own code at each call
    def run(start: int, stop: int) -> None:
        work = np.empty((3, n))
        here = min(several, stop - start)
        if layout.dtype == torch.int32:
            keys = np.empty((here, n), np.uint64)
        if packed and sorts and n >= FEWEST_FOR_DIGITS:
            buffer, counts = np.empty(n, np.uint64), np.empty((4, 256), np.uint32)
        for first in range(start, stop, several):
            last = min(first + several, stop)
            if not packed:
                keys = order[first:last]
            elif layout.dtype == torch.int64:  # in place: a key is read before its entry is written
                keys = layout_array[first:last].view(np.uint64)
            if packed:
                _write_keys(row_array[first:last], keys, problem.sign)
            if packed and sorts and n >= FEWEST_FOR_DIGITS:
                _sort_by_digits(keys[: last - first], buffer, counts)
            elif packed and sorts:
                keys[: last - first].sort(axis=-1)
            _solve(*arrays, keys, work, code, problem.sign, first, last)

    in_threads(batch, _threads(batch, n), run)
    return solution


def _order(rows: Tensor, problem: Any) -> Tensor:
    if problem.kind == "mean":
        return torch.arange(rows.shape[1]).expand(rows.shape)
    return (problem.sign * rows).sort(dim=-1, descending=True, stable=True).indices


def gradient(
    grad: Tensor,
    rows: Tensor,
    solution: Tensor | None,
    layout: Tensor,
    strength: Tensor,
    problem: Any,
) -> Tensor:
    """Return the gradient with respect to the rows."""
    batch, n = rows.shape
    found = torch.empty_like(rows, memory_format=torch.contiguous_format)
    solution = rows if solution is None else solution
    tensors = (grad.contiguous(), rows.contiguous(), solution, layout, strength, found)
    arrays = [t.numpy() for t in tensors]
    loop = _rank_gradient if problem.kind == "rank" else _sort_gradient

    @no_type_check
    def run(start: int, stop: int) -> None:
        loop(*arrays, problem.kl, problem.sign, start, stop)

    in_threads(batch, _threads(batch, n), run)
    return found


def _code(problem: Any) -> int:
    if problem.kind == "mean":
        return MEAN
    if problem.kind == "rank":
        return ENTROPIC_RANK if problem.kl else RANK
    return ENTROPIC_SORT if problem.kl else SORT


def _threads(batch: int, n: int) -> int:
    return min(torch.get_num_threads(), batch, batch * n // FEWEST_FOR_A_THREAD)


# --- the loops ------------------------------------------------------------------------------------

_compile = numba.njit(nogil=True, cache=True, error_model="numpy")
_inline = numba.njit(inline="always")


@_compile
@no_type_check
def _write_keys(rows, keys, sign):
    """Of an upward sort of these the values times ``sign`` fall, and ties keep their order."""
    flip = np.uint32(0xFFFFFFFF) if sign > 0 else np.uint32(0)
    for r in range(rows.shape[0]):
        for i in range(rows.shape[1]):
            bits = read_as(np.float32(rows[r, i] + np.float32(0)), np.uint32)  # -0 ties with 0
            bits = bits ^ np.uint32(
                np.uint32(np.int32(read_as(bits, np.int32) >> np.int32(31))) | np.uint32(0x80000000)
            )
            keys[r, i] = np.uint64(bits ^ flip) << np.uint64(32) | np.uint64(i)


@_compile
@no_type_check
def _sort_by_digits(keys, buffer, counts):
    """Sort each row by its upper 32 bits, from the last digit of 8 to the first."""
    n = keys.shape[1]
    for r in range(keys.shape[0]):
        here, there = keys[r], buffer
        counts[:] = 0
        moved = False
        for i in range(n):
            for digit in range(4):
                counts[digit, _digit(here[i], digit)] += np.uint32(1)
        for digit in range(4):
            place = counts[digit]
            if place[_digit(here[0], digit)] == n:
                continue
            total = np.uint32(0)
            for k in range(256):
                place[k], total = total, np.uint32(total + place[k])
            for i in range(n):
                k = _digit(here[i], digit)
                there[place[k]] = here[i]
                place[k] += np.uint32(1)
            here, there, moved = there, here, not moved
        if moved:
            keys[r] = buffer


@_inline
@no_type_check
def _digit(key, digit):
    return np.uint8(key >> np.uint64(32 + 8 * digit))


@no_type_check
def _value(entry, row, flip):
    """The value of a sorted entry, which float32 has in the key and float64 does not."""


@overload(_value, inline="always")
@no_type_check
def _value_by_type(entry, row, flip):
    if row.dtype is types.float64:
        return lambda entry, row, flip: row[_index(entry)]
    return lambda entry, row, flip: _decoded(np.uint32(np.uint64(entry) >> np.uint64(32)), flip)


@_inline
@no_type_check
def _decoded(bits, flip):
    bits = np.uint32(bits ^ flip)
    # The first bit is that of numbers above zero, whose other bits stand as they are.
    mask = np.uint32(np.uint32(bits >> np.uint32(31)) - np.uint32(1)) | np.uint32(0x80000000)
    return np.float64(read_as(np.uint32(bits ^ mask), np.float32))


@_inline
@no_type_check
def _violates(code, tau, top, a, ca, xa, sa, cb, xb, sb):
    """As ``isotonic._violates`` of (start, count, first, rest), without its quotients."""
    if code == ENTROPIC_RANK:
        above = ca * (top - a - 0.5 * (ca - 1))
        below = cb * (top - a - ca - 0.5 * (cb - 1))
        return sa * below <= sb * above * np.exp((xb - xa) / tau)
    if code == ENTROPIC_SORT:
        ratio = np.expm1(-ca / tau) / np.expm1(-cb / tau)
        return ca / tau + np.log(ratio) < (xa - xb) + np.log(sa / sb)
    both = ca * cb
    fall = (xa - xb) * both + sa * cb - sb * ca
    if code == RANK:
        return fall <= tau * (0.5 * (ca + cb) * both)
    if code == SORT:
        return 0.5 * (ca + cb) * both < tau * fall
    return fall <= 0


@_inline
@no_type_check
def _carried(code, tau, rest, count, fall):
    if code == ENTROPIC_RANK:
        return rest * np.exp(-fall / tau)
    if code == ENTROPIC_SORT:
        return rest * np.exp(-fall)
    return rest - count * fall


@no_type_check
def _packed(key, start, entries):
    """An entry of the layout."""


@overload(_packed, inline="always")
@no_type_check
def _packed_by_type(key, start, entries):
    if entries.dtype is types.int32:
        return lambda key, start, entries: (np.int64(start) << 16) | _index(key)
    return lambda key, start, entries: (np.int64(start) << 32) | _index(key)


@no_type_check
def _start(entry):
    """The first position of the block of an entry."""


@overload(_start, inline="always")
@no_type_check
def _start_by_type(entry):
    return (lambda entry: entry >> 16) if entry is types.int32 else (lambda entry: entry >> 32)


@no_type_check
def _index(entry):
    """The index in an entry of the layout, or in a key."""


@overload(_index, inline="always")
@no_type_check
def _index_by_type(entry):
    if entry is types.int32:
        return lambda entry: np.int64(entry) & 0xFFFF
    return lambda entry: np.int64(entry) & 0xFFFFFFFF


@_compile
@no_type_check
def _solve(rows, layout, strength, pads, solution, keys, work, code, sign, start, stop):
    n = rows.shape[1]
    starts, firsts, rests = work[0], work[1], work[2]
    flip = np.uint32(0xFFFFFFFF) if sign > 0 else np.uint32(0)
    alone = 1.0 if code in (ENTROPIC_RANK, ENTROPIC_SORT) else 0.0
    for r in range(start, stop):
        row, key, entries, out = rows[r], keys[r - start], layout[r], solution[r]
        masked, bad = 0, 0
        for i in range(n):
            masked += row[i] == -np.inf
            bad += not row[i] < np.inf
        if bad or (code == MEAN and masked):
            for i in range(n):
                out[i] = np.nan
                entries[i] = _packed(key[i], -1, entries)
            continue
        low, high = (0, n - masked) if sign > 0 else (masked, n)
        tau = max(strength[r], SMALLEST)
        top = np.float64(n - pads[r]) if sign > 0 else np.float64(n)

        # The block at hand stays in registers; those before it are on the stack.
        blocks, a, c, x, s = 0, low, 0.0, 0.0, 0.0
        for i in range(low, high):
            new = sign * _value(key[i], row, flip)
            if i == low or not _violates(code, tau, top, a, c, x, s, 1.0, new, alone):
                if i > low:
                    starts[blocks], firsts[blocks], rests[blocks] = a, x, s
                    blocks += 1
                a, c, x, s = i, 1.0, new, alone
                continue
            s += _carried(code, tau, alone, 1.0, x - new)
            c += 1.0
            while blocks > 0:
                b = np.int64(starts[blocks - 1])
                x_b, s_b, c_b = firsts[blocks - 1], rests[blocks - 1], np.float64(a - b)
                if not _violates(code, tau, top, b, c_b, x_b, s_b, c, x, s):
                    break
                s = s_b + _carried(code, tau, s, c, x_b - x)
                a, c, x = b, c_b + c, x_b
                blocks -= 1
        if low < high:
            starts[blocks], firsts[blocks], rests[blocks] = a, x, s
            blocks += 1
        inverse = 0.0 if strength[r] == 0 else 1 / tau
        _write(row, key, entries, out, work, blocks, high, top, inverse, flip, code, sign)
        masked_rank = 0.5 * (masked - pads[r] + 1) + (0 if sign > 0 else n - masked)
        for i in range(masked):
            at = high + i if sign > 0 else i
            if code in (RANK, ENTROPIC_RANK):
                out[_index(key[at])] = masked_rank
            else:
                out[at] = -np.inf
            entries[at] = _packed(key[at], -1, entries)


@_compile
@no_type_check
def _write(row, key, entries, out, work, blocks, high, top, inverse, flip, code, sign):
    for block in range(blocks):
        a, x, s = np.int64(work[0, block]), work[1, block], work[2, block]
        end = np.int64(work[0, block + 1]) if block + 1 < blocks else high
        c = np.float64(end - a)
        rank = top - a - 0.5 * (c - 1)
        if code == RANK:
            base = x + s / c
            for i in range(a, end):
                value = sign * _value(key[i], row, flip)
                out[_index(key[i])] = ((value - x) - s / c) * inverse + rank
                entries[i] = _packed(key[i], a, entries)
            continue
        if code == ENTROPIC_RANK:
            share = rank * c / s
            for i in range(a, end):
                value = sign * _value(key[i], row, flip)
                out[_index(key[i])] = share * np.exp((value - x) * inverse)
                entries[i] = _packed(key[i], a, entries)
            continue
        if code == ENTROPIC_SORT:
            step = inverse
            base = x + np.log(s)
            if c > 1:
                base -= np.log(np.expm1(-c * inverse) / np.expm1(-inverse))
        else:
            step = 0.0 if code == MEAN else inverse
            base = x + s / c + 0.5 * (c - 1) * step
        for i in range(a, end):
            out[i] = sign * (base - (i - a) * step)
            entries[i] = _packed(key[i], a, entries)


@_compile
@no_type_check
def _rank_gradient(grad, rows, solution, layout, strength, found, entropic, sign, start, stop):
    n = rows.shape[1]
    for r in range(start, stop):
        g, y, entries, out = grad[r], solution[r], layout[r], found[r]
        scale = 0.0 if strength[r] == 0 else sign / max(strength[r], SMALLEST)
        end = 0
        while end < n:
            a, total, weight = end, 0.0, 0.0
            while end < n and _start(entries[end]) == a:
                index = _index(entries[end])
                share = np.float64(y[index]) if entropic else 1.0
                total += share * g[index]
                weight += share
                end += 1
            if end <= a + 1:  # alone, or masked
                out[_index(entries[a])] = 0
                end = a + 1
                continue
            mean = total / weight
            for i in range(a, end):
                index = _index(entries[i])
                share = np.float64(y[index]) if entropic else 1.0
                out[index] = share * (g[index] - mean) * scale


@_compile
@no_type_check
def _sort_gradient(grad, rows, solution, layout, strength, found, entropic, sign, start, stop):
    n = rows.shape[1]
    for r in range(start, stop):
        g, row, entries, out = grad[r], rows[r], layout[r], found[r]
        end = 0
        while end < n:
            a, total, weight = end, 0.0, 0.0
            first = np.float64(row[_index(entries[a])])
            while end < n and _start(entries[end]) == a:
                total += g[end]
                if entropic:
                    weight += np.exp(sign * (row[_index(entries[end])] - first))
                end += 1
            if end <= a + 1:
                out[_index(entries[a])] = total
                end = a + 1
                continue
            mean = total / weight if entropic else total / (end - a)
            for i in range(a, end):
                index = _index(entries[i])
                share = np.exp(sign * (row[index] - first)) if entropic else 1.0
                out[index] = share * mean
