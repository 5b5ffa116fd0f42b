"""Pathwise, implicit and score-function gradients of continuous variables, against closed forms.

Statistical tests have one fixed seed; four standard errors are a false-alarm rate of 6e-5 each.
"""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from cln_tutorial.gumbel_softmax import (
    gaussian_variance_ratio,
    implicit_rsample,
    normal_rsample,
    score_function_surrogate,
)

N = 400_000


def seeded(seed=6705):
    return torch.Generator().manual_seed(seed)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def within_four_errors(samples, exact):
    return abs(samples.mean() - exact) < 4 * samples.std() / len(samples) ** 0.5


# --- the two estimators of a normal variable ------------------------------------------------------


def both_gradients(f, mean, std, n=N, baseline=0.0):
    """One gradient with respect to the mean per sample, score function and pathwise."""
    mu = double(mean).expand(n).clone().requires_grad_()
    z = normal_rsample(mu, double(std), generator=seeded())
    (pathwise,) = torch.autograd.grad(f(z).sum(), mu, retain_graph=True)
    z = z.detach()
    log_prob = torch.distributions.Normal(mu, std).log_prob(z)
    (score,) = torch.autograd.grad(score_function_surrogate(f(z), log_prob, baseline).sum(), mu)
    return score, pathwise


CASES = [
    ("square", 0.0, 1.0, None),
    ("square", 1.0, 1.0, None),
    ("square", 2.0, 0.5, None),
    ("sine", 0.3, 1.0, 0.5),
    ("sine", 0.3, 1.0, 1.2),
    ("sine", 0.3, 1.0, 5.0),
    ("sine", -0.7, 0.4, 3.0),
]


@pytest.mark.parametrize(("kind", "mean", "std", "omega"), CASES)
def test_the_closed_variances_are_those_of_samples_and_both_means_are_the_gradient(
    kind, mean, std, omega
):
    f = torch.square if kind == "square" else lambda z: torch.sin(omega * z)
    exact = 2 * mean
    if kind == "sine":
        exact = omega * math.cos(omega * mean) * math.exp(-((omega * std) ** 2) / 2)
    closed = gaussian_variance_ratio(kind, mean, std, omega=omega)
    for samples, variance in zip(
        both_gradients(f, mean, std), (closed.score_function, closed.pathwise), strict=True
    ):
        assert within_four_errors(samples, exact)
        deviations = (samples - exact).square()
        assert within_four_errors(deviations, variance)


def by_quadrature(kind, mean, std, omega, baseline):
    def f(z):
        return z**2 if kind == "square" else math.sin(omega * z)

    def moment(power):
        def integrand(e):
            return ((f(mean + std * e) - baseline) * e / std) ** power * stats.norm.pdf(e)

        return integrate.quad(integrand, -12, 12, epsabs=1e-12, limit=200)[0]

    return moment(2) - moment(1) ** 2


@pytest.mark.parametrize("baseline", [0.0, 0.7, -2.0])
@pytest.mark.parametrize(("kind", "mean", "std", "omega"), CASES)
def test_the_closed_variance_with_a_baseline_is_that_of_quadrature(
    kind, mean, std, omega, baseline
):
    closed = gaussian_variance_ratio(kind, mean, std, omega=omega, baseline=baseline)
    expected = by_quadrature(kind, mean, std, omega, baseline)
    assert closed.score_function == pytest.approx(expected, rel=1e-9)
    best = gaussian_variance_ratio(kind, mean, std, omega=omega, baseline=closed.best_baseline)
    for other in (-0.1, 0.1):
        worse = gaussian_variance_ratio(
            kind, mean, std, omega=omega, baseline=closed.best_baseline + other
        )
        # The parabola around the best one.
        assert worse.score_function - best.score_function == pytest.approx(0.01 / std**2)


def test_the_ratios_of_the_square_are_those_of_the_specification():
    ratios = [gaussian_variance_ratio("square", mean, 1).ratio for mean in (0, 1, 2)]
    assert ratios == [3.75, 7.5, 21.75]
    assert gaussian_variance_ratio("square", 2, 0.1).ratio == pytest.approx(41403.75)
    found = [gaussian_variance_ratio("square", 1, 1, baseline=b).score_function for b in (0, 2, 4)]
    assert found == [30, 18, 14]
    dims = [gaussian_variance_ratio("square", 1, 1, dims=d) for d in (1, 2, 10, 100)]
    assert [d.score_function for d in dims] == [30, 56, 552, 41412]
    assert {d.pathwise for d in dims} == {4}


