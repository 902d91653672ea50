"""Transfer: bicubic views as torchvision makes them, data sets as they lie on disk, fine-tuning; command lines."""

import argparse
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from ranks import run_ranks
from test_eval_linear import train_slowly
from torch import nn
from torchvision.transforms import InterpolationMode

from fastssl.augment.normalise import MEAN, STD
from fastssl.augment.params import sample_params
from fastssl.augment.policy import make_policy
from fastssl.batch import pack_images
from fastssl.command import run_command
from fastssl.distributed import Ranks
from fastssl.eval import __main__ as evaluations
from fastssl.eval import transfer, transfer_data
from fastssl.eval.bicubic import bicubic_crop_view, bicubic_eval_view
from fastssl.eval.classifier import Classifier, check_single_images
from fastssl.eval.linear import make_train_view
from fastssl.eval.linear_train import Protocol, train_classifier
from fastssl.eval.options import finish_options
from fastssl.eval.session import Session

ALONE = Ranks(0, 1, torch.device("cpu"))


def make_batch(sizes=((32, 32), (40, 57), (90, 61))):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return images, pack_images(images, range(len(images)), [0] * len(images))


def to_view(image):
    return tvf.normalize(tvf.to_tensor(image), MEAN, STD)


def test_whole_images_are_torchvisions():
    images, batch = make_batch()
    views = bicubic_eval_view(batch, 28, 32)
    for image, view in zip(images, views):
        resized = tvf.resize(Image.fromarray(image), 32, InterpolationMode.BICUBIC)
        torch.testing.assert_close(view, to_view(tvf.center_crop(resized, 28)), rtol=0, atol=1e-6)


def test_crops_are_torchvisions():
    images, batch = make_batch()
    params = sample_params(make_policy("v1", crop_scale=(0.6, 1.0)), batch, 0, 0, 0)
    views = bicubic_crop_view(batch, params, 24)
    for i, image in enumerate(images):
        box = [int(t[i]) for t in (params.top, params.left, params.crop_height, params.crop_width)]
        view = tvf.resized_crop(Image.fromarray(image), *box, [24, 24], InterpolationMode.BICUBIC)
        view = tvf.hflip(view) if params.flip[i] else view
        torch.testing.assert_close(views[i], to_view(view), rtol=0, atol=1e-6)


def options_of(*argv):
    options = finish_options(transfer.make_transfer_parser().parse_args([str(word) for word in argv]))
    transfer.check(options)
    return options


def session_of(*argv):
    return Session(options_of(*argv), ALONE)


def write_cifar(root, monkeypatch, n=6):
    """CIFAR-10's own files, tiny, with their checksums."""
    folder, random = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        return {"data": random.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": list(range(n))}

    kind = transfer_data.tvd.CIFAR10
    monkeypatch.setattr(kind, "train_list", [write("data_batch_1", batch())])
    monkeypatch.setattr(kind, "test_list", [write("test_batch", batch())])
    filename, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {"filename": filename, "key": "label_names", "md5": checksum})


def test_torchvisions_cifar(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    train, test = transfer_data.open_transfer_data(session_of(tmp_path, "--dataset", "cifar10"))
    assert train.class_names == list("abcdefghij") and (train.num_images, test.num_images) == (6, 6)
    (batch,) = train.read(iter([torch.tensor([4, 1])]))
    assert batch.label.tolist() == [4, 1] and batch.index.tolist() == [4, 1]
    assert torch.equal(batch.image(1), torch.from_numpy(train.pixels[1]))
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is incomplete or damaged"):
        transfer_data.open_transfer_data(session_of(tmp_path))


def test_whole_caltech_is_split_by_the_seed(make_image_folder, tmp_path, monkeypatch):
    root = tmp_path / "caltech101"
    make_image_folder(root, {"101_ObjectCategories": 5}, classes=3)
    (root / "101_ObjectCategories" / "class1").rename(root / "101_ObjectCategories" / "BACKGROUND_Google")
    monkeypatch.setattr(transfer_data, "CALTECH_PER_CLASS", 3)
    splits = [
        transfer_data.open_transfer_data(session_of(tmp_path, "--dataset", "caltech101", "--seed", seed))
        for seed in (0, 0, 1)
    ]
    for train, test in splits:
        assert train.class_names == ["class0", "class2"] and (train.num_images, test.num_images) == (6, 4)
        labels = [
            torch.cat([b.label for b in s.read(iter([torch.arange(s.num_images)]))]).tolist() for s in (train, test)
        ]
        assert labels == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1]]
        assert not set(train.folder.paths) & set(test.folder.paths)
    chosen = [train.folder.paths for train, _ in splits]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_bad_image_of_caltech_is_named_once(make_image_folder, tmp_path, capsys):
    folder = make_image_folder(tmp_path / "caltech101", {"101_ObjectCategories": 2}, classes=2) / "101_ObjectCategories"
    next((folder / "class0").iterdir()).write_bytes(b"no image")
    session = session_of(tmp_path, "--dataset", "caltech101")
    splits = transfer_data.open_transfer_data(session)
    for split in splits:
        list(split.read(iter([torch.arange(split.num_images)])))
    assert session.warn_bad(*splits) == 1
    assert capsys.readouterr().err.count("left out: ") == 1


