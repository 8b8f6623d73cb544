"""What every benchmark says about itself: its name, its command, the machine; as JSON, shown and kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path


def report(name: str, out: Path, figures: Mapping[str, object]) -> None:
    """Print the result and write it to OUT/NAME.json."""
    result = {
        "benchmark": name,
        "command": f"python -m scripts.bench.{name}",
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        **figures,
    }
    text = json.dumps(result, indent=2)
    (out / f"{name}.json").write_text(text + "\n")
    print(text)
