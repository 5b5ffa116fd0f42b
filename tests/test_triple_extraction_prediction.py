"""Prediction and evaluation against plain loops, and on texts typed by hand.

The models here are tables: what a token is decides the logits, so that loops can say what must be
found. A few tests run the real model.
"""

import random
import types

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.overrides import TorchFunctionMode

from cln_tutorial.triple_extraction import prediction
from cln_tutorial.triple_extraction.alignment import encode_windows
from cln_tutorial.triple_extraction.characters import CharTokenizer
from cln_tutorial.triple_extraction.encoders import SmallEncoder
from cln_tutorial.triple_extraction.model import TripleExtractor
from cln_tutorial.triple_extraction.pipeline import pipeline
from cln_tutorial.triple_extraction.prediction import evaluate, predict
from cln_tutorial.triple_extraction.triples import Example, Triple

nan = float("nan")
RELATIONS = ("of", "in", "by")


class TableModel(nn.Module):
    """Logits of a token are a row of a table; those of an object depend on the subject's ends."""

    def __init__(self, tokenizer, subjects, objects, relations=RELATIONS, **settings):
        super().__init__()
        self.tokenizer, self.relations = tokenizer, tuple(relations)
        self.subjects = nn.Parameter(subjects)  # [V, 2]
        self.objects = nn.Parameter(objects)  # [V, V, R, 2], of the subject and of the token
        self.dropout = nn.Dropout(0.5)
        self.subject_power, self.object_power = 2.0, 4.0
        self.max_length, self.stride, self.threshold = None, 0, (0.5, 0.5)
        self.encoded: list[torch.Size] = []
        self.object_calls: list[int] = []
        for name, value in settings.items():
            setattr(self, name, value)

    def encode(self, input_ids, attention_mask, token_type_ids=None):
        self.encoded.append(input_ids.shape)
        return self.dropout(input_ids[..., None].to(self.subjects.dtype))

    def subject_logits(self, hidden):
        return self.subjects[hidden[..., 0].long()]

    def object_logits(self, hidden, subject_spans, subject_batch):
        self.object_calls.append(len(subject_batch))
        ids = hidden[..., 0].long()[subject_batch]
        first, last = (ids.gather(1, subject_spans[:, end, None]).expand_as(ids) for end in (0, 1))
        return (self.objects[first, ids] + self.objects[last, ids]) / 2


ALPHABET = "abcdefghij ,"


def table_model(seed=0, dtype=torch.float32, **settings):
    tokenizer = CharTokenizer.fit([ALPHABET])
    rng, size = torch.Generator().manual_seed(seed), len(tokenizer)
    subjects = 2 * torch.randn(size, 2, generator=rng, dtype=dtype)
    objects = 2 * torch.randn(size, size, len(RELATIONS), 2, generator=rng, dtype=dtype)
    # [CLS], [SEP] and padding shout, and must never be heard.
    subjects[:4] = objects[:, :4] = 9.0
    return TableModel(tokenizer, subjects, objects, **settings).eval()


def random_texts(n, longest=25, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(0, longest))) for _ in range(n)]


def sigmoid(z, power):
    return torch.as_tensor(z, dtype=torch.float64).sigmoid().item() ** power


def by_loops(model, text, threshold=(0.5, 0.5), max_subjects=None):
    """All places, as the article's code has it: one text, one subject after the other."""
    (window,) = encode_windows(model.tokenizer, [text])
    ids, mask = window.input_ids, window.alignment.token_mask

    def spans(start, end, level):
        for i in range(len(ids)):
            ends = [j for j in range(i, len(ids)) if mask[j] and end[j] > level]
            if mask[i] and start[i] > level and ends:
                yield (start[i] * end[ends[0]]) ** 0.5, i, ends[0]

    found = {}
    start, end = ([sigmoid(model.subjects[t, e], 2) for t in ids] for e in (0, 1))
    subjects = sorted(spans(start, end, threshold[0]), reverse=True)[:max_subjects]
    for confidence, i, j in subjects:
        for relation, name in enumerate(model.relations):
            logits = (model.objects[ids[i], ids] + model.objects[ids[j], ids])[:, relation] / 2
            start_o, end_o = ([sigmoid(z, 4) for z in logits[:, e]] for e in (0, 1))
            for of_object, k, m in spans(start_o, end_o, threshold[1]):
                s, o = (window.alignment.token_to_char_span(*each) for each in ((i, j), (k, m)))
                found[s, o, relation] = Triple(
                    text[slice(*s)], name, text[slice(*o)], s, o, confidence * of_object
                )
    return [found[place] for place in sorted(found)]


