"""Two validators that never look at the same unit set the same weights."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self

import pytest
import torch

from model.stage import build_stage
from neurons.adopting import Adopter
from neurons.auditing import Auditor
from neurons.bench import Bench
from neurons.dossier import Dossier, RoundFacts
from neurons.reports import ReportDesk, ReportReader, write_report
from neurons.telemetry import ReportRead
from subnet.identity import Identity
from subnet.swarm.observers import Observer
from subnet.swarm.record import Flags, Phase, Record
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.trust.audit import pick_windows, reads_window
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import Direction, Leaf, UnitKey, digest
from subnet.trust.report import commit
from tests.neurons.audited import NOW, NUMBER, ClosedRound, Court, no_shards
from tests.neurons.test_judgement import Bar

ROUNDS = range(NUMBER, NUMBER + 3)
HONEST_EVERY = 3
"""The cheater computes one window in so many as it should."""
Place = tuple[str, int]
"""A window: whose, and its version."""


def flips(version: int) -> bool:
    return version % HONEST_EVERY != 0


def sign_flip(leaf: Leaf, output: torch.Tensor) -> torch.Tensor:
    return -output if flips(leaf.version) else output


class Seat(Bar):
    """A validator with half of the stake: its auditor, its reports and its judge, on a real axon."""

    def __init__(self, name: str, other: str, closed: ClosedRound, folder: Path, endpoints: Mapping[str, str]) -> None:
        me = Identity.from_uri(f"//agreement-{name}")
        axon = Axon(Admission(me.hotkey, allow=lambda _hotkey, _route: None, now_ns=NOW))
        dendrite = Dendrite(me, now_ns=NOW)
        super().__init__(
            closed,
            folder / name,
            me=me,
            other=Identity.from_uri(f"//agreement-{other}"),
            axon=axon,
            dendrite=dendrite,
            neighbours=SimpleNamespace(endpoint=endpoints.get),
        )
        self.axon, self.dendrite = axon, dendrite
        described = closed.loaded.manifest
        self.auditor = Auditor(
            loaded=closed.loaded,
            plans=closed.plans,
            layouts=closed.layouts,
            corpus=closed.corpus,
            bench=Bench([build_stage(described.model.config(), plan, 1) for plan in closed.plans]),
            dendrite=dendrite,
            endpoint=endpoints.get,
            tolerance=lambda _: lambda _check: described.audit.tolerance,
            enter=self.judge.note,
            held=self.suspicions.of,
            risk=self.suspicions.risk,
            rule=lambda: self.suspicions.rule,
            patience=5.0,
        )
        self.desk = ReportDesk(self.node)
        self.reader = ReportReader(self.node, Adopter(self.auditor, run=closed.loaded.run_id, recheck=no_shards))
        self.round: RoundFacts
        self.dossiers: Mapping[str, Dossier] = {}

    def observed(self) -> Observer:
        """As the others see it on chain when the round begins."""
        record = Record(
            run=self.closed.loaded.run_id,
            round=self.closed.number,
            phase=Phase.READY,
            flags=Flags.OBSERVER,
            root=commit(self.round.secret),
        )
        return Observer(self.identity.hotkey, 0.5, record, 0)

    async def audit(self, closed: ClosedRound, facts: RoundFacts) -> None:
        """Its own audit, and its report."""
        self.closed, self.round = closed, facts
        self.suspicions.begin(closed.number, closed.works, anomaly=self.judge.anomalies())
        self.dossiers = self.auditor.open(facts)
        await self.auditor.audit(facts, self.dossiers)
        self.desk.publish(write_report(self.node, facts, self.dossiers, []))

    async def read(self, *others: Observer) -> None:
        await self.reader.read_all(self.round, self.dossiers, {other.hotkey: other for other in others})

    async def close(self) -> None:
        await self.judge.close(self.facts(self.closed.number, mine=0.5), self.dossiers)

    def looked_at(self) -> set[tuple[str, UnitKey]]:
        """Units that it computed again, alone or for their step."""
        return {
            (hotkey, key)
            for hotkey, dossier in self.dossiers.items()
            if dossier.evidence is not None
            for key in dossier.replayed.union(
                leaf.key
                for version in dossier.stepped
                for leaf in dossier.evidence.window(version)
                if leaf.direction is Direction.BACKWARD
            )
        }

    def failed(self) -> set[str]:
        return {
            hotkey
            for hotkey, dossier in self.dossiers.items()
            if any(not entry.finding.passed for entry in dossier.entries)
        }

    def convicted(self) -> set[str]:
        return {hotkey for hotkey in self.closed.works if self.suspicions.of(hotkey).convicted}


class Town:
    """Two seats; `shown` opens a round to them."""

    def __init__(self, closed: ClosedRound, folder: Path) -> None:
        self.endpoints: dict[str, str] = {}
        self.seats = [
            Seat("one", "two", closed, folder, self.endpoints),
            Seat("two", "one", closed, folder, self.endpoints),
        ]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for seat in self.seats:
            seat.desk.open()
            await self._stack.enter_async_context(seat.dendrite)
            await seat.axon.start()
            self._stack.push_async_callback(seat.axon.stop)
            self.endpoints[seat.identity.hotkey] = seat.axon.endpoint
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()


def played(folder: Path, number: int) -> ClosedRound:
    """A round with one window picked of two, in which a tail flips the sign of what it sends back."""
    return ClosedRound(
        folder / str(number), cheats={(1, 0): sign_flip}, windows=1, readers=1.0, steps=0.5, number=number
    )


def apart(closed: ClosedRound, cheat: str) -> tuple[list[bytes], bytes, bytes]:
    """Slots' seeds and two secrets: by these no window is read twice, the first reads two that the cheater bent, and
    the second one that it did not."""
    heads = {hotkey: work.heads for hotkey, work in closed.works.items()}

    def picks(seeds: list[bytes]) -> dict[str, list[tuple[WindowHead, bytes]]]:
        return {hotkey: pick_windows(of, seeds=seeds, hotkey=hotkey, count=1) for hotkey, of in heads.items()}

    def decent(seeds: list[bytes]) -> bool:
        """A round's first window all may read, so it must not be picked."""
        found = picks(seeds)
        bent = [flips(head.version) for head, _ in found[cheat]]
        first = any(head == heads[hotkey][0] for hotkey, pairs in found.items() for head, _ in pairs)
        return not first and bent.count(True) >= 2 and bent.count(False) >= 1

    def reads(secret: bytes) -> set[Place]:
        return {
            (hotkey, head.version)
            for hotkey, pairs in picked.items()
            for head, seed in pairs
            if reads_window(head, secret=secret, seed=seed, hotkey=hotkey, share=0.5)
        }

    tries = ([digest(b"%d/%d" % (turn, slot)) for slot in range(closed.slots)] for turn in count())
    seeds = next(filter(decent, tries))
    picked = picks(seeds)
    bent = {(cheat, head.version) for head, _ in picked[cheat] if flips(head.version)}
    straight = {(cheat, head.version) for head, _ in picked[cheat]} - bent
    secrets = [digest(b"secret %d" % turn) for turn in range(4000)]
    one = next(secret for secret in secrets if len(bent & reads(secret)) >= 2 and not straight & reads(secret))
    two = next(secret for secret in secrets if straight & reads(secret) and not (bent | reads(one)) & reads(secret))
    return seeds, one, two


