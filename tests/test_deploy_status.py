"""`anyrank deploy status` where no server can be asked: past rounds are shown from the server's run folders."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare")

from anyrank import simulation
from anyrank.cli import evaluated
from anyrank.config.tables import from_table
from anyrank.errors import ConfigError, DeployError
from anyrank.parties import commanding, looking
from anyrank.parties.kits import open_kit
from deploy_world import OWNER, VIEWER, answered_by, call, founded, free_port

ROUNDS = 3


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder of a run of three rounds."""
    folder = tmp_path_factory.mktemp("ran") / "run"
    table = {"run": {"name": "first", "rounds": ROUNDS}, "clients": {"count": 3, "ranks": [2, 4]}, "train": {"local_steps": 1}}
    simulation.execute(from_table(table), folder)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return founded(tmp_path / "fed", port=free_port())


def left(place: Path, ran: Path, run: str = "first", rounds: int = ROUNDS) -> Path:
    """A run folder as it lies at the server after so many rounds."""
    folder = place / "kits/server/state/runs" / run / "run"
    shutil.copytree(ran, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:rounds]))
    if rounds < ROUNDS:
        (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("who", ["server", OWNER, VIEWER])
def test_past_rounds_are_shown_without_a_server(place: Path, ran: Path, monkeypatch, capsys, who: str) -> None:
    whole = left(place, ran)
    left(place, ran, "second", rounds=1)
    assert call(monkeypatch, "deploy", "status", "--kit", str(place / "kits" / who), "--json") == (0, "")
    table = json.loads(capsys.readouterr().out)
    accuracy = json.loads((whole / "summary.json").read_text())["accuracy"]
    assert [(row["run"], row["state"], row["round"], row["rounds"]) for row in table["runs"]] == [
        ("first", "done", 3, 3),
        ("second", "unfinished", 1, 3),
    ]
    assert table["runs"][0]["accuracy"] == accuracy
    assert not table["running"]
    assert call(monkeypatch, "deploy", "status", "--kit", str(place / "kits" / who)) == (0, "")
    said = capsys.readouterr().out
    assert f"first: done, round 3 of 3, accuracy {accuracy:.3f}" in said
    assert "is not started on this machine" in said
    assert f"next: anyrank deploy start {place / 'kits/server'}" in said


def test_a_folder_that_cannot_be_read_is_a_line_and_the_others_are_shown(place: Path, ran: Path) -> None:
    left(place, ran)
    (left(place, ran, "torn") / "metrics.jsonl").write_text("{}\nnonsense\n")
    (left(place, ran, "worse") / "config.toml").write_text("run = 3")
    (place / "kits/server/state/runs/no-run").mkdir()
    table = looking.status(open_kit(place / "kits/server"))
    assert {row["run"]: row["state"] for row in table["runs"]} == {"first": "done", "torn": "unreadable", "worse": "unreadable"}
    assert all("\n" not in line for line in looking.in_words(table))


def test_where_nothing_ran_and_no_server_can_be_asked_status_is_one_line(place: Path, ran: Path, monkeypatch) -> None:
    status, line = call(monkeypatch, "deploy", "status", "--kit", str(place / "kits" / VIEWER))
    assert (status, "the server cannot be reached" in line) == (2, True)
    apart = Path(shutil.move(place / "kits" / VIEWER, place.parent / "viewer"))  # on a machine without the server's kit
    left(place, ran)
    assert call(monkeypatch, "deploy", "status", "--kit", str(apart))[0] == 2
    other = founded(place.parent / "other", name="other")  # the kit beside it is of another federation's server
    shutil.move(apart, other / "kits" / "guest")
    assert call(monkeypatch, "deploy", "status", "--kit", str(other / "kits" / "guest"))[0] == 2


def asked_of(server: SimpleNamespace, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The status by a server that is stood in for."""

    answered_by(server, monkeypatch)
    return commanding.status(commanding.owner(place / "kits" / OWNER))


def serving(*jobs: str) -> SimpleNamespace:
    """What a server says of itself that runs these jobs."""
    running = [SimpleNamespace(job_id=each, app_name="app") for each in jobs]
    return SimpleNamespace(server_info=SimpleNamespace(start_time=1.0), client_info=[], job_info=running)


def test_a_running_job_that_does_not_answer_is_shown_as_such(place: Path, monkeypatch) -> None:
    def silent(number: str, topic: str, data: object) -> dict:
        raise DeployError("no reply")

    listed = [{"job_id": "j", "job_name": "first", "status": "RUNNING", "submit_time": "1"}]
    server = SimpleNamespace(get_system_info=lambda: serving("j"), list_jobs=lambda: listed, do_app_command=silent)
    table = asked_of(server, place, monkeypatch)
    assert table["runs"][0]["silent"]
    assert "its job does not answer" in commanding.in_words(table)[-1]


def test_a_waiting_job_names_the_sites_that_are_away_and_how_long_it_has_waited(place: Path, monkeypatch) -> None:
    """a was heard just now, b ten minutes ago, c never; d is no site of the run."""
    now = datetime.datetime.now(datetime.UTC)
    server = serving()
    server.client_info = [
        SimpleNamespace(name=name, last_connect_time=now.timestamp() - ago) for name, ago in (("a", 1.0), ("b", 600.0))
    ]
    submitted = (now - datetime.timedelta(minutes=3)).isoformat()
    listed = [{"job_id": "j", "job_name": "first", "status": "SUBMITTED", "submit_time": submitted}]
    meta = {"deploy_map": {"app": ["server", "a", "b", "c"]}, "schedule_history": ["t: away: c"]}
    table = asked_of(
        SimpleNamespace(get_system_info=lambda: server, list_jobs=lambda: listed, get_job_meta={"j": meta}.__getitem__),
        place, monkeypatch,
    )  # fmt: skip
    (row,) = table["runs"]
    assert row["waiting"] == ["b", "c"]
    assert 180.0 <= row["waiting_s"] < 200.0
    assert commanding.in_words(table)[-1].strip() == "first: waiting for b, c (3 min)"


def test_a_job_without_a_round_is_starting(place: Path, monkeypatch) -> None:
    def told(number: str, topic: str, data: object) -> dict:
        return {"round": 0, "rounds": 0, "waiting": ["b"]}

    listed = [{"job_id": "j", "job_name": "first", "status": "RUNNING", "submit_time": "1"}]
    server = SimpleNamespace(get_system_info=lambda: serving("j"), list_jobs=lambda: listed, do_app_command=told)
    table = asked_of(server, place, monkeypatch)
    assert commanding.in_words(table)[-1].strip() == "first: starting, waiting for b"


@pytest.mark.parametrize(
    ("history", "busy", "said"),
    [
        (
            ["t: busy: a (first), b (third)"],
            {"a": "first", "b": "third"},
            "second: waiting for busy sites: a (first), b (third)",
        ),
        (["t: busy: a (first)", "t: connected sites (0) < min_sites (1)"], {}, "second: waiting"),
        (None, {}, "second: waiting"),  # the server has not looked at it yet
    ],
)
def test_what_a_waiting_job_waits_for_is_shown(place: Path, monkeypatch, history: object, busy: dict, said: str) -> None:
    listed = [{"job_id": "j", "job_name": "second", "status": "SUBMITTED", "submit_time": "1"}]
    meta = {"schedule_history": history} if history else {}
    server = SimpleNamespace(get_system_info=serving, list_jobs=lambda: listed, get_job_meta={"j": meta}.__getitem__)
    table = asked_of(server, place, monkeypatch)
    assert table["runs"][0]["busy"] == busy
    assert commanding.in_words(table)[-1].strip() == said


def test_another_site_asked_of_the_result_of_one_site_is_said_to_be_another(tmp_path: Path) -> None:
    """`north` is near `north-2` by its letters, and is a real site all the same."""
    config = from_table({"eval": {"where": "sites"}, "sites": [{"name": "north-2", "rank": 4, "source": "x.csv"}]})
    with pytest.raises(ConfigError) as error:
        evaluated.chosen(tmp_path, config, "north", "")
    assert str(error.value) == "--site north: this folder is of north-2 only"
    assert evaluated.chosen(tmp_path, config, "north-2", "") == ["north-2"]
