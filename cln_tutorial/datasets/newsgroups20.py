"""20 Newsgroups, "by date": posts in the order of the file, which is sorted by class."""

import io
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Bool, Int64

from cln_tutorial.datasets.sources import lines

CLASS_NAMES = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
_SIDES = ("20news-bydate-train", "20news-bydate-test")
_FEWEST, _SHORTEST, _LONGEST = 5, 2, 20  # times a word occurs; letters of a word


@dataclass(frozen=True, eq=False)
class NewsgroupPosts:
    """Posts with one class each, as the published protocols use them: nothing is removed.

    The posts stand in the order of the file, **sorted by class**: first those of train, then those
    held out. Who learns from them in this order sees the labels. Quotations, signatures and near
    copies, of which a thread is full, are left in and not counted.

    Attributes:
        name: what :func:`load` was asked for.
        texts: one post each, lower-case words of a to z with one blank between them.
        labels: ``class_names[labels[i]]`` is the class of ``texts[i]``.
        held_out: the by-date split: false for the earlier posts (train), true for the later ones.
        class_names: the newsgroups.
        left_in: what is wrong with the set and was left in, in words, and how many.
        sha256: digest of the raw content of each source file.
        licence: what the origin states.
        source: where the files come from.
    """

    name: str
    texts: tuple[str, ...]
    labels: Int64[np.ndarray, "texts"]
    held_out: Bool[np.ndarray, "texts"]
    class_names: tuple[str, ...]
    left_in: dict[str, int]
    sha256: dict[str, str]
    licence: str
    source: str

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.name}: {(~self.held_out).sum():,} train and {self.held_out.sum():,} "
                f"held-out posts of {len(self.class_names)} newsgroups, in the order of the file",
                *(f"left in: {count:,} {what}" for what, count in self.left_in.items()),
                f"licence: {self.licence}",
                f"source: {self.source}",
            ]
        )


def parse_newsgroups20(raw: dict[str, bytes], **about) -> NewsgroupPosts:
    """One post a line; beside it its class and side, ``class<TAB>0`` for train, 1 for held out."""
    texts, rows = (tuple(lines(content)) for content in raw.values())
    if len(texts) != len(rows):
        raise OSError(f"{' and '.join(raw)} hold {len(texts)} posts and {len(rows)} labels.")
    labels, held_out = np.array([row.split("\t") for row in rows], dtype=np.int64).T
    return NewsgroupPosts(
        texts=texts,
        labels=labels.copy(),
        held_out=held_out == 1,
        class_names=CLASS_NAMES,
        left_in=_faults(texts, labels, held_out),
        **about,
    )


def _faults(
    texts: tuple[str, ...], labels: Int64[np.ndarray, "texts"], held_out: Int64[np.ndarray, "texts"]
) -> dict[str, int]:
    seen: dict[str, set[tuple[int, int]]] = {}
    for text, label, side in zip(texts, labels.tolist(), held_out.tolist(), strict=True):
        seen.setdefault(text, set()).add((label, side))
    both_sides = [where for where in seen.values() if len({side for _, side in where}) == 2]
    several = [where for where in seen.values() if len({label for label, _ in where}) > 1]
    return {
        "posts that follow one of their own class: shuffle them before training": int(
            (labels[1:] == labels[:-1]).sum()
        ),
        "posts that repeat an earlier post word for word": len(texts) - len(seen),
        "held-out posts that are in train": len(both_sides),
        "posts with several labels": len(several),
    }


def prepare_text(archive: bytes) -> bytes:
    """Make the file of the texts from the by-date archive (tar.gz).

    Of the header only the subject is kept, without a leading "Re:" or "Fwd:"; words are runs of the
    letters a to z of 2 to 20 letters that occur at least 5 times in all posts.
    """
    posts = [_words(content) for *_, content in _posts(archive)]
    counts = Counter(word for words in posts for word in words)
    kept = (" ".join(word for word in words if counts[word] >= _FEWEST) for words in posts)
    return "".join(f"{line}\n" for line in kept).encode()


def prepare_labels(archive: bytes) -> bytes:
    """Make the file of the classes and sides from the by-date archive (tar.gz)."""
    rows = (f"{CLASS_NAMES.index(group)}\t{side}\n" for side, group, *_ in _posts(archive))
    return "".join(rows).encode()


def _posts(archive: bytes) -> list[tuple[int, str, int, str]]:
    """Side, newsgroup, number and content of every post, sorted by these."""
    posts = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile():
                side, group, number = PurePosixPath(member.name).parts[-3:]
                content = tar.extractfile(member).read().decode("latin-1")
                posts.append((_SIDES.index(side), group, int(number), content))
    return sorted(posts)


def _words(post: str) -> list[str]:
    header, _, body = post.partition("\n\n")
    subject = re.search(r"^subject:[ \t]*((re|fwd):[ \t]*)?(.*)", header, re.IGNORECASE | re.M)
    text = f"{subject[3]}\n{body}" if subject else body
    words = re.findall("[a-z]+", text.lower())
    return [word for word in words if _SHORTEST <= len(word) <= _LONGEST]
