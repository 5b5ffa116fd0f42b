"""Exact draws: the noise, the race between tiles, without replacement, and given the largest.

Statistical tests have one fixed seed; their false-alarm rate is the level that they name.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cln_tutorial.gumbel_softmax import (
    available_backends,
    conditional_gumbel,
    gumbel_max_sample,
    gumbel_noise,
    gumbel_top_k,
    sampling,
    tiles,
)

BACKENDS = ["reference", "tiled"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEVEL = 1e-4
inf = math.inf


def seeded(seed=6705):
    return torch.Generator().manual_seed(seed)


def gumbel_cdf(x, location=0.0):
    return np.exp(-np.exp(location - x))


# --- the noise ------------------------------------------------------------------------------------


def test_the_noise_of_the_rarest_bits_is_finite_and_reaches_two_to_the_minus_65():
    bits = torch.tensor([0, 2**63 - 1, -1, -(2**63)])
    for dtype in (torch.float32, torch.float64):
        noise = sampling._gumbel_of_bits(bits, dtype)
        tail = 65 * math.log(2)  # of both ends of the uniform distribution
        # log 2 to a rounding or two.
        expected = [tail, -math.log(math.log(2)), -math.log(math.log(2)), -math.log(tail)]
        assert noise.tolist() == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)


@given(st.integers(-(2**63), 2**63 - 1) | st.integers(-(2**40), 2**40))
def test_each_number_is_the_gumbel_quantile_of_its_64_bits(bits):
    # u is exact as a fraction, and log1p and log of a double are right to 2^-52 there.
    distance = Fraction(2 * (bits % 2**63) + 1, 2**65)
    distance = float(distance)
    exponential = -math.log(distance) if bits < 0 else -math.log1p(-distance)
    noise = sampling._gumbel_of_bits(torch.tensor([bits]), torch.float32).item()
    # E is right to four roundings of float32, which is the absolute error of its logarithm.
    assert abs(noise + math.log(exponential)) < 5 * 2**-24 * (1 + abs(noise))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_noise_is_a_gumbel_distribution_and_finite(dtype):
    noise = gumbel_noise((200_000,), dtype=dtype, generator=seeded())
    assert noise.dtype == dtype
    assert noise.isfinite().all()
    if dtype in (torch.float32, torch.float64):  # half types have too few values for this test
        assert stats.kstest(noise.double().numpy(), gumbel_cdf).pvalue > LEVEL


def test_the_noise_takes_the_default_dtype_and_refuses_integers():
    assert gumbel_noise((2, 3)).shape == (2, 3)
    assert gumbel_noise(()).dtype == torch.get_default_dtype()
    with pytest.raises(TypeError, match=r"`dtype` must be floating; got torch\.int64"):
        gumbel_noise((2,), dtype=torch.int64)


# --- the law --------------------------------------------------------------------------------------


def laws():
    generator = seeded(1)
    yield "uniform", torch.zeros(16)
    yield "nearly certain", torch.tensor([6.0, 0, 0, 0, 0])
    yield "with impossible ones", torch.tensor([0.0, -inf, 1, -inf, -1])
    for classes in (2, 3, 4, 7, 31, 32, 33, 64, 100, 128, 1000, 4096):
        yield f"{classes} classes", 1.5 * torch.randn(classes, generator=generator)
    # Two of 16 tiles have most of the mass, and not the largest logit.
    yield "mass in tiles of small ones", torch.cat([torch.full((32,), -inf), torch.zeros(32)])
    falling = torch.full((256,), -8.0)
    falling[0], falling[16:48] = 2.0, 0.0
    yield "mass far from the largest", falling


LAWS = dict(laws())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_frequencies_are_the_softmax(backend, law):
    # 200,000 draws; a shift of 2 % of a class of 1/2 is 18 standard errors in its square.
    logits, n = LAWS[law], 200_000 if len(LAWS[law]) <= 256 else 20_000
    index = gumbel_max_sample(logits, (n,), generator=seeded(), backend=backend)
    assert index.dtype == torch.int64
    found = index.bincount(minlength=len(logits)).numpy()
    expected = n * logits.double().softmax(-1).numpy()
    assert (found[expected == 0] == 0).all()
    found, expected = found[expected > 0], expected[expected > 0]
    order = expected.argsort()[::-1]
    found, expected = found[order], expected[order]
    rare = expected < 5  # together, as the chi-square wants it
    if rare.any():
        found = np.append(found[~rare], found[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(found, expected * (found.sum() / expected.sum())).pvalue > LEVEL


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [1.0, 0.5, 3.0])
def test_the_largest_value_is_gumbel_around_the_log_sum_and_independent_of_the_class(backend, tau):
    logits = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.3, 0.3, -1.0])
    index, largest = gumbel_max_sample(
        logits, (60_000,), tau=tau, generator=seeded(), backend=backend, return_max=True
    )
    location = (logits / tau).logsumexp(-1).item()
    for each in range(len(logits)):
        values = largest[index == each].double().numpy()
        assert len(values) > 100
        assert stats.kstest(values, gumbel_cdf, (location,)).pvalue > LEVEL


@pytest.mark.parametrize(
    ("gap", "classes", "low", "high", "with_24_bits"),
    [(20.5, 2**18, 10, 60, 0.0), (18.0, 2**17, 140, 260, 15.9)],
)
def test_classes_in_the_tail_are_drawn_that_noise_of_24_bits_never_draws(
    gap, classes, low, high, with_24_bits
):
    # The expected number is that of a binomial law; the interval's false-alarm rate is below 1e-4.
    n, logits = 100_000, torch.full((classes,), -gap)
    logits[0] = 0
    expected = n * (1 - 1 / (1 + (classes - 1) * math.exp(-gap)))
    assert low < expected < high
    assert not low < with_24_bits < high
    false_alarm = stats.poisson.cdf(low, expected) + stats.poisson.sf(high, expected)
    assert false_alarm < LEVEL
    index = gumbel_max_sample(logits, (n,), generator=seeded(), backend="tiled")
    assert low < int((index > 0).sum()) < high


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_of_a_half_type_are_broken_evenly(backend):
    # In bfloat16 the noise of 50,000 classes would tie, and argmax prefers the first.
    index = gumbel_max_sample(
        torch.zeros(50_000, dtype=torch.bfloat16), (2000,), generator=seeded(), backend=backend
    )
    error = 50_000 / 12**0.5 / 2000**0.5
    assert abs(index.double().mean().item() - 25_000) < 4 * error


def test_two_draws_of_one_state_of_the_generator_are_equal_and_the_next_differ():
    logits = torch.randn(5, 700)
    for backend in BACKENDS:
        draws = [gumbel_max_sample(logits, (50,), generator=g, backend=backend)
                 for g in (seeded(3), seeded(3), seeded(4))]  # fmt: skip
        assert draws[0].equal(draws[1])
        assert not draws[0].equal(draws[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_logits_of_the_others(backend):
    logits = torch.randn(4, 600, generator=seeded(1))
    other = logits.clone()
    other[1:] = torch.randn(3, 600, generator=seeded(2))
    first, second = (
        gumbel_max_sample(each, (20,), generator=seeded(5), backend=backend)
        for each in (logits, other)
    )
    assert first[:, 0].equal(second[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-4096.0, 1024.0, 1e4])
def test_an_offset_of_the_logits_does_not_change_a_draw(backend, offset):
    # Whole numbers, which the offset leaves exact.
    logits = torch.randint(-8, 8, (30, 600), generator=seeded(1)).float()
    draws = [
        gumbel_max_sample(logits + each, generator=seeded(2), backend=backend)
        for each in (0.0, offset)
    ]
    assert draws[0].equal(draws[1])


# --- temperature and log-probability --------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [1.0, 0.25, 4, torch.tensor([0.5, 1.0, 2.0])])
def test_the_log_probability_is_that_of_the_class_drawn(backend, tau):
    logits = torch.randn(3, 1000, generator=seeded(1))
    index, log_prob = gumbel_max_sample(
        logits, (7,), tau=tau, generator=seeded(), backend=backend, return_log_prob=True
    )
    scaled = logits.double() / (tau.unsqueeze(-1) if isinstance(tau, torch.Tensor) else tau)
    expected = scaled.log_softmax(-1).expand(7, -1, -1).gather(-1, index.unsqueeze(-1))
    # A difference of numbers below 30, each right to a few roundings.
    assert (log_prob - expected.squeeze(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_may_have_its_own_temperature_and_at_zero_takes_the_first_of_the_largest(backend):
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0]).expand(3, 4)
    tau = torch.tensor([0.0, 1.0, 4.0])
    n = 50_000
    index, log_prob = gumbel_max_sample(
        logits, (n,), tau=tau, generator=seeded(), backend=backend, return_log_prob=True
    )
    assert (index[:, 0] == 1).all()
    assert (log_prob[:, 0] == 0).all()
    for row in (1, 2):
        expected = (logits[row].double() / tau[row]).softmax(-1).numpy()
        found = index[:, row].bincount(minlength=4).numpy()
        assert stats.chisquare(found, n * expected).pvalue > LEVEL
    assert (gumbel_max_sample(logits, tau=0, backend=backend) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_low_temperature_sees_differences_beside_a_large_offset(backend):
    # At 10,000 the neighbours differ by 2^-10; divided by it they are one apart.
    logits = (1e4 + torch.tensor([0.0, 1.0, 2.0]) / 2**10).expand(1, -1)
    n = 100_000
    index = gumbel_max_sample(logits, (n,), tau=2**-10, generator=seeded(), backend=backend)
    expected = torch.tensor([0.0, 1.0, 2.0]).double().softmax(-1).numpy()
    assert stats.chisquare(index[:, 0].bincount().numpy(), n * expected).pvalue > LEVEL


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [1e-6, 1e6])
def test_extreme_temperatures_take_the_largest_class_or_any(backend, tau):
    logits = torch.linspace(-1e4, 1e4, 600)
    index = gumbel_max_sample(logits, (400,), tau=tau, generator=seeded(), backend=backend)
    if tau < 1:
        assert (index == 599).all()
    else:
        assert index.unique().numel() > 250  # of 600 with equal chances 292 are expected


# --- values and shapes at the edge ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_certain_class_is_drawn_and_an_impossible_one_never(backend, dtype):
    logits = torch.full((3, 700), -inf, dtype=dtype)
    logits[0, 650] = inf
    logits[0, 3] = 1.0
    logits[1, 7] = torch.finfo(dtype).max
    logits[1, 8] = torch.finfo(dtype).min
    logits[2, [5, 699]] = 0
    index, log_prob = gumbel_max_sample(
        logits, (200,), generator=seeded(), backend=backend, return_log_prob=True
    )
    assert (index[:, 0] == 650).all()
    assert (index[:, 1] == 7).all()
    assert set(index[:, 2].tolist()) == {5, 699}
    assert (log_prob[:, :2] == 0).all()
    # log 2 in float32
    assert (log_prob[:, 2] + math.log(2)).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=st.lists(st.integers(0, 3), max_size=2),
    classes=st.integers(1, 70),
    draws=st.lists(st.integers(0, 3), max_size=2),
    data=st.data(),
)
def test_the_classes_may_lie_on_any_axis_of_any_shape(backend, shape, classes, draws, data):
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    rows = torch.randn(*shape, classes, generator=seeded(1))
    rows[..., : classes // 2] = -inf
    logits = rows.movedim(-1, dim)
    index = gumbel_max_sample(logits, draws, dim=dim, generator=seeded(), backend=backend)
    assert index.shape == (*draws, *shape)
    assert index.numel() == 0 or int(index.min()) >= classes // 2
    assert index.equal(gumbel_max_sample(rows, draws, generator=seeded(), backend=backend))
    strided = torch.stack([rows, rows], -1)[..., 0]
    assert index.equal(gumbel_max_sample(strided, draws, generator=seeded(), backend=backend))


def test_many_draws_are_made_in_portions_without_changing_their_number(monkeypatch):
    monkeypatch.setattr(sampling, "LARGEST_PORTION", 1000)
    for backend in BACKENDS:
        index = gumbel_max_sample(torch.zeros(3, 100), (2, 11), backend=backend)
        assert index.shape == (2, 11, 3)
        assert index.unique().numel() > 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_race_in_float32(backend, dtype):
    generator = torch.Generator().manual_seed(11)
    logits = torch.zeros(4, 600, dtype=dtype)
    _, largest = gumbel_max_sample(
        logits, (1000,), generator=generator, backend=backend, return_max=True
    )
    assert largest.dtype == torch.float32
    # They lie around 7, where float32 has 10^7 numbers, float16 some thousand, bfloat16 hundreds.
    assert largest.unique().numel() > 3900


BAD = [
    (dict(logits=torch.tensor([1.0, math.nan, math.nan])), ValueError, "2 entries that are NaN"),
    (dict(logits=torch.tensor([inf, 0.0, inf])), ValueError, r"at most one \+inf in a row"),
    (dict(logits=torch.full((2, 3), -inf)), ValueError, "2 rows in which all classes are -inf"),
    (dict(logits=torch.zeros(3, 0)), ValueError, r"`logits` \(3, 0\) has no classes"),
    (dict(logits=torch.zeros(3), dim=1), ValueError, r"`dim` must be an axis .*\(3,\); got 1"),
    (dict(logits=torch.tensor(1.0)), ValueError, "`dim` must be an axis"),
    (dict(logits=torch.zeros(3, dtype=torch.int64)), TypeError, "floating numbers; got torch.int"),
    (dict(logits=torch.zeros(3, dtype=torch.complex64)), TypeError, "floating numbers"),
    (dict(logits=torch.zeros(3), tau=-1.0), ValueError, "`tau` must be finite and 0 or at least"),
    (dict(logits=torch.zeros(3), tau=math.nan), ValueError, "`tau` must be finite"),
    (dict(logits=torch.zeros(2, 3), tau=torch.ones(3)), ValueError, r"`tau` must broadcast .*\(2,"),
    (dict(logits=torch.zeros(2, 3), tau=torch.ones(1, 2)), ValueError, "`tau` must broadcast"),
    (dict(logits=torch.zeros(3), tau=1e-31), ValueError, "0 or at least 1e-30; got 1e-31"),
    (
        dict(logits=torch.zeros(3), tau=0.0, return_max=True),
        ValueError,
        "finite and at least 1e-30",
    ),
    (dict(logits=torch.zeros(3), backend="fast"), ValueError, "`backend` must be 'auto' or one of"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_is_refused_by_name(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        gumbel_max_sample(**{"backend": backend} | arguments)


def test_values_are_not_looked_at_if_that_is_switched_off():
    for backend in BACKENDS:
        logits = torch.full((2, 3), -inf)
        index = gumbel_max_sample(logits, backend=backend, validate_args=False)
        assert index.shape == (2,)


def test_which_backends_run_here():
    assert set(BACKENDS) <= set(available_backends())


# --- the sums of the tiles ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("taus", [None, torch.tensor([0.5, 1.0, 3.0])])
@pytest.mark.parametrize("width", [1, 8, 32, 1000, 1024])
def test_the_sums_of_tiles_are_those_of_torch(width, taus, dtype):
    rows = (4 * torch.randn(3, 1000, generator=seeded(1))).to(dtype)
    rows[0, :40] = -inf
    tau = 1.0 if taus is None else taus.to(torch.float64 if dtype == torch.float64 else taus.dtype)
    tops, sums = tiles.log_sums(rows, tau, width)
    scale = 1.0 if taus is None else taus.double().unsqueeze(-1)
    for tile in range(tops.shape[1]):
        part = rows[:, tile * width : (tile + 1) * width].double() / scale
        total = tops[:, tile].double() / (1.0 if taus is None else taus.double()) + sums[:, tile]
        expected = part.logsumexp(-1)
        impossible = expected == -inf
        assert (total[impossible] == -inf).all()
        # Relative to a sum of up to 1,024: roundings of the exponentials, 2e-7, and the division.
        error = (total - expected)[~impossible].abs().max() if not impossible.all() else 0
        assert error < (1e-13 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_loops_agree_with_the_eager_sums_and_are_what_runs(dtype, monkeypatch):
    from cln_tutorial.gumbel_softmax import numba_loops

    rows = (4 * torch.randn(5, 777, generator=seeded(1))).to(dtype)
    called = []
    monkeypatch.setattr(
        numba_loops,
        "log_sums",
        lambda *a, loops=numba_loops.log_sums: called.append(1) or loops(*a),
    )
    for found, expected in zip(
        tiles.log_sums(rows, 0.7, 32), tiles.eager_log_sums(rows, None, 0.7, 32), strict=True
    ):
        assert (found - expected).abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)
    assert called


@pytest.mark.parametrize("fault", [math.nan, inf, -inf])
def test_the_sums_show_what_is_wrong_in_a_row(fault):
    for dtype in FLOATS:
        rows = torch.zeros(1, 64, dtype=dtype)
        rows[0, 37] = fault
        found = []
        for tops, sums in (
            tiles.log_sums(rows, 1.0, 8),
            tiles.eager_log_sums(rows, None, 1.0, 8),
        ):
            found.append((tops + sums)[0, 4].item())
            assert (tops + sums)[0, [0, 7]].isfinite().all()
        if math.isnan(fault):
            assert math.isnan(found[0])
            assert math.isnan(found[1])
        else:
            expected = inf if fault > 0 else math.log(7)
            assert found == pytest.approx([expected] * 2, rel=1e-6)


def test_the_number_of_threads_does_not_change_a_sum():
    rows, before = torch.randn(4, 200_000), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tiles.log_sums(rows, 1.0, 512))
    finally:
        torch.set_num_threads(before)
    for tops, sums in found[1:]:
        assert tops.equal(found[0][0])
        assert sums.equal(found[0][1])


# --- the transforms of PyTorch --------------------------------------------------------------------


def test_a_compiled_draw_has_the_same_law(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import torch
from cln_tutorial.gumbel_softmax import gumbel_max_sample
torch.manual_seed(0)
logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().repeat(200)
for backend in ("reference", "tiled"):
    draw = torch.compile(
        lambda x: gumbel_max_sample(x, (20_000,), backend=backend), fullgraph=True
    )
    print(*(draw(logits) % 4).bincount(minlength=4).tolist())
"""
    for line in child_output(code).splitlines():
        *found, impossible = map(int, line.split())
        assert impossible == 0
        assert stats.chisquare(found, [10_000, 6000, 4000]).pvalue > LEVEL


