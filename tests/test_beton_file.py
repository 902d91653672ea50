"""The index of .beton files: ours, FFCV's own, and every way one can be damaged."""

import os
import time

import numpy as np
import pytest
from betons import FFCV_PHOTOS, ROW, encode_jpeg, put_manifest, stored_jpeg, write_beton
from photos import render_photo

from fastssl.data_prep.beton_format import ALLOCATION, DESCRIPTOR, FRONT, HEADER, JPEG, RAW
from fastssl.data_prep.describe import describe
from fastssl.data_prep.verify import verify
from fastssl.loaders import beton_file
from fastssl.loaders.beton_file import open_beton

PHOTOS = [render_photo(20 + 7 * i, 31 + 5 * (i % 3), seed=i) for i in range(6)]


@pytest.fixture
def small(tmp_path):
    """Six JPEGs with labels 0, 1, 2, 0, 1, 2."""
    return write_beton(tmp_path / "small.beton", [stored_jpeg(photo, i % 3) for i, photo in enumerate(PHOTOS)])


def damage(path, change):
    """Rewrites a file with `change(bytearray)` applied; a returned value takes its place."""
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.write_bytes(data if changed is None else changed)


def header_of(data):
    return np.frombuffer(data, HEADER, 1).copy()


def set_header(data, **values):
    header = header_of(data)
    for name, value in values.items():
        header[name] = value
    data[: HEADER.itemsize] = header.tobytes()


def set_row(data, i, **values):
    """Changes the image metadata of sample i."""
    start = HEADER.itemsize + 2 * DESCRIPTOR.itemsize + i * ROW.itemsize
    row = np.frombuffer(bytes(data[start : start + ROW.itemsize]), ROW).copy()
    for name, value in values.items():
        row["image"][name] = value
    data[start : start + ROW.itemsize] = row.tobytes()


def test_the_index_is_what_was_written(small):
    beton = open_beton(str(small))
    assert len(beton) == 6 and beton.class_names == ["0", "1", "2"]
    assert beton.label.tolist() == [0, 1, 2, 0, 1, 2] and beton.mode.tolist() == [JPEG] * 6
    assert list(zip(beton.height, beton.width)) == [photo.shape[:2] for photo in PHOTOS]
    assert [a.dtype.name for a in (beton.label, beton.pointer, beton.size)] == ["int64"] * 3
    assert [a.dtype.name for a in (beton.mode, beton.height, beton.width)] == ["uint8", "int32", "int32"]
    assert all(bytes(beton.bytes(i)) == encode_jpeg(photo) for i, photo in enumerate(PHOTOS))
    assert not beton.data.flags.writeable


def test_an_empty_allocation_may_share_an_image_s_pointer(small):
    pointer = int(open_beton(small).pointer[3])

    def change(data):
        return bytes(data) + np.array([(3, pointer, 0)], ALLOCATION).tobytes()

    sizes = open_beton(small).size.tolist()
    damage(small, change)
    assert open_beton(small).size.tolist() == sizes


def test_the_manifest_names_the_classes(tmp_path):
    images = [stored_jpeg(PHOTOS[0], label) for label in (1, 0)]
    beton = open_beton(write_beton(tmp_path / "a.beton", images, class_names=["cat", "dog", "none of these"]))
    assert beton.class_names == ["cat", "dog", "none of these"] and beton.label.tolist() == [1, 0]


def test_labels_follow_the_classes_of_another_split(tmp_path):
    path = write_beton(tmp_path / "a.beton", [stored_jpeg(PHOTOS[0], c) for c in (1, 0)], ["dog", "cat"])
    assert open_beton(path).label.tolist() == [1, 0] and open_beton(path).class_names == ["dog", "cat"]
    beton = open_beton(path, ["ant", "cat", "dog"])
    assert beton.label.tolist() == [1, 2] and beton.class_names == ["ant", "cat", "dog"]
    with pytest.raises(ValueError, match=r"a\.beton has a class 'dog' that is not among the 2 classes of the other"):
        open_beton(path, ["ant", "cat"])


def keep(count):
    return lambda data: bytes(data[:count])


