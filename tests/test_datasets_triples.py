"""The sets of triples: their parsers on made files, and what the real files hold."""

import csv
import gzip
import hashlib
import io
import json
import os
import threading
from pathlib import Path, PurePosixPath

import pytest

from cln_tutorial import datasets
from cln_tutorial.datasets import sources, triples
from cln_tutorial.triple_extraction.triples import Example
from tests.test_datasets import Server

ABOUT = {"name": "made", "sha256": {}, "licence": "none", "source": "this test"}


def sides_of(loaded):
    return [each for each in (loaded.train, loaded.validation, loaded.test) if each is not None]


def every_example(loaded):
    """All sentences; `Example` refuses a place that does not hold its mention."""
    return [
        Example(text, row)
        for side in sides_of(loaded)
        for text, row in zip(side.texts, side.triples, strict=True)
    ]


# --- made files -----------------------------------------------------------------------------------


def words(text, *details):
    row = {
        "tokens": text.split(),
        "spo_list": [],
        "spo_details": [[i, j, "None-label", p, k, m, "None-label"] for i, j, p, k, m in details],
    }
    return json.dumps([row]).encode()


def strings(*rows):
    return json.dumps([{"text": text, "triple_list": list(row)} for text, row in rows]).encode()


def webnlg(**changed):
    files = {
        "train": words(
            "👩‍🚀 Kafka was born in old Prague .", (0, 2, "born", 5, 7), (1, 2, "in", 6, 7)
        ),
        "dev": words("a b a", (0, 1, "p", 1, 2)),
        "test": words("a b a", (1, 3, "q", 2, 3)),
    }
    files |= {
        f"star_{side}": strings(("a b", [["a", "p", "b"]])) for side in ("train", "val", "test")
    }
    return triples.parse_webnlg(files | changed, **ABOUT)


def test_spans_of_words_become_spans_of_characters_of_the_joined_words():
    loaded = webnlg()
    text = loaded.train.texts[0]
    assert text == "👩‍🚀 Kafka was born in old Prague ."
    assert loaded.train.triples == [
        [
            ("👩‍🚀 Kafka", "born", "old Prague", (0, 9), (22, 32)),
            ("Kafka", "in", "Prague", (4, 9), (26, 32)),
        ]
    ]
    # the last of two occurrences, and a span up to the end
    assert loaded.test.triples == [[("b a", "q", "a", (2, 5), (4, 5))]]
    assert len(every_example(loaded)) == 3


def test_the_star_version_is_a_set_of_its_own():
    loaded = webnlg(star_test=strings(("b c", [["b", "p", "c"], ["b", "p", "c"]])))
    assert loaded.star.test.texts == ["b c"]
    assert loaded.star.test.triples == [[("b", "p", "c"), ("b", "p", "c")]], "nothing is removed"
    assert loaded.star.star is None
    assert loaded.star.name == "made, star"
    assert loaded.relations == ("born", "in", "p"), "those of test are not known"


def test_nyt_has_no_train_side_and_is_compared_with_its_validation_side():
    test = strings(("a b", [["a", "p", "b"], ["a", "p", "b"], ["b", "p", "a"]]), ("c", []))
    star = strings(("b", [["b", "p", "b"]]))
    raw = {"val": strings(("a b", [["a", "p", "b"]])), "test": test, "sv": star, "st": star}
    loaded = triples.parse_nyt(raw, **ABOUT)
    assert loaded.train is None
    assert loaded.star.train is None
    assert len(loaded.validation) == 1
    assert loaded.test.texts == ["a b", "c"]
    assert loaded.test.triples[1] == []
    assert list(loaded.left_in.items())[:5] == [
        ("sentences without a triple (none: a score says nothing about free text)", 1),
        ("test sentences that are in validation too", 1),
        ("test triples that are in validation too", 1),
        ("sentences that repeat an earlier one of their side", 0),
        ("triples that repeat another one of their sentence", 1),
    ]


def test_what_is_wrong_with_the_mentions_and_their_places_is_counted():
    rows = strings(
        ("an an a", [["an", "p", "a"]]),  # twice, the second begins where the first ends
        ("anna a", [["a", "p", "anna"]]),  # inside a word is no second time
        ("anna", [["Anna", "p", "anna"]]),
    )
    loaded = triples.parse_nyt(dict.fromkeys("abcd", rows), **ABOUT)
    counts = list(loaded.left_in.values())
    assert counts[1:3] == [3, 3]
    assert counts[5:] == [2, 2], "each of two sides has one of each"
    counts = list(webnlg(dev=words("a b a", (2, 3, "p", 1, 2))).left_in.values())
    assert counts[6:] == [2, 2], "a and its place in dev, a and its place in test"


