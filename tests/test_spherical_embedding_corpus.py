"""Reading documents: as many out as in, counts as `Counter` has them, files whole or not at all."""

import bz2
import gc
import gzip
import hashlib
import itertools
import lzma
import os
import random
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cln_tutorial.spherical_embedding import corpus
from cln_tutorial.spherical_embedding.corpus import Vocabulary, encode, read_corpus


def documents_of(read, vocabulary):
    """The words of each document again."""
    words = [vocabulary.words[number] for number in read.tokens]
    borders = read.starts.tolist()
    return [words[a:b] for a, b in itertools.pairwise(borders)]


def read_words(docs, **options):
    vocabulary, read = read_corpus(docs, **{"min_count": 1, **options})
    return documents_of(read, vocabulary)


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


DOCS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=6), max_size=8)
# From one token at a time to more than there are: borders of documents and of chunks meet anyhow.
CHUNKS = st.integers(1, 60)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK", 4)


# --- words, counts, borders -----------------------------------------------------------------------


@settings(deadline=None)
@given(docs=DOCS, min_count=st.integers(1, 4), max_vocab=st.none() | st.integers(1, 6))
def test_words_are_ranked_and_left_out_as_a_counter_says(docs, min_count, max_vocab):
    # `most_common` keeps ties in the order of their first appearance, says Python's manual.
    ranked = Counter(word for doc in docs for word in doc).most_common(max_vocab)
    kept = {word: count for word, count in ranked if count >= min_count}
    if not kept:
        with pytest.raises(ValueError, match="the vocabulary is empty"):
            read_corpus(docs, min_count=min_count, max_vocab=max_vocab)
        return
    vocabulary, read = read_corpus(docs, min_count=min_count, max_vocab=max_vocab)
    assert vocabulary.words == tuple(kept)
    assert vocabulary.counts.tolist() == list(kept.values())
    assert documents_of(read, vocabulary) == [[w for w in doc if w in kept] for doc in docs]
    assert len(read) == len(docs)


def test_words_with_equal_counts_stay_in_the_order_of_their_first_appearance():
    # More than 16 ties: below, numpy sorts by insertion, which is stable by accident.
    words = [f"w{number}" for number in random.Random(7063).sample(range(1000), 500)]
    vocabulary, _ = read_corpus([words, words[::-1], ["often"] * 3], min_count=2)
    assert vocabulary.words == ("often", *words)


@settings(deadline=None)
@given(docs=DOCS.filter(any), chunk=CHUNKS, min_count=st.integers(1, 2))
def test_a_corpus_in_chunks_is_the_corpus_in_one(docs, chunk, min_count, tmp_path_factory):
    whole = read_corpus([*docs, ["a", "a"]], min_count=min_count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_CHUNK", chunk)
        folder = tmp_path_factory.mktemp("cache")
        for cache_dir in (None, folder):
            parts = read_corpus([*docs, ["a", "a"]], min_count=min_count, cache_dir=cache_dir)
            assert parts[0].words == whole[0].words
            assert np.array_equal(parts[0].counts, whole[0].counts)
            assert np.array_equal(parts[1].tokens, whole[1].tokens)
            assert np.array_equal(parts[1].starts, whole[1].starts)


def test_the_arrays_have_the_promised_dtypes_and_cannot_be_written(tmp_path):
    for cache_dir in (None, tmp_path):
        vocabulary, read = read_corpus(["a b a"], min_count=1, cache_dir=cache_dir)
        assert vocabulary.counts.dtype == read.starts.dtype == np.int64
        assert read.tokens.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            read.tokens[0] = 1


def test_a_vocabulary_finds_the_number_of_a_word():
    vocabulary, _ = read_corpus(["b a b"], min_count=1)
    assert (len(vocabulary), vocabulary.index) == (2, {"b": 0, "a": 1})


def test_a_vocabulary_with_a_repeated_word_or_a_missing_count_is_refused(unchecked):
    with pytest.raises(ValueError, match="'b' is there more than once"):
        Vocabulary(("a", "b", "b"), np.array([3, 2, 1]))
    with pytest.raises(ValueError, match="2 `words` cannot have 1 `counts`"):
        Vocabulary(("a", "b"), np.array([3]))


def test_an_empty_vocabulary_states_the_largest_count_and_min_count():
    message = "in 3 documents with 5 words the largest count of a word is 3, and `min_count` is 5"
    with pytest.raises(ValueError, match=message):
        read_corpus(["a b a", "", "a c"])
    with pytest.raises(ValueError, match=r"in 0 documents with 0 words .* is 0, and"):
        read_corpus([])


# --- documents in every form ----------------------------------------------------------------------


def test_strings_lists_tuples_generators_and_arrays_are_read_alike():
    expected = [["a", "b"], [], ["b"]]
    for docs in (
        ["a b", "", "b"],
        ("a  b\n", "\t", " b"),
        [["a", "b"], [], ["b"]],
        (words for words in (("a", "b"), (), ("b",))),
        (iter(words) for words in (["a", "b"], [], ["b"])),
        np.array(["a b", "", "b"]),
    ):
        assert read_words(docs) == expected


def test_words_of_numpy_become_plain_strings():
    vocabulary, _ = read_corpus([np.array(["a", "b"])], min_count=1)
    assert {type(word) for word in vocabulary.words} == {str}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\nb\n", [["a"], ["b"]]),
        ("a\nb", [["a"], ["b"]]),
        ("a\r\nb c\r\n", [["a"], ["b", "c"]]),
        ("a\n\n\nb\n", [["a"], [], [], ["b"]]),
        ("\na\n \n", [[], ["a"], []]),
        ("\ufeffa b\na\n", [["a", "b"], ["a"]]),
        ("\ufeff\ufeffa\n\ufeffa", [["\ufeffa"], ["\ufeffa"]]),
        ("a\0b a\n", [["a\0b", "a"]]),
        ("ein 🙂👩‍👩‍👧\n", [["ein", "🙂👩‍👩‍👧"]]),
        # Separators of Unicode, and those of ASCII, are white space between words and end no line.
        ("a\u2028b\x85c\x0bd\x0ce\x1cf\rg\n", [["a", "b", "c", "d", "e", "f", "g"]]),
        ("中文 分词\u3000后\n", [["中文", "分词", "后"]]),
    ],
)
def test_a_file_has_one_document_a_line_and_loses_none(tmp_path, content, expected):
    path = tmp_path / "docs.txt"
    path.write_bytes(content.encode())
    assert read_words(path) == read_words(str(path)) == expected


