"""Accuracy, precision, recall and F-beta of probabilities, their bias on batches, the threshold.

Statistical tests have one fixed seed; how often another seed would fail them stands beside.
"""

import functools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats
from sklearn import metrics as peer

from cln_tutorial.smoothing.metrics import (
    SoftFBetaLoss,
    soft_accuracy,
    soft_confusion,
    soft_f1_loss,
    soft_fbeta,
    soft_precision,
    soft_recall,
)
from cln_tutorial.smoothing.threshold import best_fbeta_threshold

inf, nan = math.inf, math.nan
RATIOS = [soft_fbeta, soft_precision, soft_recall, soft_f1_loss]
SETTINGS = [("binary", 1), ("micro", 2), ("macro", 2), ("weighted", 2), ("samples", 2)]


def seeded(seed=6620):
    return torch.Generator().manual_seed(seed)


def make_labels(kind, seed=0, n=60, classes=4, wrong=0.3):
    """Targets in which every class occurs, and hard predictions, some of them wrong."""
    rng = np.random.default_rng(seed)
    if kind == "index":
        target = rng.integers(classes, size=n)
        guess = np.where(rng.random(n) < wrong, rng.integers(classes, size=n), target)
        probs = np.eye(classes)[guess]
    else:
        shape = n if kind == "binary" else (n, classes)
        target = (rng.random(shape) < 0.4).astype(int)
        guess = np.where(rng.random(shape) < wrong, 1 - target, target)
        probs = guess.astype(float)
    return target, guess, torch.from_numpy(probs), torch.from_numpy(target)


# --- with hard probabilities ----------------------------------------------------------------------

KINDS = [
    ("binary", "binary"),
    *[("labels", average) for average in ("micro", "macro", "weighted", "samples")],
    *[("index", average) for average in ("micro", "macro", "weighted")],
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("beta", [0.5, 1, 2.0])
@pytest.mark.parametrize(("kind", "average"), KINDS)
def test_with_hard_probabilities_they_are_those_of_scikit_learn(kind, average, beta, weighted):
    target, guess, p, t = make_labels(kind)
    w = np.random.default_rng(1).random(len(target)) if weighted else None
    options = {"average": average, "sample_weight": w, "zero_division": 0}
    ours = {"average": average, "from_logits": False}
    if weighted:
        ours["sample_weight"] = torch.from_numpy(w)
    expected = [
        peer.fbeta_score(target, guess, beta=beta, **options),
        peer.precision_score(target, guess, **options),
        peer.recall_score(target, guess, **options),
    ]
    found = [
        soft_fbeta(p, t, beta, **ours),
        soft_precision(p, t, **ours),
        soft_recall(p, t, **ours),
    ]
    # Sums and quotients of at most 240 numbers in float64.
    assert [x.item() for x in found] == pytest.approx(expected, abs=1e-13)
    assert soft_f1_loss(p, t, **ours).item() == pytest.approx(
        1 - peer.f1_score(target, guess, **options), abs=1e-13
    )


@pytest.mark.parametrize(("kind", "average"), KINDS)
def test_at_a_low_temperature_they_are_those_of_the_decisions(kind, average):
    target, _, _, t = make_labels(kind)
    shape = (*t.shape, 4) if kind == "index" else t.shape
    logits = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    guess = (logits.argmax(-1) if kind == "index" else logits > 0).numpy().astype(int)
    expected = peer.f1_score(target, guess, average=average)
    # No logit, and no two of a row, are within 1e-4 of a tie: e^-100 is nothing.
    top = logits.topk(2, -1).values if kind == "index" else None
    gap = (top[:, 0] - top[:, 1]).min() if kind == "index" else logits.abs().min()
    assert gap > 1e-4
    assert soft_fbeta(logits / 1e-6, t, average=average).item() == pytest.approx(
        expected, abs=1e-13
    )


def test_with_hard_probabilities_the_counts_are_the_confusion_matrix():
    target, guess, p, t = make_labels("binary")
    tn, fp, fn, tp = peer.confusion_matrix(target, guess).ravel()
    assert [x.item() for x in soft_confusion(p, t)] == [tp, fp, fn, tn]
    target, guess, p, t = make_labels("labels")
    expected = peer.multilabel_confusion_matrix(target, guess)
    found = torch.stack(soft_confusion(p, t, average="macro"), -1)
    assert found.numpy().tolist() == expected.reshape(4, 4)[:, [3, 1, 2, 0]].tolist()
    expected = peer.multilabel_confusion_matrix(target, guess, samplewise=True)
    found = torch.stack(soft_confusion(p, t, average="samples"), -1)
    assert found.numpy().tolist() == expected.reshape(-1, 4)[:, [3, 1, 2, 0]].tolist()


def test_with_hard_probabilities_accuracy_is_that_of_scikit_learn():
    for kind in ("binary", "index"):
        target, guess, p, t = make_labels(kind)
        w = np.random.default_rng(1).random(len(target))
        found = soft_accuracy(p, t, from_logits=False, sample_weight=torch.from_numpy(w))
        expected = peer.accuracy_score(target, guess, sample_weight=w)
        assert found.item() == pytest.approx(expected, abs=1e-13)
    target, guess, p, t = make_labels("labels")
    found = soft_accuracy(p, t, from_logits=False).item()
    assert found == pytest.approx(1 - peer.hamming_loss(target, guess), abs=1e-13)
    target, guess, p, t = make_labels("index")
    balanced = soft_recall(p, t, from_logits=False, average="macro").item()
    assert balanced == pytest.approx(peer.balanced_accuracy_score(target, guess), abs=1e-13)


def test_torchmetrics_agrees():
    functional = pytest.importorskip("torchmetrics.functional")
    _, _, p, t = make_labels("labels")
    for average in ("micro", "macro", "weighted"):
        theirs = functional.fbeta_score(
            p, t, task="multilabel", beta=2.0, num_labels=4, average=average
        )
        ours = soft_fbeta(p, t, 2.0, from_logits=False, average=average)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)  # theirs is float32
    _, _, p, t = make_labels("index")
    for average in ("micro", "macro", "weighted"):
        theirs = functional.fbeta_score(
            p, t, task="multiclass", beta=0.5, num_classes=4, average=average
        )
        ours = soft_fbeta(p, t, 0.5, from_logits=False, average=average)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


