"""Where checkpoints lie: a folder, or any object store that `obstore` speaks to (S3, R2, GCS, Azure, memory).

Both put a file whole or not at all and turn what goes wrong into a `StoreError`. A folder writes as
`model/checkpoint.py` does (temporary, flush, rename), because a rename without a flush can leave an empty file after a
power cut. An object store gets small files in one request and larger ones in parts, of which the last request makes an
object; what was sent of a failed upload is aborted. Nothing here waits without a deadline.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import MemoryStore, from_url
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointCorruptError, CheckpointInfo, CheckpointMissingError, Encoded
from neurons.progress import EVERY, Meter, Standing, followed

if TYPE_CHECKING:
    from obstore.store import ObjectStore  # exists only for type checkers

log = logging.getLogger("orion.neurons.stores")

DEADLINE = 60.0
"""Seconds for a small request, and for the next piece of a large one."""
SLOWEST = 1_000_000
"""Bytes per second; a transfer slower than this is given up."""
PART = 8 << 20
MOST_PARTS = 9_000
"""S3 takes 10,000 parts."""
UPLOADS = 4
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreError(Exception):
    """The store did not do what it was asked; what it held before, it holds still."""


class StoreUrlError(StoreError):
    """The address names no store that can be used."""


class StoreNameError(StoreError):
    """A name that cannot be part of a path."""


class StoreFullError(StoreError):
    """No room for the file."""


class StoreTimeoutError(StoreError):
    """No answer within the deadline."""


class StoreContentError(StoreError):
    """The store holds something else than was put."""


class Store(Protocol):
    """Files by name ("checkpoints/stage-00/round-00003.safetensors"). Every method raises `StoreError`."""

    def place(self, name: str) -> str:
        """The file as a person can find it."""
        ...

    async def put(self, name: str, encoded: Encoded) -> None:
        """Write the file whole, or leave what was there. Raises `CheckpointContentError` too."""
        ...

    async def names(self, folder: str) -> list[str]:
        """Names of all files under `folder`, in no order; empty if there is no such folder."""
        ...

    async def first(self, name: str, length: int) -> tuple[bytes, int]:
        """At most `length` bytes from the file's start, and its size. Raises `CheckpointMissingError`."""
        ...

    async def load(self, name: str, manifest_hash: str, subject: str) -> tuple[dict[str, Tensor], CheckpointInfo]:
        """Read and prove the file. Raises `CheckpointError`."""
        ...

    async def delete(self, name: str) -> None:
        """Remove the file; one that is gone already is no error."""
        ...

    async def clean(self, folder: str) -> int:
        """Remove what killed writers left under `folder`; returns how many files."""
        ...


def open_store(address: str, *, deadline: float = DEADLINE) -> Store:
    """A folder's path, or a URL: file, s3, gs, az, abfss, memory, or the https address of a bucket in S3 or R2.

    Credentials and endpoints are read from the environment (docs/checkpoints.md). Raises `StoreUrlError`.
    """
    if "://" not in address:
        return Folder(Path(address).expanduser(), deadline=deadline)
    if address.startswith("file://"):
        return Folder(Path(unquote(urlsplit(address).path)), deadline=deadline)
    try:
        kind = obstore.parse_scheme(address)
    except (BaseError, ValueError) as error:
        raise _no_store(address, error) from error
    if kind == "http":
        raise StoreUrlError(f"{address} is a plain web address, which has no listing: give s3://, gs:// or az://")
    if kind == "memory":
        return Bucket(MemoryStore(), address, deadline=deadline)
    return Bucket(connect(address, deadline=deadline), address, deadline=deadline)


def connect(address: str, *, deadline: float = DEADLINE) -> ObjectStore:
    """obstore's client of the store, or prefix of one, at a URL. Raises `StoreUrlError`."""
    seconds = timedelta(seconds=deadline)
    try:
        return from_url(
            address,
            # A plain http endpoint is used only if the environment names one.
            client_options={"allow_http": True, "read_timeout": seconds, "timeout": timedelta(days=1)},
            retry_config={"retry_timeout": seconds},
        )
    except (BaseError, ValueError) as error:
        raise _no_store(address, error) from error


def _no_store(address: str, error: Exception) -> StoreUrlError:
    return StoreUrlError(f"{address} cannot be opened ({_line(error)}): see docs/checkpoints.md")


