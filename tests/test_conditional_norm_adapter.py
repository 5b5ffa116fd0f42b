"""The adapter file of a converted model; weight decay, DDP and the null condition in training."""

import copy
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cln_tutorial.conditional_norm import (
    ConditionalLayerNorm,
    ConditionalRMSNorm,
    condition,
    conditional_parameters,
    convert_layer_norms,
    fold,
    freeze_base,
)
from cln_tutorial.conditional_norm.adapter import load_adapter, save_adapter

COND, HIDDEN = 3, 6


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def make_encoder(width=16):
    layer = nn.TransformerEncoderLayer(width, 4, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def make_tied():
    norm = nn.LayerNorm(16)
    return nn.Sequential(norm, nn.Linear(16, 16), norm, nn.Linear(16, 16), nn.RMSNorm(16))


def trained(model):
    """As training leaves it: nothing of the condition is zero any more."""
    for parameter in conditional_parameters(model).values():
        nn.init.normal_(parameter)
    return model


def pair(make=make_encoder, **sizes):
    """A trained model, and a fresh one of the same base."""
    base = make()
    model = trained(convert_layer_norms(copy.deepcopy(base), COND, **sizes))
    return model, convert_layer_norms(base, COND, **sizes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("make", [make_encoder, make_tied])
@pytest.mark.parametrize(
    "sizes", [{}, {"hidden_dim": HIDDEN}, {"hidden_dim": HIDDEN, "share_hidden": False}]
)
def test_a_loaded_adapter_computes_bit_for_bit_what_the_trained_model_does(make, sizes, path):
    model, fresh = pair(make, **sizes)
    before = [*map(id, fresh.parameters())]
    save_adapter(model, path)
    assert load_adapter(fresh, path) is fresh
    state = fresh.state_dict()
    assert all(state[name].equal(value) for name, value in model.state_dict().items())
    x, cond = torch.randn(2, 5, 16), torch.randn(2, COND)
    with condition(model, cond), condition(fresh, cond):
        assert fresh(x).equal(model(x))
    # In place: optimisers, tied norms and a shared hidden layer go on with the same parameters.
    assert [*map(id, fresh.parameters())] == before


@pytest.mark.parametrize("make", [make_encoder, make_tied])
def test_the_file_holds_the_new_parameters_alone_and_a_shared_hidden_layer_once(make, path):
    model, _ = pair(make, hidden_dim=HIDDEN)
    save_adapter(model, str(path))
    stored, new = load_file(path), conditional_parameters(model)
    assert stored.keys() == new.keys()
    assert all(stored[name].equal(value) for name, value in new.items())
    hidden = [name for name in stored if name.endswith("cond_proj.0.weight")]
    assert len(hidden) == 1
    assert stored[hidden[0]].shape == (HIDDEN, COND)


def test_the_file_does_not_grow_with_the_width_of_the_base(path):
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 8), nn.LayerNorm(8))  # a megabyte
    save_adapter(trained(convert_layer_norms(model, COND)), path)
    assert 2 * 8 * COND * 4 < path.stat().st_size < 2000


def test_the_same_adapter_gives_the_same_bytes(path):
    model, _ = pair(hidden_dim=HIDDEN)
    save_adapter(model, path)
    first = path.read_bytes()
    save_adapter(model, path)
    assert path.read_bytes() == first


def test_parameters_that_are_views_of_one_storage_are_saved(path):
    model, fresh = pair(make_tied)
    new = conditional_parameters(model)
    flat, at = nn.utils.parameters_to_vector(new.values()).detach(), 0
    for parameter in new.values():
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape[::-1]).T
        at += parameter.numel()
    save_adapter(model, path)
    loaded = conditional_parameters(load_adapter(fresh, path))
    assert all(loaded[name].equal(value) for name, value in new.items())


def test_a_frozen_base_stays_frozen_and_buffers_do_not_count(path):
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LayerNorm(8))
    model = freeze_base(convert_layer_norms(base, COND))
    save_adapter(model, path)
    model(torch.randn(5, 4))  # moves the running statistics
    trains = [parameter.requires_grad for parameter in model.parameters()]
    load_adapter(model, path)
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert sum(trains) == 1


# --- dtypes ---


