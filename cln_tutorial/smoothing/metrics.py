r"""Accuracy, precision, recall and F-beta with probabilities in the place of predictions.

.. math:: \mathrm{TP} = \sum_i w_i t_i p_i, \qquad
    F_\beta = \frac{N}{D}, \quad N = (1 + \beta^2)\, \mathrm{TP}, \quad
    D = \beta^2 \sum_i w_i t_i + \sum_i w_i p_i

Accuracy is a mean, so its mean over batches is the accuracy of all data. The others are ratios of
sums. Of a batch :math:`B` the ratio is off by

.. math:: \mathbb E F_B - F
    = \frac{F\, \mathrm{Var}(d) - \mathrm{Cov}(n, d)}{|B|\, \bar d^2} + o(1 / |B|), \qquad
    n = (1 + \beta^2) t p, \quad d = \beta^2 t + p,

and a batch without positives has :math:`F = 0` with a gradient of exactly 0. Running sums, in
:class:`SoftFBetaLoss`, mend both.

Source: Su Jianlin, article 6620 (https://kexue.fm/archives/6620), 2019.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, distributed, nn

from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.smoothing._checks import require_floating, wide_dtype

AVERAGES = ("binary", "micro", "macro", "weighted", "samples")

Input = Shaped[Tensor, "..."]
Scalar = Float[Tensor, ""]


class SoftConfusion(NamedTuple):
    """Expected counts of the four cells; they add up to the weight of all entries."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor


def soft_confusion(
    p: Input,
    target: Input,
    *,
    average: str = "binary",
    sample_weight: Input | None = None,
    mask: Input | None = None,
) -> SoftConfusion:
    r"""Count hits and misses when the label of each entry is drawn from its probability.

    .. math:: \mathrm{TP} = \sum w t p, \quad \mathrm{FP} = \sum w (1-t) p, \quad
        \mathrm{FN} = \sum w t (1-p), \quad \mathrm{TN} = \sum w (1-t)(1-p)

    Args:
        p: probabilities, as ``input`` of :func:`soft_fbeta` with ``from_logits=False``.
        target, sample_weight, mask: as in :func:`soft_fbeta`.
        average: "binary" and "micro" count everything together, "macro" and "weighted" each class,
            "samples" each sample.

    Returns:
        ``(tp, fp, fn, tn)``: numbers, ``(C,)`` or ``(*batch,)``. Counts of half types are float32:
        float16 ends at 65,504, and bfloat16 has no 257.

    Raises:
        TypeError, ValueError: as :func:`soft_fbeta`.

    Source:
        Article 6620, "accuracy and F1".

    Example:
        >>> tp, fp, fn, tn = soft_confusion(torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
        >>> tp.item(), fp.item(), fn.item(), tn.item()
        (0.75, 0.5, 0.25, 0.5)
    """
    entries = _read(p, target, False, average, sample_weight, mask)
    t, p = entries.target, entries.p
    cells = (t * p, (1 - t) * p, t * (1 - p), (1 - t) * (1 - p))
    weight = entries.weight if average != "samples" else entries.weight * entries.row_weight
    return SoftConfusion(*(_add_up(weight * cell, average) for cell in cells))


def soft_accuracy(
    input: Input,
    target: Input,
    *,
    from_logits: bool = True,
    sample_weight: Input | None = None,
    mask: Input | None = None,
) -> Scalar:
    r"""Average the probability of the right label: the expected accuracy of drawn labels.

    .. math:: \frac1{\sum w} \sum_i w_i\, p_{i, y_i}

    A mean, so that batches estimate it without bias. For the logits its gradient is that of the
    log-likelihood times :math:`p_y`, sample by sample: :math:`1/C` of it at the start, and 0 where
    the model is surely wrong.

    Args:
        input, target, from_logits, sample_weight, mask: as in :func:`soft_fbeta`. Where targets
            have the shape of ``input``, every entry counts as a decision between 0 and 1.

    Returns:
        A number, dtype of ``input``; 0 with gradient 0 where nothing has weight.

    Raises:
        TypeError, ValueError: as :func:`soft_fbeta`.

    Source:
        Article 6620, "accuracy".

    Example:
        >>> soft_accuracy(torch.zeros(2, 4), torch.tensor([0, 3])).item()
        0.25
    """
    entries = _read(input, target, from_logits, "micro", sample_weight, mask)
    t, p, weight = entries.target, entries.p, entries.weight
    # Of a class index only the probability of that class counts, not those of the others.
    right = t * p if _is_index(input, target) else t * p + (1 - t) * (1 - p)
    whole = t if _is_index(input, target) else torch.ones_like(t)
    return _divide((weight * right).sum(), (weight * whole).sum()).to(input.dtype)


