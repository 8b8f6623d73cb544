"""The chain as Orion sees it. The one file that talks to the Bittensor SDK.

`Chain` is the protocol that the rest of the code is written against; `BittensorChain` implements it for every
network, the local development chain included, over one websocket. What matters is read at finalized blocks,
pinned by hash. One subscription to finalized heads feeds `finalized` and `wait_for_block`, so an idle node
costs one small message per block.

Writes are signed by the hotkey, one at a time and in the order of the calls (they share one nonce sequence, read anew
for each), with a short mortal era: an extrinsic that is late can no longer land, so nothing published for one phase of
a round turns up in the next, and one that is stuck holds up the others until its era is over, not longer. Every await
has a deadline. Reads are retried on a lost connection a bounded number of times; writes never
are, as they may have landed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar, cast

import bittensor as bt
from bittensor.settings import default_archive_endpoints, default_fallback_endpoints, resolve_endpoint

from subnet import era
from subnet.chain_errors import (
    ChainError,
    ChainRefused,
    ChainUnreachable,
    NotRegistered,
    WalletError,
    one_line,
    require_subnet,
    translated,
)
from subnet.metagraph import ChainState, Endpoint, Head, Neuron, decode_neuron
from subnet.space import FIELD_LIMIT, Space, charge
from subnet.transport.protocol import PROTOCOL
from subnet.wallets import create_wallet, load_wallet

__all__ = [
    "BittensorChain",
    "Chain",
    "ChainError",
    "ChainRefused",
    "ChainState",
    "ChainUnreachable",
    "Endpoint",
    "Head",
    "Neuron",
    "NotRegistered",
    "Space",
    "WalletError",
    "create_wallet",
    "load_wallet",
]

log = logging.getLogger("orion.subnet.chain")

U16_MAX = 65_535

_ATTEMPTS = 5
_BACKOFF_BLOCKS = 0.25
_KEPT_STATES = 4
_KEPT_HEADS = 64
_BATCH = 32
_SILENCE = 3.0
_SILENCE_BLOCKS = 5

T = TypeVar("T")


class Chain(Protocol):
    """What a node needs from a chain. Every method raises ChainError."""

    async def finalized(self) -> Head:
        """The newest finalized block."""

    async def wait_for_block(self, number: int, *, timeout: float) -> Head:  # noqa: ASYNC109
        """Block `number` once it is finalized; at once if it is. ChainUnreachable after `timeout` seconds."""

    async def passed(self, number: int, *, stall: float) -> None:
        """Until block `number` is finalized. Reads nothing. ChainUnreachable after `stall` seconds with no new one."""

    async def block_hash(self, number: int) -> str:
        """The hash of a finalized block; ChainRefused for one that is not finalized yet."""

    async def state_at(self, number: int) -> ChainState:
        """The whole subnet as it was after finalized block `number`."""

    async def serve_axon(self, endpoint: Endpoint) -> None:
        """Publish where this hotkey listens."""

    async def publish(self, record: bytes, shards: bytes = b"", *, until_block: int | None = None) -> int:
        """Replace this hotkey's record, and the shard digests that go with it (at most 128 bytes each).

        Returns the block that includes it, `until_block` at the latest. ChainRefused, before anything is sent, for
        what is too long or would be more than the epoch's space.
        """

    async def space(self) -> Space:
        """What this hotkey has published in this epoch, and may."""

    async def set_weights(self, weights: Mapping[int, float]) -> int:
        """Set this hotkey's weights, uid to any non-negative number. Returns the block that includes them."""

    async def weights(self) -> dict[int, dict[int, float]]:
        """What the chain holds: validator uid to {uid: weight}, each row summing to 1."""

    async def next_epoch_block(self) -> int:
        """The block at which the subnet's next epoch runs."""

    async def close(self) -> None:
        """Disconnect. Waiters get ChainUnreachable."""


