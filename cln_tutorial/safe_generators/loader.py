"""A data loader that can be killed, resumed and split: the same samples, and errors with a name.

What is random in a sample is a function of (seed, epoch, index), and the place in an epoch is
counted in samples delivered to the user. So neither the number of workers nor a restart changes
what comes next.
"""

import functools
import multiprocessing
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch.utils.data import IterableDataset, default_collate

from cln_tutorial.safe_generators.jobs import ATTEMPTS, MapJob, StreamJob, Task, reraise
from cln_tutorial.safe_generators.orders import BatchSamplerOrder, SamplerOrder, StreamOrder
from cln_tutorial.safe_generators.sampling import EpochSampler
from cln_tutorial.safe_generators.sharding import ShardedIterable
from cln_tutorial.safe_generators.streams import SeededDataset
from cln_tutorial.safe_generators.workers import THREAD, Pool, WorkerDied, WorkerTimeout


class SkippedSample(NamedTuple):
    """A sample that ``on_error="skip"`` left out, and why."""

    epoch: int
    index: Any
    error: str


class SafeLoader:
    r"""Batches of a data set, each sample once, the same whatever the number of workers.

    Iterating again goes to the next epoch; the state holds what was delivered, not what was
    prefetched, and fits any number of workers, also 0.

    A worker that dies or hangs is named when the next batch is asked for, never in the midst of
    other code. After an error the workers are gone and the state is that of the last batch
    delivered: ``loader.load_state_dict(loader.state_dict())`` and another iteration go on there.
    With no workers there is no time limit.

    Args:
        dataset: map-style: anything with ``len`` and ``[index]``. It is wrapped into
            :class:`~cln_tutorial.safe_generators.SeededDataset`, so that the random draws of a
            sample are a function of (seed, epoch, index); with a method ``getitem(index, rng)``
            it gets its own NumPy generator. Or a
            :class:`~cln_tutorial.safe_generators.ShardedIterable`.
        batch_size: samples per batch of this rank.
        shuffle: a new order each epoch.
        seed: of the order and of the samples, the same on all ranks.
        num_workers: processes; 0 makes the batches in this one.
        rank, world_size: of this process; from ``torch.distributed`` if not given.
        uneven: what happens to the last, incomplete global batch: "exact" shares it (no sample
            twice), "pad" doubles some, "drop" leaves some out, as in
            :class:`~cln_tutorial.safe_generators.EpochSampler`.
        drop_last: leave the last, incomplete global batch out.
        start_method: "auto", or one of ``multiprocessing.get_all_start_methods()``. "auto" forks if
            no other thread runs and CUDA is not initialised, or if the data set is defined in an
            interactive session, where no other process could import it; ``repr`` says why.
        timeout: seconds that a worker may take for a batch.
        start_timeout: seconds that it may take to start, and for its first batch.
        on_error: of an exception in a sample, and of a worker that dies or hangs: "raise" it,
            "skip" the sample, or "retry": twice more per sample, and with new workers per batch.
        max_skips: samples that may be skipped in all, at least 1 with "skip"; each is reported by a
            warning and in ``skipped``.
        collate_fn: from a list of samples to a batch, in the worker. What it draws from the global
            states is a function of (seed, epoch, first sample of the batch).
        pin_memory: as in ``torch.utils.data.DataLoader``.
        persistent_workers: keep the processes between epochs.
        batch_sampler: iterable of lists of indices, in place of ``batch_size``, ``shuffle``,
            ``rank`` and so on. The state counts its batches. Its ``set_epoch`` is called if it has
            one, and in an epoch it must always give the same.
        worker_init_fn, generator: refused; the rules of seeds take their place.

    Raises:
        WorkerDied: while iterating, if a worker process ends.
        WorkerTimeout: while iterating, if a worker takes longer than its limit.
        TypeError: for an iterable that is not sharded, a data set without length, or, while
            iterating, one that cannot go to a worker; the attribute is named.
        ValueError: for options that contradict each other.

    Source:
        Article 6575, section 3; torch's ``DataLoader`` carries the batches.

    Example:
        >>> from cln_tutorial.safe_generators.loader import SafeLoader
        >>> loader = SafeLoader(range(10), batch_size=4)
        >>> batches = iter(loader)
        >>> next(batches)
        tensor([0, 1, 2, 3])
        >>> state = loader.state_dict()
        >>> resumed = SafeLoader(range(10), batch_size=4)
        >>> resumed.load_state_dict(state)
        >>> list(resumed)
        [tensor([4, 5, 6, 7]), tensor([8, 9])]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: str = "exact",
        drop_last: bool = False,
        start_method: str = "auto",
        timeout: float | int = 60.0,
        start_timeout: float | int = 120.0,
        on_error: str = "raise",
        max_skips: int = 0,
        collate_fn: Callable[[list], Any] | None = None,
        pin_memory: bool = False,
        persistent_workers: bool = True,
        batch_sampler: Iterable[Any] | None = None,
        worker_init_fn: Any = None,
        generator: Any = None,
    ):
        _refuse(worker_init_fn, generator)
        _one_of("on_error", on_error, ("raise", "skip", "retry"))
        _one_of("start_method", start_method, ("auto", *multiprocessing.get_all_start_methods()))
        batch_size = _at_least("batch_size", batch_size, 1)
        num_workers = _at_least("num_workers", num_workers, 0)
        max_skips = _at_least("max_skips", max_skips, 0)
        _seconds("timeout", timeout)
        _seconds("start_timeout", start_timeout)
        if (on_error == "skip") != (max_skips > 0):
            raise ValueError(
                f"on_error='skip' and `max_skips` of at least 1 go together; got {on_error!r} and "
                f"{max_skips}."
            )
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.timeout, self.start_timeout = timeout, start_timeout
        self.on_error, self.max_skips, self.pin_memory = on_error, max_skips, pin_memory
        self.persistent_workers = persistent_workers
        self.skipped: list[SkippedSample] = []
        self._start_method = start_method
        collate_fn = default_collate if collate_fn is None else collate_fn
        ours = {"shuffle": shuffle, "rank": rank, "world_size": world_size, "uneven": uneven}
        self._job: Any
        self._order: Any
        if isinstance(dataset, IterableDataset):
            _require_stream(dataset, batch_sampler, on_error, seed, ours)
            self._job = StreamJob(dataset, collate_fn, batch_size, drop_last, max(num_workers, 1))
            self._order = StreamOrder(dataset, max(num_workers, 1))
        else:
            self._job = MapJob(_seeded(dataset, seed), collate_fn, on_error)
            if batch_sampler is None:
                sampler = EpochSampler(len(dataset), seed=seed, batch_size=batch_size, **ours)
                self._order = SamplerOrder(sampler, drop_last)
            else:
                _require_alone(batch_size, drop_last, ours)
                self._order = BatchSamplerOrder(batch_sampler, seed)
        self._pool: Pool | None = None
        self._fresh = True  # nobody has iterated over this epoch since it was set
        self._run = 0
        self._length = -1

    @property
    def epoch(self) -> int:
        """The epoch that is iterated over, or the next one after its end."""
        return self._order.epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; or nowhere, if it is the one of a state just loaded.

        Args:
            epoch: 0 or more.

        Raises:
            ValueError: for a negative epoch.
        """
        _at_least("epoch", epoch, 0)
        if not (self._fresh and epoch == self.epoch):
            self._order.begin(epoch)
        self._fresh = True

    def __len__(self) -> int:
        """Batches of this rank in this epoch, or what was left of it when the loop began."""
        return len(self._order) if self._fresh or self._length < 0 else self._length

    def __iter__(self) -> Iterator[Any]:
        """Iterate over what is left of the epoch, or over the next one if this was begun."""
        if not self._fresh:
            self._order.begin(self.epoch + 1)
        self._length = operator.length_hint(self._order, -1)  # a stream has none
        self._fresh = False
        self._run += 1
        return self._batches(self._run)

    def state_dict(self) -> dict[str, Any]:
        """What was delivered so far, as JSON can hold it.

        After the last batch of an epoch has been used, that is the start of the next one.

        Returns:
            The state of the ``EpochSampler`` or the ``ShardedIterable``; with a batch sampler the
            number of its batches and a checksum of their indices.
        """
        return self._order.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Continue where a state was saved, with any number of workers.

        Args:
            state: of :meth:`state_dict`; the states of all ranks, for a stream on other ranks.

        Raises:
            ValueError: for another length, seed, order, or version.
        """
        self._order.load_state_dict(state)
        self._fresh = True
        self._run += 1  # an iteration under way would go on elsewhere

    def close(self) -> None:
        """End the worker processes and the iteration; iterating again starts new ones."""
        self._run += 1
        self._end(kill=False)

    def __enter__(self) -> "SafeLoader":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        method, why = self._method()
        workers = f", {method}: {why}" if self.num_workers else ""
        return (
            f"SafeLoader({type(self.dataset).__name__}, batch_size={self.batch_size}, "
            f"num_workers={self.num_workers}{workers}; epoch {self.epoch}, "
            f"{self._order.consumed} {self._order.unit} delivered)"
        )

    # --- inside -----------------------------------------------------------------------------------

    def _batches(self, run: int) -> Iterator[Any]:
        results = self._from_workers() if self.num_workers else self._from_here()
        try:
            for batch, extra in results:
                self._require_current(run)
                self._order.took(extra)
                if batch is not None:
                    yield batch
                    self._require_current(run)
            self._order.begin(self.epoch + 1)
            self._fresh = True
        finally:
            results.close()
            if run == self._run and not self.persistent_workers:
                self.close()

    def _require_current(self, run: int) -> None:
        if run != self._run:
            raise RuntimeError(
                "this iteration is over: another one of this loader was begun, a state was loaded, "
                "or the loader closed."
            )

    def _from_here(self) -> Iterator[tuple[Any, Any]]:
        board = [0]
        for number, indices in enumerate(self._wanted(), 1):
            task = Task(self._run, number, self.epoch, indices)
            board[0] = -1
            try:
                batch, extra = self._job(task, 0, board, 0)
            except Exception as error:
                key = self._job.key_at(task, board[0])
                if key is not None:
                    error.add_note(f"at sample {key} of epoch {task.epoch}")
                raise
            yield batch, self._without_skips(extra)

    def _from_workers(self) -> Iterator[tuple[Any, Any]]:
        failures = 0
        while True:
            try:
                pool, generation = self._begun()
                while (result := pool.next()) is not None:
                    if result.failure is not None:
                        reraise(result.failure)
                    extra = self._without_skips(result.extra)
                    failures = 0
                    yield result.batch, extra
                return
            except GeneratorExit:
                pool.cancel(generation)
                raise
            except (WorkerDied, WorkerTimeout) as error:
                self._end(kill=True)
                failures += 1
                self._require_hope(error, failures)
            except BaseException:
                self._end(kill=True)
                raise

    def _begun(self) -> tuple[Pool, int]:
        if self._pool is None:
            method, _ = self._method()
            self._pool = Pool(
                self._job,
                self.num_workers,
                method,
                self.pin_memory,
                self.timeout,
                self.start_timeout,
            )
        return self._pool, self._pool.begin(self.epoch, self._wanted())

    def _wanted(self) -> Iterator[Any]:
        """What is left of the epoch, without the samples that were skipped."""
        gone = {sample.index for sample in self.skipped if sample.epoch == self.epoch}
        batches = self._order.batches()
        return ([i for i in each if i not in gone] for each in batches) if gone else batches

    def _without_skips(self, extra: Any) -> Any:
        if isinstance(self._job, MapJob):
            for key, error in extra:
                self._skip(SkippedSample(*key, error), None)
        return extra

    def _skip(self, sample: SkippedSample, cause: Exception | None) -> None:
        if len(self.skipped) == self.max_skips:
            raise RuntimeError(
                f"sample {sample.index} of epoch {sample.epoch} would be skip number "
                f"{self.max_skips + 1}, and `max_skips` is {self.max_skips}: {sample.error}"
            ) from cause
        self.skipped.append(sample)
        warnings.warn(
            f"sample {sample.index} of epoch {sample.epoch} is skipped, {len(self.skipped)} of at "
            f"most {self.max_skips}: {sample.error}",
            RuntimeWarning,
            stacklevel=5,
        )

    def _require_hope(self, error: WorkerDied | WorkerTimeout, failures: int) -> None:
        """Raise the error, unless new workers may do better."""
        if self.on_error == "skip" and error.index is not None:
            self._skip(SkippedSample(self.epoch, error.index, str(error)), error)
        elif self.on_error == "retry" and failures < ATTEMPTS:
            warnings.warn(f"{error} New workers try again.", RuntimeWarning, stacklevel=4)
        else:
            raise error

    def _end(self, kill: bool) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close(kill)

    def _method(self) -> tuple[str, str]:
        if self._pool is not None:
            return self._pool.start_method, "running"
        if self._start_method != "auto":
            return self._start_method, "as asked"
        return _best_method(self._job)


def _best_method(job: Any) -> tuple[str, str]:
    known = multiprocessing.get_all_start_methods()
    other = "forkserver" if "forkserver" in known else "spawn"
    interactive = not hasattr(sys.modules.get("__main__"), "__file__")
    if "fork" in known and interactive and _of_session([job.dataset, job.collate_fn]):
        return "fork", "the data set is defined in this session, which no process can import"
    if not sys.platform.startswith("linux"):
        return other, f"a fork is not safe on {sys.platform}"
    if torch.cuda.is_initialized():
        return other, "CUDA is initialised"
    # The threads of other loaders touch only what belongs to them.
    names = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
    names = [name for name in names if name != THREAD and not name.startswith("QueueFeeder")]
    if names:
        return other, f"other threads run ({', '.join(names[:3])})"
    return "fork", "no other thread runs, and CUDA is not initialised"


def _of_session(value: Any, depth: int = 6) -> bool:
    """Whether something inside, such as a transform, is of a class or function of `__main__`."""
    if "__main__" in (getattr(value, "__module__", None), type(value).__module__):
        return True
    if isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple)):
        inside = list(value[:100])
    elif isinstance(value, dict):
        inside = list(value.values())[:100]
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return depth > 0 and any(_of_session(part, depth - 1) for part in inside)


def _seeded(dataset: Any, seed: int) -> SeededDataset:
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`dataset` must have `len` and `[index]`, or be a `ShardedIterable`; got "
            f"{type(dataset).__name__}."
        )
    if not isinstance(dataset, SeededDataset):
        return SeededDataset(dataset, seed)
    if dataset.seed != seed:
        raise ValueError(
            f"`dataset` is a SeededDataset with seed {dataset.seed}, and `seed` is {seed}: say the "
            "same."
        )
    return dataset


def _refuse(worker_init_fn: Any, generator: Any) -> None:
    if worker_init_fn is not None:
        raise ValueError(
            "`worker_init_fn` is refused: what it seeds would depend on the worker, and here the "
            "draws of a sample are a function of (seed, epoch, index). Things that each process "
            "must make for itself go into a `PerProcess`."
        )
    if generator is not None:
        raise ValueError(
            "`generator` is refused: its state would depend on what was drawn before, and here "
            "the order is a function of (seed, epoch). Give a `seed`."
        )


def _require_stream(
    dataset: Any, batch_sampler: Any, on_error: str, seed: int, ours: Mapping[str, Any]
) -> None:
    if not isinstance(dataset, ShardedIterable):
        raise TypeError(
            f"`dataset` is an IterableDataset ({type(dataset).__name__}), of which every worker "
            "would yield everything: make it a `ShardedIterable`."
        )
    plain = {"shuffle": False, "rank": None, "world_size": None, "uneven": "exact"}
    given = [name for name in plain if ours[name] != plain[name]]
    given += ["batch_sampler"] * (batch_sampler is not None)
    given += ["on_error='skip'"] * (on_error == "skip")
    given += ["seed"] * (seed not in (0, dataset.seed))
    if given:
        raise ValueError(
            f"a ShardedIterable has its own order, seed and ranks, and its items have no index: "
            f"{', '.join(given)} cannot be given here."
        )


def _require_alone(batch_size: int, drop_last: bool, ours: Mapping[str, Any]) -> None:
    plain = {"shuffle": False, "rank": None, "world_size": None, "uneven": "exact"}
    given = [name for name in plain if ours[name] != plain[name]]
    given += ["batch_size"] * (batch_size != 1) + ["drop_last"] * drop_last
    if given:
        raise ValueError(f"`batch_sampler` decides it: {', '.join(given)} cannot be given too.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {known}; got {value!r}.")


def _at_least(name: str, value: SupportsIndex, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")
    return operator.index(value)


def _seconds(name: str, value: float | int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"`{name}` must be a positive number of seconds; got {value!r}.")
