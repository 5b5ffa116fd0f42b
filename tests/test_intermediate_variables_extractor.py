"""`feature_extractor`: the values, their gradients, where the forward pass ends, what it leaves."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from cln_tutorial.intermediate_variables.extractor import feature_extractor
from cln_tutorial.intermediate_variables.tap import Tap


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Counted(nn.Linear):
    """A layer that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def network():
    rest = [nn.Sequential(Counted(4, 4), nn.ReLU(inplace=True)), Counted(4, 2), Counted(2, 1)]
    return nn.Sequential(Counted(3, 4), nn.ReLU(inplace=True), Tap("h"), *rest)


def calls(model):
    return [module.calls for module in model.modules() if isinstance(module, Counted)]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_values_are_those_of_the_model_in_the_order_of_the_names():
    model, x = network(), torch.randn(5, 3)
    found = feature_extractor(model, ["4", "0", "h", "3"])(x)
    first = model[0](x)
    assert list(found) == ["4", "0", "h", "3"]
    assert found["0"].equal(first)
    assert found["0"].min() < 0  # although the next operation is in place
    assert found["h"].equal(first.relu())
    assert found["3"].equal(model[3](first.relu()))
    assert found["4"].equal(model[4](found["3"]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("0", [1, 0, 0, 0]),
        ("h", [1, 0, 0, 0]),
        (["3.0", "0"], [1, 1, 0, 0]),
        (["3"], [1, 1, 0, 0]),
        (["0", "4"], [1, 1, 1, 0]),
        ("", [1, 1, 1, 1]),
    ],
)
def test_the_forward_pass_ends_with_the_last_one_needed(names, expected):
    model = network()
    feature_extractor(model, names)(torch.randn(5, 3))
    assert calls(model) == expected
    assert hooks(model) == 0


def test_gradients_are_those_of_the_model_cut_there():
    model, x = network().double(), torch.randn(5, 3, dtype=torch.float64)
    found = feature_extractor(model, ["0", "3"])(x)
    (found["0"].sin().sum() + found["3"].square().sum()).backward()
    first = model[0](x)
    loss = first.sin().sum() + model[3](first.relu()).square().sum()
    needed = list(model[:4].parameters())
    for parameter, grad in zip(needed, torch.autograd.grad(loss, needed), strict=True):
        assert (parameter.grad - grad).abs().max() <= 1e-12  # of values of order ten at most
    assert all(p.grad is None for p in model[4:].parameters())


def test_a_loss_on_features_trains_the_model_as_if_it_ended_there():
    model, x, target = network(), torch.randn(50, 3), torch.rand(50, 4)
    twin = copy.deepcopy(model)
    features = feature_extractor(model, "h")
    for forward, weights in [(lambda: features(x)["h"], features), (lambda: twin[:3](x), twin)]:
        optimiser = torch.optim.SGD(weights.parameters(), lr=0.1)
        for _ in range(5):
            optimiser.zero_grad()
            (forward() - target).square().mean().backward()
            optimiser.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.equal(other)


def test_under_no_grad_there_is_no_graph():
    with torch.no_grad():
        found = feature_extractor(network(), "h")(torch.randn(5, 3))
    assert not found["h"].requires_grad


def test_control_flow_that_depends_on_the_data_and_keyword_arguments():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(1, 2), nn.Linear(1, 3)

        def forward(self, x, *, factor=1.0):
            return self.small(factor * x) if x.sum() < 10 else self.large(factor * x)

    model, x = Branching(), torch.ones(1, 1)
    features = feature_extractor(model, "small")
    assert features(x, factor=2.0)["small"].equal(model.small(2 * x))
    with pytest.raises(RuntimeError, match=r"the model returned, and did not run \['small'\]"):
        features(20 * x)
    assert hooks(model) == 0


def test_a_shared_module_gives_its_first_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.same = self.layer

        def forward(self, x):
            return self.layer(self.same(x))

    model, x = Twice(), torch.randn(2, 3)
    found = feature_extractor(model, ["layer", "same"])(x)
    assert found["layer"].equal(model.layer(x))
    assert found["same"] is found["layer"]


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_no_hook_is_left_after_an_exception_and_the_exception_arrives(error):
    class Failing(nn.Module):
        def forward(self, x):
            raise error

    model = nn.Sequential(nn.Linear(3, 3), Failing(), nn.Linear(3, 3))
    with pytest.raises(error):
        feature_extractor(model, "2")(torch.randn(2, 3))
    assert hooks(model) == 0
    assert feature_extractor(model, "0")(torch.randn(2, 3))["0"].shape == (2, 3)


def test_modes_and_contexts_that_the_model_opens_are_closed_when_the_pass_ends_early():
    class Opens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        @torch.no_grad()
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x) + 1

    found = feature_extractor(Opens(), "layer")(torch.randn(2, 3))
    assert found["layer"].dtype == torch.bfloat16
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_two_threads_use_one_extractor_at_the_same_time():
    model = network()
    features, barrier = feature_extractor(model, ["0", "h"]), threading.Barrier(2, timeout=30)
    early, wrong = threading.Event(), []
    model[2].register_forward_hook(lambda *_: barrier.wait() and None)  # both are under way

    def run(number):
        x = torch.full((2, 3), float(number))
        expected = nn.functional.linear(x, model[0].weight, model[0].bias)
        for _ in range(20):
            if not features(x)["0"].equal(expected):
                wrong.append(number)
        early.set()

    threads = [threading.Thread(target=run, args=[n]) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert early.is_set()
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert hooks(model) == 1


def test_another_thread_that_only_runs_the_model_is_not_stopped():
    model, x = network(), torch.randn(5, 3)
    expected = model(x)
    outputs = []

    class Meanwhile(nn.Module):
        def forward(self, x):
            thread = threading.Thread(target=lambda: outputs.append(model(x)))
            thread.start()
            thread.join(60)
            return model(x)

    outer = Meanwhile()
    outer.model = model
    feature_extractor(outer, "model.0")(x)
    assert len(outputs) == 1
    assert outputs[0].equal(expected)


def test_an_extractor_inside_another_one_leaves_it_its_end():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.after = feature_extractor(network(), ["0", "4"]), Counted(2, 2)

        def forward(self, x):
            return self.after(self.inner(x)["4"])

    outer, x = Outer(), torch.randn(5, 3)
    found = feature_extractor(outer, "inner.model.0")(x)
    assert found["inner.model.0"].equal(outer.inner.model[0](x))
    assert calls(outer) == [2, 0, 0, 0, 0]  # the first once more, in the line above
    assert hooks(outer) == 0


def test_it_is_a_module_with_the_model_inside():
    model = network()
    features = feature_extractor(model, "h")
    assert features.model is model
    assert set(features.state_dict()) == {f"model.{key}" for key in model.state_dict()}
    features.eval()
    assert not model.training
    assert "names=['h']" in repr(features)
    x = torch.randn(5, 3)
    for twin in [copy.deepcopy(features), pickle.loads(pickle.dumps(features))]:
        assert twin(x)["h"].equal(features(x)["h"])
        assert twin.model is not model


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`model` must be a torch.nn.Module; got int", (3, "h")),
        (KeyError, "no module is called 'g'. Closest: ", (network(), "g")),
        (ValueError, "names: no module of Sequential is selected", (network(), [])),
        (ValueError, "several taps are called 'h'", (nn.Sequential(Tap("h"), Tap("h")), "h")),
    ],
)
def test_bad_arguments_are_named_at_once(error, message, arguments, unchecked):
    with pytest.raises(error, match=message):
        feature_extractor(*arguments)
