"""`fastssl doctor` on this machine, and on machines made up of broken, crashing and missing libraries."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import doctor
from fastssl.machine import imports

ROOT = Path(__file__).parents[1]


def run_doctor(tmp_path, fakes=(), path=None, arguments=("--json",)):
    """Runs the command with fake modules (name -> source) in front of the real ones; its exit code and output."""
    for name, source in dict(fakes).items():
        (tmp_path / f"{name}.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    if path is not None:
        environment["PATH"] = path
    command = [sys.executable, "-m", "fastssl.doctor", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    return done.returncode, done.stdout


# Everything heavy is faked, so that a report takes a second.
LIGHT = {name: "__version__ = '99.9'" for name in (*imports.REQUIRED, "triton", "nvidia", "apex")}
LIGHT["torch"] = """
__version__ = "99.9"
class version: cuda = "13.0"
class cuda:
    def is_available(): return False
"""
LIGHT["ffcv"] = "raise ImportError('Numba needs NumPy 2.4 or less.')"


def report(tmp_path, **fakes):
    code, output = run_doctor(tmp_path, {**LIGHT, **fakes}, path=str(tmp_path / "empty"))
    answer = json.loads(output)
    return code, answer["can_train"], {row["name"]: row for row in answer["rows"]}


def test_broken_and_missing_optional_parts_are_reported_with_their_cure(tmp_path):
    code, can_train, rows = report(tmp_path)
    assert (code, can_train) == (0, True)
    assert rows["torch"]["detail"] == "99.9"
    assert "Numba needs NumPy 2.4 or less." in rows["FFCV"]["detail"]
    assert rows["FFCV"]["mend"].startswith("sudo apt-get install -y pkg-config libturbojpeg0-dev libopencv-dev && ")
    assert rows["FFCV"]["mend"].endswith(f"{sys.executable} -m pip install ffcv")
    assert rows["DALI"]["state"] == "absent"
    assert rows["DALI"]["mend"].endswith("pip install nvidia-dali-cuda130"), "torch is built for CUDA 13"
    assert rows["torch.compile"]["detail"] == "no C compiler" and "apt-get" in rows["torch.compile"]["mend"]
    assert "another project" in rows["NVIDIA apex"]["mend"]


def test_dali_follows_the_cuda_version_of_torch(tmp_path):
    _, _, rows = report(tmp_path, torch=LIGHT["torch"].replace("13.0", "12.8"))
    assert rows["DALI"]["mend"].endswith("pip install nvidia-dali-cuda120")


@pytest.mark.parametrize(
    ("fakes", "name", "detail"),
    [
        ({"yaml": "raise ImportError('no libyaml')"}, "PyYAML", "ImportError: no libyaml"),
        ({"torch": "import os; os._exit(7)"}, "torch", "importing it ended Python with code 7"),
        ({"timm": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"}, "timm", "with code -11"),
        ({"torch": LIGHT["torch"].replace("99.9", "2.4.1+cu121")}, "torch", "2.4.1+cu121, but 2.6 or later is needed"),
    ],
)
def test_a_broken_required_library_is_named_and_stops_training(tmp_path, fakes, name, detail):
    code, can_train, rows = report(tmp_path, **fakes)
    assert (code, can_train) == (1, False)
    assert rows[name]["state"] == "broken"
    assert detail in rows[name]["detail"]
    assert re.search(r"-m pip install --upgrade .*" + name, rows[name]["mend"])
    if name == "timm":
        assert rows["torch"]["state"] == "ok", "what was imported before the crash is known"


def test_an_import_that_hangs_is_reported(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert imports.try_imports([["json", "sleeper"]], timeout=2)["sleeper"] == {"error": "importing it took over 2 s"}


def test_this_machine(tmp_path):
    code, output = run_doctor(tmp_path, arguments=())
    assert code == 0
    assert "\033" not in output, "no colours outside a terminal"
    assert re.search(r"^ok  torch +\d+\.\d+", output, re.MULTILINE)
    assert output.endswith("Training can run.\n")
    for name, module in (("FFCV", "ffcv"), ("DALI", "nvidia.dali")):
        installed = importlib.util.find_spec(module.split(".")[0]) and importlib.util.find_spec(module)
        assert re.search(rf"^ok  {name} ", output, re.MULTILINE) or not installed
        assert installed or re.search(rf"^--  {name} .*\n +-> .*pip install ", output, re.MULTILINE)


def test_a_gpu_that_torch_cannot_use_is_not_silent(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.gpu_rows({"cuda": "13.0"})[0].mend == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    old = "The NVIDIA driver on your system is too old (found version 12040)"
    for facts in ({"cuda": "13.0"}, {"cuda": "13.0", "no_gpu": old}):
        (row,) = doctor.gpu_rows(facts)
        assert facts.get("no_gpu", "driver may be too old") in row.detail and "/whl/cu126" in row.mend
    (row,) = doctor.gpu_rows({"cuda": "13.0", "no_gpu": "No CUDA GPUs are available"})
    assert "No CUDA GPUs are available" in row.detail and "--gpus all" in row.mend, "no other torch would find one"
    assert "without CUDA" in doctor.gpu_rows({"cuda": ""})[0].detail


def test_a_gpu_that_torch_has_no_kernels_for_is_named(tmp_path):
    """As torch itself does: it warns at the first use of CUDA."""
    old = """
