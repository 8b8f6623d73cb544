"""`orion monitor`: a run, or a node, in the terminal, from its event logs. It reads and never acts."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from scripts.dashboard.errors import DashboardError
from scripts.dashboard.facts import read_facts
from scripts.dashboard.feed import EVENTS, LOOK, check_run
from scripts.live import View
from scripts.tally import LogFollower, Tally

STOPPED = 130


def monitor(run: Path, *, plain: bool) -> int:
    """Follow the run until it is over: 0; 130 when stopped, 1 if its folder cannot be read."""
    console = Console(soft_wrap=True, markup=False)
    try:
        check_run(run)
        follower, tally, begin = LogFollower(run / EVENTS), Tally(0), 0.0
        facts = None
        with View(console, title=run.resolve().name, stages=0, plain=plain) as view:
            while True:
                facts = facts or read_facts(run)
                tally.tokens_per_microbatch = 0 if facts is None else facts.tokens_per_microbatch
                for name, stamped in follower.read():
                    begin = begin or stamped.time
                    tally.add(name, stamped)
                    if tally.news:  # told with the time at which it happened
                        view.show(tally, elapsed=stamped.time - begin)
                view.show(tally, elapsed=(tally.last_event or begin) - begin)
                if tally.over:
                    return 0
                time.sleep(LOOK)
    except DashboardError as error:
        print(f"orion monitor: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"orion monitor: {run}: {error}: look at it with that version", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"orion monitor: {error.filename} cannot be read ({error.strerror}): make it readable", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return STOPPED
