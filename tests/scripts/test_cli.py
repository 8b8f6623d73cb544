"""The `orion` command as a shell sees it."""

import subprocess
import sys


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "scripts.cli", "plan", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141
