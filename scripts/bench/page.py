"""How fast the dashboard's page is there, in a browser on this machine: bytes, requests, paints, the first state.

The run shown is made up: 16 stages of 3 replicas and 4 validators, five rounds of 240 microbatches. Each of three
loads has a browser with an empty cache. Times are of this machine and its load; the others are of the page.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from neurons.telemetry import (
    Event,
    LocalStep,
    Merged,
    MicrobatchDone,
    MicrobatchStarted,
    NodeStarted,
    RoundStarted,
    Telemetry,
    TrainingClosed,
    Validated,
    WeightsSet,
)
from scripts.bench.browser import BrowserError, chromium
from scripts.bench.report import report
from scripts.dashboard.command import HOST, serve

STAGES, REPLICAS, VALIDATORS = 16, 3, 4
ROUNDS, MICROBATCHES = 5, 240
LOADS = 3
BEGIN = 1_000_000.0
FIGURES = """(() => {
  const paint = (name) => performance.getEntriesByName(name)[0]?.startTime ?? null;
  return {
    first_paint_ms: paint('first-paint'),
    first_contentful_paint_ms: paint('first-contentful-paint'),
    dom_content_loaded_ms: performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd,
    first_state_ms: performance.getEntriesByName('first-state')[0]?.startTime ?? null,
    dom_nodes: document.getElementsByTagName('*').length,
  };
})()"""
MARK = """new MutationObserver((_changes, watch) => {
  if (document.body?.dataset.shown) { performance.mark('first-state'); watch.disconnect(); }
}).observe(document, { subtree: true, childList: true, attributes: true });"""
"""Runs before the page's own scripts."""


def story() -> Iterator[tuple[float, str, Event]]:
    """(seconds, node, event), node by node."""
    for index in range(STAGES * REPLICAS):
        name, stage = f"miner-{index}", index % STAGES
        yield 0.0, name, NodeStarted(f"5{name}", "miner", "http://127.0.0.1:1")
        for number in range(ROUNDS):
            begin = 60.0 * number
            yield begin, name, RoundStarted(number, 10 * number, stage, [REPLICAS] * STAGES, "aa")
            for one in range(MICROBATCHES // REPLICAS if stage == 0 else 0):
                sample, time = index // STAGES + REPLICAS * one, begin + one / 2
                yield time, name, MicrobatchStarted(number, sample)
                yield time + 0.4, name, MicrobatchDone(number, sample, 7.0 - number / 2 - one / 200, 0.4, 4)
            yield begin + 41, name, LocalStep(number, stage, number + 1, 80, 0.5, 1e-3, finite=True)
            yield begin + 42, name, TrainingClosed(number, stage, 80, 80, 0, 0, 0, 0, 160, 30.0)
            yield begin + 55, name, Merged(number, stage, 3, True, False, f"w{stage}", 9.0, 0, 10**6)
    for index in range(VALIDATORS):
        name = f"validator-{index}"
        yield 0.0, name, NodeStarted(f"5{name}", "validator", "http://127.0.0.1:1")
        for number in range(ROUNDS):
            yield 60.0 * number + 1, name, Validated(number, 7.0 - number / 2, 8192)
            yield 60.0 * number + 58, name, WeightsSet(number, 10 * number, dict.fromkeys(range(48), 1 / 48))


def write(run: Path) -> None:
    """The run's folder."""
    logs: dict[str, Telemetry] = {}
    moment = [BEGIN]
    for seconds, node, event in story():
        moment[0] = BEGIN + seconds
        if node not in logs:
            logs[node] = Telemetry.open(run / "events" / f"{node}.jsonl", now=lambda: moment[0])
        logs[node].emit(event)
    for log in logs.values():
        log.close()
    sizes = "[run]\nname = 'bench'\n[data]\nbatch = 8\nsequence = 1024\n[round]\ncount = 5\n"
    (run / "manifest.toml").write_text(sizes, encoding="utf-8")


async def load(address: str, profile: Path) -> dict[str, object]:
    """One load with an empty cache. Raises `BrowserError`."""
    async with chromium(profile) as page:
        await page.command("Page.addScriptToEvaluateOnNewDocument", source=MARK)
        await page.open(f"{address}/", width=1280)
        figures = await page.evaluate(FIGURES)
        if not isinstance(figures, dict) or page.trouble:
            raise BrowserError(f"the page is in trouble: {page.trouble or figures}")
        return {**figures, "transferred_bytes": page.received, "requests": len(page.requested)}


async def measure(folder: Path) -> list[dict[str, object]]:
    run = folder / "run"
    await asyncio.to_thread(write, run)
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(run, host=HOST, port=0, ready=ready.set_result, stop=stop))
    try:
        address = str(await ready)
        return [await load(address, folder / f"profile-{index}") for index in range(LOADS)]
    finally:
        stop.set()
        await serving


def main() -> int:
    """0 done, 1 without a browser."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.page", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for page.json")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="page-") as folder:
            loads = asyncio.run(measure(Path(folder)))
    except BrowserError as error:
        print(f"scripts.bench.page: {error}", file=sys.stderr)
        return 1
    medians = {
        name: statistics.median(float(str(one[name])) for one in loads if one[name] is not None) for name in loads[0]
    }
    report("page", flags.out, {"miners": STAGES * REPLICAS, "median": medians, "loads": loads})
    return 0


if __name__ == "__main__":
    sys.exit(main())
