"""Langevin, MALA and BAOAB against the laws that are known in closed form.

Statistical tolerances are five standard errors of the true estimator at a fixed seed: a correct
build fails one such check with probability 6e-7.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from cln_tutorial.energy_models import samplers
from cln_tutorial.energy_models._checks import HAS_NUMBA
from cln_tutorial.energy_models.energies import (
    DoubleWellEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
)
from cln_tutorial.energy_models.samplers import (
    effective_temperature,
    langevin_sample,
    mala_sample,
    underdamped_langevin_sample,
)
from cln_tutorial.energy_models.steps import (
    Preconditioner,
    langevin_step,
    mala_log_ratio,
    mala_step,
)

N = 50_000
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="needs the extra fast")
BACKENDS = ["reference", pytest.param("numba", marks=needs_numba)]
inf, nan = math.inf, math.nan


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(samplers, "_warned", set())


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def gaussian(*precisions):
    return GaussianEnergy(torch.zeros(len(precisions)), torch.tensor(precisions))


def quadratic(x):
    return x.flatten(1).square().sum(1) / 2


def quartic(x):
    """No closed form, no symmetry, and scaled exactly by powers of two."""
    x = x.flatten(1)
    return (x**4 / 4 - x**2 / 2 + x / 4).sum(1)


def assert_variance(x, expected):
    """Of a Gaussian with the mean 0: the standard error of the variance is v sqrt(2 / n)."""
    x = x.double().flatten(1)
    error = 5 * expected * math.sqrt(2 / len(x))
    assert x.square().mean(0).tolist() == pytest.approx([expected] * x.shape[1], abs=error)


# --- F1: the bias of unadjusted Langevin ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h", [0.1, 0.5, 1.0, 1.5, 1.9])
def test_the_stationary_variance_of_langevin_is_that_of_the_closed_form(h, backend):
    steps = 80  # (1 - h)^(2 steps) is 5e-8 at the slowest
    x = langevin_sample(gaussian(1.0), torch.zeros(N, 1), h, steps, seed=1, backend=backend)
    assert_variance(x, 1 / (1 - h / 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
def test_another_noise_scales_the_variance_by_its_effective_temperature(factor, backend):
    h = 0.5
    scale = factor * math.sqrt(2 * h)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = langevin_sample(gaussian(1.0), torch.zeros(N, 1), h, 40, scale, seed=2, backend=backend)
    temperature = effective_temperature(h, scale)
    assert temperature == pytest.approx(factor**2, rel=1e-14)
    assert_variance(x, temperature / (1 - h / 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 7, 50])
def test_mean_and_variance_after_n_steps_are_those_of_the_closed_form(n, backend):
    h, precision, temperature = 0.1, 0.5, 3.0
    energy = gaussian(precision)
    x = langevin_sample(
        energy, torch.full((N, 1), 2.0), h, n, temperature=temperature, seed=3, backend=backend
    )
    shrink = 1 - h * precision
    stationary = temperature / precision / (1 - h * precision / 2)
    variance = stationary * (1 - shrink ** (2 * n))
    mean = 2 * shrink**n
    assert x.double().mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / N))
    assert_variance(x - mean, variance)


def test_states_k_steps_apart_correlate_as_the_power_of_one_step():
    h = 0.3
    x0 = normal(N, 1) / math.sqrt(1 - h / 2)
    out = langevin_sample(gaussian(1.0), x0, h, 6, seed=4, return_trajectory=True)
    chain = torch.cat([x0[None], out.trajectory]).squeeze(-1).double()
    for k in (1, 2, 6):
        expected = (1 - h) ** k
        found = np.corrcoef(chain[0], chain[k])[0, 1]
        assert found == pytest.approx(expected, abs=5 * (1 - expected**2) / math.sqrt(N))


def test_each_direction_of_a_gaussian_has_the_bias_of_its_own_precision():
    rotation = torch.linalg.qr(normal(3, 3, dtype=torch.float64)).Q
    precisions = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    matrix = rotation @ precisions.diag() @ rotation.mT
    h = 0.5
    energy = GaussianEnergy(torch.zeros(3), matrix.float())
    x = langevin_sample(energy, torch.zeros(N, 3), h, 40, seed=5).double() @ rotation
    for i, precision in enumerate(precisions.tolist()):
        assert_variance(x[:, i : i + 1], 1 / (precision * (1 - h * precision / 2)))


def test_preconditioned_by_the_covariance_all_directions_have_one_bias():
    covariance = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    energy = GaussianEnergy(torch.zeros(2), covariance.inverse())
    h = 0.5
    root = torch.linalg.cholesky(covariance)
    x = langevin_sample(energy, torch.zeros(N, 2), h, 30, preconditioner=covariance, seed=6)
    white = torch.linalg.solve_triangular(root, x.mT, upper=False).mT
    assert_variance(white, 1 / (1 - h / 2))
    assert abs((white[:, 0] * white[:, 1]).mean()) < 5 / (1 - h / 2) / math.sqrt(N)
    # A diagonal one, whose matrix is the same.
    energy = gaussian(0.5, 4.0)
    diagonal = torch.tensor([2.0, 0.25])
    a, b = (
        langevin_sample(energy, torch.zeros(N, 2), h, 30, preconditioner=p, seed=6)
        for p in (diagonal, diagonal.diag())
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert_variance(a / diagonal.sqrt(), 1 / (1 - h / 2))


# --- F2, F3: the temperature ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_size", "noise_scale", "expected"),
    [(10, 0.005, 1.25e-6), (100, 0.005, 1.25e-7), (500, 0.005, 2.5e-8), (1, 0.01, 5e-5)],
)
def test_the_temperatures_of_public_code(step_size, noise_scale, expected):
    assert effective_temperature(step_size, noise_scale) == pytest.approx(expected, rel=1e-12)
    h, s = torch.tensor([float(step_size)]), torch.tensor([noise_scale])
    assert effective_temperature(h, s).item() == pytest.approx(expected, rel=1e-6)


def test_a_literal_run_of_the_paper_diverges_on_the_mixture_and_a_clip_makes_it_jitter():
    ring = GaussianMixtureEnergy.ring()
    x0 = ring.sample(500, generator=seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for backend in ("reference", "auto"):
            with pytest.raises(RuntimeError, match=r"not finite \d+ times, within"):
                langevin_sample(ring, x0, 10.0, 200, 0.005, seed=0, backend=backend)
        x = langevin_sample(ring, x0, 10.0, 400, 0.005, grad_clip=0.01, seed=0)
    distance = torch.cdist(x, ring.means).amin(1)
    assert distance.max() < 0.3  # overshoots by h times the clip are .1 per coordinate
    before, after = (torch.cdist(y, ring.means).argmin(1) for y in (x0, x))
    assert before.equal(after)


def test_at_the_papers_temperature_a_stable_chain_freezes_in_its_mode():
    ring = GaussianMixtureEnergy.ring()
    h, scale = 0.1, 5e-4
    x0 = ring.means.repeat(N // 16, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = langevin_sample(ring, x0, h, 60, scale, seed=1)
    # A mean itself, up to the pull of the others, which is of order exp(-18).
    variance = effective_temperature(h, scale) * 0.25 / (1 - h / 0.5)
    assert variance == pytest.approx(3.9e-7, rel=2e-3)
    assert_variance(x.double() - x0.double(), variance)


def test_the_warning_names_the_temperature_once_for_each_value():
    x0 = torch.zeros(2, 1)
    with pytest.warns(UserWarning, match=r"effective_temperature.* = 1\.25e-06, not 1"):
        langevin_sample(quadratic, x0, 10, 0, 0.005)
    langevin_sample(quadratic, x0, 10, 0, 0.005)  # a second warning would be an error here
    with pytest.warns(UserWarning, match=r"= 1\.25e-07, not 1"):
        langevin_sample(quadratic, x0, 100, 0, 0.005)
    with pytest.warns(UserWarning, match=r"= 0\.5, not 1"):
        langevin_sample(quadratic, x0, torch.tensor([0.5, 1.0]), 0, 1.0)
    for close in (1.0, 1.004, 0.996):  # the square is within one per cent
        langevin_sample(quadratic, x0, 0.5, 0, close)
    with pytest.warns(UserWarning, match="= 1.02, not 1"):
        langevin_sample(quadratic, x0, 0.5, 0, 1.01)


def test_no_noise_is_gradient_descent():
    with pytest.warns(UserWarning, match="exp"):
        x = langevin_sample(quadratic, torch.ones(1, 2), 0.25, 3, 0, seed=0)
    assert x.tolist() == [[0.75**3] * 2]


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("sampler", [langevin_sample, mala_sample])
def test_a_temperature_is_the_energy_over_it_with_a_longer_step_bit_for_bit(sampler, temperature):
    x0, h = normal(50, 2, 3), 0.05
    warm = sampler(quartic, x0, h, 20, temperature=temperature, seed=1)
    scaled = sampler(lambda x: quartic(x) / temperature, x0, h * temperature, 20, seed=1)
    assert warm.equal(scaled)
    assert not warm.equal(sampler(quartic, x0, h, 20, seed=1))


def test_noise_and_temperature_may_differ_from_chain_to_chain():
    t = torch.tensor([0.5, 1.0, 3.0]).repeat_interleave(N)
    h = torch.tensor([0.2, 0.5, 1.0]).repeat_interleave(N)
    energy = gaussian(1.0)
    for backend in ("reference", "auto"):
        x0 = torch.zeros(3 * N, 1)
        x = langevin_sample(energy, x0, h, 40, temperature=t, seed=7, backend=backend)
        y = mala_sample(energy, x0, h, 40, temperature=t, seed=7, backend=backend)
        z = underdamped_langevin_sample(energy, x0, h, 60, temperature=t, seed=7, backend=backend)
        for i in range(3):
            part = slice(i * N, (i + 1) * N)
            temperature, step = t[part][0].item(), h[part][0].item()
            assert_variance(x[part], temperature / (1 - step / 2))
            assert_variance(y[part], temperature)
            assert_variance(z[part], temperature)


# --- F4: MALA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h", [0.1, 0.5, 1.0, 2.0, 3.0])
def test_mala_accepts_at_the_rate_of_the_closed_form_and_keeps_the_variance(h, backend):
    # The error of a rate over steps is at most that of one step.
    out = mala_sample(gaussian(1.0), normal(N, 1), h, 12, seed=8, return_info=True, backend=backend)
    rate = 1 - 2 / math.pi * math.atan((h / 2) ** 1.5)
    found = out.info.accept_rate.double().mean().item()
    assert found == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / N))
    assert_variance(out.x, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mala_forgets_where_it_started(backend):
    for h, steps in ((0.5, 40), (1.0, 40), (1.5, 80)):
        x = mala_sample(gaussian(1.0), torch.full((N, 1), 0.5), h, steps, seed=9, backend=backend)
        assert_variance(x, 1.0)


@pytest.mark.parametrize("d", [1, 8, 64])
def test_the_log_ratio_on_a_gaussian_is_the_difference_of_squares(d):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        x, noise = normal(200, d, seed=1, dtype=dtype), normal(200, d, seed=2, dtype=dtype)
        for h, t in ((0.01, 1.0), (0.7, 1.0), (1.5, 3.0)):
            y = langevin_step(x, x, noise, h, math.sqrt(2 * h * t))
            found = mala_log_ratio(x, quadratic(x), x, y, quadratic(y), y, h, t)
            expected = -h / (4 * t) * (y.square().sum(1) - x.square().sum(1))
            # The energies, of order d, are rounded.
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * d / t)


def test_the_log_ratio_is_that_of_the_densities_of_target_and_proposal():
    root = torch.eye(3, dtype=torch.float64) + 0.3 * normal(3, 3, dtype=torch.float64)
    matrix, h = root @ root.mT, 0.3
    t = torch.linspace(0.5, 3, 40, dtype=torch.float64)
    x, noise = (normal(40, 3, seed=s, dtype=torch.float64) for s in (1, 2))
    for p in (None, matrix, matrix.diagonal().clone()):
        chosen = None if p is None else Preconditioner.of(p)
        full = torch.eye(3, dtype=torch.float64) if p is None else p.diag() if p.ndim == 1 else p

        def gradient(x):
            return x**3 - x + 0.25

        y = x - h * gradient(x) @ full + (2 * h * t).sqrt()[:, None] * noise

        def log_q(to, x, full=full):
            law = torch.distributions.MultivariateNormal(
                x - h * gradient(x) @ full, 2 * h * t[:, None, None] * full
            )
            return law.log_prob(to)

        expected = (quartic(x) - quartic(y)) / t + log_q(x, y) - log_q(y, x)
        found = mala_log_ratio(x, quartic(x), gradient(x), y, quartic(y), gradient(y), h, t, chosen)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_step_of_mala_proposes_with_the_root_of_the_matrix_and_takes_all_or_nothing():
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    x, noise = normal(50, 2), normal(50, 2, seed=1)
    e, u, p = quadratic(x), torch.linspace(0.01, 0.99, 50), Preconditioner.of(matrix)
    y = x - 0.8 * x @ matrix + math.sqrt(1.6) * noise @ torch.linalg.cholesky(matrix).mT
    new, new_e, new_g, accepted = mala_step(quadratic, x, e, x, noise, u, 0.8, 1.0, p)
    assert 5 < accepted.sum() < 45
    torch.testing.assert_close(new[accepted], y[accepted])
    assert new[~accepted].equal(x[~accepted])
    torch.testing.assert_close(new_e, quadratic(new))
    torch.testing.assert_close(new_g, new)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mala_samples_a_mixture_exactly(backend):
    # Two modes near enough to hop: weights by chi^2, coordinates by Kolmogorov and Smirnov.
    means = torch.tensor([[-1.2, 0.5], [1.2, -0.5]])
    weights, sigma = torch.tensor([0.3, 0.7]), 0.7
    energy = GaussianMixtureEnergy(means, sigma, weights)
    n, steps = 20_000, 120
    x = mala_sample(energy, torch.zeros(n, 2), 0.4, steps, seed=10, backend=backend)

    def cdf(values, coordinate):
        parts = stats.norm.cdf((values[:, None] - means[:, coordinate].numpy()) / sigma)
        return parts @ weights.double().numpy()

    for coordinate in (0, 1):
        values = x[:, coordinate].double().numpy()
        assert stats.kstest(values, lambda v, c=coordinate: cdf(v, c)).pvalue > 1e-6
    left = cdf(np.zeros(1), 0)[0]
    counts = [(x[:, 0] < 0).sum().item(), (x[:, 0] >= 0).sum().item()]
    assert stats.chisquare(counts, [n * left, n * (1 - left)]).pvalue > 1e-6


@pytest.mark.parametrize("shape", ["matrix", "diagonal"])
def test_mala_has_the_same_law_with_any_preconditioner(shape):
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    energy = GaussianEnergy(torch.zeros(2), covariance.inverse())
    p = torch.tensor([[1.5, -0.4], [-0.4, 0.5]]) if shape == "matrix" else torch.tensor([0.7, 1.6])
    x0 = torch.zeros(N, 2)
    out = mala_sample(energy, x0, 0.5, 80, preconditioner=p, seed=11, return_info=True)
    assert 0.5 < out.info.accept_rate.mean() < 0.97
    found = out.x.double().mT @ out.x.double() / N
    spread = (covariance.diagonal().outer(covariance.diagonal()) + covariance**2).sqrt()
    assert ((found - covariance).abs() < 5 * spread / math.sqrt(N)).all()


def test_each_chain_has_its_own_noise_and_its_own_decision():
    out = mala_sample(gaussian(1.0), torch.full((1000, 1), 1.0), 2.0, 1, seed=0, return_info=True)
    taken = out.info.accept_rate
    assert taken.unique().tolist() == [0.0, 1.0]
    moved = out.x[taken == 1]
    assert moved.unique().numel() == moved.numel() > 300
    # Among equal proposals only the uniform number of a chain decides.
    state = torch.ones(1000, 1)
    same = torch.full((1000, 1), 2.5)
    u = torch.linspace(1e-3, 1 - 1e-3, 1000)
    *_, accepted = mala_step(quadratic, state, quadratic(state), state, same, u, 1.0)
    ratio = -(1 / 4) * ((2.5 * math.sqrt(2)) ** 2 - 1)
    assert accepted.equal(u.log() < ratio)
    assert 0 < accepted.sum() < 1000


def test_mala_rejects_what_is_not_finite_and_counts_it():
    def exponential(x):  # of rate 1 on x > 0
        return torch.where(x > 0, x, inf).sum(1)

    n = 20_000
    out = mala_sample(exponential, torch.ones(n, 1), 0.3, 150, seed=12, return_info=True)
    assert (out.x > 0).all()
    assert stats.kstest(out.x[:, 0].double().numpy(), stats.expon.cdf).pvalue > 1e-6
    assert out.info.n_nonfinite > n
    for bad in (nan, -inf, inf):
        out = mala_sample(
            lambda x, bad=bad: torch.where(x < 0.5, x * x, bad).sum(1),
            torch.zeros(500, 1),
            0.5,
            20,
            seed=0,
            return_info=True,
        )
        assert (out.x < 0.5).all()
        assert out.info.n_nonfinite > 0
        assert out.info.accept_rate.max() > 0


def test_mala_refuses_a_start_without_a_density():
    with pytest.raises(RuntimeError, match="not finite 2 times, where the chains start"):
        mala_sample(lambda x: torch.where(x > 0, x, inf).sum(1), -torch.ones(2, 1), 0.3, 5)


# --- the warm-up of MALA -------------------------------------------------------------------------


@pytest.mark.parametrize(("guess", "per_chain"), [(0.01, False), (30.0, False), (30.0, True)])
def test_the_warm_up_finds_the_step_whose_rate_is_the_target(guess, per_chain):
    # On N(0, 1): h = 2 tan(pi (1 - rate) / 2)^(2/3), here 1.
    rate = 1 - 2 / math.pi * math.atan(0.5**1.5)
    guess = torch.full((300,), guess) if per_chain else guess
    adapted = mala_sample(
        gaussian(1.0),
        normal(300, 1),
        guess,
        100,
        n_adapt=800 if per_chain else 300,
        target_accept=rate,
        seed=1,
        return_info=True,
    )
    step = adapted.info.step_size
    if per_chain:
        assert step.shape == (300,)
        step = step.mean().item()
    # The noise of the averages, over 300 steps or 300 chains, is a few per cent.
    assert step == pytest.approx(1.0, rel=0.1)
    assert adapted.info.accept_rate.mean().item() == pytest.approx(rate, abs=0.02)


def test_after_the_warm_up_the_step_stays():
    x0, energy = normal(200, 3), quartic
    whole = mala_sample(energy, x0, 0.3, 20, n_adapt=30, seed=5, return_info=True)
    warm = mala_sample(energy, x0, 0.3, 0, n_adapt=30, seed=5, return_info=True)
    h = warm.info.step_size
    rest = mala_sample(energy, warm.x, h, 20, seed=5, first_step=30)
    assert whole.info.step_size == h != 0.3
    assert whole.x.equal(rest)
    assert (warm.info.n_grad, whole.info.n_grad) == (31, 51)
    assert warm.x.ne(x0).any()


def test_the_target_is_574_unless_another_is_given():
    a, b = (
        mala_sample(quadratic, normal(50, 20), 0.3, 0, n_adapt=20, target_accept=t, seed=1)
        for t in (None, 0.574)
    )
    assert a.equal(b)


# --- F5: BAOAB -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h", [0.5, 1.0, 1.5, 1.9])
def test_baoab_has_exact_positions_on_the_harmonic_well(h, backend):
    k, temperature = 4.0, 3.0
    h = h / math.sqrt(k)
    for friction in (1.0, 5.0):
        out = underdamped_langevin_sample(
            gaussian(k),
            torch.zeros(N, 1),
            h,
            150,
            friction,
            temperature=temperature,
            seed=13,
            return_info=True,
            backend=backend,
        )
        assert_variance(out.x, temperature / k)
        assert_variance(out.info.velocity, temperature * (1 - k * h**2 / 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 7])
def test_baoab_after_n_steps_has_the_covariance_of_its_five_linear_maps(n, backend):
    k, h, friction, temperature = 1.5, 0.6, 0.8, 2.0
    b = np.array([[1, 0], [-h / 2 * k, 1]])
    a = np.array([[1, h / 2], [0, 1]])
    o = np.diag([1, math.exp(-friction * h)])
    noise = np.diag([0, temperature * (1 - math.exp(-2 * friction * h))])
    mean, covariance = np.array([1.0, 0.0]), np.diag([0, temperature])
    for _ in range(n):
        mean = b @ a @ o @ a @ b @ mean
        covariance = o @ a @ b @ covariance @ (o @ a @ b).T + noise
        covariance = b @ a @ covariance @ (b @ a).T
    out = underdamped_langevin_sample(
        gaussian(k),
        torch.ones(N, 1),
        h,
        n,
        friction,
        temperature=temperature,
        seed=14,
        return_info=True,
        backend=backend,
    )
    z = torch.cat([out.x, out.info.velocity], 1).double().numpy()
    diagonal = np.diag(covariance)
    assert (abs(z.mean(0) - mean) < 5 * np.sqrt(diagonal / N)).all()
    spread = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / N)
    assert (abs((z - mean).T @ (z - mean) / N - covariance) < 5 * spread).all()


def test_without_friction_baoab_can_be_run_backwards():
    x0, v0 = (normal(20, 3, seed=s, dtype=torch.float64) for s in (1, 2))
    there = underdamped_langevin_sample(quartic, x0, 0.1, 50, 0.0, v0=v0, return_info=True, seed=0)
    assert (there.x - x0).abs().max() > 0.5
    back = underdamped_langevin_sample(
        quartic, there.x, 0.1, 50, 0, v0=-there.info.velocity, return_info=True, seed=1
    )
    torch.testing.assert_close(back.x, x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(back.info.velocity, -v0, rtol=0, atol=1e-11)


def test_the_first_velocities_have_the_temperature():
    t = torch.tensor([0.5, 4.0]).repeat_interleave(N)
    for temperature, expected in ((t, (0.5, 4.0)), (2.0, (2.0, 2.0))):
        out = underdamped_langevin_sample(
            quadratic, torch.zeros(2 * N, 1), 0.1, 0, temperature=temperature, seed=3,
            return_info=True,
        )  # fmt: skip
        for part, value in zip(out.info.velocity.chunk(2), expected, strict=True):
            assert_variance(part, value)


# --- F6: escape over a barrier -------------------------------------------------------------------


@needs_numba
def test_the_time_over_the_barrier_is_that_of_the_quadrature():
    energy, h, n, steps = DoubleWellEnergy(5.0), 0.0025, 10_000, 800
    x, waited, segment = torch.full((n, 1), -1.0), 0.0, 0
    while len(x):
        out = langevin_sample(energy, x, h, steps, seed=segment, return_trajectory=True)
        across = out.trajectory.squeeze(-1) >= 1
        crossed = across.any(0)
        waited += (across[:, crossed].int().argmax(0) + 1).sum().item()
        waited += steps * (~crossed).sum().item()
        x, segment = out.x[~crossed], segment + 1
    found = waited * h / n
    # The standard error is 36.5 / sqrt(n) = .37; the bias of the step is some -1 %.
    assert found == pytest.approx(36.48, rel=0.04)
    assert energy.mean_first_passage_time() == pytest.approx(36.48, abs=0.01)
