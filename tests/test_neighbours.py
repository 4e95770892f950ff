"""What leaves a private run is the noised release, and nothing beside it.

Two runs whose data differ in one example, or in one client, are compared byte by byte. First with every clipped sum replaced by
zero and the same noise: then all that they release is the same, and so must be every other byte. Then with real training: what
differs must be computed from the released adapters. The noise key is made the same by hand, because data are a part of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("dp_accounting")

import neighbour_world as world
from anyrank.cli import console, main
from anyrank.messages import calls, wire
from anyrank.privacy import noise, tags
from anyrank.privacy.noise import Mechanism, SystemDraws
from anyrank.tasks import load
from anyrank.training import local, private_examples, private_upload
from anyrank.worker import desk
from neighbour_world import KINDS, LEVELS

FULL = bool(os.environ.get("ANYRANK_NEIGHBOURS"))
SECRET = "0123456789abcdef" * 2
# What a real run computes from its released adapters. All else is the same for neighbours.
COMPUTED = {
    *(f"metrics.jsonl:{name}" for name in ("accuracy", "loss", "collapse", "effective_rank")),
    *(f"summary.json:{name}" for name in ("accuracy", "best_accuracy", "last_accuracy", "loss", "collapse", "effective_rank")),
}
COMPUTED_BELOW = ("metrics.jsonl:spectrum.", "summary.json:metrics.", "checkpoint/", "adapter", "report.html")
# Tags of the data, and digests of files that differ for the reasons above.
TAGS = ("identity.json:data.source", "identity.json:held.set of training examples", "seal.json:files.")
TAGS_OF_SPLIT = "identity.json:held.split of examples over clients"


class Apart:
    """Random numbers of which the normal ones do not depend on how many uniform ones are drawn, as they do in a real run."""

    def __init__(self, key: int) -> None:
        self._uniform, self._normal = np.random.default_rng([key, 0]), np.random.default_rng([key, 1])

    def random(self, size: int) -> np.ndarray:
        return self._uniform.random(size)

    def standard_normal(self, size: int) -> np.ndarray:
        return self._normal.standard_normal(size)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the federation, with keys and caches beside it; one noise key for all runs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv(noise.SEED, SECRET)
    monkeypatch.setattr(noise, "new_key", lambda *_: bytes(range(32)))
    monkeypatch.setattr(console.time, "monotonic", lambda: 0.0)  # a line of progress every five seconds
    (tmp_path / "federation").mkdir()
    monkeypatch.chdir(tmp_path / "federation")
    return tmp_path / "federation"


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is learned from any example, and the noise is the same: all releases are."""

    def zeros(self, *_):
        return [private_examples.wide(p.detach() * 0) for p in self.parameters]

    monkeypatch.setattr(private_examples.PerExample, "clipped", zeros)
    ended = local.train

    def unchanged(model, client, download, examples, plan):
        return dataclasses.replace(ended(model, client, download, examples, plan), adapter=download.adapter)

    monkeypatch.setattr(private_upload.local, "train", unchanged)
    monkeypatch.setattr(Mechanism, "draws", lambda self, round, client: Apart(sum(client.encode()) + 1000 * round))
    monkeypatch.setattr(tags.Tags, "of", lambda self, what, digests: "tag")


def command(*arguments: str) -> tuple[int, str, str]:
    """A command in this process: its status, and what it wrote to standard output and error."""
    load._cached_task.cache_clear()  # it keeps data that are no longer in the file
    said, out, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["anyrank", *arguments]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
            main()
    except SystemExit as done:
        return done.code or 0, out.getvalue(), said.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), said.getvalue()


def run(place: Path, *arguments: str) -> tuple[dict[str, bytes], tuple[int, str, str]]:
    """`anyrank run` in a new folder: all files that it leaves there, and what the command said."""
    shutil.rmtree(place / "run", ignore_errors=True)
    # Each neighbour is a world of its own, in which the other one was never trained on: the ledgers of data sets would say so.
    shutil.rmtree(place.parent / "state" / "anyrank" / "spent", ignore_errors=True)
    said = command("run", "c.toml", "--out", "run", *arguments)
    return world.files_of(place / "run"), said


