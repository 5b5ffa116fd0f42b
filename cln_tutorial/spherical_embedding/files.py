"""Files of vectors that other programs read, and files of whole models.

word2vec's two forms (a first line with the number of words and of dimensions, then one word with
its vector a line, as text or as float32 bytes) are what gensim, spaCy and the programs in C know.
"""

import codecs
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cln_tutorial import __version__
from cln_tutorial._files import write_atomically

METADATA = "cln_tutorial.spherical_embedding"
_LARGEST_HEADER = 100_000_000  # bytes; safetensors writes longer ones, and does not read them


def write_word2vec(
    path: str | os.PathLike[str],
    words: Iterable[str | int],
    vectors: Float32[np.ndarray, "words dim"],
    *,
    binary: bool = False,
) -> None:
    """Write vectors for ``gensim.models.KeyedVectors.load_word2vec_format``, all or nothing.

    Text has 9 significant digits, which give each float32 back bit for bit.

    Args:
        path: the file, replaced if it is there.
        words: one for each vector. The numbers of documents will do; they are read as strings.
        vectors: finite.
        binary: four bytes a number instead of text.

    Raises:
        TypeError: if the vectors are not float32, or a word is neither a string nor an integer.
        ValueError: if a word is empty, has white space or stands there twice, a vector is not
            finite, or words and vectors are not equally many.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_word2vec(f"{folder}/cats.txt", ["cat"], np.float32([[0.1, -1.0]]))
        ...     print(pathlib.Path(folder, "cats.txt").read_text(), end="")
        1 2
        cat 0.100000001 -1
    """
    names = [str(word) if isinstance(word, int) else word for word in words]
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise TypeError(
            f"`vectors` must be float32 of shape (words, dim); "
            f"got {vectors.dtype} of shape {vectors.shape}."
        )
    if len(names) != len(vectors):
        raise ValueError(f"{len(names)} `words` cannot have {len(vectors)} `vectors`.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`words` must be strings or integers; got {name!r}.")
        if name.split() != [name]:
            raise ValueError(
                f"the format ends a word at white space and cannot hold {name!r} of `words`."
            )
    _require_distinct_and_finite(names, vectors, lambda row: f"`words[{row}]`")
    form = " %.9g" * vectors.shape[1]
    lines = [f"{len(names)} {vectors.shape[1]}".encode()]
    for name, row in zip(names, vectors, strict=True):
        numbers = b" " + row.astype("<f4").tobytes() if binary else (form % (*row,)).encode()
        lines.append(name.encode() + numbers)
    write_atomically(path, b"\n".join([*lines, b""]))


def read_word2vec(
    path: str | os.PathLike[str], *, binary: bool | None = None
) -> tuple[tuple[str, ...], Float32[np.ndarray, "words dim"]]:
    """Read vectors of :func:`write_word2vec`, gensim, word2vec or another program of this form.

    Args:
        path: the file.
        binary: which of the two forms it has; ``None`` looks.

    Returns:
        The words, among them a ``</s>``, and a vector for each.

    Raises:
        ValueError: if the file is cut off or has another form, a word stands there twice, or a
            number is not finite; the message names file and line.
    """
    with open(path, "rb") as file:
        words, dim = _header(path, file)
        if binary is None:
            binary = _is_binary(file, dim)
        return (_read_binary if binary else _read_text)(path, file, words, dim)


