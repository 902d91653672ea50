"""What every test shares: warnings are errors, one thread a process, GPU tests skipped visibly, small fixtures."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite runs one process per core
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once, at its first product on a GPU

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run in Python on the CPU

NO_GPU = "needs a CUDA GPU"


def mend_interpreter() -> None:
    """Makes sums of int32 in Triton's interpreter int32: 3.2 makes them int64, and a store then writes too far."""
    from triton.runtime import interpreter

    to_tensor = interpreter.ReduceOps.to_tensor

    def keep_dtype(self: object, result: np.ndarray, dtype: object) -> object:
        return to_tensor(self, result.astype(interpreter._get_np_dtype(dtype)), dtype)

    interpreter.ReduceOps.to_tensor = keep_dtype


interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
if interpreted and importlib.metadata.version("triton").startswith("3.2."):
    mend_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped, and counted in the summary, without one")
    config.addinivalue_line("filterwarnings", "error")
    # What a library says about its own insides is not ours to mend; what it says about our calls names our module.
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"default::{category}:(?!fastssl|test|conftest|bench|ranks)")
    # float32 products stay in full precision where nobody asks for less; older compilers say so of every GPU
    config.addinivalue_line("filterwarnings", "default:TensorFloat32 tensor cores")
    # what torch says when its check for waits is switched on the first time
    config.addinivalue_line("filterwarnings", "ignore:Synchronization debug mode is a prototype")
    # a bug of the interpreter that the compiler works round
    config.addinivalue_line("filterwarnings", "default:Guards may run slower on Python 3.13.0")
    # numba's finalizer of a function that FFCV compiled fails if the garbage collector clears its dictionary first: it
    # is shown, but not as a failure of the test that happens to run then
    finalizer = "default:Exception ignored in. <finalize object:pytest.PytestUnraisableExceptionWarning"
    config.addinivalue_line("filterwarnings", finalizer)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_collection_finish() -> None:
    if "ranks" in sys.modules:  # of a test that was collected
        sys.modules["ranks"].start_server()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)]
    for reason in sorted(set(reasons)):
        terminalreporter.write_line(f"not run: {reasons.count(reason)} tests, {reason}")


@pytest.fixture(autouse=True)
def undrawn_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw no curves.png: it takes ten times as long as the rest of a small run."""
    if run := sys.modules.get("fastssl.run"):
        monkeypatch.setattr(run, "draw_curves", lambda metrics, picture: None)


@pytest.fixture
def drawn_curves(undrawn_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in a test that asks for this they are drawn, as outside of the tests."""
    from fastssl.curves import draw_curves

    monkeypatch.setattr("fastssl.run.draw_curves", draw_curves)


@pytest.fixture
def nan_poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and its kin return with NaN (integers: the largest), so that unwritten memory shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args, **kwargs) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def make_image_folder() -> Callable[..., Path]:
    """`make_image_folder(root, splits={"train": 8, "val": 4}, classes=3, seed=0)` writes root/<split>/class<c>/<i>.jpg.

    So many JPEGs a class; sides from 24 to 56, portrait and landscape; a colour of the class under noise.
    """

    def make(root: Path, splits: dict[str, int] | None = None, classes: int = 3, seed: int = 0) -> Path:
        random = np.random.default_rng(seed)
        for split, per_class in (splits or {"train": 8, "val": 4}).items():
            for c in range(classes):
                folder = root / split / f"class{c}"
                folder.mkdir(parents=True)
                for i in range(per_class):
                    height, width = random.integers(24, 57, size=2)
                    colour = np.array([80 * c, 200 - 60 * c, 120]) % 256
                    pixels = np.clip(colour + random.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
        return root

    return make


@pytest.fixture
def pretrain_argv(capsys) -> Iterator[Callable[..., tuple[int | str | None, str]]]:
    """`pretrain_argv(argv)` -> (exit code, what was said), in this process, with its signal handlers put back."""
    from fastssl import train
    from fastssl.command import run_command

    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def pretrain(argv: list[str]) -> tuple[int | str | None, str]:
        try:
            code = run_command(train.main, argv)
        except SystemExit as stop:  # the command line itself is wrong
            code = stop.code
        return code, capsys.readouterr().err

    yield pretrain
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def image_folder(make_image_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (24 JPEGs) and val/ (12), three classes; shared by the session, so only to be read."""
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def by_ffcv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files FFCV's own writer made of `betons.FFCV_PHOTOS` (`ffcv_writer.MODES`); only to be read."""
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("needs ffcv")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("FFCV's writer waits for ever on a single core")
    from betons import FFCV_PHOTOS

    folder = tmp_path_factory.mktemp("ffcv")
    np.savez(folder / "photos.npz", *FFCV_PHOTOS)
    command = [sys.executable, str(Path(__file__).with_name("ffcv_writer.py")), str(folder)]
    for _ in range(3):  # FFCV's writer now and then waits for ever: its worker is forked beside OpenCV's threads
        writer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            assert writer.wait(timeout=40) == 0
            return folder
        except subprocess.TimeoutExpired:
            os.killpg(writer.pid, signal.SIGKILL)
            writer.wait()
    raise AssertionError("FFCV's own writer hung three times")
