"""Runtime APIs (`state_call`): the ones that the SDK calls on the way from a wallet to weights.

Inputs and outputs are encoded from the metadata's own definitions. The metagraph of a block is encoded once
and kept, because many nodes ask for the same one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.codec import Codec
from subnet.localchain.epoch import ALPHA_PER_BLOCK
from subnet.localchain.errors import RpcError
from subnet.localchain.pallets import balances, staking
from subnet.localchain.state import Snapshot

_P = "SubtensorModule."
_KEPT = 16
_EXECUTION_FAILED = 4003
_NO_AXON = dict.fromkeys(("block", "version", "ip", "port", "ip_type", "protocol", "placeholder1", "placeholder2"), 0)

# Metagraph fields that are one storage item of the subnet, as stored.
_FIELDS: Mapping[str, str] = {
    "network_registered_at": "NetworkRegisteredAt",
    "owner_hotkey": "SubnetOwnerHotkey",
    "owner_coldkey": "SubnetOwner",
    "tempo": "Tempo",
    "last_step": "LastMechansimStepBlock",
    "alpha_in": "SubnetAlphaIn",
    "alpha_out": "SubnetAlphaOut",
    "tao_in": "SubnetTAO",
    "subnet_volume": "SubnetVolume",
    "moving_price": "SubnetMovingPrice",
    "rho": "Rho",
    "kappa": "Kappa",
    "min_allowed_weights": "MinAllowedWeights",
    "max_weights_limit": "MaxWeightsLimit",
    "weights_version": "WeightsVersionKey",
    "weights_rate_limit": "WeightsSetRateLimit",
    "activity_cutoff": "ActivityCutoff",
    "max_validators": "MaxAllowedValidators",
    "num_uids": "SubnetworkN",
    "max_uids": "MaxAllowedUids",
    "burn": "Burn",
    "difficulty": "Difficulty",
    "registration_allowed": "NetworkRegistrationAllowed",
    "pow_registration_allowed": "NetworkPowRegistrationAllowed",
    "immunity_period": "ImmunityPeriod",
    "min_difficulty": "MinDifficulty",
    "max_difficulty": "MaxDifficulty",
    "min_burn": "MinBurn",
    "max_burn": "MaxBurn",
    "adjustment_alpha": "AdjustmentAlpha",
    "adjustment_interval": "AdjustmentInterval",
    "target_regs_per_interval": "TargetRegistrationsPerInterval",
    "max_regs_per_block": "MaxRegistrationsPerBlock",
    "serving_rate_limit": "ServingRateLimit",
    "commit_reveal_weights_enabled": "CommitRevealWeightsEnabled",
    "commit_reveal_period": "RevealPeriodEpochs",
    "liquid_alpha_enabled": "LiquidAlphaOn",
    "bonds_moving_avg": "BondsMovingAverage",
    "active": "Active",
    "validator_permit": "ValidatorPermit",
    "last_update": "LastUpdate",
    "emission": "Emission",
    "dividends": "Dividends",
    "incentives": "Incentive",
    "consensus": "Consensus",
}


class RuntimeApis:
    """Answers `state_call` at any block whose state is kept."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._metagraphs: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._methods: Mapping[str, Callable[[Snapshot, Sequence[object]], object]] = {
            "AccountNonceApi_account_nonce": _account_nonce,
            "SubnetInfoRuntimeApi_get_metagraph": metagraph,
            "SubnetInfoRuntimeApi_get_next_epoch_start_block": _next_epoch_start_block,
            "SwapRuntimeApi_current_alpha_price": _alpha_price,
            "SwapRuntimeApi_sim_swap_tao_for_alpha": _simulate_swap,
            "SwapRuntimeApi_sim_swap_alpha_for_tao": _simulate_swap,
        }

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


def metagraph(snapshot: Snapshot, inputs: Sequence[object]) -> dict[str, object] | None:
    """The state of subnet `inputs[0]` as the runtime's `Metagraph` struct, None for one that does not exist."""
    netuid = cast("int", inputs[0])
    if not neurons.subnet_exists(snapshot, netuid):
        return None
    hotkeys = neurons.hotkeys(snapshot, netuid)
    coldkeys = [snapshot.account(_P + "Owner", hotkey) for hotkey in hotkeys]
    stake = [neurons.stake_of(snapshot, netuid, hotkey) for hotkey in hotkeys]
    none = [0] * len(hotkeys)
    since = snapshot.block - snapshot.number(_P + "LastEpochBlock", netuid)
    alpha_low, alpha_high = cast("tuple[int, int]", snapshot.value(_P + "AlphaValues", netuid))
    fields = {name: snapshot.value(_P + item, netuid) for name, item in _FIELDS.items()}
    registered = [snapshot.number(_P + "BlockAtRegistration", netuid, uid) for uid in range(len(hotkeys))]
    return fields | {
        "netuid": netuid,
        "name": list(b"orion"),
        "symbol": list(_symbol(snapshot, netuid)),
        "identity": None,
        "block": snapshot.block,
        "blocks_since_last_step": since,
        "subnet_emission": ALPHA_PER_BLOCK,
        "alpha_out_emission": ALPHA_PER_BLOCK,
        "alpha_in_emission": 0,
        "tao_in_emission": 0,
        "pending_alpha_emission": since * ALPHA_PER_BLOCK,
        "pending_root_emission": 0,
        "alpha_high": alpha_high,
        "alpha_low": alpha_low,
        "hotkeys": hotkeys,
        "coldkeys": coldkeys,
        "identities": [None] * len(hotkeys),
        "axons": [snapshot.struct(_P + "Axons", netuid, hotkey) or _NO_AXON for hotkey in hotkeys],
        "pruning_score": none,
        "trust": none,
        "rank": none,
        "block_at_registration": registered,
        "alpha_stake": stake,
        "tao_stake": none,
        "total_stake": stake,
        "tao_dividends_per_hotkey": [],
        "alpha_dividends_per_hotkey": [],
        "collateral_locked": none,
        "collateral_min": none,
        "collateral_earned": none,
    }


def _symbol(snapshot: Snapshot, netuid: int) -> bytes:
    value = snapshot.value(_P + "TokenSymbol", netuid)
    return value.encode() if isinstance(value, str) else bytes(cast("list[int]", value))


def _account_nonce(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    return balances.nonce_of(snapshot, cast("str", inputs[0]))


def _next_epoch_start_block(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    netuid = inputs[0]
    tempo = snapshot.number(_P + "Tempo", netuid)
    if not neurons.subnet_exists(snapshot, cast("int", netuid)) or tempo == 0:
        return None
    return snapshot.number(_P + "LastEpochBlock", netuid) + tempo


def _alpha_price(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return staking.PRICE


def _simulate_swap(_snapshot: Snapshot, inputs: Sequence[object]) -> object:
    """On a stable subnet what goes in comes out: no fee, no slippage."""
    amount = inputs[1]
    free = dict.fromkeys(("tao_fee", "alpha_fee", "tao_slippage", "alpha_slippage"), 0)
    return {"tao_amount": amount, "alpha_amount": amount, **free}
