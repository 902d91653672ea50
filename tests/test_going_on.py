"""A run that goes on: what its checkpoint and its probe lose, what changed options mean, and what its folder keeps."""

import json
import signal

import pytest
import torch

from fastssl import checkpoint, train
from fastssl.build import make_trainee
from fastssl.command import FAILED, PREEMPTED
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.idle_options import idle_options
from fastssl.plan import make_plan
from fastssl.recipe import RECIPES, load_recipe
from fastssl.resume import start_or_resume, state_of

FLAGS = (
    "-a resnet18 --image-size 32 -b 4 --queue-size 16 --dim 8 --knn-every 1 --knn-k 3 --device cpu --log-every 1 "
    "--channels-last on"
)


@pytest.fixture
def run(pretrain_argv, tmp_path):
    """`run(data, *flags)` -> (exit code, what was said) of a run in tmp_path/run."""
    return lambda data, *flags: pretrain_argv([str(data), *FLAGS.split(), "--output", str(tmp_path / "run"), *flags])


@pytest.fixture
def data(make_image_folder, tmp_path):
    return make_image_folder(tmp_path / "data", {"train": 4, "val": 2}, classes=2)


def probes_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "knn" in line]


def test_the_checkpoint_is_there_before_the_probe_begins_which_is_made_up_for(run, data, tmp_path, monkeypatch):
    """An epoch of 2 steps. The probe may outlast the patience of whoever sent a signal, or fail."""
    made, folder = train.make_probe, tmp_path / "run"

    def fail(backbone):
        raise ValueError("a bad image in the probe")

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_probe", lambda *_: (fail, "a probe that fails"))
        code, text = run(data, "--epochs", "2", "--save-every-epochs", "5")
        assert code == FAILED and "a bad image in the probe" in text
    assert list(checkpoint.saved_steps(folder / "checkpoints")) == [2] and probes_of(folder) == []

    def stopped(*arguments):
        probe, note = made(*arguments)

        def stop_in_the_next_step(backbone):
            percent = probe(backbone)
            signal.raise_signal(signal.SIGTERM)
            return percent

        return stop_in_the_next_step, note

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_probe", stopped)
        code, text = run(data, "--epochs", "2", "--resume", "auto")
    assert code == PREEMPTED and probes_of(folder) == [2]  # first the probe that was due, then a step
    assert run(data, "--epochs", "2", "--resume", "auto")[0] == 0
    assert probes_of(folder) == [2, 4]


def test_a_signal_before_the_probe_stops_the_run_without_it(run, data, tmp_path, monkeypatch):
    class AskedAfterTwoSteps(train.StopSignal):
        calls = 0

        def __call__(self):
            self.calls += 1
            return self.calls == 2

    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignal", AskedAfterTwoSteps)
        assert run(data, "--epochs", "2")[0] == PREEMPTED
    assert probes_of(tmp_path / "run") == []
    assert run(data, "--epochs", "2", "--resume", "auto")[0] == 0
    assert probes_of(tmp_path / "run") == [2, 4]


