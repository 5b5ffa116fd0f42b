"""Power-function averages after the fact: closed forms, quadrature, walks, files, ema-pytorch."""

import copy
import functools
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.integrate import quad
from torch import nn

from cln_tutorial.weight_averaging import PowerFunction, post_hoc, sigma_rel_to_gamma
from cln_tutorial.weight_averaging.post_hoc import (
    PowerFunctionAverage,
    profile_dot,
    profile_error,
    reconstruct,
    solve_coefficients,
)

STORED = (0.05, 0.10)


def profile(tau, t, gamma):
    return (gamma + 1) * tau**gamma / t ** (gamma + 1) if tau <= t else 0.0


def twenty_snapshots(t_last=1.0, number=20, widths=STORED):
    t = np.repeat(np.arange(1, number + 1) * t_last / number, len(widths))
    return t, np.tile([sigma_rel_to_gamma(width) for width in widths], number)


def solved(sigma_rel, normalize):
    t, gamma = twenty_snapshots()
    wanted = sigma_rel_to_gamma(sigma_rel)
    x, _ = solve_coefficients(t, gamma, 1.0, wanted, normalize)
    return x, profile_error(x, t, gamma, 1.0, wanted)


def run(values, every=50, dtype=torch.float64, widths=STORED, first=1, **options):
    """Snapshots of a weight that is `values[k - 1]` after step k."""
    return run_in_dtypes(values, [dtype], every, widths, first, **options)[dtype]


def run_in_dtypes(values, dtypes, every=50, widths=STORED, first=1, **options):
    weight, snapshots = torch.zeros_like(values[0]), {dtype: {} for dtype in dtypes}
    average = PowerFunctionAverage([("weight", weight)], widths, **options)
    for step, value in enumerate(values, 1):
        weight.copy_(value)
        average.update(step)
        if step % every == 0 and step >= first:
            for dtype, kept in snapshots.items():
                average.snapshot(kept, dtype=dtype)
    return snapshots


def walks(steps=1000, number=3, seed=0, mean=2.0):
    rng = torch.Generator().manual_seed(seed)
    xi = torch.randn(steps, number, generator=rng, dtype=torch.float64)
    return mean + xi.cumsum(0) / math.sqrt(steps)


@functools.cache
def five_hundred_walks():
    """The weights of 1,000 steps, and their 20 snapshots in three dtypes."""
    values = walks(number=500)
    return values, run_in_dtypes(values, [torch.float64, torch.float32, torch.float16])


@functools.cache
def ramp_of_a_thousand_steps():
    ramp = torch.arange(1, 1001, dtype=torch.float64)[:, None] / 1000
    return ramp, run(ramp)


def mean_of_ramp(gamma, updates):
    """Of a ramp from 0 to 1 that updates see at its multiples of 1/updates: Euler-Maclaurin, up to
    terms of (gamma/updates)^4."""
    return (gamma + 1) / (gamma + 2) + 1 / (2 * updates) - (gamma + 1) / (12 * updates**2)


def direct(values, sigma_rel, **options):
    """The average at a width by its weights, w_{n,k}: no snapshot, no recursion of a tensor."""
    weights = PowerFunction(sigma_rel=sigma_rel).weights(len(values), **options)[1:]
    return torch.tensordot(torch.tensor(weights), values.double(), dims=1)


# --- the closed forms -----------------------------------------------------------------------------


@given(
    st.floats(0.1, 10), st.floats(0, 60), st.floats(0.1, 10), st.floats(0, 60)
)  # quadrature of a polynomial-like peak: 1e-8 is what `quad` itself promises
def test_the_product_of_two_profiles_is_its_integral(t_a, gamma_a, t_b, gamma_b):
    end = min(t_a, t_b)
    value, _ = quad(
        lambda tau: profile(tau, t_a, gamma_a) * profile(tau, t_b, gamma_b),
        0,
        end,
        points=[end * (1 - 4 / (5 + gamma_a + gamma_b))],  # where the peak begins
        limit=200,
    )
    assert profile_dot(t_a, gamma_a, t_b, gamma_b) == pytest.approx(value, rel=1e-8, abs=1e-12)


def test_the_product_is_symmetric_broadcasts_and_does_not_overflow():
    t, gamma = np.array([1.0, 3.0, 1e7]), np.array([0.0, 17.0, 5000.0])
    A = profile_dot(t[:, None], gamma[:, None], t, gamma)
    assert A.shape == (3, 3)
    assert A.dtype == np.float64
    assert np.isfinite(A).all()  # (1e7)^5000 would not be
    np.testing.assert_allclose(A, A.T, rtol=1e-15)
    assert profile_dot(2, 0, 4, 0) == 0.25


