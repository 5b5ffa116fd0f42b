"""Where an epoch is: what comes next, what was delivered, and the state that says so.

Three kinds with the same methods: the order of an ``EpochSampler``, that of somebody's own batch
sampler, and the shards of a stream. ``batches()`` runs ahead of the user by what is prefetched;
only ``took()`` moves the state.
"""

import itertools
import operator
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cln_tutorial.safe_generators.sampling import EpochSampler, require_mapping

VERSION = 1


class SamplerOrder:
    """The batches of an ``EpochSampler``; counted in samples of all ranks."""

    unit = "samples"

    def __init__(self, sampler: EpochSampler, drop_last: bool):
        self.sampler, self.drop_last = sampler, drop_last
        self._global_batch = sampler.batch_size * sampler.world_size
        self._taken = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.sampler.state_dict()["epoch"]

    @property
    def consumed(self) -> int:
        """Samples of all ranks delivered in this epoch."""
        return self.sampler.consumed_after(self._taken)

    def begin(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self._go_to({**self.sampler.state_dict(), "epoch": epoch, "consumed": 0})

    def batches(self) -> Iterator[list[int]]:
        """The batches that were not delivered yet."""
        self._go_to(self.state_dict())
        return itertools.islice(self.sampler.batches(), len(self))

    def took(self, extra: Any) -> None:
        """Count a batch as delivered."""
        self._taken += 1

    def __len__(self) -> int:
        left = self.sampler.state_dict()["length"] - self.consumed
        if self.drop_last:
            return left // self._global_batch
        return -(-len(self.sampler) // self.sampler.batch_size) - self._taken

    def state_dict(self) -> dict[str, Any]:
        """That of the sampler, for what was delivered."""
        return {**self.sampler.state_dict(), "consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was saved."""
        self._go_to(state)

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        self._taken = 0


class BatchSamplerOrder:
    """The batches of somebody's own sampler, counted; their indices go into a checksum."""

    unit = "batches"

    def __init__(self, batch_sampler: Iterable[Any], seed: int):
        if isinstance(batch_sampler, Iterator):
            raise TypeError(
                f"`batch_sampler` is an iterator ({type(batch_sampler).__name__}), which would be "
                "empty in the second epoch: give an iterable that begins anew."
            )
        self.batch_sampler, self.seed = batch_sampler, seed
        self.epoch = self.consumed = 0
        self._checksum = 0
        self._sent: list[int] = []

    def begin(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.consumed, self._checksum = epoch, 0, 0

    def batches(self) -> Iterator[list[Any]]:
        """The batches that were not delivered yet, after a look at those that were."""
        if hasattr(self.batch_sampler, "set_epoch"):
            self.batch_sampler.set_epoch(self.epoch)
        self._sent = []
        return self._batches(self.consumed, self._checksum)

    def _batches(self, consumed: int, expected: int) -> Iterator[list[Any]]:
        checksum = number = 0
        for number, each in enumerate(self.batch_sampler, 1):
            try:
                batch = [operator.index(index) for index in each]
            except TypeError as error:
                raise TypeError(
                    f"`batch_sampler` must give lists of indices; batch {number} is {each!r}."
                ) from error
            checksum = zlib.crc32(repr(batch).encode(), checksum)
            if number > consumed:
                self._sent.append(checksum)
                yield batch
            elif number == consumed and checksum != expected:
                raise ValueError(
                    f"`batch_sampler` does not give the {consumed} batches that were delivered in "
                    f"epoch {self.epoch}: samples would be lost and doubled. It must be a function "
                    "of the epoch; `set_epoch` is called if it has one."
                )
        if number < consumed:
            raise ValueError(
                f"`batch_sampler` has {number} batches in epoch {self.epoch}, but {consumed} were "
                "delivered before."
            )

    def took(self, extra: Any) -> None:
        """Count a batch as delivered."""
        self.consumed += 1
        self._checksum = self._sent.pop(0)

    def __len__(self) -> int:
        return len(self.batch_sampler) - self.consumed  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The number of batches, and what they were."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "batches": self.consumed,
            "checksum": self._checksum,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was saved."""
        require_mapping(state)
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(
                f"the state has no {missing[0]!r}: it was not saved with a `batch_sampler`."
            )
        for name, here in (("version", VERSION), ("seed", self.seed)):
            if state[name] != here:
                raise ValueError(f"the state has {name} {state[name]!r}; here it is {here!r}.")
        self.epoch, self.consumed = state["epoch"], state["batches"]
        self._checksum = state["checksum"]


class StreamOrder:
    """The shards of a ``ShardedIterable``; counted in items of each."""

    unit = "items"

    def __init__(self, stream: Any, workers: int):
        self.stream, self.workers = stream, workers
        self._running: set[int] = set()

    @property
    def epoch(self) -> int:
        """The epoch of the next item."""
        return self.stream.epoch

    @property
    def consumed(self) -> int:
        """Items delivered in this epoch."""
        return sum(self.stream.delivered.values())

    def begin(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.stream.set_epoch(epoch)

    def batches(self) -> Iterator[dict[int, int]]:
        """For each task the items delivered before, until every worker has come to its end."""
        self._running = set(range(self.workers))
        delivered = dict(self.stream.delivered)
        return iter(lambda: delivered if self._running else None, None)

    def took(self, extra: tuple[dict[int, int], int | None]) -> None:
        """Count the items of a batch as delivered."""
        progress, ended = extra
        self.stream.delivered.update(progress)
        if ended is not None:
            self._running.discard(ended)

    def __len__(self) -> int:
        raise TypeError("the length of a stream is not known before its end.")

    def state_dict(self) -> dict[str, Any]:
        """That of the stream."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Continue where a state, or the states of all ranks, were saved."""
        self.stream.load_state_dict(state)
