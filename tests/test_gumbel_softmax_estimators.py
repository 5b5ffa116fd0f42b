"""Estimators against enumeration, quadrature and the published formulas; what each promises.

"Within 4 standard errors" is meant of each component: 6.3e-5 for a false alarm in one, at most 8e-4
in the twelve of the toy, and the seeds are fixed. Where states can be enumerated, the class itself
runs once on each of them (its draws are replaced), and means are exact up to rounding.
"""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from cln_tutorial.gumbel_softmax import estimators, measurement, relaxation
from cln_tutorial.gumbel_softmax.estimators import (
    RLOO,
    ZGR,
    DisARM,
    Estimate,
    Exact,
    GumbelRao,
    GumbelSoftmax,
    Rebar,
    Reinforce,
    STGumbelSoftmax,
    StraightThrough,
)
from cln_tutorial.gumbel_softmax.measurement import exact_gradient, measure

REPEATS = 50_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


W1, W2 = randn(12, 8, seed=1), randn(8, seed=2)
LOGITS = randn(3, 4, seed=3)
BINARY = torch.stack([torch.zeros(5, dtype=torch.float64), randn(5, seed=4)], -1)
V1, V2 = randn(10, 8, seed=5), randn(8, seed=6)
Q = randn(12, 12, seed=7)


def toy(y):
    return (y.flatten(-2) @ W1).tanh() @ W2


def binary_toy(y):
    return (y.flatten(-2) @ V1).tanh() @ V2


def quadratic(y):
    flat = y.flatten(-2)
    return ((flat @ Q) * flat).sum(-1) + flat @ W1[:, 0]


def mean_value(logits, f):
    return Exact()(logits, f).value


def constant_baseline(logits):
    return torch.full(logits.shape[:-2], mean_value(LOGITS, toy).item(), dtype=logits.dtype)


def gradients(est, logits, f, repeats=REPEATS, seed=0):
    """One gradient of each repeat."""
    leaf = logits.expand(repeats, *logits.shape).clone().requires_grad_()
    loss = est(leaf, f, generator=seeded(seed)).loss
    return torch.autograd.grad(loss.sum(), leaf)[0]


def errors_in_standard_errors(sample, truth):
    """Of the mean over the first axis, the largest of all components."""
    standard_error = sample.std(0) / math.sqrt(len(sample))
    return ((sample.mean(0) - truth).abs() / standard_error).max().item()


def total_variance(sample):
    return sample.var(0).sum().item()


def states(n_variables, n_classes):
    return torch.tensor(list(itertools.product(range(n_classes), repeat=n_variables)))


def log_probs(logits, index):
    return (
        logits.log_softmax(-1).expand(*index.shape, -1).gather(-1, index[..., None]).sum((-1, -2))
    )


def on_draws(monkeypatch, est, logits, f, index):
    """The gradient of each of many draws `index` (S, draws, N) by the class itself."""
    far = 1e4 * relaxation.one_hot(index, logits)  # noise that makes them the largest
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "gumbel_max_sample", lambda *args, **options: index)
        patch.setattr(relaxation, "gumbel_noise", lambda *args, **options: far)
        return gradients(est, logits, f, index.shape[1])


def on_all_draws(monkeypatch, est, logits, f, n=1):
    """The gradients of all joint draws of n samples, and their probabilities."""
    one = states(*logits.shape)
    which = states(n, len(one)).T
    index = one[which]
    found = on_draws(monkeypatch, est, logits, f, index)
    return found, log_probs(logits, index).sum(0).exp()


def mean_and_variance(found, probs):
    mean = torch.einsum("r,rnk->nk", probs, found)
    return mean, torch.einsum("r,rnk->", probs, (found - mean) ** 2).item()


def slopes(f, logits):
    """f' at all states, as a table with one axis per variable."""
    one_hots = relaxation.one_hot(states(*logits.shape), logits).requires_grad_()
    slope = torch.autograd.grad(f(one_hots).sum(), one_hots)[0]
    return slope.view(*[logits.shape[1]] * logits.shape[0], *logits.shape)


def mean_of_straight_through(f, logits):
    """The mean of f' over all states, through the Jacobian diag(pi) - pi pi^T, written out."""
    pi, probs = logits.softmax(-1), log_probs(logits, states(*logits.shape)).exp()
    mean = torch.einsum("r,rnk->nk", probs, slopes(f, logits).flatten(0, len(logits) - 1))
    return torch.einsum("nij,nj->ni", torch.diag_embed(pi) - pi[:, :, None] * pi[:, None], mean)


def mean_of_trapezoid(f, logits):
    """F6: of pi_i pi_j (f'(e_i) + f'(e_j)) (e_i - e_j) / 2 over j and the other variables."""
    pi, table = logits.softmax(-1), slopes(f, logits)
    n_variables, n_classes = logits.shape
    found = torch.zeros_like(logits)
    for n in range(n_variables):
        own = table.movedim(n, 0)[..., n, :]  # (own class, the others', slope)
        others = log_probs(
            logits[torch.arange(n_variables) != n], states(n_variables - 1, n_classes)
        )
        # The mean slope with own class i.
        at = torch.einsum("irk,r->ik", own.flatten(1, -2), others.exp())
        for i, j in itertools.product(range(n_classes), repeat=2):
            edge = (at[i] + at[j])[i] - (at[i] + at[j])[j]
            found[n, i] += pi[n, i] * pi[n, j] * edge / 2
    return found


# --- unbiased -------------------------------------------------------------------------------------

