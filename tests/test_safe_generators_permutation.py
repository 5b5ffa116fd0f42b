"""The order of an epoch: a permutation, uniform, the same everywhere, and entered anywhere."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cln_tutorial.safe_generators import permutation
from cln_tutorial.safe_generators.permutation import FeistelOrder, epoch_order

ORDERS = [epoch_order, FeistelOrder]
# Of (length, seed, epoch) = (10, 0, 0), and of the start of 10^8. Others make old states useless.
TEN = [4, 9, 5, 0, 7, 6, 2, 1, 8, 3]
MANY = [12207189, 46336607, 96896485]


# --- a permutation --------------------------------------------------------------------------------


def test_every_length_up_to_5000_gives_a_permutation():
    """The network alone: exhaustive for short lengths, then all around powers of two and more."""
    lengths = {*range(600), *range(601, 5001, 37), 5000}
    lengths |= {2**k + d for k in range(9, 13) for d in (-1, 0, 1)}
    for length in sorted(lengths):
        found = FeistelOrder(length, seed=length, epoch=1)[:]
        assert len(found) == length
        assert np.bincount(found, minlength=length).tolist() == [1] * length


@pytest.mark.parametrize("length", [0, 1, 2, 5, 1000])
def test_a_table_is_a_permutation(length):
    found = epoch_order(length, 3, 4)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(length))


def test_only_above_ten_million_the_entries_are_computed(monkeypatch):
    assert permutation.TABLE == 10**7
    monkeypatch.setattr(permutation, "TABLE", 50)
    assert isinstance(epoch_order(50, 0, 0), np.ndarray)
    order = epoch_order(51, 0, 0)
    assert isinstance(order, FeistelOrder)
    assert sorted(order) == list(range(51))


def test_a_long_order_takes_no_memory_and_starts_at_once():
    order = epoch_order(2**62 + 12345, 0, 0)
    found = order[2**61 : 2**61 + 1000]
    assert len(set(found.tolist())) == 1000
    assert 0 <= found.min() <= found.max() < len(order) == 2**62 + 12345


# --- entered anywhere -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 300),
    start=st.integers(-310, 310),
    stop=st.integers(-310, 310),
    step=st.sampled_from([1, 2, 7, -1, -3]),
)
def test_both_kinds_are_sliced_as_arrays_are(length, start, stop, step):
    for kind in ORDERS:
        order = kind(length, 1, 2)
        whole = order[:]
        assert order[start:stop:step].tolist() == whole[start:stop:step].tolist()
        positions = np.array([[start, stop], [0, -1]]) % length
        assert order[positions].tolist() == whole[positions].tolist()
        assert [order[i] for i in (0, -1, length // 2)] == whole[[0, -1, length // 2]].tolist()
        assert len(order) == length


def test_a_position_out_of_range_is_refused_and_iteration_ends():
    order = FeistelOrder(5, 0, 0)
    for bad in (5, -6, np.array([0, 5])):
        with pytest.raises(IndexError, match="out of range for an order of 5"):
            order[bad]
    assert list(order) == order[:].tolist()


# --- random, and the same everywhere --------------------------------------------------------------


def test_the_order_is_this_one_on_every_version():
    assert epoch_order(10, 0, 0).tolist() == TEN
    assert epoch_order(10**8, 0, 0)[:3].tolist() == MANY


@pytest.mark.parametrize("kind", ORDERS)
def test_seed_epoch_and_length_change_the_order(kind):
    orders = [(100, 0, 0), (100, 1, 0), (100, 0, 1), (100, 2**63, 0), (100, 0, 2**40)]
    found = {tuple(kind(*each)[:].tolist()) for each in orders}
    assert len(found) == len(orders)
    # Two data sets of one run are not shuffled alike.
    assert kind(101, 0, 0)[:50].tolist() != kind(100, 0, 0)[:50].tolist()


@pytest.mark.parametrize("kind", ORDERS)
def test_the_first_and_the_last_element_are_uniform_over_2000_epochs(kind):
    # Chi-square with fixed seeds; each false alarm has probability 1e-4.
    found = np.array([kind(10, 5, epoch)[:] for epoch in range(2000)])
    for position in (0, 4, 9):
        counts = np.bincount(found[:, position], minlength=10)
        assert stats.chisquare(counts).pvalue > 1e-4
    # What two neighbours are: 90 ordered pairs.
    pairs = Counter(map(tuple, found[:, :2].tolist()))
    assert len(pairs) == 90
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-4


def test_all_24_orders_of_four_come_equally_often():
    for kind in ORDERS:
        counts = Counter(tuple(kind(4, 9, epoch)[:].tolist()) for epoch in range(2400))
        assert counts.keys() == set(permutations(range(4)))
        assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_a_long_order_has_the_small_statistics_of_a_random_one():
    n, length = 100_000, 3 * 10**9
    found = FeistelOrder(length, 1, 1)[10**9 : 10**9 + n]
    # Correlations of the entries with their neighbours and positions: 4 standard deviations.
    for other in (np.arange(n), np.roll(found, 1), np.roll(found, 2), np.roll(found, 64)):
        assert abs(np.corrcoef(found, other)[0, 1]) < 4 / math.sqrt(n)
    assert stats.kstest(found / length, "uniform").pvalue > 1e-4
    # Low digits and high digits, 64 classes each.
    for classes in (found % 64, found * 64 // length):
        assert stats.chisquare(np.bincount(classes, minlength=64)).pvalue > 1e-4
    # Records (left-to-right maxima): their number has mean and variance near log(n).
    mean = math.log(n) + 0.577
    records = len(np.unique(np.maximum.accumulate(found)))
    assert abs(records - mean) < 4 * math.sqrt(mean)


def test_neighbouring_epochs_of_a_long_order_are_uncorrelated():
    n = 100_000
    first, second = (FeistelOrder(10**8, 1, epoch)[:n] for epoch in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(n)
    # Equal entries at equal places: expected n / 10^8 = 0.001.
    assert (first == second).sum() <= 1


def test_every_bit_of_a_position_reaches_every_bit_of_the_entry():
    """Each bit flips each bit half of the time: 5 standard deviations over 900 pairs."""
    order = FeistelOrder(2**30, 3, 3)
    positions = np.random.default_rng(0).integers(2**30, size=4000)
    for bit in range(30):
        changed = order[positions] ^ order[positions ^ (1 << bit)]
        share = ((changed[:, None] >> np.arange(30)) & 1).mean(0)
        assert np.abs(share - 0.5).max() < 5 * 0.5 / math.sqrt(4000)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("name", ["length", "seed", "epoch"])
@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2**64, ValueError), ("a", TypeError)]
)
def test_bad_numbers_are_named(unchecked, kind, name, value, error):
    with pytest.raises(error, match=f"`{name}` must be .*; got"):
        kind(**{"length": 3, "seed": 0, "epoch": 0, name: value})
