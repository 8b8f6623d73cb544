"""JSON-RPC as a Substrate node speaks it: methods, batches and error objects. No sockets here.

`Rpc.answer` takes one text frame and a `Peer` (what the connection can do: send a frame, remember
subscriptions) and returns the response frame, or None where the frame was a notification. Method names and
their old aliases are Substrate's; an unknown one is -32601, wrong parameters are -32602, malformed JSON is
-32700.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import bittensor_core

from subnet.localchain import metadata
from subnet.localchain.blocks import Block, Chain
from subnet.localchain.errors import RpcError
from subnet.localchain.extrinsic import Extrinsic
from subnet.localchain.runtime_api import RuntimeApis
from subnet.localchain.state import Snapshot, StateDiscarded

log = logging.getLogger("orion.subnet.localchain.rpc")

Json = object
Params = Sequence[Json]

MAX_BATCH = 256
MAX_KEYS = 1_000

_NAME = "orion-localchain"


class Peer(Protocol):
    """One connection, as the methods see it."""

    def subscribe(self, kind: str, method: str) -> str:
        """Open a subscription to `kind` whose notifications carry `method`; returns its id."""

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

    def answer(self, frame: str | bytes, peer: Peer) -> str | None:
        """The response to one text frame: an object, a batch of them, or None for notifications only."""
        try:
            message = json.loads(frame)
        except ValueError:
            return _dump(_error(None, RpcError(-32700, "Parse error")))
        if not isinstance(message, list):
            response = self._one(message, peer)
            return None if response is None else _dump(response)
        if not message or len(message) > MAX_BATCH:
            reason = f"batch of {len(message)} requests, allowed are 1 to {MAX_BATCH}"
            return _dump(_error(None, RpcError(-32600, "Invalid Request", reason)))
        responses = [response for item in message if (response := self._one(item, peer)) is not None]
        return _dump(responses) if responses else None

    def _one(self, request: Json, peer: Peer) -> dict[str, Json] | None:
        if not isinstance(request, Mapping) or not isinstance(request.get("method"), str):
            return _error(None, RpcError(-32600, "Invalid Request"))
        call_id, params = request.get("id"), request.get("params") or []
        function = self._methods.get(request["method"])
        if function is None:
            return _error(call_id, RpcError(-32601, "Method not found", request["method"]))
        if not isinstance(params, list):
            return _error(call_id, RpcError(-32602, "Invalid params", "expected a list of positional parameters"))
        try:
            result = function(peer, params)
        except RpcError as error:
            return _error(call_id, error)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            log.exception("%s failed", request["method"])
            return _error(call_id, RpcError(-32603, "Internal error", f"{type(error).__name__}: {error}"))
        return {"jsonrpc": "2.0", "id": call_id, "result": result} if "id" in request else None

    # blocks ---------------------------------------------------------------------------------------

    def _number(self, params: Params, index: int) -> int:
        """The block named by the hash at `params[index]`; the best block where none is given."""
        if len(params) <= index or params[index] is None:
            return self._chain.head.number
        block_hash = _bytes(params, index)
        number = self._chain.number_of(block_hash)
        if number is None:
            raise RpcError(
                4003, f"Client error: UnknownBlock: Header was not found in the database: {_hex(block_hash)}"
            )
        return number

    def _snapshot(self, params: Params, index: int) -> Snapshot:
        number = self._number(params, index)
        try:
            return self._chain.snapshot(number)
        except StateDiscarded as error:
            block_hash = _hex(self._chain.hash_of(number) or b"")
            raise RpcError(4003, f"Client error: UnknownBlock: State already discarded for {block_hash}") from error

    def _get_block_hash(self, _peer: Peer, params: Params) -> Json:
        if not params or params[0] is None:
            return _hex(self._chain.head.hash)
        if isinstance(params[0], list):
            return [self._hash_at(number) for number in params[0]]
        return self._hash_at(params[0])

    def _hash_at(self, number: Json) -> Json:
        try:
            value = int(number, 16) if isinstance(number, str) else int(cast("int", number))
        except (TypeError, ValueError) as error:
            raise RpcError(-32602, "Invalid params", f"{number!r} is not a block number") from error
        block_hash = self._chain.hash_of(value)
        return None if block_hash is None else _hex(block_hash)

    def _block(self, params: Params) -> Block | None:
        if params and params[0] is not None and self._chain.number_of(_bytes(params, 0)) is None:
            return None
        return self._chain.block(self._number(params, 0))

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
            raise RpcError(4002, f"count exceeds maximum value. value: {count}, max: {MAX_KEYS}")
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
        raise RpcError(-32602, "Invalid params", f"parameter {index} must be a string, not {value!r}")
    return value


def _bytes(params: Params, index: int) -> bytes:
    text = _text(params, index)
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError as error:
        raise RpcError(-32602, "Invalid params", f"parameter {index} is not hexadecimal: {text[:32]!r}") from error


def _address(params: Params, index: int) -> str:
    text = _text(params, index)
    try:
        bittensor_core.ss58_decode(text)
    except ValueError as error:
        raise RpcError(-32602, "Invalid params", f"{text[:64]!r} is not an ss58 address") from error
    return text


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


def _error(call_id: Json, error: RpcError) -> dict[str, Json]:
    body: dict[str, Json] = {"code": error.code, "message": error.message}
    if error.data is not None:
        body["data"] = error.data
    return {"jsonrpc": "2.0", "id": call_id, "error": body}


def _dump(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"))
