"""The area under the curve by pairs, in three ways, and the correlation of soft ranks."""

import functools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as peer

from cln_tutorial.smoothing import ranking
from cln_tutorial.smoothing.ranking import soft_auc_loss, soft_spearman
from cln_tutorial.smoothing.sorting import soft_rank

KINDS = ["logistic", "square", "squared_hinge"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
inf, nan = math.inf, math.nan


def seeded(seed=6620):
    return torch.Generator().manual_seed(seed)


def make_pairs(*shape, seed=0, share=0.3, dtype=torch.float64):
    generator = seeded(seed)
    target = torch.rand(shape, generator=generator) < share
    scores = torch.randn(shape, generator=generator, dtype=dtype) + target.to(dtype)
    return scores, target


def by_pairs(scores, target, temperature, kind, weight=None):
    """The definition, of one row: all pairs at once."""
    w = torch.ones_like(scores) if weight is None else weight
    d = (scores[target][:, None] - scores[~target]) / temperature
    pairs = w[target][:, None] * w[~target]
    loss = {
        "logistic": torch.sigmoid(-d),
        "square": (1 - d).square(),
        "squared_hinge": (1 - d).clamp(min=0).square(),
    }[kind]
    return (pairs * loss).sum() / pairs.sum()


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 7, 2**17])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_definition(kind, tile, monkeypatch):
    monkeypatch.setattr(ranking, "TILE", tile)
    scores, target = make_pairs(3, 23)
    target[1] = False
    target[1, 4] = True  # rows of very different numbers of positives
    w = torch.rand(3, 23, generator=seeded(1), dtype=torch.float64)
    for weight in (None, w):
        a, b = (scores.clone().requires_grad_() for _ in range(2))
        tau_a, tau_b = (torch.tensor(0.7, dtype=torch.float64).requires_grad_() for _ in range(2))
        found = soft_auc_loss(a, target, tau_a, kind, sample_weight=weight)
        rows = [
            by_pairs(b[i], target[i], tau_b, kind, None if weight is None else weight[i])
            for i in range(3)
        ]
        # Sums of 132 numbers of order ten in another order.
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-12, atol=1e-13)
        mix = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        (mix * found).sum().backward()
        (mix * torch.stack(rows)).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(tau_a.grad, tau_b.grad, rtol=1e-11, atol=1e-12)


def test_a_weight_has_the_gradient_of_the_definition():
    scores, target = make_pairs(15)
    for kind in KINDS:
        a, b = (torch.rand(15, generator=seeded(1)).double().requires_grad_() for _ in range(2))
        soft_auc_loss(scores, target, 0.7, kind, sample_weight=a).backward()
        by_pairs(scores, target, 0.7, kind, b).backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=20))
def test_at_zero_it_is_one_minus_the_auc_of_scikit_learn_ties_one_half(rows):
    scores, target = (np.array([row[i] for row in rows], dtype=float) for i in range(2))
    if len(set(target)) == 2:
        x, t = torch.from_numpy(scores).requires_grad_(), torch.from_numpy(target)
        loss = soft_auc_loss(x, t, temperature=0)
        assert loss.item() == pytest.approx(1 - peer.roc_auc_score(target, scores), abs=1e-14)
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
        # Whole scores: at 1e-3 every sigmoid is 0, 1 or, for ties, one half.
        low = soft_auc_loss(x, t, temperature=1e-3)
        assert low.item() == pytest.approx(loss.item(), abs=1e-14)


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_equal_scores_of_both_classes_count_one_half(temperature):
    scores, target = torch.zeros(5), torch.tensor([1, 0, 0, 1, 0])
    assert soft_auc_loss(scores, target, temperature) == 0.5


def test_weights_at_zero_are_those_of_scikit_learn():
    scores, target = make_pairs(200)
    scores = scores.round(decimals=1)
    w = torch.rand(200, generator=seeded(1), dtype=torch.float64)
    expected = 1 - peer.roc_auc_score(target, scores, sample_weight=w)
    found = soft_auc_loss(scores, target, 0, sample_weight=w)
    assert found.item() == pytest.approx(expected, abs=1e-13)
    scores, target = make_pairs(300_000, dtype=torch.float32)
    w = torch.rand(300_000, generator=seeded(1))
    found = soft_auc_loss(scores, target, 0, sample_weight=w)
    expected = 1 - peer.roc_auc_score(target, scores, sample_weight=w.double())
    assert found.item() == pytest.approx(expected, rel=2e-7)  # two roundings of float32


