"""Files, folders, patterns and stores become the same sources in the same order, or one line says what is wrong."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from model.corpora.documents import LeftOut
from model.corpora.folder import Format
from model.corpora.parquet import ParquetRows
from model.corpora.source import Source
from model.data import DataError
from scripts.data import addresses
from scripts.data.addresses import find_sources
from scripts.data.options import DataOptionError
from tests.model.corpora.making import texts, write_parquet
from tests.neurons.s3 import FakeS3, serve_s3

NAMES = ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "deep/d.ndjson", "notes.txt", "README", "deep/.hidden.json")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in NAMES:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tree"


def find(addresses: list[str], wanted: Format | None = None) -> tuple[Format, list[Source]]:
    return find_sources(addresses, wanted, tell=print)


def named(addresses: list[str], wanted: Format | None = None) -> tuple[Format, list[str]]:
    form, sources = find(addresses, wanted)
    return form, [source.name for source in sources]


async def store_named(addresses: list[str], wanted: Format | None = None) -> tuple[Format, list[str]]:
    return await asyncio.to_thread(named, addresses, wanted)


def test_a_folder_gives_its_data_files_by_name(tree: Path) -> None:
    assert named([str(tree)], "jsonl") == ("jsonl", ["a.jsonl", "b.jsonl", "deep/d.ndjson", "deep/er/c.jsonl"])
    assert named(["tree/deep"]) == ("jsonl", ["d.ndjson", "er/c.jsonl"])
    _, [source] = find([str(tree)], "text")
    assert (source.name, source.read(0, source.size)) == ("notes.txt", b"notes.txt")


def test_compressed_lines_are_known_by_both_suffixes(tree: Path) -> None:
    for name in ("d.jsonl.gz", "e.jsonl.zst", "f.txt.gz", "g.parquet.gz", "h.gz"):
        (tree / "deep" / name).write_text("x")
    assert named(["tree/deep"]) == ("jsonl", ["d.jsonl.gz", "d.ndjson", "e.jsonl.zst", "er/c.jsonl"])


def test_patterns_and_files_give_what_they_name(tree: Path) -> None:
    for start in ("tree", str(tree)):
        assert named([f"{start}/*.jsonl"]) == ("jsonl", ["a.jsonl", "b.jsonl"])
        assert named([f"{start}/**/*.jsonl"]) == ("jsonl", ["a.jsonl", "b.jsonl", "deep/er/c.jsonl"])
    assert named(["tree/b.jsonl", "tree/a.jsonl"]) == ("jsonl", ["b.jsonl", "a.jsonl"])
    assert named(["tree/README"], "text") == ("text", ["README"])
    assert named(["*/REA*"], "text") == ("text", ["tree/README"])


def test_a_name_with_pattern_characters_is_a_name_if_it_exists(tree: Path) -> None:
    (tree / "x[1].txt").write_text("x")
    assert named(["tree/x[1].txt"]) == ("text", ["x[1].txt"])


@pytest.mark.parametrize(
    ("addresses", "wanted", "kind", "words"),
    [
        (["tree/nothing"], None, DataError, "--from tree/nothing does not exist: name a file, a folder, a pattern"),
        (["tree/*.parquet"], None, DataError, r"--from tree/\*.parquet names no data files \(.parquet, .jsonl, .ndj"),
        (["tree"], "parquet", DataError, r"--from tree names no parquet files \(.parquet\): change it"),
        (["tree/a.jsonl", "tree/*.jsonl"], None, DataError, r"names .*a.jsonl a second time: name every file once"),
        (["tree"], None, DataOptionError, r"c.jsonl and notes.txt differ in format: say with --format which one"),
        (["tree/README"], None, DataOptionError, r"README has no known suffix \(.parquet, .*: say with --format what"),
        (
            ["https://me:secret@h/x.jsonl"],
            None,
            DataOptionError,
            "^--from https://h/x.jsonl comes with a query or a pass",
        ),
        (["https://h/x.jsonl?key=secret"], None, DataOptionError, "^--from https://h/x.jsonl comes with a query or a "),
        (["foo://bucket/x"], None, DataOptionError, r"--from foo://bucket.* cannot be opened \(.*"),
    ],
)
def test_what_names_nothing_usable_is_said(
    tree: Path, addresses: list[str], wanted: Format | None, kind: type[DataError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        find(addresses, wanted)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_long_hashing_is_announced(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    find_sources(["tree/*.jsonl"], None, tell=said.append)
    assert said == []
    monkeypatch.setattr(addresses, "LONG", 10)
    find_sources(["tree/*.jsonl"], None, tell=said.append)
    assert said == ["2 files: hashing 14 B"]


def test_a_file_nobody_may_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_arguments: object, **_named: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(Permission denied\): check --from"):
        find(["tree/a.jsonl"])


@pytest_asyncio.fixture
async def s3(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FakeS3, str]]:
    fake = FakeS3(objects={f"data/{name}": f"{name} of a store".encode() for name in NAMES})
    async with serve_s3(fake) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT", endpoint)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "auto")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield fake, endpoint


async def test_a_store_is_named_like_a_disk(s3: tuple[FakeS3, str]) -> None:
    where = "s3://bucket/data"
    every = ["a.jsonl", "b.jsonl", "deep/d.ndjson", "deep/er/c.jsonl"]
    assert await store_named([where], "jsonl") == ("jsonl", [f"{where}/{name}" for name in every])
    assert await store_named([f"{where}/deep/"]) == ("jsonl", [f"{where}/{name}" for name in every[2:]])
    assert await store_named([f"{where}/*.jsonl"]) == ("jsonl", [f"{where}/{name}" for name in every[:2]])
    assert await store_named([f"{where}/**/c.jsonl"]) == ("jsonl", [f"{where}/deep/er/c.jsonl"])
    assert await store_named([f"{where}/b.jsonl"]) == ("jsonl", [f"{where}/b.jsonl"])
    with pytest.raises(DataError, match=r"--from s3://bucket/none names no data files"):
        await store_named(["s3://bucket/none"])


async def test_an_object_is_read_by_ranges_and_must_stay_as_it_is(s3: tuple[FakeS3, str]) -> None:
    fake, endpoint = s3
    for address in ("s3://bucket/data/a.jsonl", f"{endpoint}/bucket/data/a.jsonl"):
        fake.objects["data/a.jsonl"] = b"a.jsonl of a store"
        [source] = (await asyncio.to_thread(find, [address]))[1]
        assert (source.name, source.size) == (address, 18)
        assert source.identity.startswith("etag:")
        assert await asyncio.to_thread(source.read, 2, 9) == b"jsonl o"
        assert await asyncio.to_thread(source.read, 5, 5) == b""
        fake.objects["data/a.jsonl"] = b"a.jsonl of another"
        with pytest.raises(
            DataError, match=r"a\.jsonl changed while it was read: leave it alone and give another --out"
        ):
            await asyncio.to_thread(source.read, 2, 9)
        del fake.objects["data/a.jsonl"]
        with pytest.raises(
            DataError, match=r"cannot be read \(.*\): check the address, .*then start again to go on"
        ) as e:
            await asyncio.to_thread(source.read, 2, 9)
        assert "\n" not in str(e.value)


async def test_parquet_in_a_store_is_not_read_whole(s3: tuple[FakeS3, str], tmp_path: Path) -> None:
    fake, _ = s3
    documents = texts(8_000)
    fake.objects["data/a.parquet"] = write_parquet(tmp_path / "a", documents, rows=800).read_bytes()

    def read_block() -> tuple[list[str | LeftOut], int]:
        [source] = find(["s3://bucket/data/a.parquet"])[1]
        counted = Counted(source)
        reader = ParquetRows("text", 1 << 20)
        blocks = reader.blocks(0, counted, 1)
        return list(reader.documents(counted, blocks[4])), counted.bytes

    found, count = await asyncio.to_thread(read_block)
    assert found == documents[3_200:4_000]
    assert count < len(fake.objects["data/a.parquet"]) / 2


class Counted:
    """A source that counts the bytes read of it."""

    def __init__(self, source: Source) -> None:
        self.name, self.size, self.identity = source.name, source.size, source.identity
        self._source, self.bytes = source, 0

    def read(self, start: int, end: int) -> bytes:
        self.bytes += end - start
        return self._source.read(start, end)
