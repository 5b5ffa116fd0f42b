"""Words and documents of 20 Newsgroups on the sphere, told straight: order, factor, peers.

Four tables. *All posts*: clusters and neighbours of documents, by the paper's protocol (vectors of
all posts trained together) and by the honest one (train posts are fitted, test posts embedded
afterwards). *Every fourth post*: the forms of the factor, gensim, twice the epochs. *Order*: the
same posts in class order, shuffled once, and in a new order for each epoch; beside each the same on
a corpus of noise, where whatever a clustering finds is the place in the file. *Words*: similarity.

Nothing was searched. Parameters of ours are the program's; gensim gets the same dimension, window,
subsampling, epochs and number of negatives, a new order in each epoch as ours, and its own learning
rate. That `transform` starts at the mean of the words was decided on the median cosine between
inferred and trained vectors of train posts. Scores of held-out posts are computed at the end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import (
    adjusted_rand_score,
    confusion_matrix,
    f1_score,
    normalized_mutual_info_score,
)
from sklearn.neighbors import KNeighborsClassifier

from cln_tutorial import datasets
from cln_tutorial.spherical_embedding.estimator import SphericalEmbedding
from cln_tutorial.spherical_embedding.geometry import geodesic_distance
from experiments import harness

FACTORS = {"program": "program", "paper": "paper", "no factor": "none"}
GENSIM, TFIDF, MEAN = "Doc2Vec", "tf-idf and SVD", "mean of the program's words"
ORDERS = ("class order", "shuffled once", "new order each epoch")
LONGER, DEFAULT_PEER = "program, twice the epochs", "Doc2Vec, 5 negatives"
QUERIES = ("space", "israel", "hockey", "windows", "motorcycle", "encryption")
NEIGHBOURS = "nearest words"


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = (
        *(f"all posts, {row}" for row in ("program", GENSIM, TFIDF)),
        *(f"every fourth post, {row}" for row in (*FACTORS, LONGER, GENSIM, DEFAULT_PEER)),
        *ORDERS,
    )
    every: int = 1  # post
    dim: int = 100
    min_count: int = 5
    epochs: int = 10
    epochs_of_order: int = 5
    starts: int = 10  # of k-means
    resamples: int = 1000  # of the pairs of words
    noise: tuple[int, int, int] = (2000, 60, 2000)  # documents, words in each, types


QUICK = Settings(
    seeds=(0, 1, 2), every=200, dim=8, min_count=2, epochs=1, epochs_of_order=1, starts=1,
    resamples=20, noise=(60, 20, 30),
)  # fmt: skip

_CLUSTERS = {
    "NMI": "normalised mutual information of k-means and the newsgroups",
    "ARI": "adjusted Rand index of the same",
    "purity": "share of posts in the commonest newsgroup of their cluster",
    "NMI, spherical": "the first, by spherical k-means",
}
_NEIGHBOURS = {
    "trained together": "macro F1 of 3 nearest train posts, the vectors of test posts trained too",
    "embedded later": "macro F1 of 3 nearest train posts, test posts embedded by the fitted model",
}
_CHECKS = {
    "cosine": "median, of train posts embedded by the fitted model and their trained vectors",
    "lowest decile": "of the same",
    "norm": "largest deviation of the length of a vector from 1, over all epochs",
}
_SCORES = {
    f"{q} %": "quantile of the score of a word and a random context" for q in (5, 25, 50, 75, 95)
}
_WORDS = {
    "rank correlation": "Spearman's, with what people say",
    "low": "2.5 % quantile over resampled pairs",
    "high": "97.5 % quantile over resampled pairs",
    "known": "share of pairs whose words are both known",
}
_ORDER = {
    "NMI": "normalised mutual information of k-means and the newsgroups, 5 epochs",
    "NMI of noise": "the same of k-means and the place in the file, without topics, 10 epochs",
}


def units(settings: Settings) -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    found: dict[str, str] = {}

    def table(group: str, rows: Sequence[str], columns: dict[str, str]) -> None:
        for row in rows:
            found.update({f"{group}-{row}.{column}": unit for column, unit in columns.items()})

    table("all posts", ["program", MEAN, GENSIM, TFIDF], _CLUSTERS)
    table("neighbours", ["program", GENSIM], _NEIGHBOURS)
    table("checks", ["program"], _CHECKS)
    table("scores", ["program", "paper"], _SCORES)
    epochs = {f"epoch {k}": "share of open hinges" for k in range(1, settings.epochs + 1)}
    table("open hinges", list(FACTORS), epochs)
    table("words", [f"{s}, {row}" for row in ("program", GENSIM) for s in word_sets()], _WORDS)
    classes = range(20)
    pairs = [f"{a} to {b}" for a in classes for b in classes if a < b]
    table("angles", pairs, {"degrees": "between the means of two newsgroups, factor program"})
    table("every fourth post", [*FACTORS, LONGER, GENSIM, DEFAULT_PEER], _CLUSTERS)
    table("order", ORDERS, _ORDER)
    return found


PUBLISHED = [
    {
        "figure": f"all posts-{row}.NMI",
        "value": value,
        "source": "Meng et al. 2019, clustering of 20 Newsgroups, recalled and not checked",
        "comparable": False,
        "why": "their text is prepared otherwise; by its scripts the program visits posts in the "
        "order of the class for 20 epochs, and k-means has a single start",
    }
    for row, value in {"program": 0.66, GENSIM: 0.63}.items()
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one job. It takes minutes at most, so that one that is killed begins anew."""
    group, _, row = job.variant.partition(", ")
    if job.variant in ORDERS:
        return of_order(job)
    if group == "every fourth post":
        return of_every_fourth(job, row)
    if row == TFIDF:
        texts, labels, _ = posts(job.settings)
        vectors = tfidf(texts, job.settings, job.seed)
        return clusters(f"all posts-{row}", vectors, labels, job)
    return of_peer(job) if row == GENSIM else of_ours(job)


