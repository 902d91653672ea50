"""The command line: defaults, recipes, flags, and the reference projects' own spelling of them."""

import dataclasses
import re

import pytest
import yaml

from fastssl.build import open_policy
from fastssl.config import Config, flat, replace
from fastssl.flags import parse
from fastssl.launch import launch_command, split_launch_flags
from fastssl.losses import LossConfig
from fastssl.recipe import RECIPES, load_recipe, option_types, to_yaml
from fastssl.train import pretrain


def test_option_names_are_unique_over_the_sections():
    sections = [getattr(Config(), f.name) for f in dataclasses.fields(Config) if f.name != "data"]
    assert len(flat(Config())) == 1 + sum(len(dataclasses.fields(section)) for section in sections)


def test_defaults_are_those_of_the_alignment_uniformity_paper_code():
    c = Config()
    assert (c.model.arch, c.model.dim, c.model.head) == ("resnet50", 128, "linear")
    assert (c.moco.queue_size, c.moco.ema_momentum) == (65536, 0.999)
    assert (c.optim.lr, c.optim.momentum, c.optim.weight_decay, c.optim.milestones) == (0.03, 0.9, 1e-4, (120, 160))
    assert c.loss == LossConfig(0.0, 0.07, 3.0, 2.0, 1.0, 3.0, True)


def test_reference_command_line_of_align_uniform_means_the_same():
    line = (
        "DATA -a resnet18 --lr 0.06 -b 128 --moco-k 4096 --moco-m 0.99 --moco-dim 64 --moco-align-w 2 "
        "--moco-align-alpha 1 --moco-unif-w 0.5 --moco-unif-t 2 --moco-contr-w 0.1 --moco-contr-tau 0.2 "
        "--moco-unif-no-intra-batch --mlp --aug-plus --cos --wd 5e-4 -j 3 -p 7 --schedule 10 20 --epochs 30 --seed 4"
    )
    c = parse(line.split())
    assert c.loss == LossConfig(0.1, 0.2, 2.0, 1.0, 0.5, 2.0, False)
    assert (c.model.arch, c.model.head, c.model.dim) == ("resnet18", "simple", 64)
    assert (c.moco.queue_size, c.moco.ema_momentum) == (4096, 0.99)
    assert (c.augment.policy, c.optim.lr_schedule, c.optim.milestones) == ("v2", "cosine", (10, 20))
    assert (c.optim.lr, c.optim.weight_decay) == (0.06, 5e-4)
    assert (c.train.batch_size, c.train.log_every, c.train.epochs, c.train.seed, c.input.workers) == (128, 7, 30, 4, 3)


def test_reference_command_line_of_the_small_models_means_the_same():
    line = (
        "DATA -a mobilenet_v3_small --lr 0.06 --batch-size 512 -j 64 --epochs 800 --dist-url env:// --world-size 1 "
        "--rank 0 --mlp wide --moco-t 0.1 --moco-k 65536 --aug-plus --cj 1. --grey-scale 0.5 --gaussian-blur 0.5 --cos "
        "--ckpt-dir runs/x"
    )
    c = parse(split_launch_flags(line.split())[1])
    assert c.loss == LossConfig(contrast_weight=1.0, temperature=0.1, align_weight=0.0, uniform_weight=0.0)
    assert (c.augment.policy, c.augment.cj, c.augment.grey_scale, c.augment.gaussian_blur) == ("small", 1.0, 0.5, 0.5)
    assert (c.model.head, c.optim.lr_schedule, c.train.output) == ("wide", "cosine", "runs/x")


def test_the_small_models_jitter_leaves_names_alone():
    c = parse(["v2", "--aug-plus", "--cj", "0.5", "--output", "v2"])
    assert (c.data, c.train.output, c.augment.policy, c.augment.cj) == ("v2", "v2", "small", 0.5)


def test_flags_with_an_equals_sign_are_the_same_flags():
    assert parse(["D", "--moco-t=0.2", "--mlp", "--lr=0.5"]) == parse(["D", "--moco-t", "0.2", "--mlp", "--lr", "0.5"])


