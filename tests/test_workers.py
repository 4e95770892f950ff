"""`run.engine = "workers"`: the same bytes as in one process, whatever dies on the way; at most one reply is lost by a death.

`make sites` sets ANYRANK_SITES=all: every method and kind of run in real processes, and more moments of kills.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_runs
from anyrank import config as configs
from anyrank import simulation
from anyrank.engines import posts, workers
from anyrank.errors import AnyRankError, ConfigError, RunError, RunFailed
from anyrank.messages import calls
from anyrank.messages.frame import Frame, Header, from_bytes, read, to_bytes
from anyrank.messages.records import Failure
from anyrank.methods.registry import REGISTRY
from anyrank.privacy import noise
from anyrank.simulation.workers import fitting, on_gpu, visible
from anyrank.worker import memory, supervisor
from anyrank.worker.desk import Desk
from anyrank.worker.supervisor import Died, Late, Supervised
from kinds_of_run import whole
from test_supervisor import LONGEST_S, children, marked, wait_until

ALL = os.environ.get("ANYRANK_SITES") == "all"
WORKERS = ("run.engine=workers", "run.workers=2")

COMMON = """
[run]
name = "same"
rounds = 2
[clients]
count = 4
participation = 0.75
ranks = [1, 2, 4]
[train]
local_steps = 2
batch_size = 16
[model]
name = "digits-mlp"
"""


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[None]:
    """Keys and caches stay in folders of the tests; processes start again at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYRANK_CACHE", str(cache))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv(noise.SEED, "0123456789abcdef" * 2)
        patch.setattr(supervisor, "_PAUSES_S", (0.0,))
        yield


def chosen(folder: Path, *settings: str, common: str = COMMON) -> configs.Config:
    path = folder / "config.toml"
    path.write_text(common)
    return configs.load(path, settings)


def both(folder: Path, settings: Sequence[str], common: str = COMMON) -> tuple[dict, dict]:
    """What a run leaves in one process, and in workers."""
    for name, where in (("process", ()), ("workers", WORKERS)):
        simulation.execute(chosen(folder, *settings, *where, common=common), folder / name)
    return whole(folder / "process"), whole(folder / "workers")


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert any("adapter_model" in name for name in one)


# --- the same bytes ------------------------------------------------------------------------------------------------------


class Direct:
    """In the place of a supervised process: the same worker, in this process, behind the same bytes."""

    def __init__(self, opening, opened, limit: int, **ways: Any) -> None:
        self._opening, self._opened, self._desk, self.pid = opening, opened, Desk(), None

    def start(self) -> None:
        if self.pid is None:
            (reply,) = self._answered([self._opening()])
            self.pid = 1
            self._opened(reply)

    def ask(self, frames: Sequence[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        yield from self._answered(frames)

    def _answered(self, frames: Sequence[Frame]) -> Iterator[Frame]:
        first, *rest = [from_bytes(to_bytes(frame), 1 << 40) for frame in frames]
        coming = iter(rest)
        for reply in self._desk.answer(first, lambda: next(coming), lambda frame: None):
            yield from_bytes(to_bytes(reply), 1 << 40)

    def end(self) -> None: ...
    def kill(self) -> None: ...
    def revive(self) -> None: ...
    def close(self) -> None: ...


def of_methods() -> dict[str, tuple[str, ...]]:
    """Settings of a run by name: each method, with clients of several ranks where it takes them."""
    found = {}
    for name, kind in REGISTRY.items():
        ranks = () if kind.traits.mixed_ranks else ("clients.ranks=[4]",)
        if kind.__module__.startswith("anyrank.methods."):
            found[name] = (f"method.name={name}", *ranks)
    return found


PRIVATE = ("data.partition.kind=iid", "method.name=ffa_lora", "train.optimizer=sgd", "train.learning_rate=0.05")
KINDS = {
    "stacked by choice": ("method.name=raflora", "run.stacking=always"),
    "never stacked": ("method.name=raflora", "run.stacking=never"),
    "a trained head": ("method.name=fedsa", "model.head=trained", "run.stacking=never"),
    "a batch in parts": ("method.name=rbla", "train.accumulation_steps=2"),
    "private examples": (*PRIVATE, "privacy.level=example", "privacy.epsilon=3", "privacy.delta=1e-5"),
    "correlated noise": (
        *(*PRIVATE, "privacy.level=example", "privacy.epsilon=3", "privacy.delta=1e-5", "privacy.noise=correlated"),
        *("privacy.bands=3", "privacy.accountant=rdp"),
    ),
    "private clients": (*PRIVATE, "privacy.level=client", "privacy.noise_multiplier=0.5", "privacy.delta=1e-4"),
    "noise at the server": (
        *(*PRIVATE, "privacy.level=client", "privacy.noise_at=server", "privacy.epsilon=8", "privacy.delta=0.01"),
    ),
    "late replies": ("method.name=flexlora", "clients.late=0.4", "rounds.late=carry", "run.rounds=3", "run.stacking=never"),
    "drop-outs and rests": ("method.name=rbla", "clients.dropout=0.4", "guard.norm=1.0", "guard.offences=1", "run.rounds=3"),
    "a median": ("method.name=zeropad", "robust.rule=median", "clients.participation=1.0"),
    "Krum": ("method.name=zeropad", "robust.rule=krum", "clients.count=6", "clients.participation=1.0", "run.stacking=never"),
    "pruned ranks": ("method.name=hetlora", "run.rounds=3", "run.stacking=never"),
    "a transformer": ("model.name=digits-transformer", "method.name=raflora"),
}  # fmt: skip


@pytest.mark.parametrize("name", of_methods())
def test_every_method_leaves_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One by one and in a stack; here without processes, with the frames and the worker that they have."""
    monkeypatch.setattr(workers, "Supervised", Direct)
    for stacking in ("never", "auto"):
        (tmp_path / stacking).mkdir()
        assert_same(*both(tmp_path / stacking, [*of_methods()[name], f"run.stacking={stacking}"]))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_run_leaves_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(workers, "Supervised", Direct)
    assert_same(*both(tmp_path, KINDS[name]))


REAL = {**{name: (*words, "run.stacking=never") for name, words in of_methods().items()}, **KINDS}
SAMPLE = ("fedsa", "private examples", "stacked by choice")


@pytest.mark.parametrize("name", REAL if ALL else SAMPLE)
def test_in_processes_too(tmp_path: Path, name: str) -> None:
    assert_same(*both(tmp_path, REAL[name]))


OWN_TASK = """
import anyrank, torch

@anyrank.tasks.register("mine")
def build(wanted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 16, generator=generator)
    y = (x[:, :4].sum(1) > 0).long() + (x[:, 4] > 1).long()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, WIDTH), torch.nn.ReLU(), Watched(), torch.nn.Linear(WIDTH, 3))
    return anyrank.Task(module=net, targets=("0",), train=(x[:180], y[:180]), test=(x[180:], y[180:]))

