"""Pretrained models: give their norms a condition, train it alone, and fold it away again."""

import copy
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cln_tutorial.conditional_norm.functional import conditional_layer_norm, conditional_rms_norm
from cln_tutorial.conditional_norm.modules import (
    ConditionalNorm,
    bias_of,
    conditional_class,
    conditional_norms,
    epsilon,
    obstacle,
    one_condition,
    stored_epsilon,
)

# By name, so that nothing is imported: in `transformers` these are neither nn.LayerNorm nor
# nn.RMSNorm.
REGISTERED = frozenset(
    f"transformers.models.{name}"
    for name in (
        "t5.modeling_t5.T5LayerNorm",
        "llama.modeling_llama.LlamaRMSNorm",
        "mistral.modeling_mistral.MistralRMSNorm",
        "qwen2.modeling_qwen2.Qwen2RMSNorm",
    )
)


def convert_layer_norms(
    model: nn.Module,
    cond_dim: int,
    *,
    hidden_dim: int | None = None,
    share_hidden: bool = True,
    where: Callable[[str, nn.Module], bool] | None = None,
    extra_types: Iterable[type] = (),
) -> nn.Module:
    """Give every layer norm and RMS norm of a model a condition, in place.

    Parameters, hooks, mode, dtype, device and sharing stay; each norm gains ``cond_proj``, whose
    last layer is zero, so under any condition the model computes what it did, to rounding. To
    convert twice changes nothing. In ``nn.TransformerEncoder`` the fused inference path, which
    reads the weight of a norm without calling it, is switched off.

    Converted are norms whose type is exactly ``nn.LayerNorm``, ``nn.RMSNorm``, ``T5LayerNorm``,
    ``LlamaRMSNorm``, ``MistralRMSNorm`` or ``Qwen2RMSNorm`` of ``transformers``, or one of
    ``extra_types``. What a class outside PyTorch computes is tried out on random numbers, with
    random weights in a copy. Without a condition its norm still computes exactly that, also where
    it rounds otherwise than ours.

    Args:
        model: any module.
        cond_dim, hidden_dim: as in :class:`ConditionalLayerNorm`.
        share_hidden: with ``hidden_dim``, let all norms share one hidden layer (those of one dtype
            and device). The state dict then has it under the name of each norm.
        where: ``where(name, norm)`` chooses norms (a shared one by any of its names).
        extra_types: further classes: with a ``weight`` of one axis, maybe a ``bias``, and an
            epsilon called ``eps``, ``variance_epsilon`` or ``epsilon``.

    Raises:
        TypeError: if ``extra_types`` holds something else than classes of modules.
        ValueError: if nothing matches, or a matching norm cannot be converted (several axes, no
            parameters, converted before with other sizes, neither layer norm nor RMS norm). The
            model is then as it was.

    Example:
        >>> model = convert_layer_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), cond_dim=3)
        >>> type(model[1]).__name__
        'ConditionalLayerNorm'
    """
    chosen = _chosen_norms(model, where, tuple(extra_types))
    rms = {}
    for norm, name in chosen.items():
        why = obstacle(norm, cond_dim, hidden_dim)
        rms[norm] = None if why else _is_rms(norm)
        if rms[norm] is None:
            why = why or (
                f"is a {type(norm).__name__}, which computes neither `x_hat * weight + bias` of a "
                f"layer norm nor that of an RMS norm."
            )
            raise ValueError(f"Nothing was converted: {name or 'the model'} {why}")
    hidden = {}
    for norm in sorted(chosen, key=lambda norm: not isinstance(norm, ConditionalNorm)):
        place = (norm.weight.dtype, norm.weight.device)
        if not isinstance(norm, ConditionalNorm):
            norm.__class__ = conditional_class(type(norm), rms[norm])
            norm.attach(cond_dim, hidden_dim, "silu", zero_init=True, hidden=hidden.get(place))
        if hidden_dim is not None and share_hidden:
            hidden.setdefault(place, norm.cond_proj[0])
    _switch_fused_paths_off(model)
    return model


def fold(model: nn.Module, cond: Float[Tensor, "... width"]) -> nn.Module:
    """Return a copy of ``model`` with plain norms that computes what it does under ``cond``.

    ``cond`` is exactly one condition, ``(cond_dim,)`` or ``(1, cond_dim)``. The state dict loads
    into the unconverted class, which has the fused path of ``nn.TransformerEncoder`` as well.

    Raises:
        TypeError, ValueError: if ``cond`` is not one fitting condition, or nothing can take it.

    Example:
        >>> model = convert_layer_norms(nn.Sequential(nn.LayerNorm(8)), cond_dim=3)
        >>> fold(model, torch.randn(3))[0]
        LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    cond, folded = one_condition(cond), copy.deepcopy(model)
    for norm in conditional_norms(folded):
        norm.become_plain(cond)
    return folded


def fold_into_linear(norm: nn.Module, linear: nn.Linear) -> tuple[nn.Module, nn.Linear]:
    r"""Move scale and shift of a plain norm into the linear layer that follows it.

    .. math:: A(\gamma \odot \hat x + \beta) + a = A\,\mathrm{diag}(\gamma)\,\hat x + (a + A\beta)

    If the norm feeds several layers, as before queries, keys and values, fold it into each.

    Args:
        norm: an ``nn.LayerNorm`` or ``nn.RMSNorm``, or one of ``transformers`` that
            :func:`convert_layer_norms` knows; a conditional one must be folded first.
        linear: an ``nn.Linear`` itself; what it has for ``dim`` inputs is changed in a copy.

    Returns:
        ``(norm, linear)``: an ``nn.LayerNorm`` or ``nn.RMSNorm`` without parameters, and the new
        linear layer, which has a bias if the norm or ``linear`` has one. The inputs stay.

    Raises:
        TypeError: if one of the two is of another type.
        ValueError: if the norm is conditional or over several axes, or the widths differ.

    Example:
        >>> norm, linear = nn.LayerNorm(8), nn.Linear(8, 3)
        >>> bare, folded = fold_into_linear(norm, linear)
        >>> x = torch.randn(2, 8)
        >>> torch.allclose(folded(bare(x)), linear(norm(x)), atol=1e-5), len(bare.state_dict())
        (True, 0)
    """
    rms = _require_foldable(norm, linear)
    gamma, beta, linear = norm.weight, bias_of(norm), copy.deepcopy(linear)
    own = nn.RMSNorm if rms else nn.LayerNorm
    bare = own(linear.in_features, stored_epsilon(norm), elementwise_affine=False)
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    with torch.no_grad():
        weight, bias = linear.weight.to(wide), linear.bias
        if beta is not None:
            moved = weight @ beta.to(wide)
            moved = moved if bias is None else bias.to(wide) + moved
            trained = linear.weight if bias is None else bias
            linear.bias = nn.Parameter(moved.to(trained.dtype), trained.requires_grad)
        if gamma is not None:
            linear.weight.copy_(weight * gamma.to(wide))
    return bare.train(norm.training), linear


def conditional_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what conversion has added, the ``cond_proj`` parameters, each by one name."""
    new = {p for norm in conditional_norms(model) for p in norm.cond_proj.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in new}


