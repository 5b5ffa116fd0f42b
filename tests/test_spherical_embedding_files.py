"""Files of vectors: bit for bit, as gensim reads and writes them, and refused if they are cut."""

import json
import os
import re
import struct

import numpy as np
import pytest
from gensim.models import KeyedVectors
from gensim.models.doc2vec import Doc2Vec, TaggedDocument
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

import cln_tutorial
from cln_tutorial.spherical_embedding import files
from cln_tutorial.spherical_embedding.files import (
    METADATA,
    read_model,
    read_word2vec,
    write_model,
    write_word2vec,
)

WORDS = ("the", "</s>", "naïve", "词", "🙂", "3", "-1.5", "nul\0")
BOTH = pytest.mark.parametrize("binary", [False, True])


def vectors(words=8, dim=3, seed=7063):
    """Unit rows, as this chapter's are."""
    rows = np.random.default_rng(seed).standard_normal((words, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def bits(array):
    return array.view(np.uint32).tolist()


# --- word2vec: what comes back --------------------------------------------------------------------


@BOTH
@settings(deadline=None)
@given(st.data())
def test_every_float32_comes_back_bit_for_bit(binary, tmp_path_factory, data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    written = data.draw(arrays.arrays(np.float32, shape, elements=finite))
    path = tmp_path_factory.mktemp("files") / "vectors"
    write_word2vec(path, WORDS[: shape[0]], written, binary=binary)
    words, read = read_word2vec(path, binary=binary)
    assert words == WORDS[: shape[0]]
    assert read.dtype == np.float32
    assert bits(read) == bits(written)


@BOTH
def test_neighbours_of_a_power_of_two_and_the_extremes_come_back_bit_for_bit(binary, tmp_path):
    # The densest decimals: 8 digits cannot tell these from their neighbours everywhere.
    powers = (2.0 ** np.arange(-126, 128)).astype(np.float32)
    above, below = (np.nextafter(powers, np.float32(to)) for to in (np.inf, -np.inf))
    numbers = [*powers, *above, *below, np.float32(1e-45), np.float32(-0.0)]
    written = np.array(numbers, dtype=np.float32)[:, None]
    write_word2vec(tmp_path / "vectors", range(len(written)), written, binary=binary)
    words, read = read_word2vec(tmp_path / "vectors", binary=binary)
    assert words == tuple(map(str, range(len(written))))
    assert bits(read) == bits(written)


@settings(deadline=None)
@given(words=st.integers(2, 5), dim=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_the_form_of_a_file_is_found_by_looking(words, dim, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "vectors"
    written = vectors(words, dim, seed)
    for binary in (False, True):
        write_word2vec(path, WORDS[-words:], written, binary=binary)
        read = read_word2vec(path)
        assert read[0] == WORDS[-words:]
        assert bits(read[1]) == bits(written)


def test_text_is_one_word_a_line_with_nine_significant_digits(tmp_path):
    third, tiny = np.float32(1) / np.float32(3), np.float32(1e-10)
    write_word2vec(tmp_path / "v", ["a", 7], np.array([[third, -1], [0.5, tiny]], np.float32))
    assert (tmp_path / "v").read_bytes() == b"2 2\na 0.333333343 -1\n7 0.5 1.00000001e-10\n"


def test_bytes_are_little_endian_floats_between_a_blank_and_a_line_feed(tmp_path):
    write_word2vec(tmp_path / "v", ["a", "é"], np.float32([[1, 2], [3, 4]]), binary=True)
    rows = struct.pack("<2f", 1, 2), struct.pack("<2f", 3, 4)
    expected = b"2 2\na " + rows[0] + b"\n" + "é ".encode() + rows[1] + b"\n"
    assert (tmp_path / "v").read_bytes() == expected


def test_rows_of_a_larger_array_are_written_as_they_are_seen(tmp_path):
    whole = vectors(8, 6)
    for binary in (False, True):
        write_word2vec(tmp_path / "v", WORDS[:4], whole[::2, 1::2], binary=binary)
        assert bits(read_word2vec(tmp_path / "v")[1]) == bits(
            np.ascontiguousarray(whole[::2, 1::2])
        )


# --- word2vec: other programs ---------------------------------------------------------------------


@BOTH
def test_gensim_reads_our_files(binary, tmp_path):
    written = vectors()
    write_word2vec(tmp_path / "v", WORDS, written, binary=binary)
    read = KeyedVectors.load_word2vec_format(str(tmp_path / "v"), binary=binary)
    assert tuple(read.index_to_key) == WORDS
    assert bits(read.vectors) == bits(written)


@BOTH
def test_we_read_files_of_gensim(binary, tmp_path):
    theirs = KeyedVectors(3)
    theirs.add_vectors(list(WORDS), vectors())
    theirs.save_word2vec_format(str(tmp_path / "v"), binary=binary)
    words, read = read_word2vec(tmp_path / "v")
    assert words == WORDS
    # gensim writes the shortest decimals that give each float32 back
    assert bits(read) == bits(theirs.vectors)


@BOTH
def test_we_read_the_documents_of_gensim_which_it_writes_twice(binary, tmp_path):
    documents = [TaggedDocument(["a", "b"], [number]) for number in range(12)]
    theirs = Doc2Vec(documents, vector_size=3, min_count=1, epochs=1, workers=1).dv
    theirs.save_word2vec_format(str(tmp_path / "v"), binary=binary)
    words, read = read_word2vec(tmp_path / "v")
    assert words == tuple(map(str, range(12)))
    assert bits(read) == bits(theirs.vectors)
    content = (tmp_path / "v").read_bytes()
    (tmp_path / "v").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"v, (line 14|word 13): there are more words than line 1"):
        read_word2vec(tmp_path / "v")


def test_the_form_of_the_program_in_c_is_read(tmp_path):
    # Six decimals, a blank at the end of each line; `</s>` is a word like others.
    text = "3 2 \n</s> 0.123456 -0.992350 \nthe 1.000000 0.000000 \ndoc -0.600000 0.800000 "
    (tmp_path / "v").write_text(text)
    words, read = read_word2vec(tmp_path / "v")
    assert words == ("</s>", "the", "doc")
    assert bits(read) == bits(np.float32([[0.123456, -0.99235], [1, 0], [-0.6, 0.8]]))


def test_windows_line_ends_and_empty_lines_at_the_end_do_no_harm(tmp_path):
    (tmp_path / "v").write_bytes(b"2 1\r\na 0.5\r\nb 1\r\n\r\n")
    words, read = read_word2vec(tmp_path / "v")
    assert (words, read.tolist()) == (("a", "b"), [[0.5], [1.0]])


def test_a_file_without_words_is_read(tmp_path):
    (tmp_path / "v").write_text("0 100\n")
    for binary in (None, False, True):
        words, read = read_word2vec(tmp_path / "v", binary=binary)
        assert (words, read.shape) == ((), (0, 100))


# --- word2vec: what is refused --------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("word", ["New York", "", " a", "a\n", "a\tb", "a\u3000b", "a\u00a0b"])
def test_a_word_with_white_space_is_not_written(binary, word, tmp_path):
    message = f"the format ends a word at white space and cannot hold {word!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        write_word2vec(tmp_path / "v", ["a", word], vectors(2), binary=binary)
    assert not list(tmp_path.iterdir())


def test_what_no_file_can_hold_is_not_written(tmp_path, unchecked):
    path, two = tmp_path / "v", vectors(2)
    with pytest.raises(ValueError, match=r"`words\[1\]`: 'a' is there already \(`words\[0\]`\)"):
        write_word2vec(path, ["a", "a"], two)
    with pytest.raises(ValueError, match=r"`words\[1\]`: '1' is there already"):
        write_word2vec(path, ["1", 1], two)
    with pytest.raises(ValueError, match="3 `words` cannot have 2 `vectors`"):
        write_word2vec(path, ["a", "b", "c"], two)
    with pytest.raises(TypeError, match="`words` must be strings or integers; got None"):
        write_word2vec(path, ["a", None], two)
    with pytest.raises(TypeError, match=r"must be float32 of shape \(words, dim\); got float64"):
        write_word2vec(path, ["a", "b"], two.astype(np.float64))
    with pytest.raises(TypeError, match=r"got float32 of shape \(3,\)"):
        write_word2vec(path, ["a", "b"], two[0])
    for value in (np.nan, np.inf):
        two[1, 2] = value
        with pytest.raises(ValueError, match=r"`words\[1\]`: the vector of 'b' is not finite"):
            write_word2vec(path, ["a", "b"], two)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: must be the number of words and the number of dimensions; got b''"),
        ("a 0.5\n", "line 1: must be the number of words .*; got b'a 0.5"),
        ("2\n", "line 1: must be the number of words"),
        ("-1 2\n", "line 1: must be the number of words"),
        ("1 0\na\n", "line 1: must be the number of words"),
        ("9999999999999 100\na 1\n", "line 1: promises 9,999,999,999,999 words with 100 numbers"),
        ("1 9999999999999\na 1\n", "line 1: promises 1 words with 9,999,999,999,999 numbers"),
        ("2 2\na 0.5 1.0\n", "ends after line 2; line 1 promises 2 words"),
        ("2 2\na 0.5 1.0\nb 0.5\n", "line 3: must be a word and 2 numbers .*; got 1 numbers"),
        ("2 2\na 0.5 1.0\nb 0.5 1 2\n", "line 3: must be a word and 2 numbers .*; got 3 numbers"),
        ("2 2\na 0.5 1.0\nb c 0.5 1\n", "line 3: must be a word and 2 numbers .*; got 3 numbers"),
        ("2 2\na 0.5 1.0\n\nb 0.5 1\n", "line 3: must be a word and 2 numbers .*; got 0 numbers"),
        ("2 2\na 0.5 1.0\n 0.5 1\n", "line 3: there is no word before the numbers"),
        ("2 2\na 0.5 1.0\nb 0.5 x1\n", "line 3: could not convert string to float: b'x1'"),
        ("2 2\na 0.5 x1\nb 0.5 1.0\n", "line 2: could not convert string to float: b'x1'"),
        ("2 2\na 0.5 1.0\nb 0.5 nan\n", "line 3: the vector of 'b' is not finite"),
        ("2 2\na inf 1.0\nb 0.5 nan\n", "line 2: the vector of 'a' is not finite"),
        ("2 2\na 0.5 1.0\nb 1e39 1\n", "line 3: the vector of 'b' is not finite"),
        ("3 1\na 0.5\nb 0.5\na 0.25\n", r"line 4: 'a' is there already \(.*v, line 2\)"),
        ("2 1\na 0.5\nb 0.5\nc 0.25\n", "line 4: there are more words than line 1 promises"),
        (b"2 1\na 0.5\nb\xff 0.5\n", r"line 3: the word b'b\\xff' is not UTF-8"),
    ],
)
def test_a_faulty_text_is_named_with_file_and_line(content, message, tmp_path):
    path = tmp_path / "v"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for binary in (None, False):
        with pytest.raises(ValueError, match=rf"v[, ].*{message}"):
            read_word2vec(path, binary=binary)


def row(word, *numbers, end=b"\n"):
    return word + b" " + struct.pack(f"<{len(numbers)}f", *numbers) + end


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"2 2\n" + row(b"a", 0.5, 1), "word 2: the file ends; line 1 promises 2 words"),
        (b"2 2\n" + row(b"a", 1, 2) + row(b"b", 1, end=b""), "word 2: the file ends"),
        (
            b"1 2\n" + row(b"a", 1, 2) + row(b"b", 1, 2),
            "word 2: there are more words than line 1 promises",
        ),
        (b"2 2\n" + row(b"a", 1, 2) * 2, r"word 2: 'a' is there already \(.*v, word 1\)"),
        (b"1 2\n" + row(b"a", 1, np.nan), "word 1: the vector of 'a' is not finite"),
        (b"1 2\n" + row(b"a\xff", 1, 2), "word 1: the word .* is not UTF-8"),
        (b"1 2\n" + row(b"", 1, 2), "word 1: there is no word before the numbers"),
        (b"3 1\n" + row(b"a", 1, 2), "word 2: "),
    ],
)
def test_faulty_bytes_are_named_with_file_and_word(content, message, tmp_path):
    (tmp_path / "v").write_bytes(content)
    for binary in (None, True):
        with pytest.raises(ValueError, match=rf"v, {message}"):
            read_word2vec(tmp_path / "v", binary=binary)


