"""What `orion doctor` is asked: the flags of a neuron, none of them needed, and a few of its own."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from neurons.config import NeuronConfig
from neurons.settings import SettingsError, add_flags, resolve
from subnet.commandline import Parser

Role = Literal["miner", "validator"]
LEFT_OUT = ("wallet", "hotkey", "name", "manifest", "data")
"""What a node needs, and its doctor does without."""


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
    device: str
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


def command() -> argparse.ArgumentParser:
    """What `orion doctor` takes."""
    parser = Parser(
        prog="orion doctor",
        description="Check whether this machine can mine or validate, and print what to change if not. Give it the "
        "settings that the node will get; what is left out is not checked.",
        epilog="Exit status: 0 nothing fails, 1 something does, 2 usage.",
        allow_abbrev=False,
    )
    own = parser.add_argument_group("doctor")
    own.add_argument(
        "--role", choices=("miner", "validator"), default="miner", help="what the node will be (default: miner)"
    )
    own.add_argument("--stage", type=int, default=None, help="a stage to measure against (default: the largest one)")
    own.add_argument("--deep", action="store_true", help="hash the data shards too, which reads all of them")
    own.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, NeuronConfig)
    return parser


def parse(argv: list[str], environ: Mapping[str, str]) -> DoctorOptions:
    """Flags, variables and file, as a neuron reads them, to options; usage errors exit with status 2."""
    parser = command()
    flags = parser.parse_args(argv)
    if flags.stage is not None and flags.stage < 0:
        parser.error(f"--stage {flags.stage} is below 0")
    try:
        resolved = resolve(NeuronConfig, vars(flags), environ)
        given = resolved.values
        config = replace(resolved, values={**dict.fromkeys(LEFT_OUT, ""), **given}).build()
    except SettingsError as error:
        parser.error(str(error))
    try:
        ipaddress.ip_address(config.host)
    except ValueError:
        parser.error(f"--host {config.host!r} is no IP address of this machine (leave it out for all)")
    return DoctorOptions(
        role=flags.role,
        network=config.network,
        archive=config.archive,
        netuid=config.netuid,
        wallet=config.wallet if "wallet" in given else None,
        hotkey=config.hotkey if "hotkey" in given else None,
        wallet_path=config.wallet_path,
        manifest=config.manifest if "manifest" in given else None,
        data=config.data if "data" in given else None,
        out=config.out,
        checkpoints=config.checkpoints,
        host=config.host,
        announce=None if resolved.origins["announce"] == "as host" else config.announce,
        port=config.port,
        device=config.device,
        uplink=config.uplink,
        ring=config.ring,
        evidence_disk=config.evidence_disk,
        stage=flags.stage,
        deep=flags.deep,
        as_json=flags.json,
    )