def test_an_unreadable_training_image_of_caltech_is_replaced_by_one_of_them(make_image_folder, tmp_path):
    folder = make_image_folder(tmp_path / "caltech101", {"101_ObjectCategories": 4}, classes=2) / "101_ObjectCategories"
    (folder / "class0").rename(folder / "BACKGROUND_Google")
    (folder / "class1").rename(folder / "class0")
    session = session_of(tmp_path, "--dataset", "caltech101")
    train, _ = transfer_data.open_transfer_data(session)
    Path(train.folder.path(2)).write_bytes(b"no image")  # the last one: the next in file order is the first
    (batch,) = train.read(iter([torch.tensor([0, 2])]), replace_bad=True)
    first, last = batch.pixels.chunk(2)
    assert torch.equal(first, last) and batch.label.tolist() == [0, 0] and len(train.bad_images) == 1


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.2)

    def forward(self, images):
        return self.dropout(self.norm(images)).mean((2, 3))


def test_frozen_transfer_equals_sgd_in_numpy_on_unit_features(image_folder, tmp_path, monkeypatch):
    """Both protocols; the reference's crops are those of each epoch."""
    flags = ["--dataset", "caltech101", "--image-size", 16, "--epochs", 3, "--schedule", 2, "--lr", 2, "-b", 8]
    results = {}
    for protocol in ("reference", "cached"):
        more = ["--output", tmp_path] if protocol == "reference" else []
        session = session_of(image_folder, *flags, "--protocol", protocol, *more)
        session.options.arch = "tiny"
        session.open_backbone = lambda *_: Backbone().eval()
        results[protocol] = transfer.evaluate(session)
    train, test = transfer_data.open_transfer_data(session)
    whole, held_out = (next(s.read(iter([torch.arange(s.num_images)]))) for s in (train, test))
    backbone, view = Backbone().eval(), transfer.bicubic_view(session)
    crops = make_train_view(session, (0.6, 1.0), bicubic_crop_view)
    with torch.no_grad():
        unit = lambda images: nn.functional.normalize(backbone(images).double())  # noqa: E731
        features = {
            "reference": [unit(crops(whole, epoch)) for epoch in range(3)],
            "cached": [unit(view(whole))] * 3,
        }
        asked = unit(view(held_out))
    for protocol, by_epoch in features.items():
        weight, bias = train_slowly(by_epoch, whole.label, (2.0, 2.0, 0.2), 8)
        truth = 100 * float((torch.argmax(asked @ weight.T + bias, 1) == held_out.label).double().mean())
        assert results[protocol]["acc1"] == pytest.approx(truth)


def finetune(data, output, mode, ranks=None, freeze=()):
    torch.manual_seed(int(output.name == "a"))  # which is not what its draws depend on
    flags = ["--finetune", "--finetune-mode", mode, "--image-size", 16, "--epochs", 3, "--lr", 0.1, "-b", 8]
    session = session_of(data, "--dataset", "caltech101", *flags)
    session.options.arch, session.ranks = "tiny", ranks or session.ranks
    train, test = transfer_data.open_transfer_data(session)
    model = Classifier(Backbone(), 3, 3, 0, unit_length=True)
    for name in freeze:
        model.get_parameter(name).requires_grad_(False)
    view = transfer.bicubic_view(session)
    train_view = make_train_view(session, (0.2, 1.0), bicubic_crop_view)
    protocol = Protocol(train_view, view, transfer.LINE, 0.2, True, mode == "reference")
    train_classifier(session, model, train, test, protocol, output)
    return model.backbone.norm


