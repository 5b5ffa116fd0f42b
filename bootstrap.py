"""Make .venv and install what the book (or the tests) need, once; then say nothing.

    python3 bootstrap.py book    what `make book` needs
    python3 bootstrap.py dev     what `make test` needs, and a browser

Plain enough for any Python to parse, so that an old one gets a sentence instead of a traceback.
"""

from __future__ import print_function

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "installed.json")
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome-stable",
    "google-chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def main(extra):
    need_python_and_venv()
    torch = os.environ.get("TORCH") or "torch"
    constraints = os.environ.get("CONSTRAINTS") or os.path.join(ROOT, "constraints.txt")
    wanted = fingerprint(torch, constraints)
    installed = read_stamp()
    # dev contains book: whoever has the larger one has the smaller.
    if wanted not in (installed.get(extra), installed.get("dev")):
        make_venv(installed)
        # Alone: an index that has only torch's builds need not have what torch depends on.
        pip("install", "-c", constraints, "--no-deps", *shlex.split(torch))
        pip("install", "-c", constraints, "-e", "%s[%s]" % (ROOT, extra))
        installed[extra] = wanted
        write_stamp(installed)
    if extra == "dev":
        need_browser()


def need_python_and_venv():
    if sys.version_info < (3, 11):
        stop(
            "Python 3.11 or newer is needed, this one is %d.%d: install it, then "
            "`make PYTHON=python3.11 ...`." % sys.version_info[:2]
        )
    try:
        import ensurepip  # noqa: F401 - Debian ships venv without it
        import venv  # noqa: F401 - only asks whether it is there
    except ImportError:
        stop(
            "This Python has no venv module: install it (Debian, Ubuntu: "
            "`apt install python3-venv`), then try again."
        )


def find_browser():
    """Path of the system's Chromium or Chrome, or None: then Playwright's own is used."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def need_browser():
    if find_browser():
        return
    # Playwright keeps its download between runs and is quick when there is nothing to do.
    got = subprocess.call([PYTHON, "-m", "playwright", "install", "chromium"])
    if got != 0:
        stop(
            "No browser for the browser tests: install Chromium (Debian: `apt install chromium`, "
            "macOS: `brew install --cask chromium`), then try again."
        )


def make_venv(installed):
    if installed.get("python") == sys.version and os.path.exists(PYTHON):
        return
    installed.clear()
    import venv

    try:
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)  # as `python -m venv` does
    except (OSError, subprocess.CalledProcessError) as error:
        stop("Could not make %s: %s" % (VENV, error))
    installed["python"] = sys.version
    write_stamp(installed)


def pip(*arguments):
    print("pip " + " ".join(arguments) + "  (minutes, the first time)", flush=True)
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "-qq"] + list(arguments)
    if subprocess.call(command) != 0:
        stop("pip could not install the packages (its own words stand above).")


def fingerprint(torch, constraints):
    text = sys.version + torch
    for path in (os.path.join(ROOT, "pyproject.toml"), constraints):
        with open(path) as file:
            text += file.read()
    return hashlib.sha256(text.encode()).hexdigest()


def read_stamp():
    try:
        with open(STAMP) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def write_stamp(installed):
    with open(STAMP, "w") as file:
        json.dump(installed, file)


def stop(sentence):
    print(sentence, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:] not in (["book"], ["dev"]):
        stop("usage: python3 bootstrap.py book|dev")
    main(sys.argv[1])
