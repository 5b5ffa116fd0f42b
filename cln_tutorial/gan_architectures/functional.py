"""The norms as pure functions: checks of the arguments, above one family of operations."""

import torch
from jaxtyping import Float
from torch import Tensor

import cln_tutorial.gan_architectures.fused as fused
from cln_tutorial._dtypes import require_floating, wide_dtype
from cln_tutorial.gan_architectures._conditions import require_sizes

ACTIVATIONS = (None, "relu", "leaky_relu")


def modulated_batch_norm(
    x: Float[Tensor, "batch channels height width"],
    gamma: Float[Tensor, "... channels"],
    beta: Float[Tensor, "... channels"],
    running_mean: Float[Tensor, "channels"] | None = None,
    running_var: Float[Tensor, "channels"] | None = None,
    *,
    training: bool,
    momentum: float | int = 0.1,
    eps: float | int = 1e-5,
    gain_offset: float | int = 1.0,
    activation: str | None = None,
    negative_slope: float | int = 0.2,
    upsample: int = 1,
    backend: str = "auto",
) -> Float[Tensor, "batch channels out_height out_width"]:
    r"""Normalise each channel over the batch, then scale and shift as each sample's condition says.

    .. math:: y_{nchw} = f\!\left(\frac{x_{nchw} - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}
        \,(1 + \gamma_{nc}) + \beta_{nc}\right) \qquad (\sigma^2 \text{ biased})

    All samples share :math:`\mu` and :math:`\sigma`, whatever their conditions are. Activation
    :math:`f` and nearest upsampling belong to the same pass over the memory.

    Args:
        x: ``(batch, channels, height, width)``, any floating dtype.
        gamma, beta: one vector per sample ``(batch, channels)``, or one for all ``(channels,)``, of
            any floating dtype; zero leaves the plain norm.
        running_mean, running_var: ``(channels,)``, as the buffers of ``nn.BatchNorm2d``. In
            training they move in place, the variance with the unbiased one of the batch; else
            they are what normalises.
        training: whether the statistics are those of the batch.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.
        gain_offset: the 1 of :math:`1 + \gamma`, added in float32.
        activation: ``None``, "relu" or "leaky_relu".
        negative_slope: of the leaky ReLU, zero or positive.
        upsample: 1, or 2 for maps of twice the height and width.
        backend: one of :func:`available_norm_backends`, or "auto" for the fastest on this input.
            Inside the transforms of ``torch.func``, forward-mode AD and for second derivatives
            every backend is the reference. Only the reference keeps channels last in memory.

    Returns:
        The dtype of ``x``, ``(batch, channels, upsample * height, upsample * width)``. Half types
        are computed in float32. An empty batch gives an empty result out of training.

    Raises:
        TypeError: if a tensor is not of a floating dtype, or ``momentum`` is no number.
        ValueError: if shapes or devices do not fit, a channel has less than two values in
            training, or an option is unknown or cannot take this input.

    Source: article 6549; de Vries et al. 2017 (arXiv 1707.00683), equation 5; Chen et al. 2019
    (arXiv 1810.01365).

    Example:
        >>> x = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
        >>> gamma, beta = torch.tensor([[0.0], [9.0]]), torch.zeros(1)
        >>> modulated_batch_norm(x, gamma, beta, training=True, eps=0.0).flatten().tolist()
        [-1.0, 10.0]
    """
    kind = _kind(x, gamma, beta, eps, gain_offset, activation, negative_slope, upsample)
    _require_statistics(x, running_mean, running_var, training, momentum)
    statistics = fused.Statistics(running_mean, running_var, training, float(momentum))
    return fused.norm(x, gamma, beta, statistics, kind, backend)


