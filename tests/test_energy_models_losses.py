"""Losses that teach an energy: gradients by hand, closed forms, and what each one leaves alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from cln_tutorial.energy_models.losses import (
    CDOutput,
    contrastive_divergence_loss,
    denoising_score_matching_loss,
    gradient_penalty,
    sliced_score_matching_loss,
)

SCORE_LOSSES = {
    "dsm": lambda net, x: denoising_score_matching_loss(net, x, 0.5, noise=x.detach().flip(0)),
    "dsm, no weight": lambda net, x: denoising_score_matching_loss(
        net, x, 0.5, noise=x.detach().flip(0), weighting="none"
    ),
    "sliced": lambda net, x: sliced_score_matching_loss(
        net, x, projections=x.detach().sign()[None]
    ),
    "penalty at 0": lambda net, x: gradient_penalty(net, x),
    "penalty at 1": lambda net, x: gradient_penalty(net, x, kind="one"),
}


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=6612, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def quadratic(k):
    return lambda x: k * x.square().flatten(1).sum(1) / 2


def network(dim=3, seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(dim, 5), nn.Tanh(), nn.Linear(5, 1))
    return layers.double()


def gradients(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


class Table(nn.Module):
    """One free energy per state; a state is a row of the unit matrix."""

    def __init__(self, n):
        super().__init__()
        self.energies = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x):
        return x @ self.energies


# --- contrastive divergence -----------------------------------------------------------------------


def test_the_gradient_is_that_of_data_minus_that_of_samples_whatever_their_numbers():
    net, x_pos, x_neg = network(), normal(6, 3), normal(11, 3, seed=1)
    phases = [gradients(net(x).mean(), net) for x in (x_pos, x_neg)]
    got = gradients(contrastive_divergence_loss(net, x_pos, x_neg), net)
    torch.testing.assert_close(got, phases[0] - phases[1], rtol=1e-12, atol=1e-14)


def test_no_gradient_reaches_the_samples_nor_what_produced_them():
    net, x_pos = network(), normal(4, 3)
    x_neg = normal(4, 3, seed=1).requires_grad_()
    generator = network(3, seed=2)
    produced = x_neg + generator(x_neg)
    for samples in (x_neg, produced):
        loss = contrastive_divergence_loss(net, x_pos, samples, reg=0.1)
        others = [x_neg, *generator.parameters()]
        assert torch.autograd.grad(loss, others, allow_unused=True) == (None,) * len(others)
    assert x_neg.grad is None
    assert x_neg.requires_grad


def test_it_is_the_loss_of_a_critic_to_the_last_bit_whoever_makes_the_samples():
    net, x_pos, z = network(), normal(7, 3), normal(7, 3, seed=1)
    generator = network(3, seed=3)
    from_generator = (z + generator(z)).detach()
    (slope,) = torch.autograd.grad(net(z.requires_grad_()).sum(), z)
    from_chain = z.detach() - 0.1 * slope + math.sqrt(0.2) * normal(7, 3, seed=4)
    for x_neg in (from_generator, from_chain):
        ours = contrastive_divergence_loss(net, x_pos, x_neg)
        critic = net(x_pos).mean() - net(x_neg).mean()
        assert ours.item() == critic.item()
        assert torch.equal(gradients(ours, net), gradients(critic, net))


def test_the_estimate_is_unbiased_and_its_variance_adds_that_of_both_phases():
    # E = theta x^2 / 2, data N(0, v): gradient v/2 - 1/(2 theta), of variances v^2/2 for a datum
    # and 1/(2 theta^2) for a sample.
    v, theta, n_pos, n_neg, runs = 1.7, 0.8, 8, 32, 4000
    theta_ = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    data = math.sqrt(v) * normal(runs, n_pos, 1)
    samples = normal(runs, n_neg, 1, seed=1) / math.sqrt(theta)
    found = np.array(
        [
            torch.autograd.grad(contrastive_divergence_loss(quadratic(theta_), a, b), theta_)[0]
            for a, b in zip(data, samples, strict=True)
        ]
    )
    parts = np.array([v**2 / 2 / n_pos, 1 / (2 * theta**2) / n_neg])
    variance = parts.sum()
    assert abs(found.mean() - (v / 2 - 1 / (2 * theta))) < 5 * math.sqrt(variance / runs)
    # The excess kurtosis of a mean of n squares is 12 / n.
    kurtosis = (np.array([12 / n_pos, 12 / n_neg]) * parts**2).sum() / variance**2
    error = variance * math.sqrt(2 / (runs - 1) + kurtosis / runs)
    assert abs(found.var(ddof=1) - variance) < 5 * error


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_the_regulariser_adds_both_squares_so_that_the_gap_is_at_most_one_over_alpha(alpha):
    # The article's minus between the squares leaves no minimum at all.
    free = Table(2)
    optimiser = torch.optim.SGD(free.parameters(), lr=0.25 / alpha)
    data, samples = torch.eye(2, dtype=torch.float64).split(1)
    for _ in range(200):
        optimiser.zero_grad()
        contrastive_divergence_loss(free, data, samples, reg=alpha).backward()
        optimiser.step()
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) / (2 * alpha)
    torch.testing.assert_close(free.energies.detach(), expected, rtol=1e-9, atol=0)
    with torch.no_grad():
        for level in [-1e6, -3.0, 3.0, 1e6]:  # bounded below by the value of the minimiser
            free.energies[1] = level
            loss = contrastive_divergence_loss(free, data, samples, reg=alpha)
            assert loss > -1 / (2 * alpha)


def test_the_penalty_is_the_mean_of_squares_and_not_the_square_of_means():
    x_pos, x_neg = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
    both = contrastive_divergence_loss(lambda x: x.sum(1), x_pos, x_neg, reg=0.5, return_info=True)
    assert isinstance(both, CDOutput)
    penalty = 0.5 * (10 / 2 + 56 / 3)
    assert both.reg.item() == pytest.approx(penalty, rel=1e-6)
    assert both.loss.item() == pytest.approx(2 - 4 + penalty, rel=1e-6)
    assert both.e_pos.tolist() == [1, 3]
    assert both.e_neg.tolist() == [2, 4, 6]


def test_the_centred_penalty_holds_the_level_and_leaves_the_gap_free():
    net, x_pos, x_neg = network(), normal(6, 3), normal(6, 3, seed=1)
    options = dict(reg=0.3, reg_mode="centre", return_info=True)
    parts = contrastive_divergence_loss(net, x_pos, x_neg, **options)
    expected = 0.3 * (parts.e_pos.mean() + parts.e_neg.mean()) ** 2
    assert parts.reg.item() == pytest.approx(expected.item(), rel=1e-12)
    level = -(parts.e_pos.mean() + parts.e_neg.mean()) / 2
    centred = contrastive_divergence_loss(lambda x: net(x) + level, x_pos, x_neg, **options)
    plain = contrastive_divergence_loss(net, x_pos, x_neg)
    assert centred.reg < 1e-30
    assert centred.loss.item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("r", "alpha", "published"),
    [(0.99, 0.01, 0.988), (0.99, 0.1, 0.959), (0.99, 1.0, 0.641), (0.9999, 1.0, 0.647)],
)
def test_two_states_with_a_perfect_sampler_end_where_the_closed_form_says(r, alpha, published):
    # Optimum: r - q = alpha d (r + q)(2 - r - q), q = sigmoid(d) (F12 of the chapter).
    def q(d):
        return 1 / (1 + math.exp(-d))

    d = optimize.brentq(lambda d: r - q(d) - alpha * d * (r + q(d)) * (2 - r - q(d)), 0, 20)
    world, states, n = Table(2), torch.eye(2, dtype=torch.float64), 10_000

    def batch(chance):
        count = round(n * chance)
        return states.repeat_interleave(torch.tensor([count, n - count]), dim=0)

    optimiser = torch.optim.SGD(world.parameters(), lr=1 / (1 + 4 * alpha))
    for _ in range(800):
        optimiser.zero_grad()
        chance = torch.softmax(-world.energies.detach(), 0)[0].item()
        contrastive_divergence_loss(world, batch(r), batch(chance), reg=alpha).backward()
        optimiser.step()
    learnt = torch.softmax(-world.energies.detach(), 0)[0].item()
    # Counts are rounded to 1 / n, and the flattest case moves by that over its curvature .03.
    assert abs(learnt - q(d)) < 1e-3
    assert abs(learnt - published) < 1.5e-3


def gaussian_gradient(unknowns, dim, alpha):
    """The gradient of the loss for E = theta |x|^2 / 2 + c, data N(0, I), a perfect sampler."""
    theta, c = (torch.tensor(u, dtype=torch.float64, requires_grad=True) for u in unknowns)
    squares = stats.chi2(dim).ppf((np.arange(20_000) + 0.5) / 20_000)
    x = torch.from_numpy(squares).sqrt().unsqueeze(1)
    loss = contrastive_divergence_loss(
        lambda x: theta * x.square().sum(1) / 2 + c, x, x / theta.sqrt(), reg=alpha
    )
    return [g.item() for g in torch.autograd.grad(loss, (theta, c))]


@pytest.mark.parametrize(("dim", "alpha", "published"), [(8, 0.1, 0.6667), (64, 0.01, 0.9610)])
def test_the_penalty_flattens_a_gaussian_by_the_closed_form(dim, alpha, published):
    root = (1 + 4 * alpha) ** 2 - 8 * alpha**2 * (dim + 4)
    theta = 1 - ((1 + 4 * alpha) - math.sqrt(root)) / (alpha * (dim + 4))
    found = optimize.root(gaussian_gradient, [1.0, -dim / 2.0], args=(dim, alpha))
    assert found.success
    # Mid-quantiles give the fourth moment of |x| to 1e-4.
    assert abs(found.x[0] - theta) < 3e-4
    assert abs(found.x[0] - published) < 3e-4


@pytest.mark.parametrize(("dim", "alpha"), [(32, 0.1), (1, 1.0)])
def test_above_the_threshold_of_dimensions_the_penalty_leaves_nothing_but_a_flat_energy(dim, alpha):
    assert dim > (1 + 4 * alpha) ** 2 / (8 * alpha**2) - 4
    for theta in [1.0, 0.5, 0.1, 0.01]:  # with the best c, down it goes
        c = -(theta + 1) * dim / 4
        slope, level = gaussian_gradient([theta, c], dim, alpha)
        assert abs(level) < 1e-2 * dim * alpha
        assert slope > 0


def test_without_reduction_there_is_one_loss_per_pair():
    net, x_pos, x_neg = network(), normal(5, 3), normal(5, 3, seed=1)
    each = contrastive_divergence_loss(net, x_pos, x_neg, reg=0.2, reduction="none")
    assert each.shape == (5,)
    mean = contrastive_divergence_loss(net, x_pos, x_neg, reg=0.2)
    assert each.mean().item() == pytest.approx(mean.item(), rel=1e-12)


def test_half_types_keep_squares_of_large_energies_and_nan_stays_nan():
    large = lambda x: 1e4 * x.sum(1)  # noqa: E731 - its square overflows in 16 bits
    x = torch.ones(4, 1, dtype=torch.float16)
    loss = contrastive_divergence_loss(large, x, -x, reg=1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2e4 + 2e8, rel=1e-3)
    x[0] = math.nan
    assert contrastive_divergence_loss(large, x, x).isnan()


def test_wrong_batches_and_modes_are_named(unchecked):
    energy, x = quadratic(1.0), torch.zeros(4, 2)
    for error, word, call in [
        (TypeError, "`energy` must be callable", lambda: contrastive_divergence_loss(3, x, x)),
        (TypeError, "`x_pos` must be", lambda: contrastive_divergence_loss(energy, x.long(), x)),
        (ValueError, "x_neg.*must have a", lambda: contrastive_divergence_loss(energy, x, x[:0])),
        (ValueError, "events", lambda: contrastive_divergence_loss(energy, x, x[:, :1])),
        (ValueError, "`reg` must", lambda: contrastive_divergence_loss(energy, x, x, reg=-0.1)),
        (
            ValueError,
            "`reg_mode` must be one of sum, centre; got 'minus'",
            lambda: contrastive_divergence_loss(energy, x, x, reg_mode="minus"),
        ),
        (
            ValueError,
            "needs pairs",
            lambda: contrastive_divergence_loss(energy, x, x[:3], reduction="none"),
        ),
        (
            ValueError,
            "`energy` must return one value per point",
            lambda: contrastive_divergence_loss(lambda x: x, x, x),
        ),
    ]:
        with pytest.raises(error, match=word):
            call()


# --- score matching -------------------------------------------------------------------------------


def factorial(v, dim):
    """Data of variance v and noise of variance 1 that are uncorrelated to the last bit."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    return math.sqrt(v) * signs[:, :1].expand(4, dim), signs[:, 1:].expand(4, dim)


