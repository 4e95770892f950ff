"""A private run: what it spends, what it writes, and that killing it changes neither. The processes here are really killed."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import stat
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from anyrank import config as configs
from anyrank import report, simulation
from anyrank.cli import main
from anyrank.errors import ModelError, RunError
from anyrank.privacy import noise
from anyrank.privacy.accountants import noise_for
from anyrank.privacy.plan import plan_privacy
from anyrank.runs.folder import RunDir
from anyrank.training import trainer
from test_resume import MOMENTS, PRELUDE, files

ROUNDS, STEPS = 5, 3
CONFIG = f"""
[run]
name = "private"
rounds = {ROUNDS}
[model]
name = "digits-mlp"
[data.partition]
kind = "iid"
[clients]
count = 8
participation = 0.5
ranks = [1, 2, 8]
[train]
local_steps = {STEPS}
batch_size = 16
[method]
name = "ffa_lora"
[privacy]
level = "example"
epsilon = 3.0
delta = 1e-5
"""
MOMENTS = MOMENTS | {
    "after the charge, before anyone trains": """
charge = rundir.RunDir.charge
def patched(self, rows):
    charge(self, rows)
    if next(calls) == 3: die()
rundir.RunDir.charge = patched
""",
    "half way through a line of the ledger": """
append = rundir.RunDir._append
def patched(self, name, rows):
    if name == rundir.LEDGER and next(calls) == 3:
        with open(self.path / name, "ab") as file: file.write(b'{"round": 3, "cli'); file.flush(); os.fsync(file.fileno())
        die()
    append(self, name, rows)
rundir.RunDir._append = patched
""",
    "before the plan is kept": """
keep = rundir.RunDir.keep_plan
def patched(self, plan, key):
    key(); die()
rundir.RunDir.keep_plan = patched
""",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("privacy")
    (folder / "private.toml").write_text(CONFIG)
    return folder


@pytest.fixture(autouse=True)
def keys(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Noise keys go to a folder of the test; the secret makes runs comparable byte by byte."""
    monkeypatch.setenv("XDG_STATE_HOME", str(workplace / "state"))
    monkeypatch.setenv("ANYRANK_CACHE", str(workplace / "cache"))
    monkeypatch.setenv(noise.SEED, "0123456789abcdef" * 2)
    return workplace / "state" / "anyrank" / "privacy"