class BittensorChain:
    """`Chain` over the Bittensor SDK. Make one with `connect`."""

    def __init__(
        self,
        substrate: bt.RpcSubstrate,
        client: bt.Client,
        netuid: int,
        wallet: bt.Wallet | None,
        timeout: float,
    ) -> None:
        self.netuid = netuid
        self._substrate = substrate
        self._client = client
        self._wallet = wallet
        self._timeout = timeout
        self._block_time = 12.0
        self._tempo = 0
        self._finalized = -1
        self._advanced = -math.inf  # when the last finalized block was heard of
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._lost: ChainUnreachable | None = None
        self._hotkey_lock = asyncio.Lock()
        self._last_sent = (-1, -1)  # nonce, and the last block in which it may land
        self._heads: OrderedDict[int, Head] = OrderedDict()
        self._states: OrderedDict[int, ChainState] = OrderedDict()
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        network: str,
        netuid: int,
        wallet: bt.Wallet | None,
        *,
        timeout: float,  # noqa: ASYNC109
        archive: str | None = None,
    ) -> BittensorChain:
        """Connect to a network name (`finney`, `test`) or a ws:// URL. `timeout`: seconds for each request.

        archive: a ws:// URL to read what the endpoint has already pruned from; the named networks have one. Without
        a wallet the chain is read-only. ChainRefused for an unknown network or subnet.
        """
        try:
            label, endpoint = resolve_endpoint(network)
        except ValueError as error:
            raise ChainRefused(f"network {network!r}: {error}") from error
        substrate = bt.RpcSubstrate(
            endpoint,
            fallback_endpoints=default_fallback_endpoints(label),
            archive_endpoints=default_archive_endpoints(label) if archive is None else [archive],
        )
        client = bt.Client(network, substrate=substrate)
        chain = cls(substrate, client, netuid, wallet, timeout)
        try:
            await chain._read(f"connecting to {endpoint}", substrate.connect, attempts=1)
            exists = await chain._read(
                "reading the subnet",
                lambda: substrate.query("SubtensorModule", "NetworksAdded", [netuid]),
                attempts=1,
            )
            require_subnet(exists, netuid, network)
            chain._block_time = await chain._read("reading the block time", substrate.block_time, attempts=1)
            chain._tempo = await chain._read(
                "reading the tempo", lambda: substrate.query("SubtensorModule", "Tempo", [netuid]), attempts=1
            )
            chain._watcher = asyncio.create_task(chain._watch(), name="chain-finalized-heads")
            await chain._reach(0, timeout)
        except BaseException:
            await chain.close()
            raise
        return chain

    async def close(self) -> None:
        """Disconnect. Waiters get ChainUnreachable."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self._give_up(ChainUnreachable("the connection to the chain was closed; connect again"))
        await self._substrate.close()

    # finalized blocks -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Follow finalized heads; subscribe anew when they break off, until a whole tempo has passed without one.

        Meanwhile what is known stays known: `finalized` and the states already read are the last good ones.
        """
        clock = asyncio.get_running_loop().time
        failures, heard = 0, clock()
        silence = max(_SILENCE, _SILENCE_BLOCKS * self._block_time)
        while True:
            heads = self._substrate.blocks(finalized=True)
            try:
                while True:
                    # Silence may be finality that stalls, or a connection that the SDK no longer reads:
                    # subscribing anew answers at once with the current head, or fails.
                    # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with a head.
                    async with asyncio.timeout(silence):
                        update = await anext(heads)
                    failures, heard = 0, clock()
                    self._advance(int(update["header"]["number"]))
            except (bt.BittensorError, OSError, TimeoutError, StopAsyncIteration) as error:
                why = one_line(error)
            failures += 1
            if failures > _ATTEMPTS and clock() - heard > self._tempo * self._block_time:
                self._give_up(
                    ChainUnreachable(
                        f"lost the chain for more than a tempo of {self._tempo} blocks, after {failures} attempts "
                        f"({why}); check the network and reconnect"
                    )
                )
                return
            endpoint = self._substrate.endpoint
            log.warning("finalized heads of %s stopped (%s), attempt %d", endpoint, why, failures)
            await asyncio.sleep(self._block_time * _BACKOFF_BLOCKS * 2 ** min(failures, _ATTEMPTS))

    def _advance(self, number: int) -> None:
        if number > self._finalized:
            self._finalized, self._advanced = number, asyncio.get_running_loop().time()
        due = [future for block, future in self._waiting if block <= self._finalized]
        self._waiting = [entry for entry in self._waiting if entry[0] > self._finalized]
        for future in due:
            if not future.done():
                future.set_result(None)

    def _give_up(self, error: ChainUnreachable) -> None:
        self._lost = self._lost or error
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(self._lost)
        self._waiting = []

    async def finalized(self) -> Head:
        """The newest finalized block."""
        if self._lost is not None:
            raise self._lost
        try:
            return await self._head(self._finalized)
        except ChainUnreachable:
            if not self._heads:
                raise
            return self._heads[max(self._heads)]  # its number was heard, the rest of it not

    async def wait_for_block(self, number: int, *, timeout: float) -> Head:  # noqa: ASYNC109
        """Block `number` once it is finalized; at once if it is. ChainUnreachable after `timeout` seconds."""
        await self._reach(number, timeout)
        return await self._head(number)

    async def passed(self, number: int, *, stall: float) -> None:
        """Until block `number` is finalized. Reads nothing. ChainUnreachable after `stall` seconds with no new one."""
        await self._reach(number, stall, anew=True)

    async def _reach(self, number: int, timeout: float, *, anew: bool = False) -> None:  # noqa: ASYNC109
        """Return once block `number` is finalized; `anew`: each block before it starts the time again."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while number > self._finalized:
            if self._lost is not None:
                raise self._lost
            entry = number, loop.create_future()
            self._waiting.append(entry)
            try:
                async with asyncio.timeout_at(began + timeout):  # not `wait_for`, see `_watch`
                    await entry[1]
            except TimeoutError as error:
                if anew and self._advanced > began:
                    began = self._advanced
                    continue
                raise ChainUnreachable(
                    f"block {number} was not finalized within {timeout:g} s, the last is {self._finalized}; "
                    "check that the chain runs"
                ) from error
            finally:
                self._waiting = [other for other in self._waiting if other is not entry]

    async def block_hash(self, number: int) -> str:
        """The hash of a finalized block; ChainRefused for one that is not finalized yet."""
        return (await self._head(number)).hash

    async def _head(self, number: int) -> Head:
        found = self._heads.get(number)
        if found is not None:
            return found
        if number > self._finalized:
            raise ChainRefused(f"block {number} is not final, the last one is {self._finalized}; wait for it first")
        block_hash = await self._read(f"reading block {number}", lambda: self._substrate.block_hash(number))
        timestamp = await self._read(
            f"reading the time of block {number}",
            lambda: self._substrate.query("Timestamp", "Now", [], block_hash=block_hash),
        )
        head = Head(number, block_hash, int(timestamp))
        self._heads[number] = head
        if len(self._heads) > _KEPT_HEADS:
            self._heads.popitem(last=False)
        return head

    # reading --------------------------------------------------------------------------------------

    async def state_at(self, number: int) -> ChainState:
        """The whole subnet as it was after finalized block `number`:

        two requests once the block's hash is known.
        """
        found = self._states.get(number)
        if found is not None:
            return found
        head = await self._head(number)
        what = f"reading subnet {self.netuid} at block {number}"
        graph = await self._read(
            what,
            lambda: self._substrate.runtime_call(
                "SubnetInfoRuntimeApi", "get_metagraph", [self.netuid], block_hash=head.hash
            ),
        )
        if not isinstance(graph, dict):
            raise ChainRefused(f"{what}: the subnet did not exist then; check --netuid")
        hotkeys = [str(hotkey) for hotkey in graph["hotkeys"]]
        commitments = await self._read(
            what,
            lambda: self._substrate.query_batch(
                "Commitments",
                "CommitmentOf",
                [[self.netuid, hotkey] for hotkey in hotkeys],
                block_hash=head.hash,
            ),
        )
        state = ChainState(
            head=head,
            netuid=self.netuid,
            owner_hotkey=str(graph["owner_hotkey"]),
            tempo=int(graph["tempo"]),
            neurons=tuple(decode_neuron(uid, graph, commitments[uid]) for uid in range(len(hotkeys))),
        )
        self._tempo = state.tempo
        self._states[number] = state
        if len(self._states) > _KEPT_STATES:
            self._states.popitem(last=False)
        return state

    async def weights(self) -> dict[int, dict[int, float]]:
        """What the chain holds: validator uid to {uid: weight}, each row summing to 1."""
        head = await self.finalized()
        rows = await self._read(
            "reading weights",
            lambda: self._substrate.query_map("SubtensorModule", "Weights", [self.netuid], block_hash=head.hash),
        )
        weights = {}
        for uid, row in rows:
            total = sum(value for _, value in row)
            if total:
                weights[int(uid)] = {int(target): value / total for target, value in row}
        return weights

    async def next_epoch_block(self) -> int:
        """The block at which the subnet's next epoch runs."""
        return await self._next_epoch((await self.finalized()).hash)

    async def _next_epoch(self, block_hash: str) -> int:
        block = await self._read(
            "reading the epoch schedule",
            lambda: self._substrate.runtime_call(
                "SubnetInfoRuntimeApi", "get_next_epoch_start_block", [self.netuid], block_hash=block_hash
            ),
        )
        if block is None:
            raise ChainRefused(f"subnet {self.netuid} never runs an epoch (its tempo is 0); choose another --netuid")
        return int(block)

    async def genesis(self) -> str:
        """The hash of block 0, which tells one chain from another."""
        return await self._read("reading the first block", lambda: self._substrate.block_hash(0))

    async def newest_ms(self) -> int:
        """When the newest block was made, final or not: milliseconds since 1970."""
        return int(await self._read("reading the time", lambda: self._substrate.query("Timestamp", "Now", [])))

    async def immunity(self) -> int:
        """For how many blocks a new neuron is not replaced."""
        read = self._substrate.query
        what = "reading the immunity period"
        return int(await self._read(what, lambda: read("SubtensorModule", "ImmunityPeriod", [self.netuid])))

    async def beacon(self, when: int) -> bytes | None:
        """drand's randomness for a time: the 32 bytes of the first round at or after `when`, seconds since 1970.

        None while the finalized chain does not hold them: not published yet, or pruned.
        """
        head = await self.finalized()
        config = await self._read(
            "reading the beacon", lambda: self._substrate.query("Drand", "BeaconConfig", [], block_hash=head.hash)
        )
        since = max(0, when - int(config["genesis_time"]))
        number = -(-since // int(config["period"])) + 1
        pulse = await self._read(
            f"reading drand round {number}",
            lambda: self._substrate.query("Drand", "Pulses", [number], block_hash=head.hash),
        )
        return None if pulse is None else _bytes(pulse["randomness"])

    # writing --------------------------------------------------------------------------------------

    async def serve_axon(self, endpoint: Endpoint) -> None:
        """Publish where this hotkey listens, and in which version of the protocol."""
        what = f"publishing {endpoint.ip}:{endpoint.port}"
        try:
            ipaddress.ip_address(endpoint.ip)
        except ValueError as error:
            raise ChainRefused(f"{what}: {error}; pass an IPv4 or IPv6 address") from error
        if not 0 < endpoint.port <= U16_MAX:
            raise ChainRefused(f"{what}: port {endpoint.port} is outside 1..{U16_MAX}; choose another --port")
        intent = bt.ServeAxon(netuid=self.netuid, ip=endpoint.ip, port=endpoint.port, version=PROTOCOL)
        await self._execute(what, intent)

    async def publish(self, record: bytes, shards: bytes = b"", *, until_block: int | None = None) -> int:
        """Replace this hotkey's record, and the shard digests that go with it (at most 128 bytes each).

        Returns the block that includes it, `until_block` at the latest. ChainRefused, before anything is sent, for
        what is too long or would be more than the epoch's space.
        """
        fields = [record, shards] if shards else [record]
        what = f"publishing a record of {' + '.join(str(len(field)) for field in fields)} bytes"
        if max(map(len, fields)) > FIELD_LIMIT:
            raise ChainRefused(f"{what}: the chain takes {FIELD_LIMIT} in a field; shorten it")
        self._signer(what)
        info = {"fields": [[{f"Raw{len(field)}": field} for field in fields]]}
        call = bt.calls.Commitments.set_commitment(netuid=self.netuid, info=info)
        compose: Callable[[object], Awaitable[object]] = self._substrate.compose
        async with self._hotkey_lock:
            await self._check_space(what, charge(*map(len, fields)))
            composed = await self._read(what, lambda: compose(call))
            return await self._submit(what, composed, until_block)

    async def space(self) -> Space:
        """What this hotkey has published in this epoch, and may, as of the newest finalized block."""
        what = "reading the space for records"
        hotkey = self._signer(what).hotkey.ss58_address
        block_hash = (await self.finalized()).hash

        async def read(pallet: str, name: str, *keys: object) -> object:
            return await self._read(
                what, lambda: self._substrate.query(pallet, name, list(keys), block_hash=block_hash)
            )

        epoch = int(cast("int", await read("SubtensorModule", "SubnetEpochIndex", self.netuid)))
        usage = cast("Mapping[str, int] | None", await read("Commitments", "UsedSpaceOf", self.netuid, hotkey))
        limit = int(cast("int", await read("Commitments", "MaxSpace")))
        used = int(usage["used_space"]) if usage is not None and int(usage["last_epoch"]) == epoch else 0
        return Space(used, limit, epoch, await self._next_epoch(block_hash))

    async def _check_space(self, what: str, needed: int) -> None:
        """ChainRefused if a commitment that counts as `needed` bytes would be refused on chain, at a nonce's price.

        On a chain that does not count, or counts in another place, nothing is refused here: it decides by itself.
        """
        try:
            space = await self.space()
        except ChainRefused as error:
            log.warning("%s: not checked against the epoch's space (%s)", what, error)
            return
        # It lands in a later block than the finalized one; if that is in the next epoch, it counts there.
        starts_anew = space.next_epoch <= self._finalized + 1
        if not starts_anew and space.used + needed > space.limit:
            raise ChainRefused(
                f"{what}: it counts as {needed} bytes, and {space.used} of the {space.limit} of epoch {space.epoch} "
                f"are used; wait for the next epoch, block {space.next_epoch}, or publish less per round"
            )

    async def set_weights(self, weights: Mapping[int, float]) -> int:
        """Set this hotkey's weights, uid to any non-negative number. Returns the block that includes them."""
        intent = bt.SetWeights(netuid=self.netuid, weights=dict(weights))
        return await self._execute(f"setting weights of {len(weights)} uids", intent)

    async def register_neurons(self, stakes: Mapping[str, float]) -> dict[str, int]:
        """Register hotkeys (ss58) and stake that much TAO to each, paid by the wallet's coldkey.

        Registrations go out in atomic batches: a refused batch registers none of its hotkeys. Returns the
        uids. Meant for development networks: on a real one register with `btcli subnets register`, which is
        shielded against front-running.
        """
        wallet, hotkeys = self._signer("registering neurons"), list(stakes)
        for start in range(0, len(hotkeys), _BATCH):
            part = hotkeys[start : start + _BATCH]
            what = f"registering {len(part)} hotkeys on subnet {self.netuid}"
            intents: list[bt.Intent] = [bt.BurnedRegister(netuid=self.netuid, hotkey_ss58=hotkey) for hotkey in part]
            intents += [
                bt.AddStake(hotkey_ss58=hotkey, netuid=self.netuid, amount_tao=stakes[hotkey])
                for hotkey in part
                if stakes[hotkey] > 0
            ]
            try:
                async with asyncio.timeout(self._timeout * _ATTEMPTS):
                    result = await self._client.execute(bt.Batch(intents=intents), wallet)
            except (bt.BittensorError, OSError, TimeoutError) as error:
                raise translated(what, error, self._timeout * _ATTEMPTS) from error
            _included_in(what, result)
        uids = await self._read(
            "reading uids",
            lambda: self._substrate.query_batch("SubtensorModule", "Uids", [[self.netuid, key] for key in hotkeys]),
        )
        return {hotkey: int(uid) for hotkey, uid in zip(hotkeys, uids, strict=True)}

    async def _execute(self, what: str, intent: bt.Intent) -> int:
        """Plan an intent with the SDK, which runs its preflight checks, then submit the planned call."""
        wallet = self._signer(what)
        async with self._hotkey_lock:
            plan = await self._read(what, lambda: self._client.plan(intent, wallet))
            if not plan.ok:
                raise ChainRefused(f"{what}: {'; '.join(plan.violations)}")
            return await self._submit(what, plan.call, None)

    def _signer(self, what: str) -> bt.Wallet:
        if self._wallet is None:
            raise ChainRefused(f"{what}: connected without a wallet, which is read-only; pass --wallet and --hotkey")
        return self._wallet

    async def _submit(self, what: str, call: object, until_block: int | None) -> int:
        """Sign `call` with the hotkey and follow it until its block is final. Hold the hotkey's lock."""
        keypair = self._signer(what).hotkey
        birth, period = self._finalized, era.DEFAULT
        while True:
            # Valid in blocks [birth, birth + period), where birth is the finalized block at signing; that may have
            # moved on meanwhile, then a shorter era still ends in time.
            if until_block is not None:
                period = era.ending_by(until_block, birth, what)
            unsigned = await self._prepare(what, call, keypair.ss58_address, period)
            birth = int(cast("Mapping[str, int]", unsigned.era)["current"])
            last_nonce, last_block = self._last_sent
            if unsigned.nonce < last_nonce and birth < last_block:
                # The one before the last was lost, and the last waits for it: with this one in its place, the last
                # would land behind it. So it must be out of time first.
                await self._reach(last_block, self._timeout + (last_block - birth) * self._block_time)
                birth = self._finalized
            elif until_block is None or birth + period - 1 <= until_block:
                break
        self._last_sent = (unsigned.nonce, birth + period - 1)
        signature = bytes(keypair.sign(unsigned.payload))
        blocks = period + 2 * era.SHORTEST  # until the era is over, and finality behind it
        deadline = self._timeout + blocks * self._block_time
        try:
            async with asyncio.timeout(deadline):
                result = await self._substrate.submit_signature(unsigned, signature)
        except (bt.BittensorError, OSError, TimeoutError) as error:
            raise translated(what, error, deadline) from error
        block = _included_in(what, result)
        self._advance(block)
        return block

    async def _prepare(self, what: str, call: object, address: str, period: int) -> bt.UnsignedExtrinsic:
        return await self._read(what, lambda: self._substrate.prepare(call, address=address, period=period))

    async def _read(self, what: str, request: Callable[[], Awaitable[T]], *, attempts: int = _ATTEMPTS) -> T:
        """Await `request()` within the deadline, again if the connection is lost, with our errors."""
        for attempt in range(1, attempts + 1):
            try:
                async with asyncio.timeout(self._timeout):
                    return await request()
            except (bt.BittensorError, OSError, TimeoutError, ValueError) as error:
                failure = translated(what, error, self._timeout)
                if not isinstance(failure, ChainUnreachable) or attempt == attempts:
                    raise failure from error
                log.warning("%s, attempt %d of %d", failure, attempt, attempts)
            await asyncio.sleep(self._block_time * _BACKOFF_BLOCKS * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _included_in(what: str, result: bt.ExtrinsicResult) -> int:
    """The block that a submitted extrinsic is in; ChainError if it failed there or was not taken."""
    if not result.success:
        raise translated(what, result.error or bt.ChainError(result.message), 0.0)
    return int(str(result.extrinsic_id).partition("-")[0])


def _bytes(value: str | Sequence[int]) -> bytes:
    """A byte string as the SDK decodes it: 0x-hex, or numbers."""
    return bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else bytes(value)
