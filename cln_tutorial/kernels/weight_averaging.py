"""The averages on a GPU: one launch for all tensors of one pair of dtypes, no host in between.

The job is bound by memory: a weight is read once for all averages, and each average is read and
written once. A program of four warps takes one row of the table, in blocks that give each thread
128 bits of an average, the widest access there is; with more entries per thread the weights in a
half type, and averages in float32, would lie in different threads and change places through shared
memory. An average is written before the next one is read, so that their number costs few registers.
What is in flight, about 32 kB per multiprocessor, comes from the many programs that then fit on it.
This is reasoned: nothing was tuned, because nothing was measured on a GPU yet.

The addresses stand in the table. Where all tensors of a row begin at multiples of 16 bytes, as in
PyTorch's own allocations, the accesses are wide, up to the last entries that do not fill one. A
view may begin anywhere; its rows, and no others, are accessed entry by entry.

A product and a sum are never fused: compensation and noise are then those of the reference, to the
last bit.
"""

import itertools
import typing
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 128  # per program
_TRITON = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def update(table: typing.Any, shares: Sequence[float | int] | Tensor, key: int) -> None:
    """Update the averages of one ``weight_averaging.functional.Table``; see ``Plan`` there.

    Shares that are a tensor are read on the device, when the kernel runs. With them an update can
    be captured in a CUDA graph, if the table has been used before, and unless the rounding is
    stochastic: like shares that are numbers, ``key`` is frozen in the graph.

    Raises:
        ValueError: if ``shares`` is a tensor on another device.
        RuntimeError: if a capture would copy the table, or repeat the noise of one step for ever.
    """
    stochastic = table.shadow_dtype in (torch.bfloat16, torch.float16)
    if table.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if stochastic:
            raise RuntimeError(
                "stochastic rounding cannot be captured in a CUDA graph: each replay would repeat "
                "the noise of this step. Average in float32 there."
            )
        if "on_device" not in vars(table):
            raise RuntimeError(
                "a capture cannot copy the addresses to the device: run the same plan once before."
            )
    rows = table.on_device
    in_memory = isinstance(shares, Tensor)
    if in_memory and shares.device != rows.device:
        raise ValueError(
            f"`one_minus_decay` must be on the device of the weights, {rows.device}; "
            f"got {shares.device}."
        )
    with torch.cuda.device_of(rows):
        update_kernel[(len(rows),)](
            rows,
            shares.contiguous() if in_memory else _in_float32(shares),
            key & 0xFFFFFFFF,
            key >> 32,
            IN_MEMORY=in_memory,
            AVERAGES=table.averages,
            COMPENSATED=table.compensated,
            WEIGHT=_TRITON[table.weight_dtype],
            SHADOW=_TRITON[table.shadow_dtype],
            WIDE=THREADS * 16 // table.shadow_dtype.itemsize,
            NARROW=THREADS,
            num_warps=THREADS // 32,
            enable_fp_fusion=False,
        )


def _in_float32(shares: Sequence[float | int]) -> tuple[float, ...]:
    """Return three numbers of float32 for each share, whose sum it is.

    A number that is an argument of a kernel arrives in float32; as bits it would be an integer,
    for some of which Triton compiles another kernel.
    """
    rest = np.array(shares, np.float64)
    parts = []
    for _ in range(3):
        parts.append(rest.astype(np.float32).astype(np.float64))
        rest = rest - parts[-1]
    return tuple(itertools.chain(*np.stack(parts, axis=1).tolist()))