def freeze_base(model: nn.Module) -> nn.Module:
    """Let only the ``cond_proj`` parameters train, and return ``model``."""
    trained = conditional_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _chosen_norms(
    model: nn.Module, where: Callable[[str, nn.Module], bool] | None, extra_types: tuple[type, ...]
) -> dict[nn.Module, str]:
    for extra in extra_types:
        if not (isinstance(extra, type) and issubclass(extra, nn.Module)):
            raise TypeError(f"`extra_types` must hold classes of modules; got {extra!r}.")
    chosen = {
        module: name
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, ConditionalNorm) or _is_known(type(module), extra_types))
        and (not where or where(name, module))
    }
    if not chosen:
        which = (
            "that `where` accepts"
            if where
            else "(that exact type is converted, or nn.RMSNorm, or a registered one; no subclass). "
            "Give other norms as `extra_types`"
        )
        raise ValueError(f"`model` ({type(model).__name__}) holds no nn.LayerNorm {which}.")
    return chosen


def _is_known(cls: type, extra_types: tuple[type, ...] = ()) -> bool:
    known = (nn.LayerNorm, nn.RMSNorm, *extra_types)
    return cls in known or f"{cls.__module__}.{cls.__qualname__}" in REGISTERED


@torch.no_grad()
def _is_rms(norm: nn.Module) -> bool | None:
    """Whether this is an RMS norm; ``None`` if it is no layer norm either."""
    if isinstance(norm, ConditionalNorm):
        return norm.compute is conditional_rms_norm
    if type(norm) in (nn.LayerNorm, nn.RMSNorm):
        return type(norm) is nn.RMSNorm
    probe = copy.deepcopy(norm).eval()
    probe = probe.to_empty(device="cpu") if probe.weight.is_meta else probe
    gamma, beta = probe.weight, bias_of(probe)
    rng, dim = torch.Generator().manual_seed(0), len(gamma)
    for parameter in (gamma,) if beta is None else (gamma, beta):
        parameter.copy_(1 + torch.randn(dim, generator=rng))
    # The mean is not zero; the rows of the second example are so small that epsilon counts.
    eps = epsilon(norm, gamma)
    size = torch.tensor([1.0, eps**0.5 or 1.0], dtype=torch.float64)[:, None, None]
    x = (size * (1 + torch.randn(2, 4, dim, generator=rng))).to(gamma)
    try:
        y = type(probe).forward(probe, x)  # past the hooks
    except Exception:  # whatever does not take (batch, time, dim) is another kind of layer
        return None
    # Such a class may compute in float32 where the parameters are float64, and round twice.
    tolerance = max(1e-5, 4 * torch.finfo(gamma.dtype).eps)
    for rms, compute in ((False, conditional_layer_norm), (True, conditional_rms_norm)):
        expected = compute(x, gamma, beta, eps, backend="reference")
        if y.shape == x.shape and (y - expected).abs().max() <= tolerance * expected.abs().max():
            return rms
    return None


def _require_foldable(norm: nn.Module, linear: nn.Linear) -> bool:
    if isinstance(norm, ConditionalNorm):
        raise ValueError("`norm` has a condition; write `norm.fold(cond)` first.")
    if not _is_known(type(norm)):
        raise TypeError(f"`norm` must be an nn.LayerNorm or nn.RMSNorm; got {type(norm)}.")
    if type(linear) is not nn.Linear:
        raise TypeError(f"`linear` must be an nn.Linear itself; got {type(linear)}.")
    shape = tuple(getattr(norm, "normalized_shape", None) or norm.weight.shape)
    if shape != (linear.in_features,):
        raise ValueError(
            f"`linear` takes {linear.in_features} inputs, `norm` covers {shape}; they must agree."
        )
    rms = _is_rms(norm)
    if rms is None:
        raise ValueError(f"`norm` is a {type(norm).__name__} that computes something of its own.")
    return rms


def _switch_fused_paths_off(model: nn.Module) -> None:
    for module in model.modules():
        if any(isinstance(inner, ConditionalNorm) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # its condition for the fused path
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # nested tensors serve the fused path only
