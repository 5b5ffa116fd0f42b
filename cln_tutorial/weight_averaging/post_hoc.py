r"""The width of the average, chosen after training: snapshots of two power-function averages.

.. math:: \hat\theta_\gamma(t) = \int p_{t,\gamma}(\tau)\, \theta(\tau)\, d\tau, \qquad
    p_{t,\gamma}(\tau) = \frac{(\gamma+1)\,\tau^\gamma}{t^{\gamma+1}} \text{ on } [0, t]

What is stored belongs to the profiles :math:`p_i`. Any other profile is nearly a sum of them, and
the same sum of the snapshots is its average. With weights that stay as they are from one update to
the next, the integral is the average of :class:`PowerFunction`, for any spacing of the updates.

Source: Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C. That the coefficients are
made to sum to 1 is ours.
"""

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cln_tutorial._files import write_atomically
from cln_tutorial.weight_averaging.averages import ExponentialMovingAverage
from cln_tutorial.weight_averaging.groups import Group
from cln_tutorial.weight_averaging.naming import plain_name
from cln_tutorial.weight_averaging.profiles import PowerFunction, gamma_to_sigma_rel

METADATA = "cln_tutorial.weight_averaging.snapshot"
FAR_OFF = 0.1  # the relative profile error from which on a reconstruction says so

Numbers = float | int | Sequence[float | int] | np.ndarray
State = Mapping[str, Any]
Snapshots = str | os.PathLike[str] | Mapping[int, State] | Sequence[str | os.PathLike[str]]


