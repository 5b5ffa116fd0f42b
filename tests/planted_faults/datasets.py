"""Faults of the loader; the tests catch each without the real data and without a network."""

from tests.planted_faults import Fault

SOURCES = "datasets/sources.py"
CLEANING = "datasets/cleaning.py"
NEWSGROUPS = "datasets/newsgroups20.py"
PAIRS = "datasets/word_similarity.py"

FAULTS = [
    Fault(
        "leaks are counted as held-out texts",
        CLEANING,
        " for content, labels in held_out.items() if content not in train}",
        " for content, labels in held_out.items()}",
        shows_on_page=False,
    ),
    Fault(
        "white space at the ends makes a new text",
        CLEANING,
        "text.strip().lower()",
        "text.lower()",
        shows_on_page=False,
    ),
    Fault(
        "a text with both labels is kept",
        CLEANING,
        " for content, labels in found.items() if len(labels) == 1}",
        " for content, labels in found.items()}",
        shows_on_page=False,
    ),
    Fault(
        "a line ends at every separator of Unicode",
        SOURCES,
        '.removesuffix("\\n").split("\\n")',
        ".splitlines()",
        shows_on_page=False,
    ),
    Fault(
        "the content's checksum is computed and not compared",
        SOURCES,
        "if digest != file.sha256:",
        "if not digest:",
        shows_on_page=False,
    ),
    Fault(
        "a download is kept whatever its checksum",
        SOURCES,
        "cache.registry[entry] = file.url_sha256",
        "cache.registry[entry] = None",
        shows_on_page=False,
    ),
    Fault(
        "the cache comes before $CLN_TUTORIAL_DATA",
        SOURCES,
        "path = here[0] if here else _fetch(name, file, progress)",
        "path = _fetch(name, file, progress)",
        shows_on_page=False,
    ),
    Fault(
        "the whole file is used where the head is meant",
        SOURCES,
        "islice(io.BytesIO(content), file.head)",
        "islice(io.BytesIO(content), None)",
        shows_on_page=False,
    ),
    Fault(
        "a package's copy comes before $CLN_TUTORIAL_DATA",
        SOURCES,
        "in (local, file.packaged) if path",
        "in (file.packaged, local) if path",
        shows_on_page=False,
    ),
    Fault(
        "what stands behind the values of an idx file is ignored",
        CLEANING,
        "len(content) - start != math.prod(shape):",
        "len(content) - start < math.prod(shape):",
        shows_on_page=False,
    ),
    Fault(
        "the sizes of an idx file are read with the lowest byte first",
        CLEANING,
        '">i4"',
        '"<i4"',
        shows_on_page=False,
    ),
    Fault(
        "images and labels that are not equally many are cut to the shorter",
        CLEANING,
        "    if len(images) != len(labels):",
        "    images = images[: len(labels)]\n    labels = labels[: len(images)]\n    if not names:",
        shows_on_page=False,
    ),
    Fault(
        "posts are sorted by the digits of their numbers",
        NEWSGROUPS,
        "posts.append((_SIDES.index(side), group, int(number), content))",
        "posts.append((_SIDES.index(side), group, number, content))",
        shows_on_page=False,
    ),
    Fault(
        "every Re: of a subject is removed",
        NEWSGROUPS,
        "((re|fwd):[ \\t]*)?(.*)",
        "((re|fwd):[ \\t]*)*(.*)",
        shows_on_page=False,
    ),
    Fault(
        "the subject of a post may stand in its body",
        NEWSGROUPS,
        '(.*)", header, re',
        '(.*)", post, re',
        shows_on_page=False,
    ),
    Fault(
        "a post on both sides is counted only within its class",
        NEWSGROUPS,
        "if len({side for _, side in where}) == 2]",
        "if len({side for _, side in where}) == 2 == len({label for label, _ in where}) + 1]",
        shows_on_page=False,
    ),
    Fault(
        "local files are prepared as the archive is",
        SOURCES,
        "if file.prepare is not None and not here:",
        "if file.prepare is not None:",
        shows_on_page=False,
    ),
    Fault(
        "a pair in the other order is another pair",
        PAIRS,
        "frozenset(pair) for pair in pairs",
        "pair for pair in pairs",
        shows_on_page=False,
    ),
]