UNBIASED = {
    "reinforce": Reinforce(),
    "reinforce with a constant": Reinforce(constant_baseline),
    "rloo 2": RLOO(2),
    "rloo 4": RLOO(4),
    "rebar": Rebar(1.0, 1.0, learn=False),
    "cold rebar of another share": Rebar(0.3, 0.6, learn=False),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_what_is_marked_unbiased_is_within_four_standard_errors_of_the_exact_gradient(name):
    est = UNBIASED[name]
    assert est.unbiased
    found = gradients(est, LOGITS, toy)
    assert errors_in_standard_errors(found, exact_gradient(LOGITS, toy)) < 4


def test_disarm_is_within_four_standard_errors_of_the_exact_gradient():
    found = gradients(DisARM(), BINARY, binary_toy)
    assert DisARM.unbiased
    assert errors_in_standard_errors(found, exact_gradient(BINARY, binary_toy)) < 4


@pytest.mark.parametrize(("est", "n"), [(Reinforce(), 1), (RLOO(2), 2)])
def test_the_mean_over_all_draws_of_a_score_function_is_the_exact_gradient(monkeypatch, est, n):
    mean, _ = mean_and_variance(*on_all_draws(monkeypatch, est, LOGITS, toy, n))
    # Thousands of terms of order one and roundings of 1e-16.
    torch.testing.assert_close(mean, exact_gradient(LOGITS, toy), rtol=0, atol=1e-13)


def test_the_exact_gradient_is_that_of_the_written_out_sum():
    leaf = LOGITS.clone().requires_grad_()
    p = leaf.softmax(-1)
    total = 0.0
    for i, j, k in itertools.product(range(4), repeat=3):
        state = torch.eye(4, dtype=torch.float64)[[i, j, k]]
        total = total + p[0, i] * p[1, j] * p[2, k] * toy(state)
    total.backward()
    torch.testing.assert_close(exact_gradient(LOGITS, toy), leaf.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(mean_value(LOGITS, toy), total.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [2, 3])
def test_rloo_compares_each_sample_with_the_mean_of_the_others(monkeypatch, n):
    index = states(3, 4)[torch.tensor([[5], [40], [22]])[:n]]
    found = on_draws(monkeypatch, RLOO(n), LOGITS, toy, index)[0]
    drawn = relaxation.one_hot(index[:, 0], LOGITS)
    values = toy(drawn)
    expected = torch.zeros_like(LOGITS)
    for i in range(n):
        others = [values[j] for j in range(n) if j != i]
        weight = values[i] - sum(others) / len(others)
        expected += weight * (drawn[i] - LOGITS.softmax(-1)) / n
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def disarm_on_all_pairs(monkeypatch):
    """DisARM on the 3^5 regions of its noise, (1, 0), (0, 1) and equal; their probabilities."""
    p = (BINARY[:, 1] - BINARY[:, 0]).sigmoid()
    differ = torch.minimum(p, 1 - p)  # u and 1 - u on two sides of p
    of_region = torch.stack([differ, differ, 1 - 2 * differ])
    region = states(5, 3)
    probs = of_region[region, torch.arange(5)].prod(-1)
    alpha = BINARY[:, 1] - BINARY[:, 0]
    logistic = torch.stack([torch.full((5,), 1e3), torch.full((5,), -1e3), alpha / 2])
    noise = torch.zeros(len(region), 5, 2, dtype=torch.float64)
    noise[..., 1] = logistic[region, torch.arange(5)]
    with monkeypatch.context() as patch:
        patch.setattr(estimators, "gumbel_noise", lambda *args, **options: noise)
        return gradients(DisARM(), BINARY, binary_toy, len(region)), probs


def test_the_mean_over_all_pairs_of_disarm_is_the_exact_gradient(monkeypatch):
    mean, _ = mean_and_variance(*disarm_on_all_pairs(monkeypatch))
    exact = exact_gradient(BINARY, binary_toy)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-13)  # 243 terms


def test_disarm_has_less_variance_than_rloo_of_two_on_five_binary_variables(monkeypatch):
    _, disarm = mean_and_variance(*disarm_on_all_pairs(monkeypatch))
    _, rloo = mean_and_variance(*on_all_draws(monkeypatch, RLOO(2), BINARY, binary_toy, 2))
    assert disarm < rloo
    # The class with its own noise: a variance of 50,000 heavy-tailed terms holds within 5 %.
    assert total_variance(gradients(DisARM(), BINARY, binary_toy)) == pytest.approx(
        disarm, rel=0.05
    )


def test_disarm_is_its_published_formula_pair_by_pair_and_zero_where_the_two_agree():
    found = gradients(DisARM(), BINARY, binary_toy, 200)
    sample = DisARM()(BINARY.expand(200, 5, 2), binary_toy, generator=seeded()).sample
    first, second = sample[..., 1]
    alpha = BINARY[:, 1] - BINARY[:, 0]
    # Dong et al. 2020: (-1)^b~ [b != b~] sigmoid(|alpha|) times half the difference of the values.
    sign = (-1) ** second * (first != second)
    half = (binary_toy(sample[0]) - binary_toy(sample[1])) / 2
    expected = half[:, None] * sign * alpha.abs().sigmoid()
    torch.testing.assert_close(found[..., 1], expected, rtol=0, atol=1e-14)
    assert (found[..., 0] == -found[..., 1]).all()
    agree = first == second
    assert 0 < agree.sum() < agree.numel()
    assert (found[agree] == 0).all()


def test_the_pair_of_disarm_has_the_right_margins_and_is_antithetic():
    leaf = BINARY.expand(REPEATS, 5, 2)
    sample = DisARM()(leaf, binary_toy, generator=seeded()).sample
    b, antithetic = sample[..., 1]
    p = BINARY.softmax(-1)[:, 1]
    for each in (b, antithetic):
        assert errors_in_standard_errors(each, p) < 4
    # u and 1 - u are both below p in 2 p - 1 of all cases, if that is positive.
    both, likely = b * antithetic, p > 0.5
    assert 0 < likely.sum() < 5
    assert errors_in_standard_errors(both[:, likely], 2 * p[likely] - 1) < 4
    assert (both[:, ~likely] == 0).all()


# --- biased, each at its own mean -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("est", "closed_form"),
    [(StraightThrough(), mean_of_straight_through), (ZGR(), mean_of_trapezoid)],
)
def test_the_mean_over_all_draws_is_the_closed_form(monkeypatch, est, closed_form):
    mean, _ = mean_and_variance(*on_all_draws(monkeypatch, est, LOGITS, toy))
    torch.testing.assert_close(mean, closed_form(toy, LOGITS), rtol=0, atol=1e-13)
    exact = exact_gradient(LOGITS, toy)
    assert (mean - exact).norm() > 0.05 * exact.norm()  # biased, as marked
    assert not est.unbiased


