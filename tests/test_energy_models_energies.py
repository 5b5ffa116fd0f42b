"""Energies with known answers: each answer against another way to it."""

import math
from itertools import product

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import nn

from cln_tutorial.energy_models.boltzmann import RBMEnergy
from cln_tutorial.energy_models.energies import (
    DoubleWellEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    GridEnergy2D,
)

EXACT = torch.float64
# A correct build falls below with this probability; seeds are fixed.
FALSE_ALARM = 1e-6


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=6612, dtype=EXACT):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def precision_matrix():
    a = normals(3, 3, seed=1)
    return a @ a.T + torch.eye(3, dtype=EXACT)


def uneven_mixture():
    """Three modes of unequal height and width, two of which overlap."""
    means = torch.tensor([[0.0, 0.0], [2.0, 1.0], [-3.0, 2.0]], dtype=EXACT)
    sigma = torch.tensor([0.5, 1.0, 0.7], dtype=EXACT)
    return GaussianMixtureEnergy(means, sigma, torch.tensor([1.0, 0.5, 3.0], dtype=EXACT))


def machine(n_visible, n_hidden, dtype=EXACT):
    weights = normals(n_visible, n_hidden, seed=2)
    biases = normals(n_visible, seed=3), normals(n_hidden, seed=4)
    return RBMEnergy(*(p.to(dtype) for p in (weights, *biases)))


ENERGIES = {
    "isotropic Gaussian": lambda: GaussianEnergy(normals(2), 4.0),
    "diagonal Gaussian": lambda: GaussianEnergy(
        normals(3), torch.tensor([0.5, 2.0, 9.0], dtype=EXACT)
    ),
    "full Gaussian": lambda: GaussianEnergy(normals(3), precision_matrix()),
    "ring": lambda: GaussianMixtureEnergy.ring().double(),
    "uneven mixture": uneven_mixture,
    "double well": lambda: DoubleWellEnergy(5.0, dim=3).double(),
    "Boltzmann machine": lambda: machine(5, 3),
    "grid of a closed form": lambda: GridEnergy2D(uneven_mixture(), -9.0, 9.0, 64, dtype=EXACT),
    "grid of a network": lambda: GridEnergy2D(network(), -3.0, 3.0, 16, dtype=EXACT),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)).double()


@pytest.fixture(params=ENERGIES.values(), ids=ENERGIES.keys())
def energy(request):
    return request.param()


# --- energies and gradients -----------------------------------------------------------------------