def without_table(data):
    return bytes(data[: int(header_of(data)["table"][0])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (keep(-1), "truncated or damaged: its allocation table has 143 bytes, not a multiple of 24"),
        (keep(-24), "truncated or damaged: its allocation table lacks 1 image, first image 5"),
        (keep(-4 * 24), "its allocation table lacks 4 images, first image 2"),
        (without_table, "its allocation table lacks 6 images, first image 0"),
        (lambda data: bytes(data[: len(data) - len(data) // 100]), "its allocation table should begin at byte"),
        (keep(2000), "truncated or damaged: it ends within its header"),
        (keep(2150), "there is no room for the metadata of 6 images"),
        (keep(10), "it ends within its header"),
        (keep(0), "it ends within its header"),
        (lambda data: set_header(data, table=0), r"conversion that wrote \S+ did not finish"),
        (lambda data: set_header(data, version=3), "not a .beton file of FFCV 1.0's format"),
        (lambda data: set_header(data, samples=1 << 60), "no room for the metadata of 1,152,921"),
        (lambda data: bytes(3000), "not a .beton file"),
        (lambda data: b"\x89PNG\r\n\x1a\n" * 1000, "not a .beton file"),
        (lambda data: set_row(data, 2, height=0), "is damaged: image 2 has no pixels"),
        (lambda data: set_row(data, 2, height=65535, width=65535), "image 2 has more than 89,478,485 pixels"),
        (lambda data: set_row(data, 4, mode=2), "is damaged: image 4 is stored in an unknown mode"),
        (lambda data: set_row(data, 4, mode=RAW), "image 4 has too few or too many bytes for its height and width"),
        (lambda data: set_row(data, 1, pointer=1 << 63), "its allocation table lacks 1 image, first image 1"),
    ],
)
def test_damage_is_one_clear_sentence(small, change, message):
    damage(small, change)
    with pytest.raises(ValueError, match=message) as info:
        open_beton(small)
    assert str(small) in str(info.value) and "\n" not in str(info.value)


def test_bytes_outside_of_the_data_are_found(small):
    def change(data):
        at = int(header_of(data)["table"][0]) + 5 * 24 + 16
        data[at : at + 8] = (1 << 40).to_bytes(8, "little")

    damage(small, change)
    with pytest.raises(ValueError, match="image 5 lies outside the file"):
        open_beton(small)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder, not a \.beton file"):
        open_beton(tmp_path)
    with pytest.raises(ValueError, match=r"no\.beton does not exist"):
        open_beton(tmp_path / "no.beton")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"file_bytes": 7}, "its manifest says 7"),
        ({"num_images": 5}, "6 images, and its manifest says 5"),
        ({"class_names": ["a", "b"]}, "label 2 but its manifest names 2"),
    ],
)
def test_a_manifest_that_does_not_fit(small, manifest, message):
    fitting = {"num_images": 6, "class_names": ["a", "b", "c"], "file_bytes": small.stat().st_size}
    put_manifest(small, **(fitting | manifest))
    with pytest.raises(ValueError, match=message):
        open_beton(small)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"name": "of another program"}', '{"format": 2, "sha256": "x"}'])
def test_what_is_no_manifest_stops_every_reader_with_one_sentence(small, text):
    small.with_name(small.name + ".json").write_text(text)
    said = set()
    for reader in (open_beton, verify, describe):
        with pytest.raises(ValueError, match=r"small\.beton\.json .*convert the images again") as info:
            reader(small)
        said.add(str(info.value))
    assert len(said) == 1


def test_labels_below_0_are_no_classes(tmp_path):
    """As semi-supervised sets mark what they know no class of; FFCV writes any integer."""
    photos = [stored_jpeg(photo, label) for photo, label in zip(PHOTOS, (0, -1, -2, -100, 1, 0))]
    path = write_beton(tmp_path / "x.beton", photos)
    assert open_beton(path).label.tolist() == [0, -1, -1, -1, 1, 0]
    assert open_beton(path, ["2", "1", "0"]).label.tolist() == [2, -1, -1, -1, 1, 2]


