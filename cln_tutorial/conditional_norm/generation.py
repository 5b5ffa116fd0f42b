"""Write texts under a condition, and read off which condition a text was written under."""

import contextlib
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cln_tutorial.conditional_norm.language_model import ConditionalLanguageModel, KeyValueCache
from cln_tutorial.conditional_norm.modules import ConditionalNorm, condition


@torch.no_grad()
def sample(
    model: ConditionalLanguageModel,
    cond: Int[Tensor, "..."] | Float[Tensor, "..."] | int | None,
    n: int,
    *,
    prompt: Int[Tensor, "..."],
    end: int | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    guidance: float | int = 1.0,
    max_length: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "n time"]:
    r"""Continue a prompt, token by token, under a condition.

    With ``guidance`` :math:`w` the logits are
    :math:`\ell_\varnothing + w\,(\ell_c - \ell_\varnothing)`: 1 is the model itself, 0 its null
    condition, more than 1 exaggerates. Train with ``cond_dropout`` for that. The padding token is
    never drawn.

    Args:
        model: is run in evaluation mode and left in the mode that it was in.
        cond: a label, labels ``(n,)``, vectors ``(n or 1, cond_dim)``, or ``None``.
        n: number of texts.
        prompt: tokens that every text begins with, ``(time,)``, or ``(n, time)``; no padding.
        end: token that ends a text; the rest of its row is the model's padding.
        temperature: divides the logits.
        top_k: keep the ``top_k`` likeliest tokens. 1 is greedy.
        top_p: then keep the fewest tokens whose probability reaches ``top_p``, in (0, 1].
        guidance: weight of the condition.
        max_length: of a row, prompt included; the model's if not given. A text that has not ended
            by then is cut.
        generator: of the random numbers, on the model's device.

    Returns:
        Rows of tokens, each with its prompt, as long as the longest text.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    Source: top-k Fan et al. 2018 (arXiv 1805.04833), top-p Holtzman et al. 2020
    (arXiv 1904.09751), guidance Ho & Salimans 2022 (arXiv 2207.12598).

    Example:
        >>> model = ConditionalLanguageModel(50, num_classes=2, dim=16, num_layers=1)
        >>> sample(model, 1, 4, prompt=torch.tensor([1]), max_length=6, top_p=0.9).shape
        torch.Size([4, 6])
    """
    vocabulary, longest = model.embedding.num_embeddings, model.positions.num_embeddings
    max_length = longest if max_length is None else max_length
    _require_whole("n", n, at_least=0)
    _require_whole("max_length", max_length, at_least=1, at_most=longest)
    if end is not None:
        _require_whole("end", end, at_least=0, at_most=vocabulary - 1)
    _require_number("temperature", temperature)
    _require_number("guidance", guidance)
    if temperature <= 0:
        raise ValueError(
            f"`temperature` must be positive; got {temperature}. For the likeliest token write "
            f"`top_k=1`."
        )
    _require_truncation(top_k, top_p, vocabulary)
    tokens = _prompts(model, prompt, n, max_length)
    if isinstance(cond, numbers.Integral):
        cond = torch.full((n,), int(cond), device=tokens.device)
    model._condition(cond, n)  # its checks, also where the condition has no weight

    cache, null_cache = KeyValueCache(), KeyValueCache()
    ended = torch.zeros(n, dtype=torch.bool, device=tokens.device)
    if end is not None:
        ended = (tokens == end).any(1)
    new = tokens
    with _evaluation(model):
        while tokens.shape[1] < max_length and not ended.all():
            logits = model(new, cond, cache)[:, -1] if guidance else 0.0
            if guidance != 1:
                with _no_condition(model):
                    null = model(new, None, null_cache)[:, -1]
                logits = null + guidance * (logits - null)
            logits = logits / temperature
            logits[:, model.padding] = -math.inf
            if not logits.amax(1).isfinite().all():
                raise ValueError(
                    f"the logits are not finite: the model holds nan, or `temperature` "
                    f"{temperature} or `guidance` {guidance} is too extreme."
                )
            p = truncate_logits(logits, top_k=top_k, top_p=top_p).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)
            new = torch.where(ended[:, None], model.padding, drawn)
            tokens = torch.cat([tokens, new], dim=1)
            if end is not None:
                ended = ended | (new[:, 0] == end)
    return tokens


