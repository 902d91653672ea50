"""Checkpoints survive: kills, full disks, flipped bits, foreign files."""

import resource
import signal

import pytest
import torch

from fastssl import checkpoint
from fastssl.checkpoint import CheckpointError
from fastssl.data_prep.files import partial_path


def state(step, size=1000):
    generator = torch.Generator().manual_seed(step)
    model = {"w": torch.randn(size, generator=generator)}
    return {
        "format": checkpoint.FORMAT, "step": step, "config": {"arch": "resnet18"}, "num_images": 7, "model": model,
        "optimizer": {"state": {0: {"m": torch.ones(3)}}}, "scaler": {},
    }  # fmt: skip


def save(folder, step, **kwargs):
    path = folder / checkpoint.name(step)
    checkpoint.save(state(step, **kwargs), path)
    return path


def test_round_trip(tmp_path):
    loaded = checkpoint.load(save(tmp_path, 3))
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], state(3)["model"]["w"])


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    path = save(tmp_path, 3)
    whole = path.read_bytes()
    values = whole.index(state(3)["model"]["w"].numpy().tobytes())
    for position in (values, values + 1777, values + 3999):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / checkpoint.name(30)).write_bytes(b"torn")
    report = []
    assert checkpoint.newest_good(tmp_path, report).name == checkpoint.name(20)
    assert len(report) == 1 and checkpoint.name(30) in report[0]


def test_the_work_of_another_version_is_not_passed_over(tmp_path):
    """Going on from the checkpoint before it would overwrite it."""
    save(tmp_path, 10)
    checkpoint.save({**state(20), "format": checkpoint.FORMAT + 1}, tmp_path / checkpoint.name(20))
    report = []
    assert checkpoint.newest_good(tmp_path, report) is None
    assert len(report) == 1 and "continue with the version that wrote it" in report[0]


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_litter(tmp_path):
    good = save(tmp_path, 1)
    before = good.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the kernel refuses to write further
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*free some space"):
            save(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert good.read_bytes() == before


def test_a_kill_while_writing_leaves_only_a_partial_file_that_is_never_taken_for_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    partial_path(tmp_path / checkpoint.name(2)).write_bytes(b"half")
    assert list(checkpoint.saved_steps(tmp_path)) == [1]


def test_files_whose_names_differ_in_the_suffix_are_written_at_the_same_time(tmp_path):
    """Two exports of one encoder, side by side."""

    def write(file):
        file.write(b"first, ")
        checkpoint.write_whole(tmp_path / "encoder.safetensors", lambda other: other.write(b"other"))
        file.write(b"last")

    checkpoint.write_whole(tmp_path / "encoder.pth", write)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "encoder.pth": b"first, last",
        "encoder.safetensors": b"other",
    }


@pytest.mark.parametrize("within_torch", [False, True])  # which then raises an error of its own
def test_ctrl_c_while_writing_leaves_no_partial_file(tmp_path, within_torch):
    class Stopped:
        wrote = False

        def write(self, data):
            if self.wrote:
                raise KeyboardInterrupt
            self.wrote = True
            return len(bytes(data))

        def flush(self):
            pass

    def write(file):
        file.write(b"half")
        if within_torch:
            torch.save(state(1), Stopped())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_whole(tmp_path / "encoder.pth", write)
    assert not list(tmp_path.iterdir())


def test_pickled_code_is_refused(tmp_path):
    path = tmp_path / checkpoint.name(1)
    torch.save({**state(1), "config": CheckpointError}, path)
    with pytest.raises(CheckpointError, match=r"damaged or not a checkpoint.* add --restart to start from its weights"):
        checkpoint.load(path)


def test_foreign_files_are_named_as_such(tmp_path):
    path = tmp_path / checkpoint.name(1)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a fastssl checkpoint"):
        checkpoint.load(path)
    torch.save({**state(1), "format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "absent.pt")


def test_pruning_keeps_the_newest_and_the_periodic(tmp_path):
    for step in range(10, 101, 10):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 100, keep_last=2, keep_multiple=40)
    assert list(checkpoint.saved_steps(tmp_path)) == [100, 90, 80, 40]
    checkpoint.prune(tmp_path, 90, keep_last=1, keep_multiple=0)  # the run went back to 80: 100 is damaged
    assert list(checkpoint.saved_steps(tmp_path)) == [100, 90]
    checkpoint.prune(tmp_path, 100, keep_last=1, keep_multiple=0)
    assert list(checkpoint.saved_steps(tmp_path)) == [100]
