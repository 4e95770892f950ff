"""While a round is open, the run's folder says who has not replied. It changes nothing of the run, and fails nothing."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import site_worker
from anyrank import deployment, files
from anyrank.engines.sites import Sites
from anyrank.federation import loop
from anyrank.messages.records import Job
from anyrank.runs import waiting
from anyrank.runs.removal import remove_run
from kinds_of_run import whole
from test_deployment import config, federate, own_files, world  # noqa: F401 - the fixture
from test_federation import Script, build

LONGEST_S = 120.0
ALL = ["client-0", "client-1", "client-2", "client-3"]


def said(folder: Path) -> dict[str, Any] | None:
    """What stands in `status.json` now."""
    try:
        return json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return None


def until(there: Any, what: str) -> None:
    end = time.monotonic() + LONGEST_S
    while not there():
        assert time.monotonic() < end, what
        time.sleep(0.005)


@dataclass
class Slow(Script):
    """Before each reply it waits until the folder names those that are left; `told`: what it read then."""

    folder: Path = Path()
    told: list[dict[str, Any]] = field(default_factory=list)

    def train(self, jobs: Sequence[Job], *rest: Any, **more: Any) -> Iterator[Any]:
        left = [job.client.name for job in jobs]
        for reply in super().train(jobs, *rest, **more):
            until(lambda: (said(self.folder) or {}).get("waiting_for") == left, f"never waiting for {left}")
            self.told.append(said(self.folder))
            left.remove(reply.client)
            yield reply


class Hindered(Script):
    """Each round lasts until the folder could have been written many times."""

    def train(self, jobs: Sequence[Job], *rest: Any, **more: Any) -> Iterator[Any]:
        time.sleep(0.2)
        yield from super().train(jobs, *rest, **more)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SOON_S", 0.01)
    monkeypatch.setattr(waiting, "EVERY_S", 0.01)


def run(parent: Path, engine: Script, resume: bool = False, **keys: Any) -> Path:
    parent.mkdir(exist_ok=True)
    built, store = build(parent, engine, resume=resume, **keys)
    with store:
        loop.run(built, store)
    return parent / "run"


def test_those_who_have_not_replied_are_named_until_the_round_ends(tmp_path: Path, soon: None) -> None:
    engine = Slow(folder=tmp_path / "run")
    before = time.time()
    run(tmp_path, engine)
    names = [each["waiting_for"] for each in engine.told]
    assert names == 2 * [ALL, ALL[:3], ALL[:2], ALL[:1]]  # the script replies from the last to the first, in two rounds
    assert [each["round"] for each in engine.told] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert {each["asked"] for each in engine.told} == {4}
    assert [each["missing"] for each in engine.told] == 2 * [4, 3, 2, 1]
    assert all(before - 1 < each["began"] <= time.time() for each in engine.told)
    assert [each["heard"] > 0 for each in engine.told] == 2 * [False, True, True, True]
    assert said(tmp_path / "run") is None
    assert sorted(path.name for path in (tmp_path / "run").glob(".status*")) == []


def test_it_changes_no_byte_of_the_run_and_no_write_event(tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The events are those that the tests of faults and kills count and strike at."""
    counts, found = [], []
    for name, engine in (("slow", Slow(folder=tmp_path / "slow" / "run")), ("quick", Script())):
        events: list[tuple[str, str]] = []
        with monkeypatch.context() as patch:
            patch.setattr(files, "reached", lambda *event, events=events: events.append(event))
            found.append(whole(run(tmp_path / name, engine)))
        counts.append([(what, os.path.relpath(path, tmp_path / name)) for what, path in events])
    assert counts[0] == counts[1]
    assert found[0] == found[1]


def test_a_quick_round_writes_nothing_and_no_thread_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(waiting.Wait, "_put", lambda *given: written.append(given))
    before = threading.active_count()
    run(tmp_path, Script(), rounds=20)
    assert written == []
    assert threading.active_count() == before


