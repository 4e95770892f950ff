"""One budget a data set: every private run is charged to the ledger of its data, whatever happens to it, and ceilings hold."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import multiprocessing
import os
import random
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anyrank
from anyrank import config as configs
from anyrank import files, report, simulation
from anyrank.cli import main
from anyrank.config.sections import Config
from anyrank.data.partition import Shards
from anyrank.errors import ConfigError, RunError, RunFailed
from anyrank.privacy import chain, datasets, noise, spent
from anyrank.privacy.accountants import Spending, composed
from anyrank.privacy.datasets import DataSet
from anyrank.privacy.plan import PrivacyPlan
from anyrank.privacy.spent import Account, Planned, Total
from anyrank.privacy.statement import in_words
from anyrank.privacy.worst import merged, worst
from anyrank.simulation import sources
from anyrank.studies import audit, spending

DELTA = 1e-5
ROWS = [f"the card number {i} was not accepted" for i in range(40)]
CONFIG = """
[run]
name = "private"
rounds = 3
[model]
name = "digits-mlp"
[data.partition]
kind = "iid"
[clients]
count = 6
participation = 0.5
ranks = [1, 2]
[train]
local_steps = 2
batch_size = 16
[method]
name = "ffa_lora"
[privacy]
level = "example"
epsilon = 3.0
delta = 1e-5
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder for each test, and no secret that would make two runs one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(noise.SEED, raising=False)
    return tmp_path / "state"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of the small base model."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("cache")
        patched.setenv("ANYRANK_CACHE", str(folder))
        yield folder


def plan(noises: dict[int, float], level: str = "example", delta: float = DELTA, steps: int = 2) -> PrivacyPlan:
    return PrivacyPlan(
        **{"level": level, "epsilon": 0.0, "delta": delta, "clip_norm": 1.0, "accountant": "pld", "secure": False},
        **{"counts": "rounded", "batch_size": 16, "local_steps": steps, "rounds": 50, "max_rounds": 50},
        **{"participation": 1.0, "noise": noises},
    )


ABOUT = {"name": "a run", "method": "ffa_lora", "seed": 0, "out": "", "delta": DELTA, "noise_at": "client"}


def planned(run: str, rounds: dict[int, int], group: str = "g", **of: object) -> Planned:
    noises = of.pop("noises", dict.fromkeys(rounds, 1.0))
    return Planned(run, group, plan(noises, **of), rounds, ABOUT)


def data(rows: list[str] = ROWS, name: str = "rows.csv", path: str = "", contents: str = "") -> DataSet:
    return DataSet.of_rows(name, path, contents, (row.encode() for row in rows))


def account(run: str, of: DataSet | None = None, ceiling: float = 0.0, **more: object) -> Account:
    (kept,) = datasets.opened(of or data())
    return Account(kept, planned(run, {160: 50}, **more), None, ceiling)


def total(of: DataSet | None = None) -> Total:
    (kept,) = datasets.find(of or data())
    return spent.total(kept)


# --- what charges add up to ----------------------------------------------------------------------------------------------

