"""Energies as models, and their training: what is learnt, what a kill costs, and what stops it."""

import io
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cln_tutorial.energy_models.buffer import ReplayBuffer
from cln_tutorial.energy_models.losses import (
    contrastive_divergence_loss,
    denoising_score_matching_loss,
)
from cln_tutorial.energy_models.model import EnergyModel
from cln_tutorial.energy_models.samplers import langevin_sample
from cln_tutorial.energy_models.trainer import DivergenceGuard, EnergyTrainer, History


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=6612):
    return torch.randn(*shape, generator=seeded(seed))


class Well(nn.Module):
    """E = theta |x|^2 / 2, the exponential family where everything is known."""

    def __init__(self, theta=1.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))
        self.base = None

    def forward(self, x):
        return self.theta * x.square().sum(1) / 2


def network(dim=2, seed=0, *extra):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(dim, 8), *extra, nn.SiLU(), nn.Linear(8, 1))
    return EnergyModel.from_net(net, mean=torch.full((dim,), 0.5), std=0.7)


def trainer_of(model, objective="cd", lr=0.05, **options):
    options = dict(sampler=plus_one, batch_size=4, seed=0, ema=None) | options
    if objective == "dsm":
        options = dict(data_noise=0.3) | options
    if objective == "pcd":
        dim = 1 if isinstance(model, Well) else 2
        options = dict(buffer=ReplayBuffer(11, (dim,), seed=1)) | options
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    return EnergyTrainer(model, optimiser, objective=objective, **options)


def plus_one(energy, x0, *, seed):
    return x0 + 1


class Spy:
    """A sampler that writes down what it was given."""

    def __init__(self, move=plus_one):
        self.move, self.starts, self.seeds, self.training = move, [], [], []

    def __call__(self, energy, x0, *, seed):
        self.starts.append(x0.clone())
        self.seeds.append(seed)
        self.training.append([module.training for module in energy.modules()])
        return self.move(energy, x0, seed=seed)


langevin = partial(langevin_sample, step_size=0.05, n_steps=3)


# --- the model ------------------------------------------------------------------------------------


def test_the_energy_is_that_of_the_network_plus_a_parabola():
    model, x = network(), normal(5, 2)
    expected = model.net(x).squeeze(1) + (x - 0.5).square().sum(1) / (2 * 0.7**2)
    torch.testing.assert_close(model(x), expected)
    alone = EnergyModel.from_net(model.net, base=None)
    torch.testing.assert_close(alone(x), model.net(x).squeeze(1))


def test_a_network_of_zeros_leaves_the_density_of_the_base():
    model, x = network(3), normal(6, 3)
    for parameter in model.net.parameters():
        nn.init.zeros_(parameter)
    expected = torch.distributions.Normal(0.5, 0.7).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x, model.base.log_z()), expected)
    torch.testing.assert_close(model.score(x), (0.5 - x) / 0.49)


def test_the_score_is_minus_the_gradient_and_leaves_the_parameters_alone():
    model, x = network(), normal(5, 2).requires_grad_()
    (expected,) = torch.autograd.grad(-model(x).sum(), x)
    with torch.no_grad():
        score = model.score(x)
    torch.testing.assert_close(score, expected)
    assert not score.requires_grad
    assert x.grad is None
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_samples_start_at_exact_samples_of_the_base_and_repeat_with_the_seed():
    model = network()
    start = model.sample(20_000, step_size=0.1, n_steps=0, seed=0)
    # Mean .5 and variance .49 with 40,000 numbers: 5 standard errors.
    assert abs(start.mean().item() - 0.5) < 5 * 0.7 / math.sqrt(40_000)
    assert abs(start.var().item() - 0.49) < 5 * 0.49 * math.sqrt(2 / 40_000)
    state = torch.get_rng_state()
    first, second = (model.sample(4, step_size=0.01, n_steps=3, seed=1) for _ in range(2))
    assert torch.equal(first, second)
    keyed = [model.sample(4, step_size=0.01, n_steps=3, generator=seeded()) for _ in range(2)]
    assert torch.equal(*keyed)
    assert torch.equal(torch.get_rng_state(), state)
    x0 = normal(4, 2)
    assert torch.equal(
        model.sample(4, 0.01, 3, x0=x0, seed=1), langevin_sample(model, x0, 0.01, 3, seed=1)
    )


