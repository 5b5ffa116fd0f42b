"""Blocks of generators and discriminators: attention, upsampling, residual blocks."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cln_tutorial.gan_architectures.blocks import (
    FusedBatchNorm2d,
    ResBlockDown,
    ResBlockUp,
    SelfAttention2d,
    icnr_,
    upsampling_conv,
)
from cln_tutorial.gan_architectures.norms import ConditionalBatchNorm2d, SelfModulatedBatchNorm2d
from cln_tutorial.weight_averaging import recompute_batchnorm_


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def randomised(module, seed=0):
    """Every parameter away from its start, so that no part is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


# Self-attention


def test_attention_with_gain_0_is_the_identity_bit_for_bit():
    x = randn(2, 16, 6, 8)
    assert SelfAttention2d(16)(x).equal(x)


def test_attention_is_softmax_attention_of_each_position_over_the_pooled_ones():
    # The reference is PyTorch's own attention, with its division by the root of the width undone.
    attention = randomised(SelfAttention2d(8, key_channels=3, spectral=False)).double()
    x = randn(2, 8, 4, 6, dtype=torch.float64)
    query = attention.query(x).flatten(2).mT
    key, value = (F.max_pool2d(m(x), 2).flatten(2).mT for m in (attention.key, attention.value))
    attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    y = x + attention.gain * attention.out(attended.mT.unflatten(2, (4, 6)))
    torch.testing.assert_close(attention(x), y)


def test_rows_of_the_attention_map_sum_to_1_over_the_keys_and_columns_do_not():
    # Without pooling the map is square: a softmax along the wrong axis has the right shape.
    attention = randomised(SelfAttention2d(8, pool=False, spectral=False))
    y, weights = attention(randn(2, 8, 3, 5), need_weights=True)
    assert y.equal(attention(randn(2, 8, 3, 5)))
    assert weights.shape == (2, 15, 15)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 15))
    assert (weights.sum(1) - 1).abs().max() > 0.1


def test_attention_follows_a_permutation_of_the_positions_without_pooling():
    attention = randomised(SelfAttention2d(8, pool=False, spectral=False)).double()
    x = randn(1, 8, 4, 4, dtype=torch.float64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = x.flatten(2)[..., order].unflatten(2, (4, 4))
    expected = attention(x).flatten(2)[..., order].unflatten(2, (4, 4))
    torch.testing.assert_close(attention(moved), expected)


def test_attention_has_the_widths_of_sagans_code():
    # Queries and keys 64 -> 8, values 64 -> 32, output 32 -> 64, no biases, and the gain.
    attention = SelfAttention2d(64, spectral=False)
    assert sum(p.numel() for p in attention.parameters()) == 2 * 64 * 8 + 2 * 64 * 32 + 1
    assert attention(randn(1, 64, 8, 8), need_weights=True)[1].shape == (1, 64, 16)
    assert SelfAttention2d(4, spectral=False).query.out_channels == 1


def test_the_four_convolutions_of_attention_have_spectral_norm_1():
    torch.manual_seed(0)
    attention, x = SelfAttention2d(16), randn(1, 16, 4, 4)
    for _ in range(100):
        attention(x)
    attention.eval()
    for layer in (attention.query, attention.key, attention.value, attention.out):
        # 100 steps of the power iteration: what is left of the error is rounding.
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=1e-4)


