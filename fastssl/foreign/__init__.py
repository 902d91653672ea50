"""Checkpoints of other projects: recognised, loaded with every tensor accounted for, or refused with a reason."""

from fastssl.foreign.load import Report, load_into, load_pretrained
from fastssl.foreign.moco_run import find_moco_run, read_moco_run

__all__ = ["Report", "find_moco_run", "load_into", "load_pretrained", "read_moco_run"]
