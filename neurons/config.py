"""The flags of a neuron: the same on the local chain, the test network and the real one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from subnet.quantities import QuantityError, parse_bandwidth, parse_size
from subnet.transport.shaping import Link


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronConfig:
    """Where a node stands: its chain, its keys, its run and its disk."""

    network: str
    archive: str | None
    """ws:// endpoint asked for blocks that the network's own node has forgotten."""
    netuid: int
    wallet: str
    hotkey: str
    wallet_path: Path
    manifest: Path
    data: Path
    """Folder with the manifest's token shards."""
    out: Path
    """Folder for events and logs."""
    checkpoints: str
    """Folder or object store (URL) of the run's checkpoints."""
    name: str
    """Names this node's event log."""
    host: str
    """Address the axon listens on."""
    announce: str
    """Address others reach it at, published on chain."""
    port: int
    threads: int
    """Torch threads; 0 leaves torch's own choice."""
    uplink: float
    """Bits per second that the machine can send."""
    ring: int
    """Bytes of host memory for what a miner may have to show of its work."""
    evidence_disk: int
    """Bytes of disk, in `out`, for what seeds have picked of that."""
    link: Link | None = None
    """The link to imitate between this node and all others."""


def parse(argv: list[str], *, program: str, description: str) -> NeuronConfig:
    """Flags to a config; usage errors exit with status 2 as argparse words them."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    add_flags(parser)
    return read(parser, parser.parse_args(argv))


def add_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """All of them. Where not `required`, keys, manifest and data may be left out; `read` wants something in their
    place."""
    chain = parser.add_argument_group("chain")
    chain.add_argument("--network", default="finney", help="finney, test, or a ws:// endpoint (default: finney)")
    chain.add_argument("--archive", default=None, help="ws:// endpoint of an archive node, for blocks long past")
    chain.add_argument("--netuid", type=int, default=9, help="subnet (default: 9)")
    keys = parser.add_argument_group("keys")
    keys.add_argument("--wallet", required=required, help="wallet (coldkey) name")
    keys.add_argument("--hotkey", required=required, help="hotkey name within the wallet")
    keys.add_argument("--wallet-path", type=Path, default=Path("~/.bittensor/wallets"), help="folder of wallets")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--manifest", type=Path, required=required, help="the run's manifest.toml, as its authority published it"
    )
    run.add_argument("--data", type=Path, required=required, help="folder with the manifest's token shards")
    run.add_argument("--out", type=Path, default=Path("runs/node"), help="folder for events and logs")
    run.add_argument(
        "--checkpoints",
        default=None,
        metavar="URL",
        help="folder or object store for checkpoints: s3://bucket/run, gs://…, az://… (default: --out)",
    )
    run.add_argument("--name", default=None, help="name of this node's event log (default: the hotkey's name)")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="0.0.0.0", help="address the axon listens on (default: all)")  # noqa: S104
    network.add_argument("--announce", default=None, help="address others reach it at (default: --host)")
    network.add_argument("--port", type=int, default=8091, help="axon port, 0 for any free one (default: 8091)")
    network.add_argument(
        "--uplink",
        default="200mbit",
        metavar="200mbit",
        help="what this machine can send; a miner's evidence takes at most a tenth of it (default: 200mbit)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    machine.add_argument(
        "--ring",
        default="16gb",
        metavar="16gb",
        help="a miner's host memory for states and tensors that audits may ask for (default: 16gb)",
    )
    machine.add_argument(
        "--evidence-disk",
        default="100gb",
        metavar="100gb",
        help="a miner's disk, under --out, for what audits have picked of that (default: 100gb)",
    )
    emulated = parser.add_argument_group("emulated link (for tests)")
    emulated.add_argument("--latency", default=None, metavar="50ms", help="one way, for every message (default: none)")
    emulated.add_argument("--bandwidth", default=None, metavar="200mbit", help="up and down each (default: no limit)")
    emulated.add_argument("--loss", default=None, metavar="0.5%", help="share of packets lost (default: none)")


def read(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> NeuronConfig:
    """Parsed flags to a config; usage errors exit with status 2 as argparse words them."""
    try:
        link = Link.parse(latency=flags.latency, bandwidth=flags.bandwidth, loss=flags.loss)
        uplink, ring = parse_bandwidth("uplink", flags.uplink), parse_size("ring", flags.ring)
        evidence_disk = parse_size("evidence-disk", flags.evidence_disk)
    except QuantityError as error:
        parser.error(str(error))
    return NeuronConfig(
        network=flags.network,
        archive=flags.archive,
        netuid=flags.netuid,
        wallet=flags.wallet,
        hotkey=flags.hotkey,
        wallet_path=flags.wallet_path.expanduser(),
        manifest=flags.manifest,
        data=flags.data,
        out=flags.out,
        checkpoints=flags.checkpoints or str(flags.out),
        name=flags.name or flags.hotkey,
        host=flags.host,
        announce=flags.announce or flags.host,
        port=flags.port,
        threads=flags.threads,
        uplink=uplink,
        ring=ring,
        evidence_disk=evidence_disk,
        link=link,
    )
