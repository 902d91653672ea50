"""--resume with a checkpoint of MoCo's scripts: the run goes on with all of its state."""

import re

import pytest
import torch
from old_checkpoints import OldMoCo, make_moco
from torch.nn.functional import normalize

from fastssl import checkpoint, train
from fastssl.build import make_trainee
from fastssl.checkpoint import CheckpointError
from fastssl.command import FAILED, run_command
from fastssl.commands import convert
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.flags import parse
from fastssl.plan import make_plan
from fastssl.resume import start_or_resume

RANKS = Ranks(0, 1, torch.device("cpu"))


def save_old_run(path, arch, legacy=False):
    """(model, optimizer) after two steps by main_moco.py's optimiser, saved as it does after epoch 2."""
    torch.manual_seed(0)
    old = torch.nn.ModuleDict({"module": OldMoCo(arch)})
    old.module.queue.copy_(normalize(torch.randn(128, 64), dim=0))
    old.module.queue_ptr.fill_(24)
    for name, p in old.module.named_parameters():  # as the small-model project freezes it
        p.requires_grad_(p.requires_grad and "to_patch_embedding" not in name)
    optimizer = torch.optim.SGD(old.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        for p in old.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    state = {"epoch": 2, "arch": arch, "state_dict": old.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return old.module, optimizer


def resume(path, arch, **options):
    """(trainee, step, notes) of a run that goes on from `path`."""
    options = {"head": "simple", "queue_size": 64, **options}
    config = replace(Config(), arch=arch, device="cpu", batch_size=8, channels_last="on", resume=str(path), **options)
    trainee = make_trainee(config, RANKS)
    step, notes = start_or_resume(config, make_plan(config, 3), trainee, path.parent, 24, RANKS)
    return trainee, step, notes


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small", "vit_tiny"])
def test_all_of_a_run_is_taken_over(tmp_path, arch):
    old, optimizer = save_old_run(tmp_path / "checkpoint_0001.pth.tar", arch, legacy=arch == "resnet18")
    trainee, step, notes = resume(tmp_path / "checkpoint_0001.pth.tar", arch)
    moco = trainee.moco
    assert step == 6 and "after 2 epochs" in notes[1]
    size = (2, 3, 224, 224) if arch == "vit_tiny" else (2, 3, 32, 32)
    for theirs, ours in ((old.encoder_q, moco.encoder_q), (old.encoder_k, moco.encoder_k)):
        with torch.no_grad():
            images = torch.randn(size)
            expected = theirs.eval()(images)
            assert (ours.eval()(images) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.equal(moco.queue, old.queue.T) and moco.queue_ptr.item() == 24

    def by_name(encoder, state):
        named = {n: state[p]["momentum_buffer"] for n, p in encoder.named_parameters() if p.requires_grad}
        return {re.sub("^head[.]", "fc.", n).removeprefix("backbone."): v for n, v in named.items()}

    theirs, ours = by_name(old.encoder_q, optimizer.state), by_name(moco.encoder_q, trainee.optimizer.state)
    assert set(theirs) == set(ours) and all(torch.equal(theirs[n], ours[n]) for n in ours)


def test_a_run_that_is_converted_there_and_back_is_the_same(tmp_path, image_folder):
    line = f"{image_folder} -a resnet18 --mlp --moco-k 64 -b 8 --image-size 32 --device cpu --knn-every 0 --epochs 1 "
    line += "--channels-last on"
    assert train.main(f"{line} --output {tmp_path / 'run'}".split()) == 0
    assert convert.main(["moco", str(tmp_path / "run"), str(tmp_path / "old.pth.tar")]) == 0
    (saved,) = checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values()
    steps = checkpoint.load(saved)["step"]
    trainees = [resume(path, "resnet18")[0] for path in (saved, tmp_path / "old.pth.tar")]
    first, again = (t.moco.state_dict() for t in trainees)
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    first, again = (t.optimizer.state_dict()["state"] for t in trainees)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[i]["momentum_buffer"], again[i]["momentum_buffer"]) for i in first)
    more = f"{line} --epochs 2 --resume {tmp_path / 'old.pth.tar'} --output {tmp_path / 'more'}"
    assert train.main(more.split()) == 0
    assert list(checkpoint.saved_steps(tmp_path / "more" / "checkpoints")) == [2 * steps]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "wide"}, "was trained with --head simple but this run has wide: use --head simple"),
        ({"queue_size": 128}, "was trained with --queue-size 64 but this run has 128"),
        ({"dim": 64}, "was trained with --dim 128 but this run has 64"),
        ({"optimizer": "adamw"}, "was trained with --optimizer sgd but this run has adamw"),
        ({"exclude_norm_bias": True}, "this run has --exclude-norm-bias: use --no-exclude-norm-bias"),
        ({"arch": "resnet50"}, "does not fit resnet50"),
    ],
)
def test_another_model_is_refused(tmp_path, options, said):
    save_old_run(tmp_path / "x.pth.tar", "resnet18")
    with pytest.raises(CheckpointError, match=said):
        resume(tmp_path / "x.pth.tar", **{"arch": "resnet18", **options})


def test_what_is_no_whole_run_is_named_as_before(tmp_path, capsys, image_folder):
    saved, _, _ = make_moco("resnet18")  # whose optimiser state is of one parameter
    torch.save(saved, tmp_path / "other.pth.tar")
    with pytest.raises(CheckpointError, match="holds no SGD state of resnet18: --restart starts from its weights"):
        resume(tmp_path / "other.pth.tar", "resnet18")
    del saved["optimizer"]
    torch.save(saved, tmp_path / "weights.pth.tar")
    line = f"{image_folder} -a resnet18 --mlp --moco-k 64 -b 8 --image-size 32 --device cpu --channels-last on "
    line += f"--output {tmp_path / 'run'} --resume {tmp_path / 'weights.pth.tar'}"
    assert run_command(lambda argv: train.pretrain(parse(argv)), line.split()) == FAILED
    assert "is not a fastssl checkpoint" in capsys.readouterr().err
