"""Features in order and in eval mode, and the k-NN probe of a run: what is asked, what is said, ranks agree."""

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from betons import NO_TURBOJPEG, stored_jpeg, write_beton
from ranks import run_ranks
from torch import nn
from torch.nn.functional import normalize

from fastssl.augment.views import make_eval_view
from fastssl.batch import pack_images
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.eval.features import extract_features, gather_features
from fastssl.eval.images import find_held_out
from fastssl.eval.online import eval_resize, keep_asked, make_probe
from fastssl.eval.session import Session
from fastssl.loaders.make import make_loader

ALONE = Ranks(0, 1, torch.device("cpu"))


class ColourBackbone(nn.Module):
    """Mean colour, after batch norm and dropout, which eval mode makes the identity."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.norm(images)).mean((2, 3))


def make_batches(sizes=(3, 2), first=0):
    random = np.random.default_rng(0)
    for size in sizes:
        images = [random.integers(0, 256, (20, 30 + i, 3), dtype=np.uint8) for i in range(size)]
        yield pack_images(images, range(first, first + size), [7 + i for i in range(size)])
        first += size


def config_of(data, **values):
    return replace(Config(data=str(data)), image_size=16, knn_k=3, **values)


def open_loader(config, ranks=ALONE):
    return make_loader(config.input.loader, config.data, batch_size=1, seed=0, device="cpu", synthetic_images=200,
                       synthetic_size=16, rank=ranks.rank, world_size=ranks.world_size)  # fmt: skip


def test_features_are_those_of_eval_mode_in_order():
    backbone = ColourBackbone()
    backbone.dropout.eval()  # a part that its owner has frozen stays so
    features, labels = extract_features(backbone, make_batches(), size=12, resize=16, device="cpu")
    views = torch.cat([make_eval_view(batch, 12, 16) for batch in make_batches()])
    torch.testing.assert_close(features, views.mean((2, 3)) / (1 + 1e-5) ** 0.5)
    assert labels.tolist() == [7, 8, 9, 7, 8]
    assert features.dtype == torch.float32
    assert backbone.training and backbone.norm.training and not backbone.dropout.training
    assert backbone.norm.num_batches_tracked == 0


def test_lower_precision_still_gives_float32():
    full, _ = extract_features(nn.Flatten(), make_batches(), size=4, resize=8, device="cpu")
    low, _ = extract_features(nn.Flatten(), make_batches(), size=4, resize=8, device="cpu", dtype=torch.bfloat16)
    assert low.dtype == torch.float32 and not torch.equal(full, low)
    torch.testing.assert_close(full, low, rtol=2**-8, atol=2**-8)


def test_no_images_no_features():
    features, labels = extract_features(nn.Flatten(), [], size=4, resize=8, device="cpu")
    assert features.shape == (0, 0) and labels.shape == (0,)


def gather_uneven(rank, world_size):
    options = Namespace(max_mem_gb=None, precision="fp32")
    rows = [3, 0, 1][rank]
    features = torch.full((rows, 2 if rows else 0), float(rank))
    return gather_features(Session(options, Ranks(rank, world_size, torch.device("cpu"))), features)


def test_ranks_may_hold_different_numbers_of_features():
    for features in run_ranks(gather_uneven, 3):
        assert features.tolist() == [[0.0, 0.0]] * 3 + [[2.0, 2.0]]


def probe_slowly(config, bank, queries):
    """Percentage by NumPy in float64, and its sanity: neighbours by cosine, k = 3."""
    bank_features, queries_features = (
        normalize(torch.cat([make_eval_view(b, 16, eval_resize(config)) for b in part]).mean((2, 3)).double())
        for part in (bank, queries)
    )
    bank_labels, labels = (torch.cat([b.label for b in part]).numpy() for part in (bank, queries))
    nearest = np.argsort(-(queries_features @ bank_features.T).numpy(), axis=1)[:, :3]
    return 100 * np.mean([np.bincount(bank_labels[row]).argmax() == y for row, y in zip(nearest, labels)])


@pytest.mark.parametrize("ends_in_train", [False, True])
def test_probe_asks_the_held_out_split(image_folder, ends_in_train):
    config = config_of(image_folder / "train" if ends_in_train else image_folder)
    probe, note = make_probe(config, open_loader(config), ALONE)
    assert note == f"k-NN probe every 10 epochs and at the end: classifies the images of {image_folder / 'val'}"
    bank = list(make_loader("folder", image_folder / "train", batch_size=1, seed=0, device="cpu").eval_batches(5))
    queries = list(make_loader("folder", image_folder / "val", batch_size=1, seed=0, device="cpu").eval_batches(5))
    assert probe(ColourBackbone()) == pytest.approx(probe_slowly(config, bank, queries))


def test_the_folder_train_itself_may_be_where_one_stands(image_folder, monkeypatch):
    monkeypatch.chdir(image_folder / "train")
    assert find_held_out(Path(".")).samefile(image_folder / "val")


def test_probe_without_a_held_out_split_keeps_the_asked_out_of_the_bank(make_image_folder, tmp_path):
    config = config_of(make_image_folder(tmp_path, {"train": 30}))
    probe, note = make_probe(config, open_loader(config), ALONE)
    assert "classifies one training image in 5 by the others" in note and "there is no val, valid" in note
    every = list(open_loader(config).eval_batches(7))
    bank, asked = list(keep_asked(every, False)), list(keep_asked(every, True))
    indices = [torch.cat([b.index for b in part]).tolist() for part in (bank, asked)]
    assert sorted(sum(indices, [])) == list(range(90))
    assert 8 <= len(indices[1]) <= 30
    assert probe(ColourBackbone()) == pytest.approx(probe_slowly(config, bank, asked))


def test_probe_limits_what_it_reads(image_folder):
    config = config_of(image_folder, knn_images=6)
    probe, _ = make_probe(config, open_loader(config), ALONE)
    sizes = []
    probe(nn.Sequential(ColourBackbone(), CountRows(sizes)))
    assert sizes == [6, 6]


class CountRows(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, x):
        self.sizes.append(len(x))
        return x


def probe_all(rank, world_size, folders):
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    configs, backbone = [config_of(folder) for folder in folders], ColourBackbone()
    backbone.norm.running_mean += torch.tensor([3.0, -2.0, 1.0]) * rank  # its own, as every rank's are in training
    return [make_probe(config, open_loader(config, ranks), ranks)[0](backbone) for config in configs]


def test_two_ranks_get_the_number_of_one_by_the_statistics_of_the_first(make_image_folder, tmp_path):
    with_val = make_image_folder(tmp_path / "a", {"train": 8, "val": 3})
    without = make_image_folder(tmp_path / "b", {"train": 25})
    truth = probe_all(0, 1, [with_val, without])
    assert run_ranks(probe_all, 2, [with_val, without]) == [truth, truth]


def test_features_that_are_not_finite_have_no_accuracy(image_folder):
    backbone = ColourBackbone()
    backbone.norm.running_mean.fill_(torch.inf)
    config = config_of(image_folder)
    assert np.isnan(make_probe(config, open_loader(config), ALONE)[0](backbone))


def test_no_probe_says_why(make_image_folder, tmp_path):
    data = make_image_folder(tmp_path / "small", {"train": 8})
    off, flat = config_of(data, knn_every=0), config_of(data / "train" / "class0")
    assert make_probe(off, open_loader(off), ALONE) == (None, "no k-NN probe: --knn-every is 0")
    assert make_probe(flat, open_loader(flat), ALONE)[1].startswith("no k-NN probe: it needs classes")
    few = config_of(data)
    assert make_probe(few, open_loader(few), ALONE)[1].endswith(
        "there are too few training images to hold some out (24)"
    )


def test_a_held_out_split_that_cannot_serve_is_named(make_image_folder, tmp_path):
    data = make_image_folder(tmp_path, {"train": 20, "val": 2})
    config = config_of(data)
    (data / "val" / "class1").rename(data / "val" / "other")
    assert "a class 'other' that is not among" in make_probe(config, open_loader(config), ALONE)[1]
    (data / "val" / "other").rename(data / "val" / "class1")
    last = max(data.glob("val/*/*"))
    for image in data.glob("val/*/*"):
        if image != last:
            image.write_bytes(b"not an image")
    assert make_probe(config, open_loader(config), ALONE)[0]
    asked = replace(config, knn_images=1)  # the first, which cannot be read
    assert (
        f"no image that the probe would take from {data / 'val'} can be read"
        in make_probe(asked, open_loader(config), ALONE)[1]
    )
    last.write_bytes(b"not an image")
    assert f"from {data / 'val'} can be read" in make_probe(config, open_loader(config), ALONE)[1]
    shutil.rmtree(data / "val")
    shutil.copytree(data / "train" / "class0", data / "val")
    assert f"{data / 'val'} has no class folders" in make_probe(config, open_loader(config), ALONE)[1]


@pytest.mark.skipif(NO_TURBOJPEG, reason="needs libturbojpeg")
def test_a_beton_is_asked_where_it_lies_or_where_it_is_named(tmp_path):
    red, blue = (np.broadcast_to(np.array(c, np.uint8), (20, 24, 3)) for c in ((200, 10, 10), (10, 10, 200)))
    names = ["red", "blue"]
    for name, count in (("train", 6), ("val", 3), ("elsewhere", 2)):
        images = [stored_jpeg(photo, label) for label, photo in enumerate((red, blue)) for _ in range(count)]
        write_beton(tmp_path / f"{name}.beton", images, names)
    config = config_of(tmp_path / "train.beton")
    probe, note = make_probe(config, open_loader(config), ALONE)
    assert f"classifies the images of {tmp_path / 'val.beton'}" in note and probe(ColourBackbone()) == 100
    config = config_of(tmp_path / "train.beton", val=str(tmp_path / "elsewhere.beton"))
    assert "elsewhere.beton" in make_probe(config, open_loader(config), ALONE)[1]
    config = config_of(tmp_path / "train.beton", val=str(tmp_path / "nowhere.beton"))
    with pytest.raises(ValueError, match=r"--val cannot be used for the k-NN probe: \S+nowhere\.beton does not exist"):
        make_probe(config, open_loader(config), ALONE)


@pytest.mark.skipif(NO_TURBOJPEG, reason="needs libturbojpeg")
def test_images_without_a_class_among_others_neither_vote_nor_are_asked(tmp_path):
    colours = [np.full((8, 8, 3), value, np.uint8) for value in (10, 240, 20, 230, 240, 10)]
    for split in ("train", "val"):
        labels = (0, 1, 0, 1, -1, -2)
        write_beton(tmp_path / f"{split}.beton", [stored_jpeg(*image) for image in zip(colours, labels)])
    config = config_of(tmp_path / "train.beton")
    probe, _ = make_probe(config, open_loader(config), ALONE)
    assert probe(ColourBackbone()) == 100


def test_synthetic_images_have_a_probe():
    config = config_of("", loader="synthetic")
    probe, note = make_probe(config, open_loader(config), ALONE)
    assert "one training image in 5" in note
    assert 0 <= probe(ColourBackbone()) <= 100


def test_short_side_before_the_crop():
    config = Config()
    assert eval_resize(config) == 256
    assert eval_resize(replace(config, image_size=112)) == 128
    assert eval_resize(replace(config, image_size=32, stem="cifar")) == 32
    assert eval_resize(replace(config, eval_resize=300)) == 300
