"""The optimisers of the sphere: against recursions by hand and geoopt, and PyTorch's customs."""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from cln_tutorial.spherical_embedding.geometry import UnitNorm, geodesic_distance, random_unit
from cln_tutorial.spherical_embedding.optimisers import (
    SphereAdam,
    SphereSGD,
    adam_update,
    sgd_update,
)

with warnings.catch_warnings():  # it scripts functions as it is imported
    warnings.simplefilter("ignore", DeprecationWarning)
    import geoopt

BOTH = [SphereSGD, SphereAdam]
HALF = [torch.bfloat16, torch.float16]
uncheck = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(7063)


def unit_parameter(*shape, dtype=torch.float64):
    return nn.Parameter(random_unit(*shape, dtype=dtype))


def bowl(dim, dtype=torch.float64):
    """A smooth function of the rows whose gradient has parts in all directions."""
    a = torch.randn(dim, dim, dtype=dtype)
    b = torch.randn(dim, dtype=dtype)
    return lambda x: ((x @ a) * x).sum() / 2 - (x @ b).sum() + (x @ b).cos().sum()


def run(optimiser, parameters, function, steps=20):
    for _ in range(steps):
        optimiser.zero_grad()
        sum(function(p) for p in parameters).backward()
        optimiser.step()


def with_gradient(x, gradient):
    x = nn.Parameter(x.clone())
    x.grad = gradient.clone()
    return x


def project(x, g):
    return g - (x * g).sum(-1, keepdim=True) * x


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# --- against recursions by hand -------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("factor", ["none", "jose"])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0, 0, False), (0.9, 0, False), (0.9, 0, True), (0.9, 0.3, False)],
)
def test_sgd_is_the_recursion_of_the_article_with_transported_momentum(
    momentum, dampening, nesterov, factor, maximize
):
    p, function = unit_parameter(6, 5), bowl(5)
    x, buffer = p.detach().clone(), None
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    optimiser = SphereSGD([p], lr=0.05, factor=factor, maximize=maximize, **options)
    run(optimiser, [p], function)
    for _ in range(20):
        x.requires_grad_()
        (g,) = torch.autograd.grad(function(x), x)
        x, g = x.detach(), -g if maximize else g
        phi = 1 + (x * g).sum(-1, keepdim=True) / g.norm(dim=-1, keepdim=True)
        direction = (phi if factor == "jose" else 1) * project(x, g)
        # As in PyTorch the first gradient is not dampened.
        first = buffer is None
        buffer = direction if first else momentum * buffer + (1 - dampening) * direction
        z = direction + momentum * buffer if nesterov else buffer if momentum else direction
        x = unit(x - 0.05 * z)
        buffer = project(x, buffer)
    # Twenty steps of numbers below one, each rounded to 1e-16.
    assert torch.allclose(p, x, rtol=0, atol=2e-15)


