"""Generators and discriminators: shapes, counts, conditions, initial weights, spectral norm."""

import copy
import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.utils import parametrize

from cln_tutorial.gan_architectures.networks import (
    DCGANDiscriminator,
    DCGANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    SNDCGANDiscriminator,
)

GENERATORS = [DCGANGenerator, ResNetGenerator]
DISCRIMINATORS = [DCGANDiscriminator, SNDCGANDiscriminator, ResNetDiscriminator]
NORMS = ["bn", "cbn", "selfmod", "selfmod+label", "adain", "layer", "none"]
CLASSES = 3


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(n):
    return torch.arange(n) % CLASSES


def seeded(make, *args, seed=0, **options):
    torch.manual_seed(seed)
    return make(*args, **options)


def classes_of(norm):
    return CLASSES if norm in ("cbn", "selfmod+label") else None


@torch.no_grad()
def opened(generator, seed=1):
    """A generator whose modulations have left zero, as after some training."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in generator.named_parameters():
        if "norm" in name or "gain" in name:
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=rng))
    return generator


def count(module):
    return sum(p.numel() for p in module.parameters())


# Shapes and sizes


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("make", GENERATORS)
def test_a_generator_makes_images_of_its_size_between_minus_1_and_1(make, size):
    G = opened(seeded(make, size, 2, z_dim=5, width=2, attention_at=4))
    with torch.no_grad():
        image = G(100 * randn(3, 5))
    assert image.shape == (3, 2, size, size)
    assert image.abs().max() <= 1
    assert image.std() > 0.01


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("make", DISCRIMINATORS)
def test_a_discriminator_gives_one_logit_per_image_of_its_size(make, size):
    D = seeded(make, size, 2, width=2, num_classes=CLASSES, attention_at=4)
    with torch.no_grad():
        assert D.features(randn(3, 2, size, size)).shape[2:] == (4, 4)
        logits = D(randn(3, 2, size, size), labels(3))
    assert logits.shape == (3,)
    assert logits.unique().numel() == 3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", GENERATORS)
def test_noise_and_label_reach_the_image_where_the_norm_says_so(make, norm):
    # The dense layer is closed, so that only the modulation is left.
    G = opened(seeded(make, 8, 1, z_dim=6, width=4, norm=norm, num_classes=classes_of(norm))).eval()
    nn.init.zeros_(G.dense.weight), nn.init.normal_(G.dense.bias)
    z, y = randn(1, 6), labels(1)
    image = G(z, y if G.num_classes else None)
    by_noise = norm in ("selfmod", "selfmod+label", "adain")
    assert G(z + 1, y if G.num_classes else None).equal(image) != by_noise
    if G.num_classes:
        assert not G(z, y + 1).equal(image)


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "deconv4", "pixel_shuffle"])
@pytest.mark.parametrize("make", GENERATORS)
def test_only_the_transposed_convolution_begins_with_a_checkerboard(make, resample):
    # Constant maps under the last upsampling. Four phases in the interior, equal but for rounding.
    G = seeded(make, 8, 1, z_dim=5, width=4, norm="none", resample=resample)
    layer = G.stages[0].conv if make is DCGANGenerator else G.stages[0].first.conv
    layer.double()
    inside = layer(torch.ones(1, G.dense.out_features // 16, 8, 8, dtype=torch.float64))
    inside = inside[..., 4:-4, 4:-4]
    phases = torch.stack([inside[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
    difference = (phases - phases.mean(0)).abs().max().item()
    assert (difference < 1e-14) if resample != "deconv4" else (difference > 1e-3)


def test_the_networks_of_the_experiment_have_as_many_parameters_as_counted_by_hand():
    # z 32 -> 4x4x64 -> transposed 4x4 to 32 -> transposed 4x4 to 1.
    rest = (32 * 1024 + 1024) + (64 * 32 * 16 + 32) + (32 * 16 + 1)
    options = {"z_dim": 32, "width": 32}
    bn = DCGANGenerator(16, 1, **options)
    assert count(bn) == rest + 2 * (64 + 32)
    # zH + H + 2 (HC + C) with H = 32: 5280 for 64 channels, 3168 for 32.
    selfmod = DCGANGenerator(16, 1, norm="selfmod", **options)
    assert count(selfmod) == rest + 5280 + 3168
    cbn = DCGANGenerator(16, 1, norm="cbn", num_classes=10, **options)
    assert count(cbn) == rest + 2 * 10 * (64 + 32)
    # Convolutions 16, 32, 32, 64, 64 of 3x3 and 4x4 in turn, then 4x4x64 to a logit.
    convolutions = [(1, 16, 3), (16, 32, 4), (32, 32, 3), (32, 64, 4), (64, 64, 3)]
    expected = sum(a * b * k * k + b for a, b, k in convolutions) + 1024 + 1
    assert count(SNDCGANDiscriminator(16, 1, width=16)) == expected == 88417
    projected = SNDCGANDiscriminator(16, 1, width=16, num_classes=10)
    assert count(projected) == expected + 10 * 1024


def test_the_other_networks_have_as_many_parameters_as_counted_by_hand():
    def conv(a, b, k):
        return a * b * k * k + b

    # 3 -> 4 -> 8 channels, batch norm behind the second, 4x4x8 to a logit.
    dcgan = conv(3, 4, 4) + conv(4, 8, 4) + 2 * 8 + 128 + 1
    assert count(DCGANDiscriminator(16, width=4)) == dcgan
    block = conv(3, 4, 3) + conv(4, 4, 3) + conv(3, 4, 1)
    block += conv(4, 8, 3) + conv(8, 8, 3) + conv(4, 8, 1) + 2 * conv(8, 8, 3)
    assert count(ResNetDiscriminator(16, width=4)) == block + 8 + 1
    up = conv(16, 8, 3) + conv(8, 8, 3) + conv(16, 8, 1) + 2 * (16 + 8)
    up += conv(8, 4, 3) + conv(4, 4, 3) + conv(8, 4, 1) + 2 * (8 + 4)
    G = ResNetGenerator(16, z_dim=5, width=4)
    assert count(G) == 5 * 256 + 256 + up + 2 * 4 + conv(4, 3, 3)
    # BigGAN: 20 numbers of noise are 5 for 4x4 and 5 for each of 3 layers, and each norm has two
    # maps of 5 + 20 numbers, with bias. The embedding is as long as the whole noise.
    big = ResNetGenerator(16, z_dim=20, width=4, norm="cbn", num_classes=7, split_latent=True)
    channels = 16 + 8 + 8 + 4 + 4
    expected = 5 * 256 + 256 + up - 2 * (16 + 8 + 8 + 4) + conv(4, 3, 3) + 7 * 20
    assert count(big) == expected + 2 * channels * (25 + 1)


@pytest.mark.parametrize(
    ("make", "size", "field"),
    [
        (SNDCGANDiscriminator, 32, 52),  # 3 1, then 4x4 s2 and 3x3 three times
        (SNDCGANDiscriminator, 16, 24),
        (DCGANDiscriminator, 64, 46),  # 4x4 s2 four times
        (DCGANDiscriminator, 8, 4),
    ],
)
def test_the_support_of_the_gradient_is_the_receptive_field(make, size, field):
    # Closed form 1 + sum (k_i - 1) prod s_j; the features take larger images than the network.
    options = {"norm": "none"} if make is DCGANDiscriminator else {"spectral": False}
    D = seeded(make, size, 1, width=2, **options).double()
    x = randn(1, 1, 128, 128, dtype=torch.float64).requires_grad_()
    h = D.features(x)
    middle = h.shape[-1] // 2
    (gradient,) = torch.autograd.grad(h[0, :, middle, middle].sum(), x)
    touched = gradient[0, 0] != 0
    assert touched.any(0).sum() == field
    assert touched.any(1).sum() == field


# The condition of each layer


def outputs_of_the_stages(G, *args, **options):
    outputs, hooks = [], []
    for stage in G.stages:
        hooks.append(stage.register_forward_hook(lambda m, i, out: outputs.append(out)))
    image = G(*args, **options)
    for hook in hooks:
        hook.remove()
    return outputs, image


CONDITIONED = [
    (DCGANGenerator, "selfmod", False),
    (DCGANGenerator, "adain", True),
    (ResNetGenerator, "selfmod+label", False),
    (ResNetGenerator, "cbn", True),
]


@pytest.mark.parametrize(("make", "norm", "split"), CONDITIONED)
def test_the_noise_of_a_layer_changes_what_comes_after_it_and_nothing_before(make, norm, split):
    classes = classes_of(norm)
    options = {"norm": norm, "num_classes": classes, "split_latent": split}
    G = opened(seeded(make, 32, 1, z_dim=20 if make is ResNetGenerator else 16, width=4, **options))
    y = labels(2) if classes else None
    z, other = randn(2, G.z_dim), randn(2, G.z_dim, seed=1)
    before, image = outputs_of_the_stages(G.eval(), z, y)
    assert len(before) == G.num_modulated
    for layer in range(G.num_modulated):
        after, mixed = outputs_of_the_stages(G, z, y, layer_z={layer: other})
        same = [a.equal(b) for a, b in zip(after, before, strict=True)]
        assert same == [True] * layer + [False] * (len(before) - layer)
        assert not mixed.equal(image)
    everywhere = dict.fromkeys(range(G.num_modulated), z)
    assert G(z, y, layer_z=everywhere).equal(image)
    assert G(z, y, layer_z={}).equal(image)


@pytest.mark.parametrize("norm", ["selfmod", "cbn"])
def test_with_a_split_latent_each_layer_sees_its_own_part_of_the_noise(norm):
    options = {"norm": norm, "num_classes": classes_of(norm), "split_latent": True}
    G = opened(seeded(ResNetGenerator, 16, 1, z_dim=12, width=4, **options)).eval()
    y = labels(1) if norm == "cbn" else None
    z = randn(1, 12)
    before, image = outputs_of_the_stages(G, z, y)
    for part in range(4):  # 4x4, two blocks, and the last norm get three numbers each
        moved = z.clone()
        moved[:, 3 * part : 3 * part + 3] += 1
        after, _ = outputs_of_the_stages(G, moved, y)
        first = max(part - 1, 0)
        same = [a.equal(b) for a, b in zip(after, before, strict=True)]
        assert same == [True] * first + [False] * (3 - first)
        if part:  # another noise for the layer counts with the same part only
            assert G(z, y, layer_z={part - 1: moved}).equal(G(moved, y))
            elsewhere = moved.roll(3, dims=1)
            elsewhere[:, 3 * part : 3 * part + 3] = z[:, 3 * part : 3 * part + 3]
            assert G(z, y, layer_z={part - 1: elsewhere}).equal(image)


def test_the_shared_embedding_of_the_label_reaches_all_layers_of_a_biggan():
    options = {"norm": "cbn", "num_classes": CLASSES, "split_latent": True}
    G = opened(seeded(ResNetGenerator, 8, 1, z_dim=6, width=4, **options)).eval()
    z, y = randn(2, 6), labels(2)
    weights = nn.functional.one_hot(y, CLASSES).float()
    torch.testing.assert_close(G(z, weights), G(z, y))
    before, _ = outputs_of_the_stages(G, z, y)
    after, _ = outputs_of_the_stages(G, z, torch.tensor([0, 2]))
    for a, b in zip(after, before, strict=True):
        assert a[0].equal(b[0])
        assert not a[1].equal(b[1])


def test_truncated_noise_has_the_quantiles_of_the_truncated_normal_distribution():
    # The reference is scipy's; the noise is in float64, where both are exact to about 1e-12.
    G = seeded(DCGANGenerator, 8, 1, z_dim=64, width=4, dtype=torch.float64).eval()
    z = randn(4, 64, dtype=torch.float64) * 1.5
    seen = []
    hook = G.dense.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for threshold in (0.1, 1, 2.5):
        G(z, truncation=threshold)
        expected = scipy.stats.truncnorm(-threshold, threshold).ppf(scipy.stats.norm.cdf(z))
        torch.testing.assert_close(seen[-1], torch.tensor(expected), atol=1e-9, rtol=0)
        assert seen[-1].abs().max() <= threshold
    G(z, truncation=30)
    torch.testing.assert_close(seen[-1], z, atol=1e-9, rtol=0)
    far = torch.tensor([[-40.0, 0.0, 8.5, 40.0] * 16], dtype=torch.float64, requires_grad=True)
    G(far, truncation=30).sum().backward()
    # From 8.3 on erf is 1 in float64: the inverse would be infinite, and the gradient 0 * inf.
    assert seen[-1].max().item() == pytest.approx(8.29, abs=0.01)
    assert far.grad.isfinite().all()
    hook.remove()


def test_truncation_holds_in_float32_for_far_noise_and_for_the_noise_of_layers():
    G = opened(seeded(DCGANGenerator, 8, 1, z_dim=4, width=4, norm="selfmod")).eval()
    z, far = randn(2, 4), torch.full((2, 4), 12.0)
    assert G(far, truncation=0.7).equal(G(torch.full((2, 4), 0.7)))
    mixed = G(z, truncation=0.7, layer_z={0: far})
    narrow = torch.erf(z / math.sqrt(2)) * math.erf(0.7 / math.sqrt(2))
    narrow = math.sqrt(2) * torch.erfinv(narrow)
    expected = G(narrow, layer_z={0: torch.full((2, 4), 0.7)})
    torch.testing.assert_close(mixed, expected)
    assert not torch.allclose(G(narrow, layer_z={0: far}), expected, atol=1e-3)


# At the start


@pytest.mark.parametrize("make", GENERATORS)
def test_all_batch_norms_begin_as_the_same_generator_bit_for_bit(make):
    z, y = randn(8, 12), labels(8)
    bn = seeded(make, 16, 1, z_dim=12, width=4)
    image = bn(z)
    for norm in ("cbn", "selfmod", "selfmod+label"):
        G = seeded(make, 16, 1, z_dim=12, width=4, norm=norm, num_classes=classes_of(norm))
        assert G(z, y if G.num_classes else None).equal(image)


def test_weights_come_from_the_seed_of_torch_and_two_networks_in_a_row_differ():
    first, again = (seeded(DCGANGenerator, 8, width=4).state_dict() for _ in range(2))
    second = DCGANGenerator(8, width=4).state_dict()
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["dense.weight"].equal(second["dense.weight"])


def test_dcgan_weights_begin_as_the_paper_says():
    # 0.02 up to four standard errors of a standard deviation: 0.02 / sqrt(2 n).
    for network in (
        seeded(DCGANGenerator, 16, z_dim=32, width=16, norm="layer"),
        seeded(DCGANDiscriminator, 16, width=16),
    ):
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                margin = 4 * 0.02 / math.sqrt(2 * parameter.numel())
                assert parameter.std().item() == pytest.approx(0.02, abs=margin), name
            elif name.endswith("bias"):
                assert parameter.count_nonzero() == 0


@pytest.mark.parametrize("make", [ResNetGenerator, SNDCGANDiscriminator, ResNetDiscriminator])
def test_the_other_weights_begin_orthogonal_with_gain_root_2_for_kernels_above_1x1(make):
    options = {} if make is ResNetGenerator else {"spectral": False, "num_classes": 5}
    network = seeded(make, 16, width=4, **options)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            matrix = parameter.flatten(1)
            square = 2.0 if parameter.ndim == 4 and parameter.shape[-1] > 1 else 1.0
            values = torch.linalg.svdvals(matrix).square()
            torch.testing.assert_close(values, torch.full_like(values, square)), name
        elif name.endswith("bias"):
            assert parameter.count_nonzero() == 0


def test_a_network_may_be_made_on_a_device_without_memory():
    with torch.device("meta"):
        G = ResNetGenerator(16, width=4, norm="selfmod", attention_at=8)
    assert {p.device.type for p in G.parameters()} == {"meta"}
    D = SNDCGANDiscriminator(16, width=4, device="meta", spectral=False)
    assert D(torch.empty(2, 3, 16, 16, device="meta")).shape == (2,)


# Attention inside


@pytest.mark.parametrize("make", [*GENERATORS, *DISCRIMINATORS])
def test_attention_stands_where_it_is_asked_for_and_begins_as_the_identity(make):
    options = {"width": 4} | ({} if make in GENERATORS else {"norm": "none", "spectral": False})
    if make is SNDCGANDiscriminator:
        del options["norm"]
    x = randn(2, 128) if make in GENERATORS else randn(2, 3, 32, 32)
    plain = seeded(make, 32, **options).eval()
    for size in (4, 8, 16):
        network = seeded(make, 32, attention_at=size, **options).eval()
        (name,) = {n.rsplit(".", 1)[0] for n in network.state_dict() if n.endswith(".gain")}
        moved = iter(plain.state_dict().items())
        state = {
            n: v if n.startswith(f"{name}.") else next(moved)[1]
            for n, v in network.state_dict().items()
        }
        network.load_state_dict(state)
        seen = []
        network.get_submodule(name).register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[0].shape[2:])
        )
        assert network(x).equal(plain(x))
        assert seen == [(size, size)]


def test_the_first_residual_block_convolves_the_image_as_it_is():
    D, seen = ResNetDiscriminator(16, 1, width=4), []
    D.features[0].first.conv.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    D.features[1].first.conv.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = randn(2, 1, 16, 16)
    D(x)
    assert seen[0].equal(x)
    assert seen[1].min() == 0


# The projection of the label


@pytest.mark.parametrize("make", DISCRIMINATORS)
def test_the_logit_is_linear_in_the_features_plus_the_projection_of_the_label(make):
    D = seeded(make, 16, 1, width=4, num_classes=CLASSES).eval()
    x, y = randn(6, 1, 16, 16), labels(6)
    h = D.features(x)
    h = h.sum((2, 3)) if make is ResNetDiscriminator else h.flatten(1)
    projected = torch.einsum("nf,nf->n", D.embed.weight[y], h)
    torch.testing.assert_close(D(x, y), D.linear(h)[:, 0] + projected)
    assert projected.abs().min() > 1e-5
    every = torch.stack([D(x, torch.full((6,), k)) for k in range(CLASSES)], dim=1)
    torch.testing.assert_close(D(x, torch.full((6, CLASSES), 1 / CLASSES)), every.mean(1))


# Spectral norm


@torch.no_grad()
def normed_weights(D, seed=0):
    """The layers under spectral norm, with weights whose singular values all differ.

    At the start they are equal, and a power iteration would have nothing to do.
    """
    rng = torch.Generator().manual_seed(seed)
    layers = [m for m in D.modules() if parametrize.is_parametrized(m, "weight")]
    for layer in layers:
        layer.parametrizations.weight.original.normal_(std=3, generator=rng)
    return layers


@pytest.mark.parametrize("make", DISCRIMINATORS)
def test_every_weight_of_the_discriminator_has_spectral_norm_1_after_some_steps(make):
    options = {"norm": "none", "spectral": True} if make is DCGANDiscriminator else {}
    D = seeded(make, 8, 1, width=4, num_classes=CLASSES, attention_at=4, **options)
    weights = normed_weights(D)
    assert len(weights) == {DCGANDiscriminator: 7, SNDCGANDiscriminator: 9}.get(make, 11)
    for layer in weights:
        for _ in range(150):
            layer.weight  # noqa: B018 - each look is a step of the power iteration
    D.eval()
    for layer in weights:
        # The power iteration gives a lower bound of the norm, here after 150 steps.
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=1e-3)


def steps_of_the_power_iteration(D):
    """Counts, for each weight, how often it is computed."""
    counts = {}
    for name, module in D.named_modules():
        if type(module).__name__ == "_SpectralNorm":
            counts[name] = 0

            def hook(module, args, name=name):
                counts[name] += 1

            module.register_forward_pre_hook(hook)
    return counts


def test_one_call_of_the_discriminator_is_one_step_of_each_power_iteration():
    D = seeded(SNDCGANDiscriminator, 8, 1, width=4, num_classes=CLASSES, attention_at=4)
    counts = steps_of_the_power_iteration(D)
    D(randn(2, 1, 8, 8), labels(2))
    assert set(counts.values()) == {1}
    with parametrize.cached():
        D(randn(2, 1, 8, 8), labels(2))
        D(randn(2, 1, 8, 8, seed=1), labels(2))
    assert set(counts.values()) == {2}


def test_two_calls_in_training_use_two_weights_and_in_evaluation_one():
    # The pitfall: D(x) and then D(x) again, the second after a further step.
    D = seeded(SNDCGANDiscriminator, 8, 1, width=4)
    weights, x = normed_weights(D), randn(2, 1, 8, 8)
    before = copy.deepcopy(D.state_dict())
    assert not D(x).equal(D(x))
    moved = [n for n, v in D.state_dict().items() if not v.equal(before[n])]
    assert len(moved) >= 2 * len(weights) - 1  # all u and v, but for the single u of the last row
    before = copy.deepcopy(D.eval().state_dict())
    assert D(x).equal(D(x))
    assert all(D.state_dict()[n].equal(before[n]) for n in before)


# In use


@pytest.mark.parametrize("make", GENERATORS)
def test_in_evaluation_an_image_does_not_depend_on_the_rest_of_the_batch_in_training_it_does(make):
    options = {"z_dim": 8, "width": 4, "norm": "selfmod", "dtype": torch.float64}
    G, z = opened(seeded(make, 16, 1, **options)), randn(6, 8, dtype=torch.float64)
    G(z)
    alone, together = G.eval()(z[:2]), G(z)[:2]
    torch.testing.assert_close(alone, together)
    assert G(z).equal(G(z))
    G.train()
    assert (G(z[:2]) - G(z)[:2]).abs().max() > 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNetGenerator(
            8, 1, z_dim=6, width=4, norm="cbn", num_classes=CLASSES, split_latent=True
        ),
        lambda: DCGANGenerator(8, 1, z_dim=6, width=4, norm="selfmod+label", num_classes=CLASSES),
        lambda: SNDCGANDiscriminator(8, 1, width=4, num_classes=CLASSES, attention_at=4),
        lambda: ResNetDiscriminator(8, 1, width=4, num_classes=CLASSES),
    ],
)
def test_a_network_survives_copying_and_its_state_goes_into_another(make):
    network, other = seeded(make), seeded(make, seed=1)
    x = randn(2, 6) if hasattr(network, "z_dim") else randn(2, 1, 8, 8)
    network(x, labels(2))
    copied = copy.deepcopy(network)
    other.load_state_dict(network.state_dict())
    in_training = network(x, labels(2))
    in_evaluation = network.eval()(x, labels(2))
    for twin in (copied, other):
        assert twin(x, labels(2)).equal(in_training)
        assert twin.eval()(x, labels(2)).equal(in_evaluation)
    assert copied.state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        next(copied.parameters()).fill_(7)
    assert not next(network.parameters()).eq(7).any()


@pytest.mark.parametrize("make", GENERATORS)
def test_gradients_reach_every_parameter_of_a_generator_in_use(make):
    options = {"norm": "selfmod+label", "num_classes": CLASSES, "attention_at": 4}
    G = opened(seeded(make, 8, 1, z_dim=6, width=8, **options))
    G(randn(CLASSES, 6), labels(CLASSES)).square().sum().backward()
    for name, parameter in G.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("make", [SNDCGANDiscriminator, ResNetDiscriminator])
def test_the_gradient_of_the_logit_can_be_differentiated_again(make):
    # R1: the penalty's gradient by autograd against a central difference of the penalty.
    D = seeded(make, 8, 1, width=2, attention_at=4).double().eval()
    with torch.no_grad():
        next(m for m in D.modules() if hasattr(m, "gain")).gain.fill_(0.5)
    x = randn(2, 1, 8, 8, dtype=torch.float64).requires_grad_()

    def penalty():
        (gradient,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    weight = next(p for p in D.parameters() if p.ndim == 4)
    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction = randn(*weight.shape, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-6)
        values.append(penalty().item())
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * 1e-6)
    assert (gradient * direction).sum().item() == pytest.approx(
        (values[0] - values[1]) / 2e-6, rel=1e-4
    )


@pytest.mark.parametrize("make", [*GENERATORS, ResNetDiscriminator])
def test_networks_run_under_autocast_in_bfloat16(make):
    network = seeded(make, 8, 1, width=8, attention_at=4).eval()
    x = randn(4, 128) if make in GENERATORS else randn(4, 1, 8, 8)
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x)
        network(x.bfloat16())
        with pytest.raises(TypeError, match=r"is torch.float64, the network torch.float32"):
            network(x.double())  # the one dtype that autocast leaves as it is
    assert rounded.dtype == torch.bfloat16
    # Some ten layers of numbers with 8 bits: relative errors of 2^-8 each, some per cent together.
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_discriminator_under_spectral_norm_trains_under_autocast():
    D = seeded(SNDCGANDiscriminator, 8, 1, width=8, num_classes=CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = D(randn(4, 1, 8, 8), labels(4)).float().square().sum()
    loss.backward()
    for name, parameter in D.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("make", [*GENERATORS, *DISCRIMINATORS])
def test_networks_give_the_same_in_channels_last(make):
    network = seeded(make, 16, 3, width=4, attention_at=4).eval()
    x = randn(3, 128) if make in GENERATORS else randn(3, 3, 16, 16)
    expected = network(x)
    network.to(memory_format=torch.channels_last)
    if make in DISCRIMINATORS:
        x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-4)


COMPILED = """
import torch
from cln_tutorial.gan_architectures.networks import ResNetGenerator, SNDCGANDiscriminator
torch.manual_seed(0)
y = torch.tensor([0, 2])
for network, x in [
    (ResNetGenerator(8, 1, z_dim=6, width=4, norm="selfmod+label", num_classes=3, attention_at=4,
                     split_latent=True), torch.randn(2, 6)),
    (SNDCGANDiscriminator(8, 1, width=4, num_classes=3), torch.randn(2, 1, 8, 8)),
]:
    network.eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), network(x, y))
