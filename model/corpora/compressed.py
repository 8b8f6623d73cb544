"""Lines of compressed files, read from their beginning: who begins in the middle of one would understand nothing.

pyarrow decompresses, an extra: gzip and zstd of several members or frames too, as `cat` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from model.corpora.source import PIECE, Source, SourceReader
from model.data import DataError

KINDS = {".gz": "gzip", ".zst": "zstd"}


def compression(name: str) -> str | None:
    """What a file is compressed with, by its suffix; None if it is not."""
    return KINDS.get(PurePosixPath(name).suffix)


def compressed_lines(source: Source, longest: int) -> Iterator[bytes | None]:
    """The lines of a source whose name says how it is compressed, without their breaks; None for one of more than
    `longest` bytes, of which no more than that is held. Raises `DataError`."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise without_pyarrow("compressed files need") from error
    held = bytearray()
    try:
        stream = pa.CompressedInputStream(pa.PythonFile(SourceReader(source), mode="r"), compression(source.name))
        while piece := stream.read(PIECE):
            first, *others = piece.split(b"\n")
            held += first
            for line in others:
                yield bytes(held) if len(held) <= longest else None
                held[:] = line
            del held[longest + 1 :]
    except OSError as error:
        raise DataError(
            f"source {source.name} cannot be decompressed ({error}): mend the file or leave it out"
        ) from error
    if held:
        yield bytes(held) if len(held) <= longest else None


def without_pyarrow(who: str) -> DataError:
    """What to do about a missing pyarrow; `who` "needs" it."""
    return DataError(f"{who} pyarrow, which is not installed: pip install 'orion-subnet[data]'")
