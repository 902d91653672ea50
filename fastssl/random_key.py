"""Randomness as a pure function: a counter-based hash on int64 tensors, with the same results on CPU and GPU.

    bits = philox(seed; index, epoch, stream, draw)

There is no generator with a state. So results do not depend on the loader or on the numbers of workers and ranks, and a
run resumed in the middle of an epoch needs nothing saved. The hash is Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011); `tl.philox` computes the same words inside a Triton kernel.
"""

from __future__ import annotations

from operator import index as whole
from typing import TypeVar

import torch
from torch import Tensor

# Each use of randomness has a stream of its own. View q is stream 0, view k stream 1.
STREAM_PAIR = 2  # crops drawn for both views together
STREAM_ORDER = 16  # the order of an epoch
STREAM_SHUFFLE = 17  # the key shuffle of a step
STREAM_STEP = 18  # the seed of torch's own generators (dropout) in a step
STREAM_SYNTHETIC = 19  # synthetic images
STREAM_QUEUE = 20  # the queue's initial rows
STREAM_DEMO = 21  # the demo's pictures
STREAM_HELD_OUT = 22  # which training images a probe holds out if there is no held-out split
STREAM_BLOCKS = 23  # the order of an epoch's blocks

Word = TypeVar("Word", Tensor, int)

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Word, Word, Word, Word], seed: int) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: maps four uint32 words, held in int64 tensors or ints, to four; `seed` is the 64-bit key."""
    c0, c1, c2, c3 = counter
    seed = whole(seed)  # NumPy's integers overflow where Python's do not
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap around to the right 64 bits; the masks cut them into unsigned words
        product0, product1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, epoch: int, index: Tensor, stream: int, num: int) -> Tensor:
    """`num` independent uint32 words for each sample, (B, num) int64.

    seed: any int, of which the low 64 bits count; epoch in [0, 2^32); index: (B,) non-negative integers; stream in
    [0, 2^16). Word d of a sample depends only on (seed, epoch, index, stream, d), not on `num` or on other samples.
    """
    index, blocks = index.long(), (num + 3) // 4  # int32 arithmetic would overflow
    draw = torch.arange(blocks, device=index.device)
    shape = (index.shape[0], blocks)
    counter = (
        (index & _MASK)[:, None].expand(shape),
        (index >> 32)[:, None].expand(shape),
        torch.full((1, 1), whole(epoch) & _MASK, device=index.device).expand(shape),
        (draw | (stream << 16))[None, :].expand(shape),
    )
    return torch.stack(philox(counter, seed), dim=-1).reshape(index.shape[0], blocks * 4)[:, :num]


def uniform(seed: int, epoch: int, index: Tensor, stream: int, num: int) -> Tensor:
    """`num` uniforms in [0, 1) for each sample, (B, num) float32: the top 24 bits, so exact on every device."""
    return (random_bits(seed, epoch, index, stream, num) >> 8).to(torch.float32) * 2.0**-24


def permutation(seed: int, epoch: int, size: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of range(size), (size,) int64, as a function of (seed, epoch, stream), the same on every rank."""
    words = random_bits(seed, epoch, torch.arange(size, device=device), stream, 2)
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)


def derive_seed(seed: int, epoch: int, stream: int, index: int = 0) -> int:
    """A 63-bit seed for another generator, such as torch's, as a function of (seed, epoch, stream, index)."""
    epoch, index = whole(epoch), whole(index)
    word0, word1, _, _ = philox((index & _MASK, index >> 32, epoch & _MASK, stream << 16), seed)
    return (word0 << 31) | (word1 >> 1)
