"""What `anyrank privacy` says of data sets, and the statement of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from anyrank.cli import arguments, console
from anyrank.cli.folding import folded
from anyrank.errors import ConfigError, RunError
from anyrank.privacy import statement
from anyrank.privacy.statement import Facts, Section, in_words

if TYPE_CHECKING:
    from anyrank.config.sections import Config

ALL = "all"


def check(config: Path | None, spent: str | None, ceiling: float | None, stated: bool, out: Path | None) -> None:
    """Raise `ConfigError` for options of `anyrank privacy` that do not belong together."""
    if spent == "":
        raise ConfigError("--spent '': expected a configuration, a file or folder of data, an embedded source, or all")
    if spent is not None and stated:
        raise ConfigError("anyrank privacy: --spent and --statement print different things; give one of them")
    if ceiling is not None and (spent is None or spent == ALL):
        raise ConfigError("--ceiling: is kept for one data set; give that too, as in --spent data.csv --ceiling 8")
    if stated and config is None:
        raise ConfigError("--statement: expected a configuration or the folder of a run; name it before the option")
    if out is not None and not stated:
        raise ConfigError("--out: is for --statement; leave it out, or give both")


def spent(
    word: str, config: Path | None, overrides: Sequence[str], ceiling: float | None, delta: float | None, quiet: bool
) -> dict[str, Any]:
    """What is spent on the data that `word` names: a configuration, a file, a folder, an embedded source, or all."""
    from anyrank.studies import spending

    spending.check_delta(delta)
    named = Path(word)
    own = named.suffix == ".toml" and named.is_file()
    if own and config is not None:
        raise ConfigError(f"--spent {word}: is a configuration, and {config} is given too; leave one of them out")
    chosen = _configured(named if own else config, overrides)
    if word == ALL and not named.exists():
        return spending.table(None, delta)
    with console.Preparing("reading", quiet=quiet):
        data = spending.known("" if own else word, chosen)
    if ceiling is not None:
        spending.set_ceiling(data, ceiling, delta)
    return spending.table(data, delta)


def _configured(path: Path | None, overrides: Sequence[str]) -> Config | None:
    return None if path is None else arguments.configuration(path, overrides)


def spent_tables(figures: Mapping[str, Any]) -> list[RenderableType]:
    """One table for each data set, with a row for each run, and what else is to be known."""
    shown = [part for row in figures["data_sets"] for part in _of_data(row)]
    if not figures["data_sets"]:
        shown.append("No private run on this machine has a ledger of its data.")
    return [*shown, *figures["notices"]]


def _of_data(row: Mapping[str, Any]) -> list[RenderableType]:
    runs = row["runs"]
    number = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    told = f"ε {in_words(row['epsilon'])} spent at δ = {row['delta']:g} for one example, by {number}"
    told = f"{console.shown(row['name'])}: {told if runs else 'no private run on it is known'}"
    if row["ceiling"]:
        told += f"\nceiling ε {row['ceiling']['epsilon']:g} at δ = {row['ceiling']['delta']:g}: {row['left']:.4g} left"
    if any(run["level"] != "example" for run in runs):
        told += f"\nfor one client: ε {in_words(row['epsilon_client'])}"
    columns = {
        "method": [str(run["method"]) for run in runs],
        "seed": [str(run["seed"]) for run in runs],
        "for one": [f"{run['level']}{' (noise at the server)' * (run['noise_at'] == 'server')}" for run in runs],
        "ε": [in_words(run["epsilon"]) for run in runs],
        "last charge": [str(run["last"] or "–")[:16].replace("T", " ") for run in runs],
    }
    names = [console.shown(run["out"] or run["name"]) for run in runs]
    tables: list[RenderableType] = [*folded("", "run", names, columns)] if runs else []
    return [told, *tables, *([f"ledger  {console.shown(row['ledger'])}"] if row["ledger"] else [])]


# --- the statement -------------------------------------------------------------------------------------------------------


def facts(path: Path, overrides: Sequence[str], quiet: bool) -> Facts:
    """The facts of a statement: of the run in the folder `path`, or of the configuration in the file."""
    if path.is_dir():
        if overrides:
            raise ConfigError("--set: the run in a folder has the configuration that it was made with; leave it out")
        from anyrank.runs.spending import facts as facts_of

        return facts_of(path)
    chosen = arguments.configuration(path, overrides)
    from anyrank import simulation
    from anyrank.config.tables import to_table
    from anyrank.studies import budget, spending

    with console.Preparing("preparing", quiet=quiet) as preparing:
        built = simulation.build(chosen, preparing)
        built.close()
    counts = budget.of_run(built)["counts"]
    others = [line.removeprefix("privacy: ") for line in spending.before(spending.forecast(spending.of_run(built)))]
    return Facts(to_table(chosen), built.privacy.table(), planned=counts, others=others)


def write(facts: Facts, out: Path) -> Path:
    """Write a statement as Markdown. Raises `RunError` for a file that is there and is no statement."""
    from anyrank.files import write_whole_text

    if out.exists() and not (out.is_file() and out.read_bytes()[:19] == b"# Privacy statement"):
        raise RunError(f"{out}: expected a new file, or a statement to write again, got something else; choose another --out")
    write_whole_text(out, statement.markdown(facts))
    return out


def statement_tables(facts: Facts) -> list[RenderableType]:
    """A statement on a terminal."""
    return [statement.title(facts), *(part for section in statement.sections(facts) for part in _section(section))]


def _section(section: Section) -> list[RenderableType]:
    parts: list[RenderableType] = [f"\n{section.heading}", *section.paragraphs]
    if section.rows:
        table = Table(header_style="bold", show_header=any(section.headings))
        for heading in section.headings:
            table.add_column(heading, overflow="fold")
        for row in section.rows:
            table.add_row(*map(console.shown, row))
        parts.append(table)
    return parts


def statement_object(facts: Facts) -> dict[str, Any]:
    """A statement for machines."""
    return {"title": statement.title(facts), "sections": [vars(section) for section in statement.sections(facts)]}
