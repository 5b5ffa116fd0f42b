"""Generators and discriminators: DCGAN, SNDCGAN and ResNet, with any norm of the family."""

import itertools
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cln_tutorial.gan_architectures._conditions import of_classes, require_one_of, require_sizes
from cln_tutorial.gan_architectures._construction import (
    BY_LABEL,
    BY_NOISE,
    Draw,
    draw_seed,
    generator_norm,
    initialise_,
    noise_part,
    normal,
    orthogonal,
    plain_norm,
    require_discriminator,
    require_dtype,
    require_images,
    require_labels,
    require_noise,
    truncated,
    weighted_layers,
    widths_from_4x4,
)
from cln_tutorial.gan_architectures.blocks import (
    NormConv,
    ResBlockDown,
    ResBlockUp,
    SelfAttention2d,
    activated,
)


class ModulatedGenerator(nn.Module):
    """What the generators share: noise, maps of 4x4, one modulated stage after the other, tanh.

    Not to be made itself: take :class:`DCGANGenerator` or :class:`ResNetGenerator`. All have
    ``image_size``, ``channels``, ``z_dim`` and ``num_classes`` as they were made, and
    ``num_modulated``, the number of layers that noise modulates, each a module of ``stages``.

    Source: article 6549.

    Example:
        >>> G = ResNetGenerator(16, 1, z_dim=8, width=4, norm="selfmod")
        >>> isinstance(G, ModulatedGenerator), G.num_modulated  # two blocks and the last norm
        (True, 3)
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        z_dim: int,
        norm: str,
        num_classes: int | None,
        split_latent: bool,
        attention_at: int | None,
        widths: list[int],
        stages: list[nn.Module],
        draw: Draw,
        seed: int,
        **factory: torch.device | str | torch.dtype | None,
    ) -> None:
        sizes = [4 * 2**i for i in range(len(stages))]
        if attention_at is not None:
            require_one_of("attention_at", attention_at, sizes)
        super().__init__()
        self.image_size, self.channels, self.z_dim = image_size, channels, z_dim
        self.norm, self.num_classes, self.split_latent = norm, num_classes, split_latent
        self.num_modulated = len(stages) if norm in BY_NOISE or split_latent else 0
        part = noise_part(z_dim, split_latent, len(stages))
        self.dense = nn.Linear(part, widths[0] * 16, **factory)
        self.attention, self._attention_before = None, None
        if attention_at is not None:
            self._attention_before = sizes.index(attention_at)
            width = widths[self._attention_before]
            self.attention = SelfAttention2d(width, spectral=False, **factory)
        self.stages = nn.ModuleList(stages)
        self.shared = None
        if norm == "cbn" and split_latent:
            self.shared = nn.Embedding(num_classes, z_dim, **factory)
        initialise_(self, draw, seed)

    def forward(
        self,
        z: Float[Tensor, "batch z_dim"],
        y: Int[Tensor, "batch"] | Float[Tensor, "batch num_classes"] | None = None,
        *,
        truncation: float | int | None = None,
        layer_z: Mapping[int, Tensor] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        r"""Return images in [-1, 1].

        Args:
            z: standard normal noise, ``(N, z_dim)``.
            y: labels ``(N,)`` of int64, or floating weights ``(N, K)`` of a mixture of classes; if
                and only if the generator has ``num_classes``.
            truncation: threshold :math:`t > 0`. The noise then follows the normal distribution
                truncated to :math:`[-t, t]`: fewer odd images, and less variety. BigGAN resamples
                what lies outside; here each entry moves to its quantile of the same distribution,
                where :math:`\mathrm{erf}(z'/\sqrt2)` is :math:`\mathrm{erf}(t/\sqrt2)` times
                :math:`\mathrm{erf}(z/\sqrt2)`. It needs no draw, and a path of ``z`` stays one.
            layer_z: another noise ``(N, z_dim)`` for some of the ``num_modulated`` layers that
                noise modulates, ``{layer: noise}``, counted from 0 next to the noise: mixes styles.
                The layer's part of it is taken with ``split_latent``.

        Returns:
            Images ``(N, channels, image_size, image_size)``.

        Raises:
            TypeError: if the dtype of an argument is another one.
            ValueError: if a shape does not fit, ``y`` is missing or not wanted, ``truncation`` is
                not positive, or ``layer_z`` names a layer that noise does not modulate.
        """
        layer_z = {} if layer_z is None else layer_z
        self._require_usable(z, y, truncation, layer_z)
        if truncation is not None:
            z = truncated(z, truncation)
            layer_z = {layer: truncated(other, truncation) for layer, other in layer_z.items()}
        x = self.dense(self._part(z, 0)).unflatten(1, (-1, 4, 4))
        for layer, stage in enumerate(self.stages):
            if layer == self._attention_before:
                x = self.attention(x)
            noise = self._part(layer_z.get(layer, z), layer + 1)
            x = stage(x, *self._condition(noise, y))
        return x.tanh()

    def extra_repr(self) -> str:
        """Name the norm, and what it is given."""
        split = ", split_latent=True" if self.split_latent else ""
        return f"z_dim={self.z_dim}, num_classes={self.num_classes}, norm={self.norm!r}{split}"

    def _part(self, z: Tensor, index: int) -> Tensor:
        return z.chunk(len(self.stages) + 1, dim=1)[index] if self.split_latent else z

    def _condition(self, z: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        if self.shared is not None:
            return (torch.cat([z, *of_classes(y, self.shared.weight)], dim=1),)
        by_noise = (z,) if self.norm in BY_NOISE else ()
        return (*by_noise, y) if self.norm in BY_LABEL else by_noise

    def _require_usable(
        self,
        z: Tensor,
        y: Tensor | None,
        truncation: float | int | None,
        layer_z: Mapping[int, Tensor],
    ) -> None:
        require_dtype("z", z, self.dense.bias)
        for name, noise in {"z": z, **{f"layer_z[{k}]": v for k, v in layer_z.items()}}.items():
            require_noise(name, noise, (len(z), self.z_dim), self.dense.bias)
        require_labels(y, self.num_classes, len(z), self.dense.bias)
        if truncation is not None and not truncation > 0:
            raise ValueError(f"`truncation` must be greater than 0; got {truncation!r}.")
        if unknown := [layer for layer in layer_z if layer not in range(self.num_modulated)]:
            raise ValueError(
                f"`layer_z` names layers {unknown}: with `norm` {self.norm!r} noise modulates "
                f"{self.num_modulated} layers of this generator, counted from 0."
            )


class DCGANGenerator(ModulatedGenerator):
    r"""Generator of DCGAN: each stage normalises, activates, and convolves to twice the size.

    .. math:: x_0 = \mathrm{dense}(z), \qquad x_{i+1} = W_i\,\mathrm{ReLU}\,N_i(x_i \mid z, y),
        \qquad G = \tanh x_k

    From 4x4 to ``image_size`` these are 1 to 4 stages; the last convolution, to the image, has no
    norm behind it. At 16 pixels with ``width=32``: 4x4x64, 8x8x32, 16x16. Weights start from
    N(0, 0.02), as in the paper, and do not depend on ``norm``: with the same seed SELF-MOD, CBN and
    BN generators begin as the same function. Noise also enters at the bottom, whatever the norm,
    so that "adain" is StyleGAN without its learned constant and its mapping network.

    Args:
        image_size: 8, 16, 32 or 64.
        channels: of the image.
        z_dim: length of the noise.
        width: channels before the last convolution; they double towards 4x4.
        norm: N, and what modulates it: "bn" (nothing), "cbn" (the label), "selfmod" (the noise),
            "selfmod+label", "adain" (instance norm, the noise), "layer" (layer norm without
            condition) or "none".
        num_classes: for "cbn" and "selfmod+label".
        split_latent: BigGAN's: 4x4 and each layer get a part of the noise of their own. With
            "cbn" its part and an embedding of the label that all layers share modulate a layer,
            by linear maps.
        resample: "deconv4", "nearest", "bilinear" or "pixel_shuffle", as :func:`upsampling_conv`.
        attention_at: height of the maps that get a :class:`SelfAttention2d`, from 4 to half of
            ``image_size``; without spectral norm.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a choice is unknown, or two of them make no sense together.

    Source: article 6549; Radford et al. 2016 (arXiv 1511.06434); Brock et al. 2019
        (arXiv 1809.11096) for ``split_latent``.

    Example:
        >>> G = DCGANGenerator(16, 1, z_dim=32, width=32, norm="selfmod")
        >>> z, other = torch.randn(2, 32), torch.randn(2, 32)
        >>> G(z, layer_z={1: other}).shape  # coarse style of z, fine style of the other
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        *,
        z_dim: int = 128,
        width: int = 64,
        norm: str = "bn",
        num_classes: int | None = None,
        split_latent: bool = False,
        resample: str = "deconv4",
        attention_at: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        widths = widths_from_4x4(image_size, width)
        make_norm = generator_norm(norm, z_dim, num_classes, split_latent, len(widths))
        require_sizes(channels=channels)
        seed, factory = draw_seed(), {"device": device, "dtype": dtype}
        stages = [
            NormConv(before, after, norm=make_norm, resample=resample, **factory)
            for before, after in itertools.pairwise([*widths, channels])
        ]
        super().__init__(
            image_size, channels, z_dim, norm, num_classes, split_latent, attention_at, widths,
            stages, normal, seed, **factory,
        )  # fmt: skip


