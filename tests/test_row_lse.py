"""The Triton kernels: through the interpreter on a CPU (float32, float16), compiled on a GPU (bfloat16 too).

The tolerance is the dtype's own: the kernel may be at most twice as wrong as plain PyTorch in the same dtype.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import library

from fastssl.bench.loss import published_loss
from fastssl.kernels.queue_loss import queue_loss
from fastssl.kernels.queue_loss_finish import finish_rows
from fastssl.kernels.reference import row_lse_reference
from fastssl.kernels.row_lse import _add_parts, row_lse
from fastssl.kernels.row_lse_blocks import DIMS, Blocks, find_blocks, table_blocks
from fastssl.kernels.row_lse_pass import _as_operand
from fastssl.kernels.row_lse_plan import dot_precision, split_queue, weight_factors, weights_need_float32
from fastssl.kernels.row_lse_tiled import MAX_SCALE, row_lse_tiled
from fastssl.losses import LossConfig, moco_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]  # the interpreter's bf16 is wrong
SHAPES = [
    (1, 1, 32),
    (2, 1, 64),
    (7, 13, 32),
    (31, 1009, 64),
    "above blocks 32",
    "above blocks 128",
    "above blocks 256",
]


def shape_of(shape, scales):
    """(N, K, D); one row above the block sizes of that D where asked for."""
    if isinstance(shape, tuple):
        return shape
    dim = int(shape.split()[-1])
    blocks, _ = find_blocks(torch.device(DEVICE), dim, scales, 2)
    return blocks.block_n + 1, blocks.block_k + 1, dim


def make_rows(n, k, d, dtype, peaked=False, seed=0):
    """(z, queue): float32 projections on the device, and unit rows in `dtype`, some near-duplicates of z if peaked."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, d, generator=generator)
    queue = torch.randn(k, d, generator=generator)
    if peaked:
        rows = torch.randperm(k, generator=generator)[: max(1, min(n, k) // 2)]
        queue[rows] = z[: len(rows)] + 0.05 * torch.randn(len(rows), d, generator=generator)
    return z.to(DEVICE), F.normalize(queue, dim=1).to(DEVICE, dtype)


def assert_at_most_twice_as_wrong(found, plain, truth, slack=0.0):
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert ours.isfinite().all()
        float32 = 2e-6 if DEVICE == "cuda" else 1e-6  # a GPU's exp2 is a few units off, at every scale of the logits
        allowed = 2 * (theirs.double() - exact).abs().max() + float32 * max(1, exact.abs().max()) + slack
        assert (ours.double() - exact).abs().max() <= allowed


def lse_and_gradient(function, z, queue, scales, dtype):
    """lse (C, N) and the gradient at z of a sum of it with weights other than 1, with q in `dtype`."""
    z = z.detach().requires_grad_()
    lse = function(F.normalize(z, dim=1).to(dtype), queue, scales)[0]
    weights = torch.linspace(-1.0, 2.0, lse.numel(), device=lse.device).view_as(lse)
    (gradient,) = torch.autograd.grad((lse.to(torch.promote_types(lse.dtype, torch.float32)) * weights).sum(), z)
    return lse.detach(), gradient


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("scales", [[6.0], [20.0, 6.0]], ids=["one", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_lse_is_at_most_twice_as_wrong_as_plain(dtype, shape, scales, peaked, nan_poisoned_empty):
    z, queue = make_rows(*shape_of(shape, len(scales)), dtype, peaked)
    found = lse_and_gradient(row_lse, z, queue, scales, torch.float32)
    plain = lse_and_gradient(row_lse_reference, z, queue, scales, dtype)
    truth = lse_and_gradient(row_lse_reference, z.double(), queue.double(), scales, torch.float64)
    # of a single number luck decides who rounds the operands better: it may be as wrong as they are
    lone = z.shape[0] * queue.shape[0] == 1 and dtype == torch.bfloat16
    slack = max(scales) * torch.finfo(dtype).eps if lone else 0.0
    assert_at_most_twice_as_wrong(found, plain, truth, slack)


@pytest.mark.parametrize("scale", [0.5, 6.0, 13.0, 22.0, 40.0, MAX_SCALE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_allowed_scale_stays_in_range(dtype, scale):
    """The worst queues for a fixed shift: all rows opposite to the query, all equal to it, and ordinary ones."""
    row = F.normalize(torch.arange(1.0, 33, device=DEVICE)[None], dim=1)
    _, ordinary = make_rows(1, 40, 32, torch.float32)
    for queue in (-row.expand(40, -1), row.expand(40, -1), ordinary):
        queue = queue.to(dtype).contiguous()
        lse, mean, _ = row_lse(row, queue, [scale])
        truth, truth_mean, _ = row_lse_reference(row.double(), queue.double(), [scale])
        roundoff = torch.finfo(dtype).eps
        assert (lse - truth).abs().max() <= 1e-6 * max(1, scale) + scale * roundoff
        assert (mean - truth_mean).abs().max() <= 1e-6 + 4 * max(1, scale) * roundoff


@pytest.mark.parametrize("implementation", [row_lse, row_lse_tiled], ids=["triton", "tiled"])
def test_rows_can_leave_themselves_out(implementation):
    z, _ = make_rows(141, 1, 32, torch.float32)
    x = F.normalize(z, dim=1)
    x[3] = x[77]  # an equal row is not the row itself
    lse, mean, _ = implementation(x, x, [6.0], None, True)
    for i in (0, 3, 77, 140):
        others = torch.cat([x[:i], x[i + 1 :]]).double()
        logits = 6 * (others @ x[i].double() - 1)
        assert lse[0, i].item() == pytest.approx(torch.logsumexp(logits, 0).item(), abs=1e-5)
        torch.testing.assert_close(mean[0, i].double(), torch.softmax(logits, 0) @ others, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", [row_lse, row_lse_tiled], ids=["triton", "tiled"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 300), (141, 67)])
def test_rows_above_the_positive_are_counted(n, k, implementation):
    z, queue = make_rows(n, k, 32, torch.float32)
    x = F.normalize(z, dim=1)
    positive = torch.linspace(-0.3, 0.3, n, device=DEVICE)
    above = implementation(x, queue, [14.0], positive)[2]
    assert above.tolist() == [(queue @ x[i] > positive[i]).sum().item() for i in range(n)]


@pytest.mark.parametrize("implementation", [row_lse, row_lse_tiled], ids=["triton", "tiled"])
@pytest.mark.parametrize(
    ("x_shape", "y_shape", "words"),
    [
        ((4, 32), (9, 64), r"y_KD .*the D of x_ND.*\(4, 32\).*\(9, 64\)"),
        ((4, 32), (0, 32), r"y_KD is empty.*at least one row.*\(0, 32\)"),
        ((0, 32), (9, 32), r"x_ND is empty.*at least one row.*\(0, 32\)"),
        ((32,), (9, 32), r"x_ND must have a row.*\(32,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x_shape, y_shape, words, implementation):
    with pytest.raises(ValueError, match=words):
        implementation(torch.ones(x_shape, device=DEVICE), torch.ones(y_shape, device=DEVICE), [6.0])


def test_rows_that_the_kernel_would_misread_are_refused():
    x, y = torch.ones(4, 32, device=DEVICE), torch.ones(32, 9, device=DEVICE).T
    for tensors, words in (
        ((x, y), r"y_KD is not contiguous.*\(9, 32\)"),
        ((torch.ones(32, 4, device=DEVICE).T, x), "x_ND is not contiguous"),
        ((x.repeat(1, 3), x.repeat(1, 3)), "D = 96 is not one of 32, 64, 128, 256: take row_lse_tiled"),
    ):
        with pytest.raises(ValueError, match=words):
            row_lse(*tensors, [6.0])


def test_weights_of_16_bits_are_not_all_too_small():
    """Of a float16 queue at a sharp scale the second product is TF32, whose weights were once cut off, not rounded."""
    z, queue = make_rows(128, 500, 64, torch.float16)
    x = F.normalize(z, dim=1).half()
    error = row_lse(x, queue, [20.0])[0].double() - row_lse_reference(x.double(), queue.double(), [20.0])[0]
    assert abs(error.mean()) < 2e-5


@triton.jit
def _round_to_tf32(bits_ptr, found_ptr, NUM: tl.constexpr):
    i = tl.arange(0, NUM)
    weight = tl.load(bits_ptr + i).to(tl.float32, bitcast=True)
    tl.store(found_ptr + i, _as_operand(weight, tl.float32, "tf32"))


def test_rounding_to_tf32_keeps_nan():
    """Every operation of a GPU makes the NaN 0x7FFFFFFF, to which nothing can be added without passing into -0."""
    nan, negative_nan, infinity = 0x7FFFFFFF, 0xFFC00000 - 2**32, 0x7F800000
    one = 0x3F800000
    bits = torch.tensor([nan, 0x7FC00000, negative_nan, infinity, one, one + 4095, one + 4096, 0], device=DEVICE)
    found = torch.empty(8, device=DEVICE)
    _round_to_tf32[(1,)](bits.int(), found, NUM=8)
    assert found[:3].isnan().all()
    assert found[3:].tolist() == [float("inf"), 1.0, 1.0, 1 + 2**-10, 0.0]


def test_numbers_of_elements_may_pass_the_range_of_int32():
    """The first program of as many rows as have 2^31 elements; none of the others' rows are needed."""
    num, dim, rows = 2**26, 32, 32
    sums, means = torch.full((rows,), 2.0, device=DEVICE), torch.ones(rows, dim, device=DEVICE)
    lse, mean, terms = torch.empty_like(sums), torch.empty_like(means), torch.empty(4, num, device=DEVICE)
    sizes = {"D": dim, "C": 1, "BLOCK_R": rows, "BLOCK_P": 16}
    _add_parts[(1,)](sums, means, sums, lse, mean, sums, num, 1, 0.0, 0.0, COUNT_ABOVE=False, **sizes)
    assert (mean == 0.5).all()
    q, gradient, uniform = means, torch.empty_like(means), torch.empty_like(means)
    parts = (sums, means, sums, sums, means)
    flags = {"CONTRAST": True, "UNIFORM": True, "INSIDE": False, "SQUARED": True}
    numbers = (num, 1, 1, 6.0, 0.0, 1.0, 2.0, 0.0)
    finish_rows[(1,)](q, 0 * q, 0 * sums, *parts, terms, gradient, uniform, *numbers, **flags, **sizes)
    assert (uniform == 1).all() and (gradient > 0).all()


def test_same_bits_every_time():
    z, queue = make_rows(5, 300, 64, torch.float32)
    first, again = (row_lse(F.normalize(z, dim=1), queue, [14.0, 6.0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize("operator", [row_lse, row_lse_tiled, queue_loss], ids=lambda operator: operator._name)
def test_opcheck(operator):
    z, queue = make_rows(9, 50, 32, torch.float32)
    x = F.normalize(z, dim=1).requires_grad_()
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if operator is not row_lse_tiled and DEVICE == "cpu":
        tests.pop()  # the compiler cannot trace an interpreted kernel
    given = [
        (x, queue, [6.0]),
        (x, queue, [14.0, 6.0], torch.rand(9, device=DEVICE)),
        (x, x.detach(), [6.0], None, True),
    ]
    if operator is queue_loss:
        weights = (1.0, 0.2, 0.0, 2.0, 0.0, 3.0, False), (1.0, 0.2, 3.0, 1.5, 1.0, 3.0, True)
        given = [(x, x.detach(), queue, *settings) for settings in weights]
    for arguments in given:
        library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize(("contrast", "uniform", "left_out"), [(1.0, 0.0, [2]), (0.0, 1.0, [0, 3, 4])])
def test_results_follow_from_the_inputs_alone(contrast, uniform, left_out, nan_poisoned_empty):
    """Those of terms without a weight too: opcheck compares all that an operator returns."""
    z, queue = make_rows(9, 50, 32, torch.float32)
    x = F.normalize(z, dim=1)
    results = queue_loss(x, x, queue, contrast, 0.2, 0.0, 2.0, uniform, 3.0, True)
    assert all(result.isfinite().all() for result in results)
    assert (results[1][left_out] == 0).all()


def plain_loss(z, z_k, queue, config):
    """The weighted mix by the plain formulas, every tensor in the queue's dtype."""
    q, k = (F.normalize(x, dim=1).to(queue.dtype) for x in (z, z_k))
    return published_loss(q, k, queue, config)


MIXES = {
    "contrast": {"contrast_weight": 1.0, "align_weight": 0.0, "uniform_weight": 0.0},
    "uniform": {"align_weight": 0.0},
    "uniform, queue only": {"align_weight": 0.0, "intra_batch": False},
    "align and uniform": {"align_alpha": 1.5},
    "all": {"contrast_weight": 0.7, "align_weight": 1.3, "uniform_weight": 0.9},
}


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_is_at_most_twice_as_wrong_as_plain(dtype, mix, peaked, nan_poisoned_empty):
    config = LossConfig(**MIXES[mix], temperature=0.05)

    def evaluate(loss_of, z, *others):
        """The loss and its gradient at z times an upstream gradient, in one float64 vector."""
        z = z.detach().requires_grad_()
        loss = loss_of(z, *others, config)
        (gradient,) = torch.autograd.grad(-1.7 * loss, z)
        return torch.cat([loss.detach()[None].double(), gradient.flatten().double()])

    def ours(z, z_k, queue, config):
        return moco_loss(F.normalize(z, dim=1), F.normalize(z_k, dim=1), queue, config, "triton").total

    our_errors, plain_errors = [], []  # for several inputs: a single value may be right by luck
    for seed in range(4):
        z, queue = make_rows(19, 67, 32, dtype, peaked, seed)
        z_k = z + make_rows(19, 1, 32, dtype, seed=seed + 100)[0]
        truth = evaluate(plain_loss, z.double(), z_k.double(), queue.double())
        found = evaluate(ours, z, z_k, queue)
        assert found.isfinite().all()
        our_errors.append((found - truth).abs())
        plain_errors.append((evaluate(plain_loss, z, z_k, queue) - truth).abs())
    for part in (slice(0, 1), slice(1, None)):  # the value, the gradient
        ours_worst, plain_worst = (max(error[part].max() for error in errors) for errors in (our_errors, plain_errors))
        assert ours_worst <= 2 * plain_worst + 1e-6


def test_tf32_is_allowed_by_either_of_torchs_names():
    matmul = torch.backends.cuda.matmul
    names = ["fp32_precision", "ieee", "tf32"], ["allow_tf32", False, True]
    try:
        for name, no, yes in names if hasattr(matmul, "fp32_precision") else names[1:]:
            for value, expected in ((yes, "tf32"), (no, "ieee")):
                setattr(matmul, name, value)
                assert dot_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_parts_cover_the_queue_and_fill_the_device():
    blocks = Blocks(128, 64, 8, 3, 2)
    for num, num_keys in [(1, 1), (1, 64), (256, 65536), (1024, 65537), (4096, 4096), (100_000, 777)]:
        parts, keys_per_part = split_queue(num, num_keys, blocks, 132)
        assert (parts - 1) * keys_per_part < num_keys <= parts * keys_per_part
        assert keys_per_part % blocks.block_k == 0
    assert split_queue(256, 65536, blocks, 132)[0] * 2 >= 0.95 * 264  # two row blocks
    assert split_queue(100_000, 65536, blocks, 132)[0] == 1  # rows alone fill the device


@pytest.mark.parametrize("scale", [0.1, 6.0, 22.0, MAX_SCALE])
def test_weights_stay_in_range(scale):
    for dtype, largest in (
        (torch.float32, 2.0**127 / 2**17),
        (torch.bfloat16, 2.0**127 / 2**17),
        (torch.float16, 65504 / 1.5),
    ):
        if weights_need_float32([scale], dtype):
            continue
        factor, shift = weight_factors(scale, dtype, widen=False)
        assert 2 ** (factor - shift) <= largest
        assert dtype == torch.float16 or 2 ** (-factor - shift) >= 2.0**-126


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_table_knows_every_device_family(arch, dim):
    for scales in (1, 2):
        for itemsize in (2, 4):
            blocks = table_blocks(arch, dim, scales, itemsize)
            tiles = (blocks.block_n + blocks.num_stages * blocks.block_k) * dim * itemsize
            assert tiles <= {80: 163, 90: 227, 100: 227}.get(arch, 99) * 1024
