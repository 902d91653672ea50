"""k-NN against scikit-learn and NumPy in float64: distances, votes, ties, chunks, devices."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastssl.distributed import Ranks
from fastssl.eval import nearest
from fastssl.eval.memory import Memory
from fastssl.eval.nearest import _smallest, find_nearest
from fastssl.eval.search import knn_over_ranks
from fastssl.eval.vote import odd_ks, to_rep_space, vote

KS = odd_ks(21)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def search(request, monkeypatch):
    """Either search that a CPU may use."""
    if request.param == "torch":
        monkeypatch.setattr(nearest, "find_nearest_cpu", None)
    elif nearest.find_nearest_cpu is None:
        pytest.skip("needs numba")


def make_clusters(seed, n, dim=16, classes=5, spread=2.0, offset=0.0):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    labels = random.integers(0, classes, n)
    features = centres[labels] + spread * random.normal(size=(n, dim)) + offset
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def make_grid(seed, n, dim=3, classes=4):
    """Integer features: distances tie everywhere, and exactly."""
    random = np.random.default_rng(seed)
    features = random.integers(0, 3, size=(n, dim))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(random.integers(0, classes, n))


def nearest_slowly(bank, queries, k):
    """NumPy float64, stable sort: equal distances in order of index."""
    difference = queries.double().numpy()[:, None] - bank.double().numpy()[None]
    distance = (difference**2).sum(-1)
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, 1), index


def accuracy_slowly(bank, bank_labels, queries, query_labels, k, weigh=np.ones_like):
    """np.bincount and argmax per query; argmax takes the smallest label of a tie."""
    distance, index = nearest_slowly(bank, queries, k)
    labels = bank_labels.numpy()[index]
    votes = [np.bincount(row, weights=weight) for row, weight in zip(labels, weigh(distance))]
    return 100 * np.mean([v.argmax() == label for v, label in zip(votes, query_labels.numpy())])


def search_alone(bank, bank_labels, queries, query_labels, ks):
    """The answers of one rank, on the device of the queries."""
    ranks = Ranks(0, 1, queries.device)
    return knn_over_ranks(bank, bank_labels, queries, query_labels, ks, ranks, Memory(None, ranks.device))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_accuracy_equals_scikit_learn(offset):
    bank, bank_labels = make_clusters(0, 400, offset=offset)
    queries, query_labels = make_clusters(1, 150, offset=offset)
    result = search_alone(bank, bank_labels, queries, query_labels, KS).majority
    for k in KS:
        truth = KNeighborsClassifier(k, algorithm="brute").fit(bank.double().numpy(), bank_labels.numpy())
        assert result[k] == pytest.approx(100 * truth.score(queries.double().numpy(), query_labels.numpy()), abs=1e-9)
    assert len({round(v, 6) for v in result.values()}) > 3


@pytest.mark.parametrize("make", [make_clusters, make_grid])
@pytest.mark.parametrize("chunks", [(3, 30), (7, 64), (64, 300), (4096, 4096)])
def test_neighbours_equal_a_stable_sort_whatever_the_chunks(make, chunks):
    bank, _ = make(0, 300)
    queries, _ = make(1, 40)
    query_chunk, bank_chunk = chunks
    for k in (1, 20, 300):
        distance, index = nearest_slowly(bank, queries, k)
        parts = [find_nearest(bank, part, k, bank_chunk) for part in queries.split(query_chunk)]
        np.testing.assert_array_equal(torch.cat([i for _, i in parts]), index)
        np.testing.assert_allclose(torch.cat([d for d, _ in parts]), distance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [2000, 2031])
def test_groups_hold_the_smallest(columns):
    distance = torch.randint(0, 500, (50, columns), generator=torch.Generator().manual_seed(0)).float()
    values, index = _smallest(distance, 20)
    assert torch.equal(values.sort(1).values, distance.topk(20, largest=False).values)
    assert torch.equal(distance.gather(1, index), values)
    assert all(len(set(row.tolist())) == 20 for row in index)


def test_more_equal_distances_than_are_nominated():
    bank = torch.zeros(500, 8)
    bank[123] = 1.0
    queries = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)])
    _, index = find_nearest(bank, queries, 5, bank_chunk=32)
    assert index.tolist() == [[0, 1, 2, 3, 4], [123, 0, 1, 2, 3]]


def test_more_copies_of_a_query_than_are_nominated():
    """Products give a copy's distance, 0, as noise that differs from block to block; the first copies are nearest."""
    random = np.random.default_rng(0)
    images = torch.tensor(random.normal(size=(40, 64))).float()
    bank = images[torch.tensor(random.integers(0, 40, 2048))]
    for chunk in (64, 100):
        _, index = find_nearest(bank, images, 20, bank_chunk=chunk)
        np.testing.assert_array_equal(index, nearest_slowly(bank, images, 20)[1])


