"""How every command ends: with one clear sentence for the user and an exit code for scripts."""

from __future__ import annotations

import difflib
import faulthandler
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

FAILED = 1
USAGE = 2
NOT_FINITE = 3  # the loss became NaN or infinite
PREEMPTED = 75  # stopped by a signal after saving, to be continued with --resume auto (EX_TEMPFAIL of sysexits.h)


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command and prints an expected error as one sentence; FASTSSL_TRACEBACK=1 shows the traceback instead.

    Returns the exit code.
    """
    for name in ("stdout", "stderr"):  # Python has None for one that was closed when it started
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
    if sys.stderr is sys.__stderr__:
        faulthandler.enable()  # a crash in compiled code, or kill -ABRT of a hung run, prints every thread's traceback
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: prints file names that are not UTF-8 too
    try:
        code = command(argv)
        sys.stdout.flush()  # here, where what it raises is answered
        return code
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        unexpected = isinstance(error, RuntimeError) and not _refusal_of_torch(error)
        if unexpected or os.environ.get("FASTSSL_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        message = _sentence(error)
        rank = os.environ.get("RANK", "0")
        where = f" (rank {rank})" if rank != "0" else ""  # every rank prints: an error may be one rank's alone
        print(f"fastssl: error: {message}{where}", file=sys.stderr)
        return getattr(error, "exit_code", FAILED)
    except KeyboardInterrupt as interrupt:
        (number,) = interrupt.args or (signal.SIGINT,)
        print("fastssl: interrupted" if number == signal.SIGINT else "fastssl: terminated", file=sys.stderr)
        return 128 + number


def usage(words: str, about: str, commands: Mapping[str, str], *end: str) -> str:
    """What a command made of others prints for --help: a line for each of them, by name, between `about` and `end`."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {text}" for name, text in commands.items()]
    return "\n".join([f"usage: {words}", "", about, "", *lines, "", *end])


def refuse_word(what: str, word: str, known: Collection[str]) -> int:
    """Prints that there is no `what` called `word`, and the nearest one that is known; returns the exit code."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
    print(f"fastssl: error: there is no {what} {word!r}: {hint}", file=sys.stderr)
    return USAGE


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"  # without Python's number of the error
    if isinstance(error, RuntimeError):
        return _refusal_of_torch(error)
    return str(error) or "there is not enough memory"  # Python's own MemoryError has no message


def _refusal_of_torch(error: RuntimeError) -> str:
    """A sentence for what torch raises when another rank is gone, memory is full or it cannot compile; else ""."""
    text, kind = str(error), type(error).__name__
    kinds = {parent.__name__ for parent in type(error).__mro__}  # torch is not imported for this
    reason = re.sub(r"^(\[[^]]*\] )+", "", text).split(". ")  # without the place in torch's source
    if "gloo/transport" in text or kind in ("DistBackendError", "DistNetworkError"):
        return f"another rank has ended, or does not answer ({reason[0]}): its own error says why"
    if "DefaultCPUAllocator: can't allocate memory" in text or kind == "OutOfMemoryError":
        return f"there is not enough memory ({'. '.join(reason[:2])}): smaller batches, images or queues need less"
    if "does not have a deterministic implementation" in text:
        return f"{text.split()[0]} differs from run to run on this device: use another --arch or no --deterministic"
    if "TorchDynamoException" in kinds:
        told = " ".join(text.partition("Set TORCH")[0].split())  # what follows is about torch's own log
        return (
            f"torch.compile failed ({kind}: {told[:200]}): use --compile off (bench_throughput.py loss: --no-compiled)"
        )
    return ""


def _nobody_reads() -> bool:
    """Whether the reader of our output, such as `head`, has left; what remains to be written then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextmanager
def on_signals(handler: Callable[[int, object], None], *signums: int) -> Iterator[None]:
    """Inside the block `handler(signum, frame)` answers these signals; behind it, whatever did before."""
    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


@contextmanager
def tidy_on_signals() -> Iterator[None]:
    """Inside the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so unfinished files are removed.

    A second signal kills the process at once. Not for commands of several ranks: Python cannot answer a signal while
    it waits in a collective.
    """
    signums = signal.SIGINT, signal.SIGTERM

    def interrupt(signum: int, frame: object) -> None:
        for handled in signums:
            signal.signal(handled, signal.SIG_DFL)
        raise KeyboardInterrupt(signum)

    with on_signals(interrupt, *signums):
        yield