def test_the_weights_of_the_stored_averages_sum_to_one_and_have_the_width_of_their_name():
    for width in STORED:
        weights = PowerFunction(sigma_rel=width).weights(4000)
        steps = np.arange(4001)
        mean = weights @ steps
        deviation = math.sqrt(weights @ (steps - mean) ** 2) / 4000
        assert weights.sum() == pytest.approx(1, abs=1e-12)  # 4,000 roundings of 2e-16
        assert deviation == pytest.approx(width, rel=1e-5)  # steps in place of time: 1/(24 T^2 s^2)


@pytest.mark.parametrize(
    ("sigma_rel", "error"),
    [(0.075, 2.3e-3), (0.04, 6.8e-3), (0.20, 1.5e-2), (0.25, 5.9e-2)],  # the specification's
)
def test_twenty_snapshots_make_other_widths_with_this_profile_error(sigma_rel, error):
    assert solved(sigma_rel, normalize=False)[1] == pytest.approx(error, rel=0.03)  # two digits


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.2, 0.2886])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_profile_error_is_the_integral_of_the_squared_difference(sigma_rel, normalize):
    t, gamma = twenty_snapshots()
    x, error = solved(sigma_rel, normalize)
    wanted = sigma_rel_to_gamma(sigma_rel)

    def squared(tau):
        made = sum(a * profile(tau, *each) for a, *each in zip(x, t, gamma, strict=True))
        return (made - profile(tau, 1.0, wanted)) ** 2

    edges = [0.0, *sorted(set(t.tolist()))]
    pieces = [quad(squared, a + 1e-12, b)[0] for a, b in itertools.pairwise(edges)]
    norm = quad(lambda tau: profile(tau, 1.0, wanted) ** 2, 0, 1)[0]
    # The form under the root has an error of 1e-16 times sum|x| squared; relative to 5e-6 at least.
    assert error == pytest.approx(math.sqrt(sum(pieces) / norm), rel=1e-6)


@pytest.mark.parametrize(("sigma_rel", "total"), [(0.20, 0.99818), (0.25, 0.98654), (0.28, 0.955)])
def test_plain_least_squares_does_not_sum_to_one_and_the_normalised_one_does(sigma_rel, total):
    assert solved(sigma_rel, normalize=False)[0].sum() == pytest.approx(total, abs=5e-4)
    # 40 coefficients of order one, solved with a condition number of 1e4.
    assert solved(sigma_rel, normalize=True)[0].sum() == pytest.approx(1, abs=1e-12)


def test_the_constraint_costs_almost_nothing_in_profile_error():
    plain, normalised = (solved(0.25, normalize)[1] for normalize in (False, True))
    assert plain == pytest.approx(5.89e-2, rel=2e-3)
    assert normalised == pytest.approx(6.03e-2, rel=2e-3)


@pytest.mark.parametrize(
    ("sigma_rel", "size"), [(0.075, 1.4), (0.25, 2.2), (0.04, 3.5), (0.03, 8.7)]
)
def test_the_size_of_the_coefficients_says_what_rounding_of_snapshots_costs(sigma_rel, size):
    assert np.abs(solved(sigma_rel, normalize=False)[0]).sum() == pytest.approx(size, abs=0.06)


@pytest.mark.parametrize("t_last", [1.0, 4000.0, 1e7])
def test_the_condition_number_is_fourteen_thousand_in_every_unit_of_time(t_last):
    t, gamma = twenty_snapshots(t_last)
    _, condition = solve_coefficients(t, gamma, t_last, 3.0)
    assert condition == pytest.approx(14163, rel=1e-3)  # the specification: 1.4e4


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("place", [-1, -2, 20])
def test_a_width_that_is_stored_needs_that_snapshot_alone(normalize, place):
    t, gamma = twenty_snapshots()
    x, _ = solve_coefficients(t, gamma, t[place], gamma[place], normalize)
    unit = np.zeros(40)
    unit[place] = 1
    # Condition number 1.4e4 times 1e-16; in float32 it would be 1e-3.
    np.testing.assert_allclose(x, unit, atol=1e-12)


def test_solving_in_float32_would_be_a_hundred_thousand_times_worse():
    t, gamma = twenty_snapshots()
    A = profile_dot(t[:, None], gamma[:, None], t, gamma).astype(np.float32)
    coarse = np.linalg.solve(A, A[:, -1].copy() * np.float32(1 + 2**-23))
    exact, _ = solve_coefficients(t, gamma, t[-1], gamma[-1])
    unit = np.eye(40)[-1]
    assert np.abs(coarse - unit).max() > 1e5 * np.abs(exact - unit).max()


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.25])
def test_no_other_coefficients_come_closer(sigma_rel):
    t, gamma = twenty_snapshots()
    wanted = sigma_rel_to_gamma(sigma_rel)
    A, b = profile_dot(t[:, None], gamma[:, None], t, gamma), profile_dot(t, gamma, 1.0, wanted)
    slope = A @ solve_coefficients(t, gamma, 1.0, wanted, normalize=False)[0] - b
    # Rounding of sums of A's entries, at most 9.2, times coefficients whose sizes sum to 8.7.
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    slope = A @ solve_coefficients(t, gamma, 1.0, wanted, normalize=True)[0] - b
    np.testing.assert_allclose(slope, slope[0], atol=1e-12)  # on the plane of sums of 1


