"""The C and C++ compilers that Triton and torch.compile run while a program trains, tried on a small file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

VARIABLES = {"C": "CC", "C++": "CXX"}
COMMANDS = {"C": ("gcc", "clang"), "C++": ("g++", "clang++")}
SUFFIXES = {"C": ".c", "C++": ".cpp"}


def try_compiler(language: str) -> tuple[str, str]:
    """(the compiler for "C" or "C++", "") or ("", why no Python extension can be built with it, in a few words)."""
    compiler = os.environ.get(VARIABLES[language]) or next(filter(None, map(shutil.which, COMMANDS[language])), None)
    if compiler is None:
        return "", f"no {language} compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe").with_suffix(SUFFIXES[language])
        source.write_text("#include <Python.h>\n")
        include = f"-I{sysconfig.get_path('include')}"
        command = [*compiler.split(), "-shared", "-fPIC", include, str(source), "-o", str(source.with_suffix(".so"))]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
            return "", f"{compiler} cannot build a Python extension: {reason}"
    return compiler, ""