@pytest.mark.parametrize(("v", "sigma", "dim"), [(1.0, 1.0, 1), (2.5, 0.3, 7), (0.1, 2.0, 64)])
def test_denoising_is_least_at_the_score_of_the_noisy_data_with_the_closed_minimum(v, sigma, dim):
    x, noise = factorial(v, dim)
    k = torch.tensor(1 / (v + sigma**2), dtype=torch.float64, requires_grad=True)
    loss = denoising_score_matching_loss(quadratic(k), x, sigma, noise=noise)
    assert loss.item() == pytest.approx(0.5 * dim * v / (v + sigma**2), rel=1e-12)
    (slope,) = torch.autograd.grad(loss, k)
    assert abs(slope.item()) < 1e-12 * dim
    # Elsewhere it is the explicit loss, half the squared distance of the scores, plus that minimum.
    for other in [0.0, 0.5, 3.0]:
        away = denoising_score_matching_loss(quadratic(other), x, sigma, noise=noise)
        explicit = 0.5 * sigma**2 * dim * (v + sigma**2) * (other - k.item()) ** 2
        assert (away - loss).item() == pytest.approx(explicit, rel=1e-11)


def test_denoising_is_explicit_score_matching_plus_a_constant_for_networks_too():
    v, sigma = 1.5, 0.7
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    points = torch.from_numpy(nodes).unsqueeze(1)

    def explicit(net):
        y = (math.sqrt(v + sigma**2) * points).requires_grad_()
        (slope,) = torch.autograd.grad(net(y).sum(), y)
        squares = (slope - y / (v + sigma**2)).square().squeeze(1).detach().numpy()
        return 0.5 * sigma**2 * (weights * squares).sum()

    def denoising(net):
        terms = [
            [
                denoising_score_matching_loss(
                    net, math.sqrt(v) * points[i : i + 1], sigma, noise=points[j : j + 1]
                ).item()
                for j in range(40)
            ]
            for i in range(40)
        ]
        return weights @ np.array(terms) @ weights

    constants = [denoising(net) - explicit(net) for net in (network(1, seed=0), network(1, seed=5))]
    # Quadrature of these networks with 40 nodes is good to 2e-6.
    assert constants[0] == pytest.approx(0.5 * v / (v + sigma**2), abs=1e-5)
    assert constants[1] == pytest.approx(constants[0], abs=1e-5)