@pytest.mark.parametrize("original", [True, False], ids=["the original", "the copy, widened"])
def test_an_adapter_of_a_bfloat16_base_loads_into_float32_without_rounding(original, path):
    base = make_encoder()
    half = trained(convert_layer_norms(copy.deepcopy(base).bfloat16(), COND))
    save_adapter(half, path)
    wide = convert_layer_norms(base if original else copy.deepcopy(base).bfloat16().float(), COND)
    loaded = conditional_parameters(load_adapter(wide, path))
    for name, value in conditional_parameters(half).items():
        assert loaded[name].dtype == torch.float32
        assert loaded[name].equal(value.float())


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),  # neither holds the numbers of the other
        (torch.bfloat16, torch.float16),
    ],
)
def test_a_dtype_that_would_round_is_refused_and_the_message_says_what_to_write(
    stored, dtype, path
):
    base = make_encoder().to(stored)
    model = trained(convert_layer_norms(copy.deepcopy(base), COND))
    save_adapter(model, path)
    narrow = convert_layer_norms(copy.deepcopy(base).to(dtype), COND)
    message = rf"holds {stored}, which {dtype} of `model` would round.*`model\.to\({dtype}\)`"
    with pytest.raises(TypeError, match=message):
        load_adapter(narrow, path)
    assert not any(map(torch.any, conditional_parameters(narrow).values()))
    # What the message says.
    cured = load_adapter(convert_layer_norms(base, COND), path).to(dtype)
    for name, value in conditional_parameters(model).items():
        assert conditional_parameters(cured)[name].equal(value.to(dtype))


# --- refusals ---


def converted(model, **sizes):
    return trained(convert_layer_norms(model, COND, **({"hidden_dim": HIDDEN} | sizes)))


def with_one_value_moved(base):
    with torch.no_grad():  # by one unit in the last place
        base.layers[1].linear2.bias[3].copy_(
            torch.nextafter(base.layers[1].linear2.bias[3], torch.tensor(9.0))
        )
    return converted(base)


def with_another_activation(base):
    model = converted(base)
    model.layers[1].norm2.cond_proj[1] = nn.Tanh()
    return model


