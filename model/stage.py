"""One pipeline stage as a plain module, and the helpers that turn its weights into numbers and back.

A stage holds a contiguous run of layers, the embedding if it is first, the final norm and the vocabulary
head if it is last, and its ends of the boundaries. Parameter names are those of the whole model
("layers.5.attention.q.weight"), so the union of the stages' state dicts is the model's state dict; a
boundary is named after the first layer behind it ("boundaries.2.sender.encoder.weight"). Initial weights
are drawn per name from the seed, so every split of a config starts from the same model and a joiner can
rebuild its stage without asking anyone.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from model.bottleneck import Receiver, Sender
from model.checkpoint import content_digest
from model.config import BoundaryForm, ModelConfig
from model.loss import cross_entropy
from model.recompute import Run, plain
from model.split import StagePlan
from model.subspace import ConfinedEmbedding, confine, confined
from model.transformer import Block, Embedding, Linear, RMSNorm, rotary_tables


class StageInputError(ValueError):
    """An input, target or vector whose shape or dtype does not fit the stage."""


class Stage(nn.Module):
    """The layers of `plan`; tokens in at the first stage, logits out at the last, boundary tensors in
    between."""

    rotary: Tensor

    def __init__(self, config: ModelConfig, plan: StagePlan) -> None:
        super().__init__()
        self.config = config
        self.plan = plan
        inside = confined(config, plan)
        if plan.is_first:
            self.embedding = ConfinedEmbedding(config) if inside else Embedding(config.vocab, config.hidden)
        layers = range(plan.first_layer, plan.last_layer)
        self.layers = nn.ModuleDict({str(index): Block(config) for index in layers})
        if inside:
            for block in self.layers.values():
                confine(cast("Block", block), config)
        self.boundaries = nn.ModuleDict()
        if not plan.is_first:
            self.boundaries[str(plan.first_layer)] = nn.ModuleDict({"receiver": Receiver(config)})
        if plan.is_last:
            self.norm = RMSNorm(config.hidden, config.norm_eps)
            self.head = Linear(config.hidden, config.vocab)
        else:
            self.boundaries[str(plan.last_layer)] = nn.ModuleDict({"sender": Sender(config)})
        self.register_buffer("rotary", rotary_tables(config), persistent=False)
        self.run_block: Run = plain

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Tokens int64 (B, T) or boundary (B, T, width) to boundary (B, T, width) or logits (B, T, vocab).

        `tokens`, int64 (B, T), are those that x came from: a stage behind a boundary that restores them needs them.
        Raises `StageInputError` for any other shape or dtype, or T above the model's context.
        """
        residual, branch = self._blocks(x, tokens)
        if self.plan.is_last:
            logits: Tensor = self.head(self.norm(residual + branch))
            return logits
        boundary: Tensor = self._sender(residual, branch, x if self.plan.is_first else tokens)
        return boundary

    def loss(self, x: Tensor, targets: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats per token, fp32 scalar; `targets` is int64 (B, T). Last stage only."""
        if not self.plan.is_last:
            raise StageInputError(f"stage {self.plan.index} of {self.plan.count} has no loss: ask the last stage")
        if targets.dtype != torch.int64 or targets.shape != x.shape[:2]:
            raise StageInputError(
                f"targets are {targets.dtype} {tuple(targets.shape)}; int64 {tuple(x.shape[:2])} is needed"
            )
        residual, branch = self._blocks(x, tokens)
        hidden: Tensor = self.norm(residual + branch)
        return cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten())

    def _blocks(self, x: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last block's residual and FFN branch, (B, T, hidden) each."""
        self.check_input(x, tokens)
        if self.plan.is_first:
            branch_input = carry = self.embedding(x)
        else:
            branch_input, carry = self._receiver(x, tokens)
        tables = self.rotary[:, : x.shape[1]]
        residual, branch = carry, None
        for block in self.layers.values():
            if branch is not None:
                branch_input = carry = residual + branch
            residual, branch = self.run_block(cast("Block", block), branch_input, carry, tables)
        return residual, cast("Tensor", branch)

    @property
    def restores(self) -> bool:
        """Whether this stage needs the tokens of what it receives."""
        return self.config.restores and not self.plan.is_first

    def check_input(self, x: Tensor, tokens: Tensor | None = None) -> None:
        """Raises `StageInputError` unless `x` is what this stage takes; the message names what it takes."""
        dtype, width = self.dtype, self.config.boundary_width
        shape = tuple(x.shape)
        if self.plan.is_first:
            fits, needed = x.dtype == torch.int64 and len(shape) == 2, "int64 (B, T)"
        else:
            fits, needed = (
                x.dtype == dtype and len(shape) == 3 and shape[2] == width,
                f"{dtype} (B, T, {width})",
            )
        if not fits:
            raise StageInputError(f"stage {self.plan.index} got {x.dtype} {shape}; it takes {needed}")
        if shape[0] < 1 or not 1 <= shape[1] <= self.config.context:
            raise StageInputError(
                f"stage {self.plan.index} got shape {shape}; B must be at least 1 and T from 1 to context "
                f"{self.config.context}: shorten the sequences or raise context"
            )
        if self.restores and (tokens is None or tokens.dtype != torch.int64 or tokens.shape != shape[:2]):
            given = "none" if tokens is None else f"{tokens.dtype} {tuple(tokens.shape)}"
            raise StageInputError(
                f"stage {self.plan.index} restores tokens and got {given}; it takes int64 {shape[:2]}: hand it those "
                "of its sample"
            )

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.rotary.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices and so of the boundary tensors; norm weights are fp32 in any case."""
        return cast("Block", next(iter(self.layers.values()))).attention.q.weight.dtype

    @property
    def _receiver(self) -> nn.Module:
        return cast("nn.ModuleDict", self.boundaries[str(self.plan.first_layer)])["receiver"]

    @property
    def _sender(self) -> nn.Module:
        return cast("nn.ModuleDict", self.boundaries[str(self.plan.last_layer)])["sender"]


def build_stage(
    config: ModelConfig,
    plan: StagePlan,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """A stage with its initial weights: the same bits for every split, machine and device.

    Norms are 1; `_deviation` says how large the others are. They are uniform, because uniform numbers come
    from random bits by exact arithmetic alone: normal ones pass through log and cos, whose last bit differs
    between processors, and these weights are hashed on chain. The global random state is not touched.
    """
    stage = Stage(config, plan)
    weights = {
        name: _initial(name, parameter.shape, config, seed).to(device, dtype if parameter.dim() > 1 else torch.float32)
        for name, parameter in stage.named_parameters()
    }
    stage.load_state_dict(weights, assign=True)
    return stage.to(device)


def weights_digest(stage: Stage) -> bytes:
    """32 bytes naming the stage's weights exactly (`checkpoint.content_digest` over its parameters)."""
    return content_digest(dict(stage.named_parameters()))


def flatten(stage: Stage) -> Tensor:
    """All parameters as one fp32 vector (n,), in order of name: a copy in host memory."""
    return on_host(p for _, p in sorted(stage.named_parameters()))


def on_host(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of these tensors as one fp32 vector (n,) in host memory; their device needs no room for it."""
    parts = [tensor.detach().reshape(-1) for tensor in tensors]
    flat = torch.empty(sum(map(len, parts)))
    for part, place in zip(parts, torch.split(flat, list(map(len, parts))), strict=True):
        place.copy_(part)
    return flat


def unflatten(stage: Stage, flat: Tensor) -> dict[str, Tensor]:
    """The tensors of `flat` by parameter name, as views: the inverse of `flatten`, without touching the stage."""
    named = sorted(stage.named_parameters())
    pieces = torch.split(flat, [parameter.numel() for _, parameter in named])
    return {name: piece.view(parameter.shape) for (name, parameter), piece in zip(named, pieces, strict=True)}


def assign_flat(stage: Stage, flat: Tensor) -> None:
    """Sets all parameters from a vector (n,) in the order of `flatten`, rounding to each parameter's
    dtype."""
    parameters = [p for _, p in sorted(stage.named_parameters())]
    needed = sum(p.numel() for p in parameters)
    if flat.shape != (needed,):
        raise StageInputError(
            f"flat weights have shape {tuple(flat.shape)}; stage {stage.plan.index} needs ({needed},)"
        )
    with torch.no_grad():
        parts = torch.split(flat, [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


def _initial(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"orion/init/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = math.sqrt(3) * _deviation(name, shape[1], config)
    return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(bound)


def _deviation(name: str, inputs: int, config: ModelConfig) -> float:
    """Standard deviation of a matrix' initial weights: 1/sqrt(inputs), so that no signal shrinks on its way.

    Exceptions: 1 for the embedding and a receiver's token tables, a quarter for the head (the first loss is then
    ln(vocab)), the residual's writers over sqrt(2·layers), 0.01 for boundaries of form B, which so start near the
    identity path, and 0.1 for tables of pairs, most of whose rows are met seldom.
    With 0.02 throughout, nano in four stages of form A learns little beyond token frequencies in 80 steps
    (validation loss 6.0, with this rule 4.9): what a boundary decodes is then below the next norm's eps.
    """
    fan_in = 1 / math.sqrt(inputs)
    if name.endswith(("embedding.weight", "restore.tokens.weight")):
        return 1.0
    if name.endswith("restore.token_pairs.weight"):
        return 0.1
    if name == "head.weight":
        return fan_in / 4
    if name.startswith("boundaries.") and config.boundary.form is BoundaryForm.B:
        return 0.01
    if name.endswith(("attention.o.weight", "ffn.down.weight")):
        return fan_in / math.sqrt(2 * config.layers)
    return fan_in
