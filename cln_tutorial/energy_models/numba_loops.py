"""The CPU with a compiler: noise of counters, and all steps of a block of chains (extra ``fast``).

A block of chains stays in the cache for all steps, coordinate by coordinate, so that each inner
loop runs over chains and fills the vector registers. Its length is fixed: no chain is ever in a
remainder that other instructions would round differently, so a chain does not depend on its
neighbours, on the number of chains, nor on the number of threads.
"""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from cln_tutorial._numba import read_as
from cln_tutorial._threads import in_threads

BLOCK = 256  # chains: shorter blocks pay for calls, longer ones leave the cache
FEWEST_FOR_A_THREAD = 2**14  # chain-steps, or quadruples of normals: about 100 µs
ULA, MALA, BAOAB = range(3)
MIXTURE, DOUBLE_WELL = range(2)


def normals(seed: int, step: int, stream: int, first_chain: int, n: int, width: int) -> Tensor:
    """Return ``(n, width)`` numbers of float32, as ``philox.counter_normal``."""
    numbers = torch.empty(n, width, dtype=torch.float32, device="cpu")
    array = numbers.numpy()
    key = np.uint64(seed)

    @no_type_check  # a check would compile its own code at each call
    def run(start: int, stop: int) -> None:
        _normals(array, key, step, stream, first_chain, start, stop)

    quads = n * -(-width // 4)
    _in_threads(-(-quads // BLOCK), quads, run)
    return numbers


def uniforms(seed: int, step: int, stream: int, first_chain: int, n: int) -> Tensor:
    """Return ``(n,)`` numbers of float32, as ``philox.counter_uniform``."""
    numbers = torch.empty(n, dtype=torch.float32, device="cpu")
    array = numbers.numpy()
    key = np.uint64(seed)

    @no_type_check
    def run(start: int, stop: int) -> None:
        _uniforms(array, key, step, stream, first_chain, start, stop)

    _in_threads(-(-n // BLOCK), n, run)
    return numbers


def simulate(
    method: int,
    energy: tuple[int, Tensor, Tensor, Tensor],
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    rates: Tensor,
    thin: int,
    clock: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor]:
    """Move ``x`` and ``v`` of ``state = (x, v, frames, energies)`` in place by all steps.

    ``energy`` is ``(kind, centres, precisions, offsets)``. ``x`` and ``v`` are ``(n, d)``; every
    ``thin``-th state goes to ``frames`` ``(kept, n, d)`` and ``energies`` ``(kept, n)``. ``rates``
    is ``(3, n)``: step, noise and inverse temperature for ULA and MALA; half step, decay and noise
    for BAOAB. ``clock`` is ``(seed, first_chain, first_step, n_steps)``.

    Returns how many proposals of MALA were accepted, ``(n,)``, and how often an energy or gradient
    was not finite, at the start and later, ``(2, n)``.
    """
    n = len(state[0])
    accepted = torch.zeros(n, dtype=torch.int64, device="cpu")
    lost = torch.zeros(2, n, dtype=torch.int64, device="cpu")
    model = (energy[0], *(part.numpy() for part in energy[1:]))
    states = tuple(part.numpy() for part in state)
    counts = accepted.numpy(), lost.numpy()
    table = rates.numpy()
    counters = (np.uint64(clock[0]), *clock[1:])

    @no_type_check
    def run(start: int, stop: int) -> None:
        _simulate(method, model, states, table, counts, thin, counters, start, stop)

    _in_threads(-(-n // BLOCK), n * clock[-1], run)
    return accepted, lost


def _in_threads(blocks: int, work: int, run) -> None:
    in_threads(blocks, min(torch.get_num_threads(), blocks, work // FEWEST_FOR_A_THREAD), run)


# Products may be fused with sums, which rounds less; all else keeps NaN and the order of sums.
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})

# --- words ----------------------------------------------------------------------------------------

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_FIRST_MULTIPLIER = np.uint64(0xD2511F53)
_SECOND_MULTIPLIER = np.uint64(0xCD9E8D57)
_FIRST_KEY_STEP = np.uint64(0x9E3779B9)
_SECOND_KEY_STEP = np.uint64(0xBB67AE85)


# Words are held in 64 bits, and what is above 32 is dropped where a product needs it.
@_compiled
@no_type_check
def _philox(quads, row, step, chains, stream, key, words):
    for i in range(BLOCK):
        w0 = np.uint64(quads[row, i])
        w1 = np.uint64(step)
        w2 = np.uint64(chains[i])
        w3 = np.uint64(stream)
        k0 = key & _WORD
        k1 = key >> _SHIFT
        for _ in range(10):
            product0 = (w0 & _WORD) * _FIRST_MULTIPLIER
            product1 = (w2 & _WORD) * _SECOND_MULTIPLIER
            w0 = (product1 >> _SHIFT) ^ w1 ^ k0
            w1 = product1
            w2 = (product0 >> _SHIFT) ^ w3 ^ k1
            w3 = product0
            k0 = (k0 + _FIRST_KEY_STEP) & _WORD
            k1 = (k1 + _SECOND_KEY_STEP) & _WORD
        words[0, i] = np.uint32(w0)
        words[1, i] = np.uint32(w1)
        words[2, i] = np.uint32(w2)
        words[3, i] = np.uint32(w3)


# --- functions that are vectorised, where those of the library are a call for each number ---------

_HALF = np.float32(0.5)
_ONE = np.float32(1)
_MINUS_TWO = np.float32(-2)
_ZERO = np.float32(0)
_QUARTER = np.float32(0.25)
_INFINITY = np.float32(np.inf)
_PER_WORD = np.float32(2.0**-32)
_TURN_PER_WORD = np.float32(2 * math.pi * 2.0**-32)
_LOG_2 = np.float32(math.log(2))
_LOG2_E = np.float32(1 / math.log(2))
_BELOW_ONE = np.float32(1 - 2**-24)


@numba.njit(inline="always")
@no_type_check
def _exponential(x):
    """Of numbers up to zero, right to 2e-7 of itself."""
    x = x * _LOG2_E
    x = np.float32(-126) if x < np.float32(-126) else x  # and NaN stays
    whole = np.floor(x + _HALF)
    y = x - whole
    # The polynomial that has the least relative error of 2^y on [-1/2, 1/2], 2e-9.
    power = np.float32(1.5353362e-4) * y + np.float32(1.3398874650577e-3)
    power = power * y + np.float32(9.6184373591245e-3)
    power = power * y + np.float32(5.5503324705357e-2)
    power = power * y + np.float32(0.24022647913600)
    power = power * y + np.float32(0.69314720285533)
    power = power * y + _ONE
    return power * read_as(np.int32((np.int32(whole) + 127) << 23), np.float32)


@numba.njit(inline="always")
@no_type_check
def _logarithm(x):
    """Of normal positive numbers, right to 3e-7 of itself."""
    bits = read_as(x, np.int32)
    whole = np.int32((bits - np.int32(0x3F3504F3)) >> 23)  # the rest is in [sqrt(1/2), sqrt(2))
    y = read_as(np.int32(bits - (whole << 23)), np.float32) - _ONE
    # log(1 + y) = y - y²/2 + y³ p(y); this p has the least relative error there, 3e-8.
    p = np.float32(0.08700434857) * y - np.float32(0.14267493125758)
    p = p * y + np.float32(0.14914770822621)
    p = p * y - np.float32(0.16577584043313)
    p = p * y + np.float32(0.19963063496754)
    p = p * y - np.float32(0.25001337053785)
    p = p * y + np.float32(0.33333910744007)
    square = y * y
    return y + (square * (p * y - _HALF) + np.float32(whole) * _LOG_2)


# The word is an angle. The two upper bits, after rounding, are the quarter of the turn: they say
# which of sine and cosine is which, and both signs; the rest is an angle in [-45°, 45°).
@_compiled
@no_type_check
def _box_muller(words, pair, noise, first):
    for i in range(BLOCK):
        u = (np.float32(words[2 * pair, i]) + _HALF) * _PER_WORD
        radius = np.sqrt(_MINUS_TWO * _logarithm(u))
        angle = words[2 * pair + 1, i]
        quarter = np.uint32(np.uint32(angle + np.uint32(1 << 29)) >> np.uint32(30))
        rest = read_as(np.uint32(angle - np.uint32(quarter << np.uint32(30))), np.int32)
        t = (np.float32(rest) + _HALF) * _TURN_PER_WORD
        square = t * t
        # These have the least error on [-45°, 45°]: 4e-9 and 1e-10.
        p = np.float32(-1.951729843736e-4) * square + np.float32(8.332178142055e-3)
        p = p * square - np.float32(0.16666654943634)
        sine = p * square * t + t
        p = np.float32(2.443845099944e-5) * square - np.float32(1.388736751048e-3)
        p = p * square + np.float32(4.166664686633e-2)
        cosine = p * square * square + (_ONE - _HALF * square)
        odd = np.uint32(quarter & np.uint32(1)) != np.uint32(0)
        across = sine if odd else cosine
        along = cosine if odd else sine
        left = np.uint32(np.uint32((quarter + np.uint32(1)) & np.uint32(2)) << np.uint32(30))
        below = np.uint32(np.uint32(quarter & np.uint32(2)) << np.uint32(30))
        cosine = read_as(np.uint32(read_as(across, np.uint32) ^ left), np.float32)
        sine = read_as(np.uint32(read_as(along, np.uint32) ^ below), np.float32)
        noise[first, i] = radius * cosine
        noise[first + 1, i] = radius * sine


@numba.njit(inline="always")
@no_type_check
def _uniform(word):
    u = (np.float32(word) + _HALF) * _PER_WORD
    return _BELOW_ONE if u > _BELOW_ONE else u


# --- noise ----------------------------------------------------------------------------------------


@_compiled
@no_type_check
def _normals(numbers, key, step, stream, first_chain, start, stop):
    n, width = numbers.shape
    per_chain = (width + 3) // 4
    quads = np.empty((1, BLOCK), np.uint32)
    chains = np.empty(BLOCK, np.uint32)
    words = np.empty((4, BLOCK), np.uint32)
    noise = np.empty((4, BLOCK), np.float32)
    for block in range(start, stop):
        for i in range(BLOCK):
            unit = block * BLOCK + i
            quads[0, i] = unit % per_chain
            chains[i] = first_chain + unit // per_chain
        _philox(quads, 0, step, chains, stream, key, words)
        for pair in range(min(2, (width + 1) // 2)):
            _box_muller(words, pair, noise, 2 * pair)
        for i in range(min(BLOCK, n * per_chain - block * BLOCK)):
            row = (block * BLOCK + i) // per_chain
            first = 4 * ((block * BLOCK + i) % per_chain)
            for j in range(min(4, width - first)):
                numbers[row, first + j] = noise[j, i]


@_compiled
@no_type_check
def _uniforms(numbers, key, step, stream, first_chain, start, stop):
    quads = np.zeros((1, BLOCK), np.uint32)
    chains = np.empty(BLOCK, np.uint32)
    words = np.empty((4, BLOCK), np.uint32)
    for block in range(start, stop):
        first = block * BLOCK
        for i in range(BLOCK):
            chains[i] = first_chain + first + i
        _philox(quads, 0, step, chains, stream, key, words)
        for i in range(min(BLOCK, len(numbers) - first)):
            numbers[first + i] = _uniform(words[0, i])


# --- energies -------------------------------------------------------------------------------------

# A loop that is vectorised gets whole arrays and the number of a row: a view of the row would be
# counted, and the two counts cost as much as the loop.


@_compiled
@no_type_check
def _energy(model, x, scratch, e, g):
    kind, centres, precisions, offsets = model
    if kind == MIXTURE:
        _mixture(centres, precisions, offsets, x, scratch, e, g)
    else:
        _double_well(offsets[0], x, e, g)


@_compiled
@no_type_check
def _mixture(centres, precisions, offsets, x, logits, e, g):
    """E = -log sum_k exp(o_k - sum_d λ_kd (x_d - m_kd)² / 2); one component is a Gaussian."""
    total = len(centres)
    for k in range(len(centres)):
        _fill(logits, k, offsets[k])
        for d in range(len(x)):
            _subtract_square(x, d, centres[k, d], _HALF * precisions[k, d], logits, k)
    _fill(logits, total, _ZERO)
    _take_largest(logits, e)
    for d in range(len(x)):
        _fill(g, d, _ZERO)
    for k in range(len(centres)):
        _add_weight(logits, k, e, total)
        for d in range(len(x)):
            _add_pull(logits, k, x, d, centres[k, d], precisions[k, d], g)
    for d in range(len(x)):
        _divide(g, d, logits, total)
    _close(logits, total, e)


@_compiled
@no_type_check
def _fill(rows, row, value):
    for i in range(BLOCK):
        rows[row, i] = value


@_compiled
@no_type_check
def _subtract_square(x, d, centre, half_precision, logits, k):
    for i in range(BLOCK):
        away = x[d, i] - centre
        logits[k, i] -= half_precision * away * away


@_compiled
@no_type_check
def _take_largest(logits, largest):
    for i in range(BLOCK):
        largest[i] = logits[0, i]
    for k in range(1, len(logits) - 1):
        for i in range(BLOCK):
            logit, so_far = logits[k, i], largest[i]
            largest[i] = logit if logit > so_far else so_far


@_compiled
@no_type_check
def _add_weight(logits, k, largest, total):
    for i in range(BLOCK):
        weight = _exponential(logits[k, i] - largest[i])
        logits[k, i] = weight
        logits[total, i] += weight


@_compiled
@no_type_check
def _add_pull(weights, k, x, d, centre, precision, g):
    for i in range(BLOCK):
        g[d, i] += weights[k, i] * precision * (x[d, i] - centre)


@_compiled
@no_type_check
def _divide(g, d, weights, total):
    for i in range(BLOCK):
        g[d, i] /= weights[total, i]


@_compiled
@no_type_check
def _close(weights, total, e):
    for i in range(BLOCK):
        e[i] = -(e[i] + _logarithm(weights[total, i]))


@_compiled
@no_type_check
def _double_well(barrier, x, e, g):
    """E = b (x_0² - 1)² + sum of x_d² / 2 over the others."""
    four = np.float32(4)
    for i in range(BLOCK):
        over = x[0, i] * x[0, i] - _ONE
        e[i] = barrier * over * over
        g[0, i] = four * barrier * x[0, i] * over
    for d in range(1, len(x)):
        for i in range(BLOCK):
            e[i] += _HALF * x[d, i] * x[d, i]
            g[d, i] = x[d, i]


# --- steps ----------------------------------------------------------------------------------------


@_compiled
@no_type_check
def _simulate(method, model, states, table, counts, thin, clock, start, stop):
    x_all, v_all, frames, energies = states
    accepted, lost = counts
    key, first_chain, first_step, n_steps = clock
    n, width = x_all.shape
    per_chain = (width + 3) // 4
    x, v = np.empty((width, BLOCK), np.float32), np.empty((width, BLOCK), np.float32)
    g, new_g = np.empty((width, BLOCK), np.float32), np.empty((width, BLOCK), np.float32)
    e, new_e = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    new_x = np.empty((width, BLOCK), np.float32)
    noise = np.empty((4 * per_chain, BLOCK), np.float32)
    rates = np.empty((3, BLOCK), np.float32)
    scratch = np.empty((len(model[1]) + 1, BLOCK), np.float32)
    size, log_ratio = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    words = np.empty((4, BLOCK), np.uint32)
    quads = np.empty((per_chain, BLOCK), np.uint32)
    chains = np.empty(BLOCK, np.uint32)
    moved, bad = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    for quad in range(per_chain):
        quads[quad] = quad
    for block in range(start, stop):
        first = block * BLOCK
        real = min(BLOCK, n - first)
        for i in range(BLOCK):
            row = min(first + i, n - 1)  # the last block is filled up with copies
            chains[i] = first_chain + first + i
            for d in range(width):
                x[d, i] = x_all[row, d]
                v[d, i] = v_all[row, d]
            for r in range(3):
                rates[r, i] = table[r, row]
        moved[:] = 0
        bad[:] = 0
        _energy(model, x, scratch, e, g)
        _look(e, g, size, bad)
        for i in range(real):
            lost[0, first + i] = bad[i]
        bad[:] = 0
        for step in range(n_steps):
            for quad in range(per_chain):
                _philox(quads, quad, first_step + step, chains, 0, key, words)
                for pair in range(min(2, (width + 1) // 2 - 2 * quad)):
                    _box_muller(words, pair, noise, 4 * quad + 2 * pair)
            if method == MALA:
                _langevin(x, g, noise, rates, new_x)
                _energy(model, new_x, scratch, new_e, new_g)
                _look(new_e, new_g, size, bad)
                _philox(quads, 0, first_step + step, chains, 1, key, words)
                _accept(x, g, e, new_x, new_g, new_e, words, rates, log_ratio, moved)
            elif method == ULA:
                _langevin(x, g, noise, rates, new_x)
                x, new_x = new_x, x
                _energy(model, x, scratch, e, g)
                _look(e, g, size, bad)
            else:
                _kick_drift_and_mix(x, v, g, noise, rates)
                _energy(model, x, scratch, e, g)
                _look(e, g, size, bad)
                _kick(v, g, rates)
            if len(frames) and (step + 1) % thin == 0:
                for i in range(real):
                    energies[step // thin, first + i] = e[i]
                    for d in range(width):
                        frames[step // thin, first + i, d] = x[d, i]
        for i in range(real):
            accepted[first + i] = moved[i]
            lost[1, first + i] = bad[i]
            for d in range(width):
                x_all[first + i, d] = x[d, i]
                v_all[first + i, d] = v[d, i]


@_compiled
@no_type_check
def _langevin(x, g, noise, rates, new):
    """x' = x - h g + s ξ."""
    for d in range(len(x)):
        for i in range(BLOCK):
            new[d, i] = x[d, i] - rates[0, i] * g[d, i] + rates[1, i] * noise[d, i]


@_compiled
@no_type_check
def _kick_drift_and_mix(x, v, g, noise, rates):
    """B, A, O and A of BAOAB."""
    for d in range(len(x)):
        for i in range(BLOCK):
            before = v[d, i] - rates[0, i] * g[d, i]
            after = rates[1, i] * before + rates[2, i] * noise[d, i]
            x[d, i] += rates[0, i] * before + rates[0, i] * after
            v[d, i] = after


@_compiled
@no_type_check
def _kick(v, g, rates):
    for d in range(len(v)):
        for i in range(BLOCK):
            v[d, i] -= rates[0, i] * g[d, i]


@_compiled
@no_type_check
def _look(e, g, size, bad):
    """Count where an energy or a gradient is not finite, as their size tells."""
    for i in range(BLOCK):
        size[i] = abs(e[i])
    for d in range(len(g)):
        for i in range(BLOCK):
            size[i] += abs(g[d, i])
    for i in range(BLOCK):
        bad[i] += np.uint32(not size[i] < _INFINITY)


@_compiled
@no_type_check
def _accept(x, g, e, new_x, new_g, new_e, words, rates, log_ratio, moved):
    """T ln a = e - e' + (g + g')·(x' - x)/2 - h (|g'|² - |g|²)/4; accept where ln u < ln a."""
    for i in range(BLOCK):
        log_ratio[i] = e[i] - new_e[i]
    for d in range(len(x)):
        _add_to_ratio(x, new_x, g, new_g, d, rates, log_ratio)
    _decide(log_ratio, words, rates, moved)
    for i in range(BLOCK):
        old, new = e[i], new_e[i]
        e[i] = new if log_ratio[i] > _ZERO else old
    _choose(log_ratio, new_x, x)
    _choose(log_ratio, new_g, g)


@_compiled
@no_type_check
def _add_to_ratio(x, new_x, g, new_g, d, rates, log_ratio):
    for i in range(BLOCK):
        old, new = g[d, i], new_g[d, i]
        work = _HALF * (old + new) * (new_x[d, i] - x[d, i])
        log_ratio[i] += work - _QUARTER * rates[0, i] * (new * new - old * old)


@_compiled
@no_type_check
def _decide(log_ratio, words, rates, moved):
    """1 where it is accepted, else 0.

    A proposal that is not finite has the ratio -inf or NaN, and no number is below that.
    """
    for i in range(BLOCK):
        taken = _logarithm(_uniform(words[0, i])) < log_ratio[i] * rates[2, i]
        log_ratio[i] = _ONE if taken else _ZERO
        moved[i] += np.uint32(taken)


@_compiled
@no_type_check
def _choose(taken, new, old):
    for d in range(len(old)):
        for i in range(BLOCK):
            was, is_now = old[d, i], new[d, i]
            old[d, i] = is_now if taken[i] > _ZERO else was
