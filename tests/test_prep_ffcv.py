"""FFCV's own Reader and Loader open the betons that fastssl prep writes, in a process without anything of ours."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from prep_images import jpeg, render, write_kinds, write_photos

from fastssl.data_prep.beton_format import (
    ALLOCATION,
    DESCRIPTOR,
    FIELD_METADATA,
    HEADER,
    IMAGE,
    IMAGE_FIELD,
    INT_FIELD,
    SAMPLE,
    VERSION,
    read_tables,
)
from fastssl.data_prep.decode import decode_image
from fastssl.data_prep.describe import describe
from fastssl.data_prep.find import find_images
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.verify import verify
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton

if importlib.util.find_spec("ffcv") is None:  # importing it, in every process that collects this file, takes seconds
    pytest.skip("needs ffcv", allow_module_level=True)

# Reader: tables and each record by FFCV's decoder; Loader: labels and images of one size, with either cache
READ = """
import sys
import numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader

sizes, squares, out = sys.argv[1:]
reader = Reader(sizes)
memory = np.memmap(sizes, "uint8", "r")
lengths = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"]))
found = {"names": reader.field_names, "labels": reader.metadata["f1"]}
for i, field in enumerate(reader.metadata["f0"]):
    data = memory[field["data_ptr"] : field["data_ptr"] + lengths[field["data_ptr"]]]
    height, width = int(field["height"]), int(field["width"])
    pixels = np.zeros((height, width, 3), np.uint8)
    if field["mode"] == 0:
        imdecode(np.ascontiguousarray(data), pixels, height, width, height, width)
    else:
        pixels[:] = data.reshape(pixels.shape)
    found[f"image{i}"] = pixels
for cache in (True, False):
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(squares, 4, 1, cache, OrderOption.SEQUENTIAL, pipelines=pipelines, drop_last=False)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    found[f"squares{cache}"] = np.concatenate([images for images, _ in batches])
    found[f"square_labels{cache}"] = np.concatenate([labels for _, labels in batches])
