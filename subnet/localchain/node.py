"""A running chain: the block clock, the websocket server and its subscriptions.

    async with LocalChain(ChainConfig()) as chain:
        ...  # connect the SDK to chain.url

Everything runs on one event loop and no await stands between reading and changing the chain, so there is nothing to
lock. What one client can take up is bounded: connections, subscriptions, the size of frames and what waits to be sent.
A client that asks faster than it reads is not read from until it has caught up; one that does not read what it
subscribed to is disconnected, instead of holding up the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from subnet.localchain import drand
from subnet.localchain.block import Block
from subnet.localchain.blocks import Chain
from subnet.localchain.errors import RpcError
from subnet.localchain.extrinsic import Extrinsic
from subnet.localchain.genesis import ChainConfig
from subnet.localchain.rpc import Json, Rpc, header_json

log = logging.getLogger("orion.subnet.localchain")

MAX_FRAME = 4 * 1024 * 1024
MAX_QUEUE = 4_096  # frames, and
MAX_UNREAD = 32 * 1024 * 1024  # characters that a client may leave unread before it is disconnected
HIGH_WATER = 1024 * 1024  # characters unread at which no more requests are taken from a client
MAX_SUBSCRIPTIONS = 1_024
MAX_CONNECTIONS = 256
_MAX_WAITING = 4  # frames received and not yet looked at
_TOO_MANY_SUBSCRIPTIONS = -32006
_SERVICE_RESTART = 1012
_TRY_AGAIN_LATER = 1013


class _Connection:
    """One client: its subscriptions and what is still to be sent to it."""

    def __init__(self, node: LocalChain) -> None:
        self.outgoing: asyncio.Queue[str] = asyncio.Queue(MAX_QUEUE)
        self.overrun = asyncio.Event()
        self.subscriptions: dict[str, tuple[str, str]] = {}
        self._unread = 0
        self._read = asyncio.Event()
        self._deferred: list[str] | None = None
        self._node = node

    async def answer(self, rpc: Rpc, request: str | bytes) -> None:
        """Answer one frame; what is notified meanwhile goes out after the answer, as clients expect."""
        self._deferred = []
        response = await rpc.answer(request, self)
        deferred, self._deferred = self._deferred, None
        for frame in [response, *deferred] if response is not None else deferred:
            self.send(frame)

    def send(self, frame: str) -> None:
        if self._deferred is not None:
            self._deferred.append(frame)
        elif self.outgoing.full() or self._unread > MAX_UNREAD:
            self.overrun.set()
        else:
            self.outgoing.put_nowait(frame)
            self._unread += len(frame)

    def sent(self, frame: str) -> None:
        """Note that a frame of `outgoing` is on its way."""
        self._unread -= len(frame)
        self._read.set()

    async def caught_up(self) -> None:
        """Wait until the client has read most of what it asked for."""
        while self._unread > HIGH_WATER:
            self._read.clear()
            await self._read.wait()

    def check_room(self) -> None:
        if len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
            limit = f"Exceeded max limit of {MAX_SUBSCRIPTIONS}"
            raise RpcError(_TOO_MANY_SUBSCRIPTIONS, "Too many subscriptions on the connection", limit)

    def subscribe(self, kind: str, method: str) -> str:
        self.check_room()
        subscription = self._node.new_id()
        self.subscriptions[subscription] = (kind, method)
        return subscription

    def unsubscribe(self, subscription: str) -> bool:
        return self.subscriptions.pop(subscription, None) is not None

    def watch(self, tx: Extrinsic) -> str:
        subscription = self.subscribe("extrinsic", "author_extrinsicUpdate")
        self._node.watchers.setdefault(tx.hash, []).append((self, subscription))
        return subscription

    def notify(self, subscription: str, result: Json) -> None:
        found = self.subscriptions.get(subscription)
        if found is not None:
            params = {"subscription": subscription, "result": result}
            self.send(json.dumps({"jsonrpc": "2.0", "method": found[1], "params": params}, separators=(",", ":")))

    def publish(self, kind: str, result: str) -> None:
        """Send `result`, JSON already, to every subscription of one kind."""
        for subscription, (its_kind, method) in self.subscriptions.items():
            if its_kind == kind:
                self.send(
                    f'{{"jsonrpc":"2.0","method":"{method}",'
                    f'"params":{{"subscription":"{subscription}","result":{result}}}}}'
                )


class LocalChain:
    """A development chain that serves JSON-RPC on a websocket while it is entered.

    host and port: where to listen; port 0 picks a free one. state: a folder that keeps the chain, and from which it
    goes on when it is there already; in memory only without one. relay: where to get drand's signatures, see
    `drand`. clock: seconds since 1970, what blocks are dated by. StoreError when the folder cannot be used.
    """

    def __init__(
        self,
        config: ChainConfig | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        state: Path | None = None,
        relay: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config or ChainConfig()
        self.chain = Chain(self.config, state=state)
        self.watchers: dict[bytes, list[tuple[_Connection, str]]] = {}
        self._rpc = Rpc(self.chain)
        self._address = (host, port)
        self._clock = clock
        self._connections: set[_Connection] = set()
        self._relay = relay
        # Blocks to announce as final when they are: after a restart, first those that were not yet.
        final, head = self.chain.finalized.number, self.chain.head.number
        recent = [self.chain.block(number) for number in range(final + 1, head + 1)]
        self._unfinalized: list[tuple[Block, list[Extrinsic]]] = [(block, []) for block in recent if block is not None]
        self._last_id = 0
        self._server: Server | None = None
        self._producer: asyncio.Task[None] | None = None
        self._follower: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        if self._server is None:
            raise RuntimeError("the local chain is not running: enter it with `async with`")
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"ws://{self._address[0]}:{self.port}"

    async def __aenter__(self) -> Self:
        host, port = self._address
        try:
            self._server = await serve(
                self._serve, host, port,
                compression=None, max_size=MAX_FRAME, max_queue=_MAX_WAITING, ping_interval=None,
            )  # fmt: skip
        except BaseException:
            self.chain.close()
            raise
        self.advance()
        self._producer = asyncio.create_task(self._produce(), name="localchain-blocks")
        if self._relay is not None:
            self._follower = asyncio.create_task(drand.follow(self.chain, self._relay, clock=self._clock))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for task in (self._follower, self._producer):
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
        finally:
            if self._server is not None:
                # Not 1001 (going away): to the SDK that is an orderly end, which it does not reconnect after.
                self._server.close(code=_SERVICE_RESTART)
                await self._server.wait_closed()
            self.chain.close()

    async def run(self) -> None:
        """Return only when block production fails; then with its exception."""
        if self._producer is None:
            raise RuntimeError("the local chain is not running: enter it with `async with`")
        await self._producer

    def new_id(self) -> str:
        self._last_id += 1
        return f"orion{self._last_id}"

    # blocks ---------------------------------------------------------------------------------------

    async def _produce(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self.config.block_time
        while True:
            await asyncio.sleep(due - loop.time())
            self.advance()
            # A block that could not be made in time is skipped, not caught up with.
            due = max(due + self.config.block_time, loop.time())

    def advance(self) -> Block:
        """Make the next block now and tell whoever asked to be told."""
        block, included, dropped = self.chain.produce(int(self._clock() * 1000))
        self._publish("best", block)
        for tx in dropped:
            self._tell(tx, "invalid", last=True)
        for tx in included:
            self._tell(tx, {"inBlock": "0x" + block.hash.hex()})
        self._unfinalized.append((block, included))
        while self._unfinalized and self._unfinalized[0][0].number <= self.chain.finalized.number:
            final, transactions = self._unfinalized.pop(0)
            self._publish("finalized", final)
            for tx in transactions:
                self._tell(tx, {"finalized": "0x" + final.hash.hex()}, last=True)
        return block

    def _publish(self, kind: str, block: Block) -> None:
        result = json.dumps(header_json(block), separators=(",", ":"))
        for connection in self._connections:
            connection.publish(kind, result)

    def _tell(self, tx: Extrinsic, status: Json, *, last: bool = False) -> None:
        watchers = self.watchers.pop(tx.hash, []) if last else self.watchers.get(tx.hash, [])
        for connection, subscription in watchers:
            connection.notify(subscription, status)
            if last:
                connection.unsubscribe(subscription)

    # connections ----------------------------------------------------------------------------------

    async def _serve(self, socket: ServerConnection) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            await socket.close(_TRY_AGAIN_LATER, f"more than {MAX_CONNECTIONS} connections")
            return
        connection = _Connection(self)
        self._connections.add(connection)
        tasks = [
            asyncio.create_task(self._receive(socket, connection)),
            asyncio.create_task(self._transmit(socket, connection)),
            asyncio.create_task(connection.overrun.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._forget(connection)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, ConnectionClosed):
                    log.error("a connection ended with an error", exc_info=result)
        if connection.overrun.is_set():
            await socket.close(_TRY_AGAIN_LATER, f"more than {MAX_QUEUE} frames or {MAX_UNREAD} characters unread")

    def _forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        for tx_hash, watchers in list(self.watchers.items()):
            kept = [watcher for watcher in watchers if watcher[0] is not connection]
            if kept:
                self.watchers[tx_hash] = kept
            else:
                del self.watchers[tx_hash]

    async def _receive(self, socket: ServerConnection, connection: _Connection) -> None:
        async for frame in socket:
            await connection.answer(self._rpc, frame)
            await connection.caught_up()

    async def _transmit(self, socket: ServerConnection, connection: _Connection) -> None:
        while True:
            frame = await connection.outgoing.get()
            await socket.send(frame)
            connection.sent(frame)