class ResNetGenerator(ModulatedGenerator):
    r"""Generator of residual blocks: 3x3 convolutions and nearest-neighbour upsampling.

    .. math:: x_0 = \mathrm{dense}(z), \qquad x_{i+1} = \mathrm{block}_i(x_i \mid z, y), \qquad
        G = \tanh W\,\mathrm{ReLU}\,N(x_k \mid z, y)

    A :class:`ResBlockUp` for each doubling of the size. Both norms of a block are modulated by the
    same condition and count as one layer; the last norm is one more. Weights start orthogonal (see
    :class:`SNDCGANDiscriminator`).

    Args:
        image_size, channels, z_dim, norm, num_classes, split_latent, device, dtype: as in
            :class:`DCGANGenerator`.
        width: channels of the last block; they double towards 4x4.
        resample: "nearest", "bilinear", "deconv4" or "pixel_shuffle".
        residual_scale: factor of the residual branches.
        attention_at: height of the maps that get a :class:`SelfAttention2d`, from 4 to
            ``image_size``.

    Raises:
        ValueError: as :class:`DCGANGenerator`.

    Source: article 6549; Miyato et al. 2018 (arXiv 1802.05957), appendix B.

    Example:
        >>> G = ResNetGenerator(32, width=16, z_dim=60, norm="cbn", num_classes=10,
        ...                     split_latent=True)
        >>> G(torch.randn(2, 60), torch.tensor([3, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        *,
        z_dim: int = 128,
        width: int = 64,
        norm: str = "bn",
        num_classes: int | None = None,
        split_latent: bool = False,
        resample: str = "nearest",
        residual_scale: float | int = 1.0,
        attention_at: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        widths = [*widths_from_4x4(image_size, 2 * width), width]
        make_norm = generator_norm(norm, z_dim, num_classes, split_latent, len(widths))
        require_sizes(channels=channels)
        seed, factory = draw_seed(), {"device": device, "dtype": dtype}
        options = {"norm": make_norm, "resample": resample, "residual_scale": residual_scale}
        blocks = [
            ResBlockUp(before, after, **options, **factory)
            for before, after in itertools.pairwise(widths)
        ]
        last = NormConv(width, channels, norm=make_norm, resample=None, **factory)
        super().__init__(
            image_size, channels, z_dim, norm, num_classes, split_latent, attention_at, widths,
            [*blocks, last], orthogonal, seed, **factory,
        )  # fmt: skip


class ProjectionDiscriminator(nn.Module):
    """What the discriminators share: features, a linear layer, and the projection of a label.

    Not to be made itself: take :class:`SNDCGANDiscriminator`, :class:`DCGANDiscriminator` or
    :class:`ResNetDiscriminator`. All have ``image_size``, ``channels`` and ``num_classes`` as they
    were made; their module ``features`` turns images, of any size, into maps of features.

    Source: article 6549; Miyato & Koyama 2018 (arXiv 1802.05637) for the projection.

    Example:
        >>> D = SNDCGANDiscriminator(16, 1, width=4)
        >>> isinstance(D, ProjectionDiscriminator), D.features(torch.randn(2, 1, 16, 16)).shape
        (True, torch.Size([2, 16, 4, 4]))
    """

    sum_pool = False

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int | None,
        spectral: bool,
        features: list[nn.Module],
        feature_dim: int,
        draw: Draw,
        seed: int,
        **factory: torch.device | str | torch.dtype | None,
    ) -> None:
        super().__init__()
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        self.features = nn.Sequential(*features)
        self.linear = nn.Linear(feature_dim, 1, **factory)
        self.embed = None
        if num_classes is not None:
            self.embed = nn.Embedding(num_classes, feature_dim, **factory)
        initialise_(self, draw, seed)
        if spectral:
            for layer in list(weighted_layers(self)):
                spectral_norm(layer)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        y: Int[Tensor, "batch"] | Float[Tensor, "batch num_classes"] | None = None,
    ) -> Float[Tensor, "batch"]:
        r"""Return one logit per image, :math:`w^\top h(x) + b`; a label adds :math:`e_y^\top h(x)`.

        Args:
            x: images in [-1, 1], ``(N, channels, image_size, image_size)``.
            y: labels ``(N,)`` of int64, or floating weights ``(N, K)``; if and only if the network
                has ``num_classes``.

        Returns:
            Logits ``(N,)``: large means real.

        Raises:
            TypeError: if the dtype of an argument is another one.
            ValueError: if a shape does not fit, or ``y`` is missing or not wanted.
        """
        require_images(x, self.channels, self.image_size, self.linear.bias)
        require_labels(y, self.num_classes, len(x), self.linear.bias)
        h = self.features(x)
        h = h.sum((2, 3)) if self.sum_pool else h.flatten(1)
        logits = self.linear(h).squeeze(1)
        if y is None:
            return logits
        (embedded,) = of_classes(y, self.embed.weight)
        return logits + (embedded * h).sum(1)


class DCGANDiscriminator(ProjectionDiscriminator):
    """Discriminator of DCGAN: convolutions with kernel 4 and stride 2 down to 4x4, leaky ReLU.

    The first convolution has no norm. Weights start from N(0, 0.02).

    Args:
        image_size: 8, 16, 32 or 64.
        channels: of the image.
        width: channels of the first convolution; they double with each of the next.
        norm: "bn", "layer" or "none". Batch norm mixes the samples of a batch, and gradient
            penalties then have terms between them: take another one with R1.
        num_classes: for the projection of a label on the features, see
            :class:`SNDCGANDiscriminator`.
        spectral: spectral norm of all weights, only with ``norm="none"``.
        attention_at: height of the maps that get a :class:`SelfAttention2d`, from 4 to half of
            ``image_size``.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a choice is unknown, or for spectral norm beside another norm, whose
            division by the deviation has no Lipschitz bound.

    Source: article 6549; Radford et al. 2016 (arXiv 1511.06434).

    Example:
        >>> DCGANDiscriminator(16, 1, width=8)(torch.randn(4, 1, 16, 16)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        *,
        width: int = 64,
        norm: str = "bn",
        num_classes: int | None = None,
        spectral: bool = False,
        attention_at: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_discriminator(
            image_size, channels, width, norm, num_classes, spectral, attention_at
        )
        seed, factory = draw_seed(), {"device": device, "dtype": dtype}
        features, before, size = [], channels, image_size
        for after in reversed(widths_from_4x4(image_size, width)):
            make_norm = plain_norm(norm) if features else None
            features += [
                nn.Conv2d(before, after, 4, stride=2, padding=1, **factory),
                activated(make_norm, after, "leaky_relu", **factory),
            ]
            before, size = after, size // 2
            if size == attention_at:
                features.append(SelfAttention2d(after, spectral=False, **factory))
        super().__init__(
            image_size,
            channels,
            num_classes,
            spectral,
            features,
            before * 16,
            normal,
            seed,
            **factory,
        )


class SNDCGANDiscriminator(ProjectionDiscriminator):
    r"""Discriminator of SNGAN's plain architecture: 3x3 and 4x4 stride 2 in turn, leaky ReLU 0.1.

    .. math:: D(x, y) = w^\top h(x) + b + e_y^\top h(x)

    where :math:`h` are the flattened maps of 4x4, and the last term, the projection, is there with
    ``num_classes``. At 16 pixels with ``width=16`` the convolutions have 16, 32, 32, 64 and 64
    channels; at 32 pixels the receptive field is 52.

    With spectral norm each access to a weight in training mode is a step of its power iteration:
    D(real) and then D(fake) use two different weights. Concatenate them, or compute both inside
    ``torch.nn.utils.parametrize.cached()``. In ``eval()`` nothing moves.

    Weights start orthogonal, with gain :math:`\sqrt2` for kernels larger than 1x1 and biases 0, so
    that signals keep their size without spectral norm too; with it only directions count.

    Args:
        image_size, channels, device, dtype: as in :class:`DCGANDiscriminator`.
        width: channels of the first convolution; they double with each halving of the size.
        num_classes: for the projection.
        spectral: spectral norm 1 of all weights, as matrices ``(out, in * height * width)``.
        attention_at: height of the maps that get a :class:`SelfAttention2d`, from 4 to half of
            ``image_size``.

    Raises:
        ValueError: if a choice is unknown.

    Source: Miyato et al. 2018 (arXiv 1802.05957), table 3; Miyato & Koyama 2018
        (arXiv 1802.05637) for the projection.

    Example:
        >>> D = SNDCGANDiscriminator(16, 1, width=16, num_classes=10)
        >>> D(torch.randn(2, 1, 16, 16), torch.tensor([3, 7])).shape
        torch.Size([2])
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        *,
        width: int = 64,
        num_classes: int | None = None,
        spectral: bool = True,
        attention_at: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_discriminator(
            image_size, channels, width, "none", num_classes, spectral, attention_at
        )
        seed, factory = draw_seed(), {"device": device, "dtype": dtype}
        features, before, size = [], channels, image_size
        while size > 4:
            features += [
                nn.Conv2d(before, width, 3, padding=1, **factory),
                nn.LeakyReLU(0.1),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, **factory),
                nn.LeakyReLU(0.1),
            ]
            before, width, size = 2 * width, 2 * width, size // 2
            if size == attention_at:
                features.append(SelfAttention2d(width, spectral=False, **factory))
        features += [nn.Conv2d(before, width, 3, padding=1, **factory), nn.LeakyReLU(0.1)]
        super().__init__(
            image_size,
            channels,
            num_classes,
            spectral,
            features,
            width * 16,
            orthogonal,
            seed,
            **factory,
        )


class ResNetDiscriminator(ProjectionDiscriminator):
    r"""Discriminator of residual blocks: average pooling down to 4x4, one block more, sum pooling.

    .. math:: D(x, y) = w^\top h(x) + b + e_y^\top h(x), \qquad
        h(x) = \textstyle\sum_{\mathrm{positions}} \mathrm{ReLU}(\mathrm{blocks}(x))

    The first block has no activation on the image, and no norm. Weights and the pitfall of
    spectral norm are those of :class:`SNDCGANDiscriminator`.

    Args:
        image_size, channels, num_classes, spectral, attention_at, device, dtype: as in
            :class:`SNDCGANDiscriminator`.
        width: channels of the first block; they double with each halving of the size.
        norm: "none", "bn" or "layer", as in :class:`DCGANDiscriminator`.
        residual_scale: factor of the residual branches.

    Raises:
        ValueError: as :class:`DCGANDiscriminator`.

    Source: article 6549; Miyato et al. 2018 (arXiv 1802.05957), appendix B.

    Example:
        >>> ResNetDiscriminator(16, 1, width=8)(torch.randn(4, 1, 16, 16)).shape
        torch.Size([4])
    """

    sum_pool = True

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        *,
        width: int = 64,
        norm: str = "none",
        num_classes: int | None = None,
        spectral: bool = True,
        residual_scale: float | int = 1.0,
        attention_at: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_discriminator(
            image_size, channels, width, norm, num_classes, spectral, attention_at
        )
        seed, factory = draw_seed(), {"device": device, "dtype": dtype}
        make_norm = plain_norm(norm)
        features, before, size = [], channels, image_size
        for after in reversed(widths_from_4x4(image_size, width)):
            first = not features
            block = ResBlockDown(
                before,
                after,
                norm=None if first else make_norm,
                preactivation=not first,
                residual_scale=residual_scale,
                **factory,
            )
            features.append(block)
            before, size = after, size // 2
            if size == attention_at:
                features.append(SelfAttention2d(after, spectral=False, **factory))
        options = {"norm": make_norm, "resample": "none", "residual_scale": residual_scale}
        features += [
            ResBlockDown(before, before, **options, **factory),
            activated(make_norm, before, **factory),
        ]
        super().__init__(
            image_size,
            channels,
            num_classes,
            spectral,
            features,
            before,
            orthogonal,
            seed,
            **factory,
        )
