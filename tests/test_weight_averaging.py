"""The averages of a model: closed forms, training that is not touched, files, and bad input."""

import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cln_tutorial import weight_averaging as wa
from cln_tutorial.weight_averaging import ExponentialMovingAverage
from cln_tutorial.weight_averaging.profiles import weights_of
from experiments import harness
from experiments import weight_averaging as experiment

PROFILES = {
    "constant": wa.ConstantDecay(0.9),
    "no decay": wa.ConstantDecay(0.0),
    "half-life": wa.HalfLife(7),
    "TensorFlow": wa.TensorFlowWarmup(0.99),
    "inverse gamma": wa.InverseGammaWarmup(0.99, inv_gamma=2.0, power=0.75, min=0.1),
    "uniform": wa.Uniform(),
    "late uniform": wa.Uniform(start=20),
    "every sixth": wa.Uniform(start=4, every=6),
    "power": wa.PowerFunction(0.1),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(6575)


def weights_over(steps, size=5):
    """One parameter, and its values before training and after each step."""
    return nn.Parameter(torch.zeros(size, dtype=torch.float64)), torch.randn(
        steps + 1, size, dtype=torch.float64
    )


def run(parameter, path, steps=None, **options):
    """Average a parameter that takes the values of a path; return the average."""
    with torch.no_grad():
        parameter.copy_(path[0])
    average = ExponentialMovingAverage([parameter], **options)
    for step in steps or range(1, len(path)):
        with torch.no_grad():
            parameter.copy_(path[step])
        average.update(step)
    return average


def value(average, which=None):
    return next(iter(average.named_averages(which).values()))


def brute_force(profile, updates, path, bias_correction):
    """The sum of all weights, from products of the decays per step: no recursion of ours."""
    share = np.zeros(len(path))
    decays = [profile.decay(a, b) for a, b in itertools.pairwise([0, *updates])]
    for i, step in enumerate(updates):
        share[step] = (1 - decays[i]) * math.prod(decays[i + 1 :])
    share[0] = 0 if bias_correction and updates else math.prod(decays)
    share /= share.sum()
    return torch.from_numpy(share) @ path


# --- the one formula ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("update_every", [1, 3, 10])
@pytest.mark.parametrize("name", PROFILES)
def test_each_profile_is_the_weighted_sum_at_every_spacing(name, update_every, bias_correction):
    profile = PROFILES[name]
    parameter, path = weights_over(40)
    options = {"profile": profile, "bias_correction": bias_correction}
    average = run(parameter, path, update_every=update_every, **options)
    updates = list(range(update_every, 41, update_every))
    expected = brute_force(profile, updates, path, bias_correction)
    assert (value(average) - expected).abs().max() < 1e-12
    weights = average.weights_of_steps()
    assert weights.shape == (41,)
    assert abs(weights.sum() - 1) < 1e-12
    assert (torch.from_numpy(weights) @ path - expected).abs().max() < 1e-12
    same = profile.weights(40, update_every=update_every, bias_correction=bias_correction)
    assert np.array_equal(weights, same)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("name", PROFILES)
def test_each_profile_is_the_weighted_sum_at_irregular_steps(name, bias_correction):
    parameter, path = weights_over(60)
    steps = [2, 3, 7, 8, 20, 21, 40, 60]
    profile = PROFILES[name]
    options = {"profile": profile, "bias_correction": bias_correction}
    average = run(parameter, path, steps, **options)
    expected = brute_force(profile, steps, path, bias_correction)
    assert (value(average) - expected).abs().max() < 1e-12
    weights = weights_of(profile, steps, 60, bias_correction)
    assert (torch.from_numpy(weights) @ path - expected).abs().max() < 1e-12


def test_a_constant_decay_is_per_step_and_does_not_depend_on_the_spacing_of_updates():
    # Of a path that is constant between the updates, the average is the same at any spacing, but
    # for the steps since the last one.
    parameter, path = weights_over(40)
    path = path[::4].repeat_interleave(4, 0)[:41]
    path = torch.cat([path[:1], path[:1].expand(3, -1), path[4:]])
    for decay in (0.5, 0.9, 0.99):
        every = run(parameter, path, decay=decay, bias_correction=False)
        after = run(parameter, path[:, :], range(4, 41, 4), decay=decay, bias_correction=False)
        total = every.weights_of_steps()
        fourth = weights_of(wa.ConstantDecay(decay), range(4, 41, 4), 40, False)
        assert np.allclose(fourth[4::4], total[1:].reshape(10, 4).sum(1), atol=1e-12)
        assert after.step == every.step == 40


def test_the_lag_behind_a_ramp_is_the_one_of_the_geometric_series():
    ramp = torch.arange(3501, dtype=torch.float64)[:, None]
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    lag = 3500 - value(run(parameter, ramp, decay=0.99)).item()
    assert abs(lag - 99) < 1e-9  # 0.99^3500 is 5e-16
    lag = 3500 - value(run(parameter, ramp, decay=0.99, update_every=10)).item()
    expected = 10 * 0.99**10 / (1 - 0.99**10)
    assert abs(expected - 94.5829) < 1e-4
    assert abs(lag - expected) < 1e-9


def test_bias_correction_equals_zero_debias():
    # Keras 2.2.4: an accumulator that begins at zero, divided by 1 - decay^n.
    parameter, path = weights_over(30)
    for n in (1, 2, 30):
        accumulator = torch.zeros(5, dtype=torch.float64)
        for theta in path[1 : n + 1]:
            accumulator = 0.9 * accumulator + 0.1 * theta
        average = run(parameter, path[: n + 1], decay=0.9)
        assert (value(average) - accumulator / (1 - 0.9**n)).abs().max() < 1e-12


def test_a_uniform_average_is_the_mean_and_the_power_function_of_exponent_zero():
    parameter, path = weights_over(50)
    mean = path[1:].mean(0)
    for profile in (wa.Uniform(), wa.PowerFunction(gamma=0.0)):
        assert (value(run(parameter, path, profile=profile)) - mean).abs().max() < 1e-12


def test_stochastic_weight_averaging_takes_the_samples_that_it_names():
    parameter, path = weights_over(31)
    for start, every in ((1, 1), (10, 1), (10, 7), (1, 5), (31, 3)):
        with torch.no_grad():
            parameter.copy_(path[0])
        average = wa.StochasticWeightAveraging([parameter], start, every)
        for theta in path[1:]:
            with torch.no_grad():
                parameter.copy_(theta)
            average.update()
        expected = path[start::every].mean(0)
        assert (value(average) - expected).abs().max() < 1e-12
        assert np.allclose(average.weights_of_steps() @ path.numpy(), expected, atol=1e-12)


def test_relative_width_and_exponent_are_inverse_and_have_the_published_values():
    for sigma, gamma in {0.05: 16.9722, 0.10: 6.9372, 0.15: 3.5579, 0.25: 0.7198}.items():
        assert abs(wa.sigma_rel_to_gamma(sigma) - gamma) < 5e-5
        assert abs(wa.gamma_to_sigma_rel(wa.sigma_rel_to_gamma(sigma)) - sigma) < 1e-12
    assert wa.sigma_rel_to_gamma(12**-0.5) < 1e-6
    # The deviation of the weights themselves, at 4,000 steps.
    steps = np.arange(4001) / 4000
    for sigma in (0.05, 0.10):
        weights = wa.PowerFunction(sigma).weights(4000)
        mean = weights @ steps
        assert abs((weights @ (steps - mean) ** 2) ** 0.5 - sigma) < 1e-4


@pytest.mark.parametrize("update_every", [1, 10])
def test_the_weights_of_a_power_function_are_increments_of_the_power(update_every):
    for gamma in (0.0, 1.0, 6.94):
        weights = wa.PowerFunction(gamma=gamma).weights(40, update_every=update_every)
        steps = np.arange(0, 41, update_every)
        expected = np.diff((steps / 40) ** (gamma + 1))
        assert np.allclose(weights[steps[1:]], expected, atol=1e-14)
        assert wa.PowerFunction(gamma=gamma).decay(0, update_every) == 0


def test_several_averages_at_once_are_those_of_one_after_another():
    parameter, path = weights_over(20)
    together = run(parameter, path, decay={"fast": 0.5, "power": wa.PowerFunction(0.1)})
    for name, profile in (("fast", wa.ConstantDecay(0.5)), ("power", wa.PowerFunction(0.1))):
        assert value(together, name).equal(value(run(parameter, path, profile=profile)))
    listed = run(parameter, path, decay=[0.5, 0.9])
    assert value(listed, "0.5").equal(value(run(parameter, path, decay=0.5)))


def test_until_the_start_step_the_average_is_a_copy():
    parameter, path = weights_over(20)
    for bias_correction in (True, False):
        options = {"decay": 0.9, "bias_correction": bias_correction, "start_step": 12}
        for n in (5, 12):
            assert value(run(parameter, path[: n + 1], **options)).equal(path[n])
        late = run(parameter, path, **options)
        expected = brute_force(wa.ConstantDecay(0.9), list(range(1, 9)), path[12:], bias_correction)
        assert (value(late) - expected).abs().max() < 1e-12
        assert np.allclose(late.weights_of_steps() @ path.numpy(), expected, atol=1e-12)


# --- training -------------------------------------------------------------------------------------


def small_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2)
    ).to(dtype)


