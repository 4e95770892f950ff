"""The command line. Verbs import what they need when they run, so that `--help` answers at once.

Each verb first reads and checks what it was given, and only then imports what computes: a wrong request is refused at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyrank.devices import cores

if TYPE_CHECKING:
    from anyrank.config.sections import Config
    from anyrank.studies.comparison import Results
    from anyrank.studies.grid import Cell


# Before torch is loaded: threads that wait must not spin on cores that others use (2 to 8 times slower on shared cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Federated LoRA fine-tuning where every client picks its own rank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of tables.")]
Set = Annotated[list[str], typer.Option("--set", metavar="A.B=V", help="Override a key of the configuration; repeatable.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Runs at a time; default: one a core.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration of the federation.")]

DEMO_METHODS = "zeropad,flexlora,rbla,raflora,stayput"


def _tell_version(asked: bool) -> None:
    if asked:
        from anyrank import __version__

        sys.stdout.write(f"anyrank {__version__}\n")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_tell_version)
    ] = False,
) -> None:
    """Federated LoRA fine-tuning where every client picks its own rank."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and the report.")] = Path("runs/demo"),
    methods: Annotated[str, typer.Option("--methods", help="Methods to compare, comma-separated.")] = DEMO_METHODS,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each method.")] = 3,
    jobs: Jobs = 0,
    as_json: Json = False,
) -> None:
    """The main job on data that comes along: 20 clients of ranks 2 to 32 fine-tune a small transformer on turned digits.

    Example: [cyan]anyrank demo[/cyan]
    """
    import tomli_w

    from anyrank.cli import arguments
    from anyrank.cli.demo import CONFIG
    from anyrank.config.tables import to_table
    from anyrank.files import write_whole_text
    from anyrank.runs.folder import remove_run

    labels = arguments.methods(methods)
    remove_run(out)
    results = _compare(CONFIG, labels, seeds, out, jobs, resume=False, quiet=as_json)
    write_whole_text(out / "demo.toml", tomli_w.dumps(to_table(CONFIG)))
    _show_comparison(results, out, as_json, "digits turned by 90 degrees")


@app.command()
def run(
    config: ConfigFile,
    overrides: Set = [],  # noqa: B006 - Typer's way
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the folder stopped (or start it).")] = False,
    as_json: Json = False,
) -> None:
    """One federated run.

    Example: [cyan]anyrank run banking77.toml --set method.name=rbla --out runs/rbla[/cyan]
    """
    from anyrank.cli import arguments
    from anyrank.runs.folder import RunDir

    chosen = arguments.configuration(config, overrides)
    folder = out or Path("runs") / chosen.run.name
    RunDir.check(folder, chosen, resume)
    from anyrank import report, simulation
    from anyrank.cli import console, tables

    rounds = console.Rounds(chosen.run.rounds, chosen.method.name, quiet=as_json)
    with console.Preparing("preparing", quiet=as_json) as preparing, rounds:
        summary = simulation.execute(chosen, folder, resume, lambda metrics: rounds("", metrics), preparing)
    page = report.build([folder], folder / "report.html")
    if as_json:
        return _print_json(summary | {"out": str(folder), "report": str(page)})
    console.out.print(tables.run_table(summary))
    console.out.print(f"report   {page}\nadapter  {folder / 'adapter'}", soft_wrap=True)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Set = [],  # noqa: B006
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time one step of each rank, to guess the time.")
    ] = True,
    as_json: Json = False,
) -> None:
    """What a run would take: clients, parameters, bytes, memory, a guess of the time. Trains nothing and makes no run folder.

    Example: [cyan]anyrank plan banking77.toml --set clients.participation=0.5[/cyan]
    """
    from anyrank.cli import arguments

    chosen = arguments.configuration(config, overrides)
    from anyrank.cli import console, tables
    from anyrank.studies import forecast

    with console.Preparing("preparing", quiet=as_json) as preparing:
        figures = forecast.plan(chosen, measure, preparing)
    if as_json:
        return _print_json(figures)
    for table in tables.plan_tables(figures):
        console.out.print(table)


