"""Validators read each other's reports, believe none of it, and adopt what fails in their own hands too."""

import asyncio
import io
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self, cast

import pytest
import torch

from neurons.dossier import Dossier, RoundFacts
from neurons.node import Node
from neurons.reports import FALSE_ACCUSATIONS, ReportDesk, ReportReader, write_report
from neurons.telemetry import ReportRead, Telemetry, read_events
from subnet.messages import ReportReply, ReportRequest
from subnet.swarm.observers import Observer
from subnet.swarm.record import Flags, Phase, Record
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS
from subnet.transport.errors import Unavailable
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.ledger import Direction, digest
from subnet.trust.report import FindingModel, Report, commit, report_message
from tests.neurons.audited import NOW, NUMBER, ClosedRound, Court, Judging, rows
from tests.neurons.test_auditing import noisy


class Office:
    """A validator that audits, reports and reads: what of a node that takes, on a real axon."""

    def __init__(self, court: Court, judge: Judging, secret: bytes, *, stake_share: float) -> None:
        self.court, self.judge, self.secret = court, judge, secret
        self.log = io.StringIO()
        self.axon = Axon(Admission(judge.identity.hotkey, allow=lambda _hotkey, _route: None, now_ns=NOW))
        self.node = cast(
            "Node",
            SimpleNamespace(
                axon=self.axon,
                loaded=court.closed.loaded,
                identity=judge.identity,
                dendrite=judge.dendrite,
                telemetry=Telemetry(self.log, now=time.time),
                neighbours=SimpleNamespace(endpoint=court.endpoints.get),
            ),
        )
        self.desk = ReportDesk(self.node)
        self.facts: RoundFacts = court.closed.facts(secret, stake_share=stake_share)
        self.dossiers: Mapping[str, Dossier] = {}

    @property
    def hotkey(self) -> str:
        return self.judge.identity.hotkey

    @property
    def observer(self) -> Observer:
        record = Record(
            run=self.court.closed.loaded.run_id,
            round=NUMBER,
            phase=Phase.READY,
            flags=Flags.OBSERVER,
            root=commit(self.secret),
        )
        return Observer(self.hotkey, 1.0, record, 0)

    async def audit(self) -> None:
        self.dossiers = await self.judge.audit(self.facts)

    def publish(self) -> Report:
        report = write_report(self.node, self.facts, self.dossiers, [])
        self.desk.publish(report)
        return report

    async def read(self, *others: Observer, patience: float = 1.0) -> list[ReportRead]:
        reader = ReportReader(self.node, self.judge.adopter, patience)
        await reader.read_all(self.facts, self.dossiers, {other.hotkey: other for other in (self.observer, *others)})
        found = [stamped.event for stamped in read_events(self.log.getvalue().splitlines())]
        return [event for event in found if isinstance(event, ReportRead)]


class Offices:
    def __init__(self, closed: ClosedRound, *names: str, stake_share: float = 0.05) -> None:
        self.court = Court(closed, validators=names)
        self._share = stake_share
        self._stack = AsyncExitStack()
        self.offices: list[Office] = []

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.court)
        for name, judge in self.court.validators.items():
            office = Office(self.court, judge, digest(name.encode()), stake_share=self._share)
            await self.open(office)
            self.offices.append(office)
        return self

    async def open(self, office: Office) -> None:
        office.desk.open()
        await office.axon.start()
        self._stack.push_async_callback(office.axon.stop)
        self.court.endpoints[office.hotkey] = office.axon.endpoint

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> ClosedRound:
    return ClosedRound(tmp_path_factory.mktemp("honest"))


@pytest.fixture(scope="module")
def cheated(tmp_path_factory: pytest.TempPathFactory) -> ClosedRound:
    """One tail bends half of the gradients that it sends back."""
    return ClosedRound(
        tmp_path_factory.mktemp("cheated"),
        samples=32,
        cheats={(1, 0): lambda leaf, output: noisy(leaf, output) if leaf.sample % 4 < 2 else output},
    )


async def test_two_validators_with_other_picks_convict_the_same_miner(cheated: ClosedRound) -> None:
    cheat = cheated.stage(1)[0].hotkey
    # Names whose draws look into two windows of the cheat between them: a verdict takes two.
    async with Offices(cheated, "five", "six", "seven", "eight") as held:
        for office in held.offices:
            await office.audit()
        alone = [bool(office.judge.failed(cheat)) for office in held.offices]
        assert len(set(alone)) == 2, "all drew alike: choose other secrets"
        for office in held.offices:
            office.publish()
        for office in held.offices:
            events = await office.read(*(other.observer for other in held.offices))
            assert len(events) == 3
            assert not any(event.refused or event.strays for event in events)
        for office in held.offices:
            assert {entry.finding.hotkey for entry in office.judge.failed()} == {cheat}
            assert office.judge.of(cheat).convicted_round == NUMBER
        late = held.offices[alone.index(False)]
        accusers = {entry.accuser for entry in late.judge.failed(cheat)}
        assert accusers - {""}, "what convicted it was adopted"
        assert sum(event.reproduced for event in await late.read()) > 0


