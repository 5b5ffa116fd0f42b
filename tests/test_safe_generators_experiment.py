"""The experiment of the chapter: 30 kills, each followed by a resume, and what would be counted."""

import json
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from experiments import harness
from experiments import safe_generators as experiment

pytestmark = [
    pytest.mark.usefixtures("as_experiments_run"),
    # The children come from a process that has imported all and done nothing.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "images.npy", experiment.images(experiment.QUICK))
    return tmp_path


def seconds_to_the_first_batch(folder):
    """Of a consumer with two workers, which is killed then."""
    consumer = experiment.start(folder, 7, experiment.QUICK, 2, random.Random(0))
    begun, log = time.monotonic(), experiment.Log(folder)
    while not log.size() and consumer.is_alive():
        time.sleep(0.005)
    taken = time.monotonic() - begun
    experiment.kill(consumer, "consumer and workers", random.Random(0))
    return taken


def test_thirty_kills_lose_double_or_change_no_sample_and_leave_no_orphan(folder):
    # Some are killed while they start and some in the midst of it, on a busy machine too.
    longest = max(experiment.QUICK.longest, 2 * seconds_to_the_first_batch(folder))
    settings = replace(experiment.QUICK, longest=longest)
    figures = experiment.kill_and_resume(folder, 7, settings, kills=30)
    found = {name.partition(".")[2]: value for name, value in figures.items() if "Loader" in name}
    assert found.pop("kills") == 30
    assert found.pop("samples") % experiment.QUICK.subset == 0
    assert set(found) == {*experiment._SAMPLES, *experiment._SAFE}
    assert set(found.values()) == {0}, found
    hit = {target: figures[f"what was killed-{target}.kills"] for target in experiment.TARGETS}
    assert sum(hit.values()) == 30
    assert min(hit.values()) >= 2, "each kind must be among them"
    # Kills that come before the first batch prove little: they must not be all.
    early = sum(
        figures[f"what was killed-{target}.before the first batch"] for target in experiment.TARGETS
    )
    assert early <= 20
    assert figures["what was killed-one worker.named"] == hit["one worker"]


def test_a_quick_run_has_every_figure_and_the_plain_recipe_changes_what_it_resumes(tmp_path):
    path = tmp_path / "record.json"
    places = ["--output", str(path), "--state", str(tmp_path / "state")]
    fewer = replace(experiment.EXPERIMENT, quick=replace(experiment.QUICK, kills=3, resumes=2))
    harness.main(fewer, ["--quick", "--workers", "1", "--quiet", *places])
    figures = json.loads(path.read_text())["figures"]
    assert figures.keys() == experiment.units(experiment.QUICK).keys()
    plain = {
        name.partition(".")[2]: figure["values"]
        for name, figure in figures.items()
        if name.startswith("kill and resume-DataLoader")
    }
    assert plain["lost"] == plain["doubled"] == plain["misplaced"] == [0, 0, 0]
    for different, samples in zip(plain["different"], plain["samples"], strict=True):
        # Not all: a part that has as many workers as the undisturbed run, from the start, is equal.
        assert 0 < different <= samples
    for row in ("killed worker", "hanging worker, after its limit"):
        assert figures[f"named error-{row}.errors"]["values"] == [1, 1, 1]
        assert figures[f"named error-{row}.right"]["values"] == [1, 1, 1]
        assert max(figures[f"named error-{row}.worst"]["values"]) < 2


ROWS = [(0, 1, "a"), (0, 0, "b"), (1, 0, "c"), (1, 1, "d")]


@pytest.mark.parametrize(
    ("found", "counts"),
    [
        (ROWS, (0, 0, 0, 0)),
        (ROWS[:3], (1, 0, 1, 0)),
        ([*ROWS[:1], *ROWS[2:]], (1, 0, 3, 0)),
        ([*ROWS, ROWS[1]], (0, 1, 1, 0)),
        ([ROWS[1], ROWS[0], *ROWS[2:]], (0, 0, 2, 0)),
        ([(0, 1, "b"), *ROWS[1:]], (0, 0, 0, 1)),
        ([*ROWS[:2], (1, 5, "c"), ROWS[3]], (1, 0, 1, 1)),
    ],
)
def test_what_is_lost_doubled_misplaced_or_different_is_counted(found, counts):
    names = ("lost", "doubled", "misplaced", "different")
    assert experiment.compared(found, ROWS) == dict(zip(names, counts, strict=True))


def test_rows_without_a_state_are_taken_back(tmp_path):
    log = experiment.Log(tmp_path)
    assert log.is_readable()
    assert log.restore() is None
    log.save(ROWS[:2], {"consumed": 2})
    with log.rows_path.open("a") as file:  # killed between the rows and the state
        file.write("1 0 c\n1 1")
    assert log.restore() == {"consumed": 2}
    log.save(ROWS[2:], {"consumed": 4})
    assert log.rows() == ROWS
    assert log.epochs() == 2
    log.state_path.write_text('{"bytes": 1')
    assert not log.is_readable()


def sleeping(n):
    os.setpgid(0, 0)
    for _ in range(n):
        if os.fork() == 0:
            break
    time.sleep(60)


def test_the_living_processes_of_a_group_are_found_and_those_that_are_dead_are_not():
    process = experiment.FORK.Process(target=sleeping, args=(2,))
    process.start()
    deadline = time.monotonic() + 20
    while len(experiment.members(process.pid)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()  # its children go on: they are orphans
    process.join()
    orphans = experiment.members(process.pid)
    assert len(orphans) == 2
    assert process.pid not in orphans
    os.killpg(process.pid, signal.SIGKILL)
    while experiment.members(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_augmentation_is_a_function_of_the_generator_alone():
    data = experiment.Images(experiment.images(experiment.QUICK))
    one, two, other = (data.getitem(3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one[0].equal(two[0])
    assert not one[0].equal(other[0])
    assert one[0].shape == (28, 28)
    assert one[1] == 3


@pytest.mark.data
def test_the_images_are_those_of_fashion_mnist():
    pixels = experiment.images(experiment.Settings())
    assert pixels.shape == (203, 28, 28)
    assert 60 < pixels.mean() < 85  # of the whole side: 72.9
