"""Triples of a sentence, and sentences with their triples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]


@dataclass(frozen=True)
class Triple:
    """A relation between two pieces of a text, the subject and the object.

    Args:
        subject, object: the mentions, as they stand in the text.
        relation: its name.
        subject_span, object_span: where they stand, ``(start, end)`` in characters of the text, the
            end excluded; ``None`` where nobody knows.
        score: of a prediction, between 0 and 1.

    Raises:
        TypeError: if a mention or the relation is no string, or a span no pair of integers.
        ValueError: if a mention is empty or white space, or a span is not as long as its mention.

    Example:
        >>> triple = Triple("Kafka", "born in", "Prague", (0, 5), (18, 24))
        >>> triple.key
        ('Kafka', 'born in', 'Prague')
    """

    subject: str
    relation: str
    object: str
    subject_span: Span | None = None
    object_span: Span | None = None
    score: float | int = 1.0

    def __post_init__(self) -> None:
        for name in ("subject", "relation", "object"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"`{name}` must be a string; got {value!r}.")
            if not value.strip():
                raise ValueError(f"`{name}` must not be empty or white space; got {value!r}.")
        for name in ("subject", "object"):
            mention, span = getattr(self, name), getattr(self, f"{name}_span")
            if span is None:
                continue
            if not (
                isinstance(span, Sequence)
                and len(span) == 2
                and all(isinstance(each, int) and not isinstance(each, bool) for each in span)
            ):
                raise TypeError(f"`{name}_span` must be a pair of integers or None; got {span!r}.")
            if span[0] < 0 or span[1] - span[0] != len(mention):
                raise ValueError(
                    f"`{name}_span` {tuple(span)} does not fit the {name} {mention!r}, which has "
                    f"{len(mention)} characters."
                )
            object.__setattr__(self, f"{name}_span", (span[0], span[1]))

    @property
    def key(self) -> tuple[str, str, str]:
        """Subject, relation and object, without the places."""
        return self.subject, self.relation, self.object


@dataclass(frozen=True)
class Example:
    """A text with its triples.

    Args:
        text: any string.
        triples: each a :class:`Triple` or a tuple ``(subject, relation, object)``, with the two
            spans behind it where they are known.

    Raises:
        TypeError: if ``text`` is no string, or a triple neither of the two.
        ValueError: if a span does not hold its mention; the message has the triple's index.

    Example:
        >>> example = Example("Kafka was born in Prague.", [("Kafka", "born in", "Prague")])
        >>> example.triples[0].object
        'Prague'
    """

    text: str
    triples: Iterable[Triple | tuple[Any, ...]] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"`text` must be a string; got {type(self.text).__name__}.")
        object.__setattr__(
            self, "triples", tuple(self._checked(i, each) for i, each in enumerate(self.triples))
        )

    def _checked(self, index: int, given: Triple | Sequence[Any]) -> Triple:
        if isinstance(given, Triple):
            triple = given
        elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) in (3, 5):
            triple = Triple(*given)
        else:
            raise TypeError(
                f"`triples[{index}]` must be a Triple or a tuple (subject, relation, object), with "
                f"the two spans behind it or without; got {given!r}."
            )
        for name in ("subject", "object"):
            mention, span = getattr(triple, name), getattr(triple, f"{name}_span")
            if span is not None and self.text[slice(*span)] != mention:
                raise ValueError(
                    f"`triples[{index}]`: the text has {self.text[slice(*span)]!r} at {span}, not "
                    f"the {name} {mention!r}."
                )
        return triple
