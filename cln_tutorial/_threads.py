"""A pool for loops that release the GIL: as many threads as PyTorch may use, and safe after a fork.

The threads are Python's, because two of them may not enter the pool that Numba itself would start.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None


def in_threads(units: int, threads: int, run: Callable[[int, int], None]) -> None:
    """Call ``run(start, stop)`` on ranges that cover all units, one range for each thread."""
    global _pool
    if threads <= 1:
        run(0, units)
        return
    borders = [units * n // threads for n in range(threads + 1)]
    mine, *others = itertools.pairwise(borders)
    try:
        _pool = _pool or ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cln_tutorial")
        tasks = [_pool.submit(run, *share) for share in others]
    except RuntimeError:  # the interpreter is shutting down, and takes no more tasks
        run(0, units)
        return
    run(*mine)
    for task in tasks:
        task.result()


def _forget_the_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # a forked child inherits the pool without its threads
    os.register_at_fork(after_in_child=_forget_the_pool)
