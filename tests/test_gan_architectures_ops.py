"""The modulated norms as functions: every backend, every order of derivative, every transform."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import cln_tutorial.gan_architectures.fused as fused
import cln_tutorial.gan_architectures.native as native
import cln_tutorial.gan_architectures.numba_loops as numba_loops
from cln_tutorial.gan_architectures.functional import (
    available_norm_backends,
    minibatch_std,
    modulated_batch_norm,
    modulated_instance_norm,
    pixel_norm,
)

BACKENDS = ["reference", "native", "numba"]
FAST = BACKENDS[1:]
ACTIVATIONS = [None, "relu", "leaky_relu"]
AFTER = [(None, 1), ("relu", 2), ("leaky_relu", 1), (None, 2), ("leaky_relu", 2)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def tensors(*shape, dtype=torch.float32, grad=False):
    """Maps, and a condition of each sample."""
    made = [torch.randn(s, dtype=dtype) for s in (shape, shape[:2], shape[:2])]
    return [value.requires_grad_(grad) for value in made]


def formula(x, gamma, beta, dims=(0, 2, 3), eps=1e-5, activation=None, upsample=1, given=None):
    """The equation in float64 and plain steps; nothing of ours."""
    x, gamma, beta = x.double(), gamma.double(), beta.double()
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    if given is not None:
        mean, var = (stat.double().reshape(1, -1, 1, 1) for stat in given)
    y = (x - mean) / (var + eps).sqrt() * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]
    y = {None: y, "relu": y.clamp(min=0), "leaky_relu": y.where(y > 0, 0.2 * y)}[activation]
    return y.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)


def relative_error(value, exact):
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def require_far_from_the_kink(x, gamma, beta, **how):
    """Refuse a seed with a value of zero within rounding: there two right gradients may differ."""
    assert formula(x, gamma, beta, **how).abs().min() > 1e-6


# --- each backend against the formula -------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "upsample"), AFTER)
@pytest.mark.parametrize("norm", ["batch", "instance", "fixed"])
def test_output_and_gradients_agree_with_the_float64_formula(norm, activation, upsample, backend):
    ours = tensors(5, 3, 6, 7, grad=True)
    given = (torch.randn(3), torch.rand(3) + 0.5) if norm == "fixed" else None
    dims = (2, 3) if norm == "instance" else (0, 2, 3)
    require_far_from_the_kink(*[t.detach() for t in ours], dims=dims, given=given)
    after = {"activation": activation, "upsample": upsample}
    if norm == "instance":
        y = modulated_instance_norm(*ours, backend=backend, **after)
    else:
        statistics = given or (None, None)
        training = norm == "batch"
        y = modulated_batch_norm(*ours, *statistics, training=training, backend=backend, **after)
    exact = [value.detach().double().requires_grad_() for value in ours]
    expected = formula(*exact, dims=dims, given=given, **after)
    assert y.shape == (5, 3, 6 * upsample, 7 * upsample)
    assert relative_error(y, expected) <= 1e-6  # a few roundings of float32
    dy = torch.randn(y.shape)
    grads = torch.autograd.grad(y, ours, dy)
    for value, exactly in zip(
        grads, torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert relative_error(value, exactly) <= 4e-6  # sums of up to 840 terms


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float64_input_is_computed_in_float64(backend):
    ours = tensors(5, 3, 6, 7, dtype=torch.float64)
    y = modulated_batch_norm(*ours, training=True, backend=backend)
    assert relative_error(y, formula(*ours)) <= 1e-14


@pytest.mark.parametrize("backend", FAST)
def test_the_backend_that_is_asked_for_runs_forward_and_backward(backend, monkeypatch):
    module, ran = {"native": native, "numba": numba_loops}[backend], []
    for name in ("forward", "backward"):
        real = getattr(module, name)
        note = partial(lambda name, real, *inputs: ran.append(name) or real(*inputs), name, real)
        monkeypatch.setattr(module, name, note)
    x, gamma, beta = tensors(3, 2, 4, 4, grad=True)
    modulated_batch_norm(x, gamma, beta, training=True, backend=backend).sum().backward()
    modulated_instance_norm(x, gamma, beta, backend=backend).sum().backward()
    assert ran == ["forward", "backward"] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_vector_for_all_gets_the_sum_of_the_gradients_of_the_samples(backend):
    x, gamma, beta = tensors(4, 3, 5, 5, dtype=torch.float64, grad=True)
    one = [value[0].detach().clone().requires_grad_() for value in (gamma, beta)]
    each = [value.detach().expand(4, 3).clone().requires_grad_() for value in one]
    norm = partial(modulated_batch_norm, training=True, activation="relu", backend=backend)
    dy = torch.randn(x.shape, dtype=x.dtype)
    y = norm(x, *one)
    assert y.equal(norm(x, *each))
    found, apart = torch.autograd.grad(y, one, dy), torch.autograd.grad(norm(x, *each), each, dy)
    for value, parts in zip(found, apart, strict=True):
        assert value.allclose(parts.sum(0), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_variance_survives_a_mean_of_a_thousand(backend):
    """A difference of squares in float32 gave 0.94 for 1.03; here the sums are wide or centred."""
    x = 1000 + torch.randn(16, 4, 8, 8)
    # A last sample far from the others: moments of maps must combine with the spread between them.
    x[-1] += 3
    var = torch.ones(4)
    zero = torch.zeros(4)
    modulated_batch_norm(
        x, zero, zero, zero.clone(), var, training=True, momentum=1.0, backend=backend
    )
    assert (var.double() - x.double().var((0, 2, 3))).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_reduced_in_float32_and_come_back_as_they_were(dtype):
    x, gamma, beta = (value.to(dtype) for value in tensors(8, 3, 6, 6))
    running = torch.zeros(3), torch.ones(3)
    x = x + 40
    leaves = [value.requires_grad_() for value in (x, gamma, beta)]
    y = modulated_batch_norm(*leaves, *running, training=True, momentum=1.0, activation="relu")
    assert y.dtype == dtype
    exact = [value.detach().double().requires_grad_() for value in leaves]
    expected = formula(*exact, activation="relu")
    eps = torch.finfo(dtype).eps
    assert ((y - expected).abs() <= eps * expected.abs() + 1e-5).all()  # rounded once, at the end
    assert running[0].allclose(x.detach().double().mean((0, 2, 3)).float(), rtol=1e-6)
    y.sum().backward()
    expected.sum().backward()
    for value, exactly in zip(leaves, exact, strict=True):
        assert value.grad.dtype == dtype
        assert relative_error(value.grad, exactly.grad) <= 2e-2


def test_one_plus_a_small_gamma_is_not_lost_in_bfloat16():
    x, gamma = torch.randn(4, 3, 5, 5), torch.full((4, 3), 0.0015, dtype=torch.bfloat16)
    assert (1 + gamma).eq(1).all()
    beta = torch.zeros(3)
    moved = modulated_batch_norm(x, gamma, beta, training=True)
    plain = modulated_batch_norm(x, torch.zeros(3), beta, training=True)
    assert moved.allclose(plain * (1 + gamma.float()[0, 0]), rtol=1e-6)


# --- what it is equal to --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_those_of_batchnorm2d_over_several_steps(backend):
    theirs = nn.BatchNorm2d(6, affine=False)
    ours = [theirs.running_mean.clone(), theirs.running_var.clone()]
    zero = torch.zeros(6)
    for n in range(4):
        x = torch.randn(3 + n, 6, 4, 5) * (n + 1) + n
        y = modulated_batch_norm(x, zero, zero, *ours, training=True, backend=backend)
        # Two float32 implementations of one sum; a biased variance is off by 1 %.
        assert y.allclose(theirs(x), rtol=1e-5, atol=2e-6)
        assert ours[0].allclose(theirs.running_mean, rtol=1e-6, atol=1e-6)
        assert ours[1].allclose(theirs.running_var, rtol=2e-6)
    theirs.eval()
    before = [value.clone() for value in ours]
    y = modulated_batch_norm(x, zero, zero, *ours, training=False, backend=backend)
    assert y.allclose(theirs(x), rtol=1e-5, atol=2e-6)
    assert all(value.equal(old) for value, old in zip(ours, before, strict=True))


def test_running_statistics_of_another_dtype_move_too():
    x, zero = torch.randn(8, 3, 4, 4), torch.zeros(3)
    for backend in BACKENDS:
        half = torch.zeros(3).bfloat16(), torch.ones(3).bfloat16()
        modulated_batch_norm(x, zero, zero, *half, training=True, momentum=1.0, backend=backend)
        assert half[1].allclose(x.var((0, 2, 3)).bfloat16(), rtol=8e-3)  # one spacing


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_conditions_are_the_plain_norms(backend):
    x, zero = torch.randn(4, 3, 5, 6), torch.zeros(4, 3)
    y = modulated_batch_norm(x, zero, zero, training=True, backend=backend)
    plain = F.batch_norm(x, None, None, training=True)
    assert y.allclose(plain, atol=1e-6)
    y = modulated_instance_norm(x, zero, zero, backend=backend)
    assert y.allclose(F.instance_norm(x), atol=1e-6)


def test_zero_conditions_are_the_plain_batch_norm_bit_for_bit_in_the_reference():
    x, zero = torch.randn(4, 3, 5, 6), torch.zeros(4, 3)
    y = modulated_batch_norm(x, zero, zero, training=True, backend="reference")
    assert y.equal(F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_are_one_batch_norm_with_an_affine(backend):
    x, gamma, beta = torch.randn(4, 3, 5, 6), torch.randn(3), torch.randn(3)
    rows = [value.expand(4, 3) for value in (gamma, beta)]
    y = modulated_batch_norm(x, *rows, training=True, activation="relu", backend=backend)
    expected = F.relu(F.batch_norm(x, None, None, 1 + gamma, beta, training=True))
    assert y.allclose(expected, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gain_offset_of_zero_takes_gamma_as_the_gain(backend):
    x, gamma, beta = tensors(4, 3, 5, 6)
    y = modulated_batch_norm(
        x, gamma, beta, training=True, gain_offset=0.0, activation="relu", backend=backend
    )
    assert relative_error(y, formula(x, gamma - 1, beta, activation="relu")) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_samples_give_permuted_results(backend):
    x, gamma, beta = tensors(6, 3, 4, 4)
    order = torch.randperm(6)
    norm = partial(modulated_batch_norm, training=True, backend=backend)
    assert norm(x[order], gamma[order], beta[order]).allclose(
        norm(x, gamma, beta)[order], atol=2e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "norm", [partial(modulated_batch_norm, training=True), modulated_instance_norm]
)
def test_shift_and_scale_of_a_channel_leave_the_result(norm, backend):
    x, gamma, beta = tensors(4, 3, 5, 5, dtype=torch.float64)
    scale, shift = torch.rand(3, 1, 1).double() + 0.5, torch.randn(3, 1, 1).double()
    run = partial(norm, eps=0.0, backend=backend)
    assert run(x * scale + shift, gamma, beta).allclose(run(x, gamma, beta), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_epsilon_is_under_the_root(backend):
    """Erratum 16: with sigma + eps the result would be 3.28 times as large at sigma 1e-3."""
    x = 1e-3 * torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    zero = torch.zeros(1)
    y = modulated_batch_norm(x, zero, zero, training=True, eps=1e-5, backend=backend)
    as_printed = 1e-3 / (1e-3 + 1e-5)
    assert y[1].item() == pytest.approx(1e-3 / (1e-6 + 1e-5) ** 0.5, rel=1e-12)
    assert as_printed / y[1].item() == pytest.approx(3.28, abs=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_channel(backend):
    x, zero = torch.randn(4, 3, 4, 4), torch.zeros(3)
    clean = modulated_batch_norm(x, zero, zero, training=True, activation="relu", backend=backend)
    x[1, 1, 0, 0], x[0, 2, 0, 0] = torch.nan, torch.inf
    running = torch.zeros(3), torch.ones(3)
    y = modulated_batch_norm(
        x, zero, zero, *running, training=True, activation="relu", backend=backend
    )
    assert y[:, 0].equal(clean[:, 0])
    assert y[:, 1].isnan().all()
    theirs = nn.BatchNorm2d(3)
    theirs(x)
    for value, expected in zip(running, (theirs.running_mean, theirs.running_var), strict=True):
        assert value[0].allclose(expected[0], rtol=1e-5, atol=1e-6)
        assert value.isfinite().equal(expected.isfinite())  # lost, and not silently, as there


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_relu_of_minus_infinity_is_zero(backend):
    x, zero = torch.full((1, 1, 1, 2), -torch.inf), torch.zeros(1)
    y = modulated_batch_norm(
        x, zero, zero, zero, zero + 1, training=False, activation="relu", backend=backend
    )
    assert y.equal(torch.zeros(1, 1, 1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gradient_does_not_pass_a_closed_relu(backend):
    """As of a root: at 0 its slope is infinite."""
    leaves = tensors(4, 3, 5, 5, dtype=torch.float64, grad=True)
    run = partial(modulated_batch_norm, training=True, activation="relu")
    grads, expected = (
        torch.autograd.grad(run(*leaves, backend=name).sqrt().sum(), leaves)
        for name in (backend, "reference")
    )
    for value, exactly in zip(grads, expected, strict=True):
        assert exactly.isfinite().all()
        assert value.allclose(exactly, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_fixed_statistics_the_gradient_of_an_infinite_value_is_finite(backend):
    x, zero = torch.full((2, 1, 1, 2), torch.inf, requires_grad=True), torch.zeros(1)
    y = modulated_batch_norm(
        x, zero, zero, zero, zero + 1, training=False, eps=0.0, backend=backend
    )
    y.sum().backward()
    assert x.grad.equal(torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "norm", [partial(modulated_batch_norm, training=True), modulated_instance_norm]
)
def test_the_result_may_be_overwritten(norm, backend):
    """As by ``nn.ReLU(inplace=True)``; a view out of an autograd function would refuse."""
    leaves = tensors(4, 3, 5, 5, dtype=torch.float64, grad=True)
    expected = torch.autograd.grad(norm(*leaves, activation="relu").square().sum(), leaves)
    found = torch.autograd.grad(norm(*leaves, backend=backend).relu_().square().sum(), leaves)
    for value, exactly in zip(found, expected, strict=True):
        assert value.allclose(exactly, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("upsample", [1, 2])
def test_many_channels_of_small_maps_do_not_mix(upsample):
    """The loops read a group of such channels together; here are several, the last not full."""
    leaves = tensors(3, 5 * numba_loops.TOGETHER // 128, 8, 8, dtype=torch.float64, grad=True)
    run = partial(modulated_batch_norm, training=True, upsample=upsample)
    y, expected = (run(*leaves, backend=name) for name in ("numba", "reference"))
    assert y.allclose(expected, rtol=1e-12, atol=1e-13)
    dy = torch.randn(y.shape, dtype=y.dtype)
    grads, exact = (torch.autograd.grad(value, leaves, dy) for value in (y, expected))
    assert all(a.allclose(b, rtol=1e-10, atol=1e-12) for a, b in zip(grads, exact, strict=True))


def test_a_million_float32_gradients_are_added_without_drift():
    """Of a mean over large images: added one by one they would all be rounded the same way."""
    leaves = tensors(1, 1, 1024, 1024, grad=True)
    y = modulated_batch_norm(*leaves, training=True, backend="numba")
    tenth = torch.tensor(0.1)
    found = torch.autograd.grad(y, leaves[2], tenth.expand(y.shape))[0]
    # 6e-7 with 32 partial sums of 4096 numbers, 1.5e-4 with those of all; narrow machines have 4.
    assert found.item() == pytest.approx(2**20 * tenth.item(), rel=5e-6)


# --- derivatives of any order ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "upsample"), AFTER[:3])
@pytest.mark.parametrize("norm", ["batch", "instance", "fixed"])
def test_first_and_second_derivatives_pass_the_numerical_check(norm, activation, upsample, backend):
    x, gamma, beta = tensors(2, 2, 1, 3, dtype=torch.float64, grad=True)
    given = (torch.randn(2).double(), torch.rand(2).double() + 0.5) if norm == "fixed" else ()
    # An epsilon of 0.1 tames the derivatives of so few values.
    after = {"activation": activation, "upsample": upsample, "eps": 0.1, "backend": backend}

    def function(x, gamma, beta):
        if norm == "instance":
            return modulated_instance_norm(x, gamma, beta, **after)
        return modulated_batch_norm(x, gamma, beta, *given, training=norm == "batch", **after)

    dims = (2, 3) if norm == "instance" else (0, 2, 3)
    exact = formula(x, gamma, beta, dims=dims, eps=0.1, given=given or None)
    assert exact.abs().min() > 1e-4  # the finite differences do not cross the kink
    assert gradcheck(function, (x, gamma, beta))
    if backend == "reference":  # it is the second derivative of all: see the next test
        assert gradgradcheck(function, (x, gamma, beta))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_gradient_penalty_is_that_of_the_reference(training, backend):
    """Here dy, gamma and x all have a history, and that of dy contains x."""
    leaves = tensors(3, 4, 5, 5, dtype=torch.float64, grad=True)
    given = () if training else (torch.randn(4).double(), torch.rand(4).double() + 0.5)
    after = {"training": training, "activation": "leaky_relu", "upsample": 2}

    def penalty(backend):
        x, gamma, beta = (t.sin() for t in leaves)
        y = modulated_batch_norm(x, gamma, beta, *given, **after, backend=backend)
        grads = torch.autograd.grad((y**3).sum() + x.sum(), (x, gamma), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for value, expected in zip(penalty(backend), penalty("reference"), strict=True):
        assert relative_error(value, expected) <= 1e-10


@pytest.mark.parametrize("backend", FAST)
def test_a_second_training_pass_does_not_disturb_the_backward_pass_of_the_first(backend):
    x, gamma, beta = tensors(3, 2, 4, 4, grad=True)
    running = torch.zeros(2), torch.ones(2)
    run = partial(modulated_batch_norm, activation="relu", backend=backend)
    y = run(x, gamma, beta, *running, training=False)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    run(x, gamma, beta, *running, training=True, momentum=1.0)
    assert torch.autograd.grad(y.sum(), x)[0].equal(expected)


# --- transforms and layouts -----------------------------------------------------------------------


# PyTorch warns of itself: some of its formulas for tangents are scripted.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", [*FAST, "auto"])
def test_transforms_see_into_every_backend(backend):
    x, gamma, beta = tensors(3, 2, 3, 3, dtype=torch.float64)
    running = torch.zeros(2).double(), torch.ones(2).double()
    run = partial(modulated_batch_norm, training=False, activation="relu", backend=backend)
    models = torch.randn(4, 3, 2, dtype=torch.float64)  # a stack of models with one input
    stacked = torch.vmap(lambda g: run(x, g, beta, *running))(models)
    each = torch.stack([run(x, g, beta, *running) for g in models])
    assert stacked.allclose(each, rtol=1e-12, atol=1e-14)

    per_sample = torch.vmap(torch.func.grad(lambda x, g: run(x[None], g, g, *running).sum()))
    leaf = x.clone().requires_grad_()
    run(leaf, gamma, gamma, *running).sum().backward()
    assert per_sample(x, gamma).allclose(leaf.grad, rtol=1e-12)

    norm = partial(modulated_batch_norm, gamma=gamma, beta=beta, training=True, backend=backend)
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(norm, (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(norm, x, vectorize=True)
    assert found.allclose(torch.tensordot(jacobian, tangent, 4), rtol=1e-9, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent.allclose(found)


COMPILED = """
import sys, torch
import cln_tutorial.gan_architectures.native as native
from cln_tutorial.gan_architectures.functional import *
from cln_tutorial.gan_architectures.functional import modulated_batch_norm as batch_norm