NOT_CONVERTED = (
    r"call `convert_layer_norms` first\. In \S+ a norm has "
    r"cond_dim=3, hidden_dim=6, SiLU\(\), ConditionalLayerNorm, eps=1e-05\."
)
# What becomes of a copy of the base, and what the message says: both sides, and how many differ.
WRONG_MODELS = {
    "plain": (lambda base: base, NOT_CONVERTED),
    "folded": (lambda base: fold(converted(base), torch.randn(COND)), NOT_CONVERTED),
    "other condition": (
        lambda base: trained(convert_layer_norms(base, 5, hidden_dim=HIDDEN)),
        r"does not fit `model`; 5 of 33 differ:\n  layers\.0\.norm1: cond_dim=3, hidden_dim=6, "
        r"SiLU\(\), .* in the file, cond_dim=5, hidden_dim=6, SiLU\(\), .* here\n  "
        r"layers\.0\.norm1\.cond_proj\.0\.weight: \[6, 3\] in the file, \[6, 5\] here",
    ),
    "no hidden layer": (
        lambda base: converted(base, hidden_dim=None),
        r"13 of 37 differ:.*norm1\.cond_proj\.2\.weight: \[32, 6\] in the file, nothing here"
        r".*norm1\.cond_proj\.weight: nothing in the file, \[32, 3\] here",
    ),
    "hidden layer of each": (
        lambda base: converted(base, share_hidden=False),
        r"3 of 36 differ:\n  layers\.0\.norm2\.cond_proj\.0\.weight: nothing in the file, \[6, 3\]",
    ),
    "some norms only": (
        lambda base: converted(base, where=lambda name, _: "norm1" in name),
        r"4 of 33 differ:\n  layers\.0\.norm2: cond_dim=3.* in the file, nothing here",
    ),
    "other activation": (
        with_another_activation,
        r"1 of 33 differ:\n  layers\.1\.norm2: cond_dim=3, hidden_dim=6, SiLU\(\), .* in the file, "
        r"cond_dim=3, hidden_dim=6, Tanh\(\), .* here$",
    ),
    "wider base": (
        lambda base: converted(make_encoder(20)),
        r"\d\d of 33 differ:.*linear1\.weight: \[24, 16\] in the file, \[24, 20\] here",
    ),
    "wrapped": (
        lambda base: nn.ModuleDict({"module": converted(base)}),
        r"66 of 66 differ:\n  layers\.0\.linear1\.bias: \[24\] in the file, nothing here.*"
        r"\n  module\.layers\.0\.linear1\.bias: nothing in the file, \[24\] here",
    ),
    "other values": (
        with_one_value_moved,
        r"other values of the base .*; 1 of 24 differ:\n  layers\.1\.linear2\.bias: [0-9a-f]{16} in"
        r" the file, [0-9a-f]{16} here$",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_a_wrong_model_is_refused_and_nothing_of_it_changes(change, message, path):
    base = make_encoder()
    save_adapter(converted(copy.deepcopy(base)), path)
    model = change(base)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        load_adapter(model, path)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_tensor_of_another_shape_than_the_metadata_say_is_refused(path):
    model, fresh = pair()
    save_adapter(model, path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    cut = {name: value[:1].clone() for name, value in load_file(path).items()}  # would broadcast
    save_file(cut, path, about)
    with pytest.raises(ValueError, match=r"\[1, 3\] in the file, \[32, 3\] here"):
        load_adapter(fresh, path)


def test_a_changed_base_takes_the_adapter_in_the_way_that_the_message_names(path):
    model, _ = pair(hidden_dim=HIDDEN)
    save_adapter(model, path)
    other = convert_layer_norms(make_encoder(), COND, hidden_dim=HIDDEN)
    other.layers[0].linear1.reset_parameters()
    with pytest.raises(ValueError, match=r"load_state_dict\(safetensors\.torch\.load_file\(path"):
        load_adapter(other, path)
    other.load_state_dict(load_file(path), strict=False)
    loaded = conditional_parameters(other)
    assert all(loaded[name].equal(value) for name, value in conditional_parameters(model).items())


def test_a_model_without_conditional_norms_has_no_adapter_to_save(path):
    with pytest.raises(ValueError, match="holds no conditional norm; call `convert_layer_norms`"):
        save_adapter(make_encoder(), path)
    assert not path.exists()


WRONG_FILES = {
    "text": (lambda content: b"not what you think", r"is no safetensors file, or cut off: .*\.$"),
    "empty": (lambda content: b"", "is no safetensors file, or cut off"),
    "cut off": (lambda content: content[:-1], "is no safetensors file, or cut off"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_what_is_no_safetensors_file_is_refused_in_one_line(spoil, message, path):
    model, fresh = pair()
    save_adapter(model, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {message}"):
        load_adapter(fresh, path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_another_kind_is_refused(metadata, path):
    model, fresh = pair()
    save_file(dict(conditional_parameters(model)), path, metadata)
    with pytest.raises(ValueError, match="was not written by `save_adapter`"):
        load_adapter(fresh, path)


def test_a_missing_file_is_a_missing_file(path):
    with pytest.raises(FileNotFoundError, match=path.name):
        load_adapter(pair()[1], path)


# --- writing ---


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=type)
def test_a_failing_write_leaves_the_old_file_and_no_litter(call, error, path, monkeypatch):
    model, _ = pair()
    save_adapter(model, path)
    old = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        save_adapter(trained(model), path)
    assert path.read_bytes() == old
    assert [*path.parent.iterdir()] == [path]


def test_the_old_file_is_whole_until_the_new_one_is_on_the_disk(path, monkeypatch):
    """What a kill at any moment would leave."""
    model, fresh = pair()
    save_adapter(model, path)
    old, calls, fsync, replace = path.read_bytes(), [], os.fsync, os.replace

    def watched_fsync(number):
        fsync(number)
        calls.append(("fsync", os.fstat(number).st_size, path.read_bytes() == old))

    def watched_replace(source, target):
        calls.append(("replace", os.stat(source).st_size, path.read_bytes() == old))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save_adapter(trained(model), path)
    assert calls == [("fsync", len(old), True), ("replace", len(old), True)]
    assert path.read_bytes() != old
    load_adapter(fresh, path)


def test_others_may_read_the_file_as_any_other_of_its_folder(path):
    save_adapter(pair()[0], path)
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


# --- weight decay ---


def test_weight_decay_pulls_the_projection_to_the_base_model():
    norm = ConditionalLayerNorm(8, COND, zero_init=False)
    weight, cond, steps, rate, decay = norm.cond_proj.weight, torch.randn(1, COND), 50, 0.1, 0.2
    start, moved = weight.detach().clone(), norm.gamma_beta(cond)[0] - norm.weight
    optimiser = torch.optim.AdamW([weight], lr=rate, weight_decay=decay)
    expected = start.clone()
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimiser.step()
        expected *= 1 - rate * decay
        assert weight.equal(expected)  # of a zero gradient, Adam makes exactly nothing
    # Each step rounds by half a unit in the last place.
    share = (1 - rate * decay) ** steps
    torch.testing.assert_close(weight, share * start, rtol=steps * 6e-8, atol=0)
    # The sum gamma + W c rounds at 1.
    found = norm.gamma_beta(cond)[0] - norm.weight
    torch.testing.assert_close(found, share * moved, rtol=steps * 6e-8, atol=2e-7)


def test_a_group_without_weight_decay_leaves_the_projection():
    model = trained(convert_layer_norms(make_encoder(), COND, hidden_dim=HIDDEN))
    new = conditional_parameters(model)
    rest = [parameter for name, parameter in model.named_parameters() if name not in new]
    groups = [{"params": [*new.values()], "weight_decay": 0.0}, {"params": rest}]
    optimiser = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name] if name in new else before[name] * (1 - 0.1 * 0.2))


# --- the null condition, and steps without a condition under DDP ---


@pytest.mark.parametrize("cls", [ConditionalLayerNorm, ConditionalRMSNorm])
@pytest.mark.parametrize("act", [None, "silu", "gelu", "relu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_condition_of_zeros_is_the_base_bit_for_bit(cls, act, dtype):
    hidden = {} if act is None else {"hidden_dim": HIDDEN, "hidden_act": act}
    norm = cls(16, COND, zero_init=False, dtype=dtype, **hidden)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    zeros = torch.zeros(1, COND, dtype=dtype)
    gamma, beta = norm.gamma_beta(zeros)
    assert gamma[0].equal(norm.weight.to(gamma.dtype))
    assert beta is None or beta[0].equal(norm.bias.to(beta.dtype))
    # The output is the base's to rounding only, for other kernels compute it: two units in the
    # last place of values below 16.
    x = torch.randn(4, 5, 16).to(dtype)
    torch.testing.assert_close(norm(x, zeros), norm(x), rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.fixture
def process_group(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def make_small():
    return trained(convert_layer_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), COND))


@pytest.mark.usefixtures("process_group")
def test_under_ddp_a_step_without_condition_makes_the_next_forward_raise():
    model, x = DistributedDataParallel(make_small()), torch.randn(2, 4)
    model(x).sum().backward()
    message = r"Expected to have finished reduction.*find_unused_parameters=True"
    with pytest.raises(RuntimeError, match=re.compile(message, re.DOTALL)):
        model(x)


@pytest.mark.usefixtures("process_group")
def test_under_ddp_unused_parameters_may_be_sought_and_then_stay_without_gradient():
    model = DistributedDataParallel(make_small(), find_unused_parameters=True)
    x, projection = torch.randn(2, 4), model.module[1].cond_proj.weight
    for _ in range(2):
        model(x).sum().backward()
    assert projection.grad is None
    with condition(model, torch.randn(2, COND)):
        model(x).sum().backward()
    assert projection.grad.any()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("hidden_dim", [None, HIDDEN])
def test_under_ddp_a_condition_of_zeros_gives_every_parameter_a_gradient(hidden_dim):
    base = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    model = trained(convert_layer_norms(copy.deepcopy(base), COND, hidden_dim=hidden_dim))
    ddp, x, weights = DistributedDataParallel(model), torch.randn(2, 4), torch.randn(2, 8)
    for _ in range(2):
        ddp.zero_grad()
        with condition(ddp, torch.zeros(1, COND)):
            (ddp(x) * weights).sum().backward()
    assert not any(parameter.grad.any() for parameter in conditional_parameters(model).values())
    (base(x) * weights).sum().backward()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


def test_the_adapter_of_another_kind_of_norm_or_epsilon_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(convert_layer_norms(nn.Sequential(nn.RMSNorm(8)), cond_dim=3), path)
    plain = nn.Sequential(nn.LayerNorm(8, bias=False))
    with pytest.raises(ValueError, match=r"ConditionalRMSNorm.* in the file.*LayerNorm.* here"):
        load_adapter(convert_layer_norms(plain, cond_dim=3), path)
    save_adapter(convert_layer_norms(nn.Sequential(nn.LayerNorm(8, eps=1.0)), cond_dim=3), path)
    with pytest.raises(ValueError, match=r"eps=1\.0 in the file.*eps=1e-05 here"):
        load_adapter(convert_layer_norms(nn.Sequential(nn.LayerNorm(8)), cond_dim=3), path)