@pytest.mark.parametrize(
    ("est", "closed_form"),
    [(StraightThrough(), mean_of_straight_through), (ZGR(), mean_of_trapezoid)],
)
def test_draws_of_its_own_have_the_mean_of_the_closed_form(est, closed_form):
    found = gradients(est, LOGITS, toy)
    assert errors_in_standard_errors(found, closed_form(toy, LOGITS)) < 4


def test_zgr_is_exact_on_quadratics_and_straight_through_is_not(monkeypatch):
    exact = exact_gradient(LOGITS, quadratic)
    mean, _ = mean_and_variance(*on_all_draws(monkeypatch, ZGR(), LOGITS, quadratic))
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-12)
    mean, _ = mean_and_variance(*on_all_draws(monkeypatch, StraightThrough(), LOGITS, quadratic))
    assert (mean - exact).norm() > 0.1 * exact.norm()


def test_the_published_reinmax_is_zgr_sample_by_sample(monkeypatch):
    index = states(3, 4)[None]
    found = on_draws(monkeypatch, ZGR(), LOGITS, toy, index)
    # Liu et al. 2023, algorithm 2: the branch of pi1 twice, less half that of pi0.
    leaf = LOGITS.expand(64, 3, 4).clone().requires_grad_()
    drawn = relaxation.one_hot(index[0], LOGITS)
    pi0 = leaf.softmax(-1)
    pi1 = (drawn + pi0) / 2
    pi1 = ((pi1.log() - leaf).detach() + leaf).softmax(-1)
    pi2 = 2 * pi1 - pi0 / 2
    toy(pi2 - pi2.detach() + drawn).sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-14)  # measured 1e-15


PANELS = np.concatenate([[0], 1e-5 * 2.0 ** np.arange(23)])  # finer where D changes; up to 42


