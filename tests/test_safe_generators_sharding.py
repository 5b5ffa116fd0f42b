"""A stream in shards: each item exactly once over workers and ranks, and again after a resume."""

import json
from collections import Counter
from itertools import chain, islice
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset

from cln_tutorial.safe_generators import sharding
from cln_tutorial.safe_generators.sharding import ShardedIterable

# DataLoader says so on machines with fewer cores than workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SHARDS = 7


def augmented(shard, num_shards, rng):
    """The numbers of one shard, each with a draw: shards of 0 to 6 items, 21 in all."""
    for number in range(shard * num_shards, shard * num_shards + shard):
        yield number, rng.integers(1 << 40)


class Numbers:
    """An iterable of 23 numbers that counts how often it is read."""

    def __init__(self, n=23):
        self.n, self.passes = n, 0

    def __iter__(self):
        self.passes += 1
        return iter(range(self.n))


def parts(stream, consumers, epoch=0, delivered=()):
    """What each consumer gets: lists of (shard, position, item)."""
    return [
        list(stream.iterate(epoch, consumer, consumers, dict(delivered)))
        for consumer in range(consumers)
    ]


ALL = sorted(chain(*parts(ShardedIterable(augmented, num_shards=SHARDS), 1)))


# --- exactly once ---------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    consumers=st.integers(1, 9),
    delivered=st.lists(st.integers(0, 5), min_size=9, max_size=9),
)
def test_every_item_goes_to_one_consumer_whatever_was_delivered_before(sizes, consumers, delivered):
    n, consumers = len(sizes), min(consumers, len(sizes))
    before = {shard: min(delivered[shard], sizes[shard]) for shard in range(n)}
    stream = ShardedIterable(lambda shard, *_: range(sizes[shard]), num_shards=n)
    found = Counter(chain(*parts(stream, consumers, delivered=before)))
    left = {(s, p, p) for s in range(n) for p in range(before[s], sizes[s])}
    assert found == Counter(left)


