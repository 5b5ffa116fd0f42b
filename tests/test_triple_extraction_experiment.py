"""The experiment of the chapter: what it holds back, what it resumes, and the rulers it uses."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cln_tutorial import results
from cln_tutorial.triple_extraction.alignment import locate
from cln_tutorial.triple_extraction.evaluation import Score
from cln_tutorial.triple_extraction.triples import Example, Triple
from experiments import harness
from experiments import triple_extraction as experiment

QUICK = experiment.QUICK
pytestmark = [
    pytest.mark.usefixtures("as_experiments_run"),
    # So little training finds nothing in some evaluations, which is what the package warns of.
    pytest.mark.filterwarnings("ignore:0 subjects predicted:UserWarning"),
]


def a_job(variant=experiment.WEBNLG, settings=QUICK, folder=Path()):
    return harness.Job(variant, 0, settings, "cpu", folder)


def figures_of(job):
    """All that does not depend on the clock."""
    cost = ("cost-cascade.training", "cost-cascade.prediction")
    found = experiment.work(job)
    return {k: v for k, v in found.items() if k not in cost and not k.endswith(".training")}


def test_a_quick_run_has_every_figure(record):
    assert record["figures"].keys() == experiment.units(QUICK).keys()


def test_no_published_figure_of_another_rule_or_task_is_comparable():
    for claim in experiment.PUBLISHED:
        same = claim["source"].endswith("WebNLG") or "WebNLG (" in claim["source"]
        assert claim["comparable"] == same, claim


def test_the_parts_of_a_table_make_the_whole(record):
    values = {name: each["values"] for name, each in record["figures"].items()}
    gold = len(experiment.texts(QUICK, experiment.WEBNLG).test)
    for row in (experiment.MODEL, experiment.DICTIONARY):
        parts = [values[f"seen-{row}, {each} triples.gold"][0] for each in ("seen", "unseen")]
        by_number = sum(values[f"triples-{each}.gold"][0] for each in experiment.NUMBERS)
        assert sum(parts) == by_number >= gold
        assert values[f"seen-{row}, unseen triples.recall"][0] < 100
    assert values[f"seen-{experiment.DICTIONARY}, unseen triples.predicted"] == [0, 0, 0]
    for column in ("precision", "recall", "F1"):
        whole = values[f"test-{experiment.MODEL}.{column}"]
        assert values[f"rules-exact text.{column}"] == whole


def test_the_record_has_the_dictionary_and_the_counts_that_depend_on_the_data_alone():
    figures = results.load("triple_extraction")["figures"]
    # counted for the chapter's specification, with code of its own
    expected = {
        f"test-{experiment.DICTIONARY}.F1": 79.74,
        f"seen-{experiment.DICTIONARY}, seen triples.gold": 1464,
        f"seen-{experiment.DICTIONARY}, unseen triples.gold": 143,
        f"seen-{experiment.DICTIONARY}, unseen triples.predicted": 0,
    }
    for name, value in expected.items():
        assert figures[name]["mean"] == pytest.approx(value, abs=0.005), name
        assert figures[name]["standard_error"] == 0


# ---------------------------------------------------------------- what is held back


def test_each_row_of_the_ablation_changes_one_choice():
    base = asdict(experiment.ABLATION[experiment.BASE])
    for row, choice in experiment.ABLATION.items():
        changed = {name for name, value in asdict(choice).items() if value != base[name]}
        # the negatives of the article are those of its one draw
        article = {"subjects", "negatives"} if row == "negatives of the article" else None
        assert len(changed) == (row != experiment.BASE) or changed == article, row


def test_settings_are_compared_without_the_test_sentences(monkeypatch, tmp_path):
    assert experiment.TUNING.judged == "validation"
    assert not set(experiment.TUNING.seeds) & set(experiment.Settings().seeds)
    blind = replace(experiment.texts(QUICK, experiment.WEBNLG), test=None)
    monkeypatch.setattr(experiment, "texts", lambda *_: blind)
    settings = replace(QUICK, judged="validation")
    for variant in (experiment.WEBNLG, f"{experiment.CONLL}, {experiment.BASE}"):
        assert experiment.work(a_job(variant, settings, tmp_path))


def test_thresholds_are_chosen_on_the_validation_side():
    data = experiment.texts(QUICK, experiment.WEBNLG)
    asked = []

    def evaluate(examples, threshold, **_):
        asked.append((examples, threshold))
        return SimpleNamespace(f1=1 - abs(threshold[1] - 0.3))

    model = SimpleNamespace(evaluate=evaluate)
    settings = replace(QUICK, subject_threshold=0.4)
    recipe = replace(QUICK.webnlg, thresholds=(10, 30, 60))
    assert [*experiment.sweep(model, data.validation, settings, recipe)] == [10, 30, 60]
    assert model.threshold == (0.4, 0.3)
    assert all(examples is data.validation for examples, _ in asked)
    assert [threshold for _, threshold in asked] == [(0.4, 0.1), (0.4, 0.3), (0.4, 0.6)]


# ---------------------------------------------------------------- the data


def test_a_window_without_a_triple_is_a_piece_of_a_sentence_that_has_none_complete():
    examples = experiment.texts(QUICK, experiment.WEBNLG).test
    windows = experiment.without_triples(examples, 30)
    assert len(windows) == len(set(windows)) == 30
    for window in windows:
        sources = [example for example in examples if window in example.text]
        assert any(
            not any(
                locate(window, triple.subject, occurrence="word")
                and locate(window, triple.object, occurrence="word")
                for triple in example.triples
            )
            for example in sources
        ), window
        longest = max(len(example.text.split()) for example in sources)
        assert min(6, longest) <= len(window.split())


def test_no_window_is_cut_where_every_one_has_a_triple():
    full = Example("a b", [("a", "r", "b")])
    assert experiment.without_triples([full], 5) == []
    apart = Example("a x x x x x b", [("a", "r", "b")])
    assert set(experiment.without_triples([apart], 5)) == {"a x x x x x", "x x x x x b"}


def test_an_epoch_has_every_sentence_once_in_batches_of_like_length():
    lengths = tuple(np.random.default_rng(0).integers(5, 60, size=333).tolist())
    first, second = (experiment.batches(lengths, 8, 0, epoch) for epoch in (0, 1))
    for found in (first, second):
        assert sorted(i for batch in found for i in batch) == list(range(333))
        assert len(found) == math.ceil(333 / 8)
        padding = sum(max(lengths[i] for i in b) * len(b) for b in found) / sum(lengths)
        # about 1.7 for batches at random, where the longest of 8 is nearly the longest of all
        assert padding < 1.15
    assert first != second
    assert first != experiment.batches(lengths, 8, 1, 0)
    assert [max(lengths[i] for i in b) for b in first] != sorted(
        max(lengths[i] for i in b) for b in first
    )


@pytest.mark.data
def test_the_real_sets_have_the_sizes_and_places_that_the_page_names():
    webnlg, conll = (
        experiment.texts(experiment.Settings(), name) for name in (experiment.WEBNLG, "conll04")
    )
    sizes = [[len(side) for side in (d.train, d.validation, d.test)] for d in (webnlg, conll)]
    assert sizes == [[5019, 500, 703], [922, 231, 288]]
    assert [len(webnlg.relations), len(conll.relations)] == [215, 5]
    # places that were searched are not learnt from, but there is a rule that scores them
    assert not any(t.subject_span for example in webnlg.train for t in example.triples)
    assert all(t.subject_span for example in webnlg.test for t in example.triples)
    assert all(t.subject_span for example in conll.train for t in example.triples)
    assert len(experiment.without_triples(webnlg.test, 500)) == 500
    assert len(experiment.without_triples(conll.test, 500)) == 500


# ---------------------------------------------------------------- the rulers


def test_the_bootstrap_has_the_error_of_a_mean_and_none_of_no_difference():
    n, share, resamples = 400, 0.3, 2000
    right = (np.arange(n) < share * n).astype(float)
    counts = np.stack([2 * right, np.full(n, 2.0)], axis=1)  # one gold, one guess: F1 is the mean
    found = experiment.bootstrap(resamples, counts)
    expected = 100 * math.sqrt(share * (1 - share) / n)
    # five standard errors of a standard deviation of normal numbers
    assert found == pytest.approx(expected, rel=5 / math.sqrt(2 * resamples))
    assert experiment.bootstrap(resamples, counts, counts) == 0
    wrong = np.stack([2 * (1 - right), np.full(n, 2.0)], axis=1)
    paired = experiment.bootstrap(resamples, counts, wrong)
    assert paired == pytest.approx(2 * expected, rel=5 / math.sqrt(2 * resamples))


def test_the_counts_of_a_sentence_give_its_f1():
    text = "Ada met Bea and Cid"
    example = Example(text, [("Ada", "met", "Bea"), ("Ada", "met", "Cid")])
    found = [Triple("Ada", "met", "Bea"), Triple("Ada", "met", "Bea"), Triple("Bea", "met", "Ada")]
    ((twice_right, denominator),) = experiment.counted([example], [found])
    assert (twice_right, denominator) == (2, 4)
    assert experiment.of_score(Score(tp=1, n_pred=2, n_gold=2))["F1"] == 100 * 2 / 4


def test_false_triples_are_counted_per_100_windows():
    triple = Triple("a", "r", "b")
    found = experiment.false_triples("row", [[triple, triple, triple], [], [], []])
    assert found == {
        "no triple-row.false triples": 75,
        "no triple-row.windows with one": 25,
    }


# ---------------------------------------------------------------- training


def test_rates_rise_in_the_warm_up_and_fall_to_0():
    found = [experiment.slope(step, 100, 0.1) for step in range(100)]
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10:] == pytest.approx([(100 - i) / 90 for i in range(10, 100)])


@pytest.mark.parametrize("conditioning", ["cln", "add", "none"])
def test_every_weight_learns_at_its_rate_and_frozen_ones_do_not(conditioning):
    data = experiment.texts(QUICK, experiment.WEBNLG)
    encoder, _ = experiment.encoder_of(experiment.SMALL, data.train)
    encoder.tokens.requires_grad_(False)
    model = experiment.TripleExtractor(encoder, data.relations, conditioning=conditioning)
    recipe = replace(QUICK.webnlg, encoder_rate=1.0, head_rate=2.0)
    groups = experiment.groups(model, recipe, weight_decay=0.1)
    of = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    new = {id(p) for head in (model.subject_head, model.object_head) for p in head.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in of
            continue
        rate, decay = of[id(parameter)]
        is_new = id(parameter) in new or "cond" in name or "projection" in name
        assert (rate, decay) == (1.0 + is_new, 0.0 if parameter.ndim == 1 else 0.1), name
    count = sum(p.requires_grad for p in model.parameters())
    assert sum(len(g["params"]) for g in groups) == count == len(of)


def test_training_is_in_training_mode_and_its_first_step_learns(monkeypatch, tmp_path):
    seen = []
    step = experiment.step_of

    def watched(model, *arguments):
        seen.append((model.training, {k: v.clone() for k, v in model.state_dict().items()}))
        return step(model, *arguments)

    monkeypatch.setattr(experiment, "step_of", watched)
    job = a_job(folder=tmp_path)
    data = experiment.texts(QUICK, experiment.WEBNLG)
    experiment.learn(job, data, experiment.Choice(), curve=True)
    # an epoch ends with an evaluation, after which the training mode is back
    assert all(training for training, _ in seen)
    moved = [not torch.equal(value, seen[1][1][name]) for name, value in seen[0][1].items()]
    assert sum(moved) > len(moved) / 2
    assert len(seen) == QUICK.webnlg.epochs * math.ceil(20 / QUICK.batch)


@pytest.mark.parametrize(
    "variant", [experiment.WEBNLG, f"{experiment.CONLL}, negatives of the article"]
)
def test_a_training_that_is_killed_goes_on_to_the_same_figures(variant, tmp_path, monkeypatch):
    three = replace(QUICK.webnlg, epochs=3)
    settings = replace(QUICK, webnlg=three, conll04=three)
    undisturbed = figures_of(a_job(variant, settings, tmp_path / "undisturbed"))
    step, calls = experiment.step_of, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "step_of", dies)
        with pytest.raises(KeyboardInterrupt):
            figures_of(a_job(variant, settings, tmp_path / "killed"))
    torch.manual_seed(7)  # another process has another global generator
    assert figures_of(a_job(variant, settings, tmp_path / "killed")) == undisturbed
    assert len(calls) == 6


# ---------------------------------------------------------------- data that is not shipped


def as_prgc(examples):
    rows = [
        {"text": e.text, "triple_list": [list(triple.key) for triple in e.triples]}
        for e in examples
    ]
    return json.dumps(rows)


def as_duie(examples, wrap):
    def row(example):
        spo = [
            {"subject": s, "predicate": p, "object": {"@value": o} if wrap else o}
            for s, p, o in (triple.key for triple in example.triples)
        ]
        return json.dumps({"text": example.text, "spo_list": spo}, ensure_ascii=False)

    return "".join(row(example) + "\n" for example in examples)


@pytest.mark.parametrize("form", ["PRGC", "DuIE 1.0", "DuIE 2.0"])
def test_the_public_formats_are_read(form, tmp_path):
    examples = [
        Example("Ada\u2028met Bea", [("Ada", "met", "Bea")]),  # no end of a line in JSON
        Example("无", []),
    ]
    text = as_prgc(examples) if form == "PRGC" else as_duie(examples, wrap=form == "DuIE 2.0")
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    assert experiment.read_examples(path) == examples


def test_a_triple_without_one_of_its_parts_is_left_out_and_counted(tmp_path, capsys):
    path = tmp_path / "file.json"
    triples = [["a", "r", ""], ["a", "r", "b"]]
    path.write_text(json.dumps([{"text": "a b", "triple_list": triples}]))
    assert experiment.read_examples(path) == [Example("a b", [("a", "r", "b")])]
    assert "1 incomplete" in capsys.readouterr().out


def test_the_large_run_learns_files_by_heart_and_keeps_its_best_model(tmp_path):
    data = experiment.texts(QUICK, experiment.WEBNLG)
    train = tmp_path / "train.json"
    train.write_text(as_prgc(data.train[:8]))
    report = experiment.large(
        [
            *("--train", str(train), "--validation", str(train), "--encoder", experiment.SMALL),
            *(
                "--output",
                str(tmp_path / "model"),
                "--device",
                "cpu",
                "--epochs",
                "15",
                "--workers",
                "0",
            ),
            *("--batch", "4", "--encoder-rate", "3e-3", "--head-rate", "1e-2"),
        ]
    )
    assert report.f1 > 0.5
    assert report.groups["seen"]["unseen"].n_gold == 0
    model = experiment.TripleExtractor.from_pretrained(tmp_path / "model")
    assert isinstance(model.encoder, nn.Module)
    again = model.evaluate(data.train[:8], amp_dtype=torch.bfloat16)
    assert (again.tp, again.n_pred, again.n_gold) == (report.tp, report.n_pred, report.n_gold)