@pytest.mark.timeout(240)
async def test_two_validators_with_disjoint_audits_set_the_same_weights(tmp_path: Path) -> None:
    first = played(tmp_path, ROUNDS[0])
    cheat = first.stage(1)[0].hotkey
    uids = {hotkey: uid for uid, hotkey in enumerate(first.works)}
    async with Town(first, tmp_path) as town:
        one, two = town.seats
        for number in ROUNDS:
            closed = first if number == first.number else played(tmp_path, number)
            for work in closed.works.values():
                assert work.evidence is not None
                one.closed = two.closed = closed
                acks = tuple(seat.ack(seat.identity, work) for seat in town.seats)
                work.evidence = replace(work.evidence, acks=acks)
            seeds, *secrets = apart(closed, cheat)
            async with Court(closed, validators=()) as court:
                town.endpoints.update(court.endpoints)
                for seat, secret in zip(town.seats, secrets, strict=True):
                    await seat.audit(closed, replace(closed.facts(secret, stake_share=0.5), seeds=seeds))
                own = [seat.looked_at() for seat in town.seats]
                assert all(own)
                assert not own[0] & own[1]
                assert (one.failed(), two.failed()) == ({cheat}, set())
                assert two.convicted() == (set() if number == ROUNDS[0] else {cheat}), "not before it has replayed"
                for seat in town.seats:
                    await seat.read(*(other.observed() for other in town.seats))
                replayed = two.looked_at() - own[1]
                adopted = [entry for entry in two.dossiers[cheat].entries if entry.accuser == one.identity.hotkey]
                assert {hotkey for hotkey, _ in replayed} == {cheat}
                assert replayed <= own[0]
                assert len({entry.finding.version for entry in adopted if not entry.finding.passed}) >= 2
                assert two.suspicions.of(cheat).convicted_round == one.suspicions.of(cheat).convicted_round == number
                for seat in town.seats:
                    await seat.close()
        reads = [event for event in two.events(ReportRead) if isinstance(event, ReportRead)]
        assert len(reads) == len(ROUNDS)
        assert all(event.replayed and event.reproduced and not event.strays and not event.refused for event in reads)
    for ours, theirs in zip(one.chain.set, two.chain.set, strict=True):
        assert ours.get(uids[cheat], 0.0) == theirs.get(uids[cheat], 0.0) == 0.0
        for hotkey, uid in uids.items():
            if hotkey != cheat:
                assert ours[uid] == pytest.approx(theirs[uid], rel=0.02)
                assert ours[uid] > 0.05
    assert len(one.chain.set) == len(ROUNDS)
