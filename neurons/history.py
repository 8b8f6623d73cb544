"""One roster after another from the chain's states: the same code for a node, a newcomer and a sceptic.

A node hands in a `state_at` that waits for its block, a sceptic one that reads an archive. What goes into the roster
of round r is the state at its first block and the outcome of the newest round whose HAVE block is not after that: of
round r-1 or, with HAVE beyond the round's length, of r-2.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from subnet.chain import Chain
from subnet.manifest import LoadedManifest, RoundSection
from subnet.metagraph import ChainState
from subnet.swarm.membership import Closed, Refreshed, close, refresh
from subnet.swarm.roster import Roster, defect, gather

StateAt = Callable[[int], Awaitable[ChainState]]


class HistoryError(Exception):
    """The recurrence cannot go on from what is known: one line with the remedy."""


def lag(marks: RoundSection) -> int:
    """How many rounds before a roster's own lies the one whose outcome it takes in."""
    return 1 if marks.have <= marks.length else 2


class History:
    """The recurrence of one run. `known`: rosters to go on from, the newest and, with a lag of 2, the one before."""

    def __init__(self, loaded: LoadedManifest, state_at: StateAt, *, known: Iterable[Roster] = ()) -> None:
        self._manifest = loaded.manifest
        self._run = loaded.run_id
        self._state_at = state_at
        self._lag = lag(loaded.manifest.round)
        self._known = {roster.round: roster for roster in known}

    @property
    def newest(self) -> Roster | None:
        return self._known[max(self._known)] if self._known else None

    def roster(self, number: int) -> Roster | None:
        """The roster of a round, if it is one of the last two."""
        return self._known.get(number)

    async def begin(self, *, until: int | None = None) -> Refreshed | None:
        """Round 0: the first gathering block where enough valid hotkeys are there, or None up to block `until`."""
        block = self._manifest.run.activation_block
        swarm = self._manifest.swarm
        while until is None or block <= until:
            state = await self._state_at(block)
            most = self._manifest.most_replicas
            roster = gather(state, self._run, stages=swarm.stages, replicas=swarm.replicas, most=most)
            if roster is not None:
                self._known = {0: roster}
                return Refreshed(roster, _gathered(roster, state, self._run))
            block += swarm.gather_blocks
        return None

    async def step(self) -> Refreshed:
        """The roster after the newest known one."""
        previous = self.newest
        if previous is None:
            raise HistoryError("no roster is known yet: begin with round 0 or with a snapshot")
        closed = await self._closed(previous.round + 1 - self._lag)
        state = await self._state_at(previous.block + self._manifest.round.length)
        refreshed = refresh(
            previous, state, self._run, fresh_from=previous.block, closed=closed, most=self._manifest.most_replicas
        )
        self._known[refreshed.roster.round] = refreshed.roster
        self._known.pop(refreshed.roster.round - 2, None)
        return refreshed

    async def catch_up(self, chain: Chain) -> Roster:
        """Every refresh up to the newest finalized block; the roster in force there."""
        while True:
            newest = self.newest
            if newest is None:
                raise HistoryError("no roster is known yet: begin with round 0 or with a snapshot")
            if newest.block + self._manifest.round.length > (await chain.finalized()).number:
                return newest
            await self.step()

    async def _closed(self, number: int) -> Closed | None:
        if number < 0:
            return None
        roster = self._known.get(number)
        if roster is None:
            raise HistoryError(f"the roster of round {number} is missing: take it from a peer or replay from round 0")
        marks = self._manifest.round
        at_cut = await self._state_at(roster.block + marks.cut)
        return close(roster, self._run, at_cut, await self._state_at(roster.block + marks.have))


async def replay(loaded: LoadedManifest, state_at: StateAt, *, until: int) -> AsyncIterator[Refreshed]:
    """Every roster that began at block `until` or before, recomputed from nothing but the chain's states."""
    history = History(loaded, state_at)
    refreshed = await history.begin(until=until)
    while refreshed is not None:
        yield refreshed
        due = refreshed.roster.block + loaded.manifest.round.length
        refreshed = await history.step() if due <= until else None


def _gathered(roster: Roster, state: ChainState, run: bytes) -> dict[str, str]:
    reasons = {neuron.hotkey: f"out: {why}" for neuron in state.neurons if (why := defect(neuron, run))}
    stages = len(roster.anchors)
    for member in roster.table:
        there = f"there when {stages} stages gathered at block {roster.block}"
        reasons[member.hotkey] = there if member.stage is not None else f"{there}, which had no room"
    return reasons
