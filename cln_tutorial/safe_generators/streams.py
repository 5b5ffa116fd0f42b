"""The random numbers of a sample: a function of (seed, epoch, index), and of nothing else.

Not of the worker that makes the sample, not of the samples before it, not of the rank. So a run
gives the same augmentations on any number of workers, after a restart, and on another machine.
"""

import operator
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

# Second word of the key: who draws. The order of an epoch must not depend on what samples draw.
SAMPLE, STATES, ORDER, BATCH = range(4)

_MERSENNE = 624  # words of 32 bits in the state of the generators of Python, NumPy and torch
_HEADER = 24  # bytes before them in the state of a torch generator, where each word takes 8


class SampleKey(NamedTuple):
    """Which sample: the epoch goes with the index, so workers that live on need no message.

    Args:
        epoch: 0 or more.
        index: of the data set, 0 or more.

    Source:
        Article 6575, section 3, asks for each sample once per epoch.

    Example:
        >>> from cln_tutorial.safe_generators.streams import SampleKey
        >>> SampleKey(epoch=2, index=7)
        SampleKey(epoch=2, index=7)
    """

    epoch: int
    index: int


def sample_generator(
    seed: int, epoch: int, index: int, *, kind: str = "numpy"
) -> np.random.Generator | torch.Generator | random.Random:
    r"""Return the random generator of one sample, which belongs to it alone.

    For NumPy that is Philox, a cipher of a counter: the key holds the seed, the two upper words of
    the counter hold epoch and index. A stream would have to give :math:`2^{128}` blocks before it
    met the next one, so streams cannot overlap. The generators of PyTorch (CPU) and Python have no
    counter. Their state is filled from another Philox stream of the sample: all of it for PyTorch,
    whose ``manual_seed`` looks at 32 bits only, so that among 100,000 samples two would be likely
    to share their draws; 128 bits for Python.

    Args:
        seed: of the run, at least 0 and below :math:`2^{64}`, the same on all ranks.
        epoch: likewise.
        index: of the sample in the data set, likewise.
        kind: "numpy", "torch" or "python".

    Returns:
        A new ``numpy.random.Generator``, ``torch.Generator`` or ``random.Random``.

    Raises:
        TypeError: if ``seed``, ``epoch`` or ``index`` is no integer.
        ValueError: if one of them is out of range, or ``kind`` is unknown.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Matsumoto &
        Nishimura 1998 (the Mersenne twister of the other two).

    Example:
        >>> from cln_tutorial.safe_generators.streams import sample_generator
        >>> first = sample_generator(seed=0, epoch=3, index=17)
        >>> again = sample_generator(seed=0, epoch=3, index=17)
        >>> bool(first.random() == again.random())
        True
    """
    seed, epoch, index = word("seed", seed), word("epoch", epoch), word("index", index)
    if kind == "numpy":
        return _Philox(seed, SAMPLE).at(epoch, index)
    if kind not in ("torch", "python"):
        raise ValueError(f"`kind` must be 'numpy', 'torch' or 'python'; got {kind!r}.")
    states = _States(seed, STATES)
    states.at(epoch, index)
    if kind == "python":
        return random.Random(states.python)
    generator = torch.Generator()
    generator.set_state(states.torch)
    return generator


