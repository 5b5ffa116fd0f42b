"""Conditional layer norm beside plain PyTorch, the compiler and the libraries that have it.

The baseline is what people write, `F.layer_norm(x, (D,)) * gamma[:, None] + beta[:, None]`. Plain
`F.layer_norm` with one weight and one bias for all reads less, and is the bound. "forward" records
no gradient; "forward+backward" asks for those of x, gamma and beta; "backward" (on a GPU, where it
can be timed apart) runs a recorded graph again.

    make bench NAME=conditional_norm
    python -m benchmarks.conditional_norm --device cuda

Peers are measured where they import, and named as missing where not. An environment with all:

    python -m venv peers
    peers/bin/pip install . numba bert4torch diffusers      # on a GPU also: triton liger-kernel
    peers/bin/python -m benchmarks.conditional_norm

bert4torch and diffusers have the projection of the condition inside the module. They get unit
vectors as conditions, one per example, so that the rows of their projections are gamma and beta:
the same results, at the cost of one small matrix product, which is part of what they offer.
"""

import functools
import importlib
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from cln_tutorial.conditional_norm import (
    available_backends,
    conditional_layer_norm,
    modulated_rms_norm,
)

LAYER_NORM, PER_TOKEN, RMS_NORM = (
    "conditional_layer_norm",
    "conditional_layer_norm, per token",
    "modulated_rms_norm",
)
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

# `auto` takes "numba" from the size of (16, 32, 64), not yet at (8, 32, 64); without Numba it takes
# "native" from the size of an example of (16, 128, 768), not yet at (4, 128, 512).
SHAPES = [
    (2, 4, 16),
    (8, 32, 64),
    (16, 32, 64),
    (32, 32, 128),
    (64, 64, 128),
    (8, 64, 256),
    (4, 128, 512),
    (16, 128, 768),
    (32, 512, 768),
]
GPU_SHAPES = [
    (16, 128, 768),
    (64, 256, 1024),
    (64, 1366, 768),
    (64, 1024, 1024),
    (64, 342, 3072),
    (64, 256, 4096),
    (64, 512, 4096),
]
GPU_SHAPES_PER_TOKEN = [(1, 128, 3072), (1, 21846, 3072)]
EPS = 1e-5
SILU_OF_THIS_IS_ONE = 1.2784645427610737
LARGE = 2**26  # elements from which the goals of a GPU hold
BACKENDS = {
    "cpu": ("reference", "native", "numba", "auto"),
    "cuda": ("reference", "triton", "auto"),
}
PEERS = {
    "cpu": {
        "bert4torch": ("bert4torch.layers.layer_norm", "ConditionalLayerNorm"),
        "diffusers": ("diffusers.models.normalization", "AdaLayerNorm"),
    },
    "cuda": {"liger": ("liger_kernel.transformers.functional", "liger_modulated_rms_norm")},
}
BYTES_PER_ELEMENT = 150  # of GPU memory, most of it for the float64 results

# float32: the limits of the chapter's tests. bfloat16: the eager form rounds three times, each time
# by up to 2^-9 of the value, and a gradient is a difference of two such products.
LIMITS = {
    "float32": {"y": 2e-6, "dx": 1e-5, "dgamma": 1e-5, "dbeta": 1e-5},
    "bfloat16": {"y": 1e-2, "dx": 2e-2, "dgamma": 2e-2, "dbeta": 2e-2},
}


def cases(device: str) -> list[harness.Case]:
    if device == "cpu":
        shapes = [*((LAYER_NORM, shape) for shape in SHAPES), (PER_TOKEN, (1, 1024, 768))]
        return [_case(*each, "float32", mode) for each in shapes for mode in (FORWARD, BOTH)]
    shapes = [(op, shape) for op in (LAYER_NORM, RMS_NORM) for shape in GPU_SHAPES]
    shapes += [(PER_TOKEN, shape) for shape in GPU_SHAPES_PER_TOKEN]
    return [
        _case(*each, dtype, mode)
        for each in shapes
        if not _too_large(each[1])
        for dtype in ("bfloat16", "float32")
        for mode in (FORWARD, BACKWARD)
    ]