# --- with soft ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["binary", "macro", "samples"])
def test_the_four_counts_add_up_to_the_weight_of_all(average):
    p, t = torch.rand(7, 3, generator=seeded()), torch.randint(2, (7, 3), generator=seeded(1))
    w = torch.rand(*((7,) if average == "samples" else (7, 3)), generator=seeded(2))
    keep = torch.rand(7, 3, generator=seeded(3)) < 0.7
    found = sum(soft_confusion(p, t, average=average, sample_weight=w, mask=keep))
    weight = (w if w.ndim == 2 else w[:, None]) * keep
    expected = {"binary": weight.sum(), "macro": weight.sum(0), "samples": weight.sum(-1)}[average]
    torch.testing.assert_close(found, expected)


def test_f_beta_is_made_of_the_counts():
    p, t = torch.rand(50, generator=seeded()).double(), torch.arange(50) % 3 == 0
    tp, fp, fn, _ = soft_confusion(p, t)
    for beta in (0.3, 1.0, 3.0):
        expected = (1 + beta**2) * tp / ((1 + beta**2) * tp + beta**2 * fn + fp)
        torch.testing.assert_close(soft_fbeta(p, t, beta, from_logits=False), expected)
    torch.testing.assert_close(soft_precision(p, t, from_logits=False), tp / (tp + fp))
    torch.testing.assert_close(soft_recall(p, t, from_logits=False), tp / (tp + fn))
    assert soft_fbeta(p, t, 0, from_logits=False) == soft_precision(p, t, from_logits=False)
    assert soft_fbeta(p, t, inf, from_logits=False) == soft_recall(p, t, from_logits=False)


def test_a_positive_is_worth_two_less_f_and_a_negative_costs_f():
    p = torch.rand(40, generator=seeded(), dtype=torch.float64).requires_grad_()
    t = (torch.arange(40) % 4 == 0).double()
    score = soft_fbeta(p, t, from_logits=False)
    (gradient,) = torch.autograd.grad(score, p)
    torch.testing.assert_close(gradient, ((2 * t - score) / (t + p).sum()).detach())


def test_one_label_per_sample_makes_micro_f1_the_soft_accuracy():
    logits, y = torch.randn(30, 5, generator=seeded()).double(), torch.arange(30) % 5
    accuracy = soft_accuracy(logits, y)
    torch.testing.assert_close(soft_fbeta(logits, y, average="micro"), accuracy)
    expected = logits.softmax(-1)[torch.arange(30), y].mean()
    torch.testing.assert_close(accuracy, expected)


def test_soft_accuracy_is_the_mean_accuracy_of_labels_drawn_from_the_model():
    # By enumeration of the 3^4 labellings of four samples.
    logits, y = torch.randn(4, 3, generator=seeded()).double(), torch.tensor([0, 2, 1, 1])
    p, expected = logits.softmax(-1), 0.0
    for drawn in torch.cartesian_prod(*[torch.arange(3)] * 4):
        expected += p.gather(1, drawn[:, None]).prod() * (drawn == y).double().mean()
    torch.testing.assert_close(soft_accuracy(logits, y), expected)


