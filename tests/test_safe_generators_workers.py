"""Worker processes: each that dies or hangs is named in time, and none is left behind.

What could hang runs in a child process with a time limit, which has all and done nothing before:
so it may fork as well.
"""

import ctypes
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from cln_tutorial.safe_generators import workers
from cln_tutorial.safe_generators.jobs import MapJob, reraise
from cln_tutorial.safe_generators.streams import SeededDataset
from cln_tutorial.safe_generators.workers import Pool, WorkerDied, WorkerTimeout

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.test_safe_generators_workers"])
ROOT = Path(__file__).parents[1]
LIMIT = 30  # seconds for what takes a few


# --- children with a time limit -------------------------------------------------------------------


def in_child(function, *arguments, **options):
    """What the function returns in a process of its own, which leaves none behind."""
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=run_and_send, args=(theirs, function, arguments, options))
    process.start()
    try:
        assert mine.poll(LIMIT), f"{function.__name__}{arguments} hangs"
        answer, left = mine.recv()
    finally:
        process.join(2)
        process.kill()
        process.join()
    if isinstance(answer, BaseException):
        raise answer
    assert left == [], "processes are left"
    return answer


def run_and_send(pipe, function, arguments, options):
    try:
        answer = function(*arguments, **options)
    except BaseException as error:
        answer = AssertionError(f"in the child: {type(error).__name__}: {error}")
    pipe.send((answer, children()))


def children():
    """Living and dead children of this process; those of multiprocessing itself are no workers."""
    found, own = [], Path("/proc/self/cmdline").read_text()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            helper = any(name in command for name in ("resource_tracker", "forkserver import main"))
            helper = helper and command != own  # a forked worker has the command of its parent
            if int(status[1]) == os.getpid() and not helper:
                found.append((int(folder.name), status[0]))
    return found


# --- data sets that end or hold their worker ------------------------------------------------------


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)  # as C code that hangs does: no other thread can run


ENDS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "os._exit": lambda: os._exit(3),
    "os._exit(0)": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(4),
    "sleep": lambda: time.sleep(1000),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interpreter held": hold_the_interpreter,
}


class Ending:
    """Tensors of 100 numbers; at one index the worker ends or hangs."""

    def __init__(self, how, at=17):
        self.how, self.at = how, at
        self.moment = torch.zeros(1, dtype=torch.float64).share_memory_()

    def __getitem__(self, index):
        if index == self.at:
            self.moment[0] = time.monotonic()
            ENDS[self.how]()
        return torch.full((100,), index)


def batches(n=40, size=4):
    return iter([list(range(start, min(start + size, n))) for start in range(0, n, size)])


def pool_of(dataset, collate_fn=default_collate, timeout=60, start_timeout=60, method="fork"):
    job = MapJob(SeededDataset(dataset), collate_fn)
    return Pool(job, 2, method, False, timeout, start_timeout)


def ended(how, busy, timeout, repetitions):
    """What is raised, how long after the end (or after it was asked, if later)."""
    found = []
    for _ in range(repetitions):
        dataset = Ending(how)
        pool = pool_of(dataset, timeout=timeout)
        pool.begin(7, batches())
        try:
            while True:
                asked = time.monotonic()
                assert pool.next() is not None
                time.sleep(busy)
        except Exception as error:
            seconds = time.monotonic() - max(asked, float(dataset.moment))
            found.append((error, seconds, error.pid))
        finally:
            pool.close(kill=True)
        assert children() == []
    return found


DEATHS = [
    ("SIGKILL", -9, "SIGKILL", "was killed by SIGKILL"),
    ("SIGSEGV", -11, "SIGSEGV", "was killed by SIGSEGV"),
    ("os._exit", 3, None, "ended with exit code 3"),
    ("os._exit(0)", 0, None, "ended with exit code 0"),
    ("sys.exit", 4, None, "ended with exit code 4"),
]


@pytest.mark.parametrize("busy", [0, 0.02], ids=["waiting", "busy"])
@pytest.mark.parametrize(("how", "code", "name", "words"), DEATHS, ids=[d[0] for d in DEATHS])
def test_a_dead_worker_is_named_with_its_sample_within_two_seconds(how, code, name, words, busy):
    for error, seconds, pid in in_child(ended, how, busy, 60, 10):
        assert type(error) is WorkerDied
        assert (error.worker, error.exit_code, error.signal) == (0, code, name)
        assert error.indices == [16, 17, 18, 19]
        assert error.index == 17
        assert f"worker 0 (pid {pid}) {words} at sample 17" in str(error)
        assert "[16, 17, 18, 19] of epoch 7" in str(error)
        assert seconds < 2


