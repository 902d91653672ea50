"""What ranks say to each other: rows in rank order, the key shuffle and its undoing, one decision to stop."""

import contextlib
import io
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_ranks

from fastssl import distributed
from fastssl.command import FAILED, run_command
from fastssl.distributed import Ranks, gather_rows
from fastssl.key_shuffle import shuffle_rows, unshuffle_keys
from fastssl.machine import nvidia
from fastssl.random_key import STREAM_SHUFFLE, permutation
from fastssl.stop_signal import StopSignal

CPU = torch.device("cpu")


def exchange(rank, world_size, size, dtype_name):
    """Sends rows that carry their own global number, as views would travel, and brings keys back."""
    ranks = Ranks(rank, world_size, CPU)
    dtype = getattr(torch, dtype_name)
    total = world_size * size
    numbers = torch.arange(rank * size, (rank + 1) * size)
    for step in range(3):
        layout = torch.contiguous_format if step == 2 else torch.channels_last
        view = numbers[:, None, None, None].expand(-1, 3, 4, 5).to(dtype).contiguous(memory_format=layout)
        order = permutation(1, step, total, STREAM_SHUFFLE)
        shuffled = shuffle_rows(view, order, ranks)
        assert shuffled.shape == view.shape and shuffled.dtype == dtype
        assert shuffled.is_contiguous(memory_format=layout)
        assert torch.equal(shuffled[:, 0, 0, 0].long(), order[rank * size : (rank + 1) * size])
        keys = unshuffle_keys(shuffled[:, :2, 0, 0].float(), order, ranks)
        assert torch.equal(keys[:, 1], torch.arange(total).float())
    assert torch.equal(gather_rows(numbers, ranks), torch.arange(total))


def vote(rank, world_size):
    """The step at which each rank leaves when a signal reaches rank 1 alone in step 2."""
    stop = StopSignal(Ranks(rank, world_size, CPU))
    for step in range(6):
        stop.asked = stop.asked or (step == 2 and rank == 1)
        if stop():
            return step
    return None


def talk(rank, world_size):
    for size, dtype in [(5, "float32"), (4, "bfloat16"), (1, "float16")]:
        exchange(rank, world_size, size, dtype)
    return vote(rank, world_size)


def test_over_ranks_shuffle_then_unshuffle_is_the_identity_and_all_stop_at_the_same_step():
    assert run_ranks(talk, 3) == [3, 3, 3]


def lose_a_rank(rank, world_size):
    """(exit code, what is said) where rank 1 leaves while rank 0 waits for it."""
    pair = dist.new_group()

    def command(argv):
        if rank == 1:
            dist.destroy_process_group(pair)
            raise ValueError("mend it")
        dist.barrier(pair)

    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = run_command(command, [])
    return code, said.getvalue()


def test_a_rank_that_waits_for_one_that_is_gone_says_so_in_one_sentence():
    (code, said), other = run_ranks(lose_a_rank, 2)
    assert code == FAILED and said.count("\n") == 1
    assert re.match(r"fastssl: error: another rank has ended, or does not answer \(.*(closed|reset) by peer", said)
    assert other == (FAILED, "fastssl: error: mend it (rank 1)\n")


def test_on_one_process_shuffle_then_unshuffle_is_the_identity():
    exchange(0, 1, 6, "float32")


@pytest.mark.parametrize(
    ("left", "sentence"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set without RANK and MASTER_ADDR and MASTER_PORT: start with torchrun, or",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "WORLD_SIZE is set without MASTER_ADDR:"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0 make no sense together"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "RANK=0, WORLD_SIZE=two, LOCAL_RANK=0 make no sense together"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 make no sense together"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "2 ranks did not meet at 127.0.0.1:"),
    ],
)
def test_variables_an_earlier_shell_left_are_one_sentence(monkeypatch, left, sentence):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**(address if "is set" not in sentence else {}), **left}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        distributed.start("cpu")


def test_without_a_world_size_other_variables_do_not_count(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    assert distributed.start("cpu")[:2] == (0, 1)


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_will_not_meet_are_told_so(monkeypatch, capsys, variable):
    """As under `srun --ntasks 8 python -m fastssl.train`."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for tasks, told in (("1", False), ("8", True)):
        monkeypatch.setenv(variable, tasks)
        assert distributed.start("cpu")[:2] == (0, 1)
        assert ("started 8 processes, and each is a run of its own" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("device", "driver", "visible", "said"),
    [("auto", True, None, True), ("auto", True, "-1", False), ("auto", False, None, False), ("cpu", True, None, False)],
)
def test_a_gpu_that_torch_does_not_find_is_mentioned(monkeypatch, capsys, device, driver, visible, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvidia, "has_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert distributed.start(device).device == CPU
    assert ("fastssl doctor" in capsys.readouterr().err) == said
