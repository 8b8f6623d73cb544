"""What is handed to containers and supervisors: the image's recipe, the compose file, the units."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from neurons.config import NeuronConfig
from neurons.settings import PREFIX, resolve
from scripts.alive import is_alive
from scripts.flags import parser
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from tests.scripts.dashboard.test_metrics import NAMES

ROOT = Path(__file__).parents[2]
ROLES = ("miner", "validator")
HOTKEY = "5" + "C" * 47


def test_the_image_s_recipe_has_no_fault_that_a_linter_knows() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint has no build for this machine")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_the_image_is_built_of_what_is_let_into_it() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in recipe.splitlines() if line.startswith("COPY ") and "--from" not in line]
    assert {name for names in copied for name in names} == let_in
    assert all((ROOT / name).exists() for name in let_in)


def test_settings_of_image_and_compose_file_are_settings() -> None:
    words = (ROOT / "Dockerfile").read_text().split()
    image = dict(word.split("=", 1) for word in words if word.startswith(PREFIX))
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for role in ROLES:
        service = compose["services"][role]
        needed = {"ORION_WALLET": "w", "ORION_HOTKEY": "h"}
        config = resolve(NeuronConfig, {}, {**image, **service["environment"], **needed}).build()
        assert service["command"] == [role]
        assert f"{config.port}:{config.port}" in service["ports"]
        mounted = {volume.rsplit(":", 1)[0].split(":")[-1] for volume in service["volumes"] if volume.endswith(":ro")}
        assert {str(config.wallet_path), str(config.manifest), str(config.data)} == mounted
        assert str(config.out).startswith("/data/")
        assert service["read_only"]
    command = compose["services"]["localnet"]["command"]
    assert parser().parse_args(command).command == "localnet"


@pytest.mark.parametrize("role", ROLES)
def test_units_start_a_command_that_there_is(role: str) -> None:
    unit = ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "docs" / "deploy" / f"orion-{role}.service")
    program, command, *flags = unit["Service"]["ExecStart"].split()
    assert (Path(program).name, command, flags[0]) == ("orion", role, "--config")
    assert flags[2:] == ["--out", f"/var/lib/orion/{role}"]
    assert unit["Service"]["RestartPreventExitStatus"] == "2"


def test_the_board_asks_for_metrics_that_there_are() -> None:
    board = json.loads((ROOT / "docs" / "deploy" / "grafana.json").read_text())
    asked = set(re.findall(r"orion_\w+", " ".join(t["expr"] for panel in board["panels"] for t in panel["targets"])))
    assert {name.removesuffix("_total") for name in asked} <= NAMES
    source = yaml.safe_load((ROOT / "docs" / "deploy" / "grafana-source.yml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}


def test_what_is_watched_is_served_where_it_is_looked_for() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    flags = parser().parse_args(
        [word.replace("${WATCH:-/data/run}", "/data/run") for word in services["dashboard"]["command"]]
    )
    assert (flags.command, str(flags.run)) == ("dashboard", "/data/run")
    prometheus = yaml.safe_load((ROOT / "docs" / "deploy" / "prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": [f"{flags.host}:{flags.port}"]}]
    mounted = [volume.split(":")[0] for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    assert all((ROOT / path).is_file() for path in mounted)


async def test_alive_asks_the_axon(capsys: pytest.CaptureFixture[str]) -> None:
    axon = Axon(Admission(HOTKEY, allow=lambda _hotkey, _route: None, now_ns=time.time_ns))
    await axon.start()
    try:
        assert await asyncio.to_thread(is_alive, {"port": str(axon.port)}, {}) == 0
        assert f"{HOTKEY} serves 0 routes" in capsys.readouterr().out
        assert await asyncio.to_thread(is_alive, {}, {"ORION_PORT": str(axon.port)}) == 0
    finally:
        await axon.stop()
    assert await asyncio.to_thread(is_alive, {"port": str(axon.port)}, {}) == 1
    assert "no node answers on port" in capsys.readouterr().out
    assert is_alive({"port": "0"}, {}) == is_alive({}, {"ORION_PROT": "1"}) == 2
