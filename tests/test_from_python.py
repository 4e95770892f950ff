"""A federation from Python: a module, data, loss, partition and method of one's own, in a run folder like any other."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import anyrank
from anyrank import AnyRankError, Examples, Federation, Task
from anyrank.methods import Holds, Method, Traits
from anyrank.methods.base import average_layer, slice_weights

COUNT, HELD_OUT = 90, 30


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT + HELD_OUT, 6, generator=draw)
    return x, (x @ torch.randn(6, 3, generator=draw)).argmax(dim=1)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def task(module: nn.Module | None = None, targets=("0", "2"), **fields) -> Task:
    x, y = rows()
    parts = {"train": Examples(x[:COUNT], y[:COUNT]), "test": Examples(x[COUNT:], y[COUNT:])}
    return Task(module=module or net(), targets=targets, **{**parts, **fields})


SHARDS = {"north": np.arange(50), "south": np.arange(50, COUNT)}
RANKS = {"north": 3, "south": 2}


def federation(made: Task | None = None, **keywords) -> Federation:
    chosen = {"ranks": RANKS, "shards": SHARDS, "rounds": 2, "train": {"local_steps": 2, "learning_rate": 0.02}}
    return Federation(made or task(), **(chosen | keywords))


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("adapter*/adapter_model.safetensors")))


# --- what a run is and leaves -----------------------------------------------------------------------------------------


def test_a_module_of_ones_own_learns_and_is_given_back_as_it_was(tmp_path: Path) -> None:
    module = net().train()
    module[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = federation(task(module), rounds=10, train={"local_steps": 10, "learning_rate": 0.02}).run(tmp_path / "run")
    assert result.summary["accuracy"] > result.summary["start_accuracy"] + 0.1
    assert [row["round"] for row in result.metrics] == list(range(1, 11))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    assert not module[0].weight.requires_grad
    assert module[2].weight.requires_grad
    assert "forward" not in vars(module[0])


def test_the_folder_has_every_file_and_the_adapter_is_that_of_the_result(tmp_path: Path) -> None:
    result = federation().run(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.toml", "metrics.jsonl", "clients.jsonl", "checkpoint", "adapter", "summary.json"} <= names
    assert {"adapter-rank-2", "adapter-rank-3"} <= names
    stored = anyrank.Adapter.load(tmp_path / "run" / "adapter")
    assert all(torch.equal(stored.layers[name].B, layer.B) for name, layer in result.adapter.layers.items())
    share = anyrank.Adapter.load(tmp_path / "run" / "adapter-rank-2")
    assert all(torch.equal(share.layers[name].A, layer.A) for name, layer in result.share(2).layers.items())
    assert set(result.share(1).ranks.values()) == {1}
    clients = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert [(row["client"], row["rank"], row["num_examples"]) for row in clients[:2]] == [("north", 3, 50), ("south", 2, 40)]


def test_the_adapter_gives_the_accuracy_by_plain_matrices(tmp_path: Path) -> None:
    """W + s B A by hand, on the held-out rows."""
    x, y = rows()
    module = net()
    result = federation(task(module)).run(tmp_path / "run")
    with torch.no_grad():
        for name, layer in result.adapter.layers.items():
            module.get_submodule(name).weight += layer.delta()
        accuracy = float((module(x[COUNT:]).argmax(dim=1) == y[COUNT:]).float().mean())
    assert result.summary["accuracy"] == pytest.approx(accuracy)


def test_the_same_federation_gives_the_same_bytes_and_a_stopped_one_too(tmp_path: Path) -> None:
    federation(rounds=4).run(tmp_path / "a")
    federation(rounds=4).run(tmp_path / "b")

    def stop(metrics) -> None:
        if metrics["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation(rounds=4).run(tmp_path / "c", on_round=stop)
    federation(rounds=4).run(tmp_path / "c", resume=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")


OTHERS = {
    "module": lambda: federation(task(net(seed=1)), rounds=3),
    "train": lambda: federation(task(train=Examples(rows()[0][:COUNT] + 1e-3, rows()[1][:COUNT])), rounds=3),
    "test": lambda: federation(task(test=Examples(rows()[0][COUNT:-1], rows()[1][COUNT:-1])), rounds=3),
    "loss": lambda: federation(task(loss=nn.CrossEntropyLoss(reduction="none")), rounds=3),
    "targets": lambda: federation(task(targets=("0",)), rounds=3),
    "shards": lambda: federation(shards={"north": np.arange(40), "south": np.arange(40, COUNT)}, rounds=3),
    "clients.ranks": lambda: federation(ranks={"north": 1, "south": 2}, rounds=3),
    "clients.names": lambda: federation(ranks=[3, 2], shards=list(SHARDS.values()), rounds=3),
    "train.learning_rate": lambda: federation(train={"local_steps": 2, "learning_rate": 0.03}, rounds=3),
}


@pytest.mark.parametrize("what", OTHERS)
def test_resume_with_something_else_is_refused_by_name(what: str, tmp_path: Path) -> None:
    def stop(metrics) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation(rounds=3).run(tmp_path / "run", on_round=stop)
    with pytest.raises(AnyRankError, match=what) as error:
        OTHERS[what]().run(tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)
    federation(rounds=3).run(tmp_path / "run", resume=True)


def test_the_command_says_that_the_task_was_handed_in(tmp_path: Path) -> None:
    federation().run(tmp_path / "run")
    with pytest.raises(AnyRankError, match="passed from a Python program"):
        anyrank.load(tmp_path / "run" / "config.toml").run(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_configuration_from_a_file_runs_as_the_command_runs_it(tmp_path: Path, monkeypatch, cache: Path) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    (tmp_path / "c.toml").write_text('[run]\nrounds = 2\n[model]\nname = "digits-mlp"\n[train]\nlocal_steps = 2\n')
    loaded = anyrank.load(tmp_path / "c.toml", ["run.seed=3"])
    from anyrank import config, simulation

    simulation.execute(config.load(tmp_path / "c.toml", ["run.seed=3"]), tmp_path / "command")
    loaded.run(tmp_path / "python")
    assert weights(tmp_path / "python") == weights(tmp_path / "command")


# --- data and modules as people have them ------------------------------------------------------------------------------


class Pairs:
    """A data set of pairs, without torch."""

    def __init__(self, x, y) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        return self.x[i], int(self.y[i])


class Named(Pairs):
    """The same with names, as data sets of transformers have it."""

    def __getitem__(self, i: int):
        return {"input": self.x[i], "labels": self.y[i]}


@pytest.mark.parametrize("kind", ["arrays", "lists", "mapping", "pairs", "names", "torch data set", "tuple"])
def test_examples_of_every_kind_give_the_same_run(kind: str, tmp_path: Path) -> None:
    x, y = rows()
    part = {
        "arrays": lambda a, b: Examples(a.numpy(), b.numpy()),
        "lists": lambda a, b: Examples(a.numpy().astype(np.float64), b.tolist()),
        "mapping": lambda a, b: Examples({"input": a}, b),
        "pairs": lambda a, b: Examples(Pairs(a, b)),
        "names": lambda a, b: Examples(Named(a, b)),
        "torch data set": lambda a, b: Examples(torch.utils.data.TensorDataset(a, b)),
        "tuple": lambda a, b: (a, b),
    }[kind]
    federation(task(train=part(x[:COUNT], y[:COUNT]), test=part(x[COUNT:], y[COUNT:]))).run(tmp_path / "a")
    federation().run(tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


class Shy(nn.Module):
    """Examples meet in it: each row is taken less the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x - x.mean(dim=0))


