"""The runner of the planted faults: each is applied to a copy of the tree, which must turn red.

`make faults [NAME=chapter]` runs them all; `make test` takes the first fault of each file.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted_faults import Fault

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted(p.stem for p in (ROOT / "tests/planted_faults").glob("[!_]*.py"))
COPIED = ["benchmarks", "book", "cln_tutorial", "experiments", "tests"]
COPIED += ["conftest.py", "pyproject.toml"]
# pytest's exit code when tests ran and some failed; 2 and above are errors of another kind.
RED, GREEN = 1, 0


def faults_of(chapter: str) -> list[Fault]:
    return importlib.import_module(f"tests.planted_faults.{chapter}").FAULTS


def cases():
    for chapter in CHAPTERS:
        for number, fault in enumerate(faults_of(chapter)):
            marks = [pytest.mark.slow] if number else []
            yield pytest.param(chapter, fault, id=f"{chapter}: {fault.what}", marks=marks)


@pytest.fixture
def copy(tmp_path):
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_static")
            shutil.copytree(source, tmp_path / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, tmp_path)
    return tmp_path


def run_in(copy: Path, *selected: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHONPATH"))}
    if "CLN_TUTORIAL_DATA" in env:
        env["CLN_TUTORIAL_DATA"] = str(Path(env["CLN_TUTORIAL_DATA"]).resolve())
    command = [sys.executable, "-m", "pytest", "-x", "-q", *selected]
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_fault_names_text_that_stands_once_in_its_file(chapter):
    for fault in faults_of(chapter):
        text = (ROOT / "cln_tutorial" / fault.file).read_text()
        assert text.count(fault.old) == 1, f"{fault.what}: {fault.old!r} in {fault.file}"
        assert fault.new != fault.old, fault.what


@pytest.mark.parametrize(("chapter", "fault"), list(cases()))
def test_the_fault_turns_the_chapter_red_and_without_it_the_same_test_is_green(
    chapter, fault, copy
):
    path = copy / "cln_tutorial" / fault.file
    right = path.read_text()
    path.write_text(right.replace(fault.old, fault.new))

    tests = ["-m", "not slow", f"tests/test_{chapter}{fault.tests}.py"]
    run = run_in(copy, *tests)
    assert run.returncode == RED, f"the tests miss it\n{run.stdout[-2000:]}"
    if fault.shows_on_page:
        page = run_in(copy, "-p", "no:cacheprovider", "-m", "", f"book/notebooks/{chapter}.ipynb")
        assert page.returncode == RED, f"the page misses it\n{page.stdout[-2000:]}"

    path.write_text(right)
    run = run_in(copy, "--last-failed", *tests)
    assert run.returncode == GREEN, run.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("page", [c for c in CHAPTERS if (ROOT / f"book/{c}.md").exists()])
def test_the_untouched_copy_of_the_page_is_green(page, copy):
    run = run_in(copy, "-m", "", f"book/notebooks/{page}.ipynb")
    assert run.returncode == GREEN, run.stdout[-2000:]
