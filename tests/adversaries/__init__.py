"""Adversaries as code: what a cheater does, what it gains, and what stops it. No program that is shipped knows them."""
