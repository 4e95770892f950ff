"""The status page says what the run folders show, to those who may see it, whatever is in the folders."""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from anyrank.errors import RunError, printable
from anyrank.service import charts, downloads, finding, locks, objects, prometheus, running, views
from anyrank.service.app import build
from anyrank.service.guarding import HEADERS
from anyrank.service.reading import opened
from anyrank.service.run import Run
from anyrank.service.streaming import MOST_BEHIND, Follower
from anyrank.service.tail import Tail
from anyrank.service.tally import MOST_CLIENTS, MOST_EVENTS, Curve, Tally
from anyrank.service.verdict import Facts, Verdict, Waiting, verdict
from anyrank.service.watch import Watch
from service_world import (
    NOW,
    Answer,
    add,
    aged,
    ask,
    client,
    events,
    interrupted,
    locked,
    make_run,
    metrics,
    page_of,
    read_all,
    served,
    watching,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows who holds a lock")
TOKEN = "a-token-of-the-test"


def only(watch: Watch) -> Run:
    (run,) = watch.runs.values()
    return run


# --- following a log ---------------------------------------------------------------------------------------------------

_numbers = st.integers(0, 10**30).map(lambda n: json.dumps({"n": n}))
_lines = st.lists(_numbers | st.sampled_from(["", "null", "{", "[1]"]))


@given(lines=_lines, rest=st.sampled_from(["", "{", '{"n": 1}']), cuts=st.lists(st.integers(1, 40)), most=st.integers(1, 60))
def test_a_log_that_grows_in_any_pieces_gives_each_whole_line_once(
    lines: list[str], rest: str, cuts: list[int], most: int
) -> None:
    """A line counts if it ends with a line feed and is shorter than a turn; all others are damaged, or still being written."""
    data = "".join(line + "\n" for line in lines).encode() + rest.encode()
    with tempfile.TemporaryDirectory() as folder:
        path, tail, found = Path(folder, "log"), Tail(Path(folder), "log"), []
        at = 0
        for cut in [*cuts, len(data)]:
            with open(path, "ab") as file:
                file.write(data[at : at + cut])
            at += cut
            turn = tail.advance(most)
            found += turn.lines
            assert not turn.cut
        for _ in range(len(data) + 2):
            found += tail.advance(most).lines
    objects = [(line, json.loads(line)) for line in lines if line.startswith("{") and line != "{"]
    assert [line.row for line in found] == [row for line, row in objects if len(line) < most]
    ends = [len("".join(f"{line}\n" for line in lines[: place + 1])) for place in range(len(lines))]
    assert [line.end for line in found] == [
        end for end, line in zip(ends, lines, strict=True) if line.startswith("{") and line != "{" and len(line) < most
    ]


def test_a_log_that_is_cut_back_or_replaced_is_read_anew(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"n": 1}\n{"n": 2}\n')
    tail = Tail(tmp_path, "log")
    assert [line.row["n"] for line in tail.advance().lines] == [1, 2]
    log.write_text('{"n": 1}\n{"n": 7}\n{"n": 8}\n')  # longer than before, and another second line
    turn = tail.advance()
    assert (turn.cut, [line.row["n"] for line in turn.lines]) == (True, [1, 7, 8])
    log.write_text('{"n": 1}\n')
    turn = tail.advance()
    assert (turn.cut, [line.row["n"] for line in turn.lines]) == (True, [1])
    log.unlink()
    assert tail.advance().cut
    assert not tail.advance().cut


def test_an_offset_that_is_no_end_of_a_line_counts_as_cut(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"n": 1}\n{"n": 2}\n')
    assert [line.row["n"] for line in Tail(tmp_path, "log", 9).advance().lines] == [2]
    for offset in (8, 10, 500):
        assert Tail(tmp_path, "log", offset).advance().cut


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=300), most=st.integers(2, 40))
def test_a_curve_stays_short_and_has_the_first_and_the_last(values: list[float], most: int) -> None:
    curve = Curve(most)
    for round, value in enumerate(values, 1):
        curve.add(round, value)
    points = curve.points
    assert len(points) <= most + 1
    assert points[0] == (1, values[0])
    assert points[-1] == (len(values), values[-1])
    assert all(values[round - 1] == value for round, value in points)
    rounds = [round for round, _ in points]
    assert rounds == sorted(set(rounds))
    assert len({after - before for before, after in pairwise(rounds[:-1])}) <= 1  # equal steps, but for the last


# --- what the logs add up to -------------------------------------------------------------------------------------------


def test_a_tally_by_hand() -> None:
    """Round 1: both used. Round 2, idle: a is rejected, b would have been used. Round 3: a is shortened, b late."""
    tally = Tally()
    for row in (client(1, "a"), client(1, "b"), client(2, "a", "rejected", "NaN"), client(2, "b")):
        tally.add_client(row, None)
    assert not tally.clients  # their rounds are not over
    tally.add_metrics(metrics(1), None)
    tally.add_metrics(metrics(2, idle="too few"), 50.0)
    tally.add_client(client(3, "a", shortened=0.25, reason="its step was shortened"), None)
    tally.add_client(client(3, "b", "late", "after the round"), None)
    tally.add_metrics(metrics(3), 60.0)
    a, b = tally.clients["a"], tally.clients["b"]
    assert dict(a.conduct.counts) == {"used": 2, "rejected": 1, "shortened": 1}
    assert dict(b.conduct.counts) == {"used": 1, "late": 1}  # round 2 was idle: nothing of it counts
    assert (a.seconds, a.heard, a.heard_at) == (1.5, 3, 60.0)
    assert (tally.round, tally.idle, tally.idle_in_a_row) == (3, 1, 0)
    assert (tally.upload_bytes, tally.download_bytes) == (300, 600)
    kinds = [(event.kind, event.client, event.last) for event in tally.events.values()]
    assert kinds == [("idle", "", 2), ("rejected", "a", 2), ("shortened", "a", 3), ("late", "b", 3)]


def test_the_same_trouble_in_rounds_in_a_row_is_one_event() -> None:
    tally = Tally()
    statuses = ["rejected", "rejected", "ok", "rejected", "failed", "failed", "failed"]
    for round, status in enumerate(statuses, 1):
        tally.add_client(client(round, "eve", status, f"reason {round}"), None)
        tally.add_metrics(metrics(round), None)
    found = [(event.kind, event.first, event.last, event.times, event.reason) for event in tally.events.values()]
    assert found == [
        ("rejected", 1, 2, 2, "reason 2"),
        ("rejected", 4, 4, 1, "reason 4"),
        ("failed", 5, 7, 3, "reason 7"),
    ]


def test_memory_is_bounded_however_many_clients_and_events_there_are() -> None:
    tally = Tally()
    tally.add_metrics(metrics(1), None)
    for number in range(MOST_CLIENTS + 50):
        tally.add_client(client(1, f"c{number}", "failed", "x" * 10_000), None)
    assert len(tally.clients) == MOST_CLIENTS
    assert tally.omitted == 50
    assert len(tally.events) == MOST_EVENTS
    assert max(len(event.reason) for event in tally.events.values()) <= 300


_junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_KEYS = (
    *("round", "accuracy", "loss", "collapse", "epsilon", "seconds", "clients", "rejected", "idle", "sites", "upload_bytes"),
    *("client", "rank", "num_examples", "shortened", "status", "reason", "download_bytes"),
)
_row = st.dictionaries(st.sampled_from(_KEYS), _junk) | st.fixed_dictionaries(
    {"round": st.integers(0, 5), "client": st.text(max_size=5), "status": st.text(max_size=5)},
    optional={key: _junk for key in _KEYS if key not in ("round", "client", "status")},
)


