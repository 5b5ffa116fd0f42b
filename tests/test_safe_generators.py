"""The parts of the chapter together, as users import them: a run that is stopped and goes on."""

import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

from cln_tutorial.safe_generators import (
    EpochSampler,
    PerProcess,
    SafeLoader,
    SampleKey,
    SeededDataset,
    ShardedIterable,
    sample_generator,
)
from tests.test_safe_generators_workers import in_child

N, BATCH, SEED = 23, 4, 5


class Noisy:
    """Each sample is its index and a draw; the table belongs to the process."""

    def __init__(self):
        self.table = PerProcess(np.arange, N)

    def __len__(self):
        return N

    def getitem(self, index, rng):
        return int(self.table()[index]), rng.random()


def epochs(num_workers, stop=None, world_size=1):
    """Two epochs as (index, draw); after `stop` batches every rank goes on in a new loader."""
    options = {"shuffle": True, "seed": SEED, "start_method": "fork", "world_size": world_size}
    options |= {"num_workers": num_workers}
    found = []
    for rank in range(world_size):
        loader, mine = SafeLoader(Noisy(), BATCH, rank=rank, **options), []
        while loader.epoch < 2:
            for number, (indices, draws) in enumerate(loader):
                mine += zip(indices.tolist(), draws.tolist(), [loader.epoch] * BATCH, strict=False)
                if number + 1 == stop:
                    break
            if stop is not None:
                state = json.loads(json.dumps(loader.state_dict()))
                loader.close()
                loader, stop = SafeLoader(Noisy(), BATCH, rank=rank, **options), None
                loader.load_state_dict(state)
        loader.close()
        found += mine
    return found


def test_a_sample_is_its_generator_s_first_draw_in_every_way_to_get_it():
    expected = {
        (index, float(sample_generator(SEED, epoch, index).random()), epoch)
        for epoch in range(2)
        for index in range(N)
    }
    data = SeededDataset(Noisy(), SEED)
    for index, draw, epoch in expected:
        assert data[SampleKey(epoch, index)] == (index, draw)
    assert set(epochs(0)) == expected
    assert len(epochs(0)) == 2 * N
    assert set(in_child(epochs, 2, world_size=3)) == expected


@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_that_goes_on_in_a_new_loader_is_the_undisturbed_one(stop):
    assert in_child(epochs, 2, stop=stop) == epochs(0)


def test_sampler_and_data_set_serve_a_plain_loader_too():
    data, sampler = SeededDataset(Noisy(), SEED), EpochSampler(N, seed=SEED, batch_size=BATCH)
    found = []
    for epoch in range(2):
        data.set_epoch(epoch)
        sampler.set_epoch(epoch)
        for indices, draws in DataLoader(data, BATCH, sampler=sampler):
            found += zip(indices.tolist(), draws.tolist(), [epoch] * BATCH, strict=False)
    assert found == epochs(0)


def test_a_stream_gives_each_item_once_whoever_reads_it():
    stream = ShardedIterable(range(N), num_shards=6)
    found = [item for batch in SafeLoader(stream, BATCH) for item in batch.tolist()]
    assert sorted(found) == list(range(N))
