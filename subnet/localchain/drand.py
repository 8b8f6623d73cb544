"""Signatures of drand's quicknet rounds, for a chain that is told where to get them.

Timelocked commits can be opened with these and nothing else (`pallets.commit_reveal`). Without a relay the chain needs
no network and such commits stay sealed; with one (`--drand https://api.drand.sh`) it fetches the rounds that commits
wait for, once each is due, over drand's HTTP API, and believes none that does not open what was sealed for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import aiohttp

from subnet.localchain.blocks import Chain

log = logging.getLogger("orion.subnet.localchain.drand")

CHAIN_HASH = "52db9ba70e0cc0f6eaf7803dd07447a1f5477735fd3f661792ba94600c84e971"
GENESIS = 1_692_803_367  # when round 1 was published, in seconds since 1970
PERIOD = 3  # seconds between rounds
_TIMEOUT = 10.0
_MAX_ANSWER = 4_096


class RelayError(Exception):
    """A relay that does not answer, or not with the signature of the round that it was asked for."""


def published_at(number: int) -> int:
    """When quicknet publishes round `number`, in seconds since 1970."""
    return GENESIS + (number - 1) * PERIOD


async def follow(chain: Chain, relay: str, *, clock: Callable[[], float]) -> None:
    """Hand `chain` the rounds that its commits wait for, for ever. What fails is logged and asked for again."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT)) as session:
        while True:
            for number in sorted(set(chain.wanted_rounds())):
                if published_at(number) > clock():
                    break
                try:
                    chain.add_pulse(number, await fetch(session, relay, number))
                except (RelayError, ValueError) as error:
                    log.warning("%s; weights that are timelocked to this round stay sealed", error)
            await asyncio.sleep(PERIOD)


async def fetch(session: aiohttp.ClientSession, relay: str, number: int) -> bytes:
    """The signature that `relay` gives for a round, not checked. RelayError when it gives none."""
    url = f"{relay.rstrip('/')}/{CHAIN_HASH}/public/{number}"
    try:
        async with session.get(url) as response:
            text = await response.content.read(_MAX_ANSWER)
            if response.status != HTTPStatus.OK:
                raise RelayError(f"{url} answers {response.status}")
        answer = cast("dict[str, object]", json.loads(text))
        return bytes.fromhex(str(answer["signature"]))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RelayError(f"{url}: {error or type(error).__name__}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RelayError(f"{url} answers no round of drand's") from error
