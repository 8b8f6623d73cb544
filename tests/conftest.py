"""One torch thread per process: results do not depend on the machine's cores, and tests share them fairly."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
