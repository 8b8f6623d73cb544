"""The filter between real workers: honest training passes, poison stops before the optimizer, nothing goes missing."""

import asyncio
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm
from neurons.archive import RoundArchive
from neurons.filter import STRIKES, Filter
from neurons.telemetry import Quarantined, Telemetry, read_events
from neurons.training import TrainingRound
from subnet.swarm.roster import Roster
from subnet.transport.errors import Dropped
from subnet.transport.synapse import tensor_bytes
from subnet.trust.boundary import magnitudes
from subnet.trust.ledger import NO_RECEIPT, Direction, digest
from tests.neurons.swarm import Member, Swarm, manifest, open_corpus, tiny, tokens_file

ROSTER = Roster.of([["a", "b", "c"], ["me"], ["x", "y", "z"]])


class Desk:
    """One filter with its event log, and honest tensors to feed it."""

    def __init__(self) -> None:
        self.log = io.StringIO()
        self.aside: list[str] = []
        self.filter = Filter(stage=1, telemetry=Telemetry(self.log, now=lambda: 0.0), set_aside=self.aside.append)
        self.round = TrainingRound(0, ROSTER, b"seed", RoundArchive())
        self.generator = torch.Generator().manual_seed(0)
        self.sample = 0

    def tensor(self, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(4, 32, 8, generator=self.generator)).to(torch.bfloat16)

    def require_usual(self, sender: str, sample: int, direction: Direction, tensor: torch.Tensor) -> None:
        seen, named = magnitudes(tensor), digest(tensor_bytes(tensor))
        self.filter.require_usual(self.round, sender, sample, direction, seen, named)

    async def takes(self, sender: str, sample: int, tensor: torch.Tensor) -> bool:
        return await self.filter.takes(self.round, sender, sample, tensor, digest(tensor_bytes(tensor)))

    def push(
        self, sender: str, scale: float = 1.0, *, direction: Direction = Direction.BACKWARD, sample: int | None = None
    ) -> None:
        self.sample += 1
        number = self.sample if sample is None else sample
        self.require_usual(sender, number, direction, self.tensor(scale))

    def warm(self, pushes: int = 80) -> None:
        for _ in range(pushes):
            for direction, senders in ((Direction.FORWARD, "abc"), (Direction.BACKWARD, "xyz")):
                for sender in senders:
                    self.push(sender, direction=direction)

    @property
    def quarantined(self) -> list[Quarantined]:
        events = [stamped.event for stamped in read_events(self.log.getvalue().splitlines())]
        return [event for event in events if isinstance(event, Quarantined)]


def test_a_refusal_names_the_number_the_factor_and_the_limit() -> None:
    desk = Desk()
    desk.warm()
    with pytest.raises(Dropped, match=r"backward of sample 900 .* size is .* times .*, limit a factor of"):
        desk.push("x", 10.0, sample=900)
    (event,) = desk.quarantined
    assert (event.hotkey, event.direction, event.sample, event.count, event.stage) == ("x", "backward", 900, 1, 1)


def test_a_tensor_that_was_sent_for_another_sample_is_refused_in_that_round() -> None:
    desk = Desk()
    desk.warm()
    old, zero = desk.tensor(), torch.zeros(4, 32, 8)
    for direction, sender, sample in (("BACKWARD", "x", 900), ("BACKWARD", "x", 900), ("FORWARD", "x", 901)):
        desk.require_usual(sender, sample, Direction[direction], old)
    for sample in (902, 903, 904):
        with pytest.raises(Dropped, match=f"backward of sample {sample} .* what was sent for sample 900"):
            desk.require_usual("x", sample, Direction.BACKWARD, old)
    assert desk.aside == ["x"]
    desk.require_usual("y", 905, Direction.BACKWARD, old)
    for sample in (906, 907):  # a gradient of nothing is like another: its size is judged, not that it is the same
        with pytest.raises(Dropped, match="size"):
            desk.require_usual("z", sample, Direction.BACKWARD, zero)
    desk.round = TrainingRound(1, ROSTER, b"seed", RoundArchive())
    desk.require_usual("x", 908, Direction.BACKWARD, old)