small, zero = torch.randn(2, 3, 4, 4), torch.zeros(3)
modulated_instance_norm(batch_norm(small, zero, zero, training=True), zero, zero)
assert "numba" not in sys.modules  # before it is used

ran = []
for name in ("forward", "backward"):
    def note(*inputs, name=name, real=getattr(native, name)):
        ran.append(name)
        return real(*inputs)
    setattr(native, name, note)

compiler = dict(fullgraph=True, backend="aot_eager")
for backend in ("auto", "native"):
    def function(x, gamma, beta, mean, var):
        y = batch_norm(x, gamma, beta, mean, var, training=True, activation="relu", upsample=2,
                       backend=backend)
        return modulated_instance_norm(y, gamma, beta, backend=backend)
    leaves = [torch.randn(s, requires_grad=True) for s in ((4, 3, 4, 4), (4, 3), (3,))]
    running, expected = [[torch.zeros(3), torch.ones(3)] for _ in range(2)]
    y = torch.compile(function, **compiler)(*leaves, *running)
    plain = function(*leaves, *expected)
    assert y.allclose(plain, atol=1e-5)
    assert all(a.allclose(b) for a, b in zip(running, expected))
    dy = torch.randn(y.shape)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(plain, leaves, dy)):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    torch._dynamo.reset()
