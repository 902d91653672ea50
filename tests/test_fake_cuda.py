"""The training step, its parts and the evaluations on a CUDA device that is not there: one device, no waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda, HostWaits, fake_cuda, needs_fake_cuda

from fastssl.augment.policy import Policy, make_policy
from fastssl.augment.views import make_views
from fastssl.batch import ImageBatch
from fastssl.build import make_trainee
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.eval import nearest
from fastssl.eval.features import extract_features
from fastssl.eval.linear_cached import Setting, Sweep, fit_linear
from fastssl.health import Health
from fastssl.losses import LossConfig, moco_loss
from fastssl.models.encoders import make_encoder
from fastssl.plan import make_plan
from fastssl.train import make_train_step
from fastssl.trials.layout import LAYOUT_NAMES, choose_layout

pytestmark = needs_fake_cuda
TINY = {
    **{"device": "cuda", "arch": "resnet18", "image_size": 32, "batch_size": 4, "queue_size": 6, "dim": 32},
    **{"policy": "none", "augment_kernel": "reference", "loss_kernel": "tiled", "compile": "off", "epochs": 4},
}  # the kernels in PyTorch: a launch of Triton cannot be faked


def batch_on(device: torch.device, count: int = 4, side: int = 40) -> ImageBatch:
    index = torch.arange(count, device=device)
    sides = torch.full((count,), side, dtype=torch.int32, device=device)
    pixels = torch.zeros(count * side**2 * 3, dtype=torch.uint8, device=device)
    return ImageBatch(pixels, index * side**2 * 3, sides, sides, index, index, side)


def blank_views(
    batch: ImageBatch, policy: Policy, size: int, seed: int, epoch: int, dtype: torch.dtype, *_: object
) -> list[torch.Tensor]:
    """Black views: those of the reference, of thousands of small operations, have a test of their own."""
    return [torch.zeros(batch.size, 3, size, size, dtype=dtype, device=batch.pixels.device) for _ in range(2)]


def run_steps(fake: FakeCuda, config: Config, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Two steps, the second of which must not wait."""
    ranks = Ranks(0, world_size, fake.device)
    trainee, policy = make_trainee(config, ranks._replace(world_size=1)), make_policy(config.augment.policy)
    train_step = make_train_step(config, make_plan(config, 2), trainee, policy, ranks, Health(ranks))
    batch = batch_on(fake.device, config.train.batch_size)
    with mock.patch("fastssl.train.check_loss_inputs"):  # it waits, once in a run
        train_step(batch, 0)
    with fake.no_waiting():
        metrics = train_step(batch, 1)
    assert all(parameter.device == fake.device for parameter in trainee.moco.parameters())
    return metrics


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "clip_grad": 1.0},
        {"precision": "fp16", "clip_grad": 1.0, "accumulate": 2, "batch_size": 8, "bn_splits": 2},
        {"precision": "fp32", "optimizer": "adamw", "channels_last": "off", "bn_splits": 2},
        {"precision": "fp16", "optimizer": "adamw", "arch": "mobilenetv3_small", "head": "dropout"},
        {"optimizer": "lars", "contrast_weight": 1.0, "loss_kernel": "reference"},
        {"sync_bn": True, "symmetric": True},
        {"arch": "deit_tiny", "exclude_norm_bias": True, "lr_schedule": "cosine", "ema_schedule": "cosine"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_step_stays_on_the_device_and_never_waits(settings: dict[str, object]) -> None:
    config = replace(Config(), **({"channels_last": "on"} | TINY | settings))
    with fake_cuda() as fake, mock.patch("fastssl.train.make_views", blank_views):
        metrics = run_steps(fake, config)
    assert {"loss", "feature_std"} <= metrics.keys()
    assert all(value.device == fake.device and value.ndim == 0 for value in metrics.values())


@pytest.mark.parametrize("channels_last", ["on", "off"])
def test_keys_of_two_ranks_arrive_as_bytes_and_are_normalised_without_waiting(channels_last: str) -> None:
    arrived = []

    def shuffle(x: torch.Tensor, order: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        arrived.append((x.dtype, x.device.type))
        return x

    others = {"shuffle_rows": shuffle, "unshuffle_keys": lambda k, order, ranks: k.repeat(2, 1)}  # nobody is there
    with fake_cuda() as fake, mock.patch.multiple("fastssl.train", **others):
        run_steps(fake, replace(Config(), **(TINY | {"channels_last": channels_last})), world_size=2)
    assert arrived == [(torch.uint8, "cuda")] * 2


def test_the_memory_format_is_measured_on_the_device() -> None:
    with fake_cuda() as fake:
        encoder = make_encoder("resnet18", dim=8).to(fake.device)
        chosen, why = choose_layout(replace(Config(), **TINY), encoder, Ranks(0, 1, fake.device))
    assert chosen in LAYOUT_NAMES and "measured" in why


def test_a_scaler_that_waits_is_noticed() -> None:
    """LARS under fp16, of which a run says that every step waits."""
    config = replace(Config(), **(TINY | {"channels_last": "on", "optimizer": "lars", "precision": "fp16"}))
    with fake_cuda() as fake, pytest.raises(HostWaits, match="_local_scalar_dense reads numbers"):
        run_steps(fake, config)


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        (lambda x: x.sum().item(), "reads numbers"),
        (lambda x: x.tolist(), "_to_copy from cuda:0|reads numbers"),
        (lambda x: x[x > 0], "reads numbers"),
        (lambda x: bool(x.isfinite().all()), "reads numbers"),
        (lambda x: x.cpu(), "_to_copy from cuda:0"),
        (lambda x: torch.tensor([1.0]).to(x.device, non_blocking=True), "_to_copy from cpu"),
        (lambda x: torch.tensor([1.0]).pin_memory().to(x.device), "_to_copy from cpu"),
        (lambda x: x[torch.tensor([0, 1])], "takes a tensor of the host"),
    ],
)
def test_whatever_makes_the_host_wait_is_noticed(wait, message: str) -> None:
    with fake_cuda() as fake:
        x = torch.ones(3, device=fake.device)
        with fake.no_waiting(), pytest.raises(HostWaits, match=message):
            wait(x)


