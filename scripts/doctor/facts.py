"""What is found on this machine and its chain: the edge, where effects are. Nothing is judged here."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neurons import machine
from neurons.machine import Card
from scripts.doctor.chain import OnChain
from scripts.doctor.disk import Disk
from scripts.doctor.machine import Tcp, numbers
from scripts.doctor.options import DoctorOptions
from subnet.chain import BittensorChain, ChainError
from subnet.chain_errors import NoSubnet, WalletError
from subnet.identity import Identity, IdentityError
from subnet.transport.protocol import PACKAGE
from subnet.wallets import Keys, load_wallet

CHAIN_DEADLINE = 15.0
"""Seconds for each request."""
WHOLE_DEADLINE = 120.0
"""Seconds for all of them, once connected."""
BLOCK_DEADLINE = 40.0
"""Seconds for a new block: three of them, on the real chain."""
LOOK = 0.5
"""Seconds between two looks for it."""
_TCP = Path("/proc/sys/net/ipv4")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    python: str
    bounds: str | None
    requirements: Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    cores: float
    memory: int
    card: Card | None
    card_problem: str
    driver: str
    files: tuple[int, int]
    tcp: Tcp


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What came of looking at the chain."""

    chain: OnChain | None = None
    unreachable: str = ""
    no_subnet: str = ""
    """The chain answers, and has no such subnet."""
    seconds: float = 0.0
    """Until it said so."""


def software() -> Software:
    version = platform.python_version()
    try:
        found = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return Software(python=version, bounds=None, requirements=None)
    return Software(
        python=version, bounds=found["Requires-Python"], requirements=importlib.metadata.requires(PACKAGE) or []
    )


def installed(name: str) -> str | None:
    """A distribution's version, None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware(device: str) -> Hardware:
    """`device` is what `--device` says."""
    try:
        card, problem = machine.card(machine.device_of(device)), ""
    except (machine.DeviceError, RuntimeError) as error:
        card, problem = None, " ".join(str(error).split())
    return Hardware(
        cores=machine.cores(),
        memory=machine.free_memory(),
        card=card,
        card_problem=problem,
        driver=_driver(),
        files=machine.open_files(),
        tcp=Tcp(
            default=_line(_TCP / "tcp_congestion_control"),
            allowed=tuple(_line(_TCP / "tcp_allowed_congestion_control").split()),
            send=numbers(_line(_TCP / "tcp_wmem")),
            receive=numbers(_line(_TCP / "tcp_rmem")),
        ),
    )


def disk(out: Path) -> Disk:
    """Tries to write there, in the nearest folder that exists; leaves nothing behind."""
    folder = machine.existing(out)
    try:
        if not folder.is_dir():
            raise NotADirectoryError(0, "it is a file" if folder == out.absolute() else f"{folder} is a file")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
        return Disk(out=out, free=machine.free_disk(out) + machine.held_bytes(out))
    except OSError as error:
        return Disk(out=out, free=0, problem=error.strerror or type(error).__name__)


def identity(keys: Keys | None, options: DoctorOptions) -> tuple[Identity | None, str]:
    """What can sign, None if nothing here can without asking for a password; and why it cannot, where it should."""
    if keys is None or not keys.present or keys.problem or (keys.encrypted and not keys.password_set):
        return None, ""
    try:
        return Identity(load_wallet(options.wallet or "", options.hotkey or "", options.wallet_path)), ""
    except (WalletError, IdentityError) as error:
        return None, str(error)


async def look_at_chain(
    options: DoctorOptions, signer: Identity | None, *, reads_space: bool, now_ns: Callable[[], int]
) -> Looked:
    """Connect, read the newest finalized state, wait for a new block.

    reads_space: whether the hotkey's space for records is read too, which needs a hotkey that can sign.
    """
    wallet = None
    if signer is not None and reads_space:
        wallet = load_wallet(options.wallet or "", options.hotkey or "", options.wallet_path)
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        chain = await BittensorChain.connect(
            options.network, options.netuid, wallet, timeout=CHAIN_DEADLINE, archive=options.archive
        )
    except NoSubnet as error:
        return Looked(no_subnet=str(error), seconds=clock() - began)
    except ChainError as error:
        return Looked(unreachable=str(error))
    try:
        async with asyncio.timeout(WHOLE_DEADLINE):
            head = await chain.finalized()
            seconds = clock() - began
            genesis = await chain.genesis()
            state = await chain.state_at(head.number)
            immunity = await chain.immunity()
            space = None if wallet is None else (await chain.space()).limit
            waiting = clock()
            ahead = await _new_block(chain, now_ns)
            return Looked(
                chain=OnChain(
                    seconds=seconds,
                    genesis=genesis,
                    state=state,
                    immunity=immunity,
                    ahead=ahead,
                    waited=clock() - waiting,
                    space_limit=space,
                )
            )
    except TimeoutError:
        return Looked(unreachable=f"{options.network} did not answer all questions within {WHOLE_DEADLINE:g} s")
    except ChainError as error:
        return Looked(unreachable=str(error))
    finally:
        await chain.close()


async def _new_block(chain: BittensorChain, now_ns: Callable[[], int]) -> float | None:
    """Seconds by which this machine's clock is ahead of a new block's time when it is noticed; None if none comes."""
    first, looks = await chain.newest_ms(), int(BLOCK_DEADLINE / LOOK)
    for _ in range(looks):
        await asyncio.sleep(LOOK)
        newest = await chain.newest_ms()
        if newest != first:
            return now_ns() / 1e9 - newest / 1e3
    return None


def _driver() -> str:
    words = _line(_DRIVER).split("Module", 1)
    return f"driver {words[1].split()[0]}" if len(words) > 1 and words[1].split() else "driver unknown"


def _line(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return ""
