"""Conditional norms in whole models: tiny random ones of torch and transformers, and fold."""

import _thread
import contextlib
import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from cln_tutorial.conditional_norm import (
    AdaLNZero,
    ConditionalLayerNorm,
    ConditionalRMSNorm,
    condition,
    conditional_parameters,
    conditional_rms_norm,
    convert_layer_norms,
    fold,
    fold_into_linear,
    freeze_base,
    gated_residual,
    gated_residual_modulated_layer_norm,
    modulated_layer_norm,
)
from cln_tutorial.conditional_norm.modules import ConditionalNorm

COND, VOCABULARY = 4, 50
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def make_bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config)


def make_gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def make_t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def make_llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def make_mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER))


def make_qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER))


def make_vit():
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def make_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def make_decoder():
    layer = nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(32))


# The maker, and how many norms it has.
MODELS = {
    "BERT": (make_bert, 5),
    "GPT-2": (make_gpt2, 5),
    "T5": (make_t5, 12),
    "Llama": (make_llama, 5),
    "Mistral": (make_mistral, 5),
    "Qwen2": (make_qwen2, 5),
    "ViT": (make_vit, 5),
    "nn.TransformerEncoder": (make_encoder, 4),
    "nn.TransformerDecoder": (make_decoder, 7),
}
OF_TRANSFORMERS = [name for name in MODELS if not name.startswith("nn.")]
# They take the statistics in float32 even where the model is float64; a conditional norm does not.
FLOAT32_INSIDE = ("T5", "Llama", "Mistral", "Qwen2")


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def make(name, dtype=torch.float32):
    """A model whose norms are not the ones and zeros they start as."""
    model = MODELS[name][0]().to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs_of(name, dtype=torch.float32, batch=3):
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (2, batch, 7), generator=rng)
    x = torch.randn(2, batch, 7, 32, generator=rng).to(dtype)
    return {
        "T5": {"input_ids": tokens[0], "decoder_input_ids": tokens[1, :, :5]},
        "ViT": {"pixel_values": torch.randn(batch, 3, 8, 8, generator=rng).to(dtype)},
        "nn.TransformerEncoder": {"src": x[0]},
        "nn.TransformerDecoder": {"tgt": x[0], "memory": x[1]},
    }.get(name, {"input_ids": tokens[0]})


