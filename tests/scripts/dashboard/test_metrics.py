"""What Prometheus is told is what the page shows, under names that stay."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from scripts.dashboard.metrics import CONTENT_TYPE
from tests.scripts.dashboard.conftest import Served

NAMES = {
    "orion_audited_units",
    "orion_churn",
    "orion_cost_dollars",
    "orion_flops_per_second",
    "orion_gradients_lost",
    "orion_loss",
    "orion_microbatches",
    "orion_mfu",
    "orion_microbatches_in_flight",
    "orion_miner_hours",
    "orion_miner_score",
    "orion_miner_state",
    "orion_miner_steps",
    "orion_miner_units",
    "orion_miner_weight",
    "orion_miners_convicted",
    "orion_round",
    "orion_seconds_left",
    "orion_sent_bytes",
    "orion_tokens",
    "orion_tokens_per_second",
    "orion_validation_loss",
    "orion_validator_units",
    "orion_weights_set",
}
"""A name that goes away breaks somebody's alarms."""


async def test_metrics_are_the_page_s_figures(recorded: Path, served: Served) -> None:
    async with served(recorded) as address, aiohttp.ClientSession(address) as session:
        async with session.get("/metrics") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == CONTENT_TYPE
            families = {family.name: family for family in text_string_to_metric_families(await answer.text())}
        async with session.get("/state") as answer:
            state = json.loads(await answer.text())
    assert set(families) == NAMES
    assert all(family.documentation for family in families.values())
    samples = {(one.name, *one.labels.values()): one.value for family in families.values() for one in family.samples}
    totals = state["totals"]
    assert samples["orion_loss",] == totals["loss"]
    assert samples["orion_microbatches_total", "completed"] == totals["microbatches"] == 20
    assert samples["orion_audited_units_total", "failed"] == totals["audits_failed"] == 1
    assert samples["orion_sent_bytes_total", "merge"] == totals["merge_bytes"]
    assert samples["orion_round",] == state["run"]["round"]
    for stage in state["grid"]["stages"]:
        for miner in stage["miners"]:
            where = (miner["name"], str(stage["index"]))
            assert samples["orion_miner_units_total", *where] == miner["units"]
            assert samples["orion_miner_state", *where, miner["state"]] == 1
