"""One norm under the whole family, and the choice of what computes it.

The reference is plain operations of PyTorch. The other backends are one pair of custom operators,
``cln_tutorial::modulated_norm_fwd`` and ``_bwd``, which compiler and export take as they are.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial._transforms import transforms_are_active
from cln_tutorial.conditional_norm.fused import imports, missing

BACKENDS = ("reference", "native", "numba")
# Below these numbers of elements a custom operator costs more than it saves. Measured forward and
# forward with backward, one thread.
FEWEST = {"numba": 2**15, "native": 2**18}  # the best first

_PLAIN = (Tensor, torch.nn.Parameter)  # other classes, as those of a sharded tensor, see operations


class Kind(NamedTuple):
    """What is done to the normalised maps; ``slope`` is 1 without activation, 0 for a ReLU."""

    eps: float
    gain_offset: float
    slope: float
    upsample: int


class Statistics(NamedTuple):
    """Running mean and variance: normalise with them, or with the batch and let it move them."""

    mean: Tensor | None
    var: Tensor | None
    training: bool
    momentum: float


def norm(
    x: Tensor, gamma: Tensor, beta: Tensor, statistics: Statistics, kind: Kind, backend: str
) -> Tensor:
    """Normalise the channels of ``x``, scale, shift, activate, upsample; all are checked before."""
    chosen = choose(backend, x, gamma, beta)
    if chosen == "reference":
        return reference(x, gamma, beta, statistics, kind)
    of_samples = [_of_samples(value, x) for value in (gamma, beta)]
    fixed = (None, None) if statistics.training else statistics[:2]
    y, mean, var = _apply(x, *of_samples, *fixed, *kind, chosen)
    if statistics.training and statistics.mean is not None:
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            unbiased = var * (count / (count - 1))
            for running, of_batch in zip(statistics[:2], (mean, unbiased), strict=True):
                running.lerp_(of_batch.to(running.dtype), statistics.momentum)
    return y


def reference(x: Tensor, gamma: Tensor, beta: Tensor, statistics: Statistics, kind: Kind) -> Tensor:
    """The family in plain operations, which every transform of PyTorch can see into."""
    dtype, wide = x.dtype, wide_dtype(x.dtype)
    if dtype != wide:
        x = x.to(wide)
    mean, var, training, momentum = statistics
    if mean is None or mean.dtype == var.dtype == wide:
        y = _batch_norm(x, mean, var, training, momentum, kind.eps)
    else:
        used = mean.to(wide), var.to(wide)
        y = _batch_norm(x, *used, training, momentum, kind.eps)
        if training:
            mean.copy_(used[0])
            var.copy_(used[1])
    gain = _over_maps(gamma, wide)
    if kind.gain_offset != 0:
        gain = gain + kind.gain_offset
    y = torch.addcmul(_over_maps(beta, wide), y, gain)
    if kind.slope == 0:
        y = torch.relu_(y)
    elif kind.slope != 1:
        y = F.leaky_relu_(y, kind.slope)
    if dtype != wide:
        y = y.to(dtype)
    return y if kind.upsample == 1 else F.interpolate(y, scale_factor=float(kind.upsample))


def _batch_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float, eps: float
) -> Tensor:
    # Without the checks of F.batch_norm, which are ours.
    cudnn = x.is_cuda and torch.backends.cudnn.enabled
    return torch.batch_norm(x, None, None, mean, var, training, momentum, eps, cudnn)


def _over_maps(value: Tensor, wide: torch.dtype) -> Tensor:
    return (value if value.dtype == wide else value.to(wide)).view(*value.shape, 1, 1)


def _of_samples(value: Tensor, x: Tensor) -> Tensor:
    value = value if value.dtype == x.dtype else value.to(x.dtype)
    return value if value.ndim == 2 else value.expand(x.shape[:2])


# --- the choice -----------------------------------------------------------------------------------


def choose(backend: str, x: Tensor, *conditions: Tensor) -> str:
    """Return the backend that runs: the one asked for, or what "auto" means for this input."""
    if backend == "reference":
        return backend
    if backend == "auto":
        return "reference" if _composite_only() else _fastest(x, *conditions)
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be 'auto' or one of {BACKENDS}; got {backend!r}.")
    if why := missing(backend) or _unfit(x):
        raise ValueError(f"`backend` {backend!r} {why}")
    return "reference" if _composite_only() or x.numel() == 0 else backend


def _fastest(x: Tensor, *conditions: Tensor) -> str:
    # A graph is not tied to the size of its example; an exported program needs only PyTorch.
    if torch.compiler.is_compiling() or x.numel() < min(FEWEST.values()):
        return "reference"
    if _unfit(x) or not x.is_contiguous():  # the reference keeps channels last
        return "reference"
    if torch.jit.is_tracing() or not all(type(t) in _PLAIN for t in (x, *conditions)):
        return "reference"
    for name, fewest in FEWEST.items():
        if x.numel() >= fewest and not missing(name) and imports(name):
            return name
    return "reference"


def _unfit(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"runs on the CPU; `x` is on {x.device}."
    if x.dtype not in (torch.float32, torch.float64):
        return f"takes torch.float32 and torch.float64; `x` is {x.dtype}."
    return None


def _composite_only() -> bool:
    """Whether a transform is active that would not see into a custom operator.

    Forward-mode AD gives a tangent of zero there, without an error (PyTorch 2.13).
    """
    return transforms_are_active() or forward_ad._current_level >= 0


# --- the operators --------------------------------------------------------------------------------


def _apply(*inputs: object) -> Sequence[Tensor]:
    """Return y, and mean and biased variance of the channels."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs[:3]):
        return _Norm.apply(*inputs)
    return _FORWARD(*inputs)[:3]


