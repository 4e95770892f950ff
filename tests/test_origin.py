"""A private run's noise belongs to what its releases are computed from: other data, another base model, other code or another
version never gets the same noise, and a run that continues with any of them is refused by name.

Where two runs had the same noise over other data, the difference of what they release would be the bare difference of what they
computed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("dp_accounting")

import anyrank
import neighbour_world as world
from anyrank import config as configs
from anyrank import simulation
from anyrank.errors import RunError
from anyrank.privacy import noise, tags
from anyrank.privacy.noise import Mechanism, SystemDraws
from anyrank.runs import identity
from anyrank.runs.folder import RunDir
from anyrank.tasks import load
from neighbour_world import KINDS

SECRET = "0123456789abcdef" * 2
METHOD = """
import anyrank
from anyrank.methods.ffa_lora import FFALoRA


@anyrank.methods.register
class Mine(FFALoRA):
    name = "mine"
"""
OWN_METHOD = "method.file=method.py", "method.name=mine"


class Stopped(BaseException):
    """Raised where a run is stopped: nothing handles it."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(noise.SEED, SECRET)
    (tmp_path / "federation").mkdir()
    monkeypatch.chdir(tmp_path / "federation")
    return tmp_path / "federation"


def run(place: Path, resume: bool = False, stop: bool = False, overrides: tuple[str, ...] = (), out: str = "run") -> Any:
    """The configuration's run; `stop`: after its first round."""
    load._cached_task.cache_clear()

    def on_round(metrics) -> None:
        if stop:
            raise Stopped

    return simulation.execute(configs.load(place / "c.toml", overrides), place / out, resume=resume, on_round=on_round)


def stopped(place: Path, **how: Any) -> None:
    with pytest.raises(Stopped):
        run(place, stop=True, **how)


def key_of(place: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...] = ()) -> bytes:
    """The noise key that a new run would have."""
    kept: list[bytes] = []

    def keep(key: bytes) -> str:
        kept.append(key)
        raise Stopped

    monkeypatch.setattr(noise, "keep_key", keep)
    shutil.rmtree(place / "probe", ignore_errors=True)
    with pytest.raises(Stopped):
        run(place, out="probe", overrides=overrides)
    return kept[0]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def one_row(place: Path) -> None:
    kind = KINDS["own"]
    world.write(place, kind, world.neighbours(kind)["changed"])


def base_model(place: Path) -> None:
    from tiny import make_model

    make_model(place / "model", seed=1)


def version(place: Path) -> None:
    """Replaced by a patch in the test."""


# What changes, and the words of the refusal.
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one row": (one_row, r"rows.jsonl \(data.source\): has changed"),
    "the task's file": (
        lambda place: edit(place / "own.py", "return self.second(", "return 2 * self.second("),
        r"own.py \(model.file\): has changed",
    ),
    "the base model behind one path": (base_model, r"model.safetensors \(model.path\): has changed"),
    "a held-out row": (
        lambda place: edit(place / "held.jsonl", "north", "south"),
        r"held.jsonl \(data.test_source\): has changed",
    ),
    "the method's file": (lambda place: edit(place / "method.py", "Mine", "Yours"), r"method.py \(method.file\): has changed"),
    "the package's version": (version, r"began with anyrank .*, and this is 99.9; go on with that version"),
}


def begin(place: Path, what: str) -> None:
    """A federation of a text encoder, where its folder is what changes, and else of a small module."""
    world.make(place, KINDS["text" if what.startswith("the base model") else "own"], "example")
    (place / "method.py").write_text(METHOD)


