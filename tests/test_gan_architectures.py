"""The parts together: a pair of networks that is trained, averaged, recalibrated and judged."""

import copy
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import cln_tutorial.gan_architectures as ga

NORMS = {
    "bn": (ga.FusedBatchNorm2d, lambda z, y: ()),
    "cbn": (partial(ga.ConditionalBatchNorm2d, num_classes=10), lambda z, y: (y,)),
    "selfmod": (partial(ga.SelfModulatedBatchNorm2d, z_dim=8), lambda z, y: (z,)),
}


@pytest.fixture(scope="module")
def digits():
    """Images in [-1, 1] and their labels, in a random order: the set is sorted by writer."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images[order], torch.tensor(data.target, dtype=torch.int64)[order]


@pytest.fixture(scope="module")
def trained(digits):
    images, labels = digits
    torch.manual_seed(0)
    G = ga.DCGANGenerator(8, 1, z_dim=8, width=16, norm="selfmod+label", num_classes=10)
    D = ga.SNDCGANDiscriminator(8, 1, width=16, num_classes=10)
    trainer = ga.GANTrainer(G, D, loss="hinge", r1_gamma=0.1, r1_every=4, ema_decay=0.98)
    batches = ga.ShuffledBatches(images, labels, batch_size=64)
    trainer.fit(batches, 150, progress=False)
    return trainer


def samples(G, n):
    z = torch.randn(n, G.z_dim, generator=torch.Generator().manual_seed(1))
    y = torch.arange(n) % 10
    with torch.no_grad():
        return G.eval()(z, y), y


def kid(images, G):
    fake = samples(G, 500)[0]
    return ga.kernel_distance(images[:500].flatten(1), fake.flatten(1))


def test_training_brings_the_samples_nearer_to_the_images_than_their_intervals_reach(
    digits, trained
):
    torch.manual_seed(0)
    untrained = ga.DCGANGenerator(8, 1, z_dim=8, width=16, norm="selfmod+label", num_classes=10)
    before, after = kid(digits[0], untrained), kid(digits[0], trained.averaged_generator())
    assert after.high < before.low


def test_recalibrated_statistics_of_the_average_are_those_of_its_own_samples(trained):
    G = trained.averaged_generator()
    G.stages[0].norm.running_mean.fill_(9.0)
    noise = torch.Generator().manual_seed(2)
    z = torch.cat([torch.randn(64, 8, generator=noise) for _ in range(4)])
    ga.recalibrate_batch_norm(
        G,
        n_batches=4,
        batch_size=64,
        y_sampler=lambda n: torch.arange(n) % 10,
        generator=noise.manual_seed(2),
    )
    h = G.dense(z).unflatten(1, (-1, 4, 4))  # what the first norm receives
    torch.testing.assert_close(G.stages[0].norm.running_mean, h.mean((0, 2, 3)))
    torch.testing.assert_close(
        G.stages[0].norm.running_var, h.transpose(0, 1).flatten(1).var(1), rtol=1e-5, atol=0
    )


def test_a_class_of_the_trained_generator_folds_into_the_convolution_before(trained):
    G = trained.averaged_generator()
    norm, z, y = G.stages[0].norm, torch.randn(1, 8), torch.tensor([3])
    h = torch.randn(2, norm.num_features, 4, 4)
    conv = nn.Conv2d(norm.num_features, norm.num_features, 1)
    folded = ga.fold_into_conv(conv, norm, z, y)
    with torch.no_grad():
        expected = norm(conv(h), z.expand(2, -1), y.expand(2))
        torch.testing.assert_close(folded(h), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_a_residual_block_takes_every_member_of_the_family_and_starts_as_batch_norm(name):
    make, condition = NORMS[name]
    x, z, y = torch.randn(4, 8, 4, 4), torch.randn(4, 8), torch.tensor([0, 3, 9, 3])
    torch.manual_seed(0)
    block = ga.ResBlockUp(8, 6, norm=make)
    plain = ga.ResBlockUp(8, 6, norm=ga.FusedBatchNorm2d)
    weights = {k: v for k, v in block.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(block(x, *condition(z, y)), plain(x), rtol=0, atol=1e-5)


def test_the_bound_of_a_trained_discriminator_holds_for_pairs_of_images(digits, trained):
    features = copy.deepcopy(trained.discriminator.features).eval()
    bound = ga.lipschitz_bound(features, (1, 8, 8))
    first, second = digits[0][:64], digits[0][64:128]
    with torch.no_grad():
        moved = (features(first) - features(second)).flatten(1).norm(dim=1)
    assert (moved <= bound * (first - second).flatten(1).norm(dim=1)).all()
