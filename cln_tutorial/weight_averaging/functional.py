r"""The update itself, one line of algebra, and what computes it.

The reference is plain PyTorch, tensor by tensor. The other backends walk over a table of chunks,
one row for at most ``CHUNK`` weights, and read each weight once for all averages.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

BACKENDS = ("reference", "numba", "triton")
CHUNK = 2**13  # weights: with several shadows still in the second-level cache
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("numba", "triton")}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HALF = (torch.bfloat16, torch.float16)

Shares = Sequence[float | int] | Tensor


def ema_update_(
    shadows: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    one_minus_decay: float | int | Shares,
    *,
    compensation: Sequence[Tensor] | Sequence[Sequence[Tensor]] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
    backend: str = "auto",
) -> None:
    r"""Move one or several averages towards the weights, in place.

    .. math:: \Theta \leftarrow \Theta + (1 - \beta)(\theta - \Theta)

    All is computed in float32, or in float64 if weight or shadow is. A constant :math:`\theta`
    stays where it is bit for bit, and a share of 1 copies. With ``compensation`` the average is
    the sum of shadow and compensation, and what a float32 addition would round away is kept there.

    Args:
        shadows: one tensor per weight, of any floating dtype, with its shape; or a sequence of
            such sequences, one per average.
        weights: the tensors to average; floating or complex.
        one_minus_decay: :math:`1-\beta` in [0, 1], one number per average; or a tensor of
            float64, one entry per average, which "triton" reads on the device.
        compensation: like ``shadows``, zero at the beginning. Float32 or float64.
        rounding: "nearest", or "stochastic": up or down with the probability that makes it right
            on average, for shadows of bfloat16 and float16 (others are rounded to the nearest).
            The noise is a hash of (``seed``, ``step``, number of the tensor, number of the entry):
            equal on all processes, devices and backends, and without a generator.
        seed, step: of that noise.
        backend: "auto", "reference", "numba" or "triton".

    Raises:
        ValueError: for lists of other lengths, shapes that differ, shares outside of [0, 1].
        TypeError: for weights that are no floating numbers.

    Source:
        Article 6575, section 2; the compensation after Kahan 1965, with Knuth's two-sum.

    Example:
        >>> shadow, weight = torch.zeros(3), torch.ones(3)
        >>> ema_update_([shadow], [weight], 0.25)
        >>> shadow
        tensor([0.2500, 0.2500, 0.2500])
    """
    weights = list(weights)
    shadows = _by_average(shadows)
    compensation = None if compensation is None else _by_average(compensation)
    shares = _shares(one_minus_decay, len(shadows))
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"`rounding` must be 'nearest' or 'stochastic'; got {rounding!r}.")
    plan = Plan.of(shadows, weights, compensation, rounding == "stochastic", backend)
    plan.run(shares, seed, step)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that run here.

    Example:
        >>> "reference" in available_backends()
        True
    """
    return tuple(name for name in BACKENDS if missing(name) is None)


@dataclass(frozen=True, eq=False)
class Plan:
    """What to update, and the tables of the fast backends; good until a tensor changes its place.

    Attributes:
        weights, shadows, compensation: as in :func:`ema_update_`, complex ones seen as real.
        stochastic: how half types are rounded.
        alone: numbers of the tensors that the reference takes.
        tables: of each group of tensors that a fast backend takes in one call.
        places: the addresses for which the plan was made.
    """

    weights: list[Tensor]
    shadows: list[list[Tensor]]
    compensation: list[list[Tensor]] | None
    stochastic: bool
    alone: list[int]
    tables: "list[Table]"
    places: list[int]

    @classmethod
    def of(
        cls,
        shadows: list[list[Tensor]],
        weights: list[Tensor],
        compensation: list[list[Tensor]] | None,
        stochastic: bool,
        backend: str,
    ) -> "Plan":
        """Check everything, and sort the tensors by the backend that takes them."""
        _require_alike(shadows, weights, compensation)
        require_backend(backend)
        places = [t.data_ptr() for t in weights]
        weights = [_real(w) for w in weights]
        shadows = [[_real(s) for s in each] for each in shadows]
        if compensation is not None:
            compensation = [[_real(c) for c in each] for each in compensation]
        alone, groups = [], {}
        for number, weight in enumerate(weights):
            row = [each[number] for each in shadows]
            row += [] if compensation is None else [each[number] for each in compensation]
            chosen = _choose(backend, weight, row, stochastic)
            if chosen == "reference":
                alone.append(number)
            else:
                key = (chosen, weight.device, weight.dtype, row[0].dtype)
                groups.setdefault(key, []).append((number, weight, row))
        tables = [
            Table(*key, len(shadows), compensation is not None, _chunks(tensors))
            for key, tensors in groups.items()
        ]
        return cls(weights, shadows, compensation, stochastic, alone, tables, places)

    def run(self, shares: Shares, seed: int, step: int) -> None:
        """Update all averages, the k-th by the k-th share."""
        key = step_key(seed, step)
        with torch.no_grad():
            for table in self.tables:
                _implementation(table.backend).update(table, shares, key)
            for number in self.alone:
                for k, each in enumerate(self.shadows):
                    low = None if self.compensation is None else self.compensation[k][number]
                    noise = (key, number) if self.stochastic else None
                    reference(each[number], self.weights[number], float(shares[k]), low, noise)
        for each in (*self.shadows, *(self.compensation or ())) if self.tables else ():
            torch.autograd.graph.increment_version(each)