def test_labels_that_are_no_class_numbers(small):
    """Say the only number FFCV was given: the image's. A name for each would fill the memory."""
    damage(small, lambda data: data.__setitem__(slice(FRONT + 16, FRONT + 24), (20_000_000).to_bytes(8, "little")))
    with pytest.raises(ValueError, match="a label 20,000,000, too large for a class number"):
        open_beton(small)


def test_two_million_images_in_a_file_above_4_gib_open_in_seconds(tmp_path):
    """Sparse: metadata and table are written, the 8 GB between them are a hole."""
    n, size = 2_000_000, 4096
    path = tmp_path / "large.beton"
    start = HEADER.itemsize + 2 * DESCRIPTOR.itemsize + n * ROW.itemsize
    rows, table = np.zeros(n, ROW), np.zeros(n, ALLOCATION)
    place = np.random.default_rng(0).permutation(n)  # as several writers leave it
    rows["image"]["width"], rows["image"]["height"], rows["label"] = 8, 9, np.arange(n) % 1000
    rows["image"]["pointer"] = table["pointer"] = start + place * size
    table["sample"], table["size"] = np.arange(n), 1000 + place % 7
    fields = np.zeros(2, DESCRIPTOR)
    fields["type"], fields["name"] = (2, 1), (b"image", b"label")
    header = np.array([(2, 2, 1 << 21, n, start + n * size)], HEADER)
    with open(path, "wb") as file:
        file.write(header.tobytes() + fields.tobytes())
        rows.tofile(file)
        file.seek(start + n * size)
        table.tofile(file)
    begun = time.monotonic()
    beton = open_beton(path)
    assert time.monotonic() - begun < 10
    assert os.stat(path).st_size > 1 << 32 and len(beton) == n and len(beton.class_names) == 1000
    assert np.array_equal(beton.pointer, start + place * size) and beton.pointer.max() > 1 << 32
    assert np.array_equal(beton.size, 1000 + place % 7)
    last = int(beton.pointer.argmax())
    assert len(beton.bytes(last)) == beton.size[last]


def test_the_index_needs_no_decoder():
    assert not {"ffcv", "llvm", "decode_stored_images"} & set(vars(beton_file))


def test_files_of_ffcv_s_own_writer(by_ffcv):
    """Every mode, and fields of every kind around the image."""
    modes = {}
    for name in ("jpg", "raw", "proportion", "smart", "many"):
        beton = open_beton(by_ffcv / f"{name}.beton")
        assert list(zip(beton.height, beton.width)) == [photo.shape[:2] for photo in FFCV_PHOTOS]
        assert beton.label.tolist() == [i % 3 for i in range(len(FFCV_PHOTOS))] and len(beton.class_names) == 3
        modes[name] = set(beton.mode.tolist())
        for i, photo in enumerate(FFCV_PHOTOS):
            data = bytes(beton.bytes(i))
            assert data == photo.tobytes() if beton.mode[i] == RAW else data.endswith(b"\xff\xd9")
    assert modes == {"jpg": {0}, "raw": {1}, "proportion": {0, 1}, "smart": {0, 1}, "many": {0}}


def set_fields(data, change):
    fields = np.frombuffer(bytes(data), DESCRIPTOR, 2, HEADER.itemsize).copy()
    change(fields)
    data[HEADER.itemsize : HEADER.itemsize + fields.nbytes] = fields.tobytes()


@pytest.mark.parametrize(
    ("types", "names", "message"),
    [
        ((255, 1), (b"mine", b"label"), "has a field 'mine' of a type unknown to FFCV"),
        ((4, 1), (b"vector", b"label"), "has no image field, only vector, label"),
        ((2, 2), (b"left", b"right"), "has 2 fields that could be the image: name one of them 'image'"),
    ],
)
def test_fields_that_cannot_be_read(small, types, names, message):
    def change(fields):
        fields["type"], fields["name"] = types, names

    damage(small, lambda data: set_fields(data, change))
    with pytest.raises(ValueError, match=message):
        open_beton(small)


def test_a_file_without_labels(small):
    damage(small, lambda data: set_fields(data, lambda fields: fields["type"].__setitem__(1, 0)))
    beton = open_beton(small)
    assert beton.label.tolist() == [-1] * 6 and beton.class_names == []
