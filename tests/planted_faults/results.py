"""Bugs of the records that test_results, or the page that prints the table, must catch."""

from tests.planted_faults import Fault

FILE = "results/__init__.py"

FAULTS = [
    Fault(
        "standard deviation of the seeds given as the error of their mean",
        FILE,
        '"standard_error": statistics.stdev(values) / math.sqrt(len(values)),',
        '"standard_error": statistics.stdev(values),',
        shows_on_page=False,
    ),
    Fault(
        "error of the mean shown with one digit less",
        FILE,
        "decimals = max(0, 1 - math.floor(math.log10(error)))",
        "decimals = max(0, -math.floor(math.log10(error)))",
        shows_on_page=True,
    ),
    Fault(
        "a published figure that is not comparable is called comparable",
        FILE,
        'comparable = "comparable" if claim["comparable"] else "not comparable"',
        'comparable = "comparable" if claim["why"] else "not comparable"',
        shows_on_page=True,
    ),
    Fault(
        "what was published for one figure stands beside all",
        FILE,
        'for c in record["published"] if c["figure"] == name)',
        'for c in record["published"])',
        shows_on_page=True,
    ),
    Fault(
        "a mean that does not belong to its values is believed",
        FILE,
        "rel_tol=1e-9, abs_tol=1e-12",
        "rel_tol=1e-2, abs_tol=1e-2",
        shows_on_page=False,
    ),
    Fault(
        "a contender that is wrong keeps its speed",
        FILE,
        'if gate["error"] > gate["limit"]:',
        'if gate["error"] > 10 * gate["limit"]:',
        shows_on_page=False,
    ),
    Fault(
        "a goal that was not measured counts as missed",
        FILE,
        "    if reached is None:\n        return None\n",
        "    if reached is None:\n        return False\n",
        shows_on_page=False,
    ),
    Fault(
        "a goal that sets an upper limit is met by all that is larger",
        FILE,
        'return reached >= wanted if sense == "at least" else reached <= wanted',
        "return reached >= wanted",
        shows_on_page=False,
    ),
    Fault(
        "a goal is called met although its figure says otherwise",
        FILE,
        'if goal.get("met", "no such field") is not met:',
        'if "met" not in goal:',
        shows_on_page=False,
    ),
    Fault(
        "quartiles in any order",
        FILE,
        'if not 0 < ratio["q25"] <= ratio["median"] <= ratio["q75"]:',
        'if not 0 < ratio["q25"] <= ratio["q75"]:',
        shows_on_page=False,
    ),
    Fault(
        "quartiles exchanged in the table",
        FILE,
        'cell = "{median:.2f} ({q25:.2f}-{q75:.2f})"',
        'cell = "{median:.2f} ({q75:.2f}-{q25:.2f})"',
        shows_on_page=False,
    ),
    Fault(
        "a GPU's table shows the time of the CPU that launched its kernels",
        FILE,
        'clock = "cuda" if "cuda" in contenders[row["baseline"]] else "cpu"',
        'clock = "cpu"',
        shows_on_page=False,
    ),
    Fault(
        "settings of the allocator thrown into one table",
        FILE,
        '("mode", "dtype", "setting", "baseline")',
        '("mode", "dtype", "dtype", "baseline")',
        shows_on_page=False,
    ),
    Fault(
        "a part that is older than its code does not say so",
        FILE,
        'if "stale" in part else []\n',
        "if False else []\n",
        shows_on_page=False,
    ),
    Fault(
        "the parts of the other devices are shown where one was asked for",
        FILE,
        "chosen = devices if device is None else [device]",
        "chosen = devices",
        shows_on_page=False,
    ),
]
