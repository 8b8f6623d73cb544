"""The kinds of adversary: who can be one, what it gains, what stops it, and with which of its units it cheats."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from subnet.trust.finding import Check
from subnet.trust.ledger import Direction


class AdversaryError(ValueError):
    """An adversary that does not exist or cannot play here: one line with the value and what fits."""


class Kind(StrEnum):
    """By the name that commands take."""

    NOISE = "noise"
    SIGN_FLIP = "sign-flip"
    SCALED_GRADIENT = "scaled-gradient"
    ZERO_GRADIENT = "zero-gradient"
    SKIPPED_LAYER = "skipped-layer"
    LOW_PRECISION = "low-precision"
    STALE_WEIGHTS = "stale-weights"
    WRONG_DATA = "wrong-data"
    REPLAY = "replay"
    COPYCAT = "copycat"
    NO_BACKWARD = "no-backward"
    FORGED_RECEIPTS = "forged-receipts"
    WITHHELD_EVIDENCE = "withheld-evidence"
    LYING_HOLDER = "lying-holder"
    COLLUDING_HOLDERS = "colluding-holders"
    POISONED_LOSS = "poisoned-loss"
    SYBIL = "sybil"
    WEIGHT_COPIER = "weight-copier"

    @classmethod
    def parse(cls, text: str) -> Kind:
        """Raises `AdversaryError`, which names the nearest kind."""
        try:
            return cls(text)
        except ValueError:
            near = difflib.get_close_matches(text, list(cls), n=1)
            hint = f"did you mean '{near[0]}'" if near else f"known are {', '.join(cls)}"
            raise AdversaryError(f"'{text}' does not exist: {hint}") from None


class Role(StrEnum):
    """Who can be an adversary of a kind."""

    ANY = "miner"
    HEAD = "head"
    TAIL = "tail"
    NOT_HEAD = "body or tail"
    NEIGHBOURS = "miner with a neighbour behind it"
    SIBLINGS = "pair of siblings"
    VALIDATOR = "validator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kind. The text has no names of files: it is printed."""

    role: Role
    gains: str
    stopped_by: str
    falsifies: frozenset[Direction] = frozenset()
    """Units whose numbers it changes, see `tests.adversaries.units`; none where it cheats otherwise."""
    strength: float = 0.0
    """By default."""
    unit: str = ""
    """What `strength` is, "" where there is none."""
    convicts: frozenset[Check] = frozenset()
    """Checks that may convict it; none where no single check can."""


_BOTH = frozenset(Direction)
_FORWARD = frozenset({Direction.FORWARD})
_BACKWARD = frozenset({Direction.BACKWARD})
_OUTPUTS = frozenset({Check.FORWARD, Check.BACKWARD})
_COMPUTED = _OUTPUTS | {Check.LOSS, Check.GRADIENT}
"""Of who computes something else: what it sends and what it adds to its step are both wrong."""

