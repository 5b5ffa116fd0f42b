"""A thousand kills: does a loader that is killed and resumed give what an undisturbed one gives?

Fashion-MNIST with random crops, flips and noise. A consumer reads batches from `SafeLoader`, hashes
every augmented image, and saves rows and state after each batch. It is killed by SIGKILL at a
random moment: alone, together with its workers, or one worker only. The next consumer goes on from
the state, with another number of workers and of ranks. In the end the whole sequence of (epoch,
index, hash) is compared with the one of an undisturbed loader without workers.

The ranks of a run live in one process and step together, so that a state is saved at a boundary of
the global batch; the global batch stays the same whatever their number.

Beside it: how long an error takes that names the dead or hanging worker, and the same sequence from
the usual recipe for `DataLoader` (seed and order by epoch, skip what was delivered), which is only
stopped and started again, not even killed.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from cln_tutorial import datasets
from cln_tutorial.safe_generators.loader import SafeLoader, WorkerDied, WorkerTimeout
from experiments import harness

# A consumer is forked from a process that has imported all and done nothing: milliseconds, and no
# thread that could hold a lock.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["experiments.safe_generators"])

TARGETS = ("consumer alone", "consumer and workers", "one worker")
NAMED = 3  # exit code of a consumer that was told which worker died


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("kills",)
    images: str = "fashion_mnist"
    subset: int = 203  # no multiple of the batch: the last one is shared unevenly
    batch: int = 24  # of all ranks together
    workers: tuple[int, ...] = (0, 1, 2, 3, 4)
    ranks: tuple[int, ...] = (1, 2, 3, 4)
    kills: int = 1000  # over all seeds
    longest: float = 0.5  # seconds from a start to the kill
    broken: int = 12  # workers of each kind whose error is timed
    timeout: float = 1.0  # seconds, of the timed loaders
    resumes: int = 20  # of the plain recipe


QUICK = Settings(images="made", subset=53, kills=9, longest=0.3, broken=1, timeout=0.5, resumes=3)

_SAMPLES = {
    "lost": "samples of the undisturbed sequence that never came",
    "doubled": "samples that came more than once",
    "misplaced": "samples at another place of the sequence",
    "different": "samples whose augmented image has another hash",
}
_COUNTS = {
    "kills": "kills, or stops of the plain recipe",
    "samples": "samples delivered",
    **_SAMPLES,
}
_SAFE = {
    "unreadable states": "state files that could not be read after a kill",
    "orphans": "workers alive 2 s after the kill of their consumer",
}
_TARGET = {
    "kills": "kills",
    "before the first batch": "kills before the first batch was delivered",
}
_ERRORS = {
    "median": "seconds",
    "worst": "seconds",
    "errors": "errors timed",
    "right": "errors that name the very worker and sample",
}


def units(settings: Settings) -> dict[str, str]:
    """The unit of each figure, named "group-row.column": the book shows a group as a table."""
    found = _named("kill and resume", "SafeLoader", _COUNTS | _SAFE)
    found |= _named("kill and resume", "DataLoader", _COUNTS)
    for target in TARGETS:
        found |= _named("what was killed", target, _TARGET)
    found |= _named("what was killed", TARGETS[-1], {"named": "consumers told of a dead worker"})
    found |= _named("named error", "killed worker", _ERRORS)
    found |= _named("named error", "hanging worker, after its limit", _ERRORS)
    return found


PUBLISHED = [
    {
        "figure": f"kill and resume-SafeLoader.{column}",
        "value": None,
        "source": "documentation of torchdata 0.11, StatefulDataLoader",
        "comparable": False,
        "why": why,
    }
    for column, why in {
        "lost": "promises checkpoints within an epoch that go on after the batches yielded, "
        "without a count of kills, and says that states are not shared across ranks",
        "different": "leaves the random state of transforms to the state_dict that a data set may "
        "have; no figure",
    }.items()
]


def work(job: harness.Job) -> dict[str, Any]:
    """The figures of one seed. One that is killed begins anew."""
    settings = job.settings
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    pixels = images(settings)
    np.save(job.checkpoints / "images.npy", pixels)
    kills = len(range(settings.seeds.index(job.seed), settings.kills, len(settings.seeds)))
    figures = kill_and_resume(job.checkpoints, job.seed, settings, kills)
    figures |= in_child(plain_figures, job.checkpoints, job.seed, settings)
    for how, row in {"kill": "killed worker", "hang": "hanging worker, after its limit"}.items():
        found = in_child(timed_errors, how, settings)
        figures |= _named("named error", row, found)
    return figures


# --- kill and resume ------------------------------------------------------------------------------


class Images(Dataset):
    """Images with an augmentation that draws from a generator; an item is (pixels, index)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def getitem(self, index: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        """What `SafeLoader` calls, with the generator of the sample."""
        padded = np.pad(self.pixels[index], 2, mode="edge")
        top, left = rng.integers(5, size=2)
        image = padded[top : top + 28, left : left + 28]
        if rng.random() < 0.5:
            image = image[:, ::-1]
        noisy = image + rng.normal(0, 8, image.shape)
        return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)), index

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """What `DataLoader` calls; NumPy's global state is seeded by it in every worker."""
        return self.getitem(index, np.random.default_rng(np.random.randint(2**31)))  # noqa: NPY002