@settings(max_examples=60)
@given(logs=st.lists(st.tuples(st.booleans(), _row), max_size=12), summary=_junk | _row)
def test_whatever_rows_hold_every_page_is_made(logs: list[tuple[bool, Any]], summary: Any) -> None:
    """Types, sizes and names that no run writes: all pages answer, the JSON is JSON, and no number in it is infinite."""
    with tempfile.TemporaryDirectory() as parent:
        folder = make_run(Path(parent, "run"), rounds=1)
        make_run(Path(parent, "other"), rounds=1)
        for of_clients, row in logs:
            add(folder, "clients.jsonl" if of_clients else "metrics.jsonl", row)
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "status.json").write_text(json.dumps(summary))
        watch = watching(Path(parent))
        app = build(watch)
        assert not any("please report" in run.problem for run in watch.runs.values())
        for path in ("/", "/runs.json", "/metrics", *(f"/run/{key}{end}" for key in watch.runs for end in ("", "/state.json"))):
            assert ask(app, path).status == 200, path
        json.loads(ask(app, "/runs.json").text, parse_constant=lambda name: pytest.fail(name))
        for run in watch.runs.values():
            assert "event: verdict" in Follower(run, "0-0").news(NOW)


# --- the verdict -------------------------------------------------------------------------------------------------------

RUNNING = Facts(round=6, planned=40, held=True, changed=NOW - 10, round_s=12.0, patience=3, resume="To go on: this")


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({}, "running", "running, round 7 of 40"),
        ({"planned": None}, "running", "running, round 7"),
        ({"round": 0, "round_s": None}, "running", "running, round 1 of 40"),
        ({"round": 40}, "running", "running, writing its results"),
        ({"waiting": Waiting(7, NOW - 130, ["st-mary"])}, "running", "running, round 7 of 40, waiting for st-mary (2 min)"),
        ({"waiting": Waiting(6, NOW - 130, ["st-mary"])}, "running", "running, round 7 of 40"),  # of the round before
        ({"waiting": Waiting(7, NOW - 130, [])}, "running", "running, round 7 of 40"),
        ({"idle_in_a_row": 2}, "running", "running, round 7 of 40; 2 idle rounds so far in a row"),
        ({"idle_in_a_row": 3}, "running", "running, round 7 of 40; 3 idle rounds so far in a row"),  # it was resumed
        ({"changed": NOW - 119}, "running", "running, round 7 of 40"),
        ({"changed": NOW - 121}, "slow", "running, round 7 of 40"),
        ({"changed": NOW - 121, "round_s": 60.0}, "running", "running, round 7 of 40"),  # 5 x 60 s are not over
        ({"changed": NOW - 301, "round_s": 60.0}, "slow", "running, round 7 of 40"),
        ({"held": False}, "stopped", "stopped after round 6 of 40 (no process on this machine writes it)"),
        ({"held": None}, "running", "running, round 7 of 40"),
        ({"held": None, "changed": NOW - 7300}, "stopped", "stopped after round 6 of 40 (no event for 2 h)"),
        (
            {"held": False, "idle_in_a_row": 3, "idle_reason": "no client sent a usable update"},
            "failed",
            "failed after round 6 of 40: 3 rounds in a row were idle: no client sent a usable update",
        ),
        ({"held": False, "idle_in_a_row": 2, "idle_reason": "x"}, "stopped", None),
        ({"finished": True, "held": False, "round": 40}, "done", "done, 40 rounds"),
        ({"finished": True, "held": False, "idle_in_a_row": 3, "idle_reason": "x"}, "done", "done, 6 rounds"),
        ({"finished": True, "figures": {"accuracy": 0.871}}, "done", "done, 6 rounds, accuracy 87.1 %"),
        ({"problem": "a link"}, "unreadable", "cannot be read: a link"),
        ({"problem": "x", "finished": True}, "unreadable", "cannot be read: x"),
    ],
)
def test_the_verdict_by_hand(changes: dict[str, Any], state: str, text: str | None) -> None:
    from dataclasses import replace

    found = verdict(replace(RUNNING, **changes), NOW)
    assert found.state == state
    assert text is None or found.text == text
    assert bool(found.hint) == (state in ("stopped", "failed", "slow"))