def test_the_closed_gradient_is_that_of_autograd_and_of_differences(energy):
    x = normals(7, energy.dim).requires_grad_()
    (expected,) = torch.autograd.grad(energy(x).sum(), x)
    gradient = energy.grad(x.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    # Central differences: h^2 of the third derivative and 1e-16 E / h leave 1e-8 of these energies.
    h = 1e-5
    for i in range(energy.dim):
        step = torch.zeros(energy.dim, dtype=EXACT)
        step[i] = h
        slope = (energy(x.detach() + step) - energy(x.detach() - step)) / (2 * h)
        torch.testing.assert_close(slope, gradient[:, i], rtol=1e-6, atol=1e-6)


def test_energies_have_a_second_derivative_and_take_vmap_and_grad(energy):
    x = normals(4, energy.dim)

    def one(point):
        return energy(point.unsqueeze(0)).squeeze(0)

    gradients = torch.func.vmap(torch.func.grad(one))(x)
    torch.testing.assert_close(gradients, energy.grad(x), rtol=1e-12, atol=1e-12)
    hessians = torch.func.vmap(torch.func.jacrev(torch.func.grad(one)))(x)
    h = 1e-5
    for i in range(energy.dim):
        step = torch.zeros(energy.dim, dtype=EXACT)
        step[i] = h
        slope = (energy.grad(x + step) - energy.grad(x - step)) / (2 * h)
        torch.testing.assert_close(slope, hessians[..., i], rtol=1e-6, atol=1e-6)


def test_forward_is_energy_and_any_leading_axes_are_a_batch(energy):
    x = normals(6, energy.dim)
    assert energy(x).equal(energy.energy(x))
    if not isinstance(energy, GridEnergy2D):  # whose energy is somebody's, of (n, 2) only
        assert energy(x.view(2, 3, -1)).equal(energy(x).view(2, 3))
        assert energy.grad(x.view(2, 3, -1)).equal(energy.grad(x).view(2, 3, -1))
    assert energy(x[:0]).shape == (0,)
    assert energy.grad(x[:0]).shape == (0, energy.dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_points_and_half_types_are_float32_inside(energy, dtype):
    energy = energy.float()
    x = normals(9, energy.dim).to(dtype)
    values, gradient = energy(x), energy.grad(x)
    assert (values.dtype, gradient.dtype) == (dtype, dtype)
    # All that half types may lose is the rounding of the result.
    assert values.equal(energy(x.float()).to(dtype))
    assert gradient.equal(energy.grad(x.float()).to(dtype))
    torch.testing.assert_close(values, energy.double()(x.double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, EXACT])
def test_energies_of_ten_thousand_are_finite_and_so_are_their_gradients(dtype):
    x = torch.tensor([[74.0, 0.0], [0.0, -74.0]], dtype=dtype)
    ring = GaussianMixtureEnergy.ring().double()
    # 70 from the nearest mode: 70^2 / (2 sigma^2). All exponentials are 0 in any dtype.
    torch.testing.assert_close(ring(x), torch.full((2,), 9800.0, dtype=dtype))
    slopes = torch.tensor([[280.0, 0.0], [0.0, -280.0]], dtype=dtype)
    torch.testing.assert_close(ring.grad(x), slopes, atol=1e-3, rtol=1e-4)
    rbm = RBMEnergy(torch.full((2, 1), 5000.0, dtype=EXACT))
    torch.testing.assert_close(rbm(torch.ones(1, 2, dtype=dtype)), x.new_tensor([-10000.0]))
    assert rbm.log_z() == pytest.approx(10000.0)
    well = DoubleWellEnergy(5.0)
    torch.testing.assert_close(
        well(x.new_tensor([[0.0], [6.75]])), x.new_tensor([5.0, 9926.0]), atol=1.0, rtol=1e-3
    )


def test_ten_thousand_dimensions_are_no_trouble():
    energy = GaussianEnergy(torch.zeros(10_000), 2.0)
    x = energy.sample(3, seeded())
    assert energy.log_z() == pytest.approx(5000 * math.log(math.pi))
    # Twice the energy is a chi-square of 10,000 degrees: 10,000 +- 5 * sqrt(20,000).
    assert ((2 * energy(x) - 10_000).abs() < 5 * 142).all()


@pytest.mark.parametrize("name", ["full Gaussian", "Boltzmann machine"])
def test_autocast_does_not_round_the_products(name):
    energy = ENERGIES[name]().float()
    x = normals(9, energy.dim, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, gradient = energy(x), energy.grad(x)
    assert values.equal(energy(x))
    assert gradient.equal(energy.grad(x))


COMPILED = """
import torch
from cln_tutorial.energy_models.boltzmann import RBMEnergy
from cln_tutorial.energy_models.energies import *

for energy in [
    GaussianEnergy(torch.zeros(2), torch.eye(2)), GaussianMixtureEnergy.ring(),
    DoubleWellEnergy(5.0, dim=2), RBMEnergy(torch.ones(2, 3)),
]:
    x = torch.randn(4, 2)
    compiled = torch.compile(energy.energy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), energy(x))
    compiled = torch.compile(energy.grad, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), energy.grad(x))
print("done")
"""


def test_energies_and_gradients_compile_in_one_graph(child_output):
    assert child_output(COMPILED) == "done\n"


def test_a_state_dict_carries_what_makes_the_energy():
    one, other = uneven_mixture(), GaussianMixtureEnergy(torch.zeros(3, 2, dtype=EXACT))
    other.load_state_dict(one.state_dict())
    x = normals(4, 2)
    assert other(x).equal(one(x))


def test_what_made_an_energy_may_change_afterwards():
    mean, precision = torch.zeros(2), torch.ones(2)
    energy = GaussianEnergy(mean, precision)
    mean += 1
    precision += 1
    assert energy(torch.ones(1, 2)).item() == 1.0


# --- partition functions --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3])
@pytest.mark.parametrize("name", ["isotropic Gaussian", "diagonal Gaussian", "full Gaussian"])
def test_a_gaussian_at_any_temperature_has_the_density_of_scipy(name, temperature):
    energy = ENERGIES[name]()
    precision = energy.precision
    precision = torch.diag(precision) if precision.ndim == 1 else precision
    law = scipy.stats.multivariate_normal(energy.mean, temperature * torch.linalg.inv(precision))
    x = normals(5, energy.dim)
    density = -energy(x) / temperature - energy.log_z(temperature)
    np.testing.assert_allclose(density, law.logpdf(x), rtol=1e-12)


def test_a_mixture_has_the_density_that_its_modes_add_up_to():
    energy, x = uneven_mixture(), normals(6, 2)
    parts = [
        float(share)
        * scipy.stats.multivariate_normal(mean.numpy(), float(s) ** 2 * np.eye(2)).pdf(x.numpy())
        for share, mean, s in zip(energy.mode_probs(), energy.means, energy.sigma, strict=True)
    ]
    density = (-energy(x) - energy.log_z()).exp()
    np.testing.assert_allclose(density, sum(parts), rtol=1e-12)


def test_the_ring_has_the_partition_function_of_the_specification():
    ring = GaussianMixtureEnergy.ring(n_modes=8, radius=4.0, sigma=0.5)
    assert ring.log_z() == pytest.approx(math.log(8 * 2 * math.pi * 0.25), abs=1e-12)
    assert ring.log_z() == pytest.approx(2.53102, abs=5e-6)
    assert ring.means[0].tolist() == [4.0, 0.0]
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((8,), 4.0))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_mixture_away_from_temperature_one_is_integrated(temperature):
    # In one dimension against the adaptive rule of scipy, whose own bound is 1e-10 here.
    means = torch.tensor([[-2.0], [1.0]], dtype=EXACT)
    energy = GaussianMixtureEnergy(means, torch.tensor([0.5, 1.0], dtype=EXACT))

    def density(x):
        return math.exp(-energy(torch.tensor([[x]], dtype=EXACT)).item() / temperature)

    exact, _ = scipy.integrate.quad(density, -20, 20, points=[-2, 1], epsabs=1e-11, limit=200)
    assert energy.log_z(temperature) == pytest.approx(math.log(exact), abs=1e-9)
    # In two, against a grid four times finer in another box.
    plane = uneven_mixture()
    grid = GridEnergy2D(plane, (-16.0, -14.0), (15.0, 17.0), 900, dtype=EXACT)
    assert plane.log_z(temperature) == pytest.approx(grid.log_z(temperature), abs=1e-8)


def test_a_mixture_in_three_dimensions_has_no_answer_but_at_temperature_one():
    energy = GaussianMixtureEnergy(torch.zeros(1, 3), 2.0)
    assert energy.log_z() == pytest.approx(1.5 * math.log(2 * math.pi * 4))
    with pytest.raises(ValueError, match=r"`temperature` 2.0 needs a grid .* in 3 dimensions"):
        energy.log_z(2.0)
    with pytest.raises(ValueError, match="needs a grid"):
        GaussianMixtureEnergy.ring().log_z(1e-6)


@pytest.mark.parametrize("barrier", [0.1, 1, 5.0, 100.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_double_well_has_the_integral_of_scipy(barrier, temperature):
    # exp(-100 * 4 / .5) is 0 beyond 3 in each case but the flattest, which ends before 9.
    exact, error = scipy.integrate.quad(
        lambda x: math.exp(-barrier / temperature * (x * x - 1) ** 2),
        0,
        9,
        points=[1],
        epsabs=0,
        epsrel=1e-11,
    )
    assert error < 1e-8 * exact
    energy = DoubleWellEnergy(barrier, dim=3)
    rest = math.log(2 * math.pi * temperature)
    assert energy.log_z(temperature) == pytest.approx(math.log(2 * exact) + rest, abs=1e-8)


def test_a_barrier_of_ten_thousand_temperatures_leaves_two_gaussian_wells():
    # E'' = 8b at the bottoms: Z -> 2 sqrt(2 pi / 8b); the next term is of order 1 / b.
    energy = DoubleWellEnergy(10_000.0)
    assert energy.log_z() == pytest.approx(math.log(2 * math.sqrt(math.pi / 40_000)), abs=1e-4)


# --- samples --------------------------------------------------------------------------------------


def test_samples_repeat_by_their_generator_and_leave_the_global_one(energy):
    state = torch.get_rng_state()
    one, two = energy.sample(5, seeded(1)), energy.sample(5, seeded(1))
    assert one.equal(two)
    assert not one.equal(energy.sample(5, seeded(2)))
    assert torch.get_rng_state().equal(state)
    assert (one.shape, one.dtype) == ((5, energy.dim), EXACT)
    assert energy.sample(0, seeded()).shape == (0, energy.dim)
    assert energy.bfloat16().sample(2, seeded()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["isotropic Gaussian", "diagonal Gaussian", "full Gaussian"])
def test_gaussian_samples_have_mean_and_covariance(name):
    energy, n = ENERGIES[name](), 100_000
    x = energy.sample(n, seeded())
    precision = energy.precision
    precision = torch.diag(precision) if precision.ndim == 1 else precision
    # Whitened, every entry of the covariance has a standard error of at most sqrt(2 / n).
    white = (x - energy.mean) @ torch.linalg.cholesky(precision)
    assert (white.mean(0).abs() < 5 / math.sqrt(n)).all()
    assert ((white.T @ white / n - torch.eye(energy.dim)).abs() < 5 * math.sqrt(2 / n)).all()


def test_mixture_samples_fall_to_modes_by_height_and_width():
    # Modes 20 apart, so that every sample tells its mode. Masses are heights times sigma^2.
    means = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    energy = GaussianMixtureEnergy(means, torch.tensor([0.5, 1.0, 2.0]), torch.tensor([4.0, 2, 1]))
    torch.testing.assert_close(energy.mode_probs(), torch.tensor([1.0, 2.0, 4.0]) / 7)
    n = 70_000
    x = energy.sample(n, seeded())
    mode = torch.cdist(x, means).argmin(1)
    counts = torch.bincount(mode, minlength=3)
    expected = n * energy.mode_probs().double()
    expected = (expected * n / expected.sum()).numpy()
    assert scipy.stats.chisquare(counts.numpy(), expected).pvalue > FALSE_ALARM
    for k, sigma in enumerate([0.5, 1.0, 2.0]):
        part = x[mode == k] - means[k]
        error = sigma**2 * math.sqrt(2 / len(part))
        assert (part.var(0) - sigma**2).abs().max() < 5 * error


@pytest.mark.parametrize("barrier", [0.5, 5.0])
def test_double_well_samples_have_the_distribution_function_of_scipy(barrier):
    energy = DoubleWellEnergy(barrier, dim=2).double()
    x = energy.sample(20_000, seeded()).numpy()
    places = np.linspace(-4, 4, 200_001)
    density = np.exp(-barrier * (places**2 - 1) ** 2)
    cumulated = scipy.integrate.cumulative_trapezoid(density, places, initial=0)

    def distribution(at):
        return np.interp(at, places, cumulated / cumulated[-1])

    assert scipy.stats.kstest(x[:, 0], distribution).pvalue > FALSE_ALARM
    assert scipy.stats.kstest(x[:, 1], "norm").pvalue > FALSE_ALARM
    assert abs(np.corrcoef(x.T)[0, 1]) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (4, 4)])
def test_machine_samples_have_the_law_of_all_states(shape):
    rbm, n = machine(*shape), 50_000
    index = rbm.sample(n, seeded()).long() @ (2 ** torch.arange(shape[0]))
    probs = (-rbm(all_states(shape[0]))).softmax(0)
    counts = torch.bincount(index, minlength=len(probs))
    assert chi_square(counts, probs) > FALSE_ALARM


def all_states(n):
    """All rows of 0 and 1; the first unit is the lowest digit of the row's number."""
    return torch.tensor(list(product([0.0, 1.0], repeat=n)), dtype=EXACT).flip(1)


def chi_square(counts, probs):
    expected = counts.sum() * probs
    assert expected.min() > 5  # what the test needs
    return scipy.stats.chisquare(counts.numpy(), expected.numpy()).pvalue


# --- times over the barrier -----------------------------------------------------------------------


def test_the_passage_time_is_the_double_integral_of_scipy():
    energy = DoubleWellEnergy(2.0, dim=2)

    def integrand(z, y):
        return math.exp(2.0 * ((y * y - 1) ** 2 - (z * z - 1) ** 2))

    exact, error = scipy.integrate.dblquad(integrand, -0.5, 0.8, lambda y: -3.5, lambda y: y)
    assert error < 1e-6 * exact
    assert energy.mean_first_passage_time(-0.5, 0.8) == pytest.approx(exact, rel=1e-6)


def test_passage_times_are_those_of_the_specification():
    energy = DoubleWellEnergy(5.0)
    assert energy.mean_first_passage_time() == pytest.approx(36.48, abs=0.005)
    assert energy.kramers_time() == pytest.approx(32.97, abs=0.005)
    ratios = [
        DoubleWellEnergy(b).mean_first_passage_time() / DoubleWellEnergy(b).kramers_time()
        for b in (2.0, 3.0, 4.0, 5.0)
    ]
    assert ratios == pytest.approx([1.25, 1.19, 1.14, 1.11], abs=0.006)
    # The correction to Kramers falls like T / b.
    high = DoubleWellEnergy(300.0)
    assert high.mean_first_passage_time() / high.kramers_time() == pytest.approx(1, abs=0.003)


def test_temperature_rescales_barrier_and_time():
    # dx = -E' dt + sqrt(2T) dW is the walk of E / T at temperature 1, T times as fast.
    hot, scaled = DoubleWellEnergy(6.0), DoubleWellEnergy(2.0)
    for method in ("mean_first_passage_time", "kramers_time"):
        expected = getattr(scaled, method)() / 3.0
        assert getattr(hot, method)(temperature=3.0) == pytest.approx(expected, rel=1e-9)


def test_a_start_far_out_adds_the_way_down():
    energy = DoubleWellEnergy(5.0)
    # From -3 the well is reached in no time beside the 36 over the barrier.
    near, far = energy.mean_first_passage_time(), energy.mean_first_passage_time(start=-3.0)
    assert near < far < near + 0.3


# --- the machine ----------------------------------------------------------------------------------


def test_free_energy_sums_the_hidden_units_out():
    rbm, hidden = machine(4, 3), all_states(3)
    for v in all_states(4):
        joint = -(v @ rbm.visible_bias) - hidden @ rbm.hidden_bias - hidden @ (v @ rbm.weights)
        torch.testing.assert_close(rbm(v.unsqueeze(0))[0], -(-joint).logsumexp(0))


def test_both_sides_of_a_machine_add_up_to_one_partition_function():
    # 16 x 12 with more states than one chunk holds on neither side; 17 x 3 fills two chunks.
    for shape in [(16, 12), (17, 3), (3, 17), (1, 1)]:
        rbm = machine(*shape)
        visible, hidden = rbm.log_z(over="visible"), rbm.log_z(over="hidden")
        assert visible == pytest.approx(hidden, abs=1e-12 * max(1, abs(hidden)))
        assert rbm.log_z() in (visible, hidden)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_machine_at_another_temperature_is_that_of_its_free_energy(temperature):
    rbm = machine(5, 3)
    exact = (-rbm(all_states(5)) / temperature).logsumexp(0).item()
    assert rbm.log_z(temperature) == pytest.approx(exact, abs=1e-12)


def test_a_gibbs_step_has_the_transition_law_of_the_two_conditionals():
    rbm, n = machine(3, 2), 40_000
    visible, hidden = all_states(3), all_states(2)
    start = torch.tensor([1.0, 0.0, 1.0], dtype=EXACT)
    p_hidden = torch.sigmoid(rbm.hidden_bias + start @ rbm.weights)
    p_hidden = torch.where(hidden == 1, p_hidden, 1 - p_hidden).prod(1)
    p_visible = torch.sigmoid(rbm.visible_bias + hidden @ rbm.weights.T).unsqueeze(1)
    p_visible = torch.where(visible == 1, p_visible, 1 - p_visible).prod(-1)
    uniforms = torch.rand(n, 5, generator=seeded(), dtype=EXACT)
    moved = rbm.gibbs_step(start.expand(n, 3), uniforms[:, :2], uniforms[:, 2:])
    counts = torch.bincount(moved.long() @ torch.tensor([1, 2, 4]), minlength=8)
    assert chi_square(counts, p_hidden @ p_visible) > FALSE_ALARM
    assert rbm.float().gibbs_step(moved.half(), uniforms[:, :2], uniforms[:, 2:]).dtype == (
        torch.float16
    )


def test_more_than_24_units_are_refused_on_the_side_that_would_be_summed():
    wide = RBMEnergy(torch.zeros(30, 4))
    assert wide.log_z() == pytest.approx(34 * math.log(2))
    assert wide.sample(2, seeded()).shape == (2, 30)
    with pytest.raises(ValueError, match="at most 24 visible units; this machine has 30"):
        wide.log_z(over="visible")
    with pytest.raises(ValueError, match="at most 24 visible"):
        wide.log_z(2.0)


# --- grids ----------------------------------------------------------------------------------------


def test_the_midpoint_sum_of_a_smooth_density_is_exact_to_rounding_from_coarse_cells_on():
    exact = uneven_mixture()
    error = [
        abs(GridEnergy2D(exact, -9.0, 9.0, n, dtype=EXACT).log_z() - exact.log_z())
        for n in (20, 40, 80)
    ]
    # Cells of .9, .45 and .225 beside the narrowest width of .5: exp(-2 (pi sigma / cell)^2).
    assert error[0] > 1e-5
    assert error[1] < 1e-6
    assert error[2] < 1e-12


def test_the_midpoint_sum_over_a_border_is_of_second_order():
    # exp(-x - y) over the unit square, which does not vanish at its border.
    exact = 2 * math.log(1 - math.exp(-1))
    error = [
        GridEnergy2D(lambda x: x.sum(-1), 0.0, 1.0, n, dtype=EXACT).log_z() - exact for n in (8, 16)
    ]
    # log of (cell / 2) / sinh(cell / 2), once for each axis: -cell^2 / 24.
    assert error[0] == pytest.approx(-2 / 64 / 24, rel=1e-2)
    assert error[0] / error[1] == pytest.approx(4, rel=1e-2)


def test_a_grid_reads_its_axes_in_the_order_of_its_points():
    # Cells of another height and width, an energy of one axis only.
    grid = GridEnergy2D(lambda x: 3 * x[:, 0], (0.0, 10.0), (1.0, 14.0), 2, dtype=EXACT)
    assert grid.points().tolist() == [[0.25, 11.0], [0.25, 13.0], [0.75, 11.0], [0.75, 13.0]]
    assert grid.table.tolist() == [[0.75, 0.75], [2.25, 2.25]]
    low = math.exp(-0.75) / (math.exp(-0.75) + math.exp(-2.25)) / 2
    assert grid.probs().flatten().tolist() == pytest.approx([low, low, 0.5 - low, 0.5 - low])
    # Four cells of area 1, two of each energy.
    halved = math.log(2 * math.exp(-0.375) + 2 * math.exp(-1.125))
    assert grid.log_z(2.0) == pytest.approx(halved)
    n = 40_000
    x = grid.sample(n, seeded())
    cell = torch.stack([x[:, 0] // 0.5, (x[:, 1] - 10) // 2], 1).long() @ torch.tensor([2, 1])
    assert chi_square(torch.bincount(cell, minlength=4), grid.probs().flatten()) > FALSE_ALARM
    place = torch.stack([x[:, 0] % 0.5 / 0.5, x[:, 1] % 2 / 2]).numpy()
    for axis in place:
        assert scipy.stats.kstest(axis, "uniform").pvalue > FALSE_ALARM


def test_samples_of_a_grid_are_wider_by_a_twelfth_of_a_squared_cell():
    # N(0, 1/4) in cells of .5: variance .25 + .25 / 12, told from .25 by 18 standard errors.
    grid = GridEnergy2D(GaussianEnergy(torch.zeros(2), 4.0), -4.0, 4.0, 16)
    n = 100_000
    variance = grid.sample(n, seeded()).var(0)
    assert (variance - (0.25 + 0.25 / 12)).abs().max() < 5 * 0.27 * math.sqrt(2 / n)


def test_a_grid_leaves_the_parameters_of_its_network_as_they_were():
    net = network()
    net[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    grid = GridEnergy2D(net, -1.0, 1.0, 4, dtype=EXACT)
    assert not grid.table.requires_grad
    grid.grad(normals(3, 2))
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())


# --- bad input ------------------------------------------------------------------------------------


def test_points_of_another_width_or_of_whole_numbers_are_refused(energy, unchecked):
    with pytest.raises(ValueError, match=rf"points of {energy.dim} coordinates"):
        energy(normals(3, energy.dim + 1))
    with pytest.raises(ValueError, match="coordinates"):
        energy.grad(normals(energy.dim + 1))
    with pytest.raises(TypeError, match="`x` must be a tensor of floating"):
        energy(torch.ones(2, energy.dim, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_that_are_not_positive_are_refused(energy, temperature):
    with pytest.raises(ValueError, match="`temperature` must be finite and above 0"):
        energy.log_z(temperature)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianEnergy(torch.zeros(2, 2)), r"`mean` must be of shape \(dim,\)"),
        (lambda: GaussianEnergy(torch.zeros(2), torch.ones(3)), r"`precision` .* got \(3,\)"),
        (lambda: GaussianEnergy(torch.zeros(2), 0.0), "`precision` must be finite and above 0"),
        (
            lambda: GaussianEnergy(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
            "symmetric positive definite",
        ),
        (
            lambda: GaussianEnergy(torch.zeros(2), torch.tensor([[2.0, 1.0], [0.0, 2.0]])),
            "symmetric positive definite",
        ),
        (lambda: GaussianMixtureEnergy(torch.zeros(3)), r"`means` must be of shape \(k, dim\)"),
        (
            lambda: GaussianMixtureEnergy(torch.zeros(3, 2), torch.ones(2)),
            r"`sigma` must hold one number for each of the 3 modes",
        ),
        (lambda: GaussianMixtureEnergy(torch.zeros(3, 2), -1.0), "`sigma` must be finite"),
        (
            lambda: GaussianMixtureEnergy(torch.zeros(2, 2), 1.0, torch.tensor([1.0, 0.0])),
            "`weights` must be finite and above 0",
        ),
        (lambda: GaussianMixtureEnergy.ring(0), "`n_modes` must be at least 1"),
        (lambda: DoubleWellEnergy(0.0), "`barrier` must be finite and above 0"),
        (lambda: DoubleWellEnergy(1.0, dim=0), "`dim` must be at least 1"),
        (lambda: RBMEnergy(torch.zeros(3)), r"`weights` must be of shape \(n_visible, n_hidden\)"),
        (
            lambda: RBMEnergy(torch.zeros(3, 2), torch.zeros(2)),
            r"`visible_bias` must be of shape \(3,\); got \(2,\)",
        ),
        (
            lambda: RBMEnergy(torch.zeros(3, 2), None, torch.zeros(3)),
            r"`hidden_bias` must be of shape \(2,\)",
        ),
        (lambda: RBMEnergy(torch.zeros(1, 1)).log_z(over="both"), "`over` must be"),
        (lambda: RBMEnergy(torch.zeros(1, 1)).log_z(2.0, over="hidden"), "needs temperature 1"),
        (lambda: GridEnergy2D(uneven_mixture(), 1.0, (2.0, 1.0)), "`high` must be above `low`"),
        (lambda: GridEnergy2D(lambda x: x[:, 0] / 0 * 0, 0.0, 1.0), "`energy` is NaN"),
        (lambda: GaussianEnergy(torch.zeros(2)).sample(-1), "`n` must be at least 0"),
        (lambda: DoubleWellEnergy(5.0).mean_first_passage_time(1.0, -1.0), "`end` must be above"),
        (lambda: DoubleWellEnergy(5.0).mean_first_passage_time(end=9.0), "overflows"),
        (lambda: DoubleWellEnergy(800.0).kramers_time(), "overflows"),
    ],
)
def test_what_makes_no_energy_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_whole_numbers_make_no_energy(unchecked):
    whole = torch.ones(2, 2, dtype=torch.long)
    with pytest.raises(TypeError, match="`mean`"):
        GaussianEnergy(whole[0])
    with pytest.raises(TypeError, match="`precision`"):
        GaussianEnergy(torch.zeros(2), whole)
    with pytest.raises(TypeError, match="`means`"):
        GaussianMixtureEnergy(whole)
    with pytest.raises(TypeError, match="`weights`"):
        RBMEnergy(whole)
    with pytest.raises(TypeError, match="`energy` must be callable"):
        GridEnergy2D(3, -1.0, 1.0)
