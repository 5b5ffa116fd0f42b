"""Colab, without Colab: a notebook alone, in an environment that has nothing of ours.

The first cell of the notebook finds the package missing and installs it; here the wheel is offered
through a local folder. Nothing that was installed before may change its version. And what the page
prints may depend neither on the versions there nor on the processor's instructions.
"""

import json
import os
import shlex
import shutil
import subprocess
import venv

import nbformat
import pytest

from book import twins

# What Colab has of our dependencies, in other versions than constraints.txt pins where they exist.
# torch is not listed: its builds are large, so the test takes the very version of the suite.
COLAB = [
    "numpy<2.4", "scipy<1.17", "matplotlib<3.11", "scikit-learn<1.9", "safetensors<0.8",
    "tqdm<4.70", "ipykernel<7.4", "nbval", "numba<0.68", "transformers<5.23",
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
    pip = [python, "-m", "pip", "install", "-qq", "--no-compile"]  # what is imported compiles
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


def twin_as_on_colab(name):
    """Without the lines on peers, which are not there."""
    notebook = nbformat.read(twins.twin_path(name), 4)
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        if output.output_type == "stream":
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(
                x for x in lines if not x.startswith(("ema-pytorch", "torch-ema"))
            )
    return notebook


@pytest.mark.notebook
@pytest.mark.parametrize("name", twins.pages())
def test_the_page_alone_prints_the_same_on_another_processor_and_changes_no_package(
    name, colab, tmp_path
):
    python, env, before = colab
    notebook = tmp_path / f"{name}.ipynb"
    nbformat.write(twin_as_on_colab(name), notebook)
    command = [python, "-m", "pytest", "-x", "-q", "--nbval", "--nbval-current-env", notebook]
    env = env | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]

    after = versions(python, env)
    assert after["cln-tutorial"] == twins.version()
    assert {package: after[package] for package in before} == before
