"""What can be answered or refused without torch is, before torch is loaded: at once, in one line, with the right exit."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "peft", "matplotlib", "numpy", "sklearn", "datasets", "safetensors", "jinja2"}
# Runs the command, and writes what was loaded when it ended into the file that is named first.
PROGRAM = """
import atexit, pathlib, sys
told = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: told.write_text(" ".join({name.split(".")[0] for name in sys.modules})))
from anyrank.cli import main
main()
"""
SMALL = '[run]\nname = "small"\n[model]\nname = "digits-mlp"\n'
STUDY = """
title = "t"
claim = "c"
minutes = 1
seeds = 2
methods = ["rbla"]
columns = ["accuracy"]
[[setting]]
name = "one"
config = "small.toml"
"""
STUDIES = {
    "key.toml": ("minutes", "minuets"),
    "seeds.toml": ("seeds = 2", "seeds = 0"),
    "column.toml": ('"accuracy"', '"acuracy"'),
    "columns.toml": ('["accuracy"]', "[]"),
    "twice.toml": ('["rbla"]', '["rbla", "rbla"]'),
    "number.toml": ('["rbla"]', "[3]"),
    "label.toml": ('"rbla"', '"rbla@two"'),
    "method.toml": ('"rbla"', '"rbal"'),
    "option.toml": ('"rbla"', '"raflora:splt=balanced"'),
    "ranks.toml": ('"rbla"', '"fedavg"'),
    "set.toml": ("[[setting]]", 'set = ["run.rounds=0"]\n[[setting]]'),
}
VERBS = [
    "demo",
    "run",
    "plan",
    "compare",
    "study",
    "evaluate",
    "aggregate",
    "export",
    "inspect",
    "methods",
    "explain",
    "privacy",
    "audit",
    "report",
    "serve",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit, what it said, and the packages that were loaded."""

    code: int
    out: str
    err: str
    loaded: set[str]


@pytest.fixture
def anyrank(tmp_path: Path):
    """Runs the command in a folder with a configuration, one of a method that needs one rank, and a run that has begun."""
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "lr.toml").write_text(SMALL + "[train]\nlr = 0.1\n")
    (tmp_path / "broken.toml").write_text("run = [")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.toml").write_text(SMALL)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "looks-right").mkdir()
    (tmp_path / "looks-right" / "adapter_config.json").write_text("{}")
    (tmp_path / "done" / "rbla" / "seed-0").mkdir(parents=True)
    (tmp_path / "done" / "rbla" / "seed-0" / "config.toml").write_text(SMALL)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "rbla" / "seed-0").mkdir(parents=True)
    (tmp_path / "mixed" / "rbla" / "seed-0" / "config.toml").write_text(SMALL)
    (tmp_path / "mixed" / "thesis.tex").write_text("the only copy")
    (tmp_path / "file").write_text("")
    for name, change in STUDIES.items():
        (tmp_path / name).write_text(STUDY.replace(*change))

    def call(*arguments: str) -> Ended:
        loaded = tmp_path / ".loaded"
        command = [sys.executable, "-c", PROGRAM, str(loaded), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr, set(loaded.read_text().split()))

    return call


ANSWERED = [
    ("--version",),
    ("--help",),
    *((verb, "--help") for verb in VERBS),
    ("methods",),
    ("methods", "--json"),
    ("explain",),
    ("explain", "--json"),
    ("explain", "lora.alpha"),
    ("explain", "num_rounds", "--json"),
]


