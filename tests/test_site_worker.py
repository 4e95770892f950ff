"""A site's worker: the bytes of a federation in one process, its file, its store, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch

from anyrank import devices, files, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.deployment import federate
from anyrank.errors import ConfigError, RunError, RunFailed
from anyrank.federation import asking
from anyrank.messages import calls, wire
from anyrank.messages.frame import Frame, to_bytes
from anyrank.messages.records import Code, Failure, Scaling, ServerState
from anyrank.methods.registry import REGISTRY
from anyrank.privacy.accountants import Spending, composed
from anyrank.privacy.grant import Grant, Release
from anyrank.simulation import building
from anyrank.worker import sitefile
from anyrank.worker.site import spent
from anyrank.worker.siteload import digest_of_model
from anyrank.worker.sitelog import LOG
from anyrank.worker.store import Store
from anyrank.worker.supervisor import Died, Supervised

pytest.importorskip("transformers")
from site_world import LABELS, RANKS, Asked, in_one_process, make_world, request, setup, site_file, table, write_rows

METHODS = sorted(
    name for name, kind in REGISTRY.items() if kind.__module__.startswith("anyrank.methods.") and not kind.pools_data
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYRANK_CACHE", str(cache))
        patch.setattr(devices, "cores", lambda: 1)
        yield make_world(tmp_path_factory.mktemp("sites"))


def same(one: Adapter, other: Adapter, parts: str = "ABt") -> bool:
    layers = one.layers.keys() == other.layers.keys() and all(
        torch.equal(getattr(one.layers[name], factor), getattr(other.layers[name], factor))
        for name in one.layers
        for factor in "AB"
        if factor in parts
    )
    return layers and ("t" not in parts or all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors))


def in_process(config, rounds: int) -> list[ServerState]:
    """The states of a federation in one process, from the start on."""
    federation = building.build(config)
    lora = config.lora
    start = federation.engine.start(max(config.clients.ranks), Scaling(lora.alpha, lora.scaling), config.run.seed)
    states = [federation.method.init(start, Scaling(lora.alpha, lora.scaling), config.run.seed)]
    for round in range(1, rounds + 1):
        jobs, _ = asking.dispatch(federation, states[-1], round)
        updates = list(federation.engine.train(jobs, federation.plan(round)))
        states.append(federation.method.aggregate(states[-1], updates))
    federation.close()
    return states


@pytest.mark.parametrize(("method", "inside"), [*((method, True) for method in METHODS), ("stayput", False), ("fedsa", False)])
def test_site_workers_give_the_bytes_of_one_process(world: Path, method: str, inside: bool) -> None:
    """`inside`: LoRA in the encoder, else on a map above frozen embeddings, which each site has computed alone."""
    public = table(method, inside, rank=0 if REGISTRY[method].traits.mixed_ranks else 4)
    config = in_one_process(world, public)
    expected = in_process(config, 3)
    federation = building.build(config)
    sites = {name: Asked(site_file(world, name, f"{method}-{inside}-{name}")) for name in RANKS}
    for site in sites.values():
        assert site.ask(setup(public))[0].header.kind == calls.READY
    (start,) = sites["county"].ask(calls.start_frame(max(config.clients.ranks), expected[0].scaling, 7, "winter"))
    state = federation.method.init(calls.adapter_of(start)[0], expected[0].scaling, 7)
    assert same(state.adapter, expected[0].adapter)
    for round in range(1, 4):
        jobs, _ = asking.dispatch(federation, state, round)
        updates = []
        for job in jobs:
            (reply,) = sites[job.client.name].ask(*request(job, federation.plan(round)))
            updates.append(wire.reply_of(reply, job.download))
            assert reply.header.kind == wire.UPDATE
        state = federation.method.aggregate(state, updates)
    assert same(state.adapter, expected[-1].adapter)
    if state.merged or expected[-1].merged:
        assert same(state.merged, expected[-1].merged)
    private = federation.method.private
    for name, site in sites.items():
        kept = site.desk.store.own(site.desk.held.key, 4) if private else None
        if private:  # each site has what the server of a simulation keeps for it
            assert same(kept, expected[-1].extra[name], "".join(part[0] for part in sorted(private)))
        site.close()
    federation.close()


# --- what leaves and what stays ---------------------------------------------------------------------------------------------


def begun(
    world: Path, store: str, method: str = "fedsa", public: dict | None = None, **sections
) -> tuple[Asked, SimpleNamespace]:
    """A site that was set up, and a server that sends the start in every round."""
    public = public or table(method)
    config = in_one_process(world, public)
    federation = building.build(config)
    site = Asked(site_file(world, "county", store, **sections))
    assert site.ask(setup(public))[0].header.kind == calls.READY
    lora = config.lora
    scaling = Scaling(lora.alpha, lora.scaling)
    start = federation.engine.start(max(config.clients.ranks), scaling, config.run.seed)
    state = federation.method.init(start, scaling, config.run.seed)
    return site, SimpleNamespace(public=public, federation=federation, state=state)


def asked(site: Asked, server: SimpleNamespace, round: int, **cohort) -> Frame:
    """The reply of the site to the server's download of `round`, which is that of the start in every round."""
    state = dataclasses.replace(server.state, round=round - 1)
    jobs, _ = asking.dispatch(server.federation, state, round)
    job = next(job for job in jobs if job.client.name == "county")
    return site.ask(*request(job, server.federation.plan(round), **cohort))[0]


