"""Data sets laid out as they are published: what becomes a class, what is refused, and what is said of the rest."""

import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prep_images import jpeg

from fastssl.cli import main
from fastssl.config import Config, replace
from fastssl.data_prep.find import find_images
from fastssl.data_prep.sources import Selection, open_source
from fastssl.data_prep.splits import look_like_splits
from fastssl.distributed import Ranks
from fastssl.eval.images import open_splits
from fastssl.eval.online import make_probe
from fastssl.eval.session import Session
from fastssl.loaders.make import make_loader

ALONE = Ranks(0, 1, torch.device("cpu"))
MANY = [f"n{i:08d}" for i in range(9)]


def make_tree(root, *names, data=b"x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def make_tar(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["cars_train", "cars_test"], ("cars_train", "cars_test")),
        (["train2017", "val2017", "unlabeled2017"], ("train2017", "val2017")),
        (["train_val2018", "test2018"], ("train_val2018", "test2018")),
        (["data_256", "val_256"], ("data_256", "val_256")),
        (["TRAIN", "Testing", "Extra"], ("TRAIN", "Testing")),
        ([*MANY, "ILSVRC2012_img_train", "ILSVRC2012_img_val"], ("ILSVRC2012_img_train", "ILSVRC2012_img_val")),
        (["bullet-train", "test-tube"], None),
        ([*MANY, "training_ship", "test_tube"], None),
        (["train_val2018", "trains", "tests"], None),
    ],
)
def test_splits_are_told_from_classes_by_their_names(names, found):
    assert look_like_splits(names) == found


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["cars_train/1.jpg", "cars_test/1.jpg"], "cars_train and cars_test, which look like splits"),
        (["data_256/a/airfield/1.jpg", "val_256/1.jpg"], "data_256 and val_256, which look like splits"),
        (["images/beagle_1.jpg", "annotations/trimaps/beagle_1.png"], "images and annotations, which are no classes"),
        (["VOC/JPEGImages/1.jpg", "VOC/SegmentationClass/1.png"], "VOC holds JPEGImages and SegmentationClass, which"),
        (["train/train/cat/1.jpg", "train/train/dog/1.jpg"], "its training images in .*/train/train: give .*/train$"),
    ],
)
def test_splits_and_masks_do_not_become_classes(tmp_path, paths, message):
    make_tree(tmp_path, *paths)
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path)


def test_classes_named_like_splits_stay_classes(tmp_path):
    names = ["apple", "bullet-train", "test-tube"]
    for name in names:
        make_tree(tmp_path / "folders", f"{name}/photos/1.jpg")
        make_tar(tmp_path / "tars" / f"{name}.tar", [f"{name}_1.jpg"])
    assert find_images(tmp_path / "folders").class_names == names
    assert open_source(tmp_path / "tars", Selection()).folder.class_names == names


def test_a_folder_around_the_classes_of_a_split_is_no_class(tmp_path):
    make_tree(tmp_path, *(f"{split}/images/{name}/1.jpg" for split in ("train", "val") for name in "ab"))
    train = find_images(tmp_path)
    assert train.class_names == ["a", "b"] and train.paths == ["a/1.jpg", "b/1.jpg"]
    assert find_images(tmp_path / "val", train.class_names).labels.tolist() == [0, 1]


def test_within_a_training_split_a_tar_file_is_read_as_a_folder_is(tmp_path):
    names = ["train/images/a/1.jpg", "train/images/b/2.jpg", "val/images/a/3.jpg"]
    make_tree(tmp_path / "data", *names)
    make_tar(tmp_path / "classes.tar", names)
    packed, folder = open_source(tmp_path / "classes.tar", Selection()).folder, find_images(tmp_path / "data")
    assert packed.paths == folder.paths == ["a/1.jpg", "b/2.jpg"] and packed.class_names == folder.class_names
    make_tar(tmp_path / "masks.tar", ["train/images/1.jpg", "train/masks/1.png", "val/images/2.jpg"])
    with pytest.raises(ValueError, match=r"masks\.tar/train holds images and masks, which are no classes"):
        open_source(tmp_path / "masks.tar", Selection())
    make_tree(tmp_path / "outer", "set/train/images/a/1.jpg", "set/train/images/b/2.jpg")
    with pytest.raises(ValueError, match=r"outer has its training images in .*/set/train: give .*/set$"):
        find_images(tmp_path / "outer")


def test_a_hidden_folder_of_images_is_no_class_beside_train(tmp_path):
    make_tree(tmp_path, "train/1.jpg", "val/1.jpg", ".thumbnails/1.jpg")
    assert find_images(tmp_path).paths == ["1.jpg"]


