"""The article's layer, taps that nobody looks at, and compiled models."""

import copy
import pickle
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cln_tutorial.intermediate_variables.capture import capture
from cln_tutorial.intermediate_variables.tap import Tap


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Normalized(nn.Module):
    """The layer of the article: its input, normalised to length 1, times a learned scalar."""

    def __init__(self, tapped):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.x_normalized = Tap() if tapped else nn.Identity()

    def forward(self, x):
        x = F.normalize(x, dim=-1)
        return self.scale * (self.x_normalized(x) if isinstance(self.x_normalized, Tap) else x)


def article(tapped=True):
    return nn.Sequential(nn.Linear(4, 5), Normalized(tapped), nn.Linear(5, 2))


# --- the article's wish ---------------------------------------------------------------------------


def test_a_tap_sees_the_tensor_inside_the_articles_layer_bit_for_bit():
    model, x = article(), torch.randn(7, 4)
    with capture(model, "1.x_normalized") as captured:
        model(x)
    expected = F.normalize(model[0](x), dim=-1)
    assert captured["1.x_normalized"].equal(expected)
    assert not captured["1.x_normalized"].requires_grad


def test_without_a_tap_no_module_of_the_articles_layer_returns_the_tensor():
    model, x = article(tapped=False), torch.randn(7, 4)
    with capture(model, predicate=lambda name, module: True) as captured:
        model(x)
    expected = F.normalize(model[0](x), dim=-1)
    assert not any(value.equal(expected) for value in captured.values() if value.ndim == 2)
    assert "1.x_normalized" not in captured  # the module is there, and nothing passes it


# --- taps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.ones(2), None, (torch.ones(1), 3), {"a": "b"}])
def test_a_tap_returns_the_very_object(value):
    assert Tap()(value) is value


def test_taps_leave_the_state_dict_and_the_parameters_as_they_were():
    with_taps = nn.Sequential(nn.Linear(2, 3), Tap("h"))
    without = nn.Sequential(nn.Linear(2, 3))
    assert list(with_taps.state_dict()) == list(without.state_dict())
    assert with_taps.load_state_dict(without.state_dict()).missing_keys == []
    assert len(list(with_taps.parameters())) == 2
    assert not list(Tap().buffers())


def test_a_tap_shows_its_name():
    assert repr(Tap("scores")) == "Tap('scores')"
    assert repr(Tap()) == "Tap()"


def test_taps_can_be_copied_and_pickled():
    for twin in [copy.deepcopy(Tap("h")), pickle.loads(pickle.dumps(Tap("h")))]:
        assert twin.name == "h"


@pytest.mark.parametrize(("error", "name"), [(TypeError, 3), (ValueError, "")])
def test_what_is_no_name_of_a_tap_is_refused(error, name, unchecked):
    with pytest.raises(error, match="`name` must"):
        Tap(name)


def test_a_model_with_taps_can_be_scripted():
    model = nn.Sequential(nn.Linear(2, 3), Tap("h"), Tap())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scripting itself is deprecated
        scripted = torch.jit.script(model)
    x = torch.randn(4, 2)
    assert scripted(x).equal(model(x))


def test_inactive_taps_pass_through_vmap_and_functional_call_and_their_gradients():
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    tapped = nn.Sequential(plain[0], Tap("h"), plain[1], Tap())
    weights, x = dict(tapped.named_parameters()), torch.randn(4, 2)

    def loss(weights, row):
        return torch.func.functional_call(tapped, weights, (row,)).square().sum()

    per_row = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for n, row in enumerate(x):
        expected = torch.autograd.grad(plain(row).square().sum(), list(plain.parameters()))
        for found, grad in zip(per_row.values(), expected, strict=True):
            # sums of two terms of order one, in another order: a few times 2^-24
            assert torch.allclose(found[n], grad, atol=1e-6)


# --- compiled models ------------------------------------------------------------------------------

