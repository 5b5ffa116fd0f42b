"""Smooth top-k: what holds for four methods, what does not for the article's, and derivatives."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from cln_tutorial.smoothing import topk
from cln_tutorial.smoothing._checks import HAS_NUMBA
from cln_tutorial.smoothing.topk import soft_topk

inf, nan = math.inf, math.nan
GOOD = ["sigmoid", "esp", "exp", "laplace"]
BOTH_ENDS = ["sigmoid", "esp", "laplace"]
WAYS = [(m, "reference") for m in GOOD] + [("sigmoid", "numba"), ("esp", "numba")]
ways = pytest.mark.parametrize(("method", "backend"), WAYS)
methods = pytest.mark.parametrize("method", GOOD)
F = {
    "sigmoid": special.expit,
    "exp": lambda z: np.minimum(1, np.exp(np.minimum(z, 0))),
    "laplace": lambda z: np.where(z < 0, np.exp(-abs(z)) / 2, 1 - np.exp(-abs(z)) / 2),
}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(*shape, seed=6620, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_enumeration(x, k, tau=1.0):
    """The chance of each entry, from all sets of k."""
    sets = list(itertools.combinations(range(len(x)), k))
    chances = torch.stack([x[list(each)].sum() / tau for each in sets]).softmax(0)
    p = torch.zeros_like(x)
    for each, chance in zip(sets, chances, strict=True):
        p[list(each)] += chance
    return p


def by_root(x, k, tau, method):
    """The threshold from scipy's bracketed root."""
    s = x.numpy() / tau
    far = abs(s).max() + 50
    root = optimize.brentq(
        lambda t: F[method](s - t).sum() - k, -far, far, xtol=1e-14, rtol=1e-15, maxiter=500
    )
    return torch.from_numpy(F[method](s - root))


def cases(largest=20):
    return st.integers(1, largest).flatmap(
        lambda n: st.tuples(
            st.lists(st.floats(-100, 100) | st.integers(-2, 2).map(float), min_size=n, max_size=n),
            st.integers(0, n),
            st.floats(-5, 5).map(lambda power: 10.0**power),
        )
    )


# --- against other ways to compute it -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("tau", [0.03, 1.0, 20.0])
def test_esp_gives_the_chances_of_all_sets(tau, backend):
    for seed in range(3):
        x = seeded(12, seed=seed)
        for k in (1, 2, 5, 6, 9, 11):
            found = soft_topk(x, k, tau, method="esp", backend=backend)
            # The specification's bound; all terms are positive.
            assert (found - by_enumeration(x, k, tau)).abs().max() < 3e-15


def test_what_subtracts_is_wrong_where_esp_is_right():
    # Article 10373's recursion from k-1 to k: the chance to be chosen last, times k.
    def recursion(x, k, tau):
        w, p = ((x - x.max()) / tau).exp(), torch.zeros_like(x)
        for j in range(1, k + 1):
            left = w * (1 - p)
            p = j * left / left.sum()
        return p

    for seed in range(5):
        x = seeded(12, seed=seed)
        exact = by_enumeration(x, 5, 0.03)
        assert (soft_topk(x, 5, 0.03, method="esp") - exact).abs().max() < 3e-15
        assert (recursion(x, 5, 0.03) - exact).abs().max() >= 3.99  # a chance off by four
        assert (recursion(x, 2, 1.0) - by_enumeration(x, 2)).abs().max() < 1e-13  # its formula
        x = seeded(100, seed=seed)
        assert recursion(x, 50, 1.0).max() > 50
        assert soft_topk(x, 50, method="esp").max() <= 1


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("sigmoid", "reference"),
        ("sigmoid", "numba"),
        ("exp", "reference"),
        ("laplace", "reference"),
    ],
)
@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_thresholds_are_those_of_a_bracketed_root(method, backend, case):
    values, k, tau = case
    x = double(*values)
    if k in (0, len(x)):
        return
    tau = max(tau, 0.1)  # below, the root is known to fewer digits than the weights
    found = soft_topk(x, k, tau, method=method, backend=backend)
    # The root is right to 1e-15 of numbers up to 1000.
    assert (found - by_root(x, k, tau, method)).abs().max() < 1e-11


