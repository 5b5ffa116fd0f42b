"""Losses and penalties of GANs: closed forms of values and gradients, both tails, and bad input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cln_tutorial.gan_architectures.losses import (
    gradient_penalty,
    hinge,
    least_squares,
    loss_named,
    non_saturating,
    r1,
    r2,
    relativistic,
    relativistic_average,
    wasserstein,
)

ALL = [non_saturating, hinge, wasserstein, least_squares, relativistic, relativistic_average]
every = pytest.mark.parametrize("loss", ALL, ids=[loss.name for loss in ALL])
penalties = pytest.mark.parametrize("penalty", [r1, r2])


def seeded(seed=6549):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=6549, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def slopes(f, *tensors):
    """Gradients of a scalar with respect to fresh copies of the tensors."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    return [
        torch.zeros_like(t) if g is None else g
        for t, g in zip(
            tensors, torch.autograd.grad(f(*tensors), tensors, allow_unused=True), strict=True
        )
    ]


# --- the six losses -------------------------------------------------------------------------------

LOG2 = math.log(2)
# With r = 1 and f = -1 for all images: the table of the docstring by hand, s(t) = log(1 + e^t).
S = {t: math.log1p(math.exp(t)) for t in (-2, -1, 1, 2)}
AT_ONE = {
    "non_saturating": (2 * S[-1], S[1]),
    "hinge": (0.0, 1.0),
    "wasserstein": (-2.0, 1.0),
    "least_squares": (0.5, 2.0),
    "relativistic": (S[-2], S[2]),
    "relativistic_average": (2 * S[-2], 2 * S[2]),
}
# A discriminator that knows nothing: all logits 0.
AT_ZERO = {
    "non_saturating": (2 * LOG2, LOG2),
    "hinge": (2.0, 0.0),
    "wasserstein": (0.0, 0.0),
    "least_squares": (0.5, 0.5),
    "relativistic": (LOG2, LOG2),
    "relativistic_average": (2 * LOG2, 2 * LOG2),
}


@every
@pytest.mark.parametrize(("level", "expected"), [(1.0, AT_ONE), (0.0, AT_ZERO)])
def test_values_are_those_of_the_table(loss, level, expected):
    real = torch.full((5,), level, dtype=torch.float64)
    found = loss.d_loss(real, -real).item(), loss.g_loss(-real, real).item()
    assert found == pytest.approx(expected[loss.name], abs=1e-15)


def closed_form(name, r, f):
    """Slopes of d_loss at r and f, and of g_loss at f, derived by hand."""
    n, m = len(r), len(f)
    if name == "non_saturating":
        return -sigmoid(-r) / n, sigmoid(f) / m, -sigmoid(-f) / m
    if name == "hinge":
        return -1.0 * (r < 1) / n, (f > -1) / m, np.full(m, -1 / m)
    if name == "wasserstein":
        return np.full(n, -1 / n), np.full(m, 1 / m), np.full(m, -1 / m)
    if name == "least_squares":
        return (r - 1) / n, f / m, (f - 1) / m
    if name == "relativistic":
        return -sigmoid(f - r) / n, sigmoid(f - r) / n, -sigmoid(r - f) / n
    low, high = sigmoid(f.mean() - r), sigmoid(f - r.mean())
    d_r = -(low + high.mean()) / n
    d_f = (high + low.mean()) / m
    low, high = sigmoid(r.mean() - f), sigmoid(r - f.mean())
    return d_r, d_f, -(low + high.mean()) / m


@every
def test_gradients_are_the_closed_forms(loss):
    real, fake = 2 * normal(7), 2 * normal(7, seed=1) - 1
    expected = closed_form(loss.name, real.numpy(), fake.numpy())
    found = [*slopes(loss.d_loss, real, fake), slopes(loss.g_loss, fake, real)[0]]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-15)


