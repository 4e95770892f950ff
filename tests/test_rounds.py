"""Rounds that always end: quorum, patience, dropout, late replies, deadlines, rest, and limits on single owners."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyrank import methods, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config
from anyrank.errors import ConfigError, RunFailed
from anyrank.federation import loop
from anyrank.federation.cohort import Population
from anyrank.federation.federation import Federation
from anyrank.federation.quarantine import Quarantine
from anyrank.federation.quorum import Patience, Quorum
from anyrank.messages.records import Client, ClientUpdate, Download, Facts, Job, Scaling, ServerState
from anyrank.methods.slices import slice_order
from anyrank.robust.base import Chain
from anyrank.robust.owners import SingleOwner
from anyrank.runs.folder import RunDir
from anyrank.training.deadline import Overdue, limited
from test_federation import Script, rows

OFF = {"norm": 0, "far": 0, "owner": 1}


def built(folder: Path, engine: Script, resume: bool = False, method: str = "rbla", **sections) -> tuple[Federation, RunDir]:
    """Four clients of ranks 1, 2, 2, 4, all of them in each round."""
    config = Config().replace(**{"guard": OFF, **sections}).replace(clients={"count": 4, "participation": 1.0})
    population = Population(np.array((1, 2, 2, 4)), np.array((3, 1, 2, 4)), 4, config.run.seed)
    federation = Federation(config, methods.make(method), population, engine, Facts("a script"))
    return federation, RunDir.open(folder / "run", config, resume)


def played(folder: Path, engine: Script | None = None, on_round: Callable | None = None, **sections) -> list[dict]:
    """The rows of clients.jsonl after a whole run."""
    federation, store = built(folder, engine or Script(), **sections)
    with store:
        loop.run(federation, store, on_round)
    return rows(folder, "clients.jsonl")


def final(folder: Path) -> bytes:
    return (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


# --- quorum and patience ----------------------------------------------------------------------------------------------


@given(least=st.integers(1, 50), share=st.floats(0, 1), asked=st.integers(0, 100), usable=st.integers(0, 100))
def test_a_round_counts_if_as_many_answered_as_both_limits_ask_for(least: int, share: float, asked: int, usable: int) -> None:
    lacking = Quorum(least, share).lacking(usable, asked, [])
    assert bool(lacking) == (asked > 0 and (usable < least or usable < share * asked))


def test_below_quorum_the_state_stays_and_the_round_is_said_to_be_idle(tmp_path: Path) -> None:
    engine = Script({"client-1": "nan", "client-2": "silent"})
    found = played(tmp_path, engine, run={"rounds": 1}, rounds={"least": 2})
    assert [row["status"] for row in found] == ["ok", "rejected", "failed", "ok"]
    engine = Script({"client-1": "nan", "client-2": "silent"})
    with pytest.raises(RunFailed, match="round 1: 2 of 4 clients sent a usable update, 3 are needed; client-1: layer x, B"):
        played(tmp_path / "more", engine, run={"rounds": 1}, rounds={"share": 0.6})
    (row,) = rows(tmp_path / "more", "metrics.jsonl")
    assert row["idle"].startswith("2 of 4 clients")


def test_one_good_round_restores_patience_and_idle_rounds_are_counted(tmp_path: Path) -> None:
    engine = Script()
    bad = dict.fromkeys(("client-0", "client-1", "client-2", "client-3"), "silent")

    def plan(metrics: dict) -> None:  # idle: rounds 2, 3, 5, 6
        engine.mischief = bad if metrics["round"] + 1 in (2, 3, 5, 6) else {}

    played(tmp_path, engine, plan, run={"rounds": 7}, rounds={"patience": 3})
    assert [bool(row["idle"]) for row in rows(tmp_path, "metrics.jsonl")] == [False, True, True, False, True, True, False]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["idle_rounds"] == 4


@given(idle=st.lists(st.booleans(), max_size=30), most=st.integers(1, 6))
def test_patience_of_a_log_is_patience_round_by_round(idle: list[bool], most: int) -> None:
    """A run that goes on has the patience that it had."""
    config = Config().replace(rounds={"patience": most}).rounds
    step, ended = Patience.of(config, 1000), None
    for number, each in enumerate(idle, 1):
        try:
            step = step.after(number, "nobody came" if each else "")
        except RunFailed:
            ended = number
            break
    longest = next((n for n in range(most, len(idle) + 1) if all(idle[n - most : n])), None)
    assert ended == longest
    if ended is None:
        assert Patience.of(config, 1000, [{"idle": "x" if each else ""} for each in idle]) == step


def test_a_run_that_failed_in_its_last_round_fails_again_when_it_is_resumed(tmp_path: Path) -> None:
    """There is nothing left to run, and nothing that could be called its result."""
    silent = dict.fromkeys(("client-0", "client-1", "client-2", "client-3"), "silent")
    for attempt in range(2):
        federation, store = built(tmp_path, Script(silent), resume=attempt > 0, run={"rounds": 3})
        with store, pytest.raises(RunFailed, match=r"round 3: no client sent a usable update.*\(3 rounds in a row were idle\)"):
            loop.run(federation, store)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_rule_that_keeps_few_updates_does_not_make_a_round_idle(tmp_path: Path) -> None:
    """The quorum counts what arrived; Krum keeps one of them."""
    names = {f"client-{k}": "honest" for k in range(4)}
    found = played(tmp_path, Script(names), run={"rounds": 1}, rounds={"least": 3}, robust={"rule": "krum", "hostile": 0})
    assert sorted(row["status"] for row in found) == ["excluded", "excluded", "excluded", "ok"]


def test_a_run_that_ended_below_quorum_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    engine = Script(dict.fromkeys(("client-0", "client-1", "client-2", "client-3"), "silent"))
    with pytest.raises(RunFailed, match="3 rounds in a row"):
        played(tmp_path, engine, run={"rounds": 6})
    federation, store = built(tmp_path, Script(), resume=True, run={"rounds": 6})
    with store:
        loop.run(federation, store)
    assert [bool(row["idle"]) for row in rows(tmp_path, "metrics.jsonl")] == [True, True, True, False, False, False]


# --- dropout and late replies -----------------------------------------------------------------------------------------


def test_dropout_is_drawn_by_client_and_round_and_costs_the_share_that_was_asked_for(tmp_path: Path) -> None:
    found = played(tmp_path, run={"rounds": 100}, clients={"dropout": 0.3}, eval={"every": 100})
    lost = [row for row in found if row["status"] == "failed"]
    assert all(row["reason"] == "sent nothing" for row in lost)
    assert 0.3 * 400 - 4 * 9.2 < len(lost) < 0.3 * 400 + 4 * 9.2  # four standard deviations, sqrt(400 * .3 * .7)
    again = played(tmp_path / "again", run={"rounds": 100}, clients={"dropout": 0.3}, eval={"every": 100})
    assert [row["status"] for row in again] == [row["status"] for row in found]


def test_a_late_reply_is_left_out_or_joins_the_next_round(tmp_path: Path) -> None:
    dropped = played(tmp_path / "drop", run={"rounds": 8}, clients={"late": 0.4})
    late = [(row["round"], row["client"]) for row in dropped if row["status"] == "late"]
    assert late
    assert all("is left out" in row["reason"] for row in dropped if row["status"] == "late")
    carried = played(tmp_path / "carry", run={"rounds": 8}, clients={"late": 0.4}, rounds={"late": "carry"})
    assert [(row["round"], row["client"]) for row in carried if "joins the next one" in row["reason"]] == late
    came = [(row["round"], row["client"]) for row in carried if row["reason"].startswith("its reply of round")]
    assert came == [(round + 1, client) for round, client in late if round < 8]
    assert final(tmp_path / "drop") != final(tmp_path / "carry")


def test_a_carried_reply_counts_as_a_reply_of_its_client(tmp_path: Path) -> None:
    """Only client-3, late in round 1, has slices 2 and 3: B there moves by 1 in round 2, when the reply counts, by hand."""
    config = {"run": {"rounds": 2}, "rounds": {"late": "carry"}}
    late_once = lambda self, what, share, client, round: what == "late" and (client, round) == ("client-3", 1)  # noqa: E731
    silent = Script()

    def from_round_2(metrics: dict) -> None:
        silent.mischief = {"client-3": "silent"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_happens", late_once)
        found = played(tmp_path, silent, from_round_2, **config)
    assert [(row["round"], row["status"]) for row in found if row["client"] == "client-3"] == [
        (1, "late"), (2, "failed"), (2, "ok")]  # fmt: skip
    B = Adapter.load(tmp_path / "run" / "adapter").layers["x"].B
    assert torch.equal(B[:, 2:], torch.ones_like(B[:, 2:]))


@pytest.mark.parametrize("method", ["rbla", "raflora", "stayput", "rolora", "flora", "hetlora"])
def test_late_replies_survive_a_stop_between_two_rounds(tmp_path: Path, method: str) -> None:
    config = {"run": {"rounds": 5}, "clients": {"late": 0.5}, "rounds": {"late": "carry"}, "method": method}
    whole = played(tmp_path / "whole", **config)
    for last in (1, 2, 3):

        def stop(metrics: dict, last: int = last) -> None:
            if metrics["round"] == last:
                raise KeyboardInterrupt

        folder = tmp_path / f"{last}"
        with pytest.raises(KeyboardInterrupt):
            played(folder, Script(), stop, **config)
        federation, store = built(folder, Script(), resume=True, **config)
        with store:
            loop.run(federation, store)
        assert rows(folder, "clients.jsonl") == whole
        assert final(folder) == final(tmp_path / "whole")


@pytest.mark.parametrize("method", ["raflora", "flexlora", "flora"])
def test_a_late_honest_reply_is_no_offence(method: str, tmp_path: Path, monkeypatch, cache) -> None:
    """Its length is measured in its own round: in the next one, an SVD has written the state in other factors."""
    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    config = Config().replace(
        run={"rounds": 8}, model={"name": "digits-mlp"}, clients={"count": 8, "participation": 1.0, "late": 0.3},
        train={"local_steps": 3}, rounds={"late": "carry"}, method={"name": method},
    )  # fmt: skip
    simulation.execute(config, tmp_path / "run")
    found = rows(tmp_path, "clients.jsonl")
    assert sum(row["reason"].startswith("its reply of round") and row["status"] == "ok" for row in found) > 0
    assert {row["status"] for row in found} <= {"ok", "late"}


def test_a_client_may_have_any_name_that_a_late_reply_is_not_stored_under(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clients.names: expected names without the character"):
        Config().replace(clients={"count": 1, "names": ("late\x1fada",)})


def test_where_slices_rotate_a_reply_is_not_carried_over(tmp_path: Path) -> None:
    found = played(tmp_path, run={"rounds": 6}, clients={"late": 0.5}, rounds={"late": "carry"}, method="stayput")
    told = [row for row in found if row["reason"].startswith("its reply of round") and "newer" not in row["reason"]]
    assert any("stayput has the client train other slices" in row["reason"] for row in told)
    for row in told:
        held = state_of(4)
        drawn = [slice_order(replace(held, round=row["round"] - ago), "x", row["client"], row["rank"], True) for ago in (1, 2)]
        assert (row["status"] == "ok") == (drawn[0] == drawn[1])


# --- the deadline -----------------------------------------------------------------------------------------------------


def forever() -> None:
    while True:
        time.sleep(0.01)


def busy() -> None:
    while True:
        sum(range(100))


def stubborn() -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # a client that handles whatever goes wrong in it
            continue


@pytest.mark.parametrize("act", [forever, busy, stubborn], ids=lambda act: act.__name__)
@pytest.mark.parametrize("where", ["in the main thread", "in another thread"])
def test_code_that_does_not_return_is_interrupted(act: Callable[[], None], where: str) -> None:
    ended = []

    def run() -> None:
        try:
            with limited(0.2):
                act()
        except Overdue:
            ended.append(True)

    if where == "in the main thread":
        run()
    else:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(30)
    assert ended == [True]


@pytest.mark.parametrize("where", ["in the main thread", "in another thread"])
def test_the_limit_ends_with_its_block(where: str) -> None:
    """Many blocks that end about when their time does: no exception arrives after a block, and nothing is left that waits."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for attempt in range(400):
                try:
                    with limited(0.001):
                        until = time.perf_counter() + 0.0009 + 0.000001 * (attempt % 200)
                        while time.perf_counter() < until:
                            pass
                except Overdue:
                    pass
                for _ in range(50):
                    pass
            time.sleep(0.6)  # longer than the time after which the exception would come again
        except BaseException as error:
            failed.append(error)

    if where == "in the main thread":
        run()
    else:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(120)
        assert not thread.is_alive()
    assert failed == []
    assert not [each for each in threading.enumerate() if each.name == "deadline"]


