"""A headless chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
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


@dataclass
class Page:
    """One tab. Commands and what comes back are JSON of the protocol."""

    socket: aiohttp.ClientWebSocketResponse
    trouble: list[dict[str, object]] = field(default_factory=list)
    _last: int = 0

    async def command(self, method: str, **parameters: object) -> dict[str, object]:
        self._last += 1
        await self.socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json()
            if message.get("method") in TROUBLE:
                self.trouble.append(message)
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, expression: str) -> object:
        """The value of an expression, awaited if it is a promise."""
        answer = await self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

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

    async def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            await self.command("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])


KEYS = {"Tab": 9, "ArrowLeft": 37, "Home": 36}


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Page]:
    """A browser with one empty tab, which is gone afterwards."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        port = None
        while port is None:
            line = await process.stderr.readline()
            assert line, "chromium ended before it listened"
            port = re.search(rb"listening on ws://127\.0\.0\.1:(\d+)/", line)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port[1].decode()}/json") as answer:
                tabs = await answer.json()
            where = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(where, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.command(f"{domain}.enable")
                yield page
    finally:
        process.terminate()
        await process.communicate()
