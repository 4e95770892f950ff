"""The privacy statement: one text for the command and the report, with the figures of the plan or of what was spent."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyrank import report
from anyrank.config.sections import Config
from anyrank.config.tables import to_table
from anyrank.errors import RunError
from anyrank.privacy import statement
from anyrank.privacy.accountants import Spending, composed, epsilon
from anyrank.privacy.statement import Facts
from anyrank.runs.finding import find_runs
from anyrank.runs.spending import facts
from test_spent import PRELUDE, base, command, run, state  # noqa: F401 - fixtures

KINDS = [("example", "client"), ("person", "client"), ("client", "client"), ("client", "server")]


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
    figures = ["ε = 2.5", "δ = 1e-05", "1.5", "25 rounds", "0.9111", "0.7177", "40 of 40"]
    figures += ["160 persons", "320 persons"] if kind[0] == "person" else ["160 examples", "320 examples"]
    asked = ["neighbours", "unit", "accountant", "version", "clip norm", "base model", "held-out", "floating point", "declared"]
    asked += ["Other runs on the same data", "settings were chosen", "What leaves", "north", "1.25"]
    for part in [*figures, *asked]:
        assert part in said, part
    # e^2.5 = 12.18
    assert "12.2 times" in said
    assert ("sampling rate 0.1" in said) == (kind[0] != "client")
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


def test_the_report_and_the_command_say_the_same_of_a_run(tmp_path: Path, base: Path) -> None:  # noqa: F811
    summary = run(tmp_path, "one")
    said = words(facts(tmp_path / "one"))
    assert f"ε = {statement.in_words(summary['epsilon'])} at" in said
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
    assert f"has spent ε = {statement.in_words(true)} at" in said
    assert "not finished" in said


# --- the figures are true ------------------------------------------------------------------------------------------------


def table(facts: Facts) -> dict[str, str]:
    """The rows of two cells."""
    return {row[0]: row[1] for section in statement.sections(facts) for row in section.rows if len(row) == 2}


def test_of_correlated_noise_it_says_the_fresh_noise_the_groups_and_all_steps() -> None:
    """With 2 bands |c|^2 = 1 + 1/4: 0.8 * 1.1180 = 0.8944; rate 2 * 16 / 160; 7 * 25 = 175 steps, of which one group has 88."""
    rows = [{"num_examples": 160, "clients": 3, "steps": 88, "epsilon": 2.0}]
    facts = Facts(to_table(Config()), plan(noise={"160": 0.8}, bands={"160": 2}), planned=rows)
    said = table(facts)
    noise = said["noise of clients that declare 160 examples"]
    assert "standard deviation 0.8944 × clip norm" in noise
    assert "noise multiplier 0.8 " in noise
    assert "sampling rate 0.2 in one of 2 groups" in noise
    assert "only from the group whose turn it is" in said["sampling"]
    assert "175 steps" in said["steps"]
    counts = statement.sections(facts)[-1]
    assert counts.headings == ("examples", "clients", "steps at most", "draws of one example at most", "ε at most")
    assert counts.rows == (("160", "3", "175", "88", "2"),)


def test_of_noise_that_is_not_correlated_it_says_the_same_as_with_one_band() -> None:
    one, none = (words(Facts(to_table(Config()), plan(bands=bands), spent())) for bands in ({"160": 1, "320": 1}, {}))
    assert one == none
    assert "each step draws each example by itself" in one


def test_a_plan_of_correlated_noise_is_stated_with_its_steps_and_draws(tmp_path: Path, base: Path) -> None:  # noqa: F811
    """3 rounds of 2 steps are 6 steps; an example is in one of 2 groups, so that 3 of them may draw it."""
    keys = ("--set", "privacy.noise=correlated", "--set", "privacy.bands=2")
    told = json.loads(command(tmp_path, "privacy", "private.toml", "--statement", "--json", *keys)[1])
    ((_, _, steps, draws, _),) = told["sections"][-1]["rows"]
    assert (steps, draws) == ("6", "3")


@pytest.mark.parametrize("most", [0, 8])
def test_at_the_level_of_persons_it_speaks_of_persons(most: int) -> None:
    rows = [{"num_examples": 160, "clients": 3, "steps": 175, "epsilon": 2.0}]
    facts = Facts(to_table(Config()), plan("person", examples_per_person=most), planned=rows)
    said, page = table(facts), words(facts)
    assert "draws each person by itself" in said["sampling"]
    assert said["examples of a drawn person"].startswith("at most 8" if most else "all")
    assert "at one client" in said["a person"]
    assert "held out for scores are not protected" in page
    assert "number of persons" in said
    assert "number of examples" not in page
    assert statement.sections(facts)[-1].headings[0] == "persons"
    assert "a person" not in table(Facts(to_table(Config()), plan()))


@given(st.floats(1e-12, 1e12))
def test_a_printed_epsilon_is_never_below_the_true_one(true: float) -> None:
    """And above it by less than one in the fourth digit."""
    assert true <= float(statement.in_words(true)) <= true * 1.001001
    page = words(Facts(to_table(Config()), plan(), spent(true)))
    (printed,) = re.findall(r"has spent ε = (\S+) at", page)
    assert float(printed) >= true


def test_a_number_of_four_digits_is_printed_as_it_is() -> None:
    assert [statement.in_words(each) for each in (0.1, 3.0, 2.999, 7.806)] == ["0.1", "3", "2.999", "7.806"]


# --- from the ledger, whatever the summary says --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:  # noqa: F811
    """A finished run whose accountant is the Rényi bound."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(folder / "state"))
        run(folder, "run", "privacy.accountant=rdp", "privacy.epsilon=3.0", "clients.participation=1.0")
    return folder / "run"


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(done, tmp_path / "copy")


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_spent_is_by_the_plans_own_accountant(copy: Path, finished: bool) -> None:
    """3 rounds of 2 steps; the privacy loss distribution, which the data set's ledger uses too, has a smaller figure."""
    if not finished:
        (copy / "summary.json").unlink()
    ((count, noise),) = json.loads((copy / "privacy.json").read_text())["plan"]["noise"].items()
    steps = Spending(16 / int(count), noise, 6)
    true = epsilon("rdp", steps, 1e-5)
    assert composed((steps,), 1e-5) < 0.99 * true
    own = facts(copy)
    assert own.spent.epsilon == pytest.approx(true, rel=1e-12)
    said = words(own)
    assert f"has spent ε = {statement.in_words(true)} at" in said
    assert "Rényi differential privacy of dp-accounting" in table(own)["accountant"]
    assert "the ledger's figure for this run alone may differ" in said
    assert ("not finished" in said) == (not finished)