Row = tuple[int, int, str]  # epoch, index, hash of the augmented image


def rows_of(epoch: int, batch: tuple[torch.Tensor, torch.Tensor]) -> list[Row]:
    pixels, indices = batch
    hashes = (hashlib.blake2b(image.numpy(), digest_size=8).hexdigest() for image in pixels)
    return [(epoch, index, each) for index, each in zip(indices.tolist(), hashes, strict=True)]


class Log:
    """Rows and state of a run, as a training run keeps weights and state: both or none."""

    def __init__(self, folder: Path):
        self.rows_path, self.state_path = folder / "rows", folder / "state.json"

    def restore(self) -> dict[str, Any] | None:
        """The last state; rows that were written after it are taken back."""
        self.rows_path.touch()
        saved = json.loads(self.state_path.read_text()) if self.state_path.exists() else None
        os.truncate(self.rows_path, saved["bytes"] if saved else 0)
        return saved and saved["loader"]

    def save(self, rows: list[Row], state: dict[str, Any]) -> None:
        with self.rows_path.open("ab") as file:
            file.write("".join(f"{' '.join(map(str, row))}\n" for row in rows).encode())
        about = {"bytes": self.rows_path.stat().st_size, "loader": state}
        harness.write_atomically(self.state_path, json.dumps(about).encode())

    def size(self) -> int:
        return self.rows_path.stat().st_size if self.rows_path.exists() else 0

    def is_readable(self) -> bool:
        """Whether the state can be read; a run that was killed early has none."""
        try:
            return not self.state_path.exists() or "loader" in json.loads(
                self.state_path.read_text()
            )
        except ValueError:
            return False

    def epochs(self) -> int:
        """Epochs begun."""
        return max((epoch for epoch, *_ in self.rows()), default=0) + 1

    def rows(self) -> list[Row]:
        if not self.size():
            return []
        lines = (line.split() for line in self.rows_path.read_text().splitlines())
        return [(int(epoch), int(index), each) for epoch, index, each in lines]