@LINUX
def test_a_run_whose_lock_is_held_is_running_and_one_whose_is_not_has_stopped(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    aged(tmp_path / "run", 10)
    with locked(tmp_path / "run"):
        assert only(watching(tmp_path)).verdict(NOW).text == "running, round 4 of 10"
    found = only(watching(tmp_path)).verdict(NOW)
    assert found.text == "stopped after round 3 of 10 (no process on this machine writes it)"
    assert found.hint == f"To go on: anyrank run {tmp_path}/run/config.toml --out {tmp_path}/run --resume"


@LINUX
def test_looking_at_a_lock_never_takes_it(tmp_path: Path) -> None:
    """A page that tried the lock could make a run fail that starts in that moment."""
    from anyrank.runs import lock

    make_run(tmp_path / "run")
    watch, stop = watching(tmp_path), threading.Event()

    def look() -> None:
        while not stop.is_set():
            only(watch).refresh(locks.held_files())

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(100):
            lock.take(tmp_path / "run").release()
    finally:
        stop.set()
        looker.join(10)


@LINUX
def test_a_run_that_grows_although_nobody_here_holds_its_lock_is_judged_by_its_age(tmp_path: Path) -> None:
    """Its process is on another machine, or in another container."""
    folder = make_run(tmp_path / "run")
    watch = watching(tmp_path)
    assert only(watch).verdict(NOW).state == "stopped"
    for round in (4, 5):
        add(folder, "clients.jsonl", client(round, "north"))
        add(folder, "metrics.jsonl", metrics(round))
        aged(folder, 5)
        read_all(watch)
    assert only(watch).verdict(NOW).text == "running, round 6 of 10"
    assert only(watch).verdict(NOW + 7300).text == "stopped after round 5 of 10 (no event for 2 h)"


# --- pages -------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_has_its_figures_by_hand(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=0, config='[[sites]]\nname = "west"\nrank = 16\nsource = "west.csv"\n')
    add(folder, "clients.jsonl", client(1, "north", seconds=61.0), client(1, "south", "rejected", "layer x, A: not finite"))
    row = metrics(1, accuracy=0.25, upload_bytes=2_500_000, sites={"north": {"accuracy": 0.75}})
    add(folder, "metrics.jsonl", row)
    aged(folder, 150)
    with locked(folder):
        text = re.sub(r"<[^>]*>", "|", page_of(folder))
    cells = [cell.strip() for cell in text.split("|") if cell.strip()]
    after = {name: cells[cells.index(name) + 1 :] for name in ("north", "south", "west", "accuracy", "uploaded by all")}
    assert after["accuracy"][0] == "25.0 %"
    assert after["uploaded by all"][0] == "2.5 MB"
    assert after["north"][:7] == ["ok", "round 1,", "2 min ago", "4", "30", "1", "0"]
    assert "75.0 %" in after["north"][:9]
    assert "1 min" in after["north"][:10]
    assert after["south"][:7] == ["rejected", "round 1,", "2 min ago", "4", "30", "0", "1"]
    assert after["west"][:4] == ["no row yet", "not yet", "16", "–"]
    assert "In round 1, 1 of 2 clients gave nothing that counts: south (rejected)." in cells
    assert cells.count("layer x, A: not finite") == 2  # in its row, and among the events


def status(folder: Path, round: int, names: Sequence[str], began: float = NOW - 130, age: float = 1.0, **more: Any) -> None:
    """`status.json` as a run writes it, of so many seconds before `NOW`."""
    table = {"round": round, "began": began, "heard": 0.0, "asked": 2, "missing": len(names), "waiting_for": list(names)}
    (folder / "status.json").write_text(json.dumps(table | more))
    os.utime(folder / "status.json", (NOW - age, NOW - age))


def test_who_is_waited_for_stands_in_the_verdict_and_in_the_row(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    aged(folder, 20)
    status(folder, 4, ["south"])
    with locked(folder):
        watch = watching(tmp_path)
        page = ask(build(watch), "/").text
        assert "running, round 4 of 10, waiting for south (2 min)" in page
        assert page.count("waited for (2 min)") == 1
        rows = re.findall(r'<th scope="row" class="name">([a-z]+)<', page)
        assert rows == ["south", "north"]  # who is waited for stands first, not hidden among two hundred others
        assert ask(build(watch), "/runs.json").json["runs"][0]["waiting_for"] == ["south"]
    status(folder, 4, ["south"], began=NOW - 40)
    with locked(folder):  # within the first minute nothing is said that changes every second: it would be read out
        assert "waiting for south<" in page_of(folder).replace("\n", "")
    status(folder, 3, ["north"])
    with locked(folder):
        assert "waiting for" not in page_of(folder)  # it is of a round that has ended
    status(folder, 4, [f"site-{number}" for number in range(50)], asked=200, missing=170)
    with locked(folder):
        assert "waiting for 170 of 200 clients (2 min)" in page_of(folder)


def test_a_wait_is_no_event_and_its_hint_says_when_it_ends(tmp_path: Path) -> None:
    hints = {
        "": ", and no deadline is set (rounds.deadline_s).",
        "1200.0": "; soon after the deadline of 20 min (rounds.deadline_s)",
    }
    for deadline, says in hints.items():
        table = f"[rounds]\ndeadline_s = {deadline}\n" if deadline else ""
        folder = make_run(tmp_path / f"run{deadline}", config=table)
        aged(folder, 600)
        status(folder, 4, ["south"], began=NOW - 590, heard=NOW - 580)
        with locked(folder):
            page = page_of(folder)
        assert "No event for 9 min, a round takes 2 s" in page  # since the last reply: the file is written all the time
        assert f"south has not replied{says}" in page


def test_a_process_that_says_it_waits_is_there_although_no_lock_is_seen(tmp_path: Path) -> None:
    """Its lock is in another container, or not taken yet because its sites have not come."""
    folder = make_run(tmp_path / "run")
    aged(folder, 600)
    status(folder, 0, ["south"])
    assert "running, round 4 of 10, waiting for south (2 min)" in page_of(folder)
    assert "south has not come." in page_of(folder)
    status(folder, 0, ["south"], age=60)  # it was killed
    page = page_of(folder)
    assert "stopped after round 3 of 10" in page
    assert "wait" not in page.partition("<main")[2].partition("Files to take away")[0]


def test_between_two_jobs_of_a_server_a_run_has_not_stopped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "kits/server/state/runs/winter/run")
    aged(folder, 60)
    assert "running, round 4 of 10 (between two jobs)" in page_of(tmp_path)
    aged(folder, 200)
    page = page_of(tmp_path)
    assert "stopped after round 3 of 10 (no process on this machine writes it)" in page
    assert "anyrank deploy resume winter --keep-going --kit KIT" in page
    assert "anyrank run" not in page


def test_several_runs_have_an_overview_that_stays_when_they_end_or_go(tmp_path: Path) -> None:
    for name in ("a", "b", "c/d/seed-0"):
        make_run(tmp_path / name)
    watch = watching(tmp_path)
    app = build(watch)
    assert "3 runs: 3 stopped" in ask(app, "/").text
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"accuracy": 0.9, "rounds": 3}))
    for path in sorted((tmp_path / "b").iterdir()):
        path.unlink()
    (tmp_path / "b").rmdir()
    make_run(tmp_path / "new")
    watch._next_search = 0.0  # it looks for runs every few seconds
    read_all(watch)
    page = ask(app, "/").text
    assert "4 runs: 1 cannot be read, 2 stopped, 1 done" in page
    assert "cannot be read: its folder is no longer there" in page
    assert "done, 3 rounds, accuracy 90.0 %" in page
    assert {run["name"] for run in ask(app, "/runs.json").json["runs"]} == {"a", "b", "c/d/seed-0", "new"}


def test_pages_are_made_while_the_runs_are_read_on(tmp_path: Path) -> None:
    """Whatever comes in meanwhile: new clients, events, rounds, runs."""
    folder = make_run(tmp_path / "run")
    watch, stop = watching(tmp_path), threading.Event()
    faults: list[str] = []

    def grow() -> None:
        round = 3
        while not stop.is_set():
            round += 1
            add(folder, "clients.jsonl", *(client(round, f"c{round}-{number}", "late", "x") for number in range(10)))
            add(folder, "metrics.jsonl", metrics(round))
            watch.refresh()
            faults.extend(run.problem for run in watch.runs.values() if run.problem)

    grower = threading.Thread(target=grow)
    grower.start()
    try:
        app = build(watch)
        for _ in range(8):
            assert {ask(app, path).status for path in ("/", "/metrics", "/runs.json")} == {200}
    finally:
        stop.set()
        grower.join(30)
    assert not faults


