"""Which layers each pipeline stage holds: a pure function of the config and the number of stages.

A pipeline runs at the pace of its slowest stage, so `split` first minimises the largest stage cost and
then, among those, the variance. Cost is FLOPs: a block costs its matrices, the vocabulary head costs its
own (1.09 blocks at 100b), the embedding look-up nothing. Costs are integers, so the answer is exact and the
same on every machine. Among equally good splits earlier stages are the lighter ones, because they hold more
microbatches in flight.
"""

from dataclasses import dataclass
from enum import StrEnum

from model.config import ConfigError, ModelConfig


class Role(StrEnum):
    """Where a stage stands: head embeds tokens, tail computes the loss, solo does both."""

    HEAD = "head"
    BODY = "body"
    TAIL = "tail"
    SOLO = "solo"


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Stage `index` of `count` holds the layers `first_layer` (inclusive) to `last_layer` (exclusive)."""

    index: int
    count: int
    first_layer: int
    last_layer: int
    role: Role

    @property
    def is_first(self) -> bool:
        """True where tokens come in."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """True where logits come out."""
        return self.index == self.count - 1

    @property
    def layers(self) -> int:
        """Number of layers held."""
        return self.last_layer - self.first_layer


def block_matrix_parameters(config: ModelConfig) -> int:
    """Parameters of one block's matrices (norms left out): two FLOPs each per token and forward pass."""
    attention = 2 * config.hidden * config.hidden + 2 * config.hidden * config.kv_heads * config.head_dim
    return attention + 3 * config.hidden * config.ffn


def stage_cost(config: ModelConfig, plan: StagePlan) -> int:
    """Relative cost of a stage: its matrices' parameters, the vocabulary head included and the embedding
    not."""
    head = config.vocab * config.hidden if plan.is_last else 0
    return plan.layers * block_matrix_parameters(config) + head


def split(config: ModelConfig, stages: int) -> tuple[StagePlan, ...]:
    """Cuts `config.layers` into `stages` contiguous runs, least maximum cost first, then least variance.

    Raises `ConfigError` when `stages` is below 1 or above the number of layers.
    """
    if not 1 <= stages <= config.layers:
        raise ConfigError(
            f"stages is {stages}; it must be from 1 to the model's {config.layers} layers: change stages or the model"
        )
    sizes = _balance(config.layers, stages, block_matrix_parameters(config), config.vocab * config.hidden)
    plans: list[StagePlan] = []
    first = 0
    for index, size in enumerate(sizes):
        plans.append(StagePlan(index, stages, first, first + size, _role(index, stages)))
        first += size
    return tuple(plans)


def _role(index: int, count: int) -> Role:
    if count == 1:
        return Role.SOLO
    if index == 0:
        return Role.HEAD
    return Role.TAIL if index == count - 1 else Role.BODY


def _balance(layers: int, stages: int, block: int, head: int) -> tuple[int, ...]:
    """Layers per stage. All blocks cost the same, so the largest body stage and the tail's size decide
    everything."""
    if stages == 1:
        return (layers,)

    def worst(tail: int) -> int:
        return max(-(-(layers - tail) // (stages - 1)) * block, tail * block + head)

    tails = range(1, layers - stages + 2)
    limit = min(worst(tail) for tail in tails)

    def spread(tail: int) -> int:
        small, more = divmod(layers - tail, stages - 1)
        even = (stages - 1 - more) * (small * block) ** 2 + more * ((small + 1) * block) ** 2
        return even + (tail * block + head) ** 2

    tail = min((tail for tail in tails if worst(tail) <= limit), key=spread)
    small, more = divmod(layers - tail, stages - 1)
    return (small,) * (stages - 1 - more) + (small + 1,) * more + (tail,)
