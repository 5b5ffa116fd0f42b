"""Records: what is shipped is sound and current, and what is not sound is refused by name."""

import copy
import json
import math
import re

import numpy as np
import pytest

from benchmarks import harness as benchmarks
from cln_tutorial import results
from experiments import harness

SOUND = {
    "experiment": "made",
    "command": "make reproduce NAME=made",
    "code": "0" * 64,
    "data": {"made": "0" * 64},
    "versions": {"torch": "2.13.0"},
    "device": "2 CPU cores",
    "seconds": 12.5,
    "figures": {
        # mean and standard error by hand: 2 and sqrt(((1-2)^2 + 0 + (3-2)^2) / (3 * 2)) = sqrt(1/3)
        "loss": {
            "values": [1.0, 2.0, 3.0],
            "mean": 2.0,
            "standard_error": math.sqrt(1 / 3),
            "unit": "nats | token",
        },
        "constant": {
            "values": [5.0, 5.0, 5.0, 5.0],
            "mean": 5.0,
            "standard_error": 0.0,
            "unit": "%",
        },
    },
    "published": [
        {
            "figure": "loss",
            "value": 1.25,
            "source": "article 1, table 2",
            "comparable": False,
            "why": "another split",
        }
    ],
}
TIME = {"microseconds": 20.0, "ratio": {"q25": 1.5, "median": 2.0, "q75": 2.25}}
GATE = {"result": "y", "error": 1e-7, "limit": 1e-6}
SOUND_BENCHMARK = {
    "benchmark": "made",
    "command": "make bench NAME=made",
    "code": "0" * 64,
    "devices": {
        "2 CPU cores": {
            "command": "python -m benchmarks.made",
            "versions": {"torch": "2.13.0"},
            "load": [0.1, 0.2, 0.3],
            "seconds": 60.0,
            "threads": 1,
            "rounds": 25,
            "missing": {"peer": "not installed"},
            "rows": [
                {
                    "op": "double",
                    "shape": [2, 3],
                    "dtype": "float32",
                    "mode": "forward",
                    "setting": "fixed heap",
                    "baseline": "eager",
                    "bound": "copy",
                    "refused": {"other": "y is wrong"},
                    "contenders": {
                        "eager": {
                            "gate": GATE,
                            "cpu": {
                                "microseconds": 40.0,
                                "ratio": {"q25": 1.0, "median": 1.0, "q75": 1.0},
                            },
                        },
                        "fast": {"gate": GATE, "cpu": TIME, "wall": TIME},
                        "copy": {"gate": GATE, "cpu": TIME},
                    },
                }
            ],
            "goals": [
                {"what": "a", "sense": "at least", "wanted": 1.5, "reached": 2.0, "met": True},
                {"what": "b", "sense": "at most", "wanted": 1.5, "reached": 2.0, "met": False},
                {"what": "c", "sense": "at least", "wanted": 1.5, "reached": None, "met": None},
            ],
        }
    },
}
PART = ["devices", "2 CPU cores"]
ROW = [*PART, "rows", 0]
FAST = [*ROW, "contenders", "fast"]
REMOVED = object()


def changed(path, value, sound=SOUND):
    """A sound record with one field, named by its path, replaced or removed."""
    record = json.loads(json.dumps(sound))  # nothing in it is shared any more
    *parents, last = path
    holder = record
    for step in parents:
        holder = holder[step]
    if value is REMOVED:
        del holder[last]
    else:
        holder[last] = value
    return record


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The package's records replaced by those that a test writes."""
    monkeypatch.setattr(results, "_folder", lambda: tmp_path)
    return tmp_path


def write(folder, record, name="made.json"):
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


def test_every_shipped_record_is_sound():
    assert results.names()
    for name in results.names():
        record = results.load(name)
        assert record["experiment"] == name
        assert all(figure.count(".") <= 1 for figure in record["figures"])
    for name in results.names("benchmark"):
        results.load(name, "benchmark")


def test_no_shipped_record_is_older_than_the_code_it_measured_unless_it_says_why():
    for name in results.names():
        record = results.load(name)
        current = record["code"] == harness.code_hash(name)
        assert current or record.get("stale"), f"make reproduce NAME={name}"


def test_no_shipped_benchmark_is_older_than_the_code_it_measured_unless_it_says_why():
    for name in results.names("benchmark"):
        record = results.load(name, "benchmark")
        current = record["code"] == benchmarks.code_hash(name)
        assert current or record.get("stale"), f"make bench NAME={name}"


