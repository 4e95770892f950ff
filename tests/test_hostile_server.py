"""A server that a site must not trust: it repeats, renames, rolls back, lies and kills. What it gets is within the budget.

The tests play the server. What was released is counted from the replies that they saw, and its cost is computed again with the
accountants of dp-accounting; the site's own ledger is not asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from anyrank import devices, methods
from anyrank.adapter.adapter import Adapter
from anyrank.config.sections import Config
from anyrank.errors import RunError
from anyrank.messages import calls, wire
from anyrank.messages.frame import Frame, Header, to_bytes
from anyrank.messages.plan import Plan, plan_round
from anyrank.messages.records import Client, Job, Scaling, ServerState
from anyrank.messages.scores import KIND as SCORES
from anyrank.privacy import chain, grant
from anyrank.privacy.grant import Grant, Release, Spent
from anyrank.worker import site as site_module
from anyrank.worker.site import spent
from anyrank.worker.sitefile import load
from anyrank.worker.sitelog import LOG

pytest.importorskip("transformers")
dp = pytest.importorskip("dp_accounting")
from dp_accounting.pld import PLDAccountant  # noqa: E402

from site_world import RANKS, RUN, Asked, in_one_process, make_world, request, setup, site_file, table  # noqa: E402

SITE, RANK = "county", RANKS["county"]
DECLARED = 48  # 60 rows, of which a fifth is held out: 110000 in binary, so that rounding leaves it
BATCH, STEPS, NOISE, DELTA = 8, 2, 1.0, 1e-5
GRANT = 4.2
PRIVATE = {"level": "example", "noise_multiplier": NOISE, "delta": DELTA}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYRANK_CACHE", str(cache))
        patch.setattr(devices, "cores", lambda: 1)
        yield make_world(tmp_path_factory.mktemp("hostile"))


def public(**sections: Mapping[str, Any]) -> dict[str, Any]:
    made = table("rbla", inside=False, **{"model": {"head": "frozen"}, "privacy": PRIVATE})
    for section, keys in sections.items():
        made[section] = {**made.get(section, {}), **keys}
    return made


def private_site(world: Path, store: str, **sections: Mapping[str, Any]) -> Path:
    return site_file(world, SITE, store, **{"privacy": {"level": "example", "epsilon": GRANT, "delta": DELTA}, **sections})


class Server:
    """Makes what a server would send to one site under a public configuration, and lies where it is asked to."""

    def __init__(self, world: Path, made: Mapping[str, Any], run: str = RUN) -> None:
        self.table, self.run = made, run
        self.config: Config = in_one_process(world, made)
        self.method = methods.make(self.config.method.name, self.config.method.options)
        self.scaling = Scaling(self.config.lora.alpha, self.config.lora.scaling)
        self.rank = max(self.config.clients.ranks)
        self.start: Adapter | None = None

    def setup(self, site: Asked) -> Frame:
        """The site's answer to the setup; on success, the start adapter is known."""
        (reply,) = site.ask(setup(self.table, self.run))
        if reply.header.kind == calls.READY:
            (found,) = site.ask(calls.start_frame(self.rank, self.scaling, self.config.run.seed, self.run))
            self.start = calls.adapter_of(found)[0]
        return reply

    def plan(self, round: int) -> Plan:
        return plan_round(self.config.train, round, self.config.run.rounds, self.config.run.seed)

    def job(self, round: int = 1, other: int = 0, client: Client | None = None, examples: int = DECLARED) -> Job:
        """A job of `round`; `other`: which of several downloads."""
        state = self.method.init(self.start, self.scaling, self.config.run.seed)
        state = ServerState(max(round, 1) - 1, state.seed, state.adapter, state.scaling, state.merged, state.extra)
        download = self.method.dispatch(state, client or Client(SITE, RANK))
        if other:
            layers = {
                name: layer.with_factors(layer.A, layer.B + other / 100) for name, layer in download.adapter.layers.items()
            }
            download = dataclasses.replace(download, adapter=Adapter(layers, download.adapter.tensors, download.adapter.config))
        return Job(Client(SITE, RANK), examples, lambda: download)

    def frames(self, round: int = 1, other: int = 0, plan: Plan | None = None, **cohort: Any) -> tuple[Frame, Frame]:
        return request(self.job(round, other), plan or self.plan(round), self.run, **cohort)


