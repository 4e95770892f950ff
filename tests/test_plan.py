"""`anyrank plan`: the figures of a run before it is made, checked against the run itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anyrank import simulation
from anyrank.config.sections import Config
from anyrank.studies import forecast

MLP = Config().replace(run={"rounds": 2}, model={"name": "digits-mlp"}, train={"local_steps": 3})


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("method", ["raflora", "ffa_lora", "fedsa"])
def test_bytes_are_those_of_the_run_where_all_take_part(method: str, tmp_path: Path) -> None:
    config = MLP.replace(clients={"participation": 1.0}, method={"name": method})
    told, made = forecast.cost(config, measure=False), simulation.execute(config, tmp_path / "run")
    assert (told["upload_bytes"], told["download_bytes"]) == (made["upload_bytes"], made["download_bytes"])
    assert (told["clients"], told["cohort"]) == (made["clients"], made["cohort"])
    assert {str(level["rank"]): level["clients"] for level in told["levels"]} == made["ranks"]


def test_parameters_are_counted_by_what_is_trained() -> None:
    """Two layers 64 x 64: rank r trains r · 64 numbers of each factor in each; a trained head adds 10 · 64 + 10."""
    by_rank = lambda config: {  # noqa: E731
        level["rank"]: level["trainable_parameters"] for level in forecast.cost(config, measure=False)["levels"]
    }
    assert by_rank(MLP) == {rank: 2 * 2 * 64 * rank for rank in (2, 4, 8, 16, 32)}
    assert by_rank(MLP.replace(method={"name": "ffa_lora"}))[8] == 2 * 64 * 8
    assert by_rank(MLP.replace(model={"head": "trained"}))[8] == 2 * 2 * 64 * 8 + 650


def test_the_time_is_that_of_the_steps_of_the_clients_of_a_round() -> None:
    told = forecast.cost(MLP.replace(clients={"count": 40, "participation": 0.5}))
    assert all(level["step_s"] > 0 for level in told["levels"])
    expected = sum(3 * 4 * level["step_s"] for level in told["levels"])  # 3 steps of 4 of each rank's 8 clients
    assert told["round_s"] == pytest.approx(expected)
    assert told["training_s"] == pytest.approx(2 * expected)
    assert forecast.cost(MLP, measure=False)["training_s"] is None


def test_epochs_are_counted_by_the_clients_examples() -> None:
    sampled = Config().replace(model={"name": "digits-mlp"}, train={"local_epochs": 3, "local_steps": 0})
    partition = {"kind": "sampled", "examples_per_client": 40}
    config = sampled.replace(data={"partition": type(sampled.data.partition)(**partition)})
    assert forecast.cost(config, measure=False)["local_steps"] == 3 * 3  # ceil(40 / 16) batches, three times


def test_adapters_kept_for_private_clients_count_as_memory() -> None:
    keeps, drops = (forecast.cost(MLP.replace(method={"name": name}), measure=False) for name in ("local-only", "raflora"))
    assert keeps["memory_bytes"]["kept_for_clients"] > 0
    assert drops["memory_bytes"]["kept_for_clients"] == 0


def limits(**sections: dict) -> dict:
    return forecast.cost(MLP.replace(**sections), measure=False)["guard"]


def test_the_limits_on_one_client_are_those_that_hold_in_the_run() -> None:
    told = limits(guard={"norm": 4.0, "far": 9.0, "owner": 0.5})
    assert (told["norm"], told["far"], told["owner"], told["rule"], told["off"], told["uploads"]) == (
        4.0,
        9.0,
        0.5,
        None,
        "",
        1,
    )
    none = limits(guard={"norm": 0.0, "far": 0.0})
    assert (none["norm"], none["far"], none["off"]) == (None, None, "")
    assert limits(guard={"owner": 1.0})["owner"] is None
    assert limits(robust={"rule": "krum"})["rule"] == "krum"
    half = limits(clients={"participation": 0.5}, rounds={"share": 0.25})
    assert half["uploads"] == 3  # a quarter of 10 of 20 clients, rounded up


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"method": {"name": "local-only"}}, "local-only makes no mean of uploads"),
        ({"method": {"name": "centralized"}}, "centralized makes no mean of uploads"),
        (
            {
                "method": {"name": "rbla"},
                "privacy": {"level": "client", "epsilon": 8.0, "delta": 1e-3, "noise_at": "server"},
            },
            "the noise at the server is computed for public weights",
        ),
    ],
)
def test_why_there_is_no_limit_on_steps(sections: dict, reason: str) -> None:
    told = limits(**sections)
    assert (told["norm"], told["owner"], told["off"]) == (None, None, reason)
    assert told["offences"] == 3, "uploads are checked all the same"


def test_clients_that_drop_out_are_not_expected_to_upload(tmp_path: Path) -> None:
    every = MLP.replace(method={"name": "rbla"}, clients={"participation": 1.0})
    config = every.replace(clients={"participation": 1.0, "dropout": 0.25}, run={"rounds": 12})
    told, full = (forecast.cost(each, measure=False) for each in (config, every.replace(run={"rounds": 12})))
    assert told["upload_bytes"] == pytest.approx(0.75 * full["upload_bytes"])
    assert told["download_bytes"] == full["download_bytes"]
    made = simulation.execute(config, tmp_path / "run")
    assert made["download_bytes"] == told["download_bytes"]
    # 240 draws of ranks 2 to 32: one draw deviates by 0.43 x 16 kB at the root mean square, the sum by 240**0.5 times that
    assert made["upload_bytes"] == pytest.approx(told["upload_bytes"], rel=0.2)


MILLION = """
[run]
rounds = 1000
[model]
name = "digits-mlp"
[data]
partition = { kind = "sampled", examples_per_client = 40 }
[clients]
count = 1000000
participation = 0.001
"""


def plan_of(folder: Path, clients: int) -> tuple[dict, float, float]:
    """The plan of so many clients, 1,000 of them a round, with its CPU seconds and its peak memory in kilobytes."""
    text = MILLION.replace("count = 1000000", f"count = {clients}").replace("0.001", str(1000 / clients))
    (folder / "million.toml").write_text(text)
    program = """
