"""Training a pair of networks: each step by hand, what is kept in a file, and what is averaged."""

import itertools
import json
import math
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import DataLoader

from cln_tutorial.gan_architectures.batches import ShuffledBatches
from cln_tutorial.gan_architectures.losses import AdversarialLoss
from cln_tutorial.gan_architectures.networks import (
    DCGANDiscriminator,
    DCGANGenerator,
    SNDCGANDiscriminator,
)
from cln_tutorial.gan_architectures.norms import MinibatchStd
from cln_tutorial.gan_architectures.training import GANTrainer, recalibrate_batch_norm

DATA = 1.5


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 8 - 1).float().reshape(-1, 1, 8, 8)
    return images, torch.from_numpy(labels)


class Point(nn.Module):
    """A generator that knows one number, whatever the noise."""

    z_dim = 1

    def __init__(self, theta=1.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, z):
        return self.theta.expand(len(z), 1)


class Line(nn.Module):
    """A discriminator that is a slope: D(x) = psi x."""

    def __init__(self, psi=0.5):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor(psi, dtype=torch.float64))

    def forward(self, x):
        return (self.psi * x).squeeze(1)


def dirac(steps, *, rate=0.1, theta=1.0, psi=0.5, loss="hinge", **options):
    """The two numbers after some steps of gradient descent on data that are all 1.5."""
    G, D = Point(theta), Line(psi)
    trainer = GANTrainer(
        G,
        D,
        loss=loss,
        opt_g=torch.optim.SGD(G.parameters(), rate),
        opt_d=torch.optim.SGD(D.parameters(), rate),
        **options,
    )
    trainer.fit(lambda number: torch.full((4, 1), DATA).double(), steps, progress=False)
    return G.theta.item(), D.psi.item(), trainer


def small_pair(*, conditional=False, norm="bn", d_norm=False, seed=0):
    """Networks for 8 x 8, of a few thousand weights."""
    torch.manual_seed(seed)
    classes = 10 if conditional else None
    G = DCGANGenerator(8, 1, z_dim=6, width=8, norm=norm, num_classes=classes)
    D = SNDCGANDiscriminator(8, 1, width=8, num_classes=classes)
    if d_norm:
        D = WithBatchNorm()
    return G, D


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(1, 8, 4, 2, 1)),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(128, 1),
        )

    def forward(self, x):
        return self.layers(x).squeeze(1)


class Seen(nn.Module):
    """A discriminator around another one that writes down what it is asked."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, *arguments):
        self.calls.append([each.detach().clone() for each in arguments])
        return self.inner(*arguments)


def kept(path):
    """All that a file holds but how long it took."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    return tensors, {key: value for key, value in about.items() if key != "seconds"}


def assert_same_files(one, other):
    (tensors, about), (expected, expected_about) = kept(one), kept(other)
    assert about == expected_about
    assert tensors.keys() == expected.keys()
    for key, value in tensors.items():
        # History has NaN where no penalty was needed: compare the bytes.
        assert value.dtype == expected[key].dtype, key
        assert value.numpy().tobytes() == expected[key].numpy().tobytes(), key


# --- a step by hand -------------------------------------------------------------------------------


def test_a_hinge_step_is_that_of_the_hand():
    # D at 1.5 is 0.75, at 1 it is 0.5: L = (1 - 0.75) + (1 + 0.5), dL/dpsi = -1.5 + 1
    theta, psi, trainer = dirac(1)
    assert psi == pytest.approx(0.5 + 0.1 * 0.5, abs=1e-15)
    # then L = -psi theta with the new psi
    assert theta == pytest.approx(1 + 0.1 * 0.55, abs=1e-15)
    assert trainer.history.d_loss == [1.75]
    assert trainer.history.g_loss == [pytest.approx(-0.55, abs=1e-15)]
    assert math.isnan(trainer.history.r1[0])


def test_r1_enters_with_half_of_gamma():
    # the mean squared gradient is psi**2: d/dpsi of gamma/2 psi**2 is gamma psi
    _, psi, trainer = dirac(1, r1_gamma=3.0)
    assert psi == pytest.approx(0.5 - 0.1 * (-0.5 + 3 * 0.5), abs=1e-15)
    assert trainer.history.r1 == [0.25]
    assert trainer.history.d_loss == [1.75]  # without the penalty


