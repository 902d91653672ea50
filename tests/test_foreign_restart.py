"""--resume X --restart: weights of any checkpoint, everything else fresh."""

import pytest
import torch
from old_checkpoints import make_moco, make_seed

from fastssl import train
from fastssl.build import make_trainee
from fastssl.checkpoint import CheckpointError
from fastssl.command import FAILED, run_command
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.flags import parse
from fastssl.plan import make_plan
from fastssl.resume import start_or_resume

RANKS = Ranks(0, 1, torch.device("cpu"))


def start(tmp_path, saved, **options):
    """(trainee, step, notes) of a run that starts from `saved`."""
    torch.save(saved, tmp_path / "x.pth.tar")
    options = {"arch": "resnet18", "head": "wide", "queue_size": 64, "resume": str(tmp_path / "x.pth.tar"), **options}
    config = replace(Config(), device="cpu", batch_size=8, restart=True, channels_last="on", **options)
    trainee = make_trainee(config, RANKS)
    step, notes = start_or_resume(config, make_plan(config, 3), trainee, tmp_path, 24, RANKS)
    return trainee, step, notes


def test_a_seed_student_starts_a_run_with_another_head(tmp_path):
    saved, tensors, _ = make_seed("resnet18")
    trainee, step, notes = start(tmp_path, saved)
    config = replace(Config(), arch="resnet18", head="wide", queue_size=64, device="cpu", channels_last="on")
    fresh = make_trainee(config, RANKS).moco
    moco = trainee.moco
    assert step == 0 and not trainee.optimizer.state
    assert all(torch.equal(v, tensors[k]) for k, v in moco.encoder_q.backbone.state_dict().items())
    # the student's head is simple: of a wide one only the last bias has the same shape
    head, student = moco.encoder_q.head.state_dict(), saved["state_dict"]
    assert torch.equal(head["2.bias"], student["module.student.fc.2.bias"])
    assert all(torch.equal(head[k], fresh.encoder_q.head.state_dict()[k]) for k in ("0.weight", "0.bias", "2.weight"))
    key = moco.encoder_k.state_dict()
    assert all(torch.equal(v, key[k]) for k, v in moco.encoder_q.state_dict().items())
    assert torch.equal(moco.queue, fresh.queue) and moco.queue_ptr.item() == 0
    text = "\n".join(notes)
    assert text.startswith("starting from the weights of") and "SEED checkpoint, the student" in text
    assert "head: loaded 2.bias" in text and "head: kept random weights for 0.weight, 0.bias, 2.weight (names" in text
    assert "left out the teacher" in text and "left out the queue" in text


def test_a_moco_checkpoint_gives_its_head_too_but_not_its_queue(tmp_path):
    saved, _, _ = make_moco("resnet18", head="wide")
    trainee, step, notes = start(tmp_path, saved)
    assert step == 0
    for name, value in trainee.moco.encoder_q.head.state_dict().items():
        assert torch.equal(value, saved["state_dict"][f"module.encoder_q.fc.{name}"])
    assert trainee.moco.queue_ptr.item() == 0 and not any("afresh" in note for note in notes)


def test_a_backbone_that_does_not_fit_is_refused(tmp_path):
    saved, _, _ = make_moco("resnet18", head="wide")
    with pytest.raises(CheckpointError, match=r"does not fit resnet34: .*; it fits resnet18"):
        start(tmp_path, saved, arch="resnet34")


def test_restart_wants_a_path():
    for options in ({}, {"resume": "auto"}, {"resume": "x.pt", "start_epoch": 3}):
        with pytest.raises(ValueError, match=r"--restart (needs --resume PATH: name the|begins at epoch 0: remove)"):
            replace(Config(), restart=True, **options)
    assert parse(["data", "--resume", "x.pt", "--restart"]).train.restart


def test_the_small_model_projects_command_runs_and_without_restart_says_so(tmp_path, image_folder, capsys):
    saved, _, _ = make_seed("mobilenetv3_small")
    torch.save(saved, tmp_path / "converted.pth.tar")
    command = (
        f"{image_folder} -a mobilenetv3_small --lr 0.06 --batch-size 8 -j 1 --epochs 1 --mlp wide --moco-t 0.1 "
        f"--moco-k 64 --aug-plus --cj 1. --grey-scale 0.5 --gaussian-blur 0.5 --cos --ckpt-dir {tmp_path / 'run'} "
        f"--resume {tmp_path / 'converted.pth.tar'} --image-size 32 --device cpu --knn-every 0 --steps 1 "
        "--channels-last"
    ).split()
    assert run_command(train.main, command) == FAILED
    assert "add --restart to start from its weights alone" in capsys.readouterr().err
    assert run_command(train.main, [*command, "--restart"]) == 0
    assert "starting from the weights of" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step_000000001.pt").exists()
