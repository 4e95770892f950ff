"""docs/reliability.md: each row has a test that exists, and each fault that was ever found has a row."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
DOCS = ROOT / "docs"
PAGE = (DOCS / "reliability.md").read_text(encoding="utf-8")
STATUSES = {"ok", "rejected", "excluded", "failed", "late", "skipped", "stray"}
EXITS = {"exit 0", "exit 1", "exit 2", "exit 130", "exit 143"}


class Row(NamedTuple):
    fault: str
    outcome: str
    status: str
    test: str
    case: str  # the parameter in brackets, or empty


def parsed(page: str) -> list[Row]:
    """The rows of all tables whose last column is a test."""
    found = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | ")]
        if not line.startswith("| ") or cells[0] in ("fault or input", "---"):
            continue
        assert len(cells) == 4, f"four columns: {line}"
        named = re.fullmatch(r"`(test_\w+\.py::test_\w+)(?:\[([^\]]+)\])?`", cells[3])
        assert named, f"the last column names one test: {line}"
        found.append(Row(*cells[:3], named[1], named[2] or ""))
    return found


ROWS = parsed(PAGE)


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((TESTS / name).read_text(encoding="utf-8"))


@cache
def functions(name: str) -> dict[str, ast.FunctionDef]:
    """The tests of a file, which is not imported."""
    return {node.name: node for node in tree(name).body if isinstance(node, ast.FunctionDef)}


@cache
def assigned(name: str) -> dict[str, ast.expr]:
    """What a file, or a module of helpers beside it that it imports, assigns to the names of its tables."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(tree(name)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for module in modules:
            if not module.startswith("test_") and (TESTS / f"{module}.py").exists():
                found |= assigned(f"{module}.py")
    for node in tree(name).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name) and node.value:
                found[target.id] = node.value
    return found


