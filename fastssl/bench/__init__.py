"""Measurements: one file per stage, run through `bench_throughput.py`."""
