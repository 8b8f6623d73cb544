"""JSON-RPC as a Substrate node speaks it: methods, batches and error objects. No sockets here.

`Rpc.answer` takes one frame and a `Peer` (what the connection can do: send a frame, remember subscriptions) and
returns the response frame, or None where the frame was a notification. It gives way to the event loop after every
request, so that a batch of slow ones does not hold up the blocks. Method names and their old aliases are Substrate's;
an unknown one is -32601, wrong parameters are -32602, malformed JSON is -32700, and what is too large or too much has
the codes of Substrate's own server. Error messages are short, whatever was sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, Protocol

import bittensor_core

from subnet.localchain import metadata
from subnet.localchain.block import Block
from subnet.localchain.blocks import Chain
from subnet.localchain.errors import RpcError
from subnet.localchain.extrinsic import Extrinsic
from subnet.localchain.runtime_api import RuntimeApis
from subnet.localchain.state import Snapshot, StateDiscarded

log = logging.getLogger("orion.subnet.localchain.rpc")

Json = object
Params = Sequence[Json]

MAX_BATCH = 256
MAX_KEYS = 1_000
MAX_RESPONSE = 16 * 1024 * 1024
_QUOTED = 64
_MAX_MESSAGE = 512
_RESPONSE_TOO_BIG = -32008
_BATCH_TOO_LARGE = -32010
_BATCH_RESPONSE_TOO_BIG = -32011

_NAME = "orion-localchain"


class Peer(Protocol):
    """One connection, as the methods see it."""

    def check_room(self) -> None:
        """RpcError when the connection has as many subscriptions as it may have."""

    def subscribe(self, kind: str, method: str) -> str:
        """Open a subscription to `kind` whose notifications carry `method`; returns its id. RpcError as above."""

    def unsubscribe(self, subscription: str) -> bool:
        """Close a subscription; False when there is none by that id."""

    def watch(self, tx: Extrinsic) -> str:
        """Open a subscription to the fate of a transaction; returns its id."""

    def notify(self, subscription: str, result: Json) -> None:
        """Send one notification of a subscription."""


def header_json(block: Block) -> dict[str, Json]:
    """A header as `chain_getHeader` gives it."""
    return {
        "parentHash": _hex(block.parent),
        "number": hex(block.number),
        "stateRoot": _hex(block.state_root),
        "extrinsicsRoot": _hex(block.extrinsics_root),
        "digest": {"logs": []},
    }


class Rpc:
    """The methods, over one chain."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._apis = RuntimeApis(chain.codec)
        methods: dict[str, Callable[[Peer, Params], Json]] = {
            "system_chain": lambda _peer, _params: "Orion Local",
            "system_name": lambda _peer, _params: _NAME,
            "system_version": lambda _peer, _params: str(metadata.SPEC_VERSION),
            "system_chainType": lambda _peer, _params: "Development",
            "system_health": lambda _peer, _params: {
                "peers": 0,
                "isSyncing": False,
                "shouldHavePeers": False,
            },
            "system_properties": lambda _peer, _params: {
                "ss58Format": metadata.SS58_FORMAT,
                "tokenDecimals": 9,
                "tokenSymbol": "TAO",
            },
            "rpc_methods": lambda _peer, _params: {"methods": sorted(self._methods)},
            "chain_getBlockHash": self._get_block_hash,
            "chain_getFinalizedHead": lambda _peer, _params: _hex(chain.finalized.hash),
            "chain_getHeader": self._get_header,
            "chain_getBlock": self._get_block,
            "state_getRuntimeVersion": self._runtime_version,
            "state_call": self._state_call,
            "state_getStorage": self._get_storage,
            "state_queryStorageAt": self._query_storage_at,
            "state_getKeysPaged": self._get_keys_paged,
            "system_accountNextIndex": lambda _peer, params: chain.next_nonce(_address(params, 0)),
            "author_submitExtrinsic": self._submit,
            "author_submitAndWatchExtrinsic": self._submit_and_watch,
            "author_pendingExtrinsics": lambda _peer, _params: [_hex(raw) for raw in chain.pending()],
            "chain_subscribeNewHeads": self._subscribe_new_heads,
            "chain_subscribeFinalizedHeads": self._subscribe_finalized_heads,
            "state_subscribeRuntimeVersion": self._subscribe_runtime_version,
        }
        unsubscribes = (
            "author_unwatchExtrinsic",
            "chain_unsubscribeNewHeads",
            "chain_unsubscribeFinalizedHeads",
            "state_unsubscribeRuntimeVersion",
        )
        methods |= dict.fromkeys(unsubscribes, _unsubscribe)
        aliases = {
            "chain_getHead": "chain_getBlockHash",
            "chain_getFinalisedHead": "chain_getFinalizedHead",
            "state_getStorageAt": "state_getStorage",
            "state_getKeysPagedAt": "state_getKeysPaged",
            "account_nextIndex": "system_accountNextIndex",
            "chain_subscribeNewHead": "chain_subscribeNewHeads",
            "chain_unsubscribeNewHead": "chain_unsubscribeNewHeads",
        }
        self._methods = methods | {alias: methods[name] for alias, name in aliases.items()}

    # frames ---------------------------------------------------------------------------------------

    async def answer(self, frame: str | bytes, peer: Peer) -> str | None:
        """The response to one frame: an object, a batch of them, or None for notifications only."""
        try:
            message = json.loads(frame, parse_constant=_not_json)
        except (ValueError, RecursionError):
            return _dump(_error(None, RpcError(-32700, "Parse error")))
        if not isinstance(message, list):
            return await self._one(message, peer)
        if not message:
            return _dump(_error(None, RpcError(-32600, "Invalid Request")))
        if len(message) > MAX_BATCH:
            error = RpcError(_BATCH_TOO_LARGE, "The batch request was too large", f"Exceeded max limit of {MAX_BATCH}")
            return _dump(_error(None, error))
        responses, size = [], 0
        for item in message:
            response = await self._one(item, peer)
            if response is None:
                continue
            responses.append(response)
            size += len(response) + 1
            if size > MAX_RESPONSE:
                limit = f"Exceeded max limit of {MAX_RESPONSE}"
                error = RpcError(_BATCH_RESPONSE_TOO_BIG, "The batch response was too large", limit)
                return _dump(_error(None, error))
        return f"[{','.join(responses)}]" if responses else None

    async def _one(self, request: Json, peer: Peer) -> str | None:
        response = self._respond(request, peer)
        await asyncio.sleep(0)
        if response is None:
            return None
        text = _dump(response)
        if len(text) > MAX_RESPONSE:
            error = RpcError(_RESPONSE_TOO_BIG, "Response is too big", f"Exceeded max limit of {MAX_RESPONSE}")
            return _dump(_error(response["id"], error))
        return text

    def _respond(self, request: Json, peer: Peer) -> dict[str, Json] | None:
        if not isinstance(request, Mapping) or request.get("jsonrpc", "2.0") != "2.0":
            return _error(None, RpcError(-32600, "Invalid Request"))
        call_id, name, params = request.get("id"), request.get("method"), request.get("params")
        if isinstance(call_id, bool) or not isinstance(call_id, str | int | float | None) or not isinstance(name, str):
            return _error(None, RpcError(-32600, "Invalid Request"))
        result: Json = None
        failure: RpcError | None = None
        try:
            result = self._call(name, params, peer)
        except RpcError as error:
            failure = error
        except Exception as error:
            # The border of the node: a bug in one method answers as one, and the connection goes on.
            log.exception("%s failed", name)
            failure = RpcError(-32603, "Internal error", _quote(f"{type(error).__name__}: {error}"))
        if "id" not in request:
            return None
        return {"jsonrpc": "2.0", "id": call_id, "result": result} if failure is None else _error(call_id, failure)

    def _call(self, name: str, params: Json, peer: Peer) -> Json:
        function = self._methods.get(name)
        if function is None:
            raise RpcError(-32601, "Method not found", _quote(name))
        if params is not None and not isinstance(params, list):
            raise RpcError(-32602, "Invalid params", "expected a list of positional parameters")
        return function(peer, params or [])

    # blocks ---------------------------------------------------------------------------------------

    def _number(self, params: Params, index: int) -> int:
        """The block named by the hash at `params[index]`; the best block where none is given."""
        if len(params) <= index or params[index] is None:
            return self._chain.head.number
        block_hash = _bytes(params, index)
        number = self._chain.number_of(block_hash)
        if number is None:
            raise RpcError(
                4003, f"Client error: UnknownBlock: Header was not found in the database: {_quote(_hex(block_hash))}"
            )
        return number

    def _snapshot(self, params: Params, index: int) -> Snapshot:
        number = self._number(params, index)
        try:
            return self._chain.snapshot(number)
        except StateDiscarded as error:
            raise self._discarded(number) from error

    def _get_block_hash(self, _peer: Peer, params: Params) -> Json:
        if not params or params[0] is None:
            return _hex(self._chain.head.hash)
        if isinstance(params[0], list):
            if len(params[0]) > MAX_KEYS:
                raise RpcError(-32602, "Invalid params", f"{len(params[0])} block numbers, at most {MAX_KEYS}")
            return [self._hash_at(number) for number in params[0]]
        return self._hash_at(params[0])

    def _hash_at(self, number: Json) -> Json:
        try:
            if isinstance(number, str):
                value = int(number, 16)
            elif isinstance(number, int) and not isinstance(number, bool):
                value = number
            else:
                raise TypeError
        except (TypeError, ValueError) as error:
            raise RpcError(-32602, "Invalid params", f"{_quote(repr(number))} is not a block number") from error
        block_hash = self._chain.hash_of(value)
        return None if block_hash is None else _hex(block_hash)

    def _block(self, params: Params) -> Block | None:
        if params and params[0] is not None and self._chain.number_of(_bytes(params, 0)) is None:
            return None
        number = self._number(params, 0)
        block = self._chain.block(number)
        if block is None:
            raise self._discarded(number)
        return block

    def _discarded(self, number: int) -> RpcError:
        """A block that has left the history, in the words by which the SDK turns to an archive node."""
        block_hash = _hex(self._chain.hash_of(number) or b"")
        return RpcError(4003, f"Client error: UnknownBlock: State already discarded for {block_hash}")

    def _get_header(self, _peer: Peer, params: Params) -> Json:
        block = self._block(params)
        return None if block is None else header_json(block)

    def _get_block(self, _peer: Peer, params: Params) -> Json:
        block = self._block(params)
        if block is None:
            return None
        extrinsics = [_hex(raw) for raw in block.extrinsics]
        return {"block": {"header": header_json(block), "extrinsics": extrinsics}, "justifications": None}

    # state ----------------------------------------------------------------------------------------

    def _runtime_version(self, _peer: Peer, params: Params) -> Json:
        self._number(params, 0)
        return {
            "specName": metadata.SPEC_NAME,
            "implName": metadata.SPEC_NAME,
            "authoringVersion": 1,
            "specVersion": metadata.SPEC_VERSION,
            "implVersion": 1,
            "apis": [],
            "transactionVersion": metadata.TRANSACTION_VERSION,
            "stateVersion": 1,
        }

    def _state_call(self, _peer: Peer, params: Params) -> Json:
        return _hex(self._apis.call(self._snapshot(params, 2), _text(params, 0), _bytes(params, 1)))

    def _get_storage(self, _peer: Peer, params: Params) -> Json:
        value = self._snapshot(params, 1).raw(_bytes(params, 0))
        return None if value is None else _hex(value)

    def _query_storage_at(self, _peer: Peer, params: Params) -> Json:
        snapshot = self._snapshot(params, 1)
        keys = params[0] if params else None
        if not isinstance(keys, list) or len(keys) > MAX_KEYS:
            raise RpcError(-32602, "Invalid params", f"expected a list of at most {MAX_KEYS} storage keys")
        changes = []
        for index in range(len(keys)):
            value = snapshot.raw(_bytes(keys, index))
            changes.append([keys[index], None if value is None else _hex(value)])
        return [{"block": _hex(self._chain.hash_of(snapshot.block) or b""), "changes": changes}]

    def _get_keys_paged(self, _peer: Peer, params: Params) -> Json:
        count = params[1] if len(params) > 1 else None
        if not isinstance(count, int) or not 0 < count <= MAX_KEYS:
            raise RpcError(4002, f"count exceeds maximum value. value: {_quote(repr(count))}, max: {MAX_KEYS}")
        after = _bytes(params, 2) if len(params) > 2 and params[2] is not None else None
        found = []
        for key in self._snapshot(params, 3).keys(_bytes(params, 0), after=after):
            found.append(_hex(key))
            if len(found) == count:
                break
        return found

    # transactions and subscriptions ---------------------------------------------------------------

    def _submit(self, _peer: Peer, params: Params) -> Json:
        return _hex(self._chain.submit(_bytes(params, 0)).hash)

    def _submit_and_watch(self, peer: Peer, params: Params) -> Json:
        peer.check_room()
        tx = self._chain.submit(_bytes(params, 0))
        subscription = peer.watch(tx)
        waits = tx.nonce > self._chain.next_nonce(tx.signer)
        peer.notify(subscription, "future" if waits else "ready")
        return subscription

    def _subscribe_new_heads(self, peer: Peer, _params: Params) -> Json:
        subscription = peer.subscribe("best", "chain_newHead")
        peer.notify(subscription, header_json(self._chain.head))
        return subscription

    def _subscribe_finalized_heads(self, peer: Peer, _params: Params) -> Json:
        subscription = peer.subscribe("finalized", "chain_finalizedHead")
        peer.notify(subscription, header_json(self._chain.finalized))
        return subscription

    def _subscribe_runtime_version(self, peer: Peer, params: Params) -> Json:
        subscription = peer.subscribe("runtime", "state_runtimeVersion")
        peer.notify(subscription, self._runtime_version(peer, params[:0]))
        return subscription


