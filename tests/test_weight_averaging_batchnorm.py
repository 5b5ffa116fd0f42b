"""BatchNorm statistics: closed forms, the concatenated data, and what `update_bn` makes of them."""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn

from cln_tutorial.weight_averaging.batchnorm import recompute_batchnorm_


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def numbers(model):
    """Everything of a model's norms that may change."""
    return [
        [b.clone() for b in (n.running_mean, n.running_var, n.num_batches_tracked)]
        for n in norms(model)
    ]


def same_bits(one, other):
    pairs = [pair for x, y in zip(one, other, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def received(model, layer, data):
    """What a layer receives in the finished model, in eval mode, from all data at once."""
    kept = []
    handle = layer.register_forward_pre_hook(lambda layer, args: kept.append(args[0].double()))
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        model.eval()(data)
    for module, mode in modes:
        module.training = mode
    handle.remove()
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in kept], dim=1)
    return values.mean(1), values.var(1)


def error(model, layer, data):
    """Largest distance from the statistics of the concatenated data, in standard deviations."""
    mean, variance = received(model, layer, data)
    off_mean = (layer.running_mean.double() - mean).abs() / variance.sqrt()
    off_variance = (layer.running_var.double() / variance - 1).abs()
    return max(off_mean.max().item(), off_variance.max().item())


class Residual(nn.Module):
    """Three norms, listed in another order than they are called in, and a dropout."""

    def __init__(self):
        super().__init__()
        self.last = nn.BatchNorm2d(4)
        self.middle = nn.BatchNorm2d(4)
        self.first = nn.BatchNorm2d(3)
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.dropout(self.middle(self.one(self.first(x))).relu())
        return self.last(self.two(x) + x)


def images(n=50):
    return 3 + 2 * torch.randn(n, 3, 6, 6) * torch.tensor([1.0, 0.1, 10.0]).view(3, 1, 1)


# --- the numbers ----------------------------------------------------------------------------------


def test_mean_and_unbiased_variance_of_five_numbers_in_uneven_batches():
    # 0, 2, 4, 6, 8: mean 4, squared deviations 16 + 4 + 0 + 4 + 16 = 40, over n - 1 = 4.
    model = nn.Sequential(nn.BatchNorm1d(1))
    batches = [torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[6.0], [8.0]])]
    assert recompute_batchnorm_(model, batches) is model
    assert model[0].running_mean.item() == 4
    assert model[0].running_var.item() == 10
    assert model[0].num_batches_tracked.item() == 2


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6), layerwise=st.booleans())
def test_the_first_layer_is_one_pass_over_the_concatenated_data(sizes, layerwise):
    data = 100 + torch.randn(sum(sizes), 3, 4, generator=torch.Generator().manual_seed(sum(sizes)))
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    recompute_batchnorm_(model, list(data.split(sizes)), layerwise=layerwise)
    # Computed in float64 and rounded once to float32: half of 2^-23, relative. A mean of 100 is
    # then known to 100 * 2^-24 = 6e-6 of these standard deviations of about one.
    mean, variance = data.double().mean((0, 2)), data.double().var((0, 2))
    assert torch.allclose(model[0].running_mean.double(), mean, rtol=1e-7, atol=0)
    assert torch.allclose(model[0].running_var.double(), variance, rtol=1e-6, atol=0)
    assert model[0].num_batches_tracked == len(sizes)