def test_a_relativistic_step_compares_with_real_images_in_both_networks():
    def sigmoid(t):
        return 1 / (1 + math.exp(-t))

    theta, psi, _ = dirac(1, loss="relativistic")
    # D: softplus(psi (theta - 1.5)); G: softplus(psi (1.5 - theta))
    expected = 0.5 - 0.1 * sigmoid(0.5 * -0.5) * -0.5
    assert psi == pytest.approx(expected, abs=1e-15)
    assert theta == pytest.approx(1 - 0.1 * sigmoid(psi * 0.5) * -psi, abs=1e-15)


def test_several_discriminator_steps_see_batches_of_their_own():
    numbers = []

    def loader(number):
        numbers.append(number)
        return torch.full((4, 1), float(number)).double()

    G, D = Point(), Line(0.0)
    optimisers = [torch.optim.SGD(m.parameters(), 0.001) for m in (G, D)]
    trainer = GANTrainer(
        G, D, loss="wasserstein", n_dis=3, opt_g=optimisers[0], opt_d=optimisers[1]
    )
    trainer.fit(loader, 1, progress=False)
    # dL/dpsi = theta - x
    assert D.psi.item() == pytest.approx(0.001 * ((0 - 1) + (1 - 1) + (2 - 1)), abs=1e-15)
    trainer.fit(loader, 3, progress=False)
    assert numbers == list(range(9))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_lazy_penalty_is_as_strong_as_one_in_each_step(every):
    # Wasserstein with theta = 1.5 leaves only the penalty: psi shrinks by 1 - h gamma a step, or
    # by 1 - k h gamma in each k-th step. Both are exp(-h gamma n) up to h squared.
    G, D = Point(DATA), Line(0.5)
    trainer = GANTrainer(
        G,
        D,
        loss="wasserstein",
        r1_gamma=2.0,
        r1_every=every,
        opt_g=torch.optim.SGD(G.parameters(), 0.0),
        opt_d=torch.optim.SGD(D.parameters(), 0.01),
    )
    trainer.fit(lambda number: torch.full((4, 1), DATA).double(), 8, progress=False)
    assert D.psi.item() == pytest.approx(0.5 * (1 - every * 0.01 * 2) ** (8 // every), rel=1e-12)
    assert D.psi.item() == pytest.approx(0.5 * math.exp(-0.01 * 2 * 8), rel=0.01)
    assert [not math.isnan(r) for r in trainer.history.r1] == [k % every == 0 for k in range(8)]


def test_a_lazy_penalty_counts_the_steps_of_the_discriminator():
    *_, trainer = dirac(4, n_dis=3, r1_gamma=1.0, r1_every=4)
    # its steps 0, 4 and 8 lie in steps 0, 1 and 2 of the generator; 9, 10 and 11 have none
    assert [math.isnan(r) for r in trainer.history.r1] == [False, False, False, True]


def test_the_history_has_the_first_penalty_of_a_step():
    *_, trainer = dirac(1, n_dis=2, r1_gamma=3.0)
    assert trainer.history.r1 == [0.25]  # of the slope 0.5; the second is of 0.4


# --- who sees what --------------------------------------------------------------------------------


def test_real_and_fake_images_share_one_call_under_spectral_norm(digits):
    G, D = small_pair()
    D = Seen(D)
    GANTrainer(G, D, loss="hinge").fit(ShuffledBatches(digits[0], batch_size=8), 1, progress=False)
    assert [len(call[0]) for call in D.calls] == [16, 8]
    assert torch.equal(D.calls[0][0][:8], ShuffledBatches(digits[0], batch_size=8)(0))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1), MinibatchStd()])
def test_real_and_fake_images_never_meet_where_a_batch_is_compared(layer, digits):
    D = Seen(nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(1), nn.Flatten(0)))
    D.inner(digits[0][:4])  # makes the lazy layer
    trainer = GANTrainer(small_pair()[0], D, loss="relativistic")
    batches = ShuffledBatches(digits[0], batch_size=8)
    trainer.fit(batches, 1, progress=False)
    assert [len(call[0]) for call in D.calls] == [8] * 4
    for real in (0, 2):  # of the discriminator, and of the generator
        assert torch.equal(D.calls[real][0], batches(0))


