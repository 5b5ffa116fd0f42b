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
_PART_FIELDS = {
    "command": str,
    "versions": dict,
    "load": list,
    "seconds": float,
    "threads": float,
    "rounds": float,
    "rows": list,
}
_ROW_FIELDS = {
    "op": str,
    "shape": list,
    "dtype": str,
    "mode": str,
    "setting": str,
    "baseline": str,
    "contenders": dict,
}
_GATE_FIELDS = {"result": str, "error": float, "limit": float}
_TIME_FIELDS = {"microseconds": float, "ratio": dict}
_QUARTILES = {"q25": float, "median": float, "q75": float}
_GOAL_FIELDS = {"what": str, "sense": str, "wanted": float}
_CLOCKS = ("cpu", "wall", "cuda")
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
    """All figures of the experiments, Markdown tables that also read as plain text.

    One row per figure: its mean over the seeds ± the standard error of that mean, to the two
    leading digits of the error, and what was published. Figures named "group-row.column" stand in
    the :func:`grid` of their group below. Under the tables stands where something was published,
    and why it is (not) comparable.

    Args:
        names: the records to show; all of them if not given.
    """
    head = ["experiment", "figure", "mean ± standard error", "unit", "seeds", "published"]
    chosen = _stems("experiment") if names is None else names
    records = [load(name) for name in chosen]
    rows = [row for record in records for row in _rows(record)]
    blocks = [_markdown(head, rows)] if rows else []
    for record in records:
        for group in _groups(record):
            blocks.append(f"**{record['experiment']}, {group}**\n\n{grid(record, group)}")
    notes = [note for record in records for note in _notes(record)]
    return "\n\n".join([*blocks, "\n".join(notes)])


def grid(name: str | Record, group: str, columns: Sequence[str] | None = None) -> str:
    """The figures "group-row.column" of an experiment, one row per row, in Markdown.

    Args:
        name: of the record, or the record.
        group: what stands before the first dash.
        columns: which to show, in this order; all of them if not given.

    Raises:
        ValueError: if there is no such record, no such group in it, or no such column in that.
    """
    record = load(name) if isinstance(name, str) else name
    groups = _groups(record)
    if group not in groups:
        known = ", ".join(groups) or "none"
        raise ValueError(f"`group` must be one of {known}; got {group!r}")
    cells, units = groups[group], {}
    for (_, column), figure in cells.items():
        unit = f"{figure['unit']}, {len(figure['values'])} seeds"
        units.setdefault(column, {})[unit] = None
    for column in columns or ():
        if column not in units:
            raise ValueError(f"`columns` must be of {', '.join(units)}; got {column!r}")
    units = {column: units[column] for column in columns or units}
    rows = [
        [row, *(_cell(cells.get((row, column))) for column in units)]
        for row in dict.fromkeys(row for row, _ in cells)
    ]
    notes = [f"- {column}: {'; '.join(each)}." for column, each in units.items()]
    return "\n".join([_markdown([group, *units], rows), "", *notes])


def speed_table(name: str | Record, device: str | None = None) -> str:
    """How many times as fast as the baseline every contender is, in Markdown.

    One table per operation, mode, dtype and setting. A cell holds the median ratio of the rounds
    and its quartiles, "1.83 (1.79-1.90)", in thread CPU time on a CPU and in the events of a GPU.
    Under the tables stand the goals and what was not measured. For figures take the rows from
    ``load(name, "benchmark")["devices"][device]["rows"]``.

    Args:
        name: of the benchmark, or its record.
        device: one of the record's devices; all of them if not given.

    Raises:
        ValueError: if there is no such record, or no such device in it.
    """
    record = load(name, "benchmark") if isinstance(name, str) else name
    devices = record["devices"]
    if device is not None and device not in devices:
        raise ValueError(f"`device` must be one of {', '.join(devices)}; got {device!r}")
    chosen = devices if device is None else [device]
    return "\n\n".join(block for each in chosen for block in _speed_blocks(each, devices[each]))