# --- the kernel -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["key_low", "key_high"])
@typing.no_type_check
def update_kernel(
    table,
    shares,
    key_low: tl.uint32,
    key_high: tl.uint32,
    IN_MEMORY: tl.constexpr,
    AVERAGES: tl.constexpr,
    COMPENSATED: tl.constexpr,
    WEIGHT: tl.constexpr,
    SHADOW: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
):
    TENSORS: tl.constexpr = AVERAGES * (2 if COMPENSATED else 1) + 1
    row = table + tl.program_id(0).to(tl.int64) * (3 + TENSORS)
    first, count = tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    addresses, together = (), tl.load(row + 3)
    for number in tl.static_range(TENSORS):
        address = tl.load(row + 3 + number)
        addresses += (address,)
        together |= address
    fractions = ()
    for k in tl.static_range(AVERAGES):
        fractions += (_share(shares, k, IN_MEMORY),)
    noise_key = _scramble(tl.load(row).to(tl.uint32) ^ key_low.to(tl.uint32), 0)
    noise_second = _scramble(noise_key ^ key_high.to(tl.uint32), 0) ^ (first >> 32).to(tl.uint32)
    noise = first.to(tl.uint32), noise_key, noise_second

    # All entries where every access is aligned and fills 16 of them, and then the others.
    wide = tl.where(together % 16 == 0, count // 16 * 16, 0)
    for start in range(0, wide, WIDE):
        _block(addresses, fractions, noise, start, wide, WEIGHT, SHADOW, True, WIDE)
    for start in range(wide, count, NARROW):
        _block(addresses, fractions, noise, start, count, WEIGHT, SHADOW, False, NARROW)


@triton.jit
@typing.no_type_check
def _share(shares, k: tl.constexpr, IN_MEMORY: tl.constexpr):
    if IN_MEMORY:
        return tl.load(shares + k)
    else:
        value = tl.cast(shares[3 * k], tl.float64)
        value += tl.cast(shares[3 * k + 1], tl.float64)
        return value + tl.cast(shares[3 * k + 2], tl.float64)


@triton.jit
@typing.no_type_check
def _block(
    addresses,
    fractions,
    noise,
    start,
    stop,
    WEIGHT: tl.constexpr,
    SHADOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    AVERAGES: tl.constexpr = len(fractions)
    HALF: tl.constexpr = SHADOW.primitive_bitwidth == 16
    COMPUTE: tl.constexpr = tl.float32 if HALF else SHADOW
    entry = start + tl.arange(0, BLOCK)
    weight = _load(addresses[0], entry, entry < stop, WEIGHT, ALIGNED).to(COMPUTE)
    if HALF:
        bits = _scramble((noise[0] + entry.to(tl.uint32)) ^ noise[1], noise[2])
        bits = (bits >> 2).to(tl.int32)
    for k in tl.static_range(AVERAGES):
        # A share of zero leaves what is there, also beside a weight that is infinite.
        moves = entry < tl.where(fractions[k] != 0, stop, 0)
        shadow = _load(addresses[1 + k], entry, moves, SHADOW, ALIGNED)
        if HALF:
            value = _stochastic(shadow, weight, fractions[k], bits, SHADOW)
        elif len(addresses) > 1 + AVERAGES:  # compensated
            low = _load(addresses[1 + AVERAGES + k], entry, moves, SHADOW, ALIGNED)
            value, low = _compensated(shadow, low, weight, fractions[k])
            _store(addresses[1 + AVERAGES + k], entry, moves, low, SHADOW, ALIGNED)
        else:
            value = _nearest(shadow, weight, fractions[k])
        _store(addresses[1 + k], entry, moves, value, SHADOW, ALIGNED)


# From the nearer end, so that a constant weight is never left: with a share below one half from the
# shadow, else from the weight. All shares are on the device, hence no branch, but a choice.


@triton.jit
@typing.no_type_check
def _nearest(shadow, weight, fraction):
    way = weight - shadow
    rest = (1 - fraction).to(shadow.dtype)
    value = tl.where(fraction < 0.5, shadow + fraction.to(shadow.dtype) * way, weight - rest * way)
    return tl.where(fraction == 1, weight, value)


@triton.jit
@typing.no_type_check
def _compensated(shadow, low, weight, fraction):
    from_shadow = low + fraction.to(shadow.dtype) * ((weight - shadow) - low)
    from_weight = (1 - fraction).to(shadow.dtype) * ((shadow - weight) + low)
    high = tl.where(fraction < 0.5, shadow, weight)
    step = tl.where(fraction < 0.5, from_shadow, from_weight)
    total = high + step
    back = total - high
    low = (high - (total - back)) + (step - back)
    return tl.where(fraction == 1, weight, total), tl.where(fraction == 1, 0.0, low)


@triton.jit
@typing.no_type_check
def _stochastic(shadow, weight, fraction, noise, SHADOW: tl.constexpr):
    """As ``functional.mix_stochastically``, to the last bit; returns the bits."""
    # Bits of float32 that the type has not, the factor that gives both the same smallest exponent,
    # and the bits of the largest number.
    DROPPED: tl.constexpr = 16 if SHADOW.is_bf16() else 13
    SCALE: tl.constexpr = 1.0 if SHADOW.is_bf16() else 2.0**-112
    LARGEST: tl.constexpr = 0x7F7F if SHADOW.is_bf16() else 0x7BFF
    share = fraction.to(tl.float32)
    from_weight = tl.where(share < 1, (1 - share) * (shadow - weight), 0.0)
    near = tl.where(share < 0.5, shadow, weight)
    step = tl.where(share < 0.5, share * (weight - shadow), from_weight)
    total = tl.where(share < 1, near + step, weight)  # -0 + 0 would be 0
    lost = step - (total - near)
    whole = total.to(tl.int32, bitcast=True)
    sign, magnitude = whole & -0x80000000, whole & 0x7FFFFFFF
    lost = lost.to(tl.int32, bitcast=True) ^ sign
    exponent = (magnitude + (lost >> 31)) & 0x7F800000
    exponent = tl.maximum(exponent, 64 << 23)  # below 2^-63 there is nothing to save
    unit = (((307 - DROPPED) << 23) - exponent.to(tl.uint32)).to(tl.float32, bitcast=True)
    units = lost.to(tl.float32, bitcast=True) * unit
    bits = (total * SCALE).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    below = (bits & ((1 << DROPPED) - 1)) << (30 - DROPPED)
    carry = (below + noise + units.to(tl.int32)) >> 30
    kept = (bits >> DROPPED) + tl.where(bits < (LARGEST << DROPPED), carry, 0)
    # What float16 cannot hold, although float32 can, is infinite.
    kept = tl.minimum(kept, LARGEST + 1)
    kept = tl.where(magnitude > 0x7F800000, LARGEST + 2, kept)
    return kept | (sign >> 16)


@triton.jit
@typing.no_type_check
def _scramble(x, second):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ second
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


# Half types go through memory as their bits: no arithmetic can then happen in them, nor a rounding
# that is not ours (and the interpreter of Triton 3.9 computes garbage in bfloat16).


@triton.jit
@typing.no_type_check
def _load(address, entry, inside, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    STORED: tl.constexpr = tl.int16 if TYPE.primitive_bitwidth == 16 else TYPE
    value = tl.load(_pointer(address, STORED, ALIGNED) + entry, inside)
    if TYPE.is_bf16():  # the upper half of a float32
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif TYPE.is_fp16():
        value = value.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
@typing.no_type_check
def _store(address, entry, inside, value, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    STORED: tl.constexpr = tl.int16 if TYPE.primitive_bitwidth == 16 else TYPE
    tl.store(_pointer(address, STORED, ALIGNED) + entry, value.to(STORED), inside)


@triton.jit
@typing.no_type_check
def _pointer(address, STORED: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(STORED))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer
