"""From texts to triples with a trained cascade: one pass of the encoder, all subjects at once.

The article's code reads the sentence again for each of its subjects. Here a batch of sentences is
encoded once, all their subjects go through the object tagger together, and the spans are decoded on
the device. The model is anything with the methods ``encode``, ``subject_logits`` and
``object_logits`` of :class:`.TripleExtractor`, and its attributes.

Source: article 7161; the score and the windows are this package's.
"""

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.triple_extraction.alignment import Window, encode_windows, locate, pad_windows
from cln_tutorial.triple_extraction.decoding import (
    Threshold,
    first_true,
    nearest_ends,
    require_threshold,
    span_confidence,
)
from cln_tutorial.triple_extraction.evaluation import Report, Score, score_triples
from cln_tutorial.triple_extraction.triples import Example, Span, Triple

Thresholds = tuple[Threshold, Threshold] | Mapping[str, Threshold]

# Logits of objects that are held at a time: 64 MiB of float32.
CELLS = 2**24
# Triples per window that travel to the host without asking how many there are.
EXPECTED = 64
COLUMNS = 7


def predict(
    model: nn.Module,
    texts: str | Iterable[str],
    *,
    batch_size: int = 32,
    threshold: Thresholds | None = None,
    max_subjects: int | None = None,
    return_all_occurrences: bool = False,
    amp_dtype: torch.dtype | None = None,
) -> list[Triple] | list[list[Triple]]:
    r"""Find the triples of texts, with their places and a score.

    .. math:: \text{score} = \sqrt{p^s_{\text{start}}\, p^s_{\text{end}}}\;
        \sqrt{p^o_{\text{start}}\, p^o_{\text{end}}}

    for subject s and object o. Long texts are read in windows of the model's ``max_length`` that
    share ``stride`` tokens; a triple that several windows find counts once, with its best score.
    Texts of like length go together, which changes nothing but the time.

    On an accelerator the host waits twice per batch: for the number of subjects, and for the
    triples. With ``max_subjects`` it waits once. A batch with more than 64 triples per window on
    average is decoded a second time, for one wait more.

    Args:
        model: a :class:`.TripleExtractor` with a tokenizer.
        texts: strings, or one string.
        batch_size: windows that are encoded together.
        threshold: of the probabilities of subjects and objects, a pair or a mapping of "subject"
            and "object"; the model's own if not given.
        max_subjects: keep this many subjects per window, the most probable ones; ``None`` for all.
        return_all_occurrences: whether a triple that is found at several places of its text comes
            with each of them, or once, with the best.
        amp_dtype: run the model under ``torch.autocast`` in this type, ``torch.bfloat16`` or
            ``torch.float16``.

    Returns:
        For each text its triples in the order in which they stand there, by subject, then object,
        then the model's relations. For one string its list alone.

    Raises:
        TypeError: if a text is no string, or a setting of a wrong type.
        ValueError: if the model has no tokenizer, or a setting is out of range.
        RuntimeError: if the model's logits are NaN; the message has the index of the text.

    Example:
        >>> from cln_tutorial.triple_extraction.characters import CharTokenizer
        >>> from cln_tutorial.triple_extraction.encoders import SmallEncoder
        >>> from cln_tutorial.triple_extraction.model import TripleExtractor
        >>> from cln_tutorial.triple_extraction.prediction import predict
        >>> tokenizer = CharTokenizer.fit(["abc"])
        >>> model = TripleExtractor(SmallEncoder(7, 8), ["of"], tokenizer=tokenizer)
        >>> predict(model, ["abc", ""], threshold=(1, 1))
        [[], []]
        >>> triples = predict(model, "ab", threshold=(0, 0))  # then every token is a span
        >>> [triple.key for triple in triples]
        [('a', 'of', 'a'), ('a', 'of', 'b'), ('b', 'of', 'a'), ('b', 'of', 'b')]
    """
    single = isinstance(texts, str)
    texts = _texts([texts] if single else texts)
    settings = _settings(model, batch_size, threshold, max_subjects, amp_dtype)
    if not isinstance(return_all_occurrences, bool):
        raise TypeError(f"`return_all_occurrences` must be a bool; got {return_all_occurrences!r}.")
    found = _Found(texts, model.relations)
    with _inference(model, amp_dtype):
        for batch in _encoded(model, texts, settings):
            for row in _cascade(model, batch, _find_subjects(model, batch, settings), settings):
                found.add(batch.windows[row.window], row)
    triples = found.triples(return_all_occurrences)
    return triples[0] if single else triples


