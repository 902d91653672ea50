"""The counter-based key: Philox's published vectors, independence of the batch, permutations, uniformity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastssl.random_key import derive_seed, permutation, philox, random_bits, uniform

ONES = 0xFFFFFFFF
# counter, key (low word first), result: Random123's known answers for philox4x32-10
VECTORS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), key[0] | key[1] << 32)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_words_are_philox_of_the_documented_counter() -> None:
    """Against Philox in Python integers: block d of a sample is counter (index low, index high, epoch, d | stream)."""

    def reference(c: list[int], k: list[int]) -> list[int]:
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & ONES, (a >> 32) ^ c[3] ^ k[1], a & ONES]
            k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
        return c

    index, seed, epoch, stream = (5 << 32) + 77, 2**63 + 12345, 9, 3
    words = random_bits(seed, epoch, torch.tensor([index]), stream, 10)[0].tolist()
    blocks = [reference([77, 5, epoch, d | stream << 16], [seed & ONES, seed >> 32]) for d in range(3)]
    assert words == [word for block in blocks for word in block][:10]


def test_words_do_not_depend_on_the_batch_or_on_how_many_are_drawn() -> None:
    index = torch.tensor([3, 1 << 40, 0, 7, 7])
    words = random_bits(11, 2, index, 1, 13)
    for i in range(5):
        assert torch.equal(random_bits(11, 2, index[i : i + 1], 1, 6)[0], words[i, :6])
    assert torch.equal(random_bits(11, 2, index.flip(0), 1, 13), words.flip(0))
    assert torch.equal(words[3], words[4])


def test_words_do_not_depend_on_the_width_of_the_index() -> None:
    index = torch.tensor([0, 3, 250])
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(random_bits(11, 2, index.to(dtype), 1, 5), random_bits(11, 2, index, 1, 5))


def test_every_part_of_the_key_matters() -> None:
    index = torch.arange(4)
    first = random_bits(1, 2, index, 0, 8)
    others = [random_bits(2, 2, index, 0, 8), random_bits(1, 3, index, 0, 8), random_bits(1, 2, index, 1, 8)]
    others += [random_bits(1, 2, index + 4, 0, 8), random_bits(1 + 2**32, 2, index, 0, 8)]
    for other in others:
        assert not torch.isin(other, first).any()


def test_uniform_is_uniform() -> None:
    u = uniform(0, 0, torch.arange(20_000), 0, 8)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5  # 4 deviations above the mean of chi square with 63 degrees
    correlation = np.corrcoef(u.double().numpy().T) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / 20_000**0.5


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutations_are_permutations(size: int) -> None:
    orders = [permutation(seed, epoch, size, 16) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(size))
    if size == 1000:
        assert all(not torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
        assert torch.equal(orders[0], permutation(0, 0, size, 16))


def test_every_permutation_of_four_is_as_likely() -> None:
    keys = [tuple(permutation(0, epoch, 4, 16).tolist()) for epoch in range(1920)]
    counts = np.unique(np.array(keys), axis=0, return_counts=True)[1]
    assert len(counts) == 24 and np.abs(counts - 80).max() < 4.5 * 80**0.5


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(s, e, 18, i) for s in range(3) for e in range(3) for i in range(3)}
    assert len(seeds) == 27 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_integers_of_other_libraries_are_integers(kind) -> None:
    assert derive_seed(kind(2**31 - 1), kind(7), 20, kind(3)) == derive_seed(2**31 - 1, 7, 20, 3)
    order = permutation(kind(3), kind(7), 20, 16)
    assert torch.equal(order, permutation(3, 7, 20, 16))
