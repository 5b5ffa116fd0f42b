"""One family of operations under all norms, and the choice of what computes it.

The reference is plain operations of PyTorch. The other backends are one pair of custom operators,
``cln_tutorial::conditional_norm_fwd`` and ``_bwd``, which compiler and export take as they are.
"""

import functools
import importlib.util
import math
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("reference", "native", "numba", "triton")
# Below these numbers of elements a custom operator costs more than it saves ("native": elements
# per example, because it is called once for each). Measured by benchmarks/conditional_norm.py;
# the last one is not measured yet.
FEWEST = {"native": 3 * 2**15, "numba": 2**15, "triton": 2**18}
WIDEST_TRITON = 2**13  # of 2^14 channels the backward kernel does not hold a row in registers

_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("numba", "triton")}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BY_DEVICE = {"cuda": ("triton",), "cpu": ("numba", "native")}  # the best first
_PLAIN = (Tensor, torch.nn.Parameter)  # other classes, as those of a sharded tensor, see operations
_FULL = (torch.float32, torch.float64)
_TRITON = (torch.float32, torch.bfloat16, torch.float16)


class Kind(NamedTuple):
    """Which member of the family: epsilon, RMS or layer norm, gamma around zero or around one."""

    eps: float
    rms: bool
    plus_one: bool


def norm(x: Tensor, gamma: Tensor, beta: Tensor | None, kind: Kind, backend: str) -> Tensor:
    """Normalise ``x``, multiply by ``gamma`` (plus one), add ``beta``; all are checked before."""
    chosen = choose(backend, x, kind, gamma, beta)
    if chosen == "reference":
        return reference(x, gamma, beta, kind)
    gamma, beta = _one_form(x, gamma, beta)
    return _apply(x, gamma, beta, None, None, *kind, chosen)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """Return ``x + gate * h``, rounded once."""
    wide = wide_dtype(x)
    return torch.addcmul(x.to(wide), over_positions(gate, x, wide), h.to(wide)).to(x.dtype)


