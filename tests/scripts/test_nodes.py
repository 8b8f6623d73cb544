"""Why a node of a local run has ended, for whoever only sees its name."""

from pathlib import Path
from types import SimpleNamespace

from scripts.nodes import NodeProcess

LOG = """\
2026-01-01 00:00:00,100 INFO orion.neurons.node this node has no roster of the run yet
2026-01-01 00:00:00,200 ERROR orion.neurons.node a first one
2026-01-01 00:00:00,300 ERROR orion.neurons.node stage 1 needs 52.8mb of disk: make room
2026-01-01 00:00:00,400 INFO orion.neurons.node good bye
"""


def test_the_last_error_of_a_log_is_why(tmp_path: Path) -> None:
    log = tmp_path / "miner-0.log"
    node = NodeProcess("miner-0", "miner", SimpleNamespace(), log)  # type: ignore[arg-type]
    log.write_text(LOG)
    assert node.complaint == "stage 1 needs 52.8mb of disk: make room"
    log.write_text("x" * 10**6 + "\n" + LOG)
    assert node.complaint == "stage 1 needs 52.8mb of disk: make room"
    log.write_text("INFO all is well\n")
    assert node.complaint == f"see {log}"
