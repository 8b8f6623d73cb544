"""What an audit makes of a round that was shown honestly, wrongly, as garbage, or not at all."""

import asyncio
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neurons import auditing, fetching
from neurons.dossier import Dossier, RoundFacts
from neurons.faults import of_merge
from neurons.fetching import NamedState, Source, Withheld
from neurons.follower import Fault
from subnet.messages import (
    EvidenceRequest,
    EvidenceTables,
    RunSynapse,
    Shapes,
    StatePieces,
    StateRequest,
    Tensors,
    UnitRequest,
    WeightsDelta,
    WindowRequest,
)
from subnet.transport.axon import Reply
from subnet.transport.errors import Busy, Dropped, OverQuota, ReplayedRequest, Unavailable
from subnet.transport.synapse import Synapse
from subnet.trust.audit import select_units, select_windows
from subnet.trust.finding import Check, Grade
from subnet.trust.heads import Statement, statement_message
from subnet.trust.ledger import Direction, Evidence, Leaf, digest, units_hash
from subnet.trust.report import FindingModel, StatementModel
from subnet.trust.tree import pieces_of
from tests.neurons.audited import NUMBER, Bend, ClosedRound, Court, Judging, Work, rows

SECRET = b"a secret"
Answer = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> ClosedRound:
    return ClosedRound(tmp_path_factory.mktemp("round"))


def victim(closed: ClosedRound, stage: int = 1) -> Work:
    return closed.stage(stage)[0]


def when(kind: type[RunSynapse], act: Callable[[Synapse, Answer], Reply]) -> Bend:
    """A miner that answers requests of one kind so, and all others honestly."""

    async def bend(request: RunSynapse, reply: Synapse, tensors: Answer) -> Reply:
        return act(reply, tensors) if isinstance(request, kind) else (reply, tensors)

    return bend


def assert_only(judge: Judging, hotkey: str) -> None:
    """Nobody else has a failed finding."""
    assert {entry.finding.hotkey for entry in judge.failed()} == {hotkey}


async def test_an_honest_round_passes(closed: ClosedRound) -> None:
    async with Court(closed) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
        assert not judge.failed()
        assert set(dossiers) == set(closed.works)
        for hotkey, dossier in dossiers.items():
            assert dossier.evidence == closed.works[hotkey].evidence
            assert len(dossier.replayed) >= 0.2 * len(dossier.evidence.leaves) - 1
            assert dossier.flops > 0
            assert dossier.source.received > 0
        checks = {entry.finding.check for entry in judge.entries}
        assert {Check.FORWARD, Check.BACKWARD, Check.LOSS, Check.WEIGHTS, Check.STEP, Check.GRADIENT} <= checks
        assert not any(judge.of(hotkey).convicted for hotkey in closed.works)


async def test_a_fault_of_this_code_costs_one_dossier_and_is_said(
    closed: ClosedRound, caplog: pytest.LogCaptureFixture
) -> None:
    async with Court(closed) as court:
        judge, hotkey = court.validators["one"], victim(closed).hotkey
        begins = judge.auditor._begin

        async def breaks(facts: RoundFacts, dossier: Dossier, evidence: Evidence) -> None:
            if dossier.hotkey == hotkey:
                raise IndexError("piece 9")
            await begins(facts, dossier, evidence)

        judge.auditor._begin = breaks
        dossiers = await judge.audit(closed.facts(SECRET))
    assert {dossier.hotkey: dossier.broken for dossier in dossiers.values() if dossier.broken} == {
        hotkey: "IndexError: piece 9"
    }
    assert all(bool(dossier.replayed) != bool(dossier.broken) for dossier in dossiers.values())
    assert f"the audit of {hotkey} broke off" in caplog.text
    assert "piece 9" in caplog.text


