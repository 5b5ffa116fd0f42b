"""The parts of the chapter together: from sentences to a model, its file, and what it finds."""

import pytest
import torch

from cln_tutorial import triple_extraction as te
from cln_tutorial.triple_extraction.grammar import RELATIONS

KINDS = ["normal", "seo", "epo"]


def learnt(language):
    """A model that has read a few sentences until it knows them."""
    draw = torch.Generator().manual_seed(7161)
    sentences = te.made_sentences(8, draw, language=language, kinds=KINDS)
    tokenizer = te.CharTokenizer.fit(each.text for each in sentences)
    collate = te.TripleCollator(tokenizer, RELATIONS, negatives="objects", generator=draw)
    torch.manual_seed(0)
    model = te.TripleExtractor(
        te.SmallEncoder(tokenizer.vocab_size, 32, num_layers=3, dropout=0.0),
        RELATIONS,
        tokenizer=tokenizer,
        prior=collate.label_priors(sentences),
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(**collate(sentences)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, sentences


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_model_that_has_learnt_sentences_finds_their_triples_in_place_and_keeps_them(
    language, tmp_path
):
    model, sentences = learnt(language)
    found = model.predict([each.text for each in sentences], return_all_occurrences=True)
    for example, triples in zip(sentences, found, strict=True):
        assert {t.key for t in triples} == {t.key for t in example.triples}
        for triple in triples:
            te.Example(example.text, [triple])  # refuses a place that does not hold its mention
            assert 0 <= triple.score <= 1
    assert model.evaluate(sentences).f1 == 1
    model.save_pretrained(tmp_path)
    again = te.pipeline("triple-extraction", model=tmp_path)(sentences[0].text)
    assert [(r["subject"], r["relation"], r["object"]) for r in again] == [
        t.key for t in model.predict(sentences[0].text)
    ]


def power(z):
    return te.power_bce_loss(z, positives=torch.tensor([[0, 1, 0, 1]]), power=2)


def pairs(z):
    return te.global_pointer_loss(z, torch.tensor([[0, 1, 0, 1]]))


def separable(z):
    q, a = z[:, 0], z[..., 0]
    return te.efficient_global_pointer_loss(q, q, a, a, torch.tensor([[0, 1, 0, 1]]))


@pytest.mark.parametrize("loss", [power, pairs, separable])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_wide_and_finite_and_leave_their_input_as_it_was(loss, dtype):
    draw = torch.Generator().manual_seed(0)
    z = (4 * torch.randn(2, 3, 5, 5, generator=draw)).to(dtype).requires_grad_()
    before = z.detach().clone()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert value > 0
    assert (gradient.dtype, gradient.shape) == (dtype, z.shape)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    assert z.detach().equal(before)
    exact = loss(before.double())
    assert abs(value.double() - exact) <= 2e-6 * exact
