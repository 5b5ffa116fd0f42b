"""The batch that the extractor trains on, and the law by which the article chooses subjects.

Batches are compared with cases worked out by hand, and with enumeration on made sentences; the law
with its closed form, with exact figures of the real sets, and with 10^5 draws. Tests of frequencies
have fixed seeds and a false alarm once in 1000.
"""

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cln_tutorial.datasets import load
from cln_tutorial.triple_extraction.alignment import encode_windows
from cln_tutorial.triple_extraction.characters import CharTokenizer
from cln_tutorial.triple_extraction.collation import TripleCollator
from cln_tutorial.triple_extraction.grammar import RELATIONS, made_sentences
from cln_tutorial.triple_extraction.sampling import (
    article_negative_rate,
    article_pair_distribution,
    article_subject_distribution,
    draw_article_subject,
    expected_negative_rate,
)
from cln_tutorial.triple_extraction.triples import Example, Triple

ALARM = 1e-3
ALL_NEGATIVES = ["article", "none", "crossed", "objects", "random", "predicted"]
# Tokens are characters behind [CLS]: 'A' is token 1.
TEXT = "AB cd EF gh"
TWO = Example(TEXT, [("AB", "r", "cd"), ("EF", "s", "gh")])
EMPTY = Example("nobody", [])


class WordTokenizer:
    """One token per word between blanks, no special ones: the words of the published files."""

    is_fast, pad_token_id = True, 0

    def num_special_tokens_to_add(self):
        return 0

    def __call__(self, texts, **_):
        offsets = []
        for text in texts:
            ends = [-1]
            for word in text.split(" "):
                ends.append(ends[-1] + 1 + len(word))
            offsets.append([(a + 1, b) for a, b in pairwise(ends)])
        return {
            "input_ids": [[1] * len(each) for each in offsets],
            "offset_mapping": offsets,
            "special_tokens_mask": [[0] * len(each) for each in offsets],
        }


def collator(relations=("r", "s"), seed=0, tokenizer=None, **options):
    rng = torch.Generator().manual_seed(seed)
    tokenizer = tokenizer or CharTokenizer.fit([TEXT])
    return TripleCollator(tokenizer, list(relations), generator=rng, **options)


def rows(batch):
    """Rows as (window, first, last) with the set of their (relation, first, last) labels."""
    spans = [
        (b, *span)
        for b, span in zip(
            batch["subject_batch"].tolist(), batch["subject_spans"].tolist(), strict=True
        )
    ]
    labels = [{0: set(), 1: set()} for _ in spans]
    for n, token, relation, side in batch["object_labels"].tolist():
        labels[n][side].add((relation, token))
    return spans, labels


def test_a_batch_is_what_the_hand_makes_of_two_sentences():
    batch = collator(negatives="none")([TWO, EMPTY])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 13)
    assert batch["attention_mask"].sum(1).tolist() == [13, 8]
    assert batch["token_mask"].sum(1).tolist() == [8, 6]  # no blank, no [CLS]
    assert "token_type_ids" not in batch
    assert batch["subject_labels"].tolist() == [[0, 1, 0], [0, 2, 1], [0, 7, 0], [0, 8, 1]]
    assert batch["subject_spans"].tolist() == [[1, 2], [7, 8]]
    assert batch["subject_batch"].tolist() == [0, 0]
    assert batch["object_labels"].tolist() == [
        [0, 4, 0, 0],
        [0, 5, 0, 1],
        [1, 10, 1, 0],
        [1, 11, 1, 1],
    ]
    for name, tensor in batch.items():
        assert tensor.dtype == (torch.bool if name == "token_mask" else torch.int64), name


