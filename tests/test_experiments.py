"""Experiments: a run that is killed, split or repeated gives the same record, bit for bit."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cln_tutorial.conditional_norm import swap_label_gap
from cln_tutorial.datasets import Split
from experiments import conditional_norm, harness

# Each run is a process of its own, forked from one that has imported all and done nothing.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.test_experiments"])


pytestmark = pytest.mark.usefixtures("as_experiments_run")


def places(folder):
    return ["--quiet", "--state", str(folder / "state"), "--output", str(folder / "record.json")]


def quick_run(arguments, dies=None):
    if dies == "half written":
        os.fsync = dies_at(9, os.fsync, before=halve)
    elif dies == "just renamed":
        os.replace = dies_at(6, os.replace)
    harness.main(conditional_norm.EXPERIMENT, ["--quick", "--workers", "1", *arguments])


def dies_at(call, function, before=None):
    """The function, until its `call`-th call: that one kills the process."""
    calls = itertools.count(1)

    def dying(*arguments):
        last = next(calls) == call
        if last and before:
            before(*arguments)
        else:
            function(*arguments)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    return dying


def halve(descriptor):
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)


def start(folder, dies=None):
    process = FORK.Process(target=quick_run, args=(places(folder), dies))
    process.start()
    return process


def finish(folder):
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return record_but_seconds(folder)


def command(folder, *arguments):
    """The quick run as users start it."""
    line = [sys.executable, *arguments, "--quick", *places(folder)]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def finish_command(folder, *arguments):
    process = command(folder, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return record_but_seconds(folder)


def record_but_seconds(folder):
    text = (folder / "record.json").read_text()
    seconds = json.loads(text)["seconds"]
    assert seconds > 0
    return text.replace(f'"seconds": {seconds}', "")


def files(folder):
    return {p: p.stat().st_mtime_ns for p in (folder / "state").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("undisturbed"))


def test_a_run_killed_at_random_moments_and_finished_by_two_workers_gives_the_same_record(
    tmp_path, undisturbed
):
    rng = random.Random(8)
    for _ in range(5):
        before = files(tmp_path)
        process = start(tmp_path)
        while files(tmp_path) == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert files(tmp_path)
    module = ["-m", "experiments.conditional_norm", "--workers", "2"]
    assert finish_command(tmp_path, *module) == undisturbed
    assert not files(tmp_path), "a finished run leaves no state"


def test_a_run_killed_while_it_writes_a_checkpoint_gives_the_same_record(tmp_path, undisturbed):
    for moment in ("just renamed", "half written"):
        process = start(tmp_path, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        halves = [p for p in files(tmp_path) if p.suffix == ".tmp"]
        assert len(halves) == (moment == "half written")
    assert finish(tmp_path) == undisturbed
    assert not files(tmp_path)


def test_two_workers_killed_and_their_work_finished_under_torchrun_give_the_same_record(
    tmp_path, undisturbed
):
    process = command(tmp_path, "-m", "experiments.conditional_norm", "--workers", "2")
    while len(files(tmp_path)) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    # The pipe ends with the last process that inherited it: a killed run leaves no worker.
    process.communicate(timeout=20)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert finish_command(tmp_path, *torchrun, "-m", "experiments.conditional_norm") == undisturbed


@dataclass(frozen=True)
class Toy:
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("a", "b")
    factor: float = 1.5


def toy(done, fail_at=None, settings=Toy(), checksum="0", quick=Toy(factor=0.0)):
    """An experiment of six jobs that notes which ran, and breaks at one of them."""

    def work(job):
        if job.name == fail_at:
            raise RuntimeError("the power is gone")
        done.append(job.name)
        return {job.variant: job.settings.factor * job.seed}

    return harness.Experiment(
        name="conditional_norm",
        settings=settings,
        quick=quick,
        work=work,
        checksums=lambda settings: {"made": checksum},
        units=lambda settings: {"a": "apples", "b": "pears"},
        published=[
            {"figure": "a", "value": None, "source": "none", "comparable": False, "why": "made"}
        ],
    )


def run(folder, experiment, *arguments):
    harness.main(experiment, ["--workers", "1", *places(folder), *arguments])
    return json.loads((folder / "record.json").read_text())


@pytest.fixture
def interrupted(tmp_path):
    """State of a run that broke after four of its six jobs."""
    done = []
    with pytest.raises(RuntimeError, match="the power is gone"):
        run(tmp_path, toy(done, fail_at="a-2"))
    assert done == ["a-0", "b-0", "a-1", "b-1"]
    return tmp_path


def test_finished_jobs_are_not_run_again_and_the_record_has_them_in_order(interrupted):
    done = []
    record = run(interrupted, toy(done))
    assert done == ["a-2", "b-2"]
    assert record["figures"]["a"]["values"] == [0.0, 1.5, 3.0]
    assert record["figures"]["b"]["unit"] == "pears"
    assert record["settings"]["factor"] == 1.5


def test_a_second_run_measures_again(tmp_path):
    done = []
    first, second = run(tmp_path, toy(done)), run(tmp_path, toy(done))
    assert len(done) == 12
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_fresh_forgets_all_parts_of_a_job_and_the_seconds_of_none_are_lost(tmp_path):
    job = harness.Job("parts", 0, None, "cpu", tmp_path, started=time.perf_counter() - 100)
    train(a_training(job), 6)
    later = replace(job, part="adaptation", started=job.started - 50)
    train(a_training(later), 3)
    begun = []

    def work(job):
        begun.append([a_training(replace(job, part=part)).step for part in (job.part, later.part)])
        return {"figure": 1.0}

    seconds = [harness._finish(work, job, fresh=fresh)["seconds"] for fresh in (False, True)]
    assert begun == [[6, 3], [0, 0]]
    assert 150 < seconds[0] < 250
    assert seconds[1] < 50


def test_fresh_forgets_what_was_finished(interrupted):
    done = []
    run(interrupted, toy(done), "--fresh")
    assert len(done) == 6


@pytest.mark.parametrize("what", ["settings", "data", "code", "versions", "device"])
def test_state_of_another_run_is_not_taken_up(interrupted, monkeypatch, what):
    experiment = toy(done := [])
    if what == "settings":
        experiment = toy(done, settings=Toy(factor=2.5))
    elif what == "data":
        experiment = toy(done, checksum="1")
    elif what == "code":
        monkeypatch.setattr(harness, "code_hash", lambda name: "1" * 64)
    elif what == "versions":
        monkeypatch.setattr(harness, "versions", lambda: {"torch": "0.4.1"})
    else:
        monkeypatch.setattr(harness, "device_words", lambda device: "an abacus")
    run(interrupted, experiment)
    assert len(done) == 6


def test_a_quick_run_never_writes_the_record_of_the_book(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(harness, "write_record", lambda *a: written.append(a))
    arguments = ["--workers", "1", "--quiet", "--state", str(tmp_path)]
    harness.main(toy([]), [*arguments, "--quick"])
    assert not written
    harness.main(toy([]), arguments)
    assert [name for name, _, path in written if path is None] == ["conditional_norm"]


def test_a_tuning_run_prints_and_writes_no_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "write_record", lambda *a: pytest.fail("a record"))
    arguments = ["--workers", "1", "--state", str(tmp_path), "--tuning"]
    for seeds, printed in (((7, 9), "a: 24 ± 3 apples"), ((7,), "a: 21 ± nan apples")):
        experiment = replace(toy([]), tuning=Toy(seeds=seeds, factor=3.0))
        harness.main(experiment, arguments)
        assert capsys.readouterr().out.splitlines()[0] == printed
    for wrong in (experiment, [*arguments, "--output", "x"]), (toy([]), arguments):
        with pytest.raises(SystemExit):
            harness.main(*wrong)


def test_a_figure_that_a_job_did_not_give_is_an_error(tmp_path):
    lazy = replace(toy([]), work=lambda job: {"a": 1.0} if job.seed else {})
    with pytest.raises(ValueError, match="'a' was measured 4 times for 3 seeds"):
        run(tmp_path, lazy)


def test_a_gpu_that_is_not_there_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        harness.main(toy([]), ["--device", "cuda"])
    assert capsys.readouterr().err.endswith("--device cuda: this PyTorch sees no GPU\n")


def test_a_wrong_record_is_refused_and_the_old_one_stays(tmp_path):
    record = run(tmp_path, toy([]))
    path = tmp_path / "record.json"
    before = path.read_bytes()
    assert before.endswith(b"}\n")
    record["figures"]["a"]["mean"] += 1
    with pytest.raises(ValueError, match=r"`figures\.a\.mean`"):
        harness.write_record("conditional_norm", record, path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    path = tmp_path / "file"
    harness.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        harness.write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def a_training(job, every=3):
    """A model with tied weights, its optimiser and generator, and a checkpoint of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    return harness.Checkpoint(job, model, optimiser, torch.Generator().manual_seed(1), every)


