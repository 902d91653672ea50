"""The compiled search on a CPU: its bounds hold, its neighbours are those of float64, and it says when it was slow."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_knn import make_clusters, make_grid, nearest_slowly

pytest.importorskip("numba")

from fastssl.eval import nearest_cpu
from fastssl.eval.memory import DiskRows
from fastssl.eval.nearest import bank_mean, find_nearest, find_nearest_torch
from fastssl.eval.nearest_cpu import encode, int8_is_exact, multiply

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["int8", "float32"])
def in_int8(request, monkeypatch):
    """Either kind of product, whatever this CPU has."""
    monkeypatch.setattr(nearest_cpu, "int8_is_exact", lambda: request.param)
    return request.param


def heavy_tailed(seed, n, dim=24):
    """Rows whose lengths and coordinates differ by orders of magnitude."""
    random = np.random.default_rng(seed)
    return torch.tensor(random.standard_t(2, size=(n, dim)) * random.lognormal(0, 2, size=(n, 1))).float()


SETS = {
    "clusters": lambda seed, n: make_clusters(seed, n, offset=3.0)[0],
    "ties": lambda seed, n: make_grid(seed, n, dim=5)[0],
    "heavy tails": heavy_tailed,
    "duplicates": lambda seed, n: make_clusters(seed, n)[0][torch.arange(n) % 40],
}


@pytest.mark.parametrize("make", SETS.values(), ids=SETS)
def test_bounds_hold_and_are_near(make, in_int8):
    bank, queries = make(0, 500).double().numpy(), make(1, 60).double().numpy()
    centre = bank.mean(0)
    rows, asked = encode(bank, centre, in_int8), encode(queries, centre, in_int8)
    product = multiply(asked.rows, rows.rows, torch.empty(60 * 500, dtype=torch.int32)).astype(np.float64)
    minus_scale, alpha, beta = asked.query.astype(np.float64).T[:, :, None]
    square, scale, error, norm = rows.row.astype(np.float64)
    bound = square + minus_scale * scale * product - alpha * error - beta * norm + asked.square[:, None]
    distance = ((bank[None] - queries[:, None]) ** 2).sum(-1)
    assert (bound <= distance).all()
    reach = (norm + np.sqrt(asked.square)[:, None]) ** 2
    assert ((distance - bound) / reach).max() < (0.1 if in_int8 else 1e-4)


@pytest.mark.parametrize("make", SETS.values(), ids=SETS)
@pytest.mark.parametrize("chunk", [64, 4096])
def test_neighbours_are_those_of_float64(make, chunk, in_int8, monkeypatch):
    monkeypatch.setattr(nearest_cpu, "_SAMPLE", 256)  # so that a small bank is sampled, too
    bank, queries = make(0, 3000), make(1, 50)
    for k in (1, 20, 101):
        distance, index = nearest_slowly(bank, queries, k)
        tally = Counter()
        parts = [find_nearest(bank, part, k, chunk, tally=tally) for part in queries.split(chunk)]
        np.testing.assert_array_equal(torch.cat([i for _, i in parts]), index)
        np.testing.assert_allclose(torch.cat([d for d, _ in parts]), distance, rtol=1e-12, atol=1e-12)
        assert sum(tally.values()) == 50


def test_the_search_in_pytorch_finds_the_same():
    for make in SETS.values():
        bank, queries = make(0, 900), make(1, 50)
        ours = find_nearest(bank, queries, 30)
        torchs = find_nearest_torch(bank, queries, 30, 256, bank_mean(bank, CPU))
        assert torch.equal(ours[1], torchs[1])
        torch.testing.assert_close(ours[0], torchs[0], rtol=1e-12, atol=1e-12)


def test_the_search_in_pytorch_is_exact_beside_rows_far_away():
    """Around a centre far away, float64 products keep no digit of the distances between the others."""
    bank, queries = make_clusters(0, 300)[0], make_clusters(1, 20)[0]
    bank[::3] *= 1e18
    ours = find_nearest_torch(bank, queries, 7, 64, bank_mean(bank, CPU))
    truth = nearest_slowly(bank, queries, 7)
    np.testing.assert_array_equal(ours[1], truth[1])
    np.testing.assert_allclose(ours[0], truth[0], rtol=1e-12)


def test_queries_a_sample_misjudges_are_measured_against_every_row(monkeypatch):
    """The sample sees only far rows or only near ones; both are noticed, and neither changes the neighbours."""
    monkeypatch.setattr(nearest_cpu, "_SAMPLE", 64)
    near, far = torch.randn(64, 16) * 0.01, torch.randn(64 * 63, 16) + 100
    bank = torch.cat([near.reshape(64, 1, 16), far.reshape(64, 63, 16)], 1).flatten(0, 1)  # every 64th row is sampled
    for queries in (torch.randn(30, 16) * 0.01, torch.randn(30, 16) + 100):
        tally = Counter()
        _, index = find_nearest(bank, queries, 20, tally=tally)
        np.testing.assert_array_equal(index, nearest_slowly(bank, queries, 20)[1])
    collapsed, tally = torch.ones(5000, 8), Counter()
    monkeypatch.setattr(nearest_cpu, "_MANY", 0.0)
    _, index = find_nearest(collapsed, collapsed[:3], 5, tally=tally)
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_too_little_room_is_noticed(monkeypatch):
    bank, queries = make_clusters(0, 6000)[0], make_clusters(1, 40)[0]
    monkeypatch.setattr(nearest_cpu, "sample_bank", lambda *_: (np.full(40, np.inf, np.float32), np.full(40, 10.0)))
    tally = Counter()
    _, index = find_nearest(bank, queries, 7, tally=tally)
    assert tally["every row measured"] == 40
    np.testing.assert_array_equal(index, nearest_slowly(bank, queries, 7)[1])


def test_what_int8_cannot_tell_apart_is_left_to_float32():
    if not int8_is_exact():
        pytest.skip("this CPU has no fast int8")
    bank = torch.randn(70_000, 8) * 1e-2
    bank[:, 0] += torch.tensor([-1.0, 1.0]).repeat(35_000)  # two clusters, each far smaller than what rounding leaves
    queries, tally = bank[:20] + 1e-3, Counter()
    _, index = find_nearest(bank, queries, 5, tally=tally)
    assert tally["float32"] == 20
    np.testing.assert_array_equal(index, nearest_slowly(bank, queries, 5)[1])


@pytest.mark.parametrize("scale", [1e-25, 1e-17, 1e16, 1e25])
def test_numbers_that_float32_cannot_square(scale, in_int8):
    bank, queries = make_clusters(0, 3000)[0].double(), make_clusters(1, 20)[0].double()
    sets = [(bank * scale, queries * scale)]
    if scale > 1:  # some rows far away from all others
        sets.append((bank * torch.where(torch.arange(3000) % 3 == 0, 1.0, scale)[:, None], queries))
    for rows, asked in sets:
        np.testing.assert_array_equal(find_nearest(rows, asked, 7)[1], nearest_slowly(rows, asked, 7)[1])


def test_a_bank_on_disk_and_threads_change_nothing():
    bank, queries = make_clusters(0, 3000)[0].half(), make_clusters(1, 300)[0]
    rows = DiskRows(len(bank), bank.shape[1])
    rows[:] = bank
    truth = nearest_slowly(bank, queries, 21)[1]
    threads = torch.get_num_threads()
    try:
        for num in (1, 3):
            torch.set_num_threads(num)
            for b in (rows, bank, bank.float(), bank.double()):
                np.testing.assert_array_equal(find_nearest(b, queries, 21)[1], truth)
    finally:
        torch.set_num_threads(threads)


def test_no_product_is_shared_by_threads_that_wait_for_each_other(in_int8, monkeypatch):
    """Beside other work a shared product takes as long as its slowest thread, block after block."""
    shares = []

    def counted(queries, rows, space):
        shares.append((torch.get_num_threads(), len(queries), len(rows)))
        return multiply(queries, rows, space)

    monkeypatch.setattr(nearest_cpu, "multiply", counted)
    bank, queries = make_clusters(0, 3000)[0], make_clusters(1, 1300)[0]
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(2)
        index = find_nearest(bank, queries, 21, 1000)[1]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_num_threads(threads)
    assert [share for share in shares if share[2] == 1000] == 12 * [(1, 325, 1000)]
    np.testing.assert_array_equal(index, nearest_slowly(bank, queries, 21)[1])
