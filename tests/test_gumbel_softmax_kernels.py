"""The Triton kernels of the draws: their numbers, their law, and the code a GPU would run.

A program of the interpreter takes 30 ms, so few draws are made there: each is compared with the
race in float64 that has the same noise, and the law of many is the law of that noise. With
``pytest --gpu`` a thousand times as many are counted. Nothing here says how fast it is.
"""

import functools
import math
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from cln_tutorial.gumbel_softmax.sampling import _gumbel_of_bits
from cln_tutorial.gumbel_softmax.tiles import eager_log_sums
from tests.kernel_harness import (
    INTERPRETED,
    compile_ahead,
    empty,
    kernels_of,
    launches,
    runs_kernels,
)

kernels = kernels_of("gumbel_softmax")
pytestmark = [
    pytest.mark.kernel,
    # numpy warns where infinities appear and meet; a GPU does not.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) .*:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(6705)


def strided(rows, gap=3):
    """The same rows, with logits between them that would win if they were read."""
    wide = torch.full((len(rows), rows.shape[1] + gap), 60000.0, dtype=rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def draw(rows, count, tau=1.0, *, taus=None, width=4, seed=1):
    sums = kernels.log_sums(rows, taus, tau, width)
    return kernels.draw(rows, *sums, taus, tau, width, count, torch.tensor([seed]))


# --- the sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "classes", "width"),
    [(1, 1, 2), (3, 1, 16), (2, 16, 16), (3, 37, 16), (2, 640, 64), (2, 4100, 4096)],
)
@pytest.mark.parametrize("tau", [1.0, 0.3, 50.0, None], ids=str)
@each_dtype
@runs_kernels
def test_the_sums_of_each_tile_are_those_of_the_reference_in_float64(
    dtype, tau, count, classes, width
):
    rows = strided((3 * torch.randn(count, classes)).to(dtype))
    taus = torch.rand(count) + 0.1 if tau is None else None
    with launches() as started:
        tops, sums = kernels.log_sums(rows, taus, tau or 1.0, width)
    assert started == {"tile_sums_kernel": 1}
    assert tops.dtype == sums.dtype == torch.float32
    wide_taus = None if taus is None else taus.double()
    exact_tops, exact = eager_log_sums(rows.double(), wide_taus, tau or 1.0, width)
    assert tops.double().equal(exact_tops)
    # An exponent has four roundings, each 2^-24 of it, and is log(4096) on average at most; then
    # two units of an exponential, twelve sums and the logarithm.
    assert (sums - exact).abs().max() <= (4 * math.log(4096) + 4 + 12 + 4) * 2**-24


@pytest.mark.parametrize("tau", [1.0, 1e-6, 1e-42, 1e6])
@each_dtype
@runs_kernels
def test_sums_of_extremes_are_those_of_the_reference(dtype, tau):
    inf, nan, high = math.inf, math.nan, 65504.0
    tiles = [
        [-inf] * 4,
        [-inf, 2.0, -inf, 2.0],
        [1.0, inf, 3.0, -inf],
        [inf, -inf, -inf, inf],
        [high, high, -high, 0.0],
        [-high, -high, -high, -high],
        [1e4, 1e4, 1e4, 1e4],
        [nan, 1.0, 2.0, 3.0],
        [1.0, inf, nan, -inf],
        [0.0, 0.0, -inf, -inf],
    ]
    rows = torch.tensor(tiles, dtype=dtype).view(1, -1)[:, :-3]  # the last tile has one class
    taus = torch.tensor([tau])  # in float32; the interpreter computes with a number in float64
    found = kernels.log_sums(rows, taus, 1.0, 4)
    expected = eager_log_sums(rows.float(), taus, 1.0, 4)
    for each, other in zip(found, expected, strict=True):
        # The logarithm of 1 to 4 equal numbers, or infinite: only that is rounded.
        torch.testing.assert_close(each, other, rtol=2**-22, atol=0, equal_nan=True)


@runs_kernels
def test_rows_whose_classes_are_no_neighbours_are_read_as_they_are():
    rows = torch.randn(8, 3).T
    assert not rows.is_contiguous()
    for each, other in zip(
        kernels.log_sums(rows, None, 1.0, 4),
        kernels.log_sums(rows.contiguous(), None, 1.0, 4),
        strict=True,
    ):
        assert each.equal(other)
    assert draw(rows, 2)[0].equal(draw(rows.contiguous(), 2)[0])


# --- the noise ------------------------------------------------------------------------------------


@triton.jit
def noise_kernel(words, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high = tl.load(words + 2 * at + 1).to(tl.uint32, bitcast=True)
    low = tl.load(words + 2 * at).to(tl.uint32, bitcast=True)
    tl.store(out + at, kernels.gumbel(high, low))


@runs_kernels
def test_noise_is_that_of_the_reference_for_the_same_bits_up_to_both_ends():
    powers = 2 ** torch.arange(63)
    distances = torch.cat([torch.arange(3), powers, powers - 1, -powers + 2**63 - 1])
    distances = torch.cat([distances, torch.randint(0, 2**63 - 1, (4096 - len(distances) - 1,))])
    distances = torch.cat([distances, torch.tensor([2**63 - 1])])
    bits = torch.cat([distances, distances | -(2**63)])  # from both ends
    found = torch.empty(len(bits), dtype=torch.float32)
    noise_kernel[(len(bits) // 1024,)](bits.view(torch.int32), found, BLOCK=1024)
    exact = _gumbel_of_bits(bits, torch.float64)
    assert found.isfinite().all()
    # The ends: E is 65 log 2, and 2^-65.
    assert found.min() == pytest.approx(-math.log(65 * math.log(2)), rel=1e-6)
    assert found.max() == pytest.approx(65 * math.log(2), rel=1e-6)
    # E has a dozen roundings, each of which moves G by 2^-24; then G is rounded, to a unit or two.
    assert ((found - exact).abs() <= 12 * 2**-24 + exact.abs() * 2**-23).all()


# --- a draw ---------------------------------------------------------------------------------------


@triton.jit
def words_kernel(seed, race, row, draw, out, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)
    words = tl.philox(tl.load(seed), pair, race, row, draw)
    for i in tl.static_range(4):
        tl.store(out + 4 * pair + i, words[i].to(tl.int32, bitcast=True) + 0 * pair)


def noise_of(seed, race, row, draw, count, block):
    """The noise of that many tiles or classes: four words for a lane of two blocks."""
    blocks = -(-count // (2 * block))
    words = torch.empty(blocks * block, 4, dtype=torch.int32)
    pairs = triton.next_power_of_2(len(words))
    padded = torch.empty(pairs, 4, dtype=torch.int32)
    words_kernel[(1,)](torch.tensor([seed]), race, row, draw, padded, PAIRS=pairs)
    words = padded[: len(words)].long()
    bits = torch.stack([words[:, i] << 32 | words[:, i + 1] & 0xFFFFFFFF for i in (0, 2)])
    in_order = bits.view(2, blocks, block).movedim(0, 1).reshape(-1)
    return _gumbel_of_bits(in_order[:count], torch.float64)


@pytest.mark.parametrize(
    ("count", "classes", "width", "draws"),
    [(1, 1, 2, 2), (2, 37, 4, 3), (3, 40, 16, 2), (1, 9000, 4096, 1), (1, 8192, 4096, 1)],
)
@each_dtype
@runs_kernels
def test_a_draw_is_the_race_in_float64_with_words_that_no_other_number_has(
    dtype, count, classes, width, draws
):
    rows = strided((2 * torch.randn(count, classes)).to(dtype))
    taus = torch.rand(count) + 0.5
    seed = 3**39  # of more than 32 bits
    tops, sums = kernels.log_sums(rows, taus, 1.0, width)
    with launches() as started:
        index, largest = kernels.draw(
            rows, tops, sums, taus, 1.0, width, draws, torch.tensor([seed])
        )
    assert started == {"choose_kernel": 1}
    assert index.shape == largest.shape == (draws, count)
    assert (index.dtype, largest.dtype) == (torch.int64, torch.float32)
    block = min(width // 2, 1024)
    top = rows.double().amax(1)
    for number in range(draws):
        for row in range(count):
            scores = (tops[row] - top[row]) / taus[row].double() + sums[row].double()
            scores += noise_of(seed, 0, row, number, len(scores), block)
            tile = int(scores.argmax())
            logits = rows[row, tile * width : (tile + 1) * width].double()
            inside = (logits - top[row]) / taus[row].double()
            inside += noise_of(seed, 1, row, number, width, block)[: len(inside)]
            # Noise of the reference has an error of a millionth, and that of scores is smaller.
            torch.testing.assert_close(
                largest[number, row].double(), scores[tile], atol=4e-6, rtol=0
            )
            assert index[number, row] == tile * width + int(inside.argmax())


FALSE_ALARM = 1e-5  # of each of the six statistics


@runs_kernels
def test_class_and_maximum_have_the_joint_law_of_a_race_among_all_classes():
    # Equal logits first: tile and place are then independent, unless noise of one chose the other.
    count = 100 if INTERPRETED else 100_000
    uneven = torch.tensor([0.2, -math.inf, 1.0, 0.5] + [-math.inf] * 4 + [0.9, 0.0, -0.2, 0.4])
    rows = torch.stack([torch.zeros(12), uneven])
    taus = torch.tensor([1.0, 0.8])
    index, largest = draw(rows, count, taus=taus)
    shifted = ((rows - rows.amax(1, keepdim=True)) / taus[:, None]).double().cpu()
    for row in range(2):
        drawn, maximum = index[:, row].cpu(), largest[:, row].double().cpu().numpy()
        counts = drawn.bincount(minlength=12)
        law = shifted[row].softmax(0)
        assert counts[law == 0].sum() == 0
        possible = law > 0
        expected = (law * count)[possible].numpy()
        assert stats.chisquare(counts[possible].numpy(), expected).pvalue > FALSE_ALARM
        race = stats.gumbel_r(loc=float(shifted[row].logsumexp(0)))
        assert stats.kstest(maximum, race.cdf).pvalue > FALSE_ALARM
        groups = [maximum[drawn.numpy() == i] for i in range(12) if possible[i]]
        assert stats.kruskal(*groups).pvalue > FALSE_ALARM


@runs_kernels
def test_one_temperature_for_all_rows_is_the_same_as_one_for_each():
    rows = torch.randn(2, 11)
    for each, other in zip(
        draw(rows, 3, 0.3), draw(rows, 3, taus=torch.full((2,), 0.3)), strict=True
    ):
        assert each.equal(other)
    assert not draw(rows, 3, 0.3)[1].equal(draw(rows, 3, 1)[1])


@runs_kernels
def test_a_seed_repeats_its_draws_and_its_neighbours_in_both_words_make_others():
    rows = torch.zeros(1, 4096)
    index, largest = draw(rows, 2, width=64, seed=5)
    again = draw(rows, 2, width=64, seed=5)
    assert index.equal(again[0])
    assert largest.equal(again[1])
    for seed in (6, -6, 5 + 2**32):
        assert (draw(rows, 2, width=64, seed=seed)[1] != largest).all()


@runs_kernels
def test_a_row_is_drawn_alike_with_any_rows_and_draws_after_it():
    rows = torch.randn(3, 50)
    index, largest = draw(rows, 3)
    assert len(largest.unique()) == 9
    fewer, maxima = draw(rows[:2], 2)
    assert fewer.equal(index[:2, :2])
    assert maxima.equal(largest[:2, :2])


@runs_kernels
def test_a_shift_of_ten_thousand_changes_no_draw():
    rows = (torch.randn(2, 30) * 256).round() / 256  # that much of a fraction stays exact
    for each, other in zip(draw(rows, 3), draw(rows + 10_000, 3), strict=True):
        assert each.equal(other)


@pytest.mark.parametrize(
    ("dtype", "tau"),
    [(dtype, 1.0) for dtype in DTYPES] + [(torch.float32, t) for t in (1e-6, 1e-42, 1e6)],
    ids=str,
)
@runs_kernels
def test_what_is_impossible_is_never_drawn_and_what_is_certain_always(dtype, tau):
    rows = torch.full((3, 11), -math.inf)
    rows[0, 9] = -60000.0  # alone, in the last tile
    rows[1] = 0.0
    rows[1, 6] = math.inf
    rows[2, 2:7] = 65504.0
    index, largest = draw(strided(rows.to(dtype)), 2, taus=torch.full((3,), tau))
    assert (index[:, 0] == 9).all()
    assert (index[:, 1] == 6).all()
    assert ((index[:, 2] >= 2) & (index[:, 2] < 7)).all()
    assert largest[:, 0].isfinite().all()
    assert (largest[:, 1] == math.inf).all()


@runs_kernels
def test_nan_shows_in_the_maximum_of_its_row_and_makes_no_index_that_is_not_there():
    rows = torch.randn(3, 11)
    clean = draw(rows, 3)
    rows[0, 10] = math.nan
    rows[2] = -math.inf
    index, largest = draw(rows, 3)
    assert largest[:, 0].isnan().all()
    assert (largest[:, 2] == -math.inf).all()
    assert ((index >= 0) & (index < 11)).all()
    assert index[:, 1].equal(clean[0][:, 1])
    assert largest[:, 1].equal(clean[1][:, 1])


@runs_kernels
def test_no_draws_are_no_draws():
    index, largest = draw(torch.randn(2, 5), 0)
    assert index.shape == largest.shape == (0, 2)


# --- the compiled code ----------------------------------------------------------------------------

on_each_gpu = pytest.mark.parametrize("capability", [75, 80, 90])
THREADS = 32 * 4
WIDTH = 4096  # of a tile on a GPU
CLASSES = 32 * WIDTH
PADDED = {"classes": 50257, "stride": 50304, "in_memory": True}


@functools.cache
def compiled_sums(capability, dtype, count=16, classes=CLASSES, stride=None, in_memory=False):
    rows = empty(dtype, count, stride or classes)[:, :classes]
    taus = empty(torch.float32, count) if in_memory else None
    found = compile_ahead(lambda: kernels.log_sums(rows, taus, 0.7, WIDTH), capability)
    return found["tile_sums_kernel"]


@functools.cache
def compiled_draw(capability, dtype, count=16, classes=CLASSES):
    rows, taus, seed = (
        empty(dtype, count, classes),
        empty(torch.float32, count),
        empty(torch.int64, 1),
    )
    sums = empty(torch.float32, count, classes // WIDTH)

    def launch():
        kernels.draw(rows, sums, sums, taus, 1.0, WIDTH, 2, seed)

    return compile_ahead(launch, capability)["choose_kernel"]


@on_each_gpu
@each_dtype
def test_each_logit_is_read_once_and_by_128_bits(dtype, capability):
    sums, choose = compiled_sums(capability, dtype), compiled_draw(capability, dtype)
    assert sums.num_warps * 32 == THREADS
    once = WIDTH * dtype.itemsize // (THREADS * 16)
    # Twice in the code: a tile that is full, and one that is not.
    assert sums.loads == {128: 2 * once}
    assert sums.stores == {32: 2}
    # Of the winning tile a thread reads four logits of each half of a block.
    assert choose.loads[8 * 4 * dtype.itemsize] >= 2
    assert choose.stores == {32: 1, 64: 1}


@on_each_gpu
@each_dtype
def test_full_tiles_are_read_by_128_bits_where_only_the_stride_is_aligned(dtype, capability):
    sums = compiled_sums(capability, dtype, **PADDED)
    once = WIDTH * dtype.itemsize // (THREADS * 16)
    narrow = WIDTH // THREADS
    assert sums.loads == Counter({128: once}) + Counter([8 * dtype.itemsize] * narrow + [32])


@on_each_gpu
@each_dtype
def test_nothing_is_spilled_or_atomic_or_computed_in_a_half_type(dtype, capability):
    sums = compiled_sums(capability, dtype), compiled_sums(capability, dtype, **PADDED)
    choose = compiled_draw(capability, dtype)
    for kernel in (*sums, choose):
        assert kernel.local_bytes == 0
        assert kernel.atomics == []
        assert kernel.narrow_arithmetic() == []
    for kernel in sums:
        assert 0 < kernel.registers <= 64  # 1,024 threads on a multiprocessor, all of sm_75
        assert kernel.ptx.count("ex2.approx") == WIDTH // THREADS  # one of each logit
    assert 0 < choose.registers <= 128


@pytest.mark.parametrize("compiled", [compiled_sums, compiled_draw])
def test_no_number_of_rows_or_tiles_needs_a_kernel_of_its_own(compiled):
    sizes = [(16, 32), (1, 1), (7, 31)]
    found = [compiled(80, torch.float32, rows, tiles * WIDTH) for rows, tiles in sizes]
    assert len({kernel.ptx for kernel in found}) == 1