@pytest.mark.parametrize("busy", [0, 0.1], ids=["waiting", "busy"])
@pytest.mark.parametrize("how", ["sleep", "SIGSTOP", "interpreter held"])
def test_a_hanging_worker_is_named_within_its_limit_and_two_seconds(how, busy):
    # A consumer that waits is in the midst of fetching a batch made before: torch alone, with its
    # own time limit, would wait there for ever.
    for error, seconds, pid in in_child(ended, how, busy, 0.3, 2):
        assert type(error) is WorkerTimeout
        assert (error.worker, error.exit_code, error.signal) == (0, None, None)
        assert error.index == 17
        assert f"worker 0 (pid {pid}) has been busy for 0.3 s at sample 17" in str(error)
        assert seconds < 0.3 + 2
        assert busy or seconds > 0.25


class Slow:
    def __getitem__(self, index):
        time.sleep(0.5 if index == 17 else 0.001)
        return index


def stopped_for_a_while():
    pool = pool_of(Slow(), timeout=1.5)
    pool.begin(0, batches())
    made = [pool.next().batch.tolist() for _ in range(4)]
    everybody = [os.getpid(), *pool._pids]
    sleeper = f"sleep 0.1; kill -STOP {everybody}; sleep 3; kill -CONT {everybody}"
    shell = subprocess.Popen(["sh", "-c", re.sub(r"[\[\],]", " ", sleeper)])
    made += [pool.next().batch.tolist() for _ in range(6)]
    shell.wait()
    pool.close()
    return made


def test_a_program_that_was_stopped_and_continued_blames_no_worker():
    assert in_child(stopped_for_a_while) == list(batches())


# --- the start ------------------------------------------------------------------------------------


def never_started():
    os.register_at_fork(after_in_child=lambda: time.sleep(1000))
    pool = pool_of(Ending("sleep"), timeout=1000, start_timeout=0.5)
    begun = time.monotonic()
    try:
        pool.begin(0, batches())
        pool.next()
    except WorkerTimeout as error:
        return str(error), time.monotonic() - begun
    finally:
        pool.close(kill=True)


def test_a_worker_that_never_starts_is_named_after_the_time_for_the_start():
    message, seconds = in_child(never_started)
    assert "has not started for 0.5 s while the batch [0, 1, 2, 3] of epoch 0" in message
    assert seconds < 0.5 + 2


class SlowAtFirst:
    def __init__(self):
        self.calls = 0

    def __getitem__(self, index):
        self.calls += 1
        time.sleep(1.0 if self.calls == 1 else 0.001)
        return index


def first_batch_takes_long():
    pool = pool_of(SlowAtFirst(), timeout=0.4, start_timeout=30)
    pool.begin(0, batches())
    made = [pool.next().batch.tolist() for _ in range(10)]
    assert pool.next() is None
    pool.close()
    return made


def test_the_first_batch_of_a_worker_has_the_time_of_the_start():
    assert in_child(first_batch_takes_long) == list(batches())


# --- exceptions -----------------------------------------------------------------------------------


class Raising:
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index == 17:
            raise self.error()
        return index


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def raised(make, collate_fn=default_collate):
    pool = pool_of(Raising(make) if make else Range(), collate_fn)
    pool.begin(0, batches())
    try:
        while (result := pool.next()) is not None:
            if result.failure:
                reraise(result.failure)
    except Exception as error:
        return type(error), str(error), getattr(error, "__notes__", [])
    finally:
        pool.close(kill=True)


class Range:
    def __getitem__(self, index):
        return index


def unpicklable():
    return Unpicklable("a lock", "a text")


def two_arguments():
    return TwoArguments("one", "two")


@pytest.mark.parametrize("make", [unpicklable, two_arguments])
def test_an_exception_that_cannot_travel_arrives_as_a_text_with_its_place(make):
    kind, message, _ = in_child(raised, make)
    assert kind is RuntimeError
    assert f"{type(make()).__name__} in worker 0 (pid " in message
    assert "at sample 17:" in message
    assert "raise self.error()" in message, "the traceback is there"