def test_a_damaged_later_checkpoint_does_not_cost_the_good_ones(run, data, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    every = ("--epochs", "4", "--save-every-steps", "1", "--knn-every", "0")
    assert run(data, *every, "--steps", "4", "--keep-last", "2")[0] == 0
    damaged = folder / checkpoint.name(4)
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    damaged.rename(folder / checkpoint.name(6))  # of a later step than the ones that are now made again
    code, text = run(data, *every, "--steps", "5", "--keep-last", "1", "--resume", "auto")
    assert code == 0 and f"{checkpoint.name(6)} is damaged" in text and "using the one before it" in text
    assert list(checkpoint.saved_steps(folder)) == [6, 5]
    code, text = run(data, *every, "--resume", "auto")
    assert code == 0 and f"{checkpoint.name(5)}, after 5 steps" in text


def test_a_run_that_begins_at_a_checkpoint_goes_on_from_its_own(run, data, tmp_path, pretrain_argv):
    student = tmp_path / "student"
    assert pretrain_argv([str(data), *FLAGS.split(), "--epochs", "1", "--output", str(student), "--seed", "1"])[0] == 0
    start = ("--epochs", "2", "--resume", str(student / "checkpoints" / checkpoint.name(2)), "--restart")
    code, text = run(data, *start, "--steps", "1", "--resume", "auto")  # as the Slurm scripts add it
    assert code == 0 and f"starting from the weights of {start[3]}" in text
    assert "resuming" not in text and "scratch" not in text
    code, text = run(data, *start)
    assert code == FAILED and "already holds a run, saved after step 1: add --resume auto" in text
    code, text = run(data, *start, "--resume", "auto")
    assert code == 0 and f"{checkpoint.name(1)}, after 1 step" in text and "starting from" not in text
    assert max(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == 4


def test_a_complete_run_keeps_the_record_of_how_it_was_made(run, data, tmp_path):
    assert run(data, "--epochs", "2")[0] == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "environment.json")}
    code, text = run(data, "--epochs", "2", "--steps", "1", "--log-every", "7", "--resume", "auto")
    assert code == 0 and "the run is complete" in text
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}


