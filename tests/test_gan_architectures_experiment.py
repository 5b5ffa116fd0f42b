"""The experiment of the chapter: what differs between arms, what it resumes, and its rulers."""

import base64
import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from cln_tutorial.gan_architectures.metrics import kernel_distance
from cln_tutorial.gan_architectures.networks import DCGANGenerator
from cln_tutorial.gan_architectures.training import GANTrainer
from experiments import gan_architectures as experiment
from experiments import harness

QUICK = experiment.QUICK
ONE_JOB = "BN and SELFMOD"


@pytest.fixture(autouse=True)
def as_experiments_run():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    quick_data()  # the harness asks for the same settings
    folder = tmp_path_factory.mktemp("quick")
    places = ["--output", str(folder / "record.json"), "--state", str(folder / "state")]
    harness.main(experiment.EXPERIMENT, ["--quick", "--workers", "1", "--quiet", *places])
    return json.loads((folder / "record.json").read_text())


@cache
def quick_data():
    return experiment.data(QUICK)


def a_task(folder=Path(), variant=ONE_JOB, settings=QUICK):
    job = harness.Job(variant, 0, settings, "cpu", folder)
    return experiment.Task(job, quick_data())


@pytest.fixture(scope="module")
def classes_arm(tmp_path_factory):
    """A task and its trained arm with classes."""
    task = a_task(tmp_path_factory.mktemp("classes"), experiment.CBN)
    return task, experiment.trained(task, experiment.CBN)


def images_of(text):
    levels = np.frombuffer(base64.b64decode(text), np.uint8)
    return levels.reshape(-1, experiment.SIDE, experiment.SIDE)


def test_a_quick_run_has_every_figure_and_all_sheets(record):
    assert record["figures"].keys() == experiment.units(QUICK).keys()
    assert set(record["texts"]) == set(experiment.EXPERIMENT.texts)
    for arm in experiment.GENERATORS:
        *sheets, progress = (images_of(text) for text in record["texts"][f"sheets of {arm}"])
        assert len(progress) == 10 * len(experiment.marks_of(QUICK, arm))
        assert {len(each) for each in sheets} == {experiment.SHEET}
        # the last row of the progress is the first of the last sheet: the same noise
        np.testing.assert_array_equal(progress[-10:], sheets[-1][:10])
    mixed, between = (images_of(text) for text in record["texts"]["sheets of mixing"])
    assert len(mixed) == 10 * (1 + len(experiment.MIXED))
    assert len(between) == 40


def test_the_figures_of_a_full_run_are_named_as_tables_are():
    units = experiment.units(experiment.Settings())
    for name in units:
        row, _, column = name.partition(".")
        assert "." not in column, name
        assert row.partition("-")[2], name
    assert {claim["figure"] for claim in experiment.PUBLISHED} <= units.keys()
    assert not any("-" in variant for variant in experiment.GENERATORS)


@pytest.mark.parametrize(
    ("settings", "sizes", "kind"),
    [
        (experiment.Settings(), "5,000 samples to 5,000", "test images"),
        (experiment.TUNING, "5,000 samples to 5,000", "held-back training images"),
        (QUICK, "80 samples to 100", "test images"),
    ],
)
def test_units_say_how_many_images_of_which_kind_were_compared(settings, sizes, kind):
    units, row = experiment.units(settings), f"{experiment.BN}-{experiment.BEST}"
    assert f"{sizes} {kind}" in units[f"{row}.KID"]
    assert units[f"{row}.recall"].startswith(f"share of {kind} among")


def test_a_difference_is_that_of_the_same_seed(record):
    figures = record["figures"]
    for row in experiment.ROWS:
        one, two, less = (
            np.array(figures[f"{group}-{row}.KID"]["values"])
            for group in (experiment.SELFMOD, experiment.BN, "difference")
        )
        np.testing.assert_allclose(less, one - two, rtol=0, atol=1e-15)
    name = f"{experiment.BEST}.4 steps"
    of_both = [
        figures[f"by step-{arm}, {name}"]["values"] for arm in (experiment.SELFMOD, experiment.BN)
    ]
    less = figures[f"difference by step-{name}"]["values"]
    np.testing.assert_allclose(less, np.subtract(*of_both), rtol=0, atol=1e-15)


