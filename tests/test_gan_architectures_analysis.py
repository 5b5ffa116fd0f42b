"""Checkerboards, receptive fields and Dirac's GAN: closed forms, enumeration, gradients."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cln_tutorial.gan_architectures.analysis import (
    dirac_gan,
    nyquist_energy,
    overlap_count,
    phase_response,
    receptive_field,
)
from cln_tutorial.weight_averaging import ConstantDecay, ExponentialMovingAverage

ROUNDING = 1e-28  # of float64, squared: the same products, perhaps in another order
NORMAL_DRAWS = 2048  # kernels; the share is then Beta(3n/2, n/2) with standard error 0.0068


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def deconvolution(k, s, p=0, out=NORMAL_DRAWS):
    """One input channel, so that the share is the same for each constant image."""
    layer = nn.ConvTranspose2d(1, out, k, s, p)
    nn.init.normal_(layer.weight)
    return layer


# --- overlap --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "s", "p", "tile"),
    [
        (3, 2, 1, [[1, 2], [2, 4]]),
        (5, 2, 0, [[9, 6], [6, 4]]),
        (4, 2, 1, [[4, 4], [4, 4]]),
        (6, 2, 2, [[9, 9], [9, 9]]),
        (4, 3, 0, [[4, 2, 2], [2, 1, 1], [2, 1, 1]]),
        (1, 2, 0, [[1, 0], [0, 0]]),
    ],
)
def test_the_tiles_of_the_literature(k, s, p, tile):
    assert overlap_count(k, s, p).tolist() == tile


@pytest.mark.parametrize(("k", "s"), [(1, 3), (2, 2), (3, 2), (5, 2), (4, 3), (7, 3), (3, 1)])
def test_counts_are_those_of_ones_in_both_directions(k, s):
    for p in range(k):
        tile = torch.from_numpy(overlap_count(k, s, p)).double()
        ones = torch.ones(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
        kernel = torch.ones(1, 1, k, k, dtype=torch.float64)
        up = F.conv_transpose2d(ones, kernel, stride=s, padding=p)
        first = 3 * s  # a multiple of the stride, behind the border
        assert up[0, 0, first : first + s, first : first + s].equal(tile)
        image = torch.zeros(1, 1, 12 * s, 12 * s, dtype=torch.float64, requires_grad=True)
        F.conv2d(image, kernel, stride=s, padding=p).sum().backward()
        assert image.grad[0, 0, first : first + s, first : first + s].equal(tile)


def test_the_variance_of_random_weights_follows_the_counts():
    up = deconvolution(3, 2, 1)(torch.ones(1, 1, 8, 8)).detach()[0, :, 6:8, 6:8]
    # Relative standard error sqrt(2/2048) = 3.1 %; four of them, false alarm 3e-4 for 4 phases.
    variance = up.var(0)
    assert torch.allclose(variance, torch.from_numpy(overlap_count(3, 2, 1)).float(), rtol=0.125)


@pytest.mark.parametrize(("k", "s", "p"), [(0, 1, 0), (1, 0, 0), (1, 1, -1), (True, 1, 0)])
def test_sizes_that_are_none_are_refused(k, s, p):
    with pytest.raises(ValueError, match="must be an integer of at least"):
        overlap_count(k, s, p)


# --- phases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (4, 3), (3, 3)])
def test_random_weights_ripple_whatever_the_overlap(k, s):
    # k=4, s=2 has a flat count, and is no better than k=3. Four standard errors; with unequal
    # phases (k=3, 5) the error is at most twice as large.
    share = phase_response(deconvolution(k, s), 1, 1, seeded())
    assert share == pytest.approx(1 - 1 / s**2, abs=4 * 0.0068 * (1 if k % s == 0 else 2))


def test_pixel_shuffle_ripples_unless_its_kernels_are_equal():
    shuffle = nn.Sequential(nn.Conv2d(1, 4 * 1024, 3, padding=1), nn.PixelShuffle(2))
    # 1024 kernels: standard error 0.0096.
    assert phase_response(shuffle, 1, 2, seeded()) == pytest.approx(0.75, abs=4 * 0.0096)
    with torch.no_grad():
        shuffle[0].weight.copy_(shuffle[0].weight[::4].repeat_interleave(4, 0))
    assert phase_response(shuffle, 1, 2, seeded()) < ROUNDING


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_resizing_before_a_convolution_is_flat(mode):
    resize = nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(5, 7, 3, padding=1))
    assert phase_response(resize, 5, 4, seeded()) < ROUNDING


def test_resnets_have_stride_2_too_but_a_flat_response():
    # Nearest neighbours are a transposed convolution of ones, kernel 2 and stride 2.
    image = torch.randn(1, 1, 5, 5)
    as_deconvolution = F.conv_transpose2d(image, torch.ones(1, 1, 2, 2), stride=2)
    assert as_deconvolution.equal(F.interpolate(image, scale_factor=2))
    assert overlap_count(2, 2).tolist() == [[1, 1], [1, 1]]
    assert phase_response(nn.Upsample(scale_factor=2), 3, 4, seeded()) == 0.0
    image = torch.zeros(1, 1, 8, 8, requires_grad=True)
    F.avg_pool2d(image, 2).sum().backward()
    assert image.grad.equal(torch.full((1, 1, 8, 8), 0.25))


@pytest.mark.parametrize(
    ("kernel", "share"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], 0.0),
        ([[1.0, 1.0], [0.0, 0.0]], 0.5),
        ([[1.0, 0.0], [0.0, 0.0]], 0.75),
        ([[1.0, -1.0], [-1.0, 1.0]], 1.0),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
def test_the_share_of_kernels_made_by_hand(kernel, share):
    kernel = torch.tensor(kernel).view(1, 1, 2, 2)
    # A function in float32, with a bias that must not count.
    assert phase_response(
        lambda x: 5 + F.conv_transpose2d(x, kernel, stride=2), 1, 3, seeded()
    ) == (pytest.approx(share, abs=1e-6))


def test_channels_share_the_sum_by_their_energy():
    layer = nn.ConvTranspose2d(2, 1, 2, 2, bias=False)
    with torch.no_grad():
        layer.weight[0] = 1.0  # flat
        layer.weight[1] = 3 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # nothing but ripple
    levels = torch.randn(50, 2, 1, 1, generator=seeded(3))
    flat, ripple = levels[:, 0].square().sum(), 9 * levels[:, 1].square().sum()
    expected = (ripple / (flat + ripple)).item()
    assert phase_response(layer, 2, 50, seeded(3)) == pytest.approx(expected, rel=1e-6)


def test_an_odd_size_of_the_output_does_not_hide_the_stride():
    layer = deconvolution(3, 2, 1)  # 16 pixels to 31
    unpadded = copy.deepcopy(layer)
    unpadded.padding = (0, 0)  # 16 pixels to 33
    shares = [phase_response(each, 1, 2, seeded()) for each in (layer, unpadded)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-12)


def test_measuring_leaves_the_upsampler_and_the_global_generator_alone():
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, padding=1))
    upsampler = nn.Sequential(nn.Upsample(scale_factor=2), layer, nn.BatchNorm2d(8))
    state = copy.deepcopy(upsampler.state_dict())
    before = torch.random.get_rng_state()
    one, two = (phase_response(upsampler, 3, 5, seeded()) for _ in range(2))
    assert one == two
    assert torch.random.get_rng_state().equal(before)
    assert upsampler.training
    assert all(value.equal(state[name]) for name, value in upsampler.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in upsampler.parameters())


def test_what_does_not_repeat_is_no_upsampler():
    with pytest.raises(ValueError, match="repeat itself every 2 pixels"):
        phase_response(nn.ConvTranspose2d(1, 1, 40, 2), 1, 1, seeded())
    with pytest.raises(ValueError, match="a larger map for a larger image"):
        phase_response(nn.AdaptiveAvgPool2d(4), 1, 1, seeded())
    # ReLU is in proportion to positive factors, and tanh keeps the sign.
    for activation in (nn.ReLU(), nn.Tanh()):
        upsampler = nn.Sequential(nn.ConvTranspose2d(1, 8, 2, 2, bias=False), activation)
        with pytest.raises(ValueError, match="`upsampler` must be linear up to a bias"):
            phase_response(upsampler, 1, 1, seeded())
    with pytest.raises(ValueError, match="`n_trials` must be an integer of at least 1; got 0"):
        phase_response(nn.Upsample(scale_factor=2), 1, 0, seeded())


# --- Nyquist --------------------------------------------------------------------------------------


def test_all_that_alternates_from_pixel_to_pixel_is_at_nyquist():
    sign = torch.tensor([1.0, -1.0])
    board = torch.outer(sign, sign).repeat(4, 6)
    rows = sign.view(2, 1) * torch.linspace(1, 3, 12).repeat(8 // 2, 1, 1).view(4, 1, 12)
    images = torch.stack([board, 7 + 3 * board, rows.reshape(8, 12)])
    assert torch.allclose(nyquist_energy(images), torch.ones(3), atol=1e-6)


def test_a_constant_and_a_slow_wave_have_none():
    wave = torch.cos(2 * torch.pi * torch.arange(16).double() / 16).expand(8, 16)
    energy = nyquist_energy(torch.stack([torch.full((8, 16), 3.0).double(), wave]))
    assert energy[0] == 0
    assert energy[1] < 1e-30


def test_white_noise_has_its_share_of_the_frequencies():
    share = nyquist_energy(torch.randn(500, 2, 16, 8)).flatten()
    expected, error = (16 + 8 - 1) / (16 * 8 - 1), share.std() / math.sqrt(1000)
    assert abs(share.mean() - expected) < 4 * error  # false alarm 6e-5


def test_a_repeated_tile_puts_its_ripple_there():
    tile = torch.randn(2, 2, dtype=torch.float64)
    assert nyquist_energy(tile.repeat(8, 8)).item() == pytest.approx(1, abs=1e-12)


def test_the_share_does_not_depend_on_the_scale_of_an_image():
    image = torch.randn(8, 8)
    scales = 2.0 ** torch.tensor([-83.0, 0.0, 83.0]).view(3, 1, 1)  # squares are 0 and infinite
    energy = nyquist_energy(scales * image)
    assert energy.equal(energy[1].expand(3))  # powers of two: without a rounding


def test_the_share_is_that_of_the_pixels_in_half_precision():
    image = torch.randn(4, 8, 8).bfloat16()
    assert nyquist_energy(image).dtype == torch.float32
    assert nyquist_energy(image).equal(nyquist_energy(image.float()))


def test_odd_images_and_integers_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"even height and an even width; got \(4, 5\)"):
        nyquist_energy(torch.zeros(4, 5))
    with pytest.raises(TypeError, match=r"`img`.*torch.int64"):
        nyquist_energy(torch.zeros(4, 4, dtype=torch.int64))


# --- receptive fields -----------------------------------------------------------------------------

PATCHGAN = [(4, 2)] * 3 + [(4, 1)] * 2
SNDCGAN = [(3, 1), (4, 2)] * 3 + [(3, 1)]


@pytest.mark.parametrize(
    ("layers", "pixels"),
    [([(5, 2)] * 4, 61), ([(4, 2)] * 4, 46), ([(3, 2)] * 4, 31), (SNDCGAN, 52), (PATCHGAN, 70)],
)
def test_receptive_fields_of_known_discriminators(layers, pixels):
    assert receptive_field(layers) == pixels
    chain = nn.Sequential(
        *itertools.chain.from_iterable(
            (nn.Conv2d(1, 1, k, s, k // 2), nn.LeakyReLU(0.2)) for k, s in layers
        )
    )
    assert receptive_field(chain) == pixels


def test_dilation_widens_a_kernel():
    assert receptive_field([(3, 1, 1), (3, 1, 2), (3, 2, 4), (3, 1)]) == 1 + 2 + 4 + 8 + 4
    chain = nn.Sequential(
        nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 3, 2, dilation=4),
        nn.Conv2d(1, 1, 3),
    )  # fmt: skip
    assert receptive_field(chain) == 19


def test_the_reach_of_a_module_is_the_support_of_its_gradient():
    chain = nn.Sequential(*[nn.Conv2d(1, 1, 4, 2, 1) for _ in range(4)])
    for layer in chain:
        nn.init.uniform_(layer.weight, 0.5, 1.0)  # nothing cancels
    image = torch.zeros(1, 1, 128, 128, requires_grad=True)
    chain(image)[0, 0, 4, 4].backward()
    rows = (image.grad[0, 0] != 0).any(1)
    assert rows.sum() == receptive_field(chain) == 46


class Residual(nn.Module):
    """A branch of 5 pixels before pooling beside a shortcut of 1."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
        self.branch.append(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)))
        self.norm, self.shortcut = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return F.avg_pool2d(self.norm(self.branch(x)), 2) + self.shortcut(F.avg_pool2d(x, 2))


