"""What averaging the weights is worth on Fashion-MNIST, at a constant rate and at one that decays.

Article 6575 recommends the average and shows no figure; article 6583 shows one curve. Here a small
convolutional network is trained with Adam as the article does, at a constant rate of 1e-3, and
several averages follow the same run. Beside it stand the same run with a cosine decay of the rate
to zero, a network with batch norm whose statistics are those of the raw model, averaged, or
computed anew, and scikit-learn's digits as a small variant.

Nothing was chosen on the held-out images, and nothing was searched: rate, batch and network were
fixed before the first run, and the decays are those that articles, papers and libraries name.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from cln_tutorial import datasets
from cln_tutorial.weight_averaging import (
    ConstantDecay,
    ExponentialMovingAverage,
    PowerFunction,
    Uniform,
    recompute_batchnorm_,
)
from experiments import harness

# The horizon of a constant decay is 1 / (1 - decay) steps. The names may have no dot.
DECAYS = {"100 steps": 0.99, "1,000 steps": 0.999, "2,000 steps": 0.9995, "10,000 steps": 0.9999}
CORRECTED = ("10,000 steps, corrected", "power, 10 %", "power, 5 %", "last quarter")
ROWS = ("raw", *DECAYS, *CORRECTED)
DIGITS_DECAYS = {"10 steps": 0.9, "100 steps": 0.99, "1,000 steps": 0.999}
DIGITS_CORRECTED = ("1,000 steps, corrected", *CORRECTED[1:])
DIGITS_ROWS = ("raw", *DIGITS_DECAYS, *DIGITS_CORRECTED)
STATISTICS = ("raw model", "raw statistics", "averaged statistics", "recomputed statistics")


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = (
        "constant rate",
        "cosine decay",
        "batch norm",
        "digits, constant rate",
        "digits, cosine decay",
        "digits, batch norm",
    )
    images: str = "fashion_mnist"
    epochs: int = 8
    batch: int = 64
    rate: float = 1e-3
    batchnorm_epochs: int = 3
    batchnorm_decay: float = 0.999
    digits_epochs: int = 20
    digits_batch: int = 32
    digits_rate: float = 3e-3
    digits_batchnorm_rate: float = 1e-2
    digits_batchnorm_epochs: int = 12
    digits_batchnorm_decay: float = 0.99
    digits_held_out: float = 0.4  # share of the images
    checkpoint_every: int = 200


QUICK = Settings(
    seeds=(0, 1, 2),
    images="made",
    epochs=2,
    batchnorm_epochs=1,
    digits_epochs=1,
    digits_batchnorm_epochs=1,
    checkpoint_every=5,
)

_ACCURACY = "% of the held-out images that are right"
_NLL = "nats per image"
_UNITS = {
    "accuracy": _ACCURACY,
    "NLL": _NLL,
    "gain": "points of accuracy over the raw weights of the same run",
    "NLL gain": "nats per image below the raw weights of the same run",
}


def units(settings: Settings) -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    found: dict[str, str] = {}
    for variant in settings.variants:
        for row in _rows(variant):
            columns = dict(_UNITS)
            if row in ("raw", "raw model"):
                columns = {name: _UNITS[name] for name in ("accuracy", "NLL")}
            found |= _named(variant, row, columns)
        if variant == "constant rate":
            epochs = {f"epoch {n}": _ACCURACY for n in range(1, settings.epochs + 1)}
            for row in ROWS:
                found |= _named("accuracy by epoch", row, epochs)
    return found


PUBLISHED = [
    {
        "figure": f"constant rate-{row}.accuracy",
        "value": value,
        "source": "article 6583, one curve",
        "comparable": False,
        "why": "ResNet-20 on CIFAR-10, Adam at a constant rate of 1e-3, decay 0.9999; read from "
        "the text, which gives no table, and no second run",
    }
    for row, value in {"raw": 86, "10,000 steps": 90}.items()
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one job, each named after its row and column."""
    digits = job.variant.startswith("digits")
    if job.variant.endswith("batch norm"):
        return batchnorm(job, digits)
    settings = job.settings
    data = digits_data(settings, job.seed) if digits else images(settings)
    epochs = settings.digits_epochs if digits else settings.epochs
    batch = settings.digits_batch if digits else settings.batch
    steps = epochs * (len(data.train[0]) // batch)
    torch.manual_seed(job.seed)
    model = (digits_network() if digits else network()).to(job.device)
    decays, corrected = (DIGITS_DECAYS, DIGITS_CORRECTED) if digits else (DECAYS, CORRECTED)
    slowest = ConstantDecay(max(decays.values()))
    profiles = (slowest, PowerFunction(0.10), PowerFunction(0.05), Uniform.tail(0.25, steps))
    averages = [
        ExponentialMovingAverage(model, decays, bias_correction=False),
        ExponentialMovingAverage(model, dict(zip(corrected, profiles, strict=True))),
    ]
    per_epoch = steps // epochs

    def after_step(step: int, figures: dict[str, float]) -> None:
        if job.variant == "constant rate" and step % per_epoch == 0:
            for row, (accuracy, _) in evaluated(model, averages, data).items():
                figures[f"accuracy by epoch-{row}.epoch {step // per_epoch}"] = accuracy

    figures = train(job, model, data, steps, batch, averages, after_step)
    return figures | compared(job.variant, evaluated(model, averages, data), "raw")


def batchnorm(job: harness.Job, digits: bool) -> dict[str, Any]:
    """The averaged weights of a network with batch norm, by the statistics beside them."""
    settings = job.settings
    data = digits_data(settings, job.seed) if digits else images(settings)
    epochs = settings.digits_batchnorm_epochs if digits else settings.batchnorm_epochs
    batch = settings.digits_batch if digits else settings.batch
    decay = settings.digits_batchnorm_decay if digits else settings.batchnorm_decay
    steps = epochs * (len(data.train[0]) // batch)
    torch.manual_seed(job.seed)
    model = (digits_network(True) if digits else network(True)).to(job.device)
    averages = [
        ExponentialMovingAverage(model, decay, buffers=each) for each in ("copy", "average")
    ]
    train(job, model, data, steps, batch, averages, lambda step, figures: None)
    found = {"raw model": measured(model, data)}
    for row, average in zip(STATISTICS[1:3], averages, strict=True):
        with average.applied():
            found[row] = measured(model, data)
    with averages[0].applied():
        recompute_batchnorm_(model.eval(), data.train[0].split(1000))
        found[STATISTICS[3]] = measured(model, data)
    return compared(job.variant, found, "raw model")


def train(
    job: harness.Job,
    model: nn.Module,
    data: "Data",
    steps: int,
    batch: int,
    averages: list[ExponentialMovingAverage],
    after_step: Callable[[int, dict[str, float]], None],
) -> dict[str, float]:
    """Train from a checkpoint, if there is one; return the figures that were noted on the way."""
    settings = job.settings
    rate = settings.rate
    if job.variant.startswith("digits"):
        with_norm = job.variant.endswith("batch norm")
        rate = settings.digits_batchnorm_rate if with_norm else settings.digits_rate
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for average in averages:
        average.attach(optimiser)
    generator = torch.Generator().manual_seed(job.seed)
    inputs, labels = data.train
    per_epoch = len(inputs) // batch
    checkpoint = harness.Checkpoint(
        job, model, optimiser, generator, settings.checkpoint_every, averages
    )
    for step in checkpoint.steps(steps):
        # The order of an epoch is a function of seed and epoch: a run can be taken up within one.
        epoch, place = divmod(step, per_epoch)
        order = epoch_order(job.seed, epoch, len(inputs))[place * batch : (place + 1) * batch]
        if job.variant.endswith("cosine decay"):
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        model.train()
        loss = F.cross_entropy(model(inputs[order]), labels[order])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        checkpoint.figures["loss"] = round(loss.item(), 3)
        after_step(step + 1, checkpoint.figures)
    return {name: value for name, value in checkpoint.figures.items() if "." in name}


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The images of one epoch in the order of training."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))


def evaluated(
    model: nn.Module, averages: list[ExponentialMovingAverage], data: "Data"
) -> dict[str, tuple[float, float]]:
    """Accuracy and NLL of the raw weights and of each average."""
    found = {"raw": measured(model, data)}
    for average in averages:
        for name in average.profiles:
            with average.applied(name):
                found[name] = measured(model, data)
    return found


@torch.no_grad()
def measured(model: nn.Module, data: "Data") -> tuple[float, float]:
    """Accuracy in % and nats per image on the held-out side."""
    model.eval()
    inputs, labels = data.held_out
    logits = torch.cat([model(part) for part in inputs.split(500)]).double()
    right = (logits.argmax(1) == labels).double().mean()
    return 100 * right.item(), F.cross_entropy(logits, labels).item()


def compared(group: str, found: dict[str, tuple[float, float]], raw: str) -> dict[str, float]:
    """The figures of a table, with what each row gains over the raw weights."""
    figures: dict[str, float] = {}
    for row, (accuracy, nll) in found.items():
        columns = {"accuracy": accuracy, "NLL": nll}
        if row != raw:
            columns |= {"gain": accuracy - found[raw][0], "NLL gain": found[raw][1] - nll}
        figures |= _named(group, row, columns)
    return figures


def network(batchnorm: bool = False) -> nn.Sequential:
    """105,866 weights for 28 x 28 pixels; a batch norm behind each convolution, if asked for."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        *([nn.BatchNorm2d(16)] if batchnorm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        *([nn.BatchNorm2d(32)] if batchnorm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits_network(batchnorm: bool = False) -> nn.Sequential:
    """The same in small, for 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        *([nn.BatchNorm2d(8)] if batchnorm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


# --- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs (images, 1, height, width) and labels (images,) of both sides."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


@lru_cache(maxsize=1)
def images(settings: Settings) -> Data:
    """Fashion-MNIST, centred and scaled by the training side; or made images."""
    if settings.images == "made":
        return made_images()
    data = datasets.load(settings.images, progress=False)
    mean, sd = data.train.images.mean(), data.train.images.std()
    sides = []
    for side in (data.train, data.held_out):
        inputs = torch.from_numpy((side.images.astype(np.float32) - mean) / sd)
        sides.append((inputs[:, None].float(), torch.from_numpy(side.labels)))
    return Data(*sides)


def digits_data(settings: Settings, seed: int) -> Data:
    """scikit-learn's digits, split anew for each seed."""
    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng([seed, 1797]).permutation(len(inputs))
    inputs = torch.from_numpy(inputs[order] / 8 - 1).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels[order])
    first = round(settings.digits_held_out * len(inputs))
    return Data((inputs[first:], labels[first:]), (inputs[:first], labels[:first]))


def made_images() -> Data:
    """Images whose brightest corner says their class, to try the machinery without any data."""
    generator = torch.Generator().manual_seed(6575)
    labels = torch.arange(800) % 4
    inputs = torch.randn(800, 1, 28, 28, generator=generator)
    for label, (row, column) in enumerate(((0, 0), (0, 14), (14, 0), (14, 14))):
        inputs[labels == label, :, row : row + 14, column : column + 14] += 0.5
    return Data((inputs[:640], labels[:640]), (inputs[640:], labels[640:]))


def checksums(settings: Settings) -> dict[str, dict[str, str]]:
    if settings.images == "made":
        content = made_images().train[0].numpy().tobytes()
        return {"made": {"images": hashlib.sha256(content).hexdigest()}}
    digits = load_digits().data.astype(np.uint8).tobytes()
    return {
        settings.images: datasets.load(settings.images, progress=False).sha256,
        "digits": {"images": hashlib.sha256(digits).hexdigest()},
    }


def _rows(variant: str) -> tuple[str, ...]:
    if variant.endswith("batch norm"):
        return STATISTICS
    return DIGITS_ROWS if variant.startswith("digits") else ROWS


def _named(group: str, row: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}-{row}.{column}": value for column, value in columns.items()}


EXPERIMENT = harness.Experiment(
    name="weight_averaging",
    settings=Settings(),
    quick=QUICK,
    work=work,
    checksums=checksums,
    units=units,
    published=PUBLISHED,
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
