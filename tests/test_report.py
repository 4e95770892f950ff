"""The report: its numbers against sums by hand, and that it loads nothing, trusts nothing and stops at nothing."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank import report
from anyrank.errors import RunError, printable, shortened
from anyrank.federation.quarantine import Quarantine
from anyrank.report import faults
from anyrank.report.charts import energy_by_round
from anyrank.report.figures import apart, thin
from anyrank.report.groups import grouped
from anyrank.report.runs import read
from anyrank.report.style import DARK, LIGHT, OF_METHOD, styles

LAYERS = ("first", "second")


def metric(round: int, accuracy: float | None, spectrum=(2.0, 1.0, 1.0, 0.0), **more) -> dict:
    """One line of metrics.jsonl; both layers have the same spectrum."""
    energy = np.array(spectrum) ** 2
    return {
        "round": round,
        "accuracy": accuracy,
        "loss": None if accuracy is None else 1 - accuracy,
        "collapse": float(energy[2:].sum() / energy.sum()),
        "effective_rank": 2.0,
        "spectrum": {layer: list(spectrum) for layer in LAYERS},
        "upload_bytes": 1_000_000,
        "download_bytes": 2_000_000,
        "seconds": 1.5,
        "clients": 2,
        "rejected": 0,
        **more,
    }


def client(round: int, name: str, rank: int, status: str = "ok", reason: str = "") -> dict:
    return {"round": round, "client": name, "rank": rank, "num_examples": 10 * rank, "status": status, "reason": reason}


def write_run(
    folder: Path, accuracies=(0.2, 0.4), label="raflora", seed=0, finished=True, metrics=None, clients=(), **summary
) -> Path:
    """A run folder with ranks 2 and 4."""
    folder.mkdir(parents=True)
    method = label.split("@")[0]
    config = f'[run]\nseed = {seed}\nrounds = {len(accuracies)}\n\n[clients]\nranks = [2, 4]\n\n[method]\nname = "raflora"\n'
    (folder / "config.toml").write_text(config)
    metrics = [metric(number, value) for number, value in enumerate(accuracies, start=1)] if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clients))
    if finished:
        scored = [row["accuracy"] for row in metrics if row["accuracy"] is not None]
        figures = {
            "label": label,
            "method": method,
            "seed": seed,
            "rounds": len(metrics),
            "accuracy": scored[-1],
            "best_accuracy": max(scored),
            "last_accuracy": sum(scored[-5:]) / len(scored[-5:]),
            "start_accuracy": 0.1,
            "collapse": metrics[-1]["collapse"],
            "effective_rank": 2.0,
            "upload_bytes": sum(row["upload_bytes"] for row in metrics),
            "download_bytes": sum(row["download_bytes"] for row in metrics),
            "seconds": sum(row["seconds"] for row in metrics),
            "ranks": {"2": 3, "4": 1},
            "examples": {"min": 5, "median": 10.5, "max": 40},
            "rejected": 0,
            "task": "image-classification",
            "paper": "arXiv:2602.13486",
            "versions": {"anyrank": "0.1.0"},
        }
        (folder / "summary.json").write_text(json.dumps(figures | summary))
    return folder


class Page(HTMLParser):
    """What a browser would see: cells of each table by row, tags with their attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._cell = self._style = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._style = self._style and tag != "style"
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._style:
            return
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data.strip()

    def row(self, label: str) -> dict[str, str]:
        """The results of `label`, by heading."""
        headings, *rows = self.tables[0]
        return dict(zip(headings, next(row for row in rows if row[0] == label), strict=True))

    def heading(self) -> str:
        return re.search(r"anyrank report\s+(.*?)\n", self.text)[1].strip()


def build(tmp_path: Path, *runs: Path) -> Page:
    return Page(report.build(runs, tmp_path / "report.html").read_text())


def test_the_table_holds_means_and_sample_deviations_over_seeds(tmp_path):
    runs = [write_run(tmp_path / str(seed), (0.2, 0.6, last), seed=seed) for seed, last in enumerate((0.5, 0.6, 0.7))]
    row = build(tmp_path, *runs).row("raflora")
    assert row["seeds"] == "3"
    assert row["final accuracy, %"] == "60.00 ± 10.00"  # 50, 60, 70: deviations -10, 0, 10, squares over n - 1 = 2: 100
    assert row["best, %"] == "63.33 ± 5.77"  # 60, 60, 70: mean 190 / 3, variance (2 * 11.11 + 44.44) / 2 = 33.33
    assert row["last 5, %"] == "46.67 ± 3.33"  # (20 + 60 + last) / 3: 43.33, 46.67, 50
    assert row["energy beyond min rank, %"] == "16.67 ± 0.00"  # sigma 2, 1 | 1, 0: 1 / 6
    assert row["up, MB"] == "3.0"  # 3 rounds of 10^6 bytes
    assert row["down, MB"] == "6.0"
    assert row["time, s"] == "4.5"
    assert row["not used"] == "0"


