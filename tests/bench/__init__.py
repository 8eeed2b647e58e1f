"""Benchmarks, one table: `python -m tests.bench`."""
