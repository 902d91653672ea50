"""fastssl prep beton: what it writes is what FFCV reads; order, labels and bytes; bad files; kills."""

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from prep_images import bad_kinds, encode, jpeg, kinds, prepare_or_die, render, turned, write_kinds, write_photos

from fastssl.data_prep import convert
from fastssl.data_prep.beton_format import IMAGE_FIELD, JPEG, RAW, read_tables, record_sizes
from fastssl.data_prep.beton_writer import BLOCK, BetonWriter
from fastssl.data_prep.decode import BadImage, decode_image
from fastssl.data_prep.find import find_images
from fastssl.data_prep.jpeg import NotPlain
from fastssl.data_prep.manifest import read_manifest
from fastssl.data_prep.prepare import Store, pass_image, prepare_image, shrink
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.verify import verify
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton

ONE = Work(workers=1)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
BIG_ENDIAN_LONG = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\4\0\0\0\1\0\0\0\6" + bytes(4)  # EXIF orientation 6
SIZES = {"ant": [(40, 60), (64, 64), (30, 90)], "bee": [(20, 24), (100, 50)], "wasp": [(33, 47)]}


def write(data, out, store=None, selection=None, work=ONE, **options):
    return write_beton(data, out, store or Store(), selection or Selection(), work, **options)


def records(path):
    """(metadata row, bytes) of every image, read as numpy sees the file."""
    tables, content = read_tables(path), path.read_bytes()
    images = tables.column(IMAGE_FIELD, "image")
    return [
        (row, content[int(row["pointer"]) : int(row["pointer"] + size)])
        for row, size in zip(images, record_sizes(tables, images["pointer"]))
    ]


def labels(path):
    return read_tables(path).samples["f1"].tolist()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "train", SIZES).parent


def test_order_and_labels_are_the_folder_loaders(photos, tmp_path):
    out = tmp_path / "x.beton"
    write(photos, out, work=Work(workers=2))
    folder = find_images(photos)
    assert labels(out) == folder.labels.tolist()
    manifest = read_manifest(out)
    assert manifest["class_names"] == folder.class_names == ["ant", "bee", "wasp"]
    assert manifest["class_counts"] == [3, 2, 1] and manifest["num_images"] == 6
    listed = [json.loads(line)["path"] for line in (tmp_path / "x.beton.images.jsonl").read_text().splitlines()]
    assert listed == folder.paths
    for i, (row, data) in enumerate(records(out)):  # all are smaller than 256: as they are
        assert data == Path(folder.path(i)).read_bytes()
        assert decode_image(data).shape[:2] == (row["height"], row["width"])


def test_the_shorter_side_is_made_smaller_never_larger(photos, tmp_path):
    out = tmp_path / "x.beton"
    write(photos, out, Store(short_side=32))
    sizes = [(int(row["height"]), int(row["width"])) for row, _ in records(out)]
    assert sizes == [(32, 48), (32, 32), (30, 90), (20, 24), (64, 32), (32, 46)]
    for i, (row, data) in enumerate(records(out)):
        assert row["mode"] == JPEG
        original = Image.fromarray(decode_image(find_images(photos).path(i)))
        expected = np.asarray(original.resize((int(row["width"]), int(row["height"])), Image.Resampling.BICUBIC))
        difference = np.abs(decode_image(data).astype(int) - expected)
        assert difference.mean() < 8, i  # JPEG, colours at half the resolution


def test_shrinking_is_antialiased():
    """Stripes a pixel wide become grey; without antialiasing they would become other stripes."""
    stripes = np.tile(np.array([0, 255], np.uint8), (512, 256))
    small = np.asarray(shrink(Image.fromarray(stripes).convert("RGB"), 192))
    assert np.abs(small.astype(int) - 127)[:, 4:-4].max() < 25


