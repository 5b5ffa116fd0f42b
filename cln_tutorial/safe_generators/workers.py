"""Worker processes under watch: whoever dies or hangs is named, and nobody is left behind.

The transport is torch's ``DataLoader`` with one endless iterator per pool: its sampler hands out
the tasks of an epoch, then idle ones. So persistent workers need no reset between epochs, and a
result that nobody wants any more is recognised by its generation. Each worker notes on a board in
shared memory what it works on, which costs one store per sample; the parent reads it only when a
batch is late.
"""

import atexit
import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, sharedctypes
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cln_tutorial.safe_generators.jobs import Failure, Task, packed, unpicklable

POLL = 1.0  # seconds between two looks at workers that deliver nothing
GRACE = 1.0  # seconds for a worker to finish its task before it is killed
THREAD = "SafeLoader watch"

# The board: the generation, then for each worker what it does.
_SERIAL, _POSITION, _SINCE, _DONE, _STARTED, _FIELDS = range(6)
_GENERATION, _HEADER = 0, 1


class _WorkerFailure(RuntimeError):
    def __init__(
        self,
        message: str,
        *,
        worker: int | None = None,
        pid: int | None = None,
        exit_code: int | None = None,
        indices: Sequence[Any] = (),
        index: Any = None,
    ):
        super().__init__(message)
        self.worker, self.pid, self.exit_code = worker, pid, exit_code
        self.indices, self.index = list(indices), index

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended the worker, or None."""
        if self.exit_code is None or self.exit_code >= 0:
            return None
        return _signal_name(-self.exit_code)


class WorkerDied(_WorkerFailure):
    """A worker process ended before its work was done.

    ``worker``, ``pid``, ``exit_code`` (negative: by a signal, whose name is ``signal``),
    ``indices`` of the batch in flight, and ``index``, the sample it was at, or None.

    Args:
        message: what is printed.
        worker: number of the worker, from 0.
        pid: of its process.
        exit_code: of its process, as ``multiprocessing`` gives it.
        indices: of the batch that it worked on, or that was waited for.
        index: of the sample that it worked on.

    Source:
        Article 6575, section 3. torch raises one of four exceptions there, and never the sample.

    Example:
        >>> from cln_tutorial.safe_generators.workers import WorkerDied
        >>> WorkerDied("worker 1 died", worker=1, exit_code=-9, indices=[3, 4], index=4).signal
        'SIGKILL'
    """


class WorkerTimeout(_WorkerFailure):
    """A worker process did not finish its batch, or did not start, within the time limit.

    It is killed before this is raised. ``worker``, ``pid``, ``indices`` of the batch in flight, and
    ``index``, the sample it was at.

    Args:
        message: what is printed.
        worker: number of the worker, from 0.
        pid: of its process.
        exit_code: None, since it lived.
        indices: of the batch that it worked on, or that was waited for.
        index: of the sample that it worked on.

    Source:
        Article 6575, section 3. A ``DataLoader`` waits for ever unless told otherwise.

    Example:
        >>> from cln_tutorial.safe_generators.workers import WorkerTimeout
        >>> WorkerTimeout("worker 0 hangs", worker=0, indices=[3, 4], index=3).index
        3
    """


class Result(NamedTuple):
    """What a worker made of a task. ``extra`` is what the job reports beside the batch."""

    generation: int
    serial: int
    batch: Any = None
    extra: Any = None
    failure: Failure | None = None


class _Work(Dataset):
    """What the workers run: a task in, a result out, whatever the data set does."""

    def __init__(self, job: Any, board: Any):
        self.job, self.board = job, board

    def __getitem__(self, task: Task) -> Result:
        board, worker = self.board, get_worker_info().id
        slot = _HEADER + worker * _FIELDS
        board[slot + _STARTED] = 1
        if task.indices is None or task.generation != board[_GENERATION]:
            return Result(task.generation, task.serial)
        board[slot + _POSITION] = -1
        board[slot + _SINCE] = time.monotonic_ns()
        board[slot + _SERIAL] = task.serial
        try:
            batch, extra = self.job(task, worker, board, slot + _POSITION)
            result = Result(task.generation, task.serial, batch, extra)
        except Exception as error:
            key = self.job.key_at(task, board[slot + _POSITION])
            result = Result(task.generation, task.serial, failure=packed(error, worker, key))
        board[slot + _SERIAL] = 0
        board[slot + _DONE] += 1
        return result


class _Feed:
    """The sampler: the tasks of the running generation, then idle ones without end."""

    def __init__(self) -> None:
        self.tasks: Iterator[Task] = iter(())
        self.generation = self.serial = 0
        self.in_flight: dict[int, Task] = {}
        self.exhausted = True
        self.error: Exception | None = None

    def begin(self, epoch: int, batches: Iterator[Any]) -> None:
        self.generation += 1
        self.exhausted, self.error = False, None
        self.tasks = self._tasks(self.generation, epoch, batches)

    def cancel(self) -> None:
        self.tasks, self.exhausted = iter(()), True

    def _tasks(self, generation: int, epoch: int, batches: Iterator[Any]) -> Iterator[Task]:
        try:
            for indices in batches:
                self.serial += 1
                yield Task(generation, self.serial, epoch, indices)
        except Exception as error:  # its turn comes after the batches before it
            self.error = error
        self.exhausted = True

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        task = next(self.tasks, None)
        if task is None:
            return Task(self.generation, 0, 0, None)
        self.in_flight[task.serial] = task
        return task


class _Flag:
    """An event without a lock, since a worker that is killed may hold it for ever."""

    def __init__(self) -> None:
        self.value = sharedctypes.RawValue("b", 0)

    def set(self) -> None:
        self.value.value = 1

    def is_set(self) -> bool:
        return bool(self.value.value)


class _Watch:
    """Reads the board: who is over the limit, and who was killed for it.

    Tensors of a finished batch are fetched from the worker that made it. If that worker is stopped,
    or hangs in C code, the parent waits inside of torch where no time limit reaches. So a thread
    looks on, and kills who is late; then the read fails, and the parent finds out why.
    """

    def __init__(self, board: Any, timeout: float | int, start_timeout: float | int):
        self.board, self.timeout, self.start_timeout = board, timeout, start_timeout
        self.processes: list[Any] = []
        self.born = time.monotonic_ns()
        self.asked = self.reading = 0  # when the parent asked for a batch, and began to read
        self.tick, self.woken = self.born, 0  # a sign of life, and when it had been missing
        self.killed: dict[int, float | int] = {}
        self.over = threading.Event()

    def row(self, worker: int) -> list[int]:
        slot = _HEADER + worker * _FIELDS
        return self.board[slot : slot + _FIELDS]

    def busy(self, worker: int) -> bool:
        """Whether it is at a task or at its start, and lives."""
        serial, _, _, _, started = self.row(worker)
        process = self.processes[worker]
        return process.pid is not None and (serial > 0 or not started) and process.is_alive()

    def late(self) -> dict[int, float | int]:
        """The workers over their limits (in seconds); all of them if all rest too long."""
        now, found, rest = time.monotonic_ns(), {}, []
        if now - self.tick > 2 * POLL * 1e9:
            self.woken = now  # the whole program was stopped: that is nobody's fault
        for worker in range(len(self.processes)):
            serial, _, since, done, started = self.row(worker)
            limit = self.timeout if done else self.start_timeout
            since = max(since if started else self.born, self.woken)
            if started and not serial:
                rest.append(worker)
            elif now - since >= limit * 1e9:
                found[worker] = limit
        if (
            len(rest) == len(self.processes)
            and now - max(self.asked, self.woken) >= self.timeout * 1e9
        ):
            return dict.fromkeys(rest, self.timeout)
        return found

    def look_on(self) -> None:
        """The thread: idle unless one read takes longer than torch's own limit of it."""
        while not self.over.wait(POLL / 4):
            late = self.late()
            self.tick = time.monotonic_ns()
            reading = self.reading
            if reading and time.monotonic_ns() - reading > 1.25 * POLL * 1e9:
                for worker, limit in late.items():
                    self.killed.setdefault(worker, limit)
                    self.processes[worker].kill()


