"""Sparsemax, entmax and their losses, against bisection in float64 and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from cln_tutorial.smoothing import _checks, sparse_loops
from cln_tutorial.smoothing.sparse import (
    Entmax15,
    Sparsemax,
    entmax,
    entmax15,
    fenchel_young_loss,
    sparsemax,
)

BACKENDS = ["reference", "numba"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
inf, nan = math.inf, math.nan
HALF_AN_ULP = 2**-25  # of numbers from 1/2 to 1, in float32
KINDS = {"softmax": 1.0, "entmax15": 1.5, "sparsemax": 2.0, 1.2: 1.2, 3: 3.0}
both = pytest.mark.parametrize("backend", BACKENDS)


def oracle(x, alpha):
    """The definition: halve the interval of the threshold, in float64."""
    x = np.asarray(x, dtype=np.float64)
    if alpha == 1:
        return special.softmax(x, -1)
    a = alpha - 1
    z = (x - x.max(-1, keepdims=True)) * a
    low, high = (np.full((*z.shape[:-1], 1), end) for end in (-1.0, 0.0))
    for _ in range(60):
        middle = (low + high) / 2
        large = (np.clip(z - middle, 0, None) ** (1 / a)).sum(-1, keepdims=True) > 1
        low, high = np.where(large, middle, low), np.where(large, high, middle)
    return np.clip(z - low, 0, None) ** (1 / a)


def error(found, x, alpha):
    return np.abs(found.detach().double().numpy() - oracle(x.detach().double(), alpha)).max()


def normals(*shape, scale=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def of(alpha, backend):
    """The function of a number, by its own name where it has one."""
    if alpha in (1.5, 2.0):
        named = sparsemax if alpha == 2 else entmax15
        return lambda x, dim=-1: named(x, dim, backend=backend)
    return lambda x, dim=-1: entmax(x, alpha, dim, backend=backend)


# --- values ---------------------------------------------------------------------------------------


@both
def test_two_entries_have_the_closed_forms(backend):
    gap = torch.linspace(-4, 4, 401, dtype=torch.float64)
    x = torch.stack([gap, torch.zeros_like(gap)], -1)
    line = ((1 + gap) / 2).clamp(0, 1)
    assert (sparsemax(x, backend=backend)[:, 0] - line).abs().max() < 1e-15
    # Heights h and h - t/2 with squares that sum to 1, while |t| < 2.
    t = gap.clamp(-2, 2)
    height = t / 4 + (0.5 - t.square() / 16).sqrt()
    assert (entmax15(x, backend=backend)[:, 0] - height.square()).abs().max() < 1e-15
    assert (entmax(x, 1, backend=backend)[:, 0] - gap.sigmoid()).abs().max() < 1e-15


@both
@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 1.75, 2.0, 3.0])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 3.0])
def test_the_weights_are_those_of_bisection_in_float64(backend, alpha, scale):
    # Below and above the length from which blocks are used; the last block is not full.
    for n in (1, 2, 3, 17, 128, 511, 513, 1000):
        x = normals(4, n, scale=scale, dtype=torch.float64, seed=n)
        # 60 halvings leave 1e-18 of the threshold, sums of 1000 numbers 1e-14; at 3 a root of it.
        assert error(of(alpha, backend)(x), x, alpha) < (1e-12 if alpha <= 2 else 1e-7)


@both
@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_long_rows_are_right_whether_few_or_all_entries_are_near_the_largest(backend, alpha, scale):
    x = normals(2, 40_000, scale=scale, seed=3)
    x[1, -1] = x[1].max() + 0.4  # the largest in the last block, which is its own
    found = of(alpha, backend)(x)
    assert error(found, x, alpha) <= HALF_AN_ULP * 1.0001
    assert (found.double().sum(-1) - 1).abs().max() < 1e-6


@both
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_error_in_float32_is_within_its_bound_where_it_is_largest(alpha, backend):
    # A weight of nearly 1, beside one or two small ones, rounds the most; an offset spares it.
    x = torch.zeros(60_000, 3)
    x[:, 1:] = -normals(60_000, 2, seed=5).abs()
    x[20_000:40_000] += 100
    x[40_000:, 2] = -inf
    x[40_000:] -= 1e4
    worst = error(of(alpha, backend)(x), x, alpha)
    assert worst <= HALF_AN_ULP * 1.0001  # the oracle's own rounding
    assert worst > 0.9 * HALF_AN_ULP  # so much must be: the result is in float32


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_entries_just_above_the_threshold_do_not_stop_the_search_early(backend, dtype):
    # Their slope makes the steps short while the root is still far away.
    x = torch.full((1, 100_001), -2 + 2e-3, dtype=dtype)
    x[0, 7] = 0
    limit = HALF_AN_ULP * 1.0001 if dtype == torch.float32 else 1e-14
    assert error(entmax15(x, backend=backend), x, 1.5) <= limit


@both
def test_a_number_as_alpha_is_the_function_of_that_name(backend):
    x = normals(6, 40)
    assert entmax(x, 2, backend=backend).equal(sparsemax(x, backend=backend))
    assert entmax(x, 1.5, backend=backend).equal(entmax15(x, backend=backend))
    assert entmax(x, backend=backend).equal(entmax15(x, backend=backend))
    assert entmax(x, 1, backend=backend).equal(x.softmax(-1))


@both
def test_an_alpha_for_each_head_broadcasts_along_the_other_axes(backend):
    x = normals(5, 3, 4, 7, dtype=torch.float64)
    alphas = torch.tensor([1.0, 1.3, 2.0], dtype=torch.float64)
    found = entmax(x, alphas.view(3, 1, 1), backend=backend)
    by_axis = entmax(x, alphas.view(3, 1, 1), dim=2, backend=backend)
    for head, alpha in enumerate(alphas.tolist()):
        assert error(found[:, head], x[:, head], alpha) < 1e-12
        rows = x[:, head].transpose(-1, -2)
        assert error(by_axis[:, head].transpose(-1, -2), rows, alpha) < 1e-12


@both
def test_around_alpha_1_the_weights_go_over_into_softmax(backend):
    # The derivative of a weight by alpha is below 1/2 log^2 n here, so all else is an error.
    x = normals(4, 20, dtype=torch.float64)
    for step in (1e-15, 1e-12, 1e-9, 1e-6, 1e-3):
        for alpha in (1 + step, torch.tensor(1 + step, dtype=torch.float64)):
            assert (
                entmax(x, alpha, backend=backend) - x.softmax(-1)
            ).abs().max() < 1e-12 + 5 * step


@both
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0])
def test_one_weight_is_all_from_the_margin_on_and_not_before(backend, alpha):
    margin = 1 / (alpha - 1)
    at = torch.tensor([0.0, -margin, -margin - 1], dtype=torch.float64)
    before = torch.tensor([0.0, -margin * 0.9, -margin - 1], dtype=torch.float64)
    find = of(alpha, backend)
    assert find(at).tolist() == pytest.approx([1, 0, 0], abs=1e-12 if alpha <= 2 else 1e-7)
    assert find(before)[1] > 1e-6


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12),
    st.sampled_from([1.1, 1.5, 2.0]),
    st.sampled_from(BACKENDS),
    st.randoms(use_true_random=False),
)
def test_weights_are_equivariant_shift_invariant_in_order_and_sum_to_one(x, alpha, backend, random):
    x, find = torch.tensor(x, dtype=torch.float64), of(alpha, backend)
    found = find(x)
    order = list(range(len(x)))
    random.shuffle(order)
    # A few roundings of float64, of numbers up to 16; shifts round them once more.
    assert (find(x[order]) - found[order]).abs().max() < 1e-13
    assert (find(x + 16) - found).abs().max() < 1e-13
    assert abs(found.sum() - 1) < 1e-13
    assert (found >= 0).all()
    ranked = found[x.argsort()]
    assert (ranked.diff() > -1e-13).all()
    assert error(found, x, alpha) < 1e-13


@both
def test_equal_entries_have_equal_weights(backend):
    for alpha in (1.0, 1.3, 1.5, 2.0, 4.0):
        for n in (1, 7, 1000):
            found = of(alpha, backend)(torch.full((2, n), 3.0, dtype=torch.float64))
            assert (found - 1 / n).abs().max() < 1e-15  # a few roundings of the root


# --- extremes -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_half_types_are_computed_in_float32_and_rounded_once(backend, dtype, alpha):
    x = normals(2, 10_000, dtype=dtype)
    found = of(alpha, backend)(x)
    assert found.dtype == dtype
    wide = x if dtype == torch.float64 else x.float()
    assert found.equal(of(alpha, backend)(wide).to(dtype))
    # Rounding moves each of the weights, whose sum is 1, by eps / 2 of itself; fp16 has subnormals.
    limit = torch.finfo(dtype).eps / 2 + len(found[0]) * torch.finfo(dtype).tiny / 1024 + 1e-6
    assert (found.double().sum(-1) - 1).abs().max() < limit


@both
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_huge_numbers_and_long_rows(backend, alpha):
    find = of(alpha, backend)
    huge = torch.tensor([[1e30, -1e30, 1e30], [-3e38, 3e38, 0], [-1e30, -1e30, -1e30]])
    expected = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert (find(huge) - expected).abs().max() < 1e-7
    million = find(normals(10**6, seed=2)).double()
    assert million.sum() == pytest.approx(1, abs=2e-6)  # one rounding of each of the weights


@both
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_empty_batches_and_axes_give_empty_results_and_gradients(backend, alpha):
    for shape in [(0,), (0, 5), (3, 0), (2, 0, 4)]:
        x = torch.zeros(shape, requires_grad=True)
        found = of(alpha, backend)(x)
        assert found.shape == x.shape
        assert torch.autograd.grad(found.sum(), x)[0].shape == x.shape


@both
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("n", [5, 600])
def test_masked_entries_have_no_weight_and_no_gradient(backend, alpha, n):
    x = normals(3, n, dtype=torch.float64)
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[:, ::2] = True
    with_mask = x.masked_fill(masked, -inf).requires_grad_()
    without = x[:, 1::2].clone().requires_grad_()
    upwards = normals(3, n, dtype=torch.float64, seed=1)
    upwards[:, 0] = inf  # of a weight that is always zero: it means nothing
    found, expected = of(alpha, backend)(with_mask), of(alpha, backend)(without)
    assert (found[:, 1::2] - expected).abs().max() < 1e-14
    (gradient,) = torch.autograd.grad(found, with_mask, upwards, create_graph=True)
    (plain,) = torch.autograd.grad(expected, without, upwards[:, 1::2])
    assert (gradient[:, 1::2] - plain).abs().max() < 1e-12
    assert (found[masked] == 0).all()
    assert (gradient[masked] == 0).all()
    if backend == "numba":  # the loop too, not the formula of the second derivative
        (once,) = torch.autograd.grad(of(alpha, backend)(with_mask), with_mask, upwards)
        assert (once - gradient).abs().max() < 1e-12
        assert (once[masked] == 0).all()
    if alpha != 2:
        second = torch.autograd.grad(gradient[:, 1::2].square().sum(), with_mask)[0]
        assert second.isfinite().all()
        assert (second[masked] == 0).all()


@both
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("n", [5, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_poison_their_own_row_and_no_other(backend, alpha, n, dtype):
    clean = normals(6, n, dtype=dtype)
    x = clean.clone()
    x[1, -1] = nan
    x[2, 0] = -torch.tensor(nan)  # with the sign that a processor gives to 0 / 0
    x[3, 1] = inf
    x[4] = -inf
    good = [0, 5]
    gradients = []
    for rows in (x, clean):
        rows = rows.clone().requires_grad_()
        found = of(alpha, backend)(rows)
        gradients.append(torch.autograd.grad(found[:, :3].sum(), rows)[0])
        if rows[1].isnan().any():
            poisoned = found
    assert poisoned[1:5].isnan().all()
    assert poisoned[good].equal(of(alpha, backend)(clean)[good])
    assert gradients[0][1:5].isnan().all()
    assert gradients[0][good].equal(gradients[1][good])


@both
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_any_axis_and_any_strides(backend, alpha):
    find, x = of(alpha, backend), normals(4, 6, 5, dtype=torch.float64)
    upwards = normals(4, 6, 5, dtype=torch.float64, seed=1)
    for dim in (0, 1, 2, -3):
        moved = x.movedim(dim, -1).contiguous().requires_grad_()
        plain = x.clone().requires_grad_()
        found, expected = find(plain, dim), find(moved)
        assert found.equal(expected.movedim(-1, dim))
        (gradient,) = torch.autograd.grad(found, plain, upwards)
        (other,) = torch.autograd.grad(expected, moved, upwards.movedim(dim, -1))
        assert gradient.equal(other.movedim(-1, dim))
    assert find(x[:, ::2, 1:4]).equal(find(x[:, ::2, 1:4].clone()))
    assert find(x.expand(2, 4, 6, 5))[1].equal(find(x))


# --- gradients ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0, 2.5])
def test_first_and_second_derivatives_are_those_of_finite_differences(backend, alpha):
    # Of these rows no weight is so near to zero that a difference would cross a kink.
    x = normals(4, 6, scale=1.2, dtype=torch.float64, seed=6).requires_grad_()
    find = of(alpha, backend)
    weights = find(x.detach())
    assert alpha < 1.5 or (weights == 0).any()
    assert weights[weights > 0].min() ** (alpha - 1) > 1e-3
    assert torch.autograd.gradcheck(find, x)
    assert torch.autograd.gradgradcheck(find, x)


@both
def test_weights_and_alpha_have_first_and_second_derivatives_together(backend):
    x = normals(5, 6, dtype=torch.float64, seed=6).requires_grad_()
    alphas = torch.tensor([1.004, 1.05, 1.3, 1.5, 1.9], dtype=torch.float64).view(5, 1)
    weights = entmax(x.detach(), alphas)
    assert weights[weights > 0].min() > 1e-4
    alphas.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: entmax(x, a, backend=backend), (x, alphas))
    assert torch.autograd.gradgradcheck(lambda x, a: entmax(x, a, backend=backend), (x, alphas))


@both
def test_the_derivative_by_alpha_has_its_closed_form_at_1_and_no_digits_are_lost_beside_it(backend):
    # At 1: -1/2 p log^2 p, less p times its sum.
    x = normals(3, 9, dtype=torch.float64)
    p = x.softmax(-1)
    upwards = normals(3, 9, dtype=torch.float64, seed=1)
    free = -0.5 * p * p.log().square()
    expected = ((free - p * free.sum(-1, keepdim=True)) * upwards).sum()
    for step in (0.0, 1e-14, 1e-10, 1e-7):
        alpha = torch.tensor(1 + step, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(entmax(x, alpha, backend=backend), alpha, upwards)
        # A second derivative of size 10 moves it by 10 steps.
        assert abs(found - expected) < 1e-12 + 20 * step


@both
def test_alpha_keeps_its_dtype_and_shape_in_the_gradient(backend):
    x = normals(2, 3, 5)
    for alpha in (torch.tensor(1.5), torch.full((3, 1), 1.3), torch.full((1, 1, 1), 1.2)):
        alpha = alpha.bfloat16().requires_grad_()
        (gradient,) = torch.autograd.grad(entmax(x, alpha, backend=backend)[..., 0].sum(), alpha)
        assert gradient.shape == alpha.shape
        assert gradient.dtype == alpha.dtype
        assert gradient.ne(0).all()


@both
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("n", [6, 600, 9000])
def test_the_jacobian_is_that_of_the_support(backend, alpha, n):
    x = normals(2, n, dtype=torch.float64, seed=8).requires_grad_()
    upwards = normals(2, n, dtype=torch.float64, seed=9)
    found = of(alpha, backend)(x)
    (gradient,) = torch.autograd.grad(found, x, upwards)
    p = torch.from_numpy(oracle(x.detach(), alpha))
    slopes = torch.where(found > 0, p.clamp(min=1e-300) ** (2 - alpha), 0)
    mean = (slopes * upwards).sum(-1, keepdim=True) / slopes.sum(-1, keepdim=True)
    # Roots of weights of float64: an error of 1e-16 in the smallest, 1e-5, is one of 1e-11.
    assert (gradient - slopes * (upwards - mean)).abs().max() < 1e-9


@both
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_the_hessian_of_a_sum_of_cubes_is_its_closed_form(backend, alpha):
    # Of sum p^3: J diag(6 p) J + the derivative of J times 3 p^2, by differences of the gradient.
    x = normals(7, scale=0.3, dtype=torch.float64, seed=4)
    cubes = lambda x: of(alpha, backend)(x).pow(3).sum()  # noqa: E731
    hessian = torch.func.jacrev(torch.func.jacrev(cubes))(x)
    step = 1e-6
    rows = []
    for i in range(len(x)):
        ends = []
        for sign in (1, -1):
            moved = x.clone()
            moved[i] += sign * step
            moved.requires_grad_()
            ends.append(torch.autograd.grad(cubes(moved), moved)[0])
        rows.append((ends[0] - ends[1]) / (2 * step))
    differences = torch.stack(rows)
    assert differences.abs().max() > 0.1
    assert (hessian - differences).abs().max() < 1e-7  # step^2 and 1e-16 / step
    assert (hessian - hessian.T).abs().max() < 1e-12


@both
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_no_nan_arises_on_the_way_to_a_second_derivative(backend, alpha):
    # The root of zero has an infinite slope; what is masked afterwards stops anomaly detection.
    x = torch.tensor([[0.0, -0.1, -9.0, -inf]], dtype=torch.float64, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        found = of(alpha, backend)(x)
        (gradient,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient[0, 0], x)
    assert second.isfinite().all()
    assert second[0, 0] != 0


@both
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_vmap_and_jacrev_are_loops(backend, alpha):
    x = normals(3, 4, 6, dtype=torch.float64)
    loss = lambda row: (of(alpha, backend)(row) ** 2).sum()  # noqa: E731
    by_loop = torch.stack([torch.func.grad(loss)(row) for row in x.flatten(0, 1)]).view_as(x)
    assert (torch.vmap(torch.vmap(torch.func.grad(loss)))(x) - by_loop).abs().max() < 1e-15
    other_axis = torch.vmap(of(alpha, backend), in_dims=1, out_dims=1)(x)
    assert other_axis.equal(of(alpha, backend)(x))
    jacobian = torch.func.jacrev(of(alpha, backend))(x[0, 0])
    s = of(alpha, backend)(x[0, 0])
    s = torch.where(s > 0, s ** (2 - alpha), 0)
    assert (jacobian - (s.diag() - s.outer(s) / s.sum())).abs().max() < 1e-14


@both
def test_vmap_over_alphas_is_a_loop(backend):
    x, alphas = normals(4, 6, dtype=torch.float64), torch.tensor([1.0, 1.2, 1.5, 2.0]).double()
    find = lambda row, alpha: entmax(row, alpha, backend=backend)  # noqa: E731
    found = torch.vmap(find)(x, alphas)
    square = lambda row, alpha: find(row, alpha).square().sum()  # noqa: E731
    gradient = torch.vmap(torch.func.grad(square, argnums=1))(x, alphas)
    for i in range(4):
        assert (found[i] - find(x[i], alphas[i])).abs().max() < 1e-15
        assert abs(gradient[i] - torch.func.grad(square, argnums=1)(x[i], alphas[i])) < 1e-14
    assert (
        torch.vmap(find, in_dims=(None, 0))(x, alphas)[2] - find(x, alphas[2])
    ).abs().max() < 1e-15


def test_the_operators_run_and_not_the_reference(monkeypatch):
    calls = []
    for name in ("weights", "gradient"):
        loop = getattr(sparse_loops, name)
        monkeypatch.setattr(
            sparse_loops, name, lambda *a, name=name, loop=loop: calls.append(name) or loop(*a)
        )
    x = normals(2, 5).requires_grad_()
    sparsemax(x)[0, 0].backward()
    assert calls == ["weights", "gradient"]
    sparsemax(x, backend="reference")[0, 0].backward()
    assert len(calls) == 2


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_threads_change_nothing(alpha, monkeypatch):
    x = normals(40, 700).requires_grad_()
    upwards = normals(40, 700, seed=1)
    shares = []

    def run(*arguments):
        shares.append(arguments[1])
        return in_threads(*arguments)

    in_threads = sparse_loops.in_threads
    monkeypatch.setattr(sparse_loops, "in_threads", run)
    results = []
    for fewest, threads in ((10**9, 1), (1000, 3)):
        monkeypatch.setattr(sparse_loops, "FEWEST_FOR_A_THREAD", fewest)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = of(alpha, "numba")(x)
        results.append((found, torch.autograd.grad(found, x, upwards)[0]))
    assert shares == [0, 0, 3, 3]
    assert all(one.equal(many) for one, many in zip(*results, strict=True))


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_loss_is_the_weights_less_the_target(kind):
    x = normals(5, 7, dtype=torch.float64).requires_grad_()
    p = torch.from_numpy(oracle(x.detach(), KINDS[kind]))
    classes = torch.tensor([0, 1, 2, 3, 6])
    shares = normals(5, 7, dtype=torch.float64, seed=1).softmax(-1)
    for target, y in ((classes, F.one_hot(classes, 7)), (shares, shares)):
        loss = fenchel_young_loss(x, target, kind, reduction="none")
        assert loss.shape == (5,)
        assert (loss > 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert (gradient - (p - y)).abs().max() < (1e-12 if KINDS[kind] <= 2 else 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_definition_and_zero_where_the_weights_are_the_target(kind):
    alpha = KINDS[kind]
    x = normals(5, 7, scale=2.0, dtype=torch.float64)
    p = oracle(x, alpha)

    def entropy(p):
        if alpha == 1:
            return special.entr(p).sum(-1)
        return (p - p**alpha).sum(-1) / (alpha * (alpha - 1))

    y = normals(5, 7, dtype=torch.float64, seed=1).softmax(-1).numpy()
    y[0] = np.eye(7)[3]
    expected = ((p - y) * x.numpy()).sum(-1) + entropy(p) - entropy(y)
    loss = fenchel_young_loss(x, torch.from_numpy(y), kind, reduction="none")
    assert np.abs(loss.numpy() - expected).max() < 1e-12
    by_class = fenchel_young_loss(x[:1], torch.tensor([3]), kind)
    assert by_class.item() == pytest.approx(expected[0], abs=1e-12)
    at_itself = fenchel_young_loss(x, torch.from_numpy(p), kind, reduction="none")
    assert at_itself.abs().max() < 1e-13


@pytest.mark.parametrize("kind", ["entmax15", "sparsemax", 1.2, 3])
def test_the_loss_of_a_class_is_zero_from_its_margin_on(kind):
    margin = 1 / (KINDS[kind] - 1)
    for gap, zero in ((margin, True), (margin + 1, True), (margin * 0.9, False)):
        x = torch.tensor([gap, 0.0, -0.5], dtype=torch.float64)
        loss = fenchel_young_loss(x, torch.tensor(0), kind).item()
        assert (abs(loss) < 1e-15) is zero
    if kind in ("entmax15", "sparsemax"):  # and to the last bit
        assert fenchel_young_loss(torch.tensor([margin, 0.0]), torch.tensor(0), kind).item() == 0


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_softmax_is_cross_entropy_in_value_gradient_and_what_it_ignores(reduction):
    x = normals(6, 4).requires_grad_()
    for ignore_index in (-100, 3):
        target = torch.tensor([0, 1, ignore_index, 2, 3 if ignore_index != 3 else 0, ignore_index])
        options = {"reduction": reduction, "ignore_index": ignore_index}
        ours = fenchel_young_loss(x, target, **options)
        theirs = F.cross_entropy(x, target, **options)
        assert (ours - theirs).abs().max() < 1e-6  # roundings of numbers up to 5
        gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
        assert (gradients[0] - gradients[1]).abs().max() < 1e-6


def test_for_distributions_softmax_is_the_divergence_and_the_mean_is_over_rows():
    x, y = (
        normals(6, 4, dtype=torch.float64),
        normals(6, 4, dtype=torch.float64, seed=1).softmax(-1),
    )
    ours = fenchel_young_loss(x, y)
    theirs = F.kl_div(x.log_softmax(-1), y, reduction="batchmean")
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_logits_and_ignored_rows_leave_the_loss_finite(kind):
    x = normals(4, 5)
    x[:, 2] = -inf
    x[2], x[3] = nan, -inf  # padding, of which nothing must be known
    x.requires_grad_()
    target = torch.tensor([0, 4, -100, -100])
    loss = fenchel_young_loss(x, target, kind)
    short = x.detach()[:2, [0, 1, 3, 4]]
    expected = fenchel_young_loss(short, torch.tensor([0, 3]), kind)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:, 2] == 0).all()
    assert (x.grad[2:] == 0).all()
    shares = torch.tensor([[0.5, 0.5, 0, 0, 0], [0.2, 0.2, 0, 0.6, 0]])
    with_shares = x.detach()[:2].requires_grad_()
    loss = fenchel_young_loss(with_shares, shares, kind)
    loss.backward()
    assert loss.isfinite()
    assert with_shares.grad.isfinite().all()
    assert fenchel_young_loss(x.detach()[:1], torch.tensor([2]), kind).item() == inf


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_row_leaves_the_losses_of_others_alone(kind):
    x = normals(4, 5)
    clean = fenchel_young_loss(x, torch.arange(4), kind, reduction="none")
    x[1, 2], x[2] = nan, -inf
    loss = fenchel_young_loss(x, torch.arange(4), kind, reduction="none")
    assert loss[1:3].isnan().all()
    assert loss[[0, 3]].equal(clean[[0, 3]])


@pytest.mark.parametrize("kind", ["softmax", "entmax15", "sparsemax", 1.2])
def test_the_loss_has_second_derivatives_and_works_under_vmap(kind):
    x = normals(4, 6, dtype=torch.float64, seed=6).requires_grad_()
    target, shares = torch.arange(4), normals(4, 6, dtype=torch.float64, seed=1).softmax(-1)
    for y in (target, shares):
        each = lambda x, y=y: fenchel_young_loss(x, y, kind, reduction="none")  # noqa: E731
        assert torch.autograd.gradcheck(each, x)
        assert torch.autograd.gradgradcheck(each, x)
    # The Hessian is the Jacobian of the weights.
    alone = lambda row: fenchel_young_loss(row, target[0], kind)  # noqa: E731
    hessian = torch.func.jacrev(torch.func.jacrev(alone))(x[0].detach())
    jacobian = torch.func.jacrev(lambda row: entmax(row, KINDS[kind]))(x[0].detach())
    assert (hessian - jacobian).abs().max() < 1e-12
    by_rows = torch.vmap(torch.func.grad(lambda r, t: fenchel_young_loss(r, t, kind)))(x, target)
    (together,) = torch.autograd.grad(fenchel_young_loss(x, target, kind, reduction="sum"), x)
    assert (by_rows - together).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_loss_of_half_types_is_computed_in_float32_and_rounded_once(dtype):
    x, target = normals(3, 5000, dtype=dtype), torch.tensor([1, 2, 3])
    for kind in ("softmax", "sparsemax", "entmax15"):
        loss = fenchel_young_loss(x, target, kind)
        assert loss.dtype == dtype
        wide = x if dtype == torch.float64 else x.float()
        assert loss.equal(fenchel_young_loss(wide, target, kind).to(dtype))


def test_the_loss_accepts_many_axes_and_none():
    x, target = normals(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    many = fenchel_young_loss(x, target, "sparsemax", reduction="none")
    assert many.shape == (2, 3)
    alone = fenchel_young_loss(x[1, 2], target[1, 2], "sparsemax")
    assert alone.shape == ()
    assert alone.equal(many[1, 2])
    empty = fenchel_young_loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), "sparsemax")
    assert empty.isnan()  # the mean of nothing, as of cross-entropy


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused_by_name():
    x = torch.zeros(2, 3)
    for call in (sparsemax, entmax15, entmax):
        with pytest.raises(TypeError, match=r"`x` must be a tensor of floating numbers; got torch"):
            call(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"`dim` must be an axis of `x` \(2, 3\); got 2"):
            call(x, dim=2)
        with pytest.raises(ValueError, match=r"`backend` must be 'auto', .* got 'triton'"):
            call(x, backend="triton")
    for alpha in (0.99, 4.01, inf, nan, torch.tensor(0.5), torch.tensor([[1.5], [nan]])):
        with pytest.raises(ValueError, match=r"`alpha` must be from 1 to 4; got"):
            entmax(x, alpha)
    with pytest.raises(ValueError, match=r"`alpha` must broadcast to \(2, 1\); got \(2,\)"):
        entmax(x, torch.tensor([1.5, 1.5]))
    with pytest.raises(ValueError, match=r"`alpha` must broadcast to \(2, 1\); got \(4, 1, 1\)"):
        entmax(x, torch.ones(4, 1, 1))
    with pytest.raises(TypeError, match=r"`alpha` must be a number or floating; got torch\.int64"):
        entmax(x, torch.tensor(2))


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_the_loss_are_refused_by_name():
    x, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"`x` must be a tensor of floating"):
        fenchel_young_loss(x.int(), target)
    with pytest.raises(TypeError, match=r"`target` must be int64 .* got torch\.int32"):
        fenchel_young_loss(x, target.int())
    with pytest.raises(ValueError, match=r"`target` must be \(2,\); got \(2, 3\)"):
        fenchel_young_loss(x, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`target` must be \(2, 3\); got \(2,\)"):
        fenchel_young_loss(x, torch.zeros(2))
    for wrong in (3, -1, -100):
        with pytest.raises(ValueError, match=rf"`target` must be from 0 to 2 or .*; got {wrong}"):
            fenchel_young_loss(x, torch.tensor([0, wrong]), ignore_index=-7)
    with pytest.raises(ValueError, match=r"`kind` must be one of .* got 'entmax'"):
        fenchel_young_loss(x, target, "entmax")
    for kind in (0.5, 5, nan):
        with pytest.raises(ValueError, match=r"`kind` as an alpha must be from 1 to 4; got"):
            fenchel_young_loss(x, target, kind)
    with pytest.raises(ValueError, match=r"`reduction` must be .* got 'batchmean'"):
        fenchel_young_loss(x, target, reduction="batchmean")


def test_without_numba_the_reference_answers_and_the_backend_names_the_extra(monkeypatch):
    monkeypatch.setattr(_checks, "HAS_NUMBA", False)
    x = normals(2, 5)
    assert sparsemax(x).equal(sparsemax(x, backend="reference"))
    with pytest.raises(ValueError, match=r"needs numba, the extra `fast`"):
        sparsemax(x, backend="numba")


# --- the house ------------------------------------------------------------------------------------


def test_the_modules_are_their_functions():
    x = normals(2, 5, 3)
    assert Sparsemax(dim=1)(x).equal(sparsemax(x, 1))
    assert Entmax15(dim=1)(x).equal(entmax15(x, 1))
    assert Sparsemax()(x).equal(sparsemax(x))
    assert Entmax15()(x).equal(entmax15(x))
    assert repr(Sparsemax(1)) == "Sparsemax(dim=1)"
    assert repr(Entmax15()) == "Entmax15(dim=-1)"


def test_autocast_changes_nothing():
    x = normals(3, 50).requires_grad_()
    for call in (
        sparsemax,
        entmax15,
        lambda x: fenchel_young_loss(x, torch.arange(3), "sparsemax"),
    ):
        plain = call(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = call(x)
        assert cast.equal(plain)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (plain, cast)]
        assert gradients[0].equal(gradients[1])


def test_compiled_functions_are_the_same_without_a_graph_break(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import sys
import torch
import cln_tutorial.smoothing.sparse as sparse
assert "numba" not in sys.modules
torch.manual_seed(0)
x, upwards, classes = torch.randn(6, 9), torch.randn(6, 9), torch.tensor([0, 1, -100, 3, 4, 8])
alphas = torch.tensor([1.0, 1.2, 1.5, 1.7, 2.0, 1.3]).view(6, 1).requires_grad_()
calls = [
    lambda x: sparse.sparsemax(x),
    lambda x: sparse.entmax15(x, 0),
    lambda x: sparse.sparsemax(x, backend="reference"),
    lambda x: sparse.entmax15(x, backend="reference"),
    lambda x: sparse.entmax(x, alphas),
    lambda x: sparse.fenchel_young_loss(x, classes, "sparsemax") * upwards,
    lambda x: sparse.fenchel_young_loss(x, upwards.softmax(-1), "entmax15") * upwards,
]
for n, call in enumerate(calls):
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        wanted = (leaf, alphas) if n == 4 else (leaf,)
        found = run(leaf)
        results.append([found, *torch.autograd.grad(found, wanted, upwards)])
    for eager, compiled in zip(*results, strict=True):
        print((eager - compiled).abs().max().item())
"""
    differences = [float(line) for line in child_output(code).split()]
    assert len(differences) == 15
    assert max(differences) < 1e-6  # a formula of the second derivative may stand for the loop


def test_entmax_of_its_authors_agrees_where_it_is_right():
    peer = pytest.importorskip("entmax")
    x = normals(20, 50, scale=2.0, dtype=torch.float64)
    assert (peer.sparsemax(x) - sparsemax(x)).abs().max() < 1e-9
    assert (peer.entmax15(x) - entmax15(x)).abs().max() < 1e-9
    assert (peer.entmax_bisect(x, 1.3) - entmax(x, 1.3)).abs().max() < 1e-9
    target = torch.arange(20)
    for ours, theirs in (("sparsemax", peer.sparsemax_loss), ("entmax15", peer.entmax15_loss)):
        loss = fenchel_young_loss(x, target, ours, reduction="none")
        assert (theirs(x, target) - loss).abs().max() < 1e-9