def test_a_folder_that_cannot_be_written_is_named_with_its_option(run, data, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        code, text = run(data, "--output", str(place))
        assert code == FAILED and f"--output {place} is not a folder that can be written" in text
    (tmp_path / "run" / "lock").mkdir(parents=True)
    code, text = run(data)
    assert code == FAILED and f"--output {tmp_path / 'run'} cannot be written (Is a directory)" in text


@pytest.fixture
def go_on(tmp_path):
    """`go_on(then, now)`: the step and notes of a run with options `now`, of the checkpoint of one with `then`."""

    def resume(then, now, step=6, images=24):
        basic = {"arch": "resnet18", "queue_size": 8, "dim": 8, "batch_size": 8, "device": "cpu", "channels_last": "on"}
        old, new = (replace(Config(), **(basic | options)) for options in (then, now))
        ranks = Ranks(0, 1, torch.device("cpu"))
        path = tmp_path / "run" / "checkpoints" / checkpoint.name(step)
        checkpoint.save(state_of(make_trainee(old, ranks), step, old, 24, 1), path)
        if new.train.resume != "auto":
            new = replace(new, resume=str(path))
        plan = make_plan(new, images // new.train.batch_size)
        return start_or_resume(new, plan, make_trainee(new, ranks), tmp_path / "run", images, ranks)

    return resume


def test_another_batch_size_keeps_the_epoch_in_a_new_folder_and_is_refused_in_the_old_one(go_on):
    step, notes = go_on({}, {"batch_size": 4})
    assert step == 12 and "was saved after step 6, 2.00 epochs, and goes on after step 12, 2.00 epochs" in notes[-1]
    step, notes = go_on({}, {"batch_size": 4}, step=5)  # in the middle of an epoch
    assert step == 10 and "1.67 epochs" in notes[-1]
    with pytest.raises(ValueError, match=r"--batch-size 8 but this run has 4: use --batch-size 8, or"):
        go_on({}, {"batch_size": 4, "resume": "auto"})
    step, notes = go_on({}, {"resume": "auto"}, images=32)  # the data set has grown
    assert step == 6 and "6, 2.00 epochs, and goes on after step 6, 1.50 epochs" in notes[-1]
    assert not [note for note in go_on({}, {"resume": "auto"})[1] if "epoch" in note]


@pytest.mark.parametrize(("then", "now"), [("bf16", "fp16"), ("fp16", "bf16"), ("fp32", "fp16"), ("fp16", "fp16")])
def test_a_run_goes_on_in_another_precision(go_on, then, now):
    step, notes = go_on({"precision": then}, {"precision": now})
    assert step == 6
    assert (f"precision is now {now} and was {then}: the run continues" in " ".join(notes)) is (then != now)


def test_other_groups_of_the_optimiser_are_told_by_their_option(go_on):
    with pytest.raises(ValueError, match=r"trained with --no-exclude-norm-bias but this run has --exclude-norm-bias:"):
        go_on({}, {"exclude_norm_bias": True})
    with pytest.raises(ValueError, match=r"use --exclude-norm-bias, or start in another --output"):
        go_on({"exclude_norm_bias": True}, {})
    assert go_on({"optimizer": "lars"}, {"optimizer": "lars", "exclude_norm_bias": True})[0] == 6


def test_options_without_effect_are_named():
    idle = {
        "lr_schedule": "cosine", "milestones": (3,), "optimizer": "adamw", "momentum": 0.5, "has_p": 0.3,
        "crop_pair_p": 0.2, "block_size": 3, "temperature": 0.5, "knn_every": 0, "knn_k": 7, "data": "x",
        "loader": "synthetic", "workers": 2, "on_bad_image": "error", "read_ahead": 1, "beton_cache": "process",
        "val": "y",
    }  # fmt: skip
    assert idle_options(replace(Config(), **idle)) == [
        "--block-size (needs --shuffle blocks)", "DATA (needs a loader that reads files)",
        "--workers (needs a loader that reads files)", "--on-bad-image (needs a loader that reads files)",
        "--val (needs a loader that reads files)",
        "--read-ahead (needs --loader folder, beton or dali)",
        "--beton-cache (needs a .beton file that DALI does not read)",
        "--has-p (needs --hide-and-seek)", "--crop-pair-p (needs --crop-pair)",
        "--milestones (needs --lr-schedule step)", "--momentum (needs --optimizer sgd or lars)",
        "--temperature (needs --contrast-weight)", "--knn-k (needs --knn-every)",
        "--val (needs --knn-every)",
    ]  # fmt: skip
    used = {
        "lr_schedule": "step", "optimizer": "sgd", "hide_and_seek": True, "crop_pair": "easy", "shuffle": "blocks",
        "contrast_weight": 1, "knn_every": 1, "loader": "auto", "data": "x.beton",
    }  # fmt: skip
    assert idle_options(replace(Config(), **(idle | used))) == []
    by_setting = used | {"hide_and_seek": False, "crop_pair": "free"}
    by_setting["policy_set"] = ("hide_and_seek=true", "crop_iou=0.1,0.3")
    assert idle_options(replace(Config(), **(idle | by_setting))) == []


def test_settings_of_the_policy_without_effect_are_named():
    words = ("crop_iou_p=0.5", "hide_p=0.7", "blur_sigma=1,2", "hue=0.1", "grey_first=true")
    assert idle_options(replace(Config(), policy="v1", policy_set=words)) == [
        "--policy-set crop_iou_p (needs crop_iou or --crop-pair)", "--policy-set blur_sigma (needs blur_p)",
        "--policy-set hide_p (needs hide_and_seek)",
    ]  # fmt: skip
    centre = ("crop_scale=0.2,1", "crop_ratio=1,1", "brightness=0.4")
    assert idle_options(replace(Config(), policy="none", policy_set=centre)) == [
        "--policy-set crop_scale (needs another policy than none)",
        "--policy-set crop_ratio (needs another policy than none)", "--policy-set brightness (needs jitter_p)",
    ]  # fmt: skip
    assert idle_options(replace(Config(), policy="none", policy_set=("jitter_p=1",))) == [
        "--policy-set jitter_p (needs brightness or contrast or saturation or hue)"
    ]
    used = ("blur_p=0.1", "hide_and_seek=true", "crop_iou=0.1,0.3")
    assert idle_options(replace(Config(), policy_set=words + used)) == []


def test_no_recipe_sets_what_has_no_effect():
    paths = sorted(RECIPES.glob("*.yaml"))
    assert len(paths) > 9
    for path in paths:
        assert idle_options(load_recipe(str(path))) == [], path


@pytest.mark.parametrize("value", [-1, 0])
def test_milestones_are_epochs(value):
    with pytest.raises(ValueError, match=f"--milestones must be epochs from 1 on, got {value}"):
        replace(Config(), milestones=(30, value))