def test_nothing_is_read_on_while_a_page_takes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page, and each turn of a stream, is of one moment."""
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    watch, calm = watching(tmp_path), []

    def watched(place: Any, name: str) -> None:
        real = getattr(place, name)

        def call(*arguments: Any, **more: Any) -> Any:
            calm.append(watch._lock.locked())
            return real(*arguments, **more)

        monkeypatch.setattr(place, name, call)

    for place, name in ((views, "overview"), (views, "page"), (prometheus, "text"), (objects, "overview"), (objects, "of_run")):
        watched(place, name)
    app, key = build(watch), next(iter(watch.runs))
    for path in ("/", f"/run/{key}", "/metrics", "/runs.json", f"/run/{key}/state.json"):
        assert ask(app, path).status == 200
    assert len(calm) >= 5
    assert all(calm)


def test_runs_of_a_comparison_that_have_not_begun_are_counted(tmp_path: Path) -> None:
    make_run(tmp_path / "rbla" / "seed-0")
    (tmp_path / "compare.json").write_text(json.dumps({"runs": ["rbla/seed-0", "rbla/seed-1", "raflora/seed-0"]}))
    watch = watching(tmp_path)
    assert watch.notes == [f"{tmp_path.name}: 2 of 3 runs have not begun."]
    assert "anyrank compare command with --resume, or the same anyrank study" in only(watch).verdict(NOW).hint


def test_a_resumed_run_is_read_anew_and_that_is_an_event(tmp_path: Path) -> None:
    """Logs are cut back to the checkpoint: the rounds that are run again count once."""
    folder = make_run(tmp_path / "run", rounds=5)
    watch = watching(tmp_path)
    lines = (folder / "clients.jsonl").read_text().splitlines(keepends=True)
    (folder / "clients.jsonl").write_text("".join(lines[:8]))  # four rounds of two clients
    (folder / "metrics.jsonl").write_text("".join((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:4]))
    read_all(watch)
    run = only(watch)
    assert (run.tally.round, run.tally.clients["north"].conduct.counts["used"], run.tally.upload_bytes) == (4, 4, 400)
    assert [event["kind"] for event in views.page(run, NOW)["events_shown"]] == ["resumed"]
    add(folder, "clients.jsonl", client(5, "north"), client(5, "south"))
    add(folder, "metrics.jsonl", metrics(5))
    read_all(watch)
    assert (run.tally.round, run.tally.clients["north"].conduct.counts["used"]) == (5, 5)


def test_epsilon_is_the_summarys_and_before_it_the_charged_rounds(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=0)
    (folder / "privacy.json").write_text(json.dumps({"plan": {"epsilon": 6.0, "delta": 1e-5, "max_rounds": 8}, "key": "beef"}))
    add(folder, "privacy.jsonl", *({"round": round, "client": "north", "num_examples": 30} for round in (1, 2, 3)))
    add(folder, "clients.jsonl", *(client(round, "north", seconds=None) for round in (1, 2, 3)))
    add(folder, "metrics.jsonl", *(metrics(round, epsilon=1.5 * round) for round in (1, 2, 3)))
    page = page_of(folder)
    assert "3 of 8 rounds charged" in page
    assert "4.5 of 6, δ 1e-05" in page
    assert "beef" not in page + ask(build(watching(folder)), "/runs.json").text
    (folder / "summary.json").write_text(json.dumps({"epsilon": 4.5, "privacy": {"epsilon_by_client": {"north": 4.25}}}))
    assert "4.25" in page_of(folder)


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    scale=st.sampled_from([1.0, 100.0]), last=st.none() | st.integers(0, 1000),
)  # fmt: skip
@example(values=[1e16, 1e16 + 2], scale=1.0, last=None)
@example(values=[1.7e308, -1.7e308], scale=100.0, last=None)
@example(values=[5e-324, 0.0], scale=100.0, last=3)
def test_a_chart_of_any_numbers_is_xml_within_its_frame(values: list[float], scale: float, last: int | None) -> None:
    svg = charts.line(list(enumerate(values, 1)), 'x<"&', [1, 2], scale, last)
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert root.attrib["aria-label"].startswith('x<"&')
    curve = next(each for each in root if each.attrib.get("class") == "curve").attrib["points"]
    for x, y in (map(float, point.split(",")) for point in curve.split()):
        assert 0 <= x <= width
        assert 0 <= y <= height


# --- hostile names -----------------------------------------------------------------------------------------------------


class _Structure(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


_hostile = st.text(min_size=1, max_size=30) | st.sampled_from(
    [
        *("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title><h1>", "{{ 7*7 }}", "{% raw %}", "&lt;b&gt;"),
        *("\x1b[31mred", "a\u202eb", "\ud800", "line\nend", "' onmouseover='x", "<!--", "]]>", "\x00", "javascript:alert(1)"),
    ]
)


@settings(max_examples=60)
@given(name=_hostile, reason=_hostile)
def test_names_never_leave_their_element(name: str, reason: str) -> None:
    """A page has the same elements and attributes with any names in the place of plain ones; and it says the names."""
    pages = []
    for called, why in (("plain", "plain"), (name, reason)):
        with tempfile.TemporaryDirectory() as parent:
            folder = make_run(Path(parent, "run"), rounds=0)
            add(folder, "clients.jsonl", client(1, called, "rejected", why))
            add(folder, "metrics.jsonl", metrics(1, idle=why, sites={called: {"accuracy": 0.5}}))
            (folder / "summary.json").write_text(json.dumps({"label": called, "method": called, "rounds": 1}))
            (folder / "privacy.json").write_text(json.dumps({"plan": {"epsilon": why}}))
            watch = watching(folder)
            pages.append(ask(build(watch), "/").text)
            told = prometheus.text(watch, NOW)
            for line in told.splitlines():
                assert re.fullmatch(_SAMPLE, line) or line.startswith("# "), line
    plain, hostile = map(_Structure, pages)
    assert hostile.elements == plain.elements
    if not name.isspace():
        shown = views.text(name, 100)
        assert any(shown[:20] in text for text in hostile.texts)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", pages[1])


_SAMPLE = r'[a-z_:]+(\{([a-z_]+="([^"\\\n]|\\["\\n])*"(,(?=[a-z]))?)*\})? (-?[0-9.]+(e[+-]?[0-9]+)?|None)'


def test_a_folder_with_a_hostile_name_is_shown_and_reached(tmp_path: Path) -> None:
    names = ['<b>"x"&\'', "a b?c#d", "\x1b[31m", "ü", "..x"]
    for name in names:
        make_run(tmp_path / "runs" / name)
    watch = watching(tmp_path / "runs")
    app = build(watch)
    page = ask(app, "/").text
    assert "<b>" not in page
    assert "\x1b" not in page
    for key, run in watch.runs.items():
        assert re.fullmatch(r"[a-z0-9-]+", key)
        assert f'href="run/{key}"' in page
        assert ask(app, f"/run/{key}").status == 200
        assert run.place.name == printable(run.place.folder.name)


def test_labels_of_prometheus_are_escaped_and_read_back(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", names=['a"b\\c', "d"])
    text = prometheus.text(watching(folder), NOW)
    assert 'client="a\\"b\\\\c"' in text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.M))
    helps = set(re.findall(r"^# HELP (\S+) \S", text, flags=re.M))
    used = {re.match(r"[a-z_]+", line)[0] for line in text.splitlines() if not line.startswith("#")}
    assert used <= kinds.keys() == helps
    assert all(kind == "counter" for name, kind in kinds.items() if name.endswith("_total"))
    assert re.search(r'^anyrank_run_round\{run="run",key="[^"]+"\} 3$', text, flags=re.M)
    assert re.search(r"^anyrank_run_accuracy_ratio\{[^}]+\} 0\.5$", text, flags=re.M)
    assert len(re.findall(r"^anyrank_run_state\{[^}]+\} 1$", text, flags=re.M)) == 1


# --- hostile and damaged folders ---------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/passwd")


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


_PLACES = ("config.toml", "metrics.jsonl", "clients.jsonl", "summary.json", "privacy.json", "privacy.jsonl", "status.json")


@pytest.mark.parametrize("name", _PLACES)
@pytest.mark.parametrize("put", [_fifo, _link, _folder, lambda path: path.write_bytes(b"\xff{[" * 100)])
def test_something_else_in_the_place_of_a_file_is_a_line_and_the_other_runs_go_on(name: str, put, tmp_path: Path) -> None:
    put(make_run(tmp_path / "runs" / "bad") / name)
    make_run(tmp_path / "runs" / "good")
    watch = watching(tmp_path / "runs")
    app = build(watch)
    bad = next(run for run in watch.runs.values() if run.place.name == "bad")
    page = ask(app, f"/run/{bad.place.key}")
    assert page.status == 200
    assert "root:" not in page.text  # of /etc/passwd
    told = ask(app, "/runs.json").json["runs"]
    good = next(run for run in told if run["name"] == "good")
    assert good["round"] == 3
    shown = next(run for run in told if run["name"] == "bad")
    is_damaged_log = name.endswith("jsonl") and not (tmp_path / "runs" / "bad" / name).is_dir() and put not in (_fifo, _link)
    if not is_damaged_log:
        assert name.split(".")[0] in shown["verdict"] + " ".join(shown["notes"]) or shown["state"] == "unreadable"
    answer = ask(app, f"/run/{bad.place.key}/files/{name}")
    assert answer.status == 404 or b"root:" not in answer.body


def test_a_log_that_is_cut_off_in_a_line_counts_up_to_it_and_damage_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 4, "accur')
    with open(folder / "clients.jsonl", "a") as file:
        file.write("not JSON\n")
    watch = watching(folder)
    assert only(watch).tally.round == 3
    assert only(watch).told == ["clients.jsonl: 1 lines could not be read and are left out."]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('acy": 0.75}\n')
    read_all(watch)
    assert only(watch).tally.round == 4
    assert only(watch).figure("accuracy") == 0.75


def test_a_long_log_is_read_in_turns_each_of_which_has_an_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", rounds=0)
    make_run(tmp_path / "short")
    line = json.dumps(client(1, "north")) + "\n"
    (folder / "clients.jsonl").write_text(line * 60_000)
    add(folder, "metrics.jsonl", metrics(1))
    watch = Watch([tmp_path], clock=lambda: NOW)
    turns = 0
    while watch.refresh():
        turns += 1
        assert any("being read" in note for run in watch.runs.values() for note in run.told)
        assert {run.place.name: run.tally.round for run in watch.runs.values()}["short"] == 3
    assert turns > 1
    assert next(run for run in watch.runs.values() if run.place.name == "long").tally.clients["north"].seconds == 30_000


def test_a_link_to_a_run_and_a_loop_of_links_are_not_followed(tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere" / "secret")
    make_run(tmp_path / "runs" / "own")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere" / "secret")
    (tmp_path / "runs" / "own" / "loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "up").symlink_to("..")
    watch = watching(tmp_path / "runs")
    states = {run.place.name: run.verdict(NOW).text for run in watch.runs.values()}
    assert states.keys() == {"own", "link", "up"}
    assert states["link"] == "cannot be read: a link; name what it leads to"
    assert watching(tmp_path / "runs" / "link").runs  # named by its owner, it is looked into


def test_a_run_whose_reading_breaks_is_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "bad")
    make_run(tmp_path / "good")
    real = Tally.add_metrics

    def broken(self: Tally, row: Any, at: Any) -> None:
        if row.get("poison"):
            raise ZeroDivisionError("a fault of this reader")
        real(self, row, at)

    monkeypatch.setattr(Tally, "add_metrics", broken)
    add(tmp_path / "bad", "metrics.jsonl", {"poison": True})
    watch = watching(tmp_path)
    verdicts = {run.place.name: run.verdict(NOW).text for run in watch.runs.values()}
    assert "ZeroDivisionError" in verdicts["bad"]
    assert verdicts["good"].startswith("stopped after round 3")


def test_more_runs_and_folders_than_are_shown_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "MOST_RUNS", 3)
    for number in range(5):
        make_run(tmp_path / f"run-{number}", rounds=0)
    watch = watching(tmp_path)
    assert len(watch.runs) == 3
    assert watch.notes == ["Only the first 3 runs are shown; name fewer folders."]
    monkeypatch.setattr(finding, "_MOST_FOLDERS", 2)
    assert any("folders were looked through" in note for note in watching(tmp_path).notes)


@pytest.mark.parametrize(
    ("named", "called"),
    [
        ([""], ["north/spring", "north/winter", "south/winter"]),
        (["north"], ["spring", "winter"]),
        (["north/kits"], ["spring", "winter"]),
        (["north/kits/server"], ["spring", "winter"]),
        (["north/kits/server/state/runs"], ["spring", "winter"]),
        (["north/kits/server/state/runs/spring"], ["spring"]),
        (["north/kits/server/state/runs/spring/run"], ["spring"]),
        (["north/kits/server", "south"], ["north/spring", "north/winter", "south/winter"]),
    ],
)
def test_the_runs_of_a_server_are_found_below_any_folder_that_people_name(
    named: list[str], called: list[str], tmp_path: Path
) -> None:
    for run in (
        "north/kits/server/state/runs/spring",
        "north/kits/server/state/runs/winter",
        "south/kits/server/state/runs/winter",
    ):
        make_run(tmp_path / run / "run", rounds=1)
    for kit in ("north/kits/lakeside/state/store/runs", "north/kits/owner@example.org/state/submitted/spring"):
        (tmp_path / kit).mkdir(parents=True)
    kept = make_run(tmp_path / "north" / "kits" / "lakeside" / "state" / "store" / "results" / "spring", rounds=0)
    (kept / "result.json").write_text("{}")  # what a site keeps of a run is no run of its own
    watch = watching(*(tmp_path / name for name in named))
    assert sorted(run.place.name for run in watch.runs.values()) == called


def test_a_large_tree_beside_a_run_does_not_hide_it_and_costs_no_more_than_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "_MOST_FOLDERS", 200)
    for number in range(40):
        for inner in range(10):
            (tmp_path / "a-cache" / str(number) / str(inner) / "x").mkdir(parents=True)
    make_run(tmp_path / "lab" / "own", rounds=1)
    opened: list[Any] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: opened.append(folder) or scandir(folder))
    places, notes = finding.find([(tmp_path, tmp_path)])
    assert [place.name for place in places] == ["lab/own"]
    assert len(opened) == 200
    assert any("folders were looked through" in note for note in notes)


def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "got a file"),
        (Path("a\0b"), "no such folder"),
    ):
        with pytest.raises(RunError, match=says):
            Watch([path])


# --- files to take away ------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run with adapters, a checkpoint and a key, beside a secret."""
    folder = make_run(tmp_path / "runs" / "run")
    for name in ("adapter", "adapter-rank-4", "adapter-best", "checkpoint", "adapter-other", "sites"):
        (folder / name).mkdir()
        (folder / name / "adapter_model.safetensors").write_bytes(b"weights of " + name.encode())
        (folder / name / "adapter_config.json").write_text("{}")
        (folder / name / "secret.txt").write_text("secret")
    (folder / "adapter" / "README.md").write_text("card")
    (folder / "checkpoint" / "state.safetensors").write_text("secret")
    (folder / "privacy.json").write_text('{"plan": {}, "key": "secret"}')
    (folder / "report.html").write_text("<!doctype html><script>alert(1)</script>")
    (folder / "summary.json").write_text('{"rounds": 3}')
    (folder / ".lock").write_text("")
    (tmp_path / "runs" / "secret.txt").write_text("secret")
    return folder


