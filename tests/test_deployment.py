"""A federation over sites that keep their data: the same bytes as in one process, and whatever a site does costs its own reply.

Most sites here are threads of this process that speak frames, bytes for bytes; some are processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anyrank import deployment, devices, simulation
from anyrank.config.sections import Config
from anyrank.config.tables import from_table, to_table
from anyrank.deployment.public import PUBLIC, WHOLLY_WITHHELD, WITHHELD
from anyrank.deployment.public import public as told
from anyrank.engines import seat
from anyrank.engines.roll import Joined, roster_of
from anyrank.engines.seat import Seat
from anyrank.errors import AnyRankError, ConfigError, FrameError, RunError, RunFailed
from anyrank.messages import calls
from anyrank.messages import spool as spools
from anyrank.messages.frame import Frame, Header, from_bytes, to_bytes
from anyrank.messages.records import Facts
from anyrank.messages.roster import Roster
from anyrank.methods import REGISTRY, make
from anyrank.runs.checkpoint import load_state
from anyrank.worker.supervisor import Died, Late

transformers = pytest.importorskip("transformers")
import site_worker  # noqa: E402 - needs transformers
from test_sites import LABELS, RANKS, lines, site, table  # noqa: E402
from tiny import make_model  # noqa: E402

NAMES = ("county", "lakeside", "st-mary")
LIMIT = 1 << 24
ONE_AT_A_TIME = threading.Lock()  # torch draws from one state a process


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 1)
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    for name in ("_GRACE_S", "_SHORT_S"):  # a round waits for a worker that starts, however slow the machine is
        monkeypatch.setattr(seat, name, 120.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("deployment")
    make_model(folder / "model")
    make_model(folder / "other model", seed=1)
    return SimpleNamespace(folder=folder, listed=[site(folder, name) for name in NAMES])


def config(world: SimpleNamespace, method: str = "rbla", rank: int = 0, **sections: dict[str, Any]) -> Config:
    listed = [one | ({"rank": rank} if rank else {}) for one in world.listed]
    run = {"run": {"name": "three", "rounds": 2} | sections.pop("run", {})}
    given = {"method": {"name": method}, "eval": {"where": "sites"}} | sections
    return from_table(table(world.folder, listed, **run, **given))


class Gone(BaseException):
    """A site's process that ends, or hangs."""


class Inside(site_worker.Site):
    def end(self, how: str) -> None:
        raise Gone(how)