def test_sampling_is_in_evaluation_mode_and_every_layer_gets_its_own_mode_back():
    model = network(2, 0, nn.BatchNorm1d(8), nn.Dropout(0.5))
    model.train()
    model.net[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.net.register_forward_hook(lambda module, *_: seen.append(module[2].training))
    mean = model.net[1].running_mean.clone()
    first, second = (model.sample(3, 0.01, 2, seed=0) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert seen
    assert not any(seen)
    assert torch.equal(model.net[1].running_mean, mean)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="step_size"):
        model.sample(3, -0.01, 2, seed=0)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_spectral_normalisation_holds_the_largest_singular_value_at_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 1))
    nn.init.normal_(net[0].weight, std=3.0)
    model = EnergyModel.from_net(net, spectral_norm=True, mean=torch.zeros(6))
    for _ in range(200):  # power iteration, one step per forward pass in training
        model(torch.zeros(1, 6))
    model.eval()
    for layer in (net[0], net[2]):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)


def test_the_model_compiles_without_a_break(child_output):
    code = """
import torch
from cln_tutorial.energy_models.model import EnergyModel
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
model = EnergyModel.from_net(net, mean=torch.zeros(2))
x = torch.randn(5, 2)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), model(x))
"""
    child_output(code)


def test_wrong_arguments_of_the_model_are_named(unchecked):
    net = nn.Linear(2, 1)
    for error, word, call in [
        (ValueError, "`base` must be", lambda: EnergyModel.from_net(net, base="uniform")),
        (ValueError, "`mean` must be given", lambda: EnergyModel.from_net(net)),
        (
            ValueError,
            "`std` must be",
            lambda: EnergyModel.from_net(net, mean=torch.zeros(2), std=0.0),
        ),
        (ValueError, "`x0` must be given", lambda: EnergyModel(net).sample(3, 0.1, 1)),
        (
            ValueError,
            "`x0` must have `n` = 3",
            lambda: EnergyModel(net).sample(3, 0.1, 1, x0=torch.zeros(2, 2)),
        ),
        (
            ValueError,
            "`seed` or `generator`",
            lambda: network().sample(3, 0.1, 1, seed=0, generator=seeded()),
        ),
        (TypeError, "`x` must be", lambda: network().score(torch.zeros(3, 2).long())),
        (ValueError, "one value per point", lambda: EnergyModel(nn.Linear(2, 2))(torch.ones(3, 2))),
    ]:
        with pytest.raises(error, match=word):
            call()


# --- what is learnt -------------------------------------------------------------------------------


def test_persistent_chains_learn_the_precision_whose_chain_has_the_variance_of_the_data():
    # A chain of step h has variance 1 / (theta (1 - h theta / 2)); where that is v, PCD stops.
    v, h = 1.0, 0.3
    theta = (1 - math.sqrt(1 - 2 * h / v)) / h  # 1.225, not 1
    data = normal(2000, 1)
    data *= math.sqrt(v) / data.square().mean().sqrt()
    model = Well(0.6)
    buffer = ReplayBuffer(2000, (1,), init=lambda n, g: torch.zeros(n, 1), reinit_prob=0.0, seed=0)
    trainer = trainer_of(
        model,
        "pcd",
        lr=0.1,
        buffer=buffer,
        sampler=partial(langevin_sample, step_size=h, n_steps=2),
        batch_size=2000,
        ema=0.98,
    )
    history = trainer.fit(data, max_steps=400, progress=False)
    # The mean of x^2 / 2 over 2,000 chains has the deviation .0158, times 1.17 as each iteration
    # leaves a correlation of .16; the average sees 99 of them, and the slope is (1 - h theta) / 2.
    error = 0.0158 * 1.17 / math.sqrt(99) / 0.316
    with trainer.average.applied():
        assert abs(model.theta.item() - theta) < 5 * error
    # Times theta, the gap is that difference of means.
    assert abs(sum(history.gap[-100:]) / 100) < 5 * 0.0158 * 1.17 * theta / math.sqrt(100)
    assert len(history) == 400