def places(triples):
    return [(t.key, t.subject_span, t.object_span) for t in triples]


def assert_same(found, expected):
    """Same triples, at the same places, with scores to float32's rounding (powers of 4 of it)."""
    assert [places(each) for each in found] == [places(each) for each in expected]
    scores, wanted = ([t.score for row in rows for t in row] for rows in (found, expected))
    assert scores == pytest.approx(wanted, rel=3e-6)


# --- against loops --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("max_subjects", [None, 30])
def test_prediction_in_batches_is_that_of_loops_over_single_texts(batch_size, max_subjects):
    model, texts = table_model(), random_texts(40)
    found = predict(
        model,
        texts,
        batch_size=batch_size,
        max_subjects=max_subjects,
        return_all_occurrences=True,
    )
    expected = [by_loops(model, text) for text in texts]
    assert_same(found, expected)
    assert sum(map(len, expected)) > 200
    for text, triples in zip(texts, found, strict=True):
        for triple in triples:
            assert text[slice(*triple.subject_span)] == triple.subject
            assert text[slice(*triple.object_span)] == triple.object
            assert 0 < triple.score <= 1


def test_an_encoder_reads_each_window_once_and_all_subjects_are_tagged_in_one_pass():
    model, texts = table_model(), random_texts(40)
    predict(model, texts, batch_size=16)
    n = sum(bool(text.strip()) for text in texts)
    assert [shape[0] for shape in model.encoded] == [16, 16, n - 32]
    assert len(model.object_calls) <= 3
    assert sum(model.object_calls) > n
    # Texts of like length go together: most of the padding is gone.
    assert model.encoded[0][1] > model.encoded[1][1] > model.encoded[2][1]


def test_many_subjects_go_through_the_object_tagger_in_parts(monkeypatch):
    model, texts = table_model(), random_texts(20)
    expected = predict(model, texts, return_all_occurrences=True)
    parts, model.object_calls = model.object_calls, []
    length = max(map(len, texts)) + 2
    monkeypatch.setattr(prediction, "CELLS", 10 * 2 * length * len(RELATIONS) + 1)
    assert predict(model, texts, return_all_occurrences=True) == expected
    assert max(model.object_calls) == 10 < parts[0] == sum(model.object_calls)


def test_more_triples_than_expected_are_all_found(monkeypatch):
    model, texts = table_model(), random_texts(20)
    expected = predict(model, texts, return_all_occurrences=True)
    monkeypatch.setattr(prediction, "EXPECTED", 1)
    for max_subjects in (None, 30):
        found = predict(model, texts, return_all_occurrences=True, max_subjects=max_subjects)
        assert found == expected
    assert sum(map(len, expected)) > 2 * len(texts)


def test_max_subjects_keeps_the_most_probable_ones():
    # No letter stands twice in a text, so that no two subjects are as probable.
    rng, model = random.Random(1), table_model()
    texts = ["".join(rng.sample(ALPHABET, len(ALPHABET))) for _ in range(30)]
    for k in (1, 2, 5):
        found = predict(model, texts, max_subjects=k, return_all_occurrences=True)
        assert_same(found, [by_loops(model, text, max_subjects=k) for text in texts])
        assert max(len({t.subject_span for t in row}) for row in found) == k


def test_thresholds_are_those_of_the_model_unless_given():
    texts = random_texts(10)
    for thresholds in [(0.3, 0.7), (0.7, 0.3)]:
        expected = predict(table_model(threshold=thresholds), texts)
        as_mapping = dict(zip(("subject", "object"), thresholds, strict=True))
        model = table_model()
        assert predict(model, texts, threshold=thresholds) == expected
        assert predict(model, texts, threshold=as_mapping) == expected
        every = [by_loops(model, text, thresholds) for text in texts]
        found = predict(model, texts, threshold=thresholds, return_all_occurrences=True)
        assert_same(found, every)
        assert predict(model, texts) != expected


