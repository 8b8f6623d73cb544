"""`orion localnet`: a development chain, miners and validators on this machine, from nothing to weights on chain.

Everything is the real thing: the unmodified SDK against a chain process, wallets on disk, one process per neuron with
the flags a real network takes. This command plays the subnet's owner: it registers the hotkeys and publishes the
manifest's hash. After that it only watches event logs; nobody waits for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from scripts.faults import Fault, FaultError, FaultPlan
from scripts.live import View, grid, weights
from scripts.nodes import NodeProcess, start_chain, start_node, start_server, stop_nodes, stop_server
from scripts.tally import LogFollower, Tally, summary, write_summary

NETUID = 9
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
TEMPO = 20
CHAIN_START = 30.0
STOP_PATIENCE = 3.0
LOOK = 0.25
MOST_NODES = 200
GRACE = 120.0
"""Seconds, on top of twice the rounds' own length, after which a swarm that has not finished is given up."""
PHASE_SECONDS = 1.5
SHORTEST_PHASE = 6
"""Blocks: a record takes two or three to be final, and the shortest mortal era has four."""
VALIDATOR_STAKE = 10_000.0


class LocalnetError(Exception):
    """The swarm could not be started: one line with the value and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalnetOptions:
    stages: int
    replicas: int
    validators: int
    rounds: int
    model: str
    out: Path | None
    seed: int
    block_time: float
    round_seconds: float
    kill: tuple[str, ...]
    """Faults on demand, see `scripts.faults`."""
    plain: bool


def localnet(options: LocalnetOptions) -> int:
    """Run a swarm; 0 if every node finished and every validator set weights, 1 if not, 130 when it was stopped."""
    console = Console(soft_wrap=True, markup=False)
    started_at = time.time()
    out = options.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        _check(options, out)
        run = _Run(options, out, console, started_at)
    except (LocalnetError, FaultError) as error:
        console.print(f"orion localnet: {error}", style="red", highlight=False)
        return 1

    def interrupt(_number: int, _frame: object) -> None:
        if not run.interrupted:  # once is enough; what follows must not be cut short by the same key
            run.interrupted = True
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        return run.whole()
    except LocalnetError as error:
        if not run.interrupted:
            console.print(f"orion localnet: {error}", style="red", highlight=False)
            return 1
    except KeyboardInterrupt:
        pass
    finally:
        run.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 130


LIMITS = {
    "stages": (1, 64),
    "replicas": (1, 64),
    "validators": (1, 64),
    "rounds": (1, 1_000_000),
    "round_seconds": (10, 86_400),
    "block_time": (0.05, 12),
}


def _check(options: LocalnetOptions, out: Path) -> None:
    for name, (least, most) in LIMITS.items():
        value = getattr(options, name)
        if not least <= value <= most:
            raise LocalnetError(f"--{name.replace('_', '-')} {value} is outside {least} to {most}: choose one inside")
    nodes = options.stages * options.replicas + options.validators
    if nodes > MOST_NODES:
        raise LocalnetError(f"{nodes} nodes are more than the {MOST_NODES} a machine should run: lower --replicas")
    if phase_blocks(options) * 4 > round(options.round_seconds / options.block_time):
        raise LocalnetError(
            f"--round-seconds {options.round_seconds:g} has no room for its deadlines in blocks of "
            f"{options.block_time:g} s: raise it or lower --block-time"
        )
    try:
        if out.exists() and any(out.iterdir()):
            raise LocalnetError(f"--out {out} is not empty: give a new folder, nothing in it was touched")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalnetError(f"--out {out} cannot be used ({error.strerror}): give another folder") from error


def phase_blocks(options: LocalnetOptions) -> int:
    """Length of each of a round's last three phases, in blocks."""
    return max(SHORTEST_PHASE, round(PHASE_SECONDS / options.block_time))