def evaluate(
    model: nn.Module,
    examples: Iterable[Example],
    *,
    match: str | Callable[..., Any] = "text",
    by: Sequence[str] = (),
    train: Sequence[Example] | None = None,
    batch_size: int = 32,
    threshold: Thresholds | None = None,
    max_subjects: int | None = None,
    amp_dtype: torch.dtype | None = None,
) -> Report:
    """Score the predictions for examples, and the two stages of the cascade by themselves.

    The encoder runs once. ``report.subject`` compares the sets of subjects of each text,
    ``report.object_given_subject`` the triples that are decoded when the true subjects are given:
    at their places, or, where nobody knows them, everywhere they stand in the text.

    Args:
        model: a :class:`.TripleExtractor` with a tokenizer.
        examples: texts with their triples.
        match, by, train: as in :func:`.score_triples`. With ``match="span"`` a triple counts at
            each of its places.
        batch_size, threshold, max_subjects, amp_dtype: as in :func:`predict`.

    Returns:
        The report of the triples, with the two stages in it.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`predict` and :func:`.score_triples`.

    Example:
        >>> from cln_tutorial.triple_extraction.characters import CharTokenizer
        >>> from cln_tutorial.triple_extraction.encoders import SmallEncoder
        >>> from cln_tutorial.triple_extraction.model import TripleExtractor
        >>> from cln_tutorial.triple_extraction.prediction import evaluate
        >>> tokenizer = CharTokenizer.fit(["abc"])
        >>> model = TripleExtractor(SmallEncoder(7, 8), ["of"], tokenizer=tokenizer)
        >>> report = evaluate(model, [Example("abc", [("a", "of", "c")])], threshold=(0, 0))
        >>> report.subject.recall
        1.0
    """
    examples = _examples(examples)
    settings = _settings(model, batch_size, threshold, max_subjects, amp_dtype)
    texts = [example.text for example in examples]
    places = [_subject_places(example) for example in examples]
    found, found_given = _Found(texts, model.relations), _Found(texts, model.relations)
    subjects: list[set[str]] = [set() for _ in texts]
    with _inference(model, amp_dtype):
        for batch in _encoded(model, texts, settings):
            predicted = _find_subjects(model, batch, settings)
            for window, tokens in predicted.tokens():
                start, end = batch.windows[window].alignment.token_to_char_span(*tokens)
                index = batch.windows[window].text_index
                subjects[index].add(texts[index][start:end])
            for row in _cascade(model, batch, predicted, settings):
                found.add(batch.windows[row.window], row)
            given, true = _given_subjects(batch, places, predicted)
            for row in _cascade(model, batch, given, settings):
                for span in true[row.window, row.subject]:
                    found_given.add(batch.windows[row.window], row, subject=span)
    _warn_of_silence(subjects, examples)
    gold = [example.triples for example in examples]
    tokenizer = model.tokenizer if match == "tokens" else None
    report = score_triples(
        gold,
        found.triples(all_occurrences=match == "span"),
        match,
        by=by,
        texts=None if train is None else texts,
        tokenizer=tokenizer,
        train=train,
    )
    given = found_given.triples(all_occurrences=match == "span")
    second = score_triples(gold, given, match, tokenizer=tokenizer)
    true_subjects = [{triple.subject for triple in row} for row in gold]
    return dataclasses.replace(
        report,
        subject=Score(
            sum(len(a & b) for a, b in zip(true_subjects, subjects, strict=True)),
            sum(map(len, subjects)),
            sum(map(len, true_subjects)),
        ),
        object_given_subject=Score(second.tp, second.n_pred, second.n_gold),
    )


class _Settings(NamedTuple):
    batch_size: int
    subject_threshold: Threshold
    object_threshold: Threshold
    max_subjects: int | None


class _Batch(NamedTuple):
    """Windows after the encoder."""

    windows: list[Window]
    hidden: Tensor
    token_mask: Tensor


