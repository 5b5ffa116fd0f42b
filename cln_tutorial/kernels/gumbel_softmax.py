"""Draws of classes on a GPU: one read of all logits, then noise for one tile of each row.

The first kernel is bound by memory. A program takes one tile of one row, holds it in registers, and
writes two numbers: its largest logit and the rest of its log-sum-exp. Where the rows begin at
multiples of 16 bytes the reads have 128 bits; only the last tile of a row, if it is not full, is
read behind a mask that may make them narrow.

The second kernel is bound by the noise, about a hundred instructions for each number. A program
makes one draw of one row: it races the tiles, reads the one that wins again, and races its classes.
With tiles of 4096 that is noise for 4128 of 131072 classes. Nothing here waits for the host: the
seed is read on the device.

This is reasoned: nothing was tuned, because nothing was measured on a GPU yet.
"""

import typing

import torch
import triton
import triton.language as tl
from torch import Tensor


def log_sums(
    rows: Tensor, taus: Tensor | None, tau: float | int, width: int
) -> tuple[Tensor, Tensor]:
    """As ``gumbel_softmax.tiles.log_sums``, for float32 and half types.

    ``width`` is a power of two; ``taus``, if given, has one float32 for each row.
    """
    count, classes = rows.shape
    tiles = triton.cdiv(classes, width)
    tops = rows.new_empty(count, tiles, dtype=torch.float32)
    sums = torch.empty_like(tops)
    with torch.cuda.device_of(rows):
        tile_sums_kernel[(count * tiles,)](
            *_strided(rows),
            classes,
            tiles,
            taus,
            float(tau),
            tops,
            sums,
            WIDTH=width,
            num_warps=min(max(width // 1024, 1), 16),
            # Said explicitly, because the default of this option changes with Triton 3.10.
            enable_fp_fusion=True,
        )
    return tops, sums


def draw(
    rows: Tensor,
    tops: Tensor,
    log_sums: Tensor,
    taus: Tensor | None,
    tau: float | int,
    width: int,
    count: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw ``count`` classes of each row, given what :func:`log_sums` returned for it.

    Args:
        rows: ``(rows, classes)``.
        tops, log_sums: ``(rows, tiles)``, float32.
        taus, tau, width: as before; ``width`` is at least 2.
        count: how many draws of each row.
        seed: one int64 on the device. A draw depends on it, on its number and that of its row, and
            on the logits of the row; not on how many others there are.

    Returns:
        The classes, int64, and the largest perturbed logits, float32, from which the largest logit
        of the row was subtracted before the division by the temperature, if it is finite; both
        ``(count, rows)``. With NaN among the logits that number is NaN, and the class is any.
    """
    index = rows.new_empty(count, len(rows), dtype=torch.int64)
    largest = rows.new_empty(count, len(rows), dtype=torch.float32)
    # Two numbers, of 64 bits each, for each lane of a block.
    block = min(width // 2, 1024)
    with torch.cuda.device_of(rows):
        choose_kernel[(index.numel(),)](
            *_strided(rows),
            len(rows),
            rows.shape[1],
            tops.contiguous(),
            log_sums.contiguous(),
            tops.shape[1],
            taus,
            float(tau),
            seed,
            index,
            largest,
            WIDTH=width,
            BLOCK=block,
            num_warps=max(block // 128, 1),
            enable_fp_fusion=True,
        )
    return index, largest


def _strided(rows: Tensor) -> tuple[Tensor, int]:
    """Rows whose classes are neighbours, and their stride."""
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    return rows, rows.stride(0)


# --- the kernels ----------------------------------------------------------------------------------
# The counts of rows and tiles do not specialise a kernel; stride and classes must, or no access
# would be wider than one logit.


@triton.jit(do_not_specialize=["tiles"])
@typing.no_type_check
def tile_sums_kernel(logits, stride, classes, tiles, taus, tau, tops, sums, WIDTH: tl.constexpr):
    program = tl.program_id(0)
    row, start = (program // tiles).to(tl.int64), program % tiles * WIDTH
    at = start + tl.arange(0, WIDTH)
    row_logits = logits + row * stride
    # In a full tile no mask makes the access narrow.
    if start + WIDTH <= classes:
        value = tl.load(row_logits + at).to(tl.float32)
    else:
        value = tl.load(row_logits + at, at < classes, -float("inf")).to(tl.float32)
    top = tl.max(value, 0)
    scale = _inverse(taus, tau, row) * 1.4426950408889634
    total = tl.sum(tl.exp2((value - _finite(top)) * scale), 0)
    # A maximum does not always show a NaN; the sum does.
    tl.store(tops + program, tl.where(total == total, top, total))
    tl.store(sums + program, tl.log(total))


@triton.jit(do_not_specialize=["count", "tiles"])
@typing.no_type_check
def choose_kernel(
    logits,
    stride,
    count,
    classes,
    tops,
    log_sums,
    tiles,
    taus,
    tau,
    seed,
    index,
    largest,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    draw, row = program // count, (program % count).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    tops += row * tiles
    log_sums += row * tiles
    inverse = _inverse(taus, tau, row)
    key = tl.load(seed)

    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = start + lane
        highest = tl.maximum(highest, tl.load(tops + at, at < tiles, -float("inf")))
    shift = _finite(tl.max(highest, 0))

    # The counter of Philox is the pair, the race, the row and the draw: no number comes twice.
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    is_nan = lane < 0
    for start in range(0, tiles, 2 * BLOCK):
        words = _words(key, start // 2 + lane, 0, row, draw)
        for half in tl.static_range(2):
            at = start + half * BLOCK + lane
            score = (tl.load(tops + at, at < tiles, -float("inf")) - shift) * inverse
            score += tl.load(log_sums + at, at < tiles, -float("inf"))
            is_nan |= score != score
            best, place = _lead(best, place, score, words[2 * half], words[2 * half + 1], at)
    top, tile = _winner(best, place)
    top = tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, float("nan"), top)
    tl.store(largest + program, top)

    first = tile * WIDTH
    logits += row * stride
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32) + first
    for start in range(0, WIDTH, 2 * BLOCK):
        words = _words(key, start // 2 + lane, 1, row, draw)
        for half in tl.static_range(2):
            at = first + start + half * BLOCK + lane
            score = tl.load(logits + at, at < classes, -float("inf")).to(tl.float32)
            score = (score - shift) * inverse
            best, place = _lead(best, place, score, words[2 * half], words[2 * half + 1], at)
    _, winner = _winner(best, place)
    tl.store(index + program, winner.to(tl.int64))


@triton.jit
@typing.no_type_check
def _inverse(taus, tau, row):
    if taus is not None:
        tau = tl.load(taus + row)
    # Finite, also times 1.44, or at a tiny temperature the largest logit, which is 0, becomes NaN.
    return tl.minimum(1.0 / tau, 2.0e38)


@triton.jit
@typing.no_type_check
def _finite(top):
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


# --- the races ------------------------------------------------------------------------------------


@triton.jit
@typing.no_type_check
def _words(key, pair, race: tl.constexpr, row, draw):
    return tl.philox(key, pair, race, row.to(tl.int32), draw)


@triton.jit
@typing.no_type_check
def _lead(best, place, score, high, low, at):
    """Who leads in each lane, after one more score each."""
    score += gumbel(high, low)
    ahead = score > best
    return tl.where(ahead, score, best), tl.where(ahead, at, place)


@triton.jit
@typing.no_type_check
def _winner(best, place):
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, place, 0x7FFFFFFF), 0)


@triton.jit
@typing.no_type_check
def gumbel(high, low):
    """As ``sampling._gumbel_of_bits`` of the two words; right to 1e-6, and finite for all."""
    bits = (high.to(tl.int64) << 32) | low.to(tl.int64)
    distance = ((bits & 0x7FFFFFFFFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-64
    # The interpreter has no log1p. -log(1 - h) = 2 artanh(z) with z = h / (2 - h), at most 1/3:
    # what the series leaves out is 2e-8 of it.
    z = distance / (2 - distance)
    square = z * z
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 7 + square * (1 / 9 + square * series)
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    exponential = tl.where(bits < 0, -tl.log(distance), 2 * z * series)
    return -tl.log(exponential)
