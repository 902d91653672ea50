"""fastssl prep verify and describe: truncation and every flipped bit are found; what is told is true."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from prep_images import bad_kinds, jpeg, kinds, write_kinds, write_photos

from fastssl.cli import main
from fastssl.data_prep.beton_format import HEADER, read_tables
from fastssl.data_prep.describe import describe
from fastssl.data_prep.files import partial_file
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.verify import verify
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.data_prep.write_shards import write_shards

SIDES = ("", ".json", ".images.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    data = write_photos(folder / "images", {"ant": [(40, 60)] * 3, "bee": [(30, 30)] * 2})
    write_kinds(data / "bee", kinds(), bad_kinds())
    write_beton(data, folder / "x.beton", Store(), Selection(), Work(workers=1))
    return folder / "x.beton"


@pytest.fixture
def beton(whole, tmp_path):
    """A copy to damage."""
    for side in SIDES:
        shutil.copy(f"{whole}{side}", f"{tmp_path / 'x.beton'}{side}")
    return tmp_path / "x.beton"


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_whole_file_passes(whole, capsys):
    assert main(["prep", "verify", str(whole), "--decode", "--workers", "1"]) == 0
    assert "checksums correct, tables valid, 12 images decoded" in capsys.readouterr().out


def test_a_link_to_the_file_alone_has_its_manifest(whole, beton, tmp_path):
    """Unless one lies beside the link, as where each file is a link into a store."""
    (tmp_path / "link.beton").symlink_to(whole)
    assert verify(tmp_path / "link.beton", workers=1).endswith("link.beton: 2 checksums correct, tables valid")
    assert "classes   2: ant, bee" in describe(tmp_path / "link.beton")
    beton.unlink()
    beton.symlink_to(whole)
    flip(tmp_path / "x.beton.json", 200)
    with pytest.raises(ValueError, match=rf"{tmp_path}/x\.beton\.json is damaged"):
        verify(beton, workers=1)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_is_found(beton, seed, capsys):
    """In the header, a field's name, the metadata, the padding, an image, the allocation table, and anywhere."""
    random = np.random.default_rng(seed)
    tables, size = read_tables(beton), beton.stat().st_size
    image = int(tables.allocations["pointer"][seed])
    spots = [9, 30, 24 + 2 * 1041 + 5, 100_000, image + 3, tables.allocations_at + 12, int(random.integers(size))]
    for at in spots:
        bit = int(random.integers(8))
        flip(beton, at, bit)
        with pytest.raises(ValueError, match=r"damaged in 1 of 2 blocks: bytes [\d,]+ to"):
            verify(beton, workers=1)
        assert main(["prep", "verify", str(beton)]) == 1
        assert "damaged" in capsys.readouterr().err
        flip(beton, at, bit)
    assert verify(beton, workers=1)


@pytest.mark.parametrize("side", SIDES[1:])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_the_files_beside_it_is_found(beton, side, part):
    path = beton.with_name(beton.name + side)
    flip(path, int(part * path.stat().st_size), bit=1)
    with pytest.raises(ValueError, match=r"damaged"):
        verify(beton, workers=1)


@pytest.mark.parametrize("cut", [1, 24, 5000, 9_000_000])
def test_truncation_is_found_with_and_without_the_manifest(beton, cut):
    with open(beton, "rb+") as file:
        file.truncate(max(0, beton.stat().st_size - cut))
    with pytest.raises(ValueError, match="is truncated"):
        verify(beton)
    beton.with_name("x.beton.json").unlink()
    if cut != 24:  # a whole entry of the table less: only its image tells
        with pytest.raises(ValueError, match="truncated"):
            verify(beton)
    else:
        with pytest.raises(ValueError, match="its allocation table lacks 1 image, first image 11"):
            verify(beton)


def test_what_is_no_beton_or_was_never_finished(tmp_path, beton):
    for content in (b"", b"PK\3\4" + bytes(100), bytes(5000)):
        (tmp_path / "y.beton").write_bytes(content)
        for command in (verify, describe):
            with pytest.raises(ValueError, match=r"truncated|not a \.beton|did not finish"):
                command(tmp_path / "y.beton")
    unfinished = bytearray(beton.read_bytes())
    unfinished[: HEADER.itemsize] = bytes(HEADER.itemsize)
    (tmp_path / "y.beton").write_bytes(unfinished)
    with pytest.raises(ValueError, match="not a"):
        verify(tmp_path / "y.beton")
    with pytest.raises(ValueError, match="does not exist"):
        verify(tmp_path / "none.beton")


def test_decode_names_the_images_that_do_not(tmp_path):
    """Bytes that are as they were written, and no images: as a program with another mistake might write them."""
    data = write_kinds(tmp_path / "images", {f"{i}.jpg": (jpeg(20, 20, seed=i), "") for i in range(5)})
    out = tmp_path / "x.beton"
    write_beton(data, out, Store(), Selection(), Work(workers=1))
    tables = read_tables(out)
    content = bytearray(out.read_bytes())
    for i in (1, 3):
        pointer, size = (int(tables.allocations[name][i]) for name in ("pointer", "size"))
        content[pointer : pointer + size] = bytes(size)
    out.write_bytes(content)
    (tmp_path / "x.beton.json").unlink()
    assert verify(out)
    with pytest.raises(ValueError, match=r"cannot decode image 1: not an image.*; image 3: "):
        verify(out, decode=True, workers=1)