class Folder:
    """A folder on a disk, perhaps shared by several nodes."""

    def __init__(self, root: Path, *, deadline: float = DEADLINE) -> None:
        self.root = root
        self._deadline = deadline

    def place(self, name: str) -> str:
        return str(self.root / name)

    async def clean(self, folder: str) -> int:
        def remove() -> int:
            return sum(checkpoint.remove_temporaries(path) for path in (self.root / folder).glob("*/"))

        async with _bounded(self.place(folder), self._deadline):
            return await asyncio.to_thread(remove)

    async def put(self, name: str, encoded: Encoded) -> None:
        async with _bounded(self.place(name), self._deadline + encoded.size / SLOWEST):
            await asyncio.to_thread(checkpoint.write, self.root / name, encoded)

    async def names(self, folder: str) -> list[str]:
        def walk() -> list[str]:
            found = (self.root / folder).rglob("*")
            return [path.relative_to(self.root).as_posix() for path in found if path.is_file()]

        async with _bounded(self.place(folder), self._deadline):
            return await asyncio.to_thread(walk)

    async def first(self, name: str, length: int) -> tuple[bytes, int]:
        path = self.root / name

        def read() -> tuple[bytes, int]:
            with path.open("rb") as file:
                return file.read(length), file.seek(0, 2)

        async with _bounded(str(path), self._deadline):
            return await asyncio.to_thread(read)

    async def load(self, name: str, manifest_hash: str, subject: str) -> tuple[dict[str, Tensor], CheckpointInfo]:
        path = self.root / name
        _, size = await self.first(name, 0)
        async with _bounded(str(path), self._deadline + size / SLOWEST):
            return await asyncio.to_thread(checkpoint.load, path, manifest_hash=manifest_hash, subject=subject)

    async def delete(self, name: str) -> None:
        async with _bounded(self.place(name), self._deadline):
            await asyncio.to_thread((self.root / name).unlink, missing_ok=True)


class Bucket:
    """An object store, or a prefix of one."""

    def __init__(self, store: ObjectStore, address: str, *, deadline: float = DEADLINE) -> None:
        self._store = store
        self._address = address.rstrip("/")
        self._deadline = deadline

    def place(self, name: str) -> str:
        return f"{self._address}/{name}"

    async def put(self, name: str, encoded: Encoded) -> None:
        async with _bounded(self.place(name), self._deadline + encoded.size / SLOWEST):
            if encoded.size <= PART:
                data = await asyncio.to_thread(lambda: b"".join(encoded.pieces()))
                await obstore.put_async(self._store, name, data, use_multipart=False)
                return
            part = max(PART, -(-encoded.size // MOST_PARTS))
            # The iterator runs on obstore's threads; an error it raises aborts the upload.
            async with _told(self.place(name), encoded.size) as meter:
                await obstore.put_async(
                    self._store,
                    name,
                    _counted(encoded.pieces(), meter),
                    use_multipart=True,
                    chunk_size=part,
                    max_concurrency=UPLOADS,
                )

    async def names(self, folder: str) -> list[str]:
        async with _bounded(self.place(folder), self._deadline):
            found = await obstore.list(self._store, folder).collect_async()
        return [entry["path"] for entry in found]

    async def first(self, name: str, length: int) -> tuple[bytes, int]:
        async with _bounded(self.place(name), self._deadline):
            size = (await obstore.head_async(self._store, name))["size"]
            end = min(length, size)
            if end == 0:  # an empty range is an error
                return b"", size
            return bytes(await obstore.get_range_async(self._store, name, start=0, end=end)), size

    async def load(self, name: str, manifest_hash: str, subject: str) -> tuple[dict[str, Tensor], CheckpointInfo]:
        place = self.place(name)
        async with _bounded(place, self._deadline):
            result = await obstore.get_async(self._store, name)
            stream = aiter(result.stream(PART))
        size, data = result.meta["size"], bytearray()
        async with _told(place, size) as meter:
            while True:
                async with _bounded(place, self._deadline):
                    piece = await anext(stream, None)
                if piece is None or len(data) > size:
                    break
                data += piece
                meter.done = len(data)
        if len(data) != size:
            raise CheckpointCorruptError(
                f"checkpoint {place} came as {len(data)} bytes where the store promised {size}: use an older one"
            )
        return await asyncio.to_thread(checkpoint.loads, data, manifest_hash, subject=subject, name=place)

    async def delete(self, name: str) -> None:
        try:
            async with _bounded(self.place(name), self._deadline):
                await obstore.delete_async(self._store, name)
        except CheckpointMissingError:
            log.debug("%s was gone already", self.place(name))

    async def clean(self, folder: str) -> int:  # noqa: ARG002 (nobody sees a killed upload; docs/checkpoints.md)
        return 0


@asynccontextmanager
async def _told(place: str, size: int) -> AsyncIterator[Meter]:
    """Logs how far a transfer of `size` bytes is, if it takes long."""
    meter = Meter(total=size)

    def tell(standing: Standing) -> None:
        if standing.seconds >= EVERY:
            log.info("%s: %s", place, standing.text())

    async with followed(meter, tell):
        yield meter


def _counted(pieces: Iterator[bytes | memoryview], meter: Meter) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        yield piece
        meter.done += len(piece)


@asynccontextmanager
async def _bounded(place: str, seconds: float) -> AsyncIterator[None]:
    """Whatever goes wrong within becomes one line of a typed error that names the file."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except FileNotFoundError as error:
        raise CheckpointMissingError(f"checkpoint {place} does not exist: give the path of a saved one") from error
    except TimeoutError as error:
        raise StoreTimeoutError(
            f"{place}: no answer within {seconds:.0f} s: check the store and the way there, then try again"
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise StoreFullError(f"{place} cannot be written, the disk is full ({error}): make room") from error
        raise StoreError(f"{place}: {_line(error)}: check the folder and its permissions") from error
    except BaseError as error:
        raise StoreError(f"{place}: {_line(error)}: check the store, its credentials and the way there") from error


def _line(error: Exception) -> str:
    """obstore adds a dump of its internals after the first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
