"""Is it worth training on a smoothed F1, or a smoothed accuracy? Beside a tuned threshold, told so.

Article 6620 advises to train with cross-entropy first and to fine-tune with the soft metric, and
reports no experiment. Here are four sets with a rare class: three tables of KEEL, and the shirts of
Fashion-MNIST. Every arm is a small network that gets two halves of as many epochs, each with a new
Adam, from the same start and in the same order of batches; only the loss differs. "CE" is the
control: cross-entropy in both. F1 is measured at 1/2 and at the threshold that is best on the
validation part, 20 % of the training part, used for nothing else. Accuracy is that of
scikit-learn's digits: with clean labels, and with 40 % of them drawn anew.

Hidden units, epochs and batches were fixed before the first run. The rate of a set, one for all
arms, is the one with the highest F1 on the validation part, a mean over three arms in small batches
(`TUNED`) and over seeds that are not reported (`--tuning`). Nothing of the digits was searched. The
running sums forget with 0.99 a step, as on the chapter's page.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from cln_tutorial import datasets
from cln_tutorial.smoothing.metrics import SoftFBetaLoss, soft_accuracy, soft_f1_loss
from cln_tutorial.smoothing.threshold import best_fbeta_threshold
from experiments import harness

TABLES = {"page blocks": "page-blocks0", "yeast": "yeast1", "red wine": "winequality-red-4"}
SHIRTS, SHIRT = "shirts", 6
SMALL, LARGE, EQUAL = "small batch", "large batch", "large batch, as many steps"
CONTROL, HALF = "CE", "half the epochs"
SHIFTED = "CE, shifted, then soft F1, large batch"
# What to minimise in the two halves, and in which batches.
ARMS: dict[str, tuple[str, str, str]] = {
    f"CE, {HALF}": ("CE", "", SMALL),
    CONTROL: ("CE", "CE", SMALL),
    f"weighted CE, {HALF}": ("weighted CE", "", SMALL),
    "weighted CE": ("weighted CE", "weighted CE", SMALL),
    **{f"soft F1, {size}": ("soft F1", "soft F1", size) for size in (SMALL, LARGE, EQUAL)},
    "running sums": ("running sums", "running sums", SMALL),
    **{f"CE then soft F1, {size}": ("CE", "soft F1", size) for size in (SMALL, LARGE, EQUAL)},
    "CE then running sums": ("CE", "running sums", SMALL),
    SHIFTED: ("CE", "soft F1", LARGE),
}
LOSSES = "CE", "soft accuracy"
CLEAN = (*(f"{loss}, short" for loss in LOSSES), *LOSSES, "CE then soft accuracy")
TUNED = CONTROL, f"soft F1, {SMALL}", f"CE then soft F1, {SMALL}"
EARLY = "CE, early stopped"
NOISY = (f"CE, {HALF}", EARLY, *LOSSES, "CE then soft accuracy")
OPTIMISERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}


@dataclass(frozen=True)
class Recipe:
    """What all arms of a set share."""

    rate: float
    hidden: int
    half: int  # of the epochs
    small: int  # rows of a batch
    large: int


RECIPES = {
    "page blocks": Recipe(3e-3, 32, 30, 16, 256),
    "yeast": Recipe(3e-4, 32, 30, 16, 256),
    "red wine": Recipe(3e-4, 32, 30, 16, 256),
    SHIRTS: Recipe(3e-4, 64, 10, 32, 1024),
}


@dataclass(frozen=True)
class Digits:
    """What all arms of the digits share."""

    rates: dict[str, float] = field(default_factory=lambda: {"SGD": 0.1, "Adam": 1e-3})
    hidden: int = 64
    short: int = 20  # epochs
    half: int = 30
    batch: int = 32
    held_out: int = 600
    noise: float = 0.4  # share of the labels that are drawn anew
    shown: tuple[int, ...] = (1, 2, 5, 10, 20, 30, 40, 50, 60)  # epochs


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = tuple(range(10))
    variants: tuple[str, ...] = (*TABLES, SHIRTS, "digits")
    made: bool = False  # data that need no files
    recipes: dict[str, Recipe] = field(default_factory=lambda: RECIPES)
    images: int = 12_000  # to learn from
    held_out: float = 0.3  # share of the rows of a table
    validation: float = 0.2  # share of the training part
    momentum: float = 0.99  # of the running sums
    digits: Digits = field(default_factory=Digits)


QUICK = Settings(
    seeds=(0, 1, 2),
    made=True,
    recipes=dict.fromkeys(RECIPES, Recipe(1e-2, 4, 1, 16, 64)),
    digits=Digits(hidden=8, short=1, half=1, shown=(1, 2)),
)
RATES = "1e-4", "3e-4", "1e-3", "3e-3", "1e-2"
TUNING = Settings(
    seeds=(100, 101, 102),
    variants=tuple(f"{name}, rate {rate}" for name in RECIPES for rate in RATES),
)

_UNITS = {
    "F1 at 1/2": "100 x F1 of the held-out rows at the threshold 1/2",
    "F1 tuned": "100 x F1 of the held-out rows at the threshold of the validation part",
    "training F1": "100 x F1 of the rows it learnt from at the threshold 1/2",
    "threshold": "best on the validation part, as a probability",
    "slope": "mean p(1 - p) of the positives it learnt from",
    "gain at 1/2": "100 x F1 at 1/2 above that of CE, tuned, of the same seed",
    "gain tuned": "100 x F1, tuned, above that of CE, tuned, of the same seed",
}
_DIGITS = {
    "accuracy": "% of the held-out digits that are right",
    "dead classes": "classes of which less than 5 % of the held-out digits are found",
}


def units(settings: Settings) -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    found: dict[str, str] = {}
    for name in settings.variants:
        if ", rate " in name:
            found[f"tuning-{name}.F1"] = "100 x the best on the validation part, mean of arms"
        elif name == "digits":
            found |= _digits_units(settings.digits)
        else:
            for row in ARMS:
                found |= _named(name, row, _UNITS)
    return found


def _digits_units(settings: Digits) -> dict[str, str]:
    found: dict[str, str] = {}
    gain = "points of accuracy above {} of the same seed"
    for row in NOISY:
        found |= _named("noisy digits", row, _DIGITS | {"gain": gain.format(EARLY)})
    epochs = {f"epoch {k}": _DIGITS["dead classes"] for k in settings.shown}
    for name in OPTIMISERS:
        for row in CLEAN:
            found |= _named(f"digits by {name}", row, _DIGITS | {"gain": gain.format(CONTROL)})
        for loss in LOSSES:
            found |= _named("dead classes", f"{loss} by {name}", epochs)
    return found


PUBLISHED = [
    {
        "figure": f"{name}-CE then soft F1, small batch.F1 tuned",
        "value": None,
        "source": "article 6620",
        "comparable": False,
        "why": "the article advises this order and reports no experiment",
    }
    for name in RECIPES
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one job. It takes a minute at most, so that one that is killed begins anew."""
    if job.variant == "digits":
        return of_digits(job)
    name, _, rate = job.variant.partition(", rate ")
    recipe = job.settings.recipes[name]
    if rate:
        recipe = replace(recipe, rate=float(rate))
    sides = split(name, job.settings, job.seed, job.device)
    rows = TUNED if rate else ARMS
    models = dict(arms(rows, sides, recipe, job.settings.momentum, job.seed))
    if rate:
        best = [best_threshold(model, *sides["validation"])[1] for model in models.values()]
        return {f"tuning-{job.variant}.F1": 100 * sum(best) / len(best)}
    found = {row: measured(model, sides) for row, model in models.items()}
    ruler, figures = found[CONTROL]["F1 tuned"], {}
    for row, columns in found.items():
        gains = {f"gain {how}": columns[f"F1 {how}"] - ruler for how in ("at 1/2", "tuned")}
        figures |= _named(name, row, columns | gains)
    return figures