def test_the_logistic_loss_is_within_the_bound_of_the_smallest_gap():
    scores, target = make_pairs(60)
    gap = (scores[target][:, None] - scores[~target]).abs().min().item()
    hard = soft_auc_loss(scores, target, 0)
    for temperature in (gap, gap / 3, gap / 30):
        bound = 1 / (1 + math.exp(gap / temperature))
        assert abs(soft_auc_loss(scores, target, temperature) - hard) <= bound
    # One pair attains it.
    pair, labels = torch.tensor([0.5, 0.0]).double(), torch.tensor([1, 0])
    found = soft_auc_loss(pair, labels, 0.25).item()
    assert found == pytest.approx(1 / (1 + math.exp(2)), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_the_squares_are_at_least_one_minus_the_auc(kind, temperature):
    for seed in range(20):
        scores, target = make_pairs(20, seed=seed)
        if 0 < target.sum() < 20:
            hard = soft_auc_loss(scores, target, 0)
            assert soft_auc_loss(scores, target, temperature, kind) >= hard


def test_temperatures_may_differ_from_row_to_row_and_be_zero():
    scores, target = make_pairs(3, 30)
    tau = torch.tensor([[0.5], [0.0], [2.0]], dtype=torch.float64)
    found = soft_auc_loss(scores, target, tau)
    for i, value in enumerate([0.5, 0, 2.0]):
        torch.testing.assert_close(found[i], soft_auc_loss(scores[i], target[i], value))


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_change_with_a_shift_and_scales_with_the_temperature(kind):
    scores, target = make_pairs(40)
    loss = soft_auc_loss(scores, target, 0.5, kind)
    torch.testing.assert_close(soft_auc_loss(scores + 7, target, 0.5, kind), loss)
    torch.testing.assert_close(soft_auc_loss(scores * 4, target, 2.0, kind), loss)
    order = torch.randperm(40, generator=seeded())
    torch.testing.assert_close(soft_auc_loss(scores[order], target[order], 0.5, kind), loss)


# --- precision and cost ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_as_good_as_its_own_rounding(kind, dtype):
    scores, target = make_pairs(2, 400, dtype=torch.float32)
    scores = (scores + 50).to(dtype)  # a common offset must not cancel
    found = soft_auc_loss(scores, target, 0.5, kind)
    exact = soft_auc_loss(scores.double(), target, 0.5, kind)
    assert found.dtype == dtype
    # Rounding of the result, and of 400 offsets of 50 in float32.
    tolerance = torch.finfo(dtype).eps + 2e-5
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)


def test_the_squared_hinge_does_not_cancel():
    # Ten thousand well separated pairs, and one within the margin: sums of a^2, ab and b^2 would
    # be 1e16 times the loss, and lose it.
    far = torch.linspace(1e5, 2e5, 100, dtype=torch.float64)
    scores = torch.cat([far, -far, torch.tensor([1e-3, 0.0]).double()])
    target = torch.tensor([1] * 100 + [0] * 100 + [1, 0])
    found = soft_auc_loss(scores, target, 2e-3, "squared_hinge")
    assert found.item() == pytest.approx(0.25 / 101**2, rel=1e-6)  # 1e-3 in scores of 1e5: 1e-11


