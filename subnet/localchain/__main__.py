"""`python -m subnet.localchain`:

run the development chain as a process of its own until it is told to stop.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import sys
from pathlib import Path

from subnet.commandline import Parser, port
from subnet.localchain.genesis import ChainConfig
from subnet.localchain.node import LocalChain
from subnet.localchain.store import StoreError

log = logging.getLogger("orion.subnet.localchain")

_DESCRIPTION = (
    "Run the development chain as a process of its own until it is told to stop. It prints its ws:// URL, which the "
    "SDK and btcli take as --network."
)


def command(prog: str) -> argparse.ArgumentParser:
    """What it takes."""
    defaults = ChainConfig()
    parser = Parser(prog=prog, description=_DESCRIPTION)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument(
        "--allow-remote", action="store_true", help="let --host be reachable from other machines; its keys are public"
    )
    parser.add_argument("--port", type=port, default=9944, help="TCP port; 0 picks a free one (default: 9944)")
    parser.add_argument(
        "--block-time", type=float, default=defaults.block_time, help="seconds between blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--netuid", type=int, default=defaults.netuid, help="the subnet that exists (default: %(default)s)"
    )
    parser.add_argument(
        "--tempo", type=int, default=defaults.tempo, help="blocks between epochs (default: %(default)s)"
    )
    parser.add_argument("--state", type=Path, help="folder that keeps the chain across restarts (default: in memory)")
    parser.add_argument("--drand", metavar="URL", help="drand relay that opens timelocked weights (default: none)")
    parser.add_argument("--ready-file", type=Path, help="file to write the ws:// URL to once the chain serves")
    return parser


def _check_host(host: str, *, allow_remote: bool) -> None:
    """ValueError for an address beyond loopback that was not asked for."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not allow_remote:
        raise ValueError(
            f"--host {host} is reachable from other machines, and everybody knows this chain's keys; "
            "add --allow-remote if that is wanted"
        )


async def _run(options: argparse.Namespace, config: ChainConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    chain = LocalChain(config, host=options.host, port=options.port, state=options.state, relay=options.drand)
    async with chain:
        if options.ready_file is not None:
            _write_atomically(options.ready_file, chain.url + "\n")
        log.info("netuid %d, block time %s s, serving %s", config.netuid, config.block_time, chain.url)
        sys.stdout.write(chain.url + "\n")
        sys.stdout.flush()
        stopped, broken = asyncio.create_task(stop.wait()), asyncio.create_task(chain.run())
        await asyncio.wait({stopped, broken}, return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            await broken
        stopped.cancel()
        broken.cancel()


def _write_atomically(path: Path, text: str) -> None:
    """A reader sees the whole text or no file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main(argv: list[str] | None = None, *, prog: str = "python -m subnet.localchain") -> int:
    """Run until SIGINT or SIGTERM. Exit status 2 with one line for options or a port that cannot be used."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    options = command(prog).parse_args(sys.argv[1:] if argv is None else argv)
    try:
        _check_host(options.host, allow_remote=options.allow_remote)
        config = ChainConfig(netuid=options.netuid, tempo=options.tempo, block_time=options.block_time)
        asyncio.run(_run(options, config))
    except (ValueError, StoreError) as error:
        sys.stderr.write(f"localchain: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(
            f"localchain: cannot listen on {options.host}:{options.port}: {error.strerror or error}; "
            "choose another --port\n"
        )
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