KINDS = st.builds(Spending, st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([0.8, 1.0, 2.0, 4.0]), st.integers(1, 30))
GROUPS = st.lists(st.lists(st.lists(KINDS, min_size=1, max_size=2), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=15)
@given(GROUPS, st.data())
def test_wherever_an_example_is_its_epsilon_is_at_most_the_one_that_is_reported(groups: list, choice: st.DataObject) -> None:
    """The adversary chooses in each group of runs which client has the example."""
    own = [choice.draw(st.sampled_from(group)) for group in groups]
    true = composed(merged(itertools.chain(*own)), DELTA)
    assert worst(groups, DELTA) >= true * (1 - 1e-9)
    assert spent.within(groups, DELTA, true * 0.5) is False or true == 0


def test_many_choices_are_bounded_and_not_left_out() -> None:
    """Ten groups of two kinds are 1024 choices: more noise, larger rate against less noise, smaller rate."""
    groups = [[[Spending(0.1, 0.9 + i / 50, 5)], [Spending(0.5, 3.0 + i / 50, 5)]] for i in range(10)]
    ours = worst(groups, DELTA)
    for pick in (0, 1):
        assert ours >= composed(merged(itertools.chain(*(group[pick] for group in groups))), DELTA)
    mixed = [group[i % 2] for i, group in enumerate(groups)]
    assert ours >= composed(merged(itertools.chain(*mixed)), DELTA)
    everything = [spending for group in groups for alternative in group for spending in alternative]
    assert ours < composed(merged(everything), DELTA), "an example is with one client of a run, not with all of them"


def test_runs_add_up_and_clients_of_one_run_do_not() -> None:
    once, both = Total(), Total()
    for row in planned("one", {160: 10, 320: 10}).rows(once):
        once.note(row)
    # In one run an example is with one client: the worst of two, at rates 16/160 and 16/320.
    larger = composed((Spending(0.1, 1.0, 20),), DELTA)
    assert once.epsilon(DELTA) == pytest.approx(larger)
    for each in (planned("one", {160: 10}), planned("two", {160: 10}, group="of another seed")):
        for row in each.rows(both):
            both.note(row)
    assert both.epsilon(DELTA) == pytest.approx(composed((Spending(0.1, 1.0, 40),), DELTA))


def test_a_run_of_whole_clients_counts_with_half_its_noise_for_an_example() -> None:
    """Replacing one upload by another counts as twice the clip norm."""
    found = Total()
    for row in planned("one", {160: 4}, level="client", noises={160: 6.0}).rows(found):
        found.note(row)
    assert found.epsilon(DELTA) == pytest.approx(composed((Spending(1.0, 3.0, 4),), DELTA))
    assert found.epsilon(DELTA, "client") == pytest.approx(composed((Spending(1.0, 6.0, 4),), DELTA))
    for row in planned("two", {160: 4}).rows(found):
        found.note(row)
    assert found.epsilon(DELTA, "client") == float("inf"), "noise for one example bounds nothing for a client"


def test_clients_that_may_have_the_same_example_have_no_bound_for_it() -> None:
    found = Total(planned("one", {160: 4}, group=datasets.SHARED + "g", level="client").rows(Total()))
    assert found.epsilon(DELTA) == float("inf")
    assert not found.within(DELTA, 1e9)


# --- charging ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["one", "two"]), st.integers(1, 9), st.booleans()), min_size=1, max_size=12))
def test_whatever_is_repeated_or_resumed_each_round_is_charged_once(tmp_path_factory, steps: list) -> None:
    """A resumed run asks again for rounds that it was charged for; a killed process opens the ledger anew."""
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(state))
        open_ones: dict[str, Account] = {}
        most: dict[str, int] = {}
        for run, rounds, killed in steps:
            if killed or run not in open_ones:
                open_ones[run] = account(run)
            open_ones[run].charge({160: rounds})
            most[run] = max(most.get(run, 0), rounds)
            assert {run: count for (run, _, _), count in total().rounds.items()} == most


def charge_many(run: str, rounds: int) -> None:
    """In a process of its own."""
    own = account(run)
    for number in range(1, rounds + 1):
        own.charge({160: number})


def test_processes_at_the_same_time_lose_no_charge() -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=charge_many, args=(f"run {i}", 12)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    found = total()
    assert sorted(found.rounds.values()) == [12] * 4
    assert len(found.runs) == 4


def test_a_ceiling_holds_when_two_processes_spend_at_the_same_time() -> None:
    """Both runs fit alone; together they do not. Which one stops is open, and what is spent is not above the ceiling."""
    limit = composed((Spending(0.1, 1.0, 2 * 15),), DELTA)
    ended: list[str] = []
    refused: set[str] = set()
    for number in range(1, 13):
        for run in ("one", "two"):
            if run not in refused:
                try:
                    account(run, ceiling=limit).charge({160: number})
                except RunFailed as error:
                    ended.append(str(error))
                    refused.add(run)
    assert ended
    assert all("privacy.ceiling: expected at most epsilon" in line and "\n" not in line for line in ended)
    assert total().epsilon(DELTA) <= limit
    assert sum(total().rounds.values()) == 15, "no round less than what the ceiling allows"


def test_only_its_owner_can_read_the_ledger(state: Path) -> None:
    account("one").charge({160: 1})
    for path in (state / "anyrank" / "spent").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name
    assert stat.S_IMODE((state / "anyrank" / "spent").stat().st_mode) == 0o700


LEDGER_DAMAGE: dict[str, Callable[[Path], object]] = {
    "a line removed": lambda folder: rewrite(folder / chain.LEDGER, lambda lines: lines[:1] + lines[2:]),
    "the last line removed": lambda folder: rewrite(folder / chain.LEDGER, lambda lines: lines[:-1]),
    "all lines removed": lambda folder: rewrite(folder / chain.LEDGER, lambda lines: []),
    "fewer steps": lambda folder: replaced(folder / chain.LEDGER, b'"steps": 2', b'"steps": 1'),
    "more noise": lambda folder: replaced(folder / chain.LEDGER, b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'),
    "another group": lambda folder: replaced(folder / chain.LEDGER, b'"group": "g"', b'"group": "h"'),
    "no text": lambda folder: (folder / chain.LEDGER).write_bytes(b"\xff\n" * 3),
    "the lines are gone": lambda folder: (folder / chain.LEDGER).unlink(),
    "the head is gone": lambda folder: (folder / chain.HEAD).unlink(),
    "an empty head": lambda folder: (folder / chain.HEAD).write_bytes(b""),
    "what it is of is gone": lambda folder: (folder / datasets.ABOUT).unlink(),
    "what it is of is cut": lambda folder: (folder / datasets.ABOUT).write_bytes((folder / datasets.ABOUT).read_bytes()[:50]),
    "it is of nothing": lambda folder: (folder / datasets.ABOUT).write_text('{"forms": [], "ceiling": 0, "delta": 0}'),
    "nested": lambda folder: (folder / datasets.ABOUT).write_text("[" * 100_000 + "]" * 100_000),
}


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def replaced(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize("damage", LEDGER_DAMAGE)
def test_a_damaged_ledger_is_one_line_and_never_silently_less(state: Path, damage: str) -> None:
    own = account("one")
    for number in (1, 2, 3):
        own.charge({160: number})
    (folder,) = (path for path in (state / "anyrank" / "spent").iterdir() if path.is_dir())
    LEDGER_DAMAGE[damage](folder)
    for attempt in (lambda: own.charge({160: 4}), lambda: account("two").charge({160: 1}), lambda: total()):
        with pytest.raises(RunError, match=r"restore") as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1, 40, 200])
