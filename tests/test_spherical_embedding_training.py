"""The compiled loop against the reference, and what a training must and must not do.

Corpora are made on the spot, with a known answer: topics that share no word, or none at all.
"""

import importlib.util
import itertools
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from cln_tutorial.spherical_embedding import numba_loops, samplers, training
from cln_tutorial.spherical_embedding.corpus import Corpus
from cln_tutorial.spherical_embedding.geometry import random_unit
from cln_tutorial.spherical_embedding.objective import FACTORS, update_
from cln_tutorial.spherical_embedding.settings import Settings
from cln_tutorial.spherical_embedding.training import infer, new_tables, norm_error, train

RULES = [("two_hinge", factor) for factor in FACTORS] + [("joint", "paper"), ("joint", "none")]
each_rule = pytest.mark.parametrize(("objective", "factor"), RULES)
each_backend = pytest.mark.parametrize("backend", ["numba", "torch"])


def corpus_of(documents):
    tokens = np.array(list(itertools.chain.from_iterable(documents)), np.int32)
    return Corpus(tokens, np.cumsum([0, *map(len, documents)]))


def counts_of(corpus, words=None):
    return np.maximum(1, np.bincount(corpus.tokens, minlength=words or 1))


def fit(corpus, settings, words=None):
    counts = counts_of(corpus, words)
    tables = new_tables(len(counts), len(corpus), settings)
    return tables, list(train(tables, corpus, counts, settings))


def noise_corpus(documents=40, length=25, words=60, seed=0):
    """Words independent of each other and of the document, by Zipf's law."""
    rng = np.random.default_rng(seed)
    law = 1 / np.arange(1, words + 1)
    tokens = rng.choice(words, size=(documents, length), p=law / law.sum())
    return corpus_of(tokens.tolist())


def two_topics(seed, documents=200):
    """Even documents use words 0 to 4, odd ones 5 to 9."""
    words = np.random.default_rng(seed).integers(0, 5, (documents, 30))
    return corpus_of((words + 5 * (np.arange(documents) % 2)[:, None]).tolist())


def topics_corpus(documents, length, share, words):
    """Ten topics, sorted: this share of a document's words is its topic's, the rest everybody's."""
    rng = np.random.default_rng(0)
    law = 1 / np.arange(1, words + 1)
    drawn = rng.choice(words, size=(documents, length), p=law / law.sum())
    own = rng.random((documents, length)) < share
    own_word = drawn + words * (1 + label_of(documents)[:, None])
    return corpus_of(np.where(own, own_word, drawn).tolist())


def label_of(documents):
    return np.arange(documents) * 10 // documents


def parts(corpus, documents):
    return corpus_of([corpus.tokens[corpus.starts[d] : corpus.starts[d + 1]] for d in documents])


def clustering(vectors, labels, seed=0):
    """Normalised mutual information of k-means clusters and labels."""
    means = KMeans(len(np.unique(labels)), n_init=1, random_state=seed).fit_predict(vectors)
    return normalized_mutual_info_score(labels, means)


# --- one triple -----------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("dim", [2, 3, 100, 128, 300])
@pytest.mark.parametrize("same", [False, True], ids=["other noise", "noise is the centre word"])
def test_a_compiled_step_is_that_of_float64_even_if_norms_are_off(objective, factor, dim, same):
    # A kernel that takes norms for 1 keeps an error of 1e-3, 500 times the tolerance: a few dozen
    # roundings of numbers around 1.
    generator = torch.Generator().manual_seed(dim)
    for _ in range(5):
        vectors = random_unit(4, dim, generator=generator)
        vectors *= 1 + 1e-3 * (2 * torch.rand(4, 1, generator=generator) - 1)
        rows = [0, 1, 2, 3] if objective == "joint" else [0, 1, 3]
        rows[-1] = 0 if same else rows[-1]
        expected = vectors.double()
        hinge = update_(expected, torch.tensor([rows]), 0.04, margin=1.5, factor=factor)
        step = numba_loops.joint_triple if objective == "joint" else numba_loops.triple
        table = vectors.numpy()
        rule = np.float32(0.04), np.float32(1.5), FACTORS.index(factor)
        found = step(numba_loops.as_records(table), *rows, *rule)
        assert found == pytest.approx(hinge.item(), abs=2e-6)
        np.testing.assert_allclose(table, expected.numpy(), rtol=0, atol=2e-6)


