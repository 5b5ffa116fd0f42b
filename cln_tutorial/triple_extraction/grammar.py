"""Made sentences with triples whose places are known, in English and in Chinese.

What makes extraction hard is there on purpose, each under its name: entities that triples share,
names inside names, the same name twice, names without a triple, emoji.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch

from cln_tutorial.triple_extraction.triples import Example, Span, Triple

RELATIONS = (
    "born in",
    "died in",
    "works for",
    "founded",
    "wrote",
    "married to",
    "located in",
    "capital of",
)
KINDS = ("normal", "seo", "epo", "soo", "nested", "repeated", "empty")

EMOJI = ("🦊 ", "👩🏽‍🚀 ", "🏳️‍🌈 ", "🇨🇭 ")  # one character to the eye, up to four to Python
HALF, THIRD, TENTH, HELD_OUT = 1 / 2, 1 / 3, 1 / 10, 5

Item = TypeVar("Item")
Written = tuple[str, list[str]]  # a pattern and its triples, as "a wrote b"


def made_sentences(
    n: int,
    generator: torch.Generator | None = None,
    *,
    language: str = "en",
    kinds: Sequence[str] = KINDS,
    held_out: bool = False,
) -> list[Example]:
    """Make sentences with all their triples, each with the places of its mentions.

    Args:
        n: number of sentences.
        generator: the global one if there is none.
        language: "en" or "zh". The relations, ``RELATIONS``, have English names in both.
        kinds: those to draw from, all alike. "normal": one triple, or two with nothing in common;
            "seo": several triples with one entity in common; "epo": two of the same pair; "soo":
            the name of the subject has the object in it; "nested": the same, and the object is
            the subject of another triple, so that two subjects start at the same place, of which
            decoding by the nearest end finds the shorter one only;
            "repeated": a name stands there once more, before its triple; "empty": names, no triple.
        held_out: whether the names are those that no other sentence has, a fifth of them. Then no
            triple has been seen, either.

    Raises:
        ValueError: for a negative number, an unknown language or an unknown kind.

    Example:
        >>> from cln_tutorial.triple_extraction.grammar import made_sentences
        >>> rng = torch.Generator().manual_seed(0)
        >>> (example,) = made_sentences(1, rng, kinds=["soo"])
        >>> example.text
        'Ostholm University bears the name of its town.'
        >>> example.triples[0].key
        ('Ostholm University', 'located in', 'Ostholm')
    """
    if n < 0:
        raise ValueError(f"`n` must be at least 0; got {n}.")
    if language not in _LANGUAGES:
        raise ValueError(f"`language` must be one of {tuple(_LANGUAGES)}; got {language!r}.")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"`kinds` must be some of {KINDS}; got {kinds!r}.")
    seed = int(torch.randint(2**62, (), generator=generator))
    writer = _Writer(_LANGUAGES[language], random.Random(seed), held_out)
    return [writer.sentence(writer.choose(kinds)) for _ in range(n)]


@dataclass(frozen=True)
class _Language:
    """Words and phrases of a language; ``{s}`` and ``{o}`` are a subject and an object."""

    names: dict[str, tuple[str, str]]  # by kind, their first and second halves
    # By relation: kinds of subject and object, what the subject does, sentences the other way.
    predicates: dict[str, tuple[str, str, list[str], list[str]]]
    same_pair: list[tuple[str, str, str]]  # with its two relations
    own_name: list[str]  # {s} has the place {o} in its name and stands there
    capital: list[str]  # the same, and {o} is the capital of {c}
    before: list[str]  # says no more than that there is {x}
    empty: list[str]  # people {p}, {q}, a place {l}, an organisation {g}, a work {w}
    space: str
    comma: str
    conjunction: str
    two: str  # subjects, {s} and {t}
    stop: str


class _Writer:
    """Writes patterns, where ``[a:...]`` is the mention a and ``{place7}`` a name to be drawn."""

    def __init__(self, language: _Language, rng: random.Random, held_out: bool):
        self.language, self.rng = language, rng
        # Both halves of a name that is held out are in other names, too.
        self.names = {
            kind: [
                first + second
                for (i, first), (j, second) in product(
                    enumerate(firsts.split(",")), enumerate(seconds.split(","))
                )
                if kind == "suffix" or ((i + j) % HELD_OUT == 0) == held_out
            ]
            for kind, (firsts, seconds) in language.names.items()
        }
        self.number = 0

    def choose(self, items: Sequence[Item]) -> Item:
        # Only `random()` is promised to draw the same in every version of Python.
        return items[int(self.rng.random() * len(items))]

    def sentence(self, kind: str) -> Example:
        pattern, triples = getattr(self, kind)()
        if self.rng.random() < TENTH:
            pattern = self.choose(EMOJI) + pattern
        return _read(self._with_names(pattern + self.language.stop), triples)

    def normal(self) -> Written:
        relation = self.choose(RELATIONS)
        pattern, triples = self._clause(relation, "a", "b")
        if self.rng.random() < HALF:
            # The same relation twice would be a question of nothing but the distance.
            rest = [each for each in RELATIONS if each != relation]
            other, others = self._clause(self.choose(rest), "c", "d")
            return pattern + self.language.comma + other, triples + others
        return pattern, triples

    def seo(self) -> Written:
        language, predicates = self.language, self.language.predicates
        if self.rng.random() < THIRD:  # two subjects
            relation = self.choose(RELATIONS[:5])
            kind, other, phrases, _ = predicates[relation]
            pattern = _fill(language.two, s=self._mention("a", kind), t=self._mention("c", kind))
            phrase = _fill(self.choose(phrases), o=self._mention("b", other))
            triples = [f"a {relation} b", f"c {relation} b"]
            return pattern + language.space + phrase, triples
        relations = list(RELATIONS[:6])  # of people
        while len(relations) > 3 or (len(relations) > 2 and self.rng.random() < HALF):
            relations.remove(self.choose(relations))
        said = [
            _fill(
                self.choose(predicates[relation][2]),
                o=self._mention(letter, predicates[relation][1]),
            )
            for letter, relation in zip("bcd", relations, strict=False)
        ]
        pattern = self._mention("a", "person") + language.space + language.comma.join(said[:-1])
        triples = [f"a {relation} {o}" for o, relation in zip("bcd", relations, strict=False)]
        return pattern + language.conjunction + said[-1], triples

    def epo(self) -> Written:
        pattern, *relations = self.choose(self.language.same_pair)
        kind, other, _, _ = self.language.predicates[relations[0]]
        pattern = _fill(pattern, s=self._mention("a", kind), o=self._mention("b", other))
        return pattern, [f"a {relation} b" for relation in relations]

    def soo(self) -> Written:
        pattern = _fill(self.choose(self.language.own_name), s=self._named_after_b())
        return pattern, ["a located in b"]

    def nested(self) -> Written:
        land = self._mention("c", "country")
        pattern = _fill(self.choose(self.language.capital), s=self._named_after_b(), c=land)
        return pattern, ["a located in b", "b capital of c"]

    def repeated(self) -> Written:
        relation = self.choose(RELATIONS[:7])
        pattern, triples = self._clause(relation, "a", "b")
        twice = re.search(rf"\[{self.choose('ab')}:(.*?)]", pattern)
        assert twice
        return _fill(self.choose(self.language.before), x=twice[1]) + pattern, triples

    def empty(self) -> Written:
        names = {
            letter: self._name(kind)
            for letter, kind in zip(
                "pqlgw", ["person", "person", "place", "organisation", "work"], strict=True
            )
        }
        return _fill(self.choose(self.language.empty), **names), []

    def _clause(self, relation: str, subject: str, object_: str) -> Written:
        kind, other, phrases, turned = self.language.predicates[relation]
        s, o = self._mention(subject, kind), self._mention(object_, other)
        triples = [f"{subject} {relation} {object_}"]
        if turned and self.rng.random() < THIRD:
            return _fill(self.choose(turned), s=s, o=o), triples
        return s + self.language.space + _fill(self.choose(phrases), o=o), triples

    def _named_after_b(self) -> str:
        return f"[a:{self._mention('b', 'place')}{self._name('suffix')}]"

    def _mention(self, letter: str, kind: str) -> str:
        return f"[{letter}:{self._name(kind)}]"

    def _name(self, kind: str) -> str:
        self.number += 1
        if kind == "organisation":
            return f"{{place{self.number}}}{{suffix{self.number}}}"
        return f"{{{kind}{self.number}}}"

    def _with_names(self, pattern: str) -> str:
        """Replace each ``{place7}`` by a name of its own."""
        drawn: dict[str, str] = {}
        for slot, kind in re.findall(r"{(([a-z]+)\d+)}", pattern):
            while slot not in drawn:
                name = self.choose(self.names[kind])
                if kind == "suffix" or name not in drawn.values():
                    drawn[slot] = name
        return _fill(pattern, **drawn)


def _fill(pattern: str, **parts: str) -> str:
    """As ``str.format``, but other braces stay."""
    return re.sub(r"{(\w+)}", lambda slot: parts.get(slot[1], slot[0]), pattern)


def _read(pattern: str, triples: list[str]) -> Example:
    """Take the brackets out and remember where they were."""
    text, spans, open_ = "", dict[str, Span](), []
    for piece in re.split(r"(\[\w:|\])", pattern):
        if piece.startswith("["):
            open_.append((piece[1], len(text)))
        elif piece == "]":
            letter, start = open_.pop()
            spans[letter] = start, len(text)
        else:
            text += piece

    def mention(letter: str) -> tuple[str, Span]:
        return text[slice(*spans[letter])], spans[letter]

    found = []
    for triple in triples:
        (subject, subject_span), (object_, object_span) = mention(triple[0]), mention(triple[-1])
        found.append(Triple(subject, triple[2:-2], object_, subject_span, object_span))
    return Example(text, found)


_ENGLISH = _Language(
    names={
        "person": (
            "Mira,Ada,Juno,Otto,Ravi,Lena,Noor,Emil,Thea,Igor,Yara,Hugo,Suri,Anton,Béla",
            " Toven, Kast, Marlow, Brenn, Solano, Quist, Idris, Feld, Varga, Lund, Rossi, Penn",
        ),
        "place": (
            "Bel,Tor,Ash,Wil,Kor,Mun,Har,Ost,Sel,Dra,Lim,Pol",
            "mar,ford,wick,burg,ville,stad,holm,port,dale,nau",
        ),
        "suffix": ("", " University, Museum, Opera, Bank, Zoo"),
        "country": ("Nor,Vel,Ist,Car,Ober,Lys", "ia,land,mark,ovia,onia"),
        "work": (
            "Blue,Winter,Silent,Little,Second,Hollow,Salt,Paper",
            " Songs, Letters, Garden, River, Moon 🌙, Hours, Sea 🌊, Maps",
        ),
    },
    predicates={
        "born in": (
            "person",
            "place",
            ["was born in {o}", "is a native of {o}"],
            ["{o} is where {s} was born"],
        ),
        "died in": (
            "person",
            "place",
            ["died in {o}", "lies buried in {o}"],
            ["{o} is where {s} died"],
        ),
        "works for": (
            "person",
            "organisation",
            ["works for {o}", "has a job at {o}"],
            ["{o} employs {s}"],
        ),
        "founded": (
            "person",
            "organisation",
            ["founded {o}", "set up {o}"],
            ["{o} was founded by {s}"],
        ),
        "wrote": (
            "person",
            "work",
            ["wrote {o}", "is the author of {o}"],
            ["{o} is a book by {s}"],
        ),
        "married to": ("person", "person", ["married {o}", "is the spouse of {o}"], []),
        "located in": (
            "organisation",
            "place",
            ["stands in {o}", "is to be found in {o}"],
            ["{o} is home to {s}"],
        ),
        "capital of": ("place", "country", ["is the capital of {o}"], ["{o} is ruled from {s}"]),
    },
    same_pair=[
        ("{s} was born and died in {o}", "born in", "died in"),
        ("{s} founded {o} and works for it", "founded", "works for"),
        ("{o} employs {s}, who set it up", "works for", "founded"),
    ],
    own_name=["{s} bears the name of its town", "{s} is named after its town"],
    capital=["{s} adorns the capital of {c}", "{s} is the pride of the capital of {c}"],
    before=["Who knows {x}? ", "So much for {x}. ", "Ah, {x}! "],
    empty=[
        "{p} walked past {g}",
        "{p} never heard of {w}",
        "{p} and {q} took a train to {l}",
        "It rains in {l}, and {p} waits",
    ],
    space=" ",
    comma=", ",
    conjunction=" and ",
    two="{s}, like {t},",
    stop=".",
)

_CHINESE = _Language(
    names={
        "person": (
            "赵,钱,孙,李,周,吴,郑,王,冯,陈,卫,蒋,沈,韩",
            "文君,小兰,子墨,思远,一鸣,海燕,若曦,志强,雨桐,天佑,美玲,建国,晓峰,静怡,浩然",
        ),
        "place": ("青,白,云,安,永,长,东,和,平,临,金,玉", "州,江,城,山,阳,宁,海,川,原,溪"),
        "suffix": ("", "大学,博物馆,歌剧院,银行,动物园"),
        "country": ("南,北,西,上,下", "兰国,泽国,岭国,林国,罗国"),
        "work": (
            "蓝色,冬日,沉默,第二,空心,纸上,旧时,夜半",
            "之歌,来信,花园,河流,月亮🌙,时光,大海🌊,地图",
        ),
    },
    predicates={
        "born in": ("person", "place", ["出生于{o}", "是{o}人"], ["{o}是{s}的出生地"]),
        "died in": ("person", "place", ["在{o}去世", "葬于{o}"], ["{o}是{s}去世的地方"]),
        "works for": ("person", "organisation", ["在{o}工作", "任职于{o}"], ["{o}聘用了{s}"]),
        "founded": ("person", "organisation", ["创办了{o}", "建立了{o}"], ["{o}由{s}创办"]),
        "wrote": ("person", "work", ["写了《{o}》", "是《{o}》的作者"], ["《{o}》是{s}的书"]),
        "married to": ("person", "person", ["和{o}结了婚", "是{o}的配偶"], []),
        "located in": ("organisation", "place", ["位于{o}", "坐落在{o}"], ["{o}有{s}"]),
        "capital of": ("place", "country", ["是{o}的首都"], ["{o}定都{s}"]),
    },
    same_pair=[
        ("{s}生于{o}，也死在那里", "born in", "died in"),
        ("{s}创办了{o}并在那里工作", "founded", "works for"),
        ("{o}聘用了它的创办人{s}", "works for", "founded"),
    ],
    own_name=["{s}就在它名字里的城市", "{s}以所在的城市命名"],
    capital=["{s}为{c}的首都增光", "{s}是{c}首都的骄傲"],
    before=["说到{x}，", "又是{x}！", "谁不知道{x}？"],
    empty=["{p}走过{g}", "{p}从没听说过《{w}》", "{p}和{q}坐火车去{l}", "{l}下着雨，{p}在等"],
    space="",
    comma="，",
    conjunction="，并",
    two="{s}和{t}都",
    stop="。",
)

_LANGUAGES = {"en": _ENGLISH, "zh": _CHINESE}