def test_a_row_has_the_objects_of_its_own_subject_only():
    for language in ("en", "zh"):
        examples = made_sentences(60, torch.Generator().manual_seed(1), language=language)
        tokenizer = CharTokenizer.fit([each.text for each in examples])
        batch = collator(RELATIONS, tokenizer=tokenizer, negatives="none")(examples)
        expected = {}
        for b, example in enumerate(examples):
            for triple in example.triples:
                (s, t), (o, p) = triple.subject_span, triple.object_span
                sides = expected.setdefault((b, s + 1, t), {0: set(), 1: set()})
                relation = RELATIONS.index(triple.relation)
                sides[0].add((relation, o + 1))
                sides[1].add((relation, p))
        spans, labels = rows(batch)
        assert spans == sorted(expected)
        assert labels == [expected[span] for span in spans]
        assert {tuple(each) for each in batch["subject_labels"].tolist()} == {
            (b, span[side], side) for b, *span in spans for side in (0, 1)
        }


def test_labels_are_there_once_and_in_order():
    triples = [("AB", "r", "cd"), ("AB", "r", "cd"), ("AB", "s", "cd"), ("AB cd", "r", "gh")]
    batch = collator(negatives="none")([Example(TEXT, triples)])
    for name in ("subject_labels", "object_labels"):
        labels = [tuple(each) for each in batch[name].tolist()]
        assert labels == sorted(set(labels)), name
    assert len(batch["subject_labels"]) == 3  # two subjects with one start
    assert len(batch["object_labels"]) == 2 + 2 + 2


def test_a_mention_without_a_place_stands_where_it_is_asked_for():
    example = Example("AB abAB AB cd", [("AB", "r", "cd")])
    starts = {
        occurrence: collator(negatives="none", occurrence=occurrence)([example])["subject_spans"][
            :, 0
        ].tolist()
        for occurrence in ("all", "first", "word")
    }
    assert starts == {"all": [1, 6, 9], "first": [1], "word": [1, 9]}
    placed = Example(example.text, [("AB", "r", "cd", (8, 10), (11, 13))])
    assert collator(negatives="none")([placed])["subject_spans"].tolist() == [[9, 10]]
    half = Example(example.text, [Triple("AB", "r", "cd", subject_span=(8, 10))])
    batch = collator(negatives="none")([half])
    assert batch["subject_spans"].tolist() == [[9, 10]]
    assert batch["object_labels"].tolist() == [[0, 12, 0, 0], [0, 13, 0, 1]]


# --- negatives


def negatives_of(batch, gold):
    spans, labels = rows(batch)
    return {span: each for span, each in zip(spans, labels, strict=True) if span not in gold}


GOLD = {(0, 1, 2), (0, 7, 8)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", set()),
        ("article", {(0, 1, 8)}),  # from A to F, the only pair of two subjects
        ("crossed", {(0, 1, 8)}),
        ("objects", {(0, 4, 5), (0, 10, 11)}),
        ("predicted", {(0, 4, 5), (0, 2, 4)}),
    ],
)
def test_negatives_are_all_that_their_name_says_and_have_no_object(kind, expected):
    collate = collator(negatives=kind, n_negative=9)
    # The model's own: a subject, what none is, and that again.
    collate.predicted = {TEXT: [(0, 2), (3, 5), (1, 4), (3, 5)], "another": [(0, 1)]}
    batch = collate([TWO, EMPTY])
    found = negatives_of(batch, GOLD)
    assert set(found) == expected
    assert len(batch["subject_spans"]) == len(GOLD) + len(expected)  # each once
    assert all(each == {0: set(), 1: set()} for each in found.values())
    assert len(batch["object_labels"]) == 4


def test_random_negatives_are_any_span_of_at_most_eight_tokens_but_no_subject():
    tokens = [1, 2, 4, 5, 7, 8, 10, 11]  # those that are no blank
    text = TEXT + " ijkl"
    places = [*tokens, 13, 14, 15, 16]
    example = Example(text, TWO.triples)
    expected = {
        (0, i, j) for n, i in enumerate(places) for j in places[n : n + 8] if (0, i, j) not in GOLD
    }
    batch = collator(negatives="random", n_negative=10**4)([example])
    assert set(negatives_of(batch, GOLD)) == expected
    assert len(batch["subject_spans"]) == len(expected) + len(GOLD)