def test_the_powers_of_the_model_hold_in_prediction():
    # sigma(1) is 0.731: above one half, but its square is 0.534 and its fourth power 0.286.
    model = table_model()
    with torch.no_grad():
        model.subjects.fill_(1.0)
        model.objects.fill_(1.0)
    assert predict(model, "ab") == []
    model.object_power = 2.0
    (triple, *_) = triples = predict(model, "ab")
    assert len(triples) == 2 * 2 * len(RELATIONS)
    # Each span's confidence is sigma(1)^2, and the score the product of two.
    assert triple.score == pytest.approx(0.7310585786300049**4, rel=1e-6)
    model.subject_power = 3.0
    assert predict(model, "ab") == []


# --- the answers' form ----------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_texts_and_of_the_places():
    model, texts = table_model(), random_texts(30)
    found = predict(model, texts)
    assert found == [predict(model, text) for text in texts]
    assert predict(model, texts[::-1]) == found[::-1]
    assert predict(model, iter(texts)) == found
    for row in found:
        keys = [(t.subject_span, t.object_span, RELATIONS.index(t.relation)) for t in row]
        assert keys == sorted(keys)


def test_no_text_and_empty_texts_have_no_triples():
    model = table_model()
    assert predict(model, []) == []
    assert predict(model, [""]) == [[]]
    assert predict(model, "") == []
    assert predict(model, ["", " \n", "  "]) == [[], [], []]
    assert model.encoded == []
    model, _ = repeated_model()
    assert [len(row) for row in predict(model, ["", "a b", ""])] == [0, 1, 0]


def repeated_model():
    """'a' is a subject, and 'b' its object, wherever they stand; a 'c' behind 'b' is more so."""
    model = table_model()
    ids = model.tokenizer(["abc"])["input_ids"][0]
    a, b, c = ids[1:-1]
    with torch.no_grad():
        model.subjects.fill_(-9)
        model.objects.fill_(-9)
        model.subjects[a] = 3.0
        model.objects[a, b, 0, :] = 3.0
    return model, (a, b, c)


def test_the_same_triple_at_several_places_comes_once_or_with_every_place():
    model, _ = repeated_model()
    every = predict(model, "a b, a b", return_all_occurrences=True)
    assert places(every) == [
        (("a", "of", "b"), s, o) for s in ((0, 1), (5, 6)) for o in ((2, 3), (7, 8))
    ]
    # All four are as good: the first one stays.
    assert places(predict(model, "a b, a b")) == places(every[:1])


def test_of_several_places_the_best_one_stays():
    model = table_model()
    seen = 0
    for text in random_texts(30, seed=4):
        every = predict(model, text, return_all_occurrences=True)
        groups = {}
        for triple in every:
            groups.setdefault(triple.key, []).append(triple)
        best = {max(row, key=lambda t: t.score) for row in groups.values()}
        assert predict(model, text) == [triple for triple in every if triple in best]
        seen += len(every) - len(best)
    assert seen > 30


# --- long texts -----------------------------------------------------------------------------------


def test_triples_inside_the_overlap_of_two_windows_are_found_once_with_the_best_score():
    model, (a, _, _) = repeated_model()
    text = "d" * 6 + "a b" + "d" * 5
    whole = predict(model, text)
    assert places(whole) == [(("a", "of", "b"), (6, 7), (8, 9))]
    model.max_length, model.stride = 8, 3  # windows of 6 characters, 3 of them shared
    assert predict(model, text) == whole

    # In the window that starts with it, 'a' is less sure than in the one before.
    scores = {}

    def less_sure(self, hidden):
        logits = TableModel.subject_logits(self, hidden)
        logits[hidden[:, 1, 0] == a] -= 1.0
        scores["seen"] = scores.get("seen", 0) + int((hidden[..., 0] == a).sum())
        return logits

    model.subject_logits = types.MethodType(less_sure, model)
    model.stride = 4
    assert predict(model, text) == whole
    assert scores["seen"] > 1


def test_a_long_text_of_many_windows_has_every_triple_of_neighbours():
    model, _ = repeated_model()
    model.max_length, model.stride = 10, 4
    text = "".join(random.Random(5).choices("ab d", k=200))
    found = {
        (t.subject_span[0], t.object_span[0])
        for t in predict(model, text, return_all_occurrences=True)
    }
    near = {
        (i, k)
        for i, x in enumerate(text)
        for k, y in enumerate(text)
        if x == "a" and y == "b" and abs(i - k) < 4
    }
    assert near <= found
    assert len(near) > 20


