"""One validator's audit of one round: from tables to findings, all miners at once, each within its own patience.

    plan      slots' seeds pick windows; the secret, committed on chain before the round, picks units inside
    fetch     tables, weights of picked windows as deltas, tensors of picked units
    replay    on the bench, one window's units at a time
    step      what closed a picked window: its arithmetic on a few pieces, for a share of them the whole gradient
    go on     while a failed unit leaves it open whether its miner cheats, in the windows already picked

What a miner signed or committed to and anybody can recompute is a proof; floating-point results are measurements; what
it did not show after its windows were picked was withheld. Nothing a miner serves can do more than that: everything is
bounded before it is read, and a fault of this code in one dossier costs that dossier.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch

from model.accounting import total_parameters
from model.data import Corpus
from model.layout import Layout
from model.optimizer import clip_bound
from model.split import StagePlan
from neurons.bench import Bench, forward_flops, other_data, replay_flops, replay_units
from neurons.dossier import Dossier, Entry, RoundFacts
from neurons.fetching import PATIENCE, Absent, Source, Spent, Unsound, Withheld, open_delta
from neurons.steps import PIECES, StepJudge, moved, show, show_matrix
from neurons.windows import root_of
from subnet.manifest import LoadedManifest
from subnet.messages import Shapes
from subnet.transport.dendrite import Dendrite
from subnet.trust.audit import (
    Tolerance,
    budget,
    comparable,
    pick_windows,
    reads_window,
    replays_step,
    select_pieces,
    select_pool,
    select_units,
    spread,
)
from subnet.trust.continuity import breaks
from subnet.trust.decision import Rule, Suspicion
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import Statement, WindowHead, conflicting
from subnet.trust.ledger import Direction, Evidence, Leaf
from subnet.trust.polar import select_look
from subnet.trust.tree import pieces_of

log = logging.getLogger("orion.neurons.auditing")

T = TypeVar("T")

AGAIN = 10.0
"""Seconds until who could not be reached is asked again."""
BATCH = 4
"""Units replayed between two looks at the sequential test."""
MEMORY = 8 << 30
"""Bytes for the weights of windows that are in memory or on their way, and as many for deltas that are kept."""
WINDOWS_AT_ONCE = 8
"""So many windows in any case, over all miners: else one that is slow would hold up the others."""


class Auditor:
    """Audits rounds. What it finds goes to `enter`, which answers with what is now held against the miner."""

    def __init__(
        self,
        *,
        loaded: LoadedManifest,
        plans: Sequence[StagePlan],
        layouts: Sequence[Layout],
        corpus: Corpus,
        bench: Bench,
        dendrite: Dendrite,
        endpoint: Callable[[str], str | None],
        tolerance: Callable[[str], Tolerance],
        enter: Callable[[Entry], None],
        held: Callable[[str], Suspicion],
        risk: Callable[[str], float],
        rule: Callable[[], Rule],
        patience: float = PATIENCE,
    ) -> None:
        """
        Args:
            tolerance: of a miner's device against this one's, by its hotkey.
            enter: takes in a finding.
            held: what is held against a miner with all findings so far.
            risk: factor on a miner's audit rate.
            rule: the sequential test in force.
        """
        self._loaded = loaded
        self._plans = plans
        self._layouts = layouts
        self._corpus = corpus
        self._bench = bench
        self._dendrite = dendrite
        self._endpoint = endpoint
        self._tolerance = tolerance
        self._enter = enter
        self._held = held
        self._risk = risk
        self._rule = rule
        self._patience = patience
        self._shapes = Shapes.of(loaded.manifest)
        self._optimizer = loaded.manifest.optimizer.inner()
        self._total = total_parameters(loaded.manifest.model.config(), len(plans))
        self._gate = asyncio.Semaphore(max(WINDOWS_AT_ONCE, MEMORY // (4 * max(layout.values for layout in layouts))))
        self._kept = 0
        """Bytes of deltas that are kept in case that more units of their windows are replayed."""

    # -- a round --------------------------------------------------------------------------------------------------

    def open(self, facts: RoundFacts) -> dict[str, Dossier]:
        """An empty dossier of every member of the roster."""
        self._kept = 0
        return {
            hotkey: self._dossier(facts, hotkey, stage)
            for stage, replicas in enumerate(facts.roster.stages)
            for hotkey in replicas
        }

    async def audit(
        self, facts: RoundFacts, dossiers: Mapping[str, Dossier], *, closing: asyncio.Future[None] | None = None
    ) -> None:
        """Everything but other validators' reports. Who cannot be reached is asked again until `closing` is done."""
        asked = list(dossiers.values())
        while asked:
            await asyncio.gather(*(self.guarded(dossier, self._miner(facts, dossier)) for dossier in asked))
            asked = [dossier for dossier in asked if dossier.absent]
            if not asked or closing is None or closing.done():
                break
            await asyncio.wait([closing], timeout=AGAIN)
        self._miss(facts, dossiers.values(), asked)

    def _miss(self, facts: RoundFacts, dossiers: Iterable[Dossier], absent: Sequence[Dossier]) -> None:
        """Who never answered has withheld its evidence; unless most have, which is this validator's line."""
        answered = sum(dossier.evidence is not None for dossier in dossiers)
        for dossier in absent:
            if len(absent) > answered:
                dossier.broken = f"{len(absent)} miners did not answer and {answered} did: {dossier.absent}"
            else:
                self._withhold(facts, dossier, dossier.absent)

    def _dossier(self, facts: RoundFacts, hotkey: str, stage: int) -> Dossier:
        source = Source(
            dendrite=self._dendrite,
            endpoint=self._endpoint,
            run=self._loaded.run_id,
            number=facts.roster.round,
            hotkey=hotkey,
            plan=self._plans[stage],
            layout=self._layouts[stage],
            shapes=self._shapes,
            patience=self._patience,
            share=facts.stake_share,
        )
        return Dossier(hotkey, stage, source)

    async def guarded(self, dossier: Dossier, work: Awaitable[T]) -> T | None:
        """What comes of looking at one miner; None if that broke off, which must not end the audit of the others."""
        try:
            return await work
        except Spent as error:
            log.info("no more of %s is looked into: %s", dossier.hotkey, error)
        except Exception as error:
            dossier.broken = f"{type(error).__name__}: {error}"
            log.exception("the audit of %s broke off; it counts as not audited", dossier.hotkey)
        return None

    async def _miner(self, facts: RoundFacts, dossier: Dossier) -> None:
        record = facts.records.get(dossier.hotkey)
        if record is None or not record.fixes(facts.roster.round):
            log.warning("round %d: %s fixed no evidence on chain in time", facts.roster.round, dossier.hotkey)
            return
        dossier.absent = ""
        try:
            dossier.evidence = await dossier.source.tables(
                record, samples=self._loaded.manifest.samples(facts.roster.round)
            )
        except Absent as error:
            dossier.absent = str(error)
            dossier.source.ask_again()
            return
        except Withheld as error:
            self._withhold(facts, dossier, str(error))
            return
        except Unsound as error:
            self._prove(facts, dossier, Check.HEADS, str(error))
            return
        await self._examine(facts, dossier, dossier.evidence)
        await self._first_pass(facts, dossier, dossier.evidence)
        await self.go_on(facts, dossier)
        await self._steps(facts, dossier, dossier.evidence)
        await self.go_on(facts, dossier)

    # -- what the tables say --------------------------------------------------------------------------------------

    async def _examine(self, facts: RoundFacts, dossier: Dossier, evidence: Evidence) -> None:
        """All that needs no replay: the data, the chain of heads, what the miner signed, where its weights began."""
        if dossier.stage == 0:
            wrong = await asyncio.to_thread(other_data, evidence.leaves, self._corpus)
            if wrong:
                reason = f"{len(wrong)} samples were trained on other tokens than their own"
                self._prove(facts, dossier, Check.DATA, reason, sample=wrong[0])
        for broken in breaks(evidence.heads):
            reason = f"window {broken.version} {broken.reason}"
            self._prove(facts, dossier, Check.WEIGHTS, reason, version=broken.version)
            break  # one convicts
        statement = conflicting(evidence.heads, facts.statements.get(dossier.hotkey, ()))
        if statement is not None:
            self.contradicted(facts, dossier, statement)
        rules = self._loaded.manifest.audit
        chosen = pick_windows(evidence.heads, seeds=facts.seeds, hotkey=dossier.hotkey, count=rules.windows)
        dossier.picked = {head.version: seed for head, seed in sorted(chosen, key=lambda pick: pick[0].version)}
        dossier.source.limit(evidence, [head for head, _ in chosen])
        await self._begin(facts, dossier, evidence)

    def contradicted(self, facts: RoundFacts, dossier: Dossier, statement: Statement, *, accuser: str = "") -> None:
        reason = f"it signed another chain of {statement.count} windows than it closed"
        finding = self._finding(facts, dossier, Check.HEADS, Grade.PROOF, reason)
        self.note(dossier, Entry(finding, accuser, statement))

    async def _begin(self, facts: RoundFacts, dossier: Dossier, evidence: Evidence) -> None:
        """The first window's weights follow from public state, where that is known here."""
        if not evidence.heads:
            return
        head = evidence.heads[0]
        known = False
        for place, theta in enumerate(facts.start.weights(dossier.hotkey)):
            known = True
            if await asyncio.to_thread(root_of, theta) == head.weights:
                dossier.first = theta if head.version in dossier.picked else None
                dossier.moved = place > 0
                found = self._finding(facts, dossier, Check.WEIGHTS, Grade.PROOF, "", version=head.version)
                self.note(dossier, Entry(replace(found, passed=True, error=0.0)))
                return
        if known:
            reason = f"window {head.version}, the round's first, does not begin with the public weights"
            self._prove(facts, dossier, Check.WEIGHTS, reason, version=head.version)

    async def taken_over(
        self,
        facts: RoundFacts,
        dossier: Dossier,
        head: WindowHead,
        *,
        pieces: Sequence[int] | None = None,
        accuser: str = "",
    ) -> None:
        """Where a merge was taken over before a picked window: whether the weights that it begins with follow from
        those before and from public state, on some `pieces`, this validator's own if none are named."""
        heads = () if dossier.evidence is None else dossier.evidence.heads
        before = next((before for before, after in pairwise(heads) if after == head), None)
        if not head.merged or before is None or head.version in dossier.shut:
            return
        chosen = self._pieces(facts, dossier, head, "merge", 1) if pieces is None else pieces
        async with self._gate:
            states = await asyncio.to_thread(lambda: tuple(facts.start.weights(dossier.hotkey)))
            if not states:
                return
            start, target = states[-1 if dossier.moved else 0], states[-1]
            for piece in chosen:
                try:
                    follows = await moved(dossier.source, before, head, piece, start=start, target=target)
                except (Withheld, Spent) as error:
                    self._shut(facts, dossier, head, error)
                    return
                dossier.merges.add((head.version, piece))
                reason = "" if follows else f"window {head.version} does not begin with what its merge led to"
                found = self._finding(facts, dossier, Check.WEIGHTS, Grade.PROOF, reason, version=head.version)
                error_ = 0.0 if follows else math.inf
                self.note(dossier, Entry(replace(found, passed=follows, error=error_, piece=piece), accuser))

    # -- replays --------------------------------------------------------------------------------------------------

    async def _first_pass(self, facts: RoundFacts, dossier: Dossier, evidence: Evidence) -> None:
        """This validator's part of the audit budget, spread over the picked windows."""
        rules = self._loaded.manifest.audit
        units = budget(
            len(evidence.leaves),
            share=rules.share,
            stake_share=facts.stake_share,
            risk=self._risk(dossier.hotkey),
        )
        heads = self._read(facts, dossier, evidence)
        sizes = [sum(map(self.comparable(dossier), evidence.window(head.version))) for head in heads]
        for head, count in zip(heads, spread(units, sizes), strict=True):
            if count:
                await self.window(facts, dossier, head, self._choose(facts, dossier, head, count))

    def _read(self, facts: RoundFacts, dossier: Dossier, evidence: Evidence) -> list[WindowHead]:
        """The picked windows that this validator looks into before there is a suspicion."""
        share = self._loaded.manifest.audit.readers * facts.stake_share
        return [
            head
            for head in evidence.heads
            if head.version in dossier.picked
            and (
                (dossier.first is not None and head == evidence.heads[0])
                or reads_window(
                    head,
                    secret=facts.secret,
                    seed=dossier.picked[head.version],
                    hotkey=dossier.hotkey,
                    share=share,
                )
            )
        ]

    def comparable(self, dossier: Dossier) -> Callable[[Leaf], bool]:
        plan = self._plans[dossier.stage]
        return lambda leaf: comparable(plan, leaf)

    def draw(self, dossier: Dossier, head: WindowHead, *, secret: bytes, count: int) -> tuple[Leaf, ...]:
        """The first `count` units that a secret picks in a picked window."""
        assert dossier.evidence is not None  # noqa: S101 - it was picked from there
        return select_units(
            dossier.evidence,
            head,
            secret=secret,
            seed=dossier.picked[head.version],
            hotkey=dossier.hotkey,
            count=count,
            fits=self.comparable(dossier),
        )

    def _choose(self, facts: RoundFacts, dossier: Dossier, head: WindowHead, count: int) -> list[Leaf]:
        """The next `count` units of a window that were not replayed yet."""
        order = self.draw(dossier, head, secret=facts.secret, count=head.forward + head.backward)
        return [leaf for leaf in order if leaf.key not in dossier.replayed][:count]

    async def window(
        self, facts: RoundFacts, dossier: Dossier, head: WindowHead, leaves: Sequence[Leaf], *, accuser: str = ""
    ) -> None:
        """Replay units of one picked window."""
        if head.version in dossier.shut or not leaves:
            return
        async with self._gate:
            try:
                theta = await self._theta(facts, dossier, head)
                if theta is None:
                    return
                units = [(leaf, await dossier.source.unit(leaf)) for leaf in leaves]
            except (Withheld, Spent) as error:
                self._shut(facts, dossier, head, error)
                return
            found = await self._bench.compute(
                lambda: replay_units(
                    self._bench.stages[dossier.stage],
                    theta,
                    units,
                    self._corpus,
                    accumulation=self._loaded.manifest.optimizer.accumulation,
                    tolerance=self._tolerance(dossier.hotkey),
                    hotkey=dossier.hotkey,
                    number=facts.roster.round,
                )
            )
        dossier.replayed.update(leaf.key for leaf in leaves)
        forward = forward_flops(self._loaded.manifest, self._plans[dossier.stage])
        dossier.flops += sum(replay_flops(leaf, forward) for leaf in leaves)
        for finding in found:
            self.note(dossier, Entry(finding, accuser))

    # -- steps ----------------------------------------------------------------------------------------------------

    async def _steps(self, facts: RoundFacts, dossier: Dossier, evidence: Evidence) -> None:
        """How the windows that this validator reads began and ended. After the units: what a suspicion asks for of
        these comes first, where a reader's part is small."""
        for head in self._read(facts, dossier, evidence):
            await self.taken_over(facts, dossier, head)
            await self.step(facts, dossier, head, whole=self._whole(facts, dossier, head))
            await self.matrix(facts, dossier, head)

    def _whole(self, facts: RoundFacts, dossier: Dossier, head: WindowHead) -> bool:
        """Whether this validator replays the gradient of a window that it reads."""
        rules, seed = self._loaded.manifest.audit, dossier.picked[head.version]
        read = min(1.0, rules.readers * facts.stake_share)
        share = rules.steps * facts.stake_share * self._risk(dossier.hotkey) / read
        return replays_step(head, secret=facts.secret, seed=seed, hotkey=dossier.hotkey, share=share)

    async def step(
        self,
        facts: RoundFacts,
        dossier: Dossier,
        head: WindowHead,
        *,
        whole: bool,
        pieces: Sequence[int] | None = None,
        accuser: str = "",
    ) -> None:
        """Look at the step that closed a picked window: at some `pieces` of the state around it, this validator's own
        if none are named, and, if `whole`, at its gradient, by replaying all the units that gave it.

        Who ends a window as it began says that its gradient was not finite: that is always looked at.
        """
        if not head.backward or head.version in dossier.shut:
            return
        assert dossier.evidence is not None  # noqa: S101 - the head is from there
        backward = [leaf for leaf in dossier.evidence.window(head.version) if leaf.direction is Direction.BACKWARD]
        whole = (whole or head.idle) and head.version not in dossier.stepped
        chosen = self._pieces(facts, dossier, head, "step", PIECES if whole else 1) if pieces is None else pieces
        stage = self._bench.stages[dossier.stage]
        async with self._gate:
            try:
                theta = await self._theta(facts, dossier, head) if whole else None
                shown = [
                    await show(dossier.source, head, piece, stage=stage, config=self._optimizer)
                    for piece in ([] if head.idle else chosen)
                ]
                units = [(leaf, await dossier.source.unit(leaf)) for leaf in ([] if theta is None else backward)]
            except (Withheld, Spent) as error:
                self._shut(facts, dossier, head, error)
                return
            judge = self._judge(facts, dossier)
            found = await asyncio.to_thread(judge.arithmetic, head, shown)
            if theta is not None:
                weights = theta
                gradient = await self._bench.compute(lambda: judge.gradient(head, shown, units, weights, self._corpus))
                found.append(gradient)
        dossier.pieces.update((head.version, one.piece) for one in shown)
        if theta is not None:
            dossier.stepped.add(head.version)
            forward = forward_flops(self._loaded.manifest, self._plans[dossier.stage])
            dossier.flops += sum(replay_flops(leaf, forward) for leaf in backward)
        for finding in found:
            self.note(dossier, Entry(finding, accuser))

    async def matrix(self, facts: RoundFacts, dossier: Dossier, head: WindowHead, *, accuser: str = "") -> None:
        """Look at how the step that closed a picked window moved the matrix that its seed names, if Muon moves any."""
        layout, seed = self._layouts[dossier.stage], dossier.picked[head.version]
        look = select_look(layout, seed=seed, hotkey=dossier.hotkey, version=head.version)
        if look is None or not head.backward or head.idle or head.version in dossier.shut:
            return
        dossier.polar.add(head.version)
        async with self._gate:
            try:
                shown = await show_matrix(dossier.source, head, look, layout=layout)
            except (Withheld, Spent) as error:
                self._shut(facts, dossier, head, error)
                return
            judge = self._judge(facts, dossier)
            finding = await self._bench.compute(lambda: judge.polar(head, shown, look))
        self.note(dossier, Entry(finding, accuser))

    def _pieces(self, facts: RoundFacts, dossier: Dossier, head: WindowHead, what: str, count: int) -> tuple[int, ...]:
        return select_pieces(
            self.pool(dossier, head),
            secret=facts.secret,
            seed=dossier.picked[head.version],
            hotkey=dossier.hotkey,
            label=f"{what}/{head.version}",
            count=count,
        )

    def pool(self, dossier: Dossier, head: WindowHead) -> tuple[int, ...]:
        """The pieces of a picked window's weights that a miner must be able to show."""
        total, seed = pieces_of(4 * self._layouts[dossier.stage].values), dossier.picked[head.version]
        return select_pool(total, seed=seed, hotkey=dossier.hotkey, version=head.version)

    def _judge(self, facts: RoundFacts, dossier: Dossier) -> StepJudge:
        return StepJudge(
            hotkey=dossier.hotkey,
            number=facts.roster.round,
            stage=self._bench.stages[dossier.stage],
            config=self._optimizer,
            clip=clip_bound(self._optimizer, self._layouts[dossier.stage].values, self._total),
            accumulation=self._loaded.manifest.optimizer.accumulation,
            tolerance=self._tolerance(dossier.hotkey)(Check.GRADIENT),
        )

    async def _theta(self, facts: RoundFacts, dossier: Dossier, head: WindowHead) -> torch.Tensor | None:
        """A picked window's weights, fp32 (n,); None if the public state they differ from is not known here.

        Raises `Withheld`.
        """
        if dossier.first is not None and dossier.evidence is not None and head == dossier.evidence.heads[0]:
            return dossier.first
        base = facts.start.public.get(dossier.stage)
        if base is None:
            log.warning("round %d: the state of stage %d is not known here", facts.roster.round, dossier.stage)
            return None
        if head.version in dossier.deltas:
            return await asyncio.to_thread(open_delta, dossier.deltas[head.version], base, head.weights)
        delta, theta = await dossier.source.weights(head, base, held=facts.roster.round)
        if self._kept + len(delta) <= MEMORY:
            self._kept += len(delta)
            dossier.deltas[head.version] = delta
        return theta

    async def go_on(self, facts: RoundFacts, dossier: Dossier) -> None:
        """Look into more of the picked windows while the sequential test asks for it: matrices where one failed, whole
        steps where the gradient of one did, then units."""
        while self._held(dossier.hotkey).goes_on(self._rule()):
            matrix = self._next(dossier, Check.POLAR, dossier.polar)
            if matrix is not None:
                await self.matrix(facts, dossier, matrix)
                continue
            step = self._next(dossier, Check.GRADIENT, dossier.stepped)
            if step is not None:
                await self.step(facts, dossier, step, whole=True)
                if step.version not in dossier.stepped | dossier.shut:
                    return
                continue
            left = {
                head.version: head
                for version in dossier.picked
                if (head := dossier.head(version)) is not None
                and version not in dossier.shut
                and self._choose(facts, dossier, head, 1)
            }
            if not left:
                return
            head = left[self._held(dossier.hotkey).next_window(list(left))]
            before = len(dossier.replayed)
            await self.window(facts, dossier, head, self._choose(facts, dossier, head, BATCH))
            if len(dossier.replayed) == before:
                return

    def _next(self, dossier: Dossier, check: Check, done: set[int]) -> WindowHead | None:
        """Of the picked windows, the next one that a check was not `done` in, if it failed in another one."""
        if not any(one.check is check and not one.passed for one in dossier.findings):
            return None
        open_ = dossier.picked.keys() - done - dossier.shut
        heads = () if dossier.evidence is None else dossier.evidence.heads
        return next((head for head in heads if head.version in open_ and head.backward), None)

    # -- findings -------------------------------------------------------------------------------------------------

    def note(self, dossier: Dossier, entry: Entry) -> None:
        dossier.entries.append(entry)
        self._enter(entry)

    def _prove(
        self,
        facts: RoundFacts,
        dossier: Dossier,
        check: Check,
        reason: str,
        *,
        version: int | None = None,
        sample: int | None = None,
    ) -> None:
        finding = self._finding(facts, dossier, check, Grade.PROOF, reason, version=version, sample=sample)
        self.note(dossier, Entry(finding))

    def _shut(self, facts: RoundFacts, dossier: Dossier, head: WindowHead, error: Withheld | Spent) -> None:
        """No more is asked of a window: something of it was withheld, which counts once, or this reader's part is
        used up, which is nobody's fault."""
        dossier.shut.add(head.version)
        if isinstance(error, Withheld):
            self._withhold(facts, dossier, str(error), version=head.version)
        else:
            log.info("no more of %s is looked into: %s", dossier.hotkey, error)

    def _withhold(self, facts: RoundFacts, dossier: Dossier, reason: str, *, version: int | None = None) -> None:
        finding = self._finding(facts, dossier, Check.WITHHELD, Grade.WITHHELD, reason, version=version)
        self.note(dossier, Entry(finding))

    def _finding(
        self,
        facts: RoundFacts,
        dossier: Dossier,
        check: Check,
        grade: Grade,
        reason: str,
        *,
        version: int | None = None,
        sample: int | None = None,
    ) -> Finding:
        return Finding(
            hotkey=dossier.hotkey,
            round=facts.roster.round,
            stage=dossier.stage,
            check=check,
            grade=grade,
            passed=False,
            error=math.inf,
            version=version,
            sample=sample,
            reason=reason,
        )
