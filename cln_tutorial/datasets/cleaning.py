"""Sets that are cleaned: no duplicates, no contradictory labels, nothing held out that is in train.

Texts are stripped of white space at both ends and lower-cased; images stay as they are.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt8

from cln_tutorial.datasets.sources import lines


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


def parse_sentiment_zh(raw: dict[str, bytes], **about) -> LabelledTexts:
    """One ``text<TAB>label`` per line; valid and test together are held out."""
    train, valid, test = (
        [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in lines(content))]
        for content in raw.values()
    )
    return clean_texts(train, valid + test, class_names=("negative", "positive"), **about)


def parse_yelp_short(raw: dict[str, bytes], **about) -> LabelledTexts:
    """One sentence per line, one file per side and class."""
    dev_0, dev_1, test_0, test_1 = map(lines, raw.values())
    train = [(text, 0) for text in dev_0] + [(text, 1) for text in dev_1]
    held_out = [(text, 0) for text in test_0] + [(text, 1) for text in test_1]
    return clean_texts(train, held_out, class_names=("negative", "positive"), **about)


def clean_texts(
    train_rows: list[tuple[str, int]], held_out_rows: list[tuple[str, int]], **about
) -> LabelledTexts:
    *kept, removed = _clean(_normalised(train_rows), _normalised(held_out_rows), "text")
    train, held_out, leaked = (Split(tuple(side), _labels(side)) for side in kept)
    return LabelledTexts(train=train, held_out=held_out, leaked=leaked, removed=removed, **about)


def _normalised(rows: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(text.strip().lower(), label) for text, label in rows]


def parse_fashion_mnist(raw: dict[str, bytes], **about) -> LabelledImages:
    """One file of images and one of labels per side; the side "t10k" is held out."""
    *kept, _, removed = _clean(_image_rows(raw, "train"), _image_rows(raw, "t10k"), "image")
    train, held_out = map(_image_split, kept)
    return LabelledImages(
        train=train, held_out=held_out, class_names=_GARMENTS, removed=removed, **about
    )


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


def _image_split(label_by_image: dict[bytes, int]) -> ImageSplit:
    # a bytearray, because PyTorch warns of arrays that cannot be written
    pixels = np.frombuffer(bytearray().join(label_by_image), np.uint8)
    return ImageSplit(pixels.reshape(-1, 28, 28), _labels(label_by_image))


def _image_rows(raw: dict[str, bytes], part: str) -> list[tuple[bytes, int]]:
    names = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
    images, labels = idx(names[0], raw[names[0]], 28, 28), idx(names[1], raw[names[1]])
    if len(images) != len(labels):
        raise OSError(f"{names[0]} holds {len(images)} images, {names[1]} {len(labels)} labels.")
    return [(image.tobytes(), int(y)) for image, y in zip(images, labels, strict=True)]


def idx(local: str, content: bytes, *sizes: int) -> UInt8[np.ndarray, "..."]:
    """Read bytes in the idx format of MNIST: any number of rows, each of the given sizes.

    Two zeros, 8 for unsigned bytes, the number of dimensions, each size as a big-endian integer of
    four bytes, then the values with the last index fastest.

    Example:
        >>> idx("labels", bytes([0, 0, 8, 1, 0, 0, 0, 3, 9, 0, 4]))
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
