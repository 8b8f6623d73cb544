"""A headless chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
TROUBLE = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
"""Events that a page in good order does not cause."""
START_PATIENCE = 60.0
"""Seconds that the browser may take to listen."""

Json = dict[str, object]


class BrowserError(Exception):
    """The browser does not start, or refuses a command."""


@dataclass
class Page:
    """One tab. Commands and what comes back are JSON of the protocol."""

    socket: aiohttp.ClientWebSocketResponse
    trouble: list[Json] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    """Addresses of all requests that the tab has made."""
    received: int = 0
    """Bytes that came over the wire, heads included."""
    _last: int = 0

    async def command(self, method: str, **parameters: object) -> Json:
        """Raises `BrowserError` for one that is refused."""
        self._last += 1
        await self.socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            message: Json = await self.socket.receive_json()
            self._heard(message)
            if message.get("id") == self._last:
                result = message.get("result")
                if not isinstance(result, dict):
                    raise BrowserError(f"{method}: {message.get('error')}")
                return result

    def _heard(self, message: Json) -> None:
        given = message.get("params")
        match message.get("method"), given:
            case "Network.requestWillBeSent", {"request": {"url": str(address)}}:
                self.requested.append(address)
            case "Network.dataReceived", {"encodedDataLength": int(size)}:
                self.received += size
            case "Network.responseReceived", {"response": {"encodedDataLength": int() | float() as size}}:
                self.received += int(size)
            case method, _ if method in TROUBLE:
                self.trouble.append(message)

    async def evaluate(self, expression: str) -> object:
        """The value of an expression, awaited if it is a promise. Raises `BrowserError` if it throws."""
        answer = await self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        match answer:
            case {"exceptionDetails": details}:
                raise BrowserError(f"{expression[:200]}: {details}")
            case {"result": {"value": value}}:
                return value
            case _:
                return None

    async def until(self, condition: str) -> None:
        """Wait for changes of the page until the condition holds."""
        await self.evaluate(
            f"""new Promise((done) => {{
              const holds = () => {{ try {{ return {condition}; }} catch {{ return false; }} }};
              if (holds()) {{ done(); return; }}
              const watch = new MutationObserver(() => {{ if (holds()) {{ watch.disconnect(); done(); }} }});
              watch.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
            }})"""
        )

    async def open(self, address: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Go to the page and wait until it shows a run."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[scheme])
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.command("Page.navigate", url=address)
        await self.until(f"location.href === {json.dumps(address)} && document.body.dataset.shown")

    async def screenshot(self) -> bytes:
        """The whole page as PNG, as wide as the screen it was opened for."""
        shot = await self.command("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(str(shot["data"]))

    async def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            await self.command("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])


KEYS = {"Tab": 9, "ArrowLeft": 37, "Home": 36}


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Page]:
    """A browser with one empty tab, which is gone afterwards. Raises `BrowserError`."""
    if CHROMIUM is None:
        raise BrowserError("no chromium on PATH: install one (Debian: apt-get install chromium)")
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_PATIENCE):
            port = await _port(process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                tabs = await answer.json()
            where = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(where, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.command(f"{domain}.enable")
                yield page
    finally:
        process.terminate()
        await process.communicate()


async def _port(process: asyncio.subprocess.Process) -> int:
    """That the browser says it listens on."""
    while process.stderr is not None and (line := await process.stderr.readline()):
        found = re.search(rb"listening on ws://127\.0\.0\.1:(\d+)/", line)
        if found is not None:
            return int(found[1])
    raise BrowserError(f"{CHROMIUM} ended before it listened")