def quick(device: str) -> list[harness.Case]:
    modes = (FORWARD, BOTH) if device == "cpu" else (FORWARD, BACKWARD)
    return [
        _case(op, (2, 3, 8), "float32", mode) for op in (LAYER_NORM, PER_TOKEN) for mode in modes
    ]


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here: contenders, and shapes, with the reason."""
    found = {}
    for name in ("native", "numba") if device == "cpu" else ("triton",):
        if name not in available_backends():
            found[name] = "not among `available_backends()`"
    if device == "cpu":
        compilers = [os.environ.get("CXX", "g++"), "clang++"]
        if not any(map(shutil.which, compilers)):
            found["torch.compile"] = f"no C++ compiler: {' or '.join(compilers)}"
    else:
        for shape in [*GPU_SHAPES, *GPU_SHAPES_PER_TOKEN]:
            if _too_large(shape):
                found[f"shape {shape}"] = "too large for the memory of this GPU"
    for name, (module, function) in PEERS[device].items():
        try:
            getattr(importlib.import_module(module), function)
        except Exception as error:  # it may be there, and not fit the versions of the rest
            found[name] = f"{type(error).__name__}: {error}"
    return found


def goals(device: str) -> list[harness.Goal]:
    """What is promised on this device; the record says whether it is kept."""
    if device == "cpu":
        large, small = _at((16, 128, 768), BOTH), _at((8, 64, 256), BOTH)
        at = "over eager at (16, 128, 768), forward+backward"
        return [
            harness.Goal(f"native {at}, fixed heap", 1.8, _least("native", large, "fixed heap")),
            harness.Goal(f"native {at}, default", 2.3, _least("native", large, "default")),
            harness.Goal(f"numba {at}, fixed heap", 3.5, _least("numba", large, "fixed heap")),
            harness.Goal(
                "numba over eager at (8, 64, 256), forward+backward", 1.4, _least("numba", small)
            ),
            harness.Goal("auto over eager, in every row", 0.95, _least("auto")),
            harness.Goal(
                "memory kept for the backward pass at (16, 128, 768) by native, numba and auto, in "
                "units of x, with conditions and statistics (1.0 to one decimal)",
                1.05,
                partial(_most_kept, names=("native", "numba", "auto"), where=large),
                "at most",
            ),
        ]
    found = [
        harness.Goal(
            "auto over torch.compile, in every row", 1.0, _least("auto", over="torch.compile")
        )
    ]
    for mode, over_eager, share in [(FORWARD, 2.5, 0.90), (BACKWARD, 2.0, 0.85)]:
        where = partial(_is_large, mode=mode)
        at = f"{mode}, 2^26 elements and more"
        found += [
            harness.Goal(f"triton over eager, {at}", over_eager, _least("triton", where)),
            harness.Goal(
                f"triton, share of the bandwidth of a copy, {at}",
                share,
                _least("triton", where, figure="share_of_copy"),
            ),
        ]
    return found


def _case(op: str, shape: tuple[int, ...], dtype: str, mode: str) -> harness.Case:
    # Forward reads x and writes y; backward reads x and dy and writes dx. What is one vector per
    # example counts as nothing; what is one per token counts as x does.
    passes = {FORWARD: 4, BACKWARD: 6} if op == PER_TOKEN else {FORWARD: 2, BACKWARD: 3}
    size = math.prod(shape) * getattr(torch, dtype).itemsize
    return harness.Case(
        op,
        shape,
        dtype,
        mode,
        contenders,
        LIMITS[dtype],
        bound="F.rms_norm" if op == RMS_NORM else "F.layer_norm",
        traffic=passes[mode] * size if mode in passes else None,
    )


def _too_large(shape: tuple[int, ...]) -> bool:
    return math.prod(shape) * BYTES_PER_ELEMENT > torch.cuda.get_device_properties(0).total_memory


def _at(shape: tuple[int, ...], mode: str) -> Callable[[harness.Row], bool]:
    return lambda row: (row["op"], tuple(row["shape"]), row["mode"]) == (LAYER_NORM, shape, mode)


def _is_large(row: harness.Row, mode: str) -> bool:
    return math.prod(row["shape"]) >= LARGE and row["mode"] == mode


def _least(
    name: str,
    where: Callable[[harness.Row], bool] = lambda row: True,
    setting: str | None = None,
    over: str = "eager",
    figure: str = "ratio",
) -> Callable[[list[harness.Row]], float | None]:
    """Smallest median of a contender's figure, over the rows that fit and have it."""

    def reached(rows: list[harness.Row]) -> float | None:
        found = []
        for row in rows:
            present = row["contenders"]
            fits = where(row) and setting in (None, row["setting"])
            if not fits or not {name, over} <= present.keys():
                continue
            if figure == "ratio":
                found.append(_ratio(present[name]) / _ratio(present[over]))
            else:
                found.append(present[name][figure]["median"])
        return min(found, default=None)

    return reached


