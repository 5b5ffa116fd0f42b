"""SafeLoader: each sample once, the same whoever makes it, and a state that fits any workers."""

import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from cln_tutorial.safe_generators.loader import SafeLoader, SkippedSample
from cln_tutorial.safe_generators.processes import PerProcess
from cln_tutorial.safe_generators.sharding import ShardedIterable
from cln_tutorial.safe_generators.streams import SeededDataset
from cln_tutorial.safe_generators.workers import WorkerDied, WorkerTimeout
from tests.test_safe_generators_workers import children, in_child

N = 37  # no multiple of the batch size


class Drawing:
    """(index, a draw from the generator of the sample)."""

    def __init__(self, n=N):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        raise AssertionError("`getitem` is there")

    def getitem(self, index, rng):
        return index, float(rng.random())


class DrawingGlobally(Drawing):
    """As somebody wrote it who knows nothing of us."""

    getitem = None

    def __getitem__(self, index):
        return index, float(np.random.rand() + torch.rand(()).item())  # noqa: NPY002


del DrawingGlobally.getitem


class Indices(Drawing):
    def getitem(self, index, rng):
        return index


def rows(batches):
    """(index, draw) in order."""
    return [(int(i), float(x)) for batch in batches for i, x in zip(*batch, strict=True)]


def loader(num_workers=0, dataset=None, **options):
    options = {"shuffle": True, "seed": 3} | options
    return SafeLoader(dataset or Drawing(), 4, num_workers=num_workers, **options)


def joined(lists):
    return [each for part in lists for each in part]


def as_json(state):
    return json.loads(json.dumps(state))


@pytest.fixture(scope="module")
def epochs():
    """Three epochs, undisturbed, without workers."""
    return epochs_with(0)


def epochs_with(num_workers, **options):
    with loader(num_workers, **options) as batches:
        return [rows(batches) for _ in range(3)]


# --- each sample once -----------------------------------------------------------------------------


