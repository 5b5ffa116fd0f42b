"""The names of a model's weights: as a plain model has them, each tensor once."""

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Names = str | Iterable[str] | Callable[[str], bool] | None
Slots = dict[str, tuple[dict[str, Tensor], str]]  # where the tensor of a name is to be found


def unwrapped(model: Any) -> Any:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    return model


def plain_name(name: str) -> str:
    """The name that a parameter has where no submodule is compiled."""
    return name.replace("_orig_mod.", "")


def slots_of(model: Any, buffers: bool, all_buffers: bool = False) -> Slots:
    """The parameters of a model, and its floating (or all) buffers, by name."""
    if not isinstance(model, nn.Module):
        return _slots_of_list(model)
    slots: Slots = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        kinds = [module._parameters, module._buffers] if buffers else [module._parameters]
        for holder in kinds:
            for key, tensor in holder.items():
                floating = tensor is not None and (
                    tensor.is_floating_point() or tensor.is_complex()
                )
                if floating or (tensor is not None and all_buffers):
                    slots[plain_name(f"{prefix}.{key}" if prefix else key)] = (holder, key)
    return slots


def _slots_of_list(given: Iterable[Any]) -> Slots:
    if isinstance(given, Tensor):
        raise TypeError("`model_or_params` must be a module or a list of parameters; got a tensor.")
    listed = list(given.items()) if isinstance(given, Mapping) else list(given)
    pairs = [each if isinstance(each, tuple) else (str(n), each) for n, each in enumerate(listed)]
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`model_or_params` must hold tensors; {name} is {type(tensor)}.")
    holder = dict(pairs)
    if len(holder) < len(pairs):
        raise ValueError("`model_or_params` has a name twice.")
    return {
        plain_name(name): (holder, name)
        for name, t in pairs
        if t.is_floating_point() or t.is_complex()
    }


def chosen_of(slots: Slots, include: Names, exclude: Names) -> set[str]:
    wanted, unwanted = _matcher("include", include, slots), _matcher("exclude", exclude, slots)
    return {
        name
        for name in slots
        if (include is None or wanted(name)) and not (exclude is not None and unwanted(name))
    }


def _matcher(option: str, names: Names, slots: Slots) -> Callable[[str], bool]:
    if names is None or callable(names):
        return names or (lambda name: False)
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not fnmatch.filter(slots, pattern):
            raise ValueError(f"`{option}`: no parameter matches {pattern!r}.")
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def without_ties(slots: Slots) -> tuple[Slots, dict[str, str]]:
    """Each tensor under its first name, and the other names with that first one."""
    first: dict[Any, str] = {}
    alias: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, (holder, key) in slots.items():
        tensor = holder[key]
        place = _place(tensor)
        if place in first:
            alias[name] = first[place]
            continue
        first[place] = name
        if tensor.numel() and isinstance(place, tuple):
            start = tensor.data_ptr()
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in steps)
            spans.append((start, start + length * tensor.element_size(), name))
    spans.sort()
    for (_, stop, name), (start, _, other) in itertools.pairwise(spans):
        if start < stop:
            raise ValueError(
                f"{name} and {other} overlap in memory: they cannot be averaged apart."
            )
    return {name: slots[name] for name in first.values()}, alias


def _place(tensor: Tensor) -> Any:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