def _ratio(contender: harness.Row) -> float:
    return contender["cuda" if "cuda" in contender else "cpu"]["ratio"]["median"]


def _most_kept(
    rows: list[harness.Row], names: tuple[str, ...], where: Callable[[harness.Row], bool]
) -> float | None:
    kept = [
        row["contenders"][name]["kept"]
        for row in rows
        for name in names
        if where(row) and name in row["contenders"]
    ]
    return max(kept, default=None)


# --- the contenders -------------------------------------------------------------------------------


class Way(NamedTuple):
    """A function, its inputs, and the float64 results: its own, then the gradients of inputs."""

    call: Callable[..., Tensor]
    inputs: list[Tensor]
    expected: dict[str, Tensor]


def contenders(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """All contenders of a case, on the same random input."""
    torch.compiler.reset()  # compiled functions are tied to the shape of the case before
    # A compiled backward pass that is run again needs what it would otherwise overwrite.
    torch._functorch.config.donated_buffer = case.mode != BACKWARD
    generator = torch.Generator(device).manual_seed(0)
    vectors = case.shape if case.op == PER_TOKEN else (case.shape[0], case.shape[-1])
    x, gamma, beta, dy = (
        torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))
        for shape in (case.shape, vectors, vectors, case.shape)
    )
    if case.op == RMS_NORM:
        ways = _rms_norms(x, gamma, beta, dy)
    else:
        ways = _layer_norms(x, gamma, beta, dy, per_token=case.op == PER_TOKEN)
    return {name: _contender(way, dy, case.mode) for name, way in ways.items()}


def _contender(way: Way, dy: Tensor, mode: str) -> harness.Contender:
    inputs = [value.requires_grad_(mode != FORWARD) for value in way.inputs]
    forward = partial(way.call, *inputs)
    if mode == FORWARD:
        return harness.Contender(lambda: [forward()], {"y": way.expected["y"]})
    if mode == BOTH:

        def run() -> list[Tensor]:
            y = forward()
            return [y, *torch.autograd.grad(y, inputs, dy)]

        return harness.Contender(run, way.expected, forward)
    recorded = functools.cache(forward)
    gradients = {name: value for name, value in way.expected.items() if name != "y"}
    return harness.Contender(
        lambda: torch.autograd.grad(recorded(), inputs, dy, retain_graph=True), gradients, forward
    )