class _Norm(torch.autograd.Function):
    # With setup_context PyTorch binds the signature at each call, which costs 70 µs; only
    # functorch needs it, and there the reference runs.
    @staticmethod
    def forward(ctx, x, gamma, beta, mean, var, eps, gain_offset, slope, upsample, backend):
        ctx.kind, ctx.backend = Kind(eps, gain_offset, slope, upsample), backend
        ctx.training = mean is None
        y, mean, var, rstd = _FORWARD(x, gamma, beta, mean, var, *ctx.kind, backend)
        # What the native operations mask with; the loops find the sign again.
        kept = y if backend == "native" and slope != 1 else None
        ctx.save_for_backward(x, gamma, beta, mean, var, rstd, kept)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, gamma, beta, mean, var, rstd, y = ctx.saved_tensors
        if dy is None:
            grads = [None] * 3
        elif torch.is_grad_enabled() or _composite_only():
            # For derivatives of derivatives, or torch.autograd.grad(..., is_grads_batched=True).
            statistics = Statistics(mean, var, False, 0.0)
            if ctx.training:
                statistics = Statistics(None, None, True, 0.0)
            needed = ctx.needs_input_grad[:3]
            grads = _reference_gradients(dy, (x, gamma, beta), needed, statistics, ctx.kind)
        else:
            inputs = dy, x, gamma, beta, mean, rstd, y, ctx.training
            grads = _BACKWARD(*inputs, *ctx.kind[1:], ctx.backend)
        return *grads, *[None] * 7


def _reference_gradients(
    dy: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    statistics: Statistics,
    kind: Kind,
) -> list[Tensor | None]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the graph of the first derivative ends there, and does not go on to what they were
        # computed from.
        inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needed, strict=True)]
        y = reference(*inputs, statistics, kind)
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))
    return [next(found) if need else None for need in needed]


_library = torch.library.Library("cln_tutorial", "FRAGMENT")
_library.define(
    "modulated_norm_fwd(Tensor x, Tensor gamma, Tensor beta, Tensor? mean, Tensor? var, float eps,"
    " float gain_offset, float slope, int upsample, str backend)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor rstd)"
)
_library.define(
    "modulated_norm_bwd(Tensor dy, Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd,"
    " Tensor? y, bool training, float gain_offset, float slope, int upsample, str backend)"
    " -> (Tensor dx, Tensor dgamma, Tensor dbeta)"
)


def _forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    gain_offset: float,
    slope: float,
    upsample: int,
    backend: str,
) -> Sequence[Tensor]:
    inputs = x, gamma, beta, mean, var, eps, gain_offset, slope, upsample
    if x.numel() == 0:  # of a compiled or exported program; else the reference runs
        return _fake_forward(*inputs, backend)
    return _implementation(backend).forward(*inputs)


def _backward(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    training: bool,
    gain_offset: float,
    slope: float,
    upsample: int,
    backend: str,
) -> Sequence[Tensor]:
    if x.numel() == 0:
        return tuple(torch.zeros_like(t) for t in (x, gamma, beta))
    inputs = dy, x, gamma, beta, mean, rstd, y, training, gain_offset, slope, upsample
    return _implementation(backend).backward(*inputs)


def _fake_forward(x, gamma, beta, mean, var, eps, gain_offset, slope, upsample, backend):
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, channels, height * upsample, width * upsample)
    return y, *(x.new_empty(channels) for _ in range(3))


def _fake_backward(dy, x, gamma, beta, *rest):
    return tuple(t.new_empty(t.shape) for t in (x, gamma, beta))


def _implementation(backend: str) -> ModuleType:
    """The module of a backend, imported when it is first used.

    It has ``forward(x, gamma, beta, mean, var, eps, gain_offset, slope, upsample) -> (y, mean, var,
    rstd)``, where mean and variance are those of the channels, given or found, and ``backward(dy,
    x, gamma, beta, mean, rstd, y, training, gain_offset, slope, upsample) -> (dx, dgamma, dbeta)``.
    Conditions are (batch, channels) in the dtype of ``x``. Results are contiguous and new. Only
    "native" is given ``y``, where there is an activation.
    """
    if backend == "numba":
        import cln_tutorial.gan_architectures.numba_loops as module
    else:
        import cln_tutorial.gan_architectures.native as module
    return module


_library.impl("modulated_norm_fwd", _forward, "CPU")
_library.impl("modulated_norm_bwd", _backward, "CPU")
torch.library.register_fake("cln_tutorial::modulated_norm_fwd", _fake_forward)
torch.library.register_fake("cln_tutorial::modulated_norm_bwd", _fake_backward)
_FORWARD = torch.ops.cln_tutorial.modulated_norm_fwd.default
_BACKWARD = torch.ops.cln_tutorial.modulated_norm_bwd.default
