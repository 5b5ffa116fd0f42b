"""Annealed Langevin dynamics and Tweedie's step against Gaussians and mixtures."""

import math
import warnings

import pytest
import torch
from scipy import stats
from torch import nn

from cln_tutorial.energy_models.annealed import AnnealedLangevin, tweedie
from cln_tutorial.energy_models.energies import GaussianEnergy, GaussianMixtureEnergy
from cln_tutorial.energy_models.samplers import langevin_sample

N = 50_000
inf, nan = math.inf, math.nan


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def blurred(x, sigma):
    """The energy of N(0, 2) plus noise."""
    return x.flatten(1).square().sum(1) / (2 * (2 + sigma**2))


def after(levels, variance=0.0):
    """The variance after a ladder of (precision, step, temperature, steps), by the recursion."""
    for precision, h, temperature, steps in levels:
        for _ in range(steps):
            variance = (1 - h * precision) ** 2 * variance + 2 * h * temperature
    return variance


def assert_variance(x, expected):
    x = x.double().flatten()
    found = x.square().mean().item()
    assert found == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / len(x)))


@pytest.mark.parametrize("rule", ["ncsn", "fixed"])
@pytest.mark.parametrize("denoise", [False, True])
def test_a_ladder_of_blurs_has_the_variance_of_its_recursion(rule, denoise):
    sigmas, h, steps = [4, 2.0, 1.0], 0.2, 7
    ladder = AnnealedLangevin(
        sigmas, steps_per_level=steps, step_size=h, step_rule=rule, denoise=denoise
    )
    x = ladder.sample(blurred, torch.zeros(N, 1), seed=1)
    steps_of = [h * s**2 if rule == "ncsn" else h for s in sigmas]
    levels = [(1 / (2 + s**2), h, 1.0, steps) for s, h in zip(sigmas, steps_of, strict=True)]
    shrink = 2 / (2 + 1) if denoise else 1.0
    assert_variance(x, shrink**2 * after(levels))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_ladder_of_temperatures_has_the_variance_of_its_recursion(backend):
    energy = GaussianEnergy(torch.zeros(1), torch.tensor([1.5]))
    ladder = AnnealedLangevin(temperatures=[9, 3.0, 0.5], steps_per_level=4, step_size=0.2)
    x = ladder.sample(energy, torch.zeros(N, 1), seed=2, backend=backend)
    assert_variance(x, after([(1.5, 0.2, t, 4) for t in (9, 3, 0.5)]))


def test_annealing_finds_all_modes_that_plain_langevin_does_not_leave():
    n, ring = 4000, GaussianMixtureEnergy.ring(sigma=0.25)  # a barrier of 19 between neighbours
    start = ring.means[:1].repeat(n, 1)

    def modes(x):
        return torch.cdist(x, ring.means).argmin(1).bincount(minlength=8)

    plain = langevin_sample(ring, start, 0.01, 9000, seed=3)
    assert modes(plain).tolist() == [n, 0, 0, 0, 0, 0, 0, 0]
    temperatures = [20.0, 15, 10, 7, 5, 3, 2, 1.5, 1]
    hot = AnnealedLangevin(temperatures=temperatures, steps_per_level=1000, step_size=0.01)
    assert stats.chisquare(modes(hot.sample(ring, start, seed=3))).pvalue > 1e-6

    def smooth(x, sigma):
        return GaussianMixtureEnergy(ring.means, math.sqrt(0.0625 + sigma**2))(x)

    sigmas = [8.0, 4, 2, 1, 0.5, 0.2]
    wide = AnnealedLangevin(sigmas, steps_per_level=60, step_size=0.01)
    x = wide.sample(smooth, start, seed=4)
    assert stats.chisquare(modes(x)).pvalue > 1e-6
    # The last blur is removed: of the variance .0625 + .04, up to O(h), (.0625 / .1025)^2 is left.
    spread = (x - ring.means[torch.cdist(x, ring.means).argmin(1)]).double().square().mean().item()
    expected = 0.1025 / (1 - 0.01 / (2 * 0.1025)) * (0.0625 / 0.1025) ** 2
    assert spread == pytest.approx(expected, abs=5 * expected * math.sqrt(1 / n))  # 2 n numbers


def test_it_is_langevin_with_one_seed_whose_steps_are_counted_on():
    x0 = normal(20, 3)
    ladder = AnnealedLangevin([2.0, 1.0], steps_per_level=5, step_size=0.1, denoise=False)
    x = ladder.sample(blurred, x0, seed=7)
    y = langevin_sample(lambda x: blurred(x, 2.0), x0, 0.4, 5, seed=7)
    y = langevin_sample(lambda x: blurred(x, 1.0), y, 0.1, 5, seed=7, first_step=5)
    assert x.equal(y)
    parts = [
        ladder.sample(blurred, p, seed=7, first_chain=f) for p, f in ((x0[:8], 0), (x0[8:], 8))
    ]
    assert torch.cat(parts).equal(x)
    assert ladder.sample(blurred, x0, seed=7, chunk_size=6).equal(x)
    a, b = (ladder.sample(blurred, x0, generator=seeded()) for _ in range(2))
    assert a.equal(b)
    assert not a.equal(x)


def test_half_types_stay_float32_between_the_levels():
    x0 = normal(50, 2).bfloat16()
    ladder = AnnealedLangevin([2.0, 1.0, 0.5], steps_per_level=5, step_size=0.05)
    x = ladder.sample(blurred, x0, seed=1)
    assert x.dtype == torch.bfloat16
    assert x.equal(ladder.sample(blurred, x0.float(), seed=1).bfloat16())
    assert tweedie(lambda x: blurred(x, 1.0), x0, 1.0).dtype == torch.bfloat16


