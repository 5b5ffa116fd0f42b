"""Sentences with their triples (subject, relation, object): WebNLG, NYT, CoNLL04, and Chinese ones.

WebNLG, NYT and CoNLL04 stay as the published figures have them, and say what is wrong with them.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True, eq=False)
class TripleSplit:
    """One side of a set: ``triples[i]`` are those of ``texts[i]``, in the order of the file.

    A triple is ``(subject, relation, object)``; where the file has places, the spans of subject and
    object stand behind, ``(start, end)`` in characters of the text, the end excluded.
    """

    texts: list[str]
    triples: list[list[tuple[Any, ...]]]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class TripleTexts:
    """Sentences with triples in three sides; ``print`` it to read what is wrong with them.

    Attributes:
        name: what :func:`load` was asked for.
        train: to learn from; ``None`` for NYT, whose train file is not loaded.
        validation: to choose thresholds on.
        test: to measure on.
        star: the "star" version, where only the last word of each mention is left, of nearly the
            same sentences in another order; ``None`` for sets without one. Many published figures
            are of this version.
        removed: what the loader removed or repaired, in words, and how many.
        left_in: what is wrong with the set and was left in, in words, and how many.
        sha256: digest of the raw content of each source file.
        licence: what the origin states.
        source: where the files come from.
    """

    name: str
    train: TripleSplit | None
    validation: TripleSplit
    test: TripleSplit
    star: "TripleTexts | None"
    removed: dict[str, int]
    left_in: dict[str, int]
    sha256: dict[str, str]
    licence: str
    source: str

    @property
    def relations(self) -> tuple[str, ...]:
        """Sorted names of the relations of train and validation, which a model may know."""
        sides = [each for each in (self.train, self.validation) if each is not None]
        return tuple(sorted({t[1] for side in sides for row in side.triples for t in row}))

    def __str__(self) -> str:
        sides = {"train": self.train, "validation": self.validation, "test": self.test}
        sizes = ", ".join(f"{len(each):,} {key}" for key, each in sides.items() if each is not None)
        triples = sum(len(row) for side in sides.values() if side for row in side.triples)
        lines = [
            f"{self.name}: {sizes} sentences with {triples:,} triples",
            *(f"removed: {count:,} {what}" for what, count in self.removed.items()),
            *(f"left in: {count:,} {what}" for what, count in self.left_in.items()),
        ]
        if self.star is not None:
            lines.append(str(self.star).split("\nlicence: ")[0])
        return "\n".join([*lines, f"licence: {self.licence}", f"source: {self.source}"])


def parse_webnlg(raw: dict[str, bytes], *, name: str, **about) -> TripleTexts:
    """Words and spans of words, joined by blanks; then the star version, texts and strings."""
    *full, star_train, star_validation, star_test = raw.values()
    star = _as_published(
        *map(_strings, (star_train, star_validation, star_test)), name=f"{name}, star", **about
    )
    return _as_published(*map(_word_spans, full), name=name, star=star, **about)


def parse_nyt(raw: dict[str, bytes], *, name: str, **about) -> TripleTexts:
    """Texts and strings, validation and test; then the star version likewise."""
    validation, test, *star = map(_strings, raw.values())
    return _as_published(
        None,
        validation,
        test,
        name=name,
        star=_as_published(None, *star, name=f"{name}, star", **about),
        **about,
    )


def parse_conll04(raw: dict[str, bytes], **about) -> TripleTexts:
    """Words, their BILOU tags, and relations between the entities that the tags mark."""
    return _as_published(*map(_tagged, raw.values()), **about)


def parse_zh_relations(raw: dict[str, bytes], **about) -> TripleTexts:
    """Rows of sentence, relation, head and tail with their places; one triple a sentence.

    The file for validation has 4 of the 10 relations, so train and validation are joined and split
    again, by a hash of the sentence.
    """
    train, valid, test = map(_rows_with_places, raw.values())
    repaired = sum(wrong for rows in (train, valid, test) for *_, wrong in rows)
    held_out = {text: triple for text, triple, _ in test}
    rest = {text: triple for text, triple, _ in train + valid}
    leaked = rest.keys() & held_out.keys()
    sides = {
        which: {
            text: triple
            for text, triple in rest.items()
            if text not in leaked and _for_validation(text) == which
        }
        for which in (False, True)
    }
    return TripleTexts(
        train=_one_each(sides[False]),
        validation=_one_each(sides[True]),
        test=_one_each(held_out),
        star=None,
        removed={
            "rows that repeat an earlier sentence": len(train) + len(valid) - len(rest),
            "train or validation sentences that are in test": len(leaked),
            "wrong places of a mention (repaired: it stands once in its sentence)": repaired,
        },
        left_in={
            "sentences with one labelled triple, whatever else they say": len(rest)
            - len(leaked)
            + len(held_out)
        },
        **about,
    )


def _as_published(
    train: TripleSplit | None,
    validation: TripleSplit,
    test: TripleSplit,
    *,
    star: TripleTexts | None = None,
    **about,
) -> TripleTexts:
    """Keep every row, and count what is wrong."""
    sides = [side for side in (train, validation, test) if side is not None]
    known, where = (train, "train") if train is not None else (validation, "validation")
    known_texts, known_triples = set(known.texts), set().union(*map(_keys, known.triples))
    rows = [
        (text, row) for side in sides for text, row in zip(side.texts, side.triples, strict=True)
    ]
    # a mention stands in a text as whole words, which white space separates
    mentions = [
        (f" {text} ", (f" {subject} ", f" {object_} "), [start for start, _ in spans])
        for text, row in rows
        for subject, _, object_, *spans in row
    ]
    left_in = {
        "sentences without a triple (none: a score says nothing about free text)": sum(
            not row for _, row in rows
        ),
        f"test sentences that are in {where} too": sum(text in known_texts for text in test.texts),
        f"test triples that are in {where} too": sum(
            len(_keys(row) & known_triples) for row in test.triples
        ),
        "sentences that repeat an earlier one of their side": sum(
            len(side) - len(set(side.texts)) for side in sides
        ),
        "triples that repeat another one of their sentence": sum(
            len(row) - len(_keys(row)) for _, row in rows
        ),
        "triples with a mention that is not in the text": sum(
            any(each.strip() not in text for each in pair) for text, pair, _ in mentions
        ),
        "triples with a mention that stands in the text more than once": sum(
            any(0 <= (at := text.find(each)) < text.find(each, at + 1) for each in pair)
            for text, pair, _ in mentions
        ),
    }
    if any(starts for *_, starts in mentions):
        left_in["places that are not the first occurrence (none: a search found them)"] = sum(
            text.find(each) != start
            for text, pair, starts in mentions
            for each, start in zip(pair, starts, strict=True)
        )
    return TripleTexts(
        train=train,
        validation=validation,
        test=test,
        star=star,
        removed={},
        left_in=left_in,
        **about,
    )


def _keys(row: list[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    return {triple[:3] for triple in row}


def _strings(content: bytes) -> TripleSplit:
    rows = json.loads(content)
    return TripleSplit(
        [row["text"] for row in rows], [[tuple(t) for t in row["triple_list"]] for row in rows]
    )


def _word_spans(content: bytes) -> TripleSplit:
    return _of_words(
        (row["tokens"], [((d[0], d[1]), d[3], (d[4], d[5])) for d in row["spo_details"]])
        for row in json.loads(content)
    )


def _tagged(content: bytes) -> TripleSplit:
    def triples(row: dict[str, Any]) -> list[tuple[Any, ...]]:
        starts = [i for i, tag in enumerate(row["tags"]) if tag[0] in "BU"]
        ends = [i + 1 for i, tag in enumerate(row["tags"]) if tag[0] in "LU"]
        entities = list(zip(starts, ends, strict=True))
        return [(entities[r["head"]], r["type"], entities[r["tail"]]) for r in row["relations"]]

    return _of_words((row["tokens"], triples(row)) for row in json.loads(content))


def _of_words(rows: Iterable[tuple[Sequence[str], Sequence[tuple[Any, ...]]]]) -> TripleSplit:
    """Turn spans of words into spans of characters of the words joined by blanks."""
    split = TripleSplit([], [])
    for words, triples in rows:
        text = " ".join(words)
        ends = [end - 1 for end in accumulate(len(word) + 1 for word in words)]
        starts = [end - len(word) for end, word in zip(ends, words, strict=True)]
        split.texts.append(text)
        split.triples.append([])
        for subject, relation, object_ in triples:
            spans = [(starts[first], ends[last - 1]) for first, last in (subject, object_)]
            mentions = [text[start:end] for start, end in spans]
            split.triples[-1].append((mentions[0], relation, mentions[1], *spans))
    return split


def _rows_with_places(content: bytes) -> list[tuple[str, tuple[Any, ...], int]]:
    """Sentence and triple of each row, and how many of its places were wrong."""
    rows = []
    for row in csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")):
        text, wrong, spans = row["sentence"], 0, []
        for end in ("head", "tail"):
            mention, start = row[end], int(row[f"{end}_offset"])
            if not text.startswith(mention, start):
                if text.count(mention) != 1:
                    raise OSError(f"{mention!r} is not at {start} of {text!r}, nor there once.")
                start, wrong = text.index(mention), wrong + 1
            spans.append((start, start + len(mention)))
        rows.append((text, (row["head"], row["relation"], row["tail"], *spans), wrong))
    return rows


def _for_validation(text: str) -> bool:
    """One sentence in eight, whatever the order of the files."""
    return hashlib.sha256(text.encode("utf-8")).digest()[0] % 8 == 0


def _one_each(triple_by_text: dict[str, tuple[Any, ...]]) -> TripleSplit:
    return TripleSplit(list(triple_by_text), [[triple] for triple in triple_by_text.values()])