class Watched(torch.nn.Module):
    def forward(self, x):
        watch(x)
        return x
"""
OWN_METHOD = """
from dataclasses import dataclass
from anyrank.methods import register
from anyrank.methods.rbla import RBLA

@register
@dataclass(frozen=True)
class Mine(RBLA):
    name = "own-rbla"
"""
OWN_METRIC = """
from anyrank.tasks import metrics

@metrics.register("own-share")
def own_share(labels, predictions):
    return float((labels == predictions).mean())
"""


def own_task(folder: Path, watch: str = "pass", width: int = 24) -> tuple[str, ...]:
    """The settings of a run whose task is of a file; `watch`: what its module does, with `x`, in each forward pass."""
    body = "\n".join(f"    {line}" for line in watch.splitlines())
    text = f"import os, signal, time\nWIDTH = {width}\ndef watch(x):\n{body}\n{OWN_TASK}"
    (folder / "mine.py").write_text(text)
    return ('model.name=""', "model.task=mine", f"model.file={folder / 'mine.py'}")


def test_files_of_the_users_are_loaded_in_the_workers(tmp_path: Path) -> None:
    (tmp_path / "method.py").write_text(OWN_METHOD)
    (tmp_path / "metric.py").write_text(OWN_METRIC)
    own = (f"method.file={tmp_path / 'method.py'}", "method.name=own-rbla", "run.stacking=never")
    metric = (f"eval.file={tmp_path / 'metric.py'}", "eval.metrics=['own-share']")
    one, other = both(tmp_path, [*own_task(tmp_path), *own, *metric])
    assert_same(one, other)
    assert "own-share" in json.dumps(one["summary.json"])


@pytest.mark.parametrize("name", ["a decoder", "inside an encoder"])
def test_models_of_transformers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if not ALL:
        monkeypatch.setattr(workers, "Supervised", Direct)
    settings = golden_runs.RUNS[name](tmp_path)
    more = ("train.gradient_checkpointing=true",) if name == "a decoder" else ()
    assert_same(*both(tmp_path, [*settings, *more, "run.stacking=never"], golden_runs.COMMON))


def test_images_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import test_vision

    if not ALL:
        monkeypatch.setattr(workers, "Supervised", Direct)
    test_vision.write_pictures(tmp_path / "zoo")
    test_vision.make_model(tmp_path / "vit", names=test_vision.NAMES)
    source = (
        'model.name=""',
        f"model.path={tmp_path / 'vit'}",
        "model.task=image-classification",
        f"data.source={tmp_path / 'zoo'}",
    )
    assert_same(
        *both(tmp_path, [*source, "data.partition.kind=iid", "clients.count=3", "run.stacking=never", "method.name=rbla"])
    )


@pytest.mark.parametrize("stacking", ["never", "always"])
def test_a_run_goes_on_wherever_its_clients_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacking: str) -> None:
    """Begun in one process, continued in workers with another number and memory of them, ended in one process."""
    monkeypatch.setattr(workers, "Supervised", Direct)
    own = ("method.name=raflora", "run.rounds=3", f"run.stacking={stacking}")
    simulation.execute(chosen(tmp_path, *own), tmp_path / "whole")

    def stop(metrics: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    places = ((), (*WORKERS, "run.worker_memory_gb=64"), ())
    for place in places:
        try:
            simulation.execute(chosen(tmp_path, *own, *place), tmp_path / "moved", resume=True, on_round=stop)
        except KeyboardInterrupt:
            continue
    simulation.execute(chosen(tmp_path, *own), tmp_path / "moved", resume=True)
    assert_same(whole(tmp_path / "whole"), whole(tmp_path / "moved"))
    with pytest.raises(RunError, match=r"was started with train.local_steps = 2, not 3"):
        simulation.execute(chosen(tmp_path, *own, *WORKERS, "train.local_steps=3"), tmp_path / "moved", resume=True)


def test_a_private_run_goes_on_elsewhere_with_its_own_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of a secret is of the configuration: where clients train is no part of it."""
    monkeypatch.setattr(workers, "Supervised", Direct)
    private = KINDS["private examples"]
    simulation.execute(chosen(tmp_path, *private), tmp_path / "whole")

    def stop(metrics: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulation.execute(chosen(tmp_path, *private, *WORKERS), tmp_path / "moved", on_round=stop)
    simulation.execute(chosen(tmp_path, *private), tmp_path / "moved", resume=True)
    assert_same(whole(tmp_path / "whole"), whole(tmp_path / "moved"))


# --- deaths --------------------------------------------------------------------------------------------------------------


class Killed(Supervised):
    """A supervised process that is killed each time the first of `plan` happens."""

    asked = ""
    plan: ClassVar[list[str]] = []
    all: ClassVar[list[Killed]] = []

    def __init__(self, *arguments: Any, **ways: Any) -> None:
        super().__init__(*arguments, **ways)
        self.all.append(self)

    def now(self, what: str) -> None:
        if self.plan[:1] == [what] and self.pid:
            self.plan.pop(0)
            os.kill(self.pid, signal.SIGKILL)
            wait_until(lambda: self.pid is None)

    def start(self, timeout_s: float | None = None) -> None:
        began = self.pid is None
        super().start(timeout_s)
        if began:
            self.now("loaded")

    def _begin(self) -> None:
        super()._begin()
        self.now("begun")

    def _put(self, frame: Frame) -> None:
        self.now(f"before {frame.header.kind}")
        self.asked = frame.header.kind
        super()._put(frame)
        if frame.header.kind != "download":  # the cohort's frames follow each other
            self.now(f"after {frame.header.kind}")

    def _take(self, receive: Callable[..., Frame] = read) -> Frame:
        if self.asked == "download":
            self.now("trains")
        if self.asked == "download" and self.plan[:1] == ["replies"]:
            self._stdout.readinto = self._cut(self._stdout.readinto)
        return super()._take(receive)

    def _cut(self, readinto: Callable) -> Callable:
        """Kill in the middle of a reply, of which a pipe holds a part."""

        def cut(buffer: memoryview) -> int:
            count = readinto(buffer)
            self.now("replies")
            return count

        return cut


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Killed]]:
    monkeypatch.setattr(workers, "Supervised", Killed)
    Killed.plan, Killed.all = [], []
    before = children()  # of other tests in this process: multiprocessing's resource tracker stays until the end
    yield Killed
    assert Killed.plan == [], "it was never that far"
    wait_until(lambda: children() == before, seconds=10)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]


