"""What a fork does to threads, locks and connections: find it before, or make it anew after.

A fork copies the memory and one thread. A lock that another thread held stays locked in the copy
for ever; thread pools, sockets and CUDA contexts are there and do not work.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import _bootstrap
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakSet

import torch

T = TypeVar("T")
_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())


class PerProcess(Generic[T]):
    """A thing that each process makes for itself, when it first asks for it.

    Connections, clients, thread pools, open files and locks do not survive a fork and cannot be
    pickled. Give the data set a ``PerProcess`` of them: in a forked or spawned worker the factory
    runs again.

    Args:
        factory: returns the thing. For spawned workers it must be importable: no lambda.
        args: what the factory is called with.

    Raises:
        TypeError: if ``factory`` cannot be called.

    Source:
        Article 6575, section 3: the client that hangs inside Keras' workers.

    Example:
        >>> from cln_tutorial.safe_generators.processes import PerProcess
        >>> cursor = PerProcess(list, "ab")
        >>> cursor(), cursor() is cursor()
        (['a', 'b'], True)
    """

    def __init__(self, factory: Callable[..., T], *args: Any):
        if not callable(factory):
            raise TypeError(
                f"`factory` must be a function that makes the thing; got {type(factory).__name__}. "
                f"What is made already cannot be made again in another process."
            )
        self._factory, self._args = factory, args
        self._made: list[T] = []
        self._inherited: list[T] = []
        self._lock = threading.RLock()
        _ALL.add(self)

    def __call__(self) -> T:
        """This process's instance, made at the first call; threads of a process share it."""
        if not self._made:
            with self._lock:
                if not self._made:
                    self._made.append(self._factory(*self._args))
        return self._made[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._factory, *self._args)

    def _forget(self) -> None:
        # Kept, because its finaliser could end the parent's connection.
        self._inherited += self._made
        self._made = []
        self._lock = threading.RLock()


_ALL: WeakSet[PerProcess] = WeakSet()


def _forget_all() -> None:
    for each in list(_ALL):
        each._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


class ForkSafetyReport(NamedTuple):
    """What a fork at this moment would copy and break; its text says it in lines.

    ``threads`` are the other Python threads, by name; ``locks`` the locks found held; ``cuda`` says
    whether CUDA is initialised; ``native_threads`` counts the threads that Python does not know
    (None where the system does not tell).
    """

    threads: tuple[str, ...]
    locks: tuple[str, ...]
    cuda: bool
    native_threads: int | None

    @property
    def safe(self) -> bool:
        """Whether nothing was found that a forked worker could wait for in vain."""
        return not (self.threads or self.locks or self.cuda)

    def __str__(self) -> str:
        lines = [f"other Python thread: {name}" for name in self.threads]
        lines += [f"held lock: {name}" for name in self.locks]
        lines += ["CUDA is initialised: a forked worker cannot use it"] * self.cuda
        found = "\n".join(f"  {line}" for line in lines)
        note = f"\n  ({self.native_threads} threads of libraries)" if self.native_threads else ""
        if self.safe:
            return f"fork: nothing found against it{note}"
        return f"fork: unsafe, use spawn or forkserver\n{found}{note}"


def fork_safety_report() -> ForkSafetyReport:
    """Look for what makes a fork dangerous: other threads, held locks, CUDA.

    Locks are found where they can be: in the global variables of imported modules, and those of
    imports under way. A lock inside an object or a C library is seen by nobody, so that any other
    Python thread counts as unsafe. Those of ``logging`` are left out: Python makes them anew in the
    child. So are threads of libraries (OpenMP's, say): nearly every process that has used torch has
    them; they are counted.

    Returns:
        The report; ``report.safe`` for programs, ``print(report)`` for people.

    Source:
        POSIX on ``fork``: the child has one thread, and the locks as they were. Python 3.12 warns
        of a fork with threads.

    Example:
        >>> import threading
        >>> from cln_tutorial.safe_generators.processes import fork_safety_report
        >>> go_on = threading.Event()
        >>> thread = threading.Thread(target=go_on.wait, name="prefetcher")
        >>> thread.start()
        >>> "prefetcher" in fork_safety_report().threads
        True
        >>> go_on.set()
        >>> thread.join()
    """
    others = [each for each in threading.enumerate() if each is not threading.current_thread()]
    return ForkSafetyReport(
        threads=tuple(sorted(f"{each.name}{' (daemon)' * each.daemon}" for each in others)),
        locks=tuple(sorted({*_held_globals(), *_imports_under_way()})),
        cuda=torch.cuda.is_initialized(),
        native_threads=_native_threads(),
    )


def _held_globals() -> Iterator[str]:
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        # These two make their locks anew in a forked child.
        if name in ("logging", "threading"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            lock = value._lock if type(value) is threading.Condition else value
            if _is_held(lock):
                yield f"{name}.{attribute}"


def _is_held(lock: Any) -> bool:
    if type(lock) is _LOCK:
        return lock.locked()
    if type(lock) is not _RLOCK:
        return False
    # One that this thread holds it may enter again, in the child too.
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


def _imports_under_way() -> Iterator[str]:
    for name, reference in list(_bootstrap._module_locks.items()):
        lock = reference()
        if lock is not None and lock.owner not in (None, threading.get_ident()):
            yield f"import of {name}"


def _native_threads() -> int | None:
    try:
        return max(len(os.listdir("/proc/self/task")) - threading.active_count(), 0)
    except OSError:
        return None