def truncate_logits(
    logits: Float[Tensor, "*batch vocabulary"],
    *,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Float[Tensor, "*batch vocabulary"]:
    """Set the logits of unlikely tokens to minus infinity: top-k first, then top-p.

    ``top_p`` keeps the fewest tokens whose probability, after top-k, reaches ``top_p``: at least
    one, and all of them for 1.

    Raises:
        ValueError: if ``top_k`` is not in 1..vocabulary, or ``top_p`` not in (0, 1].

    Example:
        >>> p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
        >>> truncate_logits(p.log(), top_p=0.95).isfinite().tolist()
        [True, True, True, True, False]
    """
    _require_truncation(top_k, top_p, logits.shape[-1])
    if top_k is not None:
        kept = logits.topk(top_k).indices
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
    # A sum of float32 may end below 1 and cut what 1 must keep, so 1 is no case of the rest.
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        before = p.cumsum(-1) - p
        # The first token has nothing before it, so it always stays.
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return logits


@torch.no_grad()
def generative_classifier(
    model: ConditionalLanguageModel,
    tokens: Int[Tensor, "batch time"],
    *,
    log_prior: Float[Tensor, "classes"] | None = None,
) -> Float[Tensor, "batch classes"]:
    r"""Return :math:`\log p(c \mid x)` of every label, by Bayes from the generator itself.

    .. math:: p(c \mid x) = \frac{p(x \mid c)\,p(c)}{\sum_k p(x \mid k)\,p(k)}

    Args:
        model: one with classes; run in evaluation mode.
        tokens: as for :meth:`ConditionalLanguageModel.nll`.
        log_prior: :math:`\log p(c)` up to a constant; uniform if not given.

    Raises:
        TypeError, ValueError: if ``tokens`` do not fit, the model has no classes, or ``log_prior``
            is not one number per class.

    Example:
        >>> model = ConditionalLanguageModel(50, num_classes=2, dim=16, num_layers=1)
        >>> generative_classifier(model, torch.tensor([[1, 3, 4, 5]])).exp()  # knows nothing yet
        tensor([[0.5000, 0.5000]])
    """
    joint = -_nll_of_every_label(model, tokens)
    if log_prior is not None:
        if not isinstance(log_prior, Tensor):
            raise TypeError(f"`log_prior` must be a tensor; got {type(log_prior).__name__}.")
        if log_prior.shape != joint.shape[1:]:
            raise ValueError(
                f"`log_prior` must be ({joint.shape[1]},), a number per class; got "
                f"{tuple(log_prior.shape)}."
            )
        joint = joint + log_prior
    return joint.log_softmax(dim=1)


class SwapGap(NamedTuple):
    """What a wrong label costs; nats per token are means over all tokens of all texts."""

    true: float  #: nats per token with the true label
    swapped: float  #: with a wrong one, the mean over all wrong ones
    gap: float  #: swapped - true
    z: float  #: mean gap of a text, in units of its standard error over the texts
    likelier: float  #: share of texts whose true label is likelier than all others, ties as half


@torch.no_grad()
def swap_label_gap(
    model: ConditionalLanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> SwapGap:
    """Measure a conditional model on texts, once with their labels and once with wrong ones.

    The difference is paired: the same texts, the same network, so that what the texts differ in
    cancels. A model that ignores its condition has a gap of exactly zero.

    Args:
        model: one with two classes or more; run in evaluation mode.
        batches: of tokens ``(batch, time)`` and labels ``(batch,)``, int64 or int32.

    Raises:
        TypeError, ValueError: if tokens or labels do not fit, the model has fewer than two classes,
            or there are fewer than two texts.
    """
    true, wrong, likelier, targets = [], [], [], 0
    for tokens, label in batches:
        nll = _nll_of_every_label(model, tokens).double()
        if nll.shape[1] < 2:
            raise ValueError("`model` must have two classes or more to swap labels.")
        model._require_label(label, len(tokens))
        own = nll.gather(1, label[:, None].long())
        others = nll.scatter(1, label[:, None].long(), math.inf)
        true.append(own[:, 0])
        wrong.append((nll.sum(1) - own[:, 0]) / (nll.shape[1] - 1))
        rival = others.min(1).values
        likelier.append((own[:, 0] < rival).double() + (own[:, 0] == rival).double() / 2)
        targets += int((tokens[:, 1:] != model.padding).sum())
    if sum(map(len, true)) < 2:
        raise ValueError(f"`batches` must hold two texts or more; got {sum(map(len, true))}.")
    if not targets:
        raise ValueError("`batches` must hold tokens to predict; got the first of each text only.")
    true, wrong = torch.cat(true), torch.cat(wrong)
    gap = wrong - true
    # Gaps that are all equal have no error: z is 0 where the model ignores its condition, or
    # infinite.
    z = gap.mean() / gap.std() * len(gap) ** 0.5 if gap.mean() else gap.mean()
    return SwapGap(
        true=float(true.sum() / targets),
        swapped=float(wrong.sum() / targets),
        gap=float(gap.sum() / targets),
        z=float(z),
        likelier=float(torch.cat(likelier).mean()),
    )


def _nll_of_every_label(model: ConditionalLanguageModel, tokens: Tensor) -> Tensor:
    if model.class_embedding is None:
        raise ValueError("`model` must have classes; make it with `num_classes`.")
    with _evaluation(model):
        columns = [
            model.nll(tokens, tokens.new_full((len(tokens),), label, dtype=torch.int64))
            for label in range(model.class_embedding.num_embeddings)
        ]
    return torch.stack(columns, dim=1)


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, and give every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _no_condition(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let no enclosing block act either."""
    if any(isinstance(module, ConditionalNorm) for module in model.modules()):
        return condition(model, None)
    return contextlib.nullcontext()


def _prompts(model: ConditionalLanguageModel, prompt: Tensor, n: int, max_length: int) -> Tensor:
    if not isinstance(prompt, Tensor) or prompt.dtype not in (torch.int32, torch.int64):
        got = getattr(prompt, "dtype", type(prompt).__name__)
        raise TypeError(f"`prompt` must hold tokens, int64 or int32; got {got}.")
    if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and len(prompt) != n):
        raise ValueError(
            f"`prompt` must be (time,) or ({n}, time), a row per text; got {tuple(prompt.shape)}."
        )
    if not 1 <= prompt.shape[-1] <= max_length:
        raise ValueError(
            f"`prompt` must hold 1 to {max_length} tokens (`max_length`); got {prompt.shape[-1]}."
        )
    if (prompt == model.padding).any():
        raise ValueError(
            f"`prompt` holds padding ({model.padding}), which would be read as a word; sample "
            f"prompts of different lengths in turn."
        )
    return prompt.long().expand(n, -1)


def _require_truncation(top_k: object, top_p: object, vocabulary: int) -> None:
    if top_k is not None:
        _require_whole("top_k", top_k, at_least=1, at_most=vocabulary)
    if top_p is not None:
        _require_number("top_p", top_p)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"`top_p` is a probability and must lie in (0, 1]; got {top_p}. A number of tokens is "
            f"`top_k`."
        )


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number; got {value!r}.")


def _require_whole(name: str, value: object, at_least: int, at_most: int | None = None) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        bound = f"{at_least} or more" if at_most is None else f"{at_least} to {at_most}"
        raise ValueError(f"`{name}` must be a whole number, {bound}; got {value!r}.")