class Pool:
    """Worker processes, from their start to the certain end of each.

    ``begin(epoch, batches)`` starts a generation; ``next()`` gives its results in order, and None
    after the last one. Whatever ``next()`` raises, call ``close(kill=True)`` then.
    """

    def __init__(
        self,
        job: Any,
        num_workers: int,
        start_method: str,
        pin_memory: bool,
        timeout: float | int,
        start_timeout: float | int,
    ):
        self.job, self.start_method = job, start_method
        self._owner = os.getpid()
        self._board = sharedctypes.RawArray("q", _HEADER + num_workers * _FIELDS)
        self._feed = _Feed()
        self._expected = 0
        self._watch = _Watch(self._board, timeout, start_timeout)
        self._processes = self._watch.processes
        self._thread = threading.Thread(target=self._watch.look_on, name=THREAD, daemon=True)
        self._iterator: Any = None
        self._set_pids, self._remove_pids, self._raise_if_failed = _torch_watch()
        self._loader = DataLoader(
            _Work(job, self._board),
            batch_size=None,
            sampler=self._feed,
            num_workers=num_workers,
            collate_fn=_same,
            pin_memory=pin_memory,
            timeout=min(POLL, timeout),
            multiprocessing_context=_recording(start_method, self._processes),
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # otherwise it draws a seed from the global one
        )
        self._at_exit = _closer(weakref.ref(self))
        # Before multiprocessing's own handler, which joins without a time limit.
        atexit.register(self._at_exit)

    def begin(self, epoch: int, batches: Iterator[Any]) -> int:
        """Start to make these batches; what was in work before is of no use any more."""
        self._expected = self._feed.serial
        self._feed.begin(epoch, batches)
        self._board[_GENERATION] = self._feed.generation
        if self._iterator is None:
            self._start()
        return self._feed.generation

    def next(self) -> Result | None:
        """The next result of this generation, or None after the last one."""
        self._watch.asked = time.monotonic_ns()
        feed = self._feed
        while not feed.exhausted or any(
            task.generation == feed.generation for task in feed.in_flight.values()
        ):
            try:
                result = self._read()
            except Exception as error:
                self._diagnose(error)
                continue
            feed.in_flight.pop(result.serial, None)
            if result.serial and result.generation == feed.generation:
                self._expected += 1
                if result.serial != self._expected:
                    raise RuntimeError(
                        f"torch delivered batch {result.serial} in the place of {self._expected}."
                    )
                return result
        if feed.error is not None:
            # torch's handler of SIGCHLD may have raised in the midst of the sampler's code.
            for worker, process in enumerate(self._processes):
                if process.exitcode is not None:
                    self._raise_died(worker, process, feed.error)
            raise feed.error
        return None

    def cancel(self, generation: int) -> None:
        """Let the workers leave out what they have not begun, if it is still of this generation."""
        if generation == self._feed.generation:
            self._board[_GENERATION] = 0
            self._feed.cancel()

    def close(self, kill: bool = False) -> None:
        """End all processes: those at rest by a message, the others, after a while, by a kill."""
        atexit.unregister(self._at_exit)
        if os.getpid() != self._owner:  # a forked copy of this object has no right to
            return
        self._board[_GENERATION] = -1
        deadline = time.monotonic() + (0 if kill else GRACE)
        busy = self._watch.busy
        while any(map(busy, range(len(self._processes)))) and time.monotonic() < deadline:
            time.sleep(0.002)
        for worker, process in enumerate(self._processes):
            if process.pid is not None and (kill or busy(worker)):
                process.kill()
        self._iterator = None  # torch tells the others to leave, and waits for them
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                # torch's handler of SIGCHLD may raise, once, if it was not started properly.
                with contextlib.suppress(RuntimeError):
                    process.join()
                process.join()
        self._watch.over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def __del__(self) -> None:
        if hasattr(self, "_at_exit"):
            self.close()

    # --- inside -----------------------------------------------------------------------------------

    def _start(self) -> None:
        self._watch.born = self._watch.tick = time.monotonic_ns()
        try:
            with warnings.catch_warnings():
                # torch's advice is to fork; ours comes with the name of the attribute.
                warnings.filterwarnings("ignore", "Got pickle error when attempting to start")
                self._iterator = iter(self._loader)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise unpicklable(self.job, error) from error
        except RuntimeError as error:  # a worker has ended at once
            self._diagnose(error)
            raise
        self._remove_pids(id(self._iterator))
        self._set_pids(id(self._iterator), ())
        self._watch.tick = time.monotonic_ns()
        self._thread.start()

    def _read(self) -> Result:
        # torch's handler of SIGCHLD raises in the main thread, in the midst of whatever the user
        # does there. While we read that is right: a worker killed in the midst of a long message
        # would leave us in a blocking read. At all other times it sees no process.
        key, main = id(self._iterator), threading.current_thread() is threading.main_thread()
        self._watch.reading = time.monotonic_ns()
        try:
            if main:
                self._remove_pids(key)
                self._set_pids(key, self._pids)
                # One that has died before may have left half a message.
                self._raise_if_failed()
            elif any(process.exitcode is not None for process in self._processes):
                raise RuntimeError("a worker has ended")
            return next(self._iterator)
        finally:
            if main:
                self._remove_pids(key)
                self._set_pids(key, ())
            self._watch.reading = 0

    @property
    def _pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

    def _diagnose(self, error: Exception) -> None:
        """Return if waiting is all right; raise what is the matter otherwise."""
        # torch's frames hold its iterator, which a worker forked later would try to close.
        traceback.clear_frames(error.__traceback__)
        in_time = isinstance(error, RuntimeError) and "timed out" in str(error)
        if not in_time:  # a broken connection comes a moment before the end of its worker
            sentinels = {p.sentinel: p for p in self._processes if p.pid is not None}
            for ended in connection.wait(sentinels, timeout=GRACE):
                sentinels[ended].join(GRACE)
        for worker, limit in self._watch.killed.items():
            self._raise_timeout(worker, limit, error)
        for worker, process in enumerate(self._processes):
            if process.exitcode is not None:
                self._raise_died(worker, process, error)
        if not in_time:
            raise error
        for worker, limit in self._watch.late().items():
            self._raise_timeout(worker, limit, error)

    def _raise_died(self, worker: int, process: Any, error: Exception) -> NoReturn:
        code = process.exitcode
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        what, indices, index = self._work_of(worker)
        if self.start_method != "fork" and not self._watch.row(worker)[_STARTED]:
            what += (
                " It had not started: can it import what the data set needs, and has the script "
                "`if __name__ == '__main__':`?"
            )
        raise WorkerDied(
            f"worker {worker} (pid {process.pid}) {how} {what}",
            worker=worker,
            pid=process.pid,
            exit_code=code,
            indices=indices,
            index=index,
        ) from error

    def _raise_timeout(self, worker: int, limit: float | int, error: Exception) -> NoReturn:
        serial, _, _, _, started = self._watch.row(worker)
        what, indices, index = self._work_of(worker)
        pid = self._processes[worker].pid
        if serial or not started:
            does = "has been busy" if started else "has not started"
            message = f"worker {worker} (pid {pid}) {does} for {limit:g} s {what}"
        else:
            message = (
                f"worker {worker} (pid {pid}) and all others rest, and no batch has arrived for "
                f"{limit:g} s {what} Can what `collate_fn` returns be pickled?"
            )
        raise WorkerTimeout(
            message, worker=worker, pid=pid, indices=indices, index=index
        ) from error

    def _work_of(self, worker: int) -> tuple[str, list[Any], Any]:
        """What a worker is at: in words, the batch, the sample."""
        feed = self._feed
        serial, position = self._watch.row(worker)[:2]
        if task := feed.in_flight.get(serial):
            index, batch = self.job.key_at(task, position), self.job.batch_of(task)
            at = "putting together the" if index is None else f"at sample {index!r} of the"
            return f"{at} {_short(batch, task.epoch)}.", batch, index
        waited = [task for task in feed.in_flight.values() if task.generation == feed.generation]
        if not waited:
            return "at rest.", [], None
        batch = self.job.batch_of(waited[0])
        return f"while the {_short(batch, waited[0].epoch)} was waited for.", batch, None