def test_tiny_imagenet_s_held_out_images_have_the_classes_of_its_list(tmp_path):
    make_tree(tmp_path, *(f"train/{name}/images/{name}_0.JPEG" for name in ("n01", "n02", "n03")))
    make_tree(tmp_path / "val", "images/val_0.JPEG", "images/val_1.JPEG", "images/val_2.JPEG")
    listed = tmp_path / "val" / "val_annotations.txt"
    listed.write_text("val_2.JPEG\tn01\t0\t32\t44\t62\nval_0.JPEG\tn03\t1\t2\t3\t4\nval_1.JPEG\tn01\t5\t6\t7\t8\n")
    train = find_images(tmp_path)
    assert train.class_names == ["n01", "n02", "n03"] and not train.notices
    val = find_images(tmp_path / "val", train.class_names)
    assert val.labels.tolist() == [2, 0, 0] and val.path(2) == str(tmp_path / "val/images/val_2.JPEG")
    listed.write_bytes(b"val_0.JPEG\tn02\nval_1.JPEG\tn03\r\nval_2.JPEG\tn01\nval_\xff.JPEG\tn01")  # nothing else
    assert find_images(tmp_path / "val", train.class_names).labels.tolist() == [1, 2, 0]
    make_tree(tmp_path / "val", "images/val_3.JPEG")
    with pytest.raises(ValueError, match=r"val_annotations\.txt does not say the class of val_3\.JPEG"):
        find_images(tmp_path / "val")


def test_classes_further_down_are_said_not_to_be_used(tmp_path):
    make_tree(tmp_path, "train/a/airfield/1.jpg", "train/a/alley/1.jpg", "train/b/bar/1.jpg")
    folder = find_images(tmp_path)
    assert folder.class_names == ["a", "b"]
    assert folder.notices == (
        f"the classes are the 2 folders of {tmp_path}/train, such as a, not the 3 folders below them that hold images",
    )
    make_tree(tmp_path, "train/a/1.jpg")  # images beside the folders: these are the class's own
    assert not find_images(tmp_path).notices


def test_pictures_of_other_kinds_are_counted(tmp_path, capsys):
    make_tree(tmp_path, "data/a/1.HEIC", "data/b/2.heic", "data/b/x.dng", "data/b/1.xml", "data/b/Thumbs.db")
    make_tree(tmp_path, "data/a/1.jpg", "data/b/1.jpg", data=jpeg(8, 8))
    notice = "passed over 3 files of kinds that are not read (.dng 1, .heic 2): save them as JPEG or PNG to use them"
    data = tmp_path / "data"
    loaders = [make_loader(name, data, batch_size=1, seed=0, device="cpu") for name in ("auto", "resident")]
    assert [list(loader.notices) for loader in loaders] == [[notice], [notice]]
    session = Session(SimpleNamespace(max_mem_gb=None, precision="fp32"), ALONE)
    assert session.warn_bad(loaders[0], loaders[0]) == 0
    assert capsys.readouterr().err == f"fastssl: {notice}\n"
    loaders[0].close()
    assert main(["prep", "beton", str(tmp_path / "data"), str(tmp_path / "a.beton"), "--workers", "1"]) == 0
    assert f"a.beton: {notice}\n" in capsys.readouterr().err
    make_tar(tmp_path / "x.tar", ["a/1.jpg", "b/1.jpg", "b/2.jxl"])
    assert open_source(tmp_path / "x.tar", Selection(count=1)).folder.notices == (
        "passed over 1 file of a kind that is not read (.jxl 1): save them as JPEG or PNG to use them",
    )


def test_a_single_class_is_none_for_an_accuracy(tmp_path):
    make_tree(tmp_path, "train/cat/1.jpg", "val/cat/1.jpg", data=jpeg(8, 8))
    config = replace(Config(), data=str(tmp_path))
    loader = make_loader("folder", tmp_path, batch_size=1, seed=0, device="cpu")
    assert make_probe(config, loader, ALONE) == (
        None,
        "no k-NN probe: it needs classes, and all images are in one, cat",
    )
    loader.close()
    with pytest.raises(ValueError, match="train has but one class, cat: an accuracy needs several"):
        open_splits(SimpleNamespace(data=tmp_path, workers=1), ALONE)


def test_tar_files_further_down_are_named(tmp_path):
    make_tar(tmp_path / "fall11" / "n01.tar", ["n01_1.JPEG"])
    with pytest.raises(
        ValueError, match=r"holds no images .*: fastssl prep beton converts the tar files in \S+/fall11, and"
    ):
        find_images(tmp_path)
    assert np.array_equal(open_source(tmp_path / "fall11", Selection()).folder.labels, [-1])
