"""What decodes a folder's files: libjpeg-turbo or Pillow, with Pillow's pixels and Pillow's judgement of damage."""

import io
from contextlib import closing

import numpy as np
import pytest
from betons import NO_TURBOJPEG, encode_jpeg
from photos import render_photo
from PIL import Image

from fastssl.conformance import samples
from fastssl.data_prep import jpeg
from fastssl.data_prep.decode import BadImage, decode_image
from fastssl.data_prep.find import find_images
from fastssl.loaders import encoded, file_decode
from fastssl.loaders.make import make_loader

needs_turbojpeg = pytest.mark.skipif(NO_TURBOJPEG, reason="needs libturbojpeg")
PLAIN = {
    "444.jpg": {"subsampling": 0},
    "422.jpg": {"subsampling": 1},
    "420.jpg": {"subsampling": 2},
    "progressive.jpg": {"progressive": True},
    "restart.jpg": {"restart_marker_rows": 1},
    "grey.jpg": {"mode": "L"},
    "rgb.jpg": {"keep_rgb": True},
}


def open_folder(data, **changes):
    return make_loader("folder", data, **({"batch_size": 1, "seed": 0, "device": "cpu", "workers": 3} | changes))


def read_all(data, **changes):
    """{name of a file: its pixels} of all images that can be read, and the messages about the others."""
    with closing(open_folder(data, **changes)) as loader:
        found = {}
        for batch in loader.eval_batches(4):
            for n, i in enumerate(batch.index.tolist()):
                found[loader.decoder.encoded.folder.paths[i]] = batch.image(n).numpy().copy()
        assert loader.decoded == len(found)
        return found, sorted(loader.bad_images)


def by_pillow(data):
    """The same by `decode_image` alone."""
    folder, found, bad = find_images(data), {}, []
    for i, name in enumerate(folder.paths):
        try:
            found[name] = decode_image(folder.path(i))
        except BadImage as error:
            bad.append(str(error))
    return found, sorted(bad)


def assert_same(found, truth):
    assert found[1] == truth[1]
    assert list(found[0]) == list(truth[0])
    for name, pixels in truth[0].items():
        np.testing.assert_array_equal(found[0][name], pixels, err_msg=name)


def spy_on_pillow(monkeypatch):
    """The names of the images that are given to Pillow from now on."""
    given, decode = [], decode_image
    monkeypatch.setattr(
        encoded, "decode_image", lambda data, name: given.append(name.rpartition("/")[2]) or decode(data, name)
    )
    return given


def with_sampling(data, factors):
    """A JPEG whose first colour claims other sampling factors; its pixels make no sense, but they can be decoded."""
    at = data.index(b"\xff\xc0")
    return data[: at + 11] + bytes([factors]) + data[at + 12 :]


@needs_turbojpeg
@pytest.mark.parametrize("read_ahead", [0, 1, 2])
def test_plain_jpegs_do_without_pillow_and_have_its_pixels(tmp_path, monkeypatch, read_ahead):
    for i, (name, options) in enumerate(PLAIN.items()):
        for height, width in ((1, 1), (2, 3), (17, 16), (61, 45)):
            data = encode_jpeg(render_photo(height, width, seed=i), **options)
            (tmp_path / f"{height}-{name}").write_bytes(data)
    truth, given = by_pillow(tmp_path), spy_on_pillow(monkeypatch)
    assert_same(read_all(tmp_path, read_ahead=read_ahead), truth)
    assert len(truth[0]) == 4 * len(PLAIN) and given == []


@needs_turbojpeg
def test_every_other_file_is_pillow_s(tmp_path, monkeypatch):
    folder = samples.make_odd("folder", tmp_path)
    four_four_zero = with_sampling(encode_jpeg(render_photo(32, 32, seed=1), subsampling=0), 0x12)
    (folder / "440.jpg").write_bytes(four_four_zero)
    truth, given = by_pillow(folder), spy_on_pillow(monkeypatch)
    assert_same(read_all(folder), truth)
    assert sorted(set(given)) == [
        "16-bit.png", "440.jpg", "bitmap.bmp", "clear.png", "cmyk.jpg", "colour.png", "palette.png", "png.jpg",
        "still.gif", "turned.jpg",
    ]  # fmt: skip