# --- a trajectory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.03, 0.04, 0.06, 0.075, 0.15, 0.20, 0.25])
def test_a_ramp_is_averaged_as_if_the_width_had_been_there_in_training(sigma_rel):
    ramp, snapshots = ramp_of_a_thousand_steps()
    made = reconstruct(snapshots, sigma_rel=sigma_rel, dtype=torch.float64)
    gamma = sigma_rel_to_gamma(sigma_rel)
    exact = direct(ramp, sigma_rel)
    assert exact.item() == pytest.approx(mean_of_ramp(gamma, 1000), abs=1e-8)
    # Cauchy-Schwarz: the error of the profile times its norm times that of the ramp, 1/sqrt(3).
    norm = math.sqrt(profile_dot(1, gamma, 1, gamma))
    bound = made.profile_error * norm / math.sqrt(3) * 1.01
    assert abs(made.weights["weight"] - exact).item() <= bound
    assert made.sigma_rel == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", STORED)
def test_a_stored_width_comes_back_as_it_was(sigma_rel):
    snapshots = five_hundred_walks()[1][torch.float64]
    made = reconstruct(snapshots, sigma_rel=sigma_rel, dtype=torch.float64)
    stored = snapshots[1000]["tensors"][f"{sigma_rel:g}/weight"]
    # 40 terms that cancel to 1e-13; a sum in float32 would be off by 1e-7.
    torch.testing.assert_close(made.weights["weight"], stored, rtol=0, atol=1e-11)


def errors_of_walks(sigma_rel, normalize, values, snapshots):
    made = reconstruct(snapshots, sigma_rel=sigma_rel, normalize=normalize, dtype=torch.float64)
    return (made.weights["weight"] - direct(values, sigma_rel)).numpy()


def expected_errors(sigma_rel, normalize, steps=1000, number=20, mean=2.0):
    """Mean and deviation of the error on walks of steps xi_j: sum_j xi_j D_j, with
    D_j the integral of the profiles' difference from j - 1 on."""
    t, gamma = twenty_snapshots(float(steps), number)
    wanted = sigma_rel_to_gamma(sigma_rel)
    x, _ = solve_coefficients(t, gamma, steps, wanted, normalize)
    past = np.arange(steps)[:, None]
    D = (1 - np.minimum(past / t, 1) ** (gamma + 1)) @ x - (
        1 - (past[:, 0] / steps) ** (wanted + 1)
    )
    return mean * (x.sum() - 1), math.sqrt((D**2).sum() / steps)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_errors_on_random_walks_have_the_mean_and_deviation_of_the_closed_form(normalize):
    values, snapshots = five_hundred_walks()
    for sigma_rel in (0.03, 0.075, 0.15, 0.20, 0.25):
        errors = errors_of_walks(sigma_rel, normalize, values, snapshots[torch.float64])
        mean, deviation = expected_errors(sigma_rel, normalize)
        # 500 walks, four standard errors in 20 comparisons: false alarm at 1e-3 of the seeds.
        assert abs(errors.mean() - mean) <= 4 * deviation / math.sqrt(500)
        assert abs(errors.std(ddof=1) / deviation - 1) <= 4 / math.sqrt(2 * 500)


def test_normalising_cuts_the_error_of_walks_with_a_mean():
    # The specification's table: mean error of 20 walks of 4,000 steps, plain -> normalised. A mean
    # of 20 errors has a relative standard error of 0.75 / sqrt(20) = 0.17: within four of them.
    values, snapshots = five_hundred_walks()
    table = {
        0.03: (9.3e-4, 7.6e-4),
        0.075: (6.5e-5, 4.4e-5),
        0.15: (4.0e-4, 8.3e-5),
        0.20: (3.4e-3, 5.5e-4),
        0.25: (2.6e-2, 5.8e-3),
    }
    for sigma_rel, published in table.items():
        for normalize, figure in zip((False, True), published, strict=True):
            errors = errors_of_walks(sigma_rel, normalize, values, snapshots[torch.float64])
            assert np.abs(errors).mean() == pytest.approx(figure, rel=4 * 0.17)
    # Without the bias of 2 * 0.0135 the walk alone is left: five times less, expected in both.
    plain, normalised = (expected_errors(0.25, each, 4000) for each in (False, True))
    assert abs(plain[0]) > 3 * math.sqrt(2 / math.pi) * normalised[1]
    assert normalised[0] == pytest.approx(0, abs=1e-12)


