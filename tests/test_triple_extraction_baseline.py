"""The dictionary without a model: hand-made cases, brute force, and its scores on the real sets."""

import random
from collections import Counter

import pytest

from cln_tutorial import datasets
from cln_tutorial.triple_extraction.baseline import DictionaryBaseline
from cln_tutorial.triple_extraction.evaluation import score_triples
from cln_tutorial.triple_extraction.triples import Example

BORN, DIED = ("Kafka", "born in", "Prague"), ("Kafka", "died in", "Prague")


def predicted(train, *texts):
    found = DictionaryBaseline().fit(train).predict(texts)
    return [[triple.key for triple in row] for row in found]


def test_a_triple_is_predicted_where_both_mentions_stand_in_any_order():
    train = [Example("Kafka was born in Prague", [BORN])]
    texts = ["Prague and Kafka", "Kafka , of Prague", "Kafka alone", "Prague alone", ""]
    assert predicted(train, *texts) == [[BORN], [BORN], [], [], []]


def test_a_mention_is_whole_words_with_their_case():
    train = [Example("Ida lives in New York", [("Ida", "lives in", "New York")])]
    texts = ["Idaho is not New York", "Ida in New", "New Ida York", "ida in New York"]
    texts += ["Ida in Newer York", "Ida in New  York", "New York Ida"]
    assert [len(row) for row in predicted(train, *texts)] == [0, 0, 0, 0, 0, 1, 1]


def test_a_mention_inside_a_longer_one_is_found_too():
    triples = [("York", "p", "New York"), ("New York", "p", "New York City")]
    train = [Example("New York City", triples)]
    found = predicted(train, "New York", "in New York City", "York")
    assert list(map(set, found)) == [{triples[0]}, set(triples), set()]


@pytest.mark.parametrize(("right", "wrong", "kept"), [(1, 0, 1), (1, 1, 1), (1, 2, 0), (2, 3, 0)])
def test_a_triple_is_kept_if_it_is_right_at_least_half_the_time(right, wrong, kept):
    train = [Example("Kafka in Prague", [BORN])] * right + [Example("Prague , Kafka")] * wrong
    baseline = DictionaryBaseline().fit(train)
    found = baseline.predict(["Kafka , Prague"])[0]
    assert [triple.key for triple in found] == [BORN] * kept
    assert [triple.score for triple in found] == [right / (right + wrong)] * kept
    assert list(baseline.share_) == [BORN] * kept


def test_repeats_count_once_in_training_and_are_predicted_once():
    train = [Example("Kafka in Prague in Prague", [BORN, BORN, BORN]), Example("Kafka Prague")]
    baseline = DictionaryBaseline().fit(train)
    assert baseline.share_ == {BORN: 1 / 2}
    assert [len(row) for row in baseline.predict(["Prague Kafka Prague Kafka"])] == [1]


def test_a_triple_whose_mentions_never_stand_in_their_sentence_is_not_kept():
    # as in the 44 triples of NYT with another spelling
    train = [Example("Cancún , Mexico", [("Cancun", "in", "Mexico")])]
    assert predicted(train, "Cancun , Mexico") == [[]]


def test_fitting_again_forgets_what_was_fitted():
    baseline = DictionaryBaseline().fit([Example("Kafka in Prague", [BORN])])
    assert baseline.fit([Example("Kafka in Prague", [DIED])]) is baseline
    assert [t.key for t in baseline.predict(["Kafka in Prague"])[0]] == [DIED]