def test_for_one_entry_esp_and_exp_are_softmax():
    x = seeded(5, 9)
    for tau in (0.1, 1.0, 30.0):
        softmax = (x / tau).softmax(-1)
        for method in ("esp", "exp"):
            assert torch.allclose(
                soft_topk(x, 1, tau, method=method), softmax, rtol=1e-13, atol=1e-16
            )


def test_for_one_entry_laplace_is_softmax_only_while_no_weight_is_above_a_half():
    found = soft_topk(double(2, 0), 1, method="laplace")
    assert found.tolist() == pytest.approx([0.81606, 0.18394], abs=5e-6)
    assert double(2, 0).softmax(-1).tolist() == pytest.approx([0.88080, 0.11920], abs=5e-6)
    # The threshold of the largest entry and the others.
    x = double(3, 1, 0.5, -1)
    threshold = (x[0] + x[1:].logsumexp(0)) / 2
    expected = torch.cat([1 - (threshold - x[:1]).exp() / 2, (x[1:] - threshold).exp() / 2])
    assert torch.allclose(soft_topk(x, 1, method="laplace"), expected, rtol=1e-13, atol=0)
    flat = double(0.3, 0.2, 0.1, 0)
    assert torch.allclose(
        soft_topk(flat, 1, method="laplace"), flat.softmax(-1), rtol=1e-13, atol=0
    )


def test_the_threshold_of_laplace_may_lie_below_all_entries():
    x = double(0.03, 0.02, 0.01, 0)
    found = soft_topk(x, 3, method="laplace")
    threshold = math.log(2 * (4 - 3)) - torch.logsumexp(-x, 0).item()
    assert threshold == pytest.approx(-0.678, abs=5e-4)
    assert threshold < x.min()
    assert torch.allclose(found, 1 - (threshold - x).exp() / 2, rtol=1e-13, atol=0)
    # None of the article's cases, m = 0 to n - 1 entries above, has its threshold where it must be.
    for m in range(4):
        below, above = x[m:].exp().sum(), (-x[:m]).exp().sum()
        root = math.sqrt((m - 3) ** 2 + above * below)
        y = (m - 3 + root) / above if m else below / 6
        assert not (math.log(y) >= x[m] and (m == 0 or math.log(y) <= x[m - 1]))


# --- what holds for four methods ------------------------------------------------------------------


@ways
@settings(deadline=None, max_examples=60)
@given(case=cases(64))
def test_weights_lie_between_zero_and_one_sum_to_k_and_keep_the_order(method, backend, case):
    values, k, tau = case
    x = double(*values)
    p = soft_topk(x, k, tau, method=method, backend=backend)
    assert (p >= 0).all()
    assert (p <= 1 + 1e-15).all()
    assert p.sum().item() == pytest.approx(k, abs=1e-13 * max(k, 1))
    assert (p[x.argsort(stable=True)].diff() >= -1e-13).all()
    ties = x[:, None] == x[None, :]
    assert ((p[:, None] - p[None, :]).abs()[ties] <= 1e-13).all()


@ways
@pytest.mark.parametrize("tau", [1e-4, 0.3, 1.0, 100.0])
def test_the_sum_is_right_to_one_in_a_million_in_float32(method, backend, tau):
    for n, k in ((10, 3), (1000, 1), (1000, 500), (1000, 999)):
        x = 3 * seeded(4, n, dtype=torch.float32)
        p = soft_topk(x, k, tau, method=method, backend=backend)
        assert p.dtype == torch.float32
        assert (p.double().sum(-1) - k).abs().max() <= 1e-6 * k
        assert p.min() >= 0
        assert p.max() <= 1


@pytest.mark.parametrize("method", BOTH_ENDS)
@settings(deadline=None, max_examples=60)
@given(case=cases(30))
def test_both_ends_are_alike(method, case):
    values, k, tau = case
    x = double(*values)
    p = soft_topk(x, k, tau, method=method)
    q = soft_topk(-x, len(x) - k, tau, method=method)
    # A distance of 100 over a temperature of 1e-5 is right to 1e-9 of itself, yet saturated; near
    # the border it is a small difference of numbers up to 100, exact on both sides.
    assert (p + q - 1).abs().max() < 1e-12