def put_version(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "the package's version":
        known = importlib.metadata.version
        monkeypatch.setattr(identity.importlib.metadata, "version", lambda name: "99.9" if name == "anyrank" else known(name))


@pytest.mark.parametrize("what", CHANGES)
def test_another_origin_has_another_noise_and_is_refused_on_resume(place: Path, monkeypatch, what: str) -> None:
    """With the same secret in ANYRANK_PRIVACY_SEED, and the same paths."""
    begin(place, what)
    change, words = CHANGES[what]
    with monkeypatch.context() as patch:
        before = [key_of(place, patch, OWN_METHOD) for _ in range(2)]
    stopped(place, overrides=OWN_METHOD)
    change(place)
    put_version(monkeypatch, what)
    with pytest.raises(RunError, match=words):
        run(place, resume=True, overrides=OWN_METHOD)
    after = key_of(place, monkeypatch, OWN_METHOD)
    assert before[0] == before[1] != after


# What the files that a task of one's own reads hold is known to nobody but its code.
INSIDE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a row": (
        lambda place: world.write(place, KINDS["own"], world.neighbours(KINDS["own"])["changed"]),
        "began with another set of training examples than it has now",
    ),
    "a weight": (lambda place: _put(place / "weight.txt", "2"), "began with another base model than it has now"),
    "whose a row is": (
        lambda place: world.write(place, KINDS["own"], _moved(world.rows_of(KINDS["own"]))),
        "began with another (set of training examples|split of examples over clients) than it has now",
    ),
}


def _put(path: Path, text: str) -> None:
    path.write_text(text)


def _moved(rows: list[world.Row]) -> list[world.Row]:
    return [rows[0] | {"site": "south"}, *rows[1:]]


@pytest.mark.parametrize(("what", "engine"), [*((what, "process") for what in INSIDE), ("a row", "workers")])
def test_what_a_tasks_own_file_reads_counts_too(place: Path, monkeypatch, what: str, engine: str) -> None:
    """No key of the configuration names those files, and a worker reads them in a process of its own."""
    world.make(place, KINDS["own"], "example")
    edit(place / "c.toml", 'source = "rows.jsonl"\ntest_source = "held.jsonl"\n', "")
    weight = "self.weight = torch.nn.Parameter(torch.tensor(float(open('weight.txt').read())))"
    edit(place / "own.py", "self.first, ", f"{weight}\n        self.first, ")
    _put(place / "weight.txt", "1")
    where = (f"run.engine={engine}", "run.workers=1")
    with monkeypatch.context() as patch:
        before = key_of(place, patch, where)
    stopped(place, overrides=where)
    change, words = INSIDE[what]
    change(place)
    with pytest.raises(RunError, match=words):
        run(place, resume=True, overrides=where)
    assert key_of(place, monkeypatch, where) != before


def test_clients_may_go_on_in_workers(place: Path) -> None:
    """What they hold is the same there, byte by byte."""
    world.make(place, KINDS["own"], "example")
    stopped(place)
    run(place, resume=True, overrides=("run.engine=workers", "run.workers=1"))
    run(place, out="whole")
    names = ["adapter/adapter_model.safetensors", "metrics.jsonl", "privacy.jsonl", "identity.json"]
    assert all((place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes() for name in names)


@dataclasses.dataclass
class OnRequest:
    """A data set that makes its items when they are asked for, of which one is changed."""

    x: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        return self.x[i], int(i % 2)


def federation(x: np.ndarray, split: int = 300, on_request: bool = False, **changes: Any) -> anyrank.Federation:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    train = OnRequest(x) if on_request else (torch.from_numpy(x), torch.arange(len(x)) % 2)
    held = torch.ones(6, 4), torch.arange(6) % 2
    shards = {"north": range(split), "south": range(split, len(x))}
    chosen = {"privacy": {"level": "example", "noise_multiplier": 1.0, "delta": 1e-4}, "train": {"local_steps": 1}}
    task = anyrank.Task(module=changes.get("module", net), targets=("0",), train=train, test=held)
    return anyrank.Federation(task, ranks={"north": 2, "south": 2}, rounds=2, shards=shards, **chosen)


X = np.random.default_rng(0).normal(size=(600, 4)).astype("float32")
OTHER = X.copy()
OTHER[301, 2] += 1  # not one of the 256 evenly spaced ones


def another_net() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("first", "second", "part"),
    [
        (lambda: federation(X), lambda: federation(OTHER), "set of training examples"),
        (lambda: federation(X, on_request=True), lambda: federation(OTHER, on_request=True), "set of training examples"),
        (lambda: federation(X), lambda: federation(X, split=299), "split of examples over clients"),
        (lambda: federation(X), lambda: federation(X, module=another_net()), "base model"),
    ],
    ids=["arrays", "a data set that makes items", "shards", "module"],
)
def test_data_in_memory_count_as_files_do(place: Path, monkeypatch, first, second, part: str) -> None:
    """A Python program hands them in."""
    assert not np.isin(301, np.unique(np.linspace(0, len(X) - 1, 256).astype(int)))

    def stop(metrics) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        first().run(place / "run", on_round=stop)
    with pytest.raises(RunError, match=f"began with another {part} than it has now"):
        second().run(place / "run", resume=True)
    first().run(place / "run", resume=True)
    keys: list[bytes] = []
    monkeypatch.setattr(noise, "keep_key", lambda key: keys.append(key) or stop({}))
    for number, make in enumerate((first, first, second)):
        with pytest.raises(Stopped):
            make().run(place / f"again-{number}")
    assert keys[0] == keys[1] != keys[2]


