"""What `orion plan` is asked, and the two ways of running that it knows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from model.config import BoundaryConfig, BoundaryForm, ModelConfig, preset
from model.devices import Device, device
from model.memory import Units
from model.optimizer import Kind
from model.recompute import Recompute
from neurons.drive import DEPTH_LIMIT_PER_STAGE
from neurons.flights import DRAIN_MARGIN, DRAIN_SLACK
from scripts.manifests import LAST_STEP_BLOCKS
from subnet.metagraph import BLOCK_SECONDS
from subnet.quantities import parse, parse_bandwidth, parse_count
from subnet.swarm.codec import CodecName
from subnet.swarm.pace import Routing

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
VALUE_BYTES = {"bf16": 2, "fp32": 4}
KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
STAY_HOURS = 522.0
"""Agora's 330 nodes saw 607 departures in 40 days (facts: sota §0, §4)."""
EVICTION_SECONDS = 300.0
"""After which the published run's registry forgets a silent miner (facts: orion §3.8)."""


class PlanError(ValueError):
    """A plan that cannot be made: one line with the value, the limit and the option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Flags of `orion plan`, as given; None where the way of running decides."""

    model: str
    stages: int
    replicas: int
    gpu: str
    up: str
    down: str
    rtt: str
    price: float
    tokens: str
    style: str
    depth: int | None
    routing: str | None
    recompute: str | None
    efficiency: float | None
    stay_hours: float
    host_gb: float | None
    disk_gb: float
    sequence: int | None
    batch: int | None
    accumulation: int | None
    moments: str
    optimizer: str
    codec: CodecName
    round_minutes: float | None
    validators: int
    slot_blocks: int
    windows: float
    share: float
    steps: float
    readers: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """A way of running: everything that is not the model, the machines or the links."""

    name: str
    recompute: Recompute | None
    """None: as little as fits."""
    depth: int | None
    """W; None: what nodes keep."""
    routing: Routing
    merge: Literal["overlapped", "store"]
    """Overlapped with training, by the run's codec; or through an object store while nobody trains."""
    held_back: float
    """Full flights before a round's close whose time brings nothing back."""
    last_step: float
    """Seconds from the close of training to the end of the round."""
    evidence: bool
    """Whether each local step copies its state to the host for audits."""
    sequence: int
    batch: int
    accumulation: int
    round_minutes: float
    """Of training between two merges."""
    tables: bool = True
    """Whether stages restore tokens, where the preset's do."""


