"""`orion score explain --network`: a miner's score of the newest closed round, recomputed by somebody who doubts it.

Nothing comes from a validator but what it reports to have failed. Who is paid for what follows from the chain and from
the tables that all miners of the round serve, by the same code that validators run. Replays are not repeated here; what
only a round before knows, a conviction that still lasts, is not seen.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.layout import Layout
from model.split import split
from neurons.bootstrap import BootstrapError, join_history
from neurons.dossier import Entry
from neurons.fetching import Source, Unsound, Withheld
from neurons.history import History, HistoryError
from neurons.judgement import checked, rule_of
from neurons.node import CONNECT_TIMEOUT, seed_of
from neurons.reports import fetch_report, reason_to_refuse
from neurons.slots import slots_of
from neurons.verdict import Closed, Verdict
from scripts.score import Explained, RoundExplained, ScoreError, text
from subnet.chain import BittensorChain, ChainError
from subnet.identity import Identity, IdentityError
from subnet.manifest import LoadedManifest, ManifestError, check_announced, load_manifest
from subnet.messages import Shapes
from subnet.metagraph import ChainState
from subnet.swarm.observers import Observer, observers, stakes
from subnet.swarm.roster import Roster, records_of
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import TransportError
from subnet.trust.decision import Suspicion
from subnet.trust.finding import Finding
from subnet.trust.ledger import Evidence
from subnet.trust.report import Report, ReportError
from subnet.trust.scoring import History as Scores
from subnet.wallets import load_wallet

STALL = 120.0
"""Seconds without a new block after which waiting for the round's end is given up."""


@dataclass(frozen=True, slots=True)
class Doubter:
    """Who asks, and where."""

    network: str
    manifest: Path
    wallet: str
    hotkey: str
    wallet_path: Path