np.savez(out, **found)
"""
SIZES = {"a": [(40, 60), (33, 31)], "b": [(64, 48), (20, 90), (50, 50)]}


@pytest.fixture(scope="module")
def read_by_ffcv(tmp_path_factory):
    """What FFCV reads from (a beton of many sizes, one of raw squares that needs a larger page), and their folder."""
    folder = tmp_path_factory.mktemp("ffcv")
    write_photos(folder / "sizes", SIZES)
    write_kinds(folder / "sizes" / "b", {"grey.jpg": (jpeg(24, 36, grey=True), "")})
    for i in range(7):
        (folder / "squares" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(1700, 1700, seed=i)).save(folder / "squares" / f"{i % 3}" / f"{i}.bmp")
    write_beton(folder / "sizes", folder / "sizes.beton", Store(originals=True), Selection(), Work(workers=1))
    raw = Store(short_side=0, raw=True)
    write_beton(folder / "squares", folder / "squares.beton", raw, Selection(), Work(workers=1))
    command = [sys.executable, "-W", "ignore", "-c", READ]
    arguments = [str(folder / name) for name in ("sizes.beton", "squares.beton", "found.npz")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder, np.load(folder / "found.npz")


def test_the_reader_finds_fields_labels_and_pixels(read_by_ffcv):
    folder, found = read_by_ffcv
    listing = find_images(folder / "sizes")
    assert found["names"].tolist() == ["image", "label"]
    assert found["labels"].tolist() == listing.labels.tolist() == [0, 0, 1, 1, 1, 1]
    for i in range(len(listing.paths)):
        expected = decode_image(listing.path(i))
        assert found[f"image{i}"].shape == expected.shape
        assert np.abs(found[f"image{i}"].astype(int) - expected).mean() < 2  # FFCV's decoder is the less exact one


@pytest.mark.parametrize("cache", [True, False])
def test_the_loader_gives_every_raw_pixel_with_either_cache(read_by_ffcv, cache):
    folder, found = read_by_ffcv
    listing = find_images(folder / "squares")
    assert found[f"square_labels{cache}"].ravel().tolist() == listing.labels.tolist()
    for i in range(len(listing.paths)):
        np.testing.assert_array_equal(found[f"squares{cache}"][i], decode_image(listing.path(i)))


def test_our_layout_is_ffcvs():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_metadata_type

    sample = get_metadata_type([RGBImageField(), IntField()])
    for ours, theirs in (
        (HEADER, HeaderType),
        (DESCRIPTOR, FieldDescType),
        (ALLOCATION, ALLOC_TABLE_TYPE),
        (SAMPLE, sample),
    ):
        assert ours.itemsize == theirs.itemsize
        assert [ours.fields[name][1] for name in ours.names] == [theirs.fields[name][1] for name in theirs.names]
    assert [IMAGE[i] for i in range(4)] == [sample[0][i] for i in range(4)]


def test_the_metadata_of_every_kind_of_field_is_ffcvs():
    from ffcv import fields
    from ffcv.types import TYPE_ID_HANDLER, get_metadata_type

    known = {kind: Handler for kind, Handler in TYPE_ID_HANDLER.items() if Handler is not None}
    assert (
        known.keys() == FIELD_METADATA.keys()
        and known[IMAGE_FIELD] is fields.RGBImageField
        and known[INT_FIELD] is fields.IntField
    )
    for kind, Handler in known.items():
        field = Handler.__new__(Handler)  # some want a shape, which does not change their metadata
        assert np.dtype(FIELD_METADATA[kind]).itemsize == np.dtype(field.metadata_type).itemsize, Handler
        pair = np.dtype([("", IMAGE), ("", FIELD_METADATA[kind])], align=True)
        theirs = get_metadata_type([fields.RGBImageField(), field])
        assert pair.itemsize == theirs.itemsize and pair.fields["f1"][1] == theirs.fields["f1"][1]


def foreign_beton(path):
    """A beton as another program may write it: other fields, another order, small pages, records back to front."""
    sample = np.dtype([("", "<i8"), ("", "<f8"), ("", IMAGE)], align=True)
    header, fields = np.zeros(1, HEADER), np.zeros(3, DESCRIPTOR)
    fields["type"], fields["name"] = (INT_FIELD, 0, IMAGE_FIELD), (b"label", b"weight", b"image")
    samples, allocations, data = np.zeros(12, sample), np.zeros(12, ALLOCATION), b""
    start = HEADER.itemsize + fields.nbytes + samples.nbytes
    for i in reversed(range(12)):
        record = jpeg(20 + i, 30, seed=i) if i % 2 else render(20 + i, 30, i).tobytes()
        samples[i] = i % 3, i / 2, (1 - i % 2, 30, 20 + i, start + len(data))
        allocations[11 - i] = i, start + len(data), len(record)
        data += record
    header[0] = VERSION, 3, 1 << 21, 12, start + len(data)
    path.write_bytes(b"".join(part.tobytes() for part in (header, fields, samples)) + data + allocations.tobytes())


def test_betons_of_other_programs_are_described_and_verified(tmp_path):
    out = tmp_path / "theirs.beton"
    foreign_beton(out)
    assert read_tables(out).column(IMAGE_FIELD, "image")["height"].tolist() == [20 + i for i in range(12)]
    text = describe(out)
    assert "12 samples" in text and "label (int), weight (float), image (image)" in text
    assert "6 JPEG, 6 raw" in text
    assert "3 different, 0 to 2" in text and "20 to 31 pixels" in text and "made by another program" in text
    assert "tables valid, 12 images decoded; without theirs.beton.json" in verify(out, decode=True, workers=1)
    ambiguous = bytearray(out.read_bytes())
    ambiguous[HEADER.itemsize + DESCRIPTOR.itemsize] = INT_FIELD  # the type of the field weight
    (tmp_path / "two.beton").write_bytes(ambiguous.replace(b"label", b"count"))
    text = describe(tmp_path / "two.beton")
    assert "count (int), weight (int), image (image)" in text and "2 fields that could be the label" in text
    out.write_bytes(out.read_bytes()[:-8])
    for command in (describe, verify):
        with pytest.raises(ValueError, match="truncated"):
            command(out)