def test_gradients_of_far_pairs_keep_their_digits():
    # sigma' at 60 is e^-60; 1 - sigma is 0 there.
    scores = torch.tensor([60.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(soft_auc_loss(scores, torch.tensor([1, 0])), scores)
    assert gradient.tolist() == pytest.approx([-math.exp(-60), math.exp(-60)], rel=1e-4, abs=0)


def test_pairs_are_never_all_in_memory():
    # 6000 x 6000 pairs are 144 MB of float32. The peak of a process of its own grows by tiles.
    code = """
import resource, torch
from cln_tutorial.smoothing.ranking import soft_auc_loss
scores, target = torch.randn(12_000).requires_grad_(), torch.arange(12_000) % 2
soft_auc_loss(scores[:1000], target[:1000]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
soft_auc_loss(scores, target).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 30_000 * (1024 if sys.platform == "darwin" else 1)  # KiB on Linux


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_million_scores_need_no_pairs(kind):
    scores, target = make_pairs(1_000_000, dtype=torch.float32, share=0.5)
    loss = soft_auc_loss(scores.requires_grad_(), target, 1.0, kind)
    loss.backward()
    # d is N(1, 2): E(1 - d)^2 = 2, and half of it on the side of the hinge, by symmetry. The
    # standard error is below 2e-3 * 3.
    exact = soft_auc_loss(scores.detach().double(), target, 1.0, kind)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-7)  # two roundings of float32
    assert loss.item() == pytest.approx(2.0 if kind == "square" else 1.0, abs=0.01)
    assert scores.grad.isfinite().all()
    assert abs(scores.grad.double().sum().item()) < 1e-6  # no shift


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_is_masked(kind):
    scores, target = make_pairs(2, 12)
    scores[:, [2, 5]] = -inf
    keep = scores[0] != -inf
    x = scores.clone().requires_grad_()
    found = soft_auc_loss(x, target, 0.5, kind)
    expected = soft_auc_loss(scores[:, keep], target[:, keep], 0.5, kind)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[:, ~keep] == 0).all()
    if kind == "logistic":
        torch.testing.assert_close(
            soft_auc_loss(scores, target, 0), soft_auc_loss(scores[:, keep], target[:, keep], 0)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [nan, inf])
def test_nan_and_infinity_poison_their_own_row(kind, bad):
    scores, target = make_pairs(3, 10, dtype=torch.float32)
    loss = functools.partial(soft_auc_loss, target=target, kind=kind)
    temperatures = (1.0, 0) if kind == "logistic" else (1.0,)
    clean = [loss(scores, temperature=temperature) for temperature in temperatures]
    scores[1, 3] = bad
    for temperature, before in zip(temperatures, clean, strict=True):
        found = loss(scores, temperature=temperature)
        assert found.isnan().tolist() == [False, True, False]
        assert found[[0, 2]].equal(before[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_pairs_has_neither_loss_nor_gradient(kind):
    target = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 1]])
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [-inf] * 3], requires_grad=True)
    loss = soft_auc_loss(scores, target, 1.0, kind)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert (loss == 0).all()
    assert (gradient == 0).all()
    for shape in ((0,), (2, 0), (0, 3)):
        empty = soft_auc_loss(torch.zeros(shape), torch.zeros(shape), 1.0, kind)
        assert empty.shape == shape[:-1]
        assert (empty == 0).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_extreme_scores_and_temperatures_give_numbers(scale, temperature):
    scores = (scale * torch.tensor([2.0, 1.0, 1.0, 0.0, -1.0])).requires_grad_()
    target = torch.tensor([1, 1, 0, 0, 1])
    loss = soft_auc_loss(scores, target, temperature)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    d = (
        scores.detach().double()[[0, 1, 4]][:, None] - scores.detach().double()[[2, 3]]
    ) / temperature
    assert loss.item() == pytest.approx(torch.sigmoid(-d).mean().item(), abs=1e-6)


def test_the_squared_hinge_of_far_separated_scores_is_zero():
    # The square of their distance is no float32.
    scores, target = torch.tensor([1e25, 0.0, -1e25], requires_grad=True), torch.tensor([1, 0, 0])
    loss = soft_auc_loss(scores, target, 1.0, "squared_hinge")
    assert loss == 0
    assert (torch.autograd.grad(loss, scores)[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_any_strides_are_read_along_their_last_axis(kind):
    scores, target = make_pairs(12, 5)
    found = soft_auc_loss(scores.T, target.T, 1.0, kind)
    expected = soft_auc_loss(scores.T.contiguous(), target.T.contiguous(), 1.0, kind)
    assert found.shape == (5,)
    torch.testing.assert_close(found, expected)


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_are_right(kind):
    scores, target = make_pairs(2, 7)
    scores.requires_grad_()
    tau = torch.tensor([[0.8], [1.3]], dtype=torch.float64, requires_grad=True)
    w = torch.rand(2, 7, generator=seeded(1), dtype=torch.float64, requires_grad=True)

    def loss(scores, tau, w):
        return soft_auc_loss(scores, target, tau, kind, sample_weight=w)

    assert torch.autograd.gradcheck(loss, (scores, tau, w))
    assert torch.autograd.gradgradcheck(loss, (scores, tau, w))


def test_third_derivatives_are_those_of_the_sigmoid():
    x = torch.tensor([0.3, -0.4], dtype=torch.float64)
    target = torch.tensor([1, 0])

    def ours(d):
        return soft_auc_loss(x + torch.stack([d, d * 0]), target)

    def plain(d):
        return torch.sigmoid(-(0.7 + d))

    for _ in range(4):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(ours(zero), plain(zero))
        ours, plain = torch.func.grad(ours), torch.func.grad(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_the_gradient_is_a_loop_and_jacrev_works(kind):
    scores, target = make_pairs(4, 2, 9)
    loss = functools.partial(soft_auc_loss, temperature=0.7, kind=kind)
    expected = [torch.func.jacrev(loss)(scores[i], target[i]).sum(0) for i in range(4)]
    found = torch.vmap(torch.func.grad(lambda s, t: loss(s, t).sum()))(scores, target)
    torch.testing.assert_close(found, torch.stack(expected))
    hessian = torch.func.jacrev(torch.func.jacrev(lambda s: loss(s, target[0]).sum()))
    assert hessian(scores[0]).isfinite().all()


def test_vmap_at_zero_is_a_loop():
    scores, target = make_pairs(4, 9)
    found = torch.vmap(lambda s, t: soft_auc_loss(s, t, 0))(scores, target)
    torch.testing.assert_close(found, soft_auc_loss(scores, target, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    scores, target = make_pairs(100, dtype=torch.float32)
    plain = soft_auc_loss(scores, target, 1.0, kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert soft_auc_loss(scores, target, 1.0, kind).equal(plain)


def test_they_compile_as_one_graph(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import torch
from cln_tutorial.smoothing.ranking import soft_auc_loss, soft_spearman
scores, target = torch.randn(3, 20), torch.rand(3, 20) < 0.4
def check(f):
    a, b = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    torch.compile(f, fullgraph=True, backend="aot_eager")(a).sum().backward()
    f(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
for kind in ("logistic", "square", "squared_hinge"):
    check(lambda x: soft_auc_loss(x, target, 0.5, kind))
check(lambda x: soft_auc_loss(x, target, 0) + x.sum(-1))
other = torch.randn(3, 20)
check(lambda x: soft_spearman(x, other, 0.5))
"""
    child_output(code)


# --- Spearman's correlation -----------------------------------------------------------------------


@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_at_zero_the_correlation_is_that_of_scipy_ties_included(regularization):
    for seed in range(5):
        a = torch.randn(40, generator=seeded(seed), dtype=torch.float64).mul(3).round()
        b = a + torch.randn(40, generator=seeded(seed + 50), dtype=torch.float64).mul(3).round()
        found = soft_spearman(a, b, 0, regularization=regularization)
        assert found.item() == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_a_temperature_below_every_gap_gives_it_too():
    a, b = torch.randperm(30, generator=seeded()), torch.randperm(30, generator=seeded(1))
    found = soft_spearman(a.double(), b.double(), 1.0)
    assert found.item() == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_at_a_high_temperature_it_is_the_correlation_of_pearson():
    a = torch.randn(30, generator=seeded(), dtype=torch.float64).exp()
    b = a.sqrt() + torch.randn(30, generator=seeded(1), dtype=torch.float64)
    expected = stats.pearsonr(a, b).statistic
    assert abs(expected - stats.spearmanr(a, b).statistic) > 0.02
    # Affine ranks of spread 1e-4 around 15.5: 1e-11 of it is rounding.
    assert soft_spearman(a, b, 1e4).item() == pytest.approx(expected, abs=1e-9)


def test_its_gradient_moves_a_wrong_order_towards_the_right_one():
    a = torch.randn(20, generator=seeded(), dtype=torch.float64).requires_grad_()
    b = torch.randn(20, generator=seeded(1), dtype=torch.float64)
    before = soft_spearman(a, b, 0).item()
    x = a
    for _ in range(60):
        (gradient,) = torch.autograd.grad(soft_spearman(x, b, 1.0), x)
        x = (x + gradient).detach().requires_grad_()
    assert abs(before) < 0.5
    assert soft_spearman(x, b, 0).item() > 0.95


def test_the_correlation_has_right_derivatives_on_both_sides():
    a, b = (
        torch.randn(2, 6, generator=seeded(s), dtype=torch.float64, requires_grad=True)
        for s in (0, 1)
    )
    tau = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_spearman, (a, b, tau))
    assert torch.autograd.gradgradcheck(soft_spearman, (a, b, tau))


@pytest.mark.parametrize("side", [0, 1])
def test_a_pair_with_minus_infinity_is_masked(side):
    pair = [torch.randn(2, 9, generator=seeded(s), dtype=torch.float64) for s in (0, 1)]
    keep = torch.arange(9) % 4 != 2
    expected = soft_spearman(pair[0][:, keep], pair[1][:, keep], 0.4)
    pair[side][:, ~keep] = -inf
    a, b = (x.requires_grad_() for x in pair)
    found = soft_spearman(a, b, 0.4)
    torch.testing.assert_close(found, expected)
    for gradient in torch.autograd.grad(found.sum(), (a, b)):
        assert gradient.isfinite().all()
        assert (gradient[:, ~keep] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_ranks_have_no_correlation_and_no_gradient(dtype):
    b = torch.randn(11, generator=seeded()).to(dtype)
    for value in (0.1, -inf, 1e30 if dtype.itemsize > 2 else 7.0):
        a = torch.full((11,), value, dtype=dtype, requires_grad=True)
        found = soft_spearman(a, b)
        (gradient,) = torch.autograd.grad(found, a)
        assert (found.item(), found.dtype) == (0.0, dtype)
        assert (gradient == 0).all()
    assert soft_spearman(b[:0], b[:0]) == 0
    assert soft_spearman(b[:1], b[:1]) == 0
    assert soft_spearman(b[:0].view(0, 1), b[:0].view(0, 1)).shape == (0,)


def test_ranks_that_differ_by_a_rounding_have_no_correlation():
    # Ranks are 6 + x / tau, and the unit of float32 at 6 is 4.8e-7.
    a = torch.linspace(-4, 4, 11)
    assert 1 < soft_rank(a, 1e7).unique().numel() < 5
    assert soft_spearman(a, a, 1e7) == 0
    assert soft_spearman(a, a, 1e3) > 0.99


def test_nan_poisons_the_correlation_of_its_own_row():
    a, b = (torch.randn(3, 8, generator=seeded(s)) for s in (0, 1))
    clean = soft_spearman(a, b)
    b[1, 2] = nan
    found = soft_spearman(a, b)
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].equal(clean[[0, 2]])


def test_the_correlation_takes_any_axis_and_vmap():
    a, b = (torch.randn(4, 7, 2, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
    found = soft_spearman(a, b, 0.5, dim=1)
    assert found.shape == (4, 2)
    expected = soft_spearman(a.movedim(1, -1), b.movedim(1, -1), 0.5)
    torch.testing.assert_close(found, expected)
    batched = torch.vmap(lambda x, y: soft_spearman(x, y, 0.5, dim=0))(a, b)
    torch.testing.assert_close(batched, expected)


# --- bad input ------------------------------------------------------------------------------------

S, T = torch.tensor([0.5, 0.25]), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: soft_auc_loss(T, T), TypeError, "`scores` must be a tensor of floating"),
        (lambda: soft_auc_loss(S, T, kind="hinge"), ValueError, "`kind` must be one of"),
        (lambda: soft_auc_loss(S, T[:1]), ValueError, r"`target` must have.*\(2,\); got \(1,\)"),
        (lambda: soft_auc_loss(S, 2 * T), ValueError, "`target` must be 0 or 1"),
        (lambda: soft_auc_loss(S, T, -1.0), ValueError, "`temperature` must be finite"),
        (lambda: soft_auc_loss(S, T, nan), ValueError, "`temperature` must be finite"),
        (lambda: soft_auc_loss(S, T, S), ValueError, "`temperature` must broadcast"),
        (lambda: soft_auc_loss(S, T, 0, "square"), ValueError, "margin of 'square'"),
        (lambda: soft_auc_loss(S, T, 0 * S[0], "square"), ValueError, "margin of 'square'"),
        (lambda: soft_auc_loss(S, T, sample_weight=-S), ValueError, "`sample_weight` must be"),
        (lambda: soft_auc_loss(S[0], T[0]), ValueError, "`dim` must be an axis of `scores`"),
        (lambda: soft_spearman(T, S), TypeError, "`a` must be a tensor of floating"),
        (lambda: soft_spearman(S, T), TypeError, "`b` must be a tensor of floating"),
        (lambda: soft_spearman(S, S[:1]), ValueError, r"`b` must be like `a`, \(2,\)"),
        (lambda: soft_spearman(S, S.double()), ValueError, "got .* of torch.float64"),
        (lambda: soft_spearman(S, S, dim=1), ValueError, "`dim` must be an axis of `a`"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
