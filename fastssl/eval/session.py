"""What all evaluations share while they run: ranks, messages, progress bars, opening the encoder, writing JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fastssl import checkpoint, distributed
from fastssl.data_prep.files import check_writable, write_text
from fastssl.distributed import Ranks, broadcast_object, gather_objects
from fastssl.environment import environment
from fastssl.eval.images import Images
from fastssl.eval.memory import GB, Memory, peak_memory
from fastssl.foreign import load_pretrained
from fastssl.machine.precision import DTYPES
from fastssl.models.encoders import make_encoder
from fastssl.models.tryout import why_refused

PATIENCE = timedelta(days=7)  # t-SNE is rank 0's alone, and a sweep may have fewer settings than there are ranks


class Session:
    """The options, ranks and memory limit of one evaluation. Only rank 0 prints."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        self.options, self.ranks = options, ranks
        self.memory = Memory(options.max_mem_gb, ranks.device)
        self.dtype = DTYPES[options.precision]
        self.report: list[str] = []  # what was recognised in the checkpoint, line by line

    def say(self, line: str) -> None:
        """Prints a line of results on stdout."""
        if self.ranks.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def note(self, line: str) -> None:
        """Prints a remark on stderr."""
        if self.ranks.rank == 0:
            tqdm.write(f"fastssl: {line}", file=sys.stderr)

    def bar(self, items: Iterable, total: int | None = None, what: str = "") -> Iterable:
        """The items, with a progress bar if rank 0 writes to a terminal."""
        disable = True if self.ranks.rank else None  # None: tqdm asks whether it is a terminal
        return tqdm(items, total=total, desc=what, dynamic_ncols=True, disable=disable, leave=False)

    def open_backbone(self, source: str = "") -> nn.Module:
        """The encoder of `source`, or of --pretrained, on its device and in eval mode.

        Sets `options.arch` and `options.stem` to what it found. Raises ValueError if that refuses images of
        --image-size: they are too small, or not its fixed size.
        """
        o = self.options
        if source := source or o.pretrained:
            self.say(f"=> creating model '{o.arch or 'of the checkpoint'}'")
            self.say(f"=> loading checkpoint '{source}'")
            path = broadcast_object(checkpoint.find(source), self.ranks)  # a run may be writing newer ones
            backbone, report = load_pretrained(path, o.arch, stem=o.stem)
            o.arch, o.stem, self.report = report.arch, report.stem, str(report).splitlines()
            for line in self.report:
                self.note(line)
            self.say(f"=> loaded pre-trained model '{source}'")
        else:
            o.arch, o.stem = o.arch or "resnet50", o.stem or "imagenet"
            self.say(f"=> creating model '{o.arch}'")
            self.note("the encoder has random weights, since no checkpoint is given (--pretrained)")
            torch.manual_seed(o.seed)
            backbone = make_encoder(o.arch, stem=o.stem).backbone
        if reason := why_refused(backbone.eval(), 1, o.image_size):
            size = f"images of {o.image_size} pixels, choose another --image-size"
            raise ValueError(f"{o.arch} cannot take {size}: {reason}")
        return backbone.to(self.ranks.device, memory_format=torch.channels_last).eval()

    def warn_bad(self, *sets: Images) -> int:
        """Names the unreadable images of all ranks on stderr, after the sets' notices; returns how many there are."""
        for notice in dict.fromkeys(notice for images in sets for notice in images.notices):
            self.note(notice)
        found = gather_objects([line for images in sets for line in images.bad_images], self.ranks)
        lines = list(dict.fromkeys(line for rank in found for line in rank))  # several ranks may meet the same image
        for line in lines:
            self.note(f"left out: {line}")
        return len(lines)

    def write(self, command: str, result: dict) -> None:
        """With --json, writes the result with everything it depends on; a partial file never gets that name."""
        o = self.options
        peaks = gather_objects(peak_memory() / GB, self.ranks)
        if not o.json or self.ranks.rank != 0:
            return
        record = {
            "evaluation": command,
            **result,
            "checkpoint": self.report,
            "options": {k: v for k, v in vars(o).items() if k != "json"},
            "peak_memory_gb": [round(peak, 3) for peak in peaks],
            "environment": environment(),
        }
        write_text(Path(o.json), json.dumps(finite_or_null(record), indent=1, allow_nan=False) + "\n")


def run_session(command: str, options: argparse.Namespace, evaluate: Callable[[Session], dict]) -> int:
    """Joins the other ranks, evaluates and writes the JSON. Returns the exit code."""
    ranks = distributed.start(options.device, PATIENCE)
    try:
        if options.json and ranks.rank == 0:
            check_writable(options.json, "--json")
        session = Session(options, ranks)
        session.write(command, evaluate(session))
    finally:
        distributed.stop()
    return 0


def finite_or_null(value: object) -> object:
    """`value` with None for every NaN and infinity, however deeply nested: JSON has neither."""
    if isinstance(value, dict):
        return {k: finite_or_null(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