@BOTH
def test_a_file_that_is_cut_off_anywhere_is_refused(binary, tmp_path):
    path = tmp_path / "v"
    write_word2vec(path, ["a", "b"], vectors(2), binary=binary)
    content = path.read_bytes()
    # A text cut within its last number is a shorter number, which nobody can know.
    whole = len(content) - 1 if binary else content.rindex(b" ") + 2
    for length in range(whole):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"v(,| ends)"):
            read_word2vec(path, binary=binary)
    path.write_bytes(content[:-1])
    assert bits(read_word2vec(path)[1]) == bits(vectors(2)), "the last line feed is no loss"


# --- models ---------------------------------------------------------------------------------------

ABOUT = {"parameters": {"dim": 3, "margin": 0.15, "seed": None}, "words": list(WORDS)}


def tensors():
    return {"words": vectors(), "counts": np.arange(8), "rows": np.array([True, False])}


def test_a_model_comes_back_bit_for_bit_with_all_that_was_said_about_it(tmp_path):
    write_model(tmp_path / "model", tensors(), ABOUT)
    read, about = read_model(tmp_path / "model")
    assert about == {**ABOUT, "version": cln_tutorial.__version__}
    assert read.keys() == tensors().keys()
    for key, tensor in tensors().items():
        assert read[key].dtype == tensor.dtype
        assert read[key].tobytes() == tensor.tobytes()