@dataclass(frozen=True, eq=False)
class Table:
    """The chunks of all tensors of one kind.

    Attributes:
        averages: K.
        rows: (chunks, 4 + K or 4 + 2 K) of int64: number of the tensor, number of the chunk's first
            entry in it, number of entries, address of the weights, of the K shadows, of the K
            compensations. Where "triton" runs it is copied to the device once.
    """

    backend: str
    device: torch.device
    weight_dtype: torch.dtype
    shadow_dtype: torch.dtype
    averages: int
    compensated: bool
    rows: np.ndarray

    @functools.cached_property
    def on_device(self) -> Tensor:
        return torch.from_numpy(self.rows).to(self.device)


def reference(
    shadow: Tensor,
    weight: Tensor,
    share: float,
    low: Tensor | None = None,
    noise: tuple[int, int] | None = None,
) -> None:
    """Update one tensor in plain operations."""
    if share == 0.0:  # not even if the weight is infinite
        return
    if share == 1.0 and (noise is None or shadow.dtype not in _HALF):
        shadow.copy_(weight)
        if low is not None:
            low.zero_()
        return
    if shadow.dtype in _HALF:
        if noise is None:  # the average is computed in float32, and then still rounded
            shadow.copy_(torch.lerp(shadow.float(), weight.float(), share))
        else:
            bits = hash_bits(shadow.numel(), *noise, shadow.device)
            # The entries are numbered as they lie in memory.
            bits = (
                bits.as_strided(shadow.shape, shadow.stride())
                if _is_dense(shadow)
                else bits.view(shadow.shape)
            )
            shadow.copy_(mix_stochastically(shadow, weight, share, bits))
        return
    weight = weight.to(torch.promote_types(shadow.dtype, weight.dtype))
    if low is None:
        if weight.dtype == shadow.dtype:
            shadow.lerp_(weight, share)
        else:  # float64 weights, float32 shadow
            shadow.copy_(torch.lerp(shadow.to(weight.dtype), weight, share))
        return
    weight = weight.to(shadow.dtype)
    if share < 0.5:
        high, step = shadow.clone(), low + share * ((weight - shadow) - low)
    else:
        high, step = weight, (1 - share) * ((shadow - weight) + low)
    total = high + step
    back = total - high
    low.copy_((high - (total - back)) + (step - back))
    shadow.copy_(total)


