"""Bad input gets one clear sentence and a non-zero exit where the run cannot go on; nothing is lost."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import checkpoint, train
from fastssl.command import FAILED, NOT_FINITE, USAGE, run_command
from fastssl.run_folder import lock_file

FLAGS = (
    "-a resnet18 --image-size 32 -b 4 --queue-size 16 --dim 8 --epochs 1 --knn-every 0 --device cpu --log-every 1 "
    "--channels-last"
)


@pytest.fixture
def run(pretrain_argv, tmp_path, monkeypatch):
    """`run(data, *flags)` -> (exit code, what was said)."""
    monkeypatch.chdir(tmp_path)
    return lambda data, *flags: pretrain_argv([str(data), *FLAGS.split(), "--output", str(tmp_path / "run"), *flags])


@pytest.fixture
def data(make_image_folder, tmp_path):
    return make_image_folder(tmp_path / "data", {"train": 4}, classes=2)


def one_sentence(text):
    """The error line; there is no traceback beside it."""
    (line,) = [line for line in text.splitlines() if line.startswith("fastssl: error: ")]
    assert "Traceback" not in text
    return line


def test_missing_empty_and_imageless_folders(run, tmp_path):
    code, text = run(tmp_path / "nowhere")
    assert code == FAILED and "does not exist" in one_sentence(text)
    (tmp_path / "empty").mkdir()
    code, text = run(tmp_path / "empty")
    assert code == FAILED and "empty" in one_sentence(text)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    code, text = run(tmp_path / "notes")
    assert code == FAILED and "no image" in one_sentence(text)
    assert not (tmp_path / "run").exists()


def test_no_data_at_all(run):
    assert "no data set" in one_sentence(run("")[1])


def test_a_batch_larger_than_the_data_set(run, data):
    code, text = run(data, "-b", "64")
    line = one_sentence(text)
    assert code == FAILED and "8 images" in line and "64" in line


def test_a_first_epoch_after_the_last_step(run, data):
    code, text = run(data, "--epochs", "4", "--start-epoch", "2", "--steps", "4")
    assert code == FAILED and "--start-epoch 2 begins at step 4 but --steps 4 ends before that" in one_sentence(text)
    assert run(data, "--epochs", "4", "--start-epoch", "2", "--steps", "5")[0] == 0


def test_a_batch_that_does_not_divide(run, data):
    code, text = run(data, "--accumulate", "3")
    assert code in (USAGE, FAILED)  # an older tyro leaves our own errors to `run_command`
    assert "must be a multiple of --accumulate 3" in " ".join(text.split())
    assert "--bn-splits 3" in one_sentence(run(data, "--bn-splits", "3")[1])


def test_an_unknown_architecture_is_answered_with_the_nearest(run, data):
    code, text = run(data, "-a", "resnet19")
    assert code == FAILED and "resnet18" in one_sentence(text)


@pytest.mark.parametrize(
    "words", [["-a", "resnet19"], ["-a", "vit_tiny", "--stem", "cifar"], ["--policy-set", "blur_q=1"]]
)
def test_what_does_not_exist_is_told_before_images_are_read(run, tmp_path, words):
    code, text = run(tmp_path / "nowhere", *words)
    assert code == FAILED and words[1].split("=")[0] in one_sentence(text) and "nowhere" not in text


def test_cuda_where_there_is_none(run, data):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "finds no GPU" in one_sentence(run(data, "--device", "cuda")[1])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_a_truncated_jpeg_is_named_counted_and_skipped(run, data, tmp_path):
    for name in ("class0/1.jpg", "class1/2.jpg"):
        truncate(data / "train" / name)
    code, text = run(data, "--epochs", "2")
    assert code == 0
    said = sorted(line for line in text.splitlines() if "unreadable image" in line)
    assert [line.split(": ")[0] for line in said] == ["unreadable image 1", "unreadable image 2"]
    assert all(any(name in line for line in said) for name in ("class0/1.jpg", "class1/2.jpg"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_truncated_jpeg_stops_the_run_when_asked_to(run, data):
    truncate(data / "train" / "class1" / "2.jpg")
    code, text = run(data, "--on-bad-image", "error")
    assert code == FAILED and "class1/2.jpg" in one_sentence(text)


def test_odd_images_train(run, data, tmp_path):
    """Greyscale, CMYK, 16-bit, EXIF-rotated: all usual in ImageNet-like folders."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    folder = data / "train" / "class0"
    Image.fromarray(noise[..., 0]).save(folder / "grey.jpg")
    Image.fromarray(noise, "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(folder / "rotated.jpg", exif=exif)
    code, text = run(data, "-b", "12")
    assert code == 0 and "unreadable image" not in text


def test_a_full_disk_stops_the_run_and_the_previous_checkpoint_survives(run, data, tmp_path):
    code, _ = run(data)
    assert code == 0
    (good,) = checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values()
    before = good.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # the kernel refuses to write further
    try:
        code, text = run(data, "--epochs", "2", "--resume", "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    line = one_sentence(text)
    assert code == FAILED and "File too large); earlier checkpoints are untouched: free some space" in line
    assert good.read_bytes() == before and checkpoint.load(good)["step"] == 2
    code, _ = run(data, "--epochs", "2", "--resume", "auto")
    assert code == 0 and max(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == 4


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough"),
        (MemoryError("17 GiB"), "17 GiB"),
        (None, "there is not enough memory (err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        (GPU_FULL, "there is not enough memory (CUDA out of memory. Tried to allocate 2.00 GiB): smaller batches, "),
    ],
)
def test_want_of_memory_is_one_sentence(error, said, capsys):
    def fail(argv):
        if error is None:
            torch.empty(1 << 50)
        raise error

    assert run_command(fail, []) == FAILED
    assert said in one_sentence(capsys.readouterr().err)


def test_what_torch_cannot_compile_is_one_sentence(capsys):
    def compiler(graph, inputs):
        raise OSError("no\nroom")

    def compile_one(argv):
        return torch.compile(torch.nn.Linear(1, 1), backend=compiler)(torch.ones(1))

    assert run_command(compile_one, []) == FAILED
    said = r"torch.compile failed \(BackendCompilerFailed: .*OSError: no room\): use --compile off"
    assert re.search(said, one_sentence(capsys.readouterr().err))


def test_what_torch_cannot_repeat_bit_by_bit_is_one_sentence(capsys):
    def unpool(argv):
        torch.use_deterministic_algorithms(True)
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64), 2)

    try:
        assert run_command(unpool, []) == FAILED
    finally:
        torch.use_deterministic_algorithms(False)
    said = one_sentence(capsys.readouterr().err)
    assert re.search("max_unpool.* differs from run to run .* no --deterministic", said)


