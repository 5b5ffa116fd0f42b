r"""The unit sphere: tangent vectors, the two ways back onto it, and distances that stay accurate.

A row is the vector along ``dim``, and points are rows of norm one. The axes before it are a batch,
and broadcast as usual. Half types are computed in float32 and cast back. A row that rounding left
not quite unit counts as the direction that it has. Nothing here reads a value to decide what to do
(:func:`frechet_mean` alone stops early), so all of it differentiates, compiles and maps.

Source: article 7063, section on the gradient; Absil, Mahony & Sepulchre 2008, chapters 3 to 5.
"""

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn


def tangent_project(
    x: Float[Tensor, "..."], g: Float[Tensor, "..."], dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Remove from ``g`` its part along the point: what is left is tangent to the sphere.

    .. math:: (I - x x^\top)\, g

    It makes a gradient in space the gradient on the sphere.

    Args:
        x: points, of any floating dtype.
        g: vectors of any direction, one for each point.
        dim: the axis of the rows.

    Raises:
        TypeError: if an argument is not of a real floating dtype.
        ValueError: if the rows differ in length, or the batches do not broadcast.

    Source: article 7063, equation of the gradient of :math:`\theta/\lVert\theta\rVert`.

    Example:
        >>> tangent_project(torch.tensor([1.0, 0.0]), torch.tensor([5.0, 2.0]))
        tensor([0., 2.])
    """
    dtype, dim, (x, g) = _rows(dim, x=x, g=g)
    return _project(x, g, dim).to(dtype)


def retract(
    x: Float[Tensor, "..."], z: Float[Tensor, "..."], dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Step along a tangent vector and return to the sphere by normalising.

    .. math:: R_x(z) = \frac{x + z}{\lVert x + z \rVert}

    The point moves by the angle :math:`\arctan\lVert z\rVert`: no step, however long, turns it by a
    right angle.

    Args:
        x: points.
        z: tangent vectors at ``x``.
        dim: the axis of the rows.

    Raises: as :func:`tangent_project`.

    Source: article 7063, equation of the update; Absil et al. 2008, example 4.1.1.

    Example:
        >>> retract(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.75]))
        tensor([0.8000, 0.6000])
    """
    dtype, dim, (x, z) = _rows(dim, x=x, z=z)
    return _unit(x + z, dim).to(dtype)


def expmap(x: Float[Tensor, "..."], z: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""Walk along the great circle: from ``x``, in the direction ``z``, by the angle of its length.

    .. math:: \exp_x(z) = \cos\lVert z\rVert\, x + \frac{\sin\lVert z\rVert}{\lVert z\rVert}\, z

    Args:
        x: points.
        z: tangent vectors at ``x``; their lengths are angles in radians.
        dim: the axis of the rows.

    Raises: as :func:`tangent_project`.

    Source: Absil et al. 2008, example 5.4.1.

    Example:
        >>> expmap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.pi / 6]))
        tensor([0.8660, 0.5000])
    """
    dtype, dim, (x, z) = _rows(dim, x=x, z=z)
    angle = _norm(z, dim)
    # torch.sinc(t) is sin(pi t) / (pi t), and knows its limit and derivative at 0. Normalised,
    # because rounding errors of the norm would add up over many steps.
    return _unit(angle.cos() * _unit(x, dim) + torch.sinc(angle / math.pi) * z, dim).to(dtype)


def logmap(x: Float[Tensor, "..."], y: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""Return the tangent vector at ``x`` that :func:`expmap` takes to ``y``.

    .. math:: \log_x(y) = \frac{d(x, y)}{\lVert v\rVert}\, v, \qquad v = (I - x x^\top)\, y

    Near ``x`` the vector :math:`v` is projected from :math:`y - x`, and near :math:`-x` from
    :math:`y + x`: both differences are free of cancellation.

    Args:
        x: points.
        y: other points.
        dim: the axis of the rows.

    Returns:
        Tangent vectors at ``x``, as long as the angle. Where ``y`` lies within a rounding unit of
        :math:`-x` every direction leads there and the row is NaN, so that no caller mistakes it for
        "already there".

    Raises: as :func:`tangent_project`.

    Source: Absil et al. 2008, section 5.4.

    Example:
        >>> logmap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.5708])
    """
    dtype, dim, (x, y) = _rows(dim, x=x, y=y)
    angle, opposite, short, _ = _chords(x, y, dim)
    direction = _project(x, short, dim)
    length = _norm(direction, dim)
    there = length == 0
    ratio = torch.where(there, 1.0, angle / torch.where(there, 1.0, length))
    return torch.where(opposite, math.nan, ratio * direction).to(dtype)


