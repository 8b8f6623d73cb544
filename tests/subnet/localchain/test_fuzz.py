"""Whatever is sent to the chain, it answers properly and goes on: seeded mutations of extrinsics, calls and frames."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Mapping

import bittensor_core
import pytest
from websockets.asyncio.client import connect

from subnet.localchain import ChainConfig, LocalChain
from subnet.localchain.errors import RpcError
from subnet.localchain.extrinsic import make
from subnet.localchain.genesis import address
from subnet.localchain.pallets import TABLE
from tests.subnet.localchain.test_localchain_blocks import BOB, BOB_HOTKEY, TX, Bench

STEP_SECONDS = 2.0
LONG_SECONDS = 60.0
_EDGES = (0, 1, 2, 9, 0xFF, 0xFFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_JSON = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    2**80,
    "",
    "0x",
    "0x0",
    "zz",
    "0x" + "00" * 40,
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
)
AXON = {
    "netuid": 9, "version": 1, "ip": 0x7F000001, "port": 8_091, "ip_type": 4,
    "protocol": 4, "placeholder1": 0, "placeholder2": 0,
}  # fmt: skip
SEALED = {"netuid": 9, "commit": b"\x01" * 40, "reveal_round": 1000, "commit_reveal_version": 4}
CARRIER = {"ciphertext": bytes(16) + (1_088).to_bytes(2, "little") + bytes(1_088 + 24 + 40)}
CALLS: list[tuple[str, str, Mapping[str, object]]] = [
    ("Balances", "transfer_keep_alive", {"dest": address("//Eve"), "value": 10**9}),
    ("Balances", "transfer_allow_death", {"dest": address("//Eve"), "value": 10**9}),
    ("Balances", "transfer_all", {"dest": address("//Eve"), "keep_alive": True}),
    (TX, "burned_register", {"netuid": 9, "hotkey": address("//F1")}),
    (TX, "register_limit", {"netuid": 9, "hotkey": address("//F2"), "limit_price": 10**10}),
    (TX, "add_stake", {"hotkey": address(BOB_HOTKEY), "netuid": 9, "amount_staked": 10**9}),
    (TX, "remove_stake", {"hotkey": address(BOB_HOTKEY), "netuid": 9, "amount_unstaked": 10**6}),
    (TX, "serve_axon", AXON),
    (TX, "set_weights", {"netuid": 9, "dests": [0, 1], "weights": [1, 2], "version_key": 0}),
    (TX, "set_mechanism_weights", {"netuid": 9, "mecid": 0, "dests": [0], "weights": [1], "version_key": 0}),
    (TX, "commit_weights", {"netuid": 9, "commit_hash": "0x" + "11" * 32}),
    (TX, "reveal_weights", {"netuid": 9, "uids": [0], "values": [1], "salt": [1], "version_key": 0}),
    (TX, "commit_timelocked_weights", SEALED),
    ("MevShield", "submit_encrypted", CARRIER),
    ("MevShield", "submit_encrypted", {"ciphertext": b"0x no hexadecimal"}),
    ("AdminUtils", "sudo_set_weights_set_rate_limit", {"netuid": 9, "weights_set_rate_limit": 1}),
    ("AdminUtils", "sudo_set_tempo", {"netuid": 9, "tempo": 20}),
    ("AdminUtils", "sudo_set_commit_reveal_weights_enabled", {"netuid": 9, "enabled": False}),
    ("Commitments", "set_commitment", {"netuid": 9, "info": {"fields": [{"Raw3": b"abc"}]}}),
]  # fmt: skip


def mutate(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, removed, doubled, or set to the edge of a number's range."""
    raw = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(6):
            case 0 if raw:
                raw[at % len(raw)] ^= 1 << chance.randrange(8)
            case 1:
                del raw[at : at + chance.randrange(1, 9)]
            case 2:
                raw[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 3:
                raw[at : at + 8] = chance.choice(_EDGES).to_bytes(8, "little")
            case 4:
                raw[at:at] = raw[at : at + chance.randrange(1, 65)]
            case _:
                raw[at : at + 1] = bytes([chance.choice((0, 0xFF, 0xFE, 0x03, 0x80))])
    return bytes(raw)


class Fuzzed:
    """A chain under fire, with commit-reveal on or off. `crashes` are what was logged as an error."""

    def __init__(self, seed: int, *, commit_reveal: bool) -> None:
        self.bench = Bench(tempo=5, hyperparameters={"CommitRevealWeightsEnabled": commit_reveal})  # type: ignore[arg-type]
        self.chance = random.Random(seed)  # noqa: S311 - for repeatable runs
        self.accepted = self.refused = 0
        self.bench.register()
        self.bench.stake(BOB_HOTKEY, 1_000)
        codec = self.bench.chain.codec._rt
        known = [call for call in CALLS if call[1] in TABLE.get(call[0], {})]
        self.calls = [bytes(codec.compose_call(module, name, dict(args))) for module, name, args in known]
        for kind in ("batch", "batch_all", "force_batch"):
            self.calls.append(bytes(codec.compose_call("Utility", kind, {"calls": self.calls[:3]})))

    def submit(self, raw: bytes) -> None:
        try:
            self.bench.chain.submit(raw)
        except RpcError:
            self.refused += 1
        else:
            self.accepted += 1

    def mutated_extrinsic(self) -> None:
        """Signed, then changed: no signature but its own may pass."""
        raw = self.sign(self.chance.choice(self.calls))
        changed = mutate(self.chance, raw)
        accepted = self.accepted
        self.submit(changed)
        assert changed == raw or self.accepted == accepted, changed.hex()

    def mutated_call(self) -> None:
        """Changed, then signed: what still decodes reaches the pallets."""
        self.submit(self.sign(mutate(self.chance, self.chance.choice(self.calls))))

    def sign(self, call: bytes) -> bytes:
        chain = self.bench.chain
        key = bittensor_core.Keypair.create_from_uri(
            self.chance.choice((BOB, BOB_HOTKEY, "//Alice", "//Alice//hotkey"))
        )
        nonce, first = chain.next_nonce(key.ss58_address), chain.hash_of(0) or b""
        return make(chain.codec, call, key, period=0, nonce=nonce, current=(0, first), genesis=first)

    def run(self, step: Callable[[], None], seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(20):
                step()
            self.bench.block()


def fuzz_chain(seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="orion.subnet.localchain"):
        for seed, commit_reveal in enumerate((False, True)):
            fuzzed = Fuzzed(seed, commit_reveal=commit_reveal)
            fuzzed.run(fuzzed.mutated_extrinsic, seconds / 4)
            assert fuzzed.refused > 0
            fuzzed.run(fuzzed.mutated_call, seconds / 4)
            assert fuzzed.accepted > 0
            assert fuzzed.bench.register("//Charlie", "//Last") is None  # still at work
    assert not caplog.records, caplog.text


FRAMES: list[dict[str, object]] = [
    {"method": "chain_getBlockHash", "params": [[0, 1]]},
    {"method": "chain_getHeader", "params": []},
    {"method": "chain_getBlock", "params": [None]},
    {"method": "state_getStorage", "params": ["0x00"]},
    {"method": "state_queryStorageAt", "params": [["0x00"]]},
    {"method": "state_getKeysPaged", "params": ["0x", 10, None]},
    {"method": "state_call", "params": ["SubnetInfoRuntimeApi_get_metagraph", "0x0900"]},
    {"method": "state_call", "params": ["SubnetInfoRuntimeApi_get_dynamic_info", "0x0900"]},
    {"method": "state_call", "params": ["Metadata_metadata_versions", "0x"]},
    {"method": "state_getRuntimeVersion", "params": []},
    {"method": "system_accountNextIndex", "params": [address(BOB)]},
    {"method": "author_submitExtrinsic", "params": ["0x0400"]},
    {"method": "author_submitAndWatchExtrinsic", "params": ["0x0400"]},
    {"method": "author_pendingExtrinsics", "params": []},
    {"method": "chain_subscribeNewHeads", "params": []},
    {"method": "chain_unsubscribeNewHeads", "params": ["orion1"]},
    {"method": "rpc_methods"},
]


def frame(chance: random.Random) -> str | bytes:
    """A request, a batch or garbage, from valid ones."""
    made = {"jsonrpc": "2.0", "id": chance.randrange(100), **chance.choice(FRAMES)}
    params = list(made.get("params") or [])  # type: ignore[call-overload]
    for _ in range(chance.randrange(3)):
        match chance.randrange(6):
            case 0:
                params.insert(chance.randrange(len(params) + 1), chance.choice(_JSON))
            case 1 if params:
                params[chance.randrange(len(params))] = chance.choice(_JSON)
            case 2 if params and isinstance(params[-1], str):
                params[-1] = "0x" + mutate(chance, chance.randbytes(chance.randrange(64))).hex()
            case 3:
                made[chance.choice(("id", "jsonrpc", "method", "params"))] = chance.choice(_JSON)
                return json.dumps(made)
            case 4:
                text = json.dumps(made | {"params": params}).encode()
                return mutate(chance, text)
            case _:
                made.pop(chance.choice(tuple(made)))
                return json.dumps([made] * chance.randrange(3))
    return json.dumps(made | {"params": params})


async def fuzz_frames(seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(0)  # noqa: S311 - for repeatable runs
    loop = asyncio.get_running_loop()
    end, sent = loop.time() + seconds, 0
    with caplog.at_level(logging.ERROR, logger="orion.subnet.localchain"):
        async with LocalChain(ChainConfig(block_time=0.1)) as chain:
            while loop.time() < end:
                async with connect(chain.url, max_queue=None, max_size=None) as client:
                    for _ in range(100):
                        await client.send(frame(chance))
                        sent += 1
                    await client.send('{"jsonrpc":"2.0","id":"last","method":"system_chain"}')
                    while True:
                        answer = json.loads(await client.recv())
                        for one in answer if isinstance(answer, list) else [answer]:
                            assert one["jsonrpc"] == "2.0"
                            assert {"result", "error", "method"} & one.keys()
                            assert one.get("error", {}).get("code") != -32603, one
                        if isinstance(answer, dict) and answer.get("id") == "last":
                            break
    assert sent > 100
    assert not caplog.records, caplog.text


def test_mutated_extrinsics_and_calls(caplog: pytest.LogCaptureFixture) -> None:
    fuzz_chain(STEP_SECONDS, caplog)


async def test_mutated_frames(caplog: pytest.LogCaptureFixture) -> None:
    await fuzz_frames(STEP_SECONDS, caplog)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_minute_of_mutations(caplog: pytest.LogCaptureFixture) -> None:
    fuzz_chain(LONG_SECONDS / 2, caplog)
    await fuzz_frames(LONG_SECONDS / 2, caplog)
