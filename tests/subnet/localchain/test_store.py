"""The chain on disk: what is stored continues as the same chain, and nothing else is taken for one."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from subnet.localchain.block import Block
from subnet.localchain.blocks import Chain
from subnet.localchain.genesis import RAO_PER_TAO, ChainConfig, address
from subnet.localchain.pallets import balances
from subnet.localchain.store import FILE, StoreError
from tests.subnet.localchain.test_localchain_blocks import BOB, TX, Bench

CONFIG = ChainConfig(history=64)


class Recording(Bench):
    """A bench that remembers what it made its blocks from."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[bytes, ...]] = []

    def block(self, *extrinsics: bytes) -> Block:
        self.made.append(extrinsics)
        return super().block(*extrinsics)


def bench(folder: Path | None, config: ChainConfig = CONFIG) -> Recording:
    made = Recording()
    made.chain = Chain(config, state=folder)
    made.now = made.chain.head.timestamp_ms
    return made


def live(made: Bench, blocks: int) -> None:
    """Blocks in which something happens: registrations, stake, weights, transfers, epochs."""
    made.register()
    made.stake("//Bob//hotkey", 10)
    while made.chain.head.number < blocks:
        made.block(made.sign(BOB, "Balances", "transfer_keep_alive", {"dest": address("//Dave"), "value": RAO_PER_TAO}))


def everything(chain: Chain) -> list[object]:
    """All hashes, the bodies, and the whole state at every block that can still be read."""
    found: list[object] = [[chain.hash_of(n) for n in range(chain.head.number + 1)], chain.finalized.number]
    for number in range(chain.history.oldest, chain.head.number + 1):
        snapshot = chain.snapshot(number)
        found += [chain.block(number), {key: snapshot.raw(key) for key in snapshot.keys(b"")}]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.mark.parametrize("blocks", [1, 50, 150])
def test_a_reopened_chain_is_the_same_and_goes_on_the_same(folder: Path, blocks: int) -> None:
    once, uninterrupted = bench(folder), bench(None)
    live(once, blocks)
    before = everything(once.chain)
    once.chain.close()
    again = bench(folder)
    assert everything(again.chain) == before
    state = again.chain.snapshot(again.chain.head.number)
    assert balances.nonce_of(state, address(BOB)) == again.chain.next_nonce(address(BOB))
    live(again, blocks + 45)
    for extrinsics in once.made + again.made:
        uninterrupted.block(*extrinsics)
    assert everything(again.chain) == everything(uninterrupted.chain)
    again.chain.close()


def test_time_does_not_go_back_when_the_clock_does(folder: Path) -> None:
    once = bench(folder)
    once.chain.produce(10_000)
    once.chain.close()
    again = bench(folder)
    assert again.chain.produce(5)[0].timestamp_ms == 10_001
    again.chain.close()


def test_a_block_is_durable_when_it_is_returned(folder: Path) -> None:
    """Another reader of the files, as a process that starts after a kill would be, finds it."""
    made = bench(folder)
    block = made.block()
    copy = folder.parent / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert bench(copy).chain.head == block
    made.chain.close()


def test_what_is_stored_is_bounded_by_the_history(folder: Path) -> None:
    made = bench(folder)

    def rows() -> list[int]:
        assert made.chain._store is not None
        database = made.chain._store._db
        queries = ("SELECT count(*) FROM bodies", "SELECT count(*) FROM versions")
        return [database.execute(query).fetchone()[0] for query in queries]

    live(made, 150)
    before = rows()
    live(made, 400)
    bodies, versions = rows()
    assert bodies == before[0] == 65
    assert versions < before[1] * 1.1
    made.chain.close()


