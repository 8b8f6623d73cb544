"""The chain of a simulation: the local chain's blocks and pallets, without sockets, as each node sees them.

Extrinsics are signed, checked and run as on the local chain; `SimChain` does for one node what `BittensorChain` does
over the SDK. Block hashes are drawn from the seed, so that nobody can know one before its block, and everybody draws
the same in the next run.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar, cast

import bittensor_core
import numpy as np

from subnet import era
from subnet.chain_errors import ChainRefused, ChainUnreachable, NotRegistered
from subnet.localchain import extrinsic, genesis, neurons
from subnet.localchain.blocks import Chain
from subnet.localchain.errors import RpcError
from subnet.localchain.genesis import ChainConfig
from subnet.localchain.runtime_subnets import metagraph
from subnet.localchain.state import Snapshot
from subnet.metagraph import ChainState, Endpoint, Head, decode_neuron
from subnet.space import FIELD_LIMIT, Space, charge
from subnet.transport.protocol import PROTOCOL

T = TypeVar("T")

EPOCH_MS: Final = 1_700_000_000_000
"""When a simulation begins, milliseconds since 1970."""
TIMEOUT: Final = 30.0
_P: Final = "SubtensorModule."
_U16: Final = 65_535


@dataclass(eq=False)
class Blocks:
    """What all nodes share: the chain, and its pace.

    `block_time` is in seconds; `late` is the most blocks that an extrinsic takes until it is in the pool.
    """

    generator: np.random.Generator
    seed: int
    netuid: int
    tempo: int
    block_time: float
    late: int = 0
    stalled: bool = False
    """No block is made."""
    views: list[SimChain] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chain = Chain(ChainConfig(netuid=self.netuid, tempo=self.tempo, block_time=self.block_time))
        self.included: dict[bytes, int] = {}
        """Extrinsics that are in a block."""
        self._heads: dict[int, Head] = {}
        self._states: dict[int, ChainState] = {}
        self._times: dict[int, int] = {0: EPOCH_MS}

    @property
    def finalized(self) -> int:
        return self.chain.finalized.number

    async def run(self) -> None:
        """Make blocks, a little unevenly."""
        while True:
            await asyncio.sleep(self.block_time * (0.9 + 0.2 * self.generator.random()))
            if not self.stalled:
                self.make()

    def make(self) -> None:
        now = EPOCH_MS + int(asyncio.get_running_loop().time() * 1000)
        block, included, _ = self.chain.produce(now)
        self._times[block.number] = block.timestamp_ms
        self.included |= {tx.hash: block.number for tx in included}
        for view in self.views:
            view.hear(self.finalized)

    def head(self, number: int) -> Head:
        found = self._heads.get(number)
        if found is None:
            drawn = hashlib.blake2b(f"{self.seed}/{number}".encode(), digest_size=32).hexdigest()
            found = self._heads[number] = Head(number, "0x" + drawn, self._times[number])
        return found

    def snapshot(self, number: int) -> Snapshot:
        return self.chain.snapshot(number)

    def state(self, number: int) -> ChainState:
        found = self._states.get(number)
        if found is None:
            snapshot = self.snapshot(number)
            graph = cast("Mapping[str, list[object]]", metagraph(snapshot, [self.netuid]))
            hotkeys = [str(hotkey) for hotkey in graph["hotkeys"]]
            commitments = [snapshot.value("Commitments.CommitmentOf", self.netuid, hotkey) for hotkey in hotkeys]
            found = self._states[number] = ChainState(
                head=self.head(number),
                netuid=self.netuid,
                owner_hotkey=str(graph["owner_hotkey"]),
                tempo=self.tempo,
                neurons=tuple(decode_neuron(uid, graph, commitments[uid]) for uid in range(len(hotkeys))),
            )
        return found

    def weights_at(self, number: int) -> dict[int, dict[int, float]]:
        """Validator uid to {uid: weight}, each row summing to 1."""
        state, rows = self.snapshot(number), {}
        for uid in range(len(neurons.hotkeys(state, self.netuid))):
            row = state.pairs(_P + "Weights", self.netuid, uid)
            total = sum(value for _, value in row)
            if total:
                rows[uid] = {target: value / total for target, value in row}
        return rows

    def sign(self, key: bittensor_core.Keypair, pallet: str, function: str, args: Mapping[str, object]) -> bytes:
        """A call for the newest block, always valid: what the subnet's owner does before the simulation begins."""
        chain, call = self.chain, self.chain.codec.encode_call(pallet, function, args)
        first = chain.hash_of(0) or b""
        nonce = chain.next_nonce(key.ss58_address)
        return extrinsic.make(chain.codec, call, key, period=0, nonce=nonce, current=(0, first), genesis=first)

    def found(self, hotkeys: Mapping[str, float]) -> None:
        """Register hotkeys, each with so much TAO staked to it, and run the first epoch, which gives permits."""
        alice = genesis.keypair(genesis.OWNER_COLDKEY_URI)
        for hotkey in hotkeys:
            args: dict[str, object] = {"netuid": self.netuid, "hotkey": hotkey}
            self.chain.submit(self.sign(alice, "SubtensorModule", "burned_register", args))
        self.make()
        for hotkey, tao in hotkeys.items():
            if tao:
                staked = {"hotkey": hotkey, "netuid": self.netuid, "amount_staked": int(tao * genesis.RAO_PER_TAO)}
                self.chain.submit(self.sign(alice, "SubtensorModule", "add_stake", staked))
        while self.chain.head.number <= self.tempo + 1:
            self.make()

    def announce(self, announcement: bytes) -> None:
        """The authority's record."""
        owner = genesis.keypair(genesis.OWNER_HOTKEY_URI)
        info = {"fields": [{f"Raw{len(announcement)}": announcement}]}
        self.chain.submit(self.sign(owner, "Commitments", "set_commitment", {"netuid": self.netuid, "info": info}))
        self.make()
        self.make()