@each_rule
def test_the_reference_in_float32_is_that_of_float64(objective, factor):
    vectors = random_unit(4, 100, generator=torch.Generator().manual_seed(0)) * 1.001
    expected = vectors.double()
    rows = torch.tensor([[0, 1, 2, 3] if objective == "joint" else [0, 1, 3]])
    for table in (vectors, expected):
        update_(table, rows, 0.04, margin=1.5, factor=factor)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("gap", ["equal", "nan"])
def test_the_compiled_gate_is_closed_at_the_margin_and_for_vectors_of_nan(gap):
    table = np.eye(3, dtype=np.float32)
    table[1] = [0.5, math.sqrt(0.75), 0]  # f = 1/2, h = 0
    if gap == "nan":
        table[2] = np.nan
    before = table.copy()
    margin = np.float32(0.5 if gap == "equal" else 3)
    for factor in range(3):
        rule = np.float32(0.1), margin, factor
        assert numba_loops.triple(numba_loops.as_records(table), 0, 1, 2, *rule) == 0
        np.testing.assert_array_equal(table, before)


# --- a training -----------------------------------------------------------------------------------


def step_by_hand(vectors, centre, contexts, noise, lr, margin, factor):
    """One triple in float64, read off the table of the three rules; its hinge."""
    u, n, vs = vectors[centre].copy(), vectors[noise].copy(), vectors[contexts].copy()
    total, apart = vs.sum(0), u - n
    f, h = total @ u, total @ n
    if f - h >= margin:
        return 0.0
    program = factor == "program"
    length, distance = (1, 1) if program else (np.linalg.norm(total), np.linalg.norm(apart))
    of_noise = 2 * h if program else 1 + h / length
    vectors[centre] = u + lr * (1 - f / length) * (total - f * u)
    vectors[noise] = n - lr * of_noise * (total - h * n)
    for context, v in zip(contexts, vs, strict=True):
        vectors[context] = v + lr * (1 - v @ apart / distance) * (apart - (v @ apart) * v)
    for row in (centre, noise, *contexts):
        vectors[row] /= np.linalg.norm(vectors[row])
    return margin - f + h


def train_by_hand(corpus, counts, settings):
    """All epochs, documents and triples, one after the other."""
    words, total = len(counts), settings.epochs * len(corpus.tokens)
    vectors = new_tables(words, len(corpus), settings).vectors.astype(np.float64)
    options = ("sample", "ns_exponent", "window", "negative", "seed")
    chances = samplers.Sampler.of(counts, **{name: getattr(settings, name) for name in options})
    seen, hinges = 0, []
    for epoch in range(settings.epochs):
        hinges.append([])
        for document in samplers.document_order(len(corpus), settings.seed, epoch):
            tokens = corpus.tokens[corpus.starts[document] : corpus.starts[document + 1]]
            keys = samplers.document_keys(settings.seed, epoch, np.array([document]))
            drawn = samplers.draw(chances, tokens, np.array([len(tokens)]), keys)
            columns = drawn.centre, drawn.context, drawn.noise, drawn.place
            for centre, context, noise, place in zip(*columns, strict=True):
                if settings.objective == "joint":
                    contexts = [words + context, 2 * words + document]
                else:
                    contexts = [words + context if context >= 0 else 2 * words + document]
                if len(contexts) == 2 and context < 0:
                    continue
                lr = settings.lr * max(settings.min_lr_ratio, 1 - (seen + place) / total)
                rule = settings.margin, settings.factor
                hinges[-1].append(step_by_hand(vectors, centre, contexts, noise, lr, *rule))
            seen += len(tokens)
    return vectors, hinges