def pairs() -> Iterator[tuple[str, str, str]]:
    """Task, level, and what differs. Without ANYRANK_NEIGHBOURS, each task and each level with a part of what may differ."""
    for name, kind in KINDS.items():
        for what in world.neighbours(kind):
            if FULL or (name, what) in {("text", "one more"), ("causal", "longer"), ("images", "changed"), ("own", "one more")}:
                yield name, "example", what
        for level in ("client", "server"):
            if FULL or (name, level) in {("text", "server"), ("images", "client"), ("causal", "client"), ("own", "server")}:
                yield name, level, "another client"


def changed(kind: world.Kind, what: str) -> list[world.Row]:
    return world.another_client(kind) if what == "another client" else world.neighbours(kind)[what]


@pytest.mark.parametrize(("name", "level", "what"), list(pairs()))
def test_with_the_same_release_every_byte_is_the_same(place: Path, blind: None, name: str, level: str, what: str) -> None:
    """The run folder with its report, the checkpoint, standard output and error."""
    kind = KINDS[name]
    world.make(place, kind, level)
    left, said = run(place)
    assert said[0] == 0, said
    world.write(place, kind, changed(kind, what))
    left_by_other, said_by_other = run(place)
    assert world.different(left, left_by_other) == set()
    assert said == said_by_other


@pytest.mark.parametrize("level", LEVELS)
def test_what_differs_is_computed_from_released_adapters_or_is_a_tag(place: Path, level: str) -> None:
    kind = KINDS["own"]
    world.make(place, kind, level)
    left, _ = run(place, "--json")
    world.write(place, kind, changed(kind, "one more" if level == "example" else "another client"))
    left_by_other, _ = run(place, "--json")
    differ = world.different(left, left_by_other)
    assert "identity.json:data.source" in differ
    assert any(each.startswith("adapter/") for each in differ), "the data matter"
    kept = {each for each in differ if each not in COMPUTED | {TAGS_OF_SPLIT} and not each.startswith((*COMPUTED_BELOW, *TAGS))}
    assert kept == set()


def test_counts_and_times_are_not_said(place: Path) -> None:
    kind = KINDS["causal"]
    world.make(place, kind, "example")
    world.write(place, kind, changed(kind, "longer"))
    left, (_, out, said) = run(place)
    summary = json.loads(left["summary.json"])
    assert summary["seconds"] is None
    assert not {"inputs_bytes", "inputs_in"} & summary.keys()
    assert summary["train_examples"] == world.NORTH + world.SOUTH, "what both clients declare"
    assert {json.loads(line)["seconds"] for line in left["metrics.jsonl"].splitlines()} == {None}
    everything = out + said + "".join(text.decode("latin-1") for name, text in left.items() if name.endswith(("json", "jsonl")))
    assert "cut at" not in everything
    assert "time" not in out


def test_what_is_planned_says_declared_counts_alone(place: Path) -> None:
    """`anyrank privacy` and `anyrank plan`; the latter measures a step on the data, for whoever holds them."""
    kind, told = KINDS["causal"], []
    world.make(place, kind, "example")
    for rows in (world.rows_of(kind), changed(kind, "one more"), changed(kind, "longer")):
        world.write(place, kind, rows)
        planned = json.loads(command("plan", "c.toml", "--json")[1])
        del planned["round_s"], planned["training_s"], planned["memory_bytes"]["activations"]
        for level in planned["levels"]:
            del level["step_s"]
        told.append((planned, command("privacy", "c.toml", "--json")[1]))
    assert told[0] == told[1] == told[2]


# --- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [777.0, 1e38], ids=["the module cannot take it", "its gradient is not finite"])
def test_an_example_that_fails_does_not_show(place: Path, level: str, bad: float) -> None:
    """Neither in who took part nor in how the command ended."""
    kind = KINDS["own"]
    world.make(place, kind, level)
    left, said = run(place, "--json")
    rows = world.rows_of(kind)
    for i in range(world.NORTH):  # so many that one is drawn in every step
        if level != "example" or i < 10:
            rows[i] = rows[i] | {"x": [bad, bad, -bad, bad]}
    world.write(place, kind, rows)
    left_by_other, said_by_other = run(place, "--json")
    assert (said[0], said[2]) == (said_by_other[0], said_by_other[2]) == (0, "")
    assert left["clients.jsonl"] == left_by_other["clients.jsonl"]
    assert {json.loads(line)["status"] for line in left["clients.jsonl"].splitlines()} == {"ok"}


