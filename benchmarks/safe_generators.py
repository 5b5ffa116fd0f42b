"""What safe loading costs: a whole epoch, the generator of a sample, and the order of an epoch.

*DataLoader* and *StatefulDataLoader* (torchdata) shuffle and collate the same data set without a
stream per sample; *DataLoader, default_rng* is the recipe that makes a NumPy generator from seed,
epoch and index in each sample. `ours, getitem` hands the sample its generator, `ours, global
states` sets the states of `random`, NumPy and PyTorch, so that transforms need no change.

    make bench NAME=safe_generators

A sample of the epochs is its own number, after no work at all or after the SHA-256 of 170,000
bytes, which takes 0.1 ms on the machine of the record. All workers are forked, and stay for the
next epoch. With workers only the time on the wall says something: the CPU time is that of the main
process.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from cln_tutorial.safe_generators import SafeLoader, SeededDataset, epoch_order, sample_generator

EPOCH, GENERATOR = "epoch of a loader", "generator of a sample"
ORDER, WHOLE = "first batch of an order", "whole order"
PLAIN, RECIPE, STATEFUL = "DataLoader", "DataLoader, default_rng", "StatefulDataLoader"
OURS, GLOBAL = "ours, getitem", "ours, global states"
DEFAULT_RNG, PHILOX, NEW, KEYED = "default_rng", "new Philox", "ours, new", "ours, in a data set"
RANDPERM, PERMUTATION = "torch.randperm", "ours"
NOTHING, WORK = "no work", "0.1 ms of work"
SEED, BATCH = 7, 64
PIECE = 4096  # indices that the order is asked for at a time, as the sampler does
HASHED = bytes(170_000)


def cases(device: str) -> list[harness.Case]:
    return _cases(idle=20_000, busy=4_000, generators=2_000, order=12_000_000)


def quick(device: str) -> list[harness.Case]:
    return _cases(idle=130, busy=66, generators=10, order=10_000_001)


def _cases(idle: int, busy: int, generators: int, order: int) -> list[harness.Case]:
    about = {"dtype": "int64", "contenders": on_epochs, "baseline": PLAIN}
    about |= {"limits": {"samples": 1e-12}}
    found = [
        harness.Case(EPOCH, (n,), mode=f"{work}, {workers} workers", **about)
        for work, n in ((NOTHING, idle), (WORK, busy))
        for workers in (0, 2)
    ]
    found.append(
        harness.Case(
            GENERATOR, (generators,), "float64", "keyed", on_generators, {"draws": 1e-15},
            baseline=DEFAULT_RNG,
        )
    )  # fmt: skip
    found += [
        harness.Case(
            op, (order,), "int64", "shuffled", on_orders, {"distinct, in range": 1e-15},
            baseline=RANDPERM,
        )
        for op in (ORDER, WHOLE)
    ]  # fmt: skip
    return found


def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    there = importlib.util.find_spec("torchdata")
    return {} if there else {STATEFUL: "torchdata is not installed"}


# --- the goals ------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    """What is promised; the record says whether it is kept, in its worst row."""
    return [
        harness.Goal(f"{WORK}: speed of `{OURS}` over {PLAIN}", 0.95, _least_speed),
        harness.Goal(
            f"{NOTHING}: microseconds per sample of `{OURS}` above {PLAIN}",
            5.0,
            _most_overhead,
            "at most",
        ),
        harness.Goal(f"{GENERATOR}: microseconds, {KEYED}", 3.0, _most_of_a_generator, "at most"),
    ]


def _least_speed(rows: list[harness.Row]) -> float | None:
    ratios = [
        row["contenders"][OURS][_clock(row)]["ratio"]["median"]
        for row in rows
        if row["op"] == EPOCH and row["mode"].startswith(WORK) and OURS in row["contenders"]
    ]
    return min(ratios, default=None)


def _most_overhead(rows: list[harness.Row]) -> float | None:
    found = []
    for row in rows:
        if row["op"] == EPOCH and row["mode"].startswith(NOTHING) and OURS in row["contenders"]:
            ours, plain = (row["contenders"][name][_clock(row)] for name in (OURS, PLAIN))
            found.append((ours["microseconds"] - plain["microseconds"]) / row["shape"][0])
    return max(found, default=None)


def _most_of_a_generator(rows: list[harness.Row]) -> float | None:
    found = [
        row["contenders"][KEYED]["cpu"]["microseconds"] / row["shape"][0]
        for row in rows
        if row["op"] == GENERATOR and KEYED in row["contenders"]
    ]
    return max(found, default=None)


def _clock(row: harness.Row) -> str:
    return "cpu" if row["mode"].endswith(" 0 workers") else "wall"


# --- a whole epoch --------------------------------------------------------------------------------


class Numbers(Dataset):
    """Each sample is its number, with or without work before it."""

    def __init__(self, length: int, works: bool = False):
        self.length, self.works = length, works

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if self.works:
            hashlib.sha256(HASHED).digest()
        return index


class OwnGenerator(Numbers):
    """The recipe: a generator for each sample, made inside it."""

    def __getitem__(self, index: int) -> int:
        np.random.default_rng((SEED, 0, index))
        return super().__getitem__(index)


class HandedGenerator(Numbers):
    """As our loader serves it."""

    def getitem(self, index: int, rng: np.random.Generator) -> int:
        return self[index]


def on_epochs(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    (length,) = case.shape
    workers = int(case.mode.split()[-2])
    works = case.mode.startswith(WORK)
    fork = {"multiprocessing_context": "fork", "persistent_workers": True} if workers else {}
    theirs = {"batch_size": BATCH, "shuffle": True, "num_workers": workers, **fork}
    ours = {"shuffle": True, "seed": SEED, "num_workers": workers, "start_method": "fork"}
    loaders = {
        PLAIN: DataLoader(Numbers(length, works), **theirs),
        RECIPE: DataLoader(OwnGenerator(length, works), **theirs),
        OURS: SafeLoader(HandedGenerator(length, works), BATCH, **ours),
        GLOBAL: SafeLoader(Numbers(length, works), BATCH, **ours),
    }
    if importlib.util.find_spec("torchdata"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        loaders[STATEFUL] = StatefulDataLoader(Numbers(length, works), **theirs)
    expected = {"samples": torch.arange(length, dtype=torch.float64)}
    return {
        name: harness.Contender(partial(_sorted_epoch, loader), expected)
        for name, loader in loaders.items()
    }


def _sorted_epoch(loader) -> list[Tensor]:
    return [torch.cat(list(loader)).sort().values]


# --- the generator of a sample --------------------------------------------------------------------


class FirstDraw(Numbers):
    """The first draw of a sample's generator."""

    def getitem(self, index: int, rng: np.random.Generator) -> float:
        return rng.random()


