"""What trust and transport add to a microbatch: hashing, signing, receipts, leaves, events, and state hashed per step.

    python -m scripts.bench.overhead --out runs/bench

Each part is the function that a miner runs, on tensors of the size that a 100b boundary has (8,192 tokens x 144 x 2
bytes), timed alone on one core and multiplied by how often a replica of a middle stage runs it per microbatch. The sum
stands beside the time in which a microbatch is due (`PERIOD`). What a local step adds (roots of weights and moments) is
measured on a piece of `STATE_BYTES`, scaled to the stage's state and divided by the microbatches of a step; it runs in
a thread of its own while the next step's units are computed, so it is listed apart. Result: JSON on standard output
and in OUT/overhead.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.accounting import boundary_bytes, stage_flops, stage_parameters
from model.config import preset
from model.devices import device
from model.split import split
from neurons.telemetry import MicrobatchDone, Telemetry
from scripts.bench.report import report
from subnet.identity import Identity, verify
from subnet.messages import WIRE_LIMIT, Accepted, Forward
from subnet.transport import auth, synapse
from subnet.transport.digests import Digests
from subnet.transport.synapse import require_finite, tensor_bytes
from subnet.trust.boundary import magnitudes
from subnet.trust.ledger import Direction, Leaf, UnitKey, digest, receipt_message, units_hash
from subnet.trust.tree import Tree

TOKENS = 8192
STATE_BYTES = 256 << 20
STATE_VALUE_BYTES = 2
"""Of a weight and of each of its two moments, as the 100b plan holds them."""
ACCUMULATION = 64
"""Microbatches in a local step."""
MFU = 0.5
"""At which the period is computed: the faster the GPU, the larger the share of what does not become faster."""
GPU = "a100-80gb"
LIMIT = 0.02
RUN = bytes(8)


@dataclass(frozen=True, slots=True)
class Part:
    """One function and how often a replica of a middle stage runs it per microbatch."""

    name: str
    times: float
    call: Callable[[], object]


def parts(out: Path) -> list[Part]:
    """What a forward and a backward cost on their way in and out."""
    config = preset("100b")
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(1, TOKENS, config.boundary.width, generator=generator).to(torch.bfloat16)
    me, peer = Identity.from_uri("//Alice"), Identity.from_uri("//Bob")
    push = Forward(run=RUN.hex(), round=3, sample=70_000, head=peer.hotkey, index=1_000, version=12)
    blob = memoryview(bytearray(b"".join(synapse.encode(push, {"y": tensor}))))
    key, output = UnitKey(push.sample, Direction.FORWARD), digest(tensor_bytes(tensor))
    body = Digests.of(synapse.encode(push, {"y": tensor}), payload=output)
    headers = auth.sign(peer, path="/forward", digests=body, receiver=me.hotkey, nonce_ns=1)
    message = receipt_message(RUN, 3, producer=peer.hotkey, key=key, stage=4, output=output)
    receipt = peer.sign(message)
    accepted = Accepted(receipt=receipt.hex())
    leaf = Leaf(direction=Direction.FORWARD, stage=5, sample=push.sample, version=12, input=output, output=output)
    specs = synapse.specs_of({"y": tensor})
    events = Telemetry.open(out / "overhead-events.jsonl", now=time.time)
    done = MicrobatchDone(round=3, sample=push.sample, loss=2.5, seconds=40.0, depth=24)
    return [
        Part("hash a tensor that arrives or leaves", 4, lambda: digest(tensor_bytes(tensor))),
        Part("look at a tensor that leaves", 2, lambda: require_finite({"y": tensor}, limit=WIRE_LIMIT)),
        Part("look at a tensor that arrives", 2, lambda: magnitudes(tensor).numbers),
        Part("encode a push", 2, lambda: synapse.encode(push, {"y": tensor})),
        Part("decode a push", 2, lambda: synapse.decode(Forward, blob, specs)),
        Part("sign a request", 2, lambda: auth.sign(me, path="/f", digests=body, receiver=peer.hotkey, nonce_ns=2)),
        Part(
            "verify a request",
            2,
            lambda: auth.verify(headers, path="/forward", receiver=me.hotkey, now_ns=1),
        ),
        Part("sign a receipt", 2, lambda: me.sign(message)),
        Part("verify a receipt", 2, lambda: verify(peer.hotkey, message, receipt)),
        Part("encode and decode a reply", 2, lambda: _reply(accepted)),
        Part("enter a leaf", 2, lambda: units_hash([leaf])),
        Part("write an event", 2, lambda: events.emit(done)),
    ]


def _reply(accepted: Accepted) -> object:
    return synapse.decode(Accepted, memoryview(b"".join(synapse.encode(accepted, {}))), {})


def seconds(call: Callable[[], object], *, repeats: int, budget: float) -> float:
    """Median of `repeats` batches, each long enough for the clock, in all about `budget` seconds."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, int(budget / repeats / max(time.perf_counter() - start, 1e-7)))
    batches = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            call()
        batches.append((time.perf_counter() - start) / count)
    return statistics.median(batches)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, for CI")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    config = preset("100b")
    plan = split(config, 16)[7]
    flops = sum(stage_flops(config, plan, tokens=TOKENS)) * TOKENS
    period = flops / (MFU * device(GPU).peak)
    budget, repeats = (0.2, 3) if options.quick else (1.5, 5)
    rows, added = [], 0.0
    for part in parts(options.out):
        each = seconds(part.call, repeats=repeats, budget=budget)
        added += part.times * each
        rows.append({"part": part.name, "times": part.times, "microseconds": round(each * 1e6, 1)})
    state = torch.randint(0, 255, (STATE_BYTES >> (3 if options.quick else 0),), dtype=torch.uint8)
    hashing = seconds(lambda: Tree.of(tensor_bytes(state)), repeats=3, budget=0.1)
    state_bytes = 3 * STATE_VALUE_BYTES * stage_parameters(config, plan)
    beside = hashing * state_bytes / state.numel() / ACCUMULATION
    figures = {
        "torch": torch.__version__,
        "boundary_bytes": boundary_bytes(config, tokens=TOKENS, itemsize=2),
        "period_seconds": round(period, 3),
        "period": f"one {GPU}, {plan.layers} layers of 100b, {TOKENS} tokens, at {MFU:.0%} MFU",
        "parts": rows,
        "added_seconds": round(added, 6),
        "share": round(added / period, 5),
        "limit": LIMIT,
        "headroom": round(LIMIT * period / added, 3),
        "beside": {
            "what": "roots of a stage's weights and moments, per microbatch, on one core, in a thread of its own",
            "state_bytes": state_bytes,
            "microbatches_per_step": ACCUMULATION,
            "seconds": round(beside, 4),
            "share_of_one_core": round(beside / period, 4),
        },
    }
    report("overhead", options.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