__version__ = "99.9"
import types, warnings
class version: cuda = "13.2"
class backends:
    class cudnn: version = lambda: 92000
class cuda:
    is_available = lambda: True
    device_count = lambda: 1
    get_device_properties = lambda i: types.SimpleNamespace(name="V100", total_memory=2**34, major=7, minor=0)
    def init(): warnings.warn("Found GPU0 V100 which is of compute capability (CC) 7.0.\\nThe following list")
"""
    _, can_train, rows = report(tmp_path, torch=old)
    assert can_train and rows["GPU"]["state"] == "absent"
    assert rows["GPU"]["detail"].endswith("torch: Found GPU0 V100 which is of compute capability (CC) 7.0.")
    assert "torch.cuda.init()" in rows["GPU"]["mend"]
    known = re.sub("def init.*", "init = print", old)
    assert report(tmp_path, torch=known)[2]["GPU"] == {
        "name": "GPU",
        "state": "ok",
        "detail": "V100, 16 GiB, sm_70",
        "mend": "",
    }


@pytest.mark.parametrize("language", ["C", "C++"])
def test_each_compiler_is_tried(monkeypatch, tmp_path, language):
    """Python's headers are missing where there is no python3-dev; a compiler may be named by a variable."""
    variable = {"C": "CC", "C++": "CXX"}[language]
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'probe:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, str(compiler))
    row = doctor.compile_row()
    assert row.detail == f"{compiler} cannot build a Python extension: probe:1: fatal error: Python.h: No such file"
    assert row.state == doctor.ABSENT and f"python3.{sys.version_info.minor}-dev" in row.mend
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "")
    assert doctor.try_compiler(language) == ("", f"no {language} compiler")


def test_the_package_manager_is_the_one_that_is_there(tmp_path):
    """Clusters often run Red Hat's family, where nothing is called as on Debian."""
    (tmp_path / "dnf").write_text("")
    (tmp_path / "dnf").chmod(0o755)
    code, output = run_doctor(tmp_path, LIGHT, path=str(tmp_path))
    mends = {row["name"]: row["mend"] for row in json.loads(output)["rows"]}
    assert code == 0 and mends["FFCV"].startswith(
        "sudo dnf install -y pkgconf-pkg-config turbojpeg-devel opencv-devel && "
    )
    headers = f"python3.{sys.version_info.minor}-devel"
    assert mends["torch.compile"].startswith(f"sudo dnf install -y gcc-c++ {headers}  # ")
    assert "apt-get" not in output


def test_required_libraries_and_commands_agree_with_setup_py():
    """setup.py is the one place for requirements; the doctor repeats only names."""
    text = (ROOT / "setup.py").read_text()
    required = text[text.index("REQUIRES = [") : text.index("]\nEXTRAS")]
    names = set(re.findall(r'^    "([A-Za-z-]+)', required, re.MULTILINE)) - {"triton", "numba"}  # one can do without
    assert names == set(imports.REQUIRED.values())


def test_colours_mark_the_state():
    rows = [doctor.Row("a", doctor.OK, "fine"), doctor.Row("longer", doctor.BROKEN, "bad", "mend it")]
    assert doctor.table(rows, colour=False) == "ok  a       fine\n!!  longer  bad\n            -> mend it"
    assert "\033[31m!!\033[0m  longer" in doctor.table(rows, colour=True)
