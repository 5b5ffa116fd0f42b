"""What `capture` keeps: closed forms, the out-of-place model, and `torch.autograd.grad`."""

import collections
import copy
import dataclasses
import gc
import io
import pickle
import re
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C import _current_graph_task_id as graph_task
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch.utils.checkpoint import checkpoint

from cln_tutorial.intermediate_variables.capture import Captured, capture
from cln_tutorial.intermediate_variables.tap import Tap


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def network(inplace=True):
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), Tap("h"), nn.Linear(4, 2))


def hooks(model):
    """How many hooks there are, of any kind."""
    kinds = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks"]
    kinds += ["_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class Shared(nn.Module):
    """One layer under two names, called three times, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.unused = nn.Linear(3, 3)

    def forward(self, x, times=3):
        for _ in range(times):
            x = self.first(x)
        return x


# --- values ---------------------------------------------------------------------------------------


@given(kinds=st.lists(st.sampled_from("lrtd"), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_the_values_are_those_of_the_model_without_operations_in_place(kinds, seed):
    make = {"l": lambda: nn.Linear(3, 3), "r": lambda: nn.ReLU(inplace=True), "t": Tap}
    make["d"] = lambda: nn.Dropout(0.5, inplace=True)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), *[make[kind]() for kind in kinds])
    x = torch.randn(2, 3)
    torch.manual_seed(seed)
    with capture(model) as captured:
        y = model(x.clone())
    torch.manual_seed(seed)
    h = x
    for n, layer in enumerate(model):
        h = layer(h.clone())
        assert captured[str(n)].equal(h)
    assert y.equal(h)  # and the model's own output has not changed a bit


def test_a_hook_without_copy_lies_when_the_next_operation_is_in_place():
    model, x = network(), torch.randn(50, 3)
    with capture(model, "0") as captured:
        model(x)
    with capture(model, "0", clone=False) as bare:
        model(x)
    assert captured["0"].equal(model[0](x))
    assert captured["0"].min() < 0
    assert bare["0"].min() == 0  # what torchextractor and a plain hook show
    assert bare["0"].equal(model[0](x).relu())


def test_values_are_detached_copies_and_no_view_of_what_the_model_uses():
    model, x = network(), torch.randn(5, 3)
    with capture(model) as captured:
        y = model(x)
    assert not any(value.requires_grad for value in captured.values())
    assert captured["3"].data_ptr() != y.data_ptr()


def test_attached_values_carry_the_gradient_of_a_loss_on_them():
    model, x = network(), torch.randn(5, 3)
    with capture(model, "0", detach=False) as captured:
        model(x)
    captured["0"].square().sum().backward()
    expected = torch.autograd.grad(model[0](x).square().sum(), model[0].weight)[0]
    assert model[0].weight.grad.equal(expected)
    assert model[3].weight.grad is None


def test_dtype_and_device_are_those_asked_for_and_integers_stay_integers():
    class Both(nn.Module):
        def forward(self, x):
            return x, (x > 0).long()

    model, x = Both(), torch.randn(5, 3, dtype=torch.float64)
    with capture(model, dtype=torch.bfloat16, device="meta") as there, capture(model) as here:
        model(x)
    floats, integers = there[""]
    assert (floats.dtype, integers.dtype) == (torch.bfloat16, torch.int64)
    assert (floats.device.type, integers.device.type) == ("meta", "meta")
    assert here[""][0].dtype == torch.float64
    with capture(model, dtype=torch.float32) as captured:
        model(x)
    assert captured[""][0].equal(x.float())


def test_a_copy_in_the_dtype_that_it_has_anyway_is_a_copy():
    model, x = network(), torch.randn(50, 3)
    with capture(model, "0", dtype=torch.float32, device="cpu") as captured:
        model(x)
    assert captured["0"].min() < 0


def test_autocast_values_are_those_that_the_model_computes_with():
    model, x = network(), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16), capture(model) as captured:
        y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model[0](x)
    assert captured["0"].dtype == torch.bfloat16
    assert captured["0"].equal(expected)
    assert captured["3"].equal(y)


Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Output:
    hidden: torch.Tensor
    note: str
    more: list


class Structured(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        self.returned = self.make(x)
        return self.returned


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, None, 3),
        lambda x: [x, {"a": x + 1}],
        lambda x: collections.OrderedDict(a=x, b=(x, "text")),
        lambda x: Pair(x, [x]),
        lambda x: Output(x, "text", [x, x * 2]),
    ],
)
def test_structures_come_back_as_they_are_with_every_tensor_copied(make):
    model, x = Structured(make), torch.ones(2)
    with capture(model, grads=True) as captured:
        model(x)
    x.zero_()
    assert type(captured[""]) is type(model.returned)
    assert tensors_of(captured[""])[0].equal(torch.ones(2))
    assert len(tensors_of(captured[""])) == len(tensors_of(model.returned))
    assert captured.nbytes == 8 * len(tensors_of(model.returned))


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Output):
        value = [value.hidden, value.more]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in tensors_of(each)]
    return []


def test_a_packed_sequence_is_copied_with_its_gradient_and_counted():
    rows = [torch.ones(3, 2, requires_grad=True), torch.ones(2, 2)]
    model = Structured(lambda rows: nn.utils.rnn.pack_sequence(rows))
    with capture(model, grads=True) as captured:
        packed = model(rows)
    packed.data.sum().backward()
    packed.data.detach().zero_()
    assert type(captured[""]) is nn.utils.rnn.PackedSequence
    assert captured[""].data.equal(torch.ones(5, 2))
    assert captured[""].batch_sizes.tolist() == [2, 2, 1]
    assert captured.grad("").data.equal(torch.ones(5, 2))
    assert captured.nbytes == 2 * 4 * 10 + 8 * 3


SPARSE = {  # three entries of 4 bytes, their 8-byte indices, and the pointers of compressed ones
    "to_sparse_coo": 12 + 2 * 24,
    "to_sparse_csr": 12 + 24 + 8 * 4,
    "to_sparse_csc": 12 + 24 + 8 * 4,
}


@pytest.mark.filterwarnings("ignore:Sparse C")
@pytest.mark.parametrize("make", SPARSE)
def test_sparse_values_are_kept_and_counted(make):
    model = Structured(lambda x: getattr(x, make)())
    with capture(model, max_bytes=SPARSE[make]) as captured:
        model(torch.eye(3))
    assert captured[""].to_dense().equal(torch.eye(3))
    assert captured.nbytes == SPARSE[make]


# --- calls ----------------------------------------------------------------------------------------


def test_every_call_of_a_shared_layer_is_kept_in_order_under_all_its_names():
    model, x = Shared(), torch.randn(2, 3)
    with capture(model) as captured:
        model(x)
    expected = [model(x, times) for times in (1, 2, 3)]
    assert list(captured) == ["first"]
    assert len(captured["first"]) == 3
    for found, value in zip(captured["first"], expected, strict=True):
        assert found.equal(value)
    assert [c.data_ptr() for c in captured["second"]] == [c.data_ptr() for c in captured["first"]]


def test_one_call_is_a_value_and_a_list_where_a_list_is_asked_for():
    model, x = Shared(), torch.randn(2, 3)
    with capture(model) as captured:
        y = model(x, times=1)
    assert captured["first"].equal(y)
    (only,) = captured.calls("first")
    assert only.equal(y)
    captured.calls("first").clear()
    assert captured["first"].equal(y)  # the list is the caller's own


@pytest.mark.parametrize(("keep", "times"), [("first", 1), ("last", 3)])
def test_the_first_or_the_last_call_only(keep, times):
    model, x = Shared(), torch.randn(2, 3)
    with capture(model, keep=keep, grads=True, inputs=True) as captured:
        y = model(x)
    y.sum().backward()
    found = captured["first"]
    assert found["output"].equal(model(x, times))
    assert found["args"][0].equal(x if times == 1 else model(x, times - 1))
    h = model(x, times).detach().requires_grad_()
    assert captured.grad("first").equal(torch.autograd.grad(model(h, 3 - times).sum(), h)[0])


def test_inputs_are_those_before_the_call_although_it_works_in_place():
    class Scale(nn.Module):
        def forward(self, x, *, by, label=None):
            return x.mul_(by)

    model, x = Scale(), torch.ones(3)
    with capture(model, inputs=True) as captured:
        model(x, by=torch.tensor(2.0), label="text")
    entry = captured[""]
    assert list(entry) == ["args", "kwargs", "output"]
    assert entry["args"][0].equal(torch.ones(3))
    assert entry["kwargs"] == {"by": torch.tensor(2.0), "label": "text"}
    assert entry["output"].equal(torch.full((3,), 2.0))
    assert captured.nbytes == 4 * 7


def test_inputs_of_a_call_that_failed_are_not_given_to_the_next_one():
    class Picky(nn.Module):
        def forward(self, x):
            if x.sum() < 0:
                raise ArithmeticError
            return x + 1

    model = Picky()
    with capture(model, inputs=True) as captured:
        for value in [-1.0, 5.0]:
            try:
                model(torch.tensor(value))
            except ArithmeticError:
                model(torch.tensor(-value))
    assert [entry["args"][0].item() for entry in captured.calls("")] == [1, 5]
    assert [entry["output"].item() for entry in captured.calls("")] == [2, 6]


def test_a_module_that_calls_itself_keeps_each_input_beside_its_output():
    class Countdown(nn.Module):
        def forward(self, n):
            return n if n == 0 else self(n - 1) + n

    with capture(model := Countdown(), inputs=True) as captured:
        model(torch.tensor(3))
    found = [(e["args"][0].item(), e["output"].item()) for e in captured.calls("")]
    assert found == [(0, 0), (1, 1), (2, 3), (3, 6)]  # in the order in which they end


def test_a_failure_inside_a_call_of_the_same_module_leaves_that_call_its_inputs():
    class Retry(nn.Module):
        def forward(self, x):
            if x < 0:
                raise ArithmeticError
            try:
                self(x - 2)
            except ArithmeticError:
                return x + 10
            return x

    with capture(model := Retry(), inputs=True) as captured:
        model(torch.tensor(1.0))
        (slot,) = captured._slots.values()
        assert slot.pending == []
    assert captured[""]["args"][0] == 1
    assert captured[""]["output"] == 11


def test_clear_forgets_and_the_capture_goes_on():
    model = network()
    with capture(model, grads=True) as captured:
        for n in range(3):
            captured.clear()
            y = model(torch.full((1, 3), float(n)))
            y.sum().backward()
    assert captured["3"].equal(y)
    assert len(captured.calls("3")) == 1
    assert captured.grad("3").equal(torch.ones(1, 2))
    captured.clear()
    assert (len(captured), captured.nbytes) == (0, 0)
    with pytest.raises(KeyError, match="was cleared, or did not run"):
        captured["3"]


def test_a_capture_cleared_at_its_end_is_not_taken_for_one_that_saw_nothing():
    with capture(model := network()) as captured:
        model(torch.ones(1, 3))
        captured.clear()
    assert not captured


@pytest.mark.parametrize("inputs", [False, True])
def test_activation_checkpointing_calls_each_module_once(inputs):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False).square().sum()

    model, x, runs = Checkpointed(), torch.randn(2, 3), []
    model.inner[0].register_forward_hook(lambda module, args, y: runs.append(y))
    with capture(model, ["inner.0", "inner"], grads=True, inputs=inputs) as captured:
        model(x).backward()
    assert len(runs) == 2  # it did run again, inside backward()
    h = model.inner[0](x)
    (only,) = captured.calls("inner.0")
    assert (only["output"] if inputs else only).equal(h)
    expected = torch.autograd.grad(model.inner[1:](h).square().sum(), h)[0]
    assert torch.allclose(captured.grad("inner.0"), expected, atol=1e-6)  # float32, order one


# --- memory ---------------------------------------------------------------------------------------


def test_nbytes_is_the_sum_of_what_is_kept():
    model = network()
    with capture(model, grads=True) as captured:
        y = model(torch.randn(5, 3))
    assert captured.nbytes == 4 * 5 * (4 + 4 + 4 + 2)
    y.sum().backward()
    assert captured.nbytes == 2 * 4 * 5 * (4 + 4 + 4 + 2)
    assert repr(captured) == "Captured(4 of 4 modules, 4 calls, 560 bytes)"


def test_a_loop_without_end_is_stopped_by_the_limit_with_the_sum_so_far():
    model, steps = network(), []

    def loop():  # 16 + 16 + 16 + 8 bytes a step
        for n in range(100):
            steps.append(n)
            model(torch.ones(1, 3))

    message = "holds 216 bytes, and the next value of 8 exceeds `max_bytes` = 220"
    with pytest.raises(RuntimeError, match=message), capture(model, max_bytes=220) as captured:
        loop()
    assert (len(steps), captured.nbytes, hooks(model)) == (4, 216, 0)


def test_the_limit_counts_what_will_be_kept_before_anything_is_copied():
    class Watched(torch.Tensor):
        copies = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.copies += function in (torch.Tensor.clone, torch.Tensor.to)
            return super().__torch_function__(function, types, args, kwargs or {})

    model, x = Structured(lambda x: x.as_subclass(Watched)), torch.ones(100)
    with capture(model, max_bytes=400):
        model(x)
    assert Watched.copies == 1
    message = "next value of 400 exceeds"
    with pytest.raises(RuntimeError, match=message), capture(model, max_bytes=399):
        model(x)
    assert Watched.copies == 1
    with capture(model := network(), "0", max_bytes=8, dtype=torch.bfloat16) as captured:
        model(torch.ones(1, 3))
    assert captured.nbytes == 8


@pytest.mark.parametrize("forget", ["last", "clear"])
def test_what_was_forgotten_does_not_count_for_the_limit(forget):
    model = network()
    keep = "last" if forget == "last" else "all"
    with capture(model, max_bytes=56, keep=keep) as captured:
        for _ in range(5):
            model(torch.ones(1, 3))
            if forget == "clear":
                captured.clear()


class Remember(torch.autograd.Function):
    """The identity, with an object in the graph that can be watched."""

    @staticmethod
    def forward(ctx, x, watched):
        ctx.token = Token()
        watched.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Token:
    pass


@pytest.mark.parametrize("inputs", [False, True])
def test_nothing_of_the_graph_is_held_and_nothing_at_all_after_clear(inputs):
    watched = []
    model = nn.Sequential(nn.Linear(3, 2), Structured(lambda x: Remember.apply(x, watched)), Tap())
    with capture(model, ["2"], grads=True, inputs=inputs) as captured:
        loss = model(torch.ones(1, 3)).sum()
    loss.backward()
    del model[1].returned
    value = captured["2"]["output"] if inputs else captured["2"]
    value, gradient = weakref.ref(value), weakref.ref(captured.grad("2"))
    gc.collect()
    assert watched[0]() is not None  # as long as the loss is there
    del loss
    gc.collect()
    assert watched[0]() is None
    assert value() is not None
    captured.clear()
    assert value() is None
    assert gradient() is None


def test_attached_values_hold_the_graph_until_clear():
    watched = []
    model = nn.Sequential(nn.Linear(3, 2), Structured(lambda x: Remember.apply(x, watched)), Tap())
    with capture(model, "2", detach=False, grads=True) as captured:
        model(torch.ones(1, 3))
    del model[1].returned
    gc.collect()
    assert watched[0]() is not None
    captured.clear()
    gc.collect()
    assert watched[0]() is None


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_equal_those_of_autograd_although_the_next_operation_is_in_place():
    model, x = network().double(), torch.randn(5, 3, dtype=torch.float64)
    with capture(model, grads=True) as captured:
        loss = model(x).square().sum()
    loss.backward()
    first = model[0](x)
    second = first.relu()
    third = model[3](second)
    expected = torch.autograd.grad(third.square().sum(), [first, second, second, third])
    for name, grad in zip("01h3", expected, strict=True):
        assert (captured.grad(name) - grad).abs().max() <= 1e-12  # of values of order one


def test_each_call_has_its_own_gradient():
    model, x = Shared().double(), torch.randn(2, 3, dtype=torch.float64)
    with capture(model, "second", grads=True) as captured:
        model(x).sum().backward()
    h = [model.first(x)]
    h += [model.first(h[0])]
    h += [model.first(h[1])]
    expected = torch.autograd.grad(h[2].sum(), h)
    for found, grad in zip(captured.grad("first"), expected, strict=True):
        assert (found - grad).abs().max() <= 1e-12


def test_gradients_of_several_backward_passes_add_up_as_those_of_a_leaf():
    model, x = network(), torch.randn(5, 3)
    with capture(model, "3", grads=True) as captured:
        y = model(x)
    y.sum().backward(retain_graph=True)
    first = captured.grad("3")
    y.backward(torch.full_like(y, 2.0))
    assert captured.grad("3").equal(torch.full_like(y, 3.0))
    assert first.equal(torch.ones_like(y))


def test_a_gradient_in_a_structure_stands_where_its_tensor_stood():
    model = Structured(lambda x: (x * 2, "text", [x * 3, (x > 0)], Output(x * 5, "text", [])))
    x = torch.ones(2, requires_grad=True)
    with capture(model, grads=True) as captured:
        doubled, _, (tripled, _), output = model(x)
        (doubled.sum() + 7 * output.hidden.sum()).backward()
    assert tripled.grad_fn is not None
    one, text, (unused, mask), output = captured.grad("")
    assert one.equal(torch.ones(2))
    assert output.hidden.equal(torch.full((2,), 7.0))
    assert (text, unused, mask, output.note) == (None, None, None, None)


def test_a_gradient_is_not_changed_by_what_happens_to_the_parameter_later():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.bias

    model = Bias()
    with capture(model, grads=True) as captured:
        model().sum().backward()
    model.bias.grad.mul_(100)
    assert captured.grad("").equal(torch.ones(3))


@pytest.mark.parametrize("how", ["clear", "del"])
def test_a_leaf_has_no_hook_once_its_gradient_is_nobodys(how):
    model, weight = Structured(lambda x: x), torch.ones(3, requires_grad=True)
    with capture(model, grads=True) as captured:
        (2 * model(weight)).sum().backward()
    del model.returned
    assert len(weight._backward_hooks) == 1
    assert captured.grad("").equal(torch.full((3,), 2.0))
    if how == "clear":
        captured.clear()
    else:
        del captured
    gc.collect()
    assert len(weight._backward_hooks) == 0


def test_a_view_worked_on_in_place_has_no_gradient_and_the_error_says_why():
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten(0), nn.ReLU(inplace=True))
    with capture(model, grads=True) as captured:
        model(torch.ones(5, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="in place on this view"):
        captured.grad("1")
    assert captured.grad("2").equal(torch.ones(10))


def test_reentrant_checkpointing_has_no_gradient_and_the_error_says_why():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3, requires_grad=True)
    with capture(model, "0", grads=True) as captured:
        checkpoint(model, x, use_reentrant=True).sum().backward()
    with pytest.raises(RuntimeError, match="reentrant checkpointing"):
        captured.grad("0")


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_can_be_differentiated_again_where_values_stay_in_the_graph(detach):
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(5, 3)
    with capture(model, "0", grads=True, detach=detach) as captured:
        loss = model(x).sum()
    torch.autograd.grad(loss, model[0].weight, create_graph=True)
    assert captured.grad("0").requires_grad is not detach


@pytest.mark.parametrize(
    ("cause", "make"),
    [
        ("torch.no_grad", torch.no_grad),
        ("torch.inference_mode", torch.inference_mode),
        ("nothing that it was computed from requires a gradient", torch.enable_grad),
    ],
)
def test_without_a_graph_there_is_no_gradient_and_the_error_says_why(cause, make):
    model = network().requires_grad_(cause.startswith("torch"))
    with make(), capture(model, grads=True) as captured:
        model(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match=f"no gradient of 'h': .*{re.escape(cause)}"):
        captured.grad("h")


def test_gradients_not_asked_for_or_not_arrived_are_no_none():
    model = network()
    with capture(model) as captured:
        model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="grads=True"):
        captured.grad("0")
    with capture(model, grads=True) as captured:
        model(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match=r"backward\(\) was not called"):
        captured.grad("0")
    with pytest.raises(KeyError, match="Closest"):
        captured.grad("zero")
    with capture(model := Structured(lambda x: None), grads=True) as captured:
        model(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="its module returned no tensor"):
        captured.grad("")


# --- names ----------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), Tap("h")) for _ in range(2)])
        self.end = Tap("end of it")

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.end(x)


LEAVES = ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1", "end of it"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LEAVES),
        ({"taps": False}, LEAVES[0:3:2]),
        ({"names": "layers.1"}, ["layers.1"]),
        ({"names": ["layers.1.0", "", "layers.0"]}, ["layers.1.0", "", "layers.0"]),
        ({"names": ["end"]}, ["end of it"]),
        ({"names": ["end of it", "end"]}, ["end of it"]),
        ({"names": iter(["layers.0.1"])}, ["layers.0.1"]),
        ({"pattern": "layers.?"}, ["layers.0", "layers.1"]),
        ({"pattern": "*1"}, ["layers.0.1", "layers.1", "layers.1.1"]),
        ({"pattern": "end of*"}, ["end of it"]),
        ({"pattern": re.compile(r"layers\.\d")}, ["layers.0", "layers.1"]),
        ({"predicate": lambda name, module: isinstance(module, Tap)}, LEAVES[1::2] + LEAVES[4:]),
        ({"predicate": lambda name, module: name == ""}, [""]),
    ],
)
def test_modules_are_selected_by_name_pattern_predicate_or_as_leaves(options, expected):
    with capture(model := Layers(), **options) as captured:
        model(torch.ones(1, 2))
    assert list(captured) == expected
    assert len(captured) == len(expected)


def test_a_tap_answers_to_its_own_name_and_to_its_place():
    with capture(model := Layers()) as captured:
        model(torch.ones(1, 2))
    assert captured["end"] is captured["end of it"]


def test_a_name_that_two_taps_share_is_refused_with_their_places():
    message = r"several taps are called 'h'. Name their places: layers.0.1, layers.1.1"
    with pytest.raises(ValueError, match=message), capture(Layers(), "h"):
        pass


def test_the_place_of_a_module_goes_before_the_name_of_a_tap_elsewhere():
    model = nn.Sequential(nn.Linear(2, 2), Tap("0"))
    with capture(model) as captured:
        model(torch.ones(1, 2))
    assert list(captured) == ["0", "1"]


def test_unknown_names_are_refused_with_the_closest_ones(unchecked):
    message = "no module is called 'layer.0.0'. Closest: 'layers.0.0', 'layers.0.1', 'layers.0'"
    with pytest.raises(KeyError, match=message), capture(Layers(), ["layers.1", "layer.0.0"]):
        pass
    with capture(model := network(), ["0", "3"]) as captured:
        model(torch.ones(1, 3))
    with pytest.raises(KeyError, match=r"'h' was not selected. Closest: '"):
        captured["h"]
    assert "h" not in captured


def test_a_module_that_was_selected_and_did_not_run_says_so():
    with capture(model := Shared()) as captured:
        model(torch.ones(1, 3))
    with pytest.raises(KeyError, match=r"'unused' was selected, but did not run. .*scripted"):
        captured["unused"]
    assert "unused" not in captured
    assert list(captured) == ["first"]


def test_the_projection_that_attention_uses_without_calling_it_did_not_run():
    model, x = nn.MultiheadAttention(4, 2), torch.randn(3, 1, 4)
    with capture(model, ["", "out_proj"]) as captured:
        y = model(x, x, x)
    assert captured[""][0].equal(y[0])
    with pytest.raises(KeyError, match=r"did not run.*out_proj"):
        captured["out_proj"]


# --- nothing is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [False, True])
def test_hooks_are_gone_after_the_context_an_exception_and_the_end_of_a_generator(inputs):
    model, x = network(), torch.ones(1, 3)

    def steps():
        with capture(model, inputs=inputs):
            while True:
                yield model(x)

    with capture(model, inputs=inputs):
        assert hooks(model) >= 4
        model(x)
    assert hooks(model) == 0
    with pytest.raises(IndexError), capture(model, inputs=inputs) as captured:
        model(x)[1:].unbind()[0]
    assert hooks(model) == 0
    assert len(captured) == 4  # what was seen until then
    generator = steps()
    next(generator)
    assert hooks(model) >= 4
    generator.close()
    assert hooks(model) == 0


def test_a_failure_while_hooks_are_set_leaves_none(monkeypatch):
    model = network()

    def refuse(*args, **kwargs):
        raise ArithmeticError

    monkeypatch.setattr(model[3], "register_forward_hook", refuse)
    with pytest.raises(ArithmeticError), capture(model):
        pass
    assert hooks(model) == 0


def test_contexts_nest_and_other_peoples_hooks_stay():
    model, x, seen = network(), torch.ones(1, 3), []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    with capture(model) as outer:
        model(x)
        with capture(model, "0") as inner:
            model(x)
        model(x)
    assert len(outer.calls("0")) == 3
    assert len(inner.calls("0")) == 1
    assert (len(seen), hooks(model)) == (3, 1)


def test_the_mode_and_the_gradients_of_the_model_do_not_change():
    model = network().eval()
    with capture(model, grads=True):
        model(torch.ones(1, 3)).sum().backward()
    assert not model.training
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    assert all(p.grad.equal(grad) for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("how", ["pickle", "save", "deepcopy"])
def test_a_copy_of_the_model_made_inside_does_not_go_on_recording(how):
    model, x = network(), torch.ones(1, 3)
    with capture(model, inputs=True, grads=True) as captured:
        model(x)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert twin(2 * x).equal(model(2 * x))
    assert twin(x).equal(model(x))
    assert len(captured.calls("0")) == 2


def test_what_was_captured_is_saved_as_a_dictionary():
    with capture(model := network()) as captured:
        model(torch.ones(1, 3))
    twin = pickle.loads(pickle.dumps(dict(captured)))
    assert twin["0"].equal(captured["0"])
    with pytest.raises(TypeError, match=r"saved as `dict\(captured\)`"):
        pickle.dumps(captured)


# --- threads, replicas, transforms ----------------------------------------------------------------


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_calls_from_another_thread_are_not_recorded():
    model = network()
    with capture(model, inputs=True) as captured:
        in_thread(lambda: model(torch.zeros(1, 3)))
        model(torch.ones(1, 3))
        in_thread(lambda: model(torch.zeros(1, 3)))
    (only,) = captured.calls("0")
    assert only["args"][0].equal(torch.ones(1, 3))


def test_two_threads_that_capture_the_same_model_do_not_mix():
    model = nn.Sequential(nn.Linear(3, 4), Tap("h"))
    barrier = threading.Barrier(2, timeout=30)
    wrong = []

    def run(number):
        x = torch.full((2, 3), float(number))
        expected = model[0](x)
        for _ in range(20):
            with capture(model) as captured:
                barrier.wait()  # both are listening
                model(x)
                barrier.wait()
            calls = captured.calls("h")
            if len(calls) != 1 or not calls[0].equal(expected):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=[n]) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert all(not module._forward_hooks for module in model.modules())


def test_replicas_of_data_parallel_count_in_this_thread_and_not_in_others():
    model, x = network(), torch.ones(1, 3)
    with capture(model) as captured:
        replica = model._replicate_for_data_parallel()
        for name, module in model.named_children():
            setattr(replica, name, module._replicate_for_data_parallel())
            for key, weight in module._parameters.items():
                setattr(getattr(replica, name), key, weight)
        y = replica(x)
        in_thread(lambda: replica(2 * x))
    assert captured["3"].equal(y)
    assert len(captured.calls("3")) == 1


def test_a_context_that_saw_nothing_is_an_error_with_the_causes():
    model = network()
    message = "nothing was captured of '0', '1', 'h', '3'. .*inside the context.*thread"
    with pytest.raises(RuntimeError, match=message), capture(model):
        in_thread(lambda: model(torch.ones(1, 3)))
    shared = Shared()
    with pytest.raises(RuntimeError, match="captured of 'unused'"), capture(shared, "unused"):
        shared(torch.ones(1, 3))
    assert hooks(model) + hooks(shared) == 0


def test_functional_calls_are_seen():
    model, x = network(), torch.randn(5, 3)
    weights = {name: 2 * weight.detach() for name, weight in model.named_parameters()}
    with capture(model) as captured:
        y = torch.func.functional_call(model, weights, (x,))
    assert captured["3"].equal(y)
    expected = nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
    assert captured["0"].equal(expected)


def test_values_of_a_functional_gradient_can_be_used_after_it():
    model, x = network(inplace=False), torch.randn(5, 3)
    weights = dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, (x,)).sum()

    with capture(model, "3") as captured:
        torch.func.grad(loss)(weights)
    assert (captured["3"] + 0).equal(model(x))
    assert not is_functorch_wrapped_tensor(captured["3"])


def test_the_private_functions_of_torch_mean_what_is_asked_of_them():
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda gradient: seen.append(graph_task()))
    x.sum().backward()
    assert graph_task() == -1
    assert seen[0] >= 0
    assert maybe_current_level() is None
    levels = []
    torch.func.grad(lambda x: levels.append(maybe_current_level()) or x.sum())(x.detach())
    assert levels == [1]


def test_vmap_is_refused_since_its_tensors_do_not_outlive_it():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=r"inside torch.vmap"), capture(model):
        torch.vmap(model)(torch.randn(5, 3))
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_encoders_padded_batch_is_as_without_a_capture():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        with capture(model, pattern="layers.?") as captured:
            y = model(x, src_key_padding_mask=padding)
    assert y.equal(expected)
    last = captured["layers.1"]  # torch packs the padded batch: 3 + 5 rows
    assert last.is_nested
    assert [row.equal(y[n, : len(row)]) for n, row in enumerate(last.unbind())] == [True, True]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "`model` must be a torch.nn.Module; got function", {"model": lambda x: x}),
        (ValueError, "give one of .* got names, pattern", {"names": "0", "pattern": "*"}),
        (ValueError, "got names, predicate", {"names": "0", "predicate": lambda n, m: True}),
        (ValueError, "names: no module of Sequential is selected", {"names": []}),
        (ValueError, "pattern: no module of Sequential is selected", {"pattern": "layers.*"}),
        (ValueError, "predicate: no module", {"predicate": lambda n, m: False}),
        (TypeError, "`names` must be strings; got int", {"names": [0]}),
        (TypeError, "`pattern` must be a glob or .*: 3", {"pattern": 3}),
        (TypeError, "`predicate` must be a function of name and module", {"predicate": "0"}),
        (KeyError, "no module is called 'h'", {"names": "h", "taps": False}),
        (ValueError, '`keep` must be "all", "last" or "first"; got \'every\'', {"keep": "every"}),
        (TypeError, "`dtype` must be a floating dtype; got torch.int8", {"dtype": torch.int8}),
        (TypeError, "`dtype` must be a floating dtype; got 'float'", {"dtype": "float"}),
        (ValueError, "`max_bytes` must be a whole number of bytes; got -1", {"max_bytes": -1}),
        (ValueError, "`max_bytes` must be a whole number of bytes; got 0.5", {"max_bytes": 0.5}),
    ],
)
def test_bad_arguments_are_named_before_any_hook_is_set(error, message, options, unchecked):
    model = network()
    with pytest.raises(error, match=message), capture(**({"model": model} | options)):
        pass
    assert hooks(model) == 0


def test_what_is_captured_is_a_mapping():
    with capture(model := network()) as captured:
        model(torch.ones(1, 3))
    assert isinstance(captured, Captured)
    assert list(captured) == list(captured.keys()) == ["0", "1", "h", "3"]
    assert [value.shape[-1] for value in captured.values()] == [4, 4, 4, 2]
