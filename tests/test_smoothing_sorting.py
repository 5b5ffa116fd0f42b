"""Soft sort and soft rank against closed forms, enumeration, scikit-learn, and their own laws.

The oracle is the minimax formula of isotonic regression, in float64 and without blocks: what is
pooled, and in which order, is not its business.
"""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression as sklearn_isotonic
from torch.autograd import gradcheck, gradgradcheck

from cln_tutorial.smoothing import isotonic, isotonic_loops
from cln_tutorial.smoothing._checks import HAS_NUMBA
from cln_tutorial.smoothing.isotonic import isotonic_regression
from cln_tutorial.smoothing.sorting import (
    SoftRank,
    SoftSort,
    soft_argsort,
    soft_kth,
    soft_median,
    soft_quantile,
    soft_rank,
    soft_sort,
)

BACKENDS = ["reference", *(["numba"] if HAS_NUMBA else [])]
FUNCTIONS = [soft_sort, soft_rank]
LOSSES = ["l2", "kl"]
inf, nan = math.inf, math.nan
# The first example may compile.
usual = settings(derandomize=True, deadline=None, max_examples=50)
quick = settings(usual, max_examples=15)


def normals(*shape, seed=6620, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def every(*names):
    """All combinations of what a test is run for."""
    table = {
        "function": FUNCTIONS,
        "regularization": LOSSES,
        "backend": BACKENDS,
        "descending": [False, True],
    }

    def decorate(test):
        for name in names:
            ids = (lambda f: f.__name__) if name == "function" else None
            test = pytest.mark.parametrize(name, table[name], ids=ids)(test)
        return test

    return decorate


def minimax(value, n):
    """The decreasing solution: at i the least over a <= i of the largest over b >= i of [a, b]."""
    table = np.array([[value(a, b) if a <= b else nan for b in range(n)] for a in range(n)])
    return np.array([min(table[a, i:].max() for a in range(i + 1)) for i in range(n)])


def log_sum(v):
    return v.max() + np.log(np.exp(v - v.max()).sum())


def project(z, w, regularization):
    """Project on the permutahedron of w, both sorted downwards (Blondel et al. 2020, eq. 9)."""
    n = len(z)
    if regularization == "l2":
        return z - minimax(lambda a, b: (z - w)[a : b + 1].mean(), n)
    dual = minimax(lambda a, b: log_sum(z[a : b + 1]) - log_sum(np.log(w)[a : b + 1]), n)
    return np.exp(z - dual)


def oracle(function, x, temperature, regularization, descending):
    rho = np.arange(len(x), 0, -1.0)
    sign = -1 if (function is soft_rank) == descending else 1
    order = np.argsort(-sign * x, kind="stable")
    s = sign * x[order]
    if function is soft_rank:
        ranks = np.empty(len(x))
        ranks[order] = project(s / temperature, rho, regularization)
        return ranks
    if regularization == "kl":  # of the exponentials, and back
        return sign * np.log(project(rho / temperature, np.exp(s), "kl"))
    return sign * project(rho / temperature, s, "l2")


# --- closed forms ---------------------------------------------------------------------------------


@every("backend")
def test_the_example_of_torchsort_has_five_ninths_in_all_of_its_entries(backend):
    x = torch.tensor([8.0, 0.0, 5.0, 3.0, 2.0, 1.0, 6.0, 7.0, 9.0], dtype=torch.float64)
    expected = torch.arange(9, dtype=torch.float64) + 5 / 9
    # Nine numbers, a few roundings each.
    assert (soft_sort(x, 1.0, backend=backend) - expected).abs().max() < 1e-14


@every("backend")
@pytest.mark.parametrize("gap", [0.1, 0.5, 3.0])
def test_quadratic_ranks_are_exact_up_to_the_smallest_gap_and_no_further(gap, backend):
    x = torch.tensor([0.0, gap, 5.0, -10.0], dtype=torch.float64)
    exact = torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64)
    smallest = min(gap, 5 - gap)
    assert soft_rank(x, smallest * (1 - 1e-9), backend=backend).equal(exact)
    assert (soft_rank(x, smallest, backend=backend) - exact).abs().max() < 1e-15
    beyond = (soft_rank(x, smallest * 1.01, backend=backend) - exact).abs().max()
    # Two entries in a block: they lie gap / strength apart in place of 1.
    assert beyond == pytest.approx((1 - 1 / 1.01) / 2, rel=1e-9)


@every("backend")
def test_entropic_ranks_are_exact_while_every_gap_covers_the_logarithm_of_its_ranks(backend):
    x = torch.tensor([0.0, 0.5], dtype=torch.float64)
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def rank(strength, x=x):
        return soft_rank(x, strength, regularization="kl", backend=backend)

    assert rank(0.72).equal(exact)  # 0.72 ln 2 = 0.49907
    assert (rank(0.75) - exact).abs().max() > 0.01  # 0.75 ln 2 = 0.51986
    # Between ranks 4 and 5 a gap of 0.5 lasts to 0.5 / ln(5/4) = 2.2407.
    x = torch.tensor([-30.0, -20.0, -10.0, 0.0, 0.5], dtype=torch.float64)
    ranks = torch.arange(1, 6, dtype=torch.float64)
    assert rank(2.24, x).equal(ranks)
    assert not rank(2.25, x).equal(ranks)


