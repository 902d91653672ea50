"""The reference projects' own way to start several processes, `--multiprocessing-distributed`, handed to torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from urllib.parse import urlparse

import torch


def split_launch_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The reference scripts' launch flags, and the rest of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--multiprocessing-distributed", action="store_true")
    parser.add_argument("--world-size", type=int, default=1)  # of nodes
    parser.add_argument("--rank", type=int, default=0)  # of this node
    parser.add_argument("--dist-url", default="env://")
    parser.add_argument("--dist-backend", default="nccl")
    parser.add_argument("--gpus", type=int, nargs="+")
    parser.add_argument("--gpu", type=int)
    return parser.parse_known_args(list(argv))


def launch_command(argv: Sequence[str], module: str) -> list[str] | None:
    """The torchrun command that a reference command line asks for, or None when it asks for one process.

    Sets CUDA_VISIBLE_DEVICES for --gpu and --gpus. Raises ValueError when --dist-url is no address.
    """
    flags, rest = split_launch_flags(argv)
    gpus = flags.gpus or ([flags.gpu] if flags.gpu is not None else None)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if not flags.multiprocessing_distributed:
        return None
    processes = len(gpus) if gpus else max(1, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    if flags.world_size <= 1:
        return [*command, "--standalone", "-m", module, *rest]
    if flags.dist_url.startswith("env://"):
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "29500")
    else:
        address = urlparse(flags.dist_url)
        host, port = address.hostname, address.port
    if not host or not port:
        raise ValueError(f"--dist-url {flags.dist_url} names no host and port: use tcp://HOST:PORT")
    command += ["--nnodes", str(flags.world_size), "--node_rank", str(flags.rank)]
    command += ["--master_addr", str(host), "--master_port", str(port)]
    return [*command, "-m", module, *per_node_batch(rest, flags.world_size)]


def per_node_batch(argv: list[str], nodes: int) -> list[str]:
    """Their --batch-size is of one node, ours of all: the same command line with the total."""
    result = [word for item in argv for word in (item.split("=", 1) if item.startswith("--batch-size=") else [item])]
    for i, word in enumerate(result[:-1]):
        if word in ("-b", "--batch-size"):
            result[i + 1] = str(int(result[i + 1]) * nodes)
    return result


def launch_if_asked(argv: Sequence[str], module: str) -> list[str]:
    """Becomes torchrun when the command line asks for it; otherwise returns it without the launch flags."""
    command = None if "LOCAL_RANK" in os.environ else launch_command(argv, module)
    if command is not None:
        print("fastssl: " + " ".join(["torchrun", *command[3:]]), file=sys.stderr)
        os.execv(command[0], command)
    return split_launch_flags(argv)[1]
