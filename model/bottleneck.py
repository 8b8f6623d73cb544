"""Stage boundaries: what leaves a stage and what the next one makes of it.

`Sender` takes the last block's residual h and FFN output f and gives y, the only tensor (with its gradient)
that crosses the network. `Receiver` takes y and gives the first block its attention input and the residual
it carries on. Three forms share this interface (ResBM, arXiv 2604.11947; b = width, [:b] = first b
channels, pad = zeros after them):

    none   y = h + f                           input = carry = y
    A      y = h[:b] + W silu(f)               input = relu(W' y),  carry = pad(y)
    B      y = Enc(x) + x[:b], x = h + f       input = carry = Dec(y) + pad(y)

Only the first b residual channels keep a straight path through all stages. Both ends are built in the
stage's constructor from its role, so a stage's parameters never depend on what has been sent through it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BoundaryForm, ModelConfig
from model.transformer import Linear


class Sender(nn.Module):
    """The last stage-side half of a boundary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.form = config.boundary.form
        self.width = config.boundary_width
        if self.form is BoundaryForm.A:
            self.encoder: nn.Module = Linear(config.hidden, self.width)
        elif self.form is BoundaryForm.B:
            self.encoder = _two_layers(config.hidden, _middle(self.width), self.width)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """Residual after attention and FFN output, both (B, T, hidden), to y (B, T, width)."""
        if self.form is BoundaryForm.NONE:
            return residual + branch
        if self.form is BoundaryForm.A:
            encoded: Tensor = self.encoder(F.silu(branch))
            return residual[..., : self.width] + encoded
        x = residual + branch
        encoded = self.encoder(x)
        return encoded + x[..., : self.width]


class Receiver(nn.Module):
    """The next stage's half of a boundary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.form = config.boundary.form
        self.padding = config.hidden - config.boundary_width
        if self.form is BoundaryForm.A:
            self.decoder: nn.Module = Linear(config.boundary_width, config.hidden)
        elif self.form is BoundaryForm.B:
            width = config.boundary_width
            self.decoder = _two_layers(width, _middle(width), config.hidden)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, T, width) to (branch input, carry), both (B, T, hidden)."""
        if self.form is BoundaryForm.NONE:
            return y, y
        padded = F.pad(y, (0, self.padding))
        decoded: Tensor = self.decoder(y)
        if self.form is BoundaryForm.A:
            return F.relu(decoded), padded
        x = decoded + padded
        return x, x


def sender_parameters(config: ModelConfig) -> int:
    """Parameters of one `Sender`."""
    return _end_parameters(config)


def receiver_parameters(config: ModelConfig) -> int:
    """Parameters of one `Receiver`; the two ends of a boundary mirror each other."""
    return _end_parameters(config)


def _end_parameters(config: ModelConfig) -> int:
    width = config.boundary.width
    if config.boundary.form is BoundaryForm.B:
        return _middle(width) * (config.hidden + width)
    return width * config.hidden


def _middle(width: int) -> int:
    return max(4 * width, 64)


def _two_layers(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Linear(inputs, middle), nn.SiLU(), Linear(middle, outputs))