def test_a_line_that_a_kill_cut_off_is_cut_and_charged_again(state: Path, length: int) -> None:
    own = account("one")
    own.charge({160: 1})
    (folder,) = (path for path in (state / "anyrank" / "spent").iterdir() if path.is_dir())
    line = (folder / chain.LEDGER).read_bytes()
    with open(folder / chain.LEDGER, "ab") as file:
        file.write(line[:length])
    account("one").charge({160: 2})
    assert dict(total().rounds) == {("one", "g", 160): 2}


# --- which data set it is ------------------------------------------------------------------------------------------------


def text_config(path: Path, **data: object) -> Config:
    return Config().replace(model={"task": "text-classification"}, data={"source": str(path), **data})


def table(path: Path, rows: list[str], delimiter: str = ",", names: tuple[str, str] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(names)
        writer.writerows([row, "ab"[i % 2]] for i, row in enumerate(rows))
    return path


def read(path: Path, **data: object) -> DataSet:
    ((source),) = sources.sources(text_config(path, **data))()
    return source.data


@settings(max_examples=10)
@given(st.randoms(use_true_random=False))
def test_a_data_set_is_known_again_in_any_order_name_and_form(tmp_path_factory, shuffle: random.Random) -> None:
    folder = tmp_path_factory.mktemp("data")
    other = ROWS[:]
    shuffle.shuffle(other)
    first = read(table(folder / "rows.csv", ROWS))
    assert first.is_same(read(table(folder / "renamed.csv", other)))
    assert first.is_same(read(table(folder / "semicolons.csv", other, ";"), delimiter=";"))
    named = table(folder / "columns.csv", other, names=("question", "kind"))
    assert first.is_same(read(named, text="question", label="kind"))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row, "label": "a b"[0:1:1]}) + "\n" for row in other[:-1]))
    with open(folder / "rows.jsonl", "a") as file:
        file.write(json.dumps({"text": other[-1], "label": "b"}) + "\n")
    assert first.is_same(read(folder / "rows.jsonl")), "labels are no part of a row: these are the same people"


def test_the_same_file_read_in_another_way_is_the_same_data_set(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,more,label\n" + "".join(f"{row},{row[::-1]},{'ab'[i % 2]}\n" for i, row in enumerate(ROWS)))
    assert read(path).is_same(read(path, text="more"))
    assert sources.named(str(path)).is_same(read(path)), "named without a configuration"


@pytest.mark.parametrize(("kept", "new"), [(40, 0), (39, 1), (30, 10), (40, 20), (25, 0)])
def test_a_changed_copy_is_another_data_set_and_is_noticed(tmp_path: Path, kept: int, new: int) -> None:
    first = data(path="here")
    datasets.opened(first)
    changed = data([*ROWS[:kept], *(f"another row {i}" for i in range(new))], "copy.csv")
    if (kept, new) == (40, 0):
        assert changed.is_same(first)
        assert datasets.alike(changed) == []
        return
    assert not changed.is_same(first)
    assert datasets.find(changed) == []
    (line,) = datasets.alike(changed)
    assert "\n" not in line
    assert f"{100 * kept / min(40, kept + new):.0f} %" in line, "of the smaller one's rows"
    (at_its_place,) = datasets.alike(replace(changed, path="here"))
    assert "has changed since" in at_its_place


def test_other_data_is_not_noticed() -> None:
    datasets.opened(data())
    assert datasets.alike(data([f"nothing of that {i}" for i in range(500)], "other.csv")) == []


@settings(max_examples=20)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 1))
def test_the_share_in_common_is_about_right(first: int, second: int, share: float) -> None:
    both = int(share * min(first, second))
    one, other = data([f"{i}" for i in range(first)]), data([f"{i + first - both}" for i in range(second)])
    true = both / min(first, second)
    # 128 of the rows of either say it: the share of both among them is off by .044 at one standard deviation, and what
    # follows from it by a factor of up to (first + second) / min(first, second).
    tolerance = 5 * 0.044 * (first + second) / min(first, second)
    assert abs(one.in_common(other) - true) <= max(tolerance, 1e-9)


