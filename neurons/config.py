"""The settings of a neuron: the same on the local chain, the test network and the real one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from neurons.settings import Setting, SettingsError, add_flags, resolve
from subnet.commandline import Parser
from subnet.quantities import parse_bandwidth, parse_size
from subnet.transport.shaping import Link, parse_latency, parse_loss


def _as(read: Callable[[str, str], float], option: str) -> BeforeValidator:
    """A quantity, from its text or as a number."""

    def number(given: object) -> object:
        return read(option, given) if isinstance(given, str) else given

    return BeforeValidator(number)


def _text(read: Callable[[str], object]) -> AfterValidator:
    """A text that can be read, kept as it was given."""

    def checked(given: str | None) -> str | None:
        if given is not None:
            read(given)
        return given

    return AfterValidator(checked)


def parse_device(given: str) -> str:
    """A device's name; whether there is such a one is seen where it is used. Raises `ValueError`."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", given) is None:
        raise ValueError("it is none of auto, cpu, cuda, and cuda:N for card N: give one of these")
    return given


class NeuronConfig(BaseModel):
    """Where a node stands: its chain, its keys, its run, its line and its machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    network: Annotated[str, Setting("chain", "finney, test, or a ws:// endpoint")] = "finney"
    archive: Annotated[str | None, Setting("chain", "ws:// endpoint of an archive node, for blocks long past")] = None
    netuid: Annotated[int, Field(ge=0, le=65_535), Setting("chain", "subnet")] = 9
    wallet: Annotated[str, Setting("keys", "wallet (coldkey) name")]
    hotkey: Annotated[str, Setting("keys", "hotkey name within the wallet")]
    wallet_path: Annotated[Path, AfterValidator(Path.expanduser), Setting("keys", "folder of wallets")] = Path(
        "~/.bittensor/wallets"
    )
    manifest: Annotated[Path, Setting("run", "the run's manifest.toml, as its authority published it")]
    data: Annotated[Path, Setting("run", "folder with the manifest's token shards")]
    out: Annotated[Path, Setting("run", "folder for events, logs and evidence")] = Path("runs/node")
    checkpoints: Annotated[
        str,
        BeforeValidator(str),
        Setting("run", "folder or object store for checkpoints: s3://bucket/run, gs://…, az://…", "URL", "out"),
    ]
    name: Annotated[str, Setting("run", "name of this node's event log", follows="hotkey")]
    host: Annotated[str, Setting("network", "address the axon listens on")] = "0.0.0.0"  # noqa: S104
    announce: Annotated[str, Setting("network", "address others reach it at", follows="host")]
    port: Annotated[int, Field(ge=0, le=65_535), Setting("network", "axon port, 0 for any free one")] = 8091
    uplink: Annotated[
        float,
        _as(parse_bandwidth, "uplink"),
        Setting(
            "network",
            "what this machine can send; a miner's evidence takes at most a tenth of it",
            "200mbit",
            default="200mbit",
        ),
    ]
    device: Annotated[
        str,
        AfterValidator(parse_device),
        Setting("machine", "where a miner computes: auto (a GPU if torch sees one, else cpu), cpu, cuda, cuda:1"),
    ] = "auto"
    threads: Annotated[int, Field(ge=0), Setting("machine", "torch threads, 0 for torch's own choice")] = 0
    ring: Annotated[
        int,
        _as(parse_size, "ring"),
        Setting(
            "machine", "a miner's host memory for states and tensors that audits may ask for", "16gb", default="16gb"
        ),
    ]
    evidence_disk: Annotated[
        int,
        _as(parse_size, "evidence-disk"),
        Setting(
            "machine", "a miner's disk, under --out, for what audits have picked of that", "100gb", default="100gb"
        ),
    ]
    latency: Annotated[
        str | None,
        _text(parse_latency),
        Setting("emulated link (for tests)", "delay of every message, one way", "50ms"),
    ] = None
    bandwidth: Annotated[
        str | None,
        _text(partial(parse_bandwidth, "bandwidth")),
        Setting("emulated link (for tests)", "up and down each", "200mbit"),
    ] = None
    loss: Annotated[
        str | None, _text(parse_loss), Setting("emulated link (for tests)", "share of packets lost", "0.5%")
    ] = None

    @property
    def link(self) -> Link | None:
        """The link to imitate between this node and all others."""
        return Link.parse(latency=self.latency, bandwidth=self.bandwidth, loss=self.loss)


def flags(program: str, description: str) -> argparse.ArgumentParser:
    """What a neuron's command line takes."""
    parser = Parser(prog=program, description=description, allow_abbrev=False)
    add_flags(parser, NeuronConfig)
    return parser


def parse(argv: list[str], environ: Mapping[str, str], *, program: str, description: str) -> NeuronConfig:
    """Settings from flags, environment and file; errors of theirs exit with status 2, as argparse words its own."""
    parser = flags(program, description)
    try:
        return resolve(NeuronConfig, vars(parser.parse_args(argv)), environ).build()
    except SettingsError as error:
        parser.error(str(error))
