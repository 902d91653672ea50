"""Runs a function on several gloo ranks, each a process of its own, and returns what each rank returned.

Processes are forked from a server that has imported what takes seconds to import; it has no threads to break.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Starts the server; to be called before a work pool of the product does, which would have it import less."""
    FORKS.set_forkserver_preload(["fastssl.train", "fastssl.eval.all", "sklearn.neighbors", "pytest"])
    multiprocessing.forkserver.ensure_running()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Calls `function(rank, world_size, *args)` on `world_size` ranks; returns their results in rank order.

    The function must be importable (module level of a test file); the process group is up when it is called, the
    variables of torchrun are set, torch uses one thread and warnings are errors. Raises RuntimeError with the
    traceback of the first rank that failed, or when `timeout` seconds have passed; no process outlives the call.
    """
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes = [FORKS.Pipe(duplex=False) for _ in range(world_size)]
        port = free_port()
        processes = [
            FORKS.Process(target=_rank_main, args=(function, rank, world_size, folder, port, pipe, args), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes):
                process.start()
                sender.close()  # so that a rank that dies is seen as the end of its pipe
            _collect({reader: rank for rank, (reader, _) in enumerate(pipes)}, results, time.monotonic() + timeout)
        finally:
            for process in processes:
                if len(results) < world_size:
                    process.kill()
                process.join(timeout=30)
            for log in sorted(Path(folder).glob("*.log")):  # so that pytest shows it where a test fails
                sys.stderr.write(log.read_text())
    return [results[rank] for rank in range(world_size)]


def _collect(waiting: dict[Connection, int], results: dict[int, Any], deadline: float) -> None:
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting.values())} did not finish in time")
        for reader in ready:
            rank = waiting.pop(reader)
            try:
                ok, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a result") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, port: int, pipe: Connection, args: tuple
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    redirect_output(f"{folder}/{rank}.log")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            message = True, function(rank, world_size, *args)
        if distributed.is_initialized():  # a whole training run ends it
            distributed.barrier()
    except BaseException:
        message = False, traceback.format_exc()
    # plain pickle copies tensors; torch's own would hand over the memory of a process that is about to end
    pipe.send_bytes(pickle.dumps(message))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def redirect_output(path: str) -> None:
    """From here on a forked process says what it says into a file: it has the terminal of the server."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
