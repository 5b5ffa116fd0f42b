"""Conditional batch norm with its ReLU, beside plain PyTorch and the compiler.

The baseline is what people write: `F.batch_norm` in training mode, `* (1 + gamma)`, `+ beta`, with
one vector per sample, and `F.relu`. "forward" records no gradients, as in sampling; "forward,
recorded" does, and throws them away; "forward+backward" asks for those of x, gamma and beta. All
move running statistics. The bound only copies: x, and for a backward pass dy.

    make bench NAME=gan_architectures
    python -m benchmarks.gan_architectures --device cuda     # eager, compiler and reference only

On the CPU the compiler takes many seconds per case. It is measured at two shapes, and not by
`--quick`.

The last rows are whole steps of `GANTrainer`, of the pairs of networks of the chapter's experiment;
the baseline has the same networks, with eager norms put into the generator.
"""

import functools
import math
import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import harness
from cln_tutorial.gan_architectures.functional import available_norm_backends, modulated_batch_norm
from cln_tutorial.gan_architectures.networks import DCGANGenerator, SNDCGANDiscriminator
from cln_tutorial.gan_architectures.norms import ModulatedNorm2d
from cln_tutorial.gan_architectures.training import GANTrainer

NORM, UPSAMPLED = "conditional BN + ReLU", "conditional BN + ReLU + nearest x2"
STEPS = {"training step, BN": "bn", "training step, SELF-MOD": "selfmod"}
FORWARD, RECORDED, BOTH = "forward", "forward, recorded", "forward+backward"
ONE = "one step of both networks"

# `auto` takes "numba" from the size of (64, 64, 4, 4), the first maps of the experiment; without
# Numba "native" from that of (64, 64, 8, 8). Maps of 1 MiB begin there, too.
SHAPES = [
    (4, 16, 4, 4),
    (64, 64, 4, 4),
    (64, 64, 8, 8),
    (64, 32, 16, 16),
    (64, 64, 16, 16),
    (64, 128, 16, 16),
    (32, 128, 32, 32),
]
GPU_SHAPES = [*SHAPES, (64, 128, 64, 64), (64, 256, 64, 64)]
COMPILED = (64, 64, 16, 16), (64, 128, 16, 16)
MIB = 2**20
EPS, MOMENTUM = 1e-5, 0.1
BACKENDS = {"cpu": ("reference", "native", "numba", "auto"), "cuda": ("reference", "auto")}

# float32: sums of up to 2^15 terms per channel. The gradients of a step have gone through three
# convolutions, and those of G through an update of D by Adam, whose first is a sign.
LIMITS = {"y": 2e-6, "dx": 1e-5, "dgamma": 1e-5, "dbeta": 1e-5, "mean": 1e-5, "var": 1e-5}
LIMITS |= {"gradient of D": 1e-4, "gradient of G": 1e-3}


def cases(device: str) -> list[harness.Case]:
    shapes = SHAPES if device == "cpu" else GPU_SHAPES
    return _cases(shapes, (64, 64, 16, 16), (64, 1, 16, 16))


def quick(device: str) -> list[harness.Case]:
    return _cases([(4, 3, 4, 4)], (4, 3, 4, 4), (8, 1, 8, 8))


def _cases(
    shapes: list[tuple[int, ...]], upsampled: tuple[int, ...], images: tuple[int, ...]
) -> list[harness.Case]:
    listed = [(NORM, shape, mode) for shape in shapes for mode in (FORWARD, RECORDED, BOTH)]
    found = [
        harness.Case(*each[:2], "float32", each[2], norms, LIMITS, bound="clone")
        for each in [*listed, (UPSAMPLED, upsampled, BOTH)]
    ]
    return found + [harness.Case(op, images, "float32", ONE, steps, LIMITS) for op in STEPS]


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    found = {}
    for name in BACKENDS[device]:
        if name not in ("auto", *available_norm_backends()):
            found[name] = "not among `available_norm_backends()`"
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if device == "cpu" and not any(map(shutil.which, compilers)):
        found["torch.compile"] = f"no C++ compiler: {' or '.join(compilers)}"
    return found


