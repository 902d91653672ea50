"""What a machine can keep of the house rules: imports go down, the README is true, files are short, loads are safe."""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "data_prep")  # imported as fastssl.<name>

# Who may import whom: only the same level or a lower one, and never in a circle. What is not named here is level 2.
LEVELS = {
    5: (
        "fastssl.cli",
        "fastssl.commands.pretrain",
        "fastssl.demo",
        "fastssl.__main__",
        "fastssl.bench",
        "bench_throughput",
    ),
    4: ("fastssl.train",),
    3: ("fastssl.eval",),
    1: (
        "fastssl.models",
        "fastssl.kernels",
        "fastssl.batch",
        "fastssl.random_key",
        "fastssl.distributed",
        "fastssl.machine",
    ),
}
MAY_IMPORT_TRAIN = {"fastssl.commands.pretrain", "fastssl.demo", "fastssl.bench.loops"}
LIBRARIES = {  # besides the standard library and fastssl below them
    "kernels": {"torch", "triton"},
    "data_prep": {"torch", "torchvision", "numpy", "PIL", "ffcv", "tqdm"},
}
LONGEST_FILE = 200
LONGEST_FUNCTION = 40  # without its docstring and the functions inside it
LONGEST_KERNEL = 80
LONGER = {  # each with its reason
    "fastssl/config.py": 245,  # every option, its default and its comment stand in one place
    "fastssl/train.py: pretrain": 60,  # the loop is flat and in order
}


@cache
def repository_files() -> tuple[str, ...]:
    """Every file git tracks: what else lies in a clone is its owner's."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git clone")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return tuple(sorted(name for name in listed if (ROOT / name).exists() or (ROOT / name).is_symlink()))


def python_files(*folders: str) -> list[str]:
    """Python files below these folders; all of them without an argument."""
    files = [name for name in repository_files() if name.endswith(".py")]
    return [name for name in files if not folders or name.split("/")[0] in folders]


@cache
def syntax(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text("utf-8"), name)


def module_of(name: str) -> str:
    """kernels/row_lse.py -> fastssl.kernels.row_lse; fastssl/eval/__init__.py -> fastssl.eval"""
    dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"fastssl.{dotted}" if dotted.split(".")[0] in LINKED else dotted


def product_modules() -> dict[str, str]:
    files = [*python_files("fastssl", *LINKED), *(name for name in python_files() if name == "bench_throughput.py")]
    return {module_of(name): name for name in files}


def imported_names(name: str) -> set[str]:
    """Dotted names a file imports anywhere, also inside functions; `from a import b` gives a.b.

    Not those below `if TYPE_CHECKING`, which are never carried out.
    """
    tests = [node for node in ast.walk(syntax(name)) if isinstance(node, ast.If)]
    never = {id(inner) for node in tests if ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}
    names = set()
    for node in ast.walk(syntax(name)):
        if id(node) in never:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = (module_of(name) + ("._" if name.endswith("__init__.py") else "")).split(".")[
                : -node.level or None
            ]
            base = ".".join([*(package if node.level else []), *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@cache
def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of this repository it imports (the longest prefix that is a file)."""
    modules = product_modules()

    def resolve(dotted: str) -> str | None:
        parts = dotted.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((prefix for prefix in prefixes if prefix in modules), None)

    return {
        module: {found for dotted in imported_names(name) if (found := resolve(dotted))} - {module}
        for module, name in modules.items()
    }


def level(module: str) -> int:
    return next((n for n, tops in LEVELS.items() if any(f"{module}.".startswith(f"{top}.") for top in tops)), 2)


def test_imports_only_go_down():
    up = [
        f"{importer} -> {imported}"
        for importer, found in import_graph().items()
        for imported in found
        if level(imported) > level(importer) and imported != "fastssl"
    ]
    assert not up
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_only_the_top_imports_train():
    importers = {importer for importer, found in import_graph().items() if "fastssl.train" in found}
    assert importers <= MAY_IMPORT_TRAIN


@pytest.mark.parametrize("folder", LINKED)
def test_the_linked_folders_stand_on_few_libraries(folder):
    allowed = LIBRARIES[folder] | set(sys.stdlib_module_names) | {"fastssl"}
    for name in python_files(folder):
        found = imported_names(name)
        assert {dotted.split(".")[0] for dotted in found} <= allowed, name
        if folder == "kernels":
            assert all(dotted.startswith("fastssl.kernels") for dotted in found if dotted.startswith("fastssl")), name


