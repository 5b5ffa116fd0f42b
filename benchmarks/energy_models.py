"""Many Langevin chains on known energies, and a network's, beside the libraries that sample.

`numba` and `reference` are the backends of `langevin_sample` and `mala_sample`; "auto" is `numba`
where numba is installed and the energy has a closed form. *eager* is what one writes in PyTorch:
`torch.autograd.grad` of the summed energy, and `torch.randn`. A call is so many steps of all
chains, as the mode says, with the result on the CPU.

    make bench NAME=energy_models

Peers are measured where they import, and named as missing where not. An environment with all:

    python -m venv peers
    peers/bin/pip install . numba jax blackjax torchebm
    peers/bin/python -m benchmarks.energy_models

All start from the same exact samples, so that the law after any number of steps is known but for
what neighbouring modes do to each other, which is less than the limits: the ring of eight normals
has the second moment 16 + 2 v and, around the nearest centre, the variance v, with
v = s^2 / (1 - h / (2 s^2)) without the accept step and v = s^2 with it. Their limits are 5 standard
errors of the many chains that the gate pools. JAX is kept to one thread, and is warm.
"""

import functools
import importlib
import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from cln_tutorial.energy_models import (
    GaussianEnergy,
    GaussianMixtureEnergy,
    contrastive_divergence_loss,
    langevin_sample,
    mala_sample,
)
from cln_tutorial.energy_models._checks import HAS_NUMBA

ULA, MALA, NETWORK = "Langevin on 8 modes", "MALA on 8 modes", "Langevin on a network"
VARIANCE = "stationary variance of N(0, 1) at step 0.5"
NAN_LOSS = "contrastive divergence with an energy of NaN"
EAGER, TORCHEBM, HEUN, SGLD, JAX = "eager", "torchebm", "torchebm, heun", "blackjax", "JAX"
BACKWARD, FROZEN = "backward()", "frozen parameters"
PEERS = (EAGER, TORCHEBM, HEUN, SGLD, JAX, BACKWARD, FROZEN)
OURS = ("numba", "reference")
CORRECTNESS = "correctness"

MODES, RADIUS, SIGMA = 8, 4.0, 0.5
STEP = 0.05
CHAINS = [256, 2048, 8192]
PROMISED = 2048  # chains for which more is promised
BATCH, WIDTH, PIXELS, K, SMALL_STEP = 128, 256, 64, 20, 0.0025
POOLED = 40_000  # chains of the gate
ERRORS = 5.0  # standard errors that the gate lets through

Sampler = Callable[[Tensor, int, int], Tensor]  # points, steps, seed


def cases(device: str) -> list[harness.Case]:
    return _cases(CHAINS, 200, (BATCH, PIXELS), K)


def quick(device: str) -> list[harness.Case]:
    return _cases([2048], 10, (8, PIXELS), 2)


def _cases(chains: list[int], steps: int, network: tuple[int, int], few: int) -> list[harness.Case]:
    # Relative errors of the mean of |x|^2, of standard deviation 2 R s, and of a variance of 2 n
    # numbers. The last hundredth is for the neighbours, who pull at the edge of a mode.
    moment = 2 * RADIUS * SIGMA / (RADIUS**2 + 2 * SIGMA**2) / math.sqrt(POOLED)
    limits = {"second moment": ERRORS * moment, "variance": ERRORS / math.sqrt(POOLED) + 0.01}
    found = [
        harness.Case(op, (n, 2), "float32", f"{steps} steps", on_modes, limits, EAGER)
        for op in (ULA, MALA)
        for n in chains
    ]
    limits = {"x": 1e-5}
    found.append(
        harness.Case(NETWORK, network, "float32", f"{few} steps", on_network, limits, EAGER)
    )
    about = {"dtype": "float32", "mode": CORRECTNESS, "baseline": "reference"}
    limits = {"variance": ERRORS * math.sqrt(2 / POOLED)}
    found.append(harness.Case(VARIANCE, (POOLED, 1), contenders=on_normal, limits=limits, **about))
    limits = {"1 + is a number": 0.5}
    found.append(harness.Case(NAN_LOSS, (4, 2), contenders=losses, limits=limits, **about))
    return found


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    found = {} if HAS_NUMBA else {"numba": "numba is not installed"}
    _one_thread_for_jax()
    for name, peers in [("jax", [JAX]), ("blackjax", [SGLD]), ("torchebm", [TORCHEBM, HEUN])]:
        try:
            importlib.import_module(name)
        except Exception as error:  # it may be there, and not fit the versions of the rest
            lines = str(error).splitlines() or [""]
            found |= dict.fromkeys(peers, f"{type(error).__name__}: {lines[0]}")
    return found