def of_ours(job: harness.Job) -> dict[str, Any]:
    texts, labels, held_out = posts(job.settings)
    model = ours(job).fit(texts)
    vectors = model.doc_vectors_
    figures = clusters("all posts-program", vectors, labels, job)
    figures |= clusters(f"all posts-{MEAN}", means_of_words(model, texts), labels, job)
    figures |= words("program", model.vocabulary_, model.word_vectors_, job)
    figures |= angles(vectors, labels)
    figures["checks-program.norm"] = max(each.norm_error for each in model.history_)
    asked = [word for word in QUERIES if word in model.vocabulary_]
    near = {word: [key for key, _ in model.most_similar(word, topn=6)] for word in asked}
    figures[NEIGHBOURS] = [f"{word}: {', '.join(keys)}" for word, keys in near.items()]
    return figures | neighbours(vectors, labels, held_out, texts, job)


def neighbours(
    vectors: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    texts: Sequence[str],
    job: harness.Job,
) -> dict[str, float]:
    together = nearest(vectors, labels, held_out)
    train = [text for text, out in zip(texts, held_out, strict=True) if not out]
    later = [text for text, out in zip(texts, held_out, strict=True) if out]
    model = ours(job).fit(train)
    again = model.transform(train)
    cosines = (again * model.doc_vectors_).sum(1)
    # Train posts as they are embedded afterwards too: both sides by the same way.
    vectors = np.empty_like(vectors)
    vectors[~held_out], vectors[held_out] = again, model.transform(later)
    return {
        "neighbours-program.trained together": together,
        "neighbours-program.embedded later": nearest(vectors, labels, held_out),
        "checks-program.cosine": float(np.median(cosines)),
        "checks-program.lowest decile": float(np.quantile(cosines, 0.1)),
    }


def scores(row: str, model: SphericalEmbedding, job: harness.Job) -> dict[str, float]:
    """What the rule makes of random pairs: right angles, or opposite sides."""
    generator = np.random.default_rng(job.seed)
    first, second = generator.integers(len(model.counts_), size=(2, 100_000))
    found = (model.word_vectors_[first] * model.context_vectors_[second]).sum(1)
    return {
        f"scores-{row}.{name}": float(np.quantile(found, int(name.split()[0]) / 100))
        for name in _SCORES
    }


def of_peer(job: harness.Job) -> dict[str, Any]:
    texts, labels, held_out = posts(job.settings)
    model, vectors = doc2vec(texts, job)
    figures = clusters(f"all posts-{GENSIM}", vectors, labels, job)
    index = model.wv.key_to_index
    figures |= words(GENSIM, index, model.wv.vectors, job)
    figures[f"neighbours-{GENSIM}.trained together"] = nearest(vectors, labels, held_out)
    train = [text for text, out in zip(texts, held_out, strict=True) if not out]
    honest, _ = doc2vec(train, job)
    honest.random.seed(job.seed)
    # As often as it was trained, its default.
    vectors = unit(np.stack([honest.infer_vector(text.split()) for text in texts]))
    figures[f"neighbours-{GENSIM}.embedded later"] = nearest(vectors, labels, held_out)
    return figures


