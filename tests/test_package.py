"""The wheel, the README and the two commands' first lines, as a stranger meets them."""

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cln_tutorial

ROOT = Path(__file__).parent.parent
RUNTIME = {
    "torch", "numpy", "scipy", "scikit-learn", "matplotlib", "safetensors", "pooch", "tqdm",
    "jaxtyping",
}  # fmt: skip


def test_the_wheel_holds_the_package_with_its_records_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {n for n in names if n.startswith(f"cln_tutorial-{cln_tutorial.__version__}.dist-info/")}
    sources = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "cln_tutorial").rglob("*")
        if p.suffix in {".py", ".json", ".typed"}
    }
    assert names - info == sources
    assert "cln_tutorial/py.typed" in names
    assert any(n.startswith("cln_tutorial/results/") and n.endswith(".json") for n in names)


def test_the_wheel_asks_for_the_runtime_dependencies_only_and_for_no_upper_bound(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r)[0] for r in required} == RUNTIME
    assert not [r for r in required if re.search(r"<|==|~=", r)]
    extras = {"fast", "huggingface", "gpu", "book", "test", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert metadata["Version"] == cln_tutorial.__version__


def test_twine_accepts_wheel_and_source_archive(wheel):
    files = [str(p) for p in wheel.parent.iterdir()]
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    subprocess.run(command, check=True, capture_output=True)


def test_the_quick_start_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})


def test_an_old_python_gets_one_line_that_says_what_to_install():
    # The interpreter pretends to be old: a real one is not on every machine.
    code = "import sys; sys.version_info = (3, 8, 1); import bootstrap; bootstrap.main('book')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("Python 3.11 or newer is needed, this one is 3.8: install it")
    assert run.stderr.count("\n") == 1


def test_a_python_without_venv_gets_one_line_that_says_what_to_install():
    code = "import sys; sys.modules['ensurepip'] = None; import bootstrap; bootstrap.main('book')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "apt install python3-venv" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_machine_where_no_browser_can_be_had_gets_one_line_that_says_what_to_install():
    code = (
        "import bootstrap; bootstrap.find_browser = lambda: None;"
        "bootstrap.PYTHON = 'false'; bootstrap.need_browser()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("No browser for the browser tests: install Chromium")


@pytest.mark.parametrize(
    ("target", "folder"), [("reproduce", "experiments"), ("bench", "benchmarks")]
)
def test_a_command_for_a_chapter_that_is_not_there_says_so(target, folder):
    command = ["make", "-n", target, "NAME=conditional_nrom"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"there is no {folder}/conditional_nrom.py" in run.stderr


@pytest.mark.parametrize("target", ["reproduce", "bench"])
def test_a_command_that_needs_a_chapter_says_so(target):
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"for example: make {target} NAME=conditional_norm" in run.stderr
