"""Modulated norms against closed forms, PyTorch's plain norms and hand-made foreign weights."""

import copy
import math
import pickle
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cln_tutorial.conditional_norm import conditional_layer_norm, conditional_rms_norm
from cln_tutorial.gan_architectures.foreign import fold_into_conv, load_foreign_state_dict
from cln_tutorial.gan_architectures.functional import (
    minibatch_std,
    modulated_batch_norm,
    pixel_norm,
)
from cln_tutorial.gan_architectures.norms import (
    AdaIN,
    ConditionalBatchNorm2d,
    MinibatchStd,
    ModulatedNorm2d,
    PixelNorm,
    SelfModulatedBatchNorm2d,
)
from cln_tutorial.weight_averaging import ExponentialMovingAverage, recompute_batchnorm_

N, C, K, Z = 12, 8, 4, 6
EPS = 1e-5


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def maps(n=N, channels=C, dtype=torch.float32, size=(5, 3)):
    return 2 * torch.randn(n, channels, *size, dtype=dtype) + torch.arange(channels).view(-1, 1, 1)


def labels(n=N):
    return torch.arange(n) % K


def randomise(module, std=0.5):
    """Give all parameters random values: a norm that is the plain one proves little."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def per_map(vectors):
    return vectors[:, :, None, None]


def pixel(x):
    return x / (x.square().mean(1, keepdim=True) + EPS).sqrt()


def over_channels(x):
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=EPS).movedim(-1, 1)


PLAIN = {
    "batch": lambda x: F.batch_norm(x, None, None, training=True, eps=EPS),
    "instance": lambda x: F.instance_norm(x, eps=EPS),
    "layer": lambda x: F.layer_norm(x, x.shape[1:], eps=EPS),
    "channel": over_channels,
    "group": lambda x: F.group_norm(x, 2, eps=EPS),
    "pixel": pixel,
    "none": lambda x: x,
}


def family(**options):
    """A norm of each public class and form, with the condition it takes."""
    z, y = torch.randn(N, Z), labels()
    return {
        "cbn": (ConditionalBatchNorm2d(C, K, **options), (y,)),
        "selfmod": (SelfModulatedBatchNorm2d(C, Z, **options), (z,)),
        "separate": (SelfModulatedBatchNorm2d(C, Z, share_hidden=False, **options), (z,)),
        "selfmod+label": (SelfModulatedBatchNorm2d(C, Z, num_classes=K, **options), (z, y)),
        "article": (
            SelfModulatedBatchNorm2d(C, Z, num_classes=K, label_form="article", **options),
            (z, y),
        ),
        "biggan": (ModulatedNorm2d(C, Z, bias=False, **options), (z,)),
    }


# --- at the start: the plain norm -----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(family()))
def test_a_new_batch_norm_is_the_plain_one_bit_for_bit(name, training):
    norm, condition = family()[name]
    plain = nn.BatchNorm2d(C, affine=False)
    for module in (norm, plain):
        module.train(training)
        module.running_mean.copy_(torch.arange(C))
        module.running_var.copy_(1 + torch.arange(C))
    x = maps()
    assert norm(x, *condition).equal(plain(x))
    assert norm.running_mean.equal(plain.running_mean)
    assert norm.running_var.equal(plain.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_a_new_batch_norm_on_large_maps_is_the_plain_one_to_rounding(training):
    norm, plain = ConditionalBatchNorm2d(C, K), nn.BatchNorm2d(C, affine=False)
    x = maps(size=(40, 32))  # 123,000 values, where a faster backend may compute
    out, expected = norm.train(training)(x, labels()), plain.train(training)(x)
    # Values up to 12 less a mean of 7, in float32: 12 * 2^-23 = 1.4e-6, and some units more.
    assert (out - expected).abs().max() < 5e-6
    assert torch.allclose(norm.running_mean, plain.running_mean, atol=1e-6)
    assert torch.allclose(norm.running_var, plain.running_var, rtol=1e-5)


@pytest.mark.parametrize("kind", list(PLAIN))
def test_each_new_member_of_the_family_is_the_plain_norm(kind):
    norm = ModulatedNorm2d(C, Z, norm=kind, groups=2)
    x = maps(dtype=torch.float64)
    # The same sums in another order: a few units of 2^-53.
    assert torch.allclose(norm.double()(x, torch.randn(N, Z).double()), PLAIN[kind](x), atol=1e-13)


@pytest.mark.parametrize("kind", list(PLAIN))
def test_scale_and_shift_are_those_of_each_map(kind):
    norm = randomise(ModulatedNorm2d(C, Z, norm=kind, groups=2).double())
    x, cond = maps(dtype=torch.float64), torch.randn(N, Z).double()
    gamma = 1 + cond @ norm.gain.weight.T + norm.gain.bias
    beta = cond @ norm.shift.weight.T + norm.shift.bias
    expected = per_map(gamma) * PLAIN[kind](x) + per_map(beta)
    assert torch.allclose(norm(x, cond), expected, atol=1e-12)
    assert torch.allclose(norm.gamma_beta(cond)[0], gamma)
    assert torch.allclose(norm.gamma_beta(cond)[1], beta)


def test_adain_is_the_member_with_the_statistics_of_each_map():
    norm = randomise(AdaIN(C, Z))
    x, w = maps(), torch.randn(N, Z)
    gamma, beta = norm.gamma_beta(w)
    expected = per_map(gamma) * F.instance_norm(x) + per_map(beta)
    assert torch.allclose(norm(x, w), expected, atol=1e-5)
    # No statistics of others: alone, and in evaluation, a map is what it is in the batch.
    assert torch.allclose(norm.eval()(x[3:4], w[3:4]), norm.train()(x, w)[3:4], atol=1e-6)
    assert not [name for name, _ in norm.named_buffers()]


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activation_and_upsampling_follow_the_modulation(activation):
    after = {"activation": activation, "negative_slope": 0.3, "upsample": 2}
    slope = 0.0 if activation == "relu" else 0.3
    for kind in ("batch", "instance", "pixel"):
        norm = randomise(ModulatedNorm2d(C, Z, norm=kind, **after))
        plain = ModulatedNorm2d(C, Z, norm=kind)
        plain.load_state_dict(norm.state_dict())
        x, cond = maps(), torch.randn(N, Z)
        expected = F.leaky_relu(plain(x, cond), slope).repeat_interleave(2, 2)
        expected = expected.repeat_interleave(2, 3)
        assert torch.allclose(norm(x, cond), expected, atol=1e-5), kind


def test_random_heads_start_at_the_stated_deviation_and_resetting_starts_anew():
    for norm in (
        SelfModulatedBatchNorm2d(64, 32, hidden=64, zero_init=False),
        ConditionalBatchNorm2d(64, 64, init_std=0.02),
    ):
        for _ in range(2):
            for head in (norm.gain, norm.shift):
                # 4,096 draws: the deviation is known to 1 / sqrt(8,192) = 1.1 %; 5 of these.
                assert abs(head.weight.std().item() / 0.02 - 1) < 0.055
                assert head.bias is None or not head.bias.any()
            randomise(norm)
            norm.running_mean.fill_(7)
            norm.reset_parameters()
        assert not norm.running_mean.any()
    labelled = SelfModulatedBatchNorm2d(C, Z, num_classes=K)
    randomise(labelled).reset_parameters()
    assert (labelled.embed_gain.weight == 1).all()
    assert not labelled.embed_shift.weight.any()
    # As nn.Linear begins: uniform below 1 / sqrt(fan-in).
    assert 0 < labelled.hidden.weight.abs().max() <= 1 / math.sqrt(Z)


# --- conditional batch norm -----------------------------------------------------------------------


def test_conditional_batch_norm_is_one_batch_norm_and_an_affine_map_per_class():
    norm, x, y = randomise(ConditionalBatchNorm2d(C, K)), maps(), labels()
    out, plain = norm(x, y), F.batch_norm(x, None, None, training=True)
    for k in range(K):
        gamma, beta = 1 + norm.gain.weight[:, k], norm.shift.weight[:, k]
        expected = plain[y == k] * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)
        assert torch.allclose(out[y == k], expected, atol=1e-5)


def test_only_the_classes_that_were_seen_get_a_gradient_and_it_is_the_closed_form():
    norm, x = ConditionalBatchNorm2d(C, K), maps()
    y = torch.tensor([0, 2, 2] * (N // 3))
    upstream = torch.randn_like(x)
    norm(x, y).backward(upstream)
    plain = F.batch_norm(x, None, None, training=True)
    for k in range(K):
        of_class = (y == k).view(-1, 1, 1, 1)
        d_gain = (upstream * plain * of_class).sum((0, 2, 3))
        assert torch.allclose(norm.gain.weight.grad[:, k], d_gain, atol=1e-4)
        assert torch.allclose(
            norm.shift.weight.grad[:, k], (upstream * of_class).sum((0, 2, 3)), atol=1e-4
        )


def test_class_means_are_not_zero_only_their_mean_weighted_by_frequency_is():
    # Classes at -3, -1, 1 and 5, seen 6, 3, 2 and 1 times; the values of each lie at +-1 around
    # its mean. Mean of all (-18 - 3 + 2 + 5) / 12 = -7/6, mean square 1 + (54 + 3 + 2 + 25) / 12
    # = 8: variance 8 - 49/36 = 239/36.
    centres, times = torch.tensor([-3.0, -1.0, 1.0, 5.0]), torch.tensor([6, 3, 2, 1])
    y = torch.repeat_interleave(torch.arange(4), times)
    x = centres[y].view(-1, 1, 1, 1) + torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    out = ConditionalBatchNorm2d(1, 4)(x, y)
    found = torch.stack([out[y == k].mean() for k in range(4)])
    expected = (centres + 7 / 6) / math.sqrt(239 / 36 + EPS)
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.abs().min() > 0.06
    assert abs((found * times).sum().item()) < 1e-5


def test_running_statistics_belong_to_the_mix_of_labels():
    # Class 0 is -1, class 1 is 1. Trained half and half, class 1 alone comes out at 1, not at 0.
    norm = ConditionalBatchNorm2d(1, 2, momentum=1.0)
    y = torch.tensor([0, 1, 0, 1])
    x = (2.0 * y - 1).view(-1, 1, 1, 1)
    norm(x, y)
    scale = math.sqrt(4 / 3 + EPS)  # the running variance is the unbiased one of four values
    ones = norm.eval()(x[1::2], y[1::2])
    assert torch.allclose(ones, torch.full_like(ones, 1 / scale), atol=1e-6)


def test_one_hot_weights_are_labels_and_other_weights_average_scales_and_shifts():
    norm, x, y = randomise(ConditionalBatchNorm2d(C, K)), maps(), labels()
    assert norm(x, F.one_hot(y, K).float()).equal(norm(x, y))
    weights = torch.rand(N, K).softmax(1)
    gamma, beta = norm.gamma_beta(weights)
    all_gammas, all_betas = norm.gamma_beta(torch.arange(K))
    assert torch.allclose(gamma, weights @ all_gammas, atol=1e-6)
    assert torch.allclose(beta, weights @ all_betas, atol=1e-6)


def test_equal_classes_are_batch_norm_with_its_affine_map():
    norm, plain = ConditionalBatchNorm2d(C, K), randomise(nn.BatchNorm2d(C))
    with torch.no_grad():
        norm.gain.weight.copy_((plain.weight - 1)[:, None].expand(C, K))
        norm.shift.weight.copy_(plain.bias[:, None].expand(C, K))
    x, y = maps(), torch.randint(K, (N,))
    assert torch.allclose(norm(x, y), plain(x), atol=1e-5)


@pytest.mark.parametrize("name", list(family()))
def test_a_permutation_of_the_batch_permutes_the_result(name):
    norm, condition = family()[name]
    randomise(norm.double())
    condition = [c.double() if c.is_floating_point() else c for c in condition]
    x, order = maps(dtype=torch.float64), torch.randperm(N)
    out = norm(x[order], *(c[order] for c in condition))
    assert torch.allclose(out, norm(x, *condition)[order], atol=1e-12)


# --- self-modulation ------------------------------------------------------------------------------


def test_with_one_z_for_all_it_is_batch_norm_with_an_affine_map():
    norm = randomise(SelfModulatedBatchNorm2d(C, Z))
    plain, z = nn.BatchNorm2d(C), torch.randn(1, Z)
    hidden = (z @ norm.hidden.weight.T + norm.hidden.bias).relu()
    with torch.no_grad():
        plain.weight.copy_((1 + hidden @ norm.gain.weight.T + norm.gain.bias)[0])
        plain.bias.copy_((hidden @ norm.shift.weight.T + norm.shift.bias)[0])
    for _ in range(3):
        x = maps(dtype=torch.float32)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        upstream = torch.randn_like(x)
        one, other = norm(ours, z.expand(N, Z)), plain(theirs)
        scale = other.abs().max()
        assert ((one - other).abs().max() / scale) < 1e-6
        one.backward(upstream)
        other.backward(upstream)
        assert (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max() < 1e-6
    assert torch.allclose(norm.running_mean, plain.running_mean, atol=1e-6)
    assert torch.allclose(norm.running_var, plain.running_var, rtol=1e-6)
    assert norm.num_batches_tracked == plain.num_batches_tracked == 3


def test_parameters_per_layer():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    # zH + H + 2(HC + C) and 2(zH + H + HC + C) at C = 64, z = H = 32, against 2C.
    assert count(SelfModulatedBatchNorm2d(64, 32)) == 5280
    assert count(SelfModulatedBatchNorm2d(64, 32, share_hidden=False)) == 6336
    assert count(nn.BatchNorm2d(64)) == 128
    assert count(ConditionalBatchNorm2d(64, 10)) == 2 * 64 * 10


@pytest.mark.parametrize("share", [True, False])
def test_one_hidden_layer_for_scale_and_shift_or_one_for_each(share):
    norm = randomise(SelfModulatedBatchNorm2d(C, Z, hidden=5, share_hidden=share))
    z = torch.randn(N, Z)
    first = F.relu(norm.hidden(z))
    second = first if share else F.relu(norm.hidden_shift(z))
    gamma, beta = norm.gamma_beta(z)
    assert torch.allclose(gamma, 1 + norm.gain(first), atol=1e-6)
    assert torch.allclose(beta, norm.shift(second), atol=1e-6)


def test_the_formula_as_printed_without_bias_and_one_is_dead_at_a_small_start():
    # gamma = W max(0, Vz) with entries of deviation s = 0.02: E gamma^2 = H s^2 * s^2 |z|^2 / 2.
    norm = SelfModulatedBatchNorm2d(C, 32, hidden=64, zero_init=False)
    nn.init.normal_(norm.hidden.weight, std=0.02)
    nn.init.zeros_(norm.hidden.bias)
    x, z = maps(256), torch.randn(256, 32)
    gamma, beta = norm.gamma_beta(z)
    printed = modulated_batch_norm(x, gamma - 1, beta, training=True, gain_offset=0.0)
    expected = math.sqrt(64 * 0.02**4 * 32 / 2)  # 0.0128
    found = (gamma - 1).square().mean().sqrt().item()
    # 8 * 64 products of two normal weights: 2 / sqrt(512) = 9 %. 30 % is three of these.
    assert abs(found / expected - 1) < 0.3
    assert printed.square().mean().sqrt() < 3 * expected  # the signal of size 1 is gone
    assert abs(norm(x, z).square().mean().sqrt().item() - 1) < 0.01  # with 1 and bias it is not


def test_the_articles_label_formula_is_the_papers_with_a_gain_shifted_by_one():
    paper = randomise(SelfModulatedBatchNorm2d(C, Z, num_classes=K))
    article = SelfModulatedBatchNorm2d(C, Z, num_classes=K, label_form="article")
    article.load_state_dict(paper.state_dict())
    x, z, y = maps(), torch.randn(N, Z), labels()
    by_hand = paper.embed_shift.weight[y] + z * paper.embed_gain.weight[y]
    alone = SelfModulatedBatchNorm2d(C, Z)
    alone.load_state_dict({k: v for k, v in paper.state_dict().items() if "embed" not in k})
    assert torch.allclose(paper(x, z, y), alone(x, by_hand), atol=1e-5)
    assert torch.allclose(article(x, z, y), alone(x, z + by_hand), atol=1e-5)
    with torch.no_grad():
        article.embed_gain.weight -= 1
    assert torch.allclose(article(x, z, y), paper(x, z, y), atol=1e-5)


def test_without_a_gain_of_labels_the_article_keeps_the_noise_and_the_paper_loses_it():
    x, y, z, other = maps(), labels(), torch.randn(N, Z), torch.randn(N, Z)
    for form, loses in (("paper", True), ("article", False)):
        norm = randomise(SelfModulatedBatchNorm2d(C, Z, num_classes=K, label_form=form))
        nn.init.zeros_(norm.embed_gain.weight)
        assert torch.equal(norm(x, z, y), norm(x, other, y)) == loses


@pytest.mark.parametrize("form", ["paper", "article"])
def test_labels_do_nothing_at_the_start(form):
    norm = SelfModulatedBatchNorm2d(C, Z, num_classes=K, label_form=form)
    randomise(norm.gain), randomise(norm.shift)
    x, z = maps(), torch.randn(N, Z)
    assert norm(x, z, labels()).equal(norm(x, z, labels().flip(0)))


def test_labels_of_self_modulation_may_be_mixed_too():
    norm = randomise(SelfModulatedBatchNorm2d(C, Z, num_classes=K))
    x, z, y = maps(), torch.randn(N, Z), labels()
    assert norm(x, z, F.one_hot(y, K).float()).equal(norm(x, z, y))


def test_spectral_norm_of_all_layers_with_one_power_iteration_per_training_step():
    norm = SelfModulatedBatchNorm2d(C, Z, zero_init=False, spectral=True, share_hidden=False)
    x, z = maps(), torch.randn(N, Z)
    layers = (norm.hidden, norm.hidden_shift, norm.gain, norm.shift)
    twin = copy.deepcopy(norm.hidden)
    twin.weight  # noqa: B018 - a look in training mode is a step of the power iteration
    norm(x, z)
    assert norm.hidden.parametrizations.weight[0]._u.equal(twin.parametrizations.weight[0]._u)
    for _ in range(100):
        norm(x, z)
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.eval().weight, 2).item() == pytest.approx(1, abs=1e-3)
    before = copy.deepcopy(norm.eval().state_dict())
    norm(x, z)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    nn.init.zeros_(norm.gain.parametrizations.weight.original)
    norm.reset_parameters()
    assert norm.gain.parametrizations.weight.original.std() > 0.01
    with pytest.raises(ValueError, match="zero_init=False"):
        SelfModulatedBatchNorm2d(C, Z, spectral=True)


# --- the relatives --------------------------------------------------------------------------------


def test_conditional_layer_norm_of_article_7124_is_a_member_of_the_family():
    cond, sequence = torch.randn(N, Z), torch.randn(N, 7, C)
    as_maps = sequence.movedim(-1, 1)[..., None]
    for kind, relative in (("channel", conditional_layer_norm), ("pixel", conditional_rms_norm)):
        norm = randomise(ModulatedNorm2d(C, Z, norm=kind))
        expected = relative(sequence, *norm.gamma_beta(cond), eps=EPS)
        assert torch.allclose(norm(as_maps, cond)[..., 0].movedim(1, -1), expected, atol=1e-5)
    # Over all channels of a whole map it is the same only where a map is one position.
    layer = randomise(ModulatedNorm2d(C, Z, norm="layer"))
    one = conditional_layer_norm(sequence[:, :1], *layer.gamma_beta(cond), eps=EPS)
    assert torch.allclose(layer(as_maps[:, :, :1], cond)[..., 0], one.movedim(-1, 1), atol=1e-5)
    many = conditional_layer_norm(sequence, *layer.gamma_beta(cond), eps=EPS)
    assert not torch.allclose(layer(as_maps, cond)[..., 0], many.movedim(-1, 1), atol=0.1)


def test_the_modules_without_parameters_are_their_functions():
    x = maps()
    assert PixelNorm(eps=0.5)(x).equal(pixel_norm(x, eps=0.5))
    assert MinibatchStd(6, 2, 0.5)(x).equal(minibatch_std(x, 6, 2, 0.5))
    assert repr(PixelNorm()) == "PixelNorm(eps=1e-08)"
    assert repr(MinibatchStd()) == "MinibatchStd(group_size=4, num_channels=1)"


def test_a_norm_says_what_it_is():
    norm = ConditionalBatchNorm2d(C, K, activation="relu", upsample=2)
    assert "8, eps=1e-05, activation='relu', upsample=2, norm='batch'" in repr(norm)


# --- running statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_are_those_of_pytorch(momentum):
    norm = randomise(ConditionalBatchNorm2d(C, K, momentum=momentum))
    plain = nn.BatchNorm2d(C, momentum=momentum, affine=False)
    seen = []
    for n in (12, 4, 8):
        x = maps(n)
        seen.append(x.mean((0, 2, 3)))
        norm(x, labels(n)), plain(x)
    assert torch.allclose(norm.running_mean, plain.running_mean, atol=1e-6)
    assert torch.allclose(norm.running_var, plain.running_var, rtol=1e-6)
    assert norm.num_batches_tracked == 3
    if momentum is None:  # each batch with the same weight
        assert torch.allclose(norm.running_mean, sum(seen) / 3, atol=1e-6)
    norm.eval(), plain.eval()
    gamma, beta = norm.gamma_beta(labels())
    x = maps()
    assert torch.allclose(norm(x, labels()), per_map(gamma) * plain(x) + per_map(beta), atol=1e-5)
    assert norm.num_batches_tracked == 3


def test_without_running_statistics_a_batch_is_always_normalised_by_itself():
    norm = randomise(ConditionalBatchNorm2d(C, K, track_running_stats=False))
    assert not list(norm.buffers())
    x, y = maps(), labels()
    assert norm.train()(x, y).equal(norm.eval()(x, y))
    switched = randomise(ConditionalBatchNorm2d(C, K))  # as in PyTorch, it can be switched off
    switched.track_running_stats = False
    switched(x, y)
    assert not switched.running_mean.any()
    assert switched.num_batches_tracked == 0


def test_a_batch_that_is_refused_leaves_everything_as_it_was(unchecked):
    norm = ConditionalBatchNorm2d(C, K)
    before = copy.deepcopy(norm.state_dict())
    refused = [
        (maps(1, size=(1, 1)), labels(1), "1 values in each channel; training needs more"),
        (maps(3), labels(4), "`y` must hold one row for each map"),
        (maps(3, 5), labels(3), r"`x` must be \(batch, 8"),
    ]
    for x, y, match in refused:
        with pytest.raises(ValueError, match=match):
            norm(x, y)
    assert all(before[key].equal(value) for key, value in norm.state_dict().items())
    # Scale and shift themselves would be a step of the power iteration.
    norm = SelfModulatedBatchNorm2d(C, Z, spectral=True, zero_init=False)
    before = copy.deepcopy(norm.state_dict())
    for x, match in [(maps(3, 5), r"`x` must be \(batch, 8"), (maps(3), "`z` must hold one row")]:
        with pytest.raises(ValueError, match=match):
            norm(x, torch.randn(len(x) + (x.shape[1] == C), Z))
    assert all(before[key].equal(value) for key, value in norm.state_dict().items())


def test_an_empty_batch_passes_in_evaluation_and_is_refused_in_training():
    norm, nobody = ConditionalBatchNorm2d(C, K), torch.zeros(0, dtype=torch.int64)
    assert norm.eval()(maps(0), nobody).shape == (0, C, 5, 3)
    with pytest.raises(ValueError, match="0 values in each channel"):
        norm.train()(maps(0), nobody)
    assert ModulatedNorm2d(C, Z, norm="layer")(maps(0), torch.zeros(0, Z)).shape == (0, C, 5, 3)


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, C, 3), norm

    def forward(self, x, *condition):
        return self.norm(self.first(x), *condition)


def test_recalibration_finds_the_norms_and_pools_all_batches():
    net = Net(randomise(ConditionalBatchNorm2d(C, K)))
    batches = [(torch.randn(n, 2, 6, 6) + n, labels(n)) for n in (2, 9, 5)]
    recompute_batchnorm_(net, batches, forward=lambda model, batch: model(*batch))
    # One pass over the union: every sample counts the same, with the unbiased variance.
    h = torch.cat([net.first(x) for x, _ in batches]).double()
    mean, variance = h.mean((0, 2, 3)), h.transpose(0, 1).flatten(1).var(1)
    assert torch.allclose(net.norm.running_mean.double(), mean, atol=1e-6)
    assert torch.allclose(net.norm.running_var.double(), variance, rtol=1e-6)
    adain = Net(AdaIN(C, Z))  # has nothing to recalibrate, and is left alone
    assert recompute_batchnorm_(adain, batches) is adain


def test_averages_of_the_weights_carry_the_running_statistics_along():
    net = Net(randomise(SelfModulatedBatchNorm2d(C, Z)))
    average = ExponentialMovingAverage(net, decay=0.5, buffers="average")
    kept = []
    for _ in range(2):
        net(torch.randn(N, 2, 6, 6), torch.randn(N, Z))
        randomise(net)
        average.update()
        kept.append(copy.deepcopy(net.norm.state_dict()))
    averaged = average.averaged_model().norm.state_dict()
    for key in ("running_mean", "running_var", "gain.weight"):  # weights 1/4 and 1/2, corrected
        assert torch.allclose(averaged[key], (kept[0][key] + 2 * kept[1][key]) / 3, atol=1e-5), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_stay_in_float32_in_a_half_module(dtype):
    x, z = maps(), torch.randn(N, Z)
    norm = randomise(SelfModulatedBatchNorm2d(C, Z))
    norm(x, z)
    statistics = [norm.running_mean.clone(), norm.running_var.clone()]
    half = copy.deepcopy(norm).to(dtype)
    assert half.gain.weight.dtype == dtype
    assert half.running_mean.equal(statistics[0])
    assert half.running_var.equal(statistics[1])
    assert SelfModulatedBatchNorm2d(C, Z, dtype=dtype).running_mean.dtype == torch.float32
    out = half.eval()(x.to(dtype), z.to(dtype))
    assert out.dtype == dtype
    # Scales of up to 20 with a rounding of 2^-8 in weights, z and result.
    expected = norm.eval()(x, z)
    assert (out.float() - expected).abs().max() < 0.03 * expected.abs().max()
    assert norm.double().running_mean.dtype == torch.float64
    assert norm.to(torch.float32).running_mean.dtype == torch.float32


def test_a_scale_near_one_survives_bfloat16():
    norm = ConditionalBatchNorm2d(C, K, dtype=torch.bfloat16)
    nn.init.constant_(norm.gain.weight, 0.001)  # 1 + 0.001 is 1 in bfloat16
    gamma, _ = norm.gamma_beta(labels())
    assert gamma.dtype == torch.float32
    assert (gamma - 1.001).abs().max() < 1e-5


# --- as a module of PyTorch -----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(family()))
def test_state_copies_and_pickles_compute_the_same(name):
    norm, condition = family(activation="relu")[name]
    x = maps()
    randomise(norm)(x, *condition)
    loaded = family(activation="relu")[name][0]
    loaded.load_state_dict(norm.state_dict())
    expected = norm.eval()(x, *condition)
    for twin in (loaded, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert twin.eval()(x, *condition).equal(expected)


def test_the_running_statistics_have_the_names_of_pytorch():
    norm, plain = ConditionalBatchNorm2d(C, K), nn.BatchNorm2d(C, affine=False)
    assert set(norm.state_dict()) == {*plain.state_dict(), "gain.weight", "shift.weight"}
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("name", ["cbn", "selfmod+label"])
def test_autocast_keeps_the_statistics_in_float32(name):
    norm, condition = family()[name]
    net, x = Net(randomise(norm, std=0.1)), torch.randn(N, 2, 6, 6)
    twin = copy.deepcopy(net)
    expected = twin(x, *condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, *condition)
    assert out.dtype == torch.bfloat16
    # The convolution rounds its result to 2^-9, and so do the layers of scale and shift.
    assert (out.float() - expected).abs().max() < 2e-2 * expected.abs().max()
    assert torch.allclose(net.norm.running_mean, twin.norm.running_mean, atol=2e-3)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("name", ["cbn", "selfmod+label", "biggan"])
def test_a_stack_of_norms_under_vmap(name):
    norms = [randomise(family()[name][0]).eval() for _ in range(3)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    condition, x = family()[name][1], maps()
    parameters, buffers = torch.func.stack_module_state(norms)

    def call(parameters, buffers):
        return torch.func.functional_call(norms[0], (parameters, buffers), (x, *condition))

    stacked = torch.vmap(call)(parameters, buffers)
    for out, norm in zip(stacked, norms, strict=True):
        assert torch.allclose(out, norm(x, *condition), atol=1e-5)


def test_gradients_of_noise_and_maps_by_finite_differences():
    norm = randomise(SelfModulatedBatchNorm2d(2, 3, num_classes=K)).double()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, z: norm(x, z, labels(3)), (x, z))
    layer = randomise(ModulatedNorm2d(2, 3, norm="layer", activation="leaky_relu")).double()
    assert torch.autograd.gradcheck(layer, (x, z))


COMPILED = textwrap.dedent(
    """
    import torch
    from cln_tutorial.gan_architectures.norms import (
        AdaIN, ConditionalBatchNorm2d, SelfModulatedBatchNorm2d,
    )
    from cln_tutorial.gan_architectures.blocks import FusedBatchNorm2d

    torch.manual_seed(0)
    x, z, y = torch.randn(4, 8, 3, 3), torch.randn(4, 6), torch.tensor([0, 1, 2, 1])
    for norm, condition in [
        (ConditionalBatchNorm2d(8, 3, init_std=0.5, activation="relu"), (y,)),
        (SelfModulatedBatchNorm2d(8, 6, num_classes=3, zero_init=False), (z, y)),
        (AdaIN(8, 6, init_std=0.5), (z,)),
        (FusedBatchNorm2d(8, momentum=None).eval(), ()),  # looks at no counter
    ]:
        expected = norm(x, *condition)
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        out = compiled(x, *condition)
        assert torch.allclose(out, expected, atol=1e-5), type(norm)
        out.sum().backward()
        if norm.training and norm.running_mean is not None:
            assert norm.num_batches_tracked == 2, norm.num_batches_tracked
    print("done")
    """
)


def test_the_norms_compile_without_a_graph_break(child_output):
    assert child_output(COMPILED) == "done\n"


# --- weights of other libraries -------------------------------------------------------------------


class Foreign(nn.Module):
    """A conditional batch norm as others write it: any layers, and a scale as they centre it."""

    def __init__(self, offset, **layers):
        super().__init__()
        self.bn = nn.BatchNorm2d(C, affine=False)
        self.offset = offset
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x, cond):
        layers = [layer for name, layer in self.named_children() if name != "bn"]
        vectors = torch.cat([layer(cond) for layer in layers], dim=1)
        scale, shift = vectors.chunk(2, dim=1)
        return self.bn(x) * per_map(self.offset + scale) + per_map(shift)


def foreign_norms():
    def spectral(layer):
        return nn.utils.spectral_norm(layer)

    z, y = torch.randn(N, Z), labels()
    by_class, by_vector = ConditionalBatchNorm2d(C, K), ModulatedNorm2d(C, Z, bias=False)
    linear = {name: nn.Linear(Z, C, bias=False) for name in ("gain", "bias")}
    normed = {name: spectral(nn.Linear(Z, C, bias=False)) for name in ("gain", "bias")}
    pair = {name: nn.Embedding(K, C) for name in ("embed0", "embed1")}
    normed_pair = {name: spectral(nn.Embedding(K, C)) for name in ("embed0", "embed1")}
    return {
        "mimicry": (Foreign(0.0, embed=nn.Embedding(K, 2 * C)), by_class, y),
        "studiogan": (Foreign(1.0, **pair), by_class, y),
        "studiogan spectral": (Foreign(1.0, **normed_pair), by_class, y),
        "studiogan linear": (Foreign(1.0, **linear), by_vector, z),
        "studiogan linear spectral": (Foreign(1.0, **normed), by_vector, z),
    }


@pytest.mark.parametrize("layout", list(foreign_norms()))
def test_a_foreign_norm_computes_the_same_here(layout):
    foreign, norm, cond = foreign_norms()[layout]
    with torch.no_grad():
        for _ in range(3):
            foreign(maps(), cond)  # running statistics, and steps of the power iteration
    load_foreign_state_dict(norm, foreign.state_dict())
    foreign.eval(), norm.eval()
    x = maps()
    assert torch.allclose(norm(x, cond), foreign(x, cond), atol=1e-5)
    assert norm.num_batches_tracked == 3
    inside = nn.Sequential(nn.Identity(), foreign).state_dict() | {"0.weight": torch.ones(3)}
    twin = copy.deepcopy(norm)
    randomise(twin)
    load_foreign_state_dict(twin, inside, prefix="1.")
    assert twin(x, cond).equal(norm(x, cond))


def test_our_own_layout_is_loaded_as_it_is():
    for options in ({}, {"spectral": True, "zero_init": False, "num_classes": K}):
        norm = randomise(SelfModulatedBatchNorm2d(C, Z, **options))
        twin = SelfModulatedBatchNorm2d(C, Z, **options)
        load_foreign_state_dict(twin, norm.state_dict())
        assert all(twin.state_dict()[key].equal(value) for key, value in norm.state_dict().items())


def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded():
    foreign, norm, _ = foreign_norms()["mimicry"]
    state = foreign.state_dict()
    before = copy.deepcopy(norm.state_dict())

    def refused(module, state, match, **options):
        with pytest.raises(ValueError, match=match):
            load_foreign_state_dict(module, state, **options)

    refused(norm, {}, "no known layout.*got nothing")
    refused(norm, state, "under `prefix` 'G.'.*bn.running_mean", prefix="G.")
    refused(norm, {"embed.weight": state["embed.weight"]}, "`running_mean` is missing")
    refused(norm, state | {"extra": torch.ones(1)}, "`extra` is left over")
    wide = state | {"embed.weight": torch.ones(K + 1, 2 * C)}
    refused(norm, wide, r"`gain.weight` is \(8, 5\) instead of \(8, 4\)")
    refused(ModulatedNorm2d(C, K), state, "`gain.bias` is missing.*`bias=False`")
    for shape in [(2 * C,), (K, 2 * C - 1)]:
        match = r"`embed.weight` must be \(classes, 2 \* channels\); got \(" + str(shape[0])
        refused(norm, state | {"embed.weight": torch.ones(shape)}, match)
    spectral = foreign_norms()["studiogan spectral"][0].state_dict()
    del spectral["embed1.weight_v"]
    refused(norm, spectral, "`embed1.weight_orig`, but not both `embed1.weight_u`")
    assert all(before[key].equal(value) for key, value in norm.state_dict().items())


# --- folding --------------------------------------------------------------------------------------


def trained(norm):
    randomise(norm)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3)
    return norm.eval()


def convolutions(before):
    """Convolutions that end, or begin, with C channels, of all the sorts that one meets."""
    if before:
        return {
            "plain": nn.Conv2d(4, C, 3, padding=1),
            "without bias": nn.Conv2d(4, C, 3, stride=2, padding=1, bias=False),
            "groups": nn.Conv2d(4, C, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, C, 4, stride=2, padding=1),
            "transposed groups": nn.ConvTranspose2d(4, C, 4, stride=2, groups=2),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, C, 3)),
        }
    return {
        "plain": nn.Conv2d(C, 4, 3),
        "without bias": nn.Conv2d(C, 4, 3, padding="valid", bias=False),
        "groups": nn.Conv2d(C, 4, 3, stride=2, groups=2),
        "reflect": nn.Conv2d(C, 4, 3, padding=1, padding_mode="reflect"),
        "circular": nn.Conv2d(C, 4, 3, padding="same", padding_mode="circular"),
        "the same of 1x1": nn.Conv2d(C, 4, 1, padding="same"),
    }


@pytest.mark.parametrize("name", list(convolutions(True)))
def test_a_norm_behind_a_convolution_is_folded_into_it(name):
    conv = convolutions(True)[name]
    norm = trained(SelfModulatedBatchNorm2d(C, Z))
    before = copy.deepcopy(conv.state_dict())
    z, x, drawn = torch.randn(1, Z), torch.randn(3, 4, 6, 7), torch.get_rng_state()
    folded = fold_into_conv(conv, norm, z)
    assert torch.get_rng_state().equal(drawn)
    assert type(folded) in (nn.Conv2d, nn.ConvTranspose2d)
    assert all(before[key].equal(value) for key, value in conv.state_dict().items())
    expected = norm(conv.eval()(x), z.expand(3, Z))
    # Sums of 4 * 16 products at most, in float32.
    assert (folded(x) - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.parametrize("name", list(convolutions(False)))
def test_a_norm_before_a_convolution_is_folded_into_it(name):
    conv, norm = convolutions(False)[name], trained(ConditionalBatchNorm2d(C, K))
    folded, x = fold_into_conv(norm, conv, torch.tensor([2])), maps(3, size=(7, 6))
    expected = conv(norm(x, torch.full((3,), 2)))
    assert (folded(x) - expected).abs().max() < 5e-6 * expected.abs().max()
    assert not torch.allclose(folded(x), conv(norm(x, torch.full((3,), 1))), atol=0.1)


def test_what_follows_the_norm_follows_the_folded_convolution():
    conv = nn.Conv2d(4, C, 3)
    after = {"activation": "leaky_relu", "negative_slope": 0.3, "upsample": 2}
    norm = trained(ConditionalBatchNorm2d(C, K, **after))
    folded = fold_into_conv(conv, norm, torch.tensor([1]))
    x = torch.randn(3, 4, 6, 7)
    assert torch.allclose(folded(x), norm(conv(x), torch.full((3,), 1)), atol=1e-4)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.LeakyReLU, nn.Upsample]
    norm.activation, norm.upsample = "relu", 1
    folded = fold_into_conv(conv, norm, torch.tensor([1]))
    assert torch.allclose(folded(x), norm(conv(x), torch.full((3,), 1)), atol=1e-4)


def test_zero_padding_behind_a_norm_is_refused_because_the_border_would_be_wrong():
    conv, norm = nn.Conv2d(C, 4, 3, padding=1), trained(ConditionalBatchNorm2d(C, K))
    y, x = torch.tensor([2]), maps(1, size=(6, 6))
    with pytest.raises(ValueError, match=r"pads with zeros .*border.*padding_mode"):
        fold_into_conv(norm, conv, y)
    with pytest.raises(ValueError, match="pads with zeros"):
        fold_into_conv(norm, nn.Conv2d(C, 4, 3, padding="same"), y)
    with pytest.raises(ValueError, match="pads with zeros"):
        fold_into_conv(norm, nn.Conv2d(C, 4, 1, padding=1), y)
    inner = copy.deepcopy(conv)
    inner.padding = (0, 0)
    wrong = fold_into_conv(norm, inner, y)
    wrong.padding = (1, 1)
    error = (wrong(x) - conv(norm(x, y))).abs().amax((0, 1))
    assert error[1:-1, 1:-1].max() < 1e-4
    assert error[0].min() > 1e-2


def test_pairs_that_are_no_convolution_are_refused(unchecked):
    conv, norm, y = nn.Conv2d(C, C, 1), trained(ConditionalBatchNorm2d(C, K)), torch.tensor([0])

    def refused(error, match, *arguments):
        with pytest.raises(error, match=match):
            fold_into_conv(*arguments)

    refused(TypeError, "got Conv2d and Conv2d", conv, conv, y)
    refused(TypeError, "got Conv2d and BatchNorm2d", conv, nn.BatchNorm2d(C), y)
    transposed = nn.ConvTranspose2d(C, C, 1)
    refused(TypeError, "got ConditionalBatchNorm2d and Conv", norm, transposed, y)
    refused(ValueError, "`condition` must have one row.*got 2", conv, norm, torch.tensor([0, 1]))
    refused(ValueError, "call `eval", conv, ConditionalBatchNorm2d(C, K), y)
    refused(ValueError, "no running statistics", conv, AdaIN(C, Z), torch.randn(1, Z))
    refused(ValueError, "8 channels, the convolution 3", nn.Conv2d(8, 3, 1), norm, y)
    norm.activation = "relu"
    refused(ValueError, "stands between", norm, conv, y)


# --- bad input ------------------------------------------------------------------------------------


def test_labels_that_make_no_sense_are_refused(unchecked):
    norm, x, y = ConditionalBatchNorm2d(C, K), maps(), labels()

    def refused(error, match, y):
        with pytest.raises(error, match=match):
            norm(x, y)

    refused(TypeError, r"`y` must be labels \(batch,\) of int64.*got torch.int32", y.int())
    refused(TypeError, "got torch.bool", y.bool())
    refused(TypeError, "got NoneType", None)
    refused(ValueError, r"`y` must lie in 0..3; got 0..4", y + (y == 3))
    refused(ValueError, r"`y` must lie in 0..3; got -1..2", y - 1)
    refused(ValueError, r"`y` must be \(batch,\) as integer labels; got \(12, 1\)", y[:, None])
    refused(ValueError, r"`y` must be \(batch, 4\) as floating weights.*got \(12,\)", y.float())
    refused(ValueError, r"`y` must be \(batch, 4\).*got \(12, 5\)", torch.rand(N, 5))
    refused(ValueError, r"`y` must hold one row for each map of `x` \(12, 8.*got \(3,\)", y[:3])
    refused(
        TypeError, r"`y` is torch.float64, the parameters torch.float32", torch.rand(N, K).double()
    )
    with pytest.raises(TypeError, match="y"):
        norm(x)


def test_noise_that_makes_no_sense_is_refused(unchecked):
    norm, x, z, y = SelfModulatedBatchNorm2d(C, Z), maps(), torch.randn(N, Z), labels()
    labelled = SelfModulatedBatchNorm2d(C, Z, num_classes=K)

    def refused(error, match, norm, *arguments):
        with pytest.raises(error, match=match):
            norm(*arguments)

    refused(ValueError, r"`z` must be \(batch, 6\); got \(12, 5\)", norm, x, z[:, :5])
    refused(ValueError, r"`z` must be \(batch, 6\); got \(12,\)", norm, x, z[:, 0])
    refused(ValueError, r"`z` must hold one row for each map of `x`.*got \(3, 6\)", norm, x, z[:3])
    refused(ValueError, r"`z` must hold one row for each map of `x`.*got \(1, 6\)", norm, x, z[:1])
    refused(TypeError, "`z` must hold a vector of floats per map; got torch.int64", norm, x, y)
    refused(TypeError, "`z` is torch.float64, the parameters torch.float32", norm, x, z.double())
    refused(TypeError, "`z` must be a tensor of floating numbers; got NoneType", norm, x, None)
    refused(ValueError, "`y` is given, but .* without `num_classes`", norm, x, z, y)
    refused(ValueError, "`y` is missing: the norm has 4 classes", labelled, x, z)
    refused(ValueError, "`y` must hold one label per row of `z`, 12; got 3", labelled, x, z, y[:3])
    refused(
        ValueError, r"`x` must be \(batch, 8, height, width\); got \(12, 8\)", norm, x[..., 0, 0], z
    )
    refused(ValueError, r"`x` must be \(batch, 8,.*got \(12, 7, 5, 3\)", norm, x[:, 1:], z)
    refused(
        TypeError, "`x` must be a tensor of floating numbers; got torch.int64", norm, x.long(), z
    )


def test_sizes_and_names_that_make_no_sense_are_refused(unchecked):
    def refused(match, build):
        with pytest.raises(ValueError, match=match):
            build()

    refused("`num_features` must be a whole number", lambda: ModulatedNorm2d(0, Z))
    refused("`cond_dim` must be a whole number .*got 2.5", lambda: ModulatedNorm2d(C, 2.5))
    refused("`norm` must be one of .*'batchnorm'", lambda: ModulatedNorm2d(C, Z, norm="batchnorm"))
    refused("`groups` must divide 8 channels; got 32", lambda: ModulatedNorm2d(C, Z, norm="group"))
    refused("`activation` must be one of", lambda: AdaIN(C, Z, activation="gelu"))
    refused("`upsample` must be one of .*got 3", lambda: AdaIN(C, Z, upsample=3))
    refused("`eps` must be zero or positive; got -1", lambda: ModulatedNorm2d(C, Z, eps=-1))
    refused("`negative_slope` must be zero or pos", lambda: AdaIN(C, Z, negative_slope=-0.1))
    refused(
        "`momentum` must lie in 0..1, or be None; got 2", lambda: ModulatedNorm2d(C, Z, momentum=2)
    )
    refused("`w_dim` must be a whole number", lambda: AdaIN(C, 0))
    refused("`num_classes` must be", lambda: ConditionalBatchNorm2d(C, True))
    refused("`num_classes` must be", lambda: SelfModulatedBatchNorm2d(C, Z, num_classes=0))
    refused("`z_dim` must be", lambda: SelfModulatedBatchNorm2d(C, 0))
    refused("`hidden` must be", lambda: SelfModulatedBatchNorm2d(C, Z, hidden=0))
    refused("`label_form` must", lambda: SelfModulatedBatchNorm2d(C, Z, label_form="other"))
    refused("`group_size` must be", lambda: MinibatchStd(0))