class TimeFirst(nn.Module):
    """Its batch is the second dimension half of the way, as in torch's own transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        steps = torch.stack([x, x.flip(1), 2 * x])  # [time, batch, width]
        return self.head(self.layer(steps).mean(dim=0))


@pytest.mark.parametrize(("module", "targets"), [(Shy, ("fc",)), (TimeFirst, ("layer.linear1", "layer.linear2"))])
def test_clients_are_not_mixed_where_a_module_would_mix_them(module, targets, tmp_path: Path) -> None:
    """Side by side would change what each client gets: it must be what it gets alone."""
    torch.manual_seed(0)
    own = module()
    keywords = {"ranks": {"north": 2, "south": 1}, "train": {"local_steps": 3, "learning_rate": 0.02, "batch_size": 8}}
    federation(task(own, targets), **keywords).run(tmp_path / "auto")
    federation(task(own, targets), **keywords, run={"stacking": "never"}).run(tmp_path / "never")
    assert weights(tmp_path / "auto") == weights(tmp_path / "never")


def test_torchs_fast_path_does_not_pass_lora_by(tmp_path: Path) -> None:
    """In evaluation mode torch's transformer layer reads weights without calling its modules: scores would ignore LoRA."""
    torch.manual_seed(0)
    own = TimeFirst()
    result = federation(
        task(own, ("layer.linear1", "layer.linear2")),
        ranks={"north": 2, "south": 2}, rounds=4, train={"local_steps": 10, "learning_rate": 0.05},
    ).run(tmp_path / "run")  # fmt: skip
    assert result.summary["loss"] < result.summary["start_loss"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_loss_of_ones_own_and_numbers_as_labels(tmp_path: Path) -> None:
    """A regression: nothing is right or wrong, the loss falls, and every table and report copes."""
    x, _ = rows()
    y = (x[:, :2] @ torch.tensor([1.0, -2.0])).numpy()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    made = task(
        module,
        train=Examples(x[:COUNT], y[:COUNT]),
        test=Examples(x[COUNT:], y[COUNT:]),
        loss=lambda outputs, labels: (outputs[:, 0] - labels).abs(),
    )
    keywords = {"rounds": 6, "ranks": {"north": 1, "south": 1}, "train": {"local_steps": 20, "learning_rate": 0.02}}
    result = federation(made, **keywords).run(tmp_path / "run")
    assert result.summary["accuracy"] is None
    assert result.summary["loss"] < result.summary["start_loss"]
    with torch.no_grad():
        for name, layer in result.adapter.layers.items():
            module.get_submodule(name).weight += layer.delta()
        loss = float((module(x[COUNT:])[:, 0] - torch.from_numpy(y[COUNT:])).abs().double().mean())
    assert result.summary["loss"] == pytest.approx(loss, rel=1e-5)
    from anyrank import report

    assert report.build([tmp_path / "run"], tmp_path / "run" / "report.html").is_file()


@dataclass(frozen=True)
class EqualVoices(Method):
    """Every client counts the same, whatever it has."""

    name = "equal-voices-from-python"
    summary = "mean of A, mean of B, clients alike"
    paper = "a test"
    traits = Traits(True, Holds.NEVER, Holds.NEVER, Holds.NEVER, Holds.ALWAYS)

    def merge_layer(self, state, name, parts):
        alike = [part._replace(num_examples=1) for part in parts]
        return average_layer(state, name, alike, slice_weights(alike, state.adapter.layers[name].rank))


@dataclass(frozen=True)
class Louder(EqualVoices):
    name = "equal-voices-from-python"
    gain: float = 2.0


def test_a_method_of_ones_own_is_handed_in_without_a_registry(tmp_path: Path) -> None:
    result = federation(method=EqualVoices(), rounds=3).run(tmp_path / "run")
    assert result.summary["method"] == "equal-voices-from-python"
    federation(method=EqualVoices, rounds=3).run(tmp_path / "same")
    assert weights(tmp_path / "run") == weights(tmp_path / "same")
    with pytest.raises(AnyRankError, match=r"another method|method\.gain"):
        federation(method=Louder(), rounds=3).run(tmp_path / "run", resume=True)


def test_a_partition_of_ones_own(tmp_path: Path) -> None:
    def halves(labels, clients, rng, columns):
        return (np.arange(len(labels)) >= 50).astype(int)

    federation(shards=halves).run(tmp_path / "a")
    federation().run(tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_two_federations_in_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    """One runs inside the other's rounds, and two run at once in threads: each leaves what it leaves alone."""
    alone = {name: federation(task(net(seed))) for name, seed in (("a", 1), ("b", 2))}
    for name, one in alone.items():
        one.run(tmp_path / "alone" / name)
    inner = federation(task(net(2)))
    federation(task(net(1))).run(tmp_path / "outer", on_round=lambda row: row["round"] == 1 and inner.run(tmp_path / "inner"))
    assert weights(tmp_path / "outer") == weights(tmp_path / "alone" / "a")
    assert weights(tmp_path / "inner") == weights(tmp_path / "alone" / "b")
    threads = [threading.Thread(target=federation(task(net(seed))).run, args=(tmp_path / f"t{seed}",)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert weights(tmp_path / "t1") == weights(tmp_path / "alone" / "a")
    assert weights(tmp_path / "t2") == weights(tmp_path / "alone" / "b")


def test_one_module_in_two_federations_at_once_is_refused(tmp_path: Path) -> None:
    module, says = net(), []

    def another(row) -> None:
        try:
            federation(task(module)).run(tmp_path / "inner")
        except AnyRankError as error:
            says.append(str(error))

    federation(task(module)).run(tmp_path / "outer", on_round=another)
    assert "copy.deepcopy" in says[0]
    federation(task(module)).run(tmp_path / "after")
    assert weights(tmp_path / "after") == weights(tmp_path / "outer")


# --- wrong requests: one line each, and nothing written ------------------------------------------------------------------


class Aside(nn.Module):
    """It has a linear layer that its forward pass leaves out, and one whose weights it reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.left, self.read = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.used(x) + nn.functional.linear(x, self.read.weight)


x, y = rows()
WRONG = {
    "no such target": (lambda: task(targets=("encoder.9",)), "no module 'encoder.9'"),
    "no targets": (lambda: task(targets=()), "expected names of modules"),
    "a target that is no layer": (lambda: federation(task(targets=("1",))), "expected a Linear, Conv1D"),
    "a target that is left out": (
        lambda: federation(task(Aside(), ("left",)), ranks={"north": 2, "south": 2}),
        "never calls it",
    ),
    "a target that is read": (lambda: federation(task(Aside(), ("read",)), ranks={"north": 2, "south": 2}), "never calls it"),
    "no module": (lambda: task("a module"), "expected a torch.nn.Module"),
    "no parameter": (lambda: task(trained=("2.weigth",)), "did you mean '2.weight'"),
    "labels of another number": (lambda: Examples(x, y[:-1]), "as many labels as inputs"),
    "no examples": (lambda: Examples(x[:0], y[:0]), "at least one"),
    "names as labels": (lambda: Examples(x, ["cat"] * len(x)), "labels: expected numbers"),
    "labels of NaN": (lambda: Examples(x, [float("nan")] * len(x)), "NaN"),
    "inputs of NaN": (lambda: Examples(x * float("nan"), y), "NaN"),
    "inputs of two lengths": (lambda: Examples({"a": x, "b": x[:3]}, y), "all of one length"),
    "an argument that is not there": (lambda: task(train=Examples({"pixels": x}, y)), "takes input"),
    "inputs of another width": (lambda: federation(task(train=Examples(x[:COUNT, :4], y[:COUNT]))), "raised RuntimeError"),
    "a number as data": (lambda: Examples(3, y), "inputs: expected a tensor"),
    "a loss of one number": (lambda: federation(task(loss=nn.CrossEntropyLoss())), "reduction='none'"),
    "a loss of none": (lambda: federation(task(loss=lambda outputs, labels: None)), "one value per example"),
    "a loss without a gradient": (
        lambda: federation(task(loss=lambda o, t: t.float())),
        "does not depend on the trained parameters",
    ),
    "a loss of NaN": (lambda: federation(task(loss=lambda o, t: o.sum(1) * float("nan"))), "finite numbers"),
    "an empty shard": (lambda: federation(shards={"north": np.arange(5), "south": []}), "south has no examples"),
    "shards that overlap": (lambda: federation(shards={"north": [1, 2, 3], "south": [3, 4]}), "example 3 is given to north"),
    "an example twice": (lambda: federation(shards={"north": [1, 1], "south": [3]}), "example 1 twice"),
    "an example past the end": (lambda: federation(shards={"north": [1], "south": [COUNT]}), f"got {COUNT}"),
    "an example before the start": (lambda: federation(shards={"north": [1], "south": [-1]}), "got -1"),
    "rows that are no numbers": (lambda: federation(shards={"north": [0.5], "south": [1]}), "expected whole numbers"),
    "shards of others": (lambda: federation(shards={"north": [1], "east": [2]}), "name the same clients in both"),
    "a rank of nothing": (lambda: federation(ranks={"north": 0, "south": 1}), "at least 1, got 0"),
    "half a rank": (lambda: federation(ranks={"north": 1.5, "south": 1}), "got 1.5"),
    "a rank above the layer": (lambda: federation(ranks={"north": 7, "south": 1}), "rank 7: expected at most 6"),
    "no clients": (lambda: federation(ranks={}, shards={}), "at least one client"),
    "an unknown method": (lambda: federation(method="raflorra"), "did you mean 'raflora'"),
    "a method that is none": (lambda: federation(method=3), "expected a name or an anyrank.methods.Method"),
    "a method of one rank": (lambda: federation(method="fedavg"), "needs clients of one rank"),
    "an unknown keyword": (lambda: federation(learning_rate=0.1), "train={'learning_rate'"),
    "an unknown key": (lambda: federation(train={"lr": 0.1}), "train.lr: unknown key"),
    "no rounds": (lambda: federation(rounds=0), "run.rounds"),
    "owners of another number": (lambda: federation(shards=lambda labels, *_: labels[:3]), "the client of each of 90"),
    "an owner that is none": (lambda: federation(shards=lambda labels, *_: labels), "expected clients 0 to 1"),
    "a partition that raises": (lambda: federation(shards=lambda labels, *_: 1 / 0), "raised ZeroDivisionError"),
    "no task": (lambda: Federation(ranks=RANKS), "expected a task"),
    "a module for a task": (lambda: Federation(net(), ranks=RANKS), "expected an anyrank.Task"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_one_line_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    make, says = WRONG[what]

    def ask() -> None:
        made = make()
        if isinstance(made, Federation):
            made.run(tmp_path / "run")

    with pytest.raises(AnyRankError) as error:
        ask()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, COUNT - 1), max_size=8), min_size=1, max_size=4))
def test_shards_are_taken_or_refused_whatever_they_are(lists: list[list[int]]) -> None:
    """Accepted just where no client is empty and no example is given twice."""
    flat = [row for each in lists for row in each]
    right = all(lists) and len(flat) == len(set(flat))
    try:
        federation(ranks=[1] * len(lists), shards=lists)
        taken = True
    except AnyRankError:
        taken = False
    assert taken == right


# --- files of one's own in a configuration --------------------------------------------------------------------------------

TASK_FILE = """
import anyrank, numpy as np, torch

@anyrank.tasks.register("blobs")
def blobs(wanted):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4)).astype("float32")
    y = (x[:, 0] > 0).astype(int)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    return anyrank.Task(module=net, targets=wanted.lora.target_modules or ("0",), train=(x[:60], y[:60]), test=(x[60:], y[60:]))
"""
PARTITION_FILE = """
import anyrank

@anyrank.partitions.register("stripes")
def stripes(labels, clients, rng, columns):
    return rng.permutation(len(labels)) % clients
"""
OWN = """
[run]
rounds = 2
[model]
file = "blobs.py"
task = "blobs"
[data.partition]
file = "stripes.py"
kind = "stripes"
[clients]
count = 3
participation = 1.0
ranks = [1, 2]
[train]
local_steps = 2
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "blobs.py").write_text(TASK_FILE)
    (tmp_path / "stripes.py").write_text(PARTITION_FILE)
    (tmp_path / "own.toml").write_text(OWN)
    return tmp_path


def test_a_task_and_a_partition_by_their_files(own: Path) -> None:
    result = anyrank.load(own / "own.toml").run(own / "run")
    assert result.summary["clients"] == 3
    assert {row["num_examples"] for row in map(json.loads, (own / "run" / "clients.jsonl").read_text().splitlines())} == {20}
    again = anyrank.load(own / "run" / "config.toml").run(own / "again")
    assert weights(own / "again") == weights(own / "run")
    assert again.summary["accuracy"] == result.summary["accuracy"]


FILES = {
    "no such file": ("model.file=absent.py", None, "no such file"),
    "no task in it": ("model.file=empty.py", "x = 1\n", "registers no task"),
    "another task in it": ("model.task=blob", None, "registers no task 'blob'; did you mean 'blobs'"),
    "it raises": ("model.file=raises.py", "import anyrank\n\n1 / 0\n", "line 3: ZeroDivisionError"),
    "no Python": ("model.file=broken.py", "def (:\n", "line 1: SyntaxError"),
    "a task that raises": ("model.file=late.py", TASK_FILE.replace("rng =", "rng = 1 / 0 #"), "raised ZeroDivision"),
    "no task made": (
        "model.file=none.py",
        TASK_FILE.replace("return ", "return None #"),
        "expected an anyrank.Task, got NoneType",
    ),
    "no partition in it": ("data.partition.file=nothing.py", "x = 1\n", "registers no partition"),
    "a built-in name": ("model.file=taken.py", TASK_FILE.replace('"blobs"', '"causal-lm"'), "is a built-in task"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_wrong_file_is_one_line_that_names_it(what: str, own: Path) -> None:
    setting, text, says = FILES[what]
    if text is not None:
        (own / setting.partition("=")[2]).write_text(text)
    key, _, value = setting.partition("=")
    chosen = f"{key}={own / value}" if key.endswith("file") else setting
    with pytest.raises(AnyRankError) as error:
        anyrank.load(own / "own.toml", [chosen]).run(own / "run")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (own / "run").exists()


def test_files_of_one_name_in_two_folders_do_not_meet(own: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "blobs.py").write_text(TASK_FILE.replace("default_rng(0)", "default_rng(1)"))
    (other / "stripes.py").write_text(PARTITION_FILE)
    (other / "own.toml").write_text(OWN)
    first, second = (anyrank.load(folder / "own.toml") for folder in (own, other))
    second.run(other / "run")
    first.run(own / "run")
    anyrank.load(own / "own.toml").run(own / "again")
    assert weights(own / "run") == weights(own / "again") != weights(other / "run")
