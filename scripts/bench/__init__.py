"""Benchmarks: one command each, ratios side by side in one run, JSON results."""