async def test_only_picked_windows_and_drawn_units_are_asked_for(closed: ClosedRound) -> None:
    async with Court(closed) as court:
        facts = closed.facts(SECRET, stake_share=0.25)
        dossiers = await court.validators["one"].audit(facts)
        for hotkey, show in court.shows.items():
            heads = closed.works[hotkey].heads
            picked = {
                head.version
                for slot, seed in enumerate(facts.seeds)
                for head in select_windows(heads, seed=seed, hotkey=hotkey, slot=slot, count=2)
            }
            assert set(dossiers[hotkey].picked) == picked
            windows = {request.version for request in show.asked if isinstance(request, WindowRequest)}
            assert windows <= picked - {heads[0].version}, "the first follows from public state"
            units = [request for request in show.asked if isinstance(request, UnitRequest)]
            assert 1 <= len(dossiers[hotkey].replayed) <= len(picked)
            backward = sum(head.backward for head in heads if head.version in dossiers[hotkey].stepped)
            assert len(units) == len(dossiers[hotkey].replayed) + backward
            shut = dossiers[hotkey].shut  # what the quota ran out in the middle of
            states = [r.version for r in show.asked if isinstance(r, StateRequest) and r.version not in shut]
            assert sorted(states) == sorted(version for version, _ in dossiers[hotkey].pieces if version not in shut)


async def test_little_stake_fetches_few_windows(closed: ClosedRound) -> None:
    """A round's first window costs nobody a transfer; of the others each validator reads its part."""
    async with Court(closed) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET, stake_share=1 / 64))
        asked = {
            (hotkey, request.version)
            for hotkey, show in court.shows.items()
            for request in show.asked
            if isinstance(request, WindowRequest)
        }
        picked = {(hotkey, version) for hotkey, dossier in dossiers.items() for version in dossier.picked}
        assert len(asked) < len(picked) / 3
        for hotkey, dossier in dossiers.items():
            first = closed.works[hotkey].heads[0].version
            assert first not in dossier.picked or dossier.replayed
        assert not judge.failed()


# -- what is committed and wrong ---------------------------------------------------------------------------------