assert ran == ["forward"] * 4 + ["backward"] * 4, ran  # two norms, compiled and eager

def others(x):
    return minibatch_std(pixel_norm(x))
x = torch.randn(4, 3, 4, 4)
assert torch.compile(others, **compiler)(x).allclose(others(x), atol=1e-6)

class Model(torch.nn.Module):
    def forward(self, x, gamma):
        return batch_norm(x, gamma, gamma, torch.zeros(3), torch.ones(3), training=False)
n = torch.export.Dim("n", min=2)
program = torch.export.export(Model(), (x, x[:, :, 0, 0]), dynamic_shapes=[{0: n}, {0: n}])
assert "cln_tutorial" not in str(program.graph)  # needs nothing but PyTorch, at any size
x = torch.randn(7, 3, 4, 4)
assert program.module()(x, x[:, :, 0, 0]).allclose(Model()(x, x[:, :, 0, 0]), atol=1e-6)
print("done")
"""


def test_compiled_and_exported_the_results_are_the_same_and_the_backend_runs(child_output):
    assert child_output(COMPILED) == "done\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_statistics_and_gradients_in_float32(backend):
    x, gamma, beta = tensors(4, 3, 6, 6, grad=True)
    run = partial(modulated_batch_norm, training=True, activation="relu", backend=backend)
    expected = run(x, gamma, beta)
    grads = torch.autograd.grad(expected.sum(), (x, gamma, beta))
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x, gamma, beta)
        inside = torch.autograd.grad(y.sum(), (x, gamma, beta))
    assert y.equal(expected)
    assert all(a.equal(b) for a, b in zip(inside, grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided", "expanded"])
def test_any_layout_of_the_maps_gives_the_same(layout, backend):
    x = {
        "channels last": torch.randn(4, 3, 6, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4, 5, 6).permute(1, 0, 3, 2),
        "strided": torch.randn(4, 6, 6, 10)[:, ::2, :, ::2],
        "expanded": torch.randn(4, 3, 6, 1).expand(4, 3, 6, 5),
    }[layout]
    wide = torch.randn(4, 6)
    gamma, beta = wide.chunk(2, 1)  # slices of one projection
    run = partial(modulated_batch_norm, training=True, upsample=2, backend=backend)
    leaf, plain = x.detach().requires_grad_(), x.detach().contiguous().clone().requires_grad_()
    y, expected = run(leaf, gamma, beta), run(plain, gamma.clone(), beta.clone())
    assert y.allclose(expected, atol=1e-6)
    # The gradient comes from above in the layout of the maps, as convolutions give it.
    dy = torch.randn(y.shape).to(memory_format=torch.channels_last)
    found = torch.autograd.grad(y, leaf, dy)[0]
    assert found.allclose(torch.autograd.grad(expected, plain, dy)[0], atol=2e-5)


def test_channels_last_stay_so_with_auto_at_any_size():
    x = torch.randn(16, 32, 16, 16).to(memory_format=torch.channels_last)
    assert x.numel() >= max(fused.FEWEST.values()) // 2
    zero = torch.zeros(32)
    y = modulated_batch_norm(x, zero, zero, training=True, activation="relu", upsample=2)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    # Six times the work that pays for a second thread; channels are taken together, 4 at a time.
    leaves = tensors(64, 49, 16, 16, grad=True)
    dy = torch.randn(leaves[0].shape)
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            running = torch.zeros(49), torch.ones(49)
            y = modulated_batch_norm(
                *leaves, *running, training=True, activation="relu", backend="numba"
            )
            found.append([y, *running, *torch.autograd.grad(y, leaves, dy)])
    finally:
        torch.set_num_threads(threads)
    for several in found[1:]:
        assert all(a.equal(b) for a, b in zip(several, found[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_were(backend):
    ours = tensors(4, 3, 4, 4)
    running = torch.zeros(3), torch.ones(3)
    before = [t.clone() for t in (*ours, *running)]
    for activation in ACTIVATIONS:
        run = partial(modulated_batch_norm, activation=activation, backend=backend)
        run(*ours, training=True)
        run(*ours, *running, training=False)
    assert all(a.equal(b) for a, b in zip((*ours, *running), before, strict=True))


# --- the choice -----------------------------------------------------------------------------------


def chosen(shape, backend="auto", dtype=torch.float32):
    return fused.choose(backend, torch.empty(shape, dtype=dtype), torch.empty(shape[:2]))


def test_auto_takes_the_loops_for_large_maps_and_the_reference_for_small_ones(monkeypatch):
    assert chosen((64, 64, 8, 8)) == "numba"
    assert chosen((64, 64, 8, 8), dtype=torch.float64) == "numba"
    assert chosen((8, 16, 4, 4)) == "reference"
    assert chosen((64, 64, 8, 8), dtype=torch.bfloat16) == "reference"
    assert chosen((0, 64, 8, 8)) == "reference"
    x = torch.empty(64, 64, 8, 8)
    assert fused.choose("auto", x.mT, x) == "reference"  # not contiguous
    assert fused.choose("auto", x.as_subclass(type("Sharded", (torch.Tensor,), {})), x) == (
        "reference"
    )
    monkeypatch.setattr(fused, "missing", {"numba": "is not there"}.get)
    assert chosen((64, 64, 8, 8)) == "native"
    assert chosen((16, 64, 8, 8)) == "reference"
    assert available_norm_backends() == ("reference", "native")


def test_a_transform_gets_the_reference_whatever_is_asked_for():
    names = []

    def note(x):
        names.extend(chosen((64, 64, 8, 8), backend) for backend in ("auto", "numba"))
        return x

    torch.vmap(note)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        note(torch.ones(2))
    assert names == ["reference"] * 4


# --- pixel norm and minibatch deviation -----------------------------------------------------------


def test_pixel_norm_gives_each_position_a_root_mean_square_of_one():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    y = pixel_norm(x)
    assert y.square().mean(1).allclose(torch.ones(2, 3, 4).double(), rtol=1e-6)
    assert y.allclose(F.rms_norm(x.movedim(1, -1), (5,), eps=1e-8).movedim(-1, 1), rtol=1e-12)
    assert pixel_norm(x.movedim(1, -1), dim=-1).equal(y.movedim(1, -1))
    small = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(pixel_norm, small)
    assert gradgradcheck(pixel_norm, small)


def test_pixel_norm_of_three_hundred_in_float16_is_one():
    """300² overflows float16, and the naive result is 0."""
    x = torch.full((1, 8, 2, 2), 300.0, dtype=torch.float16)
    assert pixel_norm(x).equal(torch.ones_like(x))


def test_minibatch_std_of_identical_samples_is_the_root_of_eps_with_a_finite_gradient():
    x = torch.randn(1, 6, 3, 3).repeat(4, 1, 1, 1).requires_grad_()
    y = minibatch_std(x, eps=1e-8)
    assert y[:, :6].equal(x)
    assert y[:, 6].allclose(torch.full((4, 3, 3), 1e-4), rtol=1e-6)
    y[:, 6].sum().backward()
    assert x.grad.equal(torch.zeros_like(x))


def test_minibatch_std_by_hand_over_groups_of_samples_and_channels():
    x = torch.randn(6, 4, 2, 3, dtype=torch.float64)
    y = minibatch_std(x, group_size=3, num_channels=2, eps=1e-8)
    assert y.shape == (6, 6, 2, 3)
    for n in range(6):
        group = x[n % 2 :: 2]  # samples 0, 2, 4 or 1, 3, 5
        std = (group.var(0, correction=0) + 1e-8).sqrt()
        for k in range(2):
            expected = std[2 * k : 2 * k + 2].mean()
            assert y[n, 4 + k].allclose(expected.expand(2, 3), rtol=1e-12)


@pytest.mark.parametrize(
    ("batch", "group_size", "group"), [(6, 4, 3), (7, 4, 1), (2, 4, 2), (8, 4, 4)]
)
def test_minibatch_std_takes_the_largest_divisor_of_the_batch(batch, group_size, group):
    x = torch.randn(batch, 2, 2, 2, dtype=torch.float64)
    assert minibatch_std(x, group_size).equal(minibatch_std(x, group))
    if group > 1:
        assert not minibatch_std(x, group_size).equal(minibatch_std(x, 1))
    else:
        assert minibatch_std(x, group_size)[:, 2].allclose(x.new_tensor(1e-4))


def test_minibatch_std_has_right_derivatives_and_keeps_the_dtype():
    x = torch.randn(4, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(partial(minibatch_std, group_size=2), x)
    assert gradgradcheck(partial(minibatch_std, group_size=2), x)
    half = (1000 + torch.randn(4, 2, 3, 3)).half()
    y = minibatch_std(half)
    assert y.dtype == torch.float16
    exact = half.double().var(0, correction=0).sqrt().mean()
    assert y[0, -1, 0, 0].item() == pytest.approx(exact.item(), rel=1e-3)
    assert minibatch_std(torch.empty(0, 2, 3, 3)).shape == (0, 3, 3, 3)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_an_empty_batch_is_empty_out_of_training_and_refused_in_training(backend):
    x, zero = torch.empty(0, 3, 2, 2), torch.zeros(3)
    run = partial(modulated_batch_norm, gamma=zero, beta=torch.empty(0, 3), backend=backend)
    y = run(x, running_mean=zero, running_var=zero + 1, training=False, upsample=2)
    assert y.shape == (0, 3, 4, 4)
    instance_norm = partial(modulated_instance_norm, gamma=zero, beta=zero)
    assert instance_norm(x, upsample=2, backend=backend).shape == (0, 3, 4, 4)
    assert instance_norm(x, backend=backend) is not x
    with pytest.raises(ValueError, match="`backend` must be"):
        instance_norm(x, backend="nonsense")
    running = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="0 values in each channel"):
        run(x, running_mean=running[0], running_var=running[1], training=True)
    assert running[0].equal(torch.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_is_refused_in_training_and_two_in_one_sample_are_not(backend):
    zero = torch.zeros(3)
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 1\) has 1 values in each channel"):
        modulated_batch_norm(torch.ones(1, 3, 1, 1), zero, zero, training=True, backend=backend)
    x = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    y = modulated_batch_norm(x, zero, zero, training=True, eps=0.0, backend=backend)
    assert y.allclose(x - 2, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_maps_of_one_element_are_normalised_over_the_batch(channels, backend):
    leaves = tensors(16, channels, 1, 1, dtype=torch.float64, grad=True)
    y, expected = (
        modulated_batch_norm(*leaves, training=True, backend=backend),
        formula(*leaves),
    )
    assert relative_error(y, expected) <= 1e-13
    grads, exact = (torch.autograd.grad((value**3).sum(), leaves) for value in (y, expected))
    for value, exactly in zip(grads, exact, strict=True):
        assert relative_error(value, exactly) <= 1e-11  # sums of 16 terms that partly cancel


def batch_norm(x=None, gamma=None, beta=None, **arguments):
    gamma, beta = (torch.zeros(3) if v is None else v for v in (gamma, beta))
    arguments = {"training": True} | arguments
    return modulated_batch_norm(
        torch.ones(2, 3, 4, 4) if x is None else x, gamma, beta, **arguments
    )


X = torch.ones(2, 3, 4, 4)
BAD = {
    "integer maps": (lambda: batch_norm(X.long()), TypeError, "`x` must be a tensor of floating"),
    "maps of three dimensions": (
        lambda: batch_norm(X[0]), ValueError, r"`x` must be \(batch, channels.*got \(3, 4, 4\)",
    ),
    "an integer gamma": (
        lambda: batch_norm(gamma=torch.zeros(3).long()), TypeError, "`gamma` must be.*torch.int64",
    ),
    "a gamma per channel and position": (
        lambda: batch_norm(gamma=torch.zeros(3, 4)),
        ValueError, r"`gamma` must hold one vector per sample, \(2, 3\), or one for all, \(3,\)",
    ),
    "a beta of one": (
        lambda: batch_norm(beta=torch.zeros(1)), ValueError, r"`beta` must hold.*got \(1,\)",
    ),
    "a gamma elsewhere": (
        lambda: batch_norm(gamma=torch.zeros(3, device="meta")),
        ValueError, "`gamma` is on meta, `x` on cpu",
    ),
    "half of the running statistics": (
        lambda: batch_norm(running_var=torch.ones(3)), ValueError, "belong together",
    ),
    "a running mean of another width": (
        lambda: batch_norm(running_mean=torch.ones(4), running_var=torch.ones(3)),
        ValueError, r"`running_mean` must be \(3,\).*got \(4,\)",
    ),
    "no statistics": (
        lambda: batch_norm(training=False), ValueError, "are needed with `training=False`",
    ),
    "a momentum above one": (lambda: batch_norm(momentum=1.5), ValueError, "`momentum`.*got 1.5"),
    "no momentum": (lambda: batch_norm(momentum=None), TypeError, "`momentum` must.*got None"),
    "a negative eps": (lambda: batch_norm(eps=-1e-5), ValueError, "`eps` must be.*got -1e-05"),
    "an unknown activation": (
        lambda: batch_norm(activation="gelu"), ValueError, "`activation` must be one of.*'gelu'",
    ),
    "a negative slope": (
        lambda: batch_norm(activation="leaky_relu", negative_slope=-0.1),
        ValueError, "`negative_slope` must be zero or positive",
    ),
    "upsampling by three": (lambda: batch_norm(upsample=3), ValueError, "must be 1 or 2; got 3"),
    "upsampling by a float": (
        lambda: batch_norm(upsample=2.0), ValueError, r"`upsample` must be 1 or 2; got 2\.0",
    ),
    "an unknown backend": (
        lambda: batch_norm(backend="cuda"), ValueError, "`backend` must be 'auto' or one of",
    ),
    "a backend of another dtype": (
        lambda: batch_norm(X.bfloat16(), backend="numba"), ValueError, "is torch.bfloat16",
    ),
    "a backend of another device": (
        lambda: batch_norm(*[t.to("meta") for t in (X, X[:, :, 0, 0], X[0, :, 0, 0])],
                           backend="native"),
        ValueError, "'native' runs on the CPU; `x` is on meta",
    ),
    "one element in each map": (
        lambda: modulated_instance_norm(X[:, :, :1, :1], torch.zeros(3), torch.zeros(3)),
        ValueError, "only one spatial element",
    ),
    "pixel norm of integers": (lambda: pixel_norm(X.long()), TypeError, "`x`.*torch.int64"),
    "pixel norm of no such dimension": (
        lambda: pixel_norm(X, dim=4), ValueError, "`dim` must be a dimension of `x`.*got 4",
    ),
    "a group of none": (
        lambda: minibatch_std(X, 0), ValueError, "`group_size` must be a whole.*got 0",
    ),
    "a group of a float": (
        lambda: minibatch_std(X, 2.0), ValueError, r"`group_size` must be a whole.*got 2\.0",
    ),
    "more maps than divide the channels": (
        lambda: minibatch_std(X, num_channels=2), ValueError, "must divide the 3 channels.*got 2",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_and_the_message_says_what_to_write(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