class _Subjects(NamedTuple):
    """Subjects of a batch, one per row; a confidence of zero marks a row without one."""

    window: Tensor
    spans: Tensor
    confidence: Tensor
    broken: Tensor  # per window, above zero if its logits are NaN

    def rows(self, start: int, end: int) -> "_Subjects":
        return _Subjects(*(each[start:end] for each in self[:3]), self.broken)

    def tokens(self) -> list[tuple[int, Span]]:
        """Window and inclusive tokens of each, on the host."""
        numbers = torch.cat([self.window[:, None], self.spans], dim=1)[self.confidence > 0]
        return [(window, (first, last)) for window, first, last in numbers.tolist()]


class _Objects(NamedTuple):
    """Triples of a batch on the device: how many there are, and a row of numbers for each.

    The numbers are those of a :class:`_Row`, and floating: below 2^24 they hold any index.
    """

    broken: Tensor
    count: Tensor
    table: Tensor


class _Row(NamedTuple):
    """A triple as it comes from the device: indices, and inclusive token spans."""

    window: int
    subject: Span
    relation: int
    object: Span
    score: float

    @classmethod
    def read(cls, numbers: Sequence[float]) -> "_Row":
        *indices, score = numbers
        window, first, last, relation, *object = map(int, indices)
        return cls(window, (first, last), relation, tuple(object), score)


class _Found:
    """The triples of all texts, by place."""

    def __init__(self, texts: Sequence[str], relations: Sequence[str]):
        self.texts, self.relations = texts, relations
        self.scores: list[dict[tuple[Span, Span, int], float]] = [{} for _ in texts]

    def add(self, window: Window, row: _Row, subject: Span | None = None) -> None:
        subject = subject or window.alignment.token_to_char_span(*row.subject)
        place = (subject, window.alignment.token_to_char_span(*row.object), row.relation)
        # Windows overlap, and two tokens can hold the same character.
        scores = self.scores[window.text_index]
        scores[place] = max(row.score, scores.get(place, 0.0))

    def triples(self, all_occurrences: bool) -> list[list[Triple]]:
        every = [
            [
                Triple(
                    text[slice(*subject)],
                    self.relations[relation],
                    text[slice(*object)],
                    subject,
                    object,
                    score,
                )
                for (subject, object, relation), score in sorted(scores.items())
            ]
            for text, scores in zip(self.texts, self.scores, strict=True)
        ]
        return every if all_occurrences else [_best(triples) for triples in every]


def _best(triples: Sequence[Triple]) -> list[Triple]:
    """Keep the best place of the same strings, the first of several as good."""
    best: dict[tuple[str, str, str], Triple] = {}
    for triple in triples:
        if triple.key not in best or triple.score > best[triple.key].score:
            best[triple.key] = triple
    return [triple for triple in triples if best[triple.key] is triple]


def _encoded(model: nn.Module, texts: list[str], settings: _Settings) -> Iterator[_Batch]:
    """Encode each window once, the longest first: a batch that is too large fails at once."""
    windows = encode_windows(
        model.tokenizer, texts, max_length=model.max_length, stride=model.stride
    )
    _warn_of_borders(windows, model.stride)
    # Windows without a token that a span could hold have no triples.
    windows = [each for each in windows if any(each.alignment.token_mask)]
    windows.sort(key=lambda window: len(window.input_ids), reverse=True)
    device = _device(model)
    pad_token_id = getattr(model.tokenizer, "pad_token_id", None) or 0
    for start in range(0, len(windows), settings.batch_size):
        chosen = windows[start : start + settings.batch_size]
        inputs = {
            name: value.to(device, non_blocking=True)
            for name, value in pad_windows(chosen, pad_token_id).items()
        }
        token_mask = inputs.pop("token_mask")
        yield _Batch(chosen, model.encode(**inputs), token_mask)


