"""What every sub-command of `orion` may be told. Light: nothing is imported that a command needs to run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from subnet.commandline import Parser, port, within


def _add_alive(commands: argparse._SubParsersAction[Parser]) -> None:
    alive = commands.add_parser(
        "alive",
        help="ask the node on this machine whether it serves",
        description="Ask the node on this machine whether it serves. For health checks.",
        epilog="Exit status: 0 it serves, 1 it does not, 2 usage.",
    )
    alive.add_argument("--config", type=Path, help="the node's settings file")
    alive.add_argument("--port", default=argparse.SUPPRESS, help="the node's axon port (default: as the node has it)")


def _add_export(commands: argparse._SubParsersAction[Parser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a run's weights as a Hugging Face folder",
        description="Write the weights of a run as one folder that transformers loads.",
    )
    export.add_argument("--run", type=Path, required=True, help="folder of the run: manifest.toml and checkpoints/")
    export.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    export.add_argument(
        "--round", type=within(0), default=None, help="round to write (default: the newest that every stage has)"
    )
    export.add_argument(
        "--tokenizer", type=Path, default=None, help="tokenizer.json (default: that of the run's corpus in the cache)"
    )
    export.add_argument("--shard-gb", type=float, default=5.0, help="largest weight file in 10^9 bytes (default: 5)")


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    generate = commands.add_parser(
        "generate", help="continue a text with an exported model", description="Continue a text with an exported model."
    )
    generate.add_argument("prompt", help="text to continue")
    generate.add_argument("--from", type=Path, required=True, dest="folder", help="folder that orion export wrote")
    generate.add_argument("--tokens", type=int, default=None, help="at most so many new tokens (default: 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    generate.add_argument("--seed", type=int, default=0, help="seed of the draws above temperature 0 (default: 0)")


def _add_roster(commands: argparse._SubParsersAction[Parser]) -> None:
    roster = commands.add_parser(
        "roster",
        help="recompute the roster from the chain and print why each neuron is where it is",
        description="Replay a run's rosters from round 0 on, from the chain alone, and print the one of a block.",
    )
    roster.add_argument(
        "--at",
        type=within(0),
        default=None,
        metavar="BLOCK",
        help="block of the roster (default: the last final one)",
    )
    roster.add_argument("--run", type=Path, default=None, help="folder of a local run: manifest.toml and chain.url")
    roster.add_argument("--network", default=None, help="network name or ws:// URL, with --manifest instead of --run")
    roster.add_argument("--manifest", type=Path, default=None, help="manifest.toml of the run")
    roster.add_argument("--netuid", type=within(0, 65_535), default=None, help="subnet (default: the manifest's)")
    roster.add_argument("--archive", default=None, help="ws:// URL to read what the network's nodes have pruned from")


def _add_score(commands: argparse._SubParsersAction[Parser]) -> None:
    score = commands.add_parser(
        "score", help="say where a miner's weight comes from", description="Say where a miner's weight comes from."
    )
    actions = score.add_subparsers(dest="action", required=True, metavar="ACTION")
    explain = actions.add_parser(
        "explain",
        help="print every term of a miner's score and the evidence behind it",
        description="Print every term of a miner's score and the evidence behind it: per validator and round from the "
        "logs of a run, or of the newest closed round recomputed from the chain and what miners and validators serve.",
    )
    explain.add_argument("--uid", type=within(0), required=True, help="the miner's uid")
    logs = explain.add_argument_group("from logs")
    logs.add_argument("--run", type=Path, default=None, help="folder of a run: events/ of its validators")
    logs.add_argument("--round", type=within(0), default=None, help="only this round (default: all)")
    live = explain.add_argument_group("from the network")
    live.add_argument("--network", default=None, help="network name or ws:// URL")
    live.add_argument("--manifest", type=Path, default=None, help="manifest.toml of the run")
    live.add_argument("--wallet", default=None, help="wallet whose hotkey asks: a member of the run, or a validator")
    live.add_argument("--hotkey", default=None, help="hotkey name within the wallet")
    live.add_argument("--wallet-path", type=Path, default=Path("~/.bittensor/wallets"), help="folder of wallets")


def _add_shape(command: argparse.ArgumentParser) -> None:
    """What `plan` and `simulate` are asked alike: the model, the machines, the links and the way of running."""
    command.add_argument("--model", default="100b", help="model preset (default: 100b)")
    command.add_argument("--stages", type=int, default=16, help="pipeline stages (default: 16)")
    command.add_argument("--replicas", type=int, default=3, help="miners per stage (default: 3)")
    command.add_argument(
        "--gpu", default="a100-80gb", help="card of all, or a mixed fleet like a100-80gb:40,h100:8 (default: a100-80gb)"
    )
    command.add_argument("--up", default="856mbit", help="a miner's uplink (default: 856mbit)")
    command.add_argument("--down", default="1322mbit", help="downlink of miners and validators (default: 1322mbit)")
    command.add_argument("--rtt", default="60ms", help="there and back between two miners (default: 60ms)")
    run = command.add_argument_group("the run (defaults: those of --as)")
    run.add_argument(
        "--as",
        dest="style",
        default="orion",
        help="way of running: orion, or published, the 100B run of 2026 (default: orion)",
    )
    run.add_argument("--depth", type=int, default=None, help="microbatches in flight per head")
    run.add_argument("--routing", default=None, help="how a replica is chosen: lottery or lanes")
    run.add_argument("--recompute", default=None, help="keep, selective or full (default: the least that fits)")
    run.add_argument(
        "--efficiency", type=float, default=None, help="share of peak a card reaches (default: the card's)"
    )
    run.add_argument("--sequence", type=int, default=None, help="tokens in a sequence")
    run.add_argument("--batch", type=int, default=None, help="sequences in a microbatch")
    run.add_argument("--accumulation", type=int, default=None, help="microbatches in a local step")
    run.add_argument("--optimizer", default="adamw", help="adamw, nadam or muon (default: adamw)")
    run.add_argument("--moments", default="bf16", help="the optimizer's moments: bf16 or fp32 (default: bf16)")
    run.add_argument(
        "--codec", default="topk2bit", choices=("topk2bit", "int8", "bf16"), help="what merges send (default: topk2bit)"
    )
    run.add_argument("--round-minutes", type=float, default=None, help="minutes of training between two merges")


def _add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="say how fast a run would train and what it costs, before anybody rents anything",
        description="Say how fast a run trains, what holds it up, what it costs, what each stage needs of its card, "
        "and what auditing takes. Arithmetic, no measurement; exit status 1 if something does not fit. docs/plan.md "
        "explains every figure.",
    )
    _add_shape(plan)
    plan.add_argument("--price", type=float, default=1.25, help="dollars per card and hour (default: 1.25)")
    plan.add_argument("--tokens", default="1t", help="tokens to train on, like 500b (default: 1t)")
    plan.add_argument(
        "--host-gb", type=float, default=None, help="a miner's host memory, 10^9 bytes (default: the card's)"
    )
    plan.add_argument("--disk-gb", type=float, default=1000.0, help="a miner's disk, 10^9 bytes (default: 1000)")
    plan.add_argument("--stay-hours", type=float, default=522.0, help="hours a miner stays, on average (default: 522)")
    audit = plan.add_argument_group("audits")
    audit.add_argument("--validators", type=int, default=4, help="validators (default: 4)")
    audit.add_argument("--slot-blocks", type=int, default=15, help="blocks of 12 s in a slot (default: 15)")
    audit.add_argument("--windows", type=float, default=0.25, help="windows picked per miner and slot (default: 0.25)")
    audit.add_argument(
        "--share", type=float, default=0.02, help="share of units that all replay together (default: 0.02)"
    )
    audit.add_argument(
        "--steps", type=float, default=0.02, help="share of picked windows replayed whole (default: 0.02)"
    )
    audit.add_argument("--readers", type=float, default=1.0, help="validators that fetch a picked window (default: 1)")
    audit.add_argument(
        "--delta", type=float, default=0.6, help="size of a weight delta over that of weights (default: 0.6, bf16)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_simulate(commands: argparse._SubParsersAction[Parser]) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="play a planned run event by event, with failures, and draw it",
        description="Play a planned run with the nodes' own routing, depth, repair and merge under a virtual clock, "
        "print it beside the closed form of `orion plan`, and draw its stages over time. docs/simulate.md says what is "
        "played and what is left out.",
    )
    _add_shape(simulate)
    played = simulate.add_argument_group("what is played")
    played.add_argument("--minutes", type=float, default=60.0, help="minutes of the swarm's life to play (default: 60)")
    played.add_argument(
        "--failures-per-hour",
        type=float,
        default=0.0,
        help="replicas that die in an hour, in the whole swarm (default: none)",
    )
    played.add_argument(
        "--ready-minutes",
        type=float,
        default=10.0,
        help="minutes from a failure until a newcomer is there (default: 10)",
    )
    played.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (default: 0)")
    played.add_argument("--picture", type=Path, default=None, metavar="PNG", help="file to draw the timeline into")
    simulate.add_argument("--json", action="store_true", help="print JSON")


def _add_sim(commands: argparse._SubParsersAction[Parser]) -> None:
    sim = commands.add_parser(
        "sim",
        help="play a whole swarm in one process, with everything going wrong that a seed asks for",
        description="Run real miners and validators in one process, on a virtual clock, over a simulated network and "
        "chain, and let go wrong what the seed draws: nodes, lines, clocks, chain. Then look whether everything that "
        "docs/reliability.md promises still holds. A seed plays the same every time.",
        epilog="Exit status: 0 everything holds, 1 something does not, 2 usage.",
    )
    sim.add_argument("--seed", type=within(0), default=None, help="what goes wrong and when (default: 0)")
    sim.add_argument("--seeds", default=None, metavar="A-B", help="play all of these")
    sim.add_argument("--jobs", type=within(1), default=1, help="seeds to play at a time (default: 1)")
    sim.add_argument("--minutes", type=float, default=20.0, help="virtual minutes to play (default: 20)")
    sim.add_argument("--stages", type=within(2), default=4, help="pipeline stages (default: 4)")
    sim.add_argument("--replicas", type=within(1), default=3, help="miners of each stage (default: 3)")
    sim.add_argument("--joiners", type=within(0), default=1, help="miners that come later (default: 1)")
    sim.add_argument("--validators", type=within(1), default=3, help="validators (default: 3)")
    sim.add_argument("--calm", action="store_true", help="nothing goes wrong")
    sim.add_argument("--faults", type=Path, default=None, help="schedule to play in place of the drawn one, JSON")
    sim.add_argument("--trace", type=Path, default=None, help="file for all faults and events in order, JSON lines")
    sim.add_argument("--log", type=Path, default=None, help="file for what the nodes log")
    sim.add_argument("--shrink", type=Path, default=None, help="file for the least schedule that still fails, JSON")
    sim.add_argument("--json", action="store_true", help="print JSON")


def _add_calibrate(commands: argparse._SubParsersAction[Parser]) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="measure how far honest devices differ, and write the audit's tolerances",
        description="Compute the same units in every way this machine can, and write tolerances by pair of devices.",
    )
    calibrate.add_argument("--model", default="nano", help="model preset (default: nano)")
    calibrate.add_argument("--stages", type=within(2), default=4, help="pipeline stages, at least 2 (default: 4)")
    calibrate.add_argument("--microbatches", type=within(1), default=400, help="how many to compare (default: 400)")
    calibrate.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: 0)")
    calibrate.add_argument("--out", type=Path, default=None, help="table to write (default: the package's own)")


def _add_data(commands: argparse._SubParsersAction[Parser]) -> None:
    data = commands.add_parser(
        "data",
        help="make token shards from documents, and look at them",
        description="Make token shards from documents, and look at them. docs/data.md says how they are made.",
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser(
        "prepare",
        help="tokenise documents into the shards that a run's manifest names",
        description="Tokenise parquet, JSONL or text into shards. Stopped or killed, the same command goes on. "
        "docs/data.md says what the folder holds and in which order.",
    )
    prepare.add_argument(
        "--from",
        dest="addresses",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH_OR_URL",
        help="files, folders, patterns, s3://, gs://, az:// or https:// addresses; repeat for more",
    )
    prepare.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    prepare.add_argument("--out", type=Path, required=True, help="folder to write; new, or begun by the same command")
    prepare.add_argument(
        "--format",
        default=None,
        choices=("parquet", "jsonl", "text"),
        help="format of the sources (default: by their suffix)",
    )
    prepare.add_argument("--column", default="text", help="column with the text, a.b for nested ones (default: text)")
    prepare.add_argument(
        "--separator",
        default=None,
        metavar="TEXT",
        help="what stands between documents of a text file, \\n for a line break (default: a file is a document)",
    )
    prepare.add_argument("--end-of-text", default=None, metavar="TOKEN", help="mark before documents (default: known)")
    prepare.add_argument("--model", default=None, help="model preset whose vocabulary must hold the tokenizer's")
    prepare.add_argument("--held-out", type=float, default=0.01, help="share of documents held out (default: 0.01)")
    prepare.add_argument("--shard-tokens", type=int, default=100_000_000, help="most in a shard (default: 100000000)")
    prepare.add_argument(
        "--longest", type=int, default=16 << 20, help="bytes above which a document is left out (default: 16777216)"
    )
    prepare.add_argument(
        "--skip-broken", action="store_true", help="leave out, and count, what is no UTF-8 or no JSON (default: stop)"
    )
    prepare.add_argument("--seed", type=int, default=0, help="seed of the order of documents (default: 0)")
    prepare.add_argument("--plain", action="store_true", help="plain lines even on a terminal")
    prepare.add_argument("--json", action="store_true", help="print the result as JSON")
    text = "print what a prepared folder holds"
    show = actions.add_parser("show", help=text, description=f"{text.capitalize()}.")
    show.add_argument("folder", type=Path, metavar="DIR", help="folder that orion data prepare wrote")
    show.add_argument("--json", action="store_true", help="print JSON")
    text = "hash a prepared folder's files and compare"
    verify = actions.add_parser("verify", help=text, description=f"{text.capitalize()}.")
    verify.add_argument("folder", type=Path, metavar="DIR", help="folder that orion data prepare wrote")
    text = "print the [data] section that a run's manifest needs"
    section = actions.add_parser("section", help=text, description=f"{text.capitalize()}.")
    section.add_argument("folder", type=Path, metavar="DIR", help="folder that orion data prepare wrote")
    section.add_argument("--sequence", type=within(1), default=1024, help="tokens in a sequence (default: 1024)")
    section.add_argument("--batch", type=within(1), default=8, help="sequences in a microbatch (default: 8)")
    section.add_argument(
        "--samples-per-round", type=within(1), default=2048, help="microbatches set aside for a round (default: 2048)"
    )
    section.add_argument("--validation-batches", type=within(1), default=8, help="held-out batches used (default: 8)")
    section.add_argument("--out", type=Path, default=None, metavar="FILE", help="file to write (default: print)")


def _add_localnet(commands: argparse._SubParsersAction[Parser]) -> None:
    localnet = commands.add_parser(
        "localnet",
        help="run a whole swarm on this machine: a development chain, miners, validators",
        description="Start a development chain, miners and validators on this machine, train, and print the result.",
        epilog="WHO is miner:3 or stage:2 (one replica of it, whoever holds it). ROUND is round1 for the middle of "
        "round 1, round1+0.95 for another place in it. SECONDS are half a round if left out. Repeat any for more.",
    )
    localnet.add_argument("--stages", type=int, default=4, help="pipeline stages (default: 4)")
    localnet.add_argument("--replicas", type=int, default=2, help="miners per stage (default: 2)")
    localnet.add_argument("--validators", type=int, default=2, help="validators (default: 2)")
    localnet.add_argument("--rounds", type=int, default=3, help="rounds of training and merging (default: 3)")
    localnet.add_argument("--model", default="nano", help="model preset (default: nano)")
    localnet.add_argument(
        "--data", type=Path, default=None, help="prepared shards (default: this Python's standard library)"
    )
    localnet.add_argument("--out", type=Path, default=None, help="folder for everything (default: runs/<time>)")
    localnet.add_argument(
        "--resume",
        type=Path,
        default=None,
        metavar="DIR",
        help="go on with the run in DIR, all of whose processes have died; it keeps the options it was started with",
    )
    localnet.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: 0)")
    localnet.add_argument("--block-time", type=float, default=0.1, help="seconds per block (default: 0.1)")
    localnet.add_argument(
        "--round-seconds", type=float, default=40.0, help="length of a round, at least 10 s (default: 40)"
    )
    localnet.add_argument(
        "--no-overlap",
        action="store_true",
        help="merge at the end of a round, while nobody trains, instead of during the next one",
    )
    localnet.add_argument(
        "--codec",
        default=None,
        choices=("topk2bit", "int8", "bf16"),
        help="what merges send (default: topk2bit; int8 for nano, whose few rounds cannot pay back what topk2bit owes)",
    )
    localnet.add_argument(
        "--optimizer",
        default=None,
        choices=("adamw", "nadam", "muon"),
        help="optimizer of every local step, at the preset's rate (default: the preset's)",
    )
    localnet.add_argument(
        "--accumulation",
        type=int,
        default=2,
        help="microbatches in a local step (default: 2); more train faster and learn less from each",
    )
    localnet.add_argument(
        "--device", default="cpu", help="where miners compute: auto, cpu, cuda, or cuda:N for card N (default: cpu)"
    )
    churn = localnet.add_argument_group("churn on demand")
    for action, form, text in (
        ("kill", "WHO@ROUND", "kill -9 of a miner"),
        ("leave", "WHO@ROUND", "a miner leaves cleanly at the end of its round"),
        ("freeze", "WHO@ROUND[:SECONDS]", "a miner stands still for a while (SIGSTOP)"),
        ("restart", "WHO@ROUND[:SECONDS]", "kill -9 of a miner, which is started again after a while"),
        ("fill", "WHO@ROUND[:SECONDS]", "a miner cannot write to its disk for a while, as if it were full"),
        ("steal", "WHO@ROUND[:SECONDS]", "the same as --restart, and meanwhile somebody else answers on its port"),
        ("join", "N@ROUND", "N miners more"),
    ):
        churn.add_argument(f"--{action}", action="append", default=[], metavar=form, help=text)
    churn.add_argument(
        "--chaos",
        type=int,
        default=None,
        metavar="SEED",
        help="restarts, freezes, full disks and stolen ports as this number draws them, and a look at the end whether "
        "every promise of docs/reliability.md held",
    )
    trust = localnet.add_argument_group("who cheats (in a checkout)")
    trust.add_argument(
        "--adversary",
        action="append",
        default=[],
        metavar="KIND[:UID]",
        help="start a node that cheats, for example sign-flip or sign-flip:3; without UID the first that fits; repeat "
        "for more",
    )
    network = localnet.add_argument_group("the network between nodes")
    network.add_argument(
        "--latency", default=None, metavar="50ms", help="delay of every message, one way (default: none)"
    )
    network.add_argument(
        "--bandwidth", default=None, metavar="200mbit", help="up and down, of every node (default: no limit)"
    )
    network.add_argument("--loss", default=None, metavar="0.5%", help="share of packets lost (default: none)")
    localnet.add_argument("--plain", action="store_true", help="plain lines even on a terminal")
    localnet.add_argument(
        "--dashboard",
        type=port,
        nargs="?",
        const=8765,
        default=None,
        metavar="PORT",
        help="show the run as a web page on this machine while it goes on (port: 8765, 0 for any that is free)",
    )


def _add_dashboard(commands: argparse._SubParsersAction[Parser]) -> None:
    dashboard = commands.add_parser(
        "dashboard",
        help="show a run, or a node, as a web page",
        description="Serve one web page that shows a run from its event logs: as it goes on, or any moment of it "
        "again. It reads and never acts. docs/dashboard.md says what each panel shows.",
    )
    shown = dashboard.add_mutually_exclusive_group(required=True)
    shown.add_argument("--run", type=Path, default=None, metavar="DIR", help="--out folder of a run or of a node")
    shown.add_argument(
        "--peers", default=None, metavar="URL,URL", help="axons elsewhere, like http://192.0.2.7:8091: who answers"
    )
    dashboard.add_argument(
        "--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1, this machine only)"
    )
    dashboard.add_argument("--port", type=port, default=8765, help="port, 0 for any that is free (default: 8765)")
    measured = dashboard.add_argument_group("what figures are measured against")
    measured.add_argument("--gpu", default=None, help="card of every miner, like a100-80gb, for MFU (default: none)")
    measured.add_argument("--price", type=float, default=None, help="dollars per card and hour (default: none)")
    measured.add_argument("--target", default=None, help="tokens to train on, like 500b (default: the run's rounds)")


def _add_monitor(commands: argparse._SubParsersAction[Parser]) -> None:
    monitor = commands.add_parser(
        "monitor",
        help="show a run, or a node, in the terminal",
        description="Show a run or a node from its event logs, as `orion localnet` shows its own, until it is over.",
    )
    monitor.add_argument("--run", type=Path, required=True, metavar="DIR", help="--out folder of a run or of a node")
    monitor.add_argument("--plain", action="store_true", help="plain lines even on a terminal")


def _add_completion(commands: argparse._SubParsersAction[Parser]) -> None:
    completion = commands.add_parser(
        "completion",
        help="print what makes your shell complete this command",
        description="Print a script that makes a shell complete commands, options, choices and files of orion.",
        epilog="bash: orion completion bash > ~/.local/share/bash-completion/completions/orion. zsh: the same into "
        "a file _orion in a folder of $fpath. Then open a new shell.",
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="bash or zsh")


def _add_events(commands: argparse._SubParsersAction[Parser]) -> None:
    events = commands.add_parser(
        "events",
        help="say what the lines of event logs hold",
        description="Say what the lines of event logs (events/*.jsonl) hold.",
    )
    actions = events.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("schema", help="print the JSON Schema of a line", description="Print the JSON Schema of a line.")
    actions.add_parser("page", help="the same as text: docs/events.md", description="Print docs/events.md.")


class _Help(argparse.HelpFormatter):
    """argparse leaves no room for the indentation of commands, and the longest names would stand on lines alone."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = len("    completion")