@given(
    length=st.integers(0, 40),
    num_shards=st.integers(1, 9),
    consumers=st.integers(1, 9),
    skip=st.integers(0, 40),
)
def test_item_i_of_an_iterable_is_in_shard_i_mod_n_and_goes_to_one_consumer(
    length, num_shards, consumers, skip
):
    consumers = min(consumers, num_shards)
    stream = ShardedIterable(range(length), num_shards=num_shards)
    first = range(min(skip, length))  # these were delivered
    before = Counter(i % num_shards for i in first)
    found = chain(*parts(stream, consumers, delivered=before))
    expected = [(i % num_shards, i // num_shards, i) for i in range(len(first), length)]
    assert sorted(found, key=lambda each: each[2]) == expected


@pytest.mark.parametrize("consumers", range(1, SHARDS + 1))
def test_the_draws_of_a_shard_do_not_depend_on_the_number_of_consumers(consumers):
    stream = ShardedIterable(augmented, num_shards=SHARDS)
    assert sorted(chain(*parts(stream, consumers))) == ALL
    assert len({draw for *_, (_, draw) in ALL}) == 21


def test_the_draws_depend_on_the_seed_and_on_the_epoch():
    draws = [
        {draw for *_, (_, draw) in chain(*parts(stream, 1, epoch))}
        for stream in (ShardedIterable(augmented, seed=s, num_shards=SHARDS) for s in (0, 1))
        for epoch in (0, 1)
    ]
    assert len(set.union(*draws)) == 4 * 21


def test_a_consumer_reads_a_plain_iterable_once():
    numbers = Numbers()
    stream = ShardedIterable(numbers, num_shards=SHARDS)
    parts(stream, 3)
    assert numbers.passes == 3


def test_shards_are_dealt_so_that_those_of_a_rank_do_not_depend_on_its_workers():
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            for workers in (1, 2):
                stream = ShardedIterable(augmented, num_shards=SHARDS)
                found = chain(
                    *(
                        stream.iterate(0, worker * ranks + rank, workers * ranks, {})
                        for worker in range(workers)
                    )
                )
                assert {shard for shard, *_ in found} == set(range(1, SHARDS)) & set(
                    range(rank, SHARDS, ranks)
                )


# --- in DataLoader --------------------------------------------------------------------------------


class Naive(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def loaded(dataset, workers, method="fork", **options):
    if workers:
        options |= {"multiprocessing_context": method, "timeout": 120}
    return DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=list, **options)


def test_a_naive_iterable_gives_everything_as_often_as_there_are_workers():
    assert Counter(chain(*loaded(Naive(), 3))) == dict.fromkeys(range(10), 3)
    stream = ShardedIterable(Naive(), num_shards=SHARDS)
    assert Counter(chain(*loaded(stream, 3))) == dict.fromkeys(range(10), 1)


@pytest.mark.parametrize(
    ("workers", "method"), [(0, None), (1, "fork"), (2, "fork"), (4, "fork"), (1, "spawn")]
)
def test_workers_of_a_data_loader_give_every_item_once_with_the_same_draws(workers, method):
    stream = ShardedIterable(augmented, num_shards=SHARDS)
    found = sorted(chain(*loaded(stream, workers, method)))
    assert found == sorted(item for *_, item in ALL)


def test_workers_times_ranks_give_every_item_once():
    found = []
    for rank in range(3):
        stream = ShardedIterable(augmented, num_shards=SHARDS, rank=rank, world_size=3)
        found += chain(*loaded(stream, 2))
    assert sorted(found) == sorted(item for *_, item in ALL)


def test_workers_that_live_on_see_the_epoch_and_forget_the_state_of_an_older_one():
    stream = ShardedIterable(augmented, num_shards=SHARDS)
    stream.load_state_dict(stream.state_dict() | {"epoch": 3, "delivered": {"6": 5, "5": 5}})
    loader = loaded(stream, 2, persistent_workers=True)
    epochs = []
    for epoch in (3, 4, 5):
        if epoch > 3:
            stream.set_epoch(epoch)
        epochs.append(sorted(chain(*loader)))
    del loader
    fresh = ShardedIterable(augmented, num_shards=SHARDS)
    for epoch, found in zip((3, 4, 5), epochs, strict=True):
        whole = sorted(item for *_, item in chain(*parts(fresh, 1, epoch)))
        left = [each for each in whole if epoch > 3 or not 35 <= each[0] < 47]
        assert found == left
    assert len(epochs[0]) == 21 - 10


def test_what_workers_have_read_ahead_is_no_state():
    stream = ShardedIterable(augmented, num_shards=SHARDS)
    next(iter(loaded(stream, 2)))
    with pytest.raises(RuntimeError, match=r"read ahead is not what was delivered.*SafeLoader"):
        stream.state_dict()
    stream.set_epoch(1)
    assert stream.state_dict()["epoch"] == 1


# --- the state ------------------------------------------------------------------------------------


def test_a_state_at_every_position_continues_with_what_is_missing_for_any_consumers():
    for taken in range(22):
        stream = ShardedIterable(augmented, num_shards=SHARDS)
        stream.set_epoch(2)
        before = list(islice(iter(stream), taken))
        state = json.loads(json.dumps(stream.state_dict()))
        assert state == stream.state_dict()
        for consumers in (1, 2, 3, 7):
            resumed = ShardedIterable(augmented, num_shards=SHARDS)
            resumed.load_state_dict(state)
            rest = chain(*parts(resumed, consumers, resumed.epoch, resumed.delivered))
            found = before + [item for *_, item in rest]
            whole = chain(*parts(resumed, 1, epoch=2))
            assert sorted(found) == sorted(item for *_, item in whole), (taken, consumers)


def test_a_loader_without_workers_counts_what_it_has_delivered_and_not_more():
    stream = ShardedIterable(augmented, num_shards=SHARDS)
    batches = iter(loaded(stream, 0))
    first = [next(batches) for _ in range(4)]
    assert sum(stream.state_dict()["delivered"].values()) == 8
    resumed = ShardedIterable(augmented, num_shards=SHARDS)
    resumed.load_state_dict(stream.state_dict())
    assert sorted(chain(*first, list(resumed))) == sorted(item for *_, item in ALL)


def test_after_the_last_item_comes_the_next_epoch_and_so_it_does_when_one_begins_anew():
    stream = ShardedIterable(augmented, num_shards=SHARDS)
    epochs = [list(stream) for _ in range(3)]
    assert stream.epoch == 3
    assert stream.state_dict()["delivered"] == {}
    for epoch, found in enumerate(epochs):
        assert sorted(found) == sorted(item for *_, item in chain(*parts(stream, 1, epoch)))
    list(islice(iter(stream), 5))
    assert stream.epoch == 3
    list(islice(iter(stream), 5))  # begun anew without set_epoch: never a silent repeat
    assert stream.epoch == 4
    assert sum(stream.delivered.values()) == 5


def test_an_iteration_that_was_left_does_not_count_into_the_next_epoch():
    stream = ShardedIterable(augmented, num_shards=SHARDS)
    left = iter(stream)
    next(left)
    stream.set_epoch(5)
    assert len(list(left)) == 20
    assert (stream.epoch, stream.delivered) == (5, {})


def ranks_after(counts, world_size, epoch=1):
    """The states of all ranks, each after some items, and all those items."""
    states, found = [], []
    for rank, count in enumerate(counts):
        stream = ShardedIterable(
            augmented, num_shards=SHARDS, rank=rank, world_size=world_size, seed=4
        )
        stream.set_epoch(epoch)
        found += islice(iter(stream), count)
        states.append(stream.state_dict())
    return states, found


@pytest.mark.parametrize("new_world", [1, 2, 3, 5])
def test_the_states_of_all_ranks_continue_on_another_number_of_ranks_and_again(new_world):
    states, found = ranks_after([4, 1, 3], 3)
    # After the first resume every state knows of all shards, but counts its own only.
    for world_size, each in ((2, 3), (new_world, None)):
        streams = [
            ShardedIterable(augmented, num_shards=SHARDS, rank=r, world_size=world_size, seed=4)
            for r in range(world_size)
        ]
        for stream in streams:
            stream.load_state_dict(states[::-1])
            found += islice(iter(stream), each)
        states = [stream.state_dict() for stream in streams]
    whole = ShardedIterable(augmented, num_shards=SHARDS, seed=4)
    assert sorted(found) == sorted(item for *_, item in chain(*parts(whole, 1, 1)))


def test_a_rank_goes_on_from_its_own_state_if_the_number_of_ranks_is_the_same():
    states, found = ranks_after([4, 1], 2)
    for rank, state in enumerate(states):
        stream = ShardedIterable(augmented, num_shards=SHARDS, rank=rank, world_size=2, seed=4)
        stream.load_state_dict(state)
        found += chain(*loaded(stream, 2))
    whole = ShardedIterable(augmented, num_shards=SHARDS, seed=4)
    assert sorted(found) == sorted(item for *_, item in chain(*parts(whole, 1, 1)))


def test_states_that_would_repeat_or_change_items_are_refused():
    states, _ = ranks_after([2, 2, 2], 3)
    one = ShardedIterable(augmented, num_shards=SHARDS, seed=4)
    for some, got in [(states[:1], r"ranks \[0\] of \[3\]"), (states[1:], r"\[1, 2\] of \[3\]")]:
        with pytest.raises(ValueError, match=f"states of all ranks of one run; got .*{got}"):
            one.load_state_dict(some)
    second = ShardedIterable(augmented, num_shards=SHARDS, seed=4, rank=1, world_size=3)
    with pytest.raises(ValueError, match=r"must be the state of rank 1 of 3"):
        second.load_state_dict(states[0])
    later = [states[0] | {"epoch": 2}, *states[1:]]
    with pytest.raises(ValueError, match=r"of the epochs \[1, 2\]: save those of all ranks at"):
        one.load_state_dict(later)
    for change in ({"seed": 5}, {"num_shards": 8}, {"version": 2}):
        ((key, value),) = change.items()
        with pytest.raises(ValueError, match=f"`state` has {key} {value}, but this stream"):
            one.load_state_dict([each | change for each in states])
    with pytest.raises(ValueError, match="it has no 'delivered'"):
        one.load_state_dict({"version": 1, "seed": 4, "epoch": 0, "num_shards": SHARDS})
    with pytest.raises(ValueError, match="holds no state"):
        one.load_state_dict([])
    assert (one.epoch, one.delivered) == (0, {}), "a refused state has changed something"


def test_data_that_have_become_shorter_are_noticed():
    made = ShardedIterable(lambda shard, *_: range(3), num_shards=2)
    with pytest.raises(RuntimeError, match="shard 1 has 3 items, but 4 of it were delivered"):
        parts(made, 1, delivered={1: 4})
    listed = ShardedIterable(range(5), num_shards=2)
    assert parts(listed, 1, delivered={0: 3, 1: 2}) == [[]]
    with pytest.raises(RuntimeError, match="shard 1 has 2 items, but 3 of it were delivered"):
        parts(listed, 2, delivered={1: 3})


# --- what is refused ------------------------------------------------------------------------------


def test_more_consumers_than_shards_are_refused_at_the_call(monkeypatch):
    stream = ShardedIterable(augmented, num_shards=3)
    with pytest.raises(ValueError, match=r"4 consumers .* for 3 shards.*at least 4"):
        stream.iterate(0, 0, 4, {})
    with monkeypatch.context() as patched:  # as a worker sees it
        patched.setattr(sharding, "get_worker_info", lambda: SimpleNamespace(id=3, num_workers=4))
        with pytest.raises(ValueError, match="4 consumers"):
            iter(stream)
    for consumer in (-1, 2):
        with pytest.raises(ValueError, match=f"got {consumer} of 2"):
            stream.iterate(0, consumer, 2, {})
    for delivered in ({3: 1}, {-1: 1}, {0: -1}):
        with pytest.raises(ValueError, match="counts for the shards 0 to 2"):
            stream.iterate(0, 0, 1, delivered)


def test_keys_as_json_has_them_are_refused_and_not_overlooked(unchecked):
    with pytest.raises(ValueError, match="got '0': 1"):
        ShardedIterable(augmented, num_shards=3).iterate(0, 0, 1, {"0": 1})


def test_bad_arguments_are_refused_when_the_stream_is_made(unchecked):
    with pytest.raises(TypeError, match=r"is an iterator \(generator\): it would be empty in the"):
        ShardedIterable(n for n in range(3))
    with pytest.raises(TypeError, match=r"function of .* or an iterable; got int"):
        ShardedIterable(3)
    with pytest.raises(ValueError, match="`num_shards` must be at least 1; got 0"):
        ShardedIterable(range(3), num_shards=0)
    for rank, world_size in ((0, None), (None, 2), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"go together.*got {rank} and {world_size}"):
            ShardedIterable(range(3), rank=rank, world_size=world_size)
    with pytest.raises((TypeError, ValueError), match="seed"):
        ShardedIterable(range(3), seed=-1)
    with pytest.raises(ValueError, match="`epoch` must be at least 0; got -1"):
        ShardedIterable(range(3)).set_epoch(-1)
    with pytest.raises(TypeError, match="for shard 0 it returned NoneType"):
        list(ShardedIterable(lambda *_: None))


def test_ranks_come_from_torch_distributed(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 5)
    stream = ShardedIterable(range(20), num_shards=5)
    assert (stream.rank, stream.world_size) == (2, 5)
    assert list(stream) == [2, 7, 12, 17]
    stream = ShardedIterable(range(20), num_shards=5, rank=0, world_size=1)
    assert len(list(stream)) == 20