@app.command()
def compare(
    config: ConfigFile,
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated METHOD[:KEY=VALUE][@RANK].")],
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each method, seeds counting up from run.seed.")] = 1,
    overrides: Set = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; default: runs/NAME-compare.")] = None,
    jobs: Jobs = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a grid that stopped.")] = False,
    as_json: Json = False,
) -> None:
    """The same federation under several methods and seeds: mean and spread, one report.

    fedavg@2 gives every client rank 2; raflora:split=balanced sets an option, raflora:train.learning_rate=0.01 any other key.

    Example: [cyan]anyrank compare banking77.toml --methods fedavg@2,flexlora,raflora --seeds 5[/cyan]
    """
    from anyrank.cli import arguments

    chosen = arguments.configuration(config, overrides, own_method=False)
    labels = arguments.methods(methods, chosen.method.file)
    folder = out or Path("runs") / f"{chosen.run.name}-compare"
    results = _compare(chosen, labels, seeds, folder, jobs, resume, quiet=as_json)
    _show_comparison(results, folder, as_json, chosen.run.name)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="One claim, its settings, methods and seeds.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; default: runs/STUDY.")] = None,
    jobs: Jobs = 0,
    as_json: Json = False,
) -> None:
    """One claim put to the test: several settings by methods and seeds, one table, one figure. Goes on where it stopped.

    Example: [cyan]anyrank study configs/papers/1-rank-collapse.toml[/cyan]
    """
    from anyrank.errors import ConfigError

    if not file.exists():
        raise ConfigError(f"{file}: no such file; expected a TOML study")
    from anyrank import report
    from anyrank.cli import console, tables
    from anyrank.studies import study as studies

    chosen = studies.load(file)
    folder = out or Path("runs") / chosen.name
    with console.Preparing("preparing", quiet=as_json) as preparing:
        studies.check(chosen, preparing, folder)
    with console.Rounds(sum(cell.config.run.rounds for cell in chosen.cells(folder)), chosen.name, quiet=as_json) as rounds:
        tell = lambda label, seed, metrics: rounds(f"{label} seed {seed}", metrics)  # noqa: E731
        results = studies.execute(chosen, folder, jobs or cores(), tell)
    written = [f"table   {folder / studies.TABLE}"]
    if chosen.figure != "none":
        settings = [(setting.name, _started(setting.cells(folder))) for setting in chosen.settings]
        written.append(f"figure  {report.study_figure(settings, chosen.figure, folder / 'figure.png')}")
    if as_json:
        _print_json(results | {"out": str(folder)})
    else:
        for table in tables.study_tables(results, studies.cells_of):
            console.out.print(table)
        console.out.print("\n".join(written), soft_wrap=True)
    _raise_failures(results["failures"], len(chosen.cells(folder)))


