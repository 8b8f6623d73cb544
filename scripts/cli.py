"""The `orion` command. Each sub-command lives in its own file and is imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="orion", description="Train one large language model together, on Bittensor, without an orchestrator."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    localnet = commands.add_parser(
        "localnet",
        help="run a whole swarm on this machine: a development chain, miners, validators",
        description="Start a development chain, miners and validators on this machine, train, and print the result.",
    )
    localnet.add_argument("--stages", type=int, default=4, help="pipeline stages (default: 4)")
    localnet.add_argument("--replicas", type=int, default=2, help="miners per stage (default: 2)")
    localnet.add_argument("--validators", type=int, default=2, help="validators (default: 2)")
    localnet.add_argument("--rounds", type=int, default=3, help="rounds of training and merging (default: 3)")
    localnet.add_argument("--model", default="nano", help="model preset (default: nano)")
    localnet.add_argument("--out", type=Path, default=None, help="folder for everything (default: runs/<time>)")
    localnet.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: 0)")
    localnet.add_argument("--block-time", type=float, default=0.1, help="seconds per block (default: 0.1)")
    localnet.add_argument(
        "--round-seconds", type=float, default=40.0, help="length of a round, at least 10 s (default: 40)"
    )
    localnet.add_argument("--plain", action="store_true", help="plain lines even on a terminal")
    return root


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 done, 1 failed, 2 usage, 130 stopped by Ctrl-C."""
    flags = parser().parse_args(argv)
    from scripts.localnet import LocalnetOptions, localnet  # noqa: PLC0415 - heavy, and only for this command

    options = LocalnetOptions(
        stages=flags.stages,
        replicas=flags.replicas,
        validators=flags.validators,
        rounds=flags.rounds,
        model=flags.model,
        out=flags.out,
        seed=flags.seed,
        block_time=flags.block_time,
        round_seconds=flags.round_seconds,
        plain=flags.plain,
    )
    return localnet(options)


if __name__ == "__main__":
    sys.exit(main())
