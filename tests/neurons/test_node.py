"""A node refuses to start on what cannot work: one line, the value, the remedy; and starts on what can."""

import dataclasses
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from model.data import DataError
from neurons import miner, node
from neurons.config import NeuronConfig
from neurons.keeper import Keeper
from neurons.machine import Room
from neurons.miner import Miner
from neurons.needs import least_files
from neurons.node import Neighbourhood, Node, NodeError, main
from neurons.vault import Vault
from subnet.chain import BittensorChain, ChainError, ChainRefused, ChainUnreachable
from subnet.localchain.genesis import OWNER_COLDKEY_URI, OWNER_HOTKEY_URI, ChainConfig
from subnet.localchain.node import LocalChain
from subnet.manifest import Announcement, LoadedManifest, ManifestError
from subnet.metagraph import Endpoint
from subnet.swarm.roster import Member, Roster, Standing
from subnet.transport.errors import Busy, PortTaken, UnknownHotkey
from subnet.transport.shaping import Link
from subnet.wallets import create_wallet
from tests.neurons.swarm import manifest, tiny, tokens_file
from tests.subnet.swarm.histories import name, neuron, state

NETUID = 9


@pytest.fixture
async def chain_url() -> AsyncIterator[str]:
    async with LocalChain(ChainConfig(netuid=NETUID, block_time=0.05)) as chain:
        yield chain.url


async def publish_run(url: str, folder: Path) -> tuple[NeuronConfig, LoadedManifest]:
    """The owner's part: a registered miner, a manifest on chain, data on disk."""
    entry = tokens_file(folder / "data")
    owner = create_wallet("local", "owner", folder, coldkey_uri=OWNER_COLDKEY_URI, hotkey_uri=OWNER_HOTKEY_URI)
    miner = create_wallet("local", "miner", folder)
    create_wallet("local", "stranger", folder)
    content = manifest(tiny(), entry, stages=1)
    content = content.model_copy(
        update={"run": content.run.model_copy(update={"authority": owner.hotkey.ss58_address})}
    )
    loaded = content.write(folder / "manifest.toml")
    chain = await BittensorChain.connect(url, NETUID, owner, timeout=10)
    try:
        await chain.register_neurons({miner.hotkey.ss58_address: 0.0})
        await chain.publish(Announcement(0, loaded.digest).encode())
    finally:
        await chain.close()
    config = NeuronConfig(
        network=url,
        archive=None,
        netuid=NETUID,
        wallet="local",
        hotkey="miner",
        wallet_path=folder,
        manifest=folder / "manifest.toml",
        data=folder / "data",
        out=folder / "out",
        checkpoints=str(folder / "out"),
        name="miner",
        host="127.0.0.1",
        announce="127.0.0.1",
        port=0,
        threads=1,
        uplink=200e6,
        ring=10**9,
        evidence_disk=10**9,
    )
    return config, loaded


async def test_a_node_starts_and_every_wrong_setting_is_named(chain_url: str, tmp_path: Path) -> None:
    config, loaded = await publish_run(chain_url, tmp_path)

    async with await Node.open(config, role="miner") as node:
        await node.listen()
        state = await node.state((await node.chain.finalized()).number)
        neuron = state.by_hotkey(node.identity.hotkey)
        assert neuron is not None
        assert neuron.endpoint == Endpoint("127.0.0.1", node.axon.port)
        assert '"node_started"' in (config.out / "events" / "miner.jsonl").read_text()

    emulated = config.model_copy(update={"latency": "10ms", "bandwidth": "1gbit", "loss": "0.1%"})
    link = Link(latency_s=0.01, up_bps=1e9, down_bps=1e9, loss=0.001)
    async with await Node.open(emulated, role="miner") as node:
        shapers = {node.axon.shaper, node.dendrite.shaper}  # one link for all that a node sends and receives
        assert [shaper.link for shaper in shapers if shaper is not None] == [link]

    altered = tmp_path / "altered.toml"
    altered.write_bytes((tmp_path / "manifest.toml").read_bytes() + b"\n")
    unlike = loaded.manifest.model_copy(update={"version": 1}).to_bytes().replace(b"gather_blocks", b"gather_blokks")
    (tmp_path / "misspelt.toml").write_bytes(unlike)
    data = loaded.manifest.data.model_copy(update={"validation_batches": 9_999})
    loaded.manifest.model_copy(update={"data": data}).write(tmp_path / "greedy.toml")
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong: list[tuple[dict[str, object], type[Exception], str]] = [
            ({"manifest": altered}, ManifestError, "is not the one on chain"),
            ({"manifest": tmp_path / "misspelt.toml"}, ManifestError, "swarm.gather_bl"),
            ({"manifest": tmp_path / "none.toml"}, ManifestError, "--manifest"),
            ({"hotkey": "nobody"}, ChainError, "--hotkey"),
            ({"hotkey": "stranger"}, NodeError, "not registered"),
            ({"hotkey": "owner"}, NodeError, "authority"),
            ({"data": tmp_path / "empty"}, DataError, "does not exist"),
            ({"manifest": tmp_path / "greedy.toml"}, DataError, "data.validation_batches 9999 are more than the"),
            ({"netuid": 77}, ChainRefused, "--netuid"),
            ({"network": "ws://127.0.0.1:9"}, ChainUnreachable, "--network"),
            ({"port": taken.getsockname()[1]}, PortTaken, str(taken.getsockname()[1])),
            ({"announce": "0.0.0.0"}, NodeError, "--announce 0.0.0.0 is no address that others could reach"),  # noqa: S104
            ({"announce": "miner.example"}, NodeError, "--announce 'miner.example' is no IPv4 or IPv6 address"),
        ]
        for changes, error, words in wrong:
            with pytest.raises(error, match=words) as caught:
                async with await Node.open(config.model_copy(update=changes), role="miner") as node:
                    await node.listen()
            assert "\n" not in str(caught.value), changes

    (tmp_path / "data" / "tokens.bin").write_bytes(b"\0" * 80_000)
    with pytest.raises(DataError, match=r"tokens\.bin"):
        await Node.open(config, role="miner")