def train(checkpoint, until):
    for step in checkpoint.steps(until):
        x = torch.randn(8, 4, generator=checkpoint.generator)
        loss = (checkpoint.model(x) - x).square().mean()
        checkpoint.optimiser.param_groups[0]["lr"] = 0.1 / (step + 1)
        checkpoint.optimiser.zero_grad()
        loss.backward()
        checkpoint.optimiser.step()
        checkpoint.figures["sum"] = checkpoint.figures.get("sum", 0.0) + loss.item()


def test_a_checkpoint_restores_model_optimiser_generator_and_figures_bit_for_bit(tmp_path):
    whole = a_training(harness.Job("whole", 0, None, "cpu", tmp_path))
    train(whole, 12)
    job = harness.Job("parts", 0, None, "cpu", tmp_path)
    train(a_training(job), 5)  # saved after step 3, and after step 5, its last
    torch.manual_seed(123)
    resumed = a_training(job)
    assert resumed.step == 5
    train(resumed, 12)

    assert resumed.figures == whole.figures
    assert resumed.generator.get_state().equal(whole.generator.get_state())
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert a.equal(b)
        state, expected = resumed.optimiser.state[a], whole.optimiser.state[b]
        assert state.keys() == expected.keys()
        assert all(state[key].equal(expected[key]) for key in expected)
    assert resumed.optimiser.param_groups[0]["lr"] == whole.optimiser.param_groups[0]["lr"]