def test_relations_of_conll04_are_between_entities_in_the_order_of_their_tags():
    row = {
        "tokens": ["Ida", "of", "New", "York", "City", "and", "Eva", "Li"],
        "tags": ["U-Peop", "O", "B-Loc", "I-Loc", "L-Loc", "O", "B-Peop", "L-Peop"],
        "relations": [
            {"head": 2, "tail": 1, "type": "Live_In"},
            {"head": 0, "tail": 1, "type": "Live_In"},
        ],
    }
    content = json.dumps([row]).encode()
    loaded = triples.parse_conll04({"train": content, "dev": content, "test": content}, **ABOUT)
    city = "New York City"
    assert loaded.test.triples == [
        [
            ("Eva Li", "Live_In", city, (25, 31), (7, 20)),
            ("Ida", "Live_In", city, (0, 3), (7, 20)),
        ]
    ]
    assert len(every_example(loaded)) == 3


def table(*rows):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    names = ["sentence", "relation", "head", "head_offset", "tail", "tail_offset"]
    writer.writerows([names, *rows])
    return buffer.getvalue().encode()


def chinese(train=(), valid=(), test=()):
    raw = {"train": table(*train), "valid": table(*valid), "test": table(*test)}
    return triples.parse_zh_relations(raw, **ABOUT)


def row_of(text):
    return (text, "p", text[0], 0, text[-1], len(text) - 1)


def test_repeats_and_leaks_of_the_chinese_rows_are_removed_and_a_wrong_place_is_repaired():
    loaded = chinese(
        train=[row_of("甲乙"), row_of("甲乙"), row_of("丙丁")],
        valid=[row_of("戊己"), ("庚,辛 辛壬", "p", "庚", 0, "壬", 3)],
        test=[row_of("丙丁")],
    )
    kept = dict(
        pair
        for side in (loaded.train, loaded.validation)
        for pair in zip(side.texts, side.triples, strict=True)
    )
    assert kept == {
        "甲乙": [("甲", "p", "乙", (0, 1), (1, 2))],
        "戊己": [("戊", "p", "己", (0, 1), (1, 2))],
        "庚,辛 辛壬": [("庚", "p", "壬", (0, 1), (5, 6))],
    }
    assert loaded.test.texts == ["丙丁"]
    assert list(loaded.removed.values()) == [1, 1, 1]
    assert list(loaded.left_in.values()) == [4]
    assert len(every_example(loaded)) == 4


@pytest.mark.parametrize("text", ["甲乙乙", "甲"])
def test_a_wrong_place_that_cannot_be_repaired_is_named(text):
    with pytest.raises(OSError, match=f"'乙' is not at 5 of '{text}', nor there once"):
        chinese(test=[(text, "p", "甲", 0, "乙", 5)])


def test_the_split_of_the_chinese_rows_depends_on_each_sentence_alone():
    rows = [row_of(f"甲{i}乙") for i in range(400)]
    loaded = chinese(train=rows[:300], valid=rows[300:])
    other = chinese(train=rows[350:], valid=[*rows[:350][::-1], row_of("丙丁")])
    held_out = set(loaded.validation.texts)
    # one in eight: 50, with a standard deviation of 6.6
    assert 30 < len(held_out) < 70
    assert held_out == set(other.validation.texts) - {"丙丁"}
    # not Python's own hash, which is another one in each process
    digests = {row[0]: hashlib.sha256(row[0].encode()).digest()[0] for row in rows}
    assert held_out == {text for text, digest in digests.items() if digest % 8 == 0}
    assert held_out.isdisjoint(loaded.train.texts)
    assert held_out & {row[0] for row in rows[:300]}
    assert held_out & {row[0] for row in rows[300:]}


def test_a_printed_set_says_how_large_it_is_and_what_is_wrong_with_it():
    lines = str(webnlg()).splitlines()
    assert lines[0] == "made: 1 train, 1 validation, 1 test sentences with 4 triples"
    assert "left in: 1 test sentences that are in validation too" not in lines
    assert "left in: 0 test sentences that are in train too" in lines
    assert "made, star: 1 train, 1 validation, 1 test sentences with 3 triples" in lines
    assert lines[-2:] == ["licence: none", "source: this test"]
    assert sum(line.startswith("licence") for line in lines) == 1
    lines = str(chinese(test=[row_of("丙丁")])).splitlines()
    assert lines[0] == "made: 0 train, 0 validation, 1 test sentences with 1 triples"
    assert "removed: 0 rows that repeat an earlier sentence" in lines


# --- files of one name in two folders -------------------------------------------------------------


def test_no_two_files_of_a_set_have_one_place_in_the_cache():
    for name in datasets.available():
        files = datasets._SETS[name].files
        served = {(file.url, file.url_sha256) for file in files}
        assert len({PurePosixPath(url).name for url, _ in served}) == len(served), name