@pytest.mark.usefixtures("unchecked")  # or the reference spends its time on checks
@pytest.mark.parametrize(
    ("objective", "factor", "documents"),
    [("two_hinge", "program", 19), ("two_hinge", "paper", 5), ("joint", "paper", 5)],
)
def test_all_backends_do_the_same_steps_ten_thousand_of_them(objective, factor, documents):
    pieces = [[1, 2, 3] * 9, [], [5], *np.split(noise_corpus().tokens, 20)]
    corpus = corpus_of(pieces[:documents])
    counts = counts_of(corpus)
    options = {"objective": objective, "factor": factor, "sample": 0.05, "epochs": 2}
    settings = Settings(dim=20, window=4, seed=5, batch_size=1, **options)
    expected, hinges = train_by_hand(corpus, counts, settings)
    assert sum(map(len, hinges)) >= (10_000 if documents == 19 else 1000)
    for backend in ("numba", "torch"):
        tables, records = fit(corpus, replace(settings, backend=backend))
        # Rounding of float32, 6e-8 a step, in vectors that a thousand steps have moved.
        np.testing.assert_allclose(tables.vectors, expected, rtol=0, atol=1e-5)
        for record, hinge in zip(records, hinges, strict=True):
            assert record.active_share == np.mean(np.array(hinge) > 0)
            assert record.mean_hinge == pytest.approx(np.mean(hinge), abs=1e-6)


def calls_of(monkeypatch, corpus, settings):
    """What the compiled loop is asked for: (document, key, tokens before it) of each thread."""
    calls, loop = [], numba_loops.train_documents

    def spy(table, tokens, starts, documents, keys, seen, total, *others):
        rows = zip(documents.tolist(), keys.tolist(), seen.tolist(), strict=True)
        calls.append([(*row, total, others[4:6]) for row in rows])
        return loop(table, tokens, starts, documents, keys, seen, total, *others)

    with monkeypatch.context() as patch:
        patch.setattr(numba_loops, "train_documents", spy)
        fit(corpus, settings)
    return calls


def test_learning_rate_and_noise_of_a_document_do_not_depend_on_the_number_of_threads(monkeypatch):
    corpus = noise_corpus(documents=11)
    settings = Settings(dim=4, epochs=3, backend="numba")
    one = calls_of(monkeypatch, corpus, settings)
    three = calls_of(monkeypatch, corpus, replace(settings, n_jobs=3))
    assert [len(call) for call in one] == [11] * 3
    assert sorted(map(len, three)) == [3] * 3 + [4] * 6
    assert sorted(itertools.chain(*three)) == sorted(itertools.chain(*one))
    # Each thread takes every third document of the shuffled order.
    shares = [call[start::3] for call in one for start in range(3)]
    assert sorted(three) == sorted(shares)
    # It falls over all tokens of all epochs.
    assert [row[2] for call in one for row in call] == list(range(0, 3 * 11 * 25, 25))
    assert {row[3:] for call in one for row in call} == {(3 * 11 * 25, (0.04, 0.04 * 1e-4))}


def test_documents_come_in_a_new_order_each_epoch_unless_told_otherwise(monkeypatch):
    corpus = noise_corpus()
    settings = Settings(dim=4, epochs=3, backend="numba")

    def orders(settings):
        calls = calls_of(monkeypatch, corpus, settings)
        return [tuple(row[0] for row in call) for call in calls]

    shuffled = orders(settings)
    assert len({*shuffled, tuple(range(40))}) == 4
    assert all(sorted(order) == list(range(40)) for order in shuffled)
    assert orders(replace(settings, shuffle=False)) == [tuple(range(40))] * 3


def test_a_long_epoch_is_cut_into_blocks_and_nothing_changes(monkeypatch):
    corpus, settings = noise_corpus(), Settings(dim=4, epochs=2, backend="numba")
    whole, records = fit(corpus, settings)
    monkeypatch.setattr(training, "_BLOCK", 60)
    cut, cut_records = fit(corpus, settings)
    assert (cut.vectors == whole.vectors).all()
    for one, other in zip(records, cut_records, strict=True):
        assert other.mean_hinge == pytest.approx(one.mean_hinge, rel=1e-12)
        assert other.active_share == one.active_share


@each_backend
def test_the_rate_falls_linearly_to_its_floor_over_all_epochs(backend):
    settings = Settings(dim=4, epochs=4, lr=0.08, min_lr_ratio=0.1, backend=backend)
    _, records = fit(noise_corpus(), settings)
    assert [record.lr for record in records] == pytest.approx([0.06, 0.04, 0.02, 0.008])
    assert [record.epoch for record in records] == [0, 1, 2, 3]