def output(name, model, cond=None, batch=slice(None)):
    dtype = next(model.parameters()).dtype
    inputs = {key: value[batch] for key, value in inputs_of(name, dtype).items()}
    with condition(model, cond) if cond is not None else contextlib.nullcontext():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def trained(model):
    """As after training: a projection of zeros could not show a lost or mixed-up condition."""
    for parameter in conditional_parameters(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- every model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_a_converted_model_starts_as_what_it_was_under_any_condition(name, dtype, hidden_dim):
    model = make(name, dtype)
    keys = list(model.state_dict())
    with torch.no_grad():
        before = output(name, model)
        assert convert_layer_norms(model, COND, hidden_dim=hidden_dim) is model
        norms = [m for m in model.modules() if isinstance(m, ConditionalNorm)]
        assert len(norms) == MODELS[name][1]
        assert [key for key in model.state_dict() if "cond_proj" not in key] == keys
        # Bit for bit without a condition: the norm calls what it was before.
        assert output(name, model).equal(before)
        # The rounding of the scale apart (E6), through every layer.
        exact = dtype == torch.float64 and name not in FLOAT32_INSIDE
        for size in (1.0, 1e6):
            cond = size * torch.randn(3, COND, dtype=dtype)
            assert difference(output(name, model, cond), before) <= (1e-12 if exact else 2e-6)


def test_two_conditions_differ_and_the_gradient_reaches_projection_and_condition(name):
    model = trained(convert_layer_norms(make(name), COND))
    cond = torch.randn(3, COND, requires_grad=True)
    y = output(name, model, cond)
    assert difference(output(name, model, cond.roll(1, 0)), y) > 0.05
    assert difference(output(name, model), y) > 0.05
    assert difference(output(name, model, cond[:1])[0], y[0]) <= 2e-6  # one for all
    (y * torch.randn_like(y)).sum().backward()
    assert (cond.grad.abs().amax(dim=1) > 1e-3).all()
    for key, parameter in conditional_parameters(model).items():
        assert parameter.grad.abs().max() > 1e-6, key


def test_ten_steps_with_a_frozen_base_make_the_output_depend_on_the_condition(name):
    model = freeze_base(convert_layer_norms(make(name), COND))
    before = output(name, model).detach()
    cond, target = torch.randn(3, COND), torch.randn_like(before)
    new = conditional_parameters(model)
    optimiser = torch.optim.Adam(new.values(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(output(name, model, cond), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is None for key, p in model.named_parameters() if key not in new)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        y = output(name, model, cond)
        assert difference(output(name, model, cond.roll(1, 0)), y) > 0.01
        assert output(name, model).equal(before)  # the base has not moved


@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_a_folded_model_is_the_plain_class_again_and_computes_the_same(name, hidden_dim):
    plain = make(name)
    model = trained(convert_layer_norms(copy.deepcopy(plain), COND, hidden_dim=hidden_dim))
    cond = torch.randn(3, COND)
    with torch.no_grad():
        y = output(name, model, cond)
        for b in range(2):
            folded = fold(model, cond[b])
            assert list(map(type, folded.modules())) == list(map(type, plain.modules()))
            fresh = MODELS[name][0]().eval()
            fresh.load_state_dict(folded.state_dict(), strict=True)
            alone = output(name, fresh, batch=slice(b, b + 1))
            # Another batch, and in nn.TransformerEncoder another path, through every layer.
            assert difference(alone[0], y[b]) <= 1e-5
            assert output(name, folded, batch=slice(b, b + 1)).equal(alone)


def test_training_and_evaluation_mode_agree_under_a_condition(name):
    # P1: the fused path of nn.TransformerEncoder, taken in evaluation only, calls no norm.
    model = trained(convert_layer_norms(make(name), COND))
    cond = torch.randn(3, COND)
    slow = output(name, model.train(), cond).detach()
    with torch.no_grad():
        assert difference(output(name, model.eval(), cond), slow) <= 2e-6


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_gradient_checkpointing_inside_the_block_gives_the_same_gradients(name, use_reentrant):
    # P2: the layers run again during the backward pass, which must see the condition as well.
    model = trained(convert_layer_norms(make(name), COND)).train()
    cond = torch.randn(3, COND, requires_grad=True)

    def gradients():
        model.zero_grad()
        cond.grad = None
        with condition(model, cond):
            extra = {"use_cache": False} if name not in ("BERT", "ViT") else {}
            y = model(**inputs_of(name), **extra)[0]
            (y * y.detach().cos()).sum().backward()
        found = [cond.grad, *(p.grad for p in conditional_parameters(model).values())]
        return [gradient.clone() for gradient in found]

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    norms = [m for m in model.modules() if isinstance(m, ConditionalNorm)]
    calls = []
    norms[len(norms) // 2].register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients()
    assert len(calls) == 2  # it did run again
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) <= 1e-5  # sums in another order


def test_under_reentrant_checkpointing_a_computed_condition_needs_a_leaf_of_its_own():
    model, encoder = trained(convert_layer_norms(make_gpt2(), COND)), nn.Embedding(2, COND)
    label = torch.tensor([0, 1, 0])

    def backward(cond):
        encoder.zero_grad()
        with condition(model, cond):
            y = model(**inputs_of("GPT-2"), use_cache=False)[0]
            y.square().sum().backward()

    backward(encoder(label))
    expected = encoder.weight.grad.clone()
    model.train().activation_checkpointing_enable({"use_reentrant": True})
    # Each layer goes back through the encoder by itself. PyTorch refuses the second time.
    with pytest.raises(RuntimeError, match="second time"):
        backward(encoder(label))
    cond = encoder(label)
    leaf = cond.detach().requires_grad_()
    backward(leaf)
    cond.backward(leaf.grad)
    assert difference(encoder.weight.grad, expected) <= 1e-5


def run_in_a_thread(function, known):
    """Run to the end; ``known`` threads are Python's, others as those of the engine of a GPU."""
    done, caught = threading.Event(), []

    def run():
        try:
            function()
        except RuntimeError as error:
            caught.append(error)
        done.set()

    threading.Thread(target=run).start() if known else _thread.start_new_thread(run, ())
    assert done.wait(60)
    return caught


def test_the_backward_pass_of_a_gpu_finds_the_block_of_the_thread_that_called_it():
    """Its thread belongs to the engine; here one stands in that Python does not know either."""
    model = trained(convert_layer_norms(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), COND))
    x, cond = torch.randn(2, 5, 8), torch.randn(2, COND)
    (parameter,) = conditional_parameters(model).values()
    with condition(model, cond):
        expected = torch.autograd.grad(model(x).square().sum(), parameter)[0]
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
        assert not run_in_a_thread(loss.backward, known=False)
        assert torch.allclose(parameter.grad, expected)
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
        (error,) = run_in_a_thread(loss.backward, known=True)  # a thread of the user has no block
        assert "block has ended" in str(error)
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
    (error,) = run_in_a_thread(loss.backward, known=False)
    assert "block has ended" in str(error)


def test_a_checkpoint_without_a_condition_says_so_with_a_block():
    model = trained(convert_layer_norms(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), COND))
    x = torch.randn(2, 5, 8)
    with condition(model, torch.randn(2, COND)):
        model(x)

    def unconditioned(x):
        with condition(model, None):
            return model(x)

    with pytest.raises(RuntimeError, match=r"open `condition\(model, None\)` there"):
        checkpoint(model, x, use_reentrant=False).sum().backward()
    checkpoint(unconditioned, x, use_reentrant=False).sum().backward()


def test_a_registered_norm_that_was_changed_is_not_folded_into_a_linear_layer(monkeypatch):
    def one_more(norm, x):
        return F.rms_norm(x, x.shape[-1:], 1 + norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", one_more)
    with pytest.raises(ValueError, match="LlamaRMSNorm that computes something of its own"):
        fold_into_linear(LlamaRMSNorm(8), nn.Linear(8, 3))


# The compiler cannot look into the run-time shape checks of the suite, and warns of itself.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_and_an_exported_model_take_the_condition_of_each_call():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8))
    model = trained(convert_layer_norms(model, COND))
    x, conds = torch.randn(2, 5, 8), torch.randn(3, 2, COND)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for cond in (*conds, None):
        with condition(model, cond):
            assert difference(compiled(x), model(x)) <= 1e-6
    assert difference(compiled(x), model(x)) <= 1e-6  # and no condition at all

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, cond):
            with condition(self.model, cond):
                return self.model(x)

    program = torch.export.export(Conditioned(), (x, conds[0])).module()
    for cond in conds:
        assert difference(program(x, cond), Conditioned()(x, cond)) <= 1e-6
    assert difference(program(x, conds[0]), program(x, conds[1])) > 0.01


@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_copies_pickles_and_saved_weights_compute_the_same(name, hidden_dim, tmp_path):
    model = trained(convert_layer_norms(make(name), COND, hidden_dim=hidden_dim))
    cond = torch.randn(3, COND)
    loaded = convert_layer_norms(make(name), COND, hidden_dim=hidden_dim)
    save_model(model, tmp_path / "weights.safetensors")  # knows weights that are shared
    load_model(loaded, tmp_path / "weights.safetensors")
    with torch.no_grad():
        y, base = output(name, model, cond), output(name, model)
        for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert output(name, twin, cond).equal(y)
            assert output(name, twin).equal(base)
            assert list(map(type, twin.modules())) == list(map(type, model.modules()))
            assert list(conditional_parameters(twin)) == list(conditional_parameters(model))
            # A copy of its own, in which the norms still share what they shared.
            next(iter(conditional_parameters(twin).values())).data += 1
            assert not output(name, twin, cond).equal(y)
        assert output(name, model, cond).equal(y)


def test_conversion_twice_changes_no_class_and_no_weight(name):
    model = trained(convert_layer_norms(make(name), COND, hidden_dim=6))
    classes, before = list(map(type, model.modules())), model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    convert_layer_norms(model, COND, hidden_dim=6)
    assert list(map(type, model.modules())) == classes
    assert list(model.state_dict()) == list(before)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())


