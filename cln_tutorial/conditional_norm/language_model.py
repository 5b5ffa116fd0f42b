"""A small language model under a condition, the article's experiment in little."""

import contextlib

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cln_tutorial.conditional_norm.conversion import convert_layer_norms, fold
from cln_tutorial.conditional_norm.modules import condition


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