class SeededDataset(Dataset):
    """A map-style data set whose samples draw the same whoever makes them.

    A data set with a method ``getitem(index, rng)`` gets the NumPy generator of the sample, good
    until the next sample is made: that costs next to nothing, and it must draw from nothing else,
    because the global states are not set then. Any other is asked for
    ``dataset[index]`` with the global states of ``random``, ``numpy.random`` and ``torch`` (CPU)
    set from (seed, epoch, index), and restored afterwards: transforms that draw from them need no
    change, but only one thread may do so at a time. A generator that a data set keeps for itself is
    out of reach in both ways.

    Args:
        dataset: anything with ``[index]``; ``len`` if it has one.
        seed: as in ``sample_generator``.

    Raises:
        TypeError: if ``dataset`` has no index, or ``seed`` is no integer.
        ValueError: if ``seed`` is out of range.

    Source:
        Article 6575, section 3. In a ``DataLoader`` alone the draws depend on ``num_workers``, and
        a generator kept in the data set is copied into each worker.

    Example:
        >>> from cln_tutorial.safe_generators.streams import SampleKey, SeededDataset
        >>> class Noisy(torch.utils.data.Dataset):
        ...     def __len__(self):
        ...         return 10
        ...     def __getitem__(self, index):
        ...         return index + torch.rand(())
        >>> data = SeededDataset(Noisy(), seed=1)
        >>> first = data[4]
        >>> data[3].equal(first), data[4].equal(first), data[SampleKey(1, 4)].equal(first)
        (False, True, False)
    """

    def __init__(self, dataset: Any, seed: int = 0):
        has_index = hasattr(dataset, "getitem") or hasattr(dataset, "__getitem__")
        if isinstance(dataset, IterableDataset) or not has_index:
            raise TypeError(
                f"`dataset` must have `[index]` or `getitem(index, rng)`; got "
                f"{type(dataset).__name__}. A stream goes to `ShardedIterable`."
            )
        self.dataset, self.seed = dataset, word("seed", seed)
        # Seen by the workers of a plain `DataLoader` that live on, too.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._thread = threading.local()

    @property
    def epoch(self) -> int:
        """The epoch of ``[index]``; a ``SampleKey`` brings its own."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of ``[index]``.

        Args:
            epoch: 0 or more.

        Raises:
            ValueError: if it is negative.
        """
        self._epoch.fill_(word("epoch", epoch, bits=63))

    def __len__(self) -> int:
        """Length of the data set."""
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | SupportsIndex) -> Any:
        """Make one sample.

        Args:
            key: epoch and index, or the index in the epoch that was set.

        Returns:
            What the data set returns.

        Raises:
            TypeError: if the index is no integer.
            IndexError: if it is negative beyond the length; and what the data set raises.
        """
        epoch, index = key if isinstance(key, SampleKey) else (self.epoch, key)
        index = self._position(index)
        philox, states = self._own()
        if hasattr(self.dataset, "getitem"):
            return self.dataset.getitem(index, philox.at(epoch, index))
        if not self._thread.saved:
            with self.restored():
                return self[key]
        states.at(epoch, index)
        states.set()
        return self.dataset[index]

    def __getitems__(self, keys: Sequence[Any]) -> list[Any]:
        """Make a batch, as ``DataLoader`` asks for it: the global states are saved once.

        Args:
            keys: of the samples.

        Returns:
            List of what the data set returns.
        """
        with self.restored():
            return [self[key] for key in keys]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Save the global states before a block of samples, and restore them after it.

        Saving costs more than setting, so a loader does it once per batch. Inside of such a block
        single samples leave it to the block.
        """
        self._own()
        if hasattr(self.dataset, "getitem") or self._thread.saved:
            yield
            return
        self._thread.saved = True
        try:
            with _states_kept():
                yield
        finally:
            self._thread.saved = False

    def _own(self) -> "tuple[_Philox, _States]":
        """What this thread moves from sample to sample."""
        try:
            return self._thread.own
        except AttributeError:
            self._thread.saved = False
            self._thread.own = _Philox(self.seed, SAMPLE), _States(self.seed, STATES)
            return self._thread.own

    def _position(self, index: SupportsIndex) -> int:
        try:
            position = operator.index(index)
        except TypeError:
            raise TypeError(f"an index must be an integer; got {index!r}.") from None
        if position < 0:
            position += len(self)
        if position < 0:
            raise IndexError(f"index {index} is out of range for a length of {len(self)}.")
        return position

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._thread = threading.local()


@contextmanager
def batch_states(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Set the global states for what is drawn for a batch as a whole, and restore them after it."""
    states = _States(seed, BATCH)
    with _states_kept():
        states.at(epoch, index)
        states.set()
        yield


@contextmanager
def _states_kept() -> Iterator[None]:
    python, torchs = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torchs)


class _Philox:
    """One Philox of a seed, moved from sample to sample: a new one takes 20 times as long."""

    def __init__(self, seed: int, who: int):
        self.bits = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.bits)
        self._counter = [0, 0, 0, 0]
        # Lists of Python's integers: NumPy reads its own arrays ten times as slowly here.
        self._state = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": [seed, who]},
            "buffer": [0, 0, 0, 0],
            "buffer_pos": 4,  # empty: what another sample left there is gone
            "has_uint32": 0,
            "uinteger": 0,
        }

    def at(self, epoch: int, index: int) -> np.random.Generator:
        """The generator at the start of the stream of a sample."""
        self._counter[2], self._counter[3] = epoch, index
        self.bits.state = self._state
        return self.generator


def philox_bits(seed: int, who: int, epoch: int, index: int) -> np.random.Philox:
    """A new bit generator: at the stream of (epoch, index) of ``who`` draws from this seed."""
    philox = _Philox(seed, who)
    philox.at(epoch, index)
    return philox.bits


class _States:
    """States for the generators without a counter, and for the global ones of a process."""

    def __init__(self, seed: int, who: int):
        self._philox = _Philox(seed, who)
        # As of a generator that was just seeded; all of its words are replaced for each sample.
        self.torch = torch.Generator().manual_seed(0).get_state()
        stop = _HEADER + 8 * _MERSENNE
        self._torch_words = self.torch[_HEADER:stop].numpy().view(np.uint64)
        self.python, self.numpy = 0, np.zeros(4, dtype=np.uint32)

    def at(self, epoch: int, index: int) -> None:
        """Fill them for a sample."""
        self._philox.at(epoch, index)
        words = self._philox.bits.random_raw(4 + _MERSENNE // 2)
        self.python = int.from_bytes(words[:2].tobytes(), "little")
        self.numpy = words[2:4].view(np.uint32)
        self._torch_words[:] = words[4:].view(np.uint32)

    def set(self) -> None:
        """Give them to the global generators of this process."""
        random.seed(self.python)
        np.random.seed(self.numpy)  # noqa: NPY002  transforms draw from the old global generator
        torch.set_rng_state(self.torch)


def word(name: str, value: int, bits: int = 64) -> int:
    """The value as Python's integer, if it fits into a word of the key or the counter."""
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer; got {type(value).__name__}.") from None
    if not 0 <= found < 2**bits:
        raise ValueError(f"`{name}` must be at least 0 and below 2**{bits}; got {found}.")
    return found
