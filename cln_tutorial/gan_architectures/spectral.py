r"""What a convolution really does to the length of an image, beside what its reshaped kernel says.

Spectral normalisation divides by the largest singular value of the kernel reshaped to a matrix.
That is the operator's own only for kernels of one pixel: the kernel's windows overlap.

Source: Su Jianlin, article 6549 (https://kexue.fm/archives/6549), 2019; Miyato et al. 2018;
Sedghi, Gupta & Long 2019; Tsuzuku, Sato & Sugiyama 2018.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

from cln_tutorial._dtypes import require_floating, wide_dtype

Pair = int | tuple[int, int]


def conv_operator_norm(
    weight: Float[Tensor, "out in kernel_height kernel_width"],
    input_size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    boundary: str = "zero",
    n_iter: int = 200,
    tol: float | int = 1e-6,
) -> Float[Tensor, ""]:
    r"""Compute the operator norm of a convolution on images of one size.

    .. math:: \|K\| = \max_{x \ne 0} \frac{\|K * x\|_2}{\|x\|_2}

    Differentiable once: the gradient is that of :math:`\|K * v\|` with the best image :math:`v`
    held fixed, which is exact where the largest singular value is single.

    With boundary "circular" and stride 1 the Fourier transform splits the operator into one small
    matrix per frequency, and the result is exact. Otherwise the largest singular value is looked
    for from a fixed random image by Lanczos' method, power iteration that forgets nothing: it
    comes from below, to a relative ``tol``. That takes gradients, which ``torch.inference_mode()``
    does not give.

    Args:
        weight: kernel as in ``F.conv2d``, ``(out, in, k_h, k_w)``.
        input_size: height and width of the image, or its side.
        stride: as in ``F.conv2d``.
        padding: as in ``F.conv2d``. At a "circular" boundary it shifts the image and changes
            nothing.
        boundary: "zero", or "circular": the image goes on from its other side, and each axis has
            its size divided by the stride in outputs.
        n_iter: largest number of iterations.
        tol: relative accuracy; not below 16 roundings of the dtype.

    Returns:
        The norm, a scalar of the dtype of ``weight``, computed in float32 or better.

    Raises:
        ValueError: if the kernel does not fit, the boundary has another name, the stride does not
            divide the size of a circular image, or ``weight`` is not finite.
        TypeError: for a kernel that is not floating.

    Warns:
        RuntimeWarning: if ``n_iter`` iterations have not reached ``tol``.

    Source:
        Sedghi, Gupta & Long 2019, arXiv 1805.10408, for the circular one.

    Example:
        >>> ones = torch.ones(1, 1, 3, 3)
        >>> norm = conv_operator_norm(ones, 16, boundary="circular")
        >>> f"{norm:.2f}"  # and 3 is what the reshaped kernel says
        '9.00'
        >>> f"{conv_operator_norm(ones, 16, padding=1):.2f}"
        '8.80'
    """
    size, stride, padding = _checked(weight, input_size, stride, padding)
    if n_iter < 1:
        raise ValueError(f"`n_iter` must be at least 1; got {n_iter}.")
    if boundary not in ("zero", "circular"):
        raise ValueError(f"`boundary` must be 'zero' or 'circular'; got {boundary!r}.")
    if not weight.isfinite().all():
        raise ValueError("`weight` must be finite; got infinite or NaN entries.")
    wide, kernel = weight.to(wide_dtype(weight.dtype)), weight.shape[-2:]
    if boundary == "circular":
        if any(k > n or n % s for k, n, s in zip(kernel, size, stride, strict=True)):
            raise ValueError(
                f"`input_size` must hold the kernel and be divisible by the stride at a circular "
                f"boundary; got {size} for kernel {tuple(kernel)} and stride {stride}."
            )
        if stride == (1, 1):
            per_frequency = torch.fft.rfft2(wide, size).permute(2, 3, 0, 1)
            return torch.linalg.matrix_norm(per_frequency, 2).amax().to(weight.dtype)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        if boundary == "zero":
            return F.conv2d(x, weight, None, stride, padding)
        # Not F.pad(mode="circular"): this far it may go once around.
        x = torch.cat([x, x[..., : kernel[0] - 1, :]], -2)
        return F.conv2d(torch.cat([x, x[..., : kernel[1] - 1]], -1), weight, None, stride)

    fixed = wide.detach()
    start = _random_like(fixed, (1, weight.shape[1], *size))
    with torch.autocast(weight.device.type, enabled=False):
        best = _most_stretched(lambda x: convolve(x, fixed), start, n_iter, tol)
        return _length(convolve(best, wide)).to(weight.dtype)


def operator_norm_bounds(
    weight: Float[Tensor, "out in kernel_height kernel_width"],
    stride: Pair = 1,
    *,
    input_size: Pair | None = None,
    padding: Pair = 0,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""Bound the operator norm by that of the reshaped kernel, :math:`\sigma`, from both sides.

    .. math:: \sigma \le \|K\| \le \sigma\sqrt{\lceil k_h/s_h\rceil\lceil k_w/s_w\rceil}

    Below, an image that fills one window; above, no pixel is in more windows than that. Both ends
    are attained. The lower one needs a window that lies inside the image with all its pixels: where
    zeros are part of each, as on the smallest maps of a discriminator, there is none but 0.

    Args:
        weight: kernel as in ``F.conv2d``, ``(out, in, k_h, k_w)``.
        stride: as in ``F.conv2d``.
        input_size: height and width of the image, or its side. ``None`` is large enough.
        padding: zeros on each side.

    Returns:
        Lower and upper bound, scalars of the dtype of ``weight``.

    Raises:
        ValueError: for a kernel that does not fit on the padded image, or sizes that are none.
        TypeError: for a kernel that is not floating.

    Source:
        Upper bound as in Tsuzuku, Sato & Sugiyama 2018, arXiv 1802.04034; the condition of the
        lower one is ours.

    Example:
        >>> low, high = operator_norm_bounds(torch.ones(1, 1, 3, 3))
        >>> f"{low:.2f} {high:.2f}"
        '3.00 9.00'
    """
    size, stride, padding = _checked(weight, input_size, stride, padding)
    kernel = weight.shape[-2:]
    matrix = weight.to(wide_dtype(weight.dtype)).flatten(1)
    sigma = torch.linalg.matrix_norm(matrix, 2).to(weight.dtype)
    windows = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    inside = size is None or all(
        -(-p // s) * s - p + k <= n
        for k, s, p, n in zip(kernel, stride, padding, size, strict=True)
    )
    return sigma if inside else torch.zeros_like(sigma), sigma * math.sqrt(windows)


def lipschitz_bound(module: nn.Module, input_size: int | tuple[int, ...]) -> float:
    r"""Bound how much faster than its input the output of a discriminator can change.

    .. math:: \|D(x) - D(y)\|_2 \le L\,\|x - y\|_2, \qquad L = \prod_l \|A_l\|

    The module is run once on a copy, and each operation multiplies the bound by its own: the true
    operator norm of convolutions, linear layers, means, sums, average pooling and BatchNorm in
    ``eval()``, on the maps that they get; the largest slope of an activation; of max pooling the
    root of the number of windows over a pixel. Where branches are added, so are their bounds. What
    the module draws at random counts as a constant.

    Args:
        module: any module of such operations, in the mode in which it stands.
        input_size: shape of one input without the batch; or the side of a square image with the
            channels of the first convolution.

    Returns:
        The bound, to the five digits to which the norms are known.

    Raises:
        ValueError: for BatchNorm that uses the statistics of the batch (its slope is
            :math:`1/\sigma`, without limit), dropout in training, and whatever else has no bound
            here, as products of two activations, numbers read out of a tensor, or writing into a
            constant; the message names the operation and the module. For weights that are not
            finite.

    Warns:
        RuntimeWarning: if 200 iterations have not sufficed for a norm.

    Source:
        Miyato et al. 2018, arXiv 1802.05957, section 2.1, with the norms of the operators.

    Example:
        >>> critic = nn.Sequential(nn.Conv2d(1, 1, 1), nn.LeakyReLU(0.2), nn.AvgPool2d(2))
        >>> _ = nn.init.constant_(critic[0].weight, 6.0)
        >>> f"{lipschitz_bound(critic, 8):.4f}"
        '3.0000'
    """
    like = next(module.parameters(), torch.empty(()))
    like = like.new_empty((), dtype=wide_dtype(like.dtype))
    module = copy.deepcopy(module).to(like.dtype).requires_grad_(False)
    x = torch.zeros(1, *_input_shape(module, input_size), dtype=like.dtype, device=like.device)
    x = x.requires_grad_().clone()  # a clone may be changed in place
    bounds = _Bounds(x, module)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False), bounds:
        out = module(x)
    bound = bounds.of(out)
    if not out.isfinite().all():
        raise ValueError(
            "`module` must answer finite numbers; a black image has infinite or NaN ones."
        )
    return bound


