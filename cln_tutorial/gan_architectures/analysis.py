r"""What an architecture does before it has learnt anything: checkerboards, reach, Dirac's GAN.

Source: Su Jianlin, article 6549 (https://kexue.fm/archives/6549), 2019; Odena, Dumoulin & Olah
2016 (checkerboards); Mescheder, Geiger & Nowozin 2018 (Dirac GAN).
"""

import bisect
import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial.gan_architectures.batches import require_count

_CONSTANT = 16  # pixels: kernels that span 7 of them see no border from the middle
_MAPS = (64, 128, 256)  # sizes on which a reach is looked for


def overlap_count(k: int, s: int, p: int = 0) -> Int64[np.ndarray, "s s"]:
    r"""Count the taps that meet in each output pixel of a transposed convolution.

    .. math:: c_j = \lceil (k - r)/s \rceil, \qquad r = (j + p) \bmod s

    per axis; a pixel has the product of both. The gradient that a strided convolution sends to its
    input is a transposed convolution, so the same table holds for it: a discriminator writes its
    checkerboard into the generator. Independent weights of equal variance give outputs whose
    variance follows this table. A flat one (``k % s == 0``) is necessary against checkerboards and
    not sufficient: see ``phase_response``.

    Args:
        k: kernel size.
        s: stride.
        p: padding, as in ``nn.ConvTranspose2d``.

    Returns:
        The tile ``(s, s)`` that repeats over the inner pixels. Its rows and columns are those of
        the output modulo ``s``.

    Raises:
        ValueError: for a kernel or a stride below 1, or a negative padding.

    Source:
        Odena, Dumoulin & Olah 2016, https://distill.pub/2016/deconv-checkerboard.

    Example:
        >>> overlap_count(3, 2, p=1)
        array([[1, 2],
               [2, 4]])
        >>> overlap_count(4, 2)
        array([[4, 4],
               [4, 4]])
    """
    require_count("k", k, 1)
    require_count("s", s, 1)
    require_count("p", p, 0)
    phase = np.arange(p, p + s) % s
    per_axis = -((phase - k) // s)
    return np.outer(per_axis, per_axis)


def phase_response(
    upsampler: Callable[[Tensor], Tensor],
    in_channels: int,
    n_trials: int,
    generator: torch.Generator,
) -> float:
    r"""Measure how much of an upsampler's answer to constant images is a checkerboard.

    .. math:: \frac{\sum_r (y_r - \bar y)^2}{\sum_r y_r^2}

    where :math:`y_r` are the :math:`s^2` values (phases) that repeat over the inner output; both
    sums go over all images and output channels too. Independent weights make the phases
    independent, whence :math:`1 - 1/s^2` in expectation for **every** kernel of at least ``s``,
    overlap flat or not. Nearest neighbours with a convolution behind them, or pixel shuffling with
    equal kernels (ICNR), give 0.

    Args:
        upsampler: module or function from ``(n, in_channels, h, w)`` to a map that grows by ``s``
            pixels per input pixel, linear up to a bias (which does not count). Of a module a copy
            in float64 and ``eval()`` is asked, on the CPU; a function gets the default dtype.
        in_channels: channels of the input.
        n_trials: constant images to draw; each channel of each has a normal level.
        generator: source of the levels, on the CPU.

    Returns:
        The share, from 0 to 1; 0 for an upsampler that answers nothing.

    Raises:
        ValueError: if there is nothing to draw, the answer to an image is not in proportion to it,
            or the inner output does not repeat with the stride: the kernel reaches from the middle
            of 16 pixels to their border.

    Source:
        Closed form ours; equal kernels after Aitken et al. 2017, arXiv 1707.02937.

    Example:
        >>> resize = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1))
        >>> phase_response(resize, 8, 10, torch.Generator().manual_seed(0)) < 1e-25
        True
    """
    require_count("in_channels", in_channels, 1)
    require_count("n_trials", n_trials, 1)
    dtype = torch.get_default_dtype()
    if isinstance(upsampler, nn.Module):
        upsampler, dtype = _copy_to_ask(upsampler), torch.float64
    levels = torch.randn(n_trials, in_channels, 1, 1, generator=generator).to(dtype)
    nothing = levels.new_zeros(1, in_channels, _CONSTANT, _CONSTANT)
    with torch.no_grad():
        silence = upsampler(nothing)
        s = upsampler(F.pad(nothing, (0, 1, 0, 1))).shape[-1] - silence.shape[-1]
        images = levels.expand(-1, -1, *nothing.shape[-2:])
        response, opposite = (upsampler(x) - silence for x in (images, -2 * images))
    if s < 1:
        raise ValueError(
            f"`upsampler` must give a larger map for a larger image; got {tuple(silence.shape)} "
            f"for {tuple(nothing.shape)}, and {s} pixels more for one more."
        )
    top, left = ((side - 2 * s) // 2 for side in response.shape[-2:])
    phases = response[..., top : top + s, left : left + s].double()
    neighbours = response[..., top + s : top + 2 * s, left + s : left + 2 * s].double()
    off, largest = (phases - neighbours).abs().max(), phases.abs().max()
    tolerance = 1e-4 * response.abs().max()  # far above the rounding of float32
    if (opposite + 2 * response).abs().max() > tolerance:
        raise ValueError(
            "`upsampler` must be linear up to a bias; its answer to twice is not twice."
        )
    if off > 1e-4 * largest:
        raise ValueError(
            f"`upsampler` must repeat itself every {s} pixels inside a constant image; got "
            f"differences of {off / largest:.1g} of the largest value. Does its kernel reach the "
            f"border from the middle of {_CONSTANT} pixels?"
        )
    phases = phases.flatten(-2)
    ripple = (phases - phases.mean(-1, keepdim=True)).square().sum()
    return 0.0 if largest == 0 else (ripple / phases.square().sum()).item()


def nyquist_energy(img: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch"]:
    r"""Measure the share of an image's energy that alternates from pixel to pixel.

    .. math:: \frac{\sum_{f \in \mathcal N} |\hat x_f|^2}{\sum_{f \ne 0} |\hat x_f|^2}

    :math:`\mathcal N` are the frequencies with one half per pixel along at least one axis. It is 1
    for any pattern that changes its sign with every row or column, 0 for an image that is constant,
    and :math:`(h+w-1)/(hw-1)` in expectation for white noise.

    Args:
        img: ``(*batch, height, width)``, with even sides.

    Returns:
        One share per image, ``(*batch,)``, in float32 for half types.

    Raises:
        ValueError: for an odd side: its spectrum has no such frequency.
        TypeError: for an image that is not floating.

    Example:
        >>> stripes = torch.tensor([1.0, -1.0]).repeat(8, 4)
        >>> nyquist_energy(stripes)
        tensor(1.)
    """
    require_floating("img", img)
    if img.ndim < 2 or img.shape[-2] % 2 or img.shape[-1] % 2:
        raise ValueError(
            f"`img` must end in an even height and an even width; got {tuple(img.shape)}."
        )
    img = img.to(wide_dtype(img.dtype))
    largest = img.abs().amax((-2, -1), keepdim=True)
    img = img / torch.where(largest > 0, largest, 1)  # squares would over- or underflow
    img = img - img.mean((-2, -1), keepdim=True)
    energy = torch.fft.fft2(img).abs().square()
    alternates = torch.zeros(img.shape[-2:], dtype=torch.bool, device=img.device)
    alternates[img.shape[-2] // 2, :] = True
    alternates[:, img.shape[-1] // 2] = True
    whole = energy.sum((-2, -1))
    return (energy * alternates).sum((-2, -1)) / torch.where(whole == 0, 1, whole)


def receptive_field(layers: nn.Module | Sequence[tuple[int, ...]]) -> int:
    r"""Count the input pixels, along one axis, that one output unit can see.

    .. math:: R = 1 + \sum_i d_i (k_i - 1) \prod_{j<i} s_j

    for a chain of layers. A module may be anything that gives a map: branches, pooling, layers of
    others. There the first rows of the image are made NaN, more and more of them, until the unit
    in the middle becomes NaN as well, whatever the weights are; then the last rows; then columns.

    Args:
        layers: ``(k, s)`` or ``(k, s, dilation)`` per layer, from the image on; or a module from
            ``(1, channels, h, w)`` to ``(1, c, h', w')``, of which a copy is asked, in float64 and
            ``eval()``, on the CPU.

    Returns:
        The side in pixels; of a module the longer one.

    Raises:
        ValueError: for a layer that is none, for a module that gives no map, or one in which the
            unit in the middle of 256 pixels sees the border, as behind attention.

    Example:
        >>> receptive_field([(4, 2)] * 4)
        46
        >>> receptive_field(nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        8
    """
    if isinstance(layers, nn.Module):
        return _measured_reach(_copy_to_ask(layers))
    reach, jump = 1, 1
    for number, layer in enumerate(layers):
        if len(layer) not in (2, 3) or min(layer) < 1:
            raise ValueError(
                f"`layers[{number}]` must be (kernel, stride) or (kernel, stride, dilation), each "
                f"at least 1; got {layer}."
            )
        kernel, stride, dilation = (*layer, 1)[:3]
        reach += dilation * (kernel - 1) * jump
        jump *= stride
    return reach


def dirac_gan(
    h: float | int,
    gamma: float | int,
    steps: int,
    *,
    alternating: bool = False,
    theta0: float | int = 1.0,
    psi0: float | int = 0.0,
    loss: str = "minimax",
) -> Float64[Tensor, "points 2"]:
    r"""Train the smallest GAN: data at 0, a generator that emits :math:`\theta`, a linear judge.

    .. math::
        \theta \leftarrow \theta - h\,\psi f'(\theta\psi), \qquad
        \psi \leftarrow \psi + h\,\big(\theta f'(\theta\psi) - \gamma\psi\big)

    for :math:`D(x) = \psi x` and :math:`\min_\theta\max_\psi f(\theta\psi) + f(0)` with the R1
    penalty :math:`\tfrac\gamma2\psi^2`. Without it simultaneous steps multiply
    :math:`\theta^2+\psi^2` by :math:`1+h^2f'(\theta\psi)^2` each. Alternating ones stay on an
    orbit, near the origin with the angle :math:`\cos\varphi = 1 - h^2f'(0)^2/2` per step, and an
    average of the weights with decay :math:`d` on one that is smaller by
    :math:`(1-d)/|1-de^{-i\varphi}|`. With the penalty the flow at the origin has the eigenvalues
    :math:`\lambda = -\gamma/2 \pm \sqrt{\gamma^2/4 - f'(0)^2}`, and a simultaneous step
    :math:`1 + h\lambda`: fastest at :math:`\gamma = 2f'(0)`, slower again beyond.

    Args:
        h: step size.
        gamma: strength of the penalty.
        steps: how many.
        alternating: whether :math:`\psi` already sees the new :math:`\theta`.
        theta0, psi0: the start.
        loss: "minimax", :math:`f(t) = -\log(1+e^{-t})` with :math:`f'(0) = 1/2`; "wasserstein",
            :math:`f(t) = t`; or "non_saturating", where :math:`\theta` follows
            :math:`f'(-\theta\psi)` instead.

    Returns:
        The path :math:`(\theta, \psi)` with the start, ``(steps + 1, 2)``, float64, on the CPU.

    Raises:
        ValueError: for a step size that is not positive, a negative penalty or number of steps, or
            another loss.

    Source:
        Mescheder, Geiger & Nowozin 2018, arXiv 1801.04406, sections 2 and 4.

    Example:
        >>> path = dirac_gan(0.1, 1.0, 200)
        >>> path[-1].norm() < 1e-2 * path[0].norm()
        tensor(True)
    """
    if not h > 0:
        raise ValueError(f"`h` must be positive; got {h}.")
    if not gamma >= 0:
        raise ValueError(f"`gamma` must be at least 0; got {gamma}.")
    require_count("steps", steps, 0)
    if loss not in _SLOPES:
        raise ValueError(f"`loss` must be one of {', '.join(_SLOPES)}; got {loss!r}.")
    generator_slope, judge_slope = _SLOPES[loss]
    theta, psi = float(theta0), float(psi0)
    path = [(theta, psi)]
    for _ in range(steps):
        moved = theta - h * psi * generator_slope(theta * psi)
        seen = moved if alternating else theta
        psi += h * (seen * judge_slope(seen * psi) - gamma * psi)
        theta = moved
        path.append((theta, psi))
    return torch.tensor(path, dtype=torch.float64)


def _falling(t: float) -> float:
    return 0.5 - 0.5 * math.tanh(t / 2)  # 1 / (1 + e^t) that never overflows


_SLOPES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "minimax": (_falling, _falling),
    "non_saturating": (lambda t: _falling(-t), _falling),
    "wasserstein": (lambda t: 1.0, lambda t: 1.0),
}


def _measured_reach(module: nn.Module) -> int:
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    channels = convolutions[0].in_channels if convolutions else 1
    problem = None
    for size in _MAPS:
        image = torch.zeros(1, channels, size, size, dtype=torch.float64)
        try:
            reach = [_reach_along(axis, module, image) for axis in (-2, -1)]
        except RuntimeError as error:  # too small for it, perhaps
            problem = error
            continue
        if None not in reach:
            return max(reach)
    raise ValueError(
        f"`layers` must give a map in which the unit in the middle does not see the border of "
        f"{_MAPS[-1]} pixels; {type(module).__name__} does not. Leave out its head, or give "
        f"(kernel, stride) of its layers."
    ) from problem


def _reach_along(axis: int, module: nn.Module, image: Tensor) -> int | None:
    """Rows or columns that the unit in the middle sees; None if it sees the border."""
    size = image.shape[axis]

    def is_seen(start: int, count: int) -> bool:
        poisoned = image.clone()
        poisoned.narrow(axis, start, count).fill_(torch.nan)
        with torch.no_grad():
            out = module(poisoned)
        if out.ndim != 4:
            raise ValueError(
                f"`layers` must give a map (1, c, h, w); {type(module).__name__} gave "
                f"{tuple(out.shape)}. Leave out its head."
            )
        return bool(out[..., out.shape[-2] // 2, out.shape[-1] // 2].isnan().any())

    if is_seen(0, 1) or is_seen(size - 1, 1):
        return None
    counts = range(size + 1)
    before = bisect.bisect_left(counts, True, key=lambda n: is_seen(0, n)) - 1
    behind = bisect.bisect_left(counts, True, key=lambda n: is_seen(size - n, n)) - 1
    return size - before - behind


def _copy_to_ask(module: nn.Module) -> nn.Module:
    """In float64, where a convolution is a sum of products: faster algorithms mix neighbours."""
    return copy.deepcopy(module).to("cpu", torch.float64).eval()