@every
def test_logits_of_patches_are_a_larger_batch(loss):
    real, fake = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    flat = real.flatten(), fake.flatten()
    assert loss.d_loss(real, fake).item() == pytest.approx(loss.d_loss(*flat).item(), abs=1e-15)
    assert loss.g_loss(fake, real).item() == pytest.approx(
        loss.g_loss(*flat[::-1]).item(), abs=1e-15
    )


@pytest.mark.parametrize("loss", [each for each in ALL if each is not relativistic])
def test_each_side_is_a_mean_of_its_own_whatever_the_numbers(loss):
    real, fake = normal(4), normal(6, seed=1)
    twice = loss.d_loss(real.repeat(2), fake), loss.g_loss(fake, real.repeat(2))
    once = loss.d_loss(real, fake), loss.g_loss(fake, real)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", [relativistic, relativistic_average])
def test_relativistic_losses_see_differences_only(loss):
    real, fake = normal(6), normal(6, seed=1)
    assert loss.needs_real
    shifted = loss.d_loss(real + 3, fake + 3), loss.g_loss(fake + 3, real + 3)
    torch.testing.assert_close(
        shifted, (loss.d_loss(real, fake), loss.g_loss(fake, real)), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("loss", [non_saturating, hinge, wasserstein, least_squares])
def test_the_generator_needs_no_real_logits_and_does_not_look_at_them(loss):
    real, fake = normal(6), normal(6, seed=1)
    assert not loss.needs_real
    assert loss.g_loss(fake, real).equal(loss.g_loss(fake))


# --- tails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eps", "logit", "slope"),
    [(1e-8, -20.0, -0.171), (1e-8, -30.0, -9e-6), (1e-9, -20.0, -0.673), (1e-9, -30.0, -9e-5)],
)
def test_a_logarithm_with_eps_stops_teaching_where_softplus_does_not(eps, logit, slope):
    """Erratum 8: the spelling of public code against the closed form -sigma(-f)."""
    fake = torch.tensor([logit], dtype=torch.float64)
    (public,) = slopes(lambda f: -(f.sigmoid() + eps).log().mean(), fake)
    assert public.item() == pytest.approx(slope, rel=0.05)  # the figures have one to three digits
    # With p = sigma(f) the slope is -p (1 - p) / (p + eps).
    p = sigmoid(logit)
    assert public.item() == pytest.approx(-p * (1 - p) / (p + eps), rel=1e-12)
    (ours,) = slopes(non_saturating.g_loss, fake)
    assert ours.item() == pytest.approx(-1, abs=3e-9)  # e^-20 is 2e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("loss", [non_saturating, relativistic, relativistic_average])
def test_slopes_are_right_in_both_tails(loss, size, dtype):
    """Far to the wrong side the slope is 1 in size, far to the right side 0; nothing is inf."""
    low, high = torch.full((1,), -size, dtype=dtype), torch.full((1,), size, dtype=dtype)
    number = 2 if loss is relativistic_average else 1  # of terms that pull at a logit
    for real, fake, steep in ((low, high, number), (high, low, 0)):
        assert loss.d_loss(real, fake).isfinite()
        by_real, by_fake = slopes(loss.d_loss, real, fake)
        assert by_real.item() == pytest.approx(-steep, abs=1e-12)
        assert by_fake.item() == pytest.approx(steep, abs=1e-12)
        (by_fake, _) = slopes(loss.g_loss, fake, real)
        assert by_fake.item() == pytest.approx(steep - number, abs=1e-12)


@every
def test_half_logits_are_added_up_in_float32(loss):
    """A mean of 4,096 logits, where the sum in half precision would stop growing."""
    real, fake = normal(4096).bfloat16(), normal(4096, seed=1).bfloat16()
    for found, wide in (
        (loss.d_loss(real, fake), loss.d_loss(real.float(), fake.float())),
        (loss.g_loss(fake, real), loss.g_loss(fake.float(), real.float())),
    ):
        assert found.dtype == torch.float32
        assert found.equal(wide)


# --- names and bad logits -------------------------------------------------------------------------