def modulated_instance_norm(
    x: Float[Tensor, "batch channels height width"],
    gamma: Float[Tensor, "... channels"],
    beta: Float[Tensor, "... channels"],
    *,
    eps: float | int = 1e-5,
    gain_offset: float | int = 1.0,
    activation: str | None = None,
    negative_slope: float | int = 0.2,
    upsample: int = 1,
    backend: str = "auto",
) -> Float[Tensor, "batch channels out_height out_width"]:
    r"""Normalise each map of each sample on its own, then scale and shift (AdaIN).

    .. math:: y_{nchw} = f\!\left(\frac{x_{nchw} - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}}
        \,(1 + \gamma_{nc}) + \beta_{nc}\right)

    Arguments and result are those of :func:`modulated_batch_norm`; there are no running statistics,
    and training is no different. The result is contiguous.

    Raises:
        TypeError: if a tensor is not of a floating dtype.
        ValueError: as there, and for maps of only one spatial element: they would be normalised
            to 0, and ``x`` be lost.

    Source: Huang & Belongie 2017 (arXiv 1703.06868), equation 8.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2)
        >>> modulated_instance_norm(x, torch.ones(1), torch.ones(1), eps=0.0).flatten().tolist()
        [-1.0, 3.0]
    """
    kind = _kind(x, gamma, beta, eps, gain_offset, activation, negative_slope, upsample)
    batch, channels, height, width = x.shape
    if height * width == 1:
        raise ValueError(
            f"`x` {tuple(x.shape)} has only one spatial element in each map: normalised it would "
            f"be 0, and the result `beta` whatever `x` is. Leave the norm out at this size."
        )
    if batch == 0:  # any fixed statistics give the empty result
        zero = x.new_zeros(channels)
        statistics = fused.Statistics(zero, zero, training=False, momentum=0.0)
        return fused.norm(x, gamma, beta, statistics, kind, backend)
    # All maps of all samples as channels of one: its batch norm is the instance norm.
    one_sample = x.reshape(1, batch * channels, height, width)
    gamma, beta = (value.expand(batch, channels).reshape(1, -1) for value in (gamma, beta))
    statistics = fused.Statistics(None, None, training=True, momentum=0.0)
    y = fused.norm(one_sample, gamma, beta, statistics, kind, backend)
    return y.reshape(batch, channels, *y.shape[2:])


def pixel_norm(
    x: Float[Tensor, "*shape"], dim: int = 1, eps: float | int = 1e-8
) -> Float[Tensor, "*shape"]:
    r"""Divide by the root mean square of the channels, at each position.

    .. math:: y_{nchw} = x_{nchw} \big/ \sqrt{\tfrac1C \textstyle\sum_k x_{nkhw}^2 + \epsilon}

    Args:
        x: any shape and floating dtype.
        dim: the dimension of the channels.
        eps: added to the mean square.

    Returns:
        Shape and dtype of ``x``. Half types are computed in float32, in which 300² is a number.

    Raises:
        TypeError: if ``x`` is not of a floating dtype.
        ValueError: if ``eps`` is negative or there is no such dimension.

    Source: Karras et al. 2018 (arXiv 1710.10196), section 4.2.

    Example:
        >>> pixel_norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), eps=0.0).tolist()  # divided by 5 / 2
        [[1.2000000476837158, 1.600000023841858, 0.0, 0.0]]
    """
    require_floating("x", x)
    _require_eps(eps)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"`dim` must be a dimension of `x` {tuple(x.shape)}; got {dim}.")
    wide = x.to(wide_dtype(x.dtype))
    return (wide * (wide.square().mean(dim, keepdim=True) + eps).rsqrt()).to(x.dtype)


def minibatch_std(
    x: Float[Tensor, "batch channels height width"],
    group_size: int = 4,
    num_channels: int = 1,
    eps: float | int = 1e-8,
) -> Float[Tensor, "batch more_channels height width"]:
    r"""Append how much the samples of a group differ, as constant maps.

    .. math:: s_{gk} = \operatorname{mean}_{c \in k,\,h,\,w}
        \sqrt{\operatorname{var}_{n \in g}(x_{nchw}) + \epsilon} \qquad (\text{biased})

    Each group of samples gets one number for each group of channels. A group holds every
    ``batch / group``-th sample: of a batch sorted by label the numbers depend on the classes.

    Args:
        x: ``(batch, channels, height, width)``, any floating dtype.
        group_size: the most samples in a group. The largest divisor of the batch that is not above
            it is taken, so that no batch is refused.
        num_channels: how many maps to append; divides the channels.
        eps: added to the variance. Identical samples give its root, and a finite gradient.

    Returns:
        The dtype of ``x``, ``(batch, channels + num_channels, height, width)``.

    Raises:
        TypeError: if ``x`` is not of a floating dtype.
        ValueError: if ``x`` has not four dimensions, ``eps`` is negative, ``group_size`` is no
            whole number of 1 or more, or ``num_channels`` does not divide the channels.

    Source: Karras et al. 2018 (arXiv 1710.10196), section 3; groups as in Karras et al. 2020
    (arXiv 1912.04958).

    Example:
        >>> x = torch.tensor([1.0, 3.0, 5.0, 5.0]).reshape(4, 1, 1, 1)
        >>> minibatch_std(x, group_size=2, eps=0.0).flatten(1).tolist()  # groups (1, 5) and (3, 5)
        [[1.0, 2.0], [3.0, 1.0], [5.0, 2.0], [5.0, 1.0]]
    """
    _require_maps(x)
    _require_eps(eps)
    batch, channels, height, width = x.shape
    require_sizes(group_size=group_size, num_channels=num_channels)
    if channels % num_channels:
        raise ValueError(
            f"`num_channels` must divide the {channels} channels of `x`; got {num_channels}."
        )
    if batch == 0:
        return x.new_empty(0, channels + num_channels, height, width)
    group = next(n for n in range(min(group_size, batch), 0, -1) if batch % n == 0)
    wide = x.to(wide_dtype(x.dtype))
    shape = group, batch // group, num_channels, channels // num_channels, height, width
    deviation = (wide.reshape(shape).var(0, correction=0) + eps).sqrt().mean((2, 3, 4))
    maps = deviation.to(x.dtype).repeat(group, 1)[:, :, None, None]
    return torch.cat([x, maps.expand(-1, -1, height, width)], 1)


