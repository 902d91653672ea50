"""fastssl: high-throughput self-supervised pretraining of small image encoders. Importing it imports nothing else."""

__version__ = "0.1.0"