@pytest.mark.parametrize("stacking", ["never", "always"])
def test_a_client_that_hangs_or_dies_costs_its_reply(stacking: str, tmp_path: Path, monkeypatch, cache) -> None:
    from anyrank.training import local, stacked

    monkeypatch.setenv("ANYRANK_CACHE", str(cache))
    train, together = local.train, stacked.train

    def strange(model, client, *arguments):
        if client == "client-1":
            forever()
        if client == "client-2":
            sys.exit("a module that ends the process")
        return train(model, client, *arguments)

    def all_hang(*arguments) -> Iterator:
        yield next(together(*arguments))
        forever()

    monkeypatch.setattr(local, "train", strange)
    monkeypatch.setattr(stacked, "train", all_hang)
    config = Config().replace(
        run={"rounds": 1, "stacking": stacking}, model={"name": "digits-mlp"}, clients={"count": 4, "participation": 1.0},
        train={"local_steps": 1}, rounds={"deadline_s": 0.5},
    )  # fmt: skip
    simulation.execute(config, tmp_path / "run")
    found = {row["client"]: row for row in rows(tmp_path, "clients.jsonl")}
    if stacking == "never":
        assert [found[f"client-{k}"]["status"] for k in range(4)] == ["ok", "failed", "failed", "ok"]
        assert found["client-1"]["reason"] == "its training took longer than 0.5 s (rounds.deadline_s)"
        assert found["client-2"]["reason"].startswith("its training raised SystemExit")
    else:  # one reply came before the stack hung; of the others, each trains alone
        assert sum(row["status"] == "ok" for row in found.values()) in (2, 3)