async def test_each_unit_is_replayed_once(cheated: ClosedRound) -> None:
    async with Offices(cheated, "one", "two", stake_share=1.0) as held:
        one, two = held.offices
        await one.audit()
        await two.audit()
        one.publish()
        before = {hotkey: set(dossier.replayed) for hotkey, dossier in two.dossiers.items()}
        (event,) = await two.read(one.observer)
        assert event.findings > 0
        for hotkey, dossier in two.dossiers.items():
            measured = [
                (entry.finding.check, entry.finding.version, entry.finding.sample)
                for entry in two.judge.entries
                if entry.finding.hotkey == hotkey and entry.finding.grade is Grade.MEASUREMENT
            ]
            assert len(measured) == len(set(measured))
            assert before[hotkey] <= dossier.replayed


def finding(hotkey: str, **changes: object) -> Finding:
    fields = {
        "hotkey": hotkey,
        "round": NUMBER,
        "stage": 1,
        "check": Check.BACKWARD,
        "grade": Grade.MEASUREMENT,
        "passed": False,
        "error": 1.0,
        "tolerance": 0.02,
        "reason": "it fails, believe me",
    }
    return Finding(**{**fields, **changes})  # type: ignore[arg-type]


def lie(hotkey: str, sample: int, version: int, check: Check = Check.BACKWARD) -> FindingModel:
    return FindingModel.of(finding(hotkey, sample=sample, version=version, check=check))


async def test_a_lying_report_harms_nobody_and_is_soon_not_listened_to(honest: ClosedRound) -> None:
    async with Offices(honest, "one", "liar") as held:
        one, liar = held.offices
        await one.audit()
        await liar.audit()
        own = {hotkey: set(dossier.replayed) for hotkey, dossier in one.dossiers.items()}
        lies = []
        for work in honest.works.values():
            for version in one.dossiers[work.hotkey].picked:
                assert work.evidence is not None
                leaf = next(
                    leaf
                    for leaf in work.evidence.window(version)
                    if leaf.key not in own[work.hotkey]
                    and (work.engine.plan.is_last or leaf.direction is Direction.FORWARD)
                )
                check = Check.FORWARD if leaf.direction is Direction.FORWARD else Check.BACKWARD
                lies.append(lie(work.hotkey, leaf.sample, version, check))
        report = write_report(liar.node, liar.facts, liar.dossiers, []).model_copy(update={"findings": lies})
        liar.desk.publish(report)
        (event,) = await one.read(liar.observer)
        assert event.refused == ""
        assert event.findings == len(lies)
        assert event.reproduced == 0
        assert event.replayed > 0
        assert not one.judge.failed()
        accused = [hotkey for hotkey, dossier in one.dossiers.items() if dossier.replayed != own[hotkey]]
        assert len(accused) <= FALSE_ACCUSATIONS < len(honest.works)


async def test_a_finding_on_what_was_never_picked_or_computed_costs_nothing(honest: ClosedRound) -> None:
    async with Offices(honest, "one", "liar") as held:
        one, liar = held.offices
        await one.audit()
        work = honest.stage(1)[0]
        picked = next(iter(one.dossiers[work.hotkey].picked))
        stranger = liar.hotkey
        lies = [
            lie(work.hotkey, 2**40, picked),
            lie(work.hotkey, 2, 2**31),
            lie(work.hotkey, 2, picked, Check.SHARD),
            lie(stranger, 2, picked),
        ]
        await liar.audit()
        liar.desk.publish(write_report(liar.node, liar.facts, liar.dossiers, []).model_copy(update={"findings": lies}))
        (event,) = await one.read(liar.observer)
        assert (event.replayed, event.reproduced) == (0, 0)
        assert event.strays == 2
        assert not one.judge.failed()


