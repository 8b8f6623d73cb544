"""The path of a real participant, walked by the unmodified `btcli` binary against the local chain.

It is the path of `docs/register.md`: every command there runs as written, against the chain that the page starts, and
the first tests look at what btcli answered. The later ones go on from where the page ends, to what is refused. All of
them share one chain, because starting btcli costs seconds; all of them together take minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from subnet.localchain import ChainConfig, LocalChain
from subnet.localchain.genesis import OWNER_HOTKEY_URI, address
from subnet.wallets import create_wallet

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300), pytest.mark.long]

DOC = Path(__file__).parents[3] / "docs" / "register.md"
DOC_URL = "ws://127.0.0.1:9944"
PATIENCE = 240.0
SEPARATOR = "\x1e"

Object = dict[str, object]


def blocks(kind: str) -> list[str]:
    """The page's fenced blocks whose opening line is exactly ```kind."""
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", DOC.read_text(), flags=re.MULTILINE | re.DOTALL)


def environment(home: Path, **more: str) -> dict[str, str]:
    """A home of its own, and this interpreter's btcli first on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BT_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"HOME": str(home), "PATH": path, "BITTENSOR_RUNTIME_CACHE_DIR": str(home / "cache")} | more


async def run(*command: str, env: dict[str, str], cwd: Path | None = None) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    process = await asyncio.create_subprocess_exec(
        *command, env=env, cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run of btcli said."""

    status: int
    json: Object

    @property
    def error(self) -> tuple[object, object]:
        """(name, code) of a transaction that failed on chain, with a remedy."""
        assert self.status == 1, self.json
        error = self.json["error"]
        assert isinstance(error, dict)
        assert error["remediation"]
        return error["name"], error["code"]


class Btcli:
    """The binary, for one chain."""

    def __init__(self, url: str, home: Path) -> None:
        self._environment = environment(home, BT_NETWORK=url)

    async def __call__(self, line: str) -> Answer:
        status, output, errors = await run("btcli", *line.split(), "--json", env=self._environment)
        text = output or errors
        assert text.startswith(("{", "[")), f"btcli {line}: {text}"
        return Answer(status, json.loads(text))

    async def ok(self, line: str) -> Object:
        """A command that must succeed."""
        answer = await self(line)
        assert answer.status == 0, f"btcli {line}: {answer.json}"
        return answer.json


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the wallets of the subnet's owner, of somebody who is rich and of somebody who has nothing."""
    home = tmp_path_factory.mktemp("btcli")
    wallets = home / ".bittensor" / "wallets"
    create_wallet("owner", "default", wallets, coldkey_uri="//Alice", hotkey_uri=OWNER_HOTKEY_URI)
    create_wallet("rich", "default", wallets, coldkey_uri="//Charlie", hotkey_uri="//Charlie//hotkey")
    create_wallet("nobody", "default", wallets, coldkey_uri="//Nobody", hotkey_uri="//Nobody//hotkey")
    return home


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def url(home: Path) -> AsyncIterator[str]:
    """The chain that the page starts, on a free port."""
    (start,) = blocks("sh chain")
    program, *options = start.split()
    assert program == "orion"
    options[options.index("9944")] = "0"
    chain = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.cli", *options, cwd=DOC.parents[1], env=environment(home),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert chain.stdout is not None
        yield (await chain.stdout.readline()).decode().strip()
    finally:
        chain.send_signal(signal.SIGINT)
        await chain.communicate()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def page(url: str, home: Path) -> dict[str, list[Object]]:
    """The answers to the page's commands, by the command's first two words, in order."""
    lines = "".join(blocks("sh")).splitlines()
    assert f"NET={DOC_URL}" in lines
    script = "set -eu\n"
    for line in lines:
        script += line.replace(DOC_URL, url) + "\n"
        if line.startswith("btcli"):
            script += f"printf '{SEPARATOR}'\n"
    status, output, errors = await run("bash", "-c", script, env=environment(home), cwd=home)
    assert status == 0, (output[-1_000:], errors[-1_000:])
    commands = [line for line in lines if line.startswith("btcli")]
    answers = output.split(SEPARATOR)[:-1]
    found: dict[str, list[Object]] = {}
    for command, answer in zip(commands, answers, strict=True):
        found.setdefault(" ".join(command.split()[1:3]), []).append(json.loads(answer))
    return found


