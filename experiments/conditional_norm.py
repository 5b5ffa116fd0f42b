"""Eight ways to condition a character language model, on the reviews of article 7124 and others.

The article shows samples and no metric. Here the model is small, trained from scratch on the
article's corpus without its leaks, and measured on texts that it has not seen: nats per character
with the right label and with the swapped one, how often the true label is the likelier one, and
what its samples are like. Beside it stand naive Bayes classifiers and a logistic regression on the
same texts; English reviews; a frozen unconditional model that gets its condition afterwards; and a
made language whose best possible figures are known. One of the eight has no condition.

Nothing was chosen on the held-out texts. `python -m experiments.conditional_norm --tuning` compares
learning rates of the base and, for each way, of what brings the condition, on texts held back from
the training side and with seeds of its own; `RATES` holds the best. Batch, decay and warm-up were
chosen on such texts by hand, for `norms`. The other numbers were not searched.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from cln_tutorial import datasets
from cln_tutorial.conditional_norm import (
    ConditionalLanguageModel,
    condition,
    convert_layer_norms,
    freeze_base,
    made_reviews,
    sample,
)
from experiments import harness

PADDING, UNKNOWN, START, END = SPECIALS = range(4)
WAYS = ("norms", "modulated", "adaln_zero", "last_norm", "last_shift", "input", "prefix")
LONGER = "norms, longer"  # the way of the article, trained four times as long
GROUPS = 10  # of equally many texts, in the reliability diagram


RATES = (  # the best of `--tuning`
    ("base", 3e-3),
    ("norms", 6e-4),
    ("modulated", 6e-4),
    ("adaln_zero", 6e-4),
    ("last_norm", 3e-3),
    ("last_shift", 6e-4),
    ("input", 1e-4),
    ("prefix", 6e-4),
)


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    # What is not a language, a way and a dash is a job of its own.
    variants: tuple[str, ...] = (
        "chinese-none",
        *(f"chinese-{way}" for way in (*WAYS, LONGER)),
        "english-none",
        "english-norms",
        "made reviews",
    )
    chinese: str = "sentiment_zh"
    english: str = "yelp_short"
    fewest_occurrences: int = 5  # of a character in the training texts; a rarer one is UNKNOWN
    length: int = 64  # characters of a text, the end counted as one
    num_layers: int = 2
    dim: int = 128
    num_heads: int = 4
    cond_dim: int = 32
    steps: int = 500
    longer_steps: int = 2000
    english_steps: int = 500
    adaptation_steps: int = 200
    made_steps: int = 2000
    batch: int = 16
    warm_up: int = 80
    rates: tuple[tuple[str, float], ...] = RATES  # of the base, and of the condition of each way
    weight_decay: float = 0.5
    most_held_out: int = 4000
    held_back: int = 0  # texts of the training side that take the place of the held-out side
    samples: int = 200  # of each class
    pairs: int = 8000  # of characters, on which rows of samples are compared
    checkpoint_every: int = 50


QUICK = Settings(
    seeds=(0, 1, 2),
    variants=("chinese-none", "chinese-norms", f"chinese-{LONGER}", "made reviews"),
    chinese="made",
    num_layers=1,
    dim=16,
    num_heads=2,
    cond_dim=4,
    steps=20,
    longer_steps=30,
    adaptation_steps=5,
    made_steps=3,
    batch=8,
    warm_up=2,
    samples=5,
    pairs=30,
    checkpoint_every=5,
)
TUNING = Settings(
    seeds=(100, 101),
    variants=(
        *(f"tuning-base@{rate:g}" for rate in (1e-3, 3e-3, 9e-3)),
        *(f"tuning-{way}@{rate:g}" for way in WAYS for rate in (1e-4, 6e-4, 3e-3)),
    ),
    held_back=1500,
)

_NATS, _PERCENT = "nats per character", "% of texts"
_CLASS_UNITS = {
    "right label": _NATS,
    "swapped label": _NATS,
    "swap gap": _NATS,
    "z of the gap": "mean gap of a text in standard errors over the texts",
    "label likelier": _PERCENT,
    "its error over texts": "standard error of that share over the texts",
    "z against naive Bayes": "difference in standard errors (McNemar)",
}
_VARIETY_UNITS = {
    "distinct-2": "% of the character pairs that are different ones",
    "repeated": "% of the 4-grams of a text that it had before",
}
_OBEY = "% of texts that the logistic regression gives their label, or the one that was asked for"
CLASSIFIERS = ("naive Bayes, characters", "naive Bayes, pairs", "logistic regression")


def units(settings: "Settings") -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    return {name: unit for v in settings.variants for name, unit in _units_of(v).items()}


def _units_of(variant: str) -> dict[str, str]:
    if variant == "made reviews":
        return named(
            variant,
            {
                "above the entropy": "nats per token",
                "obey": "% of samples that parse under their condition",
            },
        )
    language, _, way = variant.partition("-")
    if language == "tuning":
        return {variant.replace("@", "."): _NATS}
    accuracies = {f"classifiers-{name}.{language}": _PERCENT for name in CLASSIFIERS}
    match language, way:
        case "english", "none":
            return named(variant, {"no label": _NATS})
        case "chinese", "none":
            length = {"length": "characters per text, its end counted as one"}
            adapted = {name: _CLASS_UNITS[name] for name in list(_CLASS_UNITS)[:-1]}
            return {
                **named(variant, {"no label": _NATS} | length),
                **named("samples-none", _VARIETY_UNITS),
                **named("samples-held-out texts", _VARIETY_UNITS | {"obey": _OBEY}),
                **named("adapted", {"change before training": _NATS} | adapted),
            }
        case "english", _:
            return named(variant, _CLASS_UNITS) | accuracies
    found = named(variant, _CLASS_UNITS)
    found |= named(f"samples-{way}", _VARIETY_UNITS | {"obey": _OBEY})
    if way == LONGER:
        found |= accuracies
        found |= {f"classifiers-{CLASSIFIERS[-1]}.chinese, leaked texts": _PERCENT}
        for group in range(GROUPS):
            found |= named(f"reliability-{group + 1:02}", {"said": "%", "true": "%"})
    return found


TEXTS = (f"chinese-{LONGER}", "made reviews")  # rows of which a few samples stand in the record

PUBLISHED = [
    {
        "figure": figure,
        "value": None,
        "source": "article 7124 reports no metric; this is the first",
        "comparable": False,
        "why": "the article prints samples of a fine-tuned BERT-base, trained on the held-out side "
        "too; this is a small character model from scratch on a split without leaks",
    }
    for figure in (f"chinese-{LONGER}.right label", f"chinese-{LONGER}.label likelier")
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one job, each named after its row and column."""
    if job.variant == "made reviews":
        return made(job)
    language, _, way = job.variant.partition("-")
    if language == "tuning":
        return tuned(job)
    if way == "none":
        return unconditional(job, language)
    return conditional(job, language, way)