def test_for_a_sine_the_order_turns_just_above_one():
    ratios = [gaussian_variance_ratio("sine", 0.3, 1, omega=w).ratio for w in (0.5, 1, 1.2, 2, 5)]
    assert ratios == pytest.approx([43.7, 1.51, 0.668, 0.231, 0.040], rel=5e-3)


def test_a_constant_changes_the_score_function_and_not_the_path():
    plain, shifted = (
        both_gradients(lambda z, c=c: z.square() + c, 1.0, 1.0, baseline=0.0) for c in (0.0, 10.0)
    )
    assert plain[1].equal(shifted[1])
    # A constant c is a baseline of -c: 30 + (2 * 4 * 10 + 100).
    closed = gaussian_variance_ratio("square", 1, 1, baseline=-10.0).score_function
    assert closed == 210
    assert within_four_errors((shifted[0] - 2).square(), closed)


def test_several_coordinates_scatter_as_the_closed_form_says():
    dims, n = 10, 100_000
    mu = double(1.0).expand(n, dims).clone().requires_grad_()
    z = normal_rsample(mu.detach(), double(1.0), generator=seeded())
    value = z.square().sum(-1)
    log_prob = torch.distributions.Normal(mu, 1.0).log_prob(z).sum(-1)
    (score,) = torch.autograd.grad(score_function_surrogate(value, log_prob).sum(), mu)
    assert within_four_errors((score[:, 0] - 2).square(), 552)


def test_the_score_function_fails_for_a_support_that_moves():
    # z uniform on [0, theta], f = z^2: E f = theta^2 / 3, with the gradient 2 theta / 3.
    theta = double(1.5).requires_grad_()
    noise = torch.rand(N, dtype=torch.float64, generator=seeded())
    z = (theta * noise).detach()
    log_prob = -theta.log().expand(N)
    loss = score_function_surrogate(z.square(), log_prob)
    (found,) = torch.autograd.grad(loss.mean(), theta)
    value = z.square().mean()
    assert found.item() == pytest.approx(-value.item() / 1.5, rel=1e-12)  # -E f / theta
    truth = (1.5**2 - value) / 1.5  # (f(theta) - E f) / theta
    assert truth.item() == pytest.approx(1.0, rel=4 * (4 / 45) ** 0.5 * 3 / N**0.5)
    (pathwise,) = torch.autograd.grad((theta * noise).square().mean(), theta)
    assert pathwise.item() == pytest.approx(1.0, rel=4 * (4 / 45) ** 0.5 * 3 / N**0.5)


# --- implicit -------------------------------------------------------------------------------------


def test_the_implicit_gradient_of_a_normal_variable_is_the_explicit_one():
    mean, std = double(0.3).requires_grad_(), double(1.7).requires_grad_()
    law = torch.distributions.Normal(mean, std)
    noise = torch.randn(1000, dtype=torch.float64, generator=seeded())
    explicit = mean + std * noise
    implicit = implicit_rsample(explicit, law.cdf, law.log_prob)
    assert implicit.equal(explicit)
    weight = torch.randn(1000, dtype=torch.float64, generator=seeded(1))
    for found, expected in zip(
        torch.autograd.grad((implicit * weight).sum(), (mean, std)),
        torch.autograd.grad((explicit * weight).sum(), (mean, std)),
        strict=True,
    ):
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_mixture_gets_gradients_for_its_weights():
    # E z^2 = sum w_k (mu_k^2 + sigma_k^2); of the logits: w_k (m_k - sum w_j m_j).
    logits = double(0.2, -0.5, 0.1).requires_grad_()
    mean, std = double(-2.0, 0.0, 1.5), double(0.5, 1.0, 0.3)
    law = torch.distributions.Normal(mean, std)

    def cdf(z):
        return (logits.softmax(-1) * law.cdf(z.unsqueeze(-1))).sum(-1)

    def log_prob(z):
        return (logits.log_softmax(-1) + law.log_prob(z.unsqueeze(-1))).logsumexp(-1)

    chosen = torch.multinomial(logits.softmax(-1), N, replacement=True, generator=seeded())
    noise = torch.randn(N, dtype=torch.float64, generator=seeded(1))
    z = implicit_rsample(mean[chosen] + std[chosen] * noise, cdf, log_prob)
    moments, w = mean.square() + std.square(), logits.softmax(-1).detach()
    exact = w * (moments - (w * moments).sum())
    parts = z.square().view(100, -1).mean(-1)
    gradients = torch.stack(
        [torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts]
    )
    for k in range(3):
        assert within_four_errors(gradients[:, k], exact[k])