def test_repeating_a_refused_push_neither_helps_nor_counts() -> None:
    desk = Desk()
    desk.warm()
    for _ in range(500):
        with pytest.raises(Dropped):
            desk.push("x", 10.0, sample=900)
    assert len(desk.quarantined) == 1
    with pytest.raises(Dropped):
        desk.push("x", 10.0)


def test_only_who_has_gradients_refused_in_a_row_is_set_aside() -> None:
    desk = Desk()
    desk.warm()
    for _ in range(STRIKES - 1):
        with pytest.raises(Dropped):
            desk.push("x", 10.0)
    desk.push("x")
    for _ in range(STRIKES + 2):
        with pytest.raises(Dropped):
            desk.push("a", 10.0, direction=Direction.FORWARD)
    assert not desk.aside  # an upstream neighbour is sent nothing forward anyway
    for _ in range(STRIKES):
        with pytest.raises(Dropped):
            desk.push("x", 10.0)
    assert desk.aside == ["x"]


def test_bounds_outlive_the_round_and_counts_do_not() -> None:
    desk = Desk()
    desk.warm()
    for number in (1, 2):
        desk.round = TrainingRound(number, ROSTER, b"seed", RoundArchive())
        with pytest.raises(Dropped):
            desk.push("x", 10.0, sample=900)
    assert [(event.round, event.count) for event in desk.quarantined] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e4])
async def test_fetched_activations_pass_the_same_door(value: float) -> None:
    desk = Desk()
    desk.warm()
    assert await desk.takes("a", 900, desk.tensor())
    assert not await desk.takes("a", 901, desk.tensor(10.0))
    bad = desk.tensor()
    bad[0, 0, 0] = value
    assert not await desk.takes("a", 902, bad)


# -- between real workers -----------------------------------------------------------------------------------------


def swarm_of(tmp_path: Path, *, stages: int, replicas: int) -> Swarm:
    entry = tokens_file(tmp_path)
    config = tiny(boundary=BoundaryConfig(form=BoundaryForm.A, width=8))
    loaded = manifest(config, entry, stages=stages, replicas=replicas, wire="bfloat16").write(tmp_path / "m.toml")
    return Swarm(loaded, open_corpus(tmp_path, loaded.manifest, entry), replicas=replicas)


async def train(swarm: Swarm, each: int) -> None:
    """Every head starts and sees the end of so many microbatches more."""
    heads = swarm.stage(0)
    started = [head.worker._current().started for head in heads]
    await asyncio.gather(*(head.worker.drive(limit=before + each) for head, before in zip(heads, started, strict=True)))


def quarantines(swarm: Swarm) -> list[Quarantined]:
    return [
        stamped.event
        for member in swarm.members.values()
        for stamped in member.events
        if isinstance(stamped.event, Quarantined)
    ]


@pytest.mark.parametrize("each", [50, pytest.param(400, marks=pytest.mark.long)])
async def test_honest_training_from_its_first_step_on_is_never_quarantined(tmp_path: Path, each: int) -> None:
    """Asynchronous replicas, none merged with the others, at a high learning rate."""
    async with swarm_of(tmp_path, stages=3, replicas=2) as swarm:
        await train(swarm, each)
        assert not quarantines(swarm)
        assert sum(head.worker._current().completed for head in swarm.stage(0)) == 2 * each


Poison = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def noise(g: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return g + 8.0 * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)