def train(model, optimiser, steps, after=lambda: None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for _ in range(steps):
        optimiser.zero_grad()
        x = torch.randn(16, 4, generator=generator)
        loss = model(x.to(next(model.parameters()).dtype)).square().mean()
        loss.backward()
        optimiser.step()
        after()


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "foreach", "fused"])
def test_training_is_the_same_bit_for_bit_with_an_average_and_without(kind):
    def optimiser_of(model):
        if kind == "SGD":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {kind: True} if kind in ("foreach", "fused") else {}
        cls = torch.optim.Adam if kind == "Adam" else torch.optim.AdamW
        return cls(model.parameters(), lr=1e-2, **options)

    plain = small_model()
    train(plain, optimiser_of(plain), 20)
    model = small_model()
    optimiser = optimiser_of(model)
    average = ExponentialMovingAverage(model, {"a": 0.9, "b": wa.PowerFunction(0.1)})
    handle = average.attach(optimiser)

    def evaluate_now_and_then():
        if average.step % 7 == 0:
            with average.applied("a"):
                model.eval()(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
            model.train()

    train(model, optimiser, 20, evaluate_now_and_then)
    assert same(bits(model), bits(plain))
    assert average.step == 20
    handle.remove()
    optimiser.step()
    assert average.step == 20


def test_accumulated_gradients_make_one_update_per_step():
    model = small_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    average = ExponentialMovingAverage(model, 0.9)
    average.attach(optimiser)
    for _ in range(3):
        for _ in range(4):
            model(torch.randn(8, 4)).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert average.step == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_does_not_count(fused):
    model = nn.Linear(2, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    average = ExponentialMovingAverage(model, 0.5)
    average.attach(optimiser)
    calls = []
    optimiser.register_step_post_hook(lambda *_: calls.append(1))
    for factor in (1.0, math.inf, 1.0):
        before = {n: t.clone() for n, t in average.named_averages().items()}
        optimiser.zero_grad()
        scaler.scale(model(torch.ones(1, 2) * factor).sum()).backward()
        scaler.step(optimiser)
        scaler.update()
        assert same(before, average.named_averages()) == math.isinf(factor)
    assert average.step == 2
    assert len(calls) == (3 if fused else 2)  # the fused optimiser's hook is called all the same


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.zero_()
    average = ExponentialMovingAverage(model, 0.9, bias_correction=False)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    for _ in range(10):
        average.update()
    found = average.named_averages()
    assert found["0.weight"] is found["1.weight"]
    # 1 - 0.9^10 = 0.65132; twice per step would be 0.87842.
    assert (found["0.weight"] - (1 - 0.9**10)).abs().max() < 1e-6


def test_frozen_parameters_are_read_from_the_model_and_join_when_they_thaw():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    average = ExponentialMovingAverage(model, 0.5)
    memory = sum(t.numel() for t in average.state_dict()["tensors"].values())
    assert memory == 6
    for step in range(6):
        if step == 3:
            model[0].requires_grad_(True)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float(step))
        average.update()
        if step < 3:
            assert average.named_averages()["0.weight"].equal(model[0].weight)
    # Of values 3, 4, 5 with bias correction: (5/2 + 4/4 + 3/8) / (7/8).
    expected = (5 / 2 + 4 / 4 + 3 / 8) / (7 / 8)
    assert (average.named_averages()["0.weight"] - expected).abs().max() < 1e-6
    expected = sum(k / 2 ** (6 - k) for k in range(6)) / (1 - 0.5**6)
    assert (average.named_averages()["1.weight"] - expected).abs().max() < 1e-6


def test_added_parameters_are_corrected_from_their_own_first_step():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    average = ExponentialMovingAverage([("first", first)], 0.5)
    for step in range(1, 6):
        if step == 4:
            average.add_parameters([("second", second)])
        with torch.no_grad():
            first.fill_(float(step))
            second.fill_(float(step))
        average.update()
    assert abs(average.named_averages()["second"].item() - (5 / 2 + 4 / 4) / (3 / 4)) < 1e-6
    with pytest.raises(ValueError, match="averaged already: first"):
        average.add_parameters([("first", first)])


def test_buffers_are_handed_on_averaged_or_left():
    for buffers in ("copy", "average", "ignore"):
        model = small_model()
        average = ExponentialMovingAverage(model, 0.5, buffers=buffers)
        for step in range(1, 4):
            model[1].running_mean.fill_(float(step))
            model[1].num_batches_tracked.fill_(step)
            average.update()
        other = small_model()
        other[1].running_mean.fill_(-1.0)
        average.copy_to(other)
        expected = {"copy": 3.0, "average": (3 / 2 + 2 / 4 + 1 / 8) / (7 / 8), "ignore": -1.0}
        assert (other[1].running_mean - expected[buffers]).abs().max() < 1e-6
        # An integer is copied, and never averaged.
        assert other[1].num_batches_tracked == (0 if buffers == "ignore" else 3)


def test_parameters_are_chosen_by_name():
    model = small_model()
    average = ExponentialMovingAverage(
        model, 0.5, include="*.weight", exclude=lambda n: n[0] == "1"
    )
    assert set(k.partition("/")[2] for k in average.state_dict()["tensors"]) == {
        "0.weight",
        "4.weight",
    }
    assert set(average.named_averages()) == {n for n, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="`include`: no parameter matches 'wieght'"):
        ExponentialMovingAverage(model, 0.5, include=["*.weight", "wieght"])


# --- dtypes ---------------------------------------------------------------------------------------


def test_an_average_of_bfloat16_weights_moves():
    # 1.0 towards 1.0625 at 0.999: exactly 1.03952 after 1,000 steps, in bfloat16 to the nearest 1.
    exact = 1.0625 - 0.0625 * 0.999**1000
    for options, tolerance in (
        ({}, 1e-5),
        ({"compensated": True}, 1e-7),
        ({"dtype": torch.float64}, 1e-12),
        # 4 standard errors of the mean of 4,096 numbers one unit in the last place apart.
        ({"dtype": torch.bfloat16}, 4 * 0.5 * 2**-7 / 64),
    ):
        parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        average = ExponentialMovingAverage([parameter], 0.999, bias_correction=False, **options)
        with torch.no_grad():
            parameter.fill_(1.0625)
        for _ in range(1000):
            average.update()
        assert abs(value(average).double().mean() - exact) < tolerance
    still = ExponentialMovingAverage(
        [parameter], 0.999, dtype=torch.bfloat16, stochastic_rounding=False, bias_correction=False
    )
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(100):
        still.update()
    assert (value(still) == 1.0625).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_the_model_keeps_its_dtype_and_the_average_has_at_least_float32(dtype):
    model = nn.Linear(3, 2).to(dtype)
    average = ExponentialMovingAverage(model, 0.5)
    average.update()
    wanted = dtype if dtype.itemsize > 2 else torch.float32
    assert {t.dtype for t in average.named_averages().values()} == {wanted}
    with average.applied():
        assert model.weight.dtype == dtype
    average.copy_to()
    assert model.weight.dtype == dtype


def test_shadows_keep_the_strides_of_their_weights():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    average = ExponentialMovingAverage(model, 0.5)
    assert average.named_averages()["weight"].stride() == model.weight.stride()


# --- in the place of the weights ------------------------------------------------------------------


def moved_model(steps=5, **options):
    model = small_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    average = ExponentialMovingAverage(model, 0.9, **options)
    average.attach(optimiser)
    train(model, optimiser, steps)
    return model, average


def test_applied_gives_the_weights_back_bit_for_bit_whatever_happens_inside():
    model, average = moved_model()
    raw = bits(model)
    with average.applied() as inside:
        assert inside is model
        assert same(average.named_averages(), {n: p.detach() for n, p in model.named_parameters()})
        model.train()(torch.randn(9, 4))  # moves the buffers of the batch norm
    assert same(raw, bits(model))
    with pytest.raises(RuntimeError, match="from inside"), average.applied():
        raise RuntimeError("from inside")
    assert same(raw, bits(model))


def test_contexts_nest_and_the_swap_done_twice_is_the_identity():
    model = small_model()
    average = ExponentialMovingAverage(model, {"fast": 0.5, "slow": 0.99}, bias_correction=False)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    average.update()
    raw = bits(model)
    with average.applied("slow"):
        slow = bits(model)
        with average.applied("fast"):
            assert not same(bits(model), slow)
        assert same(bits(model), slow)
    assert same(bits(model), raw)
    average.swap_("slow")
    assert same(bits(model), slow)
    average.swap_()
    assert same(bits(model), raw)


def test_no_update_while_an_average_is_in_the_place_of_the_weights():
    _, average = moved_model()
    with average.applied(), pytest.raises(RuntimeError, match="leave `applied"):
        average.update()
    average.swap_()
    with pytest.raises(RuntimeError, match="call `swap_"):
        average.update()
    average.swap_()
    average.update()


def test_an_averaged_model_stands_alone():
    model, average = moved_model()
    alone = average.averaged_model()
    assert same(average.named_averages(), {n: p.detach() for n, p in alone.named_parameters()})
    train(model, torch.optim.SGD(model.parameters(), lr=1.0), 3)
    average.update()
    assert not same(average.named_averages(), {n: p.detach() for n, p in alone.named_parameters()})
    with pytest.raises(ValueError, match="made of parameters"):
        ExponentialMovingAverage([torch.ones(1)]).averaged_model()


def test_a_replaced_parameter_is_followed_and_a_changed_shape_is_an_error():
    model = nn.Linear(2, 2)
    average = ExponentialMovingAverage(model, 0.0)
    model.weight = nn.Parameter(torch.full((2, 2), 5.0))
    average.update()
    assert (average.named_averages()["weight"] == 5).all()
    model.weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match=r"weight had shape \(2, 2\) and has \(3, 2\) now"):
        average.update()