def test_a_step_that_was_not_saved_is_done_again(tmp_path):
    job = harness.Job("parts", 0, None, "cpu", tmp_path)
    interrupted = a_training(job)
    for step in interrupted.steps(100):
        if step == 4:
            break
    assert a_training(job).step == 3


def test_the_seconds_before_a_kill_count(tmp_path):
    first = harness.Job("parts", 0, None, "cpu", tmp_path, started=time.perf_counter() - 100)
    train(a_training(first), 3)
    second = replace(first, started=0.0)

    def work(job):
        train(a_training(job), 6)
        return {}

    assert 100 < harness._finish(work, second, fresh=False)["seconds"] < 200


def test_the_code_hash_sees_the_chapter_and_its_experiment_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    sources = ["cln_tutorial/x.py", "cln_tutorial/y.py", "experiments/x.py"]
    for source in sources:
        (tmp_path / source).parent.mkdir(exist_ok=True)
        (tmp_path / source).write_text("old")
    hashes = [harness.code_hash("x")]
    for source in sources:
        (tmp_path / source).write_text("new")
        hashes.append(harness.code_hash("x"))
    assert hashes[1] != hashes[0], "the chapter's module"
    assert hashes[2] == hashes[1], "another chapter's module"
    assert hashes[3] != hashes[2], "the experiment"


def test_the_code_hash_of_a_folder_sees_all_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    sources = ["cln_tutorial/x/__init__.py", "cln_tutorial/x/model.py", "experiments/x.py"]
    for source in sources:
        (tmp_path / source).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / source).write_text("old")
    before = harness.code_hash("x")
    (tmp_path / sources[1]).write_text("new")
    after = harness.code_hash("x")
    assert after != before
    (tmp_path / sources[1]).rename(tmp_path / "cln_tutorial/x/decoding.py")
    assert harness.code_hash("x") != after, "a file under another name"


