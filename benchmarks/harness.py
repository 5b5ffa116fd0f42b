"""What all benchmarks share: the gate, the interleaved rounds, the clocks, and the record.

A benchmark is a list of cases (operation, shape, dtype, mode), each with contenders that compute
the same. A contender must first agree with a float64 result. Then every round times all of them in
a new order, and each round gives one ratio, baseline / contender: whatever slows the machine for a
while slows both. The record holds the quartiles of these ratios.

    python -m benchmarks.NAME                    on the CPU, one thread
    python -m benchmarks.NAME --device cuda
    python -m benchmarks.NAME --quick            tiny cases, seconds, no record

On the CPU all cases run twice, in child processes: with the allocator as it is, and with one that
keeps its memory. glibc gives tensors of some MB back to the system after each use, and the page
faults of the next allocation can cost as much as the operation itself.
"""

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cln_tutorial import results
from experiments import harness as runs

Row = dict[str, Any]
Seconds = dict[str, float]  # clock to seconds of one call
Stopwatch = Callable[[Callable[[], Any], int], Seconds]

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
SETTINGS = {
    "default": {},
    "fixed heap": {
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "MALLOC_TOP_PAD_": "268435456",
    },
}


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        run: what is timed; returns the results.
        expected: the same in float64 and in this order, from a formula that shares no code with
            it; by the names that the case gives limits to.
        forward: if given, its result's graph is searched for the memory that it keeps.
        checked: if given, what the gate calls in place of ``run``, once and before it: for what
            changes its input, starts from a known one and returns the results.
    """

    run: Callable[[], Sequence[Tensor] | None]
    expected: dict[str, Tensor]
    forward: Callable[[], Tensor] | None = None
    checked: Callable[[], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """One row of the record.

    Args:
        op, shape, dtype, mode: what is computed, of which input, and which passes.
        contenders: from the case and the device to its contenders by name. Called when the case is
            due, so that only one case holds memory. It goes to a child process, hence a function
            of a module.
        limits: by the name of a result, the largest error that is let through, relative to the
            largest entry of the float64 result.
        bound: name of the contender that does less, and that nobody is expected to beat.
        traffic: bytes that must be read and written, for the share of the bandwidth of a GPU.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    contenders: Callable[["Case", str], dict[str, Contender]]
    limits: dict[str, float]
    baseline: str = "eager"
    bound: str | None = None
    traffic: int | None = None

    @property
    def bytes(self) -> int:
        """Size of the input."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Goal:
    """A promise, and how to read from the rows what was reached; None if it was not measured."""

    what: str
    wanted: float
    reached: Callable[[list[Row]], float | None]
    sense: str = "at least"

    def entry(self, rows: list[Row]) -> dict[str, Any]:
        reached = self.reached(rows)
        about = {"what": self.what, "sense": self.sense, "wanted": self.wanted, "reached": reached}
        return about | {"met": results.meets(reached, self.sense, self.wanted)}


@dataclass(frozen=True)
class Pace:
    """How long to measure: rounds, and the shortest seconds of one timing."""

    rounds: int = 25
    shortest: float = 0.005


@dataclass(frozen=True)
class Benchmark:
    """All that differs between benchmarks.

    Args:
        name: of the chapter.
        cases, quick: from the device to the cases, and to tiny ones that prove the machinery.
        missing: from the device to the contenders that cannot run here, each with the reason.
        packages: those beside PyTorch whose versions the figures depend on.
        goals: from the device to its goals.
        peers: contenders of others. That one of them is refused is a finding, and no failure.
        pace: how long to measure.
    """

    name: str
    cases: Callable[[str], list[Case]]
    quick: Callable[[str], list[Case]]
    missing: Callable[[str], dict[str, str]]
    packages: Sequence[str]
    goals: Callable[[str], list[Goal]]
    peers: Sequence[str] = ()
    pace: Pace = Pace()


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> None:
    """Measure, merge this device's part into the record, print it; fail if a result was wrong."""
    chosen = _parse(benchmark, arguments)
    path = chosen.output or runs.ROOT / f"cln_tutorial/results/{benchmark.name}.benchmark.json"
    earlier = _read(path)  # before the work: what is there must not turn out wrong after it
    load, started = os.getloadavg(), time.perf_counter()
    cases = (benchmark.quick if chosen.quick else benchmark.cases)(chosen.device)
    pace = Pace(rounds=3, shortest=0.0005) if chosen.quick else benchmark.pace
    rows = []
    for setting in SETTINGS if chosen.device == "cpu" else ["default"]:
        rows += in_child(setting, _measure_all, cases, setting, chosen.device, pace, chosen.quiet)
    part = {
        "command": _command(benchmark.name, chosen),
        "versions": runs.versions() | _versions(benchmark.packages),
        "load": [round(each, 2) for each in load],
        "seconds": round(time.perf_counter() - started, 1),
        "threads": 1,
        "rounds": pace.rounds,
        "missing": benchmark.missing(chosen.device),
        "rows": rows,
        "goals": [goal.entry(rows) for goal in benchmark.goals(chosen.device)],
    }
    record = merge(earlier, benchmark.name, device_words(chosen.device), part)
    if chosen.output or not chosen.quick:
        write_record(record, path)
    if not chosen.quiet:
        print(results.speed_table(record, device_words(chosen.device)))
    refused = {name for row in rows for name in row["refused"]} - set(benchmark.peers)
    if refused:
        raise SystemExit(f"wrong, or raised an error, in some case: {', '.join(sorted(refused))}")


