"""The replay buffer: which rows change, which chains are handed out, and what a copy carries on."""

import math

import pytest
import torch

from cln_tutorial.energy_models.buffer import ReplayBuffer


def numbered(capacity, policy="inplace", reinit_prob=0.0, **options):
    """A buffer whose row i holds the number i, and whose fresh states are -1."""
    buffer = ReplayBuffer(
        capacity,
        (2,),
        policy=policy,
        reinit_prob=reinit_prob,
        init=lambda n, generator: torch.full((n, 2), -1.0),
        seed=0,
        **options,
    )
    buffer.states.copy_(torch.arange(float(capacity))[:, None].expand(-1, 2))
    return buffer


def test_an_update_in_place_changes_the_rows_that_were_handed_out_and_no_other():
    buffer = numbered(10)
    x, rows = buffer.sample(4)
    assert torch.equal(x[:, 0], rows.float())
    buffer.update(rows, x + 100)
    expected = torch.arange(10.0)
    expected[rows] += 100
    assert torch.equal(buffer.states[:, 0], expected)


def test_what_is_handed_out_is_a_copy_and_no_two_chains_are_the_same():
    buffer = numbered(50)
    for n in (1, 49, 50):
        x, rows = buffer.sample(n)
        assert len(rows.unique()) == n == len(x)
        x.fill_(math.nan)
        assert buffer.states.isfinite().all()
    x, rows = buffer.sample(0)
    assert x.shape == (0, 2)
    buffer.update(rows, x)
    assert torch.equal(buffer.states[:, 0], torch.arange(50.0))


def test_every_chain_is_handed_out_equally_often():
    # Counts of a row over 2,000 draws of 10 of 40: binomial(2000, 1/4); 5 standard deviations.
    buffer, counts = numbered(40), torch.zeros(40)
    for _ in range(2000):
        counts[buffer.sample(10)[1]] += 1
    assert (counts - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)
    assert counts.sum() == 20_000


def test_a_ring_writes_over_the_oldest_rows_and_goes_round_where_no_batch_fits():
    buffer = numbered(7, policy="ring")
    for number in range(1, 5):  # four batches of 3: rows 0-2, 3-5, 6 0 1, 2-4
        _, rows = buffer.sample(3)
        buffer.update(rows, torch.full((3, 2), 100.0 * number))
    assert buffer.states[:, 0].tolist() == [300, 300, 400, 400, 400, 200, 300]
    assert buffer.position == 5


def test_the_share_of_chains_that_start_afresh_is_binomial_and_they_are_fresh():
    buffer = numbered(500, reinit_prob=0.05)
    draws = 200
    counts = torch.tensor([(buffer.sample(100)[0][:, 0] == -1).sum().item() for _ in range(draws)])
    counts = counts.double()
    mean, variance = 100 * 0.05, 100 * 0.05 * 0.95
    assert abs(counts.mean().item() - mean) < 5 * math.sqrt(variance / draws)
    assert abs(counts.var().item() / variance - 1) < 5 * math.sqrt(2 / (draws - 1))
    assert (buffer.states[:, 0] >= 0).all()  # nothing is written but by an update
    always = numbered(20, reinit_prob=1.0)
    x, rows = always.sample(5)
    assert (x == -1).all()
    always.update(rows, x)
    assert (always.states[:, 0] == -1).sum() == 5


def test_uniform_states_fill_the_unit_cube():
    buffer = ReplayBuffer(20_000, (3,), seed=0)
    assert buffer.states.min() >= 0
    assert buffer.states.max() < 1
    error = 5 / math.sqrt(12 * 20_000)
    assert (buffer.states.mean(0) - 0.5).abs().max() < error


def test_a_copy_of_the_state_goes_on_with_the_same_bits():
    def run(buffer, steps):
        for _ in range(steps):
            x, rows = buffer.sample(5)
            buffer.update(rows, x * 1.5 + 1)
        return buffer.states.clone()

    for policy in ("inplace", "ring"):
        options = dict(reinit_prob=0.3, policy=policy)
        whole = ReplayBuffer(13, (2, 3), seed=1, **options)
        run(whole, 7)
        state = whole.state_dict()
        expected = run(whole, 9)
        other = ReplayBuffer(13, (2, 3), seed=99, **options)
        other.load_state_dict(state)
        assert torch.equal(run(other, 9), expected)
        assert other.position == whole.position
        # The state is a copy: what came after did not touch it.
        again = ReplayBuffer(13, (2, 3), seed=5, **options)
        again.load_state_dict(state)
        assert torch.equal(run(again, 9), expected)