def test_the_noise_that_is_drawn_is_standard_normal():
    # At k = 0 the loss is the mean of |xi|^2 / 2: mean d / 2, variance d / 2 per point.
    n, dim = 20_000, 3
    x = torch.zeros(n, dim, dtype=torch.float64)
    loss = denoising_score_matching_loss(quadratic(0.0), x, 0.5, generator=seeded())
    assert abs(loss.item() - dim / 2) < 5 * math.sqrt(dim / 2 / n)
    # And with data at 0 the error is (sigma^2 k - 1) xi.
    loss = denoising_score_matching_loss(quadratic(2.0), x, 0.5, generator=seeded())
    assert abs(4 * loss.item() - dim / 2) < 5 * math.sqrt(dim / 2 / n)


@pytest.mark.parametrize("loss", SCORE_LOSSES.values(), ids=SCORE_LOSSES)
def test_the_gradient_of_the_gradient_is_that_of_finite_differences(loss):
    net, x = network(), normal(6, 3)
    exact = gradients_or_zeros(loss(net, x), net)
    found, step = [], 1e-5
    for p in net.parameters():
        flat = p.data.view(-1)
        for i in range(len(flat)):
            value = flat[i].item()
            ends = []
            for sign in (1, -1):
                flat[i] = value + sign * step
                ends.append(loss(net, x).item())
            flat[i] = value
            found.append((ends[0] - ends[1]) / (2 * step))
    # Central differences: step^2 times third derivatives of the order of 1, rounding 1e-11.
    torch.testing.assert_close(exact, torch.tensor(found).double(), rtol=1e-6, atol=1e-8)
    assert exact.abs().max() > 1e-2