def operator_spectral_norm(
    module: nn.Conv2d, input_size: Pair, *, n_power_iterations: int = 1
) -> nn.Conv2d:
    r"""Divide the kernel of a convolution by the operator norm it has on images of one size.

    .. math:: \bar W = W / \sigma, \qquad \sigma = \|W * v\|_2

    where :math:`v` follows the most stretched image by power iteration on the convolution itself,
    each time the weight is read in training. A drop-in beside
    ``torch.nn.utils.parametrizations.spectral_norm``: the same life in ``train()`` and ``eval()``,
    with :math:`\sigma` in the gradient. But it starts at the norm, and the convolution, not the
    reshaped kernel, is what gets norm 1. Wrap two forward passes in
    ``torch.nn.utils.parametrize.cached()`` to read the weight once.

    Args:
        module: with padding mode "zeros"; stride, dilation and groups as they are.
        input_size: height and width of its images, or their side. On others the norm is another.
        n_power_iterations: per reading, in training. They take gradients, which
            ``torch.inference_mode()`` does not give.

    Returns:
        ``module``, with the parametrisation of ``weight``. Its buffer ``_v``, one image, is part of
        ``state_dict()``.

    Raises:
        ValueError: for another padding mode, a kernel that does not fit, weights that are not
            finite, or no iterations.
        TypeError: for another module; of linear layers torch's own norm is the operator's.

    Example:
        >>> conv = operator_spectral_norm(nn.Conv2d(3, 8, 3, padding=1), 16)
        >>> f"{conv_operator_norm(conv.eval().weight, 16, padding=1).item():.4f}"
        '1.0000'
    """
    if not isinstance(module, nn.Conv2d):
        raise TypeError(
            f"`module` must be an nn.Conv2d; got {type(module).__name__}. A linear layer has its "
            f"operator norm from torch.nn.utils.parametrizations.spectral_norm."
        )
    if module.padding_mode != "zeros":
        raise ValueError(f"`module` must pad with zeros; got {module.padding_mode!r}.")
    if n_power_iterations < 1:
        raise ValueError(f"`n_power_iterations` must be at least 1; got {n_power_iterations}.")
    # The padding of "same" holds any kernel.
    padding = {"valid": 0, "same": 2**31}.get(module.padding, module.padding)
    size, _, _ = _checked(module.weight, input_size, module.stride, padding, module.dilation)
    options = module.stride, module.padding, module.dilation, module.groups
    norm = _OperatorNorm(module.weight.detach(), size, options, n_power_iterations)
    parametrize.register_parametrization(module, "weight", norm)
    return module