def test_the_order_of_rows_and_their_labels_are_part_of_which_client_has_a_row(tmp_path: Path) -> None:
    """Runs are of one group only if each example is with the same client in both: else the worst client is not enough."""
    first, other = table(tmp_path / "one.csv", ROWS), table(tmp_path / "other.csv", ROWS[::-1])
    (one,), (two,) = (sources.sources(text_config(path))() for path in (first, other))
    assert one.data.is_same(two.data)
    assert one.group != two.group
    for change in ({"run": {"seed": 1}}, {"clients": {"count": 3}}, {"data": {"test_fraction": 0.3}}):
        (changed,) = sources.sources(text_config(first).replace(**change))()
        assert changed.group != one.group, change
    (same,) = sources.sources(text_config(first).replace(run={"rounds": 9}, method={"name": "rolora"}))()
    assert same.group == one.group


def test_two_sites_with_one_file_are_added_and_others_have_a_ledger_each(tmp_path: Path) -> None:
    paths = {name: table(tmp_path / f"{name}.csv", ROWS[:20] if name != "c" else ROWS[20:]) for name in "abc"}
    told = {
        "model": {"task": "text-classification"},
        "sites": [{"name": name, "rank": 2, "source": str(path)} for name, path in paths.items()],
    }
    found = {next(iter(each.clients)): each for each in sources.sources(configs.from_table(told))()}
    assert found["a"].data.is_same(found["b"].data)
    assert found["a"].group != found["b"].group, "one example, two clients: both releases are of it"
    assert not found["a"].data.is_same(found["c"].data)


# --- which runs divide examples in the same way ----------------------------------------------------------------------------


def own_task(owners: int = 72) -> anyrank.Task:
    """144 examples of `owners` persons, in two hospitals: a person's examples are all in one of them."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(144, 4, generator=draw), torch.arange(144) % 2
    columns = {
        "who": np.array([f"p{i % owners}" for i in range(144)], dtype=object),
        "hospital": np.array([("north", "south")[i % owners % 3 == 0] for i in range(144)], dtype=object),
    }
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    return anyrank.Task(module=net, targets=("0",), train=(x, y), test=(x[:20], y[:20]), columns=columns)


def released(run: str, shards: Sequence | None = None, **sections: dict) -> Planned:
    """What a run of two clients would release in 12 steps of noise 1, a mean batch of 12."""
    column = configs.sections.PartitionConfig(kind="column", column="hospital")
    asked = {
        **{"run": {"rounds": 6}, "clients": {"count": 2, "ranks": (2,), "participation": 1.0}, "method": {"name": "ffa_lora"}},
        **{"train": {"batch_size": 12, "local_steps": 2}, "data": {} if shards else {"person": "who", "partition": column}},
        "privacy": {"level": "example", "noise_multiplier": 1.0, "delta": 1e-4, "counts": "exact"},
    }
    asked = {name: keys | sections.get(name, {}) for name, keys in asked.items()}
    made = own_task()
    own = shards and Shards.of_owners(np.repeat(np.arange(len(shards)), shards), len(shards))
    built = simulation.build(Config().replace(**asked), task=made, shards=own)
    built.close()
    ((_, work, _),) = spending.of_run(built, run)
    return work


def together(*works: Planned) -> float:
    return Total().with_all(works).epsilon(1e-4)


def test_other_shards_from_python_are_another_division() -> None:
    """An example may be with the smaller client of the first run and the larger of the second, or the other way round."""
    first, second = released("one", [96, 48]), released("two", [64, 80])
    choices = itertools.product((96, 48), (64, 80))
    # An example with 48 and then 64 others: 12 steps at rate 12/48, then 12 at 12/64. The worst of all four choices.
    by_hand = [composed((Spending(12 / a, 1.0, 12), Spending(12 / b, 1.0, 12)), 1e-4) for a, b in choices]
    assert together(first, second) == pytest.approx(max(by_hand), rel=1e-6)
    moved = released("three", [48, 96])
    assert moved.rounds == first.rounds, "the same counts, of other examples"
    assert together(first, moved) >= composed((Spending(12 / 48, 1.0, 24),), 1e-4) * 0.9
    assert first.group != moved.group
    assert first.group == released("four", [96, 48], train={"learning_rate": 0.5}).group


def test_a_run_of_persons_and_one_of_examples_are_added() -> None:
    """One file, once for examples and once for persons: counts of persons are not those of other clients."""
    examples, persons = released("one"), released("two", privacy={"level": "person"})
    assert (dict(examples.rounds), dict(persons.rounds)) == ({96: 6, 48: 6}, {48: 6, 24: 6})
    # The worst client: 12 steps at rate 12/48, and 12 steps for a person, for an example without sampling and half the noise.
    by_hand = composed((Spending(12 / 48, 1.0, 12), Spending(1.0, 0.5, 12)), 1e-4)
    assert together(examples, persons) == pytest.approx(by_hand, rel=1e-6)
    assert examples.group != persons.group
    assert together(examples, released("three", train={"learning_rate": 0.5})) < by_hand


@settings(max_examples=10, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 99), min_size=1), st.data())
def test_runs_are_alike_only_if_all_clients_declare_the_same(declared: dict[str, int], choice: st.DataObject) -> None:
    def group(counts: dict[str, int], split: str = "s") -> str:
        return sources.sources(Config(), None, sources.Division(counts, split))()[0].group

    name = choice.draw(st.sampled_from(sorted(declared)))
    assert group(declared) == group(dict(reversed(declared.items())))
    assert group(declared) != group(declared | {name: declared[name] + 1})
    assert group(declared) != group(declared, "another split")


def test_the_unit_and_the_examples_that_the_base_model_takes_are_part_of_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", image=np.arange(2560, dtype=np.uint8).reshape(40, 8, 8), label=np.arange(40) % 2)
    own = {"model": {"name": "fashion-mlp", "task": "image-classification"}, "data": {"source": str(tmp_path / "images.npz")}}
    client, example = ({"privacy": {"level": level, "epsilon": 3.0, "delta": 1e-3}} for level in ("client", "example"))
    groups = {
        sources.sources(Config().replace(**(own | {"model": own["model"] | {"pretrained": pretrained}} | unit)))()[0].group
        for pretrained in (True, False)
        for unit in (client, example)
    }
    assert len(groups) == 4


def test_the_division_of_a_worker_is_that_of_this_process(tmp_path: Path, base: Path) -> None:
    groups = set()
    for engine in ("process", "workers"):
        (tmp_path / "private.toml").write_text(CONFIG)
        built = simulation.build(configs.load(tmp_path / "private.toml", [f"run.engine={engine}", "run.workers=1"]))
        groups.add(built.sources()[0].group)
        built.close()
    assert len(groups) == 1


def test_planned_runs_of_several_deltas_keep_each_delta() -> None:
    """15 rounds spend 4.4 or so at delta 1e-3 and more at 1e-7: the first run's delta is not that of the second."""
    at = {delta: together_at(delta) for delta in (1e-3, 1e-7)}
    between = sum(at.values()) / 2
    works = [planned("one", {160: 8}, delta=1e-3), planned("two", {160: 7}, delta=1e-7, group="h")]
    spent.check(data(), works, {1e-3: between})
    for ceilings in ({1e-3: between, 1e-7: between}, {1e-7: between}):
        with pytest.raises(ConfigError, match=r"^privacy\.ceiling: expected at most .* at delta = 1e-07 "):
            spent.check(data(), works, ceilings)
    of = sources.Source(data(), "g")
    with pytest.raises(ConfigError, match=r"at delta = 1e-07 "):
        spending.check([(of, work, between) for work in works])
    spending.check([(of, works[0], between), (of, works[1], 0.0)])
    spending.check([(of, works[0], between), (of, works[1], at[1e-7])])