def gradients_or_zeros(loss, net):
    parts = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in parts])


@pytest.mark.parametrize("loss", SCORE_LOSSES.values(), ids=SCORE_LOSSES)
def test_score_losses_leave_everything_as_they_found_it_and_work_without_gradients(loss):
    net, x = network().eval(), normal(6, 3).requires_grad_()
    before = x.detach().clone()
    value = loss(net, x)
    assert torch.autograd.grad(value, x, allow_unused=True, retain_graph=True) == (None,)
    assert x.grad is None
    assert torch.equal(x, before)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = loss(net, normal(6, 3))
        assert not plain.requires_grad
        assert plain.item() == value.item()


def test_noise_that_is_given_leaves_the_generators_alone_and_gives_the_same_bits():
    net, x = network(), normal(5, 3)
    state = torch.get_rng_state()
    noise = normal(5, 3, seed=2)
    losses = [denoising_score_matching_loss(net, x, 0.3, noise=noise).item() for _ in range(2)]
    assert losses[0] == losses[1]
    drawn = denoising_score_matching_loss(net, x, 0.3, generator=seeded(2)).item()
    assert drawn == losses[0]
    sliced_score_matching_loss(net, x, generator=seeded())
    gradient_penalty(net, x, x + 1, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_one_sigma_per_example_is_the_mean_of_the_losses_of_each():
    net, x, noise = network(), normal(4, 3), normal(4, 3, seed=1)
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0])
    together = denoising_score_matching_loss(net, x, sigma, noise=noise)
    each = [
        denoising_score_matching_loss(net, x[i : i + 1], s.item(), noise=noise[i : i + 1]).item()
        for i, s in enumerate(sigma)
    ]
    assert together.item() == pytest.approx(sum(each) / 4, rel=1e-12)