def test_attention_can_be_differentiated_twice():
    # R1 needs it; the fused attention of PyTorch raises.
    attention = randomised(SelfAttention2d(2, spectral=False)).double()
    x = randn(1, 2, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(attention, x)
    assert torch.autograd.gradgradcheck(attention, x)


def test_attention_refuses_maps_that_do_not_fit():
    attention = SelfAttention2d(8)
    with pytest.raises(ValueError, match=r"`x` must be 2x2 or larger to be pooled; got \(1, 8, 1"):
        attention(randn(1, 8, 1, 4))
    with pytest.raises(ValueError, match=r"`x` must be \(batch, 8, height, width\)"):
        attention(randn(1, 4, 4, 4))
    with pytest.raises(ValueError, match="`key_channels` must be a whole number"):
        SelfAttention2d(8, key_channels=0)


# Norm with what follows


@pytest.mark.parametrize("momentum", [0.1, None])
def test_fused_batch_norm_is_batch_norm_with_activation_and_upsampling(momentum):
    fused = randomised(FusedBatchNorm2d(6, momentum=momentum, activation="relu", upsample=2))
    plain = nn.BatchNorm2d(6, momentum=momentum)
    plain.load_state_dict(fused.state_dict())
    for seed in range(3):
        x = randn(4, 6, 3, 5, seed=seed) * 2 + 1
        expected = F.interpolate(plain(x).relu(), scale_factor=2)
        torch.testing.assert_close(fused(x), expected, atol=2e-6, rtol=2e-6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value)
    x = randn(4, 6, 3, 5, seed=9)
    expected = F.interpolate(plain.eval()(x).relu(), scale_factor=2)
    torch.testing.assert_close(fused.eval()(x), expected, atol=2e-6, rtol=2e-6)
    assert fused.num_batches_tracked == 3
    assert "6, eps=1e-05, activation='relu', upsample=2" in repr(fused)


def test_fused_batch_norm_keeps_its_statistics_in_float32_in_a_half_module():
    norm = FusedBatchNorm2d(6)
    norm(randn(4, 6, 3, 5) + 1)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    half = norm.bfloat16()
    assert half.weight.dtype == half(randn(4, 6, 3, 5).bfloat16()).dtype == torch.bfloat16
    assert not half.running_mean.equal(mean)  # and they still move
    half.eval()
    for other in (FusedBatchNorm2d(6, dtype=torch.float16), copy.deepcopy(half).half()):
        assert other.weight.dtype == torch.float16
        assert other.running_mean.dtype == other.running_var.dtype == torch.float32
    half = FusedBatchNorm2d(6)
    half.running_mean, half.running_var = mean, variance
    assert half.half().running_mean.equal(mean)
    assert half.running_var.equal(variance)


def test_tracking_can_be_switched_off_and_statistics_left_out_as_in_pytorch():
    norm, x = FusedBatchNorm2d(6, momentum=None), randn(4, 6, 3, 5) + 1
    norm.track_running_stats = False
    expected = norm(x)
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    norm.running_mean = norm.running_var = None
    assert norm.eval()(x).equal(expected)


def test_the_statistics_of_fused_batch_norm_can_be_recomputed():
    x = randn(64, 6, 2, 2) * 3 + 1
    norm = recompute_batchnorm_(FusedBatchNorm2d(6, activation="relu"), list(x.split(16)))
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3)))


def test_fused_batch_norm_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"`activation` must be one of .*; got 'gelu'"):
        FusedBatchNorm2d(4, activation="gelu")
    with pytest.raises(ValueError, match="`upsample` must be one of 1, 2; got 3"):
        FusedBatchNorm2d(4, upsample=3)
    for name in ("eps", "negative_slope", "momentum"):
        with pytest.raises(ValueError, match=f"`{name}` must .*; got -1"):
            FusedBatchNorm2d(4, **{name: -1})
    with pytest.raises(ValueError, match=r"`x` must be \(batch, 4, height, width\)"):
        FusedBatchNorm2d(4)(randn(2, 3, 4, 4))


# Upsampling