def test_private_parts_never_leave_and_nothing_of_the_sites_own_does(world: Path) -> None:
    site, server = begun(world, "nothing-leaves")
    for round in (1, 2, 3):
        asked(site, server, round)
    text = " ".join(json.dumps(dict(frame.header.body)) for frame in site.left)
    assert str(world) not in text
    assert "csv" not in text
    updates = [frame for frame in site.left if frame.header.kind == wire.UPDATE]
    assert len(updates) == 3
    for frame in updates:
        assert {name[:2] for name in frame.arrays} == {"A/"}
    own = site.desk.store.own(site.desk.held.key, 4)
    assert any(layer.B.any() for layer in own.layers.values())  # there was something to keep
    assert any(tensor.any() for tensor in own.tensors.values())
    site.close()


def test_a_server_that_resumes_some_rounds_back_gets_the_same_bytes(world: Path) -> None:
    site, server = begun(world, "back", public=table("fedsa", run={**table("fedsa")["run"], "rounds": 9}))
    first = {round: to_bytes_without_time(asked(site, server, round)) for round in range(1, 7)}
    for again in (6, 5, 6, 4, 5, 6, 1, 2, 3, 4, 5, 6):  # one round back, two, three, and from the beginning
        assert to_bytes_without_time(asked(site, server, again)) == first[again], again
    assert len(set(first.values())) == 6
    assert asked(site, server, 2).header.body["code"] == "REFUSED"  # no longer kept: never a fresh start
    log = (Path(site.desk.site.store.folder) / LOG).read_text()
    assert "has the own parts from round 3 on" in log
    site.close()
    site, server = begun(world, "back", public=server.public)  # started anew
    assert to_bytes_without_time(asked(site, server, 7)) != first[1]
    assert to_bytes_without_time(asked(site, server, 6)) == first[6]
    site.close()


def to_bytes_without_time(frame: Frame) -> bytes:
    metrics = {name: value for name, value in frame.header.body.get("metrics", {}).items() if name != "seconds"}
    return to_bytes(Frame(dataclasses.replace(frame.header, body={**frame.header.body, "metrics": metrics}), frame.arrays))


