r"""Losses that teach an energy: contrastive divergence, score matching, gradient penalties.

.. math:: \nabla_\theta\, \mathbb{E}_p[-\log q_\theta]
    = \mathbb{E}_p[\nabla_\theta E_\theta] - \mathbb{E}_{q_\theta}[\nabla_\theta E_\theta]

Source: article 6612, after Du & Mordatch 2019 (arXiv 1903.08689); Vincent 2011; Song et al. 2019
(arXiv 1905.07088); article 6316 and Gulrajani et al. 2017 for the penalties.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cln_tutorial._dtypes import wide_dtype
from cln_tutorial.energy_models._checks import (
    Energy,
    energy_values,
    require_count,
    require_energy,
    require_points,
    require_positive,
)


@dataclass(frozen=True)
class CDOutput:
    """The parts of :func:`.contrastive_divergence_loss`.

    Attributes:
        loss: the loss, with its graph: a scalar, or ``(n,)`` for ``reduction="none"``.
        e_pos: energies of the data, ``(n_pos,)``, without a graph.
        e_neg: energies of the samples, ``(n_neg,)``, without a graph.
        reg: the regulariser inside of the loss, of its shape, without a graph.
    """

    loss: Tensor
    e_pos: Tensor
    e_neg: Tensor
    reg: Tensor


def contrastive_divergence_loss(
    energy: Energy,
    x_pos: Shaped[Tensor, "..."],
    x_neg: Shaped[Tensor, "..."],
    *,
    reg: float | int = 0.0,
    reg_mode: str = "sum",
    reduction: str = "mean",
    return_info: bool = False,
) -> Tensor | CDOutput:
    r"""Lower the energy of data, raise that of samples.

    .. math:: L = \mathbb{E}[E(x_+)] - \mathbb{E}[E(x_-)]
        + \alpha\,\bigl(\mathbb{E}[E(x_+)^2] + \mathbb{E}[E(x_-)^2]\bigr)

    Its gradient is that of the likelihood if the samples are the model's own. They are held: no
    gradient reaches what produced ``x_neg``. It is the loss of a WGAN critic, too.

    Args:
        energy: the energy to teach, from ``(n, *event)`` to ``(n,)`` or ``(n, 1)``.
        x_pos: data, ``(n_pos, *event)``, floating.
        x_neg: samples, ``(n_neg, *event)``. Another number than of data is unbiased, too.
        reg: :math:`\alpha \ge 0`. It bounds the gap of the two means by :math:`1/\alpha`.
        reg_mode: "sum" adds both squares, as above. "centre" is
            :math:`\alpha(\mathbb{E}[E(x_+)] + \mathbb{E}[E(x_-)])^2`: it holds the level of the
            energies, which the loss leaves open, and lets their spread and their gap free.
        reduction: "mean", or "none" for one loss per pair, for as many samples as data.
        return_info: return a :class:`.CDOutput`.

    Returns:
        The loss, in the dtype of the energies, float32 for half types; or a :class:`.CDOutput`.
        What is not finite stays so: :class:`.DivergenceGuard` stops at it.

    Raises:
        TypeError: if a batch is not floating, or the energy cannot be called.
        ValueError: for a negative ``reg``, an empty batch, events of two shapes, an unknown mode,
            or "none" with two numbers of points or with "centre".

    Source:
        Article 6612; Du & Mordatch 2019, algorithm 1. The article prints a minus between the two
        squares, which makes the loss unbounded below.

    Example:
        >>> energy = lambda x: x.square().sum(-1) / 2
        >>> contrastive_divergence_loss(energy, torch.zeros(4, 2), torch.ones(8, 2)).item()
        -1.0
    """
    require_energy(energy)
    _require_batches(x_pos, x_neg)
    require_positive("reg", reg, zero=True)
    _require_one_of("reg_mode", reg_mode, ("sum", "centre"))
    _require_one_of("reduction", reduction, ("mean", "none"))
    if reduction == "none" and (len(x_pos) != len(x_neg) or reg_mode == "centre"):
        raise ValueError(
            "`reduction` 'none' needs pairs and `reg_mode` 'sum'; got "
            f"{len(x_pos)} points in `x_pos`, {len(x_neg)} in `x_neg`, `reg_mode` {reg_mode!r}."
        )
    e_pos, e_neg = (_wide(energy_values(energy, x)) for x in (x_pos, x_neg.detach()))
    # Two means, not one of differences: the numbers of points may differ.
    mean = torch.mean if reduction == "mean" else _same
    loss = mean(e_pos) - mean(e_neg)
    penalty = torch.zeros_like(loss)
    if reg:
        if reg_mode == "sum":
            penalty = reg * (mean(e_pos.square()) + mean(e_neg.square()))
        else:
            penalty = reg * (mean(e_pos) + mean(e_neg)).square()
        loss = loss + penalty
    if return_info:
        return CDOutput(loss, e_pos.detach(), e_neg.detach(), penalty.detach())
    return loss


def denoising_score_matching_loss(
    energy: Energy,
    x: Shaped[Tensor, "..."],
    sigma: float | int | Float[Tensor, " n"],
    *,
    noise: Shaped[Tensor, "..."] | None = None,
    weighting: str = "sigma2",
    antithetic: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Teach the gradient of an energy to point back along noise that was added.

    .. math:: L = \tfrac12\, \mathbb{E}\, \|\sigma \nabla E(x + \sigma \xi) - \xi\|^2,
        \qquad \xi \sim N(0, I)

    What is learnt is the energy of the data **with** the noise. No chain is needed.

    Args:
        energy: the energy to teach, twice differentiable in ``x``.
        x: data, ``(n, *event)``, floating.
        sigma: standard deviation of the noise, one for all or ``(n,)``, in the units of ``x``.
        noise: :math:`\xi` of the shape of ``x``; then nothing is drawn.
        weighting: "sigma2" is the loss above, of the order of 1 at every noise level. "none" is
            :math:`\tfrac12 \mathbb{E} \|\nabla E - \xi / \sigma\|^2`, larger by
            :math:`1/\sigma^2`.
        antithetic: use :math:`+\xi` and :math:`-\xi` for each point: twice the work, less variance.
        generator: of the noise; the global one if there is none.

    Returns:
        A scalar with its graph, if the caller's gradients are on.

    Raises:
        TypeError: if ``x`` or ``noise`` is not floating, or the energy cannot be called.
        ValueError: for a ``sigma`` that is not above 0, shapes that do not match, an empty batch,
            or ``noise`` together with ``generator``.

    Source:
        Vincent 2011, "A connection between score matching and denoising autoencoders".

    Example:
        For data N(0, v) in d dimensions the minimum is d v / (2 (v + sigma^2)).

        >>> x = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
        >>> best = lambda x: x.square().sum(-1) / 4  # v + sigma^2 = 2
        >>> generator = torch.Generator().manual_seed(1)
        >>> loss = denoising_score_matching_loss(best, x, 1.0, generator=generator)
        >>> round(loss.item(), 2)
        0.5
    """
    require_energy(energy)
    _require_batch("x", x)
    require_positive("sigma", sigma)
    _require_one_of("weighting", weighting, ("sigma2", "none"))
    if isinstance(sigma, Tensor):
        if sigma.shape != x.shape[:1]:
            raise ValueError(
                f"`sigma` must be a number or have shape ({len(x)},); got {tuple(sigma.shape)}."
            )
        sigma = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    xi = _given_or_drawn("noise", noise, x, torch.randn, generator)
    if antithetic:
        x, xi = torch.cat([x, x]), torch.cat([xi, -xi])
        sigma = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) else sigma
    gradient = _gradient(energy, x + sigma * xi)
    error = sigma * gradient - xi if weighting == "sigma2" else gradient - xi / sigma
    return _squared_norms(error).mean() / 2


