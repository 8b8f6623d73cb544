"""Memory for bodies: whole while anybody looks at it, used again when nobody does."""

from __future__ import annotations

import threading

import torch

from subnet.transport.memory import POOLED, Memory


def pages(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_memory_is_used_again_when_its_last_tensor_is_gone() -> None:
    memory = Memory()
    view = memory.take(POOLED + 3)
    assert view.nbytes == POOLED + 3
    first = pages(view)
    tensor = torch.frombuffer(view, dtype=torch.uint8, count=8, offset=16)
    tensor.fill_(7)
    del view
    other = memory.take(POOLED + 3)
    assert pages(other) != first  # `tensor` still looks at it
    assert tensor.tolist() == [7] * 8
    assert memory.spare == 0
    del tensor
    assert memory.spare == 2 * POOLED
    assert pages(memory.take(2 * POOLED)) == first


def test_memory_of_another_size_is_left_alone() -> None:
    memory = Memory()
    memory.take(POOLED)  # and dropped
    large = memory.take(3 * POOLED)
    assert memory.spare == POOLED
    assert large.nbytes == 3 * POOLED


def test_small_bodies_are_not_kept() -> None:
    memory = Memory()
    assert memory.take(0).nbytes == 0
    assert memory.take(POOLED - 1).nbytes == POOLED - 1
    assert memory.spare == 0


def test_what_nobody_uses_is_bounded() -> None:
    memory = Memory(spare_bytes=2 * POOLED)
    views = [memory.take(POOLED) for _ in range(5)]
    newest = pages(views[-1])
    while views:
        views.pop(0)
    views = [memory.take(0)]
    assert memory.spare == 2 * POOLED
    views += [memory.take(POOLED) for _ in range(2)]
    assert newest in map(pages, views[1:])


def test_other_threads_may_drop_it() -> None:
    memory = Memory()
    held = [memory.take(POOLED) for _ in range(8)]
    threads = [threading.Thread(target=held.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.spare == 8 * POOLED
