"""From characters to tokens and back: where a mention stands, and which tokens hold it.

Source: article 7161, which looks for the token ids of a mention in those of the text. Here it is
found among the characters, which unknown words and lower-casing leave as they are.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cln_tutorial.triple_extraction.triples import Span


def locate(
    text: str,
    mention: str,
    *,
    occurrence: str = "all",
    near: int | Span | None = None,
    casefold: bool = False,
) -> list[Span]:
    """Find where a mention stands in a text, in characters.

    Args:
        text: any string.
        mention: what to look for, character by character.
        occurrence: "all", also those that overlap; the "first"; the "nearest" to ``near``; or each
            that stands as a "word", with no letter, digit, underscore or accent on either side.
            Chinese has no space between words, so "word" finds little there.
        near: a position or a span, for "nearest". Of two as near, the first counts.
        casefold: whether case is ignored, as ``str.casefold`` does: "STRASSE" finds "Straße".

    Returns:
        Spans ``(start, end)`` in their order, the end excluded; none if the mention does not occur.

    Raises:
        TypeError: if the text or the mention is no string.
        ValueError: if the mention is empty or white space, for an unknown ``occurrence``, or if
            ``near`` is missing for "nearest" or given for another one.

    Source:
        Article 7161 takes the first match of the token ids, at position 0 for an empty mention.

    Example:
        >>> locate("Paris, Texas, is no Paris.", "Paris")
        [(0, 5), (20, 25)]
        >>> locate("Paris, Texas, is no Paris.", "Paris", occurrence="nearest", near=(7, 12))
        [(0, 5)]
    """
    for name, value in (("text", text), ("mention", mention)):
        if not isinstance(value, str):
            raise TypeError(f"`{name}` must be a string; got {type(value).__name__}.")
    if not mention.strip():
        raise ValueError(f"`mention` must not be empty or white space; got {mention!r}.")
    if occurrence not in ("all", "first", "nearest", "word"):
        raise ValueError(
            f"`occurrence` must be 'all', 'first', 'nearest' or 'word'; got {occurrence!r}."
        )
    if (near is None) == (occurrence == "nearest"):
        raise ValueError(
            f"`near` goes with occurrence='nearest'; got near={near!r} and {occurrence!r}."
        )
    spans = list(_matches(text, mention, casefold))
    if occurrence == "first":
        return spans[:1]
    if occurrence == "word":
        return [(a, b) for a, b in spans if not _in_word(text[a - 1 : a], text[b : b + 1])]
    if occurrence == "nearest" and spans:
        first, end = (near, near) if isinstance(near, int) else near
        return [min(spans, key=lambda s: (max(s[0] - end, first - s[1], 0), abs(s[0] - first)))]
    return spans


def _matches(text: str, mention: str, casefold: bool) -> Iterator[Span]:
    starts = range(len(text) + 1)
    if casefold:
        # A fold can be longer than its character, so each part of it keeps that one's index.
        folds = [each.casefold() for each in text]
        starts = [i for i, fold in enumerate(folds) for _ in fold] + [len(text)]
        text, mention = "".join(folds), mention.casefold()
    at = text.find(mention)
    while at >= 0:
        end = at + len(mention)
        # A match must not begin or end inside the fold of a character: 's' is no part of 'ß'.
        if (at == 0 or starts[at - 1] != starts[at]) and starts[end - 1] != starts[end]:
            yield starts[at], starts[end]
        at = text.find(mention, at + 1)


def _in_word(before: str, after: str) -> bool:
    return any(
        each.isalnum() or each == "_" or unicodedata.category(each)[0] == "M"
        for each in before + after
    )


class TokenAlignment:
    """Which characters of a text each token holds, and the other way round.

    A token holds whole characters, also where it is some bytes of one. White space at the ends of a
    token is not part of what it holds. An accent or a joiner that the tokenizer has dropped belongs
    to the token that it follows, or else, after white space, to the one that it stands before.

    Args:
        text: the string that was tokenized.
        offsets: of each token, ``(start, end)`` in characters of ``text``, as fast tokenizers give
            them.
        special_mask: of each token, whether the tokenizer has added it, as [CLS].

    Attributes:
        spans: of each token, the characters that it holds; ``(0, 0)`` for none.
        token_mask: of each token, whether it holds any.

    Raises:
        TypeError: if the text is no string.
        ValueError: if there is not one mask value per offset, or an offset is not in the text.

    Example:
        >>> alignment = TokenAlignment("naïve cat", [(0, 0), (0, 5), (5, 9)], [True, False, False])
        >>> alignment.char_to_token_span(6, 9)
        (2, 2)
        >>> alignment.token_to_char_span(1, 2)
        (0, 9)
    """

    def __init__(self, text: str, offsets: Sequence[Span], special_mask: Sequence[bool | int]):
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string; got {type(text).__name__}.")
        if len(offsets) != len(special_mask):
            raise ValueError(
                f"`special_mask` must have a value per token, {len(offsets)}; got "
                f"{len(special_mask)}."
            )
        for index, (start, end) in enumerate(offsets):
            if not 0 <= start <= end <= len(text):
                raise ValueError(
                    f"`offsets[{index}]` must lie in the text of {len(text)} characters; got "
                    f"{(start, end)}."
                )
        self.text = text
        self.spans = [
            (0, 0) if special else _stripped(text, *span)
            for span, special in zip(offsets, special_mask, strict=True)
        ]
        held = {at for span in self.spans for at in range(*span)}
        self.spans = [self._with_dropped(span, held) for span in self.spans]
        self.token_mask = [start < end for start, end in self.spans]

    def __len__(self) -> int:
        return len(self.spans)

    def _with_dropped(self, span: Span, held: set[int]) -> Span:
        start, end = span
        if start == end:
            return 0, 0
        while end < len(self.text) and end not in held and _clings(self.text[end]):
            end += 1
        first = start
        while first and first - 1 not in held and _clings(self.text[first - 1]):
            first -= 1
        if first == 0 or self.text[first - 1].isspace():
            start = first
        return start, end

    def char_to_token_span(self, start: int, end: int) -> Span | None:
        """Return the first and the last token that hold a stretch of the text.

        What they hold together contains the stretch, up to white space at its ends, and equals it
        if it begins and ends where tokens do.

        Args:
            start, end: in characters of the text, the end excluded.

        Returns:
            Indices of the two tokens, the last one included; ``None`` if its first or its last
            character is in no token, as in a window that ends before.

        Raises:
            ValueError: if the stretch is empty or not in the text.
        """
        if not 0 <= start < end <= len(self.text):
            raise ValueError(
                f"`start` and `end` must be a stretch of the text of {len(self.text)} characters; "
                f"got {(start, end)}."
            )
        start, end = _stripped(self.text, start, end)
        over = [i for i, (a, b) in enumerate(self.spans) if a < end and start < b]
        if not over or self.spans[over[0]][0] > start or self.spans[over[-1]][1] < end:
            return None
        return over[0], over[-1]

    def token_to_char_span(self, first: int, last: int) -> Span:
        """Return the stretch of the text that some tokens hold.

        Args:
            first, last: indices of tokens, the last one included.

        Returns:
            Its start and its end in characters, the end excluded.

        Raises:
            ValueError: if there are no such tokens, or they hold no character.
        """
        if not 0 <= first <= last < len(self.spans):
            raise ValueError(
                f"`first` and `last` must be a stretch of the {len(self.spans)} tokens; got "
                f"{(first, last)}."
            )
        spans = [(a, b) for a, b in self.spans[first : last + 1] if a < b]
        if not spans:
            raise ValueError(f"Tokens {first} to {last} hold no character of the text.")
        return spans[0][0], spans[-1][1]


def _stripped(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _clings(character: str) -> bool:
    """Whether it is nothing without its neighbour: marks, joiners, parts of Korean syllables."""
    category = unicodedata.category(character)
    clings = category[0] == "M" or category in ("Cc", "Cf") or "\u1160" <= character <= "\u11ff"
    return clings and not character.isspace()


@dataclass(frozen=True)
class Window:
    """A text, or a part of a long one, as an encoder reads it.

    Args:
        text_index: which of the texts.
        input_ids: of the tokens, the special ones included.
        token_type_ids: of the tokens, if the tokenizer gives them.
        alignment: from these tokens to the characters of the whole text, and back.
    """

    text_index: int
    input_ids: list[int]
    token_type_ids: list[int] | None
    alignment: TokenAlignment


def encode_windows(
    tokenizer: Any, texts: Sequence[str], *, max_length: int | None = None, stride: int = 0
) -> list[Window]:
    """Tokenize texts, the long ones in windows that overlap.

    Args:
        tokenizer: a :class:`CharTokenizer` or a fast tokenizer of Hugging Face.
        texts: strings, empty ones too.
        max_length: tokens of a window, the special ones included; by default the tokenizer's own
            ``model_max_length``, if it has one.
        stride: tokens that a window shares with the one before, as Hugging Face means it. What is
            no longer than this lies whole in some window.

    Returns:
        One window per text, or several of a long one, in the order of the texts.

    Raises:
        TypeError: if a text is no string; the message has its index.
        ValueError: if a text has half of a surrogate pair, the tokenizer gives no offsets, or
            ``stride`` is below 0 or leaves no room in a window.

    Example:
        >>> from cln_tutorial.triple_extraction.characters import CharTokenizer
        >>> tokenizer = CharTokenizer.fit(["abcdef"])
        >>> windows = encode_windows(tokenizer, ["abcdef", ""], max_length=6, stride=1)
        >>> [(w.text_index, len(w.input_ids)) for w in windows]
        [(0, 6), (0, 5), (1, 2)]
        >>> windows[1].alignment.char_to_token_span(3, 5)
        (1, 2)
    """
    if isinstance(texts, str):
        raise TypeError("`texts` must be a sequence of strings; got one string: write [text].")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`texts[{index}]` must be a string; got {type(text).__name__}.")
        lone = re.search("[\ud800-\udfff]", text)
        if lone:
            raise ValueError(
                f"`texts[{index}]` must be Unicode; got half of a surrogate pair at {lone.start()}."
            )
    if not getattr(tokenizer, "is_fast", False):
        name = type(tokenizer).__name__
        raise ValueError(
            f"`tokenizer` must give character offsets, which {name} does not: use {name}Fast, or "
            "another PreTrainedTokenizerFast."
        )
    limits = _limits(tokenizer, max_length, stride)
    if not texts:
        return []
    encoded: Mapping[str, Any] = tokenizer(
        texts, return_offsets_mapping=True, return_special_tokens_mask=True, **limits
    )
    types = encoded.get("token_type_ids")
    return [
        Window(
            text_index,
            encoded["input_ids"][row],
            None if types is None else types[row],
            TokenAlignment(
                texts[text_index],
                encoded["offset_mapping"][row],
                encoded["special_tokens_mask"][row],
            ),
        )
        for row, text_index in enumerate(
            encoded.get("overflow_to_sample_mapping", range(len(texts)))
        )
    ]


def _limits(tokenizer: Any, max_length: int | None, stride: int) -> dict[str, Any]:
    if max_length is None:
        max_length = getattr(tokenizer, "model_max_length", None)
        # Hugging Face writes 1e30 for "no limit".
        max_length = None if max_length is None or max_length > 1e9 else max_length
    special = tokenizer.num_special_tokens_to_add()
    if stride < 0 or (max_length is not None and max_length - special <= stride):
        raise ValueError(
            "`stride` must be at least 0 and `max_length` larger than `stride` and the tokenizer's "
            f"{special} special tokens; got stride={stride} and max_length={max_length}."
        )
    if max_length is None:
        return {}
    return {
        "truncation": True,
        "max_length": max_length,
        "stride": stride,
        "return_overflowing_tokens": True,
    }


def pad_windows(windows: Sequence[Window], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Put windows into one batch.

    Args:
        windows: at least one, all of one tokenizer.
        pad_token_id: what stands behind the shorter ones.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``(B, L)``; ``token_mask``, bool ``(B, L)``,
        ``True`` where a span may begin or end: at tokens that hold a character; and
        ``token_type_ids``, int64 ``(B, L)``, if the tokenizer gives them. ``L`` is at least 1.

    Raises:
        ValueError: if there is no window, or only some have ``token_type_ids``.

    Example:
        >>> from cln_tutorial.triple_extraction.characters import CharTokenizer
        >>> tokenizer = CharTokenizer.fit(["a cat"])
        >>> batch = pad_windows(encode_windows(tokenizer, ["a cat", "cat"]))
        >>> batch["attention_mask"].sum(1)
        tensor([7, 5])
        >>> batch["token_mask"].sum(1)
        tensor([4, 3])
    """
    if not windows:
        raise ValueError("`windows` must hold at least one; got none.")
    length = max(1, *(len(each.input_ids) for each in windows))

    def padded(rows: Sequence[Sequence[int]], fill: int | bool) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])

    batch = {
        "input_ids": padded([each.input_ids for each in windows], pad_token_id),
        "attention_mask": padded([[1] * len(each.input_ids) for each in windows], 0),
        "token_mask": padded([each.alignment.token_mask for each in windows], False),
    }
    types = [each.token_type_ids for each in windows]
    if any(each is not None for each in types):
        if any(each is None for each in types):
            raise ValueError("`windows` must be of one tokenizer; only some have `token_type_ids`.")
        batch["token_type_ids"] = padded(types, 0)
    return batch
