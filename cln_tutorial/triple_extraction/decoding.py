r"""From probabilities to triples: nearest ends, and the five scores of GlobalPointer.

Token spans are inclusive, ``(first, last)``, as in the article. All of it runs on the device of its
input, without a loop over tokens, relations or sentences.

Source: article 7161 and its predecessor 6671 (nearest end); article 8888 (five scores).
"""

import numbers
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cln_tutorial._dtypes import require_floating, wide_dtype

# What a probability must exceed, between 0 and 1.
Threshold = float | int


class DecodedTriples(NamedTuple):
    """Triples of a batch, one per row, sorted by sentence and subject.

    ``batch``, the row of the sentence, ``relations``, an index, and ``scores``, between 0 and 1,
    have shape ``(P,)``; the spans are of tokens, both ends included, ``(P, 2)``.
    """

    batch: Int[Tensor, " p"]
    subject_spans: Int[Tensor, "p 2"]
    relations: Int[Tensor, " p"]
    object_spans: Int[Tensor, "p 2"]
    scores: Float[Tensor, " p"]


def decode_spans(
    probabilities: Float[Tensor, "*rows length 2"],
    token_mask: Bool[Tensor, "..."] | None = None,
    threshold_start: Threshold = 0.5,
    threshold_end: Threshold = 0.5,
) -> tuple[Int[Tensor, "p depth"], Int[Tensor, "p 2"]]:
    r"""Give each start the nearest end at or behind it.

    .. math:: \operatorname{end}(i) = \min \{ j \ge i : p^{\text{end}}_j > t_{\text{end}} \}
        \quad \text{for each } i \text{ with } p^{\text{start}}_i > t_{\text{start}}

    A start without an end behind it is no span. Several starts may share an end; of two ends behind
    one start the farther one is lost, so of nested spans with one start only the shorter is found.

    Args:
        probabilities: of start and end (last axis), ``(*rows, L, 2)``: subjects ``(B, L, 2)``,
            objects ``(N, R, L, 2)``; any floating dtype.
        token_mask: bool, ``(*rows, L)``, True where a span may start or end; an axis of size 1
            stands for all rows, ``(N, 1, L)``.
        threshold_start, threshold_end: between 0 and 1; a probability must be larger.

    Returns:
        The index of the row of each span, ``(P, depth)`` with one column per leading axis, and the
        spans, inclusive, ``(P, 2)``; int64, sorted by row and start. Nothing is found where a
        probability is NaN.

    Raises:
        TypeError: if ``probabilities`` is not floating, or ``token_mask`` not bool.
        ValueError: for a shape that does not fit, or a threshold outside [0, 1].

    Source:
        Article 7161, ``extract_spoes``.

    Example:
        >>> from cln_tutorial.triple_extraction.decoding import decode_spans
        >>> start = torch.tensor([0.9, 0.1, 0.8, 0.9])
        >>> end = torch.tensor([0.2, 0.7, 0.9, 0.1])
        >>> rows, spans = decode_spans(torch.stack([start, end], dim=-1)[None])
        >>> spans.tolist()  # the start at 3 has no end
        [[0, 1], [2, 2]]
    """
    ends = nearest_ends(probabilities, token_mask, threshold_start, threshold_end)
    index = (ends >= 0).nonzero()
    last = ends[tuple(index.unbind(1))]
    return index[:, :-1], torch.stack([index[:, -1], last.long()], dim=1)


def nearest_ends(
    probabilities: Float[Tensor, "*rows length 2"],
    token_mask: Bool[Tensor, "..."] | None = None,
    threshold_start: Threshold = 0.5,
    threshold_end: Threshold = 0.5,
) -> Int[Tensor, "*rows length"]:
    """Say for each token where the span ends that starts there.

    The dense form of :func:`decode_spans`: its size does not depend on what is found, so the host
    need not wait for the device.

    Args:
        probabilities, token_mask, threshold_start, threshold_end: as there.

    Returns:
        The last token of the span, int32, ``(*rows, L)``; -1 where none starts.

    Raises:
        TypeError, ValueError: as there.

    Source:
        Article 7161.

    Example:
        >>> from cln_tutorial.triple_extraction.decoding import nearest_ends
        >>> nearest_ends(torch.tensor([[0.9, 0.2], [0.1, 0.7], [0.8, 0.3]])).tolist()
        [1, -1, -1]
    """
    _require_probabilities("probabilities", probabilities)
    _require_mask(token_mask, probabilities.shape[:-1])
    require_threshold("threshold_start", threshold_start)
    require_threshold("threshold_end", threshold_end)
    is_start = probabilities[..., 0] > threshold_start
    is_end = probabilities[..., 1] > threshold_end
    if token_mask is not None:
        is_start, is_end = is_start & token_mask, is_end & token_mask
    length = probabilities.shape[-2]
    place = torch.arange(length, dtype=torch.int32, device=probabilities.device)
    # The smallest end among those from here on: a running minimum from the right.
    nearest = place.expand_as(is_end).masked_fill(~is_end, length)
    nearest = nearest.flip(-1).cummin(-1).values.flip(-1)
    return nearest.masked_fill(~is_start | (nearest == length), -1)