print("done")
"""


def test_networks_compile_in_one_graph(child_output):
    assert child_output(COMPILED) == "done\n"


# Bad input


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (DCGANGenerator, {"image_size": 28}, "`image_size` must be one of 8, 16, 32, 64; got 28"),
        (ResNetDiscriminator, {"image_size": 28}, "`image_size` must be one of 8, 16, 32, 64"),
        (ResNetGenerator, {"norm": "batch"}, "`norm` must be one of .*'batch'"),
        (DCGANDiscriminator, {"norm": "cbn"}, "`norm` must be one of .*'cbn'"),
        (DCGANGenerator, {"resample": "bicubic"}, "must be one of .*'bicubic'"),
        (DCGANGenerator, {"norm": "cbn"}, "`num_classes` is missing: `norm` 'cbn'"),
        (ResNetGenerator, {"norm": "selfmod+label"}, "`num_classes` is missing"),
        (DCGANGenerator, {"num_classes": 3}, "`num_classes` must be None with `norm` 'bn'"),
        (DCGANGenerator, {"num_classes": 3, "norm": "selfmod"}, "take cbn or selfmod.label"),
        (DCGANGenerator, {"num_classes": 0, "norm": "cbn"}, "`num_classes` must be a whole"),
        (ResNetDiscriminator, {"num_classes": 0}, "`num_classes` must be a whole"),
        (DCGANGenerator, {"split_latent": True}, "`split_latent` gives each layer.*'bn' takes"),
        (
            DCGANGenerator,
            {"split_latent": True, "norm": "selfmod", "z_dim": 128},
            "`z_dim` must be a multiple of 3 .* each of 2 layers; got 128",
        ),
        (DCGANGenerator, {"attention_at": 16}, "`attention_at` must be one of 4, 8; got 16"),
        (ResNetGenerator, {"attention_at": 32}, "`attention_at` must be one of 4, 8, 16; got 32"),
        (SNDCGANDiscriminator, {"attention_at": 16}, "`attention_at` must be one of 4, 8"),
        (DCGANDiscriminator, {"spectral": True}, "`spectral` needs `norm` 'none', not 'bn'"),
        (ResNetDiscriminator, {"norm": "bn"}, "`spectral` needs .* no Lipschitz bound is left"),
        (DCGANGenerator, {"width": 0}, "`width` must be a whole number"),
        (SNDCGANDiscriminator, {"channels": 0}, "`channels` must be a whole number"),
        (ResNetGenerator, {"channels": 0}, "`channels` must be a whole number"),
        (ResNetGenerator, {"z_dim": 0}, "`z_dim` must be a whole number"),
    ],
)
def test_choices_that_make_no_sense_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**({"image_size": 16} | options))


Z, Y = randn(2, 6), labels(2)


@pytest.mark.parametrize(
    ("norm", "args", "options", "error", "message"),
    [
        ("bn", (Z[:, :5],), {}, ValueError, r"`z` must be .*\(2, 6\) here; got \(2, 5\)"),
        ("bn", (Z[0],), {}, ValueError, r"`z` must be \(batch, z_dim\), .* got \(6,\)"),
        ("bn", (Z.double(),), {}, TypeError, r"`z` is torch.float64, the network torch.float32"),
        ("bn", (Y,), {}, TypeError, "`z` must be a tensor of floating numbers; got torch.int64"),
        ("bn", (Z, Y), {}, ValueError, "`y` is given, but the network was made without"),
        ("cbn", (Z,), {}, ValueError, "`y` is missing: the network has 3 classes"),
        ("cbn", (Z, labels(3)), {}, ValueError, "one label per sample, 2; got 3"),
        ("cbn", (Z, Y + 2), {}, ValueError, r"`y` must lie in 0..2; got 2..3"),
        ("bn", (Z,), {"truncation": 0}, ValueError, "`truncation` must be greater than 0; got 0"),
        ("bn", (Z,), {"truncation": math.nan}, ValueError, "`truncation` must be greater than 0"),
        (
            "bn",
            (Z,),
            {"layer_z": {0: Z}},
            ValueError,
            r"layers \[0\]: with `norm` 'bn' noise modulates 0",
        ),
        (
            "cbn",
            (Z, Y),
            {"layer_z": {0: Z}},
            ValueError,
            "`layer_z` names .* 'cbn' noise modulates 0",
        ),
        (
            "adain",
            (Z,),
            {"layer_z": {2: Z}},
            ValueError,
            r"`layer_z` names layers \[2\]: .* noise modulates 2 layers",
        ),
        ("adain", (Z,), {"layer_z": {-1: Z}}, ValueError, r"`layer_z` names layers \[-1\]"),
        ("adain", (Z,), {"layer_z": {1: Z[:1]}}, ValueError, r"`layer_z\[1\]` must be .*\(1, 6\)"),
    ],
)
def test_a_generator_refuses_what_does_not_fit(unchecked, norm, args, options, error, message):
    G = DCGANGenerator(16, 1, z_dim=6, width=2, norm=norm, num_classes=classes_of(norm))
    with pytest.raises(error, match=message):
        G(*args, **options)


@pytest.mark.parametrize(
    ("classes", "args", "error", "message"),
    [
        (None, (randn(2, 3, 8, 8),), ValueError, r"`x` must be \(batch, 1, 8, 8\); got \(2, 3"),
        (None, (randn(2, 1, 16, 16),), ValueError, r"`x` must be \(batch, 1, 8, 8\)"),
        (None, (randn(1, 8, 8),), ValueError, r"`x` must be \(batch, 1, 8, 8\)"),
        (None, (randn(2, 1, 8, 8).half(),), TypeError, "`x` is torch.float16, the network"),
        (None, (torch.zeros(2, 1, 8, 8, dtype=torch.uint8),), TypeError, "floating numbers"),
        (None, (randn(2, 1, 8, 8), Y), ValueError, "`y` is given, but the network"),
        (3, (randn(2, 1, 8, 8),), ValueError, "`y` is missing: the network has 3 classes"),
        (3, (randn(2, 1, 8, 8), labels(1)), ValueError, "one label per sample, 2; got 1"),
        (3, (randn(2, 1, 8, 8), Y.int()), TypeError, "`y` must be labels .* of int64"),
        (3, (randn(2, 1, 8, 8), Y + 2), ValueError, r"`y` must lie in 0..2; got 2..3"),
        (3, (randn(2, 1, 8, 8), randn(2, 4)), ValueError, r"`y` must be \(batch, 3\)"),
        (3, (randn(2, 1, 8, 8), randn(2, 3).double()), TypeError, "`y` is torch.float64, the par"),
    ],
)
def test_a_discriminator_refuses_what_does_not_fit(unchecked, classes, args, error, message):
    for D in (
        SNDCGANDiscriminator(8, 1, width=2, num_classes=classes),
        ResNetDiscriminator(8, 1, width=2, norm="bn", spectral=False, num_classes=classes),
    ):
        before = copy.deepcopy(D.state_dict())
        with pytest.raises(error, match=message):
            D(*args)
        # Before any work: no power iteration and no running statistics have moved.
        assert all(before[name].equal(value) for name, value in D.state_dict().items())
