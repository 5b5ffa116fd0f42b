r"""A small encoder without a download, for characters and for tests.

Source: article 6671 for the gated convolutions, :math:`x + \sigma(g) \odot (h - x)`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

DILATIONS = (1, 2, 5)


class EncoderOutput(NamedTuple):
    """What :class:`SmallEncoder` returns, under the name that Hugging Face gives it."""

    last_hidden_state: Float[Tensor, "b l h"]


class SmallEncoder(nn.Module):
    r"""An encoder that trains from nothing: embeddings, a few layers, a layer norm.

    "dgcnn" is a stack of residual gated dilated convolutions of width 3,

    .. math:: x \leftarrow x + \sigma(g) \odot (h - x), \qquad [h; g] = \mathrm{conv}(x),

    whose dilations 1, 2, 5 follow each other; a token sees 8 neighbours on each side of it per
    three layers. "transformer" is a stack of pre-norm attention blocks. Padding, which must stand
    behind the tokens, never reaches one in either.

    Args:
        vocab_size: number of token ids.
        hidden_size: H; the transformer needs an even number.
        kind: "dgcnn" or "transformer".
        num_layers: convolutions, or blocks.
        max_length: longest input in tokens; positions are learnt.
        dropout: rate, behind the embeddings and in each layer.

    Raises:
        ValueError: for another kind, or a size below 1.

    Source:
        Article 6671 and its code, kg-2019; Xiong et al. 2020 (arXiv 2002.04745) for pre-norm.

    Example:
        >>> from cln_tutorial.triple_extraction.encoders import SmallEncoder
        >>> encoder = SmallEncoder(vocab_size=50, hidden_size=16)
        >>> encoder(torch.tensor([[3, 1, 4]])).last_hidden_state.shape
        torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 128,
        kind: str = "dgcnn",
        num_layers: int = 6,
        max_length: int = 512,
        dropout: float | int = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size}
        for name, size in (sizes | {"num_layers": num_layers, "max_length": max_length}).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"`{name}` must be a whole number of 1 or more; got {size!r}.")
        if kind not in ("dgcnn", "transformer"):
            raise ValueError(f"`kind` must be 'dgcnn' or 'transformer'; got {kind!r}.")
        self.config = sizes | {
            "kind": kind,
            "num_layers": num_layers,
            "max_length": max_length,
            "dropout": dropout,
        }
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_length, hidden_size)
        nn.init.zeros_(self.positions.weight)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            GatedConvolution(hidden_size, DILATIONS[i % len(DILATIONS)], dropout)
            if kind == "dgcnn"
            else AttentionBlock(hidden_size, dropout)
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Shaped[Tensor, "b l"] | None = None,
    ) -> EncoderOutput:
        """Return an object whose ``last_hidden_state`` is ``(b, l, hidden_size)``.

        Args:
            input_ids: ``(b, l)``.
            attention_mask: 1 or true for tokens, 0 for padding; ``None`` for tokens only.

        Raises:
            ValueError: if the input is longer than ``max_length``.
        """
        length, longest = input_ids.shape[1], self.positions.num_embeddings
        if length > longest:
            raise ValueError(f"`input_ids` has {length} tokens, `max_length` is {longest}.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.bool()
        x = self.tokens(input_ids) + self.positions.weight[:length]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, mask)
        return EncoderOutput(self.norm(x))


class GatedConvolution(nn.Module):
    def __init__(self, hidden_size: int, dilation: int, dropout: float | int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(hidden_size, 2 * hidden_size, 3, padding=dilation, dilation=dilation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b l h"], mask: Shaped[Tensor, "b l"]) -> Tensor:
        # Zeros, as they stand behind the end of the longest sentence of a batch.
        kept = x * mask[..., None].to(x.dtype)
        new, gate = self.conv(kept.mT).mT.chunk(2, dim=-1)
        return torch.lerp(x, new.to(x.dtype), self.dropout(gate).sigmoid().to(x.dtype))


class AttentionBlock(nn.Module):
    def __init__(self, hidden_size: int, dropout: float | int) -> None:
        super().__init__()
        self.heads = math.gcd(hidden_size, 4)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attended = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b l h"], mask: Shaped[Tensor, "b l"]) -> Tensor:
        b, length, _ = x.shape
        # A token of padding sees itself: a softmax over nothing would be NaN.
        seen = mask[:, None, None] | torch.eye(length, dtype=torch.bool, device=x.device)
        qkv = self.query_key_value(self.attention_norm(x)).view(b, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.dropout(self.attended(y.transpose(1, 2).reshape(b, length, -1)))
        return x + self.dropout(self.feed_forward(self.norm(x)))