def together_at(delta: float) -> float:
    return composed((Spending(0.1, 1.0, 2 * 15),), delta) * (1 + 1e-9)


# --- runs ----------------------------------------------------------------------------------------------------------------


def run(folder: Path, out: str, *overrides: str, resume: bool = True, tell: Callable | None = None) -> dict:
    (folder / "private.toml").write_text(CONFIG)
    chosen = configs.load(folder / "private.toml", overrides)
    return simulation.execute(chosen, folder / out, resume=resume, tell=tell)


def command(folder: Path, *words: str, prelude: str = "") -> tuple[int, str, str]:
    """A command in a process of its own: its exit status (minus the signal that ended it), and what it said."""
    (folder / "private.toml").write_text(CONFIG)
    child = os.fork()
    if not child:  # everything is loaded already, so that a process costs milliseconds
        status = 70
        try:
            with open(folder / "said", "w") as out, open(folder / "errors", "w") as err:
                from anyrank.cli import console

                sys.stdout, sys.stderr = out, err
                os.chdir(folder)
                sys.argv[1:] = words
                report.build = lambda runs, page: page
                exec(prelude, {})
                console.out.file, console.err.file = out, err
                main()
        except SystemExit as done:
            status = done.code or 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), (folder / "said").read_text(), (folder / "errors").read_text()


