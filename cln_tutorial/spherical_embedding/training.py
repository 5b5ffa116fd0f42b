r"""Epochs over a corpus: order, learning rate, threads, history; and documents that come later.

A run is its settings and its corpus: tables are made by :func:`new_tables`, and :func:`train` moves
them, one epoch at a time, so that the caller can save them in between and go on from there. What is
random is a hash of seed, epoch and document (``samplers``), and the learning rate follows from the
number of tokens that come before; neither depends on the number of threads.
"""

import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped, UInt64
from tqdm import tqdm

from cln_tutorial._threads import in_threads
from cln_tutorial.spherical_embedding.corpus import Corpus
from cln_tutorial.spherical_embedding.geometry import retract
from cln_tutorial.spherical_embedding.objective import FACTORS, jose_step, update_
from cln_tutorial.spherical_embedding.samplers import (
    INFERENCE,
    Sampler,
    document_keys,
    document_order,
    draw,
    start_keys,
    token_hashes,
    unit_rows,
)
from cln_tutorial.spherical_embedding.settings import Settings

_BLOCK = 2**20  # tokens between two looks at the bar, and at Ctrl-C
_SMALL_BLOCK = 2**14  # tokens whose triples are drawn at once: some 30 MB an epoch
_ROWS = 2**9  # rows that are looked at or made at once, in more than float32


@dataclass(frozen=True, eq=False)
class Tables:
    """All vectors, as rows of one table: words, contexts, documents.

    Attributes:
        vectors: unit rows; training writes here.
        vocabulary_size: number of words, and of contexts.
    """

    vectors: Float32[np.ndarray, "rows dim"]
    vocabulary_size: int

    @property
    def words(self) -> Float32[np.ndarray, "words dim"]:
        """The centre words, those that one uses afterwards; a view."""
        return self.vectors[: self.vocabulary_size]

    @property
    def contexts(self) -> Float32[np.ndarray, "words dim"]:
        """The words as contexts of others; a view."""
        return self.vectors[self.vocabulary_size : 2 * self.vocabulary_size]

    @property
    def documents(self) -> Float32[np.ndarray, "documents dim"]:
        """The documents; a view."""
        return self.vectors[2 * self.vocabulary_size :]


@dataclass(frozen=True)
class EpochRecord:
    """What happened in one epoch.

    Attributes:
        epoch: its number, from 0.
        active_share: triples whose hinge was open, of all triples.
        mean_hinge: over all triples, each before its step.
        lr: learning rate at the end of the epoch.
        words_per_second: tokens, before any is left out, a second of wall time.
        norm_error: the largest deviation of the norm of a vector from 1.
    """

    epoch: int
    active_share: float
    mean_hinge: float
    lr: float
    words_per_second: float
    norm_error: float


def new_tables(vocabulary_size: int, documents: int, settings: Settings) -> Tables:
    """Make random unit vectors, a hash of the seed and the number of the row.

    Example:
        >>> tables = new_tables(5, 3, Settings(dim=4))
        >>> tables.words.shape, tables.documents.shape
        ((5, 4), (3, 4))
    """
    vectors = np.empty((2 * vocabulary_size + documents, settings.dim), np.float32)
    for rows in _slices(len(vectors)):
        numbers = np.arange(rows.start, rows.stop)
        keys = start_keys(settings.seed, numbers)
        vectors[rows] = unit_rows(keys, settings.dim)
    return Tables(vectors, vocabulary_size)


