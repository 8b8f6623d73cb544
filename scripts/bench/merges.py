"""What merging costs and what it gives: codecs against each other, and overlapped merges against ones that pause.

    python -m scripts.bench.merges --out runs/bench

Local swarms run one after the other over links of 200 Mbit/s: every codec with its merges overlapped, and the first one
again with merges while nobody trains. Bytes per miner and merge stand beside the formula for the codec's payload. One
seed: what is compared is large. Result: JSON on standard output and in OUT/merges.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from model.accounting import stage_parameters
from model.config import preset
from model.split import split
from scripts.bench.report import report
from scripts.bench.swarm import run_swarm
from subnet.swarm.butterfly import butterfly_bytes, gather_bytes, ranges, recheck_bytes
from subnet.swarm.codec import codec_of

CODECS = ("int8", "bf16", "topk2bit")


def expected(name: str, *, stages: int, replicas: int) -> float:
    """Bytes per miner and merge by the formula, mean over the stages of a nano; hashes of the pieces left out."""
    config, codec = preset("nano"), codec_of(name)
    total = 0.0
    for plan in split(config, stages):
        count = stage_parameters(config, plan)
        if codec.error_feedback:
            total += gather_bytes(replicas, codec.payload_bytes(count))
        else:
            payload = sum(codec.payload_bytes(len(part)) for part in ranges(replicas, count))
            total += butterfly_bytes(replicas, payload) + recheck_bytes(replicas, payload)
    return total / stages


def one(out: Path, name: str, flags: list[str], options: argparse.Namespace) -> dict[str, object]:
    content = run_swarm(out, [*flags, f"--codec={name}"])
    miners = content["miners"]
    assert isinstance(miners, list)  # noqa: S101 - written by `summary`
    merges = sum(int(miner["merges"]) for miner in miners)
    received = sum(int(miner["merge_bytes"]) for miner in miners) / merges
    shape: dict[str, int] = {"stages": options.stages, "replicas": options.replicas}
    formula, plain = expected(name, **shape), fp32_bytes(**shape)
    loss = content["loss"]
    assert isinstance(loss, dict)  # noqa: S101
    return {
        "codec": name,
        "flags": flags,
        "validation_first": loss["validation_first"],
        "validation_last": loss["validation_last"],
        "tokens": content["tokens"],
        "tokens_per_second": content["tokens_per_second"],
        "merge_seconds": round(sum(float(miner["merge_seconds"] or 0) for miner in miners) / len(miners), 3),
        "merge_hidden": content["merge_hidden"],
        "bytes_per_merge": round(received),
        "formula": round(formula),
        "ratio": round(received / formula, 4) if formula else None,
        "below_fp32": round(plain / received, 1) if received else None,
    }


def fp32_bytes(*, stages: int, replicas: int) -> float:
    """Bytes of the plain exchange: every other replica's fp32 pseudo-gradient, mean over the stages."""
    config = preset("nano")
    return 4.0 * (replicas - 1) * sum(stage_parameters(config, plan) for plan in split(config, stages)) / stages


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.merges", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=40.0)
    parser.add_argument("--bandwidth", default="200mbit")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    flags = [f"--stages={options.stages}", f"--replicas={options.replicas}", f"--rounds={options.rounds}"]
    flags += [f"--round-seconds={options.round_seconds:g}", f"--bandwidth={options.bandwidth}"]
    runs = [one(options.out / f"{name}-overlap", name, flags, options) for name in CODECS]
    runs.append(one(options.out / f"{CODECS[0]}-pause", CODECS[0], [*flags, "--no-overlap"], options))
    report("merges", options.out, {"runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