def _one_thread_for_jax() -> None:
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _there(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name not in missing("cpu")]


# --- the goals ------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    """What is promised; the record says whether it is kept, in its worst row."""
    wishes = [
        (ULA, EAGER, 14.0),
        (ULA, TORCHEBM, 16.0),
        (ULA, SGLD, 8.0),
        (ULA, JAX, 7.0),
        (MALA, SGLD, 8.0),
    ]
    found = [
        harness.Goal(f"{op}, {PROMISED:,} chains: numba over {peer}", wanted, _least(op, peer))
        for op, peer, wanted in wishes
    ]
    over = f"{NETWORK}: ours over {BACKWARD} with unfrozen parameters"
    return [*found, harness.Goal(over, 1.4, _least(NETWORK, BACKWARD, "reference"))]


def _least(op: str, peer: str, ours: str = "numba") -> Callable[[list[harness.Row]], float | None]:
    """Smallest ratio of ours to a peer, over both allocators."""

    def reached(rows: list[harness.Row]) -> float | None:
        found = []
        for row in rows:
            there = row["contenders"]
            promised = op == NETWORK or row["shape"][0] == PROMISED
            if row["op"] == op and promised and {ours, peer} <= there.keys():
                mine, other = (there[name]["cpu"]["ratio"]["median"] for name in (ours, peer))
                found.append(mine / other)
        return min(found, default=None)

    return reached


# --- closed forms ---------------------------------------------------------------------------------


