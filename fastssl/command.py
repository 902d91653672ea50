"""How every command ends: a clear sentence for the person, an exit code for the script."""

from __future__ import annotations

import io
import os
import select
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a name that is not UTF-8 must still print
    try:
        code = command(argv)
        sys.stdout.flush()  # here, where what it raises is answered
        return code
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("FASTSSL_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        rank = os.environ.get("RANK", "0")  # an error may be one rank's alone: all of them speak
        said = str(error) or "there is not enough memory"  # Python's own MemoryError says nothing
        print(f"fastssl: error: {said}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
        return getattr(error, "exit_code", FAILED)
    except KeyboardInterrupt as interrupt:
        (number,) = interrupt.args or (signal.SIGINT,)
        print("fastssl: interrupted" if number == signal.SIGINT else "fastssl: terminated", file=sys.stderr)
        return 128 + number


def _nobody_reads() -> bool:
    """Has the reader of our output, such as `head`, seen enough? What is left to write then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextmanager
def tidy_on_signals() -> Iterator[None]:
    """Within, SIGTERM ends a command as Ctrl-C does: what is not finished is removed. A second signal ends it at once.

    Not for a command of several ranks: one that waits for the others answers no signal in Python.
    """

    def interrupt(signum: int, frame: object) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_DFL)
        raise KeyboardInterrupt(signum)

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def stop_on_signals(stop: StopSignal) -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 (Slurm's warning) set `stop.asked`; the loop saves and leaves after its step."""

    def ask(signum: int, frame: object) -> None:
        stop.asked = True

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: dict[int, object]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
