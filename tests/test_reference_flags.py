"""Every flag of every script of the two reference projects: taken with its meaning, or refused with a sentence.

The tables are facts about those scripts: a flag as one would write it, and what it sets.
"""

import os

import pytest

from fastssl.config import flat
from fastssl.data_prep import static_views
from fastssl.eval import instdisc, knn, linear, stats, transfer, tsne
from fastssl.eval.options import count_processes, launch
from fastssl.flags import parse
from fastssl.launch import launch_command, split_launch_flags

PRETRAIN = {  # main_moco.py of the alignment + uniformity MoCo, main_moco_final.py of the small models
    "-a resnet18": {"arch": "resnet18"}, "--arch resnet18": {"arch": "resnet18"},
    "-j 4": {"workers": 4}, "--workers 4": {"workers": 4}, "-j 0": {"workers": 0},
    "--epochs 7": {"epochs": 7}, "--start-epoch 3": {"start_epoch": 3},
    "-b 64": {"batch_size": 64}, "--batch-size 64": {"batch_size": 64},
    "--lr 0.5": {"lr": 0.5}, "--learning-rate 0.5": {"lr": 0.5},
    "--schedule 3 5": {"milestones": (3, 5)}, "--schedule": {"milestones": ()},
    "--momentum 0.8": {"momentum": 0.8}, "--wd 0.1": {"weight_decay": 0.1}, "--weight-decay 0.1": {"weight_decay": 0.1},
    "-p 9": {"log_every": 9}, "--print-freq 9": {"log_every": 9},
    "--resume x.pth.tar": {"resume": "x.pth.tar"}, "--seed 5": {"seed": 5},
    "--moco-dim 64": {"dim": 64}, "--moco-k 4096": {"queue_size": 4096}, "--moco-m 0.99": {"ema_momentum": 0.99},
    "--moco-contr-w 0.5": {"contrast_weight": 0.5}, "--moco-contr-tau 0.2": {"temperature": 0.2},
    "--moco-align-w 2": {"align_weight": 2.0}, "--moco-align-alpha 1": {"align_alpha": 1.0},
    "--moco-unif-w 2": {"uniform_weight": 2.0}, "--moco-unif-t 2": {"uniform_t": 2.0},
    "--moco-unif-no-intra-batch": {"intra_batch": False},
    "--mlp": {"head": "simple"}, "--aug-plus": {"policy": "v2"}, "--cos": {"lr_schedule": "cosine"},
    "--resume x --restart": {"resume": "x", "restart": True}, "--ckpt-dir there": {"output": "there"},
    "--moco-t 0.2": {"temperature": 0.2, "contrast_weight": 1.0, "align_weight": 0.0, "uniform_weight": 0.0},
    **{f"--mlp {head}": {"head": head} for head in ("simple", "deep", "dropout", "wide")},
    "--mlp deep --mlp none": {"head": "linear"}, "--mlp=none -p 9": {"head": "linear", "log_every": 9},
    "--aug-has": {"hide_and_seek": True}, "--aug-has --has-p 0.3": {"hide_and_seek": True, "has_p": 0.3},
    "--cj 1.5": {"cj": 1.5, "policy": "small"}, "--cj 1 --aug-plus": {"cj": 1.0, "policy": "small"},
    "--gaussian-blur 0.3": {"gaussian_blur": 0.3}, "--grey-scale 0.3": {"grey_scale": 0.3},
}  # fmt: skip
DEFAULTS = {  # of main_moco.py; workers, printing and an unset seed are ours
    "arch": "resnet50", "epochs": 200, "start_epoch": 0, "batch_size": 128, "lr": 0.03, "milestones": (120, 160),
    "momentum": 0.9, "weight_decay": 1e-4, "dim": 128, "queue_size": 65536, "ema_momentum": 0.999,
    "contrast_weight": 0, "temperature": 0.07, "align_weight": 3, "align_alpha": 2, "uniform_weight": 1,
    "uniform_t": 3, "intra_batch": True, "head": "linear", "policy": "v1", "lr_schedule": "step",
}  # fmt: skip

