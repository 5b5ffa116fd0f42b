r"""Losses of generator and discriminator, and penalties on the discriminator's gradient.

.. math:: L_D = \overline{a(D(x))} + \overline{b(D(G(z)))}, \qquad L_G = \overline{c(D(G(z)))}

Source: article 6549; Goodfellow et al. 2014; Miyato et al. 2018 (arXiv 1802.05957, hinge);
Arjovsky et al. 2017; Mao et al. 2017; Jolicoeur-Martineau 2018 (arXiv 1807.00734, relativistic);
Gulrajani et al. 2017 and Mescheder et al. 2018 (arXiv 1801.04406) for the penalties.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu, softplus

from cln_tutorial._dtypes import require_floating, wide_dtype

Logits = Float[Tensor, "_ ..."]
Images = Float[Tensor, "batch *event"]
Cost = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AdversarialLoss:
    r"""What the discriminator minimises, and what the generator does; made by this module only.

    ====================== ========================================= ==============================
    name                   :meth:`d_loss`, means over the batch of   :meth:`g_loss`
    ====================== ========================================= ==============================
    "non_saturating"       :math:`s(-r) + s(f)`                      :math:`s(-f)`
    "hinge"                :math:`(1-r)_+ + (1+f)_+`                 :math:`-f`
    "wasserstein"          :math:`f - r`                             :math:`-f`
    "least_squares"        :math:`\frac12(r-1)^2 + \frac12 f^2`      :math:`\frac12(f-1)^2`
    "relativistic"         :math:`s(f - r)`                          :math:`s(r - f)`
    "relativistic_average" :math:`s(\bar f - r) + s(f - \bar r)`     :math:`s(f, r` exchanged)
    ====================== ========================================= ==============================

    Here :math:`r, f` are the logits of real and fake images and :math:`s(t) = \log(1+e^t)`, the
    softplus. Its slope stays right in both tails, so that a generator that the discriminator sees
    through learns at full speed: :math:`-\log(\sigma(f) + \varepsilon)`, the common spelling, has
    slope 0 there.

    Attributes:
        name: as in the table.
        needs_real: whether :meth:`g_loss` needs the logits of real images, as relativistic ones do.

    Source:
        The module's docstring names the papers.

    Example:
        >>> from cln_tutorial.gan_architectures.losses import hinge
        >>> hinge.d_loss(real=torch.tensor([0.5, 3.0]), fake=torch.tensor([-2.0, 0.0])).item()
        0.75
        >>> hinge.g_loss(fake=torch.tensor([-2.0, 0.0])).item()
        1.0
    """

    name: str
    needs_real: bool
    _of_d: Cost = field(repr=False)
    _of_g: Cost = field(repr=False)

    def d_loss(self, real: Logits, fake: Logits) -> Float[Tensor, ""]:
        """Return the loss of the discriminator, a mean over the batch.

        Args:
            real: logits of real images, ``(N,)`` or ``(N, *patches)``, any floating dtype.
            fake: logits of fake images. ``relativistic`` compares them in pairs, so that it wants
                the same shape; the others take another number of them.

        Returns:
            A number with a graph; float32 for half types.

        Raises:
            TypeError, ValueError: for other dtypes, no logits, or shapes that do not fit.
        """
        return self._of_d(*self._read(real, fake))

    def g_loss(self, fake: Logits, real: Logits | None = None) -> Float[Tensor, ""]:
        """Return the loss of the generator, a mean over the batch.

        Args:
            fake: logits of fake images, as in :meth:`d_loss`.
            real: logits of real images. Only relativistic losses read them (``needs_real``).

        Returns:
            A number with a graph; float32 for half types.

        Raises:
            TypeError, ValueError: as :meth:`d_loss`, and for a relativistic loss without ``real``.
        """
        if not self.needs_real:
            real = fake
        elif real is None:
            raise ValueError(f"`real` is missing: g_loss of {self.name} compares it with `fake`.")
        real, fake = self._read(real, fake)
        return self._of_g(real, fake)

    def _read(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        for name, logits in (("real", real), ("fake", fake)):
            require_floating(name, logits)
            if logits.numel() == 0:
                raise ValueError(f"`{name}` must hold logits; got shape {tuple(logits.shape)}.")
        # A pair of (N,) and (N, 1) would be compared each with each.
        same = real.shape == fake.shape if self.name == "relativistic" else real.ndim == fake.ndim
        if not same:
            raise ValueError(
                f"`real` and `fake` must be logits of one shape for {self.name}; got "
                f"{tuple(real.shape)} and {tuple(fake.shape)}."
            )
        return real.to(wide_dtype(real.dtype)), fake.to(wide_dtype(fake.dtype))


def _relativistic_average(higher: Tensor, lower: Tensor) -> Tensor:
    return softplus(lower.mean() - higher).mean() + softplus(lower - higher.mean()).mean()


non_saturating = AdversarialLoss(
    "non_saturating",
    False,
    lambda real, fake: softplus(-real).mean() + softplus(fake).mean(),
    lambda real, fake: softplus(-fake).mean(),
)
hinge = AdversarialLoss(
    "hinge",
    False,
    lambda real, fake: relu(1 - real).mean() + relu(1 + fake).mean(),
    lambda real, fake: -fake.mean(),
)
wasserstein = AdversarialLoss(
    "wasserstein",
    False,
    lambda real, fake: fake.mean() - real.mean(),
    lambda real, fake: -fake.mean(),
)
least_squares = AdversarialLoss(
    "least_squares",
    False,
    lambda real, fake: (real - 1).square().mean() / 2 + fake.square().mean() / 2,
    lambda real, fake: (fake - 1).square().mean() / 2,
)
relativistic = AdversarialLoss(
    "relativistic",
    True,
    lambda real, fake: softplus(fake - real).mean(),
    lambda real, fake: softplus(real - fake).mean(),
)
relativistic_average = AdversarialLoss(
    "relativistic_average",
    True,
    _relativistic_average,
    lambda real, fake: _relativistic_average(fake, real),
)

_LOSSES = {
    loss.name: loss
    for loss in (
        non_saturating,
        hinge,
        wasserstein,
        least_squares,
        relativistic,
        relativistic_average,
    )
}


def loss_named(name: str) -> AdversarialLoss:
    """Return one of the six losses by its name.

    Args:
        name: see the table of :class:`AdversarialLoss`.

    Returns:
        The object of that name in this module.

    Raises:
        ValueError: for another name.

    Example:
        >>> from cln_tutorial.gan_architectures.losses import loss_named
        >>> loss_named("relativistic").needs_real
        True
    """
    if name not in _LOSSES:
        raise ValueError(f"`name` must be one of {', '.join(_LOSSES)}; got {name!r}.")
    return _LOSSES[name]


def r1(D: Callable[..., Tensor], x: Images, y: Tensor | None = None) -> Float[Tensor, ""]:
    r"""Return the mean squared norm of the discriminator's gradient at real images.

    .. math:: R_1 = \frac1N \sum_i \lVert \nabla_{x_i} D(x_i) \rVert^2

    Without the factor :math:`\gamma/2` that a trainer puts before it. The gradient is that of the
    *sum* of the logits; that of their mean would make the penalty :math:`N^2` times smaller. With
    batch statistics in the discriminator it also holds what one image does to the logits of the
    others: use none there.

    The gradients of the penalty reach the parameters of the discriminator, not ``x``. Under
    autocast the discriminator runs in float32 here, because differentiating twice in half precision
    loses small gradients. Without gradients (``no_grad``) it is a figure to look at.

    Args:
        D: ``D(x)`` or ``D(x, y)`` returns logits ``(N,)``; several per image are added up.
        x: images ``(N, *event)``, any floating dtype; they need not require a gradient.
        y: handed on to ``D`` if it is given.

    Returns:
        A number with a graph; float32 for half types.

    Raises:
        TypeError, ValueError: for other dtypes, no image, not one row of logits per image, or
            logits that do not depend on the images.

    Source:
        Mescheder, Geiger & Nowozin 2018, equation 9.

    Example:
        >>> from cln_tutorial.gan_architectures.losses import r1
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> r1(lambda x: x.square().sum(1) / 2, x).item()  # the gradient is x: (1 + 4) / 2
        2.5
    """
    _require_images("x", x)
    return _gradients(D, x, y).square().sum(1).mean()


def r2(D: Callable[..., Tensor], x: Images, y: Tensor | None = None) -> Float[Tensor, ""]:
    r"""Return the same as :func:`r1`, to be taken at fake images.

    .. math:: R_2 = \frac1N \sum_i \lVert \nabla_{x_i} D(x_i) \rVert^2, \qquad x_i = G(z_i)

    Args:
        D: as in :func:`r1`.
        x: fake images ``(N, *event)``. No gradient reaches the generator that made them.
        y: handed on to ``D`` if it is given.

    Returns:
        A number with a graph; float32 for half types.

    Raises:
        TypeError, ValueError: as :func:`r1`.

    Source:
        Mescheder, Geiger & Nowozin 2018, equation 10.

    Example:
        >>> from cln_tutorial.gan_architectures.losses import r2
        >>> r2(lambda x: 3 * x.sum(1), torch.zeros(4, 2)).item()  # 3**2 for each coordinate
        18.0
    """
    return r1(D, x, y)


def gradient_penalty(
    D: Callable[..., Tensor],
    real: Images,
    fake: Images,
    *,
    target: float | int = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Pull the norm of the discriminator's gradient to a target between real and fake images.

    .. math:: \frac1N \sum_i \bigl(\lVert \nabla D(\hat x_i) \rVert - t\bigr)^2, \qquad
        \hat x_i = u_i x_i + (1 - u_i)\, G(z_i), \quad u_i \sim U(0, 1)

    Without the factor, which is 10 in the paper. One :math:`u` per pair of images. Where the
    gradient is 0, so is that of its norm. What :func:`r1` says of batch statistics, autocast and
    ``no_grad`` holds here too.

    Args:
        D: ``D(x)`` returns logits ``(N,)``; for a conditional one give ``lambda x: D(x, y)``.
        real: images ``(N, *event)``, any floating dtype.
        fake: as many of the same shape and dtype. No gradient reaches the generator.
        target: the norm :math:`t` to be had, at least 0.
        generator: source of :math:`u`; None is PyTorch's global one.

    Returns:
        A number with a graph; float32 for half types.

    Raises:
        TypeError, ValueError: as :func:`r1`, for images that do not fit together, or a negative
            target.

    Source:
        Gulrajani et al. 2017 (arXiv 1704.00028), algorithm 1.

    Example:
        >>> from cln_tutorial.gan_architectures.losses import gradient_penalty
        >>> real, fake = torch.ones(2, 3), torch.zeros(2, 3)
        >>> gradient_penalty(lambda x: 2 * x[:, 0], real, fake).item()  # (2 - 1)**2
        1.0
    """
    for name, images in (("real", real), ("fake", fake)):
        _require_images(name, images)
    if real.shape != fake.shape or real.dtype != fake.dtype or real.device != fake.device:
        raise ValueError(
            f"`real` and `fake` must agree in shape, dtype and device; got "
            f"{tuple(real.shape)} {real.dtype} {real.device} and "
            f"{tuple(fake.shape)} {fake.dtype} {fake.device}."
        )
    if not 0 <= target < float("inf"):
        raise ValueError(f"`target` must be finite and at least 0; got {target}.")
    wide = wide_dtype(real.dtype)
    device = real.device if generator is None else generator.device
    shape = (len(real), *[1] * (real.ndim - 1))
    u = torch.rand(shape, generator=generator, device=device, dtype=wide).to(real.device)
    between = torch.lerp(fake.detach().to(wide), real.detach().to(wide), u)
    norms = torch.linalg.vector_norm(_gradients(D, between.to(real.dtype), None), dim=1)
    return (norms - target).square().mean()