def of_every_fourth(job: harness.Job, row: str) -> dict[str, Any]:
    texts, labels, _ = fourth(job.settings)
    if row in (GENSIM, DEFAULT_PEER):
        _, vectors = doc2vec(texts, job, negative=2 if row == GENSIM else 5)
        return clusters(f"every fourth post-{row}", vectors, labels, job)
    epochs = job.settings.epochs * (2 if row == LONGER else 1)
    model = ours(job, factor=FACTORS.get(row, "program"), epochs=epochs).fit(texts)
    figures = clusters(f"every fourth post-{row}", model.doc_vectors_, labels, job)
    if row in FACTORS:
        for number, record in enumerate(model.history_, 1):
            figures[f"open hinges-{row}.epoch {number}"] = record.active_share
    if row in ("program", "paper"):
        figures |= scores(row, model, job)
    return figures


def of_order(job: harness.Job) -> dict[str, Any]:
    texts, labels, _ = fourth(job.settings)
    documents, length, types = job.settings.noise
    law = 1 / np.arange(1, types + 1)
    generator = np.random.default_rng([7063, job.seed])
    drawn = generator.choice(types, (documents, length), p=law / law.sum()).astype(str)
    noise = [" ".join(line) for line in drawn]
    place = np.arange(documents) * 20 // documents
    figures = {}
    for column, lines, classes in (("NMI", texts, labels), ("NMI of noise", noise, place)):
        order = np.arange(len(lines))
        if job.variant == "shuffled once":
            order = generator.permutation(len(lines))
            # Of noise the place in the file that is trained on.
            classes = classes if column == "NMI of noise" else classes[order]
        epochs = job.settings.epochs if column == "NMI of noise" else job.settings.epochs_of_order
        model = ours(job, shuffle=job.variant == ORDERS[-1], epochs=epochs)
        vectors = model.fit_transform([lines[k] for k in order])
        found = KMeans(20, n_init=job.settings.starts, random_state=job.seed).fit_predict(vectors)
        figures[f"order-{job.variant}.{column}"] = normalized_mutual_info_score(classes, found)
    return figures


# --- models ---------------------------------------------------------------------------------------


def ours(job: harness.Job, **changed: Any) -> SphericalEmbedding:
    chosen = {"dim": job.settings.dim, "epochs": job.settings.epochs}
    chosen |= {"min_count": job.settings.min_count, "random_state": job.seed}
    return SphericalEmbedding(**chosen | changed)


class Reshuffled:
    """Documents for gensim, which reads them once per epoch, in a new order each time."""

    def __init__(self, texts: Sequence[str], seed: int) -> None:
        from gensim.models.doc2vec import TaggedDocument

        self.documents = [TaggedDocument(text.split(), [k]) for k, text in enumerate(texts)]
        self.generator = np.random.default_rng([7063, seed])

    def __iter__(self) -> Iterator[Any]:
        for k in self.generator.permutation(len(self.documents)):
            yield self.documents[k]


def doc2vec(texts: Sequence[str], job: harness.Job, negative: int = 2) -> tuple[Any, np.ndarray]:
    """Return gensim's model, and the vectors of the texts at length 1."""
    from gensim.models.doc2vec import Doc2Vec

    model = Doc2Vec(
        Reshuffled(texts, job.seed),
        dm=0, dbow_words=1, vector_size=job.settings.dim, window=10, negative=negative, hs=0,
        sample=1e-3, min_count=job.settings.min_count, epochs=job.settings.epochs, workers=1,
        seed=job.seed + 1,
    )  # fmt: skip
    return model, unit(np.stack([model.dv[k] for k in range(len(texts))]))


def tfidf(texts: Sequence[str], settings: Settings, seed: int) -> np.ndarray:
    weights = TfidfVectorizer(min_df=settings.min_count, sublinear_tf=True).fit_transform(texts)
    return unit(TruncatedSVD(settings.dim, random_state=seed).fit_transform(weights))


def means_of_words(model: SphericalEmbedding, texts: Sequence[str]) -> np.ndarray:
    known = model.vocabulary_
    sums = np.zeros((len(texts), model.dim))
    for number, text in enumerate(texts):
        index = [known[word] for word in text.split() if word in known]
        sums[number] = model.word_vectors_[index].sum(0)
    return unit(sums)


# --- scores ---------------------------------------------------------------------------------------


