"""How the encoders are run is chosen by a clock, alike on all ranks, and trying leaves no trace."""

import copy
import math
from functools import partialmethod

import pytest
import torch
from fake_cuda import fake_cuda, needs_fake_cuda
from ranks import run_ranks
from torch._dynamo.utils import counters

from fastssl.build import compile_and_wrap, make_trainee
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.moco import MoCo
from fastssl.trials import compile_encoders
from fastssl.trials.compile_encoders import choose_by_clock, time_eager, try_compiled
from fastssl.trials.encoder_timing import measure_what_fits

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

    def try_compiled(how, *_):
        compiled.append(how)
        found = times.get(how, "unexpected")
        return (math.inf, f"failed: {found}") if isinstance(found, str) else (found, f"{1e3 * found:.3g} ms")

    def set_clock(launching, eager, **others):
        times.update(others)
        monkeypatch.setattr(compile_encoders, "time_eager", lambda *_: (launching, eager))
        monkeypatch.setattr(compile_encoders, "try_compiled", try_compiled)
        monkeypatch.setattr(compile_encoders, "set_compiled", lambda moco, how: compiled.append(how))
        monkeypatch.setattr(compile_encoders, "forget_compiled", lambda moco: compiled.append("forgotten"))
        monkeypatch.setattr(compile_encoders, "compile_obstacle", lambda device: None)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: pytest.MonkeyPatch.context())
        return compiled

    times = {}
    return set_clock


NO_ROOM = "OutOfMemoryError: no"


@pytest.mark.parametrize(
    ("times", "compiled", "why"),
    [
        ({"launching": 0.010}, ["on"], "eager 30 ms, of which launches 10 ms"),
        ({"graphs": 0.010}, ["graphs"], "CUDA graphs 10 ms"),
        ({"graphs": 0.031, "on": 0.032}, ["graphs", "forgotten", "on", "on"], "CUDA graphs 31 ms, compiled 32 ms"),
        (
            {"graphs": NO_ROOM, "on": 0.02},
            ["graphs", "forgotten", "on", "on"],
            f"failed: {NO_ROOM}, compiled 20 ms",
        ),
        ({"graphs": NO_ROOM, "on": 0.04}, ["graphs", "forgotten", "on", "forgotten"], "compiled 40 ms"),
        ({"graphs": "no", "on": "neither"}, ["graphs", "forgotten", "on", "forgotten"], "compiled failed: neither"),
    ],
    ids=["the GPU binds", "the host binds", "no gain", "no memory", "eager is fastest", "it cannot be compiled"],
)
def test_graphs_are_for_encoders_that_wait_for_the_host(clock, moco, times, compiled, why):
    set_to = clock(**{"launching": 0.029, "eager": 0.030, **times})
    how, told = choose_by_clock(TINY, moco, CUDA)
    assert how == {"forgotten": "off"}.get(compiled[-1], compiled[-1]) and set_to == compiled
    assert told.startswith("measured at the start: ") and why in told


def test_eager_is_no_choice_where_it_was_timed_without_what_makes_it_slow(clock, moco):
    set_to = clock(0.029, 0.030, graphs=NO_ROOM, on=0.04)
    how, _ = choose_by_clock(replace(TINY, bn_splits=2), moco, CUDA)
    assert how == "on" and set_to == ["graphs", "forgotten", "on"]


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"accumulate": 2}, {"sync_bn": True}])
def test_no_clock_decides_where_graphs_cannot_be(clock, monkeypatch, moco, settings):
    set_to = clock(1.0, 1.0)
    monkeypatch.delattr(compile_encoders, "choose_by_clock")
    how, why = compile_encoders.compile_encoders(replace(TINY, device="cuda", **settings), moco, CUDA)
    assert how == "on" and set_to == ["on"] and "CUDA graphs" in why


@pytest.mark.parametrize("how", ["on", "graphs", "off"])
def test_what_is_asked_for_is_done(clock, monkeypatch, moco, how):
    set_to = clock(1.0, 1.0)
    monkeypatch.delattr(compile_encoders, "choose_by_clock")
    assert compile_encoders.compile_encoders(replace(TINY, compile=how), moco, CUDA) == (how, "requested")
    assert set_to == [how]


@pytest.mark.parametrize("how", ["auto", "on", "graphs", "off"])
def test_a_gpu_for_which_nothing_can_be_compiled(clock, monkeypatch, moco, how):
    """In a container without a compiler, say: eager by default, a clear word to who asks for more."""
    set_to = clock(1.0, 1.0)
    monkeypatch.setattr(compile_encoders, "compile_obstacle", lambda device: "Triton cannot start")
    config = replace(TINY, compile=how)
    if how in ("on", "graphs"):
        with pytest.raises(ValueError, match=rf"--compile {how} cannot compile \(Triton .*\): use --compile off"):
            compile_encoders.compile_encoders(config, moco, CUDA)
        return
    why = "Triton cannot start" if how == "auto" else "requested"
    assert compile_encoders.compile_encoders(config, moco, CUDA) == ("off", why) and set_to == ["off"]