def test_denoising_learns_the_precision_of_the_noisy_data():
    v, sigma = 2.0, 0.5
    data = normal(4000, 1)
    data *= math.sqrt(v) / data.square().mean().sqrt()
    model = Well(0.1)
    trainer = trainer_of(
        model, "dsm", lr=0.5, data_noise=sigma, sampler=None, batch_size=1000, ema=0.98
    )
    history = trainer.fit(data, max_steps=300, progress=False)
    # Per point the gradient has the variance sigma^2 (v + sigma^2) v / (v + sigma^2) = .5 and the
    # slope sigma^2 (v + sigma^2) = .5625; the average sees 99 batches of 1000.
    error = math.sqrt(0.5 / 99_000) / 0.5625
    with trainer.average.applied():
        assert abs(model.theta.item() - 1 / (v + sigma**2)) < 5 * error
    assert all(math.isnan(e) for e in history.e_pos + history.e_neg)
    best = v / (2 * (v + sigma**2))
    # Half a square of variance v / (v + sigma^2) = .889, over 200,000 points.
    error = 0.889 / math.sqrt(2 * 200_000)
    assert abs(sum(history.loss[-200:]) / 200 - best) < 5 * error


def test_the_first_loss_is_that_of_the_batch_its_noise_and_its_chains_with_the_penalty():
    model, data = network(), normal(4, 2)
    spy = Spy()
    trainer = trainer_of(model, "cd", sampler=spy, data_noise=0.2, reg=0.3)
    before = [p.detach().clone() for p in model.parameters()]
    history = trainer.fit(data, max_steps=1, progress=False)
    for p, value in zip(model.parameters(), before, strict=True):
        p.data.copy_(value)
    x = spy.starts[0]
    parts = contrastive_divergence_loss(model, x, x + 1, reg=0.3, return_info=True)
    assert history.loss[0] == pytest.approx(parts.loss.item(), rel=1e-6)
    assert history.e_pos[0] == pytest.approx(parts.e_pos.mean().item(), rel=1e-6)
    assert history.e_neg[0] == pytest.approx(parts.e_neg.mean().item(), rel=1e-6)
    assert history.gap[0] == history.e_pos[0] - history.e_neg[0]
    assert parts.reg > 0


# --- the chains -----------------------------------------------------------------------------------


def test_chains_are_written_back_after_they_have_moved():
    buffer = ReplayBuffer(11, (1,), init=lambda n, g: torch.zeros(n, 1), reinit_prob=0, seed=0)
    spy = Spy()
    trainer = trainer_of(Well(), "pcd", sampler=spy, buffer=buffer, max_grad_norm=1e-6)
    trainer.fit(normal(8, 1), max_steps=30, progress=False)
    # Each visit added 1, and every visit started where the last one had ended.
    assert buffer.states.sum().item() == 30 * 4
    assert buffer.states.min() > 0
    assert torch.cat(spy.starts).max() > 3


