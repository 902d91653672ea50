"""The ranks of a run, from torchrun's environment, and what they tell each other: nothing if there is one process."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastssl.machine import nvidia
from fastssl.machine.limits import usable_cores

TIMEOUT = timedelta(minutes=10)  # for a collective of training, and for the ranks to meet
TASKS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}  # who counts what it started in which


class Ranks(NamedTuple):
    """This process's place among the processes of a run."""

    rank: int
    world_size: int
    device: torch.device


def start(device: str = "auto", patience: timedelta | None = None) -> Ranks:
    """Joins the process group if torchrun's variables are set (NCCL on GPUs, gloo on CPUs) and picks the device.

    patience: how long a rank waits for another that works on, by default TIMEOUT; one that ended is noticed at once.
    Raises ValueError when CUDA is requested but not available, and for variables that torchrun cannot have set.
    """
    cuda = means_cuda(device)
    rank, world_size, local_rank = read_ranks()
    say_if_alone()
    target = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"local rank {local_rank} has no GPU: use --nproc_per_node {gpus}, the GPUs of this node")
        torch.cuda.set_device(target)
    elif device == "auto" and rank == 0:
        nvidia.say_if_unused()
    limit_threads()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Decisions of the host (stop, resume) go through gloo, so that they never wait for the GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=open_store(),
            rank=rank,
            world_size=world_size,
            timeout=patience or TIMEOUT,
        )
    return Ranks(rank, world_size, target)


def means_cuda(device: str) -> bool:
    """Whether --device auto, cpu or cuda is a GPU here. Raises ValueError when CUDA is requested but not available."""
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("--device cuda: torch finds no GPU; run `fastssl doctor` to learn why, or use --device cpu")
    return cuda


def say_if_alone() -> None:
    """Tells, on stderr, one of several processes of srun or mpirun that it will not meet the others."""
    for name, program in TASKS.items():
        if "WORLD_SIZE" not in os.environ and os.environ.get(name, "1") != "1":
            alone = f"{program} started {os.environ[name]} processes, and each is a run of its own"
            print(f"fastssl: {alone}: for one run on all of them start torchrun (recipes/slurm)", file=sys.stderr)


def limit_threads() -> None:
    """Keeps torch's threads to the cores that may be used: it knows nothing of limits on processor time.

    OMP_NUM_THREADS goes before.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def read_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's variables. Raises ValueError when they are incomplete or wrong."""
    if "WORLD_SIZE" not in os.environ:  # a single process, even if an earlier shell left other variables
        return 0, 1, 0
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        names = " and ".join(missing)
        raise ValueError(f"WORLD_SIZE is set without {names}: start with torchrun, or unset WORLD_SIZE")
    words = [os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(word.isdecimal() for word in words) or int(words[0]) >= int(words[1]):
        found = "RANK={}, WORLD_SIZE={}, LOCAL_RANK={}".format(*words)
        raise ValueError(f"{found} make no sense together: start with torchrun, or unset WORLD_SIZE")
    rank, world_size, local_rank = map(int, words)
    return rank, world_size, local_rank


def open_store() -> dist.Store:
    """The store through which the ranks meet, separate for each restart of the run.

    torchrun keeps one store for all its restarts, with the addresses of processes that are gone. On one node each
    restart gets a prefix of its own. With several nodes there is no restart number that all nodes agree on: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun open a new store (recipes/slurm).
    """
    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    except dist.DistError:
        address, size = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", os.environ["WORLD_SIZE"]
        raise ValueError(f"{size} ranks did not meet at {address} within {TIMEOUT}: start all with torchrun") from None
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return store
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_object(value: object, ranks: Ranks) -> object:
    """Rank 0's value, on every rank; sent through the host."""
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: object, ranks: Ranks) -> list:
    """Every rank's value in rank order, on every rank; sent through the host."""
    if ranks.world_size == 1:
        return [value]
    values: list = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def gather_rows(x: Tensor, ranks: Ranks) -> Tensor:
    """(B, ...) on each rank -> (W * B, ...) in rank order. No gradient flows through it."""
    if ranks.world_size == 1:
        return x
    result = x.new_empty(ranks.world_size * x.shape[0], *x.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.14 renamed it
    gather(result, x.contiguous())
    return result


def mean_over_ranks(metrics: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """The metrics of all ranks, averaged. Waits for the device."""
    means = gather_rows(torch.stack(list(metrics.values())).float()[None], ranks).mean(dim=0)
    return dict(zip(metrics, means.tolist()))
