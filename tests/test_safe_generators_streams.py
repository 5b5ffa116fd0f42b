"""The draws of a sample: a function of (seed, epoch, index), and the process is left as found."""

import copy
import itertools
import math
import pickle
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cln_tutorial.safe_generators.streams import SampleKey, SeededDataset, sample_generator

# DataLoader says so on machines with fewer cores than workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

KINDS = ("numpy", "torch", "python")
WORDS = st.integers(0, 2**64 - 1)
# Of (seed, epoch, index) = (0, 0, 0). Other numbers than these make old states useless.
RAW = [213000021201967259, 4455796210202625458]
PYTHON = 1892118739111497047
TORCH = [783852971, 1633263053, 871451297]


def draws(generator, n):
    """Uniform numbers of any kind of generator."""
    if isinstance(generator, torch.Generator):
        return torch.rand(n, generator=generator, dtype=torch.float64).numpy()
    return np.array([generator.random() for _ in range(n)])


def global_draws():
    """Everything of the three global generators, the cached normals of two of them included."""
    normals = np.random.standard_normal(), torch.randn(()).item()  # noqa: NPY002
    uniform = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
    return (*normals, *uniform, random.gauss(0, 1))


class Global(Dataset):
    """Each sample is its index and what the global generators give."""

    def __init__(self, n=12):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.tensor([index, *global_draws()], dtype=torch.float64)


class Handed(Dataset):
    """Each sample is its index and three kinds of draws from the generator it is handed."""

    def __init__(self, n=12):
        self.n = n

    def __len__(self):
        return self.n

    def getitem(self, index, rng):
        # One number of 32 bits: the other half of its word stays behind in the generator.
        values = index, rng.random(), rng.integers(2**20, dtype=np.uint32), rng.standard_normal()
        return torch.tensor(values, dtype=torch.float64)


class Failing(Global):
    """Draws, and then fails as told."""

    error = ValueError

    def __getitem__(self, index):
        global_draws()
        raise self.error("on purpose")


@pytest.fixture(autouse=True)
def seeds():
    """The global generators start from known states, with a normal number in store."""
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.standard_normal()  # noqa: NPY002
    torch.randn(1)


# --- the generator of a sample --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seed_epoch_and_index_give_equal_draws_and_a_new_generator(kind):
    first, again = (sample_generator(5, 6, 7, kind=kind) for _ in range(2))
    assert first is not again
    assert draws(first, 9).tolist() == draws(again, 9).tolist()
    assert draws(first, 9).tolist() != draws(sample_generator(5, 6, 7, kind=kind), 9).tolist()


@given(seed=WORDS, epoch=WORDS, index=WORDS)
def test_the_numpy_stream_is_numpys_own_philox_with_that_key_and_counter(seed, epoch, index):
    key, counter = (np.array(words, dtype=np.uint64) for words in ([seed, 0], [0, 0, epoch, index]))
    expected = np.random.Generator(np.random.Philox(key=key, counter=counter))
    assert sample_generator(seed, epoch, index).random(5).tolist() == expected.random(5).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_seed_epoch_or_index_gives_another_stream(kind):
    # 60 bits each: among 8,000 numbers the false-alarm rate is 8000**2 / 2**61, below 1e-10.
    grid = itertools.product(range(4), range(20), range(100))
    first = {
        draws(sample_generator(*each, kind=kind), 1)[0] for each in itertools.islice(grid, 1000)
    }
    far = [(2**63, 0, 0), (0, 2**63, 0), (0, 0, 2**63), (2**64 - 1, 0, 0), (0, 2**32, 0)]
    far += [(1, 0, 0), (2, 0, 0), (0, 0, 2**32)]
    first |= {draws(sample_generator(*each, kind=kind), 1)[0] for each in far}
    assert len(first) == 1000 + len(far)


def test_a_stream_keeps_its_epoch_and_index_for_2_to_the_128_blocks():
    bits = sample_generator(3, 17, 23).bit_generator
    bits.advance(2**128 - 1)
    assert bits.state["state"]["counter"].tolist() == [2**64 - 1, 2**64 - 1, 17, 23]
    assert bits.state["state"]["key"].tolist() == [3, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_neighbours_are_uncorrelated(kind):
    # Fixed seeds; 4 standard deviations of each correlation: false-alarm rate 6e-5.
    n = 20_000
    streams = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)]
    found = np.corrcoef([draws(sample_generator(*each, kind=kind), n) for each in streams])
    assert np.abs(found[np.triu_indices(4, 1)]).max() < 4 / math.sqrt(n)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_draws_of_1000_neighbours_are_uniform(kind):
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded with probability 1e-3; the seed is fixed.
    first = np.sort([draws(sample_generator(0, 0, i, kind=kind), 1)[0] for i in range(1000)])
    grid = np.arange(1000) / 1000
    distance = max((first - grid).max(), (grid + 1e-3 - first).max())
    assert distance < 1.95 / math.sqrt(1000)


