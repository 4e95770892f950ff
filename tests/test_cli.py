"""The commands as a user types them: what they print, what they leave behind, and how they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank.cli import console, tables
from anyrank.cli.folding import folded
from anyrank.errors import RunError
from anyrank.runs.removal import remove_run


def test_run_leaves_every_file_of_the_contract(anyrank, tmp_path: Path) -> None:
    done = anyrank("run", "digits.toml")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "small"
    names = {"config.toml", "metrics.jsonl", "clients.jsonl", "checkpoint", "adapter", "report.html", "summary.json"}
    assert names | {f"adapter-rank-{rank}" for rank in (2, 4, 8, 16, 32)} <= {path.name for path in folder.iterdir()}
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    figures = {
        "round",
        "accuracy",
        "loss",
        "collapse",
        "effective_rank",
        "upload_bytes",
        "download_bytes",
        "seconds",
        "clients",
        "rejected",
        "shortened",
        "idle",
    }
    assert figures <= first.keys()
    client = json.loads((folder / "clients.jsonl").read_text().splitlines()[0])
    assert {"round", "client", "rank", "num_examples", "loss", "seconds", "shortened", "status", "reason"} == client.keys()
    assert "accuracy" in done.stdout


def test_the_resolved_config_repeats_the_run(anyrank, tmp_path: Path) -> None:
    assert anyrank("run", "digits.toml", "--set", "method.name=rbla", "--out", "first").returncode == 0
    assert anyrank("run", "first/config.toml", "--out", "second").returncode == 0
    one, two = ((tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("first", "second"))
    assert one == two


def test_compare_shows_means_over_seeds_and_resumes_a_grid(anyrank, tmp_path: Path) -> None:
    request = ("compare", "digits.toml", "--methods", "fedavg@2,raflora", "--seeds", "2", "--out", "grid", "--json")
    done = anyrank(*request)
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows.keys() == {"fedavg@2", "raflora"}
    finals = [json.loads((tmp_path / f"grid/raflora/seed-{seed}/summary.json").read_text())["accuracy"] for seed in (0, 1)]
    assert rows["raflora"]["accuracy"] == pytest.approx(sum(finals) / 2)
    assert rows["raflora"]["accuracy_std"] == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)  # sample std of two
    assert rows["fedavg@2"]["collapse"] == pytest.approx(0.0, abs=1e-9), "rank 2 has no energy past rank 2"
    assert (tmp_path / "grid" / "report.html").exists()
    assert (tmp_path / "grid" / "figure.png").exists()
    page = (tmp_path / "grid" / "report.html").read_bytes()
    assert anyrank("report", "grid", "--out", "again.html").returncode == 0
    assert (tmp_path / "again.html").read_bytes() == page

    stamp = (tmp_path / "grid/raflora/seed-0/summary.json").stat().st_mtime_ns
    (tmp_path / "grid/fedavg@2/seed-1/summary.json").unlink()
    again = anyrank(*request, "--resume")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"][0]["accuracy"] == rows["fedavg@2"]["accuracy"]
    assert (tmp_path / "grid/raflora/seed-0/summary.json").stat().st_mtime_ns == stamp, "finished runs are left alone"
    refused = anyrank(*request)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr


# Clients drop out, rounds miss their quorum, and what is longer than the median is shortened.
TROUBLE = (
    "clients.dropout=0.4", "clients.participation=0.4", "rounds.share=0.6", "rounds.patience=8", "run.rounds=8", "guard.norm=1"
)  # fmt: skip
SETS = tuple(part for change in TROUBLE for part in ("--set", change))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recount(folder: Path) -> dict[str, int]:
    """The disturbances of a run, from its logs."""
    clients = lines(folder / "clients.jsonl")
    return {
        "idle_rounds": sum(row["idle"] != "" for row in lines(folder / "metrics.jsonl")),
        "shortened": sum(row["shortened"] is not None for row in clients),
        "rejected": sum(row["status"] in ("rejected", "excluded", "failed", "stray") for row in clients),
    }


def figures_of(text: str) -> dict[str, str]:
    """The rows of a table of two columns, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_closing_table_of_a_run_counts_what_the_logs_have(anyrank, tmp_path: Path) -> None:
    done = anyrank("run", "digits.toml", *SETS, "--out", "run")
    assert done.returncode == 0, done.stderr
    counts, told = recount(tmp_path / "run"), figures_of(done.stdout)
    assert min(counts.values()) > 0, "the configuration is meant to cause all three"
    assert told["idle rounds"] == f"{counts['idle_rounds']} of 8"
    assert told["shortened"] == f"{counts['shortened']} steps"
    assert told["updates not used"] == str(counts["rejected"])