def choose_beside_a_failure(rank, world_size):
    """Rank 1 alone fails to record graphs; compiled without, both are fast enough."""

    def time_compiled(config, moco, ranks):
        if len(set_to) == 1 and rank == 1:
            raise OSError("late")
        return 1.0 + 8 * rank

    set_to = []
    compile_encoders.time_eager = lambda *_: (1.0, 1.0 + rank)
    compile_encoders.time_compiled = time_compiled
    compile_encoders.set_compiled = lambda moco, how: set_to.append(how)
    compile_encoders.check_device = lambda *_: None
    torch.random.fork_rng = lambda devices: pytest.MonkeyPatch.context()
    moco = MoCo(torch.nn.Linear(2, 2), 2, 4, 0)
    return choose_by_clock(TINY, moco, CUDA._replace(rank=rank, world_size=world_size)), set_to


def test_a_failure_of_one_rank_is_that_of_all():
    (first, set_to), (second, _) = run_ranks(choose_beside_a_failure, 2)
    assert first == second and set_to == ["graphs", "on", "on"]
    assert first[0] == "on" and first[1].endswith(
        "eager 1e+03 ms, of which launches 1e+03 ms, CUDA graphs failed: OSError: late, compiled 1e+03 ms"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_trying_leaves_no_trace(monkeypatch, moco, fails):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        if fails:
            raise RuntimeError("no graph\nhere")
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_with, backend))
    before, pointers = copy.deepcopy(moco.state_dict()), [b.data_ptr() for b in moco.buffers()]
    seconds, found = try_compiled("graphs", TINY, moco, CPU)
    assert calls and math.isfinite(seconds) is not fails
    assert ("failed: " in found and "RuntimeError" in found and "no graph here" in found) is fails
    assert all(torch.equal(before[name], value) for name, value in moco.state_dict().items())
    assert pointers == [b.data_ptr() for b in moco.buffers()]
    assert all(p.grad is None for p in moco.parameters())
    compile_encoders.forget_compiled(moco)
    calls.clear()
    assert moco.encoder_q(torch.zeros(4, 3, 32, 32)).shape == (4, 8) and not calls


COMPILE = torch.nn.Module.compile


def compile_with(module, compiler, **options):
    """`module.compile` by `compiler`, unless it is to be undone."""
    COMPILE(module, **(options if options.get("disable") else {"backend": compiler}))


@pytest.mark.parametrize("left_out", [0, 1])
def test_what_torch_leaves_out_is_no_graph(monkeypatch, moco, left_out):
    def backend(graph, inputs):
        counters["inductor"]["cudagraph_skips"] += left_out
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_with, backend))
    seconds, found = try_compiled("graphs", TINY, moco, CPU)
    torch.compiler.reset()
    failure = "failed: RuntimeError: torch did not capture all of them; its log says why"
    assert found == (failure if left_out else f"{1e3 * seconds:.3g} ms")


def test_a_gpu_that_the_trial_broke_ends_the_run(monkeypatch, moco):
    def broken(*args, **kwargs):
        raise RuntimeError("capturing")

    monkeypatch.setattr(compile_encoders, "time_compiled", broken)
    monkeypatch.setattr(torch, "rand", broken)
    with pytest.raises(ValueError, match=r"compiling failed \(RuntimeError: capturing\).*use --compile on"):
        try_compiled("graphs", TINY, moco, CPU)


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


@pytest.mark.parametrize(("room", "tried"), [(40, [100, 50, 25]), (100, [100]), (5, [100, 50, 25, 12, 6])])
def test_what_does_not_fit_into_memory_is_measured_with_fewer_images(room, tried):
    """Eager encoders need more memory than compiled ones: a run that has enough must not end before it begins."""
    asked = []

    def measure(images):
        asked.append(images)
        if images > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "measured"

    if room < tried[-1]:
        with pytest.raises(torch.OutOfMemoryError):
            measure_what_fits(measure, 100)
    else:
        assert measure_what_fits(measure, 100) == (tried[-1], "measured")
    assert asked == tried


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
    torch.compiler.reset()  # earlier tests count towards the limit beyond which torch stops compiling
    config = replace(TINY, device="cuda", arch="mobilenetv3_small", batch_size=16, image_size=64, precision="bf16")
    trainee = make_trainee(config, CUDA)
    before = copy.deepcopy(trainee.moco.state_dict())
    trainee = compile_and_wrap(config, trainee, CUDA)
    assert trainee.compiled == "graphs", trainee.why_compiled  # so few images leave any GPU waiting for the host
    assert all(torch.equal(before[name], value) for name, value in trainee.moco.state_dict().items())