@pytest.fixture(scope="module")
def btcli(url: str, home: Path, page: dict[str, list[Object]]) -> Btcli:
    """For what comes after the page."""
    return Btcli(url, home)


# the page -------------------------------------------------------------------------------------------


async def test_a_wallet_is_made_and_is_empty(page: dict[str, list[Object]]) -> None:
    (made,), (listed,) = page["wallet create"], page["wallet list"]
    coldkeys = listed["coldkeys"]
    assert isinstance(coldkeys, list)
    assert made["coldkey_ss58"] in [entry["ss58"] for entry in coldkeys]
    balance = page["wallet balance"][0]
    assert balance["coldkey"] == made["coldkey_ss58"]
    assert balance["total_value_tao"] == 0


async def test_tao_arrives_and_a_dry_run_sends_nothing(page: dict[str, list[Object]]) -> None:
    plan, receipt = page["tx transfer"]
    assert (plan["ok"], plan["spend_tao"]) == (True, 10.0)
    assert receipt["success"] is True
    assert receipt["fee_tao"] == pytest.approx(plan["fee_tao"], rel=0.01)
    assert page["wallet balance"][1]["free_tao"] == 10.0


async def test_the_subnet_can_be_looked_at(page: dict[str, list[Object]]) -> None:
    (listed,), (show,), (cost,) = page["subnets list"], page["subnets show"], page["subnets burn-cost"]
    (row,) = listed
    assert (row["netuid"], row["name"], row["neurons"]) == (9, "orion", 1)  # type: ignore[index]
    assert show["owner_coldkey"] == address("//Alice")
    assert cost["tao"] == show["burn_tao"] == 0.0005
    (rules,) = page["subnets hyperparameters"]
    assert (rules["tempo"], rules["burn_half_life"], rules["activity_cutoff"]) == (20, 360, 1_000)
    assert rules["commit_reveal_weights_enabled"] is False


async def test_registration_is_shielded(page: dict[str, list[Object]]) -> None:
    plan, receipt = page["subnets register"]
    assert "burn τ0.000500000 (destroyed)" in plan["effects"]  # type: ignore[operator]
    assert receipt["success"] is True
    assert receipt["data"]["shielded"] is True  # type: ignore[index]
    assert str(receipt["extrinsic_id"]).endswith("-0002")  # right behind its carrier, which is extrinsic 1
    (wallets,) = page["wallet registrations"]
    miner = next(entry for entry in wallets if entry["wallet"] == "miner")  # type: ignore[index]
    assert miner["hotkeys"][0]["registrations"] == [{"netuid": 9, "uid": 1}]  # type: ignore[index]
    (graph,) = page["subnets metagraph"]
    assert graph["hotkeys"] == [address(OWNER_HOTKEY_URI), miner["hotkeys"][0]["hotkey"]]  # type: ignore[index]


async def test_axon_stake_and_weights(page: dict[str, list[Object]]) -> None:
    for command in ("tx serve-axon", "stake add", "weights set"):
        assert page[command][0]["success"] is True
    assert page["stake show"][0]["stake_amount"] >= 2.0  # type: ignore[operator]
    assert page["query weights"] == [{"1": {"1": 1.0}}]


# after the page -------------------------------------------------------------------------------------