def test_one_step_without_momentum_is_the_articles_line_to_the_last_digit():
    x, g = random_unit(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    p = with_gradient(x, g)
    SphereSGD([p], lr=0.1).step()
    assert torch.allclose(p, unit(x - 0.1 * project(x, g)), rtol=0, atol=4e-16)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("second_moment", ["row", "element"])
def test_adam_is_its_recursion_with_transported_momentum(second_moment, amsgrad):
    p, function = unit_parameter(6, 5), bowl(5)
    x = p.detach().clone()
    m, v, largest = torch.zeros_like(x), 0, torch.zeros(())
    options = {"second_moment": second_moment, "amsgrad": amsgrad, "betas": (0.8, 0.95)}
    run(SphereAdam([p], lr=0.05, eps=1e-3, **options), [p], function)
    for t in range(1, 21):
        x.requires_grad_()
        (g,) = torch.autograd.grad(function(x), x)
        x = x.detach()
        g = project(x, g)
        square = g.square().sum(-1, keepdim=True) if second_moment == "row" else g.square()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * square
        largest = torch.maximum(largest, v)
        second = (largest if amsgrad else v) / (1 - 0.95**t)
        z = project(x, m / (1 - 0.8**t) / (second.sqrt() + 1e-3))
        x = unit(x - 0.05 * z)
        m = project(x, m)
    assert torch.allclose(p, x, rtol=0, atol=1e-14)


def test_without_memory_adam_makes_steps_of_one_length():
    x = random_unit(50, 7, dtype=torch.float64)
    p = with_gradient(x, torch.randn(50, 7, dtype=torch.float64))
    SphereAdam([p], lr=0.3, betas=(0.0, 0.0), eps=0, retraction="exp").step()
    assert torch.allclose(geodesic_distance(x, p), torch.tensor(0.3).double(), rtol=1e-7, atol=0)


# --- against geoopt -------------------------------------------------------------------------------


def geoopt_twin(p, manifold):
    return geoopt.ManifoldParameter(p.detach().clone(), manifold=manifold())


@pytest.mark.parametrize(
    ("retraction", "manifold", "momentum", "nesterov"),
    [
        ("projection", geoopt.Sphere, 0, False),
        ("projection", geoopt.Sphere, 0.9, False),
        ("projection", geoopt.Sphere, 0.9, True),
        ("exp", geoopt.SphereExact, 0, False),  # with momentum it transports in parallel
    ],
)
def test_sgd_is_riemannian_sgd_of_geoopt(retraction, manifold, momentum, nesterov):
    p, function = unit_parameter(6, 5), bowl(5)
    twin = geoopt_twin(p, manifold)
    options = {"momentum": momentum, "nesterov": nesterov}
    theirs = geoopt.optim.RiemannianSGD([twin], lr=0.05, **options)
    if momentum:  # geoopt would begin with the gradient in space, multiplied by the momentum
        theirs.state[twin]["momentum_buffer"] = torch.zeros_like(p)
    run(theirs, [twin], function)
    run(SphereSGD([p], lr=0.05, retraction=retraction, **options), [p], function)
    assert torch.allclose(p, twin, rtol=0, atol=2e-15)


def test_the_exponential_map_takes_another_way_than_the_projection():
    p, function = unit_parameter(6, 5), bowl(5)
    other = nn.Parameter(p.detach().clone())
    run(SphereSGD([p], lr=0.05), [p], function)
    run(SphereSGD([other], lr=0.05, retraction="exp"), [other], function)
    assert 1e-5 < (p - other).abs().max() < 1e-1  # geoopt's two differ by 1.3e-3 on its example


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_with_a_moment_per_row_is_riemannian_adam_of_geoopt(amsgrad):
    p, function = unit_parameter(6, 5), bowl(5)
    twin = geoopt_twin(p, geoopt.Sphere)
    run(geoopt.optim.RiemannianAdam([twin], lr=0.05, amsgrad=amsgrad), [twin], function)
    run(SphereAdam([p], lr=0.05, amsgrad=amsgrad), [p], function)
    assert torch.allclose(p, twin, rtol=0, atol=1e-12)


# --- invariants -----------------------------------------------------------------------------------


def turned_run(make):
    """How far a run in turned coordinates ends from the turned end of the run."""
    p, function = unit_parameter(6, 5), bowl(5)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    q = nn.Parameter(p.detach() @ turn)
    run(make([p]), [p], function)
    run(make([q]), [q], lambda x: function(x @ turn.T))
    return (p @ turn - q).abs().max().item()


@pytest.mark.parametrize("retraction", ["projection", "exp"])
@pytest.mark.parametrize("factor", ["none", "jose"])
def test_turned_coordinates_turn_the_run_of_sgd_and_of_adam_with_a_moment_per_row(
    factor, retraction
):
    options = {"lr": 0.05, "factor": factor, "retraction": retraction}
    assert turned_run(lambda params: SphereSGD(params, momentum=0.9, **options)) < 1e-13
    assert turned_run(lambda params: SphereAdam(params, **options)) < 1e-13


def test_a_moment_per_entry_prefers_the_axes():
    assert turned_run(lambda p: SphereAdam(p, lr=0.05, second_moment="element")) > 1e-3


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: SphereSGD(p, lr=0.3, momentum=0.9), "momentum_buffer"),
        (lambda p: SphereSGD(p, lr=0.3, momentum=0.9, retraction="exp"), "momentum_buffer"),
        (lambda p: SphereAdam(p, lr=0.3), "exp_avg"),
        (lambda p: SphereAdam(p, lr=0.3, second_moment="element"), "exp_avg"),
    ],
)
def test_after_every_step_the_momentum_is_tangent_where_the_point_is(make, key):
    p, function = unit_parameter(6, 5), bowl(5)
    optimiser = make([p])
    for _ in range(5):
        run(optimiser, [p], function, steps=1)
        momentum = optimiser.state[p][key]
        assert momentum.norm(dim=-1).min() > 0.01
        assert (p * momentum).sum(-1).abs().max() < 1e-14