def test_the_draws_are_these_on_every_version():
    """Runs must be resumable after an upgrade: raw bits of Philox, and what is made of them."""
    assert sample_generator(0, 0, 0).bit_generator.random_raw(2).tolist() == RAW
    assert sample_generator(0, 0, 0, kind="python").getrandbits(64) == PYTHON
    generator = sample_generator(0, 0, 0, kind="torch")
    assert torch.randint(2**31, (3,), generator=generator).tolist() == TORCH


def test_torch_itself_looks_at_32_bits_of_a_seed_and_we_fill_its_whole_state():
    low, high = (draws(torch.Generator().manual_seed(seed), 3) for seed in (1, 1 + 2**32))
    assert low.tolist() == high.tolist(), "manual_seed would do if not"

    def words(generator):
        state = generator.get_state().numpy()[24 : 24 + 8 * 624].view(np.uint64)
        return [int(word) for word in state]

    def next_word(word):  # how a seed of 32 bits is spread over the state (Matsumoto & Nishimura)
        return (1812433253 * (word ^ word >> 30) + 1) % 2**32

    plain, ours = (
        words(torch.Generator().manual_seed(1)),
        words(sample_generator(0, 0, 0, kind="torch")),
    )
    assert plain[1] == next_word(plain[0])
    assert ours[1] != next_word(ours[0])
    assert len(set(ours)) >= 623, "623 or more of 624 words differ, but for a chance of 1e-9"
    assert max(ours) < 2**32


def test_the_state_of_torch_is_that_of_a_mersenne_twister_with_these_words():
    generator = sample_generator(4, 5, 6, kind="torch")
    key = generator.get_state().numpy()[24 : 24 + 8 * 624].view(np.uint64).astype(np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    expected = twister.random_raw(2000) % 2**31
    found = torch.empty(2000, dtype=torch.int32).random_(generator=generator)
    assert found.tolist() == expected.tolist()


# --- samples that get their generator -------------------------------------------------------------


def test_a_data_set_with_getitem_gets_the_generator_of_the_sample():
    data = SeededDataset(Handed(), seed=8)
    data.set_epoch(3)
    for index in (4, 0, 4, 11):
        expected = Handed().getitem(index, sample_generator(8, 3, index))
        assert data[index].equal(expected)
        assert data[SampleKey(3, index)].equal(expected)
        assert not data[SampleKey(2, index)].equal(expected)


def test_what_one_sample_leaves_in_the_generator_does_not_reach_the_next():
    alone = [SeededDataset(Handed())[index] for index in range(12)]
    data = SeededDataset(Handed())
    for index in (3, 2, 3, 7, 0):
        assert data[index].equal(alone[index])


def test_samples_with_getitem_leave_the_global_states_alone_and_do_not_read_them():
    data, expected = SeededDataset(Handed()), copies(global_draws)
    first = data[5]
    assert global_draws() == expected
    assert data[5].equal(first)


def test_four_threads_do_not_disturb_each_other():
    class Slow(Handed):
        def getitem(self, index, rng):
            first = rng.random()
            barrier.wait(10)  # all threads are inside of a sample now
            return first, rng.random()

    barrier, data, found = threading.Barrier(4), SeededDataset(Slow(), seed=2), {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: data[i]}), daemon=True)
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {i: tuple(sample_generator(2, 0, i).random(2).tolist()) for i in range(4)}


# --- samples that draw from the global generators -------------------------------------------------


def test_global_draws_are_those_of_the_generators_of_the_sample():
    class Both(Global):
        def __getitem__(self, index):
            return [random.random() for _ in range(3)], torch.rand(3, dtype=torch.float64).tolist()

    python, torchs = SeededDataset(Both(), seed=7)[SampleKey(2, 5)]
    assert python == draws(sample_generator(7, 2, 5, kind="python"), 3).tolist()
    assert torchs == draws(sample_generator(7, 2, 5, kind="torch"), 3).tolist()


def test_each_global_generator_depends_on_seed_epoch_and_index():
    keys = [SampleKey(epoch, index) for epoch in range(3) for index in range(12)]
    rows = [SeededDataset(Global(), seed)[key][1:] for seed in (0, 1) for key in keys]
    for column in torch.stack(rows).T:
        assert len(column.unique()) == len(rows)


def test_a_global_sample_does_not_depend_on_the_states_it_meets():
    data = SeededDataset(Global())
    first = data[5]
    global_draws()
    assert data[5].equal(first)
    assert torch.stack(data.__getitems__([3, 5, 4]))[1].equal(first)


@pytest.mark.parametrize("how", ["alone", "batch", "block"])
def test_the_global_states_are_restored_after_samples(how):
    data, expected = SeededDataset(Global()), copies(global_draws)
    if how == "alone":
        data[3]
    elif how == "batch":
        data.__getitems__([SampleKey(1, 3), 4])
    else:
        with data.restored():
            inside = data[3], data[SampleKey(1, 3)]
        assert inside[0].equal(data[3])
    assert global_draws() == expected


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("batch", [False, True])
def test_the_global_states_are_restored_after_an_exception_and_the_next_sample_too(error, batch):
    failing = Failing()
    failing.error = error
    data, expected = SeededDataset(failing), copies(global_draws)
    for _ in range(2):
        with pytest.raises(error, match="on purpose"):
            data.__getitems__([1, 2]) if batch else data[1]
    assert global_draws() == expected


