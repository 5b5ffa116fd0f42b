"""Norms of convolutions against dense matrices: all strides, paddings, boundaries and branches."""

import copy
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from cln_tutorial.gan_architectures.networks import (
    DCGANDiscriminator,
    ResNetDiscriminator,
    SNDCGANDiscriminator,
)
from cln_tutorial.gan_architectures.spectral import (
    conv_operator_norm,
    lipschitz_bound,
    operator_norm_bounds,
    operator_spectral_norm,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def matrix(apply, *shape):
    """The dense matrix of a linear map, column by column."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64)
    return torch.stack([apply(x.view(1, *shape)).flatten() for x in unit], dim=1)


def norm(apply, *shape):
    return torch.linalg.matrix_norm(matrix(apply, *shape), 2)


def pair(value):
    return (value, value) if isinstance(value, int) else value


def dense_norm(weight, size, stride=1, padding=0):
    size = pair(size)
    return norm(lambda x: F.conv2d(x, weight, None, stride, padding), weight.shape[1], *size)


def reshaped_norm(weight):
    return torch.linalg.matrix_norm(weight.flatten(1), 2)


def kernel(*shape):
    return torch.randn(*shape, dtype=torch.float64)


GEOMETRIES = [  # kernel, size, stride, padding
    (3, 6, 1, 1),
    (3, 5, 1, 0),
    (1, 4, 1, 0),
    (1, 5, 3, 0),
    (4, 8, 2, 1),
    (4, 4, 2, 1),
    (4, 2, 2, 1),
    (5, 4, 2, 2),
    (5, 7, 2, 2),
    (3, 1, 1, 1),
    (2, 7, 3, 0),
    ((3, 2), (4, 6), (1, 2), (2, 0)),
    ((1, 5), (3, 2), 1, (0, 2)),
]


# --- the norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "size", "stride", "padding"), GEOMETRIES)
def test_the_norm_is_that_of_the_dense_matrix(k, size, stride, padding):
    weight = kernel(3, 2, *pair(k))
    norm = conv_operator_norm(weight, size, stride=stride, padding=padding)
    # The error is the square of the vector's, which is 1e-6.
    assert norm.item() == pytest.approx(dense_norm(weight, size, stride, padding).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("k", "size", "stride"),
    [(3, 6, 1), (4, (5, 4), 1), ((1, 2), 3, 1), (4, 4, 2), (4, 8, 2), (3, 6, 3), (2, (4, 6), 2)],
)
def test_at_a_circular_boundary_too(k, size, stride):
    k, (height, width) = pair(k), pair(size)
    weight = kernel(2, 3, *k)

    def convolve(x):
        x = F.pad(x, (0, k[1] - 1, 0, k[0] - 1), mode="circular")
        return F.conv2d(x, weight, stride=stride)

    measured = conv_operator_norm(weight, size, stride=stride, boundary="circular")
    assert measured.item() == pytest.approx(norm(convolve, 3, height, width).item(), rel=1e-9)
    shifted = conv_operator_norm(weight, size, stride=stride, padding=1, boundary="circular")
    assert shifted.equal(measured)


def test_a_kernel_of_ones_in_closed_form():
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    assert conv_operator_norm(ones, 16, boundary="circular").item() == pytest.approx(9, rel=1e-12)
    for size, ratio in ((16, 2.93), (32, 2.98)):
        measured = conv_operator_norm(ones, size, padding=1).item()
        # Each axis is the Toeplitz matrix with three diagonals of ones.
        closed = (1 + 2 * math.cos(math.pi / (size + 1))) ** 2
        assert measured == pytest.approx(closed, rel=1e-9)
        assert measured / 3 == pytest.approx(ratio, abs=5e-3)


RATIOS = {  # measured by two prototypes with other seeds: the mean of each pair
    "3x3, 64 to 64": (1.54, lambda: torch.randn(64, 64, 3, 3), {"padding": 1}),
    "3x3, 3 to 64": (2.33, lambda: torch.randn(64, 3, 3, 3), {"padding": 1}),
    "orthogonal": (1.88, lambda: nn.init.orthogonal_(torch.empty(64, 64, 3, 3)), {"padding": 1}),
    "positive": (2.96, lambda: torch.rand(64, 64, 3, 3), {"padding": 1}),
    "4x4, stride 2": (1.25, lambda: torch.randn(64, 64, 4, 4), {"padding": 1, "stride": 2}),
}


@pytest.mark.parametrize("name", RATIOS)
def test_how_much_the_reshaped_kernel_hides(name):
    published, make, options = RATIOS[name]
    weight = make()
    measured = conv_operator_norm(weight, 16, tol=1e-3, **options)
    assert (measured / reshaped_norm(weight)).item() == pytest.approx(published, rel=0.1)
    low, high = operator_norm_bounds(weight, options.get("stride", 1), input_size=16, padding=1)
    assert low < measured < high


@pytest.mark.parametrize(
    ("boundary", "stride", "padding"), [("circular", 1, 0), ("circular", 2, 0), ("zero", 2, 1)]
)
def test_the_norm_has_a_gradient(boundary, stride, padding):
    def norm(weight):
        return conv_operator_norm(
            weight, 6, stride=stride, padding=padding, boundary=boundary, tol=1e-12
        )

    torch.autograd.gradcheck(norm, kernel(2, 2, 3, 3).requires_grad_())


def test_the_answer_is_the_same_each_time_and_touches_no_generator():
    weight, state = kernel(4, 3, 3, 3), torch.random.get_rng_state()
    one, two = (conv_operator_norm(weight, 7, padding=1) for _ in range(2))
    assert one.equal(two)
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize("boundary", ["zero", "circular"])
def test_half_kernels_are_computed_in_float32(boundary):
    weight = torch.randn(4, 3, 3, 3).bfloat16()
    half = conv_operator_norm(weight, 6, boundary=boundary)
    assert half.dtype == torch.bfloat16
    assert half.equal(conv_operator_norm(weight.float(), 6, boundary=boundary).bfloat16())


@pytest.mark.parametrize("boundary", ["zero", "circular"])
def test_a_kernel_of_zeros_has_norm_zero(boundary):
    assert conv_operator_norm(torch.zeros(2, 3, 3, 3), 5, boundary=boundary) == 0


@pytest.mark.parametrize("boundary", ["zero", "circular"])
def test_the_norm_grows_with_the_kernel_at_any_scale(boundary):
    weight = torch.randn(4, 3, 3, 3)
    norm = conv_operator_norm(weight, 6, boundary=boundary)
    for scale in (2.0**-83, 2.0**-60, 2.0**50, 2.0**83):  # 1e-25 to 1e25, their squares 0 and inf
        scaled = conv_operator_norm(scale * weight, 6, boundary=boundary)
        assert scaled / scale == pytest.approx(norm.item(), rel=1e-5)  # some 30 roundings
    if boundary == "zero":
        # What no window sees must not drown what they see: taps of 1e-18 beside a corner of 1.
        hidden = torch.zeros(1, 1, 4, 4)
        hidden[..., 0, 0], hidden[..., 1:3, 1:3] = 1, 2.0**-60
        measured = conv_operator_norm(hidden, 2, stride=2, padding=1)
        assert measured * 2.0**60 == pytest.approx(2, rel=1e-6)


def test_the_norm_is_the_same_under_autocast():
    weight, layer = torch.randn(4, 3, 3, 3), nn.Conv2d(3, 4, 3)
    plain = conv_operator_norm(weight, 6), lipschitz_bound(layer, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (conv_operator_norm(weight, 6), lipschitz_bound(layer, 6)) == plain


def test_too_few_iterations_are_said_and_come_from_below():
    weight = kernel(8, 8, 3, 3)
    with pytest.warns(RuntimeWarning, match="known to a relative .* after 5 iterations"):
        rough = conv_operator_norm(weight, 8, padding=1, n_iter=5)
    exact = dense_norm(weight, 8, 1, 1)
    assert 0.9 * exact < rough < exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 3)}, r"`weight` must be \(out, in, k_h, k_w\); got \(3, 3\)"),
        ({"weight": torch.full((1, 1, 3, 3), torch.nan)}, "`weight` must be finite"),
        ({"input_size": 2}, r"`input_size` must hold the kernel \(3, 3\)"),
        ({"input_size": (4, 0)}, "`input_size` must be at least 1"),
        ({"stride": 0}, "`stride` must be at least 1"),
        ({"padding": -1}, "`padding` must be at least 0"),
        ({"n_iter": 0}, "`n_iter` must be at least 1; got 0"),
        ({"boundary": "reflect"}, "`boundary` must be 'zero' or 'circular'; got 'reflect'"),
        ({"boundary": "circular", "stride": 2, "input_size": 5}, "divisible by the stride"),
        ({"boundary": "circular", "padding": 1, "input_size": 2}, "hold the kernel"),
    ],
)
def test_convolutions_that_are_none_are_refused(change, message, unchecked):
    arguments = {"weight": torch.ones(1, 1, 3, 3), "input_size": 8} | change
    with pytest.raises(ValueError, match=message):
        conv_operator_norm(arguments.pop("weight"), arguments.pop("input_size"), **arguments)
    with pytest.raises(TypeError, match=r"`weight`.*torch.int64"):
        conv_operator_norm(torch.ones(1, 1, 3, 3, dtype=torch.int64), 8)


# --- its bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "size", "stride", "padding"), GEOMETRIES)
def test_the_bounds_hold_and_the_lower_one_needs_a_window_inside(k, size, stride, padding):
    weight = kernel(2, 3, *pair(k))
    low, high = operator_norm_bounds(weight, stride, input_size=size, padding=padding)
    assert low <= (1 + 1e-12) * dense_norm(weight, size, stride, padding) <= (1 + 2e-12) * high
    fits = all(
        any(
            start - p >= 0 and start - p + kernel <= n
            for start in range(0, n + 2 * p - kernel + 1, s)
        )
        for kernel, n, s, p in zip(*map(pair, (k, size, stride, padding)), strict=True)
    )
    assert low == (reshaped_norm(weight) if fits else 0)


def test_both_bounds_are_attained():
    for stride in (1, 2):
        weight = kernel(3, 2, 1, 1)
        low, high = operator_norm_bounds(weight, stride)
        assert low == high
        assert dense_norm(weight, 5, stride).item() == pytest.approx(low.item(), rel=1e-12)
    for k, stride, size in ((3, 1, 6), (4, 2, 6), (3, 2, 8)):
        # A single tap in each phase window would do for k % s == 0; ones for all of it.
        ones = torch.zeros(1, 1, k, k, dtype=torch.float64)
        ones[..., ::stride, ::stride] = 1
        measured = conv_operator_norm(ones, size, stride=stride, boundary="circular")
        assert measured.item() == pytest.approx(operator_norm_bounds(ones, stride)[1].item())


def two_corners(size):
    weight = torch.zeros(1, 1, size, size, dtype=torch.float64)
    weight[..., 0, 0] = weight[..., -1, -1] = 1
    return weight


def test_zeros_in_each_window_break_the_lower_bound():
    # The last layer of many discriminators, 4x4 with stride 2 on 4x4: no window sees both corners.
    corners = two_corners(4)
    measured = conv_operator_norm(corners, 4, stride=2, padding=1)
    assert measured.item() == pytest.approx(1, rel=1e-12)
    assert (measured / reshaped_norm(corners)).item() == pytest.approx(0.707, abs=5e-4)
    assert operator_norm_bounds(corners, 2, input_size=4, padding=1)[0] == 0
    # On 2x2 it sees none, so nothing above 0 bounds the norm there.
    assert conv_operator_norm(corners, 2, stride=2, padding=1) == 0


@pytest.mark.parametrize(
    ("k", "stride", "padding", "size", "ratio"),
    [(4, 2, 1, 4, 0.98), (4, 2, 1, 2, 3 / 5), (5, 2, 2, 4, 0.89), (3, 1, 1, 1, 2 / 4)],
)
def test_random_kernels_fall_below_the_reshaped_one_on_the_smallest_maps(
    k, stride, padding, size, ratio
):
    weight = torch.randn(64, 64, k, k)
    measured = conv_operator_norm(weight, size, stride=stride, padding=padding, tol=1e-3)
    # Where one window is all there is, t of its taps see the map: (1 + root t) / (1 + root k^2).
    assert (measured / reshaped_norm(weight)).item() == pytest.approx(ratio, rel=0.05)
    assert operator_norm_bounds(weight, stride, input_size=size, padding=padding)[0] == 0


# --- what spectral normalisation does -------------------------------------------------------------


def sigma_of(layer):
    original = layer.parametrizations.weight.original
    return (original.flatten()[0] / layer.weight.flatten()[0]).item()


def test_torchs_sigma_goes_up_to_the_norm_of_the_reshaped_kernel():
    layer = nn.Conv2d(8, 16, 3).double()
    exact = reshaped_norm(layer.weight.detach()).item()
    parametrizations.spectral_norm(layer)
    with torch.no_grad():
        sigmas = [sigma_of(layer.train()) for _ in range(60)]
    # Rayleigh quotients of power iteration: from below, and never down again.
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(sigmas))
    assert sigmas[0] < exact * (1 - 1e-6)
    assert sigmas[-1] == pytest.approx(exact, rel=1e-3)
    measured = conv_operator_norm(layer.eval().weight, 8, padding=1)
    assert 1.2 < measured < 3  # what is then left to the operator


def test_five_iterations_from_ones_fall_short_by_six_percent():
    short = []
    for _ in range(20):
        weight = torch.randn(1600, 128)  # a Keras kernel 5x5x64x128, from 64 to 128 channels
        u = torch.ones(1600)
        for _ in range(5):
            v = F.normalize(weight.T @ u, dim=0)
            u = F.normalize(weight @ v, dim=0)
        short.append(1 - (u @ weight @ v / torch.linalg.matrix_norm(weight, 2)).item())
    # 60 seeds: 6.6 % on average, worst 10 %; their deviation is 1.4 %
    assert sum(short) / len(short) == pytest.approx(0.06, abs=0.01)
    assert max(short) < 0.11


def test_batch_norm_has_no_slope_of_its_own():
    norm = nn.BatchNorm2d(1, eps=1e-20, affine=False)
    for spread in (1.0, 1e-2, 1e-4):
        x = (spread * torch.randn(4, 1, 4, 4)).requires_grad_()
        y = norm(x)
        (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
        assert 2 < spread * gradient.norm() < 20  # 1/sigma: as steep as the batch is flat


# --- bounds of whole networks ---------------------------------------------------------------------


def jacobian_norm(module, *shape):
    x = torch.randn(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, math.prod(shape)), 2).item()


def test_of_a_chain_it_is_the_product_of_the_dense_norms():
    chain = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(3, 4, 4, 2, 1),
        nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 2),
    ).double().eval()  # fmt: skip
    product = (
        dense_norm(chain[0].weight, 8, 1, 1)
        * dense_norm(chain[2].weight, 8, 2, 1)
        * 0.5  # a mean of four values, spread over them
        * torch.linalg.matrix_norm(chain[7].weight, 2)
    )
    bound = lipschitz_bound(chain, 8)
    assert bound == pytest.approx(product.item(), rel=1e-7)
    assert bound == lipschitz_bound(chain, (2, 8, 8))
    assert jacobian_norm(chain, 2, 8, 8) < bound


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 4, 3, 2, 2, dilation=2, groups=2), (2, 7, 5)),
        (nn.ConvTranspose2d(2, 3, 3, 2, 1), (2, 4, 4)),
        (nn.AvgPool2d(3, 1, 1), (2, 5, 5)),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 4)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 4)),
        (nn.Linear(6, 3), (6,)),
        (nn.BatchNorm2d(2), (2, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_of_one_linear_layer_it_is_the_norm_of_its_jacobian(layer, shape):
    layer = layer.double()
    if isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight)
        layer.running_var.copy_(torch.tensor([0.1, 4.0]))
    layer.eval()
    # Layers without parameters are asked in float32.
    assert lipschitz_bound(layer, shape) == pytest.approx(jacobian_norm(layer, *shape), rel=1e-6)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        h = self.two(x)
        h += 0.1 * F.relu(self.one(x) / 4)
        return (2 - h).sum((2, 3)) + torch.ones(3, 2)


def test_branches_add_up_and_so_does_what_is_spread_over_rows():
    module = Branches().double()
    one, two = dense_norm(module.one.weight, 4, 1, 1), reshaped_norm(module.two.weight)
    # The sum over 16 positions has norm 4; three copies have root 3.
    expected = (two + 0.1 * one / 4) * 4 * math.sqrt(3)
    assert lipschitz_bound(module, 4) == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize(("k", "s", "bound"), [(2, 2, 1), (3, 2, 2), (3, 1, 3), (2, 3, 1)])
def test_max_pooling_multiplies_a_pixel_by_its_windows(k, s, bound):
    pool = nn.MaxPool2d(k, s)
    assert lipschitz_bound(pool, (1, 9, 9)) == pytest.approx(bound)
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1  # attained: all windows over it see this pixel, and nothing else
    assert pool(x).norm() == pytest.approx(bound)


def test_slopes_of_activations():
    for layer, slope in (
        (nn.LeakyReLU(2.5), 2.5), (nn.Sigmoid(), 0.25), (nn.Tanh(), 1), (nn.ReLU(), 1),
    ):  # fmt: skip
        assert lipschitz_bound(layer, (3,)) == pytest.approx(slope)


@pytest.mark.parametrize("network", [DCGANDiscriminator, ResNetDiscriminator])
def test_batch_norm_of_the_chapters_discriminators_has_a_bound_in_eval(network):
    network = network(16, 1, width=4, norm="bn", spectral=False).double()
    network(torch.randn(16, 1, 16, 16, dtype=torch.float64))  # statistics
    with pytest.raises(ValueError, match="runs batch_norm in training"):
        lipschitz_bound(network, 16)
    bound = lipschitz_bound(network.eval(), 16)
    assert 0 < max(jacobian_norm(network, 1, 16, 16) for _ in range(2)) < bound


def test_small_weights_beside_a_large_bias_have_a_bound():
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(2.0**-83 * torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        layer.bias.fill_(1e10)
    assert lipschitz_bound(layer, (3,)) == pytest.approx(3 * 2.0**-83, rel=1e-5)


@pytest.mark.parametrize("network", [SNDCGANDiscriminator, ResNetDiscriminator])
def test_the_chapters_discriminators_have_a_bound_that_is_not_one(network):
    # Spectral norm of the reshaped kernels is there, and does not make them 1-Lipschitz.
    network = network(8, 1, width=4).double()
    state = copy.deepcopy(network.state_dict())
    bound = lipschitz_bound(network, 8)
    assert network.training
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())
    slopes = [jacobian_norm(network.eval(), 1, 8, 8) for _ in range(5)]
    assert 0 < max(slopes) < bound
    assert bound > 1.5


class Hidden(nn.Module):
    """Values that appear behind the back of PyTorch, as those of compiled loops do."""

    class Loops(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.ones(1, 2, 4, 4)

        @staticmethod
        def backward(ctx, grad):
            return 7 * grad

    def forward(self, x):
        return x + self.Loops.apply(x)


class Asks(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def into_a_constant(x):
    total = torch.zeros(1, 2, 4, 4)
    total += 2 * x
    total += 3 * x
    return total


def dynamic_convolution(x):
    return F.conv2d(x, x.mean((2, 3), keepdim=True) * torch.ones(2, 2, 3, 3))


def self_modulated_norm(x):
    return F.batch_norm(x, torch.zeros(2), torch.ones(2), weight=x.mean((0, 2, 3)))


def in_half_precision(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.conv2d(x, torch.ones(2, 2, 3, 3))


# Each is steeper than any bound: a product of two answers, a branch, a step, a hidden constant.
WITHOUT_A_BOUND = {
    "torch.Tensor.mul": lambda x: x * x,
    "torch.nn.functional.linear": lambda x: F.linear(x[0, 0], 2 * x[0, 0]),
    "torch.nn.functional.conv2d": dynamic_convolution,
    "torch.nn.functional.batch_norm": self_modulated_norm,
    "torch.nn.functional.batch_norm.": lambda x: F.batch_norm(  # named, so that it comes first
        running_var=x.mean((0, 2, 3)), running_mean=torch.zeros(2), input=torch.ones(1, 2, 4, 4)
    ),
    "torch.matmul": lambda x: torch.matmul(x, x),
    "torch.addcmul": lambda x: torch.addcmul(x, x, torch.ones(4)),
    "torch.Tensor.__rtruediv__": lambda x: 1 / x,
    "torch.div": lambda x: torch.div(x, 0.01, rounding_mode="floor"),
    "torch.Tensor.item": lambda x: x * x.sum().item(),
    "torch.Tensor.__float__": lambda x: x * float(x.sum()),
    "torch.Tensor.tolist": lambda x: x * torch.tensor(x.tolist()),
    "torch.Tensor.__bool__": lambda x: 5 * x if x.sum() else x,
    "torch.Tensor.max": lambda x: x * x.max(1).indices,
    "torch.Tensor.data.__get__": lambda x: x * x.data,
    "torch.nn.functional.softplus": lambda x: F.softplus(x, threshold=0),
    "torch.Tensor.add_, and hides what depends on it": into_a_constant,
    "torch.Tensor.to, and hides what depends on it": lambda x: x.to(torch.bfloat16),
    "torch.nn.functional.conv2d, and hides what depends on it": in_half_precision,
}


@pytest.mark.parametrize("what", WITHOUT_A_BOUND)
def test_what_could_hide_a_slope_is_refused_before_it_does(what):
    with pytest.raises(ValueError, match=rf"Asks runs {re.escape(what)}"):
        lipschitz_bound(Asks(WITHOUT_A_BOUND[what]), (2, 4, 4))


def test_shapes_may_be_asked():
    def flat(x):
        assert x.dtype.is_floating_point
        return x.view(x.shape[0] * x.numel() // len(x), x.ndim - x.dim() + 1) * x.size(0)

    assert lipschitz_bound(Asks(flat), (2, 4, 4)) == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_have_no_bound(value):
    for name in ("weight", "bias"):
        layer = nn.Conv2d(1, 1, 3)
        nn.init.constant_(getattr(layer, name), value)
        with pytest.raises(ValueError, match=r"`module` must .* finite"):
            lipschitz_bound(layer, 8)
    nn.init.constant_(layer.weight, value)
    with pytest.raises(ValueError, match="`module` must have finite weights"):
        operator_spectral_norm(layer, 8)


class Frozen(nn.Module):
    """Without a gradient the first part would look like a constant."""

    def forward(self, x):
        with torch.no_grad():
            h = 5 * x
        return x + h


class Overwritten(nn.Module):
    """What is done to a view happens to the whole."""

    def __init__(self, assign):
        super().__init__()
        self.assign = assign

    def forward(self, x):
        h = 2 * x
        if self.assign:
            h[:, 0] = 3 * x[:, 0]
        else:
            h.flatten(1).mul_(5)
        return h


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm2d(2), "BatchNorm2d runs batch_norm in training"),
        (nn.Sequential(nn.ReLU(), nn.Dropout()), "1 runs dropout in training"),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.Softmax(1))), r"1\.0 runs .*softmax"),
        (nn.GroupNorm(1, 2), "GroupNorm runs .*group_norm"),
        (nn.Sequential(Frozen()), r"0 runs torch\.Tensor\.mul, and hides what depends on it"),
        (nn.Sequential(Overwritten(True)), r"0 runs torch\.Tensor\.__setitem__"),
        (nn.Sequential(Overwritten(False)), r"0 runs torch\.Tensor\.mul_, and hides"),
        (nn.Sequential(Hidden()), "0 runs an operation that PyTorch does not announce"),
    ],
)
def test_what_has_no_bound_is_refused_by_name(module, message):
    with pytest.raises(ValueError, match=message):
        lipschitz_bound(module, (2, 4, 4))


def test_a_module_without_convolution_needs_the_whole_shape():
    with pytest.raises(ValueError, match="`input_size` must be the shape of one input"):
        lipschitz_bound(nn.Linear(3, 1), 3)


# --- the parametrisation --------------------------------------------------------------------------


def normalised(*arguments, size=5, **options):
    layer = nn.Conv2d(*arguments, **options).double()
    return operator_spectral_norm(layer, size)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 4, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (3, 1), "groups": 2},
    ],
    ids=str,
)
def test_it_starts_with_operator_norm_one(options):
    layer = normalised(2, 4, size=(6, 5), **options).eval()
    layer.bias = None
    assert norm(layer, 2, 6, 5).item() == pytest.approx(1, rel=1e-7)
    assert lipschitz_bound(layer, (2, 6, 5)) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_it_divides_small_and_large_kernels_too(scale):
    layer = nn.Conv2d(2, 3, 5, padding="same")  # on 2x2: what the padding adds need not be there
    nn.init.normal_(layer.weight, std=scale)
    layer = operator_spectral_norm(layer, 2)
    for _ in range(2):  # training, with power iterations
        weight = layer.weight.detach()
    assert dense_norm(weight.double(), 2, 1, 2).item() == pytest.approx(1, rel=1e-5)


def test_torchs_own_leaves_more_than_one():
    layer = nn.Conv2d(8, 8, 3, padding=1).double()
    torchs = parametrizations.spectral_norm(copy.deepcopy(layer)).eval()
    ours = operator_spectral_norm(layer, 8).eval()
    assert lipschitz_bound(ours, 8) == pytest.approx(1, rel=1e-5)
    assert lipschitz_bound(torchs, 8) > 1.3


def test_sigma_is_inside_the_gradient():
    layer = normalised(2, 3, 3, padding=1).eval()
    original, direction = layer.parametrizations.weight.original, kernel(3, 2, 3, 3)
    (gradient,) = torch.autograd.grad((layer.weight * direction).sum(), original)
    # The oracle: through the singular values of the dense matrix.
    free = original.detach().clone().requires_grad_()
    sigma = dense_norm(free, 5, 1, 1)
    (exact,) = torch.autograd.grad((free / sigma * direction).sum(), free)
    assert torch.allclose(gradient, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    # A norm 1 does not change with the length of the weight.
    assert abs((gradient * original).sum()) < 1e-12


def test_first_and_second_gradients_are_those_of_finite_differences():
    layer = normalised(2, 2, 3, padding=1, size=4).eval()
    norm = layer.parametrizations.weight[0]
    weight = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(norm, weight)
    assert torch.autograd.gradgradcheck(norm, weight)


def test_the_image_moves_in_training_and_stays_in_eval():
    layer = normalised(2, 3, 3, padding=1)
    buffer = layer.parametrizations.weight[0]._v
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    before = buffer.clone()
    one, two = layer.eval().weight, layer.weight
    assert one.equal(two)
    assert buffer.equal(before)
    layer.train()(torch.zeros(1, 2, 5, 5, dtype=torch.float64))
    assert not buffer.equal(before)
    assert buffer.norm().item() == pytest.approx(1, rel=1e-12)


def test_one_reading_is_one_power_iteration():
    layer = normalised(2, 3, 3, padding=1)
    with torch.no_grad():
        weight = layer.parametrizations.weight.original.normal_()
    dense = matrix(lambda x: F.conv2d(x, weight, padding=1), 2, 5, 5)
    expected = layer.parametrizations.weight[0]._v.flatten().clone()
    for _ in range(3):
        read = layer.weight.detach()
        expected = F.normalize(dense.T @ (dense @ expected), dim=0)
        assert torch.allclose(read, weight / (dense @ expected).norm(), rtol=1e-12)
    with parametrize.cached():
        assert layer.weight is layer.weight
    twice = operator_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 5, n_power_iterations=2)
    assert twice.parametrizations.weight[0].n_iterations == 2


def test_it_follows_the_weight_through_training():
    layer = normalised(3, 8, 3, padding=1, size=8)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05)
    x, target = kernel(16, 3, 8, 8), kernel(16, 8, 8, 8)
    for _ in range(40):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().mul(10).backward()
        optimiser.step()
    layer.eval()
    # From below: what is still hidden from one iteration per step.
    assert 1 - 1e-9 < conv_operator_norm(layer.weight.detach(), 8, padding=1) < 1.01


def test_two_forward_passes_before_one_backward():
    layer = normalised(2, 3, 3, padding=1)
    real, fake = kernel(4, 2, 5, 5), kernel(4, 2, 5, 5)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    (layer(real).mean() - layer(fake).square().mean()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_a_gradient_penalty_goes_through_it():
    layer = normalised(1, 2, 3, padding=1).eval()
    x = kernel(2, 1, 5, 5).requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().max() > 0


def test_its_state_is_saved_and_restored():
    one, two = (normalised(2, 3, 3, padding=1) for _ in range(2))
    with torch.no_grad():
        one.parametrizations.weight.original.normal_()
    for _ in range(2):
        one.weight  # noqa: B018 - reading moves the image
    assert "parametrizations.weight.0._v" in one.state_dict()
    two.load_state_dict(one.state_dict())
    assert two.eval().weight.equal(one.eval().weight)
    assert copy.deepcopy(one).weight.equal(one.weight)
    assert two.train().weight.equal(one.train().weight)  # and the next iteration is the same


def test_it_can_be_removed_and_leaves_the_normalised_weight():
    layer = normalised(2, 3, 3, padding=1).eval()
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight.equal(weight)


def test_half_weights_and_autocast_normalise_in_float32():
    layer = operator_spectral_norm(nn.Conv2d(3, 4, 3, padding=1), 6).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.weight
    assert inside.equal(layer.weight)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    # 2^-8 of the image and of the result
    assert torch.allclose(half.weight.float(), layer.weight, rtol=3 * 2**-8)
    half.train()(torch.zeros(1, 3, 6, 6).bfloat16())


def test_zero_weights_stay_zero():
    layer = nn.Conv2d(2, 3, 3)
    nn.init.zeros_(layer.weight)
    layer = operator_spectral_norm(layer, 5)
    assert layer.weight.equal(torch.zeros(3, 2, 3, 3))
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_normalising_touches_no_generator():
    layer, state = nn.Conv2d(2, 3, 3), torch.random.get_rng_state()
    operator_spectral_norm(layer, 5).weight.sum().backward()
    assert torch.random.get_rng_state().equal(state)


def test_other_modules_are_refused_with_what_to_write(unchecked):
    with pytest.raises(TypeError, match=r"must be an nn.Conv2d; got Linear.*spectral_norm"):
        operator_spectral_norm(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match="must pad with zeros; got 'circular'"):
        operator_spectral_norm(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), 4)
    with pytest.raises(ValueError, match="`input_size` must hold the kernel"):
        operator_spectral_norm(nn.Conv2d(1, 1, 3), 2)
    with pytest.raises(
        ValueError, match=r"must hold the kernel \(9, 9\) with the padding \(0, 0\)"
    ):
        operator_spectral_norm(nn.Conv2d(1, 1, 3, dilation=4), 6)
    with pytest.raises(ValueError, match="`n_power_iterations` must be at least 1"):
        operator_spectral_norm(nn.Conv2d(1, 1, 3), 4, n_power_iterations=0)


def test_a_bound_of_half_weights_is_that_of_the_same_weights_in_float32():
    layer = nn.Conv2d(2, 3, 3).bfloat16()
    assert lipschitz_bound(layer, 6) == lipschitz_bound(copy.deepcopy(layer).float(), 6)


def test_it_compiles(child_output):
    code = """
import copy, torch
from torch import nn
from cln_tutorial.gan_architectures.spectral import operator_spectral_norm
torch.manual_seed(0)
plain = operator_spectral_norm(nn.Conv2d(2, 3, 3, padding=1), 6)
other = copy.deepcopy(plain)
compiled = torch.compile(other, backend="aot_eager")
for training in (True, False, True):
    x = torch.randn(4, 2, 6, 6)
    for layer in (plain, compiled):
        layer.train(training)
        layer(x).square().sum().backward()
    one, two = plain.parametrizations.weight, other.parametrizations.weight
    torch.testing.assert_close(one.original.grad, two.original.grad)
    torch.testing.assert_close(one[0]._v, two[0]._v)
print("done")
"""
    assert child_output(code).strip() == "done"
