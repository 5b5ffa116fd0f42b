"""Counters, the numbers made of them, and the loops that take all steps in one go.

Words are compared with the published vectors and with integers of Python; numbers with Box-Muller
in float64; paths with the samplers in plain PyTorch; laws with closed forms. Statistical tolerances
are five standard errors of the true estimator at a fixed seed.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cln_tutorial.energy_models import fused, numba_loops, philox
from cln_tutorial.energy_models.boltzmann import RBMEnergy
from cln_tutorial.energy_models.energies import (
    DoubleWellEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
)
from cln_tutorial.energy_models.philox import counter_normal, counter_uniform
from cln_tutorial.energy_models.samplers import (
    langevin_sample,
    mala_sample,
    underdamped_langevin_sample,
)

inf, nan = math.inf, math.nan
BACKENDS = ["reference", "numba"]
both = pytest.mark.parametrize("backend", BACKENDS)
# Philox-4x32-10 of the authors' file of known answers: counter, key, words.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Found by trying the chains at seed 0 and step 0: where the first word is least and largest.
LEAST_UNIFORM, LARGEST_UNIFORM = 1_345_852_280, 1_011_797_837  # stream 1
LEAST_RADIUS_WORD, LARGEST_RADIUS_WORD = 748_582_185, 2_705_662_944  # stream 0: 0 and 2**32 - 3
BLOCK = numba_loops.BLOCK


@pytest.fixture
def use(monkeypatch):
    """Choose who makes the numbers."""
    return lambda backend: monkeypatch.setattr(philox, "HAS_NUMBA", backend == "numba")


def words_by_integers(counter, key):
    """The definition, in whole numbers of any length."""
    w, k = list(counter), list(key)
    for _ in range(10):
        first, second = w[0] * 0xD2511F53, w[2] * 0xCD9E8D57
        w = [
            (second >> 32) ^ w[1] ^ k[0],
            second % 2**32,
            (first >> 32) ^ w[3] ^ k[1],
            first % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return w


def normals_by_definition(seed, step, n, width, stream, first_chain):
    numbers = np.empty((n, -(-width // 4), 4))
    for row in range(n):
        for b in range(numbers.shape[1]):
            counter = (b, step, first_chain + row, stream)
            u = (np.array(words_by_integers(counter, (seed % 2**32, seed >> 32))) + 0.5) / 2**32
            radius, angle = np.sqrt(-2 * np.log(u[::2])), 2 * math.pi * u[1::2]
            numbers[row, b, ::2] = radius * np.cos(angle)
            numbers[row, b, 1::2] = radius * np.sin(angle)
    return numbers.reshape(n, 4 * numbers.shape[1])[:, :width]


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_words_are_those_that_the_authors_of_philox_published(counter, key, answer):
    words = philox.philox([torch.tensor([w]) for w in counter], key)
    assert [int(w) for w in words] == list(answer)
    assert words_by_integers(counter, key) == list(answer)
    block = np.empty((4, BLOCK), np.uint32)
    quads, chains = (
        np.full((1, BLOCK), counter[0], np.uint32),
        np.full(BLOCK, counter[2], np.uint32),
    )
    numba_loops._philox(
        quads, 0, counter[1], chains, counter[3], np.uint64(key[0] + (key[1] << 32)), block
    )
    assert (block == np.array(answer, np.uint32)[:, None]).all()


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), st.tuples(*[st.integers(0, 2**32 - 1)] * 2))
def test_words_are_those_of_whole_numbers_for_any_counter_and_key(counter, key):
    words = philox.philox([torch.tensor([w]) for w in counter], key)
    assert [int(w) for w in words] == words_by_integers(counter, key)


# --- numbers --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("seed", "step", "shape", "stream", "first_chain"),
    [
        (0, 0, (3, 2), 0, 0),
        (6612, 70_000, (5, 7), 2, 1_000),
        (2**64 - 1, 2**32 - 1, (2, 3, 3), 2**32 - 1, 2**32 - 2),
        (2**40 + 3, 5, (300, 1), 0, 12),  # more than a block
        (1, 2, (0, 4), 0, 0),
        (1, 2, (4, 0), 0, 0),
        (1, 2, (4,), 0, 0),
    ],
)
def test_normals_are_box_muller_of_the_words(
    backend, dtype, seed, step, shape, stream, first_chain, use
):
    use(backend)
    z = counter_normal(seed, step, shape, stream=stream, first_chain=first_chain, dtype=dtype)
    n, width = shape[0], math.prod(shape[1:])
    expected = normals_by_definition(seed, step, n, width, stream, first_chain)
    assert z.shape == shape
    assert z.dtype == dtype
    # In float32 a uniform is rounded by 2**-25 of itself, as an angle by 2e-7 of radius up to 6.8.
    tolerance = 3e-6 if dtype == torch.float32 else 1e-14
    assert (np.abs(z.reshape(n, width).numpy() - expected) < tolerance).all()


@both
def test_uniforms_are_the_first_word_of_a_chain(backend, use):
    use(backend)
    u = counter_uniform(2**35 + 1, 9, 300, first_chain=40)
    key = 1, 2**3
    words = [words_by_integers((0, 9, 40 + i, 1), key)[0] for i in range(300)]
    assert u.shape == (300,)
    assert u.dtype == torch.float32
    # Rounding of a number in float32, twice: 2**-24 of itself.
    np.testing.assert_allclose(u.numpy(), (np.array(words) + 0.5) / 2**32, rtol=1.2e-7)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_never_0_and_never_1(backend, dtype, use):
    use(backend)
    least = counter_uniform(0, 0, 1, first_chain=LEAST_UNIFORM, dtype=dtype)
    largest = counter_uniform(0, 0, 1, first_chain=LARGEST_UNIFORM, dtype=dtype)
    assert least == 2**-33
    assert largest == {torch.float32: 1 - 2**-24, torch.float64: 1 - 2**-33}[dtype]


@both
def test_the_extreme_words_give_finite_normals(backend, use):
    use(backend)
    small = counter_normal(0, 0, (1, 2), first_chain=LARGEST_RADIUS_WORD)
    large = counter_normal(0, 0, (1, 2), first_chain=LEAST_RADIUS_WORD)
    # The word 2**32 - 3 gives a uniform that float32 rounds to 1.
    assert small.isfinite().all()
    assert small.norm() < 1e-3
    assert large.norm().item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)  # u = 2**-33


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_get_the_numbers_of_float32_rounded(dtype):
    wide = counter_normal(3, 1, (50, 3))
    assert counter_normal(3, 1, (50, 3), dtype=dtype).equal(
        philox_by_torch(3, 1, (50, 3)).to(dtype)
    )
    assert (wide - philox_by_torch(3, 1, (50, 3))).abs().max() < 3e-6
    u = counter_uniform(3, 1, 5_000, dtype=dtype)
    assert u.dtype == dtype
    assert (u < 1).all()
    assert (u - counter_uniform(3, 1, 5_000)).abs().max() <= torch.finfo(dtype).eps / 2


def philox_by_torch(seed, step, shape):
    """Numbers of float32 by plain PyTorch, whatever is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "HAS_NUMBA", False)
        return counter_normal(seed, step, shape)