@pytest.mark.parametrize("make", [KeyError, StopIteration, ZeroDivisionError])
def test_an_exception_keeps_its_type_and_gets_its_place_as_a_note(make):
    kind, _, notes = in_child(raised, make)
    assert kind is make
    assert "in worker 0 (pid " in notes[0]
    assert "at sample 17:" in notes[0]
    assert "raise self.error()" in notes[0]


def refuses(samples):
    raise ValueError("no batch of these")


def test_an_error_in_collate_fn_says_so():
    kind, message, notes = in_child(raised, None, refuses)
    assert (kind, message) == (ValueError, "no batch of these")
    assert "putting together a batch" in notes[0]


def a_lambda(samples):
    return lambda: samples


def batch_that_cannot_travel():
    pool = pool_of(Range(), a_lambda, timeout=0.5)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # multiprocessing prints in the worker
    pool.begin(0, batches())
    try:
        pool.next()
    except WorkerTimeout as error:
        return str(error), error.indices
    finally:
        pool.close(kill=True)


def test_a_batch_that_cannot_be_pickled_ends_in_an_error_that_guesses_it():
    message, indices = in_child(batch_that_cannot_travel)
    assert "Can what `collate_fn` returns be pickled?" in message
    assert indices == [0, 1, 2, 3]


# --- messages cut short ---------------------------------------------------------------------------


def large(samples):
    return bytes(20_000_000)  # no tensor: it goes through the pipe, which holds 64 kB


def same(samples):
    return samples


def killed_while_sending(thread):
    pool = pool_of(Range(), large)
    pool.begin(0, batches())
    time.sleep(0.5)  # both are in the midst of their first message, or wait for their turn
    for process in pool._processes:
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.1)
    found = []

    def ask():
        try:
            pool.next()
        except WorkerDied as error:
            found.append(error.exit_code)

    if thread:
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(20)
    else:
        ask()
    pool.close(kill=True)
    return found


@pytest.mark.parametrize("thread", [False, True])
def test_half_a_message_of_a_dead_worker_is_not_waited_for(thread):
    assert in_child(killed_while_sending, thread) == [-9]


def killed_while_read():
    pool = pool_of(Range(), large)
    pool.begin(0, batches())
    for _ in range(3):
        pool.next()
    victim = pool._processes[1].pid
    killer = threading.Timer(0.02, os.kill, (victim, signal.SIGKILL))
    killer.start()
    try:
        while pool.next() is not None:
            pool._feed.begin(0, batches())  # an endless epoch
            pool._board[0] = pool._feed.generation
    except WorkerDied as error:
        return error.worker
    finally:
        killer.join()
        pool.close(kill=True)


def test_a_worker_killed_while_its_message_is_read_is_named():
    for _ in range(3):
        assert in_child(killed_while_read) == 1


# --- the end --------------------------------------------------------------------------------------


def closed_while(state):
    dataset = Ending(
        "sleep" if state == "hanging" else "SIGSTOP", at=0 if state != "resting" else -1
    )
    pool = pool_of(dataset)
    pool.begin(0, batches())
    if state == "resting":
        for _ in range(10):
            pool.next()
    else:
        while not float(dataset.moment):
            time.sleep(0.01)
    begun = time.monotonic()
    pool.close()
    pool.close()
    return time.monotonic() - begun, [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("state", ["resting", "hanging", "stopped"])
def test_close_ends_every_process_in_time(state):
    seconds, threads = in_child(closed_while, state)
    assert seconds < workers.GRACE + 1
    assert workers.THREAD not in threads


class IgnoresTheEnd:
    def __getitem__(self, index):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if index == 1:
            time.sleep(1000)
        return index


SCRIPT = """
import os, time
from tests.test_safe_generators_workers import IgnoresTheEnd, batches, pool_of
pool = pool_of(IgnoresTheEnd())
pool.begin(0, batches(8, 1))
pool.next()
time.sleep(0.2)
print(*(process.pid for process in pool._processes))
"""


def test_a_program_ends_although_a_worker_hangs_and_ignores_sigterm():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for pid in done.stdout.split():
        assert not Path(f"/proc/{pid}").exists()


def orphaned(how):
    """Those alive 2 s after the process that started them was killed."""
    read, write = os.pipe()
    consumer = os.fork()
    if not consumer:
        if how == "just forked":  # as where the parent is killed before they look for it
            os.register_at_fork(after_in_child=lambda: time.sleep(1))
        dataset = Ending("sleep", at=0)
        pool = pool_of(dataset)
        pool.begin(0, batches())
        while how == "at a sample" and not float(dataset.moment):
            time.sleep(0.01)
        os.write(write, " ".join(str(process.pid) for process in pool._processes).encode())
        time.sleep(1000)
    pids = [int(pid) for pid in os.read(read, 1000).split()]
    os.kill(consumer, signal.SIGKILL)
    os.waitpid(consumer, 0)
    time.sleep(3 if how == "just forked" else 2)
    return len(pids), [pid for pid in pids if lives(pid)]


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["at a sample", "just forked"])
def test_workers_end_with_a_parent_that_is_killed(how):
    assert in_child(orphaned, how) == (2, [])


