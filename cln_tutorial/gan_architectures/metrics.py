r"""How far apart are two sets of features: distances with their errors, and coverage of a law.

Features are rows of a tensor, ``(n, d)``, and come from wherever you like. All figures depend on
them and on the numbers of rows: print both beside the figure. Everything is computed in float64
and returned without a graph.

Source: Heusel et al. 2017 (FID); Bińkowski et al. 2018 (KID); Kynkäänniemi et al. 2019 (precision,
recall); Naeem et al. 2020 (density, coverage).
"""

import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cln_tutorial._dtypes import require_floating
from cln_tutorial.gan_architectures.batches import require_count

# Pairs that are held at a time, 32 MiB of float64.
PAIRS = 2**22

Features = Float[Tensor, "_ dim"]


class KernelDistance(NamedTuple):
    """A squared kernel distance, its standard error and interval, and the numbers of rows."""

    value: float
    stderr: float
    low: float
    high: float
    n: tuple[int, int]


class PrecisionRecall(NamedTuple):
    """Share of the fake rows that look real, and of the real rows that the fake ones reach."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Mean number of real balls around a fake row over k, and share of balls with a fake row."""

    density: float
    coverage: float


class ModeCoverage(NamedTuple):
    """How many modes have enough of the samples, and the share of each."""

    covered: int
    shares: Float[Tensor, " modes"]


