r"""The cascade: tag the subjects, then, given each, the objects of every relation.

.. math:: P(s, p, o) = P(s)\,P(o, p \mid s)

Source: articles 6671 and 7161; Wei et al. 2020 (arXiv 1909.03227), CasRel, for the additive
condition.
"""

import copy
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.conditional_norm import ConditionalLayerNorm, convert_layer_norms
from cln_tutorial.triple_extraction.evaluation import Report
from cln_tutorial.triple_extraction.losses import power_bce_loss
from cln_tutorial.triple_extraction.prediction import evaluate, predict
from cln_tutorial.triple_extraction.storage import load_extractor, save_extractor
from cln_tutorial.triple_extraction.triples import Example, Triple


class TripleOutput(NamedTuple):
    """What a :class:`TripleExtractor` returns; ``None`` where nothing was given to compute it."""

    loss: Float[Tensor, ""] | None
    subject_loss: Float[Tensor, ""] | None
    object_loss: Float[Tensor, ""] | None
    subject_logits: Float[Tensor, "b l 2"]
    object_logits: Float[Tensor, "n l r 2"] | None


class TripleExtractor(nn.Module):
    r"""Taggers of subjects, and of the objects of each relation given one, on any encoder.

    With :math:`x` the input of the encoder's last norm, and the subject from token s to token e,

    .. math:: p_{\text{subject}} = \sigma(A\,\mathrm{norm}(x) + a)^2, \qquad
        p_{\text{object}} = \sigma(B\,\mathrm{CLN}(x; [x_s; x_e]) + b)^4,

    at each token, for "starts here" and "ends here". The scale and shift of the conditional norm
    are copies of the last norm's, and the condition starts with weight zero: at initialisation
    both branches see what the encoder gave.

    The last norm moves from the encoder into ``final_norm``; an ``nn.Identity`` takes its place in
    the encoder that you gave. Whether parameters train (``requires_grad``) stays as it is, in the
    copies, too.

    Args:
        encoder: called with ``input_ids`` and ``attention_mask``, ``(b, l)``; its output has
            ``last_hidden_state``, ``(b, l, hidden_size)``. Any encoder of Hugging Face, or
            :class:`.SmallEncoder`.
        relations: their names, in the order of the axis R.
        tokenizer: for ``predict``, ``evaluate`` and saving.
        conditioning: "cln", or "add" for CasRel's sum of token and subject, or "none": objects do
            not depend on the subject. On a sum a linear tagger is a sum: with "add" the subject
            shifts the logits of a relation by the same number at all tokens, so that each of two
            subjects cannot have an object of its own unless the other has it, too.
        subject_pooling: "concat" of the states at its first and last token, or their "mean". A
            concatenation that is added is projected first, by a matrix that starts at zero.
        norm_tap: "auto" finds the last norm: the one whose output is the encoder's. "output" leaves
            the encoder as it is, and conditions a new layer norm on top of it.
        subject_power, object_power: of the sigmoids.
        prior: share of ones that the taggers shall start with, one number for subjects and one, or
            one per relation, for objects; see :meth:`set_prior`. ``None`` for biases of zero.
        dropout: rate, in front of both taggers.
        max_length, stride: of the windows in which ``predict`` reads long texts, in tokens.
        threshold: of ``predict``, for subjects and objects.

    Raises:
        TypeError: if an argument is of another kind than said above.
        ValueError: if a value makes no sense, or there is not one norm whose output is the
            encoder's; the message names the norms. The encoder is then as it was.

    Source:
        Article 7161 and its code in bert4keras; article 7124 for the conditional norm. In that
        code the scale starts at 1 and the shift at 0, whatever the encoder's are.

    Example:
        >>> from cln_tutorial.triple_extraction.encoders import SmallEncoder
        >>> from cln_tutorial.triple_extraction.model import TripleExtractor
        >>> model = TripleExtractor(SmallEncoder(50, hidden_size=16), ["born in", "works for"])
        >>> output = model(
        ...     torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]),
        ...     subject_spans=torch.tensor([[0, 1], [3, 3], [2, 3]]),
        ...     subject_batch=torch.tensor([0, 0, 1]),
        ... )
        >>> output.subject_logits.shape, output.object_logits.shape
        (torch.Size([2, 4, 2]), torch.Size([3, 4, 2, 2]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        relations: Sequence[str],
        *,
        tokenizer: Any = None,
        conditioning: str = "cln",
        subject_pooling: str = "concat",
        norm_tap: str = "auto",
        subject_power: float | int = 2.0,
        object_power: float | int = 4.0,
        prior: tuple[float | int, float | int | Sequence[float | int]] | None = None,
        dropout: float | int = 0.0,
        max_length: int | None = None,
        stride: int = 0,
        threshold: tuple[float | int, float | int] = (0.5, 0.5),
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"`encoder` must be a module; got {type(encoder).__name__}.")
        self.relations = _relations(relations)
        _require_one_of("conditioning", conditioning, ("cln", "add", "none"))
        _require_one_of("subject_pooling", subject_pooling, ("concat", "mean"))
        _require_one_of("norm_tap", norm_tap, ("auto", "output"))
        for name, power in (("subject_power", subject_power), ("object_power", object_power)):
            if not 0 < power < math.inf:
                raise ValueError(f"`{name}` must be above 0 and finite; got {power}.")
        if len(threshold) != 2 or not all(0 <= each <= 1 for each in threshold):
            raise ValueError(f"`threshold` must be two probabilities; got {threshold!r}.")
        self.tokenizer = tokenizer
        self.conditioning, self.subject_pooling = conditioning, subject_pooling
        self.norm_tap = norm_tap
        self.subject_power, self.object_power = float(subject_power), float(object_power)
        self.max_length, self.stride = max_length, stride
        self.threshold = tuple(threshold)

        norm, like = _dry_run(encoder, norm_tap)
        size = like.shape[-1]
        width = 2 * size if subject_pooling == "concat" else size
        place = {"device": like.device, "dtype": like.dtype}
        if conditioning == "cln":
            self.object_norm = _conditional_copy(norm, size, width, place)
        elif conditioning == "add" and subject_pooling == "concat":
            self.subject_projection = nn.Linear(width, size, bias=False, **place)
            nn.init.zeros_(self.subject_projection.weight)
        self.dropout = nn.Dropout(dropout)
        self.subject_head = nn.Linear(size, 2, **place)
        self.object_head = nn.Linear(size, 2 * len(self.relations), **place)
        nn.init.zeros_(self.subject_head.bias)
        nn.init.zeros_(self.object_head.bias)
        if prior is not None:
            self.set_prior(*prior)
        # Last, so that an encoder is not changed by a call that fails.
        if norm is not None:
            _take_out(encoder, norm)
        self.encoder, self.final_norm = encoder, norm or nn.Identity()

    def forward(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Shaped[Tensor, "b l"] | None = None,
        token_type_ids: Int[Tensor, "b l"] | None = None,
        *,
        token_mask: Bool[Tensor, "b l"] | None = None,
        subject_spans: Int[Tensor, "n 2"] | None = None,
        subject_batch: Int[Tensor, " n"] | None = None,
        subject_labels: Shaped[Tensor, "..."] | None = None,
        object_labels: Shaped[Tensor, "..."] | None = None,
        **encoder_kwargs: Any,
    ) -> TripleOutput:
        r"""Return the logits and, of the labels that are given, the losses.

        The subject loss is the mean over real tokens and over start and end. The object loss is
        summed over the relations and averaged over start and end, over the subjects of a sentence,
        and over the real tokens of the sentences that have subjects: what one random subject per
        sentence gives on average. The loss is their sum.

        Args:
            input_ids, attention_mask, token_type_ids: of the encoder, ``(b, l)``.
            token_mask: true for the tokens that count, ``(b, l)``; those of ``attention_mask`` if
                not given, or all.
            subject_spans: first and last token, both included, of each subject, ``(n, 2)``.
            subject_batch: the row of its sentence, ``(n,)``.
            subject_labels: zeros and ones, ``(b, l, 2)``, or where the ones are: int64 ``(p, 3)``
                of (row, token, 0 for start or 1 for end), in any order.
            object_labels: the same for objects: ``(n, l, r, 2)``, or int64 ``(p, 4)`` of (subject,
                token, relation, 0 or 1).
            encoder_kwargs: handed on to the encoder.

        Raises:
            TypeError, ValueError: if a dtype or shape does not fit. Spans and rows out of range
                are found on the CPU only, because a look at them would halt a GPU.
        """
        _require_ids("input_ids", input_ids, (None, None))
        _require_subjects(input_ids.shape, subject_spans, subject_batch)
        _require_labels("subject_labels", subject_labels, (*input_ids.shape, 2))
        if object_labels is not None:
            if subject_spans is None:
                raise ValueError("`object_labels` belong to subjects; give `subject_spans` too.")
            shape = (len(subject_spans), input_ids.shape[1], len(self.relations), 2)
            _require_labels("object_labels", object_labels, shape)
        hidden = self.encode(input_ids, attention_mask, token_type_ids, **encoder_kwargs)
        if token_mask is None:
            token_mask = attention_mask
        if token_mask is None:
            token_mask = torch.ones_like(input_ids)
        weights = token_mask.to(wide_dtype(hidden.dtype))

        subject_logits = self.subject_logits(hidden)
        subject_loss = object_loss = object_logits = None
        if subject_labels is not None:
            subject_loss = _tagging_loss(
                subject_logits, subject_labels, self.subject_power, weights
            )
        if subject_spans is not None:
            object_logits = self.object_logits(hidden, subject_spans, subject_batch)
            if object_labels is not None:
                ones = weights.new_ones(len(subject_batch))
                rows = weights.new_zeros(len(weights)).index_add(0, subject_batch, ones)
                weights = weights[subject_batch] / rows[subject_batch, None]
                object_loss = _tagging_loss(
                    object_logits, object_labels, self.object_power, weights
                )
        losses = [each for each in (subject_loss, object_loss) if each is not None]
        loss = sum(losses) if losses else None
        return TripleOutput(loss, subject_loss, object_loss, subject_logits, object_logits)

    def encode(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Shaped[Tensor, "b l"] | None = None,
        token_type_ids: Int[Tensor, "b l"] | None = None,
        **encoder_kwargs: Any,
    ) -> Float[Tensor, "b l h"]:
        """Return the input of the encoder's last norm, ``(b, l, hidden_size)``."""
        if attention_mask is not None:
            encoder_kwargs["attention_mask"] = attention_mask
        if token_type_ids is not None:
            encoder_kwargs["token_type_ids"] = token_type_ids
        return self.encoder(input_ids=input_ids, **encoder_kwargs).last_hidden_state

    def subject_logits(self, hidden: Float[Tensor, "b l h"]) -> Float[Tensor, "b l 2"]:
        """Return the logits of start and end of subjects from what :meth:`encode` returns."""
        return self.subject_head(self.dropout(self.final_norm(hidden)))

    def object_logits(
        self,
        hidden: Float[Tensor, "b l h"],
        subject_spans: Int[Tensor, "n 2"],
        subject_batch: Int[Tensor, " n"],
    ) -> Float[Tensor, "n l r 2"]:
        """Return the logits of start and end of objects, for each subject and relation.

        Args:
            hidden: what :meth:`encode` returns, ``(b, l, hidden_size)``.
            subject_spans: first and last token, both included, ``(n, 2)``.
            subject_batch: the row of its sentence in ``hidden``, ``(n,)``.
        """
        _require_subjects(hidden.shape[:2], subject_spans, subject_batch)
        states = self.object_states(hidden, subject_spans, subject_batch)
        logits = self.object_head(self.dropout(states))
        return logits.unflatten(-1, (len(self.relations), 2))

    def object_states(
        self,
        hidden: Float[Tensor, "b l h"],
        subject_spans: Int[Tensor, "n 2"],
        subject_batch: Int[Tensor, " n"],
    ) -> Float[Tensor, "n l h"]:
        """Return what the object tagger sees: the states of each token, given each subject.

        At initialisation, and with the condition "none" ever after, they are the output of the
        encoder. Arguments as in :meth:`object_logits`.
        """
        # The norm of a sentence is the same for all its subjects, unless they condition it.
        states = hidden if self.conditioning == "cln" else self.final_norm(hidden)
        tokens = states.index_select(0, subject_batch)
        if self.conditioning == "none":
            return tokens
        first, last = (states[subject_batch, each] for each in subject_spans.unbind(-1))
        pooled = torch.cat([first, last], -1)
        if self.subject_pooling == "mean":
            pooled = (first + last) / 2
        if self.conditioning == "cln":
            return self.object_norm(tokens, pooled)
        if self.subject_pooling == "concat":
            pooled = self.subject_projection(pooled)
        return tokens + pooled[:, None]

    @torch.no_grad()
    def set_prior(self, subject: float | int, object: float | int | Sequence[float | int]) -> None:
        r"""Set the biases so that an input of zero is taken for a one with these probabilities.

        .. math:: \sigma(b)^n = \pi \;\Rightarrow\; b = \log q - \log(1 - q), \quad q = \pi^{1/n}

        Otherwise the first steps of training go into learning how rare subjects and objects are.

        Args:
            subject: share of the tokens at which a subject starts, or ends.
            object: share of ones among the object labels, for all relations or one for each.

        Raises:
            ValueError: if a share is not between 0 and 1, both excluded, or there is not one per
                relation.

        Source:
            Lin et al. 2017 (arXiv 1708.02002) for the idea, in focal loss.
        """
        shares = [object] * len(self.relations) if isinstance(object, numbers.Real) else [*object]
        if len(shares) != len(self.relations):
            raise ValueError(
                f"`object` must be one share, or one for each of {len(self.relations)} relations; "
                f"got {len(shares)}."
            )
        subject_bias = _prior_bias("subject", subject, self.subject_power)
        biases = [
            _prior_bias(f"object[{i}]", share, self.object_power) for i, share in enumerate(shares)
        ]
        self.subject_head.bias.fill_(subject_bias)
        biases = torch.tensor(biases, dtype=torch.float64).repeat_interleave(2)
        self.object_head.bias.copy_(biases)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save weights, settings and tokenizer, as safetensors and JSON, in a folder.

        An earlier model in it is replaced as a whole or, if anything fails, not at all; what else
        stands there stays.

        Args:
            folder: made if it is not there.

        Raises:
            TypeError: if the tokenizer cannot be saved.
            OSError: if a file cannot be written.
        """
        save_extractor(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        encoder: nn.Module | None = None,
        tokenizer: Any = None,
    ) -> "TripleExtractor":
        """Load what :meth:`save_pretrained` has saved; in evaluation mode, in the dtypes saved.

        Args:
            folder: it.
            encoder: one of the same shape, for a class that neither this package nor
                ``transformers`` can make from its configuration. Its weights are overwritten.
            tokenizer: instead of the one in the folder.

        Raises:
            FileNotFoundError: if there is no model, or a part of it is missing.
            ValueError: if the files are broken, of another version, or of other shapes than the
                encoder, or if the encoder must be given.
            ImportError: if ``transformers`` is needed and missing.
        """
        return load_extractor(cls, folder, encoder, tokenizer)

    def predict(
        self, texts: str | Iterable[str], **options: Any
    ) -> list[Triple] | list[list[Triple]]:
        """Return the triples of each text, or of one; ``options`` as in :func:`.predict`."""
        return predict(self, texts, **options)

    def evaluate(self, examples: Sequence[Example], **options: Any) -> Report:
        """Score the predictions for examples; ``options`` as in :func:`.evaluate`."""
        return evaluate(self, examples, **options)


def _tagging_loss(logits: Tensor, labels: Tensor, power: float, weights: Tensor) -> Tensor:
    if labels.ndim == logits.ndim:
        return power_bce_loss(logits, labels, power=power, mask=weights) / 2
    return power_bce_loss(logits, positives=labels, power=power, mask=weights) / 2


def _relations(relations: Sequence[str]) -> tuple[str, ...]:
    if isinstance(relations, str) or not all(isinstance(each, str) for each in relations):
        raise TypeError(f"`relations` must be a sequence of names; got {relations!r}.")
    if not relations or len(set(relations)) != len(relations):
        twice = sorted({each for each in relations if list(relations).count(each) > 1})
        raise ValueError(f"`relations` must be one or more different names; twice: {twice}.")
    return tuple(relations)


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}; got {value!r}.")


def _prior_bias(name: str, share: float | int, power: float) -> float:
    if not 0 < share < 1:
        raise ValueError(f"`{name}` must lie between 0 and 1, both excluded; got {share}.")
    log_q = math.log(share) / power
    return log_q - math.log(-math.expm1(log_q))


def _require_ids(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must be whole numbers, int64 or int32; got {value.dtype}.")
    if value.ndim != len(shape) or any(
        want is not None and want != value.shape[i] for i, want in enumerate(shape)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"`{name}` must have the shape ({wanted}); got {tuple(value.shape)}.")


def _require_labels(name: str, labels: Tensor | None, shape: tuple[int, ...]) -> None:
    if labels is None or tuple(labels.shape) == shape:
        return
    if labels.ndim != 2 or labels.shape[1] != len(shape):
        raise ValueError(
            f"`{name}` must be zeros and ones of shape {shape}, or the indices of the ones, "
            f"(number, {len(shape)}); got {tuple(labels.shape)}."
        )
    _require_ids(name, labels, (None, len(shape)))


def _require_subjects(sizes: torch.Size, spans: Tensor | None, batch: Tensor | None) -> None:
    if spans is None and batch is None:
        return
    if spans is None or batch is None:
        raise ValueError("`subject_spans` and `subject_batch` belong together; one is missing.")
    _require_ids("subject_spans", spans, (None, 2))
    _require_ids("subject_batch", batch, (len(spans),))
    if torch.compiler.is_compiling() or spans.device.type != "cpu":
        return  # on a GPU each look at a value waits for all work in progress
    b, length = sizes
    bad = (spans[:, 0] < 0) | (spans[:, 0] > spans[:, 1]) | (spans[:, 1] >= length)
    if bad.any():
        n = int(bad.nonzero()[0])
        raise ValueError(
            f"`subject_spans[{n}]` must be (first, last) with 0 <= first <= last < {length}; got "
            f"{tuple(spans[n].tolist())}."
        )
    bad = (batch < 0) | (batch >= b)
    if bad.any():
        n = int(bad.nonzero()[0])
        raise ValueError(f"`subject_batch[{n}]` must be a row, 0..{b - 1}; got {int(batch[n])}.")


@torch.no_grad()
def _dry_run(encoder: nn.Module, norm_tap: str) -> tuple[nn.Module | None, Tensor]:
    """Return the norm whose output is the encoder's, if asked for, and that output."""
    outputs: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs.setdefault(module, []).append(output)

    names = {module: name for name, module in encoder.named_modules() if _is_norm(module)}
    hooks = [module.register_forward_hook(keep) for module in names]
    modes = [(module, module.training) for module in encoder.modules()]
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    encoder.eval()
    try:
        output = encoder(
            input_ids=torch.tensor([[0, 1, 1, 0]], device=device),
            attention_mask=torch.ones(1, 4, dtype=torch.int64, device=device),
        ).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if norm_tap == "output":
        return None, output
    found = [
        module
        for module, given in outputs.items()
        if any(isinstance(each, Tensor) and torch.equal(each, output) for each in given)
    ]
    if len(found) == 1 and len(outputs[found[0]]) == 1:
        return found[0], output
    if found:
        what = "several: " if len(found) > 1 else "one that runs several times: "
        what += ", ".join(names[module] for module in found)
    else:
        what = f"none of {', '.join(names.values()) or 'no norm at all'}"
    raise ValueError(
        f"`encoder` must have one norm whose output is its own, to be conditioned; it has {what}. "
        f"Write `norm_tap='output'` to condition a new layer norm on top of it."
    )


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.ndim == 1


def _conditional_copy(
    norm: nn.Module | None, size: int, width: int, place: Mapping[str, Any]
) -> nn.Module:
    if norm is None:
        return ConditionalLayerNorm(size, width, **place)
    holder = nn.Sequential(copy.deepcopy(norm))
    return convert_layer_norms(holder, width, extra_types=[type(norm)])[0]


def _take_out(encoder: nn.Module, norm: nn.Module) -> None:
    for module in [*encoder.modules()]:
        for name, child in module.named_children():
            if child is norm:
                setattr(module, name, nn.Identity())