@pytest.mark.parametrize("what", ["a folder", "a link", "no thread", "a full disk"])
def test_where_it_cannot_be_written_the_run_goes_on(
    what: str, tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, outside = whole(run(tmp_path / "undisturbed", Script())), tmp_path / "outside"
    outside.write_text("mine")
    built, store = build(tmp_path, Hindered())
    if what == "a folder":
        (tmp_path / "run" / "status.json").mkdir()
    if what == "a link":
        (tmp_path / "run" / "status.json").symlink_to(outside)
    if what == "no thread":
        monkeypatch.setattr(threading.Thread, "start", refuse(RuntimeError("can't start new thread")))
    if what == "a full disk":
        monkeypatch.setattr(os, "replace", refuse(OSError(28, "No space left on device"), os.replace, "status.json"))
    with store:
        loop.run(built, store)
    assert whole(tmp_path / "run") == expected
    assert outside.read_text() == "mine"
    assert not list((tmp_path / "run").glob(".status*"))


def refuse(error: Exception, real: Any = None, name: str = "") -> Any:
    """A call that fails; with `name`, only if its second argument is a path of this name."""

    def call(*given: Any) -> Any:
        if real is None or Path(given[1]).name == name:
            raise error
        return real(*given)

    return call


def test_what_a_killed_run_left_is_gone_when_it_goes_on(tmp_path: Path) -> None:
    folder = run(tmp_path, Script(), rounds=2)
    for name in ("status.json", ".status.json.4194305.tmp"):  # no process has such a number
        (folder / name).write_text('{"round": 2, "waiting_for": ["client-1"]}')
    run(tmp_path, Script(), resume=True, rounds=3)
    assert not [path for path in folder.iterdir() if "status" in path.name]


def test_what_a_killed_run_of_a_comparison_left_can_be_deleted_with_it(tmp_path: Path) -> None:
    one = tmp_path / "all" / "rbla" / "seed-0"
    one.mkdir(parents=True)
    (tmp_path / "all" / "compare.json").write_text('{"runs": ["rbla/seed-0"]}')
    for name in ("config.toml", "status.json"):
        (one / name).write_text("")
    remove_run(tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_replies_of_any_kind_are_passed_on_as_they_are(tmp_path: Path) -> None:
    class Breaks:
        @property
        def client(self) -> str:
            raise ZeroDivisionError

    replies = [None, 3, Breaks(), object()]
    with waiting.shown(tmp_path, 1, ["a"]) as wait:
        assert list(wait.heard(replies)) == replies


def test_a_folder_in_which_no_run_has_begun_stays_empty(tmp_path: Path, soon: None) -> None:
    """Sites are waited for before a new run has its folder, which must be empty then."""
    for folder in (tmp_path, tmp_path / "none"):
        with waiting.shown(folder, waiting.BEFORE_ROUNDS, ["a"]) as wait:
            wait.only(["a"])
            time.sleep(0.1)
            assert not list(tmp_path.iterdir())


def test_a_site_that_hangs_is_named_while_the_others_wait_for_it(
    world: Any,  # noqa: F811
    tmp_path: Path,
    soon: None,
) -> None:
    """Real processes: county's worker sleeps in round 2, until the deadline."""
    chosen = config(world, run={"rounds": 2}, rounds={"deadline_s": 1.0})
    paths = own_files(world, tmp_path / "own", {"cohort": ["hang", 1]})
    worker = Path(site_worker.__file__)
    commands = {name: (sys.executable, str(worker), str(path)) for name, path in paths.items()}
    seen, over = set(), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if table := said(tmp_path / "run"):
                seen.add((table["round"], tuple(table["waiting_for"])))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        deployment.federate(chosen, commands, tmp_path / "run")
    finally:
        over.set()
        watching.join()
    assert (2, ("county",)) in seen
    assert said(tmp_path / "run") is None


def test_who_has_not_replied_in_the_exchange_after_the_last_round_is_named(
    world: Any,  # noqa: F811
    tmp_path: Path,
    soon: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every site scores the last state, in what counts as round 2 of a run of one round."""
    scored, told = Sites.score, []

    def slow(engine: Sites, *values: Any) -> Iterator[Any]:
        until(lambda: said(tmp_path / "run"), "never written")
        told.append(said(tmp_path / "run"))
        yield from scored(engine, *values)

    monkeypatch.setattr(Sites, "score", slow)
    chosen = config(world, run={"rounds": 1})
    federate(world, chosen, tmp_path / "run")
    assert [(each["round"], each["waiting_for"]) for each in told] == [(2, [site.name for site in chosen.sites])]
    assert said(tmp_path / "run") is None


def test_sites_that_have_not_come_are_named_before_a_run_goes_on(
    world: Any,  # noqa: F811
    tmp_path: Path,
    soon: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    federate(world, config(world, run={"rounds": 1}), tmp_path / "run")
    opened, told = Sites.open, []

    def late(engine: Sites, wait_s: float, missing: Any, folder: Path) -> Any:
        missing(["county"])
        until(lambda: said(tmp_path / "run"), "never written")
        told.append(said(tmp_path / "run"))
        return opened(engine, wait_s, missing, folder)

    monkeypatch.setattr(Sites, "open", late)
    federate(world, config(world, run={"rounds": 2}), tmp_path / "run", resume=True)
    assert [(each["round"], each["waiting_for"]) for each in told] == [(0, ["county"])]
    assert said(tmp_path / "run") is None
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
