"""Faults of the loader; the tests catch each without the real data and without a network."""

from tests.planted_faults import Fault

FAULTS = [
    Fault(
        "leaks are counted as held-out texts",
        "datasets.py",
        " for content, labels in held_out.items() if content not in train}",
        " for content, labels in held_out.items()}",
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
        " for content, labels in found.items() if len(labels) == 1}",
        " for content, labels in found.items()}",
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
        "path = here[0] if here else _fetch(name, file, progress)",
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
    Fault(
        "a package's copy comes before $CLN_TUTORIAL_DATA",
        "datasets.py",
        "in (local, file.packaged) if path",
        "in (file.packaged, local) if path",
        shows_on_page=False,
    ),
    Fault(
        "what stands behind the values of an idx file is ignored",
        "datasets.py",
        "len(content) - start != math.prod(shape):",
        "len(content) - start < math.prod(shape):",
        shows_on_page=False,
    ),
    Fault(
        "the sizes of an idx file are read with the lowest byte first",
        "datasets.py",
        '">i4"',
        '"<i4"',
        shows_on_page=False,
    ),
    Fault(
        "images and labels that are not equally many are cut to the shorter",
        "datasets.py",
        "    if len(images) != len(labels):",
        "    images = images[: len(labels)]\n    labels = labels[: len(images)]\n    if not names:",
        shows_on_page=False,
    ),
]