def conditional(job: harness.Job, language: str, way: str) -> dict[str, Any]:
    """Train with the label, then measure likelihoods, classification and samples."""
    data, others = corpus(job.settings, language), classifiers(job.settings, language)
    model = start(job, data, "norms" if way == LONGER else way)
    train(job, model, data, model.nll)
    losses, labels = likelihoods(model.nll, data.held_out, job.device), data.held_out.truth
    figures = measures(losses, labels, data.held_out.size)
    right = losses.argmin(1) == labels
    figures["z against naive Bayes"] = mcnemar(right, others.right["naive Bayes, pairs"])
    figures = named(job.variant, figures)
    if language == "english":
        return figures | others.accuracies(language)
    written = write(job, model, data, labels=(0, 1))
    asked = np.repeat([0, 1], job.settings.samples)
    figures |= named(
        f"samples-{way}", variety(written, job.settings.pairs) | others.obey(written, asked)
    )
    if way == LONGER:
        figures |= others.accuracies(language)
        figures |= reliability(softmax(-losses, axis=1), labels)
        figures[job.variant] = written[:5] + written[-5:]
    return figures


def unconditional(job: harness.Job, language: str) -> dict[str, float]:
    """Train without labels; then give the frozen model a condition, and train that alone."""
    data, settings = corpus(job.settings, language), job.settings
    model = start(job, data, None)
    train(job, model, data, no_label(model))
    losses = likelihoods(no_label(model), data.held_out, job.device)
    figures = named(job.variant, {"no label": losses[:, 0].sum() / data.held_out.size})
    if language == "english":
        return figures
    figures |= named(
        "samples-none", variety(write(job, model, data, labels=(None, None)), settings.pairs)
    )
    # What is normal: as many texts of people, drawn alike, as the model sees them.
    chosen = np.random.default_rng(0).permutation(len(data.held_out.labels))
    chosen = chosen[: 2 * settings.samples]
    real, truth = data.decode(data.held_out.tokens[chosen]), data.held_out.labels[chosen].numpy()
    figures[f"{job.variant}.length"] = data.held_out.size / len(losses)
    others = classifiers(settings, language)
    figures |= named(
        "samples-held-out texts", variety(real, settings.pairs) | others.obey(real, truth)
    )
    return figures | named("adapted", adapted(job, model, data, losses))