def test_without_libturbojpeg_pillow_decodes_all_and_the_run_says_so(tmp_path, monkeypatch):
    folder = samples.make_good("folder", tmp_path)
    monkeypatch.setattr(file_decode, "decode_stored_images", None)
    truth, given = by_pillow(folder), spy_on_pillow(monkeypatch)
    assert_same(read_all(folder), truth)
    assert len(given) == 26 and "slower without libturbojpeg: 'fastssl doctor'" in open_folder(folder).reason


@pytest.mark.parametrize("seed", range(4))
def test_damaged_jpegs_are_judged_as_by_pillow(tmp_path, seed):
    """Bytes changed anywhere, or the file cut: what Pillow decodes has its pixels, what it refuses has its reason."""
    random = np.random.default_rng(seed)
    for i in range(60):
        options = {"progressive": i % 3 == 0, "subsampling": i % 3}
        data = bytearray(encode_jpeg(render_photo(40 + i, 90 - i, seed=i), **options))
        if i % 4 == 3:
            data = data[: random.integers(1, len(data))]
        for at in random.integers(0, len(data), i % 4):
            data[at] = random.integers(0, 256)
        (tmp_path / f"{i:02d}.jpg").write_bytes(data)
    truth = by_pillow(tmp_path)
    assert len(truth[0]) > 30 and len(truth[1]) > 5
    assert_same(read_all(tmp_path), truth)


def test_padding_and_what_follows_the_end_are_no_damage(tmp_path):
    data = encode_jpeg(render_photo(40, 50, seed=2))
    (tmp_path / "padded.jpg").write_bytes(data[:-2] + bytes(7) + data[-2:])
    (tmp_path / "followed.jpg").write_bytes(data + b"and more")
    (tmp_path / "no-end.jpg").write_bytes(data[:-2])
    assert_same(read_all(tmp_path), by_pillow(tmp_path))


@needs_turbojpeg
def test_a_jpeg_that_turns_out_damaged_is_replaced_by_the_next_file(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encode_jpeg(render_photo(30 + i, 40, seed=i)))
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    with closing(open_folder(tmp_path, batch_size=4)) as loader:
        batches = loader.batches()
        for _ in range(3):  # at first found out while decoding, then known
            batch = next(batches)
            pixels = {int(i): batch.image(n).numpy() for n, i in enumerate(batch.index)}
            np.testing.assert_array_equal(pixels[1], decode_image(tmp_path / "2.jpg"))
            np.testing.assert_array_equal(pixels[2], pixels[1])
        assert [message.rpartition("/")[2][:5] for message in loader.bad_images] == ["1.jpg"]
    with pytest.raises(ValueError, match=r"cannot decode \S+/1\.jpg: .*truncated"):
        next(open_folder(tmp_path, batch_size=4, on_bad_image="error").batches())


@needs_turbojpeg
def test_a_file_that_changes_while_it_is_read_is_an_error_with_its_name(tmp_path, monkeypatch):
    path = tmp_path / "0.jpg"
    path.write_bytes(encode_jpeg(render_photo(30, 40, seed=0)))

    def fail_and_change(source, *_):
        path.write_bytes(encode_jpeg(render_photo(20, 20, seed=0)))
        return dict.fromkeys(range(len(source)), (1, "damaged"))

    monkeypatch.setattr(file_decode, "decode_stored_images", fail_and_change)
    with pytest.raises(ValueError, match=r"0\.jpg changed while it was being read"):
        next(open_folder(tmp_path).batches())


def test_the_header_alone_tells_size_and_sampling():
    for name, options in PLAIN.items():
        data = encode_jpeg(render_photo(21, 34, seed=3), **options)
        facts = jpeg.read_jpeg_facts(data)
        at_pixels = data.index(b"\xff\xda")
        assert jpeg.read_jpeg_facts(data[: at_pixels + 2], header_only=True) == facts, name
        assert facts[:2] == Image.open(io.BytesIO(data)).size == (34, 21)
    assert facts.sampling == (0x11, 0x11, 0x11)
    assert jpeg.read_jpeg_facts(encode_jpeg(render_photo(8, 8, seed=3))).sampling == (0x22, 0x11, 0x11)
    with pytest.raises(jpeg.NotPlain, match="truncated"):
        jpeg.read_jpeg_facts(data[: at_pixels + 2])