def test_a_run_without_trouble_has_no_row_of_it(anyrank) -> None:
    told = figures_of(anyrank("run", "digits.toml", "--set", "guard.norm=0", "--set", "guard.far=0").stdout)
    assert told["updates not used"] == "0"
    assert not told.keys() & {"idle rounds", "shortened"}


def test_a_comparison_and_a_study_count_over_all_seeds(anyrank, tmp_path: Path) -> None:
    done = anyrank("compare", "digits.toml", "--methods", "rbla,raflora", "--seeds", "2", *SETS, "--out", "grid")
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads((tmp_path / "grid" / "compare.json").read_text())["rows"]}
    told = [line.replace("│", " ").split() for line in done.stdout.split("rounds and updates, over all seeds")[1].splitlines()]
    for label, row in rows.items():
        runs = [recount(tmp_path / "grid" / label / f"seed-{seed}") for seed in (0, 1)]
        sums = {key: sum(run[key] for run in runs) for key in runs[0]}
        assert {key: row[key] for key in sums} == sums
        assert [label, *(str(sums[key]) for key in ("idle_rounds", "shortened", "rejected"))] in told

    (tmp_path / "trouble.toml").write_text(
        f'title = "t"\nclaim = "c"\nminutes = 1\nseeds = 1\nmethods = ["rbla"]\ncolumns = ["accuracy"]\n'
        f'figure = "none"\nset = {json.dumps(TROUBLE)}\n[[setting]]\nname = "one"\nconfig = "digits.toml"\n'
    )
    done = anyrank("study", "trouble.toml", "--out", "study")
    assert done.returncode == 0, done.stderr
    below = done.stdout.split("rounds and updates, over all seeds")[1]
    counts = recount(next((tmp_path / "study").rglob("summary.json")).parent)
    cells = [str(counts[key]) for key in ("idle_rounds", "shortened", "rejected")]
    assert ["rbla", *cells] in [line.replace("│", " ").split() for line in below.splitlines()]


