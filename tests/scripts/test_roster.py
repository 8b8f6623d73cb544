"""`orion roster` recomputes what a live node computed, from the chain alone, and refuses with one line."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from neurons.node import Node
from scripts.cli import main
from subnet.localchain.genesis import ChainConfig
from subnet.localchain.node import LocalChain
from subnet.swarm import snapshot
from subnet.swarm.record import Phase, Record
from tests.neurons.test_node import NETUID, publish_run


@pytest.fixture
async def chain_url() -> AsyncIterator[str]:
    async with LocalChain(ChainConfig(netuid=NETUID, block_time=0.05)) as chain:
        yield chain.url


async def test_the_roster_printed_is_the_one_that_a_node_has(
    chain_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, loaded = await publish_run(chain_url, tmp_path)
    (tmp_path / "chain.url").write_text(chain_url)
    async with await Node.open(config, role="miner") as node:
        await node.listen()
        await node.chain.publish(Record(run=loaded.run_id, round=0, phase=Phase.READY).encode())
        first = await node.enter()
        await node.chain.publish(Record(run=loaded.run_id, round=0, phase=Phase.READY).encode())
        second = await node.next_roster()
        assert second.members == {node.identity.hotkey}
        assert snapshot.kept(config.out / "rosters" / loaded.run_id.hex() / config.name) == [first, second]

        await node.chain.wait_for_block(second.block + 1, timeout=5)
        for roster, flags in ((first, ["--at", str(first.block)]), (second, ["--at", str(second.block + 1)])):
            assert await asyncio.to_thread(main, ["roster", "--run", str(tmp_path), *flags]) == 0
            shown = capsys.readouterr().out
            assert node.identity.hotkey in shown
            assert f"round {roster.round} from block {roster.block}, roster {roster.digest.hex()}" in shown
            assert "stage 0: 1 active, 0 joining, state from the seed" in shown
            assert "there when 1 stages gathered" in " ".join(shown.split())
            assert "out: serves no axon" in " ".join(shown.split())

    await refused(["--run", str(tmp_path), "--at", "0"], "had not gathered", capsys)
    await refused(["--run", str(tmp_path), "--at", "1000000"], "not final", capsys)


async def refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str], *, status: int = 1) -> None:
    assert await asyncio.to_thread(main, ["roster", *flags]) == status
    said = capsys.readouterr().err
    assert said.startswith("orion roster: ")
    assert words in said
    assert said.count("\n") == 1


async def test_what_cannot_be_read_is_refused_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await refused(["--run", str(tmp_path)], "no chain.url", capsys)
    await refused([], "--network together with --manifest", capsys, status=2)
    await refused(["--network", "ws://127.0.0.1:9"], "--network together with --manifest", capsys, status=2)
    await refused(["--network", "ws://127.0.0.1:9", "--manifest", str(tmp_path / "none.toml")], "--manifest", capsys)