def meets(reached: float | None, sense: str, wanted: float) -> bool | None:
    """Whether a goal is met; None if it was not measured.

    Args:
        reached: what was measured.
        sense: "at least" or "at most".
        wanted: what was promised.
    """
    if reached is None:
        return None
    return reached >= wanted if sense == "at least" else reached <= wanted


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

    A benchmark's record holds ``benchmark``, ``command``, ``code`` (of module, kernels and
    benchmark) and ``devices``: for each device its ``command``, ``versions``, ``load`` (of the
    machine, before), ``seconds``, ``threads``, ``rounds``, ``missing`` (contender to reason),
    ``rows`` and ``goals``. A row is one case: ``op``, ``shape``, ``dtype``, ``mode``, ``setting``
    (of the allocator), ``baseline``, ``bound`` where there is one, ``refused`` (contender to what
    was wrong), and ``contenders``, each with its ``gate`` (largest error against float64, and the
    limit) and, for each clock, ``microseconds`` and the quartiles of ``ratio``, baseline /
    contender. A goal is ``what``, ``sense``, ``wanted``, ``reached`` and ``met``, the last two null
    where nothing was measured.

    Raises:
        ValueError: naming the field, what it holds and what it should hold.
    """
    _check_fields("", record, _FIELDS[kind])
    if not re.fullmatch("[0-9a-f]{64}", record["code"]):
        raise ValueError(f"`code` must be a SHA-256 in hexadecimal; got {record['code']!r}")
    if "stale" in record:
        _check_fields("", record, {"stale": str})
    if kind == "benchmark":
        for device, part in record["devices"].items():
            _check_part(f"devices.{device}", part)
        return
    if record["seconds"] < 0:
        raise ValueError(f"`seconds` must not be negative; got {record['seconds']}")
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


def _check_part(path: str, part: Any) -> None:
    _check_fields(path, part, _PART_FIELDS | ({"stale": str} if "stale" in part else {}))
    _check_reasons(f"{path}.missing", part.get("missing"))
    for number, row in enumerate(part["rows"]):
        _check_row(f"{path}.rows[{number}]", row)
    if not isinstance(part.get("goals"), list):
        raise ValueError(f"`{path}.goals` must be a list; got {part.get('goals')!r}")
    for number, goal in enumerate(part["goals"]):
        _check_goal(f"{path}.goals[{number}]", goal)


def _check_row(path: str, row: Any) -> None:
    _check_fields(path, row, _ROW_FIELDS)
    _check_reasons(f"{path}.refused", row.get("refused"))
    for field in ("baseline", "bound"):
        if field in row and row[field] not in row["contenders"]:
            known = ", ".join(row["contenders"])
            raise ValueError(f"`{path}.{field}` must be one of {known}; got {row[field]!r}")
    clocks = [clock for clock in _CLOCKS if clock in row["contenders"][row["baseline"]]]
    if not clocks:
        raise ValueError(f"`{path}.contenders.{row['baseline']}` has none of {', '.join(_CLOCKS)}")
    for name, contender in row["contenders"].items():
        _check_contender(f"{path}.contenders.{name}", contender, clocks)


def _check_contender(path: str, contender: Any, clocks: list[str]) -> None:
    _check_fields(path, contender, {"gate": dict} | dict.fromkeys(clocks, dict))
    gate = contender["gate"]
    _check_fields(f"{path}.gate", gate, _GATE_FIELDS)
    if gate["error"] > gate["limit"]:
        raise ValueError(
            f"`{path}.gate.error` is {gate['error']}, above its limit {gate['limit']}: "
            f"a wrong result has no speed"
        )
    for clock in clocks:
        _check_fields(f"{path}.{clock}", contender[clock], _TIME_FIELDS)
        ratio = contender[clock]["ratio"]
        _check_fields(f"{path}.{clock}.ratio", ratio, _QUARTILES)
        if not 0 < ratio["q25"] <= ratio["median"] <= ratio["q75"]:
            raise ValueError(f"`{path}.{clock}.ratio` must rise from above zero; got {ratio}")


def _check_goal(path: str, goal: Any) -> None:
    _check_fields(path, goal, _GOAL_FIELDS)
    if goal["sense"] not in ("at least", "at most"):
        raise ValueError(f"`{path}.sense` must be 'at least' or 'at most'; got {goal['sense']!r}")
    if "reached" not in goal or not (goal["reached"] is None or _is(goal["reached"], float)):
        raise ValueError(
            f"`{path}.reached` must be a finite number, or null where nothing was measured; "
            f"got {goal.get('reached', 'no such field')!r}"
        )
    met = meets(goal["reached"], goal["sense"], goal["wanted"])
    if goal.get("met", "no such field") is not met:
        raise ValueError(
            f"`{path}.met` must be {met}, because {goal['reached']} was reached and "
            f"{goal['sense']} {goal['wanted']} wanted; got {goal.get('met', 'no such field')!r}"
        )


def _check_reasons(path: str, reasons: Any) -> None:
    texts = reasons.values() if isinstance(reasons, dict) else [None]
    if not all(_is(reason, str) for reason in texts):
        raise ValueError(f"`{path}` must be a mapping from names to reasons; got {reasons!r}")


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


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


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
        if "." not in name
    ]


def _groups(record: Record) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Figures named "group-row.column", by group and then by row and column."""
    groups: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for name, figure in record["figures"].items():
        row, dot, column = name.partition(".")
        if dot:
            group, _, short = row.partition("-")
            groups.setdefault(group, {})[short or group, column] = figure
    return groups