# --- files ----------------------------------------------------------------------------------------

RESUMED = {
    "plain": {},
    "several": {"decay": {"a": 0.9, "b": wa.PowerFunction(0.1), "c": wa.Uniform(start=30)}},
    "compensated": {"compensated": True},
    "rounded": {"dtype": torch.bfloat16, "seed": 7},
    "spaced": {"update_every": 7, "start_step": 3},
    "buffers": {"buffers": "average"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_100_steps_saved_and_100_more_are_200_bit_for_bit(name, tmp_path):
    options = RESUMED[name]
    states = []
    for stop in (None, 100):
        model = small_model()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        average = ExponentialMovingAverage(model, **options)
        average.attach(optimiser)
        train(model, optimiser, 100, seed=0)
        if stop:
            average.save(tmp_path / "average.safetensors")
            average = ExponentialMovingAverage(model, **options)
            optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
            average.attach(optimiser)
            assert average.load(tmp_path / "average.safetensors") == []
        train(model, optimiser, 100, seed=1)
        states.append(average.state_dict())
    assert json.dumps(states[0]["about"]) == json.dumps(states[1]["about"])
    assert same(states[0]["tensors"], states[1]["tensors"])


def test_averages_are_saved_under_the_models_own_names(tmp_path):
    model, average = moved_model()
    for wrapped in (model, torch.compile(model, backend="eager"), nn.DataParallel(model)):
        average = ExponentialMovingAverage(wrapped, 0.9)
        average.update()
        average.save_averages(tmp_path / "average.safetensors")
        plain = small_model()
        plain.load_state_dict(load_file(tmp_path / "average.safetensors"))  # strict
        assert plain[0].weight.equal(average.named_averages()["0.weight"])
        assert plain[1].running_mean.equal(model[1].running_mean)


def test_a_compiled_submodule_keeps_its_plain_names():
    model = small_model()
    model[4] = torch.compile(model[4], backend="eager")
    assert "4.weight" in ExponentialMovingAverage(model).named_averages()


def test_a_state_of_another_kind_is_refused_before_anything_changes(tmp_path):
    model, average = moved_model()
    state = copy.deepcopy(average.state_dict())
    other = ExponentialMovingAverage(model, 0.99)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"other profiles.*alpha=0\.9\).*alpha=0\.99"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="other options"):
        ExponentialMovingAverage(model, 0.9, seed=4).load_state_dict(state)
    bigger = nn.Sequential(*small_model(), nn.Linear(2, 2))
    with pytest.raises(KeyError, match=r"no 5\.weight, 5\.bias.*2 and 0 in all"):
        ExponentialMovingAverage(bigger, 0.9).load_state_dict(state)
    narrow = ExponentialMovingAverage(model, 0.9, dtype=torch.bfloat16)
    state["about"]["options"]["stochastic_rounding"] = True
    with pytest.raises(TypeError, match=r"torch\.float32 in the state, which torch\.bfloat16"):
        narrow.load_state_dict(state)
    assert same(before["tensors"], other.state_dict()["tensors"])
    assert before["about"] == other.state_dict()["about"]
    (tmp_path / "cut").write_bytes(b"1234")
    with pytest.raises(ValueError, match="no safetensors file"):
        average.load(tmp_path / "cut")
    average.save_averages(tmp_path / "plain")
    with pytest.raises(ValueError, match="was not written by `save`"):
        average.load(tmp_path / "plain")


def test_a_looser_load_takes_what_is_in_both():
    model, average = moved_model()
    bigger = nn.Sequential(*copy.deepcopy(model), nn.Linear(2, 2))
    wide = ExponentialMovingAverage(bigger, 0.9, dtype=torch.float64)
    assert wide.load_state_dict(average.state_dict(), strict=False) == ["5.weight", "5.bias"]
    assert wide.step == average.step
    assert wide.named_averages()["0.weight"].equal(average.named_averages()["0.weight"].double())
    wide.update()
    assert wide.named_averages()["5.weight"].equal(bigger[5].weight.double())


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    _, average = moved_model()
    average.save(tmp_path / "average")
    before = (tmp_path / "average").read_bytes()

    def no_space(descriptor):
        raise OSError("no space left on device")

    average.update()
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        average.save(tmp_path / "average")
    assert (tmp_path / "average").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["average"]


# --- several processes ----------------------------------------------------------------------------

TWO_RANKS = """
import torch
from torch import distributed, nn
from cln_tutorial.weight_averaging import ExponentialMovingAverage

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(64, 64).bfloat16())
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
average = ExponentialMovingAverage(model, 0.999, dtype=torch.bfloat16)
average.attach(optimiser)
generator = torch.Generator().manual_seed(rank)
for _ in range(20):
    optimiser.zero_grad()
    model(torch.randn(8, 64, generator=generator).bfloat16()).square().mean().backward()
    optimiser.step()
average.check_sync()
assert set(average.named_averages()) == {"weight", "bias"}
other = ExponentialMovingAverage(model, 0.999, dtype=torch.bfloat16, seed=rank)
other.step = 0
for _ in range(20):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
    other.update()
try:
    other.check_sync()
except RuntimeError as error:
    assert "differ between ranks" in str(error)
else:
    raise AssertionError("ranks with other noise were called equal")
distributed.destroy_process_group()
"""


def test_two_ranks_hold_the_same_bits_without_speaking_of_it(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29517", str(script)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout + child.stderr


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, r"must lie in \[0, 1\); got 1.0"),
        ({"decay": -0.1}, ValueError, r"must lie in \[0, 1\); got -0.1"),
        ({"decay": math.nan}, ValueError, "got nan"),
        ({"decay": "0.9"}, TypeError, r"a number in \[0, 1\); got '0.9'"),
        ({"decay": 0.9, "half_life": 10}, ValueError, "`decay` and `half_life`, not both"),
        ({"decay": []}, ValueError, "at least one average"),
        ({"decay": [0.9, 0.9]}, ValueError, "an average twice"),
        ({"half_life": 0}, ValueError, "more than 0; got 0"),
        ({"update_every": 0}, ValueError, "`update_every` must be an integer of at least 1; got 0"),
        ({"start_step": -1}, ValueError, "`start_step` must be an integer of at least 0"),
        ({"buffers": "keep"}, ValueError, r"`buffers` must be one of .* got 'keep'"),
        ({"dtype": torch.int32}, ValueError, "real floating dtype; got torch.int32"),
        ({"dtype": torch.bfloat16, "compensated": True}, ValueError, "for float32 and float64"),
        ({"stochastic_rounding": True}, ValueError, "for averages in 16 bits; `dtype` is auto"),
        ({"backend": "cuda"}, ValueError, "`backend` must be 'auto' or one of"),
    ],
)
def test_bad_options_are_refused(options, error, message, unchecked):
    with pytest.raises(error, match=message):
        ExponentialMovingAverage(nn.Linear(2, 2), **options)