def frechet_distance(fx: Features, fy: Features) -> float:
    r"""Return the Fréchet distance between two Gaussians with the moments of the features.

    .. math:: \lVert\mu_x-\mu_y\rVert^2 + \operatorname{tr}\Sigma_x + \operatorname{tr}\Sigma_y
        - 2\,\lVert L_x L_y^\top \rVert_*

    The rows of :math:`L` are the centred features over :math:`\sqrt{n-1}`, so :math:`\Sigma =
    L^\top L`, and the nuclear norm (the sum of the singular values) is the trace of
    :math:`(\Sigma_x\Sigma_y)^{1/2}`. No root of a matrix is taken: the result is real at any rank,
    also for fewer rows than columns. It is biased upwards by about :func:`frechet_bias`.

    Args:
        fx: ``(n, d)``, any floating dtype, at least 2 rows.
        fy: ``(m, d)``, likewise; another number of rows is fine.

    Returns:
        The distance, squared as usual, in squared units of the features; never negative.

    Raises:
        TypeError, ValueError: for other dtypes, shapes that do not fit, or numbers that are not
            finite.
        FloatingPointError: if their squares are too large for float64.

    Source:
        Dowson & Landau 1982; Heusel et al. 2017 (arXiv 1706.08500), equation 6.

    Example:
        >>> from cln_tutorial.gan_architectures.metrics import frechet_distance
        >>> x = torch.tensor([[0.0], [2.0]])  # mean 1, standard deviation sqrt(2)
        >>> round(frechet_distance(x, 2 * x), 6)  # (1 - 2)**2 + (sqrt(2) - sqrt(8))**2
        3.0
    """
    fx, fy = _read(fx, fy, 2)
    mean_x, mean_y = fx.mean(0), fy.mean(0)
    root_x, root_y = (fx - mean_x) / math.sqrt(len(fx) - 1), (fy - mean_y) / math.sqrt(len(fy) - 1)
    if len(root_x) > root_x.shape[1]:  # the triangle of QR has the same covariance in d rows
        root_x = torch.linalg.qr(root_x, mode="r").R
    if len(root_y) > root_y.shape[1]:
        root_y = torch.linalg.qr(root_y, mode="r").R
    apart = (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum()
    _require_finite(apart.item())
    overlap = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return max((apart - 2 * overlap).item(), 0.0)


def frechet_bias(eigs: Float[Tensor, " dim"], n: int) -> float:
    r"""Return how large the Fréchet distance of two samples of one Gaussian is on average.

    .. math:: \mathbb E\,\mathrm{FID} \approx \frac1n\Bigl[2\sum_i\lambda_i
        + \sum_{ij}\frac{\lambda_i\lambda_j(1+\delta_{ij})}{\lambda_i+\lambda_j}\Bigr]

    The two terms are those of the means and of the covariances; what is left out falls as
    :math:`1/n^2`. For the identity in d dimensions it is :math:`(2d + d(d+1)/2)/n`. This is why
    figures of different sample sizes cannot be compared.

    Args:
        eigs: eigenvalues of the covariance, ``(d,)``, at least 0.
        n: rows of each of the two samples, at least 2.

    Returns:
        The bias, in the units of the eigenvalues.

    Raises:
        TypeError, ValueError: for eigenvalues that are negative or not finite, or ``n`` below 2.

    Source:
        Own: second-order expansion of the Bures distance around equal covariances.

    Example:
        >>> from cln_tutorial.gan_architectures.metrics import frechet_bias
        >>> frechet_bias(torch.ones(16), n=100)
        1.68
    """
    require_floating("eigs", eigs)
    if eigs.ndim != 1 or not bool(((eigs >= 0) & (eigs < math.inf)).all()):
        raise ValueError(
            f"`eigs` must be a vector of finite numbers of at least 0; got shape "
            f"{tuple(eigs.shape)}, {eigs.tolist()}."
        )
    require_count("n", n, 2)
    eigs = _wide(eigs)
    eigs = eigs[eigs > 0]  # a direction without spread adds nothing
    pairs = eigs[:, None] * eigs / (eigs[:, None] + eigs)
    return (2 * eigs.sum() + pairs.sum() + pairs.trace()).item() / n


def kernel_distance(
    fx: Features,
    fy: Features,
    *,
    degree: int = 3,
    gamma: float | int | None = None,
    block_size: int | None = None,
    confidence: float = 0.95,
) -> KernelDistance:
    r"""Return the squared maximum mean discrepancy of a polynomial kernel (KID), with its interval.

    .. math:: \frac{\sum_{i\ne j} k(x_i, x_j)}{n(n-1)} + \frac{\sum_{i\ne j} k(y_i, y_j)}{m(m-1)}
        - \frac{2\sum_{ij} k(x_i, y_j)}{nm}, \qquad k(x, y) = (\gamma\, x\cdot y + 1)^p

    Unbiased at any number of rows, hence negative for about half of all pairs of equal laws. By
    default all pairs count, and the variance is that of the first order of a U-statistic,
    :math:`4\operatorname{var}(a_i)/n + 4\operatorname{var}(b_j)/m`, where :math:`a_i` is the mean
    of :math:`k(x_i, x_j)` over the other rows less that of :math:`k(x_i, y_j)`, and :math:`b`
    likewise. For equal laws the statistic is degenerate and this is twice the true variance: the
    interval covers more than it says. With ``block_size`` the value is the mean over disjoint
    blocks, and the interval Student's: wider, and with less to assume. The usual recipe, many
    overlapping subsets as if they were independent, covers the truth in two of three cases.

    The kernel is not free of scale: divide the features by their root mean square on real data
    (:class:`.FeatureClassifier` does), or no interval is short.

    Args:
        fx: ``(n, d)``, any floating dtype, at least 2 independent rows.
        fy: ``(m, d)``, likewise; another number of rows is fine.
        degree: :math:`p`, at least 1.
        gamma: :math:`\gamma`, above 0; None is ``1 / d``.
        block_size: rows of a block, at least 2, of which the shorter set must have 2. Rows are
            taken as they come, so they must be in random order. What is left over is dealt out to
            the blocks, which may so get larger.
        confidence: of the interval, between 0 and 1.

    Returns:
        ``(value, stderr, low, high, n)``, where ``n`` is the numbers of rows of both. Beside the
        features in float64, memory stays at tens of MiB whatever they are.

    Raises:
        TypeError, ValueError: for other dtypes, shapes that do not fit, numbers that are not
            finite, or an option outside its range.
        FloatingPointError: if kernels or their variance are too large for float64.

    Source:
        Bińkowski et al. 2018 (arXiv 1801.01401), section 4; Hoeffding 1948 for the variance.

    Example:
        >>> from cln_tutorial.gan_architectures.metrics import kernel_distance
        >>> x, y = torch.tensor([[0.0], [0.0], [0.0]]), torch.tensor([[1.0], [1.0]])
        >>> kernel_distance(x, y).value  # (0 + 1)**3 + (1 + 1)**3 - 2 * (0 + 1)**3
        7.0
    """
    fx, fy = _read(fx, fy, 2)
    require_count("degree", degree, 1)
    gamma = 1 / fx.shape[1] if gamma is None else gamma
    if not 0 < gamma < math.inf:
        raise ValueError(f"`gamma` must be finite and above 0; got {gamma}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1; got {confidence}.")
    kernel = _Polynomial(degree, gamma)
    if block_size is None:
        value, of_x, of_y = _u_statistic(kernel, fx, fy)
        stderr = 2 * math.sqrt(of_x.var().item() / len(fx) + of_y.var().item() / len(fy))
        quantile = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    else:
        from scipy.stats import t as student

        blocks = _count_blocks(block_size, fx, fy)
        pairs = zip(fx.tensor_split(blocks), fy.tensor_split(blocks), strict=True)
        values = [_u_statistic(kernel, *pair)[0] for pair in pairs]
        value = statistics.fmean(values)
        stderr = statistics.stdev(values) / math.sqrt(blocks)
        quantile = float(student.ppf((1 + confidence) / 2, blocks - 1))
    _require_finite(stderr)
    half = quantile * stderr
    return KernelDistance(value, stderr, value - half, value + half, (len(fx), len(fy)))


def precision_recall(real: Features, fake: Features, k: int = 5) -> PrecisionRecall:
    r"""Ask how many fake rows lie among the real ones, and the other way round.

    .. math:: \text{precision} = \frac1m \#\bigl\{j : \exists i: \lVert f_j - r_i \rVert \le
        \operatorname{NN}_k(r_i)\bigr\}, \qquad
        \text{recall} = \frac1n \#\bigl\{i : \exists j: \lVert r_i - f_j \rVert \le
        \operatorname{NN}_k(f_j)\bigr\}

    :math:`\operatorname{NN}_k` is the distance to the k-th nearest *other* row of the same set; a
    copy is another row, at distance 0. One lonely row has a wide ball that may hold much of the
    other set, which :func:`density_coverage` minds less.

    Squared distances come from products, whose rounding errors a ball must cover: none reaches less
    far than about :math:`\sqrt{8d\,2^{-52}}` of the distance to the mean of all rows, 3e-7 for 64
    columns. Clusters a million of their own deviations apart are the limit.

    Args:
        real: ``(n, d)``, any floating dtype, ``n > k``.
        fake: ``(m, d)``, ``m > k``.
        k: neighbours, at least 1. The paper takes 3.

    Returns:
        ``(precision, recall)``, each between 0 and 1.

    Raises:
        TypeError, ValueError: for other dtypes, shapes that do not fit, numbers that are not
            finite, or ``k`` that is not below the number of rows of both.

    Source:
        Kynkäänniemi et al. 2019 (arXiv 1904.06991), section 2.

    Example:
        >>> from cln_tutorial.gan_architectures.metrics import precision_recall
        >>> real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> fake = torch.tensor([[0.0], [0.5], [1.0], [4.0]])
        >>> precision_recall(real, fake, k=1)
        PrecisionRecall(precision=0.75, recall=0.5)
    """
    real, fake = _read_neighbours(real, fake, k)
    precision = _share([inside.any(1) for inside in _inside(fake, real, k)])
    recall = _share([inside.any(1) for inside in _inside(real, fake, k)])
    return PrecisionRecall(precision, recall)


def density_coverage(real: Features, fake: Features, k: int = 5) -> DensityCoverage:
    r"""Count the balls around real rows in which fake rows lie, and those in which none does.

    .. math:: \text{density} = \frac1{km} \sum_{ij} 1\bigl(\lVert f_j - r_i \rVert \le
        \operatorname{NN}_k(r_i)\bigr), \qquad
        \text{coverage} = \frac1n \#\bigl\{i : \exists j: \lVert f_j - r_i \rVert \le
        \operatorname{NN}_k(r_i)\bigr\}

    For equal laws and large samples of one size density is 1 on average and coverage
    :math:`1 - 2^{-k}`, whatever the law: neither 1 nor 0.969 is a score to beat. Clusters must not
    lie too far apart, as in :func:`precision_recall`.

    Args:
        real: ``(n, d)``, any floating dtype, ``n > k``.
        fake: ``(m, d)``, ``m > k``.
        k: neighbours, at least 1.

    Returns:
        ``(density, coverage)``; the density may exceed 1.

    Raises:
        TypeError, ValueError: as :func:`precision_recall`.

    Source:
        Naeem et al. 2020 (arXiv 2002.09797), equations 2 and 3, lemmas 1 and 2.

    Example:
        >>> from cln_tutorial.gan_architectures.metrics import density_coverage
        >>> real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> fake = torch.tensor([[0.0], [0.5], [1.0], [4.0]])
        >>> density_coverage(real, fake, k=1)
        DensityCoverage(density=1.5, coverage=0.5)
    """
    real, fake = _read_neighbours(real, fake, k)
    hits = torch.zeros(len(real), dtype=torch.int64, device=real.device)
    for inside in _inside(fake, real, k):
        hits += inside.sum(0)
    return DensityCoverage(hits.sum().item() / (k * len(fake)), _share([hits > 0]))


def nearest_mode(x: Features, modes: Features, radius: float | int) -> Int64[Tensor, " samples"]:
    r"""Return the number of the nearest mode of each sample, or -1 where none is near.

    Args:
        x: samples ``(n, d)``, any floating dtype.
        modes: centres of the modes, ``(m, d)``, such as a ring or a grid.
        radius: a sample further away than this belongs to no mode; usually 3 standard deviations.

    Returns:
        Labels for :func:`mode_coverage`, ``(n,)``.

    Raises:
        TypeError, ValueError: for other dtypes, shapes that do not fit, numbers that are not
            finite, or a radius that is not above 0.

    Source:
        Srivastava et al. 2017 (VEEGAN, arXiv 1705.07761), section 4.1.

    Example:
        >>> from cln_tutorial.gan_architectures.metrics import nearest_mode
        >>> x, modes = torch.tensor([[0.1], [2.2], [0.9]]), torch.tensor([[0.0], [1.0]])
        >>> nearest_mode(x, modes, radius=0.3)
        tensor([ 0, -1,  1])
    """
    x, modes = _read(x, modes, 1, ("x", "modes"))
    if not radius > 0:
        raise ValueError(f"`radius` must be above 0; got {radius}.")
    exact = "donot_use_mm_for_euclid_dist"
    nearest = [
        torch.cdist(rows, modes, compute_mode=exact).min(1) for rows in _row_blocks(x, len(modes))
    ]
    distance = torch.cat([each.values for each in nearest])
    label = torch.cat([each.indices for each in nearest])
    return label.where(distance <= radius, -1)


def mode_coverage(
    labels: Int64[Tensor, " samples"], n_classes: int, min_share: float | int
) -> ModeCoverage:
    r"""Count the modes, or classes, that hold at least a given share of the samples.

    Args:
        labels: mode or class of each sample, ``(n,)``, int64; -1 is a sample of no mode, which
            counts among all samples only.
        n_classes: number of modes.
        min_share: least share of all samples, between 0 and 1: 0.005 for a ring or a grid, 0.02
            for ten classes.

    Returns:
        ``(covered, shares)``: a number, and the share of each mode, ``(n_classes,)``, float64.

    Raises:
        TypeError, ValueError: for other dtypes, no label, labels outside -1 ... ``n_classes - 1``,
            or a share outside its range.

    Example:
        >>> from cln_tutorial.gan_architectures.metrics import mode_coverage
        >>> covered, shares = mode_coverage(torch.tensor([0, 0, 2, -1]), n_classes=3, min_share=0.1)
        >>> covered, shares.tolist()
        (2, [0.5, 0.0, 0.25])
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"`labels` must be a tensor of int64; got {got}.")
    require_count("n_classes", n_classes, 1)
    if not 0 < min_share <= 1:
        raise ValueError(f"`min_share` must be above 0 and at most 1; got {min_share}.")
    if labels.ndim != 1 or labels.numel() == 0:
        raise ValueError(f"`labels` must be a vector of labels; got shape {tuple(labels.shape)}.")
    low, high = labels.min().item(), labels.max().item()
    if low < -1 or high >= n_classes:
        raise ValueError(
            f"`labels` must lie between -1 and {n_classes - 1}, as `n_classes` is {n_classes}; "
            f"got {low} to {high}."
        )
    counts = torch.bincount(labels + 1, minlength=n_classes + 1)[1:]
    shares = _wide(counts) / len(labels)
    return ModeCoverage(int((shares >= min_share).sum()), shares)


class _Polynomial(NamedTuple):
    degree: int
    gamma: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T).mul_(self.gamma).add_(1).pow_(self.degree)


def _u_statistic(kernel: _Polynomial, x: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the squared distance, and its first-order terms for each row of ``x`` and ``y``."""
    n, m = len(x), len(y)
    within_x, within_y = _row_means_within(kernel, x), _row_means_within(kernel, y)
    across_x, across_y = x.new_zeros(n), x.new_zeros(m)
    start = 0
    for rows in _row_blocks(x, m):
        block = kernel(rows, y)
        across_x[start : start + len(rows)] = block.mean(1)
        across_y += block.sum(0) / n
        start += len(rows)
    value = (within_x.mean() + within_y.mean() - 2 * across_x.mean()).item()
    _require_finite(value)
    return value, within_x - across_x, within_y - across_y


def _row_means_within(kernel: _Polynomial, x: Tensor) -> Tensor:
    """Return for each row the mean of the kernel over the *other* rows."""
    sums = torch.cat([kernel(rows, x).sum(1) for rows in _row_blocks(x, len(x))])
    itself = x.square().sum(1).mul_(kernel.gamma).add_(1).pow_(kernel.degree)
    return (sums - itself) / (len(x) - 1)


def _inside(points: Tensor, centres: Tensor, k: int) -> Iterator[Tensor]:
    """Give for blocks of points whether they lie in the balls of the centres, ``(points, balls)``.

    A ball reaches to the k-th nearest other centre. Products make squared distances ten times as
    fast as differences do, and wrong by up to ``d eps (|x|**2 + |y|**2)``. With a slack of the
    order of that error, copies and ties lie inside.
    """
    middle = centres.mean(0)
    points, centres = points - middle, centres - middle
    slack = 8 * centres.shape[1] * torch.finfo(centres.dtype).eps
    norms = centres.square().sum(1)
    # A centre is its own nearest neighbour, at distance 0.
    nearest = [
        _squared_distances(rows, centres).topk(k + 1, largest=False).values[:, k]
        for rows in _row_blocks(centres, len(centres))
    ]
    limits = torch.cat(nearest) + slack * norms
    for rows in _row_blocks(points, len(centres)):
        own = slack * rows.square().sum(1, keepdim=True)
        yield _squared_distances(rows, centres) <= limits + own


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).mul_(-2).add_(x.square().sum(1, keepdim=True)).add_(y.square().sum(1))