def write_model(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Write a model as one safetensors file, all or nothing.

    Args:
        path: the file, replaced if it is there.
        tensors: the numbers, by name.
        about: all else, as JSON can hold it: parameters, words. The version of this library is
            added as ``"version"``.

    Raises:
        ValueError: if ``about`` is larger than the format can hold (100 MB).
    """
    header = json.dumps({**about, "version": __version__}, ensure_ascii=False)
    content = save(dict(tensors), metadata={METADATA: header})
    if int.from_bytes(content[:8], "little") > _LARGEST_HEADER:
        raise ValueError(
            f"`about` takes {len(header):,} characters, and a safetensors file holds 100 MB of "
            f"them: there are too many words. `max_vocab` keeps the most frequent ones."
        )
    write_atomically(path, content)


def read_model(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what :func:`write_model` has written.

    Raises:
        ValueError: if it is another file or cut off, or a number in it is not finite.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or cut off: {error}.") from error
    if METADATA not in metadata:
        raise ValueError(f"{path} was not written by `write_model`: it has no {METADATA!r}.")
    for key, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            where = np.argwhere(~np.isfinite(tensor))[0].tolist()
            raise ValueError(f"{path}: {key}{where} is {tensor[tuple(where)]}, not finite.")
    return tensors, json.loads(metadata[METADATA])


def _header(path: str | os.PathLike[str], file: BinaryIO) -> tuple[int, int]:
    line = file.readline(1_000)
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or int(fields[1]) < 1:
        raise ValueError(
            f"{path}, line 1: must be the number of words and the number of dimensions; "
            f"got {line[:60]!r}."
        )
    words, dim = map(int, fields)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if words * (1 + 2 * dim) > left:  # a letter, and " 0" for each number
        raise ValueError(
            f"{path}, line 1: promises {words:,} words with {dim:,} numbers each, which the "
            f"{left:,} bytes after it cannot hold."
        )
    return words, dim


def _is_binary(file: BinaryIO, dim: int) -> bool:
    """Whether the first vector is no text but bytes; a faulty text is still a text."""
    start = file.tell()
    first_row = file.readline(2**20).split()
    file.seek(start)
    sample = file.read(2**12)
    file.seek(start)
    try:
        if len([float(number) for number in first_row[1:]]) == dim:
            return False
    except ValueError:
        pass
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # it may end within a character
    except UnicodeDecodeError:
        return True
    return re.search(rb"[\x00-\x08\x0e-\x1f]", sample) is not None


def _read_text(
    path: str | os.PathLike[str], file: BinaryIO, rows: int, dim: int
) -> tuple[tuple[str, ...], Float32[np.ndarray, "words dim"]]:
    words, vectors = [], np.empty((rows, dim), dtype=np.float32)

    def place(row: int) -> str:
        return f"{path}, line {row + 2}"

    start = file.tell()
    for row in range(rows):
        line = file.readline()
        if not line:
            raise ValueError(f"{path} ends after line {row + 1}; line 1 promises {rows:,} words.")
        word, *numbers = line.rstrip().split(b" ")  # the program in C ends lines with a blank
        if len(numbers) != dim:
            raise ValueError(
                f"{place(row)}: must be a word and {dim:,} numbers with one blank between them; "
                f"got {len(numbers):,} numbers."
            )
        words.append(_decoded(word, place(row)))
        try:
            with np.errstate(over="ignore"):  # found below, with what was infinite before
                vectors[row] = [float(number) for number in numbers]
        except ValueError as error:
            raise ValueError(f"{place(row)}: {error}.") from error
    _require_the_end(file, start, file.tell(), place(rows))
    _require_distinct_and_finite(words, vectors, place)
    return tuple(words), vectors


def _read_binary(
    path: str | os.PathLike[str], file: BinaryIO, rows: int, dim: int
) -> tuple[tuple[str, ...], Float32[np.ndarray, "words dim"]]:
    words, vectors = [], np.empty((rows, dim), dtype=np.float32)

    def place(row: int) -> str:
        return f"{path}, word {row + 1}"

    start = end = file.tell()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for row in range(rows):
            before, blank = end, content.find(b" ", end)
            end = blank + 1 + 4 * dim
            if blank < 0 or end > len(content):
                raise ValueError(f"{place(row)}: the file ends; line 1 promises {rows:,} words.")
            # word2vec ends each vector with a line feed, gensim does not
            words.append(_decoded(content[before:blank].lstrip(b"\n"), place(row)))
            vectors[row] = np.frombuffer(content[blank + 1 : end], "<f4")
    _require_the_end(file, start, end, place(rows))
    _require_distinct_and_finite(words, vectors, place)
    return tuple(words), vectors


def _decoded(word: bytes, place: str) -> str:
    try:
        decoded = word.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: the word {word[:60]!r} is not UTF-8.") from error
    if not decoded:
        raise ValueError(f"{place}: there is no word before the numbers.")
    return decoded


def _require_the_end(file: BinaryIO, start: int, end: int, place: str) -> None:
    file.seek(end)
    rest = file.read()
    file.seek(start)
    # gensim 4.4 writes the vectors of documents twice if their keys are 0, 1, 2, … (Doc2Vec.dv).
    if rest.strip() and rest != file.read(end - start):
        raise ValueError(f"{place}: there are more words than line 1 promises.")


def _require_distinct_and_finite(
    words: Sequence[str], vectors: Float32[np.ndarray, "words dim"], place: Callable[[int], str]
) -> None:
    first: dict[str, int] = {}
    for row, word in enumerate(words):
        if first.setdefault(word, row) != row:
            raise ValueError(f"{place(row)}: {word!r} is there already ({place(first[word])}).")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise ValueError(f"{place(row)}: the vector of {words[row]!r} is not finite.")
