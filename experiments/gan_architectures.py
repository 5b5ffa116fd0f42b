"""Batch norm, self-modulation and classes in the generator of a small GAN, on Fashion-MNIST.

Article 6549 says that self-modulation converges almost 50 % faster, that AdaIN was harder to train,
and that a DCGAN is much faster than a residual network of its size; it shows no table. Here
generators are trained on images of 16 x 16, with the same weights outside their norms at the start,
the same discriminator and the same order of the data per seed. BN, SELFMOD and AdaIN differ in
their norms alone. AdaIN here is SELFMOD, its network behind the noise included, with the statistics
of single maps. CBN also has the projection in its discriminator, and other noise, as its labels are
drawn from the same generator. "BN and nearest" has other convolutions than BN, with fewer weights.

Each is judged raw and averaged, and with four kinds of statistics: the running ones, those of the
raw weights, those of its own samples, and those of a batch. Features are those of a classifier of
our own, not Inception's: the figures compare with each other, and with nothing that is published.

The recipe is that of a prototype, which compared two learning rates on one seed (1e-3 and 2e-4) and
judged them by test images. Nothing was chosen since. Images held back from training (`--tuning`,
seed 100, arm BN) choose the same: there too 1e-3 has the lower KID, raw and averaged. AdaIN and the
generator that upsamples by nearest neighbours train half as long, and are compared with the others
after as many steps.
"""

import base64
import copy
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from cln_tutorial import datasets
from cln_tutorial.gan_architectures.analysis import nyquist_energy
from cln_tutorial.gan_architectures.batches import ShuffledBatches
from cln_tutorial.gan_architectures.classifier import FeatureClassifier
from cln_tutorial.gan_architectures.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    mode_coverage,
    precision_recall,
)
from cln_tutorial.gan_architectures.networks import (
    DCGANDiscriminator,
    DCGANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    SNDCGANDiscriminator,
)
from cln_tutorial.gan_architectures.norms import ModulatedNorm2d
from cln_tutorial.gan_architectures.training import GANTrainer, recalibrate_batch_norm
from experiments import harness

SIDE, CLASSES = 16, 10
SHEET = 40  # images: four rows of ten
# Names have no dash: it ends the name of a table.
BN, SELFMOD, CBN, ADAIN, NEAREST = "BN", "SELFMOD", "CBN", "AdaIN", "BN and nearest"
REAL, SPEED = "real images", "architectures"
# One job trains what is compared with each other.
ARMS = {"BN and SELFMOD": (BN, SELFMOD), CBN: (CBN,), "short runs": (ADAIN, NEAREST)}
SHORT = ADAIN, NEAREST
GENERATORS: dict[str, dict[str, Any]] = {
    BN: {"norm": "bn"},
    SELFMOD: {"norm": "selfmod"},
    CBN: {"norm": "cbn", "num_classes": CLASSES},
    ADAIN: {"norm": "selfmod"},  # and other statistics: see `fresh_trainer`
    NEAREST: {"norm": "bn", "resample": "nearest"},
}
RAW, BEST = "raw, running", "EMA, recalibrated"
_STATS = "running", "recalibrated", "batch"
ROWS = (*(f"raw, {s}" for s in _STATS), "EMA, those of raw", *(f"EMA, {s}" for s in _STATS))
MIXED = "layer 0", "layer 1", "both layers", "dense layer", "all"
NETWORKS = "DCGAN", "ResNet"


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = (*ARMS, REAL, SPEED)
    marks: tuple[int, ...] = (250, 500, 1000, 2000, 3000, 4000)  # steps: saved, and judged later
    short: int = 2000
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.999
    z_dim: int = 32
    width: int = 32  # of the generator: 64 and 32 channels
    d_width: int = 16
    samples: int = 5000
    reference: int = 5000  # real images to compare with, and as many to be compared with them
    held_back: int = 0  # of the training images, to compare settings on; then none is tested
    recalibration: int = 20  # batches of 500
    classifier_epochs: int = 3
    least_share: float = 0.02  # of the samples, for a class to count
    sizes: tuple[int, ...] = (16, 32, 64)  # of images, to compare architectures
    speed_width: int = 32  # of the DCGAN there
    speed_batch: int = 16
    rounds: int = 15
    made: bool = False  # no files needed


