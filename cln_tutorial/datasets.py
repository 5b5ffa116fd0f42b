"""The real texts of the experiments: looked up, downloaded once, verified, and cleaned of leaks.

A set is sought in ``$CLN_TUTORIAL_DATA/<name>/``, then in the cache (``$CLN_TUTORIAL_CACHE``, or
the system's usual place), then at its public home. Whatever the way, its content must have the
SHA-256 that the table ``_SETS`` at the end of this file states. A new set is one more entry there.
"""

import difflib
import gzip
import hashlib
import io
import lzma
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int64

_TIMEOUT = (10, 30)  # seconds to connect, and between two pieces of an answer


@dataclass(frozen=True, eq=False)
class Split:
    """One side of a data set: ``texts[i]`` has the class ``labels[i]``."""

    texts: tuple[str, ...]
    labels: Int64[np.ndarray, "texts"]


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts with one class each, cleaned; ``print`` it to read what was removed.

    Attributes:
        name: what :func:`load` was asked for.
        train: the texts to learn from, all distinct, each with one label.
        held_out: the texts to measure on, likewise, and none of them in ``train``.
        leaked: those that the files hold out although they are in their train file, likewise; to
            show what a leak does, and for nothing else.
        class_names: ``class_names[label]`` is the class in words.
        removed: what the loader removed, in words, and how many. Kept and removed add up to the
            rows of the files; a zero says that the loader looked and found nothing.
        sha256: digest of the raw content of each source file.
        licence: what the origin states.
        source: where the files come from.
    """

    name: str
    train: Split
    held_out: Split
    leaked: Split
    class_names: tuple[str, ...]
    removed: dict[str, int]
    sha256: dict[str, str]
    licence: str
    source: str

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.name}: {len(self.train.texts):,} train and {len(self.held_out.texts):,} "
                f"held-out texts, classes {', '.join(self.class_names)}",
                *(f"removed: {count:,} {what}" for what, count in self.removed.items()),
                f"licence: {self.licence}",
                f"source: {self.source}",
            ]
        )


def available() -> tuple[str, ...]:
    """Names of the data sets that :func:`load` knows, sorted.

    Example:
        >>> "sentiment_zh" in available()
        True
    """
    return tuple(sorted(_SETS))


def load(name: str, *, progress: bool = True) -> LabelledTexts:
    """Load a data set without its duplicates, contradictory labels and leaks.

    Texts are stripped of white space at both ends and lower-cased, in the order of the files.
    Nothing is downloaded that ``$CLN_TUTORIAL_DATA`` or the cache holds already.

    Args:
        name: one of :func:`available`.
        progress: show a bar while downloading.

    Returns:
        The cleaned set; its ``removed`` says what is gone.

    Raises:
        TypeError: if ``name`` is no string.
        ValueError: if there is no such set; the message names the nearest one.
        ConnectionError: if the public home cannot be reached or answers with an error.
        OSError: if a file is damaged or has the wrong SHA-256, or the cache cannot be written.

    Example:
        >>> load("sentiment_cn")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: there is no data set 'sentiment_cn'; did you mean 'sentiment_zh'? ...
    """
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string, one of {', '.join(available())}; got {name!r}")
    if name not in _SETS:
        nearest = difflib.get_close_matches(name.lower(), _SETS, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(
            f"there is no data set {name!r}{hint} Available are {', '.join(available())}."
        )
    chosen = _SETS[name]
    raw = {file.local: _read(name, file, progress) for file in chosen.files}
    return chosen.parse(
        raw,
        name=name,
        sha256={file.local: file.sha256 for file in chosen.files},
        licence=chosen.licence,
        source=chosen.source,
    )


@dataclass(frozen=True)
class _File:
    """One source file: a local name, and the place and digests of its public copy.

    Args:
        local: name below ``$CLN_TUTORIAL_DATA/<set>/``; the suffix says how it is compressed.
        sha256: of the raw content, decompressed and cut to ``head`` lines.
        url: the public copy, as it is or inside a zip archive.
        url_sha256: of what ``url`` serves.
        member: name inside the archive; the folder does not matter.
        head: how many of the first lines are used, if not all.
    """

    local: str
    sha256: str
    url: str
    url_sha256: str
    member: str | None = None
    head: int | None = None


@dataclass(frozen=True)
class _Set:
    """Files, and the function that makes the data set of their contents (local name to bytes)."""

    files: tuple[_File, ...]
    parse: Callable[..., LabelledTexts]
    licence: str
    source: str


def _read(name: str, file: _File, progress: bool) -> bytes:
    """Return the verified raw content of a file, from the first place that has it."""
    root = os.environ.get("CLN_TUTORIAL_DATA")
    local = Path(root).expanduser() / name / file.local if root else None
    path = local if local and local.exists() else _fetch(name, file, progress)
    try:
        content = _unpack(path, file.member)
    except (OSError, EOFError, KeyError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise OSError(
            f"{path} is truncated, damaged or not what its name says ({error!r}); "
            f"remove it and load {name!r} again."
        ) from error
    if file.head is not None:
        content = b"".join(islice(io.BytesIO(content), file.head))
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise OSError(
            f"{path} holds the wrong content: its SHA-256 should be {file.sha256}, got {digest}; "
            f"remove it and load {name!r} again."
        )
    return content


def _unpack(path: Path, member: str | None) -> bytes:
    match path.suffix:
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".zip":
            with zipfile.ZipFile(path) as archive:
                members = {PurePosixPath(each).name: each for each in archive.namelist()}
                return archive.read(members[member])
        case _:
            return path.read_bytes()


def _fetch(name: str, file: _File, progress: bool) -> Path:
    """Return the path of the public copy in the cache, downloading it if it is not there."""
    import pooch
    from requests import RequestException

    entry = f"{name}/{PurePosixPath(file.url).name}"
    cache = pooch.create(
        path=pooch.os_cache("cln-tutorial"),
        env="CLN_TUTORIAL_CACHE",
        base_url="",
        urls={entry: file.url},
        retry_if_failed=2,
    )
    cache.registry[entry] = file.url_sha256
    downloader = pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16, timeout=_TIMEOUT)
    root = os.environ.get("CLN_TUTORIAL_DATA")
    remedy = (
        f"To use a copy of your own, set $CLN_TUTORIAL_DATA to a folder that holds "
        f"{name}/{file.local} ({f'{root} does not' if root else 'it is not set'})."
    )
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # the bar says it already
    try:
        # pooch makes this folder too, but fails if another process does so at the same moment
        (cache.abspath / name).mkdir(parents=True, exist_ok=True)
        _sweep(cache.abspath / name)
        # pooch downloads to a temporary file, verifies it there, and renames: two processes at once
        # each rename a whole file, and a killed one leaves nothing under the final name.
        return Path(cache.fetch(entry, downloader=downloader))
    except RequestException as error:
        raise ConnectionError(f"cannot download {file.url} ({error}). {remedy}") from error
    except ValueError as error:
        raise OSError(f"{file.url} serves the wrong file. {error} {remedy}") from error
    except OSError as error:
        raise OSError(
            f"cannot write the cache {cache.abspath} ({error}); "
            f"set $CLN_TUTORIAL_CACHE to a folder that can be written. {remedy}"
        ) from error
    finally:
        logger.setLevel(level)


def _sweep(folder: Path) -> None:
    """Remove what killed downloads left; one in progress is never idle for 10 minutes."""
    with suppress(OSError):
        for leftover in folder.glob("tmp*"):
            if time.time() - leftover.stat().st_mtime > 600:
                leftover.unlink()


def _parse_sentiment_zh(raw: dict[str, bytes], **about) -> LabelledTexts:
    """One ``text<TAB>label`` per line; valid and test together are held out."""
    train, valid, test = (
        [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in _lines(content))]
        for content in raw.values()
    )
    return _clean(train, valid + test, class_names=("negative", "positive"), **about)


def _parse_yelp_short(raw: dict[str, bytes], **about) -> LabelledTexts:
    """One sentence per line, one file per side and class."""
    dev_0, dev_1, test_0, test_1 = map(_lines, raw.values())
    train = [(text, 0) for text in dev_0] + [(text, 1) for text in dev_1]
    held_out = [(text, 0) for text in test_0] + [(text, 1) for text in test_1]
    return _clean(train, held_out, class_names=("negative", "positive"), **about)


def _lines(content: bytes) -> list[str]:
    # not `splitlines`: a text may contain one of the other separators of Unicode
    return content.decode("utf-8").removesuffix("\n").split("\n")


def _clean(
    train_rows: list[tuple[str, int]], held_out_rows: list[tuple[str, int]], **about
) -> LabelledTexts:
    """Keep distinct texts with one label, and hold out none that is in train.

    The training side never depends on the held-out side: a train text whose held-out copy has the
    other label stays, and the copy goes as a leak.
    """
    train, held_out = _labels_by_text(train_rows), _labels_by_text(held_out_rows)
    unseen = {text: labels for text, labels in held_out.items() if text not in train}
    seen = {text: labels for text, labels in held_out.items() if text in train}
    train_split, held_out_split = _one_label(train), _one_label(unseen)
    return LabelledTexts(
        train=train_split,
        held_out=held_out_split,
        leaked=_one_label(seen),
        removed={
            "train rows that repeat an earlier train text": len(train_rows) - len(train),
            "train texts with both labels": len(train) - len(train_split.texts),
            "held-out rows that repeat an earlier held-out text": len(held_out_rows)
            - len(held_out),
            "held-out texts that are in train": len(held_out) - len(unseen),
            "held-out texts with both labels": len(unseen) - len(held_out_split.texts),
        },
        **about,
    )


def _labels_by_text(rows: Iterable[tuple[str, int]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for text, label in rows:
        found.setdefault(text.strip().lower(), set()).add(label)
    return found


def _one_label(labels_by_text: dict[str, set[int]]) -> Split:
    kept = {text: min(labels) for text, labels in labels_by_text.items() if len(labels) == 1}
    return Split(tuple(kept), np.array(list(kept.values()), dtype=np.int64))


_GITHUB = "https://raw.githubusercontent.com"
_BERT4KERAS = f"{_GITHUB}/bojone/bert4keras/c1ae0dc5eff66d329ab3c5c7ee369124ddbb6f87"
_STYLE_TRANSFER = (
    f"{_GITHUB}/shentianxiao/language-style-transfer/f078a9d342705ea62b04dd3ac5926d3467c2ac63"
)

_SETS: dict[str, _Set] = {
    "sentiment_zh": _Set(
        files=tuple(
            _File(
                local=f"sentiment.{part}.data.gz",
                sha256=sha256,
                url=f"{_BERT4KERAS}/examples/datasets/sentiment.zip",
                url_sha256="866256a80e4019e538d2681b5f4bf2f21be3c24139b4100ca266c2fca8be86c9",
                member=f"sentiment.{part}.data",
            )
            for part, sha256 in (
                ("train", "dd7da98cf6f37db9e8755a911377094c4cfbb7fa80932b036ebb5c9077122fb8"),
                ("valid", "b689b85813c79ff40524ac37f5e4a3300fb8d1046e411d6dbd1d88cbc4a043e7"),
                ("test", "36c5182855e2508e393593bb1bea61f4f4d6798e7f463e5c1598505d043ffff0"),
            )
        ),
        parse=_parse_sentiment_zh,
        licence="repository Apache-2.0; reviews by users, for teaching and tests only",
        source="bojone/bert4keras, examples/datasets/sentiment.zip, the corpus of article 7124",
    ),
    "yelp_short": _Set(
        files=(
            _File(
                local="sentiment.dev.0.gz",
                sha256="405ef6d4bfbc8bb92c3c55b496f315069cb5edb49ed34a07b1206341b83c344b",
                url=f"{_STYLE_TRANSFER}/data/yelp/sentiment.dev.0",
                url_sha256="405ef6d4bfbc8bb92c3c55b496f315069cb5edb49ed34a07b1206341b83c344b",
            ),
            _File(
                local="sentiment.dev.1.gz",
                sha256="3509f6573411bbda2d5c071ed72ad276c12356c15c06205b8fdf74b217970c61",
                url=f"{_STYLE_TRANSFER}/data/yelp/sentiment.dev.1",
                url_sha256="3509f6573411bbda2d5c071ed72ad276c12356c15c06205b8fdf74b217970c61",
            ),
            _File(
                local="sentiment.test.0.head10000.gz",
                sha256="d1c2f0dafcf847596a64bbf8c482b7dd43f8ed89943c3cd48c826093c18d5f33",
                url=f"{_STYLE_TRANSFER}/data/yelp/sentiment.test.0",
                url_sha256="b7466e8859e9948892a859af7938a82c801c99b69f884014082fd072a155bbf2",
                head=10_000,
            ),
            _File(
                local="sentiment.test.1.head10000.gz",
                sha256="bff3bef62f73426b611ff121bb943961661b0d0418217ec20bbbaefd671a3de3",
                url=f"{_STYLE_TRANSFER}/data/yelp/sentiment.test.1",
                url_sha256="a66e0ec3f0e1230ad4d2c822750a381cf6d99a99fa9b5ae79546f21ff79ed5c3",
                head=10_000,
            ),
        ),
        parse=_parse_yelp_short,
        licence="repository Apache-2.0; sentences of the Yelp Dataset, academic use only",
        source="shentianxiao/language-style-transfer, data/yelp (arXiv 1705.09655)",
    ),
}
