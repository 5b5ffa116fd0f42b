"""What generators and discriminators are built of: upsampling, residual blocks, self-attention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cln_tutorial.gan_architectures._batch_norm import FusedNorm2d
from cln_tutorial.gan_architectures._conditions import (
    require_maps,
    require_one_of,
    require_sizes,
)

UPSAMPLERS = ("nearest", "bilinear", "deconv4", "pixel_shuffle")
DOWNSAMPLERS = ("average", "none")

# Makes a norm: called as norm(channels, activation="relu", upsample=1 or 2, device=, dtype=).
NormFactory = Callable[..., nn.Module]


class SelfAttention2d(nn.Module):
    r"""Self-attention over the positions of an image, added with a gain that starts at 0.

    .. math:: y = x + g\,W_o \sum_j a_{ij} W_v x_j, \qquad
        a_{ij} = \mathrm{softmax}_j\big((W_q x_i)^\top W_k x_j\big)

    With :math:`g=0` the layer is the identity, so it can be put into any network. This is what
    SAGAN's code does, not what its paper says: keys and values are max-pooled to a quarter of the
    positions, values are ``channels // 2`` wide, and a last 1x1 convolution :math:`W_o` leads back.
    The scores are not divided by the root of their width.

    Args:
        channels: of input and output.
        key_channels, value_channels: widths of queries and keys, and of values; ``None`` for
            ``channels // 8`` and ``channels // 2``, at least 1.
        pool: max-pool keys and values with windows of 2x2; a last odd row or column is left out.
        spectral: give the four convolutions a spectral norm of 1, as SAGAN does.
        device, dtype: of the parameters ``query``, ``key``, ``value``, ``out`` and ``gain``.

    Raises:
        ValueError: if a number of channels is below 1.

    Source: Zhang et al. 2019, Self-Attention GANs (arXiv 1805.08318), and its public code.

    Example:
        >>> attention, x = SelfAttention2d(16), torch.randn(2, 16, 8, 8)
        >>> y, weights = attention(x, need_weights=True)
        >>> y.equal(x), weights.shape  # 64 queries look at 16 pooled keys
        (True, torch.Size([2, 64, 16]))
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        pool: bool = True,
        spectral: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        key_channels = max(1, channels // 8) if key_channels is None else key_channels
        value_channels = max(1, channels // 2) if value_channels is None else value_channels
        require_sizes(channels=channels, key_channels=key_channels, value_channels=value_channels)
        super().__init__()
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.query = nn.Conv2d(channels, key_channels, 1, **factory)
        self.key = nn.Conv2d(channels, key_channels, 1, **factory)
        self.value = nn.Conv2d(channels, value_channels, 1, **factory)
        self.out = nn.Conv2d(value_channels, channels, 1, **factory)
        self.gain = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        self.pool = pool
        if spectral:
            for convolution in (self.query, self.key, self.value, self.out):
                spectral_norm(convolution)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], *, need_weights: bool = False
    ) -> (
        Float[Tensor, "batch channels height width"]
        | tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch queries keys"]]
    ):
        """Return the image with what it attends to; with ``need_weights`` also the map.

        The map has a row per position of ``x``, row by row, and each row sums to 1 over the keys.
        """
        require_maps(x, self.query.in_channels)
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.pool:
            if min(x.shape[2:]) < 2:
                raise ValueError(f"`x` must be 2x2 or larger to be pooled; got {tuple(x.shape)}.")
            key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
        # Written out, because the fused attention of PyTorch cannot be differentiated twice (R1).
        scores = query.flatten(2).transpose(1, 2) @ key.flatten(2)
        weights = scores.softmax(dim=-1)
        attended = value.flatten(2) @ weights.transpose(1, 2).to(value.dtype)
        y = x + self.gain * self.out(attended.unflatten(2, x.shape[2:]))
        return (y, weights) if need_weights else y

    def extra_repr(self) -> str:
        """Return what ``print`` shows beside the convolutions."""
        return f"pool={self.pool}"