TUNING = Settings(seeds=(100,), held_back=10_000)
QUICK = Settings(
    marks=(2, 4),
    short=2,
    batch=16,
    z_dim=8,
    width=8,
    d_width=4,
    samples=80,
    reference=100,
    recalibration=1,
    sizes=(16,),
    speed_width=8,
    speed_batch=4,
    rounds=2,
    made=True,
)

_ACCURACY = {"accuracy": "% of samples that the classifier finds in the class asked for"}
_ALTERNATES = "share of the energy that alternates from pixel to pixel"
_SPECTRUM = {"mean image": f"{_ALTERNATES}, of the mean image", "images": f"{_ALTERNATES}, mean"}
_MIXING = {
    "pixels": "mean absolute change of a pixel, of 2",
    "class": "% of the images whose class changes",
}
_SPEED = {
    "weights of G": "thousands",
    "weights of D": "thousands",
    "generator": "ms of CPU for its forward and backward pass, fastest round",
    "step": "ms of CPU for a step of both networks, fastest round",
    "kept by G": "MiB that the forward pass of the generator keeps for the backward pass",
}
_LESS = "SELFMOD less BN of the same seed"


def sample_units(settings: Settings) -> dict[str, str]:
    """The units of the figures of a set of samples."""
    real = "held-back training images" if settings.held_back else "test images"
    sizes = f"{settings.samples:,} samples to {settings.reference:,} {real}"
    return {
        "KID": f"squared kernel distance of {sizes}, own features",
        "KID low": "end of its interval of 95 % for one seed",
        "KID high": "end of its interval of 95 % for one seed",
        "FID": "Fréchet distance of the same, own features",
        "precision": f"share of samples among {real}, 5 neighbours",
        "recall": f"share of {real} among samples, 5 neighbours",
        "density": "1 on average for equal laws, 5 neighbours",
        "coverage": "0.97 on average for equal laws, 5 neighbours",
        "classes": f"of 10 that have {100 * settings.least_share:g} % of the samples at least",
        "rarest": "% of the samples, of the class that has fewest",
    }


def units(settings: Settings) -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    found: dict[str, str] = {}
    of_sample = sample_units(settings)
    for arm in arms_of(settings):
        marks = marks_of(settings, arm)
        for row in (RAW, BEST):
            found |= _named("by step", f"{arm}, {row}", _by_step(marks, of_sample["KID"]))
        for mark in {settings.short, marks[-1]}:
            found |= _named("spectrum", f"{arm}, {mark} steps", _SPECTRUM)
        if arm not in SHORT:
            for row in ROWS:
                found |= _named(arm, row, of_sample | (_ACCURACY if arm == CBN else {}))
        else:
            found |= _named(arm, f"{BEST}, {marks[-1]} steps", of_sample)
    if SELFMOD in arms_of(settings):
        for row in ROWS:
            found |= _named("difference", row, {"KID": _LESS, "FID": _LESS})
        for row in (RAW, BEST):
            marks = marks_of(settings, SELFMOD)
            found |= _named("difference by step", row, _by_step(marks, f"KID, {_LESS}"))
        for row in MIXED:
            found |= _named("mixing", row, _MIXING)
    if REAL in settings.variants:
        found |= _named(REAL, "the other half of the test images", of_sample)
        found |= _named("spectrum", REAL, _SPECTRUM)
        found["classifier-test images.accuracy"] = "% that are right"
    if SPEED in settings.variants:
        ratios = dict.fromkeys(_SPEED, "ratio")
        for size in settings.sizes:
            for name in NETWORKS:
                found |= _named(SPEED, f"{name}, {size} pixels", _SPEED)
            found |= _named(SPEED, f"ResNet over DCGAN, {size} pixels", ratios)
    return found


