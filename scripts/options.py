"""The options of `orion localnet`, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from neurons.config import parse_device
from scripts.adversaries import Adversary, Casting
from scripts.faults import Fault, check_faults, joiners
from subnet.commandline import UsageError
from subnet.quantities import QuantityError
from subnet.transport.shaping import Link

Codec = Literal["topk2bit", "int8", "bf16"]
Optimizer = Literal["adamw", "nadam", "muon"]
DEFAULT_CODEC: Codec = "topk2bit"
CODECS: dict[str, Codec] = {"pico": "int8", "nano": "int8"}
"""Where another codec than the default does better: a small run has a few rounds, and `topk2bit` owes most of what it
learns for some twenty (docs/decisions.md §10)."""
MOST_NODES = 200
TEMPO = 20
"""Blocks between two epochs of a local chain."""
PHASE_SECONDS = 3.0
"""What a record of each of a dozen nodes on two slow cores takes, and again as much."""
PHASES = 6
"""In a round, at least: a short one has short phases."""
SHORTEST_PHASE = 6
"""Blocks: a record takes two or three to be final, and the shortest mortal era has four."""
LIMITS: dict[str, tuple[float, float]] = {
    "stages": (1, 64),
    "replicas": (1, 64),
    "validators": (1, 64),
    "rounds": (1, 1_000_000),
    "round_seconds": (10, 86_400),
    "block_time": (0.05, 12),
    "accumulation": (1, 64),
}
NETWORK = ("latency", "bandwidth", "loss")


class LocalnetError(Exception):
    """The swarm could not be started: one line with the value and the remedy."""


class OptionError(LocalnetError, UsageError):
    """An option's value that no swarm can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalnetOptions:
    """What makes a run that run; all of it goes into its `localnet.json`."""

    stages: int
    replicas: int
    validators: int
    rounds: int
    model: str
    seed: int
    block_time: float
    round_seconds: float
    overlap: bool = True
    """Whether a round's merge goes on while the next round trains."""
    codec: Codec = "topk2bit"
    optimizer: Optimizer | None = None
    """None: the preset's."""
    accumulation: int = 2
    """Microbatches in a local step."""
    device: str = "cpu"
    """Where miners compute."""
    latency: str | None = None
    bandwidth: str | None = None
    loss: str | None = None
    faults: tuple[Fault, ...] = field(default=())
    chaos: int | None = None
    """The seed that drew them, if one did; then all promises are checked at the end."""
    adversaries: tuple[Adversary, ...] = field(default=())

    @property
    def joiners(self) -> int:
        """Miners that come later."""
        return joiners(self.faults)

    @property
    def first_miners(self) -> int:
        return self.stages * self.replicas

    @property
    def round_blocks(self) -> int:
        return round(self.round_seconds / self.block_time)

    @property
    def phase_blocks(self) -> int:
        """Length of each of the three phases of a merge, in blocks."""
        return max(SHORTEST_PHASE, round(min(PHASE_SECONDS, self.round_seconds / PHASES) / self.block_time))

    @property
    def casting(self) -> Casting:
        """Who cheats. Raises `AdversaryOptionError`."""
        return Casting.of(
            self.adversaries,
            stages=self.stages,
            replicas=self.replicas,
            validators=self.validators,
            gathers=self.codec == "topk2bit",
        )

    @property
    def network_flags(self) -> list[str]:
        """What a node is told of the network it is to imitate."""
        given = {name: getattr(self, name) for name in NETWORK}
        return [text for name, value in given.items() if value is not None for text in (f"--{name}", value)]


def check_options(options: LocalnetOptions) -> None:
    """Raises `OptionError`, `FaultError` for a fault that can never come, or `AdversaryOptionError`."""
    for name, (least, most) in LIMITS.items():
        value = getattr(options, name)
        if not least <= value <= most or math.isnan(value):
            raise OptionError(f"--{name.replace('_', '-')} {value} is outside {least} to {most}: choose one inside")
    try:
        parse_device(options.device)
    except ValueError as error:
        raise OptionError(f"--device '{options.device}' will not do: {error}") from None
    miners = options.first_miners + options.joiners
    if miners + options.validators > MOST_NODES:
        raise OptionError(
            f"{miners + options.validators} nodes are more than the {MOST_NODES} a machine should run: lower --replicas"
        )
    if options.phase_blocks * 4 > options.round_blocks:
        raise OptionError(
            f"--round-seconds {options.round_seconds:g} has no room for its deadlines in blocks of "
            f"{options.block_time:g} s: raise it or lower --block-time"
        )
    try:
        Link.parse(latency=options.latency, bandwidth=options.bandwidth, loss=options.loss)
    except QuantityError as error:
        raise OptionError(str(error)) from None
    check_faults(options.faults, stages=options.stages, miners=miners, rounds=options.rounds)
    _ = options.casting


def claim_folder(out: Path) -> None:
    """Make the folder of a new run. Raises `LocalnetError` for one that holds anything."""
    try:
        if out.exists() and any(out.iterdir()):
            raise LocalnetError(f"--out {out} is not empty: give a new folder, nothing in it was touched")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalnetError(f"--out {out} cannot be used ({error.strerror}): give another folder") from error
