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


# --- number types ----------------------------------------------------------------------------------------------------


class Doubles(Pairs):
    """Rows of float64, as NumPy has them."""

    def __getitem__(self, i: int):
        return self.x[i].double().numpy(), int(self.y[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_data_fits_the_module_whatever_holds_it(dtype: torch.dtype, tmp_path: Path) -> None:
    x, y = rows()
    array = Examples(x[:COUNT].double().numpy(), y[:COUNT]), Examples(x[COUNT:].double().numpy(), y[COUNT:])
    items = Examples(Doubles(x[:COUNT], y[:COUNT])), Examples(Doubles(x[COUNT:], y[COUNT:]))
    for name, (train, test) in {"array": array, "items": items}.items():
        result = federation(task(net().to(dtype), train=train, test=test)).run(tmp_path / name)
        assert {layer.A.dtype for layer in result.adapter.layers.values()} == {dtype}
    assert weights(tmp_path / "array") == weights(tmp_path / "items")


def test_who_takes_part(tmp_path: Path) -> None:
    """All clients that are named, unless a share of them is asked for."""
    everyone = federation().run(tmp_path / "all")
    assert [row["clients"] for row in everyone.metrics] == [2, 2]
    half = federation(clients={"participation": 0.5}).run(tmp_path / "half")
    assert [row["clients"] for row in half.metrics] == [1, 1]
    by_config = federation(config=anyrank.Config()).run(tmp_path / "config")
    assert [row["clients"] for row in by_config.metrics] == [2, 2]


# --- what an adversary found: silent wrongs, by kind -----------------------------------------------------------------------


class Tied(nn.Module):
    """A trained weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h, self.o = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.g = nn.Linear(6, 6, bias=False)
        self.g.weight = self.h.weight

    def forward(self, x):
        return self.o(torch.tanh(self.h(torch.tanh(self.a(x)))) + self.g(x))


class Cosine(nn.Linear):
    """A head that normalises before it multiplies."""

    def forward(self, input):
        return nn.functional.linear(nn.functional.normalize(input), nn.functional.normalize(self.weight), self.bias)


class WithCosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 3), Cosine(6, 3)

    def forward(self, x):
        return self.a(x) + self.h(x)


class Read(nn.Module):
    """A trained weight that the forward pass reads beside calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x) + nn.functional.linear(x, self.h.weight) + self.h(x)


TRICKY = {
    "tied": (Tied, ("h.weight",)),
    "a head of one's own": (WithCosine, ("h.weight", "h.bias")),
    "a weight that is read": (Read, ("h.weight", "h.bias")),
}


@pytest.mark.parametrize("kind", TRICKY)
def test_trained_parameters_are_trained_as_alone_whatever_uses_them(kind: str, tmp_path: Path) -> None:
    made, trained = TRICKY[kind]
    found = {}
    for stacking in ("auto", "never"):
        torch.manual_seed(0)
        one = federation(task(made(), ("a",), trained=trained), ranks={"north": 2, "south": 1}, run={"stacking": stacking})
        found[stacking] = one.run(tmp_path / stacking).summary["loss"]
    assert found["auto"] == pytest.approx(found["never"], rel=1e-5)


class Standardised(nn.Conv2d):
    """A convolution whose kernel is standardised in its forward pass."""

    def forward(self, input):
        kernel = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(input, kernel, self.bias)


def test_a_convolution_with_a_forward_of_its_own_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Standardised(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    pictures, y = torch.randn(COUNT + HELD_OUT, 1, 8, 8), rows()[1]
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(module(pictures[COUNT:]), y[COUNT:]))
    made = task(module, ("0",), train=(pictures[:COUNT], y[:COUNT]), test=(pictures[COUNT:], y[COUNT:]))
    result = federation(made, ranks={"north": 1, "south": 1}).run(tmp_path / "run")
    assert result.summary["start_loss"] == pytest.approx(loss, rel=1e-5)


def test_parts_that_two_modules_share_are_in_use_too(tmp_path: Path) -> None:
    shared = nn.Linear(6, 16)
    one, other = (nn.Sequential(shared, act, nn.Linear(16, 3)) for act in (nn.ReLU(), nn.Tanh()))
    says = []

    def inner(row) -> None:
        with pytest.raises(AnyRankError, match="a part of it"):
            federation(task(other)).run(tmp_path / "inner")
        says.append(row)

    federation(task(one)).run(tmp_path / "outer", on_round=inner)
    assert says
    federation(task(other)).run(tmp_path / "inner")


def test_a_copy_made_while_a_module_is_open_works_afterwards(tmp_path: Path) -> None:
    import copy

    module, copies = net(), []
    federation(task(module)).run(tmp_path / "a", on_round=lambda row: copies.append(copy.deepcopy(module)))
    federation(task(copies[0])).run(tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_buffers_and_gradients_are_given_back(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.words = nn.Linear(6, 3), nn.Embedding(4, 6, max_norm=0.1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.fc(x + self.words(torch.zeros(len(x), dtype=torch.long)))

    module = Counting()
    module.fc.weight.grad = torch.ones(3, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    federation(task(module, ("fc",)), ranks={"north": 2, "south": 1}).run(tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module.fc.weight.grad, torch.ones(3, 6))


def test_a_module_that_draws_gives_the_same_bytes_and_so_does_a_resumed_run(tmp_path: Path) -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(nn.functional.dropout(x, 0.5, training=torch.is_grad_enabled()))

    made = lambda: federation(task(Drawing(), ("fc",)), rounds=4)  # noqa: E731
    made().run(tmp_path / "a")

    def stop(row) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made().run(tmp_path / "b", on_round=stop)
    torch.manual_seed(77)
    made().run(tmp_path / "b", resume=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_labels_of_one_column_are_labels(tmp_path: Path) -> None:
    x, y = rows()
    for name, labels in {"column": y[:, None], "row": y}.items():
        made = task(train=Examples(x[:COUNT], labels[:COUNT]), test=Examples(x[COUNT:], labels[COUNT:]))
        federation(made).run(tmp_path / name)
    assert weights(tmp_path / "column") == weights(tmp_path / "row")


def test_the_order_of_names_does_not_matter(tmp_path: Path) -> None:
    backwards = {"ranks": dict(reversed(RANKS.items())), "shards": dict(reversed(SHARDS.items()))}
    federation(**backwards).run(tmp_path / "a")
    federation().run(tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    federation().run(tmp_path / "a", resume=True)


def test_a_request_that_fails_before_round_1_can_be_mended_and_made_again(tmp_path: Path) -> None:
    def wrong(labels, predictions):
        raise ValueError("not yet")

    with pytest.raises(AnyRankError, match="not yet"):
        federation(task(metrics={"mine": wrong})).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    federation(task(metrics={"mine": lambda labels, predictions: 0.5})).run(tmp_path / "run")


DIGESTS = """
import functools, torch
from torch import nn
from anyrank.tasks import digest
from anyrank.tasks.base import Examples, Task

class Data:
    def __len__(self): return 6
    def __getitem__(self, i): return torch.full((3,), float(i)), i % 2

def scaled(by):
    return lambda outputs, labels: by * nn.functional.cross_entropy(outputs, labels, reduction="none")

def loss(outputs, labels, by=1.0):
    return by * nn.functional.cross_entropy(outputs, labels, reduction="none")

class Odd(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc, self.act, self.seen = nn.Linear(3, 2), act, {"a": 1}
    def extra_repr(self): return f"at {id(self)} {object()!r}"
    def forward(self, x): return self.act(self.fc(x))

torch.manual_seed(0)
plain = lambda: {"module": Odd(torch.tanh), "targets": ("fc",), "train": Examples(Data()), "test": Examples(Data())}
make = lambda **more: Task(**(plain() | more))
torch.manual_seed(0)
entropy = nn.CrossEntropyLoss
kinds = {
    "plain": {},
    "closure 1": {"loss": scaled(1.0)},
    "closure 2": {"loss": scaled(2.0)},
    "partial 1": {"loss": functools.partial(loss, by=1.0)},
    "partial 2": {"loss": functools.partial(loss, by=2.0)},
    "module": {"loss": entropy(reduction="none")},
    "weighted": {"loss": entropy(torch.tensor([1.0, 9.0]), reduction="none")},
    "smooth": {"loss": entropy(reduction="none", label_smoothing=0.3)},
    "relu": {"module": Odd(torch.relu)},
    "metric 1": {"metrics": {"m": lambda a, b: 1.0}},
    "metric 2": {"metrics": {"m": lambda a, b: 2.0}},
    "names": {"label_names": ("no", "yes")},
    "names turned": {"label_names": ("yes", "no")},
}
for name, more in kinds.items():
    torch.manual_seed(0)
    print(name, "|", *digest.digest(make(**more)))
"""


def test_digests_are_the_same_in_another_process_and_differ_where_the_task_does() -> None:
    import subprocess
    import sys

    def run(seed: str) -> dict[str, str]:
        environment = __import__("os").environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", DIGESTS], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return dict(line.split(" | ") for line in done.stdout.splitlines())

    first, second = run("1"), run("2")
    assert first == second
    assert len(set(first.values())) == len(first), [name for name in first if list(first.values()).count(first[name]) > 1]


MORE_WRONG = {
    "a label past the outputs": (lambda: federation(task(train=Examples(x[:COUNT], torch.full((COUNT,), 5)))), "got 5"),
    "a short column": (lambda: task(columns={"s": ["a", "b"]}), "columns: s: expected 90 values"),
    "a mask of another length": (lambda: federation(shards={"north": np.ones(10, bool), "south": [20]}), "a mask of 90"),
    "a key that a task overrules": (lambda: federation(model={"name": "digits-mlp"}), "a task is handed in"),
    "targets beside a task": (lambda: federation(lora={"target_modules": ["2"]}), "a task is handed in"),
    "rounds twice": (lambda: federation(run={"rounds": 5}), "rounds: is given"),
    "a count beside ranks": (lambda: federation(clients={"count": 7}), "ranks: is given"),
    "a partition beside shards": (lambda: federation(data={"partition": {"kind": "iid"}}), "shards: is given"),
    "a part of a head": (lambda: federation(task(targets=("0",), trained=("2.weight",))), "name all of a module's parameters"),
    "a target's own bias": (lambda: federation(task(targets=("0",), trained=("0.bias", "0.weight"))), "gets LoRA"),
    "float classes": (
        lambda: federation(task(train=Examples(x[:COUNT], y[:COUNT].float()), test=Examples(x[COUNT:], y[COUNT:].float()))),
        "as many outputs",
    ),
    "a module that gives a tuple": (lambda: federation(task(Twice(), ("fc",)), ranks={"north": 1, "south": 1}), "got tuple"),
    "a loss that raises": (lambda: federation(task(loss=lambda o, t: o.nothing)), "raised AttributeError"),
    "a loss by name": (lambda: task(loss="mse"), "loss: expected a function"),
    "held-out rows of another width": (
        lambda: federation(task(test=Examples(x[COUNT:, :4], y[COUNT:]))),
        "held-out examples raised",
    ),
    "a data set that raises": (lambda: Examples(Broken()), "item 3 of 9 raised KeyError"),
    "sections that are none": (lambda: federation(train=5), "expected keys of the section"),
    "a configuration that is none": (lambda: federation(config="x.toml"), "expected an anyrank.Config"),
    "shards of nothing": (lambda: federation(shards=3), "shards: expected rows by client"),
    "a rank past all bounds": (lambda: federation(ranks={"north": 10**20, "south": 1}), "whole number of at least 1"),
    "a module that cannot be frozen": (lambda: federation(task(torch.jit.script(net()))), "cannot be frozen"),
}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x), x


class Broken:
    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int):
        if i == 3:
            raise KeyError("gone")
        return torch.zeros(2), 0


@pytest.mark.parametrize("what", MORE_WRONG)
def test_more_wrong_requests_are_one_line_each(what: str, tmp_path: Path) -> None:
    make, says = MORE_WRONG[what]

    def ask() -> None:
        made = make()
        if isinstance(made, Federation):
            made.run(tmp_path / "run")

    with pytest.raises(AnyRankError) as error:
        ask()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Breaks(EqualVoices):
    name = "breaks"

    def merge_layer(self, state, name, parts):
        return {}["nothing"]


def test_a_method_of_ones_own_that_breaks_is_named_with_its_layer(tmp_path: Path) -> None:
    with pytest.raises(AnyRankError, match="breaks: its rule for layer 0 raised KeyError"):
        federation(method=Breaks()).run(tmp_path / "run")
