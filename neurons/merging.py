"""One round's merge of one stage, as one replica plays it against the chain and the other replicas.

    CUT     roots are on chain; the sources are fixed. Everybody fetches what it needs of them.
    HAVE    bitmaps are on chain; the list of sources that count is fixed.
    MERGE   butterfly: digests of merged shards are on chain; which shards are accepted is fixed.
    end     the last block by which to get what the chain says was merged.

A codec with error feedback is small and goes to everybody, who compute the whole merge themselves (all-gather, done by
MERGE). The others go through the pair-shard butterfly (`subnet.swarm.butterfly`). Either way what counts is read from
the chain at the marks, and a source's payload is judged by its content alone, so all replicas decide alike; whoever
lacks at the last mark what the others have is `incomplete` and takes the public state from a sibling.

Chain and transport are reached through `Board` and `Exchange`; nothing here waits longer than to its mark.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch

from neurons.exchange import PIECES, RECHECK, Courier, Desk, Exchange, together
from neurons.progress import Meter, Standing, followed
from neurons.terms import Board, Offload, Outcome, Terms
from subnet.quantities import size
from subnet.swarm import content
from subnet.swarm.butterfly import (
    NO_DIGEST,
    Butterfly,
    Shard,
    Verdict,
    opened,
    part_of,
    ranges,
    recheck,
    reduce,
    shard_sources,
    verdicts,
)
from subnet.swarm.clip import factors, norm
from subnet.swarm.codec import DeltaError, PayloadError
from subnet.swarm.merge import Merged, Source, accepted, cut_sources, mean, step
from subnet.swarm.record import Phase, Record
from subnet.transport.errors import BadReply, TransportError

log = logging.getLogger("orion.neurons.merging")

TAKE_TURNS = 2
"""Rounds of all replicas after which an accepted shard that nobody gives is computed here."""
RECHECK_TURNS = 3
"""Rounds of all holders after which a shard that is only to be judged is let go: nothing waits for it."""


async def merge(
    terms: Terms,
    record: Record | None,
    public: Merged,
    desk: Desk,
    *,
    board: Board,
    exchange: Exchange,
    offload: Offload = asyncio.to_thread,
) -> Outcome:
    """Play one round's merge to its end. `record` is this replica's, with the round's `work`; `public` is θ_r.

    `desk` holds this replica's contribution and must be served from now on. Until MERGE its owner may publish no other
    record: it would take this round's from the chain. Without a `record` nothing is published: so a joiner or a
    validator watches a merge, and so a replica ends one that it was too late for. Raises `ButterflyError`.
    """
    kind = _AllGather if terms.gathers else _Butterfly
    return await kind(terms, record, public, desk, board, exchange, offload).play()


async def judge_shard(
    terms: Terms,
    public: Merged,
    shard: int,
    *,
    board: Board,
    exchange: Exchange,
    offload: Offload = asyncio.to_thread,
) -> tuple[str, ...]:
    """Who published another digest of one merged shard than the one computed here, after MERGE: for who is told later.

    `public` is θ_r. Nobody, where there is no such shard or its sources' pieces are not served any more.
    """
    if terms.gathers:
        return ()
    return await _Butterfly(terms, None, public, Desk(""), board, exchange, offload).judge_alone(shard)


class _Merge:
    """What both ways have in common: to CUT, and from there to HAVE."""

    def __init__(
        self,
        terms: Terms,
        record: Record | None,
        public: Merged,
        desk: Desk,
        board: Board,
        exchange: Exchange,
        offload: Offload,
    ) -> None:
        self._terms = terms
        self._marks = terms.marks
        self._record = record
        self._public = public
        self._desk = desk
        self._board = board
        self._offload = offload
        self._courier = Courier(exchange, desk, terms.replicas)
        self._layout = terms.layout()
        self._parts = (range(terms.count),) if terms.gathers else ranges(len(terms.replicas), terms.count)
        """The shards in the flat vector; an all-gather has one."""
        self._phase = ("until the roots are on chain", terms.marks.cut)
        """What the merge is at, and the block by which that has to end."""
        self._pieces = Meter()
        """Of the shards that are asked of all sources."""
        self._tasks: list[asyncio.Task[None]] = []
        self._whole: set[str] = set()
        """Sources of which all that is wanted is here and valid."""
        self._norms: dict[tuple[str, int], float] = {}
        """By source and shard."""
        self._refused: dict[str, str] = {}
        self._liars: dict[str, tuple[int, ...]] = {}

    async def play(self) -> Outcome:
        marks, terms = self._marks, self._terms
        try:
            async with followed(self._pieces, self._tell):
                root = self._desk.root or bytes(32)
                await self._publish(lambda record: replace(record, phase=Phase.CUT, root=root), until=marks.cut)
                sources = cut_sources(terms.replicas, await self._board.records_at(marks.cut), terms.number)
                return await self._merge(sources)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _merge(self, sources: Sequence[Source]) -> Outcome:
        raise NotImplementedError

    def _tell(self, standing: Standing) -> None:
        doing, block = self._phase
        received = size(sum(self._courier.received.values()))
        pieces = standing.text(lambda count: f"{count:,.3g} pieces")
        log.info("round %d, merge: %s (block %d); %s, %s", self._terms.number, doing, block, pieces, received)

    async def _publish(self, change: Callable[[Record], Record], *, until: int) -> None:
        if self._record is not None:
            self._record = change(self._record)
            await self._board.publish(self._record, until=until)

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        return task

    async def _until(self, block: int, tasks: Iterable[asyncio.Task[None]]) -> None:
        """Until all tasks are done or `block` is final; raises what a task raised."""
        awaited = list(tasks)
        clock = self._start(self._board.wait(block))
        while not clock.done() and (pending := [task for task in awaited if not task.done()]):
            await asyncio.wait([*pending, clock], return_when=asyncio.FIRST_COMPLETED)
        clock.cancel()
        for task in (*awaited, clock):
            if task.done() and not task.cancelled():
                task.result()

    async def _agree(
        self, sources: Sequence[Source], wanted: Sequence[int]
    ) -> tuple[dict[str, asyncio.Task[None]], tuple[Source, ...], Mapping[str, Record | None]]:
        """Fetch the `wanted` shards of all sources and say at HAVE whose are here.

        Returns the fetches, which go on, the listed sources, and the records at HAVE.
        """
        self._phase = ("fetching what sources cut", self._marks.have)
        self._pieces.at(0, len(sources) * sum(len(self._layout.shards[shard]) for shard in wanted))
        collecting = {source.hotkey: self._start(self._collect(source, wanted)) for source in sources}
        await self._until(self._marks.have - self._marks.margin, collecting.values())
        have = sum(1 << source.index for source in sources if source.hotkey in self._whole)
        await self._publish(lambda record: replace(record, phase=Phase.HAVE, have=have), until=self._marks.have)
        records = await self._board.records_at(self._marks.have)
        self._phase = ("fetching and merging", self._marks.merge)
        return collecting, accepted(sources, records, self._terms.number), records

    async def _collect(self, source: Source, wanted: Sequence[int]) -> None:
        async def valid(shard: int) -> bool:
            await self._fetch(source, shard)
            self._pieces.done += len(self._layout.shards[shard])
            return await self._offload(lambda: self._norm(source, shard) is not None)

        if all(await together(valid(shard) for shard in wanted)):
            self._whole.add(source.hotkey)

    async def _fetch(
        self,
        source: Source,
        shard: int,
        *,
        leg: str = PIECES,
        near: Sequence[str] = (),
        turns: int | None = None,
    ) -> None:
        """Get one source's part of a shard onto the desk. Raises `TransportError` if so many `turns` are not enough."""
        sizes = self._layout.sizes
        leaves, _ = await self._courier.leaves(source, len(sizes), turns=turns)
        if len(leaves) == len(sizes):  # else its content is not valid
            await together(
                self._courier.piece(source, leaves[index], index, sizes[index], leg=leg, near=near, turns=turns)
                for index in self._layout.shards[shard]
            )

    def _delta(self, source: Source, shard: int) -> torch.Tensor | None:
        """What the fetched part of a shard says, fp32, None if its content is not valid: then its source is refused."""
        pieces = (self._desk.piece_of(source.hotkey, index) for index in self._layout.shards[shard])
        payload = b"".join(piece for piece in pieces if piece is not None)
        limit = self._terms.limit(source.work)
        try:
            return self._terms.codec.decode(payload, len(self._parts[shard]), limit=limit)
        except PayloadError as error:
            self._refused.setdefault(source.hotkey, str(error))
            return None

    def _deltas(self, sources: Iterable[Source], shard: int) -> Iterator[torch.Tensor]:
        """The valid ones, clipped, one at a time."""
        valid = [source for source in sources if self._norm(source, shard) is not None]
        norms = [self._norms[source.hotkey, shard] for source in valid]
        for source, factor in zip(valid, factors(norms, self._terms.clip), strict=True):
            delta = self._delta(source, shard)
            if delta is not None:
                yield delta if factor == 1 else delta * factor

    def _norm(self, source: Source, shard: int) -> float | None:
        """Of what the fetched part of a shard says; None if its content is not valid."""
        known = self._norms.get((source.hotkey, shard))
        if known is None and (delta := self._delta(source, shard)) is not None:
            known = self._norms[source.hotkey, shard] = norm(delta)
        return known

    def _outcome(
        self,
        listed: tuple[Source, ...],
        public: Merged,
        *,
        merged: Iterable[range] = (),
        taken: Iterable[range] = (),
        incomplete: bool = False,
    ) -> Outcome:
        moved = tuple(merged)
        marks = [0, *(mark for part in moved for mark in (part.start, part.stop)), self._terms.count]
        gaps = zip(marks[::2], marks[1::2], strict=True)
        return Outcome(
            public=public,
            record=self._record,
            listed=listed,
            merged=moved,
            carried=tuple(range(start, stop) for start, stop in gaps if start < stop),
            taken=tuple(taken),
            incomplete=incomplete,
            refused=dict(self._refused),
            forged=dict(self._courier.forged),
            liars=dict(self._liars),
            received=dict(self._courier.received),
            sent=dict(self._desk.sent),
        )


