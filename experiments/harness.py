"""What all experiments share: jobs of one thread, state that survives a kill, and the record.

An experiment is a list of jobs, one per seed and variant. A job runs on one thread, so its result
does not depend on how many workers share the list, nor on where it was killed and taken up again.

    python -m experiments.NAME                           one job per core at a time
    python -m experiments.NAME --device cuda
    torchrun --nproc-per-node 2 -m experiments.NAME      rank r takes every second job
"""

import argparse
import ast
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import threading
import time
import tokenize
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import distributed
from tqdm import tqdm

from cln_tutorial import _files, results
from cln_tutorial.weight_averaging import ExponentialMovingAverage

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One seed of one variant: what to compute, where, and where its state lies."""

    variant: str
    seed: int
    settings: Any
    device: str
    folder: Path
    quiet: bool = True
    part: str = "training"  # of the job, where it trains more than once
    started: float = 0.0  # on this process's clock, as if the job had never been interrupted

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / self.name

    @property
    def checkpoint(self) -> Path:
        return self.checkpoints / f"{self.part}.safetensors"

    @property
    def result(self) -> Path:
        return self.folder / f"{self.name}.json"


@dataclass(frozen=True)
class Experiment:
    """All that differs between experiments.

    Args:
        name: of the chapter.
        settings: frozen dataclass, with at least `seeds` and `variants`.
        quick: the same for a run of seconds that proves the machinery and measures nothing.
        tuning: the same for a run that compares settings, on texts held back from training.
        work: computes the figures of one job, and keeps its state in a `Checkpoint`.
        checksums: from the settings to the checksums of the data.
        units: from the settings to the unit of each figure.
        published: as in the record.
        texts: names of lists of texts that a job may give beside its figures; the record has those
            of the first seed.
    """

    name: str
    settings: Any
    quick: Any
    work: Callable[[Job], dict[str, Any]]
    checksums: Callable[[Any], dict[str, Any]]
    units: Callable[[Any], dict[str, str]]
    published: list[dict[str, Any]]
    texts: tuple[str, ...] = ()
    tuning: Any = None


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished yet and write the record."""
    chosen = _parse(experiment, arguments)
    settings = getattr(experiment, chosen.which)
    about = {
        "experiment": experiment.name,
        "command": _command(experiment.name, chosen),
        "code": code_hash(experiment.name),
        "data": experiment.checksums(settings),
        "versions": versions(),
        "device": device_words(chosen.device),
        "settings": asdict(settings),
    }
    folder = chosen.state / experiment.name / _fingerprint(about)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if chosen.device == "cuda" else "cpu"
    jobs = [
        Job(variant, seed, settings, device, folder, chosen.quiet)
        for seed in settings.seeds
        for variant in settings.variants
    ]
    finish = partial(_finish, experiment.work, fresh=chosen.fresh)
    if world == 1:
        finished = _run(finish, jobs, chosen.workers)
    else:
        finished = _share(finish, jobs, rank, world)
    if rank == 0:
        record = about | _measured(experiment, finished, settings)
        if chosen.output or chosen.which == "settings":
            write_record(experiment.name, record, chosen.output)
        if not chosen.quiet or chosen.which == "tuning":
            for figure, each in record["figures"].items():
                print(f"{figure}: {each['mean']:.5g} ± {each['standard_error']:.2g} {each['unit']}")
        # State is there to finish a run, not to spare the next one: a second run measures again.
        shutil.rmtree(folder, ignore_errors=True)


