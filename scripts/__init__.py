"""Thin commands over the floors below."""