@pytest.mark.parametrize("kind", ["random", "objects"])
def test_of_more_candidates_a_sentence_gets_as_many_as_asked_and_each_as_often(kind):
    text, n = "ABCDEF", 500
    triples = [("A", "r", each) for each in "BCDE"]
    collate = collator(negatives=kind, n_negative=2, tokenizer=CharTokenizer.fit([text]))
    batch = collate([Example(text, triples)] * n)
    found = Counter((i, j) for i, j in batch["subject_spans"].tolist() if (i, j) != (1, 1))
    assert sum(found.values()) == 2 * n
    candidates = 20 if kind == "random" else 4
    assert len(found) == candidates
    # Without putting back: the variance of a count is that of a share 2 / candidates of n.
    share = 2 / candidates
    deviation = math.sqrt(n * share * (1 - share))
    assert all(abs(each - n * share) < 5 * deviation for each in found.values())


def test_no_negatives_are_drawn_where_none_are_asked_for():
    for kind in ALL_NEGATIVES:
        collate = collator(negatives=kind, n_negative=0)
        assert set(rows(collate([TWO]))[0]) == GOLD


THREE = Example("A x B x C x", [(each, "r", "x") for each in "ABC"])


def test_one_subject_and_article_negatives_are_the_law_of_the_article():
    n = 1_000
    collate = collator(subjects="one", occurrence="first", tokenizer=CharTokenizer.fit("ABCx "))
    batch = collate([THREE] * n)
    assert batch["subject_batch"].tolist() == list(range(n))  # one row each
    law = article_pair_distribution([(1, 1), (5, 5), (9, 9)])
    found = Counter(map(tuple, batch["subject_spans"].tolist()))
    assert set(found) == set(law)
    expected = [n * law[pair] for pair in found]
    assert stats.chisquare(list(found.values()), expected).pvalue > ALARM
    spans, labels = rows(batch)
    for (_, i, j), each in zip(spans, labels, strict=True):
        assert each == ({0: {(0, 3)}, 1: {(0, 3)}} if i == j else {0: set(), 1: set()})
    # The subject tagger is taught all three, whatever is drawn.
    assert len(batch["subject_labels"]) == n * 6


@pytest.mark.parametrize("kind", ["article", "crossed"])
def test_pairs_of_two_subjects_are_drawn_as_the_article_does_or_all_alike(kind):
    n = 1_000
    collate = collator(negatives=kind, occurrence="first", tokenizer=CharTokenizer.fit("ABCx "))
    batch = collate([THREE] * n)
    found = Counter((i, j) for i, j in batch["subject_spans"].tolist() if i != j)
    assert sum(found.values()) == n
    weight = {(1, 5): 2, (1, 9): 2, (5, 9): 3} if kind == "article" else dict.fromkeys(found, 1)
    expected = [n * weight[pair] / sum(weight.values()) for pair in found]
    assert stats.chisquare(list(found.values()), expected).pvalue > ALARM


def test_one_subject_is_drawn_uniformly_beside_other_negatives():
    n = 1_000
    collate = collator(
        subjects="one", negatives="none", occurrence="first", tokenizer=CharTokenizer.fit("ABCx ")
    )
    found = Counter(map(tuple, collate([THREE] * n)["subject_spans"].tolist()))
    assert set(found) == {(1, 1), (5, 5), (9, 9)}
    assert stats.chisquare(list(found.values())).pvalue > ALARM
    beside = collator(subjects="one", negatives="objects")([TWO])
    assert len(beside["subject_spans"]) == 2
    assert len(negatives_of(beside, GOLD)) == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(ALL_NEGATIVES))