def first_true(mask: Bool[Tensor, " m"], size: int) -> tuple[Int[Tensor, " size"], Int[Tensor, ""]]:
    """Return where a mask is True, in a tensor of a size that is known beforehand.

    ``nonzero`` makes the host wait until the device has counted; this does not.

    Args:
        mask: bool, ``(M,)``.
        size: how many places to return.

    Returns:
        The first ``size`` places, int64, and how many there are in all, which may be more. Places
        behind the last one are ``M``.

    Source:
        The k-th True is where the running count reaches k.

    Example:
        >>> from cln_tutorial.triple_extraction.decoding import first_true
        >>> first_true(torch.tensor([False, True, False, True]), size=3)
        (tensor([1, 3, 4]), tensor(2))
    """
    so_far = mask.cumsum(0)
    wanted = torch.arange(1, size + 1, device=mask.device)
    return torch.searchsorted(so_far, wanted), mask.sum()


def span_confidence(
    probabilities: Float[Tensor, "*rows length 2"],
    rows: Int[Tensor, "p depth"],
    spans: Int[Tensor, "p 2"],
) -> Float[Tensor, " p"]:
    r"""Join the probabilities of start and end of each span: :math:`\sqrt{p_i\, p_j}`.

    Args:
        probabilities: ``(*rows, L, 2)``.
        rows, spans: as :func:`decode_spans` returns them.

    Returns:
        ``(P,)``, between 0 and 1, of the dtype of ``probabilities``; float32 for half types.

    Source:
        This package: the article gives no score.

    Example:
        >>> from cln_tutorial.triple_extraction.decoding import decode_spans, span_confidence
        >>> p = torch.tensor([[[0.9, 0.1], [0.2, 0.9]]])
        >>> span_confidence(p, *decode_spans(p))
        tensor([0.9000])
    """
    index = tuple(rows.unbind(1))
    start = probabilities[(*index, spans[:, 0], 0)]
    end = probabilities[(*index, spans[:, 1], 1)]
    wide = wide_dtype(probabilities.dtype)
    return start.to(wide).sqrt() * end.to(wide).sqrt()


def decode_cascade(
    subject_probabilities: Float[Tensor, "b length 2"],
    object_probabilities: Callable[[Tensor, Tensor], Tensor],
    token_mask: Bool[Tensor, "b length"] | None = None,
    *,
    threshold: tuple[Threshold, Threshold] = (0.5, 0.5),
) -> DecodedTriples:
    """Decode the subjects, then for each one the objects of each relation.

    Args:
        subject_probabilities: of start and end of a subject, ``(B, L, 2)``.
        object_probabilities: a function of the subjects' spans ``(N, 2)``, inclusive, and the rows
            of their sentences ``(N,)``, that returns the probabilities of start and end of their
            objects, ``(N, L, R, 2)``.
        token_mask: bool, ``(B, L)``, True where a span may start or end.
        threshold: of subjects and of objects, each between 0 and 1.

    Returns:
        The triples of all sentences. The score of each is the product of the confidences of its
        subject and its object, each the geometric mean of the probabilities of its start and end.

    Raises:
        TypeError, ValueError: as :func:`decode_spans`.

    Source:
        Article 7161, ``extract_spoes``; there the score is not computed.

    Example:
        >>> from cln_tutorial.triple_extraction.decoding import decode_cascade
        >>> subjects, objects = torch.zeros(1, 4, 2), torch.zeros(1, 4, 3, 2)
        >>> subjects[0, 0] = 0.9  # one token, start and end
        >>> objects[0, 2, 1, 0] = objects[0, 3, 1, 1] = 0.8  # tokens 2 to 3, relation 1
        >>> found = decode_cascade(subjects, lambda spans, batch: objects[batch])
        >>> found.subject_spans.tolist(), found.relations.tolist(), found.object_spans.tolist()
        ([[0, 0]], [1], [[2, 3]])
        >>> found.scores
        tensor([0.7200])
    """
    _require_probabilities("subject_probabilities", subject_probabilities, ndim=3)
    rows, subjects = decode_spans(subject_probabilities, token_mask, threshold[0], threshold[0])
    confidence = span_confidence(subject_probabilities, rows, subjects)
    batch = rows[:, 0]
    given = object_probabilities(subjects, batch)
    _require_probabilities("object_probabilities(...)", given, ndim=4)
    mask = None if token_mask is None else token_mask[batch, None]
    objects = given.transpose(1, 2)
    index, spans = decode_spans(objects, mask, threshold[1], threshold[1])
    of, relations = index.unbind(1)
    scores = confidence[of] * span_confidence(objects, index, spans)
    return DecodedTriples(batch[of], subjects[of], relations, spans, scores)