def test_its_gradient_is_that_of_the_log_likelihood_times_the_probability():
    logits = (3 * torch.randn(20, 6, generator=seeded()).double()).requires_grad_()
    y = torch.arange(20) % 6
    (soft,) = torch.autograd.grad(20 * (1 - soft_accuracy(logits, y)), logits)
    (log,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    p = logits.detach().softmax(-1).gather(1, y[:, None])
    torch.testing.assert_close(soft, p * log)


def test_smooth_is_added_to_numerator_and_denominator_of_every_ratio():
    p, t = torch.tensor([[0.5, 0.25], [0.5, 0.0]]).double(), torch.tensor([[1, 1], [0, 1]])
    score = functools.partial(soft_fbeta, p, t, from_logits=False, smooth=2.0)
    assert score(average="micro").item() == pytest.approx((2 * 0.75 + 2) / (3 + 1.25 + 2))
    classes = [(2 * 0.5 + 2) / (1 + 1 + 2), (2 * 0.25 + 2) / (2 + 0.25 + 2)]
    assert score(average="macro").item() == pytest.approx(np.mean(classes))
    assert score(average="weighted").item() == pytest.approx((classes[0] + 2 * classes[1]) / 3)
    rows = [(2 * 0.75 + 2) / (2 + 0.75 + 2), (0 + 2) / (1 + 0.5 + 2)]
    assert score(average="samples").item() == pytest.approx(np.mean(rows))


def test_expected_accuracy_with_a_slope_finds_the_interval_that_cross_entropy_misses():
    # 9098's own example against EXACT: (-0.25, -), (0, -), (0.25, +), a threshold b.
    x = torch.tensor([-0.25, 0.0, 0.25], dtype=torch.float64)
    t = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

    def best(slope):
        def cost(b):
            return F.binary_cross_entropy_with_logits(slope * (x - b), t).item()

        return optimize.minimize_scalar(cost, bracket=(0, 1), tol=1e-12).x

    assert best(1) == pytest.approx(0.70009, abs=5e-6)
    assert [best(k) for k in (2, 4, 8)] == pytest.approx([0.3604, 0.2007, 0.1386], abs=5e-5)

    def miss(b):
        return 1 - soft_accuracy(50 * (x - b), t).item()

    found = optimize.minimize_scalar(miss, bracket=(0.05, 0.2), tol=1e-12).x
    assert found == pytest.approx(0.125, abs=1e-4)  # by symmetry, but for e^-12 of the first point


# --- on batches -----------------------------------------------------------------------------------
# Positives 5 %, logits N(1, 1) and N(-3, 1), as in the specification's population.

SHARE = 0.05


def moment(f):
    """The population's mean of f(t, p), by quadrature."""
    total = 0.0
    for t, share, mean in ((1, SHARE, 1.0), (0, 1 - SHARE, -3.0)):
        total += (
            share
            * integrate.quad(
                lambda z, t=t, mean=mean: f(t, special.expit(z)) * stats.norm.pdf(z, mean),
                mean - 12,
                mean + 12,
                epsabs=1e-12,
            )[0]
        )
    return total


@pytest.fixture(scope="module")
def population():
    n, d = moment(lambda t, p: 2 * t * p), moment(lambda t, p: t + p)
    covariance = moment(lambda t, p: 2 * t * p * (t + p)) - n * d
    variance = moment(lambda t, p: (t + p) ** 2) - d**2
    slopes = [moment(lambda t, p: 2 * t * p * (1 - p)), moment(lambda t, p: p * (1 - p))]
    return {
        "f": n / d,
        "bias": (n / d * variance - covariance) / d**2,
        "gradient": (slopes[0] - n / d * slopes[1]) / d,  # for a bias added to the logits
    }


def draw(*shape, generator):
    t = torch.rand(shape, generator=generator) < SHARE
    return torch.randn(shape, generator=generator) + torch.where(t, 1.0, -3.0), t


def test_the_quadrature_agrees_with_the_numbers_of_the_page(population):
    assert population["f"] == pytest.approx(0.46235, abs=5e-6)
    expected = [-0.0689, -0.0172, -0.00430, -0.00108]
    found = [population["bias"] / n for n in (32, 128, 512, 2048)]
    assert found == pytest.approx(expected, rel=5e-3)


def test_soft_accuracy_has_no_bias_on_batches():
    # 4000 batches of 16; within 4 standard errors, which one seed in 16,000 would miss.
    z, t = draw(4000, 16, generator=seeded())
    found = torch.vmap(soft_accuracy)(z, t)
    expected = moment(lambda t, p: t * p + (1 - t) * (1 - p))
    assert abs(found.mean().item() - expected) < 4 * found.std().item() / 4000**0.5


def test_soft_f1_of_batches_of_128_is_off_by_what_the_formula_says(population):
    z, t = draw(40_000, 128, generator=seeded())
    found = torch.vmap(soft_fbeta)(z, t)
    bias = found.mean().item() - population["f"]
    expected = population["bias"] / 128
    # The next order of 1 / |B| is 5 % of it; the standard error 3 %: three of them are left.
    assert found.std().item() / 40_000**0.5 < 0.03 * abs(expected)
    assert bias == pytest.approx(expected, rel=0.15)


def test_a_batch_without_positives_has_loss_one_and_no_gradient_at_all():
    z = torch.randn(32, generator=seeded(), requires_grad=True)
    loss = soft_f1_loss(z, torch.zeros(32))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss == 1
    assert (gradient == 0).all()
    never = (1 - SHARE) ** 32
    assert never == pytest.approx(0.19, abs=0.005)


@pytest.mark.parametrize(
    ("size", "batches", "part"), [(32, 40_000, 0.626), (128, 20_000, 0.94), (512, 6000, 0.989)]
)
def test_the_mean_gradient_of_small_batches_falls_short(size, batches, part, population):
    z, t = draw(batches, size, generator=seeded())
    bias = torch.zeros((), requires_grad=True)
    soft_fbeta(z + bias, t, average="samples").backward()
    # Four standard errors, at most 0.0036 each (from the spread over batches).
    assert bias.grad.item() / population["gradient"] == pytest.approx(part, abs=0.015)


def test_with_running_sums_the_mean_gradient_is_that_of_the_population(population):
    # 384 independent runs, as classes of a macro average; 300 batches of 32 to warm up (0.99^300
    # is 5 %), then 500 to measure.
    generator, loss, ratios = seeded(), SoftFBetaLoss(average="macro", momentum=0.99), []
    for step in range(800):
        z, t = draw(32, 384, generator=generator)
        bias = torch.zeros((), requires_grad=True)
        loss(z + bias, t).backward()
        if step >= 300:
            ratios.append(-bias.grad.item() / population["gradient"])
    # Within 2 %, and the standard error must leave room for it: five of them.
    ratios = np.array(ratios)
    assert ratios.std() / len(ratios) ** 0.5 < 0.004
    assert ratios.mean() == pytest.approx(1, abs=0.02)


# --- classes that are not there -------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("score", RATIOS)
@pytest.mark.parametrize("kind", ["index", "labels"])
def test_macro_leaves_out_a_class_without_positives(kind, score, smooth):
    z = torch.randn(12, 4, generator=seeded()).double().requires_grad_()
    y = torch.tensor([0, 1, 3]).repeat(4)
    t = y if kind == "index" else F.one_hot(y, 4)
    p = z.softmax(-1) if kind == "index" else z.sigmoid()
    found = score(p, t, from_logits=False, average="macro", smooth=smooth)
    present, hot = [0, 1, 3], F.one_hot(y, 4)
    expected = torch.stack(
        [score(p[:, c], hot[:, c], from_logits=False, smooth=smooth) for c in present]
    ).mean()
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, p)
    assert gradient.isfinite().all()
    assert (gradient[:, 2] == 0).all()


