"""Hyperparameters: what the subnet's owner may set, by the calls behind `btcli sudo set`.

Every setter takes the netuid and one value and writes one storage item. The real chain also limits how often and when
in a tempo an owner may set one; here that would only be in the way.
"""

from __future__ import annotations

from collections.abc import Mapping

from subnet.localchain import neurons
from subnet.localchain.dispatch import Args, Context, Function
from subnet.localchain.errors import DispatchError

# Setter without `sudo_set_`: the argument and the storage item it is written to.
_SETTERS: Mapping[str, tuple[str, str]] = {
    "activity_cutoff_factor": ("factor_milli", "ActivityCutoffFactorMilli"),
    "bonds_moving_average": ("bonds_moving_average", "BondsMovingAverage"),
    "bonds_penalty": ("bonds_penalty", "BondsPenalty"),
    "burn_half_life": ("burn_half_life", "BurnHalfLife"),
    "burn_increase_mult": ("burn_increase_mult", "BurnIncreaseMult"),
    "commit_reveal_weights_enabled": ("enabled", "CommitRevealWeightsEnabled"),
    "commit_reveal_weights_interval": ("interval", "RevealPeriodEpochs"),
    "immunity_period": ("immunity_period", "ImmunityPeriod"),
    "max_allowed_uids": ("max_allowed_uids", "MaxAllowedUids"),
    "max_burn": ("max_burn", "MaxBurn"),
    "min_allowed_weights": ("min_allowed_weights", "MinAllowedWeights"),
    "min_burn": ("min_burn", "MinBurn"),
    "network_registration_allowed": ("registration_allowed", "NetworkRegistrationAllowed"),
    "owner_immune_neuron_limit": ("immune_neurons", "ImmuneOwnerUidsLimit"),
    "serving_rate_limit": ("serving_rate_limit", "ServingRateLimit"),
    "tempo": ("tempo", "Tempo"),
    "weights_version_key": ("weights_version_key", "WeightsVersionKey"),
}


def _setter(argument: str, item: str) -> Function:
    def call(ctx: Context, origin: str, args: Args) -> None:
        netuid = args.number("netuid")
        if not neurons.subnet_exists(ctx.state, netuid):
            raise DispatchError("SubnetDoesNotExist", pallet="AdminUtils")
        if origin != ctx.state.account("SubtensorModule.SubnetOwner", netuid):
            raise DispatchError("BadOrigin", pallet=None)
        if item == "MaxAllowedUids" and args.number(argument) < ctx.state.number("SubtensorModule.SubnetworkN", netuid):
            raise DispatchError("MaxAllowedUIdsLessThanCurrentUIds", pallet="AdminUtils")
        ctx.state.put(f"SubtensorModule.{item}", (netuid,), args.value(argument))

    return call


CALLS: Mapping[str, Function] = {f"sudo_set_{name}": _setter(*target) for name, target in _SETTERS.items()}
