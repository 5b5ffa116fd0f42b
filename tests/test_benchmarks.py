"""Benchmarks: wrong results get no figure, what slows the machine cancels, records merge."""

import contextlib
import copy
import functools
import importlib
import itertools
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    conditional_norm,
    energy_models,
    gan_architectures,
    gumbel_softmax,
    harness,
    intermediate_variables,
    safe_generators,
    smoothing,
    spherical_embedding,
    triple_extraction,
    weight_averaging,
)
from cln_tutorial import results
from experiments import harness as runs

ROOT = Path(__file__).parent.parent
X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
PACE = harness.Pace(rounds=5, shortest=0.01)


def contender(run, expected=2 * X):
    return harness.Contender(lambda: [run()], {"y": expected.double()})


def made(case, device):
    return {
        "eager": contender(lambda: X + X),
        "product": contender(lambda: 2 * X),
        "nearly": contender(lambda: 2 * X * 1.01),
        "infinite": contender(lambda: 2 * X / 0),
        "not a number": contender(lambda: X * float("nan")),
        "cut": contender(lambda: 2 * X[:1]),
        "broken": contender(lambda: torch.ones(2) @ torch.ones(3)),
    }


def right(case, device):
    return {name: made(case, device)[name] for name in ("eager", "product")}


def case(contenders=made, **fields):
    about = {"op": "double", "shape": (2, 2), "dtype": "float32", "mode": "forward"}
    return harness.Case(**about | fields, contenders=contenders, limits={"y": 1e-6})


def made_watch(speeds, log=None, slowdown=None):
    """A stopwatch for contenders given as texts: their seconds, slower in some rounds."""
    seen = Counter()

    def watch(run, calls):
        if log is not None:
            log.append((run.name, calls))
        seen[run.name] += 1
        factor = slowdown(seen[run.name]) if slowdown else 1.0
        return {"cpu": speeds[run.name] * factor, "wall": 2 * speeds[run.name] * factor}

    return watch


class Named:
    def __init__(self, name):
        self.name = name

    def __call__(self):
        return []


# --- the gate -------------------------------------------------------------------------------------


def test_a_wrong_contender_gets_a_reason_and_no_figure():
    row = harness.measure(case(), "cpu", harness.Pace(rounds=2, shortest=0.0))
    assert set(row["contenders"]) == {"eager", "product"}
    assert row["refused"].keys() == {"nearly", "infinite", "not a number", "cut", "broken"}
    # 2 * 4 * 0.01 of the largest entry, 2 * 4
    assert row["refused"]["nearly"] == "y is wrong by 0.01 of its largest entry, limit 1e-06"
    assert "wrong by inf" in row["refused"]["infinite"]
    assert "wrong by inf" in row["refused"]["not a number"]
    assert "shape (1, 2), not (2, 2)" in row["refused"]["cut"]
    assert row["refused"]["broken"].startswith("RuntimeError: ")


def test_the_gate_records_the_result_that_is_nearest_to_its_limit():
    expected = {"y": 2 * X.double(), "dx": 2 * X.double()}
    run = harness.Contender(lambda: [2 * X + 2e-3, 2 * X + 1.6e-3], expected)
    limited = harness.Case("double", (2, 2), "float32", "both", made, {"y": 1e-3, "dx": 4e-4})
    passed, refused = harness.gate(limited, {"one": run})
    # of the largest entry, 8, the errors are 2.5e-4, a quarter of its limit, and 2e-4, a half
    assert passed == {"one": {"result": "dx", "error": 2e-4, "limit": 4e-4}}
    assert refused == {}


def test_a_wrong_number_is_refused_with_what_it_is_and_what_is_right():
    wrong = harness.Contender(lambda: [torch.tensor(1.5)], {"y": torch.tensor(2.0).double()})
    _, refused = harness.gate(case(), {"half": wrong})
    said = "y is wrong by 0.25 of its largest entry, limit 1e-06: 1.50000 in place of 2.00000"
    assert refused == {"half": said}


def test_what_changes_its_input_is_checked_from_a_known_one_and_timed_without_that():
    state, log = torch.full((2,), 7.0), []

    def run():
        log.append("run")
        state.mul_(2)

    def checked():
        log.append("checked")
        state.fill_(1.0)
        run()
        return [state]

    expected = {"y": torch.full((2,), 2.0).double()}
    contenders = {"eager": harness.Contender(run, expected, checked=checked)}
    row = harness.measure(case(lambda *_: contenders), "cpu", harness.Pace(2, 0.0))
    assert log[:2] == ["checked", "run"]
    assert log.count("checked") == 1
    assert log.count("run") > 3
    assert row["contenders"]["eager"]["gate"]["error"] == 0


def test_nothing_is_measured_against_a_wrong_baseline():
    with pytest.raises(RuntimeError, match=r"nothing to compare with: nearly, y is wrong by 0\.01"):
        harness.measure(case(baseline="nearly"), "cpu", PACE)


# --- the rounds -----------------------------------------------------------------------------------


def test_every_round_times_every_contender_once_in_a_new_order():
    log, names = [], ("a", "b", "c")
    watch = made_watch(dict.fromkeys(names, 0.02), log)
    pace = harness.Pace(rounds=20, shortest=0.01)
    times = harness.time_rounds({name: Named(name) for name in names}, watch, pace)
    timed = [name for name, _ in log[len(names) :]]  # one call each found the number of calls
    rounds = [tuple(timed[start : start + 3]) for start in range(0, len(timed), 3)]
    assert len(rounds) == 20
    assert all(sorted(each) == list(names) for each in rounds)
    assert len(set(rounds)) == 6, "20 draws miss one of the 6 orders with probability 0.15; seed 0"
    assert all(len(seconds) == 20 for each in times.values() for seconds in each.values())


def test_short_contenders_are_called_often_enough_to_fill_a_timing():
    log = []
    watch = made_watch({"short": 0.0003, "long": 0.5}, log)
    harness.time_rounds({name: Named(name) for name in ("short", "long")}, watch, PACE)
    # 0.01 s / 0.0003 s = 33.3 calls at least
    timed = log[-2 * PACE.rounds :]
    assert all(calls >= 34 for name, calls in timed if name == "short")
    assert all(calls <= 100 for name, calls in timed if name == "short")
    assert all(calls == 1 for name, calls in timed if name == "long")


def test_a_contender_runs_before_it_is_timed():
    called = []

    def watch(run, calls):
        called.append("timed")
        return {"cpu": 1.0}

    harness.time_rounds({"one": lambda: called.append("run")}, watch, PACE)
    assert called[:2] == ["run", "timed"]


def test_a_machine_that_slows_down_for_a_while_leaves_the_ratio():
    pair = {"eager": Named("eager"), "fast": Named("fast")}
    watch = made_watch({"eager": 0.3, "fast": 0.1}, slowdown=lambda turn: 1.0 + 10 * (turn % 2))
    times = harness.time_rounds(pair, watch, PACE)
    row = {"contenders": {name: {} for name in pair}}
    harness.add_times(row, case(), times)
    for clock in ("cpu", "wall"):
        ratio = row["contenders"]["fast"][clock]["ratio"]
        assert ratio == {"q25": 3.0, "median": 3.0, "q75": 3.0}
        assert row["contenders"]["eager"][clock]["ratio"]["median"] == 1.0


def test_ratio_and_microseconds_are_those_of_numpy():
    draw = np.random.default_rng(0)
    eager, fast = draw.uniform(2e-3, 3e-3, 25), draw.uniform(1e-3, 2e-3, 25)
    row = {"contenders": {"eager": {}, "fast": {}}}
    harness.add_times(row, case(), {"eager": {"cpu": eager}, "fast": {"cpu": fast}})
    found = row["contenders"]["fast"]["cpu"]
    expected = np.percentile(eager / fast, [25, 50, 75])
    # four digits are kept
    assert list(found["ratio"].values()) == pytest.approx(expected, rel=5e-4)
    assert list(found["ratio"]) == ["q25", "median", "q75"]
    assert found["microseconds"] == pytest.approx(1e6 * np.median(fast), rel=5e-4)


