"""How the networks are made: widths, norms, initial weights, noise, and checks of all choices."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from cln_tutorial._dtypes import require_floating
from cln_tutorial.gan_architectures._conditions import (
    require_classes,
    require_one_of,
    require_sizes,
)
from cln_tutorial.gan_architectures.blocks import (
    FusedBatchNorm2d,
    NormFactory,
    activated,
    icnr_,
)
from cln_tutorial.gan_architectures.norms import (
    AdaIN,
    ConditionalBatchNorm2d,
    ModulatedNorm2d,
    SelfModulatedBatchNorm2d,
)

IMAGE_SIZES = (8, 16, 32, 64)
BY_NOISE = ("selfmod", "selfmod+label", "adain")
BY_LABEL = ("cbn", "selfmod+label")
GENERATOR_NORMS = ("bn", "cbn", "selfmod", "selfmod+label", "adain", "layer", "none")
DISCRIMINATOR_NORMS = ("none", "bn", "layer")

Draw = Callable[[Tensor, torch.Generator], Tensor]


@torch.no_grad()
def initialise_(network: nn.Module, draw: Draw, seed: int) -> None:
    """Draw all weights outside the modulated norms; biases are 0, pixel shuffles start equal.

    The generator of its own makes the weights independent of which norms stand between them, and
    the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in weighted_layers(network):
        weight = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
        layer.weight.copy_(draw(weight, generator))
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
    for module in network.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.PixelShuffle):
            icnr_(module[0].weight)


def weighted_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.Embedding):
            yield child
        elif not isinstance(child, ModulatedNorm2d):
            yield from weighted_layers(child)


def draw_seed() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def normal(weight: Tensor, generator: torch.Generator) -> Tensor:
    return nn.init.normal_(weight, std=0.02, generator=generator)


def orthogonal(weight: Tensor, generator: torch.Generator) -> Tensor:
    gain = math.sqrt(2) if weight.ndim == 4 and weight.shape[-1] > 1 else 1.0
    return nn.init.orthogonal_(weight, gain, generator=generator)