def test_contrastive_chains_start_at_the_data_and_short_runs_at_the_base():
    data = 10 + normal(8, 2)
    spy = Spy()
    trainer_of(network(), "cd", sampler=spy).fit(data, max_steps=2, progress=False)
    starts = torch.cat(spy.starts)
    assert torch.equal(starts.sort(0).values, data.sort(0).values)
    spy = Spy()
    trainer_of(network(), "short_run", sampler=spy, batch_size=4).fit(
        data, max_steps=500, progress=False
    )
    starts = torch.cat(spy.starts)
    assert abs(starts.mean().item() - 0.5) < 5 * 0.7 / math.sqrt(4000)
    assert abs(starts.std().item() - 0.7) < 5 * 0.7 / math.sqrt(2 * 4000)


def test_every_step_has_another_seed_and_the_same_run_the_same_ones():
    runs = []
    for _ in range(2):
        spy = Spy()
        trainer_of(network(), "pcd", sampler=spy).fit(normal(8, 2), max_steps=50, progress=False)
        assert len(set(spy.seeds)) == 50
        runs.append(spy.seeds)
    assert runs[0] == runs[1]


def test_each_datum_is_seen_once_in_an_epoch_and_epochs_differ_in_order():
    data, spy = torch.arange(10.0).unsqueeze(1), Spy()
    trainer_of(Well(), "cd", sampler=spy, max_grad_norm=1e-9).fit(data, max_steps=6, progress=False)
    for epoch in range(3):
        seen = torch.cat(spy.starts[2 * epoch : 2 * epoch + 2])
        assert len(seen.unique()) == 8  # the rest of 2 fills no batch of 4
    assert not torch.equal(torch.cat(spy.starts[:2]), torch.cat(spy.starts[2:4]))
    assert len(torch.cat(spy.starts).unique()) > 8


def test_the_noise_on_the_data_has_the_deviation_that_was_asked_for():
    spy = Spy()
    trainer = trainer_of(Well(), "cd", sampler=spy, data_noise=0.3, batch_size=5000)
    trainer.fit(torch.zeros(5000, 1), max_steps=2, progress=False)
    for noise in spy.starts:
        assert abs(noise.var().item() - 0.09) < 5 * 0.09 * math.sqrt(2 / 5000)
    assert not torch.equal(*spy.starts)


def test_layers_are_evaluated_while_chains_run_and_get_their_mode_back_after_an_error_too():
    model = network(2, 0, nn.BatchNorm1d(8), nn.Dropout(0.5)).train()
    model.net[2].eval()
    modes = [module.training for module in model.modules()]
    spy = Spy()
    trainer_of(model, "cd", sampler=spy).fit(normal(8, 2), max_steps=2, progress=False)
    assert not any(flag for flags in spy.training for flag in flags)
    assert [module.training for module in model.modules()] == modes
    assert model.net[1].num_batches_tracked == 4  # the losses saw data and samples, twice

    def broken(energy, x0, *, seed):
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        trainer_of(model, "cd", sampler=broken).fit(normal(8, 2), max_steps=1, progress=False)
    assert [module.training for module in model.modules()] == modes


# --- the steps of the optimiser -------------------------------------------------------------------


def test_gradients_are_clipped_by_their_common_norm_and_recorded_before():
    model = network()
    trainer = trainer_of(model, "cd", lr=1.0, max_grad_norm=0.01)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    history = trainer.fit(normal(8, 2), max_steps=1, progress=False)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert history.grad_norm[0] > 0.1
    free = network()
    history = trainer_of(free, "cd", lr=1.0, max_grad_norm=None).fit(
        normal(8, 2), max_steps=1, progress=False
    )
    moved = torch.cat([p.detach().flatten() for p in free.parameters()]) - before
    assert moved.norm().item() == pytest.approx(history.grad_norm[0], rel=1e-4)