def test_vmap_draws_differently_for_each_of_its_rows():
    torch.manual_seed(0)
    logits = torch.zeros(40, 2, 600)
    index = torch.vmap(gumbel_max_sample, randomness="different")(logits)
    assert index.shape == (40, 2)
    assert index.unique().numel() > 60  # of 80 draws from 600 about 75 differ


def test_autocast_does_not_change_a_draw():
    logits = torch.randn(20, 700, generator=seeded(1))
    plain = gumbel_max_sample(logits, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert gumbel_max_sample(logits, generator=seeded()).equal(plain)


# --- without replacement --------------------------------------------------------------------------


def test_inclusion_probabilities_are_those_of_drawing_one_after_another():
    p, n = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), 200_000
    first_then_second = p[:, None] * p[None, :] / (1 - p[:, None])
    first_then_second.fill_diagonal_(0)
    expected = first_then_second.sum(0) + first_then_second.sum(1)
    published = [0.82884, 0.66873, 0.37218, 0.13025]
    assert expected.tolist() == pytest.approx(published, abs=5e-6)
    index = gumbel_top_k(p.log().expand(n, 4), 2, generator=seeded())
    pairs = (4 * index[:, 0] + index[:, 1]).bincount(minlength=16).numpy()
    possible = first_then_second.flatten().numpy() > 0
    assert (pairs[~possible] == 0).all()
    chances = n * first_then_second.flatten().numpy()[possible]
    assert stats.chisquare(pairs[possible], chances).pvalue > LEVEL