def train(
    tables: Tables,
    corpus: Corpus,
    counts: Int64[np.ndarray, "words"],
    settings: Settings,
    *,
    first_epoch: int = 0,
    progress: bool = False,
) -> Iterator[EpochRecord]:
    """Train epoch after epoch, and hand out a record after each.

    Between two records the tables are whole: save them with the number of the epoch, and a run that
    starts with them and ``first_epoch`` continues as if nothing had happened; with one thread to
    the last bit. Documents without a word stay as they are. With several threads the result is not
    reproducible: they read and write the same rows without locks.

    Args:
        tables: of :func:`new_tables`, written in place.
        corpus: the documents.
        counts: how often each word occurs in them.
        settings: of the run.
        first_epoch: how many epochs the tables have seen already.
        progress: show a bar.

    Raises:
        ValueError: if tables, counts and corpus do not belong together.
        ImportError: if the backend is not installed.

    Source: the order of words and learning rate of the released program, but for the shuffle.

    Example:
        >>> corpus = Corpus(np.array([0, 1, 0, 1], np.int32), np.array([0, 2, 4]))
        >>> settings = Settings(dim=4, epochs=2, lr=0.5, min_lr_ratio=0.5, sample=0)
        >>> tables = new_tables(2, 2, settings)
        >>> [record.lr for record in train(tables, corpus, np.array([2, 2]), settings)]
        [0.25, 0.25]
    """
    _require_corpus(corpus, counts)
    _require_rows("tables", tables.vectors, 2 * len(counts) + len(corpus), settings.dim)
    epoch = {"numba": _epoch_numba, "torch": _epoch_torch}[settings.resolved_backend()]
    return _records(
        epoch, tables, corpus, _sampler(counts, settings), settings, first_epoch, progress
    )


def infer(
    words: Float32[np.ndarray, "words dim"],
    corpus: Corpus,
    counts: Int64[np.ndarray, "words"],
    settings: Settings,
    *,
    progress: bool = False,
) -> Float32[np.ndarray, "documents dim"]:
    """Find vectors for documents, the words being fixed.

    Each document is read ``infer_epochs`` times with the documents' own hinge, whatever the
    objective. It starts at the mean of its words, and its noise words are hashes of its tokens and
    the seed: the same text has the same vector in every batch, at every place and on any number of
    threads.

    Args:
        words: the trained centre words; only read.
        corpus: the documents, as numbers of these words.
        counts: how often each word occurs in the corpus of the training.
        settings: of the training.
        progress: show a bar.

    Returns:
        One unit row for each document, and a row of zeros for one without a word.

    Raises:
        ValueError: if words, counts and corpus do not belong together.
        ImportError: if the backend is not installed.

    Example:
        >>> words = np.eye(3, dtype=np.float32)
        >>> corpus = Corpus(np.array([2, 2, 2], np.int32), np.array([0, 0, 3]))
        >>> empty, twos = infer(words, corpus, np.array([5, 5, 5]), Settings(dim=3, sample=0, lr=1))
        >>> empty, twos.argmax()
        (array([0., 0., 0.], dtype=float32), np.int64(2))
    """
    _require_corpus(corpus, counts)
    _require_rows("words", words, len(counts), settings.dim)
    visit = {"numba": _infer_numba, "torch": _infer_torch}[settings.resolved_backend()]
    sampler = replace(_sampler(counts, settings), window=0)
    lengths = np.diff(corpus.starts)
    results = np.zeros((len(corpus), settings.dim), np.float32)
    with tqdm(total=len(corpus), unit=" documents", desc="inferring", disable=not progress) as bar:
        for block in _blocks(lengths, _SMALL_BLOCK):
            part = _part(corpus, np.arange(block.start, block.stop))
            hashes = token_hashes(part.tokens, part.starts)
            keys = document_keys(settings.seed, INFERENCE, hashes)
            start = _means(words, part)
            results[block] = visit(start, words, part, keys, sampler, settings)
            bar.update(len(hashes))
    return results


# --- inside ---------------------------------------------------------------------------------------


