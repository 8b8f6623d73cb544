"""What every running node has: keys, chain, manifest, axon, dendrite, event log, and who is around.

`Node.open` refuses to start on anything that cannot work (wrong manifest, missing wallet, unregistered hotkey, taken
port) with one line that names the remedy, before it has cost anybody anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from model.config import ConfigError
from model.data import Corpus, DataError, ShardEntry
from model.engine import OutOfRoomError
from model.layout import Layout
from model.split import StagePlan, split
from neurons.bootstrap import BootstrapError, RosterDesk, join_history
from neurons.callback import CallbackDesk
from neurons.config import NeuronConfig, parse
from neurons.history import History, HistoryError
from neurons.machine import DeviceError, Footprint, device_of, footprint, free_memory, open_files
from neurons.needs import least_files
from neurons.speed import SpeedDesk
from neurons.telemetry import NodeFailed, NodeStarted, ProcessHeld, RecordPublished, Telemetry
from subnet.chain import BittensorChain, Chain, ChainError
from subnet.identity import Identity, IdentityError
from subnet.manifest import LoadedManifest, Manifest, ManifestError, check_announced, check_space, load_manifest
from subnet.messages import CallBack, RosterRequest, Shapes, Speed
from subnet.metagraph import ChainState, Endpoint
from subnet.swarm import snapshot
from subnet.swarm.record import Record
from subnet.swarm.roster import Roster
from subnet.swarm.snapshot import SnapshotError
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Busy, PortTaken, UnknownHotkey
from subnet.transport.shaping import Link, Shaper
from subnet.transport.sockets import THIS_MACHINE, Sockets
from subnet.wallets import load_wallet

log = logging.getLogger("orion.neurons.node")

CONNECT_TIMEOUT = 30.0
CHAIN_STALL = 600.0
"""Seconds without any new block after which a node gives up on its chain."""

OPEN_ROUTES = frozenset({RosterRequest.route, CallBack.route, Speed.route})
"""Of use before one is in a roster."""
PUSH_ROUTES = frozenset({"forward", "backward", "holder", "input", "notice"})


class NodeError(Exception):
    """The node cannot go on: one line with the value and the remedy."""


@dataclass
class Neighbourhood:
    """Who is around, as the last pinned state and the round's roster say; decides who may use which route."""

    roster: Roster | None = None
    endpoints: dict[str, str] = field(default_factory=dict)
    validators: frozenset[str] = frozenset()
    registered: frozenset[str] = frozenset()

    left: frozenset[str] = frozenset()
    """Who was in the roster before: its merge, and the audit of its work, are not over."""

    _block: int = -1
    """Of the newest state seen."""

    def update(self, roster: Roster, state: ChainState) -> None:
        if self.roster is not None and self.roster.round < roster.round:
            self.left = self.roster.members
        self.roster = roster
        self.relocate(state)

    def endpoint(self, hotkey: str) -> str | None:
        """Where a hotkey's axon is, None if it serves none."""
        return self.endpoints.get(hotkey)

    def relocate(self, state: ChainState) -> None:
        """Who is registered and where, as of the newest state seen: who was restarted may have another address."""
        if state.head.number <= self._block:
            return
        self._block = state.head.number
        self.endpoints = {neuron.hotkey: neuron.endpoint.url for neuron in state.neurons if neuron.endpoint is not None}
        self.validators = frozenset(neuron.hotkey for neuron in state.neurons if neuron.validator_permit)
        self.registered = frozenset(neuron.hotkey for neuron in state.neurons)

    def allow(self, hotkey: str, route: str) -> None:
        """Pushes come from who counts; the rest is fetched by whoever is in the roster or was in the last, and by
        permitted validators; the roster itself, a call back and a measurement, by anyone registered."""
        opens = route in OPEN_ROUTES and hotkey in self.registered
        if self.roster is None:
            if opens:
                return
            raise Busy("the first roster is not known here yet", "push again after the pause", retry_after=0.2)
        reads = hotkey in self.validators or hotkey in self.left or self.roster.state_of(hotkey) is not None
        if hotkey in self.roster.members or (reads and route not in PUSH_ROUTES) or opens:
            return
        raise UnknownHotkey(
            f"{hotkey[:60]} may not use {route} in round {self.roster.round}",
            "register, serve an axon and publish a record for this run; validators need a permit",
        )


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a node has of the world besides files and its chain. A simulation gives it another one."""

    now: Callable[[], float] = time.time
    """Seconds since 1970."""
    now_ns: Callable[[], int] = time.time_ns
    entropy: Callable[[int], bytes] = secrets.token_bytes
    """So many bytes that nobody can guess."""
    free_memory: Callable[[], int] = free_memory
    """Bytes that the process can take."""
    footprint: Callable[[], Footprint] = footprint
    """What it holds."""
    sockets: Sockets = THIS_MACHINE


@dataclass
class Node:
    role: str
    config: NeuronConfig
    loaded: LoadedManifest
    identity: Identity
    chain: Chain
    corpus: Corpus
    plans: tuple[StagePlan, ...]
    shapes: Shapes
    neighbours: Neighbourhood
    axon: Axon
    dendrite: Dendrite
    telemetry: Telemetry
    _stack: AsyncExitStack
    around: Surroundings = field(default_factory=Surroundings)
    device: torch.device = field(default=torch.device("cpu"))
    """Where it computes."""
    flags: int = 0
    """What all records of this node say, see `subnet.swarm.record.Flags`."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why the last refresh moved whom."""
    convicts: bytes = b""
    """A validator's: short names of those whom it holds convicted."""
    _said: Record | None = None

    def __post_init__(self) -> None:
        self.history = History(self.loaded, self.state)
        self._rosters = RosterDesk(self.loaded.run_id)
        self._rosters.open(self.axon)
        CallbackDesk(self.config.announce).open(self.axon)
        SpeedDesk().open(self.axon)

    @classmethod
    async def open(cls, config: NeuronConfig, *, role: str) -> Node:
        """Check everything, connect, listen. Raises one of the typed errors of what was checked."""
        if config.threads:
            torch.set_num_threads(config.threads)
        loaded = load_manifest(config.manifest)
        wallet = load_wallet(config.wallet, config.hotkey, config.wallet_path)

        async def connect() -> BittensorChain:
            return await BittensorChain.connect(
                config.network, config.netuid, wallet, timeout=CONNECT_TIMEOUT, archive=config.archive
            )

        return await cls.stand(
            config, role=role, loaded=loaded, identity=Identity(wallet), connect=connect, around=Surroundings()
        )

    @classmethod
    async def stand(
        cls,
        config: NeuronConfig,
        *,
        role: str,
        loaded: LoadedManifest,
        identity: Identity,
        connect: Callable[[], Awaitable[Chain]],
        around: Surroundings,
    ) -> Node:
        """`open` from what it has read and where it is."""
        device = device_of(config.device) if role == "miner" else torch.device("cpu")
        manifest = loaded.manifest
        async with AsyncExitStack() as stack:
            telemetry = Telemetry.open(config.out / "events" / f"{config.name}.jsonl", now=around.now)
            stack.callback(telemetry.close)
            corpus = await asyncio.to_thread(open_corpus, loaded, config.data)
            chain = await connect()
            stack.push_async_callback(chain.close)
            state = await chain.state_at((await chain.finalized()).number)
            authority = state.by_hotkey(manifest.run.authority)
            check_announced(loaded, authority.record if authority else None)
            check_space(manifest, state.tempo, (await chain.space()).limit)
            if state.by_hotkey(identity.hotkey) is None:
                raise NodeError(
                    f"hotkey {identity.hotkey} is not registered on netuid {config.netuid}: run "
                    f"`btcli subnets register --netuid {config.netuid} -w {config.wallet} -H {config.hotkey}`"
                )
            if identity.hotkey == manifest.run.authority:
                raise NodeError(
                    f"hotkey {identity.hotkey} is the run's authority, whose commitment names the manifest and "
                    "would be lost under a node's record: give --hotkey another one"
                )
            neighbours = Neighbourhood()
            neighbours.relocate(state)
            shaper = None if config.link is None else open_link(config.link, identity.hotkey)
            _require_files(manifest)
            _require_address(config)
            axon = Axon(
                Admission(identity.hotkey, allow=neighbours.allow, now_ns=around.now_ns),
                host=config.host,
                port=config.port,
                shaper=shaper,
                sockets=around.sockets,
            )
            stack.push_async_callback(axon.stop)
            dendrite = Dendrite(identity, now_ns=around.now_ns, shaper=shaper, sockets=around.sockets)
            await stack.enter_async_context(dendrite)
            return cls(
                role=role,
                config=config,
                loaded=loaded,
                identity=identity,
                chain=chain,
                corpus=corpus,
                plans=split(manifest.model.config(), manifest.swarm.stages),
                shapes=Shapes.of(manifest),
                neighbours=neighbours,
                axon=axon,
                dendrite=dendrite,
                telemetry=telemetry,
                _stack=stack.pop_all(),
                around=around,
                device=device,
            )

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Of each stage's weights and moments."""
        manifest = self.loaded.manifest
        config, kind = manifest.model.config(), manifest.optimizer.kind
        return tuple(Layout.planned(config, plan, kind) for plan in self.plans)

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """Parameters of each stage."""
        return tuple(layout.values for layout in self.layouts)

    @property
    def downloads(self) -> Path:
        """Folder for what has arrived of a public state."""
        return self.config.out / "downloads" / self.config.name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def listen(self) -> None:
        """Start the axon and publish its address."""
        await self.axon.start()
        endpoint = Endpoint(self.config.announce, self.axon.port)
        await self.chain.serve_axon(endpoint)
        self.telemetry.emit(NodeStarted(hotkey=self.identity.hotkey, role=self.role, endpoint=endpoint.url))

    async def wait(self, block: int) -> None:
        """Until `block` is finalized, however long that takes while others are."""
        await self.chain.passed(block, stall=CHAIN_STALL)

    async def state(self, block: int) -> ChainState:
        """The state at `block`, once it is finalized."""
        await self.wait(block)
        state = await self.chain.state_at(block)
        self.neighbours.relocate(state)
        return state

    async def seed(self, block: int, purpose: str) -> bytes:
        """A seed nobody knew before `block` was made."""
        await self.wait(block)
        return seed_of(await self.chain.block_hash(block), purpose)

    async def publish(self, record: Record, *, until: int | None = None) -> int | None:
        """Put a record on chain, with what each of them says: the newest roster, and what this node wants.

        Returns the block that includes it, None if it missed its deadline. Deadlines are kept by reading the chain at
        their block, so a late record costs this round's part, not the node; `until` only keeps it out of later phases.
        """
        self._said = record
        newest = self.history.newest
        record = replace(
            record,
            flags=record.flags | self.flags,
            roster=newest.digest if newest is not None else record.roster,
            shards=record.shards or self.convicts,
        )
        try:
            block = await self.chain.publish(record.encode(), record.shards, until_block=until)
            space = await self.chain.space()
        except ChainError as error:
            log.warning("record of round %d (%s) missed block %s: %s", record.round, record.phase.name, until, error)
            return None
        self.telemetry.emit(
            RecordPublished(
                phase=record.phase.name.lower(),
                round=record.round,
                block=block,
                bytes=len(record.encode()) + len(record.shards),
                epoch_used=space.used,
                epoch_limit=space.limit,
            )
        )
        return block

    async def say_again(self) -> None:
        """Put the last record on chain once more: what all of them say has changed."""
        if self._said is not None:
            await self.publish(self._said)

    async def enter(self) -> Roster:
        """The roster in force: from this node's disk if it has been here lately, from peers if the run has begun, else
        from round 0 on, which may still be to come."""
        for begin in (self._from_disk, self._from_peers):
            try:
                roster = await self._newest(await begin())
            except (BootstrapError, HistoryError, ChainError) as error:
                log.info("%s", error)
                continue
            await self._enter(roster)
            return roster
        self.history = History(self.loaded, self.state)
        await self.history.begin()
        roster = await self._newest(self.history)
        await self._enter(roster)
        return roster

    async def _from_disk(self) -> History:
        known = await asyncio.to_thread(snapshot.kept, self._rosters_folder)
        if not known:
            raise BootstrapError("this node has no roster of the run yet")
        log.info("going on from the roster of round %d", known[-1].round)
        return History(self.loaded, self.state, known=known[-2:])

    async def _from_peers(self) -> History:
        state = await self.chain.state_at((await self.chain.finalized()).number)
        return await join_history(self.dendrite, self.loaded, state, self.state, asker=self.identity.hotkey)

    async def _newest(self, history: History) -> Roster:
        """Every refresh up to now."""
        self.history = history
        return await history.catch_up(self.chain)

    async def next_roster(self) -> Roster:
        """The recurrence at the first block of the next round."""
        refreshed = await self.history.step()
        self.reasons = refreshed.reasons
        await self._enter(refreshed.roster)
        return refreshed.roster

    async def _enter(self, roster: Roster) -> None:
        """Keep the roster before anything is done by it, and let in who is in it."""
        await asyncio.to_thread(snapshot.write, self._rosters_folder, roster)
        self._rosters.keep(roster)
        self.neighbours.update(roster, await self.state(roster.block))
        held = self.around.footprint()
        self.telemetry.emit(ProcessHeld(round=roster.round, bytes=held.bytes, files=held.files, tasks=held.tasks))

    @property
    def _rosters_folder(self) -> Path:
        return self.config.out / "rosters" / self.loaded.run_id.hex() / self.config.name