PUBLISHED = [
    {
        "figure": f"{figure}.FID",
        "value": value,
        "source": source,
        "comparable": False,
        "why": f"{what} on CIFAR-10 at 32 x 32 with features of Inception and 100,000 steps or "
        "more; here grey images of 16 x 16 and features of an own classifier",
    }
    for figure, value, source, what in (
        (f"{BN}-{BEST}", 16.77, "mimicry, baseline table, 50k/50k", "SNGAN"),
        (f"{CBN}-{BEST}", 10.84, "mimicry, baseline table, 50k/50k", "cGAN with projection"),
        (f"{CBN}-{RAW}", 8.12, "MMGeneration, without ReLU in place", "SNGAN with projection"),
    )
] + [
    {
        "figure": f"difference-{BEST}.FID",
        "value": None,
        "source": "Chen et al. 2019, arXiv 1810.01365: lower in 124 of 144 settings, by 5 to 35 %",
        "comparable": False,
        "why": "other data, networks, losses and features, and not one number",
    },
    {
        "figure": f"difference-{RAW}.KID",
        "value": None,
        "source": "article 6549: almost 50 % faster; no table",
        "comparable": False,
        "why": "an impression, of another model (O-GAN)",
    },
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one job. Training goes on where it was killed; what follows begins anew."""
    task = Task(job, data(job.settings))
    if job.variant == REAL:
        return real_images(task)
    if job.variant == SPEED:
        return architectures(job.settings, job.seed)
    figures: dict[str, Any] = {}
    for arm in ARMS[job.variant]:
        figures |= judged(task, arm, trained(task, arm))
    if SELFMOD in ARMS[job.variant]:
        figures |= differences(job.settings, figures)
    return figures


@dataclass(frozen=True)
class Task:
    """What the jobs share."""

    job: harness.Job
    data: "Data"

    @property
    def settings(self) -> Settings:
        return self.job.settings

    def noise(self, n: int) -> Tensor:
        """The same for all rows and arms of a seed."""
        generator = torch.Generator().manual_seed(6549 + self.job.seed)
        return torch.randn(n, self.settings.z_dim, generator=generator).to(self.job.device)


def arms_of(settings: Settings) -> list[str]:
    return [arm for variant in settings.variants for arm in ARMS.get(variant, ())]


def marks_of(settings: Settings, arm: str) -> tuple[int, ...]:
    return tuple(m for m in settings.marks if arm not in SHORT or m <= settings.short)


# --- training -------------------------------------------------------------------------------------


def trained(task: Task, arm: str) -> GANTrainer:
    """Train to the last mark, from the last file that is there, and leave one at each mark."""
    settings, job = task.settings, task.job
    trainer = fresh_trainer(settings, arm, job.seed, job.device)
    labels = task.data.labels if arm == CBN else None
    batches = ShuffledBatches(task.data.train, labels, batch_size=settings.batch, seed=job.seed)
    marks = marks_of(settings, arm)
    job.checkpoints.mkdir(parents=True, exist_ok=True)

    def keep(trainer: GANTrainer) -> None:
        if trainer.step in marks:
            # What the harness reads from a file: the time of the whole job so far.
            trainer.history.seconds = time.perf_counter() - job.started
            trainer.save(file_of(job, arm, trainer.step))

    there = [mark for mark in marks if file_of(job, arm, mark).exists()]
    if there:
        trainer.load(file_of(job, arm, there[-1]))
    trainer.fit(batches, marks[-1], callback=keep, progress=not job.quiet)
    return trainer


def fresh_trainer(settings: Settings, arm: str, seed: int, device: str = "cpu") -> GANTrainer:
    """A pair of networks; only the convolutions of NEAREST differ outside the norms."""
    options = GENERATORS[arm]
    torch.manual_seed(seed)
    G = DCGANGenerator(SIDE, 1, z_dim=settings.z_dim, width=settings.width, **options)
    if arm == ADAIN:  # "adain" has one linear map behind the noise: a second difference
        for norm in (m for m in G.modules() if isinstance(m, ModulatedNorm2d)):
            norm.norm = "instance"
    torch.manual_seed(seed)
    D = plain = SNDCGANDiscriminator(SIDE, 1, width=settings.d_width)
    if classes := options.get("num_classes"):
        D = SNDCGANDiscriminator(SIDE, 1, width=settings.d_width, num_classes=classes)
        D.load_state_dict(plain.state_dict(), strict=False)  # vectors of spectral norm, too
    G, D = G.to(device), D.to(device)
    opt_g, opt_d = (torch.optim.Adam(m.parameters(), settings.rate, (0.0, 0.9)) for m in (G, D))
    return GANTrainer(
        G, D, loss="hinge", ema_decay=settings.decay, opt_g=opt_g, opt_d=opt_d, seed=seed
    )


def file_of(job: harness.Job, arm: str, step: int) -> Any:
    return job.checkpoints / f"{arm} {step}.safetensors"


# --- what is measured -----------------------------------------------------------------------------


def judged(task: Task, arm: str, trainer: GANTrainer) -> dict[str, Any]:
    """The figures of an arm, and its sheets: raw, averaged, and the average at each mark."""
    settings, figures, sheets, progress = task.settings, {}, [], []
    marks = marks_of(settings, arm)
    for mark in marks:
        trainer.load(file_of(task.job, arm, mark))
        for row, G in generators(task, arm, trainer, (RAW, BEST)):
            images = sampled(task, arm, G)
            kid = kernel_distance(task.data.judge.transform(images), task.data.real).value
            figures[f"by step-{arm}, {row}.{mark} steps"] = kid
        progress.append(sheet_of(task, arm, G, 10))
        if mark in (settings.short, marks[-1]):
            figures |= _named("spectrum", f"{arm}, {mark} steps", spectrum(images))
    for row, G in generators(task, arm, trainer, (BEST,) if arm in SHORT else ROWS):
        named = f"{row}, {marks[-1]} steps" if arm in SHORT else row
        figures |= _named(arm, named, of_samples(task, arm, sampled(task, arm, G)))
        if row in (RAW, BEST):
            sheets.append(sheet(sheet_of(task, arm, G, SHEET)))
        if arm == SELFMOD and row == BEST:
            mixing, mixed = mixed_styles(task, G)
            figures |= mixing | {"sheets of mixing": [mixed, sheet(between(task, G))]}
    return figures | {f"sheets of {arm}": [*sheets, sheet(torch.cat(progress))]}


def generators(
    task: Task, arm: str, trainer: GANTrainer, rows: tuple[str, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """The generator of each row: whose weights, and with which statistics."""
    for row in rows:
        weights, _, statistics = row.partition(", ")
        raw = trainer.generator
        G = copy.deepcopy(raw).eval() if weights == "raw" else trainer.averaged_generator()
        if statistics == "those of raw":
            G.load_state_dict(dict(raw.named_buffers()), strict=False)
        elif statistics == "recalibrated":
            n, y_sampler = task.settings.recalibration, classes_in_turn if arm == CBN else None
            noise = torch.Generator(trainer.device).manual_seed(task.job.seed)
            recalibrate_batch_norm(G, n, 500, y_sampler=y_sampler, generator=noise)
        yield row, G.train(statistics == "batch")


def classes_in_turn(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


@torch.no_grad()
def sampled(task: Task, arm: str, G: nn.Module) -> Tensor:
    """Images in batches of the size of training, which batch statistics depend on."""
    n, batch = task.settings.samples, task.settings.batch
    whole = -(-n // batch) * batch
    z, y = task.noise(whole).split(batch), classes_in_turn(whole).split(batch)
    return torch.cat([drawn(arm, G, *pair) for pair in zip(z, y, strict=True)])[:n]


def drawn(arm: str, G: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return (G(z, y.to(z.device)) if arm == CBN else G(z)).cpu()


def of_samples(task: Task, arm: str | None, images: Tensor) -> dict[str, float]:
    found, real = task.data.judge.transform(images), task.data.real
    kid = kernel_distance(found, real)
    near, around = precision_recall(real, found), density_coverage(real, found)
    classes = task.data.judge.predict(images)
    covered, shares = mode_coverage(classes, CLASSES, task.settings.least_share)
    columns = {
        "KID": kid.value,
        "KID low": kid.low,
        "KID high": kid.high,
        "FID": frechet_distance(found, real),
        **near._asdict(),
        **around._asdict(),
        "classes": covered,
        "rarest": 100 * shares.min().item(),
    }
    if arm == CBN:
        columns["accuracy"] = percent(classes == classes_in_turn(len(images)))
    return columns


def spectrum(images: Tensor) -> dict[str, float]:
    return {
        "mean image": nyquist_energy(images.mean((0, 1))).item(),
        "images": nyquist_energy(images.squeeze(1)).mean().item(),
    }


@torch.no_grad()
def mixed_styles(task: Task, G: nn.Module) -> tuple[dict[str, float], str]:
    """What changes when some layers see other noise; a sheet of ten pairs and their mixtures."""
    z, other = task.noise(2 * task.settings.reference).chunk(2)
    everywhere = dict.fromkeys(range(G.num_modulated), other)
    mixtures = {
        **{f"layer {layer}": (z, {layer: other}) for layer in range(G.num_modulated)},
        "both layers": (z, everywhere),
        "dense layer": (other, dict.fromkeys(range(G.num_modulated), z)),
        "all": (other, {}),
    }
    plain, figures = G(z).cpu(), {}
    before, rows = task.data.judge.predict(plain), [plain[:10]]
    for row in MIXED:
        noise, layer_z = mixtures[row]
        images = G(noise, layer_z=layer_z).cpu()
        changed = task.data.judge.predict(images) != before
        columns = {"pixels": (images - plain).abs().mean().item(), "class": percent(changed)}
        figures |= _named("mixing", row, columns)
        rows.append(images[:10])
    return figures, sheet(torch.cat(rows))


@torch.no_grad()
def between(task: Task, G: nn.Module) -> Tensor:
    """Four straight lines from one noise to another, of ten images each."""
    a, b = task.noise(8)[:, None].chunk(2)
    share = torch.linspace(0, 1, 10, device=a.device)[:, None]
    return G((a + share * (b - a)).flatten(0, 1)).cpu()


@torch.no_grad()
def sheet_of(task: Task, arm: str, G: nn.Module, n: int) -> Tensor:
    """Images of fixed noise, the same in all arms of a seed; a column is a class, where G knows."""
    return drawn(arm, G, task.noise(SHEET)[:n], classes_in_turn(n))


def sheet(images: Tensor) -> str:
    """Images of 16 x 16 as one text: base64 of a byte per pixel, row after row."""
    levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return base64.b64encode(levels.numpy().tobytes()).decode()


def differences(settings: Settings, figures: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in ROWS:
        for column in ("KID", "FID"):
            less = figures[f"{SELFMOD}-{row}.{column}"] - figures[f"{BN}-{row}.{column}"]
            found[f"difference-{row}.{column}"] = less
    for row in (RAW, BEST):
        for column in _by_step(marks_of(settings, SELFMOD), ""):
            of_both = [figures[f"by step-{arm}, {row}.{column}"] for arm in (SELFMOD, BN)]
            found[f"difference by step-{row}.{column}"] = of_both[0] - of_both[1]
    return found


def real_images(task: Task) -> dict[str, Any]:
    """What the figures are for samples without a fault: other test images."""
    given = task.data
    columns = of_samples(task, None, given.other)
    figures = _named(REAL, "the other half of the test images", columns)
    figures |= _named("spectrum", REAL, spectrum(given.other))
    halves = (given.reference, given.reference_labels), (given.other, given.other_labels)
    right = torch.cat([given.judge.predict(images) == labels for images, labels in halves])
    figures["classifier-test images.accuracy"] = percent(right)
    by_class = [given.other[given.other_labels == k] for k in range(CLASSES)]
    shown = torch.cat([by_class[k % CLASSES][k // CLASSES][None] for k in range(SHEET)])
    return figures | {f"sheets of {REAL}": [sheet(shown)]}


# --- architectures --------------------------------------------------------------------------------


def architectures(settings: Settings, seed: int) -> dict[str, float]:
    """Speed and memory of a DCGAN and of residual networks with as many weights."""
    figures: dict[str, float] = {}
    for size in settings.sizes:
        pairs = pairs_of_equal_size(settings, size, seed)
        images = torch.rand(settings.speed_batch, 1, size, size) * 2 - 1
        z = torch.randn(settings.speed_batch, settings.z_dim)
        runs: dict[tuple[str, str], Callable[[], None]] = {}
        for name, (G, D) in pairs.items():
            runs[name, "generator"] = partial(both_ways, G, z)
            runs[name, "step"] = partial(one_step, GANTrainer(G, D, loss="hinge"), images)
        # In turn: what disturbs one disturbs the others.
        rounds = [{each: cpu_ms(run) for each, run in runs.items()} for _ in range(settings.rounds)]
        columns = {
            name: {
                "weights of G": weights(G) / 1000,
                "weights of D": weights(D) / 1000,
                "generator": min(each[name, "generator"] for each in rounds),
                "step": min(each[name, "step"] for each in rounds),
                "kept by G": kept_bytes(G, partial(G, z)) / 2**20,
            }
            for name, (G, D) in pairs.items()
        }
        columns["ResNet over DCGAN"] = {
            what: columns["ResNet"][what] / columns["DCGAN"][what] for what in _SPEED
        }
        for name, each in columns.items():
            figures |= _named(SPEED, f"{name}, {size} pixels", each)
    return figures


def both_ways(G: nn.Module, z: Tensor) -> None:
    G(z).square().mean().backward()


def one_step(trainer: GANTrainer, images: Tensor) -> None:
    trainer.fit(lambda _: images, trainer.step + 1, progress=False)


def cpu_ms(run: Callable[[], None]) -> float:
    begun = time.process_time()
    run()
    return 1000 * (time.process_time() - begun)


def pairs_of_equal_size(
    settings: Settings, size: int, seed: int
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Both pairs of networks, the residual ones as wide as comes nearest in weights."""
    torch.manual_seed(seed)
    width, z_dim = settings.speed_width, settings.z_dim
    G = DCGANGenerator(size, 1, z_dim=z_dim, width=width)
    D = DCGANDiscriminator(size, 1, width=width, norm="none", spectral=True)
    res_g = nearest_width(partial(ResNetGenerator, size, 1, z_dim=z_dim), weights(G))
    res_d = nearest_width(partial(ResNetDiscriminator, size, 1), weights(D))
    return {"DCGAN": (G, D), "ResNet": (res_g, res_d)}


def nearest_width(made: Callable[..., nn.Module], wanted: int) -> nn.Module:
    """The network with about as many weights, which are a square function of the width."""
    widths = (2, 4, 6)
    polynomial = np.polyfit(widths, [weights(made(width=width)) for width in widths], 2)
    polynomial[-1] -= wanted
    return made(width=round(max(np.roots(polynomial).real)))


def weights(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def kept_bytes(network: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that a forward pass keeps, each memory once, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # keeps them alive, so that no address is used twice
    del output
    return sum(size for address, size in seen.items() if address not in own)


# --- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """Images in [-1, 1], (n, 1, 16, 16), labels (n,), and the judge of them all."""

    train: Tensor
    labels: Tensor
    reference: Tensor  # to compare with
    reference_labels: Tensor
    other: Tensor  # to be compared with it
    other_labels: Tensor
    judge: FeatureClassifier
    real: Tensor  # features of the reference


@lru_cache(maxsize=1)
def data(settings: Settings) -> Data:
    """The same for all seeds; where settings are compared, no test image is used."""
    train, labels, tested, tested_labels = digits() if settings.made else clothes()
    if held_back := settings.held_back:
        tested, tested_labels = train[-held_back:], labels[-held_back:]
        train, labels = train[:-held_back], labels[:-held_back]
    images, classes = (each.split(settings.reference) for each in (tested, tested_labels))
    judge = FeatureClassifier(n_epochs=settings.classifier_epochs, seed=0, progress=False)
    judge.fit(train, labels)
    real = judge.transform(images[0])
    return Data(train, labels, images[0], classes[0], images[1], classes[1], judge, real)


def clothes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fashion-MNIST, padded to 32 x 32, each pixel the mean of four."""
    found = datasets.load("fashion_mnist", progress=False)
    sides = [
        (smaller(torch.from_numpy(side.images)), torch.from_numpy(side.labels).long())
        for side in (found.train, found.held_out)
    ]
    return *sides[0], *sides[1]


def smaller(images: Tensor) -> Tensor:
    """Bytes of 28 x 28 as 16 x 16 in [-1, 1]."""
    padded = F.pad(images[:, None].float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return F.avg_pool2d(padded, 2)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits, each pixel four times, to try the machinery without any file."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 8 - 1).float().reshape(-1, 1, 8, 8)
    images, labels = F.interpolate(images, scale_factor=2), torch.from_numpy(labels)
    return images[500:], labels[500:], images[:500], labels[:500]


def checksums(settings: Settings) -> dict[str, dict[str, str]]:
    if settings.made:
        pixels = load_digits().data.astype(np.uint8).tobytes()
        return {"digits": {"images": hashlib.sha256(pixels).hexdigest()}}
    return {"fashion_mnist": datasets.load("fashion_mnist", progress=False).sha256}


def percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()


def _by_step(marks: tuple[int, ...], unit: str) -> dict[str, str]:
    return {f"{mark} steps": unit for mark in marks}


def _named(group: str, row: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}-{row}.{column}": value for column, value in columns.items()}


EXPERIMENT = harness.Experiment(
    "gan_architectures",
    Settings(),
    QUICK,
    work,
    checksums,
    units,
    PUBLISHED,
    texts=(*(f"sheets of {arm}" for arm in GENERATORS), "sheets of mixing", f"sheets of {REAL}"),
    tuning=TUNING,
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