def test_layer_norm_compares_no_samples(digits):
    D = Seen(DCGANDiscriminator(8, 1, width=8, norm="layer"))
    GANTrainer(small_pair()[0], D, loss="hinge").fit(
        ShuffledBatches(digits[0], batch_size=8), 1, progress=False
    )
    assert [len(call[0]) for call in D.calls] == [16, 8]


def test_all_calls_of_a_step_share_one_power_iteration(digits):
    _, D = small_pair(d_norm=True)
    conv = D.layers[0]
    norm = conv.parametrizations.weight[0]
    original = conv.parametrizations.weight.original.detach().clone()
    u = nn.functional.normalize(original.flatten(1) @ norm._v, dim=0)
    trainer = GANTrainer(small_pair()[0], D, loss="hinge", r1_gamma=1.0)
    sigmas = []
    conv.register_forward_hook(lambda m, *_: sigmas.append((original / m.weight).mean().item()))
    x, y = trainer._next(iter([digits[0][:8]]))
    trainer._train_discriminator(x, y, 0)
    # penalty, real and fake; the vectors are those of one step
    assert len(sigmas) == 3
    assert len(set(sigmas)) == 1
    torch.testing.assert_close(norm._u, u)


def test_fakes_have_the_labels_of_the_batch_in_another_order_and_both_networks_see_them(digits):
    G, D = small_pair(conditional=True, norm="cbn")
    G, D = Seen(G), Seen(D)
    G.z_dim = G.inner.z_dim
    batches = ShuffledBatches(*digits, batch_size=64)
    GANTrainer(G, D, loss="hinge").fit(batches, 1, progress=False)
    _, labels = batches(0)
    (_, both_labels), (fake, fake_labels) = D.calls
    assert torch.equal(both_labels[:64], labels)
    for of_g, of_d in zip(G.calls, (both_labels[64:], fake_labels), strict=True):
        assert torch.equal(of_g[1], of_d)
        assert not torch.equal(of_d, labels)
        assert torch.equal(of_d.sort().values, labels.sort().values)
    assert not torch.equal(G.calls[0][1], G.calls[1][1])
    # and they change the logits
    other = (fake_labels + 1) % 10
    assert not torch.allclose(D.inner(fake, fake_labels), D.inner(fake, other))


def test_labels_reach_the_penalty(digits):
    G, D = small_pair(conditional=True, norm="cbn")
    D = Seen(D)
    trainer = GANTrainer(G, D, loss="hinge", r1_gamma=1.0)
    batches = ShuffledBatches(*digits, batch_size=8)
    trainer.fit(batches, 1, progress=False)
    assert torch.equal(D.calls[0][1], batches(0)[1])


def test_the_discriminator_is_frozen_in_the_generator_step_and_restored(digits):
    G, D = small_pair()
    frozen = next(D.parameters()).requires_grad_(False)
    needed = []
    D.register_forward_hook(lambda m, *_: needed.append([p.requires_grad for p in m.parameters()]))
    optimiser = torch.optim.Adam([p for p in D.parameters() if p.requires_grad])
    trainer = GANTrainer(G, D, loss="hinge", opt_d=optimiser)
    before = frozen.clone()
    trainer.fit(ShuffledBatches(digits[0], batch_size=8), 2, progress=False)
    n = len(needed[0])
    assert needed == [[False] + [True] * (n - 1), [False] * n] * 2
    assert [p.requires_grad for p in D.parameters()] == [False] + [True] * (n - 1)
    assert all(p.grad is None for p in D.parameters())
    assert torch.equal(frozen, before)

    def fails(*_):
        raise KeyboardInterrupt

    trainer.loss = AdversarialLoss("fails", False, trainer.loss._of_d, fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(ShuffledBatches(digits[0], batch_size=8), 3, progress=False)
    assert [p.requires_grad for p in D.parameters()] == [False] + [True] * (n - 1)


def test_modes_and_the_global_generator_are_left_as_they_were(digits):
    G, D = small_pair()
    G.eval()
    frozen = next(iter(D.children())).eval()
    also = []
    frozen.register_forward_hook(lambda m, *_: also.append(m.training))
    before = [m.training for m in itertools.chain(G.modules(), D.modules())]
    during = []
    G.register_forward_hook(lambda m, *_: during.append(m.training))
    state = torch.get_rng_state()
    trainer = GANTrainer(G, D, loss="hinge")
    with torch.no_grad():
        trainer.fit(ShuffledBatches(digits[0], batch_size=8), 1, progress=False)
        assert not torch.is_grad_enabled()
    assert during == also == [True, True]
    trainer.sample_sheet(3)
    assert during[2:] == [False]
    assert [m.training for m in itertools.chain(G.modules(), D.modules())] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_a_discriminator_may_begin_in_place(loss, norm, digits):
    def losses(inplace):
        G, images = small_pair()[0], digits[0][:8].clone()
        layers = norm(1), nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)
        trainer = GANTrainer(
            G, nn.Sequential(nn.LeakyReLU(0.2, inplace), *layers), loss=loss, r1_gamma=1
        )
        trainer.fit([images], 2, progress=False)
        assert torch.equal(images, digits[0][:8])
        return trainer.history.d_loss, trainer.history.g_loss, trainer.history.r1

    assert losses(True) == losses(False)