def test_a_text_cut_without_overlap_is_reported_once():
    model, _ = repeated_model()
    model.max_length = 8
    texts = ["dddda b", "a b", "ddddd" * 9, "b a"]
    with pytest.warns(UserWarning, match=r"2 of 4 texts .* `stride` is 0") as caught:
        found = predict(model, texts, batch_size=2)
    assert len(caught) == 1
    assert [len(row) for row in found] == [0, 1, 0, 1]
    model.stride = 3
    assert [len(row) for row in predict(model, texts)] == [1, 1, 0, 1]  # and no warning


# --- NaN, modes, precision ------------------------------------------------------------------------


@pytest.mark.parametrize("max_subjects", [None, 2])
@pytest.mark.parametrize("stage", ["subjects", "objects"])
def test_nan_logits_raise_and_name_the_text(stage, max_subjects):
    model, (a, _, c) = repeated_model()
    with torch.no_grad():
        if stage == "subjects":
            model.subjects[c, 1] = nan
        else:
            model.objects[a, c, 2, 0] = nan
    texts = ["a b", "b", "aaa aaa bc d", "ab"]
    message = r"`texts\[2\]` are NaN"
    with pytest.raises(RuntimeError, match=message):
        predict(model, texts, max_subjects=max_subjects)
    examples = [Example(text, []) for text in texts]
    with pytest.raises(RuntimeError, match=message):
        evaluate(model, examples, max_subjects=max_subjects)
    assert [len(row) for row in predict(model, ["a b", "d"], max_subjects=max_subjects)] == [1, 0]


def test_nan_at_padding_and_special_tokens_is_nobodys_business():
    model = table_model()
    texts = random_texts(10)
    expected = predict(model, texts)
    with torch.no_grad():
        for special in (0, 2, 3):  # [PAD], [CLS], [SEP]
            model.subjects[special] = model.objects[:, special] = nan
    assert predict(model, texts) == expected
    assert predict(model, texts, max_subjects=30) == expected  # nor are slots without a subject


def test_every_module_gets_its_own_mode_back_also_after_an_error():
    model, (_, _, c) = repeated_model()
    expected = predict(model.eval(), "a b")
    model.frozen = nn.Sequential(nn.Dropout(0.5)).eval()
    model.train()
    model.frozen.eval()
    modes = [module.training for module in model.modules()]
    assert set(modes) == {True, False}
    assert predict(model, "a b") == expected  # a dropout of 0.5 does nothing
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        model.subjects[c] = nan
    with pytest.raises(RuntimeError, match="NaN"):
        predict(model, "abc")
    with pytest.raises(RuntimeError, match="NaN"):
        evaluate(model, [Example("abc", [])])
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_nothing_is_recorded_for_gradients():
    model = table_model()
    seen = []

    def encode(self, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), self.training))
        return TableModel.encode(self, *args, **kwargs)

    model.train()
    model.encode = types.MethodType(encode, model)
    predict(model, "abc")
    assert seen == [(False, False)]