def test_branches_reach_as_far_as_the_longer_one_also_with_dead_weights():
    module = Residual()
    assert receptive_field(module) == 1 + 2 + 2 + 1
    nn.init.zeros_(module.branch[1].weight)
    assert receptive_field(module) == 6
    assert receptive_field(nn.Sequential(module, nn.MaxPool2d(3, 2))) == 6 + 2 * 2


def test_of_two_axes_the_longer_one_counts():
    assert receptive_field(nn.Conv2d(1, 1, (3, 7))) == receptive_field(nn.Conv2d(1, 1, (7, 3))) == 7


def test_asking_a_module_changes_nothing_in_it():
    module = nn.Sequential(Residual(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)))
    state = copy.deepcopy(module.state_dict())
    receptive_field(module)
    assert module.training
    assert all(value.equal(state[name]) for name, value in module.state_dict().items())


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


def test_a_reach_without_end_and_a_head_are_refused():
    with pytest.raises(ValueError, match="does not see the border of 256 pixels; Sequential"):
        receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3), Mean()))
    with pytest.raises(ValueError, match=r"must give a map .* Sequential gave \(1, 4096\)"):
        receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten()))
    with pytest.raises(ValueError, match="Leave out its head"):
        receptive_field(nn.Sequential(nn.Conv2d(1, 1, 4, 2, 1), nn.Flatten(), nn.Linear(64, 1)))


