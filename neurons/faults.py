"""What watching a round's merge found wrong, as findings of its audit."""

from __future__ import annotations

import math
from collections.abc import Iterable

from neurons.dossier import Entry
from neurons.follower import Fault
from subnet.trust.finding import Check, Finding, Grade


def of_merge(faults: Iterable[Fault], number: int) -> list[Entry]:
    """What watching a round's merge found wrong, as findings.

    A digest that is not the recomputed one and a payload that is no valid content are on chain, so they are proofs;
    bytes that do not hash to what they should are seen by who asked alone.
    """
    entries = []
    for fault in faults:
        check, grade = _FAULTS[fault.kind]
        finding = Finding(
            hotkey=fault.hotkey,
            round=number,
            stage=fault.stage,
            check=check,
            grade=grade,
            passed=False,
            error=math.inf,
            piece=fault.shards[0] if fault.shards else None,
            reason=fault.reason,
        )
        entries.append(Entry(finding))
    return entries


_FAULTS = {
    "refused": (Check.PAYLOAD, Grade.PROOF),
    "forged": (Check.WITHHELD, Grade.WITHHELD),
    "liar": (Check.SHARD, Grade.PROOF),
}