@settings(max_examples=60)
@given(
    st.integers(40, 200),
    st.lists(st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(1, 9),
    st.data(),
)
def test_a_table_of_any_width_keeps_names_and_numbers_whole(width, names, count, data) -> None:
    cells = [[str(data.draw(st.integers(10**8, 10**9))) for _ in names] for _ in range(count)]
    columns = {f"column\n{place}": each for place, each in enumerate(cells)}
    before = console.out.width
    try:
        console.out.width = width
        with console.out.capture() as shown:
            for table in folded("title", "name", names, columns):
                console.out.print(table)
    finally:
        console.out.width = before
    text = shown.get()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for number in (number for each in cells for number in each):
        assert number in text
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    first = "".join(row[0] for row in rows)
    assert first.startswith("".join(names)), "a long name goes on in the next line"


def test_the_tables_show_summaries_of_earlier_versions() -> None:
    rows = [{"label": "rbla"}, {"label": "raflora"}]
    assert tables.disturbance_tables(rows, "nothing") == []


@pytest.mark.parametrize("reason", ["no client sent a usable update", "\x1b[31mred\n\u202e[bold]x[/bold]", "long " * 100])
def test_progress_tells_an_idle_round_in_one_line(reason: str, capsys) -> None:
    figures = {"accuracy": 0.5, "loss": 1.0, "collapse": None, "upload_bytes": 0, "download_bytes": 0}
    with console.Rounds(1, "one") as rounds:
        rounds("raflora seed 0", figures | {"round": 1, "idle": reason})
    with console.Rounds(2, "two") as rounds:
        rounds("raflora seed 0", figures | {"round": 1, "idle": reason})
        rounds("raflora seed 0", figures | {"round": 2, "idle": ""})
    with console.Rounds(1, "three") as rounds:
        rounds("", figures | {"round": 1})  # a round of an earlier version
    now, later, calm = capsys.readouterr().err.splitlines()
    begin = reason[:8].replace("\x1b", "\\x1b")
    assert f"1/1 rounds · raflora seed 0 round 1 · idle: {begin}" in now
    assert f"1 idle so far, the last in raflora seed 0 round 1: {begin}" in later
    assert "idle" not in calm
    assert all(line.isprintable() and len(line) < 300 for line in (now, later))


def test_one_process_or_two_give_the_same_bytes(anyrank, tmp_path: Path) -> None:
    for jobs in ("1", "2"):
        request = ("compare", "digits.toml", "--methods", "rbla,raflora", "--jobs", jobs, "--out", f"jobs-{jobs}")
        assert anyrank(*request).returncode == 0
    for method in ("rbla", "raflora"):
        path = Path(method) / "seed-0" / "adapter" / "adapter_model.safetensors"
        assert (tmp_path / "jobs-1" / path).read_bytes() == (tmp_path / "jobs-2" / path).read_bytes()


def test_report_makes_the_page_again(anyrank, tmp_path: Path) -> None:
    assert anyrank("run", "digits.toml", "--out", "run").returncode == 0
    page = tmp_path / "run" / "report.html"
    first = page.read_bytes()
    page.unlink()
    assert anyrank("report", "run").returncode == 0
    assert page.read_bytes() == first


def test_methods_lists_them_for_people_and_machines(anyrank) -> None:
    listed = json.loads(anyrank("methods", "--json").stdout)["methods"]
    assert {"raflora", "rbla", "ffa_lora", "fedavg", "zeropad", "flexlora", "centralized", "local-only"} <= {
        m["name"] for m in listed
    }
    table = anyrank("methods").stdout
    assert "arXiv 2602.13486" in table


def test_a_method_of_ones_own_takes_part(anyrank, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from anyrank.methods import register\n"
        "from anyrank.methods.rbla import RBLA\n"
        "@register\n@dataclass(frozen=True)\nclass Mine(RBLA):\n    name = 'mine'\n"
    )
    request = ("compare", "digits.toml", "--methods", "mine,rbla", "--set", "method.file=mine.py", "--out", "grid", "--json")
    done = anyrank(*request)
    assert done.returncode == 0, done.stderr
    mine, rbla = json.loads(done.stdout)["rows"]
    assert mine["accuracy"] == rbla["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "absent.toml"), "absent.toml: no such file"),
        (("run", "digits.toml", "--set", "trian.x=1"), "did you mean 'train'"),
        (("run", "digits.toml", "--set", "train.learnin_rate=1"), "did you mean 'learning_rate'"),
        (("run", "digits.toml", "--set", "method.name=rafola"), "did you mean 'raflora'"),
        (("run", "digits.toml", "--set", "method.splt=balanced"), "did you mean 'split'"),
        (("run", "digits.toml", "--set", "method.split=other"), "expects one of 'singular-in-b', 'balanced'"),
        (("run", "digits.toml", "--set", "clients.ranks=[2, 0]"), "ranks of at least 1, got 0"),
        (("run", "digits.toml", "--set", "clients.ranks=[-4]"), "ranks of at least 1, got -4"),
        (("run", "digits.toml", "--set", "clients.ranks=[2, 65]"), "rank 65: expected at most 64"),
        (("run", "digits.toml", "--set", "clients.count=5000"), "more clients than the"),
        (("run", "digits.toml", "--set", "method.name=fedavg"), "needs clients of one rank"),
        (
            ("run", "digits.toml", "--set", "privacy.epsilon=3"),
            "expected level = 'example', 'person' or 'client' to be set too",
        ),
        (("run", "digits.toml", "--set", "method.file=absent.py"), "no such file"),
        (("compare", "digits.toml", "--methods", "raflora,raflora"), "expected different methods"),
        (("compare", "digits.toml", "--methods", "raflora@two"), "expected METHOD[:KEY=VALUE][@RANK]"),
        (("compare", "digits.toml", "--methods", "rbla", "--seeds", "0"), "expected at least 1, got 0"),
        (("report", "."), "expected a run folder"),
        (("demo", "--out", "."), "which is not deleted"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    anyrank, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = anyrank(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["digits.toml"]


def test_what_the_demo_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """A folder may hold much beside a run two levels below it."""
    for out in ("demo", "mine"):
        (tmp_path / out / "rbla" / "seed-0").mkdir(parents=True)
        for name in ("compare.json", "report.html", "figure.png", "demo.toml", "rbla/seed-0/config.toml"):
            (tmp_path / out / name).write_text("")
        (tmp_path / out / "compare.json").write_text('{"runs": ["rbla/seed-0"]}')
    (tmp_path / "mine" / "rbla" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    for out in ("demo", "empty", "absent"):
        remove_run(tmp_path / out)
        assert not (tmp_path / out).exists()
    for out in ("mine", "."):
        with pytest.raises(RunError, match="which is not deleted"):
            remove_run(tmp_path / out)
    assert (tmp_path / "mine" / "rbla" / "notes.txt").exists()


def test_a_run_that_diverges_exits_with_1(anyrank) -> None:
    failed = anyrank("run", "digits.toml", "--set", "train.optimizer=sgd", "--set", "train.learning_rate=1e30")
    assert failed.returncode == 1
    assert "lower train.learning_rate" in failed.stderr


def test_a_killed_grid_leaves_nobody_training(tmp_path: Path, cache: Path) -> None:
    """Its workers end with it, though it had no time to tell them, and the grid can be gone on with."""
    (tmp_path / "long.toml").write_text('[run]\nrounds = 100000\n[model]\nname = "digits-mlp"\n')
    command = [
        sys.executable,
        "-m",
        "anyrank",
        "compare",
        "long.toml",
        "--methods",
        "rbla,raflora",
        "--jobs",
        "2",
        "--out",
        "grid",
    ]
    grid = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"ANYRANK_CACHE": str(cache)}, stderr=subprocess.DEVNULL)
    metrics = [tmp_path / "grid" / method / "seed-0" / "metrics.jsonl" for method in ("rbla", "raflora")]
    wait_until(lambda: all(path.exists() for path in metrics), seconds=120)
    grid.kill()
    grid.wait()
    for path in metrics:
        wait_until(lambda path=path: not is_locked(path.parent / ".lock"), seconds=30)


def wait_until(holds, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock of a run."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_one_diverging_run_costs_that_run(anyrank, jobs: str) -> None:
    """The runs that end well are in the table, the others are told with their reasons, and the exit says so."""
    diverging = "raflora:train.learning_rate=1e30"
    request = ("compare", "digits.toml", "--methods", f"rbla,{diverging}", "--set", "run.rounds=2", "--jobs", jobs)
    done = anyrank(*request, "--seeds", "2", "--out", f"grid-{jobs}", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert [(row["label"], row["seeds"]) for row in told["rows"]] == [("rbla", 2)]
    assert [(failure["label"], failure["seed"]) for failure in told["failures"]] == [(diverging, 0), (diverging, 1)]
    *_, last = done.stderr.splitlines()  # after the progress, if it took long
    assert last.startswith("anyrank: 2 of 4 runs failed")
    assert "lower train.learning_rate" in last
    assert Path(told["report"]).name == "report.html"


def test_a_grid_of_which_no_run_ends_well_says_why(anyrank) -> None:
    request = ("compare", "digits.toml", "--methods", "raflora", "--set", "train.learning_rate=1e30", "--out", "none")
    done = anyrank(*request)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("anyrank: all 1 runs failed; raflora seed 0: round 2: no client sent a usable update")
    assert last.endswith("(2 rounds in a row were idle)")
