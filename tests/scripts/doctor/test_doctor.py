"""The whole command against a real chain and a real peer, and against everything that can be wrong there."""

import dataclasses
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from neurons import callback
from neurons.config import NeuronConfig
from neurons.node import Node
from scripts.cli import main
from scripts.doctor import runner
from scripts.doctor.options import DoctorOptions, parse
from scripts.doctor.report import Finding, Report, Word
from scripts.doctor.runner import examine
from subnet.chain import BittensorChain
from subnet.localchain.genesis import OWNER_COLDKEY_URI, ChainConfig
from subnet.localchain.node import LocalChain
from subnet.wallets import create_wallet
from tests.neurons.test_node import NETUID, publish_run

HERE = "127.0.0.1"


@dataclass(frozen=True)
class Town:
    """A chain with one running node, and a registered newcomer who has not started yet."""

    config: NeuronConfig
    node: Node
    folder: Path

    def options(self, *flags: str) -> DoctorOptions:
        config = self.config
        given = [
            *("--network", config.network, "--netuid", str(NETUID), "--wallet", "local", "--hotkey", "newcomer"),
            *("--wallet-path", str(self.folder), "--manifest", str(config.manifest), "--data", str(config.data)),
            *("--out", str(self.folder / "new"), "--host", HERE, "--port", str(free_port()), "--uplink", "100mbit"),
            *("--ring", "1gb", "--evidence-disk", "1gb"),
        ]
        return parse([*given, *flags], {})

    async def report(self, *flags: str) -> Report:
        return await examine(self.options(*flags))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        return int(sock.getsockname()[1])


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """One caller may be called again at once."""
    monkeypatch.setattr(callback, "PAUSE", 0.0)


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    async with LocalChain(ChainConfig(netuid=NETUID, block_time=0.05)) as chain:
        config, _ = await publish_run(chain.url, tmp_path)
        newcomer = create_wallet("local", "newcomer", tmp_path)
        owner = create_wallet("rich", "h", tmp_path, coldkey_uri=OWNER_COLDKEY_URI)
        (tmp_path / "local" / "coldkey").unlink()
        connected = await BittensorChain.connect(chain.url, NETUID, owner, timeout=10)
        try:
            await connected.register_neurons({newcomer.hotkey.ss58_address: 0.0})
        finally:
            await connected.close()
        async with await Node.open(config, role="miner") as node:
            await node.listen()
            yield Town(config, node, tmp_path)


def found(report: Report, check: str) -> Finding:
    return next(finding for finding in report.findings if finding.check == check)


def failed(report: Report) -> set[str]:
    return {finding.check for finding in report.findings if finding.word is Word.FAIL}


async def test_a_machine_that_can_mine(town: Town) -> None:
    report = await town.report("--deep")
    assert failed(report) == set()
    assert report.status == 0
    for check in ("hotkey", "coldkey", "chain", "subnet", "clock", "registration", "manifest", "data", "port"):
        assert found(report, check).word is Word.OK, found(report, check)
    for check in ("address", "reachable", "round trip"):
        assert found(report, check).word is Word.OK, found(report, check)
    assert found(report, "reachable").found.startswith("yes: uid")
    assert "Mbit/s up and" in found(report, "bandwidth").found
    assert not (town.folder / "new").exists()
    page = (Path(__file__).parents[3] / "docs" / "doctor.md").read_text()
    explained = {
        check for line in page.splitlines() if line.startswith("| ") for check in line.split("|")[1].split(",")
    }
    assert {finding.check for finding in report.findings} <= {check.strip() for check in explained}


async def test_a_port_that_is_closed_to_peers(town: Town) -> None:
    report = await town.report("--host", "127.0.0.2", "--announce", HERE)
    assert failed(report) == {"reachable"}
    reachable = found(report, "reachable")
    assert "refuses connections" in reachable.found
    assert "publish the port" in reachable.fix


async def test_a_port_that_is_taken_by_another_program_or_by_the_node_itself(town: Town) -> None:
    with socket.socket() as taken:
        taken.bind((HERE, 0))
        taken.listen()
        report = await town.report("--port", str(taken.getsockname()[1]))
    assert failed(report) == {"port"}
    assert found(report, "reachable").found == "needs the port"
    port = town.node.axon.port
    running = await town.report("--hotkey", "miner", "--port", str(port))
    assert "running node of this hotkey" in found(running, "port").found
    assert found(running, "reachable").word is Word.SKIPPED  # it is the only one there


async def test_a_hotkey_that_nobody_knows(town: Town) -> None:
    stranger = await town.report("--hotkey", "stranger")
    assert failed(stranger) == {"registration"}
    assert "needs a registered hotkey" in found(stranger, "reachable").found
    nobody = await town.report("--hotkey", "nobody")
    assert failed(nobody) == {"hotkey"}
    assert found(nobody, "registration").found == "needs a hotkey"
    assert found(nobody, "port").word is Word.SKIPPED


async def test_a_clock_that_is_off(town: Town) -> None:
    for seconds, words in ((90, "ahead"), (-90, "behind")):
        report = await examine(town.options(), now_ns=lambda off=seconds: time.time_ns() + off * 10**9)
        assert failed(report) == {"clock", "reachable"}
        assert words in found(report, "clock").found
        assert "peers refuse this machine's signatures" in found(report, "reachable").found
        assert "set-ntp" in found(report, "clock").fix


async def test_a_wrong_manifest_missing_data_and_no_room(town: Town) -> None:
    altered = town.folder / "altered.toml"
    altered.write_bytes(town.config.manifest.read_bytes() + b"\n")
    (town.folder / "file").write_text("")
    report = await town.report(
        *("--manifest", str(altered), "--data", str(town.folder / "none"), "--out", str(town.folder / "file" / "x")),
        *("--ring", "1kb", "--uplink", "1mbit"),
    )
    assert failed(report) == {"manifest", "data", "disk", "memory", "uplink"}
    unread = await town.report("--manifest", str(town.folder / "none.toml"))
    assert failed(unread) == {"manifest"}
    assert found(unread, "memory").found.endswith("needs --manifest")


async def test_a_subnet_and_a_chain_that_are_not_there(town: Town) -> None:
    nowhere = await town.report("--netuid", "77")
    assert failed(nowhere) == {"subnet", "manifest"}
    assert found(nowhere, "chain").word is Word.OK
    gone = await town.report("--network", "ws://127.0.0.1:9")
    assert failed(gone) == {"chain"}
    for check in ("subnet", "clock", "registration", "manifest", "reachable"):
        assert found(gone, check).word is Word.SKIPPED
    named = await town.report("--network", "nowhere")
    assert failed(named) == {"chain"}


async def test_too_few_files_and_no_memory(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner.facts.hardware("cpu")
    monkeypatch.setattr(
        runner.facts, "hardware", lambda _: dataclasses.replace(real, memory=10**6, files=(64, 4096), card=None)
    )
    report = await town.report()
    assert failed(report) == {"memory", "open files"}
    assert found(report, "gpu").word is Word.WARN
    assert found(report, "open files").fix.startswith("ulimit -n 4096")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runner.facts, "CHAIN_DEADLINE", 2.0)
    return


def test_the_command_prints_text_or_json(quiet: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["doctor", "--network", "ws://127.0.0.1:9", "--out", str(tmp_path)]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    assert "x fail     chain" in printed
    assert "fix: another --network" in printed
    assert main([*flags, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == 1
    assert report["counts"]["fail"] == 1
    assert [check["number"] for check in report["checks"]] == list(range(1, len(report["checks"]) + 1))
