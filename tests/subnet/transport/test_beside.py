"""Bodies that lie in memory both sides see: the same messages, the same refusals, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from subnet.transport import beside
from subnet.transport.beside import FROM, Place, Sheet, Sheets
from subnet.transport.digests import Digests, Running
from subnet.transport.errors import Elsewhere, MalformedRequest

pytestmark = pytest.mark.skipif(not beside.OFFERED, reason="this system has no files without a name")


@pytest.fixture
def sheets() -> Iterator[Sheets]:
    sheets = Sheets()
    yield sheets
    sheets.close()


def parts(size: int) -> list[memoryview]:
    body = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)).numpy()
    return [memoryview(body.data)[:7], memoryview(body.data)[7:]]


def hashed(*pieces: memoryview) -> Digests:
    running = Running()
    for piece in pieces:
        running.update(piece)
    return running.digests()


@pytest.mark.parametrize("size", [8, FROM, 3 * 1024 * 1024 + 1])
def test_a_body_is_read_as_it_was_written(sheets: Sheets, size: int) -> None:
    written = parts(size)
    place, digests = sheets.take().write(written)
    found = memoryview(bytearray(size))
    assert Place.parse(str(place)) == place
    assert place.read(found) == digests == hashed(*written)
    assert bytes(found) == b"".join(written)


def test_a_sheet_serves_again_and_tells_nothing_of_the_body_before(sheets: Sheets) -> None:
    first = sheets.take()
    first.write(parts(3000))
    sheets.give_back(first, read=True)
    again = sheets.take()
    assert again is first
    place, digest = again.write(parts(100))
    found = memoryview(bytearray(100))
    assert place.read(found) == digest


def test_who_may_still_read_a_sheet_keeps_it(sheets: Sheets) -> None:
    sheet = sheets.take()
    place, _ = sheet.write(parts(100))
    reader = os.open(f"/proc/{place.process}/fd/{place.number}", os.O_RDONLY)
    sheets.give_back(sheet, read=False)
    assert len(os.pread(reader, 200, 0)) == 100
    os.close(reader)
    assert sheets.take() is not sheet


@pytest.mark.parametrize("text", ["", "1/2", "1/2/3/4", "-1/2/3", "1/../3", "a/b/c", "1/2/" + "9" * 16])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(MalformedRequest, match="no place"):
        Place.parse(text)


def test_nothing_but_bodies_is_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 64)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    with secret.open("rb") as file:
        for number in (file.fileno(), end, 9999):
            with pytest.raises(Elsewhere):
                Place(os.getpid(), number, 64).read(memoryview(bytearray(64)))
    os.close(end)
    with pytest.raises(Elsewhere, match="cannot be opened"):
        Place(2**30, 0, 64).read(memoryview(bytearray(64)))


def test_a_body_that_ends_early_is_refused() -> None:
    sheet = Sheet(os.memfd_create("orion-body"))
    place, _ = sheet.write(parts(100))
    with pytest.raises(MalformedRequest, match="100 of 120 bytes"):
        Place(place.process, place.number, 120).read(memoryview(bytearray(120)))
    sheet.close()