def test_rows_differ_and_stand_in_their_sentence_whatever_is_drawn(seed, kind):
    rng = torch.Generator().manual_seed(seed)
    examples = made_sentences(4, rng, language="zh")
    tokenizer = CharTokenizer.fit([each.text for each in examples])
    collate = collator(RELATIONS, seed, tokenizer, negatives=kind, n_negative=3)
    collate.predicted = {each.text: [(0, 1), (1, 3), (0, len(each.text))] for each in examples}
    batch = collate(examples)
    spans, _ = rows(batch)
    assert len(set(spans)) == len(spans)
    assert all(batch["token_mask"][b, i] and batch["token_mask"][b, j] for b, i, j in spans)
    assert all(i <= j for _, i, j in spans)
    assert batch["subject_batch"].tolist() == sorted(batch["subject_batch"].tolist())
    for n, token, relation, side in batch["object_labels"].tolist():
        assert batch["token_mask"][spans[n][0], token]
        assert 0 <= relation < len(RELATIONS)
        assert side in (0, 1)


def test_the_generator_alone_decides_what_is_drawn():
    examples = made_sentences(20, torch.Generator().manual_seed(2))
    tokenizer = CharTokenizer.fit([each.text for each in examples])

    def spans(seed, noise):
        torch.manual_seed(noise)
        return collator(RELATIONS, seed, tokenizer, negatives="random")(examples)["subject_spans"]

    assert spans(0, 1).equal(spans(0, 2))
    assert not spans(0, 1).equal(spans(1, 1))


# --- sentences without triples


def test_empty_sentences_stay_for_the_subject_tagger_or_are_left_out():
    for kind in ALL_NEGATIVES:
        collate = collator(negatives=kind)
        collate.predicted = {EMPTY.text: [(0, 3)]}
        batch = collate([EMPTY, TWO])
        assert len(batch["input_ids"]) == 2
        has_row = kind in ("random", "predicted")
        assert (batch["subject_batch"] == 0).sum() == has_row, kind
        left = collator(negatives=kind, keep_empty=False)([EMPTY, TWO])
        assert len(left["input_ids"]) == 1
        assert left["subject_labels"].tolist() == [[0, 1, 0], [0, 2, 1], [0, 7, 0], [0, 8, 1]]
        assert left["subject_batch"].tolist()[:2] == [0, 0]


def test_a_batch_of_empty_sentences_has_no_rows():
    batch = collator()([EMPTY, EMPTY])
    assert batch["subject_labels"].shape == (0, 3)
    assert batch["subject_spans"].shape == (0, 2)
    assert batch["subject_batch"].shape == (0,)
    assert batch["object_labels"].shape == (0, 4)
    with pytest.raises(ValueError, match="must have a sentence with a triple, or `keep_empty`"):
        collator(keep_empty=False)([EMPTY])
    with pytest.raises(ValueError, match="must have a sentence"):
        collator()([])


# --- long texts, and mentions that are not there


def test_a_triple_belongs_to_every_window_that_holds_both_mentions():
    text = "AB cd EF gh"
    # Windows of 8 characters that share 5: [0, 8), [3, 11).
    collate = collator(negatives="none", max_length=10, stride=5)
    assert [
        w.alignment.token_to_char_span(1, len(w.input_ids) - 2)
        for w in encode_windows(collate.tokenizer, [text], max_length=10, stride=5)
    ] == [(0, 8), (3, 11)]
    triples = [("AB", "r", "cd"), ("cd", "s", "EF"), ("EF", "r", "gh")]
    batch = collate([Example(text, triples)])
    spans, labels = rows(batch)
    assert spans == [(0, 1, 2), (0, 4, 5), (1, 1, 2), (1, 4, 5)]
    assert labels == [
        {0: {(0, 4)}, 1: {(0, 5)}},
        {0: {(1, 7)}, 1: {(1, 8)}},
        {0: {(1, 4)}, 1: {(1, 5)}},
        {0: {(0, 7)}, 1: {(0, 8)}},
    ]
    assert collate.n_cut == collate.n_unaligned == 0


