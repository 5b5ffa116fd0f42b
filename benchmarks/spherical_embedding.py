"""One epoch of words and documents on the sphere, beside gensim's Doc2Vec on the same corpus.

`numba` is the loop of `SphericalEmbedding` on one thread, "numba, 2 threads" on two, `torch` the
synchronous backend without a compiler. gensim is `Doc2Vec(dm=0, dbow_words=1)`, which trains words
and documents too, with as many negatives as ours, the baseline, and with its default of five.
Reading the corpus and building the vocabulary are left out for all.

    make bench NAME=spherical_embedding        needs gensim, which the extra `test` brings
    CLN_TUTORIAL_DATA=... python -m benchmarks.spherical_embedding

Different models have no common right answer. The gate asks of each that its documents know their
words after one epoch: that a word of a document scores higher there than a random word of the
corpus does, in more than 60 of 100 cases, where a model that learned nothing has 50.

gensim trains in threads of its own, so the clock "cpu" of this benchmark is that of all threads.
For two threads only the wall counts, and beside them stands a control: two threads that compute and
touch no memory. Where they are not nearly twice as fast as one, no second core was free.
"""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from cln_tutorial import datasets
from cln_tutorial._threads import in_threads
from cln_tutorial.spherical_embedding import corpus as corpora
from cln_tutorial.spherical_embedding import training
from cln_tutorial.spherical_embedding.settings import Settings

EPOCH, CONTROL, MEMORY = (
    "one epoch of posts × types × tokens",
    "control: a loop without memory",
    "peak memory of a fit, posts × types × tokens",
)
OURS, TWO, PLAIN = "numba", "numba, 2 threads", "torch"
DOC2VEC, DOC2VEC_5 = "Doc2Vec", "Doc2Vec, 5 negatives"
ONE_LOOP, TWO_LOOPS = "one thread", "two threads"
TRAINING, CORRECTNESS = "training", "correctness"
KNOWN = 0.6  # of the cases, at least
DIM, WINDOW, NEGATIVE = 100, 10, 2
# Posts, types and tokens of 20 Newsgroups with min_count 5: every 4th, all, every 64th.
QUARTER, WHOLE, SMALL = (4712, 15785, 1158017), (18846, 34974, 4705373), (295, 2990, 93484)
EVERY = {QUARTER: 4, WHOLE: 1, SMALL: 64}
QUICK = (60, 40, 6000)
READ = 7  # times before the check: Doc2Vec learns little from posts that it read once


def cases(device: str) -> list[harness.Case]:
    return [_epoch(SMALL), _epoch(QUARTER), _epoch(WHOLE), _control(2 * 10**8), _memory(WHOLE)]


def quick(device: str) -> list[harness.Case]:
    return [_epoch(QUICK), _control(10**6), _memory(QUICK)]


def _epoch(shape: tuple[int, ...]) -> harness.Case:
    baseline = DOC2VEC if "Doc2Vec" not in str(missing("cpu")) else OURS
    limits = {"known": (1 - KNOWN) / 1}
    return harness.Case(EPOCH, shape, "float32", TRAINING, epoch, limits, baseline)


def _control(steps: int) -> harness.Case:
    return harness.Case(CONTROL, (steps,), "float32", CORRECTNESS, control, {"sum": 1e-9}, ONE_LOOP)


def _memory(shape: tuple[int, ...]) -> harness.Case:
    return harness.Case(MEMORY, shape, "float32", CORRECTNESS, memory, {"bytes": 1.0}, OURS)


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    found = {}
    if device != "cpu":
        return {OURS: "runs on a CPU"}
    if importlib.util.find_spec("gensim") is None:
        found |= dict.fromkeys((DOC2VEC, DOC2VEC_5), "gensim is not installed")
    return found


# --- contenders -----------------------------------------------------------------------------------


