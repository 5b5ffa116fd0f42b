"""The language model under a condition: its conditions, cache, samples, and what it can tell."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cln_tutorial.conditional_norm import (
    ConditionalLanguageModel,
    ConditionalLayerNorm,
    KeyValueCache,
    condition,
    fold,
    generative_classifier,
    sample,
    swap_label_gap,
    truncate_logits,
)

WAYS = ["norms", "last_norm", "last_shift", "modulated", "adaln_zero", "input", "prefix"]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def trained_condition(model, scale=0.3):
    """As after training: a projection of zeros could not show a lost or mixed-up condition."""
    for module in model.modules():
        if isinstance(module, ConditionalLayerNorm):
            for parameter in module.parameters():
                parameter.data += scale * torch.randn_like(parameter)
    return model


def small_language_model(num_classes=2, **sizes):
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "cond_dim": 5, "max_length": 12} | sizes
    return ConditionalLanguageModel(20, num_classes=num_classes, **sizes)


def test_plain_and_conditional_model_of_one_seed_start_as_the_same_function():
    tokens, label = torch.randint(1, 20, (3, 9)), torch.tensor([0, 1, 1])
    torch.manual_seed(5)
    plain = small_language_model(num_classes=None)
    torch.manual_seed(5)
    conditional = small_language_model()
    assert conditional(tokens).equal(plain(tokens))
    # Logits of order 0.1 at the start: some float32 roundings.
    assert (conditional(tokens, label) - plain(tokens)).abs().max() <= 1e-6
    assert not any(isinstance(m, ConditionalLayerNorm) for m in plain.modules())
    assert sum(isinstance(m, ConditionalLayerNorm) for m in conditional.modules()) == 5


@pytest.mark.parametrize("dim", [32, 128])
def test_the_logits_of_other_tokens_start_with_variance_one_quarter_at_any_width(dim):
    # Final states have norm sqrt(dim), and every other token's embedding, of std 0.5 dim^-0.5, is
    # independent of them.
    torch.manual_seed(7)
    model = ConditionalLanguageModel(2000, dim=dim, num_layers=2, num_heads=2)
    tokens = torch.randint(1, 1000, (20, 12))
    # 1000 independent embeddings: relative error of their mean square sqrt(2 / (1000 dim)) < 1 %,
    # of the states' spread over the positions less than that; 5 % leaves room for both.
    assert model(tokens)[:, :, 1000:].var().item() == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("position", [0, 4, 8])
def test_a_changed_token_leaves_all_earlier_logits_unchanged(position):
    model = trained_condition(small_language_model()).double()
    tokens, label = torch.randint(1, 10, (3, 9)), torch.tensor([0, 1, 1])
    changed = tokens.clone()
    changed[:, position] += 10
    difference = (model(changed, label) - model(tokens, label)).abs().amax(dim=(0, 2))
    assert (difference[:position] <= 1e-14).all()  # other blocking of the same sums at most
    assert (difference[position:] > 1e-6).all()


def test_nll_is_the_plain_sum_of_log_softmax():
    model = trained_condition(small_language_model())
    tokens, label = torch.randint(1, 20, (3, 9)), torch.tensor([0, 1, 1])
    log_probs = model(tokens, label).log_softmax(-1)
    expected = [-sum(log_probs[b, t, tokens[b, t + 1]] for t in range(8)).item() for b in range(3)]
    assert model.nll(tokens, label).tolist() == pytest.approx(expected, rel=1e-5)  # float32 sums


@pytest.mark.parametrize("padding", [0, 19])
def test_padding_does_not_change_nll_nor_its_gradient(padding):
    model = trained_condition(small_language_model(padding=padding)).double()
    label = torch.tensor([1, 0])
    long, short = torch.randint(1, 19, (1, 9)), torch.randint(1, 19, (1, 5))
    alone = torch.cat([model.nll(long, label[:1]), model.nll(short, label[1:])])
    alone.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    batch = torch.full((2, 12), padding)
    batch[0, :9], batch[1, :5] = long, short
    together = model.nll(batch, label)
    together.sum().backward()
    assert torch.allclose(together, alone, rtol=1e-13)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-10, atol=1e-13), name


def test_texts_without_a_target_have_nll_zero():
    model = small_language_model()
    label = torch.tensor([0, 1])
    assert model.nll(torch.tensor([[7, 0, 0], [0, 0, 0]]), label).tolist() == [0.0, 0.0]
    assert model.nll(torch.ones(2, 1, dtype=torch.int64), label).tolist() == [0.0, 0.0]
    assert model.nll(torch.ones(0, 4, dtype=torch.int64), label[:0]).shape == (0,)
    assert model(torch.ones(2, 0, dtype=torch.int64), label).shape == (2, 0, 20)


def test_each_text_is_read_under_its_own_label():
    model = trained_condition(small_language_model()).double()
    tokens = torch.randint(
        1, 20, (2, 9)
    )  # two texts, so that one label per text looks like a table
    for labels in ([0, 1], [1, 0], [1, 1]):
        logits = model(tokens, torch.tensor(labels))
        for b, label in enumerate(labels):
            alone = model(tokens[b : b + 1], torch.tensor([label]))[0]
            assert torch.allclose(logits[b], alone, atol=1e-12)
    labels = torch.tensor([0, 1])
    assert (model(tokens, labels) - model(tokens, 1 - labels)).abs().max() > 1e-2


def test_a_block_around_the_model_conditions_it_on_any_vector():
    model = trained_condition(small_language_model())
    tokens = torch.randint(1, 20, (2, 9))
    between = model.class_embedding.weight.mean(0, keepdim=True)
    with condition(model, between):
        y = model(tokens)
    assert torch.allclose(y, fold(model, between)(tokens), atol=1e-5)
    assert not torch.allclose(y, model(tokens), atol=1e-2)


@pytest.mark.parametrize("label", [0, 1])
def test_a_folded_language_model_is_the_plain_one_for_its_label(label):
    model = trained_condition(small_language_model()).double()
    tokens = torch.randint(1, 20, (3, 9))
    plain = small_language_model(num_classes=None).double()
    plain.load_state_dict(model.fold(label).state_dict(), strict=True)
    expected = model.nll(tokens, torch.full((3,), label))
    assert torch.allclose(plain.nll(tokens), expected, rtol=1e-12)
    assert (plain.nll(tokens) - model.nll(tokens, torch.full((3,), 1 - label))).abs().min() > 1e-3


def test_after_a_short_training_the_right_label_explains_a_text_better_than_the_other():
    # Label 1 prefers the tokens 10..19 at 3 to 1, label 0 the tokens 1..9.
    def texts(count):
        label = torch.arange(count) % 2
        is_high = (torch.rand(count, 12) < 0.75) == label.bool()[:, None]
        high, low = torch.randint(10, 20, (count, 12)), torch.randint(1, 10, (count, 12))
        return torch.where(is_high, high, low), label

    model = small_language_model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        tokens, label = texts(32)
        optimiser.zero_grad()
        (model.nll(tokens, label).sum() / (32 * 11)).backward()
        optimiser.step()
    tokens, label = texts(400)
    with torch.no_grad():
        gap = model.nll(tokens, 1 - label) - model.nll(tokens, label)
    z = gap.mean() / (gap.std() / 400**0.5)
    # With a condition that does nothing z would be normal: |z| > 5 once in two million.
    # The most that can be had is log 3 / 2 nats per token, 6 per text.
    assert z > 5
    assert (gap > 0).double().mean() > 0.9
    measured = swap_label_gap(model, [(tokens, label)])
    assert (measured.z, measured.likelier) == pytest.approx(
        (z.item(), (gap > 0).double().mean().item())
    )
    # Labels that say nothing: |z| > 4 once in sixteen thousand.
    assert abs(swap_label_gap(model, [(tokens, label[torch.randperm(400)])]).z) < 4


# --- seven ways to condition ----------------------------------------------------------------------


def conditional_model(way, **sizes):
    """In float64, every parameter moved: zeros could not show a lost or mixed-up condition."""
    model = small_language_model(conditioning=way, **sizes).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


LABELS = torch.tensor([0, 1])
TEXTS = torch.randint(1, 20, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", ["norms", "last_norm", "last_shift", "modulated", "input"])
def test_a_condition_that_is_added_later_does_not_disturb_the_plain_model(way):
    torch.manual_seed(5)
    plain = small_language_model(num_classes=None)
    torch.manual_seed(5)
    model = small_language_model(conditioning=way)
    # float32: some roundings of logits of order 1
    assert (model(TEXTS, torch.tensor([0, 1])) - plain(TEXTS)).abs().max() <= 1e-6


def test_adaln_zero_starts_with_every_branch_closed():
    model = small_language_model(conditioning="adaln_zero")
    x = model.embedding(TEXTS) + model.positions.weight[:9]
    expected = F.layer_norm(x, (16,), eps=1e-6) @ model.embedding.weight.T
    assert torch.allclose(model(TEXTS, torch.tensor([0, 1])), expected, atol=1e-5)


def test_the_blocks_of_adaln_zero_start_as_large_as_those_of_the_paper():
    blocks = ConditionalLanguageModel(50, conditioning="adaln_zero").blocks
    for name in ("attention_in", "attention_out", "mlp_in", "mlp_out"):
        weight = torch.stack([getattr(block, name).weight.detach() for block in blocks])
        # Xavier: uniform with variance 2 / (inputs + outputs), so 4/5 of its square is that of the
        # square; five standard errors.
        expected = 2 / sum(weight[0].shape)
        error = expected * (4 / 5 / weight.numel()) ** 0.5
        assert abs(weight.square().mean() - expected) < 5 * error, name


@pytest.mark.parametrize("way", WAYS)
def test_every_way_reads_each_text_under_its_own_condition(way):
    model = conditional_model(way)
    for labels in ([0, 1], [1, 0], [1, 1]):
        logits = model(TEXTS, torch.tensor(labels))
        for b, label in enumerate(labels):
            alone = model(TEXTS[b : b + 1], torch.tensor([label]))[0]
            assert torch.allclose(logits[b], alone, atol=1e-12)
    labels = torch.tensor([0, 1])
    assert (model(TEXTS, labels) - model(TEXTS, 1 - labels)).abs().amax((1, 2)).min() > 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_no_way_lets_a_token_see_the_future(way):
    model, changed = conditional_model(way), TEXTS.clone()
    changed[:, 4] = TEXTS[:, 4] % 19 + 1
    difference = (model(changed, LABELS) - model(TEXTS, LABELS)).abs().amax(dim=(0, 2))
    assert (difference[:4] <= 1e-13).all()  # other blocking of the same sums at most
    assert (difference[4:] > 1e-6).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_label_is_the_vector_of_its_embedding(way):
    model = conditional_model(way)
    vectors = model.class_embedding.weight.detach()
    assert model(TEXTS, vectors).equal(model(TEXTS, torch.tensor([0, 1])))
    one_for_all = model(TEXTS, vectors[1:])
    assert torch.allclose(one_for_all, model(TEXTS, torch.tensor([1, 1])), atol=1e-12)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "prefix"])
def test_the_condition_zero_is_the_null_condition(way):
    model = conditional_model(way)
    assert torch.allclose(model(TEXTS, torch.zeros(1, 5).double()), model(TEXTS), atol=1e-12)


def by_hand(model, x, c=None):
    """Blocks and norm of the plain model, after any embedding."""
    for block in model.blocks:
        x, _ = block(x, c, None)
    return model.norm(x)


def embedded(model):
    return model.embedding(TEXTS) + model.positions.weight[:9]


def test_a_shift_in_the_last_norm_is_a_bias_of_the_logits():
    model = conditional_model("last_shift")
    bias = model.class_embedding.weight @ model.cond_in.weight.T @ model.embedding.weight.T
    difference = model(TEXTS, torch.tensor([0, 1])) - model(TEXTS)
    assert torch.allclose(difference, bias[:, None].expand_as(difference), atol=1e-12)


def test_a_condition_in_the_last_norm_scales_and_shifts_before_the_output():
    model = conditional_model("last_norm")
    gamma, beta = model.norm.gamma_beta(model.class_embedding.weight)
    x = embedded(model)
    for block in model.blocks:
        x, _ = block(x, None, None)
    states = F.layer_norm(x, (16,)) * gamma[:, None] + beta[:, None]
    expected = states @ model.embedding.weight.T
    assert torch.allclose(model(TEXTS, torch.tensor([0, 1])), expected, atol=1e-12)
    assert sum(isinstance(m, ConditionalLayerNorm) for m in model.modules()) == 1


def test_modulation_multiplies_the_trained_scale_and_shift_by_one_plus_s():
    norm, x = conditional_model("modulated").norm, torch.randn(2, 9, 16).double()
    c = torch.randn(2, 5).double()
    scale, shift = (c @ norm.cond_proj.weight.T)[:, None].chunk(2, dim=-1)
    trained = F.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps)
    assert torch.allclose(norm(x, c), trained * (1 + scale) + shift, atol=1e-12)


def test_adaln_zero_is_the_block_of_the_paper():
    model = conditional_model("adaln_zero")

    def modulate(x, shift, scale):
        return F.layer_norm(x, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    c, x = model.class_embedding.weight, embedded(model)
    for block in model.blocks:
        t1, s1, g1, t2, s2, g2 = block.modulation.linear(F.silu(c)).chunk(6, dim=-1)
        x = x + g1[:, None] * block.attention(modulate(x, t1, s1), None)[0]
        x = x + g2[:, None] * block.mlp(modulate(x, t2, s2))
    x = modulate(x, *model.modulation.linear(F.silu(c)).chunk(2, dim=-1))
    expected = x @ model.embedding.weight.T
    assert torch.allclose(model(TEXTS, torch.tensor([0, 1])), expected, atol=1e-12)


def test_a_condition_at_the_input_is_added_to_every_token():
    model = conditional_model("input")
    added = model.class_embedding.weight @ model.cond_in.weight.T
    expected = by_hand(model, embedded(model) + added[:, None]) @ model.embedding.weight.T
    assert torch.allclose(model(TEXTS, torch.tensor([0, 1])), expected, atol=1e-12)


def test_a_prefix_is_a_token_before_the_text_that_predicts_nothing():
    model = conditional_model("prefix")
    prefix = model.class_embedding.weight @ model.cond_in.weight.T
    x = by_hand(model, torch.cat([prefix[:, None], embedded(model)], dim=1))
    expected = x[:, 1:] @ model.embedding.weight.T
    assert torch.allclose(model(TEXTS, torch.tensor([0, 1])), expected, atol=1e-12)


@pytest.mark.parametrize("way", ["norms", "last_norm", "last_shift", "modulated"])
def test_conditions_of_norms_fold_into_the_plain_model(way):
    model = conditional_model(way)
    plain = small_language_model(num_classes=None).double()
    for label in (0, 1):
        before = copy.deepcopy(model.state_dict())
        plain.load_state_dict(model.fold(label).state_dict(), strict=True)
        assert torch.allclose(plain(TEXTS), model(TEXTS, torch.tensor([label] * 2)), atol=1e-12)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_model_without_classes_takes_vectors():
    torch.manual_seed(5)
    vectors = small_language_model(num_classes=None, conditioning="norms")
    torch.manual_seed(5)
    classes = small_language_model()
    assert vectors.class_embedding is None
    c = torch.randn(2, 5)
    assert vectors(TEXTS, c).equal(classes(TEXTS, c))


def test_in_training_a_share_of_the_texts_has_the_null_condition():
    model = conditional_model("norms", cond_dropout=0.25)
    texts, label = TEXTS[:1].expand(4000, -1), torch.ones(4000, dtype=torch.int64)
    null, own = model.nll(TEXTS[:1]), model.nll(TEXTS[:1], label[:1])
    assert torch.allclose(model.nll(texts, label), own, atol=1e-10)
    found = model.train().nll(texts, label)
    is_null = (found - null).abs() < 1e-10
    assert torch.allclose(found[~is_null], own, atol=1e-10)
    # Binomial: standard error 0.0068. Five of them: a false alarm in two million.
    assert abs(is_null.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_folding_in_training_mode_drops_nothing():
    model = conditional_model("norms", cond_dropout=0.5).train()
    folded = [model.fold(1).norm.weight for _ in range(10)]
    assert all(each.equal(folded[0]) for each in folded)


def test_the_modulated_form_keeps_small_conditions_in_bfloat16():
    norm = small_language_model(conditioning="modulated").bfloat16().norm
    norm.cond_proj.weight.data[:16] = 0.001 + 0.0009 * torch.rand(16, 5)
    gamma, _ = norm.gamma_beta(torch.eye(5)[:1].bfloat16())
    scale = norm.cond_proj.weight[:16, 0].double()
    assert torch.allclose(gamma[0].double(), 1 + scale, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_the_model_maps_over_texts():
    model = conditional_model("norms")
    mapped = torch.func.vmap(lambda x, y: model(x[None], y[None])[0])(TEXTS, LABELS)
    assert torch.allclose(mapped, model(TEXTS, LABELS), atol=1e-11)


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_however_a_text_is_cut_the_cache_gives_the_logits_of_the_whole(way):
    model = conditional_model(way)
    whole = model(TEXTS, LABELS)
    for edges in ([0, 4, 9], [0, 1, 9], [0, 8, 9], [0, 2, 3, 7, 9], range(10)):
        cache = KeyValueCache()
        parts = [
            model(TEXTS[:, begin:end], LABELS, cache) for begin, end in itertools.pairwise(edges)
        ]
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-11)
        assert cache.length == 9


def test_the_cache_works_without_condition_and_in_a_block():
    model = conditional_model("norms")
    for cond in (None, torch.randn(2, 5).double()):
        with condition(model, cond):
            cache = KeyValueCache()
            parts = [model(TEXTS[:, :4], cache=cache), model(TEXTS[:, 4:], cache=cache)]
            assert torch.allclose(torch.cat(parts, dim=1), model(TEXTS), atol=1e-11)


def begun(model, cond=LABELS):
    cache = KeyValueCache()
    model(TEXTS[:, :4], cond, cache)
    return cache


@pytest.mark.parametrize("cond", [1 - LABELS, None, torch.zeros(1, 5).double()])
def test_another_condition_in_the_middle_of_a_text_is_refused(cond):
    model = conditional_model("norms")
    cache = begun(model)
    with pytest.raises(ValueError, match="`cond` is another one than that of the tokens in"):
        model(TEXTS[:, 4:], cond, cache)
    later = model(TEXTS[:, 4:], LABELS, cache)  # nothing was lost
    assert torch.allclose(later, model(TEXTS, LABELS)[:, 4:], atol=1e-11)


def test_another_condition_of_the_block_is_refused_too():
    model = conditional_model("norms")
    c = torch.randn(2, 5).double()
    with condition(model, c):
        cache = begun(model, None)
    with pytest.raises(ValueError, match="another one"), condition(model, c + 1):
        model(TEXTS[:, 4:], cache=cache)
    with pytest.raises(ValueError, match="another one"):
        model(TEXTS[:, 4:], cache=cache)


def test_a_cache_of_another_model_or_batch_is_refused():
    model = conditional_model("norms")
    cache = begun(model)
    with pytest.raises(ValueError, match=r"another model or batch \(of 2, got 1\)"):
        model(TEXTS[:1, 4:], LABELS[:1], cache)
    with pytest.raises(ValueError, match="another model"):
        conditional_model("norms")(TEXTS[:, 4:], LABELS, cache)


def test_a_text_that_outgrows_the_positions_is_refused():
    model = conditional_model("norms")
    cache = begun(model)
    with pytest.raises(ValueError, match=r"time up to 8 \(`max_length` after 4 in the cache\)"):
        model(TEXTS, LABELS, cache)


def test_a_call_of_no_tokens_begins_nothing_twice():
    for way in WAYS:
        model, cache = conditional_model(way), KeyValueCache()
        assert model(TEXTS[:, :0], LABELS, cache).shape == (2, 0, 20)
        logits = model(TEXTS, LABELS, cache)
        assert torch.allclose(logits, model(TEXTS, LABELS), atol=1e-11), way
        assert cache.length == 9


def test_an_interrupted_call_leaves_the_cache_as_it_was(monkeypatch):
    model = conditional_model("norms")
    cache = begun(model)
    monkeypatch.setattr(model.blocks[1], "mlp", lambda h: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TEXTS[:, 4:], LABELS, cache)
    monkeypatch.undo()
    later = model(TEXTS[:, 4:], LABELS, cache)
    assert torch.allclose(later, model(TEXTS, LABELS)[:, 4:], atol=1e-11)


def test_a_block_around_a_part_of_the_model_counts_as_its_condition():
    model, cache = conditional_model("norms"), KeyValueCache()
    c = torch.randn(2, 5).double()
    with condition(model.blocks[1], c):
        model(TEXTS[:, :4], cache=cache)
        model(TEXTS[:, 4:6], cache=cache)
    with pytest.raises(ValueError, match="another one"), condition(model.blocks[1], c + 1):
        model(TEXTS[:, 6:], cache=cache)


# --- samples --------------------------------------------------------------------------------------

FIRST = torch.tensor([1])


def next_logits(model, tokens, cond, guidance=1.0):
    c, null = model(tokens, cond)[:, -1], model(tokens)[:, -1]
    logits = null + guidance * (c - null)
    logits[:, model.padding] = -math.inf
    return logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_greedy_samples_take_the_likeliest_token_of_the_uncached_model(way, guidance):
    model, tokens = conditional_model(way), torch.ones(2, 1, dtype=torch.int64)
    for _ in range(11):
        new = next_logits(model, tokens, LABELS, guidance).argmax(1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    assert sample(model, LABELS, 2, prompt=FIRST, top_k=1, guidance=guidance).equal(tokens)


def test_samples_are_those_of_the_uncached_model_with_the_same_random_numbers():
    model, tokens = conditional_model("norms"), torch.ones(50, 1, dtype=torch.int64)
    label, rng = torch.arange(50) % 2, torch.Generator().manual_seed(3)
    for _ in range(11):
        p = (next_logits(model, tokens, label) / 0.7).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=rng)], dim=1)
    found = sample(
        model,
        label,
        50,
        prompt=FIRST,
        temperature=0.7,
        generator=torch.Generator().manual_seed(3),
    )
    assert found.equal(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_first_token_has_the_distribution_of_the_softmax(temperature):
    model = conditional_model("norms")
    tokens = sample(model, 1, 20_000, prompt=FIRST, max_length=2, temperature=temperature)
    p = (next_logits(model, FIRST[None], torch.tensor([1]))[0] / temperature).softmax(-1)
    counts = tokens[:, 1].bincount(minlength=20)
    rare = p * 20_000 < 10
    expected = torch.cat([p[~rare], p[rare].sum()[None]]).detach() * 20_000
    found = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    kept = expected > 0
    statistic = ((found - expected).square() / expected)[kept].sum().item()
    # Chi-square of at most 20 degrees of freedom: above 72 once in ten million.
    assert statistic < 72


def test_after_the_end_a_text_is_padding_and_sampling_stops_when_all_have_ended():
    model = conditional_model("norms", padding=19)
    tokens = sample(model, LABELS.repeat(100), 200, prompt=FIRST, end=7)
    ends = (tokens == 7).int()
    after = ends.cumsum(1) - ends > 0
    assert (tokens[after] == 19).all()
    assert (ends.sum(1) <= 1).all()
    model.embedding.weight.data.mul_(1e-3)
    short = sample(model, 0, 5, prompt=torch.tensor([1, 2]), end=7, max_length=3)
    assert short.shape == (5, 3)
    always = truncated_to(model, token=7)
    assert sample(always, 0, 5, prompt=FIRST, end=7).shape == (5, 2)


def truncated_to(model, token):
    """A model whose next token is certain."""
    model.embedding.weight.data.zero_()
    model.embedding.weight.data[token] = 1e3
    model.norm.weight.data.zero_()
    model.norm.bias.data.fill_(1.0)
    model.norm.cond_proj.weight.data.zero_()
    return model


def test_padding_is_never_drawn_and_a_prompt_that_has_ended_stays_ended():
    model = conditional_model("norms")
    tokens = sample(model, LABELS.repeat(500), 1000, prompt=FIRST, temperature=3.0)
    assert (tokens != 0).all()
    prompts = torch.tensor([[1, 3, 7], [1, 3, 4]])
    tokens = sample(model, LABELS, 2, prompt=prompts, end=7)
    assert (tokens[0, 3:] == 0).all()
    assert tokens[1, 3] != 0


def test_guidance_in_a_block_leads_from_no_condition_to_that_of_the_block():
    model, c = conditional_model("norms"), torch.randn(1, 5).double()
    expected = sample(model, c, 2, prompt=FIRST, top_k=1, guidance=2.5)
    with condition(model, c):
        assert sample(model, None, 2, prompt=FIRST, top_k=1, guidance=2.5).equal(expected)


def test_number_labels_and_vectors_are_the_same_condition():
    model = conditional_model("norms")
    vectors = model.class_embedding.weight.detach()[1:]
    forms = (1, torch.ones(6, dtype=torch.int64), vectors, vectors.expand(6, -1))
    found = [
        sample(model, form, 6, prompt=FIRST, generator=torch.Generator().manual_seed(4))
        for form in forms
    ]
    assert all(each.equal(found[0]) for each in found)
    other = sample(model, 0, 6, prompt=FIRST, generator=torch.Generator().manual_seed(4))
    assert not other.equal(found[0])


def test_a_prompt_may_differ_by_text():
    model = conditional_model("norms")
    tokens = sample(model, LABELS, 2, prompt=TEXTS[:, :3], top_k=1)
    assert tokens[:, :3].equal(TEXTS[:, :3])
    for b in (0, 1):
        alone = sample(model, b, 1, prompt=TEXTS[b, :3], top_k=1)
        assert alone[0].equal(tokens[b])


def test_sampling_and_measuring_leave_every_module_in_its_mode_and_drop_nothing():
    model = conditional_model("norms", cond_dropout=0.9).train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    greedy = sample(model, LABELS, 2, prompt=FIRST, top_k=1)
    gap = swap_label_gap(model, [(TEXTS, LABELS)])
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert greedy.equal(sample(model, LABELS, 2, prompt=FIRST, top_k=1))
    assert gap == swap_label_gap(model, [(TEXTS, LABELS)])


def test_measuring_takes_no_random_numbers():
    model = conditional_model("norms", cond_dropout=0.5).train()
    state = torch.get_rng_state()
    swap_label_gap(model, [(TEXTS, LABELS)])
    generative_classifier(model, TEXTS)
    assert torch.get_rng_state().equal(state)


def test_an_error_while_sampling_gives_the_modes_back():
    model = conditional_model("norms").train()
    with pytest.raises(ValueError, match="must lie in"):
        sample(model, 7, 2, prompt=FIRST)
    assert model.training


PROBABILITIES = torch.tensor([0.1, 0.5, 0.06, 0.3, 0.04])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.95, [0, 1, 2, 3]), (0.8, [1, 3]), (0.81, [0, 1, 3]), (0.2, [1]), (1.0, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    # float64: 0.5 + 0.3 reaches 0.8 by definition, and the sum of these two rounds to it
    logits = truncate_logits(PROBABILITIES.double().log(), top_p=top_p)
    if top_p == 0.8:
        assert set(logits.isfinite().nonzero().flatten().tolist()) in ({1, 3}, {0, 1, 3})
    else:
        assert logits.isfinite().nonzero().flatten().tolist() == kept
    finite = logits.isfinite()
    assert logits[finite].equal(PROBABILITIES.double().log()[finite])


@given(logits=st.lists(st.floats(-9, 9), min_size=1, max_size=30), top_p=st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_set_that_reaches_the_probability(logits, top_p):
    logits = torch.tensor(logits, dtype=torch.float64)
    p, kept = logits.softmax(-1), truncate_logits(logits, top_p=top_p).isfinite()
    assert p[kept].sum() >= top_p - 1e-12
    assert p[kept].sum() - p[kept].min() < top_p + 1e-12
    assert kept.all() or p[kept].min() >= p[~kept].max()


def test_top_p_of_one_keeps_also_what_is_too_small_for_a_sum_of_float32():
    # Before the last token the probabilities sum to 1 in float32, though not to all.
    assert truncate_logits(torch.tensor([0.0, 0.0, -40.0]), top_p=1.0).isfinite().all()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_keeps_k_tokens_also_among_equals(k):
    assert truncate_logits(torch.zeros(2, 5), top_k=k).isfinite().sum(1).tolist() == [k, k]
    kept = truncate_logits(PROBABILITIES.log(), top_k=k).isfinite().nonzero().flatten()
    assert kept.tolist() == sorted(PROBABILITIES.argsort(descending=True)[:k].tolist())


def test_top_p_counts_after_top_k():
    # Of 0.5, 0.3 and 0.1 the first two have 8/9 of the probability.
    logits = truncate_logits(PROBABILITIES.log(), top_k=3, top_p=0.88)
    assert logits.isfinite().nonzero().flatten().tolist() == [1, 3]


# --- the generator as a classifier ----------------------------------------------------------------


def test_the_classifier_is_the_formula_of_bayes():
    model, prior = conditional_model("norms"), torch.tensor([0.2, 0.8]).double()
    likelihood = torch.stack([(-model.nll(TEXTS, torch.full((2,), k))).exp() for k in (0, 1)], 1)
    for p, log_prior in ((torch.tensor([0.5, 0.5]), None), (prior, prior.log())):
        expected = likelihood * p / (likelihood * p).sum(1, keepdim=True)
        found = generative_classifier(model, TEXTS, log_prior=log_prior).exp()
        assert torch.allclose(found, expected, rtol=1e-10)


def test_the_swap_gap_is_the_mean_over_all_tokens_in_any_batches():
    model = conditional_model("norms", num_classes=3)
    tokens, label = torch.randint(1, 20, (7, 9)), torch.arange(7) % 3
    tokens[::2, 6:] = 0
    whole = swap_label_gap(model, [(tokens, label)])
    own = model.nll(tokens, label).detach()
    wrong = torch.stack([model.nll(tokens, (label + k) % 3).detach() for k in (1, 2)])
    gaps = wrong.mean(0) - own
    targets = (tokens[:, 1:] != 0).sum()
    expected = [own.sum() / targets, wrong.mean(0).sum() / targets, gaps.sum() / targets]
    expected += [gaps.mean() / gaps.std() * 7**0.5, (own < wrong).all(0).double().mean()]
    assert list(whole) == pytest.approx([x.item() for x in expected], rel=1e-10)
    parts = swap_label_gap(model, [(tokens[:3], label[:3]), (tokens[3:], label[3:])])
    assert list(parts) == pytest.approx(list(whole), rel=1e-10)


def test_a_model_that_ignores_its_condition_has_no_swap_gap():
    gap = swap_label_gap(small_language_model(), [(TEXTS, LABELS)])
    assert (gap.gap, gap.z, gap.likelier) == (0.0, 0.0, 0.5)


def test_swapping_the_labels_of_two_classes_changes_the_sign():
    model = conditional_model("norms")
    there, back = (swap_label_gap(model, [(TEXTS, y)]) for y in (LABELS, 1 - LABELS))
    assert (there.gap, there.z) == pytest.approx((-back.gap, -back.z))


# --- wrong input ----------------------------------------------------------------------------------

LM, PLAIN_LM = small_language_model(), small_language_model(num_classes=None)
VECTOR_LM = small_language_model(num_classes=None, conditioning="norms")
TOKENS = torch.ones(2, 3, dtype=torch.int64)
WRONG_MODEL_CALLS = {
    "float label": (
        lambda: LM(TOKENS, torch.tensor([0.0, 1.0])),
        ValueError,
        r"`cond` must be \(2 or 1, 5\), a vector per text; got \(2,\)",
    ),
    "vector of another width": (
        lambda: LM(TOKENS, torch.randn(2, 4)),
        ValueError,
        r"`cond` must be \(2 or 1, 5\), a vector per text; got \(2, 4\)",
    ),
    "vectors of another batch": (
        lambda: LM(TOKENS, torch.randn(3, 5)),
        ValueError,
        r"`cond` must be \(2 or 1, 5\), a vector per text; got \(3, 5\)",
    ),
    "boolean label": (
        lambda: LM(TOKENS, torch.tensor([True, False])),
        TypeError,
        r"`cond`: class indices or vectors are expected.*got torch.bool",
    ),
    "plain number as label": (
        lambda: LM(TOKENS, 1),
        TypeError,
        r"class indices or vectors.*got int",
    ),
    "label too large": (
        lambda: LM(TOKENS, torch.tensor([0, 2])),
        ValueError,
        r"`cond` must lie in 0..1; got 0..2",
    ),
    "negative label": (
        lambda: LM.nll(TOKENS, torch.tensor([0, -1])),
        ValueError,
        r"`cond` must lie in 0..1; got -1..0",
    ),
    "labels of another batch": (
        lambda: LM(TOKENS, torch.tensor([0, 1, 1])),
        ValueError,
        r"`cond` must be \(2,\), a label per text; got \(3,\)",
    ),
    "label for a plain model": (
        lambda: PLAIN_LM(TOKENS, torch.tensor([0, 1])),
        ValueError,
        r"`cond` was given to a model that has no condition; set `num_classes` or `cond",
    ),
    "one text without batch": (
        lambda: LM(TOKENS[0]),
        ValueError,
        r"`tokens` must be \(batch, time\).*got \(3,\).*`tokens\[None\]`",
    ),
    "text too long": (
        lambda: LM(torch.ones(1, 13, dtype=torch.int64)),
        ValueError,
        r"time up to 12 \(`max_length`\); got \(1, 13\).*`\[:, :12\]` to cut",
    ),
    "token outside the vocabulary": (
        lambda: LM(20 * TOKENS),
        ValueError,
        r"`tokens` must lie in 0..19; got 20..20",
    ),
    "float tokens": (
        lambda: LM(TOKENS.float()),
        TypeError,
        r"`tokens`: token indices are expected.*got torch.float32",
    ),
    "padding before a token": (
        lambda: LM.nll(torch.tensor([[0, 3, 4]])),
        ValueError,
        r"`tokens` has padding \(0\) before a token; move it last",
    ),
    "heads that do not divide": (
        lambda: small_language_model(dim=15),
        ValueError,
        r"`dim` must be a multiple of `num_heads`; got 15 and 2",
    ),
    "unknown label to fold": (lambda: LM.fold(2), ValueError, r"`cond` must lie in 0..1"),
    "labels for a model of vectors": (
        lambda: VECTOR_LM(TOKENS, torch.tensor([0, 1])),
        ValueError,
        r"`cond` holds labels, the model has none; set `num_classes`",
    ),
    "unknown way": (
        lambda: small_language_model(conditioning="norm"),
        ValueError,
        r"`conditioning` must be one of 'norms', .*; got 'norm'",
    ),
    "dropout of everything": (
        lambda: small_language_model(cond_dropout=1.0),
        ValueError,
        r"`cond_dropout` must lie in \[0, 1\); got 1.0",
    ),
    "fold of a prefix": (
        lambda: small_language_model(conditioning="prefix").fold(0),
        ValueError,
        r"norms alone; got a model whose `conditioning` is 'prefix'",
    ),
    "a number of tokens as top_p": (
        lambda: sample(LM, 0, 2, prompt=FIRST, top_p=5),
        ValueError,
        r"`top_p` is a probability and must lie in \(0, 1\]; got 5. A number of tokens is `top_k`",
    ),
    "top_p zero": (lambda: truncate_logits(torch.zeros(5), top_p=0), ValueError, r"\(0, 1\]"),
    "top_p nan": (
        lambda: truncate_logits(torch.zeros(5), top_p=math.nan),
        ValueError,
        r"`top_p` must be a finite number; got nan",
    ),
    "a probability as top_k": (
        lambda: sample(LM, 0, 2, prompt=FIRST, top_k=0.9),
        ValueError,
        r"`top_k` must be a whole number, 1 to 20; got 0.9",
    ),
    "top_k above the vocabulary": (
        lambda: truncate_logits(torch.zeros(5), top_k=6),
        ValueError,
        r"1 to 5; got 6",
    ),
    "temperature zero": (
        lambda: sample(LM, 0, 2, prompt=FIRST, temperature=0.0),
        ValueError,
        r"`temperature` must be positive; got 0.0. For the likeliest token write `top_k=1`",
    ),
    "no temperature": (
        lambda: sample(LM, 0, 2, prompt=FIRST, temperature=None),
        ValueError,
        r"`temperature` must be a finite number; got None",
    ),
    "a temperature that overflows": (
        lambda: sample(LM, 0, 2, prompt=FIRST, temperature=1e-40),
        ValueError,
        r"the logits are not finite.*`temperature` 1e-40",
    ),
    "top_p as text": (
        lambda: truncate_logits(torch.zeros(5), top_p="0.9"),
        ValueError,
        r"`top_p` must be a finite number; got '0.9'",
    ),
    "true as a number of texts": (
        lambda: sample(LM, 0, True, prompt=FIRST),
        ValueError,
        r"`n` must be a whole number, 0 or more; got True",
    ),
    "an end outside the vocabulary": (
        lambda: sample(LM, 0, 2, prompt=FIRST, end=20),
        ValueError,
        r"`end` must be a whole number, 0 to 19; got 20",
    ),
    "padding in a prompt": (
        lambda: sample(LM, 0, 2, prompt=torch.tensor([[1, 3, 4], [1, 5, 0]])),
        ValueError,
        r"`prompt` holds padding \(0\), which would be read as a word",
    ),
    "an unknown label without weight": (
        lambda: sample(LM, 7, 2, prompt=FIRST, guidance=0.0),
        ValueError,
        r"`cond` must lie in 0..1; got 7..7",
    ),
    "a list as prior": (
        lambda: generative_classifier(LM, TOKENS, log_prior=[0.0, 0.0]),
        TypeError,
        r"`log_prior` must be a tensor; got list",
    ),
    "nothing to predict": (
        lambda: swap_label_gap(LM, [(TOKENS[:, :1], torch.tensor([0, 1]))]),
        ValueError,
        r"`batches` must hold tokens to predict",
    ),
    "a vector of a wider dtype": (
        lambda: small_language_model(conditioning="input")(TOKENS, torch.randn(2, 5).double()),
        TypeError,
        r"`cond` is torch.float64, the model torch.float32; write `cond.to\(torch.float32\)`",
    ),
    "dropout of prefixes": (
        lambda: small_language_model(conditioning="prefix", cond_dropout=0.1),
        ValueError,
        r"`cond_dropout` would give a text a prefix of zeros",
    ),
    "no layers": (
        lambda: small_language_model(num_layers=0),
        ValueError,
        r"`num_layers` must be 1 or more; got 0",
    ),
    "no classes": (
        lambda: small_language_model(num_classes=0),
        ValueError,
        r"`num_classes` must be 1 or more; got 0",
    ),
    "padding outside the vocabulary": (
        lambda: small_language_model(padding=-1),
        ValueError,
        r"`padding` must lie in 0..19; got -1",
    ),
    "infinite guidance": (
        lambda: sample(LM, 0, 2, prompt=FIRST, guidance=math.inf),
        ValueError,
        r"`guidance` must be a finite number",
    ),
    "negative number of texts": (
        lambda: sample(LM, 0, -1, prompt=FIRST),
        ValueError,
        r"`n` must be a whole number, 0 or more; got -1",
    ),
    "longer than the model": (
        lambda: sample(LM, 0, 2, prompt=FIRST, max_length=13),
        ValueError,
        r"`max_length` must be a whole number, 1 to 12; got 13",
    ),
    "float prompt": (
        lambda: sample(LM, 0, 2, prompt=torch.zeros(1)),
        TypeError,
        r"`prompt` must hold tokens, int64 or int32; got torch.float32",
    ),
    "list as prompt": (lambda: sample(LM, 0, 2, prompt=[1]), TypeError, r"`prompt`.*got list"),
    "empty prompt": (
        lambda: sample(LM, 0, 2, prompt=torch.zeros(0, dtype=torch.int64)),
        ValueError,
        r"`prompt` must hold 1 to 12 tokens",
    ),
    "prompts of another batch": (
        lambda: sample(LM, 0, 2, prompt=torch.ones(3, 1, dtype=torch.int64)),
        ValueError,
        r"`prompt` must be \(time,\) or \(2, time\).*got \(3, 1\)",
    ),
    "sample of an unknown label": (
        lambda: sample(LM, 2, 2, prompt=FIRST),
        ValueError,
        r"`cond` must lie in 0..1; got 2..2",
    ),
    "condition for a plain model": (
        lambda: sample(PLAIN_LM, 0, 2, prompt=FIRST),
        ValueError,
        r"model that has no condition",
    ),
    "classifier without classes": (
        lambda: generative_classifier(VECTOR_LM, TOKENS),
        ValueError,
        r"`model` must have classes; make it with `num_classes`",
    ),
    "prior of another length": (
        lambda: generative_classifier(LM, TOKENS, log_prior=torch.zeros(3)),
        ValueError,
        r"`log_prior` must be \(2,\), a number per class; got \(3,\)",
    ),
    "one class to swap": (
        lambda: swap_label_gap(small_language_model(num_classes=1), [(TOKENS, TOKENS[:, 0] * 0)]),
        ValueError,
        r"two classes or more",
    ),
    "one text to measure": (
        lambda: swap_label_gap(LM, [(TOKENS[:1], torch.tensor([0]))]),
        ValueError,
        r"`batches` must hold two texts or more; got 1",
    ),
    "vectors as labels to measure": (
        lambda: swap_label_gap(LM, [(TOKENS, torch.randn(2, 5))]),
        TypeError,
        r"`cond`: class indices or vectors are expected.*got torch.float32",
    ),
    "wrong labels to measure": (
        lambda: swap_label_gap(LM, [(TOKENS, torch.tensor([0, 2]))]),
        ValueError,
        r"`cond` must lie in 0..1; got 0..2",
    ),
    "plain model to fold": (lambda: PLAIN_LM.fold(0), ValueError, r"norms alone; got.*is None"),
}


@pytest.mark.parametrize(
    ("call", "error", "message"), WRONG_MODEL_CALLS.values(), ids=WRONG_MODEL_CALLS
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_tokens_and_labels_are_refused_and_the_message_says_why(call, error, message):
    with pytest.raises(error, match=message):
        call()