@pytest.mark.parametrize("layer", [(3,), (3, 0), (3, 1, 1, 1)])
def test_layers_that_are_none_are_refused(layer, unchecked):
    with pytest.raises(ValueError, match=r"`layers\[1\]` must be \(kernel, stride\)"):
        receptive_field([(3, 1), layer])


@pytest.mark.parametrize("r", [2, 3])
def test_a_dilated_convolution_is_an_ordinary_one_on_each_phase_of_the_image(r):
    # Small integers: all sums are exact, whatever their order.
    image = torch.randint(-9, 10, (2, 3, 12, 18)).double()
    kernel = torch.randint(-9, 10, (4, 3, 3, 3)).double()
    dilated = F.conv2d(image, kernel, padding=r, dilation=r)
    for i, j in itertools.product(range(r), repeat=2):
        phase = F.conv2d(image[..., i::r, j::r], kernel, padding=1)  # stride 1
        assert dilated[..., i::r, j::r].equal(phase)


# --- Dirac's GAN ----------------------------------------------------------------------------------


def slope(t):
    return 1 / (1 + torch.exp(t))


@pytest.mark.parametrize("h", [0.05, 0.3])
def test_simultaneous_steps_grow_by_the_closed_form(h):
    path = dirac_gan(h, 0, 300, theta0=0.7, psi0=-1.1)
    growth = path[1:].square().sum(1) / path[:-1].square().sum(1)
    closed = 1 + h**2 * slope(path[:-1].prod(1)).square()
    assert (growth / closed - 1).abs().max() < 2e-15  # a few roundings of float64
    assert (dirac_gan(h, 0, 50, loss="wasserstein").norm(dim=1)[-1]).item() == pytest.approx(
        (1 + h**2) ** 25, rel=1e-13
    )


