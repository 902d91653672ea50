"""`bench_throughput.py eval`: its peers find what ours finds, and the stage writes what it measured."""

import json

import numpy as np
import pytest
import torch
from test_knn import accuracy_slowly, make_clusters, make_grid, nearest_slowly, search_alone

from fastssl.bench import eval as bench
from fastssl.bench.knn_peer import knn_the_reference_way, nearest_by_cdist
from fastssl.eval.vote import odd_ks


def test_the_reference_way_gives_the_accuracies_of_ours():
    bank, queries = make_clusters(0, 300), make_clusters(1, 40)
    found = knn_the_reference_way(*bank, *queries, odd_ks(21), 64)
    for k, accuracy in search_alone(*bank, *queries, odd_ks(21)).majority.items():
        assert found[k] == pytest.approx(accuracy, abs=1e-4)
        assert accuracy == pytest.approx(accuracy_slowly(*bank, *queries, k))


def test_votes_of_the_reference_way_tie_to_the_smallest_label():
    bank = torch.arange(4.0)[:, None], torch.tensor([3, 1, 3, 1])
    assert knn_the_reference_way(*bank, torch.zeros(1, 1), torch.tensor([1]), [1, 4], 3) == {1: 0.0, 4: 100.0}


def test_cdist_finds_the_same_rows():
    for make in (make_clusters, make_grid):
        bank, queries = make(0, 300)[0], make(1, 40)[0]
        distance, _ = nearest_by_cdist(bank, queries, 9, 100)
        np.testing.assert_allclose(distance**2, nearest_slowly(bank, queries, 9)[0], rtol=1e-3, atol=1e-4)


def test_the_stage_writes_both_lines(tmp_path, capsys):
    size = ["--bank", "3000", "--queries", "40", "--dim", "16", "-k", "7", "--epochs", "1", "--rounds", "2"]
    bench.main([*size, "--output", str(tmp_path / "eval.json")])
    knn, sweep = json.loads((tmp_path / "eval.json").read_text())["lines"]
    assert knn["largest_difference_in_percent"] < 3 and sum(knn["search"].values()) == 80
    assert all(timing["rounds"] == 2 for line in (knn, sweep) for timing in line["seconds"].values())
    out = capsys.readouterr().out
    assert f"k-NN is {knn['times ' + bench.REFERENCE]:.1f} times as fast as the reference's way" in out
    assert f"12 settings take {sweep['twelve by one']:.2f} times as long as one" in out