WAYS = {
    "correlated": ("privacy.noise=correlated", "privacy.bands=5"),  # 2 steps a round: its charges are 1, 0 and 1 draws
    "secure": ("privacy.secure=true",),
    "noise given": ("privacy.epsilon=0", "privacy.noise_multiplier=1.0", "privacy.max_rounds=1"),
    "client": ("privacy.level=client", "privacy.delta=1e-2"),
    "client at the server": ("privacy.level=client", "privacy.delta=1e-2", "privacy.noise_at=server"),
}


@pytest.mark.parametrize("way", WAYS)
def test_of_every_kind_of_run_the_ledger_gives_what_the_run_reported(tmp_path: Path, base: Path, way: str) -> None:  # noqa: F811
    summary = run(tmp_path, "one", *WAYS[way])
    own = facts(tmp_path / "one")
    assert dict(own.spent.by_client) == pytest.approx(summary["privacy"]["epsilon_by_client"], rel=1e-12)
    assert own.spent.epsilon == pytest.approx(summary["epsilon"], rel=1e-12)
    assert own.spent.rounds == 3
    words(own)


def edited(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def lines(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        kept = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(change(kept)))

    return apply


def unfinished(then: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "summary.json").unlink()
        then(folder)

    return apply


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def first(old: str, new: str) -> Callable[[list[str]], list[str]]:
    return lambda kept: [kept[0].replace(old, new), *kept[1:]]


FAULTS = {
    "epsilon below 0": edited("summary.json", lambda told: told.update(epsilon=-5)),
    "epsilon no number": edited("summary.json", lambda told: told.update(epsilon=float("nan"))),
    "epsilon too small": edited("summary.json", lambda told: told.update(epsilon=told["epsilon"] / 2)),
    "epsilon absent": edited("summary.json", lambda told: told.pop("epsilon")),
    "a client's epsilon": edited("summary.json", lambda told: told["privacy"]["epsilon_by_client"].update({"client-0": 0.0})),
    "a client absent": edited("summary.json", lambda told: told["privacy"]["epsilon_by_client"].pop("client-0")),
    "no privacy": edited("summary.json", lambda told: told.update(privacy=None)),
    "another plan": edited("summary.json", lambda told: told["privacy"]["plan"].update(clip_norm=9.0)),
    "more rounds": edited("summary.json", lambda told: told.update(rounds=4)),
    "summary cut off": lambda folder: (folder / "summary.json").write_text("{"),
    "no plan": without("privacy.json"),
    "plan cut off": lambda folder: (folder / "privacy.json").write_text("{"),
    "plan's noise": edited("privacy.json", lambda kept: kept["plan"].update(noise={"224": 9.0})),
    "plan's delta": edited("privacy.json", lambda kept: kept["plan"].update(delta=0.5)),
    "plan's accountant": edited("privacy.json", lambda kept: kept["plan"].update(accountant="pld")),
    "plan's bands": edited("privacy.json", lambda kept: kept["plan"].update(bands={"224": 2})),
    "no ledger": without("privacy.jsonl"),
    "ledger emptied": lines("privacy.jsonl", lambda kept: []),
    "a charge lost": lines("privacy.jsonl", lambda kept: kept[1:]),
    "the last charge lost": lines("privacy.jsonl", lambda kept: kept[:-1]),
    "a damaged charge": lines("privacy.jsonl", first("{", "")),
    "a charge with more noise": lines("privacy.jsonl", first('"noise_multiplier": ', '"noise_multiplier": 1')),
    "a charge of fewer steps": lines("privacy.jsonl", first('"steps": 2', '"steps": 1')),
    "unfinished, no ledger": unfinished(without("privacy.jsonl")),
    "unfinished, ledger emptied": unfinished(lines("privacy.jsonl", lambda kept: [])),
    "unfinished, a charge lost": unfinished(lines("privacy.jsonl", lambda kept: kept[1:])),
    "unfinished, neither ledger nor clients": unfinished(
        lambda folder: [(folder / name).unlink() for name in ("privacy.jsonl", "clients.jsonl")]
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_contradict_each_other_have_no_statement(copy: Path, tmp_path: Path, fault: str) -> None:
    facts(copy)
    FAULTS[fault](copy)
    status, said, errors = command(tmp_path, "privacy", "copy", "--statement")
    assert (status, said, errors.count("\n")) == (2, "", 1), errors
    assert errors.startswith("anyrank: copy")


def test_a_report_has_no_figure_of_a_summary_that_its_ledger_contradicts(copy: Path, tmp_path: Path) -> None:
    FAULTS["epsilon below 0"](copy)
    page = html.unescape(report.build(find_runs(copy), tmp_path / "page.html").read_text())
    assert "cannot be computed from its folder" in page
    assert "has spent ε" not in page


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)),
)
def test_a_plan_of_anything_has_one_line_and_no_traceback(done: Path, choice: st.DataObject, value: object) -> None:
    kept = json.loads((done / "privacy.json").read_text())
    where = kept["plan"] if choice.draw(st.booleans()) else kept["plan"]["noise"]
    key = choice.draw(st.sampled_from(sorted(where)))
    if where[key] == value:
        return
    where[key] = value
    changed = done.with_name("changed")
    shutil.copytree(done, changed, dirs_exist_ok=True)
    (changed / "privacy.json").write_text(json.dumps(kept))
    with pytest.raises(RunError) as caught:
        facts(changed)
    assert "\n" not in str(caught.value)


def test_without_privacy_all_levels_are_named(tmp_path: Path) -> None:
    status, _, line = command(tmp_path, "privacy", "private.toml", "--statement", "--set", "privacy.level=none")
    assert (status, line.count("\n")) == (2, 1)
    for level in ("'example'", "'person'", "'client'"):
        assert level in line