def test_the_linked_folders_are_links_without_init():
    assert not [name for name in repository_files() if name in {f"{folder}/__init__.py" for folder in LINKED}]
    for folder in (*LINKED, "recipes"):
        assert (ROOT / "fastssl" / folder).readlink() == Path("..", folder)


def own_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring and without the functions inside it."""
    docstring = [function.body[0]] if ast.get_docstring(function) else []
    inner = [node for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.FunctionDef)]
    without = {line for node in [*docstring, *inner] for line in range(node.lineno, node.end_lineno + 1)}
    return function.end_lineno - function.lineno + 1 - len(without)


def test_files_and_functions_are_short():
    lengths = []  # (what, lines, limit)
    for name in product_modules().values():
        lengths.append((name, len((ROOT / name).read_text("utf-8").splitlines()), LONGEST_FILE))
        limit = LONGEST_KERNEL if name.startswith("kernels/") else LONGEST_FUNCTION
        functions = [node for node in ast.walk(syntax(name)) if isinstance(node, ast.FunctionDef)]
        lengths += [(f"{name}: {node.name}", own_lines(node), limit) for node in functions]
    assert not [f"{what}: {lines} lines" for what, lines, limit in lengths if lines > LONGER.get(what, limit)]


def test_kernels_pass_on_no_tuple_as_one_value():
    """Triton 3.2, which the oldest torch allowed brings along, compiles no tuple in a tuple and none with a name."""
    found = []
    for name in python_files("kernels"):
        jitted = (node for node in ast.walk(syntax(name)) if "triton.jit" in map(ast.unparse, decorators(node)))
        for node in (node for function in jitted for node in ast.walk(function)):
            nested = isinstance(node, ast.Tuple) and any(isinstance(part, ast.Tuple) for part in node.elts)
            named = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            if nested or (named and not isinstance(node.targets[0], ast.Tuple)):
                found.append(f"{name}:{node.lineno}")
    assert not found


def decorators(node: ast.AST) -> list[ast.expr]:
    """What decorates a function, without arguments; [] for anything else."""
    return [getattr(found, "func", found) for found in getattr(node, "decorator_list", [])]


def calls(name: str) -> list[tuple[str, dict[str, object]]]:
    """Every call in a file as (dotted name, keyword constants)."""
    found = []
    for node in ast.walk(syntax(name)):
        if isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            found.append((ast.unparse(node.func), keywords))
    return found


def test_nothing_loads_code_or_starts_a_shell():
    unsafe = []
    for name in python_files():
        for function, keywords in calls(name):
            if function == "torch.load" and keywords.get("weights_only") is not True:
                unsafe.append(f"{name}: torch.load without weights_only=True")
            if function in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"):
                unsafe.append(f"{name}: {function}")
            if keywords.get("shell"):
                unsafe.append(f"{name}: shell=True")
    assert not unsafe


def test_no_text_sends_the_reader_to_another_project():
    for name in repository_files():
        if (ROOT / name).is_file() and name != "LICENSE":
            text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
            assert not re.search(r"pip install (fastssl|apex)(?![-\w])", text), name


def readme_tree() -> set[str]:
    """Paths in the fenced tree of the README; two spaces a level, folders end in a slash."""
    text = (ROOT / "README.md").read_text("utf-8")
    block = re.search(r"^## Layout\n+```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    paths, parents = set(), []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split()) > 1, f"{name} has no description"
        parents[depth:] = [name.rstrip("/")]
        paths.add("/".join(parents))
    return paths


def test_the_readme_tree_is_true():
    files = [name for name in repository_files() if not name.startswith(".")]
    expected = {name.split("/")[0] for name in files}
    for name in files:
        if name.split("/")[0] in ("fastssl", *LINKED, "recipes") and not name.endswith("__init__.py"):
            expected |= {name, *(str(folder) for folder in Path(name).parents if str(folder) != ".")}
    listed = readme_tree()
    wrong = [f"not listed: {name}" for name in sorted(expected - listed)]
    wrong += [f"does not exist: {name}" for name in sorted(listed - expected)]
    assert not wrong, "the README's tree: " + "; ".join(wrong)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_ruff_passes(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--quiet", *python_files()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