def test_what_does_not_wait_is_let_through_and_two_devices_are_not() -> None:
    with fake_cuda() as fake:
        x = torch.ones(3, device=fake.device)
        with fake.no_waiting():
            index = torch.tensor([0, 1]).pin_memory().to(fake.device, non_blocking=True)
            assert torch.where(x[index] > 0, 1.0, x[index]).mul(2).device == fake.device
        with pytest.raises(RuntimeError, match=r"two d.* cuda:0.* cpu"):
            x + torch.ones(3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("v1", {}), ("v2", {"crop_iou": (0.2, 0.5)}), ("small", {"solarise_p": 0.4, "hide_and_seek": True})],
)
def test_views_of_the_reference_never_wait(name: str, changes: dict[str, object]) -> None:
    with fake_cuda() as fake:
        batch = batch_on(fake.device)
        with fake.no_waiting():
            views = make_views(batch, make_policy(name, **changes), 32, 0, 0, torch.bfloat16, "reference")
    for view in views:
        assert (view.shape, view.dtype, view.device) == ((4, 3, 32, 32), torch.bfloat16, fake.device)
        assert view.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", ["reference", "tiled"])
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_never_wait(kernel: str, queue_dtype: torch.dtype) -> None:
    alone = {"contrast_weight": 1.0, "align_weight": 0.0, "uniform_weight": 0.0}
    mixes = [{"contrast_weight": 1.0}, alone, {"align_alpha": 1.5, "intra_batch": False}]
    for config in (LossConfig(**mix) for mix in mixes):
        with fake_cuda() as fake:
            q, k, queue = (F.normalize(torch.randn(n, 32, device=fake.device), dim=1) for n in (6, 6, 40))
            with fake.no_waiting():
                moco_loss(q.requires_grad_(), k, queue.to(queue_dtype), config, kernel).total.backward()
            assert q.grad.device == fake.device and q.grad.shape == q.shape


def test_evaluations_stay_on_the_device() -> None:
    with fake_cuda() as fake:
        backbone = make_encoder("resnet18").to(fake.device).backbone
        batches = (batch_on(fake.device, count) for count in (4, 3))
        features, labels = extract_features(
            backbone, batches, size=32, resize=36, device=fake.device, dtype=torch.bfloat16
        )
        assert features.shape == (7, 512) and {features.device, labels.device} == {fake.device}
        for bank in (torch.randn(3000, 16), torch.randn(3000, 16, device=fake.device)):
            queries = torch.randn(5, 16, device=fake.device)
            centre = nearest.bank_mean(bank, fake.device)
            index = nearest._nominate(bank, queries, centre, 37, 512)[1]
            assert nearest._measure(bank, queries, index)[0].device == fake.device
            assert nearest._nominate_by_differences(bank, queries.double(), 37, 512).device == fake.device


def test_a_linear_sweep_copies_once_an_epoch() -> None:
    copies = []
    for batch_size in (100, 10):
        with fake_cuda() as fake:
            features, labels = torch.randn(600, 16, device=fake.device), torch.randint(0, 7, (600,))
            sweep = Sweep(epochs=2, batch_size=batch_size)
            fit_linear(features, labels, 7, [Setting(0.1, 0.0), Setting(0.2, 1e-4)], sweep, device=fake.device)
            copies.append(fake.waits)
    assert copies[0] == copies[1] > 0


def test_kernels_compile_as_they_are_launched() -> None:
    command = [sys.executable, str(Path(__file__).with_name("compile_launches.py"))]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed = {"*bf16", "*u8", "i64", "constexpr"}, {"*bf16", "*fp16", "*i32"}
    for lines, types in zip(done.stdout.split("\n\n"), needed, strict=True):  # of the views, of the loss
        launches = [json.loads(line) for line in lines.splitlines()]
        assert len({launch["kernel"] for launch in launches}) == 4
        assert all(launch["shared"] <= 227 * 1024 for launch in launches)  # what a program may have on an H200
        assert {kind for launch in launches for kind in launch["types"]} >= types