@given(
    n=st.integers(0, 40),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 4),
    shuffle=st.booleans(),
    uneven=st.sampled_from(["exact", "pad", "drop"]),
)
@settings(max_examples=60, deadline=None)
def test_the_ranks_get_every_sample_once(n, batch_size, world_size, shuffle, uneven):
    shares = []
    for rank in range(world_size):
        options = {"shuffle": shuffle, "uneven": uneven, "rank": rank, "world_size": world_size}
        each = SafeLoader(Indices(n), batch_size, seed=1, **options)
        batches = [batch.tolist() for batch in each]
        assert len(batches) == len(SafeLoader(Indices(n), batch_size, seed=1, **options))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        shares.append(joined(batches))
    got = sorted(joined(shares))
    sizes = [len(share) for share in shares]
    if uneven == "exact":
        assert got == list(range(n))
        assert max(sizes) - min(sizes) <= 1
    else:
        assert max(sizes) == min(sizes)
        assert set(got) == set(range(n)) if uneven == "pad" else len(set(got)) == len(got)
        assert abs(len(got) - n) < world_size


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 11, 12, 13, 23, 24, 29])
def test_drop_last_leaves_out_the_incomplete_global_batch_on_all_ranks(n, world_size):
    counts = []
    for rank in range(world_size):
        each = SafeLoader(Indices(n), 4, drop_last=True, rank=rank, world_size=world_size)
        counts.append([len(batch) for batch in each])
        assert len(SafeLoader(Indices(n), 4, drop_last=True, rank=rank, world_size=world_size)) == (
            n // (4 * world_size)
        )
    assert counts == [[4] * (n // (4 * world_size))] * world_size


def test_the_last_batch_is_not_lost_with_several_workers():
    for num_workers in (1, 2):
        sizes = in_child(batch_sizes, num_workers)
        assert sizes == [4] * 9 + [1]


def batch_sizes(num_workers):
    with loader(num_workers, Indices()) as batches:
        return [len(batch) for batch in batches]


# --- the same whoever makes it --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"persistent_workers": False}], ids=["kept", "anew"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_order_and_draws_do_not_depend_on_the_workers(num_workers, options, epochs):
    assert in_child(epochs_with, num_workers, **options) == epochs


def test_no_epoch_repeats_the_order_or_the_draws_of_another(epochs):
    orders = [[index for index, _ in epoch] for epoch in epochs]
    assert len(set(map(tuple, orders))) == 3
    assert [sorted(order) for order in orders] == [list(range(N))] * 3
    draws = [draw for epoch in epochs for _, draw in epoch]
    assert len(set(draws)) == 3 * N


def global_draws(num_workers, method="auto"):
    options = {"dataset": DrawingGlobally(), "start_method": method}
    with loader(num_workers, **options) as batches:
        return [rows(batches) for _ in range(2)]


def test_transforms_that_draw_globally_are_the_same_in_workers_and_leave_the_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    here = global_draws(0)
    assert torch.rand(2).equal(expected)
    assert here[0] != here[1]
    assert in_child(global_draws, 2) == here


def test_workers_of_forkserver_give_the_same(epochs):
    assert in_child(epochs_with, 1, start_method="forkserver") == epochs


def test_ranks_draw_the_same_for_the_same_sample(epochs):
    known = dict(epochs[0])
    for rank in range(2):
        share = rows(loader(rank=rank, world_size=2))
        assert all(known[index] == draw for index, draw in share)


# --- epochs ---------------------------------------------------------------------------------------


def test_iterating_again_goes_to_the_next_epoch_also_after_a_break(epochs):
    batches = loader()
    for _ in batches:
        break
    assert rows(batches) == epochs[1]
    assert batches.epoch == 2
    batches.set_epoch(0)
    assert rows(batches) == epochs[0]


def epoch_set_with_workers():
    with loader(2) as batches:
        next(iter(batches))
        before = {pid for pid, _ in children()}
        batches.set_epoch(2)
        third = rows(batches)
        assert {pid for pid, _ in children()} == before, "the workers live on"
        return third


def test_a_new_epoch_reaches_workers_that_live_on(epochs):
    assert in_child(epoch_set_with_workers) == epochs[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iteration_that_was_replaced_says_so(num_workers):
    assert in_child(iterate_twice, num_workers) == "this iteration is over"


def iterate_twice(num_workers):
    with loader(num_workers) as batches:
        first = iter(batches)
        next(first)
        second = iter(batches)
        next(second)
        try:
            next(first)
        except RuntimeError as error:
            message = str(error).partition(":")[0]
        del first  # what it leaves behind must not end the other one
        assert len(rows(second)) == N - 4
        return message


# --- state ----------------------------------------------------------------------------------------


def resumed_everywhere(saving, loading):
    """Rows before, and after each resume, for a state saved after every batch of two epochs."""
    found = []
    with loader(saving) as one, loader(loading) as other:
        for _ in range(2):
            before = []
            for batch in one:
                before += rows([batch])
                other.load_state_dict(as_json(one.state_dict()))
                found.append((before + rows(other), rows(other)[:4]))
    return found


@pytest.mark.parametrize(("saving", "loading"), [(0, 0), (2, 0), (0, 2), (2, 1)])
def test_a_state_saved_after_any_batch_continues_with_other_workers(saving, loading, epochs):
    found = in_child(resumed_everywhere, saving, loading)
    assert len(found) == 20
    for number, (epoch, next_epoch) in enumerate(found):
        assert epoch == epochs[number // 10]
        assert next_epoch == epochs[number // 10 + 1][:4]


def test_the_state_counts_what_was_delivered_and_not_what_was_prefetched():
    assert in_child(consumed_while_prefetching) == [0, 4, 8, 12]


def consumed_while_prefetching():
    with loader(2) as batches:
        consumed = [batches.state_dict()["consumed"]]
        for _ in batches:
            time.sleep(0.1)  # the workers run ahead
            consumed.append(batches.state_dict()["consumed"])
            if len(consumed) == 4:
                return consumed


def test_after_an_epoch_the_state_is_the_start_of_the_next_one(epochs):
    batches = loader()
    rows(batches)
    state = as_json(batches.state_dict())
    assert (state["epoch"], state["consumed"]) == (1, 0)
    other = loader()
    other.load_state_dict(state)
    assert rows(other) == epochs[1]


def test_the_usual_loop_over_epochs_keeps_a_loaded_place(epochs):
    batches = loader()
    first = next(iter(batches))
    other = loader()
    other.load_state_dict(as_json(batches.state_dict()))
    assert len(other) == 9
    seen = rows([first])
    for epoch in range(other.epoch, 3):
        other.set_epoch(epoch)
        seen += rows(other)
    assert seen == joined(epochs)


def test_a_state_continues_on_another_number_of_ranks(epochs):
    ranks = [loader(rank=rank, world_size=2) for rank in range(2)]
    iterators = [iter(each) for each in ranks]
    seen = [rows([next(each)]) for _ in range(2) for each in iterators]
    states = [as_json(each.state_dict()) for each in ranks]
    assert states[0] == states[1]
    three = [loader(rank=rank, world_size=3) for rank in range(3)]
    for each in three:
        each.load_state_dict(states[0])
        seen.append(rows(each))
    assert sorted(joined(seen)) == sorted(epochs[0])


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"dataset": Drawing(N + 1)}, "length"),
        ({"seed": 4}, "seed"),
        ({"shuffle": False}, "shuffle"),
    ],
)
def test_a_state_of_something_else_is_refused(other, word):
    with pytest.raises(ValueError, match=word):
        loader(**other).load_state_dict(loader().state_dict())


def test_a_state_of_another_version_or_kind_is_refused():
    with pytest.raises(ValueError, match="version"):
        loader().load_state_dict({**loader().state_dict(), "version": 0})
    with pytest.raises(ValueError, match="is not of `EpochSampler`"):
        loader().load_state_dict(Lengths.loader().state_dict())
    with pytest.raises(ValueError, match="not saved with a `batch_sampler`"):
        Lengths.loader().load_state_dict(loader().state_dict())


def write_and_die(path, num_workers, after):
    """Each batch goes to a file with the state; then the process is killed."""
    batches = loader(num_workers)
    if path.exists():
        batches.load_state_dict(json.loads(path.read_text().splitlines()[-1])["state"])
    with path.open("a") as file:
        for number, batch in enumerate(batches, 1):
            print(json.dumps({"rows": rows([batch]), "state": batches.state_dict()}), file=file)
            file.flush()
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_again_and_again_is_the_undisturbed_one(tmp_path, epochs):
    path = tmp_path / "log"
    forkserver = multiprocessing.get_context("forkserver")
    for num_workers, after in [(2, 3), (0, 2), (1, 4), (2, 99)]:
        process = forkserver.Process(target=write_and_die, args=(path, num_workers, after))
        process.start()
        process.join(60)
        assert process.exitcode == (0 if after == 99 else -signal.SIGKILL)
    seen = [row for line in path.read_text().splitlines() for row in json.loads(line)["rows"]]
    assert [tuple(row) for row in seen] == epochs[0]


# --- errors of samples and of workers -------------------------------------------------------------


class Failing(Drawing):
    """Fails at some indices, the first so many times."""

    def __init__(self, how, at=(5, 6), times=10**6):
        super().__init__()
        self.how, self.at, self.times = how, at, times
        self.count = torch.zeros(N, dtype=torch.int64).share_memory_()

    def getitem(self, index, rng):
        if index in self.at and self.count[index] < self.times:
            self.count[index] += 1
            FAILS[self.how]()
        return super().getitem(index, rng)


def fails():
    raise OSError("no such file")


FAILS = {
    "exception": fails,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
}


def tolerant(num_workers, how, times=10**6, at=(5, 6), **options):
    """Rows, what was skipped, the warnings, and what was raised."""
    dataset = Failing(how, at, times)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = loader(num_workers, dataset, **options)
        seen, error = [], None
        try:
            for batch in batches:
                seen += rows([batch])
        except Exception as raised:
            error = raised
            assert children() == []
        batches.close()
    said = [str(each.message) for each in caught]
    return seen, batches.skipped, said, error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_samples_are_left_out_counted_and_reported(num_workers, epochs):
    options = {"on_error": "skip", "max_skips": 2}
    seen, skipped, said, error = in_child(tolerant, num_workers, "exception", **options)
    assert error is None
    assert seen == [row for row in epochs[0] if row[0] not in (5, 6)]
    assert sorted(skipped) == [SkippedSample(0, i, "OSError: no such file") for i in (5, 6)]
    assert len(said) == 2
    assert "is skipped, 2 of at most 2: OSError: no such file" in said[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_skips_than_allowed_are_an_error(num_workers):
    options = {"on_error": "skip", "max_skips": 1}
    _, skipped, _, error = in_child(tolerant, num_workers, "exception", **options)
    assert len(skipped) == 1
    assert "would be skip number 2, and `max_skips` is 1: OSError" in str(error)


@pytest.mark.parametrize(("how", "kind"), [("killed", WorkerDied), ("hangs", WorkerTimeout)])
def test_a_sample_that_ends_its_worker_can_be_skipped(how, kind, epochs):
    options = {"on_error": "skip", "max_skips": 2, "timeout": 0.5, "start_timeout": 0.5}
    seen, skipped, said, error = in_child(tolerant, 2, how, **options)
    assert error is None
    assert seen == [row for row in epochs[0] if row[0] not in (5, 6)]
    assert sorted(sample.index for sample in skipped) == [5, 6]
    assert all("worker" in sample.error for sample in skipped)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("num_workers", "how", "times"),
    [(0, "exception", 2), (2, "exception", 2), (2, "killed", 1), (2, "hangs", 1)],
)
def test_retried_samples_are_all_there_and_draw_the_same(num_workers, how, times, epochs):
    options = {"on_error": "retry", "timeout": 0.5, "start_timeout": 0.5}
    seen, _, said, error = in_child(tolerant, num_workers, how, times, **options)
    assert error is None
    assert seen == epochs[0]
    assert all("New workers try again." in each for each in said)
    assert bool(said) == (how != "exception")


@pytest.mark.parametrize(
    ("num_workers", "how", "kind"),
    [(0, "exception", OSError), (2, "exception", OSError), (2, "killed", WorkerDied)],
)
def test_retrying_has_an_end(num_workers, how, kind, epochs):
    first = epochs[0][0][0]
    seen, _, said, error = in_child(tolerant, num_workers, how, at=(first,), on_error="retry")
    assert type(error) is kind
    assert seen == []
    assert len(said) == (2 if how == "killed" else 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_leaves_the_state_at_the_last_batch_delivered(num_workers, epochs):
    seen, consumed, rest = in_child(continued_after_an_error, num_workers)
    assert consumed == len(seen)
    assert seen + rest == epochs[0]


def continued_after_an_error(num_workers):
    dataset = Failing("exception", at=(int(epochs_with(0)[0][9][0]),), times=1)
    seen = []
    with loader(num_workers, dataset) as batches:
        try:
            for batch in batches:
                seen += rows([batch])
        except OSError as error:
            note = error.__notes__[0]
        assert "at sample" in note
        state = batches.state_dict()
        assert children() == []
        batches.load_state_dict(state)
        return seen, state["consumed"], rows(batches)


# --- no process is left ---------------------------------------------------------------------------


def ended_by(how):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    dataset = Failing("hangs", at=(20,)) if how == "interrupted" else Drawing()
    batches = loader(2, dataset, persistent_workers=how != "broken off")
    try:
        for number, _ in enumerate(batches):
            assert len(children()) == 2
            if how == "interrupted" and not number:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            if how == "broken off":
                break
            if how == "error of the user":
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    except KeyboardInterrupt:
        return children()
    if how == "closed":
        batches.close()
        batches.close()
    if how in ("error of the user", "dropped"):
        assert len(children()) == 2, "they are kept for the next epoch"
        del batches, _
    return children()


ENDS = ["closed", "dropped", "broken off", "error of the user", "interrupted"]


@pytest.mark.parametrize("how", ENDS)
def test_no_process_is_left(how):
    assert in_child(ended_by, how) == []


def test_a_closed_loader_can_be_used_again():
    assert in_child(closed_between) == epochs_with(0)[:2]


def closed_between():
    batches = loader(2)
    first = rows(batches)
    batches.close()
    second = rows(batches)
    batches.close()
    return [first, second]


# --- batch samplers and streams -------------------------------------------------------------------


class Lengths:
    """Batches of different sizes, a function of the epoch."""

    def __init__(self, forgets=False):
        self.epoch, self.forgets = 0, forgets
        self.calls = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 7

    def __iter__(self):
        self.calls += self.forgets
        order = np.random.default_rng([self.epoch, self.calls]).permutation(N)
        return iter(np.array_split(order, 7))

    @classmethod
    def loader(cls, num_workers=0, **options):
        return SafeLoader(Drawing(), batch_sampler=cls(**options), num_workers=num_workers)


def resumed_batches(saving, loading):
    with Lengths.loader(saving) as one, Lengths.loader(loading) as other:
        first = [rows([batch]) for batch in one]
        iterator = iter(one)
        second = [rows([next(iterator)]) for _ in range(3)]
        state = as_json(one.state_dict())
        assert state["batches"] == 3
        other.load_state_dict(state)
        assert len(other) == 4
        return first, second + [rows([batch]) for batch in other]


@pytest.mark.parametrize(("saving", "loading"), [(0, 0), (2, 0), (0, 2)])
def test_the_batches_of_another_sampler_are_counted_and_continued(saving, loading):
    for epoch, found in enumerate(in_child(resumed_batches, saving, loading)):
        sampler = Lengths()
        sampler.set_epoch(epoch)
        expected = [batch.tolist() for batch in sampler]
        assert [[index for index, _ in batch] for batch in found] == expected


def test_a_batch_sampler_that_gives_other_batches_is_refused_at_the_resume():
    one, other = Lengths.loader(), Lengths.loader(forgets=True)
    next(iter(one))
    other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="does not give the 1 batches that were delivered"):
        next(iter(other))


def items_of(shard, num_shards, rng):
    for number in range(shard % 5):
        yield shard * 100 + number, float(rng.random())


def stream(num_workers, **options):
    dataset = ShardedIterable(items_of, seed=9, num_shards=16)
    return SafeLoader(dataset, 4, num_workers=num_workers, **options)


def streamed(saving, loading):
    with stream(saving) as one, stream(loading) as other:
        whole = sorted(rows(one))
        iterator = iter(one)
        before = rows([next(iterator) for _ in range(3)])
        other.load_state_dict(as_json(one.state_dict()))
        return whole, sorted(before + rows(other)), sorted(rows(other))


@pytest.mark.parametrize(("saving", "loading"), [(0, 0), (1, 2), (2, 0), (2, 1)])
def test_a_stream_yields_each_item_once_and_continues_with_other_workers(saving, loading):
    epochs = [sorted(rows(each)) for each in [stream(0)] for _ in range(3)]
    assert [index for index, _ in epochs[0]] == [
        shard * 100 + number for shard in range(16) for number in range(shard % 5)
    ]
    assert in_child(streamed, saving, loading) == tuple(epochs)


def shares_of_ranks(num_workers):
    shares = []
    for rank in range(2):
        dataset = ShardedIterable(items_of, seed=9, num_shards=16, rank=rank, world_size=2)
        with SafeLoader(dataset, 4, num_workers=num_workers) as batches:
            shares.append(rows(batches))
    return shares


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_ranks_share_a_stream(num_workers):
    one, two = in_child(shares_of_ranks, num_workers)
    assert sorted(one + two) == sorted(rows(stream(0)))
    assert min(len(one), len(two)) > 10


def stream_with_a_death():
    path = torch.zeros(1, dtype=torch.int64).share_memory_()

    def make(shard, num_shards, rng):
        for item in items_of(shard, num_shards, rng):
            if item[0] == 902 and not path[0]:
                path[0] = 1
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = ShardedIterable(make, seed=9, num_shards=16)
        with SafeLoader(dataset, 4, num_workers=2, on_error="retry") as batches:
            return sorted(rows(batches)), [str(each.message) for each in caught]


def test_a_stream_goes_on_after_a_death_without_loss_or_double():
    seen, said = in_child(stream_with_a_death)
    assert seen == sorted(rows(stream(0)))
    assert len(said) == 1
    assert "was killed by SIGKILL" in said[0]


def test_drop_last_of_a_stream_leaves_whole_batches():
    assert {len(batch[0]) for batch in stream(0, drop_last=True)} == {4}


# --- how processes start --------------------------------------------------------------------------


def test_auto_forks_where_that_is_safe_and_says_why():
    text = in_child(repr, loader(2))
    assert "num_workers=2, fork: no other thread runs, and CUDA is not initialised" in text
    assert "epoch 0, 0 samples delivered" in text
    assert "num_workers=0; epoch" in repr(loader(0))


@pytest.fixture
def prefetcher():
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="prefetcher")
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("prefetcher")
def test_auto_does_not_fork_beside_another_thread():
    assert "forkserver: other threads run (" in repr(loader(2))