def test_exp_treats_the_ends_differently():
    x = seeded(8)
    assert (soft_topk(x, 3, method="exp") + soft_topk(-x, 5, method="exp") - 1).abs().max() > 0.05


@ways
@settings(deadline=None, max_examples=40)
@given(case=cases(), seed=st.integers(0, 99))
def test_shift_scale_and_permutation_laws(method, backend, case, seed):
    values, k, tau = case
    x = double(*values).round()
    p = soft_topk(x, k, tau, method=method, backend=backend)
    # Whole numbers are shifted exactly, and powers of two scale without rounding.
    assert (soft_topk(x + 512, k, tau, method=method, backend=backend) - p).abs().max() < 1e-14
    assert soft_topk(4 * x, k, 4 * tau, method=method, backend=backend).equal(p)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    mixed = soft_topk(x[order], k, tau, method=method, backend=backend)
    assert (mixed - p[order]).abs().max() < 1e-13


@ways
@pytest.mark.parametrize("temperature", [0, 1e-12, 1e-30, torch.zeros(3, 1)])
def test_the_limit_is_the_hard_top_k_and_ties_share_what_is_left(method, backend, temperature):
    x = torch.tensor(
        [[2.0, 1.0, 4.0, 5.0, 3.0], [1.0, 0.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
    ).requires_grad_()
    p = soft_topk(x, 2, temperature, method=method, backend=backend)
    expected = torch.tensor([[0, 0, 1, 1, 0], [1 / 3, 0, 1 / 3, 1 / 3, 1], [0.4] * 5])
    assert torch.allclose(p, expected, rtol=0, atol=1e-7)
    if isinstance(temperature, int | torch.Tensor):
        exact = soft_topk(x.detach()[0].double(), 2, 0, method=method, backend=backend)
        assert exact.tolist() == [0, 0, 1, 1, 0], "not 1e-66"
        (gradient,) = torch.autograd.grad(p.square().sum(), x)
        assert gradient.eq(0).all()


@ways
def test_weights_are_uniform_in_the_limit_of_a_high_temperature(method, backend):
    p = soft_topk(seeded(7), 3, 1e30, method=method, backend=backend)
    assert (p - 3 / 7).abs().max() < 1e-15


# --- the article's recursion ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "k", "expected"),
    [
        ([2, 1, 0, -1000], 2, [0.6652, 0.2447, 1.0900, 0]),
        ([3, 0, 0, 0], 3, [1.3546, 0.5485, 0.5485, 0.5485]),
    ],
)
def test_the_recursion_leaves_the_interval_and_the_order(x, k, expected):
    p = soft_topk(double(*x), k, method="recursive")
    assert p.tolist() == pytest.approx(expected, abs=5e-5)
    assert p.sum().item() == pytest.approx(k, abs=1e-14)
    assert p.max() > 1


def test_the_recursion_does_not_find_all_of_five():
    x = double(2, 1, 4, 5, 3)
    for tau in (0, 1e-6):
        p = soft_topk(x, 5, tau, method="recursive")
        assert p.tolist() == pytest.approx([1.2, 0.2, 1.2, 1.2, 1.2], abs=1e-14)
        # With fewer than all of distinct entries it has the right limit.
        for k in range(5):
            p = soft_topk(x, k, tau, method="recursive")
            assert p.tolist() == pytest.approx((x > 5 - k).double().tolist(), abs=1e-14)


def test_how_often_the_recursion_fails_on_normal_entries():
    # Four standard errors of 2000 draws: 3.3, 4.0 and 1.8 points; false alarms 1 in 10,000.
    x = 3 * seeded(2000, 5)
    p = soft_topk(x, 2, method="recursive")
    ordered = p.gather(-1, x.argsort(-1))
    above = (p > 1 + 1e-12).any(-1).double().mean().item()
    mixed = (ordered.diff() < -1e-12).any(-1).double().mean().item()
    wrong = (p.topk(2).indices.sort().values != x.topk(2).indices.sort().values).any(-1)
    assert above == pytest.approx(0.16, abs=0.033)
    assert mixed == pytest.approx(0.265, abs=0.04)
    assert wrong.double().mean().item() == pytest.approx(0.04, abs=0.018)


def test_the_recursion_is_what_the_article_says():
    x, tau = double(0.3, -1, 2, 0.7), 0.6
    y = x - x.min()
    p = torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        p = p + ((1 - p) * y / tau).softmax(-1)
    assert torch.allclose(soft_topk(x, 3, tau, method="recursive"), p, rtol=1e-13, atol=0)
    # The shift is by the minimum; without it the result is another.
    assert torch.allclose(soft_topk(x + 5, 3, tau, method="recursive"), p, rtol=1e-13, atol=0)


# --- derivatives ----------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("k", [1, 3, 5])
def test_first_and_second_derivatives_in_entries_and_temperature(method, backend, k):
    x = seeded(2, 7, seed=4).requires_grad_()
    tau = double(0.6, 1.4)[:, None].requires_grad_()

    def weights(x, tau):
        return soft_topk(x, k, tau, method=method, backend=backend)

    assert torch.autograd.gradcheck(weights, (x, tau))
    assert torch.autograd.gradgradcheck(weights, (x, tau))


def test_the_derivatives_of_the_recursion():
    x = seeded(2, 4, seed=4).requires_grad_()
    tau = double(0.6, 1.4)[:, None].requires_grad_()

    def weights(x, tau):
        return soft_topk(x, 2, tau, method="recursive")

    assert torch.autograd.gradcheck(weights, (x, tau))
    assert torch.autograd.gradgradcheck(weights, (x, tau))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_the_jacobian_of_esp_is_the_covariance_of_the_draw(backend):
    x, k, tau = seeded(8), 3, 0.7
    sets = list(itertools.combinations(range(8), k))
    member = torch.zeros(len(sets), 8, dtype=torch.float64)
    for n, each in enumerate(sets):
        member[n, list(each)] = 1
    chances = (member @ x / tau).softmax(0)
    mean = chances @ member
    covariance = (member - mean).T @ (chances[:, None] * (member - mean)) / tau
    found = torch.autograd.functional.jacobian(
        lambda x: soft_topk(x, k, tau, method="esp", backend=backend), x
    )
    assert torch.allclose(found, covariance, rtol=0, atol=1e-14)


@ways
@pytest.mark.parametrize("tau", [1e-30, 1e-10, 1e-4, 1e30])
def test_gradients_are_finite_where_weights_are_saturated(method, backend, tau):
    x = (100 * seeded(3, 12, dtype=torch.float32)).requires_grad_()
    t = torch.full((3, 1), tau, requires_grad=True)
    p = soft_topk(x, 4, t, method=method, backend=backend)
    v = seeded(3, 12, seed=2, dtype=torch.float32)
    gradients = torch.autograd.grad((p * v).sum(), (x, t), create_graph=True)
    seconds = torch.autograd.grad(gradients[0].sum() + gradients[1].sum(), (x, t))
    for each in (*gradients, *seconds):
        assert each.isfinite().all()
    if tau < 1:
        assert gradients[0].abs().max() < 1e-20  # exp(-150), divided by 1e-30
        assert p.equal(soft_topk(x, 4, 0, method=method, backend=backend))


@ways
def test_a_mild_saturation_keeps_its_small_gradient(method, backend):
    # Two entries 30 apart, one is taken: both slopes are f' of 15, or of 30 for exp.
    x = double(0, 30).requires_grad_()
    p = soft_topk(x, 1, method=method, backend=backend)
    (gradient,) = torch.autograd.grad(p[1], x)
    slope = {
        "sigmoid": math.exp(-15) / 2,
        "laplace": math.exp(-15) / 4,
        "esp": math.exp(-30),
        "exp": math.exp(-30),
    }[method]
    # One less the weight of the larger is known to 1e-16 only, unless it is computed by itself.
    allowed = 1e-2 if slope < 1e-12 else 1e-5
    assert gradient.tolist() == pytest.approx([-slope, slope], rel=allowed, abs=0)


@ways
def test_vmap_and_jacrev_agree_with_loops(method, backend):
    x = seeded(4, 6)
    tau = double(0.5, 1.0, 2.0, 3.0)

    def weights(x, tau):
        return soft_topk(x, 2, tau[None], method=method, backend=backend)

    found = torch.vmap(weights)(x, tau)
    jacobians = torch.vmap(torch.func.jacrev(weights))(x, tau)
    hessians = torch.func.jacrev(torch.func.jacrev(lambda x: weights(x, tau[1])))(x[1])
    for row, t, p, jacobian in zip(x, tau, found, jacobians, strict=True):
        assert torch.allclose(weights(row, t), p, rtol=1e-13, atol=1e-16)
        expected = torch.autograd.functional.jacobian(lambda x, t=t: weights(x, t), row)
        assert torch.allclose(jacobian, expected, rtol=1e-12, atol=1e-15)
    eps = 1e-6
    for j in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[j] = eps
        up, down = (
            torch.autograd.functional.jacobian(lambda x: weights(x, tau[1]), x[1] + sign * step)
            for sign in (1, -1)
        )
        # Central differences: eps^2 of the third derivative, 1e-16 / eps of rounding.
        assert torch.allclose(hessians[..., j], (up - down) / (2 * eps), rtol=0, atol=1e-8)


def test_the_backends_agree_and_each_runs():
    x = (3 * seeded(5, 200)).requires_grad_()
    v = seeded(5, 200, seed=1)
    calls = []

    def counted(name, function):
        def call(*arguments):
            calls.append(name)
            return function(*arguments)

        return call

    from cln_tutorial.smoothing import topk_loops

    with pytest.MonkeyPatch.context() as patch:
        for name in ("sigmoid", "esp", "esp_product"):
            patch.setattr(topk_loops, name, counted(name, getattr(topk_loops, name)))
        for method in ("sigmoid", "esp"):
            for k in (1, 20, 150):
                found = []
                for backend in ("reference", "numba"):
                    calls.clear()
                    p = soft_topk(x, k, 0.7, method=method, backend=backend)
                    (gradient,) = torch.autograd.grad((p * v).sum(), x)
                    found.append((p, gradient))
                    of_numba = {"sigmoid": ["sigmoid"], "esp": ["esp", "esp_product"]}[method]
                    assert calls == (of_numba if backend == "numba" else [])
                for reference, fast in zip(*found, strict=True):
                    assert torch.allclose(reference, fast, rtol=1e-11, atol=1e-14)
            calls.clear()
            soft_topk(x, 3, method=method)
            assert calls == [method]
    assert HAS_NUMBA


# --- masks, poison, shapes ------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("tau", [0, 1e-30, 0.5, 1e30, torch.tensor(0.5)])
def test_masked_entries_get_no_weight_and_no_gradient(method, backend, tau):
    x = torch.tensor([[-inf, 1.0, 2.0, -inf, 0.5]], requires_grad=True)
    for k in (0, 1, 2, 3):
        p = soft_topk(x, k, tau, method=method, backend=backend)
        assert p[:, [0, 3]].eq(0).all()
        kept = soft_topk(x[:, [1, 2, 4]], k, tau, method=method, backend=backend)
        assert torch.allclose(p[:, [1, 2, 4]], kept, rtol=1e-6, atol=1e-7)
        (gradient,) = torch.autograd.grad(p.square().sum(), x, create_graph=True)
        assert gradient.isfinite().all()
        assert gradient[:, [0, 3]].eq(0).all()
    assert soft_topk(x, 4, tau, method=method, backend=backend).isnan().all()
    assert soft_topk(x, 5, tau, method=method, backend=backend).isnan().all()


def test_the_recursion_knows_masks_too():
    x = torch.tensor([[-inf, 1.0, 2.0, -inf, 0.5]], requires_grad=True)
    p = soft_topk(x, 2, 0.5, method="recursive")
    assert p[:, [1, 2, 4]].equal(soft_topk(x[:, [1, 2, 4]], 2, 0.5, method="recursive"))
    assert p[:, [0, 3]].eq(0).all()
    (gradient,) = torch.autograd.grad(p.square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient[:, [0, 3]].eq(0).all()
    assert soft_topk(x, 4, method="recursive").isnan().all()


@pytest.mark.parametrize(("method", "backend"), [*WAYS, ("recursive", "reference")])
@pytest.mark.parametrize("bad", [nan, inf])
def test_a_bad_row_is_nan_and_others_do_not_notice(method, backend, bad):
    clean = seeded(3, 6, dtype=torch.float32)
    dirty = clean.clone()
    dirty[1, 2] = bad
    for k in (0, 2, 6):
        x = dirty.clone().requires_grad_()
        p = soft_topk(x, k, 0.7, method=method, backend=backend)
        assert p[1].isnan().all()
        expected = soft_topk(clean, k, 0.7, method=method, backend=backend)
        assert p[[0, 2]].equal(expected[[0, 2]])
        (gradient,) = torch.autograd.grad(p[[0, 2]].square().sum(), x)
        assert gradient[[0, 2]].isfinite().all()
    masks = torch.full((2, 6), -inf)
    assert soft_topk(masks, 2, method=method, backend=backend).isnan().all()


@ways
def test_none_and_all_are_zeros_and_ones_with_gradient_zero(method, backend):
    x = seeded(2, 5).requires_grad_()
    for k, value in ((0, 0.0), (5, 1.0)):
        p = soft_topk(x, k, method=method, backend=backend)
        assert p.eq(value).all()
        assert torch.autograd.grad(p.sum(), x)[0].eq(0).all()
    assert soft_topk(x[:, :1], 1, method=method, backend=backend).eq(1).all()
    assert soft_topk(x[:, :0], 0, method=method, backend=backend).shape == (2, 0)
    assert soft_topk(x[:0], 2, method=method, backend=backend).shape == (0, 5)


@ways
@pytest.mark.parametrize("scale", [1e30, 1.0])
def test_extreme_entries_and_temperatures_give_numbers(method, backend, scale):
    x = (scale * seeded(2, 20, dtype=torch.float32)).requires_grad_()
    for tau in (1e-30, 1e30):
        p = soft_topk(x, 6, tau, method=method, backend=backend)
        assert p.isfinite().all()
        assert (p.sum(-1) - 6).abs().max() < 1e-5
        assert torch.autograd.grad(p.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ways
def test_half_types_are_computed_wide_and_rounded_once(method, backend, dtype):
    x = seeded(2, 300).to(dtype)
    p = soft_topk(x, 40, 0.3, method=method, backend=backend)
    assert p.dtype == dtype
    assert p.equal(soft_topk(x.float(), 40, 0.3, method=method, backend=backend).to(dtype))


def test_a_long_row_of_half_numbers_sums_to_k():
    x = seeded(50_000, dtype=torch.float32)
    for method in ("sigmoid", "exp", "laplace"):
        p = soft_topk(x, 1000, 0.1, method=method)
        assert p.double().sum().item() == pytest.approx(1000, rel=1e-6)
        half = soft_topk(x.bfloat16(), 1000, 0.1, method=method)
        # Each weight is rounded to 2^-9 of itself, in either direction.
        assert half.double().sum().item() == pytest.approx(1000, rel=2e-3)


@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(0, 3), max_size=2), entries=st.integers(1, 5), data=st.data())
def test_entries_may_lie_on_any_axis_with_any_strides(shape, entries, data):
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    method, backend = data.draw(st.sampled_from([*WAYS, ("recursive", "reference")]))
    k = data.draw(st.integers(0, entries))
    x = seeded(*shape, entries)
    keywords = {"method": method, "backend": backend}
    p = soft_topk(x.movedim(-1, dim), k, 0.5, dim, **keywords)
    assert p.movedim(dim, -1).equal(soft_topk(x, k, 0.5, **keywords))
    tau = seeded(*shape, 1).abs() + 0.1
    p = soft_topk(x.movedim(-1, dim), k, tau.movedim(-1, dim), dim, **keywords)
    assert p.movedim(dim, -1).equal(soft_topk(x, k, tau, **keywords))


@ways
def test_threads_do_not_change_a_row(method, backend):
    x = seeded(64, 300)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(soft_topk(x, 20, method=method, backend=backend))
    finally:
        torch.set_num_threads(before)
    # PyTorch may cut its sums elsewhere.
    assert torch.allclose(*found, rtol=0, atol=0 if backend == "numba" else 1e-14)


# --- refusals, transforms -------------------------------------------------------------------------


def test_bad_arguments_are_refused_with_what_was_wanted(unchecked, monkeypatch):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"`x` must be a tensor of floating numbers; got"):
        soft_topk(torch.zeros(2, dtype=torch.int64), 1)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=f"`k` must be from 0 to the 3 entries.*got {k}"):
            soft_topk(x, k)
    with pytest.raises(ValueError, match="`dim` must be an axis"):
        soft_topk(x, 1, dim=2)
    with pytest.raises(ValueError, match=r"`method` must be one of .*; got 'best'"):
        soft_topk(x, 1, method="best")
    for tau in (-1.0, nan, inf, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="`temperature` must be finite and at least 0"):
            soft_topk(x, 1, tau)
    with pytest.raises(ValueError, match=r"`temperature` must broadcast to \(2, 1\)"):
        soft_topk(x, 1, torch.ones(2, 3))
    with pytest.raises(ValueError, match="`backend` must be 'auto', 'reference' or 'numba'"):
        soft_topk(x, 1, backend="fortran")
    for method in ("exp", "laplace", "recursive"):
        with pytest.raises(ValueError, match=f"`backend` 'numba' runs .*; `method` is '{method}'"):
            soft_topk(x, 1, method=method, backend="numba")
    monkeypatch.setattr("cln_tutorial.smoothing._checks.HAS_NUMBA", False)
    with pytest.raises(ValueError, match="needs numba, the extra `fast`"):
        soft_topk(x, 1, backend="numba")
    assert soft_topk(x, 1).sum() == 2  # without numba "auto" is the reference