@each_backend
def test_a_run_that_was_killed_goes_on_to_the_same_last_bit(backend):
    corpus, settings = noise_corpus(), Settings(dim=4, epochs=4, backend=backend)
    counts = counts_of(corpus)
    whole, records = fit(corpus, settings)
    again = new_tables(len(counts), len(corpus), settings)
    for record in train(again, corpus, counts, settings):
        if record.epoch == 1:
            break
    saved = training.Tables(again.vectors.copy(), len(counts))
    rest = list(train(saved, corpus, counts, settings, first_epoch=2))
    assert (saved.vectors == whole.vectors).all()
    assert [record.active_share for record in rest] == [r.active_share for r in records[2:]]


def test_seeds_repeat_and_differ():
    corpus, settings = noise_corpus(), Settings(dim=4, epochs=1)
    first = fit(corpus, settings)[0].vectors
    assert (fit(corpus, settings)[0].vectors == first).all()
    other = replace(settings, seed=1)
    assert not np.isclose(fit(corpus, other)[0].vectors, first).any()


def test_a_memory_map_gives_the_same_vectors(tmp_path):
    corpus, settings = noise_corpus(), Settings(dim=4, epochs=1)
    corpus.tokens.tofile(tmp_path / "tokens")
    mapped = Corpus(np.memmap(tmp_path / "tokens", np.int32, mode="r"), corpus.starts)
    assert (fit(mapped, settings)[0].vectors == fit(corpus, settings)[0].vectors).all()


def test_norms_stay_one_for_thirty_epochs():
    corpus = noise_corpus(documents=2000, length=12, words=300)
    _, records = fit(corpus, Settings(dim=30, window=3, epochs=30, sample=0))
    errors = [record.norm_error for record in records]
    # Two roundings of float32 a step, never handed on; 1e-6 is the promise.
    assert max(errors) < 1e-6
    assert max(errors[20:]) < 2 * max(errors[:5])


@each_backend
@pytest.mark.parametrize("lr", [10, 100])
def test_however_large_the_rate_all_stays_finite_and_unit(backend, lr):
    tables, records = fit(noise_corpus(), Settings(dim=20, epochs=2, lr=lr, backend=backend))
    assert np.isfinite(tables.vectors).all()
    # A step of lr makes a vector of length lr out of parts whose squares have to cancel: the norm
    # is exact to a few roundings of 4 lr^2.
    assert records[-1].norm_error < max(1e-6, 4 * lr**2 * 2**-24 * 8)


def test_two_threads_train_as_well_as_one():
    corpus = two_topics(seed=0)
    tables, records = fit(corpus, Settings(dim=20, epochs=10, sample=0, n_jobs=2))
    assert clustering(tables.documents, np.arange(200) % 2) == pytest.approx(1)
    assert records[-1].norm_error < 1e-6


def test_rows_that_two_threads_wrote_at_once_are_normalised_and_one_thread_is_only_watched(
    monkeypatch,
):
    loop = numba_loops.train_documents

    def tear(table, *others):
        sums = loop(table, *others)
        table[0]["row"][:] *= 1.001
        return sums

    monkeypatch.setattr(numba_loops, "train_documents", tear)
    settings = Settings(dim=4, epochs=1, backend="numba")
    assert fit(noise_corpus(), settings)[1][0].norm_error == pytest.approx(1e-3, rel=0.01)
    assert fit(noise_corpus(), replace(settings, n_jobs=2))[1][0].norm_error < 1e-6


@pytest.mark.parametrize("batch_size", [256, 1024])
def test_synchronous_steps_find_the_topics_too(batch_size):
    options = {"backend": "torch", "batch_size": batch_size, "window": 3}
    tables, records = fit(two_topics(0, 100), Settings(dim=20, epochs=10, sample=0, **options))
    assert clustering(tables.documents, np.arange(100) % 2) == pytest.approx(1)
    assert records[-1].norm_error < 1e-6


# --- what the vectors know ------------------------------------------------------------------------


def test_two_topics_are_told_apart_for_twenty_of_twenty_seeds():
    for seed in range(20):
        tables, _ = fit(two_topics(seed), Settings(dim=20, epochs=10, sample=0, seed=seed))
        assert clustering(tables.documents, np.arange(200) % 2, seed) == pytest.approx(1)