def spelt(part: ast.AST) -> set[str]:
    """The texts and names in a part of a file, and its numbers as they are written there."""
    texts = {node.value for node in ast.walk(part) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    numbers = {node.value for node in ast.walk(part) if isinstance(node, ast.Constant) and isinstance(node.value, float)}
    names = {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
    return texts | names | {f"{number:g}".replace("e+", "e") for number in numbers}


@cache
def cases(test: str) -> frozenset[str]:
    """The cases of a test: the keys of the table that it takes them from, or what is in the list."""
    file, name = test.split("::")
    found: set[str] = set()
    for decorator in functions(file)[name].decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize":
            values = decorator.args[1]
            if isinstance(values, ast.Name):
                values = assigned(file)[values.id]
            if isinstance(values, ast.Dict):
                found |= {key.value for key in values.keys if isinstance(key, ast.Constant)}
            elif isinstance(values, ast.Call):  # a function of a module beside it makes the table
                found |= spelt(tree("hostile.py"))
            else:
                found |= spelt(decorator) | spelt(values)
    return frozenset(found)


def test_there_are_as_many_rows_as_were_promised() -> None:
    assert len(ROWS) >= 120
    assert len({row.fault for row in ROWS if not row.fault.startswith(("the same", "such a run"))}) >= 120


@pytest.mark.parametrize("name", sorted({row.test.split("::")[0] for row in ROWS}))
def test_each_row_names_a_test_that_exists(name: str) -> None:
    assert (TESTS / name).is_file()
    for row in ROWS:
        file, test = row.test.split("::")
        if file == name:
            assert test in functions(name), f"{row.fault}: no {test} in {name}"
            assert not row.case or row.case in cases(row.test), f"{row.fault}: {test} has no case {row.case}"


def test_no_row_is_there_twice() -> None:
    """Neither one test for one text, nor one case of a test for two texts."""
    assert len({(row.fault, row.test) for row in ROWS}) == len(ROWS)
    told = [(row.test, row.case) for row in ROWS]
    assert [each for each in told if told.count(each) > 1] == []
    for row in ROWS:
        alone = [other.fault for other in ROWS if other.test == row.test and not other.case]
        assert not (alone and row.case), f"{row.test}: {row.fault} is a case of {alone}"


def test_each_row_says_what_happens_and_with_which_status() -> None:
    for row in ROWS:
        assert row.fault, row
        assert row.outcome, row
        words = re.findall(r"`([^`]*)`|(exit \d+)", row.status)
        assert {word for word, _ in words} - {""} <= STATUSES, row
        assert {status for _, status in words} - {""} <= EXITS, row
        assert row.status == "–" or re.sub(r"`[^`]*`|exit \d+|,|\bor\b|\s", "", row.status) == "", row


def test_the_statuses_are_those_of_the_code() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "src" / "anyrank" / "federation").glob("*.py"))
    )
    written = {node.value for node in ast.walk(ast.parse(code.replace("from __future__ import annotations", "")))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    assert written >= STATUSES
    assert {word for row in ROWS for word in re.findall(r"`([^`]*)`", row.status)} == STATUSES, "each of them is shown"


# --- the other way round ---------------------------------------------------------------------------------------------

# What was found by trying, each case by words that one row has. A row may be written anew; it may not disappear.
FOUND = [
    *[("demo --out", "files of others"), ("sigint", "`compare`"), ("sigterm", "`run`"), ("sigkill", "parent of `compare`")],
    *[("any bit of a checkpoint", "round number"), ("damaged checkpoint", "before it"), ("both checkpoints",)],
    *[("metrics.jsonl", "clients.jsonl", "deleted", "short", "middle")],
    *[("disk full",), ("read-only",), ("eacces",), ("eio",), ("full disk", "comparison")],
    *[("data file", "method file", "between kill and resume"), ("base model folder", "between kill and resume")],
    *[("reply under the name of another",), ("unknown name",), ("empty name",), ("second reply",)],
    *[("`none` in the place",), ("a dict in the place",), ("`metrics = none`",), ("loss of 10^400",)],
    *[("`meta` device",), ("sparse",), ("require grad",), ("1e30 in a and b",), ("3e38",)],
    *[("`runtimeerror`", "client"), ("`memoryerror`", "client"), ("never returns",)],
    *[("one of 20", "1000"), ("1e38", "overflows"), ("float16", "65504", "alpha 4")],
    *[("(a+)+$", "2,000 groups"), ("q{1,99999999999}",), ("configuration nested 100,000",), ("`lora_alpha` of 1e29",)],
    *[("scalars",), ("fp8",)],
    *[("layer", "[/x]", "terminal"), ("folders", "ansi"), ("label", "ansi", "report"), ("layer with any name",)],
    *[('run.name = ".."', "nul"), ("report --out run/metrics.jsonl",), ("--option seed=3", "--jobs -1", "--ranks 1000000000")],
    *[("csv of 100,000 columns",), ("pipe", "configuration"), ("pipe", "data file"), ("/dev/zero",)],
    *[("ledger and logs", "emptied")],
    # Of models and runs, those about configurations and folders.
    *[("finished run", "run.rounds"), ("`compare --resume`", "configuration changed"), ("`study`", "configuration changed")],
    *[("an empty toml",), ("csv", "semicolons"), ("csv", "latin-1"), ("sched_getaffinity", "fcntl"), ("terminal of 40",)],
]


@pytest.mark.parametrize("words", FOUND, ids=" ".join)
def test_each_fault_that_was_found_has_a_row(words: tuple[str, ...]) -> None:
    assert any(all(word in f"{row.fault} {row.outcome}".lower() for word in words) for row in ROWS)


# The tables of cases that a stranger hands in. A case that is added needs a row, unless it is of a kind that has one already.
TABLES = {
    "test_hostile.py": {"FILES", "SHAPES", "KEYS"},
    "test_doors.py": {"TABLES", "PICTURES"},
    "test_privacy_run.py": {"TAMPERED"},
}
OF_A_KIND = {  # a case without a row: the case whose row says what happens
    "header without its end": "header longer than the file",
    "not JSON": "nested",
    "one dimension": "scalars",
    "Conv1d": "Conv3d",
    "tabs": "semicolons",
    "bars": "semicolons",
    "utf-16 without its mark": "utf-16",
    "only a header": "NUL",
    "empty": "cut short",
    "another size": "cut short",
    "90 million pixels": "400 million pixels",
}


@pytest.mark.parametrize("name", TABLES)
def test_each_case_of_the_tables_has_a_row_or_is_of_a_kind_that_has_one(name: str) -> None:
    shown = {row.case for row in ROWS if row.test.startswith(name)}
    for table in TABLES[name]:
        for case in (ast.literal_eval(key) for key in assigned(name)[table].keys):
            assert case in shown or OF_A_KIND.get(case) in shown, f"{name}, {table}: {case}"


def test_the_links_of_the_page_and_to_it_lead_somewhere() -> None:
    for link in re.findall(r"\]\(((?!http)[^)#]+)", PAGE):
        assert (DOCS / link).exists(), link
    for page in (ROOT / "README.md", DOCS / "robust.md", DOCS / "threat-model.md"):
        assert "reliability.md" in page.read_text(encoding="utf-8"), page.name
    for name in re.findall(r"`make (\w+)", PAGE):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M), name