@settings(deadline=None)
@given(st.lists(st.text("ab \r\u2028é", max_size=5), min_size=1, max_size=6), st.booleans())
def test_as_many_documents_come_out_as_lines_went_in(tmp_path_factory, lines, last_line_feed):
    path = tmp_path_factory.mktemp("docs") / "docs.txt"
    lines = [*lines, "a"]  # without a line feed, a last line that is empty would be none
    path.write_bytes(("\n".join(lines) + "\n" * last_line_feed).encode())
    assert read_words(path) == [line.split() for line in lines]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".GZ", gzip.compress),
    ],
)
def test_a_compressed_file_is_read_and_a_damaged_one_named(tmp_path, suffix, compress):
    lines = [f"word{number} again" for number in range(2_000)]
    content = compress("\n".join(lines).encode())
    path = tmp_path / f"docs.txt{suffix}"
    path.write_bytes(content)
    assert read_words(path) == [line.split() for line in lines]
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    for damaged in (content[: len(content) // 2], bytes(flipped), b"a b a b"):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=rf"docs\.txt\{suffix} is truncated, damaged or not"):
            read_corpus(path)


def test_a_file_that_is_not_utf_8_is_named_with_the_line_and_the_byte(tmp_path):
    path = tmp_path / "docs.txt"
    path.write_bytes("gut\nschön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"docs\.txt, line 2: byte 4 \(0xf6\) is not UTF-8; conv"):
        read_corpus(path)
    path.write_bytes("gut\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"line 1: byte 1 .*the file looks like UTF-16: convert"):
        read_corpus(path)


def test_a_string_that_is_no_file_is_refused_and_the_message_says_what_to_write(tmp_path):
    for docs in ("a few words", "", "x" * 5_000, "nul\0", tmp_path / "no.txt", str(tmp_path)):
        with pytest.raises(ValueError, match=r"`docs` must be .*there is no file .*`\[text\]`"):
            read_corpus(docs)
        with pytest.raises(ValueError, match="there is no file"):
            encode(docs, Vocabulary(("a",), np.array([1])))


@pytest.mark.parametrize("docs", [b"text", 7, None])
def test_what_is_no_documents_is_refused(docs, unchecked):
    with pytest.raises(TypeError, match=r"`docs` must be documents or a path; got"):
        read_corpus(docs)


@pytest.mark.parametrize("wrong", [None, 7, b"text", ["a", 7], [["a"]], ["a", None]])
def test_a_document_without_words_is_named_by_its_number(wrong, unchecked):
    message = r"`docs\[2\]` must be a string or a list of words, each a string; got"
    for read in (read_corpus, lambda docs: encode(docs, Vocabulary(("a",), np.array([1])))):
        with pytest.raises(TypeError, match=message):
            read(iter(["a", ["b"], wrong]))


@pytest.mark.parametrize("name", ["min_count", "max_vocab"])
def test_bounds_of_the_vocabulary_are_positive_integers(name, unchecked):
    untouched = iter(["a"])
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got {value}"):
            read_corpus(untouched, **{name: value})
    for value in (1.5, "1", True):
        with pytest.raises(TypeError, match=f"`{name}` must be an integer; got"):
            read_corpus(untouched, **{name: value})
    assert list(untouched) == ["a"], "nothing is read before the arguments are checked"


def test_half_a_character_is_refused_because_no_file_could_hold_it():
    with pytest.raises(ValueError, match=r"the word 'b\\udce9' in `docs` holds half a character"):
        read_corpus(["a b\udce9"], min_count=1)


# --- words of a string ----------------------------------------------------------------------------


def test_a_tokenizer_makes_the_words_of_strings_and_leaves_lists_alone():
    docs = ["ab-c", ["d-e"]]
    assert read_words(docs, tokenizer=lambda text: text.split("-")) == [["ab", "c"], ["d-e"]]
    assert read_words(docs, tokenizer=list) == [["a", "b", "-", "c"], ["d-e"]]
    vocabulary, read = read_corpus(docs, min_count=1, tokenizer=list)
    again = encode(docs, vocabulary, tokenizer=list)
    assert np.array_equal(again.tokens, read.tokens)


def test_lower_case_comes_before_the_tokenizer_and_reaches_lists_too():
    docs = ["Ab AB", ["AB", "ab"]]
    assert read_words(docs) == [["Ab", "AB"], ["AB", "ab"]]
    assert read_words(docs, lowercase=True) == [["ab", "ab"], ["ab", "ab"]]
    marked = read_words(docs, lowercase=True, tokenizer=lambda text: ["<TEXT>", *text.split()])
    assert marked == [["<TEXT>", "ab", "ab"], ["ab", "ab"]]
    vocabulary = Vocabulary(("ab",), np.array([4]))
    assert encode(docs, vocabulary).starts.tolist() == [0, 0, 1]
    assert encode(docs, vocabulary, lowercase=True).starts.tolist() == [0, 2, 4]


def test_a_tokenizer_that_gives_no_words_is_refused(unchecked):
    with pytest.raises(TypeError, match="`tokenizer` must give a list of words; got 'a b'"):
        read_corpus(["a b"], tokenizer=str.strip)
    with pytest.raises(TypeError, match="`tokenizer` must be a function from text to words"):
        read_corpus(["a b"], tokenizer="nltk")


# --- known words ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(docs=DOCS, known=st.lists(st.sampled_from("abcdef"), unique=True), chunk=CHUNKS)
def test_encoding_leaves_out_unknown_words_and_no_document(docs, known, chunk):
    vocabulary = Vocabulary(tuple(known), np.ones(len(known), np.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_CHUNK", chunk)
        read = encode(docs, vocabulary)
    assert documents_of(read, vocabulary) == [[w for w in doc if w in known] for doc in docs]
    assert (read.tokens.dtype, read.starts.dtype) == (np.int32, np.int64)


def test_encoding_a_file_gives_what_reading_it_gave(tmp_path):
    path = tmp_path / "docs.txt"
    path.write_text("a b a\n\nc a rare\nb")
    vocabulary, read = read_corpus(path, min_count=2)
    again = encode(path, vocabulary)
    assert np.array_equal(again.tokens, read.tokens)
    assert again.starts.tolist() == read.starts.tolist() == [0, 3, 3, 4, 5]


# --- the memory map -------------------------------------------------------------------------------


def test_tokens_in_a_folder_are_mapped_from_one_file_named_by_its_content(tmp_path, small_chunks):
    docs = ["a b a c a b rare", "", "b c c"]
    folder = tmp_path / "new/cache"
    for _ in range(2):  # a second time, to the same file
        _, read = read_corpus(docs, min_count=2, cache_dir=folder)
        assert isinstance(read.tokens, np.memmap)
        (name,) = files_in(folder)
        content = (folder / name).read_bytes()
        assert name == f"{hashlib.sha256(content).hexdigest()[:32]}.tokens"
        assert content == np.array([0, 1, 0, 2, 0, 1, 1, 2, 2], "<i4").tobytes()
    read_corpus(["a a"], min_count=2, cache_dir=folder)
    assert len(files_in(folder)) == 2
    assert read.tokens.tolist() == [0, 1, 0, 2, 0, 1, 1, 2, 2], "the first map is what it was"


def test_documents_that_fail_leave_no_file(tmp_path, small_chunks):
    def failing():
        yield "a b c d e f g"
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        read_corpus(failing(), cache_dir=tmp_path)
    for docs in (["a b"] * 9, []):
        with pytest.raises(ValueError, match="the vocabulary is empty"):
            read_corpus(docs, min_count=10, cache_dir=tmp_path)
    assert files_in(tmp_path) == []


READER = """
    import sys
    from cln_tutorial.spherical_embedding import corpus

    corpus._CHUNK = 4
    def docs():
        yield "a b a b c c c"
        print("half", flush=True)
        sys.stdin.read(1)
        yield "a b c"
    _, read = corpus.read_corpus(docs(), min_count=1, cache_dir=sys.argv[1])
    print(read.tokens.tolist(), flush=True)
"""


def reader(folder):
    """Another process that stops in the middle of its documents until it is told to go on."""
    command = [sys.executable, "-c", textwrap.dedent(READER), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    assert process.stdout.readline() == "half\n"
    return process


def test_two_processes_at_once_read_the_same_and_leave_one_file(tmp_path):
    with reader(tmp_path) as first, reader(tmp_path) as second:
        assert len(files_in(tmp_path)) == 2, "each writes a file of its own"
        assert not any(name.endswith(".tokens") for name in files_in(tmp_path))
        outputs = [process.communicate("\n")[0] for process in (first, second)]
    # c is the most frequent word
    assert outputs == ["[1, 2, 1, 2, 0, 0, 0, 1, 2, 0]\n"] * 2
    (name,) = files_in(tmp_path)
    assert name.endswith(".tokens")


def test_a_killed_process_leaves_no_file_that_is_taken_for_whole(tmp_path):
    with reader(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    (leftover,) = files_in(tmp_path)
    assert leftover.endswith(".tmp")
    _, read = read_corpus(["a b"], min_count=1, cache_dir=tmp_path)
    assert read.tokens.tolist() == [0, 1]


def peak_memory(docs, **options):
    """Largest number of bytes that Python and numpy held while reading."""
    gc.collect()
    tracemalloc.start()
    try:
        read = read_corpus(docs, min_count=1, **options)
        return tracemalloc.get_traced_memory()[1], len(read[1].tokens)
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_the_tokens_or_with_a_folder_that_of_a_few_chunks(tmp_path):
    def docs():
        words = " ".join(f"word{number}" for number in range(1_000))
        for _ in range(2_000):
            yield words

    # Numbers, counts, ranks and masks of a few chunks of 65,536 tokens take less than this.
    chunks = 3_000_000
    peak, tokens = peak_memory(docs())
    assert tokens == 2_000_000
    # Four bytes each, and a sixteenth that an array keeps ready to grow.
    assert peak < 4.25 * tokens + chunks
    peak, tokens = peak_memory(docs(), cache_dir=tmp_path)
    assert tokens == 2_000_000
    assert peak < chunks


def test_a_bar_is_shown_only_if_asked_for(tmp_path, capfd):
    read_corpus(["a"], min_count=1)
    encode(["a"], Vocabulary(("a",), np.array([1])))
    assert capfd.readouterr() == ("", "")
    read_corpus(["a", "b"], min_count=1, progress=True)
    assert "2/2" in capfd.readouterr().err
    (tmp_path / "docs.txt").write_text("a\nb\nc")
    read_corpus(tmp_path / "docs.txt", min_count=1, progress=True)
    assert "3 documents" in capfd.readouterr().err


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_newsgroups_have_the_known_numbers_of_words(tmp_path):
    """Counted with awk for the set's SOURCE.md, and for the quarter of the chapter's tests."""
    path = Path(os.environ["CLN_TUTORIAL_DATA"], "newsgroups20/text.txt.xz")
    vocabulary, read = read_corpus(path, cache_dir=tmp_path)
    assert (len(read), len(read.tokens), len(vocabulary)) == (18_846, 4_705_373, 34_974)
    assert (np.diff(read.starts).min(), np.diff(read.starts).max()) == (1, 12_715)
    with lzma.open(path, "rt") as lines:
        vocabulary, read = read_corpus(line for number, line in enumerate(lines) if number % 4 == 0)
    assert (len(read), len(read.tokens), len(vocabulary)) == (4_712, 1_158_017, 15_785)