class FusedBatchNorm2d(FusedNorm2d):
    r"""Batch norm with what follows it in a generator: activation and upsampling, in one pass.

    .. math:: \mathrm{out} = \mathrm{up}\,\mathrm{act}\Big(\gamma
        \frac{h - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta\Big)

    Parameters, running statistics and ``state_dict`` are those of ``nn.BatchNorm2d``; in a
    half-precision module the running statistics stay in float32. This is the member of the family
    without a condition, beside :class:`~cln_tutorial.gan_architectures.ModulatedNorm2d`. PyTorch's
    ``convert_sync_batchnorm`` and ``fuse_conv_bn_eval`` would drop activation and upsampling
    without a word: leave them.

    Args:
        num_features: channels C.
        eps, momentum: as in ``nn.BatchNorm2d``.
        activation: ``None``, "relu" or "leaky_relu".
        negative_slope: of "leaky_relu".
        upsample: 1, or 2 for nearest-neighbour upsampling behind the activation.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a size or a name makes no sense.

    Source: article 6549.

    Example:
        >>> x = torch.randn(4, 8, 5, 5)
        >>> y, plain = FusedBatchNorm2d(8, activation="relu")(x), nn.BatchNorm2d(8)(x)
        >>> torch.allclose(y, plain.relu(), atol=1e-5)
        True
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float | int = 1e-5,
        momentum: float | int | None = 0.1,
        activation: str | None = None,
        negative_slope: float | int = 0.2,
        upsample: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            affine=True,
            track_running_stats=True,
            eps=eps,
            momentum=momentum,
            activation=activation,
            negative_slope=negative_slope,
            upsample=upsample,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, input: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        """Normalise, activate and upsample ``input``."""
        require_maps(input, self.num_features)
        return self._batch_norm(input, self.weight, self.bias)


def upsampling_conv(
    kind: str,
    in_channels: int,
    out_channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    r"""Make a layer that doubles height and width and changes the channels.

    "nearest" and "bilinear" resize and convolve with 3x3; "deconv4" is a transposed convolution
    with kernel 4 and stride 2; "pixel_shuffle" convolves with 3x3 to four times the channels and
    moves them into space, initialised by :func:`icnr_`. For a constant input the first two and the
    last give four equal phases in the interior, a random "deconv4" gives a checkerboard.

    Args:
        kind: one of the four.
        in_channels, out_channels: of the images.
        device, dtype: of the parameters.

    Returns:
        A module from ``(batch, in_channels, height, width)`` to
        ``(batch, out_channels, 2 * height, 2 * width)``.

    Raises:
        ValueError: if ``kind`` is another, or a number of channels is below 1.

    Source: article 6549; Odena et al. 2016, Deconvolution and Checkerboard Artifacts.

    Example:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> {upsampling_conv(kind, 8, 3)(x).shape for kind in ["bilinear", "deconv4"]}
        {torch.Size([2, 3, 8, 8])}
    """
    require_one_of("kind", kind, UPSAMPLERS)
    require_sizes(in_channels=in_channels, out_channels=out_channels)
    factory = {"device": device, "dtype": dtype}
    if kind == "deconv4":
        return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, **factory)
    if kind == "pixel_shuffle":
        convolution = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1, **factory)
        icnr_(convolution.weight), icnr_(convolution.bias)
        return nn.Sequential(convolution, nn.PixelShuffle(2))
    resize = nn.Upsample(scale_factor=2, mode=kind)
    return nn.Sequential(resize, nn.Conv2d(in_channels, out_channels, 3, padding=1, **factory))


@torch.no_grad()
def icnr_(weight: Tensor, upscale_factor: int = 2) -> Tensor:
    r"""Give the phases of a pixel shuffle the same kernel, in place.

    .. math:: W_{c s^2 + r} \leftarrow W_{c s^2}, \qquad r = 0, \dots, s^2 - 1

    The layer then starts as a convolution with nearest-neighbour upsampling behind it, and makes no
    checkerboard. The kernels that stay keep the distribution that they were drawn from. Do the
    same to the bias: a random one alone makes a checkerboard.

    Args:
        weight: of the convolution before ``nn.PixelShuffle``, or its bias; the first axis has the
            output channels.
        upscale_factor: that of the pixel shuffle, :math:`s`.

    Returns:
        The tensor ``weight`` itself.

    Raises:
        ValueError: if the output channels are no multiple of the squared factor.

    Source: Aitken et al. 2017, Checkerboard artifact free sub-pixel convolution (arXiv 1707.02937).

    Example:
        >>> icnr_(torch.arange(8.0))
        tensor([0., 0., 0., 0., 4., 4., 4., 4.])
    """
    require_sizes(upscale_factor=upscale_factor)
    phases = upscale_factor**2
    if weight.ndim == 0 or weight.shape[0] % phases:
        raise ValueError(
            f"`weight` must have a multiple of {phases} output channels for `upscale_factor` "
            f"{upscale_factor}; got shape {tuple(weight.shape)}."
        )
    return weight.copy_(weight[::phases].repeat_interleave(phases, dim=0))


class ResBlockUp(nn.Module):
    r"""Residual block of a generator, which doubles height and width.

    .. math:: y = W_s\,\mathrm{up}(x) + \alpha f(x), \qquad
        f(x) = W_2\,\mathrm{ReLU}\,N_2\,W_1\,\mathrm{up}\,\mathrm{ReLU}\,N_1\,x

    The activation comes before the convolutions, and never in place: that would turn the shortcut
    into that of ReLU(x). The 1x1 convolution of the shortcut runs before the upsampling, which is
    the same and four times cheaper.

    Args:
        in_channels, out_channels: of the images.
        norm: makes a norm, as ``norm(channels, activation="relu", upsample=2)`` with ``device``
            and ``dtype``: for example ``partial(ConditionalBatchNorm2d, num_classes=10)``. ``None``
            for ReLU alone.
        resample: "nearest", "bilinear", "deconv4" or "pixel_shuffle", as :func:`upsampling_conv`.
            The shortcut takes "nearest" beside the last two.
        residual_scale: :math:`\alpha`; the article recommends less than 1, such as 0.1, for
            stability.
        device, dtype: of the parameters.

    Raises:
        ValueError: if ``resample`` is another, or a number of channels is below 1.

    Source: article 6549; Miyato et al. 2018 (arXiv 1802.05957), appendix B.

    Example:
        >>> ResBlockUp(8, 4)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: NormFactory | None = None,
        resample: str = "nearest",
        residual_scale: float | int = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_one_of("resample", resample, UPSAMPLERS)
        require_sizes(in_channels=in_channels, out_channels=out_channels)
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.first = NormConv(in_channels, out_channels, norm=norm, resample=resample, **factory)
        self.second = NormConv(out_channels, out_channels, norm=norm, resample=None, **factory)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, **factory)
        self.mode = "bilinear" if resample == "bilinear" else "nearest"
        self.residual_scale = residual_scale

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"], *condition: Tensor
    ) -> Float[Tensor, "batch out_channels height_out width_out"]:
        """Return the upsampled image; both norms get ``condition``, which ``norm`` defines."""
        require_maps(x, self.shortcut.in_channels)
        h = self.second(self.first(x, *condition), *condition)
        shortcut = F.interpolate(self.shortcut(x), scale_factor=2, mode=self.mode)
        return shortcut + self.residual_scale * h

    def extra_repr(self) -> str:
        """Return what ``print`` shows beside the layers."""
        return f"shortcut={self.mode!r}, residual_scale={self.residual_scale}"