def test_bad_models_are_refused(unchecked):
    with pytest.raises(ValueError, match="no floating parameter to average: 0 tensors"):
        ExponentialMovingAverage(nn.ReLU())
    with pytest.raises(TypeError, match="a module or a list of parameters; got a tensor"):
        ExponentialMovingAverage(torch.ones(3))
    with pytest.raises(TypeError, match="must hold tensors"):
        ExponentialMovingAverage([3.0])
    whole = torch.ones(10)
    with pytest.raises(ValueError, match="a and b overlap in memory"):
        ExponentialMovingAverage([("a", whole[:6]), ("b", whole[5:])])
    ExponentialMovingAverage([("a", whole[:5]), ("b", whole[5:])])
    average = ExponentialMovingAverage(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="none of the parameters"):
        average.attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0))


def test_steps_go_forward(unchecked):
    average = ExponentialMovingAverage(nn.Linear(2, 2))
    average.update(5)
    with pytest.warns(UserWarning, match="step 5 has been averaged already"):
        average.update(5)
    with pytest.raises(ValueError, match="`step` must grow; got 4 after 5"):
        average.update(4)
    assert average.step == 5


def test_an_average_must_be_named_where_there_are_several():
    average = ExponentialMovingAverage(nn.Linear(2, 2), [0.9, 0.99])
    with pytest.raises(ValueError, match=r"`which` must be one of 0\.9, 0\.99; got None"):
        average.named_averages()
    with pytest.raises(ValueError, match="got 'slow'"), average.applied("slow"):
        pass


