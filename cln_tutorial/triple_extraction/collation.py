"""Sentences with triples, made to the batch that the extractor trains on.

Labels are the indices of the ones: a sentence of 64 tokens has 27 000 cells for the objects of one
subject and 211 relations, and two of them are one.
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cln_tutorial.triple_extraction.alignment import Window, encode_windows, locate, pad_windows
from cln_tutorial.triple_extraction.sampling import article_pair_distribution, draw_article_subject
from cln_tutorial.triple_extraction.triples import Example, Span, Triple

Negatives = Literal["article", "none", "crossed", "objects", "random", "predicted"]
Subjects = Literal["all", "one"]
Occurrence = Literal["all", "first", "word"]
OnUnaligned = Literal["warn", "raise", "drop"]

# The subjects of a window with their objects, all in tokens: (relation, first, last).
Gold = dict[Span, set[tuple[int, int, int]]]

LONGEST_RANDOM = 8  # tokens of a random span
ENCODED_AT_ONCE = 256


class TripleCollator:
    r"""Make batches of sentences and their triples.

    Every row of the object tagger is one subject of one sentence, and its labels are the objects of
    *this* subject. A row that is no subject, a negative, has none: it teaches the object tagger to
    answer nothing when the subject tagger errs. The subject tagger is always taught all subjects.

    Args:
        tokenizer: a fast one of Hugging Face, or a ``CharTokenizer``.
        relations: their names, in the order of the model.
        negatives: where they come from. "article": the start of one subject and the end of a later
            one, with the chances that article 7161 gives them; "crossed": the same pairs, all
            alike; "objects": objects that are no subjects; "random": any span of up to 8 tokens;
            "predicted": the spans of :attr:`predicted`; "none".
        subjects: "all" of a sentence are rows, or "one" of them, drawn uniformly. "one" with
            ``negatives="article"`` is the article: its one draw is a subject or a negative.
        n_negative: most negatives of a sentence. They differ from each other and from the subjects,
            so that there may be fewer. The article's one draw does not count as one.
        keep_empty: whether windows without triple stay, for the subject tagger; they have rows with
            "random" and "predicted" negatives only.
        occurrence: where a mention without a span stands: at "all" its occurrences, the "first", or
            all that are a "word", with no letter on either side.
        on_unaligned: what to do with a triple with a mention that is not in the text or on no
            token: "warn" once and leave it out, "raise", or "drop" it without a word.
        max_length: most tokens of a window; by default the tokenizer's own limit, if it has one.
        stride: tokens that two windows share. A triple belongs to the windows that hold both of
            its mentions.
        generator: for the draws; the global one if there is none. The workers of a loader all draw
            the same from a given one, but each its own from the global one.

    Attributes:
        predicted: from a text to spans of characters that the model takes for subjects, right or
            wrong; a training loop puts them there.
        n_cut: triples that no window held, over all calls.
        n_unaligned: triples with a mention not in the text or on no token, over all calls.

    Raises:
        ValueError: for an unknown choice, a relation that stands twice or none at all, or
            ``n_negative`` below 0.

    Source:
        Article 7161 and its code ("article" negatives, one subject of a sentence).

    Example:
        >>> from cln_tutorial.triple_extraction.characters import CharTokenizer
        >>> from cln_tutorial.triple_extraction.collation import TripleCollator
        >>> from cln_tutorial.triple_extraction.triples import Example
        >>> example = Example("Ada met Bea", [("Ada", "met", "Bea")])
        >>> collate = TripleCollator(CharTokenizer.fit([example.text]), ["met"], negatives="none")
        >>> batch = collate([example])
        >>> batch["subject_spans"]  # after [CLS]
        tensor([[1, 3]])
        >>> batch["object_labels"]  # row, token, relation, start or end
        tensor([[ 0,  9,  0,  0],
                [ 0, 11,  0,  1]])
    """

    def __init__(
        self,
        tokenizer: Any,
        relations: Sequence[str],
        *,
        negatives: Negatives = "article",
        subjects: Subjects = "all",
        n_negative: int = 1,
        keep_empty: bool = True,
        occurrence: Occurrence = "all",
        on_unaligned: OnUnaligned = "warn",
        max_length: int | None = None,
        stride: int = 0,
        generator: torch.Generator | None = None,
    ):
        _require_choice("negatives", negatives, Negatives)
        _require_choice("subjects", subjects, Subjects)
        _require_choice("occurrence", occurrence, Occurrence)
        _require_choice("on_unaligned", on_unaligned, OnUnaligned)
        if isinstance(relations, str) or not relations or len(set(relations)) != len(relations):
            raise ValueError(f"`relations` must be names, each once; got {relations!r}.")
        if n_negative < 0:
            raise ValueError(f"`n_negative` must be at least 0; got {n_negative}.")
        self.tokenizer, self.relations = tokenizer, tuple(relations)
        self.negatives, self.subjects, self.n_negative = negatives, subjects, n_negative
        self.keep_empty, self.occurrence, self.on_unaligned = keep_empty, occurrence, on_unaligned
        self.max_length, self.stride, self.generator = max_length, stride, generator
        self.predicted: Mapping[str, Sequence[Span]] = {}
        self.n_cut = self.n_unaligned = 0
        self._index = {name: i for i, name in enumerate(self.relations)}

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the batch for ``model(**batch)``, of int64 unless said otherwise.

        Args:
            examples: sentences with their triples. A text of several windows has a row for each.

        Returns:
            ``input_ids``, ``attention_mask``, ``(B, L)``; ``token_mask``, ``(B, L)``, bool, where
            a span may stand; ``token_type_ids`` if the tokenizer gives them; ``subject_labels``,
            ``(P, 3)``, the indices (window, token, start or end) of the ones; ``subject_spans``,
            ``(N, 2)``, first and last token of each row; ``subject_batch``, ``(N,)``, its window;
            ``object_labels``, ``(P, 4)``, the indices (row, token, relation, start or end).

        Raises:
            TypeError: if an example is none.
            ValueError: for an unknown relation, with the example's index; for a mention that is on
                no token, if asked; if no sentence is left.
        """
        windows, gold = self._labelled(examples)
        if not self.keep_empty:
            windows = [window for window, subjects in zip(windows, gold, strict=True) if subjects]
            gold = [subjects for subjects in gold if subjects]
        if not windows:
            raise ValueError("`examples` must have a sentence with a triple, or `keep_empty` set.")
        batch = self._padded(windows)
        subject_labels, object_labels = set(), set()
        spans: list[Span] = []
        rows_of: list[int] = []
        for b, (window, subjects) in enumerate(zip(windows, gold, strict=True)):
            subject_labels |= {(b, span[side], side) for span in subjects for side in (0, 1)}
            for span in self._rows(window, subjects, batch["token_mask"][b]):
                object_labels |= {
                    (len(spans), last if side else first, relation, side)
                    for relation, first, last in subjects.get(span, ())
                    for side in (0, 1)
                }
                spans.append(span)
                rows_of.append(b)
        return batch | {
            "subject_labels": _indices(sorted(subject_labels), 3),
            "subject_spans": _indices(spans, 2),
            "subject_batch": torch.tensor(rows_of, dtype=torch.int64),
            "object_labels": _indices(sorted(object_labels), 4),
        }

    def label_priors(self, examples: Sequence[Example]) -> tuple[float, list[float]]:
        """Return the share of ones among the cells, for the ``prior`` of a model.

        Args:
            examples: those to train on, with or without keeping the empty ones as in a batch.

        Returns:
            The share among the cells of the subject tagger, and for each relation that among the
            cells of the object tagger, of true subjects only. A relation that never occurs counts
            as half a one, so that its share is not 0.

        Raises:
            TypeError, ValueError: as for a batch.
        """
        tokens = tokens_of_rows = n_subject = 0
        n_object = torch.zeros(len(self.relations), dtype=torch.int64)
        for first in range(0, len(examples), ENCODED_AT_ONCE):
            windows, gold = self._labelled(examples[first : first + ENCODED_AT_ONCE], first)
            lengths = self._padded(windows)["token_mask"].sum(1).tolist()
            for length, subjects in zip(lengths, gold, strict=True):
                if not subjects and not self.keep_empty:
                    continue
                tokens += length
                tokens_of_rows += length * len(subjects)
                n_subject += sum(len(set(side)) for side in zip(*subjects, strict=True))
                for objects in subjects.values():
                    ones = {(r, i, 0) for r, i, _ in objects} | {(r, j, 1) for r, _, j in objects}
                    for relation, _, _ in ones:
                        n_object[relation] += 1
        if not n_subject:
            raise ValueError("`examples` must have a sentence with a triple; got none.")
        share = n_object.double().clamp(min=0.5) / (2 * tokens_of_rows)
        return n_subject / (2 * tokens), share.tolist()

    def _padded(self, windows: list[Window]) -> dict[str, Tensor]:
        return pad_windows(windows, getattr(self.tokenizer, "pad_token_id", None) or 0)

    def _labelled(
        self, examples: Sequence[Example], first: int = 0
    ) -> tuple[list[Window], list[Gold]]:
        """Encode the texts and find the triples of every window."""
        for i, example in enumerate(examples):
            if not isinstance(example, Example):
                raise TypeError(f"`examples[{first + i}]` must be an Example; got {example!r}.")
            for triple in example.triples:
                if triple.relation not in self._index:
                    raise ValueError(
                        f"`examples[{first + i}]` has the relation {triple.relation!r}, which is "
                        f"none of the {len(self.relations)} `relations`."
                    )
        texts = [example.text for example in examples]
        windows = encode_windows(
            self.tokenizer, texts, max_length=self.max_length, stride=self.stride
        )
        gold: list[Gold] = [{} for _ in windows]
        of_text: list[list[int]] = [[] for _ in texts]
        for w, window in enumerate(windows):
            of_text[window.text_index].append(w)
        for i, example in enumerate(examples):
            pieces = [windows[w] for w in of_text[i]]
            for triple in example.triples:
                found = self._find(example.text, triple, pieces, first + i)
                for w, subject, (start, end) in found:
                    objects = gold[of_text[i][w]].setdefault(subject, set())
                    objects.add((self._index[triple.relation], start, end))
        return windows, gold

    def _find(
        self, text: str, triple: Triple, pieces: list[Window], index: int
    ) -> list[tuple[int, Span, Span]]:
        """Return the windows that hold the triple, with its mentions in tokens."""
        places = [
            [span] if span else locate(text, mention, occurrence=self.occurrence)
            for mention, span in (
                (triple.subject, triple.subject_span),
                (triple.object, triple.object_span),
            )
        ]
        found = [
            (w, subject, object_)
            for w, piece in enumerate(pieces)
            for subject, object_ in product(*(_in_tokens(piece, spans) for spans in places))
        ]
        if not found:
            self._miss(triple, places, pieces, index)
        return found

    def _miss(
        self, triple: Triple, places: list[list[Span]], pieces: list[Window], index: int
    ) -> None:
        """Count a triple that is in no window, and say so once."""
        for mention, spans in zip((triple.subject, triple.object), places, strict=True):
            if any(_is_on_tokens(mention, span, pieces) for span in spans):
                continue
            where = "on no token" if spans else "not in the text"
            message = f"`examples[{index}]`: {mention!r} of {triple.key} is {where}."
            if self.on_unaligned == "raise":
                raise ValueError(message)
            if self.on_unaligned == "warn" and not self.n_unaligned:
                warnings.warn(
                    f"{message} Such triples are left out and counted in `n_unaligned`.",
                    stacklevel=5,
                )
            self.n_unaligned += 1
            return
        if not self.n_cut:
            warnings.warn(
                f"`examples[{index}]`: no window holds both mentions of {triple.key}. Such triples "
                f"are left out and counted in `n_cut`; a larger `max_length` or `stride` (it is "
                f"{self.stride}) cuts fewer.",
                stacklevel=5,
            )
        self.n_cut += 1

    def _rows(self, window: Window, subjects: Gold, token_mask: Tensor) -> list[Span]:
        """Choose the rows of a window: subjects in the order of the text, then negatives."""
        rows = sorted(subjects)
        if rows and self.subjects == "one":
            if self.negatives == "article":
                starts, ends = torch.tensor(rows).T
                ((start, end),) = draw_article_subject(starts, ends, self.generator).tolist()
                return [(start, end)]
            rows = [rows[int(torch.randint(len(rows), (), generator=self.generator))]]
        return rows + self._negatives(window, subjects, token_mask)

    def _negatives(self, window: Window, subjects: Gold, token_mask: Tensor) -> list[Span]:
        """Draw spans that are no subjects."""
        weight: dict[Span, float] = {}
        if self.negatives == "article":
            weight = article_pair_distribution(sorted(subjects))
        elif self.negatives == "crossed":
            weight = dict.fromkeys(article_pair_distribution(sorted(subjects)), 1.0)
        elif self.negatives == "objects":
            weight = {(i, j): 1.0 for objects in subjects.values() for _, i, j in sorted(objects)}
        elif self.negatives == "predicted":
            spans = self.predicted.get(window.alignment.text, ())
            weight = dict.fromkeys(_in_tokens(window, spans), 1.0)
        elif self.negatives == "random":
            places = token_mask.nonzero().flatten().tolist()
            weight = {
                (i, j): 1.0 for n, i in enumerate(places) for j in places[n : n + LONGEST_RANDOM]
            }
        candidates = [span for span in weight if span not in subjects]
        n = min(self.n_negative, len(candidates))
        if not n:
            return []
        chances = torch.tensor([weight[span] for span in candidates], dtype=torch.float64)
        chosen = torch.multinomial(chances, n, generator=self.generator)
        return [candidates[each] for each in chosen.tolist()]


def _in_tokens(piece: Window, spans: Sequence[Span]) -> list[Span]:
    """Return those spans that a window holds from end to end, in its tokens."""
    tokens = (piece.alignment.char_to_token_span(*span) for span in spans)
    return [each for each in tokens if each]


def _is_on_tokens(mention: str, span: Span, pieces: list[Window]) -> bool:
    """Whether its two ends are on tokens, if only of two windows."""
    first = span[0] + len(mention) - len(mention.lstrip())
    last = span[0] + len(mention.rstrip()) - 1
    return all(any(_in_tokens(piece, [(at, at + 1)]) for piece in pieces) for at in (first, last))


def _indices(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, width)


def _require_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"`{name}` must be one of {get_args(choices)}; got {value!r}.")
