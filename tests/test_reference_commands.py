"""Every command line of the two reference projects' READMEs runs once its script's name is replaced.

The lines stand here as they stand there, line breaks aside. Places become small ones, and what would take days is made
shorter by flags that follow.
"""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from old_checkpoints import make_moco, make_seed
from PIL import Image
from ranks import run_ranks

from fastssl import checkpoint
from fastssl.cli import main as fastssl
from fastssl.data_prep.class_list import IMAGENET100
from fastssl.launch import launch_command
from fastssl.machine.limits import usable_cores

ROOT = Path(__file__).parents[1]
SCRIPTS = {  # what stands in place of a script's name
    "main_moco.py": "-m fastssl pretrain",
    "main_moco_final.py": "-m fastssl pretrain",
    "main_lincls.py": "-m fastssl eval linear",
    "main_transfer.py": "-m fastssl eval transfer",
    "scripts/create_imagenet_subset.py": "-m fastssl prep subset",
    "-m experiments.sample-augs": "-m fastssl prep views",
    "-m eval.instdisc": "-m fastssl.eval.instdisc",
    "-m eval.stats-dist": "-m fastssl eval stats-dist",
    "-m eval.knn": "-m fastssl.eval.knn",
}
SHORT = "--epochs 1 --image-size 32 --device cpu"
SHORT_RUN = f"{SHORT} --steps 2 --batch-size 8 --knn-every 0 --log-every 1 --channels-last"

# the alignment + uniformity MoCo
SUBSET = "python scripts/create_imagenet_subset.py [PATH_TO_EXISTING_IMAGENET] [PATH_TO_CREATE_SUBSET]"
PRETRAIN = (
    "python main_moco.py -a resnet50 --lr 0.03 --batch-size 128 --gpus 0 1 2 3 --multiprocessing-distributed "
    "--world-size 1 --rank 0 [PATH_TO_DATASET]"
)
LINEAR = (
    "python main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained [PATH_TO_CHECKPOINT] "
    "--multiprocessing-distributed --world-size 1 --rank 0 [PATH_TO_DATASET]"
)
LOSSES = [  # flags that its text names, for the line PRETRAIN
    "--moco-align-w 3 --moco-align-alpha 2 --moco-unif-w 1 --moco-unif-t 3 --moco-contr-w 0 --moco-contr-tau 0.07",
    "--aug-plus --mlp --cos --moco-unif-no-intra-batch",
]

# the small models; the linear evaluation is MoCo's own line
FINAL = (
    "python main_moco_final.py <path/to/imagenet/folder> -a <arch-name> --lr 0.06 --batch-size 512 -j 64 --epochs 800 "
    "--dist-url 'env://' --multiprocessing-distributed --world-size 1 --rank 0 --mlp wide --moco-t 0.1 --moco-k 65536 "
    "--aug-plus --cj 1. --grey-scale 0.5 --gaussian-blur 0.5 --cos --ckpt-dir <path/to/checkpointing/folder> "
    "--resume <path/to/SEED-distilled/checkpoint> --restart"
)
VIEWS = (
    "python -m experiments.sample-augs <path/to/imagenet/train-or-val/folder> <path/to/target/folder> --aug=moco "
    "--images-per-class=50"
)
INSTDISC = (
    "python -m eval.instdisc <path/to/static/dataset> -a <model-arch> -b <batch-size> -j <job-numbers> "
    "--pretrained <path/to/pretrained/model> -s <samples-per-class> --gpu <gpu-number> --topk <topk-accuracy> "
    "--mode <d-sd>"
)
STATS = (
    "python -m eval.stats-dist <path/to/static/dataset> -a <model-arch> -b <batch-size> -j <job-number> "
    "--pretrained <path/to/pretrained/model> -s <samples-per-class> --gpu <gpu-number>"
)
KNN = (
    "python -m eval.knn <path/to/imagenet/folder> -a <model-arch> -b <batch-size> -k <max-kNN> -g <number-of-gpus> "
    "--pretrained <path/to/pretrained/model> --rep-space <rep-space-type>"
)
MOCO_LINEAR = (
    "python main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 "
    "--pretrained [your checkpoint path]/checkpoint_0199.pth.tar --dist-url 'tcp://localhost:10001' "
    "--multiprocessing-distributed --world-size 1 --rank 0 [your imagenet-folder with train and val folders]"
)
TRANSFER = (
    "python main_transfer.py <path/to/imagenet/folder> -a <model-arch> --lr <learning-rate> --batch-size <batch-size> "
    "--pretrained <path/to/pretrained/model> --dist-url 'tcp://localhost:10001' --multiprocessing-distributed "
    "--world-size 1 --rank 0 --dataset <dataset-name>"
)