def test_each_loss_is_found_by_its_name():
    assert [loss_named(loss.name) for loss in ALL] == ALL


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"`name` must be one of non_saturating, hinge.*'vanilla'"):
        loss_named("vanilla")


def test_a_relativistic_generator_loss_without_real_logits_says_what_is_missing():
    with pytest.raises(ValueError, match="`real` is missing: g_loss of relativistic_average"):
        relativistic_average.g_loss(torch.zeros(2))


@every
def test_logits_that_would_be_compared_each_with_each_are_refused(loss):
    with pytest.raises(ValueError, match=r"`real` and `fake`.*\(3,\) and \(3, 1\)"):
        loss.d_loss(torch.zeros(3), torch.zeros(3, 1))


def test_pairs_need_as_many_real_as_fake():
    with pytest.raises(ValueError, match=r"one shape for relativistic; got \(4,\) and \(3,\)"):
        relativistic.g_loss(torch.zeros(3), torch.zeros(4))


def test_no_logits_and_whole_numbers_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"`fake` must hold logits; got shape \(0,\)"):
        hinge.d_loss(torch.zeros(3), torch.zeros(0))
    with pytest.raises(TypeError, match=r"`real` must be a tensor of floating numbers.*int64"):
        hinge.d_loss(torch.zeros(3, dtype=torch.int64), torch.zeros(3))


# --- R1 and R2 ------------------------------------------------------------------------------------


@penalties
def test_the_penalty_of_a_quadratic_form_and_its_gradient_are_closed_forms(penalty):
    """F7: for D = x'Ax/2 the gradient of gamma/2 R1 is gamma/2 (SM + MS), with S = sym A."""
    x, gamma = normal(9, 4), 10.0
    a = normal(4, 4, seed=1).requires_grad_()
    value = penalty(lambda x: ((x @ a) * x).sum(1) / 2, x)
    with torch.no_grad():
        s, moment = (a + a.T) / 2, x.T @ x / len(x)
        expected = (s @ moment @ s).trace()
        by_a = gamma / 2 * (s @ moment + moment @ s)
    assert value.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(gamma / 2 * value, a)[0], by_a, rtol=1e-12, atol=1e-12
    )


def test_the_penalty_is_the_mean_of_those_of_single_images():
    """The mean of the logits before autograd would make it N^2 = 25 times smaller."""
    critic = network()
    x = normal(5, 3, 4, 4)
    alone = [r1(critic, image[None]).item() for image in x]
    assert r1(critic, x).item() == pytest.approx(np.mean(alone), rel=1e-12)
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        (of_mean,) = torch.autograd.grad(critic(point).mean(), point)
    shrunk = of_mean.square().sum() / len(x)
    assert r1(critic, x).item() / shrunk.item() == pytest.approx(25, rel=1e-12)


def network(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6549)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(64, 1)
        ).to(dtype)


def test_one_column_of_logits_is_as_good_as_a_vector_and_patches_are_added_up():
    critic, x = network(), normal(5, 3, 4, 4)
    assert r1(lambda x: critic(x).flatten(), x).equal(r1(critic, x))
    patches = network()[:1]
    added = r1(lambda x: patches(x).sum((1, 2, 3)), x)
    assert r1(patches, x).item() == pytest.approx(added.item(), rel=1e-13)


def test_the_condition_reaches_the_discriminator():
    x, y = normal(4, 2), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert r1(lambda x, y: x.sum(1) * y, x, y).item() == pytest.approx(2 * (1 + 4 + 9 + 16) / 4)


def test_images_are_left_as_they_were_and_get_no_gradient():
    critic, image = network(), normal(2, 3, 4, 4).requires_grad_()
    fake = image * 2
    before = fake.clone()
    r2(critic, fake).backward()
    gradient_penalty(critic, fake, fake, generator=seeded()).backward()
    assert image.grad is None
    assert fake.equal(before)
    assert not r1(critic, normal(2, 3, 4, 4)).isnan()  # these do not require a gradient
    assert all(p.grad is not None for p in critic.parameters() if p is not critic[3].bias)