def _recording(method: str, processes: list[Any]) -> Any:
    """A multiprocessing context that keeps the processes made by it, and whose events never block.

    torch has the processes of an iterator in a private attribute only; this way is public.
    """
    context = copy.copy(multiprocessing.get_context(method))
    make = context.Process

    def process(*args: Any, **kwargs: Any) -> Any:
        processes.append(make(*args, **kwargs))
        return processes[-1]

    context.Process, context.Event = process, _Flag
    return context


def _torch_watch() -> tuple[Callable, Callable, Callable]:
    # Private, and there is no other way: torch's handler of SIGCHLD asks this list only.
    try:
        from torch.utils.data._utils.signal_handling import (
            _error_if_any_worker_fails,
            _remove_worker_pids,
            _set_worker_pids,
        )
    except ImportError as error:
        raise RuntimeError(
            f"torch {torch.__version__} has changed how it watches its workers ({error}), which "
            "`SafeLoader` builds on: use `num_workers=0`, and report it."
        ) from error
    return _set_worker_pids, _remove_worker_pids, _error_if_any_worker_fails


def _closer(pool: weakref.ref) -> Callable[[], None]:
    def close() -> None:
        if (alive := pool()) is not None:
            alive.close(kill=True)

    return close


def _end_with_parent(worker: int) -> None:
    """End this worker soon after its parent: torch looks every 5 s, and only between two tasks."""
    # Ctrl-C reaches the whole group, and it is the parent who decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent may be gone already, and this be the child of somebody else: then only the pipe
    # tells. The pipe alone would not do, since workers that were forked later hold it open.
    parent, above = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        while os.getppid() == above and (parent is None or parent.is_alive()):
            time.sleep(POLL / 4)
        os._exit(1)

    threading.Thread(target=watch, name=THREAD, daemon=True).start()


def _same(result: Result) -> Result:
    return result


def _short(batch: list[Any], epoch: int) -> str:
    text = [repr(index) for index in batch]
    listed = ", ".join([*text[:8], f"… {len(text)} in all"] if len(text) > 9 else text)
    return f"batch [{listed}] of epoch {epoch}" if text else f"next batch of epoch {epoch}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
