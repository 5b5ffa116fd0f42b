"""Threads and forks: what is shared, what is made anew, and what the report finds before a fork."""

import itertools
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cln_tutorial.safe_generators.processes import (
    ForkSafetyReport,
    PerProcess,
    fork_safety_report,
)
from cln_tutorial.safe_generators.threads import threadsafe

LIMIT = 30  # seconds: what waits for a dead lock waits for ever, on a busy machine too


class Hung(Exception):
    pass


def in_fork(function, limit=LIMIT):
    """What the function returns in a forked child; Hung, and the child killed, after the limit."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        child = os.fork()
    if child == 0:
        try:
            os.write(writing, pickle.dumps(function()))
        except BaseException as error:
            os.write(writing, pickle.dumps(error))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], limit)[0]:
            raise Hung
        found = pickle.loads(os.read(reading, 1 << 16))
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if isinstance(found, BaseException):
        raise found
    return found


@pytest.fixture
def lock_held_by_a_thread():
    """A lock that another thread holds, for certain, until the test is over."""
    lock, held, over = threading.Lock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold, name="holder")
    thread.start()
    assert held.wait(LIMIT)
    yield lock
    over.set()
    thread.join()


# --- one generator for several threads ------------------------------------------------------------


def slow_numbers(n):
    for number in range(n):
        time.sleep(0.0002)  # a thread is switched here, inside the generator
        yield number


def drawn_by_threads(source, n_threads=4):
    """What each thread drew, and the errors that ended some of them."""
    together = threading.Barrier(n_threads)

    def draw(_):
        drawn = []
        together.wait()
        try:
            for item in source:
                drawn.append(item)
        except (ValueError, RuntimeError) as error:
            return drawn, error
        return drawn, None

    with ThreadPoolExecutor(n_threads) as pool:
        found = list(pool.map(draw, range(n_threads)))
    return [drawn for drawn, _ in found], [error for _, error in found if error]


def test_threads_that_share_a_bare_generator_die_and_those_of_a_threadsafe_one_do_not():
    _, errors = drawn_by_threads(slow_numbers(300))
    assert 1 <= len(errors) <= 3
    assert {str(error) for error in errors} == {"generator already executing"}
    drawn, errors = drawn_by_threads(threadsafe(slow_numbers(300)))
    assert errors == []
    assert sorted(itertools.chain(*drawn)) == list(range(300))
    assert sum(map(bool, drawn)) > 1, "one thread drew everything: nothing was shared"


@pytest.mark.parametrize("source", [range(50), list(range(50)), map(int, range(50))])
def test_any_iterable_can_be_shared(source):
    drawn, errors = drawn_by_threads(threadsafe(source))
    assert errors == []
    assert sorted(itertools.chain(*drawn)) == list(range(50))


def test_a_generator_that_fails_is_no_end_of_the_data_for_the_other_threads():
    def failing():
        yield from slow_numbers(5)
        raise KeyError("sample 5")

    shared = threadsafe(failing())
    assert [next(shared) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="sample 5"):
        next(shared)
    # Python's own answer would be StopIteration from now on.
    for _ in range(2):
        with pytest.raises(RuntimeError, match="failed in another thread, or earlier") as again:
            next(shared)
        assert repr(again.value.__cause__) == "KeyError('sample 5')"


def test_the_end_stays_the_end():
    shared = threadsafe(n for n in range(2))
    assert list(shared) == [0, 1]
    assert list(shared) == []


def test_close_runs_the_finally_of_the_generator_and_ends_it():
    closed = []

    def numbers():
        try:
            yield from range(10)
        finally:
            closed.append(True)

    shared = threadsafe(numbers())
    assert next(shared) == 0
    shared.close()
    assert closed == [True]
    assert list(shared) == []
    listed = threadsafe([1, 2])
    listed.close()
    assert list(listed) == []


def test_a_generator_that_asks_itself_gets_the_error_of_python_and_no_deadlock():
    def selfish():
        yield next(shared[0])

    shared = [threadsafe(selfish())]
    with pytest.raises(ValueError, match="already executing"):
        in_fork(lambda: next(shared[0]) if _same_process(shared[0]) else None)


def _same_process(shared):
    shared._process = os.getpid()  # so that the child may ask: it can be killed if it hangs
    return True


def test_a_forked_process_may_not_draw_from_it_even_while_a_thread_holds_its_lock():
    shared = threadsafe(range(10))
    with pytest.raises(RuntimeError, match=r"belongs to process \d+.*ShardedIterable"):
        in_fork(lambda: next(shared))
    held, over = threading.Event(), threading.Event()

    def waiting():
        held.set()
        over.wait()
        yield 0

    slow = threadsafe(waiting())
    thread = threading.Thread(target=next, args=(slow,))
    thread.start()
    assert held.wait(LIMIT)
    try:
        with pytest.raises(RuntimeError, match="belongs to process"):
            in_fork(lambda: next(slow))
    finally:
        over.set()
        thread.join()


def test_what_cannot_be_iterated_is_refused(unchecked):
    with pytest.raises(TypeError, match=r"must be iterable; got function. Call the generator func"):
        threadsafe(slow_numbers)
    with pytest.raises(TypeError, match="must be iterable; got int"):
        threadsafe(3)


# --- one thing for each process -------------------------------------------------------------------


class Client:
    """A connection: it knows its process, works there only, and says when it is closed."""

    def __init__(self, *arguments):
        self.arguments, self.process, self.lock = arguments, os.getpid(), threading.Lock()

    def ask(self):
        if self.process != os.getpid():
            raise RuntimeError("the socket of another process")
        with self.lock:
            return os.getpid()


def test_a_process_makes_its_instance_once_and_a_forked_one_makes_its_own():
    client = PerProcess(Client, "host", 5555)
    assert client().arguments == ("host", 5555)
    assert client() is client()
    assert client().ask() == os.getpid()
    bare = Client()
    with pytest.raises(RuntimeError, match="another process"):
        in_fork(bare.ask)
    assert in_fork(lambda: client().ask()) != os.getpid()
    assert in_fork(lambda: client() is client())
    assert in_fork(lambda: client().arguments) == ("host", 5555)
    assert client().ask() == os.getpid()


def test_a_lock_held_at_the_fork_hangs_the_child_and_a_lock_per_process_does_not(
    lock_held_by_a_thread,
):
    def take(lock):
        with lock:
            return "taken"

    with pytest.raises(Hung):
        in_fork(lambda: take(lock_held_by_a_thread), limit=1)
    lock = PerProcess(threading.Lock)
    with lock():
        assert in_fork(lambda: take(lock())) == "taken"


def test_threads_that_ask_at_once_get_the_same_instance():
    made = []

    def slow():
        time.sleep(0.02)
        made.append(object())
        return made[-1]

    thing, together = PerProcess(slow), threading.Barrier(4)

    def ask(_):
        together.wait()
        return thing()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    assert len(made) == 1


def test_a_fork_while_another_thread_makes_its_instance_does_not_hang_the_child():
    making, over = threading.Event(), threading.Event()

    def factory():
        if threading.current_thread() is not threading.main_thread():
            making.set()
            over.wait()
        return os.getpid()

    thing = PerProcess(factory)
    thread = threading.Thread(target=thing)
    thread.start()
    assert making.wait(LIMIT)
    try:
        assert in_fork(thing) != os.getpid()
    finally:
        over.set()
        thread.join()
    assert thing() == os.getpid()


class Finalised:
    def __init__(self, descriptor):
        self.descriptor = descriptor

    def __del__(self):
        os.write(self.descriptor, b"closed")


def test_the_inherited_instance_is_not_finalised_in_the_child():
    reading, writing = os.pipe()
    thing = PerProcess(Finalised, writing)
    thing()

    def replace():
        new = thing()
        thing._made.clear()
        del new  # this one is the child's own, and may be closed
        return select.select([reading], [], [], 0)[0] and os.read(reading, 100)

    assert in_fork(replace) == b"closed"
    del thing
    assert os.read(reading, 100) == b"closed"
    os.close(reading)
    os.close(writing)


class Asking(Dataset):
    """Each item is answered by this process's client."""

    def __init__(self):
        self.client = PerProcess(Client, "host")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.client().ask()


