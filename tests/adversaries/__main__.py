"""`python -m tests.adversaries`, see `tests.adversaries.program`."""

import sys

from tests.adversaries.program import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