# --- rest -------------------------------------------------------------------------------------------------------------


def test_who_is_rejected_again_and_again_rests_and_comes_back(tmp_path: Path) -> None:
    engine = Script({"client-2": "nan"})
    guard = OFF | {"offences": 2, "rest": 3}
    found = [row for row in played(tmp_path, engine, run={"rounds": 9}, guard=guard) if row["client"] == "client-2"]
    assert [row["status"] for row in found] == [*["rejected"] * 2, *["skipped"] * 3, *["rejected"] * 2, *["skipped"] * 2]
    assert found[2]["reason"] == "rests until round 5: 2 of its uploads were rejected"
    assert all("client-2" not in [job.client.name for job in jobs] for jobs in engine.seen[2:5])


@given(
    log=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ok", "rejected", "failed", "excluded", "stray"]))),
    offences=st.integers(0, 4), rest=st.integers(0, 4), cut=st.integers(0, 40),
)  # fmt: skip
def test_rest_is_a_function_of_the_log_wherever_a_run_was_cut(log: list, offences: int, rest: int, cut: int) -> None:
    lines = [{"client": client, "status": status, "round": n} for n, (client, status) in enumerate(log, 1)]
    whole, parts = Quarantine(offences, rest, lines), Quarantine(offences, rest, lines[:cut])
    parts.note(lines[cut:])
    for client in "abc":
        for round in range(len(lines) + 6):
            assert whole.until(client, round) == parts.until(client, round)
            if not (offences and rest):
                assert whole.until(client, round) == 0