def on_generators(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    (length,) = case.shape
    data = SeededDataset(FirstDraw(length), seed=SEED)
    ways = {
        DEFAULT_RNG: lambda index: _default_rng(index).random(),
        PHILOX: lambda index: _philox(index).random(),
        NEW: lambda index: sample_generator(SEED, 0, index).random(),
        KEYED: data.__getitem__,
    }

    def draws(way: Callable[[int], float]) -> list[Tensor]:
        return [torch.tensor([way(index) for index in range(length)], dtype=torch.float64)]

    expected = {name: _philox for name in (PHILOX, NEW, KEYED)} | {DEFAULT_RNG: _default_rng}
    return {
        name: harness.Contender(
            partial(draws, way), {"draws": draws(lambda i, new=expected[name]: new(i).random())[0]}
        )
        for name, way in ways.items()
    }


def _default_rng(index: int) -> np.random.Generator:
    return np.random.default_rng((SEED, 0, index))


def _philox(index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[SEED, 0], counter=[0, 0, 0, index]))


# --- the order of an epoch ------------------------------------------------------------------------


def on_orders(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """What a resumed epoch waits for, the order and its first batch; or all batches of it."""
    (length,) = case.shape
    many = BATCH if case.op == ORDER else length

    def ours() -> list[Tensor]:
        order = epoch_order(length, SEED, 0)
        starts = range(0, many, PIECE)
        return [torch.as_tensor(order[start : min(start + PIECE, many)]) for start in starts]

    ways = {RANDPERM: lambda: [torch.randperm(length)[:many]], PERMUTATION: ours}

    def checked(way: Callable[[], list[Tensor]]) -> list[Tensor]:
        found = torch.cat(way())
        inside = ((found >= 0) & (found < length)).sum()
        return [torch.stack([torch.tensor(len(found.unique())), inside])]

    expected = {"distinct, in range": torch.tensor([many, many], dtype=torch.float64)}
    return {
        name: harness.Contender(way, expected, checked=partial(checked, way))
        for name, way in ways.items()
    }


BENCHMARK = harness.Benchmark(
    "safe_generators",
    cases,
    quick,
    missing,
    ("numpy", "torchdata"),
    goals,
    peers=(PLAIN, RECIPE, STATEFUL, DEFAULT_RNG, PHILOX, RANDPERM),
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
