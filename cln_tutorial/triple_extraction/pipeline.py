"""A call like those of Hugging Face's ``pipeline``: text in, plain dictionaries out."""

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from cln_tutorial.triple_extraction.model import TripleExtractor
from cln_tutorial.triple_extraction.prediction import predict
from cln_tutorial.triple_extraction.triples import Triple

TASK = "triple-extraction"

Record = dict[str, str | float | int]


def pipeline(
    task: str, model: str | os.PathLike[str] | nn.Module, **options: Any
) -> "TriplePipeline":
    """Make a callable that turns texts into records.

    Args:
        task: "triple-extraction", the only one.
        model: a :class:`.TripleExtractor`, or the folder that its ``save_pretrained`` has written.
        options: of :func:`.predict`, for every call.

    Returns:
        A callable, see :class:`TriplePipeline`.

    Raises:
        ValueError: for another task.
        TypeError: if ``model`` is neither of the two.

    Example:
        >>> from cln_tutorial.triple_extraction.characters import CharTokenizer
        >>> from cln_tutorial.triple_extraction.encoders import SmallEncoder
        >>> from cln_tutorial.triple_extraction.model import TripleExtractor
        >>> from cln_tutorial.triple_extraction.pipeline import pipeline
        >>> tokenizer = CharTokenizer.fit(["ab"])
        >>> model = TripleExtractor(SmallEncoder(len(tokenizer), 8), ["of"], tokenizer=tokenizer)
        >>> extract = pipeline("triple-extraction", model=model, threshold=(0, 0))
        >>> sorted(extract("a")[0])[:4]
        ['object', 'object_end', 'object_start', 'relation']
    """
    if task != TASK:
        raise ValueError(f"`task` must be {TASK!r}; got {task!r}.")
    if isinstance(model, str | os.PathLike):
        model = TripleExtractor.from_pretrained(model)
    elif not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a TripleExtractor or the folder of one; got {type(model).__name__}."
        )
    return TriplePipeline(model, options)


class TriplePipeline:
    """What :func:`pipeline` returns.

    Attributes:
        model: the one that predicts.
        options: those of :func:`.predict`.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]):
        self.model, self.options = model, options

    def __call__(
        self, texts: str | Iterable[str], **options: Any
    ) -> list[Record] | list[list[Record]]:
        """Return the triples of one text, or of each of several, as dictionaries.

        The keys are ``subject``, ``relation``, ``object``, ``score``, and ``subject_start``,
        ``subject_end``, ``object_start``, ``object_end``: places in characters of the text, the end
        excluded, as ``start`` and ``end`` are in Hugging Face's pipelines.

        Args:
            texts: one string or several.
            options: of :func:`.predict`, for this call.
        """
        found = predict(self.model, texts, **self.options | options)
        if isinstance(texts, str):
            return [_record(triple) for triple in found]
        return [[_record(triple) for triple in row] for row in found]


def _record(triple: Triple) -> Record:
    return {
        "subject": triple.subject,
        "relation": triple.relation,
        "object": triple.object,
        "score": triple.score,
        "subject_start": triple.subject_span[0],
        "subject_end": triple.subject_span[1],
        "object_start": triple.object_span[0],
        "object_end": triple.object_span[1],
    }
