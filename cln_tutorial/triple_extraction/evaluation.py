r"""Scores of predicted triples: which of them count as right, where, and against which baseline.

.. math:: P = \frac{\sum_i |G_i \cap \hat G_i|}{\sum_i |\hat G_i|}, \quad
    R = \frac{\sum_i |G_i \cap \hat G_i|}{\sum_i |G_i|}, \quad F_1 = \frac{2PR}{P+R}

Source: article 7161 and its code (tokens); the code of CasRel (first word), UniRel (last piece).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cln_tutorial.triple_extraction.baseline import DictionaryBaseline
from cln_tutorial.triple_extraction.triples import Example, Triple

# A triple as it is compared: subject, relation, object, and their places if places count.
_Key = tuple[Hashable, str, Hashable, Any, Any]
_Sides = tuple[set[Any], set[Any]]  # what a sentence has, and what was predicted for it

_MATCHES: dict[str, Callable[[str], Hashable]] = {
    "text": lambda mention: mention,
    "first_word": lambda mention: mention.split()[0],
    "last_word": lambda mention: mention.split()[-1],
}
_RULES = (*_MATCHES, "tokens", "span")
_GROUPS = ("overlap", "n_triples", "relation", "seen")
_OVERLAPS = ("normal", "seo", "epo", "soo")


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1 of counts; each is 0 where there is nothing to divide by.

    Args:
        tp: predictions that are right, each distinct one counted once per sentence.
        n_pred: predictions.
        n_gold: what should have been predicted.

    Example:
        >>> score = Score(tp=3, n_pred=4, n_gold=6)
        >>> score.precision, score.recall, score.f1
        (0.75, 0.5, 0.6)
    """

    tp: int
    n_pred: int
    n_gold: int

    @property
    def precision(self) -> float:
        """Share of the predictions that are right; 0 without any."""
        return self.tp / self.n_pred if self.n_pred else 0.0

    @property
    def recall(self) -> float:
        """Share of the gold that was found; 0 without any."""
        return self.tp / self.n_gold if self.n_gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of the two; 0 if nothing is right, also where nothing was to be found."""
        return 2 * self.tp / (self.n_pred + self.n_gold) if self.tp else 0.0


@dataclass(frozen=True)
class Report(Score):
    """What :func:`score_triples` found; ``print`` it to see the table.

    Attributes:
        match: the rule by which two mentions were compared.
        subject: of the distinct subjects alone, the first stage of a cascade.
        object_given_subject: of the triples whose subject is right, the second stage.
        groups: ``groups["overlap"]["epo"]`` is the score of that group.
        n_empty: sentences without a triple.
        false_on_empty: triples predicted on them, all of them false.
        dictionary: the score of :class:`DictionaryBaseline` on the same sentences, or None.
    """

    match: str
    subject: Score
    object_given_subject: Score
    groups: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    n_empty: int = 0
    false_on_empty: int = 0
    dictionary: Score | None = None

    @property
    def false_per_100_empty(self) -> float | None:
        """False triples per 100 sentences that have none; None if every sentence has one."""
        return 100 * self.false_on_empty / self.n_empty if self.n_empty else None

    def rows(self) -> list[dict[str, Any]]:
        """Return the table as records, one per score, ``{"group": ..., "value": ..., "f1": ...}``.

        Groups are "all", "stage", "baseline", and those of ``by``.
        """
        named: list[tuple[str, str, Score]] = [
            ("all", "triples", self),
            ("stage", "subject", self.subject),
            ("stage", "object given subject", self.object_given_subject),
        ]
        if self.dictionary is not None:
            named.append(("baseline", "dictionary", self.dictionary))
        named += [(g, v, score) for g, values in self.groups.items() for v, score in values.items()]
        return [
            {
                "group": group,
                "value": value,
                "precision": score.precision,
                "recall": score.recall,
                "f1": score.f1,
                "tp": score.tp,
                "n_pred": score.n_pred,
                "n_gold": score.n_gold,
            }
            for group, value, score in named
        ]

    def __str__(self) -> str:
        rows = self.rows()
        names = [f"{row['group']}: {row['value']}" for row in rows]
        width = max(map(len, [f"match: {self.match}", *names]))
        lines = [
            f"{f'match: {self.match}':{width}} precision recall     f1     tp   pred   gold",
            *(
                f"{name:{width}}    {row['precision']:.4f} {row['recall']:.4f} {row['f1']:.4f} "
                f"{row['tp']:6} {row['n_pred']:6} {row['n_gold']:6}"
                for name, row in zip(names, rows, strict=True)
            ),
        ]
        if self.n_empty:
            lines.append(
                f"false triples per 100 of the {self.n_empty} sentences without one: "
                f"{self.false_per_100_empty:.1f}"
            )
        return "\n".join(lines)


def score_triples(
    gold: Sequence[Any],
    pred: Sequence[Any],
    match: str | Callable[[str], Hashable] = "text",
    *,
    by: Sequence[str] = (),
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    train: Sequence[Any] | None = None,
) -> Report:
    r"""Return the micro score of sets of triples.

    .. math:: P = \frac{\sum_i |G_i \cap \hat G_i|}{\sum_i |\hat G_i|}, \quad
        R = \frac{\sum_i |G_i \cap \hat G_i|}{\sum_i |G_i|}, \quad F_1 = \frac{2PR}{P+R}

    A triple counts once per sentence, however often it is annotated or predicted. A quotient
    without denominator is 0: a set without gold and without predictions has F1 0, not 1.

    ============== ================================================================================
    match          two mentions are the same if they have the same ...
    ============== ================================================================================
    "text"         characters
    "tokens"       lower-cased pieces of ``tokenizer``: the article's rule
    "first_word"   first word: what CasRel calls partial match
    "last_word"    last word: the "star" files, which have nothing else
    "span"         place in the text, of both mentions
    a function     value, e.g. ``str.casefold``
    ============== ================================================================================

    ============== ================================================================================
    by             groups
    ============== ================================================================================
    "overlap"      sentences by :func:`overlap_class` of their gold, which may be several
    "n_triples"    sentences by how many distinct gold triples they have: "0", "1", ..., "5+"
    "relation"     triples, gold and predicted, by their relation
    "seen"         triples, gold and predicted, by whether they are in ``train``
    ============== ================================================================================

    Args:
        gold: per sentence its triples, :class:`Triple` or tuples, or an :class:`Example`.
        pred: the predictions for the same sentences, likewise.
        match: see the table.
        by: groups to score apart, see the table.
        texts: the sentences. With them, and with ``train`` as examples, the report also has the
            score of :class:`DictionaryBaseline`, except for "span".
        tokenizer: for "tokens", anything with a method ``tokenize``.
        train: for "seen" and the dictionary, as ``gold``.

    Returns:
        The report.

    Raises:
        TypeError: if a triple is none.
        ValueError: if ``gold`` and ``pred`` are not equally long; for an unknown ``match`` or
            group; if what they need is missing; if a triple has no place for "span".

    Source:
        Article 7161; the table of rules is read from the code of the public systems.

    Example:
        >>> gold = [[("Franz Kafka", "born in", "Prague"), ("Franz Kafka", "wrote", "The Castle")]]
        >>> pred = [[("Kafka", "born in", "Prague"), ("Kafka", "born in", "Prague")]]
        >>> score_triples(gold, pred).f1
        0.0
        >>> report = score_triples(gold, pred, match="last_word")
        >>> report.tp, report.n_pred, report.n_gold, report.object_given_subject.recall
        (1, 1, 2, 0.5)
    """
    by = (by,) if isinstance(by, str) else tuple(by)
    _check_request(match, by, texts, tokenizer, train)
    gold_rows, pred_rows = _read("gold", gold, match), _read("pred", pred, match)
    for name, rows in (("pred", pred_rows), ("texts", texts)):
        if rows is not None and len(rows) != len(gold_rows):
            raise ValueError(
                f"`{name}` must be of the same sentences as `gold`; got {len(rows)} and "
                f"{len(gold_rows)}."
            )
    key = _key_function(match, tokenizer)
    gold_keys = [set(map(key, row)) for row in gold_rows]
    sides = list(zip(gold_keys, (set(map(key, row)) for row in pred_rows), strict=True))

    groups: dict[str, dict[str, Score]] = {}
    for group in by:
        if group == "overlap":
            groups[group] = _by_sentence(sides, map(overlap_class, gold_rows), _OVERLAPS)
        elif group == "n_triples":
            sizes = [len({triple.key for triple in row}) for row in gold_rows]
            names = [str(size) if size < 5 else "5+" for size in sizes]
            groups[group] = _by_sentence(sides, ({name} for name in names), sorted(set(names)))
        elif group == "relation":
            names = sorted({each[1] for side in sides for keys in side for each in keys})
            groups[group] = _by_triple(sides, lambda each: each[1], names)
        else:
            known = {key(each)[:3] for row in _read("train", train) for each in row}
            groups[group] = _by_triple(
                sides,
                lambda each, known=known: "seen" if each[:3] in known else "unseen",
                ("seen", "unseen"),
            )

    dictionary = None
    if texts is not None and match != "span":  # the dictionary knows no places
        found = DictionaryBaseline().fit(train).predict(texts)
        dictionary = _count(zip(gold_keys, (set(map(key, row)) for row in found), strict=True))
    empty = [found for truth, found in sides if not truth]
    total = _count(sides)
    return Report(
        tp=total.tp,
        n_pred=total.n_pred,
        n_gold=total.n_gold,
        match=match if isinstance(match, str) else getattr(match, "__name__", repr(match)),
        subject=_count(_subjects(each) for each in sides),
        object_given_subject=_count(_with_right_subject(each) for each in sides),
        groups=groups,
        n_empty=len(empty),
        false_on_empty=sum(map(len, empty)),
        dictionary=dictionary,
    )


def overlap_class(
    triples: Iterable[Triple | tuple[Any, ...]], *, ordered: bool = True
) -> frozenset[str]:
    """Return which kinds of overlap the triples of a sentence have.

    ======== ===================================================================================
    class    of the distinct triples
    ======== ===================================================================================
    "epo"    two have the same pair of entities (entity pair overlap)
    "seo"    an entity stands more than once in their distinct pairs (single entity overlap)
    "normal" neither
    "soo"    in one of them, subject or object contains the other (subject object overlap); beside
             "normal" too
    ======== ===================================================================================

    With these definitions the test file of NYT* has the published counts: 3266 normal, 1297 SEO,
    978 EPO, 45 SOO.

    Args:
        triples: those of one sentence. Repeats are no overlap; some public scripts count them.
        ordered: whether (a, b) and (b, a) are two pairs, sharing entities, and not one. Public
            scripts differ.

    Returns:
        Its classes; none for a sentence without a triple.

    Raises:
        TypeError: if a triple is none.

    Source:
        Zeng et al. 2018 (the classes); Wei et al. 2020 (CasRel), whose script is followed.

    Example:
        >>> overlap_class([("Kafka", "born in", "Prague"), ("Kafka", "wrote", "The Castle")])
        frozenset({'seo'})
        >>> there_and_back = [("Prague", "in", "Bohemia"), ("Bohemia", "has", "Prague")]
        >>> overlap_class(there_and_back), overlap_class(there_and_back, ordered=False)
        (frozenset({'seo'}), frozenset({'epo'}))
    """
    keys = {_triple(each, f"triples[{i}]").key for i, each in enumerate(triples)}
    if not keys:
        return frozenset()
    pairs = [(s, o) if ordered else tuple(sorted((s, o))) for s, _, o in keys]
    entities = Counter(entity for pair in set(pairs) for entity in pair)
    classes = set()
    if len(set(pairs)) < len(pairs):
        classes.add("epo")
    if max(entities.values()) > 1:
        classes.add("seo")
    if not classes:
        classes.add("normal")
    if any(s in o or o in s for s, _, o in keys):
        classes.add("soo")
    return frozenset(classes)


def _check_request(
    match: str | Callable[[str], Hashable],
    by: Sequence[str],
    texts: Sequence[str] | None,
    tokenizer: Any,
    train: Sequence[Any] | None,
) -> None:
    if not callable(match) and match not in _RULES:
        raise ValueError(
            f"`match` must be a function of a mention, or one of {', '.join(_RULES)}; "
            f"got {match!r}."
        )
    if match == "tokens" and not hasattr(tokenizer, "tokenize"):
        raise ValueError(
            "match 'tokens' needs a `tokenizer` with a method `tokenize`, as those of Hugging "
            f"Face have; got {tokenizer!r}."
        )
    for group in by:
        if group not in _GROUPS:
            raise ValueError(f"`by` must be of {', '.join(_GROUPS)}; got {group!r}.")
    if "seen" in by and train is None:
        raise ValueError("the group 'seen' needs `train`, the triples to have been seen.")
    if texts is not None and not (train and all(isinstance(each, Example) for each in train)):
        raise ValueError(
            "`texts` are for the dictionary, which needs `train`: the examples to make it of."
        )


def _triple(given: Any, where: str) -> Triple:
    if isinstance(given, Triple):
        return given
    if isinstance(given, tuple | list) and len(given) in (3, 5):
        try:
            return Triple(*given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{where}`: {error}") from error
    raise TypeError(
        f"`{where}` must be a Triple or a tuple (subject, relation, object), with the two spans "
        f"behind it or without; got {given!r}."
    )


def _read(
    name: str, rows: Sequence[Any], match: str | Callable[[str], Hashable] = "text"
) -> list[list[Triple]]:
    """Make lists of triples of what was given; for the rule "span" each must have its places."""
    read = [
        [
            _triple(each, f"{name}[{i}][{j}]")
            for j, each in enumerate(row.triples if isinstance(row, Example) else row)
        ]
        for i, row in enumerate(rows)
    ]
    if match == "span":
        for i, row in enumerate(read):
            for j, each in enumerate(row):
                if each.subject_span is None or each.object_span is None:
                    raise ValueError(f"match 'span' needs places; `{name}[{i}][{j}]` is {each!r}.")
    return read


def _key_function(
    match: str | Callable[[str], Hashable], tokenizer: Any
) -> Callable[[Triple], _Key]:
    mention: Callable[[str], Hashable]
    if callable(match):
        mention = match
    elif match == "tokens":
        mention = cache(lambda text: _pieces(tokenizer, text))
    else:
        mention = _MATCHES.get(match, _MATCHES["text"])

    def key(triple: Triple) -> _Key:
        places = (triple.subject_span, triple.object_span) if match == "span" else (None, None)
        return mention(triple.subject), triple.relation, mention(triple.object), *places

    return key


def _pieces(tokenizer: Any, mention: str) -> tuple[str, ...]:
    """Lower-cased pieces; the words themselves if the vocabulary lacks one.

    Otherwise all names of three unknown characters were the same name.
    """
    pieces = tuple(tokenizer.tokenize(mention.lower()))
    unknown = getattr(tokenizer, "unk_token", None)
    return tuple(mention.lower().split()) if unknown in pieces else pieces


def _count(sides: Iterable[_Sides]) -> Score:
    tp = n_pred = n_gold = 0
    for gold, pred in sides:
        tp, n_pred, n_gold = tp + len(gold & pred), n_pred + len(pred), n_gold + len(gold)
    return Score(tp, n_pred, n_gold)


def _subject(key: _Key) -> tuple[Hashable, Any]:
    return key[0], key[3]


def _subjects(sides: _Sides) -> _Sides:
    gold, pred = ({_subject(key) for key in side} for side in sides)
    return gold, pred


def _with_right_subject(sides: _Sides) -> _Sides:
    right = set.intersection(*_subjects(sides))
    gold, pred = ({key for key in side if _subject(key) in right} for side in sides)
    return gold, pred


def _by_sentence(
    sides: Sequence[_Sides], classes: Iterable[Iterable[str]], names: Iterable[str]
) -> dict[str, Score]:
    of = list(zip(sides, classes, strict=True))
    return {name: _count(each for each, mine in of if name in mine) for name in names}


def _by_triple(
    sides: Iterable[_Sides], name_of: Callable[[_Key], str], names: Iterable[str]
) -> dict[str, Score]:
    tp: Counter[str] = Counter()
    n_pred: Counter[str] = Counter()
    n_gold: Counter[str] = Counter()
    for gold, pred in sides:
        tp.update(map(name_of, gold & pred))
        n_pred.update(map(name_of, pred))
        n_gold.update(map(name_of, gold))
    return {name: Score(tp[name], n_pred[name], n_gold[name]) for name in names}
