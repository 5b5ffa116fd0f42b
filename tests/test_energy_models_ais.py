"""Annealed importance sampling against partition functions that are known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from cln_tutorial.energy_models.ais import ais_log_partition, ais_schedule
from cln_tutorial.energy_models.boltzmann import RBMEnergy
from cln_tutorial.energy_models.energies import (
    DoubleWellEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    GridEnergy2D,
)

EXACT = torch.float64


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=6612, dtype=EXACT):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def machine(n_visible, n_hidden):
    return RBMEnergy(normals(n_visible, n_hidden), normals(n_visible), normals(n_hidden))


def uniform_bits(n_visible, n_hidden):
    return RBMEnergy(torch.zeros(n_visible, n_hidden, dtype=EXACT))


def wide(dim, variance=9.0, dtype=torch.float32):
    return GaussianEnergy(torch.zeros(dim, dtype=dtype), 1 / variance)


# --- the estimate ---------------------------------------------------------------------------------


def test_an_energy_that_is_the_base_has_weights_without_variance():
    energy = wide(3)
    out = ais_log_partition(
        energy, energy, 50, 20, step_size=0.5, reverse_from=energy.sample(9, seeded()), seed=1
    )
    assert out.log_w.std() == 0
    assert out.stderr == 0
    assert out.ess == pytest.approx(50)
    for found in (out.log_z, out.lower, out.upper, out.reverse_log_z):
        assert found == pytest.approx(energy.log_z(), abs=1e-12)
    bits = machine(5, 3)
    same = ais_log_partition(bits, bits, 50, 20, kernel="gibbs", seed=1)
    # (1 - beta) a + beta a is a up to one rounding.
    assert same.log_w.std() < 1e-13
    assert same.log_z == pytest.approx(bits.log_z(), abs=1e-12)


def test_a_constant_on_top_of_the_base_is_found_without_error():
    base = wide(2, dtype=EXACT)
    out = ais_log_partition(lambda x: base(x) + 3.5, base, 20, 7, step_size=0.5, seed=1)
    assert out.log_z == pytest.approx(base.log_z() - 3.5, abs=1e-12)
    assert out.stderr < 1e-12


def test_with_two_temperatures_it_is_importance_sampling_from_the_base():
    # One weight, at exact samples of the base, before any move.
    energy, base = GaussianEnergy(torch.ones(2, dtype=EXACT), 2.0), wide(2, 4.0, EXACT)
    out = ais_log_partition(energy, base, 4000, 2, step_size=0.1, seed=1)
    # log w = log Z_0 - E + E_0 with x = 2 xi: mean and variance of the quadratic form.
    mean = base.log_z() - 2 * 0.5 * (2.0 * (4 + 1) - 0.25 * 4)
    # E - E_0 = 3.5 xi^2 - 4 xi + 1 in each coordinate: variance 2 * 3.5^2 + 16.
    error = math.sqrt(2 * (2 * 3.5**2 + 16) / 4000)
    assert out.lower == pytest.approx(mean, abs=5 * error)
    assert out.log_w.var().item() == pytest.approx(2 * (2 * 3.5**2 + 16), rel=0.3)


def test_the_mean_weight_of_a_machine_is_its_partition_function():
    # 200 replications of few chains and few temperatures, where the logarithm is far too low.
    rbm, base = machine(8, 6), uniform_bits(8, 6)
    exact = rbm.log_z()
    ratios = torch.tensor(
        [
            math.exp(ais_log_partition(rbm, base, 20, 10, kernel="gibbs", seed=seed).log_z - exact)
            for seed in range(200)
        ]
    )
    z = (ratios.mean() - 1) / (ratios.std() / math.sqrt(200))
    assert abs(z) < 5
    # What tells the mean of the weights from the mean of their logarithms:
    assert ratios.std() / math.sqrt(200) < 0.02


def test_the_mean_weight_of_real_points_is_the_partition_function():
    energy, base = GaussianEnergy(torch.full((2,), 1.5), 4.0), wide(2)
    out = ais_log_partition(energy, base, 40_000, 6, step_size=0.2, seed=1)
    ratios = (out.log_w - energy.log_z()).exp()
    error = ratios.std() / 200
    assert error < 0.02
    assert abs(ratios.mean() - 1) < 5 * error
    assert out.lower < energy.log_z() - 0.3


def test_the_bounds_enclose_the_answer_in_19_of_20_runs():
    rbm, base = machine(8, 6), uniform_bits(8, 6)
    exact, inside = rbm.log_z(), 0
    for seed in range(60):
        samples = rbm.sample(100, seeded(seed))
        out = ais_log_partition(rbm, base, 100, 10, kernel="gibbs", reverse_from=samples, seed=seed)
        inside += out.lower <= exact <= out.upper
    assert inside >= 57


def test_lower_bounds_of_a_machine_rise_like_those_of_the_specification():
    # 16 x 12: some 1, .1 and .01 nat on either side for 10, 100, 1000 temperatures.
    rbm, base = machine(16, 12), uniform_bits(16, 12)
    exact = rbm.log_z()
    samples = rbm.sample(200, seeded())
    for n_temps, gap in [(10, 0.85), (100, 0.085), (1000, 0.0106)]:
        out = ais_log_partition(
            rbm, base, 200, n_temps, kernel="gibbs", reverse_from=samples, seed=1
        )
        noise = out.log_w.std().item() / math.sqrt(200)
        assert exact - out.lower == pytest.approx(gap, abs=0.3 * gap + 5 * noise)
        noise = out.reverse_log_w.std().item() / math.sqrt(200)
        assert out.upper - exact == pytest.approx(gap, abs=0.3 * gap + 5 * noise)
        assert out.log_z == pytest.approx(exact, abs=5 * out.stderr)
        assert out.log_z >= out.lower
    assert out.log_z == pytest.approx(exact, abs=0.08)


@pytest.mark.parametrize(
    ("energy", "variance"),
    [
        (GaussianMixtureEnergy.ring(), 9.0),
        (DoubleWellEnergy(5.0, dim=2), 1.0),
        (GaussianEnergy(torch.ones(3), torch.tensor([1.0, 4.0, 9.0])), 2.0),
        (GridEnergy2D(GaussianMixtureEnergy.ring(3, 2.0), -6.0, 6.0, 128), 9.0),
    ],
    ids=["ring", "double well", "stiff Gaussian", "grid"],
)
def test_models_of_the_test_bed_are_found_within_8_hundredths_of_a_nat(energy, variance):
    base = wide(energy.dim, variance)
    betas, step_size = ais_schedule(energy, base, 200, step_size=0.05, seed=1)
    out = ais_log_partition(
        energy,
        base,
        1000,
        betas,
        step_size=step_size,
        reverse_from=energy.sample(300, seeded()),
        seed=1,
    )
    assert out.valid
    assert out.stderr < 0.016  # so that 5 of them are the goal
    assert out.log_z == pytest.approx(energy.log_z(), abs=0.08)
    assert out.reverse_log_z == pytest.approx(energy.log_z(), abs=0.1)
    assert out.lower < energy.log_z() + 0.02
    assert out.upper > energy.log_z() - 0.02


def test_unadjusted_steps_have_the_bias_of_the_closed_form_and_say_so():
    # Many temperatures: the chain sits at the stationary law of ULA on each bridge, of variance
    # 1 / (l (1 - h l / 2)). Integrated: -(d/2) log of (1 - h l0 / 2) / (1 - h l1 / 2).
    dim, first, last, h = 4, 1.0, 4.0, 0.1
    base = GaussianEnergy(torch.zeros(dim), first)
    energy = GaussianEnergy(torch.zeros(dim), last)
    bias = -dim / 2 * math.log((1 - h * first / 2) / (1 - h * last / 2))
    found = {
        kernel: ais_log_partition(energy, base, 8000, 400, kernel=kernel, step_size=h, seed=1)
        for kernel in ("ula", "mala")
    }
    assert found["mala"].valid
    assert not found["ula"].valid
    assert found["mala"].log_z == pytest.approx(energy.log_z(), abs=5 * found["mala"].stderr)
    # The finite number of temperatures leaves .01 (halved with twice as many).
    assert found["ula"].log_z - energy.log_z() == pytest.approx(bias, abs=0.02)
    assert bias < -0.2


def test_weights_make_samples_of_the_energy_of_the_last_points():
    # A mixture whose modes have masses 1 : 4, from few temperatures, so that weights matter.
    means = torch.tensor([[-3.0], [3.0]])
    energy = GaussianMixtureEnergy(means, 0.5, torch.tensor([1.0, 4.0]))
    keywords = {"step_size": 0.1, "seed": 3}
    out = ais_log_partition(energy, wide(1, 16.0), 20_000, 8, **keywords)
    right = (out.x[:, 0] > 0).to(EXACT)
    w = (out.log_w - out.log_w.max()).exp()
    share = (w * right).sum() / w.sum()
    error = ((w * (right - 0.8)).square().sum().sqrt() / w.sum()).item()
    assert share.item() == pytest.approx(0.8, abs=5 * error)
    assert abs(right.mean() - 0.8) > 10 * error  # without the weights it is something else
    drawn = ais_log_partition(energy, wide(1, 16.0), 20_000, 8, resample=True, **keywords)
    # Systematic draws spread no more than independent ones, sqrt(.16 / n).
    found = (drawn.x > 0).to(EXACT).mean().item()
    assert found == pytest.approx(share.item(), abs=5 * 0.4 / math.sqrt(20_000))
    assert drawn.log_w.equal(out.log_w)


def test_log_z_stderr_and_ess_are_those_of_the_weights():
    energy = GaussianEnergy(torch.ones(2), 2.0)
    out = ais_log_partition(energy, wide(2), 300, 10, step_size=0.1, seed=1)
    w = out.log_w.exp()
    assert out.log_z == pytest.approx(w.mean().log().item())
    assert out.stderr == pytest.approx((w.std() / w.mean() / math.sqrt(300)).item())
    assert out.ess == pytest.approx((w.sum() ** 2 / (w**2).sum()).item())
    assert out.lower == pytest.approx(out.log_w.mean().item())
    assert math.isnan(out.upper)
    assert math.isnan(out.reverse_log_z)
    assert out.reverse_log_w is None


def test_energies_of_ten_thousand_do_not_overflow():
    base = wide(2)
    for constant in (-1e4, 1e4):
        out = ais_log_partition(
            lambda x, c=constant: base(x) + c, base, 10, 5, step_size=0.5, seed=1
        )
        assert out.log_z == pytest.approx(base.log_z() - constant, rel=1e-6)
        assert out.ess == pytest.approx(10, abs=0.01)


def test_points_of_infinite_energy_have_no_weight():
    # The upper half plane: half of the mass, whatever the temperatures.
    base = wide(2, 1.0, EXACT)

    def half(x):
        return torch.where(x[:, 1] > 0, base(x), math.inf)

    out = ais_log_partition(half, base, 4000, 3, step_size=0.5, seed=1)
    assert out.log_z == pytest.approx(base.log_z() - math.log(2), abs=5 / math.sqrt(4000))
    assert out.log_w.isneginf().sum() == round(4000 - out.ess)


def test_an_energy_that_is_not_a_number_is_an_error():
    with pytest.raises(RuntimeError, match="an energy is NaN"):
        ais_log_partition(lambda x: x[:, 0].log(), wide(2), 10, 5, step_size=0.5, seed=1)


# --- kernels, steps and schedules -----------------------------------------------------------------


def test_one_step_size_is_the_same_as_one_for_each_temperature_and_the_first_is_not_used():
    energy, base = GaussianEnergy(torch.ones(2), 2.0), wide(2)
    one = ais_log_partition(energy, base, 20, 6, step_size=0.1, seed=1)
    steps = torch.tensor([9.9, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=EXACT)
    many = ais_log_partition(energy, base, 20, one.betas, step_size=steps, seed=1)
    assert many.x.equal(one.x)
    assert many.log_w.equal(one.log_w)
    assert one.accept.shape == (5,)
    other = ais_log_partition(energy, base, 20, 6, step_size=0.2, seed=1)
    assert not other.x.equal(one.x)


def test_no_two_steps_chains_or_passes_share_their_noise():
    calls = []

    def energy(x):
        calls.append(x.clone())
        return x.square().sum(1)

    keywords = {"step_size": 1e-10, "n_steps_per_temp": 2, "kernel": "ula", "seed": 1}
    start = normals(8, 2)
    out = ais_log_partition(energy, wide(2, dtype=EXACT), 8, 4, reverse_from=start, **keywords)
    assert len(calls) == 2 * (1 + 3 * 2)  # one evaluation a step, none for a new temperature
    assert out.x.equal(calls[6])
    moves = torch.cat([b - a for part in (calls[:7], calls[7:]) for a, b in pairwise(part)])
    # The same noise of 1.4e-5 would leave the difference of two drifts, below 4e-9.
    assert len(moves) == 12 * 8
    assert torch.pdist(moves).min() > 1e-8


def test_same_seed_same_result_and_the_global_generator_is_left_alone():
    energy, base = GaussianEnergy(torch.ones(2), 2.0), wide(2)
    state = torch.get_rng_state()

    def run(**keywords):
        return ais_log_partition(energy, base, 20, 5, step_size=0.1, **keywords).log_w

    assert run(seed=1).equal(run(seed=1))
    assert not run(seed=1).equal(run(seed=2))
    assert run(generator=seeded(1)).equal(run(generator=seeded(1)))
    assert torch.get_rng_state().equal(state)


def test_a_reverse_pass_changes_nothing_of_the_forward_one():
    energy, base = GaussianEnergy(torch.zeros(2), 2.0), wide(2)
    samples = energy.sample(9, seeded())
    before = samples.clone()
    one = ais_log_partition(energy, base, 50, 5, step_size=0.2, seed=1)
    both = ais_log_partition(energy, base, 50, 5, step_size=0.2, reverse_from=samples, seed=1)
    assert both.log_w.equal(one.log_w)
    assert both.x.equal(one.x)
    assert both.reverse_log_w.shape == (9,)
    assert samples.equal(before)


def test_the_pilot_reaches_the_wanted_acceptance_and_spreads_the_temperatures():
    energy, base = GaussianMixtureEnergy.ring(), wide(2)
    betas, step_size = ais_schedule(energy, base, 100, step_size=0.5, seed=1)
    assert (betas[0], betas[-1]) == (0, 1)
    assert (betas.diff() > 0).all()
    assert betas.shape == step_size.shape == (100,)
    assert (betas.dtype, step_size.dtype) == (EXACT, EXACT)
    tuned = ais_log_partition(energy, base, 500, betas, step_size=step_size, seed=2)
    # 10 moves of 256 chains a rung leave the step within a factor of 1.3.
    assert (tuned.accept[20:] - 0.574).abs().max() < 0.15
    stiff = GaussianEnergy(torch.ones(2), 400.0)
    betas, step_size = ais_schedule(stiff, base, 100, step_size=0.5, seed=1)
    tuned = ais_log_partition(stiff, base, 500, betas, step_size=step_size, seed=2)
    even = ais_log_partition(stiff, base, 500, 100, step_size=0.003, seed=2)
    assert tuned.ess > 10 * even.ess


def test_the_pilot_draws_from_another_key_than_the_run():
    # With shared starting points the choice of the temperatures would know the first weights.
    starts = []

    class Base(GaussianEnergy):
        def sample(self, n, generator=None):
            starts.append(super().sample(n, generator))
            return starts[-1]

    base, energy = Base(torch.zeros(1)), GaussianEnergy(torch.zeros(1), 2.0)
    ais_schedule(energy, base, 5, step_size=0.1, n_chains=50, seed=7)
    ais_log_partition(energy, base, 50, 5, step_size=0.1, seed=7)
    assert not starts[0].equal(starts[1])


def test_an_energy_that_is_infinite_nearly_everywhere_stops_the_pilot():
    def quarter(x):
        return torch.where((x > 0).all(1), x.square().sum(1), math.inf)

    with pytest.raises(RuntimeError, match="the path came to a stop at beta = 0"):
        ais_schedule(quarter, wide(2), 10, step_size=0.1, seed=1)
    with pytest.raises(RuntimeError, match="NaN"):
        ais_schedule(lambda x: x[:, 0].log(), wide(2), 10, step_size=0.1, seed=1)


# --- networks, dtypes, shapes ---------------------------------------------------------------------


class Network(nn.Module):
    """A network on top of a harmonic well, as the experiment trains it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x):
        return 4 * self.net(x) + x.square().sum(1, keepdim=True) / 2