CODE = '''
"""What the module does."""
X = """
# no comment, but text that the program has
"""
# why
def f():
    """What it returns."""
    return X  # where it is used
'''


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("the module does", "this module does,\nat length", False),
        ("returns", "gives back", False),
        ("# why", "# why\n# and how", False),
        ("# why\n", "\n\n", False),
        ("# no comment", "# no remark", True),
        ("return X ", "return X + X ", True),
        ("    return", "    if True:\n        return", True),
    ],
)
def test_the_code_hash_is_that_of_the_code_without_its_words(
    old, new, counts, tmp_path, monkeypatch
):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    file = tmp_path / "x.py"
    hashes = []
    for source in (CODE, CODE.replace(old, new)):
        file.write_text(source)
        hashes.append(harness.hash_files([file]))
    assert CODE.count(old) == 1
    assert (hashes[0] != hashes[1]) == counts


def quick_job(variant, folder=None, settings=conditional_norm.QUICK):
    return harness.Job(variant, 0, settings, "cpu", folder)


def test_all_ways_of_a_seed_start_from_the_same_weights():
    data = conditional_norm.corpus(conditional_norm.QUICK, "chinese")
    job = quick_job("chinese-none")
    shared = conditional_norm.start(job, data, None).state_dict()
    for way in set(conditional_norm.WAYS) - {"adaln_zero"}:
        state = conditional_norm.start(job, data, way).state_dict()
        assert all(state[key].equal(value) for key, value in shared.items()), way
        assert len(state) > len(shared)
    state = conditional_norm.start(
        job, data, "adaln_zero"
    ).state_dict()  # its blocks start as DiT's
    assert state["embedding.weight"].equal(shared["embedding.weight"])


def test_texts_become_start_characters_end_and_padding(monkeypatch):
    train = Split(("aab", "abcabcabc"), np.array([0, 1]))
    held_out = Split(("cxa",), np.array([1]))
    monkeypatch.setattr(conditional_norm, "splits", lambda *_: (train, held_out, train, {}))
    settings = replace(conditional_norm.QUICK, length=5, fewest_occurrences=4)
    data = conditional_norm.corpus(settings, "chinese")
    # seen in train: a 5 times, b 4 times, c 3 times; so a = 4, b = 5, and c is unknown
    assert data.characters == ("", "", "", "", "a", "b")
    assert data.train.tokens.tolist() == [[2, 4, 4, 5, 3, 0], [2, 4, 5, 1, 4, 5]]
    assert data.train.lengths.tolist() == [5, 6]
    assert data.held_out.tokens.tolist() == [[2, 1, 1, 4, 3]]
    assert data.train.size == 4 + 5
    assert data.decode(data.train.tokens) == ["aab", "abab"]


def test_the_measures_of_samples_are_counted_by_hand():
    # pairs: ab bc cd da ab bc cd | xy: 5 of 8 differ; 4-grams: abcd bcda cdab dabc abcd: 1 of 5
    assert conditional_norm.variety(["abcdabcd", "xy"], 8) == {
        "distinct-2": 100 * 5 / 8,
        "repeated": 100 * 1 / 5,
    }
    assert conditional_norm.variety(["", "aaa"], 1) == {"distinct-2": 100.0, "repeated": 0.0}
    with pytest.raises(ValueError, match="8 character pairs, fewer than the 9"):
        conditional_norm.variety(["abcdabcd", "xy"], 9)


def test_the_measures_of_likelihoods_are_those_of_the_package(tmp_path):
    settings = conditional_norm.QUICK
    data, job = conditional_norm.corpus(settings, "chinese"), quick_job("chinese-norms", tmp_path)
    model = conditional_norm.start(job, data, "norms")
    conditional_norm.train(job, model, data, model.nll)
    losses = conditional_norm.likelihoods(model.nll, data.held_out, "cpu")
    found = conditional_norm.measures(losses, data.held_out.truth, data.held_out.size)
    expected = swap_label_gap(model, data.held_out.batches("cpu"))
    assert found["right label"] == pytest.approx(expected.true, rel=1e-9)
    assert found["swapped label"] == pytest.approx(expected.swapped, rel=1e-9)
    assert found["swap gap"] == pytest.approx(expected.gap, rel=1e-9)
    assert found["z of the gap"] == pytest.approx(expected.z, rel=1e-9)
    share = expected.likelier
    assert found["label likelier"] == pytest.approx(100 * share)
    n = len(losses)  # of zeros and ones, n - 1 in the variance
    error = 100 * (share * (1 - share) / (n - 1)) ** 0.5
    assert found["its error over texts"] == pytest.approx(error)


