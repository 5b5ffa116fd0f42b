"""A stream of items, each exactly once, whatever the number of workers and ranks.

A plain iterable data set is copied into every worker, and each copy yields everything. Here the
stream is cut into a fixed number of virtual shards, and the shards are dealt to consumers
(workers x ranks). What a shard yields is a function of (seed, epoch, shard) alone, and its items
are counted shard by shard: so a state fits any number of consumers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cln_tutorial.safe_generators.sampling import place, require_mapping
from cln_tutorial.safe_generators.streams import sample_generator

VERSION = 1

MakeIter = Callable[[int, int, np.random.Generator], Iterable[Any]]
State = Mapping[str, Any]


class ShardedIterable(IterableDataset):
    r"""An iterable data set that yields each item exactly once over all workers and ranks.

    The shards are dealt like cards: consumer :math:`c` of :math:`C` gets the shards
    :math:`s \equiv c \pmod C`, one after the other. In a plain ``DataLoader``, worker :math:`w` of
    rank :math:`r` of :math:`R` is consumer :math:`wR + r`; call ``set_epoch`` before each epoch
    there, as with ``DistributedSampler``. ``SafeLoader`` does it itself, and counts what it has
    delivered.

    Args:
        make_iter: ``make_iter(shard, num_shards, rng)`` returns the items of one shard; ``rng`` is
            ``sample_generator(seed, epoch, shard)``, and all randomness should come from it. Or an
            iterable: its item :math:`i` belongs to shard ``i % num_shards``; every consumer reads
            all of it and keeps its share.
        seed: of the generators, as ``sample_generator`` takes it.
        num_shards: at least the largest number of consumers ever. It belongs to the data: with
            another number the items fall into other shards, and no older state fits.
        rank: of this process, together with ``world_size``. None takes both from
            ``torch.distributed`` if it is initialised now, and rank 0 of 1 otherwise.
        world_size: number of ranks.

    Raises:
        TypeError: if ``make_iter`` is neither a function nor an iterable, or is an iterator, which
            would be empty in the second epoch.
        ValueError: if ``num_shards`` is below 1, or ``rank`` and ``world_size`` do not fit.

    Source:
        Article 6575, section 3, wants each sample once per epoch. That every copy of an iterable
        data set must be told its share stands in torch's documentation of ``IterableDataset``.

    Example:
        >>> from cln_tutorial.safe_generators.sharding import ShardedIterable
        >>> stream = ShardedIterable(range(10), num_shards=4)
        >>> [item for _, _, item in stream.iterate(epoch=0, consumer=1, consumers=3, delivered={})]
        [1, 5, 9]
        >>> state = {"version": 1, "seed": 0, "epoch": 7, "num_shards": 4, "delivered": {"1": 2},
        ...          "rank": 0, "world_size": 1}
        >>> stream.load_state_dict(state)
        >>> list(stream)
        [0, 2, 3, 4, 6, 7, 8, 9]
    """

    def __init__(
        self,
        make_iter: MakeIter | Iterable[Any],
        *,
        seed: int = 0,
        num_shards: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if isinstance(make_iter, Iterator):
            raise TypeError(
                f"`make_iter` is an iterator ({type(make_iter).__name__}): it would be empty in "
                f"the second epoch, and shared or copied by the workers. Give a function "
                f"`make_iter(shard, num_shards, rng)`, or an iterable that begins anew."
            )
        if not isinstance(make_iter, Iterable) and not callable(make_iter):
            raise TypeError(
                f"`make_iter` must be a function of (shard, num_shards, rng) or an iterable; got "
                f"{type(make_iter).__name__}. A data set with indices goes to `SafeLoader`."
            )
        if num_shards < 1:
            raise ValueError(f"`num_shards` must be at least 1; got {num_shards}.")
        sample_generator(seed, 0, 0)  # refuses a bad seed now, not in a worker
        self.make_iter, self.seed, self.num_shards = make_iter, seed, num_shards
        self.rank, self.world_size = place(rank, world_size)
        self.delivered: dict[int, int] = {}
        self._counted_epoch = 0  # the epoch that `delivered` belongs to
        self._begun = False
        # Epoch, and whether a worker has begun it: seen by workers that live on, too.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of the next item."""
        return int(self._shared[0])

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; workers that live on see it when they begin anew.

        Args:
            epoch: 0 or more.

        Raises:
            ValueError: if ``epoch`` is negative.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be at least 0; got {epoch}.")
        self.delivered, self._counted_epoch, self._begun = {}, epoch, False
        self._shared[:] = torch.tensor([epoch, 0])

    def __iter__(self) -> Iterator[Any]:
        """Yield this consumer's items of the epoch; iterating again begins the next epoch."""
        worker = get_worker_info()
        if worker is not None:
            self._shared[1] = 1
            # A worker that lives on has a copy of `delivered` from the time of its birth.
            delivered = self.delivered if self._counted_epoch == self.epoch else {}
            place = worker.id * self.world_size + self.rank, worker.num_workers * self.world_size
            return (item for _, _, item in self.iterate(self.epoch, *place, delivered))
        if self._begun:
            self.set_epoch(self.epoch + 1)
        self._begun = True
        found = self.iterate(self.epoch, self.rank, self.world_size, dict(self.delivered))
        return self._counted(found, self.epoch)

    def _counted(self, found: Iterator[tuple[int, int, Any]], epoch: int) -> Iterator[Any]:
        delivered = self.delivered  # of this epoch, even if another one is begun meanwhile
        for shard, position, item in found:
            delivered[shard] = position + 1
            yield item
        if self.delivered is delivered:
            self.set_epoch(epoch + 1)

    def iterate(
        self, epoch: int, consumer: int, consumers: int, delivered: Mapping[int, int]
    ) -> Iterator[tuple[int, int, Any]]:
        """What is left of an epoch for one consumer; nothing of this object changes.

        Args:
            epoch: 0 or more.
            consumer: worker * world_size + rank, at least 0 and below ``consumers``.
            consumers: workers times ranks, at most ``num_shards``.
            delivered: from shard to the number of its items that were delivered already. They are
                made again and skipped.

        Returns:
            Iterator over (shard, position of the item in it, item).

        Raises:
            ValueError: if there are more consumers than shards, no such consumer, or no such shard.
            RuntimeError: while iterating, if a shard has fewer items than were delivered of it.
        """
        if consumers > self.num_shards:
            raise ValueError(
                f"{consumers} consumers (workers times ranks) for {self.num_shards} shards: some "
                f"would get nothing. Set `num_shards` to at least {consumers}."
            )
        if not 0 <= consumer < consumers:
            raise ValueError(
                f"`consumer` must be at least 0 and below `consumers`; got {consumer} of "
                f"{consumers}."
            )
        for shard, count in delivered.items():
            if not isinstance(shard, int) or not 0 <= shard < self.num_shards or count < 0:
                raise ValueError(
                    f"`delivered` must hold counts for the shards 0 to {self.num_shards - 1}; got "
                    f"{shard!r}: {count!r}."
                )
        if isinstance(self.make_iter, Iterable):
            return self._strided(consumer, consumers, delivered)
        return self._dealt(epoch, consumer, consumers, delivered)

    def _dealt(
        self, epoch: int, consumer: int, consumers: int, delivered: Mapping[int, int]
    ) -> Iterator[tuple[int, int, Any]]:
        for shard in range(consumer, self.num_shards, consumers):
            rng = sample_generator(self.seed, epoch, shard)
            made = self.make_iter(shard, self.num_shards, rng)
            if not isinstance(made, Iterable):
                raise TypeError(
                    f"`make_iter` must return an iterable; for shard {shard} it returned "
                    f"{type(made).__name__}."
                )
            items, before = iter(made), delivered.get(shard, 0)
            _require_items(shard, sum(1 for _ in islice(items, before)), before)
            for position, item in enumerate(items, before):
                yield shard, position, item

    def _strided(
        self, consumer: int, consumers: int, delivered: Mapping[int, int]
    ) -> Iterator[tuple[int, int, Any]]:
        length = 0
        for length, item in enumerate(self.make_iter, 1):
            position, shard = divmod(length - 1, self.num_shards)
            if shard % consumers == consumer and position >= delivered.get(shard, 0):
                yield shard, position, item
        for shard in range(consumer, self.num_shards, consumers):
            found = len(range(shard, length, self.num_shards))
            _require_items(shard, found, delivered.get(shard, 0))

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is; give the states of all ranks to a run with other ranks.

        Returns:
            A dict that JSON can hold, with version, seed, epoch, num_shards, delivered (from the
            shard, as a string, to a count), rank, world_size.

        Raises:
            RuntimeError: if workers of a plain ``DataLoader`` iterate: they run ahead, and nobody
                knows what was delivered.
        """
        if self._shared[1]:
            raise RuntimeError(
                "workers of a plain DataLoader have begun this epoch: what they have read ahead is "
                "not what was delivered. Use `SafeLoader`, which counts deliveries, or no workers."
            )
        return {
            "version": VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "num_shards": self.num_shards,
            "delivered": {str(shard): self.delivered[shard] for shard in sorted(self.delivered)},
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Continue where a state was saved, with any number of workers.

        Args:
            state: of :meth:`state_dict`. That of this very rank is enough if the number of ranks
                is the same; for another number, the list of the states of all ranks at one step.

        Raises:
            ValueError: if the states are of another seed, number of shards or version, of several
                epochs, or not those of all ranks.
        """
        states = list(state) if isinstance(state, Sequence) else [state]
        for each in states:
            require_mapping(each)
        wanted = {"version": VERSION, "seed": self.seed, "num_shards": self.num_shards}
        _require_same_stream(states, wanted)
        worlds = {each["world_size"] for each in states}
        ranks = sorted(each["rank"] for each in states)
        own = worlds == {self.world_size} and ranks == [self.rank]
        if not own and (len(worlds) != 1 or ranks != list(range(*worlds))):
            raise ValueError(
                f"`state` must be the state of rank {self.rank} of {self.world_size}, or the "
                f"states of all ranks of one run; got ranks {ranks} of {sorted(worlds)}. What the "
                f"missing ranks have delivered would come again."
            )
        delivered: dict[int, int] = {}
        for each in states:
            for shard, count in each["delivered"].items():
                # Only the rank that a shard belongs to goes on counting.
                delivered[int(shard)] = max(count, delivered.get(int(shard), 0))
        self.set_epoch(states[0]["epoch"])
        self.delivered = delivered


def _require_same_stream(states: list[State], wanted: dict[str, int]) -> None:
    if not states:
        raise ValueError("`state` holds no state.")
    for each in states:
        keys = {*wanted, "epoch", "delivered", "rank", "world_size"}
        if missing := sorted(keys - each.keys()):
            raise ValueError(f"`state` is not of `ShardedIterable`: it has no {missing[0]!r}.")
        for key, value in wanted.items():
            if each[key] != value:
                raise ValueError(
                    f"`state` has {key} {each[key]!r}, but this stream {value!r}: it would go on "
                    f"with other items."
                )
    epochs = sorted({each["epoch"] for each in states})
    if len(epochs) > 1:
        raise ValueError(
            f"the states are of the epochs {epochs}: save those of all ranks at the same step, "
            f"before the end of the epoch or after it."
        )


def _require_items(shard: int, found: int, delivered: int) -> None:
    if found < delivered:
        raise RuntimeError(
            f"shard {shard} has {found} items, but {delivered} of it were delivered before: the "
            f"data have changed since the state was saved, or depend on more than the arguments "
            f"of `make_iter`."
        )
