"""Evaluations read .beton files and tar shards as they read folders: the same pixels, labels and numbers."""

import pytest
import torch
from betons import NO_TURBOJPEG, stored_jpeg
from betons import write_beton as write_small_beton
from photos import render_photo

from fastssl.command import run_command
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.data_prep.write_shards import write_shards
from fastssl.distributed import Ranks
from fastssl.eval import all as everything
from fastssl.eval import knn, linear, transfer
from fastssl.eval.images import open_images, open_splits
from fastssl.eval.options import finish_options
from fastssl.eval.session import Session
from fastssl.eval.transfer_data import open_transfer_data

ALONE = Ranks(0, 1, torch.device("cpu"))
NEEDS_TURBOJPEG = pytest.mark.skipif(NO_TURBOJPEG, reason="needs libturbojpeg")
BETON = pytest.param("beton", marks=NEEDS_TURBOJPEG)
FLAGS = ["-a", "resnet18", "--image-size", "32", "-b", "8", "-j", "2"]


@pytest.fixture
def sources(make_image_folder, tmp_path):
    """One data set, whose held-out split has a bad image and lacks a class, as a folder, .beton files and shards."""
    folder = make_image_folder(tmp_path / "folder", {"train": 8, "val": 4})
    for path in (folder / "val" / "class1").iterdir():
        path.unlink()
    (folder / "val" / "class1").rmdir()
    store, work = Store(originals=True), Work(workers=1)
    for split in ("train", "val"):
        (tmp_path / "beton").mkdir(exist_ok=True)
        write_beton(folder / split, tmp_path / "beton" / f"{split}.beton", store, Selection(), work)
        write_shards(folder / split, tmp_path / "shards" / split, store, Selection(), work)
    return {"folder": folder, "beton": tmp_path / "beton", "shards": tmp_path / "shards"}


def options_of(parser, *words):
    return finish_options(parser.parse_args([*map(str, words), *FLAGS]))


@pytest.mark.parametrize("kind", [BETON, "shards"])
def test_the_same_pixels_in_any_order(sources, kind):
    order = [torch.tensor([5, 0, 7]), torch.tensor([2])]
    parser = knn.make_knn_parser()
    ours, folders = (open_splits(options_of(parser, sources[name]), ALONE) for name in (kind, "folder"))
    for images, truth in zip(ours, folders):
        assert (images.num_images, list(images.class_names)) == (truth.num_images, list(truth.class_names))
        for batch, expected in zip(images.read(iter(order)), truth.read(iter(order)), strict=True):
            assert torch.equal(batch.label, expected.label) and torch.equal(batch.index, expected.index)
            for i in range(batch.size):
                assert torch.equal(batch.image(i), expected.image(i))
        images.close()


@pytest.mark.parametrize("kind", [BETON, "shards"])
def test_the_same_numbers(sources, kind, tmp_path, capsys):
    def evaluate(name):
        words = ["--protocol", "cached", "--epochs", 2, "--lrs", "0.1,1"]
        found = [
            knn.evaluate(Session(options_of(knn.make_knn_parser(), sources[name], "-k", 5), ALONE)),
            linear.evaluate(Session(options_of(linear.make_linear_parser(), sources[name], *words), ALONE)),
        ]
        whole = options_of(everything.make_all_parser(), sources[name], "-k", 5, "--epochs", 2, "--lrs", "0.1,1")
        whole.figure = str(tmp_path / "page")
        return [*found, everything.evaluate(Session(whole, ALONE))]

    assert evaluate(kind) == evaluate("folder")


@NEEDS_TURBOJPEG
def test_transfer_reads_beton_files(sources):
    parser = transfer.make_transfer_parser()
    ours, folders = (
        open_transfer_data(Session(options_of(parser, sources[name]), ALONE)) for name in ("beton", "folder")
    )
    assert [images.num_images for images in ours] == [images.num_images for images in folders]


@NEEDS_TURBOJPEG
def test_a_beton_file_itself_may_be_named(sources):
    path = sources["beton"] / "train.beton"
    train, val = open_splits(options_of(knn.make_knn_parser(), path), ALONE)
    assert (train.num_images, val.num_images) == (24, 8)


def test_bad_shards_are_counted_and_replaced(sources):
    tar = next((sources["shards"] / "val").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    at = content.index(b"\xff\xd8")
    content[at : at + 40] = bytes(40)
    tar.write_bytes(content)
    _, val = open_splits(options_of(knn.make_knn_parser(), sources["shards"]), ALONE)
    (batch,) = val.read(iter([torch.arange(8)]))
    assert batch.size == 7 and len(val.bad_images) == 1
    (batch,) = val.read(iter([torch.arange(8)]), replace_bad=True)
    assert batch.size == 8 and torch.equal(batch.image(0), batch.image(1))


def test_bad_input_is_one_sentence(sources, capsys):
    (sources["beton"] / "val.beton").unlink()
    for words, sentence in [
        ([sources["beton"]], "has no file val.beton or valid.beton"),
        ([sources["folder"] / "nothing"], "does not exist"),
    ]:
        assert run_command(knn.main, [*map(str, words), *FLAGS]) == 1
        err = capsys.readouterr().err
        assert sentence in err and "Traceback" not in err, err
    train = sources["folder"] / "train"
    (train / "class2").rename(train / "other")
    write_shards(train, sources["shards"] / "other", Store(originals=True), Selection(), Work(workers=1))
    (sources["shards"] / "train").rename(sources["shards"] / "gone")
    (sources["shards"] / "other").rename(sources["shards"] / "train")
    with pytest.raises(ValueError, match="has a class 'class2' that is not among the 3 classes of the other"):
        open_splits(options_of(knn.make_knn_parser(), sources["shards"]), ALONE)


@NEEDS_TURBOJPEG
def test_an_image_without_a_class_is_told_before_any_is_read(tmp_path):
    images = [stored_jpeg(render_photo(40, 50, seed), label) for seed, label in enumerate((0, 1, -1, 1))]
    write_small_beton(tmp_path / "train.beton", images)
    with pytest.raises(ValueError, match="has 1 image without a class: evaluations need a class for every image"):
        open_images(tmp_path / "train.beton", options_of(knn.make_knn_parser(), tmp_path), ALONE)
