"""The house: rooms import one way, heavy packages stay in their rooms, and the command answers at once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "anyrank"

# A room imports from earlier levels only: never from its own level, never from a later one. This counts every import, those
# inside functions and for type checkers too.
LEVELS = [
    ["errors", "stopping"],
    ["keys", "files", "progress", "devices", "own"],
    ["adapter", "config"],
    ["algebra", "messages", "privacy", "data"],
    ["methods", "runs", "tasks"],
    ["robust", "aggregation", "training", "report"],
    ["federation", "worker"],
    ["remote"],
    ["engines"],
    ["simulation", "deployment"],
    ["studies", "service", "parties"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# What may never be reached from a module, however many imports lie between.
NEVER = {
    "federation": ("anyrank.tasks", "anyrank.training", "anyrank.engines", "transformers", "peft"),
    "report": ("torch", "transformers", "peft", "anyrank.adapter", "anyrank.tasks"),
    "service": ("torch", "transformers", "peft", "anyrank.adapter", "anyrank.tasks"),
    "config": ("torch", "numpy"),
    "runs.names": ("torch",),
    "studies.variants": ("torch", "numpy"),
    "algebra.names": ("torch", "numpy"),
    "stopping": ("torch", "numpy", "typer"),
    "runs.folder": ("torch",),
    "runs.finding": ("torch",),
    "runs.removal": ("torch",),
    "methods.registry": ("torch", "numpy"),
    "methods.catalog": ("torch", "numpy"),
    "messages.frame": ("torch",),
    "messages.spool": ("torch",),
    "worker.supervisor": ("torch",),
    "parties.starting": ("torch", "nvflare"),
    "worker.channel": ("torch",),
    "remote": ("torch", "nvflare", "flwr", "transformers", "peft"),
    "engines.nvflare": ("torch", "transformers", "peft"),
    "deployment.nvflare": ("torch", "transformers", "peft"),
    **{f"engines.flower.{name}": ("torch", "flwr", "nvflare", "typer") for name in ("attendant", "carrier", "launch", "runs")},
}
HEAVY = {  # third-party package -> the only rooms that may import it when they are loaded
    "torch": {
        *("adapter", "algebra", "messages", "methods", "runs", "tasks", "robust", "aggregation", "training", "federation"),
        *("worker", "engines", "simulation", "studies", "data", "devices"),
    },
    "transformers": set(),
    "peft": set(),
    "sklearn": set(),
    "datasets": set(),
    "pyarrow": set(),
    "matplotlib": {"report"},
    "starlette": {"service"},
    "uvicorn": set(),
    "typer": {"cli"},
    "rich": {"cli"},
    "nvflare": {"engines"},
    "flwr": {"engines"},
}


def modules() -> dict[str, Path]:
    """Every module by its dotted name below `anyrank`, but for the package's own face."""
    names = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


def room(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path, only_at_load: bool) -> set[str]:
    """Dotted names that a file imports; `only_at_load`: not those inside functions and under TYPE_CHECKING."""
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


def inner_imports(module: str, only_at_load: bool = False) -> Iterator[str]:
    """The modules of the package that a module imports."""
    known = modules()
    for name in imports(known[module], only_at_load):
        if name.startswith("anyrank."):
            inner = name.removeprefix("anyrank.")
            yield inner if inner in known else inner.rpartition(".")[0] or inner


def test_every_room_has_a_level() -> None:
    assert {room(module) for module in modules()} <= LEVEL.keys()
    assert {name for level in LEVELS for name in level} == {room(module) for module in modules()}


@pytest.mark.parametrize("module", sorted(modules()))
def test_rooms_import_from_earlier_levels_only(module: str) -> None:
    for target in inner_imports(module):
        if room(target) in LEVEL and room(target) != room(module):
            assert LEVEL[room(target)] < LEVEL[room(module)], f"{module} imports {target}, which does not stand below it"


def test_no_import_is_written_as_text() -> None:
    """Imports that no parser sees would slip past the rule above."""
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("anyrank."):
                target = node.value.removeprefix("anyrank.").split(":")[0]
                if target in modules() and room(target) != room(module):
                    assert LEVEL[room(target)] < LEVEL[room(module)], f"{module} names {target}"