@pytest.mark.parametrize("count", [1, 10**6])  # met at the end, or while it prints
def test_a_reader_that_has_seen_enough_is_no_error(count):
    program = f"import sys; from fastssl.command import run_command; run = lambda argv: print('x' * {count}) or 0; "
    line = [sys.executable, "-c", program + "sys.exit(run_command(run, []))"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as head does
        said = process.stderr.read()
    assert (process.returncode, said) == (128 + signal.SIGPIPE, b"")


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(run, data, tmp_path):
    code, _ = run(data)
    (good,) = checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values()
    code, text = run(data, "--epochs", "3", "--resume", "auto", "--lr", "1e30")
    line = one_sentence(text)
    assert code == NOT_FINITE and "the loss is not finite at step" in line and "lower --lr" in line
    assert list(checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values()) == [good]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_weights_that_a_finite_loss_left_infinite_are_not_saved(run, data, tmp_path):
    """The loss of the step that spoils them is still that of the good ones: it is saved after, as a rule."""
    flags = ("--save-every-steps", "1", "--keep-last", "1")
    assert run(data, "--steps", "1", *flags)[0] == 0
    code, text = run(data, "--resume", "auto", *flags, "--lr", "3e38", "--uniform-weight", "1000")
    assert code == NOT_FINITE
    assert "the loss is finite, but step 2 left " in one_sentence(text)
    (good,) = checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values()
    model = checkpoint.load(good)["model"].values()
    assert all(x.isfinite().all() for x in model)


def test_a_second_run_in_the_folder_of_one_that_is_writing(run, data, tmp_path):
    assert run(data)[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with contextlib.closing(lock_file(tmp_path / "run" / "lock")):
        code, text = run(data, "--epochs", "2", "--resume", "auto")
    assert code == FAILED and "another run is writing" in one_sentence(text)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert run(data, "--epochs", "2", "--resume", "auto")[0] == 0


def test_a_file_that_is_no_checkpoint(run, data, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    code, text = run(data, "--resume", str(tmp_path / "x.pt"))
    assert code == FAILED and "x.pt is damaged or not a checkpoint" in one_sentence(text)
    code, text = run(data, "--resume", str(tmp_path))
    assert code == FAILED and "is a folder: to resume the run in it, use --resume auto --output" in one_sentence(text)
    code, text = run(data, "--resume", "auto")  # an empty folder is a fresh start, and said so
    assert code == 0 and "starting from scratch" in text
    (only,) = checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values()
    only.write_bytes(b"")
    code, text = run(data, "--resume", "auto")
    assert code == FAILED and "can be used" in one_sentence(text) and "the one before it" not in text


def test_going_on_in_a_folder_without_a_name_is_no_fresh_start(run, data, tmp_path):
    for output in ([], ["--output", ""]):  # the second a shell's variable that was never set
        code = run_command(train.main, [str(data), *FLAGS.split(), "--resume", "auto", *output])
        assert code == FAILED and not (tmp_path / "runs").exists()


def test_a_queue_of_16_bits_trains_and_resumes(run, data, tmp_path):
    """Not bad input, but the same small run: the keys keep their type in checkpoints."""
    code, _ = run(data, "--queue-dtype", "bf16")
    assert code == 0
    code, text = run(data, "--queue-dtype", "bf16", "--epochs", "2", "--resume", "auto")
    assert code == 0 and "resuming from" in text
    newest = next(iter(checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values()))
    assert checkpoint.load(newest)["model"]["queue"].dtype == torch.bfloat16


def test_a_closed_output_is_no_traceback():
    program = "import sys; from fastssl.command import run_command; run = lambda argv: print('x') or 0; "
    line = [sys.executable, "-c", program + "sys.exit(run_command(run, []))"]
    done = subprocess.run(line, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_file_error_is_told_without_pythons_number(tmp_path, capsys):
    assert run_command(lambda argv: (tmp_path / "none").read_text(), []) == FAILED
    assert capsys.readouterr().err == f"fastssl: error: {tmp_path / 'none'}: No such file or directory\n"


@pytest.mark.parametrize(
    "line", ["pretrain --help", "pretrain --lr x DATA", "pretrain /nowhere", "pretrain --config none", "recipes"]
)
def test_what_needs_no_torch_does_not_wait_for_it(line):
    script = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); from fastssl import cli; "
    done = subprocess.run([sys.executable, "-c", script + "cli.main()", *line.split()], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert len(done.stdout + done.stderr) > 100
