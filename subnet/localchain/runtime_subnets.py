"""Runtime APIs about subnets: metagraphs (whole, selective), hyperparameters, and the summaries that lists are made of.

Nearly every field is one storage item under another name, so most of this file is tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.epoch import ALPHA_PER_BLOCK
from subnet.localchain.runtime_neurons import NO_AXON, Method
from subnet.localchain.state import Snapshot

_P = "SubtensorModule."

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

# Hyperparameters as `get_subnet_hyperparams_v3` tags them: name, tag, storage item.
_HYPERPARAMETERS: Sequence[tuple[str, str, str]] = (
    ("kappa", "U16", "Kappa"),
    ("immunity_period", "U16", "ImmunityPeriod"),
    ("min_allowed_weights", "U16", "MinAllowedWeights"),
    ("max_weights_limit", "U16", "MaxWeightsLimit"),
    ("tempo", "U16", "Tempo"),
    ("weights_version", "U64", "WeightsVersionKey"),
    ("weights_rate_limit", "U64", "WeightsSetRateLimit"),
    ("activity_cutoff_factor", "U32", "ActivityCutoffFactorMilli"),
    ("registration_allowed", "Bool", "NetworkRegistrationAllowed"),
    ("network_pow_registration_allowed", "Bool", "NetworkPowRegistrationAllowed"),
    ("target_regs_per_interval", "U16", "TargetRegistrationsPerInterval"),
    ("min_burn", "TaoBalance", "MinBurn"),
    ("max_burn", "TaoBalance", "MaxBurn"),
    ("burn_half_life", "U16", "BurnHalfLife"),
    ("burn_increase_mult", "U64F64", "BurnIncreaseMult"),
    ("bonds_moving_avg", "U64", "BondsMovingAverage"),
    ("bonds_penalty", "U16", "BondsPenalty"),
    ("max_regs_per_block", "U16", "MaxRegistrationsPerBlock"),
    ("serving_rate_limit", "U64", "ServingRateLimit"),
    ("max_validators", "U16", "MaxAllowedValidators"),
    ("max_allowed_uids", "U16", "MaxAllowedUids"),
    ("owner_immune_neuron_limit", "U16", "ImmuneOwnerUidsLimit"),
    ("commit_reveal_period", "U64", "RevealPeriodEpochs"),
    ("commit_reveal_weights_enabled", "Bool", "CommitRevealWeightsEnabled"),
    ("liquid_alpha_enabled", "Bool", "LiquidAlphaOn"),
    ("yuma3_enabled", "Bool", "Yuma3On"),
    ("bonds_reset_enabled", "Bool", "BondsResetOn"),
    ("transfers_enabled", "Bool", "TransferToggle"),
    ("subnet_is_active", "Bool", "SubtokenEnabled"),
    ("subnet_emission_enabled", "Bool", "SubnetEmissionEnabled"),
    ("owner_cut_enabled", "Bool", "OwnerCutEnabled"),
    ("owner_cut_auto_lock_enabled", "Bool", "OwnerCutAutoLockEnabled"),
    ("collateral_lock_share", "U16", "CollateralLockShare"),
    ("collateral_drain_ratio", "U64F64", "CollateralDrainRatio"),
    ("min_childkey_take", "U16", "MinChildkeyTakePerSubnet"),
)

_I32F32_ONE = 1 << 32

# Field number i of `get_selective_metagraph`. Commitments (73) are left out: they are read from their own storage.
_SELECTIVE = (  # noqa: SIM905 - as a list it would be seventy-five lines
    "netuid name symbol identity network_registered_at owner_hotkey owner_coldkey block tempo last_step "
    "blocks_since_last_step subnet_emission alpha_in alpha_out tao_in alpha_out_emission alpha_in_emission "
    "tao_in_emission pending_alpha_emission pending_root_emission subnet_volume moving_price rho kappa "
    "min_allowed_weights max_weights_limit weights_version weights_rate_limit activity_cutoff max_validators num_uids "
    "max_uids burn difficulty registration_allowed pow_registration_allowed immunity_period min_difficulty "
    "max_difficulty min_burn max_burn adjustment_alpha adjustment_interval target_regs_per_interval max_regs_per_block "
    "serving_rate_limit commit_reveal_weights_enabled commit_reveal_period liquid_alpha_enabled alpha_high alpha_low "
    "bonds_moving_avg hotkeys coldkeys identities axons active validator_permit pruning_score last_update emission "
    "dividends incentives consensus trust rank block_at_registration alpha_stake tao_stake total_stake "
    "tao_dividends_per_hotkey alpha_dividends_per_hotkey validators commitments collateral_locked collateral_min "
    "collateral_earned"
).split()


def metagraph(snapshot: Snapshot, inputs: Sequence[object]) -> dict[str, object] | None:
    """The state of subnet `inputs[0]` as the runtime's `Metagraph` struct, None for one that does not exist."""
    netuid = cast("int", inputs[0])
    if not neurons.subnet_exists(snapshot, netuid):
        return None
    hotkeys = neurons.hotkeys(snapshot, netuid)
    coldkeys = [snapshot.account(_P + "Owner", hotkey) for hotkey in hotkeys]
    stake = [neurons.stake_of(snapshot, netuid, hotkey) for hotkey in hotkeys]
    none = [0] * len(hotkeys)
    identity = snapshot.struct(_P + "SubnetIdentitiesV3", netuid)
    since = snapshot.block - snapshot.number(_P + "LastEpochBlock", netuid)
    alpha_low, alpha_high = cast("tuple[int, int]", snapshot.value(_P + "AlphaValues", netuid))
    fields = {name: snapshot.value(_P + item, netuid) for name, item in _FIELDS.items()}
    registered = [snapshot.number(_P + "BlockAtRegistration", netuid, uid) for uid in range(len(hotkeys))]
    return fields | {
        "netuid": netuid,
        "name": list(_bytes(identity["subnet_name"])) if identity else [],
        "symbol": list(_bytes(snapshot.value(_P + "TokenSymbol", netuid))),
        "identity": identity,
        "block": snapshot.block,
        "blocks_since_last_step": since,
        "subnet_emission": ALPHA_PER_BLOCK,
        "alpha_out_emission": ALPHA_PER_BLOCK,
        "alpha_in_emission": 0,
        "tao_in_emission": 0,
        "pending_alpha_emission": since * ALPHA_PER_BLOCK,
        "pending_root_emission": 0,
        "activity_cutoff": _activity_cutoff(snapshot, netuid),
        "alpha_high": alpha_high,
        "alpha_low": alpha_low,
        "hotkeys": hotkeys,
        "coldkeys": coldkeys,
        "identities": [None] * len(hotkeys),
        "axons": [snapshot.struct(_P + "Axons", netuid, hotkey) or NO_AXON for hotkey in hotkeys],
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


def _activity_cutoff(snapshot: Snapshot, netuid: int) -> int:
    """Blocks after which a validator that set no weights counts as inactive, as a u16."""
    factor = snapshot.number(_P + "ActivityCutoffFactorMilli", netuid)
    return min(snapshot.number(_P + "Tempo", netuid) * factor // 1000, 0xFFFF)


def _bytes(value: object) -> bytes:
    """A byte vector as the codec decodes it: text where it is UTF-8, a list of numbers otherwise."""
    return value.encode() if isinstance(value, str) else bytes(cast("list[int]", value))


def _each(method: Method) -> Method:
    """The list form of a method that takes a netuid: one entry per subnet."""

    def listed(snapshot: Snapshot, _inputs: Sequence[object]) -> object:
        return [method(snapshot, [netuid]) for netuid in neurons.subnets(snapshot)]

    return listed


def _mechagraph(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    """Subnets here have one mechanism, number 0."""
    return metagraph(snapshot, inputs) if inputs[1] == 0 else None


def _selective(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    graph = metagraph(snapshot, inputs)
    if graph is None:
        return None
    permits = cast("list[bool]", graph["validator_permit"])
    graph |= {"validators": [uid for uid, permit in enumerate(permits) if permit], "commitments": None}
    wanted = {_SELECTIVE[index] for index in cast("list[int]", inputs[-1]) if index < len(_SELECTIVE)} | {"netuid"}
    return {name: graph[name] if name in wanted else None for name in _SELECTIVE}


def _selective_mechagraph(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    return _selective(snapshot, inputs) if inputs[1] == 0 else None


def _subnet_state(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    """The per-uid half of the metagraph."""
    graph = metagraph(snapshot, inputs)
    return None if graph is None else graph | {"emission_history": []}


def _dynamic(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    graph = metagraph(snapshot, inputs)
    if graph is None:
        return None
    names = {"subnet_name": "name", "token_symbol": "symbol", "emission": "subnet_emission"}
    return graph | {field: graph[source] for field, source in names.items()} | {"subnet_identity": graph["identity"]}


def _info(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    """Both `SubnetInfo` and its second version, which differ in one field's name and an identity."""
    graph = metagraph(snapshot, inputs)
    if graph is None:
        return None
    names = {"max_allowed_validators": "max_validators", "subnetwork_n": "num_uids", "max_allowed_uids": "max_uids"}
    return (
        graph
        | {field: graph[source] for field, source in names.items()}
        | {"owner": graph["owner_coldkey"]}
        | {"scaling_law_power": snapshot.number(_P + "ScalingLawPower", inputs[0]), "network_modality": 0}
        | {"network_connect": [], "emission_values": ALPHA_PER_BLOCK, "emission_value": ALPHA_PER_BLOCK}
    )


def _hyperparameters_v2(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    """Both struct forms; the codec takes from the dict what each of them has."""
    graph = metagraph(snapshot, inputs)
    if graph is None:
        return None
    netuid = inputs[0]
    steepness = snapshot.number(_P + "AlphaSigmoidSteepness", netuid) * _I32F32_ONE
    return graph | {
        "alpha_sigmoid_steepness": {"bits": steepness},
        "yuma_version": 3 if snapshot.flag(_P + "Yuma3On", netuid) else 2,
        "subnet_is_active": snapshot.flag(_P + "SubtokenEnabled", netuid),
        "transfers_enabled": snapshot.flag(_P + "TransferToggle", netuid),
        "bonds_reset_enabled": snapshot.flag(_P + "BondsResetOn", netuid),
        "user_liquidity_enabled": False,
    }


def _hyperparameters_v3(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    netuid = cast("int", inputs[0])
    if not neurons.subnet_exists(snapshot, netuid):
        return None
    low, high = cast("tuple[int, int]", snapshot.value(_P + "AlphaValues", netuid))
    steepness = snapshot.number(_P + "AlphaSigmoidSteepness", netuid) * _I32F32_ONE
    values = [(name, tag, snapshot.value(_P + item, netuid)) for name, tag, item in _HYPERPARAMETERS]
    values += [
        ("activity_cutoff", "U16", _activity_cutoff(snapshot, netuid)),
        ("alpha_low", "U16", low),
        ("alpha_high", "U16", high),
        ("alpha_sigmoid_steepness", "I32F32", {"bits": steepness}),
        ("yuma_version", "U16", 3 if snapshot.flag(_P + "Yuma3On", netuid) else 2),
    ]
    return [{"name": list(name.encode()), "value": {tag: value}} for name, tag, value in values]


def _next_epoch_start_block(snapshot: Snapshot, inputs: Sequence[object]) -> object:
    netuid = inputs[0]
    tempo = snapshot.number(_P + "Tempo", netuid)
    if not neurons.subnet_exists(snapshot, cast("int", netuid)) or tempo == 0:
        return None
    return snapshot.number(_P + "LastEpochBlock", netuid) + tempo


def _block_emission(_snapshot: Snapshot, _inputs: Sequence[object]) -> object:
    return ALPHA_PER_BLOCK


METHODS: Mapping[str, Method] = {
    f"SubnetInfoRuntimeApi_{name}": method
    for name, method in {
        "get_metagraph": metagraph,
        "get_all_metagraphs": _each(metagraph),
        "get_mechagraph": _mechagraph,
        "get_all_mechagraphs": _each(metagraph),
        "get_selective_metagraph": _selective,
        "get_selective_mechagraph": _selective_mechagraph,
        "get_subnet_state": _subnet_state,
        "get_dynamic_info": _dynamic,
        "get_all_dynamic_info": _each(_dynamic),
        "get_subnet_info": _info,
        "get_subnets_info": _each(_info),
        "get_subnet_info_v2": _info,
        "get_subnets_info_v2": _each(_info),
        "get_subnet_hyperparams": _hyperparameters_v2,
        "get_subnet_hyperparams_v2": _hyperparameters_v2,
        "get_subnet_hyperparams_v3": _hyperparameters_v3,
        "get_next_epoch_start_block": _next_epoch_start_block,
        "get_block_emission": _block_emission,
    }.items()
}