def test_every_shipped_figure_stands_in_the_table():
    table = results.table()
    for name in results.names():
        for figure, each in results.load(name)["figures"].items():
            row, dot, column = figure.partition(".")
            if not dot:
                rows = [r for r in table.splitlines() if f"| {name} " in r and f"| {figure} " in r]
                assert len(rows) == 1, figure
                continue
            group, _, short = row.partition("-")
            grid = table.split(f"**{name}, {group}**")[1].split("\n**")[0]
            lines = [line.strip("| ").split("|") for line in grid.splitlines() if line[:1] == "|"]
            head, *rows = [[cell.strip() for cell in line] for line in lines]
            (found,) = [line[head.index(column)] for line in rows if line[0] == (short or group)]
            mean, error = map(float, found.split(" ± "))
            assert mean == pytest.approx(each["mean"], abs=each["standard_error"] / 5, rel=1e-3)
            assert error == pytest.approx(each["standard_error"], rel=0.06)  # two digits
            # Rows of a column may have units of their own.
            (said,) = [line for line in grid.splitlines() if line.startswith(f"- {column}: ")]
            units = said.removeprefix(f"- {column}: ")
            assert f"; {each['unit']}, {len(each['values'])} seeds" in f"; {units}"


def test_a_sound_record_passes():
    results.check(SOUND)
    results.check(changed(["published", 0, "value"], None))
    results.check(SOUND | {"stale": "only a comment of the module changed"})


@pytest.mark.parametrize("field", [f for f in SOUND])
def test_a_missing_field_is_named(field):
    with pytest.raises(ValueError, match=rf"`{field}` is missing"):
        results.check(changed([field], REMOVED))


@pytest.mark.parametrize("field", ["values", "mean", "standard_error", "unit"])
def test_a_missing_field_of_a_figure_is_named_with_the_figure(field):
    with pytest.raises(ValueError, match=rf"`figures\.loss\.{field}` is missing"):
        results.check(changed(["figures", "loss", field], REMOVED))


