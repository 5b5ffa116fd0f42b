"""Records of the experiments and benchmarks: read them, check them, put them into one table.

The book prints a measured number from a record, never from memory. A record says how to measure
again (command, code, data, versions, device), how far the seeds spread, and what was published.
"""

import difflib
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Literal

Record = dict[str, Any]
Kind = Literal["experiment", "benchmark"]

FEWEST_SEEDS = 3
_SUFFIXES = {"experiment": ".json", "benchmark": ".benchmark.json"}
_FIELDS = {
    "experiment": {
        "experiment": str,
        "command": str,
        "code": str,
        "data": dict,
        "versions": dict,
        "device": str,
        "seconds": float,
        "figures": dict,
        "published": list,
    },
    "benchmark": {"benchmark": str, "command": str, "code": str, "devices": dict},
}
_FIGURE_FIELDS = {"values": list, "mean": float, "standard_error": float, "unit": str}
_PUBLISHED_FIELDS = {"figure": str, "source": str, "comparable": bool, "why": str}
_WORDS = {
    str: "text that is not empty",
    dict: "a mapping that is not empty",
    list: "a list that is not empty",
    float: "a finite number",
    bool: "true or false",
}


def names(kind: Kind = "experiment") -> tuple[str, ...]:
    """Names of the records in this package, sorted.

    Args:
        kind: ``"experiment"`` or ``"benchmark"``.
    """
    return tuple(_stems(kind))


def load(name: str, kind: Kind = "experiment") -> Record:
    """Read one record and check it.

    Args:
        name: one of :func:`names`, the name of a chapter.
        kind: ``"experiment"`` or ``"benchmark"``.

    Returns:
        The record as :func:`check` describes it.

    Raises:
        ValueError: if there is no such record (the message names the nearest), or if it is wrong.

    Example:
        >>> load("conditional_morn")
        Traceback (most recent call last):
            ...
        ValueError: no experiment record 'conditional_morn': did you mean 'conditional_norm'?...
    """
    stems = _stems(kind)
    if name not in stems:
        nearest = difflib.get_close_matches(name.lower(), stems, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        known = ", ".join(stems) or "none"
        raise ValueError(f"no {kind} record {name!r}: {hint}There are: {known}.")
    record = json.loads((_folder() / f"{name}{_SUFFIXES[kind]}").read_text(encoding="utf-8"))
    check(record, kind)
    if record[kind] != name:
        raise ValueError(f"`{kind}` of the record {name!r} is {record[kind]!r}")
    return record


def table(names: Iterable[str] | None = None) -> str:
    """All figures of the experiments, a Markdown table that also reads as plain text.

    One row per figure: its mean over the seeds ± the standard error of that mean, to the two
    leading digits of the error, and what was published. Under the table stands where that was
    published, and why it is (not) comparable.

    Args:
        names: the records to show; all of them if not given.
    """
    head = ["experiment", "figure", "mean ± standard error", "unit", "seeds", "published"]
    chosen = _stems("experiment") if names is None else names
    records = [load(name) for name in chosen]
    rows = [row for record in records for row in _rows(record)]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    table = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return "\n".join([*table, "", *(note for record in records for note in _notes(record))])


def summarise(values: Sequence[float], unit: str) -> dict[str, Any]:
    r"""One figure of a record: the values of the seeds, their mean, and its standard error.

    .. math:: \bar x = \frac1n\sum_i x_i, \qquad
        s_{\bar x} = \sqrt{\frac{1}{n(n-1)}\sum_i (x_i-\bar x)^2}

    Args:
        values: one number per seed, at least two.
        unit: of the values, in words.

    Example:
        >>> round(summarise([1.0, 2.0, 3.0], "nats per token")["standard_error"], 6)  # sqrt(1/3)
        0.57735
    """
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "standard_error": statistics.stdev(values) / math.sqrt(len(values)),
        "unit": unit,
    }