def test_the_weights_by_the_threshold_estimate_a_mean_without_bias():
    generator, n = seeded(2), 200_000
    log_p = torch.randn(6, generator=generator).double().log_softmax(-1)
    f = torch.randn(6, generator=generator).double()
    index, perturbed, kappa = gumbel_top_k(
        log_p.expand(n, 6), 3, generator=generator, return_perturbed=True
    )
    assert (perturbed[:, :-1] >= perturbed[:, 1:]).all()
    assert (perturbed[:, -1] >= kappa).all()
    chosen = log_p[index]
    weight = chosen.exp() / -torch.expm1(-torch.exp(chosen - kappa.unsqueeze(-1)))
    estimate = (weight * f[index]).sum(-1)
    error = estimate.std() / n**0.5
    assert abs(estimate.mean() - (log_p.exp() * f).sum()) < 4 * error


def test_all_classes_are_a_permutation_and_leave_no_threshold():
    logits = torch.randn(3, 5, requires_grad=True)
    index, perturbed, kappa = gumbel_top_k(logits, 5, return_perturbed=True, generator=seeded())
    assert index.sort().values.equal(torch.arange(5).expand(3, 5))
    assert (kappa == -inf).all()
    perturbed.sum().backward()
    assert logits.grad.equal(torch.ones(3, 5))