def test_the_share_of_the_bandwidth_is_that_of_a_copy_in_the_same_round():
    # The input has 16 bytes. A copy moves 32 in 2 s and then in 4 s: 16 and 8 bytes per second.
    # The contender moves 48 in 6 s and then in 12 s: 8 and 4 bytes per second, a half each time.
    row = {"contenders": {"eager": {}}}
    times = {"eager": {"cuda": [6.0, 12.0]}, "copy": {"cuda": [2.0, 4.0]}}
    harness.add_times(row, case(traffic=48), times)
    assert row["contenders"]["eager"]["share_of_copy"] == {"q25": 0.5, "median": 0.5, "q75": 0.5}
    assert row["copy"]["gigabytes_per_second"]["median"] == 12e-9
    assert set(row["contenders"]) == {"eager"}


def test_cpu_time_is_that_of_the_thread_and_wall_time_that_of_the_clock():
    seconds = harness.stopwatch("cpu")(lambda: time.sleep(0.02), 3)
    assert seconds["wall"] >= 0.02
    assert seconds["cpu"] < 0.01, "a sleeping thread works no more than a few microseconds"


def test_a_gpu_is_timed_by_its_events_with_a_cold_cache(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            assert log[-1] == "wait"
            return 2.0  # milliseconds, says CUDA

    class Cache:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    seconds = harness._cuda_seconds(Cache(), lambda: log.append("run"), 2)
    assert seconds == {"cuda": 0.002}
    assert log == 2 * ["flush", "event", "run", "event"] + ["wait"]


# --- memory ---------------------------------------------------------------------------------------


def test_memory_kept_for_the_backward_pass_is_counted_once_per_storage():
    a, b = torch.ones(4, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    assert harness.kept_bytes(lambda: a + b) == 0, "a sum needs nothing"
    assert harness.kept_bytes(lambda: a * b) == 2 * 4 * 8 * 4
    assert harness.kept_bytes(lambda: a * a.view(4, 8)) == 4 * 8 * 4, "one storage, two tensors"
    # the product, which exp keeps as its result, and both factors
    assert harness.kept_bytes(lambda: (a * b).exp()) == 3 * 4 * 8 * 4


# --- child processes ------------------------------------------------------------------------------


def environment_and_faults():
    """What a child sees, and the pages that ten tensors of 8 MB cost once the heap is warm."""

    def allocate():
        for _ in range(10):
            torch.empty(2**21).fill_(1.0)

    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return dict(os.environ), faults


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_the_fixed_heap_spares_page_faults_and_the_environment_is_given_back(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    before = dict(os.environ)
    default, fixed = (harness.in_child(s, environment_and_faults) for s in harness.SETTINGS)
    assert dict(os.environ) == before
    assert not [name for name in default[0] if name.startswith("MALLOC_")]
    assert harness.SETTINGS["fixed heap"].items() <= fixed[0].items()
    for seen, _ in (default, fixed):
        assert harness.ONE_THREAD.items() <= seen.items()
    # 8 MB are 2048 pages of 4 kB; a heap that is kept needs none of them again
    assert fixed[1] < 200


# --- the record -----------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A made repository, and all work in this process."""
    for path in ["cln_tutorial/made.py", "benchmarks/made.py", "cln_tutorial/kernels/made.py"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "in_child", lambda setting, work, *arguments: work(*arguments))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def benchmark(contenders=right, goals=(), **fields):
    return harness.Benchmark(
        "made",
        cases=lambda device: [case(contenders, shape=(2, 2))],
        quick=lambda device: [case(contenders)],
        missing=lambda device: {"peer": "not installed"},
        packages=("numpy", "no-such-package"),
        goals=lambda device: list(goals),
        **fields,
    )


def run(path, *arguments, **fields):
    harness.main(benchmark(**fields), ["--quick", "--quiet", "--output", str(path), *arguments])
    return json.loads(path.read_text())


def test_a_run_writes_a_sound_record_with_both_settings(here):
    record = run(here / "record.json")
    results.check(record, "benchmark")
    (part,) = record["devices"].values()
    assert [row["setting"] for row in part["rows"]] == ["default", "fixed heap"]
    assert part["missing"] == {"peer": "not installed"}
    assert part["versions"]["torch"] == torch.__version__
    assert "no-such-package" not in part["versions"]
    assert part["command"] == "python -m benchmarks.made --quick"
    assert len(part["load"]) == 3


def test_a_quick_run_writes_no_record_unless_asked(here, capsys):
    harness.main(benchmark(), ["--quick"])
    assert not (here / "cln_tutorial/results").exists()
    assert "**double, forward**, float32, allocator: default" in capsys.readouterr().out


def test_a_run_replaces_its_own_part_and_no_other(here):
    path = here / "record.json"
    first = run(path)
    (device,) = first["devices"]
    other = copy.deepcopy(first["devices"][device])
    first["devices"] = {"another": other, device: other | {"command": "to be replaced"}}
    path.write_text(json.dumps(first))
    second = run(path)
    assert second["devices"].keys() == {"another", device}
    assert second["devices"]["another"] == other
    assert second["devices"][device]["command"] == "python -m benchmarks.made --quick"


def test_a_part_that_was_measured_with_other_code_says_so(here):
    path = here / "record.json"
    first = run(path)
    (device,) = first["devices"]
    first["devices"]["another"] = first["devices"][device]
    path.write_text(json.dumps(first))
    (here / "cln_tutorial/made.py").write_text("2")
    second = run(path)
    why = f"measured with other code, {first['code'][:12]}"
    assert second["devices"]["another"]["stale"] == why
    assert "stale" not in second["devices"][device]
    (here / "cln_tutorial/made.py").write_text("3")
    assert run(path)["devices"]["another"]["stale"] == why, "the first reason stays"


def test_a_wrong_contender_ends_the_run_with_an_error_and_stands_in_the_record(here):
    path = here / "record.json"
    with pytest.raises(SystemExit, match="wrong, or raised an error, in some case: broken, cut"):
        run(path, contenders=made)
    (part,) = json.loads(path.read_text())["devices"].values()
    assert "nearly" in part["rows"][0]["refused"]
    assert "nearly" not in part["rows"][0]["contenders"]


def test_a_peer_that_is_wrong_is_a_finding_and_no_failure(here):
    peers = ("broken", "cut", "infinite", "nearly", "not a number")
    record = run(here / "record.json", contenders=made, peers=peers)
    (part,) = record["devices"].values()
    assert part["rows"][0]["refused"].keys() == set(peers)
    with pytest.raises(SystemExit, match=r"in some case: nearly$"):
        run(here / "record.json", contenders=made, peers=set(peers) - {"nearly"})


def test_a_benchmark_may_have_its_own_pace(here, monkeypatch):
    rounds = []
    monkeypatch.setattr(harness, "time_rounds", lambda runs, watch, pace: rounds.append(pace) or {})
    monkeypatch.setattr(harness, "add_times", lambda *_: None)
    monkeypatch.setattr(harness, "write_record", lambda *_: None)
    harness.main(benchmark(pace=harness.Pace(7)), ["--quiet"])
    assert rounds == 2 * [harness.Pace(7)]


def test_an_unsound_record_is_refused_before_the_work_and_left_as_it_is(here, monkeypatch):
    path = here / "record.json"
    path.write_text('{"benchmark": "made"}')
    monkeypatch.setattr(harness, "in_child", lambda *_: pytest.fail("it has worked"))
    with pytest.raises(ValueError, match="`command` is missing"):
        run(path)
    assert path.read_text() == '{"benchmark": "made"}'


def test_goals_say_met_not_met_or_not_measured(here):
    goals = [
        harness.Goal("a", 2.0, lambda rows: 2.5),
        harness.Goal("b", 2.0, lambda rows: 2.5, "at most"),
        harness.Goal("c", 2.0, lambda rows: None),
    ]
    (part,) = run(here / "record.json", goals=goals)["devices"].values()
    assert [goal["met"] for goal in part["goals"]] == [True, False, None]


def test_a_gpu_that_is_not_there_is_an_error(here, capsys):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(SystemExit):
        harness.main(benchmark(), ["--device", "cuda"])
    assert "this PyTorch sees no GPU" in capsys.readouterr().err


def test_the_code_hash_sees_module_kernels_and_benchmark_and_nothing_else(here):
    hashes = [harness.code_hash("made")]
    for path in ["cln_tutorial/made.py", "cln_tutorial/kernels/made.py", "benchmarks/made.py"]:
        (here / path).write_text("2")
        hashes.append(harness.code_hash("made"))
    assert len(set(hashes)) == 4
    (here / "benchmarks/other.py").write_text("2")
    assert harness.code_hash("made") == hashes[-1]
    (here / "cln_tutorial/kernels/made.py").unlink()
    assert harness.code_hash("made") not in hashes, "a chapter without kernels has a hash too"


# --- the benchmark of conditional_norm ------------------------------------------------------------


def test_the_quick_benchmark_runs_from_the_command_line_and_all_contenders_agree(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.conditional_norm", "--quick", "--quiet"]
    # Without a compiler: it would take most of the time.
    environment = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run(
        [*command, "--output", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    results.check(record, "benchmark")
    assert record["code"] == harness.code_hash("conditional_norm")
    (part,) = record["devices"].values()
    wanted = {"eager", "addcmul", "reference", "native", "numba", "auto", "F.layer_norm"}
    for row in part["rows"]:
        assert wanted - part["missing"].keys() <= row["contenders"].keys()
        assert row["refused"] == {}
        assert row["bound"] == "F.layer_norm"
        for name, each in row["contenders"].items():
            assert ("kept" in each) == (row["mode"] == "forward+backward"), name
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


def test_every_case_of_both_devices_can_go_to_a_child_process():
    for cases in (
        conditional_norm.cases("cpu"),
        conditional_norm.quick("cuda"),
        weight_averaging.cases("cpu"),
        weight_averaging.cases("cuda"),
        gumbel_softmax.cases("cpu"),
        gumbel_softmax.cases("cuda"),
        spherical_embedding.cases("cpu"),
    ):
        assert pickle.loads(pickle.dumps(cases)) == cases


@pytest.mark.parametrize("rms", [False, True])
def test_the_float64_result_is_the_formula_written_for_one_row(rms):
    draw = np.random.default_rng(0)
    x, dy = draw.normal(size=(2, 2, 3, 5))
    gamma, beta = draw.normal(size=(2, 2, 5))
    tensors = map(torch.from_numpy, (x, gamma, beta, dy))
    found = conditional_norm._truth(*tensors, rms=rms)
    for b, t in itertools.product(range(2), range(3)):
        row = x[b, t] - (0 if rms else x[b, t].mean())
        expected = row / np.sqrt((row**2).mean() + 1e-5) * gamma[b] + beta[b]
        assert found["y"][b, t].numpy() == pytest.approx(expected, rel=1e-12)
    # the shift's gradient is the sum of dy over the positions
    assert found["dbeta"].numpy() == pytest.approx(dy.sum(1), rel=1e-12)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_without_rows_are_not_measured(device):
    for goal in conditional_norm.goals(device):
        assert goal.entry([])["met"] is None


def row(shape, mode, setting, clock="cpu", **ratios):
    contenders = {
        name: {clock: {"ratio": {"median": ratio}}, "kept": 1.5, "share_of_copy": {"median": 0.87}}
        for name, ratio in ratios.items()
    }
    about = {"op": "conditional_layer_norm", "shape": list(shape), "mode": mode}
    return about | {"setting": setting, "contenders": contenders}


def test_the_goals_of_the_cpu_read_the_rows_that_they_name():
    both, large = "forward+backward", (16, 128, 768)
    rows = [
        row(large, both, "fixed heap", eager=1.0, native=1.81, numba=3.4, auto=3.0),
        row(large, both, "default", eager=1.0, native=2.2, numba=9.0, auto=3.0),
        row(large, "forward", "fixed heap", eager=1.0, native=0.1, numba=0.1, auto=0.96),
        row((8, 64, 256), both, "default", eager=1.0, native=0.1, numba=1.4, auto=0.94),
    ]
    entries = [goal.entry(rows) for goal in conditional_norm.goals("cpu")]
    assert [entry["reached"] for entry in entries] == [1.81, 2.2, 3.4, 1.4, 0.94, 1.5]
    assert [entry["met"] for entry in entries] == [True, False, False, True, False, False]


def test_the_goals_of_a_gpu_hold_from_2_26_elements_and_against_the_compiler_everywhere():
    compiled = "torch.compile"
    rows = [
        row((1, 2, 4), "forward", "default", "cuda", eager=1.0, triton=0.1, auto=1.1)
        | {"op": "modulated_rms_norm"},
        row((2, 2**15, 2**10), "forward", "default", "cuda", eager=1.0, triton=2.4, auto=2.4),
        row((2, 2**15, 2**10), "backward", "default", "cuda", eager=1.0, triton=2.1, auto=2.1),
    ]
    for each, ratio in zip(rows, [1.0, 2.0, 2.4], strict=True):
        each["contenders"][compiled] = {"cuda": {"ratio": {"median": ratio}}}
    entries = [goal.entry(rows) for goal in conditional_norm.goals("cuda")]
    reached = [entry["reached"] for entry in entries]
    # the compiler is met worst in the backward pass; the small row counts for nothing else
    assert reached == pytest.approx([2.1 / 2.4, 2.4, 0.87, 2.1, 0.87])
    assert [entry["met"] for entry in entries] == [False, False, False, True, True]


# --- the benchmark of weight_averaging ------------------------------------------------------------


def test_the_quick_benchmark_of_averages_runs_and_ours_agree_everywhere(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.weight_averaging", "--quick", "--quiet"]
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    results.check(record, "benchmark")
    assert record["code"] == harness.code_hash("weight_averaging")
    (part,) = record["devices"].values()
    ours = {"numba", "reference", "auto"} - part["missing"].keys()
    for row in part["rows"]:
        assert ours <= row["contenders"].keys()
        if row["mode"] != "correctness":
            assert row["bound"] == "averages × 1"
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


def test_torchs_own_average_is_measured_in_float32_and_refused_where_it_raises_or_stands_still():
    pace = harness.Pace(rounds=1, shortest=0.0)
    rows = [harness.measure(each, "cpu", pace) for each in weight_averaging.quick("cpu")]
    rows = {(row["op"], row["dtype"], row["mode"]): row for row in rows}
    name = "AveragedModel"
    assert name in rows[weight_averaging.FLOAT32, "float32", "K=4"]["contenders"]
    mixed = rows[weight_averaging.FLOAT32, "bfloat16", "K=1"]["refused"][name]
    assert mixed.startswith("RuntimeError: expected dtype float")
    small = rows[weight_averaging.SMALL_STEPS, "bfloat16", "correctness"]["refused"][name]
    # 1 + 0.0625 * (1 - 0.999^1000) = 1.03952
    assert small.endswith("1.00000 in place of 1.03952")
    tied = rows[weight_averaging.TIED, "float32", "correctness"]["contenders"]
    assert {name, "reference"} <= tied.keys(), "it averages a tied weight once"


class Wrong:
    """An average that moves by another share."""

    def __init__(self, tensors, weights, share):
        self.tensors, self.weights, self.share = tensors, weights, share

    def update(self):
        for tensor, weight in zip(self.tensors, self.weights, strict=True):
            tensor.copy_(torch.lerp(tensor.float(), weight.float(), self.share))


@pytest.mark.parametrize(
    ("op", "dtype", "share"),
    [
        ("FLOAT32", "float32", 0.0),
        ("FLOAT32", "float32", 0.00101),  # off by a hundredth
        ("FLOAT32", "bfloat16", 0.00101),
        ("STOCHASTIC", "bfloat16", 0.0),
        ("STOCHASTIC", "bfloat16", 0.001),  # rounded to the nearest, it hardly moves
    ],
)
def test_the_gate_of_averages_refuses_one_that_stands_still_or_moves_by_another_share(
    op, dtype, share, monkeypatch
):
    def peer(model, decay, dtype):
        weights = list(model.parameters())
        tensors = [torch.zeros_like(w, dtype=dtype).detach() for w in weights]
        return weight_averaging.Averages(Wrong(tensors, weights, share).update, [tensors])

    monkeypatch.setattr(weight_averaging, "_peers", lambda device: {"timm": peer})
    op = getattr(weight_averaging, op)
    # 65,536 weights: six standard errors of the projected move are then 0.06
    (row,) = [
        each
        for each in weight_averaging._speeds([(2, 2**15)], "cpu")
        if (each.op, each.dtype, each.mode) == (op, dtype, "K=1")
    ]
    passed, refused = harness.gate(row, weight_averaging.contenders(row, "cpu"))
    assert refused.keys() == {"timm"}
    assert {"reference", "auto", "averages × 1"} <= passed.keys()


def test_the_move_is_allowed_what_its_six_standard_errors_are():
    """2.5 / sqrt(n) in the benchmark, from the variance of rounding by one unit or not at all."""
    draw = np.random.default_rng(0)
    weight, old = draw.normal(size=(2, 10**6))
    step = 1e-3 * (weight - old)
    # The part p of a unit u is rounded up with probability p: variance p (1 - p) u^2.
    unit = 2.0 ** (np.floor(np.log2(np.abs(old))) - 7)
    part = np.abs(step) / unit % 1
    variance = (step**2 * part * (1 - part) * unit**2).sum() / (step**2).sum() ** 2
    error = np.sqrt(variance * len(step))
    assert 0.5 * 15 / 6 < error < 15 / 6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_of_averages_without_rows_are_not_measured(device):
    for goal in weight_averaging.goals(device):
        assert goal.entry([])["met"] is None


def averages_row(op, dtype, mode, clock="cpu", **ratios):
    contenders = {
        name.replace("_loop", ", loop"): {clock: {"ratio": {"median": ratio}}}
        for name, ratio in ratios.items()
    }
    return {"op": op, "dtype": dtype, "mode": mode, "contenders": contenders}


@pytest.mark.parametrize(("device", "fast"), [("cpu", "numba"), ("cuda", "triton")])
def test_the_goals_of_averages_take_the_worst_row_and_the_best_peer(device, fast):
    made = functools.partial(averages_row, clock="cuda" if device == "cuda" else "cpu")
    float32, stochastic = weight_averaging.FLOAT32, weight_averaging.STOCHASTIC
    rows = [
        made(float32, "float32", "K=1", timm=1.0, AveragedModel=1.25, **{fast: 2.0}),
        made(float32, "float32", "K=1", timm=1.0, AveragedModel=0.5, **{fast: 1.5}),
        made(float32, "float32", "K=4", timm=1.0, diffusers=2.0, **{fast: 2.4}),
        made(float32, "bfloat16", "K=1", timm=1.0, timm_loop=1.25, **{fast: 2.5}),
        made(float32, "bfloat16", "K=4", timm=1.0, timm_loop=2.0, **{fast: 4.0}),
        made(stochastic, "bfloat16", "K=1", timm=1.0, timm_loop=0.9, **{fast: 20.0}),
        made(stochastic, "bfloat16", "correctness", timm=9.0, **{fast: 0.1}),
    ]
    entries = [goal.entry(rows) for goal in weight_averaging.goals(device)]
    reached = [entry["reached"] for entry in entries]
    assert reached == pytest.approx([1.5, 1.2, 2.5, 2.0, 4.0, 2.0, 20.0])
    met = [True, False, True, True, True, False, True]
    assert [entry["met"] for entry in entries] == met


def test_a_library_that_is_not_there_is_named_and_the_plain_form_is_the_baseline(monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setitem(weight_averaging.LIBRARIES, "timm", absent)
    weight_averaging.missing.cache_clear()
    try:
        assert weight_averaging.missing("cpu")["timm"].startswith("ModuleNotFoundError: No module")
        assert not {"timm", "timm, loop"} & weight_averaging._peers("cpu").keys()
        assert {each.baseline for each in weight_averaging.cases("cpu")} == {"reference"}
    finally:
        weight_averaging.missing.cache_clear()


# --- the benchmark of gumbel_softmax --------------------------------------------------------------


def test_the_quick_benchmark_of_draws_runs_and_ours_have_the_law_everywhere(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.gumbel_softmax", "--quick", "--quiet"]
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    results.check(record, "benchmark")
    assert record["code"] == harness.code_hash("gumbel_softmax")
    (part,) = record["devices"].values()
    ours = {"tiled", "tiled, eager", "auto"} - part["missing"].keys()
    for row in part["rows"]:
        relaxed = "gumbel_softmax" in row["contenders"]
        assert relaxed or ours <= row["contenders"].keys()
        if row["op"] == gumbel_softmax.ONE_DRAW:
            assert row["bound"] == "argmax"
            assert set(gumbel_softmax.PEERS) <= row["contenders"].keys()
        if row["op"] == gumbel_softmax.LIKELY_FIRST:
            # A float32 sum near 1 does not grow by the billionth that each class adds.
            assert "0.00000 in place of 33.38349" in row["refused"]["multinomial"]
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


@pytest.mark.parametrize(
    "draw",
    [
        lambda rows: rows.argmax(-1),
        lambda rows: torch.randint(rows.shape[1], (len(rows),)),
        lambda rows: torch.multinomial((rows / 2).softmax(-1), 1)[:, 0],
        lambda rows: torch.multinomial(rows[:, :-90].softmax(-1), 1)[:, 0],  # one tile is missed
        lambda rows: torch.multinomial(rows.softmax(-1), 1)[:, 0] + rows.shape[1],
    ],
    ids=["no noise", "no logits", "temperature 2", "a part without draws", "no such class"],
)
def test_the_gate_of_draws_refuses_another_law(draw, monkeypatch):
    monkeypatch.setattr(gumbel_softmax, "_draws_of_each", lambda device: {"wrong": draw})
    case = gumbel_softmax._one_draw((64, 600), "float32")
    passed, refused = harness.gate(case, gumbel_softmax.one_draw(case, "cpu"))
    assert refused.keys() == {"wrong"}
    assert passed.keys() == {"amax", "argmax"}


@pytest.mark.parametrize(
    "relax",
    [
        lambda logits: torch.softmax(logits, -1),
        lambda logits: 0.99 * torch.nn.functional.gumbel_softmax(logits),
        lambda logits: torch.nn.functional.gumbel_softmax(logits, tau=0.5),
    ],
    ids=["no noise", "not a sum of 1", "another gradient"],
)
def test_the_gate_of_relaxed_draws_refuses_another_law_or_gradient(relax, monkeypatch):
    monkeypatch.setattr(gumbel_softmax, "gumbel_softmax", relax)
    case = gumbel_softmax._relaxed((4096, 8))
    passed, refused = harness.gate(case, gumbel_softmax.relaxed(case, "cpu"))
    assert refused.keys() == {"gumbel_softmax"}
    assert passed.keys() == {"F.gumbel_softmax"}


def test_the_contender_without_a_compiler_does_not_reach_numba(monkeypatch):
    monkeypatch.setattr(gumbel_softmax.tiles, "_NUMBA", True)
    eager = gumbel_softmax.tiles.eager_log_sums
    seen = []
    monkeypatch.setattr(
        gumbel_softmax.tiles, "eager_log_sums", lambda *a: seen.append(a) or eager(*a)
    )
    gumbel_softmax._ours("cpu")["tiled, eager"](torch.zeros(2, 600))
    assert len(seen) == 1
    assert gumbel_softmax.tiles._NUMBA is True


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_of_draws_without_rows_are_not_measured(device):
    for goal in gumbel_softmax.goals(device):
        assert goal.entry([])["met"] is None


def draws_row(shape, dtype="float32", clock="cpu", **ratios):
    names = {"F_gumbel": "F.gumbel_softmax", "eager": "tiled, eager"}
    contenders = {
        names.get(name, name): {clock: {"ratio": {"median": ratio}}}
        for name, ratio in ratios.items()
    }
    about = {"op": gumbel_softmax.ONE_DRAW, "shape": list(shape), "dtype": dtype}
    return about | {"contenders": contenders}


def test_the_goals_of_draws_take_the_worst_row_of_the_promised_shape():
    rows = [
        draws_row((16, 131072), F_gumbel=1.0, multinomial=1.5, tiled=24.0, eager=9.0, argmax=30.0),
        draws_row((16, 131072), F_gumbel=1.0, multinomial=1.2, tiled=21.0, eager=12.0, argmax=21.0),
        draws_row((16, 131072), "bfloat16", F_gumbel=1.0, tiled=2.0, argmax=30.0),
        draws_row((1, 131072), F_gumbel=1.0, tiled=2.0, argmax=30.0),
    ]
    entries = [goal.entry(rows) for goal in gumbel_softmax.goals("cpu")]
    assert [entry["reached"] for entry in entries] == pytest.approx([21.0, 16.0, 1.25, 9.0])
    assert [entry["met"] for entry in entries] == [True, True, False, False]


def test_the_goal_of_draws_on_a_gpu_holds_for_large_inputs():
    rows = [
        draws_row((2**10, 2**16), clock="cuda", F_gumbel=1.0, triton=5.0, amax=6.0),
        draws_row((4, 600), clock="cuda", F_gumbel=1.0, triton=1.0, amax=6.0),
    ]
    (entry,) = [goal.entry(rows) for goal in gumbel_softmax.goals("cuda")]
    assert entry["reached"] == pytest.approx(1.2)
    assert entry["met"] is False


# --- the benchmark of spherical_embedding ---------------------------------------------------------


def test_the_quick_benchmark_of_embeddings_runs_and_its_documents_know_their_words(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.spherical_embedding", "--quick", "--quiet"]
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    results.check(record, "benchmark")
    assert record["code"] == harness.code_hash("spherical_embedding")
    (part,) = record["devices"].values()
    wanted = {"numba", "numba, 2 threads", "torch", "Doc2Vec", "Doc2Vec, 5 negatives"}
    for row in part["rows"]:
        assert not row["refused"]
        if row["op"] == spherical_embedding.EPOCH:
            assert row["contenders"].keys() == wanted - part["missing"].keys()


def test_the_gate_of_embeddings_refuses_documents_that_do_not_know_their_words():
    texts = spherical_embedding._texts(spherical_embedding.QUICK)
    vocabulary, corpus = spherical_embedding.corpora.read_corpus(texts, min_count=1)
    settings = spherical_embedding.Settings(dim=100)
    tables = spherical_embedding.training.new_tables(len(vocabulary), len(corpus), settings)
    random = spherical_embedding._known(tables.documents, tables.words, corpus)
    assert abs(random - 0.5) < 0.1  # documents of 60 random directions, each its own
    assert random < spherical_embedding.KNOWN


def embedding_row(op, shape, setting="default", **ratios):
    names = {"two": "numba, 2 threads", "five": "Doc2Vec, 5 negatives", "numba": "numba"}
    names |= {"Doc2Vec": "Doc2Vec", "one_loop": "one thread", "two_loops": "two threads"}
    clocks = {
        names[name]: {clock: {"ratio": {"median": ratio}} for clock in ("cpu", "wall")}
        for name, ratio in ratios.items()
    }
    return {"op": op, "shape": list(shape), "setting": setting, "contenders": clocks}


def test_the_goals_of_embeddings_take_the_worst_row_and_threads_count_where_a_core_was_free():
    epoch, control = spherical_embedding.EPOCH, spherical_embedding.CONTROL
    quarter, small = spherical_embedding.QUARTER, spherical_embedding.SMALL
    rows = [
        embedding_row(epoch, quarter, numba=2.0, two=3.0, Doc2Vec=1.0, five=0.5),
        embedding_row(epoch, quarter, "fixed heap", numba=1.8, two=3.6, Doc2Vec=1.0, five=0.5),
        embedding_row(epoch, small, numba=0.1, two=0.1, Doc2Vec=1.0, five=1.0),
        embedding_row(control, (10,), one_loop=1.0, two_loops=1.95),
        embedding_row(control, (10,), "fixed heap", one_loop=1.0, two_loops=1.5),
    ]
    entries = [goal.entry(rows) for goal in spherical_embedding.goals("cpu")]
    assert [entry["reached"] for entry in entries] == pytest.approx([1.8, 3.6, 1.5])
    assert [entry["met"] for entry in entries] == [True, True, False]
    busy = [goal.entry(rows[:3] + rows[4:]) for goal in spherical_embedding.goals("cpu")]
    assert busy[-1]["met"] is None


def quick_part(name, folder):
    """The one part of a sound record that a quick run has written in a process of its own."""
    path = folder / "record.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--quiet"]
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    results.check(record, "benchmark")
    assert record["code"] == harness.code_hash(name)
    (part,) = record["devices"].values()
    return part


# --- the benchmark of smoothing -------------------------------------------------------------------


def test_the_quick_benchmark_of_smoothing_runs_and_ours_are_right_everywhere(tmp_path):
    part = quick_part("smoothing", tmp_path)
    for row in part["rows"]:
        ours = {"reference"} if row["op"] == smoothing.MASKED_LOSS else set(smoothing.OURS)
        assert ours - part["missing"].keys() <= row["contenders"].keys()
        assert not row["refused"].keys() & set(smoothing.OURS)
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


@pytest.mark.parametrize("op", [smoothing.SPARSEMAX, smoothing.ENTMAX15])
def test_the_bisected_probabilities_are_those_of_enumerated_supports(op):
    """Of one to three entries; with equal entries p is known."""
    alpha = 2.0 if op == smoothing.SPARSEMAX else 1.5
    x = torch.tensor([[9.0, 0.0, 0.0], [1.0, 1.0, -9.0], [1.0, 1.0, 1.0]]).double()
    y, gradient = smoothing._bisected(x, torch.eye(3).double(), alpha)
    expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)  # 70 halvings, two roundings
    # Alone, an entry has no gradient; two share (a, -a) / 2 of the slope p^(2 - alpha).
    slope = 0.5 ** (2 - alpha)
    torch.testing.assert_close(gradient[0], torch.zeros(3).double())
    half = torch.tensor([-slope / 2, slope / 2, 0.0]).double()
    torch.testing.assert_close(gradient[1], half)


def test_the_expected_ranks_and_values_are_exact_at_small_strength_and_one_block_at_a_large_one():
    x = torch.tensor([0.3, 1.1, 0.2, 2.0, 1.7]).double()
    places, eye = torch.arange(1.0, 6.0).double(), torch.eye(5).double()
    exact, _ = smoothing._projected(x, smoothing.RANK, 1e-3)
    assert exact.tolist() == [2.0, 3.0, 1.0, 5.0, 4.0]
    pooled, back = smoothing._projected(x, smoothing.RANK, 10.0)
    torch.testing.assert_close(pooled, 3 + (x - x.mean()) / 10)
    jacobian = torch.stack([back(row) for row in eye])
    torch.testing.assert_close(jacobian, (eye - 0.2) / 10)
    values, back = smoothing._projected(x, smoothing.SORT, 1e-3)
    torch.testing.assert_close(values, x.sort().values)
    assert back(places).tolist() == [2.0, 3.0, 1.0, 5.0, 4.0]
    flat, back = smoothing._projected(x, smoothing.SORT, 1e3)
    torch.testing.assert_close(flat, x.mean() + (places - 3) / 1e3)
    torch.testing.assert_close(back(places), torch.full((5,), 3.0).double())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: torch.softmax(x, -1),
        lambda x: smoothing.sparsemax(x.detach(), backend="reference") + 0 * x,
        lambda x: 0.8 * smoothing.sparsemax(x, backend="reference"),
    ],
    ids=["another law", "no gradient", "no sum of 1"],
)
def test_the_gate_of_sparse_probabilities_refuses_what_is_wrong(wrong, monkeypatch):
    monkeypatch.setattr(smoothing, "_sparse_functions", lambda op: {"wrong": wrong})
    about = (smoothing.BOTH, smoothing.sparse, {"y": 0.1, "gradient": 0.1}, "softmax")
    case = harness.Case(f"sparsemax, {smoothing.NORMAL}", (8, 200), "float32", *about)
    passed, refused = harness.gate(case, smoothing.sparse(case, "cpu"))
    assert refused.keys() == {"wrong"}
    assert passed.keys() == {"softmax"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, strength: x.argsort(-1).argsort(-1) + 1 + 0 * x,
        lambda x, strength: smoothing.soft_rank(x, 1.1 * strength, backend="reference"),
    ],
    ids=["hard", "another strength"],
)
def test_the_gate_of_ranks_refuses_what_is_wrong(wrong, monkeypatch):
    monkeypatch.setattr(smoothing, "_sorting_functions", lambda op: {"wrong": wrong})
    about = (smoothing.BOTH, smoothing.sorting, {"y": 1e-3, "1 + distance": 0.01}, "sort")
    case = harness.Case(smoothing.RANK, (8, 60), "float32", *about)
    passed, refused = harness.gate(case, smoothing.sorting(case, "cpu"))
    assert refused.keys() == {"wrong"}
    assert passed.keys() == {"sort"}


def test_goals_of_smoothing_without_rows_are_not_measured():
    for goal in smoothing.goals("cpu"):
        assert goal.entry([])["met"] is None


def test_the_goals_of_smoothing_take_the_worst_row_and_the_error_of_the_gate():
    def row(op, n, error=0.0, **ratios):
        names = {"hundred": smoothing.ENTMAX_100}
        contenders = {
            names.get(name, name): {"cpu": {"ratio": {"median": ratio}}, "gate": {"error": error}}
            for name, ratio in ratios.items()
        }
        return {"op": op, "shape": [1, n], "contenders": contenders}

    normal, equal = smoothing.NORMAL, smoothing.EQUAL
    rows = [
        row(f"sparsemax, {normal}", 128, numba=9.0, entmax=1.0, hundred=2.0),
        row(f"sparsemax, {normal}", 1000, numba=20.0, entmax=1.0, hundred=8.0),
        row(f"entmax 1.5, {normal}", 128, numba=4.0, entmax=1.0),
        row(f"sparsemax, {equal}", 128, numba=3.0, entmax=1.0),
        row(f"entmax 1.5, {equal}", 128, numba=3.0, entmax=1.0),
        row(smoothing.RANK, 64, numba=2.0, torchsort=1.0),
        row(smoothing.RANK, 10**5, numba=4.0, torchsort=2.0),
        row(smoothing.SORTED.format(1e-2), 1000, error=1e-6, numba=1.0),
        row(smoothing.RANKED, 10**6, error=0.2, numba=1.0),
    ]
    entries = [goal.entry(rows) for goal in smoothing.goals("cpu")]
    reached = [9.0, 4.0, 3.0, 3.0, 2.5, None, 2.0, 2.0, 1e-6, None, None, 0.2]
    assert [entry["reached"] for entry in entries] == reached
    met = [True, True, False, True, False, None, False, True, True, None, None, False]
    assert [entry["met"] for entry in entries] == met


# --- the benchmark of energy models ---------------------------------------------------------------


def test_the_quick_benchmark_of_energy_models_runs_and_ours_are_right_everywhere(tmp_path):
    part = quick_part("energy_models", tmp_path)
    for row in part["rows"]:
        one_way = row["op"] in (energy_models.NETWORK, energy_models.NAN_LOSS)
        ours = {"reference"} if one_way else set(energy_models.OURS)
        assert ours - part["missing"].keys() <= row["contenders"].keys()
        assert not row["refused"].keys() & set(energy_models.OURS)
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


def half_the_noise(x, steps, seed):
    x = x.clone()
    for _ in range(steps):
        gradient = torch.func.grad(lambda x: energy_models._energy(x).sum())(x)
        noise = (energy_models.STEP) ** 0.5 * torch.randn_like(x)
        x = x - energy_models.STEP * gradient + noise
    return x


def to_the_right(x, steps, seed):
    ring = energy_models.GaussianMixtureEnergy.ring()
    return energy_models.langevin_sample(ring, x, energy_models.STEP, steps, seed=seed) + 0.2


@pytest.mark.parametrize("wrong", [half_the_noise, to_the_right, lambda x, steps, seed: 0 * x])
@pytest.mark.parametrize("op", [energy_models.ULA, energy_models.MALA])
def test_the_gate_of_chains_refuses_what_is_wrong(op, wrong, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(energy_models, "_samplers", lambda op, ring: {"wrong": wrong})
    case = energy_models._cases([4096], 1, (8, 64), 1)[
        [energy_models.ULA, energy_models.MALA].index(op)
    ]
    passed, refused = harness.gate(case, energy_models.on_modes(case, "cpu"))
    assert refused.keys() == {"wrong"}
    assert not passed


def test_the_gate_of_chains_tells_the_laws_with_and_without_the_accept_step_apart(monkeypatch):
    torch.manual_seed(0)
    both = {"ULA": energy_models._eager, "MALA": energy_models._eager_mala}
    monkeypatch.setattr(energy_models, "_samplers", lambda op, ring: both)
    for case in energy_models._cases([4096], 1, (8, 64), 1)[:2]:
        passed, _ = harness.gate(case, energy_models.on_modes(case, "cpu"))
        assert passed.keys() == {"ULA" if case.op == energy_models.ULA else "MALA"}


def test_goals_of_energy_models_take_the_worst_row_of_the_promised_number_of_chains():
    def row(op, n, **ratios):
        names = {"backward": energy_models.BACKWARD}
        contenders = {
            names.get(name, name): {"cpu": {"ratio": {"median": ratio}}}
            for name, ratio in ratios.items()
        }
        return {"op": op, "shape": [n, 2], "contenders": contenders}

    rows = [
        row(energy_models.ULA, 2048, numba=20.0, eager=1.0, torchebm=0.5, blackjax=2.0),
        row(energy_models.ULA, 2048, numba=15.0, eager=1.0, JAX=3.0),
        row(energy_models.ULA, 256, numba=1.0, eager=1.0),
        row(energy_models.MALA, 2048, numba=9.0, blackjax=1.0),
        row(energy_models.NETWORK, 128, reference=1.5, backward=1.0),
    ]
    entries = [goal.entry(rows) for goal in energy_models.goals("cpu")]
    assert [entry["reached"] for entry in entries] == [15.0, 40.0, 10.0, 5.0, 9.0, 1.5]
    assert [entry["met"] for entry in entries] == [True, True, True, False, True, True]
    for goal in energy_models.goals("cpu"):
        assert goal.entry([])["met"] is None


# --- the benchmark of triple extraction -----------------------------------------------------------


def test_the_quick_benchmark_of_triple_extraction_runs_and_ours_are_right_everywhere(tmp_path):
    part = quick_part("triple_extraction", tmp_path)
    refused = {}
    for row in part["rows"]:
        assert triple_extraction.OURS in row["contenders"]
        refused |= {(row["op"], name): why for name, why in row["refused"].items()}
    # The public forms are right where they are timed, and wrong where the page says so.
    assert refused.keys() == {
        (triple_extraction.DEAD, triple_extraction.ARTICLE),
        (triple_extraction.PUSHED, triple_extraction.SUBTRACTED),
    }
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


def small_losses():
    return triple_extraction._cases(
        [(2, 8, 3, 2)], [(2, 3, 8, 8)], [(2, 3, 8, 8)], (4, triple_extraction.MADE)
    )[:4]


@pytest.mark.parametrize("case", small_losses(), ids=lambda case: f"{case.op}, {case.mode}")
def test_the_gate_of_losses_refuses_forgotten_padding_and_a_wrong_gradient(case, monkeypatch):
    module = triple_extraction
    for name in ("power_bce_loss", "global_pointer_loss", "efficient_global_pointer_loss"):
        whole = getattr(module, name)

        def unmasked(*inputs, whole=whole, mask=None, **rest):
            inputs = [x for x in inputs if x.dtype != torch.bool]
            return whole(*inputs, **rest)

        def steep(*inputs, whole=whole, **rest):
            inputs = list(inputs)
            inputs[0] = 1.1 * inputs[0] - 0.1 * inputs[0].detach()
            return whole(*inputs, **rest)

        for wrong in (unmasked, steep):
            monkeypatch.setattr(module, name, wrong)
            _, refused = harness.gate(case, case.contenders(case, "cpu"))
            ours = {module.OURS} | ({module.DENSE} if case.op == module.POWER else set())
            others = {module.SCORES} if case.op == module.SEPARABLE else set()
            used = {module.POWER: "power_bce_loss", module.PAIRS: "global_pointer_loss"}
            if name == used.get(case.op, "efficient_global_pointer_loss"):
                assert refused.keys() == ours
            else:
                assert refused.keys() <= others
        monkeypatch.undo()


def test_the_gate_of_predictions_refuses_a_lost_and_an_added_triple(monkeypatch):
    module = triple_extraction
    case = module._cases([], [], [], (4, module.MADE))[0]
    predict = module.TripleExtractor.predict

    def lost(self, texts):
        return [found[1:] for found in predict(self, texts)]

    def added(self, texts):
        found = predict(self, texts)
        return [[*found[0], module.Triple("a", self.relations[0], "b")], *found[1:]]

    for wrong in (lost, added):
        monkeypatch.setattr(module.TripleExtractor, "predict", wrong)
        contenders = module.on_sentences(case, "cpu")
        assert len(contenders[module.LOOP].expected["triples"]) > 0
        _, refused = harness.gate(case, contenders)
        assert refused.keys() == {module.OURS}


def test_goals_of_triple_extraction_take_the_worst_row():
    module = triple_extraction

    def row(op, relations, **ratios):
        names = {"article": module.ARTICLE, "logsums": module.LOGSUMS, "loop": module.LOOP}
        contenders = {
            names.get(name, name): {"cpu": {"ratio": {"median": ratio}}, "kept": 1 / ratio}
            for name, ratio in ratios.items()
        }
        return {"op": op, "shape": [8, relations], "contenders": contenders}

    rows = [
        row(module.POWER, 50, article=1.0, ours=4.0),
        row(module.POWER, 215, article=1.0, ours=3.0),
        row(module.PAIRS, 24, logsums=1.0, ours=6.0),
        row(module.SEPARABLE, 24, logsums=1.0, ours=14.0),
        row(module.SEPARABLE, 50, logsums=1.0, ours=20.0),
        row(module.PREDICTION, 0, loop=1.0, ours=3.0),
    ]
    entries = [goal.entry(rows) for goal in module.goals("cpu")]
    assert [entry["reached"] for entry in entries] == [3.0, 6.0, 14.0, 20.0, 3.0]
    assert [entry["met"] for entry in entries] == [True, False, True, True, True]
    for goal in module.goals("cpu"):
        assert goal.entry([])["met"] is None


# --- the benchmark of intermediate variables ------------------------------------------------------


def test_the_quick_benchmark_of_captures_runs_and_only_what_lies_is_refused(tmp_path):
    module, part = intermediate_variables, quick_part("intermediate_variables", tmp_path)
    by_hand = {
        (f"{module.BERT}: {module.ATTENTION}", module.FUSED),
        (module.IN_PLACE, module.BARE),
        (module.TWICE, module.BARE),
        (module.TWICE, module.CLONING),
    }
    peer = {
        (module.IN_PLACE, module.PEER),
        (module.TWICE, module.PEER),
        (module.TWICE, module.PEER_CLONING),
    }
    for row in part["rows"]:
        ours = {module.CAPTURE, module.UNCLONED, module.TAPPED, module.OURS}
        assert ours & row["contenders"].keys(), row["op"]
    refused = {(row["op"], name) for row in part["rows"] for name in row["refused"]}
    assert refused == by_hand | (set() if module.PEER in part["missing"] else peer)
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


def a_capture_of(op):
    return next(each for each in intermediate_variables.quick("cpu") if each.op.endswith(op))


def test_the_true_values_of_a_network_are_those_of_its_layers_one_by_one():
    module = intermediate_variables
    case = a_capture_of(module.COPIED)
    model, x = module._made(case, "cpu")
    found = module._truth(model, x, module._leaves(model))
    x, values = x.double(), []
    for layer in copy.deepcopy(model).double():
        x = layer(x)
        values.append(x)
    assert found["output"].equal(x)
    assert found["kept"].equal(torch.cat([value.flatten() for value in values]))


@pytest.mark.parametrize("op", ["COPIED", "SAME", "HALF"])
def test_the_gate_of_captures_refuses_values_of_others_lost_ones_and_rounded_ones(op, monkeypatch):
    module = intermediate_variables
    case = a_capture_of(getattr(module, op))
    right = module.capture

    def shifted(values):
        return dict(zip(values, [*values.values()][::-1], strict=True))

    def lost(values):
        return dict([*values.items()][1:])

    def rounded(values):
        return {name: value.bfloat16().float() for name, value in values.items()}

    for wrong in (shifted, lost, rounded):

        @contextlib.contextmanager
        def changed(*inputs, wrong=wrong, **rest):
            found = {}
            with right(*inputs, **rest) as captured:
                yield found
            found |= wrong(captured)

        monkeypatch.setattr(module, "capture", changed)
        _, refused = harness.gate(case, case.contenders(case, "cpu"))
        assert refused.keys() == {module.UNCLONED if op == "SAME" else module.CAPTURE}


def test_the_gate_of_attention_refuses_the_mean_of_the_heads_and_another_order(monkeypatch):
    module = intermediate_variables
    case = a_capture_of(module.ATTENTION)
    right = module.attention_weights
    for wrong in (
        lambda weights: weights.mean(1, keepdim=True).expand_as(weights),
        lambda weights: weights.roll(1, dims=1),
        lambda weights: weights.transpose(2, 3),
    ):

        def changed(*inputs, wrong=wrong, **rest):
            return {name: wrong(weights) for name, weights in right(*inputs, **rest).items()}

        monkeypatch.setattr(module, "attention_weights", changed)
        _, refused = harness.gate(case, case.contenders(case, "cpu"))
        assert refused.keys() == {module.OURS, module.FUSED}


def test_a_library_of_hooks_that_is_not_there_is_named_and_left_out(monkeypatch):
    module, load = intermediate_variables, importlib.import_module

    def absent(name):
        if name == module.PEER:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name)

    monkeypatch.setattr(module.importlib, "import_module", absent)
    module.missing.cache_clear()
    try:
        assert module.missing("cpu")[module.PEER].startswith("ModuleNotFoundError: No module")
        assert module._ways(True, ["0"]).keys() == {module.CLONING, module.CAPTURE}
    finally:
        module.missing.cache_clear()


def test_goals_of_captures_take_the_longest_time_of_the_rows_that_they_name():
    module = intermediate_variables

    def row(model, op, **ratios):
        names = {"ours": module.CAPTURE, "uncloned": module.UNCLONED, "tapped": module.TAPPED}
        contenders = {
            names.get(name, name): {"cpu": {"ratio": {"median": ratio}}}
            for name, ratio in ratios.items()
        }
        return {"op": f"{model}: {op}", "contenders": contenders}

    rows = [
        row(module.CNN, module.COPIED, ours=1.25, other=0.1),
        row(module.MLP, module.COPIED, ours=0.96),
        row(module.BERT, module.HALF, ours=0.5),
        row(module.CNN, module.SAME, uncloned=0.8),
        row(module.MLP, module.SAME, uncloned=1.0),
        row(module.CNN, module.TAPS, tapped=1.02, other=0.1),
        row(module.MLP, module.TAPS, tapped=1.0),
    ]
    entries = [goal.entry(rows) for goal in module.goals("cpu")]
    assert [entry["reached"] for entry in entries] == [1.0417, 1.25, 1.0]
    assert [entry["met"] for entry in entries] == [True, False, True]
    for goal in module.goals("cpu"):
        assert goal.entry([])["met"] is None


# --- the benchmark of safe generators -------------------------------------------------------------


def test_the_quick_benchmark_of_loaders_runs_and_ours_give_each_sample_once(tmp_path):
    part = quick_part("safe_generators", tmp_path)
    for row in part["rows"]:
        assert not row["refused"], row
    found = {row["op"]: set(row["contenders"]) for row in part["rows"]}
    module = safe_generators
    assert found[module.EPOCH] >= {module.PLAIN, module.RECIPE, module.OURS, module.GLOBAL}
    assert (module.STATEFUL in found[module.EPOCH]) == (module.STATEFUL not in part["missing"])
    assert found[module.GENERATOR] == {
        module.DEFAULT_RNG,
        module.PHILOX,
        module.NEW,
        module.KEYED,
    }
    assert found[module.ORDER] == found[module.WHOLE] == {module.RANDPERM, module.PERMUTATION}
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


def a_case_of_loaders(op):
    return next(case for case in safe_generators.quick("cpu") if case.op == op)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda batches: batches[1:],
        lambda batches: [batches[0], *batches[:-1]],
        lambda batches: [batches[0], *batches],
    ],
    ids=["lost", "lost and doubled", "doubled"],
)
def test_the_gate_of_loaders_refuses_samples_that_are_lost_or_doubled(wrong, monkeypatch):
    module = safe_generators

    class Wrong(module.SafeLoader):
        def __iter__(self):
            return iter(wrong(list(super().__iter__())))

    monkeypatch.setattr(module, "SafeLoader", Wrong)
    case = a_case_of_loaders(module.EPOCH)
    _, refused = harness.gate(case, case.contenders(case, "cpu"))
    assert refused.keys() == {module.OURS, module.GLOBAL}


def test_the_gate_of_generators_refuses_the_stream_of_another_sample(monkeypatch):
    module = safe_generators
    right = module.sample_generator
    monkeypatch.setattr(module, "sample_generator", lambda s, e, i: right(s, e, i + 1))
    case = a_case_of_loaders(module.GENERATOR)
    _, refused = harness.gate(case, case.contenders(case, "cpu"))
    assert refused.keys() == {module.NEW}


def test_the_gate_of_orders_refuses_an_index_that_is_doubled_or_out_of_range(monkeypatch):
    module = safe_generators
    case = a_case_of_loaders(module.ORDER)
    (length,) = case.shape
    for wrong in (np.zeros(length, dtype=np.int8), np.arange(1, 65) + length):
        monkeypatch.setattr(module, "epoch_order", lambda *_, wrong=wrong: wrong)
        _, refused = harness.gate(case, case.contenders(case, "cpu"))
        assert refused.keys() == {module.PERMUTATION}


def test_the_goals_of_loaders_read_the_clock_on_the_wall_where_there_are_workers():
    module = safe_generators

    def row(work, workers, shape, **clocks):
        names = {"ours": module.OURS, "plain": module.PLAIN}
        contenders = {
            names[name]: {
                clock: {"ratio": {"median": ratio}, "microseconds": microseconds}
                for clock, (ratio, microseconds) in of.items()
            }
            for name, of in clocks.items()
        }
        mode = f"{work}, {workers} workers"
        return {"op": module.EPOCH, "mode": mode, "shape": [shape], "contenders": contenders}

    plain = {"cpu": (1.0, 100.0), "wall": (1.0, 100.0)}
    rows = [
        row(module.WORK, 0, 10, plain=plain, ours={"cpu": (0.97, 1.0), "wall": (0.1, 1.0)}),
        row(module.WORK, 2, 10, plain=plain, ours={"cpu": (0.1, 1.0), "wall": (0.94, 1.0)}),
        row(module.NOTHING, 0, 10, plain=plain, ours={"cpu": (0.9, 140.0), "wall": (0.1, 900.0)}),
        row(module.NOTHING, 2, 100, plain=plain, ours={"cpu": (0.9, 900.0), "wall": (0.1, 400.0)}),
        {
            "op": module.GENERATOR,
            "shape": [100],
            "contenders": {module.KEYED: {"cpu": {"microseconds": 250.0}}},
        },
    ]
    entries = [goal.entry(rows) for goal in module.goals("cpu")]
    assert [entry["reached"] for entry in entries] == [0.94, 4.0, 2.5]
    assert [entry["met"] for entry in entries] == [False, True, True]
    assert [goal.entry([])["met"] for goal in module.goals("cpu")] == [None] * 3


def test_a_loader_library_that_is_not_there_is_named_and_left_out(monkeypatch):
    module, find = safe_generators, importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "torchdata" else find(name)
    )
    assert module.missing("cpu") == {module.STATEFUL: "torchdata is not installed"}
    case = a_case_of_loaders(module.EPOCH)
    assert module.STATEFUL not in case.contenders(case, "cpu")


# --- the benchmark of GAN architectures -----------------------------------------------------------


def test_the_quick_benchmark_of_norms_runs_and_all_contenders_are_right(tmp_path):
    module, part = gan_architectures, quick_part("gan_architectures", tmp_path)
    wanted = {"eager", "clone", *module.BACKENDS["cpu"]} - part["missing"].keys()
    for row in part["rows"]:
        assert row["refused"] == {}, row
        assert row["contenders"].keys() == (
            {"eager", "auto"} if row["op"] in module.STEPS else wanted
        )
    assert {row["setting"] for row in part["rows"]} == {"default", "fixed heap"}


def a_case_of_norms(op, mode):
    return next(c for c in gan_architectures.quick("cpu") if (c.op, c.mode) == (op, mode))


def test_the_float64_batch_norm_and_its_statistics_are_those_of_pytorch():
    x, dy = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind()
    gamma = torch.tensor([0.5, 0.0, -0.5, 1.0]).expand(3, 4)
    found = gan_architectures._truth(x, gamma, 0 * gamma, dy)
    plain = torch.nn.BatchNorm2d(4).double()
    expected = (plain(x.double()) * (1 + gamma.double())[:, :, None, None]).relu()
    torch.testing.assert_close(found["y"], expected.detach())
    torch.testing.assert_close(found["mean"], plain.running_mean)
    torch.testing.assert_close(found["var"], plain.running_var)
    torch.testing.assert_close(found["dbeta"], (dy * (expected > 0)).double().sum((2, 3)))


WRONG_NORMS = {
    "gamma without 1": lambda right, x, *rest, **options: right(
        x, *rest, **options | {"gain_offset": 0.0}
    ),
    "no ReLU": lambda right, *rest, **options: right(*rest, **options | {"activation": None}),
    "statistics stand still": lambda right, *rest, **options: right(
        *rest, **options | {"momentum": 0.0}
    ),
}


@pytest.mark.parametrize("wrong", WRONG_NORMS.values(), ids=WRONG_NORMS)
def test_the_gate_of_norms_refuses_another_function_or_statistics(wrong, monkeypatch):
    module = gan_architectures
    changed = functools.partial(wrong, module.modulated_batch_norm)
    monkeypatch.setattr(module, "modulated_batch_norm", changed)
    case = a_case_of_norms(module.NORM, module.FORWARD)
    passed, _ = harness.gate(case, case.contenders(case, "cpu"))
    assert passed.keys() == {"eager", "clone"}


def test_the_gate_of_norms_refuses_a_gradient_that_leaves_out_the_statistics(monkeypatch):
    module, right = gan_architectures, gan_architectures.modulated_batch_norm

    def wrong(x, gamma, beta, mean, var, **options):
        y = right(x.detach(), gamma, beta, mean, var, **options)
        return y + 0 * x.repeat_interleave(options["upsample"], 2).repeat_interleave(
            options["upsample"], 3
        )

    monkeypatch.setattr(module, "modulated_batch_norm", wrong)
    for op in (module.NORM, module.UPSAMPLED):
        case = a_case_of_norms(op, module.BOTH)
        passed, refused = harness.gate(case, case.contenders(case, "cpu"))
        assert passed.keys() == {"eager", "clone"}
        assert all(why.startswith("dx is wrong") for why in refused.values())


@pytest.mark.parametrize("op", gan_architectures.STEPS)
def test_the_gate_of_steps_refuses_a_wrong_gradient_inside_the_generator(op, monkeypatch):
    module = gan_architectures
    package = importlib.import_module("cln_tutorial.gan_architectures._batch_norm")
    right = package.modulated_batch_norm

    def steep(x, *rest, **options):
        return right(1.1 * x - 0.1 * x.detach(), *rest, **options)

    monkeypatch.setattr(package, "modulated_batch_norm", steep)
    case = a_case_of_norms(op, module.ONE)
    passed, refused = harness.gate(case, case.contenders(case, "cpu"))
    assert passed.keys() == {"eager"}
    assert refused["auto"].startswith("gradient of G is wrong")


def test_goals_of_norms_take_the_worst_row_of_large_maps():
    module, large, small = gan_architectures, [64, 64, 8, 8], [64, 64, 4, 4]

    def row(shape, mode, op=module.NORM, **ratios):
        names = {"compiled": "torch.compile"}
        contenders = {
            names.get(name, name): {"cpu": {"ratio": {"median": ratio}}}
            for name, ratio in ratios.items()
        }
        return {"op": op, "shape": shape, "mode": mode, "contenders": contenders}

    rows = [
        row(large, module.FORWARD, eager=1.0, numba=3.5, auto=3.4, compiled=3.6),
        row(large, module.FORWARD, eager=1.0, numba=3.1, auto=3.4),
        row(small, module.FORWARD, eager=1.0, numba=0.5, auto=0.95),
        row(large, module.RECORDED, eager=1.0, numba=2.9, auto=2.9),
        row(large, module.BOTH, eager=1.0, numba=2.5, native=1.2, auto=2.5, compiled=0.5),
        row(large, module.BOTH, module.UPSAMPLED, eager=1.0, numba=0.1, native=0.1, auto=0.85),
        row([64, 1, 16, 16], module.ONE, next(iter(module.STEPS)), eager=1.0, auto=1.06),
    ]
    entries = [goal.entry(rows) for goal in module.goals("cpu")]
    reached = [3.1, 2.9, 2.5, 5.0, 3.5 / 3.6, 1.2, 0.85, 1.06]
    assert [entry["reached"] for entry in entries] == pytest.approx(reached)
    met = [True, False, True, True, False, True, False, True]
    assert [entry["met"] for entry in entries] == met
    for goal in module.goals("cpu"):
        assert goal.entry([])["met"] is None