def test_a_mean_of_a_million_deviations_does_not_lose_the_variance():
    # E[x^2] - E[x]^2 in float32 would be off by 1e12 * 2^-24 = 6e4; the variance is 1.
    data = 1e6 + torch.arange(994.0).view(-1, 1) % 4
    model = recompute_batchnorm_(nn.Sequential(nn.BatchNorm1d(1)), data.split(7))
    assert torch.allclose(model[0].running_var.double(), data.double().var(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (12, 5)),
        (nn.BatchNorm1d, (12, 5, 7)),
        (nn.BatchNorm2d, (12, 5, 3, 2)),
        (nn.BatchNorm3d, (12, 5, 3, 2, 4)),
        (nn.SyncBatchNorm, (12, 5, 3, 2)),
    ],
)
@pytest.mark.parametrize("layerwise", [False, True])
def test_every_kind_of_batchnorm(layer, shape, layerwise):
    data = torch.randn(shape) * 2 + 1
    model = nn.Sequential(layer(5))
    recompute_batchnorm_(model, data.split(5), layerwise=layerwise)
    assert error(model, model[0], data) < 1e-6


def test_channels_last_and_strided_inputs():
    data = images().to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    recompute_batchnorm_(model, [data[::2, :, 1:], data[1::2, :, 1:]])
    assert error(model, model[0], data[:, :, 1:]) < 1e-6


def test_layerwise_makes_every_layer_exact_and_one_pass_only_the_first():
    data = images()
    batches = data.split(7)
    model = Residual()
    recompute_batchnorm_(model, batches)
    single = [error(model, layer, data) for layer in (model.first, model.middle, model.last)]
    recompute_batchnorm_(model, batches, layerwise=True)
    exact = [error(model, layer, data) for layer in (model.first, model.middle, model.last)]
    assert single[0] < 1e-6
    # Batches of 7 * 36 values, of a network whose middle layer sees another scale in each.
    assert min(single[1:]) > 1e-4
    # Float32 through two convolutions, in batches of another size: 100 roundings of 2^-24.
    assert max(exact) < 6e-6


def test_layerwise_stops_behind_the_layer_of_interest():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(self.name)
            return super().forward(x)

    model = nn.Sequential(
        Counted(2, 2), nn.BatchNorm1d(2), Counted(2, 2), nn.BatchNorm1d(2), Counted(2, 2)
    )
    for place in (0, 2, 4):
        model[place].name = place
    recompute_batchnorm_(model, torch.randn(12, 2).split(4), layerwise=True)
    # A look at the first batch passes all; then 3 batches up to each of the norms.
    assert [calls.count(place) for place in (0, 2, 4)] == [1 + 3 + 3, 1 + 3, 1]


def test_a_layer_called_twice_pools_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(x) + self.norm(10 * x)

    for layerwise in (False, True):
        model, data = Twice(), torch.arange(6.0).view(-1, 1)
        recompute_batchnorm_(model, data.split(2), layerwise=layerwise)
        both = torch.cat([data, 10 * data])
        assert torch.allclose(model.norm.running_mean, both.mean(0))
        assert torch.allclose(model.norm.running_var, both.var(0))
        assert model.norm.num_batches_tracked == 6