def test_a_network_is_found_as_its_table_says_and_is_left_as_it_was():
    net = Network()
    net.net[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    table = GridEnergy2D(net, -7.0, 7.0, 300)
    out = ais_log_partition(
        net, wide(2, 2.0), 2000, 60, step_size=0.2, reverse_from=table.sample(500), seed=1
    )
    assert out.log_z == pytest.approx(table.log_z(), abs=5 * out.stderr)
    assert out.stderr < 0.016
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert not out.x.requires_grad
    assert not out.log_w.requires_grad


def test_an_error_inside_leaves_the_parameters_as_they_were():
    net = Network()
    flags = [p.requires_grad for p in net.parameters()]

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            raise KeyError("broken")

    with pytest.raises(KeyError):
        ais_log_partition(Broken(), wide(2), 5, 5, step_size=0.1, seed=1)
    assert [p.requires_grad for p in net.parameters()] == flags


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, EXACT])
def test_chains_run_in_the_dtype_of_the_base_and_half_types_in_float32(dtype):
    base = wide(2).to(dtype)
    energy = GaussianEnergy(torch.ones(2), 2.0)
    out = ais_log_partition(energy, base, 500, 30, step_size=0.2, seed=1)
    assert out.x.dtype == (EXACT if dtype == EXACT else torch.float32)
    assert out.log_w.dtype == EXACT
    # Base and its log Z are rounded alike; its samples are rounded in a half type.
    assert out.log_z == pytest.approx(energy.log_z(), abs=5 * out.stderr + 0.01)