def test_scikit_learn_agrees_when_told_which_classes_occur():
    target, guess, p, t = make_labels("index", classes=3)
    p = F.pad(p, (0, 2))
    p[:5] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])  # predicted, but never there
    guess[:5] = 3
    expected = peer.f1_score(target, guess, average="macro", labels=np.unique(target))
    found = soft_fbeta(p, t, from_logits=False, average="macro")
    assert found.item() == pytest.approx(expected, abs=1e-13)


def test_a_class_whose_weights_are_all_zero_is_not_there():
    p, t = torch.rand(6, 2, generator=seeded()), torch.tensor([[1, 0]] * 5 + [[0, 1]])
    w = torch.tensor([1.0] * 5 + [0.0])
    found = soft_fbeta(p, t, from_logits=False, average="macro", sample_weight=w)
    torch.testing.assert_close(found, soft_fbeta(p[:5, 0], t[:5, 0], from_logits=False))


@pytest.mark.parametrize("average", ["macro", "weighted", "micro", "samples"])
def test_a_batch_in_which_nothing_is_there_scores_zero_without_nan(average):
    for p in (torch.rand(5, 3), torch.zeros(5, 3), torch.zeros(0, 3)):
        p = p.requires_grad_()
        score = soft_fbeta(p, torch.zeros_like(p), from_logits=False, average=average)
        (gradient,) = torch.autograd.grad(score, p)
        assert score == 0
        assert (gradient == 0).all()


# --- running sums ---------------------------------------------------------------------------------


def test_running_sums_are_sums_of_batches_and_not_means_of_ratios():
    # Two batches by hand, momentum one half.
    loss = SoftFBetaLoss(momentum=0.5, from_logits=False).double()
    first, second = torch.tensor([0.5, 0.25]).double(), torch.tensor([0.75, 0.5]).double()
    p = second.requires_grad_()
    t1, t2 = torch.tensor([1, 0]), torch.tensor([1, 1])
    n1, d1 = 2 * 0.5, 1 + 0.75
    n2, d2 = 2 * 1.25, 2 + 1.25
    assert loss(first, t1).item() == pytest.approx(1 - n1 / d1)
    n, d, k = 0.5 * n1 + n2, 0.5 * d1 + d2, 1.5
    value = loss(p, t2)
    assert value.item() == pytest.approx(1 - n / d)
    value.backward()
    # The slopes of the batch, the ratio of both, the mean denominator.
    assert p.grad.tolist() == pytest.approx([-(2 - n / d) / (d / k)] * 2)
    assert loss.numerator.item() == pytest.approx(n)
    assert loss.denominator.item() == pytest.approx(d)
    assert (loss.support.item(), loss.n_batches.item()) == (2.5, 1.5)


def test_smooth_is_added_to_the_running_mean():
    loss = SoftFBetaLoss(momentum=0.5, from_logits=False, smooth=3.0)
    for _ in range(4):
        found = loss(torch.tensor([0.5, 0.25]), torch.tensor([1, 0]))
    assert found.item() == pytest.approx(1 - (1 + 3) / (1.75 + 3))


@pytest.mark.parametrize(("average", "axes"), SETTINGS)
def test_the_module_without_memory_is_the_function(average, axes):
    z = torch.randn(*(9, 4)[:axes], generator=seeded(), dtype=torch.float64)
    t = torch.rand(*(9, 4)[:axes], generator=seeded(1)) < 0.5
    keep = torch.rand(*(9, 4)[:axes], generator=seeded(2)) < 0.8
    w = torch.rand(9, generator=seeded(3))
    expected = 1 - soft_fbeta(z, t, 2.0, average=average, smooth=0.1, sample_weight=w, mask=keep)
    memories = [None] if average == "samples" else [None, 0, 0.9]
    for momentum in memories:  # the first batch has no memory either
        loss = SoftFBetaLoss(2.0, average, smooth=0.1, momentum=momentum)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        torch.testing.assert_close(loss(a, t, w, keep), expected)
        loss.reset_running_sums()
        loss(a, t, w, keep).backward()
        (-soft_fbeta(b, t, 2.0, average=average, smooth=0.1, sample_weight=w, mask=keep)).backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_with_running_sums_a_batch_without_positives_pushes_probabilities_down():
    for average in ("binary", "macro", "weighted"):
        loss = SoftFBetaLoss(average=average, momentum=0.99)
        z = torch.randn(32, 3, generator=seeded())
        loss(z, torch.arange(96).view(32, 3) % 5 == 0)
        z.requires_grad_()
        loss(z, torch.zeros(32, 3)).backward()
        assert (z.grad > 0).all(), average


def test_a_class_seen_before_counts_and_one_never_seen_does_not():
    loss = SoftFBetaLoss(average="macro", momentum=0.9, from_logits=False)
    p = torch.full((4, 3), 0.5)
    loss(p, torch.tensor([0, 1, 1, 1]))
    now = p.clone().requires_grad_()
    value = loss(now, torch.tensor([0, 0, 0, 0]))
    value.backward()
    # Both batches give (N, D) = (2 * 0.5 T, T + 2) with T positives.
    zero = (0.9 * 1 + 4) / (0.9 * 3 + 6)
    one = (0.9 * 3 + 0) / (0.9 * 5 + 2)
    assert value.item() == pytest.approx(1 - (zero + one) / 2)
    assert (now.grad[:, 1] > 0).all()
    assert (now.grad[:, 2] == 0).all()


