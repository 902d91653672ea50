"""How every command ends: a clear sentence for the person, an exit code for the script."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

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
        if os.environ.get("RANK", "0") == "0":
            print(f"fastssl: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", FAILED)
    except KeyboardInterrupt:
        print("fastssl: interrupted", file=sys.stderr)
        return 130


def stop_on_signals(stop: object) -> None:
    """SIGTERM and SIGUSR1 (Slurm's warning) set `stop.asked`; the loop saves and leaves at the end of its step."""

    def ask(signum: int, frame: object) -> None:
        stop.asked = True

    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, ask)