def test_brute_force_finds_the_same():
    rng = random.Random(7161)

    def sentence():
        words = [rng.choice(["a", "b", "ab", "a-b", "c"]) for _ in range(rng.randint(1, 9))]
        pieces = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, i + 4)]
        triples = [tuple(rng.choices(pieces, k=3)) for _ in range(rng.randint(0, 3))]
        return Example(" ".join(words), triples)

    for _ in range(20):
        train, test = ([sentence() for _ in range(30)] for _ in range(2))

        def there(triple, text):
            return all(f" {each} " in f" {text} " for each in (triple[0], triple[2]))

        expected = set()
        for triple in {each.key for example in train for each in example.triples}:
            offered = [example for example in train if there(triple, example.text)]
            right = sum(triple in {each.key for each in example.triples} for example in offered)
            if right * 2 >= len(offered):
                expected.add(triple)
        baseline = DictionaryBaseline().fit(train)
        assert set(baseline.share_) == expected
        for example, row in zip(test, baseline.predict([each.text for each in test]), strict=True):
            keys = [each.key for each in row]
            assert Counter(keys) == Counter({t for t in expected if there(t, example.text)})


def test_nothing_to_learn_predicts_nothing():
    assert predicted([], "Kafka in Prague") == [[]]
    assert DictionaryBaseline().fit([Example("Kafka", [])]).predict([]) == []


def test_bad_input_is_named(unchecked):
    baseline = DictionaryBaseline()
    with pytest.raises(RuntimeError, match="call `fit` with examples first"):
        baseline.predict(["a"])
    with pytest.raises(TypeError, match=r"`examples\[1\]` must be an Example; got 'Kafka'"):
        baseline.fit([Example("a"), "Kafka"])
    baseline.fit([])
    with pytest.raises(TypeError, match="`texts` must be a sequence of strings, not a string"):
        baseline.predict("Kafka")
    with pytest.raises(TypeError, match=r"`texts\[1\]` must be a string; got 3"):
        baseline.predict(["Kafka", 3])


# --- erratum 11: what a dictionary scores on the public sets --------------------------------------


@pytest.fixture(scope="module")
def real():
    return {
        name: datasets.load(name, progress=False)
        for name in ("conll04", "nyt_triples", "webnlg_triples")
    }


def examples(split):
    return [
        Example(text, [triple[:3] for triple in row])
        for text, row in zip(split.texts, split.triples, strict=True)
    ]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "star", "precision", "recall", "f1", "seen"),
    [
        ("webnlg_triples", False, 0.8521, 0.7492, 0.7974, (1464, 1607)),
        ("webnlg_triples", True, 0.8669, 0.8488, 0.8578, (1554, 1581)),
        ("nyt_triples", False, 0.9421, 0.6749, 0.7864, (5628, 8120)),
        ("nyt_triples", True, 0.8838, 0.6811, 0.7694, (5774, 8110)),
    ],
)
def test_a_dictionary_scores_this_much_without_a_model(
    real, name, star, precision, recall, f1, seen
):
    """From the train file; for NYT from the validation file alone."""
    corpus = real[name].star if star else real[name]
    train = examples(corpus.train or corpus.validation)
    found = DictionaryBaseline().fit(train).predict(corpus.test.texts)
    report = score_triples(corpus.test.triples, found, by=("seen",), train=train)
    rounded = [round(each, 4) for each in (report.precision, report.recall, report.f1)]
    assert rounded == [precision, recall, f1]
    groups = report.groups["seen"]
    assert (groups["seen"].n_gold, report.n_gold) == seen
    assert (groups["unseen"].tp, groups["unseen"].n_pred) == (0, 0)


@pytest.mark.data
def test_most_test_triples_of_webnlg_and_a_quarter_of_conll04_are_in_train(real):
    def keys(*splits):
        return {triple[:3] for split in splits for row in split.triples for triple in row}

    webnlg, conll04 = real["webnlg_triples"], real["conll04"]
    train, rows = keys(webnlg.train), [{t[:3] for t in row} for row in webnlg.test.triples]
    assert (sum(row <= train for row in rows), len(rows)) == (580, 703)
    train, rows = keys(conll04.train), [{t[:3] for t in row} for row in conll04.test.triples]
    more = train | keys(conll04.validation)
    assert [sum(len(row & known) for row in rows) for known in (train, more)] == [95, 102]
    assert (sum(map(len, rows)), sum(map(len, conll04.test.triples))) == (407, 422)
    assert sum(text in conll04.train.texts for text in conll04.test.texts) == 18