def test_a_column_of_macro_keeps_the_same_sums_as_binary():
    macro, binary = (SoftFBetaLoss(average=a, momentum=0.9).double() for a in ("macro", "binary"))
    for step in range(5):
        z = torch.randn(8, 1, generator=seeded(step), dtype=torch.float64, requires_grad=True)
        t = torch.rand(8, 1, generator=seeded(step + 50)) < 0.6
        (a,) = torch.autograd.grad(macro(z, t), z)
        (b,) = torch.autograd.grad(binary(z, t), z)
        torch.testing.assert_close(a, b)
    assert macro.numerator.shape == (1,)
    torch.testing.assert_close(macro.numerator[0], binary.numerator)


@pytest.mark.parametrize("average", ["binary", "macro", "weighted"])
def test_running_sums_travel_in_the_state(average):
    def batch(step):
        t = torch.arange(24).view(8, 3) % 4 == step % 4
        return torch.randn(8, 3, generator=seeded(step)), t

    whole = SoftFBetaLoss(average=average, momentum=0.9)
    for step in range(3):
        whole(*batch(step))
    fresh = SoftFBetaLoss(average=average, momentum=0.9)
    assert set(fresh.state_dict()) == {"numerator", "denominator", "support", "n_batches"}
    fresh.load_state_dict(whole.state_dict())
    assert fresh(*batch(3)) == whole(*batch(3))
    fresh.reset_running_sums()
    assert fresh(*batch(3)) == SoftFBetaLoss(average=average)(*batch(3))


def test_evaluation_neither_uses_nor_changes_running_sums():
    loss = SoftFBetaLoss(momentum=0.9)
    z, t = torch.randn(8, generator=seeded()), torch.arange(8) % 2
    loss(z, t)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()
    assert loss(-z, t) == soft_f1_loss(-z, t)
    assert all(value.equal(before[name]) for name, value in loss.state_dict().items())


def test_a_batch_with_nan_shows_in_its_loss_and_leaves_running_sums_alone():
    loss = SoftFBetaLoss(momentum=0.9)
    z, t = torch.randn(8, generator=seeded()), torch.arange(8) % 2
    loss(z, t)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert loss(torch.full((8,), nan), t).isnan()
    assert all(value.equal(before[name]) for name, value in loss.state_dict().items())
    assert loss(z, t).isfinite()


def test_running_sums_of_half_types_are_float32_and_keep_their_place():
    loss = SoftFBetaLoss(momentum=0.999).to(torch.bfloat16)
    z, t = torch.full((64,), 2.0, dtype=torch.bfloat16), torch.ones(64)
    for step in range(1000):
        assert loss(z, t).dtype == torch.bfloat16
        if step == 1:
            place = loss.numerator.data_ptr()
    assert loss.numerator.dtype == torch.float32
    assert loss.numerator.data_ptr() == place
    # A geometric sum, 1000 roundings of float32; bfloat16 would have stopped on the way.
    k = (1 - 0.999**1000) / 0.001
    assert loss.numerator.item() == pytest.approx(2 * 64 * special.expit(2) * k, rel=1e-4)


# --- several processes ----------------------------------------------------------------------------

TWO_PROCESSES = """
import sys
import torch
from torch import distributed, nn
from cln_tutorial.smoothing.metrics import SoftFBetaLoss

rank, path = int(sys.argv[1]), sys.argv[2]
store = distributed.FileStore(path, 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
group = torch.distributed.group.WORLD

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 6, dtype=torch.float64, generator=generator)
    # Class 2 has positives in the second process only; no process holds half of the samples.
    y = torch.rand(10, 3, generator=generator) < 0.4
    y[:4, 2] = False
    return (x, y), ((x[:4], y[:4]), (x[4:], y[4:]))[rank]

for average in ("binary", "micro", "macro", "weighted", "samples"):
    for momentum in (None, 0.9) if average != "samples" else (None,):
        torch.manual_seed(0)
        alone = nn.Linear(6, 3).double()
        joined = nn.Linear(6, 3).double()
        joined.load_state_dict(alone.state_dict())
        joined = nn.parallel.DistributedDataParallel(joined)
        loss_alone = SoftFBetaLoss(2.0, average, smooth=0.1, momentum=momentum)
        loss_joined = SoftFBetaLoss(
            2.0, average, smooth=0.1, momentum=momentum, process_group=group
        )
        for seed in range(3):
            whole, mine = batches(seed)
            alone.zero_grad(), joined.zero_grad()
            expected = loss_alone(alone(whole[0]), whole[1])
            found = loss_joined(joined(mine[0]), mine[1])
            expected.backward(), found.backward()
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            for p, q in zip(alone.parameters(), joined.parameters()):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)
        # Without DDP each process has its share, times the number of processes.
        logits = whole[0][:, :3].clone().requires_grad_()
        part = mine[0][:, :3].clone().requires_grad_()
        loss_alone.eval(), loss_joined.eval()
        loss_alone(logits, whole[1]).backward(), loss_joined(part, mine[1]).backward()
        share = (logits.grad[:4], logits.grad[4:])[rank]
        torch.testing.assert_close(part.grad, 2 * share, rtol=1e-10, atol=1e-12)
distributed.destroy_process_group()
"""


def test_two_processes_have_the_loss_and_the_gradient_of_the_joined_batch(tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(TWO_PROCESSES)
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)