def test_a_pickled_one_starts_without_an_instance():
    asking = Asking()
    mine = asking.client()
    copy = pickle.loads(pickle.dumps(asking))
    assert copy.client() is not mine
    assert copy.client().arguments == ("host",)
    failing = PerProcess(lambda: 1)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(failing)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_workers_of_a_loader_ask_clients_of_their_own(method):
    asking = Asking()
    asking.client()  # as life has it: used before the workers start
    loader = DataLoader(
        asking, num_workers=1 + (method == "fork"), multiprocessing_context=method, timeout=120
    )
    answered_by = {int(pid) for pid in loader}
    assert len(answered_by) == loader.num_workers
    assert os.getpid() not in answered_by


def test_a_thing_that_is_made_already_is_refused(unchecked):
    with pytest.raises(TypeError, match="must be a function that makes the thing; got list"):
        PerProcess([])


# --- the report -----------------------------------------------------------------------------------

FRESH = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from cln_tutorial.safe_generators.processes import fork_safety_report

report = fork_safety_report()
assert report.safe and not report.threads and not report.locks and not report.cuda, str(report)
assert str(report).startswith("fork: nothing found against it"), str(report)

module_lock = threading.Lock()
with module_lock:
    assert fork_safety_report().locks == ("__main__.module_lock",)
    assert not fork_safety_report().safe
