"""The experiment of the chapter: its figures and its scores."""

import numpy as np
import pytest

from experiments import spherical_embedding as experiment

pytestmark = pytest.mark.usefixtures("as_experiments_run")


@pytest.mark.data
def test_a_quick_run_has_every_figure_and_the_neighbours_of_the_queries(record):
    assert record["figures"].keys() == experiment.units(experiment.QUICK).keys()
    asked = [line.split(":")[0] for line in record["texts"][experiment.NEIGHBOURS]]
    assert set(asked) <= set(experiment.QUERIES)


def test_spherical_k_means_finds_bunches_of_directions():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    vectors = experiment.unit(np.eye(4)[labels] + 0.2 * generator.standard_normal((200, 4)))
    found = experiment.spherical_k_means(vectors, 4, 5, np.random.default_rng(1))
    groups = {tuple(sorted(set(found[labels == k].tolist()))) for k in range(4)}
    assert len(groups) == 4
    assert all(len(group) == 1 for group in groups)


def test_the_neighbours_of_held_out_posts_are_train_posts_only():
    # Each held-out post lies on another one of its class, and near a train post of another class.
    vectors = np.array([[1.0, 0], [0, 1], [0.7, 0.71], [1, 0.1], [0.1, 1]])
    labels, held_out = np.array([0, 1, 1, 1, 0]), np.array([False, False, False, True, True])
    vectors = np.repeat(vectors, 3, 0)
    score = experiment.nearest(vectors, np.repeat(labels, 3), np.repeat(held_out, 3))
    assert score == 0.0


def test_angles_are_those_between_the_means_of_the_groups():
    labels = np.arange(20)
    vectors = np.eye(20)
    vectors[1] = vectors[0] * np.cos(0.5) + vectors[1] * np.sin(0.5)
    found = experiment.angles(vectors, labels)
    assert found["angles-0 to 1.degrees"] == pytest.approx(np.degrees(0.5))
    assert found["angles-0 to 2.degrees"] == pytest.approx(90)
    assert len(found) == 190