def geodesic_distance(
    x: Float[Tensor, "..."], y: Float[Tensor, "..."], dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Return the angle between two points, in radians.

    .. math:: d(x, y) = 2 \operatorname{atan2}(\lVert x - y\rVert, \lVert x + y\rVert)

    The arc cosine of :math:`x^\top y` would lose half of the digits near 0 and :math:`\pi`, and
    has no derivative there. Here the relative error is a few rounding units at every angle: the
    shorter of the two chords is first made orthogonal to the longer one, as chords of vectors with
    equal norms are. That removes what rows which are unit only to rounding would add.

    Args:
        x, y: points.
        dim: the axis of the rows.

    Returns:
        Angles in :math:`[0, \pi]`, without the axis ``dim``. The derivative is 0 at both ends.

    Raises: as :func:`tangent_project`.

    Source: Kahan, "How Futile are Mindless Assessments of Roundoff", 2006, section 12.

    Example:
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-5])
        >>> geodesic_distance(x, y)
        tensor(1.0000e-05)
        >>> (x @ y).acos()
        tensor(0.)
    """
    dtype, dim, (x, y) = _rows(dim, x=x, y=y)
    return _chords(x, y, dim)[0].squeeze(dim).to(dtype)


def parallel_transport(
    x: Float[Tensor, "..."], y: Float[Tensor, "..."], z: Float[Tensor, "..."], dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Carry a tangent vector from ``x`` to ``y`` along the great circle between them.

    .. math:: z - \frac{2\, m^\top z}{m^\top m}\, m, \qquad m = x + y

    A mirror, which takes :math:`x` to :math:`-y`: it keeps all lengths and angles.

    Args:
        x: points where the vectors start.
        y: points where they arrive.
        z: tangent vectors at ``x``.
        dim: the axis of the rows.

    Returns:
        Tangent vectors at ``y``; NaN where :func:`logmap` is.

    Raises: as :func:`tangent_project`.

    Source: Absil et al. 2008, section 8.1.

    Example:
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> parallel_transport(x, y, torch.tensor([0.0, 2.0]))
        tensor([-2.,  0.])
    """
    dtype, dim, (x, y, z) = _rows(dim, x=x, y=y, z=z)
    _, opposite, _, total = _chords(x, y, dim)
    moved = 2 * _project(total, z, dim) - z
    return torch.where(opposite, math.nan, moved).to(dtype)


def random_unit(
    *size: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "..."]:
    r"""Draw points uniformly from the sphere: normal vectors, normalised.

    Args:
        size: the shape; the last number, at least 2, is the dimension of the space.
        generator, dtype, device: as in ``torch.randn``. Half types are drawn in float32.

    Raises:
        TypeError: if ``dtype`` is not a real floating dtype.
        ValueError: if ``size`` is empty or its last number is below 2.

    Source: Muller 1959, "A note on a method for generating points uniformly on n-spheres".

    Example:
        >>> x = random_unit(3, 100, generator=torch.Generator().manual_seed(0))
        >>> x.shape, bool((x.norm(dim=-1) - 1).abs().max() < 1e-6)
        (torch.Size([3, 100]), True)
    """
    if not size or size[-1] < 2:
        raise ValueError(f"`size` must end in a dimension of at least 2; got {size}.")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be a real floating dtype; got {dtype}.")
    wide = torch.promote_types(dtype, torch.float32)
    return _unit(torch.randn(*size, generator=generator, dtype=wide, device=device), -1).to(dtype)