def test_a_constant_weight_comes_back_when_normalised_and_shrinks_when_not():
    snapshots = run(torch.full((1000, 3), 2.0), update_every=50)
    made = reconstruct(snapshots, sigma_rel=0.25)
    assert made.weights["weight"].equal(torch.full((3,), 2.0))  # within half an ulp of float32
    plain = reconstruct(snapshots, sigma_rel=0.25, normalize=False)
    assert plain.weights["weight"][0].item() == pytest.approx(2 * 0.98654, abs=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.075, 0.25])
def test_float16_snapshots_cost_up_to_half_a_unit_times_the_size_of_the_coefficients(sigma_rel):
    values, snapshots = five_hundred_walks()
    fine = reconstruct(snapshots[torch.float64], sigma_rel=sigma_rel, dtype=torch.float64)
    largest = values.abs().max().item()
    size = np.abs(fine.coefficients).sum()
    for dtype, unit in ((torch.float16, 2**-11), (torch.float32, 2**-24)):
        rounded = reconstruct(snapshots[dtype], sigma_rel=sigma_rel, dtype=torch.float64)
        cost = (rounded.weights["weight"] - fine.weights["weight"]).abs().max().item()
        assert unit * size * largest / 20 < cost <= unit * size * largest


def test_any_spacing_of_updates_and_snapshots_between_two_updates():
    values = walks()
    sparse = run(values, every=53, update_every=10)  # at 53, 106, ...: the updates are earlier
    made = reconstruct(sparse, sigma_rel=0.075, dtype=torch.float64)
    assert made.step == 954
    held = values[9:950:10].repeat_interleave(10, 0)  # weights as the updates saw them
    exact = direct(held, 0.075)
    norm = math.sqrt(profile_dot(1, made.gamma, 1, made.gamma))
    bound = made.profile_error * norm * held.square().mean(0).sqrt()  # Cauchy-Schwarz
    assert ((made.weights["weight"] - exact).abs() <= bound).all()
    assert made.profile_error < 3e-3


def test_several_snapshots_after_one_update_count_once():
    values = walks()
    often, once = (run(values, each, first=50, update_every=50) for each in (5, 50))
    made, expected = (reconstruct(each, sigma_rel=0.08) for each in (often, once))
    assert len(made.steps) > len(expected.steps)
    torch.testing.assert_close(made.weights, expected.weights, rtol=1e-6, atol=0)  # float32


def test_time_counts_from_the_start_step():
    values = walks()
    late = run(torch.cat([100 * torch.ones(70, 3), values[:900]]), every=97, start_step=70)
    made = reconstruct(late, sigma_rel=0.075, dtype=torch.float64)
    assert made.step == 970
    # The profile begins at the start: the hundreds before it have no part.
    norm = math.sqrt(profile_dot(1, made.gamma, 1, made.gamma))
    bound = made.profile_error * norm * values[:900].square().mean(0).sqrt()  # Cauchy-Schwarz
    assert ((made.weights["weight"] - direct(values[:900], 0.075)).abs() <= bound).all()
    assert made.profile_error < 2e-2  # ten snapshots


def test_before_the_first_update_there_is_nothing_to_keep():
    average = PowerFunctionAverage([torch.ones(2)], start_step=5)
    for _ in range(5):
        average.update()
    snapshots = {}
    with pytest.raises(RuntimeError, match=r"step 5 \(`start_step` is 5\): the first snapshot"):
        average.snapshot(snapshots)
    assert not snapshots
    average.update()
    average.snapshot(snapshots)
    assert list(snapshots) == [6]


def test_a_parameter_that_joins_later_has_a_time_of_its_own():
    values = walks(steps=400)
    weight, head, snapshots = torch.zeros(3), torch.zeros(3), {}
    average = PowerFunctionAverage([("weight", weight)])
    for step, value in enumerate(values, 1):
        if step == 241:
            average.add_parameters([("head", head)])
        weight.copy_(value)
        head.copy_(value)
        average.update()
        if step % 8 == 0:
            average.snapshot(snapshots)
    made = reconstruct(snapshots, sigma_rel=0.075)
    exact = {"weight": direct(values, 0.075), "head": direct(values[240:], 0.075)}
    for name, value in exact.items():
        # 20 snapshots of the head: profile error 2.3e-3; a time from step 0 would be off by 0.1.
        assert (made.weights[name].double() - value).abs().max() < 2e-3
    assert made.profile_error == pytest.approx(2.3e-3, rel=0.05)  # the larger of the two


@pytest.mark.parametrize("width", [0.06, 0.15])
def test_an_earlier_step_uses_the_snapshots_until_then(width):
    values = walks(steps=200)
    made = reconstruct(run(values, every=10), sigma_rel=width, step=120)
    assert made.step == 120
    assert made.steps == tuple(range(10, 121, 10))
    expected = reconstruct(run(values[:120], every=10), sigma_rel=width)
    assert made.weights["weight"].equal(expected.weights["weight"])


