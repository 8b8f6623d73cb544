"""The programs: miner, validator, and what only a running node has."""