async def test_a_lie_about_a_merged_shard_is_adopted_once_it_is_computed_again(honest: ClosedRound) -> None:
    liar, other = honest.stage(1)
    async with Offices(honest, "one", "two") as held:
        one, two = held.offices
        asked: list[tuple[int, int, int]] = []

        async def recheck(number: int, stage: int, shard: int) -> tuple[str, ...]:
            asked.append((number, stage, shard))
            return (liar.hotkey,)

        one.judge.adopter._recheck = recheck
        await one.audit()
        await two.audit()
        shard = finding(liar.hotkey, check=Check.SHARD, grade=Grade.PROOF, round=NUMBER - 1, version=None, piece=4)
        late = [FindingModel.of(one_) for one_ in (shard, shard, replace(shard, hotkey=other.hotkey))]
        two.desk.publish(write_report(two.node, two.facts, two.dossiers, late))
        (event,) = await one.read(two.observer)
        assert event.reproduced == 1
        assert asked == [(NUMBER - 1, 1, 4)] * 2
        (entry,) = one.judge.failed()
        assert (entry.finding.hotkey, entry.finding.check, entry.accuser) == (liar.hotkey, Check.SHARD, two.hotkey)
        assert one.judge.of(liar.hotkey).convicted_round == NUMBER - 1


async def test_a_fault_of_this_code_in_one_dossier_does_not_end_the_reading(
    cheated: ClosedRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Offices(cheated, "one", "two", stake_share=1.0) as held:
        one, two = held.offices
        two.facts = cheated.facts(two.secret, stake_share=0.05)
        await one.audit()
        await two.audit()
        one.publish()

        async def breaks(*_: object) -> None:
            raise KeyError("sample 7")

        monkeypatch.setattr(two.judge.adopter, "_units", breaks)
        (event,) = await two.read(one.observer)
        assert (event.refused, event.reproduced) == ("", 0)
        assert event.findings > 0
        accused = cheated.stage(1)[0].hotkey
        assert [hotkey for hotkey, dossier in two.dossiers.items() if dossier.broken] == [accused]
        monkeypatch.undo()
        *_, event = await two.read(one.observer)
        assert event.replayed == 0, "it broke this code once"


async def test_a_report_counts_only_with_the_secret_that_was_committed_to(honest: ClosedRound) -> None:
    async with Offices(honest, "one", "two") as held:
        one, two = held.offices
        await one.audit()
        await two.audit()
        two.publish()
        wrong = replace(two.observer, record=replace(two.observer.record, root=commit(b"another")))
        late = replace(two.observer, record=replace(two.observer.record, round=NUMBER + 1))
        assert "secret" in (await one.read(wrong))[-1].refused
        assert "committed to no secret" in (await one.read(late))[-1].refused
        assert (await one.read(two.observer))[-1].refused == ""


@pytest.mark.parametrize(
    "bad", ["garbage", "unsigned", "another author", "another round", "giant", "size", "not ready"]
)
async def test_bad_reports_are_refused_with_a_reason_and_end_nothing(honest: ClosedRound, bad: str) -> None:
    async with Offices(honest, "one", "two") as held:
        one, two = held.offices
        await one.audit()
        await two.audit()
        report = write_report(two.node, two.facts, two.dossiers, [])
        if bad == "another author":
            report = report.model_copy(update={"validator": one.hotkey})
        if bad == "another round":
            report = report.model_copy(update={"round": NUMBER + 1})
        data = {"garbage": b"{" * 1000, "giant": b"0" * (8 << 20)}.get(bad, report.to_bytes())
        key = one.judge.identity if bad == "unsigned" else two.judge.identity
        signature = key.sign(report_message(data)).hex()

        async def serve(_: str, __: ReportRequest, ___: Mapping[str, torch.Tensor]) -> Reply:
            if bad == "not ready":
                raise Unavailable("not yet", "ask again", retry_after=0.2)
            size = min(len(data), 4 << 20) + (bad == "size")
            return ReportReply(size=size, signature=signature), {"report": rows(data, len(data))}

        axon = Axon(Admission(two.hotkey, allow=lambda _hotkey, _route: None, now_ns=NOW))
        axon.serve(ReportRequest, serve, specs=NO_SPECS)
        await axon.start()
        held.court.endpoints[two.hotkey] = axon.endpoint
        try:
            async with asyncio.timeout(10):
                (event,) = await one.read(two.observer)
        finally:
            await axon.stop()
        assert event.refused
        assert event.replayed == 0
        assert not one.judge.failed()


async def test_a_validator_without_an_axon_is_only_noted(honest: ClosedRound) -> None:
    async with Offices(honest, "one", "two") as held:
        one, two = held.offices
        await one.audit()
        del held.court.endpoints[two.hotkey]
        (event,) = await one.read(two.observer, patience=0.3)
        assert "no axon" in event.refused


async def test_only_the_newest_reports_are_served(honest: ClosedRound, tmp_path: Path) -> None:
    async with Offices(honest, "one", "two") as held:
        one, two = held.offices
        await two.audit()
        whole = two.publish()
        for number in range(NUMBER + 1, NUMBER + 4):
            two.desk.publish(whole.model_copy(update={"round": number}))
        await one.audit()
        (event,) = await one.read(two.observer)
        assert "not kept" in event.refused