def decode_global_pointer(
    entities: Float[Tensor, "b 2 length length"],
    heads: Float[Tensor, "b r length length"],
    tails: Float[Tensor, "b r length length"],
    token_mask: Bool[Tensor, "b length"] | None = None,
    *,
    threshold: float | int = 0.0,
) -> DecodedTriples:
    r"""Keep each five-tuple whose four scores are all above a threshold.

    .. math:: S(s_h, s_t) > t,\quad S(o_h, o_t) > t,\quad S(s_h, o_h \mid p) > t,\quad
        S(s_t, o_t \mid p) > t

    No nesting is lost. But heads and tails are joined freely: if two subjects share their tail's
    partner as two objects share their head, pairs that nobody meant pass all four tests.

    Args:
        entities: scores (logits) of spans as subject and as object, ``(B, 2, L, L)``, start before
            end.
        heads, tails: scores that the two first tokens, and the two last tokens, belong together in
            a relation, subject before object, ``(B, R, L, L)``.
        token_mask: bool, ``(B, L)``, True where a span may start or end.
        threshold: a score must be larger.

    Returns:
        The triples; the score of each is the sigmoid of the smallest of its four.

    Raises:
        TypeError: for another dtype.
        ValueError: for shapes that do not fit.

    Source:
        Article 8888, equation of the five-tuple and ``extract_spoes``.

    Example:
        >>> from cln_tutorial.triple_extraction.decoding import decode_global_pointer
        >>> entities, heads = torch.full((1, 2, 4, 4), -9.0), torch.full((1, 3, 4, 4), -9.0)
        >>> tails = heads.clone()
        >>> entities[0, 0, 0, 1] = entities[0, 1, 3, 3] = 9.0
        >>> heads[0, 2, 0, 3] = tails[0, 2, 1, 3] = 9.0
        >>> found = decode_global_pointer(entities, heads, tails)
        >>> found.subject_spans.tolist(), found.relations.tolist(), found.object_spans.tolist()
        ([[0, 1]], [2], [[3, 3]])
    """
    shapes = [tuple(each.shape) for each in (entities, heads, tails)]
    for name, each in zip(("entities", "heads", "tails"), (entities, heads, tails), strict=True):
        require_floating(name, each)
    b, length = entities.shape[0], entities.shape[-1]
    r = heads.shape[1] if heads.ndim > 1 else 0
    if shapes != [(b, 2, length, length), *[(b, r, length, length)] * 2]:
        raise ValueError(
            f"`entities` must be (B, 2, L, L), `heads` and `tails` (B, R, L, L); got {shapes[0]}, "
            f"{shapes[1]} and {shapes[2]}."
        )
    _require_mask(token_mask, (b, length))
    allowed = torch.ones(length, length, dtype=torch.bool, device=entities.device).triu()
    if token_mask is not None:
        allowed = allowed & token_mask[:, :, None] & token_mask[:, None, :]
    as_subject = ((entities[:, 0] > threshold) & allowed).nonzero()
    as_object = ((entities[:, 1] > threshold) & allowed).nonzero()
    subject, object = (as_subject[:, :1] == as_object[:, 0]).nonzero().unbind(1)
    batch, i, j = as_subject[subject].unbind(1)
    _, k, m = as_object[object].unbind(1)
    pair, relations = (
        ((heads[batch, :, i, k] > threshold) & (tails[batch, :, j, m] > threshold))
        .nonzero()
        .unbind(1)
    )
    batch, i, j, k, m = (each[pair] for each in (batch, i, j, k, m))
    scores = torch.stack(
        [
            entities[batch, 0, i, j],
            entities[batch, 1, k, m],
            heads[batch, relations, i, k],
            tails[batch, relations, j, m],
        ]
    )
    return DecodedTriples(
        batch,
        torch.stack([i, j], dim=1),
        relations,
        torch.stack([k, m], dim=1),
        scores.to(wide_dtype(scores.dtype)).amin(0).sigmoid(),
    )


def _require_probabilities(name: str, value: Tensor, ndim: int | None = None) -> None:
    require_floating(name, value)
    if value.ndim < 2 or value.shape[-1] != 2 or ndim not in (None, value.ndim):
        axes = {None: "(*rows, L, 2)", 3: "(B, L, 2)", 4: "(N, L, R, 2)"}[ndim]
        raise ValueError(f"`{name}` must be {axes}, start and end last; got {tuple(value.shape)}.")


def _require_mask(token_mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if token_mask is None:
        return
    if token_mask.dtype != torch.bool:
        raise TypeError(f"`token_mask` must be bool; got {token_mask.dtype}.")
    fits = token_mask.ndim == len(shape) and token_mask.shape[-1] == shape[-1]
    pairs = zip(token_mask.shape, shape, strict=False)
    if not fits or any(got not in (1, wanted) for got, wanted in pairs):
        raise ValueError(
            f"`token_mask` must be {tuple(shape)}, or 1 in a leading axis; got "
            f"{tuple(token_mask.shape)}."
        )


def require_threshold(name: str, value: Threshold) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a number between 0 and 1; got {value!r}.")