# --- the average ----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_of_weights_and_statistics_is_the_closed_form(warmup, digits):
    G, D = small_pair()
    trainer = GANTrainer(G, D, loss="hinge", ema_decay=0.6, ema_warmup=warmup)

    def floating():
        return {k: v.double() for k, v in G.state_dict().items() if v.is_floating_point()}

    expected = floating()

    def follow(trainer):
        t = trainer.step
        decay = min(0.6, (1 + t) / (10 + t)) if warmup else 0.6
        for name, value in floating().items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    trainer.fit(ShuffledBatches(digits[0], batch_size=16), 15, callback=follow, progress=False)
    averaged = trainer.averaged_generator()
    assert not any(module.training for module in averaged.modules())
    found, statistics = averaged.state_dict(), 0
    for name, value in expected.items():
        # 15 sums of float32 numbers of order 1
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=2e-6)
        statistics += name.endswith(("running_mean", "running_var"))
        if name.endswith("running_var"):
            assert not torch.allclose(found[name], G.state_dict()[name], atol=1e-4), name
    assert statistics == 2


def test_the_vectors_of_spectral_norm_are_not_averaged(digits):
    G = nn.Sequential(spectral_norm(nn.Linear(6, 64)), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    G.z_dim = 6
    trainer = GANTrainer(G, small_pair()[1], loss="hinge")
    trainer.fit(ShuffledBatches(digits[0], batch_size=16), 5, progress=False)
    raw, averaged = G[0].parametrizations.weight, trainer.averaged_generator()[0].parametrizations
    assert torch.equal(averaged.weight[0]._u, raw[0]._u)
    assert not torch.equal(averaged.weight.original, raw.original)


def test_a_sheet_shows_the_same_noise_each_time_and_disturbs_nothing(digits):
    def run(callback):
        trainer = GANTrainer(*small_pair(), loss="hinge", seed=3)
        batches = ShuffledBatches(digits[0], batch_size=16)
        trainer.fit(batches, 4, callback=callback, progress=False)
        return trainer

    sheets = []
    watched = run(lambda trainer: sheets.append(trainer.sample_sheet(5)))
    alone = run(None)
    assert torch.equal(watched.sample_sheet(5), alone.sample_sheet(5))
    assert torch.equal(sheets[-1], alone.sample_sheet(5))
    torch.testing.assert_close(sheets[-1][:2], alone.sample_sheet(2))  # other sizes, other sums
    assert sheets[-1].shape == (5, 1, 8, 8)
    assert not torch.equal(sheets[0], sheets[1])
    raw = alone.sample_sheet(5, averaged=False)
    assert not torch.allclose(raw, sheets[-1])
    assert not raw.requires_grad
    # of the averaged generator in eval()
    noise = torch.Generator().manual_seed(4)
    z = torch.cat([torch.randn(1, 6, generator=noise) for _ in range(5)])
    torch.testing.assert_close(alone.averaged_generator()(z).detach(), sheets[-1])


def test_a_conditional_sheet_takes_labels(digits):
    trainer = GANTrainer(*small_pair(conditional=True, norm="cbn"), loss="hinge")
    trainer.fit(ShuffledBatches(*digits, batch_size=16), 2, progress=False)
    sheets = [trainer.sample_sheet(3, torch.full((3,), k)) for k in (0, 1)]
    assert not torch.allclose(*sheets)


# --- standing statistics --------------------------------------------------------------------------


def norm_input(G, *conditions):
    """What the first norm of a generator receives."""
    norm = next(m for m in G.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    seen = []
    handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    G(*conditions)
    handle.remove()
    return norm, seen[0]


@pytest.mark.parametrize("norm", ["bn", "selfmod", "cbn"])
def test_recalibrated_statistics_are_those_of_all_samples_together(norm):
    G, _ = small_pair(conditional=norm == "cbn", norm=norm)
    y_sampler = (lambda n: torch.arange(n) % 3) if norm == "cbn" else None
    generator = torch.Generator().manual_seed(0)
    assert recalibrate_batch_norm(G, 3, 50, y_sampler=y_sampler, generator=generator) is G
    generator.manual_seed(0)
    z = torch.cat([torch.randn(50, 6, generator=generator) for _ in range(3)])
    y = [torch.cat([torch.arange(50) % 3] * 3)] if norm == "cbn" else []
    layer, h = norm_input(G.eval(), z, *y)
    # sums in float64, written in float32
    torch.testing.assert_close(layer.running_mean, h.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, h.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_labels_of_the_recalibration_are_those_of_the_sampler():
    G, _ = small_pair(conditional=True, norm="cbn")
    seen = []
    G.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    recalibrate_batch_norm(G, 2, 30, y_sampler=lambda n: torch.full((n,), 7))
    assert [each.unique().tolist() for each in seen] == [[7], [7]]


def test_recalibration_leaves_weights_and_modes_alone():
    G, _ = small_pair()
    G.eval()
    weights = [p.clone() for p in G.parameters()]
    recalibrate_batch_norm(G, 1, 30, generator=torch.Generator().manual_seed(0))
    assert not any(module.training for module in G.modules())
    assert all(map(torch.equal, weights, G.parameters()))


# --- files ----------------------------------------------------------------------------------------


def a_trainer(kind, seed=0):
    conditional = kind == "conditional"
    norm = {"conditional": "cbn", "self modulated": "selfmod", "batch norm in D": "bn"}[kind]
    G, D = small_pair(
        conditional=conditional, norm=norm, d_norm=kind == "batch norm in D", seed=seed
    )
    optimisers = {}
    if kind == "batch norm in D":
        optimisers["opt_d"] = torch.optim.RMSprop(D.parameters(), 1e-4, alpha=0.99)
        optimisers["opt_g"] = torch.optim.SGD(G.parameters(), 1e-3)
    penalty = {} if kind == "batch norm in D" else {"r1_gamma": 1.0, "r1_every": 3}
    return GANTrainer(G, D, loss="hinge", n_dis=2, seed=5, **penalty, **optimisers)


@pytest.mark.parametrize("kind", ["conditional", "self modulated", "batch norm in D"])
def test_a_run_that_was_stopped_at_any_step_ends_with_the_same_bits(kind, digits, tmp_path):
    data = digits if kind == "conditional" else digits[:1]
    steps, stop = 9, random.Random(kind).randint(1, 8)

    def batches():  # more than two epochs
        return ShuffledBatches(*(each[:130] for each in data), batch_size=16, seed=2)

    whole = a_trainer(kind)
    whole.fit(batches(), steps, progress=False)
    whole.save(tmp_path / "whole")

    a = a_trainer(kind)
    a.fit(batches(), stop, progress=False)
    a.save(tmp_path / "part")
    b = a_trainer(kind, seed=1)  # other initial weights
    b.load(tmp_path / "part")
    b.save(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "part")
    b.fit(batches(), steps, progress=False)
    b.save(tmp_path / "resumed")
    assert_same_files(tmp_path / "resumed", tmp_path / "whole")
    assert len(b.history) == b.step == b.average.step == steps
    names = kept(tmp_path / "whole")[0].keys()
    for part in ("generator/", "discriminator/", "average/", "noise", "history"):
        assert any(name.startswith(part) for name in names), part
    assert any(name.endswith("._u") for name in names)
    assert any(name.startswith("generator/") and "running_var" in name for name in names)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_a_file_of_another_training_is_refused_and_nothing_changes(digits, tmp_path):
    trainer = a_trainer("self modulated")
    trainer.save(path := tmp_path / "file")
    G, D = small_pair(norm="selfmod")
    other = GANTrainer(G, D, loss="wasserstein", seed=5)
    with pytest.raises(ValueError, match=r"a training with .*hinge.*; here are .*wasserstein"):
        other.load(path)
    plain = GANTrainer(
        small_pair(norm="bn")[0], D, loss="hinge", n_dis=2, seed=5, r1_gamma=1.0, r1_every=3
    )
    before = [p.clone() for p in plain.generator.parameters()]
    with pytest.raises(ValueError, match=r"is of another generator: \S+ is \S+ .* there, .* here"):
        plain.load(path)
    assert all(map(torch.equal, before, plain.generator.parameters()))
    assert plain.step == 0
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"was not written by `GANTrainer\.save`"):
        trainer.load(tmp_path / "foreign")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no safetensors file, or cut off"):
        trainer.load(tmp_path / "cut")


def test_a_file_that_does_not_fit_the_optimiser_is_refused_before_the_networks(tmp_path):
    trainer = GANTrainer(*small_pair(), loss="hinge")
    trainer.save(path := tmp_path / "file")
    for groups in (lambda p: [{"params": p[:2]}, {"params": p[2:]}], lambda p: p[1:]):
        G, D = small_pair(seed=1)
        optimiser = torch.optim.Adam(groups(list(D.parameters())))
        other = GANTrainer(G, D, loss="hinge", opt_d=optimiser)
        before = [p.clone() for p in itertools.chain(G.parameters(), D.parameters())]
        with pytest.raises(ValueError, match=r"a training with .*'optimisers'.*; here are"):
            other.load(path)
        assert all(map(torch.equal, before, itertools.chain(G.parameters(), D.parameters())))
    double = GANTrainer(*(network.double() for network in small_pair(seed=1)), loss="hinge")
    with pytest.raises(ValueError, match=r"generator: \S+ is .*float32 there, .*float64 here"):
        double.load(path)


def test_the_options_of_the_optimisers_are_those_of_the_file(tmp_path):
    trainer = GANTrainer(*small_pair(), loss="hinge")
    trainer.save(path := tmp_path / "file")
    G, D = small_pair()
    other = GANTrainer(G, D, loss="hinge", opt_g=torch.optim.Adam(G.parameters(), 1e-5))
    other.load(path)
    assert other.opt_g.param_groups[0]["lr"] == 1e-3


def test_no_file_is_written_of_half_a_step(digits, tmp_path):
    trainer = GANTrainer(*small_pair(), loss="hinge")
    batches, path = ShuffledBatches(digits[0], batch_size=8), tmp_path / "file"

    def stops(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # between steps
        trainer.fit(batches, 3, callback=stops, progress=False)
    trainer.save(path)
    whole = trainer._train_generator
    trainer._train_generator = stops
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(batches, 3, progress=False)
    with pytest.raises(RuntimeError, match="step 2 was broken off halfway: `load` the last file"):
        trainer.save(path)
    trainer._train_generator = whole
    trainer.load(path)
    trainer.save(tmp_path / "again")
    assert_same_files(tmp_path / "again", path)
    trainer.fit(batches, 3, progress=False)
    trainer.save(tmp_path / "resumed")
    undisturbed = GANTrainer(*small_pair(), loss="hinge")
    undisturbed.fit(batches, 3, progress=False)
    undisturbed.save(tmp_path / "undisturbed")
    assert_same_files(tmp_path / "resumed", tmp_path / "undisturbed")


# --- batches --------------------------------------------------------------------------------------


def test_an_epoch_has_each_image_once_with_its_label_in_an_order_of_its_own():
    images, labels = torch.arange(10.0), torch.arange(10)
    batches = ShuffledBatches(images, labels, batch_size=3, seed=1)
    orders = []
    for epoch in (0, 1, 4):
        found = [batches(3 * epoch + place) for place in range(3)]
        assert all(torch.equal(x.long(), y) for x, y in found)
        orders.append(torch.cat([y for _, y in found]).tolist())
        assert len(set(orders[-1])) == 9  # the tenth fills no batch
    assert orders[0] != orders[1] != orders[2]
    assert torch.equal(batches(1)[1], torch.tensor(orders[0][3:6]))
    other = [ShuffledBatches(images, batch_size=3, seed=2)(k) for k in range(3)]
    assert torch.cat(other).long().tolist() != orders[0]


def test_a_data_loader_is_read_again_and_again(digits):
    seen = []
    G, D = small_pair()
    D.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    loader = DataLoader(digits[0][:20], batch_size=8, drop_last=True)
    GANTrainer(G, D, loss="hinge").fit(loader, 3, progress=False)
    for call, place in ((0, 0), (2, 8), (4, 0)):
        assert torch.equal(seen[call][:8], digits[0][place : place + 8])


def test_images_alone_in_a_tuple_are_images(digits):
    found = []
    for batch in (digits[0][:8], (digits[0][:8],), [digits[0][:8]]):
        trainer = GANTrainer(*small_pair(), loss="hinge")
        found.append(trainer.fit([batch], 1, progress=False).g_loss)
    assert found == [found[0]] * 3


def test_a_loader_that_ends_stops_the_training(digits, tmp_path):
    trainer = GANTrainer(*small_pair(), loss="hinge")
    with pytest.raises(ValueError, match="`loader` has no batch for step 3"):
        trainer.fit(iter(digits[0].split(16)[:2]), 5, progress=False)
    assert trainer.step == len(trainer.history) == 2
    trainer.save(tmp_path / "file")  # no step was begun


# --- numbers --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_one_others(digits):
    def theta(seed):
        trainer = GANTrainer(*small_pair(), loss="non_saturating", seed=seed)
        trainer.fit(ShuffledBatches(digits[0], batch_size=8), 2, progress=False)
        return torch.cat([p.flatten() for p in trainer.generator.parameters()])

    first = theta(0)
    torch.manual_seed(99)
    assert torch.equal(first, theta(0))
    assert not torch.equal(first, theta(1))


@pytest.mark.parametrize(("call", "whose"), [(1, "discriminator"), (2, "generator")])
def test_a_loss_that_is_not_finite_stops_before_its_step(call, whose, digits):
    G, D = small_pair()
    network = G if whose == "generator" else D
    trainer = GANTrainer(G, D, loss="hinge")
    batches = ShuffledBatches(digits[0], batch_size=8)
    trainer.fit(batches, 2, progress=False)
    calls, before = itertools.count(1), []

    def poison(module, args, output):
        if next(calls) == call:
            before.extend(p.detach().clone() for p in network.parameters())
            return output * math.nan

    D.register_forward_hook(poison)
    last = f"d_loss {trainer.history.d_loss[-1]:.4g} and g_loss {trainer.history.g_loss[-1]:.4g}"
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit(batches, 4, progress=False)
    assert str(caught.value) == (
        f"the training diverges at step 3: the hinge loss of the {whose} is nan; the step before "
        f"had {last}."
    )
    assert trainer.step == 2
    assert all(map(torch.equal, before, network.parameters()))


class OutsideAutocast(nn.Module):
    """A parametrization that notes where it is computed: on a GPU autocast rounds sigma."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def forward(self, weight):
        self.notes.append(not torch.is_autocast_enabled("cpu"))
        return weight


def test_bfloat16_runs_the_networks_but_neither_penalty_nor_sigma(digits):
    G, D = small_pair()
    conv = next(m for m in D.modules() if isinstance(m, nn.Conv2d))
    kinds, outside = [], []
    conv.register_forward_hook(lambda m, args, output: kinds.append(output.dtype))
    register_parametrization(conv, "weight", OutsideAutocast(outside))
    outside.clear()  # it was called when it was registered
    options = {"loss": "hinge", "r1_gamma": 1.0, "r1_every": 2}
    trainer = GANTrainer(G, D, **options, amp_dtype=torch.bfloat16)
    batches = ShuffledBatches(digits[0], batch_size=16)
    trainer.fit(batches, 2, progress=False)
    half, single = torch.bfloat16, torch.float32
    assert kinds == [single, half, half, half, half]  # a penalty in the first step only
    assert outside == [True] * 4  # once for each network and step
    assert all(p.dtype == single for p in itertools.chain(G.parameters(), D.parameters()))
    full = GANTrainer(*small_pair(), **options)
    full.fit(batches, 1, progress=False)
    # 8 bits of logits of order 1, and a mean of 32 of them
    assert trainer.history.d_loss[0] == pytest.approx(full.history.d_loss[0], abs=0.02)
    # the vectors are a step of the power iteration further than in the other pair
    assert trainer.history.r1[0] == pytest.approx(full.history.r1[0], rel=0.2)


def test_a_short_training_moves_the_mean_image_to_that_of_the_digits(digits):
    G, D = small_pair()
    optimisers = [torch.optim.Adam(m.parameters(), 4e-3, (0.0, 0.9)) for m in (G, D)]
    trainer = GANTrainer(
        G, D, loss="hinge", ema_decay=0.9, opt_g=optimisers[0], opt_d=optimisers[1]
    )
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))

    def distance():
        with torch.no_grad():
            fakes = trainer.averaged_generator().train()(z)
        return (fakes.mean(0) - digits[0].mean(0)).square().mean().sqrt().item()

    before = distance()
    trainer.fit(ShuffledBatches(digits[0], batch_size=32), 60, progress=False)
    assert distance() < before / 2


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": None}, TypeError, "`loss` must be an AdversarialLoss or its name; got None"),
        ({"loss": "hing"}, ValueError, "must be one of .*hinge.*; got 'hing'"),
        ({"r1_gamma": -1.0}, ValueError, "`r1_gamma` must be at least 0; got -1.0"),
        ({"r1_gamma": math.nan}, ValueError, "`r1_gamma` must be at least 0; got nan"),
        ({"r1_every": 0}, ValueError, "`r1_every` must be an integer of at least 1; got 0"),
        ({"n_dis": 0}, ValueError, "`n_dis` must be an integer of at least 1; got 0"),
        ({"seed": -1}, ValueError, "`seed` must be an integer of at least 0; got -1"),
        ({"ema_decay": 1.0}, ValueError, r"`ema_decay` must lie in \[0, 1\); got 1.0"),
        ({"amp_dtype": torch.float16}, ValueError, "`amp_dtype` must be None or torch.bfloat16"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, error, words, unchecked):
    with pytest.raises(error, match=words):
        GANTrainer(*small_pair(), **{"loss": "hinge", **options})


def test_an_optimiser_that_no_file_can_hold_is_refused_before_the_training():
    G, D = small_pair()
    for options in ({"lr": torch.tensor(1e-3)}, {"betas": (torch.tensor(0.0), torch.tensor(0.9))}):
        optimiser = torch.optim.Adam(D.parameters(), foreach=False, **options)
        with pytest.raises(TypeError, match="`opt_d` must have plain numbers as options"):
            GANTrainer(G, D, loss="hinge", opt_d=optimiser)


def test_an_optimiser_of_the_other_network_is_refused():
    G, D = small_pair()
    swapped = torch.optim.Adam(D.parameters())
    with pytest.raises(ValueError, match="`opt_g` has parameters that are not those"):
        GANTrainer(G, D, loss="hinge", opt_g=swapped)


def test_a_generator_must_say_the_width_of_its_noise():
    plain = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="as `z_dim`; Sequential does not"):
        GANTrainer(plain, Line(), loss="hinge")
    with pytest.raises(TypeError, match="as `z_dim`; Sequential does not"):
        recalibrate_batch_norm(plain, 1, 1)


def test_steps_batches_and_labels_are_checked(digits, unchecked):
    trainer = GANTrainer(*small_pair(conditional=True, norm="cbn"), loss="hinge")
    images, labels = digits[0][:8], digits[1][:8]
    for batch, error, words in (
        ((images, labels.int()), TypeError, "`loader` must give labels of int64"),
        ((images, labels[:7]), ValueError, r"one label per image, shape \(8,\); got \(7,\)"),
        ((images.int(), labels), TypeError, "`loader` must be a tensor of floating"),
        (
            (images, labels, labels),
            TypeError,
            r"\(images, labels\).*\['Tensor', 'Tensor', 'Tensor'",
        ),
        ((images, labels.tolist()), TypeError, r"as tensors; got \['Tensor', 'list'\]"),
        ({"x": images}, TypeError, r"`loader` must give images.*; got \['dict'\]"),
        ((), TypeError, r"`loader` must give images.*; got \[\]"),
    ):
        with pytest.raises(error, match=words):
            trainer.fit([batch], 1, progress=False)
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1; got 0"):
        trainer.fit([images], 0)
    with pytest.raises(TypeError, match="`loader` must give batches; write `ShuffledBatches"):
        trainer.fit(images, 1)
    with pytest.raises(ValueError, match="`batch_size` 9; got 8"):
        ShuffledBatches(images, batch_size=9)
    with pytest.raises(ValueError, match="one per image, 8; got 7"):
        ShuffledBatches(images, labels[:7], batch_size=2)
    for counts in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be an integer of at least 1; got 0"):
            recalibrate_batch_norm(trainer.generator, *counts)
