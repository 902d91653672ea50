"""How every command ends: a clear sentence for the person, an exit code for the script."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `fastssl --help` need not import torch
    from fastssl.distributed import StopSignal

FAILED = 1
USAGE = 2
NOT_FINITE = 3  # the loss became NaN or infinite
PREEMPTED = 75  # stopped by a signal after saving: start again with --resume auto (sysexits' EX_TEMPFAIL)


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; an error meant for people becomes one sentence. FASTSSL_TRACEBACK=1 shows where it came from."""
    try:
        return command(argv)
    except (ValueError, OSError) as error:
        if os.environ.get("FASTSSL_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")  # an error may be one rank's alone: all of them speak
        print(f"fastssl: error: {error}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
        return getattr(error, "exit_code", FAILED)
    except KeyboardInterrupt:
        print("fastssl: interrupted", file=sys.stderr)
        return 130


@contextmanager
def stop_on_signals(stop: StopSignal) -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 (Slurm's warning) set `stop.asked`; the loop saves and leaves after its step."""

    def ask(signum: int, frame: object) -> None:
        stop.asked = True

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