def test_a_death_while_no_client_trains_costs_nothing(tmp_path: Path, killed: type[Killed]) -> None:
    own = ("method.name=raflora", "run.stacking=never", "run.rounds=3", "clients.participation=1.0")
    simulation.execute(chosen(tmp_path, *own), tmp_path / "process")
    killed.plan[:] = ["begun", "after setup", "after start", "after evaluate", "between rounds"]
    if ALL:
        killed.plan[:] = ["begun", "before setup", "after setup", "loaded", "before start", "after start", "before evaluate"]
        killed.plan += ["after evaluate", "between rounds"]

    def between(metrics: Mapping[str, Any]) -> None:
        for each in killed.all:
            each.now("between rounds")

    simulation.execute(chosen(tmp_path, *own, *WORKERS), tmp_path / "workers", on_round=between)
    assert_same(whole(tmp_path / "process"), whole(tmp_path / "workers"))


def test_a_death_while_a_client_trains_costs_its_reply(tmp_path: Path, killed: type[Killed]) -> None:
    """Replies of 260 kB, more than a pipe holds. One death a round, at most one reply a round."""
    plan = ["before cohort", "after cohort", "before download", "trains", "replies"]
    wide = own_task(tmp_path, width=4096)
    own = (
        "method.name=fedavg",
        "clients.ranks=[16]",
        "run.stacking=never",
        "clients.participation=1.0",
        f"run.rounds={len(plan)}",
    )
    killed.plan[:] = plan[:1]

    def next_one(metrics: Mapping[str, Any]) -> None:
        assert killed.plan == []
        killed.plan[:] = plan[metrics["round"] : metrics["round"] + 1]

    simulation.execute(chosen(tmp_path, *wide, *own, *WORKERS), tmp_path / "run", on_round=next_one)
    lost = [row for row in rows(tmp_path / "run") if row["status"] != "ok"]
    assert [row["round"] for row in lost] == [1, 2, 3, 4, 5]
    for row in lost:
        assert row["status"] == "failed"
        assert row["reason"] == (
            "its worker ended: its process was ended by signal 9, from outside or because memory was short"
        )  # fmt: skip


