"""Build the HTML book (`make book`): executes nothing, every warning is an error.

With nothing changed since the last good build there is nothing to do. After a failed build the
next one starts from scratch, because Sphinx repeats the warnings of unread pages to nobody.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "_build"
STAMP = BUILD / "book.sha256"
FIRST_PAGE = BUILD / "html" / "index.html"


def main() -> None:
    sources = fingerprint()
    if not (FIRST_PAGE.exists() and STAMP.exists() and STAMP.read_text() == sources):
        build()
        STAMP.write_text(sources)
    print(f"The book: {FIRST_PAGE.as_uri()}")


def build() -> None:
    if not STAMP.exists():
        for folder in ("html", ".doctrees", ".jupyter_cache"):
            shutil.rmtree(BUILD / folder, ignore_errors=True)
    STAMP.unlink(missing_ok=True)
    jupyter_book = str(Path(sys.executable).parent / "jupyter-book")
    command = [jupyter_book, "build", str(ROOT), "-W", "-n", "--keep-going", "-q"]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit("The book has warnings or errors: they stand above.")
    # Sphinx leaves these as they were if no page has changed.
    shutil.copytree(ROOT / "book/_static", BUILD / "html/_static", dirs_exist_ok=True)


def fingerprint() -> str:
    """SHA-256 over every file that the HTML depends on."""
    roots = ["_config.yml", "_toc.yml", "constraints.txt", "book", "cln_tutorial"]
    files = [p for r in roots for p in [ROOT / r, *(ROOT / r).rglob("*")] if p.is_file()]
    digest = hashlib.sha256()
    for path in sorted(p for p in files if "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