def soft_precision(
    input: Input,
    target: Input,
    *,
    from_logits: bool = True,
    average: str = "binary",
    smooth: float | int = 0.0,
    sample_weight: Input | None = None,
    mask: Input | None = None,
) -> Scalar:
    r"""Divide expected hits by expected positives: :math:`\sum w t p / \sum w p`, F-beta of 0.

    Args:
        input, target, from_logits, average, smooth, sample_weight, mask: as in :func:`soft_fbeta`.

    Returns:
        A number, dtype of ``input``. A ratio, so biased on batches.

    Raises:
        TypeError, ValueError: as :func:`soft_fbeta`.

    Source:
        Article 6620.

    Example:
        >>> p = torch.tensor([0.75, 0.25])
        >>> soft_precision(p, torch.tensor([1, 0]), from_logits=False).item()
        0.75
    """
    entries = _read(input, target, from_logits, average, sample_weight, mask)
    return _average(entries, 0.0, smooth, average).to(input.dtype)


def soft_recall(
    input: Input,
    target: Input,
    *,
    from_logits: bool = True,
    average: str = "binary",
    smooth: float | int = 0.0,
    sample_weight: Input | None = None,
    mask: Input | None = None,
) -> Scalar:
    r"""Divide expected hits by positives: :math:`\sum w t p / \sum w t`, F-beta of infinity.

    With ``average="macro"`` this is the balanced soft accuracy.

    Args:
        input, target, from_logits, average, smooth, sample_weight, mask: as in :func:`soft_fbeta`.

    Returns:
        A number, dtype of ``input``.

    Raises:
        TypeError, ValueError: as :func:`soft_fbeta`.

    Source:
        Article 6620.

    Example:
        >>> p = torch.tensor([0.75, 0.25])
        >>> soft_recall(p, torch.tensor([1, 1]), from_logits=False).item()
        0.5
    """
    entries = _read(input, target, from_logits, average, sample_weight, mask)
    return _average(entries, math.inf, smooth, average).to(input.dtype)


def soft_fbeta(
    input: Input,
    target: Input,
    beta: float | int = 1.0,
    *,
    from_logits: bool = True,
    average: str = "binary",
    smooth: float | int = 0.0,
    sample_weight: Input | None = None,
    mask: Input | None = None,
) -> Scalar:
    r"""Compute F-beta of expected counts; with hard probabilities it is F-beta.

    .. math:: F_\beta = \frac{(1+\beta^2) \sum w t p + s}{\beta^2 \sum w t + \sum w p + s}, \qquad
        \frac{\partial F_1}{\partial p_i} = w_i \frac{2 t_i - F_1}{D}

    A positive is worth :math:`2 - F`, a negative costs :math:`F`: a cost-sensitive loss that
    adapts. So the best threshold of a calibrated model is :math:`F^* / 2`.

    Args:
        input: logits or probabilities. ``(..., C)`` for every average but "binary" and "micro",
            which take any shape if the target has the same.
        target: of the shape of ``input``, 0 and 1 or numbers between (several labels at a time;
            logits go through a sigmoid); or class indices ``(...)`` for ``input`` of ``(..., C)``
            (one label; logits go through a softmax).
        beta: weight of recall against precision, at least 0; 0 is precision, infinity is recall.
        from_logits: whether ``input`` are logits.
        average: "binary" and "micro" add up everything; "macro" is the mean over classes,
            "weighted" that by their number of positives; "samples" the mean over samples.
        smooth: added to numerator and denominator of every ratio.
        sample_weight: at least 0, one per sample, ``(...)``, or of the shape of ``target``.
            For "samples" one per sample.
        mask: True where an entry counts, of the same shapes. What it hides may be NaN, and a
            hidden class index may be out of range.

    Returns:
        A number, dtype of ``input``; sums are of float32 at least. A ratio 0 / 0 is 0 with
        gradient 0. In "macro" a class without positives has no F-beta, and is left out (where
        scikit-learn would count 0: ask it for ``labels`` that occur, to compare).

    Raises:
        TypeError: if ``input`` is not floating, or ``mask`` is not of bools.
        ValueError: for an unknown average, shapes that do not fit, a negative ``beta`` or
            ``smooth``; and, where values are cheap to look at, for probabilities or targets
            outside of [0, 1], indices out of range, weights that are negative or not finite.

    Source:
        Article 6620, "F1"; Lipton, Elkan & Naryanaswamy 2014 for the threshold.

    Example:
        >>> p, target = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1, 0, 1])
        >>> soft_fbeta(p, target, from_logits=False)
        tensor(0.3333)
    """
    _require_at_least_0("beta", beta)
    entries = _read(input, target, from_logits, average, sample_weight, mask)
    return _average(entries, beta, smooth, average).to(input.dtype)