# --- beams (P3) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
def test_beam_search_follows_the_condition_of_each_example(name):
    model = trained(convert_layer_norms(make(name), COND))
    tokens, cond = inputs_of(name)["input_ids"], 3 * torch.randn(3, COND)

    def generate(rows, cond, **options):
        with condition(model, cond, **options):
            return model.generate(
                tokens[rows],
                attention_mask=torch.ones_like(tokens[rows]),
                num_beams=3,
                do_sample=False,
                max_new_tokens=8,
            )

    together = generate(slice(None), cond, expand_beams=True)
    alone = torch.cat([generate([b], cond[b : b + 1]) for b in range(3)])
    assert together.equal(alone)
    # The condition matters here: with those of other examples other tokens come out.
    assert not generate(slice(None), cond.roll(1, 0), expand_beams=True).equal(together)
    with pytest.raises(
        ValueError, match=r"got 3\. For beams write `condition\(.*expand_beams=True"
    ):
        generate(slice(None), cond)


def test_expanded_beams_repeat_each_condition_in_turn():
    norm = trained(nn.Sequential(ConditionalLayerNorm(8, COND)))[0]
    x, cond = torch.randn(6, 2, 8), torch.randn(2, COND)
    for beams in (1, 3):
        rows = x[: 2 * beams]
        with condition(norm, cond, expand_beams=True):
            expected = norm(rows, cond.repeat_interleave(beams, dim=0))
            assert difference(norm(rows), expected) <= 2e-6  # a product of more rows
    with condition(norm, cond, expand_beams=True), pytest.raises(ValueError, match="got 2"):
        norm(x[:5])
    with condition(norm, cond[:0], expand_beams=True), pytest.raises(ValueError, match="got 0"):
        norm(x)