async def test_a_node_refuses_too_few_files(chain_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, loaded = await publish_run(chain_url, tmp_path)
    monkeypatch.setattr(node, "open_files", lambda: (100, 4096))
    with pytest.raises(NodeError, match=f"100 files may be open .* run `ulimit -n {least_files(loaded.manifest)}`"):
        await Node.open(config, role="miner")


async def test_a_miner_refuses_a_stage_for_which_it_has_no_room(
    chain_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = await publish_run(chain_url, tmp_path)
    cases = {
        "of host memory": Room(memory=10**6, disk=10**12, files=10**5),
        "--out another disk": Room(memory=10**12, disk=10**3, files=10**5),
    }
    async with await Node.open(config, role="miner") as opened:
        vault = await Vault.open(config.checkpoints, manifest_hash=opened.loaded.digest.hex())
        taker = Miner(opened, Keeper(opened, vault))
        for words, found in cases.items():
            monkeypatch.setattr(miner, "room", lambda _out, _device, found=found: found)
            with pytest.raises(NodeError, match=words):
                await taker._take_stage(0)


def test_pushes_are_for_who_counts_fetches_for_who_is_known() -> None:
    around = Neighbourhood()
    with pytest.raises(Busy):
        around.allow(name(0), "forward")
    miners = [neuron(uid) for uid in range(3)]
    judge = neuron(3, permit=True)
    roster = dataclasses.replace(
        Roster.of([[name(0)]]),
        table=(
            Member(hotkey=name(0), standing=Standing.ACTIVE, stage=0),
            Member(hotkey=name(1), standing=Standing.JOIN, stage=0),
        ),
    )
    around.update(roster, state([*miners, judge]))
    allowed = {
        "forward": [name(0)],
        "weights": [name(0), name(1), name(3)],
        "roster": [name(0), name(1), name(2), name(3)],
    }
    for route, hotkeys in allowed.items():
        for uid in range(5):
            if name(uid) in hotkeys:
                around.allow(name(uid), route)
            else:
                with pytest.raises(UnknownHotkey):
                    around.allow(name(uid), route)


def test_who_left_fetches_until_the_next_round_is_over() -> None:
    """A leaver has a merge to see through, and its siblings' pieces are what it merges."""
    around, known = Neighbourhood(), state([neuron(0), neuron(1)])
    rounds = [Roster.of([[name(0), name(1)]]), *(Roster.of([[name(0)]]) for _ in range(2))]
    for number, roster in enumerate(rounds):
        around.update(dataclasses.replace(roster, round=number), known)
        if number < 2:
            around.allow(name(1), "pieces")
        if number == 1:
            with pytest.raises(UnknownHotkey):
                around.allow(name(1), "forward")
    with pytest.raises(UnknownHotkey):
        around.allow(name(1), "pieces")


def test_usage_errors_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    async def body(_node: Node) -> None:
        raise AssertionError("never reached")

    with pytest.raises(SystemExit) as caught:
        main(["--wallet", "w"], role="miner", description="x", body=body)
    assert caught.value.code == 2
    assert "--hotkey" in capsys.readouterr().err


def test_a_failing_start_exits_with_one(tmp_path: Path) -> None:
    async def body(_node: Node) -> None:
        raise AssertionError("never reached")

    flags = ["--wallet", "w", "--hotkey", "h", "--manifest", str(tmp_path / "m.toml"), "--data", str(tmp_path)]
    assert main([*flags, "--out", str(tmp_path / "out")], role="miner", description="x", body=body) == 1
