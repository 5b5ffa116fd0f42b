r"""Sorting and ranking with a gradient: projections on the permutahedron, in sorting time.

.. math:: \mathrm{sort}_\varepsilon(x) = P\bigl(\rho / \varepsilon,\, x\bigr), \qquad
    \mathrm{rank}_\varepsilon(x) = P\bigl(x / \varepsilon,\, \rho\bigr), \qquad
    \rho = (n, n-1, \dots, 1)

:math:`P(z, w)` is the point nearest to :math:`z` in the convex hull of all orders of :math:`w`. It
comes from a sort and an isotonic regression, whose blocks say which neighbours share a value.

Source: Su Jianlin, article 6620 (https://kexue.fm/archives/6620), 2019, for the family; Blondel,
Teboul, Berthet & Djolonga 2020; Prillo & Eisenschlos 2020 for the relaxed permutation.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from cln_tutorial._transforms import values_are_hidden
from cln_tutorial.smoothing._checks import (
    choose_backend,
    require_axis,
    require_temperature,
    wide_dtype,
)
from cln_tutorial.smoothing.isotonic import Problem, solve

REGULARIZATIONS = ("l2", "kl")
METHODS = ("softsort",)


def soft_sort(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    descending: bool = False,
    regularization: str = "l2",
    regularization_strength: float | int | Tensor | None = None,
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Sort, and let neighbours that are far apart attract each other.

    .. math:: y_i = \frac{\rho_i - \bar\rho_B}{\varepsilon} + \bar x_B

    for position :math:`i` in a block :math:`B`; with "kl" logarithms of mean exponentials stand in
    the place of the means. Nothing is sorted approximately where the temperature is low enough:

    - "l2" is the sorted row itself if and only if :math:`\varepsilon \le 1/\text{largest gap}`;
    - with :math:`\delta` the sorted row less the result, both upwards,
      :math:`0 \le \sum_i i\,\delta_i \le \frac\varepsilon4 \sum_i (x_i - \bar x)^2`;
    - "l2" keeps the sum of the row; for :math:`\varepsilon \to \infty` all entries are the mean.

    Args:
        x: rows along ``dim``, any floating dtype; computed in float64 sums.
        temperature: :math:`\varepsilon \ge 0`, the strength of the regularisation, in units of
            1 / ``x``; a tensor broadcasts to ``x`` with 1 along ``dim``. 0 is the hard sort.
        dim: the axis to sort.
        descending: the largest first: ``-soft_sort(-x)``. With "kl" it is not the same row turned
            around.
        regularization: "l2" (quadratic) or "kl" (entropic, of the exponentials of ``x``).
        regularization_strength: another name of ``temperature``, as in torchsort; it wins.
        backend: "numba", "reference" (plain PyTorch), or "auto", the faster one that is there.

    Returns:
        Shape and dtype of ``x``. Entries of :math:`-\infty` are masked: they come out at the low
        end, with a gradient of zero. A row that holds NaN or :math:`+\infty` is NaN.

    Raises:
        TypeError: if ``x`` or a tensor of temperatures is not floating.
        ValueError: for an axis that ``x`` does not have; a temperature that is negative, not finite
            or does not broadcast; an unknown regularisation; a backend that does not run here.

    Source:
        Blondel et al. 2020, equation 5; the sign of an ascending sort as in torchsort.

    Example:
        >>> soft_sort(torch.tensor([8.0, 0.0, 5.0, 3.0, 2.0, 1.0, 6.0, 7.0, 9.0]))
        tensor([0.5556, 1.5556, 2.5556, 3.5556, 4.5556, 5.5556, 6.5556, 7.5556, 8.5556])
    """
    strength = temperature if regularization_strength is None else regularization_strength
    problem = Problem("sort", _is_entropic(regularization), 1 if descending else -1)
    return _projected(x, strength, dim, None, problem, backend)


