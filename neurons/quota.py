"""The miner's side of quotas: how much of its evidence each caller has had, how fast, and how much it asks at a time.

Rates are kept by a bucket per validator, on the event loop's clock, and one for everybody else. A bucket that is not
empty gives a whole reply, however large, and then nothing until the debt is paid: replies travel at the speed of the
link, what keeps to a tenth of it is their sum.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from subnet.transport.errors import Busy, OverQuota
from subnet.trust.heads import WindowHead
from subnet.trust.quota import RETRIES, Sizes, joiners_part, others_rate, rates, validators_part

BURST = 10.0
"""Seconds of its rate that a bucket holds."""
IN_WORK = 2
"""Requests of one caller that are worked on at a time."""
PAUSE = 0.1


class Bucket:
    """Bytes at `rate` per second. Full at first."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._level = rate * BURST
        self._at = asyncio.get_running_loop().time()

    def set_rate(self, rate: float) -> None:
        """From now on."""
        self._fill()
        self._rate = rate

    def wait(self) -> float:
        """Seconds until something may be taken; 0 if at once."""
        self._fill()
        return 0.0 if self._level > 0 else max(-self._level / self._rate, PAUSE)

    def take(self, size: int) -> None:
        """Take `size` bytes, into debt if they are more than there are."""
        self._fill()
        self._level -= size

    def _fill(self) -> None:
        now = asyncio.get_running_loop().time()
        self._level = min(self._rate * BURST, self._level + (now - self._at) * self._rate)
        self._at = now


class Uplink:
    """A tenth of the declared uplink, in parts; all rounds together."""

    def __init__(self, bandwidth_bps: float) -> None:
        self._bandwidth_bps = bandwidth_bps
        self._round = -1
        self._buckets: dict[str, Bucket] = {}
        self._others: Bucket | None = None
        self._working: Counter[str] = Counter()

    def share_out(self, number: int, shares: Mapping[str, float]) -> None:
        """Validators at work in round `number`, with their shares of the stake; who is not among them counts with the
        others. The newest round's hold."""
        if number <= self._round:
            return
        self._round = number
        found = rates(shares, uplink_bps=self._bandwidth_bps)
        for hotkey, rate in found.items():
            if hotkey in self._buckets:
                self._buckets[hotkey].set_rate(rate)
        self._buckets = {hotkey: self._buckets.get(hotkey) or Bucket(rate) for hotkey, rate in found.items()}

    @contextmanager
    def working(self, caller: str) -> Iterator[None]:
        """Around the work for one request. Raises `Busy` for one too many, and for a caller whose bucket is empty."""
        if self._working[caller] >= IN_WORK:
            raise Busy(
                f"{self._working[caller]} requests of {caller[:60]} are worked on, limit {IN_WORK}",
                "ask one after the other",
                retry_after=PAUSE,
            )
        wait = self._bucket(caller).wait()
        if wait:
            raise Busy(
                "evidence has its tenth of this uplink", "ask again after the pause", retry_after=min(wait, 3599.0)
            )
        self._working[caller] += 1
        try:
            yield
        finally:
            self._working[caller] -= 1
            if not self._working[caller]:
                del self._working[caller]

    def take(self, caller: str, size: int) -> None:
        """`size` bytes are about to be sent to `caller`."""
        self._bucket(caller).take(size)

    def _bucket(self, caller: str) -> Bucket:
        if caller in self._buckets:
            return self._buckets[caller]
        if self._others is None:
            self._others = Bucket(others_rate(uplink_bps=self._bandwidth_bps))
        return self._others


class Audience:
    """Who may ask for how much of one round, and what each caller has had."""

    def __init__(self, shares: Mapping[str, float], sizes: Sizes) -> None:
        """`shares` of the stake at work, by validator."""
        self.shares = shares
        self._sizes = sizes
        self._taken: Counter[str] = Counter()

    def limit(self, caller: str, picked: Collection[WindowHead], *, tables: int) -> int:
        """Bytes that a caller may have."""
        if caller in self.shares:
            part = validators_part(self._sizes, picked, tables=tables, share=self.shares[caller])
        else:
            part = joiners_part(self._sizes, tables=tables)
        return RETRIES * part

    def require(self, caller: str, size: int, limit: int) -> None:
        """Raises `OverQuota` if with `size` bytes more `caller` would have had more than `limit`."""
        had = self._taken[caller]
        if had + size > limit:
            raise OverQuota(
                f"{size} bytes after {had} of this round, limit {limit} for {caller[:60]}",
                "ask for what the own stake's part of the audit needs",
            )

    def take(self, caller: str, size: int) -> None:
        """`size` bytes are about to be sent."""
        self._taken[caller] += size