# --- the RMS norm ---------------------------------------------------------------------------------


def random_norm(cls, dim=8, **options):
    norm = cls(dim, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    return norm


def test_the_conditional_rms_norm_scales_by_base_plus_projection_and_folds():
    norm = trained(nn.Sequential(random_norm(ConditionalRMSNorm, cond_dim=3, eps=1e-3)))[0]
    x, cond = torch.randn(4, 4, 8), torch.randn(4, 3)
    gamma, beta = norm.gamma_beta(cond)
    assert beta is None
    assert torch.allclose(gamma, norm.weight + cond @ norm.cond_proj.weight.T, atol=1e-6)
    assert norm(x, cond).equal(conditional_rms_norm(x, gamma, eps=1e-3))
    folded = norm.fold(cond[0])
    assert type(folded) is nn.RMSNorm
    assert vars(folded).keys() == vars(nn.RMSNorm(8)).keys()
    assert torch.allclose(folded(x[0]), norm(x, cond)[0], atol=2e-6)
    assert norm(x).equal(F.rms_norm(x, (8,), norm.weight, 1e-3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_epsilon_of_none_is_that_of_the_computation_as_in_torch(dtype):
    plain = random_norm(nn.RMSNorm, dtype=dtype)
    norm = ConditionalRMSNorm.from_rms_norm(plain, cond_dim=3)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # Rows as small as the root of epsilon: an epsilon off by half changes the output by a fifth.
    x = (eps**0.5 * (1 + torch.rand(2, 5, 8))).to(dtype)
    y = norm(x, torch.randn(2, 3, dtype=dtype))
    assert difference(y.double(), plain(x).double()) <= 2 * torch.finfo(dtype).eps


def test_from_rms_norm_copies_everything_and_leaves_the_original_alone():
    plain = random_norm(nn.RMSNorm, eps=1e-4, dtype=torch.float64).eval()
    plain.weight.requires_grad_(False)
    norm = ConditionalRMSNorm.from_rms_norm(plain, 3, hidden_dim=5, hidden_act="tanh")
    assert (norm.eps, norm.training, norm.weight.requires_grad) == (1e-4, False, False)
    assert norm.cond_proj[0].weight.dtype == torch.float64
    assert isinstance(norm.cond_proj[1], nn.Tanh)
    assert norm.weight.equal(plain.weight)
    norm.weight.data += 1
    assert not norm.weight.equal(plain.weight)
    assert type(plain) is nn.RMSNorm


@pytest.mark.parametrize("cls", [ConditionalLayerNorm, ConditionalRMSNorm])
@pytest.mark.parametrize("zero_init", [True, False])
def test_reset_parameters_starts_base_and_projection_anew(cls, zero_init):
    norm = random_norm(cls, cond_dim=3, hidden_dim=5, zero_init=zero_init)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    norm.reset_parameters()
    assert norm.weight.equal(torch.ones(8))
    assert getattr(norm, "bias", None) is None or not norm.bias.any()
    assert norm.cond_proj[2].weight.any() == (not zero_init)
    for key in ("cond_proj.0.weight", "cond_proj.2.weight"):
        weight = norm.state_dict()[key]
        assert not weight.equal(before[key])
        assert weight.abs().max() <= 5**-0.5 or key == "cond_proj.0.weight"
    assert norm.cond_proj[0].weight.any()


# --- norms of other classes -----------------------------------------------------------------------


class Special(nn.LayerNorm):
    """Calls `super` and a method of its own, which a change of class must not take away."""

    def own_name(self):
        return "special"

    def forward(self, x):
        assert self.own_name() == "special"
        return super().forward(x) * 1.0


class BiasedRMS(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.epsilon = 1e-3

    def forward(self, x):
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + self.epsilon).sqrt() * self.weight + self.bias


@pytest.mark.parametrize("cls", [Special, BiasedRMS])
def test_an_extra_type_keeps_what_it_is_and_does_and_gets_its_class_back(cls):
    plain = random_norm(cls)
    model = convert_layer_norms(nn.Sequential(copy.deepcopy(plain)), COND, extra_types=[cls])
    x, cond = torch.randn(3, 5, 8), torch.randn(3, COND)
    assert isinstance(model[0], cls)
    assert type(model[0]).__name__ == f"Conditional{cls.__name__}"
    assert model(x).equal(plain(x))
    y = trained(model)[0](x, cond)
    assert model[0].gamma_beta(cond)[1].shape == (3, 8)
    for b in range(3):
        folded = fold(model, cond[b])[0]
        assert type(folded) is cls
        assert vars(folded).keys() == vars(plain).keys()
        assert difference(folded(x[b]), y[b]) <= 2e-6
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])


KNOWN = [T5LayerNorm, LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", KNOWN)
def test_known_classes_are_recognised_in_every_dtype_and_on_the_meta_device(cls, dtype):
    norm, without_storage = (random_norm(cls, dim=64).to(dtype) for _ in range(2))
    without_storage.to("meta")
    convert_layer_norms(nn.Sequential(without_storage), COND)
    assert without_storage.cond_proj.weight.is_meta

    before, state, calls = norm.weight.clone(), torch.get_rng_state(), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    convert_layer_norms(nn.Sequential(norm), COND)
    after = torch.get_rng_state()
    # The trial leaves no trace: weight, mode, hooks, and of the random numbers the projection's.
    torch.set_rng_state(state)
    nn.Linear(COND, 64, bias=False, dtype=dtype)
    assert after.equal(torch.get_rng_state())
    assert norm.weight.equal(before)
    assert norm.training
    assert not calls


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", KNOWN)
def test_a_known_norm_hands_on_the_dtype_that_it_did_before(cls, x_dtype):
    # `transformers` keeps a layer of a half T5 in float32, and its norms bring the result back.
    norm = cls(8).to(torch.bfloat16)
    x = torch.randn(2, 3, 8, dtype=x_dtype)
    expected = norm(x)
    convert_layer_norms(nn.Sequential(norm), COND)
    y = norm(x, torch.randn(2, COND, dtype=torch.bfloat16))
    assert y.dtype == expected.dtype
    assert difference(y.double(), expected.double()) <= 2 * torch.finfo(torch.bfloat16).eps


class UnbiasedVariance(nn.LayerNorm):
    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class EpsilonOutside(nn.LayerNorm):
    def forward(self, x):
        deviation = x.std(-1, keepdim=True, correction=0)
        return (x - x.mean(-1, keepdim=True)) / (deviation + self.eps) * self.weight + self.bias


class NoScale(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, None, self.bias, self.eps)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class NoEpsilon(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


STRANGE = [GemmaRMSNorm, UnbiasedVariance, EpsilonOutside, NoScale, ChannelsFirst]


@pytest.mark.parametrize("cls", STRANGE)
def test_a_class_that_computes_something_else_is_refused_by_name_and_nothing_changes(cls):
    model = nn.Sequential(nn.LayerNorm(8), cls(8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"Nothing was converted: 1 is a {cls.__name__}, which"):
        convert_layer_norms(model, COND, extra_types=[cls])
    assert [type(m) for m in model] == [nn.LayerNorm, cls]
    assert list(model.state_dict()) == list(before)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())


def test_a_class_that_was_not_named_is_left_alone():
    model = nn.Sequential(nn.LayerNorm(8), Special(8), GemmaRMSNorm(8))
    convert_layer_norms(model, COND)
    assert [type(m) for m in model] == [ConditionalLayerNorm, Special, GemmaRMSNorm]


# --- a shared hidden layer ------------------------------------------------------------------------


def test_all_norms_share_one_hidden_layer_and_only_the_last_layers_start_at_zero():
    model = convert_layer_norms(make_llama(), COND, hidden_dim=6)
    norms = [m for m in model.modules() if isinstance(m, ConditionalNorm)]
    assert len({id(norm.cond_proj[0]) for norm in norms}) == 1
    assert len({id(norm.cond_proj[2]) for norm in norms}) == len(norms)
    assert norms[0].cond_proj[0].weight.any()
    assert not any(norm.cond_proj[2].weight.any() for norm in norms)
    names = list(conditional_parameters(model))
    assert sum(name.endswith("cond_proj.0.weight") for name in names) == 1
    assert len(names) == 1 + len(norms)
    assert sum(key.endswith("cond_proj.0.weight") for key in model.state_dict()) == len(norms)

    alone = convert_layer_norms(make_llama(), COND, hidden_dim=6, share_hidden=False)
    assert len(conditional_parameters(alone)) == 2 * len(norms)


def test_norms_converted_later_take_the_hidden_layer_of_the_earlier_ones():
    model = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8, dtype=torch.float64))
    convert_layer_norms(model, COND, hidden_dim=6, where=lambda name, norm: name == "1")
    hidden = model[1].cond_proj[0]
    convert_layer_norms(model, COND, hidden_dim=6)
    assert model[0].cond_proj[0] is model[1].cond_proj[0] is hidden
    assert model[2].cond_proj[0].weight.dtype == torch.float64  # one for each dtype


# --- fold into the linear layer -------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm, T5LayerNorm, LlamaRMSNorm])
def test_scale_and_shift_move_into_the_linear_layer(cls, biased):
    norm = random_norm(cls, dim=32).double().eval()
    linear = nn.Linear(32, 16, bias=biased).double()
    x, state = torch.randn(5, 7, 32, dtype=torch.float64), copy.deepcopy(linear.state_dict())
    expected = linear(norm(x))
    bare, folded = fold_into_linear(norm, linear)
    assert type(bare) is (nn.LayerNorm if cls is nn.LayerNorm else nn.RMSNorm)
    assert not list(bare.parameters())
    assert bare.training is False
    assert (folded.bias is not None) == (biased or cls is nn.LayerNorm)
    assert all(value.equal(linear.state_dict()[key]) for key, value in state.items())
    # The products alone are rounded otherwise: some ulps of the largest output. T5 and Llama take
    # their statistics in float32.
    exact = cls in (nn.LayerNorm, nn.RMSNorm)
    assert difference(folded(bare(x)), expected) <= (4 * 2.3e-16 if exact else 1e-6)


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm])
def test_the_moved_weights_are_the_closed_form(cls):
    norm, linear = random_norm(cls, eps=1e-3), nn.Linear(8, 3).requires_grad_(False)
    bare, folded = fold_into_linear(norm, linear)
    assert bare.eps == 1e-3
    assert folded.weight.equal(linear.weight @ torch.diag(norm.weight))
    if cls is nn.LayerNorm:
        assert torch.allclose(folded.bias, linear.bias + linear.weight @ norm.bias, atol=1e-6)
    assert not any(p.requires_grad for p in folded.parameters())


