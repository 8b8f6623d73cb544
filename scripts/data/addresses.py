"""From what a person names (files, folders, patterns, object-store and web addresses) to sources."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PreconditionError

from model.corpora.compressed import compression
from model.corpora.folder import Format
from model.corpora.source import LocalSource, Source
from model.data import DataError
from neurons.stores import StoreUrlError, connect
from scripts.data.options import DataOptionError
from subnet.quantities import size

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta  # exist only for type checkers
    from obstore.store import ObjectStore

SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
LONG = 1_000_000_000
"""Bytes whose hashing takes long enough to say so: seconds."""
_MAGIC = frozenset("*?[")
_CHECK = "check the address, the store's credentials and the way there"


@dataclass(frozen=True, slots=True)
class StoredSource:
    """An object of a store, read by ranges and known by its ETag."""

    store: ObjectStore
    key: str
    name: str
    """Its whole address."""
    size: int
    etag: str | None

    @property
    def identity(self) -> str:
        return "size" if self.etag is None else f"etag:{self.etag.strip(chr(34))}"

    def read(self, start: int, end: int) -> bytes:
        if start == end:  # an empty range is an error
            return b""
        options: GetOptions = {"range": (start, end)}
        if self.etag is not None and not self.etag.startswith("W/"):  # weak ones match nothing (RFC 9110, 13.1.1)
            options["if_match"] = self.etag
        try:
            data = bytes(obstore.get(self.store, self.key, options=options).bytes())
        except PreconditionError as error:
            raise self._changed() from error
        except (BaseError, OSError) as error:
            raise DataError(
                f"source {self.name} cannot be read ({_line(error)}): {_CHECK}, then start again to go on"
            ) from error
        if len(data) != end - start:
            raise self._changed()
        return data

    def _changed(self) -> DataError:
        return DataError(f"source {self.name} changed while it was read: leave it alone and give another --out")


@dataclass(frozen=True, slots=True)
class _Found:
    """A file that an address names: `place` tells two apart, `open` looks into it and hashes so many bytes."""

    name: str
    place: str
    open: Callable[[], Source]
    hashed: int = 0


def find_sources(
    addresses: list[str], wanted: Format | None, *, tell: Callable[[str], None]
) -> tuple[Format, list[Source]]:
    """Every file that `addresses` name, those of one address in order of name, and their common format.

    Of a folder the files count whose suffix is known (and is that of `wanted`); a file that is named, also by a
    pattern, counts whatever its suffix is if `wanted` says what it holds. `tell` gets a line if hashing local files
    takes long. Raises `DataError`; `DataOptionError` when no format follows.
    """
    found: dict[str, _Found] = {}
    for address in addresses:
        files = sorted(_stored(address, wanted) if "://" in address else _local(address, wanted), key=lambda f: f.name)
        if not files:
            raise DataError(f"--from {address} names no {wanted or 'data'} files ({_suffixes(wanted)}): change it")
        for file in files:
            if file.place in found:
                raise DataError(f"--from {address} names {file.place} a second time: name every file once")
            found[file.place] = file
    form = wanted or _common([file.name for file in found.values()])
    hashed = sum(file.hashed for file in found.values())
    if hashed >= LONG:
        tell(f"{len(found):,} files: hashing {size(hashed)}")
    with ThreadPoolExecutor() as pool:
        return form, list(pool.map(lambda file: file.open(), found.values()))


def _common(names: list[str]) -> Format:
    forms = {_form(name): name for name in names}
    (form, name), *others = forms.items()
    if form is None:
        raise DataOptionError(f"{name} has no known suffix ({_suffixes(None)}): say with --format what it holds")
    if others:
        raise DataOptionError(f"{name} and {others[0][1]} differ in format: say with --format which one to take")
    return form


def _suffixes(wanted: Format | None) -> str:
    return ", ".join(suffix for suffix, form in SUFFIXES.items() if wanted in (None, form))


def _known(name: str, wanted: Format | None) -> bool:
    form = _form(name)
    return form is not None and wanted in (None, form)


def _form(name: str) -> Format | None:
    """By the suffix; lines may be compressed."""
    if compression(name) is None:
        return SUFFIXES.get(PurePosixPath(name).suffix)
    form = SUFFIXES.get(PurePosixPath(name).with_suffix("").suffix)
    return form if form == "jsonl" else None


def _split(address: str) -> tuple[str, str]:
    """The part before the first component with a pattern, and the rest, empty if there is none."""
    parts = address.split("/")
    first = next((number for number, part in enumerate(parts) if not _MAGIC.isdisjoint(part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _local(address: str, wanted: Format | None) -> Iterator[_Found]:
    path = Path(address).expanduser()
    if path.is_dir():
        for file in path.rglob("*"):
            if file.is_file() and _known(file.name, wanted):
                yield _file(file, file.relative_to(path).as_posix())
    elif path.exists():
        yield _file(path, path.name)
    else:
        root, pattern = _split(str(path))
        if not pattern:
            raise DataError(f"--from {address} does not exist: name a file, a folder, a pattern or an address")
        for match in glob.iglob(str(path), recursive=True):  # noqa: PTH207 - Path.glob wants relative patterns
            file = Path(match)
            if file.is_file():
                yield _file(file, file.relative_to(root or ("/" if path.is_absolute() else ".")).as_posix())


def _file(path: Path, name: str) -> _Found:
    return _Found(name, str(path.resolve()), lambda: LocalSource.open(path, name), path.stat().st_size)


def _stored(address: str, wanted: Format | None) -> Iterator[_Found]:
    """Objects of a store: one by its name, or those under a prefix that are known or match the pattern."""
    parts = urlsplit(address)
    if parts.scheme in ("http", "https") and (parts.query or "@" in parts.netloc):
        raise DataOptionError(
            f"--from {parts.scheme}://{parts.hostname}{parts.path} comes with a query or a password, which would be "
            "written down: give a plain address"
        )
    root, pattern = _split(address.rstrip("/"))
    try:
        if not pattern:
            parent, _, name = root.rpartition("/")
            one = None if parent.endswith("/") else _head(connect(parent), name)
            if one is not None:
                yield _object(connect(parent), parent, one)
                return
        store = connect(root)
        for page in obstore.list(store):
            for meta in page:
                if _matches(meta["path"], pattern) if pattern else _known(meta["path"], wanted):
                    yield _object(store, root, meta)
    except StoreUrlError as error:
        raise DataOptionError(f"--from {error}") from error
    except (BaseError, OSError) as error:
        raise DataError(f"--from {address} cannot be listed ({_line(error)}): {_CHECK}") from error


def _head(store: ObjectStore, name: str) -> ObjectMeta | None:
    try:
        return obstore.head(store, name)
    except FileNotFoundError:
        return None


def _object(store: ObjectStore, root: str, meta: ObjectMeta) -> _Found:
    name = f"{root}/{meta['path']}"
    source = StoredSource(store, meta["path"], name, meta["size"], meta["e_tag"])
    return _Found(name, name, lambda: source)


def _matches(path: str, pattern: str) -> bool:
    """As a shell matches: `*` stays within a component, `**` is any number of them."""

    def match(parts: list[str], patterns: list[str]) -> bool:
        if not patterns:
            return not parts
        if patterns[0] == "**":
            return any(match(parts[start:], patterns[1:]) for start in range(len(parts) + 1))
        return bool(parts) and fnmatchcase(parts[0], patterns[0]) and match(parts[1:], patterns[1:])

    return match(path.split("/"), pattern.split("/"))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
