"""MoCo's state: queue and moving average, against the obvious computation."""

from collections import deque

import pytest
import torch
from torch import nn

from fastssl.moco import MoCo


def make_moco(dim=4, queue_size=7, seed=0):
    return MoCo(nn.Sequential(nn.Linear(3, dim), nn.BatchNorm1d(dim)), dim, queue_size, seed)


@pytest.mark.parametrize(("queue_size", "batch"), [(8, 4), (7, 3), (5, 5), (5, 8), (1, 3), (12, 5), (3, 7)])
def test_queue_holds_what_a_deque_would_hold(queue_size, batch):
    moco = make_moco(queue_size=queue_size)
    naive = deque(moco.queue.clone(), maxlen=queue_size)
    pointer = 0
    for step in range(9):
        keys = torch.full((batch, 4), float(step)) + torch.arange(batch)[:, None] / 100
        moco.update_queue(keys)
        naive.extend(keys)
        pointer = (pointer + batch) % queue_size
        assert moco.queue_ptr.tolist() == [pointer]
        oldest_first = moco.queue.roll(-pointer, dims=0)
        assert torch.equal(oldest_first, torch.stack(list(naive)))


def test_queue_is_written_in_place():
    moco = make_moco()
    before = moco.queue.data_ptr()
    moco.update_queue(torch.ones(3, 4))
    assert moco.queue.data_ptr() == before


def test_queue_starts_as_unit_rows_that_depend_on_the_seed_alone():
    torch.manual_seed(123)
    first = make_moco(queue_size=100, seed=5).queue
    torch.manual_seed(321)
    assert torch.equal(first, make_moco(queue_size=100, seed=5).queue)
    assert not torch.equal(first, make_moco(queue_size=100, seed=6).queue)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(100))
    assert first.mean().abs() < 0.1


def test_moving_average_of_parameters_only():
    moco = make_moco()
    with torch.no_grad():
        for p in moco.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    moco.encoder_q[1].running_mean.fill_(9.0)
    theta_q = [p.detach().double() for p in moco.encoder_q.parameters()]
    theta_k = [p.detach().double() for p in moco.encoder_k.parameters()]
    buffers = [b.clone() for b in moco.encoder_k.buffers()]
    moco.update_key_encoder(0.9)
    for new, q, k in zip(moco.encoder_k.parameters(), theta_q, theta_k):
        torch.testing.assert_close(new.double(), 0.9 * k + 0.1 * q, rtol=1e-6, atol=1e-7)
        assert not new.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(moco.encoder_k.buffers(), buffers))


def test_the_encoders_start_equal_and_share_no_memory():
    moco = make_moco()
    for q, k in zip(moco.encoder_q.parameters(), moco.encoder_k.parameters()):
        assert torch.equal(q, k) and q.data_ptr() != k.data_ptr()