def _cell(figure: dict[str, Any] | None) -> str:
    return "-" if figure is None else _with_error(figure["mean"], figure["standard_error"])


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


def _speed_blocks(device: str, part: dict[str, Any]) -> list[str]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in part["rows"]:
        op, _, _ = row["op"].partition(", ")  # behind the comma stands a variant
        key = (op, *(row[field] for field in ("mode", "dtype", "setting", "baseline")))
        groups.setdefault(key, []).append(row)
    blocks = []
    for (op, mode, dtype, setting, baseline), rows in groups.items():
        names = dict.fromkeys(name for row in rows for name in row["contenders"])
        names = [name for name in names if name != baseline]
        head = ["shape", f"{baseline}, µs", *names]
        table = _markdown(head, [_speeds(row, names) for row in rows])
        blocks += [f"**{op}, {mode}**, {dtype}, allocator: {setting}; {device}", table]
    return [*blocks, "\n".join(_speed_notes(part))]


def _speeds(row: dict[str, Any], names: list[str]) -> list[str]:
    contenders = row["contenders"]
    clock = "cuda" if "cuda" in contenders[row["baseline"]] else "cpu"
    _, comma, variant = row["op"].partition(", ")
    cells = ["×".join(map(str, row["shape"])) + comma + variant]
    cells.append(f"{contenders[row['baseline']][clock]['microseconds']:.4g}")
    for name in names:
        ratio = contenders[name][clock]["ratio"] if name in contenders else None
        cell = "{median:.2f} ({q25:.2f}-{q75:.2f})"
        cells.append("-" if ratio is None else cell.format(**ratio))
    return cells


def _speed_notes(part: dict[str, Any]) -> list[str]:
    notes = [f"- older than its code: {part['stale']}."] if "stale" in part else []
    for goal in part["goals"]:
        verdict = {True: "met", False: "not met", None: "not measured"}[goal["met"]]
        reached = "" if goal["reached"] is None else f"{goal['reached']:.3g}, "
        what = f"{goal['what']}: {reached}wanted {goal['sense']} {goal['wanted']:g}"
        notes.append(f"- goal {verdict}: {what}.")
    notes += [f"- not measured: {name} ({reason})." for name, reason in part["missing"].items()]
    for row in part["rows"]:
        where = f"{row['op']} {tuple(row['shape'])}, " + ", ".join(
            row[field] for field in ("dtype", "mode", "setting")
        )
        notes += [f"- no figure: {name}, {where}: {why}." for name, why in row["refused"].items()]
    return notes


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
