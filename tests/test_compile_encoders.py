"""How the encoders are run is chosen by a clock, alike on all ranks, and trying leaves no trace."""

import copy
from functools import partialmethod

import pytest
import torch
from fake_cuda import fake_cuda, needs_fake_cuda
from ranks import run_ranks
from torch._dynamo.utils import counters

from fastssl import compile_encoders
from fastssl.build import compile_and_wrap, make_trainee
from fastssl.compile_encoders import choose_by_clock, time_eager, try_graphs
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.moco import MoCo

CPU = Ranks(0, 1, torch.device("cpu"))
CUDA = CPU._replace(device=torch.device("cuda", 0))
TINY = replace(
    Config(),
    **{"arch": "resnet18", "image_size": 32, "batch_size": 4, "queue_size": 16, "dim": 8, "device": "cpu"},
    **{"channels_last": "on", "precision": "fp32"},
)


class Encoder(torch.nn.Module):
    """Batch statistics, dropout, and a projection."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.Dropout(),
            torch.nn.Flatten(),
            torch.nn.LazyLinear(8),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def moco():
    encoder = Encoder()
    encoder(torch.zeros(4, 3, 32, 32))
    return MoCo(encoder, 8, 16, 0).train()


@pytest.fixture
def clock(monkeypatch):
    """Sets what the clock says; the list it returns is how the encoders were set to compile."""
    compiled = []

    def set_clock(launching, eager, graphs=None, failure=""):
        monkeypatch.setattr(compile_encoders, "time_eager", lambda *_: (launching, eager))
        monkeypatch.setattr(compile_encoders, "try_graphs", lambda *_: compiled.append("graphs") or (graphs, failure))
        monkeypatch.setattr(compile_encoders, "set_compiled", lambda moco, how: compiled.append(how))
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: pytest.MonkeyPatch.context())
        return compiled

    return set_clock


@pytest.mark.parametrize(
    ("times", "compiled", "why"),
    [
        ((0.010, 0.030), ["on"], "eager 30 ms, of which launches 10 ms"),
        ((0.030, 0.030, 0.010), ["graphs"], "CUDA graphs 10 ms"),
        ((0.020, 0.030, 0.031), ["graphs", "on"], "CUDA graphs 31 ms"),
        ((0.030, 0.030, 0.0, "OutOfMemoryError: no"), ["graphs", "on"], "CUDA graphs failed: OutOfMemoryError"),
    ],
    ids=["the GPU binds", "the host binds", "no gain", "no memory"],
)
def test_graphs_are_for_encoders_that_wait_for_the_host(clock, moco, times, compiled, why):
    set_to = clock(*times)
    how, told = choose_by_clock(TINY, moco, CUDA)
    assert how == compiled[-1] and set_to == compiled
    assert told.startswith("measured at the start: ") and why in told


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"accumulate": 2}, {"sync_bn": True}])
def test_no_clock_decides_where_graphs_cannot_be(clock, monkeypatch, moco, settings):
    set_to = clock(1.0, 1.0, 0.1)
    monkeypatch.delattr(compile_encoders, "choose_by_clock")
    how, why = compile_encoders.compile_encoders(replace(TINY, device="cuda", **settings), moco, CUDA)
    assert how == "on" and set_to == ["on"] and "CUDA graphs" in why


@pytest.mark.parametrize("how", ["on", "graphs", "off"])
def test_what_is_asked_for_is_done(clock, monkeypatch, moco, how):
    set_to = clock(1.0, 1.0, 0.1)
    monkeypatch.delattr(compile_encoders, "choose_by_clock")
    assert compile_encoders.compile_encoders(replace(TINY, compile=how), moco, CUDA) == (how, "requested")
    assert set_to == [how]


def choose_beside_a_failure(rank, world_size):
    compile_encoders.time_eager = lambda *_: (1.0, 1.0 + rank)
    compile_encoders.try_graphs = lambda *_: (0.1, "CudaError: late" * rank)
    compile_encoders.set_compiled = lambda moco, how: None
    torch.random.fork_rng = lambda devices: pytest.MonkeyPatch.context()
    return choose_by_clock(TINY, None, CUDA._replace(rank=rank, world_size=world_size))


def test_a_failure_of_one_rank_is_that_of_all():
    first, second = run_ranks(choose_beside_a_failure, 2)
    assert first == second and first[0] == "on" and "eager 1e+03 ms" in first[1] and "CudaError: late" in first[1]


@pytest.mark.parametrize("fails", [False, True])
def test_trying_leaves_no_trace(monkeypatch, moco, fails):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        if fails:
            raise RuntimeError("no graph\nhere")
        return graph

    def set_compiled(moco, how):
        for encoder in (moco.encoder_q, moco.encoder_k):
            encoder.compile(backend=backend)

    monkeypatch.setattr(compile_encoders, "set_compiled", set_compiled)
    before, pointers = copy.deepcopy(moco.state_dict()), [b.data_ptr() for b in moco.buffers()]
    seconds, failure = try_graphs(TINY, moco, CPU)
    torch.compiler.reset()
    assert calls and (seconds > 0) is not fails and ("RuntimeError" in failure and "no graph here" in failure) is fails
    assert all(torch.equal(before[name], value) for name, value in moco.state_dict().items())
    assert pointers == [b.data_ptr() for b in moco.buffers()]
    assert all(p.grad is None for p in moco.parameters())


@pytest.mark.parametrize("left_out", [0, 1])
def test_what_torch_leaves_out_is_no_graph(monkeypatch, moco, left_out):
    def backend(graph, inputs):
        counters["inductor"]["cudagraph_skips"] += left_out
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    monkeypatch.setattr(compile_encoders, "MODES", {"graphs": None})
    failure = try_graphs(TINY, moco, CPU)[1]
    torch.compiler.reset()
    assert failure == "RuntimeError: torch did not capture all of them; its log says why" * left_out


def test_a_gpu_that_the_trial_broke_ends_the_run(monkeypatch, moco):
    def broken(*args, **kwargs):
        raise RuntimeError("capturing")

    monkeypatch.setattr(compile_encoders, "time_graphs", broken)
    monkeypatch.setattr(torch, "rand", broken)
    with pytest.raises(ValueError, match=r"CUDA graphs failed \(RuntimeError: capturing\).*use --compile on"):
        try_graphs(TINY, moco, CPU)


def test_the_host_is_timed_with_few_images_and_the_device_with_all(monkeypatch, moco):
    sizes = []

    def make_iteration(config, encoder, images, layout):
        sizes.append(images)
        return lambda: None

    monkeypatch.setattr(compile_encoders, "make_eager_iteration", make_iteration)
    monkeypatch.setattr(compile_encoders, "time_iterations", lambda iterations: {n: float(n) for n in iterations})
    config = replace(TINY, batch_size=1024, image_size=224)
    assert time_eager(config, moco, CUDA) == (8.0, 1024.0) and sorted(sizes) == [8, 256]
    assert time_eager(replace(TINY, batch_size=4), moco, CUDA) == (4.0, 4.0)


@needs_fake_cuda
def test_the_iterations_run_on_the_device():
    with fake_cuda() as fake:
        moco = make_trainee(replace(TINY, device="cuda", batch_size=16), CUDA._replace(device=fake.device)).moco
        launching, eager = time_eager(replace(TINY, batch_size=16), moco, CUDA)
    assert launching > 0 and eager > 0


def test_graphs_are_refused_where_they_cannot_be():
    with pytest.raises(ValueError, match="--compile graphs and --accumulate"):
        replace(Config(), compile="graphs", accumulate=2)
    config = replace(TINY, compile="graphs")
    with pytest.raises(ValueError, match="use --compile on"):
        compile_and_wrap(config, make_trainee(config, CPU), CPU)


@pytest.mark.gpu
def test_the_clock_of_a_gpu_chooses():
    config = replace(TINY, device="cuda", arch="mobilenetv3_small", batch_size=16, image_size=64, precision="bf16")
    trainee = make_trainee(config, CUDA)
    before = copy.deepcopy(trainee.moco.state_dict())
    trainee = compile_and_wrap(config, trainee, CUDA)
    assert trainee.compiled == "graphs", trainee.why_compiled  # so few images leave any GPU waiting for the host
    assert all(torch.equal(before[name], value) for name, value in trainee.moco.state_dict().items())