def test_neighbours_closer_than_float32_can_tell_by_products():
    base = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 100
    steps = torch.arange(200, 0, -1)[:, None] * 2.0**-12  # bank row 199 is nearest
    bank = torch.cat([(base + steps), -base])  # far rows: large norms around the mean
    distance, index = nearest_slowly(bank, base, 10)
    ours = find_nearest(bank, base, 10, bank_chunk=50)
    np.testing.assert_array_equal(ours[1], index)
    np.testing.assert_allclose(ours[0], distance, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e30, 1e19, 1e-19, 1e-21, 1e-30])
@pytest.mark.parametrize("make", [make_clusters, make_grid])
def test_features_that_float32_cannot_square(make, scale):
    bank, queries = make(1, 400)[0] * scale, make(2, 50)[0] * scale
    distance, index = find_nearest(bank, queries, 5)
    truth, rows = nearest_slowly(bank, queries, 5)
    assert np.array_equal(index, rows)
    np.testing.assert_allclose(distance, truth, rtol=1e-12)


@pytest.mark.parametrize("make", [make_clusters, make_grid])
def test_weighted_vote(make):
    bank, bank_labels = make(0, 300)
    queries, query_labels = make(1, 100)
    bank, queries = to_rep_space(bank, "shift-norm"), to_rep_space(queries, "shift-norm")
    result = search_alone(bank, bank_labels, queries, query_labels, KS).weighted
    for k in KS:
        truth = accuracy_slowly(
            bank, bank_labels, queries, query_labels, k, lambda distance: np.exp((1 - distance / 2) / 0.07)
        )
        assert result[k] == pytest.approx(truth, abs=1e-9)


def test_weights_far_away_do_not_vanish():
    bank, queries = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1e3]])
    assert search_alone(bank, torch.tensor([0, 0, 1]), queries, torch.tensor([1]), [3]).weighted == {3: 100.0}


def test_votes_tie_to_the_smallest_label_at_every_k():
    labels = torch.tensor([[2, 1, 1, 2, 0, 0], [3, 0, 3, 0, 0, 3]])
    winners = dict(vote(labels, torch.ones(2, 6), range(1, 7), 4))
    assert [w.tolist() for w in winners.values()] == [[2, 3], [1, 0], [1, 3], [1, 0], [1, 0], [0, 0]]


def test_votes_equal_bincount():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, size=(200, 30))
    for k, winner in vote(torch.tensor(labels), torch.ones(200, 30), range(1, 31), 4):
        assert winner.tolist() == [np.bincount(row[:k]).argmax() for row in labels]


def test_grid_accuracy_equals_bincount():
    bank, bank_labels = make_grid(0, 500)
    queries, query_labels = make_grid(1, 200)
    result = search_alone(bank, bank_labels, queries, query_labels, KS).majority
    for k in KS:
        assert result[k] == pytest.approx(accuracy_slowly(bank, bank_labels, queries, query_labels, k), abs=1e-9)


def test_half_precision_bank_counts_as_its_values():
    bank, _ = make_clusters(0, 100)
    queries, _ = make_clusters(1, 10)
    np.testing.assert_array_equal(find_nearest(bank.half(), queries, 9)[1], nearest_slowly(bank.half(), queries, 9)[1])


def test_rep_spaces():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    assert to_rep_space(x, "original") is x
    torch.testing.assert_close(to_rep_space(x, "norm"), torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]]))
    shifted = x - torch.tensor([[4 / 3, 2.0]])
    torch.testing.assert_close(to_rep_space(x, "shift-norm"), shifted / shifted.norm(dim=1, keepdim=True))
    assert torch.equal(to_rep_space(x, "shifted-norm"), to_rep_space(x, "shift-norm"))
    assert to_rep_space(x[:1], "shift-norm").tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="unknown representation space 'normed': choose original, norm, shift-norm"):
        to_rep_space(x, "normed")


def test_bad_input_is_named():
    bank, labels = make_clusters(0, 20)
    queries, query_labels = make_clusters(1, 5)
    with pytest.raises(ValueError, match="choose -k from 1 to 20"):
        search_alone(bank, labels, queries, query_labels, [1, 21])
    with pytest.raises(ValueError, match="choose k from 1 to 20"):
        find_nearest(bank, queries, 21)
    with pytest.raises(ValueError, match="needs at least one training image"):
        search_alone(bank[:0], labels[:0], queries, query_labels, [0])
    with pytest.raises(ValueError, match="needs at least one held-out image"):
        search_alone(bank, labels, queries[:0], query_labels[:0], [1])


def test_leaves_the_matmul_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        find_nearest(torch.randn(30, 4), torch.randn(2, 4), 3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_gpu_finds_the_same_neighbours():
    for make in (make_clusters, make_grid):
        bank, labels = make(0, 3000)
        queries, query_labels = make(1, 500)
        on_gpu = find_nearest(bank, queries.cuda(), 21, bank_chunk=512)
        np.testing.assert_array_equal(on_gpu[1].cpu(), find_nearest(bank, queries, 21)[1])
        answers = search_alone(bank.cuda(), labels.cuda(), queries.cuda(), query_labels.cuda(), KS)
        assert answers.majority == search_alone(bank, labels, queries, query_labels, KS).majority
