"""Smooth maxima, the soft one-hot vector and the soft argmax: bounds, limits, gradients, masks.

Bounds hold up to rounding: float64 has 1e-16, and sums of 64 numbers some 1e-14 of the largest
number that occurs, which may be the temperature. The slack is 1e-12 of it.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from cln_tutorial.smoothing import maxima
from cln_tutorial.smoothing.maxima import (
    smooth_max,
    smooth_min,
    soft_argmax,
    soft_onehot,
    straight_through,
)

inf, nan = math.inf, math.nan
KINDS = ["lse", "mellow", "boltzmann", "sparse", "entmax15", "pnorm"]
SHIFTED = KINDS[:-1]
WEIGHTS = ["softmax", "sparsemax", "entmax15"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ARTICLE = [2.0, 1.0, 4.0, 5.0, 3.0]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(*shape, seed=6620, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


rows = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=64)
temperatures = st.floats(-6, 6).map(lambda power: 10.0**power)


def slack(x, tau):
    return 1e-12 * max(1.0, x.abs().max().item(), tau * math.log(2 * len(x)))


# --- the bounds of the value ----------------------------------------------------------------------


@settings(deadline=None)
@given(values=rows, tau=temperatures, ties=st.integers(1, 3))
def test_log_sum_exp_lies_between_its_bounds_of_ties_and_gap(values, tau, ties):
    x = double(*values, *[max(values)] * (ties - 1))
    top, n = x.max().item(), len(x)
    m = int((x == top).sum())
    gap = top - max((v for v in x.tolist() if v < top), default=-inf)
    error = smooth_max(x, tau).item() - top
    upper = tau * math.log(m + (n - m) * math.exp(-gap / tau))
    assert tau * math.log(m) - slack(x, tau) <= error <= upper + slack(x, tau)
    assert upper <= tau * math.log(n) + slack(x, tau)


@settings(deadline=None)
@given(values=rows, tau=temperatures)
def test_mellowmax_lies_between_the_mean_and_the_maximum(values, tau):
    x = double(*values)
    value, allowed = smooth_max(x, tau, kind="mellow").item(), slack(x, 0.0)
    top, n = x.max().item(), len(x)
    assert x.mean().item() - allowed <= value <= top + allowed
    m = int((x == top).sum())
    assert value - top >= -tau * math.log(n / m) - slack(x, tau)
    difference = smooth_max(x, tau).item() - value
    assert difference == pytest.approx(tau * math.log(n), abs=slack(x, tau))


@settings(deadline=None)
@given(values=rows, tau=temperatures)
def test_boltzmanns_mean_is_below_the_maximum_by_at_most_lamberts_function(values, tau):
    x = double(*values)
    error = x.max().item() - smooth_max(x, tau, kind="boltzmann").item()
    bound = tau * special.lambertw((len(x) - 1) / math.e).real
    assert -slack(x, 0.0) <= error <= bound + slack(x, tau)


@pytest.mark.parametrize("n", [2, 5, 64])
@pytest.mark.parametrize("tau", [1e-3, 1.0, 50.0])
def test_lamberts_bound_is_attained_where_all_others_are_that_far_below(n, tau):
    w = special.lambertw((n - 1) / math.e).real
    x = torch.full((n,), -tau * (1 + w), dtype=torch.float64)
    x[0] = 0
    assert -smooth_max(x, tau, kind="boltzmann").item() == pytest.approx(tau * w, rel=1e-13)


@settings(deadline=None, max_examples=60)
@given(values=rows, tau=temperatures, kind=st.sampled_from(["sparse", "entmax15"]))
def test_the_sparse_maxima_lie_above_by_at_most_the_largest_entropy(values, tau, kind):
    x = double(*values)
    n = len(x)
    bound = {"sparse": (1 - 1 / n) / 2, "entmax15": 4 / 3 * (1 - n**-0.5)}[kind] * tau
    error = smooth_max(x, tau, kind=kind).item() - x.max().item()
    assert -slack(x, tau) <= error <= bound + slack(x, tau)
    # All equal: the weights are uniform, and the entropy is the largest.
    equal = torch.full_like(x, values[0])
    error = smooth_max(equal, tau, kind=kind).item() - values[0]
    assert error == pytest.approx(bound, abs=slack(x, tau))


@settings(deadline=None)
@given(values=st.lists(st.floats(0, 1e3), min_size=1, max_size=64), tau=st.floats(0.01, 1.0))
def test_the_p_norm_is_that_of_linalg_and_lies_between_its_bounds(values, tau):
    x = double(*values)
    value, top = smooth_max(x, tau, kind="pnorm").item(), x.max().item()
    assert top * (1 - 1e-12) <= value <= len(x) ** tau * top * (1 + 1e-12)
    if top > 1e-3 and tau > 0.05:  # linalg takes powers of the numbers themselves
        assert value == pytest.approx(torch.linalg.vector_norm(x, 1 / tau).item(), rel=1e-12)


@settings(deadline=None)
@given(values=rows, tau=st.floats(1e-3, 1e3), kind=st.sampled_from(KINDS))
def test_each_kind_moves_with_the_temperature_as_documented(values, tau, kind):
    x = double(*values)
    x = x.abs() if kind == "pnorm" else x
    low, high = (smooth_max(x, t, kind=kind).item() for t in (tau, 1.5 * tau))
    allowed = slack(x, 2 * tau) if math.isfinite(high) else 0
    if kind in ("mellow", "boltzmann"):
        low, high = high, low
    assert low <= high + allowed


# --- the numbers of the article -------------------------------------------------------------------


def test_the_smooth_maximum_of_the_article_is_off_by_less_than_half():
    assert smooth_max(double(*ARTICLE)).item() == pytest.approx(5.4519, abs=5e-5)
    assert special.logsumexp(ARTICLE) == pytest.approx(
        smooth_max(double(*ARTICLE)).item(), abs=1e-14
    )


def test_with_equal_logits_the_error_is_the_logarithm_of_their_number():
    x = torch.zeros(30522, dtype=torch.float64)
    assert smooth_max(x).item() == pytest.approx(10.33, abs=5e-3)
    assert smooth_max(x).item() == pytest.approx(math.log(30522), rel=1e-14)
    # Only a free scale absorbs the temperature.
    assert smooth_max(x, 1e-3).item() == pytest.approx(0.0103, abs=1e-4)


@pytest.mark.parametrize(
    ("tau", "expected"), [(1, 3.733640), (0.5, 3.891802), (0.25, 3.982331), (0.1, 3.999955)]
)
def test_the_soft_argmax_of_the_article_nears_four(tau, expected):
    assert soft_argmax(double(*ARTICLE), tau, start=1).item() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("tau", [0, 1e-6, 0.1, 1.0, 100.0, 1e30])
def test_between_two_equal_peaks_the_soft_argmax_is_the_middle_at_every_temperature(tau):
    found = soft_argmax(double(3, 0, 0, 0, 3), tau, start=1).item()
    assert found == pytest.approx(3, abs=1e-14)


@settings(deadline=None)
@given(values=rows, tau=temperatures)
def test_the_distance_to_the_one_hot_vector_is_bounded_by_the_gap(values, tau):
    x = double(*values)
    top = x.max()
    if (x == top).sum() > 1:
        return
    gap = (top - x).sort().values[1].item() if len(x) > 1 else inf
    p = soft_onehot(x, tau)
    onehot = torch.zeros_like(x)
    onehot[x.argmax()] = 1
    distance = (p - onehot).abs().sum().item()
    assert distance == pytest.approx(2 * (1 - p.max().item()), abs=1e-14)
    bound = (len(x) - 1) * math.exp(-gap / tau)
    # Differences of numbers up to 1000 are right to 1e-13, and are divided by the temperature.
    assert distance <= 2 * bound * (1 + 2e-13 / tau) + 1e-14
    off = abs(soft_argmax(x, tau).item() - x.argmax().item())
    assert off <= (len(x) - 1) * bound * (1 + 2e-13 / tau) + 1e-12


def test_softmax_moves_by_at_most_half_the_step_and_reaches_it():
    # The Jacobian's largest eigenvalue, in Euclidean norms.
    for tau in (0.1, 1.0, 7.0):
        x = double(0, 0)
        jacobian = torch.autograd.functional.jacobian(lambda x, t=tau: soft_onehot(x, t), x)
        assert torch.linalg.eigvalsh(jacobian)[-1].item() == pytest.approx(1 / (2 * tau), rel=1e-14)
        for seed in range(20):
            x = tau * 2 * seeded(6, seed=seed)
            jacobian = torch.autograd.functional.jacobian(lambda x, t=tau: soft_onehot(x, t), x)
            assert torch.linalg.eigvalsh(jacobian)[-1].item() <= 1 / (2 * tau) + 1e-12


# --- laws -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(values=rows, tau=temperatures, kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_shift_scale_and_permutation_laws(values, tau, kind, seed):
    x = double(*values)
    x, tau = (x.abs(), min(tau, 1.0)) if kind == "pnorm" else (x, tau)
    value, allowed = smooth_max(x, tau, kind=kind).item(), slack(x, tau)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    # Sums in another order, of a number with a slope of 1.
    rounding = 64 * 2e-16 * abs(value)
    assert smooth_max(x[order], tau, kind=kind).item() == pytest.approx(
        value, abs=allowed + rounding
    )
    if kind == "pnorm":
        assert smooth_max(8 * x, tau, kind=kind).item() == pytest.approx(8 * value, rel=1e-12)
    else:
        # Powers of two scale without rounding.
        assert smooth_max(8 * x, 8 * tau, kind=kind).item() == pytest.approx(8 * value, rel=1e-12)
        x, tau = x.round(), max(tau, 1e-2)
        shifted, plain = (smooth_max(y, tau, kind=kind).item() for y in (x + 64, x))
        assert shifted == pytest.approx(plain + 64, abs=allowed + slack(x + 64, tau))


@pytest.mark.parametrize("kind", KINDS)
def test_the_minimum_mirrors_the_maximum(kind):
    x = seeded(4, 6).abs() + 0.1
    found = smooth_min(x, 0.3, kind=kind)
    if kind == "pnorm":
        expected = x.pow(-1 / 0.3).sum(-1).pow(-0.3)
        assert torch.allclose(found, expected, rtol=1e-13, atol=0)
        assert (found <= x.amin(-1)).all()
        assert smooth_min(double(0, 2, 3), 0.3, kind=kind).item() == 0
        assert smooth_min(double(inf, 2, 3), 0.3, kind=kind).equal(
            smooth_min(double(2, 3), 0.3, kind=kind)
        )
    else:
        assert found.equal(-smooth_max(-x, 0.3, kind=kind))
        assert smooth_min(double(inf, 2, 3), kind=kind).isfinite()
    assert smooth_min(x[:, :0], kind=kind).eq(inf).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0, 0.0, torch.zeros(3, 1)])
def test_at_temperature_zero_it_is_the_maximum_and_ties_share_the_gradient(kind, tau):
    x = torch.tensor([[1.0, 3.0, 2.0], [3.0, 3.0, 0.5], [-inf, 1.0, 1.0]], requires_grad=True)
    y = smooth_max(x, tau, kind=kind)
    assert y.equal(x.amax(-1))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [[0, 1, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_temperatures_gives_each_row_its_own(kind):
    x = seeded(4, 5, 6).abs()
    tau = torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)[:, None, None]
    found = smooth_max(x, tau, dim=1, kind=kind)
    for row, t, value in zip(x, tau.flatten().tolist(), found, strict=True):
        assert torch.allclose(smooth_max(row, t, dim=0, kind=kind), value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_at_temperature_zero_the_weights_are_one_hot_and_ties_share(kind):
    x = double(1, 3, 2, 3).requires_grad_()
    p = soft_onehot(x, 0, kind=kind)
    assert p.tolist() == pytest.approx([0, 0.5, 0, 0.5], abs=1e-15)
    assert torch.autograd.grad(p[1], x)[0].eq(0).all()
    assert soft_argmax(x, 0).item() == 2


def test_the_kinds_of_weights_are_those_of_their_papers():
    x = double(*ARTICLE)
    assert torch.allclose(soft_onehot(x, 0.7), (x / 0.7).softmax(-1), rtol=1e-13, atol=0)
    # Sparsemax of the two largest, 5 and 4, at a temperature of 2: their gap is 1/2.
    assert soft_onehot(x, 2, kind="sparsemax").tolist() == pytest.approx([0, 0, 0.25, 0.75, 0])
    # Entmax-1.5 of a gap of one: weights (a - t)^2 and (a + 1/2 - t)^2 that sum to one.
    root = (-0.5 + math.sqrt(2 - 0.25)) / 2
    found = soft_onehot(double(0, 1), kind="entmax15").tolist()
    assert found == pytest.approx([root**2, (root + 0.5) ** 2], abs=1e-14)


def test_positions_may_be_given_and_counting_may_start_anywhere():
    x = double(*ARTICLE)
    p = x.softmax(-1)
    angles = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert soft_argmax(x, positions=angles).item() == pytest.approx((p * angles).sum().item())
    whole = soft_argmax(x, positions=torch.tensor([3, 1, 4, 1, 5]))
    assert whole.item() == pytest.approx((p * double(3, 1, 4, 1, 5)).sum().item())
    assert soft_argmax(x, start=1).item() == pytest.approx(soft_argmax(x).item() + 1)


@pytest.mark.parametrize(("dtype", "last"), [(torch.float16, 2049), (torch.bfloat16, 257)], ids=str)
def test_positions_of_a_long_half_row_are_not_rounded_one_by_one(dtype, last):
    # The last position lies between two numbers of the type; the middle of it and 1 is one.
    x = torch.full((4097,), -60.0, dtype=dtype)
    x[1], x[last] = 1.0, 1.0
    assert torch.tensor(last, dtype=dtype).item() == last - 1
    assert soft_argmax(x).item() == (last + 1) / 2
    x = torch.full((4096,), 0.0, dtype=dtype)
    assert soft_argmax(x).equal(torch.tensor(2047.5).to(dtype))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.4, 1.7])
def test_first_and_second_derivatives_in_entries_and_temperature(kind, tau):
    x = (seeded(3, 5, seed=1).abs() + 0.1).requires_grad_()
    t = torch.full((3, 1), tau, dtype=torch.float64, requires_grad=True)

    def value(x, t):
        return smooth_max(x, t, kind=kind)

    assert torch.autograd.gradcheck(value, (x, t))
    assert torch.autograd.gradgradcheck(value, (x, t))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weights_are_differentiable_twice(kind):
    x = seeded(2, 4, seed=3).requires_grad_()
    t = torch.full((2, 1), 0.8, dtype=torch.float64, requires_grad=True)

    def weights(x, t):
        return soft_onehot(x, t, kind=kind)

    assert torch.autograd.gradcheck(weights, (x, t))
    assert torch.autograd.gradgradcheck(weights, (x, t))
    assert torch.autograd.gradcheck(lambda x, t: soft_argmax(x, t, start=1), (x, t))


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("lse", "softmax"), ("sparse", "sparsemax"), ("entmax15", "entmax15")],
)
def test_the_gradient_of_the_value_is_the_weights(kind, weights):
    x = (3 * seeded(20, 7)).requires_grad_()
    for tau in (1e-3, 0.5, 1e4):
        (gradient,) = torch.autograd.grad(smooth_max(x, tau, kind=kind).sum(), x)
        assert torch.allclose(gradient, soft_onehot(x, tau, kind=weights), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_a_gradient_is_a_loop_of_gradients(kind):
    x = seeded(4, 5).abs()

    def value(row):
        return smooth_max(row, 0.6, kind=kind)

    found = torch.vmap(torch.func.grad(value))(x)
    hessians = torch.vmap(torch.func.jacrev(torch.func.grad(value)))(x)
    for row, gradient, hessian in zip(x, found, hessians, strict=True):
        expected = torch.autograd.functional.jacobian(value, row)
        assert torch.allclose(gradient, expected, rtol=1e-13, atol=1e-15)
        expected = torch.autograd.functional.hessian(value, row)
        assert torch.allclose(hessian, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_vmap_of_a_jacobian_of_weights_is_a_loop(kind):
    x = seeded(4, 5)
    found = torch.vmap(torch.func.jacrev(lambda row: soft_onehot(row, 0.6, kind=kind)))(x)
    for row, jacobian in zip(x, found, strict=True):
        expected = torch.autograd.functional.jacobian(
            lambda row: soft_onehot(row, 0.6, kind=kind), row
        )
        assert torch.allclose(jacobian, expected, rtol=1e-13, atol=1e-15)


def test_the_gradient_of_the_smooth_maximum_is_lipschitz_with_half_the_inverse_temperature():
    for tau in (0.2, 1.0):
        for seed in range(10):
            x = tau * seeded(8, seed=seed)
            hessian = torch.autograd.functional.hessian(lambda x, t=tau: smooth_max(x, t), x)
            assert torch.linalg.eigvalsh(hessian)[-1] <= 1 / (2 * tau) + 1e-12
        at_two = torch.autograd.functional.hessian(
            lambda x, t=tau: smooth_max(x, t), double(0, 0, -1e3)
        )
        assert torch.linalg.eigvalsh(at_two)[-1].item() == pytest.approx(1 / (2 * tau), rel=1e-13)


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    soft = seeded(1000, dtype=torch.float32).requires_grad_()
    hard = seeded(1000, seed=2, dtype=torch.float32)
    y = straight_through(hard, soft)
    assert y.equal(hard)  # (hard - soft) + soft would round
    assert not ((hard - soft) + soft).equal(hard)
    v = seeded(1000, seed=3, dtype=torch.float32)
    assert torch.autograd.grad((y * v).sum(), soft)[0].equal(v)
    whole = straight_through(torch.tensor([0, 1]), double(0.4, 0.6).requires_grad_())
    assert whole.dtype == torch.float64
    assert whole.requires_grad
    with pytest.raises(ValueError, match=r"one shape; got \(2,\) and \(3,\)"):
        straight_through(double(0, 1), double(0, 1, 2))


# --- masks, poison, extremes ----------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0, 1e-30, 1.0, 1e30, torch.tensor(0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_entries_count_for_nothing(kind, tau):
    x = torch.tensor([[-inf, 1.0, 2.0, -inf]], requires_grad=True)
    if kind == "pnorm" and tau == 1e30:
        return  # the number of entries to that power is no number
    y = smooth_max(x, tau, kind=kind)
    assert y.equal(smooth_max(x[:, 1:3], tau, kind=kind))
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert gradient.isfinite().all()
    assert (gradient[:, [0, 3]] == 0).all()
    (second,) = torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)
    assert second is None or second.isfinite().all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tau", [0, 1e-30, 1.0, 1e30])
def test_masked_entries_get_no_weight_and_no_gradient(kind, tau):
    x = torch.tensor([[-inf, 1.0, 2.0, -inf]], requires_grad=True)
    p = soft_onehot(x, tau, kind=kind)
    assert p[:, [0, 3]].eq(0).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    (gradient,) = torch.autograd.grad(p[0, 1], x)
    assert gradient.isfinite().all()
    assert (gradient[:, [0, 3]] == 0).all()
    assert 1 <= soft_argmax(x, tau).item() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_leaves_the_gradient_of_the_temperature_alone(kind):
    # Of a quotient of -inf it would be NaN, even where the quotient is not used.
    tau = torch.tensor([[1.5]], requires_grad=True)
    found = []
    for x in (torch.tensor([[-inf, 1.0, 2.0]]), torch.tensor([[1.0, 2.0]])):
        found += torch.autograd.grad(smooth_max(x, tau, kind=kind).sum(), tau)
    assert torch.allclose(*found, rtol=1e-5, atol=0)
    assert found[0] != 0


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_bad_row_is_nan_and_others_do_not_notice(bad):
    clean = seeded(3, 5, dtype=torch.float32).abs()
    dirty = clean.clone()
    dirty[1, 2] = bad
    functions = [lambda x, k=k: smooth_max(x, 0.7, kind=k) for k in KINDS]
    functions += [lambda x, k=k: soft_onehot(x, 0.7, kind=k) for k in WEIGHTS]
    for function in [*functions, lambda x: soft_argmax(x, 0.7)]:
        y = function(dirty)
        assert y[1].isnan().all()
        assert y[[0, 2]].equal(function(clean)[[0, 2]])
        x = dirty.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x)[[0, 2]].sum(), x)
        assert gradient[[0, 2]].isfinite().all()


def test_a_row_of_masks_is_nan_and_an_empty_axis_is_the_least_number():
    masks = torch.full((2, 3), -inf)
    for kind in KINDS:
        assert smooth_max(masks, kind=kind).isnan().all()
        assert smooth_max(masks[:, :0], kind=kind).tolist() == [-inf, -inf]
        assert smooth_max(masks[:0], kind=kind).shape == (0,)
        assert smooth_max(masks[:, :0], keepdim=True, kind=kind).shape == (2, 1)
    for kind in WEIGHTS:
        assert soft_onehot(masks, kind=kind).isnan().all()
        assert soft_onehot(masks[:, :0], kind=kind).shape == (2, 0)
        assert soft_onehot(masks[:0], kind=kind).shape == (0, 3)
    assert soft_argmax(masks).isnan().all()
    assert soft_argmax(masks[:, :0]).isnan().all()
    assert soft_argmax(masks[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("tau", [1e-30, 1e30])
@pytest.mark.parametrize("kind", SHIFTED)
def test_extremes_give_numbers_and_the_limits(kind, tau, dtype):
    for scale in (1e30, 1.0):
        x = (scale * torch.tensor([[1.0, -1.0, 0.25, 0.0]], dtype=dtype)).requires_grad_()
        y = smooth_max(x, tau, kind=kind)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all()
        assert gradient.sum().item() == pytest.approx(1, abs=1e-6)
        relative = 8 * torch.finfo(dtype).eps
        if tau == 1e-30:
            assert y.item() == pytest.approx(scale, rel=relative)
        elif kind in ("mellow", "boltzmann") and scale == 1.0:
            assert y.item() == pytest.approx(x.mean().item(), rel=relative)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_types_are_computed_wide_and_rounded_once(kind, dtype):
    x = (0.1 * seeded(2, 50_000)).abs().to(dtype)
    y = smooth_max(x, 0.3, kind=kind)
    assert y.dtype == dtype
    wide = smooth_max(x.to(torch.float32 if x.itemsize == 2 else dtype), 0.3, kind=kind)
    assert y.equal(wide.to(dtype))
    assert soft_onehot(x, 0.3).dtype == soft_argmax(x, 0.3).dtype == dtype


@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 3), max_size=2), entries=st.integers(1, 5), data=st.data())
def test_entries_may_lie_on_any_axis_with_any_strides(shape, entries, data):
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    kind = data.draw(st.sampled_from(KINDS))
    x = seeded(*shape, entries).abs()
    y = smooth_max(x.movedim(-1, dim), 0.5, dim=dim, keepdim=True, kind=kind)
    assert y.movedim(dim, -1).squeeze(-1).equal(smooth_max(x, 0.5, kind=kind))
    weights = data.draw(st.sampled_from(WEIGHTS))
    p = soft_onehot(x.movedim(-1, dim), 0.5, dim, weights)
    assert p.movedim(dim, -1).equal(soft_onehot(x, 0.5, kind=weights))


def test_one_entry_is_its_own_maximum():
    for kind in KINDS:
        assert smooth_max(double(3.5), 0.25, kind=kind).item() == pytest.approx(3.5, rel=1e-15)
    for kind in WEIGHTS:
        assert soft_onehot(double(3.5), kind=kind).item() == 1


@pytest.mark.parametrize("kind", SHIFTED)
def test_a_long_row_of_equal_numbers_keeps_its_gradient(kind):
    x = torch.zeros(1_000_000, requires_grad=True)
    (gradient,) = torch.autograd.grad(smooth_max(x, 10.0, kind=kind), x)
    # One part in a million, right to a part in ten thousand: sums of a million float32.
    assert (gradient * 1e6 - 1).abs().max() < 1e-4


def test_the_p_norm_has_a_finite_gradient_at_zeros():
    x = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    for tau, first in ((1.0, 1.0), (0.5, 0.0)):
        (gradient,) = torch.autograd.grad(smooth_max(x, tau, kind="pnorm").sum(), x)
        assert gradient.isfinite().all()
        assert gradient[0, 0].item() == first
        assert gradient[1].eq(0).all()


# --- refusals, transforms -------------------------------------------------------------------------


def test_bad_arguments_are_refused_with_what_was_wanted(unchecked):
    x = torch.zeros(2, 3)
    for function in (smooth_max, smooth_min, soft_onehot, soft_argmax):
        with pytest.raises(TypeError, match=r"`x` must be a tensor of floating numbers; got"):
            function(torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="`dim` must be an axis"):
            function(x, 1.0, 2)
        for tau in (-1.0, nan, inf, torch.tensor(-1.0)):
            with pytest.raises(ValueError, match="`temperature` must be finite and at least 0"):
                function(x, tau)
        with pytest.raises(ValueError, match=r"`temperature` must broadcast to \(2, 1\)"):
            function(x, torch.ones(2, 3))
    for function in (smooth_max, smooth_min, soft_onehot):
        with pytest.raises(ValueError, match="`kind` must be one of"):
            function(x, kind="hardmax")
    for function in (smooth_max, smooth_min):
        with pytest.raises(ValueError, match="`x` must not be negative for `kind` 'pnorm'"):
            function(x - 1, kind="pnorm")
    with pytest.raises(ValueError, match=r"`positions` must be \(3,\).*got \(2,\)"):
        soft_argmax(x, positions=torch.zeros(2))
    with pytest.raises(ValueError, match="`start` numbers the entries"):
        soft_argmax(x, positions=torch.zeros(3), start=1)


def test_autocast_does_not_change_a_value():
    x = seeded(4, 9, dtype=torch.float32).abs()
    for kind in KINDS:
        plain = smooth_max(x, 0.3, kind=kind)
        with torch.autocast("cpu", torch.bfloat16):
            assert smooth_max(x, 0.3, kind=kind).equal(plain)


def test_the_compiler_takes_each_kind_whole(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import torch
from cln_tutorial.smoothing import maxima
x = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
tau = torch.tensor([[0.0], [0.5], [0.3]], dtype=torch.float64)
functions = [lambda x, k=k, t=t: maxima.smooth_max(x, t, kind=k)
             for k in ("lse", "mellow", "boltzmann", "sparse", "entmax15", "pnorm")
             for t in (0.5, tau)]
functions += [lambda x, k=k: maxima.soft_onehot(x, 0.5, kind=k)
              for k in ("softmax", "sparsemax", "entmax15")]
functions += [maxima.soft_argmax, maxima.smooth_min,
              lambda x: maxima.straight_through(x.round(), x)]
def together(x):
    return torch.cat([f(x).flatten() for f in functions])
found = []
for f in (together, torch.compile(together, fullgraph=True, backend="aot_eager")):
    y = x.clone().requires_grad_()
    value = f(y)
    found.append((value, torch.autograd.grad(value.square().sum(), y)[0]))
for plain, of_compiler in zip(*found):
    torch.testing.assert_close(plain, of_compiler, rtol=1e-13, atol=1e-15)
print("done", len(functions))
"""
    assert child_output(code).split() == ["done", "18"]


def test_importing_brings_no_compiler(child_output):
    code = "import sys; import cln_tutorial.smoothing.maxima, cln_tutorial.smoothing.topk; "
    code += "print([m for m in ('numba', 'sklearn', 'matplotlib', 'triton') if m in sys.modules])"
    assert child_output(code).strip() == "[]"


def test_all_kinds_are_tested_here():
    assert list(maxima._MAXIMA) == KINDS
    assert list(maxima._WEIGHTS) == WEIGHTS
