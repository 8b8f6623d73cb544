"""What `orion doctor` is asked: the flags of a neuron, none of them needed, and a few of its own."""

from __future__ import annotations

import argparse
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neurons.config import add_flags, read

Role = Literal["miner", "validator"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    role: Role
    network: str
    archive: str | None
    netuid: int
    wallet: str | None
    hotkey: str | None
    wallet_path: Path
    manifest: Path | None
    data: Path | None
    out: Path
    checkpoints: str
    host: str
    announce: str | None
    """None: not given, so a node would publish `host`."""
    port: int
    uplink: float
    ring: int
    evidence_disk: int
    stage: int | None
    deep: bool
    as_json: bool

    @property
    def published(self) -> str:
        """The address that a node with these flags would publish."""
        return self.announce or self.host

    @property
    def keys_given(self) -> str:
        """As a command repeats them."""
        path = (
            ""
            if self.wallet_path == Path("~/.bittensor/wallets").expanduser()
            else f" --wallet-path {self.wallet_path}"
        )
        return f"-w {self.wallet or 'NAME'} -H {self.hotkey or 'NAME'}{path}"


def parse(argv: list[str]) -> DoctorOptions:
    """Flags to options; usage errors exit with status 2 as argparse words them."""
    parser = argparse.ArgumentParser(
        prog="orion doctor",
        description="Check whether this machine can mine or validate, and print what to change if not. Give it the "
        "flags that the node will get; what is left out is not checked.",
        epilog="Exit status: 0 nothing fails, 1 something does, 2 usage.",
    )
    own = parser.add_argument_group("doctor")
    own.add_argument("--role", choices=("miner", "validator"), default="miner", help="of the node (default: miner)")
    own.add_argument("--stage", type=int, default=None, help="a stage to measure against (default: the largest one)")
    own.add_argument("--deep", action="store_true", help="hash the data shards too, which reads all of them")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, required=False)
    flags = parser.parse_args(argv)
    if flags.stage is not None and flags.stage < 0:
        parser.error(f"--stage {flags.stage} is below 0")
    if not 0 <= flags.port <= 65_535:
        parser.error(f"--port {flags.port} is outside 0..65535")
    try:
        ipaddress.ip_address(flags.host)
    except ValueError:
        parser.error(f"--host {flags.host!r} is no IP address of this machine (leave it out for all)")
    missing = {"wallet": "", "hotkey": "", "manifest": Path(), "data": Path()}
    given = {name: value for name, value in vars(flags).items() if value is not None}
    config = read(parser, argparse.Namespace(**{**vars(flags), **missing, **given}))
    return DoctorOptions(
        role=flags.role,
        network=config.network,
        archive=config.archive,
        netuid=config.netuid,
        wallet=flags.wallet,
        hotkey=flags.hotkey,
        wallet_path=config.wallet_path,
        manifest=flags.manifest,
        data=flags.data,
        out=config.out,
        checkpoints=config.checkpoints,
        host=config.host,
        announce=flags.announce,
        port=config.port,
        uplink=config.uplink,
        ring=config.ring,
        evidence_disk=config.evidence_disk,
        stage=flags.stage,
        deep=flags.deep,
        as_json=flags.json,
    )