def test_the_first_steps_by_hand():
    path = dirac_gan(0.1, 0.5, 1, theta0=2.0, psi0=1.0)
    s = 1 / (1 + math.exp(2.0))
    assert path.tolist() == [
        [2.0, 1.0],
        pytest.approx([2 - 0.1 * s, 1 + 0.1 * (2 * s - 0.5)], rel=1e-14),
    ]
    moved = 2 - 0.1 * s
    s = 1 / (1 + math.exp(moved))
    assert dirac_gan(0.1, 0.5, 1, alternating=True, theta0=2.0, psi0=1.0)[1].tolist() == (
        pytest.approx([moved, 1 + 0.1 * (moved * s - 0.5)], rel=1e-14)
    )
    # A generator that already fools the judge still moves with slope(-2) = 1 - slope(2).
    path = dirac_gan(0.1, 0, 1, theta0=2.0, psi0=1.0, loss="non_saturating")
    assert path[1, 0].item() == pytest.approx(2 - 0.1 * (1 - 1 / (1 + math.exp(2.0))), rel=1e-14)


def test_alternating_steps_stay_on_an_orbit():
    norm = dirac_gan(0.1, 0, 5000, alternating=True).norm(dim=1)
    assert norm.min().item() == pytest.approx(0.987, abs=5e-4)
    assert norm.max().item() == pytest.approx(1.013, abs=5e-4)
    assert (norm.max() / norm.min()).item() == pytest.approx(1.026, abs=5e-4)
    h = 0.3  # of the linear game the orbit is an ellipse
    theta, psi = dirac_gan(h, 0, 5000, alternating=True, loss="wasserstein").T
    energy = theta**2 + psi**2 - h * theta * psi
    assert (energy - 1).abs().max() < 1e-11


@pytest.mark.parametrize(("h", "steps_per_turn"), [(0.1, 125.7), (0.2, 62.8)])
def test_the_rotation_near_the_origin(h, steps_per_turn):
    theta = dirac_gan(h, 0, 400, alternating=True, theta0=1e-5)[:, 0]
    # A rotation's recursion; the curvature of the loss enters with 1e-10.
    cosine = (theta[2:] + theta[:-2]) / 2 @ theta[1:-1] / theta[1:-1].square().sum()
    assert cosine.item() == pytest.approx(1 - h**2 / 8, abs=1e-9)
    assert 2 * math.pi / math.acos(cosine.item()) == pytest.approx(steps_per_turn, abs=0.05)


