"""The page for everybody: on a small screen, without a mouse, without colours, without motion, without other hosts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from scripts.bench.browser import CHROMIUM, Page, chromium
from tests.scripts.dashboard.conftest import Served

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
    pytest.mark.timeout(180),
]

TEXTS = """(() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, index) => value * a + under[index] * (1 - a));
  const ground = (one) => {
    if (one === null) return [255, 255, 255];
    return over(parse(getComputedStyle(one).backgroundColor), ground(one.parentElement));
  };
  const light = (colour) => colour.slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const own = (one) => [...one.childNodes].filter((node) => node.nodeType === 3)
    .map((node) => node.data.trim()).join('');
  return [...document.body.querySelectorAll('*')]
    .filter((one) => own(one) && one.checkVisibility() && !one.closest('noscript, :disabled'))
    .map((one) => {
      const under = ground(one);
      const pair = [light(over(parse(getComputedStyle(one).color), under)), light(under)].sort((a, b) => b - a);
      return [own(one).slice(0, 40), (pair[0] + 0.05) / (pair[1] + 0.05)];
    });
})()"""
"""Every text that can be seen, with its contrast (WCAG 2.2, relative luminance)."""
ALARMING = """(() => {
  const style = getComputedStyle(document.documentElement);
  const probe = document.body.appendChild(document.createElement('i'));
  const colours = ['--bad', '--warn', '--good'].map((name) => {
    probe.style.color = style.getPropertyValue(name);
    return getComputedStyle(probe).color;
  });
  probe.remove();
  return [...document.body.querySelectorAll('*')]
    .filter((one) => one.checkVisibility() && one.childElementCount === 0 && one.textContent.trim())
    .filter((one) => colours.includes(getComputedStyle(one).color))
    .map((one) => (one.closest('.mark, .chip, #totals > div') ?? one).textContent);
})()"""
"""What surrounds each text in a colour that says something."""
SIGNS = "✕!∅✓▶●○■↺⇄⏸❙…"
STRUCTURE = """(() => {
  const named = (one) => one.ariaLabel || one.getAttribute('aria-labelledby')?.split(' ')
    .every((id) => document.getElementById(id)?.textContent.trim());
  const levels = [...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]));
  const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);
  return {
    lang: document.documentElement.lang,
    viewport: document.querySelector('meta[name=viewport]')?.content,
    title: document.title,
    landmarks: ['header', 'main', 'footer'].map((name) => document.querySelectorAll(`body > ${name}`).length),
    headings: levels.filter((level) => level === 1).length,
    jumps: levels.filter((level, index) => index > 0 && level > levels[index - 1] + 1),
    sections: [...document.querySelectorAll('main > section, [role=region], [role=img], form')]
      .filter((one) => !named(one)).map((one) => one.id),
    fields: [...document.querySelectorAll('input, select')].filter((one) => !one.labels.length && !one.ariaLabel)
      .map((one) => one.id),
    cells: [...document.querySelectorAll('table:not(.u-legend) th')].filter((one) => !one.scope).length,
    captions: [...document.querySelectorAll('table:not(.u-legend)')].filter((one) => !one.caption).length,
    twice: ids.filter((id, index) => ids.indexOf(id) !== index),
  };
})()"""
MOVING = """[...document.querySelectorAll('*')].map((one) => getComputedStyle(one))
  .filter((style) => style.transitionDuration !== '0s' || style.animationName !== 'none').length"""
FOCUS = """(() => {
  const one = document.activeElement;
  const style = getComputedStyle(one);
  const box = one.getBoundingClientRect();
  return [style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2 && box.width > 0 && box.bottom > 0
    && box.top < innerHeight, one.outerHTML.slice(0, 80)];
})()"""


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with chromium(tmp_path / "profile") as tab:
        yield tab


async def test_it_asks_nobody_but_its_server_and_says_what_it_is(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        found = await page.evaluate(STRUCTURE)
        assert found == {
            "lang": "en",
            "viewport": "width=device-width, initial-scale=1",
            "title": "Orion · small-run",
            "landmarks": [1, 1, 1],
            "headings": 1,
            "jumps": [],
            "sections": [],
            "fields": [],
            "cells": 0,
            "captions": 0,
            "twice": [],
        }
        assert len(page.requested) >= 8
        assert {urlsplit(asked).netloc for asked in page.requested} == {urlsplit(address).netloc}
        assert page.trouble == []


@pytest.mark.parametrize("dark", [False, True])
async def test_text_stands_out_from_its_ground(recorded: Path, served: Served, page: Page, dark: bool) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280, dark=dark)
        await page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        texts = await page.evaluate(TEXTS)
        assert len(texts) > 150
        assert [(text, round(contrast, 2)) for text, contrast in texts if contrast < 4.5] == []


async def test_no_colour_says_what_a_sign_does_not(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        coloured = await page.evaluate(ALARMING)
        assert len(coloured) > 10
        assert [text for text in coloured if not set(text) & set(SIGNS)] == []


@pytest.mark.parametrize("width", [360, 1280])
async def test_who_has_the_focus_can_be_seen(recorded: Path, served: Served, page: Page, width: int) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=width)
        unseen, reached = [], set()
        while True:
            await page.press("Tab")
            seen, what = await page.evaluate(FOCUS)
            where = await page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
            if where in reached or json.dumps(what).startswith('"<body'):
                break
            reached.add(where)
            if not seen:
                unseen.append(what)
        assert len(reached) > 20
        assert unseen == []


async def test_who_wants_no_motion_gets_none(recorded: Path, served: Served, page: Page) -> None:
    async with served(recorded) as address:
        await page.open(f"{address}/", width=1280)
        assert await page.evaluate(MOVING) > 0
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        await page.command("Emulation.setEmulatedMedia", features=[still])
        assert await page.evaluate(MOVING) == 0
