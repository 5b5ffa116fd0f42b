"""Attention weights of models that never form them, from the arguments of their kernels.

Source: the wish of Su Jianlin, article 6575 (https://kexue.fm/archives/6575), 2019, section 1: to
see the attention matrix. Equation: Vaswani et al. 2017 (1706.03762), section 3.2.1.
"""

import contextlib
import dataclasses
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, no_type_check

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id as graph_task  # -1 outside of backward()
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cln_tutorial.intermediate_variables.capture import (
    choose,
    closest,
    copier,
    require_module,
    uncompiled,
)

_FUSED = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,  # in exported programs
)
_CALL = nn.Module._call_impl.__code__
_NOT_SEEN = (
    "Causes: it was not called inside the context, or in another thread or process; its forward() "
    "was called directly, so that no module was seen to run; it computes attention from "
    'ordinary operations (transformers with `attn_implementation="eager"`: ask the model for '
    "`output_attentions=True`) or with another kernel (flex_attention, the packages flash-attn and "
    "xformers); it is scripted."
)
_NESTED = (
    "attention of nested tensors has no weights of one shape. Give the model padded tensors and a "
    "mask."
)


def attention_weights(
    model: nn.Module,
    *args: Any,
    names: str | Iterable[str] | None = None,
    reduce: Literal["mean"] | None = None,
    dtype: torch.dtype = torch.float32,
    check: bool = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    r"""Run a model, and compute the attention weights that its fused kernels do not form.

    Of each call of ``F.scaled_dot_product_attention`` and of ``nn.MultiheadAttention`` inside the
    model

    .. math:: A = \operatorname{softmax}(s\,QK^\top + M)

    is computed a second time from the arguments. The weights are those before dropout, and 0 where
    a query may look at nothing. The model runs in its own mode (call ``eval()`` for what it does at
    test time), without gradients; its result is dropped (``record_attention`` lets you keep it).
    Arguments of the model that are called ``names``, ``reduce``, ``dtype`` or ``check`` do not
    reach it by name: use ``record_attention`` there.

    Args:
        model: any module, also a compiled one.
        *args: what the model takes.
        names: modules inside which attention is wanted, as in ``named_modules()``; all by default.
        reduce: ``"mean"`` averages over the heads, ``(batch, queries, keys)``; only for queries of
            four axes or more.
        dtype: of the weights; they are computed in this or the model's type, whichever is wider,
            and at least in float32.
        check: compare each :math:`AV` with what the kernel returned. In half types, whose results
            are rounded at 2 or 3 digits, only a larger difference is found.
        **kwargs: what the model takes by name.

    Returns:
        The weights, ``(batch, heads, queries, keys)``, by the name of the innermost module that
        computes them, in the order of the calls. A module that does so several times has entries
        ``"name#1"``, ``"name#2"`` and so on.

    Raises:
        RuntimeError: if no attention was seen, with the causes; as ``record_attention``; or if
            ``check`` finds a difference that is not rounding, or dropout, with which there is no
            telling.
        KeyError: for an unknown name, with the closest ones.
        ValueError: for an unknown ``reduce``, or if there is no axis of heads to average over.
        TypeError: for a ``dtype`` that is not floating, or that the device lacks (float64 on MPS).

    Source:
        Su Jianlin, article 6575, section 1; Vaswani et al. 2017 (1706.03762), section 3.2.1.

    Example:
        >>> from cln_tutorial.intermediate_variables.attention import attention_weights
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        >>> weights = attention_weights(layer, torch.randn(3, 5, 8), check=True)
        >>> {name: tuple(each.shape) for name, each in weights.items()}
        {'self_attn': (3, 2, 5, 5)}
    """
    if reduce not in (None, "mean"):
        raise ValueError(f'`reduce` must be "mean" or None; got {reduce!r}.')
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` must be a floating dtype; got {dtype!r}.")
    with torch.no_grad():
        with _recording(model, names, verify=_require_agreement if check else None) as record:
            model(*args, **kwargs)
        for name, call in record.items():
            if reduce == "mean" and call.q.ndim < 4:  # three axes may have heads or a batch
                raise ValueError(
                    f'`reduce="mean"`: the queries of {name!r} have no axis of heads; got '
                    f"{tuple(call.q.shape)}. Leave it out, and average over the axis you mean."
                )
        weights = {name: _weights(call, dtype) for name, call in record.items()}
        if reduce == "mean":
            weights = {name: each.mean(-3) for name, each in weights.items()}
    return weights


def record_attention(
    model: nn.Module, names: str | Iterable[str] | None = None
) -> contextlib.AbstractContextManager["AttentionRecord"]:
    """Keep queries, keys, values and masks of the attention in a model while the context is open.

    The model computes what it would compute anyway, bit for bit and with the same random numbers,
    with two exceptions. The fast path of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` in
    evaluation is off meanwhile, and its results move by rounding. Compiled parts (in the whole
    process) run as they are written: their results move by rounding too, and where they drop out,
    they draw other random numbers. Only calls from the thread that opened the context count, and a
    recomputation by activation checkpointing is no call.

    Args:
        model: any module, also a compiled one.
        names: modules inside which attention is wanted, as in ``named_modules()``; all by default.

    Returns:
        The context manager; it yields the record, which can be used inside and after it.

    Raises:
        KeyError: for an unknown name, with the closest ones.
        TypeError: if ``model`` is no module.
        RuntimeError: at the end of the context if in the model, or in one of the named modules, no
            attention was seen; in the forward pass for nested tensors and inside ``torch.vmap``.

    Source:
        Su Jianlin, article 6575, section 1.

    Example:
        >>> from cln_tutorial.intermediate_variables.attention import record_attention
        >>> layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> with record_attention(layer) as record:
        ...     y, _ = layer(x, x, x, need_weights=False)
        >>> record
        AttentionRecord(1 call, 1,440 bytes)
        >>> record[""].q.shape, record[""].weights.shape
        (torch.Size([3, 2, 5, 4]), torch.Size([3, 2, 5, 5]))
    """
    return _recording(model, names)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttentionCall:
    """The arguments of one attention, copied and detached, as the kernel got them.

    Args:
        name: qualified name of the innermost module that it was called in.
        q: queries, ``(batch, heads, queries, dim)``.
        k: keys, ``(batch, heads, keys, dim)``; with grouped queries they have fewer heads.
        v: values, ``(batch, heads, keys, value_dim)``, like ``k``.
        mask: True where a query may look (boolean), or what is added to the scores; None for none.
        is_causal: whether query i sees the keys up to i only.
        scale: factor of the scores.
        dropout_p: probability with which weights were dropped.

    Source:
        Vaswani et al. 2017 (1706.03762), section 3.2.1.

    Example:
        >>> from cln_tutorial.intermediate_variables.attention import AttentionCall
        >>> q = k = v = torch.ones(1, 1, 2, 4)
        >>> AttentionCall("layer", q, k, v, is_causal=True).weights
        tensor([[[[1.0000, 0.0000],
                  [0.5000, 0.5000]]]])
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float | int = 0.0

    def __repr__(self) -> str:
        shapes = (f"{x}: {tuple(getattr(self, x).shape)}" for x in "qkv")
        return f"AttentionCall({self.name!r}, {', '.join(shapes)})"

    @property
    def weights(self) -> Tensor:
        """The weights before dropout, computed anew each time; float32 for half types."""
        return _weights(self, self.q.dtype if self.q.itemsize > 2 else torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept."""
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.mask) if x is not None)


class AttentionRecord(Mapping[str, AttentionCall]):
    """What ``record_attention`` has seen: a mapping from names to calls, in their order.

    A module that computes attention once has an entry under its own name, one that does so several
    times has ``"name#1"``, ``"name#2"`` and so on. The weights are computed when they are asked
    for, since they take more memory than what they are computed from.

    Source:
        Su Jianlin, article 6575, section 1.

    Example:
        >>> from cln_tutorial.intermediate_variables.attention import record_attention
        >>> layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> with record_attention(layer) as record:
        ...     for _ in range(2):
        ...         y, average = layer(x, x, x)
        >>> list(record), len(record.calls(""))
        (['#1', '#2'], 2)
        >>> torch.allclose(record["#2"].weights.mean(1), average)
        True
    """

    def __init__(self) -> None:
        self._calls: list[AttentionCall] = []  # only ever grows
        self._named: dict[str, AttentionCall] = {}  # as of the last time that somebody asked

    def calls(self, name: str | None = None) -> list[AttentionCall]:
        """All calls, or those of one module, in their order.

        Args:
            name: qualified name of the innermost module, without a number.

        Returns:
            A new list.

        Raises:
            KeyError: if no attention was seen in the module itself.
        """
        found = [call for call in self._calls if name in (None, call.name)]
        if not found and name is not None:
            raise KeyError(self._unknown(name))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept."""
        return sum(call.nbytes for call in self._calls)

    def __getitem__(self, name: str) -> AttentionCall:
        entries = self._entries()
        if name not in entries:
            raise KeyError(self._unknown(name))
        return entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        number = len(self._calls)
        return f"AttentionRecord({number} call{'s' * (number != 1)}, {self.nbytes:,} bytes)"

    def _entries(self) -> dict[str, AttentionCall]:
        if len(self._named) == len(self._calls):
            return self._named
        times = Counter(call.name for call in self._calls)
        seen: Counter[str] = Counter()
        entries = {}
        for call in self._calls:
            seen[call.name] += 1
            number = f"#{seen[call.name]}" if times[call.name] > 1 else ""
            entries[call.name + number] = call
        self._named = entries
        return entries

    def _unknown(self, name: str) -> str:
        times = sum(call.name == name for call in self._calls)
        if times:
            return f"{name!r} has {times} calls: write {name + '#1'!r}, or `.calls({name!r})`."
        return f"no attention was seen in {name!r}. Closest: {closest(name, self._entries())}."


@contextlib.contextmanager
def _recording(
    model: nn.Module,
    names: str | Iterable[str] | None,
    verify: Callable[[AttentionCall, Tensor], None] | None = None,
) -> Iterator[AttentionRecord]:
    require_module(model)
    every = choose(model, predicate=lambda name, module: True).modules
    chosen = every if names is None else choose(model, names).modules
    called = {module: name for name, module in (every | chosen).items()}
    wanted = {"": model} if names is None else chosen
    record = AttentionRecord()
    watch = _Watch(record, called, {name: set(m.modules()) for name, m in wanted.items()}, verify)
    try:
        with uncompiled(), watch:
            yield record
    except AssertionError as error:
        if "MultiheadAttention does not support NestedTensor" in str(error):
            raise RuntimeError(_NESTED) from error
        raise
    if watch.blind:
        where = type(model).__name__ if names is None else ", ".join(map(repr, watch.blind))
        raise RuntimeError(f"no attention was seen in {where}. {_NOT_SEEN}")


class _Watch(TorchFunctionMode):
    """Sees what torch's functions are called with, in the thread that entered it.

    While the model runs it must not change anything: each function is called as it was, and
    what is kept are copies.
    """

    def __init__(
        self,
        record: AttentionRecord,
        called: dict[nn.Module, str],
        wanted: dict[str, set[nn.Module]],
        verify: Callable[[AttentionCall, Tensor], None] | None,
    ) -> None:
        super().__init__()
        self.record, self.called, self.wanted, self.verify = record, called, wanted, verify
        self.blind = list(wanted)  # in which nothing was seen so far
        self.copied = copier()

    @no_type_check
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.compiler.is_dynamo_compiling():  # the first compilation of this process
            raise RuntimeError(
                "the compiler is at work inside the context, and would write the recording into "
                "its graph. Call the compiled model once before you record."
            )
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            with self, _formation(args, kwargs):
                return _transparent(function)(*args, **kwargs)
        output = function(*args, **kwargs)
        if graph_task() >= 0:
            return output
        if function in _FUSED:
            self.see(output, *args, **kwargs)
        elif function in (torch.bmm, torch.baddbmm) and _here.formation is not None:
            self.see_product(_here.formation, output, args)
        return output

    @no_type_check
    def see(
        self,
        output,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        """One call of ``F.scaled_dot_product_attention``, whose parameters these are."""
        name = self.place()
        if name is None:
            return
        if any(x.is_nested for x in (query, key, value)):
            raise RuntimeError(_NESTED)
        if hasattr(attn_mask, "_materialize"):  # torch.nn.attention.bias.CausalBias
            attn_mask = attn_mask._materialize(query.device)
        tensors = self.copied((query, key, value, attn_mask))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        call = AttentionCall(name, *tensors, is_causal, scale, dropout_p)
        if self.verify is not None:
            self.verify(call, output.detach())
        self.record._calls.append(call)

    @no_type_check
    def see_product(self, formation, output, args):
        """One of the two products of ``nn.MultiheadAttention`` where it returns its weights."""
        *mask, left, right = args
        if self not in formation.first_product:
            formation.first_product[self] = left, right.mT, mask[0] if mask else None
            return
        q, k, mask = formation.first_product.pop(self)
        heads = -1, formation.heads
        q, k, v, output = (x.unflatten(0, heads) for x in (q, k, right, output))
        if mask is not None:  # one for all, or one for each batch and head
            mask = mask[None] if len(mask) == 1 else mask.unflatten(0, heads)
        # The queries are scaled already.
        self.see(output, q, k, v, mask, formation.dropout_p, scale=1.0)

    def place(self) -> str | None:
        """Name of the innermost module that is running, None outside of what is wanted."""
        module = next((each for each in _running_modules() if each in self.called), None)
        where = [name for name, inside in self.wanted.items() if module in inside]
        self.blind = [name for name in self.blind if name not in where]
        return self.called[module] if where else None


def _running_modules() -> Iterator[nn.Module]:
    """The modules whose call has not returned, innermost first.

    The interpreter knows them. Hooks would have to be put on every module, and the modules of
    torch choose other code where they find some.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back


def _transparent(function: types.FunctionType) -> Callable[..., Any]:
    """The same code, which does not ask whether somebody watches.

    ``F.multi_head_attention_forward`` hands itself over to a mode, which is off while it runs. Not
    asking is all that lets the mode see what it calls.
    """
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    return types.FunctionType(function.__code__, names, None, function.__defaults__)


@dataclasses.dataclass(eq=False)
class _Formation:
    """An ``nn.MultiheadAttention`` that forms its weights, and what its products do not tell."""

    heads: int
    dropout_p: float | int
    first_product: dict["_Watch", tuple[Tensor, Tensor, Tensor | None]]  # of each who watches


class _Here(threading.local):
    formation: _Formation | None = None


_here = _Here()


@contextlib.contextmanager
@no_type_check
def _formation(args, kwargs):
    """Until ``F.multi_head_attention_forward`` returns, its products are those of attention."""
    if kwargs["need_weights"]:
        dropout_p = args[10] if kwargs["training"] else 0.0
        _here.formation = _Formation(args[4], dropout_p, {})
    try:
        yield
    finally:
        _here.formation = None


def _weights(call: AttentionCall, dtype: torch.dtype) -> Tensor:
    q, k, mask = call.q, _for_each_query_head(call.k, call.q), call.mask
    wide = torch.float64 if torch.float64 in (q.dtype, dtype) else torch.float32
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        scores = q.to(wide) @ k.to(wide).mT * scale  # in the order of transformers' eager models
        if call.is_causal:  # from the top left corner, also if there are more keys than queries
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is None:
            return scores.softmax(-1).to(dtype)
        if mask.dtype == torch.bool:
            hidden = ~mask
            scores = scores.masked_fill(hidden, -torch.inf)
        else:
            hidden = mask == -torch.inf
            scores = scores + mask.to(wide)
        blind = hidden.all(-1, keepdim=True)  # softmax makes NaN of these, the kernel 0
        return scores.softmax(-1).masked_fill(blind, 0).to(dtype)


def _for_each_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values of grouped queries: neighbouring heads share one."""
    if q.ndim < 3 or x.shape[-3] in (1, q.shape[-3]):
        return x
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def _require_agreement(call: AttentionCall, output: Tensor) -> None:
    """Refuse weights that, times the values, do not give what the kernel returned.

    A score is rounded by about eps times the product of the lengths of q and k (and eps times the
    mask, where that is a number), and the result moves by that much times the largest value. Scores
    of half types are rounded in float32, unless a backend does without; only weights and result are
    rounded to the half type.
    """
    if call.dropout_p > 0:
        raise RuntimeError(
            f"`check`: {call.name!r} drops weights at random (p = {call.dropout_p}), so what it "
            f"returns does not tell whether they are right. Call `model.eval()` first."
        )
    if not call.k.shape[-2]:  # no weights
        return
    wide = _widest(output.device)
    with torch.autocast(output.device.type, enabled=False):
        weights, v = _weights(call, wide), _for_each_query_head(call.v, call.q).to(wide)
        error = (weights @ v - output.to(wide)).abs().amax(-1)
        k = _for_each_query_head(call.k, call.q).to(wide)
        longest = k.norm(dim=-1).amax(-1, keepdim=True)
        reach = abs(call.scale) * call.q.to(wide).norm(dim=-1) * longest
        if call.mask is not None and call.mask.dtype != torch.bool:
            reach = reach + torch.where(weights > 0, call.mask.to(wide).abs(), 0).amax(-1)
        largest = v.abs().amax((-2, -1)).unsqueeze(-1)
        eps = torch.finfo(output.dtype).eps
        fine = min(eps, torch.finfo(torch.float32).eps)
        allowed, coarse = ((2 * eps + (8 + 4 * reach) * of) * largest for of in (fine, eps))
    if not (error <= allowed).all():  # NaN is no agreement
        untold = (
            f" Were its scores rounded to {output.dtype}, as some backends do, rounding would "
            f"explain {coarse.max().item():.1e}: then `check` cannot tell. Check in float32."
        )
        raise RuntimeError(
            f"`check`: the weights of {call.name!r} times its values differ by "
            f"{error.max().item():.1e} from what the kernel returned; rounding explains "
            f"{allowed.max().item():.1e}.{untold if (error <= coarse).all() and eps > fine else ''}"
        )


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Metal does not have
