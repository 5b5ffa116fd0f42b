"""The Triton kernels of the conditional norms: against float64, and as a GPU would run them.

Without a GPU the interpreter shows that they compute the right numbers, and the compiled code shows
how: width of the accesses, registers, spills, atomics. Nothing here says how fast they are.
"""

import functools
import re

import pytest
import torch

from cln_tutorial.conditional_norm import (
    conditional_layer_norm,
    conditional_rms_norm,
    gated_residual_modulated_layer_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)
from tests.kernel_harness import compile_ahead, empty, kernels_of, launches, runs_kernels

kernels = kernels_of("conditional_norm")
pytestmark = pytest.mark.kernel

HALF = [torch.bfloat16, torch.float16]
# Name: the function, whether it is an RMS norm, whether its scale is around zero.
NORMS = {
    "layer norm": (conditional_layer_norm, False, False),
    "modulated layer norm": (modulated_layer_norm, False, True),
    "RMS norm": (conditional_rms_norm, True, False),
    "modulated RMS norm": (modulated_rms_norm, True, True),
}
EPS = 1e-5
# (batch, time, dim). Of 32 rows per chunk the last chunk has 6, 1 and 18; 9 rows are one chunk, not
# filled by tiles of 8; the channels are ragged, or fill a power of two.
SHAPES = [(3, 70, 33), (2, 9, 100), (2, 33, 768), (1, 50, 64), (4, 1, 24)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def formula(x, scale, shift=None, *, rms=False, plus_one=False):
    """The equation in float64 for (batch, time, dim) and one condition per example, or per token.

    It shares nothing with ours.
    """
    scale, shift = (None if c is None else c[:, None] if c.ndim == 2 else c for c in (scale, shift))
    centred = x if rms else x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y * (1 + scale if plus_one else scale)
    return y if shift is None else y + shift


def gated_formula(x, h, gate, scale, shift=None):
    x_new = x + gate[:, None] * h
    return x_new, formula(x_new, scale, shift, plus_one=True)


def on_triton(function, **keywords):
    return functools.partial(function, eps=EPS, backend="triton", **keywords)


def results(function, inputs, weights=None):
    """Return the outputs of a function and its gradients for outputs weighted at random."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if weights is None:
        weights = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    weights = [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, inputs, weights)
    return [o.detach() for o in outputs], gradients, weights


def assert_agrees(function, exact, *inputs):
    """Compare float32 with float64, outputs and gradients, each relative to its largest entry."""
    outputs, gradients, weights = results(function, inputs)
    outputs_64, gradients_64, _ = results(exact, [t.double() for t in inputs], weights)
    for value, expected in zip(outputs, outputs_64, strict=True):
        # Two float32 roundings of values of order one; mean and deviation of the same precision.
        assert relative_error(value, expected) <= 2e-6
    for value, expected in zip(gradients, gradients_64, strict=True):
        assert relative_error(value, expected) <= 1e-5  # sums of up to 768 rounded terms


def relative_error(value, expected):
    assert value.shape == expected.shape
    return ((value.double() - expected).abs().max() / expected.abs().max()).item()


def share_within_one_ulp(value, exact):
    """Share of the entries that are the rounded float64 result or a neighbour of it."""
    ranks = []
    for tensor in (value, exact.to(value.dtype)):
        bits = tensor.view(torch.int16).int()
        ranks.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))  # in the order of the values
    return ((ranks[0] - ranks[1]).abs() <= 1).double().mean().item()


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
@runs_kernels
def test_float32_agrees_with_the_float64_formula(name, shape):
    function, rms, plus_one = NORMS[name]
    batch, dim = shape[0], shape[-1]
    exact = functools.partial(formula, rms=rms, plus_one=plus_one)
    x, scale, shift = torch.randn(shape), torch.randn(batch, dim), torch.randn(batch, dim)
    assert_agrees(on_triton(function), exact, x, scale, shift)
    if dim != 768:
        assert_agrees(on_triton(function), exact, x, scale)  # without a shift


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@runs_kernels
def test_the_gated_form_agrees_with_the_float64_formula(shape):
    x, h = torch.randn(2, *shape)
    gate, scale, shift = torch.randn(3, shape[0], shape[-1])
    with launches() as started:
        function = on_triton(gated_residual_modulated_layer_norm)
        assert_agrees(function, gated_formula, x, h, gate, scale, shift)
    chunked = {"reduce_kernel": 1} if shape[1] > 32 else {}
    assert started == {"forward_kernel": 1, "backward_kernel": 1, **chunked}
    assert_agrees(function, gated_formula, x, h, gate, scale)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 9, 13])
@runs_kernels
def test_no_row_is_lost_whatever_the_chunk_leaves_over(rows, monkeypatch):
    monkeypatch.setattr(kernels, "SHORTEST_CHUNK", 4)
    x, scale, shift = torch.randn(3, rows, 33), torch.randn(3, 33), torch.randn(3, 33)
    assert_agrees(on_triton(conditional_layer_norm), formula, x, scale, shift)


@pytest.mark.parametrize("function", [conditional_layer_norm, modulated_layer_norm])
@runs_kernels
def test_a_condition_per_token_takes_one_pass_and_agrees_with_the_formula(function):
    exact = functools.partial(formula, plus_one=function is modulated_layer_norm)
    x, scale, shift = torch.randn(3, 2, 5, 33)
    with launches() as started:
        assert_agrees(on_triton(function, per_token=True), exact, x, scale, shift)
    assert started == {"forward_kernel": 1, "backward_kernel": 1}


@runs_kernels
def test_one_condition_for_all_gets_the_sum_over_all_examples():
    x, scale, shift = torch.randn(3, 25, 100), torch.randn(100), torch.randn(100)

    def exact(x, scale, shift):
        return formula(x, scale.expand(3, -1), shift.expand(3, -1))

    assert_agrees(on_triton(conditional_layer_norm), exact, x, scale, shift)


@runs_kernels
def test_conditions_may_be_slices_of_one_projection():
    x, h, projected = torch.randn(3, 40, 33), torch.randn(3, 40, 33), torch.randn(3, 6 * 33)

    def ours(x, h, projected):
        _, gate, scale, shift, *_ = projected.chunk(6, -1)
        return on_triton(gated_residual_modulated_layer_norm)(x, h, gate, scale, shift)

    def exact(x, h, projected):
        _, gate, scale, shift, *_ = projected.chunk(6, -1)
        return gated_formula(x, h, gate, scale, shift)

    assert_agrees(ours, exact, x, h, projected)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[..., 3:36],
        lambda t: t[:, ::2],
        lambda t: t.transpose(0, 1),
        lambda t: t.transpose(1, 2),
        lambda t: t[:, :1].expand(-1, 7, -1),
        lambda t: t[:, :, :1].expand(-1, -1, 33),
    ],
    ids=["wider rows", "every second row", "time first", "channels apart", "one row", "one number"],
)
@runs_kernels
def test_any_strides_of_input_branch_and_gradient_give_the_result_of_packed_ones(view):
    x, h, dx_new, dy = (view(torch.randn(4, 6, 40)) for _ in range(4))
    conditions = torch.randn(3, len(x), x.shape[-1])

    def run(x, h, dx_new, dy):
        x, h = x.requires_grad_(), h.requires_grad_()
        outputs = on_triton(gated_residual_modulated_layer_norm)(x, h, *conditions)
        return *outputs, *torch.autograd.grad(outputs, (x, h), (dx_new, dy))

    values = run(x, h, dx_new, dy)
    packed = run(*(t.detach().contiguous() for t in (x, h, dx_new, dy)))
    for value, expected in zip(values, packed, strict=True):
        assert value.is_contiguous()
        # A GPU adds up in another order where the accesses have another width.
        assert relative_error(value, expected.double()) <= 1e-5


@runs_kernels
def test_a_condition_may_be_expanded_over_the_batch():
    run = on_triton(conditional_layer_norm)
    x, scale = torch.randn(3, 5, 33), torch.randn(1, 33)

    def exact(x, scale):
        return formula(x, scale.expand(3, -1))

    assert_agrees(lambda x, scale: run(x, scale.expand(3, -1)), exact, x, scale)


@runs_kernels
def test_the_kernel_is_launched_when_it_is_asked_for_and_only_then():
    x, scale = torch.randn(2, 3, 33), torch.randn(2, 33)
    with launches() as started:
        conditional_layer_norm(x, scale, backend="reference")
    assert not started
    with launches() as started:
        conditional_layer_norm(x, scale, backend="triton")
    assert started == {"forward_kernel": 1}


# --- the storage types ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(3, 70, 33), (1, 9, 768)], ids=str)
@runs_kernels
def test_half_types_are_the_rounded_float64_result_to_one_ulp(dtype, shape):
    inputs = torch.randn(2, *shape).to(dtype)
    conditions = torch.randn(3, shape[0], shape[-1]).to(dtype)
    (x_new, y), gradients, weights = results(
        on_triton(gated_residual_modulated_layer_norm), [*inputs, *conditions]
    )
    x, h, gate, scale, shift = (t.double() for t in (*inputs, *conditions))
    assert share_within_one_ulp(x_new, x + gate[:, None] * h) >= 0.999
    # y is the norm of x' as it is stored, and so are the gradients.
    stored = (x_new.double() - gate[:, None] * h, h, gate, scale, shift)
    (_, y_64), gradients_64, _ = results(gated_formula, stored, weights)
    assert share_within_one_ulp(y, y_64) >= 0.999
    for value, expected in zip(gradients, gradients_64, strict=True):
        # Entries near zero, which are differences of large ones, keep float32's absolute error.
        assert value.dtype == dtype
        assert share_within_one_ulp(value, expected) >= 0.999


@runs_kernels
def test_each_gradient_has_the_dtype_of_its_input():
    x = torch.randn(2, 40, 33).half()
    scale, shift = torch.randn(2, 33), torch.randn(2, 33).double()
    (y,), gradients, weights = results(on_triton(conditional_layer_norm), [x, scale, shift])
    _, expected, _ = results(formula, [x.double(), scale.double(), shift], weights)
    assert [t.dtype for t in (y, *gradients)] == [x.dtype, x.dtype, scale.dtype, shift.dtype]
    for value, exact in zip(gradients[1:], expected[1:], strict=True):
        assert relative_error(value, exact) <= 1e-5  # sums of 40 terms in float32


@pytest.mark.parametrize("function", [modulated_layer_norm, modulated_rms_norm])
@runs_kernels
def test_a_small_bfloat16_scale_is_not_lost(function):
    x, dy = torch.randn(2, 2, 5, 33)
    scale = (0.001 + 0.0009 * torch.rand(2, 33)).bfloat16()
    run = on_triton(function)
    (y,), (dx, _), _ = results(run, [x, scale], [dy])
    (plain,), _, _ = results(run, [x, torch.zeros_like(scale)], [dy])
    # In bfloat16 1 + s would be 1, an error of 1e-3; in float32 each product rounds by 6e-8.
    assert (1 + scale == 1).all()
    one_plus = (1 + scale.double())[:, None]
    assert relative_error(y, plain.double() * one_plus) <= 1e-6
    expected = torch.autograd.grad(
        function(exact := x.double().requires_grad_(), scale.double()), exact, dy.double()
    )
    assert relative_error(dx, expected[0]) <= 1e-5


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NORMS)
@runs_kernels
def test_a_bad_number_stays_in_its_row_and_in_its_example(name, bad):
    function = on_triton(NORMS[name][0])
    x, scale, shift = torch.randn(3, 6, 33), torch.randn(3, 33), torch.randn(3, 33)
    (clean,), clean_gradients, weights = results(function, [x, scale, shift])
    x[1, 2, 5] = bad
    (y,), gradients, _ = results(function, [x, scale, shift], weights)
    row = torch.zeros(3, 6, dtype=torch.bool)
    row[1, 2] = True
    example = torch.tensor([False, True, False])
    assert y[row].isnan().any()
    assert y[~row].equal(clean[~row])
    dx, dscale, dshift = gradients
    assert dx[row].isnan().any()
    assert dx[~row].equal(clean_gradients[0][~row])
    assert dscale[example].isnan().any()
    assert dscale[~example].equal(clean_gradients[1][~example])
    assert dshift.equal(clean_gradients[2])  # it does not depend on x


@pytest.mark.parametrize("value", [1.0, 0.5, -2.0, 0.1, 3.3, 3333.0])
@runs_kernels
def test_a_constant_row_gives_the_shift_and_finite_gradients(value):
    x, scale, shift = torch.full((2, 3, 100), value), torch.randn(2, 100), torch.randn(2, 100)
    (y,), gradients, _ = results(on_triton(conditional_layer_norm), [x, scale, shift])
    off = (y - shift[:, None]).abs()
    if value in (1.0, 0.5, -2.0):  # their sum and mean are exact
        assert off.max() == 0
    # A mean that misses by some ulps of the value is enlarged by 1 / sqrt(eps).
    ulp = 2.0**-23 * abs(value)
    assert (off <= 5 * ulp / EPS**0.5 * scale[:, None].abs() + 1e-6).all()
    assert all(g.isfinite().all() for g in gradients)


@runs_kernels
def test_an_offset_of_ten_thousand_leaves_the_variance_right():
    x = 1e4 + torch.randn(2, 4, 768)
    y = on_triton(conditional_layer_norm)(x, torch.ones(2, 768))
    exact = formula(x.double(), torch.ones(2, 768).double())
    # The mean is a float32 number near 1e4, off by one or two ulps of it, 9.8e-4, against a
    # deviation of 1. A variance from the mean of the squares would be off by its own size.
    assert (y.double() - exact).abs().max() <= 2e-3


@runs_kernels
def test_large_float16_numbers_do_not_overflow():
    x = torch.linspace(-6e4, 6e4, 100).half().expand(2, 3, -1)
    y = on_triton(conditional_layer_norm)(x, torch.ones(2, 100).half())
    assert share_within_one_ulp(y, formula(x.double(), torch.ones(2, 100).double())) == 1


@runs_kernels
def test_repeats_are_equal_bit_by_bit():
    x, h = torch.randn(2, 2, 40, 33)
    inputs = [x, h, *torch.randn(3, 2, 33)]
    outputs, gradients, weights = results(on_triton(gated_residual_modulated_layer_norm), inputs)
    for _ in range(3):
        again, gradients_again, _ = results(
            on_triton(gated_residual_modulated_layer_norm), inputs, weights
        )
        assert all(map(torch.equal, outputs, again))
        assert all(map(torch.equal, gradients, gradients_again))


# --- the compiled code ----------------------------------------------------------------------------

# Registers per thread. From sm_80 on 32 let 2,048 threads be on a multiprocessor, 64 half of them;
# on sm_75, where there are at most 1,024, 64 cost nothing.
CAPS = {
    75: {"forward_kernel": 64, "backward_kernel": 72},
    80: {"forward_kernel": 32, "backward_kernel": 64},
    90: {"forward_kernel": 32, "backward_kernel": 64},
}


@functools.cache
def compiled(capability, dim, dtype, *, plus_one=True, gated=False, groups=64):
    """The kernels for conditions that are slices, as the launch functions start them."""
    x = empty(dtype, groups * 512, dim)
    gamma, beta, gate = empty(dtype, groups, 6 * dim)[:, : 3 * dim].chunk(3, -1)
    mean = rstd = empty(torch.float32, groups * 512)
    h, dx_new = (x, x) if gated else (None, None)
    gate = gate if gated else None

    def launch():
        kernels.forward(x, gamma, beta, h, gate, EPS, False, plus_one)
        kernels.backward(x, dx_new, x, gamma, mean, rstd, h, gate, beta.dtype, False, plus_one)

    return compile_ahead(launch, capability)


BUILDS = [
    pytest.param(capability, dim, dtype, id=f"sm_{capability} {dim} {str(dtype)[6:]}")
    for capability in CAPS
    for dim in (768, 1024, 4096)
    for dtype in (torch.bfloat16, torch.float32)
]
each_build = pytest.mark.parametrize(("capability", "dim", "dtype"), BUILDS)


@each_build
def test_every_access_to_a_row_is_128_bits_wide(capability, dim, dtype):
    found = compiled(capability, dim, dtype)
    # One number of 32 bits per row: mean and rstd, written forward and read backward.
    wide = dtype.itemsize // 2  # accesses of 128 bits for the eight channels of a thread
    forward, backward = found["forward_kernel"], found["backward_kernel"]
    assert forward.loads == {128: 3 * wide}  # x, gamma, beta
    assert forward.stores == {128: wide, 32: 2}
    assert backward.loads == {128: 3 * wide, 32: 2}  # dy, x, gamma
    assert backward.stores == {128: 3 * wide}  # dx, dgamma, dbeta


@each_build
def test_nothing_is_spilled_and_no_sum_depends_on_the_order_of_the_programs(capability, dim, dtype):
    for kernel in compiled(capability, dim, dtype).values():
        assert kernel.local_bytes == 0
        assert kernel.atomics == []


@each_build
def test_the_kernels_keep_under_their_cap_of_registers(capability, dim, dtype):
    found = compiled(capability, dim, dtype)
    for name, cap in CAPS[capability].items():
        assert 0 < found[name].registers <= cap, name
        assert found[name].num_warps == {1024: 4, 4096: 16}[max(dim, 1024)]


@pytest.mark.parametrize("capability", CAPS)
def test_long_groups_leave_partial_sums_in_float32_and_a_small_kernel_adds_them(capability):
    found = compiled(capability, 768, torch.bfloat16, groups=4)
    assert found["backward_kernel"].stores == {128: 1 + 2 * 2}  # dx; partial dgamma and dbeta
    assert set(found["reduce_kernel"].loads) == {128}
    for kernel in found.values():
        assert kernel.local_bytes == 0
        assert kernel.atomics == []
        assert kernel.narrow_arithmetic() == []


@each_build
def test_all_arithmetic_is_float32(capability, dim, dtype):
    for kernel in compiled(capability, dim, dtype).values():
        assert re.search(r"arith\.addf .*xf32>", kernel.ttir)
        assert kernel.narrow_arithmetic() == []


def test_one_is_added_to_a_bfloat16_scale_in_float32():
    added = re.compile(r"arith\.addf .* : tensor<1x1024xf32>")
    with_one = compiled(80, 768, torch.bfloat16)
    without = compiled(80, 768, torch.bfloat16, plus_one=False)
    for name in ("forward_kernel", "backward_kernel"):
        additions = [len(added.findall(found[name].ttir)) for found in (with_one, without)]
        assert additions[0] == additions[1] + 1


@pytest.mark.parametrize("capability", [80, 90])
def test_bfloat16_results_are_rounded_to_nearest(capability):
    # The interpreter of Triton 3.9 cuts them off instead, so only the compiled code can show it.
    for kernel in compiled(capability, 768, torch.bfloat16).values():
        rounded = re.findall(r"cvt\.(r\w+)\.bf16", kernel.ptx)
        assert set(rounded) == {"rn"}, kernel.name


def test_the_offset_of_a_row_has_64_bits():
    # A tensor may have more than 2^31 elements, of which this machine holds none.
    start_of_row = re.compile(
        r"tt\.addptr %(\w+), %\w+ : (?:!tt\.ptr<\w+>|tensor<\d+x1x!tt\.ptr<\w+>>),"
        r" (?:tensor<\d+x1x)?(i\d+)"
    )
    kernels = compiled(80, 768, torch.bfloat16, gated=True).values()
    offsets = {pair for kernel in kernels for pair in start_of_row.findall(kernel.ttir)}
    wide = {name for name, bits in offsets if bits == "i64"}
    assert {"x", "h", "gate", "gamma", "beta", "y", "x_new", "dy", "dx_new", "dx", "dh"} <= wide
    assert {name for name, bits in offsets if bits != "i64"} == {"mean", "rstd"}  # no stride


@pytest.mark.parametrize(
    ("dim", "dtype"), [(768, torch.bfloat16), (4096, torch.bfloat16), (4096, torch.float32)]
)
def test_the_gated_form_is_as_wide_and_spills_nothing(dim, dtype):
    found = compiled(80, dim, dtype, gated=True)
    wide = dtype.itemsize // 2
    forward, backward = found["forward_kernel"], found["backward_kernel"]
    assert forward.loads == {128: 5 * wide}  # x, h, gate, gamma, beta
    assert forward.stores == {128: 2 * wide, 32: 2}
    assert backward.loads == {128: 6 * wide, 32: 2}  # dy, dx', x, h, gate, gamma
    assert backward.stores == {128: 5 * wide}  # dx, dh, dgamma, dbeta, dgate
    assert max(kernel.local_bytes for kernel in found.values()) == 0
    # More than without a gate, and for good reason: two more tiles are in flight, and one more sum.
    assert forward.registers <= 40
    assert backward.registers <= 96


@pytest.mark.parametrize(
    ("dim", "row", "widths"),
    [
        (1000, 1000, {128}),  # 16 does not divide the stride of the rows, but it is known
        (768, 1536, {128}),
        (768, 769, {16, 128}),  # each row starts at another alignment; the conditions do not
    ],
)
def test_rows_without_gaps_or_with_aligned_ones_are_read_in_128_bits(dim, row, widths):
    x = empty(torch.bfloat16, 64, row)[:, :dim]
    gamma = empty(torch.bfloat16, 4, dim)
    found = compile_ahead(
        lambda: kernels.forward(x, gamma, gamma, *[None] * 2, EPS, True, True), 80
    )
    assert set(found["forward_kernel"].loads) == widths


@runs_kernels
def test_a_float32_condition_is_not_rounded_to_the_half_type_of_x():
    # float16: the interpreter cuts bfloat16 off instead of rounding it.
    x, dy = torch.randn(2, 3, 20, 100).half()
    scale, shift = torch.randn(2, 3, 100)
    (y,), (dx, *_), _ = results(on_triton(conditional_layer_norm), [x, scale, shift], [dy])
    exact = [t.double() for t in (x, scale, shift)]
    (y_64,), (dx_64, *_), _ = results(formula, exact, [dy])
    # With a condition rounded before, a fifth of the entries would differ.
    assert (y == y_64.half()).double().mean() >= 0.99
    assert (dx == dx_64.half()).double().mean() >= 0.99
