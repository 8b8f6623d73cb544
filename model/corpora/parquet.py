"""Documents of parquet files, by row groups. pyarrow reads them, an extra."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.corpora.compressed import without_pyarrow
from model.corpora.documents import Block, BrokenError, LeftOut, missing_column
from model.corpora.source import Source, SourceReader
from model.data import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS = 256
"""Rows decoded at once."""
BUFFER = 8 << 20
"""Bytes fetched at once, and no row group ahead: one may be larger than memory."""


@dataclass(frozen=True, slots=True)
class ParquetRows:
    """Text in `column`, in structs by a dotted name, at most `longest` bytes of UTF-8; null is an empty document."""

    column: str
    longest: int
    skip_broken: bool = False

    def blocks(self, number: int, source: Source, size: int) -> list[Block]:
        file = self._open(source)
        sizes = _chunk_sizes(file, self.column)
        blocks: list[Block] = []
        start, held = 0, 0
        for group, chunk in enumerate(sizes):
            held += chunk
            if held >= size or group == len(sizes) - 1:
                blocks.append(Block(number, start, group + 1, held))
                start, held = group + 1, 0
        return blocks

    def documents(self, source: Source, block: Block) -> Iterator[str | LeftOut]:
        file = self._open(source)
        for group in range(block.start, block.end):
            try:
                batches = file.iter_batches(ROWS, row_groups=[group], columns=[self.column], use_threads=False)
                for batch in batches:
                    for raw in self._values(batch):
                        yield self._text(raw)
            except BrokenError as error:
                raise BrokenError(f"source {source.name}, row group {group}: {error}") from error
            except (ValueError, OSError) as error:  # arrow's own errors are one or the other
                raise DataError(
                    f"source {source.name}, row group {group}: {_line(error)}: mend the file or leave it out"
                ) from error

    def _values(self, batch: pa.RecordBatch) -> list[bytes | None]:
        """As bytes, since arrow lets columns of text hold any."""
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.compute as pc  # noqa: PLC0415

        if self.column in batch.schema.names:
            values = batch.column(self.column)
        else:
            first, *rest = self.column.split(".")
            values = pc.struct_field(batch.column(first), rest)
        raw: list[bytes | None] = values.cast(pa.large_binary()).to_pylist()
        return raw

    def _text(self, raw: bytes | None) -> str | LeftOut:
        if raw is None:
            return ""
        if len(raw) > self.longest:
            return LeftOut.TOO_LONG
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            if not self.skip_broken:
                raise BrokenError(f"no UTF-8 ({error.reason}) in {raw[:40]!r}: mend it or --skip-broken") from error
            return LeftOut.BROKEN

    def _open(self, source: Source) -> pq.ParquetFile:
        """The file, proved to have the column, as text. Raises `DataError`."""
        try:
            import pyarrow as pa  # noqa: PLC0415 - an extra
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise without_pyarrow("parquet needs") from error
        try:
            file = pq.ParquetFile(
                SourceReader(source), buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
            )
        except (ValueError, OSError) as error:
            raise DataError(
                f"source {source.name} is no parquet file ({_line(error)}): leave it out or change --format"
            ) from error
        kind = self._kind(source, file.schema_arrow)
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
            raise DataError(f"source {source.name}: column '{self.column}' is {kind}, no text: change --column")
        return file

    def _kind(self, source: Source, schema: pa.Schema) -> pa.DataType:
        import pyarrow as pa  # noqa: PLC0415 - an extra

        if self.column in schema.names:
            return schema.field(self.column).type
        fields = list(schema)
        found: pa.DataType | None = None
        for part in self.column.split("."):
            names = [field.name for field in fields]
            if part not in names:
                wrong = missing_column(self.column, part, names)
                raise DataError(f"source {source.name}: {wrong}: change --column")
            found = fields[names.index(part)].type
            inner = found.num_fields if pa.types.is_struct(found) else 0
            fields = [found.field(number) for number in range(inner)]
        return found


def _chunk_sizes(file: pq.ParquetFile, column: str) -> list[int]:
    """Uncompressed bytes of the column in each row group."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if not groups:
        return []
    leaves = [groups[0].column(number).path_in_schema for number in range(groups[0].num_columns)]
    leaf = leaves.index(column)
    return [int(group.column(leaf).total_uncompressed_size) for group in groups]


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