def test_auto_does_not_fork_once_cuda_is_initialised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "forkserver: CUDA is initialised" in repr(loader(2))


@pytest.mark.usefixtures("prefetcher")
def test_auto_forks_what_was_defined_in_a_session_that_nobody_can_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    assert "forkserver" in repr(loader(2))
    monkeypatch.setattr(Drawing, "__module__", "__main__")
    assert "fork: the data set is defined in this session" in repr(loader(2))


def test_two_loaders_at_once_both_fork(epochs):
    assert in_child(train_and_validate) == (epochs[0], epochs[0])


def train_and_validate():
    with loader(1) as one, loader(1) as two:
        pairs = list(zip(one, two, strict=True))
        assert "fork: running" in repr(two)
        return rows([a for a, _ in pairs]), rows([b for _, b in pairs])


class Holding(Drawing):
    def __init__(self, part):
        super().__init__()
        self.part = types.SimpleNamespace(deep=part)


def message_of_unpicklable(part, collate_fn=None):
    dataset = Holding(threading.Lock()) if part else Drawing()
    function = (lambda samples: samples) if collate_fn else None
    batches = loader(1, dataset, start_method="forkserver", collate_fn=function)
    try:
        next(iter(batches))
    except TypeError as error:
        return str(error)


def test_a_data_set_that_cannot_be_pickled_is_refused_with_the_attribute():
    message = in_child(message_of_unpicklable, True)
    assert message.startswith("`dataset.part.deep` cannot be pickled")
    assert "`PerProcess`" in message
    assert in_child(message_of_unpicklable, False, True).startswith("`collate_fn` cannot")