def _layer_norms(
    x: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor, per_token: bool
) -> dict[str, Way]:
    inputs, expected, absent = [x, gamma, beta], _truth(x, gamma, beta, dy), missing(x.device.type)
    eager = _eager_per_token if per_token else _eager
    calls = {
        "eager": eager,
        "addcmul": _addcmul_per_token if per_token else _addcmul,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    for backend in BACKENDS[x.device.type]:
        calls[backend] = partial(conditional_layer_norm, per_token=per_token, backend=backend)
    ways = {n: Way(call, inputs, expected) for n, call in calls.items() if n not in absent}
    weight, bias = gamma.flatten(0, -2)[0].clone(), beta.flatten(0, -2)[0].clone()
    plain = _truth(x, weight, bias, dy)
    ways["F.layer_norm"] = Way(_plain_layer_norm, [x, weight, bias], plain)
    if not (per_token or x.is_cuda):
        for name, make in {"bert4torch": _bert4torch, "diffusers": _diffusers}.items():
            if name not in absent:
                ways[name] = make(x, gamma, beta, expected)
    return ways


def _rms_norms(x: Tensor, scale: Tensor, shift: Tensor, dy: Tensor) -> dict[str, Way]:
    inputs, expected = [x, scale, shift], _truth(x, 1 + scale.double(), shift, dy, rms=True)
    absent = missing(x.device.type)
    calls = {
        "eager": _eager_rms,
        "torch.compile": torch.compile(_eager_rms, dynamic=False),
        "triton": partial(modulated_rms_norm, eps=EPS, backend="triton"),
        "auto": partial(modulated_rms_norm, eps=EPS),
        "liger": _liger,
    }
    ways = {n: Way(call, inputs, expected) for n, call in calls.items() if n not in absent}
    weight = scale[0].clone()
    plain = _truth(x, weight, torch.zeros_like(weight), dy, rms=True)
    plain = {name: value for name, value in plain.items() if name != "dbeta"}
    ways["F.rms_norm"] = Way(_plain_rms_norm, [x, weight], plain)
    return ways


def _eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * gamma[:, None] + beta[:, None]


def _eager_per_token(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * gamma + beta


def _addcmul(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.addcmul(beta[:, None], F.layer_norm(x, x.shape[-1:]), gamma[:, None])


def _addcmul_per_token(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.addcmul(beta, F.layer_norm(x, x.shape[-1:]), gamma)


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _eager_rms(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _liger(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_modulated_rms_norm

    # In place it would overwrite dy, which the next run needs.
    return liger_modulated_rms_norm(x, None, scale, shift, eps=EPS, in_place=False)


def _bert4torch(x: Tensor, gamma: Tensor, beta: Tensor, expected: dict[str, Tensor]) -> Way:
    from bert4torch.layers.layer_norm import ConditionalLayerNorm

    norm = ConditionalLayerNorm(gamma.shape[1], EPS, conditional_size=len(gamma))
    norm.requires_grad_(False)
    norm.dense1.weight.copy_((gamma - 1).T)  # its own weight is one, its own bias zero
    norm.dense2.weight.copy_(beta.T)
    vectors = torch.eye(len(gamma))
    rows = {"dgamma": expected["dgamma"].T, "dbeta": expected["dbeta"].T}
    inputs = [x, norm.dense1.weight, norm.dense2.weight]
    return Way(lambda x, *_: norm(x, conditional_emb=vectors), inputs, expected | rows)


def _diffusers(x: Tensor, gamma: Tensor, beta: Tensor, expected: dict[str, Tensor]) -> Way:
    from diffusers.models.normalization import AdaLayerNorm

    batch, dim = gamma.shape
    norm = AdaLayerNorm(batch, output_dim=2 * dim, chunk_dim=1).requires_grad_(False)
    norm.linear.weight.copy_(torch.cat([beta.T, (gamma - 1).T]))  # shift first, then scale - 1
    norm.linear.bias.zero_()
    vectors = SILU_OF_THIS_IS_ONE * torch.eye(batch)
    gradient = torch.cat([expected["dbeta"].T, expected["dgamma"].T])
    return Way(
        lambda x, _: norm(x, temb=vectors),
        [x, norm.linear.weight],
        {"y": expected["y"], "dx": expected["dx"], "dgamma": gradient},
    )


def _truth(
    x: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor, rms: bool = False
) -> dict[str, Tensor]:
    """The formula in float64, and the gradients that autograd finds for it."""
    x, gamma, beta = (v.detach().double().requires_grad_() for v in (x, gamma, beta))
    centred = x if rms else x - x.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    each, shift = (v[:, None] if v.ndim == 2 else v for v in (gamma, beta))
    y = normalised * each + shift
    gradients = torch.autograd.grad(y, (x, gamma, beta), dy.double())
    return dict(zip(("y", "dx", "dgamma", "dbeta"), (y.detach(), *gradients), strict=True))


BENCHMARK = harness.Benchmark(
    "conditional_norm",
    cases,
    quick,
    missing,
    ("numba", "triton", "bert4torch", "diffusers", "liger-kernel"),
    goals,
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