def test_one_chain_and_events_of_two_axes():
    class Images:
        flat = GaussianEnergy(torch.zeros(6))

        def __call__(self, x):
            return self.flat(x.flatten(1))

        def log_z(self):
            return self.flat.log_z()

        def sample(self, n, generator=None):
            return self.flat.sample(n, generator).view(n, 2, 3)

    def energy(x):
        return x.square().flatten(1).sum(1)

    out = ais_log_partition(energy, Images(), 400, 20, step_size=0.2, seed=1)
    assert out.x.shape == (400, 2, 3)
    assert out.log_z == pytest.approx(3 * math.log(math.pi), abs=5 * out.stderr)
    one = ais_log_partition(energy, Images(), 1, 3, step_size=0.2, seed=1)
    assert one.log_z == pytest.approx(one.lower)
    assert math.isnan(one.stderr)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"betas": 1}, "`betas` must be at least 2"),
        ({"betas": torch.tensor([0.0, 0.5])}, r"`betas` must .* increase from 0 to 1; got"),
        ({"betas": torch.tensor([0.1, 1.0])}, "increase from 0 to 1"),
        ({"betas": torch.tensor([0.0, 0.5, 0.5, 1.0])}, "increase from 0 to 1"),
        ({"betas": torch.tensor([0.0, 0.7, 0.2, 1.0])}, "increase from 0 to 1"),
        ({"betas": torch.tensor([0.0, math.nan, 1.0])}, "increase from 0 to 1"),
        ({"betas": torch.tensor([0, 1])}, "increase from 0 to 1"),
        ({"betas": torch.linspace(1, 0, 20)}, r"increase from 0 to 1; got \(20,\)"),
        ({"kernel": "hmc"}, r"`kernel` must be one of .*; got 'hmc'"),
        ({"kernel": "gibbs"}, "needs two RBMEnergy of the same shape"),
        ({"step_size": None}, "the kernel 'mala' needs a `step_size`"),
        ({"step_size": 0.0}, "`step_size` must be finite and above 0"),
        ({"step_size": torch.tensor([0.1, 0.0, 0.1])}, "`step_size` must be finite and above 0"),
        ({"step_size": torch.ones(2)}, r"one for each temperature, \(3,\); got \(2,\)"),
        ({"n_chains": 0}, "`n_chains` must be at least 1"),
        ({"n_steps_per_temp": 0}, "`n_steps_per_temp` must be at least 1"),
        ({"reverse_from": torch.ones(3)}, "`reverse_from` must be points"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(keywords, message):
    given = {"n_chains": 4, "betas": 3, "step_size": 0.1} | keywords
    with pytest.raises(ValueError, match=message):
        ais_log_partition(wide(2), wide(2), **given)


def test_machines_need_their_own_kernel_and_no_step():
    rbm, base = machine(4, 3), uniform_bits(4, 3)
    with pytest.raises(ValueError, match="the kernel must be 'gibbs', not 'mala'"):
        ais_log_partition(rbm, base, 4, 3, step_size=0.1)
    with pytest.raises(ValueError, match="`step_size` has no meaning"):
        ais_log_partition(rbm, base, 4, 3, kernel="gibbs", step_size=0.1)
    with pytest.raises(ValueError, match="of the same shape"):
        ais_log_partition(rbm, uniform_bits(4, 2), 4, 3, kernel="gibbs")


def test_what_is_no_energy_and_no_base_is_refused(unchecked):
    with pytest.raises(TypeError, match="`energy` must be callable"):
        ais_log_partition(3, wide(2), 4, 3, step_size=0.1)
    with pytest.raises(TypeError, match=r"`base` must be an energy with `log_z\(\)`"):
        ais_log_partition(wide(2), lambda x: x, 4, 3, step_size=0.1)
    with pytest.raises(TypeError, match="`n_chains` must be a whole number"):
        ais_log_partition(wide(2), wide(2), 4.0, 3, step_size=0.1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"n_temps": 1}, "`n_temps` must be at least 2"),
        ({"n_chains": 1}, "`n_chains` must be at least 2"),
        ({"step_size": -0.1}, "`step_size` must be finite and above 0"),
        ({"n_steps_per_rung": 0}, "`n_steps_per_rung` must be at least 1"),
        ({"target_accept": 1.0}, "`target_accept` must lie between 0 and 1"),
    ],
)
def test_a_pilot_that_cannot_be_run_is_refused_by_name(keywords, message):
    given = {"n_temps": 4, "step_size": 0.1} | keywords
    with pytest.raises(ValueError, match=message):
        ais_schedule(wide(2), wide(2), **given)