@both
def test_a_chunk_of_chains_has_the_numbers_it_has_in_the_whole_bit_for_bit(backend, use):
    use(backend)
    whole = counter_normal(7, 3, (700, 5), stream=2, first_chain=11)
    u = counter_uniform(7, 3, 700, first_chain=11)
    for start, stop in [(0, 1), (1, 257), (257, 700)]:
        part = counter_normal(7, 3, (stop - start, 5), stream=2, first_chain=11 + start)
        assert part.equal(whole[start:stop])
        assert counter_uniform(7, 3, stop - start, first_chain=11 + start).equal(u[start:stop])


@both
def test_another_seed_step_stream_or_chain_gives_other_numbers(backend, use):
    use(backend)
    z = counter_normal(5, 6, (64, 8), stream=7, first_chain=8)
    others = [
        counter_normal(6, 6, (64, 8), stream=7, first_chain=8),
        counter_normal(5 + 2**32, 6, (64, 8), stream=7, first_chain=8),
        counter_normal(5, 7, (64, 8), stream=7, first_chain=8),
        counter_normal(5, 6, (64, 8), stream=8, first_chain=8),
        counter_normal(5, 6, (64, 8), stream=7, first_chain=72),
    ]
    everything = torch.cat([z, *others])
    assert everything.unique().numel() > 0.999 * everything.numel()  # of 23 bits, some may meet


def test_numbers_do_not_depend_on_how_many_threads_make_them():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((counter_normal(1, 1, (40_001, 6)), counter_uniform(1, 1, 90_001)))
    finally:
        torch.set_num_threads(before)
    assert all(z.equal(found[0][0]) and u.equal(found[0][1]) for z, u in found)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = counter_normal(1, 1, (10, 3)), counter_uniform(1, 1, 10)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert first[0].equal(counter_normal(1, 1, (10, 3)))
    assert first[1].equal(counter_uniform(1, 1, 10))