class _AllGather(_Merge):
    """Everybody fetches everything and computes the whole merge."""

    async def _merge(self, sources: Sequence[Source]) -> Outcome:
        collecting, listed, _ = await self._agree(sources, [0])
        await self._until(self._marks.merge, [collecting[source.hotkey] for source in listed])
        valid = [source for source in listed if source.hotkey not in self._refused]
        if not valid:
            return self._outcome(listed, self._public)
        incomplete = any(source.hotkey not in self._whole for source in valid)
        public = self._public
        if not incomplete:
            public = await self._offload(lambda: self._apply(valid))
        whole = (range(self._terms.count),)
        mine = any(source.hotkey == self._desk.hotkey for source in valid)
        return self._outcome(listed, public, merged=whole, taken=whole if mine else (), incomplete=incomplete)

    def _apply(self, sources: Sequence[Source]) -> Merged:
        return step(self._public, mean(self._deltas(sources, 0)), self._terms.outer)


class _Butterfly(_Merge):
    """Everybody merges the shards it holds and takes the others from their holders."""

    _plan: Butterfly
    _sources: tuple[tuple[Source, ...], ...]
    """Who counts in each shard."""

    def __init__(
        self,
        terms: Terms,
        record: Record | None,
        public: Merged,
        desk: Desk,
        board: Board,
        exchange: Exchange,
        offload: Offload,
    ) -> None:
        super().__init__(terms, record, public, desk, board, exchange, offload)
        self._computed: dict[int, Shard] = {}
        """Merged here, from the sources' pieces."""
        self._given: dict[int, tuple[str, Shard]] = {}
        """Taken from a holder."""
        self._truth: dict[int, bytes] = {}
        """Digests of the accepted shards, once MERGE has come."""
        self._judged: tuple[Verdict, ...] = ()

    async def _merge(self, sources: Sequence[Source]) -> Outcome:
        terms, marks = self._terms, self._marks
        plan = await self._draw()
        mine = plan.shards_of(self._desk.hotkey)
        _, listed, records = await self._agree(sources, mine)
        if not listed:
            return self._outcome(listed, self._public)
        shards = range(len(plan.pairs))
        self._fix_sources(listed, records)
        merging = [self._start(self._hold(shard)) for shard in mine]
        taking = {shard: self._start(self._take(shard, plan.holders(shard))) for shard in shards if shard not in mine}
        await self._until(marks.merge - marks.margin, merging)
        # Not before: a holder that dies until then leaves no digest of a shard that it can no longer give to anybody.
        await self._board.wait(marks.merge - marks.margin)
        digests = (self._computed[shard].digest if shard in self._computed else NO_DIGEST for shard in mine)
        said = b"".join(digests)
        await self._publish(lambda record: replace(record, shards=said), until=marks.merge)
        self._judged = verdicts(plan, await self._board.records_at(marks.merge), terms.number)
        self._phase = ("getting what was merged", marks.end)
        self._truth.update((shard, digest) for shard in shards if (digest := self._judged[shard].accepted) is not None)
        judging = self._judging()
        settling = [self._start(self._settle(shard, taking.get(shard))) for shard in self._truth]
        await self._until(marks.end, [*settling, *judging])
        return await self._offload(lambda: self._conclude(listed))

    async def judge_alone(self, shard: int) -> tuple[str, ...]:
        """Recompute one shard of a merge that is over; who published another digest, in hotkey order."""
        terms, marks, board = self._terms, self._marks, self._board
        sources = cut_sources(terms.replicas, await board.records_at(marks.cut), terms.number)
        if not 0 <= shard < len((await self._draw()).pairs):
            return ()
        records = await board.records_at(marks.have)
        self._fix_sources(accepted(sources, records, terms.number), records)
        self._judged = verdicts(self._plan, await board.records_at(marks.merge), terms.number)
        await self._judge(shard)
        return tuple(sorted(self._liars))

    async def _draw(self) -> Butterfly:
        """Who holds which shard. The CUT block's own hash is no seed: whoever made that block knew the roots in it."""
        seed = await self._board.seed(self._marks.cut + 1)
        self._plan = Butterfly.draw(self._terms.replicas, self._terms.count, seed)
        return self._plan

    def _fix_sources(self, listed: Sequence[Source], records: Mapping[str, Record | None]) -> None:
        shards, number = range(len(self._plan.pairs)), self._terms.number
        self._sources = tuple(shard_sources(self._plan, shard, listed, records, number) for shard in shards)

    def _before(self, shard: int) -> Merged:
        return part_of(self._public, self._parts[shard])

    async def _hold(self, shard: int) -> None:
        """Merge a shard that this replica holds, and serve it."""
        merged = await self._recompute(shard, leg=PIECES, turns=None)
        if merged is not None:
            self._computed[shard] = merged
            self._serve(shard, merged)

    def _serve(self, shard: int, merged: Shard) -> None:
        self._desk.offer(shard, content.cut(merged.payload, piece_bytes=self._terms.piece_bytes))

    async def _recompute(self, shard: int, *, leg: str, turns: int | None) -> Shard | None:
        """The shard from its sources' pieces; None if nothing valid counts in it."""
        near, sources = self._plan.holders(shard), self._sources[shard]
        await together(self._fetch(source, shard, leg=leg, near=near, turns=turns) for source in sources)
        return await self._offload(lambda: self._reduce(shard))

    def _reduce(self, shard: int) -> Shard | None:
        deltas = self._deltas(self._sources[shard], shard)
        first = next(deltas, None)
        if first is None:
            return None
        try:
            return reduce(self._terms.codec, self._before(shard), chain([first], deltas), self._terms.outer)
        except DeltaError:
            return None  # the sum is beyond what the codec writes, for whoever computes it

    async def _take(self, shard: int, holders: Sequence[str], *, turns: int | None = None) -> None:
        """Get a merged shard, before MERGE on trust, afterwards by its digest.

        Raises `TransportError` after so many turns, and once MERGE has come to what began before.
        """
        codec, outer, sizes = self._terms.codec, self._terms.outer, self._layout.sizes_of(shard)
        first = self._plan.provider(shard, self._desk.hotkey)
        order = sorted(holders, key=lambda holder: holder != first)
        early = not self._judged
        got: list[Shard] = []

        async def check(holder: str, payload: bytes) -> str | None:
            try:
                taken = await self._offload(lambda: opened(codec, self._before(shard), payload, outer))
            except PayloadError as error:
                return f"gave a merged shard {shard} that cannot be read: {error}"
            if taken.digest != self._truth.get(shard, taken.digest):
                return self._mismatch(holder, shard)
            got.append(taken)
            return None

        holder = await self._courier.merged(
            shard, sizes, order, check, enough=lambda turn: turn == turns or (early and bool(self._judged))
        )
        self._given[shard] = holder, got[-1]

    async def _settle(self, shard: int, taking: asyncio.Task[None] | None) -> None:
        """Get an accepted shard as the chain has it, from whoever gives it or by own means, and serve it."""
        if taking is not None:
            with contextlib.suppress(TransportError):
                await taking
        if self._final(shard) is None and shard in self._given:
            holder, _ = self._given[shard]
            with contextlib.suppress(BadReply):
                self._courier.blame(holder, self._mismatch(holder, shard))
        pair = self._plan.holders(shard)
        everybody = (*pair, *(hotkey for hotkey in self._plan.replicas if hotkey not in pair))
        if self._final(shard) is None:
            with contextlib.suppress(TransportError):
                await self._take(shard, everybody, turns=TAKE_TURNS)
        if self._final(shard) is None:
            await self._judge(shard)
        if self._final(shard) is None:
            await self._take(shard, everybody)
        final = self._final(shard)
        if final is not None:
            self._serve(shard, final)

    def _mismatch(self, holder: str, shard: int) -> str:
        """What to say of a holder that gave a shard of another digest than the accepted one.

        Raises `BadReply` unless it published that digest itself: a late holder's own result may be the true one.
        """
        if self._judged[shard].published.get(holder) != self._truth[shard]:
            raise BadReply(f"gave a merged shard {shard} that was not accepted")
        return f"gave a merged shard {shard} of another digest than it published"

    def _final(self, shard: int) -> Shard | None:
        """The accepted shard, if it is here."""
        here = [self._computed.get(shard), self._given[shard][1] if shard in self._given else None]
        return next((found for found in here if found is not None and found.digest == self._truth[shard]), None)

    def _judging(self) -> list[asyncio.Task[None]]:
        """Compare what was published with what is computed here: own shards, contested ones, and the own choice."""
        secret = hashlib.sha256(self._terms.secret + self._terms.number.to_bytes(8, "little")).digest()
        choice = recheck(self._plan, self._judged, self._desk.hotkey, secret)
        return [
            self._start(self._judge(shard))
            for shard, verdict in enumerate(self._judged)
            if verdict.contested or shard == choice or shard in self._computed
        ]

    async def _judge(self, shard: int) -> None:
        """Name the holders that published another digest than the one computed here."""
        computed = self._computed.get(shard)
        if computed is None:
            try:
                computed = await self._recompute(shard, leg=RECHECK, turns=RECHECK_TURNS)
            except TransportError:
                return  # pieces nobody has any more prove nothing
        if computed is not None:
            self._computed[shard] = computed
            for liar in self._judged[shard].liars(computed.digest):
                self._liars[liar] = tuple(sorted({*self._liars.get(liar, ()), shard}))

    def _conclude(self, listed: tuple[Source, ...]) -> Outcome:
        public = Merged(self._public.theta.clone(), self._public.momentum.clone())
        incomplete = False
        for shard in self._truth:
            final = self._final(shard)
            if final is None:
                incomplete = True
                continue
            here = part_of(public, self._parts[shard])
            here.theta.copy_(final.state.theta)
            here.momentum.copy_(final.state.momentum)
        shards = sorted(self._truth)
        return self._outcome(
            listed,
            public,
            merged=(self._parts[shard] for shard in shards),
            taken=(self._parts[shard] for shard in shards if self._counts(shard)),
            incomplete=incomplete,
        )

    def _counts(self, shard: int) -> bool:
        """Whether this replica's own piece is in the shard: its holders have it and its content is valid."""
        me = self._desk.hotkey
        source = next((source for source in self._sources[shard] if source.hotkey == me), None)
        return source is not None and self._delta(source, shard) is not None
