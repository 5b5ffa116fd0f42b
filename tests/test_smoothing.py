"""What every function of the chapter promises: dtypes, axes, masks, poisoned rows, transforms."""

import math
from functools import partial

import pytest
import torch

from cln_tutorial import smoothing as s

inf, nan = math.inf, math.nan

ROWS = {
    "sparsemax": s.sparsemax,
    "entmax15": s.entmax15,
    "entmax 1.3": partial(s.entmax, alpha=1.3),
    "soft_onehot": s.soft_onehot,
    "soft_sort": s.soft_sort,
    "soft_sort, kl": partial(s.soft_sort, regularization="kl"),
    "soft_rank": s.soft_rank,
    "soft_rank, kl": partial(s.soft_rank, regularization="kl"),
    **{
        f"soft_topk, {method}": partial(s.soft_topk, k=2, method=method)
        for method in ("sigmoid", "esp", "exp", "laplace", "recursive")
    },
}
REDUCTIONS = {
    **{
        f"smooth_max, {kind}": partial(s.smooth_max, kind=kind)
        for kind in ("lse", "mellow", "boltzmann", "sparse", "entmax15")
    },
    "soft_argmax": s.soft_argmax,
}
ELEMENTS = {
    **{
        f"smooth_relu, {kind}": partial(s.smooth_relu, kind=kind)
        for kind in ("softplus", "swish", "gelu", "normal", "sqrt", "quadratic")
    },
    "smooth_abs": s.smooth_abs,
    "smooth_sign": s.smooth_sign,
    "smooth_step": s.smooth_step,
}
ALONG_A_DIM = ROWS | REDUCTIONS
ALL = ALONG_A_DIM | ELEMENTS
WITH_TEMPERATURE = {
    name: f for name, f in ALL.items() if not name.startswith(("sparsemax", "entmax"))
}


def over(functions):
    return pytest.mark.parametrize("function", functions.values(), ids=functions.keys())


def normals(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(6620)).to(dtype)


@over(ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_input_is_that_of_the_result_and_of_the_gradient(function, dtype):
    x = normals(3, 6, dtype=dtype).requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == dtype
    assert y.isfinite().all()
    assert gradient.isfinite().all()


@over(ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32_and_rounded_once(function, dtype):
    x = normals(4, 50, dtype=dtype)
    wanted = function(x.float())
    # One rounding, and another last bit of float32 may turn it the other way.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(function(x).float(), wanted, rtol=eps, atol=eps * 1e-2)


@over(ALL)
@pytest.mark.usefixtures("unchecked")
def test_integers_are_refused_by_name(function):
    with pytest.raises(TypeError, match=r"must be a tensor of floating numbers; got torch\.int64"):
        function(torch.arange(6).reshape(2, 3))


@over(WITH_TEMPERATURE)
@pytest.mark.parametrize("temperature", [-1.0, nan, inf])
def test_impossible_temperatures_are_refused(function, temperature):
    for given in (temperature, torch.tensor(temperature)):
        with pytest.raises(ValueError, match=r"`temperature` must be finite and at least 0; got"):
            function(normals(2, 5), temperature=given)


@over(ALONG_A_DIM)
def test_an_axis_that_is_not_there_is_refused(function):
    with pytest.raises(ValueError, match=r"`dim` must be an axis of `\w+` \(2, 5\); got 2"):
        function(normals(2, 5), dim=2)


@over(ALONG_A_DIM)
def test_any_axis_and_any_strides_give_the_same(function):
    x = normals(2, 3, 7)
    expected = function(x)
    for dim in (0, 1):
        moved = x.movedim(-1, dim)  # not contiguous
        found = function(moved, dim=dim)
        found = found.movedim(dim, -1) if found.ndim == 3 else found
        assert found.equal(expected)
    assert function(torch.stack([x, x], -1)[..., 0]).equal(expected)


@over(ALONG_A_DIM)
@pytest.mark.parametrize("bad", [nan, inf])
def test_a_bad_entry_poisons_its_own_row_and_no_other(function, bad):
    x = normals(3, 6)
    clean = function(x)
    x[1, 2] = bad
    found = function(x)
    assert found[0].equal(clean[0])
    assert found[2].equal(clean[2])
    if math.isnan(bad):
        assert found[1].isnan().all()


@over(ALONG_A_DIM)
def test_a_row_of_minus_infinity_raises_nothing_and_leaves_the_others_alone(function):
    x = normals(3, 6)
    clean = function(x)
    x[1] = -inf
    found = function(x.requires_grad_())
    assert found[0].equal(clean[0])
    assert found[2].equal(clean[2])
    (gradient,) = torch.autograd.grad(found[[0, 2]].sum(), x)
    assert gradient[[0, 2]].isfinite().all()


@over({name: f for name, f in ROWS.items() if "recursive" not in name})
def test_a_masked_entry_gets_no_gradient_and_gives_no_nan(function):
    x = normals(2, 6)
    x[0, 3] = -inf
    x.requires_grad_()
    y = function(x)
    weights = normals(2, 6)
    there = torch.where(y > -inf, y, 0.0)  # the masked end of soft_sort is -inf
    (first,) = torch.autograd.grad((there.square() * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert first[0, 3] == 0


@over(ALL)
def test_empty_batches_work(function):
    x = torch.zeros(0, 4).requires_grad_()
    y = function(x)
    assert y.shape[0] == 0
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@over(ALL)
def test_vmap_equals_a_loop_and_so_does_its_gradient(function):
    x = normals(3, 2, 5)
    loop = torch.stack([function(row) for row in x])
    torch.testing.assert_close(torch.vmap(function)(x), loop)

    def total(row):
        return function(row).square().sum()

    gradients = torch.vmap(torch.func.grad(total))(x)
    loop = torch.stack([torch.func.grad(total)(row) for row in x])
    torch.testing.assert_close(gradients, loop)


@over(ALL)
def test_the_whole_jacobian_is_that_of_the_rows(function):
    x = normals(5, dtype=torch.float64)
    found = torch.func.jacrev(function)(x)
    y = function(x.requires_grad_())
    for place in range(y.numel()):
        (row,) = torch.autograd.grad(y.reshape(-1)[place], x, retain_graph=True)
        torch.testing.assert_close(found.reshape(-1, 5)[place], row)


@over(ALL)
def test_autocast_changes_nothing(function):
    x = normals(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(x)
    assert found.dtype == torch.float32
    assert found.equal(function(x))


@over(ALL)
def test_the_second_derivative_is_that_of_finite_differences(function):
    # Points away from kinks: the gradients of both sides agree to the step.
    x = 0.7 * normals(1, 5, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(function, (x,), atol=1e-5)


COMPILED = """
import torch
from tests.test_smoothing import ALL, normals
torch.manual_seed(0)
for name, function in ALL.items():
    torch._dynamo.reset()
    x = normals(3, 6).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), function(x)
    torch.testing.assert_close(y, expected, msg=name)
    found, = torch.autograd.grad(y.square().sum(), x)
    wanted, = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(found, wanted, msg=name)
    print(name)
"""


def test_every_function_compiles_into_one_graph(child_output):
    assert child_output(COMPILED).split("\n")[:-1] == list(ALL)