def test_top_k_takes_any_axis():
    logits = torch.randn(4, 6, 3)
    index, perturbed, kappa = gumbel_top_k(
        logits, 2, dim=1, return_perturbed=True, generator=seeded()
    )
    assert (index.shape, perturbed.shape, kappa.shape) == ((4, 2, 3), (4, 2, 3), (4, 3))


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(2, 3), 4, "`k` must be from 1 to the 3 classes; got 4"),
        (torch.zeros(2, 3), 0, "`k` must be from 1 to the 3 classes; got 0"),
        (torch.tensor([[0.0, 0, -inf], [0, -inf, -inf]]), 2, "`k` 2 .* a row of `logits` has 1"),
        (torch.tensor([0.0, math.nan]), 1, "NaN"),
    ],
)
def test_more_classes_than_there_are_cannot_be_drawn(logits, k, message):
    with pytest.raises(ValueError, match=message):
        gumbel_top_k(logits, k)


# --- given the largest ----------------------------------------------------------------------------


def test_perturbed_logits_given_the_drawn_class_are_perturbed_logits():
    # Draw a class, then the values given it: the noise must be independent and Gumbel again.
    logits, n = torch.tensor([1.0, 0.0, -1.0, 0.5]).double(), 40_000
    index = gumbel_max_sample(logits, (n,), generator=seeded())
    perturbed = conditional_gumbel(logits.expand(n, 4), index, generator=seeded(1))[0]
    assert perturbed.argmax(-1).equal(index)
    noise = perturbed - logits
    for each in noise.T:
        assert stats.kstest(each.numpy(), gumbel_cdf).pvalue > LEVEL
    correlation = noise.T.corrcoef() - torch.eye(4)
    assert correlation.abs().max() < 4.5 / n**0.5  # six pairs, each normal