def _find_subjects(model: nn.Module, batch: _Batch, settings: _Settings) -> _Subjects:
    logits = model.subject_logits(batch.hidden)
    p = _probabilities(logits, model.subject_power)
    ends = nearest_ends(p, batch.token_mask, *[settings.subject_threshold] * 2)
    last = ends.clamp(min=0).long()
    confidence = (p[..., 0].sqrt() * p[..., 1].gather(1, last).sqrt()) * (ends >= 0)
    if settings.max_subjects is None:
        window, first = (ends >= 0).nonzero().unbind(1)  # the host waits for their number
    else:
        best = confidence.topk(min(settings.max_subjects, confidence.shape[1]), dim=1)
        first = best.indices.flatten()
        window = torch.arange(len(last), device=first.device)[:, None]
        window = window.expand_as(best.indices).flatten()
    there = (ends[window, first] >= 0)[:, None]
    return _Subjects(
        window,
        torch.stack([first, last[window, first]], dim=1) * there,
        confidence[window, first],
        (logits.isnan().any(-1) & batch.token_mask).any(-1).to(p.dtype),
    )


def _given_subjects(
    batch: _Batch, places: Sequence[Sequence[Span]], like: _Subjects
) -> tuple[_Subjects, dict[tuple[int, Span], list[Span]]]:
    """Return the true subjects, and of each window and span of tokens the places it stands for."""
    true: dict[tuple[int, Span], list[Span]] = {}
    for row, window in enumerate(batch.windows):
        for span in places[window.text_index]:
            tokens = window.alignment.char_to_token_span(*span)
            if tokens is not None:
                true.setdefault((row, tokens), []).append(span)
    device = like.window.device
    window = torch.tensor([row for row, _ in true], dtype=torch.int64, device=device)
    spans = torch.tensor([tokens for _, tokens in true], dtype=torch.int64, device=device)
    confidence = torch.ones_like(window, dtype=like.confidence.dtype)
    return _Subjects(window, spans.reshape(-1, 2), confidence, like.broken), true


def _subject_places(example: Example) -> list[Span]:
    """Where its subjects stand: as annotated, or anywhere in the text."""
    places: dict[Span, None] = {}
    for triple in example.triples:
        span = triple.subject_span
        places |= dict.fromkeys(locate(example.text, triple.subject) if span is None else [span])
    return list(places)


