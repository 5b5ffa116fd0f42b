"""A tokenizer of single characters: for Chinese, and for an encoder that starts from nothing."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cln_tutorial._files import write_atomically

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
FILE = "char_tokenizer.json"


class CharTokenizer:
    """One token per character, between [CLS] and [SEP].

    It is called as the fast tokenizers of Hugging Face are, as far as this chapter does so.

    Args:
        characters: those that it knows, each once; their ids are 4, 5, ... in this order. Ids 0 to
            3 are [PAD], [UNK] (any other character), [CLS] and [SEP].

    Raises:
        ValueError: if one of them is not a single character, or stands twice.

    Example:
        >>> tokenizer = CharTokenizer.fit(["卡夫卡"])
        >>> tokenizer(["卡夫卡!"])["input_ids"]
        [[2, 4, 5, 4, 1, 3]]
    """

    is_fast = True  # it gives offsets
    pad_token_id, unk_token_id, cls_token_id, sep_token_id = range(4)

    def __init__(self, characters: Iterable[str] = ()):
        self._ids: dict[str, int] = {}
        for index, each in enumerate(characters):
            if len(each) != 1 or each in self._ids:
                raise ValueError(
                    f"`characters[{index}]` must be a single character that has not come before; "
                    f"got {each!r}."
                )
            self._ids[each] = len(SPECIAL_TOKENS) + index

    @classmethod
    def fit(cls, texts: Iterable[str], *, min_count: int = 1) -> "CharTokenizer":
        """Return a tokenizer that knows the characters of some texts, in the order of Unicode.

        Args:
            texts: strings.
            min_count: how often a character must occur. From 2 on the rare ones are [UNK], so that
                a model learns what an unknown character is.
        """
        counts = Counter(each for text in texts for each in text)
        return cls(sorted(each for each, count in counts.items() if count >= min_count))

    def __len__(self) -> int:
        return len(SPECIAL_TOKENS) + len(self._ids)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self)

    @property
    def characters(self) -> str:
        """The characters that it knows, in the order of their ids."""
        return "".join(self._ids)

    def num_special_tokens_to_add(self) -> int:
        """Return how many special tokens a window has: [CLS] and [SEP]."""
        return 2

    def __call__(
        self,
        texts: Sequence[str],
        *,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        stride: int = 0,
        return_overflowing_tokens: bool = False,
    ) -> dict[str, list[Any]]:
        """Tokenize texts.

        Args:
            texts: strings.
            return_offsets_mapping: give ``offset_mapping``, spans of characters; ``(0, 0)`` for
                special tokens.
            return_special_tokens_mask: give ``special_tokens_mask``, 1 for special tokens.
            truncation: whether a text has at most ``max_length`` tokens, the special ones included.
            max_length: see there.
            stride: tokens that a further window shares with the one before.
            return_overflowing_tokens: give what is cut off as further windows, and
                ``overflow_to_sample_mapping``, which text each window is of.

        Returns:
            ``input_ids``, ``attention_mask`` and what was asked for; of each a list per window.

        Raises:
            TypeError: if it is one string instead of several.
            ValueError: if ``truncation`` has no ``max_length`` with room for more than ``stride``.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be a sequence of strings; got one string: write [text].")
        if truncation and (max_length is None or not 0 <= stride < max_length - 2):
            raise ValueError(
                "`max_length` must have room for two special tokens and more than `stride`; got "
                f"max_length={max_length} and stride={stride}."
            )
        names = ["input_ids", "attention_mask"]
        names += ["special_tokens_mask"] * return_special_tokens_mask
        names += ["offset_mapping"] * return_offsets_mapping
        names += ["overflow_to_sample_mapping"] * return_overflowing_tokens
        encoded: dict[str, list[Any]] = {name: [] for name in names}
        for index, text in enumerate(texts):
            size = max_length - 2 if truncation else max(1, len(text))
            starts = range(0, max(1, len(text) - stride), size - stride) if truncation else [0]
            for start in starts if return_overflowing_tokens else starts[:1]:
                piece = text[start : start + size]
                window = {
                    "input_ids": [
                        self.cls_token_id,
                        *(self._ids.get(each, self.unk_token_id) for each in piece),
                        self.sep_token_id,
                    ],
                    "attention_mask": [1] * (len(piece) + 2),
                    "special_tokens_mask": [1, *[0] * len(piece), 1],
                    "offset_mapping": [
                        (0, 0),
                        *((at, at + 1) for at in range(start, start + len(piece))),
                        (0, 0),
                    ],
                    "overflow_to_sample_mapping": index,
                }
                for name in names:
                    encoded[name].append(window[name])
        return encoded

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``char_tokenizer.json`` into a folder, which is made if it is not there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"characters": self.characters})
        write_atomically(directory / FILE, content.encode())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "CharTokenizer":
        """Return the tokenizer that ``save_pretrained`` has written into a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is not what it wrote.
        """
        path = Path(directory) / FILE
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("characters"), str):
            raise ValueError(f"{path} must hold the characters of a CharTokenizer.")
        return cls(content["characters"])