@pytest.mark.parametrize(
    ("gamma", "radius"), [(0.1, 0.99624), (0.5, 0.97596), (1, 0.95), (2, 0.98660), (4, 0.99365)]
)
def test_the_penalty_contracts_with_the_eigenvalues_of_the_closed_form(gamma, radius):
    h, root = 0.1, complex(gamma**2 / 4 - 1 / 4) ** 0.5
    closed = [1 + h * (-gamma / 2 + sign * root) for sign in (1, -1)]
    assert max(map(abs, closed)) == pytest.approx(radius, abs=5e-6)
    p = dirac_gan(h, gamma, 2, theta0=1e-6, psi0=3e-7).T  # linear there, up to 1e-12
    step = p[:, 1:] @ torch.linalg.inv(p[:, :2])
    # trace and determinant, for at the critical gamma = 1 the two eigenvalues are one
    assert torch.trace(step).item() == pytest.approx(sum(closed).real, abs=1e-8)
    assert torch.linalg.det(step).item() == pytest.approx(math.prod(closed).real, abs=1e-8)


def orbit_energy(points, h):
    """What the linearised alternating game conserves: the square of the amplitude."""
    theta, psi = points[..., 0], points[..., 1]
    return theta**2 + psi**2 - h / 2 * theta * psi


def shrinkage(h, d):
    """Amplitude of an EMA of a rotation, in that of the rotation."""
    phi = math.acos(1 - h**2 / 8)
    return (1 - d) / abs(1 - d * complex(math.cos(phi), -math.sin(phi)))


@pytest.mark.parametrize(
    ("h", "amplitudes"), [(0.1, [0.9035, 0.1971, 0.0200]), (0.2, [0.7255, 0.1000, 0.0100])]
)
def test_an_average_of_the_orbit_is_a_smaller_orbit(h, amplitudes):
    decays = [0.9, 0.99, 0.999]
    assert [shrinkage(h, d) for d in decays] == pytest.approx(amplitudes, abs=5e-5)
    path = dirac_gan(h, 0, 20_000, alternating=True, theta0=1e-4)
    whole = orbit_energy(path[0], h)
    for d in decays:
        steps = round(20 / (1 - d))  # of the start e^-20 = 2e-9 is left
        weights = ConstantDecay(d).weights(steps, bias_correction=False)
        average = torch.from_numpy(weights) @ path[: steps + 1]
        measured = (orbit_energy(average, h) / whole).sqrt().item()
        assert measured == pytest.approx(shrinkage(h, d), abs=1e-6)


def test_a_training_with_an_average_ends_up_there_too():
    h, game = 0.2, nn.ParameterList([torch.zeros(2, dtype=torch.float64)])
    path = dirac_gan(h, 0, 600, alternating=True, theta0=1e-4)
    average = ExponentialMovingAverage(game, {"fast": 0.9, "slow": 0.97})
    for point in path:
        game[0].data.copy_(point)
        average.update()
    for name, d in (("fast", 0.9), ("slow", 0.97)):
        energy = orbit_energy(average.named_averages(name)["0"].detach(), h)
        measured = (energy / orbit_energy(path[0], h)).sqrt().item()
        assert measured == pytest.approx(shrinkage(h, d), abs=1e-6)  # 0.97^600 = 1e-8


def test_far_away_nothing_overflows_and_the_path_starts_where_it_was_told():
    path = dirac_gan(0.1, 0, 3, theta0=1e3, psi0=-1e3)
    assert path.dtype == torch.float64
    assert path.shape == (4, 2)
    assert path[0].tolist() == [1000.0, -1000.0]
    assert path.isfinite().all()
    assert dirac_gan(0.1, 0, 0).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "`h` must be positive"),
        ((math.nan, 0, 1), "`h` must be positive"),
        ((0.1, -1, 1), "`gamma` must be at least 0"),
        ((0.1, 0, -1), "`steps` must be an integer of at least 0"),
    ],
)
def test_games_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dirac_gan(*arguments)
    with pytest.raises(ValueError, match=r"`loss` must be one of minimax, .*; got 'hinge'"):
        dirac_gan(0.1, 0, 1, loss="hinge")


def test_overlap_is_a_table_of_integers():
    assert overlap_count(5, 3).dtype == np.int64