def _records(
    epoch_of: Callable[..., tuple[int, int, float]],
    tables: Tables,
    corpus: Corpus,
    sampler: Sampler,
    settings: Settings,
    first_epoch: int,
    progress: bool,
) -> Iterator[EpochRecord]:
    lengths = np.diff(corpus.starts)
    tokens = int(lengths.sum())
    bar = tqdm(
        total=settings.epochs * tokens,
        initial=first_epoch * tokens,
        unit=" words",
        unit_scale=True,
        desc="training",
        disable=not progress,
    )
    with bar:
        for epoch in range(first_epoch, settings.epochs):
            order = np.arange(len(corpus))
            if settings.shuffle:
                order = document_order(len(corpus), settings.seed, epoch)
            visits = Visits(
                documents=order,
                lengths=lengths[order],
                keys=document_keys(settings.seed, epoch, order),
                seen=epoch * tokens + lengths[order].cumsum() - lengths[order],
                total=settings.epochs * tokens,
            )
            begin = time.perf_counter()
            triples, active, hinges = epoch_of(tables, corpus, visits, sampler, settings, bar)
            seconds = time.perf_counter() - begin
            end = np.array([(epoch + 1) * tokens])
            yield EpochRecord(
                epoch=epoch,
                active_share=active / max(triples, 1),
                mean_hinge=hinges / max(triples, 1),
                lr=float(settings.learning_rates(end, max(visits.total, 1))[0]),
                words_per_second=tokens / seconds,
                norm_error=norm_error(tables.vectors),
            )


@dataclass(frozen=True, eq=False)
class Visits:
    """The documents of one epoch in their order.

    Attributes:
        documents: their numbers.
        lengths: tokens of each.
        keys: of its random numbers.
        seen: tokens before it, from the beginning of the training.
        total: tokens of the whole training.
    """

    documents: Int64[np.ndarray, "documents"]
    lengths: Int64[np.ndarray, "documents"]
    keys: UInt64[np.ndarray, "documents"]
    seen: Int64[np.ndarray, "documents"]
    total: int


def norm_error(vectors: Float32[np.ndarray, "rows dim"]) -> float:
    """Return how far the norm of a row is from 1 at most; NaN if one is NaN."""
    parts = (vectors[rows].astype(np.float64) for rows in _slices(len(vectors)))
    errors = [np.abs(np.linalg.norm(part, axis=1) - 1).max(initial=0) for part in parts]
    return float(np.max(errors, initial=0))


def _epoch_numba(
    tables: Tables,
    corpus: Corpus,
    visits: Visits,
    sampler: Sampler,
    settings: Settings,
    bar: tqdm,
) -> tuple[int, int, float]:
    numba_loops = _numba_loops()

    table = numba_loops.as_records(tables.vectors)
    tokens = _readable(corpus.tokens)
    threads = _threads(settings)
    sums = []

    @no_type_check  # it runs in threads
    def run(first: int, stop: int) -> None:
        for thread in range(first, stop):
            mine = slice(block.start + thread, block.stop, threads)
            sums.append(
                numba_loops.train_documents(
                    table,
                    tokens,
                    corpus.starts,
                    visits.documents[mine],
                    visits.keys[mine],
                    visits.seen[mine],
                    float(visits.total),
                    sampler.keep,
                    sampler.alias,
                    sampler.window,
                    sampler.negative,
                    float(settings.lr),
                    float(settings.lr * settings.min_lr_ratio),
                    np.float32(settings.margin),
                    FACTORS.index(settings.factor),
                    settings.objective == "joint",
                )
            )

    for block in _blocks(visits.lengths, _BLOCK):
        in_threads(threads, threads, run)
        bar.update(int(visits.lengths[block].sum()))
    if threads > 1:
        _repair(tables.vectors)
    triples, active, hinges = zip(*sums, strict=True) if sums else ((), (), ())
    return sum(triples), sum(active), float(sum(hinges))


def _repair(vectors: Float32[np.ndarray, "rows dim"]) -> None:
    """Normalise the rows that are not unit: two threads wrote parts of them at once."""
    for rows in _slices(len(vectors)):
        norms = np.linalg.norm(vectors[rows].astype(np.float64), axis=1, keepdims=True)
        vectors[rows] /= np.where(np.abs(norms - 1) > 5e-7, norms, 1)