def test_triples_that_no_window_holds_are_counted_and_told_of_once():
    collate = collator(negatives="none", max_length=10, stride=5)
    far = Example(TEXT, [("AB", "r", "cd"), ("AB", "r", "gh"), ("gh", "s", "AB")])
    with pytest.warns(
        UserWarning, match=r"`examples\[1\]`: no window holds both.*'r', 'gh'"
    ) as got:
        batch = collate([TWO, far])
    assert len(got) == 1
    assert collate.n_cut == 2
    assert len(batch["object_labels"]) == 6  # the others are there
    collate([far])  # no second warning, which would be an error
    assert collate.n_cut == 4
    assert collate.n_unaligned == 0


def test_a_mention_that_only_two_windows_hold_together_is_cut_and_not_missing():
    collate = collator(negatives="none", max_length=6)  # four characters: "AB c", "d EF", " gh"
    with pytest.warns(UserWarning, match="no window holds both"):
        collate([Example(TEXT, [("cd", "r", "EF")])])
    assert (collate.n_cut, collate.n_unaligned) == (1, 0)


@pytest.mark.parametrize(
    ("mention", "where"), [("zz", "not in the text"), ("\u200b", "on no token")]
)
def test_mentions_that_are_nowhere_are_told_of_raised_or_dropped(mention, where):
    text = TEXT + " \u200b"

    def tokenizer(texts, **options):  # knows no character without width
        encoded = plain(texts, **options)
        encoded["offset_mapping"] = [
            [(a, a) if text[a:b] == "\u200b" else (a, b) for a, b in each]
            for each in encoded["offset_mapping"]
        ]
        return encoded

    plain = CharTokenizer.fit([text])
    fake = type("Fake", (), {"__call__": staticmethod(tokenizer), "is_fast": True})()
    fake.num_special_tokens_to_add = plain.num_special_tokens_to_add
    span = (12, 13) if mention == "\u200b" else None
    example = Example(text, [Triple("AB", "r", mention, None, span), ("AB", "r", "cd")])
    message = rf"`examples\[1\]`: '.*' of \('AB', 'r', '.*'\) is {where}"

    collate = collator(negatives="none", tokenizer=fake)
    with pytest.warns(UserWarning, match=message):
        batch = collate([TWO, example])
    assert len(batch["object_labels"]) == 6
    collate([example])  # once is enough
    assert (collate.n_unaligned, collate.n_cut) == (2, 0)

    collate = collator(negatives="none", tokenizer=fake, on_unaligned="drop")
    collate([example])
    assert collate.n_unaligned == 1
    with pytest.raises(ValueError, match=message):
        collator(tokenizer=fake, on_unaligned="raise")([TWO, example])


# --- priors


def test_priors_are_the_shares_of_ones_by_hand():
    # 8 tokens with 2 starts and 2 ends; two subjects, so 16 tokens of rows.
    collate = collator(["r", "s", "never"])
    subject, objects = collate.label_priors([TWO])
    assert subject == pytest.approx(4 / 16, rel=1e-15)
    assert objects == pytest.approx([2 / 32, 2 / 32, 0.5 / 32], rel=1e-15)
    # An empty sentence counts if it stays; it has 6 tokens and no row.
    assert collate.label_priors([TWO, EMPTY])[0] == pytest.approx(4 / 28, rel=1e-15)
    assert collate.label_priors([TWO, EMPTY])[1] == objects
    assert collator(keep_empty=False).label_priors([TWO, EMPTY])[0] == subject
    with pytest.raises(ValueError, match="must have a sentence with a triple"):
        collate.label_priors([EMPTY])