def test_the_largest_of_them_is_gumbel_around_the_log_sum():
    logits = torch.tensor([1.0, 0.0, -1.0]).double()
    top = conditional_gumbel(logits, torch.tensor(2), 20_000, generator=seeded())[:, 2]
    assert stats.kstest(top.numpy(), gumbel_cdf, (logits.logsumexp(-1).item(),)).pvalue > LEVEL


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_logits_overflow_nowhere_and_impossible_ones_stay_impossible(scale):
    logits = torch.tensor([scale, -scale, 0.0, -inf], requires_grad=True)
    for index in range(3):
        perturbed = conditional_gumbel(logits, torch.tensor(index), 50, generator=seeded())
        assert perturbed[:, :3].isfinite().all()
        assert (perturbed[:, 3] == -inf).all()
        assert (perturbed.argmax(-1) == index).all()
        (gradient,) = torch.autograd.grad(perturbed[:, :3].sum(), logits)
        assert gradient.isfinite().all()
        assert gradient[3] == 0


def test_the_gradient_of_the_conditional_is_right():
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(
        lambda x: conditional_gumbel(x, index, 3, generator=seeded()), logits
    )


@pytest.mark.parametrize(
    ("logits", "index", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), ValueError, r"must be \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "`index` must be int64"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, "`index` must be from 0 to 2"),
        (torch.tensor([-inf, 0.0]), torch.tensor(0), ValueError, "`index` names a class whose"),
    ],
)
def test_a_class_that_cannot_be_the_largest_is_refused(logits, index, error, message):
    with pytest.raises(error, match=message):
        conditional_gumbel(logits, index)