def test_no_circles_between_files() -> None:
    graph = {module: {t for t in inner_imports(module, only_at_load=True) if t in modules()} for module in modules()}
    state: dict[str, int] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"a circle: {' -> '.join((*way, module))}"
        if module not in state:
            state[module] = 1
            for target in sorted(graph[module]):
                if not module.startswith(f"{target}."):
                    visit(target, (*way, module))
            state[module] = 2

    faces = {module for module, path in modules().items() if path.name == "__init__.py"}
    graph = {module: targets - faces if module not in faces else targets for module, targets in graph.items()}
    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("start", NEVER)
def test_nevers(start: str) -> None:
    """Loads the room in a process of its own and looks at what came along."""
    loads = [module for module in modules() if module == start or module.startswith(f"{start}.")]
    program = f"import sys, importlib\nfor m in {loads!r}: importlib.import_module('anyrank.' + m)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    named = {name for module in loads for name in imports(modules()[module], only_at_load=False)}
    for never in NEVER[start]:
        assert not [name for name in {*loaded, *named} if name == never or name.startswith(f"{never}.")]


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_stay_in_their_rooms(package: str) -> None:
    for module, path in modules().items():
        if any(name.split(".")[0] == package for name in imports(path, only_at_load=True)):
            assert room(module) in HEAVY[package], f"{module} imports {package} when it is loaded"


def test_faces_define_nothing() -> None:
    """What a folder hands on is imported by name, or found when it is asked for; nothing is made there."""
    for module, path in modules().items():
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text()).body:
                made = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name not in ("__getattr__", "__dir__")
                assert not made, f"{module}/__init__.py defines {node.name}"


def test_help_loads_nothing_heavy() -> None:
    """The command's own start is a few light modules: what is slow is loaded by the verb that needs it."""
    heavy = {"torch", "numpy", "transformers", "peft", "sklearn", "matplotlib"}
    program = "import sys, anyrank.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "anyrank" in loaded
    assert not heavy & set(loaded)


def test_every_method_is_a_file_a_reader_takes_in() -> None:
    pieces = ("__init__", "base", "registry", "parts", "slices", "averages", "products", "catalog")
    for path in (SOURCE / "methods").glob("*.py"):
        if path.stem not in pieces:
            text, tree = path.read_text(), ast.parse(path.read_text())
            imported = sum(n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))
            assert len(text.splitlines()) - imported <= 75, f"{path.name} has grown"


def test_the_tree_of_the_readme_is_the_folder_tree() -> None:
    """Every room stands in the README, and nothing that is none."""
    readme = (SOURCE.parents[1] / "README.md").read_text()
    tree = readme.split("## The repository")[1].split("src/anyrank/")[1].split("\ntests/")[0]
    rows = re.findall(r"^  (\S+(?:  \S+)*)   ", tree, flags=re.MULTILINE)
    named = {name.removesuffix("/").removesuffix(".py") for row in rows for name in row.split()}
    assert named == {room(module) for module in modules()} - {"__main__"}


PUBLIC = {
    "anyrank": [
        *("Adapter", "AggregateResult", "AnyRankError", "ClientUpdate", "Config", "Examples", "Federation", "LoraLayer"),
        *("Result", "Task", "aggregate", "load", "methods", "metrics", "partitions", "tasks"),
    ],
    "anyrank.adapter": ["Adapter", "LoraLayer", "open_adapter"],
    "anyrank.aggregation": ["AggregateResult", "aggregate", "aggregate_folders", "infer_scaling"],
    "anyrank.methods": ["REGISTRY", "Holds", "Method", "Part", "Traits", "load_file", "make", "register"],
    "anyrank.methods.base": ["Method", "from_product", "slice_weights", "weighted_product", "average_layer", "top_of"],
    "anyrank.config": ["Config", "load", "override", "from_table", "to_table"],
    "anyrank.federation": ["Federation", "run", "start", "dispatch"],
    "anyrank.simulation": ["build", "execute", "Federation", "load"],
    "anyrank.tasks": ["register", "Task", "Examples"],
    "anyrank.cli": ["main", "app"],
    "anyrank.report": ["build", "figure", "study_figure"],
}


@pytest.mark.parametrize("path", PUBLIC)
def test_public_paths_work_in_a_process_of_their_own(path: str) -> None:
    program = f"import importlib; m = importlib.import_module({path!r}); [getattr(m, name) for name in {PUBLIC[path]!r}]"
    program += f"\nfrom {path} import {', '.join(PUBLIC[path])}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