def logistic_grid(alpha):
    """Nodes and weights for a mean over logistic noise, with panels that end where D changes."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle, half = (PANELS[1:] + PANELS[:-1]) / 2, (PANELS[1:] - PANELS[:-1]) / 2
    away = (middle[:, None] + half[:, None] * nodes).ravel()
    x = torch.tensor(np.concatenate([-away[::-1], away]))
    w = torch.tensor((half[:, None] * weights).ravel())
    noise = x - alpha
    weight = torch.cat([w.flip(0), w]) * noise.sigmoid() * (-noise).sigmoid()
    assert weight.sum().item() == pytest.approx(1, abs=1e-9)  # of the density
    return noise, weight


TWO = torch.stack([torch.zeros(2, dtype=torch.float64), torch.tensor([0.4, -0.9])], -1).double()
ALPHA = TWO[:, 1]


def two_toy(y):
    return (y.flatten(-2) @ W1[:4]).tanh() @ W2


def grid_of_two():
    (first, w_first), (second, w_second) = map(logistic_grid, ALPHA)
    noise = torch.stack(torch.meshgrid(first, second, indexing="ij"), -1).flatten(0, 1)
    return noise, (w_first[:, None] * w_second).flatten()


@functools.cache
def quadrature(kind, tau):
    """Mean gradient for two binary variables, written out with y = sigmoid((alpha + L) / tau)."""
    noise, weights = grid_of_two()
    alpha = ALPHA.expand_as(noise).clone().requires_grad_()
    y = ((alpha + noise) / tau).sigmoid()
    at = y if kind == "relaxed" else (y > 0.5).double() + y - y.detach()
    two_toy(torch.stack([1 - at, at], -1)).mul(weights).sum().backward()
    mean = alpha.grad.sum(0)  # of each node with its weight
    return torch.stack([-mean, mean], -1)


def on_grid(monkeypatch, est):
    """The gradients of the class itself at the nodes, and their weights."""
    noise, weights = grid_of_two()
    both = torch.stack([torch.zeros_like(noise), noise], -1)
    with monkeypatch.context() as patch:
        patch.setattr(relaxation, "gumbel_noise", lambda *args, **options: both)
        return gradients(est, TWO, two_toy, len(noise)), weights


@pytest.mark.parametrize(
    ("est", "kind"),
    [
        (GumbelSoftmax(0.5), "relaxed"),
        (STGumbelSoftmax(0.5), "hard"),
        (GumbelRao(0.5, 3), "hard"),
    ],
    ids=["gumbel softmax", "straight-through", "rao"],
)
def test_the_mean_with_a_temperature_is_that_of_the_quadrature(est, kind):
    found = gradients(est, TWO, two_toy)
    assert not est.unbiased
    assert errors_in_standard_errors(found, quadrature(kind, 0.5)) < 4
    assert errors_in_standard_errors(found, exact_gradient(TWO, two_toy)) > 8  # there is a bias


def test_gumbel_rao_has_the_mean_of_straight_through_and_less_variance():
    many = gradients(GumbelRao(0.5, 10), LOGITS, toy)
    single = gradients(GumbelRao(0.5, 1), LOGITS, toy, seed=1)
    plain = gradients(STGumbelSoftmax(0.5), LOGITS, toy, seed=2)
    for found in (many, single):
        spread = (found.var(0) + plain.var(0)) / REPEATS
        assert ((found.mean(0) - plain.mean(0)).abs() / spread.sqrt()).max() < 4
    # n = 1 is the very law of straight-through: variances of 50,000 draws hold within 5 %.
    assert total_variance(single) == pytest.approx(total_variance(plain), rel=0.05)
    assert total_variance(many) < 0.7 * total_variance(plain)


def test_straight_through_gumbel_softmax_tends_to_the_trapezoid_and_not_to_the_exact_gradient(
    monkeypatch,
):
    limit = mean_of_trapezoid(two_toy, TWO)
    exact = exact_gradient(TWO, two_toy)
    apart = []
    for tau in (0.04, 0.02, 0.01):
        mean, _ = mean_and_variance(*on_grid(monkeypatch, STGumbelSoftmax(tau)))
        apart.append(((mean - limit).norm() / exact.norm()).item())
    assert apart[1] < 0.6 * apart[0]  # at least of first order in tau
    assert apart[2] < 0.6 * apart[1]
    assert apart[2] < 0.02 < (limit - exact).norm() / exact.norm()


def test_gumbel_softmax_loses_its_bias_as_its_variance_grows_like_one_over_tau(monkeypatch):
    exact = exact_gradient(TWO, two_toy)
    biases, scaled = [], []
    for tau in (0.02, 0.01, 0.005):
        mean, variance = mean_and_variance(*on_grid(monkeypatch, GumbelSoftmax(tau)))
        biases.append(((mean - exact).norm() / exact.norm()).item())
        scaled.append(variance * tau)
    assert biases[0] < 0.02
    assert biases[2] < biases[1] < biases[0]
    assert scaled[1] == pytest.approx(scaled[0], rel=0.03)  # the next order is tau itself
    assert scaled[2] == pytest.approx(scaled[1], rel=0.03)


# --- what a constant changes ---------------------------------------------------------------------


def test_a_constant_changes_the_variance_of_the_score_function_by_the_closed_form(monkeypatch):
    shift = 3.0
    _, before = mean_and_variance(*on_all_draws(monkeypatch, Reinforce(), LOGITS, toy))
    _, after = mean_and_variance(
        *on_all_draws(monkeypatch, Reinforce(), LOGITS, lambda y: toy(y) + shift)
    )
    index = states(3, 4)
    probs = log_probs(LOGITS, index).exp()
    drawn = relaxation.one_hot(index, LOGITS)
    length = (drawn - LOGITS.softmax(-1)).square().sum((-1, -2))
    # E (f + c)^2 |s|^2 - E f^2 |s|^2; the mean does not change, as E s = 0.
    closed = (probs * (2 * shift * toy(drawn) + shift**2) * length).sum().item()
    assert after - before == pytest.approx(closed, rel=1e-12)
    assert after > 2 * before


@pytest.mark.parametrize(
    "est",
    [RLOO(2), StraightThrough(), ZGR(), STGumbelSoftmax(), GumbelSoftmax(), GumbelRao()],
    ids=lambda est: type(est).__name__,
)
def test_a_constant_changes_nothing_where_there_is_a_derivative_or_a_difference(est):
    before = gradients(est, LOGITS, toy, 1000)
    after = gradients(est, LOGITS, lambda y: toy(y) + 3.0, 1000)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-13)  # roundings of f + 3


# --- baselines, REBAR -----------------------------------------------------------------------------


def test_the_moving_baseline_is_the_mean_of_earlier_calls_and_not_of_this_one(monkeypatch):
    est, logits = Reinforce("ema"), LOGITS.expand(1, 3, 4)
    values, before = [2.0, 5.0, -1.0], [0.0, 2.0, 0.9 * 2.0 + 0.1 * 5.0]
    index = states(3, 4)[None, 7:8]
    for value, baseline in zip(values, before, strict=True):
        found = on_draws(
            monkeypatch, est, LOGITS, lambda y, v=value: torch.full(y.shape[:-2], v).double(), index
        )
        score = relaxation.one_hot(index[0], logits) - logits.softmax(-1)
        torch.testing.assert_close(found, (value - baseline) * score, rtol=0, atol=1e-14)


def test_a_warm_moving_baseline_is_unbiased_and_lowers_the_variance_of_a_shifted_function():
    def shifted(y):
        return toy(y) + 10.0

    est = Reinforce("ema")
    est(LOGITS.expand(1000, 3, 4), shifted, generator=seeded(1))
    found = gradients(est, LOGITS, shifted)
    assert errors_in_standard_errors(found, exact_gradient(LOGITS, shifted)) < 4
    assert total_variance(found) < 0.2 * total_variance(gradients(Reinforce(), LOGITS, shifted))


def test_no_gradient_goes_back_to_a_baseline():
    net = nn.Linear(12, 1).double()
    leaf = LOGITS.expand(5, 3, 4).clone().requires_grad_()
    seen = []

    def baseline(logits):
        seen.append(logits.requires_grad)
        return net(logits.flatten(-2))[:, 0]

    found = Reinforce(baseline)(leaf, toy, generator=seeded())
    found.loss.sum().backward()
    assert seen == [False]
    assert all(p.grad is None for p in net.parameters())
    value = toy(found.sample[0]) - baseline(LOGITS.expand(5, 3, 4))
    expected = value.detach()[:, None, None] * (found.sample[0] - LOGITS.softmax(-1))
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-14)


def test_rebar_shows_f_a_vertex_and_two_relaxed_samples_that_agree_with_it():
    seen = []

    def spy(y):
        seen.append(y.detach())
        return toy(y)

    Rebar(0.7)(LOGITS.expand(200, 3, 4), spy, generator=seeded())
    ((drawn, free, given),) = seen
    assert drawn.equal(relaxation.one_hot(drawn.argmax(-1), drawn))
    assert free.argmax(-1).equal(drawn.argmax(-1))
    assert given.argmax(-1).equal(drawn.argmax(-1))
    assert not free.isclose(given).any()  # drawn anew


def test_rebar_of_no_share_is_the_score_function():
    found = gradients(Rebar(1.0, 0.0, learn=False), LOGITS, toy, 100)
    estimate = Rebar(1.0, 0.0)(LOGITS.expand(100, 3, 4), toy, generator=seeded())
    drawn = estimate.sample[0]
    expected = toy(drawn)[:, None, None] * (drawn - LOGITS.softmax(-1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_rebar_is_its_published_formula_draw_by_draw():
    # From what f saw, the derivatives of the two relaxed samples written out: through the noise of
    # the free one, and through the conditioning of the other, by finite differences of the logits.
    est, h = Rebar(0.8, 0.6, learn=False), 1e-6
    logits = LOGITS.expand(20, 3, 4)

    def seen_at(at):
        seen = []
        est(at, lambda y: seen.append(y.detach()) or toy(y), generator=seeded(5))
        return seen[0]

    drawn, _, given = seen_at(logits)
    score = drawn - LOGITS.softmax(-1)
    expected = (toy(drawn) - 0.6 * toy(given))[:, None, None] * score
    for n, k in itertools.product(range(3), range(4)):
        step = torch.zeros(3, 4, dtype=torch.float64)
        step[n, k] = h
        up, down = seen_at(logits + step), seen_at(logits - step)
        assert up[0].equal(down[0])  # the same vertex on both sides
        control = [toy(side[1]) - toy(side[2]) for side in (up, down)]
        expected[:, n, k] += 0.6 * (control[0] - control[1]) / (2 * h)
    found = gradients(est, LOGITS, toy, 20, seed=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # h^2, and 1e-16 / h


def test_the_control_variate_of_rebar_lowers_the_variance(monkeypatch):
    _, without = mean_and_variance(*on_all_draws(monkeypatch, Reinforce(), LOGITS, toy))
    assert total_variance(gradients(Rebar(learn=False), LOGITS, toy)) < 0.6 * without


def test_rebar_learns_a_share_and_a_temperature_that_lower_the_variance():
    est = Rebar(tau=3.0, eta=0.0)
    start = total_variance(gradients(copy.deepcopy(est), LOGITS, toy))
    generator = seeded(2)
    for _ in range(400):  # steps of 0.01
        leaf = LOGITS.expand(100, 3, 4).clone().requires_grad_()
        est(leaf, toy, generator=generator)
    learnt = Rebar(est.tau, est.eta, learn=False)
    end = total_variance(gradients(learnt, LOGITS, toy))
    assert end < 0.6 * start
    for fixed in (Rebar(3.0, 1.0, learn=False), Rebar(0.1, 0.3, learn=False)):
        assert end < 0.9 * total_variance(gradients(fixed, LOGITS, toy))
    # The best share at this temperature, from g = g0 + eta h with E h = 0, of the same noise.
    g0 = gradients(Rebar(est.tau, 0.0, learn=False), LOGITS, toy)
    h = gradients(Rebar(est.tau, 1.0, learn=False), LOGITS, toy) - g0
    best = -((g0 * h).sum() / h.square().sum()).item()
    assert est.eta == pytest.approx(best, abs=0.1)  # wanders about it by some steps


def test_the_gradients_that_rebar_learns_by_are_those_of_the_squared_length():
    def length(tau, eta):
        return gradients(Rebar(tau, eta, learn=False), LOGITS, toy, 50).square().sum().item()

    est = Rebar(0.8, 0.6)
    gradients(est, LOGITS, toy, 50)
    h = 1e-5
    by_tau = (length(0.8 * math.exp(h), 0.6) - length(0.8 * math.exp(-h), 0.6)) / (2 * h)
    by_eta = (length(0.8, 0.6 + h) - length(0.8, 0.6 - h)) / (2 * h)
    found = [est._log_tau.grad.item(), est._eta.grad.item()]
    assert found == pytest.approx([by_tau, by_eta], rel=1e-6)


def test_rebar_learns_neither_without_a_gradient_nor_when_told_not_to():
    still, told = Rebar(0.5, 0.7), Rebar(0.5, 0.7, learn=False)
    still(LOGITS, toy)
    with torch.no_grad():
        still(LOGITS.clone().requires_grad_(), toy)
    told(LOGITS.clone().requires_grad_(), toy).loss.backward()
    for est in (still, told):
        assert (est.tau, est.eta) == pytest.approx((0.5, 0.7), rel=1e-15)


# --- parameters inside f --------------------------------------------------------------------------

ALL = {
    "exact": Exact(),
    "reinforce": Reinforce(),
    "reinforce ema": Reinforce("ema"),
    "rloo": RLOO(3),
    "disarm": DisARM(),
    "straight-through": StraightThrough(),
    "zgr": ZGR(),
    "st-gs": STGumbelSoftmax(0.5),
    "gumbel softmax": GumbelSoftmax(0.5),
    "gumbel-rao": GumbelRao(0.5, 4),
    "rebar": Rebar(0.8, 0.6),
}


def problem(est):
    return (BINARY, V1, V2) if isinstance(est, DisARM) else (LOGITS, W1, W2)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("exact", "gumbel softmax", "rebar")])
def test_the_gradient_for_parameters_inside_f_is_that_of_f_at_the_samples(name):
    est = copy.deepcopy(ALL[name])
    logits, first, second = problem(est)
    inner = first.clone().requires_grad_()

    def f(y):
        return (y.flatten(-2) @ inner).tanh() @ second

    leaf = logits.expand(7, *logits.shape).clone().requires_grad_()
    found = est(leaf, f, generator=seeded())
    (through_loss,) = torch.autograd.grad(found.loss.sum(), inner)
    (plain,) = torch.autograd.grad(f(found.sample).mean(0).sum(), inner)
    torch.testing.assert_close(through_loss, plain, rtol=0, atol=1e-14)


def readout_gradients(est, repeats=REPEATS):
    """The gradient for the last weights of f, of each repeat; and the exact one."""
    logits, first, second = problem(est)

    def f_of(weights):
        return lambda y: ((y.flatten(-2) @ first).tanh() * weights).sum(-1)

    each = second.expand(repeats, 8).clone().requires_grad_()
    leaf = logits.expand(repeats, *logits.shape).clone().requires_grad_()
    loss = est(leaf, f_of(each), generator=seeded()).loss
    (found,) = torch.autograd.grad(loss.sum(), each)
    one = second.clone().requires_grad_()
    index = states(*logits.shape)
    values = f_of(one)(relaxation.one_hot(index, logits))
    mean = (log_probs(logits, index).exp() * values).sum()
    return found, torch.autograd.grad(mean, one)[0]


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("exact", "gumbel softmax")])
def test_the_gradient_for_parameters_inside_f_is_unbiased(name):
    found, exact = readout_gradients(copy.deepcopy(ALL[name]))
    assert errors_in_standard_errors(found, exact) < 4


def test_the_exact_loss_has_the_exact_gradient_for_parameters_inside_f():
    found, exact = readout_gradients(Exact(), 2)
    torch.testing.assert_close(found, exact.expand(2, 8), rtol=0, atol=1e-14)


def test_gumbel_softmax_trains_f_off_the_vertices_and_so_with_a_bias():
    found, exact = readout_gradients(GumbelSoftmax(0.5))
    assert errors_in_standard_errors(found, exact) > 20


# --- what all promise -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_attributes_tell_the_truth(name):
    est, seen, generator = copy.deepcopy(ALL[name]), [], seeded()
    logits, first, second = problem(est)

    def f(y):
        seen.append(y.detach())
        return (y.flatten(-2) @ first).tanh() @ second

    def black_box(y):
        return f(y.detach())

    logits = logits.expand(20, *logits.shape)
    leaf = logits.clone().requires_grad_()
    est(leaf, f, generator=generator)
    (y,) = seen
    assert len(y) == (est.n_evaluations or logits.shape[-1] ** logits.shape[-2])
    one_hot = y.equal(relaxation.one_hot(y.argmax(-1), y))
    assert est.discrete_forward == one_hot
    if est.needs_f_gradient:
        with pytest.raises(ValueError, match=f"{type(est).__name__} needs the gradient of `f`"):
            est(leaf, black_box, generator=generator)
        est(logits, black_box, generator=generator)  # without a gradient it is not missed
    else:
        est(leaf, black_box, generator=generator).loss.sum().backward()
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_the_value_and_the_value_the_mean_of_f(name):
    est = copy.deepcopy(ALL[name])
    logits, first, second = problem(est)

    def f(y):
        return (y.flatten(-2) @ first).tanh() @ second

    repeats = 3 if isinstance(est, Exact) else REPEATS
    found = est(logits.expand(repeats, *logits.shape), f, generator=seeded())
    assert found.loss.equal(found.value)
    assert not found.value.requires_grad
    assert not found.sample.requires_grad
    exact = mean_value(logits, f)
    if isinstance(est, Exact):
        torch.testing.assert_close(found.value, exact.expand(3), rtol=0, atol=1e-14)
    elif isinstance(est, GumbelSoftmax):  # E4: f off the vertices
        assert errors_in_standard_errors(found.value, exact) > 8
    else:
        assert errors_in_standard_errors(found.value, exact) < 4


@pytest.mark.parametrize("name", ALL)
def test_each_element_of_a_batch_is_a_problem_of_its_own(name):
    est = copy.deepcopy(ALL[name])
    logits, first, second = problem(est)
    scale = torch.tensor([[1.0, 0.0, -2.0], [4.0, 0.5, 0.0]], dtype=torch.float64)

    def f(y):
        assert y.shape[1:] == (2, 3, *logits.shape)
        return scale * ((y.flatten(-2) @ first).tanh() @ second)

    leaf = logits.expand(2, 3, *logits.shape).clone().requires_grad_()
    found = est(leaf, f, generator=seeded())
    assert found.loss.shape == found.value.shape == (2, 3)
    assert found.sample.shape[1:] == leaf.shape
    found.loss.sum().backward()
    # An element whose f is zero has no gradient, whatever the others are. (The moving baseline is
    # zero in a first call.)
    assert (leaf.grad[scale == 0] == 0).all()
    assert (leaf.grad[scale != 0].abs().amax((-1, -2)) > 0).sum() >= 3
    if isinstance(est, Exact):
        one = exact_gradient(logits, lambda y: (y.flatten(-2) @ first).tanh() @ second)
        torch.testing.assert_close(leaf.grad, scale[..., None, None] * one, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_the_same_state_of_the_generator_gives_the_same_estimate_and_no_other_is_used(name):
    before = torch.get_rng_state()
    logits, first, second = problem(ALL[name])

    def f(y):
        return (y.flatten(-2) @ first).tanh() @ second

    once, twice, other = (
        gradients(copy.deepcopy(ALL[name]), logits, f, 50, seed) for seed in (3, 3, 4)
    )
    assert once.equal(twice)
    assert isinstance(ALL[name], Exact) or not once.equal(other)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ALL)
def test_an_impossible_class_is_never_drawn_and_gets_a_gradient_of_zero(name):
    est = copy.deepcopy(ALL[name])
    logits, first, second = problem(est)
    logits = logits.clone()
    logits[1, 0] = -math.inf

    def f(y):
        return (y.flatten(-2) @ first).tanh() @ second

    leaf = logits.expand(200, *logits.shape).clone().requires_grad_()
    found = est(leaf, f, generator=seeded())
    found.loss.sum().backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[:, 1, 0] == 0).all()
    assert leaf.grad.abs().max() > 0
    if not isinstance(est, Exact):
        assert (found.sample[..., 1, 0] == 0).all()
    assert math.isfinite(getattr(est, "eta", 0.0))
    assert math.isfinite(getattr(est, "tau", 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_samples_and_gradients_have_the_dtype_of_the_logits(name, dtype):
    est = copy.deepcopy(ALL[name])
    logits, first, second = (each.to(dtype) for each in problem(est))

    def f(y):
        assert y.dtype == dtype
        return (y.flatten(-2) @ first).tanh() @ second

    leaf = logits.expand(50, *logits.shape).clone().requires_grad_()
    found = est(leaf, f, generator=seeded())
    found.loss.sum().backward()
    assert found.sample.dtype == leaf.grad.dtype == dtype
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_has_an_empty_estimate_and_teaches_nothing(name):
    est = copy.deepcopy(ALL[name])
    logits, first, second = problem(est)

    def f(y):
        return (y.flatten(-2) @ first).tanh() @ second

    leaf = logits.expand(0, *logits.shape).clone().requires_grad_()
    found = est(leaf, f)
    found.loss.sum().backward()
    assert found.loss.shape == (0,)
    assert leaf.grad.shape == leaf.shape
    assert est(logits, f).value.isfinite()


# --- measure --------------------------------------------------------------------------------------


def test_measure_finds_the_bias_variance_and_cosine_of_made_gradients():
    exact = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    rows = torch.tensor([[[5.0, 3.0]], [[3.0, 9.0]], [[4.0, 0.0]]], dtype=torch.float64)

    def made(logits, f, *, generator):
        loss = (rows[: len(logits)] * logits).sum((-1, -2))
        return Estimate(loss, loss.detach(), logits)

    found = measure(made, torch.zeros(1, 2).double(), toy, 3, exact=exact)
    # Mean (4, 4): an error of (1, 0) beside a length of 5; deviations 1, 1, 0 and 1, 5, 4.
    assert found.bias == pytest.approx(1 / 5, rel=1e-14)
    assert found.variance == pytest.approx((1 + 1 + 0 + 1 + 25 + 16) / 2, rel=1e-14)
    assert found.standard_error == pytest.approx(math.sqrt(22 / 3) / 5, rel=1e-14)
    assert found.cosine == pytest.approx((4 * 3 + 4 * 4) / (math.sqrt(32) * 5), rel=1e-14)


@pytest.mark.parametrize("portion", [1, 24, 10**6])
def test_measure_sees_every_repeat_once_whatever_the_portions(monkeypatch, portion):
    monkeypatch.setattr(measurement, "NUMBERS_AT_A_TIME", portion)
    table, place = randn(7, 3, 4, seed=8), []

    def made(logits, f, *, generator):
        rows = table[len(place) : len(place) + len(logits)]
        place.extend(rows)
        loss = (rows * logits).sum((-1, -2))
        return Estimate(loss, loss.detach(), logits)

    found = measure(made, LOGITS, toy, 7)
    exact = exact_gradient(LOGITS, toy)
    assert len(place) == 7
    assert found.variance == pytest.approx(total_variance(table), rel=1e-12)
    error = (table.mean(0) - exact).norm() / exact.norm()
    assert found.bias == pytest.approx(error.item(), rel=1e-12)


def test_measure_finds_the_bias_of_straight_through_and_none_of_rloo():
    exact = exact_gradient(LOGITS, toy)
    bias = ((mean_of_straight_through(toy, LOGITS) - exact).norm() / exact.norm()).item()
    found = measure(StraightThrough(), LOGITS, toy, REPEATS, generator=seeded())
    assert found.bias == pytest.approx(bias, abs=4 * found.standard_error)
    unbiased = measure(RLOO(4), LOGITS, toy, REPEATS, generator=seeded())
    # 6.3e-5 if all of its noise lies in one direction, and less otherwise.
    assert unbiased.bias < 4 * unbiased.standard_error
    assert unbiased.cosine > 0.99


def test_measure_of_the_exact_gradient_finds_nothing():
    found = measure(Exact(), LOGITS, toy, 5)
    assert found == pytest.approx((0, 0, 0, 1), abs=1e-14)


def memory(est):
    return (est.tau, est.eta) if isinstance(est, Rebar) else float(est._mean)


@pytest.mark.parametrize("est", [Reinforce("ema"), Rebar()], ids=["ema", "rebar"])
def test_measure_leaves_an_estimator_with_a_memory_and_the_parameters_of_f_as_they_are(est):
    inner = W1.clone().requires_grad_()

    def f(y):
        return (y.flatten(-2) @ inner).tanh() @ W2

    leaf = LOGITS.expand(100, 3, 4).clone().requires_grad_()
    est(leaf, f, generator=seeded())
    before = memory(est)
    measure(est, LOGITS, f, 100, generator=seeded())
    assert inner.grad is None
    assert memory(est) == before
    est(leaf, f, generator=seeded(1))
    assert memory(est) != before


def test_measure_and_the_exact_gradient_take_a_batch():
    logits = randn(2, 3, 4, seed=9)
    scale = torch.tensor([1.0, -3.0], dtype=torch.float64)

    def f(y):
        assert y.shape[1:] == logits.shape
        return scale * toy(y)

    each = [s * exact_gradient(row, toy) for s, row in zip(scale, logits, strict=True)]
    torch.testing.assert_close(exact_gradient(logits, f), torch.stack(each), rtol=0, atol=1e-14)
    found = measure(RLOO(4), logits, f, 20_000, generator=seeded())
    assert found.bias < 4 * found.standard_error


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ALL)
def test_logits_of_the_wrong_kind_are_refused(name):
    est = ALL[name]
    with pytest.raises(ValueError, match=r"\(\*batch, N, K\).*got \(4,\)"):
        est(torch.zeros(4), toy)
    with pytest.raises(ValueError, match=r"\(\*batch, N, K\).*got \(3, 0\)"):
        est(torch.zeros(3, 0), toy)
    with pytest.raises(TypeError, match=r"`logits` must be a tensor of floating.*int64"):
        est(torch.zeros(3, 2, dtype=torch.int64), toy)
    with pytest.raises(ValueError, match="`logits` has 1 entries that are NaN"):
        est(torch.tensor([[0.0, math.nan]]), toy)
    with pytest.raises(ValueError, match=r"`logits` has a \+inf"):
        est(torch.tensor([[0.0, math.inf]]), toy)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ALL)
def test_what_f_returns_is_checked_and_the_message_says_what_is_wanted(name):
    est = copy.deepcopy(ALL[name])
    logits = problem(est)[0].expand(2, -1, -1)
    with pytest.raises(ValueError, match=r"one number per sample, \(\d+, 2\) for.*returned \(\)"):
        est(logits, lambda y: y.sum())
    with pytest.raises(TypeError, match=r"floating numbers; it returned torch\.int64"):
        est(logits, lambda y: y.argmax(-1).sum(-1))
    with pytest.raises(TypeError, match="tensor of floating numbers; it returned float"):
        est(logits, lambda y: 1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [STGumbelSoftmax, GumbelSoftmax, GumbelRao, Rebar])
@pytest.mark.parametrize("tau", [0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(kind, tau):
    with pytest.raises(ValueError, match="`tau` must be finite and at least"):
        kind(tau)


@pytest.mark.usefixtures("unchecked")
def test_other_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`n` must be at least 2; got 1"):
        RLOO(1)
    with pytest.raises(ValueError, match="`n` must be at least 1; got 0"):
        GumbelRao(0.5, 0)
    with pytest.raises(ValueError, match="None, 'ema' or a function; got 'mean'"):
        Reinforce("mean")
    with pytest.raises(ValueError, match=r"per element of the batch, \(2,\); it returned \(\)"):
        Reinforce(lambda logits: torch.zeros(()))(LOGITS.expand(2, 3, 4), toy)
    with pytest.raises(ValueError, match=r"a tensor with.*it returned <class 'float'>"):
        Reinforce(lambda logits: 0.5)(LOGITS, toy)
    with pytest.raises(ValueError, match=r"2\^17 states; at most 65536"):
        Exact()(torch.zeros(17, 2), toy)
    with pytest.raises(ValueError, match=r"binary variables.*got \(3, 4\)"):
        DisARM()(LOGITS, toy)
    with pytest.raises(ValueError, match="`repeats` must be at least 2; got 1"):
        measure(RLOO(), LOGITS, toy, 1)
    with pytest.raises(ValueError, match=r"`exact` must have the shape.*\(3, 4\); got \(4,\)"):
        measure(RLOO(), LOGITS, toy, 2, exact=torch.zeros(4))
    with pytest.raises(ValueError, match="exact gradient is zero"):
        measure(RLOO(), LOGITS, lambda y: y.sum((-1, -2)) * 0, 2)


def test_as_many_states_as_are_allowed_are_enumerated():
    value = Exact()(torch.zeros(16, 2), lambda y: y[..., 1].sum(-1)).value
    assert value.item() == pytest.approx(8, rel=1e-5)  # 65,536 roundings of float32