def _epoch_torch(
    tables: Tables,
    corpus: Corpus,
    visits: Visits,
    sampler: Sampler,
    settings: Settings,
    bar: tqdm,
) -> tuple[int, int, float]:
    table = torch.from_numpy(tables.vectors).to(settings.device)
    words = tables.vocabulary_size
    triples, active, hinges = 0, 0, 0.0
    for block in _blocks(visits.lengths, _SMALL_BLOCK):
        documents = visits.documents[block]
        part = _part(corpus, documents)
        pairs = draw(sampler, part.tokens, visits.lengths[block], visits.keys[block])
        seen = visits.seen[block][pairs.document] + pairs.place
        rates = settings.learning_rates(seen, visits.total).astype(np.float32)
        is_word = pairs.context >= 0
        document, context = 2 * words + documents[pairs.document], words + pairs.context
        if settings.objective == "joint":
            rows = np.stack([pairs.centre, context, document, pairs.noise], 1)[is_word]
            rates = rates[is_word]
        else:
            context = np.where(is_word, context, document)
            rows = np.stack([pairs.centre, context, pairs.noise], 1)
        batches = zip(
            torch.from_numpy(rows).to(settings.device).split(settings.batch_size),
            torch.from_numpy(rates).to(settings.device).split(settings.batch_size),
            strict=True,
        )
        for batch, lr in batches:
            hinge = update_(table, batch, lr, margin=settings.margin, factor=settings.factor)
            triples += len(hinge)
            active += int((hinge > 0).sum())
            hinges += float(hinge.sum(dtype=torch.float64))
        bar.update(int(visits.lengths[block].sum()))
    tables.vectors[:] = table.cpu().numpy()
    return triples, active, hinges


def _infer_numba(
    start: Float32[np.ndarray, "documents dim"],
    words: Float32[np.ndarray, "words dim"],
    corpus: Corpus,
    keys: UInt64[np.ndarray, "documents"],
    sampler: Sampler,
    settings: Settings,
) -> Float32[np.ndarray, "documents dim"]:
    numba_loops = _numba_loops()

    table = numba_loops.as_records(_readable(words))
    results = numba_loops.as_records(start)
    tokens = _readable(corpus.tokens)
    threads = min(_threads(settings), len(corpus))

    @no_type_check  # it runs in threads
    def run(first: int, stop: int) -> None:
        for thread in range(first, stop):
            numba_loops.infer_documents(
                results,
                table,
                tokens,
                corpus.starts,
                np.arange(thread, len(corpus), threads),
                keys,
                settings.infer_epochs,
                sampler.keep,
                sampler.alias,
                sampler.negative,
                float(settings.lr),
                float(settings.lr * settings.min_lr_ratio),
                np.float32(settings.margin),
                FACTORS.index(settings.factor),
            )

    in_threads(threads, threads, run)
    return start


def _infer_torch(
    start: Float32[np.ndarray, "documents dim"],
    words: Float32[np.ndarray, "words dim"],
    corpus: Corpus,
    keys: UInt64[np.ndarray, "documents"],
    sampler: Sampler,
    settings: Settings,
) -> Float32[np.ndarray, "documents dim"]:
    """All documents at once, each at its own n-th triple."""
    lengths = np.diff(corpus.starts)
    read = np.repeat(np.arange(len(corpus)), settings.infer_epochs)
    tokens = _part(corpus, read).tokens
    totals = settings.infer_epochs * lengths
    pairs = draw(sampler, tokens, totals, keys)
    rates = settings.learning_rates(pairs.place, totals[pairs.document]).astype(np.float32)
    triples = np.bincount(pairs.document, minlength=len(corpus))
    step = np.arange(len(rates)) - np.repeat(triples.cumsum() - triples, triples)
    order = np.argsort(step, kind="stable")
    columns = [pairs.document, pairs.centre, pairs.noise, rates]
    columns = [torch.from_numpy(column[order]).to(settings.device) for column in columns]
    sizes = np.bincount(step).tolist()
    documents = torch.from_numpy(start).to(settings.device)
    table = torch.tensor(words, device=settings.device)  # a copy: it may not be for writing
    for document, centre, noise, lr in zip(*(c.split(sizes) for c in columns), strict=True):
        old = documents[document]
        _, moved, _ = jose_step(
            table[centre],
            old[:, None],
            table[noise],
            margin=settings.margin,
            factor=settings.factor,
        )
        documents[document] = retract(old, lr[:, None] * moved[:, 0])
    return documents.cpu().numpy()