def test_words_of_one_topic_are_neighbours():
    tables, _ = fit(two_topics(0), Settings(dim=20, epochs=10, sample=0))
    cosines = tables.words @ tables.words.T
    same = np.equal.outer(np.arange(10) // 5, np.arange(10) // 5)
    assert cosines[same].min() > cosines[~same].max() + 0.5


def test_without_topics_only_the_order_of_the_file_can_be_learnt():
    corpus = noise_corpus(documents=2000, length=60, words=1000)
    blocks = np.arange(2000) // 100
    settings = Settings(dim=20, window=3, epochs=10, sample=0)
    shuffled, in_order = (
        clustering(fit(corpus, replace(settings, shuffle=shuffle))[0].documents, blocks)
        for shuffle in (True, False)
    )
    # Chance is .031 for 20 clusters of 2000 documents, with a standard deviation of .001.
    assert shuffled <= 0.045
    assert in_order >= 0.06


def test_a_file_sorted_by_class_teaches_the_classes_unless_each_epoch_is_shuffled():
    corpus = topics_corpus(documents=1000, length=40, share=0.3, words=200)
    labels = label_of(1000)
    order = np.random.default_rng(1).permutation(1000)
    mixed = parts(corpus, order)

    def score(corpus, labels, shuffle):
        found = []
        for seed in range(3):
            options = {"shuffle": shuffle, "seed": seed}
            settings = Settings(dim=20, window=3, epochs=5, sample=0, **options)
            vectors = fit(corpus, settings, words=2200)[0].documents
            found += [clustering(vectors, labels, start) for start in range(3)]
        return np.mean(found)

    # Three trainings with three starts each: the standard deviation of a mean is about .01.
    assert abs(score(corpus, labels, True) - score(mixed, labels[order], True)) < 0.03
    assert score(corpus, labels, False) > score(mixed, labels[order], False) + 0.15


# --- extremes -------------------------------------------------------------------------------------


def test_documents_without_a_word_stay_where_they_are():
    corpus = corpus_of([[], [0, 1, 2] * 5, [], [2, 3] * 5, []])
    settings = Settings(dim=6, epochs=3, sample=0)
    start = new_tables(4, 5, settings)
    tables, _ = fit(corpus, settings)
    stayed = (tables.documents == start.documents).all(1)
    assert stayed.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
@each_backend
def test_a_corpus_without_a_word_trains_nothing(documents, backend):
    settings = Settings(dim=3, epochs=2, backend=backend)
    tables, records = fit(corpus_of(documents), settings, words=4)
    assert (tables.vectors == new_tables(4, len(documents), settings).vectors).all()
    assert [record.active_share for record in records] == [0, 0]


@each_backend
def test_documents_of_one_word_have_no_pairs_and_leave_the_contexts_alone(backend):
    corpus = corpus_of([[word] for word in (0, 1, 2, 3)] * 5)
    settings = Settings(dim=6, epochs=3, sample=0, margin=3, backend=backend)
    start = new_tables(4, 20, settings)
    tables, _ = fit(corpus, settings)
    assert (tables.contexts == start.contexts).all()
    assert (tables.documents != start.documents).any(1).all()


def test_one_document_and_two_words_with_more_noise_than_words():
    tables, records = fit(corpus_of([[0, 1] * 20]), Settings(dim=2, epochs=3, negative=5))
    assert np.isfinite(tables.vectors).all()
    assert records[-1].norm_error < 1e-6


def test_a_vocabulary_of_one_word_has_no_noise_and_ends():
    settings = Settings(dim=4, epochs=2, sample=0)
    tables, records = fit(corpus_of([[0] * 30]), settings)
    assert (tables.vectors == new_tables(1, 1, settings).vectors).all()
    assert records[0].active_share == 0


def test_a_document_of_sixty_thousand_tokens_is_one_document():
    tokens = noise_corpus(documents=1, length=60_000).tokens
    corpus = Corpus(tokens, np.array([0, 60_000]))
    tables, records = fit(corpus, Settings(dim=10, epochs=1, sample=0))
    assert records[0].norm_error < 1e-6
    # Its last word saw its neighbours: it is no rest that was cut off.
    start = new_tables(60, 1, Settings(dim=10))
    assert (tables.contexts[tokens[-1]] != start.contexts[tokens[-1]]).all()


def test_memory_is_that_of_the_tables_and_five_bytes_a_token():
    corpus = noise_corpus(documents=4000, length=80, words=8000)
    counts = counts_of(corpus)
    settings = Settings(dim=100, epochs=1, window=1)
    fit(corpus_of([[0, 1]]), settings)  # compiled before
    tracemalloc.start()
    tables = new_tables(len(counts), len(corpus), settings)
    list(train(tables, corpus, counts, settings))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows = 2 * len(counts) + 4000
    assert tables.vectors.nbytes == 4 * 100 * rows
    # The tokens themselves are there before: four of the five bytes.
    assert peak < 4 * 100 * rows * 1.2 + 1 * len(corpus.tokens)


# --- new documents --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    corpus = topics_corpus(documents=100, length=200, share=0.5, words=100)
    settings = Settings(dim=100, epochs=10, infer_epochs=20)
    tables, _ = fit(corpus, settings)
    return corpus, counts_of(corpus), settings, tables


def test_a_document_that_was_trained_is_found_again(trained):
    corpus, counts, settings, tables = trained
    found = infer(tables.words, corpus, counts, settings)
    assert np.median((found * tables.documents).sum(1)) >= 0.8
    # Among ten documents of its topic.
    assert np.mean((found @ tables.documents.T).argmax(1) == np.arange(100)) >= 0.95
    assert norm_error(found) < 1e-6


@each_backend
def test_the_vector_of_a_document_depends_on_nothing_but_its_words(trained, backend):
    corpus, counts, settings, tables = trained
    settings = replace(settings, backend=backend, infer_epochs=3)
    before = tables.vectors.copy()
    some = [7, 50, 31, 7, 99]
    one = infer(tables.words, parts(corpus, some), counts, settings)
    assert (one[0] == one[3]).all()
    order = [4, 2, 0, 1, 3]
    permuted = infer(tables.words, parts(corpus, np.array(some)[order]), counts, settings)
    assert (permuted == one[order]).all()
    for document, vector in zip(some, one, strict=True):
        alone = infer(tables.words, parts(corpus, [document]), counts, settings)
        assert (alone[0] == vector).all()
    threads = infer(tables.words, parts(corpus, some), counts, replace(settings, n_jobs=3))
    assert (threads == one).all()
    assert (tables.vectors == before).all()
    locked = tables.words.copy()
    locked.flags.writeable = False
    assert (infer(locked, parts(corpus, some), counts, settings) == one).all()
    other = infer(tables.words, parts(corpus, some), counts, replace(settings, seed=9))
    assert (other != one).any(1).all()


@each_rule
def test_both_backends_find_the_same_vectors(trained, objective, factor):
    corpus, counts, settings, tables = trained
    settings = replace(settings, objective=objective, factor=factor, infer_epochs=2)
    part = parts(corpus, range(0, 100, 10))
    one, other = (
        infer(tables.words, part, counts, replace(settings, backend=backend))
        for backend in ("numba", "torch")
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@each_backend
def test_a_new_document_without_a_word_is_zero(trained, backend):
    _, counts, settings, tables = trained
    settings = replace(settings, backend=backend)
    found = infer(tables.words, corpus_of([[], [150] * 9, []]), counts, settings)
    assert found.any(1).tolist() == [False, True, False]
    assert infer(tables.words, corpus_of([]), counts, settings).shape == (0, 100)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 1}, ValueError, "`dim` must be at least 2; got 1"),
        ({"window": 0}, ValueError, "`window` must be at least 1; got 0"),
        ({"negative": 0}, ValueError, "`negative` must be at least 1; got 0"),
        ({"epochs": 0}, ValueError, "`epochs` must be at least 1"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"infer_epochs": 0}, ValueError, "`infer_epochs` must be at least 1"),
        ({"dim": 2.5}, TypeError, "`dim` must be an integer; got 2.5"),
        ({"window": True}, TypeError, "`window` must be an integer; got True"),
        ({"margin": 0}, ValueError, "`margin` must be more than 0 and less than 4; got 0"),
        ({"margin": 4}, ValueError, "`margin` must be more than 0 and less than 4; got 4"),
        ({"margin": math.nan}, ValueError, "`margin` must be .*; got nan"),
        ({"margin": "wide"}, TypeError, "`margin` must be a number; got 'wide'"),
        ({"lr": 0}, ValueError, "`lr` must be more than 0 and at most 100; got 0"),
        ({"min_lr_ratio": 2}, ValueError, "`min_lr_ratio` must be from 0 to 1; got 2"),
        ({"sample": -1}, ValueError, "`sample` must be a finite number, at least 0; got -1"),
        ({"ns_exponent": math.inf}, ValueError, "`ns_exponent` must be finite; got inf"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"n_jobs": 0}, ValueError, "`n_jobs` must be positive or -1"),
        ({"n_jobs": -2}, ValueError, "`n_jobs` must be at least -1"),
        ({"backend": "triton"}, NotImplementedError, "backend='triton' is not there yet"),
        ({"backend": "c"}, ValueError, "`backend` must be one of 'auto', 'numba', 'torch'"),
        ({"objective": "one"}, ValueError, "`objective` must be one of"),
        ({"factor": "one"}, ValueError, "`factor` must be one of"),
        ({"objective": "joint"}, ValueError, "the program has no joint hinge"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Settings(**options)


@pytest.mark.usefixtures("unchecked")
def test_tables_counts_and_corpus_must_belong_together():
    corpus, settings = noise_corpus(), Settings(dim=4)
    counts = counts_of(corpus)
    good = new_tables(60, 40, settings)

    def of(vectors):
        return training.Tables(vectors, 60)

    for tables, message in (
        (new_tables(60, 39, settings), r"`tables` must be float32 of shape \(160, 4\).*\(159, 4\)"),
        (of(good.vectors.astype(np.float64)), "`tables` must be float32 .* got float64"),
        (of(np.asfortranarray(good.vectors)), "`tables` must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tables, corpus, counts, settings)
    with pytest.raises(ValueError, match=r"`tables` must be float32 of shape \(160, 8\)"):
        train(good, corpus, counts, replace(settings, dim=8))
    for few in (counts[:0], counts * 0):
        with pytest.raises(ValueError, match="`counts` must hold a positive number for each word"):
            train(good, corpus, few, settings)
    for tokens in (corpus.tokens + 1, corpus.tokens - 1):
        with pytest.raises(ValueError, match=r"`corpus.tokens` must be numbers of the 60 words"):
            train(good, Corpus(tokens, corpus.starts), counts, settings)
    for starts in (corpus.starts + 1, corpus.starts[:-1], corpus.starts[[0, 2, 1, -1]]):
        with pytest.raises(ValueError, match=r"`corpus.starts` must rise from 0 to 1,000"):
            train(good, Corpus(corpus.tokens, starts), counts, settings)
    with pytest.raises(ValueError, match=r"`words` must be float32 of shape \(60, 8\)"):
        infer(good.words, corpus, counts, replace(settings, dim=8))
    with pytest.raises(ValueError, match=r"`words` must be float32 of shape \(60, 4\)"):
        infer(good.words[:5], corpus, counts, settings)


def test_without_numba_torch_does_the_work_and_numba_is_asked_for_by_its_extra(monkeypatch):
    assert Settings().resolved_backend() == "numba"
    assert Settings(backend="torch").resolved_backend() == "torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Settings().resolved_backend() == "torch"
    with pytest.raises(ImportError, match=r"pip install 'cln-tutorial\[fast\]'"):
        Settings(backend="numba").resolved_backend()


def test_a_new_document_starts_at_the_mean_of_its_words():
    generator = np.random.default_rng(0)
    words = generator.standard_normal((6, 8)).astype(np.float32)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    corpus = Corpus(np.array([0, 1, 1, 5, 2], np.int32), np.array([0, 3, 3, 5]))
    still = Settings(dim=8, sample=0, lr=1e-9)
    found = training.infer(words, corpus, np.full(6, 5), still)
    sums = np.stack([words[[0, 1, 1]].sum(0), np.zeros(8), words[[5, 2]].sum(0)])
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    # a few roundings of 6e-8, and steps of 1e-9
    assert np.abs(found - sums / np.where(lengths > 0, lengths, 1)).max() < 1e-6