DIGITS = sources.named("digits")
KILLS = {
    "after the charge, before its head": "chain.Chain._write_head = lambda self: die()",
    "after the charge, before anyone trains": "ledger.Ledger._note = lambda self, rows: die() if seen() > 1 else None",
    "half way through the line": """
append = chain.append
def patched(path, line):
    if seen() > 1:
        with open(path, "ab") as file: file.write(line[:99]); file.flush(); os.fsync(file.fileno())
        die()
    append(path, line)
chain.append = patched
""",
    "before the data set is noted": "datasets._write = lambda changed: die()",
}
PRELUDE = """
import itertools, os, signal
from anyrank.privacy import chain, datasets, ledger
count = itertools.count(1)
seen = lambda: next(count)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_that_is_killed_and_goes_on_is_charged_once(tmp_path: Path, base: Path, moment: str) -> None:
    status, _, _ = command(tmp_path, "run", "private.toml", "--out", "killed", "--json", prelude=PRELUDE + KILLS[moment])
    assert status == -signal.SIGKILL
    status, _, said = command(tmp_path, "run", "private.toml", "--out", "killed", "--resume", "--json")
    assert status == 0, said
    once = sorted(total(DIGITS).rounds.values())
    run(tmp_path, "whole")
    assert sorted(total(DIGITS).rounds.values()) == sorted(once * 2)
    assert len(total(DIGITS).runs) == 2


def test_every_round_is_charged_before_it_trains(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyrank.training import trainer

    train, seen = trainer._PRIVATELY["example"], []

    def watching(model, client, *more):
        declared = more[1]
        seen.append((sum(total(DIGITS).rounds.values()), declared))
        return train(model, client, *more)

    monkeypatch.setitem(trainer._PRIVATELY, "example", watching)
    run(tmp_path, "one", "clients.participation=1.0")
    assert [charged for charged, _ in seen] == [charged for charged in (1, 2, 3) for _ in range(6)]


def test_a_secret_that_makes_two_runs_the_same_is_charged_once(tmp_path: Path, base: Path, monkeypatch) -> None:
    """The second run releases the same numbers: nothing new. Another configuration has other noise."""
    monkeypatch.setenv(noise.SEED, "0123456789abcdef" * 2)
    run(tmp_path, "one")
    once = dict(total(DIGITS).rounds)
    run(tmp_path, "two")
    assert dict(total(DIGITS).rounds) == once
    run(tmp_path, "three", "train.learning_rate=0.02")
    assert len(total(DIGITS).runs) == 2


def test_noise_that_cannot_be_drawn_again_is_charged_for_every_attempt(tmp_path: Path, base: Path) -> None:
    prelude = PRELUDE + KILLS["after the charge, before anyone trains"]
    words = (
        "run",
        "private.toml",
        "--out",
        "own",
        "--json",
        "--set",
        "privacy.secure=true",
        "--set",
        "clients.participation=1.0",
    )
    assert command(tmp_path, *words, prelude=prelude)[0] == -signal.SIGKILL
    assert command(tmp_path, *words, "--resume")[0] == 0
    charges = [json.loads(line) for line in (tmp_path / "own" / "privacy.jsonl").read_text().splitlines()]
    attempts = max(sum(row["client"] == name for row in charges) for name in {row["client"] for row in charges})
    assert sum(total(DIGITS).rounds.values()) >= attempts


def test_a_run_beyond_a_ceiling_is_refused_and_leaves_nothing(tmp_path: Path, base: Path) -> None:
    first = run(tmp_path, "one")["epsilon"]
    spent_before = total(DIGITS).epsilon(DELTA)
    assert spent_before == pytest.approx(first, rel=1e-6)
    status, said, line = command(tmp_path, "run", "private.toml", "--out", "two", "--set", "privacy.ceiling=3.1")
    assert (status, said, line.count("\n")) == (2, "", 1)
    for part in (
        "privacy.ceiling",
        "expected at most epsilon = 3.1",
        "delta = 1e-05",
        "digits",
        f"{spent_before:.4g} are spent",
    ):
        assert part in line
    assert not (tmp_path / "two").exists()
    assert total(DIGITS).epsilon(DELTA) == spent_before
    assert not [key for key in noise.key_folder().iterdir() if not key.name.startswith(".")], "no key is left"
    assert command(tmp_path, "run", "private.toml", "--out", "two", "--json", "--set", "privacy.ceiling=9")[0] == 0


def test_a_ceiling_of_a_data_set_holds_at_its_own_delta(tmp_path: Path, base: Path) -> None:
    """Epsilon 4.2 at delta 1e-7 is harder to keep than at delta 1e-3, whatever delta the runs have."""
    at = {delta: Total(_charged(tmp_path, "see").values()).epsilon(delta) for delta in (1e-3, 1e-7)}
    between = sum(at.values()) / 2
    assert at[1e-3] < between < at[1e-7]
    for delta, status in ((1e-7, 2), (1e-3, 0)):
        words = ("--spent", "digits", "--ceiling", f"{between}", "--delta", f"{delta}", "--json")
        told = json.loads(command(tmp_path, "privacy", *words)[1])
        assert told["data_sets"][0]["ceiling"] == {"epsilon": between, "delta": delta}
        assert command(tmp_path, "run", "private.toml", "--out", f"at-{delta}", "--json")[0] == status
    told = json.loads(command(tmp_path, "privacy", "--spent", "digits", "--json")[1])["data_sets"][0]
    assert told["left"] == pytest.approx(between - at[1e-3], rel=1e-6)
    assert [row["name"] for row in told["runs"]] == ["private"]


def _charged(tmp_path: Path, name: str) -> dict:
    """The charges of a run as it is planned, without a ledger."""
    (tmp_path / "private.toml").write_text(CONFIG)
    built = simulation.build(configs.load(tmp_path / "private.toml", ()))
    built.close()
    ((_, own, _),) = spending.of_run(built)
    return dict(enumerate(own.rows(Total())))


def test_a_plan_says_what_a_run_then_spends(tmp_path: Path, base: Path) -> None:
    foreseen = Total(_charged(tmp_path, "see").values())
    run(tmp_path, "one")
    assert sorted(foreseen.rounds.values()) == sorted(total(DIGITS).rounds.values())
    assert foreseen.epsilon(DELTA) == total(DIGITS).epsilon(DELTA)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("what", ["folder", "lock", "write"])
def test_where_the_state_folder_cannot_be_written_nothing_is_trained(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, error: int, what: str
) -> None:
    from anyrank.training import trainer

    def refuse(event: str, path: Path) -> None:
        if event == what and "spent" in Path(path).parts:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files, "reached", refuse)
    monkeypatch.setitem(trainer._PRIVATELY, "example", lambda *more: pytest.fail("a client trained"))
    with pytest.raises(RunFailed, match=r"cannot be written") as found:
        run(tmp_path, "one")
    assert "\n" not in str(found.value)


def test_nothing_of_the_ledger_enters_the_run_folder(tmp_path: Path, base: Path) -> None:
    path = table(tmp_path / "rows.csv", ROWS)
    own = read(path)
    (tmp_path / "net.py").write_text(NET)
    run(tmp_path, "one", f"model.file={tmp_path / 'net.py'}", "model.task=mine", "train.batch_size=4", "privacy.delta=1e-3")
    secrets = {*own.sample, own.files, own.rows}
    for kept in datasets.kept():
        for form in kept.forms:
            secrets |= {form.files, form.rows, *form.sample}
    secrets.discard("")
    assert len(secrets) > 50
    written = b"".join(each.read_bytes() for each in (tmp_path / "one").rglob("*") if each.is_file())
    assert not [digest for digest in secrets if digest.encode() in written]


NET = """
import torch, anyrank
@anyrank.tasks.register("mine")
def make(wanted):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 4, generator=draw), torch.arange(120) % 2
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    return anyrank.Task(module=net, targets=("0",), train=(x, y), test=(x[:20], y[:20]))
"""


def test_a_comparison_says_what_all_its_runs_spend_and_runs_are_charged_once(tmp_path: Path, base: Path) -> None:
    words = ("compare", "private.toml", "--methods", "ffa_lora,rolora", "--out", "both", "--jobs", "2", "--set", "run.rounds=1")
    prelude = "from anyrank import report\nreport.figure = lambda runs, out: out"
    (tmp_path / "private.toml").write_text(CONFIG)
    refused = command(tmp_path, *words, "--set", "privacy.ceiling=3.3")
    assert refused[0] == 2
    assert "privacy.ceiling" in refused[2]
    assert not (tmp_path / "both").exists(), "each run fits alone; refused before anything is trained"
    status, _, said = command(tmp_path, *words, prelude=prelude)
    assert status == 0, said
    found = total(DIGITS)
    assert len(found.runs) == 2
    assert {row["method"] for row in found.runs.values()} == {"ffa_lora", "rolora"}
    both = found.epsilon(DELTA)
    assert f"2 runs would spend ε {in_words(both)} on digits" in said
    assert f"ε {in_words(both)} spent on digits by 2 runs in all" in said
    status, _, said = command(tmp_path, *words, "--resume", prelude=prelude)
    assert status == 0, said
    assert total(DIGITS).epsilon(DELTA) == both


def test_an_audit_is_not_charged(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(audit.loop, "run", lambda federation, *more: seen.append(federation.sources()) or pytest.skip.Exception)
    monkeypatch.setattr(audit, "_claimed", lambda *more: 1.0)
    monkeypatch.setattr(audit, "_verdict", lambda *more: {})
    (tmp_path / "private.toml").write_text(CONFIG)
    audit.audit(configs.load(tmp_path / "private.toml", ["train.optimizer=sgd"]), 10)
    assert seen == [()]
    assert datasets.kept() == []


# --- held-out examples, and who has a row ----------------------------------------------------------------------------------


def private_texts(path: Path, **more: object) -> Config:
    own = text_config(path).replace(
        train={"local_steps": 1, "batch_size": 2}, privacy={"level": "example", "epsilon": 3.0, "delta": 1e-3}
    )
    return own.replace(**more)


def test_held_out_rows_of_a_private_source_are_refused(tmp_path: Path) -> None:
    path, public = table(tmp_path / "rows.csv", ROWS), table(tmp_path / "public.csv", ROWS)
    with pytest.raises(ConfigError, match=r"^data\.test_source: expected held-out examples that are not private") as error:
        simulation.build(private_texts(path))
    assert "\n" not in str(error.value)
    for mended in ({"data": {"test_source": str(public)}}, {"eval": {"where": "sites"}}, {"data": {"test_split": "test"}}):
        sources.check_held_out(private_texts(path, **mended))
    sources.check_held_out(text_config(path))
    sources.check_held_out(Config().replace(privacy={"level": "example", "epsilon": 3.0, "delta": 1e-3}))
    told = {"model": {"task": "text-classification"}, "privacy": {"level": "example", "epsilon": 3.0, "delta": 1e-3}}
    site = {"name": "north", "rank": 2, "source": str(path)}
    with pytest.raises(ConfigError, match=r"^sites\.north\.test_source: expected"):
        sources.check_held_out(configs.from_table(told | {"sites": [site]}))
    sources.check_held_out(configs.from_table(told | {"sites": [site | {"test_source": str(public)}]}))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "column"])
def test_one_row_more_moves_others_unless_a_column_names_the_client(tmp_path: Path, base: Path, kind: str) -> None:
    """Why the notice is there: the division of one source depends on all rows; a column's does not."""
    from anyrank.config.sections import PartitionConfig
    from anyrank.data import partition

    labels = np.arange(200) % 4
    columns = {"site": np.array([f"site-{i % 5}" for i in range(201)], dtype=object)}
    split = PartitionConfig(kind=kind, alpha=1.0, column="site" if kind == "column" else "")
    owners = []
    for number in (200, 201):
        held = {name: values[:number] for name, values in columns.items()}
        shards = partition.partition(split, np.append(labels, 0)[:number], 5, 0, held)
        owners.append({int(row): client for client in range(5) for row in shards[client]})
    moved = sum(owners[0][row] != owners[1][row] for row in range(200))
    assert (moved == 0) == (kind == "column")


