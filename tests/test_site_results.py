"""What a site keeps when a federation has ended: its own model, which `anyrank evaluate` scores on its own rows."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from anyrank import deployment, files
from anyrank.adapter.adapter import Adapter
from anyrank.cli.verbs import app
from anyrank.errors import ConfigError, RunError
from anyrank.messages import calls, wire
from anyrank.messages.frame import Frame
from anyrank.runs.finding import finished
from anyrank.studies import evaluation
from anyrank.worker import results
from site_world import RANKS, Asked, in_one_process, make_world, site_file, table
from test_site_worker import asked, begun

ONE_AT_A_TIME = threading.Lock()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("results"))


class Here:
    """A site's worker in this process, in place of one of its own."""

    def __init__(self, path: Path, left: list[Frame], opening: Callable, opened: Callable, receive: Any) -> None:
        self.path, self.left, self.opening, self.opened = path, left, opening, opened
        self.site: Asked | None = None

    def start(self, timeout_s: float | None = None) -> None:
        if self.site is None:
            self.site = Asked(self.path)
            self.opened(self._asked(self.opening())[0])

    def ask(self, frames: Any, replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        waiting = list(frames)
        while waiting:
            now = waiting[:2] if waiting[0].header.kind == calls.COHORT else waiting[:1]
            waiting = waiting[len(now) :]
            yield from self._asked(*now)

    def _asked(self, *frames: Frame) -> list[Frame]:
        with ONE_AT_A_TIME, torch.enable_grad():
            found = self.site.ask(*frames)
        self.left += found
        return found

    def kill(self) -> None: ...

    def revive(self) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None:
        if self.site:
            self.site.close()


def federated(world: Path, out: Path, public: dict, **sections: Any) -> SimpleNamespace:
    """A federation over three sites in this process: its `summary`, the `left` frames, and the sites' `stores` by name."""
    left: list[Frame] = []
    paths = {name: site_file(world, name, f"{out.name}-{name}", **sections) for name in RANKS}
    makes = {name: partial(Here, path, left) for name, path in paths.items()}
    summary = deployment.federate(in_one_process(world, public), makes, out / "run", wait_s=0)
    return SimpleNamespace(
        summary=summary, left=left, run=out / "run", stores={name: world / f"{out.name}-{name}" for name in RANKS}
    )


def result_of(store: Path) -> Path:
    (folder,) = (store / results.RESULTS).iterdir()
    return folder


def evaluated(folder: Path, *more: str) -> dict[str, Any]:
    """What the command prints. Raises the error whose line it would end with."""
    done = CliRunner().invoke(app, ["evaluate", str(folder), "--json", *more], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", ["rbla", "raflora", "stayput", "fedsa", "flora", "ffa_lora", "hetlora"])
def test_a_site_scores_the_model_that_it_was_handed_as_it_did_in_the_closing_exchange(world, tmp_path, method) -> None:
    """The command knows only the site's folder; the figures of the exchange are sums that another process added up."""
    public = table(method, eval={"where": "sites"}, run={"name": "winter", "rounds": 3, "stacking": "never", "seed": 7})
    done = federated(world, tmp_path / method, public, accept={"scores": True})
    assert done.summary["handed_over"] == sorted(RANKS)
    for name, store in done.stores.items():
        row, reported = evaluated(result_of(store))["sites"][name], done.summary["sites"][name]
        assert row["accuracy"] == reported["accuracy"]
        assert row["rank"] == reported["rank"] == RANKS[name]
        assert row["loss"] == pytest.approx(reported["loss"], rel=1e-6)
        assert row["test_examples"] == reported["test_examples"] > 0
        own = result_of(store) / "sites" / name
        assert json.loads((own / "labels.json").read_text()) == done.summary["label_names"]
        adapter = Adapter.load(own / "adapter")
        assert all(rank <= RANKS[name] for rank in adapter.ranks.values())
        assert adapter.config["base_model_name_or_path"] == str(world / "model"), "the site's own folder, not the server's name"
        if method in ("rbla", "raflora", "ffa_lora", "flora", "hetlora"):
            theirs = Adapter.load(done.run / "sites" / name / "adapter")
            for layer, mine in adapter.layers.items():
                assert torch.equal(mine.A, theirs.layers[layer].A)
                assert torch.equal(mine.B, theirs.layers[layer].B)
        rest = RANKS[name] < max(RANKS.values())  # slices of the global adapter that the site does not train
        assert (own / "base-update").exists() == (method == "flora" or (method == "stayput" and rest))
    if method == "fedsa":  # whose B the server never had
        mine = Adapter.load(result_of(done.stores["county"]) / "sites" / "county" / "adapter")
        theirs = Adapter.load(done.run / "sites" / "county" / "adapter")
        assert any(layer.B.any() for layer in mine.layers.values())
        assert not any(layer.B.any() for layer in theirs.layers.values())


def test_a_site_that_reports_no_scores_has_the_result_all_the_same_and_nothing_of_it_leaves(world, tmp_path) -> None:
    public = table("rbla", inside=False, model={"head": "frozen"}, eval={"where": "sites"},
                   privacy={"level": "example", "noise_multiplier": 1.0, "delta": 1e-5})  # fmt: skip
    done = federated(world, tmp_path / "quiet", public, privacy={"level": "example", "epsilon": 50.0, "delta": 1e-5})
    assert done.summary["handed_over"] == sorted(RANKS)
    assert done.summary["unscored"]
    closing = [frame for frame in done.left if frame.header.kind == wire.COUNTS]
    assert len(closing) == len(RANKS)
    assert {frame.header.body["counts"] for frame in closing} == {None}
    assert {frame.array_bytes for frame in closing} == {0}
    for name, store in done.stores.items():
        summary = json.loads((result_of(store) / "summary.json").read_text())
        assert summary["sites"][name]["accuracy"] is None
        found = evaluated(result_of(store), "--data", str(world / f"{name}.csv"), "--site", name)
        assert found["sites"][name]["test_examples"] > 0


def test_the_servers_folder_says_where_the_rows_are(world, tmp_path) -> None:
    done = federated(world, tmp_path / "owner", table("rbla", eval={"where": "sites"}), accept={"scores": True})
    for more in ((), ("--site", "county"), ("--site", "county", "--data", str(world / "county.csv"))):
        with pytest.raises(ConfigError, match="rows and base model are at the sites") as refused:
            evaluated(done.run, *more)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("run", ["../../out", "/etc/x", "a" * 300, "..", ".", "", "win\nter", "x\\..\\y"])
def test_whatever_a_server_calls_a_run_its_result_lies_in_the_store(world, tmp_path, run) -> None:
    held = SimpleNamespace(run=run, key="0123456789abcdef")
    made = (tmp_path / results.RESULTS / results._name(held)).resolve()
    assert made.parent == (tmp_path / results.RESULTS).resolve()
    assert len(made.name.encode()) <= 200
    assert not made.name.startswith(".")


def closing(world: Path, name: str) -> tuple[Asked, Callable[[], Frame]]:
    """A site after round 3 of 3, and what asks it for the closing exchange."""
    site, server = begun(world, name, "rbla", table("rbla", eval={"where": "sites"}), accept={"scores": True})
    return site, lambda: asked(site, server, 4, train=False, score=True)


def refusal(folder: Path, expected: Any) -> str:
    """The line of the error where the folder is refused; where it is not, its scores are the expected ones."""
    try:
        found = evaluation.of_sites(folder, finished(folder), ["county"])["sites"]
    except RunError as error:
        return str(error)
    assert found == expected
    return ""


def test_a_result_that_was_cut_off_at_any_write_is_not_taken_for_one_and_can_be_sent_again(world, monkeypatch) -> None:
    events: list[tuple[str, Path]] = []
    site, ask = closing(world, "cut")
    monkeypatch.setattr(files, "reached", lambda what, path: events.append((what, path)))
    assert ask().header.kind == wire.COUNTS
    whole, folder = len(events), result_of(world / "cut")
    expected = evaluation.of_sites(folder, finished(folder), ["county"])["sites"]
    assert whole > 20
    for fail in range(0, whole, 3):
        counted: list[str] = []

        def reached(what: str, path: Path, fail: int = fail, counted: list[str] = counted) -> None:
            counted.append(what)
            if results.RESULTS in path.parts and len(counted) > fail:
                raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(files, "reached", reached)
        reply = ask()
        assert wire.counts_of(reply).counts is not None, "scores are not lost with the folder"
        monkeypatch.setattr(files, "reached", lambda what, path: None)
        said = refusal(folder, expected)
        assert "\n" not in said
        assert "anyrank run" not in said, "a site's result is not trained again"
        assert ask().header.kind == wire.COUNTS
        assert evaluation.of_sites(folder, finished(folder), ["county"])["sites"] == expected
    site.close()


def test_a_full_store_keeps_no_result_and_says_so_in_its_log(world) -> None:
    site, ask = closing(world, "narrow")
    site.desk.store.most_bytes = 10_000
    assert wire.counts_of(ask()).counts is not None
    assert not (world / "narrow" / results.RESULTS).exists()
    assert "store.megabytes allows" in (world / "narrow" / "site.log").read_text()
    site.close()


def test_scores_before_the_last_round_leave_no_result(world) -> None:
    site, server = begun(world, "early", "rbla", table("rbla", eval={"where": "sites"}), accept={"scores": True})
    assert asked(site, server, 2, train=False, score=True).header.kind == wire.COUNTS
    assert not (world / "early" / results.RESULTS).exists()
    site.close()


def test_a_changed_file_of_a_result_is_named(world) -> None:
    site, ask = closing(world, "changed")
    ask()
    site.close()
    folder = result_of(world / "changed")
    shutil.copy(folder / "summary.json", folder / "sites" / "county" / "adapter" / "adapter_config.json")
    with pytest.raises(RunError, match="adapter_config.json: has changed since the run ended; restore it"):
        evaluated(folder)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_result_is_not_trained_over(world, more, half) -> None:
    """Without rounds in it, it looks like a run that was killed before round 1, and would be trained by this site alone."""
    name = f"over-{half}-{len(more)}"
    site, ask = closing(world, name)
    ask()
    site.close()
    folder = result_of(world / name)
    if half:
        for file in ("summary.json", "seal.json"):
            (folder / file).unlink()
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.raises(RunError, match="what a site keeps of a federation") as refused:
        CliRunner().invoke(app, ["run", str(folder / "config.toml"), "--out", str(folder), *more], catch_exceptions=False)
    assert "\n" not in str(refused.value)
    assert "--resume" not in str(refused.value)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
