"""Linear evaluation: either protocol against a plain loop, ranks, resuming, the frozen backbone, what it refuses."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_probe import ColourBackbone
from torch import nn
from torch.nn.functional import cross_entropy

from fastssl.augment import views
from fastssl.augment.params import sample_params
from fastssl.augment.policy import make_policy
from fastssl.augment.views import make_view
from fastssl.command import run_command
from fastssl.distributed import Ranks
from fastssl.eval import linear
from fastssl.eval.classifier import Classifier, Keeper, count_hits, initial_weights
from fastssl.eval.features import eval_view
from fastssl.eval.images import open_splits
from fastssl.eval.linear_cached import Setting, Sweep, count_sweep_hits, fit_linear
from fastssl.eval.linear_train import Protocol, check_frozen, copy_state, train_classifier
from fastssl.eval.options import finish_options
from fastssl.eval.session import Session
from fastssl.foreign import load_pretrained
from fastssl.loaders.make import make_loader
from fastssl.loaders.order import epoch_order
from fastssl.models.encoders import make_encoder

CPU = torch.device("cpu")
SETTINGS = [Setting(lr, wd) for lr in (0.05, 0.1, 0.5, 1.0, 2.0, 5.0) for wd in (0.0, 1e-2)]


def options_of(*argv):
    return finish_options(linear.make_linear_parser().parse_args([str(word) for word in argv]))


def make_features(n=150, width=12, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return centres[labels] + torch.randn(n, width, generator=generator, dtype=torch.float64), labels


def fit_slowly(features, labels, setting, sweep, classes=4):
    """torch's own Linear, SGD and MultiStepLR."""
    fc = nn.Linear(features.shape[1], classes).double()
    with torch.no_grad():
        for parameter, initial in zip(fc.parameters(), initial_weights(features.shape[1], classes, sweep.seed)):
            parameter.copy_(initial)
    optimizer = torch.optim.SGD(fc.parameters(), setting.lr, sweep.momentum, weight_decay=setting.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(sweep.schedule), 0.1)
    for epoch in range(sweep.epochs):
        for rows in epoch_order(len(labels), sweep.seed, epoch).split(sweep.batch_size):
            optimizer.zero_grad()
            cross_entropy(fc(features[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return fc


def test_the_sweep_equals_torchs_sgd_setting_by_setting():
    features, labels = make_features()
    sweep = Sweep(epochs=7, batch_size=32, schedule=(3, 5), seed=3)  # the last batch is smaller
    weight, bias = fit_linear(features, labels, 4, SETTINGS, sweep)
    held_out, held_labels = make_features(80, seed=1)
    hits = count_sweep_hits(held_out, held_labels, weight, bias)
    for i, setting in enumerate(SETTINGS):
        fc = fit_slowly(features, labels, setting, sweep)
        torch.testing.assert_close(weight[i], fc.weight.data, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(bias[i], fc.bias.data, rtol=1e-9, atol=1e-11)
        assert hits[i].tolist() == count_hits(fc(held_out), held_labels).tolist()
    assert len({tuple(h) for h in hits.tolist()}) > 2


def test_a_sweep_equals_separate_runs():
    features, labels = make_features()
    sweep = Sweep(epochs=5, batch_size=32, schedule=(3,))
    weight, bias = fit_linear(features, labels, 4, SETTINGS, sweep)
    for i, setting in enumerate(SETTINGS):
        alone = fit_linear(features, labels, 4, [setting], sweep)
        torch.testing.assert_close((weight[i], bias[i]), (alone[0][0], alone[1][0]), rtol=1e-9, atol=1e-11)
    in_float32 = fit_linear(features.float(), labels, 4, SETTINGS, sweep)
    torch.testing.assert_close(in_float32[0], weight.float(), rtol=1e-3, atol=1e-3)


def train_slowly(features_of_epoch, labels, rates, batch_size, momentum=0.9, seed=0):
    """NumPy float64: weights (Y, C) and biases (Y,) after SGD on softmax cross entropy, its gradient by hand.

    features_of_epoch: (n, C) for each epoch, rates: its learning rate.
    """
    labels = labels.numpy()
    weight, bias = (t.double().numpy() for t in initial_weights(features_of_epoch[0].shape[1], labels.max() + 1, seed))
    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    for epoch, (features, rate) in enumerate(zip(features_of_epoch, rates)):
        for rows in epoch_order(len(labels), seed, epoch).split(batch_size):
            x, truth = features[rows].double().numpy(), np.eye(len(bias))[labels[rows]]
            logits = x @ weight.T + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            error = (p / p.sum(1, keepdims=True) - truth) / len(rows)
            velocity = [momentum * v + g for v, g in zip(velocity, (error.T @ x, error.sum(0)))]
            weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    return torch.from_numpy(weight), torch.from_numpy(bias)


def make_protocol(session, **values):
    return Protocol(linear.make_train_view(session, (0.08, 1.0)), eval_view(session), linear.LINE, **values)


def train_on_rank(rank, world_size, data, output, *flags):
    """The reference protocol with a backbone of three colours, in float64 so that ranks can be compared closely."""
    ranks = Ranks(rank, world_size, CPU)
    options = options_of(data, "-b", 7, "--image-size", 16, "--output", output, "-j", 1, "--lr", 1, *flags)
    options.arch = "colours"
    session = Session(options, ranks)
    train, val = open_splits(options, ranks)
    model = linear.make_classifier(session, ColourBackbone(), val, eval_view(session), 3)
    return train_classifier(session, model, train, val, make_protocol(session), output), model


FLAGS = ("--epochs", 5, "--schedule", 2, 4)


def test_the_reference_protocol_equals_sgd_in_numpy(image_folder, tmp_path, capsys):
    result, model = train_on_rank(0, 1, image_folder, tmp_path, *FLAGS)
    loader = make_loader("folder", image_folder / "train", batch_size=1, seed=0, device="cpu")
    session = Session(options_of(image_folder, "--image-size", 16), Ranks(0, 1, CPU))
    view = linear.make_train_view(session, (0.08, 1.0))
    whole = next(loader.eval_batches(100))
    backbone = ColourBackbone().eval()
    features = [backbone(view(whole, epoch)).detach() for epoch in range(5)]
    weight, bias = train_slowly(features, whole.label, (1.0, 1.0, 0.1, 0.1, 0.01), 7)
    torch.testing.assert_close(model.fc.weight.detach(), weight.float(), rtol=1e-4, atol=1e-5)
    val = next(make_loader("folder", image_folder / "val", batch_size=1, seed=0, device="cpu").eval_batches(100))
    hits = count_hits(backbone(eval_view(session)(val)).double() @ weight.T + bias, val.label)
    assert result["acc1"] == pytest.approx(100 * int(hits[0]) / 12)
    assert result["acc5"] == 100.0  # three classes
    assert result["best_acc1"] == max(result["acc1_by_epoch"]) and len(result["acc1_by_epoch"]) == 5
    out = capsys.readouterr().out
    assert "=> sanity check passed." in out
    assert out.count(" * Acc1 ") == 5 and f"New best Acc1 {result['best_acc1']:.4f}" in out


def test_training_crops_are_those_of_the_augmentation_without_its_other_operations(image_folder, monkeypatch):
    """A GPU would compute all of those for every image, only to leave their results out."""
    session = Session(options_of(image_folder, "--image-size", 16), Ranks(0, 1, CPU))
    whole = next(make_loader("folder", image_folder / "train", batch_size=1, seed=0, device="cpu").eval_batches(100))
    policy = make_policy("v1", crop_scale=(0.08, 1.0), jitter_p=0.0, grey_scale=0.0)
    expected = make_view(whole, sample_params(policy, whole, session.options.seed, 3, 0), 16, session.dtype)
    monkeypatch.setattr(views, "apply_where", lambda *args: pytest.fail("an operation besides crop and flip"))
    found = linear.make_train_view(session, (0.08, 1.0))(whole, 3)
    assert torch.equal(found, expected) and found.stride() == expected.stride() and found.dtype == expected.dtype


def test_two_ranks_train_the_classifier_of_one(image_folder, tmp_path):
    truth, model = train_on_rank(0, 1, image_folder, tmp_path / "one", *FLAGS)
    for result, other in run_ranks(train_on_rank, 2, image_folder, tmp_path / "two", *FLAGS):
        torch.testing.assert_close(other.fc.weight, model.fc.weight, rtol=1e-4, atol=1e-5)
        assert result["acc1_by_epoch"] == truth["acc1_by_epoch"]


def test_a_resumed_run_is_the_uninterrupted_one(image_folder, tmp_path):
    truth, model = train_on_rank(0, 1, image_folder, tmp_path / "whole", *FLAGS)
    first, _ = train_on_rank(0, 1, image_folder, tmp_path / "parts", "--epochs", 3, "--schedule", 2, 4)
    assert [p.name for p in sorted((tmp_path / "parts").iterdir())] == ["checkpoint_0002.pth.tar", "model_best.pth.tar"]
    path = shutil.copy(tmp_path / "parts" / "checkpoint_0002.pth.tar", tmp_path / "copy.pth.tar")
    own = tmp_path / "parts" / "checkpoint_0002.pth.tar"
    second, other = train_on_rank(0, 1, image_folder, tmp_path / "parts", *FLAGS, "--resume", own)
    assert [p.name for p in sorted((tmp_path / "parts").iterdir())] == ["checkpoint_0004.pth.tar", "model_best.pth.tar"]
    assert torch.equal(other.fc.weight, model.fc.weight) and second.keys() == truth.keys()
    assert first["acc1_by_epoch"] + second["acc1_by_epoch"] == truth["acc1_by_epoch"]
    only, _ = train_on_rank(0, 1, image_folder, tmp_path / "parts", *FLAGS, "--resume", path, "--evaluate")
    assert only["acc1"] == first["acc1"]
    with pytest.raises(ValueError, match="has already reached --epochs 3: give more, or validate it with -e"):
        train_on_rank(0, 1, image_folder, tmp_path / "parts", "--epochs", 3, "--resume", path)
    state = torch.load(path, weights_only=True)
    assert set(state) == {"epoch", "arch", "stem", "state_dict", "best_acc1", "acc1", "acc5", "optimizer"}
    assert state["epoch"] == 3 and {"module.fc.weight", "module.norm.running_mean"} <= set(state["state_dict"])


def test_a_kill_between_its_two_files_does_not_lose_the_best_classifier(tmp_path, monkeypatch):
    replace, done = os.replace, []

    def replace_once(*paths):
        if done:
            raise KeyboardInterrupt
        done.append(replace(*paths))

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        Keeper(tmp_path, Ranks(0, 1, CPU)).save({"best_acc1": 50.0}, 0, best=True)
    assert (tmp_path / "model_best.pth.tar").exists() and not (tmp_path / "checkpoint_0000.pth.tar").exists()


def test_the_sanity_check_sees_a_bit():
    backbone = ColourBackbone()
    before = copy_state(backbone)
    check_frozen(backbone, before)
    backbone.norm.running_var[1] = torch.nextafter(backbone.norm.running_var[1], torch.tensor(2.0))
    with pytest.raises(RuntimeError, match=r"has changed .* norm.running_var"):
        check_frozen(backbone, before)


def test_the_classifier_begins_as_the_reference():
    model = Classifier(nn.Flatten(), 20_000, 10, seed=0, unit_length=False)
    weight = model.fc.weight.detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.01) and abs(float(weight.mean())) < 1e-4
    assert not model.fc.bias.any()
    again, other = (Classifier(nn.Flatten(), 20_000, 10, seed=s, unit_length=True) for s in (0, 1))
    assert torch.equal(again.fc[1].weight, model.fc.weight) and not torch.equal(other.fc[1].weight, model.fc.weight)
    assert {"module.fc.1.weight", "module.fc.1.bias"} == set(again.export_state())
    state = copy.deepcopy(again.export_state())
    other.import_state(state)
    assert torch.equal(other.fc[1].weight, again.fc[1].weight)
    with pytest.raises(ValueError, match=r"of the same encoder and classes: its fc\.weight differs"):
        model.import_state(state)
    with pytest.raises(ValueError, match=r"of the same encoder: it also has more"):
        other.import_state({**state, "module.more": torch.zeros(1)})


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def command(*argv):
        try:
            code = run_command(linear.main, [str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command


def test_the_commands(run, image_folder, tmp_path):
    flags = [image_folder, "-a", "resnet18", "--image-size", 32, "-b", 16]
    code, out, err = run(*flags, "--epochs", 1, "--lr", 0.1, "--json", "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and f" * Acc1 {result['acc1']:.3f} Acc5 100.000" in out.splitlines(), err
    assert result["protocol"].startswith("reference") and "protocol" in result["options"]
    assert result["folder"] == "lincls/random/b16_lr0.1_e60,80,1"
    code, out, _ = run(
        *flags, "--protocol", "cached", "--epochs", 3, "--lrs", "0.1,1", "--wds", "0,1e-3", "--json", "b.json"
    )
    result = json.loads((tmp_path / "b.json").read_text())
    assert code == 0 and result["protocol"].startswith("cached") and len(result["settings"]) == 4
    assert out.splitlines()[-1] == f" * Acc1 {max(s['acc1'] for s in result['settings']):.3f} Acc5 100.000"


def test_a_classifier_goes_on_with_its_own_encoder_and_optimiser(run, image_folder, tmp_path):
    flags = [image_folder, "--image-size", 32, "-b", 16, "--lr", 0.1]
    assert run(*flags, "-a", "resnet18", "--epochs", 1, "--output", "lin", "--json", "a.json")[0] == 0
    code, _, err = run(*flags, "-e", "--resume", "lin/checkpoint_0000.pth.tar", "--json", "b.json")
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert code == 0 and again["acc1"] == first["acc1"] and again["options"]["arch"] == "resnet18"
    assert "random weights" not in err
    more = ["--epochs", 2, "--wd", 0.1, "--momentum", 0.5, "--output", "lin", "--json", "c.json"]
    code, _, err = run(*flags, "--resume", "lin/checkpoint_0000.pth.tar", *more)
    options = json.loads((tmp_path / "c.json").read_text())["options"]
    assert code == 0 and (options["weight_decay"], options["momentum"]) == (0.0, 0.9)
    assert "--wd is 0, as in lin/checkpoint_0000.pth.tar, and not 0.1" in err and "--momentum is 0.9, as in" in err


@pytest.mark.parametrize("arch", ["deit_tiny", "mobilenet_v3_small"])
def test_the_encoder_of_a_classifier_is_read_whatever_it_calls_its_own(arch, tmp_path):
    model = Classifier(make_encoder(arch).backbone, 8, 3, 0, unit_length=True)
    torch.save({"arch": arch, "state_dict": model.export_state()}, tmp_path / "classifier.pth.tar")
    backbone, report = load_pretrained(tmp_path / "classifier.pth.tar")
    truth = model.backbone.state_dict()
    assert report.arch == arch and backbone.state_dict().keys() == truth.keys()
    assert all(torch.equal(tensor, truth[name]) for name, tensor in backbone.state_dict().items())


def test_unreadable_first_images_are_left_out(run, make_image_folder, tmp_path):
    data = make_image_folder(tmp_path / "data")
    for path in sorted((data / "val").rglob("*.*"))[:8]:
        path.write_bytes(b"no image")
    flags = ["-a", "resnet18", "--image-size", 32, "-b", 16, "--epochs", 1, "--lr", 0.1]
    code, _, err = run(data, *flags, "--json", "a.json")
    assert code == 0 and err.count("left out: ") == 8
    assert json.loads((tmp_path / "a.json").read_text())["bad_images"] == 8


def test_where_checkpoints_go():
    options = options_of("data", "--pretrained", "runs/x/checkpoint_0199.pth.tar")
    assert str(linear.output_folder(options)) == "runs/x/lincls/checkpoint_0199.pth.tar/b256_lr30_e60,80,100"
    options.pretrained, options.resume = "", "runs/x/lincls/y/b256/checkpoint_0049.pth.tar"
    assert str(linear.output_folder(options)) == "runs/x/lincls/y/b256"


def test_bad_input_is_one_sentence(run, image_folder, tmp_path):
    flags = [image_folder, "-a", "resnet18", "--image-size", 32]
    (tmp_path / "text.pth.tar").write_text("no checkpoint")
    (tmp_path / "empty.pth.tar").touch()
    torch.save({"epoch": 3, "state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "weights.pth.tar")
    for words, sentence in [
        (["--lrs", "1,2"], "--lrs needs --protocol cached"),
        (["--protocol", "cached", "--resume", "x"], "writes no checkpoints"),
        (["--protocol", "cached", "--start-epoch", "1"], "leave out --start-epoch"),
        (["--start-epoch", 100], "--start-epoch 100 must lie between 0 and 99"),
        (["--resume", tmp_path / "text.pth.tar"], "is damaged or not a checkpoint"),
        (["--resume", tmp_path / "empty.pth.tar"], "is damaged or not a checkpoint: it is empty"),
        (
            ["--resume", tmp_path / "weights.pth.tar"],
            "not a checkpoint of a linear evaluation (it lacks best_acc1, opt",
        ),
        (["--resume", tmp_path / "nothing"], "there is no checkpoint"),
        (["-e"], "-e needs a trained classifier: give its checkpoint with --resume"),
        (["--protocol", "cached", "--lrs", "3e38", "--epochs", 3], "diverged"),
        (["--lr", "1e38", "--epochs", 1, "-b", 4], "is not finite: lower --lr"),
    ]:
        code, _, err = run(*flags, *words)
        assert code == 1 and sentence in err and "Traceback" not in err, err
    for words in (["--lr", "nan"], ["--lr=-1"], ["--wd=-1"], ["--protocol", "cached", "--lrs", "1,inf"]):
        code, _, err = run(*flags, *words)
        assert code == 2 and "must be 0 or more, got" in err, err
