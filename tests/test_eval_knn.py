"""`fastssl eval knn`: ranks, disk, chunks and one pass change nothing; its lines, its JSON, its refusals."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from test_knn import accuracy_slowly, make_clusters, make_grid

from fastssl.command import run_command
from fastssl.distributed import Ranks
from fastssl.eval import all as all_evaluations
from fastssl.eval import knn, nearest
from fastssl.eval.all import find_neighbours
from fastssl.eval.features import collect_features, eval_view
from fastssl.eval.images import open_splits, rank_batches
from fastssl.eval.memory import GB, DiskRows, Memory, peak_memory
from fastssl.eval.options import finish_options
from fastssl.eval.search import knn_over_ranks
from fastssl.eval.session import Session
from fastssl.eval.vote import odd_ks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
MEMORY = Memory(None, CPU)


class FixedChunks(Memory):
    """Chunks of our choosing."""

    def __init__(self, query_chunk, bank_chunk):
        super().__init__(None, CPU)
        self.sizes = query_chunk, bank_chunk

    def chunks(self, *_):
        return self.sizes


def options_of(*argv):
    return finish_options(knn.make_knn_parser().parse_args([str(word) for word in argv]))


@pytest.fixture
def run(capsys, monkeypatch):
    """`run(*argv)` -> (exit code, stdout, stderr) of the command in this process."""

    def command(*argv):
        try:
            code = run_command(knn.main, [str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command


UNEVEN = ([(0, 50), (50, 90)], [(0, 3), (3, 40)])
EMPTY = ([(0, 90), (90, 90)], [(0, 0), (0, 40)])  # one rank has no bank, the other nothing to ask
WHOLE = ([(0, 90)], [(0, 40)])
SPACES = ("original", "shifted-norm")


def search_on_rank(ranks, parts, make):
    (bank, bank_labels), (queries, labels) = make(0, 90), make(1, 40)
    b, q = (slice(*parts[i][ranks.rank]) for i in (0, 1))
    answers = knn_over_ranks(bank[b], bank_labels[b], queries[q], labels[q], odd_ks(21), ranks, FixedChunks(7, 32))
    assert sum(answers.search.values()) == 40 * sum(first < end for first, end in parts[0])  # every query, every bank
    return answers._replace(search={})


def run_command_on_rank(ranks, data, rep_space):
    options = options_of(data, "-a", "resnet18", "-b", 4, "--image-size", 32, "-k", 5, "--rep-space", rep_space)
    return knn.evaluate(Session(options, ranks))


def everything_on_rank(rank, world_size, cuts, data):
    """In one go, since starting processes takes longer than what they do."""
    ranks = Ranks(rank, world_size, CPU)
    found = [search_on_rank(ranks, parts, make) for parts in cuts for make in (make_clusters, make_grid)]
    results = [run_command_on_rank(ranks, data, rep_space) for rep_space in SPACES]
    return found, [{**result, "search": {}} for result in results]


def test_two_ranks_answer_as_one(image_folder):
    truth = everything_on_rank(0, 1, [WHOLE, WHOLE], image_folder)
    first, second = run_ranks(everything_on_rank, 2, [UNEVEN, EMPTY], image_folder)
    assert first == second == truth
    assert len(set(truth[0][0].majority.values())) > 2


@pytest.mark.parametrize("make", [make_clusters, make_grid])
@pytest.mark.parametrize("chunks", [(64, 64), (4096, 4096), (1, 1)])
def test_both_votes_equal_float64_whatever_the_chunks(make, chunks):
    (bank, bank_labels), (queries, labels) = make(0, 150), make(1, 40)
    answers = knn_over_ranks(bank, bank_labels, queries, labels, odd_ks(9), ALONE, FixedChunks(*chunks))
    for k in odd_ks(9):
        assert answers.majority[k] == pytest.approx(accuracy_slowly(bank, bank_labels, queries, labels, k))
        weigh = lambda d: np.exp((d[:, :1] - d) / 0.14)  # noqa: E731
        assert answers.weighted[k] == pytest.approx(accuracy_slowly(bank, bank_labels, queries, labels, k, weigh))


def test_one_pass_for_all_k_equals_a_pass_for_each():
    (bank, bank_labels), (queries, labels) = make_grid(0, 150), make_grid(1, 40)
    together = knn_over_ranks(bank, bank_labels, queries, labels, odd_ks(31), ALONE, MEMORY)
    for k in odd_ks(31):
        alone = knn_over_ranks(bank, bank_labels, queries, labels, [k], ALONE, MEMORY)
        assert (alone.majority[k], alone.weighted[k]) == (together.majority[k], together.weighted[k])


def test_rows_on_disk_are_the_rows_rounded_to_float16():
    bank, labels = make_clusters(0, 150)
    queries, query_labels = make_clusters(1, 40)
    rows = DiskRows(160, bank.shape[1])
    for part in (slice(0, 100), slice(100, 150)):
        rows[part] = bank[part]
    rows = rows.truncate(150)
    half = bank.half()
    assert len(rows) == 150 and torch.equal(rows[:], half) and torch.equal(rows[140:500], half[140:])
    index = torch.tensor([[3, 149], [0, 3]])
    assert torch.equal(rows[index], half[index])
    on_disk, in_memory = (
        knn_over_ranks(b, labels, queries, query_labels, odd_ks(9), ALONE, FixedChunks(16, 64)) for b in (rows, half)
    )
    assert on_disk == in_memory
    with pytest.raises(ValueError, match="too large for float16"):
        rows[:1] = torch.full((1, bank.shape[1]), 1e6)


def test_whole_batches_are_dealt_to_ranks():
    dealt = [rank_batches(10, 4, Ranks(r, 2, CPU)) for r in (0, 1)]
    assert [[b.tolist() for b in part] for part in dealt] == [[[0, 1, 2, 3]], [[4, 5, 6, 7], [8, 9]]]
    assert rank_batches(3, 4, Ranks(0, 2, CPU)) == []


@pytest.mark.parametrize("rep_space", ["shift-norm", "shifted-norm"])
def test_a_shift_leaves_the_classes_apart(rep_space, tmp_path, monkeypatch):
    """Folders in order would give batches of one class, less their mean: here nothing. The project shuffles them."""
    for split, count in (("train", 8), ("val", 4)):
        for name, grey in (("a", 60), ("b", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (grey, grey, 90)).save(tmp_path / split / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    flags = f". -a resnet18 --image-size 32 -b 4 -k 1 --rep-space {rep_space} --json found.json"
    assert knn.main(flags.split()) == 0
    assert json.loads(Path("found.json").read_text())["accuracy"]["1"] == 100
    assert all_evaluations.main(f"{flags} --epochs 1".split()) == 0
    assert json.loads(Path("found.json").read_text())["knn"]["accuracy"]["1"] == 100


def test_line_json_and_disk(run, image_folder, tmp_path, monkeypatch):
    flags = [image_folder, "-a", "resnet18", "--image-size", 32, "-k", 7, "-g", 1, "--num-workers", 2]
    code, out, err = run(*flags, "--json", tmp_path / "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and "random weights" in err
    assert f"best-NN={result['best']:3.2f}%, k={result['best_k']}." in out.splitlines()
    assert list(result["accuracy"]) == ["1", "3", "5", "7"]
    assert result["best"] == max(result["accuracy"].values())
    assert result["environment"]["torch"] == torch.__version__ and result["options"]["resize"] == 37
    assert (result["bank"], result["queries"]) == (24, 12)

    monkeypatch.setattr(Memory, "make_rows", lambda self, n, c: DiskRows(n, c))
    assert run(*flags, "--json", tmp_path / "b.json")[0] == 0
    assert json.loads((tmp_path / "b.json").read_text())["accuracy"] == pytest.approx(result["accuracy"], abs=9)


def test_unreadable_images_are_left_out_and_counted(run, make_image_folder, tmp_path):
    data = make_image_folder(tmp_path)
    (data / "train" / "class1" / "3.jpg").write_bytes(b"no image")
    code, _, err = run(data, "-a", "resnet18", "--image-size", 32, "--json", tmp_path / "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and "left out" in err and "3.jpg" in err
    assert (result["bank"], result["bad_images"]) == (23, 1)


@pytest.mark.parametrize("k", [25, 26])
def test_too_large_a_k_is_found_before_anything_is_computed(k, run, image_folder, monkeypatch):
    monkeypatch.setattr(Session, "open_backbone", None)
    code, _, err = run(image_folder, "-a", "resnet18", "--image-size", 32, "-k", k)
    assert code == 1 and f"fewer than -k {k} training images: choose -k from 1 to 24" in err


def test_all_evaluations_take_the_ks_that_there_are(capsys):
    options = argparse.Namespace(k=101, rep_space="norm", batch_size=4, max_mem_gb=None, precision="fp32")
    session = Session(options, ALONE)
    features, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    found = find_neighbours(session, (features, labels), (features, labels))
    assert list(found["accuracy"]) == [1, 3, 5] and found["accuracy"][1] == 100
    assert "k up to 6, as there are fewer than -k 101 training images" in capsys.readouterr().err


def test_bad_input_is_one_sentence(run, image_folder, tmp_path):
    flags = ["-a", "resnet18", "--image-size", 32]
    for words, sentence in [
        ([image_folder, *flags, "-k", 25], "there are fewer than -k 25 training images: choose -k from 1 to 24"),
        ([tmp_path / "nowhere", *flags], "does not exist"),
        ([image_folder / "train", *flags], "has no folder train"),
        ([image_folder, *flags, "--pretrained", tmp_path / "none.pt"], "there is no checkpoint"),
        ([image_folder, *flags, "--resize", 16], "--resize 16 must be at least --image-size 32"),
        ([image_folder, *flags, "--max-mem-gb", 0.05], "--max-mem-gb 0.05 is too little"),
        ([image_folder, "-a", "vit_b_16", "--image-size", 96], "vit_b_16 cannot take images of 96 pixels"),
        ([image_folder, "-a", "deit_tiny", "--image-size", 100], "Input height (100) should be divisible by"),
    ]:
        code, _, err = run(*words)
        assert code == 1 and sentence in err and "Traceback" not in err, err
    assert run(image_folder, "--rep-space", "normed")[0] == 2
    assert run(image_folder, "-k", 0)[0] == 2
    assert run(image_folder, "--max-mem-gb", "inf")[0] == 2


def test_a_checkpoint_that_holds_code_is_refused(run, image_folder, tmp_path):
    torch.save({"state_dict": Memory(None, CPU)}, tmp_path / "code.pt")
    code, _, err = run(image_folder, "-a", "resnet18", "--pretrained", tmp_path / "code.pt")
    assert code == 1 and "code.pt" in err and "Traceback" not in err


def test_memory_under_a_cap():
    cap = peak_memory() / GB + 0.5
    memory = Memory(cap, CPU)
    assert isinstance(memory.make_rows(1_000_000, 512), DiskRows)
    assert isinstance(memory.make_rows(1000, 512), torch.Tensor)
    query_chunk, bank_chunk = memory.chunks(10_000, 50_000, 512, 101)
    assert query_chunk * bank_chunk * 8 + bank_chunk * 512 * 20 < 0.25 * GB
    few, many = (Memory(peak_memory() / GB + extra, CPU).chunks(10_000, 1_000_000, 2048, 101) for extra in (0.3, 3))
    assert few[0] * few[1] < many[0] * many[1]


def test_features_of_a_rank_without_images(image_folder):
    options = options_of(image_folder, "-a", "resnet18", "--image-size", 32)
    session = Session(options, Ranks(0, 2, CPU))  # one batch, dealt to rank 1
    train, _ = open_splits(options, ALONE)
    features, labels = collect_features(session, torch.nn.Flatten(), train, eval_view(session))
    assert features.shape == (0, 0) and labels.shape == (0,)


def test_more_gpus_than_there_are_is_an_error(run, image_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = run(image_folder, "-g", 2)
    assert code == 1 and "-g 2 asks for 2 GPUs, but this machine has 1" in err


@pytest.mark.parametrize("flags", [["-g", "2"], ["--gpus=2", "--device", "cpu"]])
def test_gpus_become_processes(run, image_folder, monkeypatch, flags):
    started = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("fastssl.eval.options.usable_cores", lambda: 2)
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    run("nowhere", "-k", 3, *flags)  # goes on, since nothing was started, and finds no images
    command = " ".join(started[0])
    assert "torch.distributed.run --nproc_per_node 2 " in command and "--gpus" not in command
    assert re.search(r" -m fastssl.eval.knn --device \w+ nowhere ", command)


def test_without_numba_it_says_what_is_missing_and_finds_the_same(run, image_folder, tmp_path, monkeypatch):
    flags = [image_folder, "-a", "resnet18", "--image-size", 32, "-k", 5, "--device", "cpu", "--json"]
    assert run(*flags, tmp_path / "a.json")[0] == 0
    monkeypatch.setattr(nearest, "find_nearest_cpu", None)
    code, _, err = run(*flags, tmp_path / "b.json")
    assert code == 0 and "numba is not installed" in err
    results = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert results[0]["accuracy"] == results[1]["accuracy"] and results[1]["search"] == {nearest.TORCH: 12}