# --- masks and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [nan, inf, 7.0])
@pytest.mark.parametrize("average", ["micro", "macro", "weighted", "samples"])
def test_what_a_mask_hides_may_be_anything_and_has_no_gradient(average, hidden):
    for by_index in (False, True):
        z = torch.randn(8, 3, generator=seeded(), dtype=torch.float64)
        y = torch.tensor([0, 1, 2, 1, 0, 2, 1, 0])
        keep = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1]).bool()
        z[~keep] = hidden
        t = y.masked_fill(~keep, -100) if by_index else F.one_hot(y, 3)
        a, b = z.clone().requires_grad_(), z[keep].clone().requires_grad_()
        found = soft_fbeta(a, t, average=average, mask=keep)
        expected = soft_fbeta(b, t[keep], average=average)
        torch.testing.assert_close(found, expected)
        found.backward(), expected.backward()
        torch.testing.assert_close(a.grad[keep], b.grad)
        assert (a.grad[~keep] == 0).all()
        if by_index:
            torch.testing.assert_close(
                soft_accuracy(z, t, mask=keep), soft_accuracy(z[keep], t[keep])
            )


def test_a_mask_may_hide_single_labels():
    p, t = torch.rand(6, 3, generator=seeded()), torch.randint(2, (6, 3), generator=seeded(1))
    t[0] = 1
    keep = torch.rand(6, 3, generator=seeded(2)) < 0.7
    keep[0] = True
    score = functools.partial(soft_fbeta, from_logits=False)
    found = score(p, t, average="macro", mask=keep)
    columns = [score(p[keep[:, c], c], t[keep[:, c], c]) for c in range(3)]
    torch.testing.assert_close(found, torch.stack(columns).mean())
    keep[3] = False  # a sample of which nothing is left is no sample
    found = score(p, t, average="samples", mask=keep)
    rows = [score(p[i, keep[i]], t[i, keep[i]]) for i in range(6) if i != 3]
    torch.testing.assert_close(found, torch.stack(rows).mean())


@pytest.mark.parametrize("average", ["micro", "macro", "weighted", "samples"])
@pytest.mark.parametrize("score", [soft_fbeta, soft_precision, soft_recall])
def test_a_weight_of_three_is_three_samples(score, average):
    p, t = torch.rand(5, 3, generator=seeded()), torch.randint(2, (5, 3), generator=seeded(1))
    w = torch.tensor([1.0, 3.0, 2.0, 1.0, 0.0])
    many = torch.arange(5).repeat_interleave(w.int())
    found = score(p, t, from_logits=False, average=average, sample_weight=w)
    expected = score(p[many], t[many], from_logits=False, average=average)
    torch.testing.assert_close(found, expected)


# --- types, extremes, transforms ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_input_and_sums_are_wider(dtype):
    # 100,000 entries: float16 ends at 65,504, and a sum in bfloat16 would stop at 256.
    z = torch.randn(100_000, generator=seeded()).to(dtype)
    t = torch.rand(100_000, generator=seeded(1)) < 0.2
    for score in (*RATIOS, soft_accuracy):
        found, exact = score(z, t), score(z.double(), t)
        assert found.dtype == dtype
        # One rounding of the result, and float32's sums.
        assert found.item() == pytest.approx(exact.item(), rel=torch.finfo(dtype).eps + 1e-6)
    counts = soft_confusion(z.double().sigmoid().to(dtype), t)
    assert counts.tp.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    assert sum(counts).item() == pytest.approx(100_000, rel=1e-5)


@pytest.mark.parametrize(("average", "axes"), SETTINGS)
def test_extreme_logits_have_a_finite_gradient(average, axes):
    shape = (4, 3)[:axes] if axes == 2 else (4,)
    for target in (torch.zeros(shape), torch.ones(shape)):
        for value in (-inf, -1e30, -100.0, -88.0, 88.0, 1e30, inf):
            for score in RATIOS:
                z = torch.full(shape, value, requires_grad=True)
                result = score(z, target, average=average)
                (gradient,) = torch.autograd.grad(result, z)
                assert result.isfinite()
                assert gradient.isfinite().all(), (value, score)


def test_probabilities_whose_reciprocal_overflows_have_a_finite_gradient():
    for target in (torch.zeros(3), torch.ones(3)):
        for score in RATIOS:
            p = torch.full((3,), 1e-42, requires_grad=True)
            (gradient,) = torch.autograd.grad(score(p, target, from_logits=False), p)
            assert gradient.isfinite().all(), score


def test_a_class_of_minus_infinity_has_no_share_and_no_gradient():
    z = torch.tensor([[1.0, -inf, 0.0], [0.0, 2.0, -inf]], requires_grad=True)
    y = torch.tensor([0, 1])
    (gradient,) = torch.autograd.grad(soft_fbeta(z, y, average="macro"), z)
    assert gradient.isfinite().all()
    assert (gradient[z == -inf] == 0).all()


def test_an_empty_batch_scores_zero():
    for score in (*RATIOS[:3], soft_accuracy):
        assert score(torch.zeros(0, requires_grad=True), torch.zeros(0)) == 0
    assert soft_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("smooth", [0.0, 0.5])
@pytest.mark.parametrize(("average", "axes"), SETTINGS)
def test_first_and_second_derivatives_are_right(average, axes, smooth):
    z = torch.randn(*(5, 3)[:axes], generator=seeded(), dtype=torch.float64, requires_grad=True)
    t = torch.arange(z.numel()).view(z.shape) % 2
    w = torch.rand(5, generator=seeded(1), dtype=torch.float64)

    def score(z):
        return soft_fbeta(z, t, 1.5, average=average, smooth=smooth, sample_weight=w)

    assert torch.autograd.gradcheck(score, z)
    assert torch.autograd.gradgradcheck(score, z)