def test_numbers_can_be_made_inside_a_compiled_function(child_output):
    code = (
        "import torch\n"
        "from cln_tutorial.energy_models.philox import counter_normal, counter_uniform\n"
        "f = lambda step: (counter_normal(0, step, (5, 3)), counter_uniform(0, step, 4))\n"
        "compiled = torch.compile(f, backend='aot_eager', fullgraph=True)\n"
        "for step in (3, 4):\n"
        "    (z, u), (other_z, other_u) = f(step), compiled(step)\n"
        "    assert (z - other_z).abs().max() < 3e-6 and u.equal(other_u)\n"
    )
    child_output(code)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"`seed` must be at least 0; got -1", {"seed": -1}),
        (ValueError, r"`seed` counts up to \d+, .* below 2\*\*64", {"seed": 2**64}),
        (ValueError, r"`step` counts up to 4294967296, .* 2\*\*32", {"step": 2**32}),
        (ValueError, r"`stream` counts up to 4294967296", {"stream": 2**32}),
        (ValueError, r"`first_chain` counts up to 4294967296", {"first_chain": 2**32 - 1}),
        (TypeError, r"`step` must be a whole number; got float", {"step": 1.0}),
        (TypeError, r"`dtype` must be a floating dtype; got torch.int64", {"dtype": torch.int64}),
    ],
)
def test_what_is_no_counter_is_refused_by_name(error, message, options):
    options = {"seed": 0, "step": 0} | options
    with pytest.raises(error, match=message):
        counter_normal(shape=(2, 3), **options)
    with pytest.raises(error, match=message):
        counter_uniform(n=2, **options)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_shape_is_refused():
    with pytest.raises(ValueError, match=r"`shape` must be \(n, \*event\), .* got \(\)"):
        counter_normal(0, 0, ())
    with pytest.raises(ValueError, match=r"`shape` must be at least 0; got -2"):
        counter_normal(0, 0, (3, -2))
    with pytest.raises(ValueError, match=r"`n` must be at least 0; got -1"):
        counter_uniform(0, 0, -1)


# --- the law of the numbers -----------------------------------------------------------------------

N_CHAINS = 2_500_000  # times 4 coordinates: 1e7 draws


@pytest.fixture(scope="module")
def draws():
    return counter_normal(20_19_05, 1, (N_CHAINS, 4)).double()


def test_ten_million_draws_have_the_moments_of_the_normal_law(draws):
    z, n = draws.flatten(), draws.numel()
    # Standard errors of the means of z, z², z³ and z⁴: their variances are 1, 2, 15 and 96.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(z.pow(power).mean() - mean) < 5 * math.sqrt(variance / n)
    # Of 1e7 draws, 5.7 are beyond 5; none is beyond the radius of the least uniform.
    assert 5 < z.abs().max() < math.sqrt(66 * math.log(2)) + 1e-6
    assert stats.kstest(z[:1_000_000].numpy(), "norm").pvalue > 1e-6


def test_each_output_of_box_muller_is_normal_and_they_are_independent(draws):
    for d in range(4):
        z = draws[:, d]
        for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
            assert abs(z.pow(power).mean() - mean) < 5 * math.sqrt(variance / N_CHAINS)
    for a in range(4):
        for b in range(a):
            x, y = draws[:, a], draws[:, b]
            # Products of independent normals have variance 1, of centred squares 4.
            assert abs((x * y).mean()) < 5 / math.sqrt(N_CHAINS)
            assert abs(((x**2 - 1) * (y**2 - 1)).mean()) < 5 * 2 / math.sqrt(N_CHAINS)


def test_each_quadrant_of_each_pair_gets_a_quarter(draws):
    # A sign that is lost gives half-normal noise: chains drift, and each test of shapes passes.
    for a in range(4):
        for b in range(a):
            for sign_a in (1, -1):
                for sign_b in (1, -1):
                    share = (
                        ((sign_a * draws[:, a] > 0) & (sign_b * draws[:, b] > 0)).double().mean()
                    )
                    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / N_CHAINS)


def test_neighbouring_chains_and_steps_and_streams_are_uncorrelated(draws):
    x = draws[:500_000]
    next_step = counter_normal(20_19_05, 2, (500_000, 4)).double()
    next_stream = counter_normal(20_19_05, 1, (500_000, 4), stream=1).double()
    for other in (x.roll(1, 0), next_step, next_stream):
        assert ((x * other).mean(0).abs() < 5 / math.sqrt(500_000)).all()