def test_the_schedule_makes_one_step_after_each_of_the_optimiser():
    model = network()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    trainer = EnergyTrainer(
        model, optimiser, objective="cd", sampler=plus_one, batch_size=4, scheduler=schedule, seed=0
    )
    history = trainer.fit(normal(8, 2), max_steps=4, progress=False)
    assert history.lr == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_the_average_is_the_exponential_one_of_the_weights_after_each_step():
    model, seen = Well(), []
    trainer = trainer_of(model, "cd", ema=0.9)
    trainer.fit(
        normal(8, 1),
        max_steps=6,
        progress=False,
        callback=lambda trainer: seen.append(model.theta.item()),
    )
    weights = [0.9 ** (5 - i) for i in range(6)]
    expected = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
    with trainer.average.applied():
        assert model.theta.item() == pytest.approx(expected, rel=1e-6)
    assert model.theta.item() == pytest.approx(seen[-1])


def test_a_loader_is_read_again_and_again_and_its_batches_may_be_tuples():
    data = normal(10, 2)
    loader = DataLoader(TensorDataset(data, torch.arange(10)), batch_size=5)
    spy = Spy()
    trainer_of(network(), "cd", sampler=spy).fit(loader, max_steps=3, progress=False)
    expected = [data[:5], data[5:], data[:5]]
    assert all(torch.equal(a, b) for a, b in zip(spy.starts, expected, strict=True))
    with pytest.raises(ValueError, match="read again"):
        trainer_of(network(), "cd").fit([], max_steps=3, progress=False)


def test_steps_count_in_all_and_seconds_in_the_call():
    trainer = trainer_of(network(), "cd")
    data = normal(8, 2)
    for limit, expected in [(3, 3), (5, 5), (5, 5)]:
        history = trainer.fit(data, max_steps=limit, progress=False)
        assert trainer.step == expected == len(history.loss)
    assert isinstance(history, History)
    assert trainer.fit(data, max_seconds=0, progress=False) is history
    assert trainer.step == 5
    trainer.fit(data, max_seconds=0.05, progress=False)
    assert trainer.step > 5
    assert history.seconds > 0.05


def test_the_bar_is_silent_when_asked(capfd):
    trainer_of(network(), "cd").fit(normal(8, 2), max_steps=2, progress=False)
    assert capfd.readouterr() == ("", "")
    trainer_of(network(), "cd").fit(normal(8, 2), max_steps=60)
    assert "60/60" in capfd.readouterr().err


# --- killed and resumed ---------------------------------------------------------------------------


def resumable(objective, seed):
    model = network(2, seed, nn.BatchNorm1d(8), nn.Dropout(0.2))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    options = dict(sampler=langevin, data_noise=0.1, batch_size=4, ema=0.9, reg=0.01)
    if objective == "pcd":
        options["buffer"] = ReplayBuffer(9, (2,), policy="ring", reinit_prob=0.2, seed=seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 20)
    return EnergyTrainer(
        model, optimiser, objective=objective, scheduler=schedule, seed=seed, **options
    )


def without_time(state):
    return state | {"history": state["history"] | {"seconds": 0}}