@every("backend")
def test_ranks_at_a_large_strength_are_affine_in_the_row(backend):
    x = normals(11)
    expected = 6 + (x - x.mean()) / 50
    assert (soft_rank(x, 50.0, backend=backend) - expected).abs().max() < 1e-14


@every("backend", "descending")
def test_the_quadratic_sort_is_exact_up_to_the_inverse_of_the_largest_gap(backend, descending):
    x = torch.tensor([0.0, 4.0, 1.0, 2.6], dtype=torch.float64)  # the largest gap is 1.6
    exact = x.sort(descending=descending).values

    def sort(strength):
        return soft_sort(x, strength, descending=descending, backend=backend)

    for strength in (0, 1e-30, 0.5, 1 / 1.6):
        assert (sort(strength) - exact).abs().max() < 1e-15
    assert (sort(1.01 / 1.6) - exact).abs().max() == pytest.approx(0.5 * 1.6 * (1 - 1 / 1.01))
    assert (sort(1e9) - x.mean()).abs().max() < 1e-8  # three steps of 1e-9 around the mean


@given(x=st.lists(st.floats(-100, 100), min_size=2, max_size=20), tau=st.floats(1e-3, 1e3))
@usual
def test_the_bound_of_the_quadratic_sort_holds(x, tau):
    x = torch.tensor(x, dtype=torch.float64)
    delta = x.sort().values - soft_sort(x, tau)
    loss = (torch.arange(1, len(x) + 1) * delta).sum().item()
    spread = (x - x.mean()).square().sum().item()
    slack = 1e-11 * len(x) ** 2 * 100
    assert -slack <= loss <= tau / 4 * spread + slack


def test_the_bound_of_the_quadratic_sort_is_reached():
    # Two entries: the loss is (gap - 1/tau) / 2, the bound tau gap^2 / 8; they meet at 2/gap.
    for gap in (0.1, 1.0, 7.0):
        x, tau = torch.tensor([gap, 0.0], dtype=torch.float64), 2 / gap
        delta = x.sort().values - soft_sort(x, tau)
        loss = (torch.arange(1, 3) * delta).sum().item()
        assert loss == pytest.approx(tau / 4 * (x - x.mean()).square().sum().item(), rel=1e-12)


# --- other computations of the same ---------------------------------------------------------------


@every("function", "regularization", "backend", "descending")
def test_it_is_the_projection_on_the_permutahedron(function, regularization, backend, descending):
    generator = np.random.default_rng(6620)
    for _ in range(12):
        n, tau = int(generator.integers(1, 10)), 10 ** generator.uniform(-1, 1)
        x = generator.normal(size=n) * 2
        if n > 3:
            x[1] = x[0]
        expected = oracle(function, x, tau, regularization, descending)
        options = {"regularization": regularization, "descending": descending}
        found = function(torch.from_numpy(x), tau, backend=backend, **options).numpy()
        # The oracle subtracts numbers of up to n / tau = 100.
        assert np.abs(found - expected).max() < 1e-12


@every("function", "regularization")
def test_torchsort_agrees_in_float64(function, regularization):
    torchsort = pytest.importorskip("torchsort")
    for n, tau in [(1, 1.0), (7, 0.1), (40, 1.0), (300, 0.03), (300, 3.0)]:
        x = normals(4, n)
        options = {"regularization": regularization, "regularization_strength": tau}
        theirs = getattr(torchsort, function.__name__)(x, **options)
        assert (function(x, **options) - theirs).abs().max() < 1e-9  # they subtract 300 / 0.03


@every("backend")
@given(y=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), rises=st.booleans())
@usual
def test_isotonic_regression_is_that_of_scikit_learn(backend, y, rises):
    expected = sklearn_isotonic(np.array(y), increasing=rises)
    y = torch.tensor(y, dtype=torch.float64)
    found = isotonic_regression(y, decreasing=not rises, backend=backend)
    # Sums of 40 numbers of 1e6.
    assert np.abs(found.numpy() - expected).max() < 1e-8
    single = isotonic_regression(y.float(), decreasing=not rises, backend=backend)
    assert single.dtype == torch.float32
    assert np.abs(single.numpy() - expected).max() <= 2**-24 * np.abs(expected).max() + 1e-8


