"""One training run of the comparison: what it is called, and the model and optimizer that follow from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from model.accounting import total_parameters, training_flops_per_token
from model.config import BoundaryConfig, BoundaryForm, ConfigError, ModelConfig, preset
from model.optimizer import BETAS, NANO_RATES, Kind, OptimizerConfig
from scripts.bench.learning.wire import BITS, channels

Form = Literal["none", "none+", "wide", "cut", "truncation", "a", "b", "linear", "subspace", "t"]
"""As `model.bottleneck` has them; `linear` is `t` without tables. `none+` sends the whole residual and has the token
tables of `t`: the control whose parameters are those of `t` but for the projections. `wide` is `none` with as many
parameters in its FFNs instead. `cut` is `t` with nothing crossing, neither way: what its last stage learns alone. Where
that is no worse than the others, a run is too short to say anything of boundaries."""
WHOLE = ("none", "none+", "wide")
"""Forms that send the whole residual."""

BATCH = 8
"""Sequences in a microbatch."""
WARM_UP = 20
COOLDOWN = 0.25
"""Share of the steps in which the rate comes down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run. Two runs with equal rows have equal results."""

    form: Form
    ratio: int = 1
    """Bytes of a whole bf16 residual over bytes that cross; 1 for forms that send it."""
    optimizer: Kind = "muon"
    boundaries: int = 3
    hidden: int = 128
    """Of `model`, as it is or narrower or wider."""
    seed: int = 0
    steps: int = 400
    depth: int = 1
    """Microbatches in flight at the head: 1 is synchronous training, every step on the gradient of its own weights."""
    accumulation: int = 1
    """Microbatches in a step."""
    lr: float | None = None
    """Instead of the kind's best at a width of 128."""
    rank: int | None = None
    """Of token tables, instead of the share of the width that the model has."""
    pairs: int = 0
    """Rows of tables over pairs of tokens."""
    bits: int = 16
    """Of a value that crosses: 16 is bf16, 8 a code, of which a token's share a scale."""
    model: str = "nano"
    """The preset whose layers, context and vocabulary it has."""
    data: str | None = None
    """`fingerprint` of the prepared data that it learns from; the standard library without."""

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ConfigError(f"form is '{self.form}'; it must be one of {', '.join(get_args(Form))}: change it")
        alone = (*WHOLE, "cut")
        if (self.form in alone) != (self.ratio == 1):
            raise ConfigError(
                f"ratio is {self.ratio}, form is '{self.form}': forms {', '.join(alone)} have 1, all others more"
            )
        if self.form == "cut" and self.depth > 1:
            raise ConfigError(f"depth is {self.depth}, but form 'cut' sends nothing to wait for: set it to 1")
        if self.bits not in BITS:
            raise ConfigError(f"bits is {self.bits}; it must be one of {', '.join(map(str, BITS))}: change it")
        if self.hidden % self.ratio or channels(self.hidden, self.ratio, self.bits) < 1:
            raise ConfigError(
                f"ratio is {self.ratio}, hidden {self.hidden}: {2 * self.hidden / self.ratio:g} bytes a token are no "
                f"whole number of {self.bits}-bit channels, or none: lower ratio or change hidden"
            )
        group = preset(self.model).hidden // preset(self.model).kv_heads
        if self.hidden < 1 or self.hidden % group:
            raise ConfigError(
                f"hidden is {self.hidden}; query heads of {self.model} that share keys take {group} channels: make "
                "hidden a multiple of it"
            )
        if self.depth < 1 or self.steps < 1 or self.accumulation < 1:
            raise ConfigError(
                f"depth is {self.depth}, steps {self.steps} and accumulation {self.accumulation}; "
                "all must be at least 1: raise them"
            )

    @property
    def name(self) -> str:
        """All that tells this row from others, in one line."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None)

    @property
    def called(self) -> str:
        """Form and ratio."""
        return f"{self.form} {self.ratio}x" if self.ratio > 1 else self.form

    @property
    def plain(self) -> Row:
        """This row with its form as it is by default."""
        return replace(self, rank=None, pairs=0, bits=16)

    @property
    def usual(self) -> bool:
        """Whether it differs from others in form, ratio, optimizer, boundaries, width, length and seed alone."""
        return self == self.plain and (self.depth, self.accumulation, self.lr) == (1, 1, None)

    @property
    def stages(self) -> int:
        return self.boundaries + 1

    @property
    def flops(self) -> int:
        """Of its training, without the optimizer's."""
        config = self.config()
        tokens = self.steps * self.accumulation * BATCH * config.context
        return tokens * training_flops_per_token(config, stages=self.stages)

    def config(self) -> ModelConfig:
        """The model; of forms `subspace` and `wide` with FFNs that give it the parameters of `none` and `none+`."""
        shape = preset(self.model)
        ffn = shape.ffn * self.hidden // shape.hidden
        if self.form not in ("subspace", "wide"):
            return self._shaped(ffn)
        other = replace(self, form="none+" if self.form == "wide" else "none", ratio=1)
        goal = total_parameters(other.config(), self.stages)
        while total_parameters(self._shaped(ffn + 8), self.stages) <= goal:
            ffn += 8
        return self._shaped(ffn)

    @property
    def table_rank(self) -> int:
        """Of token tables."""
        shape = preset(self.model)
        return self.hidden * shape.boundary.rank // shape.hidden if self.rank is None else self.rank

    def inner(self) -> OptimizerConfig:
        """Rates fall with the width's square root for the adaptive kinds; Muon scales its step to the width itself."""
        scale = (128 / self.hidden) ** 0.5 if self.optimizer != "muon" else 1.0
        return OptimizerConfig(
            kind=self.optimizer,
            lr=NANO_RATES[self.optimizer] * scale if self.lr is None else self.lr,
            betas=BETAS[self.optimizer],
            warmup_steps=WARM_UP,
            schedule="wsd",
            steps=self.steps,
            cooldown=COOLDOWN,
        )

    def _shaped(self, ffn: int) -> ModelConfig:
        shape = preset(self.model)
        return replace(
            shape,
            hidden=self.hidden,
            heads=self.hidden // shape.head_dim,
            kv_heads=self.hidden * shape.kv_heads // shape.hidden,
            ffn=ffn,
            boundary=self._boundary(),
        )

    def _boundary(self) -> BoundaryConfig:
        width, rank = channels(self.hidden, self.ratio, self.bits), self.table_rank
        match self.form:
            case "none" | "wide":
                return BoundaryConfig()
            case "none+":
                return BoundaryConfig(rank=rank, pairs=self.pairs)
            case "cut":
                return BoundaryConfig(form=BoundaryForm.T, width=1, rank=rank, pairs=self.pairs)
            case "t":
                return BoundaryConfig(form=BoundaryForm.T, width=width, rank=rank, pairs=self.pairs)
            case "linear":
                return BoundaryConfig(form=BoundaryForm.T, width=width)
            case _:
                return BoundaryConfig(form=BoundaryForm(self.form), width=width)