def test_adapters_and_reports_are_downloads_and_nothing_else(finished: Path) -> None:
    watch = watching(finished)
    app, key = build(watch), only(watch).place.key
    names = [item.name for item in downloads.listed(finished)]
    assert names == [
        *("adapter.zip", "adapter-best.zip", "adapter-rank-4.zip"),
        *("report.html", "summary.json", "metrics.jsonl", "clients.jsonl"),
    ]
    page = ask(app, "/").text
    for name in names:
        assert f'href="./run/{key}/files/{name}"' in page
        answer = ask(app, f"/run/{key}/files/{name}")
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/octet-stream"  # a report is never shown as a page of this service
        assert answer.headers["content-disposition"] == f'attachment; filename="{key}-{name}"'
        assert ask(app, f"/run/{key}/files/{name}", "HEAD").body == b""
        if not name.endswith(".zip"):
            assert answer.body == (finished / name).read_bytes()
            assert int(answer.headers["content-length"]) == len(answer.body)
    archive = zipfile.ZipFile(BytesIO(ask(app, f"/run/{key}/files/adapter.zip").body))
    assert archive.testzip() is None
    assert {name: archive.read(name) for name in archive.namelist()} == {
        "adapter/adapter_config.json": b"{}",
        "adapter/adapter_model.safetensors": b"weights of adapter",
        "adapter/README.md": b"card",
    }


