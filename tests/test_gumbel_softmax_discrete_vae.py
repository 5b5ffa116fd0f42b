"""The discrete autoencoder: its bounds against sums over all states.

Statistical tests have one fixed seed; four standard errors are a false-alarm rate of 6e-5 each.
"""

import itertools
import math

import pytest
import torch
from scipy import stats

from cln_tutorial.gumbel_softmax.discrete_vae import CategoricalVAE
from cln_tutorial.gumbel_softmax.estimators import RLOO, Exact


def seeded(seed=6705):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["uniform", "learned"])
def vae(request):
    torch.manual_seed(1)
    model = CategoricalVAE(4, 2, 3, 8, prior=request.param).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        if request.param == "learned":
            model.prior_logits.normal_()
    return model


@pytest.fixture
def x():
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)


def test_the_model_is_a_distribution_over_all_vectors(vae, x):
    # A sum of 16 numbers below one.
    assert vae.exact_log_prob(x).exp().sum().item() == pytest.approx(1, abs=1e-13)


def test_samples_have_the_probabilities_of_the_model(vae, x):
    n = 100_000
    drawn = vae.sample(n, generator=seeded())
    number = (drawn @ torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)).long()
    expected = n * vae.exact_log_prob(x).exp()
    assert stats.chisquare(number.bincount(minlength=16), expected.numpy()).pvalue > 1e-4


def test_the_exact_bound_is_below_by_the_divergence_from_the_posterior(vae, x):
    states = vae.states()
    log_q = (states * vae.encode(x).log_softmax(-1)).sum((-2, -1))
    log_prior = (states * vae.prior_logits.log_softmax(-1)).sum((-2, -1))
    log_posterior = log_prior + vae.log_likelihood(x, states) - vae.exact_log_prob(x)
    divergence = (log_q.exp() * (log_q - log_posterior)).sum(0)
    gap = vae.exact_log_prob(x) - vae.exact_elbo(x)
    assert (divergence > 0).all()
    # Sums of nine terms of about ten.
    assert (gap - divergence).abs().max() < 1e-12


def test_the_sampled_bound_has_the_mean_of_the_exact_one(vae, x):
    n = 20_000
    many = x.repeat_interleave(n, 0)
    found = vae.elbo(many, generator=seeded()).view(16, n)
    error = found.std(1) / n**0.5
    assert ((found.mean(1) - vae.exact_elbo(x)).abs() < 4 * error).all()


def test_more_samples_bring_the_bound_to_the_log_likelihood(vae, x):
    n = 1000
    many, means, errors = x.repeat_interleave(n, 0), [], []
    for k in (1, 4, 64):
        found = vae.iwae_bound(many, k, generator=seeded(k)).view(16, n)
        means.append(found.mean(1))
        errors.append(found.std(1) / n**0.5)
    # One sample is the ELBO, in mean.
    assert ((means[0] - vae.exact_elbo(x)).abs() < 4 * errors[0]).all()
    exact = vae.exact_log_prob(x)
    errors.append(torch.zeros(16))
    for k, (below, above) in enumerate(itertools.pairwise([*means, exact])):
        error = (errors[k] ** 2 + errors[k + 1] ** 2).sqrt()
        assert (below < above + 4 * error).all()
    assert (exact - means[2]).mean() < 0.25 * (exact - means[0]).mean()


def test_the_divergence_is_zero_at_the_prior_and_has_the_constant_that_the_article_leaves_out():
    vae = CategoricalVAE(4, 32, 10, 8).double()
    zero = torch.zeros(1, 32, 10, dtype=torch.float64)
    assert vae.kl(zero).item() == pytest.approx(0, abs=1e-12)
    negative_entropy = (zero.softmax(-1) * zero.log_softmax(-1)).sum()
    assert vae.kl(zero).item() - negative_entropy.item() == pytest.approx(32 * math.log(10))
    assert 32 * math.log(10) == pytest.approx(73.68, abs=0.005)
    certain = torch.full((1, 32, 10), -1e4, dtype=torch.float64)
    certain[..., 3] = 0
    assert vae.kl(certain).item() == pytest.approx(32 * math.log(10))


def test_the_relaxed_number_is_no_bound():
    # One switch, and a decoder that knows only what lies between its two states.
    vae = CategoricalVAE(1, 1, 2, 2)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        vae.decoder[0].weight[:, 0] = torch.tensor([1.0, -1.0])
        vae.decoder[0].bias[:] = torch.tensor([-0.5, 0.5])
        vae.decoder[2].weight[:] = -40.0
        vae.decoder[2].bias[:] = 10.0
    x = torch.ones(500, 1)
    log_prob = vae.exact_log_prob(x)[0].item()
    assert log_prob == pytest.approx(math.log(1 / (1 + math.exp(10))), abs=1e-5)
    assert vae.elbo(x, generator=seeded()).mean() == pytest.approx(log_prob, abs=1e-5)
    assert vae.relaxed_elbo(x, 20.0, generator=seeded()).mean() > log_prob + 8


def test_the_loss_with_the_exact_estimator_has_the_gradient_of_the_bound(vae, x):
    logits, states = vae.encode(x), vae.states()
    q = (states * logits.log_softmax(-1)).sum((-2, -1)).exp()
    bound = (q * vae.log_likelihood(x, states)).sum(0) - vae.kl(logits)
    expected = torch.autograd.grad(-bound.sum(), list(vae.parameters()))
    loss = vae.loss(x, Exact())
    assert (loss + bound).abs().max() < 1e-12
    found = torch.autograd.grad(loss.sum(), list(vae.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-11


def test_training_brings_the_bound_up():
    torch.manual_seed(0)
    vae = CategoricalVAE(6, 2, 4, 16)
    data = torch.bernoulli(torch.tensor([0.9, 0.9, 0.9, 0.1, 0.1, 0.1]).expand(256, 6)).float()
    data[::2] = 1 - data[::2]
    before = vae.exact_elbo(data).mean()
    optimiser = torch.optim.Adam(vae.parameters(), 1e-2)
    losses = vae.fit([data] * 80, RLOO(2), optimiser, generator=seeded())
    assert len(losses) == 80
    # Two groups, and six coins of 0.33 nats each: 2.65 at best.
    assert vae.exact_elbo(data).mean() > before + 1


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="`prior` must be 'uniform' or 'learned'; got 'flat'"):
        CategoricalVAE(4, 2, 3, 8, prior="flat")
    with pytest.raises(ValueError, match="`n_class` must be at least 1; got 0"):
        CategoricalVAE(4, 2, 0, 8)
    vae = CategoricalVAE(4, 20, 10, 8)
    for method in (vae.elbo, vae.exact_log_prob):
        with pytest.raises(ValueError, match=r"`x` must be \(batch, 4\); got \(2, 5\)"):
            method(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="`x` must be 0 or 1 everywhere"):
        vae.elbo(torch.full((2, 4), 0.5))
    with pytest.raises(ValueError, match=r"10 \*\* 20 states are too many"):
        vae.exact_log_prob(torch.zeros(2, 4))