def ready(world: Path, store: str, made: Mapping[str, Any] | None = None, **sections: Any) -> tuple[Server, Asked]:
    server = Server(world, made or public())
    site = Asked(private_site(world, store, **sections))
    assert server.setup(site).header.kind == calls.READY
    return server, site


def outcome(replies: list[Frame]) -> str:
    """`update`, or the code of a failure, or `error`."""
    (reply,) = replies
    return reply.header.body["code"] if reply.header.kind == wire.FAILURE else reply.header.kind


def cost(releases: Mapping[bytes, tuple[float, float, int]], delta: float = DELTA) -> float:
    """Epsilon of different releases `{bytes: (sampling rate, noise, steps)}`, by dp-accounting alone."""
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    for (rate, noise, steps), count in Counter(releases.values()).items():
        accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps * count)
    return accountant.get_epsilon(delta) if releases else 0.0


def releases(frames: list[Frame], noise: float = NOISE) -> dict[bytes, tuple[float, float, int]]:
    """The different updates among what was sent: two of the same bytes reveal no more than one."""
    return {to_bytes(frame): (BATCH / DECLARED, noise, STEPS) for frame in frames if frame.header.kind == wire.UPDATE}


def check_left(frames: list[Frame], own: tuple[str, ...]) -> None:
    """Everything that has left a private site is in the forms that it may have, without a word of its own."""
    for frame in frames:
        text, values = json.dumps([dict(frame.header.body), frame.header.client, frame.header.run]), frame.header.body
        assert frame.header.kind in (calls.READY, calls.ADAPTER, calls.ERROR, wire.UPDATE, wire.FAILURE)
        assert not [word for word in own if word in text]
        if frame.header.kind == wire.UPDATE:
            assert values == {"num_examples": DECLARED, "metrics": {}}
        if frame.header.kind == wire.FAILURE:
            assert values["code"] in ("REFUSED", "PRIVATE")
            assert values["reason"] == ""
        if frame.header.kind == calls.READY:
            facts = values["facts"]
            assert (facts["train_examples"], facts["test_examples"], facts["inputs_bytes"]) == (DECLARED, 0, 0)
            assert set(frame.arrays) == {"sizes"}  # and not the number of held-out examples
            assert frame.arrays["sizes"].tolist() == [DECLARED]


# --- one lie at a time ----------------------------------------------------------------------------------------------------


def test_rounds_go_on_until_the_budget_is_spent_and_no_further(world: Path) -> None:
    server, site = ready(world, "until")
    outcomes = [outcome(site.ask(*server.frames(1 + round % 3, other=round))) for round in range(9)]
    count = outcomes.count("update")
    assert 1 < count < 9
    assert outcomes == ["update"] * count + ["REFUSED"] * (9 - count)
    found = releases(site.left)
    assert len(found) == count
    assert cost(found) <= GRANT
    assert cost(found | {b"one more": (BATCH / DECLARED, NOISE, STEPS)}) > GRANT  # the budget was used, too
    assert spent(load(private_site(world, "until")))["spent"] == pytest.approx(cost(found), rel=0.02)
    site.close()


@pytest.mark.parametrize("change", [{"run": "another"}, {"seed": 8}, {"rounds": 50}, {"label": "x"}])
def test_another_run_or_federation_has_no_budget_of_its_own(world: Path, change: dict[str, Any]) -> None:
    store = f"again-{next(iter(change))}"
    server, site = ready(world, store)
    first = [outcome(site.ask(*server.frames(1, other=n))) for n in range(6)]
    other = dict(change)
    again = Server(
        world, public(run={**public()["run"], **{k: v for k, v in other.items() if k != "run"}}), other.get("run", RUN)
    )
    assert again.setup(site).header.kind == calls.READY
    assert first[-1] == "REFUSED"
    assert [outcome(site.ask(*again.frames(1, other=n))) for n in range(3)] == ["REFUSED"] * 3
    site.close()
    server, site = ready(world, store)  # a worker that was started anew
    assert outcome(site.ask(*server.frames(1, other=99))) == "REFUSED"
    assert cost(releases(site.left)) <= GRANT
    site.close()