def soft_rank(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    descending: bool = False,
    regularization: str = "l2",
    regularization_strength: float | int | Tensor | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Rank from 1 (the smallest), and let entries that are close to each other share ranks.

    .. math:: r_i = \frac{x_i - \bar x_B}{\varepsilon} + \bar\rho_B \quad\text{("l2")}, \qquad
        r_i = \Bigl(\sum_B \rho\Bigr)\, \mathrm{softmax}_B(x / \varepsilon)_i \quad\text{("kl")}

    for an entry :math:`i` in a block :math:`B`. Ties get equal ranks, the mean of their own.

    - "l2" is exact if and only if :math:`\varepsilon \le` the smallest gap; "kl" if every gap
      between the ranks :math:`k` and :math:`k+1` is at least
      :math:`\varepsilon \log\frac{k+1}k`, hence if none is less than :math:`\varepsilon \ln 2`;
    - all ranks lie in :math:`[1, n]`, and their sum is :math:`n(n+1)/2`;
    - "l2" is :math:`1/\varepsilon`-Lipschitz, in the Euclidean norm.

    Args:
        x: rows along ``dim``, any floating dtype; computed in float64 sums. The result has this
            dtype too: bfloat16 holds whole ranks up to 256, float16 up to 2048.
        temperature: :math:`\varepsilon \ge 0`, the strength of the regularisation, in units of
            ``x``; a tensor broadcasts to ``x`` with 1 along ``dim``. 0 gives the hard ranks, with a
            gradient of zero.
        dim: the axis to rank.
        descending: rank 1 for the largest: the ranks of ``-x``.
        regularization: "l2" (quadratic) or "kl" (entropic).
        regularization_strength: another name of ``temperature``, as in torchsort; it wins.
        mask: True for what is there, False for padding; broadcasts to ``x``. The others are ranked
            as if there were no padding, which gets rank 0.
        backend: "numba", "reference" (plain PyTorch), or "auto", the faster one that is there.

    Returns:
        Shape and dtype of ``x``. Entries of :math:`-\infty` are one block at the low end: :math:`m`
        of them share the ranks :math:`1..m` (ascending), with a gradient of zero. A row that holds
        NaN or :math:`+\infty` is NaN.

    Raises:
        TypeError: if ``x`` or a tensor of temperatures is not floating, or ``mask`` not boolean.
        ValueError: for an axis that ``x`` does not have; a temperature that is negative, not finite
            or does not broadcast; a mask that does not broadcast; an unknown regularisation; a
            backend that does not run here.

    Source:
        Blondel et al. 2020, equation 6.

    Example:
        >>> soft_rank(torch.tensor([2.9, 0.1, 1.2]), temperature=0.5)
        tensor([3., 1., 2.])
        >>> soft_rank(torch.tensor([2.9, 0.1, 1.2]), temperature=2.0)
        tensor([2.7500, 1.3500, 1.9000])
    """
    strength = temperature if regularization_strength is None else regularization_strength
    problem = Problem("rank", _is_entropic(regularization), -1 if descending else 1)
    return _projected(x, strength, dim, mask, problem, backend)


def soft_argsort(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    method: str = "softsort",
    descending: bool = False,
) -> Float[Tensor, "..."]:
    r"""Return a relaxed permutation matrix: row :math:`i` says what comes to position :math:`i`.

    .. math:: P_{ij} = \mathrm{softmax}_j\bigl(-|\mathrm{sort}(x)_i - x_j| / \tau\bigr)

    With distinct entries the largest of each row is that of the hard permutation at every
    temperature, and :math:`1 - P_{i\sigma(i)} \le (n - 1)\, e^{-\delta/\tau}`, :math:`\delta` the
    smallest gap.

    Args:
        x: rows along ``dim``, any floating dtype.
        temperature: :math:`\tau \ge 0`, in units of ``x``; a tensor broadcasts to ``x`` with 1
            along ``dim``. At 0 equal entries share their row.
        dim: the axis to sort.
        method: "softsort".
        descending: the largest first.

    Returns:
        ``(..., n, n)``, ``dim`` moved to the end and doubled; dtype of ``x``; rows sum to 1. What
        is :math:`-\infty` shares the rows at the low end evenly and has no weight in others. For a
        row ``x`` that holds NaN or :math:`+\infty` all is NaN.

    Raises:
        TypeError: if ``x`` or a tensor of temperatures is not floating.
        ValueError: for an axis that ``x`` does not have; a temperature that is negative, not finite
            or does not broadcast; an unknown method.

    Source:
        Prillo & Eisenschlos 2020, equation 3.

    Example:
        >>> permutation = soft_argsort(torch.tensor([2.0, 0.0, 1.0]), temperature=0.1)
        >>> permutation.argmax(-1)
        tensor([1, 2, 0])
    """
    dim = require_axis("x", x, dim)
    _require_strength(temperature, x, dim)
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}; got {method!r}.")
    rows = x.movedim(dim, -1).to(wide_dtype(x.dtype))
    if isinstance(temperature, Tensor):
        spread = torch.broadcast_to(temperature, _ones_along(x, dim)).movedim(dim, -1)
        tau = spread.to(rows.dtype).unsqueeze(-1)
    else:
        tau = torch.tensor(float(temperature), dtype=rows.dtype, device=x.device)
    masked = rows == -math.inf
    bad = (rows.isnan() | (rows == math.inf)).any(-1)[..., None, None]
    ordered, index = rows.sort(dim=-1, descending=descending, stable=True)
    low = masked.gather(-1, index)
    # What is masked must not meet a difference of infinities; it keeps to itself.
    there, from_ = ordered.masked_fill(low, 0), rows.masked_fill(masked, 0)
    gap = (there.unsqueeze(-1) - from_.unsqueeze(-2)).abs()
    apart = low.unsqueeze(-1) ^ masked.unsqueeze(-2)
    # At a temperature of 0 only a gap of 0 has a weight.
    apart = apart | ((tau == 0) & (gap > 0))
    scores = (gap / tau.masked_fill(tau == 0, 1)).masked_fill(apart, math.inf)
    return (-scores).softmax(-1).masked_fill(bad, math.nan).to(x.dtype)


def soft_kth(
    x: Shaped[Tensor, "..."],
    k: int,
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    regularization: str = "l2",
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Return entry :math:`k` of the soft sort: the k-th smallest, as ``torch.kthvalue``.

    .. math:: \mathrm{sort}_\varepsilon(x)_k

    Args:
        x: rows along ``dim``, any floating dtype.
        k: from 1 to the number of entries.
        temperature, dim, regularization, backend: as in :func:`soft_sort`.

    Returns:
        ``x`` without ``dim``; exact for :math:`\varepsilon \le 1/\text{largest gap}` ("l2").

    Raises:
        TypeError: if ``x`` or a tensor of temperatures is not floating.
        ValueError: if ``k`` is out of range, and as :func:`soft_sort`.

    Source:
        Blondel et al. 2020.

    Example:
        >>> soft_kth(torch.tensor([3.0, 1.0, 2.0]), k=1, temperature=0.5)
        tensor(1.)
    """
    dim = require_axis("x", x, dim)
    if not 1 <= k <= x.shape[dim]:
        raise ValueError(f"`k` must be from 1 to {x.shape[dim]}, the size of `dim`; got {k}.")
    options = {"regularization": regularization, "backend": backend}
    return soft_sort(x, temperature, dim, **options).select(dim, k - 1)


def soft_quantile(
    x: Shaped[Tensor, "..."],
    q: float | int | Sequence[float] | Tensor,
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    regularization: str = "l2",
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Return quantiles of the soft sort, interpolated linearly as in ``torch.quantile``.

    .. math:: (1 - t)\, y_{\lfloor h \rfloor} + t\, y_{\lfloor h \rfloor + 1}, \quad
        y = \mathrm{sort}_\varepsilon(x), \quad h = 1 + q (n - 1), \quad t = h - \lfloor h \rfloor

    Args:
        x: rows along ``dim``, at least one entry, any floating dtype.
        q: one number in [0, 1], or several; a tensor has a gradient too.
        temperature, dim, regularization, backend: as in :func:`soft_sort`.

    Returns:
        ``x`` without ``dim``; for several quantiles with a first axis for these. Entries of
        :math:`-\infty` count, as the lowest.

    Raises:
        TypeError: if ``x`` or a tensor of temperatures or of quantiles is not floating.
        ValueError: if a quantile is outside of [0, 1] or ``x`` is empty, and as :func:`soft_sort`.

    Source:
        Blondel et al. 2020; Cuturi, Teboul & Vert 2019 for soft quantiles.

    Example:
        >>> soft_quantile(torch.tensor([3.0, 1.0, 2.0, 4.0]), [0.0, 0.5], temperature=0.5)
        tensor([1.0000, 2.5000])
    """
    dim = require_axis("x", x, dim)
    n = x.shape[dim]
    if n == 0:
        raise ValueError(f"`x` must have an entry along `dim`; got shape {tuple(x.shape)}.")
    if not isinstance(q, Tensor):
        q = torch.tensor(q, dtype=torch.float64, device=x.device)
    if not q.is_floating_point():
        raise TypeError(f"`q` must be floating; got {q.dtype}.")
    if q.ndim > 1:
        raise ValueError(f"`q` must be a number or a vector; got shape {tuple(q.shape)}.")
    if not values_are_hidden() and q.device.type == "cpu" and not bool(((q >= 0) & (q <= 1)).all()):
        raise ValueError(f"`q` must lie in [0, 1]; got {q}.")
    options = {"regularization": regularization, "backend": backend}
    wide = x.to(wide_dtype(x.dtype))
    y = soft_sort(wide, temperature, dim, **options).movedim(dim, -1)
    at = q.reshape(-1) * (n - 1)
    below = at.detach().floor().long().clamp(0, n - 1)
    share = (at - below).to(y.dtype)
    low, high = y[..., below], y[..., (below + 1).clamp(max=n - 1)]
    # Of -inf there is no difference: there the lower one is the result.
    high = torch.where(low == -math.inf, low, high)
    low_is_all = (share == 0) | (low == -math.inf)
    between = low + share * torch.where(low_is_all, 0, high - low)
    return between.movedim(-1, 0).reshape((*q.shape, *y.shape[:-1])).to(x.dtype)


def soft_median(
    x: Shaped[Tensor, "..."],
    temperature: float | int | Tensor = 1.0,
    dim: int = -1,
    *,
    regularization: str = "l2",
    backend: str = "auto",
) -> Float[Tensor, "..."]:
    r"""Return the median of the soft sort; of an even number, the mean of the two in the middle.

    .. math:: \tfrac12 \bigl(y_{\lfloor (n+1)/2 \rfloor} + y_{\lceil (n+1)/2 \rceil}\bigr), \quad
        y = \mathrm{sort}_\varepsilon(x)

    Args:
        x: rows along ``dim``, at least one entry, any floating dtype.
        temperature, dim, regularization, backend: as in :func:`soft_sort`.

    Returns:
        ``x`` without ``dim``.

    Raises:
        TypeError: if ``x`` or a tensor of temperatures is not floating.
        ValueError: if ``x`` is empty, and as :func:`soft_sort`.

    Source:
        Blondel et al. 2020.

    Example:
        >>> soft_median(torch.tensor([3.0, 1.0, 2.0, 4.0]), temperature=0.5)
        tensor(2.5000)
    """
    options = {"regularization": regularization, "backend": backend}
    return soft_quantile(x, 0.5, temperature, dim, **options)


class SoftSort(nn.Module):
    """The module of :func:`soft_sort`.

    Args:
        temperature, dim, descending, regularization: as there.

    Example:
        >>> SoftSort(temperature=0.1)(torch.tensor([3.0, 1.0, 2.0]))
        tensor([1., 2., 3.])
    """

    def __init__(
        self,
        temperature: float | int = 1.0,
        dim: int = -1,
        *,
        descending: bool = False,
        regularization: str = "l2",
    ) -> None:
        super().__init__()
        _is_entropic(regularization)
        require_temperature(temperature, ())
        self.temperature, self.dim = temperature, dim
        self.descending, self.regularization = descending, regularization

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the soft sort of ``x``."""
        options = {"descending": self.descending, "regularization": self.regularization}
        return soft_sort(x, self.temperature, self.dim, **options)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return (
            f"temperature={self.temperature}, dim={self.dim}, descending={self.descending}, "
            f"regularization={self.regularization!r}"
        )


class SoftRank(SoftSort):
    """The module of :func:`soft_rank`.

    Args:
        temperature, dim, descending, regularization: as there.

    Example:
        >>> SoftRank(temperature=0.1)(torch.tensor([3.0, 1.0, 2.0]))
        tensor([3., 1., 2.])
    """

    def forward(
        self, x: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """Return the soft ranks of ``x``; ``mask`` is False for padding."""
        options = {"descending": self.descending, "regularization": self.regularization}
        return soft_rank(x, self.temperature, self.dim, mask=mask, **options)


# --- from any shape to rows and back --------------------------------------------------------------


def _projected(
    x: Tensor,
    strength: float | int | Tensor,
    dim: int,
    mask: Tensor | None,
    problem: Problem,
    backend: str,
) -> Tensor:
    dim = require_axis("x", x, dim)
    _require_strength(strength, x, dim)
    backend = choose_backend(backend, x)
    if mask is not None:
        mask = _spread_mask(mask, x)
        x = x.masked_fill(~mask, -math.inf)
    if x.numel() == 0:
        return x.clone()
    rows = x.movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1]).to(wide_dtype(x.dtype))
    if isinstance(strength, Tensor):
        spread = strength.double().broadcast_to(_ones_along(x, dim)).reshape(-1)
    else:
        spread = torch.full((len(flat),), float(strength), dtype=torch.float64, device=x.device)
    if mask is None:
        pads = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
    else:
        pads = (~mask).movedim(dim, -1).sum(-1).reshape(-1)
    y = solve(flat, spread, pads, problem, backend)
    y = y.reshape(rows.shape).movedim(-1, dim).to(x.dtype)
    return y if mask is None else y.masked_fill(~mask, 0)


def _is_entropic(regularization: str) -> bool:
    if regularization not in REGULARIZATIONS:
        raise ValueError(
            f"`regularization` must be one of {REGULARIZATIONS}; got {regularization!r}."
        )
    return regularization == "kl"


def _ones_along(x: Tensor, dim: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[dim] = 1
    return tuple(shape)


def _require_strength(strength: float | int | Tensor, x: Tensor, dim: int) -> None:
    require_temperature(strength, _ones_along(x, dim))


def _spread_mask(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be boolean; got {mask.dtype}.")
    try:
        return mask.broadcast_to(x.shape)
    except RuntimeError:
        raise ValueError(
            f"`mask` must broadcast to `x` {tuple(x.shape)}; got {tuple(mask.shape)}."
        ) from None