def test_describe(whole, capsys):
    assert main(["prep", "describe", str(whole)]) == 0
    text = capsys.readouterr().out
    for part in (
        "12 samples", "image (image), label (int)", "2 different, 0 to 1; 3 to 9 samples each", "12 JPEG, 0 raw",
        "classes   2: ant, bee", "short_side 256", "quality 90", "1 CMYK", "left out  4",
        "bee/empty.jpg: the file is empty", "to 60 pixels",
    ):  # fmt: skip
        assert part in text, part
    bars = [line for line in text.splitlines() if " to " in line and "#" in line]
    assert sum(int(line.split("#")[0].split()[-1]) for line in bars) == 12


def test_a_manifest_of_something_else(whole, beton, tmp_path):
    """Of another beton, of shards beside a beton and the other way round, and JSON that is no manifest at all."""
    data, other, shards = whole.parent / "images", tmp_path / "other" / "x.beton", tmp_path / "shards"
    write_beton(data, other, Store(), Selection(count=3), Work(workers=1))
    write_shards(data, shards, Store(), Selection(), Work(workers=1))
    manifest = beton.with_name("x.beton.json")
    shutil.copy(f"{other}.json", manifest)
    with pytest.raises(ValueError, match="is longer than it was"):
        verify(beton)
    with pytest.raises(ValueError, match="does not match its manifest"):
        describe(beton)
    shutil.copy(shards / "manifest.json", manifest)
    shutil.copy(f"{whole}.json", shards / "manifest.json")
    for command in (verify, describe):
        with pytest.raises(ValueError, match="is a manifest of shards, not of"):
            command(beton)
        with pytest.raises(ValueError, match="is a manifest of beton, not of"):
            command(shards)
    for text in ("", "[]", "7", '["sha256"]', "{}", "null"):
        manifest.write_text(text)
        for command in (verify, describe):
            with pytest.raises(ValueError, match="damaged or not a manifest"):
                command(beton)


def test_a_shard_the_manifest_does_not_know_is_found(whole, tmp_path):
    write_shards(whole.parent / "images", tmp_path / "shards", Store(), Selection(), Work(workers=1))
    assert "3 checksums correct" in verify(tmp_path / "shards")
    shutil.copy(tmp_path / "shards" / "shard-000000.tar", tmp_path / "shards" / "shard-000001.tar")
    with pytest.raises(ValueError, match=r"shard-000001\.tar is not in the manifest"):
        verify(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"--decode is for \.beton files"):
        verify(tmp_path / "shards", decode=True)


def test_verify_wants_a_worker(whole, capsys):
    for workers in ("0", "-1"):
        assert main(["prep", "verify", str(whole), "--workers", workers]) == 1
        assert "--workers must be at least 1" in capsys.readouterr().err


def test_two_writers_of_one_file(tmp_path):
    with (
        partial_file(tmp_path / "x"),
        pytest.raises(ValueError, match="another process is writing"),
        partial_file(tmp_path / "x"),
    ):
        pass
    assert (tmp_path / "x.partial").exists()


def test_the_manifest_is_plain_json(whole):
    manifest = json.loads(whole.with_name("x.beton.json").read_text())
    assert manifest["format"] == 1 and manifest["kind"] == "beton" and manifest["file_bytes"] == whole.stat().st_size
    assert manifest["sides"] == {"short": [30, 30, 40], "long": [30, 50, 60]}
    assert manifest["stored"] == {"passed": 6, "encoded": 6}


def test_a_beton_gets_a_name_that_the_loaders_know(tmp_path, capsys):
    write_photos(tmp_path / "images", {"a": [(8, 8)]})
    assert main(["prep", "beton", str(tmp_path / "images"), str(tmp_path / "train")]) == 1
    assert f"must end in .beton, or the loaders do not recognise it: {tmp_path}/train.beton" in capsys.readouterr().err
    assert not list(tmp_path.glob("train*"))


def test_a_renamed_beton_is_still_whole(beton):
    for side in SIDES:
        beton.with_name(f"x.beton{side}").rename(beton.with_name(f"y.beton{side}"))
    assert "2 checksums correct" in verify(beton.with_name("y.beton"), workers=1)


def test_a_name_that_is_not_utf_8_can_be_converted_and_described(tmp_path):
    """On a terminal of UTF-8, which refuses what Python makes of such a name."""
    top = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(top + b"/caf\xe9")
    with open(top + b"/caf\xe9/1.jpg", "wb") as file:
        file.write(jpeg(9, 9))
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for command in (["beton", top, top + b".beton", "--workers", "1"], ["describe", top + b".beton"]):
        command = [sys.executable, "-m", "fastssl", "prep", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and r"caf\udce9" in done.stdout, done.stderr
