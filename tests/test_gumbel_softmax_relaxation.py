"""The relaxed sample, the five ways back through it, and its density.

Statistical tests have one fixed seed; their false-alarm rate is the level that they name.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from cln_tutorial.gumbel_softmax import ConcreteCategorical, gumbel_softmax, relaxation

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HARD = ["straight_through", "st", "rao_blackwell", "zgr", "reinmax"]
LEVEL = 1e-4
inf = math.inf


def seeded(seed=6705):
    return torch.Generator().manual_seed(seed)


# --- the sample -----------------------------------------------------------------------------------


def test_it_takes_the_arguments_of_pytorch_by_position():
    logits = torch.randn(4, 5, 6, generator=seeded())
    for arguments in [(), (0.5,), (0.5, True), (0.5, False, 1e-10, 1), (2, True, 1e-10, 0)]:
        ours, theirs = gumbel_softmax(logits, *arguments), F.gumbel_softmax(logits, *arguments)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        dim = arguments[3] if len(arguments) == 4 else -1
        # Sums of six numbers, each right to a rounding.
        assert (ours.sum(dim) - 1).abs().max() < 1e-6


def test_its_law_is_that_of_pytorch():
    logits = torch.tensor([1.0, 0.0, -1.0]).expand(20_000, 3)
    torch.manual_seed(0)
    for tau in (0.3, 1.0):
        ours, theirs = (
            gumbel_softmax(logits, tau, generator=seeded()),
            F.gumbel_softmax(logits, tau),
        )
        for k in range(3):
            assert stats.ks_2samp(ours[:, k].numpy(), theirs[:, k].numpy()).pvalue > LEVEL


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_the_largest_entry_is_a_draw_from_the_softmax_at_every_temperature(tau):
    p, n = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), 100_000
    y = gumbel_softmax(p.log().expand(n, 4), tau, generator=seeded())
    found = y.argmax(-1).bincount(minlength=4).numpy()
    assert stats.chisquare(found, n * p.numpy()).pvalue > LEVEL


def test_the_mean_of_a_relaxed_sample_is_not_the_distribution():
    # By quadrature: exp(-G_k) is exponential, so y_k = x_k^-1 / sum x_j^-1 with x_j of rate p_j.
    p = [0.5, 0.3, 0.15, 0.05]

    def laplace(s, rate):  # E exp(-s / x) for x exponential: a Bessel function
        z = 2 * np.sqrt(s * rate)
        return z * special.k1(z)

    def derivative(s, rate):  # E exp(-s / x) / x
        return 2 * rate * special.k0(2 * np.sqrt(s * rate))

    exact = []
    for k in range(4):
        # E y_k = E x_k^-1 / sum = int_0^inf E[x_k^-1 exp(-s sum)] ds
        def integrand(s, k=k):
            rest = [laplace(s, rate) for j, rate in enumerate(p) if j != k]
            return derivative(s, p[k]) * np.prod(rest)

        exact.append(integrate.quad(integrand, 0, inf, epsabs=1e-10)[0])
    assert exact == pytest.approx([0.42911, 0.30253, 0.18561, 0.08275], abs=5e-6)
    assert sum(exact) == pytest.approx(1, abs=1e-8)
    logits, n = torch.tensor(p, dtype=torch.float64).log(), 200_000
    y = gumbel_softmax(logits.expand(n, 4), generator=seeded())
    error = y.std(0) / n**0.5
    assert ((y.mean(0) - torch.tensor(exact)).abs() < 4 * error).all()
    assert ((y.mean(0) - logits.exp()).abs() > 20 * error)[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("estimator", HARD)
def test_a_hard_sample_is_one_hot_to_the_last_bit(estimator, dtype):
    logits = (3 * torch.randn(2000, 7, generator=seeded(1))).to(dtype)
    y = gumbel_softmax(logits, 0.7, estimator=estimator, generator=seeded())
    assert y.dtype == dtype
    assert ((y == 0) | (y == 1)).all()
    assert y.sum(-1).eq(1).all()


def test_the_other_order_of_the_sum_would_not_be_one_hot():
    soft = torch.rand(100_000, generator=seeded())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        s = soft.to(dtype)
        for value in (0.0, 1.0):
            assert ((value - s) + s == value).all()
        wrong = ((1.0 + s) - s != 1.0).double().mean()
        assert wrong > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator", ["plain", *HARD])
def test_half_types_have_no_nan_where_pytorch_has_some(dtype, estimator):
    torch.manual_seed(20)
    logits = torch.zeros(8, 30152, dtype=dtype)
    if dtype == torch.float16 and torch.__version__.startswith("2.13"):
        assert F.gumbel_softmax(logits).isnan().any()
    torch.manual_seed(20)
    assert gumbel_softmax(logits, estimator=estimator, n_rb=2).isfinite().all()


@pytest.mark.parametrize("estimator", ["plain", *HARD])
def test_impossible_classes_stay_zero_and_get_a_zero_gradient(estimator):
    logits = torch.tensor([[1.0, -inf, 0.0, -inf]] * 50, requires_grad=True)
    y = gumbel_softmax(logits, 0.5, estimator=estimator, generator=seeded())
    assert (y[:, [1, 3]] == 0).all()
    (gradient,) = torch.autograd.grad((y * torch.randn(4)).sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[:, [1, 3]] == 0).all()
    assert gradient[:, [0, 2]].abs().sum() > 0


@pytest.mark.parametrize("tau", [1e-6, 1e6])
def test_extreme_logits_and_temperatures_give_numbers(tau):
    logits = torch.tensor([[1e4, -1e4, 0.0], [65504.0, 65503.0, -65504.0]], requires_grad=True)
    for estimator in ("plain", *HARD):
        y = gumbel_softmax(logits, tau, estimator=estimator, generator=seeded())
        (gradient,) = torch.autograd.grad(y.square().sum(), logits)
        assert y.isfinite().all()
        assert gradient.isfinite().all()


@given(shape=st.lists(st.integers(0, 3), max_size=2), classes=st.integers(1, 5), data=st.data())
def test_the_classes_may_lie_on_any_axis(shape, classes, data):
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    estimator = data.draw(st.sampled_from(["plain", *HARD]))
    rows = torch.randn(*shape, classes, generator=seeded(1))
    keywords = {"estimator": estimator, "n_rb": 2}
    y = gumbel_softmax(rows.movedim(-1, dim), 0.5, dim=dim, generator=seeded(), **keywords)
    assert y.movedim(dim, -1).equal(gumbel_softmax(rows, 0.5, generator=seeded(), **keywords))


def test_each_row_may_have_its_own_temperature():
    logits, tau = torch.zeros(2, 50_000, 3), torch.tensor([[0.1], [10.0]])
    y = gumbel_softmax(logits, tau, generator=seeded())
    # At 10 a sample is near the centre, at 0.1 near a vertex.
    assert y[0].amax(-1).mean() > 0.9
    assert y[1].amax(-1).mean() < 0.5


def test_one_state_of_the_generator_gives_one_sample():
    logits = torch.randn(3, 4)
    for estimator in ("plain", *HARD):
        first, again, other = (
            gumbel_softmax(logits.repeat(9, 1), estimator=estimator, generator=g)
            for g in (seeded(1), seeded(1), seeded(2))
        )
        assert first.equal(again)
        assert not first.equal(other)


# --- the gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_the_plain_gradient_is_right_and_differentiable_twice(tau):
    logits = torch.randn(2, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)

    def sample(x):
        return gumbel_softmax(x, tau, generator=seeded())

    assert torch.autograd.gradcheck(sample, logits)
    assert torch.autograd.gradgradcheck(sample, logits)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_the_straight_through_gradient_is_that_of_the_relaxed_sample(tau):
    logits = torch.randn(50, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    v = torch.randn(50, 4, dtype=torch.float64, generator=seeded(2))
    found = []
    for estimator in ("plain", "straight_through"):
        y = gumbel_softmax(logits, tau, estimator=estimator, generator=seeded())
        found.append(torch.autograd.grad((y * v).sum(), logits)[0])
    # The sample is one-hot, and the one of the other's argmax.
    assert found[0].equal(found[1])


def test_st_has_the_jacobian_of_the_softmax():
    logits = torch.randn(50, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    v = torch.randn(50, 4, dtype=torch.float64, generator=seeded(2))
    y = gumbel_softmax(logits, 0.1, estimator="st", generator=seeded())
    (found,) = torch.autograd.grad((y * v).sum(), logits)
    (expected,) = torch.autograd.grad((logits.softmax(-1) * v).sum(), logits)
    assert (found - expected).abs().max() < 1e-15


def test_reinmax_as_published_is_the_trapezoid_rule_sample_by_sample():
    logits = torch.randn(100, 5, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    v = torch.randn(100, 5, dtype=torch.float64, generator=seeded(2))
    drawn = gumbel_softmax(logits.detach(), hard=True, generator=seeded())
    pi = logits.softmax(-1)
    # Liu et al. 2023, algorithm 2: the distribution half-way to the sample, as logits.
    half = ((drawn + pi) / 2).log()
    middle = ((half - logits).detach() + logits).softmax(-1)
    published = 2 * middle - pi / 2
    (expected,) = torch.autograd.grad((published * v).sum(), logits)
    (found,) = torch.autograd.grad((relaxation._Trapezoid.apply(logits, drawn) * v).sum(), logits)
    assert (found - expected).abs().max() < 1e-14


def test_the_trapezoid_rule_is_exact_for_every_quadratic_function():
    logits = torch.randn(4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=seeded(2))
    vertices, p = torch.eye(4, dtype=torch.float64), logits.softmax(-1)
    values = torch.einsum("ki,ij,kj->k", vertices, matrix, vertices)
    (exact,) = torch.autograd.grad((p * values).sum(), logits, retain_graph=True)
    mean = torch.zeros(4, dtype=torch.float64)
    for k in range(4):
        y = relaxation._Trapezoid.apply(logits, vertices[k])
        (gradient,) = torch.autograd.grad(y @ matrix @ y, logits)
        mean += p[k].detach() * gradient
    assert (mean - exact).abs().max() < 1e-15


def test_conditional_relaxed_samples_have_the_mean_of_straight_through_and_less_variance():
    n, tau = 20_000, 0.5
    logits = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64).expand(n, 3).clone()
    logits.requires_grad_()
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = {}
    for estimator in ("straight_through", "rao_blackwell"):
        y = gumbel_softmax(logits, tau, estimator=estimator, n_rb=20, generator=seeded())
        # Not linear in y, so that the gradient depends on the vertex.
        f = ((y * v).sum(-1) ** 3).sum()
        (found[estimator],) = torch.autograd.grad(f, logits)
    first, second = found.values()
    error = ((first.var(0) + second.var(0)) / n).sqrt()
    assert ((first.mean(0) - second.mean(0)).abs() < 4 * error).all()
    assert second.var(0).sum() < 0.8 * first.var(0).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_type_is_relaxed_in_float32_and_rounded_once(dtype):
    logits = torch.randn(200, 30, generator=seeded(1)).to(dtype)
    y = gumbel_softmax(logits, 0.7, generator=seeded())
    in_float32 = gumbel_softmax(logits.float(), 0.7, generator=seeded())
    assert y.equal(in_float32.to(dtype))


@pytest.mark.parametrize("estimator", ["plain", *HARD])
def test_vmap_and_autocast_take_it(estimator):
    torch.manual_seed(0)
    logits = torch.zeros(30, 2, 6)
    y = torch.vmap(lambda x: gumbel_softmax(x, estimator=estimator), randomness="different")(logits)
    assert y.shape == logits.shape
    assert y.unique(dim=0).shape[0] > 10
    with torch.autocast("cpu", torch.bfloat16):
        assert gumbel_softmax(logits, estimator=estimator).dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(logits=torch.zeros(3, dtype=torch.int32)), TypeError, "`logits` .* floating"),
        (dict(logits=torch.zeros(3), tau=0.0), ValueError, "`tau` must be finite and at least"),
        (dict(logits=torch.zeros(3), tau=1e-31), ValueError, "at least 1e-30; got 1e-31"),
        (dict(logits=torch.zeros(3), tau=-1), ValueError, "`tau` must be finite and at least"),
        (dict(logits=torch.zeros(3), tau=inf), ValueError, "`tau` must be finite"),
        (dict(logits=torch.zeros(3), estimator="gumbel"), ValueError, "`estimator` must be one of"),
        (dict(logits=torch.zeros(3), hard=True, estimator="plain"), ValueError, "`estimator` 'pla"),
        (dict(logits=torch.zeros(3), n_rb=0), ValueError, "`n_rb` must be at least 1"),
        (dict(logits=torch.zeros(3), dim=2), ValueError, "`dim` must be an axis"),
        (dict(logits=torch.tensor([0.0, math.nan])), ValueError, "NaN"),
        (dict(logits=torch.tensor([0.0, inf])), ValueError, r"must have no \+inf; got 1"),
        (dict(logits=torch.full((2,), -inf)), ValueError, "1 rows in which all classes are -inf"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        gumbel_softmax(**arguments)


def test_pytorch_would_reverse_the_preference_at_a_negative_temperature():
    torch.manual_seed(0)
    assert F.gumbel_softmax(torch.tensor([100.0, 0, 0]), -1.0)[0] < 1e-6
    assert F.gumbel_softmax(torch.zeros(3), 0.0).isnan().any()


def test_eps_is_accepted_and_warns_if_it_is_meant_to_do_something():
    with pytest.warns(UserWarning, match="`eps` has no effect"):
        gumbel_softmax(torch.zeros(3), 1.0, False, 1e-6)


# --- the density ----------------------------------------------------------------------------------


def test_the_density_of_two_classes_is_the_logit_logistic_law():
    for tau in (0.3, 1.0, 2.0):
        law = ConcreteCategorical(tau, logits=torch.tensor([0.7, -0.2], dtype=torch.float64))
        y = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
        value = torch.stack([y, 1 - y], -1)
        # logit(y) is logistic around (o_1 - o_2) / tau with scale 1 / tau.
        logit = stats.logistic(0.9 / tau, 1 / tau)
        expected = logit.logpdf(special.logit(y.numpy())) - np.log(y.numpy() * (1 - y.numpy()))
        assert law.log_prob(value).numpy() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("tau", [0.6, 1.0, 3.0])
def test_the_density_of_three_classes_integrates_to_one(tau):
    law = ConcreteCategorical(tau, probs=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    # In the plane of two log-ratios, where it is smooth and decays; the Jacobian is y1 y2 y3.
    grid = torch.linspace(-60 / tau, 60 / tau, 1201, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    log_y = torch.stack([a, b, torch.zeros_like(a)], -1).log_softmax(-1)
    density = (law.log_prob_from_log(log_y) + log_y.sum(-1)).exp()
    # The trapezoid rule converges faster than any power for such a function.
    assert float(density.sum() * (grid[1] - grid[0]) ** 2) == pytest.approx(1, abs=1e-6)


def test_below_one_over_k_minus_one_the_density_has_no_inner_mode():
    # Log-convex there, Maddison et al. 2017: above the chord between any two points, never.
    generator = seeded(3)
    for tau, convex in [(0.5, True), (0.2, True), (3.0, False)]:
        law = ConcreteCategorical(tau, probs=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
        ends = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64))
        torch.manual_seed(int(generator.initial_seed()))
        a, b = ends.sample((2, 500))
        chord = (law.log_prob(a) + law.log_prob(b)) / 2
        middle = law.log_prob((a + b) / 2)
        assert bool((middle <= chord + 1e-9).all()) is convex


def test_the_density_of_a_sample_is_finite_where_that_of_pytorch_is_not():
    for logits in (torch.zeros(1000), 3 * torch.randn(1000, generator=seeded(1))):
        ours = ConcreteCategorical(0.05, logits=logits)
        y = ours.rsample((4,), generator=seeded())
        assert (y == 0).double().mean() > 0.5
        assert ours.log_prob(y).isfinite().all()
        log_y = ours.rsample_log((4,), generator=seeded())
        assert ours.log_prob_from_log(log_y).equal(ours.log_prob(y))
        theirs = torch.distributions.RelaxedOneHotCategorical(torch.tensor(0.05), logits=logits)
        torch.manual_seed(0)
        # It refuses its own sample, or gives no finite number.
        theirs._validate_args = False
        assert not theirs.log_prob(theirs.rsample((4,))).isfinite().any()


def test_it_agrees_with_pytorch_where_pytorch_is_finite():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=seeded(1))
    ours = ConcreteCategorical(0.7, logits=logits)
    theirs = torch.distributions.RelaxedOneHotCategorical(
        torch.tensor(0.7, dtype=torch.float64), logits=logits
    )
    y = ours.rsample((3,), generator=seeded())
    assert (ours.log_prob(y.clone()) - theirs.log_prob(y)).abs().max() < 1e-10


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_temperature_per_distribution_gives_one_density_per_distribution(shape):
    law = ConcreteCategorical(torch.ones(shape), logits=torch.zeros(3, 4))
    assert law.batch_shape == (3,)
    assert law.log_prob(law.rsample()).shape == (3,)
    wide = law.expand((2, 3))
    assert wide.log_prob(wide.rsample((5,))).shape == (5, 2, 3)
    assert wide.rsample().shape == (2, 3, 4)


def test_the_gradients_of_sample_and_density_are_right():
    logits = torch.randn(2, 3, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    tau = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)

    def density_of_sample(logits, tau):
        law = ConcreteCategorical(tau, logits=logits, validate_args=False)
        return law.log_prob(law.rsample(generator=seeded()))

    assert torch.autograd.gradcheck(density_of_sample, (logits, tau))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(temperature=1.0), "Exactly one of `probs` and `logits`"),
        (
            dict(temperature=1.0, probs=torch.ones(2) / 2, logits=torch.zeros(2)),
            "Exactly one of `probs` and `logits`",
        ),
        (dict(temperature=0.0, logits=torch.zeros(2)), "`tau` must be finite and at least"),
        (dict(temperature=torch.ones(3, 2), logits=torch.zeros(3, 2)), "one per distribution"),
        (dict(temperature=torch.ones(2), logits=torch.zeros(3, 4)), "`tau` must broadcast"),
        (dict(temperature=1.0, logits=torch.zeros(2, 0)), "no classes"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConcreteCategorical(**arguments)


def test_a_value_on_the_border_is_refused_with_what_to_write():
    # Asked for: PyTorch's compiler, once used, turns the default off for the whole process.
    law = ConcreteCategorical(1.0, logits=torch.zeros(3), validate_args=True)
    with pytest.raises(ValueError, match="Use `rsample_log` and `log_prob_from_log`"):
        law.log_prob(torch.tensor([0.5, 0.5, 0.0]))
    with pytest.raises(ValueError, match="within the support"):
        law.log_prob(torch.tensor([0.5, 0.6, 0.1]))