ENCODER = {"-a resnet18": {"arch": "resnet18"}, "--arch resnet18": {"arch": "resnet18"}, "-b 64": {"batch_size": 64},
           "--batch-size 64": {"batch_size": 64}, "--pretrained x": {"pretrained": "x"}}  # fmt: skip
WORKERS = {"-j 4": {"workers": 4}, "--workers 4": {"workers": 4}, "-j 0": {"workers": 0}}
TRAINING = {
    **ENCODER, **WORKERS, "--epochs 7": {"epochs": 7}, "--start-epoch 3": {"start_epoch": 3}, "--lr 0.5": {"lr": 0.5},
    "--learning-rate 0.5": {"lr": 0.5}, "--schedule 3 5": {"schedule": [3, 5]}, "--schedule": {"schedule": []},
    "--momentum 0.8": {"momentum": 0.8}, "--wd 0.1": {"weight_decay": 0.1}, "--weight-decay 0.1": {"weight_decay": 0.1},
    "-p 9": {"print_freq": 9}, "--print-freq 9": {"print_freq": 9}, "--resume x": {"resume": "x"},
    "-e": {"evaluate": True}, "--evaluate": {"evaluate": True}, "--seed 5": {"seed": 5},
}  # fmt: skip
EVALUATIONS = {  # parser, flags, defaults
    "main_lincls.py": (
        linear.make_linear_parser, TRAINING,
        {"epochs": 100, "batch_size": 256, "lr": 30.0, "schedule": [60, 80], "momentum": 0.9, "weight_decay": 0.0,
         "print_freq": 50, "start_epoch": 0, "pretrained": "", "evaluate": False},
    ),
    "main_transfer.py": (
        transfer.make_transfer_parser,
        {**TRAINING, **{f"--dataset {d}": {"dataset": d} for d in ("cifar10", "cifar100", "imagenet", "caltech101")},
         "--finetune": {"finetune": True}},
        {"epochs": 100, "batch_size": 256, "lr": 30.0, "schedule": [60, 80], "momentum": 0.9, "weight_decay": 0.0,
         "print_freq": 10, "dataset": "cifar10", "finetune": False},
    ),
    "eval/instdisc.py": (
        instdisc.make_instdisc_parser,
        {**ENCODER, **WORKERS, "-s 50": {"sample_per_class": 50}, "--sample-per-class 50": {"sample_per_class": 50},
         "--topk 3": {"topk": 3}, "--mode sd-sd": {"mode": "sd-sd"}, "--mode d-sd": {"mode": "d-sd"},
         **{f"--dataset-mode {m}": {"dataset_mode": m}
            for m in ("normal", "g-mask", "rand-g-mask", "avg-mask", "rand-avg-mask", "all")}},
        {"batch_size": 128, "sample_per_class": None, "topk": 5, "mode": "d-sd", "dataset_mode": "normal"},
    ),
    "eval/stats-dist.py": (
        stats.make_stats_parser,
        {**ENCODER, **WORKERS, "-s 9": {"sample_per_class": 9}, "--sample-per-class 9": {"sample_per_class": 9}},
        {"batch_size": 128, "sample_per_class": 50},
    ),
    "eval/knn.py": (
        knn.make_knn_parser,
        {**ENCODER, "--num-workers 4": {"workers": 4}, "-k 9": {"k": 9}, "--k 9": {"k": 9},
         **{f"--rep-space {s}": {"rep_space": s} for s in ("original", "norm", "shift-norm", "shifted-norm")}},
        {"batch_size": 512, "k": 5, "rep_space": "original"},
    ),
    "experiments/tsne.py": (
        tsne.make_tsne_parser,
        {**ENCODER, **WORKERS, "--pic-name x": {"pic_name": "x"}, "--perplexity 9": {"perplexity": 9.0},
         "--paint": {"paint": True}, "--zoomin": {"zoomin": True}},
        {"batch_size": 128, "pic_name": "tsne.pdf", "perplexity": 30.0, "paint": False, "zoomin": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", PRETRAIN)
def test_pretraining(line):
    config = flat(parse(["DIR", *line.split()]))
    assert {k: config[k] for k in PRETRAIN[line]} == PRETRAIN[line] and config["data"] == "DIR"
    assert {k: v for k, v in config.items() if k not in {*PRETRAIN[line], "data"}} == {
        k: v for k, v in flat(parse([])).items() if k not in {*PRETRAIN[line], "data"}
    }


def test_pretraining_defaults():
    config = flat(parse(["DIR"]))
    assert {k: config[k] for k in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("script, line", [(s, line) for s, (_, flags, _) in EVALUATIONS.items() for line in flags])
def test_evaluations(script, line):
    make, flags, _ = EVALUATIONS[script]
    options, plain = (vars(make().parse_args(["DIR", *words])) for words in (line.split(), []))
    assert options == {**plain, **flags[line], "data": "DIR"}


@pytest.mark.parametrize("script", EVALUATIONS)
def test_evaluation_defaults(script):
    make, _, defaults = EVALUATIONS[script]
    options = vars(make().parse_args(["DIR"]))
    assert {k: options[k] for k in defaults} == defaults


def test_static_views(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(static_views, "make_static_views", lambda *arguments: asked.append(arguments) or [])
    for aug in ("moco", "nointer", "super-hard", "hard", "easy"):
        static_views.main([str(tmp_path), str(tmp_path), "--aug", aug, "--images-per-class", "7"])
        assert asked.pop()[2:4] == (aug, 7)
    static_views.main([str(tmp_path), str(tmp_path)])
    assert asked.pop()[2:4] == ("moco", 50)


@pytest.mark.parametrize("module", ["train", "eval.linear", "eval.knn"])
def test_flags_that_start_processes_are_taken_out(module, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = "DIR --world-size 1 --rank 0 --dist-url tcp://localhost:10001 --dist-backend nccl --gpu 0 -b 8"
    assert launch(line.split(), f"fastssl.{module}", counts_gpus=False) == ["DIR", "-b", "8"]
    with pytest.raises(SystemExit):  # argparse says what there is
        split_launch_flags(["DIR", "--dist-backend", "mpi"])


def test_nodes_are_read_from_the_environment_with_env(monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    flags = ["DIR", "--multiprocessing-distributed", "-b", "8"]
    command = " ".join(launch_command([*flags, "--dist-url", "env://"], "fastssl.train", 128))
    assert "--nnodes 3 --node_rank 1 --master_addr 10.0.0.7 --master_port 1234" in command
    assert command.endswith("fastssl.train DIR -b 24")  # theirs is of one node
    one = [*flags, "--dist-url", "env://", "--world-size", "1", "--rank", "0", "--gpus", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert "--standalone" in launch_command(one, "fastssl.train")


@pytest.mark.parametrize("spelt", ["-b 8", "-b8", "-b=8", "--batch-size 8", "--batch-size=8"])
def test_the_batch_of_a_node_however_it_is_spelt(spelt):
    line = f"DIR --multiprocessing-distributed --world-size 3 --rank 2 --dist-url tcp://h:1 {spelt}"
    command = launch_command(line.split(), "fastssl.train", 128)
    assert parse(command[command.index("DIR") :]).train.batch_size == 24


NODES = "DIR --multiprocessing-distributed --world-size 3 --rank 2 --dist-url tcp://h:1 --gpus 0 1 2 3"


@pytest.mark.parametrize(
    ("more", "images", "threads"),
    [
        ("-j 30", 3 * 128, 8),  # 128 on each node; its threads are shared out, rounded up
        ("--config resnet18 --workers=32", 512, 8),  # a recipe's batch is of all
        ("--config=resnet18", 512, None),
        ("--config resnet18 -b 64", 192, None),
    ],
)
def test_a_node_has_its_batch_and_its_threads(more, images, threads, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    command = launch_command([*NODES.split(), *more.split()], "fastssl.train", 128)
    config = parse(command[command.index("fastssl.train") + 1 :])
    assert (config.train.batch_size, config.input.workers, config.data) == (images, threads, "DIR")


@pytest.mark.parametrize(("evaluation", "images"), [(linear, 512), (transfer, 512), (knn, 512), (stats, 128)])
def test_whose_batch_an_evaluation_means(evaluation, images, monkeypatch):
    """main_lincls.py and main_transfer.py train on a node's batch; the others' fits into a process."""
    monkeypatch.setattr("os.execv", lambda _, command: pytest.fail(" ".join(command)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    line = "DIR --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://h:1"
    with pytest.raises(pytest.fail.Exception) as started:
        evaluation.main(line.split())
    trains = evaluation in (linear, transfer)
    assert (f"-b {images}" in str(started.value)) == trains


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--multiprocessing-distributed --world-size 2 --rank 2", "must be a node's number, below --world-size 2"),
        ("--multiprocessing-distributed --world-size 0 --rank 0", "must be a node's number, below --world-size 0"),
        ("--world-size 2 --rank 1 --dist-url tcp://h:1", "--world-size 2 counts nodes, .* with --multiprocessing-dis"),
        ("--gpu -1", "GPUs are counted from 0, got -1"),  # CUDA_VISIBLE_DEVICES=-1 would hide them all
    ],
)
def test_a_node_or_a_gpu_there_cannot_be(line, said, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=said):
        launch_command(["DIR", *line.split()], "fastssl.train")


def test_one_process_is_this_one_and_no_stale_variable_counts(monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "RANK": "1", "CUDA_VISIBLE_DEVICES": "4,7"}.items():
        monkeypatch.setenv(name, value)
    line = "DIR --multiprocessing-distributed --world-size 1 --rank 0 --gpu 1"
    assert launch(line.split(), "fastssl.eval.linear") == ["DIR"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7" and "WORLD_SIZE" not in os.environ and "RANK" not in os.environ
    with pytest.raises(ValueError, match="--gpu 2 does not exist: CUDA_VISIBLE_DEVICES=7 leaves 1 GPU,"):
        launch(["DIR", "--gpu", "2"], "fastssl.eval.linear")


def test_how_many_processes_g_means(monkeypatch):
    monkeypatch.setattr("fastssl.eval.options.usable_cores", lambda: 4)
    for have, device, expected in ((8, "auto", 8), (0, "auto", 4), (8, "cpu", 4)):
        monkeypatch.setattr("torch.cuda.device_count", lambda have=have: have)
        assert count_processes(8, device) == expected
    for have, device in ((2, "auto"), (0, "cuda")):
        monkeypatch.setattr("torch.cuda.device_count", lambda have=have: have)
        with pytest.raises(ValueError, match=f"-g 8 asks for 8 GPUs, but this machine has {have}"):
            count_processes(8, device)


@pytest.mark.parametrize("cores", [1, 2])
def test_the_folder_may_stand_behind_two_dashes(cores, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("fastssl.eval.options.usable_cores", lambda: cores)
    monkeypatch.setattr("fastssl.launch.show_gpus", lambda gpus: None)
    started = []
    monkeypatch.setattr("os.execv", lambda _, command: started.extend(command))
    words = launch(["-g", "2", "-k", "3", "--", "-DIR"], "fastssl.eval.knn", counts_gpus=True)
    assert bool(started) == (cores == 2)
    options = knn.make_knn_parser().parse_args(started[started.index("-m", 3) + 2 :] if started else words)
    assert (options.data, options.k, options.device) == ("-DIR", 3, "auto")


def test_help_names_the_flag_that_readme_shows(capsys):
    with pytest.raises(SystemExit):
        knn.main(["--help"])
    assert "-g N (or --gpus N)" in capsys.readouterr().out
