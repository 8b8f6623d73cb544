"""`orion dashboard` as a shell sees it, and the page beside `orion localnet`."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest

from scripts.cli import RESUME_TAKES, main
from scripts.dashboard.command import Beside, is_loopback
from scripts.dashboard.errors import DashboardError
from scripts.flags import parser


def get(address: str, path: str) -> str:
    connection = HTTPConnection(address.removeprefix("http://"), timeout=20)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_it_serves_until_it_is_stopped(recorded: Path) -> None:
    command = [sys.executable, "-m", "scripts.cli", "dashboard", "--run", str(recorded), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        address = re.match(r"http://127\.0\.0\.1:\d+", line)
        assert address is not None, process.stderr.read()
        assert "<title>Orion</title>" in get(address[0], "/")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == ""


def test_what_cannot_be_served_is_one_line(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            "is no folder": ["--run", str(tmp_path / "nowhere")],
            "neither": ["--run", str(tmp_path)],
            f"--port {port} is taken": ["--run", str(recorded), "--port", port],
            "cannot be bound": ["--run", str(recorded), "--port", "0", "--host", "192.0.2.1"],
        }
        for says, flags in cases.items():
            assert main(["dashboard", *flags]) == 1
            error = capsys.readouterr().err
            assert says in error
            assert len(error.splitlines()) == 1


@pytest.mark.parametrize("flags", [[], ["--run", "x", "--port", "65536"], ["--run", "x", "--port", "-1"]])
def test_wrong_usage_is_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["dashboard", *flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_a_localnet_shows_itself_where_asked() -> None:
    for flags, port in (([], None), (["--dashboard"], 8765), (["--dashboard", "0"], 0), (["--resume", "x"], None)):
        assert parser().parse_args(["localnet", *flags]).dashboard == port
    assert "dashboard" in RESUME_TAKES


def test_beside_another_program_it_ends_when_told(recorded: Path) -> None:
    page = Beside(recorded, port=0)
    assert '"microbatches":20' in get(page.address, "/state")
    port = int(page.address.rpartition(":")[2])
    with pytest.raises(DashboardError, match="is taken"):
        Beside(recorded, port=port)
    page.close()
    with pytest.raises(ConnectionError):
        get(page.address, "/state")
    page.close()


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("192.0.2.1", False), ("a.example", False)],
)
def test_what_others_reach_is_known(host: str, local: bool) -> None:
    assert is_loopback(host) is local