def test_the_last_mark_is_the_row_of_the_table(record):
    for arm in (experiment.BN, experiment.CBN):
        for row in (experiment.RAW, experiment.BEST):
            by_step = record["figures"][f"by step-{arm}, {row}.4 steps"]["values"]
            assert by_step == record["figures"][f"{arm}-{row}.KID"]["values"]
    short = record["figures"][f"by step-{experiment.ADAIN}, {experiment.BEST}.2 steps"]["values"]
    row = f"{experiment.ADAIN}-{experiment.BEST}, 2 steps.KID"
    assert short == record["figures"][row]["values"]


def test_what_is_trained_shorter_has_figures_of_the_others_beside_it():
    units = experiment.units(experiment.Settings())
    for arm in experiment.GENERATORS:
        assert f"spectrum-{arm}, 2000 steps.mean image" in units
        assert f"by step-{arm}, {experiment.BEST}.2000 steps" in units
        long = arm not in experiment.SHORT
        assert (f"by step-{arm}, {experiment.BEST}.4000 steps" in units) == long


# ---------------------------------------------------------------- what differs between the arms


def test_arms_start_from_the_same_weights_and_the_same_discriminator():
    plain = experiment.fresh_trainer(QUICK, experiment.BN, 3)
    z = torch.randn(5, QUICK.z_dim, generator=torch.Generator().manual_seed(0))
    for arm in (experiment.SELFMOD, experiment.CBN, experiment.ADAIN):
        other = experiment.fresh_trainer(QUICK, arm, 3)
        there = other.discriminator.state_dict()
        for name, value in plain.discriminator.state_dict().items():
            assert torch.equal(there[name], value), (arm, name)
        if arm == experiment.SELFMOD:
            assert torch.equal(other.generator(z), plain.generator(z))
    nearest = experiment.fresh_trainer(QUICK, experiment.NEAREST, 3)
    assert torch.equal(nearest.generator.dense.weight, plain.generator.dense.weight)
    again = experiment.fresh_trainer(QUICK, experiment.BN, 4)
    assert not torch.equal(again.generator.dense.weight, plain.generator.dense.weight)


