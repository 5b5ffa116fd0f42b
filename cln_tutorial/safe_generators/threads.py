"""A generator that several threads may share."""

import os
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any


def threadsafe(generator_or_iterable: Iterable[Any]) -> Iterator[Any]:
    """Let several threads draw from one iterator: each item goes to one of them.

    A generator cannot be entered twice: the second thread gets ``ValueError: generator already
    executing`` and dies. Here the threads wait for each other. What the generator computes is not
    parallel; only what the threads do with the items is.

    Args:
        generator_or_iterable: a generator, or anything with ``iter``.

    Returns:
        An iterator with ``close()``. If the source fails, the thread that asked gets the error
        itself, and all others a ``RuntimeError`` from it: they do not take it for the end. In
        another process it raises ``RuntimeError``: a forked copy would give every item again.

    Raises:
        TypeError: if there is nothing to iterate over; a generator function must be called first.

    Source:
        Article 6575, section 3, whose generator hangs when it is shared; PEP 255 on re-entry.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from cln_tutorial.safe_generators.threads import threadsafe
        >>> numbers = threadsafe(n for n in range(1000))
        >>> with ThreadPoolExecutor(4) as pool:
        ...     shares = list(pool.map(lambda _: list(numbers), range(4)))
        >>> sorted(n for share in shares for n in share) == list(range(1000))
        True
    """
    if not isinstance(generator_or_iterable, Iterable):
        hint = " Call the generator function." if callable(generator_or_iterable) else ""
        raise TypeError(
            f"`generator_or_iterable` must be iterable; got "
            f"{type(generator_or_iterable).__name__}.{hint}"
        )
    return _ThreadSafe(iter(generator_or_iterable))


class _ThreadSafe(Iterator[Any]):
    def __init__(self, source: Iterator[Any]):
        self._source = source
        # Of the re-entrant kind: a generator that asks itself gets Python's error, and no deadlock.
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._failure: BaseException | None = None

    def __next__(self) -> Any:
        # Before the lock, which a thread may have held when this process was forked.
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this iterator belongs to process {self._process}, and this is {os.getpid()}: "
                f"every process would get every item. Use `ShardedIterable` for worker processes."
            )
        with self._lock:
            if self._failure is not None:
                raise RuntimeError(
                    "the shared generator failed in another thread, or earlier"
                ) from self._failure
            try:
                return next(self._source)
            except StopIteration:
                raise
            except BaseException as error:
                self._failure = error
                raise

    def close(self) -> None:
        """End the generator, if it is one; afterwards there are no more items."""
        with self._lock:
            if isinstance(self._source, Generator):
                self._source.close()
            self._source = iter(())
