"""The real data of the experiments: looked up, downloaded once, verified, and cleaned of leaks.

A set is sought in ``$CLN_TUTORIAL_DATA/<name>/``, then where a package of the system puts it, then
in the cache (``$CLN_TUTORIAL_CACHE``, or the system's usual place), then at its public home.
Whatever the way, its content must have the SHA-256 that the table ``_SETS`` at the end of this file
states. A new set is one more entry there.
"""

import difflib
import gzip
import hashlib
import io
import lzma
import math
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar, overload

import numpy as np
from jaxtyping import Int64, UInt8

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
        return _in_words(self, "texts")


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """One side of a set of images: ``images[i]`` has the class ``labels[i]``."""

    images: UInt8[np.ndarray, "images height width"]
    labels: Int64[np.ndarray, "images"]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with one class each, cleaned; ``print`` it to read what was removed.

    Attributes:
        name: what :func:`load` was asked for.
        train: the images to learn from, all distinct, each with one label.
        held_out: the images to measure on, likewise, and none of them in ``train``.
        class_names: ``class_names[label]`` is the class in words.
        removed: what the loader removed, as in :class:`LabelledTexts`.
        sha256: digest of the raw content of each source file.
        licence: what the origin states.
        source: where the files come from.

    Example:
        >>> side = ImageSplit(np.zeros((1, 28, 28), np.uint8), np.array([0]))
        >>> removed = {"train images with several labels": 0}
        >>> print(LabelledImages("black", side, side, ("night",), removed, {}, "none", "made"))
        black: 1 train and 1 held-out images, classes night
        removed: 0 train images with several labels
        licence: none
        source: made
    """

    name: str
    train: ImageSplit
    held_out: ImageSplit
    class_names: tuple[str, ...]
    removed: dict[str, int]
    sha256: dict[str, str]
    licence: str
    source: str

    def __str__(self) -> str:
        return _in_words(self, "images")


def _in_words(loaded: LabelledTexts | LabelledImages, things: str) -> str:
    return "\n".join(
        [
            f"{loaded.name}: {len(loaded.train.labels):,} train and "
            f"{len(loaded.held_out.labels):,} held-out {things}, "
            f"classes {', '.join(loaded.class_names)}",
            *(f"removed: {count:,} {what}" for what, count in loaded.removed.items()),
            f"licence: {loaded.licence}",
            f"source: {loaded.source}",
        ]
    )


def available() -> tuple[str, ...]:
    """Names of the data sets that :func:`load` knows, sorted.

    Example:
        >>> "sentiment_zh" in available()
        True
    """
    return tuple(sorted(_SETS))


# With a plain union a type checker would refuse `load("sentiment_zh").train.texts`.
@overload
def load(
    name: Literal["sentiment_zh", "yelp_short"], *, progress: bool = True
) -> LabelledTexts: ...
@overload
def load(name: Literal["fashion_mnist"], *, progress: bool = True) -> LabelledImages: ...
@overload
def load(name: str, *, progress: bool = True) -> LabelledTexts | LabelledImages: ...
def load(name: str, *, progress: bool = True) -> LabelledTexts | LabelledImages:
    """Load a data set without its duplicates, contradictory labels and leaks.

    Both sides keep the order of the files. Texts are stripped of white space at both ends and
    lower-cased; images stay as they are. Nothing is downloaded that ``$CLN_TUTORIAL_DATA``, a
    package of the system (Debian's ``dataset-fashion-mnist``) or the cache holds already.

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
        packaged: where a package of the system puts a copy, compressed as ``local`` is.
    """

    local: str
    sha256: str
    url: str
    url_sha256: str
    member: str | None = None
    head: int | None = None
    packaged: Path | None = None


@dataclass(frozen=True)
class _Set:
    """Files, and the function that makes the data set of their contents (local name to bytes)."""

    files: tuple[_File, ...]
    parse: Callable[..., LabelledTexts | LabelledImages]
    licence: str
    source: str


def _read(name: str, file: _File, progress: bool) -> bytes:
    """Return the verified raw content of a file, from the first place that has it."""
    root = os.environ.get("CLN_TUTORIAL_DATA")
    local = Path(root).expanduser() / name / file.local if root else None
    here = [path for path in (local, file.packaged) if path and path.exists()]
    path = here[0] if here else _fetch(name, file, progress)
    remedy = "reinstall its package" if path == file.packaged else "remove it"
    try:
        content = _unpack(path, file.member)
    except (OSError, EOFError, KeyError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise OSError(
            f"{path} is truncated, damaged or not what its name says ({error!r}); "
            f"{remedy} and load {name!r} again."
        ) from error
    if file.head is not None:
        content = b"".join(islice(io.BytesIO(content), file.head))
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise OSError(
            f"{path} holds the wrong content: its SHA-256 should be {file.sha256}, got {digest}; "
            f"{remedy} and load {name!r} again."
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
        f"{name}/{file.local} ({f'{root} does not' if root else 'it is not set'})"
        f"{f', or install the package that provides {file.packaged}' if file.packaged else ''}."
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
    return _clean_texts(train, valid + test, class_names=("negative", "positive"), **about)


def _parse_yelp_short(raw: dict[str, bytes], **about) -> LabelledTexts:
    """One sentence per line, one file per side and class."""
    dev_0, dev_1, test_0, test_1 = map(_lines, raw.values())
    train = [(text, 0) for text in dev_0] + [(text, 1) for text in dev_1]
    held_out = [(text, 0) for text in test_0] + [(text, 1) for text in test_1]
    return _clean_texts(train, held_out, class_names=("negative", "positive"), **about)


def _lines(content: bytes) -> list[str]:
    # not `splitlines`: a text may contain one of the other separators of Unicode
    return content.decode("utf-8").removesuffix("\n").split("\n")


def _clean_texts(
    train_rows: list[tuple[str, int]], held_out_rows: list[tuple[str, int]], **about
) -> LabelledTexts:
    *kept, removed = _clean(_normalised(train_rows), _normalised(held_out_rows), "text")
    train, held_out, leaked = (Split(tuple(side), _labels(side)) for side in kept)
    return LabelledTexts(train=train, held_out=held_out, leaked=leaked, removed=removed, **about)


def _normalised(rows: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(text.strip().lower(), label) for text, label in rows]


def _parse_fashion_mnist(raw: dict[str, bytes], **about) -> LabelledImages:
    """One file of images and one of labels per side; the side "t10k" is held out."""
    *kept, _, removed = _clean(_image_rows(raw, "train"), _image_rows(raw, "t10k"), "image")
    train, held_out = map(_image_split, kept)
    return LabelledImages(
        train=train, held_out=held_out, class_names=_GARMENTS, removed=removed, **about
    )


def _image_split(label_by_image: dict[bytes, int]) -> ImageSplit:
    # a bytearray, because PyTorch warns of arrays that cannot be written
    pixels = np.frombuffer(bytearray().join(label_by_image), np.uint8)
    return ImageSplit(pixels.reshape(-1, 28, 28), _labels(label_by_image))


def _image_rows(raw: dict[str, bytes], part: str) -> list[tuple[bytes, int]]:
    names = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
    images, labels = _idx(names[0], raw[names[0]], 28, 28), _idx(names[1], raw[names[1]])
    if len(images) != len(labels):
        raise OSError(f"{names[0]} holds {len(images)} images, {names[1]} {len(labels)} labels.")
    return [(image.tobytes(), int(y)) for image, y in zip(images, labels, strict=True)]


def _idx(local: str, content: bytes, *sizes: int) -> UInt8[np.ndarray, "..."]:
    """Read bytes in the idx format of MNIST: any number of rows, each of the given sizes.

    Two zeros, 8 for unsigned bytes, the number of dimensions, each size as a big-endian integer of
    four bytes, then the values with the last index fastest.

    Example:
        >>> _idx("labels", bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 4]))
        array([9, 0, 4], dtype=uint8)
    """
    magic = bytes([0, 0, 8, 1 + len(sizes)])
    start = 4 * (2 + len(sizes))
    if content[:4] != magic or len(content) < start:
        raise OSError(
            f"{local} must begin with {magic.hex(' ')} (idx, unsigned bytes) and "
            f"{1 + len(sizes)} sizes, got {content[:start].hex(' ') or 'nothing'}."
        )
    shape = tuple(np.frombuffer(content[4:start], ">i4").tolist())
    if shape[1:] != sizes or len(content) - start != math.prod(shape):
        raise OSError(
            f"{local} must hold rows of shape {sizes} and nothing else; "
            f"it says {shape} and holds {len(content) - start} values."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


_Content = TypeVar("_Content", str, bytes)  # of a row: its text, or the pixels of its image


def _clean(
    train_rows: list[tuple[_Content, int]], held_out_rows: list[tuple[_Content, int]], thing: str
) -> tuple[dict[_Content, int], dict[_Content, int], dict[_Content, int], dict[str, int]]:
    """Keep distinct contents with one label, and hold out none that is in train.

    The training side never depends on the held-out side: a train row whose held-out copy has
    another label stays, and the copy goes as a leak.

    Returns:
        The label of each content to learn from, to measure on, and that leaked; and what is gone.
    """
    train, held_out = _labels_by_content(train_rows), _labels_by_content(held_out_rows)
    unseen = {content: labels for content, labels in held_out.items() if content not in train}
    seen = {content: labels for content, labels in held_out.items() if content in train}
    kept, kept_unseen = _one_label(train), _one_label(unseen)
    removed = {
        f"train rows that repeat an earlier train {thing}": len(train_rows) - len(train),
        f"train {thing}s with several labels": len(train) - len(kept),
        f"held-out rows that repeat an earlier held-out {thing}": len(held_out_rows)
        - len(held_out),
        f"held-out {thing}s that are in train": len(held_out) - len(unseen),
        f"held-out {thing}s with several labels": len(unseen) - len(kept_unseen),
    }
    return kept, kept_unseen, _one_label(seen), removed


def _labels_by_content(rows: Iterable[tuple[_Content, int]]) -> dict[_Content, set[int]]:
    found: dict[_Content, set[int]] = {}
    for content, label in rows:
        found.setdefault(content, set()).add(label)
    return found


def _one_label(found: dict[_Content, set[int]]) -> dict[_Content, int]:
    return {content: min(labels) for content, labels in found.items() if len(labels) == 1}


def _labels(label_by_content: dict[_Content, int]) -> Int64[np.ndarray, "rows"]:
    return np.array(list(label_by_content.values()), dtype=np.int64)


_GITHUB = "https://raw.githubusercontent.com"
_BERT4KERAS = f"{_GITHUB}/bojone/bert4keras/c1ae0dc5eff66d329ab3c5c7ee369124ddbb6f87"
_STYLE_TRANSFER = (
    f"{_GITHUB}/shentianxiao/language-style-transfer/f078a9d342705ea62b04dd3ac5926d3467c2ac63"
)
_FASHION_MNIST = f"{_GITHUB}/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141"
_GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_SETS: dict[str, _Set] = {
    "fashion_mnist": _Set(
        files=tuple(
            _File(
                local=f"{part}-ubyte.gz",
                sha256=sha256,
                url=f"{_FASHION_MNIST}/data/fashion/{part}-ubyte.gz",
                url_sha256=url_sha256,
                # the same content; Debian strips the name and time from the gzip header
                packaged=Path(f"/usr/share/datasets/fashion-mnist/{part}-ubyte.gz"),
            )
            for part, sha256, url_sha256 in (
                (
                    "train-images-idx3",
                    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                (
                    "train-labels-idx1",
                    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                (
                    "t10k-images-idx3",
                    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                (
                    "t10k-labels-idx1",
                    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            )
        ),
        parse=_parse_fashion_mnist,
        licence="MIT, copyright 2017 Zalando SE",
        source="zalandoresearch/fashion-mnist, data/fashion (arXiv 1708.07747)",
    ),
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
