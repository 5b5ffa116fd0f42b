"""Made languages: every number against counting, closed forms, and a parser of its own."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch

from cln_tutorial.conditional_norm import Grammar, grammar, made_reviews
from cln_tutorial.conditional_norm.grammar import PRODUCTS, SENTIMENTS

REVIEWS = made_reviews()
RNG = torch.Generator().manual_seed(0)

# After "x" up to two "m" and "x" again; after "y" at most one "m" and "z". So small that all texts
# can be counted.
SMALL = {
    "one": {"x": (0.75, "x0"), "y": (0.25, "y0")},
    "other": {"x": (0.1, "x0"), "y": (0.9, "y0")},
    "x0": {"m": (0.5, "x1"), "x": (0.5, "end")},
    "x1": {"m": (0.2, "x2"), "x": (0.8, "end")},
    "x2": {"x": (1.0, "end")},
    "y0": {"m": (0.5, "y1"), "z": (0.5, "end")},
    "y1": {"z": (1.0, "end")},
    "end": {"<end>": (1.0, None)},
}


def small():
    return Grammar({"one": "one", "other": "other"}, SMALL.__getitem__)


def all_texts(state):
    """Every text from a state with its probability, by walking through all branches."""
    if state is None:
        return [((), 1.0)]
    return [
        ((word, *rest), p * q)
        for word, (p, after) in SMALL[state].items()
        for rest, q in all_texts(after)
    ]


@pytest.mark.parametrize("label", [0, 1])
def test_the_probabilities_of_all_texts_are_those_of_the_branches_and_sum_to_one(label):
    grammar, texts = small(), all_texts(("one", "other")[label])
    tokens = grammar.encode([" ".join(words[:-1]) for words, _ in texts])
    found = grammar.log_prob(tokens, torch.full((len(texts),), label)).exp()
    assert found.tolist() == pytest.approx([p for _, p in texts], rel=1e-12)
    assert found.sum().item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_entropy_and_length_are_the_sums_over_all_texts(label):
    texts = all_texts(("one", "other")[label])
    entropy = -sum(p * math.log(p) for _, p in texts)
    length = sum(p * len(words) for words, p in texts)
    assert small().entropy()[label].item() == pytest.approx(entropy, rel=1e-12)
    assert small().mean_length()[label].item() == pytest.approx(length, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("label", [0, 1])
def test_the_best_ngram_model_is_the_one_that_is_counted_over_all_texts(order, label):
    pairs, contexts = Counter(), Counter()
    for words, p in all_texts(("one", "other")[label]):
        words = ["<start>", *words]
        for t in range(1, len(words)):
            context = tuple(words[max(0, t - order + 1) : t])
            pairs[context, words[t]] += p
            contexts[context] += p
    expected = -sum(n * math.log(n / contexts[context]) for (context, _), n in pairs.items())
    found = small().ngram_cross_entropy(order)[label].item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_long_context_does_not_overflow():
    assert torch.allclose(small().ngram_cross_entropy(40), small().entropy(), rtol=1e-12)


def test_an_ngram_model_that_sees_the_whole_text_reaches_the_entropy():
    grammar = small()
    assert torch.allclose(grammar.ngram_cross_entropy(5), grammar.entropy(), rtol=1e-12)
    falling = torch.stack([grammar.ngram_cross_entropy(order) for order in (1, 2, 3)])
    assert (falling.diff(dim=0) < 0).all()


def test_a_grammar_with_a_circle_has_the_geometric_distribution():
    toss = {"heads": (0.6, "toss"), "<end>": (0.4, None)}
    grammar = Grammar({"coin": "toss"}, lambda state: toss)
    entropy = (-0.6 * math.log(0.6) - 0.4 * math.log(0.4)) / 0.4
    assert grammar.mean_length().item() == pytest.approx(1 / 0.4, rel=1e-12)
    assert grammar.entropy().item() == pytest.approx(entropy, rel=1e-12)
    lengths = (grammar.sample(torch.zeros(4000, dtype=torch.int64), RNG) != 0).sum(1) - 1
    # Standard error of the mean of a geometric distribution: sqrt(0.6) / 0.4 / sqrt(n).
    assert abs(lengths.double().mean() - 2.5) < 5 * (0.6**0.5 / 0.4) / 4000**0.5


def test_texts_are_drawn_as_often_as_they_are_probable():
    grammar, n = small(), 20_000
    for label, state in enumerate(("one", "other")):
        drawn = Counter(grammar.decode(grammar.sample(torch.full((n,), label), RNG)))
        statistic = 0.0
        for words, p in all_texts(state):
            statistic += (drawn.pop(" ".join(words[:-1]), 0) - n * p) ** 2 / (n * p)
        assert not drawn
        # Chi-square of 4 degrees of freedom: above 34 once in a million.
        assert statistic < 34


def test_what_is_not_of_the_language_is_impossible():
    grammar, label = small(), torch.zeros(1, dtype=torch.int64)
    (good,) = grammar.encode(["x m x"]).tolist()
    assert grammar.log_prob(torch.tensor([good]), label).isfinite()
    assert grammar.log_prob(torch.tensor([[*good, 0, 0]]), label).isfinite()
    end, word = good[-1], good[1]
    broken = [
        good[:-1],  # no end
        [*good[:-1], 0],  # padding instead of the end
        [*good, word],  # a word after the end
        [*good, 0, word],
        [*good, end],  # a second end
        [word, *good[1:]],  # no start
        [*good[:2], 0, *good[2:]],  # padding inside
        [good[0], word, word, word, end],  # a word that may not follow
        [good[0], end],
        [good[0]],
    ]
    for tokens in broken:
        assert grammar.log_prob(torch.tensor([tokens]), label).item() == -math.inf, tokens
        assert not grammar.parse(torch.tensor([tokens])).any(), tokens


def test_a_text_is_parsed_under_every_label_that_can_have_produced_it():
    states = {"a": {"x": (0.5, "end"), "y": (0.5, "end")}, "b": {"y": (1.0, "end")}}
    grammar = Grammar({"a": "a", "b": "b"}, (states | {"end": SMALL["end"]}).__getitem__)
    assert grammar.parse(grammar.encode(["x", "y"])).tolist() == [[True, False], [True, True]]


def test_encoding_and_decoding_are_inverse():
    texts = ["x m m x", "y z"]
    tokens = small().encode(texts)
    assert tokens.shape == (2, 6)
    assert tokens[1].tolist()[-2:] == [0, 0]
    assert small().decode(tokens) == texts
    assert small().encode([]).shape == (0, 0)
    words = small().vocabulary
    assert words == ("<padding>", "<start>", "<end>", "m", "x", "y", "z")


# --- the made reviews -----------------------------------------------------------------------------

GOOD, BAD = "bright|great|solid", "dull|poor|weak"
REVIEW = re.compile(
    r"(?P<colour>\w+) (?P<product>\w+) for my (?P<person>\w+) \. "
    r"my (?P=person) (?P<verb>loves|hates) the (?P=colour) one : "
    r"(?P<first>\w+) (?P<part>\w+) , (?P<second>\w+) (?P<matter>\w+) \. "
    r"(?P<advice>keep|return) for the (?P=part) , (?P<joint>and|not) the (?P=matter)"
)


def sentiment_of(text):
    """The label by a parser that shares nothing with the grammar; None if a rule is broken."""
    found = REVIEW.fullmatch(text)
    if not found:
        return None
    positive = found["verb"] == "loves"
    own, other = (GOOD, BAD) if positive else (BAD, GOOD)
    rules = [
        found["part"] in PRODUCTS.get(found["product"], ()),
        found["advice"] == ("keep" if positive else "return"),
        re.fullmatch(own, found["first"]),
        re.fullmatch(own if found["joint"] == "and" else other, found["second"]),
    ]
    return f"{SENTIMENTS[positive]} {found['product']}" if all(rules) else None


def test_every_review_obeys_the_rules_of_its_label():
    label = torch.arange(3000) % 6
    texts = REVIEWS.decode(REVIEWS.sample(label, RNG))
    assert [sentiment_of(text) for text in texts] == [REVIEWS.labels[i] for i in label]
    assert len(set(texts)) > 2900


def test_a_review_belongs_to_its_own_label_only():
    label = torch.arange(600) % 6
    parsed = REVIEWS.parse(REVIEWS.sample(label, RNG))
    assert parsed.equal(torch.eye(6, dtype=torch.bool)[label])


def test_a_review_with_one_word_changed_is_scored_as_the_rules_say():
    label = torch.arange(60) % 6
    tokens = REVIEWS.sample(label, RNG)
    for place in range(1, tokens.shape[1] - 1):
        changed = tokens.clone()
        changed[:, place] = torch.randint(3, len(REVIEWS.vocabulary), (60,), generator=RNG)
        parsed = REVIEWS.parse(changed)
        for text, labels in zip(REVIEWS.decode(changed), parsed, strict=True):
            expected = sentiment_of(text)
            found = [REVIEWS.labels[i] for i in labels.nonzero().flatten()]
            assert found == ([] if expected is None else [expected]), text


def test_the_entropy_of_a_review_is_that_of_its_free_choices():
    # colours, people, adjectives, parts, second adjectives, matters
    closed_form = math.log(10 * 10 * 3 * 8 * 6 * 8)
    assert REVIEWS.entropy().tolist() == pytest.approx([closed_form] * 6, rel=1e-12)
    assert REVIEWS.mean_length().tolist() == pytest.approx([28] * 6, rel=1e-12)
    label = torch.arange(60) % 6
    log_prob = REVIEWS.log_prob(REVIEWS.sample(label, RNG), label)
    assert log_prob.tolist() == pytest.approx([-closed_form] * 60, rel=1e-12)


def test_every_free_choice_of_a_review_is_uniform():
    n = 6000
    texts = REVIEWS.decode(REVIEWS.sample(torch.full((n,), 3), RNG))
    found = [REVIEW.fullmatch(text) for text in texts]
    sizes = {"colour": 10, "person": 10, "first": 3, "part": 8, "second": 6, "matter": 8}
    for slot, size in sizes.items():
        counts = Counter(each[slot] for each in found)
        assert len(counts) == size
        statistic = sum((count - n / size) ** 2 / (n / size) for count in counts.values())
        # Chi-square of 9 degrees of freedom: above 45 once in a million.
        assert statistic < 45, slot
    pairs = Counter((each["part"], each["matter"]) for each in found)
    assert len(pairs) == 64  # the second choice does not depend on the first


def test_ngram_models_stay_far_above_the_entropy_of_the_reviews():
    excess = [
        (REVIEWS.ngram_cross_entropy(order) - REVIEWS.entropy()) / REVIEWS.mean_length()
        for order in (1, 3)
    ]
    assert (excess[0] > excess[1]).all()
    assert (excess[1] >= 0.3).all()
    # By hand, without what one token before tells: person, colour, part, matter are drawn anew
    # (the last two from both lists, since both stand after "the"), "and"/"not" is a coin.
    least = math.log(10) + math.log(10) + math.log(8) + math.log(8) + math.log(2)
    assert (excess[1] * 28 >= least - 1e-9).all()


WRONG = {
    "probabilities above one": (
        lambda: Grammar({"a": 0}, lambda state: {"x": (0.7, 0), "<end>": (0.7, None)}),
        ValueError,
        r"probabilities of state 0 must be positive and sum to 1",
    ),
    "a probability of zero": (
        lambda: Grammar({"a": 0}, lambda state: {"x": (0.0, 0), "<end>": (1.0, None)}),
        ValueError,
        r"positive and sum to 1",
    ),
    "a circle without way out": (
        lambda: Grammar({"a": 0}, lambda state: {"x": (1.0, 1 - state)}),
        ValueError,
        r"no text ever ends that comes to the state 0",
    ),
    "states without number": (
        lambda: Grammar({"a": 0}, lambda n: {"x": (0.5, n + 1), "<end>": (0.5, None)}),
        ValueError,
        r"`step` leads to more than 1,000 states",
    ),
    "texts without number": (
        lambda: Grammar({"a": 0}, lambda n: {"x": (1 - 1e-7, 0), "<end>": (1e-7, None)}).entropy(),
        ValueError,
        r"texts of more than 10,000 words",
    ),
    "a dead end": (
        lambda: Grammar({"a": 0}, lambda state: {}),
        ValueError,
        r"positive and sum to 1",
    ),
    "a word of no text": (
        lambda: small().encode(["x m x", "x q"]),
        ValueError,
        r"'q' is no word of this grammar \(in 'x q'\)",
    ),
    "the end as a word": (lambda: small().encode(["x <end>"]), ValueError, r"'<end>' is no word"),
    "unknown label": (
        lambda: small().sample(torch.tensor([0, 2])),
        ValueError,
        r"`label` must lie in 0..1; got 0..2",
    ),
    "float label": (
        lambda: small().sample(torch.tensor([0.0])),
        TypeError,
        r"`label`: indices are expected.*float32",
    ),
    "labels in two axes": (
        lambda: small().sample(torch.zeros(2, 2, dtype=torch.int64)),
        ValueError,
        r"`label` must have 1 dimension\(s\); got \(2, 2\)",
    ),
    "unknown token": (
        lambda: small().log_prob(torch.tensor([[1, 9]]), torch.tensor([0])),
        ValueError,
        r"`tokens` must lie in 0..6; got 1..9",
    ),
    "labels of another batch": (
        lambda: small().log_prob(torch.tensor([[1, 2]]), torch.tensor([0, 1])),
        ValueError,
        r"`label` must be \(1,\); got \(2,\)",
    ),
    "order zero": (
        lambda: small().ngram_cross_entropy(0),
        ValueError,
        r"`order` must be 1 or more; got 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused_and_the_message_says_why(call, error, message, monkeypatch):
    monkeypatch.setattr(grammar, "MOST_STATES", 1000)
    with pytest.raises(error, match=message):
        call()


def test_the_products_have_as_many_parts_and_no_word_twice():
    assert {len(parts) for parts in PRODUCTS.values()} == {8}
    for parts in PRODUCTS.values():
        assert len(set(parts)) == 8
    shared = [set(a) & set(b) for a, b in itertools.combinations(PRODUCTS.values(), 2)]
    assert any(shared)  # so that a part alone does not tell the product