def test_a_width_that_the_snapshots_cannot_make_warns_with_its_error():
    snapshots = run(torch.ones(200, 1), every=50)
    with pytest.warns(
        UserWarning, match=r"sigma_rel=0.0200 .* 4 snapshots .* relative error of 0."
    ):
        reconstruct(snapshots, sigma_rel=0.02)


def test_an_exponent_is_as_good_as_a_width():
    snapshots = five_hundred_walks()[1][torch.float32]
    by_width = reconstruct(snapshots, sigma_rel=0.08)
    by_exponent = reconstruct(snapshots, gamma=sigma_rel_to_gamma(0.08))
    assert by_width.weights["weight"].equal(by_exponent.weights["weight"])
    assert reconstruct(snapshots, gamma=7).gamma == 7.0
    assert repr(by_width) == (
        "Reconstruction(sigma_rel=0.0800, step=1000: 1 tensors from 20 snapshots, "
        f"profile error {by_width.profile_error:.1e}, condition number 1.4e+04)"
    )


def test_bias_correction_makes_no_difference():
    values = walks(steps=100)
    both = [run(values, bias_correction=each)[100]["tensors"] for each in (True, False)]
    for key, value in both[0].items():
        # beta is 0 at the first update either way; then B = 0, and the shares are the same.
        assert value.equal(both[1][key])


# --- models and files -----------------------------------------------------------------------------


