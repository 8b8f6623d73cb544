"""The page in a browser: what it says is what the server says, on any screen, with a keyboard, without an error."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from neurons.telemetry import Intervention, Validated
from scripts.bench.browser import CHROMIUM, Page, chromium
from tests.scripts.dashboard.conftest import Served
from tests.scripts.dashboard.recording import BEGIN, MARKUP, write

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
    pytest.mark.timeout(180),
]

CELLS = (
    "(id) => [...document.querySelectorAll(`#${id} tbody tr`)].map((row) => [...row.cells].map((c) => c.textContent))"
)
CONTROLS = """[...document.querySelectorAll('a[href], button, select, input, summary, [tabindex="0"]')]
  .filter((one) => !one.disabled && one.checkVisibility() && (one.type !== 'radio' || one.checked))
  .forEach((one, index) => { one.dataset.order = index; })"""


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with chromium(tmp_path / "profile") as tab:
        yield tab


async def test_it_shows_what_the_server_says(
    recorded: Path, served: Served, page: Page, record_property: Callable[[str, object], None]
) -> None:
    async with served(recorded) as address:
        async with aiohttp.ClientSession(address) as session, session.get("/state") as answer:
            state = await answer.json()
        await page.open(f"{address}/", width=1280)
        paint = await page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        record_property("first contentful paint, milliseconds", paint)
        figures = await page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('.figure')].map((one) => [one.id, one.textContent]))"
        )
        totals = state["totals"]
        assert figures == {
            "total-loss": f"{totals['loss']:.3f}",
            "total-validation": f"{totals['validation']:.4f}",
            "total-tokens": f"{totals['tokens']:,}",
            "total-rate": f"{totals['tokens_per_second']:,.0f}",
            "total-left": "0:00",
            "total-lost": "1",
            "total-audits": "2/3",
            "total-convicted": "1",
            "total-weights-set": "1",
            "total-sent": "7.50 kB",
            "total-churn": "9",
        }
        text = await page.evaluate("document.getElementById('grid').innerText")
        for words in ("✕ dead", "✓ merged", "✓ in merge r0", "✕ convicted until r3", "uid 4", "10 units", "sign-flip"):
            assert words in text
        weights = await page.evaluate(f"({CELLS})('weights')")
        assert [row[:4] for row in weights] == [
            [str(row["uid"]), row["miner"], str(row["stage"]), f"{100 * row['weights'][0]:.2f} %"]
            for row in state["weights"]["rows"]
        ]
        rounds = await page.evaluate(f"({CELLS})('rounds')")
        assert rounds[1][:8] == ["0", "0:02", "10", "20", "✕ 1 lost", "6.050", "7.0000", "3/3"]
        assert await page.evaluate("document.querySelectorAll('canvas').length") == 2
        assert "7.000 → 5.100 over 20,480 tokens" in await page.evaluate(
            "document.getElementById('loss-said').textContent"
        )
        assert page.trouble == []


async def test_logs_are_text_whatever_they_hold(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        for place in ("verdicts", "log"):
            assert MARKUP in await page.evaluate(f"document.getElementById('{place}').textContent")
        assert await page.evaluate("document.images.length") == 0
        assert await page.evaluate("document.title") == "Orion · small-run"
        assert page.trouble == []


async def test_a_chosen_miner_shows_its_terms(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        await page.evaluate("document.querySelector('[data-miner=miner-3]').click()")
        terms = dict(await page.evaluate(f"({CELLS})('score')"))
        assert terms["not paid"] == "2 no receipt"
        assert terms["verified FLOPs"] == "30.0 G"
        assert terms["\N{MULTIPLICATION SIGN} correctness"] == "✕ 0.00"
        assert terms["= weight"] == "0.00 %"
        assert await page.evaluate("document.getElementById('miner').value") == "miner-3"
        assert (
            await page.evaluate("document.querySelector('[aria-pressed=true][data-miner]').dataset.miner") == "miner-3"
        )


@pytest.mark.parametrize("dark", [False, True])
async def test_nothing_is_wider_than_a_small_screen(recorded: Path, served: Served, page: Page, dark: bool) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=360, dark=dark)
        width, inner = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= inner == 360
        ground = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (ground == "rgb(14, 17, 20)") is dark


async def test_a_keyboard_reaches_every_control(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        await page.evaluate(CONTROLS)
        count = await page.evaluate("document.querySelectorAll('[data-order]').length")
        assert count > 20
        order = []
        for _ in range(count):
            await page.press("Tab")
            order.append(int(await page.evaluate("document.activeElement.dataset.order ?? -1")))
        assert order == list(range(count))
        unnamed = await page.evaluate(
            """[...document.querySelectorAll('[data-order]')]
              .filter((one) => !one.textContent.trim() && !one.labels?.length && !one.ariaLabel
                && !one.hasAttribute('aria-labelledby'))
              .map((one) => one.outerHTML)"""
        )
        assert unnamed == []


async def test_a_moment_of_the_run_and_back(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        await page.evaluate("document.getElementById('scrub').focus()")
        await page.press("Home")
        await page.until("document.getElementById('total-tokens').textContent === '0'")
        assert await page.evaluate("document.getElementById('status').textContent") == "↺ replay"
        assert await page.evaluate("document.getElementById('moment').textContent") == "0:00 of 0:37"
        await page.evaluate("document.getElementById('speed').value = '120'")
        await page.evaluate("document.getElementById('play').click()")
        await page.until("document.getElementById('total-tokens').textContent === '20,480'")
        await page.until("document.getElementById('play').textContent === '▶ Play'")
        await page.evaluate("document.getElementById('latest').click()")
        await page.until("document.getElementById('status').textContent === '■ finished'")
        assert page.trouble == []


async def test_what_happens_comes_to_the_page_and_is_said(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        await page.evaluate("document.querySelector('[data-miner=miner-1]').focus()")
        write(
            recorded,
            [
                (60.0, "localnet", Intervention("kill", "miner-1", 0, "--kill miner:1@round0")),
                (61.0, "validator-0", Validated(2, 4.125, 8192)),
            ],
        )
        await page.until("document.getElementById('total-validation').textContent === '4.1250'")
        assert await page.evaluate("document.querySelector('[data-miner=miner-1]').innerText.includes('✕ dead')")
        assert await page.evaluate("document.getElementById('announce').textContent") == "miner-1 is dead."
        assert await page.evaluate("document.activeElement.dataset.miner") == "miner-1"
        shown = await page.evaluate("document.body.dataset.shown")
        assert json.loads(str(shown)) == BEGIN + 61.0
        assert page.trouble == []
