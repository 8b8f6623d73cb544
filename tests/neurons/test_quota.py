"""Who may have how much of a miner's evidence, and how fast: at both ends, to the byte."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import neurons.quota
import subnet.trust.quota
from model.config import preset
from model.layout import Layout
from model.optimizer import Kind
from model.split import split
from neurons.fetching import NamedState, Source, Spent, Withheld
from neurons.node import Neighbourhood
from neurons.quota import BURST, IN_WORK, Audience, Bucket, Uplink
from subnet.identity import Identity
from subnet.messages import EvidenceRequest, Shapes, StateRequest, UnitRequest, WindowRequest
from subnet.swarm.roster import Roster
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Busy, OverQuota, UnknownHotkey
from subnet.transport.shaping import Link, Shaper
from subnet.transport.synapse import TensorSpec
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import Evidence
from subnet.trust.quota import (
    LEAST_UPLINK,
    MOST_VALIDATORS,
    RETRIES,
    SMALLEST_SHARE,
    UPLINK_SHARE,
    Sizes,
    joiners_part,
    least_rate,
    others_rate,
    rates,
    validators_part,
)
from subnet.trust.step import spans_of
from subnet.trust.tree import HASH_BYTES, PIECE_BYTES, longest_proof, pieces_in, pieces_of
from tests.neurons.test_evidence import Shown, shown
from tests.virtual import run

SIZES = Sizes(weights=100, flat=333, state=1000, looks=50, forward=10, backward=30)
ONE, TWO = Identity.from_uri("//reader-one"), Identity.from_uri("//reader-two")


def head(version: int, *, forward: int = 2, backward: int = 1) -> WindowHead:
    root = bytes(32)
    return WindowHead(
        version=version,
        steps=0,
        slot=0,
        forward=forward,
        backward=backward,
        merged=0,
        weights=root,
        optimizer=root,
        units=root,
        next_weights=root,
        next_optimizer=root,
    )


# -- how much ------------------------------------------------------------------------------------------------------


def test_a_validators_part_follows_its_stake_and_holds_a_window_at_least() -> None:
    picked = [head(0), head(1, backward=4)]
    held = (2050 + 20 + 30) + (2050 + 20 + 120)
    assert sum(map(SIZES.window, picked)) == held
    assert validators_part(SIZES, picked, tables=7, share=1.0) == 7 + held
    assert validators_part(SIZES, picked, tables=7, share=0.75) == 7 + 3218, "rounded up"
    assert validators_part(SIZES, picked, tables=7, share=0.01) == 7 + 2190, "the largest window"
    assert validators_part(SIZES, [], tables=7, share=1.0) == 7
    assert joiners_part(SIZES, tables=7) == 7 + 100 + 4 * 30


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("hidden", [8, 64, 1024])
def test_all_checks_of_a_window_are_within_its_part(hidden: int, kind: Kind) -> None:
    """However small a stage is, where proofs and pieces that are asked for twice are most of it."""
    boundary = replace(preset("pico").boundary, width=4, rank=2)
    config = replace(preset("pico"), hidden=hidden, ffn=2 * hidden, heads=2, kv_heads=1, vocab=64, boundary=boundary)
    plan = split(config, 2)[0]
    layout = Layout.planned(config, plan, kind)
    sizes = Sizes.of(plan, layout, Shapes(TensorSpec(torch.bfloat16, (1, 8, 4)), TensorSpec(torch.int64, (1, 8))))

    def cost(count: int, *spans: range) -> int:
        asked = [index for span in spans for index in pieces_in(span)]
        data = sum(min(PIECE_BYTES, 4 * count - index * PIECE_BYTES) for index in asked)
        return data + len(asked) * HASH_BYTES * longest_proof(pieces_of(4 * count))

    last = pieces_of(sizes.flat) - 1
    looks = [spans_of(piece, layout) for piece in ([0] if last == 0 else [0, last])]
    step = sum(2 * (cost(layout.values, span) + cost(layout.moments, span, later)) for span, later in looks)
    whole = max((place.span for place in layout.matrices), key=len, default=range(0))
    matrix = 2 * (cost(layout.values, looks[0][0]) + cost(layout.moments, whole))
    taken_over = 2 * cost(layout.values, looks[0][0])
    merged = replace(head(0), merged=1)
    units = 2 * sizes.forward + sizes.backward
    assert sizes.weights + step + matrix + taken_over + units <= sizes.window(merged)


def test_a_quota_is_exact_to_the_byte() -> None:
    audience, picked = Audience({"one": 0.5, "two": 0.5}, SIZES), [head(0), head(1)]
    limit = audience.limit("one", picked, tables=7)
    assert limit == RETRIES * (7 + 2100)
    assert audience.limit("joiner", picked, tables=7) == RETRIES * joiners_part(SIZES, tables=7)
    audience.take("one", limit - 10)
    audience.require("one", 10, limit)
    with pytest.raises(OverQuota, match=rf"^11 bytes after {limit - 10} of this round, limit {limit} for one; ask for"):
        audience.require("one", 11, limit)
    audience.take("one", 10)
    with pytest.raises(OverQuota):
        audience.require("one", 1, limit)
    audience.require("two", limit, limit)


def test_who_has_no_stake_asks_for_no_more_than_anybody_gets() -> None:
    picked = [head(0)]
    nobody, idle = (Audience(shares, SIZES).limit("v", picked, tables=7) for shares in ({}, {"v": 0.0, "w": 1.0}))
    assert joiners_part(SIZES, tables=7) * RETRIES <= min(nobody, idle)


# -- how fast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [{"a": 1.0}, {"a": 0.7, "b": 0.3, "c": 0.0}, {str(i): 1 / 64 for i in range(64)}])
def test_all_rates_together_are_a_tenth_of_the_uplink(shares: dict[str, float]) -> None:
    found = rates(shares, uplink_bps=80e6)
    assert sum(found.values()) + others_rate(uplink_bps=80e6) == pytest.approx(UPLINK_SHARE * 80e6 / 8)


def test_who_reads_can_count_on_its_rate_whatever_the_stakes_are() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        stakes = generator.pareto(0.6, generator.integers(1, MOST_VALIDATORS + 1)) + 1e-9
        shares = {str(index): float(stake / stakes.sum()) for index, stake in enumerate(stakes)}
        found = rates(shares, uplink_bps=LEAST_UPLINK)
        assert all(least_rate(share) <= found[name] * (1 + 1e-9) for name, share in shares.items())
    assert least_rate(0.0) == least_rate(SMALLEST_SHARE) > 0


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    async def play() -> None:
        loop, bucket, given = asyncio.get_running_loop(), Bucket(1000.0), 0
        while loop.time() < 100:
            wait = bucket.wait()
            if wait:
                await asyncio.sleep(wait)
                continue
            bucket.take(700)
            given += 700
        assert 1000 * (100 + BURST) - 700 <= given <= 1000 * (100 + BURST) + 700
        await asyncio.sleep(1000)
        assert bucket.wait() == 0
        bucket.take(int(1000 * BURST) + 5000)
        assert bucket.wait() == pytest.approx(5, abs=0.01)

    run(play())


def test_one_callers_debt_is_nobody_elses() -> None:
    async def play() -> None:
        uplink = Uplink(80e3)
        uplink.share_out(0, {"one": 0.5, "two": 0.5})
        with uplink.working("one"):
            uplink.take("one", 100_000)
        with pytest.raises(Busy, match="evidence has its tenth of this uplink") as caught, uplink.working("one"):
            pass
        wait = caught.value.retry_after
        assert wait == pytest.approx((100_000 - 450 * BURST) / 450)
        for caller in ("two", "joiner"):
            with uplink.working(caller):
                pass
        uplink.take("joiner", 100_000)
        with pytest.raises(Busy), uplink.working("another joiner"):
            pass
        uplink.share_out(1, {"one": 1.0})
        await asyncio.sleep(wait / 2 + 1)
        with uplink.working("one"):
            pass

    run(play())


def test_few_requests_of_one_caller_are_worked_on_at_a_time() -> None:
    async def play() -> None:
        uplink, going, done = Uplink(1e9), asyncio.Event(), asyncio.Event()
        inside = 0

        async def ask() -> None:
            nonlocal inside
            with uplink.working("one"):
                inside += 1
                if inside == IN_WORK:
                    going.set()
                await done.wait()

        asking = [asyncio.create_task(ask()) for _ in range(IN_WORK)]
        await going.wait()
        with pytest.raises(Busy, match=f"{IN_WORK} requests of one are worked on, limit {IN_WORK}"):
            await ask()
        with uplink.working("two"):
            pass
        done.set()
        await asyncio.gather(*asking)
        with uplink.working("one"):
            pass

    run(play())


# -- over real axons -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EvidenceRequest, WindowRequest, StateRequest, UnitRequest])
def test_who_is_in_no_roster_and_has_no_permit_is_refused_at_the_door(kind: type) -> None:
    neighbours = Neighbourhood(roster=Roster.of([["5Miner"]]), validators=frozenset({"5Validator"}))
    neighbours.allow("5Validator", kind.route)
    neighbours.allow("5Miner", kind.route)
    with pytest.raises(UnknownHotkey):
        neighbours.allow("5Stranger", kind.route)


async def test_who_asks_without_end_gets_its_quota_and_no_byte_more(tmp_path: Path) -> None:
    async with shown(tmp_path) as show:
        evidence = await show.close(count=1)
        (version,) = show.held.picked
        source = show.source()
        root = next(entry.weights for entry in evidence.heads if entry.version == version)
        limit = RETRIES * validators_part(
            show.sizes,
            [entry for entry in evidence.heads if entry.version == version],
            tables=evidence.size,
            share=1.0,
        )
        sizes: list[int] = []

        async def take() -> None:
            while True:
                before = source.received
                await source.pieces(version, [(NamedState("weights", root, show.values), 0)])
                sizes.append(source.received - before)

        with pytest.raises(Withheld, match=rf"limit {limit} for {show.asker.identity.hotkey}"):
            await take()
        assert limit - sizes[-1] < sum(sizes) <= limit


async def read_all(show: Shown, source: Source, evidence: Evidence) -> None:
    """Everything that there is, round after round, until the reader has had its part."""
    values = show.values
    for _ in range(100):
        for entry in evidence.heads:
            for part, count in (("weights", values), ("optimizer", 2 * values), ("next_optimizer", 2 * values)):
                for index in range(pieces_of(4 * count)):
                    root = getattr(entry, part)
                    state = NamedState(part, root, count)  # type: ignore[arg-type]
                    await source.pieces(entry.version, [(state, index)])
            for leaf in evidence.window(entry.version):
                await source.unit(leaf)


async def test_two_validators_under_a_tight_quota_get_their_parts_and_accuse_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The miner's link is as slow as is allowed, and a reader's patience far shorter than what its tenth takes."""
    uplink, patience = 40e6, 1.0
    monkeypatch.setattr(subnet.trust.quota, "LEAST_UPLINK", uplink)
    monkeypatch.setattr(neurons.quota, "BURST", 0.5)
    loop = asyncio.get_running_loop()
    async with shown(tmp_path, uplink=uplink) as show:
        show.shares = {ONE.hotkey: 0.75, TWO.hotkey: 0.25}
        evidence = await show.close()
        show.miner.axon.shaper = Shaper(Link(up_bps=uplink, down_bps=uplink), np.random.default_rng(1))
        show.swarm.endpoints[show.miner.identity.hotkey] = show.miner.axon.endpoint
        start, sources = loop.time(), []

        async def reader(identity: Identity) -> float:
            async with Dendrite(identity, now_ns=show.asker.dendrite._now_ns) as dendrite:
                source = show.source(patience=patience, share=show.shares[identity.hotkey], dendrite=dendrite)
                sources.append(source)
                source.limit(evidence, evidence.heads)
                with pytest.raises(Spent):
                    await read_all(show, source, evidence)
                return loop.time() - start

        took = await asyncio.gather(reader(ONE), reader(TWO))
        picked, tables = list(evidence.heads), evidence.size
        for source, share in zip(sources, show.shares.values(), strict=True):
            part = validators_part(show.sizes, picked, tables=tables, share=share)
            assert part - 70_000 < source.received <= part
        assert min(took) > 2 * patience, "it was not tight"
        rate = UPLINK_SHARE * uplink / 8
        assert sum(source.received for source in sources) <= rate * (max(took) + 0.5) + 2 * 70_000
