"""What pip installs: every file of the package and no other, importable without the clone, from an sdist too."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_ALL = """
import importlib, pathlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import fastssl
print(pathlib.Path(fastssl.__file__).parents[1])
"""


def run(*command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git tracks, links kept; building in the real one would leave files behind."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git clone")
    folder = tmp_path_factory.mktemp("clone")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.exists():
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    """The wheel pip builds, with the setuptools of this environment: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", str(folder), ".", cwd=clone, PIP_DISABLE_PIP_VERSION_CHECK="1")
    return next(folder.glob("fastssl_pretrain-*.whl"))


def expected_files(clone):
    """Paths in the wheel: fastssl/ as it is, the linked folders below it, recipes with their Slurm scripts."""
    files = {f"fastssl/{path.relative_to(clone / 'fastssl')}" for path in (clone / "fastssl").rglob("*.py")}
    for folder, patterns in {
        "kernels": ["*.py"],
        "data_prep": ["*.py", "*.txt"],
        "recipes": ["*.yaml", "slurm/*"],
    }.items():
        files |= {
            f"fastssl/{path.relative_to(clone)}" for pattern in patterns for path in (clone / folder).glob(pattern)
        }
    return files


def modules_of(files):
    """Module names; without fastssl.__main__, which is the command itself."""
    files = [name for name in files if name.endswith(".py") and not name.endswith("__main__.py")]
    return sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files)


def test_the_wheel_holds_the_package_and_nothing_else(clone, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == expected_files(clone)
    entry_points = next(name for name in names if name.endswith("/entry_points.txt"))
    assert "fastssl = fastssl.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_works_without_the_clone(clone, wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    modules = modules_of(expected_files(clone))
    where = run(sys.executable, "-c", IMPORT_ALL, *modules, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert where.strip() == str(tmp_path / "site")


def test_the_links_work_in_a_clone_that_is_not_installed(clone):
    linked = [
        name for name in modules_of(expected_files(clone)) if name.split(".")[1:2] in (["kernels"], ["data_prep"])
    ]
    assert run(sys.executable, "-c", IMPORT_ALL, *linked, cwd=clone, PYTHONPATH="").strip() == str(clone)


def test_a_wheel_from_the_sdist_is_the_same(clone, wheel, tmp_path):
    """An sdist carries no links: `package_dir` alone must find the linked folders."""
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=clone, PYTHONWARNINGS="ignore")
    sdist = next(tmp_path.glob("fastssl_pretrain-*.tar.gz"))
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", str(tmp_path), str(sdist), cwd=tmp_path, PIP_DISABLE_PIP_VERSION_CHECK="1")
    again = next(tmp_path.glob("fastssl_pretrain-*.whl"))
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())
