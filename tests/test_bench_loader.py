"""The loader bench: every loader in a process of its own, figures that add up, JSON that says where they are from."""

import json

import pytest
from PIL import Image
from ranks import FORKS

from fastssl.bench import loader, loader_process
from fastssl.bench.loader import main
from fastssl.bench.loader_peers import CONTESTANTS, FFCV, OURS, RAW, Options
from fastssl.bench.loader_process import LoaderProcess
from fastssl.bench.photos import open_data, train_folder
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection
from fastssl.data_prep.work_pool import Work
from fastssl.data_prep.write_beton import write_beton
from fastssl.loaders.choose import LOADERS


@pytest.fixture
def forked(monkeypatch):
    """Processes are forked after their imports, which take longer than what they do."""
    monkeypatch.setattr(loader_process.multiprocessing, "get_context", lambda method: FORKS)


@pytest.mark.usefixtures("forked")
def test_figures_table_and_json(image_folder, tmp_path, capsys):
    output = tmp_path / "loader.json"
    names = ["ours, folder", "libjpeg-turbo alone", "FFCV, two decoders"]
    main([str(image_folder / "train"), "--only", *names, "--threads", "1", "--batch-size", "5", "--rounds", "3",
          "--output", str(output)])  # fmt: skip
    text = capsys.readouterr().out
    assert "left out: FFCV, two decoders (FFCV reads a .beton file: give one with --beton)" in text
    result = json.loads(output.read_text())
    assert set(result["loaders"]) == set(names[:2]) and result["options"]["threads"] == 1
    assert {"commit", "command", "packages", "cpu", "cores"} <= set(result["environment"])
    for name, pairs in {"ours, folder": 20, "libjpeg-turbo alone": 24}.items():  # ours drops the tail of 24
        figures = result["loaders"][name]
        assert figures["pairs"] == pairs and figures["pairs_per_second"]["rounds"] == 3
        assert 0 < figures["first_batch_seconds"] < 60 and figures["cpu_ms_per_pair"]["median"] > 0
        assert any(line.startswith(name) for line in text.splitlines())


@pytest.mark.usefixtures("forked")
def test_a_run_that_is_cut_short_keeps_its_whole_rounds(image_folder, tmp_path, monkeypatch):
    made, one_round = [], LoaderProcess.round

    def interrupted(process):
        made.append(process.name)
        if len(made) == 4:
            raise KeyboardInterrupt
        return one_round(process)

    monkeypatch.setattr(LoaderProcess, "round", interrupted)
    output, names = tmp_path / "loader.json", ["ours, folder", "libjpeg-turbo alone"]
    sizes = ["--batch-size", "5", "--output", str(output)]
    with pytest.raises(KeyboardInterrupt):
        main([str(image_folder / "train"), "--only", *names, "--threads", "1", *sizes])
    loaders = json.loads(output.read_text())["loaders"]
    assert {name: figures["pairs_per_second"]["rounds"] for name, figures in loaders.items()} == dict.fromkeys(names, 1)
    assert len(made) == 4


def test_every_loader_of_files_takes_part():
    assert set(OURS) == {f"ours, {name}" for name in LOADERS if name != "synthetic"} <= set(CONTESTANTS)


@pytest.mark.usefixtures("forked")
def test_a_peer_that_cannot_read_these_files_is_left_out(tmp_path, make_image_folder, capsys):
    flat = make_image_folder(tmp_path / "images", {"train": 4}) / "train" / "class0"
    output, peer = tmp_path / "loader.json", "torchvision, Pillow"
    flags = ["--only", peer, "ours, folder", "--threads", "1", "--batch-size", "2", "--rounds", "1"]
    main([str(flat), *flags, "--output", str(output)])
    result = json.loads(output.read_text())
    assert set(result["loaders"]) == {"ours, folder"} and "class folder" in result["left_out"][peer]
    (tmp_path / "images" / "train" / "class0" / "0.jpg").write_bytes(b"no image")
    main([str(tmp_path / "images"), *flags, "--output", str(output)])
    result = json.loads(output.read_text())
    assert set(result["loaders"]) == {"ours, folder"} and "cannot identify image" in result["left_out"][peer]
    assert f"left out: {peer} (PIL.UnidentifiedImageError: cannot identify" in capsys.readouterr().out


