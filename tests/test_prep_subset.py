"""fastssl prep subset: class lists, links, --force; and the help of every subcommand."""

import os

import pytest
from prep_images import jpeg, write_photos

from fastssl.cli import main
from fastssl.data_prep.class_list import IMAGENET100, read_classes
from fastssl.data_prep.find import find_images
from fastssl.data_prep.splits import SPLITS
from fastssl.data_prep.subset import make_subset

IDS = ["n01440764", "n01443537", "n02869837"]


@pytest.fixture
def imagenet(tmp_path):
    for split in ("train", "val"):
        write_photos(tmp_path / "imagenet" / split, {name: [(8, 8)] for name in IDS})
    return tmp_path / "imagenet"


def test_imagenet_100_is_a_hundred_different_wordnet_ids(tmp_path):
    names = read_classes("imagenet100", IMAGENET100.read_text().split() + IDS, "here")
    assert len(set(names)) == 100 and names[0] == "n02869837" and names[-1] == "n02090622"
    for name in names:
        (tmp_path / "in" / "train" / name).mkdir(parents=True)
        (tmp_path / "in" / "train" / name / "x.jpg").write_bytes(jpeg(4, 4))
    assert main(["prep", "subset", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert find_images(tmp_path / "out").class_names == sorted(names)


def test_links_in_every_split(imagenet, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prep", "subset", str(imagenet), str(out), "--classes", f"{IDS[2]},{IDS[0]}"]) == 0
    assert f"{out}/train: 2 classes\n{out}/val: 2 classes\n" == capsys.readouterr().out
    for split in ("train", "val"):
        assert sorted(os.listdir(out / split)) == [IDS[0], IDS[2]]
        assert (out / split / IDS[0]).readlink() == imagenet / split / IDS[0]
    assert find_images(out).paths == [f"{IDS[0]}/0.jpg", f"{IDS[2]}/0.jpg"]
    assert make_subset(imagenet / "train", tmp_path / "flat", IDS[1]) == {"": 1}


def test_many_names_on_the_command_line(tmp_path):
    """Together they are longer than a file's name may be."""
    names = [f"n{number:08d}" for number in range(40)]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
    assert make_subset(tmp_path / "data", tmp_path / "out", ",".join(names[1:])) == {"": 39}


@pytest.mark.parametrize("classes", ["001.Albatross", "001.Albatross, 002.Auklet"])
def test_class_names_with_dots(classes):
    """As CUB-200's and Caltech-256's; what looks like a path and is no class is still taken for a list."""
    existing = ["001.Albatross", "002.Auklet", "003.Bobolink"]
    assert read_classes(classes, existing, "here") == [name.strip() for name in classes.split(",")]
    with pytest.raises(ValueError, match=r"the class list birds\.txt does not exist"):
        read_classes("birds.txt", existing, "here")


def test_every_name_of_a_split_is_linked(tmp_path):
    for split in SPLITS:
        write_photos(tmp_path / "data" / split, {"apple": [(8, 8)], "pear": [(8, 8)]})
    assert make_subset(tmp_path / "data", tmp_path / "out", "pear") == dict.fromkeys(SPLITS, 1)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(SPLITS)


def test_a_class_may_be_called_train(tmp_path):
    write_photos(tmp_path / "cifar100" / "train", {"apple": [(8, 8)], "test": [(8, 8)], "train": [(8, 8)]})
    assert make_subset(tmp_path / "cifar100" / "train", tmp_path / "out", "apple,train") == {"": 2}
    assert find_images(tmp_path / "out").class_names == ["apple", "train"]


def test_force_replaces_a_subset_of_splits_by_one_without(imagenet, tmp_path):
    make_subset(imagenet, tmp_path / "out", IDS[0])
    make_subset(imagenet / "train", tmp_path / "out", IDS[1], force=True)
    assert os.listdir(tmp_path / "out") == [IDS[1]]
    assert find_images(tmp_path / "out").class_names == [IDS[1]]


def test_force_replaces_links_and_nothing_else(imagenet, tmp_path):
    out = tmp_path / "out"
    make_subset(imagenet, out, IDS[0])
    with pytest.raises(ValueError, match="--force"):
        make_subset(imagenet, out, IDS[1])
    make_subset(imagenet, out, IDS[1], force=True)
    assert os.listdir(out / "train") == os.listdir(out / "val") == [IDS[1]]
    (out / "train" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt is not a link"):
        make_subset(imagenet, out, IDS[2], force=True)
    assert os.listdir(out / "val") == [IDS[1]]
    assert (imagenet / "train" / IDS[0] / "0.jpg").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n0144076\n", r"entry 1: 'n0144076' is not a WordNet id"),
        ("# list\n\nn01440764\nn01440764x\n", r"entry 4: 'n01440764x'"),
        ("n01440764\nn01440764\n", "names n01440764 twice"),
        ("n01440764\nn99999999\n", "no class n99999999, which .*: name some that it has with --classes"),
        ("n01440763\nn99999999\n", r"n01440763, .* \(it lacks 2 of them\); did you mean n01440764"),
        ("\n# nothing\n", "names no classes"),
        ("n01440764\udcff\n", r"list\.txt is not a text file"),
    ],
)
def test_wrong_lists_make_nothing(imagenet, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        make_subset(imagenet, tmp_path / "out", str(tmp_path / "list.txt"))
    assert not (tmp_path / "out").exists()


def test_a_list_as_windows_writes_it(imagenet, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(IDS).encode())
    assert make_subset(imagenet, tmp_path / "out", str(tmp_path / "list.txt")) == {"train": 3, "val": 3}


def test_a_class_missing_in_one_split_makes_nothing(imagenet, tmp_path):
    (imagenet / "val" / IDS[1] / "0.jpg").unlink()
    (imagenet / "val" / IDS[1]).rmdir()
    with pytest.raises(ValueError, match=f"val has no class {IDS[1]}"):
        make_subset(imagenet, tmp_path / "out", ",".join(IDS))
    assert not (tmp_path / "out").exists()


def test_a_split_without_classes_is_named(tmp_path):
    """ImageNet's val as unpacked, and Tiny ImageNet's."""
    for below in ("x.JPEG", "images/x.JPEG"):
        write_photos(tmp_path / below / "train", {IDS[0]: [(8, 8)]})
        (tmp_path / below / "val" / below).parent.mkdir(parents=True)
        (tmp_path / below / "val" / below).write_bytes(jpeg(8, 8))
        with pytest.raises(ValueError, match="val has none of the classes of train"):
            make_subset(tmp_path / below, tmp_path / "out", IDS[0])
        assert make_subset(tmp_path / below / "train", tmp_path / "out", IDS[0], force=True) == {"": 1}


def test_other_mistakes(imagenet, tmp_path):
    for data, out, classes, message in (
        (imagenet / "none", tmp_path / "out", IDS[0], "is not a folder"),
        (imagenet, imagenet / "sub", IDS[0], "is inside"),
        (imagenet, tmp_path / "out", str(tmp_path / "none.txt"), r"none\.txt does not exist"),
        (imagenet, imagenet / "train" / IDS[0] / "0.jpg", IDS[0], "is inside"),
    ):
        with pytest.raises(ValueError, match=message):
            make_subset(data, out, classes)


def test_names_that_are_no_wordnet_ids_may_be_classes(tmp_path):
    write_photos(tmp_path / "pets", {"cat": [(8, 8)], "dog": [(8, 8)]})
    assert make_subset(tmp_path / "pets", tmp_path / "cats", "cat") == {"": 1}
    assert os.listdir(tmp_path / "cats") == ["cat"]


@pytest.mark.parametrize("name", ["beton", "shards", "subset", "verify", "describe"])
def test_help_teaches(name, capsys):
    assert main(["prep", "--help"]) == 0
    assert name in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["prep", name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"fastssl prep {name}" in text
    if name in ("beton", "shards"):
        for (
            flag
        ) in "--short-side --originals --quality --raw --classes --per-class --count --workers --on-error".split():
            assert flag in text


def test_unknown_subcommands(capsys):
    assert main(["prep", "betn"]) == 2 and "did you mean 'beton'" in capsys.readouterr().err
    assert main(["prep"]) == 2