@pytest.mark.parametrize("field", ["figure", "value", "source", "comparable", "why"])
def test_a_missing_field_of_a_published_figure_is_named(field):
    with pytest.raises(ValueError, match=rf"`published\[0\]\.{field}`"):
        results.check(changed(["published", 0, field], REMOVED))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["experiment"], "", r"`experiment` must be text that is not empty; got ''"),
        (["code"], "abc", r"`code` must be a SHA-256"),
        (["data"], {}, r"`data` must be a mapping that is not empty"),
        (["seconds"], -1.0, r"`seconds` must not be negative; got -1"),
        (["seconds"], True, r"`seconds` must be a finite number; got True"),
        (["stale"], "", r"`stale` must be text that is not empty"),
        (["figures"], {}, r"`figures` must be a mapping that is not empty"),
        (["figures", "loss"], 2.0, r"`figures.loss` must be a mapping; got 2.0"),
        (["figures", "loss", "values"], [1.0, 3.0], r"`figures.loss.values` .* 3 seeds; got 2"),
        (["figures", "loss", "values", 1], math.nan, r"`figures.loss.values\[1\]` .* got nan"),
        (["figures", "loss", "values", 1], "2", r"`figures.loss.values\[1\]` .* got '2'"),
        (["figures", "loss", "mean"], math.inf, r"`figures.loss.mean` must be a finite number"),
        (["figures", "loss", "mean"], 2.001, r"`figures.loss.mean` is 2.001, .* give 2.0"),
        # the population's error, with n instead of n - 1
        (["figures", "loss", "standard_error"], math.sqrt(2 / 9), r"`figures.loss.standard_error`"),
        (["published"], [], r"`published` must be a list that is not empty"),
        (["published", 0, "figure"], "lost", r"`published\[0\].figure` must be one of loss, const"),
        (["published", 0, "value"], math.nan, r"`published\[0\].value` must be a finite number"),
        (["published", 0, "comparable"], "no", r"`published\[0\].comparable` must be true or fal"),
        (["published", 0, "why"], "", r"`published\[0\].why` must be text that is not empty"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_holds(path, value, message):
    with pytest.raises(ValueError, match=message):
        results.check(changed(path, value))


def test_a_benchmark_is_found_under_its_own_kind_only(folder):
    write(folder, SOUND_BENCHMARK, "made.benchmark.json")
    assert results.names() == ()
    assert results.names("benchmark") == ("made",)
    assert results.load("made", "benchmark") == SOUND_BENCHMARK


def test_a_sound_benchmark_passes():
    results.check(SOUND_BENCHMARK, "benchmark")
    results.check(SOUND_BENCHMARK | {"stale": "only a comment changed"}, "benchmark")
    for path, value in [
        ([*PART, "missing"], {}),
        ([*PART, "goals"], []),
        ([*ROW, "refused"], {}),
        ([*ROW, "bound"], REMOVED),
        ([*PART, "stale"], "measured with other code"),
    ]:
        results.check(changed(path, value, SOUND_BENCHMARK), "benchmark")


@pytest.mark.parametrize(
    ("holder", "fields", "said"),
    [
        ([], list(SOUND_BENCHMARK), ""),
        (PART, ["command", "versions", "load", "seconds", "threads", "rounds", "rows"], "devices"),
        (ROW, ["op", "shape", "dtype", "mode", "setting", "baseline", "contenders"], "rows[0]"),
        (FAST, ["gate", "cpu"], "contenders.fast"),
        ([*FAST, "gate"], ["result", "error", "limit"], "fast.gate"),
        ([*FAST, "cpu"], ["microseconds", "ratio"], "fast.cpu"),
        ([*FAST, "cpu", "ratio"], ["q25", "median", "q75"], "fast.cpu.ratio"),
        ([*PART, "goals", 0], ["what", "sense", "wanted"], "goals[0]"),
    ],
)
def test_a_missing_field_of_a_benchmark_is_named_with_its_place(holder, fields, said):
    for field in fields:
        record = changed([*holder, field], REMOVED, SOUND_BENCHMARK)
        with pytest.raises(ValueError, match=rf"{re.escape(said)}.*{field}` is missing"):
            results.check(record, "benchmark")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["stale"], "", r"`stale` must be text that is not empty"),
        (["devices", "2 CPU cores"], [1], r"`devices.2 CPU cores` must be a mapping; got \[1\]"),
        ([*PART, "stale"], "", r"`devices.2 CPU cores.stale` must be text"),
        ([*PART, "missing"], REMOVED, r"cores.missing` must be a mapping from names to reasons"),
        ([*PART, "missing", "peer"], "", r"cores.missing` must be a mapping from names to rea"),
        ([*PART, "goals"], REMOVED, r"cores.goals` must be a list; got None"),
        ([*ROW, "refused"], REMOVED, r"rows\[0\].refused` must be a mapping from names to reas"),
        ([*ROW, "baseline"], "lost", r"rows\[0\].baseline` must be one of eager, fast, copy; got"),
        ([*ROW, "bound"], "lost", r"rows\[0\].bound` must be one of eager, fast, copy; got 'lost'"),
        ([*ROW, "contenders", "eager", "cpu"], REMOVED, r"contenders.eager` has none of cpu, wall"),
        ([*FAST, "gate", "error"], 2e-6, r"fast.gate.error` is 2e-06, above its limit 1e-06"),
        ([*FAST, "cpu", "ratio", "q25"], 2.1, r"fast.cpu.ratio` must rise from above zero"),
        ([*FAST, "cpu", "ratio", "q75"], 1.9, r"fast.cpu.ratio` must rise from above zero"),
        ([*FAST, "cpu", "ratio", "q25"], 0.0, r"fast.cpu.ratio` must rise from above zero"),
        ([*PART, "goals", 0, "sense"], "above", r"goals\[0\].sense` must be 'at least' or 'at mo"),
        ([*PART, "goals", 0, "reached"], "2", r"goals\[0\].reached` must be a finite number, or "),
        ([*PART, "goals", 0, "met"], None, r"goals\[0\].met` must be True, because 2.0 was reach"),
        ([*PART, "goals", 1, "met"], True, r"goals\[1\].met` must be False, because 2.0 was reac"),
        ([*PART, "goals", 2, "met"], False, r"goals\[2\].met` must be None, because None was rea"),
        ([*PART, "goals", 2, "met"], REMOVED, r"goals\[2\].met` .* got 'no such field'"),
    ],
)
def test_a_wrong_field_of_a_benchmark_is_named_with_what_it_holds(path, value, message):
    with pytest.raises(ValueError, match=message):
        results.check(changed(path, value, SOUND_BENCHMARK), "benchmark")


