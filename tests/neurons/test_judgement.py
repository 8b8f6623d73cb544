"""From findings and ledgers to suspicions, pay, and weights on chain."""

import asyncio
import io
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from neurons.dossier import Dossier, Entry
from neurons.judgement import Judge, Suspicions
from neurons.node import Node
from neurons.telemetry import AuditBroken, Checked, Convicted, MinerScored, Telemetry, WeightsSet, read_events
from neurons.verdict import Closed
from subnet.identity import Identity
from subnet.metagraph import ChainState, Head, Neuron
from subnet.swarm.record import Phase
from subnet.trust.decision import Rule
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import Ack, ack_message, chain
from tests.neurons.audited import NUMBER, SEED, ClosedRound, Work

RULE = Rule.of(tests_per_year=1e5, false_convictions=1e-3, rounds=3)
OWNER = Identity.from_uri("//judgement-owner").hotkey


def finding(hotkey: str, number: int = NUMBER, **changes: object) -> Finding:
    fields = {
        "hotkey": hotkey,
        "round": number,
        "stage": 1,
        "check": Check.DATA,
        "grade": Grade.PROOF,
        "passed": False,
        "reason": "other tokens",
    }
    return Finding(**{**fields, **changes})  # type: ignore[arg-type]


class FakeChain:
    """Blocks come when they are asked for; weights that were set are kept."""

    def __init__(self, *, epoch: int = 10_000) -> None:
        self.block, self.epoch = 500, epoch
        self.set: list[Mapping[int, float]] = []
        self.waiting = asyncio.Event()

    async def finalized(self) -> Head:
        return Head(self.block, "0x00", 0)

    async def next_epoch_block(self) -> int:
        return self.epoch

    async def set_weights(self, weights: Mapping[int, float]) -> int:
        self.set.append(dict(weights))
        return self.block

    async def wait(self, block: int) -> None:
        if block > self.block:
            await self.waiting.wait()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> ClosedRound:
    return ClosedRound(tmp_path_factory.mktemp("round"))


class Bar:
    """One validator's judge before a fake chain."""

    def __init__(
        self,
        closed: ClosedRound,
        folder: Path,
        *,
        tempo: int = 20,
        epoch: int = 10_000,
        me: Identity | None = None,
        other: Identity | None = None,
        **parts: object,
    ) -> None:
        """`parts` are what else its node has."""
        self.closed = closed
        self.identity = me or Identity.from_uri("//judgement-me")
        self.other = other or Identity.from_uri("//judgement-other")
        self.log = io.StringIO()
        self.chain = FakeChain(epoch=epoch)
        self.tempo = tempo
        self.node = cast(
            "Node",
            SimpleNamespace(
                loaded=closed.loaded,
                plans=closed.plans,
                identity=self.identity,
                telemetry=Telemetry(self.log, now=time.time),
                chain=self.chain,
                wait=self.chain.wait,
                **parts,
            ),
        )
        self.suspicions = Suspicions(folder / "held" / "one.json", RULE)
        self.judge = Judge(self.node, self.suspicions, folder / "held" / "one-scores.json")

    def ack(self, key: Identity, work: Work, *, count: int | None = None, slot: int = 0) -> Ack:
        count = len(work.heads) if count is None else count
        message = ack_message(
            self.closed.loaded.run_id,
            NUMBER,
            hotkey=work.hotkey,
            count=count,
            digest=chain(work.heads)[count],
            slot=slot,
        )
        return Ack(key.hotkey, count, slot, key.sign(message))

    def dossiers(self, *acks_of: Identity) -> dict[str, Dossier]:
        found = {}
        for hotkey, work in self.closed.works.items():
            assert work.evidence is not None
            evidence = replace(work.evidence, acks=tuple(self.ack(key, work) for key in acks_of))
            stub = SimpleNamespace(received=0)
            found[hotkey] = Dossier(hotkey, work.engine.plan.index, cast("object", stub), evidence)  # type: ignore[arg-type]
        return found

    def facts(self, number: int = NUMBER, *, mine: float = 0.2) -> Closed:
        neurons = tuple(
            Neuron(
                uid=uid,
                hotkey=hotkey,
                coldkey="",
                stake=0.0,
                validator_permit=False,
                endpoint=None,
                registered_at=0,
                last_update=0,
                incentive=0.0,
                dividends=0.0,
                record=replace(work.record, round=number, phase=Phase.HAVE).encode(),
                record_block=1,
            )
            for uid, (hotkey, work) in enumerate(self.closed.works.items())
        )
        state = ChainState(Head(600, "0x00", 0), 9, OWNER, self.tempo, neurons)
        return Closed(
            roster=replace(self.closed.roster, round=number),
            cut=state,
            have=state,
            route_seed=SEED,
            stakes={self.identity.hotkey: mine, self.other.hotkey: 1.0 - mine},
            slots=self.closed.slots,
        )

    def events(self, kind: type) -> list[object]:
        return [one.event for one in read_events(self.log.getvalue().splitlines()) if isinstance(one.event, kind)]