def test_a_secret_of_ones_own_and_a_deadline_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with one key, in one of which a client is late: from then on, the same noise would hide other values."""
    config = {"rounds": {"deadline_s": 30.0}}
    monkeypatch.delenv(noise.SEED, raising=False)
    assert len(noise.new_key(config)) == 32
    monkeypatch.setenv(noise.SEED, "x" * 32)
    assert noise.new_key({"rounds": {"deadline_s": 0.0}}) == noise.new_key({"rounds": {"deadline_s": 0.0}})
    with pytest.raises(RunError, match=r"with rounds\.deadline_s, another client may be late in a second run"):
        noise.new_key(config)


def command(workplace: Path, out: str, *arguments: str, prelude: str = "") -> tuple[int, str]:
    """`anyrank run` in a process of its own: its exit status (minus the signal that ended it), and what it said."""
    said = workplace / f"{out}.err"
    child = os.fork()
    if not child:  # everything is loaded already, so that a process costs milliseconds
        status = 70
        try:
            with open(said, "w") as file:
                sys.stdout, sys.stderr = io.StringIO(), file
                os.chdir(workplace)
                sys.argv[1:] = ["run", "private.toml", "--out", out, "--json", *arguments]
                report.build = lambda runs, page: page  # it has tests of its own
                exec(prelude, {})
                main()
        except SystemExit as done:
            status = done.code or 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text()


def run(workplace: Path, out: str, *overrides: str) -> dict:
    """A run in this process; its summary."""
    chosen = configs.load(workplace / "private.toml", overrides)
    return simulation.execute(chosen, workplace / out, resume=True)


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Callable[[], tuple[dict[str, bytes], dict]]:
    """The files and the summary of a run that nobody disturbed."""
    made: list[tuple[dict[str, bytes], dict]] = []

    def make() -> tuple[dict[str, bytes], dict]:
        if not made:
            summary = run(workplace, "whole")
            made.append((files(workplace / "whole"), summary))
        return made[0]

    return make


@functools.cache
def library_epsilon(sampling_rate: float, noise_multiplier: float, steps: int) -> float:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier)), steps)
    return accountant.get_epsilon(1e-5)


def epsilon_of(charges: list[dict]) -> float:
    kinds = {(row["sampling_rate"], row["noise_multiplier"]) for row in charges}
    assert len(kinds) <= 1, "a client has one sampling rate and one noise for the whole run"
    return library_epsilon(*kinds.pop(), sum(row["steps"] for row in charges)) if kinds else 0.0


def test_what_is_spent_is_what_dp_accounting_says_of_the_ledger(workplace: Path, whole) -> None:
    """The ledger's lines alone, given to the library's own accountant, make the epsilon of the summary and of every round."""
    _, summary = whole()
    charges = lines(workplace / "whole", "privacy.jsonl")
    took_part = [row for row in lines(workplace / "whole", "clients.jsonl") if row["status"] == "ok"]
    assert [(row["round"], row["client"]) for row in charges] == [(row["round"], row["client"]) for row in took_part]
    for round in (2, ROUNDS):
        spent = {
            row["client"]: epsilon_of([r for r in charges if r["client"] == row["client"] and r["round"] <= round])
            for row in charges
        }
        told = lines(workplace / "whole", "metrics.jsonl")[round - 1]["epsilon"]
        assert told == pytest.approx(max(spent.values()), rel=2e-3)
    assert summary["privacy"]["epsilon_by_client"] == pytest.approx(spent, rel=2e-3)
    assert summary["epsilon"] == max(summary["privacy"]["epsilon_by_client"].values())
    assert summary["epsilon"] < 3.0, "the budget is for all rounds, and nobody was drawn in all of them"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bytes_and_the_same_epsilon(workplace: Path, whole, keys: Path, moment: str) -> None:
    out = moment.replace(" ", "-")
    status, _ = command(workplace, out, prelude=PRELUDE + MOMENTS[moment])
    assert status == -signal.SIGKILL
    assert [stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()] == [0o600]
    status, said = command(workplace, out, "--resume")
    assert status == 0, said
    expected, summary = whole()
    assert files(workplace / out) == expected
    again = json.loads((workplace / out / "summary.json").read_text())
    assert (again["epsilon"], again["privacy"]) == (summary["epsilon"], summary["privacy"])
    assert lines(workplace / out, "privacy.jsonl") == lines(workplace / "whole", "privacy.jsonl")
    assert not list(keys.iterdir()), "the key of a finished run is deleted"


def test_runs_without_a_secret_have_noise_of_their_own_and_reveal_no_key(workplace: Path, monkeypatch, keys: Path) -> None:
    monkeypatch.delenv(noise.SEED)
    kept: list[bytes] = []
    find = noise.find_key
    monkeypatch.setattr(noise, "find_key", lambda name: kept.append(find(name)) or kept[-1])
    first, second = run(workplace, "first", "run.rounds=1"), run(workplace, "second", "run.rounds=1")
    assert first["epsilon"] == second["epsilon"]
    assert files(workplace / "first") != files(workplace / "second")
    assert len({*kept}) == 2
    written = b"".join(path.read_bytes() for path in (workplace / "first").rglob("*") if path.is_file())
    assert kept[0].hex().encode() not in written
    assert kept[0] not in written
    assert not keys.exists() or not list(keys.iterdir())


def test_a_killed_run_goes_on_with_the_noise_that_it_had(workplace: Path, monkeypatch) -> None:
    """Killed after the upload was made but before it was written down: the round that is run again makes the same."""
    monkeypatch.delenv(noise.SEED)
    tell = """
from anyrank.training import trainer
train = trainer._PRIVATELY["example"]
def patched(*a):
    update = train(*a)
    with open("uploads", "a") as file: file.write(f"{a[1]} {update.adapter.layers['fc1'].B.sum().item()!r}\\n")
    return update
