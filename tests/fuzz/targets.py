"""What takes bytes from strangers, each with bytes that it takes and the only errors that it may raise.

A target is fed anything. It ends, or raises what it names; what it takes it must take to mean the same when written
again. Everything else is a bug.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from model.checkpoint import CheckpointError, CheckpointInfo, dumps, loads
from subnet.localchain.blocks import Chain
from subnet.localchain.errors import InvalidTransaction, RpcError
from subnet.localchain.extrinsic import make
from subnet.localchain.genesis import ChainConfig, address, keypair
from subnet.localchain.rpc import Peer, Rpc
from subnet.manifest import Announcement
from subnet.messages import Forward
from subnet.swarm import snapshot
from subnet.swarm.codec import CODECS, PayloadError
from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import Roster
from subnet.swarm.snapshot import SnapshotError
from subnet.transport import http1, synapse
from subnet.transport.errors import Refused
from subnet.transport.http1 import BadHead
from subnet.transport.synapse import TensorSpec, tensor_bytes
from subnet.trust import delta
from subnet.trust.continuity import breaks
from subnet.trust.heads import WindowHead, acknowledged, conflicting
from subnet.trust.ledger import (
    CLOSING_BYTES,
    NO_ROOT,
    Closing,
    Direction,
    Evidence,
    Leaf,
    LedgerError,
    Tables,
    units_hash,
)
from subnet.trust.report import MinerReport, Report, ReportError
from subnet.trust.tree import PROOF_LIMIT, proven

RUN = "ab" * 32
VALUES = 300


@dataclass(frozen=True, slots=True)
class Target:
    """`feed` raises for what nobody foresaw."""

    feed: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]


# -- messages -----------------------------------------------------------------------------------------------------

BOUNDARY = {"y": TensorSpec(torch.bfloat16, (1, 4, 2))}


def _forward() -> Forward:
    return Forward(run="ab" * 8, round=3, sample=7, head="5" + "C" * 47, index=1, version=2, again=False)


def _synapse(data: bytes) -> None:
    try:
        fields, tensors = synapse.decode(Forward, memoryview(bytearray(data)), BOUNDARY)
    except Refused:
        return
    again = b"".join(synapse.encode(fields, tensors))
    twice, same = synapse.decode(Forward, memoryview(bytearray(again)), BOUNDARY)
    assert twice == fields
    assert tensor_bytes(same["y"]) == tensor_bytes(tensors["y"])


def _synapses() -> list[bytes]:
    return [b"".join(synapse.encode(_forward(), {"y": torch.zeros(1, 4, 2, dtype=torch.bfloat16)}))]


def _head(data: bytes) -> None:
    for parse in (http1.parse_request, http1.parse_response):
        try:
            head = parse(data)
            assert head.length is None or head.length >= 0
            assert head.keeps in (True, False)
        except BadHead:
            continue


def _heads() -> list[bytes]:
    return [
        http1.request("POST", "/1/forward", {"Host": "a:1", "Content-Length": "12"}),
        http1.response(200, 12, kind="application/json", keep=True, more=["Orion-Protocol: 1"]),
        http1.response(429, 0, kind="application/json", keep=False),
    ]


# -- files --------------------------------------------------------------------------------------------------------


def _checkpoint(data: bytes) -> None:
    try:
        tensors, info = loads(data, RUN, subject="stage-00")
    except CheckpointError:
        return
    again, told = loads(dumps(tensors, info, subject="stage-00"), RUN, subject="stage-00")
    assert told == info
    assert all(tensor_bytes(again[name]) == tensor_bytes(tensor) for name, tensor in tensors.items())


def _checkpoints() -> list[bytes]:
    info = CheckpointInfo(manifest_hash=RUN, round=3, version=4)
    return [dumps({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.int64)}, info, subject="stage-00")]


# -- evidence -----------------------------------------------------------------------------------------------------

_SIZES = struct.Struct("<HHH")


def _evidence(data: bytes) -> None:
    if len(data) < _SIZES.size:
        return
    sizes, at, parts = _SIZES.unpack_from(data), _SIZES.size, []
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    tables = Tables(*parts, data[at : at + CLOSING_BYTES])
    try:
        evidence = Evidence.parse(tables)
        evidence.check(stage=1, samples=range(40, 60))
    except LedgerError:
        return
    assert evidence.tables() == tables
    list(breaks(evidence.heads))
    conflicting(evidence.heads, ())
    acknowledged(evidence.heads, evidence.acks, {"a": 1.0})


def _evidences() -> list[bytes]:
    leaf = Leaf(direction=Direction.FORWARD, stage=1, sample=41, version=0, source=0, input=bytes(32), output=bytes(32))
    back = replace(leaf, direction=Direction.BACKWARD, gradient=b"\1" * 32)
    head = WindowHead(
        version=0, steps=0, slot=0, forward=1, backward=1, merged=0, weights=NO_ROOT, optimizer=NO_ROOT,
        units=units_hash([leaf, back]), next_weights=NO_ROOT, next_optimizer=NO_ROOT,
    )  # fmt: skip
    tables = Evidence((leaf, back), (head,), (), Closing(NO_ROOT, NO_ROOT, NO_ROOT)).tables()
    sizes = _SIZES.pack(len(tables.leaves), len(tables.heads), len(tables.acks))
    return [sizes + tables.leaves + tables.heads + tables.acks + tables.closing]


def _report(data: bytes) -> None:
    try:
        report = Report.parse(data)
    except ReportError:
        return
    assert report.to_bytes() == data


def _reports() -> list[bytes]:
    hotkey = "5" + "C" * 47
    miner = MinerReport.of(hotkey, [], windows=[3], flops=1.0, received=2)
    return [
        Report(run="ab" * 8, round=3, validator=hotkey, secret="cd" * 32, miners=miners, findings=[]).to_bytes()
        for miners in ([], [miner])
    ]


def _proof(data: bytes) -> None:
    if len(data) < 40:
        return
    count, index, size = struct.unpack_from("<HHI", data)
    root, rest = data[8:40], data[40:]
    piece, hashes = rest[: size % 64], rest[size % 64 :]
    proof = [hashes[at : at + 32] for at in range(0, len(hashes), 32)][: PROOF_LIMIT + 2]
    if proven(root, count=count, index=index, piece=piece, proof=proof):  # the fuzzer sees what is compared
        other = bytes([piece[0] ^ 1]) + piece[1:] if piece else b"x"
        assert not proven(root, count=count, index=index, piece=other, proof=proof)
        assert not proven(root, count=count, index=index, piece=piece, proof=[*proof, bytes(32)])


def _proofs() -> list[bytes]:
    return [struct.pack("<HHI", 8, 3, 16) + bytes(32) + bytes(16) + bytes(96)]


def _delta(data: bytes) -> None:
    base = torch.linspace(-1, 1, VALUES)
    try:
        weights = delta.decode(data, base, delta.limit_of(VALUES))
    except delta.DeltaFormatError:
        return
    assert weights.shape == base.shape


def _deltas() -> list[bytes]:
    base = torch.linspace(-1, 1, VALUES)
    return [bytes(delta.encode(base * 1.01, base)), bytes(delta.encode(base, base))]


def _payload(data: bytes) -> None:
    for codec in CODECS.values():
        try:
            values = codec.decode(data, VALUES)
        except PayloadError:
            continue
        assert values.shape == (VALUES,)
        assert bool(torch.isfinite(values).all())


def _payloads() -> list[bytes]:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=VALUES).astype("float32"))
    return [bytes(codec.encode(values)) for codec in CODECS.values()]


# -- the chain ----------------------------------------------------------------------------------------------------


def _records(data: bytes) -> None:
    record = Record.decode(data[:108], data[108:])
    if record is not None:
        assert Record.decode(record.encode(), record.shards) == record
    announced = Announcement.decode(data)
    assert announced is None or announced.encode() == data


def _record_seeds() -> list[bytes]:
    record = Record(run=bytes(8), round=3, phase=Phase.CUT, work=7, root=b"\1" * 32)
    return [record.encode(), record.encode() + bytes(16), Announcement(7, b"\2" * 32).encode()]


def _roster(data: bytes) -> None:
    try:
        roster = snapshot.parse(data)
    except SnapshotError:
        return
    assert roster.encoded == data


def _rosters() -> list[bytes]:
    return [Roster.of([["5" + "C" * 47], ["5" + "D" * 47]]).encoded]


@cache
def _chain() -> Chain:
    return Chain(ChainConfig(netuid=9, tempo=20))


def _extrinsic(data: bytes) -> None:
    chain = _chain()
    try:
        chain.submit(data)
    except (RpcError, InvalidTransaction):
        return
    chain.produce(chain.head.timestamp_ms + 250)


def _extrinsics() -> list[bytes]:
    chain, alice = _chain(), keypair("//Alice")
    origin = chain.hash_of(0) or b""
    calls: list[tuple[str, str, dict[str, object]]] = [
        ("SubtensorModule", "burned_register", {"netuid": 9, "hotkey": address("//fuzz")}),
        ("Balances", "transfer_keep_alive", {"dest": address("//Eve"), "value": 10**9}),
        ("Commitments", "set_commitment", {"netuid": 9, "info": {"fields": [{"Raw4": b"abcd"}]}}),
    ]
    made = []
    for pallet, function, args in calls:
        call = chain.codec.encode_call(pallet, function, args)
        nonce = chain.next_nonce(alice.ss58_address)
        made.append(make(chain.codec, call, alice, period=0, nonce=nonce, current=(0, origin), genesis=origin))
    return made


def _frame(data: bytes) -> None:
    peer = SimpleNamespace(
        check_room=lambda: None, subscribe=lambda *_: "s", unsubscribe=lambda *_: True, watch=lambda *_: "w"
    )
    answer = asyncio.run(_rpc().answer(data, cast("Peer", peer)))
    assert answer is None or isinstance(json.loads(answer), dict | list)


@cache
def _rpc() -> Rpc:
    return Rpc(_chain())


def _frames() -> list[bytes]:
    def call(method: str, *params: object) -> bytes:
        return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()

    key = "0x" + _chain().codec.key("SubtensorModule.Tempo", (9,)).hex()
    return [
        call("chain_getHeader"),
        call("chain_getBlockHash", 0),
        call("state_getStorage", key),
        call("state_call", "SubnetInfoRuntimeApi_get_metagraph", "0x0900"),
        call("state_getKeysPaged", key[:10], 10),
        call("system_accountNextIndex", address("//Alice")),
        call("author_submitExtrinsic", "0x" + _extrinsics()[1].hex()),
        call("chain_subscribeFinalizedHeads"),
        b"[" + call("rpc_methods") + b"," + call("system_health") + b"]",
    ]


TARGETS = {
    "synapse": Target(_synapse, _synapses),
    "http": Target(_head, _heads),
    "checkpoint": Target(_checkpoint, _checkpoints),
    "evidence": Target(_evidence, _evidences),
    "report": Target(_report, _reports),
    "proof": Target(_proof, _proofs),
    "delta": Target(_delta, _deltas),
    "payload": Target(_payload, _payloads),
    "record": Target(_records, _record_seeds),
    "roster": Target(_roster, _rosters),
    "extrinsic": Target(_extrinsic, _extrinsics),
    "rpc": Target(_frame, _frames),
}