def _require_files(manifest: Manifest) -> None:
    may, least = open_files()[0], least_files(manifest)
    if may < least:
        raise NodeError(
            f"{may} files may be open at a time, and connections of this run take up to {least}: run "
            f"`ulimit -n {least}` in the shell that starts the node"
        )


def _require_address(config: NeuronConfig) -> None:
    """One that can be published: `--host` alone may be all addresses."""
    try:
        if ipaddress.ip_address(config.announce).is_unspecified:
            raise NodeError(
                f"--announce {config.announce} is no address that others could reach: give this machine's public one"
            )
    except ValueError as error:
        raise NodeError(f"--announce {config.announce!r} is no IPv4 or IPv6 address: give it in digits") from error


def seed_of(block_hash: str, purpose: str) -> bytes:
    """H(purpose ‖ block hash)."""
    return hashlib.sha256(purpose.encode() + bytes.fromhex(block_hash.removeprefix("0x"))).digest()


def open_link(link: Link, hotkey: str) -> Shaper:
    """The emulated link of this node; what it loses is a function of the hotkey and of what is sent."""
    seed = int.from_bytes(hashlib.sha256(b"orion/link/1" + hotkey.encode()).digest(), "little")
    log.info("emulated link: %s", link)
    return Shaper(link, np.random.default_rng(seed))


