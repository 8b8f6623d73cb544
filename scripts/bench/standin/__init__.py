"""Real nodes around a compute that is held, not done: swarms of the size and pace of large runs on a small machine."""