def epoch(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    texts = _texts(case.shape)
    vocabulary, corpus = corpora.read_corpus(texts, min_count=_min_count(case.shape))
    sizes = len(corpus), len(vocabulary), len(corpus.tokens)
    if sizes != case.shape:
        raise RuntimeError(f"the corpus is another one: {sizes} in place of {case.shape}")
    found = {OURS: _ours(vocabulary, corpus, n_jobs=1), TWO: _ours(vocabulary, corpus, n_jobs=2)}
    if case.shape in (SMALL, QUICK):
        found[PLAIN] = _ours(vocabulary, corpus, backend="torch")
    if DOC2VEC not in missing(device):
        found[DOC2VEC] = _doc2vec(texts, corpus, vocabulary, NEGATIVE)
        if case.shape != WHOLE:
            found[DOC2VEC_5] = _doc2vec(texts, corpus, vocabulary, 5)
    return found


def _ours(
    vocabulary: corpora.Vocabulary, corpus: corpora.Corpus, **options: Any
) -> harness.Contender:
    settings = Settings(
        dim=DIM, window=WINDOW, negative=NEGATIVE, epochs=1, **{"backend": "numba"} | options
    )
    tables = training.new_tables(len(vocabulary), len(corpus), settings)

    def run() -> None:
        for _ in training.train(tables, corpus, vocabulary.counts, settings):
            pass

    def checked() -> list[Tensor]:
        for _ in range(READ):
            run()
        return [_known(tables.documents, tables.words, corpus)]

    return harness.Contender(run, _all_known(), checked=checked)


def _doc2vec(
    texts: list[str], corpus: corpora.Corpus, vocabulary: corpora.Vocabulary, negative: int
) -> harness.Contender:
    from gensim.models.doc2vec import Doc2Vec, TaggedDocument

    tagged = [TaggedDocument(text.split(), [k]) for k, text in enumerate(texts)]
    model = Doc2Vec(
        dm=0, dbow_words=1, vector_size=DIM, window=WINDOW, negative=negative, hs=0, sample=1e-3,
        min_count=int(vocabulary.counts.min()), workers=1, seed=1,
    )  # fmt: skip
    model.build_vocab(tagged)

    def run() -> None:
        words = model.corpus_total_words
        model.train(tagged, total_examples=len(tagged), total_words=words, epochs=1)

    def checked() -> list[Tensor]:
        for _ in range(READ):
            run()
        order = [model.wv.key_to_index[word] for word in vocabulary.words]
        # A document of Doc2Vec predicts words by the table behind it, not by theirs.
        return [_known(model.dv.vectors, model.syn1neg[order], corpus)]

    return harness.Contender(run, _all_known(), checked=checked)


def _known(documents: np.ndarray, words: np.ndarray, corpus: corpora.Corpus) -> Tensor:
    """How often a word of a document scores higher there than a random token of the corpus."""
    generator = np.random.default_rng(0)
    filled = np.flatnonzero(np.diff(corpus.starts))
    chosen = generator.choice(filled, 20_000)
    tokens = np.asarray(corpus.tokens)
    own = tokens[generator.integers(corpus.starts[chosen], corpus.starts[chosen + 1])]
    other = generator.choice(tokens, len(chosen))
    scores = [(documents[chosen] * words[each]).sum(1) for each in (own, other)]
    different = own != other
    return torch.tensor((scores[0] > scores[1])[different].mean())


def _all_known() -> dict[str, Tensor]:
    return {"known": torch.ones((), dtype=torch.float64)}


def control(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Twice the same work on one thread, and on two."""
    loop = _loop()
    (steps,) = case.shape
    expected = {"sum": torch.tensor(2.0 * loop(steps), dtype=torch.float64)}

    def run(threads: int) -> list[Tensor]:
        sums = []

        @no_type_check  # it runs in threads
        def each(first: int, stop: int) -> None:
            sums.extend(loop(steps) for _ in range(first, stop))

        in_threads(2, threads, each)
        return [torch.tensor(sum(sums), dtype=torch.float64)]

    ways = {ONE_LOOP: 1, TWO_LOOPS: 2}
    return {
        name: harness.Contender(functools.partial(run, threads), expected)
        for name, threads in ways.items()
    }


def _loop() -> Callable[[int], float]:
    import numba

    @numba.njit(nogil=True)
    @no_type_check
    def loop(steps):
        x, total = 0.5, 0.0
        for _ in range(steps):
            x = 3.9 * x * (1.0 - x)
            total += x
        return total

    return loop


_FIT = """
import ctypes, sys
import numpy as np
from benchmarks import spherical_embedding as us

def kilobytes(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

shape = tuple(map(int, sys.argv[1].split(",")))
vocabulary, corpus = us.corpora.read_corpus(us._texts(shape), min_count=us._min_count(shape))
settings = us.Settings(dim=us.DIM, epochs=1, backend="numba")
few = us.corpora.Corpus(corpus.tokens[:50].copy(), np.array([0, 50]))
tables = us.training.new_tables(len(vocabulary), 1, settings)
list(us.training.train(tables, few, vocabulary.counts, settings))  # compiled
del tables, few
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of reading
before = kilobytes("VmRSS")
tables = us.training.new_tables(len(vocabulary), len(corpus), settings)
list(us.training.train(tables, corpus, vocabulary.counts, settings))
print(1024 * (kilobytes("VmHWM") - before) + corpus.tokens.nbytes)
"""


def memory(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """What a fit needs beside its texts, in a process of its own.

    The error of the gate is the share of the promise that was not used; more than it is refused.
    """
    promised = promise(*case.shape)
    expected = {"bytes": torch.tensor(promised, dtype=torch.float64)}

    def run() -> list[Tensor]:
        command = [sys.executable, "-c", _FIT, ",".join(map(str, case.shape))]
        done = subprocess.run(
            command, cwd=harness.runs.ROOT, capture_output=True, text=True, check=True
        )
        needed = float(done.stdout)
        if needed > promised:
            raise MemoryError(f"{needed / 1e6:.0f} MB in place of {promised / 1e6:.0f}")
        return [torch.tensor(needed, dtype=torch.float64)]

    return {OURS: harness.Contender(lambda: None, expected, checked=run)}


def promise(posts: int, types: int, tokens: int) -> float:
    """Bytes: the tables and a fifth, five a token, and 4 MiB for whatever is small."""
    return 1.2 * 4 * DIM * (2 * types + posts) + 5 * tokens + 2**22


@functools.cache
def _texts(shape: tuple[int, ...]) -> list[str]:
    if shape == QUICK:
        posts, types, tokens = QUICK
        generator = np.random.default_rng(0)
        topics = generator.permutation(types).reshape(4, -1)
        lines = [generator.choice(topics[k % 4], tokens // posts) for k in range(posts)]
        return [" ".join(f"w{word}" for word in line) for line in lines]
    return list(datasets.load("newsgroups20", progress=False).texts[:: EVERY[shape]])


def _min_count(shape: tuple[int, ...]) -> int:
    return 1 if shape == QUICK else 5


# --- goals ----------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    if device != "cpu":
        return []
    return [
        harness.Goal("words per second of CPU, over Doc2Vec", 1.7, _over(DOC2VEC)),
        harness.Goal("words per second of CPU, over Doc2Vec, 5 negatives", 3.0, _over(DOC2VEC_5)),
        harness.Goal("two threads over one, by the wall", 1.8, _threads),
    ]


def _over(peer: str) -> Callable[[list[harness.Row]], float | None]:
    def reached(rows: list[harness.Row]) -> float | None:
        found = [
            _median(row, OURS, "cpu") / _median(row, peer, "cpu")
            for row in rows
            if row["op"] == EPOCH
            and tuple(row["shape"]) == QUARTER
            and {OURS, peer} <= row["contenders"].keys()
        ]
        return min(found, default=None)

    return reached


def _threads(rows: list[harness.Row]) -> float | None:
    """Where a control with two threads is at least 1.9 times as fast; else it was not measured."""
    settings = {row.get("setting") for row in rows}
    found = []
    for setting in settings:
        of_setting = [row for row in rows if row.get("setting") == setting]
        free = [_ratio(row, TWO_LOOPS, ONE_LOOP) for row in of_setting if row["op"] == CONTROL]
        if free and min(free) >= 1.9:
            found += [
                _ratio(row, TWO, OURS)
                for row in of_setting
                if row["op"] == EPOCH and tuple(row["shape"]) in (QUARTER, WHOLE)
            ]
    return min(found, default=None)


def _ratio(row: harness.Row, fast: str, slow: str) -> float:
    return _median(row, fast, "wall") / _median(row, slow, "wall")


def _median(row: harness.Row, name: str, clock: str) -> float:
    return row["contenders"][name][clock]["ratio"]["median"]


BENCHMARK = harness.Benchmark(
    "spherical_embedding",
    cases,
    quick,
    missing,
    ("numba", "gensim"),
    goals,
    peers=(DOC2VEC, DOC2VEC_5),
    pace=harness.Pace(rounds=7),
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
