"""The privacy statement: one text for the command and the report, with the figures of the plan or of what was spent."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank import report
from anyrank.config.sections import Config
from anyrank.config.tables import to_table
from anyrank.privacy import statement
from anyrank.privacy.accountants import Spending, composed
from anyrank.privacy.statement import Facts
from anyrank.runs.finding import find_runs
from anyrank.runs.spending import facts
from test_spent import PRELUDE, base, command, run, state  # noqa: F401 - fixtures

KINDS = [("example", "client"), ("client", "client"), ("client", "server")]


def plan(level: str = "example", noise_at: str = "client", **more: object) -> dict:
    told = {"level": level, "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.5, "accountant": "pld", "secure": False}
    told |= {"counts": "rounded", "batch_size": 16, "local_steps": 7, "rounds": 40, "max_rounds": 25, "participation": 0.5}
    return told | {"noise": {"160": 0.9111, "320": 0.7177}, "noise_at": noise_at} | more


def spent(epsilon: float = 2.5, **clients: float) -> statement.Spending:
    return statement.Spending(epsilon, clients or {"north": epsilon, "south": 1.25}, 40)


def words(facts: Facts) -> str:
    return statement.markdown(facts)


@pytest.mark.parametrize("kind", KINDS, ids=" at the ".join)
def test_it_says_all_that_a_board_asks(kind: tuple[str, str]) -> None:
    said = words(Facts(to_table(Config()), plan(*kind), spent()))
    figures = ["ε = 2.5", "δ = 1e-05", "1.5", "25 rounds", "0.9111", "0.7177", "160 examples", "320 examples", "40 of 40"]
    asked = ["neighbours", "unit", "accountant", "version", "clip norm", "base model", "held-out", "floating point", "declared"]
    asked += ["Other runs on the same data", "settings were chosen", "What leaves", "north", "1.25"]
    for part in [*figures, *asked]:
        assert part in said, part
    # e^2.5 = 12.18
    assert "12.2 times" in said
    assert ("sampling rate 0.1" in said) == (kind[0] == "example")
    assert ("trusted" in said) == (kind[1] == "server")


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "column"])
def test_it_says_how_rows_came_to_clients(kind: str) -> None:
    config = to_table(
        Config().replace(data={"partition": type(Config().data.partition)(kind=kind, column="site" * (kind == "column"))})
    )
    said = words(Facts(config, plan(), spent()))
    assert ("other rows would be with other clients" in said) == (kind != "column")


NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=40)
@given(NAMES, st.dictionaries(NAMES, st.floats(0, 1e6), max_size=30))
def test_names_that_anybody_chose_break_no_page(name: str, clients: dict[str, float]) -> None:
    config = to_table(Config()) | {"run": {"name": name}}
    text = words(Facts(config, plan(), statement.Spending(max(clients.values(), default=0.0), clients, 3)))
    assert "<" not in text.replace("&lt;", "")
    for line in text.split("\n"):
        if line.startswith("|"):
            assert line.endswith(" |")
            columns = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert columns == 2 or columns == 4, line


@settings(max_examples=60)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)))
def test_a_summary_of_anything_has_no_statement_and_no_traceback(value: object) -> None:
    for summary in ({}, {"privacy": value}, {"privacy": {"plan": value, "epsilon_by_client": {}}, "epsilon": 1, "rounds": 2}):
        statement.of_summary({}, summary)
    for key in plan():
        told = {"plan": plan() | {key: value}, "epsilon_by_client": {"a": 1.0}}
        statement.of_summary({}, {"privacy": told, "epsilon": 1.0, "rounds": 2})


def test_the_report_and_the_command_say_the_same_of_a_run(tmp_path: Path, base: Path) -> None:  # noqa: F811
    summary = run(tmp_path, "one")
    said = words(facts(tmp_path / "one"))
    assert f"ε = {summary['epsilon']:.4g}" in said
    page = html.unescape(report.build(find_runs(tmp_path / "one"), tmp_path / "page.html").read_text())
    own = facts(tmp_path / "one")
    for section in statement.sections(own):
        for text in (section.heading, *section.paragraphs, *(cell for row in section.rows for cell in row)):
            assert text in page, text
    status, _, errors = command(tmp_path, "privacy", "one", "--statement", "--out", "one.md")
    assert status == 0, errors
    assert (tmp_path / "one.md").read_text() == said
    (tmp_path / "mine.md").write_text("my own notes")
    status, _, line = command(tmp_path, "privacy", "one", "--statement", "--out", "mine.md")
    assert (status, line.count("\n"), (tmp_path / "mine.md").read_text()) == (2, 1, "my own notes")


def test_before_a_run_it_has_the_planned_figures_and_what_was_spent_before(tmp_path: Path, base: Path) -> None:  # noqa: F811
    summary = run(tmp_path, "one")
    told = json.loads(command(tmp_path, "privacy", "private.toml", "--statement", "--json")[1])
    text = json.dumps(told, ensure_ascii=False)
    (epsilon,) = re.findall(r"would spend at most ε = (\S+) at", text)
    assert summary["epsilon"] - 1e-3 <= float(epsilon) <= 3.0
    assert "together with 1 run before" in text


def test_a_run_that_was_killed_is_stated_by_all_that_it_was_charged(tmp_path: Path, base: Path) -> None:  # noqa: F811
    """Also for the round that did not end: its upload may have left."""
    kill = """
note = ledger.Ledger._note
def patched(self, rows):
    note(self, rows)
    if seen() > 2: die()
ledger.Ledger._note = patched
"""
    keys = ("--set", "clients.participation=1.0")
    command(tmp_path, "run", "private.toml", "--out", "own", "--json", *keys, prelude=PRELUDE + kill)
    charged = [json.loads(line) for line in (tmp_path / "own" / "privacy.jsonl").read_text().splitlines()]
    rounds = max(row["round"] for row in charged)
    over = (
        len((tmp_path / "own" / "metrics.jsonl").read_text().splitlines())
        if (tmp_path / "own" / "metrics.jsonl").exists()
        else 0
    )
    assert rounds == over + 1
    (kind,) = {(row["sampling_rate"], row["noise_multiplier"], row["steps"]) for row in charged}
    true = composed((Spending(kind[0], kind[1], kind[2] * rounds),), 1e-5)
    said = words(facts(tmp_path / "own"))
    assert f"has spent ε = {true:.4g}" in said
    assert "not finished" in said