def consume(
    folder: Path, seed: int, settings: Settings, workers: int, ranks: int, until: int | None
) -> None:
    """Go on from the last state, for ever or until an epoch; the process is there to be killed."""
    # A group of its own: whoever is left of it can be found, and killed together.
    os.setpgid(0, 0)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    log = Log(folder)
    state = log.restore()
    data = Images(np.load(folder / "images.npy", mmap_mode="r"))
    loaders = [
        SafeLoader(
            data,
            settings.batch // ranks,
            shuffle=True,
            seed=seed,
            num_workers=workers,
            rank=rank,
            world_size=ranks,
        )
        for rank in range(ranks)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    try:
        for epoch, batches in steps(loaders):
            if epoch == until:
                break
            rows = chain(*(rows_of(epoch, batch) for batch in batches if batch is not None))
            log.save(list(rows), loaders[0].state_dict())
    except WorkerDied:
        sys.exit(NAMED)
    finally:
        for loader in loaders:
            loader.close()


def steps(loaders: list[SafeLoader]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Epoch after epoch, what all ranks get in one step."""
    for _ in count():
        batches = zip_longest(*loaders)
        for step in batches:
            yield loaders[0].epoch, step


def kill_and_resume(folder: Path, seed: int, settings: Settings, kills: int) -> dict[str, float]:
    """Kill so many consumers, let the last one come to the end of an epoch, and compare."""
    rng, log = random.Random(seed), Log(folder)
    counts: Counter[Any] = Counter()
    groups: list[tuple[float, int]] = []  # when to look for orphans, and of which consumer
    for _ in range(kills):
        size = log.size()
        consumer = start(folder, seed, settings, rng.choice(settings.workers), rng)
        time.sleep(rng.uniform(0, settings.longest))
        target = kill(consumer, rng.choice(TARGETS), rng)
        groups.append((time.monotonic() + 2, consumer.pid))
        counts[target, "kills"] += 1
        counts[target, "before the first batch"] += log.size() == size
        counts[target, "named"] += consumer.exitcode == NAMED
        counts["unreadable states"] += not log.is_readable()
        while groups and groups[0][0] < time.monotonic():
            counts["orphans"] += len(members(groups.pop(0)[1]))
    last = start(folder, seed, settings, settings.workers[-1], rng, until=log.epochs())
    last.join()
    if last.exitcode != 0:
        raise RuntimeError(f"the last consumer ended with {last.exitcode}")
    for due, group in groups:
        time.sleep(max(due - time.monotonic(), 0))
        counts["orphans"] += len(members(group))
    found = log.rows()
    figures = {"kills": kills, "samples": len(found)}
    figures |= compared(found, undisturbed(folder, seed, settings, log.epochs()))
    figures |= {column: counts[column] for column in _SAFE}
    tables = _named("kill and resume", "SafeLoader", figures)
    for target in TARGETS:
        columns = [*_TARGET, *(["named"] if target == TARGETS[-1] else [])]
        counted = {column: counts[target, column] for column in columns}
        tables |= _named("what was killed", target, counted)
    return tables


def start(
    folder: Path,
    seed: int,
    settings: Settings,
    workers: int,
    rng: random.Random,
    until: int | None = None,
) -> Any:
    """A running consumer, with some number of ranks."""
    arguments = (folder, seed, settings, workers, rng.choice(settings.ranks), until)
    consumer = FORK.Process(target=consume, args=arguments)
    consumer.start()
    return consumer


def kill(consumer: Any, target: str, rng: random.Random) -> str:
    """Kill, wait for the consumer's end, and say what was killed: there may be no worker."""
    workers = [pid for pid in members(consumer.pid) if pid != consumer.pid]
    if target == "one worker" and workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)
        consumer.join(10)  # it ends by itself, or is counted as never told
    elif target == "consumer and workers" and workers:
        os.killpg(consumer.pid, signal.SIGKILL)
    else:
        target = "consumer alone"
    consumer.kill()
    consumer.join()
    return target


def members(group: int) -> list[int]:
    """The living processes of a process group, without zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, group_of = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group_of) == group and state not in "ZX":
                found.append(int(folder.name))
    return found


def undisturbed(folder: Path, seed: int, settings: Settings, epochs: int) -> list[Row]:
    """The rows of one process without workers that nobody kills."""
    data = Images(np.load(folder / "images.npy"))
    rows: list[Row] = []
    with SafeLoader(data, settings.batch, shuffle=True, seed=seed) as loader:
        for epoch in range(epochs):
            rows += chain(*(rows_of(epoch, batch) for batch in loader))
    return rows


def compared(found: list[Row], expected: list[Row]) -> dict[str, float]:
    """How many samples are lost, doubled, misplaced or different."""
    hashes = {row[:2]: row[2] for row in expected}
    times = Counter(row[:2] for row in found)
    places = zip_longest(found, expected, fillvalue=(None, None, None))
    return {
        "lost": len(hashes.keys() - times.keys()),
        "doubled": sum(n > 1 for n in times.values()),
        "misplaced": sum(a[:2] != b[:2] for a, b in places),
        "different": sum(hashes.get(row[:2]) != row[2] for row in found),
    }


# --- the usual recipe -----------------------------------------------------------------------------


def plain_figures(folder: Path, seed: int, settings: Settings) -> dict[str, float]:
    """The same for `DataLoader`, stopped between two batches and started again."""
    rng = random.Random(seed)
    data = Images(np.load(folder / "images.npy"))
    stops = [(rng.choice(settings.workers), rng.randint(1, 30)) for _ in range(settings.resumes)]
    found = plain_rows(data, seed, settings, stops)
    expected = plain_rows(data, seed, settings, [(2, sum(batches for _, batches in stops))])
    figures = {"kills": len(stops), "samples": len(found)} | compared(found, expected)
    return _named("kill and resume", "DataLoader", figures)


def plain_rows(
    data: Images, seed: int, settings: Settings, stops: list[tuple[int, int]]
) -> list[Row]:
    """Rows of a run that is started with so many workers and stopped after so many batches."""
    warnings.filterwarnings("ignore", "This DataLoader will create")
    rows: list[Row] = []
    per_epoch = -(-len(data) // settings.batch)
    position = 0
    for workers, batches in stops:
        stop = position + batches
        while position < stop:
            epoch, done = divmod(position, per_epoch)
            torch.manual_seed(seed + epoch)
            np.random.seed(seed + epoch)  # noqa: NPY002 - that is the recipe
            order = torch.randperm(len(data)).tolist()[done * settings.batch :]
            for batch in DataLoader(Subset(data, order), settings.batch, num_workers=workers):
                rows += rows_of(epoch, batch)
                position += 1
                if position == stop:
                    break
    return rows


# --- the error that names ------------------------------------------------------------------------


class Breaking(Dataset):
    """Its worker dies or hangs at one of the samples, and notes when."""

    def __init__(self, at: int, how: str):
        self.at, self.how = at, how
        self.moment = torch.zeros(1, dtype=torch.float64).share_memory_()

    def __len__(self) -> int:
        return 64

    def getitem(self, index: int, rng: np.random.Generator) -> int:
        """The index, but for one of them."""
        if index == self.at:
            self.moment[0] = time.monotonic()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return index


def timed_errors(how: str, settings: Settings) -> dict[str, float]:
    """Seconds from a worker's death to the error, or from its limit if it hangs."""
    seconds, right = [], 0
    for number in range(settings.broken):
        # Not in the first batch of a worker, whose limit is that of its start.
        data = Breaking(at=20 + 3 * number, how=how)
        loader = SafeLoader(data, 4, num_workers=2, timeout=settings.timeout)
        try:
            for _ in loader:
                pass
        except (WorkerDied, WorkerTimeout) as error:
            seconds.append(time.monotonic() - data.moment.item())
            right += error.index == data.at and isinstance(error, WorkerDied) == (how == "kill")
        finally:
            loader.close()
    if how == "hang":
        seconds = [each - settings.timeout for each in seconds]
    return {
        "median": statistics.median(seconds),
        "worst": max(seconds),
        "errors": len(seconds),
        "right": right,
    }


def in_child(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What a function returns in a fresh process that has one thread."""
    with ProcessPoolExecutor(1, mp_context=FORK) as pool:
        return pool.submit(function, *arguments).result()


# --- the data -------------------------------------------------------------------------------------


def images(settings: Settings) -> np.ndarray:
    """The first images of Fashion-MNIST's training side, or made ones."""
    if settings.images == "made":
        return np.random.default_rng(6575).integers(256, size=(settings.subset, 28, 28), dtype="u1")
    return datasets.load(settings.images, progress=False).train.images[: settings.subset]


def checksums(settings: Settings) -> dict[str, dict[str, str]]:
    if settings.images == "made":
        return {"made": {"images": hashlib.sha256(images(settings).tobytes()).hexdigest()}}
    return {settings.images: datasets.load(settings.images, progress=False).sha256}


def _named(group: str, row: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}-{row}.{column}": value for column, value in columns.items()}


EXPERIMENT = harness.Experiment(
    name="safe_generators",
    settings=Settings(),
    quick=QUICK,
    work=work,
    checksums=checksums,
    units=units,
    published=PUBLISHED,
)

if __name__ == "__main__":
    harness.main(EXPERIMENT)
