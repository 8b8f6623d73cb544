"""Parameters, FLOPs, MFU and boundary bytes, as arithmetic on the config: nothing is allocated.

One formula serves every report, `FORMULA`: training FLOPs per token = 6·N + 6·L·T·d, with N the parameters
without the input embedding and receivers' token tables (a look-up does no arithmetic), L layers, T tokens
of context and d = heads · head_dim. The second term is attention's scores and mixing with the causal half
counted once: forward 2·T·d per layer, backward twice that. Recomputed forwards are not counted, so
recomputing lowers MFU, as it should.
"""

from model.bottleneck import receiver_parameters, sender_parameters
from model.config import BoundaryForm, ConfigError, ModelConfig
from model.optimizer import Kind
from model.split import StagePlan, block_matrix_parameters, split
from model.subspace import confined

FORMULA = "6N + 6LTd, N without the input embedding, causal attention once, recompute not counted"


def stage_parameters(config: ModelConfig, plan: StagePlan, *, boundaries: bool = True) -> int:
    """Parameters of one stage; with `boundaries=False` the boundary matrices are left out."""
    vocabulary = config.vocab * config.hidden
    count = plan.layers * (block_matrix_parameters(config) + 2 * config.hidden)
    count += vocabulary if plan.is_first else 0
    count += vocabulary + config.hidden if plan.is_last else 0
    if confined(config, plan):
        # What writes to the residual has b rows instead of d, and a head's embedding b columns.
        written = plan.layers * (config.hidden + config.ffn) + (config.vocab if plan.is_first else 0)
        count -= written * (config.hidden - config.boundary_width)
    return count + (_boundary_parameters(config, plan) if boundaries else 0)


def stage_moments(config: ModelConfig, plan: StagePlan, kind: Kind) -> int:
    """Values of the optimizer's moments of one stage: two for each parameter, one for those that Muon moves."""
    parameters = stage_parameters(config, plan)
    norms = (2 * plan.layers + plan.is_last) * config.hidden
    head = config.vocab * config.hidden if plan.is_last else 0
    moved = parameters - norms - head - _looked_up(config, plan)
    return 2 * parameters - (moved if kind == "muon" else 0)


def total_parameters(config: ModelConfig, stages: int = 1, *, boundaries: bool = True) -> int:
    """Parameters of the whole model cut into `stages`; one stage has no boundaries."""
    return sum(stage_parameters(config, plan, boundaries=boundaries) for plan in split(config, stages))


def stage_flops(config: ModelConfig, plan: StagePlan, *, tokens: int | None = None) -> tuple[int, int]:
    """Forward and backward FLOPs per token of one stage, boundary matrices included.

    `tokens` is the sequence length T, by default the config's context. What is looked up, the head's embedding and
    receivers' token tables, counts nothing.
    """
    length = config.context if tokens is None else tokens
    basis = _by_basis(config, plan) * config.boundary_width * config.hidden
    matrices = 2 * (stage_parameters(config, plan) - _looked_up(config, plan) + basis)
    attention = plan.layers * 2 * length * config.heads * config.head_dim
    forward = matrices + attention
    return forward, 2 * forward


def training_flops_per_token(config: ModelConfig, *, stages: int = 1, tokens: int | None = None) -> int:
    """Forward plus backward FLOPs per token of the whole model, by `FORMULA`."""
    return sum(sum(stage_flops(config, plan, tokens=tokens)) for plan in split(config, stages))


def mfu(tokens_per_second: float, flops_per_token: float, *, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0 to 1: useful FLOPs per second of wall-clock time over the peak of all devices."""
    if not peak_flops > 0:
        raise ConfigError(f"peak_flops of all devices is {peak_flops}; it must be above 0: name the devices")
    return tokens_per_second * flops_per_token / peak_flops


def boundary_bytes(config: ModelConfig, *, tokens: int, itemsize: int) -> int:
    """Bytes of one boundary tensor: `tokens` of a microbatch (B·T) times width times bytes per element."""
    return tokens * config.boundary_width * itemsize


def _by_basis(config: ModelConfig, plan: StagePlan) -> int:
    """How often form `subspace` multiplies a token by its basis."""
    if config.boundary.form is not BoundaryForm.SUBSPACE:
        return 0
    written = 2 * plan.layers + plan.is_first if confined(config, plan) else 0
    return written + (not plan.is_first) + (not plan.is_last)


def _looked_up(config: ModelConfig, plan: StagePlan) -> int:
    """Parameters of a stage of which a token takes rows: they take part in no product."""
    if plan.is_first:
        return config.vocab * (config.boundary_width if confined(config, plan) else config.hidden)
    return config.boundary.rank * (config.vocab + config.boundary.pairs)


def _boundary_parameters(config: ModelConfig, plan: StagePlan) -> int:
    receiver = 0 if plan.is_first else receiver_parameters(config)
    sender = 0 if plan.is_last else sender_parameters(config)
    return receiver + sender
