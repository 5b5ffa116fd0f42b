"""One update of an average of the weights, beside the libraries that have it.

A case is a model (tensors × weights in each), the dtypes of weights and average, and the number K
of averages. `numba`, `triton`, `auto` and `reference` are the backends of
`ExponentialMovingAverage(...).update()`, what users call; `ema_update_` is the function, which
makes its table of addresses anew each time. Of peers, which hold one average each, there are K. The
bound multiplies the averages by 1: it reads and writes them, and no weights.

    make bench NAME=weight_averaging
    python -m benchmarks.weight_averaging --device cuda

Peers are measured where they import, and named as missing where not. An environment with all:

    python -m venv peers
    peers/bin/pip install . numba ema-pytorch torch-ema diffusers   # on a GPU also: triton
    peers/bin/pip install --no-deps timm   # all of it imports torchvision; one file is needed
    peers/bin/python -m benchmarks.weight_averaging

All contenders of a case update the same memory, so that none is lucky with its place; the gate puts
the initial values there before each. It compares one update with the formula in float64. An average
that is rounded stochastically must be within one unit in the last place of it, and on average where
it should be: the moves, projected onto the exact ones, are 1 within six standard errors.

Rows of the mode "correctness" are tiny models whose averages are known in closed form: the gate's
verdict is the figure, and what is timed is one update of so small a model.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import harness
from cln_tutorial.weight_averaging import (
    ExponentialMovingAverage,
    available_backends,
    ema_update_,
)

FLOAT32, COMPENSATED, FLOAT64, STOCHASTIC = (
    "average in float32",
    "average in float32 with compensation",
    "average in float64",
    "average in bfloat16 with stochastic rounding",
)
DTYPES = {
    FLOAT32: torch.float32,
    COMPENSATED: torch.float32,
    FLOAT64: torch.float64,
    STOCHASTIC: torch.bfloat16,
}
TIED, SMALL_STEPS, EVERY_10 = (
    "tied weights: 10 updates at 0.9",
    "model in bfloat16: 1,000 updates at 0.999",
    "update_every 10: 100 steps at 0.99",
)
CORRECTNESS = "correctness"
DECAYS = (0.999, 0.99, 0.9995, 0.9999)  # the first is that of K=1
FEW, MANY = (8, 4_000_000), (380, 19_200)
SHAPES = {"cpu": [FEW, MANY], "cuda": [(16, 2**24), (380, 2**18), MANY]}
BOUND = "averages × 1"
BACKENDS = {"cpu": ("numba", "reference", "auto"), "cuda": ("triton", "reference", "auto")}
FAST = {"cpu": "numba", "cuda": "triton"}
ENTRIES = 4096  # of the tiny model that is rounded stochastically

# Relative to the largest entry. float32: a few roundings of 2^-24, and the decay of ema-pytorch,
# which is itself a float32. Compensated: the step, a thousandth, is a float32. bfloat16: 2^-7 of an
# entry is one unit in the last place or two.
LIMITS = {FLOAT32: 1e-6, COMPENSATED: 1e-9, FLOAT64: 1e-12, STOCHASTIC: 2.0**-7}
EXACT = 1e-12  # of what must be equal; a limit is above zero
# The variance of the projected moves is sum(step^2 * step * ulp) / sum(step^2)^2 at most. For
# standard normal weights and averages, a share of 0.001 and units of 2^-8 near 1: 2.5^2 / weights.
SIX_ERRORS_OF_THE_MOVE = 15.0
# Standard deviation of one such average after 1,000 updates: 0.011 (each rounding is by 2^-7 or by
# nothing). Six standard errors of the mean of 4,096 of them.
SIX_ERRORS_OF_THE_MEAN = 6 * 0.011 / math.sqrt(ENTRIES)


def cases(device: str) -> list[harness.Case]:
    return [*_speeds(SHAPES[device], device), *_verdicts(device)]


def quick(device: str) -> list[harness.Case]:
    return [*_speeds([(3, 64)], device), *_verdicts(device)]


def _speeds(shapes: list[tuple[int, int]], device: str) -> list[harness.Case]:
    kinds = [
        (FLOAT32, "float32", 1),
        (FLOAT32, "float32", 4),
        (FLOAT32, "bfloat16", 1),
        (FLOAT32, "bfloat16", 4),
        (STOCHASTIC, "bfloat16", 1),
        (COMPENSATED, "float32", 1),
        (FLOAT64, "float32", 1),
    ]
    found = []
    for op, dtype, averages in kinds:
        for shape in shapes:
            size = (2 if op == COMPENSATED else 1) * DTYPES[op].itemsize
            traffic = getattr(torch, dtype).itemsize + 2 * averages * size
            limits = dict.fromkeys(map(str, DECAYS[:averages]), LIMITS[op])
            limits |= {"move": SIX_ERRORS_OF_THE_MOVE / math.sqrt(math.prod(shape))}
            case = harness.Case(
                op,
                shape,
                dtype,
                f"K={averages}",
                contenders,
                limits | {"averages": EXACT},
                baseline="reference" if op == COMPENSATED else _baseline(device),
                bound=BOUND,
                traffic=traffic * math.prod(shape),
            )
            found.append(case)
    return found


def _verdicts(device: str) -> list[harness.Case]:
    limits = {"average": 1e-6, "mean": SIX_ERRORS_OF_THE_MEAN}
    about = {"mode": CORRECTNESS, "contenders": verdicts, "limits": limits, "baseline": "reference"}
    return [
        harness.Case(TIED, (2,), "float32", **about),
        harness.Case(SMALL_STEPS, (ENTRIES,), "bfloat16", **about),
        harness.Case(EVERY_10, (1,), "float32", **about),
    ]


def _baseline(device: str) -> str:
    return "reference" if "timm" in missing(device) else "timm"


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    found = {}
    for shape in SHAPES[device]:
        if _too_slow("reference", STOCHASTIC, shape, device):
            found[f"reference at {shape} with stochastic rounding"] = "seconds for each update"
    if FAST[device] not in available_backends():
        found[FAST[device]] = "not among `available_backends()`"
    for name, load in LIBRARIES.items():
        try:
            load()
        except Exception as error:  # it may be there, and not fit the versions of the rest
            lines = str(error).splitlines() or [""]
            found[name] = f"{type(error).__name__}: {lines[0]}"
    return found


# --- the goals ------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    """What is promised on this device; the record says whether it is kept, in its worst row."""
    fast, loop = FAST[device], "timm, loop"
    if device == "cpu":
        wanted = {"level": 0.95, "four": 1.25, "half": (2.3, 1.8), "four half": (3.5, 2.4)}
        wanted["stochastic"] = 15.0
    else:
        wanted = {"level": 0.95, "four": 1.25, "half": (1.8, 1.8), "four half": (2.1, 2.1)}
        wanted["stochastic"] = 10.0
    best = "the best peer"
    listed = [
        ("float32, K=1", (FLOAT32, "float32", 1), best, None, wanted["level"]),
        ("float32, K=4", (FLOAT32, "float32", 4), best, None, wanted["four"]),
    ]
    for what, key, averages in [("K=1", "half", 1), ("K=4", "four half", 4)]:
        row = (FLOAT32, "bfloat16", averages)
        for words, peer, ratio in zip(
            ("timm's default path", "timm's loop path"), ("timm", loop), wanted[key], strict=True
        ):
            listed.append((f"bfloat16 weights, float32 average, {what}", row, words, [peer], ratio))
    stochastic = (STOCHASTIC, "bfloat16", 1)
    words = "the faster path of timm"
    listed.append(
        ("bfloat16, stochastic rounding", stochastic, words, ["timm", loop], wanted["stochastic"])
    )
    return [
        harness.Goal(f"{fast} over {words}: {what}", ratio, _least(fast, row, peers))
        for what, row, words, peers, ratio in listed
    ]


def _least(
    name: str, kind: tuple[str, str, int], peers: list[str] | None
) -> Callable[[list[harness.Row]], float | None]:
    """Smallest ratio to the fastest of some peers over all rows of a kind, both allocators."""

    def reached(rows: list[harness.Row]) -> float | None:
        found = []
        for row in rows:
            present = row["contenders"]
            if (row["op"], row["dtype"], row["mode"]) != (kind[0], kind[1], f"K={kind[2]}"):
                continue
            others = [_ratio(present[peer]) for peer in peers or PEERS if peer in present]
            if name in present and others:
                found.append(_ratio(present[name]) / max(others))
        return min(found, default=None)

    return reached


def _ratio(contender: harness.Row) -> float:
    return contender["cuda" if "cuda" in contender else "cpu"]["ratio"]["median"]


# --- the libraries --------------------------------------------------------------------------------


class Averages(NamedTuple):
    """How to update, and for each average the tensors that hold it, in the model's order."""

    update: Callable[[], Any]
    tensors: list[list[Tensor]]


