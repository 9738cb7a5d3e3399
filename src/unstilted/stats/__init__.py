"""Intervals and tests: pure functions of arrays."""