def test_uniforms_are_uniform_and_independent_of_the_noise_of_their_chain(draws):
    u = counter_uniform(20_19_05, 1, 1_000_000).double()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-6
    product = (u - 0.5)[:, None] * draws[:1_000_000]  # of variance 1/12
    assert (product.mean(0).abs() < 5 * math.sqrt(1 / 12 / 1_000_000)).all()


# --- all steps in one loop ------------------------------------------------------------------------

SAMPLERS = {"ula": langevin_sample, "mala": mala_sample, "baoab": underdamped_langevin_sample}
methods = pytest.mark.parametrize("method", SAMPLERS)


def uneven_mixture(dim):
    means = 2 * philox_by_torch(1, 1, (5, dim))
    sigma, weights = (
        torch.tensor([0.5, 0.7, 1.0, 1.5, 0.9]),
        torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0]),
    )
    return GaussianMixtureEnergy(means, sigma, weights)


ENERGIES = {
    "ring": GaussianMixtureEnergy.ring(),
    "line": uneven_mixture(1),
    "space": uneven_mixture(3),
    "six": uneven_mixture(6),
    "gaussian": GaussianEnergy(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 4.0, 0.5])),
    "number": GaussianEnergy(torch.ones(1), 2.0),
    "well": DoubleWellEnergy(5.0),
    "wells": DoubleWellEnergy(2.0, dim=3),
}


def run(method, energy, x, n_steps=40, **options):
    options = {"step_size": 0.02, "seed": 6612} | options
    return fused.run(method, energy, x, n_steps=n_steps, **options)


def starts(energy, n=300):
    # The double well is stiff far outside: there the steps of these tests would diverge.
    spread = 0.5 if isinstance(energy, DoubleWellEnergy) else 1.5
    return spread * counter_normal(99, 0, (n, energy.dim))


@methods
@pytest.mark.parametrize("name", ENERGIES)
def test_the_loop_follows_the_paths_of_the_reference(method, name):
    energy = ENERGIES[name]
    x = starts(energy)
    n = len(x)
    per_chain = {
        "step_size": torch.linspace(0.005, 0.02, n),
        "temperature": torch.linspace(0.5, 2, n),
    }
    for options in ({"step_size": 0.02}, per_chain):
        extra = {"friction": 2.0} if method == "baoab" else {}
        options = options | extra | {"seed": 5, "first_chain": 7, "first_step": 3, "thin": 4}
        out = SAMPLERS[method](
            energy,
            x,
            n_steps=12,
            return_trajectory=True,
            return_info=True,
            backend="reference",
            **options,
        )
        v = None
        if method == "baoab":
            t = torch.as_tensor(options.get("temperature", 1.0)).reshape(-1, 1)
            v = t.sqrt() * counter_normal(5, 3, x.shape, stream=2, first_chain=7)
        found = run(method, energy, x, 12, v=v, keep=True, **options)
        # Rounding of float32 over 12 steps, of numbers of size 10.
        for mine, theirs in [(found.x, out.x), (found.trajectory, out.trajectory)]:
            assert (mine - theirs).abs().max() < 1e-5
        torch.testing.assert_close(found.energy, out.info.energy, atol=2e-4, rtol=1e-5)
        assert (found.accepted / 12).equal(out.info.accept_rate)
        if method == "baoab":
            assert (found.v - out.info.velocity).abs().max() < 2e-5


@methods
def test_a_chain_does_not_depend_on_its_neighbours_bit_for_bit(method):
    energy = ENERGIES["ring"]
    x, v = starts(energy, 700), counter_normal(1, 2, (700, 2))
    whole = run(method, energy, x, v=v, first_chain=30)
    for start, stop in [(0, 1), (1, 257), (257, 700)]:
        part = run(method, energy, x[start:stop], v=v[start:stop], first_chain=30 + start)
        assert part.x.equal(whole.x[start:stop])
        assert part.accepted.equal(whole.accepted[start:stop])
    # And on its number alone: all from one place go separate ways.
    together = run(method, energy, x[:1].expand(700, 2), v=v[:1].expand(700, 2)).x
    assert together.unique(dim=0).shape[0] == 700