def gated_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    kind: Kind,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return ``x + gate * h`` and its norm; in one kernel where there is a GPU."""
    if choose(backend, x, kind, gamma, beta, gate) != "triton":
        x = gated_residual(x, h, gate)
        return x, norm(x, gamma, beta, kind, backend)
    gamma, beta, gate = _one_form(x, gamma, beta, gate)
    return _apply(x, gamma, beta, h, gate, *kind, "triton")[::-1]


def reference(x: Tensor, gamma: Tensor, beta: Tensor | None, kind: Kind) -> Tensor:
    """The family in plain operations, which every transform of PyTorch can see into."""
    dtype, wide = x.dtype, wide_dtype(x)
    if dtype != wide:
        x = x.to(wide)
    if kind.rms:
        normalised = torch.rms_norm(x, x.shape[-1:], None, kind.eps)
    else:
        normalised = torch.layer_norm(x, x.shape[-1:], None, None, kind.eps)
    gamma = over_positions(gamma, x, wide)
    if kind.plus_one:  # in bfloat16 1 + s would be 1 for -0.00195 <= s <= 0.0039
        gamma = gamma + 1
    if beta is None:
        y = normalised * gamma
    else:
        # addcmul rounds as the fused affine of F.layer_norm; a product and a sum apart do not.
        y = torch.addcmul(over_positions(beta, x, wide), normalised, gamma)
    return y if dtype == wide else y.to(dtype)


def reference_backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    gamma: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    kind: Kind,
    beta_dtype: torch.dtype | None,
) -> list[Tensor]:
    r"""The gradients in plain operations: what differentiates the fused ones a second time.

    .. math:: dx = \rho\,(w - \bar w - \hat x\,\overline{w \hat x}), \quad w = \gamma_b \odot dy,
        \quad d\gamma_b = \sum_t dy \odot \hat x, \quad d\beta_b = \sum_t dy

    with :math:`\rho = 1/\sqrt{\sigma^2 + \epsilon}`; without :math:`\bar w` for an RMS norm.
    """
    wide, groups = wide_dtype(x), (len(gamma), -1, x.shape[-1])
    rows, dy = x.to(wide).reshape(groups), dy.to(wide).reshape(groups)
    if not kind.rms:
        rows = rows - rows.mean(-1, keepdim=True)
    rstd = (rows.square().mean(-1, keepdim=True) + kind.eps).rsqrt()
    normalised = rows * rstd
    w = (gamma.to(wide) + 1 if kind.plus_one else gamma.to(wide))[:, None] * dy
    dx = w - normalised * (w * normalised).mean(-1, keepdim=True)
    dx = rstd * (dx if kind.rms else dx - w.mean(-1, keepdim=True))
    grads = [(dy * normalised).sum(1).to(gamma.dtype)]
    grads += [] if beta_dtype is None else [dy.sum(1).to(beta_dtype)]
    if h is not None:
        dx = dx + dx_new.to(wide).reshape(groups)
        grads.append((gate.to(wide)[:, None] * dx).to(h.dtype).reshape(x.shape))
        grads.append((h.to(wide).reshape(groups) * dx).sum(1).to(gate.dtype))
    return [dx.to(x.dtype).reshape(x.shape), *grads]


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the computation: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def over_positions(value: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """Let a vector per example act on all positions of ``x``, in the dtype of the computation."""
    if value.dtype != wide:
        value = value.to(wide)
    if value.ndim != 2 or x.ndim == 2:
        return value
    return value.view(value.shape[0], *(1,) * (x.ndim - 2), value.shape[1])


# --- the choice -----------------------------------------------------------------------------------


def choose(backend: str, x: Tensor, kind: Kind, *conditions: Tensor | None) -> str:
    """Return the backend that runs: the one asked for, or what "auto" means for this input."""
    if backend == "reference":
        return backend
    if backend == "auto":
        return "reference" if _composite_only() else _fastest(x, kind, *conditions)
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be 'auto' or one of {BACKENDS}; got {backend!r}.")
    if why := missing(backend) or _unfit(backend, x, kind):
        raise ValueError(f"`backend` {backend!r} {why}")
    return "reference" if _composite_only() or x.numel() == 0 else backend


def _fastest(x: Tensor, kind: Kind, *conditions: Tensor | None) -> str:
    tensors = (x, *[c for c in conditions if c is not None])
    if torch.compiler.is_compiling():
        # No choice by size, which would tie the graph to it. On a CPU the compiler fuses the
        # reference itself; an exported program needs nothing but PyTorch.
        fits = x.is_cuda and x.numel() > 0 and not _is_exporting()
        fits = fits and not (missing("triton") or _unfit("triton", x, kind))
        return "triton" if fits and all(type(t) in _PLAIN for t in tensors) else "reference"
    size = x.numel()
    if size < FEWEST["numba"] or torch.jit.is_tracing():
        return "reference"
    if not all(type(t) in _PLAIN for t in tensors):
        return "reference"
    groups = max(t.numel() for t in tensors[1:]) // x.shape[-1]
    for name in _BY_DEVICE.get(x.device.type, ()):
        fewest = FEWEST[name] * (groups if name == "native" else 1)
        if size >= fewest and not (missing(name) or _unfit(name, x, kind)) and imports(name):
            return name
    return "reference"


@functools.cache
def imports(backend: str) -> bool:
    """Whether what is installed also fits together."""
    try:
        return bool(importlib.import_module(backend)) if backend in _INSTALLED else True
    except ImportError:
        return False


def missing(backend: str) -> str | None:
    """Say why this machine cannot run a backend, or None if it can."""
    if not _INSTALLED.get(backend, True):
        extra = {"numba": "fast", "triton": "gpu"}[backend]
        return f"needs {backend}, the extra `{extra}`: pip install 'cln-tutorial[{extra}]'."
    if backend == "triton" and not (torch.cuda.is_available() or _INTERPRETED):
        return "needs a GPU, or the environment variable TRITON_INTERPRET=1."
    return None


def _unfit(backend: str, x: Tensor, kind: Kind) -> str | None:
    if backend == "reference":
        return None
    triton = backend == "triton"
    devices = ("cuda", "cpu") if triton and _INTERPRETED else ("cuda",) if triton else ("cpu",)
    if x.device.type not in devices:
        return f"runs on {devices[0]}; `x` is on {x.device}."
    if x.dtype not in (_TRITON if triton else _FULL):
        dtypes = ", ".join(map(str, _TRITON if triton else _FULL))
        return f"takes {dtypes}; `x` is {x.dtype}."
    if triton and x.shape[-1] > WIDEST_TRITON:
        return f"takes up to {WIDEST_TRITON} channels; `x` has {x.shape[-1]}."
    if backend == "native" and kind.rms:
        return "has no RMS norm; take 'reference' or 'numba'."
    return None


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.6 has none

try:
    from torch._C import _are_functorch_transforms_active as _functorch_active
except ImportError:  # a private name: without it a fused backend would fail loudly under vmap

    def _functorch_active() -> bool:
        return False


def _composite_only() -> bool:
    """Whether a transform is active that would not see into a custom operator.

    Forward-mode AD gives a tangent of zero there, without an error (PyTorch 2.13).
    """
    return _functorch_active() or forward_ad._current_level >= 0


# --- the operators --------------------------------------------------------------------------------


def _one_form(x: Tensor, *conditions: Tensor | None) -> list[Tensor | None]:
    """Bring all to (groups, dim): one group per example, one for all, or one per position."""
    dim, first = x.shape[-1], conditions[0].shape
    if len(first) == 2 and all(c is None or c.shape == first for c in conditions):
        return list(conditions)
    rows = [None if c is None else c.reshape(-1, dim) for c in conditions]
    groups = max(len(r) for r in rows if r is not None)
    return [None if r is None else r.expand(groups, dim) for r in rows]


def _apply(*inputs: object) -> Tensor | tuple[Tensor, Tensor]:
    """Return y, or (y, x_new) of the gated form."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:5]):
        return _Norm.apply(*inputs)
    y, x_new, *_ = _FORWARD(*inputs)
    return y if inputs[3] is None else (y, x_new)