def frechet_mean(
    x: Float[Tensor, "*batch points dim"],
    weights: Float[Tensor, "*batch points"] | None = None,
    max_iter: int = 50,
    tol: float | int = 1e-7,
) -> Float[Tensor, "*batch dim"]:
    r"""Return the point with the least sum of squared angles to all points.

    .. math:: \arg\min_m \sum_i w_i\, d(m, x_i)^2, \qquad
        m \leftarrow \exp_m\Bigl(\sum_i w_i \log_m(x_i) \Big/ \sum_i w_i\Bigr)

    It starts from the normalised arithmetic mean. With all points in an open half sphere of which
    they fill less than a right angle around the mean, the minimum is unique and this finds it.

    Args:
        x: points, ``(*batch, points, dim)``.
        weights: not negative, ``(*batch, points)``; ``None`` for equal ones.
        max_iter: steps at most.
        tol: angle in radians below which a step is the last. It is not taken as less than what the
            dtype can resolve. Under ``torch.compile`` and ``vmap`` all ``max_iter`` steps are made.

    Returns:
        ``(*batch, dim)``. NaN where no mean is singled out: the arithmetic mean is zero, or a point
        lies opposite to the mean.

    Raises:
        TypeError: if ``x`` or ``weights`` is not of a real floating dtype.
        ValueError: if there are no points, weights are negative or of another shape, or
            ``max_iter`` is below 1.

    Warns:
        UserWarning: if the last step was still longer than ``tol``.

    Source: Karcher 1977; Buss & Fillmore 2001, algorithm A1.

    Example:
        >>> frechet_mean(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))  # at 60 degrees
        tensor([0.5000, 0.8660])
    """
    dtype, _, (x,) = _rows(-1, x=x)
    _require_points(x, weights, max_iter)
    weights = x.new_ones(x.shape[:-1]) if weights is None else weights.to(x.dtype)
    weights = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)
    tol = max(tol, 4 * torch.finfo(x.dtype).eps)

    start = (weights * _unit(x, -1)).sum(-2)
    scattered = _norm(start, -1) <= 4 * torch.finfo(x.dtype).eps
    mean = torch.where(scattered, math.nan, _unit(start, -1))
    for _ in range(max_iter):
        step = (weights * logmap(mean.unsqueeze(-2), x)).sum(-2)
        mean = expmap(mean, step)
        # A row of NaN will not get better: only what is still longer than `tol` goes on.
        if _values_can_be_read() and not bool((_norm(step, -1) > tol).any()):
            break
    else:
        if _values_can_be_read():
            message = f"`frechet_mean` has not converged to {tol:.1e} in {max_iter} steps."
            warnings.warn(message, stacklevel=2)
    return mean.to(dtype)


