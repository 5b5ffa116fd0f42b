"""What every sampler, energy and loss of the chapter promises, whoever of them is called."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from cln_tutorial import energy_models as em

inf, nan = math.inf, math.nan


def annealed(energy, x, step_size, n_steps, **keywords):
    levels = em.AnnealedLangevin(
        temperatures=[2.0, 1.0],
        steps_per_level=n_steps,
        step_size=step_size,
        step_rule="fixed",
        denoise=False,
    )
    return levels.sample(energy, x, **keywords)


SAMPLERS = {
    "langevin": em.langevin_sample,
    "mala": em.mala_sample,
    "underdamped": em.underdamped_langevin_sample,
    "annealed": annealed,
}
ENERGIES = {
    "gaussian": lambda: em.GaussianEnergy(torch.tensor([1.0, -1.0]), 2.0),
    "ring": lambda: em.GaussianMixtureEnergy.ring(),
    "double well": lambda: em.DoubleWellEnergy(3.0, dim=2),
}


def over(functions):
    return pytest.mark.parametrize("each", functions.values(), ids=functions.keys())


def normals(*shape, seed=6612):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1))


def quadratic(x):
    return x.square().flatten(1).sum(-1) / 2


@over(SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("energy", [quadratic, em.GaussianEnergy(torch.zeros(2), 1.0)])
def test_points_keep_dtype_and_shape_have_no_graph_and_the_start_stays(each, dtype, energy):
    x = normals(5, 2).to(dtype).requires_grad_()
    before = x.detach().clone()
    y = each(energy, x, 0.1, 4, seed=1)
    assert (y.dtype, y.shape, y.requires_grad) == (dtype, x.shape, False)
    assert y.isfinite().all()
    assert not y.equal(before)
    assert x.detach().equal(before)
    assert x.grad is None


@over({k: v for k, v in SAMPLERS.items() if k != "annealed"})  # whose levels have steps
def test_no_steps_give_a_copy_and_no_chains_give_none(each):
    x = normals(3, 2)
    y = each(quadratic, x, 0.1, 0, seed=1)
    assert y.equal(x)
    assert y.data_ptr() != x.data_ptr()
    assert each(quadratic, x[:0], 0.1, 3, seed=1).shape == (0, 2)


@over(SAMPLERS)
def test_a_seed_repeats_the_chains_and_leaves_the_global_generator_alone(each):
    x = normals(4, 2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (each(quadratic, x, 0.1, 5, seed=s) for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    by_generator = [
        each(quadratic, x, 0.1, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert by_generator[0].equal(by_generator[1])
    assert torch.get_rng_state().equal(state)
    unseeded = [each(quadratic, x, 0.1, 5) for _ in range(2)]
    assert not unseeded[0].equal(unseeded[1])


@over(SAMPLERS)
def test_a_seed_and_a_generator_at_once_are_refused(each):
    with pytest.raises(ValueError, match="`seed` or `generator`, not both"):
        each(quadratic, normals(2, 2), 0.1, 1, seed=1, generator=torch.Generator())


@over(SAMPLERS)
def test_a_network_is_left_as_it_was_found(each):
    net = network().train()
    net[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    each(net, normals(4, 2), 0.01, 3, seed=1)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert net.training


@over(SAMPLERS)
def test_a_network_is_left_as_it_was_found_after_an_error_too(each):
    net = network()
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == 1:
            raise ZeroDivisionError

    net.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        each(net, normals(4, 2), 0.01, 5, seed=1)
    assert all(p.requires_grad for p in net.parameters())


@over(SAMPLERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same(each, mode):
    net = network().eval()
    x = normals(4, 2)
    expected = each(net, x, 0.01, 3, seed=1)
    with mode():
        assert each(net, x.clone(), 0.01, 3, seed=1).equal(expected)


@over(SAMPLERS)
@pytest.mark.usefixtures("unchecked")
def test_bad_points_energies_steps_and_counts_are_refused_by_name(each):
    x = normals(3, 2)
    with pytest.raises(TypeError, match=r"floating numbers; got torch\.int64"):
        each(quadratic, torch.ones(3, 2, dtype=torch.int64), 0.1, 1, seed=1)
    with pytest.raises(ValueError, match=r"points \(n, \*event\).*got shape \(3,\)"):
        each(quadratic, torch.ones(3), 0.1, 1, seed=1)
    with pytest.raises(ValueError, match=r"at least one coordinate; got shape \(3, 0\)"):
        each(quadratic, torch.ones(3, 0), 0.1, 1, seed=1)
    with pytest.raises(TypeError, match=r"`energy` must be callable.*got int"):
        each(3, x, 0.1, 1, seed=1)
    for wrong in (lambda x: x, lambda x: x.sum()):
        with pytest.raises(ValueError, match="must return one value per point"):
            each(wrong, x, 0.1, 1, seed=1)
    for step in (0.0, -0.1, nan, inf):
        with pytest.raises(ValueError, match="`step_size` must be finite and above 0; got"):
            each(quadratic, x, step, 1, seed=1)
    for count, error in [(-1, ValueError), (1.5, TypeError)]:
        with pytest.raises(error, match=r"`\w*steps\w*` must be"):
            each(quadratic, x, 0.1, count, seed=1)


@over({k: v for k, v in SAMPLERS.items() if k != "mala"})
def test_a_gradient_of_nan_stops_the_chains(each):
    with pytest.raises(RuntimeError, match="finite"):
        each(lambda x: quadratic(x) * nan, normals(3, 2), 0.1, 2, seed=1)


@over(ENERGIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_energy_has_one_value_per_point_in_its_dtype_and_the_gradient_of_autograd(each, dtype):
    energy = each()
    x = normals(6, 2).to(dtype)
    values, gradient = energy(x), energy.grad(x)
    assert (values.shape, values.dtype, gradient.shape) == ((6,), dtype, x.shape)
    assert gradient.dtype == dtype
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(energy.double()(wide).sum(), wide)
    # Half types are rounded once; terms of the ring's gradient are up to 4 / 0.25, and cancel.
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(gradient.double(), expected, **close)
    torch.testing.assert_close(values.double(), energy(wide).detach(), **close)


@over(ENERGIES)
def test_exact_samples_have_the_density_that_log_z_normalises(each):
    # The mean of q / exp(-E) over p is the ratio of their constants, for a narrow normal q in the
    # deepest place, where p is wider.
    energy = each().double()
    x = energy.sample(100_000, generator=torch.Generator().manual_seed(1)).double()
    values, spread = energy(x), 0.2
    q = -((x - x[values.argmin()]) / spread).square().sum(-1) / 2
    weights = (q + values).exp()
    wanted = math.log(2 * math.pi * spread**2) - float(energy.log_z())
    error = weights.std() / math.sqrt(len(x)) / weights.mean()
    assert error < 0.02
    assert abs(float(weights.mean().log()) - wanted) < 5 * error


@over(ENERGIES)
def test_mala_leaves_exact_samples_where_they_are(each):
    energy = each()
    n = 20_000
    x = energy.sample(n, generator=torch.Generator().manual_seed(2))
    y = em.mala_sample(energy, x, 0.05, 50, seed=3)
    for moment in (lambda x: x[:, 0].square(), lambda x: x.norm(dim=-1)):
        a, b = moment(x), moment(y)
        assert abs(a.mean() - b.mean()) < 5 * math.sqrt((a.var() + b.var()) / n)


LOSSES = {
    "contrastive divergence": lambda e, x: em.contrastive_divergence_loss(e, x, x + 1),
    "denoising": partial(em.denoising_score_matching_loss, sigma=0.1),
    "gradient penalty": em.gradient_penalty,
}


@over(LOSSES)
def test_a_loss_has_a_gradient_for_every_parameter_and_none_for_the_points(each):
    net = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1, bias=False))
    x = normals(5, 2).requires_grad_()
    loss = each(net, x)
    assert loss.shape == ()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    assert all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in gradients)


@over(LOSSES)
@pytest.mark.usefixtures("unchecked")
def test_a_loss_refuses_integers_and_energies_of_another_shape(each):
    with pytest.raises(TypeError, match="floating numbers"):
        each(quadratic, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one value per point"):
        each(lambda x: x, normals(3, 2))


def test_chains_that_leave_the_numbers_in_their_very_last_step_raise_too():
    # Energy and gradient fit into float32 where the chain starts, two gradients do not.
    with pytest.raises(em.DivergenceError, match="not finite"):
        em.langevin_sample(lambda x: 3e38 * x.sum(-1), torch.ones(1, 1), 2.0, 1, seed=0)


def test_an_annealed_network_is_frozen_at_every_level_and_in_the_last_step():
    net = network().eval()
    seen = []

    def energy(x, sigma):
        seen.append([p.requires_grad for p in net.parameters()])
        return net(x)

    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, sigma):
            return energy(x, sigma)

    ladder = em.AnnealedLangevin([1.0, 0.5], steps_per_level=2, step_size=0.01)
    ladder.sample(Levels(), normals(3, 2), seed=0)
    assert seen
    assert not any(flag for flags in seen for flag in flags)
    assert all(p.requires_grad for p in net.parameters())


def test_an_error_of_another_kind_does_not_put_the_average_into_a_model_that_trains():
    model = em.EnergyModel.from_net(network(), mean=torch.zeros(2))

    def sampler(model, x, seed):
        raise RuntimeError("out of memory")

    trainer = em.EnergyTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        objective="cd",
        sampler=sampler,
        batch_size=4,
        seed=0,
    )
    with torch.no_grad():
        model.net[0].weight.add_(1.0)  # the average is where the model was
    before = model.net[0].weight.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(normals(8, 2), max_steps=1, progress=False)
    assert model.net[0].weight.equal(before)


def test_arviz_gets_the_digits_of_float64():
    x = normals(3, 2).double()
    out = em.langevin_sample(quadratic, x, 0.1, 4, seed=1, return_trajectory=True)
    found = out.to_arviz_dict()["x"]
    assert found.shape == (3, 4, 2)
    assert (found == out.trajectory.transpose(0, 1).numpy()).all()
