"""See what the modules of a model compute: every call, as it was, with its gradient.

Source: Su Jianlin, article 6575 (https://kexue.fm/archives/6575), 2019, section 1.
"""

import contextlib
import copy
import dataclasses
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id as graph_task  # -1 outside of backward()
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_gradtrackingtensor,
    maybe_current_level,
)
from torch.utils._pytree import tree_map

from cln_tutorial.intermediate_variables.selection import choose, closest, require_module

NOT_RUN = (
    "Causes: the forward pass took another way; a parent uses its weights without calling it (as "
    "nn.MultiheadAttention does with out_proj) or calls its forward() directly; it runs inside a "
    "scripted or exported module; it ran in another thread (DataParallel) or process."
)


class Captured(Mapping[str, Any]):
    """What ``capture`` has seen: a mapping from names to values, in the order of the selection.

    ``captured[name]`` is what the module returned, a tensor or whatever structure it returns; if
    it was called several times, the list of these, in order. Iteration gives the names of those
    that were called. A shared module and a named ``Tap`` answer to each of their names.

    Source:
        The wish of Su Jianlin's article 6575, section 1.

    Example:
        >>> from cln_tutorial.intermediate_variables.capture import capture
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> with capture(model) as captured:
        ...     y = model(torch.ones(5, 3))
        >>> captured
        Captured(2 of 2 modules, 2 calls, 80 bytes)
        >>> captured["1"].equal(y)
        True
    """

    def __init__(self, slots: dict[str, "Slot"], entries: dict[str, str]) -> None:
        self._slots, self._entries = slots, entries
        self._cleared = False

    def __getitem__(self, name: str) -> Any:
        calls = self.calls(name)
        return calls[0] if len(calls) == 1 else calls

    def __iter__(self) -> Iterator[str]:
        return (name for name, slot in self._slots.items() if slot.calls)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        calls = sum(len(slot.calls) for slot in self._slots.values())
        of = f"{len(self)} of {len(self._slots)} modules"
        return f"Captured({of}, {calls} calls, {self.nbytes:,} bytes)"

    def __reduce__(self) -> Any:
        raise TypeError("what was captured is saved as `dict(captured)`, not as a whole.")

    def calls(self, name: str) -> list[Any]:
        """All values of one module, in the order of its calls, also if there is only one.

        Args:
            name: any name of the module.

        Returns:
            A new list of the values kept.

        Raises:
            KeyError: if the name was not selected, or its module did not run.
        """
        return list(self._slot(name).calls)

    def grad(self, name: str) -> Any:
        """The gradient that ``backward()`` brought to what the module returned.

        Args:
            name: any name of the module.

        Returns:
            The gradient, in the structure of the value, with None where none arrived; if the
            module was called several times, the list of these. Several ``backward()`` add up, as
            in ``Tensor.grad``. A leaf (a parameter that passes a tap) gets what all its uses bring.

        Raises:
            KeyError: as in ``calls``.
            RuntimeError: if there is none at all; the message says why.
        """
        gradients = self._slot(name).gradients
        if not gradients:
            raise RuntimeError(
                f"no gradient of {name!r} was asked for: write `capture(model, ..., grads=True)`."
            )
        tensors = _gradients_in(gradients)
        if all(each.value is None for each in tensors):
            cause = tensors[0].cause if tensors else "its module returned no tensor"
            raise RuntimeError(f"no gradient of {name!r}: {cause}.")
        found = [_map_leaves(lambda leaf: leaf and leaf.value, each) for each in gradients]
        return found[0] if len(found) == 1 else found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept, gradients too; with ``clone=False`` some may be shared."""
        return sum(slot.nbytes() for slot in self._slots.values())

    def clear(self) -> None:
        """Forget all values and gradients; inside the context, later calls are kept again.

        To keep the latest step of a loop, ``keep="last"`` is faster: the memory of one call serves
        the next, and need not be returned to the system and asked for again.
        """
        self._cleared = True
        for slot in self._slots.values():
            slot.clear()

    def _slot(self, name: str) -> "Slot":
        if name not in self._entries:
            raise KeyError(f"{name!r} was not selected. Closest: {closest(name, self._entries)}.")
        slot = self._slots[self._entries[name]]
        if not slot.calls:
            cleared = "was cleared, or " if self._cleared else ""
            raise KeyError(f"{name!r} was selected, but {cleared}did not run. {NOT_RUN}")
        return slot


@contextlib.contextmanager
def capture(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    *,
    pattern: str | re.Pattern[str] | None = None,
    predicate: Callable[[str, nn.Module], bool] | None = None,
    taps: bool = True,
    inputs: bool = False,
    grads: bool = False,
    clone: bool = True,
    detach: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    keep: Literal["all", "last", "first"] = "all",
    max_bytes: int | None = None,
) -> Iterator[Captured]:
    """Record what the modules of a model return while the context is open.

    The values are copies, taken before the next operation can change them in place, and detached
    from the graph. Every call of a module is kept. Only calls from the thread that opened the
    context count, and a recomputation by activation checkpointing is no call. Compiled parts (in
    the whole process) run as they are written meanwhile, and are not
    compiled anew afterwards. No hook is left on the model, whatever happens; with ``grads=True`` a
    leaf that a module returned has a tensor hook until ``clear()`` or the end of the ``Captured``.

    The model computes the same bits as without a capture, but for hooks on the modules inside an
    ``nn.TransformerEncoder``, which then leaves its fast path, and for compiled parts, whose
    rounding and random numbers are those of the model as it is written.

    A copy of the model made inside the context keeps hooks that record nothing (a pickle of it
    needs this package). Tensors inside other objects than lists, tuples, dictionaries and
    dataclasses, such as the caches of a language model, are kept as they are: not copied (so that
    later calls change them, also among ``inputs``), and not counted.

    Give one of ``names``, ``pattern`` and ``predicate``, or none for all modules without
    submodules. Names are those of ``named_modules()`` (without ``_orig_mod.`` of compiled ones),
    ``""`` for the model itself, and the own names of taps.

    Args:
        model: any module, also a compiled one.
        names: name or names.
        pattern: glob (``"layers.*.mlp"``) or compiled regular expression for the whole name.
        predicate: ``predicate(name, module)`` says whether to record it.
        taps: False leaves all ``Tap`` modules out.
        inputs: keep dictionaries with the keys ``"args"``, ``"kwargs"`` (the tensors as
            they were before the call) and ``"output"``.
        grads: keep what ``backward()`` brings, for ``Captured.grad``.
        clone: False keeps the tensors themselves: less memory and time, and the values of an
            operation in place that follows.
        detach: False leaves the values in the graph, for losses on them.
        device: where to keep the tensors; their own by default.
        dtype: what to keep floating tensors in; their own by default.
        keep: all calls of each module, the last, or the first.
        max_bytes: limit for the values kept (gradients not counted); an output that exceeds it is
            not copied first.

    Yields:
        The values, during the context and after it.

    Raises:
        KeyError: for an unknown name, with the closest ones.
        ValueError: for more than one way to select, a selection without any module, a name that
            two taps share, or an unknown ``keep``.
        TypeError: for an argument of another type.
        RuntimeError: at the end of the context if nothing was recorded; in the forward pass for
            more than ``max_bytes`` or a call inside ``torch.vmap``.

    Source:
        Su Jianlin, article 6575, section 1 (``K.function``).

    Example:
        >>> from cln_tutorial.intermediate_variables.capture import capture
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(inplace=True))
        >>> with capture(model, "0", grads=True) as captured:
        ...     model(-torch.ones(5, 3)).sum().backward()
        >>> captured["0"].shape, captured.grad("0").shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """
    require_module(model)
    if keep not in ("all", "last", "first"):
        raise ValueError(f'`keep` must be "all", "last" or "first"; got {keep!r}.')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` must be a floating dtype; got {dtype!r}.")
    if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 0):
        raise ValueError(f"`max_bytes` must be a whole number of bytes; got {max_bytes!r}.")
    device = None if device is None else torch.device(device)
    chosen = choose(model, names, pattern, predicate, taps)
    copied = copier(clone, detach, device, dtype)
    budget = None if max_bytes is None else _Budget(max_bytes, dtype)
    slots = {
        name: Slot(get_ident(), copied, keep, inputs, grads, budget) for name in chosen.modules
    }
    captured = Captured(slots, chosen.entries)
    with listening([(module, slots[name]) for name, module in chosen.modules.items()]):
        yield captured
    if not captured and not captured._cleared:
        few = ", ".join(map(repr, list(slots)[:5])) + (", ..." if len(slots) > 5 else "")
        raise RuntimeError(
            f"nothing was captured of {few}. Was the model called inside the context, and from "
            f"the thread that opened it? {NOT_RUN}"
        )


class Slot:
    """The calls of one module, and the hooks that receive them.

    A copy of the model, or a pickled one, must not go on recording: what is copied of a slot
    belongs to no thread.
    """

    def __init__(
        self,
        owner: int | None = None,
        copied: Callable[[Any], Any] | None = None,
        keep: str = "all",
        inputs: bool = False,
        grads: bool = False,
        budget: "_Budget | None" = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        self.owner, self.copied, self.keep, self.then = owner, copied, keep, then
        self.inputs, self.grads, self.budget = inputs, grads, budget
        self.plain = keep == "all" and not (inputs or grads or budget or then)
        self.calls: list[Any] = []
        self.gradients: list[Any] = []
        self.pending: list[dict[str, Any]] = []  # inputs of calls that have not returned yet

    def __reduce__(self) -> Any:
        return Slot, ()

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if get_ident() == self.owner and graph_task() < 0:
            self.pending.append({"args": self.copied(args), "kwargs": self.copied(kwargs)})

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if get_ident() != self.owner or graph_task() >= 0:
            return
        if self.plain:
            self.calls.append(self.copied(output))
        else:
            self.store(output)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The end of a call, also of one that raised: its inputs are not those of another."""
        if get_ident() == self.owner and graph_task() < 0 and self.pending:
            self.pending.pop()

    def store(self, output: Any) -> None:
        if self.keep == "first" and self.calls:
            return
        before = self.pending[-1] if self.inputs else None
        replaced = self.calls if self.keep == "last" else []
        if self.budget is not None:
            needed = _nbytes_of([before, output], self.budget.dtype)
            self.budget.spend(needed, _nbytes_of(replaced))
        value = self.copied(output)
        if self.keep == "last":  # after the copy: the allocator gives memory freed before it away
            self.calls.clear()
            self.gradients.clear()
        self.calls.append(value if before is None else {**before, "output": value})
        if self.grads:
            self.gradients.append(_map_leaves(lambda leaf: _gradient_of(leaf, self.copied), output))
        if self.then is not None:
            self.then()

    def nbytes(self) -> int:
        arrived = [each.value for each in _gradients_in(self.gradients)]
        return _nbytes_of(self.calls) + _nbytes_of(arrived)

    def clear(self) -> None:
        if self.budget is not None:
            self.budget.spend(0, _nbytes_of(self.calls))
        self.calls.clear()
        self.gradients.clear()


