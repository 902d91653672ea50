"""The C and C++ compilers that Triton and torch.compile run while a program trains, tried on a small file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

LANGUAGES = {  # the variable that names the compiler, the commands it may be, the suffix of a source file
    "C": ("CC", ("gcc", "clang"), ".c"),
    "C++": ("CXX", ("g++", "clang++"), ".cpp"),
}


def try_compiler(language: str) -> tuple[str, str]:
    """(the compiler for "C" or "C++", "") or ("", why no Python extension can be built with it, in a few words)."""
    variable, commands, suffix = LANGUAGES[language]
    compiler = os.environ.get(variable) or next(filter(None, map(shutil.which, commands)), None)
    if compiler is None:
        return "", f"no {language} compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe").with_suffix(suffix)
        source.write_text("#include <Python.h>\n")
        include = f"-I{sysconfig.get_path('include')}"
        command = [*compiler.split(), "-shared", "-fPIC", include, str(source), "-o", str(source.with_suffix(".so"))]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
            return "", f"{compiler} cannot build a Python extension: {reason}"
    return compiler, ""
