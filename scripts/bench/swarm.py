"""Throughput of a whole swarm on this machine against one process that trains the same model on the same cores.

    python -m scripts.bench.swarm --out runs/bench

Both run in one go, the single process before and after the swarm, so that a machine that slows down slows both. The
swarm's figure counts completed microbatches from the first local step to the end of the last merge: merging, audits and
chain included. Result: JSON on standard output and in OUT/swarm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from model.accounting import total_parameters
from model.data import Corpus
from model.engine import StageEngine
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage
from scripts.bench.report import report
from scripts.data.local import standard_library
from scripts.localnet import cache_folder
from scripts.manifests import local_manifest
from subnet.manifest import Manifest

WARM_UP = 4
SWARM = ("stages", "replicas", "rounds", "accumulation")
"""What the swarm is told."""


def single_process(manifest: Manifest, corpus: Corpus, *, seconds: float, threads: int) -> float:
    """Tokens per second of plain training: the whole model, no boundaries, no network."""
    torch.set_num_threads(threads)
    config = manifest.model.config()
    plan = split(config, 1)[0]
    accumulation = manifest.optimizer.accumulation
    engine = StageEngine(
        build_stage(config, plan, manifest.run.seed),
        manifest.optimizer.inner(),
        plan,
        n_total_params=total_parameters(config),
        accumulation=accumulation,
        recompute=Recompute.KEEP,
        capacity=1,
    )
    done = 0
    start = time.perf_counter()
    while done < WARM_UP or time.perf_counter() - start < seconds:
        if done == WARM_UP:
            start = time.perf_counter()
        tokens = corpus.sample(done)
        engine.tail(done, tokens[:, :-1], tokens[:, 1:])
        done += 1
        if done % accumulation == 0:
            engine.step()
    return (done - WARM_UP) * manifest.tokens_per_microbatch / (time.perf_counter() - start)


def run_swarm(out: Path, flags: list[str]) -> dict[str, object]:
    """A localnet in processes of its own; its summary."""
    subprocess.run(
        [sys.executable, "-m", "scripts.cli", "localnet", "--plain", "--out", str(out), *flags],
        check=True,
        stdout=sys.stderr,
    )
    content: dict[str, object] = json.loads((out / "summary.json").read_text())
    return content


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.swarm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each single-process run (default: 15)")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=2, help="microbatches in a local step of both (default: 2)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    data = standard_library(cache_folder(), "nano")
    manifest = local_manifest(
        model="nano",
        stages=1,
        replicas=1,
        rounds=1,
        round_blocks=100,
        phase_blocks=10,
        seed=0,
        authority="5" + "C" * 47,
        netuid=9,
        activation_block=0,
        overlap=False,
        codec="topk2bit",
        data=data,
        accumulation=options.accumulation,
    )
    corpus = Corpus.open(
        data.folder,
        data.entries,
        seed=0,
        batch=manifest.data.batch,
        tokens=manifest.data.sequence,
        vocab=manifest.model.vocab,
        held_out=data.held_out,
    )
    cores = len(os.sched_getaffinity(0))
    threads = sorted({1, cores})
    before = {n: single_process(manifest, corpus, seconds=options.seconds, threads=n) for n in threads}
    flags = [f"--{name}={getattr(options, name)}" for name in SWARM]
    swarm = run_swarm(options.out / "localnet", flags)
    after = {n: single_process(manifest, corpus, seconds=options.seconds, threads=n) for n in threads}
    single = max((before[n] + after[n]) / 2 for n in threads)
    figures = {
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in SWARM},
        "single_process_tokens_per_second": round(single, 1),
        "single_process_by_threads": {n: [round(before[n], 1), round(after[n], 1)] for n in threads},
        "swarm_tokens_per_second": swarm["tokens_per_second"],
        "ratio": round(float(str(swarm["tokens_per_second"])) / single, 3),
        "seconds_to_first_step": swarm["seconds_to_first_step"],
        "wall_seconds": swarm["wall_seconds"],
    }
    report("swarm", options.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