def test_a_batch_that_fails_costs_the_failing_example_alone(place: Path) -> None:
    """Its own gradient counts as zero; that of the others is what it is without it."""
    from anyrank import config as configs
    from anyrank import simulation

    kind = KINDS["own"]
    world.make(place, kind, "example")
    rows = world.rows_of(kind)
    rows[2] = rows[2] | {"x": [777.0] * 4}
    world.write(place, kind, rows)
    built = simulation.build(configs.load(place / "c.toml"))
    try:
        model = built.engine.model
        state = built.method.init(built.engine.start(4, *_start(built)), *_start(built))
        download = built.method.dispatch(state, built.population.client(0))
        sums = private_examples.PerExample(model, model.load(download))
        with_it, without = (sums.clipped(torch.tensor(index), 1.0) for index in ([1, 2, 3], [1, 3]))
        assert any(float(total.abs().max()) > 0 for total in without)
        for one, other in zip(with_it, without, strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-7)
    finally:
        built.close()


def _start(built) -> tuple:
    from anyrank.messages.records import Scaling

    return Scaling(built.config.lora.alpha, built.config.lora.scaling), built.config.run.seed


def test_an_error_about_a_row_reaches_the_one_who_gave_the_command_alone(place: Path) -> None:
    """It names what is wrong, on standard error; no run folder is left."""
    kind = KINDS["text"]
    world.make(place, kind, "example")
    rows = world.rows_of(kind)
    world.write(place, kind, [*rows[:3], rows[3] | {"text": ""}, *rows[4:]])
    status, out, said = command("run", "c.toml", "--out", "run")
    assert status == 2
    assert out == ""
    assert len(said.strip().splitlines()) == 1
    assert not (place / "run").exists()


# --- sites and workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["example", "client"])
def test_the_frames_of_a_site_are_the_same_byte_by_byte(place: Path, blind: None, monkeypatch, level: str) -> None:
    """Setup, start, a round, and a second request of it; also what it says when it refuses."""
    import site_world

    monkeypatch.setattr(SystemDraws, "random", lambda self, size: np.full(size, 0.01))
    monkeypatch.setattr(SystemDraws, "standard_normal", lambda self, size: np.random.default_rng(5).standard_normal(size))
    monkeypatch.setattr(Mechanism, "draws", lambda self, round, client: SystemDraws())
    site_world.make_world(place)
    plan = {"level": level, "noise_multiplier": 1.0, "delta": 1e-3}
    public = site_world.table("ffa_lora", inside=False, model={"head": "frozen"}, privacy=plan)
    left = []
    for number in (60, 61):  # 48 and 49 to train on, which both are declared as 48
        site_world.write_rows(place / "county.csv", number)
        path = site_world.site_file(
            place, "county", f"store-{number}", privacy={"level": level, "epsilon": 50.0, "delta": 1e-3}
        )
        load._cached_task.cache_clear()
        left.append([bytes_ for bytes_ in _conversation(site_world, place, public, path)])
    assert len(left[0]) >= 4
    assert left[0] == left[1]


def _conversation(site_world, place: Path, public: dict, path: Path) -> Iterator[bytes]:
    from anyrank import methods
    from anyrank.messages.frame import to_bytes
    from anyrank.messages.plan import plan_round
    from anyrank.messages.records import Client, Job, Scaling

    config = site_world.in_one_process(place, public)
    scaling, method = Scaling(config.lora.alpha, config.lora.scaling), methods.make("ffa_lora", {})
    asked = site_world.Asked(path)
    try:
        asked.ask(site_world.setup(public))
        (started,) = asked.ask(calls.start_frame(8, scaling, config.run.seed, site_world.RUN))
        state = method.init(calls.adapter_of(started, calls.ADAPTER)[0], scaling, config.run.seed)
        client = Client("county", site_world.RANKS["county"])
        job = Job(client, 48, lambda: method.dispatch(state, client))
        frames = site_world.request(job, plan_round(config.train, 1, config.run.rounds, config.run.seed))
        asked.ask(*frames)
        asked.ask(*frames)
        asked.ask(calls.start_frame(9, scaling, config.run.seed, site_world.RUN))
        assert [frame.header.kind for frame in asked.left] == [
            calls.READY,
            calls.ADAPTER,
            wire.UPDATE,
            wire.UPDATE,
            calls.ERROR,
        ]
        yield from (to_bytes(frame) for frame in asked.left)
    finally:
        asked.close()