def test_the_seed_gives_the_same_chains_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    pairs = [ReplayBuffer(30, (2,), seed=3).sample(10) for _ in range(2)]
    keyed = [
        ReplayBuffer(30, (2,), generator=torch.Generator().manual_seed(4)).sample(10)
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in (pairs, keyed):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert not torch.equal(pairs[0][1], keyed[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    buffer = ReplayBuffer(9, (4,), dtype=dtype, seed=0, reinit_prob=0.5)
    x, rows = buffer.sample(3)
    assert x.dtype == dtype
    buffer.update(rows, x + 1)
    assert buffer.states.dtype == dtype


def test_no_graph_is_kept_over_a_thousand_updates():
    buffer = ReplayBuffer(64, (8,), seed=0)
    place = buffer.states.data_ptr()
    weight = torch.ones(8, requires_grad=True)
    for _ in range(1000):
        x, rows = buffer.sample(16)
        assert not x.requires_grad
        buffer.update(rows, (x * weight).tanh())
    assert not buffer.states.requires_grad
    assert buffer.states.grad_fn is None
    # One tensor, written in place: the memory is flat.
    assert buffer.states.data_ptr() == place
    assert buffer.states.untyped_storage().nbytes() == 64 * 8 * 4
    fresh = ReplayBuffer(4, (8,), init=lambda n, generator: weight.expand(n, 8), seed=0)
    assert not fresh.sample(4)[0].requires_grad


def test_wrong_arguments_are_named(unchecked):
    buffer = ReplayBuffer(4, (2,), seed=0)
    x = torch.zeros(2, 2)
    for error, word, call in [
        (ValueError, "`capacity` must be at least 1", lambda: ReplayBuffer(0, (2,))),
        (ValueError, "`event_shape`", lambda: ReplayBuffer(3, ())),
        (ValueError, "`event_shape`", lambda: ReplayBuffer(3, (2, 0))),
        (ValueError, "`reinit_prob`", lambda: ReplayBuffer(3, (2,), reinit_prob=1.1)),
        (ValueError, "`policy`", lambda: ReplayBuffer(3, (2,), policy="fifo")),
        (ValueError, "`init`", lambda: ReplayBuffer(3, (2,), init="normal")),
        (TypeError, "`dtype`", lambda: ReplayBuffer(3, (2,), dtype=torch.int64)),
        (
            ValueError,
            "`init` must have shape",
            lambda: ReplayBuffer(3, (2,), init=lambda n, g: torch.zeros(n, 3)),
        ),
        (
            TypeError,
            "of the buffer's torch.float32; got torch.float64",
            lambda: ReplayBuffer(3, (2,), init=lambda n, g: torch.zeros(n, 2).double()),
        ),
        (ValueError, "capacity 4; got 5", lambda: buffer.sample(5)),
        (ValueError, "`n` must be at least 0", lambda: buffer.sample(-1)),
        (ValueError, "must differ", lambda: buffer.update(torch.tensor([1, 1]), x)),
        (ValueError, "must lie in", lambda: buffer.update(torch.tensor([1, 4]), x)),
        (ValueError, "must lie in", lambda: buffer.update(torch.tensor([-1, 2]), x)),
        (ValueError, "must have shape", lambda: buffer.update(torch.tensor([1]), x)),
        (TypeError, "must be of the buffer's", lambda: buffer.update(torch.arange(2), x.double())),
        (
            ValueError,
            "at most 4 states",
            lambda: buffer.update(torch.arange(5), torch.zeros(5, 2)),
        ),
        (KeyError, "position", lambda: buffer.load_state_dict({"states": buffer.states})),
        (
            ValueError,
            "must have shape",
            lambda: buffer.load_state_dict(ReplayBuffer(5, (2,)).state_dict()),
        ),
    ]:
        with pytest.raises(error, match=word):
            call()
    assert len(buffer) == 4
