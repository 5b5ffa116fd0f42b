"""Which sample comes when, on which rank: each once, and any place of an epoch can be entered.

The order of an epoch is the same on all ranks, which take their slices of it. So a state is one
number, the samples of all ranks that are gone, and fits any number of ranks.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import distributed
from torch.utils.data import Sampler

from cln_tutorial.safe_generators.permutation import FeistelOrder, epoch_order
from cln_tutorial.safe_generators.streams import word

VERSION = 1  # of the order and of the way it is cut; another one makes old states useless
_BLOCK = 4096  # positions that are looked up at once


class EpochSampler(Sampler):
    r"""Indices of one rank, epoch after epoch; the state fits any number of ranks.

    The order of an epoch is cut into global batches of ``batch_size * world_size``, of which rank
    :math:`r` takes the :math:`r`-th slice of ``batch_size``. What remains for the last, incomplete
    one is shared evenly; a rank may get nothing of it.

    Iterating again without :meth:`set_epoch` goes to the next epoch, never silently through the
    same one again. In a ``DataLoader`` give it the same ``batch_size``; with worker processes, the
    state here runs ahead of the samples delivered, which only a loader can count: use
    :class:`~cln_tutorial.safe_generators.SafeLoader`.

    Args:
        length: of the data set.
        seed: the same on all ranks, at least 0 and below 2**64.
        shuffle: a new order each epoch, or 0, 1, 2, ...
        rank: of this process, together with ``world_size``. None takes both from
            ``torch.distributed`` if it is initialised now, and rank 0 of 1 otherwise.
        world_size: number of ranks.
        batch_size: samples per batch of one rank.
        uneven: of the samples left for the last, incomplete global batch. "exact": each once, so
            the shares of two ranks may differ by one; "pad": all shares have the larger size, with
            the first samples of the order again; "drop": all have the smaller one, and up to
            ``world_size - 1`` samples are left out.

    Raises:
        TypeError: if ``length`` or ``seed`` is no integer.
        ValueError: if a number is out of range, ``rank`` and ``world_size`` do not fit, or
            ``uneven`` is unknown.

    Source:
        Article 6575, section 3, wants each sample once per epoch; torch's ``DistributedSampler``
        doubles some of them.

    Example:
        >>> from cln_tutorial.safe_generators.sampling import EpochSampler
        >>> [list(EpochSampler(10, shuffle=False, rank=rank, world_size=4)) for rank in range(4)]
        [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
        >>> sampler = EpochSampler(10, batch_size=4)
        >>> epochs = [list(sampler), list(sampler)]
        >>> sorted(epochs[0]) == sorted(epochs[1]), epochs[0] == epochs[1]
        (True, False)
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        batch_size: int = 1,
        uneven: str = "exact",
    ):
        if uneven not in ("exact", "pad", "drop"):
            raise ValueError(f"`uneven` must be 'exact', 'pad' or 'drop'; got {uneven!r}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
        self.length, self.seed = word("length", length, bits=63), word("seed", seed)
        self.shuffle, self.batch_size, self.uneven = shuffle, batch_size, uneven
        self.rank, self.world_size = place(rank, world_size)
        self.epoch = self.consumed = 0
        self._begun = False  # whether somebody has iterated over this epoch since it was set
        self._run = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; or nowhere, if it is the one of a state just loaded.

        Args:
            epoch: 0 or more.

        Raises:
            TypeError: if it is no integer.
            ValueError: if it is negative.
        """
        epoch = word("epoch", epoch)
        if self._begun or epoch != self.epoch:
            self._go_to(epoch, 0)

    def __len__(self) -> int:
        """Indices that are left for this rank in this epoch: all of them before it begins."""
        left = self.length - self.consumed
        return left // self._global_batch * self.batch_size + len(self._last_share(left))

    def __iter__(self) -> Iterator[int]:
        """Iterate over what is left of the epoch, or over the next one if this was begun."""
        if self._begun:
            self._go_to(self.epoch + 1, 0)
        self._begun = True
        self._run += 1
        return self._counted(self._run)

    def _counted(self, run: int) -> Iterator[int]:
        after = self.consumed
        for batch in self.batches():
            yield from batch[:-1]
            after = min(after + self._global_batch, self.length)
            if run == self._run:  # otherwise another iteration was begun meanwhile
                self.consumed = after
            yield batch[-1]
        if run == self._run:
            self._go_to(self.epoch + 1, 0)

    def batches(self) -> Iterator[list[int]]:
        """Lists of indices that are left for this rank in this epoch; nothing here changes.

        Returns:
            An iterator of lists of ``batch_size`` indices; the last one may be shorter, and there
            is none where this rank gets nothing.
        """
        order = epoch_order(self.length, self.seed, self.epoch) if self.shuffle else None
        return self._batches(order, self.consumed)

    def _batches(
        self, order: np.ndarray | FeistelOrder | None, consumed: int
    ) -> Iterator[list[int]]:
        def indices(positions: np.ndarray) -> list[Any]:
            return (positions if order is None else order[positions]).tolist()

        left, size = self.length - consumed, self._global_batch
        own = consumed + self.rank * self.batch_size + np.arange(self.batch_size)
        block = max(_BLOCK // self.batch_size, 1)
        for first in range(0, left // size, block):
            batches = np.arange(first, min(first + block, left // size))
            yield from indices(own + batches[:, None] * size)
        share = np.array(self._last_share(left), dtype=np.int64)
        if share.size:
            # Beyond the end, "pad" takes the first ones again.
            yield indices((consumed + left // size * size + share) % self.length)

    def _last_share(self, left: int) -> range:
        """This rank's part of the last, incomplete global batch, from its start."""
        small, more = divmod(left % self._global_batch, self.world_size)
        if self.uneven == "exact":
            start = self.rank * small + min(self.rank, more)
            return range(start, start + small + (self.rank < more))
        share = small + (self.uneven == "pad" and more > 0)
        return range(self.rank * share, (self.rank + 1) * share)

    def consumed_after(self, batches: int) -> int:
        """Samples of all ranks that are gone when each has used so many more of its batches.

        Args:
            batches: number of :meth:`batches`, counted from the present state.

        Returns:
            The ``"consumed"`` of a state.
        """
        return min(self.consumed + batches * self._global_batch, self.length)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is, as JSON can hold it.

        Returns:
            Version, seed, epoch, length, shuffle, and ``"consumed"``: samples of all ranks from the
            start of the epoch to the last global batch of which this rank has given all.
        """
        return {
            "version": VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "length": self.length,
            "shuffle": self.shuffle,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved, with any number of ranks and any batch size.

        Args:
            state: of :meth:`state_dict`, of any rank.

        Raises:
            ValueError: if it is of another length, seed, order or version, or is none.
            TypeError: if it is no mapping.
        """
        require_mapping(state)
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"`state` is not of `EpochSampler`: it has no {missing[0]!r}.")
        for name in ("version", "seed", "length", "shuffle"):
            here = self.state_dict()[name]
            if state[name] != here:
                raise ValueError(
                    f"`state` has {name} {state[name]!r}, but here it is {here!r}: the order would "
                    f"be another one, and samples lost and doubled."
                )
        epoch, consumed = word("epoch", state["epoch"]), word("consumed", state["consumed"])
        if consumed > self.length:
            raise ValueError(f"`state` has consumed {consumed} of {self.length} samples.")
        self._go_to(epoch, consumed)

    def _go_to(self, epoch: int, consumed: int) -> None:
        self.epoch, self.consumed, self._begun = epoch, consumed, False
        self._run += 1

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self.world_size


def place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, or those of ``torch.distributed``, or 0 and 1."""
    if rank is None and world_size is None:
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ValueError(
            f"`rank` and `world_size` go together, with 0 <= rank < world_size; got {rank} and "
            f"{world_size}."
        )
    return rank, world_size


def require_mapping(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"`state` must be what `state_dict()` returned; got {type(state).__name__}."
        )
