"""Image files as they come: every kind decodes to the right pixels or says in one sentence why it cannot."""

import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastssl.data_prep.decode import BadImage, decode_image
from fastssl.data_prep.find import find_images
from fastssl.data_prep.prepare import Store, prepare_image


def encode(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def picture(height=24, width=40, seed=0):
    """A smooth (H, W, 3) uint8 picture, so that JPEG keeps it nearly."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(y / 9 + seed) * np.cos(x / 11 + c) for c in range(3)]
    return ((np.stack(channels, -1) + 1) * 127).astype(np.uint8)


def test_rgb_png_is_exact_and_owns_its_memory():
    decoded = decode_image(encode(Image.fromarray(picture()), "PNG"))
    assert decoded.dtype == np.uint8 and decoded.flags.writeable and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, picture())


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "JPEG2000"])
def test_other_lossless_formats(kind):
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(picture()), kind)), picture())


@pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow has no AVIF")
def test_avif_upright_and_over_white():
    turned, clear = Image.Exif(), Image.fromarray(picture()).convert("RGBA")
    turned[0x0112] = 6
    decoded = decode_image(encode(Image.fromarray(picture()), "AVIF", exif=turned, quality=95))
    assert np.abs(decoded.astype(int) - np.rot90(picture(), -1)).mean() < 3
    clear.putalpha(0)
    assert decode_image(encode(clear, "AVIF")).min() >= 254


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (375, 500)])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_of_any_size(size, progressive):
    data = encode(Image.fromarray(picture(*size)), "JPEG", quality=98, subsampling=0, progressive=progressive)
    decoded = decode_image(data)
    assert decoded.shape == (*size, 3)
    assert np.abs(decoded.astype(int) - picture(*size)).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_greyscale_is_repeated(kind):
    grey = picture()[:, :, 0]
    decoded = decode_image(encode(Image.fromarray(grey), kind))
    assert (decoded == decoded[:, :, :1]).all()
    assert np.abs(decoded[:, :, 0].astype(int) - grey).max() <= (0 if kind == "PNG" else 12)


def test_cmyk_jpeg_keeps_its_colours():
    cyan_over_yellow = np.zeros((32, 32, 4), dtype=np.uint8)
    cyan_over_yellow[:16, :, 0] = 255
    cyan_over_yellow[16:, :, 2] = 255
    data = encode(Image.fromarray(cyan_over_yellow, "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # stored inverted, as Adobe's programs do
    decoded = decode_image(data).astype(int)
    assert np.abs(decoded[4, 16] - (0, 255, 255)).max() < 12
    assert np.abs(decoded[28, 16] - (255, 255, 0)).max() < 12


def png_16_bit(samples, colour_type, size=None):
    """A 16-bit PNG from an (H, W, C) uint16 array: written here, because Pillow writes no 16-bit colour.

    `size`: the (height, width) the header claims.
    """

    def chunk(tag, body):
        return len(body).to_bytes(4, "big") + tag + body + zlib.crc32(tag + body).to_bytes(4, "big")

    height, width = size or samples.shape[:2]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour_type, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2)])
def test_16_bit_png_is_scaled_not_clipped(channels, colour_type):
    samples = np.linspace(0, 65535, 16 * 8 * channels).astype(np.uint16).reshape(16, 8, channels)
    decoded = decode_image(png_16_bit(samples, colour_type))
    expected = np.broadcast_to(samples >> 8, (16, 8, 3))
    np.testing.assert_array_equal(decoded, expected)


def test_palette_without_transparency():
    image = Image.fromarray(picture()).quantize(16)
    np.testing.assert_array_equal(decode_image(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparency_is_laid_over_white():
    rgba = np.full((4, 6, 4), (200, 100, 0, 255), dtype=np.uint8)
    rgba[0, :, 3] = 0
    rgba[1, :, 3] = 51  # a fifth
    decoded = decode_image(encode(Image.fromarray(rgba), "PNG"))
    assert (decoded[0] == 255).all()
    assert np.abs(decoded[1].astype(int) - (244, 224, 204)).max() <= 1
    assert (decoded[2:] == (200, 100, 0)).all()


def test_grey_with_alpha():
    la = np.full((4, 6, 2), (80, 255), dtype=np.uint8)
    la[0, :, 1] = 0
    decoded = decode_image(encode(Image.fromarray(la, "LA"), "PNG"))
    assert (decoded[0] == 255).all() and (decoded[1:] == 80).all()


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(np.array([[0, 1, 0], [1, 0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    decoded = decode_image(encode(image, "PNG", transparency=transparency))
    assert decoded.tolist() == [
        [[10, 20, 30], [255, 255, 255], [10, 20, 30]],
        [[255, 255, 255], [10, 20, 30], [255, 255, 255]],
    ]


def test_black_and_white_bitmap():
    bits = np.arange(48).reshape(6, 8) % 3 == 0
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(bits), "PNG"))[:, :, 1], bits * np.uint8(255))


# how the stored array must be turned to stand upright, by EXIF orientation, from the EXIF standard's table
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture())
    expected = UPRIGHT[orientation](decode_image(encode(image, kind, quality=95)))
    np.testing.assert_array_equal(decode_image(encode(image, kind, quality=95, exif=exif)), expected)


def test_exif_orientation_of_other_modes():
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = Image.fromarray(picture()[:, :, 0].astype(np.uint16) << 8)
    assert decode_image(encode(samples, "PNG", exif=exif)).shape == (40, 24, 3)
    transparent = Image.fromarray(np.zeros((24, 40, 4), np.uint8))
    assert (decode_image(encode(transparent, "PNG", exif=exif)) == np.full((40, 24, 3), 255)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own
def test_damaged_exif_costs_nothing():
    data = encode(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert decode_image(data).shape == (24, 40, 3)


@pytest.mark.parametrize("orientation, shape", [((3, 6), (40, 24, 3)), ((7, 6), (24, 40, 3))])  # as number, as bytes
def test_a_picture_is_turned_whatever_else_its_exif_says(orientation, shape):
    words = struct.pack("<HHI4s", 0x011A, 2, 4, b"72\0\0")  # a resolution in letters, which Pillow cannot write again
    number = struct.pack("<HHII", 0x0112, orientation[0], 1, orientation[1])
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + number + words + bytes(4)
    data = encode(Image.fromarray(picture()), "JPEG", exif=exif)
    assert decode_image(data).shape == shape
    notes = ("EXIF orientation 6",) if shape[0] == 40 else ()
    assert prepare_image(data, "x.jpg", Store(short_side=20)).notes == notes


def test_animated_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data) == (255, 0, 0)).all()


def test_content_decides_not_the_name(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(Image.fromarray(picture()), "PNG"))
    np.testing.assert_array_equal(decode_image(path), picture())
    np.testing.assert_array_equal(decode_image(str(path)), picture())


BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"this is no image\n" * 50, "not an image"),
    "zeros": (bytes(4096), "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "jpeg cut in half": (encode(Image.fromarray(picture(200, 300)), "JPEG")[:2000], "truncated"),
    "jpeg header alone": (encode(Image.fromarray(picture()), "JPEG")[:300], ""),
    "png cut in half": (encode(Image.effect_noise((64, 64), 50), "PNG")[:2000], ""),
    "gif cut short": (encode(Image.effect_noise((64, 64), 50), "GIF")[:900], ""),
    "bomb": (png_16_bit(np.zeros((1, 1, 1), np.uint16), 0, size=(30000, 30000)), "pixels"),
    "small bomb": (png_16_bit(np.zeros((1, 1, 1), np.uint16), 0, size=(10000, 10000)), "pixels"),
    "floats": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    "32-bit": (encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "32-bit"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_say_which_and_why(name, tmp_path):
    data, reason = BAD[name]
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(BadImage) as info:
        decode_image(path)
    assert info.value.path == str(path) and reason in info.value.reason and info.value.reason
    assert "\n" not in str(info.value) and str(info.value).startswith(str(path))
    with pytest.raises(BadImage, match=r"row 7"):
        decode_image(data, name="row 7")


def test_missing_file_and_dangling_link(tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "link.jpg")
    for path in (tmp_path / "none.jpg", tmp_path / "link.jpg"):
        with pytest.raises(BadImage, match="No such file"):
            decode_image(path)


def test_what_is_no_file_is_named_and_waited_for_by_nobody(tmp_path):
    """A link to itself, a pipe that nobody writes to, a device and a folder, all called .jpg, beside an image."""
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "device.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "x.jpg").write_bytes(encode(Image.fromarray(picture()), "JPEG"))
    listing = find_images(tmp_path)
    assert listing.paths == ["device.jpg", "loop.jpg", "pipe.jpg", "x.jpg"]
    for name, reason in zip(listing.paths, ("not a regular file", "symbolic links", "not a regular file")):
        with pytest.raises(BadImage, match=f"{name}: .*{reason}"):
            decode_image(tmp_path / name)


def test_want_of_open_files_is_not_the_image_s_fault(tmp_path):
    """Else a loader would replace good images by others until files are closed."""
    (tmp_path / "x.jpg").write_bytes(encode(Image.fromarray(picture()), "JPEG"))
    limits, free = resource.getrlimit(resource.RLIMIT_NOFILE), os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            decode_image(tmp_path / "x.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert decode_image(tmp_path / "x.jpg").shape == picture().shape


def test_a_name_that_is_not_utf_8_can_be_read_and_printed(tmp_path):
    folder = os.fsencode(tmp_path)
    for name, data in ((b"caf\xe9.png", encode(Image.fromarray(picture()), "PNG")), (b"bad\xe9.png", b"junk")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    listing = find_images(tmp_path)
    np.testing.assert_array_equal(decode_image(listing.path(1)), picture())
    with pytest.raises(BadImage) as info:
        decode_image(listing.path(0))
    assert r"bad\udce9.png: not an image" in str(info.value).encode("utf-8").decode()


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_escapes_as_another_error(seed):
    random = np.random.default_rng(seed)
    kind = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")[seed % 6]
    data = bytearray(encode(Image.fromarray(picture()), kind))
    for _ in range(20):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 6):
            damaged[at] = random.integers(0, 256)
        try:
            decoded = decode_image(bytes(damaged))
        except BadImage:
            continue
        assert decoded.ndim == 3 and decoded.shape[2] == 3 and decoded.dtype == np.uint8


def make_tree(root, paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def test_train_split_with_classes(tmp_path):
    make_tree(tmp_path, ["train/b/1.jpg", "train/a/2.JPEG", "train/a/deep/1.png", "val/a/9.jpg", "readme.txt"])
    folder = find_images(tmp_path)
    assert folder.paths == ["a/2.JPEG", "a/deep/1.png", "b/1.jpg"]
    assert folder.class_names == ["a", "b"]
    assert folder.labels.tolist() == [0, 0, 1]
    assert folder.path(2) == str(tmp_path / "train" / "b" / "1.jpg")


def test_class_folders_and_flat_folder(tmp_path):
    make_tree(tmp_path / "classes", ["a/1.jpg", "a-b/1.jpg", "a/._1.jpg", ".git/x.png"])
    folder = find_images(tmp_path / "classes")
    assert folder.paths == ["a/1.jpg", "a-b/1.jpg"] and folder.labels.tolist() == [0, 1]
    make_tree(tmp_path / "flat", ["2.jpg", "10.jpg", "more/1.webp", "notes.txt"])
    folder = find_images(str(tmp_path / "flat"))
    assert folder.paths == ["10.jpg", "2.jpg", "more/1.webp"]
    assert folder.class_names == [] and folder.labels.tolist() == [-1, -1, -1]


def test_a_class_may_be_called_train(tmp_path):
    make_tree(tmp_path, ["train/1.jpg", "bus/1.jpg", "car/1.jpg"])  # as in CIFAR-100
    assert find_images(tmp_path).class_names == ["bus", "car", "train"]
    make_tree(tmp_path / "split", ["train/1.jpg", "val/1.jpg"])
    assert find_images(tmp_path / "split").paths == ["1.jpg"]


def test_folders_around_the_classes_are_no_class(tmp_path):
    make_tree(tmp_path, ["food-101/images/pie/1.jpg", "food-101/images/tart/1.jpg", "food-101/meta/classes.txt"])
    assert find_images(tmp_path).class_names == ["pie", "tart"]
    assert find_images(tmp_path).path(1) == str(tmp_path / "food-101/images/tart/1.jpg")
    make_tree(tmp_path / "flowers", ["jpg/image_1.jpg"])
    assert find_images(tmp_path / "flowers").class_names == ["jpg"]


def test_splits_do_not_become_classes(tmp_path):
    kaggle = tmp_path / "ILSVRC" / "Data"
    make_tree(kaggle, ["CLS-LOC/train/n01/1.JPEG", "CLS-LOC/val/1.JPEG", "CLS-LOC/test/2.JPEG"])
    with pytest.raises(ValueError, match=r"has its training images in .*CLS-LOC/train: give .*/Data/CLS-LOC$"):
        find_images(tmp_path / "ILSVRC")
    assert find_images(kaggle / "CLS-LOC").class_names == ["n01"]
    make_tree(tmp_path / "parts", ["train.X1/a/1.jpg", "train.X2/b/1.jpg", "val.X/a/1.jpg", "Labels.json"])
    make_tree(tmp_path / "named", ["Training/a/1.jpg", "Testing/a/1.jpg"])
    for name, found in (("parts", r"train\.X1 and val\.X"), ("named", "Training and Testing")):
        with pytest.raises(ValueError, match=f"{name} holds {found}, which look like splits"):
            find_images(tmp_path / name)
    make_tree(tmp_path / "toys", ["trains/wood/1.jpg", "tests/b/1.jpg", "train_set/1.jpg", "test_set/1.jpg"])
    assert len(find_images(tmp_path / "toys").class_names) == 4


def test_links_are_followed_but_not_in_circles(tmp_path):
    make_tree(tmp_path, ["real/1.jpg", "data/a/2.jpg"])
    os.symlink(tmp_path / "real", tmp_path / "data" / "b")
    os.symlink(tmp_path / "real", tmp_path / "data" / "c")
    os.symlink(tmp_path / "real" / "1.jpg", tmp_path / "data" / "a" / "link.jpg")
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "circle")
    assert find_images(tmp_path / "data").paths == ["a/2.jpg", "a/link.jpg", "b/1.jpg", "c/1.jpg"]


def test_labels_by_another_splits_classes(tmp_path):
    make_tree(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "odd/d/1.jpg"])
    names = find_images(tmp_path).class_names
    folder = find_images(tmp_path / "val", names)
    assert folder.labels.tolist() == [2] and folder.class_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="'d' that is not among the 3 classes"):
        find_images(tmp_path / "odd", names)


def test_no_images_is_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist"):
        find_images(tmp_path / "missing")
    (tmp_path / "file.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"file\.tar is a file, not a folder"):
        find_images(tmp_path / "file.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no images.*it is empty"):
        find_images(tmp_path / "empty")
    make_tree(tmp_path / "texts", ["a/1.txt", "a/2.txt", "b/3.csv"])
    with pytest.raises(ValueError, match=r"2 \.txt files, 1 \.csv file, 2 folders"):
        find_images(tmp_path / "texts")
    make_tree(tmp_path / "targets", ["1.target"])
    with pytest.raises(ValueError, match=r"1 \.target file\): give a folder"):
        find_images(tmp_path / "targets")
    make_tree(tmp_path / "training", ["test.beton", "train.beton"])
    with pytest.raises(ValueError, match=r"2 \.beton files\): give a \.beton file itself, as .*/train\.beton$"):
        find_images(tmp_path / "training")
    make_tree(tmp_path / "shards", [f"shard-000000.{kind}" for kind in ("tar", "idx", "idx2", "json", "jsonl")])
    make_tree(tmp_path / "shards", [f"{n}.{kind}" for kind in ("idx", "idx2", "json", "jsonl") for n in "ab"])
    with pytest.raises(
        ValueError,
        match=r"3 \.\w+ file.*: fastssl prep beton converts the tar files in .*/shards, and --loader dali reads",
    ):
        find_images(tmp_path / "shards")