def test_the_speed_table_shows_the_ratio_with_its_quartiles_and_the_goals(folder):
    write(folder, SOUND_BENCHMARK, "made.benchmark.json")
    title, _, head, _, row, _, *notes = results.speed_table("made").splitlines()
    assert title == "**double, forward**, float32, allocator: fixed heap; 2 CPU cores"
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "shape",
        "eager, µs",
        "fast",
        "copy",
    ]
    ratio = "2.00 (1.50-2.25)"
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "2×3",
        "40",
        ratio,
        ratio,
    ]
    assert notes == [
        "- goal met: a: 2, wanted at least 1.5.",
        "- goal not met: b: 2, wanted at most 1.5.",
        "- goal not measured: c: wanted at least 1.5.",
        "- not measured: peer (not installed).",
        "- no figure: other, double (2, 3), float32, forward, fixed heap: y is wrong.",
    ]


def test_the_speed_table_has_a_part_per_device_mode_and_setting_and_no_cell_for_the_missing():
    record = copy.deepcopy(SOUND_BENCHMARK)
    part = record["devices"]["2 CPU cores"]
    other = copy.deepcopy(part["rows"][0]) | {"shape": [7, 7], "op": "double, in place"}
    del other["contenders"]["fast"]
    part["rows"] += [other, copy.deepcopy(other) | {"mode": "backward"}]
    record["devices"]["a GPU"] = part | {"stale": "measured with other code"}
    table = results.speed_table(record)
    titles = [line for line in table.splitlines() if line.startswith("**")]
    assert titles == [
        f"**double, {mode}**, float32, allocator: fixed heap; {device}"
        for device in record["devices"]
        for mode in ("forward", "backward")
    ]
    assert table.count("- older than its code: measured with other code.") == 1
    line = next(line for line in table.splitlines() if "7×7" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "7×7, in place",
        "40",
        "-",
        "2.00 (1.50-2.25)",
    ]
    assert "2 CPU cores" not in results.speed_table(record, "a GPU")


def test_a_gpu_shows_the_time_of_its_events():
    record = copy.deepcopy(SOUND_BENCHMARK)
    for contender in record["devices"]["2 CPU cores"]["rows"][0]["contenders"].values():
        contender["cuda"] = contender.pop("cpu")
    results.check(record, "benchmark")
    assert "| 40        | 2.00 (1.50-2.25) |" in results.speed_table(record)


def test_an_unknown_device_of_a_benchmark_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="`device` must be one of 2 CPU cores; got 'a GPU'"):
        results.speed_table(SOUND_BENCHMARK, "a GPU")


def test_an_unknown_name_is_answered_with_the_nearest(folder):
    write(folder, SOUND)
    with pytest.raises(ValueError, match=r"no experiment record 'mode': did you mean 'made'\?"):
        results.load("mode")
    with pytest.raises(ValueError, match=r"no benchmark record 'made': There are: none"):
        results.load("made", "benchmark")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"`kind` must be one of experiment, benchmark; got 'tes"):
        results.names("test")


def test_a_record_under_another_name_is_refused(folder):
    write(folder, SOUND, "other.json")
    with pytest.raises(ValueError, match=r"`experiment` of the record 'other' is 'made'"):
        results.load("other")


def test_load_gives_what_was_written(folder):
    write(folder, SOUND)
    assert results.load("made") == SOUND


def test_the_summary_is_that_of_numpy():
    # numpy's mean, and its standard deviation with one degree of freedom less
    values = np.random.default_rng(0).normal(3.0, 0.1, size=5).tolist()
    summary = results.summarise(values, "nats")
    assert summary["values"] == values
    assert summary["unit"] == "nats"
    assert summary["mean"] == pytest.approx(np.mean(values), rel=1e-14)
    error = np.std(values, ddof=1) / np.sqrt(5)
    assert summary["standard_error"] == pytest.approx(error, rel=1e-12)