def test_a_shared_layer_in_a_layerwise_pass_sees_no_old_statistics():
    class Sandwich(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer, self.inner = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x):
            return self.outer(self.inner(self.outer(x)))

    batches, found = torch.randn(12, 1).split(4), []
    for old in (0.0, 1000.0):
        model = Sandwich()
        for norm in norms(model):
            norm.running_mean += old
        found.append(numbers(recompute_batchnorm_(model, batches, layerwise=True)))
    assert same_bits(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layerwise", [False, True])
def test_models_of_16_bits_round_the_statistics_only_once(dtype, layerwise):
    data = (5 + torch.randn(4096, 3)).to(dtype)
    model = nn.Sequential(nn.BatchNorm1d(3)).to(dtype)
    recompute_batchnorm_(model, data.split(100), layerwise=layerwise)
    assert torch.equal(model[0].running_mean, data.double().mean(0).to(dtype))
    assert torch.equal(model[0].running_var, data.double().var(0).to(dtype))


def test_a_float64_model_is_exact_to_float64():
    data = torch.randn(63, 3, dtype=torch.float64) + 1e3
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    recompute_batchnorm_(model, data.split(7))
    # Nine merges that round to 2^-53; the variance feels those of the mean 1e3 times as much.
    assert torch.allclose(model[0].running_mean, data.mean(0), rtol=1e-15, atol=0)
    assert torch.allclose(model[0].running_var, data.var(0), rtol=1e-11, atol=0)


# --- against torch's update_bn --------------------------------------------------------------------


def test_equal_batches_without_dropout_give_the_mean_of_update_bn():
    data = images(48)
    ours = Residual()
    ours.dropout.p = 0.0
    theirs = copy.deepcopy(ours)
    recompute_batchnorm_(ours, data.split(8))
    update_bn(data.split(8), theirs)
    for mine, other in zip(norms(ours), norms(theirs), strict=True):
        # update_bn adds up six means in float32: six roundings of values of at most 16.
        assert torch.allclose(mine.running_mean, other.running_mean, rtol=1e-5, atol=1e-5)


def test_update_bn_weights_batches_and_ours_weights_samples():
    # Nine batches of 110 zeros, and a last one of ten ones: one batch in ten, a sample in hundred.
    data = torch.zeros(1000, 1)
    data[990:] = 1.0
    batches = data.split(110)
    assert [len(b) for b in batches] == [110] * 9 + [10]
    ours = recompute_batchnorm_(nn.Sequential(nn.BatchNorm1d(1)), batches)[0]
    theirs = nn.Sequential(nn.BatchNorm1d(1))
    update_bn(batches, theirs)
    assert ours.running_mean.item() == pytest.approx(10 / 1000, rel=1e-6)
    assert theirs[0].running_mean.item() == pytest.approx(1 / 10, rel=1e-6)


def test_update_bn_misses_the_variance_between_batches():
    # Two classes, one after the other: 0 and 1. Each batch is constant, so its own variance is 0.
    data = torch.cat([torch.zeros(50, 1), torch.ones(50, 1)])
    ours = recompute_batchnorm_(nn.Sequential(nn.BatchNorm1d(1)), data.split(10))[0]
    theirs = nn.Sequential(nn.BatchNorm1d(1))
    update_bn(data.split(10), theirs)
    assert ours.running_var.item() == pytest.approx(25 / 99, rel=1e-6)
    assert theirs[0].running_var.item() == 0


def test_update_bn_leaves_dropout_on_and_ours_does_not():
    # x = +-1: E[x^2] = 1. Dropout at 1/2 doubles it: E[(2 x mask)^2] = 2.
    data = torch.ones(4000, 1)
    data[::2] = -1
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
    recompute_batchnorm_(model, data.split(1000))
    assert model[1].running_var.item() == pytest.approx(4000 / 3999, rel=1e-6)
    update_bn(data.split(1000), model)
    # The number of survivors of 4,000 has a deviation of 32, so the variance one of 0.032; a
    # deviation of ten of these is never seen.
    assert model[1].running_var.item() == pytest.approx(2, abs=0.32)


@pytest.mark.parametrize("layerwise", [False, True])
def test_update_bn_recomputes_frozen_layers_and_ours_leaves_them_alone(layerwise):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[0].eval()
    frozen = numbers(model)[0]
    data = 5 + torch.randn(100, 2)
    recompute_batchnorm_(model, data.split(10), layerwise=layerwise)
    assert same_bits([frozen], numbers(model)[:1])
    assert not model[0].training
    assert error(model, model[1], data) < 1e-6  # its input is x / sqrt(1 + eps): no batch in it
    update_bn(data.split(10), model)
    assert model[0].running_mean.min() > 4


# --- what is recomputed, and what is left as it was -----------------------------------------------


@pytest.mark.parametrize("layerwise", [False, True])
def test_in_a_model_in_eval_mode_every_layer_is_recomputed(layerwise):
    model, data = Residual().eval(), images()
    before = numbers(model)
    recompute_batchnorm_(model, data.split(9), layerwise=layerwise)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(before, numbers(model), strict=True))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_layer_without_running_statistics_is_left_alone(training, layerwise):
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    model.train(training)
    recompute_batchnorm_(model, torch.randn(20, 2).split(10), layerwise=layerwise)
    assert model[0].running_mean is None
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("layerwise", [False, True])
def test_modes_momenta_hooks_gradients_and_random_state_stay(layerwise):
    model = Residual()
    model.train()
    model.two.eval()
    model.first.momentum, model.last.momentum = None, 0.3
    modes = [m.training for m in model.modules()]
    model.one.weight.grad = torch.ones_like(model.one.weight)
    state = torch.get_rng_state()
    data = images().requires_grad_()
    torch.set_rng_state(state)
    recompute_batchnorm_(model, data.split(10), layerwise=layerwise)
    assert [m.training for m in model.modules()] == modes
    assert (model.first.momentum, model.middle.momentum, model.last.momentum) == (None, 0.1, 0.3)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model.one.weight.grad, torch.ones_like(model.one.weight))
    assert data.grad is None
    assert not any(b.requires_grad for b in model.buffers())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("error_type", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_everything_is_as_before(layerwise, error_type):
    model = Residual()
    model.middle.eval()
    recompute_batchnorm_(model, images().split(10))
    before, modes = numbers(model), [m.training for m in model.modules()]
    passes = []

    def broken():
        passes.append(None)
        for count, batch in enumerate(images().split(10)):
            if count == 3 and len(passes) == (2 if layerwise else 1):
                raise error_type("no more")
            yield batch

    class Loader:
        def __iter__(self):
            return broken()

    with pytest.raises(error_type, match="no more"):
        recompute_batchnorm_(model, Loader(), layerwise=layerwise)
    assert same_bits(numbers(model), before)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_is_never_called_is_named_and_left_alone():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.used(x)

    for layerwise in (False, True):
        model = Auxiliary()
        with pytest.warns(UserWarning, match=r"left alone: unused\."):
            recompute_batchnorm_(model, [torch.randn(4, 2)], layerwise=layerwise)
        assert model.unused.num_batches_tracked == 0
        assert model.used.num_batches_tracked == 1


def test_a_model_without_batchnorm_comes_back_and_no_data_are_read():
    def never():
        raise AssertionError("was read")
        yield

    model = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2, track_running_stats=True))
    assert recompute_batchnorm_(model, never()) is model