@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    length=st.integers(2, 9),
    dim=st.integers(-3, 2),
    lr=st.sampled_from([1e-3, 0.3, 10.0]),
    retraction=st.sampled_from(["projection", "exp"]),
)
@pytest.mark.parametrize("kind", BOTH)
def test_rows_along_any_axis_stay_unit_and_move_as_along_the_last(
    kind, batch, length, dim, lr, retraction
):
    if not -len(batch) - 1 <= dim <= len(batch):
        dim = 0
    x, g = random_unit(*batch, length), torch.randn(*batch, length)
    last, other = with_gradient(x, g), with_gradient(x.movedim(-1, dim), g.movedim(-1, dim))
    kind([last], lr=lr, retraction=retraction).step()
    kind([other], lr=lr, retraction=retraction, dim=dim).step()
    assert torch.allclose(other, last.movedim(-1, dim), rtol=0, atol=1e-6)
    assert torch.allclose(last.norm(dim=-1), torch.ones(()), rtol=0, atol=4e-7)


@pytest.mark.parametrize("kind", BOTH)
def test_norms_do_not_drift_in_a_thousand_steps(kind):
    p = unit_parameter(50, 100, dtype=torch.float32)
    optimiser = kind([p], lr=0.1)
    for _ in range(1000):
        p.grad = torch.randn(50, 100)
        optimiser.step()
    assert (p.double().norm(dim=-1) - 1).abs().max() < 2.5e-7  # two units; the goal is 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_a_huge_step_turns_less_than_a_right_angle_and_stays_finite(kind, dtype):
    x = random_unit(50, 10, dtype=dtype)
    p = with_gradient(x, 1e15 * torch.randn(50, 10).to(dtype))
    kind([p], lr=10).step()
    assert p.isfinite().all()
    assert (x.float() * p.float()).sum(-1).min() > -0.01  # rows of bfloat16 are tangent to 2^-8


# --- the two descriptions of one step (E1) --------------------------------------------------------


def free_run(lr, steps=50, rescaled=None):
    """Plain descent of free rows, and beside it a run on the sphere with another step size."""
    layer = nn.Embedding(4, 6, dtype=torch.float64)
    register_parametrization(layer, "weight", UnitNorm())
    theta, function = layer.parametrizations.weight.original, bowl(6)
    p = nn.Parameter(layer.weight.detach().clone())
    plain = torch.optim.SGD([theta], lr=lr)
    growth = []
    for _ in range(steps):
        squared = theta.detach().square().sum(-1)
        plain.zero_grad()
        function(layer.weight).backward()
        growth.append((squared, theta.grad.square().sum(-1)))
        plain.step()
        growth[-1] += (theta.detach().square().sum(-1),)
        for row in range(4):  # each row has its own effective step size
            size = lr / squared[row].item() if rescaled else lr
            one = nn.Parameter(p.detach()[row].clone())
            function(one[None]).backward()
            SphereSGD([one], lr=size).step()
            p.data[row] = one.detach()
    return layer.weight.detach(), p.detach(), growth


def test_the_free_norm_grows_by_the_square_of_the_step_and_never_shrinks():
    _, _, growth = free_run(lr=0.3)
    for before, gradient, after in growth:
        assert torch.allclose(after, before + 0.3**2 * gradient, rtol=1e-12, atol=0)
        assert (after > before).all()


def test_free_rows_move_as_on_the_sphere_with_the_rate_divided_by_the_squared_norm():
    free, sphere, _ = free_run(lr=0.3, rescaled=True)
    assert torch.allclose(free, sphere, rtol=0, atol=1e-12)
    free, sphere, _ = free_run(lr=0.3, rescaled=False)
    assert (free - sphere).abs().max() > 0.01


# --- what the factor does (E3, E4) ----------------------------------------------------------------

TARGETS = torch.tensor([0.0, 120.0], dtype=torch.float64).deg2rad()


def least(function, low, high):
    """The minimum of a function with one valley, by thirds."""
    while high - low > 1e-9:
        third = (high - low) / 3
        if function(low + third) < function(high - third):
            high -= third
        else:
            low += third
    return math.degrees((low + high) / 2)


ENDS = {
    "none": math.degrees(math.atan2(math.sin(TARGETS[1]), 3 + math.cos(TARGETS[1]))),
    "jose": least(lambda a: 3 * (1 - math.cos(a)) ** 2 + (1 - math.cos(TARGETS[1] - a)) ** 2, 0, 2),
}


def test_the_fixed_points_have_the_angles_of_the_closed_forms():
    assert ENDS["none"] == pytest.approx(19.107, abs=1e-3)
    assert ENDS["jose"] == pytest.approx(46.642, abs=1e-3)