def words_of(line: str, places: dict[str, object], more: str = "") -> list[str]:
    """The line after `python`, our name in the script's place, a path or number in that of each <...> or [...]."""
    script = next(s for s in SCRIPTS if f" {s} " in line)
    line = line.removeprefix("python ").replace(script, SCRIPTS[script])
    for name, place in places.items():
        line = re.sub(r"[\[<]" + re.escape(name) + r"[\]>]", lambda _, place=place: shlex.quote(str(place)), line)
    assert not re.search(r"[\[<]", line), line
    return shlex.split(f"{line} {more}")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run(line, places, more)` -> (stdout, stderr); the exit code is 0. In an empty folder.

    In this process, unless the line asks for several: then, but for k-NN, by the interpreter, as a person would, and
    where that is permitted on a host whose name has no address, as in some containers: torchrun would look it up for
    five minutes.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def run_line(line, places, more=""):
        words = words_of(line, places, more)
        if "-g 2" in " ".join(words):
            code, (out, err) = on_ranks(words[1:], monkeypatch), capsys.readouterr()
        elif launch_command(words, "fastssl"):
            command, environment = [*nameless(), sys.executable, *words], os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, (out, err) = in_this_process(words[1:], monkeypatch), capsys.readouterr()
        assert code == 0, err
        return out, err

    yield run_line
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def nameless() -> list[str]:
    """What runs a command on a host whose name has no address; nothing where that is not permitted."""
    command = ["unshare", "--uts", "bash", "-c", 'hostname no-such-host.invalid && exec "$@"', "bash"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return command


def in_this_process(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `python -m` and these words."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.delitem(sys.modules, words[0], raising=False)  # runpy warns of a module that is there already
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return stop.value.code or 0


def on_ranks(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The same where it becomes torchrun, whose processes are forked here: one line of torchrun itself is enough."""
    launched = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "execv", lambda program, command: sys.exit(launched.append(command)))
        code = in_this_process(words, patch)
    for command in launched:  # not on a single core
        run_ranks(as_rank, 2, command[command.index("-m", 2) + 1 :])
    return code


def as_rank(rank: int, world_size: int, words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert in_this_process(words, patch) == 0


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """train/ and val/ (test/ is a link) of two classes with WordNet names."""
    root, random = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for c in range(2):
            (root / split / f"n0144076{c}").mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (40, 50, 3), dtype=np.uint8) + np.uint8(100 * c)
                Image.fromarray(pixels).save(root / split / f"n0144076{c}" / f"n0144076{c}_{i}.JPEG")
    (root / "test").symlink_to("val")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of the small-model project."""
    path = tmp_path_factory.mktemp("small") / "mob-s_800.pth.tar"
    torch.save(make_moco("mobilenetv3_small", head="wide")[0], path)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """A checkpoint of the alignment + uniformity MoCo, of a smaller network than its lines name."""
    path = tmp_path_factory.mktemp("resnet") / "checkpoint_0199.pth.tar"
    torch.save(make_moco("resnet18", head="simple", scalar_label=True)[0], path)
    return path


@pytest.fixture(scope="module")
def full_imagenet(tmp_path_factory) -> Path:
    """All class folders of ImageNet-100 and one more, each with a file."""
    root = tmp_path_factory.mktemp("full")
    for split in ("train", "val"):
        for name in [*IMAGENET100.read_text().split(), "n01440764"]:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "x.JPEG").touch()
    return root


def test_the_subset_script(run, full_imagenet, tmp_path):
    places = {"PATH_TO_EXISTING_IMAGENET": full_imagenet, "PATH_TO_CREATE_SUBSET": tmp_path / "in100"}
    run(SUBSET, places)
    for split in ("train", "val"):
        assert {p.name for p in (tmp_path / "in100" / split).iterdir()} == set(IMAGENET100.read_text().split())
        assert next((tmp_path / "in100" / split).iterdir()).joinpath("x.JPEG").is_file()
    (tmp_path / "classes.txt").write_text("n01440764\n")
    run(SUBSET + " --subset [PATH_TO_CLASS_SUBSET_FILE]", places | {"PATH_TO_CLASS_SUBSET_FILE": "classes.txt"}, "-f")
    assert [p.name for p in (tmp_path / "in100" / "val").iterdir()] == ["n01440764"]


def test_pretraining_on_several_processes(run, imagenet, tmp_path):
    """Two instead of four; that a line with four asks for four is checked with the flags."""
    more = f"{SHORT_RUN} --gpus 0 1 -a mobilenetv3_small --moco-k 64 --output run"
    out, err = run(PRETRAIN, {"PATH_TO_DATASET": imagenet}, more)
    assert "torchrun --nproc_per_node 2" in err and "2 x cpu" in out + err and "loss" in out + err
    assert max(checkpoint.saved_steps(tmp_path / "run" / "checkpoints")) == 2


@pytest.mark.parametrize("flags", LOSSES)
def test_pretraining_with_other_losses(run, imagenet, tmp_path, flags):
    more = f"{flags} {SHORT_RUN} -a resnet18 --gpus 0 --output run"
    run(PRETRAIN, {"PATH_TO_DATASET": imagenet}, more)
    config = checkpoint.load(next(iter(checkpoint.saved_steps(tmp_path / "run" / "checkpoints").values())))["config"]
    plain = "--moco-align-w" in flags
    assert (config["policy"], config["head"]) == (("v1", "linear") if plain else ("v2", "simple"))
    assert (config["align_weight"], config["align_alpha"], config["uniform_weight"]) == (3, 2, 1)
    assert (config["uniform_t"], config["intra_batch"], config["queue_size"]) == (3, plain, 65536)
    assert (config["lr_schedule"], config["lr"], config["arch"]) == ("step" if plain else "cosine", 0.03, "resnet18")


@pytest.mark.parametrize("line", [LINEAR, MOCO_LINEAR])
def test_linear_evaluation(run, imagenet, resnet, tmp_path, line):
    places = {
        "PATH_TO_CHECKPOINT": resnet, "PATH_TO_DATASET": imagenet, "your checkpoint path": resnet.parent,
        "your imagenet-folder with train and val folders": imagenet,
    }  # fmt: skip
    out, _ = run(line, places, f"{SHORT} -a resnet18 --output out")
    assert f"=> loaded pre-trained model '{resnet}'" in out and "=> sanity check passed." in out
    assert re.search(r"^ \* Acc1 \d+\.\d{3} Acc5 100\.000$", out, re.MULTILINE)
    assert (tmp_path / "out" / "model_best.pth.tar").is_file()


def test_a_distilled_student_is_converted_and_trained(run, imagenet, tmp_path):
    torch.save(make_seed("mobilenetv3_small")[0], "seed-student.pth.tar")
    assert fastssl(["convert", "seed", "seed-student.pth.tar", "-a", "mobilenetv3_small"]) == 0
    places = {
        "path/to/imagenet/folder": imagenet, "arch-name": "mobilenetv3_small",
        "path/to/checkpointing/folder": tmp_path / "checkpoints",
        "path/to/SEED-distilled/checkpoint": "converted_seed-student.pth.tar",
    }  # fmt: skip
    _, err = run(FINAL, places, SHORT_RUN)
    assert "starting from the weights of converted_seed-student.pth.tar" in err
    saved = checkpoint.load(next(iter(checkpoint.saved_steps(tmp_path / "checkpoints" / "checkpoints").values())))
    expected = {
        "lr": 0.06, "workers": 64, "head": "wide", "temperature": 0.1, "contrast_weight": 1, "align_weight": 0,
        "uniform_weight": 0, "queue_size": 65536, "policy": "small", "cj": 1, "grey_scale": 0.5, "gaussian_blur": 0.5,
        "lr_schedule": "cosine", "restart": True,
    }  # fmt: skip
    assert {k: saved["config"][k] for k in expected} == expected


@pytest.fixture
def static_set(run, imagenet, tmp_path) -> Path:
    """What the project's line for static views makes of the validation images."""
    places = {
        "path/to/imagenet/train-or-val/folder": imagenet / "val", "path/to/target/folder": tmp_path / "auged-imagenet",
    }  # fmt: skip
    out, _ = run(VIEWS, places, "--workers 1")
    assert "8 images with 2 views" in out
    names = {p.name for p in (tmp_path / "auged-imagenet" / "n01440761").iterdir()}
    assert names == {f"n01440761_{i}-{v}.jpeg" for i in range(4) for v in range(3)}
    return tmp_path / "auged-imagenet"


def test_static_views_and_what_is_measured_on_them(run, static_set, small):
    places = {
        "path/to/static/dataset": static_set, "model-arch": "mobilenetv3_small", "batch-size": 8, "job-numbers": 1,
        "job-number": 1, "path/to/pretrained/model": small, "samples-per-class": 4, "gpu-number": 0,
        "topk-accuracy": 5,
    }  # fmt: skip
    for mode in ("d-sd", "sd-sd"):
        out, _ = run(INSTDISC, places | {"d-sd": mode}, "--device cpu")
        assert "=> creating model 'mobilenetv3_small'" in out and "=> iterating through the representations..." in out
        found = re.search(r"^Masked: normal; Mode: (.*); Top1-5: \[(.*)\]; CKPT: (.*); Dataset: (.*)$", out, re.M)
        assert (found[1], found[3], found[4]) == (mode, str(small), str(static_set))
        assert len(found[2].split(", ")) == 5 and all(0 <= float(a) <= 100 for a in found[2].split(", "))
    out, _ = run(STATS, places, "--device cpu")
    at = out.splitlines().index(f"{small},{static_set}")
    header, values = out.splitlines()[at + 1 : at + 3]
    assert header == "D-SD align     SD-SD align    D cls-align    SD cls-align   D uniform      SD uniform     "
    assert [re.fullmatch(r"-?\d\.\d{4} *", values[i : i + 15]) is not None for i in range(0, 90, 15)] == [True] * 6


@pytest.mark.parametrize("rep_space, gpus", [("original", 1), ("norm", 2), ("shifted-norm", 1)])
def test_best_nn(run, imagenet, small, rep_space, gpus):
    places = {
        "path/to/imagenet/folder": imagenet, "model-arch": "mobilenetv3_small", "batch-size": 8, "max-kNN": 3,
        "number-of-gpus": gpus, "path/to/pretrained/model": small, "rep-space-type": rep_space,
    }  # fmt: skip
    out, err = run(KNN, places, "--image-size 32 --device cpu")
    said = out if gpus == 1 else out + err  # ranks say it in their log
    assert re.search(r"^best-NN=\d+\.\d\d%, k=[13]\.$", said, re.M)
    assert ("torchrun --nproc_per_node 2" in err) == (gpus == 2 and usable_cores() > 1)


@pytest.mark.parametrize(
    "dataset, finetune",
    [("cifar10", ""), ("cifar100", ""), ("caltech101", ""), ("cifar10", " --finetune"), ("caltech101", " --finetune")],
)
def test_transfer(run, imagenet, small, dataset, finetune):
    places = {
        "path/to/imagenet/folder": imagenet, "model-arch": "mobilenetv3_small", "learning-rate": 0.1, "batch-size": 8,
        "path/to/pretrained/model": small, "dataset-name": dataset,
    }  # fmt: skip
    out, _ = run(TRANSFER + finetune, places, f"{SHORT} --output out")
    assert re.search(r"^ \* Acc@1 \d+\.\d{3} Acc@5 100\.000$", out, re.M)
    assert ("=> sanity check passed." in out) == (not finetune)


@pytest.mark.parametrize("wrapper", ["module.", ""])  # on one --gpu the small-model project's model has none
def test_a_classifier_that_main_lincls_saved(run, imagenet, resnet, tmp_path, wrapper):
    """Its own checkpoint, with the accuracy as a tensor, is validated and trained on."""
    weights = {k: v for k, v in torch.load(resnet, weights_only=True)["state_dict"].items() if "encoder_q" in k}
    state = {k.replace("module.encoder_q.", wrapper): v for k, v in weights.items() if ".fc." not in k}
    fc = torch.nn.Linear(512, 2)
    state |= {f"{wrapper}fc.{k}": v for k, v in fc.state_dict().items()}
    optimizer = torch.optim.SGD(fc.parameters(), 30.0, momentum=0.9, weight_decay=0.0)
    saved = {"epoch": 1, "arch": "resnet18", "state_dict": state, "best_acc1": torch.tensor([100.0]), "acc1": 50.0,
             "acc5": 100.0, "optimizer": optimizer.state_dict()}  # fmt: skip
    torch.save(saved, "lincls.pth.tar")
    places = {"PATH_TO_CHECKPOINT": resnet, "PATH_TO_DATASET": imagenet}
    out, _ = run(LINEAR, places, f"{SHORT} -a resnet18 --resume lincls.pth.tar --evaluate")
    assert re.search(r"^ \* Acc1 \d+\.\d{3} Acc5 100\.000$", out, re.M) and not (tmp_path / "out").exists()
    out, _ = run(LINEAR, places, f"{SHORT} -a resnet18 --epochs 2 --resume lincls.pth.tar --output out")
    assert "Epoch: [1][0/1]" in out and "New best" not in out
    assert torch.load("out/checkpoint_0001.pth.tar", weights_only=True)["best_acc1"] == 100