def check(record: Record, kind: Kind = "experiment") -> None:
    """Raise an error unless a record can be read, run again and trusted.

    An experiment's record holds ``experiment`` (its name), ``command`` (runs it again), ``code``
    (SHA-256 of chapter module and experiment), ``data`` (set to checksums), ``versions``,
    ``device``, ``seconds`` (of all its jobs together), ``figures`` (name to :func:`summarise`, at
    least three seeds) and ``published`` (a list of ``figure``, ``value`` or null, ``source``,
    ``comparable`` and ``why``). ``stale``, if it is there, says why the record may be older than
    its code.

    Raises:
        ValueError: naming the field, what it holds and what it should hold.
    """
    _check_fields("", record, _FIELDS[kind])
    if not re.fullmatch("[0-9a-f]{64}", record["code"]):
        raise ValueError(f"`code` must be a SHA-256 in hexadecimal; got {record['code']!r}")
    if kind == "benchmark":
        return
    if record["seconds"] < 0:
        raise ValueError(f"`seconds` must not be negative; got {record['seconds']}")
    if "stale" in record:
        _check_fields("", record, {"stale": str})
    for name, figure in record["figures"].items():
        _check_figure(f"figures.{name}", figure)
    for number, claim in enumerate(record["published"]):
        _check_claim(f"published[{number}]", claim, record["figures"])


def _check_figure(path: str, figure: Any) -> None:
    _check_fields(path, figure, _FIGURE_FIELDS)
    values = figure["values"]
    if len(values) < FEWEST_SEEDS:
        raise ValueError(
            f"`{path}.values` must hold at least {FEWEST_SEEDS} seeds; got {len(values)}"
        )
    for number, value in enumerate(values):
        if not _is(value, float):
            raise ValueError(f"`{path}.values[{number}]` must be a finite number; got {value!r}")
    expected = summarise(values, figure["unit"])
    for field in ("mean", "standard_error"):
        if not math.isclose(figure[field], expected[field], rel_tol=1e-9, abs_tol=1e-12):
            raise ValueError(
                f"`{path}.{field}` is {figure[field]}, but its values give {expected[field]}"
            )


def _check_claim(path: str, claim: Any, figures: dict[str, Any]) -> None:
    _check_fields(path, claim, _PUBLISHED_FIELDS)
    if claim["figure"] not in figures:
        raise ValueError(
            f"`{path}.figure` must be one of {', '.join(figures)}; got {claim['figure']!r}"
        )
    if "value" not in claim or not (claim["value"] is None or _is(claim["value"], float)):
        raise ValueError(
            f"`{path}.value` must be a finite number, or null where nothing was published; "
            f"got {claim.get('value', 'no such field')!r}"
        )


def _check_fields(path: str, holder: Any, fields: dict[str, type]) -> None:
    if not isinstance(holder, dict):
        raise ValueError(f"`{path or 'record'}` must be a mapping; got {holder!r}")
    for field, wanted in fields.items():
        full = f"{path}.{field}" if path else field
        if field not in holder:
            raise ValueError(f"`{full}` is missing from the record")
        if not _is(holder[field], wanted):
            raise ValueError(f"`{full}` must be {_WORDS[wanted]}; got {holder[field]!r}")


def _is(value: Any, wanted: type) -> bool:
    if wanted is bool:
        return isinstance(value, bool)
    if wanted is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, wanted) and len(value) > 0


def _rows(record: Record) -> list[list[str]]:
    return [
        [
            record["experiment"],
            name,
            _with_error(figure["mean"], figure["standard_error"]),
            figure["unit"],
            str(len(figure["values"])),
            "; ".join(_value(c) for c in record["published"] if c["figure"] == name) or "-",
        ]
        for name, figure in record["figures"].items()
    ]


def _with_error(mean: float, error: float) -> str:
    if error == 0:
        return f"{mean:.4g} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def _value(claim: dict[str, Any]) -> str:
    return "none" if claim["value"] is None else f"{claim['value']:g}"


def _notes(record: Record) -> list[str]:
    """What was published, and where; claims that differ in the figure only share a line."""
    figures: dict[str, list[str]] = {}
    for claim in record["published"]:
        comparable = "comparable" if claim["comparable"] else "not comparable"
        text = f"published {_value(claim)} ({claim['source']}); {comparable}: {claim['why']}."
        figures.setdefault(text, []).append(claim["figure"])
    return [f"- {', '.join(names)}: {text}" for text, names in figures.items()]


def _stems(kind: Kind) -> list[str]:
    if kind not in _SUFFIXES:
        raise ValueError(f"`kind` must be one of {', '.join(_SUFFIXES)}; got {kind!r}")
    found = {kind: [] for kind in _SUFFIXES}
    for file in sorted(entry.name for entry in _folder().iterdir()):
        # The suffix of an experiment ends that of a benchmark, so the longer one is tried first.
        for each in ("benchmark", "experiment"):
            if file.endswith(_SUFFIXES[each]):
                found[each].append(file.removesuffix(_SUFFIXES[each]))
                break
    return found[kind]


def _folder():
    return resources.files(__name__)
