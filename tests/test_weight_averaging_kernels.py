"""The Triton kernel of the averages: against float64 and the reference, and as a GPU would run it.

Without a GPU the interpreter shows that it computes the right numbers, and the compiled code shows
how: reads of the weights, width of the accesses, spills. Nothing here says how fast it is.
"""

import functools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cln_tutorial.weight_averaging import ExponentialMovingAverage, ema_update_
from cln_tutorial.weight_averaging import functional as core
from tests.kernel_harness import (
    INTERPRETED,
    compile_ahead,
    empty,
    kernels_of,
    launches,
    runs_kernels,
)

kernels = kernels_of("weight_averaging")
pytestmark = pytest.mark.kernel

HALF = [torch.bfloat16, torch.float16]
FULL = [torch.float32, torch.float64]
SHARES = [0.0, 0.001, 0.3, 0.6, 1.0]
PAIRS = [
    (weight, shadow)
    for weight in (*FULL, *HALF)
    for shadow in FULL
    if weight != torch.float64 or shadow == torch.float64
]
each_pair = pytest.mark.parametrize(
    ("weight_dtype", "shadow_dtype"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
# numpy warns where infinities meet; a GPU does not.
meets_infinity = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(6575)


def randoms(sizes, dtype, scale=1.0):
    return [(scale * torch.randn(n)).to(dtype) for n in sizes]


def copies(averages):
    return [[t.clone() for t in each] for each in averages]


def on_device(shares):
    return torch.tensor(shares, dtype=torch.float64)


def bits(tensor):
    """The bits, with one NaN for all: which one it is depends on the processor."""
    assert tensor.dtype in HALF
    return torch.where(tensor.isnan(), 0x7FFF, tensor.view(torch.int16))


# --- the numbers ----------------------------------------------------------------------------------

# Borders of the accesses of 16 entries, of blocks of 128 to 512, and of several chunks.
SIZES = [0, 1, 16, 17, 127, 129, 511, 1025]


@pytest.mark.parametrize(
    ("shares", "given_as"),
    [([0.3], list), ([0.6, 0.001], on_device), ([0.0, 0.999, 0.001, 1.0], list)],
    ids=["1 average", "2 averages", "4 averages"],
)
@each_pair
@runs_kernels
def test_the_update_is_the_formula_in_float64_to_a_rounding(
    weight_dtype, shadow_dtype, shares, given_as, monkeypatch
):
    monkeypatch.setattr(core, "CHUNK", 512)
    weights = randoms(SIZES, weight_dtype)
    before = [randoms(SIZES, shadow_dtype) for _ in shares]
    after = copies(before)
    with launches() as started:
        ema_update_(after, weights, given_as(shares), backend="triton")
    assert started == {"update_kernel": 1}
    for k, share in enumerate(shares):
        for weight, old, new in zip(weights, before[k], after[k], strict=True):
            exact = old.double() + share * (weight.double() - old.double())
            # Four roundings: three of a product, at most the larger number, and one of the sum.
            # In float64 the other side rounds as often.
            slack = (2.1 if shadow_dtype == torch.float32 else 4.2) * torch.finfo(shadow_dtype).eps
            largest = torch.maximum(old.double().abs(), weight.double().abs())
            assert ((new.double() - exact).abs() <= slack * largest).all()
            if share in (0, 1):
                assert new.equal(weight.to(shadow_dtype) if share else old)


ALIGNED = [(64, size) for size in (1, 15, 16, 17, 511, 512, 1024, 1025, 8191, 8192, 8193)]
ANYWHERE = [(3, size) for size in (1, 16, 127, 128, 129, 8193)]


@pytest.mark.parametrize(("offset", "size"), ALIGNED + ANYWHERE)
@pytest.mark.parametrize("shadow_dtype", [torch.float32, torch.bfloat16], ids=str)
@runs_kernels
def test_no_entry_is_lost_and_nothing_beyond_the_ends_is_touched(shadow_dtype, offset, size):
    half = shadow_dtype in HALF
    beyond = 128 - size % 16  # so that all three are aligned
    memory = torch.full((3, offset - offset % 16 + size + beyond), 7.0, dtype=shadow_dtype)
    *shadows, low = (each[offset : offset + size].zero_() for each in memory)
    weight = torch.ones(offset + size)[offset:]
    compensation = None if half else [[low], [torch.zeros(size, dtype=shadow_dtype)]]
    ema_update_(
        [[shadow] for shadow in shadows],
        [weight],
        [0.25, 0.75],
        compensation=compensation,
        rounding="stochastic" if half else "nearest",
        backend="triton",
    )
    expected = torch.full_like(memory, 7.0)
    for each, value in zip(expected, (0.25, 0.75, 0.0), strict=True):  # exact in every dtype
        each[offset : offset + size] = value
    assert memory.equal(expected)


VIEWS = {
    "at an odd offset": lambda t: t.flatten()[5:1605],
    "channels last": lambda t: t.view(10, 10, 5, 4).contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.view(40, 50).t(),
    "without a dimension": lambda t: t[0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@runs_kernels
def test_a_weight_may_be_a_view(dtype, view):
    weight = VIEWS[view](torch.randn(2000).to(dtype))
    shadow = torch.empty_like(weight, dtype=torch.float32).normal_()  # keeps the strides
    expected = shadow + 0.25 * (weight.float() - shadow)
    ema_update_([shadow], [weight], 0.25, backend="triton")
    assert (shadow - expected).abs().max() <= 2**-22 * 4  # two roundings of numbers below 4


@pytest.mark.parametrize("odd", ["weight", "shadow", "second shadow", "compensation", "none"])
@runs_kernels
def test_accesses_are_wide_only_where_all_tensors_of_a_row_are_aligned(odd, monkeypatch):
    pointer, wide = kernels._pointer, set()
    if INTERPRETED:  # which would not mind; a GPU stops at a wide access that is not aligned

        def seen(address, stored, aligned):
            wide.add(bool(aligned))
            assert not aligned or address.handle.data.item() % 16 == 0
            return pointer(address, stored, aligned)

        monkeypatch.setattr(kernels, "_pointer", seen)

    def tensor(name):
        begin = 1 if name == odd else 0
        return torch.zeros(600)[begin : begin + 512]  # no tail, whose accesses are never wide

    weight, *shadows = tensor("weight"), tensor("shadow"), tensor("second shadow")
    low = [tensor("compensation"), tensor("second compensation")]
    weight.fill_(1)
    ema_update_(
        [[s] for s in shadows],
        [weight],
        [0.25, 0.5],
        compensation=[[c] for c in low],
        backend="triton",
    )
    assert [s.unique().tolist() for s in shadows] == [[0.25], [0.5]]
    assert wide == ({odd == "none"} if INTERPRETED else set())


@runs_kernels
def test_all_tensors_of_one_pair_of_dtypes_take_one_launch():
    weights = randoms([20_000, 1, 3], torch.float32) + randoms([5, 0, 9000], torch.bfloat16)
    weights += randoms([4], torch.float64)
    shadows = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, FULL[0])) for w in weights]
    with launches() as started:
        ema_update_(shadows, weights, 0.5, backend="triton")
    assert started == {"update_kernel": 3}
    for shadow, weight in zip(shadows, weights, strict=True):
        assert shadow.equal(weight.to(shadow.dtype) / 2)
    with launches() as started:
        ema_update_(shadows, weights, 0.5, backend="reference")
    assert not started


@meets_infinity
@pytest.mark.parametrize("given_as", [list, on_device])
@pytest.mark.parametrize("dtype", [*FULL, *HALF], ids=str)
@runs_kernels
def test_a_share_of_one_copies_and_one_of_zero_leaves_whatever_stands_there(dtype, given_as):
    values = torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 1e-40], dtype=dtype)
    left, copied = values.flip(0).clone(), values.flip(0).clone()
    rounding = "stochastic" if dtype in HALF else "nearest"
    shares = given_as([0.0, 1.0])
    ema_update_([[left], [copied]], [values], shares, rounding=rounding, backend="triton")
    torch.testing.assert_close(left, values.flip(0), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(copied, values, rtol=0, atol=0, equal_nan=True)
    numbers = ~values.isnan()
    assert copied.signbit()[numbers].equal(values.signbit()[numbers])


@runs_kernels
def test_constant_weights_are_a_fixed_point_bit_for_bit():
    for dtype in (*FULL, *HALF):
        weight = torch.randn(3000).to(dtype)
        shadows = [[weight.clone()] for _ in SHARES]
        rounding = "stochastic" if dtype in HALF else "nearest"
        ema_update_(shadows, [weight], SHARES, rounding=rounding, step=4, backend="triton")
        assert all(each.equal(weight) for (each,) in shadows)


# --- the shares -----------------------------------------------------------------------------------


@given(st.floats(0, 1, allow_subnormal=False).filter(lambda x: x == 0 or x > 1e-25))
def test_three_numbers_of_float32_carry_a_share_without_error(share):
    parts = kernels._in_float32([share])
    assert [float(np.float32(part)) for part in parts] == list(parts)
    assert (parts[0] + parts[1]) + parts[2] == share


@runs_kernels
def test_shares_are_as_exact_in_the_arguments_as_in_memory():
    shares = [1 - 2**-50, 0.1, 1e-12]  # in float32 the first would copy
    weight, shadow = torch.randn(2, 700, dtype=torch.float64)
    listed, read, exact = ([shadow.clone() for _ in shares] for _ in range(3))
    ema_update_([[s] for s in listed], [weight], shares, backend="triton")
    ema_update_([[s] for s in read], [weight], on_device(shares), backend="triton")
    ema_update_([[s] for s in exact], [weight], shares, backend="reference")
    for a, b, c in zip(listed, read, exact, strict=True):
        assert a.equal(b)
        assert (a - c).abs().max() <= 2**-50  # half units of numbers below 4


@runs_kernels
def test_shares_in_memory_are_read_when_the_kernel_runs():
    weight, shadow = torch.ones(100), torch.zeros(100)
    shares = on_device([0.5])
    plan = core.Plan.of([[shadow]], [weight], None, False, "triton")
    plan.run(shares, 0, 0)

    def run():
        plan.run(shares, 0, 0)

    if not INTERPRETED:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    for share in (0.25, 0.0, 1.0):
        shares.fill_(share)
        shadow.zero_()
        run()
        assert shadow.unique().tolist() == [share]


def table_of(weight_dtype, shadow_dtype, averages, compensated, device="meta", rows=2):
    columns = 4 + averages * (2 if compensated else 1)
    where = torch.device(device)
    kind = (where, weight_dtype, shadow_dtype, averages, compensated)
    return core.Table("triton", *kind, np.zeros((rows, columns), np.int64))


def test_a_capture_that_would_repeat_its_noise_or_copy_the_table_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="stochastic rounding cannot be captured"):
        kernels.update(table_of(*[torch.bfloat16] * 2, 1, False, "cuda"), [0.5], 0)
    with pytest.raises(RuntimeError, match="run the same plan once before"):
        kernels.update(table_of(*[torch.float32] * 2, 1, False, "cuda"), [0.5], 0)