class _Norm(torch.autograd.Function):
    # With setup_context PyTorch binds the signature at each call, which costs 70 µs; only
    # functorch needs it, and there the reference runs.
    @staticmethod
    def forward(ctx, x, gamma, beta, h, gate, eps, rms, plus_one, backend):
        y, x_new, mean, rstd = _FORWARD(x, gamma, beta, h, gate, eps, rms, plus_one, backend)
        ctx.save_for_backward(x if h is None else x_new, gamma, mean, rstd, h, gate)
        ctx.beta_dtype = None if beta is None else beta.dtype
        ctx.kind, ctx.backend = Kind(eps, rms, plus_one), backend
        return y if h is None else (y, x_new)

    @staticmethod
    def backward(ctx, dy, dx_new=None):
        x, gamma, mean, rstd, h, gate = ctx.saved_tensors
        if _composite_only():  # torch.autograd.grad(..., is_grads_batched=True)
            grads = reference_backward(dy, dx_new, x, gamma, h, gate, ctx.kind, ctx.beta_dtype)
        else:
            inputs = (dy, dx_new, x, gamma, mean, rstd, h, gate, ctx.beta_dtype)
            run = _NormBackward.apply if torch.is_grad_enabled() else _gradients
            grads = list(run(*inputs, *ctx.kind, ctx.backend))
        if ctx.beta_dtype is None:
            grads.insert(2, None)
        return (*grads, *[None] * (9 - len(grads)))


def _gradients(dy, dx_new, x, gamma, mean, rstd, h, gate, beta_dtype, *kind_and_backend):
    """Those of dx, dgamma, dbeta, dh, dgate that exist."""
    inputs = (dy, dx_new, x, gamma, mean, rstd, h, gate, beta_dtype)
    dx, dgamma, dbeta, dh, dgate = _BACKWARD(*inputs, *kind_and_backend)
    grads = (dx, dgamma) if beta_dtype is None else (dx, dgamma, dbeta)
    return grads if h is None else (*grads, dh, dgate)


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, dx_new, x, gamma, mean, rstd, h, gate, beta_dtype, *kind_and_backend):
        ctx.save_for_backward(dy, dx_new, x, gamma, h, gate)
        ctx.beta_dtype, ctx.kind = beta_dtype, Kind(*kind_and_backend[:3])
        grads = _BACKWARD(dy, dx_new, x, gamma, mean, rstd, h, gate, beta_dtype, *kind_and_backend)
        kept = [True, True, beta_dtype is not None, h is not None, h is not None]
        return tuple(g for g, keep in zip(grads, kept, strict=True) if keep)

    @staticmethod
    def backward(ctx, *grads):
        with torch.enable_grad():
            # Views: the derivative with respect to dy stops there, and does not go on to what dy
            # itself was computed from, which may be x.
            inputs = [
                t
                if t is None
                else (t.view_as(t) if t.requires_grad else t.detach().requires_grad_())
                for t in ctx.saved_tensors
            ]
            first = reference_backward(*inputs, ctx.kind, ctx.beta_dtype)
        present = [t for t in inputs if t is not None]
        again = torch.is_grad_enabled()
        second = iter(
            torch.autograd.grad(first, present, grads, create_graph=again, allow_unused=True)
        )
        dy, dx_new, x, gamma, h, gate = (None if t is None else next(second) for t in inputs)
        return dy, dx_new, x, gamma, None, None, h, gate, *[None] * 5