def available_norm_backends() -> tuple[str, ...]:
    """Names of the backends of the modulated norms that this machine can run.

    "reference": plain operations of PyTorch, differentiable twice, on every device. "native": few
    calls of PyTorch's own norms, float32 and float64 on the CPU. "numba": one compiled loop, the
    same dtypes, needs the extra ``fast``.

    Returns:
        Some of "reference", "native", "numba".

    Example:
        >>> set(available_norm_backends()) >= {"reference", "native"}
        True
    """
    names = (name for name in fused.BACKENDS if not fused.missing(name))
    return tuple(name for name in names if fused.imports(name))


# --- checks ---------------------------------------------------------------------------------------


def _kind(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float | int,
    gain_offset: float | int,
    activation: str | None,
    negative_slope: float | int,
    upsample: int,
) -> fused.Kind:
    _require_maps(x)
    _require_eps(eps)
    # Every call pays for these checks, 4 µs of the 24 that the smallest norm takes.
    per_sample, device = x.shape[:2], x.device
    for name, value in (("gamma", gamma), ("beta", beta)):
        require_floating(name, value)
        if value.shape != per_sample and value.shape != per_sample[1:]:
            raise ValueError(
                f"`{name}` must hold one vector per sample, {tuple(per_sample)}, or one for all, "
                f"{tuple(per_sample[1:])}, for `x` {tuple(x.shape)}; got {tuple(value.shape)}."
            )
        if value.device != device:
            _refuse_device(name, value, x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {ACTIVATIONS}; got {activation!r}.")
    if not negative_slope >= 0:
        raise ValueError(f"`negative_slope` must be zero or positive; got {negative_slope}.")
    if not isinstance(upsample, int) or upsample not in (1, 2):
        raise ValueError(f"`upsample` must be 1 or 2; got {upsample!r}.")
    slope = 1.0 if activation is None else 0.0 if activation == "relu" else float(negative_slope)
    return fused.Kind(float(eps), float(gain_offset), slope, upsample)


def _require_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | int,
) -> None:
    if running_mean is not None and running_var is not None:
        channels, device = x.shape[1:2], x.device
        for name, value in (("running_mean", running_mean), ("running_var", running_var)):
            require_floating(name, value)
            if value.shape != channels:
                raise ValueError(
                    f"`{name}` must be {tuple(channels)} for `x` {tuple(x.shape)}; got "
                    f"{tuple(value.shape)}."
                )
            if value.device != device:
                _refuse_device(name, value, x)
    elif running_mean is not running_var:
        raise ValueError("`running_mean` and `running_var` belong together; got only one of them.")
    elif not training:
        raise ValueError("`running_mean` and `running_var` are needed with `training=False`.")
    if not isinstance(momentum, (float, int)):
        raise TypeError(f"`momentum` must be a number in 0..1; got {momentum!r}.")
    if not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` must lie in 0..1; got {momentum}.")
    batch, _, height, width = x.shape
    if training and batch * height * width <= 1:
        raise ValueError(
            f"`x` {tuple(x.shape)} has {batch * height * width} values in each channel; training "
            f"needs more than 1, to have a variance."
        )


def _require_maps(x: Tensor) -> None:
    require_floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"`x` must be (batch, channels, height, width); got {tuple(x.shape)}.")


def _require_eps(eps: float | int) -> None:
    if not eps >= 0:
        raise ValueError(f"`eps` must be zero or positive; got {eps}.")


def _refuse_device(name: str, value: Tensor, x: Tensor) -> None:
    raise ValueError(f"`{name}` is on {value.device}, `x` on {x.device}; write `.to(x.device)`.")