def test_shares_on_another_device_are_refused():
    table = table_of(torch.float32, torch.float32, 1, False)
    with pytest.raises(ValueError, match=r"`one_minus_decay` must be on .*meta; got cpu"):
        kernels.update(table, on_device([0.5]), 0)


# --- compensation ---------------------------------------------------------------------------------


@each_pair
@runs_kernels
def test_compensated_averages_have_the_bits_of_the_reference(weight_dtype, shadow_dtype):
    shares, sizes = [0.0, 1e-4, 0.3, 0.5, 0.7, 1.0], [1300, 7]
    weights = randoms(sizes, weight_dtype)
    start = [randoms(sizes, shadow_dtype) for _ in shares]
    low = [randoms(sizes, shadow_dtype, 2.0**-26) for _ in shares]
    found = {}
    for backend in ("triton", "reference"):
        found[backend] = copies(start), copies(low)
        for _ in range(2):
            ema_update_(
                found[backend][0], weights, shares, compensation=found[backend][1], backend=backend
            )
    for kernel, reference in zip(*found.values(), strict=True):
        for each, other in zip(kernel, reference, strict=True):
            assert all(map(torch.equal, each, other))
    # What a plain sum would lose is there, so equal bits are not those of zeros.
    assert all((each != 0).any() for each, *_ in found["triton"][1][1:5])