@pytest.mark.parametrize("penalty", [r1, lambda D, x: gradient_penalty(D, x, x)])
def test_a_discriminator_that_begins_in_place_has_the_penalty_of_one_that_does_not(penalty):
    x = normal(5, 3, 4, 4)
    before = x.clone()
    one, other = (
        penalty(nn.Sequential(nn.LeakyReLU(0.2, inplace), network()), x)
        for inplace in (True, False)
    )
    assert one.equal(other)
    assert x.equal(before)


def test_without_gradients_the_penalty_is_a_figure_without_a_graph():
    critic, x = network(), normal(2, 3, 4, 4)
    with torch.no_grad():
        value = r1(critic, x)
        assert not torch.is_grad_enabled()
    assert not value.requires_grad
    assert value.item() == r1(critic, x).item()
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize("penalty", [r1, lambda D, x: gradient_penalty(D, x, x)])
def test_under_autocast_both_derivatives_are_those_of_float32(penalty):
    critic, x = network(torch.float32), normal(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty(critic, x)
        assert critic(x).dtype == torch.bfloat16  # it is switched on again
    found = torch.autograd.grad(value, critic[0].weight)[0]
    wide = penalty(critic, x.float())
    assert value.equal(wide)
    assert found.equal(torch.autograd.grad(wide, critic[0].weight)[0])


def test_a_discriminator_of_half_precision_gets_a_penalty_in_float32():
    critic, x = network(torch.bfloat16), normal(2, 3, 4, 4).bfloat16()
    value = r1(critic, x)
    assert value.dtype == torch.float32
    # Sixteen bits have three digits, and the square doubles the error.
    assert value.item() == pytest.approx(r1(network(), x.double()).item(), rel=0.05)


# --- erratum 11: batch statistics in the discriminator --------------------------------------------


def batch_normalised(x):
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-12).sqrt()


def test_with_batch_statistics_a_fifth_of_the_jacobian_belongs_to_other_images():
    """J = (I - 11'/N - xx'/N) / s for standardised x is a projection of rank N - 2 over s."""
    n = 8
    x = normal(n, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: batch_normalised(x).sum(1), x)[..., 0]
    squares = jacobian.square()
    share = 1 - squares.diagonal().sum() / squares.sum()
    scores = batch_normalised(x)[:, 0]
    expected = 1 - (1 - (1 + scores.square()) / n).square().sum() / (n - 2)
    assert share.item() == pytest.approx(expected.item(), rel=1e-9)  # eps of 1e-12 is left out
    assert 0.15 < share < 0.25
    plain = torch.autograd.functional.jacobian(lambda x: x.square().sum(1), x)[..., 0].square()
    assert plain.sum() == plain.diagonal().sum()


def test_a_linear_head_on_batch_norm_escapes_the_penalty():
    """Its logits add up to a constant: R1 is 0 although each image moves its own logit."""
    x = normal(8, 3)
    layer = nn.BatchNorm1d(3, affine=False, eps=1e-12, dtype=torch.float64)
    # The terms of size 1 cancel to 1e-16, and the norm is squared.
    assert r1(lambda x: layer(x).sum(1), x) < 1e-28
    layer.eval()
    assert r1(lambda x: layer(x).sum(1), x) > 0.1


# --- the gradient penalty -------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, 1.0, 2.5])
def test_the_penalty_of_a_linear_critic_is_a_closed_form(target):
    w = normal(6).requires_grad_()
    value = gradient_penalty(lambda x: x @ w, normal(4, 6), normal(4, 6, seed=1), target=target)
    norm = w.detach().norm()
    assert value.item() == pytest.approx((norm.item() - target) ** 2, rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value, w)[0], 2 * (1 - target / norm) * w.detach()
    )