_library = torch.library.Library("cln_tutorial", "DEF")
_library.define(
    "conditional_norm_fwd(Tensor x, Tensor gamma, Tensor? beta, Tensor? h, Tensor? gate, float eps,"
    " bool rms, bool plus_one, str backend) -> (Tensor y, Tensor x_new, Tensor mean, Tensor rstd)"
)
_library.define(
    "conditional_norm_bwd(Tensor dy, Tensor? dx_new, Tensor x, Tensor gamma, Tensor mean,"
    " Tensor rstd, Tensor? h, Tensor? gate, ScalarType? beta_dtype, float eps, bool rms,"
    " bool plus_one, str backend)"
    " -> (Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dh, Tensor dgate)"
)


def _forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    eps: float,
    rms: bool,
    plus_one: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if x.numel() == 0:  # of a compiled or exported program; else the reference runs
        return _fake_forward(x, gamma, beta, h, gate, eps, rms, plus_one, backend)
    return _implementation(backend).forward(x, gamma, beta, h, gate, eps, rms, plus_one)


def _backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    beta_dtype: torch.dtype | None,
    eps: float,
    rms: bool,
    plus_one: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (dy, dx_new, x, gamma, mean, rstd, h, gate, beta_dtype)
    if x.numel() == 0:
        return tuple(t.zero_() for t in _fake_backward(*inputs, eps, rms, plus_one, backend))
    return _implementation(backend).backward(*inputs, rms, plus_one)


def _fake_forward(x, gamma, beta, h, gate, eps, rms, plus_one, backend):
    rows = math.prod(x.shape[:-1])
    stats = [x.new_empty(0 if rms else rows, dtype=wide_dtype(x))]
    stats.append(x.new_empty(rows, dtype=wide_dtype(x)))
    return x.new_empty(x.shape), x.new_empty(0 if h is None else x.shape), *stats


def _fake_backward(dy, dx_new, x, gamma, mean, rstd, h, gate, beta_dtype, *kind_and_backend):
    dbeta = x.new_empty(0) if beta_dtype is None else gamma.new_empty(gamma.shape, dtype=beta_dtype)
    dh = x.new_empty(0 if h is None else x.shape)
    dgate = x.new_empty(0) if h is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), gamma.new_empty(gamma.shape), dbeta, dh, dgate


def _implementation(backend: str) -> ModuleType:
    """The module of a backend, imported when it is first used.

    It has ``forward(x, gamma, beta, h, gate, eps, rms, plus_one) -> (y, x_new, mean, rstd)`` and
    ``backward(dy, dx_new, x, gamma, mean, rstd, h, gate, beta_dtype, rms, plus_one) -> (dx, dgamma,
    dbeta, dh, dgate)``. Conditions are (groups, dim), and the rows of ``x`` belong to the groups in
    turn, equally many to each. Mean and rstd have one number per row. Results are contiguous; what
    is not wanted is an empty tensor. Only "triton" takes ``h``.
    """
    if backend == "triton":
        import cln_tutorial.kernels.conditional_norm as module
    elif backend == "numba":
        import cln_tutorial.conditional_norm.numba_loops as module
    else:
        import cln_tutorial.conditional_norm.native as module
    return module


for _key in ("CPU", "CUDA"):
    _library.impl("conditional_norm_fwd", _forward, _key)
    _library.impl("conditional_norm_bwd", _backward, _key)
torch.library.register_fake("cln_tutorial::conditional_norm_fwd", _fake_forward)
torch.library.register_fake("cln_tutorial::conditional_norm_bwd", _fake_backward)
_FORWARD = torch.ops.cln_tutorial.conditional_norm_fwd.default
_BACKWARD = torch.ops.cln_tutorial.conditional_norm_bwd.default
