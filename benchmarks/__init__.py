"""Measurements, each a command whose last line is JSON; results are kept in `benchmarks/results`."""
