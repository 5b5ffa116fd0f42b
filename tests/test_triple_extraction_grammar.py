"""Made sentences: their places, their kinds, and what must not be the same in two of them."""

import unicodedata
from collections import Counter

import pytest
import torch

from cln_tutorial.triple_extraction.evaluation import overlap_class
from cln_tutorial.triple_extraction.grammar import KINDS, RELATIONS, made_sentences

LANGUAGES = ["en", "zh"]
both = pytest.mark.parametrize("language", LANGUAGES)


def made(n, seed=0, **options):
    return made_sentences(n, torch.Generator().manual_seed(seed), **options)


def starts_of_subjects(example):
    return Counter(start for start, _ in {t.subject_span for t in example.triples})


@both
def test_every_mention_stands_where_its_span_says_and_holds_no_mark_of_the_pattern(language):
    for example in made(300, language=language):
        assert not set(example.text) & set("[]{}:")
        for triple in example.triples:
            for mention, span in (
                (triple.subject, triple.subject_span),
                (triple.object, triple.object_span),
            ):
                assert example.text[slice(*span)] == mention
                assert mention == mention.strip()
            assert triple.relation in RELATIONS


@both
@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("normal", {"normal"}),
        ("seo", {"seo"}),
        ("epo", {"epo"}),
        ("soo", {"normal", "soo"}),
        ("nested", {"seo", "soo"}),
        ("repeated", {"normal"}),
        ("empty", set()),
    ],
)
def test_each_kind_has_the_overlap_that_it_is_named_for(language, kind, classes):
    for example in made(100, language=language, kinds=[kind]):
        assert overlap_class(example.triples) == classes, example
        twice = max(starts_of_subjects(example).values(), default=0) > 1
        assert twice == (kind == "nested"), example


@both
def test_a_repeated_name_stands_before_its_mention_too_and_no_other_name_is_repeated(language):
    for example in made(100, language=language, kinds=["repeated"]):
        (triple,) = example.triples
        before = example.text[: min(triple.subject_span[0], triple.object_span[0])]
        assert (triple.subject in before) + (triple.object in before) == 1, example
    for example in made(200, language=language, kinds=["normal", "seo", "epo", "empty"]):
        for mention in {m for t in example.triples for m in (t.subject, t.object)}:
            assert example.text.count(mention) == 1, example


@both
def test_all_relations_occur_and_sentences_without_triple_have_names(unchecked, language):
    examples = made(400, language=language)
    counts = Counter(t.relation for each in examples for t in each.triples)
    assert set(counts) == set(RELATIONS)
    assert min(counts.values()) > 10
    # A person of another sentence stands in most of those without a triple.
    people = {t.subject for each in made(600, language=language) for t in each.triples}
    empty = made(50, language=language, kinds=["empty"])
    assert sum(any(name in each.text for name in people) for each in empty) > 25


@both
def test_held_out_names_are_in_no_other_sentence_but_their_characters_are(unchecked, language):
    seen, unseen = (made(700, language=language, held_out=held_out) for held_out in (False, True))

    def names(examples):
        return {m for each in examples for t in each.triples for m in (t.subject, t.object)}

    assert not names(seen) & names(unseen)
    assert len(names(seen)) > 400
    assert len(names(unseen)) > 100
    characters = set("".join(each.text for each in seen))
    assert set("".join(each.text for each in unseen)) <= characters


@both
def test_emoji_of_several_code_points_and_none_shift_the_places(unchecked, language):
    examples = made(300, language=language)
    first = [each.text for each in examples if unicodedata.category(each.text[0])[0] == "S"]
    assert 15 < len(first) < 45  # a tenth, and five standard errors
    assert any("\u200d" in text for text in first)
    mentions = [t.object for each in made(600, language=language) for t in each.triples]
    assert any(any(ord(c) > 0xFFFF for c in mention) for mention in mentions)


def test_kinds_are_drawn_all_alike():
    n = 700
    found = Counter(overlap_class(each.triples) for each in made(n))
    # Normal and repeated share a class, the others have one each.
    expected = {frozenset({"normal"}): 2 / 7} | {
        frozenset(each): 1 / 7
        for each in ({"seo"}, {"epo"}, {"normal", "soo"}, {"seo", "soo"}, set())
    }
    assert set(found) == set(expected)
    for classes, share in expected.items():
        deviation = (n * share * (1 - share)) ** 0.5
        assert abs(found[classes] - n * share) < 5 * deviation, classes


def test_the_generator_decides_and_the_global_one_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert made(20, seed=1) == made(20, seed=1) != made(20, seed=2)
    assert torch.get_rng_state().equal(state)
    assert made_sentences(5) != made_sentences(5)
    assert made(0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "`n` must be at least 0; got -1"),
        ({"language": "de"}, r"`language` must be one of \('en', 'zh'\); got 'de'"),
        ({"kinds": ["seo", "odd"]}, r"`kinds` must be some of .*; got \['seo', 'odd'\]"),
        ({"kinds": []}, "`kinds` must be some of"),
        ({"kinds": "seo"}, "`kinds` must be some of .*; got 'seo'"),
    ],
)
def test_unknown_languages_and_kinds_are_refused(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        made_sentences(**{"n": 1} | options)


def test_the_kinds_are_those_that_the_docstring_describes():
    assert all(f'"{kind}"' in made_sentences.__doc__ for kind in KINDS)