def test_each_site_has_an_archive_of_what_it_takes_away(finished: Path) -> None:
    own = ("labels.json", "adapter/adapter_config.json")
    for site, files in {"st-mary": own, "a b%é": ("scores.json",), "empty": ()}.items():
        for name in (*files, "adapter/secret.txt", "private.key"):
            path = finished / "sites" / site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{site}: {name}")
    watch = watching(finished)
    app, key = build(watch), only(watch).place.key
    hrefs = re.findall(r'href="\./(run/[^"]*/files/site-[^"]*)"', ask(app, "/").text)
    assert hrefs == [f"run/{key}/files/site-a%20b%25%C3%A9.zip", f"run/{key}/files/site-st-mary.zip"]
    archives = [ask(app, "/" + unquote(href)) for href in hrefs]
    opened = [zipfile.ZipFile(BytesIO(each.body)) for each in archives]
    assert [{name: archive.read(name).decode() for name in archive.namelist()} for archive in opened] == [
        {"a b%é/scores.json": "a b%é: scores.json"},
        {f"st-mary/{name}": f"st-mary: {name}" for name in own},
    ]
    for each in archives:  # no name of a folder gets into a header as it is
        assert re.fullmatch(r'attachment; filename="[A-Za-z0-9._-]+\.zip"', each.headers["content-disposition"])


def test_nothing_leads_out_of_the_folder_of_a_site(finished: Path) -> None:
    """Links at each level, a pipe and a folder in the place of a file, and names that would climb."""
    sites, out = finished / "sites", finished.parent / "out"
    (out / "adapter").mkdir(parents=True)
    for name in ("labels.json", "adapter/adapter_config.json"):
        (out / name).write_text("secret")
    (sites / "link").symlink_to(out)
    for site in ("inner", "file", "pipe", "folder"):
        (sites / site).mkdir()
    (sites / "inner" / "adapter").symlink_to(out / "adapter")
    (sites / "file" / "labels.json").symlink_to(out / "labels.json")
    os.mkfifo(sites / "pipe" / "labels.json")
    (sites / "folder" / "labels.json").mkdir()
    watch = watching(finished)
    app, key = build(watch), only(watch).place.key
    assert downloads.of_sites(finished) == []
    climbing = (
        "..",
        ".",
        "",
        "../..",
        "../../out",
        "..%2fout",
        "%2e%2e",
        "a/../..",
        "..\\out",
        "\0",
        "link/adapter",
        "x" * 5000,
    )
    for site in ("link", "inner", "file", "pipe", "folder", *climbing):
        answer = ask(app, f"/run/{key}/files/site-{site}.zip")
        assert answer.status == 404, site
        assert b"secret" not in answer.body
        with pytest.raises((OSError, ValueError)):
            downloads.take(finished, f"site-{site}.zip")
    shutil.rmtree(sites)
    sites.symlink_to(finished.parent)  # the folder of all sites is a link
    assert downloads.of_sites(finished) == []
    assert ask(app, f"/run/{key}/files/site-out.zip").status == 404


def test_encoded_addresses_climb_nowhere(finished: Path) -> None:
    """Over a socket, as a browser or an attacker writes them."""
    (finished / "sites" / "own").mkdir()
    (finished / "sites" / "own" / "labels.json").write_text("[]")
    climbing = ["%2e%2e", "..%2f..%2fsecret.txt", "%2e%2e%2f%2e%2e", "..%5c..", "%00", "%ff%fe", "own%2f..", "own%00"]
    names = [*(f"site-{each}.zip" for each in climbing), *(f"{each}%2fsecret.txt" for each in ("..", "%2e%2e", "sites"))]
    with served(finished.name, cwd=finished.parent) as server:
        key = json.loads(server.get("/runs.json").read())["runs"][0]["key"]
        for name in names:
            answer = server.get(f"/run/{key}/files/{name}")
            assert (answer.status, b"secret" in answer.read()) == (404, False), name
        assert server.get(f"/run/{key}/files/site-own%2ezip").read().startswith(b"PK")
        assert server.process.poll() is None


def test_a_huge_file_is_sent_in_pieces(finished: Path) -> None:
    length = 3 << 30
    with open(finished / "adapter" / "adapter_model.safetensors", "wb") as file:
        file.truncate(length)  # takes no space on the disk
    pieces, sent, largest = downloads.take(finished, "adapter.zip").pieces, 0, 0
    tracemalloc.start()
    try:
        for piece in itertools.islice(pieces, 200):
            sent, largest = sent + len(piece), max(largest, len(piece))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
        pieces.close()
    assert sent > 40 << 20
    assert largest < 1 << 20


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint.zip", "sites.zip", "adapter-other.zip", "adapter", "adapter/adapter_config.json", "privacy.json"),
        *("privacy.jsonl", "config.toml", ".lock", "identity.json", "..", ".", "", "../secret.txt", "..%2fsecret.txt"),
        *("%2e%2e/secret.txt", "..\\secret.txt", "adapter.zip/", "adapter-rank-04x.zip", "adapter-rank-4.zip\0", "/etc/passwd"),
        *("....zip", "../run.zip", "adapter-rank-٤.zip", "state.safetensors", "checkpoint/state.safetensors"),
    ],
)
def test_nothing_else_is_given_away(name: str, finished: Path) -> None:
    watch = watching(finished.parent)
    app, key = build(watch), only(watch).place.key
    answer = ask(app, f"/run/{key}/files/{name}")
    assert answer.status == 404
    assert b"secret" not in answer.body
    with pytest.raises((OSError, ValueError)):
        downloads.take(finished, name)


def test_no_link_leads_out_of_a_run(finished: Path) -> None:
    secret = finished.parent / "secret.txt"
    (finished / "report.html").unlink()
    (finished / "report.html").symlink_to(secret)
    (finished / "adapter" / "README.md").unlink()
    (finished / "adapter" / "README.md").symlink_to(secret)
    (finished / "adapter-rank-8").symlink_to(finished / "checkpoint")
    watch = watching(finished)
    app, key = build(watch), only(watch).place.key
    for name in ("report.html", "adapter.zip", "adapter-rank-8.zip"):
        answer = ask(app, f"/run/{key}/files/{name}")
        assert answer.status == 404
        assert b"secret" not in answer.body
    for parts in (("..", "secret.txt"), ("a/b",), ("",), ("x\0",)):
        with pytest.raises(ValueError, match="the name of a file"):
            opened(finished, *parts)


def test_downloads_that_nobody_reads_leave_no_file_open(finished: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("only Linux lists open files")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        for name in ("adapter.zip", "metrics.jsonl"):
            found = downloads.take(finished, name)
            del found
    assert len(os.listdir("/proc/self/fd")) == before


# --- who may ask, and how ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "GETT"])
def test_only_reading_is_answered(method: str, tmp_path: Path) -> None:
    app = build(watching(make_run(tmp_path / "run")))
    for path in ("/", "/runs.json", "/metrics", "/health", "/run/x/files/y"):
        answer = ask(app, path, method)
        assert answer.status == 405
        assert answer.headers["allow"] == "GET, HEAD"


def test_head_has_no_body_and_a_stream_is_not_begun(tmp_path: Path) -> None:
    watch = watching(make_run(tmp_path / "run"))
    app = build(watch)
    for path in ("/", "/runs.json", "/metrics", f"/run/{only(watch).place.key}/events", "/events"):
        answer = ask(app, path, "HEAD")
        assert answer.status == 200, path


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["localhost"], 200), (["LOCALHOST:80"], 200), (["127.0.0.1:8030"], 200), (["[::1]:8030"], 200), (["10.0.0.7"], 200),
        (["status.example.org"], 200), (["status.example.org.:443"], 200), (["evil.example.org"], 421), (["[evil]"], 421),
        ([], 421), ([""], 421), (["localhost", "evil"], 421), (["[::1"], 200), (["127.0.0.1.evil"], 421),
        (["localhost.evil"], 421),
    ],
)  # fmt: skip
def test_a_host_name_of_somebody_else_is_refused(hosts: list[str], status: int, tmp_path: Path) -> None:
    """DNS rebinding: a page of the attacker's reaches this address under the attacker's name."""
    app = build(watching(make_run(tmp_path / "run")), names=["status.example.org"])
    for path in ("/", "/runs.json", "/health"):
        assert ask(app, path, headers=[("host", host) for host in hosts]).status == status