def test_the_notice_names_the_partition_and_only_where_it_matters(tmp_path: Path, base: Path) -> None:
    told: list[str] = []
    run(tmp_path, "one", "run.rounds=1", tell=told.append)
    assert [line for line in told if "data.partition.kind = 'iid'" in line]
    assert all("\n" not in line for line in told)


@pytest.mark.parametrize(
    "words",
    [
        ("--spent", "nowhere.csv"),
        ("--ceiling", "3"),
        ("--spent", "digits", "--ceiling", "-1"),
        ("--spent", "digits", "--ceiling", "nan"),
        ("--spent", "digits", "--ceiling", "2", "--delta", "2"),
        ("--spent", "digits", "--ceiling", "2"),
        ("--spent", "digits", "--delta", "0"),
        ("--spent", "digits", "--delta", "nan"),
        ("--spent", "all", "--delta", "nan"),
        ("--spent", ""),
        ("--spent", "", "private.toml"),
        ("--spent", "/dev/zero"),
        ("--spent", "n" * 5000),
        ("--spent", "all", "--ceiling", "2"),
        ("--spent", "digits", "--statement"),
        ("--statement",),
        ("private.toml", "--out", "there.md"),
        ("private.toml", "--spent", "private.toml"),
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_requests_that_make_no_sense_are_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    status, said, line = command(tmp_path, "privacy", *words)
    assert (status, said, line.count("\n")) == (2, "", 1), line
    assert datasets.kept() == []


NO_DATA: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a pipe in a folder": lambda path: (path.mkdir(), os.mkfifo(path / "inside")),
    "an empty file": lambda path: path.touch(),
    "an empty folder": lambda path: path.mkdir(),
    "a table of one line": lambda path: path.write_text("text,label\n\n"),
    "a run folder": lambda path: (path.mkdir(), (path / "config.toml").touch(), (path / "metrics.jsonl").write_text("{}")),
}
SAID = {"pipe": "a pipe", "empty": "has no rows", "one line": "has no rows", "run": "is a run folder; give its data"}


@pytest.mark.parametrize("kind", NO_DATA)
def test_what_is_no_data_is_one_line_in_time(tmp_path: Path, kind: str) -> None:
    NO_DATA[kind](tmp_path / "there.csv")
    for more in ((), ("--ceiling", "2", "--delta", "1e-5")):
        status, said, line = command(
            tmp_path, "privacy", "--spent", "there.csv", *more, prelude="import signal; signal.alarm(60)"
        )
        assert (status, said, line.count("\n")) == (2, "", 1), line
        assert next(text for word, text in SAID.items() if word in kind) in line
    assert datasets.kept() == []


def test_a_data_set_that_nobody_trained_on_has_spent_nothing(tmp_path: Path) -> None:
    status, said, _ = command(tmp_path, "privacy", "--spent", "digits")
    assert (status, said.strip()) == (0, "digits: no private run on it is known")
    told = json.loads(command(tmp_path, "privacy", "--spent", "digits", "--json")[1])["data_sets"]
    assert [(row["epsilon"], row["charges"], row["runs"], row["ledger"]) for row in told] == [(0.0, 0, [], None)]
    assert json.loads(command(tmp_path, "privacy", "--spent", "all", "--json")[1])["data_sets"] == []
