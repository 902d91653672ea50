"""Translates the reference projects' way of starting several processes, --multiprocessing-distributed, to torchrun."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from urllib.parse import urlparse

from fastssl.arguments import ListParser
from fastssl.plural import counted


def split_launch_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The reference scripts' launch flags, and the rest of the command line."""
    parser = ListParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--multiprocessing-distributed", action="store_true")
    parser.add_argument("--world-size", type=int, default=-1)  # the number of nodes
    parser.add_argument("--rank", type=int, default=-1)  # the number of this node
    parser.add_argument("--dist-url", default="")
    parser.add_argument("--dist-backend", choices=("nccl", "gloo"))  # accepted, but the device decides
    parser.add_argument("--gpus", type=int, nargs="+")
    parser.add_argument("--gpu", type=int)
    return parser.parse_known_args(list(argv))


def launch_command(argv: Sequence[str], module: str, node_batch: int | None = None) -> list[str] | None:
    """The torchrun command that a reference command line asks for, or None when it asks for one process.

    node_batch: the default of a -b that counts a node's images; None where -b and -j count those of a process.
    Sets CUDA_VISIBLE_DEVICES for --gpu and --gpus. Raises ValueError when --dist-url is no address, and for several
    nodes without --multiprocessing-distributed.
    """
    flags, rest = split_launch_flags(argv)
    gpus = flags.gpus or ([flags.gpu] if flags.gpu is not None else [])
    if gpus:
        show_gpus(gpus)
    if not flags.multiprocessing_distributed:
        if flags.world_size > 1 and "WORLD_SIZE" not in os.environ:  # each node would train for itself
            raise ValueError(
                f"--world-size {flags.world_size} counts nodes, which only meet with --multiprocessing-distributed: "
                "add it, or start with torchrun"
            )
        return None
    nodes, node = count_nodes(flags)
    processes = len(gpus) or count_gpus()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    if node_batch is not None:
        rest = in_our_units(rest, nodes, processes, node_batch)
    if nodes == 1:
        # without an address torchrun looks for one by this host's name, for minutes if the name has none
        alone = ["--standalone", "--local-addr", "localhost"]
        return [*command, *alone, "-m", module, *rest] if processes > 1 else None
    host, port = find_address(flags.dist_url)
    command += ["--nnodes", str(nodes), "--node_rank", str(node), "--master_addr", host, "--master_port", port]
    return [*command, "-m", module, *rest]


def count_gpus() -> int:
    """GPUs that this process sees, at least 1."""
    import torch  # takes seconds, which a mistyped flag should not cost

    return max(1, torch.cuda.device_count())


def show_gpus(gpus: Sequence[int]) -> None:
    """Hides all other GPUs. Ids count the visible GPUs, as in torch. Raises ValueError for one that does not exist."""
    if min(gpus) < 0:  # CUDA would show no GPU at all
        raise ValueError(f"GPUs are counted from 0, got {min(gpus)}: to run without a GPU, use --device cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    if names and max(gpus) >= len(names):
        raise ValueError(
            f"--gpu {max(gpus)} does not exist: CUDA_VISIBLE_DEVICES={visible} leaves {counted(len(names), 'GPU')}, "
            "counted from 0"
        )
    if visible != "":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] if names else str(i) for i in gpus)


def count_nodes(flags: argparse.Namespace) -> tuple[int, int]:
    """(number of nodes, this node's number) from --world-size and --rank or, with env://, from the variables.

    Raises ValueError for a node number that is too large.
    """
    variables = os.environ if flags.dist_url.startswith("env://") else {}
    nodes = flags.world_size if flags.world_size != -1 else int(variables.get("WORLD_SIZE", 1))
    node = flags.rank if flags.rank != -1 else int(variables.get("RANK", 0))
    if not 0 <= node < nodes:
        raise ValueError(f"--rank {node} must be a node's number, below --world-size {nodes}, the number of nodes")
    return nodes, node


def find_address(dist_url: str) -> tuple[str, str]:
    """(host, port) where the nodes meet. Raises ValueError when --dist-url is not an address."""
    if dist_url and not dist_url.startswith("env://"):
        address = urlparse(dist_url)
        host, port = address.hostname, str(address.port or "")
    else:
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "29500")
    if not host or not port:
        missing = f"--dist-url {dist_url} has" if dist_url else "neither --dist-url nor MASTER_ADDR names"
        raise ValueError(f"{missing} no host and port: use --dist-url tcp://HOST:PORT")
    return host, port


def in_our_units(argv: list[str], nodes: int, processes: int, node_batch: int) -> list[str]:
    """The same command line where -b counts all nodes' images, not one's, and -j a process's threads, not a node's."""
    argv = change_number(argv, "-b", "--batch-size", lambda images: images * nodes)
    argv = change_number(argv, "-j", "--workers", lambda threads: math.ceil(threads / processes))
    given = {word.partition("=")[0] for word in argv}
    if nodes == 1 or {"-b", "--batch-size", "--config"} & given:  # a recipe's batch is that of the whole run
        return argv
    return ["-b", str(node_batch * nodes), *argv]


def change_number(argv: list[str], short: str, long: str, change: Callable[[int], int]) -> list[str]:
    """The same command line with the number after a flag changed: -b 64, -b64, -b=64, --batch-size=64."""
    spelt = re.compile(rf"^({short}|{long}(?==))=?(\d+)$")
    result = [word for item in argv for word in (spelt.findall(item) or [[item]])[0]]
    for i, word in enumerate(result[:-1]):
        if word in (short, long) and result[i + 1].isdecimal():  # what is no number is named later
            result[i + 1] = str(change(int(result[i + 1])))
    return result


def launch_if_asked(argv: Sequence[str], module: str, node_batch: int | None = None) -> list[str]:
    """Becomes torchrun when the command line asks for it; otherwise returns it without the launch flags.

    node_batch: see `launch_command`.
    """
    flags, rest = split_launch_flags(argv)
    if "LOCAL_RANK" in os.environ:  # torchrun started this process
        return rest
    command = launch_command(argv, module, node_batch)
    if command is not None:
        print("fastssl: " + " ".join(["torchrun", *command[3:]]), file=sys.stderr, flush=True)
        os.execv(command[0], command)
    if flags.multiprocessing_distributed:
        for name in ("RANK", "WORLD_SIZE"):  # they count nodes there, but processes here
            os.environ.pop(name, None)
    return rest
