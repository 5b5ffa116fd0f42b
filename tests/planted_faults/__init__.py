"""Bugs that a tired colleague would write; each must turn the chapter's tests red.

`make faults [NAME=chapter]` applies them one by one to a copy (tests/test_planted_faults.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One small wrong edit of one file of the package.

    Args:
        what: the bug in words.
        file: path inside `cln_tutorial/`.
        old: text that occurs exactly once in the file.
        new: what stands there instead.
        shows_on_page: whether nbval alone, on the chapter's notebook, must turn red too.
        tests: which of the chapter's test files must turn red, `tests/test_CHAPTER{tests}.py`.
    """

    what: str
    file: str
    old: str
    new: str
    shows_on_page: bool
    tests: str = ""
