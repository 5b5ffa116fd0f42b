"""One class per row of logits, beside what people write for it, and the relaxed draw.

`tiled`, `triton`, `reference` and `auto` are the backends of `gumbel_max_sample` as users have it,
its checks included; "tiled, eager" is `tiled` without numba. The baseline is what readers of the
article take, `F.gumbel_softmax(logits, hard=True).argmax(-1)`. Plain `argmax` draws nothing, and is
the bound; `amax`, which is vectorised on a CPU and `argmax` is not, shows what one read costs.

    make bench NAME=gumbel_softmax
    python -m benchmarks.gumbel_softmax --device cuda

All peers are in PyTorch, so no other environment is needed.

A draw has no right value, only a right law. The logits are standard normal, so those that are drawn
are normal around 1; three thresholds cut them into four groups of about a quarter each, whose exact
probabilities are summed in float64. The gate draws until it has so many, and lets the frequencies
of the groups, and of the quarters of the classes by their place, be wrong by five standard errors.
Of the relaxed draw it checks also that its entries sum to 1, and that its gradient is that of a
softmax at the values that came out.

Rows of the mode "correctness" are laws that known ways to draw get wrong: the gate's verdict is the
figure, and what is timed is one call.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from benchmarks import harness
from cln_tutorial.gumbel_softmax import (
    available_backends,
    gumbel_max_sample,
    gumbel_softmax,
    tiles,
)

ONE_DRAW, MANY_DRAWS, RELAXED = ("one class of each row", "classes of one row", "gumbel_softmax")
LIKELY_FIRST, LIKELY_LAST, QUARTER, FINITE = (
    "draws of one row × classes, one likely, then those of the tail",
    "draws of one row × classes, those of the tail, then one likely",
    "512 draws, equal logits: share of the first quarter",
    "4,096 relaxed draws, equal logits: share without NaN",
)
FORWARD, BOTH, CORRECTNESS = "forward", "forward+backward", "correctness"
MANY = 10_000
SHAPES = {
    "cpu": [(16, 131_072), (64, 32_768), (256, 1024), (1, 131_072)],
    "cuda": [(1024, 200_000), (256, 131_072), (64, 32_768), (4096, 1024), (1, 131_072)],
}
LARGE = (16, 131_072)
BACKENDS = {
    "cpu": ("tiled", "reference", "auto"),
    "cuda": ("triton", "tiled", "reference", "auto"),
}
EAGER, GUMBEL, MULTINOMIAL, CATEGORICAL, RACE = (
    "tiled, eager",
    "F.gumbel_softmax",
    "multinomial",
    "Categorical",
    "exponential race",
)
PEERS = (GUMBEL, MULTINOMIAL, CATEGORICAL, RACE)
BOUND = "argmax"

GROUPS = 4
THRESHOLDS = (0.33, 1.0, 1.67)  # of the logits: the quartiles of a normal number around 1
GAP = 20.5  # of the logits of the tail
TAIL = (100_000, 2**18 + 1)  # draws, and classes; about 33 fall in the tail
QUICK_TAIL = (6400, 2**22 + 1)
MOST_IN_TAIL = 60  # and 5 at least: a binomial law of mean 33 is beyond in 1 of 10,000 runs
DRAWS, RELAXED_DRAWS = 512, 4096  # of the gate, at least
EXACT = 1e-12  # of what must be equal; a limit is above zero


def _five_errors(draws: int, groups: int = GROUPS) -> float:
    """Of a frequency, relative to the largest of some groups, which has at least 1 / groups."""
    return 5 * math.sqrt((groups - 1) / draws)


def cases(device: str) -> list[harness.Case]:
    dtypes = ("float32", "bfloat16")
    speeds = [_one_draw(shape, dtype) for shape in SHAPES[device] for dtype in dtypes]
    return [*speeds, _many_draws(131_072), _relaxed((4096, 1024)), *_verdicts(TAIL, 30_152)]


def quick(device: str) -> list[harness.Case]:
    dtypes = ("float32", "bfloat16")
    speeds = [_one_draw((64, 600), dtype) for dtype in dtypes]
    return [*speeds, _many_draws(600), _relaxed((1024, 8)), *_verdicts(QUICK_TAIL, 512)[1:]]


def _one_draw(shape: tuple[int, int], dtype: str) -> harness.Case:
    limits = dict.fromkeys(("by size", "by place"), _five_errors(DRAWS)) | {"largest": EXACT}
    size = math.prod(shape) * getattr(torch, dtype).itemsize
    about = {"baseline": GUMBEL, "bound": BOUND, "traffic": size}
    return harness.Case(ONE_DRAW, shape, dtype, FORWARD, one_draw, limits, **about)


def _many_draws(classes: int) -> harness.Case:
    limits = dict.fromkeys(("by size", "by place"), _five_errors(MANY))
    mode = f"{MANY:,} draws"
    shape = (1, classes)
    return harness.Case(MANY_DRAWS, shape, "float32", mode, many_draws, limits, MULTINOMIAL)


def _relaxed(shape: tuple[int, int]) -> harness.Case:
    limits = dict.fromkeys(("by size", "by place"), _five_errors(shape[0]))
    # Float32: a few roundings of 2^-24 in each entry of a sum, and in a gradient.
    limits |= {"sum": 1e-5, "gradient": 1e-5}
    return harness.Case(RELAXED, shape, "float32", BOTH, relaxed, limits, GUMBEL)


def _verdicts(tail: tuple[int, int], classes: int) -> list[harness.Case]:
    expected = _expected_in_tail(tail)
    draws = {"draws": (MOST_IN_TAIL - expected) / expected}
    share = {"share": _five_errors(DRAWS)}
    zeros = (8, classes)
    return [
        harness.Case(LIKELY_LAST, tail, "float32", CORRECTNESS, tails, draws, "auto"),
        harness.Case(LIKELY_FIRST, tail, "float32", CORRECTNESS, tails, draws, "auto"),
        harness.Case(QUARTER, zeros, "float16", CORRECTNESS, quarters, share, "auto"),
        harness.Case(FINITE, zeros, "float16", CORRECTNESS, finite, {"share": EXACT}, RELAXED),
    ]


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    found = {}
    if device == "cpu":
        why = "noise for 26 billion logits: a quarter of an hour"
        found[f"reference, {GUMBEL} and {RACE} in the tail"] = why
        if not tiles._NUMBA:
            found["tiled"] = f"numba is not installed; `{EAGER}` is what runs"
    for name in BACKENDS[device]:
        if name not in ("auto", *available_backends()):
            found[name] = "not among `available_backends()`"
    return found


def goals(device: str) -> list[harness.Goal]:
    """What is promised on this device; the record says whether it is kept, in its worst row."""
    if device == "cuda":
        what = "time of triton, in that of amax, 2^26 logits and more"
        return [harness.Goal(what, 1.15, _most_time("triton", "amax", _is_large), "at most")]
    at = f"at {LARGE}, float32"
    return [
        harness.Goal(f"tiled over {GUMBEL} {at}", 20.0, _least("tiled", GUMBEL, _is_promised)),
        harness.Goal(
            f"tiled over {MULTINOMIAL} {at}", 15.0, _least("tiled", MULTINOMIAL, _is_promised)
        ),
        harness.Goal(
            f"time of tiled, in that of {BOUND} {at}",
            1.2,
            _most_time("tiled", BOUND, _is_promised),
            "at most",
        ),
        harness.Goal(f"{EAGER} over {GUMBEL} {at}", 10.0, _least(EAGER, GUMBEL, _is_promised)),
    ]


def _is_promised(row: harness.Row) -> bool:
    return (row["op"], tuple(row["shape"]), row["dtype"]) == (ONE_DRAW, LARGE, "float32")


def _is_large(row: harness.Row) -> bool:
    return row["op"] == ONE_DRAW and math.prod(row["shape"]) >= 2**26


def _least(
    name: str, over: str, where: Callable[[harness.Row], bool]
) -> Callable[[list[harness.Row]], float | None]:
    """Smallest ratio of two contenders, over the rows that fit and have both."""

    def reached(rows: list[harness.Row]) -> float | None:
        found = []
        for row in rows:
            present = row["contenders"]
            if where(row) and {name, over} <= present.keys():
                found.append(_ratio(present[name]) / _ratio(present[over]))
        return min(found, default=None)

    return reached


def _most_time(
    name: str, over: str, where: Callable[[harness.Row], bool]
) -> Callable[[list[harness.Row]], float | None]:
    def reached(rows: list[harness.Row]) -> float | None:
        least = _least(name, over, where)(rows)
        return None if least is None else 1 / least

    return reached


def _ratio(contender: harness.Row) -> float:
    return contender["cuda" if "cuda" in contender else "cpu"]["ratio"]["median"]


# --- the ways to draw -----------------------------------------------------------------------------
# Of a matrix of logits, one class of each row; and of one row, many classes.

Way = Callable[[Tensor], Tensor]


def _ours(device: str) -> dict[str, Callable[..., Tensor]]:
    absent = missing(device)
    names = [name for name in BACKENDS[device] if name not in absent]
    found = {name: partial(gumbel_max_sample, backend=name) for name in names}
    if device == "cpu":
        found[EAGER] = _without_numba
    return found


def _without_numba(*arguments: Any) -> Tensor:
    there, tiles._NUMBA = tiles._NUMBA, False
    try:
        return gumbel_max_sample(*arguments, backend="tiled")
    finally:
        tiles._NUMBA = there


def _draws_of_each(device: str) -> dict[str, Way]:
    return _ours(device) | {
        GUMBEL: lambda rows: F.gumbel_softmax(rows, hard=True).argmax(-1),
        MULTINOMIAL: lambda rows: torch.multinomial(rows.softmax(-1), 1)[:, 0],
        CATEGORICAL: lambda rows: Categorical(logits=rows).sample(),
        RACE: lambda rows: (rows.softmax(-1) / torch.empty_like(rows).exponential_()).argmax(-1),
    }


def _draws_of_one(device: str, count: int) -> dict[str, Way]:
    ours = {name: way for name, way in _ours(device).items() if name != "reference"}
    found = {name: lambda row, way=way: way(row.squeeze(0), (count,)) for name, way in ours.items()}
    return found | {
        MULTINOMIAL: lambda row: torch.multinomial(row.softmax(-1), count, replacement=True)[0],
        CATEGORICAL: lambda row: Categorical(logits=row.squeeze(0)).sample((count,)),
    }


# --- the speed of a draw --------------------------------------------------------------------------


def one_draw(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """One class of each row, and the bounds that draw nothing."""
    logits = _normal(case, device)
    groups, expected = _groups(logits)
    found = {
        name: _lawful(partial(way, logits), groups, expected, DRAWS)
        for name, way in _draws_of_each(device).items()
    }
    largest = {"largest": logits.double().amax(-1)}
    found["amax"] = harness.Contender(lambda: [logits.amax(-1)], largest)
    found[BOUND] = harness.Contender(
        lambda: [logits.argmax(-1)],
        largest,
        checked=lambda: [logits.gather(-1, logits.argmax(-1, keepdim=True))[:, 0]],
    )
    return found


def many_draws(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Many classes of one row."""
    row = _normal(case, device)
    groups, expected = _groups(row)
    return {
        name: _lawful(lambda way=way: way(row).unsqueeze(-1), groups, expected, MANY)
        for name, way in _draws_of_one(device, MANY).items()
    }