# --- batches and wrappers -------------------------------------------------------------------------


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, pixels, scale=1.0):
        return self.norm(input=pixels * scale)


@pytest.mark.parametrize("layerwise", [False, True])
def test_batches_as_tensors_tuples_lists_mappings_and_by_a_function(layerwise):
    data = torch.randn(10, 2)
    expected = data.double().mean(0).float()
    kinds = {
        "tensor": (lambda x: x, None),
        "tuple": (lambda x: (x, 7), None),
        "list": (lambda x: [x, "label"], None),
        "mapping": (lambda x: {"pixels": x / 2, "scale": 2.0}, None),
        "forward": (lambda x: (7, x), lambda model, batch: model(batch[1])),
    }
    for wrap, forward in kinds.values():
        model = Keyword()
        batches = [wrap(x) for x in data.split(5)]
        recompute_batchnorm_(model, batches, forward=forward, layerwise=layerwise)
        assert torch.equal(model.norm.running_mean, expected)


def test_a_generator_is_good_for_one_pass_and_for_a_single_layer():
    data = images()
    model = recompute_batchnorm_(Residual(), (batch for batch in data.split(9)))
    assert error(model, model.first, data) < 1e-6
    model = nn.Sequential(nn.BatchNorm2d(3))
    recompute_batchnorm_(model, iter(data.split(9)), layerwise=True)
    assert error(model, model[0], data) < 1e-6


