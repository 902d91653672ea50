"""Measurements, one stage at a time: `python bench_throughput.py STAGE [options]`; STAGE --help lists its options."""

from __future__ import annotations

import sys
from importlib import import_module

STAGES = {  # stage -> the module whose main(argv) measures it
    "convert": "fastssl.bench.convert",
    "loader": "fastssl.bench.loader",
    "augment": "fastssl.bench.augment",
    "all": "fastssl.bench.whole_loop",
    "eval": "fastssl.bench.eval",
    "loss": "fastssl.bench.loss",
    "report": "fastssl.bench.report",
    "step": "fastssl.bench.step",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in STAGES:
        sys.exit(f"usage: python bench_throughput.py STAGE [options], where STAGE is one of: {', '.join(STAGES)}")
    import_module(STAGES[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