def _ours(
    model: nn.Module,
    decays: Sequence[float],
    dtype: torch.dtype | str,
    backend: str,
    **options: Any,
) -> Averages:
    average = ExponentialMovingAverage(
        model,
        list(decays),
        bias_correction=False,
        dtype=dtype,
        backend=backend,
        **options,
    )
    held = [list(average.named_averages(name).values()) for name in average.profiles]
    return Averages(average.update, held)


def _torch(model: nn.Module, decay: float, dtype: torch.dtype) -> Averages:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.module.to(dtype)
    average.update_parameters(model)  # the first one copies
    return Averages(partial(average.update_parameters, model), [list(average.module.parameters())])


@functools.cache
def _timm_module() -> ModuleType:
    package = importlib.util.find_spec("timm")
    if package is None:
        raise ModuleNotFoundError("No module named 'timm'")
    path = Path(package.submodule_search_locations[0]) / "utils/model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _timm(
    model: nn.Module, decay: float, dtype: torch.dtype, foreach: bool, rounding: bool = True
) -> Averages:
    average = _timm_module().ModelEmaV3(
        model, decay=decay, dtype=dtype, foreach=foreach, stochastic_rounding=rounding
    )
    return Averages(partial(average.update, model), [list(average.module.parameters())])


def _ema_pytorch(
    model: nn.Module, decay: float, dtype: torch.dtype, foreach: bool, every: int = 1
) -> Averages:
    average = importlib.import_module("ema_pytorch").EMA(
        model,
        ema_model=deepcopy(model).to(dtype),
        beta=decay,
        min_value=decay,  # its warm-up switched off
        update_after_step=0,
        update_every=every,
        use_foreach=foreach,
        coerce_dtype=True,
    )
    average.update()  # the first one copies
    return Averages(average.update, [list(average.ema_model.parameters())])