def sliced_score_matching_loss(
    energy: Energy,
    x: Shaped[Tensor, "..."],
    *,
    projections: Shaped[Tensor, "..."] | None = None,
    n_projections: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Match the score of the data themselves, with the Hessian seen in random directions only.

    .. math:: L = \mathbb{E}\left[\tfrac12 \|\nabla E(x)\|^2 - v^\top \nabla^2 E(x)\, v\right],
        \qquad \mathbb{E}[v v^\top] = I

    Args:
        energy: the energy to teach, three times differentiable.
        x: data, ``(n, *event)``, floating.
        projections: the directions :math:`v`, ``(m, n, *event)``; then nothing is drawn.
        n_projections: how many directions per point to draw, of entries :math:`\pm 1`: of all with
            covariance I these give the least variance.
        generator: of the directions; the global one if there is none.

    Returns:
        A scalar with its graph, if the caller's gradients are on. It differs from half the mean
        squared distance of the scores by a constant of the data.

    Raises:
        TypeError: if ``x`` is not floating, or the energy cannot be called.
        ValueError: for an empty batch, shapes that do not match, or ``projections`` together with
            ``generator``.

    Source:
        Song et al. 2019, arXiv 1905.07088, the form with reduced variance; Hyvärinen 2005.

    Example:
        >>> energy = lambda x: 3 * x.square().sum(-1) / 2
        >>> x = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        >>> sliced_score_matching_loss(energy, x).item()  # 9 * 2 / 2 - 3 * 2
        3.0
    """
    require_energy(energy)
    _require_batch("x", x)
    require_count("n_projections", n_projections, 1)
    if projections is not None and projections.shape[1:] != x.shape:
        raise ValueError(
            f"`projections` must have shape (m, *{tuple(x.shape)}); got {tuple(projections.shape)}."
        )
    many = x.expand(n_projections if projections is None else len(projections), *x.shape)
    v = _given_or_drawn("projections", projections, many, _signs, generator)
    with torch.inference_mode(False), torch.enable_grad():
        point = _leaf(x)
        v = v.clone() if v.is_inference() else v.detach()
        gradient = _gradient(energy, point, keep=True)
        curvature = x.new_zeros(())
        if gradient.requires_grad:
            for each in v:
                (product,) = torch.autograd.grad(
                    gradient, point, each, create_graph=True, materialize_grads=True
                )
                curvature = curvature + (product * each).sum() / (len(v) * len(x))
        loss = _squared_norms(gradient).mean() / 2 - curvature
    return loss if torch.is_grad_enabled() else loss.detach()


def gradient_penalty(
    energy: Energy,
    x: Shaped[Tensor, "..."],
    x_neg: Shaped[Tensor, "..."] | None = None,
    kind: str = "zero",
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Hold the slope of an energy: at 0 on the data, or at 1 between data and samples.

    .. math:: \mathbb{E}\, \|\nabla E(x)\|^2 \quad\text{("zero")}, \qquad
        \mathbb{E}\, (\|\nabla E(x)\| - 1)^2 \quad\text{("one")}

    At 0 on the data it makes them minima, pits in the energy picture of a GAN.

    Args:
        energy: the energy to teach, twice differentiable.
        x: data, ``(n, *event)``, floating.
        x_neg: samples of the same shape; then the points lie between, at random on the lines from
            one to the other.
        kind: "zero" or "one".
        generator: of the places on the lines.

    Returns:
        A scalar with its graph, if the caller's gradients are on.

    Raises:
        TypeError: if a batch is not floating, or the energy cannot be called.
        ValueError: for an empty batch, two shapes, or an unknown kind.

    Source:
        Article 6316; Mescheder et al. 2018, arXiv 1801.04406 (on data); Gulrajani et al. 2017,
        arXiv 1704.00028 (between).

    Example:
        >>> slope = lambda x: 2 * x.sum(-1)
        >>> gradient_penalty(slope, torch.zeros(5, 1), kind="one").item()
        1.0
    """
    require_energy(energy)
    _require_batch("x", x)
    _require_one_of("kind", kind, ("zero", "one"))
    if x_neg is not None:
        _require_batches(x, x_neg)
        if len(x) != len(x_neg):
            raise ValueError(f"`x_neg` must have {len(x)} points as `x`; got {len(x_neg)}.")
        place = torch.rand(
            len(x), *[1] * (x.ndim - 1), generator=generator, dtype=x.dtype, device=x.device
        )
        x = torch.lerp(x, x_neg, place)
    squares = _squared_norms(_gradient(energy, x))
    if kind == "zero":
        return squares.mean()
    # The root has no derivative at 0; a flat energy gets the subgradient 0 instead of NaN.
    norms = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    return (norms - 1).square().mean()


# --- inside ---------------------------------------------------------------------------------------


def _gradient(energy: Energy, x: Tensor, *, keep: bool = False) -> Tensor:
    """Return the gradient of the energy at ``x``, with the graph back to the parameters.

    With ``keep`` the graph goes back to ``x``, a leaf of the caller, too.
    """
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        point = x if keep else _leaf(x)
        values = energy_values(energy, point)
        if not values.requires_grad:  # an energy that is constant
            return torch.zeros_like(point)
        (gradient,) = torch.autograd.grad(
            _wide(values).sum(), point, create_graph=wanted, materialize_grads=True
        )
    return gradient


def _leaf(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _wide(values: Tensor) -> Tensor:
    """Energies of 1e4 are fine in 16 bits, their squares and sums are not."""
    return values.to(wide_dtype(values.dtype))


def _same(values: Tensor) -> Tensor:
    return values


def _squared_norms(x: Tensor) -> Tensor:
    return _wide(x).flatten(1).square().sum(1)


def _signs(*shape, generator, dtype, device) -> Tensor:
    bits = torch.randint(2, shape, generator=generator, device=device)
    return bits.to(dtype).mul_(2).sub_(1)


def _given_or_drawn(name, given, x, draw, generator) -> Tensor:
    if given is None:
        return draw(*x.shape, generator=generator, dtype=x.dtype, device=x.device)
    if generator is not None:
        raise ValueError(f"give `{name}` or `generator`, not both: nothing would be drawn.")
    if not given.is_floating_point():
        raise TypeError(f"`{name}` must be a tensor of floating numbers; got {given.dtype}.")
    if given.shape != x.shape:
        raise ValueError(f"`{name}` must have shape {tuple(x.shape)}; got {tuple(given.shape)}.")
    return given.to(x.dtype)


def _require_batch(name: str, x: Tensor) -> None:
    require_points(name, x)
    if len(x) == 0:
        raise ValueError(f"`{name}` must have a point at least: the mean of none is no number.")


def _require_batches(x_pos: Tensor, x_neg: Tensor) -> None:
    _require_batch("x_pos", x_pos)
    _require_batch("x_neg", x_neg)
    if x_pos.shape[1:] != x_neg.shape[1:]:
        raise ValueError(
            f"`x_neg` must have events of shape {tuple(x_pos.shape[1:])} as the data; "
            f"got {tuple(x_neg.shape[1:])}."
        )


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {value!r}.")
