"""A small language model under a condition, with the ways to condition it side by side."""

import contextlib
import copy
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cln_tutorial.conditional_norm.conversion import convert_layer_norms, fold
from cln_tutorial.conditional_norm.functional import (
    gated_residual,
    gated_residual_modulated_layer_norm,
    modulated_layer_norm,
    require_indices,
)
from cln_tutorial.conditional_norm.modules import (
    AdaLNZero,
    ConditionalLayerNorm,
    ConditionalNorm,
    condition,
)

Conditioning = Literal[
    "norms", "last_norm", "last_shift", "modulated", "adaln_zero", "input", "prefix"
]

KeysAndValues = tuple[Tensor, Tensor] | None


class ConditionalLanguageModel(nn.Module):
    r"""Small causal Transformer for :math:`p(x \mid c) = \prod_t p(x_t \mid x_{<t}, c)`.

    Pre-norm blocks, learned positions, output tied to the embedding. The condition :math:`c` is the
    embedding of a label, or a vector that the caller has, such as that of an image.

    Args:
        vocabulary_size: number of tokens.
        num_classes: number of labels; ``None`` if conditions are vectors, or there are none.
        conditioning: where the condition acts, and nowhere else:

            * ``"norms"``: scale and shift of every norm, as :func:`convert_layer_norms` does;
            * ``"last_norm"``: those of the norm before the output only;
            * ``"last_shift"``: the shift of that norm only, which adds a bias to the logits;
            * ``"modulated"``: as ``"norms"``, but multiplied,
              :math:`(\hat x \gamma + \beta)(1 + s) + t`;
            * ``"adaln_zero"``: scale, shift and gate of every branch, as in DiT;
            * ``"input"``: a vector added to the embedding of every token;
            * ``"prefix"``: a token of its own before the text.

            The default is ``"norms"`` if there are classes, else a plain model without condition.
        dim: width of the residual stream, a multiple of ``num_heads``.
        num_layers, num_heads: blocks, and attention heads in each.
        cond_dim: length of the condition.
        max_length: longest input in tokens.
        padding: token that fills the end of shorter texts.
        cond_dropout: share of the texts that in training mode have the null condition instead of
            their own, for the ``guidance`` of :func:`sample`.

    From the same seed the plain model and those of ``"norms"``, ``"last_norm"``, ``"last_shift"``,
    ``"modulated"`` and ``"input"`` start as the same function.

    Source: article 7124, experiment A; linear layers start as in GPT-2 (Radford et al. 2019),
    embeddings at ``0.5 * dim ** -0.5``; ``"adaln_zero"`` is that of DiT (arXiv 2212.09748), whose
    linear layers start larger (Xavier).

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
        conditioning: Conditioning | None = None,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        cond_dim: int = 32,
        max_length: int = 64,
        padding: int = 0,
        cond_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if conditioning not in (None, *get_args(Conditioning)):
            known = ", ".join(map(repr, get_args(Conditioning)))
            raise ValueError(f"`conditioning` must be one of {known}; got {conditioning!r}.")
        if not 0 <= cond_dropout < 1:
            raise ValueError(f"`cond_dropout` must lie in [0, 1); got {cond_dropout}.")
        if cond_dropout and conditioning == "prefix":
            raise ValueError(
                "`cond_dropout` would give a text a prefix of zeros, which is not none; train some "
                "batches with `cond=None` instead."
            )
        sizes = {"vocabulary_size": vocabulary_size, "dim": dim, "num_layers": num_layers}
        sizes |= {"num_heads": num_heads, "cond_dim": cond_dim, "max_length": max_length}
        if num_classes is not None:
            sizes["num_classes"] = num_classes
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be 1 or more; got {size}.")
        if dim % num_heads:
            raise ValueError(f"`dim` must be a multiple of `num_heads`; got {dim} and {num_heads}.")
        if not 0 <= padding < vocabulary_size:
            raise ValueError(f"`padding` must lie in 0..{vocabulary_size - 1}; got {padding}.")
        if num_classes is not None:
            conditioning = conditioning or "norms"
        self.padding, self.cond_dropout = padding, cond_dropout
        self.conditioning, self.cond_dim = conditioning, cond_dim
        self.embedding = nn.Embedding(vocabulary_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        block = _AdaLNZeroBlock if conditioning == "adaln_zero" else _TransformerBlock
        self.blocks = nn.ModuleList(block(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self._start()
        # Last, so that all draws above are those of the plain model.
        self._give_condition()
        self.class_embedding = None
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes, cond_dim)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        cond: Int[Tensor, "batch"] | Float[Tensor, "rows width"] | None = None,
        cache: "KeyValueCache | None" = None,
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Return logits; those at time ``t`` predict token ``t + 1``.

        Args:
            tokens: token indices.
            cond: a class index per text, or condition vectors ``(batch or 1, cond_dim)``. ``None``
                is the null condition, as if it were zero (for ``"prefix"``, no prefix); the
                condition of an enclosing :func:`condition` block then acts on the norms.
            cache: of the tokens before these, which it then holds as well.

        Raises:
            TypeError, ValueError: if a dtype, shape, length or index does not fit.
            ValueError: if ``cache`` was begun under another condition.
        """
        return F.linear(self._states(tokens, cond, cache), self.embedding.weight)

    def nll(
        self,
        tokens: Int[Tensor, "batch time"],
        cond: Int[Tensor, "batch"] | Float[Tensor, "rows width"] | None = None,
    ) -> Float[Tensor, "batch"]:
        r"""Return :math:`-\sum_{t \ge 1} \log p(x_t \mid x_{<t}, c)` of each text, in nats.

        The first token is given, not predicted. Padding is no target; padding before another token
        is a ``ValueError``. Otherwise as :meth:`forward`.
        """
        self._require_tokens(tokens)
        padded = tokens == self.padding
        if (padded[:, :-1] & ~padded[:, 1:]).any():
            raise ValueError(f"`tokens` has padding ({self.padding}) before a token; move it last.")
        states, targets, kept = self._states(tokens[:, :-1], cond), tokens[:, 1:], ~padded[:, 1:]
        logits = F.linear(states[kept], self.embedding.weight)  # padding costs nothing
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets[kept].long(), reduction="none")
        return losses.new_zeros(targets.shape).masked_scatter(kept, losses).sum(dim=1)

    def fold(self, label: int) -> "ConditionalLanguageModel":
        """Return the plain model that this one is for one label; it takes no condition any more.

        Raises:
            ValueError: if there is no such label, or the condition acts outside the norms.
        """
        if self.conditioning not in ("norms", "last_norm", "last_shift", "modulated"):
            raise ValueError(
                f"`fold` needs a condition that acts in the norms alone; got a model whose "
                f"`conditioning` is {self.conditioning!r}."
            )
        c = self._condition(torch.tensor([label], device=self.embedding.weight.device), 1)
        if self.conditioning == "last_shift":
            folded = copy.deepcopy(self)
            folded.norm.bias.data += folded.cond_in(c)[0].detach()
            del folded.cond_in
        else:
            folded = fold(self, c[0].detach())
        folded.class_embedding = folded.conditioning = None
        return folded

    def _start(self) -> None:
        dim, num_layers = self.embedding.embedding_dim, len(self.blocks)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                # Each block adds two branches to the residual stream: its variance stays put.
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5)
            elif "embedding" in name or "positions" in name:
                # The output is tied: after the final norm the logits start with variance 1/4.
                nn.init.normal_(parameter, std=0.5 * dim**-0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def _give_condition(self) -> None:
        dim, cond_dim = self.embedding.embedding_dim, self.cond_dim
        match self.conditioning:
            case "norms":
                convert_layer_norms(self, cond_dim)
            case "last_norm":
                convert_layer_norms(self, cond_dim, where=lambda name, _: name == "norm")
            case "modulated":
                convert_layer_norms(self, cond_dim)
                for module in self.modules():
                    if isinstance(module, ConditionalLayerNorm):
                        module.__class__ = _ModulatedLayerNorm
            case "adaln_zero":
                for block in self.blocks:
                    for linear in block.children():
                        # As large as in DiT: behind closed gates small ones would start slowly.
                        nn.init.xavier_uniform_(linear.weight)
                    block.modulation = AdaLNZero(dim, cond_dim)
                self.modulation = AdaLNZero(dim, cond_dim, n_outputs=2)
                self.norm = nn.Identity()  # the modulation normalises
            case "last_shift" | "input":
                self.cond_in = nn.Linear(cond_dim, dim, bias=False)
                nn.init.zeros_(self.cond_in.weight)
            case "prefix":
                # As large as a token, because a norm of zeros would multiply gradients by 300.
                self.cond_in = nn.Linear(cond_dim, dim, bias=False)
                nn.init.normal_(self.cond_in.weight, std=0.5 * (dim * cond_dim) ** -0.5)

    def _states(
        self, tokens: Tensor, cond: Tensor | None, cache: "KeyValueCache | None" = None
    ) -> Tensor:
        begin = 0 if cache is None else cache.length
        self._require_tokens(tokens, begin)
        c = self._condition(cond, len(tokens))
        layers: list[KeysAndValues] = [None] * len(self.blocks)
        begun = False
        if cache is not None:
            conditions = self._conditions_of_the_blocks() if c is None else [c]
            begun = cache._begin(self, len(tokens), conditions)
            layers = list(cache._layers)
        if self.training and self.cond_dropout and c is not None:
            # W has no bias: the condition zero is the null condition.
            c = c * (torch.rand(len(tokens), 1, device=c.device) >= self.cond_dropout)
        act = self.conditioning if c is not None else None
        x = self.embedding(tokens) + self.positions.weight[begin : begin + tokens.shape[1]]
        if act == "input":
            x = x + self.cond_in(c)[:, None]
        if act == "prefix" and not begun:
            x = torch.cat([self.cond_in(c)[:, None].expand(len(x), 1, -1), x], dim=1)
        in_norms = act in ("norms", "last_norm", "modulated")
        with condition(self, c) if in_norms else contextlib.nullcontext():
            for number, block in enumerate(self.blocks):
                x, layers[number] = block(x, c, layers[number])
            x = self.norm(x)
        if self.conditioning == "adaln_zero":
            shift, scale = self.modulation(_or_null(c, x, self.cond_dim))
            x = modulated_layer_norm(x, scale, shift)
        if act == "last_shift":
            x = x + self.cond_in(c)[:, None]
        if cache is not None:  # now, so that a call that was interrupted has left nothing
            cache._layers, cache.length = layers, begin + tokens.shape[1]
        return x[:, x.shape[1] - tokens.shape[1] :]

    def _condition(self, cond: Tensor | None, batch: int) -> Tensor | None:
        """The vectors of a condition."""
        if cond is None:
            return None
        if self.conditioning is None:
            raise ValueError(
                "`cond` was given to a model that has no condition; set `num_classes` or "
                "`conditioning`."
            )
        if not (isinstance(cond, Tensor) and cond.is_floating_point()):
            self._require_label(cond, batch)
            return self.class_embedding(cond)
        if cond.ndim != 2 or cond.shape[1] != self.cond_dim or len(cond) not in (1, batch):
            raise ValueError(
                f"`cond` must be ({batch} or 1, {self.cond_dim}), a vector per text; got "
                f"{tuple(cond.shape)}."
            )
        dtype = self.embedding.weight.dtype
        if torch.promote_types(cond.dtype, dtype) != dtype:
            raise TypeError(f"`cond` is {cond.dtype}, the model {dtype}; write `cond.to({dtype})`.")
        return cond.to(dtype)

    def _require_label(self, label: Tensor, batch: int) -> None:
        if self.class_embedding is None:
            raise ValueError("`cond` holds labels, the model has none; set `num_classes`.")
        size = self.class_embedding.num_embeddings
        require_indices("cond", "class indices or vectors are", label, size)
        if label.shape != (batch,):
            raise ValueError(
                f"`cond` must be ({batch},), a label per text; got {tuple(label.shape)}."
            )

    def _conditions_of_the_blocks(self) -> list[Tensor | None]:
        norms = (module for module in self.modules() if isinstance(module, ConditionalNorm))
        return [norm._condition_of_the_block()[0] for norm in norms]

    def _require_tokens(self, tokens: Tensor, begin: int = 0) -> None:
        require_indices("tokens", "token indices are", tokens, self.embedding.num_embeddings)
        longest = self.positions.num_embeddings - begin
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            after = f" after {begin} in the cache" if begin else ""
            raise ValueError(
                f"`tokens` must be (batch, time), time up to {longest} (`max_length`{after}); got "
                f"{tuple(tokens.shape)}. `tokens[None]` for one text, `[:, :{longest}]` to cut."
            )


class KeyValueCache:
    """Keys and values of the tokens that a model has read, so that each is computed once.

    Give the same cache to every call; the first fills it, and the next holds the new tokens only.
    It belongs to one model with its weights, one batch and one condition, on which keys and values
    depend; another model, batch size or condition is refused, changed weights are not seen.

    Attributes:
        length: number of tokens read.

    Example:
        >>> model = ConditionalLanguageModel(50, num_classes=2, dim=16, num_layers=1).eval()
        >>> tokens, label, cache = torch.tensor([[3, 4, 5]]), torch.tensor([1]), KeyValueCache()
        >>> first = model(tokens[:, :2], label, cache)
        >>> last = model(tokens[:, 2:], label, cache)
        >>> torch.allclose(last, model(tokens, label)[:, 2:], atol=1e-5), cache.length
        (True, 3)
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: list[KeysAndValues] = []
        self._begun_by: tuple[nn.Module, int, list[Tensor | None]] | None = None

    def _begin(
        self, model: ConditionalLanguageModel, batch: int, conditions: list[Tensor | None]
    ) -> bool:
        """Whether it holds tokens of this model, batch and condition; an error if of others."""
        conditions = [None if each is None else each.detach() for each in conditions]
        if self.length == 0:
            self._begun_by = model, batch, conditions
            self._layers = [None] * len(model.blocks)
            return False
        begun_by, of, under = self._begun_by
        if model is not begun_by or batch != of:
            raise ValueError(
                f"`cache` belongs to another model or batch (of {of}, got {batch}); begin with a "
                f"new one."
            )
        if len(conditions) != len(under) or not all(map(_same, conditions, under)):
            raise ValueError(
                "`cond` is another one than that of the tokens in `cache`: their keys and values "
                "would be wrong under it. Begin with a new cache and read the text again."
            )
        return True


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and one.equal(other))


class _ModulatedLayerNorm(ConditionalLayerNorm):
    def gamma_beta(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        scale, shift = self.cond_proj(cond.to(self.weight.dtype)).to(wide).chunk(2, dim=-1)
        return self.weight.to(wide) * (1 + scale), self.bias.to(wide) * (1 + scale) + shift


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

    def forward(
        self, x: Tensor, c: Tensor | None, before: KeysAndValues
    ) -> tuple[Tensor, KeysAndValues]:
        h, kept = self.attention(self.attention_norm(x), before)
        x = x + h
        return x + self.mlp(self.mlp_norm(x)), kept

    def attention(self, h: Tensor, before: KeysAndValues) -> tuple[Tensor, KeysAndValues]:
        heads = self.attention_in(h).unflatten(2, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        new, old = h.shape[1], 0 if before is None else before[0].shape[2]
        if old:
            key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        # One new token sees all that were before; of several, each sees none after itself.
        several = old and new > 1
        mask = h.new_ones(new, old + new, dtype=torch.bool).tril(old) if several else None
        attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=old == 0)
        return self.attention_out(attended.transpose(1, 2).flatten(2)), (key, value)

    def mlp(self, h: Tensor) -> Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(h)))


class _AdaLNZeroBlock(_TransformerBlock):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        del self.attention_norm, self.mlp_norm  # their scale and shift are the condition's

    def forward(
        self, x: Tensor, c: Tensor | None, before: KeysAndValues
    ) -> tuple[Tensor, KeysAndValues]:
        c = _or_null(c, x, self.modulation.linear.in_features)
        t1, s1, g1, t2, s2, g2 = self.modulation(c)
        h, kept = self.attention(modulated_layer_norm(x, s1, t1), before)
        x, h = gated_residual_modulated_layer_norm(x, h, g1, s2, t2)
        return gated_residual(x, self.mlp(h), g2), kept


def _or_null(c: Tensor | None, x: Tensor, cond_dim: int) -> Tensor:
    return x.new_zeros(1, cond_dim) if c is None else c
