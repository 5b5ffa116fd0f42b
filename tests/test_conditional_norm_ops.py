"""The family of norms on every CPU backend, under every transform; kernels of a GPU elsewhere."""

import concurrent.futures
import gc
import multiprocessing
import os
import subprocess
import sys
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import cln_tutorial.conditional_norm.fused as fused
from cln_tutorial.conditional_norm import (
    available_backends,
    conditional_layer_norm,
    conditional_rms_norm,
    gated_residual,
    gated_residual_modulated_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)

BACKENDS = ["reference", "native", "numba"]
# (is it an RMS norm, backend): PyTorch has no RMS norm with a native backward on the CPU.
CASES = [(False, backend) for backend in BACKENDS] + [(True, "reference"), (True, "numba")]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def norm_of(rms):
    return conditional_rms_norm if rms else conditional_layer_norm


def formula(x, gamma, beta, eps=1e-5, rms=False):
    """The equation in float64 and plain steps, a vector for each example; nothing of ours."""
    x, gamma, beta = x.double(), gamma.double(), beta.double()
    centred = x if rms else x - x.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return torch.stack([n * g + b for n, g, b in zip(normalised, gamma, beta, strict=True)])


def relative_error(value, reference):
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


def inputs(shape, dtype=torch.float32, grad=True):
    batch, dim = shape[0], shape[-1]
    made = [torch.randn(s, dtype=dtype) for s in (shape, (batch, dim), (batch, dim))]
    return [value.requires_grad_(grad) for value in made]


def plain(x, gamma, beta):
    """The reference, from operations that every transform of PyTorch supports."""
    return F.layer_norm(x, x.shape[-1:]) * gamma[:, None] + beta[:, None]


def agree(found, expected):
    for value, exactly in zip(found, expected, strict=True):
        assert torch.allclose(value, exactly, rtol=1e-10, atol=1e-12)


# --- each backend against the formula -------------------------------------------------------------

SHAPES = [(4, 4, 33), (1, 6, 100), (6, 1, 33), (5, 33), (2, 3, 4, 5), (3, 2, 768), (2, 2, 4096)]
# More rows than one chunk of the Numba loops, and a last chunk that is short.
SHAPES.append((2, 600, 7))


