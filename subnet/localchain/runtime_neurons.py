"""Runtime APIs about neurons: NeuronInfo, its lite form, and delegates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from subnet.localchain import neurons
from subnet.localchain.pallets import staking
from subnet.localchain.state import Snapshot

Method = Callable[[Snapshot, Sequence[object]], object]

NO_AXON: Mapping[str, object] = dict.fromkeys(
    ("block", "version", "ip", "port", "ip_type", "protocol", "placeholder1", "placeholder2"), 0
)
_NO_PROMETHEUS = dict.fromkeys(("block", "version", "ip", "port", "ip_type"), 0)
_P = "SubtensorModule."
# NeuronInfo's fields that are an entry of a column.
_COLUMNS = {
    "active": "Active",
    "emission": "Emission",
    "incentive": "Incentive",
    "consensus": "Consensus",
    "validator_trust": "ValidatorTrust",
    "dividends": "Dividends",
    "last_update": "LastUpdate",
    "validator_permit": "ValidatorPermit",
}


def stakes_of(snapshot: Snapshot, netuid: int, hotkey: str) -> list[tuple[str, int]]:
    """(coldkey, alpha in rao) of everybody who holds stake on `hotkey`."""
    prefix = snapshot.codec.key(_P + "AlphaV2", (hotkey,))
    found = []
    for key in snapshot.keys(prefix):
        coldkey, subnet = snapshot.codec.map_key(_P + "AlphaV2", key, fixed=1)
        if subnet == netuid:
            holder = cast("str", coldkey)
            found.append((holder, staking.position(snapshot, netuid, hotkey, holder)))
    return [(coldkey, alpha) for coldkey, alpha in found if alpha]


class _Table:
    """The columns of one subnet, read once for all of its neurons."""

    def __init__(self, snapshot: Snapshot, netuid: int) -> None:
        self.hotkeys = neurons.hotkeys(snapshot, netuid)
        self._snapshot = snapshot
        self._netuid = netuid
        self._columns = {
            field: cast("list[object]", snapshot.value(_P + item, netuid)) for field, item in _COLUMNS.items()
        }

    def lite(self, uid: int) -> dict[str, object]:
        hotkey = self.hotkeys[uid]
        return {field: column[uid] for field, column in self._columns.items()} | {
            "hotkey": hotkey,
            "coldkey": self._snapshot.account(_P + "Owner", hotkey),
            "uid": uid,
            "netuid": self._netuid,
            "axon_info": self._snapshot.struct(_P + "Axons", self._netuid, hotkey) or NO_AXON,
            "prometheus_info": _NO_PROMETHEUS,
            "stake": stakes_of(self._snapshot, self._netuid, hotkey),
            "rank": 0,
            "trust": 0,
            "pruning_score": 0,
        }

    def full(self, uid: int) -> dict[str, object]:
        rows = {name.lower(): self._snapshot.pairs(_P + name, self._netuid, uid) for name in ("Weights", "Bonds")}
        return self.lite(uid) | rows


def _all(build: Callable[[_Table, int], dict[str, object]]) -> Method:
    def method(snapshot: Snapshot, inputs: Sequence[object]) -> object:
        table = _Table(snapshot, cast("int", inputs[0]))
        return [build(table, uid) for uid in range(len(table.hotkeys))]

    return method


def _one(build: Callable[[_Table, int], dict[str, object]]) -> Method:
    def method(snapshot: Snapshot, inputs: Sequence[object]) -> object:
        table, uid = _Table(snapshot, cast("int", inputs[0])), cast("int", inputs[1])
        return build(table, uid) if uid < len(table.hotkeys) else None

    return method


METHODS: Mapping[str, Method] = {
    "NeuronInfoRuntimeApi_get_neurons": _all(_Table.full),
    "NeuronInfoRuntimeApi_get_neuron": _one(_Table.full),
    "NeuronInfoRuntimeApi_get_neurons_lite": _all(_Table.lite),
    "NeuronInfoRuntimeApi_get_neuron_lite": _one(_Table.lite),
}