class SimChain:
    """The chain as one node sees it (`subnet.chain.Chain`)."""

    def __init__(self, blocks: Blocks, key: bittensor_core.Keypair, *, lag: float) -> None:
        """`lag`: seconds until a new finalized head is known here."""
        self._blocks = blocks
        self._key = key
        self._lag = lag
        self._finalized = blocks.finalized
        self._advanced = -1.0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._lock = asyncio.Lock()
        self._reached = asyncio.Event()
        self._reached.set()
        blocks.views.append(self)

    # -- the way to it ----------------------------------------------------------------------------------------------

    def reach(self, there: bool) -> None:
        """Whether its endpoint says anything."""
        if there:
            self._reached.set()
        else:
            self._reached.clear()

    def hear(self, number: int) -> None:
        asyncio.get_running_loop().call_later(self._lag, self._advance, number)

    def _advance(self, number: int) -> None:
        if not self._reached.is_set() or number <= self._finalized:
            return
        self._finalized, self._advanced = number, asyncio.get_running_loop().time()
        due = [future for block, future in self._waiting if block <= number]
        self._waiting = [entry for entry in self._waiting if entry[0] > number]
        for future in due:
            if not future.done():
                future.set_result(None)

    async def close(self) -> None:
        if self in self._blocks.views:
            self._blocks.views.remove(self)

    async def _read(self, what: str, read: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._reached.wait()
        except TimeoutError:
            raise ChainUnreachable(f"{what}: no answer within {TIMEOUT:g} s; check the network") from None
        await asyncio.sleep(self._lag / 4)
        return read()

    # -- blocks -----------------------------------------------------------------------------------------------------

    async def finalized(self) -> Head:
        return self._blocks.head(self._finalized)

    async def wait_for_block(self, number: int, *, timeout: float) -> Head:  # noqa: ASYNC109 - the protocol's
        await self._reach(number, timeout)
        return self._blocks.head(number)

    async def passed(self, number: int, *, stall: float) -> None:
        await self._reach(number, stall, anew=True)

    async def _reach(self, number: int, timeout: float, *, anew: bool = False) -> None:  # noqa: ASYNC109 - as above
        began = asyncio.get_running_loop().time()
        while number > self._finalized:
            entry = number, asyncio.get_running_loop().create_future()
            self._waiting.append(entry)
            try:
                async with asyncio.timeout_at(began + timeout):
                    await entry[1]
            except TimeoutError as error:
                if anew and self._advanced > began:
                    began = self._advanced
                    continue
                raise ChainUnreachable(f"block {number} was not finalized within {timeout:g} s") from error
            finally:
                self._waiting = [other for other in self._waiting if other is not entry]

    async def block_hash(self, number: int) -> str:
        if number > self._finalized:
            raise ChainRefused(f"block {number} is not final, the last one is {self._finalized}; wait for it first")
        return (await self._read(f"reading block {number}", lambda: self._blocks.head(number))).hash

    async def state_at(self, number: int) -> ChainState:
        if number > self._finalized:
            raise ChainRefused(f"block {number} is not final, the last one is {self._finalized}; wait for it first")
        return await self._read(f"reading block {number}", lambda: self._blocks.state(number))

    async def space(self) -> Space:
        return await self._read("reading the space for records", self._space)

    def _space(self) -> Space:
        netuid, hotkey = self._blocks.netuid, self._key.ss58_address
        state = self._blocks.snapshot(self._finalized)
        epoch = state.number(_P + "SubnetEpochIndex", netuid)
        usage = state.struct("Commitments.UsedSpaceOf", netuid, hotkey)
        used = cast("int", usage["used_space"]) if usage is not None and usage["last_epoch"] == epoch else 0
        following = state.number(_P + "LastEpochBlock", netuid) + self._blocks.tempo
        return Space(used, state.number("Commitments.MaxSpace"), epoch, following)

    async def weights(self) -> dict[int, dict[int, float]]:
        return await self._read("reading weights", lambda: self._blocks.weights_at(self._finalized))

    async def next_epoch_block(self) -> int:
        return (await self.space()).next_epoch

    # -- writing ----------------------------------------------------------------------------------------------------

    async def serve_axon(self, endpoint: Endpoint) -> None:
        ip = int.from_bytes(bytes(map(int, endpoint.ip.split("."))))
        args = {"version": PROTOCOL, "ip": ip, "port": endpoint.port, "ip_type": 4, "protocol": 4}
        args |= {"netuid": self._blocks.netuid, "placeholder1": 0, "placeholder2": 0}
        await self._submit(f"publishing {endpoint.url}", "SubtensorModule", "serve_axon", args)

    async def publish(self, record: bytes, shards: bytes = b"", *, until_block: int | None = None) -> int:
        parts = [record, shards] if shards else [record]
        what, needed = "publishing a record", charge(*map(len, parts))
        if max(map(len, parts)) > FIELD_LIMIT:
            raise ChainRefused(f"{what}: the chain takes {FIELD_LIMIT} bytes in a field")

        async def check() -> None:
            space = await self.space()
            if space.next_epoch > self._finalized + 1 and space.used + needed > space.limit:
                raise ChainRefused(f"{what}: {needed} bytes on top of {space.used} of {space.limit} in this epoch")

        info = {"fields": [{f"Raw{len(part)}": part} for part in parts]}
        args = {"netuid": self._blocks.netuid, "info": info}
        return await self._submit(what, "Commitments", "set_commitment", args, until=until_block, check=check)

    async def set_weights(self, weights: Mapping[int, float]) -> int:
        top = max(weights.values())
        scaled = {uid: round(weight / top * _U16) for uid, weight in weights.items()}
        args = {"netuid": self._blocks.netuid, "dests": list(scaled), "weights": list(scaled.values())}
        return await self._submit("setting weights", "SubtensorModule", "set_weights", args | {"version_key": 0})

    async def _submit(
        self,
        what: str,
        pallet: str,
        function: str,
        args: Mapping[str, object],
        *,
        until: int | None = None,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> int:
        """Sign with the hotkey, hand it to the pool, and follow it until its block is final."""
        blocks, chain = self._blocks, self._blocks.chain
        async with self._lock:
            if check is not None:
                await check()
            birth = self._finalized
            period = era.DEFAULT if until is None else era.ending_by(until, birth, what)
            call = chain.codec.encode_call(pallet, function, args)
            first, origin = chain.hash_of(birth) or b"", chain.hash_of(0) or b""
            nonce = await self._read(what, lambda: chain.next_nonce(self._key.ss58_address))
            raw = extrinsic.make(
                chain.codec, call, self._key, period=period, nonce=nonce, current=(birth, first), genesis=origin
            )
            if blocks.late:
                await asyncio.sleep(blocks.generator.random() * blocks.late * blocks.block_time)
            try:
                tx = await self._read(what, lambda: chain.submit(raw))
            except RpcError as error:
                raise ChainRefused(f"{what}: {error}") from error
            death = birth + period
            while tx.hash not in blocks.included:
                if self._finalized > death + chain.config.finality_lag:
                    raise ChainUnreachable(f"{what}: not included by block {death}")
                await self._reach(self._finalized + 1, TIMEOUT + (period + 8) * blocks.block_time)
            number = blocks.included[tx.hash]
            await self._reach(number, TIMEOUT + 8 * blocks.block_time)
        self._look(what, tx, number)
        return number

    def _look(self, what: str, tx: extrinsic.Extrinsic, number: int) -> None:
        """Whether it did what it was to do."""
        block = self._blocks.chain.block(number)
        if block is None:
            return
        index = block.extrinsics.index(tx.raw)
        for record in cast(
            "list[Mapping[str, Mapping[str, object]]]", self._blocks.snapshot(number).value("System.Events")
        ):
            if record["phase"] == {"ApplyExtrinsic": index} and record["event"]["event_id"] == "ExtrinsicFailed":
                failed = str(record["event"]["attributes"])
                kind = (
                    NotRegistered
                    if self._blocks.state(number).by_hotkey(self._key.ss58_address) is None
                    else ChainRefused
                )
                raise kind(f"{what}: {failed}")