def _require_finite(*figures: float) -> None:
    if not all(map(math.isfinite, figures)):
        raise FloatingPointError(
            "`fx` and `fy` are too large for float64, in which their powers overflow: divide both "
            "by the root mean square of one."
        )


def _share(flags: list[Tensor]) -> float:
    return _wide(torch.cat(flags)).mean().item()


def _row_blocks(x: Tensor, n_columns: int) -> Iterator[Tensor]:
    return iter(x.split(max(1, PAIRS // n_columns)))


def _wide(x: Tensor) -> Tensor:
    return (x.cpu() if x.is_mps else x).detach().double()  # no float64 on Apple's GPUs


def _read(
    x: Tensor, y: Tensor, least: int, names: tuple[str, str] = ("fx", "fy")
) -> tuple[Tensor, Tensor]:
    """Refuse what does not fit together, and return both in float64."""
    for name, features in zip(names, (x, y), strict=True):
        require_floating(name, features)
    both = f"got {tuple(x.shape)} and {tuple(y.shape)}"
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(f"`{names[0]}` and `{names[1]}` must be (n, d) and (m, d); {both}.")
    if min(len(x), len(y)) < least:
        raise ValueError(f"`{names[0]}` and `{names[1]}` need at least {least} rows; {both}.")
    if x.device != y.device:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must be on one device; got {x.device} and {y.device}."
        )
    for name, features in zip(names, (x, y), strict=True):
        if not bool(features.isfinite().all()):
            raise ValueError(f"`{name}` holds numbers that are not finite.")
    return _wide(x), _wide(y)


def _read_neighbours(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    require_count("k", k, 1)
    wide = _read(real, fake, 1, ("real", "fake"))
    if k >= min(len(real), len(fake)):
        raise ValueError(
            f"`k` must be below the number of rows of both; got {k} for `real` and `fake` of "
            f"shapes {tuple(real.shape)} and {tuple(fake.shape)}."
        )
    return wide


def _count_blocks(block_size: int, x: Tensor, y: Tensor) -> int:
    require_count("block_size", block_size, 2)
    blocks = min(len(x), len(y)) // block_size
    if blocks < 2:
        raise ValueError(
            f"`block_size` must leave at least 2 blocks; got {block_size} for `fx` and `fy` of "
            f"shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    return blocks
