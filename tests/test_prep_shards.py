"""fastssl prep shards: WebDataset tar files with DALI's index, the same bytes every time; tar files as a source."""

import gzip
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from prep_images import bad_kinds, jpeg, kinds, write_kinds, write_photos

from fastssl.data_prep.decode import BadImage, decode_image
from fastssl.data_prep.describe import describe
from fastssl.data_prep.files import partial_folder
from fastssl.data_prep.find import find_images
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection, open_source, read_place
from fastssl.data_prep.verify import verify
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.data_prep.write_shards import write_shards

ORIGINALS = Store(originals=True)


def write(data, out, store=ORIGINALS, workers=1, **options):
    return write_shards(data, out, store, Selection(), Work(workers=workers), **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of noisy photos, about 40 KB each, and one of odd and bad files."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, {"ant": [(300, 400)] * 30, "bee": [(200, 300)] * 20}, quality=95)
    write_kinds(folder / "cmyk", kinds(), bad_kinds())
    return folder


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "shards"
    write(photos, out, shard_size=1)
    return out


def test_shards_hold_the_folder_in_its_order(photos, shards):
    folder, left_out = find_images(photos), bad_kinds()
    kept = [i for i, path in enumerate(folder.paths) if path.split("/")[-1] not in left_out]
    samples = []
    for path in sorted(shards.glob("*.tar")):
        assert path.stat().st_size <= 1_000_000
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            content = [archive.extractfile(member).read() for member in members]
        assert [member.name for member in members[1::2]] == [member.name[:9] + ".cls" for member in members[::2]]
        samples += [(image, int(label)) for image, label in zip(content[::2], content[1::2])]
    assert len(list(shards.glob("*.tar"))) > 1 and len(samples) == len(kept)
    for i, (data, label) in zip(kept, samples):
        assert label == folder.labels[i]
        assert decode_image(data).shape == decode_image(folder.path(i)).shape
        if label < 2:
            assert data == read_place(open_source(photos, Selection()).place(i))
    lines = [json.loads(line)["path"] for line in (shards / "images.jsonl").read_text().splitlines()]
    assert lines == [folder.paths[i] for i in kept]


def test_the_bytes_follow_from_the_images(photos, shards, tmp_path):
    write(photos, tmp_path / "again", workers=2, shard_size=1)
    names = sorted(path.name for path in shards.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (shards / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_index_is_what_dali_would_write(shards, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    for path in shards.glob("*.tar"):
        creator = wds2idx.IndexCreator(str(path), str(tmp_path / "x.idx"), verbose=False)
        creator.create_index()
        creator.close()
        assert path.with_suffix(".idx").read_text() == (tmp_path / "x.idx").read_text()


DALI = """
import sys
from nvidia.dali import fn, pipeline_def
folder, count = sys.argv[1], int(sys.argv[2])
shards = sys.argv[3:]

@pipeline_def(batch_size=count, num_threads=1, device_id=None)
def read():
    paths = dict(paths=[f"{s}.tar" for s in shards], index_paths=[f"{s}.idx" for s in shards])
    encoded, label = fn.readers.webdataset(**paths, ext=["jpg;ppm", "cls"])
    return fn.decoders.image(encoded), label

pipeline = read()
pipeline.build()
images, labels = pipeline.run()
for i in range(count):
    print(bytes(labels.at(i)).decode(), *images.at(i).shape, int(images.at(i).astype("int64").sum()))
"""


@pytest.mark.parametrize("raw", [False, True])
def test_dali_reads_shards(shards, photos, tmp_path, raw):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    if raw:
        write(photos, tmp_path / "raw", Store(raw=True), shard_size=2)
        shards = tmp_path / "raw"
    source = open_source(shards, Selection())
    stems = [str(path.with_suffix("")) for path in sorted(shards.glob("*.tar"))]
    command = [sys.executable, "-W", "ignore", "-c", DALI, str(shards), str(len(source)), *stems]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for i, line in enumerate(done.stdout.splitlines()[-len(source) :]):
        label, *shape, total = map(int, line.split())
        pixels = decode_image(read_place(source.place(i)))
        assert label == source.folder.labels[i] and tuple(shape) == pixels.shape
        assert abs(total - pixels.sum(dtype=np.int64)) <= (0 if raw else 0.01 * pixels.size)


def test_raw_shards_hold_plain_pixels(tmp_path):
    data = write_kinds(tmp_path / "images", {"a.jpg": (jpeg(30, 40), "")})
    write(data, tmp_path / "shards", Store(raw=True))
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as archive:
        assert archive.getnames() == ["000000000.ppm", "000000000.cls"]
        stored = archive.extractfile("000000000.ppm").read()
        assert archive.extractfile("000000000.cls").read() == b"-1"
    np.testing.assert_array_equal(decode_image(stored), decode_image(data / "a.jpg"))


def test_verify_and_describe(shards, tmp_path):
    count = len(list(shards.glob("*.tar")))
    assert f"{2 * count + 1} checksums correct" in verify(shards, workers=1)
    text = describe(shards)
    assert f"57 images in {count} shards" in text and "3: ant, bee, cmyk" in text and "left out  4" in text
    for name in ("shard-000000.tar", "shard-000001.idx", "images.jsonl", "manifest.json"):
        content = bytearray((shards / name).read_bytes())
        content[len(content) // 2] ^= 2
        copy = tmp_path / name
        copy.mkdir()
        for path in shards.iterdir():
            (copy / path.name).symlink_to(path)
        (copy / name).unlink()
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            verify(copy, workers=1)
    (copy / "shard-000000.tar").unlink()
    (copy / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match="is missing"):
        verify(copy, workers=1)


def test_shards_are_a_source_of_the_same_images(photos, shards, tmp_path):
    shards = shutil.copytree(shards, tmp_path / "from-a-mac")
    (shards / "._shard-000000.tar").write_bytes(b"what macOS keeps beside a file on a disk that is not its own")
    assert "checksums correct" in verify(shards)
    write_beton(shards, tmp_path / "a.beton", ORIGINALS, Selection(), Work(workers=1))
    write_beton(photos, tmp_path / "b.beton", ORIGINALS, Selection(), Work(workers=1))
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    manifests = [json.loads((tmp_path / f"{name}.beton.json").read_text()) for name in "ab"]
    assert manifests[0]["class_names"] == manifests[1]["class_names"] == ["ant", "bee", "cmyk"]


@pytest.mark.parametrize("top", ["", "imagenet/", "./"])
def test_a_folder_packed_in_a_tar_is_that_folder(photos, tmp_path, top):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("cmyk", "bee", "ant"):
            archive.add(photos / name, f"{top}{name}", filter=lambda member: None if member.issym() else member)
    packed, folder = open_source(tmp_path / "x.tar", Selection()), open_source(photos, Selection())
    assert packed.folder.class_names == folder.folder.class_names
    kept = [i for i, path in enumerate(folder.folder.paths) if not path.endswith("gone.jpg")]
    assert packed.folder.paths == [folder.folder.paths[i] for i in kept]
    assert packed.folder.labels.tolist() == folder.folder.labels[kept].tolist()
    chosen = open_source(tmp_path / "x.tar", Selection(classes="bee", count=3))
    wanted = open_source(photos, Selection(classes="bee", count=3))
    for i in range(3):
        assert chosen.folder.labels[i] == 0 and read_place(chosen.place(i)) == read_place(wanted.place(i))


def test_imagenets_archives_are_read_as_they_are_published(tmp_path):
    """ILSVRC2012_img_train.tar holds a tar file for each class, whose images begin with its name."""
    data, tars, whole = tmp_path / "data", tmp_path / "tars", tmp_path / "whole.tar"
    tars.mkdir()
    with tarfile.open(whole, "w") as archive:
        for name in ("n02", "n01"):
            images = write_kinds(data / name, {f"{name}_{i}.JPEG": (jpeg(9 + i, 9), "") for i in (10, 2)})
            with tarfile.open(tars / f"{name}.tar", "w") as inner:
                for path in sorted(images.iterdir(), reverse=True):
                    inner.add(path, path.name)
            archive.add(tars / f"{name}.tar", f"{name}.tar")
    folder = open_source(data, Selection())
    for source in (open_source(whole, Selection()), open_source(tars, Selection())):
        assert source.folder.paths == folder.folder.paths and source.folder.class_names == ["n01", "n02"]
        assert source.folder.labels.tolist() == folder.folder.labels.tolist() == [0, 0, 1, 1]
        assert [read_place(source.place(i)) for i in range(4)] == [read_place(folder.place(i)) for i in range(4)]
    cut = whole.read_bytes()[: whole.stat().st_size // 2]
    (tmp_path / "cut.tar").write_bytes(cut)
    with pytest.raises(ValueError, match=r"cut\.tar is no whole, uncompressed tar file"):
        open_source(tmp_path / "cut.tar", Selection())
    shutil.copy(tars / "n01.tar", tars / "other.tar")
    assert open_source(tars, Selection()).folder.class_names == []  # shards without classes
    shutil.move(whole, tars / "ILSVRC2012_img_train.tar")
    shutil.move(tars / "n01.tar", tars / "ILSVRC2012_img_val.tar")
    with pytest.raises(ValueError, match=r"several splits, ILSVRC2012_img_train\.tar and ILSVRC2012_img_val\.tar"):
        open_source(tars, Selection())


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_a_file_stored_in_pieces_is_refused(kind, tmp_path):
    """GNU tar's --sparse leaves holes out, so that a file's bytes are not one after the other."""
    write_kinds(tmp_path, {"whole.jpg": (jpeg(9, 9), "")})
    for name in ("black.bmp", "weights.bin"):
        (tmp_path / name).write_bytes(b"BM")
        os.truncate(tmp_path / name, 1_000_000)
    command = ["tar", "-C", tmp_path, f"--format={kind}", "-cSf", tmp_path / "some.tar", "whole.jpg", "weights.bin"]
    subprocess.run(command, check=True)
    assert open_source(tmp_path / "some.tar", Selection()).folder.paths == ["whole.jpg"]
    subprocess.run([*command, "black.bmp"], check=True)
    with pytest.raises(ValueError, match=r"some\.tar .* \(black\.bmp is stored in pieces: pack without --sparse\)"):
        open_source(tmp_path / "some.tar", Selection())


@pytest.mark.parametrize("top", ["", "imagenette2/", "ILSVRC/Data/CLS-LOC/"])
def test_of_a_packed_data_set_the_training_split_is_taken(tmp_path, top):
    names = [f"{top}{name}" for name in ("train/b/1.jpg", "val/a/9.jpg", "train/a/2.jpg", "test/3.jpg")]
    source = open_source(pack(tmp_path / "x.tar", [(name, name.encode()) for name in names]), Selection())
    assert source.folder.paths == ["a/2.jpg", "b/1.jpg"] and source.folder.class_names == ["a", "b"]
    assert [read_place(source.place(i)).decode() for i in (0, 1)] == [names[2], names[0]]
    splits = [(f"{top}{name}", b"x") for name in ("Train/a/1.jpg", "Test/a/1.jpg")]
    with pytest.raises(ValueError, match="holds Train and Test, which look like splits"):
        open_source(pack(tmp_path / "x.tar", splits), Selection())


def test_a_class_whose_tar_file_is_damaged_is_named_and_left_out(tmp_path):
    good = pack(tmp_path / "good.tar", [("n01_1.JPEG", jpeg(9, 9))]).read_bytes()
    inner = [("n01.tar", good), ("n02.tar", gzip.compress(good)), ("n03.tar", good[:600])]
    tally = write_beton(pack(tmp_path / "x.tar", inner), tmp_path / "x.beton", ORIGINALS, Selection(), Work(workers=1))
    assert [image["path"] for image in tally.quarantined] == ["n02/n02.tar", "n03/n03.tar"]
    assert tally.num_images == 1 and tally.has_classes


def test_two_that_write_one_folder_do_not_mix(photos, tmp_path):
    with partial_folder(tmp_path / "out") as partial:
        (partial / "shard-000000.tar").write_bytes(b"of the first")
        with pytest.raises(ValueError, match=r"another process is writing .*out\.partial"):
            write(photos, tmp_path / "out")
        assert (partial / "shard-000000.tar").read_bytes() == b"of the first"
    write(photos, tmp_path / "out")  # over what a killed one left
    assert "checksums correct" in verify(tmp_path / "out", workers=1)
    with pytest.raises(OSError, match=r"No space left on device: .*pytest"), partial_folder(tmp_path / "full"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.glob("*.partial"))


def test_links_and_hidden_files_in_a_tar_are_what_they_are_in_a_folder(tmp_path):
    data = write_kinds(tmp_path / "x" / "a", {"1.jpg": (jpeg(9, 9), ""), ".2.jpg": (b"hidden", "")})
    os.link(data / "1.jpg", data / "3.jpg")
    (data / "4.jpg").symlink_to("../a/1.jpg")
    (data / "40.jpg").symlink_to("4.jpg")
    (data / "5.jpg").symlink_to("nowhere.jpg")
    (data / "6.jpg").symlink_to("7.jpg")
    (data / "7.jpg").symlink_to("6.jpg")
    write_kinds(tmp_path / "x" / ".thumbnails", {"1.jpg": (jpeg(5, 5), "")})
    for top in ("x", "./x"):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(tmp_path / "x", top)
        packed, folder = open_source(tmp_path / "x.tar", Selection()), open_source(tmp_path / "x", Selection())
        assert packed.folder.paths == folder.folder.paths and packed.folder.class_names == ["a"]
        assert [read_place(packed.place(i)) for i in range(4)] == [read_place(folder.place(i)) for i in range(4)]
        for source, bad in itertools.product((packed, folder), (5, 6, 7)):
            with pytest.raises(BadImage, match=rf"a/{bad}\.jpg"):
                read_place(source.place(bad - 1))


def pack(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_one_image_of_each_sample_with_several(tmp_path):
    photo, mask = jpeg(9, 9), jpeg(5, 5)
    sample = [("s.v1/1.cls", b" 2\n"), ("s.v1/1.depth.png", mask), ("s.v1/1.jpg", photo), ("s.v1/1.txt", b"words")]
    source = open_source(pack(tmp_path / "x.tar", sample), Selection())
    assert source.folder.paths == ["x.tar/s.v1/1.jpg"] and source.folder.labels.tolist() == [2]
    assert read_place(source.place(0)) == photo


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", b"x"), ("1.cls", b"n01440764")], r"x\.tar/1\.cls holds b'n01440764', not a class number"),
        (
            [("a.1.jpg", b"x"), ("a.1.cls", b"1"), ("a.2.jpg", b"x"), ("a.2.cls", b"1")],
            r"a\.2\.cls: another sample has the same name",
        ),
        ([("1.jpg", b"x"), ("2.jpg", b"x"), ("2.cls", b"1")], r"x\.tar/1\.jpg has no \.cls file beside it"),
        ([("1.jpg", b"x"), ("1.cls", b"9" * 19)], r"1\.cls holds b'9999999999999999999', not a class number"),
        ([("1.jpg", b"x"), ("1.cls", b"20000000")], "a label 20,000,000, too large for a class number"),
    ],
)
def test_classes_that_cannot_be_read(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        open_source(pack(tmp_path / "x.tar", members), Selection())


def test_tars_that_cannot_be_used(shards, tmp_path):
    with pytest.raises(ValueError, match="uncompressed tar"):
        open_source(write_kinds(tmp_path / "x", {"a.tar": (b"no tar" * 500, "")}), Selection())
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path / "empty.tar", Selection())
    cut = (shards / "shard-000000.tar").read_bytes()[:300_000]
    (tmp_path / "cut.tar").write_bytes(cut)
    with pytest.raises(ValueError, match=r"cut\.tar"):
        open_source(tmp_path / "cut.tar", Selection())


def test_what_is_in_the_way_stays(photos, tmp_path):
    precious = write_kinds(tmp_path / "precious", {"a.jpg": (jpeg(9, 9), "")})
    for force in (False, True):
        with pytest.raises(ValueError, match="not a folder of shards"):
            write(photos, precious, force=force)
    (tmp_path / "precious" / "manifest.json").write_text('{"name": "of a web page"}')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or not a manifest"):
        write(photos, precious, force=True)
    assert (precious / "a.jpg").exists()
    (tmp_path / "precious" / "manifest.json").unlink()
    data = write_photos(tmp_path / "few", {"a": [(20, 20)] * 2})
    write(data, tmp_path / "shards")
    with pytest.raises(ValueError, match="--force"):
        write(data, tmp_path / "shards")
    write(data, tmp_path / "shards", Store(raw=True), force=True)
    assert describe(tmp_path / "shards").count("2 raw") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "precious", "shards"]


def test_a_stop_while_old_shards_are_removed_leaves_the_new_ones_whole(tmp_path, monkeypatch):
    data, out = write_photos(tmp_path / "few", {"a": [(20, 20)] * 2}), tmp_path / "shards"
    write(data, out)

    def stop(folder):
        (folder / "shard-000000.tar").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("fastssl.data_prep.write_shards.shutil", SimpleNamespace(rmtree=stop))
    with pytest.raises(KeyboardInterrupt):
        write(data, out, Store(raw=True), force=True)
    monkeypatch.undo()
    verify(out)
    assert describe(out).count("2 raw") == 1
    write(data, out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "shards"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    data, disk = write_photos(tmp_path / "few", {"a": [(20, 20)]}), tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "link").symlink_to(disk)
    write(data, tmp_path / "link")
    write(data, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and len(list(disk.glob("*.tar"))) == 1
    for path in disk.iterdir():
        path.unlink()
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == os.path.realpath(disk))
    with pytest.raises(ValueError, match="name a folder in it"):
        write(data, disk)
    monkeypatch.undo()
    monkeypatch.chdir(disk)
    with pytest.raises(ValueError, match="name a folder in it"):
        write(data, ".")