def test_a_model_is_a_plain_safetensors_file_with_json_in_its_header(tmp_path):
    write_model(tmp_path / "model", tensors(), ABOUT)
    assert load_file(tmp_path / "model").keys() == tensors().keys()
    content = (tmp_path / "model").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header["__metadata__"][METADATA])["words"] == list(WORDS)


def test_a_model_that_is_cut_off_foreign_or_not_finite_is_refused(tmp_path):
    path = tmp_path / "model"
    write_model(path, tensors(), ABOUT)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="model is no safetensors file, or cut off"):
            read_model(path)
    save_file(tensors(), path)
    with pytest.raises(ValueError, match=f"model was not written by `write_model`.*{METADATA}"):
        read_model(path)
    wrong = tensors()
    wrong["words"][5, 1] = np.nan
    write_model(path, wrong, ABOUT)
    with pytest.raises(ValueError, match=r"model: words\[5, 1\] is nan, not finite"):
        read_model(path)


def test_a_header_that_safetensors_would_not_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGEST_HEADER", 400)
    with pytest.raises(ValueError, match=r"a safetensors file holds 100 MB .*`max_vocab` keeps"):
        write_model(tmp_path / "model", tensors(), {"words": ["word"] * 100})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_word2vec(path, WORDS, vectors()),
        lambda path: write_word2vec(path, WORDS, vectors(), binary=True),
        lambda path: write_model(path, tensors(), ABOUT),
    ],
    ids=["text", "binary", "model"],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(write, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]
