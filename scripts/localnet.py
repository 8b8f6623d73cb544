"""`orion localnet`: a development chain, miners and validators on this machine, from nothing to weights on chain.

Everything is the real thing: the unmodified SDK against a chain process, wallets on disk, one process per neuron with
the flags a real network takes. This command plays the subnet's owner: it registers the hotkeys and publishes the
manifest's hash. After that it only watches event logs, and does to nodes what was asked for; nobody waits for it. What
it needs to go on after everything has died, itself included, is in the run's folder.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from scripts.adversaries import lines, outcome
from scripts.churn import Churn, Named, to_start
from scripts.faults import FaultPlan
from scripts.live import View, grid, weights
from scripts.locks import Lock, StillRunning, claim_run, lock_path
from scripts.nodes import NodeProcess, start_chain, start_server, stop_nodes, stop_server, wait_for_server
from scripts.options import TEMPO, LocalnetError, LocalnetOptions, OptionError, check_options, claim_folder
from scripts.resume import CHAIN_FILE, RunFile, read_run
from scripts.summary import summary, write_summary
from scripts.tally import LogFollower, Tally
from subnet.commandline import UsageError, status_of

if TYPE_CHECKING:
    from scripts.dashboard.command import Beside
    from scripts.data.local import RunData

NETUID = 9
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
CHAIN_START = 30.0
STOP_PATIENCE = 3.0
LOOK = 0.25
GRACE = 120.0
"""Seconds, on top of twice the rounds' own length, after which a swarm that has not finished is given up."""
VALIDATOR_STAKE = 10_000.0


def localnet(
    options: LocalnetOptions, *, out: Path | None, plain: bool, data: Path | None = None, dashboard: int | None = None
) -> int:
    """Run a swarm on the prepared shards in `data`, or the standard library; 0 if every node finished and every
    validator set weights, 1 if not, 130 when it was stopped. `dashboard` is the port of a page that shows it."""

    def new() -> _Run:
        folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        check_options(options)
        _check_device(options.device)
        if data is not None:
            _check_data(data, options.model)
        claim_folder(folder)
        return _Run(_with_chaos(options), folder, claim_run(folder), plain=plain, data=data)

    return _managed(new, dashboard)


def _with_chaos(options: LocalnetOptions) -> LocalnetOptions:
    """With what its chaos draws besides, if it has any."""
    if options.chaos is None:
        return options
    from scripts.chaos import draw  # noqa: PLC0415 - heavy, only with --chaos

    drawn = draw(
        options.chaos,
        stages=options.stages,
        replicas=options.replicas,
        rounds=options.rounds,
        round_seconds=options.round_seconds,
    )
    return replace(options, faults=(*options.faults, *drawn))


def resume(folder: Path, *, plain: bool, dashboard: int | None = None) -> int:
    """Go on with the run in `folder`, whose processes have all died; the status is that of `localnet`."""

    def old() -> _Run:
        read_run(folder)
        lock = claim_run(folder)
        run = read_run(folder)  # again: it may have been completed before the lock was ours
        return _Run(run.options(), folder, lock, plain=plain, saved=run)

    return _managed(old, dashboard)


def _managed(make: Callable[[], _Run], dashboard: int | None) -> int:
    console = Console(soft_wrap=True, markup=False)
    try:
        run = make()
    except (LocalnetError, UsageError, StillRunning) as error:
        console.print(f"orion localnet: {error}", style="red", highlight=False)
        return status_of(error)

    def interrupt(_number: int, _frame: object) -> None:
        if not run.interrupted:  # once is enough; what follows must not be cut short by the same key
            run.interrupted = True
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        if dashboard is not None:
            run.show_page(dashboard)
        return run.whole()
    except LocalnetError as error:
        if not run.interrupted:
            console.print(f"orion localnet: {error}", style="red", highlight=False)
            return status_of(error)
    except KeyboardInterrupt:
        pass
    finally:
        run.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 130