# --- two rounds that are repeated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [((), False), (("rounds.deadline_s=300",), True), (("rounds.deadline_s=300", "privacy.secure=true"), False)],
    ids=["no clock", "a deadline", "a deadline, noise of the system"],
)
def test_a_round_whose_download_may_be_another_is_not_repeated_with_its_noise(
    place: Path, monkeypatch, overrides, refused
) -> None:
    """The last checkpoint is damaged: the run would go back two rounds. What comes in before a deadline is not the same twice,
    so that the second of them could begin from other numbers."""
    monkeypatch.delenv(noise.SEED, raising=False)  # with which a deadline is refused
    world.make(place, KINDS["own"], "example")
    overrides = ("run.rounds=4", *overrides)
    load._cached_task.cache_clear()

    def charge(self, rows) -> None:
        charged(self, rows)
        if rows[0]["round"] == 4:
            raise Stopped

    charged = RunDir.charge
    monkeypatch.setattr(RunDir, "charge", charge)
    with pytest.raises(Stopped):
        simulation.execute(configs.load(place / "c.toml", overrides), place / "run")
    monkeypatch.setattr(RunDir, "charge", charged)
    state = place / "run" / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    if not refused:
        assert run(place, resume=True, overrides=overrides)["rounds"] == 4
        return
    with pytest.raises(RunError, match="round 4 was begun before, and would be repeated with the same noise after round 3"):
        run(place, resume=True, overrides=overrides)


# --- a finished run, and its secret ---------------------------------------------------------------------------------------


def test_a_finished_run_still_sees_a_file_that_has_changed(place: Path, monkeypatch) -> None:
    """Its noise key is deleted, the user's secret stays. Another version may read it: nothing is trained anew."""
    world.make(place, KINDS["own"], "example")
    run(place)
    assert not [path for path in noise.key_folder().iterdir() if not path.name.startswith(".")]
    put_version(monkeypatch, "the package's version")
    run(place, resume=True)
    identity.check(place / "run", configs.load(place / "run" / "config.toml"))
    with pytest.raises(RunError, match="its noise was computed for these rounds"):
        run(place, resume=True, overrides=("run.rounds=3",))
    world.write(place, KINDS["own"], world.neighbours(KINDS["own"])["one more"])
    with pytest.raises(RunError, match=r"rows.jsonl \(data.source\): has changed since the run in"):
        run(place, resume=True)
    with pytest.raises(RunError, match=r"rows.jsonl \(data.source\): has changed since the run in"):
        identity.check(place / "run", configs.load(place / "run" / "config.toml"))