@pytest.mark.parametrize("arguments", ANSWERED, ids=" ".join)
def test_it_is_answered_without_torch(anyrank, arguments: tuple[str, ...]) -> None:
    done = anyrank(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out
    assert "anyrank" in done.loaded
    assert not done.loaded & HEAVY


RUN = ("run", "small.toml", "--set")
COMPARE = ("compare", "small.toml", "--methods")
MERGE = ("aggregate", "--out", "merged", "--method")
REFUSED = [
    (("run", "absent.toml"), "absent.toml: no such file; expected a TOML configuration"),
    (("plan", "absent.toml"), "no such file"),
    (("compare", "absent.toml", "--methods", "rbla"), "no such file"),
    (("privacy", "absent.toml"), "no such file"),
    (("audit", "absent.toml"), "no such file"),
    (("study", "absent.toml"), "absent.toml: no such file; expected a TOML study"),
    (("run", "broken.toml"), "not readable as TOML"),
    (("run", "lr.toml"), "train.lr: unknown key; did you mean train.learning_rate?"),
    ((*RUN, "trian.x=1"), "[trian]: unknown section; did you mean 'train'?"),
    ((*RUN, "train.learnin_rate=1"), "did you mean 'learning_rate'?"),
    ((*RUN, "rounds=3"), "--set rounds=3: expected section.key=value, did you mean run.rounds=3?"),
    ((*RUN, "run.rounds=0"), "run.rounds: expected a whole number of at least 1, got 0"),
    ((*RUN, "method.name=rafola"), "method 'rafola': unknown; did you mean 'raflora'?"),
    ((*RUN, "method.splt=balanced"), "method 'stayput': unknown option 'splt'; did you mean 'split'?"),
    ((*RUN, "method.split=other"), "option split expects one of 'singular-in-b', 'balanced', got 'other'"),
    ((*RUN, "method.file=absent.py"), "method.file: no such file absent.py"),
    (("plan", "small.toml", "--set", "method.name=rafola"), "did you mean 'raflora'?"),
    (("privacy", "small.toml", "--set", "method.name=rafola"), "did you mean 'raflora'?"),
    (("audit", "small.toml", "--set", "method.name=rafola"), "did you mean 'raflora'?"),
    (("compare", "small.toml", "--methods", "rbla,rafola:split=balanced@2"), "did you mean 'raflora'?"),
    ((*COMPARE, "rbla", "--seeds", "0"), "--seeds: expected at least 1, got 0"),
    ((*COMPARE, "rbla,rbla"), "--methods: expected different methods, comma-separated, got rbla, rbla"),
    ((*COMPARE, "rbla,"), "expected METHOD[:KEY=VALUE][@RANK], e.g. fedavg@8"),
    ((*COMPARE, "rbla@two"), "--methods rbla@two: expected METHOD[:KEY=VALUE][@RANK]"),
    ((*COMPARE, "rbla@²"), "expected METHOD[:KEY=VALUE][@RANK]"),
    ((*COMPARE, "raflora:split"), "expected section.key=value"),
    ((*COMPARE, "raflora:splt=balanced"), "method 'raflora': unknown option 'splt'; did you mean 'split'?"),
    ((*COMPARE, "raflora:split=other"), "option split expects one of 'singular-in-b', 'balanced', got 'other'"),
    ((*COMPARE, "raflora:train.learnin_rate=1"), "did you mean 'learning_rate'?"),
    ((*COMPARE, "raflora,fedavg"), "fedavg needs clients of one rank, clients.ranks has 2, 4, 8, 16, 32; set one rank"),
    ((*COMPARE, "rbla", "--set", "method.file=absent.py"), "method.file: no such file absent.py"),
    ((*COMPARE, "rbla", "--out", "held"), "held: is not empty; go on with the comparison in it by --resume"),
    ((*COMPARE, "rbla", "--out", "held", "--resume"), "held: is not empty"),
    ((*COMPARE, "rbla", "--out", "file"), "file: expected a folder of runs, got a file"),
    ((*RUN, "method.name=fedavg"), "fedavg needs clients of one rank"),
    (("study", "broken.toml"), "not readable as TOML"),
    (("study", "key.toml"), "expected the key 'minutes'"),
    (("study", "seeds.toml"), "seeds: expected at least 1, got 0"),
    (("study", "column.toml"), "unknown column 'acuracy'"),
    (("study", "columns.toml"), "columns: expected a list of texts, at least one, got []"),
    (("study", "twice.toml"), "methods: expected different methods, got rbla, rbla"),
    (("study", "number.toml"), "methods: expected a list of texts, at least one, got [3]"),
    (("study", "label.toml"), "expected METHOD[:KEY=VALUE][@RANK]"),
    (("study", "method.toml"), "method.toml, setting 'one': method 'rbal': unknown; did you mean 'rbla'?"),
    (("study", "option.toml"), "unknown option 'splt'; did you mean 'split'?"),
    (("study", "ranks.toml"), "fedavg needs clients of one rank"),
    (("study", "set.toml"), "run.rounds: expected a whole number of at least 1, got 0"),
    (("demo", "--methods", "rafola", "--out", "held"), "did you mean 'raflora'?"),
    (("demo", "--seeds", "0", "--out", "done"), "--seeds: expected at least 1, got 0"),
    (("demo", "--out", "."), "which is not deleted"),
    (("demo", "--out", "file"), "file: expected a folder of runs, or no such folder, got a file"),
    (("demo", "--out", "mixed"), "mixed: expected a folder with nothing but runs, got thesis.tex in it, which is not deleted"),
    (("demo", "--out", "held"), "held: expected a folder with nothing but runs, got config.toml in it, which is not deleted"),
    (("run", "small.toml", "--out", "held"), "held: contains a run already; continue it with --resume"),
    (("run", "small.toml", "--out", "held", "--resume", "--set", "run.seed=1"), "was started with run.seed = 0, not 1"),
    (("run", "small.toml", "--out", "file"), "file: expected a folder for the run, got a file"),
    ((*MERGE, "rafola", "adapter"), "method 'rafola': unknown; did you mean 'raflora'?"),
    ((*MERGE, "raflora", "--ranks", "4,x", "adapter"), "--ranks 4,x: expected ranks of at least 1"),
    ((*MERGE, "raflora", "--option", "split", "adapter"), "--option split: expected KEY=VALUE"),
    ((*MERGE, "raflora", "--option", "splt=balanced", "adapter"), "unknown option 'splt'; did you mean 'split'?"),
    (
        (*MERGE, "raflora", "adapter=none"),
        "expected its number of examples, at least 1, or a positive weight such as 0.25",
    ),
    ((*MERGE, "raflora", "absent"), "absent: no such folder; expected a PEFT adapter folder, as save_pretrained writes it"),
    ((*MERGE, "raflora", "adapter"), "adapter: no adapter_config.json in it; expected a PEFT adapter folder"),
    ((*MERGE, "raflora", "--algebra", "gramm", "adapter"), "algebra 'gramm': unknown; did you mean 'gram'?"),
    ((*MERGE, "raflora", "--device", "cudda", "adapter"), "expected one that merges can use; did you mean 'cuda'?"),
    ((*MERGE, "raflora", "--previous", "absent", "looks-right"), "absent: no such folder"),
    (("aggregate", "--method", "rbla", "--out", "held", "looks-right"), "held: exists already; name a new folder"),
    (("inspect", "absent"), "absent: no such folder; expected a PEFT adapter folder"),
    (("inspect", "looks-right", "empty"), "empty: no adapter_config.json in it"),
    (("report", "empty"), "empty: expected a run folder or a folder of runs"),
    (("report", "absent"), "absent: expected a run folder or a folder of runs"),
    (("explain", "lora.alhpa"), "did you mean 'lora.alpha'?"),
    (("privacy", "--examples", "100"), "expected a configuration, or all of --examples, --batch-size and --steps"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_it_is_refused_without_torch_in_one_line(anyrank, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = anyrank(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("anyrank: ")
    assert says in done.err
    assert done.err.count("\n") == 1
    assert not done.loaded & HEAVY
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".loaded") == before, "nothing is written or deleted"


CALLS = [  # what Typer tells of a wrong call; its words differ between versions
    (("compare", "small.toml"), "compare: Missing option '--methods'", "see anyrank compare --help"),
    (("run",), "run: Missing argument 'CONFIG.toml'", "see anyrank run --help"),
    (("run", "small.toml", "--ou", "x"), "--ou", "see anyrank run --help"),
    (("compare", "small.toml", "--methods", "rbla", "--seeds", "two"), "--seeds", "see anyrank compare --help"),
    (("rum",), "rum", "see anyrank --help"),
    (("--json",), "--json", "see anyrank --help"),
]


@pytest.mark.parametrize(("arguments", "says", "hint"), CALLS, ids=lambda value: " ".join(value))
def test_a_wrong_call_is_one_line_with_the_way_to_the_help(anyrank, arguments: tuple[str, ...], says: str, hint: str) -> None:
    done = anyrank(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("anyrank: ")
    assert says in done.err
    assert done.err.endswith(f"; {hint}\n")
    assert done.err.count("\n") == 1
    assert not done.loaded & HEAVY


def test_a_refusal_takes_half_a_second(anyrank) -> None:
    """The best of some tries: the bound is of the command, not of what else runs on the machine."""
    fastest = min(_seconds(anyrank, *COMPARE, "rbla", "--seeds", "0") for _ in range(3))
    assert fastest < 1.0


def _seconds(anyrank, *arguments: str) -> float:
    began = time.monotonic()
    anyrank(*arguments)
    return time.monotonic() - began


def test_the_version_is_that_of_the_package(anyrank) -> None:
    import anyrank as package

    assert anyrank("--version").out == f"anyrank {package.__version__}\n"


def test_every_verb_is_here(anyrank) -> None:
    """A new verb joins the list above, and so the promise."""
    from anyrank.cli import app

    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(VERBS)