COMPILED = textwrap.dedent(
    """
    import sys
    import torch
    from torch import nn
    from cln_tutorial.intermediate_variables.capture import capture
    from cln_tutorial.intermediate_variables.extractor import feature_extractor
    from cln_tutorial.intermediate_variables.tap import Tap

    module = sys.modules["cln_tutorial.intermediate_variables.capture"]  # not the function
    assert "torch._dynamo" not in sys.modules, "the import is not cheap"
    torch.manual_seed(0)
    x = torch.randn(5, 3)

    def network():
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), Tap("h"), nn.Linear(4, 2))

    # compiled inside the context, by the first import of the compiler in this process
    model = network()
    with capture(model) as captured:
        assert torch.compile(model, backend="aot_eager")(x).equal(captured["3"])
    assert "torch._dynamo" in sys.modules
    assert list(captured) == ["0", "1", "h", "3"]
    assert all(not m._forward_hooks for m in model.modules())

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # inactive taps do not break the graph, nor change the output
    model = network()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    assert compiled(x).equal(model(x)) and len(graphs) == 1

    # a model compiled before is seen whole, under its own names, and is not compiled anew
    for _ in range(3):
        with capture(compiled, grads=True) as captured:
            y = compiled(x)
            y.sum().backward()
        assert list(captured) == ["0", "1", "h", "3"]
        assert captured["0"].equal(model[0](x)) and captured["0"].min() < 0
        assert captured["3"].equal(y) and captured.grad("3").equal(torch.ones(5, 2))
        assert compiled(x).equal(y)
    assert len(graphs) == 1

    # after an exception too, and after two captures that end in another order than they began
    try:
        with capture(compiled):
            raise KeyError
    except KeyError:
        pass
    one, two = capture(compiled), capture(compiled)
    one.__enter__(), two.__enter__()
    compiled(x)
    one.__exit__(None, None, None)
    with capture(compiled) as third:
        compiled(x)
    assert len(third) == 4 and len(graphs) == 1
    two.__exit__(None, None, None)
    assert module._stances == []
    torch.compile(nn.Sequential(nn.Linear(3, 1)), backend=counting)(x)
    assert len(graphs) == 2, "the compiler stayed switched off"

    # the caller's own stance is given back
    with torch.compiler.set_stance("fail_on_recompile"):
        with capture(compiled):
            compiled(x)
        assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"

    # compiled parts of a model, in both ways
    whole = nn.Sequential(torch.compile(network(), backend=counting), network())
    whole[1] = nn.Sequential(nn.Linear(2, 3), network())
    whole[1].compile(backend=counting)
    with capture(whole) as captured:
        y = whole(x)
    assert list(captured) == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1.0", "1.1.1", "1.1.2", "1.1.3"]
    assert captured["1.1.3"].equal(y)
    with capture(compiled, "") as captured:
        compiled(x)
    assert captured[""].equal(compiled(x))

    # the extractor; and what cannot be done says so
    graphs.clear()
    features = feature_extractor(compiled, "0")
    assert features(x)["0"].equal(model[0](x)) and graphs == []
    try:
        torch.compile(features, backend="eager")(x)
    except RuntimeError as error:
        assert "inside a compiled function" in str(error)
    else:
        raise AssertionError("captured inside a compiled function")
    print("done")
    """
)


def test_compiled_models_are_seen_whole_and_stay_compiled(child_output):
    assert child_output(COMPILED) == "done\n"


# --- somebody else's model ------------------------------------------------------------------------


LAYERS = [f"encoder.layer.{n}" for n in range(3)]


def test_the_layers_of_a_bert_are_its_own_hidden_states():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    model = BertModel(config).eval()
    tokens = torch.randint(50, (2, 7))
    with torch.no_grad(), capture(model, ["", "embeddings", *LAYERS]) as captured:
        model(tokens, output_hidden_states=True)
        expected = model(tokens, output_hidden_states=True)
    assert type(captured.calls("")[0]) is type(expected)
    assert captured.calls("")[0].last_hidden_state.equal(expected.last_hidden_state)
    for name, hidden in zip(["embeddings", *LAYERS], expected.hidden_states, strict=True):
        for call in captured.calls(name):
            assert (call[0] if isinstance(call, tuple) else call).equal(hidden)
