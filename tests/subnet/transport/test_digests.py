"""Two digests of a message: the same however its bytes come, and no two messages alike."""

import pytest
import torch

from model.hashing import digest
from subnet.messages import Forward
from subnet.transport.digests import Digests, Running
from subnet.transport.synapse import encode, tensor_bytes

PUSH = Forward(run="ab" * 8, round=3, sample=7, head="h" * 48, index=1, version=2)


def blob(rows: int = 9) -> list[memoryview]:
    return encode(PUSH, {"y": torch.arange(4.0 * rows).view(rows, 4)})


@pytest.mark.parametrize("piece", [1, 3, 8, 100, 1 << 20])
def test_pieces_do_not_matter(piece: int) -> None:
    parts = blob()
    body, running = memoryview(b"".join(parts)), Running()
    for start in range(0, body.nbytes, piece):
        running.update(body[start : start + piece])
    assert running.digests() == Digests.of(parts)


def test_the_payload_of_one_tensor_is_that_tensor() -> None:
    y = torch.arange(36.0).view(9, 4)
    found = Digests.of(encode(PUSH, {"y": y}))
    assert found.payload == digest(tensor_bytes(y))
    assert found == Digests.of(encode(PUSH, {"y": y}), payload=found.payload)


@pytest.mark.parametrize("at", [0, 3, 7, 8, 60, -1])
def test_every_byte_counts(at: int) -> None:
    body = bytearray(b"".join(blob()))
    whole, changed = Running(), Running()
    whole.update(memoryview(bytes(body)))
    body[at] ^= 1
    changed.update(memoryview(body))
    assert whole.digests() != changed.digests()


@pytest.mark.parametrize("body", [b"", b"abc", b"\xff" * 8, b"\xff" * 40])
def test_what_is_no_message_has_digests_too(body: bytes) -> None:
    running = Running()
    running.update(memoryview(body))
    assert running.digests() == Digests(digest(body), digest())
