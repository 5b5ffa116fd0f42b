"""The order of an epoch: a permutation that can be entered anywhere.

Up to ten million samples it is a table. Above, each entry is computed when it is asked for, so a
resumed run does not begin by shuffling 10^8 numbers.
"""

import operator
from typing import Any

import numpy as np

from cln_tutorial.safe_generators.streams import ORDER, philox_bits, word

TABLE = 10**7  # entries; a table of that length takes 80 MB, and half a second
_ROUNDS = 8


def epoch_order(length: int, seed: int, epoch: int) -> "np.ndarray | FeistelOrder":
    """Return the order of one epoch: the same on all ranks, another one in each epoch.

    Args:
        length: of the data set.
        seed: of the run, at least 0 and below 2**64.
        epoch: likewise.

    Returns:
        A permutation of ``range(length)`` with ``len``, ``[position]``, ``[slice]`` and
        ``[array of positions]``, of dtype int64: an array up to ten million samples, and above it
        an object that takes no memory and computes each entry.

    Raises:
        TypeError: if an argument is no integer.
        ValueError: if an argument is out of range.

    Source:
        Up to ten million the shuffle of Fisher & Yates as in NumPy's ``RandomState``, whose results
        NumPy promises not to change (NEP 19); above, see ``FeistelOrder``.

    Example:
        >>> from cln_tutorial.safe_generators.permutation import epoch_order
        >>> sorted(epoch_order(5, seed=0, epoch=0).tolist())
        [0, 1, 2, 3, 4]
        >>> len(epoch_order(10**12, seed=0, epoch=0)[10**11 : 10**11 + 64])
        64
    """
    key = _key(length, seed, epoch)
    if length > TABLE:
        return FeistelOrder(length, seed, epoch)
    shuffled = np.random.RandomState(philox_bits(*key)).permutation(length)
    return shuffled.astype(np.int64, copy=False)


class FeistelOrder:
    r"""A keyed permutation of ``range(length)``, computed entry by entry.

    The bits of a position are cut into two halves, and in turn each half is changed by a function
    of the other one, :math:`l \leftarrow l \oplus F_k(r)`. Each round can be undone whatever
    :math:`F_k` is, so the whole is a permutation of :math:`2^b` numbers. If it leads out of the
    range, it is applied again until it comes back (cycle walking), less than twice on average.

    Args:
        length: at least 0, below 2**63.
        seed: of the run, at least 0 and below 2**64.
        epoch: likewise.

    Raises:
        TypeError: if an argument is no integer.
        ValueError: if an argument is out of range.

    Source:
        Luby & Rackoff 1988; Black & Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle
        walking); the mixing function is that of Steele, Lea & Flood 2014 (SplitMix).

    Example:
        >>> from cln_tutorial.safe_generators.permutation import FeistelOrder
        >>> order = FeistelOrder(10**12, seed=0, epoch=0)
        >>> order[10**11 : 10**11 + 2].tolist() == [order[10**11], order[10**11 + 1]]
        True
        >>> sorted(FeistelOrder(6, seed=0, epoch=0)[:].tolist())
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, length: int, seed: int, epoch: int):
        self._length = length
        self._keys = philox_bits(*_key(length, seed, epoch)).random_raw(_ROUNDS)
        bits = max((length - 1).bit_length(), 2)
        self._low = np.uint64(bits // 2)
        self._masks = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)

    def __len__(self) -> int:
        """Number of entries."""
        return self._length

    def __getitem__(self, where: Any) -> Any:
        """Compute entries.

        Args:
            where: a position, a slice, or an array of positions.

        Returns:
            An integer, or an int64 array of the same shape as the positions.

        Raises:
            IndexError: if a position is not in the range.
        """
        if isinstance(where, slice):
            return self._walked(np.arange(*where.indices(self._length)))
        if isinstance(where, np.ndarray):
            return self._walked(where)
        return int(self._walked(np.array([operator.index(where)]))[0])

    def _walked(self, positions: np.ndarray) -> np.ndarray:
        positions = np.where(positions < 0, positions + self._length, positions)
        if positions.size and not 0 <= positions.min() <= positions.max() < self._length:
            raise IndexError(f"a position is out of range for an order of {self._length} entries.")
        length = np.uint64(self._length)
        found = self._permuted(positions.astype(np.uint64).ravel())
        outside = np.flatnonzero(found >= length)
        while outside.size:
            found[outside] = self._permuted(found[outside])
            outside = outside[found[outside] >= length]
        return found.astype(np.int64).reshape(positions.shape)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        halves = [numbers & self._masks[0], numbers >> self._low]
        for number, key in enumerate(self._keys):
            side = number % 2
            halves[side] ^= _mixed(halves[1 - side] ^ key) & self._masks[side]
        return halves[0] | (halves[1] << self._low)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, in place: every bit of the result depends on every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    numbers ^= numbers >> np.uint64(31)
    return numbers


def _key(length: int, seed: int, epoch: int) -> tuple[int, int, int, int]:
    """Arguments of ``philox_bits``. The length is one: two data sets are not shuffled alike."""
    return word("seed", seed), ORDER, word("epoch", epoch), word("length", length, bits=63)
