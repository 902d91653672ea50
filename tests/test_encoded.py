"""Encoded images by index: the same bytes and labels from a folder, a .beton file and tar shards."""

import io
import os
import resource
import tarfile
from functools import partial

import numpy as np
import pytest
from betons import put_manifest

from fastssl.conformance import samples
from fastssl.data_prep.beton_format import ALLOCATION, DESCRIPTOR, HEADER, IMAGE_FIELD, INT_FIELD, JPEG, RAW, VERSION
from fastssl.data_prep.decode import BadImage
from fastssl.data_prep.sources import Selection, open_source
from fastssl.loaders.choose import choose_loader
from fastssl.loaders.encoded import open_encoded
from fastssl.loaders.make import make_loader

ROW = np.dtype(
    [
        ("image", np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])),
        ("label", "<i8"),
    ],
    align=True,
)


@pytest.fixture
def folder(tmp_path):
    return samples.make_good("folder", tmp_path, 11)


def write_shards(root, images, labels, per_shard=4):
    """WebDataset shards with DALI index files, by the standard library."""
    root.mkdir()
    for start in range(0, len(images), per_shard):
        lines = []
        with tarfile.open(root / f"{start:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(start + per_shard, len(images))):
                parts = []
                for kind, data in (("jpg", images[i]), ("cls", str(labels[i]).encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{kind}")
                    member.size = len(data)
                    parts.append(f"{kind} {tar.offset + 512} {len(data)} {member.name}")
                    tar.addfile(member, io.BytesIO(data))
                lines.append(" ".join(parts))
        (root / f"{start:03d}.idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
    return root


def write_beton(path, images, labels, mode=JPEG):
    """A .beton file as FFCV lays it out, in one page."""
    fields = np.zeros(2, DESCRIPTOR)
    fields["type"], fields["name"] = (IMAGE_FIELD, INT_FIELD), (b"image", b"label")
    rows, table = np.zeros(len(images), ROW), np.zeros(len(images), ALLOCATION)
    start = HEADER.itemsize + fields.nbytes + rows.nbytes
    for i, data in enumerate(images):
        rows[i] = ((mode, 1, len(data) // 3, start) if mode == RAW else (mode, 9, 9, start)), labels[i]
        table[i] = i, start, len(data)
        start += len(data)
    header = np.zeros(1, HEADER)
    header[0] = VERSION, 2, 1 << 21, len(images), start
    path.write_bytes(b"".join([header.tobytes(), fields.tobytes(), rows.tobytes(), *images, table.tobytes()]))
    return path


@pytest.fixture
def everywhere(folder, tmp_path):
    """The same images in a folder, in shards and in a beton, opened."""
    source = open_encoded(folder)
    images, labels = [source.read(i) for i in range(11)], source.label.tolist()
    shards = open_encoded(write_shards(tmp_path / "shards", images, labels))
    return source, shards, open_encoded(write_beton(tmp_path / "x.beton", images, labels))


def test_bytes_and_labels_do_not_depend_on_where_they_lie(everywhere, folder):
    source = everywhere[0]
    assert source.read(3) == (folder / "class0" / "003.jpg").read_bytes() and source.class_names[1] == "class1"
    for other in everywhere[1:]:
        assert [other.read(i) for i in range(11)] == [source.read(i) for i in range(11)]
        assert other.label.tolist() == source.label.tolist() and other.class_names == ["0", "1", "2"]
        assert len({other.name(i) for i in range(11)}) == 11


def test_the_dali_loader_reads_all_three(everywhere, folder, tmp_path):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    seen = []
    for data in (folder, tmp_path / "shards", tmp_path / "x.beton"):
        batches = make_loader("dali", data, batch_size=4, seed=0, device="cpu", workers=2).eval_batches(4)
        seen.append([(batch.index.tolist(), batch.label.tolist(), batch.pixels.tolist()) for batch in batches])
    assert seen[0] == seen[1] == seen[2]


def test_class_names_of_shards_come_from_their_manifest(everywhere, tmp_path):
    put_manifest(tmp_path / "shards", num_images=11, class_names=["cat", "dog", "emu"])
    assert open_encoded(tmp_path / "shards").class_names == ["cat", "dog", "emu"]
    assert len(open_encoded(tmp_path / "shards" / "004.tar").label) == 4


def test_a_shard_that_is_missing_is_noticed(everywhere, tmp_path):
    put_manifest(tmp_path / "shards", num_images=11, class_names=["cat", "dog", "emu"])
    for name in ("004.tar", "004.idx"):
        (tmp_path / "shards" / name).unlink()
    for read in (open_encoded, lambda data: open_source(data, Selection())):
        with pytest.raises(ValueError, match="shards has 7 images, and its manifest says 11: copy it again"):
            read(tmp_path / "shards")


def test_labels_follow_the_classes_of_another_split(everywhere, tmp_path):
    """Wherever the images lie: a held-out split may lack classes that the training split has."""
    size = (tmp_path / "x.beton").stat().st_size
    trained = ["ant", "bee", "cat", "dog", "emu"]
    for data in ("shards", "x.beton"):
        put_manifest(tmp_path / data, num_images=11, class_names=trained[2:], file_bytes=size)
        found = open_encoded(tmp_path / data, trained)
        assert found.label.tolist() == (everywhere[0].label + 2).tolist() and found.class_names == trained
        with pytest.raises(ValueError, match="has a class 'emu' that is not among the 4 classes of the other"):
            open_encoded(tmp_path / data, trained[:4])


def test_a_file_that_vanished_is_a_bad_image(folder):
    source = open_encoded(folder)
    (folder / "class0" / "001.jpg").unlink()
    with pytest.raises(BadImage, match=r"001\.jpg: No such file"):
        source.read(1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "004.idx").unlink(), r"004\.tar has no index .*prep shards"),
        (lambda root: (root / "004.idx").write_text("v1.2 4\n"), "not a complete DALI index"),
        (lambda root: (root / "004.idx").write_text("v9 0\n"), "not a complete DALI index"),
        (lambda root: (root / "004.idx").write_text("v1.2 1\njpg x 3 a.jpg\n"), "line 2 of .*004.idx is damaged"),
        (lambda root: (root / "004.idx").write_text("v1.2 1\ncls 512 1 a.cls\n"), "line 2 of .*004.idx is damaged"),
        (
            lambda root: (root / "004.idx").write_text("v1.1 1\njpg 512 9 cls 0 10\n"),
            "0.jpg holds b'000004.jpg', not a class number",
        ),
        (lambda root: (root / "004.tar").write_bytes(b"x" * 900), "damaged|truncated"),
        (lambda root: (root / "004.tar").write_bytes(b""), "is empty"),
    ],
)
def test_damaged_shards_are_one_clear_sentence(everywhere, tmp_path, damage, words):
    damage(tmp_path / "shards")
    with pytest.raises(ValueError, match=words) as info:
        open_encoded(tmp_path / "shards")
    assert "\n" not in str(info.value)


def test_raw_pixels_are_not_for_a_decoder(tmp_path):
    write_beton(tmp_path / "raw.beton", [bytes(range(12))] * 3, [0, 1, 0], RAW)
    with pytest.raises(ValueError, match=r"3 of its 3 images as raw pixels.*--loader beton"):
        open_encoded(tmp_path / "raw.beton")


def test_more_shards_than_files_may_be_open(folder, tmp_path):
    source = open_encoded(folder)
    root = write_shards(tmp_path / "many", [source.read(i) for i in range(11)], source.label.tolist(), per_shard=1)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    six_more = next(n for n in range(4096) if len(set(range(n)) - taken) == 6)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (six_more, hard))
    try:
        shards = open_encoded(root)
        assert [shards.read(i) for i in range(11)] == [source.read(i) for i in range(11)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_not_a_signal(everywhere, tmp_path):
    (tmp_path / "shards" / "000.tar").write_bytes(b"")
    with pytest.raises(BadImage, match=r"000\.tar/000003\.jpg: the tar file ends inside it"):
        everywhere[1].read(3)


def test_a_beton_that_is_cut_while_it_is_read_gives_what_is_left(everywhere, tmp_path):
    """Of a mapped file, the rest would be zeros up to the end of a page, and behind it a signal."""
    image = everywhere[2].read(10)
    os.truncate(tmp_path / "x.beton", (tmp_path / "x.beton").read_bytes().index(image) + 5)
    assert everywhere[2].read(10) == image[:5]
    with pytest.raises(BadImage):
        everywhere[2].decode(10)


def test_the_image_of_a_sample_need_not_come_first(folder, tmp_path):
    """As wds2idx lists what was packed in the order of the names: cls, json, png."""
    root = write_shards(tmp_path / "shards", [open_encoded(folder).read(0)], [0])
    place = (root / "000.idx").read_text().split("jpg ")[1].split()[:2]
    (root / "000.idx").write_text(f"v1.1 1\njson 0 512 PNG {' '.join(place)} txt 512 2 depth.png 0 9\n")
    assert open_encoded(root).read(0) == open_encoded(folder).read(0)


def test_names_in_an_index_may_have_spaces(folder, tmp_path):
    root = write_shards(tmp_path / "shards", [open_encoded(folder).read(i) for i in range(2)], [0, 1])
    index = (root / "000.idx").read_text()
    (root / "000.idx").write_text(index.replace("00000", "a cat 7 of 1"))
    images = open_encoded(root)
    assert [images.name(i) for i in range(2)] == [f"{root}/000.tar/a cat 7 of 1{i}.jpg" for i in range(2)]
    assert images.read(1) == open_encoded(folder).read(1) and images.label.tolist() == [0, 1]


def test_an_image_folder_may_hold_the_tars_it_was_unpacked_from(folder, tmp_path):
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        archive.add(folder / "class0" / "001.jpg", "001.jpg")
    assert choose_loader("auto", folder)[0] == "folder"
    assert len(open_encoded(folder).label) == len(open_source(folder, Selection())) == 11
    shards = write_shards(tmp_path / "shards", [open_encoded(folder).read(0)], [0])
    for data in (shards, shards / "000.tar"):
        assert choose_loader("auto", data)[0] == "dali" and len(open_encoded(data).label) == 1


@pytest.mark.parametrize(
    "read", [open_encoded, partial(choose_loader, "auto"), lambda data: open_source(data, Selection())]
)
def test_images_beside_a_tar_file_are_neither_passed_over_nor_read_in_its_place(read, folder, tmp_path):
    shards = write_shards(tmp_path / "shards", [open_encoded(folder).read(0)], [0])
    (shards / "logo.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"such as logo\.png and 000\.tar: move either"):
        read(shards)
