"""Each sample once over uneven ranks, epoch after epoch, and on from every place of an epoch."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.utils.data import DataLoader

from cln_tutorial.safe_generators import permutation
from cln_tutorial.safe_generators.permutation import epoch_order
from cln_tutorial.safe_generators.sampling import EpochSampler, place

MODES = ("exact", "pad", "drop")


def samplers(n, world, batch, **options):
    """One for each rank."""
    about = {"world_size": world, "batch_size": batch, **options}
    return [EpochSampler(n, rank=rank, **about) for rank in range(world)]


def steps(ranks):
    """Step after step, what all ranks get, in the order of the ranks."""
    found = itertools.zip_longest(*(sampler.batches() for sampler in ranks), fillvalue=())
    return [list(itertools.chain(*step)) for step in found]


def order_of(n, shuffle, seed, epoch):
    """What comes in an epoch, were there one rank and batches of one."""
    return epoch_order(n, seed, epoch).tolist() if shuffle else list(range(n))


def expected_steps(left, first, world, batch, uneven):
    """The rule of the last batch, written as slices of the plain list of what is left."""
    size = world * batch
    whole = len(left) // size * size
    found = [left[start : start + size] for start in range(0, whole, size)]
    rest = left[whole:]
    if uneven == "drop":
        rest = rest[: len(rest) // world * world]
    elif uneven == "pad":
        missing = -len(rest) % world
        rest = rest + list(itertools.islice(itertools.cycle(first), missing))
    return found + [rest] * (len(rest) > 0)


# --- exactly once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("uneven", MODES)
def test_all_ranks_together_give_the_order_in_steps_and_the_last_one_evenly(world, uneven):
    """Exhaustive: up to 40 samples, batches of 1 to 7; in turn with and without shuffling."""
    for n, batch in itertools.product(range(41), range(1, 8)):
        shuffle = (n + batch) % 2 == 0
        ranks = samplers(n, world, batch, seed=3, shuffle=shuffle, uneven=uneven)
        order = order_of(n, shuffle, 3, 0)
        shares = [list(sampler.batches()) for sampler in ranks]
        found = [
            list(itertools.chain(*step)) for step in itertools.zip_longest(*shares, fillvalue=[])
        ]
        assert found == expected_steps(order, order, world, batch, uneven)
        if uneven == "exact":
            assert sorted(itertools.chain(*found)) == list(range(n))
        for step in itertools.zip_longest(*shares, fillvalue=[]):
            sizes = [len(each) for each in step]
            assert max(sizes) <= batch
            assert max(sizes) - min(sizes) <= (uneven == "exact")
            assert sizes == sorted(sizes, reverse=True)
        for sampler, share in zip(ranks, shares, strict=True):
            assert len(sampler) == sum(map(len, share))
            assert all(share)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 40),
    batch=st.integers(1, 7),
    world=st.integers(1, 4),
    shuffle=st.booleans(),
    uneven=st.sampled_from(MODES),
    other_batch=st.integers(1, 7),
    epoch=st.integers(0, 3),
)
def test_a_state_of_every_step_goes_on_with_every_number_of_ranks(
    n, batch, world, shuffle, uneven, other_batch, epoch
):
    options = {"seed": 5, "shuffle": shuffle, "uneven": uneven}
    ranks, order = samplers(n, world, batch, **options), order_of(n, shuffle, 5, epoch)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    whole = steps(ranks)
    for done in range(len(whole) + 1):
        consumed = {sampler.consumed_after(done) for sampler in ranks}
        assert len(consumed) == 1, "the ranks disagree"
        state = json.loads(json.dumps({**ranks[0].state_dict(), "consumed": consumed.pop()}))
        for other in range(1, 5):
            resumed = samplers(n, other, batch if other == world else other_batch, **options)
            for sampler in resumed:
                sampler.load_state_dict(state)
            left = order[state["consumed"] :]
            rest = steps(resumed)
            if other == world:
                assert rest == whole[done:]
            assert rest == expected_steps(left, order, other, resumed[0].batch_size, uneven)
            if uneven == "exact":
                assert sorted(itertools.chain(*whole[:done], *rest)) == list(range(n))
            # Another resume, in the midst of the resumed run.
            middle = len(rest) // 2
            again = samplers(n, world, batch, **options)
            for sampler in again:
                there = {**state, "consumed": resumed[0].consumed_after(middle)}
                sampler.load_state_dict(there)
            if uneven == "exact":
                parts = whole[:done], rest[:middle], steps(again)
                assert sorted(itertools.chain(*itertools.chain(*parts))) == list(range(n))


def test_the_last_batch_of_ten_over_four_ranks_is_cut_by_hand():
    shares = {
        "exact": [[[0], [4], [8]], [[1], [5], [9]], [[2], [6]], [[3], [7]]],
        "pad": [[[0], [4], [8]], [[1], [5], [9]], [[2], [6], [0]], [[3], [7], [1]]],
        "drop": [[[0], [4]], [[1], [5]], [[2], [6]], [[3], [7]]],
    }
    for uneven, expected in shares.items():
        ranks = samplers(10, 4, 1, shuffle=False, uneven=uneven)
        assert [list(sampler.batches()) for sampler in ranks] == expected
    # Fourteen in batches of four on three ranks: of the last two, one for each of two ranks.
    ranks = samplers(14, 3, 4, shuffle=False)
    assert [list(sampler.batches())[1:] for sampler in ranks] == [[[12]], [[13]], []]


def test_padding_goes_round_where_there_are_fewer_samples_than_ranks():
    ranks = samplers(2, 7, 3, shuffle=False, uneven="pad")
    assert [list(sampler) for sampler in ranks] == [[0], [1], [0], [1], [0], [1], [0]]
    assert [list(sampler) for sampler in samplers(0, 2, 3, uneven="pad")] == [[], []]


# --- epochs ---------------------------------------------------------------------------------------


def test_iterating_again_goes_to_the_next_epoch():
    sampler = EpochSampler(20, seed=1)
    found = [list(sampler) for _ in range(3)]
    assert found == [order_of(20, True, 1, epoch) for epoch in range(3)]
    assert sampler.epoch == 3


def test_iterating_again_after_a_break_goes_to_the_next_epoch_too():
    sampler = EpochSampler(20, seed=1)
    for _ in sampler:
        break
    assert list(sampler) == order_of(20, True, 1, 1)


def test_the_usual_loop_with_set_epoch_gets_each_epoch_once():
    sampler, found = EpochSampler(20, seed=1), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    assert found == [order_of(20, True, 1, epoch) for epoch in range(3)]
    sampler.set_epoch(1)
    assert list(sampler) == found[1]
    next(iter(sampler))
    sampler.set_epoch(sampler.epoch)
    assert list(sampler) == found[2], "an epoch that was begun starts anew when it is set"


def test_the_order_is_that_of_the_epoch_and_the_same_on_all_ranks():
    for world in (1, 2, 3, 4):
        ranks = samplers(24, world, 24 // world, seed=1)
        for epoch in range(2):
            step = list(itertools.chain(*map(list, ranks)))
            assert step == order_of(24, True, 1, epoch)


def test_a_long_data_set_is_sampled_without_a_table(monkeypatch):
    monkeypatch.setattr(permutation, "TABLE", 30)
    ranks = samplers(33, 4, 3, seed=2)
    found = sorted(itertools.chain(*map(list, ranks)))
    assert found == list(range(33))
    first = next(EpochSampler(10**12, batch_size=3).batches())
    assert len(set(first)) == 3
    assert all(type(index) is int for index in first)


def test_many_batches_are_more_than_one_block():
    sampler = EpochSampler(20_011, seed=2, batch_size=3)
    assert list(sampler) == order_of(20_011, True, 2, 0)
    assert list(EpochSampler(20_011, shuffle=False, batch_size=10_000)) == list(range(20_011))


# --- the state of an iteration --------------------------------------------------------------------


def test_the_state_counts_the_batches_that_are_given_whole():
    sampler, found = EpochSampler(11, rank=1, world_size=2, batch_size=2), []
    for _ in sampler:
        found.append(sampler.state_dict()["consumed"])
    assert found == [0, 4, 4, 8, 11]  # its last share is one of the three that are left
    about = {"version": 1, "seed": 0, "length": 11, "shuffle": True}
    assert sampler.state_dict() == {**about, "epoch": 1, "consumed": 0}


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_data_loader_in_this_process_goes_on_after_a_state(stop):
    def loader(sampler):
        return DataLoader(list(range(100, 123)), batch_size=4, sampler=sampler)

    def new():
        return EpochSampler(23, seed=4, batch_size=4)

    whole = torch.cat([torch.cat(list(loader(sampler))) for sampler in [new()] for _ in range(2)])
    sampler, found = new(), []
    for batch in itertools.islice(loader(sampler), stop):
        found.append(batch)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = new()
    resumed.load_state_dict(state)
    found += loader(resumed)
    if len(torch.cat(found)) == 23:
        found += loader(resumed)
    assert torch.cat(found).equal(whole)


def test_set_epoch_to_that_of_a_state_just_loaded_does_not_start_it_anew():
    sampler, state = EpochSampler(9), {**EpochSampler(9).state_dict(), "epoch": 2, "consumed": 5}
    sampler.load_state_dict(state)
    sampler.set_epoch(2)
    assert len(sampler) == 4
    assert list(sampler) == order_of(9, True, 0, 2)[5:]
    assert list(sampler) == order_of(9, True, 0, 3)
    sampler.load_state_dict(state)
    sampler.set_epoch(3)
    assert list(sampler) == order_of(9, True, 0, 3)


def test_an_older_iteration_does_not_move_the_state_of_a_newer_one():
    sampler = EpochSampler(6)
    old = iter(sampler)
    next(old)
    new = iter(sampler)
    next(new)
    assert list(old) == order_of(6, True, 0, 0)[1:]
    assert (sampler.epoch, sampler.consumed) == (1, 1)


def test_batches_leave_the_sampler_as_it_is_and_keep_what_they_began_with():
    sampler = EpochSampler(9, batch_size=2)
    state, batches = sampler.state_dict(), sampler.batches()
    first = next(batches)
    assert sampler.state_dict() == state
    sampler.load_state_dict({**state, "epoch": 1, "consumed": 4})
    assert [*first, *itertools.chain(*batches)] == order_of(9, True, 0, 0)


# --- ranks ----------------------------------------------------------------------------------------


def test_rank_and_world_come_from_torch_distributed_where_it_is_initialised(monkeypatch):
    assert place(None, None) == (0, 1)
    for name, value in {"is_initialized": True, "get_rank": 2, "get_world_size": 3}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    assert place(None, None) == (2, 3)
    found, given = EpochSampler(10, shuffle=True), EpochSampler(10, rank=2, world_size=3)
    assert list(found) == list(given)
    assert found.state_dict() == EpochSampler(10, rank=0, world_size=1).state_dict() | {"epoch": 1}
    assert place(0, 1) == (0, 1)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "world"), [(0, None), (None, 2), (2, 2), (-1, 2), (0, 0)])
def test_ranks_that_do_not_fit_are_refused(rank, world):
    with pytest.raises(ValueError, match=f"0 <= rank < world_size; got {rank} and {world}"):
        EpochSampler(10, rank=rank, world_size=world)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": -1}, "`length` must be at least 0"),
        ({"seed": 2**64}, "`seed` must be at least 0 and below 2"),
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"uneven": "wrap"}, "'exact', 'pad' or 'drop'; got 'wrap'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**{"length": 10, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 11}, "`state` has length 11, but here it is 10"),
        ({"seed": 1}, "`state` has seed 1, but here it is 0"),
        ({"shuffle": False}, "`state` has shuffle False, but here it is True"),
        ({"version": 2}, "`state` has version 2, but here it is 1"),
        ({"consumed": 11}, "`state` has consumed 11 of 10 samples"),
        ({"consumed": -1}, "`consumed` must be at least 0"),
        ({"epoch": -1}, "`epoch` must be at least 0"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    sampler = EpochSampler(10)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 3, "consumed": 2})
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


def test_something_that_is_no_state_is_refused():
    with pytest.raises(ValueError, match="not of `EpochSampler`: it has no 'consumed'"):
        EpochSampler(10).load_state_dict({"epoch": 0})


def test_a_bad_epoch_is_refused(unchecked):
    with pytest.raises(ValueError, match="`epoch` must be at least 0"):
        EpochSampler(10).set_epoch(-1)
    with pytest.raises(TypeError, match="`epoch` must be an integer; got float"):
        EpochSampler(10).set_epoch(1.0)


def test_numpy_integers_become_pythons_in_the_state(unchecked):
    sampler = EpochSampler(np.int64(10), seed=np.int64(3))
    sampler.set_epoch(np.int64(2))
    assert json.loads(json.dumps(sampler.state_dict())) == sampler.state_dict()