def dropped():
    pool = pool_of(Range())
    pool.begin(0, batches())
    pool.next()
    assert len(children()) == 2
    del pool
    return children()


def test_a_pool_that_nobody_holds_any_more_ends_its_processes():
    assert in_child(dropped) == []


def copied_into_a_child():
    pool = pool_of(Range())
    pool.begin(0, batches())
    first = pool.next().batch.tolist()
    child = multiprocessing.get_context("fork").Process(target=pool.close)
    child.start()
    child.join()
    rest = [pool.next().batch.tolist() for _ in range(9)]
    pool.close()
    return [first, *rest]


def test_a_copy_of_the_pool_in_a_forked_child_ends_nothing():
    assert in_child(copied_into_a_child) == list(batches())


# --- generations ----------------------------------------------------------------------------------


def begun_anew():
    pool = pool_of(Range())
    pool.begin(0, batches())
    for _ in range(3):
        pool.next()
    pool.begin(1, batches(9, 2))
    second = []
    while (result := pool.next()) is not None:
        second.append(result.batch.tolist())
    pids = sorted(pid for pid, _ in children())
    pool.begin(2, batches(5, 5))
    third = pool.next().batch.tolist()
    assert pool.next() is None
    assert sorted(pid for pid, _ in children()) == pids
    pool.close()
    return second, third


def test_a_new_generation_gets_nothing_of_the_old_one_and_the_same_processes():
    assert in_child(begun_anew) == (list(batches(9, 2)), [0, 1, 2, 3, 4])


def failing_source():
    def source():
        yield [0, 1]
        yield [2, 3]
        raise ZeroDivisionError("in the sampler")

    pool = pool_of(Range())
    pool.begin(0, source())
    made = [pool.next().batch.tolist() for _ in range(2)]
    try:
        pool.next()
    except ZeroDivisionError as error:
        return made, str(error)
    finally:
        pool.close()


def test_an_error_of_the_sampler_comes_after_the_batches_before_it():
    assert in_child(failing_source) == ([[0, 1], [2, 3]], "in the sampler")


def drawn_beside():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pool = pool_of(Range())
    pool.begin(0, batches())
    pool.next()
    pool.close()
    return expected.equal(torch.rand(3))


def test_the_global_generator_is_left_as_found():
    assert in_child(drawn_beside)


# --- errors that travel, and a torch that has changed ---------------------------------------------


def test_the_errors_keep_what_they_know_when_they_are_pickled():
    error = WorkerDied("gone", worker=1, pid=7, exit_code=-15, indices=[1, 2], index=2)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is WorkerDied
    assert (str(copy), copy.signal, copy.indices, copy.index) == ("gone", "SIGTERM", [1, 2], 2)
    assert isinstance(copy, RuntimeError)
    assert WorkerDied("gone", exit_code=-1000).signal == "signal 1000"


def test_a_torch_without_its_private_functions_is_refused_with_what_to_do(monkeypatch):
    from torch.utils.data._utils import signal_handling

    monkeypatch.delattr(signal_handling, "_set_worker_pids")
    with pytest.raises(RuntimeError, match=r"_set_worker_pids.*use `num_workers=0`"):
        pool_of(Range())