def no_label(model: ConditionalLanguageModel) -> Callable[[Tensor, Tensor], Tensor]:
    """The likelihood of a model that is not told the label."""
    return lambda tokens, label: model.nll(tokens)


def tuned(job: harness.Job) -> dict[str, float]:
    """Nats per character at one learning rate of base or condition, on the texts held back."""
    row, _, rate = job.variant.partition("@")
    way = row.removeprefix("tuning-")
    rates = tuple((dict(job.settings.rates) | {way: float(rate)}).items())
    job = replace(job, settings=replace(job.settings, rates=rates))
    data = corpus(job.settings, "chinese")
    model = start(job, data, None if way == "base" else way)
    nll = no_label(model) if way == "base" else model.nll
    train(job, model, data, nll)
    losses, held_back = likelihoods(nll, data.held_out, job.device), data.held_out
    return {f"{row}.{rate}": measures(losses, held_back.truth, held_back.size)["right label"]}


def adapted(
    job: harness.Job, model: ConditionalLanguageModel, data: "Data", before: np.ndarray
) -> dict[str, float]:
    """Freeze the base, and train the projections of a one-hot label alone."""
    freeze_base(convert_layer_norms(model, cond_dim=2))
    one_hot, held_out = torch.eye(2, device=job.device), data.held_out

    def nll(tokens: Tensor, labels: Tensor) -> Tensor:
        with condition(model, one_hot[labels]):
            return model.nll(tokens)

    change = likelihoods(nll, held_out, job.device) - before
    fit(
        replace(job, part="adaptation"),
        model,
        data.train,
        nll,
        job.settings.adaptation_steps,
        lr=(0.0, 1e-2),
    )
    figures = measures(likelihoods(nll, held_out, job.device), held_out.truth, held_out.size)
    return {"change before training": float(np.abs(change).sum(0).max()) / held_out.size} | figures