@pytest.mark.usefixtures("forked")
def test_a_peer_whose_import_fails_in_any_way_is_left_out(tmp_path, image_folder, monkeypatch, capsys):
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").write_text("raise AttributeError('numpy lacks what it wants')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loader, "check_same_images", lambda *_: None)
    flags = ["--threads", "1", "--batch-size", "5", "--rounds", "1", "--beton", "any.beton"]
    flags += ["--output", str(tmp_path / "loader.json")]
    main([str(image_folder / "train"), "--only", FFCV, "ours, folder", *flags])
    said = capsys.readouterr().out
    assert f"left out: {FFCV} (AttributeError: numpy lacks what it wants)" in said and "\nours, folder " in said


def test_a_loader_whose_process_has_died_says_so(image_folder):
    process = LoaderProcess("ours, folder", Options(str(image_folder / "train"), None, 4, 1))
    process.wait_for_import()
    process._process.kill()
    process._process.join()
    with pytest.raises(ValueError, match="ours, folder: its process died"):
        process.start()
    process.end()


@pytest.mark.usefixtures("forked")
def test_a_loader_that_fails_stops_the_bench_with_its_reason(tmp_path):
    flags = ["--only", "ours, folder", "--threads", "1", "--batch-size", "2"]
    (tmp_path / "0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"has 1 image: use a --batch-size of at most 1"):
        main([str(tmp_path), *flags])
    (tmp_path / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"ours, folder: 2 images in a row cannot be decoded"):
        main([str(tmp_path), *flags])
    with pytest.raises(ValueError, match="give one with --beton"):
        CONTESTANTS["FFCV, two decoders"](Options("x", None, 4, 1))


def save_as(folder, suffix, mode):
    folder.mkdir()
    for i in range(4):
        Image.new(mode, (40, 30), i).save(folder / f"{i}{suffix}")
    return Options(str(folder), None, 2, 1)


@pytest.mark.parametrize("suffix, mode", [(".png", "RGB"), (".jpg", "CMYK")])
def test_the_bare_decoder_counts_no_file_that_it_cannot_decode(tmp_path, suffix, mode):
    options = save_as(tmp_path / "images", suffix, mode)
    with pytest.raises(ValueError, match="only 0 of the 4 files are JPEGs that it turns into RGB"):
        CONTESTANTS[RAW](options)


def test_the_bare_decoder_takes_grey_files(tmp_path):
    assert sum(CONTESTANTS[RAW](save_as(tmp_path / "images", ".jpg", "L"))()()) == 4


def test_a_beton_of_other_images_is_refused_before_anything_is_measured(tmp_path, monkeypatch, make_image_folder):
    monkeypatch.setattr(loader, "measure", lambda *_: pytest.fail("it measured"))
    data, beton = make_image_folder(tmp_path / "images", {"train": 3}), tmp_path / "x.beton"
    first = data / "train" / "class0" / "0.jpg"

    def convert(**part):
        write_beton(data, beton, Store(), Selection(**part), Work(1), force=True)

    def refused(found):
        with pytest.raises(ValueError, match=f"x.beton holds {found}: the rates would not be of the same images"):
            main([str(data), "--beton", str(beton), "--batch-size", "4"])
        with pytest.raises(ValueError, match=f"x.beton holds {found}"):
            open_data(str(data), str(beton), tmp_path, 4)

    convert(count=5)
    refused(f"5 images, and {data}.* 9")
    convert()
    assert open_data(str(data), str(beton), tmp_path, 4) == (str(data), str(beton))
    assert open_data(None, str(beton), tmp_path, 4) == (str(beton), str(beton))  # not photographs of our own beside it
    first.rename(first.with_suffix(".jpeg"))
    open_data(str(data), str(beton), tmp_path, 4)
    first.with_suffix(".jpeg").rename(first.with_name("00.jpg"))
    refused(f"class0/0.jpg, and {data}.* has class0/00.jpg in its place")
    beton.with_name("x.beton.images.jsonl").unlink()  # as a file that FFCV wrote
    assert open_data(str(data), str(beton), tmp_path, 4) == (str(data), str(beton))
    first.write_bytes(b"no image")
    convert()
    open_data(str(data), str(beton), tmp_path, 4)  # what the conversion left out is no difference


def test_a_class_called_train_is_no_split(tmp_path, make_image_folder):
    data = make_image_folder(tmp_path / "images", {"train": 2})
    assert train_folder(str(data)) == str(data / "train")
    (data / "train" / "class0").rename(data / "train" / "train")
    assert train_folder(str(data / "train")) == str(data / "train")