def test_the_same_request_has_the_same_reply_at_no_charge_and_any_other_is_a_new_release(world: Path) -> None:
    server, site = ready(world, "same")
    (one,), (two,) = site.ask(*server.frames(2)), site.ask(*server.frames(2))
    assert to_bytes(one) == to_bytes(two)
    assert site.desk.grant.count == 1
    site.close()
    server, site = ready(world, "same")
    (three,) = site.ask(*server.frames(2))
    assert to_bytes(three) == to_bytes(one)
    assert site.desk.grant.count == 1
    (four,) = site.ask(*server.frames(2, deadline_s=77.0))  # the same work, another request
    assert to_bytes(four) != to_bytes(one)
    assert site.desk.grant.count == 2
    site.close()


def test_noise_and_samples_are_new_in_each_attempt(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the seed of the run, not from a secret in the environment, and not the same at two sites of the same data."""
    monkeypatch.setenv("ANYRANK_PRIVACY_SEED", "a secret that the server has set, as long as it needs to be")
    found = []
    for store in ("noise-1", "noise-2"):
        server, site = ready(world, store)
        found += site.ask(*server.frames(1))
        site.close()
    one, two = (frame.arrays["B/map"] for frame in found)
    assert (one != two).mean() > 0.99


def test_a_charge_is_on_disk_before_anything_is_trained(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, site = ready(world, "before")
    folder, seen, train = Path(site.desk.site.store.folder), [], site_module.trainer.train

    def watched(*arguments: Any) -> Any:
        seen.append(len((folder / grant.LEDGER).read_text().splitlines()))
        return train(*arguments)

    monkeypatch.setattr(site_module.trainer, "train", watched)
    for other in range(3):
        site.ask(*server.frames(1, other))
    assert seen == [1, 2, 3]
    site.close()


class Killed(BaseException):
    """The worker ends here."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("where", ["train", "keep_reply", "_left"])
def test_a_worker_that_is_killed_between_charge_and_reply_stays_charged(
    world: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    server, site = ready(world, f"killed-{where}")
    left: list[Frame] = []
    for _ in range(6):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            owner = {"train": site_module.trainer, "keep_reply": site.desk.store, "_left": site.desk}[where]
            patch.setattr(owner, where, killed)
            site.ask(*server.frames(1))
        left += site.left
        site.close()
        server, site = ready(world, f"killed-{where}")
    if where == "_left":  # it was kept before it was to be sent: asked again, that very reply comes
        assert site.desk.grant.count == 1
        assert outcome(site.ask(*server.frames(1))) == "update"
    else:
        assert outcome(site.ask(*server.frames(1))) == "REFUSED"
        assert not releases(left)
    assert cost(releases(left + site.left)) <= GRANT
    site.close()


REFUSED_SETUPS: dict[str, tuple[dict[str, Any], str]] = {
    "no privacy": ({"privacy": None}, "privacy.level"),
    "another level": ({"privacy": PRIVATE | {"level": "client"}}, "privacy.level"),
    "correlated noise": ({"privacy": PRIVATE | {"noise": "correlated", "bands": 2}}, "privacy.noise"),
    "noise at the server": ({"privacy": PRIVATE | {"level": "client", "noise_at": "server"}}, "privacy.level"),
    "less noise": ({"privacy": PRIVATE | {"noise_multiplier": 0.5}}, "privacy.noise_multiplier"),
    "a larger clip": ({"privacy": PRIVATE | {"clip": 100.0}}, "privacy.clip"),
    "sums that nothing hides": ({"privacy": PRIVATE | {"secure_sum": True}}, "privacy.secure_sum"),
    "exact counts": ({"privacy": PRIVATE | {"counts": "exact"}}, "privacy.counts"),
    "epochs": ({"train": {"local_epochs": 1, "local_steps": 0}}, "train.local_epochs"),
    "more steps": ({"train": {"local_steps": 2**61}}, "train.local_steps"),
    "more epochs": ({"train": {"local_epochs": 2**61, "local_steps": 0}}, "train.local_epochs"),
    "a larger batch than examples": ({"train": {"batch_size": 50}}, "train.batch_size"),
    "a huge batch": ({"train": {"batch_size": 2**61}}, "train.batch_size"),
    "no learning rate": ({"train": {"learning_rate": 0.0}}, "train.learning_rate"),
    "many rounds": ({"run": {"rounds": 10**6}}, "run.rounds"),
    "long texts": ({"model": {"max_length": 10**6}}, "model.max_length"),
    "a path of the model": ({"model": {"path": "/etc"}}, "model.path"),
    "a file of a task": ({"model": {"file": "evil.py", "task": "mine"}}, "model.file"),
    "a file of a method": ({"method": {"file": "evil.py"}}, "method.file"),
    "a file of metrics": ({"eval": {"file": "evil.py"}}, "eval.file"),
    "a file of a partition": ({"data": {"partition": {"file": "evil.py"}}}, "data.partition.file"),
    "a source": ({"data": {"source": "/etc/passwd"}}, "data.source"),
    "a list of sources": ({"data": {"source": ["a.csv", "b.csv"]}}, "data.source"),
    "a held-out source": ({"data": {"test_source": "/etc/passwd"}}, "data.test_source"),
    "a method without privacy": ({"method": {"name": "fedsa"}}, "method.name"),
    "all data in one place": ({"method": {"name": "centralized"}}, "method.name"),
    "no method": ({"method": {"name": "evil"}}, "method.name"),
    "a task that was handed in": ({"model": {"task": "handed-in", "handed_in": ["x"]}}, "model.handed_in"),
    "other labels": ({"data": {"label_names": ["one", "two", "three"]}}, "data.label_names"),
    "no labels": ({"data": {"label_names": []}}, "data.label_names"),
}


@pytest.fixture(scope="module")
def strict(world: Path) -> Any:
    limits = {"noise_multiplier": 0.9, "clip": 2.0}
    found = ready(world, "strict", privacy={"level": "example", "epsilon": GRANT, "delta": DELTA} | limits)
    yield found
    found[1].close()


@pytest.mark.parametrize("lie", REFUSED_SETUPS)
def test_a_configuration_that_does_not_fit_is_refused_by_its_key(strict: tuple[Server, Asked], lie: str) -> None:
    """The error names the key. It has nothing of the site's file in it; the site's own log has the reason."""
    _, site = strict
    changes, key = REFUSED_SETUPS[lie]
    made = public(**{section: keys for section, keys in changes.items() if keys is not None})
    made = {section: keys for section, keys in made.items() if changes.get(section, 0) is not None}
    (reply,) = site.ask(setup(made))
    assert reply.header.kind == calls.ERROR
    assert reply.header.body["text"].startswith(f"{key}: does not fit")
    assert "0.9" not in reply.header.body["text"]
    assert site.desk.held is None
    log = (Path(site.desk.site.store.folder) / LOG).read_text().splitlines()
    assert json.loads(log[-1])["reason"].startswith(key)


@pytest.mark.parametrize("change", [{"sites": []}, {"sites": [{"name": "elsewhere", "rank": 4}]}, {"sites": "x"}, {"run": 3},
                                    {"data": None}, {"nonsense": {}}, {"sites": [{"name": SITE, "rank": 4}] * 2},
                                    {"sites": [{"name": SITE, "rank": 4, "source": "/etc/passwd"}]},
                                    {"sites": [{"name": SITE, "rank": 10**6}]},
                                    {"sites": [{"name": SITE, "rank": "auto"}]}])  # fmt: skip
def test_a_table_that_is_no_configuration_for_this_site_is_refused(
    strict: tuple[Server, Asked], change: dict[str, Any]
) -> None:
    _, site = strict
    (reply,) = site.ask(setup({**public(), **change}, largest_rank=10))
    assert reply.header.kind == calls.ERROR
    assert site.desk.held is None


def altered(frame: Frame, **body: Any) -> Frame:
    return Frame(dataclasses.replace(frame.header, body={**frame.header.body, **body}), frame.arrays, frame.bfloat16)


def lies(server: Server) -> dict[str, tuple[Frame, ...]]:
    """Requests for round 1 that are not what the site has agreed to, by what is wrong with them."""
    cohort, sent = server.frames(1)
    plan, body = server.plan(1), sent.header.body
    nan = next(name for name in sent.arrays if name.startswith("A/"))
    layer = {name: [10**6, *entry[1:]] for name, entry in body["adapter"]["layers"].items()}
    config = dataclasses.replace

    def planned(**fields: Any) -> tuple[Frame, Frame]:
        return server.frames(1, plan=config(plan, **fields))

    def trained(**fields: Any) -> tuple[Frame, Frame]:
        return server.frames(1, plan=config(plan, config=config(plan.config, **fields)))

    def with_array(value: float) -> tuple[Frame, Frame]:
        return cohort, Frame(sent.header, {**sent.arrays, nan: sent.arrays[nan] * 0 + value}, sent.bfloat16)

    merged = server.job().download.adapter
    big = {
        name: layer.with_factors(torch.ones(400, layer.shape[1]), torch.ones(layer.shape[0], 400))
        for name, layer in merged.layers.items()
    }
    into_base = Job(Client(SITE, RANK), DECLARED, lambda: dataclasses.replace(server.job().download, merged=Adapter(big)))
    return {
        "a mechanism with a key": server.frames(1, mechanism={"plan": {}, "key": "00" * 32}),
        "scores alone": server.frames(1, train=False, score=True),
        "neither": server.frames(1, train=False),
        "another round": (cohort, Frame(dataclasses.replace(sent.header, round=2), sent.arrays)),
        "round 0": (cohort, altered(sent, plan={**body["plan"], "round": 0})),
        "a round past the end": server.frames(4),
        "round a million": planned(round=10**6),
        "round 2^61": planned(round=2**61),
        "another seed": planned(seed=8),
        "a learning rate": planned(learning_rate=1e9),
        "a learning rate without end": planned(learning_rate=1e308),
        "a factor": planned(step_factor=2),
        "a factor of 2^61": planned(step_factor=2**61),
        "more steps": trained(local_steps=500),
        "2^61 steps": trained(local_steps=2**61),
        "a larger batch": trained(batch_size=2**61),
        "one example": trained(batch_size=1),
        "a proximal term": trained(proximal_mu=1e6),
        "another optimizer": trained(optimizer="sgd"),
        "more examples": request(server.job(examples=10**9), plan, server.run),
        "fewer examples": request(server.job(examples=1), plan, server.run),
        "another name": request(dataclasses.replace(server.job(), client=Client("lakeside", RANK)), plan, server.run),
        "another rank": request(Job(Client(SITE, 3), DECLARED, server.job().make), plan, server.run),
        "a download of another rank": request(server.job(client=Client(SITE, 2)), plan, server.run),
        "ranks of layers": request(Job(Client(SITE, RANK, {"map": 2}), DECLARED, server.job().make), plan, server.run),
        "another run": request(server.job(), plan, "another"),
        "another run for both": request(server.job(), plan, "x"),
        "a rank of a million": (cohort, altered(sent, adapter={**body["adapter"], "layers": layer})),
        "NaN": with_array(math.nan),
        "infinite": with_array(math.inf),
        "train B alone": (cohort, altered(sent, train=["B"])),
        "train nothing": (cohort, altered(sent, train=[])),
        "private A": (cohort, altered(sent, private=["A"])),
        "B not sent": (cohort, altered(sent, send=["A"])),
        "other slices": (cohort, altered(sent, slices={name: [3, 2, 1, 0] for name in body["slices"]})),
        "pruning": (cohort, altered(sent, pruning={"gamma": 0.1, "penalty": 1e9, "min_rank": 1})),
        "another scaling rule": (cohort, altered(sent, rescale="B" if body["rescale"] == "both" else "both")),
        "another scaling": (cohort, altered(sent, adapter={**body["adapter"], "layers": {
            name: [*entry[:4], 1e30, *entry[5:]] for name, entry in body["adapter"]["layers"].items()}})),
        "more layers": (cohort, altered(sent, adapter={**body["adapter"], "layers": {
            **body["adapter"]["layers"], "x": layer["map"]}})),
        "no layers": (cohort, altered(sent, adapter={**body["adapter"], "layers": {}}, slices={})),
        "a merged sum of a large rank": request(into_base, plan, server.run),
        "a key more": (cohort, altered(sent, x=1)),
        "two at once": (cohort, cohort, sent, sent),
        "something else than a download": (cohort, wire.plan_frame(plan, server.run)),
        "many jobs": (altered(cohort, jobs=10**6), sent),
        "no job": (altered(cohort, jobs=0), sent),
        "an odd deadline": (altered(cohort, deadline_s="soon"), sent),
        "scores of the whole model": (calls.adapter_frame(server.start, None, calls.EVALUATE, server.run),),
        "a start of a huge rank": (calls.start_frame(10**6, server.scaling, server.config.run.seed, server.run),),
        "another start": (calls.start_frame(server.rank, server.scaling, 99, server.run),),
        "a start of another scaling": (calls.start_frame(server.rank, Scaling(1e9), server.config.run.seed, server.run),),
        "a reply": (Frame(Header(wire.UPDATE, server.run, 1, SITE, {"num_examples": 1, "metrics": {}}), {}),),
        "scores": (Frame(Header(SCORES, server.run), {}),),
        "nothing that is known": (Frame(Header("exec", server.run, body={"code": "import os"}), {}),),
        "a progress": (calls.progress_frame(1, 2),),
    }  # fmt: skip


def test_whatever_a_request_lies_about_is_refused_and_costs_nothing(strict: tuple[Server, Asked]) -> None:
    server, site = strict
    assert server.setup(site).header.kind == calls.READY
    before = site.desk.grant.count
    for lie, frames in lies(server).items():
        replies = site.ask(*frames)
        assert len(replies) <= 2, lie
        assert replies, lie
        for reply in replies:
            assert reply.header.kind in (calls.ERROR, wire.FAILURE), lie
            assert reply.header.body.get("code", "REFUSED") == "REFUSED", lie
        assert site.desk.grant.count == before, lie
    check_left(site.left, (str(site.desk.site.store.folder), "store-", "0.9"))
    assert outcome(site.ask(*server.frames(1))) == "update"  # and an honest one is answered as ever
    assert site.desk.grant.count == before + 1


def test_a_flood_costs_a_bounded_log(strict: tuple[Server, Asked]) -> None:
    server, site = strict
    server.setup(site)
    site.desk.log._most_bytes = 20_000
    for _ in range(150):
        site.ask(*server.frames(1, train=False))
    folder = Path(site.desk.site.store.folder)
    assert sum(path.stat().st_size for path in folder.glob("site.log*")) < 50_000


def test_an_update_under_client_level_has_noise_and_is_charged_once_a_round(world: Path) -> None:
    """One release of the Gaussian mechanism each, sampled by no one: 3 of noise 4 cost more than 1 of noise 4."""
    privacy = {"level": "client", "noise_multiplier": 4.0, "delta": DELTA}
    made = table("ffa_lora", inside=False, model={"head": "frozen"}, privacy=privacy)
    server = Server(world, made)
    site = Asked(site_file(world, SITE, "client", privacy={"level": "client", "epsilon": 3.0, "delta": DELTA}))
    assert server.setup(site).header.kind == calls.READY
    outcomes = [outcome(site.ask(*server.frames(1, other=n))) for n in range(12)]
    found = {to_bytes(frame): (1.0, 4.0, 1) for frame in site.left if frame.header.kind == wire.UPDATE}
    assert outcomes.count("update") == len(found) > 1
    assert cost(found) <= 3.0 < cost(found | {b"one more": (1.0, 4.0, 1)})
    check_left(site.left, ())
    site.close()


def test_a_training_that_breaks_is_charged_and_says_no_more_than_that(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, site = ready(world, "breaks")

    def broken(*_: Any) -> Any:
        raise ValueError(f"patient 17 of {SITE} has a rare illness")

    with monkeypatch.context() as patch:
        patch.setattr(site_module.trainer, "train", broken)
        assert outcome(site.ask(*server.frames(1))) == "PRIVATE"
    assert site.desk.grant.count == 1
    check_left(site.left, ("patient", "illness"))
    assert "patient 17" in (Path(site.desk.site.store.folder) / LOG).read_text()
    site.close()


def test_a_full_store_is_refused_before_anything_is_charged(world: Path) -> None:
    server, site = ready(world, "full")
    site.desk.store.most_bytes = 1_000
    assert outcome(site.ask(*server.frames(1))) == "REFUSED"
    assert site.desk.grant.count == 0
    site.close()


# --- the ledger -----------------------------------------------------------------------------------------------------------

ONE = Release("example", 1 / 6, 1.0, 2)


def ledger(folder: Path, charges: int = 3) -> Grant:
    folder.mkdir(exist_ok=True)
    found = Grant(folder, "example", 50.0, DELTA)
    for _ in range(charges):
        found.charge(ONE, {})
    return found


def test_charges_of_different_noise_add_up(tmp_path: Path) -> None:
    """As dp-accounting composes them, whatever the order; and a whole site's noise protects an example half as well."""
    found, events = ledger(tmp_path, 0), []
    for level, rate, noise, steps in (
        ("example", 0.1, 0.8, 5),
        ("example", 0.5, 2.0, 3),
        ("client", 1.0, 8.0, 1),
        ("example", 0.1, 0.8, 5),
    ):
        found.charge(Release(level, rate, noise, steps), {})
        events += [(rate, noise if level == "example" else noise / 2, steps)]
    expected = cost({bytes([n]): event for n, event in enumerate(events)})
    assert found.spent() == pytest.approx(expected, rel=0.01)
    assert Grant(tmp_path, "example", 50.0, DELTA).spent() == found.spent()
    assert Grant(tmp_path, "client", 50.0, DELTA).spent() == math.inf
    with pytest.raises(Spent):
        Grant(tmp_path, "client", 50.0, DELTA).charge(Release("client", 1.0, 100.0, 1), {})


@pytest.mark.parametrize("release", [Release("example", 0.1, 0.0, 1), Release("example", 0.1, math.inf, 1),
                                     Release("example", 0.1, math.nan, 1), Release("example", 0.0, 1.0, 1),
                                     Release("example", 1.5, 1.0, 1), Release("example", 0.1, 1.0, 0)])  # fmt: skip
def test_what_is_no_release_with_noise_is_not_charged_but_refused(tmp_path: Path, release: Release) -> None:
    with pytest.raises(Spent):
        ledger(tmp_path, 0).charge(release, {})


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def lines_of(data: bytes, *kept: int) -> bytes:
    rows = data.splitlines(keepends=True)
    return b"".join(rows[place] for place in kept)


DAMAGE: dict[str, Any] = {
    "a line gone": lambda data: lines_of(data, 0, 2),
    "the last line gone": lambda data: lines_of(data, 0, 1),
    "cut within the last line": lambda data: data[:-20],
    "all gone": lambda data: b"",
    "two lines exchanged": lambda data: lines_of(data, 1, 0, 2),
    "a line twice": lambda data: lines_of(data, 0, 1, 2, 2),
    "a bit in the middle": lambda data: flip(data, len(data) // 2),
    "a bit at the end": lambda data: flip(data, len(data) - 5),
    "less noise noted": lambda data: data.replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'),
    "less noise noted in the first line": lambda data: data.replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0', 1),
    "fewer steps noted in the first line": lambda data: data.replace(b'"steps": 2', b'"steps": 1', 1),
    "no text": lambda data: b"\xff" * 100 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_ledger_that_was_changed_is_refused_in_a_line(tmp_path: Path, damage: str) -> None:
    ledger(tmp_path)
    path = tmp_path / grant.LEDGER
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(RunError, match="what was spent is not known") as error:
        Grant(tmp_path, "example", 50.0, DELTA)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [grant.LEDGER, grant.HEAD])
def test_an_older_copy_of_one_of_its_files_is_refused(tmp_path: Path, name: str) -> None:
    found = ledger(tmp_path, 1)
    older = (tmp_path / name).read_bytes()
    for _ in range(2):
        found.charge(ONE, {})
    (tmp_path / name).write_bytes(older)
    with pytest.raises(RunError, match="what was spent is not known"):
        Grant(tmp_path, "example", 50.0, DELTA)


def test_an_older_copy_of_the_whole_ledger_is_found_by_what_was_answered(world: Path) -> None:
    server, site = ready(world, "older")
    folder = Path(site.desk.site.store.folder)
    site.ask(*server.frames(1))
    older = {name: (folder / name).read_bytes() for name in (grant.LEDGER, grant.HEAD)}
    site.ask(*server.frames(2))
    site.close()
    for name, data in older.items():
        (folder / name).write_bytes(data)
    with pytest.raises(RunError, match="older copy"):
        ready(world, "older")
    for name in older:
        (folder / name).unlink()
    with pytest.raises(RunError, match="older copy"):
        ready(world, "older")


# --- any sequence of lies -------------------------------------------------------------------------------------------------

FOLDER: list[Path] = []
NOISES = (0.8, 1.0, 1.5)


class HostileServer(RuleBasedStateMachine):
    """Sets up, asks, repeats, renames, rolls back and kills, in any order, and counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bytes, tuple[float, float, int]] = {}
        self.left: list[Frame] = []
        self.last: tuple[Frame, ...] | None = None
        self.server: Server | None = None

    @initialize()
    def start(self) -> None:
        self.folder = FOLDER[0]
        shutil.rmtree(self.folder / "machine", ignore_errors=True)
        self.path = private_site(self.folder, "machine")
        self.site = Asked(self.path)

    @rule(
        noise=st.sampled_from(NOISES),
        seed=st.integers(0, 1),
        run=st.sampled_from([RUN, "x"]),
        rounds=st.sampled_from([1, 3, 9]),
    )
    def set_up(self, noise: float, seed: int, run: str, rounds: int) -> None:
        made = public(privacy={"noise_multiplier": noise}, run={**public()["run"], "seed": seed, "rounds": rounds})
        self.server, self.noise = Server(self.folder, made, run), noise
        assert self.server.setup(self.site).header.kind == calls.READY

    @precondition(lambda self: self.server)
    @rule(round=st.sampled_from([1, 1, 2, 3, 9, 10**6]), other=st.integers(0, 2))
    def ask(self, round: int, other: int) -> None:
        self.last = self.server.frames(round, other)
        self.send(self.last)

    @precondition(lambda self: self.last)
    @rule()
    def ask_again(self) -> None:
        self.send(self.last)

    @precondition(lambda self: self.server)
    @rule(lie=st.integers(0, 10**6))
    def lie(self, lie: int) -> None:
        told = lies(self.server)
        self.send(told[sorted(told)[lie % len(told)]])

    @precondition(lambda self: self.server)
    @rule(where=st.sampled_from(["train", "keep_reply", "_left"]), other=st.integers(0, 2))
    def kill(self, where: str, other: int) -> None:
        """The worker ends somewhere between charge and reply; the next one has its store."""
        owner = {"train": site_module.trainer, "keep_reply": self.site.desk.store, "_left": self.site.desk}[where]
        self.last = self.server.frames(1, other)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(owner, where, killed)
            self.send(self.last)
        self.restart()

    @rule()
    def restart(self) -> None:
        self.left += self.site.left
        self.site.close()
        self.site, self.server = Asked(self.path), None

    def send(self, frames: tuple[Frame, ...]) -> None:
        for reply in self.site.ask(*frames):
            if reply.header.kind == wire.UPDATE:
                self.seen[to_bytes(reply)] = (BATCH / DECLARED, self.noise, STEPS)

    @invariant()
    def within_the_budget(self) -> None:
        assert cost(self.seen) <= GRANT

    def teardown(self) -> None:
        if hasattr(self, "site"):
            check_left(self.left + self.site.left, ("machine", "store", ".csv"))
            self.site.close()


def test_no_sequence_of_lies_gets_more_than_the_budget(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FOLDER[:] = [world]
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        HostileServer, settings=settings(max_examples=12, stateful_step_count=16, suppress_health_check=list(HealthCheck))
    )


def test_a_disk_that_is_full_twice_leaves_a_ledger_that_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The charge stands, its summary cannot be written: the next charge writes that first, or does not begin."""
    found = ledger(tmp_path, 1)

    def full(path: Path, write: object) -> None:
        raise RunError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(chain, "write_whole", full)
        for _ in range(2):
            with pytest.raises(RunError, match="disk full"):
                found.charge(ONE, {})
    assert Grant(tmp_path, "example", 50.0, DELTA).count == 2
    found.charge(ONE, {})
    assert Grant(tmp_path, "example", 50.0, DELTA).count == 3