def made(job: harness.Job) -> dict[str, Any]:
    """A model of the made reviews, beside their entropy and their parser."""
    settings, grammar = job.settings, made_reviews()
    torch.manual_seed(job.seed)
    model = ConditionalLanguageModel(
        len(grammar.vocabulary),
        num_classes=len(grammar.labels),
        dim=64,
        num_layers=settings.num_layers,
        num_heads=2,
        cond_dim=16,
        max_length=32,
        cond_dropout=0.1,  # as on the page; without it some starts never learn "and" and "not"
    ).to(job.device)

    def loss(generator: torch.Generator) -> Tensor:
        label = torch.randint(len(grammar.labels), (32,), generator=generator)
        tokens = grammar.sample(label, generator)
        nll = model.nll(tokens.to(job.device), label.to(job.device))
        return nll.sum() / (tokens[:, 1:] != 0).sum()

    optimise(job, model, loss, settings.made_steps, lr=(1e-2, 1e-2), betas=(0.9, 0.98))
    rng = torch.Generator().manual_seed(1000 + job.seed)
    label = torch.arange(len(grammar.labels)).repeat_interleave(5 * settings.samples)
    tokens = grammar.sample(label, rng)
    with torch.no_grad():
        nll = torch.cat(
            [
                model.eval().nll(x.to(job.device), y.to(job.device)).double().cpu()
                for x, y in zip(tokens.split(500), label.split(500), strict=True)
            ]
        )
    # Text by text beside the truth, so that the chance of the texts cancels.
    above = (nll + grammar.log_prob(tokens, label)).mean() / grammar.mean_length().mean()
    generator = torch.Generator(job.device).manual_seed(job.seed)
    written = sample(
        model,
        label.to(job.device),
        len(label),
        prompt=torch.tensor([1], device=job.device),
        end=2,
        generator=generator,
    ).cpu()
    obeys = grammar.parse(written).gather(1, label[:, None])
    return {
        f"{job.variant}.above the entropy": float(above),
        f"{job.variant}.obey": 100 * float(obeys.double().mean()),
        job.variant: grammar.decode(written[:: 5 * settings.samples]),
    }


def start(job: harness.Job, data: "Data", way: str | None) -> ConditionalLanguageModel:
    """The model before training; the ways of a seed have the same weights in common."""
    torch.manual_seed(job.seed)
    settings = job.settings
    return ConditionalLanguageModel(
        data.vocabulary_size,
        num_classes=None if way is None else 2,
        conditioning=way,
        dim=settings.dim,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        cond_dim=settings.cond_dim,
        max_length=settings.length + 1,
        padding=PADDING,
    ).to(job.device)


