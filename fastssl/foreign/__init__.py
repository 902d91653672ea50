"""Checkpoints of other projects: recognised, loaded with every tensor accounted for, or refused with a reason."""

from fastssl.foreign.load import Report, load_into, load_pretrained

__all__ = ["Report", "load_into", "load_pretrained"]