def _cascade(
    model: nn.Module, batch: _Batch, subjects: _Subjects, settings: _Settings
) -> list[_Row]:
    """Decode the objects of all subjects, and bring the triples to the host in one piece."""
    step = max(1, CELLS // (2 * batch.hidden.shape[1] * len(model.relations)))
    starts = range(0, len(subjects.window), step)
    n_windows, n_parts, size = len(batch.windows), len(starts), EXPECTED * len(batch.windows)
    while True:
        parts = [
            _find_objects(model, batch, subjects.rows(start, start + step), settings, size)
            for start in starts
        ]
        broken = sum((each.broken for each in parts), start=subjects.broken)
        pieces = [broken, *(each.count for each in parts), *(each.table for each in parts)]
        # Here the host waits for the device, once and for everything.
        numbers = torch.cat([each.to(broken.dtype).flatten() for each in pieces]).tolist()
        _refuse_nan(batch.windows, numbers[:n_windows])
        counts = [int(each) for each in numbers[n_windows : n_windows + n_parts]]
        if max(counts, default=0) <= size:
            break
        size = max(counts)
    del numbers[: n_windows + n_parts]
    firsts = [part * size + row for part, count in enumerate(counts) for row in range(count)]
    return [_Row.read(numbers[COLUMNS * at : COLUMNS * (at + 1)]) for at in firsts]


def _find_objects(
    model: nn.Module, batch: _Batch, subjects: _Subjects, settings: _Settings, size: int
) -> _Objects:
    logits = model.object_logits(batch.hidden, subjects.spans, subjects.window)
    there = batch.token_mask[subjects.window] & (subjects.confidence > 0)[:, None]
    broken = (logits.isnan().flatten(2).any(-1) & there).any(-1).to(subjects.broken.dtype)
    p = _probabilities(logits, model.object_power).transpose(1, 2)
    ends = nearest_ends(p, there[:, None], *[settings.object_threshold] * 2)
    place, count = first_true(ends.flatten() >= 0, size)
    place = place.clamp(max=ends.numel() - 1)  # those behind the last one are not read
    row, relation, first = _unravelled(place, ends.shape)
    spans = torch.stack([first, ends.flatten()[place].clamp(min=0).long()], dim=1)
    score = subjects.confidence[row] * span_confidence(p, torch.stack([row, relation], 1), spans)
    window = subjects.window[row]
    columns = [window[:, None], subjects.spans[row], relation[:, None], spans, score[:, None]]
    return _Objects(
        torch.zeros_like(subjects.broken).index_add(0, subjects.window, broken),
        count,
        torch.cat([each.to(score.dtype) for each in columns], dim=1),
    )


def _probabilities(logits: Tensor, power: float) -> Tensor:
    return logits.to(wide_dtype(logits.dtype)).sigmoid() ** power


def _unravelled(place: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.unravel_index``, which copies the shape to the device, and the host waits for it."""
    _, n_relations, length = shape
    return place // (n_relations * length), place // length % n_relations, place % length


def _refuse_nan(windows: Sequence[Window], broken: Sequence[float]) -> None:
    for window, is_broken in zip(windows, broken, strict=True):
        if is_broken:
            raise RuntimeError(
                f"The model's logits for `texts[{window.text_index}]` are NaN, so nothing can be "
                f"decoded: look for a diverged training, or an overflow in half precision."
            )


def _warn_of_borders(windows: Sequence[Window], stride: int) -> None:
    counts = Counter(window.text_index for window in windows)
    cut = sum(count > 1 for count in counts.values())
    if cut and stride == 0:
        warnings.warn(
            f"{cut} of {len(counts)} texts are longer than a window and `stride` is 0: triples "
            f"across a border between windows are lost. Let the windows overlap.",
            stacklevel=4,
        )


def _warn_of_silence(subjects: Sequence[set[str]], examples: Sequence[Example]) -> None:
    if any(example.triples for example in examples) and not any(subjects):
        warnings.warn(
            f"0 subjects predicted for {len(examples)} sentences, which have some. Likely reasons: "
            f"too few steps or too small a learning rate, biases that start far from the labels' "
            f"base rate (set `prior`), or too high a `threshold`.",
            stacklevel=3,
        )


@contextlib.contextmanager
def _inference(model: nn.Module, amp_dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluate without gradients, and give every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    device_type = _device(model).type
    autocast = contextlib.nullcontext()
    if amp_dtype is not None:
        autocast = torch.autocast(device_type, dtype=amp_dtype)
    model.eval()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module in training:
            module.training = True


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _texts(texts: Iterable[str]) -> list[str]:
    if not isinstance(texts, Iterable):
        raise TypeError(f"`texts` must be a string or several; got {type(texts).__name__}.")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`texts[{index}]` must be a string; got {type(text).__name__}.")
    return texts


def _examples(examples: Iterable[Example]) -> list[Example]:
    if not isinstance(examples, Iterable):
        raise TypeError(f"`examples` must be several Examples; got {type(examples).__name__}.")
    examples = list(examples)
    for index, example in enumerate(examples):
        if not isinstance(example, Example):
            raise TypeError(f"`examples[{index}]` must be an Example; got {example!r}.")
    return examples


def _settings(
    model: nn.Module,
    batch_size: int,
    threshold: Thresholds | None,
    max_subjects: int | None,
    amp_dtype: torch.dtype | None,
) -> _Settings:
    if model.tokenizer is None:
        raise ValueError(
            "`model` has no tokenizer to read texts with: give it one, "
            "`TripleExtractor(..., tokenizer=tokenizer)` or `model.tokenizer = tokenizer`."
        )
    for name, count in (("batch_size", batch_size), ("max_subjects", max_subjects)):
        if name == "max_subjects" and count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"`{name}` must be a whole number of 1 or more; got {count!r}.")
    if amp_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"`amp_dtype` must be torch.bfloat16, torch.float16 or None; got {amp_dtype!r}."
        )
    given = model.threshold if threshold is None else threshold
    if isinstance(given, Mapping):
        if set(given) != {"subject", "object"}:
            raise ValueError(
                f"`threshold` must have the keys 'subject' and 'object'; got {sorted(given)}."
            )
        given = (given["subject"], given["object"])
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise ValueError(f"`threshold` must be a pair, (subject, object); got {given!r}.")
    for name, value in zip(("subject", "object"), given, strict=True):
        require_threshold(f"threshold[{name!r}]", value)
    return _Settings(batch_size, *given, max_subjects)
