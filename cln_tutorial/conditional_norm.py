r"""Conditional layer normalisation: one network, one condition per example.

.. math:: y_{bt} = \hat x_{bt} \odot \gamma_b + \beta_b, \qquad
    \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    \gamma_b = \gamma + W_\gamma c_b, \quad \beta_b = \beta + W_\beta c_b

Source: Su Jianlin, article 7124 (https://kexue.fm/archives/7124), 2019; for speech before that
Kim, Song & Bengio 2017, Dynamic Layer Normalization (arXiv 1707.06065).
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def conditional_layer_norm(
    x: Float[Tensor, "batch *positions dim"],
    gamma: Float[Tensor, "... dim"],
    beta: Float[Tensor, "... dim"] | None = None,
    eps: float = 1e-5,
    *,
    per_token: bool = False,
) -> Float[Tensor, "batch *positions dim"]:
    r"""Normalise over the last dimension, then scale and shift as each example's condition says.

    .. math:: y_{bt} = (x_{bt} - \mu_{bt}) / \sqrt{\sigma_{bt}^2 + \epsilon}
        \odot \gamma_b + \beta_b \qquad (\sigma^2 \text{ biased, as in F.layer_norm})

    Args:
        x: ``(batch, *positions, dim)``, any floating dtype; batch and positions may be empty.
        gamma: scale: one vector per example ``(batch, dim)``, or one for all, ``(1, dim)`` or
            ``(dim,)``. Of two dimensions the first is always the batch, never the time.
        beta: shift, in one of the same forms; ``None`` means no shift. Both may be of another
            floating dtype than ``x``; they are converted to the dtype of the computation, below.
        eps: added to the variance.
        per_token: if true, ``gamma`` and ``beta`` have exactly the shape of ``x``.

    Returns:
        Shape and dtype of ``x``. All is computed in float32 (float64 for float64) whatever the
        storage type; each gradient has the dtype of its input.

    Raises:
        TypeError: if a tensor is not of a floating dtype.
        ValueError: if shapes or devices do not fit, or ``eps`` is negative.

    Source: article 7124.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]], [[1.0, 3.0]]])
        >>> conditional_layer_norm(x, torch.tensor([[1.0, 1.0], [10.0, 10.0]]), eps=0.0).tolist()
        [[[-1.0, 1.0]], [[-10.0, 10.0]]]
    """
    _require_floats("x", x)
    if x.ndim < 2:
        raise ValueError(f"`x` {tuple(x.shape)} must be (batch, *positions, dim); write `x[None]`.")
    if not eps >= 0:
        raise ValueError(f"`eps` must be zero or positive; got {eps}.")
    _require_vectors("gamma", gamma, x, per_token)
    if beta is not None:
        _require_vectors("beta", beta, x, per_token)

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    normalised = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    gamma = _over_positions(gamma, x).to(wide)
    if beta is None:
        return (normalised * gamma).to(x.dtype)
    beta = _over_positions(beta, x).to(wide)
    # addcmul rounds as the fused affine of F.layer_norm does; a product and a sum apart do not.
    return torch.addcmul(beta, normalised, gamma).to(x.dtype)


def _over_positions(value: Tensor, x: Tensor) -> Tensor:
    if value.ndim != 2:
        return value
    return value.reshape(value.shape[0], *(1,) * (x.ndim - 2), value.shape[1])


def _require_vectors(name: str, value: Tensor, x: Tensor, per_token: bool) -> None:
    _require_floats(name, value)
    if value.device != x.device:
        raise ValueError(
            f"`{name}` is on {value.device}, `x` on {x.device}; write `.to(x.device)`."
        )
    got, want, dim = tuple(value.shape), tuple(x.shape), x.shape[-1]
    if per_token and got != want:
        raise ValueError(
            f"`{name}` must have the shape of `x`, {want}, with `per_token=True`; got {got}. Write "
            f"`{name}.expand(x.shape)` if one vector stands for several positions."
        )
    if not per_token and got not in [(dim,), (1, dim), (x.shape[0], dim)]:
        raise ValueError(
            f"`{name}` must hold one vector per example, {(x.shape[0], dim)}, or one for all, "
            f"(1, {dim}) or ({dim},), for `x` of shape {want}; got {got}. A vector per position is "
            f"written `conditional_layer_norm(x, gamma.expand(x.shape), per_token=True)`."
        )


def _require_floats(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{name}` must be a tensor of a floating dtype; got {got}.")


class ConditionalLayerNorm(nn.LayerNorm):
    r"""Layer norm whose scale and shift are moved by a condition.

    .. math:: \gamma_b = \gamma + W_\gamma\,h(c_b), \qquad \beta_b = \beta + W_\beta\,h(c_b)

    ``h`` is the identity, or with ``hidden_dim`` one layer with an activation. ``weight`` and
    ``bias`` are the base :math:`\gamma, \beta`, under the names of ``nn.LayerNorm``; the new
    parameters are ``cond_proj.*``. They have no bias, because the base is the bias.

    Args:
        normalized_shape: size of the last dimension. Norms over several axes are refused.
        cond_dim: length of the condition vector.
        hidden_dim, hidden_act: width of a hidden layer between condition and W, ``None`` for none,
            and its activation: "silu", "gelu", "relu" or "tanh".
        eps: added to the variance.
        zero_init: start W at zero, so that the norm begins as the plain one. Only the last layer
            is zero: of two zero layers in a row neither would ever get a gradient.
        device, dtype: of all parameters.
        bias: if false there is no base shift, and the condition moves the scale only.

    Raises:
        ValueError: if the norm covers several axes, or a size or activation makes no sense.

    Example:
        >>> norm = ConditionalLayerNorm(8, cond_dim=3)
        >>> x, cond = torch.randn(2, 5, 8), torch.randn(2, 3)
        >>> torch.allclose(norm(x, cond), nn.LayerNorm(8)(x), atol=2e-6)  # W starts at zero
        True
        >>> sorted(norm.state_dict())
        ['bias', 'cond_proj.weight', 'weight']
    """

    # True once a `condition` block has acted on the norm. A call inside a backward pass without a
    # block is from then on taken for a recomputation that has lost its condition.
    _ever_conditioned = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        cond_dim: int,
        hidden_dim: int | None = None,
        hidden_act: str = "silu",
        eps: float = 1e-5,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, bias=bias, device=device, dtype=dtype)
        if why := _obstacle(self, cond_dim, hidden_dim):
            raise ValueError(f"The conditional norm {why}")
        self._attach(cond_dim, hidden_dim, hidden_act, zero_init)

    @classmethod
    def from_layer_norm(
        cls,
        layer_norm: nn.LayerNorm,
        cond_dim: int,
        hidden_dim: int | None = None,
        hidden_act: str = "silu",
        zero_init: bool = True,
    ) -> "ConditionalLayerNorm":
        """Copy a layer norm, and give the copy a condition.

        Epsilon, parameters, dtype, device, mode and ``requires_grad`` are those of ``layer_norm``,
        which stays as it is. Without ``bias`` in it the condition moves the scale only.

        Raises:
            TypeError, ValueError: if it is not an ``nn.LayerNorm`` over one axis with parameters.
        """
        if type(layer_norm) is not nn.LayerNorm:
            raise TypeError(f"`layer_norm` must be an nn.LayerNorm itself; got {type(layer_norm)}.")
        if why := _obstacle(layer_norm, cond_dim, hidden_dim):
            raise ValueError(f"`layer_norm` {why}")
        norm = copy.deepcopy(layer_norm)
        norm.__class__ = cls
        norm._attach(cond_dim, hidden_dim, hidden_act, zero_init)
        return norm

    def forward(
        self, x: Float[Tensor, "*positions dim"], cond: Float[Tensor, "rows width"] | None = None
    ) -> Float[Tensor, "*positions dim"]:
        """Normalise ``x`` of shape ``(batch, *positions, dim)`` under ``cond``.

        ``cond`` is ``(batch, cond_dim)`` or ``(1, cond_dim)``. ``None`` takes the condition of the
        enclosing :func:`condition` block; without one the base scale and shift act.

        Raises:
            TypeError, ValueError: if dtype, batch or width of ``cond`` do not fit.
            RuntimeError: if a backward pass runs the norm again after its block has ended.
        """
        if cond is None:
            cond = self._condition_of_the_block()
        if cond is None:
            return super().forward(x)
        gamma, beta = self.gamma_beta(cond)
        if len(cond) not in (1, len(x)):
            raise ValueError(
                f"`cond` must hold one row per example of `x` {tuple(x.shape)}, or one for all; "
                f"got {len(cond)}. For beams write `cond.repeat_interleave(num_beams, dim=0)`."
            )
        return conditional_layer_norm(x, gamma, beta, self.eps)

    def gamma_beta(
        self, cond: Float[Tensor, "rows width"]
    ) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows dim"] | None]:
        """Return the scale and the shift (``None`` in a norm without bias) under ``cond``."""
        self._require_cond(cond)
        # In bfloat16 1 + s is 1 for |s| < 0.0019: the sum is float32, or float64 for float64.
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        moved = self.cond_proj(cond.to(_layers(self)[0].weight.dtype)).to(wide)
        if self.bias is None:
            return self.weight.to(wide) + moved, None
        scale, shift = moved.chunk(2, dim=-1)
        return self.weight.to(wide) + scale, self.bias.to(wide) + shift

    def fold(self, cond: Float[Tensor, "... width"]) -> nn.LayerNorm:
        """Return the plain norm that this one is under one condition; errors as :func:`fold`."""
        norm = copy.deepcopy(self)
        norm._become_plain(_one_condition(cond))
        return norm

    def _attach(self, cond_dim: int, hidden_dim: int | None, act: str, zero_init: bool) -> None:
        activations = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}
        if act not in activations:
            raise ValueError(f"`hidden_act` must be one of {[*activations]}; got {act!r}.")
        outputs = self.weight.numel() * (1 if self.bias is None else 2)
        linear = partial(nn.Linear, bias=False, device=self.weight.device, dtype=self.weight.dtype)
        self.cond_proj = last = linear(hidden_dim or cond_dim, outputs)
        if hidden_dim is not None:
            self.cond_proj = nn.Sequential(linear(cond_dim, hidden_dim), activations[act](), last)
        if zero_init:
            nn.init.zeros_(last.weight)
        self.cond_proj.train(self.training)

    @torch.no_grad()
    def _become_plain(self, cond: Tensor) -> None:
        gamma, beta = self.gamma_beta(cond)
        # New parameters: the old ones may be shared with a norm that has another projection.
        for old, name, value in ((self.weight, "weight", gamma), (self.bias, "bias", beta)):
            if value is not None:
                setattr(self, name, nn.Parameter(value[0].to(old.dtype), old.requires_grad))
        del self.cond_proj
        self.__class__ = nn.LayerNorm

    def _condition_of_the_block(self) -> Tensor | None:
        for block in reversed(_this_thread.blocks):
            if id(self) in block.norms:
                block.used = self._ever_conditioned = True
                return block.cond
        if self._ever_conditioned and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "A backward pass runs this norm again (activation checkpointing), but its "
                "`condition` block has ended. Open it inside the checkpointed function, with the "
                "condition as one of its arguments, or call `backward` inside the block."
            )
        return None

    def _require_cond(self, cond: Tensor) -> None:
        first = _layers(self)[0]
        width, dtype = first.in_features, first.weight.dtype
        if isinstance(cond, Tensor) and not cond.is_floating_point():
            raise TypeError(
                f"`cond` must hold a vector of floats per example; got {cond.dtype}. Embed a "
                f"class first: `nn.Embedding(num_classes, {width})(label)`."
            )
        _require_floats("cond", cond)
        if cond.device != first.weight.device:
            raise ValueError(
                f"`cond` is on {cond.device}, the norm on {first.weight.device}; move one of them."
            )
        if cond.ndim != 2 or cond.shape[1] != width:
            raise ValueError(f"`cond` must be (batch or 1, {width}); got {tuple(cond.shape)}.")
        if torch.promote_types(cond.dtype, dtype) != dtype:
            raise TypeError(f"`cond` is {cond.dtype}, the norm {dtype}; write `cond.to({dtype})`.")


def _layers(norm: ConditionalLayerNorm) -> list[nn.Linear]:
    return [layer for layer in norm.cond_proj.modules() if isinstance(layer, nn.Linear)]


def _obstacle(norm: nn.LayerNorm, cond_dim: int, hidden_dim: int | None) -> str | None:
    if isinstance(norm, ConditionalLayerNorm) and hasattr(norm, "cond_proj"):
        sizes = [layer.in_features for layer in _layers(norm)]
        wanted = [cond_dim] if hidden_dim is None else [cond_dim, hidden_dim]
        return None if sizes == wanted else f"has a condition already, of sizes {sizes}."
    if len(norm.normalized_shape) != 1:
        return (
            f"has `normalized_shape` {norm.normalized_shape}, several axes; a condition needs one."
        )
    if norm.weight is None:
        return "has no parameters for a condition to move; make it with `elementwise_affine=True`."
    sizes = [cond_dim] if hidden_dim is None else [cond_dim, hidden_dim]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        return f"needs whole `cond_dim` and `hidden_dim` of 1 or more; got {sizes}."
    return None


def convert_layer_norms(
    model: nn.Module,
    cond_dim: int,
    *,
    hidden_dim: int | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Turn every ``nn.LayerNorm`` of a model into a :class:`ConditionalLayerNorm`, in place.

    Parameters, hooks, mode, dtype, device and sharing stay; each norm gains ``cond_proj``, whose
    last layer is zero, so under any condition the model computes what it did, to rounding. To
    convert twice changes nothing. In ``nn.TransformerEncoder`` the fused inference path, which
    reads the weight of a norm without calling it, is switched off.

    Args:
        model: any module. Only norms whose type is exactly ``nn.LayerNorm`` are converted.
        cond_dim, hidden_dim: as in :class:`ConditionalLayerNorm`.
        where: ``where(name, norm)`` chooses norms (a shared one by any of its names).

    Raises:
        ValueError: if nothing matches, or a matching norm cannot be converted (several axes, no
            parameters, converted before with other sizes). The model is then as it was.

    Example:
        >>> model = convert_layer_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), cond_dim=3)
        >>> type(model[1]).__name__
        'ConditionalLayerNorm'
    """
    chosen = {
        norm: name
        for name, norm in model.named_modules(remove_duplicate=False)
        if type(norm) in (nn.LayerNorm, ConditionalLayerNorm) and (not where or where(name, norm))
    }
    if not chosen:
        which = "that `where` accepts" if where else "(that exact type is converted, no subclass)"
        raise ValueError(f"`model` ({type(model).__name__}) holds no nn.LayerNorm {which}.")
    for norm, name in chosen.items():
        if why := _obstacle(norm, cond_dim, hidden_dim):
            raise ValueError(f"Nothing was converted: {name or 'the model'} {why}")
    for norm in chosen:
        if type(norm) is nn.LayerNorm:
            norm.__class__ = ConditionalLayerNorm
            norm._attach(cond_dim, hidden_dim, "silu", zero_init=True)
    for module in model.modules():
        if any(isinstance(inner, ConditionalLayerNorm) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # its condition for the fused path
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # nested tensors serve the fused path only
    return model


@dataclass(eq=False)
class _Block:
    norms: frozenset[int]
    cond: Tensor | None
    used: bool = False


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.blocks: list[_Block] = []


_this_thread = _ThisThread()


@contextlib.contextmanager
def condition(model: nn.Module, cond: Float[Tensor, "rows width"] | None) -> Iterator[None]:
    """Give every conditional norm of ``model`` the condition ``cond`` while the block runs.

    Blocks nest (the innermost that covers a norm wins), end with an exception too, and are seen by
    their own thread only. With activation checkpointing, open them in the checkpointed function.
    ``cond`` is ``(batch, cond_dim)`` or ``(1, cond_dim)``, or ``None`` for the base norms.

    Raises:
        TypeError, ValueError: if ``cond`` does not fit the norms, or ``model`` has none.
        RuntimeError: at the end of a block in which no norm used the condition.

    Example:
        >>> model = convert_layer_norms(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), cond_dim=3)
        >>> with condition(model, torch.randn(2, 3)):
        ...     y = model(torch.randn(2, 5, 4))
    """
    norms = _conditional_norms(model)
    for norm in norms if cond is not None else []:
        norm._require_cond(cond)
    block = _Block(frozenset(map(id, norms)), cond)
    _this_thread.blocks.append(block)
    try:
        yield
    finally:
        _this_thread.blocks.remove(block)
    if cond is not None and not block.used:
        raise RuntimeError(
            f"The condition was not used by any of the model's {len(norms)} conditional norms. Run "
            f"the model itself, not a copy, inside the block and in its thread."
        )


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
    cond, folded = _one_condition(cond), copy.deepcopy(model)
    for norm in _conditional_norms(folded):
        norm._become_plain(cond)
    return folded


def conditional_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what conversion has added, the ``cond_proj`` parameters, by their names."""
    new = {p for norm in _conditional_norms(model) for p in norm.cond_proj.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if parameter in new}


def freeze_base(model: nn.Module) -> nn.Module:
    """Let only the ``cond_proj`` parameters train, and return ``model``."""
    trained = conditional_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _conditional_norms(model: nn.Module) -> list[ConditionalLayerNorm]:
    norms = [m for m in model.modules() if isinstance(m, ConditionalLayerNorm)]
    if not norms:
        raise ValueError("`model` holds no conditional norm; call `convert_layer_norms` first.")
    return norms


def _one_condition(cond: Tensor) -> Tensor:
    if not isinstance(cond, Tensor):
        raise TypeError(f"`cond` must be a tensor; got {type(cond).__name__}.")
    if cond.ndim == 1 or (cond.ndim == 2 and len(cond) == 1):
        return cond.reshape(1, -1)
    raise ValueError(
        f"`cond` must be one vector, (cond_dim,) or (1, cond_dim); got {tuple(cond.shape)}. For "
        f"several, fold once for each."
    )


class ConditionalLanguageModel(nn.Module):
    r"""Small causal Transformer for :math:`p(x \mid c) = \prod_t p(x_t \mid x_{<t}, c)`.

    Pre-norm blocks, learned positions, output tied to the embedding. The label's embedding is the
    condition of every norm, and acts nowhere else.

    Args:
        vocabulary_size: number of tokens.
        num_classes: number of labels; ``None`` for the plain model without condition. From the same
            seed both start as the same function.
        dim: width of the residual stream, a multiple of ``num_heads``.
        num_layers, num_heads: blocks, and attention heads in each.
        cond_dim: length of a label's embedding.
        max_length: longest input in tokens.
        padding: token that fills the end of shorter texts.

    Source: article 7124, experiment A; linear layers start as in GPT-2 (Radford et al.
    2019), embeddings at ``dim ** -0.5``.

    Example:
        >>> model = ConditionalLanguageModel(50, num_classes=2, dim=16, num_layers=1)
        >>> tokens, label = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([0, 1])
        >>> model(tokens, label).shape, model.nll(tokens, label).shape
        (torch.Size([2, 3, 50]), torch.Size([2]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        num_classes: int | None = None,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        cond_dim: int = 32,
        max_length: int = 64,
        padding: int = 0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`dim` must be a multiple of `num_heads`; got {dim} and {num_heads}.")
        self.padding = padding
        self.embedding = nn.Embedding(vocabulary_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList(_TransformerBlock(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                # Each block adds two branches to the residual stream: its variance stays put.
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5)
            elif "embedding" in name or "positions" in name:
                # The output is tied: after the final norm the logits start with variance 1.
                nn.init.normal_(parameter, std=dim**-0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name:
                nn.init.zeros_(parameter)
        self.class_embedding = None
        if num_classes is not None:  # last, so that all draws above are those of the plain model
            convert_layer_norms(self, cond_dim)
            self.class_embedding = nn.Embedding(num_classes, cond_dim)

    def forward(
        self, tokens: Int[Tensor, "batch time"], label: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Return logits; those at time ``t`` predict token ``t + 1``.

        ``label`` is a class index per text. ``None`` runs the base norms, or the condition of an
        enclosing :func:`condition` block.

        Raises:
            TypeError, ValueError: if a dtype, shape, length or index does not fit.
        """
        return F.linear(self._states(tokens, label), self.embedding.weight)

    def nll(
        self, tokens: Int[Tensor, "batch time"], label: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch"]:
        r"""Return :math:`-\sum_{t \ge 1} \log p(x_t \mid x_{<t}, c)` of each text, in nats.

        The first token is given, not predicted. Padding is no target; padding before another token
        is a ``ValueError``. Otherwise as :meth:`forward`.
        """
        self._require_tokens(tokens)
        padded = tokens == self.padding
        if (padded[:, :-1] & ~padded[:, 1:]).any():
            raise ValueError(f"`tokens` has padding ({self.padding}) before a token; move it last.")
        states, targets, kept = self._states(tokens[:, :-1], label), tokens[:, 1:], ~padded[:, 1:]
        logits = F.linear(states[kept], self.embedding.weight)  # padding costs nothing
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets[kept].long(), reduction="none")
        return losses.new_zeros(targets.shape).masked_scatter(kept, losses).sum(dim=1)

    def fold(self, label: int) -> "ConditionalLanguageModel":
        """Return the plain model that this one is for one label; it takes no label any more."""
        self._require_label(torch.tensor([label]), batch=1)
        folded = fold(self, self.class_embedding.weight[label].detach())
        folded.class_embedding = None
        return folded

    def _states(self, tokens: Tensor, label: Tensor | None) -> Tensor:
        self._require_tokens(tokens)
        block = contextlib.nullcontext()
        if label is not None:
            self._require_label(label, len(tokens))
            block = condition(self, self.class_embedding(label))
        with block:
            x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
            for transformer_block in self.blocks:
                x = transformer_block(x)
            return self.norm(x)

    def _require_tokens(self, tokens: Tensor) -> None:
        _require_indices("tokens", "token indices are", tokens, self.embedding.num_embeddings)
        longest = self.positions.num_embeddings
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            raise ValueError(
                f"`tokens` must be (batch, time), time up to {longest} (`max_length`); got "
                f"{tuple(tokens.shape)}. `tokens[None]` for one text, `[:, :{longest}]` to cut."
            )

    def _require_label(self, label: Tensor, batch: int) -> None:
        if self.class_embedding is None:
            raise ValueError("`label` was given to a model without classes; set `num_classes`.")
        _require_indices("label", "a class index is", label, self.class_embedding.num_embeddings)
        if label.shape != (batch,):
            raise ValueError(f"`label` must be ({batch},), one per text; got {tuple(label.shape)}.")


def _require_indices(name: str, expectation: str, value: Tensor, size: int) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"`{name}`: {expectation} expected, a tensor of int64 or int32; got {got}.")
    if value.numel() and not 0 <= value.min() <= value.max() < size:
        raise ValueError(f"`{name}` must lie in 0..{size - 1}; got {value.min()}..{value.max()}.")


class _TransformerBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.attention_in = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        heads = self.attention_in(self.attention_norm(x)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