def train(
    job: harness.Job,
    model: ConditionalLanguageModel,
    data: "Data",
    nll: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Train a character model for as long, and at the rates, that the settings say."""
    settings, rates = job.settings, dict(job.settings.rates)
    language, _, way = job.variant.partition("-")
    steps = settings.english_steps if language == "english" else settings.steps
    if way == LONGER:
        steps = settings.longer_steps
    lr = rates["base"], rates.get(model.conditioning, 0.0)
    fit(job, model, data.train, nll, steps, lr=lr, weight_decay=settings.weight_decay)


def fit(
    job: harness.Job,
    model: nn.Module,
    texts: "Corpus",
    nll: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    **how: Any,
) -> None:
    """Train in place on batches of texts."""

    def loss(generator: torch.Generator) -> Tensor:
        tokens, labels = texts.draw(job.settings.batch, job.device, generator)
        return nll(tokens, labels).sum() / (tokens[:, 1:] != PADDING).sum()

    optimise(job, model, loss, steps, **how)


def optimise(
    job: harness.Job,
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    steps: int,
    *,
    lr: tuple[float, float],
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """AdamW with warm-up, a cosine to zero, and gradients of norm one at most.

    Those of the condition are cut apart from the others: they may be several times as large, and
    would else change how the base is trained.
    """
    optimiser = torch.optim.AdamW(groups(model, weight_decay, lr), betas=betas)
    rates = [group["lr"] for group in optimiser.param_groups]
    *base, new = [group["params"] for group in optimiser.param_groups]
    generator = torch.Generator().manual_seed(job.seed)
    checkpoint = harness.Checkpoint(job, model, optimiser, generator, job.settings.checkpoint_every)
    model.train()
    for step in checkpoint.steps(steps):
        value = loss(generator)
        rise = min(1.0, (step + 1) / job.settings.warm_up)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * rise * cosine(step / steps)
        optimiser.zero_grad()
        value.backward()
        clip_grad_norm_([parameter for group in base for parameter in group], 1.0)
        clip_grad_norm_(new, 1.0)
        optimiser.step()
        running = checkpoint.figures.get("loss", value.item())
        checkpoint.figures["loss"] = 0.98 * running + 0.02 * value.item()
    model.eval()


def groups(model: nn.Module, weight_decay: float, lr: tuple[float, float]) -> list[dict[str, Any]]:
    """What the optimiser changes: matrices of the base, its vectors, and those of the condition.

    Only the first decay: decay pulls the condition to no condition. The base has the first learning
    rate, the condition the second.
    """
    of_the_condition = ("cond_proj", "cond_in", "class_embedding", "modulation")
    matrices, vectors, new = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 1:  # also the biases of adaLN-Zero, in place of the norms' parameters
            vectors.append(parameter)
        else:
            (new if any(each in name for each in of_the_condition) else matrices).append(parameter)
    return [
        {"params": matrices, "lr": lr[0], "weight_decay": weight_decay},
        {"params": vectors, "lr": lr[0], "weight_decay": 0.0},
        {"params": new, "lr": lr[1], "weight_decay": 0.0},
    ]


def cosine(progress: float) -> float:
    """From 1 to 0 while the progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def likelihoods(
    nll: Callable[[Tensor, Tensor], Tensor], texts: "Corpus", device: str
) -> np.ndarray:
    """Nats of each text under each of two labels, in the order of `batches`."""
    found = []
    for tokens, labels in texts.batches(device):
        columns = [nll(tokens, torch.full_like(labels, label)) for label in (0, 1)]
        found.append(torch.stack(columns, dim=1).double().cpu())
    return torch.cat(found).numpy()


def measures(losses: np.ndarray, labels: np.ndarray, size: int) -> dict[str, float]:
    """What the wrong label costs; `size` is the number of characters of all texts."""
    rows = np.arange(len(labels))
    right, swapped = losses[rows, labels], losses[rows, 1 - labels]
    gap, root = swapped - right, math.sqrt(len(labels))
    likelier = 100.0 * (gap > 0)
    return {
        "right label": float(right.sum()) / size,
        "swapped label": float(swapped.sum()) / size,
        "swap gap": float(gap.sum()) / size,
        "z of the gap": float(gap.mean() / gap.std(ddof=1)) * root if gap.any() else 0.0,
        "label likelier": float(likelier.mean()),
        "its error over texts": float(likelier.std(ddof=1)) / root,
    }


def write(
    job: harness.Job,
    model: ConditionalLanguageModel,
    data: "Data",
    labels: Sequence[int | None],
) -> list[str]:
    """Sample texts under each label, at temperature 1 without truncation."""
    texts = []
    for number, label in enumerate(labels):
        tokens = sample(
            model,
            label,
            job.settings.samples,
            prompt=torch.tensor([START], device=job.device),
            end=END,
            generator=torch.Generator(job.device).manual_seed(10 * job.seed + number),
        )
        texts += data.decode(tokens)
    return texts


def variety(texts: Sequence[str], most: int) -> dict[str, float]:
    """How many character pairs are different ones, and how much of a text repeats itself.

    The share of different ones falls with the number of pairs, so all rows are compared on `most`
    pairs, drawn at random.
    """
    pairs = [text[i : i + 2] for text in texts for i in range(len(text) - 1)]
    if len(pairs) < most:
        raise ValueError(f"{len(pairs)} character pairs, fewer than the {most} of the settings")
    drawn = np.random.default_rng(0).permutation(len(pairs))[:most]
    again, grams = 0, 0
    for text in texts:
        seen = [text[i : i + 4] for i in range(len(text) - 3)]
        again += len(seen) - len(set(seen))
        grams += len(seen)
    return {
        "distinct-2": 100 * len({pairs[i] for i in drawn}) / most,
        "repeated": 100 * again / max(1, grams),
    }


def mcnemar(right: np.ndarray, other: np.ndarray) -> float:
    """Difference of two classifiers on the same texts, in standard errors if there were none.

    McNemar 1947: only texts that one alone gets right count, and each is then a fair coin. Positive
    where the first is right more often.
    """
    only, only_other = int(np.sum(right & ~other)), int(np.sum(~right & other))
    return (only - only_other) / math.sqrt(max(1, only + only_other))


def reliability(posterior: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Texts in groups from the least to the most certain: what was said, and what was true."""
    said, right = posterior.max(1), posterior.argmax(1) == labels
    figures = {}
    for number, group in enumerate(np.array_split(said.argsort(kind="stable"), GROUPS)):
        values = {"said": 100 * float(said[group].mean()), "true": 100 * float(right[group].mean())}
        figures |= named(f"reliability-{number + 1:02}", values)
    return figures


def named(row: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{row}.{figure}": value for figure, value in figures.items()}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts as rows of tokens: START, the first characters, END unless they are cut, PADDING."""

    texts: tuple[str, ...]
    tokens: Tensor
    labels: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        return (self.tokens != PADDING).sum(1)

    @property
    def size(self) -> int:
        """How many tokens a model must predict: all but START and PADDING."""
        return int((self.lengths - 1).sum())

    @cached_property
    def order(self) -> Tensor:
        """The rows by length, so that batches hold little padding."""
        return self.lengths.argsort(stable=True)

    @property
    def truth(self) -> np.ndarray:
        """The labels in the order of `batches`."""
        return self.labels[self.order].numpy()

    @cached_property
    def buckets(self) -> tuple[Tensor, ...]:
        return self.order.tensor_split(max(1, len(self.labels) // 512))

    def batches(self, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows, by length."""
        for rows in self.order.split(64):
            yield self.batch(rows, device)

    def draw(self, size: int, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of one bucket."""
        bucket = self.buckets[int(torch.randint(len(self.buckets), (), generator=generator))]
        return self.batch(bucket[torch.randperm(len(bucket), generator=generator)[:size]], device)

    def batch(self, rows: Tensor, device: str) -> tuple[Tensor, Tensor]:
        longest = int(self.lengths[rows].max())
        return self.tokens[rows, :longest].to(device), self.labels[rows].to(device)


@dataclass(frozen=True, eq=False)
class Data:
    train: Corpus
    held_out: Corpus
    characters: tuple[str, ...]  # by token; those of SPECIALS are empty

    @property
    def vocabulary_size(self) -> int:
        return len(self.characters)

    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of the known characters: START, END, UNKNOWN and PADDING are left out."""
        return ["".join(self.characters[token] for token in row) for row in tokens.tolist()]


@lru_cache(maxsize=2)
def corpus(settings: Settings, language: str) -> Data:
    """The training side, the held-out side, and the characters."""
    train, held_out, *_ = splits(settings, language)
    counts = Counter(character for text in train.texts for character in text)
    kept = sorted(c for c, count in counts.items() if count >= settings.fewest_occurrences)
    number = {character: len(SPECIALS) + i for i, character in enumerate(kept)}

    def encode(split: datasets.Split) -> Corpus:
        rows = [
            [START, *(number.get(c, UNKNOWN) for c in text[: settings.length]), END]
            for text in split.texts
        ]
        tokens = [torch.tensor(row[: settings.length + 1]) for row in rows]
        tokens = pad_sequence(tokens, batch_first=True, padding_value=PADDING)
        return Corpus(split.texts, tokens, torch.from_numpy(split.labels))

    return Data(encode(train), encode(held_out), ("",) * len(SPECIALS) + tuple(kept))


@dataclass(frozen=True, eq=False)
class Classifiers:
    """What well-known classifiers make of the held-out texts, in the order of `batches`."""

    right: dict[str, np.ndarray]
    regression: Pipeline
    leaked: float | None  # % right of the texts that stand on both sides of the files

    def accuracies(self, language: str) -> dict[str, float]:
        found = {f"{name}.{language}": 100 * float(r.mean()) for name, r in self.right.items()}
        if self.leaked is not None:
            found[f"{CLASSIFIERS[-1]}.{language}, leaked texts"] = self.leaked
        return {f"classifiers-{name}": value for name, value in found.items()}

    def obey(self, texts: Sequence[str], labels: np.ndarray) -> dict[str, float]:
        return {"obey": 100 * float(np.mean(self.regression.predict(texts) == labels))}


@lru_cache(maxsize=2)
def classifiers(settings: Settings, language: str) -> Classifiers:
    """Naive Bayes on what the model sees, a regression on whole texts; labels equally likely."""
    data, (train, _, leaked, _) = corpus(settings, language), splits(settings, language)
    texts = [data.held_out.texts[i] for i in data.held_out.order.tolist()]
    seen, seen_too = ([text[: settings.length] for text in side] for side in (train.texts, texts))
    right = {}
    for name, n in zip(CLASSIFIERS[:2], (1, 2), strict=True):
        grams = CountVectorizer(analyzer="char", ngram_range=(n, n))
        bayes = make_pipeline(grams, MultinomialNB(fit_prior=False)).fit(seen, train.labels)
        right[name] = bayes.predict(seen_too) == data.held_out.truth
    grams = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2)
    balanced = LogisticRegression(C=10, max_iter=1000, class_weight="balanced")
    regression = make_pipeline(grams, balanced)
    regression.fit(train.texts, train.labels)
    right[CLASSIFIERS[-1]] = regression.predict(texts) == data.held_out.truth
    known = None
    if language == "chinese":
        known = 100 * float(np.mean(regression.predict(leaked.texts) == leaked.labels))
    return Classifiers(right, regression, known)


def splits(
    settings: Settings, language: str
) -> tuple[datasets.Split, datasets.Split, datasets.Split, dict[str, str]]:
    """The two sides of the data, the texts that stand on both in the files, and the checksums."""
    name = getattr(settings, language)
    if name == "made":
        texts = made_texts()
        sha256 = {"texts": hashlib.sha256(" ".join(texts).encode()).hexdigest()}
        made = datasets.Split(texts, np.arange(len(texts), dtype=np.int64) % 2)
        parts = some(made, range(300)), some(made, range(300, 400)), some(made, range(50))
        return *parts, sha256
    data = datasets.load(name, progress=False)
    train, held_out = data.train, data.held_out
    if len(held_out.texts) > settings.most_held_out:
        chosen = np.random.default_rng(0).permutation(len(held_out.texts))
        held_out = some(held_out, chosen[: settings.most_held_out])
    if settings.held_back:
        chosen = np.random.default_rng(0).permutation(len(train.texts))
        held_out = some(train, chosen[: settings.held_back])
        train = some(train, chosen[settings.held_back :])
    return train, held_out, data.leaked, data.sha256


def some(split: datasets.Split, rows: Sequence[int]) -> datasets.Split:
    """The rows of one side that were asked for."""
    return datasets.Split(tuple(split.texts[i] for i in rows), split.labels[list(rows)])


def made_texts() -> tuple[str, ...]:
    """Texts whose letters say their class, to try the machinery without any data."""
    rng = random.Random(7124)
    letters = "abcdefghij", "fghijklmno"
    return tuple("".join(rng.choices(letters[i % 2], k=rng.randint(5, 20))) for i in range(400))


def checksums(settings: Settings) -> dict[str, dict]:
    languages = [v.partition("-")[0] for v in settings.variants if "-" in v]
    languages = dict.fromkeys("chinese" if each == "tuning" else each for each in languages)
    return {getattr(settings, each): splits(settings, each)[-1] for each in languages}


EXPERIMENT = harness.Experiment(
    name="conditional_norm",
    settings=Settings(),
    quick=QUICK,
    tuning=TUNING,
    work=work,
    checksums=checksums,
    units=units,
    texts=TEXTS,
    published=PUBLISHED,
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
