"""`summary.json`: what a run came to, from its tally. Documented in docs/summary.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from scripts.adversaries import outcome
from scripts.tally import MinerTally, Span, Tally

ENDS = 8
"""So many microbatches are the first, and the last, of a run."""


def summary(
    tally: Tally,
    *,
    model: str,
    parameters: int,
    stages: int,
    replicas: int,
    rounds: int,
    started_at: float,
    wall_seconds: float,
    chain: dict[str, object],
    complete: bool,
    torn: int,
) -> dict[str, object]:
    """The content of `summary.json`: stable, later versions only add fields."""
    rounds_validated = sorted(tally.validation)
    return {
        "complete": complete,
        "model": model,
        "parameters": parameters,
        "stages": stages,
        "replicas": replicas,
        "rounds": rounds,
        "tokens": tally.tokens,
        "tokens_per_second": round(tally.tokens_per_second, 1),
        "seconds_to_first_step": None if tally.first_step is None else round(tally.first_step - started_at, 2),
        "wall_seconds": round(wall_seconds, 2),
        "seconds_dead": round(tally.still + tally.pause, 2),
        "loss": {
            "first": _mean(tally.losses[:ENDS]),
            "last": _mean(tally.losses[-ENDS:]),
            "validation_first": tally.validation[rounds_validated[0]] if rounds_validated else None,
            "validation_last": tally.validation[rounds_validated[-1]] if rounds_validated else None,
        },
        "microbatches": {
            "started": tally.started,
            "completed": tally.completed,
            "rerouted": tally.rerouted,
            "adopted": tally.adopted,
            "lost": tally.started - tally.completed,
            "gradients_lost": tally.gradients_lost,
        },
        "by_round": [
            {
                "round": number,
                "started": len(one.started) if one else 0,
                "completed": len(one.done) if one else 0,
                "lost": len(one.in_flight) if one else 0,
                "loss": round(one.loss / len(one.done), 4) if one and one.done else None,
                "validation": tally.validation.get(number),
            }
            for number in sorted({*tally.rounds, *tally.validation})
            for one in [tally.rounds.get(number)]
        ],
        "churn": asdict(tally.churn),
        "recovery": _recovery(tally),
        "merge_hidden": _hidden(tally.miners.values()),
        "merge_faults": [asdict(fault) for fault in tally.merge_faults],
        "bytes": {
            "forward": sum(miner.traffic.forward for miner in tally.miners.values()),
            "backward": sum(miner.traffic.backward for miner in tally.miners.values()),
            "merge": sum(miner.traffic.merge for miner in tally.miners.values()),
        },
        "chain": {**chain, "weights_set": tally.weights_set},
        "audits": {
            "units": tally.audits_passed + tally.audits_failed,
            "passed": tally.audits_passed,
            "failed": tally.audits_failed,
            "flops_share": _rounded(tally.audit_flops_share, 5),
            "bytes_share": _rounded(tally.audit_bytes_share, 5),
            "convictions": [asdict(conviction) for conviction in tally.convictions],
        },
        "adversaries": outcome(tally),
        "records": {
            "published": tally.records,
            "epoch_space_used": tally.record_space.epoch_used,
            "epoch_space_limit": tally.record_space.epoch_limit,
        },
        "replicas_identical": all(len(digests) == 1 for digests in tally.merges.values()) if tally.merges else None,
        "miners": [
            _miner(tally, miner)
            for miner in sorted(tally.miners.values(), key=lambda miner: (miner.stage or 0, miner.hotkey))
        ],
        "failures": tally.failures,
        "torn_lines": torn,
    }


def _miner(tally: Tally, miner: MinerTally) -> dict[str, object]:
    scored = tally.scores.get(miner.hotkey)
    return {
        "uid": scored.uid if scored else None,
        "hotkey": miner.hotkey,
        "stage": miner.stage,
        "units": miner.units,
        "score": scored.score if scored else 0.0,
        "weight": scored.weight if scored else 0.0,
        "name": miner.name,
        "state": miner.state,
        "starts": miner.starts,
        "merges": len(miner.merging),
        "merge_seconds": _mean([span.end - span.begin for span in miner.merging]),
        "merge_bytes": miner.merge_bytes,
        "merge_carried": miner.carried,
        "downloaded_bytes": sum(download.bytes for download in miner.downloads),
        "downloaded_round": miner.downloads[-1].held if miner.downloads else None,
        "active_round": miner.active_round,
    }


def _recovery(tally: Tally) -> dict[str, object]:
    back = [recovery for recovery in tally.recoveries if recovery.last is not None]
    return {
        "seconds": _greatest(recovery.last for recovery in back),
        "longest_gap": _greatest(recovery.longest_gap for recovery in back),
        "faults": [
            {
                "node": recovery.node,
                "round": recovery.round,
                "in_flight": recovery.in_flight,
                "first": _rounded(recovery.first),
                "last": _rounded(recovery.last),
                "longest_gap": _rounded(recovery.longest_gap),
            }
            for recovery in tally.recoveries
        ],
    }


def _hidden(miners: Iterable[MinerTally]) -> float | None:
    """Share of the time of all merges in which the miner that merged was training.

    A merge after which its miner trained no further round has nothing to hide behind, and does not count.
    """
    whole = hidden = 0.0
    for miner in miners:
        for merge in miner.merging:
            if any(training.round > merge.round for training in miner.training):
                whole += merge.end - merge.begin
                hidden += sum(_common(merge, training) for training in miner.training)
    return round(min(1.0, hidden / whole), 4) if whole > 0 else None


def _common(a: Span, b: Span) -> float:
    return max(0.0, min(a.end, b.end) - max(a.begin, b.begin))


def _greatest(values: Iterable[float | None]) -> float | None:
    return _rounded(max((value for value in values if value is not None), default=None))


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def write_summary(path: Path, content: dict[str, object]) -> None:
    """Write `summary.json` whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