@methods
def test_a_run_may_be_cut_into_runs_of_fewer_steps_bit_for_bit(method):
    energy = ENERGIES["wells"]
    x, v = starts(energy), counter_normal(1, 2, (300, 3))
    whole = run(method, energy, x, 40, v=v)
    first = run(method, energy, x, 13, v=v)
    second = run(method, energy, first.x, 27, v=first.v, first_step=13)
    assert second.x.equal(whole.x)
    assert (first.accepted + second.accepted).equal(whole.accepted)


@methods
def test_chains_do_not_depend_on_how_many_threads_run_them(method):
    energy = ENERGIES["ring"]
    x = starts(energy, 3_000)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(method, energy, x, keep=True, thin=10))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert other.x.equal(found[0].x)
        assert other.trajectory.equal(found[0].trajectory)


@methods
def test_frames_are_the_states_after_each_thin_steps(method):
    energy = ENERGIES["space"]
    x = starts(energy)
    kept = run(method, energy, x, 12, keep=True, thin=4)
    assert kept.trajectory.shape == (3, 300, 3)
    assert kept.energy.shape == (3, 300)
    for frame, e, steps in zip(kept.trajectory, kept.energy, (4, 8, 12), strict=True):
        assert frame.equal(run(method, energy, x, steps).x)
        assert (e - energy(frame)).abs().max() < 1e-4  # energies up to 100, rounded to 2**-24
    assert run(method, energy, x, 12).trajectory is None


@methods
def test_what_comes_in_is_not_modified_and_may_have_gaps_in_memory(method):
    energy = ENERGIES["ring"]
    x, v = starts(energy), counter_normal(1, 2, (300, 2))
    gaps = torch.stack([x, x], 1)[:, 0]
    before = x.clone(), v.clone()
    out = run(method, energy, gaps, v=v)
    assert out.x.equal(run(method, energy, x, v=v).x)
    assert x.equal(before[0])
    assert gaps.equal(before[0])
    assert v.equal(before[1])
    none = run(method, energy, x[:0], 3, keep=True)
    assert none.x.shape == (0, 2)
    assert none.trajectory.shape == (3, 0, 2)
    assert run(method, energy, x, 0).x.equal(x)


