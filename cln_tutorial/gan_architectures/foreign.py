"""Modulated batch norms among others: weights of other libraries, convolutions next to them."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cln_tutorial.gan_architectures.norms import ModulatedNorm2d

_ACTIVATIONS = {"relu": lambda slope: nn.ReLU(), "leaky_relu": nn.LeakyReLU}


def load_foreign_state_dict(
    module: ModulatedNorm2d, state: Mapping[str, Tensor], prefix: str = ""
) -> None:
    """Load a conditional batch norm as another library stores it.

    ======================== ====================================== ====================
    layout                   weights                                scale
    ======================== ====================================== ====================
    ours                     those of ``module.state_dict()``       1 + gain
    mimicry                  ``embed.weight`` (K, 2C), scale first  as stored, around 1
    StudioGAN, embeddings    ``embed0.weight``, ``embed1.weight``   1 + embed0
    StudioGAN, linear        ``gain.weight``, ``bias.weight``       1 + gain
    ======================== ====================================== ====================

    All but ours keep the running statistics under ``bn``. Weights under PyTorch's older spectral
    norm (``weight_orig``, ``weight_u``, ``weight_v``) are divided by their norm. Epsilon is in no
    state: StudioGAN's is 1e-4, mimicry's 1e-5; give it to the constructor.

    Args:
        module: :class:`ConditionalBatchNorm2d` for classes, or :class:`ModulatedNorm2d` with
            ``bias=False`` for the linear layout, where the condition is a vector.
        state: the other norm's ``state_dict()``, or that of a whole network.
        prefix: only the keys that start with it are read, as "block2.bn1.".

    Raises:
        ValueError: if the layout is unknown, or a tensor is missing, left over, or of a wrong
            shape. ``module`` is then as before.

    Source: github.com/kwotsin/mimicry, github.com/POSTECH-CVLab/PyTorch-StudioGAN.

    Example:
        >>> from cln_tutorial.gan_architectures.norms import ConditionalBatchNorm2d
        >>> state = {f"bn.{k}": v for k, v in nn.BatchNorm2d(4, affine=False).state_dict().items()}
        >>> state["embed.weight"] = torch.cat([torch.full((3, 4), 1.5), torch.zeros(3, 4)], dim=1)
        >>> norm = ConditionalBatchNorm2d(4, num_classes=3)
        >>> load_foreign_state_dict(norm, state)
        >>> norm.gain.weight[:, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    dense = _without_spectral_norm(own)
    wanted = module.state_dict()
    ours = own.keys() == wanted.keys()
    translated = own if ours else _translated(dense, prefix, sorted(state))
    problems = [f"`{key}` is missing" for key in wanted if key not in translated]
    problems += [f"`{key}` is left over" for key in translated if key not in wanted]
    problems += [
        f"`{key}` is {tuple(translated[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in translated and translated[key].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"`state` does not fit {module}, in our names: {'; '.join(problems)}. (A module for "
            f"foreign weights has no biases: `ConditionalBatchNorm2d`, or `bias=False`.)"
        )
    module.load_state_dict(translated)


def fold_into_conv(first: nn.Module, second: nn.Module, *condition: Tensor) -> nn.Module:
    r"""Merge a batch norm under one condition and a convolution next to it, for export.

    In evaluation the norm is :math:`a_c h + b_c` per channel, with
    :math:`a = \gamma(c)/\sqrt{\sigma^2 + \epsilon}` and :math:`b = \beta(c) - a\mu`. Behind a
    convolution with weight :math:`K` and bias :math:`k` that is a convolution with :math:`aK` and
    :math:`ak + b`, one factor per output channel. Before one, the factors go to the input channels
    and the bias is :math:`k + \sum Kb`, but only without zero padding: at the border the padded
    zeros would have to be :math:`-b/a`.

    Args:
        first, second: a convolution and a norm, or a norm and a convolution, in the order in which
            they act. The norm has ``norm="batch"``, running statistics, and is in ``eval()``.
        condition: what the norm takes beside ``x``, with one row: one class ``(1,)``, one noise
            vector ``(1, z_dim)``.

    Returns:
        A convolution with bias; behind it, in a ``nn.Sequential``, the norm's activation and
        upsampling, if it has any. In evaluation mode; dtype and device of the given convolution,
        which stays as it is.

    Raises:
        TypeError: if it is not one :class:`ModulatedNorm2d` and one ``nn.Conv2d`` (or, as
            ``first``, ``nn.ConvTranspose2d``).
        ValueError: if the pair cannot be one convolution, or the condition has not one row.

    Source: Jacob et al. 2018 (arXiv 1712.05877), for batch norm without a condition.

    Example:
        >>> from cln_tutorial.gan_architectures.norms import ConditionalBatchNorm2d
        >>> conv, norm = nn.Conv2d(3, 8, 3, padding=1), ConditionalBatchNorm2d(8, num_classes=10)
        >>> folded = fold_into_conv(conv, norm.eval(), torch.tensor([7]))
        >>> x = torch.randn(2, 3, 5, 5)
        >>> torch.allclose(folded(x), norm(conv(x), torch.tensor([7, 7])), atol=1e-6)
        True
    """
    norm_is_first = isinstance(first, ModulatedNorm2d)
    norm, conv = (first, second) if norm_is_first else (second, first)
    kinds = (nn.Conv2d,) if norm_is_first else (nn.Conv2d, nn.ConvTranspose2d)
    if not isinstance(norm, ModulatedNorm2d) or not isinstance(conv, kinds):
        raise TypeError(
            f"`first` and `second` must be a modulated norm and a `nn.Conv2d`, or a convolution "
            f"and a modulated norm; got {type(first).__name__} and {type(second).__name__}."
        )
    channels = conv.in_channels if norm_is_first else conv.out_channels
    if why := _obstacle(norm, conv, norm_is_first, channels):
        raise ValueError(why)
    with torch.no_grad():
        scale, shift = _affine(norm, condition)
        folded = _plain_copy(conv)
        weight = folded.weight.double()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.double()
        if norm_is_first:
            # Input channel i of group g is channel g * (C / groups) + i of the norm.
            per_group = (conv.groups, 1, -1, 1, 1)
            grouped = weight.unflatten(0, (conv.groups, -1))
            bias = bias + (grouped * shift.view(per_group)).sum((2, 3, 4)).flatten()
            weight = (grouped * scale.view(per_group)).flatten(0, 1)
        elif isinstance(conv, nn.ConvTranspose2d):
            grouped = weight.unflatten(0, (conv.groups, -1))
            weight = (grouped * scale.view(conv.groups, 1, -1, 1, 1)).flatten(0, 1)
            bias = scale * bias + shift
        else:
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = scale * bias + shift
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
    return folded if norm_is_first else _with_the_rest(folded, norm)


def _translated(state: dict[str, Tensor], prefix: str, given: list[str]) -> dict[str, Tensor]:
    names = {key.removeprefix("bn."): value for key, value in state.items()}
    if "embed.weight" in names:
        scale, shift = _table(names, "embed.weight", parts=2).chunk(2, dim=1)
        return names | {"gain.weight": (scale - 1).T, "shift.weight": shift.T}
    if "embed0.weight" in names and "embed1.weight" in names:
        gain, shift = (_table(names, f"embed{i}.weight", parts=1) for i in (0, 1))
        return names | {"gain.weight": gain.T, "shift.weight": shift.T}
    if "gain.weight" in names and "bias.weight" in names:
        return names | {"shift.weight": names.pop("bias.weight")}
    raise ValueError(
        f"`state` has no known layout under `prefix` {prefix!r}: wanted `embed.weight`, "
        f"`embed0.weight` and `embed1.weight`, `gain.weight` and `bias.weight`, or all names of "
        f"`module` itself; got {', '.join(given) or 'nothing'}."
    )


def _table(names: dict[str, Tensor], key: str, parts: int) -> Tensor:
    table = names.pop(key)
    if table.ndim != 2 or table.shape[1] % parts:
        width = "channels" if parts == 1 else f"{parts} * channels"
        raise ValueError(f"`{key}` must be (classes, {width}); got {tuple(table.shape)}.")
    return table


def _without_spectral_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    dense = dict(state)
    for key in state:
        if key.endswith(".weight_orig"):
            name = key.removesuffix("_orig")
            parts = [dense.pop(f"{name}_{part}", None) for part in ("orig", "u", "v")]
            if any(part is None for part in parts):
                raise ValueError(f"`state` has `{key}`, but not both `{name}_u` and `{name}_v`.")
            weight, u, v = parts
            dense[name] = weight / (u @ weight @ v)
    return dense


def _obstacle(
    norm: ModulatedNorm2d, conv: nn.Module, norm_is_first: bool, channels: int
) -> str | None:
    if norm.norm != "batch" or norm.running_mean is None:
        return (
            "The norm has no running statistics, so it is another function of each input: only "
            '`norm="batch"` with `track_running_stats=True` can be folded.'
        )
    if norm.training:
        return "The norm is in training mode, where its statistics are the batch's: call `eval()`."
    if norm.num_features != channels:
        return f"The norm has {norm.num_features} channels, the convolution {channels} there."
    if not norm_is_first:
        return None
    if norm.activation is not None or norm.upsample != 1:
        return (
            "The norm's activation or upsampling stands between it and the convolution; fold it "
            "into the convolution before it."
        )
    unpadded = ((0, 0), "valid", *(["same"] if conv.kernel_size == (1, 1) else []))
    if conv.padding_mode == "zeros" and conv.padding not in unpadded:
        return (
            f"The convolution pads with zeros (`padding` {conv.padding}), which the norm does not "
            f"shift: at the border no bias is right. Fold the norm into the convolution before "
            f'it, or train with `padding=0` or another `padding_mode`, as "reflect".'
        )
    return None


def _affine(norm: ModulatedNorm2d, condition: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    gamma, beta = norm.gamma_beta(*condition)
    if len(gamma) != 1:
        raise ValueError(
            f"`condition` must have one row, a batch of 1, as the convolution is one for all; got "
            f"{len(gamma)}."
        )
    scale = gamma[0].double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, beta[0].double() - scale * norm.running_mean.double()


def _plain_copy(conv: nn.Module) -> nn.Module:
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    kind = nn.Conv2d
    if isinstance(conv, nn.ConvTranspose2d):
        kind, names = nn.ConvTranspose2d, [*names, "output_padding"]
    # Of a copy in `eval()`: a look at a weight under spectral norm moves its vectors.
    weight = copy.deepcopy(conv).eval().weight.detach()
    plain = skip_init(  # a weight drawn at random would move the global generator
        kind,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        **{name: getattr(conv, name) for name in names},
        device=weight.device,
        dtype=weight.dtype,
    )
    plain.weight.copy_(weight)
    return plain.eval()


def _with_the_rest(conv: nn.Module, norm: ModulatedNorm2d) -> nn.Module:
    rest: list[nn.Module] = []
    if norm.activation is not None:
        rest.append(_ACTIVATIONS[norm.activation](norm.negative_slope))
    if norm.upsample != 1:
        rest.append(nn.Upsample(scale_factor=norm.upsample, mode="nearest"))
    return nn.Sequential(conv, *rest).eval() if rest else conv