class _Budget:
    """The bytes that all slots of a capture share."""

    def __init__(self, limit: int, dtype: torch.dtype | None) -> None:
        self.limit, self.dtype, self.spent = limit, dtype, 0

    def spend(self, nbytes: int, freed: int) -> None:
        if self.spent - freed + nbytes > self.limit:
            raise RuntimeError(
                f"the capture holds {self.spent:,} bytes, and the next value of {nbytes:,} exceeds "
                f'`max_bytes` = {self.limit:,}. Name fewer modules, set `keep="last"`, or call '
                f"`clear()` between steps."
            )
        self.spent += nbytes - freed


class _Gradient:
    """Where the gradient of one tensor will arrive; knows nothing of the graph."""

    def __init__(self, copied: Callable[[Any], Any], cause: str) -> None:
        self.copied, self.cause = copied, cause
        self.value: Tensor | None = None

    def await_from(self, tensor: Tensor) -> None:
        if not tensor.is_leaf:  # the hook goes with the graph
            tensor.register_hook(self.receive)
            return
        here = weakref.ref(self)
        hook = tensor.register_hook(lambda gradient: (me := here()) and me.receive(gradient))
        weakref.finalize(self, hook.remove)

    def receive(self, gradient: Tensor) -> None:
        gradient = self.copied(gradient)
        self.value = gradient if self.value is None else self.value + gradient


