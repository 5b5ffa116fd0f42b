"""Sparse probabilities, soft ranks and soft top-k, beside the libraries that have them.

`numba` and `reference` are the backends of `sparsemax`, `entmax15`, `soft_rank`, `soft_sort` and
`soft_topk`; "auto" is `numba` where numba is installed. Each case is a forward and a backward pass.
Of entmax there are two: the full sort, its default, and `k=100`, which sorts the hundred largest
and is exact where the support is no larger.

    make bench NAME=smoothing

Peers are measured where they import, and named as missing where not. An environment with all:

    python -m venv peers
    peers/bin/pip install . numba entmax
    peers/bin/pip install --no-build-isolation torchsort   # compiles; no nvcc on the path
    peers/bin/python -m benchmarks.smoothing

The expected results come from bisection in float64, from scikit-learn's isotonic regression, and
from polynomials that are multiplied out. Limits of the timed rows are wide enough for a peer whose
float32 is less exact; the record holds what each has reached. Rows of the mode "correctness" are
where the peers fail, with limits as tight as ours.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from benchmarks import harness
from cln_tutorial.smoothing import (
    entmax15,
    fenchel_young_loss,
    soft_rank,
    soft_sort,
    soft_topk,
    sparsemax,
)
from cln_tutorial.smoothing._checks import HAS_NUMBA

NORMAL, EQUAL = "normal logits", "nearly equal logits"
SPREAD = {NORMAL: 1.0, EQUAL: 1e-3}  # standard deviations
SPARSEMAX, ENTMAX15 = "sparsemax", "entmax 1.5"
RANK, SORT, TOPK = "soft rank", "soft sort", "soft top-k of 50, esp"
BOTH, CORRECTNESS = "forward+backward", "correctness"
ENTMAX, ENTMAX_100, TORCHSORT = "entmax", "entmax, k=100", "torchsort"
PEERS = (ENTMAX, ENTMAX_100, TORCHSORT)
BOUND = "softmax"
OURS = ("numba", "reference")
ROWS = [(4096, 128), (1024, 1000), (64, 32_000)]
LISTS = [(4096, 64), (128, 1000), (1, 100_000), (1, 1_000_000)]
TOPK_SHAPE, K = (128, 1000), 50
FEW = 1000  # entries of a list, up to which more is promised

ALL_MASKED, MASKED_LOSS, HESSIAN, VMAP, BFLOAT16 = (
    "entmax 1.5 beside a row of -inf",
    "entmax 1.5 loss with a logit of -inf",
    "second derivative of entmax 1.5 with a probability of zero",
    "vmap of entmax 1.5",
    "sums of entmax 1.5 in bfloat16",
)
STRENGTHS = (1e-2, 1e-4, 1e-6)
SORTED = "soft sort of 1,000 normals at strength {}"
RANKED = "soft rank of a million normals"
RANK_HESSIAN, SORT_HESSIAN, MASKED_RANK = (
    "second derivative of the soft rank",
    "second derivative of the soft sort",
    "soft rank beside an entry of -inf",
)
SORT_ERROR, RANK_ERROR = 2e-6, 0.1
HALF_ULP = 2.0**-8  # of a bfloat16: a sum of numbers rounded once is right to it
ROUNDINGS = 1e-5  # of a float32 result of a few numbers near 1
inf = math.inf


def cases(device: str) -> list[harness.Case]:
    return [*_speeds(ROWS, LISTS, TOPK_SHAPE), *_verdicts(1_000_000)]


def quick(device: str) -> list[harness.Case]:
    return [*_speeds([(8, 200)], [(8, 60)], (3, 80)), *_verdicts(5000)]


def _speeds(
    rows: list[tuple[int, int]], lists: list[tuple[int, int]], topk: tuple[int, int]
) -> list[harness.Case]:
    # entmax works in float32 from cumulated sums: of rows of nearly equal logits, 1e-6 is percents
    # of a probability of 1 / 32,000.
    limits = {"y": 0.1, "gradient": 0.1}
    found = [
        harness.Case(f"{op}, {kind}", shape, "float32", BOTH, sparse, limits, _over(ENTMAX), BOUND)
        for op in (SPARSEMAX, ENTMAX15)
        for kind in (NORMAL, EQUAL)
        for shape in rows
    ]
    # A peer's float32 may part a block at another place, where single entries of the gradient are
    # then others: its distance to the right one counts, in the norm of that.
    limits = {"y": 0.01, "1 + distance": 0.01}
    found += [
        harness.Case(op, shape, "float32", BOTH, sorting, limits, _over(TORCHSORT), "sort")
        for op in (RANK, SORT)
        for shape in lists
    ]
    limits = {"y": 1e-4, "gradient": 1e-4}
    return [*found, harness.Case(TOPK, topk, "float32", BOTH, topk_case, limits, "reference")]


def _verdicts(many: int) -> list[harness.Case]:
    about = {"mode": CORRECTNESS, "baseline": "reference"}
    small = about | {"dtype": "float32", "contenders": sparse_verdicts, "limits": {"y": ROUNDINGS}}
    half = about | {"contenders": sparse_verdicts, "limits": {"sum": HALF_ULP}}
    found = [
        harness.Case(op, shape, **small)
        for op, shape in [(ALL_MASKED, (2, 3)), (MASKED_LOSS, (1, 4)), (HESSIAN, (3,))]
    ]
    found += [
        harness.Case(VMAP, (5, 4), **small),
        harness.Case(BFLOAT16, (8, 10_000), "bfloat16", **half),
    ]
    small |= {"contenders": sorting_verdicts}
    error = small | {"limits": {"1 + error": SORT_ERROR}}
    found += [harness.Case(SORTED.format(s), (1, 1000), **error) for s in STRENGTHS]
    ranks = small | {"limits": {"1 + error": RANK_ERROR}}
    return [
        *found,
        harness.Case(RANKED, (1, many), **ranks),
        harness.Case(RANK_HESSIAN, (1, 5), **small),
        harness.Case(SORT_HESSIAN, (1, 5), **small),
        harness.Case(MASKED_RANK, (1, 4), **small),
    ]


def _over(peer: str) -> str:
    return "reference" if peer in missing("cpu") else peer


@functools.cache
def missing(device: str) -> dict[str, str]:
    """What cannot be measured here, with the reason."""
    found = {} if HAS_NUMBA else {"numba": "numba is not installed"}
    for name, peer in [("entmax", ENTMAX), ("torchsort", TORCHSORT)]:
        try:
            importlib.import_module(name)
        except Exception as error:  # it may be there, and not fit the versions of the rest
            lines = str(error).splitlines() or [""]
            found[peer] = f"{type(error).__name__}: {lines[0]}"
    if ENTMAX in found:
        found[ENTMAX_100] = found[ENTMAX]
    return found


def _ours() -> list[str]:
    return [name for name in OURS if name not in missing("cpu")]


# --- the goals ------------------------------------------------------------------------------------


def goals(device: str) -> list[harness.Goal]:
    """What is promised; the record says whether it is kept, in its worst row."""
    normal = [(SPARSEMAX, 8.0), (ENTMAX15, 4.0)]
    equal = [(SPARSEMAX, 4.0), (ENTMAX15, 2.5)]
    listed = [
        harness.Goal(f"{op}, {kind}: numba over {peer}", wanted, _least(peer, f"{op}, {kind}"))
        for kind, peer, wishes in [
            (NORMAL, ENTMAX, normal),
            (EQUAL, ENTMAX, equal),
            (NORMAL, ENTMAX_100, [(SPARSEMAX, 3.0), (ENTMAX15, 3.0)]),
        ]
        for op, wanted in wishes
    ]
    rank = f"{RANK}: numba over {TORCHSORT}"
    few, many = (lambda n: n <= FEW), (lambda n: n > FEW)
    return [
        *listed,
        harness.Goal(f"{rank}, up to {FEW:,}", 2.5, _least(TORCHSORT, RANK, few)),
        harness.Goal(f"{rank}, above", 1.5, _least(TORCHSORT, RANK, many)),
        *(
            harness.Goal(f"{op}: largest error of numba", limit, _error(op), "at most")
            for op, limit in [
                *((SORTED.format(s), SORT_ERROR) for s in STRENGTHS),
                (RANKED, RANK_ERROR),
            ]
        ),
    ]


def _least(
    peer: str, op: str, fits: Callable[[int], bool] = lambda n: True
) -> Callable[[list[harness.Row]], float | None]:
    """Smallest ratio of numba to a peer, over the rows of an operation, both allocators."""

    def reached(rows: list[harness.Row]) -> float | None:
        found = []
        for row in rows:
            present = row["contenders"]
            if row["op"] == op and fits(row["shape"][-1]) and {"numba", peer} <= present.keys():
                numba, other = (present[name]["cpu"]["ratio"]["median"] for name in ("numba", peer))
                found.append(numba / other)
        return min(found, default=None)

    return reached


def _error(op: str) -> Callable[[list[harness.Row]], float | None]:
    def reached(rows: list[harness.Row]) -> float | None:
        found = [
            row["contenders"]["numba"]["gate"]["error"]
            for row in rows
            if row["op"] == op and "numba" in row["contenders"]
        ]
        return max(found, default=None)

    return reached


# --- sparse probabilities -------------------------------------------------------------------------

Function = Callable[[Tensor], Tensor]


def _sparse_functions(op: str) -> dict[str, Function]:
    ours = sparsemax if op.startswith(SPARSEMAX) else entmax15
    found: dict[str, Function] = {name: partial(ours, backend=name) for name in _ours()}
    if ENTMAX not in missing("cpu"):
        peer = importlib.import_module("entmax")
        theirs = peer.sparsemax if op.startswith(SPARSEMAX) else peer.entmax15
        found |= {ENTMAX: partial(theirs, dim=-1), ENTMAX_100: partial(theirs, dim=-1, k=100)}
    return found


def sparse(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """The probabilities of rows and their gradient."""
    op, _, kind = case.op.partition(", ")
    x, upwards = _normals(case, SPREAD[kind])
    y, gradient = _bisected(x.detach().double(), upwards.double(), 2.0 if op == SPARSEMAX else 1.5)
    expected = {"y": y, "gradient": gradient}
    functions = _sparse_functions(op)
    found = {name: _both(each, x, upwards, expected) for name, each in functions.items()}
    if case.shape[-1] < 100:
        found.pop(ENTMAX_100, None)
    p = x.detach().double().softmax(-1)
    softmax = {"y": p, "gradient": p * (upwards - (p * upwards).sum(-1, keepdim=True))}
    return found | {BOUND: _both(partial(torch.softmax, dim=-1), x, upwards, softmax)}


def _normals(case: harness.Case, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, upwards = torch.randn(2, *case.shape, generator=generator)
    return (spread * x).requires_grad_(), upwards


def _both(
    function: Function, x: Tensor, upwards: Tensor, expected: dict[str, Tensor]
) -> harness.Contender:
    def run() -> list[Tensor]:
        y = function(x)
        return [y, *torch.autograd.grad(y, x, upwards)]

    return harness.Contender(run, expected, lambda: function(x))


def _bisected(x: Tensor, upwards: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Entmax of float64 rows and its gradient: 70 halvings of the interval of the threshold."""
    scaled = (alpha - 1) * x
    low = scaled.amax(-1, keepdim=True) - 1
    high = low + 1
    for _ in range(70):
        middle = (low + high) / 2
        over = (scaled - middle).clamp_min(0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    y = (scaled - (low + high) / 2).clamp_min(0).pow(1 / (alpha - 1))
    slope = torch.where(y > 0, y.pow(2 - alpha), 0.0)
    mean = (slope * upwards).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
    return y, slope * (upwards - mean)


def sparse_verdicts(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Where entmax fails: each result is known in closed form, or is a sum of 1."""
    one = torch.ones((), dtype=torch.float64)
    functions = _sparse_functions(ENTMAX15)
    functions.pop(ENTMAX_100, None)
    run: Callable[[Function], Tensor]
    if case.op == ALL_MASKED:
        # A lone logit that leads by more than 2 has all of the probability.
        x = torch.tensor([[-inf, -inf, -inf], [3.0, 0.0, 0.0]])
        expected, run = torch.tensor([1.0, 0.0, 0.0]).double(), lambda f: f(x)[1]
    elif case.op == MASKED_LOSS:
        return _masked_losses()
    elif case.op == HESSIAN:
        # Two logits share: p = (1/2 + d sqrt(2 - d^2) / 2, ...) with d half of their difference, so
        # that p'' = d (d^2 - 3) (2 - d^2)^(-3/2) by d.
        d = 0.25
        expected = torch.tensor(d * (d * d - 3) * (2 - d * d) ** -1.5 / 4).double()

        def run(f: Function) -> Tensor:
            x = torch.tensor([0.5, 0.0, -9.0]).requires_grad_()
            (first,) = torch.autograd.grad(f(x)[0], x, create_graph=True)
            return torch.autograd.grad(first[0], x)[0][0]

    elif case.op == VMAP:
        x = torch.eye(5, 4) * 3
        expected = torch.eye(5, 4).double()
        expected[4] = 0.25

        def run(f: Function) -> Tensor:
            return torch.vmap(f)(x)

    else:
        x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        ones = one.expand(case.shape[0])
        return {
            name: harness.Contender(lambda f=f: [f(x).double().sum(-1)], {"sum": ones})
            for name, f in functions.items()
        }
    return {
        name: harness.Contender(lambda f=f: [run(f)], {"y": expected})
        for name, f in functions.items()
    }


def _masked_losses() -> dict[str, harness.Contender]:
    x, target = torch.tensor([[0.0, 0.0, 0.0, -inf]]), torch.tensor([0])
    # Tsallis entropy of 1.5 of three equal probabilities: (1 - 3 (1/3)^1.5) / (1.5 * 0.5). The loss
    # is it + <p, x> - x_0, and all x are 0.
    expected = {"y": torch.tensor((1 - 3**-0.5) / 0.75).double()}
    found = {"reference": partial(fenchel_young_loss, kind="entmax15")}
    if ENTMAX not in missing("cpu"):
        found[ENTMAX] = importlib.import_module("entmax").entmax15_loss
    return {
        name: harness.Contender(lambda f=f: [f(x, target).squeeze()], expected)
        for name, f in found.items()
    }


# --- soft sorting ---------------------------------------------------------------------------------


def _sorting_functions(op: str) -> dict[str, Callable[[Tensor, float], Tensor]]:
    ours = soft_rank if op == RANK else soft_sort
    found: dict[str, Callable[[Tensor, float], Tensor]] = {
        name: partial(ours, backend=name) for name in _ours()
    }
    if TORCHSORT not in missing("cpu"):
        peer = importlib.import_module("torchsort")
        theirs = peer.soft_rank if op == RANK else peer.soft_sort
        found[TORCHSORT] = lambda x, strength: theirs(x, regularization_strength=strength)
    return found


def sorting(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Ranks or sorted values at strength 1, and their gradient."""
    x, upwards = _normals(case)
    both = [_projected(row, case.op, 1.0) for row in x.detach().double()]
    y = torch.stack([y for y, _ in both])
    gradient = torch.stack([back(up) for (_, back), up in zip(both, upwards.double(), strict=True)])
    plain, places = x.detach().double().sort(-1)
    scattered = torch.empty_like(plain).scatter_(-1, places, upwards.double())
    one = torch.ones((), dtype=torch.float64)

    def contender(function: Function, y: Tensor, gradient: Tensor) -> harness.Contender:
        both = _both(function, x, upwards, {"y": y, "1 + distance": one})

        def checked() -> list[Tensor]:
            values, found = both.run()
            distance = _sums_of_ties(x, found.double() - gradient).norm()
            return [values, 1 + distance / _sums_of_ties(x, gradient).norm()]

        return harness.Contender(both.run, both.expected, both.forward, checked)

    found = {
        name: contender(lambda x, each=each: each(x, 1.0), y, gradient)
        for name, each in _sorting_functions(case.op).items()
    }
    return found | {"sort": contender(lambda x: x.sort(-1).values, plain, scattered)}


def _sums_of_ties(x: Tensor, gradient: Tensor) -> Tensor:
    """Which of equal entries is sorted first is free, and with it which has which gradient."""
    found = []
    for row, values in zip(x.detach(), gradient, strict=True):
        place = row.unique(return_inverse=True)[1]
        found.append(torch.zeros_like(values).index_add_(0, place, values))
    return torch.stack(found)


def _projected(x: Tensor, op: str, strength: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Soft ranks or sorted values of one float64 row, and its gradient; by scikit-learn.

    The projection of z on the permutahedron of w is z minus the isotonic regression of the sorted z
    minus the sorted w. Ascending ranks are those of w = 1...n, sorted values have z = (1...n) / e
    and w = x.
    """
    n = len(x)
    ranks = torch.arange(n, 0, -1, dtype=torch.float64)
    values, places = x.sort(descending=True)
    z, w = (values / strength, ranks) if op == RANK else (ranks / strength, values)
    pooled = torch.tensor(isotonic_regression((z - w).numpy(), increasing=False).copy())
    new = torch.ones(n, dtype=torch.bool)
    new[1:] = pooled[1:] != pooled[:-1]
    block = new.cumsum(0) - 1
    sizes = block.bincount().double()

    def means(values: Tensor) -> Tensor:
        sums = torch.zeros_like(sizes).index_add_(0, block, values)
        return (sums / sizes)[block]

    if op == RANK:
        found = torch.empty_like(x).scatter_(0, places, z - pooled)

        def back(upwards: Tensor) -> Tensor:
            sorted_up = upwards[places]
            centred = (sorted_up - means(sorted_up)) / strength
            return torch.empty_like(x).scatter_(0, places, centred)

        return found, back
    # Not z minus the regression, which loses the digits of x at a small strength, in float64 too.
    found = means(values) + (ranks - means(ranks)) / strength
    return found.flip(0), lambda up: torch.empty_like(x).scatter_(0, places, means(up.flip(0)))


def sorting_verdicts(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """Where torchsort fails."""
    if case.op in (RANK_HESSIAN, SORT_HESSIAN):
        return _hessians(RANK if case.op == RANK_HESSIAN else SORT)
    if case.op == MASKED_RANK:
        x = torch.tensor([[0.0, -inf, 2.0, 1.0]])
        expected = {"y": torch.tensor([[2.0, 1.0, 4.0, 3.0]]).double()}
        return {
            name: harness.Contender(lambda f=f: [f(x, 0.1)], expected)
            for name, f in _sorting_functions(RANK).items()
        }
    op = RANK if case.op == RANKED else SORT
    strength = 1.0 if op == RANK else float(case.op.rpartition(" ")[2])
    x = _normals(case)[0].detach()
    exact, _ = _projected(x[0].double(), op, strength)
    expected = {"1 + error": torch.ones((), dtype=torch.float64)}

    def contender(function: Callable[[Tensor, float], Tensor]) -> harness.Contender:
        def checked() -> list[Tensor]:
            return [1 + (function(x, strength)[0].double() - exact).abs().amax()]

        return harness.Contender(lambda: [function(x, strength)], expected, checked=checked)

    return {name: contender(each) for name, each in _sorting_functions(op).items()}


def _hessians(op: str) -> dict[str, harness.Contender]:
    """Of the sum of the cubes: both are linear in pieces, so it is 6 J' diag(y) J."""
    x, strength = torch.tensor([[0.3, 1.1, 0.2, 2.0, 1.7]]), 0.5 if op == RANK else 2.0
    y, back = _projected(x[0].double(), op, strength)
    jacobian = torch.stack([back(row) for row in torch.eye(5, dtype=torch.float64)])
    expected = {"y": 6 * jacobian.T @ (y.unsqueeze(-1) * jacobian)}

    def contender(function: Callable[[Tensor, float], Tensor]) -> harness.Contender:
        def cubes(x: Tensor) -> Tensor:
            return function(x, strength).pow(3).sum()

        def run() -> list[Tensor]:
            found: Any = torch.autograd.functional.hessian(cubes, x)
            return [found.reshape(5, 5)]

        return harness.Contender(run, expected)

    return {name: contender(each) for name, each in _sorting_functions(op).items()}


# --- soft top-k -----------------------------------------------------------------------------------


def topk_case(case: harness.Case, device: str) -> dict[str, harness.Contender]:
    """The weights of the best 50 and their gradient, from elementary symmetric polynomials."""
    x, upwards = _normals(case)
    wide = x.detach().double().requires_grad_()
    factors = wide.exp()
    sums = torch.zeros(case.shape[0], K + 1, dtype=torch.float64)
    sums[:, 0] = 1
    for i in range(case.shape[1]):
        more = torch.nn.functional.pad(sums[:, :-1], (1, 0))
        sums = sums + more * factors[:, i : i + 1]
    (y,) = torch.autograd.grad(sums[:, K].log().sum(), wide, create_graph=True)
    (gradient,) = torch.autograd.grad(y, wide, upwards.double())
    expected = {"y": y.detach(), "gradient": gradient}
    return {
        name: _both(
            lambda x, name=name: soft_topk(x, K, method="esp", backend=name), x, upwards, expected
        )
        for name in _ours()
    }


BENCHMARK = harness.Benchmark(
    "smoothing",
    cases,
    quick,
    missing,
    ("numba", "numpy", "entmax", "torchsort"),
    goals,
    peers=PEERS,
    pace=harness.Pace(rounds=15),
)

if __name__ == "__main__":
    harness.main(BENCHMARK)
