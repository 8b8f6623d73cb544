"""Stage boundaries: what leaves a stage and what the next one makes of it.

`Sender` takes the last block's residual h and FFN output f and gives y, the only tensor (with its gradient)
that crosses the network. `Receiver` takes y, and where it restores them the tokens, and gives the first block its
attention input and the residual it carries on. All forms share this interface (b = width, x = h + f, [:b] = first b
channels, pad = zeros after them, norm = root mean square 1 over channels):

    none         y = x                          input = carry = y + R(tokens)
    truncation   y = x[:b]                      input = carry = pad(y)
    a            y = h[:b] + W silu(f)          input = relu(W' y),  carry = pad(y)
    b            y = Enc(x) + x[:b]             input = carry = Dec(y) + pad(y)
    subspace     y = Uᵀ(x - E(tokens))          input = carry = U y + E(tokens)
    t            y = norm(W norm(x))            input = carry = W' y + R(tokens)

*a* and *b* are ResBM's (arXiv 2604.11947): only the first b residual channels keep a straight path through all stages.

*subspace* (arXiv 2506.01260) keeps what blocks before the last boundary write inside the column space of U, so y loses
nothing but rounding; see `subspace.py`.

*t* need not carry what every stage can compute: a sample's id gives its tokens everywhere, for free. Each receiver adds
R, a low-rank table of its own over tokens and, with `pairs`, over hashed pairs of neighbours, and the b channels are
left for context. `none` may have R too, which makes it the control: the same extra parameters, nothing compressed.

Both ends are built in the stage's constructor from its role, so a stage's parameters never depend on what has been
sent through it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BoundaryForm, ModelConfig
from model.subspace import FixedTable, subspace
from model.transformer import Embedding, Linear

_PRIME = 2**31 - 1
_NORMED = 1e-6
"""Added to mean squares before their root."""


class Sender(nn.Module):
    """The last stage-side half of a boundary."""

    basis: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.form = config.boundary.form
        self.width = config.boundary_width
        if self.form in (BoundaryForm.A, BoundaryForm.T):
            self.encoder: nn.Module = Linear(config.hidden, self.width)
        elif self.form is BoundaryForm.B:
            self.encoder = _two_layers(config.hidden, _middle(self.width), self.width)
        elif self.form is BoundaryForm.SUBSPACE:
            self.fixed = FixedTable(config)
            self.register_buffer("basis", subspace(config), persistent=False)

    def forward(self, residual: Tensor, branch: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Residual after attention and FFN output, both (B, T, hidden), to y (B, T, width).

        Form `subspace` needs `tokens`, int64 (B, T).
        """
        if self.form is BoundaryForm.A:
            encoded: Tensor = self.encoder(F.silu(branch))
            return residual[..., : self.width] + encoded
        x = residual + branch
        if self.form is BoundaryForm.TRUNCATION:
            return x[..., : self.width].contiguous()
        if self.form is BoundaryForm.B:
            encoded = self.encoder(x)
            return encoded + x[..., : self.width]
        if self.form is BoundaryForm.SUBSPACE:
            inside: Tensor = (x - self.fixed(tokens)) @ self.basis
            return inside
        if self.form is BoundaryForm.T:
            return _normed(self.encoder(_normed(x)))
        return x


class Receiver(nn.Module):
    """The next stage's half of a boundary."""

    basis: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.form = config.boundary.form
        self.padding = config.hidden - config.boundary_width
        width = config.boundary_width
        if self.form in (BoundaryForm.A, BoundaryForm.T):
            self.decoder: nn.Module = Linear(width, config.hidden)
        elif self.form is BoundaryForm.B:
            self.decoder = _two_layers(width, _middle(width), config.hidden)
        elif self.form is BoundaryForm.SUBSPACE:
            self.fixed = FixedTable(config)
            self.register_buffer("basis", subspace(config), persistent=False)
        self.restore = Restore(config) if config.boundary.rank else None

    def forward(self, y: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (B, T, width) to (branch input, carry), both (B, T, hidden).

        A receiver that restores needs `tokens`, int64 (B, T).
        """
        if self.form is BoundaryForm.A:
            return F.relu(self.decoder(y)), F.pad(y, (0, self.padding))
        if self.form is BoundaryForm.TRUNCATION:
            x = F.pad(y, (0, self.padding))
        elif self.form is BoundaryForm.B:
            x = self.decoder(y) + F.pad(y, (0, self.padding))
        elif self.form is BoundaryForm.SUBSPACE:
            x = F.linear(y, self.basis) + self.fixed(tokens)
        elif self.form is BoundaryForm.T:
            x = self.decoder(y)
        else:
            x = y
        if self.restore is not None:
            x = x + self.restore(tokens)
        return x, x


class Restore(nn.Module):
    """R: what a stage knows of a token without being told.

    Tables of `rank` columns and their ways to the residual, which those as wide as the residual need not have."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rank = config.boundary.rank
        self.tokens = Embedding(config.vocab, rank)
        self.out = _widened(rank, config)
        self.rows = config.boundary.pairs
        if self.rows:
            self.token_pairs = Embedding(self.rows, rank)
            self.pairs_out = _widened(rank, config)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, T) to (B, T, hidden)."""
        restored: Tensor = self.out(self.tokens(tokens))
        if self.rows:
            restored = restored + self.pairs_out(self.token_pairs(hashed_pairs(tokens, self.rows)))
        return restored


def _widened(rank: int, config: ModelConfig) -> nn.Module:
    return Linear(rank, config.hidden) if rank < config.hidden else nn.Identity()


def hashed_pairs(tokens: Tensor, rows: int) -> Tensor:
    """Rows of a table for each token and the one before it, int64 (B, T) to (B, T); before the first stands id 0.

    A multiplicative hash (Knuth, TAOCP 6.4): pairs that share a row share what is learned there.
    """
    before = F.pad(tokens, (1, 0))[:, : tokens.shape[1]]
    mixed = (tokens * 1_000_003 + before) % _PRIME * 2_654_435_761
    return (mixed >> 7) % rows


def sender_parameters(config: ModelConfig) -> int:
    """Parameters of one `Sender`."""
    return _end_parameters(config)


def receiver_parameters(config: ModelConfig) -> int:
    """Parameters of one `Receiver`: it mirrors the sender, and may restore tokens."""
    rank, pairs = config.boundary.rank, config.boundary.pairs
    widened = ((rank > 0) + (pairs > 0)) * config.hidden if rank < config.hidden else 0
    return _end_parameters(config) + rank * (config.vocab + pairs + widened)


def _end_parameters(config: ModelConfig) -> int:
    width = config.boundary.width
    match config.boundary.form:
        case BoundaryForm.A | BoundaryForm.T:
            return width * config.hidden
        case BoundaryForm.B:
            return _middle(width) * (config.hidden + width)
        case _:
            return 0


def _normed(x: Tensor) -> Tensor:
    """x over its root mean square, per token."""
    return F.rms_norm(x, x.shape[-1:], eps=_NORMED)


def _middle(width: int) -> int:
    return max(4 * width, 64)


def _two_layers(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Linear(inputs, middle), nn.SiLU(), Linear(middle, outputs))