def merge(
    earlier: results.Record | None, name: str, device: str, part: dict[str, Any]
) -> results.Record:
    """The record with this device's part added or replaced; parts of older code say so."""
    others = {} if earlier is None else {k: v for k, v in earlier["devices"].items() if k != device}
    code = code_hash(name)
    if earlier and earlier["code"] != code:
        why = earlier.get("stale", f"measured with other code, {earlier['code'][:12]}")
        others = {device: {"stale": why} | other for device, other in others.items()}
    about = {"benchmark": name, "command": f"make bench NAME={name}", "code": code}
    return about | {"devices": others | {device: part}}


def write_record(record: results.Record, path: Path) -> None:
    """Check a record and write it."""
    results.check(record, "benchmark")
    text = json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    runs.write_atomically(path, text.encode())


def code_hash(name: str) -> str:
    """SHA-256 of a chapter's module (a file, or a folder of files), its kernels and benchmark."""
    kernels = runs.ROOT / f"cln_tutorial/kernels/{name}.py"
    files = [*runs.module_files(name), *([kernels] if kernels.exists() else [])]
    return runs.hash_files([*files, runs.ROOT / f"benchmarks/{name}.py"])


def device_words(device: str) -> str:
    """The model of CPU or GPU, because a ratio of speeds depends on it."""
    words, info = runs.device_words(device), Path("/proc/cpuinfo")
    if device == "cpu" and info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        words += f", {models[0].partition(':')[2].strip()}" if models else ""
    return words


# --- one case -------------------------------------------------------------------------------------


def measure(case: Case, device: str, pace: Pace) -> Row:
    """Gate, warm up and time the contenders of a case; return its row, without the setting."""
    contenders = case.contenders(case, device)
    passed, refused = gate(case, contenders)
    if case.baseline not in passed:
        raise RuntimeError(f"nothing to compare with: {case.baseline}, {refused[case.baseline]}")
    row = {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "mode": case.mode,
        "baseline": case.baseline,
        "contenders": {name: {"gate": verdict} for name, verdict in passed.items()},
        "refused": refused,
    }
    if case.bound in passed:
        row["bound"] = case.bound
    for name in passed:
        if contenders[name].forward:
            kept = kept_bytes(contenders[name].forward) / case.bytes
            row["contenders"][name]["kept"] = _short(kept)
    timed = {name: contenders[name].run for name in passed}
    del contenders  # the float64 results: half of the memory
    if device == "cuda" and case.traffic:
        source = torch.zeros(case.shape, dtype=getattr(torch, case.dtype), device=device)
        timed["copy"] = partial(torch.empty_like(source).copy_, source)
    add_times(row, case, time_rounds(timed, stopwatch(device), pace))
    return row


def add_times(row: Row, case: Case, times: dict[str, dict[str, list[float]]]) -> None:
    """Put what :func:`time_rounds` found into a row: each round gives one ratio and one share."""
    copied = times.pop("copy", None)
    for name, clocks in times.items():
        for clock, seconds in clocks.items():
            row["contenders"][name][clock] = {
                "microseconds": _short(1e6 * float(np.median(seconds))),
                "ratio": quartiles(np.divide(times[case.baseline][clock], seconds)),
            }
    if copied:
        speed = 2 * case.bytes / np.array(copied["cuda"])  # a copy reads and writes
        row["copy"] = {"gigabytes_per_second": quartiles(speed / 1e9)}
        for name, clocks in times.items():
            share = case.traffic / np.array(clocks["cuda"]) / speed
            row["contenders"][name]["share_of_copy"] = quartiles(share)