def numbers_of_processes(method):
    dataset = WithPid(PerProcess(os.getpid))
    with SafeLoader(dataset, 4, num_workers=2, start_method=method) as batches:
        return {int(pid) for batch in batches for pid in batch}, os.getpid()


class WithPid(Indices):
    def __init__(self, pid):
        super().__init__()
        self.pid = pid
        pid()

    def getitem(self, index, rng):
        return self.pid()


def test_per_process_things_are_made_in_each_worker():
    pids, own = in_child(numbers_of_processes, "fork")
    assert len(pids) == 2
    assert own not in pids


# --- what is refused ------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        return iter(int, 1)


REFUSED = [
    ({"worker_init_fn": print}, ValueError, "`worker_init_fn` is refused.*PerProcess"),
    ({"generator": torch.Generator()}, ValueError, "`generator` is refused.*`seed`"),
    ({"on_error": "ignore"}, ValueError, "'raise', 'skip', 'retry'"),
    ({"on_error": "skip"}, ValueError, "`max_skips` of at least 1 go together"),
    ({"max_skips": 1}, ValueError, "`max_skips` of at least 1 go together"),
    ({"batch_sampler": iter([[0]]), "batch_size": 1}, TypeError, "`batch_sampler` is an iterator"),
    ({"timeout": 0}, ValueError, "`timeout` must be a positive number of seconds; got 0"),
    ({"start_timeout": -1}, ValueError, "`start_timeout` must be a positive number .* got -1"),
    ({"start_method": "thread"}, ValueError, "`start_method` must be one of"),
    ({"num_workers": -1}, ValueError, "`num_workers` must be an integer of at least 0"),
    ({"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1"),
    ({"batch_sampler": [[1]], "shuffle": True}, ValueError, "shuffle cannot be given too"),
    ({"batch_sampler": [[1]], "batch_size": 2}, ValueError, "batch_size cannot be given too"),
    ({"dataset": Endless()}, TypeError, "make it a `ShardedIterable`"),
    ({"dataset": iter([])}, TypeError, "must have `len`"),
    ({"dataset": ShardedIterable([1]), "shuffle": True}, ValueError, "shuffle cannot be given"),
    ({"dataset": ShardedIterable([1]), "seed": 2}, ValueError, "seed cannot be given here"),
    ({"dataset": SeededDataset(Drawing(), 1)}, ValueError, "seed 1, and `seed` is 0"),
]


@pytest.mark.parametrize(("options", "kind", "words"), REFUSED, ids=[r[2][:28] for r in REFUSED])
def test_what_cannot_be_is_refused_before_any_work(options, kind, words):
    with pytest.raises(kind, match=words):
        SafeLoader(**{"dataset": Drawing(), **options})


def test_a_length_of_a_stream_is_not_guessed():
    with pytest.raises(TypeError, match="not known before its end"):
        len(stream(0))


def test_a_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="`epoch` must be an integer of at least 0; got -1"):
        loader().set_epoch(-1)


