"""Colab, without Colab: a notebook alone, in an environment that has nothing of ours.

The first cell of the notebook finds the package missing and installs it; here the wheel is offered
through a local folder. Nothing that was installed before may change its version.
"""

import json
import os
import resource
import shlex
import shutil
import subprocess
import venv

import pytest

from book import twins

# What Colab has of our dependencies, in other versions than constraints.txt pins where they exist.
# torch is not listed: its builds are large, so the test takes the very version of the suite.
COLAB = [
    "numpy<2.4", "scipy<1.17", "matplotlib<3.11", "scikit-learn<1.9", "safetensors<0.8",
    "tqdm<4.70", "ipykernel<7.4", "nbclient", "numba<0.68", "transformers<5.23",
]  # fmt: skip


def versions(python, env):
    command = [python, "-m", "pip", "list", "--format=json"]
    listed = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return {p["name"].lower(): p["version"] for p in json.loads(listed.stdout)}


@pytest.fixture(scope="module")
def colab(wheel, tmp_path_factory):
    """An interpreter with Colab's packages and their versions; in a folder, the wheel."""
    import torch

    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True, symlinks=True)
    python = str(folder / "env/bin/python")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # The build that the suite was given (the README's TORCH=), in the suite's version.
    build = shlex.split(os.environ.get("TORCH", "torch"))
    pinned = [f"torch=={torch.__version__.split('+')[0]}"]
    pip = [python, "-m", "pip", "install", "-qq"]
    subprocess.run(
        [*pip, "--no-deps", *(pinned if build == ["torch"] else build)], check=True, env=env
    )
    subprocess.run([*pip, "torch", *COLAB], check=True, env=env)
    before = versions(python, env)
    assert "cln-tutorial" not in before
    yield python, {**env, "PIP_FIND_LINKS": find_links(wheel.parent)}, before
    shutil.rmtree(folder / "env")


def find_links(folder):
    return " ".join(filter(None, [str(folder), os.environ.get("PIP_FIND_LINKS")]))


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.notebook
@pytest.mark.parametrize("name", twins.pages())
def test_the_page_runs_alone_within_a_minute_and_changes_no_package_that_was_there(
    name, colab, tmp_path
):
    python, env, before = colab
    shutil.copy(twins.twin_path(name), tmp_path)
    code = (
        "import nbformat, nbclient;"
        f"nbclient.NotebookClient(nbformat.read('{name}.ipynb', 4), timeout=300).execute()"
    )
    start = cpu_seconds_of_children()
    subprocess.run([python, "-c", code], cwd=tmp_path, env=env, check=True)
    # Not the clock on the wall, on which the suite's other worker counts too. Ten seconds are for
    # the interpreters to start, and for pip.
    assert cpu_seconds_of_children() - start < 60 + 10

    after = versions(python, env)
    assert after["cln-tutorial"] == twins.version()
    assert {package: after[package] for package in before} == before
