"""The house: imports run one way, heavy packages stay in their rooms, and the command answers at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "anyrank"

# A room may import rooms of lower floors only; rooms of one floor do not import each other unless listed in their order.
FLOORS = [
    ["errors", "keys", "files"],
    ["adapter", "config", "hub", "subspace"],
    ["lowrank", "records", "cache", "data", "folders", "privacy"],
    ["bounded"],
    ["collapse", "guard", "partition", "images", "tasks.base"],
    ["forward", "hardware", "standing"],
    ["methods.registry"],
    ["methods.base"],
    ["methods"],
    ["catalog", "merging", "cohort", "models", "optimizers", "tasks"],
    ["local", "rundir", "aggregation", "inspection"],
    ["private_training", "private_upload"],
    ["engines"],
    ["summary", "budget", "private_mean"],
    ["federation", "requests"],
    ["simulation", "demo"],
    ["comparison", "plan"],
    ["studies", "audit"],
    ["report", "console"],
    ["cli"],
]
HEAVY = {  # third-party package -> the only rooms that may import it when they are loaded
    "torch": {
        *("adapter", "lowrank", "subspace", "collapse", "guard", "methods", "models", "tasks", "local", "rundir"),
        *("private_training", "private_upload", "private_mean", "bounded"),
        *("folders", "merging", "aggregation", "inspection"),
        *("simulation", "audit", "cache", "engines", "optimizers", "hardware", "forward"),
    },
    "transformers": set(),
    "peft": set(),
    "sklearn": set(),
    "datasets": set(),
    "pyarrow": set(),
    "matplotlib": {"report"},
    "typer": {"cli"},
}


def modules() -> dict[str, Path]:
    names = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name not in ("__init__", "__main__")}


def room(module: str) -> str:
    for floor in FLOORS:
        if module in floor:
            return module
    return module.split(".")[0]


def floor_of(module: str) -> int:
    for level, floor in enumerate(FLOORS):
        if room(module) in floor:
            return level
    raise AssertionError(f"{module} has no place in the house: name its floor here")


def imports(path: Path, only_at_load: bool) -> set[str]:
    """Dotted names that a file imports; those inside functions and under TYPE_CHECKING count only if asked for."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        later = isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        if only_at_load and later:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_one_way(module: str) -> None:
    known = modules()
    for name in imports(modules()[module], only_at_load=True):
        if not name.startswith("anyrank."):
            continue
        inner = name.removeprefix("anyrank.")
        target = inner if inner in known else inner.rpartition(".")[0]
        if target and room(target) != room(module):
            assert floor_of(target) < floor_of(module), f"{module} imports {target}, which stands on a higher floor"


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_stay_in_their_rooms(package: str) -> None:
    for module, path in modules().items():
        if any(name.split(".")[0] == package for name in imports(path, only_at_load=True)):
            assert room(module).split(".")[0] in HEAVY[package], f"{module} imports {package} when it is loaded"


def test_help_loads_nothing_heavy() -> None:
    """The command's own start is a few light modules: what is slow is loaded by the verb that needs it."""
    heavy = {"torch", "numpy", "transformers", "peft", "sklearn", "matplotlib"}
    program = "import sys, anyrank.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "anyrank" in loaded
    assert not heavy & set(loaded)


def test_the_report_is_made_without_torch() -> None:
    program = "import sys, anyrank.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_method_is_a_file_a_reader_takes_in() -> None:
    for path in (SOURCE / "methods").glob("*.py"):
        if path.stem not in ("__init__", "base", "registry"):
            assert len(path.read_text().splitlines()) <= 80, f"{path.name} has grown"