def test_a_weight_that_is_not_finite_is_propagated_skipped_or_an_error():
    for choice in ("propagate", "skip", "raise"):
        model = nn.Linear(2, 2)
        average = ExponentialMovingAverage(model, 0.5, on_nonfinite=choice)
        average.update()
        kept = {n: t.clone() for n, t in average.named_averages().items()}
        with torch.no_grad():
            model.bias[0] = math.nan
        if choice == "raise":
            with pytest.raises(FloatingPointError, match="bias is not finite at step 2"):
                average.update()
        else:
            average.update()
        assert same(kept, average.named_averages()) == (choice != "propagate")


def test_another_model_must_have_the_names_and_shapes():
    model, average = moved_model()
    with pytest.raises(KeyError, match=r"`model` has no 4\.weight, 4\.bias"):
        average.copy_to(model[:4])
    other = nn.Sequential(*small_model()[:4], nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"4\.weight has shape \(3, 8\) in `model`, \(2, 8\) here"):
        average.copy_to(other)


def test_the_representation_says_what_the_averages_are_and_cost():
    text = repr(ExponentialMovingAverage(nn.Linear(512, 512), {"slow": 0.9999}))
    assert "slow: ConstantDecay(alpha=0.9999)" in text
    assert "262,656 weights in float32, 1.0 MiB per average" in text


# --- the experiment -------------------------------------------------------------------------------


@pytest.fixture
def as_experiments_run():
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_an_experiment_that_broke_off_takes_its_averages_up_bit_for_bit(
    tmp_path, monkeypatch, as_experiments_run
):
    variants = ("constant rate", "digits, batch norm")
    quick = dataclasses.replace(experiment.QUICK, variants=variants)
    small = dataclasses.replace(experiment.EXPERIMENT, quick=quick)

    def record(name):
        places = ["--output", str(tmp_path / name), "--state", str(tmp_path / "state")]
        harness.main(small, ["--quick", "--workers", "1", "--quiet", *places])
        return json.loads((tmp_path / name).read_text())["figures"]

    undisturbed = record("whole")
    saves, save = [], harness.Checkpoint._save

    def save_and_stop(checkpoint):
        save(checkpoint)
        saves.append(checkpoint.step)
        if len(saves) in (2, 5, 11):
            raise KeyboardInterrupt

    monkeypatch.setattr(harness.Checkpoint, "_save", save_and_stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            record("broken")
    assert not (tmp_path / "broken").exists()
    assert record("broken") == undisturbed
