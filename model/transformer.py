"""The decoder's parts: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, block.

Written to be read, and numerically equal to `transformers`' Llama (tests hold it within 1e-5). Two choices
differ from common code: norm weights and rotary tables stay fp32 whatever the matrices are, and a block
returns its residual and its FFN output apart, because a stage boundary (bottleneck.py) treats the two
differently. Everywhere else the next input is simply their sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class Linear(nn.Module):
    """x Wᵀ without bias; the weight is left unset, since `stage.build_stage` draws every weight by its
    name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs)."""
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of a table by token id; the weight is left unset like that of `Linear`."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) to (B, T, hidden)."""
        return F.embedding(tokens, self.weight)


def rotary_tables(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Cosines and sines, fp32 (2, context, head_dim), each half repeated (Su et al., arXiv 2104.09864)."""
    tables = torch.empty(2, config.context, config.head_dim, device=device)
    if tables.is_meta:  # arithmetic without values would import torch's compiler, for seconds
        return tables
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / (config.rope_base ** (half / config.head_dim))
    angle = torch.arange(config.context, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.stack((angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)))


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Turns (B, heads, T, head_dim) by the tables (2, T, head_dim): x·cos + (-x₂, x₁)·sin, in fp32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * tables[0] + turned * tables[1]).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) to the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv = config.kv_heads * config.head_dim
        self.q = Linear(config.hidden, config.hidden)
        self.k = Linear(config.hidden, kv)
        self.v = Linear(config.hidden, kv)
        self.o = Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        """(B, T, hidden) to (B, T, hidden); `tables` is (2, T, head_dim)."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(q, tables), rotate(k, tables)
        if q.is_cuda and q.dtype == torch.float32:
            # torch's only kernel for this that stores no scores knows no groups.
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden, config.ffn)
        self.up = Linear(config.hidden, config.ffn)
        self.down = Linear(config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden) to (B, T, hidden)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """One decoder layer, with the residual and the FFN branch returned apart."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden, config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, branch_input: Tensor, carry: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (h, f): h = carry + attention(norm(branch_input)), f = ffn(norm(h)); all (B, T, hidden).

        Inside a stage `branch_input` and `carry` are the same tensor; after a boundary of form A they are
        not.
        """
        h = carry + self.attention(self.attention_norm(branch_input), tables)
        return h, self.ffn(self.ffn_norm(h))
