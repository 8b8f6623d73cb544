"""Reports of a round between validators: serving one's own, reading the others'.

A report is believed in nothing but its signature. What it says failed is replayed here (`neurons.auditing`), and only
what fails here too counts, so a validator that lies costs the others a few replays and gains nothing. Who accuses and
is not confirmed is not listened to for the rest of the round.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from neurons.adopting import Adopter
from neurons.dossier import Dossier, RoundFacts
from neurons.node import Node
from neurons.telemetry import ReportPublished, ReportRead
from neurons.wire import byte_tensor
from subnet.identity import verify
from subnet.messages import REPORT_LIMIT, ReportReply, ReportRequest
from subnet.swarm.observers import Observer
from subnet.transport.axon import Reply
from subnet.transport.dendrite import NO_SPECS, Dendrite
from subnet.transport.errors import Busy, Dropped, Refused, TransportError, Unavailable, UnknownRun, Unreachable
from subnet.transport.synapse import HEADER_LIMIT, tensor_bytes
from subnet.trust.finding import UNIT_CHECKS, Check, Grade
from subnet.trust.ledger import Direction
from subnet.trust.report import (
    FINDINGS_LIMIT,
    FindingModel,
    MinerReport,
    Report,
    ReportError,
    report_message,
)

log = logging.getLogger("orion.neurons.reports")

KEPT = 3
"""Reports of so many rounds are served."""
PATIENCE = 20.0
"""Seconds that another validator may take to have its report ready once it is due."""
CALL_DEADLINE = 10.0
PAUSE = 0.5
FALSE_ACCUSATIONS = 3
"""Accused miners on whom nothing failed here, after which a validator is not listened to for the rest of the round."""


class ReportDesk:
    """Serves this validator's reports to whoever may ask."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._kept: dict[int, tuple[bytes, bytes]] = {}

    def open(self) -> None:
        """Put its route on the axon."""
        self._node.axon.serve(ReportRequest, self.report, specs=NO_SPECS)

    def publish(self, report: Report) -> None:
        """Serve a report from now on; the oldest is forgotten."""
        data = report.to_bytes()
        self._kept[report.round] = (data, self._node.identity.sign(report_message(data)))
        for old in sorted(self._kept)[:-KEPT]:
            del self._kept[old]
        self._node.telemetry.emit(ReportPublished(round=report.round, findings=len(report.findings), bytes=len(data)))

    async def report(self, _caller: str, request: ReportRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        if request.run != self._node.loaded.run_id.hex():
            raise UnknownRun(f"run {request.run} is not audited here", "ask who watches that run")
        kept = self._kept.get(request.round)
        if kept is None and request.round < max(self._kept, default=0):
            raise Dropped(f"the report of round {request.round} is not kept here", "ask sooner")
        if kept is None:
            raise Unavailable(f"round {request.round} is not audited yet", "ask again", retry_after=PAUSE)
        data, signature = kept
        return ReportReply(size=len(data), signature=signature.hex()), {"report": byte_tensor(data).view(1, -1)}


def write_report(node: Node, facts: RoundFacts, dossiers: Mapping[str, Dossier], late: list[FindingModel]) -> Report:
    """The report of a round. `late` are failed findings of the round before that came after its own report."""
    failed = [
        FindingModel.of(entry.finding, entry.statement)
        for dossier in dossiers.values()
        for entry in dossier.entries
        if not entry.finding.passed and not entry.accuser and entry.finding.grade is not Grade.WITHHELD
    ]
    return Report(
        run=node.loaded.run_id.hex(),
        round=facts.roster.round,
        validator=node.identity.hotkey,
        secret=facts.secret.hex(),
        miners=[
            MinerReport.of(
                dossier.hotkey,
                [entry.finding for entry in dossier.entries if not entry.accuser],
                windows=list(dossier.picked),
                flops=dossier.flops,
                received=dossier.source.received,
            )
            for dossier in dossiers.values()
            if dossier.evidence is not None
        ],
        findings=(failed + late)[:FINDINGS_LIMIT],
    )


@dataclass(frozen=True, slots=True)
class ReportReader:
    """Reads other validators' reports of a round and replays what they say failed."""

    node: Node
    adopter: Adopter
    patience: float = PATIENCE

    async def read_all(
        self, facts: RoundFacts, dossiers: Mapping[str, Dossier], others: Mapping[str, Observer]
    ) -> None:
        """Every other validator's at once; replays of one miner follow each other."""
        await asyncio.gather(
            *(
                self._read(facts, dossiers, observer)
                for hotkey, observer in others.items()
                if hotkey != self.node.identity.hotkey
            )
        )

    async def _read(self, facts: RoundFacts, dossiers: Mapping[str, Dossier], observer: Observer) -> None:
        node, number = self.node, facts.roster.round
        report, refused = None, ""
        try:
            report = await fetch_report(
                node.dendrite,
                node.neighbours.endpoint,
                observer.hotkey,
                run=node.loaded.run_id,
                number=number,
                patience=self.patience,
            )
            refused = reason_to_refuse(report, self.node.loaded.run_id, number, observer)
        except (TransportError, ReportError) as error:
            refused = str(error)
        replayed = reproduced = strays = 0
        if report is not None and not refused:
            strays = self._strays(dossiers, report)
            replayed, reproduced = await self._replay(facts, dossiers, report)
        elif refused:
            log.warning("round %d: no report from %s: %s", number, observer.hotkey, refused)
        if strays:
            log.warning("round %d: %s reports %d units that its secret does not pick", number, observer.hotkey, strays)
        self.node.telemetry.emit(
            ReportRead(
                round=number,
                validator=observer.hotkey,
                findings=len(report.findings) if report is not None else 0,
                replayed=replayed,
                reproduced=reproduced,
                strays=strays,
                refused=refused,
            )
        )

    async def _replay(self, facts: RoundFacts, dossiers: Mapping[str, Dossier], report: Report) -> tuple[int, int]:
        """(units, pieces and gradients looked at, failures) because of a report."""
        replayed = reproduced = unconfirmed = 0
        for hotkey, models in report.by_miner().items():
            dossier = dossiers.get(hotkey)
            if dossier is None or dossier.broken or unconfirmed == FALSE_ACCUSATIONS:
                continue
            async with dossier.lock:
                before = dossier.looks
                work = self.adopter.reproduce(facts, dossier, models, accuser=report.validator)
                failed = await self.adopter.auditor.guarded(dossier, work) or 0
                tried = dossier.looks - before
            replayed, reproduced = replayed + tried, reproduced + failed
            unconfirmed += bool(tried) and not failed
        return replayed, reproduced

    def _strays(self, dossiers: Mapping[str, Dossier], report: Report) -> int:
        """Failed units that the revealed secret does not pick, given how many the validator says it replayed."""
        secret, strays = bytes.fromhex(report.secret), 0
        counts = {miner.hotkey: sum(miner.checks.get(check, 0) for check in UNIT_CHECKS) for miner in report.miners}
        for model in report.findings:
            dossier = dossiers.get(model.hotkey)
            if model.check not in UNIT_CHECKS or dossier is None or dossier.evidence is None:
                continue
            head = None if model.version is None else dossier.head(model.version)
            if head is None or head.version not in dossier.picked:
                strays += 1
                continue
            drawn = self.adopter.auditor.draw(dossier, head, secret=secret, count=counts.get(model.hotkey, 0))
            direction = Direction.FORWARD if model.check is Check.FORWARD else Direction.BACKWARD
            strays += (model.sample, direction) not in {(leaf.sample, leaf.direction) for leaf in drawn}
        return strays


async def fetch_report(
    dendrite: Dendrite,
    endpoint_of: Callable[[str], str | None],
    hotkey: str,
    *,
    run: bytes,
    number: int,
    patience: float = PATIENCE,
) -> Report:
    """A validator's signed report of a round, waited for while it says that it is not ready.

    Raises `TransportError` and `ReportError`.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + patience
    while True:
        try:
            endpoint = endpoint_of(hotkey)
            if endpoint is None:
                raise Unreachable(f"{hotkey} serves no axon")
            reply, tensors = await dendrite.call(
                endpoint,
                hotkey,
                ReportRequest(run=run.hex(), round=number),
                reply=ReportReply,
                reply_specs=lambda fields: fields.specs(),
                max_reply_bytes=HEADER_LIMIT + REPORT_LIMIT,
                deadline=CALL_DEADLINE,
            )
        except (Busy, Unavailable, Unreachable) as error:
            pause = (error.retry_after if isinstance(error, Refused) else None) or PAUSE
            if loop.time() + pause >= until:
                raise
            await asyncio.sleep(pause)
            continue
        data = bytes(tensor_bytes(tensors["report"]))
        if not verify(hotkey, report_message(data), bytes.fromhex(reply.signature)):
            raise ReportError("it is not signed by whom it was asked of")
        return await asyncio.to_thread(Report.parse, data)


def reason_to_refuse(report: Report, run: bytes, number: int, observer: Observer) -> str:
    """Why a report of a round is not looked at; empty if it is what its author owes."""
    if (report.run, report.round, report.validator) != (run.hex(), number, observer.hotkey):
        return f"it is of run {report.run}, round {report.round} and {report.validator}"
    commitment = observer.committed(number)
    if commitment is None:
        return "it had committed to no secret before the round"
    return "" if report.opens(commitment) else "its secret is not the one it committed to"