@methods
@pytest.mark.parametrize("name", ["ring", "number", "well"])
def test_defaults_of_pytorch_change_nothing(method, name):
    energy = ENERGIES[name]
    x = starts(energy)
    expected = run(method, energy, x, keep=True)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = run(method, energy, x, keep=True)
            numbers = (
                counter_normal(1, 1, (5, 2), device="cpu"),
                counter_uniform(1, 1, 5, device="cpu"),
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.x.equal(expected.x)
    assert found.energy.equal(expected.energy)
    assert numbers[0].equal(counter_normal(1, 1, (5, 2)))
    assert numbers[1].equal(counter_uniform(1, 1, 5))


# --- laws -----------------------------------------------------------------------------------------

N = 100_000
VARIANCE_ERROR = math.sqrt(2 / N)  # of N independent normal numbers, relative


@pytest.mark.parametrize("h", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_unadjusted_chains_have_the_variance_of_the_closed_form(h, share):
    precision = torch.tensor([1.0, 0.5])
    energy = GaussianEnergy(torch.tensor([3.0, -1.0]), precision)
    scale = share * math.sqrt(2 * h)
    x = run(
        "ula", energy, torch.zeros(N, 2), int(30 / h) + 60, step_size=h, noise_scale=scale
    ).x.double()
    expected = share**2 / precision / (1 - h * precision / 2)
    # After so many steps less than e-30 of the start is left.
    assert ((x.var(0) / expected - 1).abs() < 5 * VARIANCE_ERROR).all()
    assert ((x.mean(0) - energy.mean).abs() < 5 * (expected / N).sqrt()).all()
    assert abs((x[:, 0] * x[:, 1]).mean() - x[:, 0].mean() * x[:, 1].mean()) < 5 * math.sqrt(
        expected.prod() / N
    )


@pytest.mark.parametrize("h", [0.5, 1.0, 2.0])
def test_mala_has_the_exact_variance_and_rate_of_acceptance(h):
    energy = GaussianEnergy(torch.zeros(1))
    start = counter_normal(8, 8, (N, 1), stream=5)  # the stationary law
    out = run("mala", energy, start, 20, step_size=h)
    assert abs(out.x.double().var() - 1) < 5 * VARIANCE_ERROR
    rate = 1 - 2 / math.pi * math.atan((h / 2) ** 1.5)
    # A chain's decisions may depend on each other; chains do not, and no rate varies by more.
    per_chain = out.accepted.double() / 20
    assert abs(per_chain.mean() - rate) < 5 * per_chain.std() / math.sqrt(N)


def test_baoab_has_exact_positions_and_the_known_velocities():
    stiffness, h = 2.0, 1.2
    energy = GaussianEnergy(torch.zeros(1), stiffness)
    out = run("baoab", energy, torch.zeros(N, 1), 60, step_size=h, friction=1.5, temperature=0.5)
    # (1 + exp(-1.8))/2 is the largest factor of a step: after 60 less than e-30 is left.
    assert abs(out.x.double().var() * stiffness / 0.5 - 1) < 5 * VARIANCE_ERROR
    assert abs(out.v.double().var() / (0.5 * (1 - stiffness * h**2 / 4)) - 1) < 5 * VARIANCE_ERROR


@methods
def test_all_eight_modes_keep_their_weight(method):
    # Half-normal noise, or noise that chains share, ends in one mode.
    energy = GaussianMixtureEnergy.ring()
    x = energy.sample(N, torch.Generator().manual_seed(3))
    x = run(method, energy, x, 200, step_size=0.05).x
    mode = torch.cdist(x, energy.means).argmin(1)
    assert stats.chisquare(mode.bincount(minlength=8).numpy()).pvalue > 1e-6


# --- what is not finite ---------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("start", [nan, inf, 1e30])
@pytest.mark.parametrize("name", ["ring", "gaussian", "wells"])
def test_a_chain_that_starts_where_nothing_is_finite_is_counted(method, start, name):
    energy = ENERGIES[name]
    x = starts(energy)
    x[10] = start
    out = run(method, energy, x, 3)
    alone = run(method, energy, starts(energy), 3)
    assert out.n_nonfinite_start == 1
    assert alone.n_nonfinite_start == 0
    others = torch.arange(300) != 10
    assert out.x[others].equal(alone.x[others])


def test_a_step_beyond_stability_is_counted_and_not_hidden():
    energy = DoubleWellEnergy(5.0, dim=2)
    x = 3 * torch.ones(4, 2)
    for method in ("ula", "baoab"):
        out = run(method, energy, x, 50, step_size=2.0)
        assert out.n_nonfinite_start == 0
        assert out.n_nonfinite > 100
        assert not out.x.isfinite().any(0)[0]
    out = run("mala", energy, 1e9 * x, 50, step_size=2.0)
    assert out.n_nonfinite == 200
    assert out.x.equal(1e9 * x)
    assert out.accepted.eq(0).all()


def test_far_from_all_modes_the_mixture_still_pulls():
    energy = ENERGIES["ring"]
    x = torch.tensor([[1e4, 0.0], [0.0, -3e5]])
    moved = run("ula", energy, x, 1, step_size=0.05, noise_scale=0.0).x
    expected = x.double() - 0.05 * GaussianMixtureEnergy.ring().double().grad(x.double())
    torch.testing.assert_close(moved.double(), expected, rtol=1e-6, atol=0)


# --- who may come ---------------------------------------------------------------------------------


@methods
def test_only_what_the_loop_knows_is_supported(method, monkeypatch):
    class Other(DoubleWellEnergy):
        pass

    x = torch.zeros(4, 3)
    ring = GaussianMixtureEnergy.ring()
    full = GaussianEnergy(torch.zeros(3), torch.eye(3))
    rbm = RBMEnergy(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2))
    for name in ("space", "gaussian", "wells"):
        assert fused.supports(ENERGIES[name], x, method)
        assert not fused.supports(ENERGIES[name], x.double(), method)
        assert not fused.supports(ENERGIES[name], x.to("meta"), method)
        assert not fused.supports(ENERGIES[name], x[:, None], method)
        assert not fused.supports(ENERGIES[name], x, "hmc")
        monkeypatch.setattr(fused, "HAS_NUMBA", False)
        assert not fused.supports(ENERGIES[name], x, method)
        monkeypatch.undo()
    for energy in (ring, full, rbm, Other(2.0, dim=3), lambda x: x.sum(1)):
        assert not fused.supports(energy, x, method)


def test_more_steps_or_chains_than_counters_are_refused():
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"`step` counts up to 4294967296"):
        run("ula", ENERGIES["well"], x, 2, first_step=2**32 - 1)
    with pytest.raises(ValueError, match=r"`first_chain` counts up to 4294967296"):
        run("ula", ENERGIES["well"], x, 1, first_chain=2**32 - 1)
