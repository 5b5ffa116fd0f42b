"""The CPU with a compiler: smooth top-k row by row, in float64 (extra ``fast``)."""

import math
from typing import no_type_check

import numba
import numpy as np
import torch
from torch import Tensor

from cln_tutorial._numba import read_as
from cln_tutorial._threads import in_threads

FEWEST_FOR_A_THREAD = 2**14  # entries, times k for polynomials: about 100 µs
MOST_STEPS = 200


def sigmoid(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return weights and what they lack to one, of distances to the k-th largest entry."""
    rows = s.detach().contiguous().view(-1, s.shape[-1])
    weights, rest = torch.empty_like(rows), torch.empty_like(rows)
    arrays = rows.numpy(), weights.numpy(), rest.numpy()

    @no_type_check  # a check would compile its own code at each call
    def run(start: int, stop: int) -> None:
        _sigmoid(*arrays, k, start, stop)

    _in_threads(len(rows), rows.numel(), run)
    return weights.view(s.shape), rest.view(s.shape)


def esp(s: Tensor, k: int) -> Tensor:
    """As ``topk._esp_reference``, of float64."""
    rows = s.detach().contiguous().view(-1, s.shape[-1])
    weights = torch.empty_like(rows)
    arrays = rows.numpy(), weights.numpy()

    @no_type_check
    def run(start: int, stop: int) -> None:
        _esp(*arrays, k, start, stop)

    _in_threads(len(rows), rows.numel() * k, run)
    return weights.view(s.shape)


def esp_product(s: Tensor, g: Tensor, k: int) -> Tensor:
    """Return the derivative of the weights along a direction."""
    rows, directions = (t.detach().contiguous().view(-1, s.shape[-1]) for t in (s, g))
    products = torch.empty_like(rows)
    arrays = rows.numpy(), directions.numpy(), products.numpy()

    @no_type_check
    def run(start: int, stop: int) -> None:
        _esp_product(*arrays, k, start, stop)

    _in_threads(len(rows), rows.numel() * k, run)
    return products.view(s.shape)


def _in_threads(rows: int, work: int, run) -> None:
    in_threads(rows, min(torch.get_num_threads(), rows, work // FEWEST_FOR_A_THREAD), run)


# --- the loops ------------------------------------------------------------------------------------

_LOG2_E = 1 / math.log(2)
_LOG_2_HIGH = 6.93147180369123816490e-01  # its last 32 bits are zero, as in fdlibm
_LOG_2_LOW = 1.90821492927058770002e-10


# The library's exponential is a call for each number; this one is vectorised.
@numba.njit(inline="always")
@no_type_check
def _exponential(x):
    """Of numbers up to zero, right to 1e-15 of itself."""
    x = -700.0 if x < -700.0 else x  # and NaN stays
    whole = np.floor(x * _LOG2_E + 0.5)
    y = (x - whole * _LOG_2_HIGH) - whole * _LOG_2_LOW
    power = 1 / 6227020800 * y + 1 / 479001600
    power = power * y + 1 / 39916800
    power = power * y + 1 / 3628800
    power = power * y + 1 / 362880
    power = power * y + 1 / 40320
    power = power * y + 1 / 5040
    power = power * y + 1 / 720
    power = power * y + 1 / 120
    power = power * y + 1 / 24
    power = power * y + 1 / 6
    power = power * y + 1 / 2
    power = power * y + 1
    power = power * y + 1
    return power * read_as(np.int64((np.int64(whole) + 1023) << 52), np.float64)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
@no_type_check
def _surplus_and_slope(s, threshold):
    surplus = 0.0
    slope = 0.0
    for i in range(len(s)):
        z = np.float64(s[i]) - threshold
        e = _exponential(-abs(z))
        inverse = 1 / (1 + e)
        small = e * inverse
        slope += small * inverse
        weight = inverse if z > 0 else small
        rest = small if z > 0 else inverse
        surplus += -rest if s[i] > 0 else weight
    return surplus, slope


@numba.njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def _sigmoid(rows, weights, rests, k, start, stop):
    entries = rows.shape[1]
    for row in range(start, stop):
        s = rows[row]
        above = 0
        below = -np.inf
        for i in range(entries):
            if s[i] > 0:
                above += 1
            elif s[i] < 0:
                below = max(below, s[i])
        high = math.log(entries)
        low = (below if below > -np.inf else 0.0) - high
        threshold = (low + high) / 2
        for step in range(MOST_STEPS):
            surplus, slope = _surplus_and_slope(s, threshold)
            surplus -= k - above
            if surplus > 0:
                low = threshold
            elif surplus < 0:
                high = threshold
            if surplus == 0:
                break
            # Newton's method may creep along a tail, so that every third step is a bisection.
            following = (low + high) / 2
            if slope > 0 and step % 3 < 2:
                following = min(max(threshold + surplus / slope, low), high)
            change = abs(following - threshold)
            threshold = following
            if change <= 4e-16 * max(1.0, abs(threshold)):
                break
        for i in range(entries):
            z = np.float64(s[i]) - threshold
            e = _exponential(-abs(z))
            inverse = 1 / (1 + e)
            small = e * inverse
            weights[row, i] = inverse if z > 0 else small
            rests[row, i] = small if z > 0 else inverse


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
@no_type_check
def _chances(s, ratios, sums, left, taken):
    k = len(ratios)
    ratios[:] = 0.0
    for i in range(len(s)):
        w = math.exp(s[i])
        chance = taken[i]
        for j in range(k):
            total = ratios[j] + w
            inverse = 1 / total
            chance[j] = w / total  # exactly 1 where no ratio is
            left[j] = ratios[j] * inverse
            sums[j] = total
        ratios[0] = sums[0]
        for j in range(1, k):
            ratios[j] = sums[j] * left[j - 1]


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
@no_type_check
def _esp(rows, weights, k, start, stop):
    entries = rows.shape[1]
    ratios, sums, left = np.empty(k), np.empty(k), np.empty(k)
    taken = np.empty((entries, k))
    flow = np.empty(k + 1)
    for row in range(start, stop):
        _chances(rows[row], ratios, sums, left, taken)
        flow[:] = 0.0
        flow[k - 1] = 1.0
        for i in range(entries - 1, -1, -1):
            chance = taken[i]
            total = 0.0
            for j in range(k):
                total += flow[j] * chance[j]
            weights[row, i] = total
            for j in range(k - 1):
                flow[j] = flow[j] * (1 - chance[j]) + flow[j + 1] * chance[j + 1]
            flow[k - 1] *= 1 - chance[k - 1]


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
@no_type_check
def _esp_product(rows, directions, products, k, start, stop):
    entries = rows.shape[1]
    ratios, sums, left = np.empty(k), np.empty(k), np.empty(k)
    taken = np.empty((entries, k))
    changes = np.empty((entries, k))
    logs = np.empty(k)  # the derivative of the logarithm of each ratio: it is bounded
    flow, change = np.empty(k), np.empty(k)
    for row in range(start, stop):
        _chances(rows[row], ratios, sums, left, taken)
        logs[:] = 0.0
        for i in range(entries):
            g = directions[row, i]
            chance, step = taken[i], changes[i]
            for j in range(k):
                r = chance[j]
                step[j] = r * (1 - r) * (g - logs[j])
                left[j] = r * (g - logs[j])
                logs[j] += left[j]
            for j in range(1, k):
                logs[j] -= left[j - 1]
        flow[:] = 0.0
        change[:] = 0.0
        flow[k - 1] = 1.0
        for i in range(entries - 1, -1, -1):
            chance, step = taken[i], changes[i]
            total = 0.0
            for j in range(k):
                total += change[j] * chance[j] + flow[j] * step[j]
            products[row, i] = total
            for j in range(k - 1):
                change[j] = (
                    change[j] * (1 - chance[j])
                    - flow[j] * step[j]
                    + change[j + 1] * chance[j + 1]
                    + flow[j + 1] * step[j + 1]
                )
                flow[j] = flow[j] * (1 - chance[j]) + flow[j + 1] * chance[j + 1]
            change[k - 1] = change[k - 1] * (1 - chance[k - 1]) - flow[k - 1] * step[k - 1]
            flow[k - 1] *= 1 - chance[k - 1]