class _Run:
    """One swarm, from its first process to its summary."""

    def __init__(
        self,
        options: LocalnetOptions,
        out: Path,
        lock: Lock,
        *,
        plain: bool,
        data: Path | None = None,
        saved: RunFile | None = None,
    ) -> None:
        self.options, self.out, self.plain, self.data, self.saved = options, out, plain, data, saved
        self.console = Console(soft_wrap=True, markup=False)
        self.began_at = time.time()
        self.started_at = self.began_at if saved is None else saved.started_at
        self.lock = lock
        self.chain: NodeProcess | None = None
        self.page: Beside | None = None
        self.interrupted = False
        self.reported = False
        self.churn: Churn | None = None
        self.tally: Tally | None = None
        self.follower = LogFollower(out / "events")
        self.parameters = 0
        self.url = ""
        self.chain_facts: dict[str, object] = {"blocks": 0, "weights": {}, "incentive": {}}

    @property
    def nodes(self) -> list[NodeProcess]:
        return [] if self.churn is None else self.churn.nodes

    def show_page(self, port: int) -> None:
        """Raises `LocalnetError`."""
        from scripts.dashboard.command import Beside  # noqa: PLC0415 - only with --dashboard
        from scripts.dashboard.errors import DashboardError  # noqa: PLC0415

        try:
            self.page = Beside(self.out, port=port)
        except DashboardError as error:
            raise LocalnetError(f"--dashboard: {error}") from error
        self.console.print(f"{self.page.address} shows the run while it goes on", highlight=False)

    def whole(self) -> int:
        start_server()
        if self.saved is None:
            self._start_chain()  # of a run that goes on, blocks that pass before its nodes run are lost to it
        from model.accounting import total_parameters  # noqa: PLC0415 - torch is imported while others start
        from model.config import ConfigError, preset  # noqa: PLC0415

        try:
            config = preset(self.options.model)
            if self.options.stages > config.layers:
                raise OptionError(
                    f"--stages {self.options.stages} is more than the {config.layers} layers of {self.options.model}: "
                    "lower --stages"
                )
        except ConfigError as error:
            raise OptionError(str(error)) from error
        self.parameters = total_parameters(config, self.options.stages)
        with View(
            self.console,
            title=f"orion localnet · {self.options.model}",
            stages=self.options.stages,
            plain=self.plain,
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
            if self.saved is None:
                asyncio.run(self._prepare(view))
            else:
                self._continue(view, self.saved)
        except ChainError as error:
            raise LocalnetError(f"{error}; see {self._logs() / 'chain.log'}") from error

    # -- starting -------------------------------------------------------------------------------------------------

    def _start_chain(self) -> None:
        (self.out / "chain.url").unlink(missing_ok=True)
        flags = [
            *("--port", "0", "--ready-file", str(self.out / "chain.url"), "--netuid", str(NETUID)),
            *("--block-time", str(self.options.block_time), "--tempo", str(TEMPO)),
            *("--state", str((self.out / CHAIN_FILE).parent)),
        ]
        self.chain = start_chain(flags, log=self._logs() / "chain.log", lock=lock_path(self.out, "chain"))

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
        from model.data import DataError  # noqa: PLC0415 - torch is imported while others start
        from scripts.manifests import local_manifest  # noqa: PLC0415
        from subnet.chain import BittensorChain  # noqa: PLC0415
        from subnet.localchain.genesis import OWNER_COLDKEY_URI, OWNER_HOTKEY_URI  # noqa: PLC0415
        from subnet.manifest import Announcement  # noqa: PLC0415
        from subnet.wallets import create_wallet  # noqa: PLC0415

        options = self.options
        data_task = asyncio.create_task(asyncio.to_thread(_data, self.data, options.model))
        keys = self.out / "wallets"
        owner = create_wallet("local", "owner", keys, coldkey_uri=OWNER_COLDKEY_URI, hotkey_uri=OWNER_HOTKEY_URI)
        names = [*self._first(), *self._joiners()]
        hotkeys = {name: create_wallet("local", name, keys).hotkey.ss58_address for name, _ in names}
        self.url = await asyncio.to_thread(self._wait_for_chain)
        chain = await BittensorChain.connect(self.url, NETUID, owner, timeout=CHAIN_START)
        try:
            stakes = {hotkeys[name]: VALIDATOR_STAKE if role == "validator" else 0.0 for name, role in names}
            uids = await chain.register_neurons(stakes)
            view.say(f"{self._elapsed():6.1f} s  chain {self.url}, {len(uids)} hotkeys registered on subnet {NETUID}")
            try:
                data = await data_task
            except DataError as error:
                raise LocalnetError(str(error)) from error
            head = await chain.finalized()
            manifest = local_manifest(
                model=options.model,
                stages=options.stages,
                replicas=options.replicas,
                rounds=options.rounds,
                round_blocks=options.round_blocks,
                phase_blocks=options.phase_blocks,
                seed=options.seed,
                authority=owner.hotkey.ss58_address,
                netuid=NETUID,
                activation_block=head.number,
                data=data,
                overlap=options.overlap,
                codec=options.codec,
                optimizer=options.optimizer,
                accumulation=options.accumulation,
            )
            loaded = manifest.write(self.out / "manifest.toml")
            self.tally = Tally(manifest.tokens_per_microbatch)
            await chain.publish(Announcement(head.number, loaded.digest).encode())
            saved = RunFile.of(options, started_at=self.started_at, manifest=loaded.digest.hex(), data=data.folder)
            saved.write(self.out)
            (self.out / "data").symlink_to(data.folder.resolve())  # for miners that others start (docs/miner.md)
            digest = loaded.digest.hex()[:16]
            view.say(f"{self._elapsed():6.1f} s  manifest {digest} is on chain; starting {len(self._first())} nodes")
        finally:
            await chain.close()
        self.churn = self._churn(self.tally, data.folder)
        for name, role in self._first():
            self.churn.start(name, role)

    def _continue(self, view: View, saved: RunFile) -> None:
        """The story so far, the chain where it stood, and the processes that have to run."""
        from subnet.manifest import ManifestError, load_manifest  # noqa: PLC0415 - torch is imported while others start

        try:
            manifest = load_manifest(self.out / "manifest.toml").manifest
        except ManifestError as error:
            raise LocalnetError(str(error)) from error
        self.tally = Tally(manifest.tokens_per_microbatch)
        for name, stamped in self.follower.read():
            self.tally.add(name, stamped)
        self.tally.news.clear()
        names = to_start(self._first(), self._joiners(), self.tally)
        self.churn = self._churn(self.tally, Path(saved.data))
        wait_for_server()
        self._start_chain()
        self.url = self._wait_for_chain()
        self.churn.resumed(self.tally.round)
        view.say(
            f"{self._elapsed():6.1f} s  chain {self.url} goes on; the run stood in round {self.tally.round}; "
            f"starting {len(names)} nodes"
        )
        for name, role in names:
            self.churn.start(name, role)

    def _churn(self, tally: Tally, data: Path) -> Churn:
        options = self.options
        plan = FaultPlan(
            options.faults,
            round_seconds=options.round_seconds,
            first_joiner=options.first_miners,
            done=tally.struck,
        )
        return Churn(
            self.out,
            plan,
            flags=lambda name: self._flags(name, data),
            now=time.time,
            casting=options.casting,
        )

    def _first(self) -> list[Named]:
        """The nodes that are there from the start."""
        options = self.options
        miners = [(f"miner-{index}", "miner") for index in range(options.first_miners)]
        return miners + [(f"validator-{index}", "validator") for index in range(options.validators)]

    def _joiners(self) -> list[Named]:
        """The miners that come later."""
        first = self.options.first_miners
        return [(f"miner-{index}", "miner") for index in range(first, first + self.options.joiners)]

    def _flags(self, name: str, data: Path) -> list[str]:
        return [
            *("--network", self.url, "--netuid", str(NETUID)),
            *("--wallet", "local", "--hotkey", name, "--wallet-path", str(self.out / "wallets")),
            *("--manifest", str(self.out / "manifest.toml"), "--data", str(data), "--out", str(self.out)),
            *("--host", "127.0.0.1", "--port", "0", "--threads", "1", "--device", self.options.device),
            *self.options.network_flags,
        ]

    # -- running --------------------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return time.time() - self.began_at

    def _watch(self, view: View) -> None:
        """Follow the event logs until every node is done, or one has failed and the rest cannot finish."""
        assert self.tally is not None  # noqa: S101 - set by _prepare
        assert self.churn is not None  # noqa: S101
        tally, churn = self.tally, self.churn
        limit = self._elapsed() + 2 * self.options.rounds * self.options.round_seconds + GRACE
        while not self.interrupted:
            if self._elapsed() > limit:
                waiting = ", ".join(node.name for node in self.nodes if not node.finished)
                raise LocalnetError(
                    f"not finished after {self._elapsed():.0f} s, waiting for {waiting}: see {self._logs()}"
                )
            ended = all(node.finished for node in self.nodes)
            for name, stamped in self.follower.read():
                tally.add(name, stamped)
            view.show(tally, elapsed=self._elapsed())
            if ended and not (churn.returning and self._goes_on()):
                break
            for node in self.nodes:
                if node.process.exitcode not in (None, 0) and node.name not in {*tally.failures, *self._dead()}:
                    tally.failures[node.name] = f"ended with status {node.process.exitcode}: {node.complaint}"
                    view.say(f"{self._elapsed():6.1f} s  {node.name} {tally.failures[node.name]}")
            # After the look at who has failed: a node struck here is known to be so with the next events.
            for line in churn.strike(tally, now=time.monotonic()):
                view.say(f"{self._elapsed():6.1f} s  {line}")
            if self.chain is not None and self.chain.finished:
                raise LocalnetError(f"the local chain ended: see {self._logs() / 'chain.log'}")
            time.sleep(LOOK)
        for option in churn.left:
            view.say(f"{self._elapsed():6.1f} s  {option} did not come: the run ended before")

    def _goes_on(self) -> bool:
        """Whether the run has still to be finished: no validator is done."""
        assert self.tally is not None  # noqa: S101 - callers check
        return not any(name in self.tally.finished for name, role in self._first() if role == "validator")

    def _dead(self) -> set[str]:
        """Miners that were killed as asked."""
        assert self.tally is not None  # noqa: S101 - callers check
        return {miner.name for miner in self.tally.miners.values() if miner.state == "dead"}

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
        failed = {node.name for node in self.nodes if node.process.exitcode != 0} | set(self.tally.failures)
        failed -= self._dead()
        setters = {name for name, role in self._first() if role == "validator"}
        held = self._promises()
        good = (
            not failed
            and not any(held.values())
            and setters <= set(self.tally.weights)
            and self._rows_on_chain() >= len(setters)
        )
        content = self._summary(complete=not failed and setters <= self.tally.finished)
        console = self.console
        console.print()
        if self.plain or not console.is_terminal:
            console.print(grid(self.tally, self.options.stages))
            console.print(weights(self.tally))
        console.print(_result_lines(content), highlight=False)
        for line in lines(outcome(self.tally)):
            console.print(line, highlight=False)
        if held:
            from scripts.chaos import lines as promised  # noqa: PLC0415 - imported by `_promises` already

            for line in promised(held):
                console.print(line, highlight=False)
        console.print(f"summary: {self.out / 'summary.json'}", highlight=False)
        if not good:
            broken = [name for name, why in held.items() if why]
            blamed = ", ".join([*sorted(failed), *broken]) or "a validator has set no weights"
            console.print(f"not good: {blamed}", style="red")
            for name in sorted(failed & set(self.tally.failures)):
                console.print(f"{name} {self.tally.failures[name]}", highlight=False)
        return 0 if good else 1

    def _promises(self) -> Mapping[str, Sequence[str]]:
        """What of each promise did not hold; none without --chaos."""
        if self.options.chaos is None:
            return {}
        from scripts.chaos import promises  # noqa: PLC0415 - heavy, only with --chaos

        assert self.tally is not None  # noqa: S101 - callers check
        return promises(
            self.out / "events",
            cheats=list(self.tally.adversaries),
            rounds=self.options.rounds,
            round_seconds=self.options.round_seconds,
        )

    def _rows_on_chain(self) -> int:
        held = self.chain_facts["weights"]
        return len(held) if isinstance(held, dict) else 0

    def _summary(self, *, complete: bool) -> dict[str, object]:
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
            complete=complete,
            torn=self.follower.torn,
        )
        write_summary(self.out / "summary.json", content)
        self.reported = True
        return content

    def close(self) -> None:
        """Leave nothing behind: nodes, fork server, chain. An interrupted run still gets its summary."""
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        stop_server()
        stop_nodes([*self.nodes, *([self.chain] if self.chain is not None else [])], patience=STOP_PATIENCE)
        if self.churn is not None:
            self.churn.close()
        if self.tally is not None and not self.reported:
            for name, stamped in self.follower.read():
                self.tally.add(name, stamped)
            content = self._summary(complete=False)
            self.console.print(_result_lines(content), highlight=False)
            self.console.print(f"stopped early; summary: {self.out / 'summary.json'}", highlight=False)
        if self.page is not None:
            self.page.close()
            self.console.print(f"orion dashboard --run {self.out} shows it again", highlight=False)
        self.lock.release()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_device(asked: str) -> None:
    """Before any node finds out. Raises `LocalnetError`."""
    if asked == "cpu":
        return
    from neurons.machine import DeviceError, named_device  # noqa: PLC0415 - torch, which a run on CPUs need not await

    try:
        named_device(asked)
    except DeviceError as error:
        raise LocalnetError(str(error)) from None


def _check_data(folder: Path, model: str) -> None:
    """Raises `LocalnetError` for prepared shards that preset `model` cannot learn from."""
    from model.config import ConfigError  # noqa: PLC0415 - torch is imported only where it is needed
    from model.data import DataError  # noqa: PLC0415
    from scripts.data.local import fitting  # noqa: PLC0415

    try:
        fitting(folder, model)
    except (DataError, ConfigError) as error:
        raise LocalnetError(f"--data: {error}") from error


def _data(prepared: Path | None, model: str) -> RunData:
    from scripts.data import local  # noqa: PLC0415 - torch is imported while others start
    from scripts.manifests import BATCH, VALIDATION_BATCHES  # noqa: PLC0415

    if prepared is not None:
        return local.prepared(prepared, model, batch=BATCH, validation_batches=VALIDATION_BATCHES)
    return local.standard_library(cache_folder(), model)


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