class InThread:
    """A site's worker in a thread, in place of `Supervised`: a new one is made after each that ends."""

    def __init__(
        self, path: Path, seen: list[Frame], opening: Callable[[], Frame], opened: Callable[[Frame], None], receive: Any
    ) -> None:
        self.path, self.seen, self.opening, self.opened = path, seen, opening, opened
        self.site: Inside | None = None

    def start(self, timeout_s: float | None = None) -> None:
        if self.site is None:
            self.site = Inside(self.path)
            try:
                self.opened(next(self._answered(iter([self.opening()]))))
            except BaseException:
                self.site = None
                raise

    def ask(self, frames: Any, replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        self.start()
        waiting = iter(frames)
        for _ in range(replies):
            reply = next(self._answered(waiting))
            yield reply
            if reply.header.kind == calls.ERROR:
                return

    def _answered(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        received = map(partial(_through, self.seen), frames)
        try:
            with ONE_AT_A_TIME, torch.enable_grad():
                yield from [_through(self.seen, each) for each in
                            self.site.answer(next(received), lambda: next(received), lambda frame: None)]  # fmt: skip
        except (Gone, FrameError, AssertionError) as error:
            self.site = None
            if str(error) == "hang":
                raise Late("it took too long") from None
            raise Died("its process ended; its last words: patient 17") from None

    def kill(self) -> None:
        pass

    def revive(self) -> None:
        pass

    def end(self) -> None:
        self.site = None

    def close(self) -> None:
        self.site = None


def _through(seen: list[Frame], frame: Frame) -> Frame:
    seen.append(from_bytes(to_bytes(frame), LIMIT))
    return seen[-1]


def own_files(world: SimpleNamespace, folder: Path, deeds: dict[str, Any] | None = None, **changed: Any) -> dict[str, Path]:
    """Each site's own file; `deeds` and `changed`: of county alone."""
    folder.mkdir(exist_ok=True)
    paths = {}
    for one in world.listed:
        data = {key: one[key] for key in ("source", "test_source") if key in one}
        own = {"name": one["name"], "data": data, "model": {"path": str(world.folder / "model")}}
        if one["name"] == "county":
            own |= {"deeds": deeds or {}, **changed}
        paths[one["name"]] = folder / f"{one['name']}.json"
        paths[one["name"]].write_text(json.dumps(own))
    return paths


def inside(paths: dict[str, Path], seen: list[Frame] | None = None) -> dict[str, Callable]:
    return {name: partial(InThread, path, [] if seen is None else seen) for name, path in paths.items()}


def federate(world: SimpleNamespace, chosen: Config, out: Path, seen: list[Frame] | None = None, **site_file: Any) -> dict:
    resume = site_file.pop("resume", False)
    on_round = site_file.pop("on_round", None)
    paths = own_files(world, out.parent / "own", **site_file)
    return deployment.federate(chosen, inside(paths, seen), out, resume, on_round, wait_s=0)


def rows(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in lines(folder / "metrics.jsonl")]


def same_adapters(one: Path, other: Path) -> bool:
    files = sorted(path.relative_to(one) for path in one.glob("adapter*/*.safetensors"))
    assert files
    return all((one / path).read_bytes() == (other / path).read_bytes() for path in files)


# --- the same as in one process --------------------------------------------------------------------------------------

METHODS = sorted(name for name, kind in REGISTRY.items()
                 if kind.__module__.startswith("anyrank.methods") and not kind.pools_data)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_bytes_that_it_leaves_in_one_process(world, tmp_path, method) -> None:
    mixed = REGISTRY[method].traits.mixed_ranks
    chosen, seen = config(world, method, rank=0 if mixed else 4), []
    here, there = simulation.execute(chosen, tmp_path / "here"), federate(world, chosen, tmp_path / "there", seen)
    assert same_adapters(tmp_path / "here", tmp_path / "there")
    assert rows(tmp_path / "here") == rows(tmp_path / "there")
    unlike = {"seconds": 0, "base_model": ""}  # the folder of the base model stays at the sites
    assert there.pop("handed_over") == sorted(NAMES)
    assert here | unlike == there | unlike
    sent = {kind: sum(frame.array_bytes for frame in seen if frame.header.kind == kind) for kind in ("download", "update")}
    counted = rows(tmp_path / "there")
    assert sent["update"] == sum(row["upload_bytes"] for row in counted)
    assert sent["download"] == sum(row["download_bytes"] for row in counted) + there["scoring_bytes"]
    ranks = {RANKS[name] if mixed else 4 for name in NAMES}
    assert {path.name for path in (tmp_path / "there").glob("adapter-rank-*")} == {f"adapter-rank-{rank}" for rank in ranks}


@pytest.mark.parametrize(
    "sections", [{"model": {"head": "trained"}}, {"eval": {"where": "sites", "by_label": True, "every": 2}}]
)
def test_so_does_a_trained_head_and_a_score_by_label(world, tmp_path, sections) -> None:
    base = to_table(config(world, run={"rounds": 3}))
    chosen = from_table(base | {name: base[name] | keys for name, keys in sections.items()})
    simulation.execute(chosen, tmp_path / "here")
    federate(world, chosen, tmp_path / "there")
    assert same_adapters(tmp_path / "here", tmp_path / "there")
    assert rows(tmp_path / "here") == rows(tmp_path / "there")


@pytest.mark.parametrize("least", [0, 1 << 20])
def test_sites_in_processes_of_their_own_do_the_same_and_survive_a_kill(world, tmp_path, monkeypatch, least) -> None:
    """county's process is killed as it gets its second round's job: one reply is missing, and round 3 has it again.

    `least`: bytes of a reply, or of the adapter that a site starts from, above which it is kept in a file."""
    monkeypatch.setattr(spools, "SMALL", least)
    monkeypatch.setattr(spools, "LEAST", min(least, spools.LEAST))
    chosen = config(world, run={"rounds": 3})
    paths = own_files(world, tmp_path / "own", {"cohort": ["die", 1]})
    worker = Path(site_worker.__file__)
    commands = {name: (sys.executable, str(worker), str(path)) for name, path in paths.items()}
    deployment.federate(chosen, commands, tmp_path / "there")
    statuses = [(row["round"], row["status"], row["reason"]) for row in lines(tmp_path / "there" / "clients.jsonl")
                if row["client"] == "county"]  # fmt: skip
    assert statuses == [(1, "ok", ""), (2, "failed", "crashed"), (3, "ok", "")]
    assert [row["scored_by"] for row in rows(tmp_path / "there")] == [3, 2, 3]
    simulation.execute(chosen, tmp_path / "here")
    assert rows(tmp_path / "here")[0] == rows(tmp_path / "there")[0]


def test_fedsas_own_parts_never_come_to_the_server(world, tmp_path) -> None:
    """The server's state has each client's A; B and head are as at the start, where B is zero. The adapter needs neither."""
    base = to_table(config(world, "fedsa"))
    chosen, seen = from_table(base | {"model": base["model"] | {"head": "trained"}}), []
    federate(world, chosen, tmp_path / "there", seen)
    simulation.execute(chosen, tmp_path / "here")
    held = {way: load_state(tmp_path / way / "checkpoint" / "state.safetensors").extra for way in ("here", "there")}
    assert held["there"].keys() == held["here"].keys() == set(NAMES)
    for name in NAMES:
        for layer, own in held["there"][name].layers.items():
            assert not own.B.any()
            assert held["here"][name].layers[layer].B.any()
            assert torch.equal(own.A, held["here"][name].layers[layer].A)
    arrays = {array for frame in seen if frame.header.kind == "update" for array in frame.arrays}
    assert arrays
    assert {array[0] for array in arrays} == {"A"}
    assert same_adapters(tmp_path / "here", tmp_path / "there")


SERVER = """
import json, resource, sys
from pathlib import Path
import anyrank.deployment as deployment
from anyrank.config.tables import from_table
given = json.loads(Path(sys.argv[1]).read_text())
deployment.federate(from_table(given["config"]), given["sites"], Path(given["out"]))
heavy = ("transformers", "peft", "tokenizers", "sklearn", "datasets", "anyrank.tasks", "anyrank.training", "anyrank.data")
loaded = [name for name in sys.modules if any(name == each or name.startswith(f"{each}.") for each in heavy)]
print(json.dumps({"loaded": loaded, "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def test_the_server_loads_neither_data_nor_base_model(world, tmp_path) -> None:
    """In a process of its own, with a base model of 120 MB at the sites, of which it takes no part into its memory."""
    large = transformers.BertConfig(
        vocab_size=117_000, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    folder = tmp_path / "large"
    make_model(folder)
    transformers.AutoModel.from_config(large).save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 110e6
    paths = own_files(world, tmp_path / "own")
    for path in paths.values():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"path": str(folder)}}))
    worker = str(Path(site_worker.__file__))
    given = {
        "config": to_table(config(world, run={"rounds": 1})),
        "sites": {name: [sys.executable, worker, str(path)] for name, path in paths.items()},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    used = []
    for program in (SERVER, "import resource, anyrank.deployment\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"):
        command = [sys.executable, "-c", program, str(tmp_path / "given.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        used.append(json.loads(done.stdout.splitlines()[-1]))
    assert used[0]["loaded"] == []
    assert (used[0]["kilobytes"] - used[1]) * 1024 < size / 2


# --- what sites are told ---------------------------------------------------------------------------------------------


def test_each_key_of_a_configuration_is_public_or_withheld_and_none_is_both() -> None:
    for section in dataclasses.fields(Config):
        if section.name in WHOLLY_WITHHELD:
            assert section.name not in PUBLIC
            continue
        told, kept = PUBLIC[section.name], WITHHELD.get(section.name, ())
        table = {each.name for each in dataclasses.fields(type(getattr(Config(), section.name)))}
        assert not set(told) & set(kept)
        assert {*told, *kept} | ({"options"} if section.name == "method" else set()) == table, section.name


def test_a_public_configuration_has_no_path_no_file_and_no_code(world) -> None:
    """Every text that names a place is marked; no mark is in what sites get, which is a configuration that can be read."""
    given = to_table(config(world))
    mark = "/secret/place"
    for one in given["sites"]:
        one |= {"source": f"{mark}/{one['name']}.csv", "test_source": f"{mark}/{one['name']}-test.csv"}
    given["model"]["path"] = f"{mark}/model"
    public = told(from_table(given))
    text = json.dumps(public)
    assert mark not in text
    for name in NAMES:
        assert name not in text, "a site hears of the others"
    for key in ("path", "file", "source", "test_source", "handed_in", "ranks", "names"):
        assert f'"{key}":' not in text
    assert "sites" not in public
    assert from_table(public).train == config(world).train
    assert public["method"] == {"name": "rbla"}


def test_the_worker_gets_this_configuration_and_the_folder_of_the_run_has_no_source(world, tmp_path) -> None:
    chosen = config(world, run={"rounds": 1})
    federate(world, chosen, tmp_path / "run")
    assert json.loads((tmp_path / "own" / "county.json.setup.json").read_text()) == told(chosen)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert str(world.folder).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"eval": {"where": "server"}}, "eval.where: expected 'sites'"),
        ({"method": {"name": "centralized"}}, "method.name: centralized gathers all examples in one place"),
        ({"method": {"name": "rbla", "file": "mine.py"}}, "method.file: sites run no code of others"),
        ({"data": {"test_source": "held.csv"}}, "data.test_source: the server has no held-out examples"),
    ],
)
def test_what_no_federation_over_sites_can_have_is_refused_before_a_site_is_asked(world, tmp_path, sections, reason) -> None:
    base = to_table(config(world))
    chosen = from_table(base | {name: base[name] | keys for name, keys in sections.items()})
    with pytest.raises(ConfigError, match=reason) as refusal:
        deployment.federate(chosen, {name: ("false",) for name in NAMES}, tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_the_sites_that_are_given_are_those_of_the_configuration(world, tmp_path) -> None:
    for given in (NAMES[:2], (*NAMES, "eve")):
        with pytest.raises(ConfigError, match="name the same ones in both"):
            deployment.federate(config(world), {name: ("false",) for name in given}, tmp_path / "run")
    plain = from_table({key: value for key, value in to_table(config(world)).items() if key not in ("sites", "clients")})
    with pytest.raises(ConfigError, match=r"expected a table \[\[sites\]\] for each site, got none"):
        deployment.federate(plain, {}, tmp_path / "run")


# --- sites that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site_file", "reason"),
    [
        (
            {"deeds": {"setup": ["other base", 0]}},
            "site county: has another base model, or version of anyrank and torch than site",
        ),
        ({"deeds": {"setup": ["other labels", 0]}}, "site county: has another label names than site lakeside"),
        ({"deeds": {"start": ["other start", 0]}}, "site county: has another base model, or version of anyrank and torch than"),
        ({"deeds": {"setup": ["refuse", 0]}}, "site county: site: setup is refused"),
        ({"deeds": {"start": ["refuse", 0]}}, "site county: site: start is refused"),
        ({"says": "lakeside"}, "site county: expected to hear from it alone, got lakeside; correct the name"),
        ({"says": "eve\n\x1b[31m"}, "site county: "),
        ({"data": {"source": "nowhere.csv"}}, "site county: .*nowhere.csv"),
        ({"model": {"path": ""}}, "site county: "),
    ],
)
def test_a_site_that_does_not_fit_is_named_in_a_line_and_nothing_is_left(world, tmp_path, site_file, reason) -> None:
    with pytest.raises(RunFailed, match=reason) as refusal:
        federate(world, config(world), tmp_path / "run", **site_file)
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_another_base_model_of_the_same_shapes_is_found_by_its_digest(world, tmp_path) -> None:
    with pytest.raises(RunFailed, match="site county: has another base model"):
        federate(world, config(world), tmp_path / "run", model={"path": str(world.folder / "other model")})


def test_sites_that_stay_away_are_named(world, tmp_path) -> None:
    with pytest.raises(RunFailed, match="sites: county did not come within 0 s; start them, and the run again"):
        federate(world, config(world), tmp_path / "run", deeds={"setup": ["die", *range(99)]})
    assert not (tmp_path / "run").exists()


def test_a_site_that_comes_late_is_waited_for(world, tmp_path) -> None:
    paths, there = own_files(world, tmp_path / "own", {"setup": ["die", 0]}), []
    summary = deployment.federate(
        config(world), inside(paths), tmp_path / "run", progress=lambda *numbers: there.append(numbers), wait_s=60
    )
    assert there == [(2, 3)]
    assert summary["rejected"] == 0


def ready_of(name: str, **facts: Any) -> calls.Ready:
    return calls.Ready(
        Roster((name,), sizes=_numbers(5), pooled=0, facts=Facts("t", **facts), held_out=_numbers(2)), base_digest="d"
    )


def _numbers(*values: int) -> Any:
    import numpy as np

    return np.array(values, np.int64)


def test_the_roster_is_in_the_order_of_names_with_sums_and_common_facts() -> None:
    joined = {name: Joined(ready_of(name, train_examples=number, test_examples=1, label_names=("x",), model_bytes=9), "s")
              for number, name in enumerate(("b", "c", "a"))}  # fmt: skip
    roster = roster_of(joined)
    assert (roster.names, roster.in_order, roster.facts.train_examples, roster.facts.test_examples) == (
        ("a", "b", "c"),
        True,
        3,
        3,
    )
    assert (roster.facts.label_names, roster.facts.model_bytes, roster.held_out.tolist()) == (("x",), 9, [2, 2, 2])
    assert roster.owners is roster.by_label is None


def test_a_base_model_in_another_folder_at_each_site_has_no_name_at_the_server() -> None:
    joined = {name: Joined(ready_of(name, base_model=f"/home/{name}/model"), "s") for name in "ab"}
    assert roster_of(joined).facts.base_model == ""
    assert roster_of({name: Joined(ready_of(name, base_model="tiny"), "s") for name in "ab"}).facts.base_model == "tiny"


@pytest.mark.parametrize("fact", ["task", "head", "label_names", "model_bytes"])
def test_the_site_that_most_others_do_not_agree_with_is_named(fact) -> None:
    values = {"label_names": ("\x1b[31m" * 200,), "model_bytes": 8}
    odd = ready_of("b")
    facts = dataclasses.replace(odd.roster.facts, **{fact: values.get(fact, "another")})
    odd = dataclasses.replace(odd, roster=dataclasses.replace(odd.roster, facts=facts))
    joined = {"a": Joined(ready_of("a"), "s"), "b": Joined(odd, "s"), "c": Joined(ready_of("c"), "s")}
    with pytest.raises(RunFailed, match="site b: has another .* than site a") as refusal:
        roster_of(joined)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500


# --- sites that go wrong while it runs -------------------------------------------------------------------------------

ROUNDS = 4


def statuses(folder: Path) -> list[tuple[str, str]]:
    return [(row["status"], row["reason"]) for row in lines(folder / "clients.jsonl") if row["client"] == "county"]


OK, CRASHED, REFUSED = ("ok", ""), ("failed", "crashed"), ("failed", "refused")
ALWAYS = range(1, 9)


@pytest.mark.parametrize(
    ("deeds", "expected"),
    [
        ({"cohort": ["die", 1]}, [OK, CRASHED, OK, OK]),
        ({"cohort": ["hang", 1]}, [OK, ("failed", "late"), OK, OK]),
        ({"cohort": ["fail", 1]}, [OK, ("failed", "diverged"), OK, OK]),
        ({"cohort": ["refuse", 1]}, [OK, REFUSED, OK, OK]),
        ({"cohort": ["die", 1], "setup": ["die", 1]}, [OK, CRASHED, CRASHED, OK]),
        ({"cohort": ["die", 1], "start": ["die", 1]}, [OK, CRASHED, CRASHED, OK]),
        ({"cohort": ["die", 1], "setup": ["refuse", 1]}, [OK, CRASHED, REFUSED, OK]),
        ({"cohort": ["die", 1], "start": ["refuse", 1]}, [OK, CRASHED, REFUSED, OK]),
        ({"cohort": ["die", 1], "setup": ["other count", *ALWAYS]}, [OK, CRASHED, REFUSED, REFUSED]),
        ({"cohort": ["die", 1], "setup": ["other base", *ALWAYS]}, [OK, CRASHED, REFUSED, REFUSED]),
        ({"cohort": ["die", 1], "start": ["other start", *ALWAYS]}, [OK, CRASHED, REFUSED, REFUSED]),
    ],
)
def test_what_goes_wrong_at_a_site_costs_its_replies_and_tells_a_code(world, tmp_path, deeds, expected) -> None:
    summary = federate(world, config(world, run={"rounds": ROUNDS}), tmp_path / "run", deeds=deeds)
    assert statuses(tmp_path / "run") == expected
    others = [row for row in lines(tmp_path / "run" / "clients.jsonl") if row["client"] != "county"]
    assert {row["status"] for row in others} == {"ok"}
    assert [row["scored_by"] for row in rows(tmp_path / "run")] == [2 + (status == "ok") for status, _ in expected]
    assert summary["scored_of"] == 3
    assert summary["scored_by"] == 2 + (expected[-1][0] == "ok")
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            for secret in (b"secret", b"patient 17", b"row 17"):
                assert secret not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("other round", "update: expected round 2, got 3"),
        ("other run", "update: expected run three, got another"),
        ('counts {"examples": 13, "losses": 1.0, "correct": 1, "by_label": {}}', "reports 13, but 12 held-out examples"),
        ('counts {"examples": 2, "losses": 1.0, "correct": 3, "by_label": {}}', "correct: expected at most 2"),
        ('counts {"examples": 2, "losses": 1.0, "correct": 1, "by_label": {"a": [2, 1]}, "x": 0}', "counts: expected the keys"),
    ],
)
def test_a_reply_that_says_something_else_is_a_rejected_row(world, tmp_path, deed, reason) -> None:
    federate(world, config(world, run={"rounds": 3}), tmp_path / "run", deeds={"cohort": [deed, 1]})
    first, second, third = statuses(tmp_path / "run")
    assert first == third == ("ok", "")
    assert second[0] == "rejected"
    assert reason in second[1]
    assert [row["scored_by"] for row in rows(tmp_path / "run")] == [3, 2, 3]
    assert len(lines(tmp_path / "run" / "clients.jsonl")) == 9


def test_a_reply_under_another_name_is_none_and_its_worker_is_ended(world, tmp_path) -> None:
    federate(world, config(world, run={"rounds": 3}), tmp_path / "run", deeds={"cohort": ["other name", 1]})
    assert statuses(tmp_path / "run") == [OK, CRASHED, OK]
    assert [row["scored_by"] for row in rows(tmp_path / "run")] == [3, 2, 3]
    assert len(lines(tmp_path / "run" / "clients.jsonl")) == 9


def test_a_round_below_its_quorum_is_idle_and_its_scores_stand(world, tmp_path) -> None:
    chosen = config(world, run={"rounds": 3}, rounds={"least": 3})
    federate(world, chosen, tmp_path / "run", deeds={"cohort": ["die", 1]})
    idle = [bool(row["idle"]) for row in rows(tmp_path / "run")]
    assert idle == [False, True, False]
    assert [row["sites"].keys() for row in rows(tmp_path / "run")] == [set(NAMES), {"lakeside", "st-mary"}, set(NAMES)]


def test_a_run_that_was_stopped_goes_on_with_new_workers_to_the_same_bytes(world, tmp_path) -> None:
    chosen = config(world, "fedavg", rank=4, run={"rounds": 3})
    federate(world, chosen, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(metrics: dict) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        federate(world, chosen, tmp_path / "run", on_round=stop)
    with pytest.raises(RunError, match="contains a run already; continue it with --resume"):
        federate(world, chosen, tmp_path / "run")
    other = {"model": {"path": str(world.folder / "other model")}}
    paths = own_files(world, tmp_path / "own", **other)
    for path in paths.values():  # all of them have another one, and agree
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(RunError, match=r"sites \(base model\): have another one than when the run in .* began"):
        deployment.federate(chosen, inside(paths), tmp_path / "run", resume=True)
    federate(world, chosen, tmp_path / "run", resume=True)
    assert same_adapters(tmp_path / "whole", tmp_path / "run")
    assert rows(tmp_path / "whole") == rows(tmp_path / "run")


@pytest.mark.parametrize(("level", "method"), [("example", "rbla"), ("client", "ffa_lora")])
def test_under_privacy_no_mechanism_is_sent_and_no_counts_come(world, tmp_path, monkeypatch, level, method) -> None:
    monkeypatch.setenv("ANYRANK_PRIVACY_SEED", "these tests have a secret that everybody knows")
    private, seen = {"level": level, "epsilon": 8.0, "delta": 0.01, "clip": 0.5, "counts": "exact"}, []
    summary = federate(world, config(world, method, rank=4, privacy=private), tmp_path / "run", seen)
    cohorts = [frame for frame in seen if frame.header.kind == calls.COHORT]
    assert [frame.header.body["train"] for frame in cohorts] == [True] * 6 + [False] * 3
    assert all(frame.header.body["mechanism"] is None and not frame.header.body["score"] for frame in cohorts)
    assert not [frame for frame in seen if frame.header.body.get("counts")]
    assert summary["unscored"].startswith(f"privacy.level = '{level}'")
    assert summary["accuracy"] is None
    assert summary["handed_over"] == sorted(NAMES)


# --- a seat ----------------------------------------------------------------------------------------------------------


class Slow:
    """A worker that takes until `there` is set to start."""

    def __init__(self, opening: Callable, opened: Callable) -> None:
        self.there, self.starts = threading.Event(), 0

    def start(self, timeout_s: float | None = None) -> None:
        self.starts += 1
        assert self.there.wait(30)

    def ask(self, frames: Any, replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        yield Frame(Header("reply"), {})

    def kill(self) -> None:
        pass

    close = kill


def test_a_round_waits_once_for_a_worker_that_does_not_start(monkeypatch) -> None:
    monkeypatch.setattr(seat, "_GRACE_S", 0.05)
    monkeypatch.setattr(seat, "_SHORT_S", 0.01)
    place = Seat(lambda opening, opened, receive: Slow(opening, opened), lambda: None, lambda frame: None)
    for _ in range(3):
        with pytest.raises(Died, match="not there yet"):
            next(place.ask([], 1))
    assert place._worker.starts == 1
    place._worker.there.set()
    place._arrival.join(30)
    assert next(place.ask([], 1)).header.kind == "reply"


def test_an_error_that_a_worker_reports_is_kept_and_is_no_exception_of_the_round() -> None:
    class Refuses(Slow):
        def start(self, timeout_s: float | None = None) -> None:
            pass

        def ask(self, frames: Any, replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
            yield calls.error_frame(ConfigError("site: no"))

    place = Seat(lambda opening, opened, receive: Refuses(opening, opened), lambda: None, lambda frame: None)
    with pytest.raises(Died):
        list(place.ask([], 2))
    assert isinstance(place.refusal, AnyRankError)
    assert str(place.refusal) == "site: no"


def test_the_methods_and_labels_of_these_tests_are_what_they_are_taken_for() -> None:
    assert {"fedsa", "ffa_lora", "flora", "hetlora", "stayput"} <= set(METHODS)
    assert len(LABELS) == 3
    assert make("fedsa").private == {"B", "tensors"}
