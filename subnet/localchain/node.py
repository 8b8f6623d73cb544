"""A running chain: the block clock, the websocket server and its subscriptions.

    async with LocalChain(ChainConfig()) as chain:
        ...  # connect the SDK to chain.url

Everything runs on one event loop and no await stands between reading and changing the chain, so there is
nothing to lock. Each connection has a queue of outgoing frames and a writer: a client that does not read what
it subscribed to fills its queue and is disconnected, instead of holding up the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from subnet.localchain.blocks import Block, Chain
from subnet.localchain.extrinsic import Extrinsic
from subnet.localchain.genesis import ChainConfig
from subnet.localchain.rpc import Json, Rpc, header_json

log = logging.getLogger("orion.subnet.localchain")

MAX_FRAME = 4 * 1024 * 1024
MAX_QUEUE = 4_096
_SERVICE_RESTART = 1012
_TRY_AGAIN_LATER = 1013


class _Connection:
    """One client: its subscriptions and what is still to be sent to it."""

    def __init__(self, node: LocalChain) -> None:
        self.outgoing: asyncio.Queue[str] = asyncio.Queue(MAX_QUEUE)
        self.overrun = asyncio.Event()
        self.subscriptions: dict[str, tuple[str, str]] = {}
        self._deferred: list[str] | None = None
        self._node = node

    def answer(self, rpc: Rpc, request: str | bytes) -> None:
        """Answer one frame; what its methods notify goes out after the answer, as clients expect."""
        self._deferred = []
        response = rpc.answer(request, self)
        deferred, self._deferred = self._deferred, None
        for frame in [response, *deferred] if response is not None else deferred:
            self.send(frame)

    def send(self, frame: str) -> None:
        if self._deferred is not None:
            self._deferred.append(frame)
            return
        try:
            self.outgoing.put_nowait(frame)
        except asyncio.QueueFull:
            self.overrun.set()

    def subscribe(self, kind: str, method: str) -> str:
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

    host and port: where to listen; port 0 picks a free one. clock: seconds since 1970, what blocks are dated
    by.
    """

    def __init__(
        self,
        config: ChainConfig | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config or ChainConfig()
        self.chain = Chain(self.config)
        self.watchers: dict[bytes, list[tuple[_Connection, str]]] = {}
        self._rpc = Rpc(self.chain)
        self._address = (host, port)
        self._clock = clock
        self._connections: set[_Connection] = set()
        self._unfinalized: list[tuple[Block, list[Extrinsic]]] = []
        self._last_id = 0
        self._server: Server | None = None
        self._producer: asyncio.Task[None] | None = None

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
        self._server = await serve(self._serve, host, port, compression=None, max_size=MAX_FRAME, ping_interval=None)
        self.advance()
        self._producer = asyncio.create_task(self._produce(), name="localchain-blocks")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._producer is not None:
            self._producer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._producer
        if self._server is not None:
            # Not 1001 (going away): to the SDK that is an orderly end, which it does not reconnect after.
            self._server.close(code=_SERVICE_RESTART)
            await self._server.wait_closed()

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

    # connections ----------------------------------------------------------------------------------

    async def _serve(self, socket: ServerConnection) -> None:
        connection = _Connection(self)
        self._connections.add(connection)
        tasks = [
            asyncio.create_task(self._receive(socket, connection)),
            asyncio.create_task(self._transmit(socket, connection)),
            asyncio.create_task(connection.overrun.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if connection.overrun.is_set():
                await socket.close(_TRY_AGAIN_LATER, f"more than {MAX_QUEUE} frames unread")
        finally:
            self._connections.discard(connection)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, ConnectionClosed):
                    log.error("a connection ended with an error", exc_info=result)

    async def _receive(self, socket: ServerConnection, connection: _Connection) -> None:
        async for frame in socket:
            connection.answer(self._rpc, frame)

    async def _transmit(self, socket: ServerConnection, connection: _Connection) -> None:
        while True:
            await socket.send(await connection.outgoing.get())