@pytest.mark.parametrize("kind", ["nearest", "bilinear", "deconv4", "pixel_shuffle"])
def test_every_upsampler_doubles_the_size(kind):
    layer = upsampling_conv(kind, 6, 5, dtype=torch.float64)
    y = layer(randn(2, 6, 3, 4, dtype=torch.float64))
    assert y.shape == (2, 5, 6, 8)
    assert y.dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "flat"),
    [("nearest", True), ("bilinear", True), ("pixel_shuffle", True), ("deconv4", False)],
)
def test_a_constant_gives_four_equal_phases_in_the_interior(kind, flat):
    # Closed form: 0 for all but the transposed convolution, whose phases have kernels of their own.
    torch.manual_seed(0)
    layer = upsampling_conv(kind, 6, 5, dtype=torch.float64)
    x = randn(2, 6, 1, 1, dtype=torch.float64).expand(2, 6, 8, 8)
    inside = layer(x)[..., 4:-4, 4:-4]
    phases = torch.stack([inside[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
    difference = (phases - phases.mean(0)).abs().max().item()
    assert (difference < 1e-14) if flat else (difference > 0.1)


def test_pixel_shuffle_with_icnr_is_convolution_with_nearest_upsampling_behind_it():
    torch.manual_seed(0)
    layer = upsampling_conv("pixel_shuffle", 6, 5)
    x, (wide, _) = randn(2, 6, 4, 4), layer
    narrow = F.conv2d(x, wide.weight[::4], wide.bias[::4], padding=1)
    torch.testing.assert_close(layer(x), F.interpolate(narrow, scale_factor=2))
    assert wide.bias[::4].unique().numel() == 5  # a bias that is not 0 must not make phases either


def test_icnr_keeps_the_first_kernel_of_each_group_and_its_memory():
    weight = randn(18, 2, 3, 3)
    kept = weight[::9].clone()
    assert icnr_(weight, 3) is weight
    assert weight.equal(kept.repeat_interleave(9, dim=0))
    parameter = nn.Parameter(randn(8))
    assert icnr_(parameter).grad_fn is None


def test_upsamplers_refuse_what_they_do_not_know(unchecked):
    with pytest.raises(ValueError, match=r"`kind` must be one of .*nearest.*; got 'cubic'"):
        upsampling_conv("cubic", 4, 4)
    with pytest.raises(ValueError, match="`out_channels` must be a whole number"):
        upsampling_conv("nearest", 4, 0)
    with pytest.raises(ValueError, match=r"a multiple of 4 output channels.*got shape \(6, 2\)"):
        icnr_(torch.zeros(6, 2))


# Residual blocks


def test_the_shortcut_is_that_of_x_and_not_of_relu_x():
    # Erratum 9. With ReLU in place the shortcut becomes ReLU(x), bit for bit, so the two blocks
    # differ by at most the depth of the deepest negative value, and there by just that.
    torch.manual_seed(0)
    block, x = ResBlockDown(6, 6, resample="none"), randn(2, 6, 5, 5)
    branch = block.second(block.first(x))
    ours = block(x)
    assert ours.equal(x + branch)
    block.first.norm = nn.ReLU(inplace=True)
    wrong = block(x.clone())
    assert wrong.equal(x.relu() + branch)
    difference = (wrong - ours).abs().max().item()
    assert difference == pytest.approx(-x.min().item(), abs=1e-6)
    assert difference > 2.5


@pytest.mark.parametrize("make", [ResBlockUp, ResBlockDown])
def test_a_block_leaves_its_input_alone(make):
    x = randn(2, 6, 4, 4)
    before = x.clone()
    make(6, 4)(x)
    assert x.equal(before)


def test_a_block_down_is_what_sngan_writes_with_the_shortcut_convolved_before_the_pooling():
    block = randomised(ResBlockDown(3, 5, residual_scale=0.5)).double()
    x = randn(2, 3, 6, 4, dtype=torch.float64)
    h = block.second.conv(block.first.conv(x.relu()).relu())
    expected = F.avg_pool2d(block.shortcut(x), 2) + 0.5 * F.avg_pool2d(h, 2)
    torch.testing.assert_close(block(x), expected)


def test_the_first_block_has_no_activation_on_the_image():
    block = randomised(ResBlockDown(1, 4, preactivation=False))
    dark = -randn(2, 1, 4, 4).abs()
    h = F.avg_pool2d(block.second.conv(block.first.conv(dark).relu()), 2)
    torch.testing.assert_close(block(dark), block.shortcut(F.avg_pool2d(dark, 2)) + h)
    made = []
    ResBlockDown(1, 4, preactivation=False, norm=lambda *a, **k: made.append(a) or nn.Identity())
    assert made == [(4,)]  # and no norm is made for nothing


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "deconv4", "pixel_shuffle"])
@pytest.mark.parametrize("norm", [None, FusedBatchNorm2d])
def test_a_block_up_is_what_sngan_writes_with_the_shortcut_convolved_after_the_upsampling(
    resample, norm
):
    # Also: the norm that upsamples by itself gives what norm, ReLU and upsampling give one by one.
    torch.manual_seed(0)
    block = ResBlockUp(6, 4, norm=norm, resample=resample, residual_scale=0.5).double()
    mode = "bilinear" if resample == "bilinear" else "nearest"
    x = randn(2, 6, 3, 5, dtype=torch.float64) + 0.3

    def normed(h):
        return (h if norm is None else F.batch_norm(h, None, None, training=True)).relu()

    first = block.first.conv
    if resample in ("nearest", "bilinear"):
        conv = first if isinstance(first, nn.Conv2d) else first[1]
        h = conv(F.interpolate(normed(x), scale_factor=2, mode=mode))
    else:
        h = first(normed(x))
    h = block.second.conv(normed(h))
    shortcut = block.shortcut(F.interpolate(x, scale_factor=2, mode=mode))
    torch.testing.assert_close(block(x), shortcut + 0.5 * h)


def test_both_norms_of_a_block_get_the_condition():
    norm = partial(SelfModulatedBatchNorm2d, z_dim=3, num_classes=4)
    block = randomised(ResBlockUp(6, 4, norm=norm)).eval()
    x, z, y = randn(2, 6, 4, 4), randn(2, 3), torch.tensor([0, 3])
    for part in (block.first, block.second):
        alone = copy.deepcopy(block)
        for other in {alone.first, alone.second} - {getattr(alone, _name(block, part))}:
            nn.init.zeros_(other.norm.gain.weight), nn.init.zeros_(other.norm.shift.weight)
        base = alone(x, z, y)
        for z_new, y_new in [(z + torch.tensor([[0.0], [1.0]]), y), (z, torch.tensor([0, 1]))]:
            moved = alone(x, z_new, y_new)
            assert moved[0].equal(base[0])
            assert not torch.allclose(moved[1], base[1], atol=1e-3)


def _name(module, child):
    return next(name for name, each in module.named_children() if each is child)


def test_blocks_have_as_many_parameters_as_counted_by_hand():
    # 3x3 convolutions 9 ab + b, the 1x1 shortcut ab + b, conditional gains and shifts 2 KC.
    norm = partial(ConditionalBatchNorm2d, num_classes=10)
    up = (9 * 8 * 4 + 4) + (9 * 4 * 4 + 4) + (8 * 4 + 4)
    assert _count(ResBlockUp(8, 4)) == up
    assert _count(ResBlockUp(8, 4, norm=norm)) == up + 2 * 10 * (8 + 4)
    # 4x4 transposed, and four times the channels
    assert _count(ResBlockUp(8, 4, resample="deconv4")) == up + 7 * 8 * 4
    assert _count(ResBlockUp(8, 4, resample="pixel_shuffle")) == up + 3 * (9 * 8 * 4 + 4)
    down = (9 * 4 * 8 + 8) + (9 * 8 * 8 + 8)
    assert _count(ResBlockDown(4, 8)) == down + 4 * 8 + 8
    assert _count(ResBlockDown(8, 8, resample="none")) == 2 * (9 * 8 * 8 + 8)


def _count(module):
    return sum(p.numel() for p in module.parameters())


def test_blocks_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"`resample` must be one of .*; got 'average'"):
        ResBlockUp(4, 4, resample="average")
    with pytest.raises(ValueError, match=r"`resample` must be one of .*; got 'nearest'"):
        ResBlockDown(4, 4, resample="nearest")
    with pytest.raises(ValueError, match="`in_channels` must be a whole number"):
        ResBlockDown(0, 4)
    for block in (ResBlockUp(4, 4), ResBlockDown(4, 4)):
        with pytest.raises(ValueError, match=r"`x` must be \(batch, 4, height, width\)"):
            block(randn(2, 3, 4, 4))
