"""Averages of a model's weights that follow its training: one object, one or several averages."""

import contextlib
import copy
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from cln_tutorial._files import write_atomically
from cln_tutorial.weight_averaging.functional import require_backend
from cln_tutorial.weight_averaging.groups import Group, copied
from cln_tutorial.weight_averaging.naming import (
    Names,
    chosen_of,
    plain_name,
    slots_of,
    unwrapped,
    without_ties,
)
from cln_tutorial.weight_averaging.profiles import (
    Clock,
    Profiles,
    Uniform,
    named_profiles,
    weights_of,
)

METADATA = "cln_tutorial.weight_averaging"
_HALF = (torch.bfloat16, torch.float16)


class ExponentialMovingAverage:
    r"""One or several running averages of a model's weights.

    .. math:: \Theta \leftarrow \Theta + (1 - \beta)(\theta - \Theta)

    after each step of the optimiser, with :math:`\beta` from the decay or the profile. The training
    is not touched: with and without an average it is the same, bit for bit.

    Args:
        model_or_params: a module (also one that is compiled or wrapped by DDP), parameters, or
            pairs of name and parameter.
        decay: :math:`\alpha` **per optimiser step**, in [0, 1), whatever ``update_every`` is. A
            mapping ``{"fast": 0.99, "slow": 0.9999}`` or a sequence makes several averages, for
            which the weights are read once. At most one of ``decay``, ``half_life``, ``profile``;
            0.999 if there is none.
        half_life: optimiser steps after which half of an average is new.
        profile: any :class:`~cln_tutorial.weight_averaging.Profile`, or several.
        bias_correction: start from the first weights that are seen, and let the initial ones count
            for nothing. ``False`` starts from the present ones: right for pretrained weights.
        update_every: optimiser steps between two updates.
        start_step: until this step the averages are copies of the weights.
        buffers: "copy" hands on the model's own, "average" averages the floating ones (and copies
            the others), "ignore" never touches them. See also
            :func:`~cln_tutorial.weight_averaging.recompute_batchnorm_`.
        include, exclude: which parameters: glob patterns or a predicate on the name. Others, and
            those that need no gradient, are taken from the model when an average is read.
        dtype: of the averages. "auto" is float32 for weights of 16 bits, and else their own.
        compensated: keep beside each average what float32 would round away (as much memory again).
        stochastic_rounding: of averages in 16 bits; ``None`` is yes. Without it they stop moving.
        seed: of that rounding.
        device: where the averages lie; ``None`` is where the weights are, also after they move.
        on_nonfinite: what an update does when a weight is infinite or NaN: "propagate", "skip" the
            update, or "raise" (both read the weights once more).
        backend: "auto", "reference", "numba" or "triton".

    Raises:
        ValueError: for a decay outside of [0, 1), two ways to say it, no parameter, parameters that
            overlap in memory, or options that contradict each other.

    Source:
        Article 6575, section 2. Bias correction after Kingma & Ba 2015, arXiv 1412.6980.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> average = ExponentialMovingAverage(model, decay=0.9)
        >>> handle = average.attach(optimiser)
        >>> for _ in range(10):
        ...     optimiser.zero_grad()
        ...     model(torch.ones(2, 3)).square().mean().backward()
        ...     optimiser.step()
        >>> with average.applied():  # evaluate here
        ...     output = model(torch.ones(1, 3))
        >>> average.step
        10
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        decay: Profiles | None = None,
        *,
        half_life: float | int | None = None,
        profile: Profiles | None = None,
        bias_correction: bool = True,
        update_every: int = 1,
        start_step: int = 0,
        buffers: str = "copy",
        include: Names = None,
        exclude: Names = None,
        dtype: torch.dtype | str = "auto",
        compensated: bool = False,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        on_nonfinite: str = "propagate",
        backend: str = "auto",
    ):
        _one_of("buffers", buffers, ("copy", "average", "ignore"))
        _one_of("on_nonfinite", on_nonfinite, ("propagate", "skip", "raise"))
        _at_least("update_every", update_every, 1)
        _at_least("start_step", start_step, 0)
        _at_least("seed", seed, 0)
        require_backend(backend)
        self.profiles = named_profiles(decay, half_life, profile)
        self.bias_correction, self.update_every = bias_correction, update_every
        self.start_step, self.buffers, self.seed = start_step, buffers, seed
        self.compensated, self.on_nonfinite, self.backend = compensated, on_nonfinite, backend
        self.device = None if device is None else torch.device(device)
        self.dtype, self.stochastic_rounding = _rounding(dtype, compensated, stochastic_rounding)
        self.step = 0
        self._last_update = start_step
        self._saved: list[tuple[Tensor, Tensor]] | None = None
        self._applied = 0
        unwrap = unwrapped(model_or_params)
        self.model = unwrap if isinstance(unwrap, nn.Module) else None
        slots = slots_of(unwrap, buffers == "average")
        chosen = chosen_of(slots, include, exclude)
        self._slots, self._alias = without_ties(slots)
        self._chosen = [name for name in self._slots if name in chosen]
        if not self._chosen:
            raise ValueError(
                f"`model_or_params` has no floating parameter to average: {len(slots)} tensors, "
                f"include={include!r}, exclude={exclude!r}."
            )
        self._groups: list[Group] = []
        self._join(self._unfrozen(), start_step)

    # --- training ---------------------------------------------------------------------------------

    def update(self, step: int | None = None) -> None:
        """Take the present weights into the averages; call it after the step of the optimiser.

        Args:
            step: steps of the optimiser so far; counted if not given. A step that was there already
                is ignored with a warning.

        Raises:
            ValueError: if ``step`` is smaller than before.
            RuntimeError: if an average is in the model's place, or a parameter changed its shape.
            FloatingPointError: for a weight that is not finite, if ``on_nonfinite`` is "raise".
        """
        if self._applied or self._saved:
            raise RuntimeError(
                "an average is in the place of the weights: leave `applied()`, or call `swap_()` "
                "again, before the next update."
            )
        if step is None:
            step = self.step + 1
        if step == self.step:
            warnings.warn(f"step {step} has been averaged already: nothing done.", stacklevel=2)
            return
        if step < self.step:
            raise ValueError(f"`step` must grow; got {step} after {self.step}.")
        before, self.step = self.step, step
        if len(new := self._unfrozen()) > sum(len(group.names) for group in self._groups):
            known = {name for group in self._groups for name in group.names}
            self._join([name for name in new if name not in known], max(self._last_update, before))
        if step > self.start_step and (step - self.start_step) % self.update_every:
            return
        if self.on_nonfinite != "propagate" and not self._all_finite():
            return
        for number, group in enumerate(self._groups):
            weights = self._weights_of(group)
            if step <= self.start_step:
                group.copy(weights)
            else:
                plan = group.plan_for(weights, self.stochastic_rounding, self.backend)
                shares = [clock.advance(step - group.start) for clock in group.clocks]
                plan.run(shares, self.seed + (number << 48), step)
        self._last_update = max(step, self.start_step)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Update after each step of ``optimizer``: ``handle.remove()`` ends it.

        Gradients may be accumulated: what counts are the steps. One that a ``GradScaler`` skips
        because of infinite gradients does not count, also where a fused optimiser skips it inside
        (on a GPU that reads one number back, in the steps with a scaler only).

        Raises:
            ValueError: if the optimiser has none of the averaged parameters.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held & {id(self._tensor(name)) for name in self._chosen}:
            raise ValueError("`optimizer` has none of the parameters that are averaged here.")

        def after_step(optimizer, args, kwargs):
            skipped = getattr(optimizer, "found_inf", None)
            if skipped is None or not bool(skipped):
                self.update()

        return optimizer.register_step_post_hook(after_step)

    def add_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Average these too, from now on: with bias correction, from their own first step.

        Parameters that were frozen and get ``requires_grad`` join by themselves.

        Raises:
            ValueError: if a name is there already or a tensor overlaps with another one.
        """
        new = {plain_name(name): (dict([(name, tensor)]), name) for name, tensor in named}
        if known := new.keys() & self._slots.keys():
            raise ValueError(f"averaged already: {', '.join(sorted(known))}.")
        slots, alias = without_ties(self._slots | new)
        self._slots, self._alias = slots, self._alias | alias
        names = [name for name in new if name in slots]
        self._chosen += names
        self._join(
            [n for n in names if self._tensor(n).requires_grad], max(self._last_update, self.step)
        )

    # --- reading ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def applied(self, which: str | None = None) -> Iterator[nn.Module | None]:
        """Put an average in the place of the weights for the length of a ``with`` block.

        The weights, and the buffers too, come back bit for bit, whatever happens inside. Contexts
        nest. The model keeps its dtype.

        Args:
            which: name of the average, if there are several.
        """
        self._name(which)
        saved: list[tuple[Tensor, Tensor]] = []
        self._applied += 1
        try:
            self._put(which, saved)
            yield self.model
        finally:
            _restore(saved)
            self._applied -= 1

    def swap_(self, which: str | None = None) -> None:
        """Put an average in the place of the weights, or at the second call the weights back."""
        if self._saved is not None:
            _restore(self._saved)
            self._saved = None
            return
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            self._put(which, saved)
        except BaseException:
            _restore(saved)
            raise
        self._saved = saved

    def copy_to(self, model: nn.Module | None = None, which: str | None = None) -> None:
        """Write an average into a model with these names, for good; by default into its own.

        Raises:
            KeyError: if a parameter is missing there.
            ValueError: if a shape differs.
        """
        averages = self.named_averages(which)
        if model is None:
            targets = {name: self._tensor(name) for name in self._slots}
        else:
            slots = slots_of(unwrapped(model), self.buffers != "ignore", all_buffers=True)
            targets = {name: holder[key] for name, (holder, key) in slots.items()}
            if self.model is not None and self.buffers != "ignore":
                averages = self._buffers() | averages
        if missing := [name for name in averages if name not in targets]:
            raise KeyError(f"`model` has no {', '.join(missing[:5])}; of {len(averages)} tensors.")
        for name, average in averages.items():
            if targets[name].shape != average.shape:
                raise ValueError(
                    f"{name} has shape {tuple(targets[name].shape)} in `model`, "
                    f"{tuple(average.shape)} here."
                )
        with torch.no_grad():
            for name, average in averages.items():
                targets[name].copy_(average)

    def averaged_model(self, which: str | None = None) -> nn.Module:
        """Return a copy of the model with an average in the place of its weights."""
        if self.model is None:
            raise ValueError("made of parameters, not of a model: there is none to copy.")
        with self.applied(which):
            return copy.deepcopy(self.model)

    def named_averages(
        self, which: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return an average by the model's own names, tied ones under each; not copied.

        Args:
            which: name of the average, if there are several.
            dtype: convert to this; in float64 a compensated average is read in full.
        """
        k = self._name(which)
        found: dict[str, Tensor] = {}
        for group in self._groups:
            for number, name in enumerate(group.names):
                value = group.shadows[k][number]
                if dtype is not None and group.low is not None:
                    value = _as(value, torch.float64) + group.low[k][number]
                value = _as(value, dtype)
                found[name] = value
        # What is not averaged stands there as it is, and everything in the model's order.
        found = {
            name: found[name] if name in found else _as(self._tensor(name).detach(), dtype)
            for name in self._slots
        }
        return found | {name: found[first] for name, first in self._alias.items()}

    def weights_of_steps(
        self, which: str | None = None, upto: int | None = None
    ) -> Float64[np.ndarray, "steps"]:
        r"""Return what the weights of each step from 0 to ``upto`` are worth: :math:`w_{n,k}`.

        For updates at every ``update_every``-th step from ``start_step`` on, and parameters that
        were there from the beginning.
        """
        profile = list(self.profiles.values())[self._name(which)]
        upto = self.step if upto is None else upto
        rest = max(upto - self.start_step, 0)
        updates = range(self.update_every, rest + 1, self.update_every)
        weights = weights_of(profile, updates, rest, self.bias_correction)
        return np.concatenate([np.zeros(min(upto, self.start_step)), weights])

    # --- files ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on bit for bit; tensors are not copied."""
        groups = [
            {
                "names": group.names,
                "start": group.start,
                "clocks": [[clock.step, clock.product] for clock in group.clocks],
            }
            for group in self._groups
        ]
        tensors = {}
        for group in self._groups:
            for k, average in enumerate(self.profiles):
                for number, name in enumerate(group.names):
                    tensors[f"{average}/{name}"] = group.shadows[k][number]
                    if group.low is not None:
                        tensors[f"{average}/{name}/compensation"] = group.low[k][number]
        about = {
            "step": self.step,
            "last_update": self._last_update,
            "profiles": {name: repr(profile) for name, profile in self.profiles.items()},
            "options": self._options(),
            "groups": groups,
        }
        return {"about": about, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> list[str]:
        """Take up a state; everything is checked before anything changes.

        Args:
            state: of :meth:`state_dict`, on any device.
            strict: refuse other parameters and other profiles. ``False`` takes the averages and
                parameters that are in both; the other parameters begin anew.

        Returns:
            The names that were not found in ``state``.

        Raises:
            KeyError: for parameters or averages that only one side has.
            ValueError: for other profiles or options, or a shape that differs.
            TypeError: if these averages cannot hold the numbers of that dtype.
        """
        about, tensors = state["about"], state["tensors"]
        if strict:
            _require_same(
                "profiles", about["profiles"], {n: repr(p) for n, p in self.profiles.items()}
            )
            _require_same("options", about["options"], self._options())
        stored = [name for group in about["groups"] for name in group["names"]]
        missing = [name for name in self._chosen if name not in stored]
        missing = [name for name in missing if name in self._unfrozen()]
        unknown = [name for name in stored if name not in self._slots]
        if strict and (missing or unknown):
            raise KeyError(
                f"the state has no {', '.join(missing[:3]) or '-'}; the model has no "
                f"{', '.join(unknown[:3]) or '-'}: {len(missing)} and {len(unknown)} in all."
            )
        groups = []
        for each in about["groups"]:
            names = [name for name in each["names"] if name in self._slots]
            group = self._group(names, each["start"])
            for k, average in enumerate(self.profiles):
                if average not in about["profiles"]:
                    continue
                place = list(about["profiles"]).index(average)
                group.clocks[k].step, group.clocks[k].product = each["clocks"][place]
                for number, name in enumerate(names):
                    _load(f"{average}/{name}", tensors, group.shadows[k][number])
                    if group.low is not None:
                        low = f"{average}/{name}/compensation"
                        if low in tensors:
                            _load(low, tensors, group.low[k][number])
            if names:
                groups.append(group)
        self.step, self._last_update = about["step"], about["last_update"]
        self._groups = groups
        if missing:
            self._join(missing, max(self.step, self.start_step))
        return missing

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to a safetensors file, which is replaced as a whole."""
        state = self.state_dict()
        write_atomically(path, _packed(state["tensors"], {METADATA: json.dumps(state["about"])}))

    def load(self, path: str | os.PathLike[str], strict: bool = True) -> list[str]:
        """Take up what :meth:`save` has written; see :meth:`load_state_dict`."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or cut off: {error}.") from error
        if METADATA not in metadata:
            raise ValueError(f"{path} was not written by `save`: it has no {METADATA!r}.")
        return self.load_state_dict(
            {"about": json.loads(metadata[METADATA]), "tensors": tensors}, strict
        )

    def save_averages(self, path: str | os.PathLike[str], which: str | None = None) -> None:
        """Write an average as a safetensors file of the model's own names.

        ``model.load_state_dict(safetensors.torch.load_file(path))`` reads it without this package.
        """
        averages = self.named_averages(which)
        if self.model is not None:
            plain = {plain_name(key): value for key, value in self.model.state_dict().items()}
            averages = {name: averages.get(name, value) for name, value in plain.items()}
        write_atomically(path, _packed(averages))

    def check_sync(self, group: Any = None) -> None:
        """Raise ``RuntimeError`` if the averages of a process group are not the same bits."""
        digest = hashlib.sha256()
        for each in self.state_dict()["tensors"].values():
            each = each.to_local() if hasattr(each, "to_local") else each
            digest.update(each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        digests: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(digests, (self.step, digest.hexdigest()), group)
        if len(set(digests)) > 1:
            raise RuntimeError(f"the averages differ between ranks: {digests}")

    def __repr__(self) -> str:
        tensors = [each for group in self._groups for each in group.shadows[0]]
        count = sum(t.numel() for t in tensors)
        size = sum(t.nbytes for t in tensors) * (2 if self.compensated else 1) / 2**20
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        averages = ", ".join(f"{name}: {profile}" for name, profile in self.profiles.items())
        return (
            f"{type(self).__name__}({averages}; step {self.step}; {count:,} weights in {dtypes}, "
            f"{size:.1f} MiB per average)"
        )

    # --- inside -----------------------------------------------------------------------------------

    def _tensor(self, name: str) -> Tensor:
        holder, key = self._slots[name]
        return holder[key]

    def _name(self, which: str | None) -> int:
        names = list(self.profiles)
        if which is None and len(names) == 1:
            return 0
        if (wanted := str(which)) not in names or which is None:
            raise ValueError(f"`which` must be one of {', '.join(names)}; got {which!r}.")
        return names.index(wanted)

    def _unfrozen(self) -> list[str]:
        """Names of what changes: parameters with a gradient, and averaged buffers."""
        tensors = [(name, self._tensor(name)) for name in self._chosen]
        return [n for n, t in tensors if t.requires_grad or not isinstance(t, nn.Parameter)]

    def _join(self, names: list[str], start: int) -> None:
        if names:
            self._groups.append(self._group(names, start))

    def _group(self, names: list[str], start: int) -> Group:
        weights = [self._tensor(name).detach() for name in names]
        clocks = [Clock(p, self.bias_correction) for p in self.profiles.values()]
        shadows = [
            [copied(w, self._dtype_for(w), self.device) for w in weights] for _ in self.profiles
        ]
        low = (
            [[torch.zeros_like(s) for s in each] for each in shadows] if self.compensated else None
        )
        return Group(names, start, clocks, shadows, low)

    def _dtype_for(self, weight: Tensor) -> torch.dtype:
        if self.dtype is None:
            return torch.float32 if weight.dtype in _HALF else weight.dtype
        return self.dtype.to_complex() if weight.is_complex() else self.dtype

    def _weights_of(self, group: Group) -> list[Tensor]:
        weights = [self._tensor(name) for name in group.names]
        if self.device is not None:
            return [w.detach().to(self.device, non_blocking=True) for w in weights]
        return weights

    def _all_finite(self) -> bool:
        for name in self._chosen:
            if not bool(torch.isfinite(self._tensor(name)).all()):
                if self.on_nonfinite == "raise":
                    raise FloatingPointError(f"{name} is not finite at step {self.step}.")
                return False
        return True

    def _buffers(self) -> dict[str, Tensor]:
        if self.model is None or self.buffers == "ignore":
            return {}
        return {plain_name(name): b for name, b in self.model.named_buffers()}

    def _put(self, which: str | None, saved: list[tuple[Tensor, Tensor]]) -> None:
        averages = self.named_averages(which)
        in_groups = [name for group in self._groups for name in group.names]
        with torch.no_grad():
            for buffer in self._buffers().values():
                saved.append((buffer, buffer.clone()))
            for name in in_groups:
                weight = self._tensor(name)
                saved.append((weight, weight.detach().clone()))
            for name in in_groups:
                self._tensor(name).copy_(averages[name])

    def _options(self) -> dict[str, Any]:
        return {
            "bias_correction": self.bias_correction,
            "compensated": self.compensated,
            "start_step": self.start_step,
            "stochastic_rounding": self.stochastic_rounding,
            "seed": self.seed,
            "update_every": self.update_every,
        }


class StochasticWeightAveraging(ExponentialMovingAverage):
    """The plain mean of the weights after steps ``start``, ``start + every``, and so on.

    Args:
        model_or_params: as in :class:`ExponentialMovingAverage`.
        start: the first step whose weights count, at least 1.
        every: steps between two samples.
        options: the others of :class:`ExponentialMovingAverage`.

    Source:
        Izmailov et al. 2018, arXiv 1803.05407; Ruppert 1988; Polyak & Juditsky 1992.

    Example:
        >>> StochasticWeightAveraging([torch.ones(2)], start=2, every=2).weights_of_steps(upto=5)
        array([0. , 0. , 0.5, 0. , 0.5, 0. ])
    """

    def __init__(self, model_or_params: Any, start: int, every: int = 1, **options: Any):
        _at_least("start", start, 1)
        _at_least("every", every, 1)
        super().__init__(model_or_params, profile=Uniform(start - every, every), **options)


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def _restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in saved:
            tensor.copy_(value)


def _load(key: str, tensors: Mapping[str, Tensor], target: Tensor) -> None:
    if key not in tensors:
        raise KeyError(f"the state has no {key}.")
    value = tensors[key]
    if value.shape != target.shape:
        raise ValueError(
            f"{key} has shape {tuple(value.shape)} in the state, {tuple(target.shape)} here."
        )
    if torch.promote_types(value.dtype, target.dtype) != target.dtype:
        raise TypeError(f"{key} is {value.dtype} in the state, which {target.dtype} would round.")
    target.copy_(value)


def _packed(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    # Cloned, because safetensors refuses tied weights.
    plain = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    return save(plain, metadata)


def _rounding(
    dtype: torch.dtype | str, compensated: bool, stochastic: bool | None
) -> tuple[torch.dtype | None, bool]:
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be 'auto' or a real floating dtype; got {dtype!r}.")
    half = dtype in _HALF
    if half and compensated:
        raise ValueError("`compensated` is for float32 and float64; 16 bits round stochastically.")
    if stochastic and not half:
        raise ValueError(f"`stochastic_rounding` is for averages in 16 bits; `dtype` is {dtype}.")
    return (None if dtype == "auto" else dtype), half if stochastic is None else stochastic


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {known}; got {value!r}.")


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")


def _require_same(what: str, state: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if dict(state) != dict(here):
        raise ValueError(f"the state has other {what}: {dict(state)}; here are {dict(here)}.")