class _OperatorNorm(nn.Module):
    """Weight over the length of its answer to ``_v``, an image of length 1."""

    def __init__(
        self, weight: Tensor, size: tuple[int, int], options: tuple[Any, ...], n_iterations: int
    ):
        super().__init__()
        self.options, self.n_iterations = options, n_iterations
        weight = weight.to(wide_dtype(weight.dtype))
        start = _random_like(weight, (1, weight.shape[1] * options[-1], *size))
        best = _most_stretched(lambda x: self._convolve(x, weight), start, 200, 1e-5)
        self.register_buffer("_v", best)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with operator norm 1, as far as ``_v`` knows."""
        with torch.autocast(weight.device.type, enabled=False):
            wide, _ = _scaled(weight.to(wide_dtype(weight.dtype)))
            if self.training:
                self._iterate(wide.detach())
            # A copy: a second forward pass moves `_v` before the first one's backward pass.
            image = self._v.to(wide.dtype, copy=True)
            sigma = torch.linalg.vector_norm(self._convolve(image, wide))
            return (wide / sigma.clamp(min=1e-12)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a new weight as it is."""
        return weight

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> None:
        for _ in range(self.n_iterations):
            image = _gram(lambda x: self._convolve(x, weight), self._v.to(weight.dtype))
            # In place, for replicas that share the buffer.
            self._v.copy_(F.normalize(image.flatten(), dim=0).view_as(image))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, *self.options)