def relaxed(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """The relaxed draw and its gradient."""
    logits = _normal(case, device).requires_grad_()
    upwards = torch.randn(case.shape, device=device)
    groups, law = _groups(logits.detach())
    ones = torch.ones(case.shape[0], dtype=torch.float64, device=device)
    expected = law | {"sum": ones, "gradient": ones[0]}

    def contender(way: Callable[[Tensor], Tensor]) -> harness.Contender:
        def run() -> list[Tensor]:
            y = way(logits)
            return [y, *torch.autograd.grad(y, logits, upwards)]

        def checked() -> list[Tensor]:
            y, gradient = (each.detach().double() for each in run())
            exact = y * (upwards - (y * upwards).sum(-1, keepdim=True))
            distance = (gradient - exact).norm() / exact.norm()
            by_group = _frequencies(y.argmax(-1).unsqueeze(0), groups)
            return [*by_group, y.sum(-1), 1 + distance]

        return harness.Contender(run, expected, lambda: way(logits), checked)

    return {GUMBEL: contender(F.gumbel_softmax), RELAXED: contender(gumbel_softmax)}


def _normal(case: harness.Case, device: str) -> Tensor:
    torch.manual_seed(0)  # of the peers' draws
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(case.shape, generator=generator, device=device)
    return logits.to(getattr(torch, case.dtype))


def _groups(logits: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """In which group each class of each row is, by its logit and by its place; their shares."""
    classes = logits.shape[-1]
    place = torch.arange(classes, device=logits.device) * GROUPS // classes
    size = torch.bucketize(logits.float(), logits.new_tensor(THRESHOLDS).float())
    groups = [size, place.expand_as(size)]
    probabilities = logits.double().softmax(-1)
    shares = [
        torch.stack([probabilities[group == i].sum() / len(logits) for i in range(GROUPS)])
        for group in groups
    ]
    return groups, dict(zip(("by size", "by place"), shares, strict=True))


def _lawful(
    draw: Callable[[], Tensor], groups: list[Tensor], expected: dict[str, Tensor], least: int
) -> harness.Contender:
    """Draws, some of each row or one, whose frequencies are checked when there are enough."""
    rows = len(groups[0])

    def checked() -> list[Tensor]:
        drawn, count = [], 0
        while count < least:
            drawn.append(draw().reshape(-1, rows))
            count += drawn[-1].numel()
        return _frequencies(torch.cat(drawn), groups)

    return harness.Contender(lambda: [draw()], expected, checked=checked)


def _frequencies(index: Tensor, groups: list[Tensor]) -> list[Tensor]:
    found = [group.gather(-1, index.T).flatten().bincount(minlength=GROUPS) for group in groups]
    return [counts.double() / index.numel() for counts in found]


# --- known laws -----------------------------------------------------------------------------------


def tails(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """How many draws fall in the tail."""
    torch.manual_seed(0)
    draws, classes = case.shape
    likely = 0 if case.op == LIKELY_FIRST else classes - 1
    row = torch.full((1, classes), -GAP, device=device)
    row[0, likely] = 0
    expected = torch.tensor(_expected_in_tail(case.shape), device=device).double()
    repeats = 100

    def contender(draw: Way) -> harness.Contender:
        def checked() -> list[Tensor]:
            return [torch.stack([(draw(row) != likely).sum() for _ in range(repeats)]).sum()]

        return harness.Contender(lambda: [draw(row)], {"draws": expected}, checked=checked)

    ways = _draws_of_one(device, draws // repeats)
    if device == "cuda":  # where a quarter of an hour is seconds
        each = _draws_of_each(device)
        for name in ("reference", GUMBEL, RACE):
            ways[name] = lambda row, way=each[name]: way(row.expand(draws // repeats, -1))
    return {name: contender(way) for name, way in ways.items()}


def _expected_in_tail(shape: tuple[int, ...]) -> float:
    draws, classes = shape
    tail = (classes - 1) * math.exp(-GAP)
    return draws * tail / (1 + tail)


def quarters(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """How many draws of equally likely classes are of the first quarter."""
    rows = _zeros(case, device)
    expected = {"share": torch.tensor(1 / GROUPS, device=device).double()}

    def contender(draw: Way) -> harness.Contender:
        def checked() -> list[Tensor]:
            drawn = torch.cat([draw(rows) for _ in range(DRAWS // len(rows))])
            return [(drawn < case.shape[-1] // GROUPS).double().mean()]

        return harness.Contender(lambda: [draw(rows)], expected, checked=checked)

    return {name: contender(draw) for name, draw in _draws_of_each(device).items()}


def finite(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """How many relaxed draws have no NaN."""
    rows = _zeros(case, device)
    expected = {"share": torch.ones((), dtype=torch.float64, device=device)}

    def contender(way: Callable[[Tensor], Tensor]) -> harness.Contender:
        def checked() -> list[Tensor]:
            each = [way(rows).isfinite().all(-1) for _ in range(RELAXED_DRAWS // len(rows))]
            return [torch.cat(each).double().mean()]

        return harness.Contender(lambda: [way(rows)], expected, checked=checked)

    return {GUMBEL: contender(F.gumbel_softmax), RELAXED: contender(gumbel_softmax)}


def _zeros(case: harness.Case, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.zeros(case.shape, dtype=getattr(torch, case.dtype), device=device)


BENCHMARK = harness.Benchmark(
    "gumbel_softmax",
    cases,
    quick,
    missing,
    ("numba", "triton"),
    goals,
    peers=PEERS,
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