def assert_same(a, b):
    """The same bits in nested dictionaries and lists; NaN is the same as NaN."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b or (a != a and b != b), (a, b)


@pytest.mark.parametrize("objective", ["pcd", "cd", "short_run", "dsm"])
def test_a_run_that_is_killed_resumes_to_the_same_bits(objective):
    data = normal(10, 2)  # of which a batch of 4 leaves 2
    torch.manual_seed(3)  # dropout draws from the global generator
    whole = resumable(objective, 0)
    saved = {}

    def save(trainer):
        if trainer.step == 5:
            file = io.BytesIO()
            torch.save(trainer.state_dict(), file)
            saved["bytes"], saved["rng"] = file.getvalue(), torch.get_rng_state()

    whole.fit(data, max_steps=13, callback=save, progress=False)
    resumed = resumable(objective, 17)
    resumed.load_state_dict(torch.load(io.BytesIO(saved["bytes"]), weights_only=True))
    assert resumed.step == 5
    torch.set_rng_state(saved["rng"])
    history = resumed.fit(data, max_steps=13, progress=False)
    assert len(history) == 13
    assert_same(without_time(resumed.state_dict()), without_time(whole.state_dict()))


def test_a_trainer_draws_nothing_from_the_global_generator():
    trainer = trainer_of(network(), "pcd", data_noise=0.1, sampler=langevin)
    state = torch.get_rng_state()
    trainer.fit(normal(8, 2), max_steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_state_is_a_copy_of_the_history_and_the_order():
    trainer = trainer_of(network(), "cd")
    data = normal(8, 2)
    trainer.fit(data, max_steps=1, progress=False)
    state = trainer.state_dict()
    trainer.fit(data, max_steps=4, progress=False)
    assert len(state["history"]["loss"]) == 1
    other = trainer_of(network(), "cd")
    other.load_state_dict(state)
    other.fit(data, max_steps=3, progress=False)
    assert len(state["history"]["loss"]) == 1
    with pytest.raises(KeyError, match="buffer"):
        trainer_of(network(), "pcd").load_state_dict(state)


# --- the guard ------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """An energy that is a parabola until its call number `at`, and then `value`."""

    def __init__(self, at, value):
        super().__init__()
        self.well, self.at, self.value, self.calls = Well(), at, value, 0

    def forward(self, x):
        self.calls += 1
        energies = self.well(x)
        return energies * self.value if self.calls > self.at else energies


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
def test_the_guard_stops_at_energies_that_are_not_finite_or_beyond_the_bound(value):
    model = Poisoned(6, value)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    buffer = ReplayBuffer(11, (1,), seed=1)
    trainer = EnergyTrainer(
        model, optimiser, sampler=plus_one, buffer=buffer, batch_size=4, ema=0.5, seed=0
    )
    seen = []
    with pytest.raises(RuntimeError, match="the training diverges at step 4"):
        trainer.fit(
            normal(8, 1),
            max_steps=20,
            progress=False,
            callback=lambda _: seen.append((model.well.theta.item(), buffer.states.clone())),
        )
    assert trainer.step == 3 == len(trainer.history)
    assert all(math.isfinite(x) for x in trainer.history.loss + trainer.history.e_neg)
    # The average is in the model, and the chains are those of the last good step.
    thetas = [theta for theta, _ in seen]
    average = (0.25 * thetas[0] + 0.5 * thetas[1] + thetas[2]) / 1.75
    assert model.well.theta.item() == pytest.approx(average, rel=1e-6)
    assert torch.equal(buffer.states, seen[-1][1])


def test_without_restoring_the_model_keeps_the_weights_from_before_the_step():
    for options in (
        dict(guard=DivergenceGuard(restore=False), ema=0.5),
        dict(guard=DivergenceGuard(), ema=None),
    ):
        model, seen = Poisoned(4, math.nan), []
        trainer = trainer_of(model, "cd", **options)
        with pytest.raises(RuntimeError, match="diverges at step 3"):
            trainer.fit(
                normal(8, 1),
                max_steps=9,
                progress=False,
                callback=lambda _, seen=seen, model=model: seen.append(model.well.theta.item()),
            )
        assert model.well.theta.item() == seen[-1]


def test_the_guard_stops_at_a_gradient_that_is_not_finite_though_the_loss_is():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):  # finite at a scale of 0, where the root has no derivative
            return (self.scale * x.square().sum(1)).sqrt()

    trainer = trainer_of(Root(), "cd")
    with pytest.raises(RuntimeError, match="the norm of the gradient is"):
        trainer.fit(normal(8, 1), max_steps=1, progress=False)
    assert trainer.model.scale.item() == 0.0
    assert len(trainer.history) == 0


def test_the_guard_looks_at_denoising_too():
    trainer = trainer_of(Poisoned(2, math.nan), "dsm", sampler=None, data_noise=0.5)
    with pytest.raises(RuntimeError, match="diverges at step 3: the loss is nan"):
        trainer.fit(normal(8, 1), max_steps=9, progress=False)


def test_a_sampler_that_stops_counts_as_divergence():
    model = network()
    trainer = trainer_of(model, "cd", sampler=langevin, ema=0.5)
    trainer.fit(normal(8, 2), max_steps=3, progress=False)
    with trainer.average.applied():
        average = [p.detach().clone() for p in model.parameters()]
    model.net[0].weight.data[0, 0] = math.nan
    with pytest.raises(RuntimeError):
        trainer.fit(normal(8, 2), max_steps=4, progress=False)
    assert all(torch.equal(p, a) for p, a in zip(model.parameters(), average, strict=True))


def test_nothing_replaces_a_loss_of_nan_when_there_is_no_guard():
    trainer = trainer_of(Poisoned(2, math.nan), "cd", guard=None)
    history = trainer.fit(normal(8, 1), max_steps=3, progress=False)
    assert math.isfinite(history.loss[0])
    assert all(math.isnan(loss) for loss in history.loss[1:])


def test_a_large_step_of_the_optimiser_is_stopped_before_numbers_overflow():
    trainer = trainer_of(Well(), "cd", lr=1e3, max_grad_norm=None, guard=DivergenceGuard(100.0))
    with pytest.raises(RuntimeError, match=r"the largest energy is .*, beyond `max_energy` 100"):
        trainer.fit(normal(8, 1), max_steps=50, progress=False)
    assert all(math.isfinite(loss) for loss in trainer.history.loss)


def test_wrong_arguments_of_the_trainer_are_named(unchecked):
    well, data = Well(), normal(8, 1)
    buffer = ReplayBuffer(3, (1,), seed=0)
    for error, word, call in [
        (ValueError, "`objective` must be one of", lambda: trainer_of(well, "ml")),
        (ValueError, "`sampler` must be given", lambda: trainer_of(well, "cd", sampler=None)),
        (ValueError, "`data_noise` must be above 0", lambda: trainer_of(well, "dsm", data_noise=0)),
        (ValueError, "`buffer` goes with", lambda: trainer_of(well, "pcd", buffer=None)),
        (ValueError, "`buffer` goes with", lambda: trainer_of(well, "cd", buffer=buffer)),
        (ValueError, "more than the 3 chains", lambda: trainer_of(well, "pcd", buffer=buffer)),
        (ValueError, "`model.base`", lambda: trainer_of(well, "short_run")),
        (ValueError, "`reg` must", lambda: trainer_of(well, "cd", reg=-1)),
        (ValueError, "`max_grad_norm` must", lambda: trainer_of(well, "cd", max_grad_norm=0)),
        (ValueError, "`batch_size` must", lambda: trainer_of(well, "cd", batch_size=0)),
        (ValueError, "`max_energy` must", lambda: DivergenceGuard(max_energy=0)),
        (ValueError, "it must end", lambda: trainer_of(well).fit(data)),
        (ValueError, "fill a batch of 4", lambda: trainer_of(well).fit(data[:3], max_steps=1)),
        (TypeError, "`data` must be", lambda: trainer_of(well).fit(data.long(), max_steps=1)),
        (ValueError, "`max_steps` must", lambda: trainer_of(well).fit(data, max_steps=-1)),
    ]:
        with pytest.raises(error, match=word):
            call()


def test_the_loss_of_denoising_is_that_of_the_batch_with_the_noise_of_the_trainer():
    model, data = network(), normal(4, 2)
    trainer = trainer_of(model, "dsm", sampler=None, data_noise=0.3)
    generator = torch.Generator()
    generator.set_state(trainer.generator.get_state())
    rows = torch.randperm(4, generator=generator)
    expected = denoising_score_matching_loss(model, data[rows], 0.3, generator=generator)
    history = trainer.fit(data, max_steps=1, progress=False)
    assert history.loss[0] == pytest.approx(expected.item(), rel=1e-6)