async def test_windows_pay_that_most_of_the_stake_or_this_validator_acknowledged(
    closed: ClosedRound, tmp_path: Path
) -> None:
    for key, share, pays in (("other", 0.2, True), ("other", 0.8, False), ("identity", 0.2, True), (None, 0.2, False)):
        bar = Bar(closed, tmp_path / f"{key} {share}")
        acks = () if key is None else (getattr(bar, key),)
        await bar.judge.close(bar.facts(mine=share), bar.dossiers(*acks))
        scored = bar.events(MinerScored)
        assert len(scored) == len(closed.works)
        assert all((event.units == event.claimed) == pays for event in scored)
        assert len(bar.chain.set) == pays
        assert bool(bar.events(WeightsSet)) == pays


async def test_forged_acknowledgements_pay_nothing(closed: ClosedRound, tmp_path: Path) -> None:
    bar = Bar(closed, tmp_path)
    stranger = Identity.from_uri("//judgement-stranger")
    dossiers = bar.dossiers(stranger)
    for hotkey, dossier in dossiers.items():
        work = closed.works[hotkey]
        assert dossier.evidence is not None
        signed = bar.ack(stranger, work)
        forged = Ack(bar.identity.hotkey, signed.count, 0, signed.signature)
        beyond = Ack(bar.identity.hotkey, len(work.heads) + 1, 0, bytes(64))
        dossier.evidence = replace(dossier.evidence, acks=(signed, forged, beyond))
    await bar.judge.close(bar.facts(), dossiers)
    assert all(event.units == 0 for event in bar.events(MinerScored))
    assert bar.chain.set == []


async def test_honest_weights_sum_to_one_and_follow_the_flops(closed: ClosedRound, tmp_path: Path) -> None:
    bar = Bar(closed, tmp_path)
    await bar.judge.close(bar.facts(), bar.dossiers(bar.identity))
    (weights,) = bar.chain.set
    assert sum(weights.values()) == pytest.approx(1.0)
    assert set(weights) == set(range(len(closed.works)))
    scored = {event.uid: event for event in bar.events(MinerScored)}
    total = sum(event.score for event in scored.values())
    for uid, weight in weights.items():
        assert weight == pytest.approx(scored[uid].score / total)
        assert scored[uid].weight == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize("grade", [Grade.PROOF, Grade.WITHHELD])
async def test_a_conviction_costs_as_many_rounds_as_a_mean_is_over(
    closed: ClosedRound, tmp_path: Path, grade: Grade
) -> None:
    bar = Bar(closed, tmp_path)
    uids = {hotkey: uid for uid, hotkey in enumerate(closed.works)}
    bad = closed.stage(1)[0].hotkey
    rounds = closed.loaded.manifest.score.rounds
    for number in range(NUMBER, NUMBER + rounds + 2):
        bar.suspicions.begin(number, closed.works, anomaly={})
        if number == NUMBER + 1:
            bar.judge.note(Entry(finding(bad, number, grade=grade)))
        # The same ledgers in every round: the sample ids of the first are no other's, so none of these pays there.
        await bar.judge.close(bar.facts(number), bar.dossiers(bar.identity))
    paid = [weights.get(uids[bad], 0.0) > 0 for weights in bar.chain.set]
    assert paid[0]
    assert not any(paid[1 : 1 + rounds])
    correct = [event.correctness for event in bar.events(MinerScored) if event.hotkey == bad]
    assert correct == [1.0, *[0.0] * rounds, 1.0]
    (convicted,) = bar.events(Convicted)
    assert (convicted.hotkey, convicted.round, convicted.until) == (bad, NUMBER + 1, NUMBER + 1 + rounds)


async def test_a_validator_that_restarts_goes_on_with_its_means(closed: ClosedRound, tmp_path: Path) -> None:
    async def close(bar: Bar, number: int) -> dict[str, tuple[float, int]]:
        await bar.judge.close(bar.facts(number), bar.dossiers(bar.identity))
        return {event.hotkey: (event.mean, event.rounds) for event in bar.events(MinerScored) if event.round == number}

    whole = Bar(closed, tmp_path / "whole")
    await close(whole, NUMBER)
    expected = await close(whole, NUMBER + 1)
    await close(Bar(closed, tmp_path / "torn"), NUMBER)
    assert await close(Bar(closed, tmp_path / "torn"), NUMBER + 1) == expected
    assert {rounds for _, rounds in expected.values()} == {2}
    (tmp_path / "torn" / "held" / "one-scores.json").write_text("{")
    anew = await close(Bar(closed, tmp_path / "torn"), NUMBER + 1)
    assert {rounds for _, rounds in anew.values()} == {1}