def test_without_weight_the_loss_is_larger_by_the_precision_of_the_noise():
    net, x, noise = network(), normal(4, 3), normal(4, 3, seed=1)
    weighted, plain = (
        denoising_score_matching_loss(net, x, 0.2, noise=noise, weighting=w).item()
        for w in ("sigma2", "none")
    )
    assert plain == pytest.approx(25 * weighted, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.4, torch.tensor([0.1, 0.2, 0.3, 0.4])])
def test_the_antithetic_loss_is_the_mean_of_both_signs(sigma):
    net, x, noise = network(), normal(4, 3), normal(4, 3, seed=1)
    both = denoising_score_matching_loss(net, x, sigma, noise=noise, antithetic=True)
    signs = [denoising_score_matching_loss(net, x, sigma, noise=s * noise).item() for s in (1, -1)]
    assert both.item() == pytest.approx(sum(signs) / 2, rel=1e-12)


@pytest.mark.parametrize("loss", SCORE_LOSSES.values(), ids=SCORE_LOSSES)
def test_autocast_keeps_the_loss_in_float32(loss):
    net, x = network().float(), normal(6, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(net, x)
    assert value.dtype == torch.float32
    # Two layers in 8 bits: a few times 2^-8 of terms of the order of 1.
    assert value.item() == pytest.approx(loss(net, x).item(), abs=0.05)


def test_all_sign_vectors_together_give_the_trace_of_the_hessian():
    net, x = network(), normal(4, 3)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    loss = sliced_score_matching_loss(net, x, projections=signs[:, None].expand(8, 4, 3))

    slopes = torch.autograd.functional.jacobian(lambda x: net(x).sum(), x)
    hessians = torch.stack(
        [torch.autograd.functional.hessian(lambda p: net(p).sum(), point) for point in x]
    )
    traces = hessians.diagonal(dim1=1, dim2=2).sum(1)
    expected = (slopes.square().sum(1) / 2 - traces).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_drawn_directions_are_uncorrelated_signs():
    # E = a b: the curvature along signs is 2 s_a s_b, which is +-2 with mean 0.
    n = 10_000
    x = torch.zeros(n, 2, dtype=torch.float64)
    loss = sliced_score_matching_loss(lambda x: x[:, 0] * x[:, 1], x, generator=seeded())
    assert 0 < abs(loss.item()) < 5 * 2 / math.sqrt(n)
    one = [
        sliced_score_matching_loss(lambda x: x[:, 0] * x[:, 1], x[:1], generator=seeded(s)).item()
        for s in range(40)
    ]
    assert set(one) == {-2.0, 2.0}
    two = sliced_score_matching_loss(
        lambda x: x[:, 0] * x[:, 1], x[:1], n_projections=2000, generator=seeded()
    )
    assert 0 < abs(two.item()) < 5 * 2 / math.sqrt(2000)


def test_the_sliced_loss_is_least_at_the_score_of_the_data():
    # For data N(0, v) and E = k |x|^2 / 2: d (v k^2 / 2 - k), least at 1 / v with -d / (2 v).
    v, dim = 2.0, 5
    x = factorial(v, dim)[0]
    k = torch.tensor(1 / v, dtype=torch.float64, requires_grad=True)
    loss = sliced_score_matching_loss(quadratic(k), x, generator=seeded())
    assert loss.item() == pytest.approx(-dim / (2 * v), rel=1e-12)
    assert abs(torch.autograd.grad(loss, k)[0].item()) < 1e-11


# --- penalties of the gradient --------------------------------------------------------------------


def test_penalties_of_a_parabola_are_those_of_its_slope():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert gradient_penalty(quadratic(1.0), x).item() == pytest.approx((25 + 4) / 2)
    assert gradient_penalty(quadratic(1.0), x, kind="one").item() == pytest.approx((16 + 1) / 2)


def test_between_data_and_samples_the_places_are_uniform_on_the_line():
    # Slope of x^2 / 2 at u in (0, 1): E[u^2] = 1/3, variance 4/45; E[(u - 1)^2] = 1/3, too.
    n = 20_000
    zeros, ones = torch.zeros(n, 1, dtype=torch.float64), torch.ones(n, 1, dtype=torch.float64)
    for kind in ("zero", "one"):
        for a, b in ((zeros, ones), (ones, zeros)):
            found = gradient_penalty(quadratic(1.0), a, b, kind, generator=seeded())
            assert abs(found.item() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


def test_a_flat_energy_gets_a_finite_gradient_from_the_penalty_at_one():
    slope = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = gradient_penalty(lambda x: x @ slope, torch.ones(3, 2, dtype=torch.float64), kind="one")
    assert loss.item() == 1
    assert torch.isfinite(torch.autograd.grad(loss, slope)[0]).all()


@pytest.mark.parametrize("event", [(1,), (2, 3, 4)])
def test_events_of_any_shape_count_as_one_vector(event):
    x = normal(5, *event)
    d = math.prod(event)
    assert gradient_penalty(quadratic(1.0), x).item() == pytest.approx(
        x.square().sum().item() / 5, rel=1e-12
    )
    loss = denoising_score_matching_loss(quadratic(0.0), x, 1.0, noise=torch.ones_like(x))
    assert loss.item() == pytest.approx(d / 2)
    sliced = sliced_score_matching_loss(quadratic(2.0), x)
    assert sliced.item() == pytest.approx(2 * x.square().sum().item() / 5 - 2 * d, rel=1e-9)


def test_an_energy_that_is_constant_has_no_slope():
    flat = lambda x: torch.zeros(len(x))  # noqa: E731
    x = torch.ones(3, 2)
    assert gradient_penalty(flat, x).item() == 0
    assert sliced_score_matching_loss(flat, x).item() == 0
    assert denoising_score_matching_loss(flat, x, 1.0, noise=x).item() == 1


def test_wrong_arguments_of_the_other_losses_are_named(unchecked):
    energy, x = quadratic(1.0), torch.zeros(4, 2)
    for error, word, call in [
        (ValueError, "`sigma` must be", lambda: denoising_score_matching_loss(energy, x, 0.0)),
        (
            ValueError,
            r"`sigma` must be a number or have shape \(4,\)",
            lambda: denoising_score_matching_loss(energy, x, torch.ones(3)),
        ),
        (
            ValueError,
            "`noise` must have shape",
            lambda: denoising_score_matching_loss(energy, x, 1.0, noise=x[:2]),
        ),
        (
            TypeError,
            "`noise` must be a tensor of floating",
            lambda: denoising_score_matching_loss(energy, x, 1.0, noise=x.long()),
        ),
        (
            ValueError,
            "`noise` or `generator`",
            lambda: denoising_score_matching_loss(energy, x, 1.0, noise=x, generator=seeded()),
        ),
        (
            ValueError,
            "`weighting` must be one of",
            lambda: denoising_score_matching_loss(energy, x, 1.0, weighting="sigma"),
        ),
        (ValueError, "a point at least", lambda: sliced_score_matching_loss(energy, x[:0])),
        (
            ValueError,
            "`n_projections` must be at least 1",
            lambda: sliced_score_matching_loss(energy, x, n_projections=0),
        ),
        (
            ValueError,
            "`projections` must have shape",
            lambda: sliced_score_matching_loss(energy, x, projections=x),
        ),
        (ValueError, "`kind` must be one of", lambda: gradient_penalty(energy, x, kind="two")),
        (ValueError, "`x_neg` must have 4 points", lambda: gradient_penalty(energy, x, x[:2])),
    ]:
        with pytest.raises(error, match=word):
            call()
