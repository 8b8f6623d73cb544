"""`orion doctor`: gathers facts in an order in which each finds what it needs, and hands them to the checks."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model.layout import Layout
from model.relief import Holding
from model.split import StagePlan, split
from neurons.needs import Needs, fitted, least_files, miner_needs, stage_on, validator_host
from scripts.doctor import facts
from scripts.doctor.ask import Answer, Listener, Port, ask, look, peers
from scripts.doctor.chain import OnChain, check_chain, check_clock, check_protocol, check_registration, check_subnet
from scripts.doctor.disk import check_disk
from scripts.doctor.facts import Hardware, Looked
from scripts.doctor.keys import check_coldkey, check_hotkey
from scripts.doctor.machine import (
    Work,
    check_buffers,
    check_card,
    check_card_memory,
    check_cores,
    check_files,
    check_memory,
    check_packages,
    check_python,
    check_tcp,
    check_validators_memory,
)
from scripts.doctor.options import DoctorOptions, parse
from scripts.doctor.reach import check_address, check_port, check_reach, check_round_trip
from scripts.doctor.report import Finding, Report, ok, text
from scripts.doctor.run import check_data, check_manifest, check_uplink, look_at_shards
from scripts.doctor.speed import Crossing, Measured, check_bandwidth, measure
from subnet.identity import Identity
from subnet.manifest import LoadedManifest, Manifest, ManifestError, load_manifest
from subnet.trust.quota import LEAST_UPLINK
from subnet.wallets import look_at_keys


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    """Print the report; 0 if nothing fails, 1 if something does, 130 stopped by Ctrl-C."""
    options = parse(argv, environ)
    if sys.stderr.isatty():
        print("orion doctor: waits for a block of the chain and for peers, up to a minute", file=sys.stderr)
    try:
        report = asyncio.run(examine(options))
    except KeyboardInterrupt:
        return 130
    print(json.dumps(report.as_json(), indent=2) if options.as_json else "\n".join(text(report)))
    return report.status


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The stage that is measured against."""

    manifest: Manifest
    plans: tuple[StagePlan, ...]
    needs: Needs
    """Of a miner, with the card that is here or without one."""
    held: Holding
    """What that one would hold of open units with what is free."""
    on_card: StagePlan
    """Which stage needs most of the card that is here."""
    work: Work

    @classmethod
    def of(cls, manifest: Manifest, only: int | None, machine: Hardware) -> Stage:
        """`only` this one, or what needs most of each thing."""
        config = manifest.model.config()
        plans = split(config, manifest.swarm.stages)
        asked = plans if only is None else plans[only : only + 1]
        card = machine.card
        layouts = [Layout.planned(config, plan, manifest.optimizer.kind) for plan in plans]
        all_needs = [miner_needs(manifest, plan, layouts[plan.index], card=card) for plan in asked]
        needs = max(all_needs, key=lambda one: one.host)
        memory = fitted(manifest, plans[needs.stage], layouts[needs.stage], memory=machine.memory, card=card)
        return cls(
            manifest=manifest,
            plans=plans,
            needs=needs,
            held=Holding(memory.recompute, memory.graphs),
            on_card=asked[0] if card is None else max(asked, key=lambda plan: stage_on(manifest, plan, card).total),
            work=max((Work.of(manifest, plan) for plan in asked), key=lambda one: one.unit_flops),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What came of asking peers."""

    port: Port | None = None
    answers: Sequence[Answer] = ()
    measured: Sequence[Measured] = ()
    why: str = ""
    """Nobody was asked; empty if somebody was."""


async def examine(options: DoctorOptions, *, now_ns: Callable[[], int] = time.time_ns) -> Report:
    """All checks. Takes as long as the chain needs for a block and a peer for its call.

    now_ns: this machine's clock, Unix time in nanoseconds.
    """
    machine = await asyncio.to_thread(facts.hardware, options.device if options.role == "miner" else "auto")
    loaded, unreadable = _manifest(options)
    manifest = None if loaded is None else loaded.manifest
    inside = manifest is not None and (options.stage is None or options.stage < manifest.swarm.stages)
    stage = await asyncio.to_thread(Stage.of, manifest, options.stage, machine) if manifest and inside else None
    named = options.wallet is not None and options.hotkey is not None
    keys = look_at_keys(options.wallet or "", options.hotkey or "", options.wallet_path) if named else None
    signer, unusable = await asyncio.to_thread(facts.identity, keys, options)
    hotkey = None if keys is None else keys.address
    looked = await facts.look_at_chain(options, signer, reads_space=loaded is not None, now_ns=now_ns)
    shards = None
    if loaded is not None and options.data is not None:
        shards = await asyncio.to_thread(look_at_shards, loaded, options.data, deep=options.deep)
    asked = await ask_around(signer, looked.chain, options, now_ns)
    disk = await asyncio.to_thread(facts.disk, options.out)
    findings = [
        *_software(),
        *_machine(machine, stage, options),
        check_disk(
            disk,
            None if stage is None else stage.needs,
            evidence_disk=options.evidence_disk,
            checkpoints_here="://" not in options.checkpoints,
            role=options.role,
        ),
        check_hotkey(keys, options, unusable=unusable),
        check_coldkey(keys),
        *_chain(looked, hotkey, options),
        check_manifest(loaded, unreadable, looked.chain, hotkey, options),
        check_data(shards, options),
        check_port(asked.port, options),
        check_address(asked.answers, asked.why, options),
        check_reach(asked.answers, asked.why, asked.port, options),
        check_round_trip(asked.answers, asked.why),
        check_uplink(options, least=LEAST_UPLINK),
        check_bandwidth(asked.measured, asked.why, _crossing(stage, machine), options),
    ]
    return Report(options.role, _where(manifest, options), tuple(findings))


def _software() -> list[Finding]:
    found = facts.software()
    return [check_python(found.python, found.bounds), check_packages(found.requirements, facts.installed)]


def _machine(machine: Hardware, stage: Stage | None, options: DoctorOptions) -> list[Finding]:
    manifest = None if stage is None else stage.manifest
    if options.role == "validator":
        held = None if stage is None else validator_host(stage.manifest, stage.plans)
        memory = check_validators_memory(held, machine.memory)
    else:
        needs, holding = (None, None) if stage is None else (stage.needs, stage.held)
        memory = check_memory(needs, machine.memory, held=holding, ring=options.ring)
    return [
        check_cores(machine.cores),
        check_card(
            machine.card,
            machine.card_problem,
            driver=machine.driver,
            work=None if stage is None else stage.work,
            cores=machine.cores,
            wanted=options.device != "cpu",
        ),
        check_card_memory(machine.card, manifest, None if stage is None else stage.on_card),
        memory,
        check_files(*machine.files, least=None if manifest is None else least_files(manifest)),
        check_tcp(machine.tcp),
        check_buffers(machine.tcp, uplink=options.uplink),
    ]


def _chain(looked: Looked, hotkey: str | None, options: DoctorOptions) -> list[Finding]:
    if looked.no_subnet:
        chain = ok("chain", f"{options.network}: connected in {looked.seconds:.1f} s")
    else:
        chain = check_chain(looked.chain, looked.unreachable, options)
    return [
        chain,
        check_subnet(looked.chain, looked.no_subnet, options),
        check_clock(looked.chain),
        check_protocol(looked.chain),
        check_registration(looked.chain, hotkey, options),
    ]


async def ask_around(
    signer: Identity | None, chain: OnChain | None, options: DoctorOptions, now_ns: Callable[[], int]
) -> Asked:
    """Bind the port, and ask peers to call back on it if they would; else see at least how far they are."""
    own = "" if signer is None else signer.hotkey
    found = [] if chain is None else peers(chain.state, own)
    if signer is None:
        return Asked(answers=await look(found), why="needs a hotkey that can sign")
    async with Listener(own, host=options.host, port=options.port, now_ns=now_ns) as port:
        if chain is None:
            why = "needs the chain, where peers are found"
        elif port.problem and not port.running:
            why = "needs the port"
        elif chain.state.by_hotkey(own) is None:
            why = "needs a registered hotkey: peers answer nobody else"
        elif not found:
            why = f"no other neuron of netuid {options.netuid} serves an axon that could be asked"
        else:
            answers = await ask(signer, found, port.number, now_ns=now_ns)
            trips = {answer.uid: answer.round_trip for answer in answers if answer.round_trip is not None}
            near = [(neuron, trips[neuron.uid]) for neuron in found if neuron.uid in trips]
            return Asked(port=port, answers=answers, measured=await measure(signer, near, now_ns=now_ns))
        return Asked(port=port, answers=await look(found), why=why)


def _manifest(options: DoctorOptions) -> tuple[LoadedManifest | None, str]:
    if options.manifest is None:
        return None, ""
    try:
        return load_manifest(options.manifest), ""
    except ManifestError as error:
        return None, str(error)


def _crossing(stage: Stage | None, machine: Hardware) -> Crossing | None:
    return None if stage is None else Crossing.of(stage.manifest, stage.work, machine.card, machine.cores)


def _where(manifest: Manifest | None, options: DoctorOptions) -> str:
    on = f"netuid {options.netuid} on {options.network}"
    if manifest is None:
        return on
    stage = f", stage {options.stage}" if options.stage is not None else ""
    return f"run {manifest.run.name}{stage}, {on}"
