"""Checkpoints whose files are odd: names, types of numbers, what lies beside the weights."""

import argparse
import collections
import io
import pickle
import sys
import tarfile
import types
from pathlib import PosixPath, PurePosixPath

import numpy as np
import pytest
import safetensors.torch
import torch
from old_checkpoints import make_head, make_moco, make_network

from fastssl.checkpoint import CheckpointError
from fastssl.export import export
from fastssl.foreign import load_pretrained
from fastssl.foreign.heads import build_head
from fastssl.foreign.read import _harmless, read_weights


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture(scope="module")
def tensors():
    return {k: v.contiguous() for k, v in make_network("resnet18")[0].items()}


def test_a_safetensors_file_by_any_name(tmp_path, tensors):
    """As a URL may have named it."""
    safetensors.torch.save_file(tensors, tmp_path / "download")
    backbone, _ = load_pretrained(tmp_path / "download")
    assert torch.equal(backbone.conv1.weight, tensors["conv1.weight"])
    torch.save(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
        load_pretrained(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_not_taken_for_weights(tmp_path, tensors, dtype):
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"conv1\.weight is of type {dtype}: save weights in float32"):
        load_pretrained(tmp_path / "x.pth")


def test_weights_beside_the_weights_are_accounted_for(tmp_path, tensors):
    torch.save({"arch": "resnet18", "stem": ["odd"], "model": tensors, "model_ema": tensors}, tmp_path / "x.pth")
    report = load_pretrained(tmp_path / "x.pth")[1]
    assert report.left_out == {"the tensors of 'model_ema'": list(tensors)}
    assert "left out the tensors of 'model_ema' (conv1.weight, " in str(report)


def exclude_bias_and_norm(parameter):
    raise AssertionError("code ran")


@pytest.mark.parametrize("script", ["__main__", "main_vicreg"])
def test_the_function_in_vicregs_optimizer_is_not_called(tmp_path, monkeypatch, tensors, script):
    """Its options name it; what the file holds beside the name is weights."""
    module = types.ModuleType(script)
    module.exclude_bias_and_norm = exclude_bias_and_norm
    monkeypatch.setitem(sys.modules, script, module)
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", script)
    optimizer = {"state": {}, "param_groups": [{"params": [0], "weight_decay_filter": exclude_bias_and_norm}]}
    networks = {f"module.backbone.{k}": v for k, v in tensors.items()} | {"module.projector.0.bias": torch.zeros(8)}
    torch.save({"epoch": 3, "model": networks, "optimizer": optimizer}, tmp_path / "model.pth")
    monkeypatch.undo()
    backbone, report = load_pretrained(tmp_path / "model.pth")
    assert torch.equal(backbone.conv1.weight, tensors["conv1.weight"]) and list(report.left_out) == ["the projector"]


def test_files_of_torch_0_1_are_refused_without_advice_to_trust_them(tmp_path, tensors):
    torch.save(tensors, tmp_path / "storages")
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(CheckpointError, match=r"holds the legacy \.tar format, which would run as code") as refusal:
        load_pretrained(tmp_path / "old.pth")
    assert "weights_only" not in str(refusal.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_other_programs_are_refused(tmp_path, capsys, protocol):
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"state_dict": {}, "extra": Evil()}, protocol))
    with pytest.raises(CheckpointError, match=r"x\.pth holds .*, which would run as code if it were loaded"):
        load_pretrained(tmp_path / "x.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["module.queue_ptr", "module.encoder_k."])
def test_what_mocos_layout_cannot_be_whole_without_leaves_the_query_encoder(tmp_path, lost):
    saved, tensors, _ = make_moco("resnet18")
    saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if not k.startswith(lost)}
    torch.save(saved, tmp_path / "in.pth.tar")
    export(str(tmp_path / "in.pth.tar"), str(tmp_path / "out.pth.tar"), "moco")
    state = torch.load(tmp_path / "out.pth.tar", weights_only=True)["state_dict"]
    assert all(name.startswith("module.encoder_q.") for name in state)
    assert torch.equal(state["module.encoder_q.conv1.weight"], tensors["conv1.weight"])


def test_what_scripts_keep_beside_their_weights_is_read(tmp_path, tensors):
    beside = {
        "args": argparse.Namespace(output=PosixPath("runs/x"), name=np.str_("x")),
        "history": collections.defaultdict(list, loss=[1.0]),
        "counts": collections.defaultdict(dict),
        "rng": np.random.get_state(),
    }
    for zipped in (True, False):
        torch.save({"model": tensors, **beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        entries = read_weights(tmp_path / "x.pth").entries
        assert entries["args"].output == PurePosixPath("runs/x") and entries["history"] == {"loss": [1.0]}
        assert np.array_equal(entries["rng"][1], beside["rng"][1])


@pytest.mark.parametrize("name", ["pathlib\nPosixPath", "pathlib\nWindowsPath", "pathlib._local\nWindowsPath"])
def test_paths_of_another_system_or_python(name):
    pickled = b"\x80\x02c" + name.encode() + b"\nX\x01\x00\x00\x00a\x85R."
    with torch.serialization.safe_globals(_harmless()):
        assert torch._weights_only_unpickler.load(io.BytesIO(pickled)) == PurePosixPath("a")


@pytest.mark.parametrize("start", ["<!DOCTYPE html>", "version https://git-lfs", "Not Found", ""])
def test_what_was_downloaded_instead_is_shown(tmp_path, start):
    (tmp_path / "x.pth").write_text(start)
    shown = f"it begins with b'{start}'" if start else "it is empty"
    with pytest.raises(CheckpointError, match=f"is damaged or not a checkpoint: {shown}"):
        read_weights(tmp_path / "x.pth")


def test_simclr_with_its_head_in_the_backbone(tmp_path, tensors):
    """As its best-known script in PyTorch saves it."""
    head = {f"fc.{k}": v for k, v in make_head("simple", 512).items()}
    state = {f"backbone.{k}": v for k, v in {**tensors, **head}.items()}
    torch.save({"epoch": 100, "arch": "resnet18", "state_dict": state}, tmp_path / "x.pth.tar")
    encoder, report = load_pretrained(tmp_path / "x.pth.tar", with_head=True)
    assert (report.head, report.dim, report.loaded) == ("simple", 128, len(state))
    assert torch.equal(encoder.head[2].weight, head["fc.2.weight"])


def test_garbage_is_not_taken_for_a_pickle(tmp_path, tensors):
    for content in (b"no weights in here" * 10, b"\x80\x04\x95" + bytes(100), pickle.dumps(tensors, 4)[:5000]):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
            load_pretrained(tmp_path / "x.pth")
    torch.save(tensors, tmp_path / "x.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="holds a pickle that torch cannot read safely"):
        load_pretrained(tmp_path / "x.pth")


@pytest.mark.parametrize("head", ["linear", "simple", "deep", "wide", "dropout", "simclr"])
def test_tensors_in_any_order(tmp_path, head):
    module = build_head(head, 512, 128)
    saved = {**make_network("resnet18")[0], **{f"fc.{k}": v for k, v in module.state_dict().items()}}
    torch.save({f"module.encoder_q.{k}": v for k, v in reversed(saved.items())}, tmp_path / "x.pth")
    encoder, report = load_pretrained(tmp_path / "x.pth", with_head=True)
    assert (report.arch, report.head, report.dim) == ("resnet18", head, 128)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in encoder.head.state_dict().items())