@app.command()
def aggregate(
    clients: Annotated[list[str], typer.Argument(metavar="CLIENT_DIR[=EXAMPLES] ...", help="PEFT adapter folders.")],
    method: Annotated[str, typer.Option("--method", help="See `anyrank methods`.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the merged adapters.")],
    ranks: Annotated[str, typer.Option("--ranks", metavar="4,8,...", help="Also write what a client of each rank gets.")] = "",
    previous: Annotated[
        Path | None, typer.Option("--previous", help="The global adapter that the clients started from.")
    ] = None,
    options: Annotated[list[str], typer.Option("--option", metavar="KEY=VALUE", help="An option of the method.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", help="For the fresh rows of A in slices that are left empty.")] = 0,
    algebra: Annotated[str, typer.Option("--algebra", help="auto, qr, gram or randomized.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="Where SVDs are made: cpu, cuda or auto.")] = "cpu",
    allow_different_base: Annotated[
        bool, typer.Option("--allow-different-base", help="The adapters' different base models are one under two names.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge PEFT adapter folders of any ranks, without training: OUT/global, and OUT/rank-R for each rank asked for.

    Example: [cyan]anyrank aggregate --method raflora --ranks 4,8 --out merged site-a=1200 site-b=300[/cyan]
    """
    from anyrank.cli import arguments
    from anyrank.methods import catalog

    folders, wanted, chosen = arguments.updates(clients), arguments.ranks(ranks), arguments.options(options)
    catalog.check(method, chosen)
    from anyrank.aggregation.aggregates import aggregate_folders
    from anyrank.cli import console, tables

    _use_all_cores()
    began = time.perf_counter()
    with console.Preparing("layers", quiet=as_json) as progress:
        done = aggregate_folders(
            arguments.opened(folders), method, out, wanted, previous, seed, algebra=algebra, device=device,
            allow_different_base=allow_different_base, progress=progress, **chosen,
        )  # fmt: skip
    done["seconds"] = time.perf_counter() - began
    if as_json:
        return _print_json(done)
    console.out.print(tables.merge_table(done))


@app.command()
def inspect(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER_DIR ...", help="PEFT adapter folders.")],
    as_json: Json = False,
) -> None:
    """Ranks, scaling, norms, spectrum, effective rank and energy past each rank, layer by layer, of one or more adapters.

    Example: [cyan]anyrank inspect merged/global merged/rank-4[/cyan]
    """
    from anyrank.aggregation.inspect import inspect_folders
    from anyrank.cli import console, tables

    _use_all_cores()
    with console.Preparing("layers", quiet=as_json) as progress:
        reports = inspect_folders(adapters, progress)
    if as_json:
        return _print_json({"adapters": reports})
    for table in tables.inspection_tables(reports):
        console.out.print(table)


@app.command()
def methods(as_json: Json = False) -> None:
    """The methods: what each one does, what is trained, which ranks it takes, and where it comes from.

    Example: [cyan]anyrank methods --json[/cyan]
    """
    from rich.table import Table

    from anyrank.cli import console
    from anyrank.methods import catalog

    entries = catalog.stored()
    if as_json:
        return _print_json({"methods": entries})
    table = Table(header_style="bold")
    for heading in ("method", "server rule", "trained", "mixed ranks", "paper"):
        table.add_column(heading, no_wrap=heading == "method")
    for entry in entries:
        mixed = "yes" if entry["mixed_ranks"] else "no"
        table.add_row(entry["name"], entry["summary"], ", ".join(entry["train"]), mixed, entry["paper"])
    console.out.print(table)


@app.command()
def explain(
    key: Annotated[
        str, typer.Argument(metavar="[KEY]", help="A key, a section, or another library's name; none: all sections.")
    ] = "",
    as_json: Json = False,
) -> None:
    """What a key of the configuration is: its type, values and default, and what other libraries call it.

    A key by its path, its name alone, its section, or the name that PEFT, transformers or Flower have for it.

    Example: [cyan]anyrank explain lora.alpha[/cyan]
    """
    from anyrank.config import explain
    from anyrank.methods import catalog

    found = explain.find(key, catalog.option_keys()) if key else []
    if as_json:
        return _print_json({"keys": [each.table() for each in found]} if key else {"sections": explain.sections()})
    from anyrank.cli import console, tables

    for table in tables.key_tables(found) if key else [tables.section_table(explain.sections())]:
        console.out.print(table)


@app.command()
def privacy(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="A private run; or the options below.")] = None,
    overrides: Set = [],  # noqa: B006
    examples: Annotated[int, typer.Option("--examples", help="Examples of one client.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples that a step draws, on average.")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Steps that the client takes in the whole run.")] = 0,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Answers the noise for it.")] = 0.0,
    noise_multiplier: Annotated[float, typer.Option("--noise-multiplier", help="Answers the epsilon of it.")] = 0.0,
    delta: Annotated[float, typer.Option("--delta", help="Below 1 over the number of examples.")] = 1e-5,
    accountant: Annotated[str, typer.Option("--accountant", help="pld, prv or rdp.")] = "pld",
    as_json: Json = False,
) -> None:
    """The noise for a privacy budget, or the budget for a noise: of a configured run, or of so many steps. Trains nothing.

    Example: [cyan]anyrank privacy --examples 1000 --batch-size 50 --steps 400 --epsilon 6[/cyan]
    """
    from anyrank.cli import arguments, console, tables

    if config is None:
        figures = arguments.budget(examples, batch_size, steps, epsilon, noise_multiplier, delta, accountant)
    else:
        chosen = arguments.configuration(config, overrides)
        with console.Preparing("preparing", quiet=as_json) as preparing:
            figures = _budget_of(chosen, preparing)
    if as_json:
        return _print_json(figures)
    console.out.print(tables.privacy_table(figures))


@app.command()
def audit(
    config: ConfigFile,
    canaries: Annotated[int, typer.Option("--canaries", help="Training examples that get a wrong label and a coin.")] = 500,
    noise_factor: Annotated[
        float, typer.Option("--noise-factor", help="Multiply the noise behind the plan's back: does the audit notice?")
    ] = 1.0,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train privately with canaries among the examples, and see whether their presence can be guessed more often than ε allows.

    Example: [cyan]anyrank audit private.toml --canaries 1000[/cyan]
    """
    from anyrank.cli import arguments

    chosen = arguments.configuration(config, overrides)
    from anyrank.cli import console, tables
    from anyrank.studies import audit

    with console.Rounds(chosen.run.rounds, "audit", quiet=as_json) as rounds:
        verdict = audit.audit(chosen, canaries, noise_factor, on_round=lambda metrics: rounds("", metrics))
    if as_json:
        return _print_json(verdict)
    console.out.print(tables.audit_table(verdict))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR ...", help="Run folders, or folders of a comparison.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; default: report.html in the first folder.")] = None,
    as_json: Json = False,
) -> None:
    """The report again, from the files of one or more runs.

    Example: [cyan]anyrank report runs/demo[/cyan]
    """
    from anyrank.runs.folder import find_runs

    found = [run for folder in runs for run in find_runs(folder)]
    from anyrank import report as reports
    from anyrank.cli import console

    page = reports.build(found, out or runs[0] / "report.html")
    if as_json:
        return _print_json({"report": str(page)})
    console.out.print(f"report  {page}", soft_wrap=True)


def _compare(config: Config, methods: list[str], seeds: int, out: Path, jobs: int, resume: bool, quiet: bool) -> Results:
    from anyrank import report
    from anyrank.cli import console
    from anyrank.studies import comparison

    cells = comparison.plan(config, methods, seeds, out)
    with console.Preparing("preparing", quiet) as preparing:
        comparison.check(cells, out, resume, preparing)
    rounds = console.Rounds(sum(cell.config.run.rounds for cell in cells), "rounds", quiet)
    with rounds:
        tell = lambda label, seed, metrics: rounds(f"{label} seed {seed}", metrics)  # noqa: E731
        results = comparison.execute(cells, out, jobs or cores(), tell)
    report.build(_started(cells), out / "report.html")
    report.figure(_started(cells), out / "figure.png")
    return results


def _show_comparison(results: Results, out: Path, as_json: bool, title: str) -> None:
    from anyrank.cli import console, tables

    rows, seeds = results.rows, max(row["seeds"] for row in results.rows)
    if as_json:
        _print_json({"rows": rows, "failures": results.failures, "out": str(out), "report": str(out / "report.html")})
    else:
        console.out.print(
            tables.comparison_table(rows, f"{title} ({f'{seeds} seeds, mean ± std' if seeds > 1 else 'one seed'})")
        )
        console.out.print(f"report  {out / 'report.html'}\nfigure  {out / 'figure.png'}", soft_wrap=True)
    _raise_failures(results.failures, len(results.failures) + sum(row["seeds"] for row in rows))


def _raise_failures(failures: list[dict[str, Any]], runs: int) -> None:
    """`RunFailed` where runs of a grid failed: what is left of it has been told, and is all kept."""
    from anyrank.errors import RunFailed
    from anyrank.studies import grid

    if failures:
        reasons = "; ".join(grid.told(failure) for failure in failures)
        raise RunFailed(f"{len(failures)} of {runs} runs failed, and the table is without them: {reasons}")


def _started(cells: Sequence[Cell]) -> list[Path]:
    """The run folders that there are: a run that failed before its first round has none."""
    return [cell.out for cell in cells if cell.out.is_dir()]


def _budget_of(config: Config, progress) -> dict[str, Any]:
    from anyrank import simulation
    from anyrank.studies import budget

    built = simulation.build(config, progress)
    built.close()
    return budget.of_run(built)


def _use_all_cores() -> None:
    import torch

    torch.set_num_threads(cores())


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """The command `anyrank`: exit 0 done, 1 the run failed, 2 the request is wrong; one line on stderr for either."""
    from anyrank.errors import AnyRankError, RunFailed

    try:
        app()
    except AnyRankError as error:
        sys.stderr.write(f"anyrank: {error}\n")
        sys.exit(1 if isinstance(error, RunFailed) else 2)
    except KeyboardInterrupt:
        sys.stderr.write("anyrank: stopped; go on by --resume\n")
        sys.exit(1)