STYLES = {
    style.name: style
    for style in (
        Style(
            name="orion",
            recompute=None,
            depth=None,
            routing=Routing.LANES,
            merge="overlapped",
            held_back=DRAIN_MARGIN + DRAIN_SLACK - 1,
            last_step=LAST_STEP_BLOCKS * BLOCK_SECONDS,
            evidence=True,
            sequence=8_192,
            batch=1,
            accumulation=64,
            round_minutes=24.0,
        ),
        # Facts: orion §1.3 (8,192 tokens), §1.4 (recompute but at the tail, 16 in flight, a merge stops all), §1.5
        # (through a store), sota §2.3 (next hop drawn, a step after four backwards). Not in any source, so assumed:
        # sequences of 1,024 tokens, a merge an hour.
        Style(
            name="published",
            recompute=Recompute.FULL,
            depth=16,
            routing=Routing.LOTTERY,
            merge="store",
            held_back=0.0,
            last_step=0.0,
            evidence=False,
            sequence=1_024,
            batch=8,
            accumulation=4,
            round_minutes=60.0,
            tables=False,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The options read: numbers, cards by stage, and nothing left open."""

    model: ModelConfig
    cards: tuple[tuple[Device, ...], ...]
    """Of each stage's replicas."""
    efficiency: float | None
    """In place of each card's own."""
    units: Units
    style: Style
    accumulation: int
    up: float
    down: float
    latency: float
    """Seconds one way."""
    round_seconds: float
    stay_hours: float
    codec: CodecName
    price: float
    """Dollars per card and hour."""
    tokens: float
    """To train on."""
    host: float
    """Bytes of host memory, of the poorest card."""

    @property
    def stages(self) -> int:
        return len(self.cards)

    @property
    def replicas(self) -> int:
        return len(self.cards[0])

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(card for stage in self.cards for card in stage)

    @property
    def peak(self) -> float:
        """FLOP/s of all."""
        return sum(card.peak for card in self.devices)

    @property
    def depth_limit(self) -> int:
        return DEPTH_LIMIT_PER_STAGE * self.stages

    def flops(self, card: Device) -> float:
        """FLOP/s that a card is planned to reach."""
        return card.flops if self.efficiency is None else card.peak * self.efficiency


def read(options: PlanOptions) -> Run:
    """Raises `PlanError`, `ConfigError`, `QuantityError`."""
    _check_numbers(options)
    style = STYLES.get(options.style)
    if style is None:
        raise PlanError(f"--as {options.style!r} is no way of running: choose from {', '.join(STYLES)}")
    model = preset(options.model)
    if not style.tables:
        model = replace(model, boundary=BoundaryConfig(form=BoundaryForm.A, width=model.boundary_width))
    if options.stages > model.layers:
        raise PlanError(
            f"--stages {options.stages} is {options.stages - model.layers} more than the {model.layers} layers of "
            f"{options.model}: at most --stages {model.layers}, or a model with more layers"
        )
    sequence = min(style.sequence, model.context) if options.sequence is None else options.sequence
    if sequence > model.context:
        raise PlanError(f"--sequence {sequence} is above the context of {options.model}: at most {model.context}")
    tokens = parse_count("tokens", options.tokens)
    cards = deal(fleet(options.gpu, options.stages * options.replicas), options.stages, options.replicas)
    return Run(
        model=model,
        cards=cards,
        efficiency=options.efficiency,
        units=Units(
            batch=style.batch if options.batch is None else options.batch,
            sequence=sequence,
            moment_bytes=VALUE_BYTES[options.moments],
            optimizer=KINDS[options.optimizer],
        ),
        style=replace(
            style,
            recompute=style.recompute if options.recompute is None else Recompute(options.recompute),
            depth=style.depth if options.depth is None else options.depth,
            routing=style.routing if options.routing is None else Routing(options.routing),
        ),
        accumulation=style.accumulation if options.accumulation is None else options.accumulation,
        up=parse_bandwidth("up", options.up),
        down=parse_bandwidth("down", options.down),
        latency=parse("rtt", options.rtt, SECONDS, example="60ms") / 2,
        round_seconds=60 * (style.round_minutes if options.round_minutes is None else options.round_minutes),
        stay_hours=options.stay_hours,
        codec=options.codec,
        price=options.price,
        tokens=tokens,
        host=min(card.host for stage in cards for card in stage) if options.host_gb is None else options.host_gb * 1e9,
    )


def fleet(text: str, places: int) -> list[Device]:
    """The cards that `--gpu` names: one kind for all places, or `a100-80gb:40,h100:8`. Raises `PlanError`,
    `ConfigError`."""
    if ":" not in text:
        return [device(text)] * places
    cards: list[Device] = []
    for part in text.split(","):
        name, _, count = part.partition(":")
        if not count.isascii() or not count.isdigit() or not 0 < int(count) <= places:
            raise PlanError(
                f"--gpu {text!r}: {part!r} is not of the form a100-80gb:40 with 1 to {places} cards: change it"
            )
        cards += [device(name)] * int(count)
    if len(cards) != places:
        raise PlanError(
            f"--gpu {text!r} names {len(cards)} cards for {places} places (stages times replicas): change its numbers, "
            "--stages or --replicas"
        )
    return cards


def deal(cards: Sequence[Device], stages: int, replicas: int) -> tuple[tuple[Device, ...], ...]:
    """Strongest first, each to the stage that has least so far: rates of a stage's replicas add up, so stages come out
    as equal as whole cards allow. All stages count alike, though they are not quite equally large."""
    hands: list[list[Device]] = [[] for _ in range(stages)]
    for card in sorted(cards, key=lambda card: -card.flops):
        open_hands = [hand for hand in hands if len(hand) < replicas]
        min(open_hands, key=lambda hand: sum(held.flops for held in hand)).append(card)
    return tuple(tuple(hand) for hand in hands)


def _check_numbers(options: PlanOptions) -> None:
    for name in ("stages", "replicas", "validators", "depth", "batch", "sequence", "accumulation", "slot_blocks"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise PlanError(f"--{name.replace('_', '-')} is {value}; it must be at least 1: raise it")
    for name in ("price", "stay_hours", "disk_gb", "host_gb", "round_minutes"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"--{name.replace('_', '-')} is {value:g}; it must be a finite number above 0: change it")
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        raise PlanError(f"--efficiency is {options.efficiency:g}; it must be above 0 and at most 1: change it")
    known: dict[str, Collection[str]] = {
        "moments": VALUE_BYTES,
        "optimizer": KINDS,
        "recompute": [*Recompute],
        "routing": [*Routing],
    }
    for name, values in known.items():
        value = getattr(options, name)
        if value is not None and value not in values:
            raise PlanError(f"--{name} {value!r} is unknown: choose from {', '.join(values)}")