@pytest.mark.parametrize("score", [*RATIOS, soft_accuracy])
def test_vmap_of_the_gradient_is_a_loop_and_jacrev_works(score):
    z = torch.randn(6, 8, generator=seeded(), dtype=torch.float64)
    t = torch.rand(6, 8, generator=seeded(1)) < 0.5
    batched = torch.vmap(torch.func.grad(score))(z, t)
    for i in range(6):
        torch.testing.assert_close(batched[i], torch.func.jacrev(score)(z[i], t[i]))
    y = torch.randint(4, (6, 5), generator=seeded(2))
    logits = torch.randn(6, 5, 4, generator=seeded(3))
    macro = functools.partial(score, **({} if score is soft_accuracy else {"average": "macro"}))
    if score is not soft_accuracy:
        found = torch.vmap(macro)(logits, y)
        torch.testing.assert_close(found, torch.stack([macro(logits[i], y[i]) for i in range(6)]))


def test_autocast_changes_nothing():
    z, t = torch.randn(64, 3, generator=seeded()), torch.randint(3, (64,), generator=seeded(1))
    plain = soft_fbeta(z, t, average="macro")
    with torch.autocast("cpu", torch.bfloat16):
        assert soft_fbeta(z, t, average="macro").equal(plain)


def test_they_compile_as_one_graph(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import torch
from cln_tutorial.smoothing.metrics import SoftFBetaLoss, soft_accuracy, soft_fbeta
from cln_tutorial.smoothing.threshold import best_fbeta_threshold
compiled = lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
z, y = torch.randn(20, 4), torch.arange(20) % 4
t = torch.nn.functional.one_hot(y, 4)
for average in ("binary", "weighted", "samples"):
    def score(z, t):
        return soft_fbeta(z, t, 2.0, average=average)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(score)(a, t).backward(), score(b, t).backward()
    torch.testing.assert_close(a.grad, b.grad)
torch.testing.assert_close(compiled(soft_accuracy)(z, y), soft_accuracy(z, y))
torch.testing.assert_close(
    compiled(best_fbeta_threshold)(z, t), best_fbeta_threshold(z, t)
)
for average in ("binary", "macro"):
    one, two = (SoftFBetaLoss(average=average, momentum=0.9) for _ in range(2))
    fast = compiled(two)
    for step in range(3):
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        one(a, t.roll(step, 1)).backward(), fast(b, t.roll(step, 1)).backward()
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(one.state_dict(), two.state_dict())
"""
    child_output(code)


# --- the best threshold ---------------------------------------------------------------------------


def brute_force(scores, target, beta, w):
    best = (inf, 0.0)
    for threshold in sorted(set(scores), reverse=True):
        guess = scores >= threshold
        hits = (w * target * guess).sum()
        if hits > 0:
            value = (1 + beta**2) * hits / (beta**2 * (w * target).sum() + (w * guess).sum())
            best = max(best, (threshold, value), key=lambda pair: pair[1])
    return best


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), max_size=12),
    st.sampled_from([0.5, 1, 2.0]),
    st.booleans(),
)
def test_no_threshold_is_better_ties_and_weights_included(rows, beta, weighted):
    scores = np.array([row[0] for row in rows], dtype=float)
    target = np.array([row[1] for row in rows], dtype=float)
    w = np.array([row[2] if weighted else 1 for row in rows], dtype=float)
    threshold, value = best_fbeta_threshold(
        torch.from_numpy(scores),
        torch.from_numpy(target),
        beta,
        sample_weight=torch.from_numpy(w) if weighted else None,
    )
    # Whole counts: numerators and denominators are exact, the quotient is rounded once.
    assert (threshold.item(), value.item()) == brute_force(scores, target, beta, w)


@pytest.mark.parametrize("beta", [0.5, 1, 2])
def test_scikit_learn_finds_the_same_best_value_and_our_threshold_has_it(beta):
    scores = torch.randn(3000, generator=seeded()).mul(20).round().div(20)  # many ties
    target = torch.rand(3000, generator=seeded(1)) < (scores - 1).sigmoid()
    threshold, value = best_fbeta_threshold(scores, target, beta)
    precision, recall, _ = peer.precision_recall_curve(target, scores)
    with np.errstate(invalid="ignore"):
        curve = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
    assert value.item() == pytest.approx(np.nanmax(curve), rel=1e-6)  # value is float32
    achieved = peer.fbeta_score(target, scores >= threshold, beta=beta)
    assert value.item() == pytest.approx(achieved, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_threshold_is_a_score_and_gives_its_value_in_every_dtype(dtype):
    scores = torch.randn(2, 500, generator=seeded()).to(dtype)
    target = torch.rand(2, 500, generator=seeded(1)) < scores.sigmoid()
    threshold, value = best_fbeta_threshold(scores, target)
    assert threshold.dtype == dtype
    assert (scores == threshold).any()
    hard = (scores >= threshold).double()
    achieved = soft_fbeta(hard, target, from_logits=False)
    assert value.item() == pytest.approx(achieved.item(), rel=1e-6)


def test_the_best_threshold_of_a_calibrated_model_is_half_of_its_f1():
    # Scores Beta(0.5, 4), labels drawn from them; F of a threshold by quadrature.
    law = stats.beta(0.5, 4)

    def f1(c):
        # E[s; s > c] and P(s > c), both incomplete beta functions.
        hits = law.mean() * stats.beta(1.5, 4).sf(c)
        return 2 * hits / (law.mean() + law.sf(c))

    found = optimize.minimize_scalar(lambda c: -f1(c), bounds=(0.1, 0.4), options={"xatol": 1e-12})
    assert -found.fun == pytest.approx(0.433554, abs=5e-7)
    root = optimize.brentq(lambda c: c - f1(c) / 2, 0.1, 0.4, xtol=1e-14)
    assert root == pytest.approx(0.216777, abs=5e-7)
    assert f1(root) == pytest.approx(-found.fun, abs=1e-12)
    n = 1_000_000
    scores = torch.from_numpy(law.rvs(n, random_state=0))
    target = torch.rand(n, generator=seeded(), dtype=torch.float64) < scores
    threshold, value = best_fbeta_threshold(scores, target)
    # Four standard deviations, 0.00105 and 0.0037 over 40 seeds: near its top the curve is flat.
    assert value.item() == pytest.approx(0.433554, abs=0.0042)
    assert threshold.item() == pytest.approx(0.216777, abs=0.015)


def test_without_positives_the_best_threshold_predicts_none():
    for scores in (torch.tensor([0.3, 0.1]), torch.zeros(0)):
        threshold, value = best_fbeta_threshold(scores, torch.zeros(len(scores)))
        assert (threshold.item(), value.item()) == (inf, 0.0)


def test_infinite_scores_are_scores_and_nan_makes_both_results_nan():
    target = torch.tensor([1, 0, 1])
    threshold, value = best_fbeta_threshold(torch.tensor([inf, 0.0, -inf]), target)
    assert (threshold.item(), value.item()) == (-inf, pytest.approx(0.8))
    assert all(x.isnan() for x in best_fbeta_threshold(torch.tensor([nan, 1.0, 0.0]), target))


def test_vmap_finds_the_threshold_of_every_row():
    scores = torch.randn(5, 30, generator=seeded())
    target = torch.rand(5, 30, generator=seeded(1)) < 0.4
    found = torch.vmap(best_fbeta_threshold)(scores, target)
    for i in range(5):
        expected = best_fbeta_threshold(scores[i], target[i])
        assert (found[0][i], found[1][i]) == expected


# --- bad input ------------------------------------------------------------------------------------

P, T = torch.tensor([0.5, 0.25]), torch.tensor([1, 0])
ROWS, LABELS = torch.zeros(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: soft_fbeta(T, T), TypeError, "`input` must be a tensor of floating numbers"),
        (lambda: soft_fbeta(P, T, average="both"), ValueError, "`average` must be one of"),
        (lambda: soft_fbeta(P, T, beta=-1), ValueError, "`beta` must be at least 0; got -1"),
        (lambda: soft_fbeta(P, T, beta=nan), ValueError, "`beta` must be at least 0; got nan"),
        (lambda: soft_fbeta(P, T, smooth=-1), ValueError, "`smooth` must be at least 0"),
        (lambda: soft_fbeta(P, T, smooth=inf), ValueError, "`smooth` must be at least 0"),
        (lambda: soft_fbeta(P, T[:1]), ValueError, r"`target` must have the shape.*\(2,\)"),
        (lambda: soft_fbeta(ROWS, T), ValueError, "Class indices go with another average"),
        (lambda: soft_fbeta(ROWS, T.double(), average="macro"), ValueError, "be class indices"),
        (lambda: soft_fbeta(P, T, average="macro"), ValueError, r"must be \(\.\.\., classes\)"),
        (lambda: soft_fbeta(P, 2 * T), ValueError, r"`target` must lie in \[0, 1\]"),
        (lambda: soft_fbeta(ROWS, 3 * T, average="macro"), ValueError, r"must lie in \[0, 2\]"),
        (lambda: soft_fbeta(3 * P, T, from_logits=False), ValueError, "must be probabilities"),
        (lambda: soft_confusion(-P, T), ValueError, "must be probabilities"),
        (lambda: soft_fbeta(P, T, mask=T), TypeError, "`mask` must be of bools"),
        (lambda: soft_fbeta(P, T, mask=T[:1] > 0), ValueError, r"`mask` must have.*\(2,\)"),
        (
            lambda: soft_fbeta(ROWS, LABELS, average="samples", sample_weight=LABELS),
            ValueError,
            r"`sample_weight` must have the shape \(2,\); got \(2, 3\)",
        ),
        (lambda: soft_fbeta(P, T, sample_weight=-P), ValueError, "finite and at least 0"),
        (lambda: soft_fbeta(P, T, sample_weight=P / 0), ValueError, "finite and at least 0"),
        (lambda: SoftFBetaLoss(momentum=1), ValueError, r"lie in \[0, 1\); got 1"),
        (lambda: SoftFBetaLoss(average="samples", momentum=0.9), ValueError, "no meaning"),
        (lambda: SoftFBetaLoss(average="all"), ValueError, "`average` must be one of"),
        (lambda: SoftFBetaLoss(beta=-1), ValueError, "`beta` must be"),
        (lambda: SoftFBetaLoss(smooth=-1), ValueError, "`smooth` must be"),
        (lambda: best_fbeta_threshold(T, T), TypeError, "`scores` must be a tensor of floating"),
        (lambda: best_fbeta_threshold(P, T[:1]), ValueError, "`target` must have the shape"),
        (lambda: best_fbeta_threshold(P, 2 * T), ValueError, "`target` must be 0 or 1"),
        (lambda: best_fbeta_threshold(P, T, inf), ValueError, "`beta` must be finite"),
        (
            lambda: best_fbeta_threshold(P, T, sample_weight=-P),
            ValueError,
            "`sample_weight` must be finite",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