def test_a_gamma_variable_scatters_an_eighth_of_its_score_function():
    # f = z^2, E f = a (a + 1), gradient 2 a + 1 = 6; variances by quadrature, 32.02 and 257.19.
    a = 2.5
    step = 1e-5

    def slope(z):  # of the quantile at fixed probability
        change = (stats.gamma.cdf(z, a + step) - stats.gamma.cdf(z, a - step)) / (2 * step)
        return -change / stats.gamma.pdf(z, a)

    def variance(g):
        def moment(power):
            return integrate.quad(lambda z: g(z) ** power * stats.gamma.pdf(z, a), 1e-9, 80)[0]

        return moment(2) - moment(1) ** 2

    score = stats.gamma.logpdf
    assert variance(lambda z: 2 * z * slope(z)) == pytest.approx(32.02, abs=0.01)
    found = variance(lambda z: z**2 * (score(z, a + step) - score(z, a - step)) / (2 * step))
    assert found == pytest.approx(257.19, abs=0.01)

    class Cdf(torch.autograd.Function):  # SciPy has the value, and PyTorch no gradient in a
        @staticmethod
        def forward(ctx, concentration, z):
            ctx.save_for_backward(z)
            return torch.from_numpy(stats.gamma.cdf(z.numpy(), concentration.item()))

        @staticmethod
        def backward(ctx, gradient):
            z = ctx.saved_tensors[0].numpy()
            change = stats.gamma.cdf(z, a + step) - stats.gamma.cdf(z, a - step)
            return (gradient * torch.from_numpy(change / (2 * step))).sum(), None

    concentration = double(a).squeeze().requires_grad_()
    law = torch.distributions.Gamma(concentration, 1.0)
    torch.manual_seed(0)
    z = law.rsample((2000,))
    ours = implicit_rsample(z, lambda z: Cdf.apply(concentration, z), law.log_prob)
    (found,) = torch.autograd.grad(ours.square().sum(), concentration, retain_graph=True)
    (theirs,) = torch.autograd.grad(z.square().sum(), concentration)
    # PyTorch's own implicit gradient is a piecewise approximation, to about 1e-4.
    assert found.item() == pytest.approx(theirs.item(), rel=1e-3)


# --- shapes and errors ----------------------------------------------------------------------------


def test_normal_samples_broadcast_and_have_a_generator():
    mean, std = torch.zeros(3, 1, requires_grad=True), torch.ones(4)
    first, again = (normal_rsample(mean, std, (2,), generator=seeded(1)) for _ in range(2))
    assert first.shape == (2, 3, 4)
    assert first.equal(again)
    first.sum().backward()
    assert mean.grad.eq(8).all()
    big = normal_rsample(double(5.0), double(2.0), (N,), generator=seeded())
    assert stats.kstest(big.flatten().numpy(), stats.norm(5, 2).cdf).pvalue > 1e-4


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_by_name():
    z = torch.zeros(3)
    with pytest.raises(TypeError, match="`mean` must be a tensor of floating"):
        normal_rsample(torch.zeros(3, dtype=torch.int64), z)
    with pytest.raises(ValueError, match=r"`cdf` must return \(3,\); got \(\)"):
        implicit_rsample(z, lambda z: z.sum(), lambda z: z)
    with pytest.raises(ValueError, match=r"`log_prob` must have the shape of `value` \(3,\)"):
        score_function_surrogate(z, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="`std` must be positive; got 0"):
        gaussian_variance_ratio("square", 1, 0)
    with pytest.raises(ValueError, match="`kind` must be 'square' or 'sine'; got 'cube'"):
        gaussian_variance_ratio("cube", 1, 1)
    with pytest.raises(ValueError, match="`omega` must be given"):
        gaussian_variance_ratio("sine", 1, 1)


def test_the_surrogate_has_the_value_of_the_function_and_no_gradient_of_the_baseline():
    log_prob = torch.randn(4, requires_grad=True)
    value, baseline = torch.randn(4), torch.randn(4, requires_grad=True)
    surrogate = score_function_surrogate(value, log_prob, baseline)
    assert np.array_equal(surrogate.detach().numpy(), value.numpy())
    surrogate.sum().backward()
    assert baseline.grad is None
    assert log_prob.grad.equal((value - baseline).detach())
