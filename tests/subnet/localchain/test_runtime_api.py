"""Runtime APIs: every one that is offered answers, in the metadata's own types, with the chain's values."""

from __future__ import annotations

from typing import cast

import pytest

from subnet.localchain.blocks import Chain
from subnet.localchain.genesis import OWNER_HOTKEY_URI, RAO_PER_TAO, ChainConfig, address
from subnet.localchain.runtime_api import RuntimeApis
from tests.subnet.localchain.test_localchain_blocks import BOB, BOB_HOTKEY, Bench

_COLDKEY, _HOTKEY = address(BOB), address(BOB_HOTKEY)
ARGUMENTS: dict[str, object] = {
    "account": _COLDKEY,
    "coldkey": _COLDKEY,
    "coldkey_account": _COLDKEY,
    "coldkey_accounts": [_COLDKEY],
    "origin_coldkey_account": _COLDKEY,
    "destination_coldkey_account": _COLDKEY,
    "delegate_account": _HOTKEY,
    "delegatee_account": _COLDKEY,
    "hotkey": _HOTKEY,
    "hotkey_account": _HOTKEY,
    "netuid": 9,
    "netuids": None,
    "uid": 1,
    "mecid": 0,
    "subid": 0,
    "metagraph_indexes": [1, 52, 72],
    "tao": 5,
    "alpha": 5,
    "amount": 5,
    "origin": None,
    "destination": None,
}
NAMES = sorted(RuntimeApis(Chain(ChainConfig()).codec).names)


@pytest.fixture(scope="module")
def bench() -> Bench:
    """The owner and Bob's hotkey, in which Bob holds three alpha."""
    bench = Bench()
    assert bench.register() is None
    assert bench.stake(BOB_HOTKEY, 3) is None
    return bench


def ask(bench: Bench, name: str, **changed: object) -> object:
    """Call a runtime API as a client does: encode its inputs, decode its output."""
    codec = bench.chain.codec
    api, _, method = name.partition("_")
    definition = codec._apis[api][method]
    inputs = cast("list[tuple[str, str]]", definition["inputs"])
    data = b"".join(bytes(codec._rt.encode(kind, (ARGUMENTS | changed)[field])) for field, kind in inputs)
    answer = RuntimeApis(codec).call(bench.chain.snapshot(bench.chain.head.number), name, data)
    return cast("object", codec._rt.decode(definition["output"], answer))


@pytest.mark.parametrize("name", NAMES)
def test_it_answers(bench: Bench, name: str) -> None:
    ask(bench, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("SubnetInfo") and "_get_all" not in name])
def test_a_subnet_that_is_not_there_is_none(bench: Bench, name: str) -> None:
    if name.endswith(("_block_emission", "subnets_info", "subnets_info_v2")):
        return
    assert ask(bench, name, netuid=7) is None


def test_neurons_and_stake(bench: Bench) -> None:
    neuron = cast("dict[str, object]", ask(bench, "NeuronInfoRuntimeApi_get_neuron"))
    assert (neuron["hotkey"], neuron["coldkey"], neuron["uid"]) == (_HOTKEY, _COLDKEY, 1)
    assert neuron["stake"] == [(_COLDKEY, 3 * RAO_PER_TAO)]
    assert ask(bench, "NeuronInfoRuntimeApi_get_neuron", uid=2) is None
    (position,) = cast("list[dict[str, object]]", ask(bench, "StakeInfoRuntimeApi_get_stake_info_for_coldkey"))
    assert (position["netuid"], position["stake"], position["is_registered"]) == (9, 3 * RAO_PER_TAO, True)
    available = ask(bench, "StakeInfoRuntimeApi_get_stake_availability_for_coldkeys")
    total = 3 * RAO_PER_TAO
    assert available == {_COLDKEY: {9: {"total": total, "locked": 0, "available": total}}}


def test_a_selective_metagraph_has_what_was_asked_for(bench: Bench) -> None:
    graph = cast("dict[str, object]", ask(bench, "SubnetInfoRuntimeApi_get_selective_metagraph"))
    given = {field: value for field, value in graph.items() if value is not None}
    assert given == {
        "netuid": 9,
        "name": list(b"orion"),
        "hotkeys": [address(OWNER_HOTKEY_URI), _HOTKEY],
        "validators": [0],
    }


def test_hyperparameters_agree_between_their_versions(bench: Bench) -> None:
    entries = cast("list[dict[str, object]]", ask(bench, "SubnetInfoRuntimeApi_get_subnet_hyperparams_v3"))
    newest = {entry["name"]: next(iter(cast("dict[str, object]", entry["value"]).values())) for entry in entries}
    for version in ("", "_v2"):
        older = cast("dict[str, object]", ask(bench, f"SubnetInfoRuntimeApi_get_subnet_hyperparams{version}"))
        shared = older.keys() & newest.keys()
        assert len(shared) > 15
        assert {name: older[name] for name in shared} == {name: newest[name] for name in shared}