def open_corpus(loaded: LoadedManifest, folder: Path) -> Corpus:
    """The manifest's token shards, each checked against its SHA-256. Raises `DataError`."""
    data = loaded.manifest.data
    corpus = Corpus.open(
        folder,
        [ShardEntry(name=shard.name, sha256=shard.sha256, dtype=shard.dtype) for shard in data.shards],
        seed=loaded.manifest.run.seed,
        batch=data.batch,
        tokens=data.sequence,
        vocab=loaded.manifest.model.vocab,
        held_out=data.held_out,
    )
    if data.validation_batches > corpus.validation_samples:
        raise DataError(
            f"data.validation_batches {data.validation_batches} are more than the {corpus.validation_samples} batches "
            "held out: take a manifest that lowers it or raises data.held_out"
        )
    return corpus


def main(argv: list[str], *, role: str, description: str, body: Callable[[Node], Awaitable[None]]) -> int:
    """Run a neuron until it is done or told to stop. 0 done, 1 failed, 130 stopped."""
    config = parse(argv, os.environ, program=f"orion {role}", description=description)
    config.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)

    async def whole() -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio.run gives one
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or a command that stops its nodes
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        async with await Node.open(config, role=role) as node:
            try:
                await body(node)
            except Exception as error:
                node.telemetry.emit(NodeFailed(message=" ".join(str(error).split()) or type(error).__name__))
                raise

    try:
        asyncio.run(whole())
    except (
        NodeError,
        DeviceError,
        OutOfRoomError,
        ChainError,
        IdentityError,
        ManifestError,
        ConfigError,
        DataError,
        PortTaken,
        SnapshotError,
        HistoryError,
    ) as error:
        log.error("%s", error)  # noqa: TRY400 - the line is for a person; the cause is chained in it
        return 1
    except asyncio.CancelledError:
        log.info("stopped")
        return 130
    return 0
