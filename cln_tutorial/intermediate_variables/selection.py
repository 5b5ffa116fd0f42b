"""Which modules of a model are meant, and all the names that they answer to."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from cln_tutorial.intermediate_variables.tap import Tap


class Chosen(NamedTuple):
    modules: dict[str, nn.Module]  # by the name of their entry
    entries: dict[str, str]  # the name of the entry, by each name that the module answers to


def choose(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    pattern: str | re.Pattern[str] | None = None,
    predicate: Callable[[str, nn.Module], bool] | None = None,
    taps: bool = True,
) -> Chosen:
    """The modules that are meant, each once, and all that they are called."""
    ways = {"names": names, "pattern": pattern, "predicate": predicate}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of `names`, `pattern` and `predicate`; got {', '.join(given)}.")
    known, shared = _names_of_modules(model, taps)
    if names is not None:
        owners = {name: module for module, called in known.items() for name in called}
        wanted: dict[nn.Module, str] = {}
        for name in [names] if isinstance(names, str) else names:
            if not isinstance(name, str):
                raise TypeError(f"`names` must be strings; got {type(name).__name__}.")
            wanted.setdefault(_owner_of(name, owners, shared), name)
    elif pattern is not None or predicate is not None:
        fits = _matcher(pattern, predicate)
        wanted = {m: n for m, called in known.items() for n in reversed(called) if fits(n, m)}
    else:
        wanted = {module: called[0] for module, called in known.items() if not module._modules}
    if not wanted:
        raise ValueError(f"{', '.join(given)}: no module of {type(model).__name__} is selected.")

    modules: dict[str, nn.Module] = {}
    entries: dict[str, str] = {}
    for module, asked in wanted.items():
        called = known[module]
        entry = module.name if isinstance(module, Tap) and module.name in called else asked
        modules[entry] = module
        for name in called:
            entries[name] = entry
    return Chosen(modules, entries)


def _names_of_modules(
    model: nn.Module, taps: bool
) -> tuple[dict[nn.Module, list[str]], dict[str, list[str]]]:
    """All names of each module; and the places of the taps whose own name does not tell which.

    Of a compiled module and the module inside, only the one inside runs in eager mode.
    """
    known: dict[nn.Module, list[str]] = {}
    own: dict[str, dict[nn.Module, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "_orig_mod" in module._modules:
            continue
        if "_orig_mod" in name:
            name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if isinstance(module, Tap):
            if not taps:
                continue
            if module.name is not None:
                own.setdefault(module.name, {})[module] = name
        known.setdefault(module, []).append(name)
    places = {name for called in known.values() for name in called} if own else set()
    for name in own.keys() - places:
        if len(own[name]) == 1:
            known[next(iter(own[name]))].append(name)
    shared = {name: list(of.values()) for name, of in own.items() if len(of) > 1}
    return known, shared


def _owner_of(name: str, owners: dict[str, nn.Module], shared: dict[str, list[str]]) -> nn.Module:
    if name in owners:
        return owners[name]
    if name in shared:
        raise ValueError(
            f"`names`: several taps are called {name!r}. Name their places: "
            f"{', '.join(shared[name])}."
        )
    raise KeyError(f"no module is called {name!r}. Closest: {closest(name, owners)}.")


def _matcher(
    pattern: str | re.Pattern[str] | None, predicate: Callable[[str, nn.Module], bool] | None
) -> Callable[[str, nn.Module], bool]:
    if isinstance(pattern, str):
        return lambda name, module: fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return lambda name, module: pattern.fullmatch(name) is not None
    if pattern is not None:
        raise TypeError(f"`pattern` must be a glob or a compiled regular expression: {pattern!r}.")
    if not callable(predicate):
        raise TypeError(f"`predicate` must be a function of name and module; got {predicate!r}.")
    return predicate


def closest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return ", ".join(map(repr, near)) or "there is none"


def require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