def test_the_arm_with_adain_differs_from_self_modulation_in_its_statistics_alone():
    one, other = (
        experiment.fresh_trainer(QUICK, arm, 3).generator
        for arm in (experiment.ADAIN, experiment.SELFMOD)
    )
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())
    z = torch.randn(5, QUICK.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Statistics of single maps do not hear of other samples.
        torch.testing.assert_close(one(z)[:1], one(z[:1]))
        assert not torch.allclose(other(z)[:1], other(z[:1]), atol=1e-3)


def test_the_networks_are_those_that_are_described():
    trainer = experiment.fresh_trainer(experiment.Settings(), experiment.CBN, 0)
    maps = [tuple(m.weight.shape[:2]) for m in trainer.generator.modules() if hasattr(m, "stride")]
    assert maps == [(64, 32), (32, 1)]
    convs = [m for m in trainer.discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [16, 32, 32, 64, 64]
    assert all(nn.utils.parametrize.is_parametrized(m) for m in convs)
    assert trainer.discriminator.embed is not None
    for optimiser in (trainer.opt_g, trainer.opt_d):
        assert optimiser.defaults["lr"] == 1e-3
        assert optimiser.defaults["betas"] == (0.0, 0.9)
    assert "0.999" in repr(trainer.average.profiles)


# ---------------------------------------------------------------- the data


def test_settings_are_compared_on_training_images_and_no_test_image_is_seen():
    plain = quick_data()
    tuning = experiment.data(replace(QUICK, classifier_epochs=1, held_back=300))
    train, _, tested, _ = experiment.digits()
    assert torch.equal(plain.reference, tested[:100])
    assert torch.equal(plain.other, tested[100:200])
    assert torch.equal(plain.train, train)
    assert torch.equal(tuning.train, train[:-300])
    assert torch.equal(tuning.reference, train[-300:-200])
    assert torch.equal(tuning.other, train[-200:-100])
    assert experiment.TUNING.held_back >= 2 * experiment.TUNING.reference
    assert not set(experiment.TUNING.seeds) & set(experiment.Settings().seeds)


def test_small_images_are_means_of_four_pixels_of_the_padded_ones():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 0, 0], image[0, 2:4, 2:4] = 255, 255
    found = experiment.smaller(image)[0, 0]
    assert found.shape == (16, 16)
    assert found[1, 1] == pytest.approx(-0.5)  # one of four; two pixels of padding are one
    assert found[2, 2] == 1
    assert found.sum() == pytest.approx(-256 + 0.5 + 2)


@pytest.mark.data
def test_the_real_images_lie_in_the_range_of_tanh():
    train, labels, tested, tested_labels = experiment.clothes()
    assert train.shape[1:] == tested.shape[1:] == (1, 16, 16)
    assert len(tested) >= 2 * experiment.Settings().reference * 0.99
    assert train.min() == -1
    assert 0.9 < train.max() <= 1
    assert labels.unique().tolist() == tested_labels.unique().tolist() == list(range(10))


def test_a_sheet_is_read_back_to_the_level_of_a_byte():
    images = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    assert images_of(experiment.sheet(images)).flatten().tolist() == list(range(256))
    assert images_of(experiment.sheet(3 * images)).max() == 255


# ---------------------------------------------------------------- the rulers


def test_training_images_are_their_own_samples(classes_arm):
    task, _ = classes_arm
    found = experiment.of_samples(task, None, task.data.train[:300])
    assert abs(found["KID"]) < 0.05
    assert found["KID low"] < found["KID"] < found["KID high"]
    assert found["precision"] > 0.6
    assert found["recall"] > 0.6
    assert found["classes"] == 10
    assert 2 < found["rarest"] <= 10
    noise = experiment.of_samples(task, None, torch.rand(300, 1, 16, 16) * 2 - 1)
    assert noise["KID"] > 1
    assert noise["precision"] < 0.1


def test_the_accuracy_is_that_of_the_classes_asked_for(classes_arm):
    task, _ = classes_arm
    by_class = [task.data.train[task.data.labels == k] for k in range(10)]
    right = torch.stack([by_class[k % 10][k // 10] for k in range(100)])
    wrong = torch.stack([by_class[(k + 1) % 10][k // 10] for k in range(100)])
    assert experiment.of_samples(task, experiment.CBN, right)["accuracy"] > 80
    assert experiment.of_samples(task, experiment.CBN, wrong)["accuracy"] < 20


def test_each_row_has_the_weights_and_the_statistics_that_it_names(classes_arm):
    task, trainer = classes_arm
    raw, averaged = trainer.generator, trainer.averaged_generator()

    def parts(G):
        weights = torch.cat([p.detach().flatten() for p in G.parameters()])
        norms = [m for m in G.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return weights, torch.cat([m.running_var for m in norms])

    assert not torch.equal(parts(raw)[0], parts(averaged)[0])
    before = parts(raw)
    found = dict(experiment.generators(task, experiment.CBN, trainer, experiment.ROWS))
    for row, G in found.items():
        expected = raw if row.startswith("raw") else averaged
        assert torch.equal(parts(G)[0], parts(expected)[0]), row
        assert G.training == row.endswith("batch"), row
    statistics = {row: parts(G)[1] for row, G in found.items()}
    assert torch.equal(statistics["raw, running"], parts(raw)[1])
    assert torch.equal(statistics["EMA, those of raw"], parts(raw)[1])
    assert torch.equal(statistics["EMA, running"], parts(averaged)[1])
    for row in ("raw, recalibrated", "EMA, recalibrated"):
        for other in ("raw, running", "EMA, running"):
            assert not torch.allclose(statistics[row], statistics[other], rtol=1e-3), row
    assert all(map(torch.equal, before, parts(raw)))  # nothing was written into it


def test_batch_statistics_are_those_of_batches_as_large_as_in_training(classes_arm):
    task, trainer = classes_arm
    sizes = []
    G = copy.deepcopy(trainer.generator)
    G.register_forward_pre_hook(lambda m, args: sizes.append((len(args[0]), args[1][:3].tolist())))
    assert len(experiment.sampled(task, experiment.CBN, G)) == QUICK.samples
    assert {size for size, _ in sizes} == {QUICK.batch}
    assert sizes[0][1] == [0, 1, 2]


def test_mixing_all_layers_is_the_other_image_and_none_is_the_first():
    task = a_task(settings=replace(QUICK, reference=40))
    torch.manual_seed(0)
    G = DCGANGenerator(16, 1, z_dim=8, width=8, norm="selfmod").eval()
    for norm in (m for m in G.modules() if hasattr(m, "hidden")):
        nn.init.normal_(norm.gain.weight)
    figures, text = experiment.mixed_styles(task, G)
    rows = images_of(text).reshape(6, 10, 16, 16)
    z, other = task.noise(80).chunk(2)
    with torch.no_grad():
        for row, noise in ((0, z), (5, other)):
            expected = images_of(experiment.sheet(G(noise[:10])))
            # the last bit of a sum can move a level
            assert np.abs(rows[row].astype(int) - expected).max() <= 1
        changed = (G(other) - G(z)).abs().mean().item()
    assert figures["mixing-all.pixels"] == pytest.approx(changed, rel=1e-4)
    for row in ("layer 0", "layer 1", "both layers"):
        assert 0 < figures[f"mixing-{row}.pixels"] < figures["mixing-all.pixels"]


def test_a_checkerboard_is_seen_in_the_mean_image():
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    found = experiment.spectrum(board.expand(8, 1, 16, 16))
    assert found["mean image"] == pytest.approx(1, abs=1e-5)
    assert found["images"] == pytest.approx(1, abs=1e-5)


def test_networks_are_compared_at_equal_numbers_of_weights():
    pairs = experiment.pairs_of_equal_size(experiment.Settings(), 32, 0)
    for one, other in zip(*pairs.values(), strict=True):
        # the width is a whole number near 20, and weights grow by its square: half a step is 5 %
        assert abs(experiment.weights(one) / experiment.weights(other) - 1) < 0.05


def test_the_bytes_that_are_kept_are_counted_once_and_without_weights():
    layers = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
    x = torch.randn(3, 10, requires_grad=True)
    # x, and the output of tanh, which two layers keep
    assert experiment.kept_bytes(layers, lambda: layers(x)) == 4 * (3 * 10 + 3 * 20)


# ---------------------------------------------------------------- training


def test_a_training_that_is_killed_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    settings = replace(QUICK, marks=(1, 2, 3), samples=40)
    monkeypatch.setattr(experiment, "data", lambda settings: quick_data())

    def figures(folder):
        job = harness.Job(ONE_JOB, 0, settings, "cpu", folder)
        return experiment.work(job)

    undisturbed = figures(tmp_path / "undisturbed")
    step, calls = GANTrainer._train, []

    def dies(self, batches):
        calls.append(1)
        if len(calls) == 6:  # in the third step of the second arm
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(GANTrainer, "_train", dies)
        with pytest.raises(KeyboardInterrupt):
            figures(tmp_path / "killed")
    calls.clear()
    monkeypatch.setattr(GANTrainer, "_train", lambda *a: (calls.append(1), step(*a)))
    assert figures(tmp_path / "killed") == undisturbed
    assert len(calls) == 1


def test_the_harness_finds_the_time_of_a_killed_job_in_its_files(classes_arm):
    task, _ = classes_arm
    seconds = [harness._about(path)["seconds"] for path in sorted(task.job.checkpoints.iterdir())]
    assert len(seconds) == len(QUICK.marks)
    assert 0 < seconds[0] < seconds[1]


def test_the_judge_is_that_of_the_training_images_alone():
    task = a_task()
    pixels, _ = load_digits(return_X_y=True)
    assert len(task.data.train) == len(pixels) - 500
    expected = kernel_distance(
        task.data.judge.transform(task.data.other), task.data.judge.transform(task.data.reference)
    )
    found = experiment.real_images(task)
    name = f"{experiment.REAL}-the other half of the test images.KID"
    assert found[name] == expected.value