def test_priors_are_the_means_of_the_labels_of_a_batch_and_draw_nothing():
    examples = made_sentences(260, torch.Generator().manual_seed(3))
    tokenizer = CharTokenizer.fit([each.text for each in examples])
    collate = collator(RELATIONS, tokenizer=tokenizer, negatives="none")
    batch = collate(examples)
    before = collate.generator.get_state()
    subject, objects = collate.label_priors(examples)  # in two pieces
    assert collate.generator.get_state().equal(before)
    tokens = batch["token_mask"].sum(1)
    assert subject == pytest.approx(len(batch["subject_labels"]) / (2 * int(tokens.sum())))
    cells = 2 * int(tokens[batch["subject_batch"]].sum())
    for r, share in enumerate(objects):
        assert share == pytest.approx(int((batch["object_labels"][:, 2] == r).sum()) / cells)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "some"}, r"`negatives` must be one of .*'article'.*; got 'some'"),
        ({"subjects": "two"}, r"`subjects` must be one of \('all', 'one'\); got 'two'"),
        ({"occurrence": "nearest"}, "`occurrence` must be one of .*; got 'nearest'"),
        ({"on_unaligned": "skip"}, "`on_unaligned` must be one of .*; got 'skip'"),
        ({"n_negative": -1}, "`n_negative` must be at least 0; got -1"),
        ({"relations": ["r", "r"]}, r"`relations` must be names, each once; got \['r', 'r'\]"),
        ({"relations": []}, "`relations` must be names"),
        ({"relations": "rs"}, "`relations` must be names, each once; got 'rs'"),
    ],
)
def test_choices_that_are_none_are_refused(unchecked, options, message):
    given = {"relations": ["r"], **options}
    with pytest.raises(ValueError, match=message):
        TripleCollator(CharTokenizer("a"), **given)


def test_an_unknown_relation_is_named_with_its_example(unchecked):
    bad = Example(TEXT, [("AB", "t", "cd")])
    message = r"`examples\[1\]` has the relation 't', which is none of the 2"
    with pytest.raises(ValueError, match=message):
        collator()([TWO, bad])
    with pytest.raises(ValueError, match=r"`examples\[300\]` has the relation 't'"):
        collator().label_priors([TWO] * 300 + [bad])
    with pytest.raises(TypeError, match=r"`examples\[1\]` must be an Example; got 'text'"):
        collator()([TWO, "text"])


def test_a_tokenizer_without_offsets_is_refused(unchecked):
    with pytest.raises(ValueError, match="`tokenizer` must give character offsets"):
        TripleCollator(SimpleNamespace(), ["r", "s"])([TWO])


# --- the article's law


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 30])
def test_the_law_of_disjoint_subjects_is_its_closed_form(k):
    harmonic = sum(Fraction(1, i) for i in range(1, k + 1))
    # A float64 has 53 bits, and the sum of k terms loses at most log2(k) of them.
    assert article_negative_rate(k) == pytest.approx(float(1 - harmonic / k), abs=1e-15)
    shares = article_subject_distribution(k)
    assert shares.dtype == torch.float64
    expected = [float(Fraction(1, k * (k - i + 1))) for i in range(1, k + 1)]
    assert shares.tolist() == pytest.approx(expected, rel=1e-15)
    # The last subject k times as often as the first.
    assert shares[-1] / shares[0] == pytest.approx(k, rel=1e-15)
    law = article_pair_distribution([(3 * i, 3 * i + 1) for i in range(k)])
    assert sum(law.values()) == pytest.approx(1, rel=1e-14)
    assert [law[3 * i, 3 * i + 1] for i in range(k)] == pytest.approx(expected, rel=1e-15)


def test_the_rates_that_are_quoted():
    rates = [round(article_negative_rate(k), 4) for k in (1, 2, 3, 4)]
    assert rates == [0, 0.25, 0.3889, 0.4792]
    for f in (article_negative_rate, article_subject_distribution):
        with pytest.raises(ValueError, match="`k` must be at least 1; got 0"):
            f(0)


NESTED = [(0, 1), (0, 4), (3, 4), (6, 6)]