# --- the goals ------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    """What is promised on the CPU; on a GPU the fused norm is the reference, and nothing is."""
    if device != "cpu":
        return []
    large = "maps of 1 MiB and more"
    listed = [
        (f"numba over eager, {FORWARD}, {large}", 3.0, "numba", "eager", FORWARD),
        (f"numba over eager, {RECORDED}, {large}", 3.0, "numba", "eager", RECORDED),
        (f"numba over eager, {BOTH}, {large}", 2.5, "numba", "eager", BOTH),
        (f"numba over torch.compile, {BOTH}", 4.0, "numba", "torch.compile", BOTH),
        (f"numba over torch.compile, {FORWARD}", 1.0, "numba", "torch.compile", FORWARD),
        (f"native over eager, {BOTH}, {large}", 1.15, "native", "eager", BOTH),
    ]
    found = [
        harness.Goal(what, wanted, _least(name, over, partial(_is_large, mode=mode)))
        for what, wanted, name, over, mode in listed
    ]
    auto = partial(_least, "auto", "eager")
    return [
        *found,
        harness.Goal("auto over eager, every norm", 0.9, auto(lambda row: row["mode"] != ONE)),
        harness.Goal("auto over eager, training steps", 1.05, auto(lambda row: row["mode"] == ONE)),
    ]


def _is_large(row: harness.Row, mode: str) -> bool:
    size = 4 * math.prod(row["shape"])
    return row["op"] == NORM and row["mode"] == mode and size >= MIB


def _least(
    name: str, over: str, where: Callable[[harness.Row], bool]
) -> Callable[[list[harness.Row]], float | None]:
    """Smallest ratio of medians over the rows that fit and have both, both allocators."""

    def reached(rows: list[harness.Row]) -> float | None:
        found = []
        for row in rows:
            present = row["contenders"]
            if where(row) and {name, over} <= present.keys():
                ours, theirs = (present[each]["cpu"]["ratio"]["median"] for each in (name, over))
                found.append(ours / theirs)
        return min(found, default=None)

    return reached


# --- norms ----------------------------------------------------------------------------------------