class Tied(nn.Module):
    """Tied weights, BatchNorm's buffers, a frozen bias: what a plain dict of averages lacks."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.head.bias.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


def trained(destination, model, steps=100, every=5, dtype=torch.float32, **options):
    average = PowerFunctionAverage(model, **options)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = average.attach(optimiser)
    tokens = torch.tensor([0, 1, 2, 3, 4, 4])
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), tokens).backward()
        optimiser.step()
        if step % every == 0:
            average.snapshot(destination, dtype)
    handle.remove()
    return average


def test_a_model_takes_the_result_strictly_with_buffers_ties_and_frozen_parameters(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    average = trained(tmp_path, model)
    made = reconstruct(tmp_path, sigma_rel=0.075)
    assert list(made.weights) == list(model.state_dict())
    other = Tied()
    other.load_state_dict(made.weights)  # strict
    assert made.weights["embedding.weight"] is made.weights["head.weight"]
    assert other.norm.running_mean.equal(model.norm.running_mean)
    assert other.norm.num_batches_tracked == 100
    assert other.head.bias.equal(model.head.bias)
    assert not other.embedding.weight.equal(model.embedding.weight)
    stored = reconstruct(tmp_path, sigma_rel=0.05).weights["embedding.weight"]
    torch.testing.assert_close(stored, average.named_averages("0.05")["embedding.weight"])


@pytest.mark.parametrize("options", [{"buffers": "average"}, {"buffers": "ignore"}])
def test_every_treatment_of_buffers_gives_a_whole_state(options):
    torch.manual_seed(0)
    model, snapshots = Tied(), {}
    trained(snapshots, model, **options)
    made = reconstruct(snapshots, sigma_rel=0.075).weights
    Tied().load_state_dict(made)
    averaged = not made["norm.running_mean"].equal(model.norm.running_mean)
    assert averaged is (options["buffers"] == "average")


def test_folder_list_of_files_and_dict_give_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model, kept = Tied(), {}
    for destination in (tmp_path, kept):
        trained(destination, copy.deepcopy(model))
    files = sorted(tmp_path.iterdir(), reverse=True)
    assert files[-1].name == "snapshot-000000005.safetensors"
    assert len(files) == 20
    results = [reconstruct(each, sigma_rel=0.12) for each in (tmp_path, str(tmp_path), files, kept)]
    for made in results[1:]:
        assert made.steps == results[0].steps
        assert np.array_equal(made.coefficients, results[0].coefficients)
        for name, value in made.weights.items():
            assert value.equal(results[0].weights[name]), name


def test_one_tensor_of_one_snapshot_is_in_memory_at_a_time(tmp_path, monkeypatch):
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)))
    weight_average = PowerFunctionAverage(model)
    for _ in range(10):
        weight_average.update()
        weight_average.snapshot(tmp_path)
    read, alive, most = 0, [], 0
    plain = post_hoc.safe_open

    class Watched:
        def __init__(self, *args, **options):
            self.file = plain(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            nonlocal read, most
            value = self.file.get_tensor(key)
            read += 1
            alive.append(weakref.ref(value))
            most = max(most, sum(each() is not None for each in alive))
            return value

    monkeypatch.setattr(post_hoc, "safe_open", Watched)
    reconstruct(tmp_path, sigma_rel=0.075)
    assert read == 12 * 2 * 10  # each tensor once
    assert most == 1


def test_the_result_does_not_depend_on_the_files_any_more(tmp_path):
    torch.manual_seed(0)
    trained(tmp_path, Tied())
    made = reconstruct(tmp_path, sigma_rel=0.075).weights
    before = {name: value.clone() for name, value in made.items()}
    for file in tmp_path.iterdir():  # in place: a result that is a view of the file would change
        with file.open("r+b") as content:
            content.write(b"\xff" * file.stat().st_size)
    for name, value in made.items():
        assert value.equal(before[name]), name


def test_dtypes_of_result_and_snapshots():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.register_buffer("table", torch.ones(2, dtype=torch.bfloat16))
    snapshots = {}
    average = PowerFunctionAverage(model)
    for _ in range(10):
        average.update()
        average.snapshot(snapshots)
    assert snapshots[10]["tensors"]["0.05/weight"].dtype == torch.float32
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        made = reconstruct(snapshots, sigma_rel=0.08, dtype=dtype).weights
        assert made["weight"].dtype == dtype
        assert made["table"].dtype == torch.bfloat16  # not averaged: as the model has it
    assert reconstruct(snapshots, sigma_rel=0.08).weights["weight"].dtype == torch.float32


def test_complex_weights_stay_complex():
    values = torch.complex(walks(steps=100), walks(steps=100, seed=1))
    made = reconstruct(run(values, every=5), sigma_rel=0.075, dtype=torch.float64)
    made = made.weights["weight"]
    assert made.dtype == torch.complex128
    for part in ("real", "imag"):
        alone = run(getattr(values, part), every=5)
        alone = reconstruct(alone, sigma_rel=0.075, dtype=torch.float64).weights["weight"]
        torch.testing.assert_close(getattr(made, part), alone)


def test_a_compensated_average_is_stored_in_full():
    values = 1 + walks(steps=200, number=50, mean=0.0).float() / 1000
    exact = direct(values, 0.05)
    kept = run_in_dtypes(values, [torch.float32, torch.float64], 200, compensated=True)
    error = {}
    for dtype, snapshots in kept.items():
        stored = snapshots[200]["tensors"]["0.05/weight"].double()
        error[dtype] = (stored - exact).abs().max().item()
    assert error[torch.float32] > 2**-26  # values near 1: up to half a unit of 2^-23
    assert error[torch.float64] < 2**-32


def test_a_run_that_was_interrupted_writes_the_same_snapshots(tmp_path):
    values = walks(steps=200)
    whole = run(values, every=20)
    weight, snapshots = torch.zeros(3, dtype=torch.float64), {}
    average = PowerFunctionAverage([("weight", weight)])
    for step, value in enumerate(values, 1):
        weight.copy_(value)
        average.update()
        if step % 20 == 0:
            average.snapshot(snapshots, torch.float64)
        if step == 110:
            average.save(tmp_path / "state.safetensors")
            average = PowerFunctionAverage([("weight", weight)])
            average.load(tmp_path / "state.safetensors")
    for step, state in whole.items():
        assert snapshots[step]["about"] == state["about"]
        for key, value in state["tensors"].items():
            assert snapshots[step]["tensors"][key].equal(value)


def test_a_snapshot_of_the_same_step_is_replaced(tmp_path):
    weight = torch.ones(2)
    for value in (1.0, 5.0):
        weight.fill_(value)
        average = PowerFunctionAverage([weight])
        average.update()
        average.snapshot(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert reconstruct(tmp_path, sigma_rel=0.05).weights["0"].tolist() == [5.0, 5.0]


def test_a_snapshot_that_fails_while_it_is_written_leaves_no_file(tmp_path, monkeypatch):
    average = PowerFunctionAverage([torch.ones(2)])
    average.update()
    average.snapshot(tmp_path)
    average.update()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        average.snapshot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-000000001.safetensors"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal here")
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_taken_for_a_snapshot(
    tmp_path,
):
    script = """
        import os, signal, sys, torch
        from cln_tutorial.weight_averaging.post_hoc import PowerFunctionAverage
        average = PowerFunctionAverage([torch.ones(2)])
        average.update()
        average.snapshot(sys.argv[1])
        average.update()
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        average.snapshot(sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [
        "snapshot-000000001.safetensors"
    ]
    assert reconstruct(tmp_path, sigma_rel=0.05).step == 1


# --- the peer -------------------------------------------------------------------------------------


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def karras_on_a_ramp(**options):
    ema_pytorch = pytest.importorskip("ema_pytorch.post_hoc_ema")
    model = Weight()
    peer = ema_pytorch.KarrasEMA(model, sigma_rel=0.10, **options)
    for step in range(1, 4001):
        model.weight.data.fill_(step / 4000)
        peer.update()
    return peer.ema_model.weight.item()


def test_ema_pytorch_is_ours_with_the_first_weights_seen_twice_if_it_updates_at_every_step():
    # Its beta at call n is (1 - 1 / (n + 1)) ** (gamma + 1), after a copy at the first.
    weights = PowerFunction(sigma_rel=0.10).weights(4001)[1:]
    ours = weights @ np.append([1], np.arange(1, 4001)) / 4000
    theirs = karras_on_a_ramp(update_every=1)
    assert theirs == pytest.approx(ours, abs=1e-12)  # float64, 4,000 roundings
    gamma = sigma_rel_to_gamma(0.10)
    assert theirs == pytest.approx((gamma + 1) / (gamma + 2), abs=1.5e-4)  # half a step of 1/4000


@pytest.mark.parametrize(
    ("options", "peer"), [({"update_every": 10}, 0.4420), ({}, 0.0721)], ids=["10", "default"]
)
def test_ema_pytorch_with_sparse_updates_stays_near_the_initial_weights_and_ours_does_not(
    options, peer
):
    ramp = torch.arange(1, 4001, dtype=torch.float64)[:, None] / 4000
    every = options.get("update_every", 100)
    snapshots = run(ramp, every=4000, update_every=every)
    ours = snapshots[4000]["tensors"]["0.1/weight"].item()
    # 0.8894 and 0.9002: the ramp as 400 and as 40 updates see it, of 0.8881 in the limit.
    assert ours == pytest.approx(mean_of_ramp(sigma_rel_to_gamma(0.10), 4000 // every), abs=1e-5)
    assert karras_on_a_ramp(**options) == pytest.approx(peer, abs=5e-5)


def test_ema_pytorch_makes_another_width_as_ours_does_if_it_updates_at_every_step(tmp_path):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    found = {}
    for update_every in (1, 100):
        model = Weight()
        folder = tmp_path / str(update_every)
        peer = ema_pytorch.PostHocEMA(
            model,
            sigma_rels=STORED,
            update_every=update_every,
            checkpoint_every_num_steps=50,
            checkpoint_folder=str(folder),
            checkpoint_dtype=torch.float64,
        )
        for step in range(1, 1001):
            model.weight.data.fill_(step / 1000)
            peer.update()
        made = peer.synthesize_ema_model(sigma_rel=0.075)
        found[update_every] = made.ema_model.weight.item()
    _, snapshots = ramp_of_a_thousand_steps()
    ours = reconstruct(snapshots, sigma_rel=0.075, normalize=False, dtype=torch.float64)
    # Its times are one step of 1/1000 off; its exponents are in float32.
    assert found[1] == pytest.approx(ours.weights["weight"].item(), abs=1e-3)
    assert found[100] < 0.2 < 0.9 < ours.weights["weight"].item()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma_rel", "options", "message"),
    [
        (0.3, {}, r"`sigma_rel` must lie in \(0, 0.2887\]; got 0.3"),
        ((0.05, 0.0), {}, r"`sigma_rel` must lie in"),
        ((0.05, 0.05), {}, r"widths that differ; got \(0.05, 0.05\)"),
        ((), {}, r"widths that differ; got \(\)"),
        (0.05, {"decay": 0.9}, r"`decay` cannot be set: `sigma_rel` is the profile"),
        (0.05, {"profile": 0.9}, r"`profile` cannot be set"),
    ],
)
def test_bad_averages_are_refused(sigma_rel, options, message):
    with pytest.raises(ValueError, match=message):
        PowerFunctionAverage([torch.ones(2)], sigma_rel, **options)


def test_one_width_gets_the_name_of_its_number():
    assert list(PowerFunctionAverage([torch.ones(2)], 0.1).profiles) == ["0.1"]
    assert list(PowerFunctionAverage([torch.ones(2)]).profiles) == ["0.05", "0.1"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, r"give either `sigma_rel` or `gamma`, and not both"),
        ({"sigma_rel": 0.1, "gamma": 3}, r"give either `sigma_rel` or `gamma`, and not both"),
        ({"sigma_rel": 0}, r"`sigma_rel` must lie in \(0, 0.2887\]; got 0"),
        ({"sigma_rel": -0.1}, r"`sigma_rel` must lie in"),
        ({"sigma_rel": 0.2888}, r"`sigma_rel` must lie in"),
        ({"sigma_rel": math.nan}, r"`sigma_rel` must lie in"),
        ({"gamma": -0.1}, r"`gamma` must be at least 0"),
        ({"gamma": math.inf}, r"`gamma` must be at least 0"),
        (
            {"gamma": 3, "step": 1001},
            r"`step` must be that of a snapshot.*got 1001.*900, 950, 1000",
        ),
        ({"gamma": 3, "step": 120}, r"got 120, and the nearest are 50, 100, 150\."),
        (
            {"gamma": 3, "dtype": torch.int64},
            r"`dtype` must be a real floating dtype; got torch.int",
        ),
    ],
)
def test_bad_wishes_are_refused(wanted, message):
    snapshots = run(torch.ones(1000, 1), update_every=50)
    with pytest.raises(ValueError, match=message):
        reconstruct(snapshots, **wanted)