def gate(
    case: Case, contenders: dict[str, Contender]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Sort the contenders: those that are right, with their worst result, and why others are not.

    A contender that is wrong, or that raises, gets no figure.
    """
    passed, refused = {}, {}
    for name, contender in contenders.items():
        try:
            found = (contender.checked or contender.run)()
            verdict, numbers = _worst(found, contender.expected, case.limits)
        except Exception as error:  # a peer may raise anything; the others are measured
            lines = str(error).strip().splitlines() or [""]
            refused[name] = f"{type(error).__name__}: {lines[0][:200]}"
            continue
        if verdict["error"] <= verdict["limit"]:
            passed[name] = verdict
        else:
            words = "{result} is wrong by {error:.2g} of its largest entry, limit {limit:.2g}"
            refused[name] = words.format(**verdict) + numbers
    return passed, refused


def _worst(
    found: Sequence[Tensor], expected: dict[str, Tensor], limits: dict[str, float]
) -> tuple[dict[str, Any], str]:
    """The result that comes nearest to its limit, or furthest beyond it; if a number, in words."""
    verdicts = []
    for got, (name, want) in zip(found, expected.items(), strict=True):
        if got.shape != want.shape:
            raise ValueError(f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        scale = want.abs().amax().clamp_min(torch.finfo(want.dtype).tiny)
        error = ((got.detach().double() - want).abs().amax() / scale).item()
        error = error if math.isfinite(error) else float("inf")
        numbers = f": {got.item():.5f} in place of {want.item():.5f}" if got.numel() == 1 else ""
        verdict = {"result": name, "error": float(f"{error:.2g}"), "limit": limits[name]}
        verdicts.append((verdict, numbers))
    return max(verdicts, key=lambda each: each[0]["error"] / each[0]["limit"])


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of all storages that a forward pass keeps for the backward pass, each counted once."""
    kept = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        # With the tensor itself, so that no address is used twice while the graph lives.
        kept[storage.data_ptr()] = (storage.nbytes(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        result = forward()
    total = sum(size for size, _ in kept.values())
    del result
    return total


# --- time -----------------------------------------------------------------------------------------


def time_rounds(
    contenders: dict[str, Callable[[], Any]], stopwatch: Stopwatch, pace: Pace, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one call by contender and clock, one entry per round.

    Each round times every contender once, in an order drawn anew, each with as many calls as fill
    ``pace.shortest``.
    """
    calls = {name: _calls(run, stopwatch, pace) for name, run in contenders.items()}
    order, draw = list(contenders), random.Random(seed)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    with _without_garbage_collection():
        for _ in range(pace.rounds):
            draw.shuffle(order)
            for name in order:
                for clock, seconds in stopwatch(contenders[name], calls[name]).items():
                    times[name].setdefault(clock, []).append(seconds)
    return times


def _calls(run: Callable[[], Any], stopwatch: Stopwatch, pace: Pace) -> int:
    """Calls that fill one timing; finding them is the warm-up."""
    run()  # it may still have to compile
    calls = 1
    while True:
        shortest = calls * min(stopwatch(run, calls).values())
        if shortest >= pace.shortest:
            return calls
        # At most tenfold: the first calls are slower than the next ones.
        calls = min(10 * calls, math.ceil(1.2 * calls * pace.shortest / max(shortest, 1e-9)))


def stopwatch(device: str) -> Stopwatch:
    """What times some calls: CPU time and wall time, or the events of a GPU."""
    if device == "cpu":
        return _cpu_seconds
    # The second-level cache still holds the input of the call before; users' inputs come from
    # memory, so it is overwritten before each call.
    size = max(2 * torch.cuda.get_device_properties("cuda").L2_cache_size, 2**26)
    return partial(_cuda_seconds, torch.empty(size, dtype=torch.int8, device="cuda"))


def _cpu_seconds(run: Callable[[], Any], calls: int) -> Seconds:
    # Of all threads: a library may have its own.
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": cpu / calls, "wall": wall / calls}


def _cuda_seconds(cache: Tensor, run: Callable[[], Any], calls: int) -> Seconds:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return {"cuda": sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The three quartiles, as a record holds them."""
    found = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: _short(q) for name, q in zip(("q25", "median", "q75"), found, strict=True)}


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- child processes ------------------------------------------------------------------------------


def in_child(setting: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new process with one thread and a setting of `SETTINGS`.

    glibc and the thread pools read the environment when the process starts, and not later.
    """
    spawn = multiprocessing.get_context("spawn")
    with _environment(ONE_THREAD | SETTINGS[setting]):
        pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=runs.end_with_parent)
        with pool:
            return pool.submit(work, *arguments).result()


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("MALLOC_")]:
        del os.environ[name]  # "default" is the default of glibc, not that of this shell
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _measure_all(
    cases: list[Case], setting: str, device: str, pace: Pace, quiet: bool
) -> list[Row]:
    torch.set_num_threads(1)
    bar = tqdm(cases, desc=setting, disable=quiet)
    return [measure(case, device, pace) | {"setting": setting} for case in bar]


# --- the rest -------------------------------------------------------------------------------------


def _parse(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}",
        description="Write this device's part of the chapter's benchmark record.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny cases, seconds, no record")
    parser.add_argument("--output", type=Path, help="write the record elsewhere")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no table")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    return chosen


def _command(name: str, chosen: argparse.Namespace) -> str:
    flags = [f"--device {chosen.device}"] * (chosen.device != "cpu") + ["--quick"] * chosen.quick
    return " ".join([f"python -m benchmarks.{name}", *flags])


def _read(path: Path) -> results.Record | None:
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    results.check(record, "benchmark")
    return record


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")