@pytest.mark.parametrize("factor", ["none", "jose"])
def test_with_single_samples_the_factor_moves_the_fixed_point(factor):
    # 1000 chains; from step 500 on the mean has a standard error of 0.05 degrees (plain) by the
    # spread of a chain, 8 degrees, over the root of 1000 chains and a few independent times.
    targets = torch.stack([TARGETS.cos(), TARGETS.sin()], dim=-1)
    x = nn.Parameter(targets[:1].repeat(1000, 1))
    optimiser = SphereSGD([x], lr=0.02, factor=factor)
    angles = []
    for step in range(900):
        x.grad = -targets[(torch.rand(1000) < 0.25).long()]
        optimiser.step()
        if step >= 500:
            angles.append(torch.atan2(x.detach()[:, 1], x.detach()[:, 0]).mean())
    assert math.degrees(torch.stack(angles).mean()) == pytest.approx(ENDS[factor], abs=0.5)


def flow(factor, starts, until, step_size):
    """Angles at the given times of the descent of -cos."""
    angles = torch.tensor(starts, dtype=torch.float64)
    x = nn.Parameter(torch.stack([angles.cos(), angles.sin()], dim=-1))
    optimiser = SphereSGD([x], lr=step_size, factor=factor, retraction="exp")
    pull = torch.tensor([[-1.0, 0.0]], dtype=torch.float64).repeat(len(starts), 1)
    found = []
    for step in range(1, round(until[-1] / step_size) + 1):
        x.grad = pull
        optimiser.step()
        if any(round(time / step_size) == step for time in until):
            found.append(torch.atan2(x.detach()[:, 1], x.detach()[:, 0]))
    return torch.stack(found)


def test_without_the_factor_the_last_mile_is_linear():
    # tan(theta / 2) falls as exp(-t); Euler's steps are off by step * t / 2.
    found = flow("none", [1.0, 2.0, 3.0], [2.0, 4.0], 0.002)
    for angles, time in zip(found, (2.0, 4.0), strict=True):
        expected = torch.tensor([1.0, 2.0, 3.0]).double().div(2).tan() * math.exp(-time)
        assert torch.allclose((angles / 2).tan(), expected, rtol=0.002 * time, atol=0)


def test_with_the_factor_the_last_mile_is_the_inverse_root_of_time():
    early, late = flow("jose", [1.0, 2.0, 3.0], [50.0, 200.0], 0.05)
    # Euler's steps run ahead by half a step for each e-fold of the speed, here 8: 0.2 of 200,
    # hence 0.05 % of the root.
    expected = torch.tensor([0.07077, 0.07100, 0.07121], dtype=torch.float64)
    assert torch.allclose(late, expected, rtol=0, atol=5e-5)
    slope = (late / early).log() / math.log(4)
    assert torch.allclose(slope, torch.tensor(-0.5).double(), rtol=0, atol=0.02)


def test_far_from_the_solution_the_factor_doubles_the_speed():
    x = torch.tensor([[math.cos(3.1), math.sin(3.1)]], dtype=torch.float64)
    pull = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    moved = []
    for factor in ("none", "jose"):
        p = with_gradient(x, pull)
        SphereSGD([p], lr=1e-3, factor=factor, retraction="exp").step()
        moved.append(geodesic_distance(x, p).item())
    assert moved[1] / moved[0] == pytest.approx(1 - math.cos(3.1), rel=1e-9)


# --- sparse gradients -----------------------------------------------------------------------------


def sparse(size, rows, values):
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, size, check_invariants=True)


MADE = {
    "sgd": lambda p: SphereSGD(p, lr=0.1),
    "momentum": lambda p: SphereSGD(p, lr=0.1, momentum=0.9, factor="jose"),
    "adam": lambda p: SphereAdam(p, lr=0.1),
    "element": lambda p: SphereAdam(p, lr=0.1, second_moment="element", amsgrad=True),
}
every_kind = pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())


@every_kind
@pytest.mark.parametrize("inner", [(), (2,)], ids=["matrix", "tensor"])
def test_with_sparse_gradients_each_row_moves_as_if_it_were_alone(make, inner):
    p = unit_parameter(5, *inner, 4)
    alone = [nn.Parameter(p.detach()[row].clone()) for row in range(5)]
    optimiser, single = make([p]), [make([row]) for row in alone]
    for rows in ([0, 2], [2], [3, 2, 0], [], [0]):
        values = torch.randn(len(rows), *inner, 4, dtype=torch.float64)
        p.grad = sparse(p.shape, rows, values)
        optimiser.step()
        for row, g in zip(rows, values, strict=True):
            alone[row].grad = g
            single[row].step()
    for row in range(5):
        assert torch.allclose(p[row], alone[row], rtol=0, atol=1e-15)