def test_the_widest_profile_is_the_plain_mean():
    values = walks(steps=100)
    stored = run(values, widths=(12**-0.5,), every=100)
    made = reconstruct(stored, sigma_rel=12**-0.5, dtype=torch.float64).weights["weight"]
    torch.testing.assert_close(made, values.mean(0))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        reconstruct(tmp_path / "nowhere", sigma_rel=0.1)
    with pytest.raises(FileNotFoundError, match=r"has no snapshot"):
        reconstruct(tmp_path, sigma_rel=0.1)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone.safetensors"):
        reconstruct([tmp_path / "gone.safetensors"], sigma_rel=0.1)
    with pytest.raises(FileNotFoundError, match=r"has no snapshot: \{\}"):
        reconstruct({}, sigma_rel=0.1)


def test_files_that_are_no_snapshots_are_named(tmp_path):
    average = PowerFunctionAverage([torch.ones(100)])
    average.update()
    average.snapshot(tmp_path)
    (file,) = tmp_path.iterdir()
    cut = tmp_path / "snapshot-000000002.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"snapshot-000000002.* is no safetensors file, or cut off"
    ):
        reconstruct(tmp_path, sigma_rel=0.1)
    save_file({"a": torch.ones(1)}, cut)
    with pytest.raises(ValueError, match=r"000000002.* was not written by `snapshot`"):
        reconstruct(tmp_path, sigma_rel=0.1)
    shutil.copy(file, cut)
    with pytest.raises(ValueError, match=r"000000001.* and .*000000002.* are of the same step"):
        reconstruct(tmp_path, sigma_rel=0.1)
    with pytest.raises(ValueError, match=r"snapshot 7 was not made by `snapshot`"):
        reconstruct({7: {"weight": torch.ones(1)}}, sigma_rel=0.1)