# --- F1 -------------------------------------------------------------------------------------------

Sides = dict[str, tuple[Tensor, Tensor]]


def arms(
    rows: Iterable[str], sides: Sides, recipe: Recipe, momentum: float, seed: int
) -> Iterator[tuple[str, nn.Module]]:
    """Train the arms; those with the same first half share it."""
    inputs, target = sides["fit"]
    weight = (target == 0).sum() / (target == 1).sum()
    losses: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
        "CE": lambda: F.binary_cross_entropy_with_logits,
        "weighted CE": lambda: nn.BCEWithLogitsLoss(pos_weight=weight),
        "soft F1": lambda: soft_f1_loss,
        "running sums": lambda: SoftFBetaLoss(momentum=momentum).to(inputs.device),
    }

    def half(model: nn.Module, loss: str, size: str, number: int) -> nn.Module:
        model = copy.deepcopy(model)
        batch = min(recipe.small if size == SMALL else recipe.large, len(target))
        steps = recipe.half * (len(target) // (batch if size != EQUAL else recipe.small))
        order = batches(len(target), batch, seed, number)
        optimiser = torch.optim.Adam(model.parameters(), recipe.rate)
        train(model, losses[loss](), optimiser, sides["fit"], order, steps)
        return model

    torch.manual_seed(seed)
    start = network(inputs.shape[1], recipe.hidden, 1).append(nn.Flatten(0)).to(inputs.device)
    begun: dict[tuple[str, str], nn.Module] = {}
    for row in rows:
        first, second, size = ARMS[row]
        key = first, SMALL if first == "CE" else size
        if key not in begun:
            begun[key] = half(start, *key, 0)
        model = begun[key]
        if row == SHIFTED:
            model = shifted(model, inputs, target)
        yield row, half(model, second, size, 1) if second else model


def network(columns: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(columns, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def shifted(model: nn.Sequential, inputs: Tensor, target: Tensor) -> nn.Sequential:
    """The same scores, moved so that the best threshold of the training rows is 1/2."""
    model = copy.deepcopy(model)
    threshold, _ = best_threshold(model, inputs, target)
    with torch.no_grad():
        model[2].bias -= threshold
    return model


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimiser: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    order: Iterator[Tensor],
    steps: int,
) -> None:
    inputs, target = data
    for _ in range(steps):
        rows = next(order)
        value = loss(model(inputs[rows]), target[rows])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()


def batches(count: int, batch: int, *seed: int) -> Iterator[Tensor]:
    """Rows of whole batches, every epoch in a new order."""
    generator = np.random.default_rng(seed)
    while True:
        order = torch.from_numpy(generator.permutation(count))
        yield from order[: count // batch * batch].split(batch)


@torch.no_grad()
def measured(model: nn.Module, sides: Sides) -> dict[str, float]:
    """The columns of one row but its gains."""
    threshold, _ = best_threshold(model, *sides["validation"])
    inputs, target = sides["fit"]
    held_out = model(sides["held out"][0]).double()
    p = model(inputs[target == 1]).double().sigmoid()
    return {
        "F1 at 1/2": f1(held_out >= 0, sides["held out"][1]),
        "F1 tuned": f1(held_out >= threshold, sides["held out"][1]),
        "training F1": f1(model(inputs) >= 0, target),
        "threshold": torch.tensor(threshold).sigmoid().item(),
        "slope": (p * (1 - p)).mean().item(),
    }


@torch.no_grad()
def best_threshold(model: nn.Module, inputs: Tensor, target: Tensor) -> tuple[float, float]:
    """The logit from which on a row counts as positive, and the F1 of these rows with it."""
    threshold, value = best_fbeta_threshold(model(inputs).double(), target)
    return float(threshold), float(value)


def f1(found: Tensor, target: Tensor) -> float:
    """In %; 0 if nothing is found."""
    right = (found & (target == 1)).sum().item()
    return 200 * right / (found.sum() + target.sum()).item()


# --- accuracy -------------------------------------------------------------------------------------


def of_digits(job: harness.Job) -> dict[str, Any]:
    settings = job.settings.digits
    clean, noisy = digits(job.settings, job.seed, job.device)
    figures: dict[str, float] = {}
    for name in OPTIMISERS:
        runs = digits_runs(clean, name, settings, job.seed)
        rows = {f"{loss}, short": runs[loss][settings.short - 1] for loss in LOSSES}
        rows |= {row: run[-1] for row, run in runs.items()}
        figures |= compared(f"digits by {name}", rows, CONTROL)
        for loss in LOSSES:
            for k in settings.shown:
                dead = runs[loss][k - 1]["dead classes"]
                figures[f"dead classes-{loss} by {name}.epoch {k}"] = dead
    runs = digits_runs(noisy, "Adam", settings, job.seed)
    rows = {row: run[-1] for row, run in runs.items()}
    rows[f"CE, {HALF}"] = runs["CE"][settings.half - 1]
    rows[EARLY] = max(runs["CE"], key=lambda epoch: epoch["validation"])
    return figures | compared("noisy digits", rows, EARLY)


def digits_runs(
    sides: Sides, optimiser: str, settings: Digits, seed: int
) -> dict[str, list[dict[str, float]]]:
    """What was measured after every epoch of the three runs."""
    inputs, labels = sides["fit"]

    def run(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], half: int):
        model = copy.deepcopy(model)
        steps = OPTIMISERS[optimiser](model.parameters(), settings.rates[optimiser])
        order = batches(len(labels), settings.batch, seed, half)
        found = []
        for _ in range(settings.half):
            train(model, loss, steps, sides["fit"], order, len(labels) // settings.batch)
            found.append(accuracies(model, sides))
        return model, found

    torch.manual_seed(seed)
    start = network(inputs.shape[1], settings.hidden, 10).to(inputs.device)
    halves = {}
    for name, loss in (("CE", F.cross_entropy), ("soft accuracy", missed)):
        middle, first = run(start, loss, 0)
        halves[name] = first + run(middle, loss, 1)[1]
        if name == "CE":
            halves["CE then soft accuracy"] = first + run(middle, missed, 1)[1]
    return halves


def missed(logits: Tensor, labels: Tensor) -> Tensor:
    return 1 - soft_accuracy(logits, labels)


@torch.no_grad()
def accuracies(model: nn.Module, sides: Sides) -> dict[str, float]:
    inputs, labels = sides["held out"]
    right = (model(inputs).argmax(1) == labels).double()
    recall = torch.stack([right[labels == k].mean() for k in range(10)])
    found = {"accuracy": 100 * right.mean().item(), "dead classes": float((recall < 0.05).sum())}
    if "validation" in sides:
        inputs, labels = sides["validation"]
        found["validation"] = (model(inputs).argmax(1) == labels).double().mean().item()
    return found


def compared(group: str, rows: dict[str, dict[str, float]], control: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for row, found in rows.items():
        columns = {name: found[name] for name in _DIGITS}
        columns["gain"] = found["accuracy"] - rows[control]["accuracy"]
        figures |= _named(group, row, columns)
    return figures


# --- the data -------------------------------------------------------------------------------------


def split(name: str, settings: Settings, seed: int, device: str) -> Sides:
    """Rows to fit, to find the threshold, and held out; scaled by the rows to fit."""
    inputs, target = raw(name, settings.made)
    axis: int | None = 0
    if name == SHIRTS and not settings.made:
        axis = None  # one scale for all pixels: some never change among those to fit
        rest = np.random.default_rng([seed, SHIRT]).choice(60_000, settings.images, replace=False)
        held_out = np.arange(60_000, len(target))
    else:
        rest, held_out = _parts(np.arange(len(target)), target, settings.held_out, seed)
    fit, validation = _parts(rest, target, settings.validation, seed)
    centre, scale = inputs[fit].mean(axis), inputs[fit].std(axis)

    def side(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        pair = (inputs[chosen] - centre) / scale, target[chosen]
        return tuple(torch.from_numpy(each).float().to(device) for each in pair)

    return {"fit": side(fit), "validation": side(validation), "held out": side(held_out)}


def _parts(chosen: np.ndarray, target: np.ndarray, share: float, seed: int) -> list[np.ndarray]:
    return train_test_split(chosen, test_size=share, random_state=seed, stratify=target[chosen])


@lru_cache(maxsize=1)
def raw(name: str, made: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and 1 for the rare class; the held-out images of Fashion-MNIST are the last."""
    if made:
        generator = np.random.default_rng(6620)
        inputs = generator.standard_normal((400, 5))
        return inputs, (inputs[:, 0] + generator.standard_normal(400) > 1.5).astype(int)
    if name != SHIRTS:
        table = datasets.load("imbalanced", progress=False).tables[TABLES[name]]
        return table.features, table.labels
    loaded = datasets.load("fashion_mnist", progress=False)
    sides = loaded.train, loaded.held_out
    images = np.concatenate([side.images.reshape(-1, 784) for side in sides])
    return images, (np.concatenate([side.labels for side in sides]) == SHIRT).astype(int)


def digits(settings: Settings, seed: int, device: str) -> tuple[Sides, Sides]:
    """The digits with clean labels; and the same with wrong ones, of which some are validation."""
    pixels, labels = load_digits(return_X_y=True)
    inputs, labels = torch.from_numpy(pixels / 16).float().to(device), torch.from_numpy(labels)
    generator = np.random.default_rng([seed, 1797])
    order = torch.from_numpy(generator.permutation(len(labels)))
    rest, held_out = order[settings.digits.held_out :], order[: settings.digits.held_out]
    redrawn = torch.from_numpy(generator.random(len(labels)) < settings.digits.noise)
    noisy = torch.where(redrawn, torch.from_numpy(generator.integers(10, size=len(labels))), labels)
    known = round(settings.validation * len(rest))

    def sides(labels: Tensor, **chosen: Tensor) -> Sides:
        return {side: (inputs[rows], labels[rows].to(device)) for side, rows in chosen.items()}

    clean = sides(labels, **{"fit": rest, "held out": held_out})
    wrong = sides(noisy, fit=rest[known:], validation=rest[:known])
    return clean, wrong | {"held out": clean["held out"]}


def checksums(settings: Settings) -> dict[str, dict[str, str]]:
    pixels = load_digits().data.astype(np.uint8).tobytes()
    found = {"digits": {"images": hashlib.sha256(pixels).hexdigest()}}
    if settings.made:
        content = raw("", True)[0].tobytes()
        return found | {"made": {"rows": hashlib.sha256(content).hexdigest()}}
    names = "imbalanced", "fashion_mnist"
    return found | {name: datasets.load(name, progress=False).sha256 for name in names}


def _named(group: str, row: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}-{row}.{column}": value for column, value in columns.items()}


EXPERIMENT = harness.Experiment(
    "smoothing", Settings(), QUICK, work, checksums, units, PUBLISHED, tuning=TUNING
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