def test_a_death_in_a_stack_costs_only_who_dies_alone(tmp_path: Path, killed: type[Killed]) -> None:
    killed.plan[:] = ["trains", "trains"]  # the stack, and the first client that trains alone after it
    own = ("method.name=raflora", "run.stacking=always", "clients.participation=1.0", "run.rounds=2")
    simulation.execute(chosen(tmp_path, *own, *WORKERS), tmp_path / "run")
    assert [(row["round"], row["status"]) for row in rows(tmp_path / "run")].count((1, "failed")) == 1
    assert [row["status"] for row in rows(tmp_path / "run")].count("ok") == 7


def test_a_client_that_ends_its_process_in_every_round_fails_and_the_run_goes_on(tmp_path: Path) -> None:
    """A fault of the client's own, not of a test's: with one worker, which has to load again each time."""
    ends = "if x.requires_grad and len(x) == 7: os._exit(5)"  # the client with 7 examples
    (tmp_path / "split.py").write_text(
        "import anyrank, numpy as np\n@anyrank.partitions.register('odd')\n"
        "def odd(labels, clients, rng, columns):\n    return np.array([0] * 7 + [1 + i % 3 for i in range(len(labels) - 7)])\n"
    )
    split = f'data.partition={{kind="odd", file="{tmp_path / "split.py"}"}}'
    own = ("method.name=rbla", "run.stacking=never", "clients.participation=1.0", "run.engine=workers", "run.workers=1")
    simulation.execute(chosen(tmp_path, *own_task(tmp_path, ends), split, *own), tmp_path / "run")
    told = [(row["round"], row["client"], row["status"]) for row in rows(tmp_path / "run") if row["status"] != "ok"]
    assert told == [(1, "client-0", "failed"), (2, "client-0", "failed")]
    reasons = {row["reason"] for row in rows(tmp_path / "run") if row["status"] == "failed"}
    assert {reason.split(";")[0] for reason in reasons} == {"its worker ended: its process ended with status 5"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses memory")
def test_memory_above_the_limit_costs_the_client_that_takes_it(tmp_path: Path) -> None:
    takes = f"""if x.requires_grad and len(x) == 16 and not os.path.exists({str(tmp_path / "taken")!r}):
    open({str(tmp_path / "taken")!r}, "w").close()
    torch.zeros(10**9)"""
    own = ("method.name=rbla", "run.stacking=never", "clients.participation=1.0", "run.engine=workers", "run.workers=1")
    simulation.execute(chosen(tmp_path, *own_task(tmp_path, takes), *own, "run.worker_memory_gb=2"), tmp_path / "run")
    lost = [row for row in rows(tmp_path / "run") if row["status"] != "ok"]
    assert [(row["round"], row["reason"]) for row in lost] == [
        (1, "its training ran out of memory; lower train.batch_size or its rank")
    ]


def test_a_client_that_hangs_in_c_is_late_and_its_worker_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python cannot interrupt it. In one process the run would hang for ever."""
    monkeypatch.setattr(workers, "_MORE_S", 3.0)
    hangs = f"""import itertools
if x.requires_grad and len(x) == 16 and not os.path.exists({str(tmp_path / "hung")!r}):
    open({str(tmp_path / "hung")!r}, "w").close()
    any(itertools.repeat(0))"""
    own = ("method.name=rbla", "run.stacking=never", "clients.participation=1.0", "rounds.deadline_s=2")
    simulation.execute(chosen(tmp_path, *own_task(tmp_path, hangs), *own, *WORKERS), tmp_path / "run")
    lost = [row for row in rows(tmp_path / "run") if row["status"] != "ok"]
    assert [(row["round"], row["reason"]) for row in lost] == [(1, "its worker hung, and was ended (rounds.deadline_s)")]


def test_a_request_that_is_wrong_is_the_same_line_as_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "Supervised", Direct)
    wrong = ("method.name=rbla", "clients.ranks=[500]")
    lines = []
    for place in ((), WORKERS):
        with pytest.raises(AnyRankError) as raised:
            simulation.execute(chosen(tmp_path, *wrong, *place), tmp_path / "run")
        lines.append((type(raised.value), str(raised.value)))
        assert not (tmp_path / "run").exists()
    assert lines[0] == lines[1]


def test_what_a_module_raises_while_it_loads_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "Supervised", Direct)
    settings = own_task(tmp_path, "if not x.requires_grad: raise ValueError('never so')")
    with pytest.raises(AnyRankError, match="never so") as raised:
        simulation.execute(chosen(tmp_path, *settings, "method.name=rbla", *WORKERS), tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_a_worker_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = (sys.executable, "-c", "raise SystemExit('no such GPU')")
    monkeypatch.setattr(supervisor.Supervised.__init__, "__defaults__", (None, ends, lambda frame: None, read, None, 0, True))
    others = set(children())
    with pytest.raises(RunFailed) as raised:
        simulation.execute(chosen(tmp_path, "method.name=rbla", *WORKERS), tmp_path / "run")
    assert str(raised.value) == (
        "worker: 3 attempts to start one: its worker ended: its process ended with status 1; its last words: no such GPU"
    )
    wait_until(lambda: not set(children()) - others, seconds=10)


def test_a_task_of_a_program_stays_in_its_process() -> None:
    import torch

    import anyrank

    x, y = torch.randn(40, 4), torch.arange(40) % 2
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    task = anyrank.Task(module=net, targets=("0",), train=(x, y), test=(x, y))
    with pytest.raises(ConfigError, match="this task was handed in by a Python program, and other processes do not have it"):
        anyrank.Federation(task, ranks=[2, 2], rounds=1, run={"engine": "workers"}).run("never")
    assert not Path("never").exists()


# --- how many ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        (3, {"works": 3, "cores": 8, "taken": 1, "available": None}),  # no more than there are works
        (8, {"works": 20, "cores": 8, "taken": 1, "available": None}),  # no more than there are cores
        (1, {"works": 20, "cores": 0, "taken": 1, "available": None}),  # threads need more cores than there are
        (1, {"works": 20, "cores": 8, "taken": 100, "available": 99}),  # no other one fits beside the first
        (2, {"works": 20, "cores": 8, "taken": 100, "available": 199}),
        (3, {"works": 20, "cores": 8, "taken": 100, "available": 200}),
        (8, {"works": 20, "cores": 8, "taken": 0, "available": 200}),  # it is not known what one takes
        (4, {"works": 20, "cores": 2, "taken": 1, "available": 100, "gpus": 4}),  # one for each GPU
        (3, {"works": 3, "cores": 2, "taken": 1, "available": 100, "gpus": 4}),
        (2, {"works": 20, "cores": 2, "taken": 100, "available": 100, "gpus": 4}),
    ],
)
def test_as_many_as_fit(expected: int, given: dict[str, Any]) -> None:
    assert fitting(**given) == expected


def test_each_worker_sees_one_gpu_of_those_that_are_visible() -> None:
    assert visible(None, 0) == ()
    assert visible(None, 3) == ("0", "1", "2")
    assert visible("2,0", 2) == ("2", "0")
    assert visible("GPU-5a, MIG-77", 2) == ("GPU-5a", "MIG-77")
    assert visible("0,-1,1", 1) == ("0",)  # CUDA sees none behind one that is not there
    assert visible("-1", 0) == visible("", 0) == ()
    assert [on_gpu(("GPU-5a", "1"), place) for place in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": name} for name in ("GPU-5a", "1", "GPU-5a")
    ]
    assert on_gpu((), 1) == {}


class Counted(Direct):
    """Counts the workers that a run makes and starts, with what it asks of each."""

    made: ClassVar[list[Counted]] = []
    turn: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, *arguments: Any, **ways: Any) -> None:
        super().__init__(*arguments, **ways)
        self.ways = ways
        self.made.append(self)

    def start(self) -> None:
        with self.turn:
            first = self.made[0]
            if self is first or first.pid is None:
                super().start()
            else:  # one process has one module: the others answer with the first one's
                self._desk, self.pid = first._desk, 1

    def ask(self, frames: Sequence[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        with self.turn:
            found = list(super().ask(frames, replies, timeout_s))
        yield from found


@pytest.mark.parametrize(
    ("most", "started", "settings"),
    [
        (1, 1, ("run.stacking=always",)),  # all clients of a round train in one
        (3, 3, ("run.stacking=never",)),  # a round has 3 clients
        (4, 4, ("run.stacking=never", "run.threads=2", "clients.participation=1.0", "clients.count=5")),  # 8 cores
        (6, 3, ("run.stacking=never", "run.workers=6")),
        (6, 1, ("run.stacking=always", "run.workers=6")),
        (3, 3, ("run.stacking=always", "train.accumulation_steps=2")),  # a batch in parts is never stacked
        (3, 3, ("run.stacking=always", *PRIVATE, "privacy.level=example", "privacy.epsilon=3", "privacy.delta=1e-5")),
    ],
)
def test_workers_are_made_for_the_works_and_started_when_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, started: int, settings: tuple[str, ...]
) -> None:
    monkeypatch.setattr(workers, "Supervised", Counted)
    monkeypatch.setattr(simulation.workers.devices, "cores", lambda: 8)
    monkeypatch.setattr(memory, "peak", lambda: 1 << 28)  # that of this process has all tests before this one in it
    monkeypatch.setattr(Counted, "made", [])
    federation = simulation.build(chosen(tmp_path, "method.name=rbla", "run.engine=workers", *settings))
    assert len(Counted.made) == most
    assert [each.pid for each in Counted.made] == [1] + [None] * (most - 1)
    from anyrank.federation import loop
    from anyrank.federation.asking import dispatch

    jobs, _ = dispatch(federation, loop.start(federation), 1)
    mechanism = noise.Mechanism(federation.privacy, bytes(32)) if federation.privacy else None
    assert len(list(federation.engine.train(jobs, federation.plan(1), mechanism))) == len(jobs)
    assert sum(each.pid is not None for each in Counted.made) <= started
    federation.close()


@pytest.mark.parametrize(("deadline", "limit"), [(0, None), (5, 600.0), (100, 1000.0)])
def test_loading_has_a_limit_where_rounds_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline: float, limit: float | None
) -> None:
    monkeypatch.setattr(workers, "Supervised", Counted)
    monkeypatch.setattr(Counted, "made", [])
    simulation.build(chosen(tmp_path, "method.name=rbla", *WORKERS, f"rounds.deadline_s={deadline}")).close()
    assert [each.ways["load_s"] for each in Counted.made] == [limit, limit]


# --- several at the same time --------------------------------------------------------------------------------------------


class Script:
    """A worker of which each start, and each question, goes as the next one of its list says; then all goes well."""

    def __init__(self, starts: Sequence[str] = (), asks: Sequence[str] = ()) -> None:
        self.starts, self.asks, self.pid, self.begun = list(starts), list(asks), None, 0
        self.stopped = threading.Event()

    def start(self) -> None:
        if self.pid is None:
            self.begun += 1
            self._go(self.starts.pop(0) if self.starts else "well")
            self.pid = 1

    def ask(self, frames: Sequence[Frame], replies: int, timeout_s: float | None = None) -> Iterator[Frame]:
        self.start()
        how = self.asks.pop(0) if self.asks else "well"
        names = [frame.header.client for frame in frames]
        if how == "error":
            yield calls.error_frame(RunFailed("as it was asked"))
            return
        if how == "stranger":
            yield Frame(Header("update", client="nobody"), {})
        if how == "twice":
            yield Frame(Header("update", client=names[0]), {})
        if how == "half":
            yield Frame(Header("update", client=names[0]), {})
            how = "dies"
        self._go(how)
        for name in names:
            yield Frame(Header("update", client=name), {})

    def _go(self, how: str) -> None:
        if how in ("dies", "late", "memory", "bug"):
            self.pid = None
            ends = {
                "dies": Died("so"),
                "late": Late("so"),
                "memory": Died("so", out_of_memory=True),
                "bug": ZeroDivisionError(),
            }
            raise ends[how]
        if how == "slow" and self.stopped.wait(LONGEST_S):
            self.pid = None
            raise Died("it was stopped")

    def end(self) -> None:
        self.pid = None

    def kill(self) -> None:
        self.stopped.set()

    def revive(self) -> None:
        self.stopped.clear()

    def close(self) -> None:
        self.end()


@pytest.fixture
def made() -> Iterator[Callable[..., posts.Posts]]:
    """Makes posts of scripted workers, and sees that their threads end."""
    every, before = [], threading.active_count()

    def make(*scripts: Script) -> posts.Posts:
        every.append(posts.Posts())
        for script in scripts:
            every[-1].add(script)
        return every[-1]

    yield make
    for each in every:
        each.close()
    assert threading.active_count() == before


def asked(*names: str, post: posts.Post | None = None) -> posts.Work:
    return posts.Work(names, lambda: [Frame(Header("download", client=name), {}) for name in names], post)


def outcomes(replies: Iterator[posts.Reply]) -> list[tuple[str, str]]:
    """By client: what came."""
    found = []
    for reply in replies:
        failed = isinstance(reply.found, Failure)
        found.append((reply.found.client, reply.found.code.name) if failed else (reply.found.header.client, "ok"))
    return sorted(found)


def test_a_run_goes_on_while_further_workers_load(made) -> None:
    loads_for_ever = Script(starts=["slow"])
    found = outcomes(made(Script(), loads_for_ever).carry_out([asked(name) for name in "abcd"]))
    assert found == [(name, "ok") for name in "abcd"]
    assert loads_for_ever.begun == 1


def test_no_more_workers_start_than_there_are_works(made) -> None:
    scripts = [Script() for _ in range(5)]
    pool = made(*scripts)
    for _ in range(3):
        assert outcomes(pool.carry_out([asked("a"), asked("b")])) == [("a", "ok"), ("b", "ok")]
    assert sum(script.begun for script in scripts) <= 2


@pytest.mark.parametrize(("how", "code"), [("dies", "CRASHED"), ("late", "LATE"), ("memory", "OUT_OF_MEMORY")])
def test_a_worker_that_cannot_load_costs_nothing_beside_another_and_all_replies_alone(made, how: str, code: str) -> None:
    beside = made(Script(), Script(starts=[how] * 50))
    assert {what for _, what in outcomes(beside.carry_out([asked(name) for name in "abcdefgh"]))} == {"ok"}
    alone = Script(starts=[how] * 4)
    pool = made(alone)
    assert outcomes(pool.carry_out([asked("a"), asked("b")])) == [("a", code), ("b", code)]
    assert alone.begun == 3
    assert outcomes(pool.carry_out([asked("a"), asked("b")])) == [("a", "ok"), ("b", "ok")]  # tried anew: the fifth start


def test_a_site_whose_worker_does_not_load_costs_its_own_reply(made) -> None:
    pool = made(Script(starts=["dies"] * 9), Script(), Script())
    for _ in range(5):
        works = [asked(name, post=post) for name, post in zip("abc", pool.all, strict=True)]
        assert outcomes(pool.carry_out(works)) == [("a", "CRASHED"), ("b", "ok"), ("c", "ok")]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("dies", [("a", "CRASHED"), ("b", "CRASHED"), ("c", "ok")]),
        ("half", [("a", "ok"), ("b", "CRASHED"), ("c", "ok")]),  # the reply that came counts
        ("twice", [("a", "ok"), ("b", "CRASHED"), ("c", "ok")]),
        ("stranger", [("a", "CRASHED"), ("b", "CRASHED"), ("c", "ok")]),
        ("memory", [("a", "OUT_OF_MEMORY"), ("b", "OUT_OF_MEMORY"), ("c", "ok")]),
        ("late", [("a", "LATE"), ("b", "LATE"), ("c", "ok")]),
    ],
)
def test_a_worker_that_fails_costs_what_it_owes(made, how: str, expected: list) -> None:
    pool = made(Script(asks=[how]))
    assert outcomes(pool.carry_out([asked("a", "b"), asked("c")])) == expected


FATE = st.sampled_from(["well", "well", "dies", "late", "memory", "half", "twice", "stranger"])
START = st.sampled_from(["well", "well", "dies", "late"])


@settings(max_examples=150)
@given(st.lists(st.tuples(st.lists(START, max_size=6), st.lists(FATE, max_size=6)), min_size=1, max_size=4), st.integers(1, 9))
def test_whatever_workers_do_each_client_has_one_reply(scripts: list, clients: int) -> None:
    pool = posts.Posts()
    for starts, asks in scripts:
        pool.add(Script(starts, asks))
    for _ in range(3):
        names = [f"client-{i}" for i in range(clients)]
        works = [asked(*names[i : i + 2]) for i in range(0, clients, 2)]
        assert [name for name, _ in outcomes(pool.carry_out(works))] == names
    pool.close()


@pytest.mark.parametrize("place", ["starts", "asks"])
def test_what_is_no_clients_ends_the_run_and_the_others_are_ended(made, place: str) -> None:
    other = Script(asks=["slow"])
    other.pid = 1
    pool = made(Script(**{place: ["bug"]}), other)
    with pytest.raises(ZeroDivisionError):
        list(pool.carry_out([asked("a"), asked("b"), asked("c")]))
    assert other.stopped.is_set()
    assert outcomes(pool.carry_out([asked("a"), asked("b")])) == [("a", "ok"), ("b", "ok")]


def test_an_error_that_a_worker_reports_is_raised(made) -> None:
    with pytest.raises(RunFailed, match="as it was asked"):
        list(made(Script(asks=["error"])).carry_out([asked("a")]))


def test_who_leaves_early_leaves_nobody_busy(made) -> None:
    quick, slow = Script(), Script(asks=["slow"])
    quick.pid = slow.pid = 1
    pool = made(quick, slow)
    replies = pool.carry_out([asked("a"), asked("b")])
    assert next(replies).found.header.client == "a"
    replies.close()
    assert slow.stopped.is_set()
    assert outcomes(pool.carry_out([asked("a"), asked("b")])) == [("a", "ok"), ("b", "ok")]


# --- commands ------------------------------------------------------------------------------------------------------------

SMALL = COMMON.replace("rounds = 2", 'rounds = 40\nengine = "workers"\nworkers = 2\nstacking = "never"')
LONGEST_END_S = 8.0  # from a signal to the end, however busy the machine
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path, cache: Path) -> Iterator[Start]:
    """Starts the command in a folder of its own, and marks whatever it starts."""
    (tmp_path / "small.toml").write_text(SMALL + '[method]\nname = "rbla"\n')
    marks = {"ANYRANK_CACHE": str(cache), "ANYRANK_MARK": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    begun = []

    def call(*arguments: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "anyrank", *arguments]
        begun.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ | marks, start_new_session=True, **pipes))
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.communicate()
    for each in marked(str(tmp_path)):
        os.kill(each, signal.SIGKILL)


def logged(folder: Path) -> int:
    """How many rounds a run has logged."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_command_that_is_killed_and_continued_leaves_the_same_bytes(start: Start, tmp_path: Path) -> None:
    """Killed as it starts, and at rounds that are drawn; nobody is left, and the run in one process has the same bytes."""
    simulation.execute(
        chosen(tmp_path, common=(tmp_path / "small.toml").read_text().replace('"workers"', '"process"')), tmp_path / "whole"
    )
    chance, rounds = random.Random(int(os.environ.get("ANYRANK_KILLS_SEED", 0))), [0]
    rounds += sorted(chance.sample(range(1, 39), 8 if ALL else 1))
    for rounds_done in rounds:
        process = start("run", "small.toml", "--out", "run", "--resume", "--json")
        wait_until(lambda: logged(tmp_path / "run") >= rounds_done and len(marked(str(tmp_path))) > 1)  # noqa: B023
        process.kill()
        process.wait()
        wait_until(lambda: not marked(str(tmp_path)), seconds=20)
    process = start("run", "small.toml", "--out", "run", "--resume", "--json")
    assert process.communicate(timeout=LONGEST_S * 2)[1] == ""
    assert process.returncode == 0
    assert_same(whole(tmp_path / "whole"), whole(tmp_path / "run"))
    assert not marked(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["its worker starts", "a round"])
def test_a_signal_ends_the_command_and_its_workers_with_one_line(start: Start, tmp_path: Path, number: int, when: str) -> None:
    process = start("run", "small.toml", "--set", "run.rounds=100000", "--out", "run", "--json")
    far = {"its worker starts": lambda: len(marked(str(tmp_path))) > 1, "a round": lambda: logged(tmp_path / "run") > 0}[when]
    wait_until(far)
    began = time.monotonic()
    os.killpg(process.pid, number)  # as a terminal does
    _, err = process.communicate(timeout=LONGEST_S)
    assert time.monotonic() - began < LONGEST_END_S
    assert process.returncode == 128 + number
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert err == f"anyrank: stopped by {name}; go on with the same command and --resume\n"
    wait_until(lambda: not marked(str(tmp_path)), seconds=5)


def test_comparisons_side_by_side_in_workers(start: Start, tmp_path: Path) -> None:
    """Two runs at the same time, each with its own workers; stopped by Ctrl-C, then continued."""
    words = ("compare", "small.toml", "--methods", "rbla,raflora", "--jobs", "2", "--out", "out", "--json")
    stopped = start(*words, "--set", "run.rounds=12")
    wait_until(lambda: any(logged(tmp_path / "out" / name / "seed-0") for name in ("rbla", "raflora")), seconds=2 * LONGEST_S)
    os.killpg(stopped.pid, signal.SIGINT)
    _, err = stopped.communicate(timeout=LONGEST_S)
    assert (stopped.returncode, err) == (130, "anyrank: stopped by Ctrl-C; go on with the same command and --resume\n")
    wait_until(lambda: not marked(str(tmp_path)), seconds=10)
    again = start(*words, "--set", "run.rounds=12", "--resume")
    out, err = again.communicate(timeout=2 * LONGEST_S)
    assert (again.returncode, err) == (0, "")
    assert [row["label"] for row in json.loads(out)["rows"]] == ["rbla", "raflora"]
    wait_until(lambda: not marked(str(tmp_path)), seconds=10)


@pytest.mark.parametrize("words", [("plan", "small.toml"), ("audit", "private.toml", "--canaries", "20")])
def test_what_is_measured_is_measured_in_this_process(start: Start, tmp_path: Path, words: tuple[str, ...]) -> None:
    private = "\n".join(("[data.partition]", 'kind = "iid"', "[method]", 'name = "ffa_lora"', "[privacy]", 'level = "example"'))
    text = SMALL.replace("rounds = 40", "rounds = 2") + private + "\nepsilon = 3.0\ndelta = 1e-5\n"
    (tmp_path / "private.toml").write_text(text.replace("[train]", '[train]\noptimizer = "sgd"'))
    process = start(*words, "--json")
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(is_worker, marked(str(tmp_path)))))
        time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)
    assert most == 0


