"""The experiment of the chapter: what it holds back, what it resumes, and the rulers it uses."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from torch import nn

from cln_tutorial import results
from cln_tutorial.energy_models.energies import GaussianEnergy
from cln_tutorial.energy_models.model import EnergyModel
from experiments import energy_models as experiment
from experiments import harness

pytestmark = pytest.mark.usefixtures("as_experiments_run")

QUICK = experiment.QUICK


def a_task(variant=experiment.BASELINES, settings=QUICK, folder=Path()):
    job = harness.Job(variant, 0, settings, "cpu", folder)
    return experiment.Task(job, experiment.data(settings))


def rows_of(x):
    return {row.tobytes() for row in x.numpy()}


def test_a_quick_run_has_every_figure_and_a_sheet_for_each_length(record):
    assert record["figures"].keys() == experiment.units(QUICK).keys()
    for row in experiment.LEARNT:
        sheets = record["texts"][f"sheets of {row}"]
        assert [len(each) for each in sheets] == [20 * 64] * len(QUICK.lengths)
    assert set(record["texts"]) == set(experiment.EXPERIMENT.texts)


def test_an_energy_without_a_finite_integral_has_no_likelihood():
    found = experiment.units(experiment.Settings())
    rows = {name.partition("-")[2].partition(".")[0] for name in found if "likelihood-" in name}
    every = {row for rows in experiment.ROWS.values() for row in rows}
    assert rows == every - {experiment.PAPER, experiment.IMAGES}


def test_every_likelihood_of_the_record_has_an_effective_size_of_10():
    figures = results.load("energy_models")["figures"]
    for row in experiment.NORMALISED:
        assert min(figures[f"likelihood-{row}.ESS"]["values"]) >= 10, row


# ---------------------------------------------------------------- the data


def test_settings_are_compared_on_training_images_and_no_held_out_one_is_seen():
    real, tuning = (
        experiment.data(replace(each, made=True))
        for each in (experiment.Settings(), experiment.TUNING)
    )
    assert [len(x) for x in (real.train, real.held_out)] == [1297, 500]
    assert [len(x) for x in (tuning.train, tuning.held_out)] == [1097, 200]
    assert torch.equal(torch.cat([tuning.held_out, tuning.train]), real.train)
    assert not rows_of(real.held_out) & rows_of(real.train)
    assert not set(experiment.TUNING.seeds) & set(experiment.Settings().seeds)


def test_the_labels_are_those_of_the_training_images():
    sides = experiment.data(QUICK)
    pixels, labels = load_digits(return_X_y=True)
    known = {
        (row / 16).astype(np.float32).tobytes(): label
        for row, label in zip(pixels, labels, strict=True)
    }
    for row, label in zip(sides.train.numpy(), sides.labels.tolist(), strict=True):
        assert known[row.tobytes()] == label


def test_noise_of_the_stated_size_is_on_the_noisy_images():
    sides = experiment.data(QUICK)
    noise = sides.noisy_held_out - sides.held_out.repeat(QUICK.copies, 1)
    # 64,000 normal numbers: five standard errors of their standard deviation
    assert abs(noise.std().item() - 0.1) < 5 * 0.1 / math.sqrt(2 * noise.numel())


def test_outside_images_are_what_their_names_say():
    sides = experiment.data(QUICK)
    upright = sides.held_out[7].reshape(8, 8)
    assert torch.equal(sides.outside["upside down"][7].reshape(8, 8), upright.flip(0))
    assert torch.equal(
        sides.outside["permuted pixels"].sort(1).values, sides.held_out.sort(1).values
    )
    torch.testing.assert_close(sides.outside["mean digit"][0], sides.train.mean(0))
    assert set(sides.outside) == set(experiment.OUTSIDE)


def test_the_area_of_clothes_keeps_their_mean():
    made = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(6612))
    small = experiment.clothes(True)
    assert small.shape == (50, 64)
    # 28 is no multiple of 8: areas overlap, and the corner is the mean of 4 x 4 pixels
    torch.testing.assert_close(small[:, 0], made[:, 0, :4, :4].mean((1, 2)))


@pytest.mark.data
def test_the_real_clothes_are_a_thousand_held_out_ones():
    small = experiment.clothes(False)
    assert small.shape == (1000, 64)
    assert 0 <= small.min() < small.max() <= 1


def test_a_sheet_is_read_back_to_the_sixteenth():
    x = torch.arange(17).repeat(64)[: 17 * 64].reshape(17, 64) / 16
    text = experiment.sheet(x + 0.02)
    assert [int(each, 36) for each in text] == (16 * x).flatten().int().tolist()
    assert set(experiment.sheet(torch.full((200, 64), 1.5))) == {"g"}
    assert len(experiment.sheet(torch.zeros(200, 64))) == 6400


# ---------------------------------------------------------------- the rulers


def test_the_gaussian_is_that_of_the_images_with_noise():
    task = a_task()
    base, x = task.base(), task.data.train.double().numpy()
    law = multivariate_normal(x.mean(0), np.cov(x.T) + 0.01 * np.eye(64))
    found = experiment.likelihood(task, base, base.log_z())
    # float32 energies of about 32 nats
    assert found == pytest.approx(law.logpdf(task.data.noisy_held_out.numpy()).mean(), abs=1e-3)


def test_a_mixture_has_the_density_that_scikit_learn_fitted_and_samples_from_it():
    x = experiment.data(QUICK).noisy_train[:600]
    mixture = experiment.Mixture(x, 3, 0)
    expected = mixture.fitted.score_samples(x.double().numpy())
    np.testing.assert_allclose(-experiment.in_parts(mixture, x), expected, atol=1e-2)
    samples = mixture.sample(20_000, torch.Generator().manual_seed(0))
    mean = (mixture.weights[:, None] * mixture.means.double()).sum(0)
    # five standard errors of each of 64 means; no standard deviation of a pixel is above 1/2
    assert (samples.double().mean(0) - mean).abs().max() < 5 * 0.5 / math.sqrt(20_000)
    # by the law of large numbers the mean log-density of samples of the fit is the same
    own = torch.from_numpy(mixture.fitted.sample(20_000)[0]).float()
    ours, theirs = (-experiment.in_parts(mixture, each) for each in (samples, own))
    error = math.sqrt((ours.var() + theirs.var()).item() / 20_000)
    assert abs(ours.mean() - theirs.mean()) < 5 * error


def test_a_kernel_estimate_is_the_mean_of_gaussians():
    x, y = (experiment.data(QUICK).noisy_train[a:b] for a, b in ((0, 300), (300, 420)))
    each = [multivariate_normal(centre, 0.09).logpdf(y.numpy()) for centre in x.double().numpy()]
    expected = logsumexp(each, axis=0) - math.log(300)
    # float32 sums of 64 squares, of the order of 100
    np.testing.assert_allclose(
        -experiment.in_parts(experiment.Kernel(x, 0.3), y), expected, atol=1e-3
    )


def test_sizes_of_baselines_are_chosen_without_held_out_images(monkeypatch):
    def chosen():
        found = dict(experiment.baselines(a_task()))[experiment.IMAGES]
        return {name: value for name, value in found.items() if name.startswith("chosen")}

    seen = chosen()
    blind = replace(experiment.data(QUICK), noisy_held_out=torch.zeros(4, 64))
    monkeypatch.setattr(experiment, "data", lambda settings: blind)
    monkeypatch.setattr(experiment, "of_samples", lambda *_: {})
    assert chosen() == seen


def test_more_energy_outside_is_an_area_of_1_and_less_is_0():
    task = a_task()
    far = {name: 9 + torch.rand(30, 64) for name in experiment.OUTSIDE}
    task = replace(task, data=replace(task.data, outside=far))

    def areas(energy):
        found = experiment.of_energies(task, "row", energy)
        return {found[f"outside-row.{name}"] for name in experiment.OUTSIDE}

    assert areas(lambda x: x.square().sum(1)) == {1.0}
    assert areas(lambda x: -x.square().sum(1)) == {0.0}


def test_training_images_are_their_own_samples():
    task = a_task(settings=replace(QUICK, sampled=500))
    found = experiment.of_samples(task, "row", task.data.train[:500])
    assert abs(found["samples-row.energy distance"]) < 0.01
    assert min(found["samples-row.precision"], found["samples-row.recall"]) > 0.8
    assert found["samples-row.confident"] > 99
    assert sum(found[f"classes-row.{k}"] for k in range(10)) == pytest.approx(100)
    noise = experiment.of_samples(task, "row", torch.rand(500, 64))
    assert noise["samples-row.precision"] == noise["samples-row.recall"] == 0


# ---------------------------------------------------------------- energies


def test_an_energy_that_is_its_base_has_the_exact_likelihood_and_all_weights_equal():
    task = a_task(experiment.PCD)
    model = task.on_base()
    nn.init.zeros_(model.net.layers[-1].weight)
    nn.init.zeros_(model.net.layers[-1].bias)
    found = experiment.annealed(task, experiment.PCD, model, {})
    exact = experiment.likelihood(task, task.base(), task.base().log_z())
    row = f"likelihood-{experiment.PCD}."
    for column in ("log-likelihood", "forward estimate", "reverse estimate"):
        assert found[row + column] == pytest.approx(exact, abs=1e-3)
    assert found[row + "ESS"] == pytest.approx(QUICK.sampled)


@pytest.mark.parametrize("above", [-2.0, 2.0])
def test_the_larger_of_bound_and_estimate_of_log_z_counts(above, monkeypatch):
    run = experiment.ais_log_partition

    def shifted(*arguments, **options):
        out = run(*arguments, **options)
        return replace(out, upper=out.log_z + above)

    monkeypatch.setattr(experiment, "ais_log_partition", shifted)
    task = a_task(experiment.PCD)
    found = experiment.annealed(task, experiment.PCD, task.on_base(), {})
    row = f"likelihood-{experiment.PCD}."
    loss = found[row + "forward estimate"] - found[row + "log-likelihood"]
    assert loss == pytest.approx(max(above, 0.0))


def test_a_constant_added_to_an_energy_changes_no_figure():
    task = a_task(experiment.PCD)
    model = task.on_base()
    before = experiment.annealed(task, experiment.PCD, model, {})
    with torch.no_grad():
        model.net.layers[-1].bias += 3
    after = experiment.annealed(task, experiment.PCD, model, {})
    for name, value in before.items():
        if "cost" not in name and name != "sheets":
            assert after[name] == pytest.approx(value, abs=2e-3), name


def test_an_energy_of_many_levels_is_the_gaussian_of_each_level_and_a_network():
    task = a_task()
    mean, covariance = task.data.moments(0.0)
    energy = experiment.NoiseConditional(mean, covariance, QUICK)
    nn.init.zeros_(energy.layers[-1].weight)
    x = task.data.noisy_held_out[:6]
    for sigma in (0.1, 0.7):
        precision = torch.linalg.inv(task.data.moments(sigma)[1]).float()
        gaussian = GaussianEnergy(mean.float(), precision)(x)
        bias = energy.layers[-1].bias.detach()
        torch.testing.assert_close(energy.at(x, sigma).detach(), gaussian + bias, rtol=1e-4, atol=0)
    torch.testing.assert_close(energy(x), energy.at(x, 0.1))
    sigmas = torch.linspace(0.1, 1.5, 6)
    expected = torch.cat([energy.at(x[i : i + 1], sigmas[i].item()) for i in range(6)])
    torch.testing.assert_close(energy.at(x, sigmas[:, None]), expected)


def test_the_energy_of_the_paper_has_no_base_and_singular_values_of_at_most_1(
    monkeypatch, tmp_path
):
    seen = {}
    monkeypatch.setattr(
        experiment,
        "evaluated",
        lambda task, row, energy, cost, sample: seen.update(energy=energy, x=sample(24)) or {},
    )
    experiment.paper_recipe(a_task(experiment.PAPER, folder=tmp_path))
    assert seen["energy"].base is None
    for layer in seen["energy"].net.layers[::2]:
        # the power iteration is one step per call, from a random start
        assert torch.linalg.matrix_norm(layer.weight, 2) < 1.5
    assert 0 <= seen["x"].min() <= seen["x"].max() <= 1


def test_the_second_stage_starts_from_the_first_and_at_noisy_images(monkeypatch, tmp_path):
    begun = []

    def persistent(task, energy, steps, start, warm):
        begun.append((energy, start(500, torch.Generator().manual_seed(1)), warm))
        return {"training": 1.0, "gradients": 7}

    monkeypatch.setattr(experiment, "persistent", persistent)
    monkeypatch.setattr(
        experiment, "annealed", lambda task, row, energy, cost: {"energy": energy, **cost}
    )
    found = dict(experiment.dsm_then_pcd(a_task(experiment.BOTH, folder=tmp_path)))
    ((energy, start, warm),) = begun
    assert energy is found[experiment.DSM]["energy"] is found[experiment.BOTH]["energy"]
    assert warm
    assert found[experiment.BOTH]["gradients"] == QUICK.dsm_steps + 7
    nearest = torch.cdist(start, experiment.data(QUICK).train).min(1).values
    # a norm of 64 normal numbers of 0.1 is 0.8 +- 0.07
    assert nearest.max() < 0.8 + 5 * 0.07


def test_after_a_warm_start_all_chains_are_annealed_anew_in_turn(monkeypatch, tmp_path):
    settings = replace(QUICK, refresh_every=2, refreshed=8, chains=32, batch=16)
    task = a_task(experiment.BOTH, settings, tmp_path)
    marks, kept = iter(range(1, 9)), []
    monkeypatch.setattr(experiment, "refreshed", lambda *_: torch.full((8, 64), next(marks) / 16))
    monkeypatch.setattr(experiment, "mala_sample", lambda energy, x, *_, **__: x)
    sample = experiment.ReplayBuffer.sample

    def watched(buffer, n):
        kept.append((16 * buffer.states[:, 0]).int())
        return sample(buffer, n)

    monkeypatch.setattr(experiment.ReplayBuffer, "sample", watched)

    def start(n, generator):
        return torch.zeros(n, 64)

    experiment.persistent(task, task.on_base(), 10, start, warm=True)
    assert kept[1].tolist() == [1] * 8 + [0] * 24
    assert kept[7].tolist() == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8
    assert kept[8].tolist() == [5] * 8 + [2] * 8 + [3] * 8 + [4] * 8


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("variant", [experiment.PCD, experiment.BOTH, experiment.MULTI])
def test_a_training_that_is_killed_goes_on_to_the_same_figures(variant, tmp_path, monkeypatch):
    settings = replace(QUICK, every=2, pcd_steps=5, dsm_steps=5, multi_steps=5, tuned_steps=5)

    def figures(folder):
        job = harness.Job(variant, 0, settings, "cpu", folder)
        return {k: v for k, v in experiment.work(job).items() if not k.startswith("cost")}

    undisturbed = figures(tmp_path / "undisturbed")
    step, calls = experiment.DivergenceGuard.check, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == (8 if variant == experiment.BOTH else 4):
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.DivergenceGuard, "check", dies)
        with pytest.raises(KeyboardInterrupt):
            figures(tmp_path / "killed")
    assert figures(tmp_path / "killed") == undisturbed


def test_a_training_that_diverges_stops(tmp_path):
    task = a_task(experiment.PCD, folder=tmp_path)
    energy = task.on_base()
    optimiser = torch.optim.Adam(energy.parameters(), 1e-3)

    def loss(step, x, generator):
        return energy(x).sum() * math.nan, 0.0

    with pytest.raises(RuntimeError, match="diverges at step 1"):
        experiment.learn(task, "part", energy, loss, 3, optimiser)


def test_what_is_measured_is_the_average_of_the_weights(tmp_path):
    task = a_task(experiment.PCD, folder=tmp_path)
    energy = EnergyModel(experiment.Network(torch.zeros(64), 4), task.base())
    seen = []

    class Remembers(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            seen.append(energy.net.layers[0].weight.detach().clone())

    optimiser = Remembers(energy.parameters(), 1.0)
    experiment.learn(task, "part", energy, lambda step, x, _: (energy(x).mean(), 0.0), 3, optimiser)
    # with the correction for the start, the first weights seen count as the initial average
    expected = seen[0]
    for weight in seen[1:]:
        expected = expected + 0.002 * (weight - expected)
    low, high = torch.stack(seen).aminmax(dim=0)
    assert ((energy.net.layers[0].weight >= low) & (energy.net.layers[0].weight <= high)).all()
    assert not torch.equal(energy.net.layers[0].weight, seen[-1])
