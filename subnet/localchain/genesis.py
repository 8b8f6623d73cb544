"""The state that the chain starts from: one subnet with an owner, and development keys with TAO.

Keys come from the development URIs that every Substrate tool knows (`//Alice` …): their secrets are public,
so nothing on this chain is worth anything. Hyperparameters are chosen for development: no rate limits, plain
weights, cheap registration whose price does not rise; the rest are the defaults of the metadata.
`ChainConfig.hyperparameters` makes a subnet that is as strict as a real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import bittensor_core

from subnet.localchain.codec import Codec
from subnet.localchain.dispatch import Context
from subnet.localchain.pallets import balances, shield
from subnet.localchain.state import Working

RAO_PER_TAO = 1_000_000_000
DEVELOPMENT_URIS = ("//Alice", "//Bob", "//Charlie", "//Dave", "//Eve", "//Ferdie")
DEVELOPMENT_TAO = 1_000_000
OWNER_COLDKEY_URI = "//Alice"
OWNER_HOTKEY_URI = "//Alice//hotkey"
REGISTRATION_BURN_RAO = 500_000

_P = "SubtensorModule."
_IDENTITY = ("github_repo", "subnet_contact", "subnet_url", "discord", "description", "logo_url", "additional")

# Of the real chain's values, those that would be in a developer's way are changed: 100 blocks between weights, 50
# between axons, one registration per block, a price that grows by 1.26 with each, 13.9 tempos of activity cut-off.
# Everything in this table can be set by `ChainConfig.hyperparameters`.
HYPERPARAMETERS: Mapping[str, object] = {
    "ActivityCutoffFactorMilli": 50_000,
    "AlphaSigmoidSteepness": 1_000,
    "AlphaValues": (45_875, 58_982),
    "BondsMovingAverage": 900_000,
    "BondsPenalty": 65_535,
    "Burn": REGISTRATION_BURN_RAO,
    "BurnHalfLife": 360,
    "BurnIncreaseMult": {"bits": 1 << 64},
    "CommitRevealWeightsEnabled": False,
    "ImmuneOwnerUidsLimit": 1,
    "ImmunityPeriod": 4_096,
    "Kappa": 32_767,
    "LiquidAlphaOn": False,
    "MaxAllowedUids": 256,
    "MaxAllowedValidators": 64,
    "MaxBurn": 100 * RAO_PER_TAO,
    "MaxRegistrationsPerBlock": 256,
    "MaxWeightsLimit": 65_535,
    "MinAllowedWeights": 1,
    "MinBurn": REGISTRATION_BURN_RAO,
    "MinNonImmuneUids": 10,
    "NetworkPowRegistrationAllowed": False,
    "NetworkRegistrationAllowed": True,
    "RevealPeriodEpochs": 1,
    "ServingRateLimit": 0,
    "TargetRegistrationsPerInterval": 256,
    "WeightsSetRateLimit": 0,
    "WeightsVersionKey": 0,
    "Yuma3On": True,
}


@dataclass(frozen=True, slots=True)
class ChainConfig:
    """What a run of the chain may choose.

    block_time: seconds between blocks. tempo: blocks between epochs. history: blocks whose state can be read.
    finality_lag: how many blocks the finalized head is behind the best one. One, not zero: code that mistakes
    the best block for a final one is then wrong here too and not only on the real chain, at the price of one
    block per write. hyperparameters: storage items of the subnet at genesis, by their names in the metadata
    (`{"BurnHalfLife": 360, "MaxAllowedUids": 64}`), in place of this file's.
    """

    netuid: int = 9
    tempo: int = 20
    block_time: float = 0.25
    history: int = 4_096
    finality_lag: int = 1
    hyperparameters: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.netuid <= 4_095:
            raise ValueError(f"netuid {self.netuid} is outside 1..4095; 0 is the root network")
        if not 2 <= self.tempo <= 50_400:
            raise ValueError(f"tempo {self.tempo} is outside 2..50400 blocks")
        if not 0.01 <= self.block_time <= 60:
            raise ValueError(f"block time {self.block_time} s is outside 0.01..60 s")
        if self.history < 64:
            raise ValueError(f"history of {self.history} blocks is less than the 64 that a default era needs")
        if not 0 <= self.finality_lag <= 8:
            raise ValueError(f"finality lag {self.finality_lag} is outside 0..8 blocks")
        unknown = set(self.hyperparameters) - HYPERPARAMETERS.keys()
        if unknown:
            raise ValueError(f"{min(unknown)!r} is no hyperparameter; choose from {', '.join(sorted(HYPERPARAMETERS))}")


def keypair(uri: str) -> bittensor_core.Keypair:
    """The sr25519 development key of a URI such as `//Alice`."""
    return bittensor_core.Keypair.create_from_uri(uri)


def address(uri: str) -> str:
    """The ss58 address of a development URI."""
    return str(keypair(uri).ss58_address)


def build(codec: Codec, config: ChainConfig, state: Working) -> None:
    """Write block 0 into `state`."""
    ctx = Context(codec=codec, state=state, table={}, number=0)
    for uri in DEVELOPMENT_URIS:
        balances.set_account(ctx, address(uri), free=DEVELOPMENT_TAO * RAO_PER_TAO)
    issuance = len(DEVELOPMENT_URIS) * DEVELOPMENT_TAO * RAO_PER_TAO
    state.put("Balances.TotalIssuance", (), issuance)
    state.put(_P + "TotalIssuance", (), issuance)
    state.put(_P + "TotalNetworks", (), 1)
    state.put("MevShield.NextKey", (), list(shield.public_key()))
    for name, value in {**_subnet(), **HYPERPARAMETERS, "Tempo": config.tempo, **config.hyperparameters}.items():
        state.put(_P + name, (config.netuid,), value)
    _owner_neuron(ctx, config.netuid)


def _subnet() -> dict[str, object]:
    return {
        "NetworksAdded": True,
        "SubtokenEnabled": True,
        "FirstEmissionBlockNumber": 1,
        "SubnetOwner": address(OWNER_COLDKEY_URI),
        "SubnetOwnerHotkey": address(OWNER_HOTKEY_URI),
        "SubnetIdentitiesV3": {**dict.fromkeys(_IDENTITY, b""), "subnet_name": b"orion"},
        "TokenSymbol": "\u03b9".encode(),
    }


def _owner_neuron(ctx: Context, netuid: int) -> None:
    """Uid 0 is the owner's hotkey, permitted from the start."""
    coldkey, hotkey = address(OWNER_COLDKEY_URI), address(OWNER_HOTKEY_URI)
    ctx.state.put(_P + "Owner", (hotkey,), coldkey)
    ctx.state.put(_P + "OwnedHotkeys", (coldkey,), [hotkey])
    ctx.state.put(_P + "StakingHotkeys", (coldkey,), [hotkey])
    ctx.state.put(_P + "SubnetworkN", (netuid,), 1)
    ctx.state.put(_P + "Keys", (netuid, 0), hotkey)
    ctx.state.put(_P + "Uids", (netuid, hotkey), 0)
    ctx.state.put(_P + "IsNetworkMember", (hotkey, netuid), True)
    for column in ("Consensus", "Incentive", "Dividends", "ValidatorTrust", "Emission", "LastUpdate"):
        ctx.state.put(_P + column, (netuid,), [0])
    for column in ("Active", "ValidatorPermit"):
        ctx.state.put(_P + column, (netuid,), [True])
