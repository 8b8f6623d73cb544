"""What every running node has: keys, chain, manifest, axon, dendrite, event log, and who is around.

`Node.open` refuses to start on anything that cannot work (wrong manifest, missing wallet, unregistered hotkey, taken
port) with one line that names the remedy, before it has cost anybody anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from model.accounting import stage_parameters
from model.config import ConfigError
from model.data import Corpus, DataError, ShardEntry
from model.split import StagePlan, split
from neurons.config import NeuronConfig, parse
from neurons.telemetry import NodeFailed, NodeStarted, Telemetry
from subnet.chain import BittensorChain, Chain, ChainError
from subnet.identity import Identity, IdentityError
from subnet.manifest import LoadedManifest, ManifestError, check_announced, load_manifest
from subnet.messages import Shapes
from subnet.metagraph import ChainState, Endpoint
from subnet.swarm.roster import Roster, advance, gather
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Busy, PortTaken, UnknownHotkey
from subnet.wallets import load_wallet

log = logging.getLogger("orion.neurons.node")

CONNECT_TIMEOUT = 30.0
CHAIN_STALL = 600.0
"""Seconds without the awaited block after which a node gives up on its chain."""

PUSH_ROUTES = frozenset({"forward", "backward", "input", "notice"})


class NodeError(Exception):
    """The node cannot go on: one line with the value and the remedy."""


@dataclass
class Neighbourhood:
    """Who is around, as the last pinned state and the round's roster say; decides who may use which route."""

    roster: Roster | None = None
    endpoints: dict[str, str] = field(default_factory=dict)
    validators: frozenset[str] = frozenset()

    def update(self, roster: Roster, state: ChainState) -> None:
        self.roster = roster
        self.endpoints = {neuron.hotkey: neuron.endpoint.url for neuron in state.neurons if neuron.endpoint is not None}
        self.validators = frozenset(neuron.hotkey for neuron in state.neurons if neuron.validator_permit)

    def allow(self, hotkey: str, route: str) -> None:
        """Pushes come from roster members; evidence is fetched by them and by permitted validators."""
        if self.roster is None:
            raise Busy("the first roster is not known here yet", "push again after the pause", retry_after=0.2)
        if hotkey in self.roster.members or (route not in PUSH_ROUTES and hotkey in self.validators):
            return
        raise UnknownHotkey(
            f"{hotkey[:60]} may not use {route} in round {self.roster.round}",
            "register, serve an axon and publish a record for this run; validators need a permit",
        )


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

    @classmethod
    async def open(cls, config: NeuronConfig, *, role: str) -> Node:
        """Check everything, connect, listen. Raises one of the typed errors of what was checked."""
        if config.threads:
            torch.set_num_threads(config.threads)
        loaded = load_manifest(config.manifest)
        manifest = loaded.manifest
        wallet = load_wallet(config.wallet, config.hotkey, config.wallet_path)
        identity = Identity(wallet)
        async with AsyncExitStack() as stack:
            telemetry = Telemetry.open(config.out / "events" / f"{config.name}.jsonl", now=time.time)
            stack.callback(telemetry.close)
            corpus = await asyncio.to_thread(open_corpus, loaded, config.data)
            chain = await BittensorChain.connect(
                config.network, config.netuid, wallet, timeout=CONNECT_TIMEOUT, archive=config.archive
            )
            stack.push_async_callback(chain.close)
            state = await chain.state_at((await chain.finalized()).number)
            authority = state.by_hotkey(manifest.run.authority)
            check_announced(loaded, authority.record if authority else None)
            if state.by_hotkey(identity.hotkey) is None:
                raise NodeError(
                    f"hotkey {identity.hotkey} is not registered on netuid {config.netuid}: run "
                    f"`btcli subnets register --netuid {config.netuid} -w {config.wallet} -H {config.hotkey}`"
                )
            neighbours = Neighbourhood()
            axon = Axon(
                Admission(identity.hotkey, allow=neighbours.allow, now_ns=time.time_ns),
                host=config.host,
                port=config.port,
            )
            stack.push_async_callback(axon.stop)
            dendrite = Dendrite(identity, now_ns=time.time_ns)
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
            )

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """Parameters of each stage."""
        config = self.loaded.manifest.model.config()
        return tuple(stage_parameters(config, plan) for plan in self.plans)

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
        """Until `block` is finalized."""
        await self.chain.wait_for_block(block, timeout=CHAIN_STALL)

    async def state(self, block: int) -> ChainState:
        """The state at `block`, once it is finalized."""
        await self.wait(block)
        return await self.chain.state_at(block)

    async def seed(self, block: int, purpose: str) -> bytes:
        """A seed nobody knew before `block` was made: H(purpose ‖ its hash)."""
        await self.wait(block)
        block_hash = await self.chain.block_hash(block)
        return hashlib.sha256(purpose.encode() + bytes.fromhex(block_hash.removeprefix("0x"))).digest()

    async def first_roster(self) -> tuple[Roster, int]:
        """Round 0's roster and first block: the first gathering block where enough valid hotkeys are there."""
        manifest = self.loaded.manifest
        block = manifest.run.activation_block
        while True:
            state = await self.state(block)
            roster = gather(state, self.loaded.run_id, stages=manifest.swarm.stages, replicas=manifest.swarm.replicas)
            if roster is not None:
                self.neighbours.update(roster, state)
                return roster, block
            block += manifest.swarm.gather_blocks

    async def next_roster(self, previous: Roster, block: int) -> Roster:
        """The recurrence at the first block of the next round."""
        state = await self.state(block)
        before = block - self.loaded.manifest.round.length
        roster = advance(previous, state, self.loaded.run_id, fresh_from=before)
        self.neighbours.update(roster, state)
        return roster


def open_corpus(loaded: LoadedManifest, folder: Path) -> Corpus:
    """The manifest's token shards, each checked against its SHA-256."""
    data = loaded.manifest.data
    return Corpus.open(
        folder,
        [ShardEntry(name=shard.name, sha256=shard.sha256, dtype=shard.dtype) for shard in data.shards],
        seed=loaded.manifest.run.seed,
        batch=data.batch,
        tokens=data.sequence,
        vocab=loaded.manifest.model.vocab,
        held_out=data.held_out,
    )


def main(argv: list[str], *, role: str, description: str, body: Callable[[Node], Awaitable[None]]) -> int:
    """Run a neuron until it is done or told to stop. 0 done, 1 failed, 130 stopped."""
    config = parse(argv, program=f"python -m neurons.{role}", description=description)
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
        ChainError,
        IdentityError,
        ManifestError,
        ConfigError,
        DataError,
        PortTaken,
    ) as error:
        log.error("%s", error)  # noqa: TRY400 - the line is for a person; the cause is chained in it
        return 1
    except asyncio.CancelledError:
        log.info("stopped")
        return 130
    return 0