def test_what_stands_behind_the_address_names_the_file_in_the_cache_and_is_not_sent(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CLN_TUTORIAL_CACHE", str(tmp_path))
    monkeypatch.delenv("CLN_TUTORIAL_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.files = {"/full/test.json": b"[1]", "/star/test.json": b"[2]"}
        for folder, content in (("full", b"[1]"), ("star", b"[2]")):
            digest = hashlib.sha256(content).hexdigest()
            url = f"{server.url}/{folder}/test.json#/{folder}_test.json"
            file = sources.File(f"{folder}_test.json.gz", digest, url, digest)
            assert sources.read("made", file, progress=False) == content
        assert server.asked == ["/full/test.json", "/star/test.json"]
        server.shutdown()
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == [
        "full_test.json",
        "star_test.json",
    ]


# --- the real files -------------------------------------------------------------------------------


def raw_rows(name, file):
    with gzip.open(Path(os.environ["CLN_TUTORIAL_DATA"], name, file), "rt", encoding="utf-8") as f:
        return json.load(f)


@pytest.mark.data
def test_the_real_webnlg_is_all_there_and_its_places_hold_what_its_strings_say():
    """The counts of errata 5, 9 and 10, and of the set's SOURCE.md."""
    loaded = datasets.load("webnlg_triples", progress=False)
    assert [len(side) for side in sides_of(loaded)] == [5019, 500, 703]
    assert [sum(map(len, side.triples)) for side in sides_of(loaded)] == [11313, 1224, 1607]
    for side, file in zip(sides_of(loaded), ("train", "dev", "test"), strict=True):
        rows = raw_rows("webnlg_triples", f"{file}.json.gz")
        assert [[list(t[:3]) for t in row] for row in side.triples] == [r["spo_list"] for r in rows]
    assert list(loaded.left_in.values()) == [0, 0, 1464, 8 + 2, 1 + 1, 0, 2505, 0]
    relations = [{t[1] for row in side.triples for t in row} for side in sides_of(loaded)]
    assert (len(relations[0]), len(loaded.relations)) == (211, 215)
    unknown = [t for row in loaded.test.triples for t in row if t[1] not in relations[0]]
    assert len(unknown) == 5
    star = loaded.star
    assert [len(side) for side in sides_of(star)] == [5019, 500, 703]
    assert len({t[1] for row in star.train.triples for t in row}) == 170
    assert list(star.left_in.values())[:6] == [0, 0, 1554, 7 + 2, 89 + 5 + 10, 0]


@pytest.mark.data
def test_the_real_nyt_is_all_there():
    loaded = datasets.load("nyt_triples", progress=False)
    assert [len(side) for side in sides_of(loaded)] == [5000, 5000]
    assert [sum(map(len, side.triples)) for side in sides_of(loaded)] == [8489, 8616]
    assert list(loaded.left_in.values())[:6] == [0, 33, 5628, 25 + 15, 504 + 496, 47 + 44]
    assert len(loaded.relations) == 22
    assert [len(side) for side in sides_of(loaded.star)] == [4999, 5000]
    assert list(loaded.star.left_in.values())[:6] == [0, 34, 5774, 26 + 15, 0, 0]


@pytest.mark.data
def test_the_real_conll04_is_all_there_with_true_places():
    """The counts of errata 5, 10 and 11."""
    loaded = datasets.load("conll04", progress=False)
    assert [len(side) for side in sides_of(loaded)] == [922, 231, 288]
    assert [sum(map(len, side.triples)) for side in sides_of(loaded)] == [1283, 343, 422]
    assert loaded.relations == ("Kill", "Live_In", "Located_In", "OrgBased_In", "Work_For")
    assert list(loaded.left_in.values()) == [0, 18, 95, 24 + 3 + 1, 50, 0, 178, 101]
    assert len(every_example(loaded)) == 922 + 231 + 288


@pytest.mark.data
def test_the_real_chinese_rows_are_split_again_with_all_relations_on_each_side():
    loaded = datasets.load("zh_relations", progress=False)
    assert [len(side) for side in sides_of(loaded)] == [3526, 471, 1000]
    assert list(loaded.removed.values()) == [2, 1, 1]
    for side in sides_of(loaded):
        assert len({triple[1] for row in side.triples for triple in row}) == 10
        assert len(set(side.texts)) == len(side)
    texts = [set(side.texts) for side in sides_of(loaded)]
    assert sum(map(len, texts)) == len(set().union(*texts))
    # the repaired one
    (repaired,) = (
        (text, triple)
        for text, (triple,) in zip(loaded.train.texts, loaded.train.triples, strict=True)
        if triple[:3] == ("穿越之鸣人传说", "连载网站", "17k小说网")
    )
    assert repaired[0][slice(*repaired[1][4])] == "17k小说网"
    assert repaired[1][4] != (15, 21)
    assert len(every_example(loaded)) == 4997