@every("backend")
def test_the_gradient_of_isotonic_regression_is_a_mean_in_each_block(backend):
    y = torch.tensor([3.0, 1.0, 2.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(
        isotonic_regression(y, backend=backend), y, torch.tensor([1.0, 2.0, 6.0, 8.0])
    )
    assert gradient.tolist() == [1, 4, 4, 8]
    for rises in (False, True):
        y = normals(3, 8).requires_grad_()
        assert gradcheck(lambda y, rises=rises: isotonic_regression(y, 0, decreasing=rises), y)


@pytest.mark.skipif(not HAS_NUMBA, reason="there is one backend only")
@every("function", "regularization")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@given(data=st.data())
@quick
def test_both_backends_give_the_same(function, regularization, dtype, data):
    n = data.draw(st.sampled_from([1, 2, 5, 17, 64, 399, 400, 900]))
    tau = 10 ** data.draw(st.floats(-3, 3))
    x = normals(2, n, seed=data.draw(st.integers(0, 99))).to(dtype)
    x = x.round() if data.draw(st.booleans()) else x  # ties, and zeros of both signs
    x[0, : data.draw(st.integers(0, n)) // 2] = -inf
    weight = normals(2, n, seed=100).to(dtype)
    descending = data.draw(st.booleans())
    found = []
    for backend in ("numba", "reference"):
        leaf = x.clone().requires_grad_()
        options = {"regularization": regularization, "descending": descending}
        y = function(leaf, tau, backend=backend, **options)
        (gradient,) = torch.autograd.grad(y.masked_fill(y.isinf(), 0), leaf, weight)
        found.append((y.detach(), gradient))
    (y, gradient), (expected, expected_gradient) = found
    assert y.isinf().equal(expected.isinf())
    y, expected = y.masked_fill(y.isinf(), 0), expected.masked_fill(y.isinf(), 0)
    # Both round a float64 result, so at most one unit in the last place lies between them.
    unit = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
    assert ((y - expected).abs() <= unit * (1 + expected.abs())).all()
    # An entropic gradient uses the rounded ranks: up to n / tau of some roundings.
    scale = n / min(tau, 1) if function is soft_rank else 1
    assert (gradient - expected_gradient).abs().max() <= 8 * unit * scale * n**0.5


@every("function", "regularization", "descending")
def test_rounds_and_stack_of_the_reference_find_the_same_blocks(
    function, regularization, descending, monkeypatch
):
    options = {"regularization": regularization, "descending": descending, "backend": "reference"}
    cases = [(normals(3, 200).round(decimals=1), tau) for tau in (0.01, 0.3, 5.0, 100.0)]
    expected = [function(x, tau, **options) for x, tau in cases]
    monkeypatch.setattr(isotonic, "MOST_ROUNDS", 0)
    for (x, tau), rounds in zip(cases, expected, strict=True):
        assert (function(x, tau, **options) - rounds).abs().max() < 1e-12


@pytest.mark.skipif(not HAS_NUMBA, reason="numba sorts by digits")
@pytest.mark.parametrize("n", [399, 400, 2**15, 2**15 + 1, 70_000])
def test_any_bits_of_float32_are_sorted_as_pytorch_sorts_them(n):
    bits = np.random.default_rng(6620).integers(0, 2**32, size=(4, n), dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32)).nan_to_num(0.0, 1.0, -1.0)
    x[1] = x[1].abs() * 0 + (torch.arange(n) % 7 - 3)  # few digits, many ties
    x[2] = -torch.arange(n) * 1e-40  # no normal number among the first ones
    x[3] = 4.0 ** (torch.arange(n) % 3)  # an odd number of digits: one
    for descending in (False, True):
        expected = x.sort(dim=-1, descending=descending, stable=True)
        assert soft_sort(x, 0, descending=descending, backend="numba").equal(expected.values)
        leaf = x.clone().requires_grad_()
        y = soft_sort(leaf, 0, descending=descending, backend="numba")
        (gradient,) = torch.autograd.grad(y, leaf, torch.arange(n).float().expand(4, n))
        assert gradient.gather(-1, expected.indices).equal(torch.arange(n).float().expand(4, n))


# --- exact in float32 -----------------------------------------------------------------------------


@every("backend")
@pytest.mark.parametrize("strength", [1e-2, 1e-4, 1e-6])
def test_the_sort_of_float32_does_not_lose_digits_at_a_small_strength(strength, backend):
    # The difference of two large numbers is off by 4e-3, 0.49 and 3.0 here.
    x = normals(1000, dtype=torch.float32)
    expected = soft_sort(x.double(), strength)
    assert (soft_sort(x, strength, backend=backend) - expected).abs().max() < 2e-6
    w, rho = x.sort().values, torch.arange(1, 1001) / strength
    assert ((rho - (rho - w)) - w).abs().max() > 1e-3  # what is not done


@every("backend")
def test_the_ranks_of_a_million_float32_are_right_to_a_tenth_of_a_rank(backend):
    x = normals(10**6, dtype=torch.float32)
    for strength in (1.0, 1e-5):
        expected = soft_rank(x.double(), strength)
        # Half a unit in the last place of 10^6 is 1/32.
        found = soft_rank(x, strength, backend=backend)
        assert (found - expected).abs().max() <= 1 / 32


@every("function", "regularization", "backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-30, 1e30])
def test_extreme_values_and_temperatures_give_numbers(
    function, regularization, backend, dtype, temperature
):
    x = torch.tensor([[1e30, -1e30, 0.1, 0.1, 0.1, 1e-30], [0.1] * 6], dtype=dtype)
    x = x[:, :5] if regularization == "kl" and function is soft_sort else x
    leaf = x.clone().requires_grad_()
    y = function(leaf, temperature, regularization=regularization, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert y.isfinite().all()
    # The slope of what ties is 1 / temperature, and float32 ends at 1e38.
    assert gradient.isfinite().all() or temperature == 1e-300
    n = x.shape[-1]
    if function is soft_rank:
        assert (y[1] - (n + 1) / 2).abs().max() < 1e-6
        if temperature < 1:
            expected = [6, 1, 4, 4, 4, 2] if n == 6 else [5, 1, 3, 3, 3]
            assert (y[0] - torch.tensor(expected)).abs().max() < 1e-6
    elif temperature < 1e-30:  # at 1e-30 it is 1 / the largest gap, to rounding
        assert y.equal(x.sort().values)
    elif temperature > 1:
        # All in one block around the mean, which 1e-30 does not move.
        assert (y[1] - 0.1).abs().max() < 1e-7


@every("function", "backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_rows_of_half_types_are_those_of_float32_rounded_once(function, backend, dtype):
    x = normals(50_000, dtype=torch.float32).to(dtype)
    expected = function(x.float(), 0.5, backend=backend).to(dtype)
    assert function(x, 0.5, backend=backend).equal(expected)


# --- derivatives ----------------------------------------------------------------------------------


@every("function", "regularization", "backend", "descending")
def test_first_and_second_derivatives_are_right(function, regularization, backend, descending):
    options = {"regularization": regularization, "descending": descending, "backend": backend}
    # Neither sorted nor its own inverse as a permutation.
    x = torch.tensor([[0.3, 1.9, 0.4, -1.2, 2.0, 0.1], [5.0, 1.0, 4.0, 2.5, 3.0, 1.2]])
    for strength in (0.3, 2.0):
        leaf = x.double().requires_grad_()
        assert gradcheck(lambda x, s=strength: function(x, s, **options), leaf)
        assert gradgradcheck(lambda x, s=strength: function(x, s, **options).pow(3), leaf)


@every("function", "regularization", "backend")
def test_the_temperature_may_be_a_tensor_with_a_gradient_per_row(function, regularization, backend):
    x = normals(3, 6)
    temperature = torch.tensor([[0.2], [0.9], [4.0]], dtype=torch.float64)
    options = {"regularization": regularization, "backend": backend}
    y = function(x, temperature, **options)
    for row in range(3):
        expected = function(x[row], float(temperature[row]), **options)
        assert (y[row] - expected).abs().max() < 1e-13
    inputs = (x.requires_grad_(), temperature.requires_grad_())
    assert gradcheck(lambda x, t: function(x, t, **options), inputs)
    assert gradgradcheck(lambda x, t: function(x, t, **options), inputs)
    across = function(x.mT, temperature[None, :, 0], 0, **options)
    assert (across.mT - y).abs().max() < 1e-13


@every("regularization", "backend")
def test_the_hessian_of_cubed_ranks_is_that_of_the_block(regularization, backend):
    # One block: r = m + (x - mean) / tau, so the Hessian of sum r^3 is P diag(6 r) P / tau^2.
    tau, x = 0.5, torch.tensor([0.1, 0.2, 0.05, 0.15], dtype=torch.float64)
    options = {"regularization": regularization, "backend": backend}
    hessian = torch.autograd.functional.hessian(
        lambda x: soft_rank(x, tau, **options).pow(3).sum(), x
    )
    p = torch.softmax(x / tau, -1)
    if regularization == "l2":
        centre = torch.eye(4, dtype=torch.float64) - 0.25
        r = 2.5 + (x - x.mean()) / tau
        expected = centre @ (6 * r).diag() @ centre / tau**2
    else:
        # Of 1000 p_i^3 = exp(3 log p_i): p^3 ((3 (e_i - p)) (3 (e_i - p))' - 3 (diag p - pp')).
        step = 3 * (torch.eye(4, dtype=torch.float64) - p) / tau
        curve = 3 * (p.diag() - torch.outer(p, p)) / tau**2
        expected = sum(1000 * p[i] ** 3 * (torch.outer(step[i], step[i]) - curve) for i in range(4))
    assert (hessian - expected).abs().max() < 1e-10 * expected.abs().max()


# PyTorch scripts its own decompositions when forward-mode AD is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@every("function", "regularization", "backend")
def test_transforms_of_pytorch_see_into_it(function, regularization, backend):
    x, weight = normals(3, 7), normals(7, seed=1)

    def f(row):
        return function(row, 0.7, regularization=regularization, backend=backend)

    def loss(row):
        return (f(row) ** 2 * weight).sum()

    jacobians = torch.stack([torch.autograd.functional.jacobian(f, row) for row in x])
    hessians = torch.stack([torch.autograd.functional.hessian(loss, row) for row in x])
    assert (torch.vmap(f)(x) - f(x)).abs().max() < 1e-13
    expected = torch.stack(
        [2 * f(row) * weight @ jac for row, jac in zip(x, jacobians, strict=True)]
    )
    assert (torch.vmap(torch.func.grad(loss))(x) - expected).abs().max() < 1e-11
    assert (torch.vmap(torch.func.jacrev(f))(x) - jacobians).abs().max() < 1e-12
    assert (torch.vmap(torch.func.hessian(loss))(x) - hessians).abs().max() < 1e-10
    along = torch.func.jvp(f, (x[0],), (weight,))[1]
    assert (along - jacobians[0] @ weight).abs().max() < 1e-12
    batched = torch.autograd.functional.jacobian(f, x[0], vectorize=True)
    assert (batched - jacobians[0]).abs().max() < 1e-12
    temperatures = torch.tensor([0.3, 0.7, 2.0], dtype=torch.float64)
    swept = torch.vmap(lambda t: function(x[0], t, regularization=regularization))(temperatures)
    for t, y in zip(temperatures, swept, strict=True):
        assert (y - function(x[0], float(t), regularization=regularization)).abs().max() < 1e-13


def test_it_compiles_into_one_graph(child_output):
    code = """
import torch
from cln_tutorial.smoothing.isotonic import isotonic_regression
from cln_tutorial.smoothing.sorting import soft_argsort, soft_median, soft_rank, soft_sort
x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
mask = x > -1
for f in [
    lambda x: soft_sort(x, 0.5, regularization="kl", descending=True),
    lambda x: soft_rank(x, 0.5, mask=mask),
    lambda x: (isotonic_regression(x) + soft_median(x)[:, None]) @ soft_argsort(x),
]:
    torch._dynamo.reset()
    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for eager, compiled in zip(*results):
        assert (eager - compiled).abs().max() < 1e-5, (eager, compiled)
"""
    child_output(code)


@every("function")
def test_autocast_changes_nothing(function):
    x = normals(4, 50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in BACKENDS:
            y = function(x, 0.5, backend=backend)
            assert y.dtype == torch.float32
            assert (y - function(x, 0.5)).abs().max() < 1e-5


# --- time -----------------------------------------------------------------------------------------


def chain(n, step):
    """Half of the entries tie; each later one joins their block only after the one before it."""
    ties = torch.zeros(n // 2, dtype=torch.float64)
    return torch.cat([ties, -step * torch.arange(1, n - n // 2 + 1, dtype=torch.float64)])


@every("regularization")
def test_the_reference_looks_at_each_block_of_a_long_chain_twice_at_most(
    regularization, monkeypatch
):
    n, calls, rounds = 20_000, [], []
    violates = isotonic._violates

    def counted(a, b, strength, problem, functions):
        (calls if functions is math else rounds).append(1)
        assert len(rounds) < 100
        return violates(a, b, strength, problem, functions)

    monkeypatch.setattr(isotonic, "_violates", counted)
    y = soft_rank(chain(n, 1.001), 1.0, regularization=regularization, backend="reference")
    assert y.sum() == pytest.approx(n * (n + 1) / 2)
    if regularization == "l2":
        assert calls  # one more block in each round: the stack had to take over
    assert len(calls) <= 2 * n


@pytest.mark.skipif(not HAS_NUMBA, reason="numba's loops")
@every("regularization", "function")
def test_a_chain_of_a_million_takes_linear_time(function, regularization):
    x = chain(10**6, 1.001)
    function(x[:100], 1.0, regularization=regularization)  # compiles
    start = time.thread_time()
    function(x, 1.0, regularization=regularization, backend="numba")
    # 0.2 s for the entropic loss; a quadratic loop would take hours.
    assert time.thread_time() - start < 10


@pytest.mark.skipif(not HAS_NUMBA, reason="numba's loops")
@every("function")
def test_the_number_of_threads_changes_nothing(function):
    x, before = normals(64, 500, dtype=torch.float32).requires_grad_(), torch.get_num_threads()
    weight = normals(64, 500, seed=1, dtype=torch.float32)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert isotonic_loops._threads(64, 500) == threads
            y = function(x, 0.1, backend="numba")
            found.append((y.detach(), *torch.autograd.grad(y, x, weight)))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


# --- laws -----------------------------------------------------------------------------------------

rows = st.lists(st.integers(-40, 40), min_size=1, max_size=20).map(
    lambda values: torch.tensor(values, dtype=torch.float64) / 8
)
strengths = st.sampled_from([0.0, 0.03, 0.125, 0.3, 1.0, 4.0, 100.0])


@every("regularization")
@given(x=rows, tau=strengths, data=st.data())
@usual
def test_laws_of_ranks(regularization, x, tau, data):
    n = len(x)
    options = {"regularization": regularization}
    ranks = soft_rank(x, tau, **options)
    assert ranks.sum().item() == pytest.approx(n * (n + 1) / 2, rel=1e-12)
    assert ranks.min() >= 1 - 1e-9
    assert ranks.max() <= n + 1e-9
    order = torch.tensor(data.draw(st.permutations(range(n))))
    assert (soft_rank(x[order], tau, **options) - ranks[order]).abs().max() < 1e-10
    # Eighths: sums and doubles of them are exact.
    assert (soft_rank(x + 1000, tau, **options) - ranks).abs().max() < 1e-9
    assert (soft_rank(4 * x, 4 * tau, **options) - ranks).abs().max() < 1e-9
    opposite = soft_rank(-x, tau, **options)
    assert soft_rank(x, tau, descending=True, **options).equal(opposite)
    if regularization == "l2":
        assert (opposite - (n + 1 - ranks)).abs().max() < 1e-9
    by_value = ranks[x.argsort()]
    assert (by_value.diff() >= -1e-9).all()
    for value in x.unique():
        ties = ranks[x == value]
        assert ties.max() - ties.min() < 1e-12


@every("regularization")
@given(x=rows, tau=strengths, data=st.data())
@usual
def test_laws_of_sorts(regularization, x, tau, data):
    options = {"regularization": regularization}
    y = soft_sort(x, tau, **options)
    slack = 1e-10 * len(x)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    assert (soft_sort(x[order], tau, **options) - y).abs().max() < slack
    assert (soft_sort(x + 64, tau, **options) - 64 - y).abs().max() < slack
    assert (y.diff() >= -slack).all()
    assert x.min() - slack <= y.min()
    assert y.max() <= x.max() + slack
    down = soft_sort(x, tau, descending=True, **options)
    assert down.equal(-soft_sort(-x, tau, **options))
    if regularization == "l2":
        assert (down.flip(0) - y).abs().max() < slack
        assert (soft_sort(4 * x, tau / 4) - 4 * y).abs().max() < 4 * slack
        # The sort majorises the soft sort: the sums of the largest are at least as large.
        most = x.sort(descending=True).values.cumsum(0)
        least = y.flip(0).cumsum(0)
        assert (least <= most + slack).all()
        assert abs((least - most)[-1]) < slack


@given(x=rows, step=rows, tau=st.sampled_from([0.1, 1.0, 10.0]))
@usual
def test_ranks_and_sorts_are_as_steep_as_the_docstring_says(x, step, tau):
    n = min(len(x), len(step))
    x, z = x[:n], x[:n] + step[:n]
    distance = (x - z).norm() * (1 + 1e-12) + 1e-12
    assert (soft_rank(x, tau) - soft_rank(z, tau)).norm() <= distance / tau
    assert (soft_sort(x, tau) - soft_sort(z, tau)).norm() <= distance


# --- rows, masks, what is not a number ------------------------------------------------------------


@every("function", "regularization", "backend", "descending")
def test_what_is_minus_infinity_is_a_block_at_the_low_end(
    function, regularization, backend, descending
):
    options = {"regularization": regularization, "descending": descending, "backend": backend}
    x = torch.tensor([[0.3, -inf, 1.9, 0.4, -inf, 0.2]], dtype=torch.float64, requires_grad=True)
    y = function(x, 0.5, **options)
    alone = x.detach()[:, [0, 2, 3, 5]]
    if function is soft_sort:
        finite, low = (slice(0, 4), slice(4, 6)) if descending else (slice(2, 6), slice(0, 2))
        assert (y[:, low] == -inf).all()
        assert (y[:, finite] - soft_sort(alone, 0.5, **options)).abs().max() < 1e-13
        y = y[:, finite]
    else:
        assert y[0, [1, 4]].tolist() == ([5.5, 5.5] if descending else [1.5, 1.5])
        # The limit of entries that fall: below by so much that no block contains both.
        limit = soft_rank(x.detach().clamp(min=-1e4), 0.5, **options)
        assert (y[0, [0, 2, 3, 5]] - limit[0, [0, 2, 3, 5]]).abs().max() < 1e-11
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient[0, [1, 4]].tolist() == [0, 0]
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    nothing = torch.full((2, 5), -inf, dtype=torch.float64, requires_grad=True)
    y = function(nothing, 0.5, **options)
    assert (y == (-inf if function is soft_sort else 3)).all()
    weight = torch.zeros_like(y) if function is soft_sort else torch.ones_like(y)
    assert torch.autograd.grad(y, nothing, weight)[0].abs().max() == 0


@every("function", "regularization", "backend")
@pytest.mark.parametrize("bad", [nan, inf, -nan])
@pytest.mark.parametrize("n", [9, 500])
def test_what_is_no_number_poisons_its_own_row_only(function, regularization, backend, bad, n):
    x = normals(4, n, dtype=torch.float32)
    x[3, 2] = -inf
    options = {"regularization": regularization, "backend": backend}
    expected = function(x, 0.5, **options)
    x[1, 5], x[1, 2] = bad, -inf
    leaf = x.requires_grad_()
    y = function(leaf, 0.5, **options)
    assert y[1].isnan().all()
    others = [0, 2, 3]
    assert y[others].equal(expected[others])
    (gradient,) = torch.autograd.grad(y[others].masked_fill(y[others].isinf(), 0).sum(), leaf)
    assert gradient[others].isfinite().all()
    assert isotonic_regression(x, backend=backend)[[1, 3]].isnan().all()
    assert isotonic_regression(x, backend=backend)[[0, 2]].isfinite().all()


@every("regularization", "backend", "descending")
def test_padding_has_no_rank_and_changes_none(regularization, backend, descending):
    options = {"regularization": regularization, "descending": descending, "backend": backend}
    x = normals(5, 8)
    x[2, 1] = -inf
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[2, 1], mask[3], mask[4] = True, False, True
    x[0, ~mask[0]] = nan
    leaf = x.clone().requires_grad_()
    y = soft_rank(leaf, 0.5, mask=mask, **options)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    assert gradient.isfinite().all()
    assert (y[~mask] == 0).all()
    assert (gradient[~mask] == 0).all()
    for row in range(5):
        if mask[row].any():
            alone = x[row, mask[row]].requires_grad_()
            expected = soft_rank(alone, 0.5, **options)
            assert (y[row, mask[row]] - expected).abs().max() < 1e-13
            (slope,) = torch.autograd.grad(expected.square().sum(), alone)
            assert (gradient[row, mask[row]] - slope).abs().max() < 1e-12
    column = soft_rank(x.mT[:, 1:].nan_to_num(), 0.5, 0, mask=mask[1:, :1].mT | True, **options)
    assert (column.mT - soft_rank(x[1:].nan_to_num(), 0.5, **options)).abs().max() < 1e-13


@every("function", "backend")
@given(shape=st.lists(st.integers(0, 3), max_size=2), n=st.integers(0, 5), data=st.data())
@quick
def test_the_rows_may_lie_on_any_axis(function, backend, shape, n, data):
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    x = normals(*shape, n)
    moved = x.movedim(-1, dim).requires_grad_()
    y = function(moved, 0.5, dim, backend=backend)
    assert y.shape == moved.shape
    assert y.movedim(dim, -1).equal(function(x, 0.5, backend=backend))
    (gradient,) = torch.autograd.grad(y.sum(), moved)
    assert gradient.shape == moved.shape
    fit = isotonic_regression(moved, dim, backend=backend)
    assert fit.movedim(dim, -1).equal(isotonic_regression(x, backend=backend))


@every("function", "backend")
def test_strides_of_the_input_and_of_the_gradient_do_not_matter(function, backend):
    x = normals(6, 8, dtype=torch.float32)
    wide = normals(6, 16, dtype=torch.float32)
    wide[:, ::2] = x
    results = []
    for leaf in (x, wide[:, ::2]):
        leaf = leaf.detach().requires_grad_()
        y = function(leaf, 0.5, backend=backend)
        weight = normals(8, 6, seed=1, dtype=torch.float32).mT
        results.append((y, *torch.autograd.grad(y, leaf, weight)))
        results.append((y, *torch.autograd.grad(function(leaf, 0.5, backend=backend).sum(), leaf)))
    for a, b in zip(results[0], results[2], strict=True):
        assert a.equal(b)
    for a, b in zip(results[1], results[3], strict=True):
        assert a.equal(b)


# --- positions, quantiles, modules ----------------------------------------------------------------


@pytest.mark.parametrize("descending", [False, True])
def test_a_relaxed_permutation_sorts_at_a_low_temperature(descending):
    x = torch.tensor([0.3, 2.0, -1.0, 0.7], dtype=torch.float64)
    hard = torch.nn.functional.one_hot(x.argsort(descending=descending), 4).double()
    assert soft_argsort(x, 0, descending=descending).equal(hard)
    for tau in (0.01, 0.1, 1.0):
        soft = soft_argsort(x, tau, descending=descending)
        assert soft.argmax(-1).equal(hard.argmax(-1))
        assert (soft.sum(-1) - 1).abs().max() < 1e-15
        # The smallest gap is 0.4.
        assert ((1 - soft)[hard == 1] <= 3 * math.exp(-0.4 / tau) + 1e-15).all()
    # By hand: two entries a unit apart.
    p = 1 / (1 + math.exp(-1))
    two = soft_argsort(torch.tensor([1.0, 0.0]), descending=descending)
    expected = [[p, 1 - p], [1 - p, p]] if descending else [[1 - p, p], [p, 1 - p]]
    assert (two - torch.tensor(expected)).abs().max() < 1e-7


def test_a_relaxed_permutation_of_ties_masks_and_bad_rows():
    x = torch.tensor([[1.0, -inf, 1.0, -inf], [0.0, 1.0, nan, 2.0], [-inf] * 4], requires_grad=True)
    for tau in (0, 1e-30, 0.5, 1e30):
        p = soft_argsort(x, tau)
        assert p[0].tolist() == [[0, 0.5, 0, 0.5]] * 2 + [[0.5, 0, 0.5, 0]] * 2
        assert p[1].isnan().all()
        assert (p[2] == 0.25).all()
        (gradient,) = torch.autograd.grad(p[[0, 2]].square().sum(), x)
        assert gradient[[0, 2]].isfinite().all()
        assert (gradient[[0, 2]].masked_select(x[[0, 2]] == -inf) == 0).all()


def test_a_relaxed_permutation_on_any_axis_with_derivatives():
    x = normals(2, 4, 3)
    temperature = torch.tensor([0.3, 0.5, 2.0], dtype=torch.float64)
    p = soft_argsort(x, temperature, 1)
    assert p.shape == (2, 3, 4, 4)
    for k in range(3):
        expected = soft_argsort(x[:, :, k], float(temperature[k]))
        assert (p[:, k] - expected).abs().max() < 1e-15
    inputs = x.requires_grad_(), temperature.requires_grad_()
    assert gradcheck(lambda x, t: soft_argsort(x, t, 1), inputs)
    assert gradgradcheck(lambda x: soft_argsort(x[0, :, 0], 0.5), x)
    assert soft_argsort(torch.empty(3, 0)).shape == (3, 0, 0)
    assert soft_argsort(torch.empty(0, 3)).shape == (0, 3, 3)
    assert soft_argsort(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_hard_quantiles_are_those_of_numpy():
    x = normals(3, 9)
    q = torch.tensor([0.0, 0.1, 0.5, 0.77, 1.0], dtype=torch.float64)
    expected = torch.from_numpy(np.quantile(x.numpy(), q.numpy(), axis=-1))
    assert (soft_quantile(x, q, 0) - expected).abs().max() < 1e-14
    assert (soft_quantile(x, q.tolist(), 0) - expected).abs().max() < 1e-14
    assert (soft_quantile(x.mT, 0.77, 0, 0) - expected[3]).abs().max() < 1e-14
    assert soft_quantile(x, 1, 0).equal(x.amax(-1))
    assert soft_median(x[0], 0).equal(x[0].median())
    for part in (x, x[:, :8]):
        median = torch.from_numpy(np.median(part.numpy(), axis=-1))
        assert (soft_median(part, 0) - median).abs().max() < 1e-15
    for k in (1, 4, 9):
        assert soft_kth(x, k, 0).equal(x.kthvalue(k).values)
        assert soft_kth(x.mT, k, 0, 0).equal(x.kthvalue(k).values)


def test_soft_quantiles_are_entries_of_the_soft_sort():
    x = normals(3, 9)
    for options in ({"regularization": "l2"}, {"regularization": "kl"}):
        y = soft_sort(x, 2.0, **options)
        assert soft_quantile(x, [0.25, 0.75], 2.0, **options).equal(y[:, [2, 6]].mT)
        assert soft_kth(x, 3, 2.0, **options).equal(y[:, 2])
        assert soft_median(x, 2.0, **options).equal(y[:, 4])
        assert not soft_median(x, 2.0, **options).equal(x.median(-1).values)
    q = torch.tensor([0.3, 0.61], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, q: soft_quantile(x, q, 2.0), (x.requires_grad_(), q))
    low = torch.tensor([-inf, 2.0, -inf, 1.0, 3.0], requires_grad=True)
    found = soft_quantile(low, [0.0, 0.2, 0.4, 0.5, 0.75], 0.5)
    assert found.tolist() == [-inf, -inf, -inf, 1, 2]
    (gradient,) = torch.autograd.grad(found[3:].sum(), low)
    assert gradient.tolist() == [0, 1, 0, 1, 0]


def test_modules_are_the_functions():
    x = normals(3, 5)
    for module, function in ((SoftSort, soft_sort), (SoftRank, soft_rank)):
        options = {"descending": True, "regularization": "kl"}
        found = module(0.7, 0, **options)(x)
        assert found.equal(function(x, 0.7, 0, **options))
        assert module()(x).equal(function(x))
        assert "temperature=0.7, dim=0, descending=True, regularization='kl'" in repr(
            module(0.7, 0, **options)
        )
    mask = x > -1
    assert SoftRank(0.5)(x, mask).equal(soft_rank(x, 0.5, mask=mask))


@every("function")
def test_the_name_of_torchsort_for_the_temperature_works(function):
    x = normals(3, 5)
    assert function(x, regularization_strength=0.2).equal(function(x, 0.2))
    assert not function(x, regularization_strength=0.2).equal(function(x, 2.0))


@every("function")
def test_bad_arguments_are_refused_by_name(function, unchecked):
    x = torch.zeros(3, 4)
    with pytest.raises(
        TypeError, match=r"`x` must be a tensor of floating numbers; got torch.int64"
    ):
        function(x.long())
    for dim in (2, -3):
        with pytest.raises(ValueError, match=r"`dim` must be an axis of `x`"):
            function(x, dim=dim)
    for bad in (-1.0, nan, inf, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=r"`temperature` must be finite and at least 0"):
            function(x, bad)
    with pytest.raises(ValueError, match=r"`temperature` must broadcast to \(3, 1\); got \(4,\)"):
        function(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"`regularization` must be one of .*; got 'l1'"):
        function(x, regularization="l1")
    with pytest.raises(ValueError, match=r"`backend` must be 'auto', 'reference' or 'numba'"):
        function(x, backend="triton")
    with pytest.raises(ValueError, match=r"`regularization` must be one of"):
        SoftSort(regularization="l1")


def test_other_bad_arguments_are_refused_by_name(unchecked):
    x = torch.zeros(3, 4)
    with pytest.raises(TypeError, match=r"`mask` must be boolean; got torch.float32"):
        soft_rank(x, mask=x)
    with pytest.raises(ValueError, match=r"`mask` must broadcast to `x` \(3, 4\); got \(3,\)"):
        soft_rank(x, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`method` must be one of .*; got 'bitonic'"):
        soft_argsort(x, method="bitonic")
    for k in (0, 5):
        with pytest.raises(ValueError, match=r"`k` must be from 1 to 4, the size of `dim`"):
            soft_kth(x, k)
    for q in (-0.1, 1.1, torch.tensor([0.2, nan])):
        with pytest.raises(ValueError, match=r"`q` must lie in \[0, 1\]"):
            soft_quantile(x, q)
    with pytest.raises(ValueError, match=r"`q` must be a number or a vector"):
        soft_quantile(x, torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"`q` must be floating; got torch.int64"):
        soft_quantile(x, torch.tensor(1))
    with pytest.raises(ValueError, match=r"`x` must have an entry along `dim`"):
        soft_median(torch.zeros(3, 0))
    with pytest.raises(TypeError, match=r"`y` must be a tensor of floating numbers"):
        isotonic_regression(x.long())
