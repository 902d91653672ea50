"""`fastssl eval NAME`: hands the command line to one evaluation, which is also `python -m fastssl.eval.NAME`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastssl.command import USAGE, refuse_word, run_command

EVALUATIONS = {
    "knn": "exact k-nearest neighbours on frozen features, every odd k from one pass",
    "linear": "linear classification on frozen features: the reference protocol, or a sweep on cached features",
    "transfer": "CIFAR-10, CIFAR-100 or Caltech-101: linear or fine-tuned",
    "instdisc": "instance discrimination on a static view set",
    "stats": "alignment and uniformity on a static view set",
    "tsne": "t-SNE figures of a static view set",
    "all": "k-NN, cached linear, instance discrimination, statistics and t-SNE from one pass",
}
OTHER_NAMES = {"stats-dist": "stats", "lincls": "linear"}  # what the reference scripts call them


def usage() -> str:
    """What `fastssl eval --help` prints."""
    lines = [f"  {name:8}  {text}" for name, text in EVALUATIONS.items()]
    return "\n".join(
        ["usage: fastssl eval NAME DIR [flags]", "", *lines, "", "fastssl eval NAME --help lists its flags."]
    )


def main(argv: Sequence[str]) -> int:
    """Runs one evaluation and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else USAGE
    name = OTHER_NAMES.get(argv[0], argv[0])
    if name not in EVALUATIONS:
        return refuse_word("evaluation", name, EVALUATIONS)
    return importlib.import_module(f"fastssl.eval.{name}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