def test_no_chains_come_back_as_none():
    ladder = AnnealedLangevin([2.0, 1.0], steps_per_level=5, step_size=0.1)
    assert ladder.sample(blurred, torch.zeros(0, 3), seed=0).shape == (0, 3)
    assert tweedie(lambda x: blurred(x, 1.0), torch.zeros(0, 3), 1.0).shape == (0, 3)


def test_tweedie_is_the_posterior_mean_of_a_mixture():
    means = torch.tensor([[-1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    weights, v, sigma = torch.tensor([0.3, 0.7], dtype=torch.float64), 0.25, 0.8

    def noisy(x):
        squares = (x[:, None] - means).square().sum(-1)
        return -torch.logsumexp(weights.log() - squares / (2 * (v + sigma**2)), 1)

    x = 2 * normal(50, 2, dtype=torch.float64)
    # Bayes: of each component the mean of two Gaussians, weighted by its responsibility.
    squares = (x[:, None] - means).square().sum(-1)
    share = (weights.log() - squares / (2 * (v + sigma**2))).softmax(1)
    each = (sigma**2 * means + v * x[:, None]) / (v + sigma**2)
    expected = (share[..., None] * each).sum(1)
    torch.testing.assert_close(tweedie(noisy, x, sigma), expected, rtol=0, atol=1e-12)
    chunked = tweedie(noisy, x, torch.full((50,), sigma, dtype=torch.float64), chunk_size=7)
    torch.testing.assert_close(chunked, expected, rtol=0, atol=1e-12)


def test_tweedie_halves_the_error_of_noise_as_strong_as_the_data():
    clean, noise = normal(N, 1), normal(N, 1, seed=1)
    noisy = clean + noise
    found = tweedie(lambda x: x.square().sum(1) / 4, noisy, 1.0)
    error = (found - clean).square().double().mean().item()
    assert error == pytest.approx(0.5, abs=5 * 0.5 * math.sqrt(2 / N))


def test_a_noise_level_may_differ_from_point_to_point():
    x, sigma = torch.ones(3, 2, 2), torch.tensor([0.5, 1.0, 2.0])
    found = tweedie(lambda x: x.flatten(1).square().sum(1) / 8, x, sigma)
    torch.testing.assert_close(found, (1 - sigma**2 / 4)[:, None, None].expand(3, 2, 2))


def test_networks_are_left_as_they_were():
    network = nn.Linear(3, 1)
    network.weight.requires_grad_(False)
    x = normal(4, 3).requires_grad_()
    with torch.inference_mode():
        inside = tweedie(network, x.detach().clone(), 0.5)
    outside = tweedie(network, x, 0.5)
    assert not outside.requires_grad
    assert inside.equal(outside)
    torch.testing.assert_close(outside, x.detach() - 0.25 * network.weight)
    assert [p.requires_grad for p in network.parameters()] == [False, True]
    assert all(p.grad is None for p in (x, *network.parameters()))


def test_bad_input_is_named_before_any_work(unchecked):
    good = {"steps_per_level": 3, "step_size": 0.1}
    for error, message, options in [
        (ValueError, "`sigmas` or `temperatures`, one", {}),
        (ValueError, "one of them", {"sigmas": [1.0], "temperatures": [1.0]}),
        (ValueError, r"`sigmas` must fall .* \[1.0, 2.0\]", {"sigmas": [1.0, 2.0]}),
        (ValueError, "`sigmas` must fall", {"sigmas": [1.0, 1.0]}),
        (ValueError, "`sigmas` must fall", {"sigmas": []}),
        (ValueError, "`temperatures` must fall", {"temperatures": [1, 2]}),
        (ValueError, "`temperatures` must be finite and above 0", {"temperatures": [1.0, 0.0]}),
        (ValueError, "`sigmas` must be finite and above 0", {"sigmas": [inf, 1.0]}),
        (ValueError, "`steps_per_level` must be at least 1", {"steps_per_level": 0}),
        (ValueError, "`step_size` must be finite and above 0", {"step_size": 0.0}),
        (ValueError, "`step_rule` must be ncsn or fixed; got 'song'", {"step_rule": "song"}),
    ]:
        one = {} if {"sigmas", "temperatures"} & set(options) or not options else {"sigmas": [1.0]}
        with pytest.raises(error, match=message):
            AnnealedLangevin(**good | one | options)
    ladder = AnnealedLangevin([1.0], **good)
    for error, message, arguments in [
        (TypeError, "`energy` must be callable", (1.0, torch.zeros(2, 1))),
        (TypeError, "`x0` must be a tensor", (blurred, torch.zeros(2, 1).long())),
        (ValueError, "`x0` must be points", (blurred, torch.zeros(2))),
    ]:
        with pytest.raises(error, match=message):
            ladder.sample(*arguments)
    with pytest.raises(ValueError, match="not both"):
        ladder.sample(blurred, torch.zeros(2, 1), seed=1, generator=seeded())
    with pytest.raises(RuntimeError, match="not finite"), warnings.catch_warnings():
        ladder.sample(lambda x, sigma: nan * x.sum(1), torch.zeros(2, 1))
    for error, message, arguments in [
        (TypeError, "`energy` must be callable", (1.0, torch.zeros(2, 1), 1.0)),
        (TypeError, "`x` must be a tensor", (blurred, torch.zeros(2, 1).long(), 1.0)),
        (ValueError, "`sigma` must be finite and above 0", (blurred, torch.zeros(2, 1), 0.0)),
        (ValueError, "`sigma` must be a number or hold one per point",
         (blurred, torch.zeros(2, 1), torch.ones(3))),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            tweedie(*arguments)