def _torch_ema(model: nn.Module, decay: float, dtype: torch.dtype) -> Averages:
    average = importlib.import_module("torch_ema").ExponentialMovingAverage(
        model.parameters(), decay, use_num_updates=False
    )
    average.to(dtype=dtype)
    # Given the parameters: the references that it keeps by itself are weak.
    return Averages(lambda: average.update(model.parameters()), [average.shadow_params])


def _diffusers(model: nn.Module, decay: float, dtype: torch.dtype, foreach: bool) -> Averages:
    average = importlib.import_module("diffusers.training_utils").EMAModel(
        model.parameters(), decay=decay, min_decay=decay, foreach=foreach
    )
    average.to(dtype=dtype)
    average.step(model.parameters())  # the first one copies
    return Averages(lambda: average.step(model.parameters()), [average.shadow_params])


LIBRARIES: dict[str, Callable[[], Any]] = {
    "timm": _timm_module,
    "ema-pytorch": lambda: importlib.import_module("ema_pytorch").EMA,
    "torch-ema": lambda: importlib.import_module("torch_ema").ExponentialMovingAverage,
    "diffusers": lambda: importlib.import_module("diffusers.training_utils").EMAModel,
}
PEERS: dict[str, Callable[..., Averages]] = {
    "timm": partial(_timm, foreach=True),
    "timm, loop": partial(_timm, foreach=False),
    "AveragedModel": _torch,
    "ema-pytorch": partial(_ema_pytorch, foreach=False),
    "ema-pytorch, foreach": partial(_ema_pytorch, foreach=True),
    "torch-ema": _torch_ema,
    "diffusers": partial(_diffusers, foreach=False),
    "diffusers, foreach": partial(_diffusers, foreach=True),
}
NEAREST = "timm, stochastic_rounding=False"