def test_a_run_that_grows_goes_on_and_another_run_or_federation_begins_anew(world: Path) -> None:
    public = table("fedsa")
    site, server = begun(world, "grows", public=public)
    first = to_bytes_without_time(asked(site, server, 1))
    second = to_bytes_without_time(asked(site, server, 2))
    grown = table("fedsa", run={**public["run"], "rounds": 30})
    assert site.ask(setup(grown))[0].header.kind == calls.READY
    assert to_bytes_without_time(asked(site, server, 2)) == second
    other = table("fedsa", train={**public["train"], "weight_decay": 0.125})
    site.ask(setup(other))
    key = site.desk.held.key
    assert site.desk.store.own(key, 2) is None
    site.ask(setup(public, run="another"))
    assert site.desk.held.key != key
    assert site.desk.store.own(site.desk.held.key, 2) is None
    site.ask(setup(public))
    assert to_bytes_without_time(asked(site, server, 1)) == first
    site.close()


def test_scores_are_sums_and_leave_only_where_the_site_reports_them(world: Path) -> None:
    wanted = table("rbla", eval={"where": "sites", "by_label": True})
    for store, accept, expected in (
        ("no-scores", {}, ()),
        ("scores", {"scores": True}, ("counts",)),
        ("labels", {"scores": True, "by_label": True}, ("counts",)),
    ):
        site, server = begun(world, store, public=wanted, accept=accept)
        reply, ready = asked(site, server, 1, score=True), site.left[0]
        assert tuple(reply.header.body.keys() - {"num_examples", "metrics"}) == expected
        assert ("held_out" in ready.arrays) == bool(expected)
        assert ready.header.body["facts"]["test_examples"] == (12 if expected else 0)
        alone = asked(site, server, 4, score=True, train=False)  # of the last state, after the last round
        if not expected:
            assert (alone.header.kind, alone.header.body) == (wire.COUNTS, {"counts": None})  # the model is kept, and no more
            assert asked(site, server, 3, score=True, train=False).header.body["code"] == "REFUSED"
            site.close()
            continue
        counts, again = wire.counts_of(alone).counts, reply.header.body["counts"]
        assert counts.examples == again["examples"] == 12
        assert 0 <= counts.correct <= 12
        assert counts.by_label.keys() == ({"arrival", "exchange", "top-up"} if "by_label" in accept else set())
        assert site.ask(calls.adapter_frame(server.state.adapter, None, calls.EVALUATE, "winter"))[0].header.kind == calls.ERROR
        site.close()


def test_a_site_of_some_labels_numbers_them_as_everybody_does(world: Path) -> None:
    write_rows(world / "lone.csv", 30, ("top-up",))
    public = table("rbla") | {"sites": [{"name": "lone", "rank": 4}]}
    site = Asked(site_file(world, "lone", "lone-labels"))
    assert site.ask(setup(public))[0].header.kind == calls.READY
    task = site.desk.held.model.task
    assert task.label_names == LABELS
    assert set(task.train.labels.tolist()) == {LABELS.index("top-up")}
    public["data"] = {"label_names": ["arrival", "exchange"]}
    (reply,) = site.ask(setup(public))
    assert reply.header.body["text"].startswith("data.label_names: ")
    assert "top-up" not in reply.header.body["text"]
    site.close()


# --- the store --------------------------------------------------------------------------------------------------------------