@pytest.mark.parametrize("what", ["gone", "readable by others", "another", "damaged"])
def test_without_the_users_secret_a_run_does_not_go_on(place: Path, what: str) -> None:
    world.make(place, KINDS["own"], "example")
    stopped(place)
    (secret,) = tags.folder().iterdir()
    assert secret.stat().st_mode & 0o777 == 0o600
    if what == "gone":
        secret.unlink()
    elif what == "readable by others":
        secret.chmod(0o644)
    else:
        secret.write_text("00" * 32 if what == "another" else "no number")
    with pytest.raises(RunError, match="secret"):
        run(place, resume=True)


def test_a_second_run_has_the_same_secret_and_another_salt(place: Path, monkeypatch) -> None:
    monkeypatch.delenv(noise.SEED)
    one, other = tags.new({"run": 1}), tags.new({"run": 1})
    assert one.secret == other.secret
    assert one.salt != other.salt
    assert one.of("data", {"": "abc"}) != other.of("data", {"": "abc"})
    assert tags.stored(one.table()) == one
    assert one.secret.hex() not in json.dumps(one.table())


def test_a_private_run_of_a_version_that_noted_no_origin_is_not_continued(place: Path) -> None:
    world.make(place, KINDS["own"], "example")
    stopped(place)
    noted = json.loads((place / "run" / "identity.json").read_text())
    plain = {key: value for key, value in noted.items() if key not in ("tags", "held", "versions")}
    (place / "run" / "identity.json").write_text(json.dumps(plain | identity.of(configs.load(place / "c.toml"))))
    with pytest.raises(RunError, match="was begun by another version of anyrank"):
        run(place, resume=True)


# --- a site's own noise -------------------------------------------------------------------------------------------------


def test_a_site_whose_file_changed_never_has_the_same_noise(place: Path, monkeypatch) -> None:
    """For one run and round, it sends the reply that it sent before, or one with noise from the system's source: it has no key.
    ANYRANK_PRIVACY_SEED, which is set here, is not used at a site."""
    import site_world
    from anyrank import methods
    from anyrank.messages import calls, wire
    from anyrank.messages.frame import to_bytes
    from anyrank.messages.plan import plan_round
    from anyrank.messages.records import Client, Job, Scaling
    from anyrank.worker import site as site_module

    used: list[object] = []

    class Seen(Mechanism):
        def draws(self, round: int, client: str) -> noise.Draws:
            used.append(self.key)
            found = super().draws(round, client)
            assert isinstance(found, SystemDraws)
            return found

    monkeypatch.setattr(site_module, "Mechanism", Seen)
    site_world.make_world(place)
    private = {"level": "example", "noise_multiplier": 1.0, "delta": 1e-3}
    public = site_world.table("ffa_lora", inside=False, model={"head": "frozen"}, privacy=private)
    config = site_world.in_one_process(place, public)
    scaling, method = Scaling(config.lora.alpha, config.lora.scaling), methods.make("ffa_lora", {})

    def reply(seed: int) -> bytes:
        load._cached_task.cache_clear()
        path = site_world.site_file(place, "county", "store", privacy={"level": "example", "epsilon": 50.0, "delta": 1e-3})
        asked = site_world.Asked(path)
        try:
            asked.ask(site_world.setup(public))
            (started,) = asked.ask(calls.start_frame(8, scaling, config.run.seed, site_world.RUN))
            state = method.init(calls.adapter_of(started, calls.ADAPTER)[0], scaling, config.run.seed)
            client = Client("county", site_world.RANKS["county"])
            plan = plan_round(config.train, 1, config.run.rounds, config.run.seed)
            sent = site_world.request(Job(client, 48, lambda: method.dispatch(state, client)), plan, num_examples=seed)
            (found,) = asked.ask(*sent)
            assert found.header.kind == wire.UPDATE
            return to_bytes(found)
        finally:
            asked.close()

    first = reply(48)
    site_world.write_rows(place / "county.csv", 61)
    assert reply(48) == first, "the same request has the reply that was sent: nothing new is released"
    assert used == [None]
    for kept in (place / "store" / "replies").iterdir():
        kept.unlink()
    assert reply(48) != first
    assert used == [None, None]