def clusters(prefix: str, vectors: np.ndarray, labels: np.ndarray, job: harness.Job) -> dict:
    starts = job.settings.starts
    found = KMeans(20, n_init=starts, random_state=job.seed).fit_predict(vectors)
    table = confusion_matrix(labels, found)
    spherical = spherical_k_means(vectors, 20, starts, np.random.default_rng(job.seed))
    values = {
        "NMI": normalized_mutual_info_score(labels, found),
        "ARI": adjusted_rand_score(labels, found),
        "purity": table.max(0).sum() / table.sum(),
        "NMI, spherical": normalized_mutual_info_score(labels, spherical),
    }
    return {f"{prefix}.{column}": float(value) for column, value in values.items()}


def spherical_k_means(
    vectors: np.ndarray, k: int, starts: int, generator: np.random.Generator
) -> np.ndarray:
    """Cluster unit rows around unit centres, which maximise the sum of cosines; the best start."""
    best, labels = -np.inf, np.zeros(len(vectors), int)
    for _ in range(starts):
        centres = vectors[generator.choice(len(vectors), k, replace=False)]
        for _ in range(100):
            cosines = vectors @ centres.T
            nearest_centre = cosines.argmax(1)
            member = (np.ones(len(vectors)), (nearest_centre, np.arange(len(vectors))))
            sums = csr_array(member, (k, len(vectors))) @ vectors
            moved = np.where(np.linalg.norm(sums, axis=1, keepdims=True) > 0, unit(sums), centres)
            if np.allclose(moved, centres, atol=1e-6):
                break
            centres = moved
        if (total := cosines.max(1).sum()) > best:
            best, labels = total, nearest_centre
    return labels


def nearest(vectors: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> float:
    model = KNeighborsClassifier(3, metric="cosine").fit(vectors[~held_out], labels[~held_out])
    found = model.predict(vectors[held_out])
    return float(f1_score(labels[held_out], found, average="macro"))


def words(row: str, index: dict[str, int], vectors: np.ndarray, job: harness.Job) -> dict:
    vectors = unit(vectors)
    figures = {}
    for name, pairs in word_sets().items():
        known = [(index[a], index[b], score) for a, b, score in pairs if {a, b} <= index.keys()]
        first, second, scores = (np.array(column) for column in zip(*known, strict=True))
        cosines = (vectors[first] * vectors[second]).sum(1)
        generator = np.random.default_rng(job.seed)
        drawn = generator.integers(len(known), size=(job.settings.resamples, len(known)))
        again = [spearmanr(cosines[k], scores[k]).statistic for k in drawn]
        values = {
            "rank correlation": spearmanr(cosines, scores).statistic,
            "low": np.nanquantile(again, 0.025),
            "high": np.nanquantile(again, 0.975),
            "known": len(known) / len(pairs),
        }
        figures |= {f"words-{name}, {row}.{key}": float(each) for key, each in values.items()}
    return figures


def angles(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    means = unit(np.stack([vectors[labels == k].mean(0) for k in range(20)]))
    means = torch.from_numpy(means).double()
    return {
        f"angles-{a} to {b}.degrees": geodesic_distance(means[a], means[b]).rad2deg().item()
        for a in range(20)
        for b in range(a + 1, 20)
    }


def unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


# --- data -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def posts(settings: Settings) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, newsgroups and whether held out, in the order of the file, which is that of class."""
    loaded = datasets.load("newsgroups20", progress=False)
    chosen = slice(None, None, settings.every)
    return list(loaded.texts[chosen]), loaded.labels[chosen], loaded.held_out[chosen]


def fourth(settings: Settings) -> tuple[list[str], np.ndarray, np.ndarray]:
    texts, labels, held_out = posts(settings)
    return texts[::4], labels[::4], held_out[::4]


@lru_cache(maxsize=1)
def word_sets() -> dict[str, list[tuple[str, str, float]]]:
    """Pairs in lower case, as the corpus is."""
    loaded = datasets.load("word_similarity", progress=False)
    sets = {"WordSim-353": loaded.wordsim353, "MEN": loaded.men}
    return {
        name: [
            (a.lower(), b.lower(), float(score))
            for (a, b), score in zip(each.pairs, each.scores, strict=True)
        ]
        for name, each in sets.items()
    }


def checksums(settings: Settings) -> dict[str, dict[str, str]]:
    names = "newsgroups20", "word_similarity"
    return {name: datasets.load(name, progress=False).sha256 for name in names}


EXPERIMENT = harness.Experiment(
    name="spherical_embedding",
    settings=Settings(),
    quick=QUICK,
    work=work,
    checksums=checksums,
    units=units,
    published=PUBLISHED,
    texts=(NEIGHBOURS,),
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
