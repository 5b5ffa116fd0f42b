"""Execute the text pages into their notebook twins (`make notebooks [NAME=page]`).

The text page `book/x.md` is what people edit; `book/notebooks/x.ipynb` is what is rendered, opened
on Colab and run again by nbval. A twin is executed again when its fingerprint changed: its text,
the modules that its imports reach inside the package, or the records that it prints.
"""

import ast
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
PACKAGE = ROOT / "cln_tutorial"
RECORDS = PACKAGE / "results"

# The first code cell of every twin. Readers on Colab get the book's version of the package; where
# the package is there already, nothing happens.
SETUP = """\
import importlib.util, subprocess, sys

if importlib.util.find_spec("cln_tutorial") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "cln-tutorial=={version}"]
    subprocess.run(pip, check=True)"""


def main(names: list[str]) -> None:
    if unknown := set(names) - set(pages()):
        sys.exit(f"no such page: {', '.join(unknown)}; there are {', '.join(pages())}")
    for name in names or [n for n in pages() if not is_current(n)]:
        print(f"executing {name}", flush=True)
        execute(name)


def pages() -> list[str]:
    """Names of the pages with code: those whose front matter speaks to jupytext."""
    return sorted(p.stem for p in BOOK.glob("*.md") if p.read_text().startswith("---\njupytext:"))


def twin_path(name: str) -> Path:
    return BOOK / "notebooks" / f"{name}.ipynb"


def unexecuted_twin(name: str) -> nbformat.NotebookNode:
    """The notebook that the text page describes, with the cell that installs the package."""
    notebook = jupytext.read(BOOK / f"{name}.md")
    first_code = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    setup = nbformat.v4.new_code_cell(
        SETUP.format(version=version()), metadata={"tags": ["remove-cell"]}
    )
    notebook.cells.insert(first_code, setup)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(name: str) -> None:
    notebook = unexecuted_twin(name)
    notebook.metadata["fingerprint"] = fingerprint(name)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as empty:
        resources = {"metadata": {"path": empty}}
        # A cell that prints slowly would have several boxes.
        client = NotebookClient(notebook, timeout=300, resources=resources, coalesce_streams=True)
        client.record_timing = False
        start = time.perf_counter()
        client.execute(env=env)
        notebook.metadata["seconds"] = round(time.perf_counter() - start)
    notebook.metadata.pop("language_info", None)
    temporary = twin_path(name).with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(twin_path(name))


def is_current(name: str) -> bool:
    path = twin_path(name)
    return path.exists() and nbformat.read(path, 4).metadata.get("fingerprint") == fingerprint(name)


def fingerprint(name: str) -> str:
    """SHA-256 over the text page, all modules that its imports reach, and its records."""
    source = "\n".join(c.source for c in unexecuted_twin(name).cells if c.cell_type == "code")
    graph = import_graph()
    reached: set[str] = set()
    front = with_packages(imports(source))
    while front:
        reached |= front
        front = with_packages(set().union(*(graph[m] for m in front))) - reached
    files = {BOOK / f"{name}.md", *map(module_path, reached)}
    if "cln_tutorial.results" in reached:
        files |= set(RECORDS.glob("*.json" if name == "results" else f"{name}*.json"))
    digest = hashlib.sha256((SETUP + version()).encode())
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def import_graph() -> dict[str, set[str]]:
    """Which module of the package imports which: full dotted names."""
    return {
        name: imports(module_path(name).read_text()) - {name}
        for name in map(module_name, PACKAGE.rglob("*.py"))
    }


def imports(source: str) -> set[str]:
    """The modules of the package that a source imports, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # absolute: ruff bans relative imports
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {n for n in names if n.startswith("cln_tutorial.") and module_path(n)}


def with_packages(names: set[str]) -> set[str]:
    """Importing cln_tutorial.a.b runs cln_tutorial.a as well: what a page depends on.

    Not in `import_graph`: a package that hands on the names of its modules is no circle.
    """
    above = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count("."))}
    return names | above


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_path(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def version() -> str:
    """The package's one version number, read without importing it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    values = (n.value.value for n in tree.body if isinstance(n, ast.Assign))
    return next(values)


if __name__ == "__main__":
    main(sys.argv[1:])