@every_kind
def test_rows_without_a_gradient_keep_their_bits_and_their_state(make):
    p = unit_parameter(5, 4)
    optimiser = make([p])
    p.grad = sparse((5, 4), [0, 1, 2, 3, 4], torch.randn(5, 4, dtype=torch.float64))
    optimiser.step()
    before, state = p.detach().clone(), copy.deepcopy(optimiser.state[p])
    p.grad = sparse((5, 4), [1, 3], torch.randn(2, 4, dtype=torch.float64))
    optimiser.step()
    still = [0, 2, 4]
    assert p[still].equal(before[still])
    assert not p[[1, 3]].equal(before[[1, 3]])
    for key, value in state.items():
        assert optimiser.state[p][key][still].equal(value[still])


@every_kind
def test_a_row_that_comes_twice_gets_the_sum_and_all_rows_are_the_dense_step(make):
    x, g = random_unit(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    thin, dense = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    ours, reference = make([thin]), make([dense])
    for _ in range(3):
        thin.grad = sparse((3, 4), [0, 1, 2, 0, 1, 2], g)
        dense.grad = g[:3] + g[3:]
        ours.step()
        reference.step()
    assert torch.allclose(thin, dense, rtol=0, atol=1e-15)


def test_an_embedding_with_sparse_gradients_trains():
    table = nn.Embedding(6, 3, sparse=True)
    with pytest.warns(UserWarning, match="not unit"):
        optimiser = SphereAdam(table.parameters(), lr=0.05)
    target = random_unit(3)
    for _ in range(200):
        optimiser.zero_grad()
        (1 - table(torch.tensor([1, 4, 4])) @ target).sum().backward()
        optimiser.step()
    near = (table.weight @ target)[[1, 4]]
    assert (near > 0.99).all()


def test_sparse_gradients_that_cut_through_rows_are_refused():
    for dim, grad in [(0, sparse((3, 4), [0], torch.ones(1, 4))), (1, torch.eye(3, 4).to_sparse())]:
        p = unit_parameter(3, 4, dtype=torch.float32)
        p.data = p.data if dim else unit(p.data.T).T.contiguous()
        p.grad = grad
        with pytest.raises(ValueError, match="sparse gradient of parameter 0 must be sparse along"):
            SphereSGD([p], lr=0.1, dim=dim).step()
    p = unit_parameter(3, 4, dtype=torch.float32)
    p.grad = sparse((3, 4), [0], torch.ones(1, 4))
    with pytest.raises(ValueError, match="`dampening` must be 0 with sparse gradients"):
        SphereSGD([p], lr=0.1, momentum=0.9, dampening=0.5).step()


# --- 16 bits, autocast, files ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("make", "update"), [(MADE["momentum"], "sgd"), (MADE["adam"], "adam")])
def test_parameters_of_16_bits_are_updated_in_float32_and_rounded_once(make, update, dtype):
    x, g = random_unit(20, 32, dtype=dtype), torch.randn(20, 32).to(dtype)
    p = with_gradient(x, g)
    optimiser = make([p])
    optimiser.step()
    zero, one = torch.zeros(20, 32), torch.zeros(20, 1)
    if update == "sgd":
        options = {"lr": 0.1, "momentum": 0.9, "factor": "jose"}
        moved, *state = sgd_update(g.float(), x.float(), zero, **options)
    else:
        moved, *state = adam_update(g.float(), x.float(), one, zero, one, lr=0.1)
    assert p.equal(moved.to(dtype))
    for kept, exactly in zip(optimiser.state[p].values(), state, strict=True):
        assert kept.dtype == torch.float32
        assert kept.equal(exactly)


@every_kind
def test_under_autocast_the_state_stays_float32(make):
    p, a = unit_parameter(6, 5, dtype=torch.float32), torch.randn(5, 5)
    optimiser = make([p])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            optimiser.zero_grad()
            (p @ a).float().square().sum().backward()
            optimiser.step()
    assert p.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in optimiser.state[p].values())
    assert torch.allclose(p.norm(dim=-1), torch.ones(()), rtol=0, atol=4e-7)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_run_goes_on_bit_for_bit_from_its_state_dict(make, dtype):
    p, function = unit_parameter(6, 5, dtype=dtype), bowl(5, dtype)
    optimiser = make([p])
    run(optimiser, [p], function, steps=3)
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    other = make([q])
    other.load_state_dict(torch.load(file))
    shared = make([r := nn.Parameter(p.detach().clone())])
    shared.load_state_dict(optimiser.state_dict())  # whose tensors the first run changes
    for o, t in [(optimiser, p), (other, q), (shared, r)]:
        run(o, [t], function, steps=3)
        for key, value in optimiser.state[p].items():
            assert o.state[t][key].equal(value)
            assert o.state[t][key].dtype == torch.promote_types(dtype, torch.float32)
        assert t.equal(p)