def test_a_condition_is_folded_into_the_norm_and_then_into_the_layer():
    norm = trained(nn.Sequential(random_norm(ConditionalLayerNorm, dim=32, cond_dim=3)))[0]
    linear, x, cond = nn.Linear(32, 16), torch.randn(5, 7, 32), torch.randn(1, 3)
    bare, folded = fold_into_linear(norm.fold(cond), linear)
    assert difference(folded(bare(x)), linear(norm(x, cond))) <= 1e-6


def test_a_norm_without_parameters_leaves_the_layer_as_it_is():
    linear = nn.Linear(8, 3)
    _, folded = fold_into_linear(nn.LayerNorm(8, elementwise_affine=False), linear)
    assert folded is not linear
    assert folded.weight.equal(linear.weight)
    assert folded.bias.equal(linear.bias)


# --- adaLN-Zero -----------------------------------------------------------------------------------


def test_adaln_zero_gives_vectors_of_zero_that_learn_at_once():
    ada = AdaLNZero(8, cond_dim=3)
    cond = torch.randn(2, 3)
    vectors = ada(cond)
    assert len(vectors) == 6
    assert all(vector.equal(torch.zeros(2, 8)) for vector in vectors)
    # dW = dy silu(c)^T, row after row of the six outputs.
    (vectors[2] * torch.arange(8.0)).sum().backward()
    expected = torch.zeros(48, 3)
    expected[16:24] = torch.arange(8.0)[:, None] * F.silu(cond).sum(0)
    assert torch.allclose(ada.linear.weight.grad, expected, atol=1e-6)