trainer._PRIVATELY["example"] = patched
"""
    die = MOMENTS["after the logs, before the checkpoint"].replace("== 3", "== 1")
    assert command(workplace, "noise", "--set", "run.rounds=1", prelude=PRELUDE + tell + die)[0] == -signal.SIGKILL
    assert command(workplace, "noise", "--set", "run.rounds=1", "--resume", prelude=tell)[0] == 0
    told = (workplace / "uploads").read_text().splitlines()
    assert len(told) == 8
    assert told[:4] == told[4:]


def test_noise_of_the_system_is_charged_for_every_attempt(workplace: Path) -> None:
    """Killed in round 3, whose four clients had been charged: run again, they release other numbers, and are charged again.

    One client was drawn in all five rounds, for which its budget was made. It lost one of them, and is left out of the last.
    """
    out, arguments = "secure", ("--set", "privacy.secure=true")
    moment = PRELUDE + MOMENTS["after the logs, before the checkpoint"]
    assert command(workplace, out, *arguments, prelude=moment)[0] == -signal.SIGKILL
    status, said = command(workplace, out, *arguments, "--resume")
    assert status == 0, said
    charges = lines(workplace / out, "privacy.jsonl")
    of_round = {round: [row["client"] for row in charges if row["round"] == round] for round in range(1, ROUNDS + 1)}
    assert of_round[3][:4] == of_round[3][4:]
    assert [len(clients) for clients in of_round.values()] == [4, 4, 8, 4, 3]
    skipped = [row for row in lines(workplace / out, "clients.jsonl") if row["status"] == "skipped"]
    assert [row["round"] for row in skipped] == [5]
    assert sum(row["client"] == skipped[0]["client"] for row in charges) == 5
    summary = json.loads((workplace / out / "summary.json").read_text())
    plan = json.loads((workplace / out / "privacy.json").read_text())
    assert plan["key"] == ""
    spent = summary["privacy"]["epsilon_by_client"]
    attempts = {client: sum(row["client"] == client for row in charges) for client in spent}
    assert sorted(spent, key=spent.get) == sorted(spent, key=lambda client: (attempts[client], spent[client]))


def test_a_client_whose_budget_is_gone_is_skipped_with_the_reason(workplace: Path) -> None:
    summary = run(workplace, "short", "privacy.max_rounds=2", "clients.participation=0.75")
    rows = lines(workplace / "short", "clients.jsonl")
    for client in {row["client"] for row in rows}:
        own = [row for row in rows if row["client"] == client]
        assert [row["status"] for row in own] == (["ok"] * 2 + ["skipped"] * 5)[: len(own)]
        assert {row["reason"] for row in own[2:]} <= {"its privacy budget is spent"}
    assert any(row["status"] == "skipped" for row in rows)
    assert summary["epsilon"] == pytest.approx(3.0, rel=2e-3)
    assert summary["epsilon"] <= 3.0
    epsilons = [row["epsilon"] for row in lines(workplace / "short", "metrics.jsonl")]
    assert epsilons == sorted(epsilons)


def test_nothing_but_the_adapter_and_what_the_plan_declares_leaves_a_client(workplace: Path, whole) -> None:
    whole()
    built = simulation.build(configs.load(workplace / "private.toml"))
    built.close()
    sizes = set(built.population.sizes.tolist())
    declared = {size >> size.bit_length() - 3 << size.bit_length() - 3 for size in sizes}
    assert sizes.isdisjoint(declared)
    for row in lines(workplace / "whole", "clients.jsonl"):
        assert (row["loss"], row["seconds"]) == (None, None)
        assert row["num_examples"] in declared
    for row in lines(workplace / "whole", "metrics.jsonl"):
        assert (row["train_loss"], row["worst_client_accuracy"], row["client_accuracy_std"]) == (None, None, None)
    summary = json.loads((workplace / "whole" / "summary.json").read_text())
    assert set(summary["examples"].values()) <= declared
    assert summary["train_examples"] == sum(declared) * 8 / len(declared)
    assert summary["client_accuracy"] is None


def test_a_failure_tells_no_more_than_that_it_happened(workplace: Path, monkeypatch) -> None:
    train, secret = trainer._PRIVATELY["example"], "the text of example 7"

    def fails(model, client, *rest):
        if client.endswith("3"):
            raise ModelError(secret)
        return train(model, client, *rest)

    monkeypatch.setitem(trainer._PRIVATELY, "example", fails)
    run(workplace, "failing", "run.rounds=2", "clients.participation=1.0")
    failed = [row for row in lines(workplace / "failing", "clients.jsonl") if row["status"] == "failed"]
    assert len(failed) == 2
    assert all(secret not in path.read_text() for path in (workplace / "failing").glob("*.jsonl"))
    charged = [row for row in lines(workplace / "failing", "privacy.jsonl") if row["client"] == failed[0]["client"]]
    assert len(charged) == 2, "what failed may have released something before, and is charged"


# --- another plan, other books ----------------------------------------------------------------------------------------


@pytest.fixture
def begun(workplace: Path, tmp_path: Path) -> Path:
    """A folder with a run that was killed in round 3."""
    out = tmp_path / "begun"
    assert command(workplace, str(out), prelude=PRELUDE + MOMENTS["right after the checkpoint"])[0] == -signal.SIGKILL
    return out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("privacy.epsilon=8.0", "privacy.epsilon = 3.0, not 8.0"),
        ("privacy.clip=2.0", "privacy.clip = 1.0, not 2.0"),
        ("privacy.delta=1e-6", "privacy.delta"),
    ],
)
def test_resume_with_another_plan_is_refused_by_name(begun: Path, workplace: Path, override: str, words: str) -> None:
    status, said = command(workplace, str(begun), "--resume", "--set", override)
    assert status == 2
    assert words in said
    assert len(said.strip().splitlines()) == 1


def change_noise(folder: Path) -> None:
    plan = json.loads((folder / "privacy.json").read_text())
    plan["plan"]["noise"] = {count: 2 * noise for count, noise in plan["plan"]["noise"].items()}
    (folder / "privacy.json").write_text(json.dumps(plan))


def drop_a_charge(folder: Path) -> None:
    kept = (folder / "privacy.jsonl").read_text().splitlines(keepends=True)
    (folder / "privacy.jsonl").write_text("".join(kept[:5] + kept[6:]))


TAMPERED = {
    "another noise": (change_noise, "privacy plan: noise."),
    "a charge is missing": (drop_a_charge, "is not charged for it"),
    "the ledger is gone": (lambda folder: (folder / "privacy.jsonl").unlink(), "is not charged for it"),
    "the plan is gone": (lambda folder: (folder / "privacy.json").unlink(), "is missing"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_books_that_do_not_fit_stop_the_run(begun: Path, workplace: Path, what: str) -> None:
    change, words = TAMPERED[what]
    change(begun)
    status, said = command(workplace, str(begun), "--resume")
    assert (status, words in said) == (2, True), said


@pytest.mark.parametrize("what", ["gone", "readable by others", "another"])
def test_a_key_that_is_not_the_runs_own_stops_the_run(begun: Path, workplace: Path, keys: Path, what: str) -> None:
    key = keys / json.loads((begun / "privacy.json").read_text())["key"]
    if what == "gone":
        key.unlink()
    elif what == "another":
        key.write_text("00" * 32)
    else:
        key.chmod(0o640)
    status, said = command(workplace, str(begun), "--resume")
    assert (status, "noise key" in said) == (2, True), said


def test_a_secret_that_can_be_guessed_is_refused(workplace: Path, monkeypatch) -> None:
    monkeypatch.setenv(noise.SEED, "secret")
    with pytest.raises(RunError, match="at least 32 random characters, got 6"):
        run(workplace, "guessed")


def test_another_configuration_never_gets_the_same_noise() -> None:
    tables = [{"privacy": {"clip": clip}, "train": {"learning_rate": rate}} for clip in (1.0, 2.0) for rate in (0.1, 0.2)]
    assert len({noise.new_key(table) for table in tables}) == 4
    assert noise.new_key(tables[0]) == noise.new_key(tables[0])


def test_a_run_that_asks_for_no_privacy_keeps_no_books(workplace: Path, keys: Path) -> None:
    chosen = configs.override(configs.load(workplace / "private.toml"), ["run.rounds=1"])
    open_run = chosen.replace(privacy={"level": "none", "epsilon": 0.0, "delta": 0.0})
    summary = simulation.execute(open_run, workplace / "open")
    assert not {"epsilon", "privacy"} & summary.keys()
    assert "epsilon" not in lines(workplace / "open", "metrics.jsonl")[0]
    assert not list((workplace / "open").glob("privacy*"))


def test_the_documented_run_is_one_that_can_be_asked_for() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "privacy.md").read_text()
    chosen = configs.from_table(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    plan = plan_privacy(chosen, [300, 400])
    assert max(plan.epsilon_after(count, plan.max_rounds) for count in plan.noise) == pytest.approx(6.0, rel=2e-3)
    assert noise_for("pld", 6.0, 1e-5, 50 / 1000, 400) == 1.06, "as the text says"


def test_the_ledger_is_never_cut_back(workplace: Path, tmp_path: Path) -> None:
    """Unlike the logs, which a restart cuts back to the checkpoint: what was charged stays charged."""
    chosen = configs.load(workplace / "private.toml")
    with RunDir.open(tmp_path / "run", chosen) as store:
        store.charge([{"round": 1, "client": "ada"}])
    with RunDir.open(tmp_path / "run", chosen, resume=True) as store:
        assert store.restore() is None
        assert store.charges() == [{"round": 1, "client": "ada"}]
