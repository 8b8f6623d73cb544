"""The `orion` command. Each sub-command lives in its own file and is imported only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from scripts.flags import parser

if TYPE_CHECKING:
    from scripts.plan.options import PlanOptions

RESUME_TAKES = {"command", "resume", "plain", "dashboard"}
"""The only options that go with --resume."""


UNREAD = 141
"""What shells report of a program that a closed pipe has ended."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 done, 1 failed, 2 usage, 130 stopped by Ctrl-C, 141 if nobody reads on (`| head`)."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes at its end once more, and must find somebody to take it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    return status


def _run(argv: list[str]) -> int:
    if argv and argv[0] in ("chain", "config", "doctor", "miner", "validator"):
        return _own_flags(argv[0], argv[1:])
    flags = parser().parse_args(argv)
    return _COMMANDS[flags.command](flags)


def _dashboard(flags: argparse.Namespace) -> int:
    from scripts.dashboard.command import dashboard  # noqa: PLC0415 - heavy, and only for this command

    return dashboard(
        flags.run,
        host=flags.host,
        port=flags.port,
        peers=flags.peers,
        gpu=flags.gpu,
        price=flags.price,
        target=flags.target,
    )


def _monitor(flags: argparse.Namespace) -> int:
    from scripts.monitor import monitor  # noqa: PLC0415 - heavy, and only for this command

    return monitor(flags.run, plain=flags.plain)


def _export(flags: argparse.Namespace) -> int:
    from scripts.export import export_run  # noqa: PLC0415 - heavy, and only for this command

    return export_run(
        run=flags.run, out=flags.out, number=flags.round, tokenizer=flags.tokenizer, shard_gb=flags.shard_gb
    )


def _generate(flags: argparse.Namespace) -> int:
    from scripts.generate import generate  # noqa: PLC0415 - heavy, and only for this command

    return generate(
        folder=flags.folder, prompt=flags.prompt, tokens=flags.tokens, temperature=flags.temperature, seed=flags.seed
    )


def _roster(flags: argparse.Namespace) -> int:
    from scripts.roster import show_roster  # noqa: PLC0415 - heavy, and only for this command

    return show_roster(
        at=flags.at,
        run=flags.run,
        network=flags.network,
        manifest=flags.manifest,
        netuid=flags.netuid,
        archive=flags.archive,
    )


def _alive(flags: argparse.Namespace) -> int:
    from scripts.alive import is_alive  # noqa: PLC0415 - only for this command

    return is_alive(vars(flags), os.environ)


def _events(flags: argparse.Namespace) -> int:
    from scripts.events import print_page, print_schema  # noqa: PLC0415 - pulls in pydantic

    return print_schema() if flags.action == "schema" else print_page()


def _completion(flags: argparse.Namespace) -> int:
    from scripts.completion import completion  # noqa: PLC0415 - pulls in every command's options

    return completion(flags.shell)


def _plan(flags: argparse.Namespace) -> int:
    from scripts.plan.report import show_plan  # noqa: PLC0415 - only for this command

    return show_plan(plan_options(vars(flags)), as_json=flags.json)


def _calibrate(flags: argparse.Namespace) -> int:
    from scripts.calibrate import calibrate  # noqa: PLC0415 - heavy, and only for this command

    return calibrate(
        model=flags.model, stages=flags.stages, microbatches=flags.microbatches, seed=flags.seed, out=flags.out
    )


def _own_flags(command: str, argv: list[str]) -> int:
    if command == "config":
        from scripts.settings import main as config  # noqa: PLC0415 - only for this command

        return config(argv, os.environ)
    if command == "doctor":
        from scripts.doctor.runner import main as doctor  # noqa: PLC0415 - heavy, and only for this command

        return doctor(argv, os.environ)
    if command in ("miner", "validator"):
        return _neuron(command)(argv)
    from subnet.localchain.__main__ import main as chain  # noqa: PLC0415 - heavy, and only for this command

    return chain(argv, prog="orion chain")


def _neuron(role: str) -> Callable[[list[str]], int]:
    if role == "miner":
        from neurons.miner import run as miner  # noqa: PLC0415 - heavy, and only for this command

        return miner
    from neurons.validator import run as validator  # noqa: PLC0415 - heavy, and only for this command

    return validator


def plan_options(given: Mapping[str, object]) -> PlanOptions:
    """What `orion plan` reads where these flags are given; others among them are passed over."""
    from scripts.plan.options import PlanOptions  # noqa: PLC0415 - only for what plans

    planned = {**vars(parser().parse_args(["plan"])), **given}
    return PlanOptions(**{name: planned[name] for name in PlanOptions.__dataclass_fields__})


