"""Faults of the loader; the tests catch each without the real data and without a network."""

from tests.planted_faults import Fault

FAULTS = [
    Fault(
        "leaks are counted as held-out texts",
        "datasets.py",
        " for text, labels in held_out.items() if text not in train}",
        " for text, labels in held_out.items()}",
        shows_on_page=False,
    ),
    Fault(
        "white space at the ends makes a new text",
        "datasets.py",
        "text.strip().lower()",
        "text.lower()",
        shows_on_page=False,
    ),
    Fault(
        "a text with both labels is kept",
        "datasets.py",
        " for text, labels in labels_by_text.items() if len(labels) == 1}",
        " for text, labels in labels_by_text.items()}",
        shows_on_page=False,
    ),
    Fault(
        "a line ends at every separator of Unicode",
        "datasets.py",
        '.removesuffix("\\n").split("\\n")',
        ".splitlines()",
        shows_on_page=False,
    ),
    Fault(
        "the content's checksum is computed and not compared",
        "datasets.py",
        "if digest != file.sha256:",
        "if not digest:",
        shows_on_page=False,
    ),
    Fault(
        "a download is kept whatever its checksum",
        "datasets.py",
        "cache.registry[entry] = file.url_sha256",
        "cache.registry[entry] = None",
        shows_on_page=False,
    ),
    Fault(
        "the cache comes before $CLN_TUTORIAL_DATA",
        "datasets.py",
        "path = local if local and local.exists() else _fetch(name, file, progress)",
        "path = _fetch(name, file, progress)",
        shows_on_page=False,
    ),
    Fault(
        "the whole file is used where the head is meant",
        "datasets.py",
        "islice(io.BytesIO(content), file.head)",
        "islice(io.BytesIO(content), None)",
        shows_on_page=False,
    ),
]