def write_record(name: str, record: results.Record, path: Path | None = None) -> None:
    """Check a record and write it to where the book reads it, or to `path`."""
    results.check(record)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path or ROOT / f"cln_tutorial/results/{name}.json", text.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all, and sweep what killed runs have left beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _files.write_atomically(path, content)
    finally:
        for leftover in path.parent.glob(f"{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


class Checkpoint:
    """The state of a training run in one safetensors file, restored bit for bit.

    Args:
        job: whose file it is. If the file is there, everything is restored from it.
        model, optimiser, generator: what the steps change. All randomness of the steps comes from
            the generator.
        every: steps between two savings.
        averages: of the weights, which the steps update.

    Attributes:
        step: steps done.
        figures: numbers that the steps carry along, such as a running mean; the bar shows those
            that are no cell of a table.
    """

    def __init__(
        self,
        job: Job,
        model: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        generator: torch.Generator,
        every: int = 50,
        averages: Sequence[ExponentialMovingAverage] = (),
    ):
        self.job, self.model, self.optimiser, self.generator = job, model, optimiser, generator
        self.every, self.step, self.averages = every, 0, averages
        self.figures: dict[str, float] = {}
        if job.checkpoint.exists():
            self._restore()

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps still to do, with a bar that shows `figures`."""
        bar = tqdm(
            desc=f"{self.job.name}, {self.job.part}",
            initial=self.step,
            total=total,
            disable=self.job.quiet,
            position=_worker_number(),
        )
        with bar:
            for step in range(self.step, total):
                yield step
                self.step = step + 1
                shown = {name: value for name, value in self.figures.items() if "." not in name}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if self.step % self.every == 0 or self.step == total:
                    self._save()

    def _save(self) -> None:
        optimiser = self.optimiser.state_dict()
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for number, state in optimiser["state"].items():
            tensors |= {f"optimiser.{number}.{key}": value for key, value in state.items()}
        tensors["generator"] = self.generator.get_state()
        averages = [average.state_dict() for average in self.averages]
        for number, state in enumerate(averages):
            tensors |= {f"average.{number}.{key}": value for key, value in state["tensors"].items()}
        about = {
            "averages": [state["about"] for state in averages],
            "step": self.step,
            "figures": self.figures,
            "seconds": time.perf_counter() - self.job.started,
            "param_groups": optimiser["param_groups"],
        }
        # Cloned, because safetensors refuses tied weights.
        tensors = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in tensors.items()
        }
        write_atomically(self.job.checkpoint, save(tensors, {"about": json.dumps(about)}))

    def _restore(self) -> None:
        about = _about(self.job.checkpoint)
        model, state = {}, {}
        averages: list[dict[str, Any]] = [{"about": a, "tensors": {}} for a in about["averages"]]
        with safe_open(self.job.checkpoint, framework="pt") as file:
            self.generator.set_state(file.get_tensor("generator"))
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                kind, _, rest = key.partition(".")
                # Cloned, because a slice of the file need not be aligned as a fresh tensor is, and
                # alignment can change the last bit of a sum.
                if kind == "model":
                    model[rest] = file.get_tensor(key).clone()
                elif kind == "optimiser":
                    number, _, name = rest.partition(".")
                    state.setdefault(int(number), {})[name] = file.get_tensor(key).clone()
                elif kind == "average":
                    number, _, name = rest.partition(".")
                    averages[int(number)]["tensors"][name] = file.get_tensor(key)
        for average, its_state in zip(self.averages, averages, strict=True):
            average.load_state_dict(its_state)
        self.model.load_state_dict(model)
        self.optimiser.load_state_dict({"state": state, "param_groups": about["param_groups"]})
        self.step, self.figures = about["step"], about["figures"]


def code_hash(name: str) -> str:
    """SHA-256 of a chapter's module (a file, or a folder of files) and its experiment."""
    return hash_files([*module_files(name), ROOT / "experiments" / f"{name}.py"])


def module_files(name: str) -> list[Path]:
    """The files of a chapter's module."""
    folder = ROOT / "cln_tutorial" / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def versions() -> dict[str, str]:
    """What the figures may depend on beside the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")},
    }


def device_words(device: str) -> str:
    """What the experiment runs on, in words: "2 CPU cores", or the name of the GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{_cores()} CPU cores"


def _parse(experiment: Experiment, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}", description="Write the chapter's record."
    )
    state = ROOT / "_build/experiments"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=_cores(), help="jobs at a time")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run finished")
    which = parser.add_mutually_exclusive_group()
    which.set_defaults(which="settings")
    for flag, what in {
        "quick": "made data, seconds, no record",
        "tuning": "compare settings on texts held back from training, no record",
    }.items():
        which.add_argument(f"--{flag}", action="store_const", const=flag, dest="which", help=what)
    parser.add_argument("--output", type=Path, help="write the record elsewhere")
    parser.add_argument("--state", type=Path, default=state, help="folder of the unfinished runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    chosen = parser.parse_args(arguments)
    if chosen.workers < 1:
        parser.error(f"--workers must be at least 1; got {chosen.workers}")
    if chosen.which == "tuning" and (chosen.output or experiment.tuning is None):
        parser.error("--tuning: this experiment has none, or `--output` was given: no record")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    return chosen


def _command(name: str, chosen: argparse.Namespace) -> str:
    flags = [f"--device {chosen.device}"] * (chosen.device != "cpu")
    flags += [f"--{chosen.which}"] * (chosen.which != "settings")
    if flags:
        return " ".join([f"python -m experiments.{name}", *flags])
    return f"make reproduce NAME={name}"


def _measured(
    experiment: Experiment, finished: list[dict[str, Any]], settings: Any
) -> dict[str, Any]:
    """Those fields of a record that come from the jobs, each figure with its values by seed."""
    figures = {}
    for figure, unit in experiment.units(settings).items():
        there = [job["figures"] for job in finished if figure in job["figures"]]
        values = [float(each[figure]) for each in there]  # counts, too
        if len(values) != len(settings.seeds):
            raise ValueError(
                f"{figure!r} was measured {len(values)} times for {len(settings.seeds)} seeds"
            )
        if len(values) > 1:
            figures[figure] = results.summarise(values, unit)
        else:  # of a tuning run: no record, which needs three, and no error either
            alone = {"values": values, "mean": values[0], "standard_error": math.nan}
            figures[figure] = alone | {"unit": unit}
    given = {name: job["figures"][name] for job in reversed(finished) for name in job["figures"]}
    texts = {name: given[name] for name in experiment.texts if name in given}
    return {
        "figures": figures,
        **({"texts": texts} if texts else {}),
        "seconds": round(sum(job["seconds"] for job in finished), 1),
        "published": experiment.published,
    }


def _run(finish: Callable[[Job], dict], jobs: list[Job], workers: int) -> list[dict]:
    if workers == 1:
        return [finish(job) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    workers = min(workers, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) as pool:
        return list(pool.map(finish, jobs))


def _share(finish: Callable[[Job], dict], jobs: list[Job], rank: int, world: int) -> list[dict]:
    end_with_parent()
    # Ranks wait for the slowest one, however long its jobs take.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    shares: list = [None] * world
    distributed.all_gather_object(shares, {job.name: finish(job) for job in jobs[rank::world]})
    distributed.destroy_process_group()
    finished = {name: result for share in shares for name, result in share.items()}
    return [finished[job.name] for job in jobs]


def _finish(work: Callable[[Job], dict[str, float]], job: Job, fresh: bool) -> dict[str, Any]:
    """The figures and seconds of a job; from its file, if an earlier run came to its end."""
    if fresh:
        job.result.unlink(missing_ok=True)
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    if not job.result.exists():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic, says CUDA
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        earlier = [_about(part)["seconds"] for part in job.checkpoints.glob("*.safetensors")]
        job = replace(job, started=time.perf_counter() - max(earlier, default=0.0))
        figures = work(job)
        result = {"figures": figures, "seconds": time.perf_counter() - job.started}
        write_atomically(job.result, json.dumps(result).encode())
    return json.loads(job.result.read_text())


def end_with_parent() -> None:
    """End this worker when its parent is gone: a killed run leaves nothing running."""
    spawner = multiprocessing.parent_process()
    parent = spawner.pid if spawner else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fingerprint(about: dict[str, Any]) -> str:
    """Of all that a result depends on; state with another fingerprint is never taken up."""
    shared = hash_files([Path(__file__), *module_files("datasets")])
    return hashlib.sha256(json.dumps([about, shared], sort_keys=True).encode()).hexdigest()[:16]


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over the names of Python files of the repository and the code in them."""
    digest = hashlib.sha256()
    for path in paths:
        content = _without_words(path.read_text(encoding="utf-8")).encode()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _without_words(source: str) -> str:
    """The source without docstrings and lines of comments, which change no result."""
    words = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=last):
                words.update(range(first, last + 1))
    lines = enumerate(source.split("\n"), 1)
    return "\n".join(line for number, line in lines if line.strip() and number not in words)


def _about(checkpoint: Path) -> dict[str, Any]:
    with safe_open(checkpoint, framework="pt") as file:
        return json.loads(file.metadata()["about"])


def _worker_number() -> int:
    identity = multiprocessing.current_process()._identity
    return identity[0] - 1 if identity else int(os.environ.get("LOCAL_RANK", 0))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
