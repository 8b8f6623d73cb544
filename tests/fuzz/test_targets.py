"""Every target takes its seeds, what once broke it, and a few hundred bent ones; `python -m tests.fuzz` goes on."""

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
BENT = 300


def bent(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few places changed, cut or doubled."""
    raw = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw) + 1)
        match chance.randrange(4):
            case 0 if at < len(raw):
                raw[at] ^= 1 << chance.randrange(8)
            case 1:
                del raw[at : at + chance.randint(1, 9)]
            case 2:
                raw[at:at] = raw[at : at + chance.randint(1, 9)]
            case _:
                raw[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b'"', b"-1", b"1e9"))
    return bytes(raw)


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_is_taken_or_refused(name: str) -> None:
    target, chance = TARGETS[name], random.Random(name)  # noqa: S311 - the same each time
    seeds = target.seeds()
    for seed in seeds:
        target.feed(seed)
    for _ in range(BENT):
        target.feed(bent(chance.choice(seeds), chance))
    for size in (0, 1, 7, 8, 64, 1000):
        target.feed(chance.randbytes(size))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_before_is_taken_or_refused(path: Path) -> None:
    TARGETS[path.parent.name].feed(path.read_bytes())