def test_every_answer_tells_the_browser_to_trust_nothing_else(tmp_path: Path) -> None:
    app = build(watching(make_run(tmp_path / "run")), token=TOKEN)
    for path, headers in (("/", []), ("/none", []), (f"/?token={TOKEN}", []), ("/", [("authorization", f"Bearer {TOKEN}")])):
        answer = ask(app, path, headers=[("host", "localhost"), *headers])
        assert HEADERS.items() <= answer.headers.items()
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = ask(app, "/", headers=[("host", "localhost"), ("authorization", f"Bearer {TOKEN}")]).text
    assert not re.search(r"<script(?![^>]*src=)|\son[a-z]+=|style=|javascript:", page)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)  # nothing from elsewhere


def test_without_the_token_nothing_is_shown_and_with_it_a_cookie_takes_its_place(tmp_path: Path) -> None:
    watch = watching(make_run(tmp_path / "run"))
    app, key = build(watch, token=TOKEN), only(watch).place.key
    local = ("host", "localhost")
    for path in (
        "/",
        "/runs.json",
        "/metrics",
        "/style.css",
        "/events",
        f"/run/{key}",
        f"/run/{key}/files/metrics.jsonl",
        "/x",
    ):
        assert ask(app, path).status == 401
        assert ask(app, f"{path}?token=wrong").status == 401
        assert ask(app, f"{path}?token=").status == 401
    assert ask(app, "/health").json == {"status": "ok"}
    answer = ask(app, f"/run/{key}?a=b&token={TOKEN}")
    assert (answer.status, answer.headers["location"]) == (303, f"./{key}?a=b")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= set(cookie.split("; "))
    assert TOKEN not in cookie + answer.text + answer.headers["location"]
    pair = cookie.split(";")[0]
    assert ask(app, "/", headers=[local, ("cookie", f"other=1; {pair}")]).status == 200
    assert ask(app, "/", headers=[local, ("cookie", pair[:-1])]).status == 401
    assert ask(app, "/", headers=[local, ("cookie", f"{pair.split('=')[0]}={TOKEN}")]).status == 401
    assert ask(build(watch, token=TOKEN + "2"), "/", headers=[local, ("cookie", pair)]).status == 401
    assert ask(app, "/metrics", headers=[local, ("authorization", f"Bearer {TOKEN}")]).status == 200
    assert ask(app, "/metrics", headers=[local, ("authorization", f"Basic {TOKEN}")]).status == 401
    assert ask(app, f"//evil.example/x?token={TOKEN}").headers["location"] == "./x"  # never to another host


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is shown meets a secret in `hmac.compare_digest` alone: if that says no, even the right token is refused."""
    from anyrank.service import guarding

    app = build(watching(make_run(tmp_path / "run")), token=TOKEN)
    seen: list[bytes] = []

    def no(shown: bytes, expected: bytes) -> bool:
        seen.append(shown)
        return False

    monkeypatch.setattr(guarding.hmac, "compare_digest", no)
    assert ask(app, f"/?token={TOKEN}").status == 401
    assert ask(app, "/", headers=[("host", "localhost"), ("authorization", f"Bearer {TOKEN}")]).status == 401
    assert seen[:2] == [TOKEN.encode()] * 2


@given(junk=st.binary(max_size=60))
def test_any_cookie_query_and_header_is_answered(junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as parent:
        app = build(Watch([Path(parent)], clock=lambda: NOW), token=TOKEN)
        text = junk.decode("latin-1").replace("\r", "").replace("\n", "")
        for headers in ([("cookie", text)], [("authorization", text)], [("authorization", f"Bearer {text}")]):
            assert ask(app, "/", headers=[("host", "localhost"), *headers]).status == 401
        assert ask(app, "/?" + "".join(letter for letter in text if 32 < ord(letter) < 127)).status in (401, 414)


# --- the command -------------------------------------------------------------------------------------------------------


def refused(cwd: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "anyrank", "serve", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_wrong_requests_are_one_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in (
            (["none"], "none: no such folder; name run folders, or folders with runs in them"),
            (["run", "--port", port], f"port {port} of 127.0.0.1 is in use; choose another --port, or --port 0 for a free one"),
            (["run", "--host", "0.0.0.0"], "--host 0.0.0.0: others could read the page; give --token-file FILE"),
        ):
            code, out, err = refused(tmp_path, *arguments)
            assert (code, out) == (2, "")
            assert err.startswith(f"anyrank: {says}")
            assert err.count("\n") == 1


def test_a_place_to_listen_or_a_token_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for host, port, says in (
        ("127.0.0.1", 70000, "--port 70000: expected a number from 0"),
        ("127.0.0.1", -1, "--port -1: expected a number from 0"),
        ("a..b", 0, "--host a..b: no such host"),
        ("192.0.2.1", 0, "cannot listen on port 0 of 192.0.2.1"),  # an address that no machine has (RFC 5737)
    ):
        with pytest.raises(RunError, match=re.escape(says)):
            running.listen(host, port)
    for content, says in (("short\n", "got 5 characters"), ("a b " * 10, "expected a word"), ("\x1b" * 20, "expected a word")):
        (tmp_path / "token").write_text(content)
        with pytest.raises(RunError, match=says):
            running.token_in(tmp_path / "token")
    with pytest.raises(RunError, match="cannot be read"):
        running.token_in(tmp_path)
    assert [running.is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost")] == [True] * 4
    assert [running.is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil", "")] == [False] * 5


def test_without_the_packages_it_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import importlib.util as u, sys\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('starlette', 'uvicorn') else real(name, *rest)\n"
        "sys.argv = ['anyrank', 'serve', '.']\nfrom anyrank.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "anyrank: serve needs starlette and uvicorn; pip install 'anyrank[web]'\n"


def test_ctrl_c_ends_it_at_once_in_one_line_also_with_a_listener(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with served("run", cwd=tmp_path) as server:
        stream = server.get("/run/" + json.loads(server.get("/runs.json").read())["runs"][0]["key"] + "/events")
        assert events(stream, 1)[0]["event"] == "verdict"
        began = time.monotonic()
        code, err = interrupted(server.process)
        assert time.monotonic() - began < 10
    assert code == 130
    assert err == "anyrank: stopped by Ctrl-C; the runs go on; give the same command again to see them\n"


def test_a_token_file_is_made_for_its_user_alone_and_never_printed(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with served("run", "--token-file", "secrets/token", cwd=tmp_path) as server:
        path = tmp_path / "secrets" / "token"
        token = path.read_text().strip()
        assert len(token) >= 40
        assert os.name != "posix" or path.stat().st_mode & 0o077 == 0
        assert server.get("/").status == 401
        assert server.get(f"/?token={token}").status == 303
        assert server.get("/metrics", {"Authorization": f"Bearer {token}"}).status == 200
        server.process.send_signal(signal.SIGTERM)
        out, err = server.process.communicate(timeout=20)
    assert token not in out + err
    assert running.token_in(path) == (token, False)


def test_a_run_is_followed_live_and_a_listener_that_comes_back_misses_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    with served("run", cwd=tmp_path) as server:
        key = json.loads(server.get("/runs.json").read())["runs"][0]["key"]
        stream = server.get(f"/run/{key}/events")
        assert stream.headers["content-type"] == "text/event-stream"
        assert events(stream, 1)[0]["event"] == "verdict"
        add(folder, "clients.jsonl", client(2, "north"), client(2, "south", "rejected", "NaN"))
        add(folder, "metrics.jsonl", metrics(2, accuracy=0.625))
        found = events(stream, 2)
        by_kind = {event["event"]: event for event in found if event["event"] != "verdict"}
        stream.close()
        last = found[-1]["id"]
        for round in (3, 4):  # while nobody listens
            add(folder, "clients.jsonl", client(round, "north", "late", "slow"))
            add(folder, "metrics.jsonl", metrics(round))
        back = server.get(f"/run/{key}/events", {"Last-Event-ID": last})
        missed = [event for event in events(back, 5 if len(by_kind) == 2 else 6) if event["event"] != "verdict"]
        told = [(event["event"], event["data"]["round"]) for event in (*by_kind.values(), *missed)]
        assert sorted(told) == [("client", 2), ("client", 3), ("client", 4), ("round", 2), ("round", 3), ("round", 4)]
        lost = server.get(f"/run/{key}/events?after=7-7")  # no line ends there
        assert events(lost, 1)[0]["event"] == "reset"
        (folder / "summary.json").write_text('{"rounds": 4, "accuracy": 0.5}')
        done = [event for event in events(back, 1) if event["event"] == "verdict"]
        assert done[0]["data"]["text"] == "done, 4 rounds, accuracy 50.0 %"


def test_an_id_in_the_middle_replays_the_rest_and_only_that(tmp_path: Path) -> None:
    """Each event's id stands for all before it: from any of them on, the same events follow."""
    folder = make_run(tmp_path / "run", rounds=0)
    for round in range(1, 5):
        add(folder, "clients.jsonl", client(round, "a", "late", "x"), client(round, "b"), client(round, "c", "failed", "y"))
        add(folder, "metrics.jsonl", metrics(round))
    run = only(watching(folder))
    whole = _parsed(Follower(run, "0-0").news(NOW))
    assert [kind for _, kind, _ in whole] == ["round"] * 4 + ["client"] * 8 + ["verdict"]
    for place, (id, _, _) in enumerate(whole):
        assert _parsed(Follower(run, id).news(NOW)) == whole[place + 1 : -1] + whole[-1:], place