def test_images_in_between_have_one_share_each():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().flatten(1).sum(1) / 2

    real, fake = torch.ones(64, 3, 4, 5), torch.zeros(64, 3, 4, 5)
    value = gradient_penalty(critic, real, fake, target=0, generator=seeded())
    shares = seen[0].flatten(1)
    assert shares.equal(shares[:, :1].expand_as(shares))
    shares = shares[:, 0]
    assert len(shares.unique()) == 64
    # Of 64 uniform numbers the mean is 0.5 +- 0.036: five standard errors.
    assert shares.min() >= 0
    assert shares.max() < 1
    assert shares.mean().item() == pytest.approx(0.5, abs=0.18)
    # The gradient is the image, so the penalty is the mean of |u * 1|^2.
    assert value.item() == pytest.approx(60 * shares.square().mean().item(), rel=1e-5)
    gradient_penalty(critic, fake, real, generator=seeded())
    torch.testing.assert_close(seen[1].flatten(1)[:, 0], 1 - shares)  # shares are those of `real`


def test_the_penalty_is_drawn_from_the_given_generator_only():
    x, y = normal(4, 6), normal(4, 6, seed=1)

    def draw(generator):
        return gradient_penalty(lambda x: x.pow(3).sum(1), x, y, generator=generator)

    before = torch.get_rng_state()
    assert draw(seeded()).equal(draw(seeded()))
    assert not draw(seeded()).equal(draw(seeded(1)))
    assert torch.get_rng_state().equal(before)


def test_a_flat_critic_has_a_finite_gradient():
    """Here the root of a sum of squares gives nan."""
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    value = gradient_penalty(lambda x: x @ w, normal(4, 6), normal(4, 6, seed=1))
    assert value.item() == 1
    assert torch.autograd.grad(value, w)[0].equal(torch.zeros(6, dtype=torch.float64))


# --- bad input ------------------------------------------------------------------------------------


def test_one_logit_for_the_whole_batch_is_refused():
    with pytest.raises(ValueError, match=r"`D` must return logits per image, shape \(4,\).*\(\)"):
        r1(lambda x: x.mean(), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"`D`.*got \(1, 4\)"):
        r1(lambda x: x.sum(1)[None], torch.zeros(4, 2))


def test_logits_that_do_not_depend_on_the_images_are_refused(unchecked):
    x, weight = normal(4, 2), torch.ones(4, requires_grad=True)
    for critic in (lambda x: torch.ones(4), lambda x: weight * 2, lambda x: x.detach().sum(1)):
        with pytest.raises(ValueError, match="`D` must return logits that depend on the images"):
            r1(critic, x)
    with pytest.raises(TypeError, match=r"`D\(x\)` must be a tensor of floating.*torch.int64"):
        r1(lambda x: x.sum(1).long(), x)


def test_images_that_are_none_are_refused(unchecked):
    for x, error, message in (
        (torch.zeros(0, 3), ValueError, r"`x` must be images \(N, \*event\); got shape \(0, 3\)"),
        (torch.zeros(3), ValueError, r"`x` must be images.*\(3,\)"),
        (torch.zeros(3, 2, dtype=torch.uint8), TypeError, "`x`.*floating numbers; got torch.uint8"),
    ):
        with pytest.raises(error, match=message):
            r1(lambda x: x.sum(1), x)
    with pytest.raises(ValueError, match=r"`fake` must be images \(N, \*event\); got shape \(\)"):
        gradient_penalty(lambda x: x.sum(1), torch.zeros(4, 2), torch.zeros(()))


def test_images_that_do_not_fit_together_are_refused(unchecked):
    x = torch.zeros(4, 2)
    for other, message in (
        (torch.zeros(3, 2), r"`real` and `fake`.*\(4, 2\).*\(3, 2\)"),
        (x.double(), "float32.*float64"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient_penalty(lambda x: x.sum(1), x, other)


@pytest.mark.parametrize("target", [-1.0, math.inf, math.nan])
def test_a_target_that_no_norm_can_have_is_refused(target):
    with pytest.raises(ValueError, match="`target` must be finite and at least 0"):
        gradient_penalty(lambda x: x.sum(1), torch.zeros(4, 2), torch.zeros(4, 2), target=target)