def test_adaln_zero_is_the_linear_layer_of_silu_cut_into_outputs():
    ada = AdaLNZero(8, cond_dim=3, n_outputs=2, dtype=torch.float64)
    nn.init.normal_(ada.linear.weight)
    nn.init.normal_(ada.linear.bias)
    cond = torch.randn(2, 3)  # narrower floats are widened
    shift, scale = ada(cond)
    y = F.silu(cond.double()) @ ada.linear.weight.T + ada.linear.bias
    assert torch.allclose(torch.cat([shift, scale], dim=1), y, atol=1e-14)
    ada.reset_parameters()
    assert not any(p.any() for p in ada.parameters())


def test_a_block_under_adaln_zero_starts_as_the_identity_and_opens():
    attention, mlp, ada = nn.Linear(8, 8), nn.Linear(8, 8), AdaLNZero(8, cond_dim=3)

    def block(x, cond):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = ada(cond)
        h = attention(modulated_layer_norm(x, scale_1, shift_1))
        x, h = gated_residual_modulated_layer_norm(x, h, gate_1, scale_2, shift_2)
        return gated_residual(x, mlp(h), gate_2)

    x, cond, target = torch.randn(2, 5, 8), torch.randn(2, 3), torch.randn(2, 5, 8)
    assert block(x, cond).equal(x)
    F.mse_loss(block(x, cond), target).backward()
    with torch.no_grad():
        for parameter in ada.parameters():
            parameter -= parameter.grad
    assert F.mse_loss(block(x, cond), target) < F.mse_loss(x, target)


