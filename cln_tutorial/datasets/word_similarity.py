"""Pairs of words, and how similar people found them: WordSim-353 and MEN."""

import csv
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from cln_tutorial.datasets.sources import lines


@dataclass(frozen=True, eq=False)
class WordPairs:
    """Pairs in the order of the file; nothing is removed, because published figures use all.

    Attributes:
        pairs: two words each, with the capitals of the file ("FBI", "Jerusalem").
        scores: ``scores[i]`` is how similar ``pairs[i]`` is, a mean over people.
        scale: lowest and highest possible score.
        left_in: what is wrong with the pairs and was left in, in words, and how many.
    """

    pairs: tuple[tuple[str, str], ...]
    scores: Float64[np.ndarray, "pairs"]
    scale: tuple[float | int, float | int]
    left_in: dict[str, int]


@dataclass(frozen=True, eq=False)
class WordSimilarity:
    """Two sets of scored pairs; ``print`` it to read what is wrong with them.

    Attributes:
        name: what :func:`load` was asked for.
        wordsim353: 353 pairs of similar *or* related words (Finkelstein et al. 2002).
        men: 3,000 pairs of related words (Bruni, Tran & Baroni 2014).
        sha256: digest of the raw content of each source file.
        licence: what the origins state.
        source: where the files come from.
    """

    name: str
    wordsim353: WordPairs
    men: WordPairs
    sha256: dict[str, str]
    licence: str
    source: str

    def __str__(self) -> str:
        sides = {"WordSim-353": self.wordsim353, "MEN": self.men}
        sizes = " and ".join(f"{len(each.pairs):,} pairs ({key})" for key, each in sides.items())
        return "\n".join(
            [
                f"{self.name}: {sizes}",
                *(
                    f"left in: {count:,} {what} ({key})"
                    for key, each in sides.items()
                    for what, count in each.left_in.items()
                ),
                f"licence: {self.licence}",
                f"source: {self.source}",
            ]
        )


def parse_word_similarity(raw: dict[str, bytes], **about) -> WordSimilarity:
    """``word,word,score`` under a header, and ``word word score``; one pair a line."""
    wordsim353, men = map(lines, raw.values())
    return WordSimilarity(
        wordsim353=_pairs(list(csv.reader(wordsim353))[1:], highest=10),
        men=_pairs([line.split() for line in men], highest=50),
        **about,
    )


def _pairs(rows: list[list[str]], highest: int) -> WordPairs:
    pairs = tuple((first, second) for first, second, _ in rows)
    return WordPairs(
        pairs=pairs,
        scores=np.array([float(score) for *_, score in rows]),
        scale=(0, highest),
        left_in={
            "pairs that repeat an earlier pair, in this or the other order": len(pairs)
            - len({frozenset(pair) for pair in pairs}),
            "pairs of a word with itself": sum(first == second for first, second in pairs),
        },
    )