def test_replies_of_workers_are_the_same_byte_by_byte(place: Path, blind: None) -> None:
    """A worker on the server's machine has all data, and says so to the server; its replies in a round say nothing."""
    from anyrank import config as configs
    from anyrank import simulation
    from anyrank.messages.frame import to_bytes
    from anyrank.messages.plan import plan_round
    from anyrank.messages.records import BOTH

    kind, left = KINDS["own"], []
    world.make(place, kind, "example")
    for rows in (world.rows_of(kind), changed(kind, "one more")):
        world.write(place, kind, rows)
        config = configs.load(place / "c.toml")
        built = simulation.build(config)
        state = built.method.init(built.engine.start(4, *_start(built)), *_start(built))
        client = built.population.client(0)
        download = dataclasses.replace(built.method.dispatch(state, client), send=BOTH)
        plan = plan_round(config.train, 1, 2, config.run.seed)
        mechanism = Mechanism(built.privacy, bytes(32))
        held = desk.load(config, 4, lambda done, total: None)
        answering = desk.Desk()
        answering.held = held
        sent = [wire.download_frame(download, plan, client, 20, "run")]
        wanted = calls.cohort_frame(calls.Cohort(1, None, mechanism.table()), "run")
        left.append([to_bytes(frame) for frame in answering.answer(wanted, sent.pop, lambda frame: None)])
        held.model.close()
        built.close()
    assert len(left[0]) == 1
    assert left[0] == left[1]


# --- tags --------------------------------------------------------------------------------------------------------------


def test_no_digest_of_data_is_in_the_run_folder(place: Path) -> None:
    """Whoever guesses the file, or a row of it, cannot verify the guess: no file of the run holds a digest of it."""
    kind = KINDS["own"]
    world.make(place, kind, "example")
    left, _ = run(place, "--json")
    data = (place / "rows.jsonl").read_bytes()
    guesses = [data, *data.splitlines(), (place / "held.jsonl").read_bytes()]
    found = {hashlib.new(how, guess).hexdigest()[:12] for how in ("sha256", "sha1", "md5") for guess in guesses}
    text = b"".join(left.values()).decode("latin-1")
    assert not {digest for digest in found if digest in text}
    assert "rows.jsonl" not in json.dumps(json.loads(left["identity.json"])["held"])


def test_a_task_that_is_handed_in_leaves_no_digest_of_its_data_either(place: Path) -> None:
    import anyrank
    from anyrank.tasks import digest

    task = _task()
    chosen = {"privacy": {"level": "example", "noise_multiplier": 1.0, "delta": 1e-3}, "train": {"batch_size": 8}}
    shards = {"north": range(20), "south": range(20, 40)}
    made = anyrank.Federation(task, ranks={"north": 4, "south": 2}, rounds=1, shards=shards, **chosen)
    made.run(place / "run")
    text = b"".join(world.files_of(place / "run").values()).decode("latin-1")
    assert 'handed_in = "private"' in text, "the configuration says that there were shards, and not which"
    for digest_of_part in digest.digest(task):
        assert digest_of_part.split()[1] not in text


def test_tags_of_two_runs_do_not_say_whether_their_data_are_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the secret of ANYRANK_PRIVACY_SEED asks for the same bytes."""
    kind = KINDS["own"]
    world.make(place, kind, "example")
    noted = [json.loads(run(place, "--json")[0]["identity.json"]) for _ in range(2)]
    assert noted[0] == noted[1]
    monkeypatch.delenv(noise.SEED)
    noted = [json.loads(run(place, "--json")[0]["identity.json"]) for _ in range(2)]
    assert not {*_tags(noted[0])} & {*_tags(noted[1])}
    assert len({*_tags(noted[0])}) == len(_tags(noted[0])), "nor do equal parts of one run have equal tags"


def _tags(noted: dict) -> list[str]:
    private = {key: value for key, value in noted.items() if key.startswith("data.") or key == "held"}
    return re.findall(r"[0-9a-f]{64}", json.dumps(private))


def _task(rows: int = 40, **changes) -> object:
    import anyrank

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(rows, 4)).astype("float32"))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    given = {"module": net, "targets": ("0",), "train": (x, torch.arange(rows) % 2), "test": (x[:6], torch.arange(6) % 2)}
    return anyrank.Task(**given | changes)
