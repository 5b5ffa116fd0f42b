r"""Whether two sets of points come from one law: energy distance, MMD, a permutation test, k-NN.

.. math:: \operatorname{MMD}^2 = \mathbb E\, k(X, X') + \mathbb E\, k(Y, Y')
    - 2\, \mathbb E\, k(X, Y)

.. math:: D = 2\, \mathbb E \lVert X - Y \rVert - \mathbb E \lVert X - X' \rVert
    - \mathbb E \lVert Y - Y' \rVert

Source: Gretton et al. 2012 (MMD); Székely & Rizzo 2013 (energy distance); Sejdinovic et al. 2013
(one is twice the other); Kynkäänniemi et al. 2019 (precision and recall).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.energy_models._checks import require_count, require_points, require_positive
from cln_tutorial.energy_models.diagnostics import sum_dtype

# Pairs that are held at a time, 32 MiB of float64.
PAIRS = 2**22
MEDIAN_POINTS = 1000

Points = Float[Tensor, "_ *event"]
Kernel = Callable[[Tensor, Tensor], Tensor]


class PermutationTest(NamedTuple):
    """What a permutation test found: the statistic, its p-value, and its values by chance."""

    statistic: Tensor
    p_value: Tensor
    null: Tensor


class PrecisionRecall(NamedTuple):
    """Share of the fake points that look real, and of the real ones that the fake ones reach."""

    precision: Tensor
    recall: Tensor


def energy_distance(x: Points, y: Points, *, unbiased: bool = True) -> Float[Tensor, ""]:
    r"""Return the energy distance, which is 0 for equal laws only.

    .. math:: D = 2\, \mathbb E \lVert X - Y \rVert - \mathbb E \lVert X - X' \rVert
        - \mathbb E \lVert Y - Y' \rVert

    Without bias (U-statistic) pairs of a point with itself are left out: the mean is 0 for equal
    laws, so half of such values are negative. With bias (V-statistic) they count: never negative,
    0 for the same points in any order, but about :math:`\mathbb E \lVert X - X' \rVert
    (1/n + 1/m)` too large for equal laws. Take no root, as some do: of a negative number there is
    none. It is twice :func:`mmd` with the kernel "distance".

    Args:
        x: ``(n, *event)``, any floating dtype.
        y: ``(m, *event)``, same dtype. The distance is the Euclidean one of the flat event.
        unbiased: whether to leave out pairs of a point with itself; needs 2 points on each side.

    Returns:
        A number, summed in float64 in blocks, so that the memory stays at tens of MiB; dtype of
        ``x``, float32 for half types. Without a graph.

    Raises:
        TypeError, ValueError: for other dtypes, shapes that do not fit, too few points, or numbers
            that are not finite.

    Source:
        Székely & Rizzo 2013.

    Example:
        >>> x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [7.0]])
        >>> energy_distance(x, y).item(), energy_distance(x, y, unbiased=False).item()
        (6.0, 8.0)
        >>> energy_distance(x, x.flip(0)).item(), energy_distance(x, x, unbiased=False).item()
        (-2.0, 0.0)
    """
    x_flat, y_flat = _read(x, y, 2 if unbiased else 1)
    return (2 * _mmd(_half_distance, x_flat, y_flat, unbiased)).to(wide_dtype(x.dtype))


def mmd(
    x: Points,
    y: Points,
    kernel: str | Kernel = "rbf",
    *,
    bandwidth: float | int | None = None,
    unbiased: bool = True,
) -> Float[Tensor, ""]:
    r"""Return the *squared* maximum mean discrepancy.

    .. math:: \operatorname{MMD}^2 = \mathbb E\, k(X, X') + \mathbb E\, k(Y, Y')
        - 2\, \mathbb E\, k(X, Y)

    ============= =================================================================================
    kernel        :math:`k(x, y)`
    ============= =================================================================================
    "rbf"         :math:`\exp(-\lVert x - y \rVert^2 / 2 b^2)`, with bandwidth :math:`b`
    "distance"    :math:`-\frac12 \lVert x - y \rVert`: half of :func:`energy_distance`
    a function    symmetric, from ``(n, d)`` and ``(m, d)`` to ``(n, m)``
    ============= =================================================================================

    Args:
        x: ``(n, *event)``, any floating dtype.
        y: ``(m, *event)``, same dtype.
        kernel: see the table. A function sees flat events in float64, some rows at a time.
        bandwidth: of "rbf"; None is the median distance between points of both sets together
            (of 1,000 of them, evenly spaced).
        unbiased: as in :func:`energy_distance`.

    Returns:
        A number, summed in float64 in blocks; dtype of ``x``, float32 for half types. Without a
        graph. Unbiased it may be negative.

    Raises:
        TypeError, ValueError: as :func:`energy_distance`; for an unknown kernel, a bandwidth that
            is not above 0 or that the kernel does not have, or a median distance of 0.

    Source:
        Gretton et al. 2012, lemma 6.

    Example:
        >>> x, y = torch.zeros(2, 1), torch.ones(2, 1)
        >>> round(mmd(x, y, bandwidth=1.0).item(), 4)  # 2 - 2 exp(-1/2)
        0.7869
    """
    x_flat, y_flat = _read(x, y, 2 if unbiased else 1)
    function = _choose_kernel(kernel, bandwidth, x_flat, y_flat)
    return _mmd(function, x_flat, y_flat, unbiased).to(wide_dtype(x.dtype))


def permutation_test(
    x: Points,
    y: Points,
    statistic: str | Callable[[Tensor, Tensor], Tensor | float] = "energy",
    n_permutations: int = 999,
    *,
    generator: torch.Generator | None = None,
) -> PermutationTest:
    r"""Test whether two sets come from one law, by dealing their points out anew.

    .. math:: p = \frac{1 + \#\{b : D_b \ge D\}}{1 + B}

    If the laws are equal, the chance of :math:`p \le \alpha` is at most :math:`\alpha`, whatever
    the law and the sizes. The smallest p-value is :math:`1 / (1 + B)`.

    The points must be independent: of chains take the last states, not the steps. For "energy" and
    "mmd" all pairs are computed once, ``(n + m)**2`` numbers of float64 (32 MB for 2,000 points),
    and each permutation is a product with it.

    Args:
        x: ``(n, *event)``, any floating dtype.
        y: ``(m, *event)``, same dtype.
        statistic: "energy", "mmd" (both unbiased, "rbf" with the median), or a function of two
            sets of points that is large where they differ.
        n_permutations: :math:`B`, at least 1.
        generator: source of the permutations; None is PyTorch's global one.

    Returns:
        ``(statistic, p_value, null)``: two numbers, and ``(n_permutations,)``. The null
        distribution is worth a look beside the statistic. Dtype of ``x``, float32 for half types.

    Raises:
        TypeError, ValueError: as :func:`mmd`, and for an unknown statistic.

    Source:
        Phipson & Smyth 2010 for the 1 that is added.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> x = torch.randn(100, 2, generator=rng)
        >>> test = permutation_test(x, x + 1, n_permutations=199, generator=rng)
        >>> round(test.p_value.item(), 3)
        0.005
    """
    if not callable(statistic) and statistic not in ("energy", "mmd"):
        raise ValueError(f"`statistic` must be 'energy', 'mmd' or a function; got {statistic!r}.")
    require_count("n_permutations", n_permutations, 1)
    x_flat, y_flat = _read(x, y, 2)
    n, total = len(x), len(x) + len(y)
    device = None if generator is None else generator.device
    orders = [torch.arange(total, device=device)]
    for _ in range(n_permutations):
        orders.append(torch.randperm(total, generator=generator, device=device))
    orders = torch.stack(orders).to(x.device)
    if callable(statistic):
        points = torch.cat([x, y]).detach()
        found = [float(statistic(points[order[:n]], points[order[n:]])) for order in orders]
        values = torch.tensor(found, dtype=x_flat.dtype, device=x.device)
    elif statistic == "energy":
        values = 2 * _mmd_of_orders(_half_distance, x_flat, y_flat, orders)
    else:
        function = _choose_kernel("rbf", None, x_flat, y_flat)
        values = _mmd_of_orders(function, x_flat, y_flat, orders)
    # Points that occur twice make equal values, which rounding must not turn into smaller ones.
    slack = 1e-10 * values.abs().max()
    p_value = (values >= values[0] - slack).to(values.dtype).mean()
    wide = wide_dtype(x.dtype)
    return PermutationTest(values[0].to(wide), p_value.to(wide), values[1:].to(wide))


def knn_precision_recall(real: Points, fake: Points, k: int = 3) -> PrecisionRecall:
    r"""Ask how many fake points lie among the real ones, and the other way round.

    .. math:: \text{precision} = \frac1m \#\bigl\{j : \exists i: \lVert f_j - r_i \rVert \le
        \operatorname{NN}_k(r_i)\bigr\}, \qquad
        \text{recall} = \frac1n \#\bigl\{i : \exists j: \lVert r_i - f_j \rVert \le
        \operatorname{NN}_k(f_j)\bigr\}

    :math:`\operatorname{NN}_k` is the distance to the k-th nearest *other* point of the same set.
    A copy elsewhere in the set is another point, at distance 0. One lonely point has a wide ball,
    which may hold much of the other set. Both figures depend on the numbers of points: compare
    only equal ones, and give the figures of two sets of real points beside them.

    Args:
        real: ``(n, *event)``, any floating dtype, ``n > k``.
        fake: ``(m, *event)``, same dtype, ``m > k``.
        k: neighbours, at least 1.

    Returns:
        ``(precision, recall)``, two numbers; dtype of ``real``, float32 for half types.

    Raises:
        TypeError, ValueError: for other dtypes, shapes that do not fit, numbers that are not
            finite, or ``k`` that is not below the number of points of both.

    Source:
        Kynkäänniemi et al. 2019, section 2.

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> fake = torch.tensor([[0.0], [0.5], [1.0], [4.0]])
        >>> precision, recall = knn_precision_recall(real, fake, k=1)
        >>> precision.item(), recall.item()
        (0.75, 0.5)
    """
    require_count("k", k, 1)
    real_flat, fake_flat = _read(real, fake, 1, ("real", "fake"))
    for name, points in (("real", real), ("fake", fake)):
        if k >= len(points):
            raise ValueError(
                f"`k` must be below the number of points; got {k} for {len(points)} of `{name}`."
            )
    wide = wide_dtype(real.dtype)
    precision = _share_inside(fake_flat, real_flat, _radii(real_flat, k))
    recall = _share_inside(real_flat, fake_flat, _radii(fake_flat, k))
    return PrecisionRecall(precision.to(wide), recall.to(wide))


def _mmd(kernel: Kernel, x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    cross = sum(kernel(rows, y).sum() for rows in _row_blocks(x, len(y)))
    within = _mean_within(kernel, x, unbiased) + _mean_within(kernel, y, unbiased)
    return within - 2 * cross / (len(x) * len(y))


def _mean_within(kernel: Kernel, x: Tensor, unbiased: bool) -> Tensor:
    n, start, total = len(x), 0, x.new_zeros(())
    for rows in _row_blocks(x, n):
        # The kernel is symmetric: what lies right of the square block counts twice.
        block = kernel(rows, x[start:])
        total += block[:, : len(rows)].sum() + 2 * block[:, len(rows) :].sum()
        if unbiased:
            total -= block.diagonal().sum()
        start += len(rows)
    return total / (n * (n - 1) if unbiased else n * n)


def _mmd_of_orders(kernel: Kernel, x: Tensor, y: Tensor, orders: Tensor) -> Tensor:
    """Return the unbiased squared MMD for each order of all points, the first n being ``x``."""
    n, m = len(x), len(y)
    points = torch.cat([x, y])
    matrix = kernel(points, points)
    matrix.fill_diagonal_(0)
    rows = matrix.sum(1)
    values = []
    for part in orders[:, :n].split(256):
        chosen = matrix.new_zeros(len(part), n + m).scatter_(1, part, 1.0)
        within_x = (chosen @ matrix * chosen).sum(1)
        of_x = chosen @ rows
        cross = of_x - within_x
        within_y = rows.sum() - of_x - cross
        values.append(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * cross / (n * m))
    return torch.cat(values)


def _choose_kernel(
    kernel: str | Kernel, bandwidth: float | int | None, x: Tensor, y: Tensor
) -> Kernel:
    if not callable(kernel) and kernel not in ("rbf", "distance"):
        raise ValueError(f"`kernel` must be 'rbf', 'distance' or a function; got {kernel!r}.")
    if kernel != "rbf":
        if bandwidth is not None:
            raise ValueError(f"`bandwidth` is that of the kernel 'rbf' alone; got {bandwidth}.")
        return kernel if callable(kernel) else _half_distance
    if bandwidth is None:
        points = torch.cat([x, y])
        points = points[:: math.ceil(len(points) / MEDIAN_POINTS)]
        bandwidth = torch.nn.functional.pdist(points).median().item()
        if bandwidth == 0:
            raise ValueError("half of the points are copies, so give a `bandwidth` above 0.")
    require_positive("bandwidth", bandwidth)
    scale = -0.5 / bandwidth**2
    return lambda a, b: (_distances(a, b).square_() * scale).exp_()


def _half_distance(x: Tensor, y: Tensor) -> Tensor:
    return _distances(x, y) / -2


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # The fast way, by products, cancels where points lie far from the origin.
    centre = y.mean(0)
    return torch.cdist(x - centre, y - centre)


def _exact_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return distances that are 0 for copies, and the same from either side."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    # A point is its own nearest neighbour, at distance 0.
    rows = _row_blocks(points, len(points))
    return torch.cat([_exact_distances(r, points).kthvalue(k + 1).values for r in rows])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    rows = _row_blocks(points, len(centres))
    inside = [(_exact_distances(r, centres) <= radii).any(1) for r in rows]
    return torch.cat(inside).to(points.dtype).mean()


def _row_blocks(x: Tensor, n_columns: int) -> Iterator[Tensor]:
    return iter(x.split(max(1, PAIRS // n_columns)))


def _read(
    x: Tensor, y: Tensor, least: int, names: tuple[str, str] = ("x", "y")
) -> tuple[Tensor, Tensor]:
    """Refuse what does not fit together, and return flat events in the dtype of sums."""
    for name, points in zip(names, (x, y), strict=True):
        require_points(name, points)
        if len(points) < least:
            raise ValueError(f"`{name}` must have at least {least} points; got {len(points)}.")
    if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must agree in event, dtype and device; got "
            f"{tuple(x.shape)} {x.dtype} {x.device} and {tuple(y.shape)} {y.dtype} {y.device}."
        )
    for name, points in zip(names, (x, y), strict=True):
        if not bool(points.isfinite().all()):
            raise ValueError(f"`{name}` holds numbers that are not finite.")
    wide = sum_dtype(x)
    return x.detach().flatten(1).to(wide), y.detach().flatten(1).to(wide)