def test_two_chains_on_one_folder_are_refused(folder: Path) -> None:
    made = bench(folder)
    with pytest.raises(StoreError, match=r"chain\.sqlite is in use by another process; stop it or choose another"):
        bench(folder)
    made.block()
    made.chain.close()
    bench(folder).chain.close()


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (ChainConfig(history=64, netuid=10), "netuid 9, not 10"),
        (ChainConfig(history=64, tempo=30), "tempo 20, not 30"),
        (ChainConfig(history=64, block_time=1), r"block_time 0\.25, not 1"),
        (ChainConfig(history=128), "history 64, not 128"),
        (ChainConfig(history=64, hyperparameters={"Kappa": 1}), "hyperparameters"),
    ],
)
def test_another_chain_is_refused(folder: Path, config: ChainConfig, what: str) -> None:
    bench(folder).chain.close()
    with pytest.raises(StoreError, match=what) as caught:
        bench(folder, config)
    assert str(folder / FILE) in str(caught.value)
    assert "choose another --state folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def text_file(path: Path) -> None:
    path.write_text("this is a letter and no chain\n" * 100)


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE letters (body TEXT)")
    database.close()


def other_file(path: Path) -> None:
    (path.parent / "letter.txt").write_text("dear chain")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [text_file, other_database, other_file, a_folder])
def test_what_is_no_chain_is_refused_and_left_alone(folder: Path, make: Callable[[Path], None]) -> None:
    folder.mkdir()
    make(folder / FILE)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(StoreError, match="choose an") as caught:
        bench(folder)
    assert "\n" not in str(caught.value)
    assert before.items() <= {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}.items()


def test_a_folder_that_cannot_be_made_explains_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used: .*choose another --state folder"):
        bench(tmp_path / "file" / "state")


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM hashes WHERE number = 30",
        "DELETE FROM bodies WHERE number = 30",
        "DELETE FROM bodies WHERE number = 70",
        "DELETE FROM versions WHERE number = 30",
        "DELETE FROM versions WHERE number = 70",
        "DELETE FROM hashes",
        "DELETE FROM chain",
        "UPDATE chain SET identity = 'x'",
        "UPDATE hashes SET hash = zeroblob(32) WHERE number = 40",
        "UPDATE bodies SET extrinsics = x'' WHERE number = 70",
        "UPDATE bodies SET extrinsics = x'ff' WHERE number = 40",
        "UPDATE bodies SET state_root = zeroblob(32) WHERE number = 40",
        "UPDATE versions SET value = zeroblob(3) WHERE number = 0",
        "UPDATE versions SET number = number + 1 WHERE number = 70",
        "DROP TABLE versions",
    ],
)
def test_damage_is_found(folder: Path, damage: str) -> None:
    made = bench(folder)
    live(made, 70)
    made.chain.close()
    with sqlite3.connect(folder / FILE) as database:
        database.execute(damage)
    database.close()
    with pytest.raises(StoreError) as caught:
        bench(folder)
    assert str(folder / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_or_a_cut_is_found_or_changes_nothing(folder: Path) -> None:
    made = bench(folder)
    live(made, 40)
    made.chain.close()
    whole = (folder / FILE).read_bytes()
    intact = everything(bench(folder).chain)
    chance = random.Random(0)  # noqa: S311 - for repeatable damage
    refused = 0
    for trial in range(60):
        torn = folder.parent / f"torn{trial}"
        torn.mkdir()
        data = bytearray(whole)
        if trial % 10:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            del data[chance.randrange(1, len(data)) :]
        (torn / FILE).write_bytes(data)
        try:
            found = bench(torn).chain
        except StoreError:
            refused += 1
        else:
            assert everything(found) == intact
            found.close()
    assert refused > 20


def test_a_block_that_cannot_be_stored_is_none(folder: Path) -> None:
    made = bench(folder)
    live(made, 10)
    assert made.chain._store is not None
    database = made.chain._store._db
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")
    before = made.chain.head.number
    with pytest.raises(StoreError, match="full; check space"):
        live(made, 400)
    head = made.chain.head
    assert head.number > before - 1
    made.chain.close()
    again = bench(folder)
    assert again.chain.head == head
    live(again, head.number + 5)
    again.chain.close()


def test_a_new_chain_has_its_first_block_on_disk(folder: Path) -> None:
    first = bench(folder).chain
    first.close()
    again = bench(folder).chain
    assert again.head == first.head
    assert again.snapshot(0).number(f"{TX}.Tempo", 9) == 20
    again.close()