def _simulate(flags: argparse.Namespace) -> int:
    from scripts.simulate.report import SimulateOptions, show_simulation  # noqa: PLC0415 - heavy, only for this command

    given = dict(vars(flags))
    options = SimulateOptions(**{name: given.pop(name) for name in SimulateOptions.__dataclass_fields__})
    return show_simulation(plan_options(given), options, as_json=flags.json)


def _sim(flags: argparse.Namespace) -> int:
    from scripts.sim.command import SimOptions, simulate_faults  # noqa: PLC0415 - heavy, and only for this command

    given = vars(flags)
    options = SimOptions(**{name: given[name] for name in SimOptions.__dataclass_fields__})
    return simulate_faults(options, as_json=flags.json)


def _data(flags: argparse.Namespace) -> int:
    from scripts.data.report import print_section, show_data, verify_data  # noqa: PLC0415 - heavy, only for this command

    given = dict(vars(flags))
    del given["command"], given["action"]
    if flags.action == "show":
        return show_data(flags.folder, as_json=flags.json)
    if flags.action == "verify":
        return verify_data(flags.folder)
    if flags.action == "section":
        return print_section(**given)
    from scripts.data.options import PrepareOptions  # noqa: PLC0415
    from scripts.data.prepare import prepare_data  # noqa: PLC0415

    if flags.separator is not None:
        given["separator"] = flags.separator.replace("\\n", "\n")
    options = PrepareOptions(**{name: given[name] for name in PrepareOptions.__dataclass_fields__})
    return prepare_data(options, plain=flags.plain, as_json=flags.json)


def _explain(flags: argparse.Namespace) -> int:
    live = (flags.network, flags.manifest, flags.wallet, flags.hotkey)
    if flags.run is not None and not any(live):
        from scripts.score import explain_score  # noqa: PLC0415 - reads only, but pulls in the event types

        return explain_score(uid=flags.uid, run=flags.run, number=flags.round)
    if flags.run is None and all(live) and flags.round is None:
        from scripts.recompute import Doubter, recompute_score  # noqa: PLC0415 - heavy, and only for this command

        return recompute_score(Doubter(*live, flags.wallet_path), uid=flags.uid)
    print(
        "orion score explain: give either --run, or --network with --manifest, --wallet and --hotkey (which explains "
        "the newest closed round: leave out --round)",
        file=sys.stderr,
    )
    return 2


def _localnet(flags: argparse.Namespace) -> int:
    from scripts.adversaries import Adversary, AdversaryOptionError  # noqa: PLC0415 - heavy, only for this command
    from scripts.faults import ACTIONS, FaultError, parse_faults  # noqa: PLC0415
    from scripts.localnet import localnet, resume  # noqa: PLC0415
    from scripts.options import CODECS, DEFAULT_CODEC, LocalnetOptions  # noqa: PLC0415

    if flags.resume is not None:
        fresh = parser().parse_args(["localnet"])
        others = [
            name for name, value in vars(flags).items() if name not in RESUME_TAKES and value != getattr(fresh, name)
        ]
        if others:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            print(
                f"orion localnet: --resume takes its options from the run's folder: leave out {given}", file=sys.stderr
            )
            return 2
        return resume(flags.resume, plain=flags.plain, dashboard=flags.dashboard)
    try:
        faults = parse_faults({action: getattr(flags, action) for action in ACTIONS})
        adversaries = tuple(Adversary.parse(text) for text in flags.adversary)
    except (FaultError, AdversaryOptionError) as error:
        print(f"orion localnet: {error}", file=sys.stderr)
        return 2
    options = LocalnetOptions(
        stages=flags.stages,
        replicas=flags.replicas,
        validators=flags.validators,
        rounds=flags.rounds,
        model=flags.model,
        seed=flags.seed,
        block_time=flags.block_time,
        round_seconds=flags.round_seconds,
        overlap=not flags.no_overlap,
        codec=flags.codec or CODECS.get(flags.model, DEFAULT_CODEC),
        optimizer=flags.optimizer,
        accumulation=flags.accumulation,
        device=flags.device,
        latency=flags.latency,
        bandwidth=flags.bandwidth,
        loss=flags.loss,
        faults=faults,
        chaos=flags.chaos,
        adversaries=adversaries,
    )
    return localnet(options, out=flags.out, plain=flags.plain, data=flags.data, dashboard=flags.dashboard)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "localnet": _localnet,
    "dashboard": _dashboard,
    "monitor": _monitor,
    "export": _export,
    "generate": _generate,
    "roster": _roster,
    "score": _explain,
    "calibrate": _calibrate,
    "plan": _plan,
    "simulate": _simulate,
    "sim": _sim,
    "data": _data,
    "alive": _alive,
    "events": _events,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