def norms(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """All contenders of a case on the same random maps, each with running statistics of its own."""
    torch.compiler.reset()  # compiled functions are tied to the shape of the case before
    generator = torch.Generator(device).manual_seed(0)
    maps, upsample = case.shape, 2 if case.op == UPSAMPLED else 1
    shapes = maps, maps[:2], maps[:2], (*maps[:2], maps[2] * upsample, maps[3] * upsample)
    x, gamma, beta, dy = (torch.randn(s, generator=generator, device=device) for s in shapes)
    inputs, expected = [x, gamma, beta], _truth(x, gamma, beta, dy)
    calls = {"eager": partial(_eager, upsample=upsample)}
    for backend in BACKENDS[device]:
        calls[backend] = partial(_ours, backend=backend, upsample=upsample)
    if device == "cuda" or (maps in COMPILED and case.op == NORM and case.mode != RECORDED):
        calls["torch.compile"] = torch.compile(calls["eager"], dynamic=False)
    found = {
        name: _contender(call, inputs, dy, expected, case.mode)
        for name, call in calls.items()
        if name not in missing(device)
    }
    copied = [x, dy] if case.mode == BOTH else [x]
    truth = dict(zip(("y", "dx"), (each.double() for each in copied), strict=False))
    found["clone"] = harness.Contender(lambda: [each.clone() for each in copied], truth)
    return found


def _contender(
    call: Callable[..., Tensor],
    inputs: list[Tensor],
    dy: Tensor,
    expected: dict[str, Tensor],
    mode: str,
) -> harness.Contender:
    running = [torch.zeros_like(inputs[0][0, :, 0, 0]), torch.ones_like(inputs[0][0, :, 0, 0])]
    inputs = [value.requires_grad_(mode != FORWARD) for value in inputs]
    forward = partial(call, *inputs, *running)

    def run() -> list[Tensor]:
        y = forward()
        return [y, *torch.autograd.grad(y, inputs, dy)] if mode == BOTH else [y]

    wanted = expected if mode == BOTH else {name: expected[name] for name in ("y", "mean", "var")}
    kept = forward if mode == BOTH else None
    return harness.Contender(run, wanted, kept, checked=lambda: [*run(), *running])


def _eager(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, upsample: int = 1
) -> Tensor:
    y = F.batch_norm(x, mean, var, training=True, momentum=MOMENTUM, eps=EPS)
    y = F.relu(y * (1 + gamma)[:, :, None, None] + beta[:, :, None, None])
    return y if upsample == 1 else F.interpolate(y, scale_factor=upsample)


def _ours(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, backend: str, upsample: int
) -> Tensor:
    return modulated_batch_norm(
        x, gamma, beta, mean, var, training=True, momentum=MOMENTUM, eps=EPS,
        activation="relu", upsample=upsample, backend=backend,
    )  # fmt: skip


def _formula(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Before the ReLU."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    normalised = centred / (centred.square().mean((0, 2, 3), keepdim=True) + EPS).sqrt()
    return normalised * (1 + gamma)[:, :, None, None] + beta[:, :, None, None]


def _truth(x: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The formula in float64, its gradients, and the statistics after one step from 0 and 1.

    Where a rounding error would decide whether the ReLU is open, ``dy`` is set to 0.
    """
    inputs = [value.double().requires_grad_() for value in (x, gamma, beta)]
    upsample = dy.shape[2] // x.shape[2]
    z = _formula(*inputs).repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    dy[z.abs() < 1e-4] = 0
    y = z.clamp_min(0)
    gradients = torch.autograd.grad(y, inputs, dy.double())
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    running = {"mean": MOMENTUM * mean, "var": 1 + MOMENTUM * (var - 1)}
    found = dict(zip(("y", "dx", "dgamma", "dbeta"), (y.detach(), *gradients), strict=True))
    return found | running


# --- steps of training ----------------------------------------------------------------------------


def steps(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """One step of the experiment's pair: noise, images and first weights are the same for all."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.shape, generator=generator).to(device) * 2 - 1
    z = torch.randn(len(images), 32, generator=generator).to(device)

    def step(norm: Callable[..., Tensor] | None, dtype: torch.dtype) -> harness.Contender:
        trainer = _trainer(STEPS[case.op], images, norm, dtype)
        trainer.generator.register_forward_pre_hook(lambda G, noise: z.to(noise[0]))
        batch = images.to(dtype)

        def run() -> None:
            trainer.fit(lambda number: batch, trainer.step + 1, progress=False)

        return harness.Contender(run, {}, checked=partial(_gradients, trainer, run))

    truth = step(lambda x, gamma, beta, *_: _formula(x, gamma, beta).clamp_min(0), torch.float64)
    expected = dict(zip(("gradient of D", "gradient of G"), truth.checked(), strict=True))
    ways = {"eager": step(_eager, torch.float32), "auto": step(None, torch.float32)}
    return {n: harness.Contender(way.run, expected, checked=way.checked) for n, way in ways.items()}


def _trainer(
    kind: str, images: Tensor, norm: Callable[..., Tensor] | None, dtype: torch.dtype
) -> GANTrainer:
    size = images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        G = DCGANGenerator(size, 1, z_dim=32, width=32, norm=kind).to(images.device, dtype)
        D = SNDCGANDiscriminator(size, 1, width=16).to(images.device, dtype)
    if norm:
        for module in G.modules():
            if isinstance(module, _BatchNorm):
                module.forward = partial(_replaced, module, norm)
    return GANTrainer(G, D, loss="hinge")


def _replaced(
    module: nn.Module, norm: Callable[..., Tensor], x: Tensor, *condition: Tensor
) -> Tensor:
    module.num_batches_tracked.add_(1)
    running = module.running_mean, module.running_var
    if isinstance(module, ModulatedNorm2d):
        gamma, beta = module.gamma_beta(*condition)
        return norm(x, gamma - 1, beta, *running)
    if norm is _eager:  # plain batch norm has its scale and shift inside
        return F.relu(F.batch_norm(x, *running, module.weight, module.bias, True, MOMENTUM, EPS))
    return norm(x, module.weight[None] - 1, module.bias[None], *running)


def _gradients(trainer: GANTrainer, run: Callable[[], None]) -> list[Tensor]:
    """What the optimisers of D and G see in one step."""
    found = []

    def keep(optimiser: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimiser.param_groups
        found.append(torch.cat([p.grad.flatten() for p in group["params"]]))

    hooks = [each.register_step_pre_hook(keep) for each in (trainer.opt_d, trainer.opt_g)]
    run()
    for hook in hooks:
        hook.remove()
    return found


BENCHMARK = harness.Benchmark(
    "gan_architectures", cases, quick, missing, ("numba", "triton"), goals
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
