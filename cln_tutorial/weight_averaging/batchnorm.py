"""Statistics of BatchNorm layers for weights that have seen no batch, as averaged ones have not."""

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cln_tutorial.weight_averaging.naming import unwrapped

Forward = Callable[[nn.Module, Any], Any]


def recompute_batchnorm_(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    layerwise: bool = False,
) -> nn.Module:
    r"""Set the running statistics of all BatchNorm layers to those of the data, in place.

    .. math:: \mu = \frac1n\sum_i x_i, \qquad \sigma^2 = \frac1{n-1}\sum_i (x_i-\mu)^2

    per channel, over all :math:`n` values that a layer receives from the whole loader: each sample
    counts the same, whatever the sizes of the batches. The sums are merged in float64. For the
    first layer this is one pass over the concatenated data. A deeper one receives what the layers
    before it make of the batch, normalised with the batch's own statistics as in training;
    ``layerwise=True`` normalises with the new running statistics instead, as the finished model
    will, so that all layers are exact.

    Only the layers to be recomputed are in training mode meanwhile: dropout is off. Left alone are
    layers without running statistics, and frozen ones: those in ``eval()`` in a model that is in
    ``train()``. (In a model that is in ``eval()`` all are recomputed.) A model without any comes
    back as it was. Modes and momenta are the old ones afterwards; after an exception the
    statistics too. Each process computes the statistics of its own loader.

    Args:
        model: any module, also compiled or wrapped by DDP.
        loader: batches: a tensor, a tuple or list whose first entry is the input, or a mapping of
            keyword arguments. Tensors are moved to the model's device.
        forward: ``forward(model, batch)`` for other batches, which it gets as they are.
        max_batches: stop after as many.
        layerwise: one pass per layer, in the order in which they are called; ``loader`` must give
            the same batches each time. A layer that is called several times per pass is normalised
            with the batch's statistics in its own pass.

    Returns:
        ``model``.

    Raises:
        ValueError: for no batch, a channel with a single value, ``max_batches`` below 1, or
            ``layerwise`` with a loader that can be iterated only once.
        TypeError: for a batch of another kind.
        FloatingPointError: for statistics that are not finite in the dtype of the layer's.

    Source:
        Wu & Johnson 2021, arXiv 2105.07576, section 3; merging after Chan, Golub & LeVeque 1983.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
        >>> batches = [torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[6.0], [8.0]])]
        >>> norm = recompute_batchnorm_(model, batches)[0]
        >>> norm.running_mean, norm.running_var
        (tensor([4.]), tensor([10.]))
    """
    _require_usable(loader, max_batches)
    inner = unwrapped(model)
    layers = {layer: name for name, layer in inner.named_modules() if _is_wanted(layer, inner)}
    if not layers:
        return model
    if layerwise and isinstance(loader, Iterator) and len(layers) > 1:
        raise ValueError(
            f"`layerwise` reads `loader` once for each of {len(layers)} layers, and it can be "
            f"iterated only once: {type(loader).__name__}. Give a list or a DataLoader."
        )

    def batches() -> Iterator[Any]:
        return itertools.islice(loader, max_batches)

    def run(batch: Any) -> None:
        (forward or _call)(inner, batch)

    modes = [(module, module.training) for module in inner.modules()]
    before = [[buffer.clone() for buffer in _buffers(layer)] for layer in layers]
    found: Found = {}
    try:
        with torch.no_grad(), _uncompiled():
            for module, _ in modes:
                module.training = False
            found = (_layer_by_layer if layerwise else _in_one_pass)(layers, batches, run)
    finally:
        for layer, old in zip(layers, before, strict=True):
            _write(layer, found.get(layer, old))
        for module, mode in modes:
            module.training = mode
    if unused := [layers[layer] for layer in layers if layer not in found]:
        warnings.warn(
            f"not called in the forward pass, statistics left alone: {', '.join(unused)}.",
            stacklevel=2,
        )
    return model