import sys, time
from anyrank.cli import main
sys.argv[1:] = ["plan", "million.toml", "--json"]
try:
    main()
except SystemExit as end:
    assert not end.code
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time(), peak, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, kilobytes = map(float, done.stderr.split()[-2:])
    return json.loads(done.stdout), seconds, kilobytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak memory of a process by itself")
def test_a_million_clients_on_paper(tmp_path: Path) -> None:
    """In seconds, in the memory that 1,000 clients take but for a few arrays of eight bytes a client; nothing is written."""
    _, _, few = plan_of(tmp_path, 1_000)
    told, seconds, many = plan_of(tmp_path, 1_000_000)
    assert (told["clients"], told["cohort"], told["rounds"]) == (1_000_000, 1000, 1000)
    assert {level["clients"] for level in told["levels"]} == {200_000}
    assert sum(told["memory_bytes"].values()) < 100e6
    assert seconds < 30
    assert many - few < 60_000, "kilobytes: seven arrays of a million numbers"
    assert [path.name for path in tmp_path.iterdir()] == ["million.toml"]


GUARD = ("--set", "guard.norm=4", "--set", "guard.far=9")


def test_the_tables_show_it_and_wrong_requests_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "million.toml").write_text(MILLION)
    call = lambda *more: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "anyrank", "plan", "million.toml", "--no-measure", *more],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    shown = call("--set", "clients.count=1000", "--set", "clients.participation=0.005", *GUARD).stdout
    assert "1,000 registered, 5 per round" in shown
    assert "not measured" in shown
    shown = " ".join(shown.replace("│", " ").split())
    assert "guard steps at most 4 x the median, more than 9 x rejected, single owners at most 0.5;" in shown
    assert "5 rounds of rest after 3 rejected uploads; rounds need 1 of 5 uploads" in shown
    for change, message in (("clients.ranks=[2, 65]", "rank 65: expected at most 64"), ("trian.x=1", "did you mean 'train'")):
        refused = call("--set", change)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