def cos_factor(
    x: Float[Tensor, "..."], g: Float[Tensor, "..."], eps: float | int = 1e-30, dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Return JoSE's factor of the step: how far the descent points away from where ``x`` is.

    .. math:: 1 - \cos(-g, x) = 1 + \frac{x^\top g}{\lVert g\rVert}
        = \tfrac12 \Bigl\lVert x + \frac{g}{\lVert g\rVert} \Bigr\rVert^2

    It is 0 if :math:`-g` points along ``x``, and 2 if it points the other way. It is computed as
    the square, which keeps its digits near 0.

    Args:
        x: points.
        g: gradients in space, before they are projected.
        eps: a gradient whose norm is not larger counts as zero.
        dim: the axis of the rows.

    Returns:
        Factors in [0, 2], without the axis ``dim``; 1 for a zero gradient.

    Raises: as :func:`tangent_project`.

    Source: Meng et al. 2019 (arXiv 1911.01196); article 7063, last section.

    Example:
        >>> x, g = torch.tensor([1.0, 0.0]), torch.tensor([[-3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
        >>> cos_factor(x, g)
        tensor([0., 1., 2.])
    """
    dtype, dim, (x, g) = _rows(dim, x=x, g=g)
    length = _norm(g, dim)
    zero = length <= eps
    heading = g / torch.where(zero, 1.0, length)
    factor = (_unit(x, dim) + heading).square().sum(dim, keepdim=True) / 2
    return torch.where(zero, 1.0, factor).squeeze(dim).to(dtype)


class UnitNorm(nn.Module):
    r"""Parametrisation of unit rows by free ones, :math:`x = \theta / \lVert\theta\rVert`.

    With a plain gradient step :math:`\theta` only gets longer, since its gradient is orthogonal to
    it: :math:`\lVert\theta_{t+1}\rVert^2 = \lVert\theta_t\rVert^2 + \eta^2\lVert\nabla_\theta
    f\rVert^2`. The angle moves as with the step size :math:`\eta / \lVert\theta\rVert^2`, which
    therefore decays by itself.

    Args:
        dim: the axis of the rows.

    Raises:
        TypeError: if the tensor is not of a real floating dtype.
        ValueError: if a row of the tensor that is to be parametrised is zero or not finite.

    Source: article 7063, equation of the gradient of :math:`\theta/\lVert\theta\rVert`.

    Example:
        >>> layer = nn.Embedding(5, 3)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", UnitNorm())
        >>> bool((layer.weight.norm(dim=-1) - 1).abs().max() < 1e-6)
        True
    """

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, theta: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the rows of length 1."""
        dtype, dim, (theta,) = _rows(self.dim, theta=theta)
        return _unit(theta, dim).to(dtype)

    def right_inverse(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Take the tensor itself as :math:`\theta`, whatever the norms of its rows."""
        require_directions("x", x, self.dim)
        return x

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def require_directions(name: str, x: Tensor, dim: int) -> Tensor:
    """Refuse rows that have no direction, and return the norms of all, without the axis ``dim``."""
    _, dim, (wide,) = _rows(dim, **{name: x.detach()})
    norms = _norm(wide, dim).squeeze(dim)
    bad = ~(norms.isfinite() & (norms > 0))
    if bad.any():
        raise ValueError(
            f"`{name}` must have rows with a direction along axis {dim}; {which_rows(bad)} zero or "
            f"not finite."
        )
    return norms


def which_rows(bad: Tensor) -> str:
    """Name the rows that are marked, as the start of a clause."""
    if bad.ndim == 0:
        return "its row is"
    rows = [row[0] if len(row) == 1 else tuple(row) for row in bad.nonzero().tolist()]
    named = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    return f"row {named} is" if len(rows) == 1 else f"{len(rows)} rows ({named}) are"


# --- inside ---------------------------------------------------------------------------------------


def _rows(dim: int, **tensors: Tensor) -> tuple[torch.dtype, int, list[Tensor]]:
    """Return the dtype of the result, ``dim`` counted from the end, and the tensors widened."""
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise TypeError(f"`{name}` must be of a real floating dtype; got {t.dtype}.")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    try:
        whole = torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ValueError(f"the batches must broadcast; got {shapes}.") from None
    if not -len(whole) <= dim < len(whole):
        raise ValueError(f"`dim` must be an axis of {shapes}; got {dim}.")
    from_end = dim - len(whole) if dim >= 0 else dim
    lengths = {name: s[from_end] if -from_end <= len(s) else None for name, s in shapes.items()}
    if len(set(lengths.values())) > 1 or whole[from_end] == 0:
        raise ValueError(
            f"the rows along `dim` {dim} must have one length, not zero, in all tensors; "
            f"got shapes {shapes}."
        )
    dtype = next(iter(tensors.values())).dtype
    for t in tensors.values():
        dtype = torch.promote_types(dtype, t.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return dtype, from_end, [t.to(wide) for t in tensors.values()]


def _dot(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (a * b).sum(dim, keepdim=True)


def _norm(x: Tensor, dim: int) -> Tensor:
    # The squares of entries around 1e-25 or 1e25 have no place in float32. A constant for autograd:
    # the norm is the same with every scale.
    scale = x.detach().abs().amax(dim, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale * torch.linalg.vector_norm(x / scale, dim=dim, keepdim=True)


def _unit(x: Tensor, dim: int) -> Tensor:
    return x / _norm(x, dim)


def _project(x: Tensor, g: Tensor, dim: int) -> Tensor:
    return g - _dot(x, g, dim) / _dot(x, x, dim) * x


def _chords(x: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the angle, whether ``y`` is :math:`-x`, the shorter of the two chords, and x + y.

    The chords are :math:`y - x` and :math:`x + y`; the shorter is orthogonal to the longer one.
    """
    near = _dot(x, y, dim) >= 0
    longer = torch.where(near, x + y, y - x)
    shorter = _project(longer, torch.where(near, y - x, x + y), dim)
    ratio = _norm(shorter, dim) / _norm(longer, dim)
    half = ratio.atan()
    angle = torch.where(near, 2 * half, math.pi - 2 * half)
    opposite = ~near & (ratio <= torch.finfo(x.dtype).eps)
    return angle, opposite, shorter, torch.where(near, longer, shorter)


def _values_can_be_read() -> bool:
    return not (torch.compiler.is_compiling() or _functorch_active())


try:
    from torch._C import _are_functorch_transforms_active as _functorch_active
except ImportError:  # a private name: without it `frechet_mean` would fail loudly under vmap

    def _functorch_active() -> bool:
        return False


def _require_points(x: Tensor, weights: Tensor | None, max_iter: int) -> None:
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"`x` must be (*batch, points, dim) with points; got {tuple(x.shape)}.")
    if max_iter < 1:
        raise ValueError(f"`max_iter` must be at least 1; got {max_iter}.")
    if weights is None:
        return
    if not weights.is_floating_point():
        raise TypeError(f"`weights` must be of a real floating dtype; got {weights.dtype}.")
    if weights.shape != x.shape[:-1]:
        raise ValueError(
            f"`weights` must have one entry per point, shape {tuple(x.shape[:-1])}; "
            f"got {tuple(weights.shape)}."
        )
    if _values_can_be_read() and bool((weights < 0).any()):
        raise ValueError(f"`weights` must not be negative; got {weights.min().item()}.")
