"""Shapes of the models Orion can train, and nothing else.

A `ModelConfig` is a Llama-3.2-shaped decoder plus the form of its stage boundaries. It is a value: every
other file of this floor (split, stage, accounting) is a function of it, so two nodes with the same config
agree on every parameter name, shape and byte. `PRESETS` holds the shapes a manifest may name. Their
boundaries are of form T, which lost least in docs/learning.md; presets from 1b up send a 64th of the residual
(hidden / width = 64, as in the ResBM runs, arXiv 2604.11947), the small ones a 16th.
"""

from dataclasses import dataclass
from enum import StrEnum

from model.nearest import nearest


class ConfigError(ValueError):
    """A configuration value that cannot work; the message names the value, the limit and the option to
    change."""


class BoundaryForm(StrEnum):
    """What crosses between two stages: the whole residual, or a narrow tensor, as `bottleneck.py` has it."""

    NONE = "none"
    TRUNCATION = "truncation"
    A = "a"
    B = "b"
    SUBSPACE = "subspace"
    T = "t"


RESTORING = frozenset({BoundaryForm.NONE, BoundaryForm.T})
"""Forms whose receivers may have token tables of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryConfig:
    """Form and width (channels per token) of the boundary; width is 0 exactly when the form is `none`.

    `rank` is that of the receivers' token tables, 0 without; `pairs` the rows of their tables over hashed pairs of
    neighbouring tokens, 0 without.
    """

    form: BoundaryForm = BoundaryForm.NONE
    width: int = 0
    rank: int = 0
    pairs: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0 or self.pairs < 0:
            raise ConfigError(
                f"boundary.rank is {self.rank} and boundary.pairs {self.pairs}; both must be at least 0: raise them"
            )
        if self.rank and self.form not in RESTORING:
            raise ConfigError(
                f"boundary.rank is {self.rank}, but form '{self.form}' has no token tables: set it to 0 or form to 't'"
            )
        if self.pairs and not self.rank:
            raise ConfigError(f"boundary.pairs is {self.pairs} and boundary.rank 0: raise boundary.rank")
        if self.form is BoundaryForm.NONE and self.width != 0:
            raise ConfigError(
                f"boundary.width is {self.width} but boundary.form 'none' sends the whole residual: set width to 0"
            )
        if self.form is not BoundaryForm.NONE and self.width < 1:
            raise ConfigError(
                f"boundary.width is {self.width}; form '{self.form}' needs at least 1: raise boundary.width"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama-3.2-shaped decoder: RMSNorm, grouped-query attention, RoPE, SwiGLU, untied embedding and head.

    `context` is the longest sequence in tokens, `ffn` the inner width of SwiGLU. Raises `ConfigError`.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    rope_base: float = 500_000.0
    norm_eps: float = 1e-5
    boundary: BoundaryConfig = BoundaryConfig()

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "ffn", "context"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1: raise {name}")
        if self.hidden % self.heads:
            raise ConfigError(f"hidden {self.hidden} is not a multiple of heads {self.heads}: change hidden or heads")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: change heads or kv_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden / heads is {self.head_dim}; rotary embedding needs an even number: change hidden or heads"
            )
        if self.boundary.rank > self.hidden:
            raise ConfigError(f"boundary.rank {self.boundary.rank} is above hidden {self.hidden}: lower boundary.rank")
        if self.boundary.width > self.hidden:
            raise ConfigError(
                f"boundary.width {self.boundary.width} is above hidden {self.hidden}: lower boundary.width"
            )
        if not self.rope_base > 1 or not self.norm_eps > 0:
            raise ConfigError(
                f"rope_base is {self.rope_base} and norm_eps {self.norm_eps}; they must be above 1 "
                "and above 0: change them"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden // self.heads

    @property
    def restores(self) -> bool:
        """Whether receivers need the tokens of what they receive."""
        return self.boundary.rank > 0 or self.boundary.form is BoundaryForm.SUBSPACE

    @property
    def carries(self) -> bool:
        """Whether a middle stage's output is its input and an increment: form T has no straight path."""
        return self.boundary.form is not BoundaryForm.T

    @property
    def boundary_width(self) -> int:
        """Channels per token that cross a boundary: `hidden` for form `none`."""
        return self.hidden if self.boundary.form is BoundaryForm.NONE else self.boundary.width


def _shape(
    vocab: int, hidden: int, layers: int, heads: tuple[int, int], *, ffn: int, context: int, width: int, rank: int
) -> ModelConfig:
    """A preset with `heads` as (query heads, key and value heads) and a boundary of form T."""
    boundary = BoundaryConfig(form=BoundaryForm.T, width=width, rank=rank)
    return ModelConfig(
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        ffn=ffn,
        context=context,
        boundary=boundary,
    )


PRESETS: dict[str, ModelConfig] = {
    "pico": _shape(1_024, 64, 4, (2, 1), ffn=192, context=64, width=4, rank=64),
    "nano": _shape(1_024, 128, 8, (4, 2), ffn=384, context=128, width=8, rank=128),
    "100m": _shape(32_768, 640, 12, (10, 5), ffn=1_792, context=1_024, width=40, rank=80),
    "1b": _shape(128_256, 2_048, 16, (32, 8), ffn=8_192, context=4_096, width=32, rank=256),
    "8b": _shape(128_256, 4_096, 32, (32, 8), ffn=14_336, context=8_192, width=64, rank=512),
    "16b": _shape(128_256, 5_120, 52, (40, 8), ffn=14_336, context=8_192, width=80, rank=640),
    "100b": _shape(128_256, 9_216, 90, (72, 8), ffn=32_256, context=8_192, width=144, rank=1_152),
    "500b": _shape(128_256, 16_384, 147, (128, 8), ffn=57_344, context=8_192, width=256, rank=2_048),
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`; raises `ConfigError` naming the nearest preset and all of them."""
    if name in PRESETS:
        return PRESETS[name]
    near = nearest(name, PRESETS)
    raise ConfigError(f"model preset '{name}' is unknown: did you mean '{near}'? Presets: {', '.join(PRESETS)}")