class ResBlockDown(nn.Module):
    r"""Residual block of a discriminator, which halves height and width by average pooling.

    .. math:: y = W_s\,\mathrm{down}(x) + \alpha\,\mathrm{down}\,f(x), \qquad
        f(x) = W_2\,\mathrm{ReLU}\,N_2\,W_1\,\mathrm{ReLU}\,N_1\,x

    The activation comes before the convolutions, and never in place: that would turn the shortcut
    into that of ReLU(x). The 1x1 convolution of the shortcut runs behind the pooling, which is the
    same and four times cheaper.

    Args:
        in_channels, out_channels: of the images.
        norm: makes a norm, as in :class:`ResBlockUp`; ``None`` for ReLU alone.
        resample: "average", or "none" to keep the size. Without a change of size and channels the
            shortcut is the identity.
        preactivation: whether N₁ and ReLU stand at the beginning. They do not in the first block
            of a network: a ReLU on the image would throw its dark half away.
        residual_scale: :math:`\alpha`.
        device, dtype: of the parameters.

    Raises:
        ValueError: if ``resample`` is another, or a number of channels is below 1.

    Source: article 6549; Miyato et al. 2018 (arXiv 1802.05957), appendix B.

    Example:
        >>> ResBlockDown(4, 8)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: NormFactory | None = None,
        resample: str = "average",
        preactivation: bool = True,
        residual_scale: float | int = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_one_of("resample", resample, DOWNSAMPLERS)
        require_sizes(in_channels=in_channels, out_channels=out_channels)
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        before = norm if preactivation else nn.Identity
        self.first = NormConv(in_channels, out_channels, norm=before, resample=None, **factory)
        self.second = NormConv(out_channels, out_channels, norm=norm, resample=None, **factory)
        self.down = nn.AvgPool2d(2) if resample == "average" else nn.Identity()
        same = in_channels == out_channels and resample == "none"
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, **factory)
        )
        self.residual_scale = residual_scale

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels height_out width_out"]:
        """Return the image with half the height and width, or the same with "none"."""
        require_maps(x, self.first.conv.in_channels)
        h = self.down(self.second(self.first(x)))
        return self.shortcut(self.down(x)) + self.residual_scale * h

    def extra_repr(self) -> str:
        """Return what ``print`` shows beside the layers."""
        return f"residual_scale={self.residual_scale}"


class NormConv(nn.Module):
    """Norm with ReLU, then a convolution that upsamples, unless ``resample`` is ``None``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: NormFactory | None,
        resample: str | None,
        **factory: torch.device | str | torch.dtype | None,
    ) -> None:
        super().__init__()
        options = {"activation": "relu", **factory}
        if resample is None:
            self.norm = activated(norm, in_channels, **options)
            self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, **factory)
        elif norm is not None and resample == "nearest":  # the norm repeats the pixels itself
            self.norm = norm(in_channels, upsample=2, **options)
            self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, **factory)
        else:
            self.norm = activated(norm, in_channels, **options)
            self.conv = upsampling_conv(resample, in_channels, out_channels, **factory)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"], *condition: Tensor
    ) -> Float[Tensor, "batch out_channels height_out width_out"]:
        """Return the convolved maps; the norm gets ``condition``."""
        return self.conv(self.norm(x, *condition))


def activated(
    norm: NormFactory | None,
    channels: int,
    activation: str = "relu",
    **factory: torch.device | str | torch.dtype | None,
) -> nn.Module:
    """Return a norm with the activation in it, or the activation alone."""
    if norm is not None:
        return norm(channels, activation=activation, **factory)
    return nn.ReLU() if activation == "relu" else nn.LeakyReLU(0.2)
