"""How the kernels of all chapters are tested where there is no GPU, and where there is one.

A chapter writes its kernels with their launch functions, and a file of tests, which begins with
``kernels = kernels_of("chapter")`` and uses two things:

- ``@runs_kernels`` above a test: it runs in Triton's interpreter, in a process that all such tests
  of the file share; with ``pytest --gpu`` on the GPU. Its tensors are made on that device. It fails
  if no kernel was launched.
- ``compile_ahead(lambda: kernels.forward(empty(torch.bfloat16, 64, 768), ...), capability=80)``:
  the kernels that this call launches, compiled for that GPU as the launch would, to be read.
"""

import contextlib
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":  # there Triton exists, and a test that is skipped would be hidden
    pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parent.parent
# @triton.jit decides when a kernel is defined; a process cannot change its mind.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels_of(chapter: str) -> types.ModuleType:
    """The chapter's kernels; an import statement would stand above the skip on other systems."""
    return importlib.import_module(f"cln_tutorial.kernels.{chapter}")


# --- running --------------------------------------------------------------------------------------


def runs_kernels(test: Callable) -> Callable:
    """Run a test where its kernels run, and fail it if it started none."""

    @functools.wraps(test)
    def run(request, **arguments):
        on_gpu = request.config.getoption("gpu")
        if not on_gpu and not INTERPRETED:
            failure = _outcomes_in_interpreter(request.session, request.path)[request.node.name]
            assert failure is None, f"in the interpreter:\n{failure}"
            return
        if on_gpu and not torch.cuda.is_available():
            pytest.fail("--gpu was given, and PyTorch sees no GPU")
        with launches() as started, torch.device("cuda" if on_gpu else "cpu"):
            test(**arguments)
        assert started, "no kernel was launched: something else computed the result"

    own = inspect.signature(test)
    request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = own.replace(parameters=[request, *own.parameters.values()])
    run.runs_kernels = True
    return run


@contextlib.contextmanager
def launches() -> Iterator[Counter]:
    """Count the kernels that are launched inside the block, by name."""
    started = Counter()

    def counted(run):
        def run_and_count(self, *args, **kwargs):
            started[self.fn.__name__] += 1
            return run(self, *args, **kwargs)

        return run_and_count

    with pytest.MonkeyPatch.context() as patch:
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", counted(kind.run))
        yield started


@functools.cache
def _outcomes_in_interpreter(session: pytest.Session, path: Path) -> dict[str, str | None]:
    """Run this file's collected tests of kernels in one child; return what failed, by test."""
    tests = [
        item.nodeid
        for item in session.items
        if item.path == path and getattr(getattr(item, "obj", None), "runs_kernels", False)
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", ""]
        command += [f"--junitxml={report}", f"--rootdir={ROOT}"]
        command += [f"--maxfail={session.config.getoption('maxfail') or 0}", *tests]
        child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if child.returncode not in (0, 1):  # no test ran
            return defaultdict(lambda: child.stdout + child.stderr)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        # Of a test that passed there is nothing to report; one that was skipped did not pass.
        found = {case.get("name"): [f"{part.tag}: {part.text}" for part in case] for case in cases}
        return {name: "\n".join(parts) or None for name, parts in found.items()}


# --- compiling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch.

    Args:
        name: the kernel.
        num_warps: as launched.
        registers: per thread.
        local_bytes: per thread, of spilled registers and all else that went to local memory.
        loads, stores: how many instructions of each width in bits touch global memory, per thread.
        atomics: the instructions that would make a sum depend on the order of the programs.
        ttir, ptx: the text at two stages.
    """

    name: str
    num_warps: int
    registers: int
    local_bytes: int
    loads: Counter
    stores: Counter
    atomics: list[str]
    ttir: str
    ptx: str

    def narrow_arithmetic(self) -> list[str]:
        """Lines of the TTIR that compute in a half type, rather than only convert."""
        operation = re.compile(r"= (?:arith|math)\.(?!extf|truncf|constant)\w+ .*\b(?:bf16|f16)>?")
        return [line.strip() for line in self.ttir.splitlines() if operation.search(line)]


def compile_ahead(launch: Callable[[], object], capability: int) -> dict[str, Compiled]:
    """Compile what ``launch`` would start on a GPU of that compute capability, by kernel's name.

    Triton's own launch code chooses the specialisation, so nothing is described twice: a stand-in
    for the driver says which GPU it is, and `run` stops after the compilation. Give tensors of
    :func:`empty`, whose addresses are aligned as those of PyTorch's allocator are.
    """
    assert not INTERPRETED, "the interpreter compiles nothing"
    found, run, driver = {}, JITFunction.run, triton.runtime.driver

    def compile_only(self, *args, grid, warmup, **kwargs):
        found[self.fn.__name__] = _read(run(self, *args, grid=grid, warmup=True, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", _driver_of(capability))
        launch()
    return found


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without memory, for a launch that is only compiled."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _driver_of(capability: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        get_current_device=lambda: capability,  # Triton keeps what it compiled by this number
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )


def _read(kernel: triton.compiler.CompiledKernel) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    return Compiled(
        name=kernel.name,
        num_warps=kernel.metadata.num_warps,
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"],
        loads=_widths("ld", ptx),
        stores=_widths("st", ptx),
        atomics=re.findall(r"\b(?:atom|red)\.[\w.]+", ptx),
        ttir=kernel.asm["ttir"],
        ptx=ptx,
    )


def _widths(instruction: str, ptx: str) -> Counter:
    """Count accesses by width; ld.global.v4.b32 has 4 x 32 bits. The assembler keeps them."""
    found = re.findall(rf"\b{instruction}\.global\b[\w.]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return Counter(int(vector or 1) * int(bits) for vector, bits in found)
