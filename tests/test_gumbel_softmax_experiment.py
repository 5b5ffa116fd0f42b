"""The experiment of the chapter: its figures, its ruler, and the article's schedule."""

import pytest
import torch

from cln_tutorial.gumbel_softmax import CategoricalVAE, Exact, StraightThrough
from experiments import gumbel_softmax as experiment

pytestmark = pytest.mark.usefixtures("as_experiments_run")


def test_a_quick_run_has_every_figure_and_each_bound_is_below_what_it_bounds(record):
    figures = record["figures"]
    assert figures.keys() == experiment.units(experiment.QUICK).keys()
    for row in experiment.ESTIMATORS:
        columns = (
            figures[f"held out-{row}.{name}"]["values"] for name in ("ELBO", "log likelihood")
        )
        assert all(elbo < exact for elbo, exact in zip(*columns, strict=True))


def test_the_exact_gradient_measured_against_itself_has_no_variance_and_the_cosine_1():
    torch.manual_seed(0)
    model = CategoricalVAE(64, 2, 4, 8)
    x = experiment.images(experiment.QUICK)[0][:32]
    exact = experiment.encoder_gradients(model, Exact(), x, experiment.QUICK)
    assert exact["variance"] < 1e-20
    assert abs(exact["cosine"] - 1) < 1e-12
    noisy = experiment.encoder_gradients(model, StraightThrough(), x, experiment.QUICK)
    assert noisy["variance"] > 1e-6


def test_the_schedule_of_the_article_starts_at_1_and_falls_by_a_thousandth_of_the_rest():
    estimator = experiment.Annealed()
    seen = []
    for _ in range(3):
        estimator(torch.zeros(2, 3), lambda y: y[..., 0].sum(-1))
        seen.append(estimator.tau)
    assert seen == pytest.approx([1.0, 0.01 + 0.99 * 0.999, 0.01 + 0.99 * 0.999**2])


def test_no_held_out_image_is_one_to_learn_from():
    train, held_out = experiment.images(experiment.Settings())
    assert len(train) == 1500
    assert len(held_out) == 297
