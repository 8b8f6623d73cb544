"""One torch thread per process: results do not depend on the machine's cores, and tests share them fairly.

Hypothesis tries the same examples each time, so that a change is judged by what it changed; `make explore` tries new
ones.
"""

import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("steady")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