@pytest.mark.parametrize("layerwise", [False, True])
def test_max_batches_reads_no_batch_more(layerwise):
    read = []

    class Loader:
        def __iter__(self):
            for batch in torch.arange(40.0).view(-1, 1).split(10):
                read.append(batch)
                yield batch

    model = recompute_batchnorm_(
        nn.Sequential(nn.BatchNorm1d(1)), Loader(), max_batches=2, layerwise=layerwise
    )
    assert model[0].running_mean.item() == 9.5
    assert model[0].num_batches_tracked.item() == len(read) == 2


@pytest.mark.parametrize("layerwise", [False, True])
def test_compiled_and_wrapped_models_and_compiled_parts(layerwise):
    compiled = functools.partial(torch.compile, backend="eager")
    data = images()
    for wrap in (compiled, nn.DataParallel, lambda plain: nn.Sequential(compiled(plain))):
        plain = Residual()
        expected = copy.deepcopy(plain)
        recompute_batchnorm_(expected, data.split(10), layerwise=layerwise)
        model = wrap(plain)
        model(data[:10])  # compiled before the hooks are there
        assert recompute_batchnorm_(model, data.split(10), layerwise=layerwise) is model
        assert same_bits(numbers(plain), numbers(expected))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layerwise", [False, True])
def test_an_empty_loader(layerwise):
    with pytest.raises(ValueError, match="`loader` has no batch"):
        recompute_batchnorm_(nn.Sequential(nn.BatchNorm1d(2)), [], layerwise=layerwise)


def test_layerwise_with_a_generator_says_what_to_give():
    with pytest.raises(ValueError, match=r"once for each of 3 layers.*a list or a DataLoader"):
        recompute_batchnorm_(Residual(), iter(images().split(10)), layerwise=True)


def test_a_batch_of_one_value_per_channel_is_named_or_counted_layerwise():
    data = torch.arange(7.0).view(-1, 1)
    model = nn.Sequential(nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match=r"single value per channel at 0.*`layerwise=True`"):
        recompute_batchnorm_(model, data.split(3))
    recompute_batchnorm_(model, data.split(3), layerwise=True)
    assert model[0].running_mean.item() == 3
    assert model[0].running_var.item() == pytest.approx(28 / 6)


def test_a_single_value_per_channel_has_no_variance():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="0 received 1 values per channel"):
        recompute_batchnorm_(model, [torch.randn(1, 3)], layerwise=True)
    assert torch.equal(model[0].running_var, torch.ones(3))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, float("nan")), (torch.float16, 1000.0)]
)
def test_statistics_that_are_not_finite_are_refused(dtype, value, layerwise):
    # In float16 a variance of 10^6 is infinite: the largest number is 65,504.
    data = torch.tensor([[0.0], [value], [2 * value], [0.0]], dtype=dtype)
    model = nn.Sequential(nn.BatchNorm1d(1)).to(dtype)
    with pytest.raises(FloatingPointError, match=rf"what 0 received.*{dtype}"):
        recompute_batchnorm_(model, [data], layerwise=layerwise)
    assert model[0].running_var.item() == 1


@pytest.mark.parametrize("batch", [7, [], ("label", torch.ones(2, 2)), None])
def test_a_batch_of_another_kind(batch):
    with pytest.raises(TypeError, match=r"Give `forward\(model, batch\)`"):
        recompute_batchnorm_(nn.Sequential(nn.BatchNorm1d(2)), [batch])


@pytest.mark.parametrize("loader", [torch.ones(4, 2), 7])
def test_a_loader_that_gives_no_batches(loader, unchecked):
    with pytest.raises(TypeError, match="`loader` must give batches"):
        recompute_batchnorm_(nn.Sequential(nn.BatchNorm1d(2)), loader)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_max_batches_that_is_no_count(count, unchecked):
    with pytest.raises(ValueError, match="`max_batches`"):
        recompute_batchnorm_(
            nn.Sequential(nn.BatchNorm1d(2)), [torch.ones(4, 2)], max_batches=count
        )
