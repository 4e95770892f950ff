"""What can be answered or refused without torch is, before torch is loaded: at once, in one line, with the right exit."""

from __future__ import annotations

import subprocess
import sys
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
VERBS = ["demo", "run", "plan", "compare", "study", "aggregate", "inspect", "methods", "explain", "privacy", "audit", "report"]


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
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "rbla" / "seed-0").mkdir(parents=True)
    (tmp_path / "mixed" / "rbla" / "seed-0" / "config.toml").write_text(SMALL)
    (tmp_path / "mixed" / "thesis.tex").write_text("the only copy")
    (tmp_path / "file").write_text("")

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
    ((*RUN, "rounds=3"), "--set rounds=3: expected section.key=value"),
    ((*RUN, "run.rounds=0"), "run.rounds: expected a whole number of at least 1, got 0"),
    ((*RUN, "method.name=rafola"), "method 'rafola': unknown; did you mean 'raflora'?"),
    ((*RUN, "method.splt=balanced"), "method 'stayput': unknown option 'splt'; did you mean 'split'?"),
    ((*RUN, "method.split=other"), "option split expects one of 'singular-in-b', 'balanced', got 'other'"),
    ((*RUN, "method.file=absent.py"), "method.file: no such file absent.py"),
    (("plan", "small.toml", "--set", "method.name=rafola"), "did you mean 'raflora'?"),
    (("privacy", "small.toml", "--set", "method.name=rafola"), "did you mean 'raflora'?"),
    (("audit", "small.toml", "--set", "method.name=rafola"), "did you mean 'raflora'?"),
    (("compare", "small.toml", "--methods", "rbla,rafola@2:split=balanced"), "did you mean 'raflora'?"),
    (("demo", "--methods", "rafola", "--out", "held"), "did you mean 'raflora'?"),
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
    ((*MERGE, "raflora", "adapter=none"), "expected a whole number of at least 1 as its number of examples, got 'none'"),
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


def test_the_version_is_that_of_the_package(anyrank) -> None:
    import anyrank as package

    assert anyrank("--version").out == f"anyrank {package.__version__}\n"


def test_every_verb_is_here(anyrank) -> None:
    """A new verb joins the list above, and so the promise."""
    from anyrank.cli import app

    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(VERBS)