def adapter(seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    layer = LoraLayer(torch.randn(2, 5, generator=draw), torch.randn(3, 2, generator=draw), 2.0)
    return Adapter({"q": layer}, {"head": torch.randn(4, generator=draw)})


def store(folder: Path, most_bytes: int = 1 << 20, most_runs: int = 3) -> Store:
    return Store(folder, "county", most_bytes, most_runs)


def test_one_worker_at_a_time_has_a_store_and_it_is_one_sites(tmp_path: Path) -> None:
    held = store(tmp_path / "s")
    with pytest.raises(RunError, match="another worker uses this store"):
        store(tmp_path / "s")
    held.close()
    store(tmp_path / "s").close()
    with pytest.raises(RunError, match="is the store of site county, not of lakeside"):
        Store(tmp_path / "s", "lakeside", 1 << 20, 3)


def test_a_store_is_bounded(tmp_path: Path) -> None:
    held = store(tmp_path, most_bytes=20_000)
    for run in ("a", "b", "c"):
        held.keep(run, 1, adapter(1), {})
    with pytest.raises(RunFailed, match=r"store\.runs"):
        held.keep("d", 1, adapter(1), {})
    assert held.own("d", 2) is None
    held.keep_reply("2" * 64, 2, b"x" * 5_000)
    with pytest.raises(RunFailed, match=r"store\.megabytes"):
        held.keep_reply("3" * 64, 3, b"x" * 15_000)
    held.close()
    held = store(tmp_path / "other")
    for round in range(1, 60):
        held.keep("a", round, adapter(round), {})
        if round % 7 == 0:
            reply = to_bytes(wire.failure_frame(Failure("county", Code.PRIVATE)))
            held.keep_reply(f"{round:064x}", round, reply)
    assert len(list((tmp_path / "other").rglob("own-*"))) == 4
    assert len(list((tmp_path / "other" / "replies").iterdir())) <= 8
    held.close()


STEP = 1 if os.environ.get("ANYRANK_FAULTS") == "all" else 3  # write events from one kill to the next
FLIPS = {
    "a bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "cut": lambda data: data[:-3],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "another": lambda data: to_bytes(wire.failure_frame(Failure("x", Code.LATE))),
    "gone": None,
}


@pytest.mark.parametrize("damage", FLIPS)
@pytest.mark.parametrize("what", ["site.json", "runs/a/index.json", "runs/a/own-2-*", "replies/*"])
def test_damage_is_an_error_in_a_line_and_never_a_fresh_start(tmp_path: Path, what: str, damage: str) -> None:
    held, request = store(tmp_path), "5" * 64
    held.keep("a", 1, adapter(1), {})
    held.keep("a", 2, adapter(2), {})
    held.keep_reply(request, 1, to_bytes(wire.failure_frame(Failure("county", Code.PRIVATE))))
    held.close()
    (path,) = tmp_path.glob(what)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(FLIPS[damage](path.read_bytes()))

    def read() -> tuple[Adapter | None, bytes | None]:
        again = store(tmp_path)
        try:
            return again.own("a", 3), again.reply(request)
        finally:
            again.close()

    if what == "replies/*" and damage == "gone":  # a request that is no longer known is a new release
        assert read()[1] is None
        return
    with pytest.raises(RunError, match="damaged") as error:
        read()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_worker_killed_at_any_write_leaves_the_store_as_it_was_or_as_it_becomes(tmp_path: Path) -> None:
    """Killed at its first write event, at its second, and so on: what is there is whole, and the work can be repeated."""
    reply = to_bytes(wire.failure_frame(Failure("county", Code.PRIVATE)))

    def work(folder: Path) -> None:
        held = store(folder)
        grant = Grant(folder, "example", 99.0, 1e-5)
        charge = grant.charge(Release("example", 0.1, 1.0, 1), {})
        held.keep("a", 3, adapter(3), {})
        held.keep_reply("7" * 64, charge, reply)
        held.close()

    def before(folder: Path) -> None:
        held = store(folder)
        Grant(folder, "example", 99.0, 1e-5).charge(Release("example", 0.1, 1.0, 1), {})
        for round in (1, 2, 3, 4):  # the run goes back to round 3
            held.keep("a", round, adapter(round + 10), {})
        held.close()

    event, ended = 0, False
    while not ended:
        folder = tmp_path / str(event)
        before(folder)
        child = os.fork()
        if not child:
            count = [0]

            def reached(what: str, path: Path, count: list[int] = count, last: int = event) -> None:
                count[0] += 1
                if count[0] > last:
                    os.kill(os.getpid(), signal.SIGKILL)

            files.reached = reached
            try:
                work(folder)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status) == 0
        held, grant = store(folder), Grant(folder, "example", 99.0, 1e-5)
        assert grant.count in (1, 2)
        held.check_charges(grant.count)
        assert same(held.own("a", 3), adapter(12))
        assert any(same(held.own("a", 4), adapter(seed)) for seed in (3, 13))
        assert held.reply("7" * 64) in (None, reply)
        held.close()
        work(folder)
        held = store(folder)
        assert same(held.own("a", 9), adapter(3))
        assert held.reply("7" * 64) == reply
        assert Grant(folder, "example", 99.0, 1e-5).count == grant.count + 1
        held.close()
        event += STEP
    assert event > 10


