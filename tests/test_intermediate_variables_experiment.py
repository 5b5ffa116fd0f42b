"""The experiment of the chapter: its rulers on attention and states that are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cln_tutorial import results
from experiments import harness
from experiments import intermediate_variables as experiment

pytestmark = pytest.mark.usefixtures("as_experiments_run")

QUICK = experiment.QUICK


def a_job(variant, settings=QUICK, seed=0):
    return harness.Job(variant, seed, settings, "cpu", Path())


def an_encoder(attention="sdpa"):
    return experiment.encoder(QUICK, attention)


def batches_of(texts, size=4):
    return experiment.padded(experiment.tokenised(QUICK, texts), size, "cpu")


def test_a_quick_run_has_every_figure(record):
    assert record["figures"].keys() == experiment.units(QUICK).keys()


def test_no_published_figure_is_of_the_same_model_and_texts_and_all_say_where_they_were_read():
    for claim in experiment.PUBLISHED:
        assert not claim["comparable"]
        assert claim["why"].startswith(("from memory", "from a summary"))


# ---------------------------------------------------------------- attention


def test_the_weights_of_a_small_model_are_the_eager_ones_and_make_its_output(record):
    # both are a softmax of the same numbers: roundings of 2^-24, and of 2^-53
    for row, limit in [("all layers", 1e-5), ("all layers, float64", 1e-13)]:
        for column in ("weights", "output"):
            assert max(record["figures"][f"agreement-{row}.{column}"]["values"]) < limit
    assert max(record["figures"]["agreement-all layers.weights"]["values"]) > 0


@pytest.mark.parametrize(
    ("wrong", "column"),
    [
        (lambda weights: weights * 1.01, "output"),
        (lambda weights: weights.flip(1), "weights"),  # heads in another order
        (lambda weights: weights.mean(1, keepdim=True).expand_as(weights), "weights"),
    ],
)
def test_wrong_weights_differ(wrong, column, monkeypatch):
    right = experiment.attention_weights

    def changed(*inputs, **rest):
        return {name: wrong(weights) for name, weights in right(*inputs, **rest).items()}

    monkeypatch.setattr(experiment, "attention_weights", changed)
    batches = [batch for _, batch in batches_of(experiment.sentences(QUICK, 0))]
    with torch.no_grad():
        found = experiment.largest_differences(an_encoder(), an_encoder("eager"), batches)
    assert experiment.largest(found)[column] > 1e-3


def test_padding_does_not_count_as_a_difference(monkeypatch):
    right = experiment.attention_weights

    def spoilt(model, **batch):
        found = right(model, **batch)
        padding = batch["attention_mask"] == 0
        assert padding.any()
        for weights in found.values():
            weights.transpose(1, 2)[padding] = 7.0  # what padding looks at
        return found

    monkeypatch.setattr(experiment, "attention_weights", spoilt)
    ((_, batch),) = batches_of(["the goal", "the goal of the team is in it"])
    with torch.no_grad():
        found = experiment.largest_differences(an_encoder(), an_encoder("eager"), [batch])
    assert max(each["weights"] for each in found) < 1e-5


def test_each_ruler_reads_what_is_known_of_the_attention():
    """One sentence of 4 tokens, one of 3 and a padding; a head each for six ways to look."""
    weights = torch.zeros(2, 4, 4, 4)
    for sentence, length in enumerate((4, 3)):
        for query in range(length):
            weights[sentence, 0, query, 0] = 1
            weights[sentence, 1, query, length - 1] = 1
            weights[sentence, 2, query, max(query - 1, 0)] = 1
            weights[sentence, 3, query, :length] = 1 / length
    weights[1, :, 3] = 0.25  # what a padding looks at
    looks = experiment.Looks()
    looks.add(weights, torch.tensor([4, 3]))
    means = looks.means()
    # 7 tokens, of which 5 have one before them
    uniform = 100 * (4 * 1 / 4 + 3 * 1 / 3) / 7
    previous = 100 * (3 * 1 / 4 + 2 * 1 / 3) / 5
    expected = {
        "[CLS]": [100, 0, 100 * (2 + 2) / 7, uniform],
        "[SEP]": [0, 100, 0, uniform],
        "previous token": [100 * 2 / 5, 0, 100, previous],
        "next token": [0, 100 * 2 / 5, 0, previous],
        "itself": [100 * 2 / 7, 100 * 2 / 7, 100 * 2 / 7, uniform],
        "entropy": [0, 0, 0, (4 * math.log(4) + 3 * math.log(3)) / 7],
    }
    for name, values in expected.items():
        assert means[name].tolist() == pytest.approx(values, abs=1e-5), name


def test_no_layer_is_more_even_than_the_uniform_one_and_no_head_less_than_the_mean(record):
    values = {name: np.array(each["values"]) for name, each in record["figures"].items()}
    for row in experiment.layer_rows(QUICK):
        assert (values[f"attention-{row}.entropy"] < values["attention-uniform.entropy"]).all()
        for column in ("[CLS]", "previous token"):
            mean = values[f"attention-{row}.{column}"]
            assert (values[f"strongest head-{row}.{column}"] >= mean).all()


# ---------------------------------------------------------------- probing


def test_the_states_are_the_means_of_each_text_read_alone():
    model, texts = an_encoder(), experiment.posts(QUICK, 0)[0][0][:7]
    pieces = experiment.tokenised(QUICK, texts)
    with torch.no_grad():
        found = experiment.mean_states(model, pieces, 3, "cpu")
        for place, each in enumerate(pieces):
            states = model(torch.tensor([each]), output_hidden_states=True).hidden_states
            for row, expected in zip(found, states, strict=True):
                wanted = expected[0].mean(0).numpy()
                assert found[row][place] == pytest.approx(wanted, abs=1e-5), (row, place)


def test_the_strength_is_chosen_without_the_held_out_posts(monkeypatch):
    job, posts = a_job(experiment.PROBING), experiment.posts

    def scrambled(settings, seed):
        train, (texts, labels) = posts(settings, seed)
        return train, (texts[::-1], (labels + 1) % 4)

    expected = experiment.work(job)
    monkeypatch.setattr(experiment, "posts", scrambled)
    found = experiment.work(job)
    for name in found:
        if name.endswith((".strength", ".cross-validation")):
            assert found[name] == expected[name], name
    name = f"probe-{experiment.TFIDF}.accuracy"  # the made words say the topic
    assert expected[name] > 70 > 30 > found[name]


def test_posts_are_drawn_anew_from_the_two_sides():
    texts, labels, held_out = experiment.made_posts()
    sides = [
        {(t, y) for t, y, h in zip(texts, labels, held_out, strict=True) if h == side}
        for side in (False, True)
    ]
    drawn = {}
    for seed in (0, 1):
        drawn[seed] = experiment.posts(QUICK, seed)
        counts = (QUICK.train_posts, QUICK.held_out_posts)
        for (some, of_them), side, count in zip(drawn[seed], sides, counts, strict=True):
            assert len(some) == len(of_them) == count
            assert set(zip(some, of_them, strict=True)) <= side
    assert drawn[0][0][0] != drawn[1][0][0]


def test_batches_hold_every_text_once_and_no_padding_counts():
    pieces = [[1, *range(3, 3 + n), 2] for n in (5, 1, 3, 2, 4)]
    found = experiment.padded(pieces, 2, "cpu")
    assert sorted(place for places, _ in found for place in places) == [0, 1, 2, 3, 4]
    for places, batch in found:
        for place, ids, mask in zip(places, *batch.values(), strict=True):
            assert ids[mask == 1].tolist() == pieces[place]
            assert (ids[mask == 0] == experiment.PADDING).all()


# ---------------------------------------------------------------- cost


def test_the_memory_of_a_capture_is_that_of_the_tensors_kept():
    figures = experiment.work(a_job(experiment.COST))
    kept = {
        name.removeprefix("cost-").removesuffix(".kept"): 1e6 * value
        for name, value in figures.items()
        if name.endswith(".kept")
    }
    ((_, batch),) = batches_of(experiment.posts(QUICK, 0)[1][0][: QUICK.batch])
    texts, length = batch["input_ids"].shape
    assert kept[experiment.PLAIN] == 0
    # float32, 6 layers: 16 numbers for a token, 2 heads
    assert kept[experiment.LAYERS] == pytest.approx(4 * 6 * 16 * texts * length)
    maps = 4 * 6 * 2 * texts * length**2
    assert kept[experiment.WEIGHTS] == kept[experiment.EAGER] == pytest.approx(maps)
    every = kept[experiment.EVERY]
    assert every == kept[experiment.HOOKS] == kept[experiment.BARE] > kept[experiment.LAYERS]


def test_hooks_written_by_hand_are_gone_after_the_pass():
    model = an_encoder()
    ((_, batch),) = batches_of(["the goal of the team"])
    experiment.hooked(model, batch)
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- the record


def test_the_shipped_record_agrees_with_the_eager_model_and_its_baseline():
    figures = results.load("intermediate_variables")["figures"]
    values = {name: np.array(each["values"]) for name, each in figures.items()}
    # In float64 a few roundings of 2^-53; in float32 as far off as the eager model is by itself.
    assert values["agreement-all layers, float64.weights"].max() < 1e-13
    own = values[f"agreement-{experiment.OWN}.weights"]
    assert (values["agreement-all layers.weights"] < 4 * own).all()
    for row in experiment.layer_rows(experiment.Settings()):
        assert (values[f"attention-{row}.entropy"] < values["attention-uniform.entropy"]).all()
    strengths = np.log10(experiment.Settings().strengths)
    for name, each in values.items():
        if name.endswith(".strength"):
            assert strengths.min() <= each.min() <= each.max() <= strengths.max()