def mix_stochastically(shadow: Tensor, weight: Tensor, share: float, noise: Tensor) -> Tensor:
    """Return the point between in the half type of ``shadow``, right on average.

    The sum is rounded away from zero with the probability of the part that is cut off: ``noise``,
    uniform in [0, 2^30), is added below the last bit that stays, and carries into it that often. Of
    the part, 14 bits are what float32 itself would round away: at a decay of 0.9999 the step is so
    short that without them it would be 7 % too long.
    """
    dropped, scale, largest = _HALF_FORMATS[shadow.dtype]
    old, weight = shadow.float(), weight.float()
    share = torch.tensor(share, dtype=torch.float32)
    if share < 0.5:
        near, step = old, share * (weight - old)
    elif share < 1:
        near, step = weight, (1 - share) * (old - weight)
    else:
        near, step = weight, -torch.zeros_like(weight)  # -0 + -0 is -0
    total = near + step
    lost = step - (total - near)
    lost = torch.where(total.signbit(), -lost, lost)  # as the magnitude sees it
    # In units of the last place of float32, which below a power of two are half as large.
    bits = total.abs().view(torch.int32)
    exponent = (bits - lost.signbit().int()) & 0x7F800000
    exponent = exponent.clamp_min(64 << 23)  # below 2^-63 there is nothing to save
    units = (lost * ((307 - dropped << 23) - exponent).view(torch.float32)).int()
    bits = (total * scale).view(torch.int32)
    below = (bits & (1 << dropped) - 1) << 30 - dropped
    carry = below + noise.int() + units >> 30
    # No carry makes infinity of the largest number, or something else of infinity and NaN.
    carry = torch.where((bits & 0x7FFFFFFF) < largest << dropped, carry, 0)
    kept = (((bits & 0x7FFFFFFF) >> dropped) + carry).clamp_max(largest + 1)
    kept = torch.where(total.isfinite(), kept, largest + 1)
    kept = torch.where(total.isnan(), largest + 2, kept)
    return torch.where(total.signbit(), kept | 0x8000, kept).to(torch.int16).view(shadow.dtype)


# Bits of float32 that the type has not, the factor that gives both the same smallest exponent, and
# the bits of the largest number.
_HALF_FORMATS = {torch.bfloat16: (16, 1.0, 0x7F7F), torch.float16: (13, 2.0**-112, 0x7BFF)}


def hash_bits(count: int, key: int, number: int, device: torch.device | str) -> Tensor:
    """Return uniform integers in [0, 2^30): a hash of key, tensor and entry."""
    index = torch.arange(count, device=device)  # int64, whose products keep their low half
    low, high = tensor_key(key, number)
    return _scramble((index & _MASK) ^ low, high ^ (index >> 32)) >> 2


def tensor_key(key: int, number: int) -> tuple[int, int]:
    """Return two words of 32 bits: of one tensor in one step."""
    low = _scramble(number ^ (key & _MASK))
    return low, _scramble(low ^ (key >> 32))


def step_key(seed: int, step: int) -> int:
    """Return 64 bits of a seed and a step."""
    low = _scramble(_scramble(seed & _MASK) ^ (step & _MASK))
    high = _scramble(low ^ _scramble(seed >> 32 & _MASK) ^ (step >> 32 & _MASK))
    return high << 32 | low


def _scramble(x, second=0):
    # "lowbias32" of Chris Wellons' hash-prospector, with a second word between its two rounds.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK ^ second
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


_MASK = 2**32 - 1


# --- the choice -----------------------------------------------------------------------------------


def missing(backend: str) -> str | None:
    """Say why this machine cannot run a backend, or None if it can."""
    if not _INSTALLED.get(backend, True):
        extra = {"numba": "fast", "triton": "gpu"}[backend]
        return f"needs {backend}, the extra `{extra}`: pip install 'cln-tutorial[{extra}]'."
    if backend == "triton" and not (torch.cuda.is_available() or _INTERPRETED):
        return "needs a GPU, or the environment variable TRITON_INTERPRET=1."
    return None


def require_backend(backend: str) -> None:
    """Refuse a name that is no backend, or one that cannot run here."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"`backend` must be 'auto' or one of {BACKENDS}; got {backend!r}.")
    if backend != "auto" and (why := missing(backend)):
        raise ValueError(f"`backend` {backend!r} {why}")


@functools.cache
def _imports(backend: str) -> bool:
    """Whether what is installed also fits together."""
    try:
        return bool(importlib.import_module(backend))
    except ImportError:
        return False


def _choose(backend: str, weight: Tensor, row: list[Tensor], stochastic: bool) -> str:
    """Return what takes a tensor: the backend asked for, if it can, else the reference."""
    if weight.numel() == 0:
        return "reference"
    asked = backend
    if backend == "auto":
        backend = "triton" if weight.is_cuda else "numba" if weight.device.type == "cpu" else ""
        if not backend or missing(backend) or not _imports(backend):
            return "reference"
    if backend == "reference":
        return backend
    types = {"numba": ("cpu",), "triton": ("cuda", "cpu") if _INTERPRETED else ("cuda",)}
    if weight.device.type not in types[backend]:
        raise ValueError(f"`backend` {asked!r} runs on {types[backend][0]}; got {weight.device}.")
    return (
        backend
        if _is_flat(weight, row) and _takes(backend, weight, row, stochastic)
        else "reference"
    )


def _takes(backend: str, weight: Tensor, row: list[Tensor], stochastic: bool) -> bool:
    full, dtype = (torch.float32, torch.float64), row[0].dtype
    if any(t.dtype != dtype or t.device != weight.device for t in row):
        return False
    if weight.dtype == torch.float64 and dtype != torch.float64:
        return False
    if backend == "numba":  # which knows no float16
        known = weight.dtype in (*full, torch.bfloat16)
        return known and (dtype in full or (dtype == torch.bfloat16 and stochastic))
    return weight.dtype in (*full, *_HALF) and (dtype in full or stochastic)


def _is_flat(weight: Tensor, row: list[Tensor]) -> bool:
    """Whether all have their entries in one order, and no gaps between them."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (weight, *row))
    return plain and _is_dense(weight) and all(t.stride() == weight.stride() for t in row)