def noisy(leaf: Leaf, output: torch.Tensor, strength: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(leaf.sample)
    return output + strength * output.std() * torch.randn(output.shape, generator=generator)


async def test_who_computes_something_else_is_convicted_in_its_first_round(tmp_path: Path) -> None:
    closed = ClosedRound(tmp_path, cheats={(1, 0): noisy})
    cheat = victim(closed)
    async with Court(closed) as court:
        judge = court.validators["one"]
        await judge.audit(closed.facts(SECRET))
        assert_only(judge, cheat.hotkey)
        assert {entry.finding.grade for entry in judge.failed()} == {Grade.MEASUREMENT}
        assert judge.of(cheat.hotkey).convicted_round == NUMBER


async def test_one_that_fails_now_and_then_is_looked_at_until_it_is_decided(tmp_path: Path) -> None:
    def sometimes(leaf: Leaf, output: torch.Tensor) -> torch.Tensor:
        return noisy(leaf, output, strength=0.04) if leaf.sample % 2 else output

    closed = ClosedRound(tmp_path, samples=32, cheats={(1, 0): sometimes, (1, 1): sometimes})
    async with Court(closed) as court:
        judge, facts = court.validators["one"], closed.facts(SECRET, stake_share=0.1)
        dossiers = await judge.audit(facts)
        replayed = {stage: [len(dossiers[work.hotkey].replayed) for work in closed.stage(stage)] for stage in range(2)}
        failed = [work.hotkey for work in closed.stage(1) if judge.failed(work.hotkey)]
        assert failed, "the draw hit none of them: choose another secret"
        assert not any(judge.of(hotkey).goes_on(judge.rule) for hotkey in failed)
        assert all(judge.of(hotkey).convicted for hotkey in failed)
        assert max(replayed[0]) == 1
        assert max(replayed[1]) >= 4


def closed_with(work: Work, evidence: Evidence) -> Work:
    """The same replica with another ledger, committed to on chain."""
    return replace(work, evidence=evidence, heads=list(evidence.heads))


@pytest.mark.parametrize("bad", ["foreign leaf", "twice", "units", "gap"])
async def test_a_ledger_that_contradicts_itself_is_a_proof(closed: ClosedRound, bad: str) -> None:
    work = victim(closed)
    assert work.evidence is not None
    leaves, heads = list(work.evidence.leaves), list(work.evidence.heads)
    if bad == "foreign leaf":
        leaves[0] = replace(leaves[0], stage=0)
    elif bad == "twice":
        leaves[1] = leaves[0]
    elif bad == "units":
        leaves[0] = replace(leaves[0], output=digest(b"another"))
    else:
        heads = heads[:1] + heads[2:]
    bent = replace(work.evidence, leaves=tuple(leaves), heads=tuple(heads))
    await proven(closed, closed_with(work, bent), Check.HEADS)


async def proven(closed: ClosedRound, work: Work, check: Check) -> None:
    original = closed.works[work.hotkey]
    closed.works[work.hotkey] = work
    try:
        async with Court(closed) as court:
            judge = court.validators["one"]
            await judge.audit(closed.facts(SECRET))
    finally:
        closed.works[work.hotkey] = original
    assert_only(judge, work.hotkey)
    proofs = [entry.finding for entry in judge.failed() if entry.finding.grade is Grade.PROOF]
    assert check in {finding.check for finding in proofs}
    assert judge.of(work.hotkey).convicted_round == NUMBER


async def test_weights_that_change_between_two_windows_are_a_proof(closed: ClosedRound) -> None:
    work = victim(closed)
    assert work.evidence is not None
    heads = list(work.evidence.heads)
    heads[1] = replace(heads[1], weights=digest(b"others"))
    await proven(closed, closed_with(work, replace(work.evidence, heads=tuple(heads))), Check.WEIGHTS)


async def test_a_first_window_that_does_not_begin_with_public_weights_is_a_proof(closed: ClosedRound) -> None:
    work = victim(closed)
    assert work.evidence is not None
    heads = list(work.evidence.heads)
    heads[0] = replace(heads[0], weights=digest(b"others"))
    await proven(closed, closed_with(work, replace(work.evidence, heads=tuple(heads))), Check.WEIGHTS)


async def test_a_head_that_trains_on_other_tokens_is_proven(closed: ClosedRound) -> None:
    work = victim(closed, stage=0)
    assert work.evidence is not None
    rule = closed.loaded.manifest.audit
    facts = closed.facts(SECRET)
    picked = [
        head.version
        for slot, seed in enumerate(facts.seeds)
        for head in select_windows(work.heads, seed=seed, hotkey=work.hotkey, slot=slot, count=rule.windows)
    ]
    outside = next(leaf for leaf in work.evidence.leaves if leaf.version not in picked[:1])
    leaves = tuple(
        replace(leaf, input=digest(b"other tokens")) if leaf.sample == outside.sample else leaf
        for leaf in work.evidence.leaves
    )
    heads = tuple(
        replace(head, units=units_hash([leaf for leaf in leaves if leaf.version == head.version]))
        for head in work.evidence.heads
    )
    await proven(closed, closed_with(work, replace(work.evidence, leaves=leaves, heads=heads)), Check.DATA)


async def test_who_signed_another_chain_than_it_closed_is_proven_and_others_can_check_it(closed: ClosedRound) -> None:
    work = victim(closed)
    true, forged = closed.statement(work, 2), closed.statement(work, 2)
    lie = Statement(2, digest(b"another chain"), forged.signature)
    async with Court(closed, validators=("one", "two")) as court:
        one, two = court.validators.values()
        facts = closed.facts(SECRET)
        await one.audit(replace(facts, statements={work.hotkey: [true]}))
        assert not one.failed()
        dossiers = await two.audit(replace(facts, statements={work.hotkey: [true, lie]}))
        (entry,) = two.failed()
        assert (entry.finding.check, entry.finding.grade) == (Check.HEADS, Grade.PROOF)
        assert entry.statement == lie
        # Nobody else believes it: the signature is over another digest.
        model = FindingModel.of(entry.finding, entry.statement)
        await one.adopter.reproduce(facts, one.auditor.open(facts)[work.hotkey], [model], accuser="two")
        assert not one.failed()
        del dossiers


async def test_a_signed_lie_is_adopted_by_its_signature(closed: ClosedRound) -> None:
    work = victim(closed)
    lied = digest(b"another chain")
    message = statement_message(closed.loaded.run_id, NUMBER, hotkey=work.hotkey, count=2, digest=lied)
    lie = Statement(2, lied, work.identity.sign(message))
    async with Court(closed) as court:
        judge, facts = court.validators["one"], closed.facts(SECRET)
        dossiers = await judge.audit(facts)
        finding = replace(
            judge.entries[0].finding, hotkey=work.hotkey, check=Check.HEADS, grade=Grade.PROOF, passed=False
        )
        model = FindingModel.of(finding).model_copy(update={"statement": StatementModel.of(lie)})
        assert await judge.adopter.reproduce(facts, dossiers[work.hotkey], [model, model], accuser="two") == 1
        (entry,) = judge.failed()
        assert (entry.accuser, entry.finding.check) == ("two", Check.HEADS)
        assert judge.of(work.hotkey).convicted_round == NUMBER


# -- what is not committed, or does not come ------------------------------------------------------------------------


def replaced(**tensors: torch.Tensor) -> Callable[[Synapse, Answer], Reply]:
    return lambda reply, old: (reply, {**old, **tensors})


def damaged(reply: Synapse, tensors: Answer) -> Reply:
    return reply, {name: tensor.clone().add_(1) for name, tensor in tensors.items()}


def refuse(error: Exception) -> Callable[[Synapse, Answer], Reply]:
    def act(_: Synapse, __: Answer) -> Reply:
        raise error

    return act


GIANT = torch.zeros(64 << 20, dtype=torch.uint8)
SILENCES = {
    "other tensors": when(UnitRequest, damaged),
    "no tensors": when(UnitRequest, lambda reply, _: (reply, {})),
    "giant tensors": when(UnitRequest, replaced(output=GIANT)),
    "wrong shape": when(UnitRequest, replaced(input=torch.zeros(1, dtype=torch.bfloat16))),
    "dropped units": when(UnitRequest, refuse(Dropped("no", "no"))),
    "over quota at once": when(UnitRequest, refuse(OverQuota("no", "no"))),
    "busy for ever": when(UnitRequest, refuse(Busy("no", "no", retry_after=0.3))),
    "a copy first, for ever": when(UnitRequest, refuse(ReplayedRequest("no", "no"))),
    "a fault": when(UnitRequest, refuse(RuntimeError("a bug of theirs"))),
    "garbage delta": when(WindowRequest, lambda _, __: (WeightsDelta(size=100), {"delta": rows(b"x" * 100, 100)})),
    "giant delta": when(WindowRequest, lambda _, __: (WeightsDelta(size=GIANT.numel()), {"delta": GIANT.view(1, -1)})),
    "delta announced larger": when(WindowRequest, lambda _, old: (WeightsDelta(size=1 << 39), old)),
    "damaged tables": when(EvidenceRequest, damaged),
    "tables of another size": when(EvidenceRequest, replaced(leaves=torch.zeros(3, 5, dtype=torch.uint8))),
    "giant tables": when(
        EvidenceRequest, lambda _, old: (EvidenceTables(payload="00" * 32, heads=2**20 - 1, acks=4096), old)
    ),
    "another payload": when(EvidenceRequest, lambda reply, old: (reply.model_copy(update={"payload": "11" * 32}), old)),
    "no tables": when(EvidenceRequest, refuse(Unavailable("no", "no", retry_after=0.3))),
    "another message": when(EvidenceRequest, lambda _, __: (Tensors(), {})),
    "wrong round": when(EvidenceRequest, refuse(Dropped("round 3 is not kept here", "ask for round 9"))),
}


@pytest.mark.parametrize("kind", SILENCES)
async def test_what_cannot_be_shown_to_others_counts_here_alone(closed: ClosedRound, kind: str) -> None:
    work = victim(closed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with Court(closed, bends={work.hotkey: SILENCES[kind]}, patience=1.0) as court:
        judge = court.validators["one"]
        async with asyncio.timeout(20):
            dossiers = await judge.audit(closed.facts(SECRET))
    assert_only(judge, work.hotkey)
    assert {(entry.finding.check, entry.finding.grade) for entry in judge.failed()} == {
        (Check.WITHHELD, Grade.WITHHELD)
    }
    held = judge.of(work.hotkey)
    assert (held.convicted_round, held.withheld_round) == (None, NUMBER)
    others = [dossier for hotkey, dossier in dossiers.items() if hotkey != work.hotkey]
    assert all(dossier.replayed for dossier in others)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500 << 10, "KiB"


async def test_who_hangs_costs_its_own_patience_and_nobody_elses_audit(closed: ClosedRound) -> None:
    work, loop = victim(closed), asyncio.get_running_loop()

    async def hang(request: RunSynapse, reply: Synapse, tensors: Answer) -> Reply:
        if isinstance(request, UnitRequest):
            await asyncio.sleep(60)
        return reply, tensors

    finished: dict[str, float] = {}
    async with Court(closed, bends={work.hotkey: hang}, patience=1.5) as court:
        judge, facts = court.validators["one"], closed.facts(SECRET)
        dossiers = judge.auditor.open(facts)

        async def one(dossier: Dossier) -> None:
            await judge.auditor.audit(facts, {dossier.hotkey: dossier})
            finished[dossier.hotkey] = loop.time()

        start = loop.time()
        await asyncio.gather(*map(one, dossiers.values()))
        assert max(finished, key=finished.__getitem__) == work.hotkey
        assert finished[work.hotkey] - start < 10
    assert_only(judge, work.hotkey)


async def test_who_is_asked_by_somebodys_copies_first_withheld_nothing(closed: ClosedRound) -> None:
    work, asked = victim(closed), 0

    async def beaten(request: RunSynapse, reply: Synapse, tensors: Answer) -> Reply:
        nonlocal asked
        asked += 1
        if asked % 4:
            raise ReplayedRequest("nonce 1 was used", "sign every try with a new nonce")
        return reply, tensors

    async with Court(closed, bends={work.hotkey: beaten}) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert not judge.failed()
    assert dossiers[work.hotkey].replayed
    assert asked > 8


async def test_who_is_unreachable_withheld_and_who_fixed_nothing_did_not(closed: ClosedRound) -> None:
    gone, dead = closed.stage(1)
    async with Court(closed, patience=0.5) as court:
        del court.endpoints[gone.hotkey], court.endpoints[dead.hotkey]
        judge, facts = court.validators["one"], closed.facts(SECRET)
        records = {**facts.records, dead.hotkey: replace(dead.record, round=NUMBER - 1)}
        dossiers = await judge.audit(replace(facts, records=records))
    assert_only(judge, gone.hotkey)
    assert dossiers[dead.hotkey].evidence is None
    assert not judge.of(dead.hotkey).convicted


async def test_who_cannot_be_reached_is_asked_again_while_there_is_time(
    closed: ClosedRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "AGAIN", 0.05)
    away = victim(closed)
    async with Court(closed, patience=0.3) as court:
        endpoint = court.endpoints.pop(away.hotkey)
        judge, facts = court.validators["one"], closed.facts(SECRET)
        dossiers = judge.auditor.open(facts)
        closing = asyncio.get_running_loop().create_future()
        going = asyncio.create_task(judge.auditor.audit(facts, dossiers, closing=closing))
        while not dossiers[away.hotkey].absent:  # noqa: ASYNC110 - a flag, set once
            await asyncio.sleep(0)
        court.endpoints[away.hotkey] = endpoint
        await going
    assert dossiers[away.hotkey].evidence is not None
    assert dossiers[away.hotkey].replayed
    assert not judge.of(away.hotkey).convicted


async def test_a_validator_that_most_do_not_answer_blames_its_own_line(closed: ClosedRound) -> None:
    answering = closed.stage(1)[0]
    async with Court(closed, patience=0.3) as court:
        for hotkey in list(court.endpoints):
            if hotkey != answering.hotkey:
                del court.endpoints[hotkey]
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    for hotkey, dossier in dossiers.items():
        assert not judge.of(hotkey).convicted
        assert bool(dossier.broken) == (hotkey != answering.hotkey)


async def test_a_busy_miner_is_asked_again(closed: ClosedRound) -> None:
    work, turns = victim(closed), 0

    async def busy(_: RunSynapse, reply: Synapse, tensors: Answer) -> Reply:
        nonlocal turns
        turns += 1
        if turns % 2:
            raise Busy("two at once", "ask again", retry_after=0.01)
        return reply, tensors

    async with Court(closed, bends={work.hotkey: busy}) as court:
        judge = court.validators["one"]
        dossiers = await judge.audit(closed.facts(SECRET))
    assert not judge.failed()
    assert dossiers[work.hotkey].replayed


async def test_a_fault_in_one_dossier_costs_that_dossier(closed: ClosedRound, monkeypatch: pytest.MonkeyPatch) -> None:
    work = victim(closed)
    async with Court(closed) as court:
        judge = court.validators["one"]
        examine = judge.auditor._examine

        async def broken(facts: object, dossier: Dossier, evidence: Evidence) -> None:
            if dossier.hotkey == work.hotkey:
                raise ZeroDivisionError
            await examine(facts, dossier, evidence)  # type: ignore[arg-type]

        monkeypatch.setattr(judge.auditor, "_examine", broken)
        dossiers = await judge.audit(closed.facts(SECRET))
    assert not judge.failed()
    assert not dossiers[work.hotkey].replayed
    assert all(dossier.replayed for hotkey, dossier in dossiers.items() if hotkey != work.hotkey)


async def test_a_stage_whose_state_is_not_known_accuses_nobody(closed: ClosedRound) -> None:
    async with Court(closed) as court:
        judge, facts = court.validators["one"], closed.facts(SECRET)
        start = replace(facts.start, public={}, base={})
        dossiers = await judge.audit(replace(facts, start=start))
    assert not judge.failed()
    assert not any(dossier.replayed for dossier in dossiers.values())


# -- pieces of states ----------------------------------------------------------------------------------------------


def source(court: Court, work: Work) -> Source:
    closed, plan = court.closed, work.engine.plan
    return Source(
        dendrite=court.validators["one"].dendrite,
        endpoint=court.endpoints.get,
        run=closed.loaded.run_id,
        number=NUMBER,
        hotkey=work.hotkey,
        plan=plan,
        layout=closed.layouts[plan.index],
        shapes=Shapes.of(closed.loaded.manifest),
        patience=1.0,
    )


async def test_pieces_are_proven_by_the_roots_in_the_head(closed: ClosedRound) -> None:
    work = victim(closed)
    head, values = work.heads[0], closed.layouts[1].values
    async with Court(closed) as court:
        asked = source(court, work)
        for part, count, root in (
            ("weights", values, head.weights),
            ("next_optimizer", 2 * values, head.next_optimizer),
        ):
            last = pieces_of(4 * count) - 1
            state = NamedState(part, root, count)
            data = await asked.pieces(head.version, [(state, index) for index in range(last + 1)])
            assert b"".join(data) == bytes(work.states[head.version, part].numpy().tobytes())
            for span in (range(1), range(16_380, 16_390), range(count - 5, count)):
                (found,) = await asked.values(head.version, [(state, span)])
                assert torch.equal(found, work.states[head.version, part][span.start : span.stop])
        with pytest.raises(Withheld):
            await asked.pieces(head.version, [(NamedState("weights", head.next_weights, values), 0)])


@pytest.mark.parametrize(
    "act",
    [
        damaged,
        lambda _, old: (StatePieces(sizes=[1 << 16], hashes=[48]), {**old, "proof": rows(b"h" * 32 * 48, 32)}),
        lambda _, old: (StatePieces(sizes=[1 << 16], hashes=[0]), {**old, "proof": rows(b"", 32)}),
        lambda _, __: (StatePieces(sizes=[1], hashes=[0]), {"data": rows(b"1", 1), "proof": rows(b"", 32)}),
        lambda _, __: (StatePieces(sizes=[], hashes=[]), {"data": rows(b"", 1), "proof": rows(b"", 32)}),
        replaced(proof=torch.zeros(1 << 20, 32, dtype=torch.uint8)),
        replaced(data=GIANT.view(1, -1)),
    ],
    ids=["damaged", "longest proof", "no proof", "another size", "nothing", "giant proof", "giant piece"],
)
async def test_forged_and_giant_proofs_are_refused(
    closed: ClosedRound, act: Callable[[Synapse, Answer], Reply]
) -> None:
    work = victim(closed)
    head = work.heads[0]
    async with Court(closed, bends={work.hotkey: when(StateRequest, act)}) as court:
        async with asyncio.timeout(10):
            state = NamedState("weights", head.weights, closed.layouts[1].values)
            with pytest.raises(Withheld):
                await source(court, work).pieces(head.version, [(state, 0)])


async def test_long_stretches_take_several_calls_and_empty_ones_none(
    closed: ClosedRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "STATE_PIECES", 2)
    work = victim(closed)
    head, count = work.heads[0], closed.layouts[1].moments
    state = NamedState("next_optimizer", head.next_optimizer, count)
    whole, held = range(count), work.states[head.version, "next_optimizer"]
    assert pieces_of(4 * count) > 2
    async with Court(closed) as court:
        found = await source(court, work).values(head.version, [(state, span) for span in (whole, range(5, 5), whole)])
        assert [one.shape for one in found] == [(count,), (0,), (count,)]
        assert torch.equal(found[0], held)
        assert torch.equal(found[2], held)
        asked = [request for request in court.shows[work.hotkey].asked if isinstance(request, StateRequest)]
        assert {len(request.pieces) for request in asked} <= {1, 2}
        assert sum(len(request.pieces) for request in asked) == 2 * pieces_of(4 * count)


# -- merges --------------------------------------------------------------------------------------------------------


def test_what_a_merge_shows_is_a_proof_where_anybody_can_compute_it() -> None:
    faults = [
        Fault("a", 0, "liar", "published another digest", (3, 5)),
        Fault("b", 1, "refused", "payload holds NaN"),
        Fault("c", 1, "forged", "gave a piece of another hash"),
    ]
    found = [entry.finding for entry in of_merge(faults, 7)]
    assert [(one.check, one.grade) for one in found] == [
        (Check.SHARD, Grade.PROOF),
        (Check.PAYLOAD, Grade.PROOF),
        (Check.WITHHELD, Grade.WITHHELD),
    ]
    assert {one.round for one in found} == {7}
    assert found[0].piece == 3


def test_units_of_one_secret_are_those_that_anybody_computes_from_it(closed: ClosedRound) -> None:
    work = victim(closed)
    assert work.evidence is not None
    head = work.heads[1]
    drawn = select_units(work.evidence, head, secret=SECRET, seed=b"s", hotkey=work.hotkey, count=3)
    again = select_units(work.evidence, head, secret=SECRET, seed=b"s", hotkey=work.hotkey, count=3)
    assert drawn == again
    assert all(leaf.version == head.version and leaf.direction in Direction for leaf in drawn)