def is_worker(pid: int) -> bool:
    """Whether a process is a worker; what a library starts for a moment, to ask for the processor, is none."""
    try:
        return b"anyrank.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_progress_is_that_of_the_first_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of later ones, which load while clients train, nothing is shown."""
    monkeypatch.setattr(workers, "Supervised", Direct)
    seen: list[tuple[int, int]] = []
    engine = workers.Workers({}, 1, lambda done, total: seen.append((done, total)))
    engine._reported(calls.progress_frame(3, 8))
    made = simulation.build(chosen(tmp_path, "method.name=rbla", *WORKERS))
    engine._opened(calls.ready_frame(made.engine.ready))
    engine._reported(calls.progress_frame(4, 8))
    assert seen == [(3, 8)]
    made.close()


def test_a_worker_that_has_loaded_another_task_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data file was changed meanwhile. How much memory it took is its own affair."""
    monkeypatch.setattr(workers, "Supervised", Direct)
    made = simulation.build(chosen(tmp_path, "method.name=rbla", *WORKERS))
    ready = made.engine.ready
    made.engine._opened(calls.ready_frame(dataclasses.replace(ready, memory=ready.memory + 1)))
    sizes = ready.roster.sizes.copy()
    sizes[0] += 1
    other = dataclasses.replace(ready, roster=dataclasses.replace(ready.roster, sizes=sizes, by_label=None))
    with pytest.raises(RunFailed, match="expected the same task in all of them"):
        made.engine._opened(calls.ready_frame(other))
    made.close()


def test_workers_that_are_closed_are_asked_nothing(made) -> None:
    pool = made(Script())
    pool.close()
    pool.close()
    with pytest.raises(RunFailed, match="they have been closed"):
        list(pool.carry_out([asked("a")]))