class _Run:
    """One swarm, from its first process to its summary."""

    def __init__(self, options: LocalnetOptions, out: Path, console: Console, started_at: float) -> None:
        self.options, self.out, self.console, self.started_at = options, out, console, started_at
        self.chain: NodeProcess | None = None
        self.interrupted = False
        self.nodes: list[NodeProcess] = []
        self.tally: Tally | None = None
        self.parameters = 0
        self.url = ""
        self.faults = FaultPlan([Fault.parse(text) for text in options.kill], round_seconds=options.round_seconds)
        self.killed: set[str] = set()
        self.chain_facts: dict[str, object] = {"blocks": 0, "weights": {}, "incentive": {}}

    def whole(self) -> int:
        start_server()
        self._start_chain()
        from model.accounting import total_parameters  # noqa: PLC0415 - torch is imported while others start
        from model.config import ConfigError, preset  # noqa: PLC0415

        try:
            config = preset(self.options.model)
            if self.options.stages > config.layers:
                raise LocalnetError(
                    f"--stages {self.options.stages} is more than the {config.layers} layers of {self.options.model}: "
                    "lower --stages"
                )
        except ConfigError as error:
            raise LocalnetError(str(error)) from error
        self.parameters = total_parameters(config, self.options.stages)
        with View(
            self.console,
            title=f"orion localnet · {self.options.model}",
            stages=self.options.stages,
            plain=self.options.plain,
        ) as view:
            view.say(f"{self._title(config.layers)}; everything goes to {self.out}")
            self._prepared(view)
            self._watch(view)
            if not self.interrupted:
                asyncio.run(self._read_chain())
        if self.interrupted:  # an interrupt that something on the way has swallowed
            raise KeyboardInterrupt
        return self._report()

    def _title(self, layers: int) -> str:
        options = self.options
        return (
            f"{options.model}: {self.parameters:,} parameters, {layers} layers in {options.stages} stages x "
            f"{options.replicas} replicas, {options.validators} validators, {options.rounds} rounds"
        )

    def _prepared(self, view: View) -> None:
        from subnet.chain import ChainError  # noqa: PLC0415 - heavy, while others start

        try:
            asyncio.run(self._prepare(view))
        except ChainError as error:
            raise LocalnetError(f"{error}; see {self._logs() / 'chain.log'}") from error

    # -- starting -------------------------------------------------------------------------------------------------

    def _start_chain(self) -> None:
        flags = [
            *("--port", "0", "--ready-file", str(self.out / "chain.url"), "--netuid", str(NETUID)),
            *("--block-time", str(self.options.block_time), "--tempo", str(TEMPO)),
        ]
        self.chain = start_chain(flags, log=self._logs() / "chain.log")

    def _wait_for_chain(self) -> str:
        ready = self.out / "chain.url"
        deadline = time.monotonic() + CHAIN_START
        while not ready.exists():
            if self.chain is None or self.chain.finished or time.monotonic() > deadline or self.interrupted:
                raise LocalnetError(f"the local chain did not start: see {self._logs() / 'chain.log'}")
            time.sleep(0.02)
        return ready.read_text().strip()

    def _logs(self) -> Path:
        logs = self.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs

    async def _prepare(self, view: View) -> None:
        """Corpus, wallets, registrations, manifest, processes."""
        from model.corpus import standard_library_corpus  # noqa: PLC0415 - torch is imported while others start
        from model.data import DataError  # noqa: PLC0415
        from scripts.manifests import local_manifest  # noqa: PLC0415
        from subnet.chain import BittensorChain  # noqa: PLC0415
        from subnet.localchain.genesis import OWNER_COLDKEY_URI, OWNER_HOTKEY_URI  # noqa: PLC0415
        from subnet.manifest import Announcement  # noqa: PLC0415
        from subnet.wallets import create_wallet  # noqa: PLC0415

        options = self.options
        corpus_task = asyncio.create_task(
            asyncio.to_thread(standard_library_corpus, cache_folder(), vocab=_vocab(options.model))
        )
        keys = self.out / "wallets"
        owner = create_wallet("local", "owner", keys, coldkey_uri=OWNER_COLDKEY_URI, hotkey_uri=OWNER_HOTKEY_URI)
        names = self._names()
        hotkeys = {name: create_wallet("local", name, keys).hotkey.ss58_address for name, _ in names}
        self.url = await asyncio.to_thread(self._wait_for_chain)
        chain = await BittensorChain.connect(self.url, NETUID, owner, timeout=CHAIN_START)
        try:
            stakes = {hotkeys[name]: VALIDATOR_STAKE if role == "validator" else 0.0 for name, role in names}
            uids = await chain.register_neurons(stakes)
            view.say(f"{self._elapsed():6.1f} s  chain {self.url}, {len(uids)} hotkeys registered on subnet {NETUID}")
            try:
                corpus = await corpus_task
            except DataError as error:
                raise LocalnetError(str(error)) from error
            head = await chain.finalized()
            manifest = local_manifest(
                model=options.model,
                stages=options.stages,
                replicas=options.replicas,
                rounds=options.rounds,
                round_blocks=round(options.round_seconds / options.block_time),
                phase_blocks=phase_blocks(options),
                seed=options.seed,
                authority=owner.hotkey.ss58_address,
                netuid=NETUID,
                activation_block=head.number,
                corpus=corpus,
            )
            loaded = manifest.write(self.out / "manifest.toml")
            self.tally = Tally(manifest.tokens_per_microbatch)
            await chain.publish(Announcement(head.number, loaded.digest).encode())
            digest = loaded.digest.hex()[:16]
            view.say(f"{self._elapsed():6.1f} s  manifest {digest} is on chain; starting {len(names)} nodes")
        finally:
            await chain.close()
        for name, role in names:
            self.nodes.append(
                start_node(name, role, self._flags(name, corpus.folder), log=self._logs() / f"{name}.log")
            )

    def _names(self) -> list[tuple[str, str]]:
        options = self.options
        miners = [(f"miner-{index}", "miner") for index in range(options.stages * options.replicas)]
        return miners + [(f"validator-{index}", "validator") for index in range(options.validators)]

    def _flags(self, name: str, data: Path) -> list[str]:
        return [
            *("--network", self.url, "--netuid", str(NETUID)),
            *("--wallet", "local", "--hotkey", name, "--wallet-path", str(self.out / "wallets")),
            *("--manifest", str(self.out / "manifest.toml"), "--data", str(data), "--out", str(self.out)),
            *("--host", "127.0.0.1", "--port", "0", "--threads", "1"),
        ]

    # -- running --------------------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return time.time() - self.started_at

    def _watch(self, view: View) -> None:
        """Follow the event logs until every node is done, or one has failed and the rest cannot finish."""
        assert self.tally is not None  # noqa: S101 - set by _prepare
        follower = LogFollower(self.out / "events")
        limit = self._elapsed() + 2 * self.options.rounds * self.options.round_seconds + GRACE
        while not self.interrupted:
            if self._elapsed() > limit:
                waiting = ", ".join(node.name for node in self.nodes if not node.finished)
                raise LocalnetError(
                    f"not finished after {self._elapsed():.0f} s, waiting for {waiting}: see {self._logs()}"
                )
            ended = all(node.finished for node in self.nodes)
            for name, stamped in follower.read():
                self.tally.add(name, stamped)
            view.show(self.tally, elapsed=self._elapsed())
            if ended:
                return
            self._kill_due(view, self.tally)
            for node in self.nodes:
                if node.process.exitcode not in (None, 0) and node.name not in {*self.tally.failures, *self.killed}:
                    self.tally.failures[node.name] = f"ended with status {node.process.exitcode}: see {node.log}"
                    view.say(f"{self._elapsed():6.1f} s  {node.name} {self.tally.failures[node.name]}")
            if self.chain is not None and self.chain.finished:
                raise LocalnetError(f"the local chain ended: see {self._logs() / 'chain.log'}")
            time.sleep(LOOK)

    def _kill_due(self, view: View, tally: Tally) -> None:
        for name in self.faults.due(tally, now=self._elapsed()):
            for node in self.nodes:
                if node.name == name and not node.finished:
                    node.process.kill()
                    self.killed.add(name)
                    tally.died(name)
                    view.say(f"{self._elapsed():6.1f} s  killed {name} in round {tally.round}, as asked")

    async def _read_chain(self) -> None:
        """Weights and incentive as the SDK reads them back, after the epoch that takes up the last weights."""
        from subnet.chain import BittensorChain, ChainError  # noqa: PLC0415 - imported by _prepare already

        try:
            chain = await BittensorChain.connect(self.url, NETUID, None, timeout=CHAIN_START)
        except ChainError as error:
            raise LocalnetError(str(error)) from error
        try:
            epoch = await chain.next_epoch_block()
            head = await chain.wait_for_block(epoch + 1, timeout=CHAIN_START + 2 * TEMPO * self.options.block_time)
            state = await chain.state_at(head.number)
            held = await chain.weights()
            self.chain_facts = {
                "blocks": head.number,
                "weights": {uid: {to: round(weight, 5) for to, weight in row.items()} for uid, row in held.items()},
                "incentive": {n.uid: round(n.incentive, 5) for n in state.neurons if n.incentive > 0},
            }
        finally:
            await chain.close()

    # -- the end --------------------------------------------------------------------------------------------------

    def _report(self) -> int:
        assert self.tally is not None  # noqa: S101 - set by _prepare
        content = self._summary()
        console = self.console
        console.print()
        if self.options.plain or not console.is_terminal:
            console.print(grid(self.tally, self.options.stages))
            console.print(weights(self.tally))
        failed = {node.name for node in self.nodes if node.process.exitcode != 0} | set(self.tally.failures)
        failed -= self.killed
        setters = {node.name for node in self.nodes if node.role == "validator"}
        good = not failed and setters <= set(self.tally.weights) and self._rows_on_chain() >= len(setters)
        console.print(_result_lines(content), highlight=False)
        console.print(f"summary: {self.out / 'summary.json'}", highlight=False)
        if not good:
            console.print(f"not good: {', '.join(sorted(failed)) or 'a validator has set no weights'}", style="red")
        return 0 if good else 1

    def _rows_on_chain(self) -> int:
        held = self.chain_facts["weights"]
        return len(held) if isinstance(held, dict) else 0

    def _summary(self) -> dict[str, object]:
        assert self.tally is not None  # noqa: S101 - callers check
        content = summary(
            self.tally,
            model=self.options.model,
            parameters=self.parameters,
            stages=self.options.stages,
            replicas=self.options.replicas,
            rounds=self.options.rounds,
            started_at=self.started_at,
            wall_seconds=self._elapsed(),
            chain=self.chain_facts,
        )
        write_summary(self.out / "summary.json", content)
        return content

    def close(self) -> None:
        """Leave nothing behind: nodes, fork server, chain. An interrupted run still gets its summary."""
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        stop_server()
        stop_nodes([*self.nodes, *([self.chain] if self.chain is not None else [])], patience=STOP_PATIENCE)
        if self.tally is not None and not (self.out / "summary.json").exists():
            for name, stamped in LogFollower(self.out / "events").read():
                self.tally.add(name, stamped)
            content = self._summary()
            self.console.print(_result_lines(content), highlight=False)
            self.console.print(f"stopped early; summary: {self.out / 'summary.json'}", highlight=False)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _vocab(model: str) -> int:
    from model.config import preset  # noqa: PLC0415 - torch is imported while others start

    return preset(model).vocab


def cache_folder() -> Path:
    """Where the tokenised corpus is kept between runs: $ORION_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("ORION_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "orion"


def _result_lines(content: dict[str, object]) -> str:
    loss, units, audits = content["loss"], content["microbatches"], content["audits"]
    assert isinstance(loss, dict)  # noqa: S101 - made by summary()
    assert isinstance(units, dict)  # noqa: S101
    assert isinstance(audits, dict)  # noqa: S101
    return "\n".join(
        (
            f"validation loss {loss['validation_first']} -> {loss['validation_last']}",
            f"{content['tokens']:,} tokens, {content['tokens_per_second']:,} tokens/s",
            f"first local step after {content['seconds_to_first_step']} s, {content['wall_seconds']} s in all",
            f"microbatches: {units['completed']} of {units['started']} completed, {units['lost']} lost",
            f"audits: {audits['passed']} of {audits['units']} units passed",
            f"replicas identical after every merge: {content['replicas_identical']}",
        )
    )