# --- wrong input ----------------------------------------------------------------------------------


def two(*norms):
    return nn.Sequential(nn.Linear(8, 8), *norms)


def with_own_forward():
    norm = nn.LayerNorm(8)
    norm.forward = F.relu
    return two(norm)


LINEAR = nn.Linear(8, 3)
WRONG_CALLS = {
    "another norm for from_rms_norm": (
        lambda: ConditionalRMSNorm.from_rms_norm(nn.LayerNorm(8), 3),
        TypeError,
        r"`rms_norm` must be an nn.RMSNorm itself; got .*LayerNorm",
    ),
    "an RMS norm over several axes": (
        lambda: ConditionalRMSNorm((7, 8), 3),
        ValueError,
        r"The conditional norm has `normalized_shape` \(7, 8\), several axes",
    ),
    "an RMS norm without parameters": (
        lambda: ConditionalRMSNorm.from_rms_norm(nn.RMSNorm(8, elementwise_affine=False), 3),
        ValueError,
        r"`rms_norm` has no parameters for a condition to move",
    ),
    "the wrong batch for an RMS norm": (
        lambda: ConditionalRMSNorm(8, 3)(torch.zeros(4, 2, 8), torch.zeros(3, 3)),
        ValueError,
        r"one row per example of `x` \(4, 2, 8\).*got 3",
    ),
    "a class as condition of an RMS norm": (
        lambda: ConditionalRMSNorm(8, 3)(torch.zeros(4, 2, 8), torch.tensor([1, 0, 1, 0])),
        TypeError,
        r"got torch.int64. Embed a class first",
    ),
    "an instance as extra type": (
        lambda: convert_layer_norms(two(nn.LayerNorm(8)), 3, extra_types=[nn.LayerNorm(8)]),
        TypeError,
        r"`extra_types` must hold classes of modules; got LayerNorm",
    ),
    "a class without epsilon": (
        lambda: convert_layer_norms(two(NoEpsilon(8)), 3, extra_types=[NoEpsilon]),
        ValueError,
        r"Nothing was converted: 1 has no epsilon under one of the names .*variance_epsilon",
    ),
    "a class with a weight of two axes": (
        lambda: convert_layer_norms(two(nn.Embedding(2, 8)), 3, extra_types=[nn.Embedding]),
        ValueError,
        r"1 has `normalized_shape` \(2, 8\), several axes",
    ),
    "a norm with a forward of its own": (
        lambda: convert_layer_norms(with_own_forward(), 3),
        ValueError,
        r"1 has a `forward` of its own, which sees no condition; convert before",
    ),
    "only an unknown norm": (
        lambda: convert_layer_norms(two(GemmaRMSNorm(8)), 3),
        ValueError,
        r"holds no nn.LayerNorm .*registered.*Give other norms as `extra_types`",
    ),
    "another hidden layer than before": (
        lambda: convert_layer_norms(two(ConditionalRMSNorm(8, 3, 5)), 3, hidden_dim=6),
        ValueError,
        r"1 has a condition already, of sizes \[3, 5\]",
    ),
    "a conditional norm to fold into a layer": (
        lambda: fold_into_linear(ConditionalLayerNorm(8, 3), LINEAR),
        ValueError,
        r"`norm` has a condition; write `norm.fold\(cond\)` first",
    ),
    "no norm to fold into a layer": (
        lambda: fold_into_linear(nn.BatchNorm1d(8), LINEAR),
        TypeError,
        r"`norm` must be an nn.LayerNorm or nn.RMSNorm; got .*BatchNorm1d",
    ),
    "a norm of another function to fold": (
        lambda: fold_into_linear(GemmaRMSNorm(8), LINEAR),
        TypeError,
        r"`norm` must be .* got .*GemmaRMSNorm",
    ),
    "no linear layer to fold into": (
        lambda: fold_into_linear(nn.LayerNorm(8), transformers.pytorch_utils.Conv1D(3, 8)),
        TypeError,
        r"`linear` must be an nn.Linear itself; got .*Conv1D",
    ),
    "another width to fold into": (
        lambda: fold_into_linear(nn.RMSNorm(9), LINEAR),
        ValueError,
        r"`linear` takes 8 inputs, `norm` covers \(9,\); they must agree",
    ),
    "several axes to fold into": (
        lambda: fold_into_linear(nn.LayerNorm((2, 8)), LINEAR),
        ValueError,
        r"`norm` covers \(2, 8\)",
    ),
    "no width": (
        lambda: AdaLNZero(0, 3),
        ValueError,
        r"`dim` must be a whole number of 1 or more; got 0",
    ),
    "half an output": (
        lambda: AdaLNZero(8, 3, 2.5),
        ValueError,
        r"`n_outputs` must be a whole number of 1 or more; got 2.5",
    ),
    "a condition per token": (
        lambda: AdaLNZero(8, 3)(torch.zeros(2, 5, 3)),
        ValueError,
        r"`cond` must be .*3\); got \(2, 5, 3\)",
    ),
    "a class for adaLN": (
        lambda: AdaLNZero(8, 3)(torch.tensor([1, 2])),
        TypeError,
        r"got torch.int64. Embed a class first: `nn.Embedding\(num_classes, 3\)",
    ),
    "wider floats for adaLN": (
        lambda: AdaLNZero(8, 3)(torch.zeros(2, 3, dtype=torch.float64)),
        TypeError,
        r"write `cond.to\(torch.float32\)`",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused_and_the_message_says_why(call, error, message):
    with pytest.raises(error, match=message):
        call()