def on_modes(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Chains on the ring of eight normals."""
    ring = GaussianMixtureEnergy.ring(MODES, RADIUS, SIGMA)
    n, steps = case.shape[0], int(case.mode.split()[0])
    v = SIGMA**2 if case.op == MALA else SIGMA**2 / (1 - STEP / (2 * SIGMA**2))
    expected = {"second moment": RADIUS**2 + 2 * v, "variance": v}
    expected = {name: torch.tensor(each).double() for name, each in expected.items()}
    start = ring.sample(max(n, POOLED), generator=torch.Generator().manual_seed(0))

    def contender(sampler: Sampler) -> harness.Contender:
        seeds = iter(range(10**9))

        def checked() -> list[Tensor]:
            # In the shape that is timed: a JIT compiles for it.
            parts = [sampler(part, 60, next(seeds)) for part in start.split(n) if len(part) == n]
            x = torch.cat(parts).double()
            nearest = torch.cdist(x, ring.means.double()).amin(-1)
            return [x.square().sum(-1).mean(), nearest.square().mean() / 2]

        return harness.Contender(
            lambda: [sampler(start[:n], steps, next(seeds))], expected, checked=checked
        )

    return {name: contender(each) for name, each in _samplers(case.op, ring).items()}


def _samplers(op: str, ring: GaussianMixtureEnergy) -> dict[str, Sampler]:
    ours = mala_sample if op == MALA else langevin_sample
    found: dict[str, Sampler] = {
        name: lambda x, steps, seed, name=name: ours(ring, x, STEP, steps, seed=seed, backend=name)
        for name in _there(OURS)
    }
    if op == MALA:
        found[EAGER] = _eager_mala
    else:
        found[EAGER] = _eager
        if TORCHEBM not in missing("cpu"):
            found[TORCHEBM] = partial(_torchebm, _torchebm_model(_energy))
    if JAX not in missing("cpu"):
        jax = importlib.import_module("jax")
        if op == ULA:
            found[JAX] = _jax_sampler(jax)
        if SGLD not in missing("cpu"):
            found[SGLD] = _blackjax_mala(jax) if op == MALA else _blackjax_sgld(jax)
    return found


def _centres() -> Tensor:
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], -1)


CENTRES = _centres()


def _energy(x: Tensor) -> Tensor:
    """Energy of the ring up to a constant, as one writes it: its gradient comes from autograd."""
    return -(-(x[:, None] - CENTRES).square().sum(-1) / (2 * SIGMA**2)).logsumexp(-1)


def _eager(x: Tensor, steps: int, seed: int) -> Tensor:
    del seed
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_energy(x).sum(), x)
        x = x - STEP * gradient + math.sqrt(2 * STEP) * torch.randn_like(x)
    return x.detach()


def _eager_mala(x: Tensor, steps: int, seed: int) -> Tensor:
    del seed

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = _energy(x)
        return energy.detach(), torch.autograd.grad(energy.sum(), x)[0]

    energy, gradient = both(x)
    for _ in range(steps):
        noise = torch.randn_like(x)
        y = x - STEP * gradient + math.sqrt(2 * STEP) * noise
        energy_y, gradient_y = both(y)
        back = (x - y + STEP * gradient_y).square().sum(-1) / (4 * STEP)
        ratio = energy - energy_y + noise.square().sum(-1) / 2 - back
        accepted = torch.rand_like(ratio).log() < ratio
        x = torch.where(accepted[:, None], y, x)
        gradient = torch.where(accepted[:, None], gradient_y, gradient)
        energy = torch.where(accepted, energy_y, energy)
    return x


def _torchebm_model(energy: Callable[[Tensor], Tensor]) -> Any:
    core = importlib.import_module("torchebm.core")

    class Model(core.BaseModel):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return energy(x)

    return Model()


def _torchebm(
    model: Any, x: Tensor, steps: int, seed: int, step: float = STEP, integrator: str | None = None
) -> Tensor:
    del seed
    samplers = importlib.import_module("torchebm.samplers")
    sampler = samplers.LangevinDynamics(model, step_size=step, integrator=integrator)
    return sampler.sample(x=x.clone(), n_steps=steps)


# --- JAX ------------------------------------------------------------------------------------------


def _jax_log_density(jax: Any) -> Callable[[Any], Any]:
    numpy = jax.numpy
    centres = numpy.asarray(CENTRES.numpy())

    def log_density(x: Any) -> Any:
        squares = ((x - centres) ** 2).sum(-1)
        return jax.scipy.special.logsumexp(-squares / (2 * SIGMA**2))

    return log_density


def _through_jax(jax: Any, run: Callable[[Any, Any, int], Any]) -> Sampler:
    compiled = jax.jit(run, static_argnums=2)

    def sampler(x: Tensor, steps: int, seed: int) -> Tensor:
        found = compiled(jax.random.key(seed), jax.numpy.asarray(x.numpy()), steps)
        return torch.from_dlpack(found.block_until_ready())

    return sampler


def _jax_sampler(jax: Any) -> Sampler:
    """The loop as one writes it in JAX: a scan whose step draws the noise of all chains."""
    scores = jax.vmap(jax.grad(_jax_log_density(jax)))

    def run(key: Any, x: Any, steps: int) -> Any:
        def step(x: Any, key: Any) -> Any:
            noise = jax.random.normal(key, x.shape)
            return x + STEP * scores(x) + math.sqrt(2 * STEP) * noise, None

        return jax.lax.scan(step, x, jax.random.split(key, steps))[0]

    return _through_jax(jax, run)


def _blackjax_sgld(jax: Any) -> Sampler:
    blackjax = importlib.import_module("blackjax")
    score = jax.grad(_jax_log_density(jax))
    sgld = blackjax.sgld(lambda x, batch: score(x))

    def run(key: Any, x: Any, steps: int) -> Any:
        def step(x: Any, key: Any) -> Any:
            keys = jax.random.split(key, len(x))
            return jax.vmap(lambda k, x: sgld.step(k, x, None, STEP))(keys, x), None

        return jax.lax.scan(step, x, jax.random.split(key, steps))[0]

    return _through_jax(jax, run)


def _blackjax_mala(jax: Any) -> Sampler:
    blackjax = importlib.import_module("blackjax")
    mala = blackjax.mala(_jax_log_density(jax), STEP)

    def run(key: Any, x: Any, steps: int) -> Any:
        def step(state: Any, key: Any) -> Any:
            keys = jax.random.split(key, len(x))
            return jax.vmap(mala.step)(keys, state)[0], None

        start = jax.vmap(mala.init)(x)
        return jax.lax.scan(step, start, jax.random.split(key, steps))[0].position

    return _through_jax(jax, run)


# --- networks -------------------------------------------------------------------------------------


def _network() -> nn.Module:
    torch.manual_seed(0)
    sizes = [PIXELS, WIDTH, WIDTH, WIDTH]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def on_network(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """A few steps on a perceptron; the gate takes them without noise, which all can."""
    network = _network()
    steps = int(case.mode.split()[0])
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    wide = _network().double()
    y = x.double()
    for _ in range(steps):
        y = y.requires_grad_()
        y = (y - SMALL_STEP * torch.autograd.grad(wide(y).sum(), y)[0]).detach()

    def ours(noise: float | None) -> Tensor:
        if noise is None:
            return langevin_sample(network, x, SMALL_STEP, steps, seed=0)
        return langevin_sample(network, x, SMALL_STEP, steps, noise)

    def loop(kind: str, noise: float | None) -> Tensor:
        scale = math.sqrt(2 * SMALL_STEP) if noise is None else noise
        for parameter in network.parameters():
            parameter.requires_grad_(kind != FROZEN)
        point = x.clone().requires_grad_()
        for _ in range(steps):
            energy = network(point).sum()
            if kind == EAGER:
                (gradient,) = torch.autograd.grad(energy, point)
            else:
                point.grad = None
                energy.backward()
                gradient = point.grad
            with torch.no_grad():
                point -= SMALL_STEP * gradient
                if scale:
                    point += scale * torch.randn_like(point)
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return point.detach()

    runs: dict[str, Callable[[float | None], Tensor]] = {"reference": ours}
    runs |= {kind: partial(loop, kind) for kind in (EAGER, BACKWARD, FROZEN)}
    return {
        name: harness.Contender(
            lambda run=run: [run(None)], {"x": y}, checked=lambda run=run: [run(0.0)]
        )
        for name, run in runs.items()
    }


# --- correctness ----------------------------------------------------------------------------------


def on_normal(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """The stationary variance at a large step: 4/3 by Euler's rule, whoever makes it."""
    step = 0.5
    exact = torch.tensor(1 / (1 - step / 2)).double()
    energy = GaussianEnergy(torch.zeros(1), 1.0)
    start = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    samplers: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: langevin_sample(energy, start, step, 40, seed=0, backend=name)
        for name in _there(OURS)
    }
    if TORCHEBM not in missing("cpu"):
        model = _torchebm_model(lambda x: x.square().sum(-1) / 2)
        for name, integrator in [(TORCHEBM, None), (HEUN, "heun")]:
            samplers[name] = partial(_torchebm, model, start, 40, 0, step, integrator)

    def contender(sampler: Callable[[], Tensor]) -> harness.Contender:
        def run() -> list[Tensor]:
            torch.manual_seed(0)  # peers draw from the global generator
            return [sampler().double().square().mean()]

        return harness.Contender(run, {"variance": exact})

    return {name: contender(each) for name, each in samplers.items()}


