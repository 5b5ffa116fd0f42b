"""The update of the averages: against float64, at every dtype, and with its two roundings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cln_tutorial.weight_averaging import available_backends, ema_update_
from cln_tutorial.weight_averaging import functional as core

CPU = [name for name in ("reference", "numba") if name in available_backends()]
SHARES = [0.0, 1e-4, 0.3, 0.5, 0.7, 1.0]
FULL = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(6575)


def test_both_backends_of_a_cpu_are_tested():
    assert CPU == ["reference", "numba"]


def updated(shadow, weight, share, **keywords):
    shadow = shadow.clone()
    ema_update_([shadow], [weight], share, **keywords)
    return shadow


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("weight_dtype", [*FULL, *HALF], ids=str)
@pytest.mark.parametrize("shadow_dtype", FULL, ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_the_update_is_the_formula_in_float64_to_a_rounding(
    backend, shadow_dtype, weight_dtype, share
):
    shadow = torch.randn(1000).to(shadow_dtype)
    weight = torch.randn(1000).to(weight_dtype)
    exact = shadow.double() + share * (weight.double() - shadow.double())
    found = updated(shadow, weight, share, backend=backend)
    assert found.dtype == shadow_dtype
    # Three roundings of numbers below 10, each at most half a unit in the last place.
    assert (found.double() - exact).abs().max() <= 30 * torch.finfo(shadow_dtype).eps


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [*FULL, *HALF, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("backend", CPU)
def test_constant_weights_are_a_fixed_point_bit_for_bit(backend, rounding, dtype, share):
    weight = torch.randn(4097, dtype=dtype)
    found = updated(weight, weight, share, rounding=rounding, step=3, backend=backend)
    assert found.equal(weight)


def test_the_form_with_two_products_would_not_keep_constant_weights():
    # What the test above forbids; the chapter says 11 to 21 %.
    weight = torch.randn(100_000)
    for decay in (0.99, 0.999, 0.9999):
        moved = (weight * decay + weight * (1 - decay) != weight).double().mean()
        assert 0.05 < moved < 0.4


@pytest.mark.parametrize("dtype", [*FULL, *HALF], ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_a_share_of_one_copies_and_one_of_zero_leaves_whatever_stands_there(backend, dtype):
    values = torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 1e-40], dtype=dtype)
    others = values.flip(0).clone()
    rounding = "stochastic" if dtype in HALF else "nearest"
    for share, expected in ((1, values), (0, others)):
        found = updated(others, values, share, rounding=rounding, backend=backend)
        assert found.equal(expected) or torch.allclose(found, expected, 0, 0, equal_nan=True)
        assert found.signbit().equal(expected.signbit())


# With "numba" four and two that move from the shadow are moved together, also between others.
@pytest.mark.parametrize(
    "shares",
    [
        [1e-4, 0.6, 1.0],
        [0.1, 0.2],
        [0.1, 0.2, 0.3],
        [0.1, 0.2, 0.3, 0.4],
        [0.1, 0.2, 0.3, 0.4, 0.05, 0.15, 0.25],
        [0.6, 0.1, 0.2, 0.0, 0.1, 0.2, 0.3, 0.4, 1.0, 0.1],
    ],
)
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_several_averages_in_one_pass_are_those_of_several_passes(backend, dtype, shares):
    weights = [torch.randn(n).bfloat16() for n in (1, 20_000, 7)]
    averages = [[torch.randn(len(w), dtype=dtype) for w in weights] for _ in shares]
    alone = [[s.clone() for s in each] for each in averages]
    ema_update_(averages, weights, shares, backend=backend)
    for each, share in zip(alone, shares, strict=True):
        ema_update_(each, weights, share, backend=backend)
    for together, single in zip(averages, alone, strict=True):
        assert all(a.equal(b) for a, b in zip(together, single, strict=True))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("backend", CPU)
def test_no_entry_is_lost_at_the_border_of_a_chunk(backend, size, monkeypatch):
    monkeypatch.setattr(core, "CHUNK", 64)
    shadow = torch.zeros(size + 2)  # with a guard at both ends
    inner = shadow[1:-1]
    ema_update_([inner], [torch.ones(size)], 0.25, backend=backend)
    assert inner.equal(torch.full((size,), 0.25))
    assert shadow[[0, -1]].equal(torch.zeros(2))


VIEWS = {
    "transposed": lambda: torch.randn(5, 7).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "every second": lambda: torch.randn(40)[::2],
    "expanded": lambda: torch.randn(1, 6).expand(4, 6),
    "no dimension": lambda: torch.randn(()),
    "at an odd offset": lambda: torch.randn(100)[3:],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", CPU)
def test_strides_do_not_matter(backend, dtype, view):
    weight = VIEWS[view]()
    shadow = torch.randn(weight.shape, dtype=dtype)
    like = torch.empty_like(weight, dtype=dtype).copy_(shadow)
    rounding = "nearest" if dtype == torch.float32 else "stochastic"
    expected = shadow + 0.3 * (weight - shadow).to(dtype)
    for each in (shadow.clone(), like):
        found = updated(each, weight, 0.3, rounding=rounding, backend=backend)
        assert (found - expected).abs().max() <= 8 * torch.finfo(dtype).eps  # values below 8


@given(
    share=st.floats(0, 1),
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtypes=st.tuples(st.sampled_from([*FULL, *HALF]), st.sampled_from(FULL)),
)
@settings(deadline=None)
def test_an_average_lies_between_the_old_one_and_the_weight(share, shape, dtypes):
    weight, shadow = torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1])
    low, high = torch.minimum(shadow, weight.to(shadow)), torch.maximum(shadow, weight.to(shadow))
    for backend in CPU:
        found = updated(shadow, weight, share, backend=backend)
        # A rounding of the difference may step over the nearer end by a unit in the last place.
        slack = 4 * torch.finfo(shadow.dtype).eps * torch.maximum(low.abs(), high.abs())
        assert ((low - slack <= found) & (found <= high + slack)).all()


# --- compensation ---------------------------------------------------------------------------------


def dead_zone(dtype, steps, compensated, backend):
    """Go from 1 towards 1.0005 at a decay of 0.9999, an update being 5e-8 and less."""
    shadow, weight = torch.ones(4, dtype=dtype), torch.full((4,), 1.0005)
    low = [torch.zeros_like(shadow)] if compensated else None
    plan = core.Plan.of([[shadow]], [weight], None if low is None else [low], False, backend)
    for step in range(steps):
        plan.run([1e-4], 0, step)
    total = shadow.double() + (0 if low is None else low[0].double())
    return ((shadow.double() - 1) / (weight.double() - 1)), (total - 1) / (weight.double() - 1)


@pytest.mark.parametrize("backend", CPU)
def test_float32_stands_still_where_compensated_float32_covers_the_exact_way(backend):
    steps = 50_000 if backend == "numba" else 5_000
    exact = 1 - 0.9999**steps  # 0.99326 after 50,000
    plain, _ = dead_zone(torch.float32, steps, compensated=False, backend=backend)
    assert (plain == 0).all()
    shadow, total = dead_zone(torch.float32, steps, compensated=True, backend=backend)
    # 0.01 points; each step errs by 2^-24 of itself.
    assert (total - exact).abs().max() < 1e-4
    # The shadow alone is rounded once: half of 2^-23 over the distance.
    assert (shadow - exact).abs().max() <= 2**-24 / 0.0005 + 1e-6
    double, _ = dead_zone(torch.float64, steps, compensated=False, backend=backend)
    assert (double - exact).abs().max() < 1e-9


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("backend", CPU)
def test_a_compensated_average_is_the_formula_but_for_the_rounding_of_the_step(backend, share):
    eps = torch.finfo(torch.float32).eps
    shadow, weight = torch.randn(2, 3000)
    low = shadow * eps / 4 * torch.randn(3000).clamp(-1, 1)
    s, w, c = (t.double() for t in (shadow, weight, low))
    exact = (s + c) + share * (w - s - c)
    ema_update_([shadow], [weight], share, compensation=[low], backend=backend)
    total = shadow.double() + low.double()
    # Four roundings of what is added to the nearer end.
    added = (w - s).abs() * min(share, 1 - share) + s.abs() * eps
    assert ((total - exact).abs() <= 4 * eps * added).all()
    assert (low.abs() <= eps * shadow.abs()).all()


# --- stochastic rounding --------------------------------------------------------------------------


def rounded_often(value, weight, share, steps, dtype=torch.bfloat16, backend="numba", size=4096):
    shadow = torch.full((size,), value, dtype=dtype)
    weight = torch.full((size,), weight)
    plan = core.Plan.of([[shadow]], [weight], None, True, backend)
    for step in range(steps):
        plan.run([share], 1, step)
    return shadow


def exact_after(value, weight, share, steps):
    return weight + (value - weight) * (1 - share) ** steps


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, b) for b in CPU] + [(torch.float16, "reference")]
)
def test_the_mean_of_stochastically_rounded_averages_is_the_exact_average(dtype, backend, sign):
    share, steps = 1e-3, 1000 if backend == "numba" else 200
    found = rounded_often(sign * 1.0, sign * 1.0625, share, steps, dtype, backend).double()
    error = found.std() / len(found) ** 0.5
    exact = sign * exact_after(1, 1.0625, share, steps)
    # False alarm in 6e-5 of all seeds.
    assert abs(found.mean() - exact) <= 4 * error
    # A rounding that is biased by 5 % of the drift would be found with a probability above 0.99:
    # it is away by more than 4 + 2.4 standard errors.
    assert 0.05 * abs(exact - sign) >= 6.4 * error or backend == "reference"


@pytest.mark.parametrize("share", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("direction", [1, -1])
def test_the_drift_is_right_where_a_float32_sum_would_drift_too_fast_or_not_at_all(
    share, direction
):
    # One unit in the last place of bfloat16 away from 1; through a float32 sum the drift would be
    # 1.007, 1.07 and 1.53 times too fast (chapter, computed).
    weight = 1 + direction * (2**-7 if direction > 0 else 2**-8)
    size, steps = 2**20, 100
    found = rounded_often(1.0, weight, share, steps, size=size).double()
    drift = found.mean() - 1
    expected = exact_after(1, weight, share, steps) - 1
    error = found.std() / size**0.5
    assert abs(drift - expected) <= 4 * error  # false alarm: 6e-5
    too_fast = {1e-3: 0.007, 1e-4: 0.07, 1e-5: 0.53}[share]
    assert too_fast * abs(expected) > 6 * error or share == 1e-3  # it would be seen


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("share", [1e-4, 0.4, 0.8, 1.0])
def test_a_rounded_average_is_a_neighbour_of_the_exact_one(dtype, share):
    shadow = torch.cat([torch.randn(20_000), torch.randn(20_000) * 1e-6, torch.randn(2000) * 6e-39])
    shadow, weight = shadow.to(dtype), shadow.flip(0)
    found = updated(shadow, weight, share, rounding="stochastic", backend="reference")
    old, new = shadow.double(), weight.double()
    exact = new + (1 - share) * (old - new) if share > 0.5 else old + share * (new - old)
    below = torch.where(
        found.double() <= exact, torch.nextafter(found, found.new_tensor(math.inf)), found
    )
    above = torch.where(
        found.double() >= exact, torch.nextafter(found, found.new_tensor(-math.inf)), found
    )
    # The next number on the other side of the exact one; float32 rounds the exact one first.
    slack = 2**-22 * torch.maximum(old.abs(), new.abs()) + 1e-45
    assert (above.double() <= exact + slack).all()
    assert (below.double() >= exact - slack).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_largest_number_does_not_become_infinite(dtype):
    largest = torch.finfo(dtype).max
    for sign in (1, -1):
        shadow = torch.full((10_000,), sign * largest, dtype=dtype)
        weight = shadow.float() * (1 - 1e-3)
        for step in range(20):
            ema_update_([shadow], [weight], 1e-3, rounding="stochastic", step=step)
        assert shadow.isfinite().all()


def edge_cases(dtype):
    info = torch.finfo(dtype)
    edges = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.smallest_normal]
    edges += [1.0, -1.0, 2.0, info.smallest_normal * info.eps, 1 + info.eps]
    return torch.tensor(edges, dtype=dtype)


@pytest.mark.parametrize("share", SHARES)
def test_numba_rounds_to_the_bits_of_the_reference(share):
    edges = edge_cases(torch.bfloat16)
    pairs = torch.cartesian_prod(torch.arange(len(edges)), torch.arange(len(edges)))
    shadow = torch.cat([edges[pairs[:, 0]], torch.randn(30_000).bfloat16()])
    for weight_dtype in (torch.bfloat16, torch.float32):
        weight = torch.cat([edges[pairs[:, 1]].float(), torch.randn(30_000)]).to(weight_dtype)
        found = [
            updated(shadow, weight, share, rounding="stochastic", seed=3, step=9, backend=backend)
            for backend in CPU
        ]
        bits = [torch.where(f.isnan(), 0x7FC0, f.view(torch.int16)) for f in found]
        assert bits[0].equal(bits[1])


def test_the_noise_of_each_step_seed_tensor_and_entry_is_its_own():
    def noise(seed=0, step=0, number=0):
        return core.hash_bits(4096, core.step_key(seed, step), number, "cpu").double() / 2**30

    plain = noise()
    assert ((plain >= 0) & (plain < 1)).all()
    # Uniform: mean 1/2, variance 1/12, each within 4 standard errors (false alarm 6e-5).
    assert abs(plain.mean() - 0.5) <= 4 * (1 / 12 / 4096) ** 0.5
    assert abs(plain.var() - 1 / 12) <= 4 * (1 / 180 / 4096) ** 0.5
    for other in (
        noise(seed=1),
        noise(step=1),
        noise(number=1),
        noise(seed=2**40),
        noise(step=2**40),
        plain.roll(1),
    ):
        correlation = torch.corrcoef(torch.stack([plain, other]))[0, 1]
        assert abs(correlation) <= 4 / 4096**0.5


def test_the_noise_of_one_entry_changes_from_step_to_step():
    # Noise that is the same for all steps would push an entry always in one direction.
    draws = torch.stack([core.hash_bits(500, core.step_key(0, t), 0, "cpu") for t in range(400)])
    means = (draws.double() / 2**30).mean(0)
    # The variance over entries of a mean of 400: 1/12/400, within 4 standard errors.
    expected = 1 / 12 / 400
    assert abs(means.var() - expected) <= 4 * expected * (2 / 500) ** 0.5


def test_a_tensor_of_more_than_two_to_the_32_entries_gets_other_noise_in_its_second_half():
    low, high = core.tensor_key(core.step_key(0, 1), 0)
    first = core._scramble(torch.arange(4096) ^ low, high)
    second = core._scramble(torch.arange(4096) ^ low, high ^ 1)
    assert (first == second).sum() < 4


# --- bad input ------------------------------------------------------------------------------------

ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (([ONES], [ONES, ONES], 0.1), {}, ValueError, "one tensor per weight, 2; got 1"),
        (([torch.ones(3)], [ONES], 0.1), {}, ValueError, r"shape \(3,\), the weight .* \(2,\)"),
        (([ONES], [ONES], 1.5), {}, ValueError, r"number in \[0, 1\].* got 1.5"),
        (([ONES], [ONES], math.nan), {}, ValueError, r"number in \[0, 1\].* got nan"),
        (([[ONES], [ONES]], [ONES], 0.5), {}, ValueError, "for each of 2 averages; got 0.5"),
        (([ONES.int()], [ONES.int()], 0.5), {}, TypeError, "torch.int32, not floating"),
        (([ONES], [ONES], 0.5), {"rounding": "up"}, ValueError, "'nearest' or 'stochastic'"),
        (([ONES], [ONES], 0.5), {"backend": "cuda"}, ValueError, "must be 'auto' or one of"),
        (([ONES], [ONES], 0.5), {"backend": "triton"}, ValueError, "needs a GPU"),
        (
            ([ONES], [ONES], 0.5),
            {"compensation": [ONES.double()]},
            TypeError,
            "dtype of its shadow.* torch.float64 for torch.float32",
        ),
        (
            ([ONES], [ONES], ONES),
            {},
            ValueError,
            r"float64 of shape \(1,\).* got torch.float32 of shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_changes(
    arguments, keywords, error, message, unchecked
):
    before = [t.clone() for t in (ONES,)]
    with pytest.raises(error, match=message):
        ema_update_(*arguments, **keywords)
    assert ONES.equal(before[0])
