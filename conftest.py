"""What the suite shares: real data or a clear skip, run-time shape checks, kernels without network.

It stands at the root because it must hold for the notebooks too.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

ROOT = Path(__file__).parent
# Looking for doctests would import them; there is Triton on Linux only.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["cln_tutorial/kernels/*.py"]
KERNEL_START = ROOT / "tests/kernel_start"

# Notebook kernels and other child processes import the same tree as the suite, refuse every
# connection but the loopback, and check shapes at run time (tests/kernel_start/sitecustomize.py).
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(KERNEL_START)])
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, and as much time for each as the machine takes.
hypothesis.settings.load_profile("ci")


@pytest.fixture
def unchecked():
    """Bad input as users meet it: our own errors, not those of the run-time shape checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def child_output():
    """`child_output(code)`: what it prints in a process where shapes are not checked.

    The compiler does not see through the checks.
    """

    def run(code, *warnings):
        flags = [word for each in warnings or ["ignore"] for word in ("-W", each)]
        command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
        env = os.environ | {"CLN_TUTORIAL_CHECK_SHAPES": "0"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def as_experiments_run():
    """A job sets the threads and the algorithms of its process: the suite has its own back."""
    import torch  # not above, where it would read its number of threads before it is set

    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def record(request, tmp_path_factory):
    """What a quick run of `experiment`, as the test file calls it, leaves behind."""
    from experiments import harness

    folder = tmp_path_factory.mktemp("quick")
    places = ["--output", str(folder / "record.json"), "--state", str(folder / "state")]
    run = ["--quick", "--workers", "1", "--quiet", *places]
    harness.main(request.module.experiment.EXPERIMENT, run)
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package as people install it, built from a copy so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("source")
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cln_tutorial", folder / "cln_tutorial", ignore=leave)
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, folder)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "build", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=env)
    return next((folder / "dist").glob("*.whl"))


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the tests of kernels on this GPU")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("notebook")


def pytest_runtest_setup(item):
    if item.get_closest_marker("data") and "CLN_TUTORIAL_DATA" not in os.environ:
        pytest.skip("set CLN_TUTORIAL_DATA to the folder of the real data sets")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where the data are, a test that needs them must run: a skip is a failure."""
    report = yield
    there = "CLN_TUTORIAL_DATA" in os.environ
    if report.skipped and there and item.get_closest_marker("data"):
        report.outcome = "failed"
        report.longrepr = f"skipped although CLN_TUTORIAL_DATA is set: {report.longrepr}"
    return report
