"""What is chosen for the machine at the start of a run: memory format, precision, the queue's dtype, kept memory."""

import copy

import pytest
import torch
from ranks import run_ranks

from fastssl.build import choose_queue_dtype, make_trainee
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.machine.host_memory import keep_freed_memory
from fastssl.machine.precision import bf16_unit, explain_precision
from fastssl.models.encoders import make_encoder
from fastssl.resume import keep_layout
from fastssl.trials import layout
from fastssl.trials.layout import LAYOUT_NAMES, choose_layout

CPU = Ranks(0, 1, torch.device("cpu"))
TINY = replace(Config(), arch="resnet18", image_size=32, batch_size=4, queue_size=16, dim=8, device="cpu")
NHWC, NCHW = torch.channels_last, torch.contiguous_format


def seconds(nhwc, nchw):
    return lambda *_: {NHWC: nhwc, NCHW: nchw}


@pytest.mark.parametrize(("nchw", "expected"), [(0.5, NCHW), (0.95, NHWC), (2.0, NHWC)])
def test_the_rule_stands_unless_the_other_is_clearly_faster(monkeypatch, nchw, expected):
    monkeypatch.setattr(layout, "time_layouts", seconds(1.0, nchw))
    chosen, why = choose_layout(TINY, torch.nn.Identity(), CPU)
    assert chosen == expected
    assert "channels_last 1e+03 ms" in why and "contiguous" in why


def test_no_clock_decides_a_deterministic_run_nor_one_that_was_told(monkeypatch):
    monkeypatch.delattr(layout, "time_layouts")
    assert choose_layout(replace(TINY, deterministic=True), torch.nn.Identity(), CPU)[0] == NHWC
    assert choose_layout(replace(TINY, channels_last="on"), torch.nn.Identity(), CPU) == (NHWC, "requested")
    assert choose_layout(replace(TINY, channels_last="off"), torch.nn.Identity(), CPU) == (NCHW, "requested")


def test_no_clock_waits_for_imitated_arithmetic(monkeypatch):
    """Measuring DeiT-Tiny at 32 pixels took minutes, before the first line of the log."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(layout, "time_layouts", seconds(1.0, 0.5))
    layout_of = {p: choose_layout(replace(TINY, precision=p), torch.nn.Identity(), CPU) for p in ("bf16", "fp32")}
    assert layout_of["bf16"] == (NHWC, "not measured, since bf16 is slow here") and layout_of["fp32"][0] == NCHW
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_layout(replace(TINY, precision="bf16"), torch.nn.Identity(), CPU)[0] == NCHW


def choose_by_a_clock_of_its_own(rank, world_size):
    layout.time_layouts = seconds(1.0, 0.5 if rank == 0 else 2.0)
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    return LAYOUT_NAMES[choose_layout(TINY, torch.nn.Identity(), ranks)[0]]


def test_all_ranks_take_what_the_first_measured():
    assert run_ranks(choose_by_a_clock_of_its_own, 2) == ["contiguous", "contiguous"]


@pytest.mark.parametrize("bn_splits", [1, 2])
def test_measuring_leaves_no_trace(bn_splits):
    encoder = make_encoder("resnet18", head="dropout", dim=8).train()
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    chosen, why = choose_layout(replace(TINY, bn_splits=bn_splits), encoder, CPU)
    assert chosen in LAYOUT_NAMES and why.startswith("measured at the start: ")
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in encoder.parameters())


def test_weights_and_views_take_the_format():
    trainee = make_trainee(replace(TINY, channels_last="off"), CPU)
    assert trainee.moco.memory_format == NCHW
    assert trainee.moco.encoder_q.backbone.conv1.weight.is_contiguous()
    trainee.moco.set_memory_format(NHWC)
    for encoder in (trainee.moco.encoder_q, trainee.moco.encoder_k):
        assert encoder.backbone.conv1.weight.is_contiguous(memory_format=NHWC)


def test_a_restart_keeps_the_format_of_the_run_unless_told_otherwise():
    moco = make_trainee(replace(TINY, channels_last="on"), CPU).moco
    assert keep_layout(moco, {"layout": "contiguous"}, TINY) == ["the encoders stay contiguous, as in the checkpoint"]
    assert moco.memory_format == NCHW and moco.encoder_q.backbone.conv1.weight.is_contiguous()
    assert keep_layout(moco, {"layout": "contiguous"}, TINY) == []
    assert keep_layout(moco, {"layout": "channels_last"}, replace(TINY, channels_last="off")) == []
    assert keep_layout(moco, {}, TINY) == []  # a checkpoint of before it was written down
    assert moco.memory_format == NCHW


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True, "avx512_bf16": False}, "fp32")],
)
def test_precision_follows_what_the_cpu_multiplies(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    precision, why = explain_precision("auto", CPU.device)
    assert precision == expected
    assert (bf16_unit() or "no 16-bit arithmetic on this cpu") in why
    assert explain_precision("fp32", CPU.device) == ("fp32", "requested")
    slow = ", though slow: this CPU imitates bf16" if expected == "fp32" else ""
    assert explain_precision("bf16", CPU.device) == ("bf16", f"requested{slow}")


def test_a_torch_that_cannot_tell_computes_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert explain_precision("auto", CPU.device)[0] == "fp32"
    assert explain_precision("bf16", CPU.device) == ("bf16", "requested")


def test_the_queue_stays_fp32_on_a_cpu():
    assert choose_queue_dtype(replace(TINY, precision="bf16"), CPU.device) == torch.float32
    assert choose_queue_dtype(replace(TINY, queue_dtype="bf16"), CPU.device) == torch.bfloat16


def test_freed_memory_stays_with_the_process():
    """A later tensor lies on pages that were written before, those beyond it aside: it causes few page faults.

    Each is larger than all before, or glibc would keep its memory by itself; the first few may not find room together.
    """
    resource = pytest.importorskip("resource")
    if not keep_freed_memory():
        pytest.skip("not glibc: there is nothing to tell")
    shares = []
    for megabytes in range(8, 32):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(megabytes * 2**18)
        shares.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (megabytes * 256))  # of its pages
    assert min(shares) < 1 / 4