@pytest.mark.parametrize(("rms", "backend"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_agree_with_the_float64_formula(shape, rms, backend):
    ours = inputs(shape)
    exact = [value.detach().double().requires_grad_() for value in ours]
    dy = torch.randn(shape)
    y = norm_of(rms)(*ours, eps=1e-5, backend=backend)
    reference = formula(*exact, rms=rms)
    # Float32: two roundings of the result, mean and deviation of the same precision.
    assert relative_error(y, reference) <= 2e-6
    y.backward(dy)
    reference.backward(dy.double())
    for value, exactly in zip(ours, exact, strict=True):
        assert relative_error(value.grad, exactly.grad) <= 1e-5  # sums of up to 4,096 terms


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    case=st.sampled_from(CASES),
    positions=st.lists(st.integers(1, 3), max_size=2),
    batch=st.integers(1, 4),
    dim=st.integers(5, 40),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    form=st.sampled_from(["per example", "one for all", "a vector", "per token", "slice of six"]),
    seed=st.integers(0, 2**16),
)
def test_any_layout_of_x_and_any_form_of_the_condition(
    case, positions, batch, dim, layout, form, seed
):
    (rms, backend), shape = case, (batch, *positions, dim)
    rng = torch.Generator().manual_seed(seed)

    def arranged():
        if layout == "transposed":
            return torch.randn(shape[::-1], generator=rng).permute(*reversed(range(len(shape))))
        if layout == "sliced":
            return torch.randn(*shape[:-1], 2 * dim, generator=rng)[..., ::2]
        value = torch.randn(dim if layout == "expanded" else shape, generator=rng)
        return value.expand(shape)

    def vectors():
        if form == "slice of six":  # as DiT makes them: rows lie 6 dim apart
            return torch.randn(batch, 6 * dim, generator=rng).chunk(6, dim=1)[1]
        sizes = {"one for all": (1, dim), "a vector": (dim,), "per token": shape}
        return torch.randn(sizes.get(form, (batch, dim)), generator=rng)

    x, dy, gamma, beta = arranged(), arranged(), vectors(), vectors()
    ours = [value.clone().requires_grad_() for value in (x, gamma, beta)]
    exact = [value.double().requires_grad_() for value in (x, gamma, beta)]
    # An epsilon of 0.1 tames rows that are nearly constant.
    arguments = {"eps": 0.1, "per_token": form == "per token", "backend": backend}
    y = norm_of(rms)(x.requires_grad_(), *ours[1:], **arguments)
    wide = [v if form == "per token" else v.expand(batch, dim) for v in exact[1:]]
    reference = formula(exact[0], *wide, eps=0.1, rms=rms)
    assert y.shape == x.shape
    assert relative_error(y, reference) <= 5e-6
    grads = torch.autograd.grad(y, [x, *ours[1:]], dy)
    expected = torch.autograd.grad(reference, exact, dy.double())
    for value, exactly in zip(grads, expected, strict=True):
        assert value.shape == exactly.shape
        assert (value - exactly).abs().max() <= 1e-5 * max(1.0, exactly.abs().max())


@pytest.mark.parametrize(("rms", "backend"), CASES)
def test_modulated_is_the_norm_with_its_weights_times_one_plus_scale(rms, backend):
    x, scale, shift = inputs((4, 4, 33))
    weight, bias = torch.randn(33, requires_grad=True), torch.randn(33, requires_grad=True)
    modulated = modulated_rms_norm if rms else modulated_layer_norm
    for weights in ([], [weight], [None, bias], [weight, bias]):
        if rms and len(weights) == 2:
            continue
        for moved in (shift, None):
            leaves = [t for t in (x, scale, moved, *weights) if t is not None]
            y = modulated(x, scale, moved, 1e-5, *weights, backend=backend)
            exact = {t: t.detach().double().requires_grad_() for t in leaves}
            w, b = (exact.get(t) if t is not None else None for t in [*weights, None, None][:2])
            one, zero = torch.ones(4, 33).double(), torch.zeros(4, 33).double()
            plain = formula(
                exact[x],
                one if w is None else w.expand(4, 33),
                zero if b is None else b.expand(4, 33),
                1e-5,
                rms,
            )
            reference = plain * (1 + exact[scale])[:, None]
            if moved is not None:
                reference = reference + exact[moved][:, None]
            assert relative_error(y, reference) <= 3e-6  # one rounding more: weights are folded
            dy = torch.randn(4, 4, 33)
            grads = torch.autograd.grad(y, leaves, dy)
            expected = torch.autograd.grad(reference, list(exact.values()), dy.double())
            for value, exactly in zip(grads, expected, strict=True):
                assert relative_error(value, exactly) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_plus_a_small_scale_is_not_lost_in_a_half_type(dtype):
    x = torch.randn(4, 5, 64).to(dtype)
    # Below half the spacing of bfloat16 on either side of 1, above that of float16.
    scale = (0.001 + 0.0009 * torch.rand(4, 64)).to(dtype)
    assert (1 + scale).equal(torch.ones_like(scale)) == (dtype == torch.bfloat16)
    moved = modulated_layer_norm(x.float(), scale, eps=0.0)
    plain = modulated_layer_norm(x.float(), torch.zeros(4, 64), eps=0.0)
    expected = plain.double() * (1 + scale.double())[:, None]
    assert relative_error(moved, expected) <= 3e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gated_pair_is_the_residual_and_the_norm_of_what_is_stored(dtype):
    x, h = torch.randn(3, 3, 16).to(dtype), torch.randn(3, 3, 16).to(dtype)
    gate, scale, shift = (torch.randn(3, 16).to(dtype) for _ in range(3))
    x_new, y = gated_residual_modulated_layer_norm(x, h, gate, scale, shift)
    exact = x.double() + gate.double()[:, None] * h.double()
    assert x_new.dtype == y.dtype == dtype
    assert (x_new.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert y.equal(modulated_layer_norm(x_new, scale, shift))
    assert x_new.equal(gated_residual(x, h, gate))
    assert gated_residual(x, h, torch.zeros(3, 16)).equal(x)
    each = [gated_residual(x[i : i + 1], h[i : i + 1], gate[i]) for i in range(3)]
    assert torch.cat(each).equal(x_new)


# --- derivatives of any order ---------------------------------------------------------------------

SUBSETS = ["x", "gamma", "beta", "x gamma", "x beta", "gamma beta", "x gamma beta"]


def float64(name, shape, with_grad):
    return torch.randn(shape, dtype=torch.float64, requires_grad=name in with_grad.split())


@pytest.mark.parametrize(("rms", "backend"), CASES)
@pytest.mark.parametrize(
    ("with_grad", "with_beta"),
    [(subset, True) for subset in SUBSETS] + [(s, False) for s in SUBSETS if "beta" not in s],
)
def test_first_and_second_derivatives_pass_the_numerical_check(rms, backend, with_grad, with_beta):
    x, gamma = float64("x", (2, 2, 3), with_grad), float64("gamma", (2, 3), with_grad)
    beta = float64("beta", (2, 3), with_grad) if with_beta else None
    # With three features a row may be nearly constant; an epsilon of 0.1 tames the derivatives.
    function = partial(norm_of(rms), eps=0.1, backend=backend)
    assert gradcheck(function, (x, gamma, beta))
    assert gradgradcheck(function, (x, gamma, beta))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [(3,), (1, 3), "per token"], ids=str)
def test_derivatives_of_the_other_forms_pass_the_numerical_check(backend, form):
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    gamma, beta = (
        torch.randn(x.shape if form == "per token" else form, dtype=torch.float64) for _ in range(2)
    )
    function = partial(
        conditional_layer_norm, eps=0.1, per_token=form == "per token", backend=backend
    )
    arguments = (x, gamma.requires_grad_(), beta.requires_grad_())
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_the_modulated_and_the_gated_forms_pass_the_numerical_check(backend):
    x, h = (torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate, scale, shift = (
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    functions = {
        partial(modulated_layer_norm, eps=0.1, backend=backend): (x, scale, shift),
        partial(gated_residual_modulated_layer_norm, eps=0.1, backend=backend): (
            x,
            h,
            gate,
            scale,
            shift,
        ),
        lambda x, s, t, w: modulated_layer_norm(x, s, t, 0.1, w, w, backend=backend): (
            x,
            scale,
            shift,
            weight,
        ),
        gated_residual: (x, h, gate),
    }
    for function, arguments in functions.items():
        assert gradcheck(function, arguments)
        assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_gradient_penalty_is_that_of_the_plain_formula(backend):
    """Here dy, gamma and x all have a history, and that of dy contains x."""
    leaves = [t.requires_grad_() for t in inputs((3, 4, 8), torch.float64)]

    def penalty(function):
        x, gamma, beta = (t.sin() for t in leaves)
        y = function(x, gamma, beta)
        grads = torch.autograd.grad((y**3 * x).sum(), (x, gamma), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    agree(penalty(partial(conditional_layer_norm, backend=backend)), penalty(plain))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
def test_the_closed_form_of_the_gradients_is_that_of_autograd(rms, plus_one, gated):
    """What differentiates the fused backward again; the gated form else runs on a GPU only."""
    x, h, dy, dx_new = (torch.randn(3, 5, 7, dtype=torch.float64) for _ in range(4))
    gamma, beta, gate = (torch.randn(3, 7, dtype=torch.float64) for _ in range(3))
    kind = fused.Kind(1e-3, rms, plus_one)
    leaves = [t.requires_grad_() for t in (x, gamma, beta, h, gate)][: 5 if gated else 3]
    x_new = fused.gated_residual(x, h, gate) if gated else x
    outputs = [fused.reference(x_new, gamma, beta, kind), *([x_new] if gated else [])]
    expected = torch.autograd.grad(outputs, leaves, [dy, dx_new][: len(outputs)])
    branch = (dx_new, x_new, gamma, h, gate) if gated else (None, x, gamma, None, None)
    found = fused.reference_backward(dy, *branch, kind, beta.dtype)
    for value, exactly in zip(found, expected, strict=True):
        assert relative_error(value, exactly) <= 1e-13


# --- transforms -----------------------------------------------------------------------------------


# PyTorch warns of itself: its formula for the tangent of a layer norm is scripted, and so is a part
# of its compiler. Which cannot look into the run-time shape checks of the suite.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning")
uncheck = pytest.mark.usefixtures("unchecked")


@pytest.fixture(params=["native", "numba", "auto"])
def function(request):
    return partial(conditional_layer_norm, backend=request.param)


@pytest.fixture
def tensors():
    return inputs((4, 4, 8), torch.float64, grad=False)


def test_vmap_maps_any_of_the_arguments(function, tensors):
    x, gamma, beta = tensors
    many = torch.randn(3, *x.shape, dtype=torch.float64)
    agree(
        torch.vmap(function, in_dims=(0, None, None))(many, gamma, beta),
        [function(each, gamma, beta) for each in many],
    )
    scales = torch.randn(3, *gamma.shape, dtype=torch.float64)
    agree(
        torch.vmap(function, in_dims=(None, 0, None))(x, scales, beta),
        [function(x, each, beta) for each in scales],
    )


def test_vmap_of_grad_gives_the_gradients_of_each_example(function, tensors):
    def loss(f):
        return lambda x, g, b: f(x[None], g[None], b[None]).sin().sum()

    per_example = torch.vmap(torch.func.grad(loss(function), argnums=(0, 1, 2)))(*tensors)
    for i in range(len(tensors[0])):
        leaves = [t[i].clone().requires_grad_() for t in tensors]
        agree([p[i] for p in per_example], torch.autograd.grad(loss(plain)(*leaves), leaves))


@quiet
def test_forward_mode_gives_the_tangent_and_not_zero(function, tensors):
    tangents = [torch.randn_like(t) for t in tensors]
    _, expected = torch.func.jvp(plain, tuple(tensors), tuple(tangents))
    assert expected.abs().max() > 0.1
    agree([torch.func.jvp(function, tuple(tensors), tuple(tangents))[1]], [expected])
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(*pair)
            for pair in zip(tensors, tangents, strict=True)
        ]
        tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    agree([tangent], [expected])


@quiet
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_jacobians_and_hessian_are_those_of_the_plain_formula(transform, function, tensors):
    def scalar(f):
        return lambda *t: f(*t).pow(3).sum()

    wrap = scalar if transform is torch.func.hessian else lambda f: f
    for argument in range(3):
        found = transform(wrap(function), argnums=argument)(*tensors)
        agree([found], [transform(wrap(plain), argnums=argument)(*tensors)])


def test_gradients_of_a_batch_of_outputs(function, tensors):
    leaves = [t.requires_grad_() for t in tensors]
    many = torch.randn(5, 4, 4, 8, dtype=torch.float64)
    y = plain(*leaves)
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in many]
    expected = [torch.stack(grads) for grads in zip(*each, strict=True)]
    for again in (False, True):
        options = {"is_grads_batched": True, "create_graph": again}
        agree(torch.autograd.grad(function(*leaves), leaves, many, **options), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(function, tensors, use_reentrant):
    leaves = [t.requires_grad_() for t in tensors]
    y = checkpoint(function, *leaves, use_reentrant=use_reentrant)
    y.square().sum().backward()
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    agree([t.grad for t in leaves], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["native", "numba"])
def test_the_operators_pass_the_checks_of_torch_library(backend, dtype):
    x, gamma, beta = inputs((4, 3, 8), dtype, grad=False)
    across = torch.randn(3, 4, 8, dtype=dtype).transpose(0, 1)
    for x_like, rms in [(x, False), (across, False)] + [(x, True)] * (backend == "numba"):
        kind = (1e-5, rms, True, backend)
        arguments = (x_like, gamma, beta, None, None, *kind)
        torch.library.opcheck(fused._FORWARD, arguments)
        _, _, mean, rstd = fused._FORWARD(*arguments)
        for beta_dtype in (dtype, torch.bfloat16, None):
            given = (across, None, x_like, gamma, mean, rstd, None, None, beta_dtype)
            torch.library.opcheck(fused._BACKWARD, (*given, *kind))


def both_ways(f, leaves, dy):
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@uncheck
@quiet
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_without_a_break_it_computes_the_same(function, compiler):
    leaves, dy = inputs((4, 4, 8)), torch.randn(4, 4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: function(*t).sin(), fullgraph=True, backend=compiler)
    expected = both_ways(lambda *t: function(*t).sin(), leaves, dy)
    for value, exactly in zip(both_ways(compiled, leaves, dy), expected, strict=True):
        assert torch.allclose(value, exactly, rtol=1e-5, atol=1e-6)


@uncheck
@quiet
def test_compiled_transforms_take_the_reference(function, tensors):
    torch._dynamo.reset()
    tangents = [torch.randn_like(t) for t in tensors]

    def tangent(f):
        return lambda: torch.func.jvp(f, tuple(tensors), tuple(tangents))[1]

    compiled = torch.compile(tangent(function), fullgraph=True, backend="aot_eager")
    agree([compiled()], [tangent(plain)()])


@uncheck
@quiet
def test_four_lengths_need_one_recompilation_at_most(function):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for time in (3, 5, 7, 9):
        leaves = inputs((4, time, 8))
        assert torch.allclose(compiled(*leaves), plain(*leaves), atol=2e-6)
    assert counter.frame_count <= 2


@uncheck
@quiet
def test_compiled_on_a_cpu_auto_leaves_large_and_empty_inputs_to_the_compiler():
    torch._dynamo.reset()
    graphs = []

    def note(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(conditional_layer_norm, fullgraph=True, backend=note, dynamic=False)
    for shape in [(4, 128, 128), (3, 0, 8), (0, 4, 8)]:
        leaves = inputs(shape)
        assert torch.allclose(compiled(*leaves), plain(*leaves), atol=5e-6)
    assert not any("cln_tutorial" in graph for graph in graphs)


class Norm(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, gamma, beta):
        return conditional_layer_norm(x, gamma, beta, backend=self.backend)


@uncheck
@quiet
def test_export_holds_plain_operations_or_the_operator_asked_for():
    tensors = tuple(inputs((4, 3, 8), grad=False))
    batch, time = torch.export.Dim("batch", min=2), torch.export.Dim("time", min=2)
    dynamic = ({0: batch, 1: time}, {0: batch}, {0: batch})
    for backend, ours in [("auto", False), ("numba", True), ("native", True)]:
        program = torch.export.export(Norm(backend), tensors, dynamic_shapes=dynamic)
        names = [str(node.target) for node in program.graph.nodes]
        assert any("cln_tutorial" in name for name in names) == ours
        longer = inputs((3, 70, 8), grad=False)
        assert torch.allclose(program.module()(*longer), plain(*longer), atol=2e-6)


@uncheck
@quiet
@pytest.mark.parametrize("backend", ["native", "numba"])
def test_an_exported_operator_takes_an_empty_time(backend):
    tensors = tuple(inputs((4, 3, 8), grad=False))
    dynamic = ({1: torch.export.Dim("time", min=0)}, None, None)
    program = torch.export.export(Norm(backend), tensors, dynamic_shapes=dynamic).module()
    assert program(torch.empty(4, 0, 8), *tensors[1:]).shape == (4, 0, 8)


@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize("shape", [(4, 0, 8), (0, 4, 8)], ids=str)
def test_the_operators_give_zeros_for_what_is_empty(backend, shape):
    x, gamma, beta = inputs(shape, grad=False)
    kind = (1e-5, False, False, backend)
    y, _, mean, rstd = fused._FORWARD(x, gamma, beta, None, None, *kind)
    assert y.shape == shape
    given = (x, None, x, gamma, mean, rstd, None, None, torch.float32)
    dx, dgamma, dbeta, _, _ = fused._BACKWARD(*given, *kind)
    assert dx.shape == shape
    assert dgamma.equal(torch.zeros(shape[0], 8))
    assert dbeta.equal(torch.zeros(shape[0], 8))


@uncheck
@quiet
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes that become constants
def test_a_traced_program_holds_plain_operations():
    tensors = tuple(inputs((16, 64, 64)))  # large enough for a custom operator
    traced = torch.jit.trace(Norm("auto"), tensors)
    assert "cln_tutorial::" not in str(traced.graph)
    assert torch.allclose(traced(*tensors), plain(*tensors), atol=5e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_the_result_keeps_the_dtype_of_x(backend):
    x, gamma, beta = inputs((4, 4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y = conditional_layer_norm(x.bfloat16(), gamma, beta, backend=backend)
        full = conditional_layer_norm(x, gamma, beta, backend=backend)
    assert y.dtype == F.layer_norm(x.bfloat16(), (8,)).dtype == torch.bfloat16
    assert full.equal(conditional_layer_norm(x, gamma, beta, backend=backend))
    rounded = formula(x.bfloat16(), gamma, beta).bfloat16()
    assert (y.double() - rounded.double()).abs().max() <= 2**-7 * rounded.abs().max()  # one ulp
    y.sum().backward()
    assert gamma.grad.dtype == torch.float32


# --- extremes, determinism, memory ----------------------------------------------------------------


@pytest.mark.parametrize(("rms", "backend"), CASES)
def test_twenty_repeats_are_equal_bit_for_bit(rms, backend):
    shape = (3, 700, 100) if backend == "numba" else (3, 100, 100)  # enough for several threads
    leaves, dy = inputs(shape), torch.randn(shape)
    f = partial(norm_of(rms), backend=backend)
    first = both_ways(f, leaves, dy)
    for _ in range(19):
        for value, again in zip(first, both_ways(f, leaves, dy), strict=True):
            assert value.equal(again)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 4096, 100), (5, 1000, 97), (4096, 1, 130)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit_of_the_loops(shape, threads):
    leaves, dy = inputs(shape), torch.randn(shape)
    f = partial(conditional_layer_norm, backend="numba")
    threads(1)
    one = both_ways(f, leaves, dy)
    threads(3)
    for value, again in zip(one, both_ways(f, leaves, dy), strict=True):
        assert value.equal(again)


@pytest.mark.parametrize(("rms", "backend"), CASES)
@pytest.mark.parametrize("dim", [7, 41, 100, 128])
def test_a_row_does_not_see_its_neighbours_by_a_bit(rms, backend, dim):
    x, gamma, beta = inputs((6, 5, dim), grad=False)
    f = partial(norm_of(rms), backend=backend)
    y = f(x, gamma, beta)
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    assert f(x[order], gamma[order], beta[order]).equal(y[order])
    assert f(x[:, :2], gamma, beta).equal(y[:, :2])
    for b in range(6):
        assert f(x[b : b + 1, 3:], gamma[b], beta[b]).equal(y[b : b + 1, 3:])


def _norm_of_ones(_=None):
    # From NumPy to NumPy: after a fork PyTorch's own threads may hang.
    ones = torch.from_numpy(np.ones((8, 128), np.float32))
    x = torch.from_numpy(np.ones((8, 500, 128), np.float32))
    total = conditional_layer_norm(x, ones, ones, backend="numba").numpy().sum()
    assert total == 8 * 500 * 128
    return total


def test_the_loops_may_be_entered_from_many_threads_and_after_a_fork(threads):
    threads(2)
    assert _norm_of_ones() == 8 * 500 * 128
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(map(float, pool.map(_norm_of_ones, range(8)))) == {8.0 * 500 * 128}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
        child = multiprocessing.get_context("fork").Process(target=_norm_of_ones, daemon=True)
        child.start()
    child.join(20)
    assert child.exitcode == 0


class Interrupted:
    """A pool whose tasks wait, and a user who interrupts that."""

    def __init__(self):
        self.waiting = []

    def submit(self, task, *arguments):
        self.waiting.append(partial(task, *arguments))
        return self

    def result(self):
        raise KeyboardInterrupt


def test_an_interrupted_call_leaves_the_memory_to_the_tasks_that_still_wait(monkeypatch, threads):
    threads(2)
    loops = fused._implementation("numba")
    pool = Interrupted()
    monkeypatch.setattr(loops, "_pool", pool)
    leaves = inputs((4, 1024, 128), grad=False)
    with pytest.raises(KeyboardInterrupt):
        conditional_layer_norm(*leaves, backend="numba")
    there = weakref.ref(leaves[0])
    del leaves
    gc.collect()
    assert there() is not None
    for task in pool.waiting:
        task()
    pool.waiting.clear()
    del task
    gc.collect()
    assert there() is None


def test_a_pool_that_takes_no_more_tasks_does_not_matter(monkeypatch, threads):
    threads(2)
    loops = fused._implementation("numba")
    pool = concurrent.futures.ThreadPoolExecutor(1)
    pool.shutdown()  # as the interpreter does at its end
    monkeypatch.setattr(loops, "_pool", pool)
    leaves = inputs((4, 1024, 128), grad=False)
    y = conditional_layer_norm(*leaves, backend="numba")
    assert torch.allclose(y, plain(*leaves), atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1.0, 0.5, -2.0, 0.1, 3.3, 3333.0])
def test_a_constant_row_gives_the_shift_and_finite_gradients(backend, value):
    x = torch.full((2, 3, 768), value, requires_grad=True)
    gamma, beta = torch.randn(2, 768), torch.randn(2, 768)
    y = conditional_layer_norm(x, gamma, beta, backend=backend)
    y.sum().backward()
    # A mean that misses by some ulp is enlarged by 1 / sqrt(eps); those of 1, 0.5, -2 are exact.
    ulp = 0.0 if value in (1.0, 0.5, -2.0) else torch.finfo(torch.float32).eps * value
    bound = 5 * ulp / 1e-5**0.5 * gamma.abs() + 1e-6 * bool(ulp)
    assert ((y - beta[:, None]).abs() <= bound[:, None]).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_equal_numbers_is_exact_in_any_width(backend, dtype):
    for dim in (*range(2, 200), 768, 1000):
        for value in (1.0, 0.5, -2.0):
            x, ones = torch.full((1, 2, dim), value, dtype=dtype), torch.ones(dim, dtype=dtype)
            assert not conditional_layer_norm(x, ones, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_whose_squares_overflow_are_normalised(backend):
    x, gamma, beta = inputs((2, 3, 8), grad=False)
    x = 1e19 + 1e17 * x  # float32 ends at 3.4e38, the square of 1.8e19
    y = conditional_layer_norm(x, gamma, beta, backend=backend)
    assert relative_error(y, formula(x, gamma, beta)) <= 2e-5  # the mean has 7 digits, of 1e19


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_ten_thousand_costs_the_rounding_of_the_mean_only(backend):
    x, gamma, beta = 1e4 + torch.randn(20, 50, 768), torch.randn(20, 768), torch.randn(20, 768)
    y = conditional_layer_norm(x, gamma, beta, backend=backend)
    # An ulp of 1e4 is 9.8e-4 standard deviations, times |gamma| < 5; the one-pass variance
    # E x^2 - mu^2 would be wrong by a factor above 10.
    assert (y - formula(x, gamma, beta)).abs().max() <= 2 * 9.8e-4 * 5


@pytest.mark.parametrize(("rms", "backend"), CASES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_own_row_and_example(rms, backend, poison):
    x, gamma, beta = inputs((3, 3, 8))
    with torch.no_grad():
        x[1, 2, 4] = poison
    y = norm_of(rms)(x, gamma, beta, backend=backend)
    y.sum().backward()
    assert y.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert x.grad.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert gamma.grad.isnan().any(-1).tolist() == [False, True, False]
    assert not beta.grad.isnan().any()


@pytest.mark.parametrize(("rms", "backend"), CASES)
@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8), (0, 8)], ids=str)
def test_an_empty_batch_or_time_gives_empty_results_and_gradients_of_zero(rms, backend, shape):
    leaves = inputs(shape)
    y = norm_of(rms)(*leaves, backend=backend)
    y.sum().backward()
    assert y.shape == leaves[0].grad.shape == shape
    assert leaves[1].grad.equal(torch.zeros(shape[0], 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel_gives_the_shift_and_two_channels_a_sign(backend):
    x, gamma, beta = inputs((3, 4, 1))
    y = conditional_layer_norm(x, gamma, beta, backend=backend)
    assert y.equal(beta[:, None].expand(3, 4, 1))
    x, gamma, beta = inputs((3, 4, 2))
    y = conditional_layer_norm(x, gamma, beta, 0.0, backend=backend)
    sign = torch.stack([(x[..., 0] - x[..., 1]).sign(), (x[..., 1] - x[..., 0]).sign()], -1)
    assert torch.allclose(y, sign * gamma[:, None] + beta[:, None], atol=1e-5)


def kept_for_backward(f, leaves):
    """Bytes that autograd keeps, in units of x, conditions and numbers per row left out."""
    kept = {}

    def note(tensor):
        if tensor.numel() >= leaves[0].numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = f(*leaves)
    return sum(kept.values()) / (leaves[0].numel() * leaves[0].element_size()), y


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_a_fused_norm_keeps_its_input_alone_for_the_backward(backend):
    leaves = inputs((16, 128, 64))
    # Eager keeps the input of the norm and its output, which the product needs.
    assert kept_for_backward(plain, leaves)[0] == 2.0
    assert kept_for_backward(partial(conditional_layer_norm, backend=backend), leaves)[0] == 1.0


# --- the choice of the backend --------------------------------------------------------------------


def chosen(shape, dtype=torch.float32, rms=False, form="per example", backend="auto", beta=None):
    x = torch.empty(shape, dtype=dtype)
    gamma = torch.empty(shape[-1] if form == "one for all" else (shape[0], shape[-1]))
    return fused.choose(backend, x, fused.Kind(1e-5, rms, False), gamma, beta)


def test_auto_takes_numba_for_large_tensors_and_the_reference_for_small_ones(monkeypatch):
    assert chosen((2, 4, 16)) == "reference"
    assert chosen((16, 128, 768)) == chosen((16, 128, 768), torch.float64) == "numba"
    assert chosen((16, 128, 768), rms=True) == "numba"
    assert chosen((16, 128, 768), torch.bfloat16) == "reference"
    assert chosen((0, 128, 768)) == "reference"
    monkeypatch.setitem(fused._INSTALLED, "numba", False)
    assert chosen((16, 128, 768)) == "native"
    assert chosen((16, 128, 768), rms=True) == "reference"
    assert chosen((64, 64, 128)) == "reference"  # 8,192 elements per example
    assert chosen((64, 64, 128), form="one for all") == "native"
    # One scale for all, but a shift for each: native would run once for each.
    assert chosen((64, 64, 128), form="one for all", beta=torch.empty(64, 128)) == "reference"


class Subclass(torch.Tensor):
    """As DTensor: of another class, with operations of its own."""


def test_auto_leaves_tensors_of_other_classes_to_the_reference():
    x, gamma, _ = inputs((16, 128, 768), grad=False)
    kind = fused.Kind(1e-5, False, False)
    assert fused.choose("auto", x, kind, gamma) == "numba"
    assert fused.choose("auto", x, kind, torch.nn.Parameter(gamma)) == "numba"
    assert fused.choose("auto", x.as_subclass(Subclass), kind, gamma) == "reference"
    assert fused.choose("auto", x, kind, gamma.as_subclass(Subclass)) == "reference"


def test_auto_does_without_a_numba_that_is_there_and_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    fused.imports.cache_clear()
    try:
        assert chosen((16, 128, 768)) == "native"
        assert "numba" not in available_backends()
    finally:
        fused.imports.cache_clear()


def test_a_transform_gets_the_reference_whatever_is_asked_for():
    names = []

    def note(x):
        names.append(chosen((16, 128, 768), backend="numba"))
        return x

    torch.vmap(note)(torch.ones(2))
    torch.func.jvp(note, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        note(torch.ones(2))
    assert names == ["reference"] * 3
    assert chosen((16, 128, 768), backend="numba") == "numba"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "must be 'auto' or one of .*got 'cuda'"),
        ({"backend": "triton"}, "'triton' needs a GPU"),
        ({"backend": "native", "rms": True}, "'native' has no RMS norm"),
        ({"backend": "numba", "dtype": torch.bfloat16}, "takes torch.float32.*is torch.bfloat16"),
    ],
)
def test_a_backend_that_cannot_run_says_why(arguments, message):
    rms, dtype = arguments.pop("rms", False), arguments.pop("dtype", torch.float32)
    x, gamma, _ = inputs((2, 3, 8), dtype)
    with pytest.raises(ValueError, match=message):
        norm_of(rms)(x, gamma, **arguments)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(fused._INSTALLED, "numba", False)
    x, gamma, _ = inputs((2, 3, 8))
    assert "numba" not in available_backends()
    with pytest.raises(ValueError, match=r"pip install 'cln-tutorial\[fast\]'"):
        conditional_layer_norm(x, gamma, backend="numba")


def test_numba_is_imported_when_it_is_first_used():
    code = """
import sys, torch
from cln_tutorial.conditional_norm import conditional_layer_norm
conditional_layer_norm(torch.ones(2, 3, 8), torch.ones(2, 8))
assert "numba" not in sys.modules
conditional_layer_norm(torch.ones(2, 3, 8), torch.ones(2, 8), backend="numba")
assert "numba" in sys.modules
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


BAD = {
    "a scale of the length of time": (
        lambda x, v: modulated_layer_norm(x, torch.ones(3, 8)),
        ValueError, r"`scale` must hold one vector per example, \(2, 8\).*got \(3, 8\)",
    ),
    "a weight per example": (
        lambda x, v: modulated_layer_norm(x, v, weight=v),
        ValueError, r"`weight` must be one vector for all, \(8,\).*got \(2, 8\)",
    ),
    "an integer shift": (
        lambda x, v: modulated_rms_norm(x, v, v.long()),
        TypeError, "`shift` must be a tensor of a floating dtype; got torch.int64",
    ),
    "a branch of another shape": (
        lambda x, v: gated_residual(x, x[:, :1], v),
        ValueError, r"`h` must have the shape of `x`, \(2, 3, 8\); got \(2, 1, 8\)",
    ),
    "a branch of another dtype": (
        lambda x, v: gated_residual(x, x.double(), v),
        TypeError, "`h` must have the dtype of `x`, torch.float32; got torch.float64",
    ),
    "a gate per position": (
        lambda x, v: gated_residual(x, x, torch.ones(2, 3, 8)),
        ValueError, "`gate` must hold one vector per example",
    ),
    "a gate on another device": (
        lambda x, v: gated_residual_modulated_layer_norm(x, x, v.to("meta"), v, v),
        ValueError, "`gate` is on meta, `x` on cpu",
    ),
    "a negative epsilon": (
        lambda x, v: conditional_rms_norm(x, v, eps=-1e-6),
        ValueError, "`eps` must be zero or positive; got -1e-06",
    ),
    "a vector per example as a vector per token": (
        lambda x, v: modulated_rms_norm(x, v, per_token=True),
        ValueError, r"`scale` must have the shape of `x`, \(2, 3, 8\)",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_and_the_message_says_what_to_write(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3, 8), torch.ones(2, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_condition_is_not_rounded_to_the_half_type_of_x(dtype):
    x = torch.randn(4, 16, 256).to(dtype)
    gamma, beta = torch.randn(2, 4, 256)
    y = conditional_layer_norm(x, gamma, beta)
    # With a condition rounded before, 21 % of the entries differ from the rounded exact result.
    assert (y == formula(x, gamma, beta).to(dtype)).double().mean() >= 0.999