def test_only_the_matrices_of_the_base_decay_and_the_condition_has_a_rate_of_its_own():
    data = conditional_norm.corpus(conditional_norm.QUICK, "chinese")
    plain = dict(conditional_norm.start(quick_job("chinese-none"), data, None).named_parameters())
    for way in conditional_norm.WAYS:
        model = conditional_norm.start(quick_job(f"chinese-{way}"), data, way)
        groups = conditional_norm.groups(model, 0.5, (1e-3, 1e-4))
        assert [group["lr"] for group in groups] == [1e-3, 1e-3, 1e-4]
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0, 0.0]
        names = {id(p): name for name, p in model.named_parameters()}
        matrices, vectors, new = ({names[id(p)] for p in g["params"]} for g in groups)
        assert matrices == {name for name, p in plain.items() if p.ndim == 2}
        assert vectors == {name for name, p in model.named_parameters() if p.ndim == 1}
        assert new == set(names.values()) - matrices - vectors != set()


def test_tuning_never_sees_the_held_out_side(monkeypatch):
    texts = tuple(f"text {number}" for number in range(100))
    train = Split(texts[:80], np.arange(80) % 2)
    loaded = SimpleNamespace(
        train=train, held_out=Split(texts[80:], np.arange(20) % 2), leaked=train, sha256={}
    )
    monkeypatch.setattr(conditional_norm.datasets, "load", lambda *a, **k: loaded)
    settings = replace(conditional_norm.TUNING, held_back=30)
    kept, back, *_ = conditional_norm.splits(settings, "chinese")
    assert (len(kept.texts), len(back.texts)) == (50, 30)
    assert set(kept.texts) | set(back.texts) == set(train.texts)
    assert all(
        int(text.split()[1]) % 2 == y for text, y in zip(back.texts, back.labels, strict=True)
    )
    assert not set(conditional_norm.TUNING.seeds) & set(conditional_norm.Settings().seeds)


def test_mcnemar_counts_the_texts_that_one_alone_gets_right():
    ours, theirs = np.array([1, 1, 1, 1, 0, 1], bool), np.array([1, 0, 0, 0, 1, 0], bool)
    # four that ours alone gets right, one that theirs does: (4 - 1) / sqrt(5)
    assert conditional_norm.mcnemar(ours, theirs) == pytest.approx(3 / 5**0.5)
    assert conditional_norm.mcnemar(ours, ours) == 0.0


def test_the_reliability_of_a_calibrated_and_of_a_vain_classifier():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    labels = (rng.uniform(size=p.size) >= p).astype(int)  # class 0 with probability p
    sure = np.where(p > 0.5, 1.0, 0.0)
    for said, gap in ((p, 0.0), (sure, 25.0)):
        figures = conditional_norm.reliability(np.stack([said, 1 - said], 1), labels)
        for g in range(conditional_norm.GROUPS):
            row = f"reliability-{g + 1:02}"
            # 2,000 texts in a group: standard error at most 1.1 points; five of them
            difference = figures[f"{row}.said"] - figures[f"{row}.true"]
            assert abs(difference - gap) < 5.6, (row, gap)


@pytest.mark.data
def test_a_short_training_on_the_real_reviews_tells_the_labels_apart(tmp_path, monkeypatch):
    settings = replace(
        conditional_norm.Settings(),
        num_layers=1,
        dim=32,
        cond_dim=16,
        length=32,
        steps=250,
        batch=32,
        warm_up=20,
        samples=20,
        pairs=200,
    )
    train, held_out, *others = conditional_norm.splits(settings, "chinese")
    some = conditional_norm.some(train, range(6000))
    few = conditional_norm.some(held_out, range(600))
    monkeypatch.setattr(conditional_norm, "splits", lambda *_: (some, few, *others))
    torch.set_num_threads(1)
    figures = conditional_norm.work(quick_job("chinese-norms", tmp_path, settings))
    # Above 1,000 characters: a model that knows nothing needs more than log(1000) = 6.9 nats
    assert figures["chinese-norms.right label"] < 6.5
    # Where the label has no effect, z is a standard normal (false alarm 3e-7), and the share is
    # 50 % with a standard error of 2 (the same).
    assert figures["chinese-norms.z of the gap"] > 5
    assert figures["chinese-norms.label likelier"] > 60
