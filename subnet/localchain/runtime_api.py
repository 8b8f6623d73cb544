"""Runtime APIs (`state_call`): the ones that the SDK and btcli call on the way from a wallet to weights.

Inputs and outputs are encoded from the metadata's own definitions; what they say is in the rooms `runtime_subnets`,
`runtime_neurons` and `runtime_stake`. The metagraph of a block is encoded once and kept, because many nodes ask for
the same one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import cast

from subnet.localchain import runtime_neurons, runtime_stake, runtime_subnets
from subnet.localchain.codec import Codec
from subnet.localchain.errors import RpcError
from subnet.localchain.pallets import balances
from subnet.localchain.runtime_neurons import Method
from subnet.localchain.runtime_subnets import metagraph
from subnet.localchain.state import Snapshot

_KEPT = 16
_EXECUTION_FAILED = 4003


def _account_nonce(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    return balances.nonce_of(snapshot, cast("str", inputs[0]))


class RuntimeApis:
    """Answers `state_call` at any block whose state is kept."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._metagraphs: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._methods: Mapping[str, Method] = {
            "AccountNonceApi_account_nonce": _account_nonce,
            **runtime_neurons.METHODS,
            **runtime_stake.METHODS,
            **runtime_subnets.METHODS,
        }

    @property
    def names(self) -> list[str]:
        """The APIs that are answered from state."""
        return list(self._methods)

    def call(self, snapshot: Snapshot, name: str, data: bytes) -> bytes:
        """The SCALE result of runtime API `Api_method`; RpcError naming one that is not there."""
        if name == "Metadata_metadata_at_version":
            return self._codec.metadata_option if data == (15).to_bytes(4, "little") else b"\0"
        if name == "TransactionPaymentApi_query_info":
            return self._query_info(data)
        api, _, method = name.partition("_")
        known = self._codec.has_api(api, method)
        function = self._methods.get(name)
        if not known or function is None:
            reason = "this local chain does not implement it" if known else f"Exported method {name} is not found"
            raise RpcError(_EXECUTION_FAILED, f"Client error: Execution failed: runtime API {name}: {reason}")
        try:
            inputs = self._codec.decode_inputs(api, method, data)
        except ValueError as error:
            raise RpcError(_EXECUTION_FAILED, f"Client error: Execution failed: {name}: {error}") from error
        if function is metagraph:
            return self._encoded_metagraph(snapshot, inputs)
        return self._codec.encode_output(api, method, function(snapshot, inputs))

    def _query_info(self, data: bytes) -> bytes:
        """The fee follows from the extrinsic's length, which the caller passes last."""
        fee = balances.fee_of(int.from_bytes(data[-4:], "little"))
        info = {"weight": {"ref_time": 0, "proof_size": 0}, "class": "Normal", "partial_fee": fee}
        return self._codec.encode_output("TransactionPaymentApi", "query_info", info)

    def _encoded_metagraph(self, snapshot: Snapshot, inputs: Sequence[object]) -> bytes:
        key = (snapshot.block, cast("int", inputs[0]))
        encoded = self._metagraphs.get(key)
        if encoded is None:
            value = metagraph(snapshot, inputs)
            encoded = self._codec.encode_output("SubnetInfoRuntimeApi", "get_metagraph", value)
            self._metagraphs[key] = encoded
            if len(self._metagraphs) > _KEPT:
                self._metagraphs.popitem(last=False)
        return encoded
