"""Documents become one flat array of word numbers, in memory or in a memory map.

The tokens are read once, so that a one-shot generator will do and every epoch can have an order of
its own. A document without a word stays, as an empty one: N documents in, N documents out.
"""

import bz2
import codecs
import contextlib
import gzip
import hashlib
import itertools
import lzma
import os
import secrets
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, Int64

Documents = Iterable[str | Iterable[str]] | str | os.PathLike[str]
Tokenizer = Callable[[str], Iterable[str]]

_CHUNK = 2**16  # tokens at a time, wherever the whole corpus might not fit into memory
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The words of a corpus and how often each occurs.

    Attributes:
        words: by falling count; words with equal counts in the order of their first appearance.
        counts: occurrences of each word.

    Raises:
        ValueError: if a word stands there twice, or words and counts are not equally many.

    Example:
        >>> Vocabulary(("the", "cat"), np.array([7, 2])).index["cat"]
        1
    """

    words: tuple[str, ...]
    counts: Int64[np.ndarray, "counts"]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.counts):
            raise ValueError(f"{len(self.words)} `words` cannot have {len(self.counts)} `counts`.")
        if len(self.index) != len(self.words):
            repeated = next(w for i, w in enumerate(self.words) if self.index[w] != i)
            raise ValueError(f"`words` must be distinct; {repeated!r} is there more than once.")

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each word."""
        return {word: number for number, word in enumerate(self.words)}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as numbers of words; its length is the number of documents.

    Attributes:
        tokens: all documents one behind the other, an array or a memory map; not to be written.
        starts: document ``i`` is ``tokens[starts[i] : starts[i + 1]]``; one more than documents.
    """

    tokens: Int32[np.ndarray, "tokens"]
    starts: Int64[np.ndarray, "borders"]

    def __len__(self) -> int:
        return len(self.starts) - 1


def read_corpus(
    docs: Documents,
    *,
    min_count: int = 5,
    max_vocab: int | None = None,
    tokenizer: Tokenizer | None = None,
    lowercase: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> tuple[Vocabulary, Corpus]:
    r"""Count the words of documents, and write the documents as numbers of words.

    Args:
        docs: documents, each a string or a list of words; a one-shot generator will do. Or the path
            of a UTF-8 file with one document a line (only ``\n`` and ``\r\n`` end a line), which
            may be compressed (``.gz``, ``.bz2``, ``.xz``).
        min_count: rarer words are left out.
        max_vocab: keep at most so many words, the most frequent ones.
        tokenizer: makes words of a string; by default they end at white space. Lists of words are
            not given to it.
        lowercase: turn strings, before the tokenizer, and words to lower case.
        cache_dir: a folder for the tokens, where they are mapped from: for a corpus that is larger
            than memory. The file is named by its content and stays there until somebody removes it.
        progress: show a bar.

    Returns:
        The vocabulary, and the corpus without the words that are not in it.

    Raises:
        TypeError: if a document is neither a string nor words, or a word is no string.
        ValueError: if ``docs`` is a string and no file, a line is not UTF-8, or no word is frequent
            enough.
        OSError: if a compressed file is damaged.

    Example:
        >>> vocabulary, corpus = read_corpus(["a cat", "", "a dog or a bird"], min_count=2)
        >>> vocabulary.words, vocabulary.counts.tolist(), corpus.starts.tolist()
        (('a',), [3], [0, 1, 1, 3])
    """
    _require_at_least_one("min_count", min_count)
    if max_vocab is not None:
        _require_at_least_one("max_vocab", max_vocab)
    documents = _words_of(docs, tokenizer, lowercase, progress)
    numbers = defaultdict(itertools.count().__next__)
    with _scratch(cache_dir) as file:
        tokens, starts = _number(documents, lambda words: map(numbers.__getitem__, words), file)
        words, counts, rank = _ranked(list(numbers), tokens, len(starts) - 1, min_count, max_vocab)
        size, starts = _keep(tokens, starts, rank)
        tokens = tokens[:size] if file is None else _settle(file, tokens, size)
    tokens.flags.writeable = False  # as those of a memory map are
    return Vocabulary(words, counts), Corpus(tokens, starts)


def encode(
    docs: Documents,
    vocabulary: Vocabulary,
    *,
    tokenizer: Tokenizer | None = None,
    lowercase: bool = False,
) -> Corpus:
    """Write documents as numbers of known words; others are left out.

    Args:
        docs: as in :func:`read_corpus`.
        vocabulary: the known words.
        tokenizer, lowercase: as in :func:`read_corpus`.

    Raises:
        TypeError, ValueError, OSError: as :func:`read_corpus`; but no known word is no error.

    Example:
        >>> vocabulary = Vocabulary(("the", "cat"), np.array([7, 2]))
        >>> encode(["the fat cat", "dogs"], vocabulary).tokens.tolist()
        [0, 1]
    """
    documents = _words_of(docs, tokenizer, lowercase, progress=False)
    known, unknown = vocabulary.index.get, itertools.repeat(-1)
    tokens, starts = _number(documents, lambda words: map(known, words, unknown), file=None)
    # The last rank belongs to -1, by which numpy means the last.
    rank = np.append(np.arange(len(vocabulary), dtype=np.int32), np.int32(-1))
    size, starts = _keep(tokens, starts, rank)
    tokens = tokens[:size]
    tokens.flags.writeable = False
    return Corpus(tokens, starts)


def _require_at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer; got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")


def _words_of(
    docs: Documents, tokenizer: Tokenizer | None, lowercase: bool, progress: bool
) -> Iterator[list[str]]:
    """The words of each document; what can be checked before the first one is."""
    from tqdm import tqdm

    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"`tokenizer` must be a function from text to words; got {tokenizer!r}.")
    if isinstance(docs, str | os.PathLike):
        if not os.path.exists(docs) or os.path.isdir(docs):
            raise ValueError(
                f"`docs` must be documents, or the path of a file with one document a line; "
                f"there is no file {_shortened(os.fspath(docs))}. A single document is `[text]`."
            )
        documents = _lines(Path(docs))
    elif isinstance(docs, bytes) or not isinstance(docs, Iterable):
        raise TypeError(f"`docs` must be documents or a path; got {_shortened(docs)}.")
    else:
        documents = docs
    bar = tqdm(
        documents,
        desc="reading",
        unit=" documents",
        total=len(docs) if isinstance(docs, Sized) and documents is docs else None,
        disable=not progress,
    )
    return (_words(number, document, tokenizer, lowercase) for number, document in enumerate(bar))


def _words(
    number: int, document: str | Iterable[str], tokenizer: Tokenizer | None, lowercase: bool
) -> list[str]:
    if isinstance(document, str):
        text = document.lower() if lowercase else document
        if tokenizer is None:
            return text.split()
        words = tokenizer(text)
        if isinstance(words, str):
            raise TypeError(f"`tokenizer` must give a list of words; got {_shortened(words)}.")
    else:
        words = document
    words = list(words) if isinstance(words, Iterable) else [words]
    if wrong := [word for word in words if not isinstance(word, str)]:
        raise TypeError(
            f"`docs[{number}]` must be a string or a list of words, each a string; "
            f"got {_shortened(wrong[0])} for a word."
        )
    lower_words = lowercase and not isinstance(document, str)
    return [word.lower() for word in words] if lower_words else words


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def _lines(path: Path) -> Iterator[str]:
    with _OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield _decoded(path, number, line.removesuffix(b"\n").removesuffix(b"\r"))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise OSError(
                f"{path} is truncated, damaged or not what its name says ({error!r})."
            ) from error


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        utf_16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise ValueError(
            f"{path}, line {number}: byte {error.start + 1} (0x{error.object[error.start]:02x}) is "
            f"not UTF-8; {'the file looks like UTF-16: ' * utf_16}convert it to UTF-8."
        ) from error


@contextlib.contextmanager
def _scratch(cache_dir: str | os.PathLike[str] | None) -> Iterator[BinaryIO | None]:
    """A file that nobody else takes for a finished one, and that is gone at the end."""
    if cache_dir is None:
        yield None
        return
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{secrets.token_hex(8)}.tmp"
    try:
        with path.open("x+b") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _number(
    documents: Iterable[list[str]],
    numbers_of: Callable[[list[str]], Iterable[int]],
    file: BinaryIO | None,
) -> tuple[Int32[np.ndarray, "tokens"], Int64[np.ndarray, "borders"]]:
    """The numbers of all words, in the file if there is one, and the borders of the documents."""
    tokens, starts, written = array("i"), array("q", [0]), 0
    for words in documents:
        tokens.extend(numbers_of(words))
        starts.append(written + len(tokens))
        if file is not None and len(tokens) >= _CHUNK:
            tokens.tofile(file)
            written += len(tokens)
            del tokens[:]
    borders = np.asarray(starts).view(np.int64)  # beside `long long` to numpy, though the same
    if file is None or starts[-1] == 0:  # nobody can map an empty file
        return np.asarray(tokens), borders
    tokens.tofile(file)
    file.flush()
    return np.memmap(file, np.int32, mode="r+"), borders


def _ranked(
    words: list[str],
    tokens: Int32[np.ndarray, "tokens"],
    documents: int,
    min_count: int,
    max_vocab: int | None,
) -> tuple[tuple[str, ...], Int64[np.ndarray, "kept"], Int32[np.ndarray, "words"]]:
    """The frequent words with their counts, and the rank of every word; -1 for the others."""
    counts = np.zeros(len(words), dtype=np.int64)
    for first in range(0, len(tokens), _CHUNK):
        np.add.at(counts, tokens[first : first + _CHUNK], 1)
    order = np.argsort(-counts, kind="stable")[:max_vocab]
    order = order[counts[order] >= min_count]
    if not len(order):
        raise ValueError(
            f"the vocabulary is empty: in {documents:,} documents with {len(tokens):,} words the "
            f"largest count of a word is {counts.max(initial=0)}, and `min_count` is {min_count}."
        )
    kept = tuple(str(words[number]) for number in order.tolist())
    for word in kept:
        _require_utf8(word)
    rank = np.full(len(words), -1, dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return kept, counts[order], rank


def _require_utf8(word: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the word {word!r} in `docs` holds half a character (a lone surrogate), which no file "
            f"can hold: decode the text with its own encoding."
        ) from error


def _keep(
    tokens: Int32[np.ndarray, "tokens"],
    starts: Int64[np.ndarray, "borders"],
    rank: Int32[np.ndarray, "words"],
) -> tuple[int, Int64[np.ndarray, "borders"]]:
    """Put ranks in the place of numbers, without those that have none; say how many are left."""
    size, borders = 0, np.zeros_like(starts)
    for first in range(0, len(tokens), _CHUNK):
        ranks = rank[tokens[first : first + _CHUNK]]
        kept = ranks >= 0
        here = slice(*np.searchsorted(starts, [first, first + len(ranks)], side="right"))
        borders[here] = size + np.cumsum(kept)[starts[here] - first - 1]
        ranks = ranks[kept]
        tokens[size : size + len(ranks)] = ranks
        size += len(ranks)
    return size, borders


def _settle(file: BinaryIO, tokens: np.memmap, size: int) -> np.memmap:
    """Give the file its final name: that of its content, so that two processes cannot differ."""
    tokens.flush()
    file.truncate(size * tokens.itemsize)
    os.fsync(file.fileno())
    file.seek(0)
    path = Path(file.name)
    final = path.with_name(f"{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.tokens")
    os.replace(path, final)
    return np.memmap(final, np.int32, mode="r")