def copies(draw):
    """What ``draw`` would give, without drawing."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    python, torchs = random.getstate(), torch.get_rng_state()
    found = draw()
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(torchs)
    return found


def test_a_block_saves_once_and_a_sample_inside_it_leaves_restoring_to_the_block(monkeypatch):
    saved, original = [], random.getstate
    monkeypatch.setattr(random, "getstate", lambda: saved.append(1) or original())
    data = SeededDataset(Global())
    data.__getitems__(list(range(12)))
    assert len(saved) == 1
    with data.restored():
        data.__getitems__([1, 2])
        data[3]
    assert len(saved) == 2
    SeededDataset(Handed()).__getitems__([1, 2])
    assert len(saved) == 2


def test_a_data_set_that_asks_another_seeded_one_keeps_its_own_draws():
    class Mixed(Global):
        inner = SeededDataset(Global(), seed=1)

        def __getitem__(self, index):
            first = random.random()
            partner = self.inner[index + 1]
            return first, random.random(), partner

    first, second, partner = SeededDataset(Mixed(), seed=9)[2]
    assert [first, second] == draws(sample_generator(9, 0, 2, kind="python"), 2).tolist()
    assert partner.equal(SeededDataset(Global(), seed=1)[3])


# --- workers, ranks, epochs -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Global, Handed])
def test_workers_make_the_same_samples_as_no_workers(kind):
    data = SeededDataset(kind(), seed=3)
    expected = torch.stack([data[SampleKey(0, index)] for index in range(12)])
    for workers in (0, 1, 3):
        loader = DataLoader(data, 2, num_workers=workers, multiprocessing_context=fork(workers))
        assert torch.cat(list(loader)).equal(expected)


def test_persistent_workers_see_the_epoch_that_is_set():
    data = SeededDataset(Handed(), seed=3)
    fork_once = {"multiprocessing_context": "fork", "persistent_workers": True}
    loader = DataLoader(data, 3, num_workers=2, **fork_once)
    for epoch in (0, 4, 1):
        data.set_epoch(epoch)
        expected = torch.stack([data[SampleKey(epoch, index)] for index in range(12)])
        assert torch.cat(list(loader)).equal(expected)


def test_started_workers_make_the_same_samples_and_see_the_epoch():
    data = SeededDataset(Global(4), seed=3)
    data.set_epoch(5)
    expected = torch.stack([data[SampleKey(5, index)] for index in range(4)])
    loader = DataLoader(data, 2, num_workers=1, multiprocessing_context="spawn")
    assert torch.cat(list(loader)).equal(expected)


def fork(workers):
    return "fork" if workers else None


def test_the_rank_does_not_reach_the_draws(monkeypatch):
    expected = SeededDataset(Global())[3], SeededDataset(Handed())[3]
    monkeypatch.setenv("RANK", "3")
    for name, value in {"is_initialized": True, "get_rank": 3, "get_world_size": 4}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    assert SeededDataset(Global())[3].equal(expected[0])
    assert SeededDataset(Handed())[3].equal(expected[1])


@pytest.mark.parametrize("kind", [Global, Handed])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_copies_make_the_same_samples_and_have_the_epoch(kind, way):
    data = SeededDataset(kind(), seed=3)
    data.set_epoch(7)
    expected = data[4]
    twin = way(data)
    assert (twin.epoch, twin.seed, len(twin)) == (7, 3, 12)
    assert twin[4].equal(expected)


def test_an_index_from_the_end_is_the_same_sample():
    data = SeededDataset(Handed())
    assert data[-2].equal(data[10])
    assert data[SampleKey(0, -2)].equal(data[10])
    assert data[np.int64(10)].equal(data[10])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seed", "epoch", "index"])
@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), ("1", TypeError)]
)
def test_bad_numbers_are_named(unchecked, name, value, error):
    with pytest.raises(error, match=f"`{name}` must be .*; got"):
        sample_generator(**{"seed": 0, "epoch": 0, "index": 0, name: value})


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'numpy', 'torch' or 'python'; got 'jax'"):
        sample_generator(0, 0, 0, kind="jax")


def test_a_data_set_without_index_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    for bad in (Stream(), 3):
        with pytest.raises(TypeError, match=rf"{type(bad).__name__}. A stream goes to `Sharded"):
            SeededDataset(bad)


def test_bad_seeds_epochs_and_indices_of_a_data_set_are_refused(unchecked):
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        SeededDataset(Handed(), seed=-1)
    data = SeededDataset(Handed())
    for bad in (-1, 2**63):
        with pytest.raises(ValueError, match="`epoch` must be at least 0 and below 2"):
            data.set_epoch(bad)
    with pytest.raises(IndexError, match="index -13 is out of range for a length of 12"):
        data[-13]
    for bad in ("a", 1.5):
        with pytest.raises(TypeError, match=f"an index must be an integer; got {bad!r}"):
            data[bad]
        with pytest.raises(TypeError, match=f"an index must be an integer; got {bad!r}"):
            data[SampleKey(0, bad)]