class _Version(argparse.Action):
    """Looks it up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from subnet.transport.protocol import PROTOCOL, package_version  # noqa: PLC0415

        print(f"orion {package_version()}, protocol {PROTOCOL}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """All of them; what follows `miner`, `validator`, `doctor`, `config` and `chain` is read by those themselves."""
    root = Parser(
        prog="orion",
        description="Train one large language model together, on Bittensor, without an orchestrator.",
        epilog="orion COMMAND --help says more. First to try: orion localnet.",
        formatter_class=_Help,
    )
    root.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the versions of package and protocol",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_localnet(commands)
    _add_dashboard(commands)
    _add_monitor(commands)
    _add_export(commands)
    _add_generate(commands)
    _add_roster(commands)
    _add_score(commands)
    _add_calibrate(commands)
    _add_plan(commands)
    _add_simulate(commands)
    _add_sim(commands)
    _add_data(commands)
    # Their options are their own: `main` hands them over unparsed.
    for role, does in (("miner", "hold one stage and train it"), ("validator", "audit, score and set weights")):
        commands.add_parser(role, help=f"{does} (docs/{role}.md)", add_help=False)
    _add_alive(commands)
    commands.add_parser("doctor", help="find out whether this machine can mine or validate", add_help=False)
    commands.add_parser("config", help="show a neuron's settings and where each comes from", add_help=False)
    commands.add_parser("chain", help="run the development chain alone, for btcli and the SDK", add_help=False)
    _add_events(commands)
    _add_completion(commands)
    return root