@pytest.mark.parametrize("subjects", [[(0, 1), (3, 4), (6, 6), (8, 11)], NESTED])
def test_draws_follow_the_law_in_a_chi_square_test_of_1e5(subjects):
    n = 100_000
    starts, ends = torch.tensor(subjects)[[2, 0, 3, 1]].T  # in any order
    draws = draw_article_subject(starts, ends, torch.Generator().manual_seed(4), n)
    assert draws.shape == (n, 2)
    found = Counter(map(tuple, draws.tolist()))
    law = article_pair_distribution(subjects)
    assert set(found) == set(law)
    pairs = sorted(law)
    expected = [n * law[pair] for pair in pairs]
    assert stats.chisquare([found[pair] for pair in pairs], expected).pvalue > ALARM
    if subjects is not NESTED:
        negative = sum(each for pair, each in found.items() if pair not in subjects)
        counts = [negative, *(found[pair] for pair in subjects)]
        closed = [article_negative_rate(4), *article_subject_distribution(4).tolist()]
        assert stats.chisquare(counts, [n * p for p in closed]).pvalue > ALARM


def test_the_law_of_nested_subjects_is_that_of_enumeration():
    chance = Counter()
    for start, _ in NESTED:
        allowed = [end for _, end in NESTED if end >= start]
        for end in allowed:
            chance[start, end] += Fraction(1, 4 * len(allowed))
    law = article_pair_distribution(NESTED)
    assert set(law) == set(chance)
    assert all(law[pair] == pytest.approx(float(p), rel=1e-15) for pair, p in chance.items())


def test_draws_of_no_subject_or_one_that_ends_before_it_starts_are_refused():
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be of subjects, at least one"):
        draw_article_subject(nothing, nothing)
    with pytest.raises(ValueError, match=r"got \[5\] and \[4\]"):
        draw_article_subject(torch.tensor([5]), torch.tensor([4]))


def test_the_expected_rate_is_the_mean_of_the_sentences_that_have_a_subject():
    two = Example("A x B x", [("A", "r", "x"), ("B", "r", "x"), ("A", "s", "x")])
    one = Example("A x A x", [("A", "r", "x")])
    assert expected_negative_rate([two, EMPTY, one]) == pytest.approx(1 / 8, rel=1e-15)
    # By its span, where it has one: now there are two subjects.
    again = Example("A x A x", [("A", "r", "x"), Triple("A", "s", "x", (4, 5))])
    assert expected_negative_rate([again]) == pytest.approx(1 / 4, rel=1e-15)
    with pytest.raises(ValueError, match="must have a sentence with a subject"):
        expected_negative_rate([EMPTY])


# --- the real sets


def examples_of(part):
    return [Example(*each) for each in zip(part.texts, part.triples, strict=True)]


@pytest.mark.data
def test_the_article_draws_this_often_no_subject_on_real_data(unchecked):
    # Enumerated by an independent script, on words instead of characters.
    nyt = load("nyt_triples")
    for part, rate, share in [
        (load("webnlg_triples").train, 0.10645, 0.6833),
        (nyt.test, 0.06035, 0.7925),
        (nyt.star.test, 0.06093, 0.7930),
        (load("conll04").train, 0.05100, 0.8145),
    ]:
        examples = examples_of(part)
        assert round(expected_negative_rate(examples), 5) == rate
        # One subject of each sentence in an epoch, of all.
        subjects = [
            {
                t.subject_span or (each.text.index(t.subject), len(t.subject))
                for t in each.triples
                if t.subject in each.text
            }
            for each in examples
        ]
        assert len(subjects) / sum(map(len, subjects)) == pytest.approx(share, abs=5e-5)


@pytest.mark.data
def test_the_priors_of_webnlg_are_those_that_are_quoted(unchecked):
    train = load("webnlg_triples").train
    examples = examples_of(train)
    relations = sorted({t.relation for each in examples for t in each.triples})
    assert len(relations) == 211
    collate = TripleCollator(WordTokenizer(), relations)
    subject, objects = collate.label_priors(examples)
    assert round(subject, 4) == 0.0654
    assert round(1 / (sum(objects) / 211)) == 3308
    assert collate.n_cut == collate.n_unaligned == 0