def _require_images(name: str, x: Tensor) -> None:
    require_floating(name, x)
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"`{name}` must be images (N, *event); got shape {tuple(x.shape)}.")


def _gradients(D: Callable[..., Tensor], x: Tensor, y: Tensor | None) -> Float[Tensor, "batch dim"]:
    """Return the gradient of the sum of the logits, a row per image."""
    with_graph, kind = torch.is_grad_enabled(), x.device.type
    autocast = torch.is_autocast_enabled(kind)
    in_full = torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext()
    with torch.enable_grad(), in_full:
        x = x.detach().to(wide_dtype(x.dtype) if autocast else x.dtype).requires_grad_()
        seen = x.clone()  # which a discriminator may change in place
        logits = D(seen) if y is None else D(seen, y)
        require_floating("D(x)", logits)
        if logits.ndim < 1 or len(logits) != len(x):
            raise ValueError(
                f"`D` must return logits per image, shape ({len(x)},), for images of shape "
                f"{tuple(x.shape)}; got {tuple(logits.shape)}."
            )
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(
                logits.sum(), x, create_graph=with_graph, allow_unused=True
            )
    if gradient is None:
        raise ValueError("`D` must return logits that depend on the images, with their graph.")
    return gradient.flatten(1).to(wide_dtype(gradient.dtype))
