"""Every check of a simulation fails where what it is there for does not hold, and passes where it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

import pytest

from neurons.telemetry import (
    AuditBroken,
    Checked,
    Convicted,
    Event,
    EvidenceHeld,
    LocalStep,
    Merged,
    MicrobatchDone,
    MicrobatchStarted,
    MinerScored,
    RoundStarted,
    Stamped,
    TrainingClosed,
    Validated,
    WeightsSet,
)
from scripts.sim import invariants
from scripts.sim.chain import EPOCH_MS
from scripts.sim.compute import Pace
from scripts.sim.faults import Fault, Kind
from scripts.sim.invariants import CHECKS, SIMULATED, Story, name_of, violations
from scripts.sim.repeater import Request
from scripts.sim.world import Size, World

KEPT = {"m0": "hm0", "m1": "hm1", "v0": "hv0"}


@dataclass
class Told:
    """A story of two miners and a validator, which is sound until something is added to it."""

    events: list[tuple[str, float, Event]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=lambda: ["12"])
    endings: list[str] = field(default_factory=list)
    finished: bool = True
    cuts: dict[str, list[tuple[int, int, tuple[int, ...]]]] = field(default_factory=dict)
    cheats: bool = False
    """Whether the second miner does."""
    repeated: list[Request] = field(default_factory=list)
    chain: dict[int, dict[int, float]] = field(default_factory=lambda: {2: {0: 0.5, 1: 0.5}})

    def story(self) -> Story:
        nodes = {
            name: SimpleNamespace(
                name=name,
                role="validator" if name == "v0" else "miner",
                identity=SimpleNamespace(hotkey=hotkey),
                finished=self.finished,
                running=False,
                endings=self.endings,
                paces=[Pace(1, 1, 1, cuts=list(self.cuts.get(name, [])))],
            )
            for name, hotkey in KEPT.items()
        }
        world = SimpleNamespace(
            faults=self.faults,
            wrong=self.wrong,
            said=self.said,
            secrets=["ab12"],
            repeater=SimpleNamespace(repeated=self.repeated),
            cheats={"m1": None} if self.cheats else {},
            nodes=nodes,
            size=Size(),
            loaded=SimpleNamespace(manifest=SimpleNamespace(round=SimpleNamespace(count=2))),
            blocks=SimpleNamespace(finalized=9, weights_at=lambda _number: self.chain),
            uid=lambda node: list(KEPT).index(node.name),
        )
        found: dict[str, list[Stamped]] = {}
        for name, at, event in [*sound(), *self.events]:
            found.setdefault(name, []).append(Stamped(EPOCH_MS / 1000 + at, event))
        return Story.of(cast("World", world), found)


def sound() -> list[tuple[str, float, Event]]:
    return [
        ("v0", 40.0, RoundStarted(0, 30, None, [1, 1], "")),
        ("v0", 220.0, RoundStarted(1, 60, None, [1, 1], "")),
        ("m0", 50.0, MicrobatchStarted(0, 7)),
        ("m0", 60.0, MicrobatchDone(0, 7, 4.0, 10.0, 1)),
        ("m0", 61.0, LocalStep(0, 0, 1, 2, 1.0, 0.1, finite=True)),
        ("m0", 200.0, TrainingClosed(0, 0, 1, 1, 0, 0, 0, 0, 1, 1.0)),
        ("m0", 230.0, MicrobatchStarted(1, 9)),
        ("m0", 240.0, MicrobatchDone(1, 9, 4.0, 10.0, 1)),
        ("m0", 250.0, merged(0, "aa")),
        ("m1", 251.0, merged(0, "aa")),
        ("v0", 300.0, scored(1, 1)),
        ("v0", 310.0, Validated(1, 4.0, 8)),
        ("v0", 320.0, WeightsSet(0, 50, {0: 2.0, 1: 2.0})),
    ]


def merged(number: int, weights: str) -> Merged:
    return Merged(number, 0, 2, included=True, void=False, weights=weights, seconds=1.0, carried=0, received=1)


def scored(forward: int, backward: int, *, claimed: int = 2, hotkey: str = "hm0", number: int = 0) -> MinerScored:
    return MinerScored(
        round=number, uid=0, hotkey=hotkey, stage=0, root="", cut=1, claimed=claimed, units=forward + backward,
        forward=forward, backward=backward, unpaid={}, forward_flops=1.0, flops=1.0, correctness=1.0, timeliness=1.0,
        missed=[], scarcity=1.0, score=1.0, mean=1.0, rounds=1, share=1.0, burn=0.0, weight=1.0,
    )  # fmt: skip


def checked(*, passed: bool, error: float = 0.0, grade: str = "measurement") -> Checked:
    return Checked(0, "hm0", 0, "forward", grade, passed, error, 0.02, 1, 7, None, "", "")


def looked(check: str) -> Checked:
    return replace(checked(passed=True), check=check)


def said(node: str, at: float, *events: Event) -> Callable[[Told], None]:
    return lambda told: told.events.extend((node, at, event) for event in events)


def having(**fields: object) -> Callable[[Told], None]:
    return lambda told: [setattr(told, name, value) for name, value in fields.items()] and None


BROKEN: Mapping[str, list[Callable[[Told], None]]] = {
    "nothing unforeseen": [having(wrong=["m0: KeyError"])],
    "everybody finishes": [having(finished=False), having(endings=["x"] * 9)],
    "microbatches are accounted for": [
        said("m1", 70, TrainingClosed(0, 0, 3, 1, 0, 0, 0, 1, 1, 1.0)),
        said("m1", 70, MicrobatchDone(0, 8, 4.0, 1.0, 1)),
    ],
    "nothing is done twice": [said("m1", 70, MicrobatchDone(0, 7, 4.0, 1.0, 1))],
    "nothing counts twice": [having(cuts={"m0": [(0, 0, (7,))], "m1": [(0, 0, (7,))]})],
    "requests are taken once": [having(repeated=[Request(nonce="1", statuses=[200, 409, 200])])],
    "replicas agree": [said("m1", 260, merged(1, "bb")), said("m1", 260, merged(0, "bb"))],
    "validators agree": [said("m1", 310, Validated(1, 4.1, 8))],
    "nothing goes back": [
        said("m0", 62, LocalStep(0, 0, 1, 2, 1.0, 0.1, finite=True)),
        said("v0", 230, RoundStarted(0, 30, None, [1, 1], "")),
    ],
    "honest stay unconvicted": [
        said("v0", 330, Convicted(0, "hm0", 3, "withheld: evidence")),
        said("v0", 330, Convicted(0, "hm0", 3, "forward: error 3")),
        said("v0", 330, checked(passed=False, error=1.0)),
        said("v0", 330, checked(passed=True, error=0.001)),
        said("v0", 330, AuditBroken(0, "hm0", "KeyError")),
    ],
    "every check is made": [said("v0", 330, *[looked("weights")] * 80, *map(looked, ("forward", "step", "loss")))],
    "pay is for work": [
        said("v0", 330, scored(2, 0, number=0)),
        said("v0", 330, scored(1, 1, claimed=1, number=1)),
    ],
    "work is paid": [said("v0", 330, scored(0, 1, number=1))],
    "validators pay alike": [said("m1", 330, scored(1, 0))],
    "memory is bounded": [said("m0", 210, EvidenceHeld(0, 9, 8, 1, 2)), said("m0", 210, EvidenceHeld(0, 1, 8, 3, 2))],
    "work goes on": [
        said("m1", 230, TrainingClosed(1, 0, 2, 1, 0, 0, 0, 1, 1, 1.0)),
    ],
    "weights are on chain": [having(chain={}), having(chain={2: {0: 0.9, 1: 0.1}})],
    "secrets stay secret": [having(said=["x", "drew ab12"])],
}


def test_a_sound_story_has_no_violations() -> None:
    assert violations(Told().story()) == {}


def test_every_check_is_tried() -> None:
    assert {*BROKEN} == {name_of(check) for check in (*CHECKS, *SIMULATED)}


def test_what_only_a_simulation_knows_is_asked_of_no_other() -> None:
    story = replace(Told().story(), simulated=None)
    assert violations(story, CHECKS) == {}
    with pytest.raises(ValueError, match="orion sim"):
        violations(story)


CASES = {f"{name}-{number}": (name, breaks) for name, ways in BROKEN.items() for number, breaks in enumerate(ways)}


@pytest.mark.parametrize(("name", "breaks"), CASES.values(), ids=CASES)
def test_a_check_fails_where_it_should(name: str, breaks: Callable[[Told], None]) -> None:
    told = Told()
    breaks(told)
    if name == "replicas agree" and len(told.events) == 1 and told.events[0][2] == merged(1, "bb"):
        told.events.append(("m0", 261, merged(1, "cc")))
    assert name in violations(told.story())


def test_a_round_in_which_nothing_comes_back_is_seen() -> None:
    told = Told()
    told.events.append(("v0", 400.0, RoundStarted(1, 60, None, [1, 1], "")))
    story = told.story()
    quiet = [entry for entry in story.entries if getattr(entry.event, "round", 0) != 1 or entry.node == "v0"]
    assert list(invariants.work_goes_on(replace(story, entries=quiet)))


def test_what_was_a_faults_doing_is_excused() -> None:
    told = Told(faults=[Fault(Kind.ISOLATE, 55.0, 200.0, ("m0",))])
    told.events += [
        ("m1", 70.0, MicrobatchDone(0, 7, 4.0, 1.0, 1)),
        ("v0", 250.0, Convicted(0, "hm0", 3, "withheld: evidence")),
    ]
    assert violations(told.story()) == {}
    told.faults = [Fault(Kind.KILL, 65.0, 20.0, ("m0",))]
    assert violations(told.story()) == {}
    told.faults = [Fault(Kind.KILL, 65.0, 20.0, ("m1",))]
    assert set(violations(told.story())) == {"nothing is done twice", "honest stay unconvicted"}


def test_who_cheats_may_be_found_out_and_nobody_else() -> None:
    told = Told(cheats=True, repeated=[Request(nonce="1", statuses=[409, 200, 409])])
    told.events += [("v0", 330.0, Convicted(0, "hm1", 3, "forward: error 3")), ("v0", 331.0, failing("hm1"))]
    assert violations(told.story()) == {}
    told.events.append(("v0", 332.0, failing("hm0")))
    assert set(violations(told.story())) == {"honest stay unconvicted"}


def failing(hotkey: str) -> Checked:
    return replace(checked(passed=False, error=1.0), hotkey=hotkey)