def test_one_seed_has_no_spread(tmp_path):
    page = build(tmp_path, write_run(tmp_path / "run", (0.2, 0.75)))
    assert page.row("raflora")["final accuracy, %"] == "75.00"
    assert page.heading() == (
        "raflora ends at an accuracy of 75.00 % after 2 rounds (1 seed); "
        "the energy of its update beyond rank 2 ends at 16.7 % (round 1: 16.7 %)."
    )


def test_captions_say_whose_model_is_scored(tmp_path):
    server, clients = (write_run(tmp_path / name, label=label) for name, label in (("one", "rbla"), ("two", "raflora")))
    (clients / "config.toml").write_text((clients / "config.toml").read_text() + '\n[eval]\nwhere = "sites"\n')
    assert "accuracy of the global model on held-out examples" in build(tmp_path, server).text
    assert "accuracy of the models that clients have, each on held-out examples" in build(tmp_path, clients).text
    assert "of the global model, or of the models that clients have, on held-out" in build(tmp_path, server, clients).text


def test_the_headline_names_a_tie_within_the_spread(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", (0.1, 0.80 + 0.04 * seed), seed=seed) for seed in (0, 1)]  # 82 ± 2.83
    runs += [write_run(tmp_path / f"b{seed}", (0.1, 0.80), label="rbla", seed=seed) for seed in (0, 1)]  # 80 ± 0
    assert (
        "raflora has the highest final accuracy, 82.00 ± 2.83 % (2 seeds), a tie with rbla" in build(tmp_path, *runs).heading()
    )


def test_the_headline_names_a_lead_beyond_the_spread_and_the_energy_at_both_ends(tmp_path):
    collapsed = [metric(1, 0.1), metric(2, 0.5, spectrum=(2.0, 1.0, 0.0, 0.0))]
    runs = [write_run(tmp_path / f"a{seed}", (0.1, 0.8 + 0.01 * seed), seed=seed) for seed in (0, 1)]
    runs += [write_run(tmp_path / f"b{seed}", label="flexlora", seed=seed, metrics=collapsed) for seed in (0, 1)]
    heading = build(tmp_path, *runs).heading()
    assert "30.50 points ahead of flexlora, more than the spread" in heading  # 80.5 - 50
    assert "energy beyond rank 2 ends at 16.7 % with raflora (round 1: 16.7 %) and at 0.0 % with flexlora" in heading


def test_without_seeds_a_lead_is_not_called_more_than_it_is(tmp_path):
    runs = [write_run(tmp_path / "a", (0.1, 0.8)), write_run(tmp_path / "b", (0.1, 0.7), label="rbla")]
    assert "10.00 points ahead of rbla, with too few seeds to know the spread" in build(tmp_path, *runs).heading()


def test_one_rank_for_all_has_no_energy_beyond_it(tmp_path):
    flat = [metric(1, 0.5, spectrum=(2.0, 1.0), collapse=0.0)]
    run = write_run(tmp_path / "run", label="fedavg@2", metrics=flat, ranks={"2": 4})
    page = build(tmp_path, run)
    assert page.row("fedavg@2")["energy beyond min rank, %"] == "–"
    assert page.heading() == "fedavg@2 ends at an accuracy of 50.00 % after 1 round (1 seed)."


def test_a_method_without_one_global_update_has_no_energy(tmp_path):
    none = {"collapse": None, "effective_rank": None, "spectrum": None}
    bare = [metric(number, 0.5) | none for number in (1, 2)]
    page = build(tmp_path, write_run(tmp_path / "run", label="fedsa", metrics=bare, **none))
    assert page.row("fedsa")["energy beyond min rank, %"] == "–"
    assert "Rank collapse" not in page.text


def test_the_page_and_the_charts_load_nothing_and_run_nothing(tmp_path):
    out = report.build([write_run(tmp_path / "run")], tmp_path / "report.html")
    html = out.read_text()
    page = Page(html)
    assert "://" not in html
    assert "@import" not in html
    assert "url(" not in re.sub(r"url\(#[0-9a-z]+\)", "", html)  # clip paths of the same chart
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert sum(tag == "svg" for tag, _ in page.tags) > 6
    assert all("aria-label" in attributes or "aria-hidden" in attributes for tag, attributes in page.tags if tag == "svg")
    assert "<title>anyrank report: raflora</title>" in html


def test_charts_take_their_colours_from_the_page(tmp_path):
    html = report.build([write_run(tmp_path / "run")], tmp_path / "report.html").read_text()
    assert "#fe01" not in html  # no stand-in colour is left
    assert "stroke: var(--c0)" in html
    assert "fill: var(--ink)" in html
    assert "prefers-color-scheme: dark" in html


def test_hostile_names_are_shown_as_text(tmp_path):
    bad = '<script>alert("x")</script>$x^2$ #fe0199'
    rows = [client(1, "<em>c</em>", 2, "rejected", "<img src=x onerror=alert(1)>")]
    run = write_run(
        tmp_path / "run", label=bad, clients=rows, base_model="<em>m</em>", paper="</style><script>", options={"<u>": "</pre>"}
    )
    (run / "config.toml").write_text("# </pre><script>alert(2)</script>\n")
    page = build(tmp_path, run)
    assert not {"script", "em", "img", "u"} & {tag for tag, _ in page.tags}
    assert bad in page.text
    assert "<img src=x onerror=alert(1)>" in page.text


def test_the_same_input_gives_the_same_bytes(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    first, second = (report.build(runs, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    first, second = (report.figure(runs, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


def test_an_unfinished_run_is_shown_as_far_as_it_went(tmp_path):
    run = write_run(tmp_path / "run", finished=False, metrics=[metric(1, 0.3), metric(2, 0.5), metric(3, None)])
    page = build(tmp_path, run)
    row = page.row("raflora")
    assert row["final accuracy, %"] == "50.00"  # the last round that was scored
    assert row["last 5, %"] == "40.00"
    assert row["up, MB"] == "3.0"
    assert "raflora, seed 0 is unfinished (round 3 of 2): shown up to this round." in page.text


def test_an_unfinished_run_of_a_grid_goes_by_the_label_it_was_asked_for(tmp_path):
    runs = [write_run(tmp_path / "0", (0.1, 0.6)), write_run(tmp_path / "1", finished=False, metrics=[])]
    config = (runs[1] / "config.toml").read_text()
    (runs[1] / "config.toml").write_text(config.replace("[run]\n", '[run]\nlabel = "raflora:train.learning_rate=1e30"\n'))
    page = build(tmp_path, *runs)
    assert page.row("raflora")["final accuracy, %"] == "60.00"
    assert page.row("raflora:train.learning_rate=1e30")["final accuracy, %"] == "–"
    assert "differ in configuration" not in page.text


def test_an_unfinished_seed_is_left_out_beside_finished_ones(tmp_path):
    runs = [write_run(tmp_path / "0", (0.1, 0.6)), write_run(tmp_path / "1", (0.1, 0.9), seed=1, finished=False)]
    page = build(tmp_path, *runs)
    assert page.row("raflora")["final accuracy, %"] == "60.00"
    assert "raflora, seed 1 is unfinished (round 2 of 2): left out of all figures." in page.text


def test_a_run_that_has_not_begun_makes_a_page_and_a_figure(tmp_path):
    run = write_run(tmp_path / "run", finished=False, metrics=[])
    page = build(tmp_path, run)
    assert page.heading() == "No round of these runs has been scored yet."
    assert page.row("raflora")["final accuracy, %"] == "–"
    assert report.figure([run], tmp_path / "figure.png").stat().st_size > 1000


def test_files_that_are_missing_are_no_error(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").unlink()
    (run / "clients.jsonl").unlink()
    assert "no records of single clients" in build(tmp_path, run).text


def test_a_line_that_was_being_written_is_passed_over(tmp_path):
    run = write_run(tmp_path / "run", (0.3, 0.5), finished=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "accuracy": 0.9')
    page = build(tmp_path, run)
    assert page.row("raflora")["final accuracy, %"] == "50.00"
    assert "could not be read" not in page.text


def test_a_broken_line_amid_good_ones_is_told(tmp_path):
    run = write_run(tmp_path / "run", (0.3, 0.5), finished=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(f"{lines[0]}\nnonsense\n{lines[1]}\n")
    page = build(tmp_path, run)
    assert page.row("raflora")["up, MB"] == "2.0"
    assert "run: left out 1 line of its records that could not be read." in page.text


def test_a_round_that_was_repeated_after_a_resume_counts_once(tmp_path):
    run = write_run(tmp_path / "run", finished=False, metrics=[metric(1, 0.3), metric(2, 0.4), metric(2, 0.5)])
    row = build(tmp_path, run).row("raflora")
    assert (row["final accuracy, %"], row["up, MB"]) == ("50.00", "2.0")


def test_what_is_no_run_folder_is_refused_in_one_line(tmp_path):
    write_run(tmp_path / "all" / "one")
    (tmp_path / "empty").mkdir()
    cases = {
        "missing": "missing: expected a run folder .* no such folder",
        "empty": "empty: expected a run folder with config.toml or summary.json, got neither",
        "all": r"1 run folder \(one, …\); name those: .*all/\*",
        "all/one/config.toml": "got a file",
    }
    for name, told in cases.items():
        with pytest.raises(RunError, match=told) as error:
            report.build([tmp_path / name], tmp_path / "report.html")
        assert "\n" not in str(error.value)
    with pytest.raises(RunError, match="at least one run folder"):
        report.build([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_broken_summary_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json: expected one JSON object"):
        report.build([run], tmp_path / "report.html")


def test_one_label_with_two_configurations_is_not_averaged(tmp_path):
    one, other = write_run(tmp_path / "a", (0.1, 0.4)), write_run(tmp_path / "b", (0.1, 0.6))
    (other / "config.toml").write_text((one / "config.toml").read_text() + "\n[train]\nlearning_rate = 0.1\n")
    page = build(tmp_path, one, other)
    assert page.row("raflora #1")["final accuracy, %"] == "40.00"
    assert page.row("raflora #2")["final accuracy, %"] == "60.00"


def test_the_same_run_given_twice_is_one_seed(tmp_path):
    run = write_run(tmp_path / "run")
    page = build(tmp_path, run, run)
    assert page.row("raflora")["seeds"] == "1"
    assert "counted once" in page.text


def test_runs_of_other_tasks_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", label="rbla", task="text-classification")]
    assert "differ in their task (image-classification and text-classification)" in build(tmp_path, *runs).text


def test_clients_by_rank_and_their_updates(tmp_path):
    rows = [client(1, "a", 2), client(1, "d", 4), client(2, "b", 2), client(2, "d", 4, "failed", "out of memory")]
    page = build(tmp_path, write_run(tmp_path / "run", clients=rows))
    table = next(table for table in page.tables if table[0][0] == "rank")
    assert table[1:] == [["2", "3", "2", "20"], ["4", "1", "1", "40"]]  # rank, clients, updates used, examples
    assert "Examples per client (seed 0): minimum 5, median 10.5, maximum 40." in page.text


def test_rejections_are_grouped_by_reason_whoever_and_whenever(tmp_path):
    rows = [client(number, f"c{number}", 2, "rejected", f"round {number}: client c{number}: NaN in A") for number in (1, 2)]
    rows += [client(3, "c1", 2, "skipped", "has no examples"), client(3, "c9", 2)]
    page = build(tmp_path, write_run(tmp_path / "run", clients=rows))
    table = next(table for table in page.tables if table[0][0] == "status")
    assert table[1:] == [
        ["rejected", "2", "round …: client …: NaN in A", "raflora 2", "c1, c2", "1–2"],
        ["skipped", "1", "has no examples", "raflora 1", "c1", "3"],
    ]


HOSTILE = ("<script>alert(1)</script>", "\x1b[31mred\x1b[0m", "a\u202eb", "", "n" * 5000, "c1", "c2")
STATUSES = ("ok", "ok", "ok", "ok", "late", "rejected", "excluded", "failed", "skipped")  # most of them well, as in life


@st.composite
def logs(draw) -> tuple[list[dict], dict[int, str]]:
    """Rows of clients.jsonl as a server writes them, a row for each client of each round, and strays; and the idle rounds."""
    rows = []
    for number in range(1, draw(st.integers(1, 6)) + 1):
        for name in sorted(draw(st.lists(st.sampled_from(HOSTILE), unique=True))):
            status, rests = draw(st.sampled_from(STATUSES)), draw(st.booleans())
            row = client(number, name, 2, status, "rests until round 9: 3 of its uploads were rejected" if rests else "other")
            if draw(st.booleans()):  # folders of earlier versions do not have the key
                row["shortened"] = draw(st.sampled_from((None, 0, 0.001, 0.25, 0.5, 1.0))) if status == "ok" else None
            rows += [row] + [client(number, name, 2, "stray") | {"rank": None}] * draw(st.integers(0, 2))
            rows += [client(number, name, 2, "ok", "its reply of round 1 counts")] * draw(st.integers(0, 1))
    rounds = sorted({row["round"] for row in rows})
    idle = draw(st.lists(st.sampled_from(rounds), unique=True)) if rounds else []
    return rows, dict.fromkeys(sorted(idle), "no client sent a usable update; c1: sent nothing")


def recount(rows: list[dict], idle: dict[int, str]) -> dict[str, Counter]:
    """What is to be shown of each client, counted row by row."""
    found: dict[str, Counter] = {}
    for row in rows:
        status, counts = row["status"], found.setdefault(row["client"], Counter())
        counts["used"] += status == "ok" and row["round"] not in idle
        counts["rested"] += status == "skipped" and row["reason"].startswith("rests")
        counts["shortened"] += row.get("shortened") is not None
        for name in ("rejected", "excluded", "failed", "late", "stray"):
            counts[name] += status == name
    return {name: counts for name, counts in found.items() if any(counts[key] for key in counts if key != "used")}


def run_of(folder: Path, rows: list[dict], idle: dict[int, str]) -> Path:
    last = max([row["round"] for row in rows], default=1)
    return write_run(folder / "run", clients=rows, metrics=[metric(n, 0.5, idle=idle.get(n, "")) for n in range(1, last + 1)])


@settings(max_examples=100)
@given(logs())
def test_the_table_of_clients_counts_what_the_log_has(log):
    rows, idle = log
    with tempfile.TemporaryDirectory() as folder:
        run = read(run_of(Path(folder), rows, idle))
    table, expected = faults.conduct(grouped([run])[0]), recount(rows, idle)
    told = {row["client"]: dict(zip(table["columns"], row["cells"], strict=True)) for row in table["rows"]}
    assert told.keys() == {shortened(name, 60) for name in expected}
    for name, counts in expected.items():
        cells = told[shortened(name, 60)]
        assert {key: int(cells.get(key, 0)) for key in counts} == counts
        shares = [row["shortened"] for row in rows if row["client"] == name and row.get("shortened") is not None]
        if shares:
            assert float(cells["smallest share"].split()[0]) / 100 == pytest.approx(min(shares), rel=0.05, abs=6e-4)
    worst = [int(dict(zip(table["columns"], row["cells"], strict=True)).get("rejected", 0)) for row in table["rows"]]
    assert worst == sorted(worst, reverse=True)
    whole = faults.idle(grouped([run])[0])
    assert sum(int(row["count"].split()[0]) for row in whole["rows"]) == len(idle)
    used = sum(run.taking_part.used.values())
    assert used == sum(row["status"] == "ok" and row["round"] not in idle for row in rows)


@settings(max_examples=8)
@given(logs())
def test_any_log_makes_a_page_on_which_names_are_text(log):
    rows, idle = log
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(Path(folder), rows, idle)
        html = report.build([run], Path(folder) / "report.html").read_text()
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not {"\x1b", "\u202e"} & set(html)
    for name in recount(rows, idle):
        assert printable(shortened(name, 60)) in page.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100)
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(("round", "client", "status", "reason", "shortened"), JSON))))
def test_a_log_of_anything_at_all_is_counted_without_a_fault(rows):
    with tempfile.TemporaryDirectory() as folder:
        run = read(write_run(Path(folder) / "run", clients=rows))
    assert len(faults.conduct(grouped([run])[0])["rows"]) <= 20


def test_the_worst_clients_come_first_and_many_are_cut_off_with_a_word(tmp_path):
    rows = [client(1, f"c{number:02}", 2, "failed", "sent nothing") for number in range(23)]
    rows += [client(number, "liar", 2, "rejected", "NaN") for number in (1, 2)]
    rows += [client(1, "slow", 2) | {"shortened": 0.5}, client(1, "loud", 2) | {"shortened": 0.25}, client(1, "good", 2)]
    page = build(tmp_path, write_run(tmp_path / "run", clients=rows))
    head, *table = next(table for table in page.tables if table[0][0] == "client")
    assert head == ["client", "used", "rejected", "shortened", "smallest share", "failed"]
    assert table[:3] == [
        ["liar", "0", "2", "0", "–", "0"],
        ["loud", "1", "0", "1", "25.0 %", "0"],
        ["slow", "1", "0", "1", "50.0 %", "0"],
    ]
    assert [row[0] for row in table[3:]] == [f"c{number:02}" for number in range(17)]  # 20 rows in all
    assert "6 more, in clients.jsonl" in page.text  # 26 clients with anything to report


def test_a_client_is_one_row_over_seeds_and_methods(tmp_path):
    rows = [client(1, "c1", 2, "rejected", "NaN"), client(2, "c1", 2)]
    runs = [write_run(tmp_path / "a", clients=rows), write_run(tmp_path / "b", seed=1, clients=rows)]
    runs.append(write_run(tmp_path / "c", label="rbla", clients=rows[1:]))
    page = build(tmp_path, *runs)
    table = next(table for table in page.tables if table[0][0] == "client")
    assert table == [["client", "used", "rejected", "methods"], ["c1", "3", "2", "raflora 2"]]


def test_a_stray_reply_does_not_hide_the_update_of_its_sender(tmp_path):
    rows = [client(1, "c1", 2), client(1, "c1", 2, "stray", "a second reply in this round: the first one counts")]
    page = build(tmp_path, write_run(tmp_path / "run", clients=rows))
    assert next(table for table in page.tables if table[0][0] == "client")[1] == ["c1", "1", "1"]


def test_rows_of_a_round_that_was_repeated_after_a_resume_count_once(tmp_path):
    one = [client(1, "c1", 2, "failed"), client(1, "c2", 2, "stray"), client(1, "c2", 2, "stray")]
    page = build(tmp_path, write_run(tmp_path / "run", clients=[*one, client(2, "c1", 2, "failed"), *one]))
    table = next(table for table in page.tables if table[0][0] == "client")
    assert table == [["client", "used", "failed", "stray"], ["c1", "0", "2", "0"], ["c2", "0", "0", "2"]]


def test_a_rest_is_known_by_the_words_of_the_quarantine(tmp_path):
    bad = client(1, "c1", 2, "rejected", "NaN")
    reason = Quarantine(1, 3, [bad]).reason("c1", 2)
    rows = [bad, client(2, "c1", 2, "skipped", reason), client(2, "c2", 2, "skipped", "has no examples")]
    page = build(tmp_path, write_run(tmp_path / "run", clients=rows))
    table = next(table for table in page.tables if table[0][0] == "client")
    assert table == [["client", "used", "rejected", "rested"], ["c1", "0", "1", "1"]]  # to have no examples is no fault


def test_idle_rounds_are_told_by_kind_with_a_ring_on_each_learning_chart(tmp_path):
    reasons = {2: "2 of 9 clients sent a usable update, 3 are needed; c1: sent nothing", 4: "the merge is not finite"}
    reasons |= {3: "1 of 8 clients sent a usable update, 3 are needed; c7: NaN", 6: "no client sent a usable update"}
    rows = [metric(number, 0.5, idle=reasons.get(number, "")) for number in range(1, 7)]
    page = build(tmp_path, write_run(tmp_path / "run", metrics=rows))
    table = next(table for table in page.tables if table[0][1] == "idle")
    assert table[1:] == [
        ["raflora", "2 of 6", "2–3", reasons[2]],
        ["raflora", "1 of 6", "4", reasons[4]],
        ["raflora", "1 of 6", "6", reasons[6]],
    ]
    assert "Rings: rounds that were idle." in page.text
    calm = build(tmp_path / "calm", write_run(tmp_path / "calm" / "run", metrics=[row | {"idle": ""} for row in rows]))
    uses = [sum(tag == "use" for tag, _ in each.tags) for each in (page, calm)]
    assert uses[0] - uses[1] == 2 * len(reasons)  # accuracy and loss
    assert "idle" not in calm.text.lower()


def test_a_folder_of_an_earlier_version_has_neither(tmp_path):
    run = write_run(tmp_path / "run", clients=[client(1, "a", 2), client(1, "d", 4)])
    assert "shortened" not in (run / "clients.jsonl").read_text()
    assert "idle" not in (run / "metrics.jsonl").read_text()
    page = build(tmp_path, run)
    assert not [table for table in page.tables if table[0][0] == "client"]
    assert "idle" not in page.text.lower()
    assert "None: every update that arrived was used." in page.text


def test_privacy_is_shown_just_where_it_was_spent(tmp_path):
    private = write_run(tmp_path / "a", metrics=[metric(1, 0.5, epsilon=0.5), metric(2, 0.5, epsilon=0.75)], epsilon=0.75)
    plain = write_run(tmp_path / "b", label="rbla")
    page = build(tmp_path, private, plain)
    assert next(table for table in page.tables if table[0][1] == "final ε")[1:] == [["raflora", "0.750"]]
    assert "rbla had no such guarantee" in page.text
    assert "Privacy spent" not in build(tmp_path, plain).text


def test_layers_add_by_energy_and_partitions_share_it(tmp_path):
    run = read(write_run(tmp_path / "run"))
    assert run.spectrum[0] == pytest.approx(np.sqrt(2) * np.array([2.0, 1.0, 1.0, 0.0]))  # two equal layers
    assert energy_by_round(run, [2, 4])[1] == pytest.approx([5 / 6, 1 / 6])
    assert energy_by_round(run, [1, 2, 4])[1] == pytest.approx([4 / 6, 1 / 6, 1 / 6])


def test_curves_are_means_at_the_rounds_that_every_seed_has(tmp_path):
    one = write_run(tmp_path / "a", metrics=[metric(1, 0.2), metric(2, None), metric(3, 0.4)])
    other = write_run(tmp_path / "b", seed=1, metrics=[metric(1, 0.4), metric(2, 0.5), metric(3, 0.4)])
    (group,), _ = grouped([read(one), read(other)])
    line = group.series("accuracy", "start_accuracy")
    assert line.x.tolist() == [0, 1, 3]  # round 0 is the start
    assert line.mean == pytest.approx([0.1, 0.3, 0.4])
    assert line.std == pytest.approx([0, 0.1 * np.sqrt(2), 0])


def test_a_method_keeps_its_colour_whatever_stands_beside_it():
    alone = styles([("flexlora", "flexlora")])["flexlora"]
    among = styles([("mine", "mine"), ("raflora", "raflora"), ("flexlora", "flexlora"), ("fedavg@2", "fedavg")])
    assert among["flexlora"] == alone
    assert len(set(among.values())) == 4
    twelve = styles([(name, name) for name in [*OF_METHOD][:8]] + [(f"own{i}", f"own{i}") for i in range(4)])
    assert len(set(twelve.values())) == 12


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])
def test_line_colours_stand_out_from_the_page(background):
    for color in LIGHT if background == "#ffffff" else DARK:
        light, dark = sorted((luminance(color), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.0  # WCAG asks 3 of graphics


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as seen without one of the three kinds of cones.
BLINDNESS = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_line_colours_stay_apart_for_colour_blind_readers(palette, blindness):
    seen = [lab(np.array(BLINDNESS[blindness]) @ linear(color)) for color in palette]
    distances = [np.linalg.norm(one - other) for at, one in enumerate(seen) for other in seen[:at]]
    assert min(distances) > 14  # CIE76; 2.3 is just noticeable


def linear(color: str) -> np.ndarray:
    """Linear RGB of an sRGB colour."""
    channels = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(color: str) -> float:
    """WCAG 2.1 relative luminance."""
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089], 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_names_at_line_ends_stand_apart_in_their_order():
    places = apart([0.9, 0.1, 0.91, 0.92, 0.1], gap=0.06)
    assert min(np.diff(sorted(places))) > 0.06 - 1e-9
    assert places[1] < places[0] < places[2] < places[3]
    assert min(places) >= 0
    assert max(places) <= 1


def test_long_runs_are_thinned_and_keep_their_last_round(tmp_path):
    keep = thin(1000)
    assert len(keep) == 200
    assert (keep[0], keep[-1]) == (0, 999)
    run = write_run(tmp_path / "run", metrics=[metric(number, 0.5) for number in range(1, 1001)])
    assert report.build([run], tmp_path / "report.html").stat().st_size < 300_000


def test_the_figure_is_a_png_of_a_readme_s_width(tmp_path):
    run = write_run(tmp_path / "run", label="方法")
    data = report.figure([run], tmp_path / "deep" / "figure.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 1800