def _gradient_of(output: Any, copied: Callable[[Any], Any]) -> _Gradient | None:
    if not isinstance(output, Tensor):
        return None
    if output.requires_grad:
        cause = "backward() was not called, or its loss does not depend on it"
        if output._is_view():
            cause += ", or an operation in place on this view made autograd replace its history"
        gradient = _Gradient(copied, cause)
        gradient.await_from(output)
        return gradient
    if torch.is_inference_mode_enabled():
        return _Gradient(copied, "it was computed under torch.inference_mode()")
    if not torch.is_grad_enabled():
        return _Gradient(
            copied,
            "it was computed under torch.no_grad() (as reentrant checkpointing does: set "
            "use_reentrant=False)",
        )
    return _Gradient(copied, "nothing that it was computed from requires a gradient")


def _gradients_in(value: Any) -> list[_Gradient]:
    found: list[_Gradient] = []
    _map_leaves(lambda leaf: leaf and found.append(leaf), value)
    return found


def copier(
    clone: bool = True,
    detach: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[Any], Any]:
    """A function that makes of a tensor, or of each in a structure, what is to be kept."""

    def kept(tensor: Tensor) -> Tensor:
        transformed = maybe_current_level() is not None
        if transformed and is_batchedtensor(_unwrapped(tensor)):
            raise RuntimeError(
                "a module was called inside torch.vmap, whose tensors do not outlive it: capture "
                "the call without vmap."
            )
        if detach:
            tensor = tensor.detach()
        if device is not None or dtype is not None:
            wanted = dtype if tensor.is_floating_point() else None
            tensor = tensor.to(device=device, dtype=wanted, copy=clone)
        elif clone:
            tensor = tensor.clone()
        return _unwrapped(tensor) if transformed and detach else tensor

    def copied(value: Any) -> Any:
        if type(value) is Tensor:
            return kept(value)
        return _map_leaves(lambda leaf: kept(leaf) if isinstance(leaf, Tensor) else leaf, value)

    return copied


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func.grad, which are dead after it."""
    while is_gradtrackingtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """A value with the function applied inside its containers, dataclasses included."""

    def leaf(value: Any) -> Any:
        if named(value):
            return value._make(_map_leaves(function, each) for each in value)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return function(value)
        value = copy.copy(value)
        for field in dataclasses.fields(value):  # also of a frozen one: the copy is ours
            mapped = _map_leaves(function, getattr(value, field.name))
            object.__setattr__(value, field.name, mapped)
        return value

    def named(value: Any) -> bool:  # a PackedSequence checks its parts where it is made by call
        return isinstance(value, tuple) and hasattr(value, "_make")

    return tree_map(leaf, value, is_leaf=named)


_PARTS = {
    torch.sparse_coo: ["_indices", "_values"],
    torch.sparse_csr: ["crow_indices", "col_indices", "values"],
    torch.sparse_bsr: ["crow_indices", "col_indices", "values"],
    torch.sparse_csc: ["ccol_indices", "row_indices", "values"],
    torch.sparse_bsc: ["ccol_indices", "row_indices", "values"],
}


def _nbytes_of(value: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes of all tensors in a structure; floating ones as if they had the dtype."""
    tensors: list[Tensor] = []

    def add(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            parts = _PARTS.get(leaf.layout)
            tensors.extend([getattr(leaf, part)() for part in parts] if parts else [leaf])

    _map_leaves(add, value)
    kinds = [(dtype if dtype and each.is_floating_point() else each.dtype) for each in tensors]
    return sum(each.numel() * kind.itemsize for each, kind in zip(tensors, kinds, strict=True))


@contextlib.contextmanager
def listening(slots: list[tuple[nn.Module, Slot]]) -> Iterator[None]:
    """Hooks on these modules, in eager mode, until the end of the context."""
    handles: list[Any] = []
    with uncompiled():
        try:
            for module, slot in slots:
                if slot.inputs:
                    handles.append(module.register_forward_pre_hook(slot.before, with_kwargs=True))
                handles.append(module.register_forward_hook(slot.after))
                if slot.inputs:
                    handles.append(module.register_forward_hook(slot.leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, slot in slots:
                slot.owner = None
                slot.pending.clear()


_stance_lock = threading.Lock()
_stances: list[Any] = []  # the stance while somebody listens, once for each who does


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled parts run as they are written, since they would not see the hooks.

    The stance belongs to the process: whoever comes first sets it, whoever leaves last restores it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        yield
        return
    try:
        with _stance_lock:
            _stances.append(_stances[0] if _stances else torch.compiler.set_stance("force_eager"))
    except RuntimeError as error:
        raise RuntimeError(
            "recording inside a compiled function is not possible. Compile the model alone, and "
            "record around its call: it runs as it is written then."
        ) from error
    try:
        yield
    finally:
        with _stance_lock:
            stance = _stances.pop()
            if not _stances:
                stance.__exit__(None, None, None)