def recompute_score(doubter: Doubter, *, uid: int) -> int:
    """Print it; 0 done, 1 refused."""
    try:
        lines = asyncio.run(_recompute(doubter, uid))
    except (ScoreError, ManifestError, ChainError, IdentityError, BootstrapError, HistoryError) as error:
        print(f"orion score explain: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


async def _recompute(doubter: Doubter, uid: int) -> list[str]:
    loaded = load_manifest(doubter.manifest)
    wallet = load_wallet(doubter.wallet, doubter.hotkey, doubter.wallet_path)
    identity = Identity(wallet)
    netuid = loaded.manifest.run.netuid
    chain = await BittensorChain.connect(doubter.network, netuid, wallet, timeout=CONNECT_TIMEOUT)
    try:
        state = await chain.state_at((await chain.finalized()).number)
        authority = state.by_hotkey(loaded.manifest.run.authority)
        check_announced(loaded, authority.record if authority else None)
        target = next((neuron.hotkey for neuron in state.neurons if neuron.uid == uid), None)
        if target is None:
            raise ScoreError(f"uid {uid} is not registered on netuid {netuid}: there are {len(state.neurons)} neurons")
        async with Dendrite(identity, now_ns=time.time_ns) as dendrite:
            look = _Look(loaded, chain, dendrite, identity.hotkey)
            return await look.explain(uid, target)
    finally:
        await chain.close()


class _Look:
    """One look at a run from outside."""

    def __init__(self, loaded: LoadedManifest, chain: BittensorChain, dendrite: Dendrite, me: str) -> None:
        self._loaded = loaded
        self._chain = chain
        self._dendrite = dendrite
        self._me = me
        self._newest = -1
        self._endpoints: Mapping[str, str] = {}
        """As of block `_newest`."""

    async def explain(self, uid: int, target: str) -> list[str]:
        """Raises `ScoreError` and what chain and peers raise."""
        marks, rules = self._loaded.manifest.round, self._loaded.manifest.score
        roster = await self._closed_roster()
        if target not in roster.members or roster.stage_of(target) is None:
            raise ScoreError(f"uid {uid} was not active in round {roster.round}, the newest closed one")
        watched = await self._state(roster.block + min(marks.cut, marks.length - 1))
        at_work = observers(watched, self._loaded.run_id)
        cut = await self._state(roster.block + marks.cut)
        have = await self._state(roster.block + marks.have)
        closed = Closed(
            roster=roster,
            cut=cut,
            have=have,
            route_seed=seed_of(await self._chain.block_hash(roster.block), "orion/route/1"),
            stakes=stakes(at_work),
            slots=slots_of(self._loaded.manifest),
        )
        evidence, silent = await self._evidence(roster, cut)
        reports, unheard = await self._reports(roster.round, at_work)
        plans = split(self._loaded.manifest.model.config(), self._loaded.manifest.swarm.stages)
        verdict = Verdict.of(self._loaded, plans, closed, evidence, me=self._me)
        failed = {hotkey: self._failed(hotkey, verdict, reports) for hotkey in verdict.forward_flops}
        convicted = [hotkey for hotkey, findings in failed.items() if self._convicts(findings, len(at_work))]
        history = Scores(rules.rounds)
        counted = history.close(verdict.scores({}, cap=rules.scarcity), convicted)
        shares = history.shares()
        share = shares.get(target, 0.0)
        scored = verdict.explained(
            counted[target], history, shares, uid=uid, burn=rules.burn, weight=share * (1 - rules.burn)
        )
        checks = [checked(Entry(finding, accuser=accuser)) for accuser, finding in failed[target]]
        source = f"chain at block {cut.head.number}, tables of {len(evidence)} miners, {len(reports)} reports"
        rounds = [RoundExplained(scored, source, checks, on_chain=await self._on_chain(uid), reported=True)]
        lines = list(text(uid, [Explained("recomputed by", self._me, rounds)]))
        lines += [f"    no table      {hotkey}: {reason}" for hotkey, reason in silent.items()]
        lines += [f"    no report     {hotkey}: {reason}" for hotkey, reason in unheard.items()]
        return lines

    async def _closed_roster(self) -> Roster:
        """Of the newest round whose reports are due, waited for if need be."""
        state = await self._state((await self._chain.finalized()).number)
        try:
            history = await join_history(self._dendrite, self._loaded, state, self._state, asker=self._me)
        except BootstrapError:
            history = History(self._loaded, self._state)
            if await history.begin(until=state.head.number) is None:
                raise
        marks, due = self._loaded.manifest.round, self._loaded.manifest.audit.report
        newest = await history.catch_up(self._chain)
        number = newest.round - 1
        roster = history.roster(number)
        if roster is None:
            raise ScoreError(f"round {newest.round} is the first one seen here: ask again when it is over")
        await self._chain.passed(roster.block + max(marks.cut + due, marks.have), stall=STALL)
        return roster

    async def _state(self, block: int) -> ChainState:
        await self._chain.passed(block, stall=STALL)
        state = await self._chain.state_at(block)
        if block > self._newest:
            self._newest = block
            self._endpoints = {
                neuron.hotkey: neuron.endpoint.url for neuron in state.neurons if neuron.endpoint is not None
            }
        return state

    async def _evidence(self, roster: Roster, cut: ChainState) -> tuple[dict[str, Evidence], dict[str, str]]:
        """Tables by miner, and why there are none of the others."""
        manifest, records = self._loaded.manifest, records_of(cut)
        config = manifest.model.config()
        plans = split(config, manifest.swarm.stages)

        async def tables(hotkey: str, stage: int) -> Evidence | str:
            record = records.get(hotkey)
            if record is None or not record.fixes(roster.round):
                return f"no root on chain at block {cut.head.number}"
            source = Source(
                dendrite=self._dendrite,
                endpoint=self._endpoints.get,
                run=self._loaded.run_id,
                number=roster.round,
                hotkey=hotkey,
                plan=plans[stage],
                layout=Layout.planned(config, plans[stage], manifest.optimizer.kind),
                shapes=Shapes.of(manifest),
            )
            try:
                return await source.tables(record, samples=manifest.samples(roster.round))
            except (Withheld, Unsound) as error:
                return str(error)

        members = [(hotkey, stage) for stage, names in enumerate(roster.stages) for hotkey in names]
        answers = await asyncio.gather(*(tables(hotkey, stage) for hotkey, stage in members))
        named = list(zip((hotkey for hotkey, _ in members), answers, strict=True))
        found = {hotkey: answer for hotkey, answer in named if isinstance(answer, Evidence)}
        return found, {hotkey: answer for hotkey, answer in named if isinstance(answer, str)}

    async def _reports(self, number: int, at_work: Mapping[str, Observer]) -> tuple[list[Report], dict[str, str]]:
        """Those that open what their authors committed to, and why there are none of the others."""

        async def ask(observer: Observer) -> Report | str:
            try:
                report = await fetch_report(
                    self._dendrite, self._endpoints.get, observer.hotkey, run=self._loaded.run_id, number=number
                )
            except (TransportError, ReportError) as error:
                return str(error)
            return reason_to_refuse(report, self._loaded.run_id, number, observer) or report

        answers = await asyncio.gather(*(ask(observer) for observer in at_work.values()))
        named = list(zip(at_work, answers, strict=True))
        return [answer for _, answer in named if isinstance(answer, Report)], {
            hotkey: answer for hotkey, answer in named if isinstance(answer, str)
        }

    def _failed(self, hotkey: str, verdict: Verdict, reports: list[Report]) -> list[tuple[str, Finding]]:
        """What tables show and what validators report to have failed, with who reports it; for the first nobody."""
        number = verdict.closed.roster.round
        shown = [("", finding) for finding in verdict.settlement.findings if finding.hotkey == hotkey]
        return shown + [
            (report.validator, model.finding())
            for report in reports
            for model in report.by_miner().get(hotkey, ())
            if model.round == number
        ]

    def _convicts(self, findings: list[tuple[str, Finding]], validators: int) -> bool:
        """Whether the sequential test convicts by these failures, taken as they are reported."""
        rule = rule_of(self._loaded.manifest, validators=validators)
        return Suspicion().after_all([finding for _, finding in findings], rule).convicted

    async def _on_chain(self, uid: int) -> str:
        given = (await self._chain.weights()).items()
        words = ", ".join(f"{weights.get(uid, 0.0):.6f} by uid {validator}" for validator, weights in given)
        return f"on chain {words}" if words else "no validator has set weights"