@pytest.mark.parametrize("size", [(40, 60), (33, 90), (500, 33), (257, 65)])
def test_shrinking_is_pillows_bicubic(size):
    image = Image.fromarray(render(*size))
    small = shrink(image, 32)
    assert min(small.size) == 32
    expected = np.asarray(image.resize(small.size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(small) - expected).max() <= 1


def test_a_disk_that_refuses_ends_the_run(photos, tmp_path, monkeypatch):
    def refuse(self, block):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(BetonWriter, "_write", refuse)
    with pytest.raises(OSError, match=r"No space left.*here"):
        write(photos, tmp_path / "here" / "x.beton")
    assert not os.listdir(tmp_path / "here")


@pytest.mark.parametrize("factor", [4, 8])
def test_a_large_jpeg_decoded_at_a_part_of_its_size_stays_nearly_the_same(factor):
    data = jpeg(64 * factor, 80 * factor, quality=95)
    prepared = prepare_image(data, "x.jpg", Store(short_side=64, raw=True))
    exact = np.asarray(shrink(Image.fromarray(decode_image(data)), 64)).astype(int)
    found = np.frombuffer(prepared.data, np.uint8).reshape(64, 80, 3).astype(int)
    assert np.abs(found - exact).mean() < 2


def test_raw_pixels_are_the_decoders(photos, tmp_path):
    out = tmp_path / "x.beton"
    write(photos, out, Store(raw=True))
    for i, (row, data) in enumerate(records(out)):
        pixels = np.frombuffer(data, np.uint8).reshape(row["height"], row["width"], 3)
        np.testing.assert_array_equal(pixels, decode_image(find_images(photos).path(i)))
        assert row["mode"] == RAW


def test_every_kind_of_file_is_used_or_listed(tmp_path):
    good, bad = kinds(), bad_kinds()
    data, out = write_kinds(tmp_path / "images", good, bad), tmp_path / "x.beton"
    write(data, out, Store(raw=True))
    manifest = read_manifest(out)
    reasons = {image["path"]: image["reason"] for image in manifest["quarantined"]}
    assert reasons.keys() == bad.keys()
    assert not [name for name, (_, reason) in bad.items() if reason not in reasons[name]]
    lines = [json.loads(line) for line in (tmp_path / "x.beton.images.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == good.keys()
    assert not [line for line in lines if good[line["path"]][1] not in line["notes"]]
    for (row, stored), line in zip(records(out), lines):
        expected = decode_image(data / line["path"])
        assert (row["height"], row["width"]) == expected.shape[:2], line
        np.testing.assert_array_equal(np.frombuffer(stored, np.uint8), expected.ravel())
    assert labels(out) == [-1] * len(good) and manifest["class_names"] == []


def test_originals_pass_byte_for_byte_where_they_can(tmp_path):
    good, bad = kinds(), bad_kinds()
    good |= {
        "plain.jpg": (jpeg(300, 400), None),
        "progressive.jpg": (jpeg(300, 400, progressive=True), None),
        "full_colour.jpg": (jpeg(31, 17, subsampling=0), None),
        "upright.jpg": (turned(1), None),
        "upright_by_xmp.jpg": (jpeg(30, 50, xmp=XMP % 1), None),
        "turned_by_xmp.jpg": (jpeg(30, 50, xmp=XMP % 6), "EXIF orientation 6"),
        "turned_by_32_bits.jpg": (jpeg(30, 50, exif=BIG_ENDIAN_LONG), "EXIF orientation 6"),
        "turned_twice_named.jpg": (jpeg(30, 50, exif=b"Exif\0\0" + BIG_ENDIAN_LONG), "EXIF orientation 6"),
        "longer.jpg": (jpeg(30, 50) + b"and something behind it", None),
    }
    data, out = write_kinds(tmp_path / "images", good, bad), tmp_path / "x.beton"
    write(data, out, Store(originals=True))
    lines = [json.loads(line) for line in (tmp_path / "x.beton.images.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == good.keys()
    passed = set()
    for (row, stored), line in zip(records(out), lines):
        name = line["path"]
        assert (row["height"], row["width"]) == decode_image(stored).shape[:2] == decode_image(data / name).shape[:2]
        with Image.open(io.BytesIO(stored)) as image:
            assert image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(0x0112, 1) == 1
        passed |= {name} if stored == good[name][0] else set()
    assert passed == {name for name, (_, note) in good.items() if note in (None, "greyscale")}
    manifest = read_manifest(out)
    assert manifest["stored"] == {"passed": len(passed), "encoded": len(good) - len(passed)}
    assert {image["path"] for image in manifest["quarantined"]} == bad.keys()


@pytest.mark.parametrize("kind", [{}, {"progressive": True}])
def test_an_original_cut_anywhere_is_never_passed_on(tmp_path, kind):
    data = jpeg(40, 50, **kind)
    assert pass_image(data).data == data
    for end in [*range(0, len(data) - 2, 7), len(data) - 2]:
        with pytest.raises(NotPlain):
            pass_image(data[:end])


def test_options_that_contradict_each_other_or_make_no_sense():
    for options, message in (
        ({"originals": True, "raw": True}, "--originals .* --raw"),
        ({"originals": True, "short_side": 300}, "--short-side 300"),
        ({"short_side": -1}, "--short-side"),
        ({"quality": 0}, "--quality"),
    ):
        with pytest.raises(ValueError, match=message):
            Store(**options)
    for kind, options in ((Selection, {"count": 0}), (Selection, {"per_class": -1}), (Work, {"workers": 0})):
        with pytest.raises(ValueError, match="must be at least 1"):
            kind(**options)


def test_stop_names_the_file_and_leaves_nothing(tmp_path):
    data = write_kinds(tmp_path / "images", kinds(), bad_kinds())
    with pytest.raises(ValueError, match=r"cannot use cut\.jpg: .*truncated.*quarantine"):
        write(data, tmp_path / "x.beton", work=Work(workers=1, on_error="stop"))
    assert os.listdir(tmp_path) == ["images"]


def test_nothing_usable_is_an_error(tmp_path):
    data = write_kinds(tmp_path / "images", bad_kinds())
    with pytest.raises(ValueError, match=r"no image can be used \(4 tried\), the first is cut\.jpg"):
        write(data, tmp_path / "x.beton")
    assert os.listdir(tmp_path) == ["images"]
    with pytest.raises(ValueError, match="no data set was given"):  # "" is no name of the folder we are in
        write("", tmp_path / "x.beton")


@pytest.mark.parametrize("store", [Store(), Store(raw=True), Store(originals=True)])
def test_a_png_that_is_damaged_inside_is_not_used(store):
    """Pillow decodes a PNG to find its EXIF, and says only once that it cannot."""
    data = encode(Image.fromarray(render(60, 84)), "PNG")
    with pytest.raises(BadImage, match="broken data stream"):
        prepare_image(data[:200] + bytes(4) + data[204:], "x.png", store)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_comment_too_long_for_a_jpeg_costs_nothing(kind):
    comment, text = "long " * 20_000, PngInfo()
    text.add_text("comment", comment)
    options = {"pnginfo": text} if kind == "PNG" else {"comment": comment.encode()}
    data = encode(Image.fromarray(render(30, 42)), kind, **options)
    image = prepare_image(data, "x", Store())
    assert decode_image(image.data).shape == (30, 42, 3) and len(image.data) < len(comment)


def test_sides_beyond_16_bits_are_left_out(tmp_path):
    Image.new("RGB", (70_000, 2)).save(tmp_path / "long.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "short.png")
    for store in (Store(), Store(originals=True), Store(raw=True)):
        tally = write(tmp_path, tmp_path / "out" / "x.beton", store, force=True)
        assert [image["path"] for image in tally.quarantined] == ["long.png"]
        assert "a side of" in tally.quarantined[0]["reason"]


def test_an_image_larger_than_a_page_gets_a_larger_page(tmp_path):
    for name, size in (("a", (40, 30)), ("b", (2400, 1600)), ("c", (50, 20)), ("d", (1800, 1600))):
        Image.new("RGB", size, (name == "b" and "red") or "blue").save(tmp_path / f"{name}.png")
    out = tmp_path / "out" / "x.beton"
    write(tmp_path, out, Store(short_side=0, raw=True))
    tables = read_tables(out)
    assert tables.page_size == 2 * BLOCK
    first, last = tables.allocations["pointer"], tables.allocations["pointer"] + tables.allocations["size"] - 1
    assert (first // tables.page_size == last // tables.page_size).all()
    assert [row["width"] for row, data in records(out) if set(data[::3]) <= {0, 255}] == [40, 2400, 50, 1800]
    assert [data[0] for _, data in records(out)] == [0, 255, 0, 0]
    assert "checksums correct" in verify(out, decode=True, workers=1)


def test_selection(photos, tmp_path):
    def chosen(**options):
        write(photos, tmp_path / "x.beton", Store(originals=True), Selection(**options), force=True)
        lines = (tmp_path / "x.beton.images.jsonl").read_text().splitlines()
        return [json.loads(line)["path"] for line in lines], labels(tmp_path / "x.beton")

    assert chosen(classes="wasp,ant") == (["ant/0.jpg", "ant/1.jpg", "ant/2.jpg", "wasp/0.jpg"], [0, 0, 0, 1])
    assert chosen(per_class=1) == (["ant/0.jpg", "bee/0.jpg", "wasp/0.jpg"], [0, 1, 2])
    assert chosen(count=3) == (["ant/0.jpg", "ant/2.jpg", "bee/1.jpg"], [0, 0, 1])
    (tmp_path / "list.txt").write_text("# two\nbee\n\nwasp\n")
    assert chosen(classes=str(tmp_path / "list.txt"), count=2) == (["bee/0.jpg", "bee/1.jpg"], [0, 0])
    with pytest.raises(ValueError, match=r"no class beee.*did you mean bee"):
        chosen(classes="beee")


def test_the_same_input_gives_the_same_bytes(photos, tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        write(photos, tmp_path / name / "x.beton", Store(short_side=32), work=Work(workers=workers))
    for name in ("x.beton", "x.beton.json", "x.beton.images.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_that_exists_is_replaced_only_by_force(photos, tmp_path):
    out = tmp_path / "x.beton"
    write(photos, out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="exists: add --force"):
        write(photos, out, Store(raw=True))
    assert out.read_bytes() == before
    write(photos, out, Store(raw=True), force=True)
    assert out.read_bytes() != before and verify(out, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_costs_its_image_only(tmp_path, monkeypatch, workers):
    names = [f"{i:02}{'deadly' * (i in (3, 20, 39))}.jpg" for i in range(40)]
    data = write_kinds(tmp_path / "images", {name: (jpeg(20, 20, seed=i), "") for i, name in enumerate(names)})
    monkeypatch.setattr(convert, "prepare_place", prepare_or_die)
    tally = write(data, tmp_path / "x.beton", Store(short_side=16), work=Work(workers=workers))
    assert [image["path"] for image in tally.quarantined] == [name for name in names if "deadly" in name]
    assert all("died" in image["reason"] for image in tally.quarantined)
    lines = (tmp_path / "x.beton.images.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == [name for name in names if "deadly" not in name]


def test_workers_that_always_die_end_the_run(tmp_path, monkeypatch):
    files = {f"deadly{i}.jpg": (jpeg(20, 20), "") for i in range(30)}
    data = write_kinds(tmp_path / "images", files)
    monkeypatch.setattr(convert, "prepare_place", prepare_or_die)
    with pytest.raises(ValueError, match=r"processes died on 8 images in a row, the last of them deadly15\.jpg"):
        write(data, tmp_path / "x.beton")
    assert os.listdir(tmp_path) == ["images"]
