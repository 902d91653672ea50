"""The helpers of the tests: ranks must fail loudly (an error, a death, a hang), poisoned memory must show."""

import os
import time

import pytest
import torch
from ranks import run_ranks
from torch import distributed


def gather(rank, world_size, base):
    mine = torch.tensor([base + rank])
    everyone = [torch.zeros_like(mine) for _ in range(world_size)]
    distributed.all_gather(everyone, mine)
    assert os.environ["RANK"] == str(rank)
    return torch.cat(everyone), rank


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise ValueError("rank 1 has a reason")
    distributed.barrier()


def die(rank, world_size):
    os._exit(3)


def hang(rank, world_size):
    time.sleep(600)


def test_results_come_in_rank_order():
    for rank, (everyone, returned) in enumerate(run_ranks(gather, 2, 10)):
        assert everyone.tolist() == [10, 11]
        assert returned == rank


def test_the_failing_rank_is_named_with_its_reason():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*rank 1 has a reason"):
        run_ranks(fail_on_rank_1, 2)


@pytest.mark.parametrize(("function", "reason"), [(die, "rank 0 ended without a result"), (hang, "did not finish")])
def test_death_and_hanging_end(function, reason):
    with pytest.raises(RuntimeError, match=reason):
        run_ranks(function, 1, timeout=60 if function is die else 2)


def test_poisoned_memory_is_nan(nan_poisoned_empty):
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(2, 2).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.int32)).tolist() == [2**31 - 1] * 2


@pytest.mark.gpu
def test_a_gpu_test_runs_on_a_gpu():
    assert torch.ones(1, device="cuda").is_cuda