def test_late_replies_that_join_a_round_are_no_offenders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule expects as many hostile clients less as were rejected, or rest: none here, whoever is late."""
    late_twice = lambda self, what, share, client, round: what == "late" and client == "client-3" and round < 3  # noqa: E731
    expected = []
    monkeypatch.setattr(Federation, "_happens", late_twice)
    monkeypatch.setattr(Chain, "without", lambda self, hostile: expected.append(hostile) or self)
    found = played(tmp_path, run={"rounds": 3}, rounds={"late": "carry"})
    assert next(row["reason"] for row in found if row["client"] == "client-3" and row["status"] == "ok") == (
        "its reply of round 1 counts"
    )
    assert expected == [0, 0, 0]


def test_only_what_the_guard_rejects_is_an_offence(tmp_path: Path) -> None:
    """Clients that crash, stay silent or are excluded by a rule are not hostile for that."""
    guard = OFF | {"offences": 1, "rest": 5}
    found = played(tmp_path, Script({"client-1": "crashes", "client-2": "silent"}), run={"rounds": 3}, guard=guard)
    assert {row["status"] for row in found if row["client"] in ("client-1", "client-2")} == {"failed"}


# --- merges that cannot be kept ---------------------------------------------------------------------------------------


def test_a_merge_that_is_not_finite_leaves_the_state_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyrank.methods.rbla import RBLA

    merge, broken = RBLA.merge_layer, []

    def sometimes(self, state, name, parts):
        layer = merge(self, state, name, parts)
        if state.round + 1 == 2:
            broken.append(True)
            return layer.with_factors(layer.A, layer.B * float("inf"))
        return layer

    monkeypatch.setattr(RBLA, "merge_layer", sometimes)
    played(tmp_path / "rolled back", run={"rounds": 3})
    assert broken
    idle = [row["idle"] for row in rows(tmp_path / "rolled back", "metrics.jsonl")]
    assert [bool(reason) for reason in idle] == [False, True, False]
    assert idle[1].startswith("what finite uploads merge to is not finite")
    B = Adapter.load(tmp_path / "rolled back" / "run" / "adapter").layers["x"].B
    assert torch.equal(B, torch.full_like(B, 2.0))  # of rounds 1 and 3
    with pytest.raises(RunFailed, match="round 2: what finite uploads merge to is not finite"):
        played(tmp_path / "ended", run={"rounds": 3}, guard=OFF | {"rollback": False})


# --- single owners ----------------------------------------------------------------------------------------------------


def state_of(rank: int) -> ServerState:
    A = torch.arange(rank * 3, dtype=torch.float64).reshape(rank, 3)
    return ServerState(
        0, 0, Adapter({"x": LoraLayer(A, torch.ones(2, rank, dtype=torch.float64), 1.0)}), Scaling(1.0, "constant")
    )


def moved_by(state: ServerState, ranks: dict[str, int], by: float, method) -> tuple[list[Job], list[ClientUpdate]]:
    jobs, updates = [], []
    for name, rank in ranks.items():
        download: Download = method.dispatch(state, Client(name, rank))
        layer = download.adapter.layers["x"]
        jobs.append(Job(Client(name, rank), 1, lambda download=download: download))
        updates.append(ClientUpdate(Adapter({"x": layer.with_factors(layer.A + by, layer.B + by)}), 1, name))
    return jobs, updates


def test_a_single_owner_has_half_of_the_weight_on_its_slices() -> None:
    """By hand: slices 0 and 1 are owned by both and move by 1; slices 2 and 3 by one client, and move by a half."""
    state, method = state_of(4), methods.make("rbla")
    jobs, updates = moved_by(state, {"small": 2, "large": 4}, 1.0, method)
    after = method.aggregate(state, SingleOwner(0.5, method.lone_weight).screen(state, jobs, updates).updates)
    expected = torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(after.adapter.layers["x"].A - state.adapter.layers["x"].A, expected[:, None].expand(4, 3))
    torch.testing.assert_close(after.adapter.layers["x"].B - state.adapter.layers["x"].B, expected.expand(2, 4))


@pytest.mark.parametrize("name", ["flexlora", "zeropad", "fedavg", "stayput"])
def test_methods_that_give_a_single_owner_its_share_alone_are_left_as_they_are(name: str) -> None:
    """Of two clients of equal weight, each has half already."""
    state, method = state_of(4), methods.make(name)
    jobs, updates = moved_by(state, {"small": 2, "large": 4}, 1.0, method)
    kept = SingleOwner(0.5, method.lone_weight).screen(state, jobs, updates).updates
    assert all(one is other for one, other in zip(kept, updates, strict=True))


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=6), most=st.floats(0.05, 1.0))
def test_no_single_owner_moves_a_slice_by_more_than_its_weight(ranks: list[int], most: float) -> None:
    """A hostile client of any rank moves a slice that nobody else has by `most` of what it sends."""
    state, method = state_of(4), methods.make("rbla")
    by_name = {f"c{k}": rank for k, rank in enumerate(ranks)}
    jobs, updates = moved_by(state, by_name, 8.0, method)
    after = method.aggregate(state, SingleOwner(most, method.lone_weight).screen(state, jobs, updates).updates)
    moved = (after.adapter.layers["x"].B - state.adapter.layers["x"].B)[0]
    owners = [sum(rank > j for rank in ranks) for j in range(4)]
    for j, count in enumerate(owners):
        full = 8.0 if count else 0.0
        expected = full * most if count == 1 and len(ranks) > 1 else full
        assert float(moved[j]) == pytest.approx(expected)


def test_all_methods_say_what_a_single_owner_weighs() -> None:
    """`lone_weight` is what the method does: a step on a slice that one of two equal clients has, as the new state has it."""
    for name in ("rbla", "ffa_lora", "rolora", "zeropad"):
        method = methods.make(name)
        state = replace(method.init(state_of(4).adapter, Scaling(1.0, "constant"), 0), round=0)
        jobs, updates = moved_by(state, {"small": 2, "large": 4}, 1.0, method)
        for index, (job, update) in enumerate(zip(jobs, updates, strict=True)):
            sent, got = job.download.adapter.layers["x"], update.adapter.layers["x"]
            A = got.A if "A" in job.download.train else sent.A
            B = got.B if "B" in job.download.train else sent.B
            updates[index] = replace(update, adapter=Adapter({"x": sent.with_factors(A, B)}))
        after = method.aggregate(state, updates).adapter.layers["x"]
        moved = float((after.B - state.adapter.layers["x"].B)[0, 3])
        if name == "zeropad":  # whoever lacks the slice counts as zero: half of what was held is lost
            moved += 0.5 * float(state.adapter.layers["x"].B[0, 3])
        assert moved == pytest.approx(method.lone_weight(0.5)), name


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"rounds": {"least": 0}}, "rounds.least: expected a whole number of at least 1, got 0"),
        ({"rounds": {"share": 1.5}}, "rounds.share: expected a share from 0 to 1, got 1.5"),
        ({"rounds": {"deadline_s": -1.0}}, "rounds.deadline_s: expected 0.01 to 10,000,000 seconds, or 0 for no limit"),
        ({"rounds": {"deadline_s": float("nan")}}, "rounds.deadline_s"),
        ({"rounds": {"deadline_s": 1e-6}}, "rounds.deadline_s: expected 0.01 to"),
        ({"rounds": {"deadline_s": 1e300}}, "rounds.deadline_s: expected 0.01 to"),
        ({"rounds": {"late": "wait"}}, "rounds.late: expected one of drop, carry"),
        ({"rounds": {"patience": 0}}, "rounds.patience"),
        ({"clients": {"dropout": 1.0}}, "clients.dropout: expected a share of at least 0, below 1, got 1.0"),
        ({"clients": {"late": -0.1}}, "clients.late"),
        ({"guard": {"owner": 0.0}}, "guard.owner: expected a share above 0, at most 1, got 0.0"),
        ({"guard": {"norm": float("inf")}}, "guard.norm"),
        ({"guard": {"norm": float("nan")}}, "guard.norm"),
        ({"guard": {"offences": -1}}, "guard.offences"),
    ],
)
def test_values_out_of_range_are_one_line(sections: dict, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Config().replace(**sections)
    assert says in str(refused.value)
