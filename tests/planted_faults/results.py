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
]