async def test_who_was_looked_at_until_the_audit_broke_off_was_not_audited(closed: ClosedRound, tmp_path: Path) -> None:
    bar = Bar(closed, tmp_path)
    passing, failing, whole, _ = closed.works
    bar.suspicions.begin(NUMBER, closed.works, anomaly={})
    dossiers = bar.dossiers(bar.identity)
    for hotkey in (passing, failing, whole):
        error = 1.0 if hotkey == failing else 0.0
        fields = {"check": Check.FORWARD, "grade": Grade.MEASUREMENT, "version": 1, "sample": 1, "tolerance": 0.02}
        bar.judge.note(Entry(finding(hotkey, passed=not error, error=error, **fields)))
        dossiers[hotkey].broken = "" if hotkey == whole else "IndexError: piece 9"
    level = bar.suspicions.of(failing).level(RULE)
    await bar.judge.close(bar.facts(), dossiers)
    assert {event.hotkey for event in bar.events(AuditBroken) if isinstance(event, AuditBroken)} == {passing, failing}
    assert bar.suspicions.of(failing).level(RULE) == level > 0
    bar.suspicions.begin(NUMBER + 2, closed.works, anomaly={})
    assert [bar.suspicions.of(hotkey).clean for hotkey in (passing, failing, whole)] == [0, 0, 1]


async def test_findings_are_in_the_event_log(closed: ClosedRound, tmp_path: Path) -> None:
    bar = Bar(closed, tmp_path)
    measured = finding("x" * 48, check=Check.FORWARD, grade=Grade.MEASUREMENT, error=float("inf"), tolerance=0.02)
    bar.judge.note(Entry(measured, accuser="another"))
    (event,) = bar.events(Checked)
    assert (event.check, event.error, event.accuser, event.reason) == ("forward", -1.0, "another", "other tokens")


async def test_weights_wait_for_their_block_and_newer_ones_take_their_place(
    closed: ClosedRound, tmp_path: Path
) -> None:
    bar = Bar(closed, tmp_path, tempo=360, epoch=700)
    await bar.judge.close(bar.facts(), bar.dossiers(bar.identity))
    assert bar.chain.set == [], "the epoch is far"
    bar.judge.note(Entry(finding(closed.stage(1)[0].hotkey, NUMBER + 1)))
    await bar.judge.close(bar.facts(NUMBER + 1), bar.dossiers(bar.identity))
    assert bar.chain.set == []
    await bar.judge.finish()
    (weights,) = bar.chain.set
    assert len(weights) == len(closed.works) - 1


async def test_weights_that_wait_are_set_when_their_block_comes(closed: ClosedRound, tmp_path: Path) -> None:
    bar = Bar(closed, tmp_path, tempo=360, epoch=700)
    await bar.judge.close(bar.facts(), bar.dossiers(bar.identity))
    bar.chain.waiting.set()
    await bar.judge.finish()
    assert len(bar.chain.set) == 1


def test_a_validator_that_restarts_forgives_nobody(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "one.json"
    first = Suspicions(path, RULE)
    first.begin(4, ["a", "b"], anomaly={})
    first.enter(finding("a", 4))
    measured = finding("b", 4, check=Check.FORWARD, grade=Grade.MEASUREMENT, error=0.05, tolerance=0.02, sample=1)
    first.enter(measured)
    first.keep()
    second = Suspicions(path, RULE)
    assert second.of("a") == first.of("a")
    assert second.of("a").convicted
    assert second.of("b") == first.of("b")
    assert second.risk("b") == first.risk("b") > second.risk("nobody")
    assert [entry.name for entry in path.parent.iterdir()] == ["one.json"]


def test_a_damaged_record_of_suspicions_is_said_and_holds_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "one.json"
    path.write_bytes(b'{"a": {"llr": "much"}}')
    assert not Suspicions(path, RULE).of("a").convicted
    assert str(path) in caplog.text


def test_anomalies_raise_rates_and_convict_nobody(tmp_path: Path) -> None:
    held = Suspicions(tmp_path / "one.json", RULE)
    held.begin(1, ["a", "b"], anomaly={"a": 4.0})
    assert held.risk("a") > held.risk("b")
    assert not held.of("a").convicted