# --- what a batch draws as a whole ----------------------------------------------------------------


def mixed(samples):
    """As mix-up draws its weight: once per batch, from the global states."""
    weight = float(np.random.rand() + torch.rand(()).item())  # noqa: NPY002
    return [index for index, _ in samples], weight


def mixes(num_workers, **options):
    options = {"collate_fn": mixed, "start_method": "fork"} | options
    with loader(num_workers, **options) as made:
        return [[list(made) for _ in range(2)]]


def items_of_a_stream(num_workers, seed):
    stream = ShardedIterable([(i, 0) for i in range(8)], num_shards=2, seed=seed)
    made = SafeLoader(stream, 4, collate_fn=mixed, num_workers=num_workers, start_method="fork")
    with made:
        return sorted(weight for _, weight in made)


def test_what_collate_fn_draws_is_a_function_of_seed_epoch_and_samples():
    (here,) = mixes(0)
    (there,) = in_child(mixes, 2)
    assert here == there
    weights = [weight for epoch in here for _, weight in epoch]
    (other,) = mixes(0, seed=4)
    weights += [weight for epoch in other for _, weight in epoch]
    assert len(set(weights)) == len(weights) == 40
    ranks = [mixes(0, rank=rank, world_size=2)[0][0] for rank in range(2)]
    assert not {w for _, w in ranks[0]} & {w for _, w in ranks[1]}