def _peers(device: str) -> dict[str, Callable[..., Averages]]:
    absent = missing(device)
    return {name: make for name, make in PEERS.items() if name.partition(",")[0] not in absent}


def _backends(device: str) -> list[str]:
    return [name for name in BACKENDS[device] if name not in missing(device)]


# --- one update -----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.tensors = nn.ParameterList(map(nn.Parameter, tensors))


def contenders(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """All contenders of a case on the same random weights, and in the same memory."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.op]
    decays = DECAYS[: int(case.mode.removeprefix("K="))]
    weights, initial = (
        torch.randn(case.shape, generator=generator, device=device).to(kind)
        for kind in (getattr(torch, case.dtype), dtype)
    )
    shared = torch.empty((len(decays), *case.shape), dtype=dtype, device=device)
    model = Model(list(weights))
    way = partial(_contender, model, initial, shared, _truth(weights, initial, decays))

    found = {}
    for backend in _backends(device):
        if _too_slow(backend, case.op, case.shape, device):
            continue
        options = {"backend": backend, "compensated": case.op == COMPENSATED}
        found[backend] = way(partial(_ours, model, decays, dtype, **options), case.op)
    places = [list(each) for each in shared]
    if case.op in (FLOAT32, STOCHASTIC):
        found["ema_update_"] = way(
            lambda: Averages(_function(places, list(weights), decays, case.op), places), case.op
        )
    if case.op != COMPENSATED:
        peers = _peers(device)
        if case.op == STOCHASTIC:  # which the others have not
            peers = {name: make for name, make in peers.items() if name.startswith("timm")}
        for name, make in peers.items():
            found[name] = way(partial(_one_each, make, model, decays, dtype), case.op)
    unchanged = {"averages": initial.double().expand(shared.shape)}
    flat = [tensor for each in places for tensor in each]

    def multiply() -> list[Tensor]:
        torch._foreach_mul_(flat, 1.0)
        return [shared]

    def start_and_multiply() -> list[Tensor]:
        shared.copy_(initial.expand_as(shared))
        return multiply()

    found[BOUND] = harness.Contender(multiply, unchanged, checked=start_and_multiply)
    return found


def _too_slow(backend: str, op: str, shape: tuple[int, ...], device: str) -> bool:
    large = op == STOCHASTIC and math.prod(shape) > 10**7
    return large and backend == "reference" and device == "cpu"


def _truth(weights: Tensor, initial: Tensor, decays: Sequence[float]) -> dict[str, Tensor]:
    """One update in float64, by the other form of the formula."""
    old, new = initial.double(), weights.double()
    return {str(decay): decay * old + (1 - decay) * new for decay in decays}


def _contender(
    model: nn.Module,
    initial: Tensor,
    shared: Tensor,
    truth: dict[str, Tensor],
    make: Callable[[], Averages],
    op: str,
) -> harness.Contender:
    # Made in the gate, which writes down what a library raises.
    made = functools.cache(lambda: _placed(make(), shared))
    expected = truth
    if op == STOCHASTIC:
        expected = truth | {"move": torch.ones((), dtype=torch.float64, device=shared.device)}

    def checked() -> list[Tensor]:
        averages = made()
        shared.copy_(initial.expand_as(shared))
        averages.update()
        if op == COMPENSATED:
            return [torch.stack(_in_full(averages.update.__self__))]
        if op != STOCHASTIC:
            return list(shared)
        old, (exact,) = initial.double(), truth.values()
        step = exact - old
        return [shared[0], (shared[0].double() - old).mul(step).sum() / step.square().sum()]

    return harness.Contender(lambda: made().update(), expected, checked=checked)


def _in_full(average: ExponentialMovingAverage) -> list[Tensor]:
    return list(average.named_averages(dtype=torch.float64).values())


def _placed(averages: Averages, shared: Tensor) -> Averages:
    for tensors, places in zip(averages.tensors, shared, strict=True):
        for tensor, place in zip(tensors, places, strict=True):
            tensor.data = place
    return averages


def _one_each(
    make: Callable[..., Averages], model: nn.Module, decays: Sequence[float], dtype: torch.dtype
) -> Averages:
    """One object per average."""
    each = [make(model, decay, dtype) for decay in decays]
    if len(each) == 1:
        return each[0]

    def update() -> None:
        for one in each:
            one.update()

    return Averages(update, [one.tensors[0] for one in each])


def _function(
    places: list[list[Tensor]], weights: list[Tensor], decays: Sequence[float], op: str
) -> Callable[[], None]:
    shares = [1 - decay for decay in decays]
    rounding = "stochastic" if op == STOCHASTIC else "nearest"
    return lambda: ema_update_(places, weights, shares, rounding=rounding)


# --- known averages -------------------------------------------------------------------------------


class Tied(nn.Module):
    """A weight under two names."""

    def __init__(self, device: str):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, device=device))
        self.head = self.embedding


def verdicts(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Averages of weights that jump once and then stay: 1 - decay^steps of the jump."""
    make = {TIED: _tied, SMALL_STEPS: _small_steps, EVERY_10: _every_10}[case.op]
    return make(device)


def _tied(device: str) -> dict[str, harness.Contender]:
    makers = {
        name: lambda model, backend=name: _ours(model, [0.9], torch.float32, backend)
        for name in _backends(device)
    }
    for name, make in _peers(device).items():
        makers[name] = lambda model, make=make: make(model, 0.9, torch.float32)
    model = partial(Tied, device)
    return {name: _known(model, make, 1.0, 10, 0.9) for name, make in makers.items()}


def _small_steps(device: str) -> dict[str, harness.Contender]:
    def model() -> nn.Module:
        return Model([torch.ones(ENTRIES, dtype=torch.bfloat16, device=device)])

    def known(make: Callable[[nn.Module], Averages], mean: bool = False) -> harness.Contender:
        return _known(model, make, 1.0625, 1000, 0.999, mean)

    half, found = torch.bfloat16, {}
    for name in _backends(device):
        found[name] = known(lambda m, name=name: _ours(m, [0.999], "auto", name))
        found[f"{name}, in bfloat16"] = known(
            lambda m, name=name: _ours(m, [0.999], half, name), mean=True
        )
    for name, make in _peers(device).items():
        found[name] = known(lambda m, make=make: make(m, 0.999, half), mean=name.startswith("timm"))
    if "timm" in found:
        found[NEAREST] = known(
            lambda m: _timm(m, 0.999, half, foreach=True, rounding=False), mean=True
        )
    return found


def _every_10(device: str) -> dict[str, harness.Contender]:
    def model() -> nn.Module:
        return Model([torch.zeros(1, device=device)])

    makers = {
        name: lambda m, name=name: _ours(m, [0.99], torch.float32, name, update_every=10)
        for name in _backends(device)
    }
    for name in ("ema-pytorch", "ema-pytorch, foreach"):
        if name in _peers(device):
            makers[name] = lambda m, make=PEERS[name]: make(m, 0.99, torch.float32, every=10)
    return {name: _known(model, make, 1.0, 100, 0.99) for name, make in makers.items()}


def _known(
    model: Callable[[], nn.Module],
    make: Callable[[nn.Module], Averages],
    target: float,
    steps: int,
    decay: float,
    mean: bool = False,
) -> harness.Contender:
    """Of a weight that jumps to ``target`` before ``steps`` updates."""

    @functools.cache
    def made() -> tuple[nn.Module, Averages]:
        fresh = model()
        return fresh, make(fresh)

    start = next(model().parameters()).flatten()[0].item()
    right = start + (target - start) * (1 - decay**steps)

    def checked() -> list[Tensor]:
        fresh, averages = made()
        with torch.no_grad():
            for weight in fresh.parameters():
                weight.fill_(target)
        for _ in range(steps):
            averages.update()
        found = averages.tensors[0][0].detach().double()
        return [found.mean() if mean else found.flatten()[0]]

    device = next(model().parameters()).device
    expected = {"mean" if mean else "average": torch.tensor(right, device=device).double()}
    return harness.Contender(lambda: made()[1].update(), expected, checked=checked)


BENCHMARK = harness.Benchmark(
    "weight_averaging",
    cases,
    quick,
    missing,
    ("numba", "triton", "timm", "ema-pytorch", "torch-ema", "diffusers"),
    goals,
    peers=(*PEERS, NEAREST),
    pace=harness.Pace(rounds=11),
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