def test_finetuning_trains_the_backbone_in_train_mode(image_folder, tmp_path):
    norm = finetune(image_folder, tmp_path / "a", "train")
    assert norm.num_batches_tracked == 9 and not torch.equal(norm.weight, torch.ones(3))
    assert finetune(image_folder, tmp_path / "b", "reference").num_batches_tracked == 3  # of the first epoch only


def test_fine_tuning_leaves_alone_what_the_architecture_freezes(image_folder, tmp_path):
    norm = finetune(image_folder, tmp_path / "a", "train", freeze=["backbone.norm.bias"])
    assert not norm.bias.any() and not torch.equal(norm.weight, torch.ones(3))
    vit = session_of(image_folder, "-a", "vit_tiny").open_backbone()
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"to_patch_embedding.1.weight", "to_patch_embedding.1.bias"}


def test_fine_tuning_draws_by_the_seed_and_the_epoch(image_folder, tmp_path):
    first, again = (finetune(image_folder, tmp_path / name, "train").state_dict() for name in "ab")  # with dropout
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_single_image_is_refused_only_where_batch_norm_cannot_take_it():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    options, two = argparse.Namespace(batch_size=4, image_size=8, arch="pooled"), Ranks(0, 2, torch.device("cpu"))
    small, whole = (Classifier(backbone, 3, 2, 0, False) for backbone in (pooled, nn.BatchNorm2d(3)))
    for num, ranks in ((9, ALONE), (10, two), (11, two)):
        with pytest.raises(ValueError, match="leaves a rank a single one, on which pooled cannot be fine-tuned at 8"):
            check_single_images(small, num, options, ranks)
        check_single_images(whole, num, options, ranks)
    for num, ranks in ((8, ALONE), (10, ALONE), (8, two)):
        check_single_images(small, num, options, ranks)
    assert pooled[1].num_batches_tracked == 0


def finetune_on_rank(rank, world_size, data, output):
    return finetune(data, output, "train", Ranks(rank, world_size, torch.device("cpu"))).state_dict()


def test_all_ranks_validate_the_batch_norm_that_is_saved(image_folder, tmp_path):
    first, second = run_ranks(finetune_on_rank, 2, image_folder, tmp_path)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    saved = torch.load(tmp_path / "checkpoint_0002.pth.tar", weights_only=True)["state_dict"]
    assert torch.equal(saved["module.norm.running_mean"], second["running_mean"])


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def command(line):
        try:
            code = run_command(evaluations.main, line.split())
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command


def test_the_commands(run, image_folder, tmp_path):
    flags = f"transfer {image_folder} --dataset cifar100 -a resnet18 --image-size 32 -b 16"
    code, out, err = run(f"{flags} --epochs 1 --finetune --lr 0.1 --json a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and f" * Acc@1 {result['acc1']:.3f} Acc@5 100.000" in out.splitlines(), err
    assert "fine-tuned" in result["protocol"] and (tmp_path / result["folder"] / "model_best.pth.tar").exists()
    best = f"{result['folder']}/model_best.pth.tar"
    code, out, err = run(f"{flags} -e --resume {best}")  # what was trained does not matter to a validation,
    assert code == 0 and f" * Acc@1 {result['best_acc1']:.3f} Acc@5 100.000" in out.splitlines(), err
    code, _, err = run(f"{flags} --epochs 2 --resume {best}")  # but to a run that goes on
    assert code == 1 and "trained other weights: give --finetune only if its run was given it" in err, err
    code, out, _ = run(f"{flags} --protocol cached --epochs 2 --json b.json")
    assert code == 0 and json.loads((tmp_path / "b.json").read_text())["protocol"].startswith("cached")


def test_bad_input_is_one_sentence(run, image_folder, tmp_path):
    for words, sentence in [
        (f"{tmp_path} --dataset cifar10", "test/<class>/ folders or cifar-10-batches-py/"),
        (f"{tmp_path} --dataset caltech101", "test/<class>/ folders or caltech101/101_ObjectCategories/"),
        (f"{image_folder} --finetune --protocol cached", "leave out --protocol cached"),
        (f"{image_folder} --finetune --precision fp16", "--finetune cannot train in fp16"),
    ]:
        code, _, err = run(f"transfer {words}")
        assert code == 1 and sentence in err and "Traceback" not in err, err
    assert run(f"transfer {image_folder} --dataset mnist")[0] == 2