def test_what_collate_fn_draws_for_a_stream_is_a_function_of_seed_and_items():
    first = items_of_a_stream(0, seed=1)
    assert len(set(first)) == 2
    assert in_child(items_of_a_stream, 2, 1) != in_child(items_of_a_stream, 2, 2)
    assert in_child(items_of_a_stream, 1, 1) == first


def test_the_global_states_are_left_as_found_by_collate_fn():
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    list(loader(0, collate_fn=mixed))
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.get_rng_state().equal(before[1])


# --- the length, the end, and Ctrl-C --------------------------------------------------------------


def test_the_length_stays_in_a_loop_and_is_what_was_left_when_it_began():
    made = loader()
    assert [len(made) for _ in made] == [10] * 10
    assert len(made) == 10
    batches = iter(made)
    for _ in range(3):
        next(batches)
    resumed = loader()
    resumed.load_state_dict(made.state_dict())
    assert [len(resumed) for _ in resumed] == [7] * 7
    assert len(resumed) == 10


def workers_interrupted():
    made = loader(2, start_method="fork")
    batches = iter(made)
    first = [next(batches), next(batches)]  # one of each worker: both have started
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.3)
    rest = list(batches)
    made.close()
    return rows([*first, *rest])


def test_workers_leave_ctrl_c_to_their_parent():
    assert in_child(workers_interrupted) == rows(loader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iteration_of_a_closed_loader_says_so(num_workers):
    assert in_child(read_after_the_end, num_workers) == "this iteration is over"


def read_after_the_end(num_workers):
    made = loader(num_workers, start_method="fork")
    batches = iter(made)
    next(batches)
    made.close()
    try:
        next(batches)
    except RuntimeError as error:
        return str(error).partition(":")[0]


class Wrapping:
    def __init__(self, inside):
        self.dataset, self.transforms = range(4), [inside]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.dataset[index]


def test_auto_forks_for_what_is_defined_in_the_session_however_deep(monkeypatch):
    of_session = types.FunctionType(compile("0", "cell", "eval"), {"__name__": "__main__"})
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    released = threading.Event()
    thread = threading.Thread(target=released.wait)
    thread.start()
    try:
        for inside, method in ((of_session, "fork"), (len, "forkserver")):
            subset = torch.utils.data.Subset(Wrapping(inside), [0, 1])
            partial = functools.partial(print, inside)
            for options in ({"dataset": subset}, {"dataset": range(4), "collate_fn": partial}):
                made = SafeLoader(**options, num_workers=2)
                assert f", {method}: " in repr(made)
    finally:
        released.set()
        thread.join()


def test_a_batch_size_of_numpy_is_an_integer_in_the_state_too(unchecked):
    made = SafeLoader(range(10), np.int64(4))
    next(iter(made))
    assert json.loads(json.dumps(made.state_dict()))["consumed"] == 4


class Killing:
    """A sampler in whose code the news of a dead worker arrives."""

    def __iter__(self):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)
        yield [0, 1]


def killed_while_sampling():
    made = SafeLoader(range(4), batch_sampler=Killing(), num_workers=1, start_method="fork")
    try:
        list(made)
    except WorkerDied as error:
        return error.exit_code


def test_a_worker_that_dies_while_the_sampler_works_is_named():
    assert in_child(killed_while_sampling) == -signal.SIGKILL