def losses(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """A loss of NaN must stay one, or be refused: a number in its place hides that all is lost."""

    def energy(x: Tensor) -> Tensor:
        return x.sum(-1) * math.nan

    points = torch.ones(case.shape)

    def ours() -> list[Tensor]:
        try:
            return [_is_number(contrastive_divergence_loss(energy, points, points))]
        except (RuntimeError, ValueError):
            return [_is_number(None)]

    def theirs() -> list[Tensor]:
        module = importlib.import_module("torchebm.losses")
        model = _torchebm_model(energy)
        samplers = importlib.import_module("torchebm.samplers")
        loss = module.ContrastiveDivergence(model, samplers.LangevinDynamics(model), k_steps=1)
        return [_is_number(loss(points)[0])]

    runs = {"reference": ours} | ({} if TORCHEBM in missing("cpu") else {TORCHEBM: theirs})
    expected = {"1 + is a number": torch.ones((), dtype=torch.float64)}
    return {name: harness.Contender(run, expected) for name, run in runs.items()}


def _is_number(loss: Tensor | None) -> Tensor:
    return torch.tensor(1.0 if loss is None else 1.0 + float(loss.detach().isfinite()))


BENCHMARK = harness.Benchmark(
    "energy_models",
    cases,
    quick,
    missing,
    ("numba", "numpy", "jax", "blackjax", "torchebm"),
    goals,
    peers=PEERS,
    pace=harness.Pace(rounds=15),
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