def _unsubscribe(peer: Peer, params: Params) -> Json:
    return peer.unsubscribe(str(params[0])) if params else False


def _text(params: Params, index: int) -> str:
    value = params[index] if len(params) > index else None
    if not isinstance(value, str):
        raise RpcError(-32602, "Invalid params", f"parameter {index} must be a string, not {_quote(repr(value))}")
    return value


def _bytes(params: Params, index: int) -> bytes:
    text = _text(params, index)
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError as error:
        raise RpcError(-32602, "Invalid params", f"parameter {index} is not hexadecimal: {_quote(text)!r}") from error


def _address(params: Params, index: int) -> str:
    text = _text(params, index)
    try:
        if len(text) > _QUOTED:  # its decoder takes seconds for a long one
            raise ValueError
        bittensor_core.ss58_decode(text)
    except ValueError as error:
        raise RpcError(-32602, "Invalid params", f"{_quote(text)!r} is not an ss58 address") from error
    return text


def _quote(text: str) -> str:
    """The start of something that a client sent."""
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


def _error(call_id: Json, error: RpcError) -> dict[str, Json]:
    body: dict[str, Json] = {"code": error.code, "message": error.message[:_MAX_MESSAGE]}
    if error.data is not None:
        body["data"] = error.data[:_MAX_MESSAGE] if isinstance(error.data, str) else error.data
    return {"jsonrpc": "2.0", "id": call_id, "error": body}


def _dump(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"))
