"""What all samplers promise: the same chains however they are cut, and nothing left behind."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from cln_tutorial.energy_models import samplers
from cln_tutorial.energy_models._checks import HAS_NUMBA
from cln_tutorial.energy_models.energies import (
    DoubleWellEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
)
from cln_tutorial.energy_models.samplers import (
    SampleOutput,
    effective_temperature,
    langevin_sample,
    mala_sample,
    underdamped_langevin_sample,
)
from cln_tutorial.energy_models.steps import Preconditioner, baoab_step, langevin_step

needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="needs the extra fast")
BACKENDS = ["reference", pytest.param("numba", marks=needs_numba)]
SAMPLERS = [langevin_sample, mala_sample, underdamped_langevin_sample]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
inf, nan = math.inf, math.nan


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(samplers, "_warned", set())


def seeded(seed=6612):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def quadratic(x):
    return x.flatten(1).square().sum(1) / 2


def quartic(x):
    x = x.flatten(1)
    return (x**4 / 4 - x**2 / 2 + x / 4).sum(1)


class Network(nn.Module):
    def __init__(self, width=3, dropout=0.0):
        super().__init__()
        self.modes, self.fail_at, self.calls = [], None, 0
        self.body = nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 1)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(normal(*p.shape, seed=i) / 4)

    def forward(self, x):
        self.calls += 1
        self.modes.append(self.training)
        if self.calls == self.fail_at:
            raise ArithmeticError("the energy fails")
        x = x.flatten(1)
        return self.head(self.body(x)) + x.square().sum(1, keepdim=True) / 2


# --- the same chains, however they are cut --------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_chains_are_the_same_chains_bit_for_bit(sampler, backend):
    energy, x0 = DoubleWellEnergy(2.0, dim=3), normal(101, 3)
    whole = sampler(energy, x0, 0.01, 15, seed=3, backend=backend)
    parts = [
        sampler(energy, part, 0.01, 15, seed=3, first_chain=first, backend=backend)
        for part, first in ((x0[:37], 0), (x0[37:], 37))
    ]
    assert torch.cat(parts).equal(whole)
    assert not sampler(energy, x0[37:], 0.01, 15, seed=3, backend=backend).equal(whole[37:])


@every_sampler
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_from_its_first_step_bit_for_bit(sampler, backend):
    energy, x0 = DoubleWellEnergy(2.0, dim=2), normal(20, 2)
    options = {"seed": 3, "backend": backend, "return_info": True}
    whole = sampler(energy, x0, 0.05, 12, **options)
    half = sampler(energy, x0, 0.05, 5, **options)
    if sampler is underdamped_langevin_sample:
        options["v0"] = half.info.velocity
    rest = sampler(energy, half.x, 0.05, 7, first_step=5, **options)
    assert rest.x.equal(whole.x)
    assert torch.cat([half.info.energy, rest.info.energy]).equal(whole.info.energy)


@every_sampler
def test_the_energy_may_be_asked_in_chunks(sampler):
    sizes, network = [], Network()

    def energy(x):
        sizes.append(len(x))
        return network(x)

    x0 = normal(10, 3)
    chunked = sampler(energy, x0, 0.1, 4, seed=1, chunk_size=4)
    assert set(sizes) == {4, 2}
    # Products of matrices of other sizes are rounded differently.
    torch.testing.assert_close(chunked, sampler(network, x0, 0.1, 4, seed=1), rtol=0, atol=1e-6)


@needs_numba
@every_sampler
@pytest.mark.parametrize(
    "energy",
    [GaussianMixtureEnergy.ring(), GaussianEnergy(torch.ones(2), torch.tensor([1.0, 3.0]))],
)
def test_numba_follows_the_paths_of_the_reference(sampler, energy):
    options = {"seed": 9, "return_trajectory": True, "return_info": True, "thin": 3}
    x0 = 3 * normal(257, 2)
    a, b, c = (
        sampler(energy, x0, 0.05, 12, backend=backend, **options)
        for backend in ("reference", "numba", "auto")
    )
    assert not a.x.equal(b.x)
    assert b.x.equal(c.x)
    torch.testing.assert_close(a.trajectory, b.trajectory, rtol=0, atol=1e-4)
    torch.testing.assert_close(a.info.energy, b.info.energy, rtol=0, atol=1e-3)
    torch.testing.assert_close(a.info.accept_rate, b.info.accept_rate)
    assert a.info.n_grad == b.info.n_grad == 13
    assert a.info.n_nonfinite == b.info.n_nonfinite == 0


@needs_numba
def test_numba_refuses_what_it_cannot_do_and_auto_does_it_by_the_reference():
    ring, x0 = GaussianMixtureEnergy.ring(), torch.zeros(3, 2)
    p = torch.ones(2)
    for sampler, energy, x, options in [
        (langevin_sample, quadratic, x0, {}),
        (langevin_sample, ring, x0.double(), {}),
        (langevin_sample, ring, x0, {"preconditioner": p}),
        (langevin_sample, ring, x0, {"bounds": (-1, 1)}),
        (langevin_sample, ring, x0, {"grad_clip": 1.0}),
        (langevin_sample, ring, x0, {"nonfinite": "reject"}),
        (langevin_sample, ring, x0, {"fixed": torch.tensor([True, False])}),
        (mala_sample, ring, x0, {"preconditioner": p}),
        (mala_sample, ring, x0, {"bounds": (-1, 1)}),
        (underdamped_langevin_sample, quadratic, x0, {}),
    ]:
        with pytest.raises(ValueError, match=r"backend='numba' needs .*'auto' or 'reference'"):
            sampler(energy, x, 0.1, 2, backend="numba", seed=0, **options)
        auto, reference = (
            sampler(energy, x, 0.1, 2, backend=backend, seed=0, **options)
            for backend in ("auto", "reference")
        )
        assert auto.equal(reference)


@every_sampler
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_frame_is_the_plain_return_and_thinning_keeps_every_kth(sampler, backend):
    ring, x0 = GaussianMixtureEnergy.ring(), normal(7, 2)
    options = {"seed": 4, "backend": backend}
    plain = sampler(ring, x0, 0.1, 12, **options)
    full = sampler(ring, x0, 0.1, 12, return_trajectory=True, return_info=True, **options)
    thin = sampler(ring, x0, 0.1, 12, thin=4, return_trajectory=True, return_info=True, **options)
    assert isinstance(full, SampleOutput)
    assert full.trajectory.shape == (12, 7, 2)
    assert full.trajectory[-1].equal(plain)
    assert full.x.equal(plain)
    assert thin.trajectory.equal(full.trajectory[3::4])
    assert thin.info.energy.equal(full.info.energy[3::4])
    # The loop in numba computes energies in its own order.
    torch.testing.assert_close(
        full.info.energy, torch.stack([ring(x) for x in full.trajectory]), rtol=0, atol=1e-4
    )
    assert full.to_arviz_dict()["x"].shape == (7, 12, 2)
    assert (full.to_arviz_dict()["x"][5, 3] == full.trajectory[3, 5].numpy()).all()
    only_info = sampler(ring, x0, 0.1, 12, return_info=True, **options)
    assert only_info.trajectory is None
    with pytest.raises(ValueError, match="return_trajectory=True"):
        only_info.to_arviz_dict()


@every_sampler
def test_the_rate_of_acceptance_counts_the_moves(sampler):
    x0 = normal(200, 3) / 2
    out = sampler(quartic, x0, 0.1, 10, seed=2, return_trajectory=True, return_info=True)
    states = torch.cat([x0[None], out.trajectory])
    moved = (states.diff(dim=0) != 0).any(-1).float().mean(0)
    torch.testing.assert_close(out.info.accept_rate, moved)
    assert (moved.min() < 1) == (sampler is mala_sample)
    assert out.info.step_size == 0.1


def test_the_gradient_is_counted_and_not_computed_where_nobody_needs_it():
    network, x0 = Network(), normal(4, 3)
    for options, calls in (({}, 6), ({"return_trajectory": True}, 6), ({"return_info": True}, 7)):
        network.calls = 0
        out = langevin_sample(network, x0, 0.1, 6, seed=0, **options)
        assert network.calls == calls
    assert out.info.n_grad == 7
    for sampler in (mala_sample, underdamped_langevin_sample):
        network.calls = 0
        assert sampler(network, x0, 0.1, 6, seed=0, return_info=True).info.n_grad == 7
        assert network.calls == 7


# --- randomness -----------------------------------------------------------------------------------


@every_sampler
def test_seeds_and_generators_decide_all_and_leave_the_global_one_alone(sampler):
    x0 = normal(5, 2)
    before = torch.get_rng_state()
    a, b = (sampler(quadratic, x0, 0.2, 5, generator=seeded(3)) for _ in range(2))
    c, d = (sampler(quadratic, x0, 0.2, 5, seed=s) for s in (3, 4))
    assert torch.get_rng_state().equal(before)
    assert a.equal(b)
    assert not c.equal(d)
    generator = seeded(3)
    first, second = (sampler(quadratic, x0, 0.2, 5, generator=generator) for _ in range(2))
    assert first.equal(a)
    assert not second.equal(a)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        e = sampler(quadratic, x0, 0.2, 5)
        torch.manual_seed(1)
        assert e.equal(sampler(quadratic, x0, 0.2, 5))
        assert not e.equal(sampler(quadratic, x0, 0.2, 5))
    with pytest.raises(ValueError, match="`seed` or `generator`, not both"):
        sampler(quadratic, x0, 0.2, 5, seed=1, generator=seeded())


@every_sampler
def test_chains_and_energy_may_be_moved_together(sampler):
    x0, shift = normal(50, 3, dtype=torch.float64), torch.tensor([2.0, -3.0, 0.5]).double()
    here = sampler(quartic, x0, 0.1, 20, seed=1)
    there = sampler(lambda x: quartic(x - shift), x0 + shift, 0.1, 20, seed=1)
    torch.testing.assert_close(there, here + shift, rtol=0, atol=1e-12)


# --- what is left as it was -----------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("fails", [False, True])
def test_networks_and_points_are_left_as_they_were(sampler, fails):
    network = Network(dropout=0.5).eval()
    network.head.train()
    network.body[0].weight.requires_grad_(False)
    network.head.weight.grad = torch.full_like(network.head.weight, 7.0)
    flags = [p.requires_grad for p in network.parameters()]
    modes = [m.training for m in network.modules()]
    x0 = normal(4, 3).requires_grad_()
    before = x0.detach().clone()
    seen = []
    network.head.register_forward_hook(lambda m, _, out: seen.append(m.weight.requires_grad))
    if fails:
        network.fail_at = 3
        with pytest.raises(ArithmeticError):
            sampler(network, x0, 0.1, 5, seed=0)
    else:
        x = sampler(network, x0, 0.1, 5, seed=0)
        assert not x.requires_grad
        assert x.data_ptr() != x0.data_ptr()
    assert flags == [p.requires_grad for p in network.parameters()] == [False, True, True, True]
    assert modes == [m.training for m in network.modules()]
    assert not any(network.modes)
    assert not any(seen)  # frozen while sampling
    assert x0.requires_grad
    assert x0.grad is None
    assert x0.equal(before)
    assert network.body[0].bias.grad is None
    assert (network.head.weight.grad == 7).all()


@every_sampler
@pytest.mark.parametrize("energy", [Network(), DoubleWellEnergy(1.0, dim=3)])
def test_it_runs_where_the_caller_has_switched_gradients_off(sampler, energy):
    x0 = normal(4, 3)
    x = sampler(energy, x0, 0.1, 5, seed=0)
    with torch.no_grad():
        assert sampler(energy, x0, 0.1, 5, seed=0).equal(x)
    with torch.inference_mode():
        inside = sampler(energy, x0.clone(), 0.1, 5, seed=0)
    assert inside.equal(x)


@every_sampler
def test_energies_of_torch_func_and_columns_are_energies_too(sampler):
    x0 = normal(6, 3)
    expected = sampler(quartic, x0, 0.1, 5, seed=0)
    mapped = torch.func.vmap(lambda x: (x**4 / 4 - x**2 / 2 + x / 4).sum())
    torch.testing.assert_close(sampler(mapped, x0, 0.1, 5, seed=0), expected)
    column = sampler(lambda x: quartic(x)[:, None], x0, 0.1, 5, seed=0)
    assert column.equal(expected)
    added = sampler(lambda x: quartic(x) / 2 + quartic(x) / 2, x0, 0.1, 5, seed=0)
    torch.testing.assert_close(added, expected)  # a product of experts


@every_sampler
def test_memory_may_have_gaps_and_stand_in_any_order(sampler):
    images = normal(2, 3, 4, 5)
    expected = sampler(quartic, images, 0.1, 4, seed=0)
    for x0 in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(1, 3).contiguous().transpose(1, 3),
        torch.stack([images, images], -1)[..., 0],
    ):
        assert sampler(quartic, x0, 0.1, 4, seed=0).equal(expected)
    one = normal(1, 2)
    ring = GaussianMixtureEnergy.ring()
    for energy in (quartic, ring):
        a = sampler(energy, one.expand(5, 2), 0.1, 4, seed=0)
        assert a.equal(sampler(energy, one.repeat(5, 1), 0.1, 4, seed=0))
        assert a.unique(dim=0).shape == (5, 2)
    assert one.equal(normal(1, 2))


# --- extremes -------------------------------------------------------------------------------------


@every_sampler
def test_no_steps_return_a_copy_and_no_chains_return_none(sampler):
    network, x0 = Network(), normal(4, 3)
    for energy in (network, DoubleWellEnergy(1.0, dim=3)):
        x = sampler(energy, x0, 0.1, 0, seed=0)
        assert x.equal(x0)
        assert x.data_ptr() != x0.data_ptr()
        for n_chains, n_steps in ((4, 0), (0, 6), (0, 0)):
            out = sampler(
                energy,
                x0[:n_chains],
                0.1,
                n_steps,
                thin=2,
                seed=0,
                return_trajectory=True,
                return_info=True,
            )
            assert out.x.shape == (n_chains, 3)
            assert out.trajectory.shape == (n_steps // 2, n_chains, 3)
            assert out.info.energy.shape == (n_steps // 2, n_chains)
            assert out.info.accept_rate.shape == (n_chains,)
            assert (out.info.n_grad, out.info.n_nonfinite) == (0, 0)
    assert network.calls == 0


@every_sampler
@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (3, 10_000), (1, 1, 28, 28)])
def test_one_coordinate_one_chain_and_ten_thousand_coordinates(sampler, shape):
    h = 0.2
    x0 = torch.zeros(shape)
    x = sampler(quadratic, x0, h, 100, seed=1)
    assert x.shape == shape
    if x.numel() >= 10_000:  # the coordinates of one chain are independent under Langevin
        variance = 1 / (1 - h / 2) if sampler is langevin_sample else 1.0
        error = 5 * variance * math.sqrt(2 / x.numel())
        if sampler is not mala_sample:
            assert x.square().mean().item() == pytest.approx(variance, abs=error)
        else:
            assert x.isfinite().all()


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_are_held_in_float32_inside(sampler, dtype, backend):
    # A drift of 1e-3 on numbers near 1 is below half a rounding step of both types.
    n, h = 10_000, 0.001 if sampler is not underdamped_langevin_sample else 0.03
    energy = GaussianEnergy(torch.zeros(1), torch.tensor([1.0]))
    x0 = torch.ones(n, 1, dtype=dtype)
    options = {"seed": 1, "backend": backend, "thin": 100, "return_trajectory": True}
    half = sampler(energy, x0, h, 200, return_info=True, **options)
    full = sampler(energy, x0.float(), h, 200, seed=1, backend=backend)
    assert half.x.dtype == half.trajectory.dtype == dtype
    assert half.trajectory[-1].equal(half.x)
    assert half.info.energy.dtype == torch.float32
    assert half.x.equal(full.to(dtype))
    if sampler is langevin_sample:
        shrink = (1 - h) ** 200
        variance = (1 - shrink**2) / (1 - h / 2)
        assert half.x.double().mean().item() == pytest.approx(
            shrink, abs=5 * math.sqrt(variance / n)
        )
        assert half.x.double().var().item() == pytest.approx(
            variance, abs=5 * variance * math.sqrt(2 / n)
        )


@every_sampler
def test_a_network_of_a_half_type_sees_its_own_type(sampler):
    seen = set()
    network = Network().bfloat16()
    network.register_forward_pre_hook(lambda m, args: seen.add(args[0].dtype))
    x = sampler(network, normal(4, 3).bfloat16(), 0.1, 5, seed=0, return_info=True)
    assert seen == {torch.bfloat16}
    assert x.x.dtype == torch.bfloat16
    assert x.info.energy.dtype == torch.float32
    assert sampler(Network(), normal(4, 3).double().float(), 0.1, 1).dtype == torch.float32


@every_sampler
def test_autocast_does_not_round_the_states(sampler):
    network, x0 = Network(), normal(50, 3)
    expected = sampler(network, x0, 0.1, 5, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        x = sampler(network, x0, 0.1, 5, seed=0)
    assert x.dtype == torch.float32
    # The gradient of the network is rounded to 8 bits; MALA may decide otherwise for a few.
    assert ((x - expected).abs().amax(1) < 0.02).float().mean() > 0.9
    assert not x.bfloat16().float().equal(x)


@pytest.mark.parametrize("sampler", [langevin_sample, mala_sample])
def test_a_matrix_is_not_rounded_by_autocast(sampler):
    x0, p = normal(50, 3), torch.eye(3) + 0.3
    expected = sampler(quartic, x0, 0.1, 5, seed=0, preconditioner=p)
    with torch.autocast("cpu", torch.bfloat16):
        assert sampler(quartic, x0, 0.1, 5, seed=0, preconditioner=p).equal(expected)


def test_a_step_above_stability_raises_or_is_counted():
    x0 = torch.ones(3, 1)
    for backend in ("reference", "auto"):
        for energy in (quadratic, GaussianEnergy(torch.zeros(1), torch.ones(1))):
            with pytest.raises(RuntimeError, match=r"not finite .* the step is too large"):
                langevin_sample(energy, x0, 5.0, 400, seed=0, backend=backend)
            out = langevin_sample(
                energy, x0, 5.0, 400, seed=0, backend=backend, nonfinite="ignore", return_info=True
            )
            assert not out.x.isfinite().any()
            assert out.info.n_nonfinite > 500
            with pytest.raises(RuntimeError, match="not finite"):
                underdamped_langevin_sample(energy, x0, 3.0, 400, seed=0, backend=backend)
    # It is noticed soon, not after all steps.
    network = Network()
    network.head.weight.data.fill_(nan)
    with pytest.raises(RuntimeError, match="where the chains start"):
        langevin_sample(network, normal(2, 3), 0.1, 10_000)
    calls = []

    def leaves(x):
        calls.append(1)
        return torch.where(x > 0.5, nan, x.square()).sum(1)

    with pytest.raises(RuntimeError, match="within 64 steps"):
        langevin_sample(leaves, torch.zeros(50, 1), 0.2, 10_000, seed=0)
    assert len(calls) == 65


def test_a_step_into_the_void_can_be_rejected():
    def right_half(x):
        return torch.where(x > 0, x * x / 2, nan).sum(1)

    x0 = torch.ones(500, 2)
    out = langevin_sample(
        right_half,
        x0,
        0.3,
        30,
        seed=0,
        nonfinite="reject",
        return_info=True,
        return_trajectory=True,
    )
    assert (out.trajectory > 0).all()
    moved = (torch.cat([x0[None], out.trajectory]).diff(dim=0) != 0).any(-1)
    torch.testing.assert_close(out.info.accept_rate, moved.float().mean(0))
    assert 0.3 < moved.float().mean() < 0.9
    assert out.info.n_nonfinite == (~moved).sum()
    assert out.info.energy.isfinite().all()
    with pytest.raises(RuntimeError, match="where the chains start"):
        langevin_sample(right_half, -x0, 0.3, 30, seed=0, nonfinite="reject")


# --- clip, box, mask ------------------------------------------------------------------------------


def test_a_clip_clamps_each_entry_of_the_gradient():
    x0 = torch.tensor([[3.0, 0.2], [-4.0, 0.0]])
    with pytest.warns(UserWarning, match="exp"):
        x = langevin_sample(quadratic, x0, 0.5, 1, 1e-30, grad_clip=1.0, seed=0)
    torch.testing.assert_close(x, torch.tensor([[2.5, 0.1], [-3.5, 0.0]]))


def test_a_clamp_puts_atoms_on_the_faces_and_a_reflection_does_not():
    n, h = 20_000, 0.02

    def flat(x):
        return (0 * x).sum(1)

    x0 = torch.rand(n, 2, generator=seeded())
    clamped, reflected = (
        langevin_sample(flat, x0, h, 40, bounds=(0, 1), reflect=reflect, seed=1)
        for reflect in (False, True)
    )
    exact = mala_sample(flat, x0, h, 40, bounds=(0.0, 1.0), seed=1)
    for x in (clamped, reflected, exact):
        assert ((x >= 0) & (x <= 1)).all()
    faces = ((clamped == 0) | (clamped == 1)).float().mean()
    assert faces > 0.1
    # The reflected step is symmetric, so the uniform law stays.
    for x in (reflected, exact):
        for values in x.double().numpy().T:
            assert stats.kstest(values, "uniform").pvalue > 1e-6
    # A jump over several widths is folded until it is inside.
    far = langevin_sample(flat, x0, 50.0, 3, bounds=(0, 1), reflect=True, seed=1)
    assert stats.kstest(far[:, 0].double().numpy(), "uniform").pvalue > 1e-6


def test_a_reflection_is_that_of_a_mirror():
    def pull(x):  # one step moves by exactly h
        return -x.sum(1)

    x0 = torch.tensor([[0.0], [0.9], [-1.0], [1.0]])
    for h, expected in [
        (0.25, [0.25, 0.85, -0.75, 0.75]),
        (2.0, [0.0, -0.9, 1.0, -1.0]),
        (5.0, [1.0, 0.1, 0.0, 0.0]),
    ]:
        with pytest.warns(UserWarning, match="exp"):
            x = langevin_sample(pull, x0, h, 1, h * 1e-12, bounds=(-1.0, 1.0), reflect=True, seed=0)
        assert x.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_mala_in_a_box_samples_the_truncated_law():
    x0 = torch.full((20_000, 1), 0.5)
    x = mala_sample(quadratic, x0, 0.2, 80, bounds=(0.2, 1.5), seed=3, return_info=True)
    law = stats.truncnorm(0.2, 1.5)
    assert stats.kstest(x.x[:, 0].double().numpy(), law.cdf).pvalue > 1e-6
    assert x.info.n_nonfinite == 0
    with pytest.raises(ValueError, match="`x0` must lie inside `bounds`"):
        mala_sample(quadratic, x0, 0.2, 5, bounds=(0.6, 1.0))


@pytest.mark.parametrize("matrix", [None, torch.tensor([[1.0, 0.4], [0.4, 0.8]])])
@pytest.mark.parametrize("sampler", [langevin_sample, mala_sample])
def test_what_is_fixed_stays_and_the_rest_has_the_conditional_law(sampler, matrix):
    n, h = 50_000, 0.4
    precision = torch.tensor([[2.0, 1.0], [1.0, 1.5]])
    energy = GaussianEnergy(torch.zeros(2), precision)
    x0 = torch.tensor([[0.7, 0.0]]).repeat(n, 1)
    mask = torch.tensor([True, False])
    x = sampler(energy, x0, h, 40, preconditioner=matrix, fixed=mask, seed=1)
    assert (x[:, 0] == x0[:, 0]).all()
    mean, variance = -0.7 / 1.5, 1 / 1.5  # of the second coordinate, given the first
    if sampler is langevin_sample:
        variance /= 1 - h * (1.0 if matrix is None else 0.8) * 1.5 / 2
    found = x[:, 1].double()
    assert found.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert found.var().item() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / n))
    # With another event than a vector.
    image = normal(3, 1, 2, 2)
    mask = torch.tensor([[[True, False], [False, True]]])
    y = sampler(quartic, image, 0.1, 5, fixed=mask, seed=1)
    assert ((y == image) == mask).all()


def test_a_box_does_not_move_what_is_fixed():
    x0 = torch.tensor([[2.0, 0.5]])
    mask = torch.tensor([True, False])
    x = langevin_sample(quadratic, x0, 0.1, 5, bounds=(0, 1), fixed=mask, seed=0)
    assert x[0, 0] == 2.0
    assert 0 <= x[0, 1] <= 1


# --- bad input ------------------------------------------------------------------------------------


@every_sampler
def test_bad_input_is_named_before_any_work(sampler, unchecked):
    network, x0 = Network(), normal(4, 3)

    def call(energy=network, x0=x0, step_size=0.1, n_steps=4, **options):
        return sampler(energy, x0, step_size, n_steps, **options)

    for error, message, options in [
        (TypeError, "`energy` must be callable", {"energy": 3.0}),
        (TypeError, "`x0` must be a tensor of floating", {"x0": torch.zeros(4, 3).long()}),
        (TypeError, "`x0` must be a tensor of floating", {"x0": np.zeros((4, 3))}),
        (ValueError, "`x0` must be points", {"x0": torch.zeros(4)}),
        (ValueError, "`x0` must be points", {"x0": torch.zeros(4, 0)}),
        (ValueError, "`step_size` must be finite and above 0", {"step_size": 0}),
        (ValueError, "`step_size` must be finite and above 0", {"step_size": -0.1}),
        (ValueError, "`step_size` must be finite and above 0", {"step_size": nan}),
        (ValueError, "`step_size` must be finite", {"step_size": torch.tensor([1, 1, 0, 1.0])}),
        (ValueError, r"one per chain, shape \(4,\); got \(3,\)", {"step_size": torch.ones(3)}),
        (ValueError, "`temperature` must be finite and above 0", {"temperature": 0.0}),
        (ValueError, r"`temperature` .* shape \(4,\)", {"temperature": torch.ones(4, 1)}),
        (ValueError, "`n_steps` must be at least 0; got -1", {"n_steps": -1}),
        (TypeError, "`n_steps` must be a whole number", {"n_steps": 2.0}),
        (ValueError, "`thin` must be at least 1", {"thin": 0}),
        (ValueError, "`thin` must divide `n_steps`; got thin=3, n_steps=4", {"thin": 3}),
        (ValueError, "`seed` must be at least 0", {"seed": -1}),
        (ValueError, "`first_chain` must be at least 0", {"first_chain": -1}),
        (ValueError, "`first_step` must be at least 0", {"first_step": -1}),
        (ValueError, "`chunk_size` must be at least 1", {"chunk_size": 0}),
        (ValueError, "`backend` must be auto, reference or numba", {"backend": "triton"}),
    ]:
        with pytest.raises(error, match=message):
            call(**options)
    assert network.calls == 0
    with pytest.raises(ValueError, match=r"one value per point, shape \(4,\)"):
        call(energy=lambda x: x)
    broken = DoubleWellEnergy(1.0, dim=3)
    broken.grad = lambda x: x[:, :1]
    with pytest.raises(ValueError, match=r"`energy\.grad` must return gradients of the shape"):
        call(energy=broken, x0=x0.double())


def test_bad_input_of_one_sampler_is_named_too(unchecked):
    x0 = normal(4, 3)
    skew = torch.eye(3) + torch.tensor([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]])
    for sampler in (langevin_sample, mala_sample):
        for message, p in [
            (r"shape \(3,\) or \(3, 3\) for points", torch.eye(2)),
            ("symmetric and positive definite", -torch.eye(3)),
            ("symmetric and positive definite", torch.tensor([1.0, 0.0, 1.0])),
            ("symmetric and positive definite", torch.tensor([1.0, inf, 1.0])),
            ("symmetric and positive definite", torch.full((3, 3), nan)),
            ("symmetric and positive definite", skew),
        ]:
            with pytest.raises(ValueError, match=message):
                sampler(quadratic, x0, 0.1, 2, preconditioner=p)
        with pytest.raises(ValueError, match=r"boolean mask .* \(3,\); got torch.float32"):
            sampler(quadratic, x0, 0.1, 2, fixed=torch.ones(3))
        with pytest.raises(ValueError, match=r"boolean mask .* got torch.bool of shape \(4, 3\)"):
            sampler(quadratic, x0, 0.1, 2, fixed=torch.ones(4, 3, dtype=torch.bool))
        for bounds in ((1, 0), (0, inf), (nan, 1), (0, 1, 2)):
            with pytest.raises(ValueError, match="`bounds` must be finite numbers"):
                sampler(quadratic, x0, 0.1, 2, bounds=bounds)
    for message, options in [
        ("`noise_scale` or `temperature`, not both", {"noise_scale": 0.4, "temperature": 2.0}),
        ("`noise_scale` or", {"noise_scale": 0.4, "temperature": torch.ones(4)}),
        ("`noise_scale` must be finite and at least 0", {"noise_scale": -1.0}),
        ("`grad_clip` must be finite and above 0", {"grad_clip": 0.0}),
        ("`reflect` needs `bounds`", {"reflect": True}),
        ("`nonfinite` must be raise, reject or ignore; got 'drop'", {"nonfinite": "drop"}),
    ]:
        with pytest.raises(ValueError, match=message):
            langevin_sample(quadratic, x0, 0.1, 2, **options)
    for options in ({"target_accept": 0.6}, {"target_accept": 1.0, "n_adapt": 5}):
        with pytest.raises(ValueError, match="`target_accept` must be inside"):
            mala_sample(quadratic, x0, 0.1, 2, **options)
    with pytest.raises(ValueError, match="`n_adapt` must be at least 0"):
        mala_sample(quadratic, x0, 0.1, 2, n_adapt=-1)
    for message, options in [
        ("`friction` must be finite and at least 0", {"friction": -1.0}),
        (r"`v0` must have the shape of `x0` \(4, 3\); got \(3,\)", {"v0": torch.zeros(3)}),
        ("`nonfinite` must be raise or ignore", {"nonfinite": "reject"}),
    ]:
        with pytest.raises(ValueError, match=message):
            underdamped_langevin_sample(quadratic, x0, 0.1, 2, **options)
    for options in ((0.0, 1.0), (1.0, -1.0), (nan, 1.0)):
        with pytest.raises(ValueError, match="must be finite and"):
            effective_temperature(*options)


# --- steps ----------------------------------------------------------------------------------------


def test_a_sampler_is_its_step_repeated():
    from cln_tutorial.energy_models.philox import counter_normal

    energy, x0, h = DoubleWellEnergy(1.0, dim=3), normal(10, 3), 0.1
    x = x0
    for step in range(4):
        noise = counter_normal(5, step, (10, 3))
        x = langevin_step(x, energy.grad(x), noise, h, math.sqrt(2 * h))
    assert langevin_sample(energy, x0, h, 4, seed=5, backend="reference").equal(x)
    x, v = x0, counter_normal(5, 0, (10, 3), stream=2)
    g = energy.grad(x)
    for step in range(4):
        x, v, g = baoab_step(energy, x, v, g, counter_normal(5, step, (10, 3)), h, 2.0)
    found = underdamped_langevin_sample(energy, x0, h, 4, 2.0, seed=5, backend="reference")
    assert found.equal(x)


def test_a_preconditioner_is_its_matrix_and_a_root_of_it():
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    x = normal(7, 2)
    for p, full in (
        (matrix, matrix),
        (torch.tensor([2.0, 3.0]), torch.diag(torch.tensor([2.0, 3.0]))),
    ):
        made = Preconditioner.of(p)
        torch.testing.assert_close(made.drift(x), x @ full)
        square = made.noise(torch.eye(2))
        torch.testing.assert_close(square.mT @ square, full)


COMPILED = """
import torch
from cln_tutorial.energy_models.steps import langevin_step
net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
def step(x, noise):
    return langevin_step(x, torch.func.grad(lambda x: net(x).sum())(x), noise, 0.1, 0.4)
x, noise = torch.randn(5, 3), torch.randn(5, 3)
x.requires_grad_(False)
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x, noise), step(x, noise))
point = x.clone().requires_grad_()
(gradient,) = torch.autograd.grad(net(point).sum(), point)
torch.testing.assert_close(compiled(x, noise), x - 0.1 * gradient + 0.4 * noise)
print("done")
"""


def test_a_step_of_a_network_compiles_as_one_graph(child_output):
    assert child_output(COMPILED).endswith("done\n")