async def test_who_is_not_registered_or_has_no_money_is_told_the_remedy(btcli: Btcli) -> None:
    poor, nowhere, axon, weights = await asyncio.gather(
        btcli("subnets register --netuid 9 -w nobody -y"),
        btcli("subnets show 77"),
        btcli("tx serve-axon --netuid 9 --ip 203.0.113.7 --port 8091 -w nobody -y"),
        btcli("weights set --netuid 9 --uids 0 --weights 1 -w nobody -y"),
    )
    assert poor.status == 2
    assert "free TAO" in str(poor.json["error"])
    assert (nowhere.status, nowhere.json) == (1, {"error": "subnet 77 does not exist"})
    assert axon.status == 1
    assert weights.status == 1
    assert weights.json["code"] == "not_registered"


async def test_refusals_inside_a_shield_are_the_chains_own(btcli: Btcli) -> None:
    twice, unknown = await asyncio.gather(
        btcli("subnets register --netuid 9 -w miner -y"), btcli("subnets register --netuid 77 -w rich -y")
    )
    assert twice.error == ("HotKeyAlreadyRegisteredInSubNet", "already_exists")
    assert unknown.error == ("SubnetNotExists", "subnet_not_exists")


async def test_limits_and_balances_are_kept(btcli: Btcli) -> None:
    too_much, _ = await asyncio.gather(
        btcli("tx transfer -w miner --dest bob --amount 1000 -y"),
        btcli.ok("hparams set --netuid 9 --name serving_rate_limit --value 100000 -w owner -y"),
    )
    assert too_much.error == ("FundsUnavailable", "insufficient_balance")
    graph, again = await asyncio.gather(
        btcli.ok("subnets metagraph 9"), btcli("tx serve-axon --netuid 9 --ip 203.0.113.9 --port 1 -w miner -y")
    )
    assert again.error == ("ServingRateLimitExceeded", "rate_limited")
    axon = graph["axons"][1]  # type: ignore[index]
    assert (axon["ip"], axon["port"]) == (0xCB007107, 8091)


async def test_the_rules_for_weights_bind_validators(btcli: Btcli) -> None:
    weights = "weights set --netuid 9 --uids 0,1 --weights 0.25,0.75 -y -w"
    change = "hparams set --netuid 9 -y --name"
    await asyncio.gather(
        btcli.ok("subnets register --netuid 9 -w rich -y"), btcli.ok(f"{change} weights_version --value 7 -w owner")
    )
    stale, unpermitted = await asyncio.gather(btcli(f"{weights} miner"), btcli(f"{weights} rich --version-key 7"))
    assert stale.error == ("IncorrectWeightVersionKey", "invalid_argument")
    assert unpermitted.error == ("NeuronNoValidatorPermit", "not_authorized")
    await btcli.ok(f"{change} min_allowed_weights --value 3 -w owner")
    few = await btcli(f"{weights} miner --version-key 7")
    assert few.json["code"] == "invalid_argument"
    assert "at least 3" in str(few.json["message"])


async def test_weights_are_committed_where_the_subnet_asks_for_it(btcli: Btcli) -> None:
    commit = "weights commit --netuid 9 --uids 1 --weights 1 -w miner -y"
    assert (await btcli(commit)).error == ("CommitRevealDisabled", "disabled")
    await btcli.ok("hparams set --netuid 9 --name commit_reveal_weights_enabled --value true -w owner -y")
    receipt = await btcli.ok(commit)
    assert receipt["data"]["reveal_round"] > 0  # type: ignore[index]
    assert await btcli.ok("query timelocked-weight-commits --netuid 9")


async def test_weights_are_rate_limited_on_a_strict_subnet(home: Path) -> None:
    weights = "weights set --netuid 9 --uids 0 --weights 1 -w owner -y"
    async with LocalChain(ChainConfig(hyperparameters={"WeightsSetRateLimit": 1_000})) as strict:
        btcli = Btcli(strict.url, home)
        await btcli.ok(weights)
        again = await btcli(weights)
    assert again.json["code"] == "rate_limited"
