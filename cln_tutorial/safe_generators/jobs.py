"""What a worker does with a task: a batch of keyed samples, or the next one of a stream.

A job runs in a worker or, with no workers, in the process of the user: the same code, hence the
same samples. It notes the position in the batch before each sample, so that a death can be named.
"""

import contextlib
import itertools
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils.data import default_collate

from cln_tutorial.safe_generators.streams import SampleKey, SeededDataset, batch_states

ATTEMPTS = 3  # of on_error="retry", per sample and per batch


class Task(NamedTuple):
    """A batch to be made; ``indices`` None: nothing to do."""

    generation: int
    serial: int
    epoch: int
    indices: Any


class Failure(NamedTuple):
    """An exception on its way from a worker: itself, if it can be pickled, and its text."""

    pickled: bytes | None
    name: str
    text: str
    worker: int
    pid: int
    key: Any


class MapJob:
    """Make batches of a ``SeededDataset``, with keys (epoch, index).

    Returns the batch, and the samples that were left out as pairs (key, error). A batch of which
    nothing is left is None.
    """

    def __init__(
        self, dataset: SeededDataset, collate_fn: Callable[[list], Any], on_error: str = "raise"
    ):
        self.dataset, self.collate_fn, self.on_error = dataset, collate_fn, on_error

    def __call__(
        self, task: Task, worker: int, board: Any, place: int
    ) -> tuple[Any, list[tuple[SampleKey, str]]]:
        """One batch; ``board[place]`` always holds the position of the sample in work."""
        dataset, epoch, samples, left_out = self.dataset, task.epoch, [], []
        with dataset.restored():
            for position, index in enumerate(task.indices):
                board[place] = position
                key = SampleKey(epoch, index)
                try:
                    samples.append(dataset[key])
                except Exception as error:
                    if self.on_error == "raise":
                        raise
                    if self.on_error == "retry":
                        samples.append(self._again(key))
                    else:
                        left_out.append((key, f"{type(error).__name__}: {error}"))
        board[place] = len(task.indices)
        if not samples:
            return None, left_out
        where = dataset.seed, epoch, task.indices[0]
        return _collated(self.collate_fn, samples, *where), left_out

    def _again(self, key: SampleKey) -> Any:
        for _ in range(ATTEMPTS - 2):
            with contextlib.suppress(Exception):
                return self.dataset[key]
        return self.dataset[key]

    def key_at(self, task: Task, position: int) -> Any:
        """The sample at a position of a task; None while the batch is put together."""
        return task.indices[position] if 0 <= position < len(task.indices) else None

    def batch_of(self, task: Task) -> list[Any]:
        """The samples of a task."""
        return list(task.indices)


class StreamJob:
    """Make batches of a ``ShardedIterable``; each worker is a consumer of its own.

    The tasks hold what was delivered before this generation. Returns the batch, and as the extra
    the number of items delivered by shard, with the consumer if it has come to its end.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list], Any],
        batch_size: int,
        drop_last: bool,
        workers: int,
    ):
        self.dataset, self.collate_fn, self.batch_size = dataset, collate_fn, batch_size
        self.drop_last, self.workers = drop_last, workers
        self.generation = 0
        self.items: Iterator[Any] = iter(())

    def __call__(
        self, task: Task, worker: int, board: Any, place: int
    ) -> tuple[Any, tuple[dict[int, int], int | None]]:
        """The next batch of this consumer."""
        if self.generation != task.generation:
            world = self.dataset.world_size
            consumer = worker * world + self.dataset.rank
            self.items = self.dataset.iterate(
                task.epoch, consumer, self.workers * world, task.indices
            )
            self.generation = task.generation
        found = list(itertools.islice(self.items, self.batch_size))
        progress = {shard: position + 1 for shard, position, _ in found}
        full = len(found) == self.batch_size
        if not found or (self.drop_last and not full):
            return None, (progress, worker)
        shard, position, _ = found[0]
        where = self.dataset.seed, task.epoch, shard * 2**40 + position
        batch = _collated(self.collate_fn, [item for _, _, item in found], *where)
        return batch, (progress, None if full else worker)

    def key_at(self, task: Task, position: int) -> Any:
        """Unknown: the items of a stream have no numbers."""

    def batch_of(self, task: Task) -> list[Any]:
        """Unknown, likewise."""
        return []


def _collated(
    collate_fn: Callable[[list], Any], samples: list[Any], seed: int, epoch: int, first: int
) -> Any:
    """The batch; what ``collate_fn`` draws is a function of the seed, the epoch and its samples."""
    if collate_fn is default_collate:  # it draws nothing
        return collate_fn(samples)
    with batch_states(seed, epoch, first):
        return collate_fn(samples)


def reraise(failure: Failure) -> NoReturn:
    """Raise in this process what a worker met, with its place and its traceback as a note."""
    where = f"in worker {failure.worker} (pid {failure.pid})"
    where += ", putting together a batch" if failure.key is None else f", at sample {failure.key}"
    note = f"{where}:\n\n{failure.text}"
    error: Any = None
    if failure.pickled is not None:
        with contextlib.suppress(Exception):
            error = pickle.loads(failure.pickled)
    if not isinstance(error, Exception):
        raise RuntimeError(f"{failure.name} {note}")
    error.add_note(note)
    raise error


def packed(error: Exception, worker: int, key: Any) -> Failure:
    text = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error.with_traceback(None))
    except Exception:
        pickled = None
    return Failure(pickled, type(error).__name__, text, worker, os.getpid(), key)


def unpicklable(job: Any, error: Exception) -> TypeError:
    """What to raise if a job cannot go to a worker: it names the attribute."""
    dataset = job.dataset.dataset if isinstance(job.dataset, SeededDataset) else job.dataset
    for name, value in (("dataset", dataset), ("collate_fn", job.collate_fn)):
        if path := _guilty(value, name):
            return TypeError(
                f"`{path}` cannot be pickled, so it cannot go to a worker process: {error}. Make "
                "it in the worker (see `PerProcess`), or use start_method='fork'."
            )
    return TypeError(f"the data set cannot go to a worker process: {error}")


def _guilty(value: Any, path: str, depth: int = 4) -> str:
    """The deepest attribute that cannot be pickled; empty if there is none."""
    try:
        _Probe(_Nowhere(), protocol=5, buffer_callback=lambda buffer: None).dump(value)
    except Exception:
        inside = vars(value) if hasattr(value, "__dict__") and depth else {}
        for name, part in inside.items():
            if found := _guilty(part, f"{path}.{name}", depth - 1):
                return found
        return path
    return ""


class _Probe(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        # Tensors travel in shared memory, and locks and queues while a process is started.
        shared = isinstance(value, torch.Tensor) or type(value).__module__.startswith(
            "multiprocessing."
        )
        return (int, ()) if shared else NotImplemented


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)
