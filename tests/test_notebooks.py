"""The executed twins: equal to their text, complete, small, and compared strictly by nbval.

nbval itself collects book/notebooks/*.ipynb beside this file (marker `notebook`).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from book import twins

ROOT = Path(__file__).parent.parent
PAGES = twins.pages()


def twin(name):
    return nbformat.read(twins.twin_path(name), 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_nbval(path, **env):
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(path)]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_text_page_has_a_twin_and_every_twin_a_text_page():
    assert PAGES
    assert sorted(p.stem for p in (ROOT / "book/notebooks").glob("*.ipynb")) == PAGES


def test_a_plain_pytest_knows_the_notebooks_and_compares_them_strictly(pytestconfig):
    assert pytestconfig.option.nbval
    assert not pytestconfig.option.nbval_lax
    assert "book/notebooks" in pytestconfig.getini("testpaths")


@pytest.mark.parametrize("name", PAGES)
def test_the_twin_is_the_text(name):
    def content(notebook):
        cells = [(c.id, c.cell_type, c.source, c.metadata.get("tags")) for c in notebook.cells]
        return cells, notebook.metadata["kernelspec"]

    assert content(twin(name)) == content(twins.unexecuted_twin(name))


@pytest.mark.parametrize("name", PAGES)
def test_the_twin_was_executed_with_today_s_modules_and_records(name):
    assert twins.is_current(name), f"run `make notebooks NAME={name}` and look at the difference"


@pytest.mark.parametrize("name", PAGES)
def test_the_twin_ran_from_top_to_bottom_without_an_error(name):
    cells = code_cells(twin(name))
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert not [o for c in cells for o in c.outputs if o.get("name") == "stderr"]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_took_at_most_a_minute(name):
    # When its twin was made: here the suite's other worker slows it down.
    assert 0 <= twin(name).metadata["seconds"] <= 60, "shorten the page, or let no other work run"


@pytest.mark.parametrize("name", PAGES)
def test_the_twin_and_its_pictures_are_small(name):
    assert twins.twin_path(name).stat().st_size < 1_500_000
    for cell in code_cells(twin(name)):
        for output in cell.outputs:
            for kind, data in output.get("data", {}).items():
                if kind.startswith("image/"):
                    assert len(data) < 150_000 * 4 / 3  # base64 needs four bytes for three


@pytest.mark.parametrize("name", PAGES)
def test_only_pictures_and_timings_are_left_uncompared(name):
    for cell in code_cells(twin(name)):
        tags = cell.metadata.get("tags", [])
        kinds = {k for o in cell.outputs for k in o.get("data", {})}
        streams = [o for o in cell.outputs if o.output_type == "stream"]
        results = [o for o in cell.outputs if o.output_type == "execute_result"]
        if "nbval-ignore-output" in tags:
            assert not results, f"end the cell with plt.show(): {cell.source}"
            picture = any(k.startswith("image/") for k in kinds) and not streams
            assert picture or "timing" in tags, cell.source
        else:
            assert not any(k.startswith("image/") for k in kinds), cell.source
        assert not {"nbval-skip", "nbval-raises-exception"} & set(tags), cell.source


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(
    "env",
    [  # Both at once are in test_colab.py; each alone tells which one it was.
        # A thread that waits must not count as work.
        {
            "ATEN_CPU_CAPABILITY": "default",
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "PASSIVE",
        },
        {"OMP_NUM_THREADS": "1"},
    ],
    ids=["processor", "threads"],
)
def test_the_page_prints_the_same_on_another_processor(name, env):
    # As readers run it: the shape checks of the suite, which nbval makes too, take as long again.
    run = run_nbval(twins.twin_path(name), CLN_TUTORIAL_CHECK_SHAPES="0", **env)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.notebook
@pytest.mark.parametrize(
    "name", [PAGES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[1:])]
)
def test_one_changed_digit_of_a_stored_output_turns_nbval_red(name, tmp_path):
    notebook = twin(name)
    compared = [c for c in code_cells(notebook) if "nbval-ignore-output" not in str(c.metadata)]
    output = next(o for c in compared for o in c.outputs if re.search(r"\d", o.get("text", "")))
    output.text = re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), output.text, count=1)
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")

    run = run_nbval(tmp_path / f"{name}.ipynb")

    assert run.returncode == 1, run.stdout[-3000:]
    assert "mismatch" in run.stdout


def test_a_kernel_of_the_suite_reaches_the_loopback_and_nothing_else():
    code = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listener.getsockname()).close()
for foreign in [("192.0.2.1", 80), ("example.org", 80)]:
    try:
        socket.create_connection(foreign, timeout=1)
    except OSError as error:
        assert "test suite" in str(error), error
    else:
        raise SystemExit("a foreign connection was allowed")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_kernel_of_the_suite_checks_shapes():
    code = """
import torch
from cln_tutorial.conditional_norm import conditional_layer_norm
try:
    conditional_layer_norm(torch.zeros(2, 3), torch.zeros(2, 3, 4, 5))
except ValueError:
    raise SystemExit("the run-time shape check is off")
except Exception as error:
    assert "TypeCheckError" in type(error).__name__
else:
    raise SystemExit("nothing was checked")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_page_named_wrongly_gets_one_line_with_the_right_names():
    command = [sys.executable, "book/twins.py", "conditional_nrom"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("no such page: conditional_nrom; there are conditional_norm")


@pytest.mark.notebook
def test_nothing_is_executed_when_nothing_changed(tmp_path):
    shutil.copytree(ROOT / "book", tmp_path / "book")
    shutil.copytree(ROOT / "cln_tutorial", tmp_path / "cln_tutorial")
    for change, executed in [("", set()), ("\nA new sentence.\n", {"executing results"})]:
        page = tmp_path / "book/results.md"
        page.write_text(page.read_text() + change)
        run = subprocess.run(
            [sys.executable, "book/twins.py"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert set(run.stdout.splitlines()) == executed