def _parsed(news: str) -> list[tuple[str, str, str]]:
    return [tuple(line.split(": ", 1)[1] for line in block.split("\n")) for block in news.split("\n\n") if block]


def test_whoever_is_far_behind_or_shows_a_wrong_id_starts_anew(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=2)
    line = json.dumps(client(1, "north", "late", "x" * 200)) + "\n"
    with open(folder / "clients.jsonl", "a") as file:
        file.write(line * (2 * MOST_BEHIND // len(line)))
    run = only(watching(folder))
    for last in ("0-0", "x", "9" * 30 + "-1", "5-5", f"{10**17}-0"):
        follower = Follower(run, last)
        assert [kind for _, kind, _ in _parsed(follower.news(NOW))] == ["reset", "verdict"]
        assert follower.news(NOW) == ""
    fresh = Follower(run)
    assert [kind for _, kind, _ in _parsed(fresh.news(NOW))] == ["verdict"]


def test_too_many_listeners_are_told_to_ask_again_and_the_page_still_answers(tmp_path: Path) -> None:
    app = build(watching(make_run(tmp_path / "run")), most_streams=0)
    answer = ask(app, "/events")
    assert (answer.status, answer.headers["retry-after"]) == (503, "30")
    assert ask(app, "/").status == 200


def _verdict_of(server: Any) -> str:
    return json.loads(server.get("/runs.json").read())["runs"][0]["verdict"]


def _until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)


# A metric that does not answer from the third scoring on, until there is a file `go` in the folder: the run stays in its round.
GATE = """
import pathlib, time
from anyrank.tasks.metrics import register
asked = 0
@register("patience")
def patience(labels, predictions):
    global asked
    asked += 1
    last = time.monotonic() + 300
    while asked > 3 and not pathlib.Path("go").exists() and time.monotonic() < last:
        time.sleep(0.05)
    return 1.0
"""


@LINUX
def test_a_real_run_is_running_then_killed_then_resumed_by_the_command_on_the_page(tmp_path: Path, cache: Path) -> None:
    config = '[run]\nname = "real"\nrounds = 30\n[model]\nname = "digits-mlp"\n[train]\nlocal_steps = 2\n'
    (tmp_path / "real.toml").write_text(config + '[eval]\nfile = "gate.py"\nmetrics = ["patience"]\n')
    (tmp_path / "gate.py").write_text(GATE)
    environment = os.environ | {"ANYRANK_CACHE": str(cache)}
    begin = [sys.executable, "-m", "anyrank", "run", "real.toml", "--out", "runs/real"]
    (tmp_path / "runs").mkdir()
    with served("runs", cwd=tmp_path) as server:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(begin, cwd=tmp_path, env=environment, **quiet)
        try:
            _until(lambda: json.loads(server.get("/runs.json").read())["runs"])
            _until(lambda: re.match(r"running, round [34] of 30", _verdict_of(server)))
        finally:
            process.kill()
            process.wait(30)
        _until(lambda: _verdict_of(server).startswith("stopped after round"))
        page = server.get("/").read().decode()
        assert "(no process on this machine writes it)" in page
        typed = re.search(r"To go on: anyrank (run runs/real/config.toml --out runs/real --resume)", page)[1]
        command = [sys.executable, "-m", "anyrank", *typed.split()]
        (tmp_path / "go").touch()
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        _until(lambda: _verdict_of(server).startswith("done, 30 rounds, accuracy"))
        page = server.get("/").read().decode()
        for name in ("adapter.zip", "report.html", "summary.json"):
            assert f"/files/{name}" in page


def test_the_kinds_of_answers_are_typed(tmp_path: Path) -> None:
    watch = watching(make_run(tmp_path / "run"))
    app, key = build(watch), only(watch).place.key
    kinds = {
        "/": "text/html; charset=utf-8", "/style.css": "text/css; charset=utf-8", "/page.js": "text/javascript; charset=utf-8",
        "/runs.json": "application/json", f"/run/{key}/state.json": "application/json", "/health": "application/json",
        "/metrics": "text/plain; version=0.0.4; charset=utf-8",
    }  # fmt: skip
    found: dict[str, Answer] = {path: ask(app, path) for path in kinds}
    assert {path: answer.headers["content-type"] for path, answer in found.items()} == kinds
    assert [row["client"] for row in found[f"/run/{key}/state.json"].json["clients"]] == ["north", "south"]
    for path in (f"/run/{key}x", "/run/", "/none", f"/run/{key}/files/", f"/run/{key}/"):
        assert ask(app, path).status == 404
    assert isinstance(only(watch).verdict(NOW), Verdict)