assert fork_safety_report().safe

started, over = threading.Event(), threading.Event()
def importing():
    started.set()
    import slow_module
thread = threading.Thread(target=importing)
thread.start()
started.wait()
while "slow_module" not in sys.modules:
    pass
assert "import of slow_module" in fork_safety_report().locks, str(fork_safety_report())
sys.modules["slow_module"].over.set()
thread.join()
assert fork_safety_report().safe
print("all as it should be")
"""


def test_a_fresh_process_is_safe_until_it_holds_a_lock_or_imports_in_a_thread(tmp_path):
    # A process of its own: the suite's may have threads.
    text = "import threading\nover = threading.Event()\nover.wait()\n"
    (tmp_path / "slow_module.py").write_text(text)
    ran = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout == "all as it should be\n", ran.stderr


def test_the_report_names_threads_and_says_which_are_daemons():
    over = threading.Event()
    threads = [
        threading.Thread(target=over.wait, name=name, daemon=name == "watcher")
        for name in ("prefetcher", "watcher")
    ]
    for thread in threads:
        thread.start()
    report = fork_safety_report()
    over.set()
    for thread in threads:
        thread.join()
    assert {"prefetcher", "watcher (daemon)"} <= set(report.threads)
    assert threading.current_thread().name not in report.threads
    assert not report.safe
    assert str(report).startswith("fork: unsafe, use spawn or forkserver\n  other Python thread: ")
    assert "\n  other Python thread: prefetcher\n" in str(report)


REENTRANT, CONDITION = threading.RLock(), threading.Condition()


def test_a_reentrant_lock_counts_if_another_thread_holds_it():
    def locks():
        return {name.rpartition(".")[2] for name in fork_safety_report().locks}

    def hold():
        with REENTRANT, CONDITION:
            held.set()
            over.wait()

    assert not locks() & {"REENTRANT", "CONDITION"}
    with REENTRANT:
        # The child's one thread may enter it again.
        assert "REENTRANT" not in locks()
    held, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, daemon=True)  # it may wait for a lock left behind
    thread.start()
    assert held.wait(5), "the report has left a lock behind"
    assert {"REENTRANT", "CONDITION"} <= locks()
    over.set()
    thread.join()
    assert not locks() & {"REENTRANT", "CONDITION"}


def test_an_initialised_cuda_is_unsafe(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    report = fork_safety_report()
    assert report.cuda
    assert not report.safe
    assert "CUDA is initialised" in str(report)


@pytest.mark.parametrize(
    ("report", "safe"),
    [
        (ForkSafetyReport((), (), False, 8), True),
        (ForkSafetyReport((), (), False, None), True),
        (ForkSafetyReport(("a",), (), False, 0), False),
        (ForkSafetyReport((), ("m.lock",), False, 0), False),
        (ForkSafetyReport((), (), True, 0), False),
    ],
)
def test_each_finding_alone_is_unsafe_and_threads_of_libraries_are_only_told(report, safe):
    assert report.safe is safe
    assert ("unsafe" in str(report)) is not safe
    assert ("(8 threads of libraries)" in str(report)) == (report.native_threads == 8)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_threads_of_libraries_are_those_that_python_does_not_know():
    before = fork_safety_report().native_threads
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    during = fork_safety_report().native_threads
    over.set()
    thread.join()
    assert before == during >= 0