class PowerFunctionAverage(ExponentialMovingAverage):
    r"""Power-function averages whose snapshots become an average of any other width.

    The averages are named after their widths: "0.05" and "0.1". Time counts from ``start_step``:
    the profiles begin there. ``bias_correction`` changes nothing, since the first update copies.

    Args:
        model_or_params: as in :class:`ExponentialMovingAverage`.
        sigma_rel: one or several relative widths, in (0, 0.2887].
        options: the others of :class:`ExponentialMovingAverage`, such as ``update_every``.

    Raises:
        ValueError: for a width out of its domain or twice, no width, or a decay besides.

    Source:
        Karras et al. 2024, arXiv 2312.02696, section 3.2.

    Example:
        >>> weight, snapshots = torch.zeros(1), {}
        >>> average = PowerFunctionAverage([weight])
        >>> for step in range(1, 1001):
        ...     _ = weight.fill_(step / 1000)
        ...     average.update()
        ...     if step % 50 == 0:
        ...         average.snapshot(snapshots)
        >>> made = reconstruct(snapshots, sigma_rel=0.075)
        >>> abs(made.weights["0"].item() - (made.gamma + 1) / (made.gamma + 2)) < 1e-3
        True
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        sigma_rel: float | int | Sequence[float | int] = (0.05, 0.10),
        **options: Any,
    ):
        widths = list(sigma_rel) if isinstance(sigma_rel, Sequence) else [sigma_rel]
        if taken := sorted({"decay", "half_life", "profile"} & options.keys()):
            raise ValueError(f"`{taken[0]}` cannot be set: `sigma_rel` is the profile here.")
        profiles = {f"{width:g}": PowerFunction(sigma_rel=width) for width in widths}
        if len(profiles) < max(len(widths), 1):
            raise ValueError(f"`sigma_rel` must hold widths that differ; got {sigma_rel!r}.")
        super().__init__(model_or_params, profile=profiles, **options)

    def snapshot(
        self,
        destination: str | os.PathLike[str] | MutableMapping[int, State],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Keep the averages as they are now, for :func:`reconstruct`.

        Args:
            destination: a folder, which gets one safetensors file that is there as a whole or not
                at all; or a dict, which gets one entry. Both go by the step, and a snapshot of the
                same step is replaced.
            dtype: to store them in. What it rounds comes back up to :math:`\\sum|x_i|` times as
                large. The model's buffers and its frozen parameters are stored as they are.

        Raises:
            RuntimeError: before the first update, and until ``start_step``: there is no profile.
            ValueError: if ``dtype`` is not a real floating one.
        """
        _require_floating(dtype)
        state = self._snapshot(dtype)
        if isinstance(destination, MutableMapping):
            destination[self.step] = state
            return
        folder = Path(destination)
        folder.mkdir(parents=True, exist_ok=True)
        content = save(state["tensors"], {METADATA: json.dumps(state["about"])})
        write_atomically(folder / f"snapshot-{self.step:09d}.safetensors", content)

    def _snapshot(self, dtype: torch.dtype) -> State:
        groups = [group for group in self._groups if group.clocks[0].step]
        if not groups:
            raise RuntimeError(
                f"nothing has been averaged yet at step {self.step} (`start_step` is "
                f"{self.start_step}): the first snapshot comes after the first update."
            )
        plain = self._plain()
        order = dict.fromkeys(plain or self._slots | self._alias)
        alias = {name: first for name, first in self._alias.items() if name in order}
        tensors, about = {}, []
        for group in groups:
            kept = {name: n for n, name in enumerate(group.names) if name in order}
            for k, average in enumerate(self.profiles):
                for name, n in kept.items():
                    tensors[f"{average}/{name}"] = _stored(_exact(group, k, n), dtype)
            time = group.clocks[0].step
            about.append({"start": group.start, "time": time, "names": list(kept)})
        averaged = {name for each in about for name in each["names"]}
        for name in order:
            if name not in averaged and name not in alias:
                value = plain[name] if name in plain else self._tensor(name)
                tensors[f"model/{name}"] = _stored(value)
        return {
            "about": {
                "step": self.step,
                "gammas": {name: float(p.gamma) for name, p in self.profiles.items()},
                "groups": about,
                "alias": alias,
                "order": list(order),
            },
            "tensors": tensors,
        }

    def _plain(self) -> dict[str, Tensor]:
        """What the model itself saves, by plain names."""
        if not isinstance(self.model, nn.Module):
            return {}
        state = self.model.state_dict().items()
        return {plain_name(name): value for name, value in state if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction:
    """An average of a width that was not stored.

    Attributes:
        weights: by the model's own names, for ``model.load_state_dict``.
        coefficients: what each snapshot's averages are worth; of parameters that were averaged from
            the beginning.
        steps: of the snapshots that were used, the rows of ``coefficients``.
        profile_error: see :func:`profile_error`; the largest, if parameters joined later.
        condition_number: of the system that was solved; the largest.
        step: at which the average ends.
        gamma: its exponent.
    """

    weights: dict[str, Tensor]
    coefficients: Float64[np.ndarray, "snapshots averages"]
    steps: tuple[int, ...]
    profile_error: float
    condition_number: float
    step: int
    gamma: float

    @property
    def sigma_rel(self) -> float:
        """Its relative width."""
        return gamma_to_sigma_rel(self.gamma)

    def __repr__(self) -> str:
        return (
            f"Reconstruction(sigma_rel={self.sigma_rel:.4f}, step={self.step}: {len(self.weights)} "
            f"tensors from {len(self.steps)} snapshots, profile error {self.profile_error:.1e}, "
            f"condition number {self.condition_number:.1e})"
        )


def reconstruct(
    snapshots: Snapshots,
    sigma_rel: float | int | None = None,
    gamma: float | int | None = None,
    step: int | None = None,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Reconstruction:
    r"""Make the average of another width out of snapshots: :math:`\sum_i x_i \hat\theta_i`.

    The coefficients are solved for, and the sum is taken, in float64; one tensor of one snapshot
    is in memory at a time. Buffers and frozen parameters are those of the last snapshot.

    Args:
        snapshots: the folder or the dict that
            :meth:`~cln_tutorial.weight_averaging.PowerFunctionAverage.snapshot` filled, or files.
        sigma_rel: the relative width, in (0, 0.2887]; or
        gamma: the exponent, at least 0. It works best near and between the stored ones.
        step: where the average ends: the step of a snapshot; by default the last one.
        normalize: let the coefficients sum to 1. ``False`` is the paper's least squares.
        dtype: of the result.

    Returns:
        The weights, with the profile error, the condition number and the coefficients.

    Raises:
        ValueError: for a width out of its domain, a step without a snapshot, snapshots of different
            averages, names or shapes, or a file that is none.
        FileNotFoundError: if there is no snapshot.

    Source:
        Karras et al. 2024, arXiv 2312.02696, section 3.3 and algorithm 3.

    Example:
        >>> snapshots = {}
        >>> average = PowerFunctionAverage([torch.ones(2)])
        >>> for _ in range(10):
        ...     average.update()
        ...     average.snapshot(snapshots)
        >>> reconstruct(snapshots, sigma_rel=0.08).weights
        {'0': tensor([1., 1.])}
    """
    wanted = float(PowerFunction(sigma_rel=sigma_rel, gamma=gamma).gamma)
    _require_floating(dtype)
    with contextlib.ExitStack() as files:
        history = _until(step, _read(snapshots, files))
        last = history[-1]
        _require_same_model(history)
        plans = {times: _plan(times, last.gammas, wanted, normalize) for times in _times(history)}
        weights = {}
        for name in last.about["order"]:
            name = last.about["alias"].get(name, name)
            if name not in weights:
                times = _times_of(name, history)
                weights[name] = (
                    _sum(name, history, plans[times].coefficients, dtype)
                    if times
                    else last.read(f"model/{name}").clone()  # a view of the file otherwise
                )
        alias = last.about["alias"]
        weights = {name: weights[alias.get(name, name)] for name in last.about["order"]}
    first = plans[max(plans)]  # the longest time first: from the beginning
    error = max(plan.error for plan in plans.values())
    if error > FAR_OFF:
        warnings.warn(
            f"the profile of sigma_rel={gamma_to_sigma_rel(wanted):.4f} is far from what the "
            f"{len(history)} snapshots can make: a relative error of {error:.2f}.",
            stacklevel=2,
        )
    return Reconstruction(
        weights=weights,
        coefficients=first.coefficients,
        steps=tuple(each.about["step"] for each in history),
        profile_error=error,
        condition_number=max(plan.condition for plan in plans.values()),
        step=last.about["step"],
        gamma=wanted,
    )


def profile_dot(
    t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers
) -> Float64[np.ndarray, "..."]:
    r"""Return :math:`\langle p_a, p_b\rangle = \int p_a p_b\,d\tau` of two power-function profiles.

    .. math:: \frac{(\gamma_a+1)(\gamma_b+1)}{(\gamma_a+\gamma_b+1)\max(t_a,t_b)}
        \left(\frac{\min(t_a,t_b)}{\max(t_a,t_b)}\right)^{\gamma\text{ of the later one}}

    Args:
        t_a, t_b: where the profiles end, in steps, more than 0.
        gamma_a, gamma_b: their exponents, at least 0.

    Returns:
        Per step, in float64; arguments broadcast.

    Source:
        Karras et al. 2024, arXiv 2312.02696, algorithm 3.

    Example:
        >>> float(profile_dot(2, 0, 4, 0))  # two means: a half times a quarter, over two steps
        0.25
    """
    t_a, t_b = _numbers("t_a", t_a), _numbers("t_b", t_b)
    gamma_a, gamma_b = _exponents("gamma_a", gamma_a), _exponents("gamma_b", gamma_b)
    longer, power = np.maximum(t_a, t_b), np.where(t_a < t_b, gamma_b, gamma_a)
    ratio = (np.minimum(t_a, t_b) / longer) ** power
    return np.asarray((gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * longer))


def solve_coefficients(
    t: Numbers, gamma: Numbers, t_r: float | int, gamma_r: float | int, normalize: bool = True
) -> tuple[Float64[np.ndarray, "profiles"], float]:
    r"""Return the sum of profiles that comes closest to another, and the condition number.

    .. math:: \begin{pmatrix} A & \mathbf 1 \\ \mathbf 1^\top & 0 \end{pmatrix}
        \begin{pmatrix} x \\ \lambda \end{pmatrix} = \begin{pmatrix} b \\ 1 \end{pmatrix},
        \qquad A_{ij} = \langle p_i, p_j\rangle, \quad b_i = \langle p_i, p_r\rangle

    Args:
        t, gamma: ends and exponents of the profiles that are there, ``(profiles,)``.
        t_r, gamma_r: of the wanted one.
        normalize: with the last row; without, the paper's :math:`Ax = b`, which does not sum to 1.

    Returns:
        The coefficients, and the condition number of :math:`A` in the 2-norm.

    Raises:
        ValueError: if a profile is there twice, or if the lengths differ.

    Example:
        >>> x, condition = solve_coefficients([1, 2, 2], [3, 3, 9], t_r=2, gamma_r=9)
        >>> x.round(9)
        array([0., 0., 1.])
    """
    t, gamma = _profiles(t, gamma)
    t_r, gamma_r = float(_numbers("t_r", t_r)), float(_exponents("gamma_r", gamma_r))
    if len(set(zip(t.tolist(), gamma.tolist(), strict=True))) < t.size:
        raise ValueError("`t` and `gamma` have a profile twice: no unique coefficients.")
    # In lengths of the wanted profile, so that the row of ones is of the size of the others.
    A = t_r * profile_dot(t[:, None], gamma[:, None], t, gamma)
    b = t_r * profile_dot(t, gamma, t_r, gamma_r)
    condition = float(np.linalg.cond(A))
    if normalize:
        A = np.block([[A, np.ones((t.size, 1))], [np.ones((1, t.size)), np.zeros((1, 1))]])
        b = np.append(b, 1.0)
    return np.linalg.solve(A, b)[: t.size], condition


def profile_error(
    coefficients: Numbers, t: Numbers, gamma: Numbers, t_r: float | int, gamma_r: float | int
) -> float:
    r"""Return how far a sum of profiles is from the wanted one, relative to the latter's norm.

    .. math:: \|\textstyle\sum_i x_i p_i - p_r\| \,/\, \|p_r\|
        = \sqrt{(x^\top A x - 2 b^\top x + c)/c}, \qquad c = \langle p_r, p_r\rangle

    The terms under the root cancel: errors below :math:`10^{-8}` times the coefficients' size are
    rounding, and come out as anything from 0 to there.

    Args:
        coefficients: of :func:`solve_coefficients`.
        t, gamma, t_r, gamma_r: as there.

    Example:
        >>> round(profile_error([1.0], [2], [0], t_r=4, gamma_r=0), 3)  # half of it is missing
        1.0
    """
    x, (t, gamma) = np.asarray(coefficients, dtype=np.float64), _profiles(t, gamma)
    if x.shape != t.shape:
        raise ValueError(f"`coefficients` must be one per profile: {t.size}; got shape {x.shape}.")
    A, b = profile_dot(t[:, None], gamma[:, None], t, gamma), profile_dot(t, gamma, t_r, gamma_r)
    c = float(profile_dot(t_r, gamma_r, t_r, gamma_r))
    return float(np.sqrt(max(x @ A @ x - 2 * b @ x + c, 0.0) / c))


# --- inside ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Snapshot:
    """One snapshot, of which nothing but the description is in memory."""

    label: str
    about: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    clocks: Mapping[str, tuple[int, int]]  # name: (start, time)

    @property
    def gammas(self) -> dict[str, float]:
        return self.about["gammas"]


@dataclass(frozen=True)
class _Plan:
    coefficients: Float64[np.ndarray, "snapshots averages"]
    error: float
    condition: float


def _read(snapshots: Snapshots, files: contextlib.ExitStack) -> list[_Snapshot]:
    """All snapshots in the order of their steps; files stay open, nothing is read."""
    if isinstance(snapshots, Mapping):
        found = [_of_state(f"snapshot {key}", state) for key, state in snapshots.items()]
    else:
        found = [_of_file(path, files) for path in _paths(snapshots)]
    if not found:
        raise FileNotFoundError(f"`snapshots` has no snapshot: {snapshots!r}.")
    found.sort(key=lambda each: each.about["step"])
    for before, after in itertools.pairwise(found):
        if before.about["step"] == after.about["step"]:
            raise ValueError(f"{before.label} and {after.label} are of the same step.")
    return found


def _paths(snapshots: Any) -> list[Path]:
    if not isinstance(snapshots, str | os.PathLike):
        return [Path(path) for path in snapshots]
    folder = Path(snapshots)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`snapshots` must be a folder, a list of files or a dict; there is no folder {folder}."
        )
    return sorted(folder.glob("snapshot-*.safetensors"))


def _of_file(path: Path, files: contextlib.ExitStack) -> _Snapshot:
    if not path.is_file():
        raise FileNotFoundError(f"`snapshots`: there is no file {path}.")
    try:
        file = files.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or cut off: {error}.") from error
    metadata = file.metadata() or {}
    if METADATA not in metadata:
        raise ValueError(f"{path} was not written by `snapshot`: it has no {METADATA!r}.")
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
    about = json.loads(metadata[METADATA])
    return _Snapshot(path.name, about, shapes, file.get_tensor, _clocks(about))


def _of_state(label: str, state: Any) -> _Snapshot:
    if not isinstance(state, Mapping) or not {"about", "tensors"} <= state.keys():
        raise ValueError(f"{label} was not made by `snapshot`: it has no 'about' and 'tensors'.")
    about, tensors = state["about"], state["tensors"]
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return _Snapshot(label, about, shapes, tensors.__getitem__, _clocks(about))


def _clocks(about: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    groups = about["groups"]
    return {name: (each["start"], each["time"]) for each in groups for name in each["names"]}


def _until(step: int | None, history: list[_Snapshot]) -> list[_Snapshot]:
    steps = [each.about["step"] for each in history]
    if step is None or step == steps[-1]:
        return history
    if step not in steps:
        # A profile ends in a jump, which only snapshots of the same step have.
        near = sorted(sorted(steps, key=lambda each: abs(each - step))[:3])
        raise ValueError(
            f"`step` must be that of a snapshot, since without one the end of the profile cannot "
            f"be made; got {step}, and the nearest are {', '.join(map(str, near))}."
        )
    return history[: steps.index(step) + 1]


def _require_same_model(history: list[_Snapshot]) -> None:
    last = history[-1]
    for each in history[:-1]:
        if each.gammas != last.gammas:
            raise ValueError(
                f"{each.label} has the averages {each.gammas}, {last.label} has {last.gammas}."
            )
        here, there = set(each.about["order"]), set(last.about["order"])
        # Parameters may have been added since.
        new = {n for n, (start, _) in last.clocks.items() if start >= each.about["step"]}
        new |= {name for name, first in last.about["alias"].items() if first in new}
        if odd := sorted((here - there) | (there - here - new)):
            raise ValueError(
                f"{each.label} and {last.label} are of different models: {', '.join(odd[:3])}, "
                f"{len(odd)} in all, are in one of them only."
            )
        for name in last.clocks.keys() & each.clocks.keys():
            for average in last.gammas:
                key = f"{average}/{name}"
                if each.shapes.get(key) != last.shapes.get(key):
                    raise ValueError(
                        f"{name} has shape {each.shapes.get(key)} in {each.label}, "
                        f"{last.shapes.get(key)} in {last.label}."
                    )


def _times_of(name: str, history: list[_Snapshot]) -> tuple[int, ...]:
    """When the average of a parameter was stored, since its own start; 0 for not at all."""
    if name not in history[-1].clocks:
        return ()
    start, _ = history[-1].clocks[name]
    clocks = [each.clocks.get(name, (start, 0)) for each in history]
    return tuple(time if begin == start else 0 for begin, time in clocks)


def _times(history: list[_Snapshot]) -> set[tuple[int, ...]]:
    return {_times_of(name, history) for name in history[-1].clocks}


def _plan(
    times: tuple[int, ...], gammas: dict[str, float], gamma_r: float, normalize: bool
) -> _Plan:
    rows = {time: row for row, time in enumerate(times) if time}  # no update between: the later one
    t = np.repeat(np.array(list(rows), float), len(gammas))
    gamma = np.tile(list(gammas.values()), len(rows))
    x, condition = solve_coefficients(t, gamma, times[-1], gamma_r, normalize)
    coefficients = np.zeros((len(times), len(gammas)))
    coefficients[list(rows.values())] = x.reshape(len(rows), len(gammas))
    return _Plan(coefficients, profile_error(x, t, gamma, times[-1], gamma_r), condition)


def _sum(
    name: str,
    history: list[_Snapshot],
    coefficients: Float64[np.ndarray, "snapshots averages"],
    dtype: torch.dtype,
) -> Tensor:
    total = None
    for snapshot, row in zip(history, coefficients, strict=True):
        for average, x in zip(snapshot.gammas, row.tolist(), strict=True):
            if x == 0.0:
                continue
            value = snapshot.read(f"{average}/{name}")
            wide = torch.complex128 if value.is_complex() else torch.float64
            if total is None:
                total = torch.zeros_like(value, dtype=wide)
            total.add_(value, alpha=x)
            del value  # before the next one is read
    return _stored(total, dtype)


def _exact(group: Group, k: int, n: int) -> Tensor:
    """An average with what compensation keeps beside it."""
    value = group.shadows[k][n]
    if group.low is None:
        return value
    return value.to(torch.promote_types(value.dtype, torch.float64)) + group.low[k][n]


def _stored(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if dtype is not None and value.is_complex():
        dtype = dtype.to_complex()
    value = value.detach().to("cpu", dtype or value.dtype)
    return value.clone(memory_format=torch.contiguous_format)


def _require_floating(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a real floating dtype; got {dtype}.")


def _profiles(t: Any, gamma: Any) -> tuple[np.ndarray, np.ndarray]:
    t, gamma = _numbers("t", t), _exponents("gamma", gamma)
    if t.ndim != 1 or t.shape != gamma.shape or not t.size:
        raise ValueError(
            f"`t` and `gamma` must be two lists of the same length; got the shapes {t.shape} and "
            f"{gamma.shape}."
        )
    return t, gamma


def _numbers(name: str, value: Any) -> Float64[np.ndarray, "..."]:
    value = np.asarray(value, dtype=np.float64)
    if not bool((np.isfinite(value) & (value > 0)).all()):
        raise ValueError(f"`{name}` must be finite and more than 0; got {value}.")
    return value


def _exponents(name: str, value: Any) -> Float64[np.ndarray, "..."]:
    value = np.asarray(value, dtype=np.float64)
    if not bool((np.isfinite(value) & (value >= 0)).all()):
        raise ValueError(f"`{name}` must be finite and at least 0; got {value}.")
    return value