def soft_f1_loss(
    input: Input,
    target: Input,
    *,
    from_logits: bool = True,
    average: str = "binary",
    smooth: float | int = 0.0,
    sample_weight: Input | None = None,
    mask: Input | None = None,
) -> Scalar:
    r"""Return :math:`1 - F_1`, of this batch alone.

    A biased estimate of the loss of all data, and without gradient if no positive is in the batch:
    at 5 % positives and 32 samples in 19 % of all batches. See :class:`SoftFBetaLoss`.

    Args:
        input, target, from_logits, average, smooth, sample_weight, mask: as in :func:`soft_fbeta`.

    Returns:
        A number, dtype of ``input``.

    Raises:
        TypeError, ValueError: as :func:`soft_fbeta`.

    Source:
        Article 6620, "F1".

    Example:
        >>> soft_f1_loss(torch.tensor([0.0, 0.0]), torch.tensor([1, 0])).item()
        0.5
    """
    entries = _read(input, target, from_logits, average, sample_weight, mask)
    return (1 - _average(entries, 1.0, smooth, average)).to(input.dtype)


class SoftFBetaLoss(nn.Module):
    r"""Return :math:`1 - F_\beta`, of the batch, of its neighbours in other processes, and before.

    With ``momentum`` :math:`m` numerator and denominator are running sums,

    .. math:: \tilde N \leftarrow m \tilde N + N_B, \quad \tilde D \leftarrow m \tilde D + D_B,
        \quad \tilde k \leftarrow m \tilde k + 1, \qquad
        L = 1 - \frac{\tilde N}{\tilde D}, \quad
        \nabla L = -\frac{\tilde k}{\tilde D}
        \Bigl(\nabla N_B - \frac{\tilde N}{\tilde D} \nabla D_B\Bigr)

    The gradient takes the slopes of the batch and the ratio of many. At fixed parameters its mean
    is that of the population up to :math:`O((1-m) / |B|)`, and a batch without positives pushes
    probabilities down, from the first positive ever seen on. A running ratio lags behind the
    parameters by about :math:`1/(1-m)` batches.

    In ``eval()`` the running sums are neither used nor changed. A batch that is not finite gives a
    loss that is not, and leaves them alone. They are buffers: ``numerator``, ``denominator``,
    ``support`` (positives) and ``n_batches``, all zero at the start.

    With ``process_group`` the sums are those of the joined batch of all its processes, which must
    all take part, and the loss is the same number in each. Backward adds up what comes back from
    all processes, so each has a gradient of :math:`W` (their number) times its share. The mean
    that ``DistributedDataParallel`` takes is then the gradient of the joined batch, exactly. If you
    add up gradients yourself, divide by :math:`W`.

    Args:
        beta, average, from_logits, smooth: as in :func:`soft_fbeta`. ``smooth`` is added to the
            sums of one batch, or to their running mean.
        momentum: None is no memory; else in [0, 1), 0.99 for batches of 32 with rare positives.
            Not for "samples", whose ratios are inside of a sample.
        process_group: a ``ProcessGroup``, such as ``torch.distributed.group.WORLD`` after
            ``init_process_group`` (before, it is None); None is this process alone.

    Raises:
        ValueError: for an unknown average, a negative ``beta`` or ``smooth``, another momentum.

    Source:
        Article 6620, which warns of the bias; the running sums are ours.

    Example:
        >>> loss = SoftFBetaLoss(momentum=0.99)
        >>> _ = loss(torch.zeros(8), torch.ones(8))
        >>> logits = torch.zeros(8, requires_grad=True)
        >>> loss(logits, torch.zeros(8)).backward()  # no positives
        >>> bool((logits.grad > 0).all())
        True
    """

    def __init__(
        self,
        beta: float | int = 1.0,
        average: str = "binary",
        from_logits: bool = True,
        smooth: float | int = 0.0,
        momentum: float | int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        _require_at_least_0("beta", beta)
        _require_at_least_0("smooth", smooth)
        _require_average(average)
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be None or lie in [0, 1); got {momentum}.")
        if momentum is not None and average == "samples":
            raise ValueError("`momentum` has no meaning for the average 'samples'; leave it None.")
        self.beta, self.average, self.from_logits = beta, average, from_logits
        self.smooth, self.momentum, self.process_group = smooth, momentum, process_group
        if momentum is not None:
            for name in _RUNNING:
                self.register_buffer(name, torch.zeros(()))

    def forward(
        self,
        input: Input,
        target: Input,
        sample_weight: Input | None = None,
        mask: Input | None = None,
    ) -> Scalar:
        """Return the loss, dtype of ``input``; arguments as in :func:`soft_fbeta`."""
        entries = _read(input, target, self.from_logits, self.average, sample_weight, mask)
        if self.average == "samples":
            sums = torch.stack(_sums_of_samples(entries, self.beta, self.smooth))
        else:
            sums = torch.stack(_sums(entries, self.beta, self.average))
        if self.process_group is not None:
            sums = _AllReduce.apply(sums, self.process_group)
        if self.average == "samples":
            score = _divide(*sums.unbind())
        else:
            if self.momentum is not None and self.training:
                sums = self._remember(sums)
            score = _score(*sums.unbind(), self.smooth, self.average)
        return (1 - score).to(input.dtype)

    def reset_running_sums(self) -> None:
        """Forget all batches so far."""
        for name in _RUNNING if self.momentum is not None else ():
            getattr(self, name).zero_()

    def _remember(self, sums: Tensor) -> Tensor:
        """Return the running means of the sums, with the gradient of this batch."""
        batch = sums.detach()
        one = batch.new_ones(())
        before = [getattr(self, name).to(batch) for name in _RUNNING]
        after = [self.momentum * old + new for old, new in zip(before, [*batch, one], strict=True)]
        good = batch.isfinite().all()
        for name, old, new in zip(_RUNNING, before, after, strict=True):
            self._keep(name, torch.where(good, new, old))
        means = torch.stack(after[:-1]) / after[-1]
        return sums + (means - batch)

    def _keep(self, name: str, value: Tensor) -> None:
        buffer = getattr(self, name)
        # The number of classes is known from the first batch on; a half type has no running sums.
        if (buffer.shape, buffer.dtype, buffer.device) == (value.shape, value.dtype, value.device):
            buffer.copy_(value)
        else:
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in _RUNNING if self.momentum is not None else ():
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape, dtype=saved.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, average={self.average!r}, momentum={self.momentum}"


_RUNNING = ("numerator", "denominator", "support", "n_batches")


class _AllReduce(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum over processes."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = sums.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(gradient, ctx.group), None


# --- sums and their ratio -------------------------------------------------------------------------


class _Entries(NamedTuple):
    p: Tensor
    target: Tensor
    weight: Tensor  # of an entry
    row_weight: Tensor  # of a sample, for "samples" alone; there it is no part of `weight`


def _average(entries: _Entries, beta: float | int, smooth: float | int, average: str) -> Tensor:
    _require_at_least_0("smooth", smooth)
    if average == "samples":
        return _divide(*_sums_of_samples(entries, beta, smooth))
    return _score(*_sums(entries, beta, average), smooth, average)


def _sums(entries: _Entries, beta: float | int, average: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return numerator, denominator and positives, of each class or of everything."""
    weighted = entries.weight * entries.target
    hits = _add_up(weighted * entries.p, average)
    positives = _add_up(weighted.expand_as(entries.p), average)
    if beta == math.inf:
        return hits, positives, positives
    predicted = _add_up(entries.weight * entries.p, average)
    return (1 + beta**2) * hits, beta**2 * positives + predicted, positives


def _score(n: Tensor, d: Tensor, positives: Tensor, smooth: float | int, average: str) -> Tensor:
    ratio = _divide(n + smooth, d + smooth)
    if average == "macro":
        present = (positives > 0).to(ratio.dtype)
        return _divide((present * ratio).sum(), present.sum())
    if average == "weighted":
        return _divide((positives * ratio).sum(), positives.sum())
    return ratio


def _sums_of_samples(e: _Entries, beta: float | int, smooth: float | int) -> tuple[Tensor, Tensor]:
    n, d, _ = _sums(e, beta, "samples")
    weight = e.row_weight.squeeze(-1)
    return (weight * _divide(n + smooth, d + smooth)).sum(), weight.expand_as(n).sum()


def _add_up(x: Tensor, average: str) -> Tensor:
    if average == "samples":
        return x.sum(-1)
    if average in ("macro", "weighted"):
        return x.flatten(0, -2).sum(0)
    return x.sum()


def _divide(n: Tensor, d: Tensor) -> Tensor:
    """Return n / d, and 0 with gradient 0 where d is 0, or so small that 1 / d overflows."""
    empty = d < torch.finfo(d.dtype).tiny
    return torch.where(empty, 0, n) / torch.where(empty, 1, d)


# --- reading the arguments ------------------------------------------------------------------------


def _read(
    input: Tensor,
    target: Tensor,
    from_logits: bool,
    average: str,
    sample_weight: Tensor | None,
    mask: Tensor | None,
) -> _Entries:
    require_floating("input", input)
    _require_average(average)
    by_index = _is_index(input, target)
    _require_fit(input, target, average, by_index)
    x = input.to(wide_dtype(input.dtype))
    keep = None
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"`mask` must be of bools; got {mask.dtype}.")
        keep = _align("mask", mask, input, target, average, by_index)
        # What is hidden may be anything: not even its gradient may be computed.
        x = torch.where(keep, x, 0)
        target = torch.where(keep.squeeze(-1) if by_index else keep, target, 0)
    _require_values(x, target, from_logits, by_index)
    if from_logits:
        x = x.softmax(-1) if by_index else x.sigmoid()
    if by_index:
        target = target.unsqueeze(-1) == torch.arange(input.shape[-1], device=input.device)
    weight = row_weight = x.new_ones([1] * x.ndim)
    if keep is not None:
        weight = keep.to(x.dtype)
        row_weight = keep.any(-1, keepdim=True).to(x.dtype) if x.ndim else weight
    if sample_weight is not None:
        given = _align("sample_weight", sample_weight, input, target, average, by_index).to(x.dtype)
        if average == "samples":
            row_weight = row_weight * given
        else:
            weight = weight * given
        if _visible(given) and not ((given >= 0) & (given < math.inf)).all():
            raise ValueError("`sample_weight` must be finite and at least 0.")
    if average == "samples":
        row_weight = row_weight.expand(*x.shape[:-1], 1)
    return _Entries(x, target.to(x.dtype), weight, row_weight)


def _is_index(input: Tensor, target: Tensor) -> bool:
    whole = not target.is_floating_point() and target.dtype != torch.bool
    return whole and input.ndim > 0 and target.shape == input.shape[:-1]


def _align(
    name: str, given: Tensor, input: Tensor, target: Tensor, average: str, by_index: bool
) -> Tensor:
    """Return weights or a mask that broadcast to the entries, of the shapes allowed for them."""
    shapes = [] if by_index else [input.shape]
    if average != "binary":
        shapes.append(input.shape[:-1])
    if average == "samples" and name == "sample_weight":
        shapes = [input.shape[:-1]]
    if given.shape not in shapes:
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"`{name}` must have the shape {wanted}; got {tuple(given.shape)}.")
    return given if given.ndim == input.ndim else given.unsqueeze(-1)


def _require_average(average: str) -> None:
    if average not in AVERAGES:
        raise ValueError(f"`average` must be one of {AVERAGES}; got {average!r}.")


def _require_at_least_0(name: str, value: float | int) -> None:
    if not value >= 0 or (name == "smooth" and value == math.inf):
        raise ValueError(f"`{name}` must be at least 0; got {value}.")


def _require_fit(input: Tensor, target: Tensor, average: str, by_index: bool) -> None:
    if average == "binary" and target.shape != input.shape:
        raise ValueError(
            f"`target` must have the shape of `input` {tuple(input.shape)} for the average "
            f"'binary'; got {tuple(target.shape)}. Class indices go with another average."
        )
    if not by_index and target.shape != input.shape:
        raise ValueError(
            f"`target` must have the shape of `input` {tuple(input.shape)}, or be class indices "
            f"{tuple(input.shape[:-1])}; got {tuple(target.shape)} of {target.dtype}."
        )
    if average not in ("binary", "micro") and input.ndim < 2:
        raise ValueError(
            f"`input` must be (..., classes) for the average {average!r}; got {tuple(input.shape)}."
        )


def _require_values(x: Tensor, target: Tensor, from_logits: bool, by_index: bool) -> None:
    if _visible(target):
        top = x.shape[-1] - 1 if by_index else 1
        if ((target < 0) | (target > top)).any():
            raise ValueError(f"`target` must lie in [0, {top}]; mask entries that do not count.")
    if not from_logits and _visible(x) and ((x < 0) | (x > 1)).any():
        raise ValueError("`input` must be probabilities in [0, 1]; for logits set `from_logits`.")


def _visible(x: Tensor) -> bool:
    return x.device.type == "cpu" and not values_are_hidden()