def test_a_state_with_options_that_are_refused_changes_nothing():
    p = unit_parameter(3, 4)
    optimiser = SphereSGD([p], lr=0.1)
    state = torch.optim.SGD([p], lr=0.2, weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0; got 0.1"):
        optimiser.load_state_dict(state)
    assert optimiser.param_groups[0]["lr"] == 0.1


# --- many parameters ------------------------------------------------------------------------------


@every_kind
def test_several_parameters_as_one_matrix_move_as_one_by_one(make):
    shapes = [((4, 5), torch.float32), ((5,), torch.float32), ((2, 3, 5), torch.float32)]
    shapes += [((4, 7), torch.float32), ((3, 5), torch.float64), ((3, 5), torch.bfloat16)]
    single = [unit_parameter(*shape, dtype=dtype) for shape, dtype in shapes]
    single += [unit_parameter(6, 5, dtype=torch.float32), unit_parameter(0, 5, dtype=torch.float32)]
    together = copy.deepcopy(single)
    one, all_at_once = make(single), make(together)
    for group in all_at_once.param_groups:
        group["foreach"] = True
    for step in range(4):
        for p, q in zip(single, together, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        single[0].grad = together[0].grad = None if step == 0 else together[0].grad
        for p in (single[6], together[6]):
            p.grad = sparse((6, 5), [1, 4], single[0].data[:2] + 1)
        one.step()
        all_at_once.step()
    for p, q in zip(single, together, strict=True):
        # Sums may be taken in another order.
        assert torch.allclose(p, q, rtol=0, atol=4 * torch.finfo(p.dtype).eps)


def test_one_matrix_keeps_the_first_undampened_gradient_of_each_parameter():
    single = [unit_parameter(4, 5) for _ in range(2)]
    together = copy.deepcopy(single)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    one, all_at_once = SphereSGD(single, **options), SphereSGD(together, foreach=True, **options)
    for step in range(3):
        for p, q in zip(single[step == 0 :], together[step == 0 :], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        all_at_once.step()
    for p, q in zip(single, together, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-15)


def test_both_updates_map_over_a_batch_of_problems():
    g, x = torch.randn(4, 3, 5).double(), random_unit(4, 3, 5, dtype=torch.float64)
    m, v, step = project(x, torch.randn_like(x)), torch.rand(4, 3, 1).double(), torch.ones(4, 3, 1)

    def sgd(*rows):
        return sgd_update(*rows, lr=0.1, momentum=0.9, factor="jose", nesterov=True)

    for update, rows in [(sgd, (g, x, m)), (adam_update, (g, x, step.double(), m, v))]:
        mapped = torch.vmap(update)(*rows)
        looped = zip(*[update(*each) for each in zip(*rows, strict=True)], strict=True)
        for value, exactly in zip(mapped, looped, strict=True):
            assert torch.allclose(value, torch.stack(exactly), rtol=0, atol=1e-15)


def test_compiled_without_a_break_both_updates_are_the_same(child_output):
    code = """
        import torch
        from cln_tutorial.spherical_embedding.geometry import random_unit, tangent_project
        from cln_tutorial.spherical_embedding.optimisers import adam_update, sgd_update
        torch.manual_seed(0)
        cases = []
        for retraction in ("projection", "exp"):
            for factor in ("none", "jose"):
                cases.append((sgd_update, 0, dict(momentum=0.9, factor=factor, nesterov=True,
                                                  retraction=retraction)))
        cases.append((adam_update, 1, {}))
        cases.append((adam_update, 5, dict(factor="jose")))
        for update, width, options in cases:
            compiled = torch.compile(update, fullgraph=True, backend="eager")
            for rows in (4, 7):
                x = random_unit(rows, 5, dtype=torch.float64)
                g, m = torch.randn_like(x), tangent_project(x, torch.randn_like(x))
                v, step = torch.rand(rows, width).double(), torch.ones(rows, 1).double()
                given = (g, x, step, m, v, v) if width else (g, x, m)
                for lr in (0.1, 0.05):
                    expected = update(*given, lr=lr, **options)
                    for a, b in zip(compiled(*given, lr=lr, **options), expected, strict=True):
                        assert torch.allclose(a, b, rtol=0, atol=1e-14)
        g, x = torch.randn(4, 5), random_unit(4, 5)
        fused = torch.compile(sgd_update, fullgraph=True)(g, x, lr=0.1)[0]
        assert torch.allclose(fused, sgd_update(g, x, lr=0.1)[0], rtol=0, atol=4e-7)
    """
    child_output(code, "error", "ignore::DeprecationWarning")


# --- PyTorch's customs ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_ascending_is_descending_the_negative(kind):
    p, function = unit_parameter(6, 5), bowl(5)
    q = nn.Parameter(p.detach().clone())
    run(kind([p], lr=0.1, factor="jose"), [p], function)
    run(kind([q], lr=0.1, factor="jose", maximize=True), [q], lambda x: -function(x))
    assert p.equal(q)


@pytest.mark.parametrize("kind", BOTH)
def test_a_closure_runs_with_gradients_and_its_value_is_returned(kind):
    p, function = unit_parameter(6, 5), bowl(5)
    optimiser = kind([p], lr=0.1)

    def closure():
        optimiser.zero_grad()
        loss = function(p)
        loss.backward()
        return loss

    before = function(p).item()
    assert optimiser.step(closure).item() == before
    assert function(p).item() < before
    assert optimiser.step() is None


@pytest.mark.parametrize("kind", BOTH)
def test_groups_have_their_own_options_may_be_empty_and_may_come_later(kind):
    first, second = unit_parameter(6, 5), nn.Parameter(unit_parameter(6, 5).detach().T.contiguous())
    optimiser = kind([{"params": [first]}, {"params": []}], lr=0.1)
    optimiser.add_param_group({"params": second, "dim": 0, "lr": 0.0})
    assert [len(group["params"]) for group in optimiser.param_groups] == [1, 0, 1]
    before = [p.detach().clone() for p in (first, second)]
    for p in (first, second):
        p.grad = torch.randn_like(p)
    optimiser.step()
    assert not first.equal(before[0])
    assert torch.allclose(second, before[1], rtol=0, atol=4e-16)
    optimiser.param_groups[2]["lr"] = torch.tensor(0.1)  # as a scheduler sets it
    optimiser.step()
    assert not torch.allclose(second, before[1], rtol=0, atol=0.01)
    assert torch.allclose(second.norm(dim=0), torch.ones(()).double())


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_without_a_gradient_rest_and_have_no_state(kind):
    p, q = unit_parameter(6, 5), unit_parameter(6, 5)
    before = q.detach().clone()
    p.grad = torch.randn_like(p)
    optimiser = kind([p, q], lr=0.1)
    optimiser.step()
    assert q.equal(before)
    assert q not in optimiser.state


def test_a_scheduler_and_a_scaler_and_a_copy_work_as_with_every_optimiser():
    p, function = unit_parameter(6, 5, dtype=torch.float32), bowl(5, torch.float32)
    optimiser = SphereSGD([p], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda epoch: 0.5**epoch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(function(p)).backward()
    scaler.step(optimiser)
    scaler.update()
    scheduler.step()
    assert optimiser.param_groups[0]["lr"] == 0.05
    twin = copy.deepcopy(optimiser)
    assert repr(twin) == repr(optimiser)


@pytest.mark.parametrize("kind", BOTH)
def test_the_step_size_may_be_a_tensor(kind):
    p, function = unit_parameter(6, 5), bowl(5)
    q = nn.Parameter(p.detach().clone())
    run(kind([p], lr=0.125), [p], function)
    run(kind([q], lr=torch.tensor(0.125)), [q], function)
    assert p.equal(q)


def test_what_adam_counts_it_counts_by_rows():
    p = unit_parameter(4, 3)
    optimiser = SphereAdam([p], lr=0.1)
    for rows in ([0, 1], [1]):
        p.grad = sparse((4, 3), rows, torch.ones(len(rows), 3).double())
        optimiser.step()
    state = optimiser.state[p]
    assert state["step"].tolist() == [[1.0], [2.0], [0.0], [0.0]]
    assert state["exp_avg"].shape == (4, 3)
    assert state["exp_avg_sq"].shape == (4, 1)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_rows_that_are_not_unit_are_normalised_with_a_warning_that_counts_them(kind):
    x = random_unit(5, 4)
    p = nn.Parameter(x.clone())
    p.data[[1, 3]] *= torch.tensor([[2.0], [0.5]])
    with pytest.warns(UserWarning, match=r"parameter 0: 2 rows \(1, 3\) are not unit .* up to 1\)"):
        kind([p], lr=0.1)
    assert torch.allclose(p, x, rtol=0, atol=2e-7)
    assert p[[0, 2, 4]].equal(x[[0, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_rows_that_are_unit_to_rounding_keep_their_bits_without_a_warning(dtype):
    for dim in (2, 100, 10_000):
        x = random_unit(20, dim, dtype=torch.float64).to(dtype)
        p = nn.Parameter(x.clone())
        SphereSGD([p], lr=0.1)
        assert p.equal(x)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", BOTH)
def test_rows_without_direction_are_refused_by_number_and_the_group_is_not_kept(kind, bad):
    good, p = unit_parameter(2, 4), nn.Parameter(2 * random_unit(3, 4))
    p.data[2] = bad
    before = p.detach().clone()
    optimiser = kind([good], lr=0.1)
    with pytest.raises(ValueError, match=r"`parameter 0` must have rows .* row 2 is zero or not"):
        optimiser.add_param_group({"params": [p]})
    assert len(optimiser.param_groups) == 1
    assert torch.allclose(p, before, rtol=0, atol=0, equal_nan=True)
    wide = nn.Parameter(torch.full((3, 2, 4), bad))
    with pytest.raises(ValueError, match=r"`table` .* 6 rows \(\(0, 0\), .*, …\) are zero"):
        kind([("table", wide)], lr=0.1)
    with pytest.raises(ValueError, match="its row is zero"):
        kind([nn.Parameter(torch.full((3,), bad))], lr=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@every_kind
def test_a_gradient_row_that_is_not_finite_raises_before_anything_moves(make, bad):
    # The square of 1e30 is infinite in float32: Adam would divide by it for ever after.
    good, p = (unit_parameter(4, 3, dtype=torch.float32) for _ in range(2))
    optimiser = make([{"params": [("good", good)]}, {"params": [("table", p)]}])
    before = [good.detach().clone(), p.detach().clone()]
    good.grad, p.grad = torch.randn(4, 3), torch.randn(4, 3)
    p.grad[2, 1] = bad
    with pytest.raises(ValueError, match=r"gradient of table must be finite.*row 2 is not"):
        optimiser.step()
    p.grad = sparse((4, 3), [3, 0], torch.tensor([[1.0, bad, 0.0], [0.0, 0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"gradient of table must be finite.*row 3 is not"):
        optimiser.step()
    assert good.equal(before[0])
    assert p.equal(before[1])
    assert not optimiser.state


@pytest.mark.parametrize("kind", BOTH)
def test_weight_decay_is_refused_with_its_reason(kind):
    p = unit_parameter(3, 4)
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0; got 0\.1.*tangent"):
        kind([p], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0; got 0\.2"):
        kind([{"params": [p], "weight_decay": 0.2}], lr=0.1)
    kind([p], lr=0.1, weight_decay=0)


@uncheck
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SphereSGD, {"lr": -0.1}, r"`lr` must be in \[0, inf\); got -0.1"),
        (SphereSGD, {"lr": math.nan}, "`lr`.*got nan"),
        (SphereSGD, {"lr": torch.tensor(-1.0)}, "`lr`.*got -1.0"),
        (SphereSGD, {"lr": 0.1, "momentum": -1}, "`momentum`.*got -1"),
        (SphereSGD, {"lr": 0.1, "momentum": 0.9, "dampening": math.nan}, "`dampening`.*got nan"),
        (SphereSGD, {"lr": 0.1, "nesterov": True}, "`nesterov` needs momentum.*got `momentum` 0"),
        (
            SphereSGD,
            {"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "no dampening; got .* `dampening` 0.1",
        ),
        (
            SphereSGD,
            {"lr": 0.1, "factor": "program"},
            r"`factor`.*\('none', 'jose'\); got 'program'",
        ),
        (SphereSGD, {"lr": 0.1, "retraction": "exact"}, r"`retraction`.*'exp'\); got 'exact'"),
        (SphereSGD, {"lr": 0.1, "dim": 2}, "`dim` must be an axis .* got 2"),
        (SphereAdam, {"lr": math.inf}, "`lr`.*got inf"),
        (SphereAdam, {"betas": (1.0, 0.9)}, r"`betas\[0\]` must be in \[0, 1\); got 1.0"),
        (SphereAdam, {"betas": (0.9, -0.1)}, r"`betas\[1\]`.*got -0.1"),
        (SphereAdam, {"eps": -1e-8}, "`eps`.*got -1e-08"),
        (SphereAdam, {"second_moment": "column"}, r"`second_moment`.*'element'\); got 'column'"),
    ],
)
def test_options_out_of_range_are_refused_by_name_also_in_a_group(kind, options, message):
    p = unit_parameter(3, 4)
    with pytest.raises(ValueError, match=message):
        kind([p], **options)
    optimiser = kind([p], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimiser.add_param_group({"params": [unit_parameter(3, 4)], **options})
    assert len(optimiser.param_groups) == 1


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_that_hold_no_rows_are_refused(kind):
    with pytest.raises(
        TypeError, match=r"`parameter 0` must be of a real floating dtype; got .*64"
    ):
        kind([torch.ones(3, 4, dtype=torch.complex64)], lr=0.1)
    with pytest.raises(ValueError, match=r"rows of at least 2 entries .* got shape \(3, 1\)"):
        kind([nn.Parameter(torch.ones(3, 1))], lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([], lr=0.1)