def test_autocast_does_not_change_a_weight():
    x = seeded(4, 9, dtype=torch.float32)
    for method in topk.METHODS:
        plain = soft_topk(x, 3, 0.5, method=method)
        with torch.autocast("cpu", torch.bfloat16):
            assert soft_topk(x, 3, 0.5, method=method).equal(plain)


def test_the_compiler_takes_each_method_whole(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import torch
from cln_tutorial.smoothing.topk import METHODS, soft_topk
x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
t = torch.tensor([[0.0], [0.5], [2.0]], dtype=torch.float64)
def together(x):
    found = [soft_topk(x, 2, t, method=m) for m in METHODS]
    found += [soft_topk(x, 4, 0.5, method=m, backend="reference") for m in ("sigmoid", "esp")]
    return torch.stack(found)
found = []
for f in (together, torch.compile(together, fullgraph=True, backend="aot_eager")):
    y = x.clone().requires_grad_()
    value = f(y)
    found.append((value, torch.autograd.grad(value.square().sum(), y)[0]))
for plain, of_compiler in zip(*found):
    torch.testing.assert_close(plain, of_compiler, rtol=1e-13, atol=1e-15)
print("done", len(found[1][0]))
"""
    assert child_output(code).split() == ["done", "7"]


def test_the_operators_may_be_mapped_over_any_axis():
    x, g = seeded(4, 3, 6), seeded(4, 3, 6, seed=1)
    ops = torch.ops.cln_tutorial
    for dim in (0, 1):
        y, h = x.movedim(0, dim), g.movedim(0, dim)
        assert torch.vmap(ops.topk_esp, (dim, None))(y, 2).equal(ops.topk_esp(x, 2))
        for found, plain in zip(
            torch.vmap(ops.topk_sigmoid, (dim, None))(y, 2), ops.topk_sigmoid(x, 2), strict=True
        ):
            assert found.equal(plain)
        product = ops.topk_esp_product(x, g, 2)
        assert torch.vmap(ops.topk_esp_product, (dim, dim, None))(y, h, 2).equal(product)
    one = torch.vmap(ops.topk_esp_product, (0, None, None))(x, g[0], 2)
    assert one[1].equal(ops.topk_esp_product(x[1], g[0], 2))


@pytest.mark.parametrize("operator", ["topk_sigmoid", "topk_esp", "topk_esp_product"])
def test_the_operators_keep_the_rules_of_pytorch(operator):
    x = seeded(2, 5)
    arguments = (x, seeded(2, 5, seed=1), 2) if operator == "topk_esp_product" else (x, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.cln_tutorial, operator), arguments, test_utils=checks)
