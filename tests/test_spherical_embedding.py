"""JoSE's hinge, its three rules of a step, and everything that chance decides.

Expected numbers come from closed forms, automatic differentiation, or an enumeration by hand.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cln_tutorial.spherical_embedding import samplers
from cln_tutorial.spherical_embedding.geometry import (
    cos_factor,
    random_unit,
    retract,
    tangent_project,
)
from cln_tutorial.spherical_embedding.objective import jose_loss, jose_step, update_
from cln_tutorial.spherical_embedding.samplers import Sampler

# Rounding of float64 sums of a hundred products, with a factor of ten to spare.
EXACT = {"rtol": 1e-13, "atol": 1e-14}
ALWAYS_OPEN = 3.99  # no gap of two dot products can reach it unless the vectors coincide
FAR_TAIL = 1e-4  # of a chi-square test with a fixed seed: one false alarm in ten thousand seeds


def unit(*size, seed=0, dtype=torch.float64):
    return random_unit(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def angle(radians):
    return torch.tensor([math.cos(radians), math.sin(radians)], dtype=torch.float64)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["joint", "two_hinge"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_hinge_written_as_a_loop(objective, reduction):
    u, v, d = unit(3, 20, 7)
    u_neg, d_neg = unit(2, 20, 4, 7, seed=1)
    of_document = None if objective == "joint" else d_neg
    expected = torch.empty(20, 4, dtype=torch.float64)
    for i in range(20):
        for k in range(4):
            word_gap = sum(float(v[i, c] * (u[i, c] - u_neg[i, k, c])) for c in range(7))
            noise = u_neg if objective == "joint" else d_neg
            document_gap = sum(float(d[i, c] * (u[i, c] - noise[i, k, c])) for c in range(7))
            if objective == "joint":
                expected[i, k] = max(0.0, 0.15 - word_gap - document_gap)
            else:
                expected[i, k] = max(0.0, 0.15 - word_gap) + max(0.0, 0.15 - document_gap)
    assert 0 < (expected == 0).sum() < 80  # both sides of the hinge are there
    if reduction != "none":
        expected = getattr(expected, reduction)()

    options = {"objective": objective, "d_neg": of_document, "reduction": reduction}
    torch.testing.assert_close(jose_loss(u, v, d, u_neg, 0.15, **options), expected, **EXACT)


def test_two_hinges_have_a_margin_each_and_cannot_help_each_other():
    # The word is right by 1, the document wrong by 1/4: together they are right by 3/4.
    u, v = torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 0, 0])
    d, noise = torch.tensor([-0.25, 0, math.sqrt(15) / 4]), torch.tensor([0.0, 1, 0])
    assert jose_loss(u, v, d, noise[None], 0.5).item() == 0
    assert jose_loss(u, v, d, noise[None], 0.5, objective="two_hinge").item() == 0.75


def test_the_documents_hinge_has_the_words_noise_if_it_gets_none_of_its_own():
    u, v, d = unit(3, 5, 7)
    noise = unit(5, 4, 7, seed=1)
    alone = jose_loss(u, v, d, noise, objective="two_hinge")
    assert alone == jose_loss(u, v, d, noise, objective="two_hinge", d_neg=noise)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "three"}, "`objective` must be one of 'two_hinge', 'joint'; got 'three'"),
        ({"reduction": "max"}, "`reduction` must be one of"),
        ({"v": torch.zeros(7)}, r"`v` must have shape \(5, 7\); got \(7,\)"),
        ({"u_neg": torch.zeros(5, 7)}, "`u_neg` must have shape"),
        ({"d_neg": torch.zeros(5, 3, 7), "objective": "two_hinge"}, "`d_neg` must have shape"),
        ({"d_neg": torch.zeros(5, 4, 7)}, "`d_neg` belongs to objective='two_hinge'"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(changed, message):
    good = {"u": torch.zeros(5, 7), "v": torch.zeros(5, 7), "d": torch.zeros(5, 7)}
    with pytest.raises(ValueError, match=message):
        jose_loss(**good | {"u_neg": torch.zeros(5, 4, 7)} | changed)


def test_at_random_vectors_the_hinge_is_open_as_often_as_a_normal_sum_is_below_the_margin():
    # Each dot product has variance 1/D; two of them in one hinge, four in the joint one.
    u, v, d, noise = unit(4, 40_000, 100)
    two = jose_loss(u, v, v, noise[:, None], objective="two_hinge", reduction="none") > 0
    joint = jose_loss(u, v, d, noise[:, None], reduction="none") > 0
    # Five standard errors of 40 000 draws, and .001 because a dot product is not quite normal.
    tolerance = 5 * math.sqrt(0.25 / 40_000) + 0.001
    for share, expected in (
        (two, stats.norm.cdf(0.15 * math.sqrt(100 / 2))),
        (joint, stats.norm.cdf(0.15 * math.sqrt(100) / 2)),
    ):
        assert share.double().mean().item() == pytest.approx(expected, abs=tolerance)


# --- the step ------------------------------------------------------------------------------------


def by_autograd(u, contexts, noise, margin):
    """Negative gradients of the hinge, in space."""
    points = [x.clone().requires_grad_() for x in (u, contexts, noise)]
    total = points[1].sum(-2)
    hinge = (margin - (total * points[0]).sum(-1) + (total * points[2]).sum(-1)).relu().sum()
    return [-g for g in torch.autograd.grad(hinge, points)]


@pytest.mark.parametrize("contexts", [1, 2], ids=["two_hinge", "joint"])
@pytest.mark.parametrize("factor", ["none", "paper"])
def test_the_step_is_the_gradient_of_the_hinge_on_the_sphere_times_the_papers_factor(
    contexts, factor
):
    u, noise, vs = unit(50, 9), unit(50, 9, seed=1), unit(50, contexts, 9, seed=2)
    steps = jose_step(u, vs, noise, margin=0.15, factor=factor)
    descents = by_autograd(u, vs, noise, 0.15)
    closed = (descents[0] == 0).all(-1).sum()
    assert 0 < closed < 50
    for x, step, descent in zip((u, vs, noise), steps, descents, strict=True):
        expected = tangent_project(x, descent)
        if factor == "paper":
            expected = cos_factor(x, -descent)[..., None] * expected
        torch.testing.assert_close(step, expected, rtol=1e-12, atol=1e-13)


def test_the_programs_three_steps_descend_three_different_functions():
    u, noise, v = unit(50, 9), unit(50, 9, seed=1), unit(50, 1, 9, seed=2)
    steps = jose_step(u, v, noise, margin=ALWAYS_OPEN, factor="program")
    functions = (
        lambda f, h: (1 - f) ** 2 / 2,
        lambda f, h: (1 - f + h) ** 2 / 2,
        lambda f, h: h**2,
    )
    for k, (step, function) in enumerate(zip(steps, functions, strict=True)):
        points = [x.clone().requires_grad_() for x in (u, v, noise)]
        f, h = ((points[1][:, 0] * points[n]).sum(-1) for n in (0, 2))
        (gradient,) = torch.autograd.grad(function(f, h).sum(), points[k])
        torch.testing.assert_close(step, -tangent_project(points[k].detach(), gradient), **EXACT)


def mixed_partials(factor):
    """How u's force changes with v, minus how v's changes with u: 0 for one function of both."""
    u, v, noise = unit(3, 9)
    along_u, along_v = tangent_project(u, unit(9, seed=1)), tangent_project(v, unit(9, seed=2))

    def forces(s, t):
        moved = retract(u, s * along_u), retract(v, t * along_v)[None]
        return jose_step(*moved, noise, margin=ALWAYS_OPEN, factor=factor)

    zero = torch.zeros((), dtype=torch.float64)
    of_u = torch.func.jacrev(lambda t: (forces(zero, t)[0] * along_u).sum())(zero)
    of_v = torch.func.jacrev(lambda s: (forces(s, zero)[1][0] * along_v).sum())(zero)
    return float(of_u - of_v)


def test_the_programs_steps_descend_no_common_function():
    assert abs(mixed_partials("none")) < 1e-14  # these are the gradients of the hinge
    assert abs(mixed_partials("program")) > 0.01


def noise_flow(h, factor, time, dt=0.02):
    """Where the dot product of a noise word with a fixed context goes."""
    u, noise = angle(0.0), angle(math.acos(h))
    v = angle(0.0)[None]
    for _ in range(round(time / dt)):
        noise = retract(noise, dt * jose_step(u, v, noise, margin=ALWAYS_OPEN, factor=factor)[2])
    return noise[0].item()


@pytest.mark.parametrize("start", [0.5, -0.5])
def test_the_program_makes_noise_words_orthogonal_from_either_side(start):
    # dh/dt = -2h (1 - h^2), so h is about e^(-2t): 2e-9 at t = 10.
    early, late = noise_flow(start, "program", 1), noise_flow(start, "program", 10)
    assert abs(late) < 1e-8
    assert math.copysign(1, early) == math.copysign(1, start)
    assert abs(early) < 0.2


@pytest.mark.parametrize("start", [0.5, -0.5])
def test_the_paper_makes_noise_words_opposite_and_takes_its_time(start):
    # x = 1 + h obeys dx/dt = -x^2 (2 - x): 1/(2x) + log(x / (2 - x)) / 4 - t stays the same.
    def invariant(x):
        return 1 / (2 * x) - math.log(x / (2 - x)) / 4

    x = 1 + noise_flow(start, "paper", 25)
    # The Euler steps of .02 are worth 1 % of the time at most.
    assert invariant(x) - invariant(1 + start) == pytest.approx(25, rel=0.01)
    assert x == pytest.approx(1 / (2 * 25), rel=0.2)


def test_the_programs_factor_of_the_context_lacks_the_division_by_the_distance():
    u, v, noise = angle(1.0), angle(0.4), angle(-0.5)
    gap = float(v @ (u - noise))
    whole, paper, program = (
        jose_step(u, v[None], noise, margin=ALWAYS_OPEN, factor=factor)[1][0]
        for factor in ("none", "paper", "program")
    )
    torch.testing.assert_close(paper, whole * (1 - gap / float((u - noise).norm())), **EXACT)
    torch.testing.assert_close(program, whole * (1 - gap), **EXACT)


def test_behind_an_open_gate_the_programs_context_would_turn_around_at_a_gap_above_one():
    u, v, noise = angle(0.2), angle(0.0), angle(3.0)
    assert float(v @ (u - noise)) > 1
    _, moved, _ = jose_step(u, v[None], noise, margin=ALWAYS_OPEN, factor="program")
    _, downhill, _ = jose_step(u, v[None], noise, margin=ALWAYS_OPEN, factor="paper")
    assert (moved * downhill).sum() < 0
    assert not any(x.any() for x in jose_step(u, v[None], noise, margin=1.0, factor="program"))


@pytest.mark.parametrize("factor", ["program", "paper", "none"])
def test_at_a_gap_of_exactly_the_margin_the_gate_is_closed(factor):
    u, noise = torch.eye(3, dtype=torch.float64)[[0, 2]]
    v = torch.tensor([[0.5, math.sqrt(0.75), 0]], dtype=torch.float64)
    above = math.nextafter(0.5, 1)
    assert not any(x.any() for x in jose_step(u, v, noise, margin=0.5, factor=factor))
    assert any(x.any() for x in jose_step(u, v, noise, margin=above, factor=factor))


def test_the_paper_moves_no_context_if_noise_and_centre_word_coincide():
    u, v = unit(2, 5)
    for step in jose_step(u, v[None], u, factor="paper"):
        assert step.isfinite().all()
    assert not jose_step(u, v[None], u, factor="paper")[1].any()


@pytest.mark.parametrize(
    ("contexts", "factor", "message"),
    [
        (1, "article", "`factor` must be one of 'program', 'paper', 'none'; got 'article'"),
        (2, "program", "the program has no joint hinge. Use factor='paper' or 'none'"),
    ],
)
def test_rules_that_do_not_exist_are_refused(contexts, factor, message):
    with pytest.raises(ValueError, match=message):
        jose_step(unit(5), unit(contexts, 5), unit(5), factor=factor)


# --- the update of a table -----------------------------------------------------------------------


def test_an_update_reads_all_vectors_before_it_writes_one():
    # Worked out from the old vectors, at a rate where any other order would show.
    vectors = unit(3, 6)
    u, v, noise = vectors.clone()
    f, h = v @ u, v @ noise
    expected = [
        u + 0.5 * (1 - f) * (v - f * u),
        v + 0.5 * (1 - f + h) * (u - noise - (f - h) * v),
        noise - 0.5 * 2 * h * (v - h * noise),
    ]
    hinge = update_(vectors, torch.tensor([[0, 1, 2]]), 0.5, margin=ALWAYS_OPEN)
    assert hinge.item() == pytest.approx(ALWAYS_OPEN - float(f - h), abs=1e-14)
    for row, moved in zip(vectors, expected, strict=True):
        torch.testing.assert_close(row, moved / moved.norm(), **EXACT)


def test_a_row_gets_the_sum_of_the_steps_of_all_its_triples_and_one_retraction():
    vectors, rates = unit(5, 6), torch.tensor([0.3, 0.1], dtype=torch.float64)
    triples = torch.tensor([[0, 2, 1], [0, 3, 4]])
    old = vectors.clone()
    steps = [
        lr * jose_step(old[a], old[b][None], old[c], margin=ALWAYS_OPEN)[0]
        for lr, (a, b, c) in zip(rates, triples.tolist(), strict=True)
    ]
    update_(vectors, triples, rates, margin=ALWAYS_OPEN)
    torch.testing.assert_close(vectors[0], retract(old[0], steps[0] + steps[1]), **EXACT)


def test_closed_triples_and_other_rows_stay_as_they_are_to_the_last_bit():
    vectors = unit(6, 4, dtype=torch.float32) * 1.001  # a retraction would show
    vectors[:3] = torch.eye(4)[:3]
    vectors[1] = vectors[0]  # a gap of 1
    old = vectors.clone()
    hinge = update_(vectors, torch.tensor([[0, 1, 2], [3, 4, 3]]), 0.1)
    assert hinge[0] == 0
    assert hinge[1] > 0
    changed = (vectors != old).any(-1)
    assert changed.tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("factor", ["program", "paper", "none"])
def test_noise_that_is_the_centre_word_opens_the_gate_and_pushes_it_both_ways(factor):
    # The program draws such triples: f - h = 0 is below any margin.
    vectors = torch.stack([angle(0.0), angle(1.0)])
    f = math.cos(1.0)
    pull = {"program": 1 - f - 2 * f, "paper": 1 - f - (1 + f), "none": 0.0}[factor]
    update_(vectors, torch.tensor([[0, 1, 0]]), 0.1, factor=factor)
    moved = math.atan2(vectors[0, 1], vectors[0, 0])
    assert moved == pytest.approx(math.atan(0.1 * pull * math.sin(1.0)), abs=1e-14)
    torch.testing.assert_close(vectors[1], angle(1.0), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tables_are_computed_in_float32_and_rounded_once(dtype):
    vectors = unit(9, 50, dtype=torch.float32).to(dtype)
    wide = vectors.float()
    triples = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    update_(vectors, triples, 0.04)
    update_(wide, triples, 0.04)
    assert vectors.equal(wide.to(dtype))
    # Norms are then those of rounded unit vectors: half a unit of the last place per entry.
    errors = (vectors.float().norm(dim=-1) - 1).abs()
    assert errors.max() < torch.finfo(dtype).eps


# --- words that stay, and noise -------------------------------------------------------------------


def test_words_stay_by_the_rule_of_the_word2vec_program_and_not_of_its_paper():
    counts = np.array([600_000, 300_000, 90_000, 9_000, 1_000])
    keep = samplers.keep_probabilities(counts, 1e-3)
    by_hand = [(math.sqrt(c / 1e3) + 1) * 1e3 / c for c in counts]
    np.testing.assert_allclose(keep, np.minimum(by_hand, 1), rtol=1e-14)
    assert keep[4] == 1
    paper = np.sqrt(1e3 / counts)  # it keeps what it does not leave out
    assert np.abs(keep - paper)[:4].min() > 1e-3
    assert (samplers.keep_probabilities(counts, 0) == 1).all()


def test_noise_words_have_the_three_quarter_power_of_the_counts():
    counts = np.array([10_000, 81, 16, 1])
    expected = np.array([1000, 27, 8, 1]) / 1036
    np.testing.assert_allclose(samplers.noise_distribution(counts, 0.75), expected, rtol=1e-14)
    np.testing.assert_allclose(samplers.noise_distribution(counts, 1), counts / counts.sum())
    np.testing.assert_allclose(samplers.noise_distribution(counts, 0), [0.25] * 4)


@given(counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=60))
def test_the_columns_of_an_alias_table_add_up_to_the_distribution(counts):
    expected = samplers.noise_distribution(np.array(counts), 0.75)
    table = samplers.alias_table(expected).astype(np.int64)
    own = (table[:, 0] + 1) / 2**32
    total = own + np.bincount(table[:, 1], weights=1 - own, minlength=len(counts))
    # A limit is rounded to 2^-32, and a word may stand in all columns.
    np.testing.assert_allclose(total / len(counts), expected, atol=2**-31)


def zipf(words, tokens=10**6):
    return np.maximum(1, (tokens / np.arange(1, words + 1)).astype(np.int64))


def sampler(counts, *, sample=0, ns_exponent=0.75, window=5, negative=1, seed=0):
    options = {"sample": sample, "ns_exponent": ns_exponent, "window": window}
    return Sampler.of(counts, negative=negative, seed=seed, **options)


def keys(number, seed=0):
    return samplers.document_keys(seed, 0, np.arange(number))


def chi_square(drawn, probabilities):
    counted = np.bincount(drawn, minlength=len(probabilities))
    return stats.chisquare(counted, probabilities * len(drawn)).pvalue


def test_a_million_noise_words_pass_a_chi_square_test():
    counts = zipf(1000)
    drawn = samplers.noise_words(sampler(counts), keys(10**6), np.full(10**6, -1))
    assert chi_square(drawn, counts**0.75 / (counts**0.75).sum()) > FAR_TAIL
    assert chi_square(drawn, counts / counts.sum()) < 1e-12  # the test can fail


def test_noise_words_are_drawn_again_until_they_are_not_the_centre_word():
    counts = zipf(50)
    centre = np.resize(np.arange(50), 200_000)
    drawn = samplers.noise_words(sampler(counts), keys(200_000), centre)
    assert (drawn >= 0).all()
    assert (drawn != centre).all()
    # The others keep their proportions: here for the most frequent centre word.
    others = counts[1:] ** 0.75 / (counts[1:] ** 0.75).sum()
    assert chi_square(drawn[centre == 0] - 1, others) > FAR_TAIL


def test_redraws_end_and_leave_the_triple_out():
    one_word = samplers.noise_words(sampler(np.array([7])), keys(3), np.zeros(3, np.int64))
    assert one_word.tolist() == [-1, -1, -1]
    rare = samplers.noise_words(sampler(np.array([10**9, 1])), keys(1000), np.zeros(1000, np.int64))
    assert set(rare.tolist()) == {-1, 1} or set(rare.tolist()) == {-1}


# --- random numbers -------------------------------------------------------------------------------


def runs_score(parity):
    """Wald-Wolfowitz: standard deviations by which the number of runs is off."""
    ones, zeros = int(parity.sum()), int((1 - parity).sum())
    runs = 1 + int((parity[1:] != parity[:-1]).sum())
    mean = 1 + 2 * ones * zeros / (ones + zeros)
    return (runs - mean) / math.sqrt((mean - 1) * (mean - 2) / (ones + zeros - 1))


def lcg(number):
    state, drawn = 0, []
    for _ in range(number):
        state = (state * 25214903917 + 11) % 2**64
        drawn.append(state % 10)
    return np.array(drawn)


def test_half_widths_are_uniform_and_their_parity_is_no_alternation():
    widths = samplers.half_widths(keys(100_000), 10)
    assert (widths.min(), widths.max()) == (1, 10)
    assert chi_square(widths - 1, np.full(10, 0.1)) > FAR_TAIL
    assert abs(runs_score(widths % 2)) < 5  # false alarms: 6e-7
    # The generator of the word2vec program, with `state % window`: even and odd take turns.
    assert lcg(12).tolist() == [1, 8, 3, 6, 5, 0, 5, 0, 3, 8, 7, 0]
    assert runs_score(lcg(100_000) % 2) > 100


def test_seed_epoch_and_document_all_change_the_key():
    drawn = {
        key
        for seed in range(20)
        for epoch in range(20)
        for key in samplers.document_keys(seed, epoch, np.arange(20)).tolist()
    }
    assert len(drawn) == 20**3


def test_the_key_of_a_document_does_not_depend_on_the_others():
    alone = samplers.document_keys(3, 1, np.array([7]))
    assert samplers.document_keys(3, 1, np.arange(10))[7] == alone[0]


def test_each_epoch_has_an_order_of_its_own_that_comes_again_with_the_seed():
    orders = [samplers.document_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert (samplers.document_order(100, 1, 0) == orders[2]).all()


def test_start_vectors_are_unit_and_point_everywhere():
    rows = samplers.unit_rows(keys(4000), 50)
    assert np.abs(np.linalg.norm(rows.astype(np.float64), axis=1) - 1).max() < 1e-7
    cosines = (rows[:2000] * rows[2000:]).sum(1)
    # Of 2000 pairs: mean 0, standard deviation 1/sqrt(50), each to five standard errors.
    assert abs(cosines.mean()) < 5 / math.sqrt(50 * 2000)
    assert cosines.std() * math.sqrt(50) == pytest.approx(1, abs=5 / math.sqrt(2 * 2000))
    assert np.abs(rows.mean(0)).max() < 5 / math.sqrt(50 * 4000)


@settings(max_examples=20)
@given(dim=st.integers(2, 300), row=st.integers(0, 9))
def test_a_start_vector_does_not_depend_on_the_others(dim, row):
    together = samplers.unit_rows(keys(10), dim)
    assert (samplers.unit_rows(keys(10)[row : row + 1], dim) == together[row]).all()


def test_the_hash_of_a_document_is_that_of_its_words_in_their_order():
    documents = [[1, 2, 3], [], [3, 2, 1], [1, 2, 3], [1, 2], [0, 1, 2], []]
    tokens = np.array([word for document in documents for word in document], np.int32)
    starts = np.cumsum([0, *map(len, documents)])
    found = samplers.token_hashes(tokens, starts).tolist()
    assert found[0] == found[3]
    assert found[1] == found[6]
    assert len(set(found)) == 5
    alone = samplers.token_hashes(np.array([0, 1, 2], np.int32), np.array([0, 3]))
    assert alone[0] == found[5]


# --- the triples of a document --------------------------------------------------------------------


def test_a_token_is_the_context_of_its_neighbours_and_then_the_centre_of_its_document():
    drawn = samplers.draw(
        sampler(np.ones(9, np.int64), window=1, negative=2),
        tokens=np.array([4, 5, 6, 7], np.int32),
        lengths=np.array([3, 0, 1]),
        keys=keys(3),
    )
    pairs = list(zip(drawn.centre, drawn.context, drawn.document, strict=True))
    assert pairs[::2] == pairs[1::2]  # two noise words each
    assert pairs[::2] == [
        (5, 4, 0),
        (4, -1, 0),
        (4, 5, 0),
        (6, 5, 0),
        (5, -1, 0),
        (5, 6, 0),
        (6, -1, 0),
        (7, -1, 2),
    ]
    assert drawn.place.tolist() == [0] * 4 + [1] * 6 + [2] * 4 + [0] * 2


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    window=st.integers(1, 15),
    negative=st.integers(1, 4),
    seed=st.integers(0, 10),
)
def test_no_pair_crosses_the_border_of_a_document(lengths, window, negative, seed):
    lengths = np.array(lengths)
    total = int(lengths.sum())
    tokens = np.arange(total, dtype=np.int32)  # each word knows its place
    chances = sampler(np.ones(max(total, 2), np.int64), window=window, negative=negative, seed=seed)
    drawn = samplers.draw(chances, tokens, lengths, keys(len(lengths), seed))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    is_word = drawn.context >= 0
    assert (owner[drawn.centre] == drawn.document).all()
    assert (owner[drawn.context[is_word]] == drawn.document[is_word]).all()
    apart = np.abs(drawn.centre - drawn.context)[is_word]
    assert ((apart >= 1) & (apart <= window)).all()
    assert (drawn.noise != drawn.centre).all()


def test_tokens_stay_as_often_as_they_should_and_the_window_closes_over_those_that_do_not():
    counts = zipf(20)
    tokens = np.resize(np.arange(20, dtype=np.int32), 100_000)
    chances = sampler(counts, sample=1e-2, window=1)
    drawn = samplers.draw(chances, tokens, np.array([len(tokens)]), keys(1))
    stay = drawn.centre[drawn.context < 0]
    expected = samplers.keep_probabilities(counts, 1e-2)
    shares = np.bincount(stay, minlength=20) / 5000
    # Five standard errors of 5000 tokens a word.
    np.testing.assert_allclose(shares, expected, atol=5 * math.sqrt(0.25 / 5000))
    # All that stay but the first and last have two neighbours, however far they were apart.
    assert (drawn.context >= 0).sum() == 2 * len(stay) - 2


def test_without_a_window_documents_are_drawn_alone():
    chances = sampler(np.ones(5, np.int64), window=0, negative=3)
    drawn = samplers.draw(chances, np.array([1, 2], np.int32), np.array([2]), keys(1))
    assert drawn.centre.tolist() == [1, 1, 1, 2, 2, 2]
    assert (drawn.context == -1).all()


def test_no_order_of_an_epoch_is_one_by_which_a_user_may_have_split_the_data():
    orders = [samplers.document_order(500, seed=3, epoch=epoch).tolist() for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    for key in (3, [3], [3, 0], [3, 1]):
        assert np.random.default_rng(key).permutation(500).tolist() not in orders