@runs_kernels
def test_compensation_crosses_the_dead_zone_of_float32():
    # A step is a tenth of half a unit in the last place, 2^-24 above 1: float32 never moves.
    weight = torch.full((40,), 1 + 2**-11)
    shadow, low, alone = torch.ones(40), torch.zeros(40), torch.ones(40)
    share = 2**-24 / 10 * 2**11
    for _ in range(50):
        ema_update_([shadow], [weight], share, compensation=[low], backend="triton")
        ema_update_([alone], [weight], share, backend="triton")
    assert (alone == 1).all()
    covered = (shadow.double() + low.double() - 1) * 2**11
    # Each step rounds what is kept, at most 2^-24, to 24 bits: 2^-48 and less, of a way of 2^-11;
    # and itself three times to 24 bits, of a share of 1e-5.
    assert (covered - (1 - (1 - share) ** 50)).abs().max() <= 50 * (2**-48 * 2**11 + share * 2**-22)


# --- stochastic rounding --------------------------------------------------------------------------


def all_numbers(dtype):
    """All bit patterns of a half type: zeros, subnormals, the largest, infinities, NaN."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def rounded(backend, shadows, weights, shares, **keywords):
    shadows = copies(shadows)
    ema_update_(shadows, weights, shares, rounding="stochastic", backend=backend, **keywords)
    return shadows


@meets_infinity
@pytest.mark.parametrize(
    ("weight_dtype", "shadow_dtype"),
    [(w, s) for w in (*HALF, torch.float32) for s in HALF if w != torch.bfloat16 or s == w],
    ids=str,
)
@runs_kernels
def test_rounded_averages_have_the_bits_of_the_reference_for_all_numbers(
    weight_dtype, shadow_dtype
):
    shadow = all_numbers(shadow_dtype)
    if weight_dtype == torch.float32:  # between the numbers of the half type, and at their edges
        noise = 1 + 2**-7 * torch.randn(2**16)
        weight = shadow.float()[torch.randperm(2**16)] * noise
    else:
        weight = all_numbers(weight_dtype)[torch.randperm(2**16)]
    # What float16 cannot hold has a test of its own.
    weight = torch.where(weight.float().abs() > torch.finfo(shadow_dtype).max, 1.0, weight)
    shares = [0.001, 0.6, 1.0]
    found, expected = (
        rounded(backend, [[shadow] for _ in shares], [weight], shares, seed=3, step=9)
        for backend in ("triton", "reference")
    )
    for (each,), (other,) in zip(found, expected, strict=True):
        assert bits(each).equal(bits(other))


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
@runs_kernels
def test_what_float16_cannot_hold_is_infinite(share):
    weight = torch.tensor([7e4, 1e10, 3e38, -7e4, -1e10, -3e38]) / share
    weight = weight.clamp(-3e38, 3e38)
    (found,) = rounded("triton", [[torch.zeros(6).half()]], [weight], [share])[0]
    assert found.equal(torch.tensor([math.inf] * 3 + [-math.inf] * 3).half())


@pytest.mark.parametrize("seed", [0, 2**40 + 1])
@pytest.mark.parametrize("step", [1, 2, 2**33 + 5])
@runs_kernels
def test_the_noise_of_each_seed_step_tensor_and_chunk_is_that_of_the_reference(
    seed, step, monkeypatch
):
    monkeypatch.setattr(core, "CHUNK", 256)
    weights = randoms([700, 0, 300], torch.bfloat16)
    shadows = [randoms([700, 0, 300], torch.bfloat16)]
    found, expected, other = (
        rounded(backend, shadows, weights, [0.01], seed=seed, step=at)[0]
        for backend, at in (("triton", step), ("reference", step), ("triton", step + 1))
    )
    assert all(map(torch.equal, found, expected))
    assert not found[0].equal(other[0])


@pytest.mark.parametrize("first", [8192, 2**32 - 8192, 2**32, 5 * 2**32 + 8192])
@runs_kernels
def test_entries_are_numbered_in_64_bits(first):
    # As if this chunk were one of a tensor of more than 2^32 entries, which no test can hold.
    count, share, key = 300, 0.01, core.step_key(1, 2)
    weight, shadow = torch.randn(2, count).bfloat16()
    index = torch.arange(count) + first
    low, high = core.tensor_key(key, 5)
    noise = core._scramble((index & 0xFFFFFFFF) ^ low, high ^ (index >> 32)) >> 2
    expected = core.mix_stochastically(shadow, weight, share, noise)
    assert not expected.equal(core.mix_stochastically(shadow, weight, share, noise.roll(1)))
    row = [[5, first, count, weight.data_ptr(), shadow.data_ptr()]]
    kind = (weight.device, *[torch.bfloat16] * 2, 1, False)
    kernels.update(core.Table("triton", *kind, np.array(row)), [share], key)
    assert shadow.equal(expected)


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"compensated": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {}],
    ids=["compensated", "bfloat16", "float16", "float32"],
)
@runs_kernels
def test_the_averages_of_a_training_are_those_of_the_reference(options):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(20, 4).bfloat16())
    decay = {"fast": 0.9, "slow": 0.999}
    both = [
        ExponentialMovingAverage(model, decay, seed=3, backend=backend, **options)
        for backend in ("triton", "reference")
    ]
    with launches() as started:
        for _ in range(4):
            with torch.no_grad():
                for p in model.parameters():
                    p += torch.randn_like(p)
            for average in both:
                average.update()
    assert started == {"update_kernel": 4 * 2}  # weights of two dtypes
    for name in decay:
        kernel, reference = (average.named_averages(name) for average in both)
        for key, value in kernel.items():
            if options:
                assert value.equal(reference[key])
            else:  # `lerp` of PyTorch fuses where the kernel does not; numbers below 16
                assert (value - reference[key]).abs().max() <= 2**-19


# --- the compiled code ----------------------------------------------------------------------------

CAPABILITIES = [75, 80, 90]
# Weight, shadow, compensated; width in bits of one thread's access to the weights where its access
# to an average has 128.
KINDS = {
    "float32": (torch.float32, torch.float32, False, 128),
    "float32 compensated": (torch.float32, torch.float32, True, 128),
    "bfloat16 to float32": (torch.bfloat16, torch.float32, False, 64),
    "float64 compensated": (torch.float64, torch.float64, True, 128),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False, 128),
    "float16": (torch.float16, torch.float16, False, 128),
}
each_build = pytest.mark.parametrize("kind", KINDS)
on_each_gpu = pytest.mark.parametrize("capability", CAPABILITIES)


@functools.cache
def compiled(capability, kind, averages=4, in_memory=False, share=0.1, key=0):
    table = table_of(*KINDS[kind][:2], averages, KINDS[kind][2])
    shares = empty(torch.float64, averages) if in_memory else [share] + [0.1] * (averages - 1)
    return compile_ahead(lambda: kernels.update(table, shares, key), capability)["update_kernel"]


@on_each_gpu
@each_build
def test_one_read_of_the_weights_serves_all_averages_and_each_access_is_wide(kind, capability):
    weight, shadow, compensated, width = KINDS[kind]
    tensors = 8 if compensated else 4
    found = compiled(capability, kind)
    # Twice in the code: for what is aligned, and entry by entry for the rest.
    narrow = 8 * shadow.itemsize
    assert found.stores == {128: tensors, narrow: tensors}
    loads = [width, 8 * weight.itemsize, *[128, narrow] * tensors]
    # The table, in 64 bits: count and addresses; number of tensor and first entry, for the noise.
    loads += [64] * (2 + tensors + (2 if shadow in HALF else 0))
    assert found.loads == Counter(loads)


@on_each_gpu
@each_build
@pytest.mark.parametrize(("averages", "in_memory"), [(1, False), (4, False), (4, True)])
def test_nothing_is_spilled_shared_or_atomic(kind, averages, in_memory, capability):
    found = compiled(capability, kind, averages, in_memory)
    assert found.local_bytes == 0
    assert found.atomics == []
    assert "bar.sync" not in found.ptx  # no data changes places between threads
    assert found.num_warps == 4
    # With 64 registers there are 1,024 threads on a multiprocessor, all there can be on sm_75.
    assert 0 < found.registers <= (80 if averages == 4 else 64)


@on_each_gpu
@each_build
def test_nothing_is_computed_in_a_half_type_and_no_product_is_fused_with_a_sum(kind, capability):
    found = compiled(capability, kind)
    assert re.search(r"arith\.mulf .*xf(32|64)>", found.ttir)
    assert found.narrow_arithmetic() == []
    assert not re.search(r"\bfma\.|cvt\.\w+\.(bf16|f16)\.f", found.ptx)


def test_shares_in_memory_are_one_read_each():
    listed, read = compiled(80, "float32"), compiled(80, "float32", in_memory=True)
    assert read.loads - listed.loads == {64: 4}


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_no_share_and_no_step_needs_a_kernel_of_its_own(kind):
    found = [
        compiled(80, kind, 2, share=share, key=key)
        for share, key in [(0.0, 0), (1.0, 1), (0.1, 16), (2**-20, 2**32), (0.5, 2**64 - 1)]
    ]
    assert len({kernel.ptx for kernel in found}) == 1
