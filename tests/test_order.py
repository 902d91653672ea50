"""The order of batches: complete, disjoint, the same for any number of ranks, a function of (seed, epoch) alone."""

import itertools
import time

import pytest
import torch

from fastssl.loaders.order import (
    Order,
    batch_share,
    count_batches,
    epoch_order,
    eval_share,
    eval_shares,
    train_shares,
)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = {(seed, epoch): tuple(epoch_order(1000, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(1000)) for order in orders.values())
    assert len(set(orders.values())) == 6
    assert orders[0, 1] == tuple(epoch_order(1000, 0, 1).tolist())


def test_order_is_shuffled_evenly():
    # the mean distance of two neighbours in a random order of n is (n + 1) / 3
    order = epoch_order(3000, 5, 3)
    assert (order[1:] - order[:-1]).abs().double().mean().item() == pytest.approx(1000, rel=0.05)
    assert (order[:1500] < 1500).double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_images", [64, 97, 128])
def test_ranks_together_see_what_one_process_sees(num_images, world_size):
    alone = take(train_shares(num_images, 16, seed=3), 20)
    ranks = [take(train_shares(num_images, 16 // world_size, 3, rank, world_size), 20) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), whole)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_shows_each_image_at_most_once_and_drops_only_the_tail(world_size):
    num_images, batch_size = 103, 5
    steps = count_batches(num_images, batch_size, world_size)
    seen = torch.cat(
        [torch.cat(take(train_shares(num_images, batch_size, 0, r, world_size), steps)) for r in range(world_size)]
    )
    assert len(seen) == steps * batch_size * world_size > num_images - batch_size * world_size
    assert len(set(seen.tolist())) == len(seen)


def test_resume_at_any_batch_equals_the_uninterrupted_order():
    whole = take(train_shares(50, 8, seed=1), 20)  # 6 batches an epoch
    for first in range(15):
        resumed = take(train_shares(50, 8, seed=1, first=first), 5)
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole[first:]))


def test_shares_follow_the_written_rule():
    order = torch.arange(100) * 7 % 100
    assert batch_share(order, 2, batch_size=3, rank=1, world_size=4).tolist() == order[27:30].tolist()


def test_too_few_images_is_one_clear_sentence():
    assert count_batches(32, 8, 4) == 1
    with pytest.raises(ValueError, match=r"31 images .* 32 .*4 ranks.*at most 28 in all"):
        count_batches(31, 8, 4)
    with pytest.raises(ValueError, match=r"3 images but a step takes 4 .*at most 3"):
        count_batches(3, 4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        count_batches(3, 0)
    with pytest.raises(ValueError, match=r"2 images.*use fewer ranks"):
        count_batches(2, 1, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_images", [1, 5, 24])
def test_eval_shares_are_everything_once_in_file_order(num_images, world_size):
    shares = [eval_share(num_images, rank, world_size) for rank in range(world_size)]
    assert torch.cat(shares).tolist() == list(range(num_images))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_eval_limit_is_spread_evenly():
    assert eval_share(10, limit=5).tolist() == [0, 2, 4, 6, 8]
    assert eval_share(10, limit=99).tolist() == list(range(10))
    chosen = eval_share(1000, limit=300)
    assert len(set(chosen.tolist())) == 300
    assert torch.bincount(chosen // 100).tolist() == [30] * 10  # ten classes of 100 files each
    halves = [eval_share(1000, rank, 2, 300) for rank in range(2)]
    assert torch.equal(torch.cat(halves), chosen)
    with pytest.raises(ValueError, match="limit of 0"):
        eval_share(10, limit=0)


def test_eval_batches_keep_the_tail_and_are_never_empty():
    assert [len(share) for share in eval_shares(10, 4)] == [4, 4, 2]
    assert list(eval_shares(1, 4, rank=0, world_size=2)) == []


BLOCKS = Order("blocks", block_size=3)


@pytest.mark.parametrize("num_images", [1, 2, 3, 97, 1000])
def test_block_shuffled_orders_are_permutations_that_change_with_seed_and_epoch(num_images):
    orders = {(s, e): tuple(epoch_order(num_images, s, e, order=BLOCKS).tolist()) for s in (0, 1) for e in (0, 1, 2)}
    assert all(sorted(order) == list(range(num_images)) for order in orders.values())
    assert num_images < 97 or len(set(orders.values())) == 6
    assert orders[1, 2] == tuple(epoch_order(num_images, 1, 2, order=BLOCKS).tolist())


def test_block_shuffled_reads_stay_within_a_window_of_blocks(monkeypatch):
    monkeypatch.setattr("fastssl.loaders.order.WINDOW_BLOCKS", 4)
    order = epoch_order(1000, 3, 1, order=BLOCKS)  # 333 whole blocks and one of a single image, in 84 windows
    windows, start = [], 0
    while start < 1000:
        blocks, end = set(), start
        while end < 1000 and len(blocks | {int(order[end]) // 3}) <= 4:
            blocks.add(int(order[end]) // 3)
            end += 1
        windows.append(blocks)
        start = end
    assert len(windows) == 84 and sum(map(len, windows)) == 334 == len(set().union(*windows))
    first = torch.tensor([min(blocks) for blocks in windows]).double()
    assert torch.corrcoef(torch.stack([first, torch.arange(84.0).double()]))[0, 1].abs() < 0.3  # not in file order
    inside = order[: len(windows[0]) * 3].tolist()
    assert inside != sorted(inside) and any(abs(a - b) > 3 for a, b in itertools.pairwise(inside))


def test_few_blocks_are_mixed_as_evenly_as_all_images():
    order = epoch_order(3000, 5, 3, order=Order("blocks", block_size=100))
    assert (order[1:] - order[:-1]).abs().double().mean().item() == pytest.approx(1000, rel=0.05)
    assert (order[:1500] < 1500).double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("world_size", [2, 4])
def test_block_shuffled_ranks_see_what_one_process_sees_from_any_batch(world_size):
    alone = take(train_shares(103, 16, seed=3, order=BLOCKS), 20)
    for first in (0, 5, 6, 13):
        ranks = [
            take(train_shares(103, 16 // world_size, 3, rank, world_size, first, order=BLOCKS), 7)
            for rank in range(world_size)
        ]
        for step in range(7):
            assert torch.equal(torch.cat([rank[step] for rank in ranks]), alone[first + step])


def test_two_million_images_are_ordered_in_seconds():
    start = time.process_time()
    order = epoch_order(2_000_000, 0, 0, order=Order("blocks"))
    assert time.process_time() - start < 20
    assert torch.equal(torch.bincount(order), torch.ones(2_000_000, dtype=torch.int64))


@pytest.mark.parametrize(("order", "words"), [(("block",), "'full' or 'blocks'"), (("blocks", 0), "at least 1")])
def test_an_impossible_order_is_one_clear_sentence(order, words):
    with pytest.raises(ValueError, match=words):
        Order(*order)