def _gram(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a linear map and its transpose: the gradient of half the squared length."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = apply(x)
        return torch.autograd.grad(out, x, out.detach())[0]


@torch.no_grad()
def _most_stretched(
    apply: Callable[[Tensor], Tensor], start: Tensor, n_iter: int, tol: float
) -> Tensor:
    """Find the input of length 1 that a linear map makes longest (Lanczos on its Gram operator)."""
    basis = start.new_empty(min(n_iter, start.numel()), start.numel())
    tridiagonal = start.new_zeros(len(basis) + 1, len(basis) + 1)
    basis[0] = start.flatten() / start.norm()
    tol = max(tol, 16 * torch.finfo(start.dtype).eps)
    _, scale = _scaled(apply(start))
    for n in range(1, len(basis) + 1):
        image = _gram(lambda x: apply(x) / scale, basis[n - 1].view_as(start)).flatten()
        if not image.isfinite().all():
            raise ValueError("`module` must have finite weights, far from the smallest numbers.")
        known = basis[:n]
        tridiagonal[n - 1, n - 1] = image @ known[-1]
        for _ in range(2):  # twice is enough
            image = image - known.T @ (known @ image)
        rest = image.norm()
        values, vectors = torch.linalg.eigh(tridiagonal[:n, :n])
        accuracy = rest * vectors[-1, -1].abs() / values[-1].clamp(min=1e-30)
        if accuracy <= tol:
            break
        tridiagonal[n, n - 1] = tridiagonal[n - 1, n] = rest
        if n < len(basis):
            basis[n] = image / rest
    else:
        if n_iter < start.numel():
            warnings.warn(
                f"the largest singular value is known to a relative {accuracy.item():.1g} after "
                f"{n_iter} iterations, not to {tol:.1g}.",
                RuntimeWarning,
                stacklevel=4,
            )
    return (known.T @ vectors[:, -1]).view_as(start)


class _Bounds(TorchFunctionMode):
    """Follows the tensors that depend on the input, and how fast each can change with it."""

    def __init__(self, x: Tensor, module: nn.Module):
        super().__init__()
        self.known = {id(x): (x, 1.0)}  # with the tensor: an address alone is used again
        self.inside: list[str] = []
        for name, part in module.named_modules():
            part.register_forward_pre_hook(self._enter(name or type(module).__name__))
            part.register_forward_hook(self._leave)

    def of(self, tensor: Tensor) -> float:
        """Return the bound of a tensor."""
        if id(tensor) not in self.known:
            raise ValueError(self._message("an operation that PyTorch does not announce"))
        return self.known[id(tensor)][1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        # Nothing else needs a gradient, so these are all that depend on the input.
        places = [
            n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not places or _ABOUT_SHAPES.fullmatch(_name(func)):
            return func(*args, **kwargs)
        bounds = [self.of(leaves[place]) for place in places]
        name = func.__name__.strip("_")
        if name in _TRAINING:
            given = args[_TRAINING[name] :] or [kwargs.get("training", name == "dropout")]
            if given[0]:
                raise ValueError(self._message(f"{name} in training"))
        if name not in _SLOPES and not _is_affine(name, args, kwargs, places):
            raise ValueError(self._message(_name(func)))
        versions = [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]
        out = func(*args, **kwargs)
        written = [leaf for leaf, version in versions if leaf._version != version]
        if (
            not (isinstance(out, Tensor) and out.requires_grad)
            or out.dtype != leaves[places[0]].dtype
            or not all(map(self._is_only_known_as, written))
        ):
            raise ValueError(self._message(f"{_name(func)}, and hides what depends on it"))
        if name in _SLOPES:
            bound = _SLOPES[name](*args, **kwargs) * bounds[0]
        else:
            norms = [_norm_of_part(func, leaves, structure, places, place) for place in places]
            bound = sum(n * b for n, b in zip(norms, bounds, strict=True))
        self.known[id(out)] = out, bound
        return out

    def _is_only_known_as(self, tensor: Tensor) -> bool:
        """Not a constant, nor the memory of another tensor too."""
        memory = tensor.untyped_storage().data_ptr()
        same = [t for t, _ in self.known.values() if t.untyped_storage().data_ptr() == memory]
        return len(same) == 1 and same[0] is tensor

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.inside.append(name)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.inside.pop()

    def _message(self, what: str) -> str:
        where = self.inside[-1] if self.inside else "`module`"
        return f"`module` must be made of operations with a bound; {where} runs {what}."


_SLOPES: dict[str, Callable[..., float | int]] = {
    "relu": lambda x, inplace=False: 1,
    "leaky_relu": lambda x, negative_slope=0.01, inplace=False: max(1, abs(negative_slope)),
    "tanh": lambda x: 1,
    "sigmoid": lambda x: 0.25,
    "max_pool2d": lambda *args, **kwargs: math.sqrt(_windows_over_a_pixel(*args, **kwargs)),
}
_AFFINE = re.compile(
    "add|r?sub|neg|cat|sum|mean|(adaptive_)?avg_pool2d|interpolate|dropout|pad|pixel_shuffle|"
    "flatten|reshape|view|(un)?squeeze|getitem|permute|transpose|contiguous|clone|to"
)
_AFFINE_IN_ONE = re.compile("mul|addcmul|matmul|linear|conv2d|conv_transpose2d")
_AFFINE_IN_THE_FIRST = re.compile("div|batch_norm")
_TRAINING = {"batch_norm": 5, "dropout": 2}  # of the argument, in torch and in F
_ABOUT_SHAPES = re.compile(
    r"torch\.Tensor\.((shape|ndim|dtype|device|is_cuda)\.__get__|size|dim|numel|__len__"
    r"|is_floating_point|is_contiguous)"
)


def _is_affine(name: str, args: Any, kwargs: Any, places: list[int]) -> bool:
    """Whether an operation is affine in all its arguments at ``places`` together."""
    if _AFFINE_IN_ONE.fullmatch(name):
        return len(places) == 1
    if _AFFINE_IN_THE_FIRST.fullmatch(name):
        return places == [0] and len(args) > 0 and "rounding_mode" not in kwargs
    return _AFFINE.fullmatch(name) is not None


def _name(func: Callable[..., Any]) -> str:
    return resolve_name(func) or func.__name__


def _windows_over_a_pixel(
    x: Tensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0,
    dilation: Pair = 1, **others: bool,
) -> int:  # fmt: skip
    per_axis = zip(_pair(kernel_size), _pair(stride or kernel_size), _pair(dilation), strict=True)
    # Dilated windows over one pixel may be as many as they have pixels.
    return math.prod(-(-k // s) if d == 1 else k for k, s, d in per_axis)


def _norm_of_part(
    func: Callable[..., Tensor], leaves: list[Any], structure: Any, places: list[int], place: int
) -> float:
    """Of an operation that is affine in its arguments at ``places``, the norm in one of them."""
    inputs = list(leaves)
    for other in places:
        inputs[other] = torch.zeros_like(leaves[other])
    x = inputs[place].requires_grad_()
    inputs[place] = x.clone()  # it may be changed in place
    args, kwargs = tree_unflatten(inputs, structure)
    out = func(*args, **kwargs)
    # The derivative of the transpose: in op(x) - op(0) a large bias would swallow small weights.
    back = torch.zeros_like(out).requires_grad_()
    (transposed,) = torch.autograd.grad(out, x, back, create_graph=True)

    def apply(x: Tensor) -> Tensor:
        return torch.autograd.grad(transposed, back, x, create_graph=True)[0]

    best = _most_stretched(apply, _random_like(x.detach(), x.shape), 200, 1e-5)
    return _length(apply(best)).item()


def _input_shape(module: nn.Module, input_size: int | tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(input_size, int):
        return tuple(input_size)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            return part.in_channels, input_size, input_size
    raise ValueError(
        f"`input_size` must be the shape of one input where there is no convolution; got "
        f"{input_size} for {type(module).__name__}."
    )


def _checked(
    weight: Tensor, input_size: Pair | None, stride: Pair, padding: Pair, dilation: Pair = 1
) -> tuple[tuple[int, int] | None, tuple[int, int], tuple[int, int]]:
    require_floating("weight", weight)
    if weight.ndim != 4 or weight.numel() == 0:
        raise ValueError(f"`weight` must be (out, in, k_h, k_w); got {tuple(weight.shape)}.")
    stride, padding = _pair(stride), _pair(padding)
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"`{name}` must be at least {least}, once or twice; got {pair}.")
    if input_size is None:
        return None, stride, padding
    size = _pair(input_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"`input_size` must be at least 1, once or twice; got {size}.")
    kernel = tuple(d * (k - 1) + 1 for k, d in zip(weight.shape[-2:], _pair(dilation), strict=True))
    if any(k > n + 2 * p for k, n, p in zip(kernel, size, padding, strict=True)):
        raise ValueError(
            f"`input_size` must hold the kernel {kernel} with the padding {padding}; got {size}."
        )
    return size, stride, padding


def _pair(value: Pair) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the largest entry, and give that too: the squares of small ones would be 0."""
    scale = x.detach().abs().amax()
    scale = torch.where(scale > 0, scale, 1)
    return x / scale, scale


def _length(x: Tensor) -> Tensor:
    x, scale = _scaled(x)
    return scale * torch.linalg.vector_norm(x)


def _random_like(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same numbers each time, and on each device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
