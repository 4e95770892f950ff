"""The round loop, with clients that a test can make misbehave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from anyrank import methods, report, simulation
from anyrank.adapter.adapter import Adapter
from anyrank.adapter.layer import LoraLayer
from anyrank.config.sections import Config, PartitionConfig
from anyrank.errors import ConfigError, ModelError, RunFailed
from anyrank.federation import asking, intake, loop
from anyrank.federation.cohort import Population
from anyrank.federation.federation import Federation
from anyrank.messages.plan import Plan, plan_round
from anyrank.messages.records import Client, ClientUpdate, Code, Facts, Failure, Job, Scaling, Scores
from anyrank.runs.folder import RunDir


@dataclass
class Script:
    """An engine whose clients add 1 to every entry of B, but for those that `mischief` names."""

    mischief: dict[str, str] = field(default_factory=dict)
    seen: list[list[Job]] = field(default_factory=list)

    def start(self, rank: int, scaling: Scaling, seed: int) -> Adapter:
        layer = LoraLayer(
            torch.ones(rank, 6, dtype=torch.float64), torch.zeros(5, rank, dtype=torch.float64), scaling.of("x", rank)
        )
        return Adapter({"x": layer})

    def train(
        self, jobs: Sequence[Job], plan: Plan, mechanism: None = None, deadline_s=None
    ) -> Iterator[ClientUpdate | Failure]:
        self.seen.append(list(jobs))
        for job in reversed(jobs):  # replies come in any order
            deed = self.mischief.get(job.client.name, "honest")
            if deed == "silent":
                continue
            if deed == "crashes":
                yield Failure(job.client.name, Code.OUT_OF_MEMORY)
                continue
            layer = job.download.adapter.layers["x"]
            B = layer.B + (float("nan") if deed == "nan" else 1.0)
            A = layer.A[:, :3] if deed == "shape" else layer.A
            name, count = job.client.name, job.num_examples * (1000 if deed == "boasts" else 1)
            update = ClientUpdate(Adapter({"x": LoraLayer(A, B, layer.scaling)}), count, name, {"loss": 1.0})
            if deed == "stranger first":
                yield replace(update, client="mallory")
            yield update
            if deed == "twice":
                yield replace(update, adapter=Adapter({"x": LoraLayer(A, B + 5.0, layer.scaling)}))
        if "late" in self.mischief.values():
            yield Failure("client-of-yesterday", Code.LATE)
            yield ClientUpdate(Adapter({"x": LoraLayer(A, B, layer.scaling)}), 1)

    def close(self) -> None:
        pass

    def evaluate(self, adapter: Adapter, merged: Adapter | None) -> Scores:
        loss = float(adapter.layers["x"].delta().abs().sum())
        return Scores(np.array([True, False]), np.array([loss, loss]), np.array([0, 1]))


def build(
    tmp_path: Path, engine: Script, sizes: Sequence[int] = (3, 1, 2, 4), ranks=(1, 2, 2, 4), method="rbla", resume=False, **run
):
    config = Config().replace(run={"rounds": 2, **run}, clients={"count": len(sizes), "participation": 1.0})
    population = Population(np.array(ranks), np.array(sizes), len(sizes), config.run.seed)
    built = Federation(config, methods.make(method), population, engine, Facts("a script"))
    return built, RunDir.open(tmp_path / "run", config, resume)


def rows(tmp_path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("deed", "status", "reason"),
    [
        ("nan", "rejected", "layer x, B: contains NaN"),
        ("shape", "rejected", "layer x, A: expected"),
        ("boasts", "rejected", "reports 1000 examples, but 1 are registered"),
        ("crashes", "failed", "out of memory"),
        ("silent", "failed", "sent nothing"),
    ],
)
def test_one_bad_client_costs_one_client(tmp_path: Path, deed: str, status: str, reason: str) -> None:
    built, store = build(tmp_path, Script({"client-1": deed}))
    loop.run(built, store)
    bad = [row for row in rows(tmp_path, "clients.jsonl") if row["client"] == "client-1"]
    assert [row["status"] for row in bad] == [status, status]
    assert reason in bad[0]["reason"]
    metrics = rows(tmp_path, "metrics.jsonl")
    assert [(row["clients"], row["rejected"]) for row in metrics] == [(3, 1), (3, 1)]
    assert all(np.isfinite(row["loss"]) for row in metrics)


@pytest.mark.parametrize(
    ("deed", "strays"),
    [
        ("twice", [("client-1", "a second reply in this round: the first one counts")]),
        ("stranger first", [("mallory", "unexpected: its sender has no job in this round")]),
        ("late", [(name, "unexpected: its sender has no job in this round") for name in ("", "client-of-yesterday")]),
    ],
)
def test_a_reply_that_nobody_waits_for_is_a_row_and_changes_nothing(tmp_path: Path, deed: str, strays: list) -> None:
    built, store = build(tmp_path / "a", Script({"client-1": deed}))
    loop.run(built, store)
    honest, store = build(tmp_path / "b", Script())
    loop.run(honest, store)
    a, b = (Adapter.load(tmp_path / side / "run" / "adapter").layers["x"] for side in "ab")
    assert torch.equal(a.B, b.B)
    found = [row for row in rows(tmp_path / "a", "clients.jsonl") if row["round"] == 1 and row["status"] == "stray"]
    assert [(row["client"], row["reason"]) for row in found] == strays
    assert all(row["rank"] is None and row["num_examples"] is None for row in found)
    assert rows(tmp_path / "a", "metrics.jsonl")[0]["rejected"] == len(strays)
    assert rows(tmp_path / "a", "metrics.jsonl")[0]["clients"] == 4
    page = report.build([tmp_path / "a" / "run"], tmp_path / "page.html").read_text()
    assert strays[0][1] in page


def test_a_download_is_made_when_it_is_sent_and_let_go_when_it_is_judged(tmp_path: Path) -> None:
    """Clients that train one after another: never more than one download is held."""
    built, _ = build(tmp_path, Script())
    held, most = [], []

    def counted(method, state, client):
        held.append(client.name)
        return method.dispatch(state, client)

    jobs = [Job(Client(f"client-{i}", 1), n, partial(counted, built.method, loop.start(built), Client(f"client-{i}", 1)))
            for i, n in enumerate((3, 1, 2, 4))]  # fmt: skip
    assert held == []

    def watched(replies):
        for reply in replies:
            most.append(sum(job._made is not None for job in jobs))
            yield reply

    collected = intake.collect(watched(built.engine.train(jobs, None)), jobs, [], 1)
    assert most == [1, 1, 1, 1]
    assert sorted(held) == [f"client-{i}" for i in range(4)]
    assert all(job._made is None for job in jobs)
    assert len(collected.updates) == 4


def test_the_bad_client_leaves_no_trace_in_the_result(tmp_path: Path) -> None:
    """Rejecting client 1 gives the very state of a federation that it never belonged to."""
    with_bad, store = build(tmp_path / "a", Script({"client-1": "nan"}))
    loop.run(with_bad, store)
    without, store = build(tmp_path / "b", Script(), sizes=(3, 0, 2, 4))
    loop.run(without, store)
    a, b = (Adapter.load(tmp_path / side / "run" / "adapter").layers["x"] for side in "ab")
    assert torch.equal(a.A, b.A)
    assert torch.equal(a.B, b.B)


def test_rounds_in_which_all_fail_end_the_run_when_patience_is_over_and_the_checkpoint_stands(tmp_path: Path) -> None:
    engine = Script()
    built, store = build(tmp_path, engine, rounds=9)

    def then_break(metrics: dict) -> None:
        engine.mischief = dict.fromkeys(("client-0", "client-1", "client-2", "client-3"), "nan")

    says = r"round 4: no client sent a usable update; client-0: layer x, B: contains NaN .*\(3 rounds in a row were idle\)"
    with pytest.raises(RunFailed, match=says):
        loop.run(built, store, then_break)
    state = store.restore()
    assert (state.round, [row["round"] for row in rows(tmp_path, "metrics.jsonl")]) == (4, [1, 2, 3, 4])
    of_round_1 = torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64)  # the last two slices have one owner: half its weight
    assert torch.equal(state.adapter.layers["x"].B, of_round_1.expand(5, 4))
    assert [bool(row["idle"]) for row in rows(tmp_path, "metrics.jsonl")] == [False, True, True, True]


def test_a_run_of_idle_rounds_alone_fails_however_short_it_is(tmp_path: Path) -> None:
    built, store = build(tmp_path, Script(dict.fromkeys(("client-0", "client-1", "client-2", "client-3"), "nan")), rounds=1)
    with pytest.raises(RunFailed, match="round 1: no client sent a usable update"):
        loop.run(built, store)


def test_clients_without_examples_are_skipped_and_said_so(tmp_path: Path) -> None:
    built, store = build(tmp_path, engine := Script(), sizes=(3, 0, 2, 4))
    loop.run(built, store)
    assert {job.client.name for jobs in engine.seen for job in jobs} == {"client-0", "client-2", "client-3"}
    skipped = [row for row in rows(tmp_path, "clients.jsonl") if row["status"] == "skipped"]
    assert [(row["round"], row["client"], row["reason"]) for row in skipped] == [
        (1, "client-1", "has no examples"),
        (2, "client-1", "has no examples"),
    ]
    assert rows(tmp_path, "metrics.jsonl")[0]["rejected"] == 0


def test_bytes_are_those_of_the_downloads_and_of_the_uploads_that_were_used(tmp_path: Path) -> None:
    """Ranks 1, 2, 2, 4 of a [5, 6] layer in float64: 11 numbers a rank, 8 bytes each; client 1 (rank 2) is rejected."""
    built, store = build(tmp_path, Script({"client-1": "nan"}))
    loop.run(built, store)
    first = rows(tmp_path, "metrics.jsonl")[0]
    assert first["download_bytes"] == (1 + 2 + 2 + 4) * 11 * 8
    assert first["upload_bytes"] == (1 + 2 + 4) * 11 * 8


def test_ffa_lora_moves_half_of_the_numbers_each_way(tmp_path: Path) -> None:
    """Only B `[5, r]` travels: 5 numbers a rank."""
    built, store = build(tmp_path, Script(), method="ffa_lora")
    loop.run(built, store)
    first = rows(tmp_path, "metrics.jsonl")[0]
    assert (first["upload_bytes"], first["download_bytes"]) == (9 * 5 * 8, 9 * 5 * 8)


def test_cohorts_are_drawn_by_seed_and_round_and_do_not_depend_on_the_method() -> None:
    population = Population(np.full(1000, 4), np.ones(1000, dtype=int), 10, seed=3)
    again = replace(population, ranks=np.full(1000, 2))
    assert population.draw(1) == again.draw(1)
    assert population.draw(1) != population.draw(2)
    assert replace(population, seed=4).draw(1) != population.draw(1)
    drawn = population.draw(1)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10


def test_every_client_takes_part_about_equally_often() -> None:
    """20 clients, 5 a round, 2,000 rounds: 500 times each, with a standard deviation of sqrt(2000 * 1/4 * 3/4) = 19.4."""
    population = Population(np.full(20, 4), np.ones(20, dtype=int), 5, seed=0)
    counts = np.bincount(np.concatenate([population.draw(round) for round in range(2000)]), minlength=20)
    assert abs(counts - 500).max() < 5 * 19.4


def test_learning_rates_fall_by_their_schedule() -> None:
    """From 0.1 to 0.01 over 5 rounds; the cosine is half way in the middle, as the line is."""
    train = replace(Config().train, learning_rate=0.1, final_learning_rate=0.01)
    rates = {
        s: [plan_round(replace(train, schedule=s), r, 5, 0).learning_rate for r in (1, 3, 5)]
        for s in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == pytest.approx([0.1, 0.1, 0.1])
    assert rates["linear"] == pytest.approx([0.1, 0.055, 0.01])
    assert rates["cosine"] == pytest.approx([0.1, 0.055, 0.01])


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


MLP = Config().replace(model={"name": "digits-mlp"}, run={"rounds": 3})


def test_ten_thousand_registered_clients_are_a_config_like_any_other(tmp_path: Path) -> None:
    """Nothing that is kept or written grows with the clients that are not drawn."""
    config = MLP.replace(
        clients={"count": 10_000, "participation": 0.001, "ranks": (2, 4, 8)},
        data={"partition": PartitionConfig(kind="sampled", examples_per_client=30)},
    )
    summary = simulation.execute(config, tmp_path / "run")
    assert (summary["clients"], summary["cohort"]) == (10_000, 10)
    assert len(rows(tmp_path, "clients.jsonl")) == 3 * 10
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoint").iterdir())
    assert size < 2 * 4 * 8 * (128 + 128) + 4_000, "the checkpoint holds one adapter of rank 8 and nothing for each client"


def test_collapse_and_its_cure_on_the_digits(tmp_path: Path) -> None:
    """After 20 rounds on three seeds: FlexLoRA's energy past rank 2 below raFLoRA's, zero-padding's accuracy below RBLA's."""
    results = {}
    for method in ("zeropad", "flexlora", "rbla", "raflora"):
        for seed in range(3):
            config = MLP.replace(run={"rounds": 20, "seed": seed}, method={"name": method}, eval={"every": 20})
            results[method, seed] = simulation.execute(config, tmp_path / method / str(seed))
    mean = lambda method, figure: np.mean([results[method, seed][figure] for seed in range(3)])  # noqa: E731
    assert mean("flexlora", "collapse") < 0.2
    assert mean("raflora", "collapse") > 0.4
    assert mean("raflora", "accuracy") > mean("zeropad", "accuracy") + 0.2
    assert mean("rbla", "accuracy") > mean("zeropad", "accuracy") + 0.1
    assert mean("raflora", "accuracy") > mean("flexlora", "accuracy")


def test_centralized_has_all_examples_and_a_cohorts_steps() -> None:
    built = simulation.build(MLP.replace(method={"name": "centralized"}))
    assert len(built.population) == 1
    assert built.population.sizes.tolist() == [built.facts.train_examples]
    assert built.step_factor == 5  # a quarter of 20 clients
    assert built.population.levels() == [32]


def test_local_only_never_mixes_clients(tmp_path: Path) -> None:
    config = MLP.replace(method={"name": "local-only"}, clients={"count": 4, "participation": 0.5})
    simulation.execute(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["collapse"] is None, "there is no global update to look at"
    assert summary["download_bytes"] == 0


def test_fedprox_holds_clients_nearer_to_where_they_started(tmp_path: Path) -> None:
    def moved(mu: float) -> float:
        built = simulation.build(
            MLP.replace(train={"proximal_mu": mu, "optimizer": "sgd", "learning_rate": 0.05, "local_steps": 30})
        )
        state = loop.start(built)
        jobs, _ = asking.dispatch(built, state, 1)
        plan = plan_round(built.config.train, 1, 3, 0)
        updates = list(built.engine.train(jobs, plan))
        built.close()
        return sum(float(layer.delta().norm()) for u in updates for layer in u.adapter.layers.values())

    assert moved(1.0) < moved(0.1) < moved(0.0)


def test_local_epochs_see_every_example_once_each(tmp_path: Path) -> None:
    from anyrank.training.local import batches

    train = replace(Config().train, local_epochs=2, local_steps=0, batch_size=4)
    drawn = batches(10, plan_round(train, 1, 3, 0), "client-1")
    assert [len(batch) for batch in drawn] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate(drawn[:3])) == list(range(10))
    assert sorted(np.concatenate(drawn[3:])) == list(range(10))


def test_local_steps_go_round_a_small_client(tmp_path: Path) -> None:
    """3 examples, batches of 16 wanted: every step takes the 3 there are."""
    from anyrank.training.local import batches

    drawn = batches(3, plan_round(Config().train, 1, 3, 0), "client-1")
    assert [sorted(batch) for batch in drawn] == [[0, 1, 2]] * 10


def test_a_diverging_client_sends_nothing(tmp_path: Path) -> None:
    config = MLP.replace(train={"optimizer": "sgd", "learning_rate": 1e30})
    with pytest.raises(RunFailed, match="lower train.learning_rate"):
        simulation.execute(config, tmp_path / "run")


@pytest.mark.parametrize("rank", [65, 1000])
def test_a_rank_above_the_layer_is_refused(rank: int) -> None:
    with pytest.raises(ModelError, match=rf"rank {rank}: expected at most 64"):
        simulation.build(MLP.replace(clients={"ranks": (2, rank)}))


def test_fedavg_refuses_mixed_ranks_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"fedavg needs clients of one rank.*raflora"):
        simulation.build(MLP.replace(method={"name": "fedavg"}))
