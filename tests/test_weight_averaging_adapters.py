"""Stand-ins for other libraries' averages: twelve updates beside the real ones.

torch's own class always runs; the others where they are installed. All in float64, where a dozen
updates that are rounded in another order differ by less than 1e-14 of weights of order one.
"""

import functools
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cln_tutorial.weight_averaging import ConstantDecay, ExponentialMovingAverage, TensorFlowWarmup
from cln_tutorial.weight_averaging.adapters import (
    EMA,
    AveragedModel,
    EMAModel,
    ModelEmaV3,
    TorchEMA,
    lightning_callback,
    trainer_callback,
)

STEPS = 12
EXACT = {"rtol": 0, "atol": 1e-13}
# ema-pytorch computes its decay in float32: 2^-24 of it in each of twelve updates.
FLOAT32_DECAY = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Tied(nn.Module):
    """An encoder whose weight is also the decoder's, and a norm with buffers."""

    def __init__(self, tied=True):
        super().__init__()
        self.encoder, self.norm = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)
        self.decoder = nn.Linear(3, 4, bias=False)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.double()

    def forward(self, x):
        return self.norm(self.encoder(x)) @ self.decoder.weight


def move(model):
    """As a step of training would: all parameters, and the norm's statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    model(torch.randn(5, 3, dtype=torch.float64))


def assert_alike(ours, theirs, tolerance=EXACT, leave_out=()):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - set(leave_out):
        assert torch.allclose(ours[name].double(), theirs[name].double(), **tolerance), name


@functools.cache
def timm():
    """Its averages alone: the package as a whole imports torchvision."""
    if (package := importlib.util.find_spec("timm")) is None:
        pytest.skip("timm is not installed")
    path = Path(package.submodule_search_locations[0]) / "utils/model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def diffusers():
    return pytest.importorskip("diffusers.training_utils", exc_type=ImportError)


# --- torch.optim.swa_utils.AveragedModel ----------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_averaged_model_is_the_one_of_torch(decay, use_buffers):
    model = Tied()
    function = None if decay is None else get_ema_multi_avg_fn(decay)
    if use_buffers and decay is None:  # torch divides integer buffers, and fails at the second one
        model.norm.num_batches_tracked = model.norm.num_batches_tracked.double()
    theirs = TorchAveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers)
    ours = AveragedModel(model, use_buffers=use_buffers, decay=decay)
    counter = ["norm.num_batches_tracked"]
    for step in range(1, STEPS + 1):
        move(model)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_alike(ours.module, theirs.module, leave_out=counter if use_buffers else ())
        assert ours.n_averaged == theirs.n_averaged.item() == step
    x = torch.randn(7, 3, dtype=torch.float64)
    theirs.eval()
    assert torch.allclose(ours.eval()(x), theirs(x), rtol=1e-12, atol=0)
    assert torch.equal(ours(x), ours.module(x))


def test_torch_averages_a_counter_and_ours_hands_it_on():
    model = nn.BatchNorm1d(1)
    theirs = TorchAveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = AveragedModel(model, use_buffers=True, decay=0.9)
    for _ in range(20):
        model(torch.randn(2, 1))
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert ours.module.num_batches_tracked == 20
    assert theirs.module.num_batches_tracked < 20


@pytest.mark.parametrize("name", ["avg_fn", "multi_avg_fn"])
def test_an_averaging_function_is_refused_with_what_to_write(name):
    with pytest.raises(TypeError, match=rf"`{name}`.*decay=0\.999 for get_ema_multi_avg_fn"):
        AveragedModel(Tied(), **{name: get_ema_multi_avg_fn(0.999)})


# --- timm.utils.ModelEmaV3 ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude_buffers": True},
        {"update_after_step": 4},
        {"use_warmup": True},
        {"use_warmup": True, "warmup_gamma": 2.0, "warmup_power": 0.75, "update_after_step": 3},
        {"use_warmup": True, "min_decay": 0.5},
        {"dtype": torch.float64, "device": "cpu"},
    ],
)
def test_model_ema_v3_is_the_one_of_timm_with_steps(options, first):
    model = Tied(tied=False)  # tied weights are the peer's fault, below
    theirs = timm().ModelEmaV3(model, decay=0.8, **options)
    ours = ModelEmaV3(model, decay=0.8, **options)
    for step in range(first, first + STEPS):
        move(model)
        ours.update(model, step=step)
        theirs.update(model, step=step)
        assert_alike(ours.module, theirs.module)
    x = torch.randn(7, 3, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-12, atol=0)


def test_model_ema_v3_is_the_one_of_timm_without_steps_and_after_set():
    model = Tied(tied=False)
    theirs, ours = timm().ModelEmaV3(model, decay=0.8), ModelEmaV3(model, decay=0.8)
    for count in range(STEPS):
        move(model)
        if count == 5:
            theirs.set(model)
            ours.set(model)
        else:
            theirs.update(model)
            ours.update(model)
        assert_alike(ours.module, theirs.module)


def test_model_ema_v3_without_steps_has_the_closed_form():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ours = ModelEmaV3(model, decay=0.9)
    nn.init.ones_(model.weight)
    for _ in range(10):
        ours.update(model)
    # Rounded ten times to float32.
    assert ours.module.weight.item() == pytest.approx(1 - 0.9**10, rel=1e-6)


def test_model_ema_v3_warms_up_without_steps_as_with_them():
    model = Tied()
    counted, given = (ModelEmaV3(model, 0.99, use_warmup=True) for _ in range(2))
    for step in range(1, STEPS + 1):
        move(model)
        counted.update(model)
        given.update(model, step=step)
    assert_alike(counted.module, given.module, {"rtol": 0, "atol": 0})
    # The peer forgets its warm-up: at 0.99 the initial weights are still 0.99^12 = 89 % of it.
    theirs = timm().ModelEmaV3(nn.Linear(1, 1, bias=False), 0.99, use_warmup=True)
    assert theirs.get_decay() == 0.99


def test_timm_updates_tied_weights_twice_and_ours_once():
    model = Tied()
    theirs, ours = timm().ModelEmaV3(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    for each in (model, theirs.module):
        nn.init.zeros_(each.encoder.weight)
    ours.set(model)
    nn.init.ones_(model.encoder.weight)
    for _ in range(10):
        theirs.update(model)
        ours.update(model)
    assert ours.module.decoder.weight[0, 0].item() == pytest.approx(1 - 0.9**10, abs=1e-13)
    assert theirs.module.decoder.weight[0, 0].item() == pytest.approx(1 - 0.9**20, abs=1e-13)


def test_model_ema_v3_rounds_stochastically_where_it_is_asked_for_16_bits():
    model = nn.Linear(64, 64, bias=False)
    nn.init.ones_(model.weight)
    options = {"decay": 0.99, "dtype": torch.bfloat16}
    moving = ModelEmaV3(model, **options)
    still = ModelEmaV3(model, stochastic_rounding=False, **options)
    nn.init.constant_(model.weight, 1.0625)
    for _ in range(100):
        moving.update(model)
        still.update(model)
    assert moving.module.weight.dtype == torch.bfloat16
    # The grid has steps of 2^-7: a deviation of at most half of one for each of 4,096 weights, so
    # 6.1e-5 of their mean; five of them fail once in 1.7 million.
    exact = 1 + 0.0625 * (1 - 0.99**100)
    assert moving.module.weight.double().mean().item() == pytest.approx(exact, abs=3.1e-4)
    assert torch.equal(still.module.weight, torch.ones_like(still.module.weight))


# --- ema-pytorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_after_step": 4},
        {"inv_gamma": 2.0, "power": 0.75},
        {"min_value": 0.5},
        {"beta": 0.6},
    ],
)
def test_ema_is_the_one_of_ema_pytorch(options):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    options = {"beta": 0.99, "update_after_step": 0, "update_every": 1} | options
    model = Tied()
    theirs, ours = ema_pytorch.EMA(model, **options), EMA(model, **options)
    for _ in range(STEPS):
        move(model)
        theirs.update()
        ours.update()
        assert_alike(ours.ema_model, theirs.ema_model, FLOAT32_DECAY, ["norm.num_batches_tracked"])
        # The peer leaves the counter at 0.
        assert torch.equal(ours.ema_model.norm.num_batches_tracked, model.norm.num_batches_tracked)
    x = torch.randn(7, 3, dtype=torch.float64)
    theirs.eval()
    assert torch.allclose(ours.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_ema_pytorch_decays_per_update_and_ours_per_step():
    ema_pytorch = pytest.importorskip("ema_pytorch")
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    options = {"beta": 0.99, "update_after_step": 0, "min_value": 0.99, "update_every": 10}
    theirs, ours = ema_pytorch.EMA(model, **options), EMA(model, **options)
    theirs.update()
    ours.update()  # both copy the zero
    nn.init.ones_(model.weight)
    for _ in range(100):
        theirs.update()
        ours.update()
    assert ours.ema_model.weight.item() == pytest.approx(1 - 0.99**100, abs=1e-13)
    assert theirs.ema_model.weight.item() == pytest.approx(1 - 0.99**10, abs=1e-6)


def test_ema_has_the_defaults_of_ema_pytorch():
    average = EMA(Tied()).average
    assert (average.start_step, average.update_every) == (101, 10)
    assert average.profiles["average"].alpha == 0.9999


# --- torch-ema and diffusers ----------------------------------------------------------------------


@pytest.mark.parametrize("use_num_updates", [True, False])
def test_torch_ema_is_the_real_one(use_num_updates):
    torch_ema = pytest.importorskip("torch_ema")
    model = Tied()
    theirs = torch_ema.ExponentialMovingAverage(model.parameters(), 0.4, use_num_updates)
    ours = TorchEMA(model.parameters(), 0.4, use_num_updates)
    for count in range(STEPS):
        move(model)
        theirs.update()
        ours.update(model.parameters() if count % 2 else None)
        for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            assert torch.allclose(mine, other, **EXACT)


def test_torch_ema_loads_float32_averages_into_bfloat16_and_ours_keeps_them():
    torch_ema = pytest.importorskip("torch_ema")
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    theirs = [torch_ema.ExponentialMovingAverage([weight], 0.99) for _ in range(2)]
    theirs[0].to(dtype=torch.float32)
    theirs[1].load_state_dict(theirs[0].state_dict())
    assert theirs[1].shadow_params[0].dtype == torch.bfloat16
    ours = [TorchEMA([weight], 0.99) for _ in range(2)]
    ours[1].load_state_dict(ours[0].state_dict())
    assert ours[1].shadow_params[0].dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.3},
        {"min_decay": 0.3},
        {"update_after_step": 4},
        {"use_ema_warmup": True},
        {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "min_decay": 0.4},
    ],
)
def test_ema_model_is_the_one_of_diffusers(options):
    model = Tied()
    theirs = diffusers().EMAModel(model.parameters(), **options)
    ours = EMAModel(model.parameters(), **options)
    assert theirs.cur_decay_value is ours.cur_decay_value is None
    for _ in range(STEPS):
        move(model)
        theirs.step(model.parameters())
        ours.step(model.parameters())
        assert ours.cur_decay_value == pytest.approx(theirs.cur_decay_value, rel=1e-14)
        assert ours.optimization_step == theirs.optimization_step
        for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
            assert torch.allclose(mine, other, **EXACT)


def test_ema_model_has_the_decays_of_the_formula():
    weight = torch.zeros(1, requires_grad=True)
    ours = EMAModel([weight], decay=0.3, min_decay=0.19, update_after_step=1)
    decays = []
    for _ in range(6):
        ours.step([weight])
        decays.append(ours.cur_decay_value)
    # Two copies, then (1 + t) / (10 + t) between the limits: 2/11, 3/12, 4/13, 5/14.
    assert decays == [0, 0, 0.19, 0.25, 0.3, 0.3]
    beta = ours.average.profiles["average"].decay(0, 3)
    assert beta == pytest.approx(0.19 * 0.25 * 0.3, rel=1e-15)


@pytest.mark.parametrize("make", [lambda p: TorchEMA(p, 0.9), EMAModel])
def test_copy_store_and_restore(make):
    model = Tied()
    ours = make(model.parameters())
    move(model)
    (ours.update if isinstance(ours, TorchEMA) else ours.step)(model.parameters())
    averages = [average.clone() for average in ours.shadow_params]
    raw = [p.clone() for p in model.parameters()]
    ours.store(model.parameters())
    ours.copy_to(model.parameters())
    assert all(map(torch.equal, model.parameters(), averages))
    ours.restore(model.parameters())
    assert all(map(torch.equal, model.parameters(), raw))
    other = Tied()
    ours.copy_to(other.parameters())
    assert all(map(torch.equal, other.parameters(), averages))
    with pytest.raises(RuntimeError, match=r"call `store\(\)` first"):
        make(model.parameters()).restore(model.parameters())


def test_average_parameters_restores_after_an_exception_and_nests():
    model = Tied()
    ours = TorchEMA(model.parameters(), 0.9)
    move(model)
    ours.update()
    raw = [p.clone() for p in model.parameters()]
    averages = [average.clone() for average in ours.shadow_params]
    with ours.average_parameters():
        with ours.average_parameters():
            assert all(map(torch.equal, model.parameters(), averages))
        assert all(map(torch.equal, model.parameters(), averages))
    with pytest.raises(KeyError), ours.average_parameters():
        {}["inside"]
    assert all(map(torch.equal, model.parameters(), raw))


def test_averages_follow_to_another_device():
    ours = EMAModel(Tied().parameters())
    ours.to("cpu")
    assert ours.average.device == torch.device("cpu")


# --- what they share ------------------------------------------------------------------------------


def updated(ours, model):
    if isinstance(ours, AveragedModel):
        ours.update_parameters(model)
    elif isinstance(ours, ModelEmaV3):
        ours.update(model)
    elif isinstance(ours, EMAModel):
        ours.step(model.parameters())
    else:
        ours.update()


MAKERS = {
    "ModelEmaV3": lambda model: ModelEmaV3(model, 0.9),
    "ModelEmaV3 with warm-up": lambda model: ModelEmaV3(model, 0.9, use_warmup=True),
    "AveragedModel": AveragedModel,
    "AveragedModel, EMA": lambda model: AveragedModel(model, decay=0.9),
    "EMA": lambda model: EMA(model, beta=0.9, update_after_step=2, update_every=2),
    "TorchEMA": lambda model: TorchEMA(model.parameters(), 0.9),
    "EMAModel": lambda model: EMAModel(model.parameters(), 0.9),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_that_is_resumed_is_the_whole_run_bit_for_bit(name):
    runs = []
    for stop in (None, 5):
        torch.manual_seed(0)
        model = Tied()
        ours = MAKERS[name](model)
        for count in range(STEPS):
            if count == stop:
                state = ours.state_dict()
                ours = MAKERS[name](model)
                ours.load_state_dict(state)
            move(model)
            updated(ours, model)
        runs.append(ours)
    whole, resumed = (run.average.named_averages() for run in runs)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", [n for n in MAKERS if "EMAModel" not in n and n != "TorchEMA"])
def test_the_averaged_model_is_current_at_each_read_and_stays_between(name):
    model = Tied()
    ours = MAKERS[name](model)
    kept = ours.module
    for _ in range(4):
        move(model)
        updated(ours, model)
        assert ours.module is kept
        averages = ours.average.named_averages()
        assert all(torch.equal(p, averages[n]) for n, p in kept.named_parameters())
        assert kept.decoder.weight is kept.encoder.weight
    kept.norm.running_mean += 1  # statistics that were recomputed, say
    changed = kept.norm.running_mean.clone()
    assert torch.equal(ours.module.norm.running_mean, changed)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "EMA"])
def test_another_model_is_refused(name):
    model, other = Tied(), Tied()
    ours = MAKERS[name](model)
    wanted = r"`(model|parameters)` must be (the one|those) that the average was made of"
    with pytest.raises(ValueError, match=wanted):
        ours.update(other.parameters()) if name == "TorchEMA" else updated(ours, other)
    if name in ("TorchEMA", "EMAModel"):
        with pytest.raises(ValueError, match="`parameters` must have the shapes of the 3"):
            ours.copy_to(list(model.parameters())[:2])


def test_weights_of_bfloat16_move_here_and_nowhere_there():
    def run(make, update, value):
        model = nn.Linear(1, 1, bias=False).bfloat16()
        nn.init.ones_(model.weight)
        average = make(model)
        update(average, model)
        nn.init.constant_(model.weight, 1.0625)
        for _ in range(100):
            update(average, model)
        return value(average)

    def update_parameters(average, model):
        average.update_parameters(model)

    def float32(average):
        (only,) = average.average.named_averages().values()
        return only.item()

    exact = 1 + 0.0625 * (1 - 0.99**100)
    ours = {
        "torch": (lambda m: AveragedModel(m, decay=0.99), update_parameters),
        "timm": (lambda m: ModelEmaV3(m, 0.99), lambda a, m: a.update(m)),
        "torch-ema": (
            lambda m: TorchEMA(m.parameters(), 0.99, use_num_updates=False),
            lambda a, m: a.update(),
        ),
        "diffusers": (
            lambda m: EMAModel(m.parameters(), 0.99, min_decay=0.99),
            lambda a, m: a.step(m.parameters()),
        ),
        "ema-pytorch": (
            lambda m: EMA(m, beta=0.99, update_after_step=0, update_every=1, min_value=0.99),
            lambda a, m: a.update(),
        ),
    }
    for name, (make, update) in ours.items():
        # A hundred roundings of 2^-24.
        assert run(make, update, float32) == pytest.approx(exact, abs=6e-6), name
    make, update = ours["torch"]
    assert run(make, update, lambda a: a.module.weight.dtype) == torch.bfloat16

    def real(model):
        return TorchAveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

    assert run(real, update_parameters, lambda a: a.module.weight.item()) == 1.0


@pytest.mark.parametrize("package", ["torch_ema", "ema_pytorch", "diffusers"])
def test_weights_of_bfloat16_do_not_move_in_the_others(package):
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    if package == "torch_ema":
        peer = pytest.importorskip(package).ExponentialMovingAverage(
            model.parameters(), 0.99, use_num_updates=False
        )
        update = peer.update
    elif package == "ema_pytorch":
        options = {"update_after_step": 0, "update_every": 1, "min_value": 0.99}
        peer = pytest.importorskip(package).EMA(model, beta=0.99, **options)
        update = peer.update
    else:
        peer = diffusers().EMAModel(model.parameters(), 0.99, min_decay=0.99)
        update = functools.partial(peer.step, list(model.parameters()))
    update()
    nn.init.constant_(model.weight, 1.0625)
    for _ in range(100):
        update()
    value = peer.ema_model.weight if package == "ema_pytorch" else peer.shadow_params[0]
    assert value.item() == 1.0


# --- callbacks ------------------------------------------------------------------------------------


def average_of(weight):
    return ExponentialMovingAverage([("weight", weight)], decay=0.5, bias_correction=False)


def moments(folder, step, optimiser=None):
    args = types.SimpleNamespace(output_dir=str(folder))
    state = types.SimpleNamespace(global_step=step, is_world_process_zero=True)
    return (args, state, None), {"optimizer": optimiser}


def test_the_trainer_callback_counts_real_steps_saves_and_resumes(tmp_path):
    weight = nn.Parameter(torch.zeros(1))
    average = average_of(weight)
    callback = trainer_callback(average)
    optimiser = torch.optim.SGD([weight], lr=1.0)
    wrapped = types.SimpleNamespace(optimizer=optimiser)  # as accelerate does
    places, keywords = moments(tmp_path, 0, wrapped)
    callback.on_train_begin(*places, **keywords)
    callback.on_train_begin(*places, **keywords)  # a run that broke off: still one hook
    for _ in range(3):
        weight.grad = -torch.ones(1)
        optimiser.step()
    assert average.step == 3
    assert average.named_averages()["weight"].item() == 0.5 * 3 + 0.25 * 2 + 0.125 * 1
    (tmp_path / "checkpoint-3").mkdir()
    callback.on_save(*moments(tmp_path, 3)[0])
    callback.on_train_end(*places)
    optimiser.step()
    assert average.step == 3

    again = average_of(weight)
    callback = trainer_callback(again)
    places, keywords = moments(tmp_path, 3, wrapped)
    callback.on_train_begin(*places, **keywords)
    assert again.step == 3
    assert torch.equal(again.named_averages()["weight"], average.named_averages()["weight"])
    optimiser.step()
    assert again.step == 4


def test_only_the_first_process_writes(tmp_path):
    callback = trainer_callback(average_of(nn.Parameter(torch.zeros(1))))
    (args, state, control), _ = moments(tmp_path, 3)
    state.is_world_process_zero = False
    (tmp_path / "checkpoint-3").mkdir()
    callback.on_save(args, state, control)
    assert not list((tmp_path / "checkpoint-3").iterdir())


def test_a_checkpoint_without_averages_is_named(tmp_path):
    weight = nn.Parameter(torch.zeros(1))
    places, keywords = moments(tmp_path, 7, torch.optim.SGD([weight], lr=1.0))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-7.*from step 7.*`resume_from`"):
        trainer_callback(average_of(weight)).on_train_begin(*places, **keywords)
    average_of(weight).save(tmp_path / "averages.safetensors")
    trainer_callback(average_of(weight), tmp_path).on_train_begin(*places, **keywords)


def test_without_transformers_or_lightning_one_line_says_what_to_install(monkeypatch):
    average = average_of(nn.Parameter(torch.zeros(1)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'cln-tutorial\[huggingface\]'$"):
        trainer_callback(average)
    with pytest.raises(ImportError, match=r"pip install lightning$"):
        lightning_callback(average)


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        rng = torch.Generator().manual_seed(1)
        self.x = torch.randn(48, 3, generator=rng)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.x[index].sum()}


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        output = self.linear(x)[:, 0]
        return {"loss": (output - labels).square().mean(), "logits": output}


@pytest.mark.filterwarnings("ignore")
def test_a_real_trainer_with_accumulation_that_is_stopped_and_resumed(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("WANDB_DISABLED", "true")

    def train(folder, steps, resume=None):
        model = Regression()
        average = ExponentialMovingAverage(model, decay=0.8)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=4,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Rows(), callbacks=[trainer_callback(average)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return average

    whole = train(tmp_path / "whole", 8)
    assert whole.step == 8  # 16 batches
    train(tmp_path / "parts", 4)
    resumed = train(tmp_path / "parts", 8, resume=str(tmp_path / "parts/checkpoint-4"))
    assert resumed.step == 8
    for name, average in whole.named_averages().items():
        assert torch.equal(average, resumed.named_averages()[name])
    assert os.path.exists(tmp_path / "parts/checkpoint-8/averages.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_a_real_lightning_run_with_accumulation_that_is_stopped_and_resumed(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Regression()

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    def train(epochs, resume=None):
        module = Module()
        average = ExponentialMovingAverage(module, decay=0.8)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=2,
            accelerator="cpu",
            callbacks=[lightning_callback(average)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
        trainer.fit(module, loader, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return average

    whole = train(2)
    assert whole.step == 12  # 12 batches per epoch, two to a step
    train(1)
    resumed = train(2, resume=tmp_path / "last.ckpt")
    assert resumed.step == 12
    for name, average in whole.named_averages().items():
        assert torch.equal(average, resumed.named_averages()[name])


def test_torch_ema_warms_up_like_tensorflow_unless_told_otherwise():
    weight = torch.zeros(1, requires_grad=True)
    warm, constant = TorchEMA([weight], 0.99), TorchEMA([weight], 0.99, use_num_updates=False)
    assert warm.average.profiles["average"] == TensorFlowWarmup(0.99)
    assert constant.average.profiles["average"] == ConstantDecay(0.99)
