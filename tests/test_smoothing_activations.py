"""Element-wise smoothings: errors at the extremal points, convolutions, limits, derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from cln_tutorial.smoothing.activations import (
    smooth_abs,
    smooth_clip,
    smooth_relu,
    smooth_round,
    smooth_sign,
    smooth_step,
)
from cln_tutorial.smoothing.maxima import smooth_max

# What PyTorch says of itself at the first derivative in forward mode.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

inf, nan = math.inf, math.nan
RELUS = ["softplus", "swish", "gelu", "normal", "sqrt", "quadratic"]
CONVOLUTIONS = ["softplus", "normal", "sqrt", "quadratic"]
DENSITIES = ["logistic", "normal", "sqrt", "quadratic"]
DENSITY = {
    "logistic": lambda s: stats.logistic.pdf(s),
    "normal": lambda s: stats.norm.pdf(s),
    "sqrt": lambda s: 2 / (s * s + 4) ** 1.5,
    "quadratic": lambda s: 0.5 if abs(s) < 1 else 0.0,
}
ALL = (
    [lambda x, t, k=k: smooth_relu(x, t, k) for k in RELUS]
    + [lambda x, t, k=k: smooth_abs(x, t, k) for k in RELUS]
    + [lambda x, t, k=k: smooth_step(x, t, k) for k in DENSITIES]
    + [lambda x, t, k=k: smooth_sign(x, t, k) for k in DENSITIES]
    + [lambda x, t, k=k: smooth_clip(x, -0.7, 1.2, t, k) for k in CONVOLUTIONS]
    + [smooth_round]
)
NAMES = (
    [f"relu-{k}" for k in RELUS]
    + [f"abs-{k}" for k in RELUS]
    + [f"step-{k}" for k in DENSITIES]
    + [f"sign-{k}" for k in DENSITIES]
    + [f"clip-{k}" for k in CONVOLUTIONS]
    + ["round"]
)
each = pytest.mark.parametrize("function", ALL, ids=NAMES)


def hard(name, x):
    kind = name.split("-")[0]
    if kind == "step":
        return (x.sign() + 1) / 2
    if kind == "clip":
        return x.clamp(-0.7, 1.2)
    return {"relu": x.relu, "abs": x.abs, "sign": x.sign, "round": x.round}[kind]()


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(*shape, seed=6620):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- relu -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "gap", "at"),
    [
        ("softplus", math.log(2), 0.0),
        ("swish", special.lambertw(1 / math.e).real, 1.278465),
        ("gelu", 0.169971, 0.751792),
        ("normal", 1 / math.sqrt(2 * math.pi), 0.0),
        ("sqrt", 1.0, 0.0),
        ("quadratic", 0.25, 0.0),
    ],
)
@pytest.mark.parametrize("tau", [1e-3, 1.0, 40.0])
def test_the_largest_error_of_each_relu_is_the_documented_one(kind, gap, at, tau):
    def error(s):
        x = double(s * tau)
        return (smooth_relu(x, tau, kind) - x.relu()).abs().item() / tau

    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    errors = (smooth_relu(grid * tau, tau, kind) - (grid * tau).relu()).abs() / tau
    assert errors.max().item() <= gap + 1e-6
    assert grid[errors.argmax()].abs().item() == pytest.approx(at, abs=2e-3)
    for sign in (-1, 1):
        found = optimize.minimize_scalar(
            lambda s, sign=sign: -error(sign * s), (max(at - 0.1, -1), at, at + 0.1), tol=1e-12
        )
        best = max(-found.fun, error(at))
        assert best == pytest.approx(gap, abs=5e-7)


def test_swish_is_off_by_lamberts_function_of_one_over_e():
    gap = special.lambertw(1 / math.e).real
    assert gap == pytest.approx(0.278465, abs=5e-7)
    x = 1 + gap
    assert x == pytest.approx(1.278465, abs=5e-7)
    for sign in (-1, 1):
        error = smooth_relu(double(sign * x), 1, "swish") - max(sign * x, 0)
        assert error.item() == pytest.approx(-gap, abs=1e-15)


@pytest.mark.parametrize(
    ("relu", "maximum"), [("softplus", "lse"), ("swish", "boltzmann"), ("quadratic", "sparse")]
)
def test_a_relu_is_the_smooth_maximum_of_a_number_and_zero(relu, maximum):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    pairs = torch.stack([x, torch.zeros_like(x)], -1)
    for tau in (0.3, 1.0, 2.0):
        expected = smooth_max(pairs, tau, kind=maximum)
        assert torch.allclose(smooth_relu(x, tau, relu), expected, rtol=1e-13, atol=1e-15)


def test_they_are_pytorchs_activations_at_temperature_one():
    x = torch.linspace(-10, 10, 401, dtype=torch.float64)
    f = torch.nn.functional
    assert torch.allclose(smooth_relu(x), x.exp().log1p(), rtol=1e-13, atol=0)
    assert torch.allclose(smooth_relu(x, kind="swish"), f.silu(x), rtol=1e-14, atol=0)
    # gelu's 1 + erf cancels far left; there only the absolute error is small.
    assert torch.allclose(smooth_relu(x, kind="gelu"), f.gelu(x), rtol=0, atol=1e-14)


def test_two_approximations_of_gelu_are_off_as_published():
    x = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    exact = smooth_relu(x, kind="gelu")
    by_tanh = (torch.nn.functional.gelu(x, approximate="tanh") - exact).abs()
    assert by_tanh.max().item() == pytest.approx(4.73e-4, abs=5e-7)
    assert x[by_tanh.argmax()].abs().item() == pytest.approx(2.70, abs=5e-3)
    by_sigmoid = (smooth_relu(1.702 * x, kind="swish") / 1.702 - exact).abs()
    assert by_sigmoid.max().item() == pytest.approx(0.02033, abs=5e-6)


def test_gelu_is_not_relu_smoothed_by_a_normal_density():
    x, tau = torch.linspace(-4, 4, 81, dtype=torch.float64), 0.8
    lacking = smooth_relu(x, tau, "normal") - smooth_relu(x, tau, "gelu")
    phi = torch.exp(-((x / tau) ** 2) / 2) / math.sqrt(2 * math.pi)
    assert torch.allclose(lacking, tau * phi, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("relu", "density"), list(zip(CONVOLUTIONS, DENSITIES, strict=True)))
def test_relu_step_and_density_are_convolutions_and_derivatives_of_each_other(relu, density):
    tau = 0.6
    x = double(-1.3, -0.2, 0.4, 1.7).requires_grad_()
    value = smooth_relu(x, tau, relu)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    step = smooth_step(x, tau, density)
    assert torch.allclose(slope, step, rtol=1e-12, atol=1e-14)
    (curvature,) = torch.autograd.grad(step.sum(), x)
    for n, at in enumerate(x.tolist()):
        phi = DENSITY[density](at / tau) / tau
        assert curvature[n].item() == pytest.approx(phi, rel=1e-12)
        # By quadrature: the integral of relu(x - u) phi(u), over the side where it is not zero.
        edges = [v for v in (-tau, tau) if v < at] if relu == "quadratic" else None
        low = -tau if relu == "quadratic" else -inf
        if low < at:
            integral = integrate.quad(
                lambda u, at=at: (at - u) * DENSITY[density](u / tau) / tau,
                low,
                at if relu != "quadratic" else min(at, tau),
                points=edges,
                epsabs=1e-11,
            )[0]
        else:
            integral = 0.0
        assert value[n].item() == pytest.approx(integral, abs=1e-8)
    signs = smooth_sign(x, tau, density)
    assert torch.allclose(signs, 2 * step - 1, rtol=0, atol=1e-15)
    (of_abs,) = torch.autograd.grad(smooth_abs(x, tau, relu).sum(), x)
    assert torch.allclose(of_abs, signs, rtol=1e-12, atol=1e-14)


@settings(deadline=None)
@given(
    x=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20),
    power=st.floats(-6, 6),
    kind=st.sampled_from(CONVOLUTIONS),
)
def test_convolutions_rise_and_lie_above_by_at_most_the_gap(x, power, kind):
    tau = 10.0**power
    gap = {
        "softplus": math.log(2),
        "normal": 1 / math.sqrt(2 * math.pi),
        "sqrt": 1.0,
        "quadratic": 0.25,
    }[kind]
    x = double(*sorted(x))
    y = smooth_relu(x, tau, kind)
    allowed = 1e-14 * (x.abs().max().item() + tau)
    assert (y.diff() >= -allowed).all()
    assert (y - x.relu() >= -allowed).all()
    assert (y - x.relu() <= gap * tau + allowed).all()
    # And the identity of all of them, on which clipping stands.
    assert (y - smooth_relu(-x, tau, kind) - x).abs().max() <= 4 * allowed


def test_the_left_tail_keeps_its_digits():
    def digits(value):  # of the number itself, however small
        return pytest.approx(value, rel=1e-11, abs=0)

    assert smooth_relu(double(-30.0)).item() == digits(math.log1p(math.exp(-30)))
    assert smooth_relu(double(-30.0), kind="swish").item() == digits(-30 / (1 + math.exp(30)))
    assert smooth_relu(double(-9.0), kind="gelu").item() == digits(-9 * stats.norm.cdf(-9))
    assert smooth_relu(double(-1e6), kind="sqrt").item() == digits(1e-6)
    assert 5e5 * (math.sqrt(1 + 4e-12) - 1) != pytest.approx(1e-6, rel=1e-5, abs=0)
    assert smooth_step(double(-1e6), kind="sqrt").item() == digits(1e-12)
    assert smooth_step(double(-9.0), kind="normal").item() == digits(stats.norm.cdf(-9))
    assert smooth_step(double(-30.0)).item() == digits(math.exp(-30) / (1 + math.exp(-30)))


# --- absolute value, sign, step -------------------------------------------------------------------


def test_closed_forms_of_the_absolute_value():
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for tau in (0.4, 2.0):
        found = smooth_abs(x, tau, "sqrt")
        assert torch.allclose(found, (x**2 + 4 * tau**2).sqrt(), rtol=1e-14, atol=0)
        found = smooth_abs(x, tau, "swish")
        assert torch.allclose(found, x * torch.tanh(x / (2 * tau)), rtol=1e-12, atol=1e-15)
        assert smooth_abs(double(0.0), tau).item() == pytest.approx(2 * tau * math.log(2))


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("logistic", lambda s: 2 * (-s).exp()),
        ("normal", lambda s: (-(s**2) / 2).exp()),
        ("sqrt", lambda s: 2 / s**2),
        ("quadratic", lambda s: (s < 1).double()),
    ],
)
def test_the_error_of_the_sign_falls_as_documented(kind, bound):
    s = torch.linspace(0.01, 30, 3000, dtype=torch.float64)
    for tau in (1e-3, 1.0):
        for sign in (-1, 1):
            error = (smooth_sign(sign * s * tau, tau, kind) - sign).abs()
            assert (error <= bound(s) + 1e-15).all()
            half = (smooth_step(sign * s * tau, tau, kind) - (sign + 1) / 2).abs()
            assert torch.allclose(half, error / 2, rtol=0, atol=1e-15)


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1e-3, 0.02, 0.1, 1.0, 1e6])
def test_rounding_keeps_whole_numbers_and_halves_and_rises(tau):
    whole = torch.arange(-5, 6, dtype=torch.float64)
    assert (smooth_round(whole, tau) - whole).abs().max() < 1e-14
    assert (smooth_round(whole + 0.5, tau) - whole - 0.5).abs().max() < 1e-14
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    y = smooth_round(x, tau)
    assert (y.diff() >= -1e-14).all()
    distance = (x - x.floor() - 0.5).abs()
    nearest = torch.where(distance == 0, y, x.round())
    assert ((y - nearest).abs() <= (-distance / tau).exp() + 1e-14).all()
    if tau >= 1:
        assert (y - x).abs().max() < 5e-3


def test_rounding_has_the_same_slope_on_both_sides_of_a_whole_number():
    x = (double(2.0) + torch.tensor([-1e-9, 1e-9])).requires_grad_()
    (slope,) = torch.autograd.grad(smooth_round(x, 0.2).sum(), x)
    exact = (1 / 0.4) / math.cosh(0.5 / 0.4) ** 2 / (2 * math.tanh(0.5 / 0.4))
    assert slope.tolist() == pytest.approx([exact, exact], rel=1e-7)


def test_huge_numbers_are_whole_already():
    x = torch.tensor([1e30, -1e30, 2.0**24, 16777217.0])
    for tau in (1e-30, 0.1, 1e30):
        assert smooth_round(x, tau).equal(x)


# --- clipping -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    x=st.lists(st.floats(-1e30, 1e30) | st.floats(-5, 5), min_size=2, max_size=20),
    tau=st.floats(1e-3, 1e3),
    kind=st.sampled_from(CONVOLUTIONS),
)
def test_clipping_stays_between_the_bounds_and_rises(x, tau, kind):
    x = double(*sorted(x))
    y = smooth_clip(x, -1, 2, tau, kind)
    # Differences of two relus as large as the temperature.
    allowed = 1e-14 * (3 + tau)
    assert (y >= -1 - allowed).all()
    assert (y <= 2 + allowed).all()
    assert (y.diff() >= -allowed).all()


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_clipping_far_away_reaches_the_bounds(kind):
    for far in (1e8, 1e30):
        x = double(-far, far)
        assert smooth_clip(x, -1, 2, 0.5, kind).tolist() == pytest.approx([-1, 2], abs=1e-7)
    gap = {
        "softplus": math.log(2),
        "normal": 1 / math.sqrt(2 * math.pi),
        "sqrt": 1.0,
        "quadratic": 0.25,
    }[kind]
    x = torch.linspace(-50, 50, 2001, dtype=torch.float64)
    error = (smooth_clip(x, -20, 20, 0.5, kind) - x.clamp(-20, 20)).abs()
    assert error.max().item() == pytest.approx(0.5 * gap, rel=0.02)


# --- all of them ----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("temperature", [0, 0.0, torch.tensor(0.0, dtype=torch.float64)])
def test_at_temperature_zero_it_is_the_hard_function_with_its_gradient(
    function, temperature, request
):
    name = next(n for n in NAMES if request.node.callspec.id.endswith(n))
    x = double(-2.6, -0.3, 0.0, 0.4, 1.0, 3.5).requires_grad_()
    y = function(x, temperature)
    assert y.equal(hard(name, x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    smooth = double(-2.6, -0.3, 0.4, 1.0, 3.6).requires_grad_()
    (expected,) = torch.autograd.grad(hard(name, smooth).sum(), smooth)
    assert gradient.isfinite().all()
    assert gradient[[0, 1, 3, 4, 5]].equal(expected)


@each
def test_a_low_temperature_is_near_the_hard_function(function, request):
    name = next(n for n in NAMES if request.node.callspec.id.endswith(n))
    x = double(-2.6, -0.3, 0.4, 1.1, 3.6)
    for tau in (1e-8, 1e-30):
        # The slowest tail is that of the square root: twice tau^2 / x^2, and tau^2 / x.
        assert (function(x, tau) - hard(name, x)).abs().max() <= 2e-8


@each
def test_values_and_gradients_are_finite_at_all_extremes(function):
    x = torch.tensor([0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, -1e30], requires_grad=True)
    for tau in (1e-30, 1e-6, 1.0, 1e6, 1e30):
        for temperature in (tau, torch.tensor(tau, requires_grad=True)):
            y = function(x, temperature)
            assert y.isfinite().all()
            inputs = [x, temperature] if isinstance(temperature, torch.Tensor) else [x]
            for gradient in torch.autograd.grad(y.sum(), inputs):
                assert gradient.isfinite().all()


@each
def test_first_and_second_derivatives_in_number_and_temperature(function):
    # Away from the kinks of the quadratic kind, at -tau and tau, and of its clipping. At a whole
    # number the slope of rounding has one.
    x = double(-2.31, -0.83, -0.11, 0.0, 0.27, 0.94, 2.63)
    x = (x + 0.05 * (function is smooth_round)).requires_grad_()
    tau = torch.full((7,), 0.45, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, tau), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, tau))


@each
def test_forward_mode_agrees_with_backward_mode(function):
    x, tau, direction = seeded(9), 0.5, seeded(9, seed=1)

    def at(x):
        return function(x, tau)

    value, forward = torch.func.jvp(at, (x,), (direction,))
    backward = torch.func.vmap(torch.func.grad(at))(x) * direction
    assert value.equal(at(x))
    assert torch.allclose(forward, backward, rtol=1e-12, atol=1e-15)


@each
def test_infinite_numbers_give_the_limit_and_no_nan_in_the_gradient(function, request):
    name = next(n for n in NAMES if request.node.callspec.id.endswith(n))
    x = double(-inf, inf, 0.3, nan).requires_grad_()
    y = function(x, 0.5)
    assert y[:2].equal(hard(name, x)[:2])
    assert y[3].isnan()
    (gradient,) = torch.autograd.grad(y[:3].sum(), x)
    assert gradient[:3].isfinite().all()
    alone = function(double(0.3), 0.5)
    assert y[2:3].equal(alone)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_types_are_computed_wide_and_rounded_once(function, dtype):
    x = (2 * seeded(500)).to(dtype)
    y = function(x, 0.3)
    assert y.dtype == dtype
    assert y.equal(function(x.float(), 0.3).to(dtype))
    # Strides do not matter, nor do other axes.
    assert function(x.view(20, 25).T, 0.3).equal(y.view(20, 25).T)
    assert function(x[:0], 0.3).shape == (0,)


@each
def test_a_temperature_may_differ_between_elements(function):
    x, tau = seeded(3, 4), double(0.0, 0.1, 1.0, 5.0)
    y = function(x, tau)
    for n, t in enumerate(tau.tolist()):
        assert torch.allclose(y[:, n], function(x[:, n], t), rtol=1e-14, atol=1e-16)


def test_bad_arguments_are_refused_with_what_was_wanted(unchecked):
    x = torch.zeros(2, 3)
    functions = [smooth_relu, smooth_abs, smooth_sign, smooth_step, smooth_round]
    functions.append(lambda x, *t: smooth_clip(x, 0, 1, *t))
    for function in functions:
        with pytest.raises(TypeError, match=r"`x` must be a tensor of floating numbers; got"):
            function(torch.zeros(2, dtype=torch.int64))
        for tau in (-1.0, nan, inf, torch.tensor(-1.0)):
            with pytest.raises(ValueError, match="`temperature` must be finite and at least 0"):
                function(x, tau)
        with pytest.raises(ValueError, match=r"`temperature` must broadcast to \(2, 3\)"):
            function(x, torch.ones(2, 1, 3))
    for function in (smooth_relu, smooth_abs, smooth_sign, smooth_step):
        with pytest.raises(ValueError, match=r"`kind` must be one of .*; got 'cubic'"):
            function(x, 1.0, "cubic")
    with pytest.raises(ValueError, match=r"`kind` must be one of .*; got 'swish'"):
        smooth_clip(x, 0, 1, 1.0, "swish")
    for low, high in ((1, 0), (-inf, 0), (0, nan)):
        with pytest.raises(ValueError, match="`min` and `max` must be finite and in order"):
            smooth_clip(x, low, high)


def test_autocast_does_not_change_a_value():
    x = seeded(50).float()
    for function in ALL:
        plain = function(x, 0.3)
        with torch.autocast("cpu", torch.bfloat16):
            assert function(x, 0.3).equal(plain)


def test_the_compiler_takes_each_function_whole(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import torch
from cln_tutorial.smoothing import activations as a
functions = [lambda x, t, k=k, f=f: f(x, t, k) for f in (a.smooth_relu, a.smooth_abs)
             for k in ("softplus", "swish", "gelu", "normal", "sqrt", "quadratic")]
functions += [lambda x, t, k=k, f=f: f(x, t, k) for f in (a.smooth_step, a.smooth_sign)
              for k in ("logistic", "normal", "sqrt", "quadratic")]
functions += [lambda x, t: a.smooth_clip(x, -1, 1, t), a.smooth_round]
x = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
def together(x, t):
    return torch.stack([f(x, t) for f in functions])
t = torch.linspace(0, 2, 9, dtype=torch.float64)
found = []
for f in (together, torch.compile(together, fullgraph=True, backend="aot_eager")):
    y = x.clone().requires_grad_()
    value = f(y, t)
    found.append((value, torch.autograd.grad(value.square().sum(), y)[0]))
for plain, of_compiler in zip(*found):
    torch.testing.assert_close(plain, of_compiler, rtol=1e-13, atol=1e-15)
print("done", len(functions))
"""
    assert child_output(code).split() == ["done", "22"]
