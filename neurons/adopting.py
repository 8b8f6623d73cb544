"""What other validators say failed, replayed here, as far as it says something new.

What the tables show was looked at already. Data comes from the miner: one that shows it to its accuser and not here
withholds it here, which counts the same. Only what fails here too is entered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import replace

from neurons.auditing import Auditor
from neurons.dossier import Dossier, Entry, RoundFacts
from subnet.identity import verify
from subnet.trust.finding import UNIT_CHECKS, Check, Grade
from subnet.trust.heads import Statement, conflicting, statement_message
from subnet.trust.ledger import Direction, Leaf
from subnet.trust.report import FindingModel

UNITS_OF_A_REPORT = 8
"""Units of one miner that are replayed because one other validator says they failed."""
STEPS_OF_A_REPORT = 2
"""Steps of one miner that are looked at because one other validator says they failed: a verdict takes two windows."""
SHARDS_OF_A_REPORT = 2
"""Merged shards that are computed again because one other validator says a miner lied about them."""

Recheck = Callable[[int, int, int], Awaitable[Collection[str]]]
"""(round, stage, shard) to the holders that published another digest of it than the recomputed one."""


class Adopter:
    """Reproduces other validators' findings of one round."""

    def __init__(self, auditor: Auditor, *, run: bytes, recheck: Recheck) -> None:
        self.auditor = auditor
        self._run = run
        self._recheck = recheck

    async def reproduce(
        self, facts: RoundFacts, dossier: Dossier, models: Iterable[FindingModel], *, accuser: str
    ) -> int:
        """Replay what `accuser` says failed at one miner; how many findings failed here too."""
        before = _failures(dossier)
        claims = list(models)
        await self._shards(dossier, claims, accuser)
        now = [model for model in claims if model.round == facts.roster.round]
        self._statements(facts, dossier, now, accuser)
        await self._units(facts, dossier, now, accuser)
        await self._steps(facts, dossier, now, accuser)
        return _failures(dossier) - before

    async def _units(self, facts: RoundFacts, dossier: Dossier, claims: Iterable[FindingModel], accuser: str) -> None:
        leaves: list[Leaf] = []
        for model in claims:
            leaf = self._named(dossier, model) if model.check in UNIT_CHECKS else None
            if leaf is not None and leaf not in leaves:
                leaves.append(leaf)
        for leaf in leaves[:UNITS_OF_A_REPORT]:
            head = dossier.head(leaf.version)
            if head is not None:
                await self.auditor.window(facts, dossier, head, [leaf], accuser=accuser)
        if leaves:
            await self.auditor.go_on(facts, dossier)

    async def _steps(self, facts: RoundFacts, dossier: Dossier, claims: Iterable[FindingModel], accuser: str) -> None:
        """Look at steps, matrices and merges that were taken over where the accuser did, and replay whole gradients
        where it says that they failed."""
        tried = 0
        for model in claims:
            head = None if model.version is None else dossier.head(model.version)
            if head is None or head.version not in dossier.picked or tried == STEPS_OF_A_REPORT:
                continue
            pieces = [] if model.piece is None else [model.piece]
            if model.check is not Check.POLAR and not set(pieces) <= set(self.auditor.pool(dossier, head)):
                continue
            places = {(head.version, piece) for piece in pieces}
            if model.check is Check.GRADIENT and head.version not in dossier.stepped:
                await self.auditor.step(facts, dossier, head, whole=True, pieces=pieces, accuser=accuser)
            elif model.check is Check.STEP and places - dossier.pieces:
                await self.auditor.step(facts, dossier, head, whole=False, pieces=pieces, accuser=accuser)
            elif model.check is Check.POLAR and head.version not in dossier.polar:
                await self.auditor.matrix(facts, dossier, head, accuser=accuser)
            elif model.check is Check.WEIGHTS and places - dossier.merges:
                await self.auditor.taken_over(facts, dossier, head, pieces=pieces, accuser=accuser)
            else:
                continue
            tried += 1
        if tried:
            await self.auditor.go_on(facts, dossier)

    def _named(self, dossier: Dossier, model: FindingModel) -> Leaf | None:
        """The unit that a finding is about, if it is in a picked window and was not replayed here yet."""
        if dossier.evidence is None or model.version not in dossier.picked:
            return None
        direction = Direction.FORWARD if model.check is Check.FORWARD else Direction.BACKWARD
        return next(
            (
                leaf
                for leaf in dossier.evidence.window(model.version)
                if (leaf.sample, leaf.direction) == (model.sample, direction)
                and leaf.key not in dossier.replayed
                and self.auditor.comparable(dossier)(leaf)
            ),
            None,
        )

    def _statements(self, facts: RoundFacts, dossier: Dossier, claims: Iterable[FindingModel], accuser: str) -> None:
        """What the accuser says that the miner signed is believed by the signature alone; one is enough."""
        if dossier.evidence is None or any(entry.statement is not None for entry in dossier.entries):
            return
        for model in claims:
            if model.check is not Check.HEADS or model.statement is None:
                continue
            statement = model.statement.statement()
            if self._signed(facts, dossier, statement) and conflicting(dossier.evidence.heads, [statement]) is not None:
                self.auditor.contradicted(facts, dossier, statement, accuser=accuser)
                return

    def _signed(self, facts: RoundFacts, dossier: Dossier, statement: Statement) -> bool:
        message = statement_message(
            self._run, facts.roster.round, hotkey=dossier.hotkey, count=statement.count, digest=statement.digest
        )
        return verify(dossier.hotkey, message, statement.signature)

    async def _shards(self, dossier: Dossier, claims: Iterable[FindingModel], accuser: str) -> None:
        """Compute merged shards again; one lie is enough."""
        tried = 0
        for model in claims:
            known = any(entry.finding.check is Check.SHARD for entry in dossier.entries)
            if known or tried == SHARDS_OF_A_REPORT:
                return
            if model.check is not Check.SHARD or model.piece is None:
                continue
            tried += 1
            if dossier.hotkey in await self._recheck(model.round, dossier.stage, model.piece):
                reason = f"it published another digest of shard {model.piece} than the recomputed one"
                finding = replace(model.finding(), stage=dossier.stage, grade=Grade.PROOF, reason=reason)
                self.auditor.note(dossier, Entry(finding, accuser))


def _failures(dossier: Dossier) -> int:
    return sum(not entry.finding.passed for entry in dossier.entries)