def _is_dense(tensor: Tensor) -> bool:
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _implementation(backend: str) -> ModuleType:
    """The module of a backend, imported when it is first used.

    It has ``update(table, shares, key)``.
    """
    if backend == "triton":
        import cln_tutorial.kernels.weight_averaging as module
    else:
        import cln_tutorial.weight_averaging.numba_loops as module
    return module


def _chunks(tensors: list[tuple[int, Tensor, list[Tensor]]]) -> np.ndarray:
    parts = []
    for number, weight, row in tensors:
        first = np.arange(0, weight.numel(), CHUNK)
        columns = [np.full_like(first, number), first, np.minimum(CHUNK, weight.numel() - first)]
        columns += [t.data_ptr() + first * t.element_size() for t in (weight, *row)]
        parts.append(np.stack(columns, axis=1))
    return np.concatenate(parts)


# --- the checks -----------------------------------------------------------------------------------


def _by_average(tensors: Sequence[Tensor] | Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    listed = list(tensors)
    if not listed or isinstance(listed[0], Tensor):
        return [listed]
    return [list(each) for each in listed]


def _shares(given: float | int | Shares, averages: int) -> Shares:
    if isinstance(given, Tensor):
        if given.shape != (averages,) or given.dtype != torch.float64:
            raise ValueError(
                f"`one_minus_decay` as a tensor must be float64 of shape ({averages},), one entry "
                f"per average; got {given.dtype} of shape {tuple(given.shape)}."
            )
        return given
    shares = [given] if isinstance(given, int | float) else list(given)
    if len(shares) != averages or not all(0 <= share <= 1 for share in shares):
        raise ValueError(
            f"`one_minus_decay` must hold a number in [0, 1] for each of {averages} averages; "
            f"got {given!r}."
        )
    return [float(share) for share in shares]


def _require_alike(
    shadows: list[list[Tensor]], weights: list[Tensor], compensation: list[list[Tensor]] | None
) -> None:
    for name, lists in {"shadows": shadows, "compensation": compensation or []}.items():
        for each in lists:
            if len(each) != len(weights):
                raise ValueError(
                    f"`{name}` must have one tensor per weight, {len(weights)}; got {len(each)}."
                )
            for number, (tensor, weight) in enumerate(zip(each, weights, strict=True)):
                if tensor.shape != weight.shape or tensor.is_complex() != weight.is_complex():
                    raise ValueError(
                        f"`{name}` must be like the weights: number {number} is {tensor.dtype} of "
                        f"shape {tuple(tensor.shape)}, the weight {weight.dtype} of shape "
                        f"{tuple(weight.shape)}."
                    )
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    raise TypeError(f"`{name}` number {number} is {tensor.dtype}, not floating.")
    if compensation is not None:
        if len(compensation) != len(shadows):
            raise ValueError(
                f"`compensation` must be given for each of {len(shadows)} averages; "
                f"got {len(compensation)}."
            )
        for each, low in zip(shadows, compensation, strict=True):
            for number, (s, c) in enumerate(zip(each, low, strict=True)):
                if s.dtype != c.dtype or s.dtype in _HALF:
                    raise TypeError(
                        f"`compensation` must have the dtype of its shadow, float32 or float64: "
                        f"number {number} is {c.dtype} for {s.dtype}."
                    )


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