PROFILES: Mapping[Kind, Profile] = MappingProxyType(
    {
        Kind.NOISE: Profile(
            role=Role.ANY,
            gains="Nothing but harm: what it sends on is its result plus noise whose norm is a share of the result's, "
            "token by token. Small noise stands for any sloppy arithmetic.",
            stopped_by="Replays: the error of an increment is the noise times the result's size over the increment's. "
            "Below the tolerance of its pair of devices nothing stops it, and it does no more harm than honest noise.",
            falsifies=_BOTH,
            strength=0.1,
            unit="norm of the noise / norm of the result",
            convicts=_OUTPUTS,
        ),
        Kind.SIGN_FLIP: Profile(
            role=Role.ANY,
            gains="Nothing but harm: neighbours train on the opposite of its result, whose size looks right to them.",
            stopped_by="One replay. Receivers' bounds on size do not see it.",
            falsifies=_BOTH,
            convicts=_OUTPUTS,
        ),
        Kind.SCALED_GRADIENT: Profile(
            role=Role.NOT_HEAD,
            gains="Weight in what the stages before it learn: its gradients count several times a sibling's.",
            stopped_by="One replay; above the receivers' bounds they refuse it before it reaches a step.",
            falsifies=_BACKWARD,
            strength=4.0,
            unit="factor",
            convicts=frozenset({Check.BACKWARD}),
        ),
        Kind.ZERO_GRADIENT: Profile(
            role=Role.ANY,
            gains="Two thirds of its compute: forwards are honest, backwards are answered with zeros and add nothing "
            "to its step.",
            stopped_by="A replay of a backward. The head's backward sends nothing on: only a replay of its whole step "
            "shows it.",
            falsifies=_BACKWARD,
            convicts=frozenset({Check.BACKWARD, Check.GRADIENT}),
        ),
        Kind.SKIPPED_LAYER: Profile(
            role=Role.ANY,
            gains="A layer's share of its compute, in both directions: its last layer is left out.",
            stopped_by="Replays compare increments: in a residual stream the output alone hardly changes.",
            falsifies=_BOTH,
            convicts=_COMPUTED,
        ),
        Kind.LOW_PRECISION: Profile(
            role=Role.ANY,
            gains="The speed and memory of a smaller or older card: it computes with weights of few bits.",
            stopped_by="Replays, while the rounding is larger than the tolerance of its pair of devices; below that it "
            "is honest noise.",
            falsifies=_BOTH,
            strength=4.0,
            unit="bits of a weight, one scale per row",
            convicts=_COMPUTED,
        ),
        Kind.STALE_WEIGHTS: Profile(
            role=Role.ANY,
            gains="Steps: it computes with weights of some steps ago, as a card does that is too slow to keep up.",
            stopped_by="Replays with the weights that its window names, once those have moved beyond the tolerance.",
            falsifies=_BOTH,
            strength=16.0,
            unit="steps",
            convicts=_COMPUTED,
        ),
        Kind.WRONG_DATA: Profile(
            role=Role.HEAD,
            gains="The choice of what the swarm learns: it trains on other tokens than those of the sample it was "
            "given, and says that it trained on these.",
            stopped_by="The data audit proves it where the leaf names the other tokens; where the leaf names the right "
            "ones a replay finds another output.",
            falsifies=_BOTH,
            convicts=frozenset({Check.FORWARD, Check.GRADIENT, Check.DATA}),
        ),
        Kind.REPLAY: Profile(
            role=Role.ANY,
            gains="All of its compute: each unit is answered with what an earlier one of the same direction gave.",
            stopped_by="One replay. Receivers refuse a tensor that a replica sent for another sample of the round.",
            falsifies=_BOTH,
            convicts=_COMPUTED,
        ),
        Kind.COPYCAT: Profile(
            role=Role.ANY,
            gains="All of its compute: each unit is answered with what a sibling sent for one of its own, fetched from "
            "its evidence.",
            stopped_by="One replay: a sibling has other samples, and they are a round old.",
            falsifies=_BOTH,
            convicts=_COMPUTED,
        ),
        Kind.NO_BACKWARD: Profile(
            role=Role.ANY,
            gains="Two thirds of its compute: the gradient that comes in is passed on as it is, as if its layers "
            "were not there, and nothing is added to its step.",
            stopped_by="A replay of a backward, because increments are compared: a residual stream's gradient is "
            "nearly that. The head's backward sends nothing on: only a replay of its whole step shows it.",
            falsifies=_BACKWARD,
            convicts=frozenset({Check.BACKWARD, Check.GRADIENT}),
        ),
        Kind.FORGED_RECEIPTS: Profile(
            role=Role.NEIGHBOURS,
            gains="Pay for units that nobody computed: a neighbour with whom it shares keys signs for them.",
            stopped_by="Settlement: a unit pays on a pathway that came back to its head, and an honest stage between "
            "them, or the head, knows nothing of it. The data audit convicts a head that invents samples.",
        ),
        Kind.WITHHELD_EVIDENCE: Profile(
            role=Role.ANY,
            gains="Freedom from replays: it shows its tables and no unit.",
            stopped_by="Silence pays as little as failure: its round scores 0 with every validator that asked in vain.",
            convicts=frozenset({Check.WITHHELD}),
        ),
        Kind.LYING_HOLDER: Profile(
            role=Role.ANY,
            gains="Hold over a stage: as holder of a shard it publishes another mean than that of the pieces.",
            stopped_by="Its co-holder's digest differs, so the shard does not move; who rechecks the shard proves it.",
            convicts=frozenset({Check.SHARD}),
        ),
        Kind.COLLUDING_HOLDERS: Profile(
            role=Role.SIBLINGS,
            gains="Hold over a stage: both holders of a shard publish the same wrong mean, and it stands.",
            stopped_by="Pairs are drawn when payloads are fixed; every replica and validator rechecks one shard of its "
            "own choice a merge, so both are found with a known probability a round.",
            convicts=frozenset({Check.SHARD}),
        ),
        Kind.POISONED_LOSS: Profile(
            role=Role.TAIL,
            gains="A frame for others: it reports losses that speak against whom it likes and for itself.",
            stopped_by="A replay of the tail compares the loss; attribution counts no tail's word alone.",
            falsifies=_BACKWARD,
            strength=0.5,
            unit="factor",
            convicts=frozenset({Check.LOSS}),
        ),
        Kind.SYBIL: Profile(
            role=Role.SIBLINGS,
            gains="A second vote and a second place in the roster from one GPU.",
            stopped_by="Nothing convicts it: both compute. It earns what its GPU does, because pay follows units, and "
            "a slow replica is handed fewer of them.",
        ),
        Kind.WEIGHT_COPIER: Profile(
            role=Role.VALIDATOR,
            gains="A validator's dividends without its work: it sets the weights that others have set.",
            stopped_by="Nothing convicts it: scores can be computed by anyone. It follows the others a round "
            "late, and later still where weights are committed to before they are revealed.",
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An adversary: its kind, how strongly it cheats, and with which of its units.

    With `packed` it cheats with all units of a `share` of its windows, otherwise with a `share` of all units. `seed`
    is its own secret.
    """

    kind: Kind
    strength: float
    share: float = 1.0
    packed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise AdversaryError(f"a share of {self.share:g} of the units: give one above 0, up to 1")

    @classmethod
    def of(
        cls, kind: Kind, *, strength: float | None = None, share: float = 1.0, packed: bool = False, seed: int = 0
    ) -> Plan:
        """With the kind's own strength unless one is given. Raises `AdversaryError`."""
        return cls(
            kind=kind,
            strength=PROFILES[kind].strength if strength is None else strength,
            share=share,
            packed=packed,
            seed=seed,
        )

    def cheats(self, *, version: int, sample: int, direction: Direction) -> bool:
        """Whether a unit is falsified. `version` names its window, as its leaf does."""
        if direction not in PROFILES[self.kind].falsifies:
            return False
        unit = "" if self.packed else f"/{sample}/{direction.value}"
        drawn = hashlib.sha256(f"orion/adversary/{self.seed}/{version}{unit}".encode()).digest()
        return int.from_bytes(drawn[:8], "little") < self.share * 2**64