# --- the site file ----------------------------------------------------------------------------------------------------------

GOOD: dict = {"name": "county", "data": {"source": "x.csv"}, "model": {"folder": "m"}, "privacy": {"level": "none"}}
WRONG: dict[str, tuple[dict, str]] = {
    "no name": ({"name": ""}, "name: expected the site's name"),
    "a name that is no folder's": ({"name": "../x"}, "name: expected the site's name"),
    "no source": ({"data": {}}, "data.source: expected the site's own training examples"),
    "no model": ({"model": {}}, "model: expected either folder or name"),
    "two models": ({"model": {"folder": "m", "name": "n"}}, "model: expected either folder or name"),
    "no level": ({"privacy": {}}, "privacy.level: expected one of none, example, person, client, got nothing"),
    "an unknown level": (
        {"privacy": {"level": "exemple"}},
        "privacy.level: expected one of none, example, person, client, got 'exemple'",
    ),
    "no budget": ({"privacy": {"level": "example"}}, "privacy.epsilon: expected a number above 0, the budget"),
    "delta of 1": ({"privacy": {"level": "example", "epsilon": 1.0, "delta": 1.0}}, "privacy.delta"),
    "a misspelt key": ({"limits": {"rounds_": 3}}, "limits.rounds_: unknown key; did you mean 'rounds'"),
    "a misspelt section": ({"limit": {}}, "[limit]: unknown section; did you mean 'limits'"),
    "a run's key": ({"data": {"source": "x", "partition": {}}}, "data.partition: unknown key"),
    "a rank of 0": ({"limits": {"rank": 0}}, "limits.rank: expected a whole number of at least 1, got 0"),
    "a rank that is no number": ({"limits": {"rank": "8"}}, "limits.rank: expected whole number, got '8'"),
    "no seconds": ({"limits": {"seconds": 0.0}}, "limits.seconds"),
    "a digest that is none": ({"accept": {"base_model": "abc"}}, "accept.base_model: expected 64 hexadecimal digits"),
    "an unknown task": ({"accept": {"tasks": ["text"]}}, "accept.tasks: expected one of"),
    "labels without scores": ({"accept": {"by_label": True}}, "accept.by_label"),
    "an encoding": ({"data": {"source": "x", "encoding": "klingon"}}, "data.encoding"),
    "an unknown device": ({"device": {"kind": "tpu"}}, "device.kind: expected one of"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_site_file_is_one_line_with_its_key(tmp_path: Path, what: str) -> None:
    changes, line = WRONG[what]
    path = tmp_path / "site.toml"
    path.write_bytes(tomli_w.dumps({**GOOD, **changes}).encode())
    with pytest.raises(ConfigError) as error:
        sitefile.load(path)
    assert str(error.value).startswith(f"{path}: {line}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"name = ", b"[data]\nsource = 3\n", b"data = 3\n", b"store = 3\n"])
def test_what_is_no_site_file_is_one_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=str(path)):
        sitefile.load(path)
    with pytest.raises(ConfigError, match="no such file"):
        sitefile.load(tmp_path / "none.toml")


def test_relative_paths_start_at_the_site_file(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(tomli_w.dumps(GOOD).encode())
    site = sitefile.load(path)
    found = (site.data.source, site.model.folder, site.store.folder)
    assert found == tuple(str(tmp_path / name) for name in ("x.csv", "m", "site-store"))


def test_every_key_of_a_site_file_is_documented_with_its_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "site-file.md").read_text()
    for section, (_, keys) in sitefile.sections().items():
        part = text.split(f"## `[{section}]`")[1].split("\n## ")[0]
        rows = {row.split("|")[1].strip(): row for row in part.splitlines() if row.startswith("| `")}
        assert rows.keys() == {f"`{key}`" for key in keys}
        for key, field in keys.items():
            default = [] if field.default is dataclasses.MISSING else field.default
            assert f"`{json.dumps(default)}`" in rows[f"`{key}`"]
            assert field.metadata["doc"] in rows[f"`{key}`"]


# --- processes --------------------------------------------------------------------------------------------------------------


def started(path: Path, public: dict, found: list[Frame]) -> Supervised:
    command = (sys.executable, "-m", "anyrank.worker", "--site", str(path))
    return Supervised(lambda: setup(public), found.append, 1 << 30, command=command)


def test_a_site_worker_is_a_supervised_process(world: Path) -> None:
    """Killed, it is started again, and its own parts are there."""
    public, found = table("fedsa"), []
    here, server = begun(world, "here", public=public)
    expected = [to_bytes_without_time(asked(here, server, round)) for round in (1, 2)]
    here.close()
    worker = started(site_file(world, "county", "there"), public, found)
    for round in (1, 2):
        jobs, _ = asking.dispatch(server.federation, dataclasses.replace(server.state, round=round - 1), round)
        job = next(job for job in jobs if job.client.name == "county")
        (reply,) = worker.ask(request(job, server.federation.plan(round)), 1, 60.0)
        assert to_bytes_without_time(reply) == expected[round - 1]
        if round == 1:
            second = started(world / "there.toml", public, refused := [])
            second.start(60.0)
            assert calls.error_of(refused[0]).args[0].startswith("store: the site cannot take part")
            second.close()
            worker.kill()
            with pytest.raises(Died):
                list(worker.ask(request(job, server.federation.plan(round)), 1, 60.0))
            worker.revive()
    assert [frame.header.kind for frame in found] == [calls.READY, calls.READY]
    worker.close()


def test_a_wrong_site_file_ends_its_worker_with_a_line_and_an_error_to_who_asks(world: Path) -> None:
    path = world / "wrong.toml"
    path.write_text('name = "county"\n[data]\nsource = "secret-patients.csv"\n[model]\nfolder = "model"\n')
    command = [sys.executable, "-m", "anyrank.worker", "--site", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{path}: privacy.level: expected one of none, example, person, client, got nothing; say what every run must protect"
    ]
    worker = started(path, table("rbla"), found := [])
    worker.start(60.0)
    assert str(calls.error_of(found[0])).startswith("site file: the site cannot take part")
    assert "secret" not in str(calls.error_of(found[0]))
    worker.close()
    usage = subprocess.run([*command[:3], "--cite"], capture_output=True, text=True, timeout=60)
    assert (usage.returncode, usage.stderr) == (2, "usage: python -m anyrank.worker [--site FILE]\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize(("megabytes", "fails"), [(300, True), (900, False)])
def test_a_limit_of_memory_is_the_systems(world: Path, megabytes: int, fails: bool) -> None:
    """The worker's own start sets it: 600 MB can be had with a limit of 900, and not with one of 300."""
    path = site_file(world, "county", f"limited-{megabytes}", limits={"memory_gb": megabytes / 1000})
    program = f"""if True:
        from anyrank.worker import channel, sitemain
        class Enough(Exception): ...
        def stop(most_bytes): raise Enough
        channel.take_over = stop
        try:
            sitemain.main({str(path)!r})
        except Enough:
            print(len(bytearray(600_000_000)))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == ((1, "") if fails else (0, "600000000\n"))
    assert ("MemoryError" in done.stderr) == fails


def test_another_base_model_than_the_accepted_one_is_refused_by_its_key(world: Path) -> None:
    right = digest_of_model(world / "model")
    for number, (digest, kind) in enumerate([(right, calls.READY), ("0" * 64, calls.ERROR)]):
        site = Asked(site_file(world, "county", f"accepts-{number}", accept={"base_model": digest}))
        (reply,) = site.ask(setup(table("rbla")))
        assert reply.header.kind == kind
        if kind == calls.ERROR:
            assert "accept.base_model" in str(calls.error_of(reply))
            assert right not in str(calls.error_of(reply)), "what the site has is its own matter"
            assert right in (world / f"accepts-{number}" / "site.log").read_text()
        site.close()


def test_a_store_that_cannot_be_used_ends_its_worker_with_status_2_whether_somebody_asks_or_not(world: Path) -> None:
    path = site_file(world, "county", "a-file")
    (world / "a-file").write_text("no folder")
    command = [sys.executable, "-m", "anyrank.worker", "--site", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "a-file" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    worker = started(path, table("rbla"), found := [])
    worker.start(60.0)
    assert str(calls.error_of(found[0])).startswith("store: the site cannot take part")
    worker.close()


@pytest.mark.parametrize("method", ["fedsa", "ffa_lora"])
def test_a_federation_over_site_workers_has_the_adapter_of_one_process(world: Path, tmp_path: Path, method: str) -> None:
    """Through the server's own engine, with scores from the sites."""
    public = table(method, eval={"where": "sites"})
    config = in_one_process(world, public)
    here = simulation.execute(config, tmp_path / "here")
    paths = {name: site_file(world, name, f"over-{method}-{name}", accept={"scores": True}) for name in RANKS}
    commands = {name: (sys.executable, "-m", "anyrank.worker", "--site", str(path)) for name, path in paths.items()}
    summary = federate(config, commands, tmp_path / "over")
    one, other = (Adapter.load(tmp_path / name / "adapter") for name in ("here", "over"))
    assert same(one, other, "A" if method == "fedsa" else "ABt")  # B and head of FedSA are at the sites only
    assert summary["accuracy"] == here["accuracy"]
    assert summary["sites"] == here["sites"]
    assert any(layer.A.any() for layer in one.layers.values())
    text = (tmp_path / "over" / "clients.jsonl").read_text()
    assert '"status": "ok"' in text
    assert '"status": "failed"' not in text


def test_a_private_federation_over_site_workers_ends_where_the_sites_grants_do(world: Path, tmp_path: Path) -> None:
    """Each site takes part as often as its own grant allows, by its own number of examples; the server has no say in it."""
    noise, delta, granted = 1.0, 1e-5, 4.2
    public = table("rbla", inside=False, eval={"where": "sites"}, model={"head": "frozen"},
                   privacy={"level": "example", "noise_multiplier": noise, "delta": delta})  # fmt: skip
    public["run"] |= {"rounds": 5}
    own = {"level": "example", "epsilon": granted, "delta": delta}
    paths = {name: site_file(world, name, f"granted-{name}", privacy=own) for name in RANKS}
    commands = {name: (sys.executable, "-m", "anyrank.worker", "--site", str(path)) for name, path in paths.items()}
    federate(in_one_process(world, public), commands, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    for name, declared in {"county": 48, "lakeside": 32, "st-mary": 40}.items():
        statuses = [row["status"] for row in rows if row["client"] == name]
        took = statuses.count("ok")
        assert statuses == ["ok"] * took + ["failed"] * (5 - took)
        assert {row["reason"] for row in rows if row["client"] == name and row["status"] == "failed"} == {"refused"}
        assert composed((Spending(8 / declared, noise, 2 * took),), delta) <= granted
        assert composed((Spending(8 / declared, noise, 2 * (took + 1)),), delta) > granted
        assert spent(sitefile.load(paths[name]))["charges"] == took
    assert {row["loss"] for row in rows} == {row["seconds"] for row in rows} == {None}
