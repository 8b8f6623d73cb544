"""The state as Prometheus reads it (text format 0.0.4): names and labels are kept from one version to the next.

Counters count over the whole run, however often nodes were started again. Labels name nodes as their event logs do.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scripts.dashboard.state import Grid, Miner, State, Totals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(state: State) -> bytes:
    """All families that have a value."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(state))
    text: bytes = generate_latest(registry)
    return text


class _Once(Collector):
    """Of one state."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        yield _gauge("orion_round", "The newest round that has begun, -1 before the first.", state.run.round)
        yield from _training(state.totals)
        yield from _trust(state.totals)
        yield from _nodes(state.grid)


def _training(totals: Totals) -> Iterator[Metric]:
    yield _gauge("orion_loss", "Mean loss of the latest microbatches, nats per token.", totals.loss)
    yield _gauge("orion_validation_loss", "Validation loss, nats per token.", totals.validation)
    yield _gauge("orion_tokens_per_second", "Over the whole run.", totals.tokens_per_second)
    yield _gauge("orion_flops_per_second", "Useful, of the whole swarm (docs/dashboard.md).", totals.flops_per_second)
    yield _gauge("orion_mfu", "Model FLOPs utilisation of the card named, 0 to 1.", totals.mfu)
    yield _gauge("orion_miner_hours", "That miners have run.", totals.miner_hours)
    yield _gauge("orion_cost_dollars", "For these hours, at the price named.", totals.dollars)
    yield _gauge("orion_seconds_left", "To the target, or to the last round.", totals.seconds_left)
    yield _counter("orion_tokens", "Tokens of microbatches that came back to their head.", totals.tokens)
    done = {
        "completed": totals.microbatches,
        "lost": totals.lost,
        "rerouted": totals.rerouted,
        "adopted": totals.adopted,
    }
    yield _labelled("orion_microbatches", "Microbatches by what became of them.", "outcome", done)
    yield _gauge("orion_microbatches_in_flight", "On their way now.", totals.in_flight)
    yield _counter("orion_gradients_lost", "Units whose gradient died with a replica.", totals.gradients_lost)
    sent = {"forward": totals.forward_bytes, "backward": totals.backward_bytes, "merge": totals.merge_bytes}
    yield _labelled("orion_sent_bytes", "Bytes that miners sent, by purpose.", "purpose", sent)


def _trust(totals: Totals) -> Iterator[Metric]:
    audited = {"passed": totals.audits_passed, "failed": totals.audits_failed}
    yield _labelled("orion_audited_units", "Units that validators replayed.", "outcome", audited)
    yield _gauge("orion_miners_convicted", "Miners that some validator counts nothing for now.", totals.convicted)
    yield _counter("orion_weights_set", "Times that validators set weights.", totals.weights_set)
    churn = {
        name: getattr(totals, name)
        for name in ("joined", "left", "benched", "killed", "frozen", "restarted", "resumed")
    }
    yield _labelled("orion_churn", "Comings and goings.", "what", churn)


def _nodes(grid: Grid) -> Iterator[Metric]:
    miners = [miner for stage in grid.stages for miner in stage.miners] + grid.away
    labels = ["miner", "stage"]
    units = CounterMetricFamily("orion_miner_units", "Units computed.", labels=labels)
    steps = CounterMetricFamily("orion_miner_steps", "Local steps.", labels=labels)
    weight = GaugeMetricFamily("orion_miner_weight", "Mean weight on chain, 0 to 1.", labels=labels)
    score = GaugeMetricFamily("orion_miner_score", "Score of the latest scored round.", labels=labels)
    state = GaugeMetricFamily("orion_miner_state", "1 for the state it is in.", labels=[*labels, "state"])
    for miner in miners:
        where = _where(miner)
        units.add_metric(where, miner.units)
        steps.add_metric(where, miner.steps)
        state.add_metric([*where, miner.state], 1)
        for family, value in ((weight, miner.weight), (score, miner.score)):
            if value is not None:
                family.add_metric(where, value)
    yield from (units, steps, weight, score, state)
    replayed = CounterMetricFamily("orion_validator_units", "Units replayed.", labels=["validator"])
    for validator in grid.validators:
        replayed.add_metric([validator.name], validator.units)
    yield replayed


def _where(miner: Miner) -> list[str]:
    return [miner.name, "" if miner.stage is None else str(miner.stage)]


def _gauge(name: str, text: str, value: float | None) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float | None) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for what, value in values.items():
        family.add_metric([what], value)
    return family