def widths_from_4x4(image_size: int, last: int) -> list[int]:
    """Channels of the maps of 4x4, 8x8, ... below ``image_size``, each half of the ones before."""
    require_one_of("image_size", image_size, IMAGE_SIZES)
    require_sizes(width=last)
    return [last * (image_size // 2) // size for size in sizes_below(image_size)]


def sizes_below(image_size: int) -> tuple[int, ...]:
    return tuple(size for size in (4, 8, 16, 32) if size < image_size)


def truncated(z: Tensor, threshold: float | int) -> Tensor:
    """Move each entry to its quantile of the truncated normal distribution."""
    # In float32 erf(z) has few digits left in the tail.
    wide = (z.cpu() if z.is_mps else z).double() / math.sqrt(2)
    below_1 = 1 - 2**-53  # erf is 1 from 8.3 deviations on, and its inverse there infinite
    level = math.erf(threshold / math.sqrt(2)) * torch.erf(wide).clamp(-below_1, below_1)
    moved = math.sqrt(2) * torch.erfinv(level)
    return moved.clamp(-threshold, threshold).to(z)


def generator_norm(
    norm: str, z_dim: int, num_classes: int | None, split_latent: bool, n_layers: int
) -> NormFactory | None:
    """Return what makes the norms of a generator, if the choices make sense together."""
    require_one_of("norm", norm, GENERATOR_NORMS)
    require_sizes(z_dim=z_dim)
    if num_classes is not None:
        require_sizes(num_classes=num_classes)
    if norm in BY_LABEL and num_classes is None:
        raise ValueError(f"`num_classes` is missing: `norm` {norm!r} is modulated by labels.")
    if norm not in BY_LABEL and num_classes is not None:
        raise ValueError(
            f"`num_classes` must be None with `norm` {norm!r}, which would not see the labels: "
            f"take {' or '.join(BY_LABEL)}."
        )
    if split_latent and norm not in {*BY_NOISE, "cbn"}:
        raise ValueError(
            f"`split_latent` gives each layer a part of the noise, and `norm` {norm!r} takes none: "
            f"take cbn (BigGAN), {' or '.join(BY_NOISE)}."
        )
    part = noise_part(z_dim, split_latent, n_layers)
    if norm == "cbn":
        # BigGAN: the part of the noise, and an embedding of the label as long as the whole noise.
        biggan = partial(ModulatedNorm2d, cond_dim=part + z_dim)
        return biggan if split_latent else partial(ConditionalBatchNorm2d, num_classes=num_classes)
    if norm == "adain":
        return partial(AdaIN, w_dim=part)
    if norm in BY_NOISE:
        return partial(SelfModulatedBatchNorm2d, z_dim=part, num_classes=num_classes)
    return plain_norm(norm)


def noise_part(z_dim: int, split_latent: bool, n_layers: int) -> int:
    """Length of the noise that each layer gets, and the maps of 4x4."""
    parts = n_layers + 1 if split_latent else 1
    if z_dim % parts:
        raise ValueError(
            f"`z_dim` must be a multiple of {parts} with `split_latent`: a part for 4x4 and one "
            f"for each of {n_layers} layers; got {z_dim}."
        )
    return z_dim // parts


def plain_norm(norm: str) -> NormFactory | None:
    return {"bn": FusedBatchNorm2d, "layer": layer_norm, "none": None}[norm]


def layer_norm(
    channels: int,
    *,
    activation: str,
    upsample: int = 1,
    **factory: torch.device | str | torch.dtype | None,
) -> nn.Module:
    layers = [nn.GroupNorm(1, channels, **factory), activated(None, channels, activation)]
    return nn.Sequential(*layers, *([nn.Upsample(scale_factor=upsample)] if upsample > 1 else []))


def require_discriminator(
    image_size: int,
    channels: int,
    width: int,
    norm: str,
    num_classes: int | None,
    spectral: bool,
    attention_at: int | None,
) -> None:
    require_one_of("image_size", image_size, IMAGE_SIZES)
    require_sizes(channels=channels, width=width)
    require_one_of("norm", norm, DISCRIMINATOR_NORMS)
    if num_classes is not None:
        require_sizes(num_classes=num_classes)
    if spectral and norm != "none":
        raise ValueError(
            f"`spectral` needs `norm` 'none', not {norm!r}: that divides by the deviation of the "
            f"data, and no Lipschitz bound is left."
        )
    if attention_at is not None:
        require_one_of("attention_at", attention_at, sizes_below(image_size))


def require_dtype(name: str, value: Tensor, own: Tensor) -> None:
    require_floating(name, value)
    if value.dtype == own.dtype:
        return
    # Autocast makes all dtypes one, except float64.
    double = torch.float64 in (value.dtype, own.dtype)
    if double or not torch.is_autocast_enabled(value.device.type):
        raise TypeError(
            f"`{name}` is {value.dtype}, the network {own.dtype}: write `{name}.to({own.dtype})`."
        )


def require_noise(name: str, z: Tensor, shape: tuple[int, int], own: Tensor) -> None:
    require_dtype(name, z, own)
    if tuple(z.shape) != shape:
        raise ValueError(f"`{name}` must be (batch, z_dim), {shape} here; got {tuple(z.shape)}.")


def require_images(x: Tensor, channels: int, size: int, own: Tensor) -> None:
    require_dtype("x", x, own)
    if x.ndim != 4 or tuple(x.shape[1:]) != (channels, size, size):
        raise ValueError(f"`x` must be (batch, {channels}, {size}, {size}); got {tuple(x.shape)}.")


def require_labels(y: Tensor | None, num_classes: int | None, batch: int, own: Tensor) -> None:
    if num_classes is None and y is not None:
        raise ValueError("`y` is given, but the network was made without `num_classes`.")
    if num_classes is not None and y is None:
        raise ValueError(f"`y` is missing: the network has {num_classes} classes.")
    if y is None:
        return
    require_classes(y, num_classes, own)
    if len(y) != batch:
        raise ValueError(f"`y` must hold one label per sample, {batch}; got {len(y)}.")