def _numba_loops() -> ModuleType:
    return importlib.import_module("cln_tutorial.spherical_embedding.numba_loops")


def _means(
    words: Float32[np.ndarray, "words dim"], corpus: Corpus
) -> Float32[np.ndarray, "documents dim"]:
    """The direction of the sum of each document's words; zeros without a word."""
    filled = np.flatnonzero(np.diff(corpus.starts))
    sums = np.zeros((len(corpus), words.shape[1]), np.float32)
    sums[filled] = np.add.reduceat(words[corpus.tokens], corpus.starts[filled])
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(lengths > 0, lengths, 1)


def _sampler(counts: Int64[np.ndarray, "words"], settings: Settings) -> Sampler:
    return Sampler.of(
        counts,
        sample=settings.sample,
        ns_exponent=settings.ns_exponent,
        window=settings.window,
        negative=settings.negative,
        seed=settings.seed,
    )


def _threads(settings: Settings) -> int:
    return settings.n_jobs if settings.n_jobs > 0 else os.cpu_count() or 1


def _part(corpus: Corpus, documents: Int64[np.ndarray, "documents"]) -> Corpus:
    """Some documents of a corpus, in this order."""
    lengths = np.diff(corpus.starts)[documents]
    starts = np.concatenate([[0], lengths.cumsum()])
    place = np.arange(starts[-1]) - np.repeat(starts[:-1] - corpus.starts[documents], lengths)
    return Corpus(_readable(corpus.tokens)[place], starts)


def _readable(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """A plain array that nobody writes to: one type for the compiler, memory map or not."""
    array = array.view(np.ndarray)
    array.flags.writeable = False
    return array


def _blocks(lengths: Int64[np.ndarray, "documents"], tokens: int) -> list[slice]:
    """Cut a sequence of documents into runs of about so many tokens."""
    number = (lengths.cumsum() - lengths) // tokens
    borders = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
    return [slice(a, b) for a, b in itertools.pairwise(borders) if a < b]


def _slices(rows: int) -> Iterator[slice]:
    """Cut a table into parts, of which copies are small."""
    return (slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS))


def _require_corpus(corpus: Corpus, counts: Int64[np.ndarray, "words"]) -> None:
    """Refuse what would make the compiled loops read or write beside their arrays."""
    if not len(counts) or counts.min() < 1:
        raise ValueError(
            f"`counts` must hold a positive number for each word; "
            f"got {len(counts):,} numbers, the least {counts.min(initial=0)}."
        )
    tokens, starts = corpus.tokens, corpus.starts
    if starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) < 0).any():
        raise ValueError(
            f"`corpus.starts` must rise from 0 to {len(tokens):,}, the number of tokens; "
            f"got {starts[0]} to {starts[-1]}."
        )
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(counts):
        raise ValueError(
            f"`corpus.tokens` must be numbers of the {len(counts):,} words of `counts`; "
            f"got {tokens.min()} to {tokens.max()}."
        )


def _require_rows(name: str, vectors: Shaped[np.ndarray, "..."], rows: int, dim: int) -> None:
    if vectors.shape != (rows, dim) or vectors.dtype != np.float32:
        raise ValueError(
            f"`{name}` must be float32 of shape {(rows, dim)}, as words, documents and `dim` have "
            f"it; got {vectors.dtype} of shape {vectors.shape}."
        )
    if not vectors.flags.c_contiguous:
        raise ValueError(f"`{name}` must be contiguous: use np.ascontiguousarray.")