def test_amp_dtype_is_the_autocast_of_the_model_and_of_nothing_behind_it():
    model, texts = table_model(), random_texts(5)
    seen = []

    def encode(self, *args, **kwargs):
        on = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if on else None)
        return TableModel.encode(self, *args, **kwargs)

    model.encode = types.MethodType(encode, model)
    plain = predict(model, texts)
    assert predict(model, texts, amp_dtype=torch.bfloat16) == plain
    assert seen == [None, torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_keep_their_order_where_their_probabilities_would_not(dtype):
    # sigma(10)^4 and sigma(12)^4 are both 1 in half types, sigma(-6)^4 is 0 in float16.
    model = table_model(dtype=dtype)
    _, b, c = model.tokenizer(["abc"])["input_ids"][0][1:-1]
    with torch.no_grad():
        model.subjects.fill_(10.0)
        model.objects.fill_(-6.0)
        model.objects[:, b] = 10.0
        model.objects[:, c] = 12.0
    found = predict(model, "abc", threshold=(0.5, 0))
    score = {t.object: t.score for t in found}
    assert 0 < score["a"] < score["b"] < score["c"] <= 1
    # float32 arithmetic on numbers that the half types hold exactly
    assert score["a"] == pytest.approx(sigmoid(10, 2) * sigmoid(-6, 4), rel=1e-5)


def test_a_model_in_float64_has_scores_in_float64():
    model, text = table_model(dtype=torch.float64), random_texts(3)[2]
    found, expected = predict(model, text, return_all_occurrences=True), by_loops(model, text)
    assert places(found) == places(expected)
    assert [t.score for t in found] == pytest.approx([t.score for t in expected], rel=1e-14)


# --- how often the host waits ---------------------------------------------------------------------

WAITS = (
    *("tolist", "item", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "equal"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "allclose", "bincount"),
)


class CountWaits(TorchFunctionMode):
    """Count the calls that, on an accelerator, return only when the device is done."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        index = index if isinstance(index, tuple) else (index,)
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
        to_host = name == "to" and any(str(each) == "cpu" for each in args[1:])
        on_one_argument = name == "where" and len(args) == 1
        by_tensor = name == "repeat_interleave" and isinstance(args[1], torch.Tensor)
        if name in WAITS or by_mask or on_one_argument or by_tensor:
            self.found.append(name)
        assert not (to_host and args[0].device.type != "cpu")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("max_subjects", "per_batch"), [(3, ["tolist"]), (None, ["nonzero", "tolist"])]
)
def test_the_host_waits_once_per_batch_and_twice_to_count_the_subjects(max_subjects, per_batch):
    model, texts = table_model(), ["abcdefg" * 2] * 20
    with CountWaits() as waits:
        predict(model, texts, batch_size=4, max_subjects=max_subjects)
    assert waits.found == per_batch * 5
    model, _ = repeated_model()
    with CountWaits() as waits:
        assert predict(model, "d", max_subjects=max_subjects) == []
    assert waits.found == per_batch


def test_a_batch_with_more_triples_than_expected_costs_one_wait_more(monkeypatch):
    model, texts = table_model(), ["abcdefg" * 2] * 4
    monkeypatch.setattr(prediction, "EXPECTED", 1)
    with CountWaits() as waits:
        predict(model, texts, max_subjects=3)
    assert waits.found == ["tolist"] * 2


# --- texts typed by hand --------------------------------------------------------------------------


def typed(text, *triples):
    """A mention is searched behind the place that a number in front of it names."""

    def place(mention):
        start, mention = mention if isinstance(mention, tuple) else (0, mention)
        start = text.index(mention, start)
        return mention, (start, start + len(mention))

    rows = []
    for subject, relation, object in triples:
        (s, s_span), (o, o_span) = place(subject), place(object)
        rows.append((s, relation, o, s_span, o_span))
    return Example(text, rows)


TYPED = [
    typed(
        "弗朗茨·卡夫卡出生于布拉格,卡夫卡写了《城堡》。",
        ("弗朗茨·卡夫卡", "born in", "布拉格"),
        ((10, "卡夫卡"), "wrote", "城堡"),
    ),
    typed(
        "👩🏽‍🚀 Zoë flew to the 🌕 with 山田 and e\u0301mile 🇫🇷!",
        ("👩🏽‍🚀 Zoë", "flew to", "🌕"),
        ("Zoë", "flew with", "山田"),
        ("Zoë", "flew with", "e\u0301mile 🇫🇷"),
    ),
    typed(
        "Oxford University Press is part of the University of Oxford, in Oxford.",
        ("Oxford University Press", "located in", (61, "Oxford")),
        ("Oxford University Press", "named after", "Oxford"),
        ((30, "University of Oxford"), "owns", "Oxford University Press"),
    ),
    typed("New  York\tCity  Council", ("New  York\tCity  Council", "in", "New  York")),
    typed("A 🙂.", ("🙂", "is", "🙂")),
    typed("Nobody met nobody."),
]


class Oracle(nn.Module):
    """A model that knows some texts by heart: its tags are perfect, at its tokenizer's tokens."""

    def __init__(self, tokenizer, examples, subjects=None):
        super().__init__()
        self.tokenizer, self.examples, self.subjects = tokenizer, list(examples), subjects
        self.relations = tuple(sorted({t.relation for e in examples for t in e.triples}))
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.subject_power, self.object_power = 2.0, 4.0
        self.max_length, self.stride, self.threshold = None, 0, (0.5, 0.5)
        windows = encode_windows(tokenizer, [e.text for e in examples])
        self.windows = {tuple(window.input_ids): window for window in windows}
        self.n_encoded = 0

    def encode(self, input_ids, attention_mask, token_type_ids=None):
        self.n_encoded += len(input_ids)
        known = list(self.windows)
        rows = [
            known.index(tuple(ids[mask == 1].tolist()))
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        return torch.tensor(rows).float()[:, None, None].expand(*input_ids.shape, 1)

    def _window(self, row):
        window = list(self.windows.values())[int(row[0, 0])]
        return window.alignment, self.examples[window.text_index]

    def subject_logits(self, hidden):
        logits = torch.full((*hidden.shape[:2], 2), -9.0)
        for at, row in enumerate(hidden):
            alignment, example = self._window(row)
            spans = [t.subject_span for t in example.triples]
            if self.subjects is not None:
                spans = self.subjects[example.text]
            for span in spans:
                first, last = alignment.char_to_token_span(*span)
                logits[at, first, 0] = logits[at, last, 1] = self.scale
        return logits

    def object_logits(self, hidden, subject_spans, subject_batch):
        shape = (len(subject_batch), hidden.shape[1], len(self.relations), 2)
        logits = torch.full(shape, -9.0)
        for n, (span, at) in enumerate(zip(subject_spans.tolist(), subject_batch, strict=True)):
            alignment, example = self._window(hidden[at])
            for t in example.triples:
                if alignment.char_to_token_span(*t.subject_span) == tuple(span):
                    relation = self.relations.index(t.relation)
                    first, last = alignment.char_to_token_span(*t.object_span)
                    logits[n, first, relation, 0] = logits[n, last, relation, 1] = self.scale
        return logits


def byte_level_bpe(vocab_size):
    """Byte-level pieces, with a leading blank, as GPT-2 and RoBERTa have them."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([e.text for e in TYPED], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def char_tokenizer(vocab_size):
    # Half of the characters are unknown to it: their ids are all the same, their places are not.
    return CharTokenizer(sorted({each for e in TYPED for each in e.text})[::2])


@pytest.mark.parametrize(
    ("make", "vocab_size"),
    [(char_tokenizer, 0), (byte_level_bpe, 257), (byte_level_bpe, 320)],
    ids=["characters", "bytes", "byte-level BPE"],
)
def test_free_text_comes_back_with_its_characters(make, vocab_size):
    tokenizer = make(vocab_size)
    model = Oracle(tokenizer, TYPED)
    texts = [example.text for example in TYPED]
    found = predict(model, texts, batch_size=4)
    windows = encode_windows(tokenizer, texts)
    for window, text, example, triples in zip(windows, texts, TYPED, found, strict=True):
        alignment = window.alignment

        def whole_tokens(span, alignment=alignment):
            return alignment.token_to_char_span(*alignment.char_to_token_span(*span))

        expected = {
            (whole_tokens(t.subject_span), t.relation, whole_tokens(t.object_span))
            for t in example.triples
        }
        assert {(t.subject_span, t.relation, t.object_span) for t in triples} == expected
        for triple in triples:
            assert text[slice(*triple.subject_span)] == triple.subject
            assert text[slice(*triple.object_span)] == triple.object
        if vocab_size != 320:  # tokens are no longer than characters: nothing is added
            gold = {(t.key, t.subject_span, t.object_span) for t in example.triples}
            assert set(places(triples)) == gold
    assert [len(triples) for triples in found] == [2, 3, 3, 1, 1, 0]


# --- evaluation -----------------------------------------------------------------------------------

SENTENCE = "Ada met Bob and Cyd in Rome."
GOLD = typed(SENTENCE, ("Ada", "of", "Bob"), ("Ada", "in", "Rome"), ("Cyd", "of", "Rome"))
# What the model thinks: one object is wrong, and it takes Bob for a subject instead of Cyd.
THOUGHT = typed(SENTENCE, ("Ada", "of", "Bob"), ("Ada", "in", "Bob"), ("Cyd", "of", "Rome"))


def wrong_model(*more, subjects=("Ada", "Bob")):
    spans = [(SENTENCE.index(each), SENTENCE.index(each) + 3) for each in subjects]
    return Oracle(
        CharTokenizer.fit([SENTENCE]),
        [THOUGHT, *more],
        {SENTENCE: spans} | {e.text: [] for e in more},
    )


def counts(score):
    return score.tp, score.n_pred, score.n_gold


def test_the_stages_of_the_cascade_are_scored_by_themselves():
    model = wrong_model()
    report = evaluate(model, [GOLD])
    assert counts(report) == (1, 2, 3)
    assert counts(report.subject) == (1, 2, 2)  # Ada; Bob is none, Cyd is missing
    assert counts(report.object_given_subject) == (2, 3, 3)  # Cyd's object is right, once given
    assert report.match == "text"
    assert model.n_encoded == 1


def test_subjects_without_a_place_are_looked_up_in_the_text():
    gold = Example(SENTENCE, [t.key for t in GOLD.triples])
    report = evaluate(wrong_model(), [gold])
    assert counts(report.object_given_subject) == (2, 3, 3)
    absent = Example(SENTENCE, [("Eve", "of", "Bob")])
    report = evaluate(wrong_model(), [absent])
    assert (counts(report.object_given_subject), counts(report.subject)) == ((0, 0, 1), (0, 2, 1))


def test_sentences_without_triples_count_as_false_predictions():
    empty = Example("Dan ran.", [])
    model = wrong_model(empty)
    report = evaluate(model, [GOLD, empty, Example(SENTENCE, [])])
    assert counts(report) == (1, 4, 3)
    assert counts(report.subject) == (1, 4, 2)
    assert counts(report.object_given_subject) == (2, 3, 3)
    assert (report.n_empty, report.false_on_empty) == (2, 2)


def test_spans_count_at_each_of_their_places_and_texts_once():
    text = "a b, a b"
    model, _ = repeated_model()
    gold = typed(text, ("a", "of", "b"), ((1, "a"), "of", (5, "b")))
    by_text, by_span = (evaluate(model, [gold], match=match) for match in ("text", "span"))
    assert (counts(by_text), counts(by_span)) == ((1, 1, 1), (2, 4, 2))
    # The first subject alone is annotated: the other one is not given.
    gold = typed(text, ("a", "of", "b"))
    assert counts(evaluate(model, [gold], match="span").object_given_subject) == (1, 2, 1)


def test_rules_groups_and_the_dictionary_are_handed_on():
    train = [Example("Ada of Bob", [("Ada", "of", "Bob")])]
    report = evaluate(
        wrong_model(), [GOLD], match=str.casefold, by=("relation", "seen"), train=train
    )
    assert counts(report.groups["relation"]["of"]) == (1, 1, 2)
    assert counts(report.groups["seen"]["seen"]) == (1, 1, 1)
    assert counts(report.dictionary) == (1, 1, 3)
    assert evaluate(wrong_model(), [GOLD], threshold=(0.5, 1), match="last_word").n_pred == 0


def test_a_model_that_finds_no_subject_is_told_what_to_try():
    silent = wrong_model(subjects=())
    with pytest.warns(UserWarning, match=r"0 subjects predicted for 1 .*learning rate.*`prior`"):
        report = evaluate(silent, [GOLD])
    assert (report.subject.n_pred, report.object_given_subject.tp) == (0, 2)
    evaluate(silent, [Example(SENTENCE, [])])  # there is nothing to find, and no warning
    assert counts(evaluate(silent, [])) == (0, 0, 0)


# --- the real model -------------------------------------------------------------------------------


def real_model(**settings):
    torch.manual_seed(0)
    tokenizer = CharTokenizer.fit([ALPHABET])
    encoder = SmallEncoder(len(tokenizer), hidden_size=16, num_layers=2)
    model = TripleExtractor(encoder, RELATIONS, tokenizer=tokenizer, **settings)
    for head in (model.subject_head, model.object_head):
        nn.init.normal_(head.weight)  # some triples, without training
    return model


def test_the_real_model_predicts_what_its_forward_says():
    model, texts = real_model(), random_texts(12)
    found = predict(model, texts, return_all_occurrences=True)
    assert model.training
    model.eval()
    seen = 0
    for text, triples in zip(texts, found, strict=True):
        (window,) = encode_windows(model.tokenizer, [text])
        mask = window.alignment.token_mask
        ids = torch.tensor([window.input_ids])
        subjects = model(ids).subject_logits[0].detach().double().sigmoid() ** 2
        expected = set()
        for i, j in nearest(subjects, mask):
            spans = {"subject_spans": torch.tensor([[i, j]]), "subject_batch": torch.tensor([0])}
            objects = model(ids, **spans).object_logits[0].detach().double().sigmoid() ** 4
            for relation in range(len(RELATIONS)):
                for k, m in nearest(objects[:, relation], mask):
                    s, o = (window.alignment.token_to_char_span(*e) for e in ((i, j), (k, m)))
                    expected.add((s, RELATIONS[relation], o))
        assert {(t.subject_span, t.relation, t.object_span) for t in triples} == expected
        seen += len(expected)
    assert seen > 20


def nearest(p, mask):
    found = []
    for i in range(len(p)):
        ends = [j for j in range(i, len(p)) if mask[j] and p[j, 1] > 0.5]
        if mask[i] and p[i, 0] > 0.5 and ends:
            found.append((i, ends[0]))
    return found


def test_the_methods_of_the_model_are_these_functions():
    model = real_model()
    text = random_texts(1)[0]
    assert model.predict(text, max_subjects=2) == predict(model, text, max_subjects=2)
    example = Example(text, [(text[0], "of", text[1])])
    options = {"threshold": (0.4, 0.4), "by": ("relation",)}
    assert model.evaluate([example], **options) == evaluate(model, [example], **options)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": ["a", 3]}, TypeError, r"`texts\[1\]` must be a string; got int"),
        ({"texts": 3}, TypeError, "`texts` must be .* got int"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be .* got 0"),
        ({"batch_size": True}, ValueError, "`batch_size` must be .* got True"),
        ({"max_subjects": 0}, ValueError, "`max_subjects` must be .* got 0"),
        ({"max_subjects": 1.5}, ValueError, "`max_subjects` must be .* got 1.5"),
        ({"threshold": 0.5}, ValueError, "`threshold` must be a pair.* got 0.5"),
        ({"threshold": (0.5, 2)}, ValueError, r"`threshold\['object'\]` must be .* got 2"),
        ({"threshold": {"subject": 0.5}}, ValueError, "'subject' and 'object'.* got .'subject'."),
        ({"amp_dtype": torch.float32}, ValueError, "`amp_dtype` must be .* got torch.float32"),
        ({"return_all_occurrences": "yes"}, TypeError, "`return_all_occurrences` .* got 'yes'"),
    ],
)
def test_bad_input_of_predict_is_named_before_the_model_runs(change, error, message, unchecked):
    model = table_model()
    with pytest.raises(error, match=message):
        predict(model, **{"texts": ["abc"]} | change)
    assert model.encoded == []


def test_bad_input_of_evaluate_is_named(unchecked):
    model = table_model()
    with pytest.raises(TypeError, match=r"`examples\[0\]` must be an Example; got 'abc'"):
        evaluate(model, ["abc"])
    with pytest.raises(TypeError, match=r"`examples` must be .* got int"):
        evaluate(model, 3)
    with pytest.raises(ValueError, match="match"):
        evaluate(model, [Example("abc", [])], match="nearly")


def test_a_model_without_a_tokenizer_says_how_to_get_one():
    model = table_model()
    model.tokenizer = None
    for call in (lambda: predict(model, "a"), lambda: evaluate(model, [Example("a", [])])):
        with pytest.raises(ValueError, match=r"no tokenizer .*tokenizer=tokenizer"):
            call()


# --- the pipeline ---------------------------------------------------------------------------------


def test_the_pipeline_returns_records_as_those_of_hugging_face():
    model, _ = repeated_model()
    extract = pipeline("triple-extraction", model=model)
    (record,) = extract("d a b")
    # Every logit is 3: confidences of sigma(3)^2 and sigma(3)^4.
    assert record.pop("score") == pytest.approx(sigmoid(3, 6), rel=1e-6)
    assert record == {
        "subject": "a",
        "relation": "of",
        "object": "b",
        "subject_start": 2,
        "subject_end": 3,
        "object_start": 4,
        "object_end": 5,
    }
    assert extract(["d a b", "d"]) == [extract("d a b"), []]
    assert extract([]) == []


def test_options_of_the_pipeline_hold_for_every_call_or_for_one():
    model, _ = repeated_model()
    extract = pipeline("triple-extraction", model, return_all_occurrences=True, batch_size=1)
    assert len(extract("a b, a b")) == 4
    assert len(extract("a b, a b", return_all_occurrences=False)) == 1
    assert len(extract("a b, a b")) == 4


def test_the_pipeline_of_a_folder_is_that_of_the_model(tmp_path):
    model, texts = real_model(threshold=(0.3, 0.4)), random_texts(5)
    model.save_pretrained(tmp_path / "model")
    expected = pipeline("triple-extraction", model)(texts)
    for folder in (tmp_path / "model", str(tmp_path / "model")):
        assert pipeline("triple-extraction", model=folder)(texts) == expected
    assert sum(map(len, expected)) > 5


def test_bad_input_of_the_pipeline_is_named(unchecked):
    with pytest.raises(ValueError, match=r"`task` must be 'triple-extraction'; got 'ner'"):
        pipeline("ner", table_model())
    with pytest.raises(TypeError, match=r"`model` must be .* got int"):
        pipeline("triple-extraction", 3)