def wild(g: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Finite, and within the wire's limit, and no more than that."""
    g = g.clone()
    g.view(-1)[int(torch.randint(g.numel(), (1,), generator=generator))] = 9e3
    return g


POISONS: dict[str, Poison] = {
    "tenfold": lambda g, _: 10.0 * g,
    "noise": noise,
    "wild": wild,
    "nothing": lambda g, _: torch.zeros_like(g),
}


def poison(member: Member, spoil: Poison) -> None:
    """From now on this replica's gradients are spoilt before it sends them, and before it enters them."""
    generator = torch.Generator().manual_seed(4)
    engine, tail = member.worker.engine, member.worker.engine.tail

    def spoilt(key: object, *unit: torch.Tensor | None) -> tuple[float, torch.Tensor | None]:
        loss, dx = tail(key, *unit)
        return loss, None if dx is None else spoil(dx, generator)

    engine.tail = spoilt


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "wild" else pytest.mark.long) for kind in POISONS]
)
async def test_poisoned_gradients_stop_before_the_optimizer_and_their_microbatches_are_done_by_a_sibling(
    tmp_path: Path, kind: str
) -> None:
    async with swarm_of(tmp_path, stages=2, replicas=2) as swarm:
        await train(swarm, 100)
        bad, good = swarm.stage(1)
        assert not quarantines(swarm)
        poison(bad, POISONS[kind])
        await train(swarm, 12)
        caught = quarantines(swarm)
        assert caught
        assert {event.hotkey for event in caught} == {bad.identity.hotkey}
        assert {event.direction for event in caught} == {"backward"}
        refused = {event.sample for event in caught}
        back: dict[int, int] = {}
        for head in swarm.stage(0):
            current, evidence = await head.worker.close()
            assert current.completed == current.started == 112
            back |= {leaf.sample: leaf.source for leaf in evidence.leaves if leaf.direction is Direction.BACKWARD}
        assert len(back) == 224  # none is lost: the other tail computed what was refused
        assert {back[sample] for sample in refused} == {swarm.stage(1).index(good)}
        _, evidence = await bad.worker.close()
        unsigned = {leaf.sample for leaf in evidence.leaves if leaf.receipt == NO_RECEIPT}
        assert refused <= unsigned
        # Nothing that reached a head's optimizer is far from what it had before.
        for head in swarm.stage(0):
            sizes = [
                float(unit.gradient.float().square().mean().sqrt())
                for unit in swarm.units(head)
                if unit.gradient is not None
            ]
            assert max(sizes[100:]) < 4 * max(sizes[60:100])
            assert min(sizes[100:]) > min(sizes[60:100]) / 4


async def test_poisoned_activations_go_no_further_and_a_lost_microbatch_is_reported(tmp_path: Path) -> None:
    """At the head nobody else has the sample, so it is lost, counted, and unpaid."""
    async with swarm_of(tmp_path, stages=2, replicas=2) as swarm:
        await train(swarm, 100)
        bad, good = swarm.stage(0)
        forward = bad.worker.engine.forward
        bad.worker.engine.forward = lambda key, *unit: 10.0 * forward(key, *unit)
        drives = [asyncio.create_task(head.worker.drive(limit=106)) for head in (bad, good)]
        await drives[1]
        while len({event.sample for event in quarantines(swarm)}) < 2:  # noqa: ASYNC110 - seen in the log
            await asyncio.sleep(0.01)
        drives[0].cancel()
        closed = {member.identity.hotkey: await member.worker.close() for member in swarm.members.values()}
        assert {event.hotkey for event in quarantines(swarm)} == {bad.identity.hotkey}
        for tail in swarm.stage(1):
            sizes = [float(unit.input.float().square().mean().sqrt()) for unit in swarm.units(tail)]
            assert max(sizes) < 4 * sizes[0] + 10
        assert closed[good.identity.hotkey][0].completed == 106
        lost = closed[bad.identity.hotkey][0]
        assert lost.started > lost.completed == 100
        sent = [leaf for leaf in closed[bad.identity.hotkey][1].leaves if leaf.direction is Direction.FORWARD]
        refused = {event.sample for event in quarantines(swarm)}
        assert {leaf.receipt for leaf in sent if leaf.sample in refused} == {NO_RECEIPT}