def test_compile_switches():
    assert [parse(["D", *w]).train.compile for w in ([], ["--compile"], ["--no-compile"], ["--compile", "off"])] == [
        "auto", "on", "off", "off",
    ]  # fmt: skip
    flags = ([], ["--channels-last"], ["--no-channels-last"], ["--channels-last", "off"])
    assert [parse(["D", *words]).train.channels_last for words in flags] == ["auto", "on", "off", "off"]
    assert parse(["D", "--compile", "graphs"]).train.compile == "graphs"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["D", "--queue-sise", "5"], "--queue-size"),
        (["D", "--epochs", "five"], "epochs"),
        (["D", "--policy", "v3"], "v1"),
        (["D", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["D", "--sync-bn", "--bn-splits", "2"], "--sync-bn and --bn-splits exclude each other"),
        (["D", "--resident-shard"], "--resident-shard applies only to --loader resident, not to auto"),
        (["D", "--ema-momentum", "1.5"], "--ema-momentum must lie in"),
        (["D", "--temperature", "0"], "temperature must be"),
        (["D", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["D", "--save-every-steps", "0"], "--save-every-steps must be at least 1"),
        (["D", "--lr", "nan"], "--lr must be a finite number"),
        (["D", "--lr", "-0.1"], "--lr must be at least 0, got -0.1"),
        (["D", "--wd", "inf"], "--weight-decay must be a finite number"),
        (["D", "--momentum", "7"], "--momentum must lie in [0, 1]"),
        (["D", "--clip-grad", "0"], "--clip-grad must be greater than 0"),
        (["D", "--warmup-epochs", "5", "--epochs", "5"], "--warmup-epochs 5.0 must be fewer than --epochs 5"),
        (["D", "--start-epoch", "-1"], "--start-epoch must be at least 0"),
        (["D", "--start-epoch", "200"], "--start-epoch 200 must be less than --epochs 200"),
        (["D", "--knn-every", "-1"], "--knn-every must be at least 0"),
        (["D", "--eval-resize", "100"], "--eval-resize 100 must be at least --image-size 224"),
        (["D", "--seed", "9223372036854775808"], "--seed must fit into 64 bits"),
        (["D", "--queue-size", "9223372036854775808"], "--queue-size must fit into 64 bits"),
        (["D", "--restart"], "--restart needs --resume PATH"),
        (["D", "--restart", "--resume", "auto"], "--restart needs --resume PATH"),
        (["D", "--resume", "auto:"], "--resume auto: names no checkpoint"),
        (
            ["D", "--config"],
            "DATA [flags] fastssl pretrain: error: argument --config: expected one",
        ),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_the_mend(argv, words, capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:  # an older tyro leaves our own errors to `run_command`
        parse(argv)
    assert getattr(stop.value, "code", 1) != 0
    assert words in " ".join(f"{capsys.readouterr().err} {stop.value}".split())


def test_auto_behind_a_path_is_either():
    """As the Slurm scripts add it. Otherwise the last of a flag counts."""
    for first, last, meant in (
        ("auto", "auto", "auto"),
        ("no", "auto", "auto"),
        ("a.pth", "b.pth", "b.pth"),
        ("auto", "a.pth", "a.pth"),
        ("a.pth", "auto", "auto:a.pth"),
        ("auto:a.pth", "auto", "auto:a.pth"),
    ):
        assert parse(["D", f"--resume={first}", "--resume", last]).train.resume == meant


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in set(flat(Config())) - {"data"}:
        assert "--" + name.replace("_", "-") in text, name


def test_a_recipe_lies_between_defaults_and_flags(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("arch: resnet18\nlr: 5e-5\nmilestones: [3, 4]\ncompile: on\nresume: no\nclip_grad: null\n")
    c = parse(["D", "--config", str(path), "--lr", "0.5"])
    assert (c.model.arch, c.optim.lr, c.optim.milestones) == ("resnet18", 0.5, (3, 4))
    assert (c.train.compile, c.train.resume, c.optim.clip_grad) == ("on", "no", None)
    assert load_recipe(str(path)).optim.lr == 5e-5  # PyYAML reads 5e-5 as a string


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 5", ["line 1", "'epoch'", "did you mean 'epochs'"]),
        ("arch: resnet18\nlr: fast", ["line 2", "lr must be a number", "'fast'"]),
        ("epochs: 5.5", ["epochs must be a whole number"]),
        ("policy: v4", ["policy must be one of v1, v2"]),
        ("intra_batch: 2", ["must be true or false"]),
        ("milestones: 3", ["milestones must be a list"]),
        ("crop_scale: [0.1]", ["crop_scale must be a list"]),
        ("policy_set: flip_p=0", ["policy_set must be a list like [flip_p=0, hue=0.2]"]),
        ("lr: 1\nlr: 2", ["line 2", "twice"]),
        ("- lr", ["option: value"]),
        ("lr: [1", ["not valid YAML"]),
        ("batch_size: 0", ["r.yaml", "--batch-size must be at least 1"]),
        ("lr: {a: 1}", ["one value"]),
        ("[lr, epochs]: 1", ["line 1", "a key must be the name of an option"]),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_file_line_and_mend(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(str(path))
    for word in ["r.yaml", *words]:
        assert word in str(error.value)


def test_a_pair_of_numbers_that_a_recipes_list_has_split_is_refused_with_what_works(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("policy: v2\npolicy_set: [blur_sigma=0.1,1.0]")
    with pytest.raises(ValueError) as error:
        open_policy(load_recipe(str(path)))
    advice = re.search(r"'blur_sigma=[\d.]+,[\d.]+'", str(error.value))
    path.write_text(f"policy: v2\npolicy_set: [{advice[0]}]")
    assert open_policy(load_recipe(str(path))).blur_sigma == (0.1, 1.0)


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"lr: 1 # \xff")
    with pytest.raises(ValueError, match=r"r\.yaml is not valid YAML"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match="no file and no recipe 'nothing'"):
        load_recipe("nothing")
    with pytest.raises(ValueError, match="no file and no recipe ''"):  # a shell's variable that was never set
        parse(["DATA", "--config", ""])


def test_print_config_is_a_recipe_that_gives_the_run_back(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["D", "-a", "resnet34", "--lr", "3e-7", "--milestones", "1", "2", "--print-config"])
    assert stop.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    again = load_recipe(str(tmp_path / "c.yaml"))
    assert (again.data, again.model.arch, again.optim.lr, again.optim.milestones) == ("D", "resnet34", 3e-7, (1, 2))


def test_yaml_round_trip_of_awkward_values(tmp_path):
    config = replace(Config(), data="a: b", output="null", resume="no", clip_grad=None, lr=1e-12)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_recipe(str(tmp_path / "c.yaml")) == config


def test_shipped_recipes_load_and_repeat_no_default():
    defaults = flat(Config())
    for path in RECIPES.glob("*.yaml"):
        config = flat(load_recipe(str(path)))
        for key in yaml.safe_load(path.read_text()) or {}:
            assert config[key] != defaults[key], f"{path.name}: {key} repeats the default"
    assert set(option_types()) == set(defaults)


def test_multiprocessing_distributed_becomes_torchrun(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = "DATA -b 128 --gpus 0 1 2 3 --multiprocessing-distributed --world-size 1 --rank 0 -a resnet18"
    command = launch_command(line.split(), "fastssl.train")
    assert command[1:] == [
        "-m", "torch.distributed.run", "--nproc_per_node", "4", "--standalone", "--local-addr", "localhost",
        "-m", "fastssl.train", "DATA", "-b", "128", "-a", "resnet18",
    ]  # fmt: skip


def test_two_nodes_keep_the_address_and_the_batch_of_a_node():
    line = "DATA -b 128 --multiprocessing-distributed --world-size 2 --rank 1 --dist-url tcp://10.0.0.1:10001"
    command = launch_command(line.split(), "fastssl.train", 128)
    joined = " ".join(command)
    assert "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 10001" in joined
    assert joined.endswith("-m fastssl.train DATA -b 256")
    glued = launch_command(line.replace("-b 128", "--batch-size=128").split(), "fastssl.train", 128)
    assert " ".join(glued).endswith("DATA --batch-size 256")


def test_one_process_needs_no_launcher():
    assert launch_command(["DATA", "--world-size", "1", "--rank", "0"], "fastssl.train") is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-a mobilenetv3_small --image-size 32 -b 1", "cannot train on 1 x 3 x 32 x 32 .* larger --batch-size"),
        ("-a resnet18 --image-size 32 -b 8 --bn-splits 4 --accumulate 2", "smaller --bn-splits or --accumulate"),
        ("-a deit_tiny --image-size 33 -b 8", "divisible by patch size .* use another --image-size"),
        ("-a alexnet --image-size 16 -b 8", "Output size is too small.* use another --image-size"),
        ("-a resnet18 -b 9 --bn-splits 2", "must be a multiple of --bn-splits 2"),
        ("-a resnet18 -b 9 --bn-splits 4 --symmetric", "one device, 18, must be a multiple of --bn-splits 4"),
        ("-a timm:halonet26t --image-size 64 -b 8", r"pixels \(AssertionError\): use another"),  # which says no more
    ],
)
def test_sizes_with_which_no_step_can_be_made_are_refused_before_images_are_read(line, said):
    with pytest.raises(ValueError, match=said):
        pretrain(parse(["nowhere", *line.split()]))


@pytest.mark.parametrize(
    "line",
    [
        "-a resnet18 --image-size 64 -b 1",  # still 2 x 2 values a channel
        "-a resnet18 --image-size 32 -b 1 --symmetric",  # two views
        "-a timm:vit_small_resnet26d_224 -b 8",  # runs while it is built, so it wants memory
        "-a timm:vit_small_patch8_224 --image-size 224 -b 8",  # whose classifier timm leaves out by default
    ],
)
def test_what_can_train_is_not_refused(line):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        pretrain(parse(["nowhere", *line.split()]))
