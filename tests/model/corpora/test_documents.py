"""Every document of a file is found once, however it is cut, and what cannot be read is named."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.corpora.documents import BrokenError, JsonLines, LeftOut, PlainText, Reader, spans
from model.corpora.parquet import ParquetRows
from model.corpora.source import LocalSource, Source, SourceReader
from model.data import DataError
from tests.model.corpora.making import MemorySource, texts, write_parquet


def read(reader: Reader, source: Source, size: int = 1 << 20) -> list[str | LeftOut]:
    return [text for block in reader.blocks(0, source, size) for text in reader.documents(source, block)]


@given(
    parts=st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"#", b"").replace(b"|", b""))),
    separator=st.sampled_from([b"\n", b"#|", b"<|#"]),
    size=st.integers(1, 40),
    longest=st.integers(0, 14),
)
def test_blocks_of_any_size_hold_the_same_documents(
    parts: list[bytes], separator: bytes, size: int, longest: int
) -> None:
    data = separator.join(parts)
    expected = data.split(separator)
    if not expected[-1]:
        expected.pop()  # nothing stands behind the last separator
    source = MemorySource(data)
    found = [
        span for start in range(0, len(data), size) for span in spans(source, start, start + size, separator, longest)
    ]
    assert [raw for _, raw in found] == [raw if len(raw) <= longest else None for raw in expected]
    assert all(raw is None or data[place : place + len(raw)] == raw for place, raw in found)


def test_a_document_above_the_limit_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.corpora.documents.PIECE", 10)
    source = MemorySource(b"a\n" + b"x" * 1_000 + b"\nb\n")
    found = [list(spans(source, start, start + 100, b"\n", 50)) for start in range(0, source.size, 100)]
    assert [raw for block in found for _, raw in block] == [b"a", None, b"b"]
    assert sum(end - start for start, end in source.reads) <= source.size + 11 * 10 + 10 * len(b"\n")


def test_jsonl_reads_nested_columns_null_and_blank_lines() -> None:
    lines = [{"text": "one"}, {"text": None}, {"text": ""}]
    data = "\n".join(json.dumps(line) for line in lines) + "\n\n  \r\n" + '{"text": "\\u00e9"}'
    assert read(JsonLines("text", 100), MemorySource(data.encode())) == ["one", "", "", "é"]
    nested = b'{"a": {"b": {"c": "deep"}}}\n{"a.b.c": "flat"}\n'
    assert read(JsonLines("a.b.c", 100), MemorySource(nested)) == ["deep", "flat"]
    assert read(JsonLines("text", 100), MemorySource(b'\xef\xbb\xbf{"text": "marked"}\n')) == ["marked"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x"', r"no JSON \(Expecting ',' delimiter.*: mend it, --skip-broken or change --format"),
        (b"[" * 100_000, "no JSON"),
        (b'{"txet": "x", "id": 1}', "column 'text' is not there, did you mean 'txet'\\? It has txet, id: change"),
        (b"{}", "column 'text' is not there, there are none"),
        (b'["text"]', "column 'text' is not there"),
        (b'{"text": 5}', "column 'text' is int, no text: change --column"),
        (b'{"text": "\xff"}', r"no UTF-8 \(invalid start byte\): mend it or --skip-broken"),
        (b'{"text": "\\ud800"}', r"no UTF-8 \(surrogates not allowed\): mend it or --skip-broken"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.corpora.documents.PIECE", 7)
    source = MemorySource(b'{"text": "good"}\n' * 40 + b"\n" + line + b"\n", name="bad.jsonl")
    with pytest.raises(DataError, match=rf"^source bad\.jsonl, line 42: {words}") as caught:
        read(JsonLines("text", 1 << 20), source, 100)
    assert "\n" not in str(caught.value)


def test_text_is_a_document_a_file_or_what_stands_between_separators() -> None:
    source = MemorySource("ä\none\n##\ntwo\n\n##\n".encode())
    assert read(PlainText(None, 100), source) == ["ä\none\n##\ntwo\n\n##\n"]
    assert read(PlainText(None, 10), source) == [LeftOut.TOO_LONG]
    for size in (3, 5, 100):
        assert read(PlainText("<>", 100), MemorySource("ä\n<>\none\n<>two<>\n".encode()), size) == [
            "ä",
            "one",
            "two",
            "",
        ]
    assert read(PlainText("\n", 100), MemorySource(b"one\r\ntwo\r\n")) == ["one", "two"]
    with pytest.raises(DataError, match=r"^source memory, byte 7: no UTF-8 \(invalid start byte\): convert"):
        read(PlainText("\n", 100), MemorySource(b"one\ntwo\xff\n"), 4)


@pytest.mark.parametrize("separator", ["", "\n\n", "aba", "#-#"])
def test_separators_that_can_overlap_themselves_are_refused(separator: str) -> None:
    with pytest.raises(DataError, match="is empty or can overlap itself: choose another --separator"):
        PlainText(separator, 100)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_read_by_row_groups(tmp_path: Path, kind: pa.DataType) -> None:
    documents = [*texts(50), None, "", "x" * 500]
    path = write_parquet(tmp_path / "a.parquet", documents, kind=kind)
    source = LocalSource.open(path, "a.parquet")
    reader = ParquetRows("text", 480)
    expected = [LeftOut.TOO_LONG if text and len(text.encode()) > 480 else text or "" for text in documents]
    assert expected[-1] is LeftOut.TOO_LONG
    for size in (1, 600, 1 << 20):
        blocks = reader.blocks(0, source, size)
        assert [block.start for block in blocks[1:]] == [block.end for block in blocks[:-1]]
        assert (blocks[0].start, blocks[-1].end) == (0, 8)
        assert read(reader, source, size) == expected
    assert len(reader.blocks(0, source, 1)) == 8


def test_a_row_group_is_not_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.corpora.parquet.BUFFER", 10_000)
    documents = [f"{number} " * 400 for number in range(2_000)]
    table = pa.table({"text": documents})
    pages = {"data_page_size": 10_000, "write_batch_size": 8, "use_dictionary": False, "compression": "none"}
    pq.write_table(table, tmp_path / "a", **pages)
    source = MemorySource((tmp_path / "a").read_bytes())
    assert source.size > 3_000_000
    reader = ParquetRows("text", 10_000)
    [block] = reader.blocks(0, source, 1 << 20)
    found = reader.documents(source, block)
    assert next(found) == documents[0]
    assert sum(end - start for start, end in source.reads) < source.size / 3
    assert [next(found) for _ in documents[1:]] == documents[1:]


def test_parquet_reads_nested_columns_and_empty_files(tmp_path: Path) -> None:
    rows = pa.array([{"body": "one", "n": 1}, None, {"body": None, "n": 2}])
    pq.write_table(pa.table({"meta": rows, "x.y": ["1", "2", "3"]}), tmp_path / "n.parquet")
    source = LocalSource.open(tmp_path / "n.parquet", "n")
    assert read(ParquetRows("meta.body", 100), source) == ["one", "", ""]
    assert read(ParquetRows("x.y", 100), source) == ["1", "2", "3"]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert read(ParquetRows("text", 100), LocalSource.open(tmp_path / "e.parquet", "e")) == []


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("texts", "column 'texts' is not there, did you mean 'text'\\? It has id, text, meta: change --column"),
        ("meta.bdy", "column 'meta.bdy' is not there, did you mean 'body'"),
        ("text.body", "column 'text.body' is not there, there are none"),
        ("id", "column 'id' is int64, no text: change --column"),
        ("meta", "column 'meta' is struct<body: string>, no text"),
    ],
)
def test_a_parquet_column_that_cannot_serve_is_named(tmp_path: Path, column: str, words: str) -> None:
    table = pa.table({"id": [1], "text": ["x"], "meta": [{"body": "y"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = LocalSource.open(tmp_path / "a.parquet", "a.parquet")
    with pytest.raises(DataError, match=rf"^source a\.parquet: {words}"):
        ParquetRows(column, 100).blocks(0, source, 100)


def test_a_parquet_file_that_is_none_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^source memory is no parquet file \(.*\): leave it out or change --format"):
        ParquetRows("text", 100).blocks(0, MemorySource(b"no parquet" * 10), 100)
    raw = bytearray(write_parquet(tmp_path / "a.parquet", texts(30), rows=100).read_bytes())
    raw[4 : len(raw) // 2] = bytes(len(raw) // 2 - 4)
    source = MemorySource(bytes(raw), name="a.parquet")
    with pytest.raises(DataError, match=r"^source a\.parquet, row group 0: .*: mend the file or leave it out"):
        read(ParquetRows("text", 1_000), source)
    binary = pa.array([b"good", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": binary}), tmp_path / "b.parquet")
    source = LocalSource.open(tmp_path / "b.parquet", "b")
    with pytest.raises(
        BrokenError, match=r"^source b, row group 0: no UTF-8 \(invalid start byte\) in b'.xff': mend it or"
    ):
        read(ParquetRows("text", 1_000), source)
    assert read(ParquetRows("text", 1_000, skip_broken=True), source) == ["good", LeftOut.BROKEN]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_lines_are_read_like_others(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compressed(data: bytes) -> bytes:
        return gzip.compress(data) if suffix == "gz" else bytes(pa.compress(data, codec="zstd"))

    monkeypatch.setattr("model.corpora.compressed.PIECE", 100)
    lines = [json.dumps({"text": text}).encode() for text in texts(60)]
    lines[7], lines[31] = b'{"text": "' + b"x" * 900 + b'"}', b""
    plain, name = b"\n".join(lines), f"a.jsonl.{suffix}"
    halves = compressed(plain[:3_000]) + compressed(plain[3_000:])
    reader = JsonLines("text", 800)
    source = MemorySource(halves, name=name)
    assert len(reader.blocks(0, source, 10)) == 1
    found = read(reader, source, 10)
    assert found == read(reader, MemorySource(plain), 10)
    assert found[7] is LeftOut.TOO_LONG
    assert read(reader, MemorySource(b"", name=name)) == []

    wrong = MemorySource(compressed(plain + b"\n{}\n"), name=name)
    with pytest.raises(DataError, match=rf"^source a\.jsonl\.{suffix}, line 61: column 'text' is not there"):
        read(reader, wrong)
    for damaged in (halves[:-20], plain):
        with pytest.raises(
            DataError, match=rf"^source a\.jsonl\.{suffix} cannot be decompressed \(.*\): mend the file"
        ):
            read(reader, MemorySource(damaged, name=name))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"^compressed files need pyarrow, .*: pip install 'orion-subnet\[data\]'"):
        read(reader, source)


def test_broken_documents_are_left_out_on_demand() -> None:
    lines = MemorySource(b'{"text": "one"}\n{"text": \n{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "two"}\n')
    assert read(JsonLines("text", 100, skip_broken=True), lines) == ["one", *[LeftOut.BROKEN] * 3, "two"]
    for wrong in (b'{"txet": "x"}', b'{"text": 5}'):  # that is a wrong --column
        with pytest.raises(DataError, match="--column"):
            read(JsonLines("text", 100, skip_broken=True), MemorySource(wrong))
    text = MemorySource(b"one|\xff|two")
    assert read(PlainText("|", 100, skip_broken=True), text) == ["one", LeftOut.BROKEN, "two"]
    assert read(PlainText(None, 100, skip_broken=True), text) == [LeftOut.BROKEN]


def test_a_missing_pyarrow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"parquet needs pyarrow, .*: pip install 'orion-subnet\[data\]'"):
        ParquetRows("text", 100).blocks(0, MemorySource(b""), 100)


def test_errors_of_a_source_come_through_the_parquet_reader() -> None:
    class Broken(MemorySource):
        def read(self, start: int, end: int) -> bytes:  # noqa: ARG002
            raise DataError("the line is down")

    with pytest.raises(DataError, match=r"^the line is down$"):
        ParquetRows("text", 100).blocks(0, Broken(b"x" * 100), 100)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("as it was")
    source = LocalSource.open(path, "a.txt")
    assert source.read(0, 9) == b"as it was"
    path.write_text("as it was not")
    with pytest.raises(DataError, match=r"a\.txt changed while it was read: leave it alone and give another --out"):
        source.read(0, 9)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.read(0, 9)
    with pytest.raises(DataError, match=r"cannot be read \(No such file.*\): check --from"):
        LocalSource.open(path, "a.txt")


def test_a_source_is_a_file_object() -> None:
    reader = SourceReader(MemorySource(b"0123456789"))
    assert (reader.read(3), reader.tell(), reader.read()) == (b"012", 3, b"3456789")
    assert (reader.seek(-2, 2), reader.read(10), reader.read(10)) == (8, b"89", b"")