class _Pooled:
    """Count, mean and squared deviations of all that a layer has received, per channel."""

    def __init__(self) -> None:
        self.count, self.calls = 0, 0
        self.mean = self.deviations = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        self.calls += 1
        count = x.numel() // x.shape[1]
        if count == 0:
            return
        x = (x.cpu() if x.is_mps else x).double()  # no float64 on Apple's GPUs
        variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        if self.count == 0:
            self.count, self.mean, self.deviations = count, mean, variance * count
            return
        total, step = self.count + count, mean - self.mean
        self.mean = self.mean + step * (count / total)
        self.deviations += variance * count + step.square() * (self.count * count / total)
        self.count = total

    def statistics(self, layer: _BatchNorm, name: str) -> list[Tensor]:
        if self.count < 2:
            raise ValueError(
                f"{name} received {self.count} values per channel from `loader`: a variance needs "
                f"at least 2."
            )
        mean, variance = self.mean, self.deviations / (self.count - 1)
        mean, variance = mean.to(layer.running_mean), variance.to(layer.running_var)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise FloatingPointError(
                f"what {name} received has statistics that are not finite in {mean.dtype}."
            )
        return [mean, variance, torch.tensor(self.calls)]


Layers = dict[_BatchNorm, str]
Found = dict[_BatchNorm, list[Tensor]]


def _in_one_pass(
    layers: Layers, batches: Callable[[], Iterator[Any]], run: Callable[[Any], None]
) -> Found:
    pools = {layer: _Pooled() for layer in layers}

    def receive(layer: _BatchNorm, x: Tensor) -> None:
        if x.numel() == x.shape[1]:  # torch would refuse it too, and not say where
            raise ValueError(
                f"`loader` has a batch with a single value per channel at {layers[layer]}, which "
                f"cannot be normalised by itself: leave it out, or set `layerwise=True`."
            )
        pools[layer].add(x)

    for layer in layers:
        layer.training = True
    with _listening(layers, receive):
        count = 0
        for count, batch in enumerate(batches(), start=1):  # noqa: B007 - counted for the check
            run(batch)
    if count == 0:
        raise ValueError("`loader` has no batch.")
    return {
        layer: pool.statistics(layer, layers[layer]) for layer, pool in pools.items() if pool.calls
    }


class _Enough(BaseException):
    """Ends a forward pass where the layer of interest has got its input."""


def _layer_by_layer(
    layers: Layers, batches: Callable[[], Iterator[Any]], run: Callable[[Any], None]
) -> Found:
    stream = batches()
    try:
        first = next(stream)
    except StopIteration:
        raise ValueError("`loader` has no batch.") from None
    order: list[_BatchNorm] = []
    with _listening(layers, lambda layer, x: order.append(layer)):
        run(first)  # only to see who is called, and how often
    stream, found = itertools.chain([first], stream), {}
    for layer in dict.fromkeys(order):
        pool, once = _Pooled(), order.count(layer) == 1

        def receive(_: _BatchNorm, x: Tensor, pool: _Pooled = pool, once: bool = once) -> None:
            pool.add(x)
            if once:
                raise _Enough

        for later in order:  # they run in this pass only if this layer is called again behind them
            later.training = not once and later not in found
        with _listening([layer], receive):
            for batch in stream:
                with contextlib.suppress(_Enough):
                    run(batch)
        found[layer] = pool.statistics(layer, layers[layer])
        _write(layer, found[layer])
        stream = batches()
    return found


@contextlib.contextmanager
def _listening(
    layers: Iterable[_BatchNorm], receive: Callable[[_BatchNorm, Tensor], None]
) -> Iterator[None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(layer, args[0] if args else kwargs["input"])

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled parts run as they are written, since they would not see the hooks."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()  # nothing is compiled, and the import takes a second


def _is_wanted(layer: nn.Module, model: nn.Module) -> bool:
    return (
        isinstance(layer, _BatchNorm)
        and layer.track_running_stats
        and layer.running_mean is not None
        and (layer.training or not model.training)
    )


def _buffers(layer: _BatchNorm) -> list[Tensor]:
    return [layer.running_mean, layer.running_var, layer.num_batches_tracked]


def _write(layer: _BatchNorm, values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(_buffers(layer), values, strict=True):
            buffer.copy_(value)


def _call(model: nn.Module, batch: Any) -> None:
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next(tensors).device
    if isinstance(batch, Mapping):
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        return
    x = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"a batch must be a tensor, a tuple or list that begins with one, or a mapping; got "
            f"{type(batch).__name__}. Give `forward(model, batch)` for others."
        )
    model(x.to(device))


def _require_usable(loader: Any, max_batches: Any) -> None:
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(
            f"`loader` must give batches: a DataLoader or a list; got {type(loader).__name__}."
        )
    if max_batches is None:
        return
    if not isinstance(max_batches, int) or isinstance(max_batches, bool) or max_batches < 1:
        raise ValueError(f"`max_batches` must be an integer of at least 1; got {max_batches!r}.")
