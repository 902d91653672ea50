"""What ranks say to each other: rows in rank order, the key shuffle and its undoing, one decision to stop."""

import pytest
import torch
from ranks import run_ranks

from fastssl.distributed import Ranks, StopSignal, gather_rows, shuffle_rows, unshuffle_keys
from fastssl.random_key import STREAM_SHUFFLE, permutation

CPU = torch.device("cpu")


def exchange(rank, world_size, size, dtype_name):
    """Sends rows that carry their own global number, as views would travel, and brings keys back."""
    ranks = Ranks(rank, world_size, world_size, CPU)
    dtype = getattr(torch, dtype_name)
    total = world_size * size
    numbers = torch.arange(rank * size, (rank + 1) * size)
    view = numbers[:, None, None, None].expand(-1, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    for step in range(3):
        order = permutation(1, step, total, STREAM_SHUFFLE)
        shuffled = shuffle_rows(view, order, ranks)
        assert shuffled.shape == view.shape and shuffled.dtype == dtype
        assert shuffled.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(shuffled[:, 0, 0, 0].long(), order[rank * size : (rank + 1) * size])
        keys = unshuffle_keys(shuffled[:, :2, 0, 0].float(), order, ranks)
        assert torch.equal(keys[:, 1], torch.arange(total).float())
    assert torch.equal(gather_rows(numbers, ranks), torch.arange(total))
    return True


@pytest.mark.parametrize(("world_size", "size", "dtype"), [(2, 5, "float32"), (3, 4, "bfloat16"), (2, 1, "float16")])
def test_shuffle_then_unshuffle_is_the_identity_over_ranks(world_size, size, dtype):
    assert run_ranks(exchange, world_size, size, dtype) == [True] * world_size


def test_shuffle_then_unshuffle_is_the_identity_on_one_process():
    assert exchange(0, 1, 6, "float32")


def vote(rank, world_size):
    stop = StopSignal(Ranks(rank, world_size, world_size, CPU))
    stopped_at = None
    for step in range(6):
        if step == 2 and rank == 1:
            stop.asked = True  # a signal that reaches one rank alone
        if stop() and stopped_at is None:
            stopped_at = step
    return stopped_at


def test_all_ranks_stop_at_the_same_step_when_one_is_asked():
    assert run_ranks(vote, 3) == [3, 3, 3]
