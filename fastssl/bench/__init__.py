"""What `bench_throughput.py` runs: its stages, their peers, and what is made of the results."""
