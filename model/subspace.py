"""Form `subspace` (arXiv 2506.01260, reparametrised): what blocks write lies in the column space of a fixed basis.

U (d, b) has random orthonormal columns that every stage draws alike. A matrix that writes to the residual is U Z with Z
trained, so the residual is E(token) + U c, and c is all that has to cross. E is a frozen random table, of full rank,
since tokens would have to share b directions otherwise. Nothing here but Z and the trained part of the embedding is a
parameter: basis and table follow from the config.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BoundaryForm, ModelConfig
from model.split import StagePlan
from model.transformer import Block, Embedding, Linear


class Confined(Linear):
    """x Zᵀ Uᵀ without bias: a matrix of `inputs` columns that writes into the subspace."""

    basis: Tensor

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__(inputs, config.boundary_width)
        self.register_buffer("basis", subspace(config), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, hidden)."""
        inside = super().forward(x)
        return F.linear(inside, self.basis)


class ConfinedEmbedding(Embedding):
    """E(token) + U c(token)."""

    basis: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocab, config.boundary_width)
        self.fixed = FixedTable(config)
        self.register_buffer("basis", subspace(config), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) to (B, T, hidden)."""
        fixed: Tensor = self.fixed(tokens)
        return F.linear(super().forward(tokens), self.basis) + fixed


class FixedTable(nn.Module):
    """E, frozen."""

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        drawn = torch.rand(config.vocab, config.hidden, generator=_generator("table"))
        self.register_buffer("table", drawn.mul_(2).sub_(1).mul_(3**0.5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) to (B, T, hidden), of unit variance."""
        drawn: Tensor = F.embedding(tokens, self.table)
        return drawn


def confined(config: ModelConfig, plan: StagePlan) -> bool:
    """Whether a stage's blocks, and a head's embedding, write into the subspace: before the last boundary."""
    return config.boundary.form is BoundaryForm.SUBSPACE and not plan.is_last


def confine(block: Block, config: ModelConfig) -> None:
    """Replaces the two matrices with which a block writes to the residual."""
    block.attention.o = Confined(config.hidden, config)
    block.ffn.down = Confined(config.ffn, config)


def subspace(config: ModelConfig) -> Tensor:
    """U (hidden, width): orthonormal columns, drawn alike by every stage up to rounding."""
    drawn = torch.randn(config.hidden, config.boundary_width, generator=_generator("basis"), dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.float()


def _generator(label: str) -> torch.Generator:
    digest = hashlib.sha256(f"orion/subspace/{label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