def test_the_table_shows_mean_error_unit_seeds_and_what_was_published(folder):
    write(folder, SOUND)
    head, rule, loss, constant, _, note = results.table().splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "experiment",
        "figure",
        "mean ± standard error",
        "unit",
        "seeds",
        "published",
    ]
    assert set(rule) == set("|- ")
    # sqrt(1/3) = 0.577: two digits of the error, and as many decimals of the mean
    assert "| 2.00 ± 0.58 " in loss
    assert r"| nats \| token " in loss, "a bar inside a cell would end it"
    assert loss.split("|")[-2].strip() == "1.25"
    assert note == "- loss: published 1.25 (article 1, table 2); not comparable: another split."
    assert "| 5 ± 0 " in constant
    assert constant.split("|")[-3].strip() == "4"
    assert constant.split("|")[-2].strip() == "-"


def gridded():
    figure = results.summarise
    return SOUND | {
        "published": [SOUND["published"][0] | {"figure": "zh-norms.gap"}],
        "figures": {
            "loss": figure([1.0, 2.0, 3.0], "nats"),
            "zh-none.pairs": figure([4.0, 4.0, 4.0], "%"),
            "zh-norms.gap": figure([1.0, 2.0, 3.0], "nats"),
            "zh-norms.pairs": figure([5.0, 5.0, 5.0], "%"),
            "made.gap": figure([6.0, 6.0, 6.0], "nats"),
        },
    }


def test_figures_of_a_group_stand_in_a_grid_of_rows_and_columns(folder):
    write(folder, gridded())
    head, rule, none, norms, _, *notes = results.grid("made", "zh").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in (head, none, norms)]
    assert cells == [
        ["zh", "pairs", "gap"],
        ["none", "4 ± 0", "-"],
        ["norms", "5 ± 0", "2.00 ± 0.58"],
    ]
    assert set(rule) == set("|- ")
    assert notes == ["- pairs: %, 3 seeds.", "- gap: nats, 3 seeds."]
    head, _, none, norms, _, note = results.grid("made", "zh", ["gap"]).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in (head, none, norms)]
    assert cells == [["zh", "gap"], ["none", "-"], ["norms", "2.00 ± 0.58"]]
    assert note == "- gap: nats, 3 seeds."
    with pytest.raises(ValueError, match="`columns` must be of pairs, gap; got 'gaps'"):
        results.grid("made", "zh", ["gaps"])


def test_the_table_has_every_grid_below_the_figures_without_group(folder):
    write(folder, gridded())
    table = results.table()
    assert table.count("| loss ") == 1
    assert "zh-norms.gap |" not in table
    for group in ("zh", "made"):
        assert f"**made, {group}**\n\n{results.grid('made', group)}" in table
    assert table.splitlines()[-1].startswith("- zh-norms.gap: published 1.25")


def test_an_unknown_group_is_answered_with_those_there_are(folder):
    write(folder, gridded())
    with pytest.raises(ValueError, match="`group` must be one of zh, made; got 'norms'"):
        results.grid("made", "norms")
    with pytest.raises(ValueError, match="must be one of none; got 'zh'"):
        results.grid(SOUND, "zh")


def test_the_table_says_that_a_published_figure_is_missing_or_comparable(folder):
    record = changed(["published", 0, "value"], None)
    record["published"][0]["comparable"] = True
    write(folder, record)
    note = "- loss: published none (article 1, table 2); comparable: another split."
    assert results.table().splitlines()[-1] == note


def test_claims_that_differ_in_the_figure_only_share_a_line(folder):
    both = [SOUND["published"][0] | {"figure": figure} for figure in SOUND["figures"]]
    write(folder, SOUND | {"published": both})
    shared = ", ".join(SOUND["figures"])
    assert [line for line in results.table().splitlines() if line.startswith("-")] == [
        f"- {shared}: published 1.25 (article 1, table 2); not comparable: another split."
    ]


def test_the_table_shows_only_the_records_asked_for(folder):
    write(folder, SOUND)
    write(folder, SOUND | {"experiment": "other"}, "other.json")
    assert "| other " in results.table()
    assert "| other " not in results.table(["made"])


@pytest.mark.parametrize(
    ("error", "shown"),
    [(12.3, "1235 ± 12"), (0.996, "1234.57 ± 1.00"), (0.00123, "1234.5678 ± 0.0012")],
)
def test_a_mean_has_as_many_decimals_as_two_digits_of_its_error(folder, error, shown):
    # three values around the mean with exactly this standard error: spread error * sqrt(3)
    spread = error * math.sqrt(3)
    values = [1234.5678 - spread, 1234.5678, 1234.5678 + spread]
    record = changed(["figures", "loss"], results.summarise(values, "nats"))
    write(folder, record)
    assert f"| {shown} " in results.table()