def snapshot_of(step, tensors, widths=STORED):
    average, snapshots = PowerFunctionAverage(tensors, widths), {}
    average.update(step)
    average.snapshot(snapshots)
    return snapshots


@pytest.mark.parametrize(
    ("tensors", "widths", "message"),
    [
        ([("a", (2,)), ("c", (3,))], STORED, r"different models: b, c, 2 in all"),
        ([("a", (2,))], STORED, r"different models: b, 1 in all"),
        ([("a", (2,)), ("b", (3,)), ("c", (3,))], STORED, r"different models: c, 1 in all"),
        (
            [("a", (2,)), ("b", (3, 1))],
            STORED,
            r"b has shape \(3,\) in snapshot 1, \(3, 1\) in snap",
        ),
        ([("a", (2,)), ("b", (3,))], (0.05,), r"has the averages \{'0.05': .*, '0.1': .*\}, snap"),
    ],
    ids=["other", "fewer", "more", "shape", "widths"],
)
def test_snapshots_of_different_runs_are_not_mixed(tensors, widths, message):
    first = snapshot_of(1, [("a", torch.ones(2)), ("b", torch.ones(3))])
    second = snapshot_of(2, [(name, torch.ones(shape)) for name, shape in tensors], widths)
    with pytest.raises(ValueError, match=message):
        reconstruct(first | second, sigma_rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [3], 2, 3), r"two lists of the same length; got the shapes \(2,\) and \(1,\)"),
        (([], [], 2, 3), r"two lists of the same length"),
        (([1, 1], [3, 3], 2, 3), r"have a profile twice"),
        (([1, 0], [3, 3], 2, 3), r"`t` must be finite and more than 0"),
        (([1, 2], [3, -1], 2, 3), r"`gamma` must be finite and at least 0"),
        (([1, 2], [3, 3], 0, 3), r"`t_r` must be finite and more than 0"),
        (([1, 2], [3, 3], 2, math.nan), r"`gamma_r` must be finite and at least 0"),
    ],
)
def test_bad_profiles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_coefficients(*arguments)


def test_coefficients_of_other_profiles_are_refused():
    with pytest.raises(ValueError, match=r"`coefficients` must be one per profile: 2; got"):
        profile_error([1.0], [1, 2], [3, 3], 2, 3)


def test_a_snapshot_in_a_type_that_is_no_floating_one_is_refused(tmp_path):
    average = PowerFunctionAverage([torch.ones(2)])
    average.update()
    with pytest.raises(ValueError, match=r"`dtype` must be a real floating dtype; got torch.int8"):
        average.snapshot(tmp_path / "new", torch.int8)
    assert not (tmp_path / "new").exists()
