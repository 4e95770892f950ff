"""The command line. Commands import what they need when they run, so that `--help` answers at once.

Each command first reads and checks its arguments and only then imports torch, so that a wrong request is refused at once.
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

from anyrank.cli import deploy, serving
from anyrank.devices import cores

if TYPE_CHECKING:
    from anyrank.config.sections import Config
    from anyrank.studies.comparison import Results
    from anyrank.studies.variants import Cell


# Before torch is loaded: threads that wait must not spin on cores that others use (2 to 8 times slower on shared cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Federated LoRA fine-tuning where every client picks its own rank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(deploy.app, name="deploy")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of tables.")]
Set = Annotated[list[str], typer.Option("--set", metavar="A.B=V", help="Override a key of the configuration; repeatable.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Number of runs at the same time; default: one per core.")]
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
    """Compare methods on included data: 20 clients of ranks 2 to 32 fine-tune a small transformer on rotated digits.

    Example: [cyan]anyrank demo[/cyan]
    """
    import tomli_w

    from anyrank.cli import arguments
    from anyrank.cli.demo import CONFIG
    from anyrank.config.tables import to_table
    from anyrank.files import write_whole_text
    from anyrank.runs.removal import remove_run

    jobs, cells = arguments.jobs(jobs), arguments.cells(CONFIG, methods, seeds, out)
    remove_run(out)
    results = _compare(cells, out, jobs, resume=False, quiet=as_json)
    write_whole_text(out / "demo.toml", tomli_w.dumps(to_table(CONFIG)))
    _show_comparison(results, out, as_json, "digits turned by 90 degrees")


@app.command()
def run(
    config: ConfigFile,
    overrides: Set = [],  # noqa: B006 - Typer's way
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run; default: runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder where it stopped (or start it).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run one federation.

    Example: [cyan]anyrank run banking77.toml --set method.name=rbla --out runs/rbla[/cyan]
    """
    from anyrank.cli import arguments
    from anyrank.runs.folder import RunDir
    from anyrank.runs.matching import with_stored_ranks

    chosen = arguments.configuration(config, overrides)
    folder = out or Path("runs") / chosen.run.name
    chosen = with_stored_ranks(folder, chosen)
    RunDir.check(folder, chosen, resume)
    from anyrank import report, simulation
    from anyrank.cli import console, tables

    rounds = console.Rounds(chosen.run.rounds, chosen.method.name, quiet=as_json)
    private = chosen.privacy.level != "none"
    with console.Preparing("preparing", quiet=as_json, percent=private) as preparing, rounds:
        tell = None if as_json else lambda line: console.err.print(line, soft_wrap=True)
        summary = simulation.execute(chosen, folder, resume, lambda metrics: rounds("", metrics), preparing, tell)
    page = report.build([folder], folder / "report.html")
    if as_json:
        return _print_json(summary | {"out": str(folder), "report": str(page)})
    console.out.print(tables.run_table(summary))
    console.out.print(f"report   {console.shown(page)}\nadapter  {console.shown(folder / 'adapter')}", soft_wrap=True)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Set = [],  # noqa: B006
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time one step of each rank, to estimate the time of the run.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Estimate the cost of a run: clients, parameters, bytes, memory, time. Trains nothing and makes no run folder.

    Example: [cyan]anyrank plan banking77.toml --set clients.participation=0.5[/cyan]
    """
    from anyrank.cli import arguments

    chosen = arguments.configuration(config, overrides)
    from anyrank.cli import console, plans
    from anyrank.studies import forecast

    with console.Preparing("preparing", quiet=as_json) as preparing:
        figures = forecast.cost(chosen, measure, preparing)
    if as_json:
        return _print_json(figures)
    for table in plans.plan_tables(figures):
        console.out.print(table)


@app.command()
def compare(
    config: ConfigFile,
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated METHOD[:KEY=VALUE][@RANK].")],
    seeds: Annotated[
        int, typer.Option("--seeds", help="Number of runs of each method, with seeds run.seed, run.seed + 1, ...")
    ] = 1,
    overrides: Set = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; default: runs/NAME-compare.")] = None,
    jobs: Jobs = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a comparison that stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Run the same federation with several methods and seeds: mean and spread, one report.

    fedavg@2 gives every client rank 2; raflora:split=balanced sets an option, raflora:train.learning_rate=0.01 any other key.

    Example: [cyan]anyrank compare banking77.toml --methods fedavg@2,flexlora,raflora --seeds 5[/cyan]
    """
    from anyrank.cli import arguments
    from anyrank.studies import variants

    jobs, chosen = arguments.jobs(jobs), arguments.configuration(config, overrides, own_method=False)
    folder = out or Path("runs") / f"{chosen.run.name}-compare"
    cells = arguments.cells(chosen, methods, seeds, folder)
    variants.check_folder(folder, resume)
    results = _compare(cells, folder, jobs, resume, quiet=as_json)
    _show_comparison(results, folder, as_json, chosen.run.name)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="One claim, its settings, methods and seeds.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; default: runs/STUDY.")] = None,
    jobs: Jobs = 0,
    as_json: Json = False,
) -> None:
    """Test one claim: several settings with several methods and seeds, one table, one figure. Continues where it stopped.

    Example: [cyan]anyrank study configs/papers/1-rank-collapse.toml[/cyan]
    """
    from anyrank.cli import arguments
    from anyrank.studies import study as studies

    jobs, chosen = arguments.jobs(jobs), studies.load(file)
    folder = out or Path("runs") / chosen.name
    from anyrank import report
    from anyrank.cli import console, tables
    from anyrank.studies import spending

    with console.Preparing("preparing", quiet=as_json) as preparing:
        planned = studies.check(chosen, preparing, folder)
    _tell(spending.before(planned), as_json)
    with console.Rounds(sum(cell.config.run.rounds for cell in chosen.cells(folder)), chosen.name, quiet=as_json) as rounds:
        tell = lambda label, seed, metrics: rounds(f"{label} seed {seed}", metrics)  # noqa: E731
        results = studies.execute(chosen, folder, jobs, tell)
    _tell(spending.after(chosen.cells(folder)), as_json)
    written = [f"table   {console.shown(folder / studies.TABLE)}"]
    if chosen.figure != "none":
        settings = [(setting.name, _started(setting.cells(folder))) for setting in chosen.settings]
        figure = report.study_figure(settings, chosen.figure, folder / "figure.png")
        written.append(f"figure  {console.shown(figure)}")
    if as_json:
        _print_json(results | {"out": str(folder)})
    else:
        for table in tables.study_tables(results, studies.cells_of):
            console.out.print(table)
        console.out.print("\n".join(written), soft_wrap=True)
    _raise_failures(results["failures"], len(chosen.cells(folder)))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run with named sites.")],
    site: Annotated[str, typer.Option("--site", help="Score this site only; default: all sites.")] = "",
    data: Annotated[
        str, typer.Option("--data", metavar="FILE", help="Rows with labels to score the site on, instead of its held-out ones.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Score a finished run for its named sites: each by the adapter of its own rank, on its own rows.

    Example: [cyan]anyrank evaluate runs/three-sites --site lakeside[/cyan]
    """
    from anyrank.cli import evaluated
    from anyrank.runs.finding import finished

    config = finished(run)
    names = evaluated.chosen(run, config, site, data)
    from anyrank.cli import console
    from anyrank.studies import evaluation

    with console.Preparing("scoring", quiet=as_json) as progress:
        found = evaluation.of_sites(run, config, names, data, progress)
    if as_json:
        return _print_json(found)
    for table in evaluated.tables(found):
        console.out.print(table)
    if found["private"]:
        console.out.print("The run's privacy guarantee does not cover these scores: they are of the sites' rows as they are.")


@app.command()
def aggregate(
    clients: Annotated[
        list[str],
        typer.Argument(
            metavar="CLIENT_DIR[=WEIGHT] ...", help="PEFT adapter folders, each with its examples or any positive weight."
        ),
    ],
    method: Annotated[str, typer.Option("--method", help="See `anyrank methods`.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the merged adapters.")],
    ranks: Annotated[
        str, typer.Option("--ranks", metavar="4,8,...", help="Also write the adapter for a client of each rank.")
    ] = "",
    previous: Annotated[
        Path | None, typer.Option("--previous", help="The global adapter that the clients started from.")
    ] = None,
    options: Annotated[list[str], typer.Option("--option", metavar="KEY=VALUE", help="An option of the method.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random rows of A in empty slices.")] = 0,
    algebra: Annotated[str, typer.Option("--algebra", help="auto, qr, gram or randomized.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="Device that computes SVDs: cpu, cuda or auto.")] = "cpu",
    allow_different_base: Annotated[
        bool,
        typer.Option("--allow-different-base", help="Accept different base model names, if they are names of the same model."),
    ] = False,
    absent: Annotated[
        str,
        typer.Option("--absent", metavar="refused|silent", help="A layer that a client lacks: an error, or no say in it."),
    ] = "refused",
    rank: Annotated[
        int, typer.Option("--rank", help="Rank of OUT/global: from the clients' largest (0) to the sum of their ranks.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Merge PEFT adapter folders of any ranks, without training: OUT/global, and OUT/rank-R for each rank in --ranks.

    Example: [cyan]anyrank aggregate --method raflora --ranks 4,8 --out merged site-a=1200 site-b=300[/cyan]
    """
    from anyrank.cli import arguments
    from anyrank.methods import catalog

    folders, wanted, chosen = arguments.updates(clients), arguments.ranks(ranks), arguments.options(options)
    catalog.check(method, chosen)
    arguments.to_merge([folder for folder, _ in folders] + ([previous] if previous else []), out, algebra, device)
    from anyrank.aggregation.aggregates import aggregate_folders
    from anyrank.cli import console, tables

    _use_all_cores()
    began = time.perf_counter()
    with console.Preparing("layers", quiet=as_json) as progress:
        done = aggregate_folders(
            arguments.opened(folders), method, out, wanted, previous, seed, algebra=algebra, device=device,
            allow_different_base=allow_different_base, absent=absent, rank=rank, progress=progress, **chosen,
        )  # fmt: skip
    done["seconds"] = time.perf_counter() - began
    if as_json:
        return _print_json(done)
    console.out.print(tables.merge_table(done))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A finished run, or a PEFT adapter folder.")],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    format: Annotated[
        str, typer.Option("--format", metavar="peft|vllm|merged", help="An adapter, one of a single scaling, or a whole model.")
    ] = "peft",
    base: Annotated[str, typer.Option("--base", help="Base model for merged; default: the one that the adapter names.")] = "",
    base_update: Annotated[
        Path | None, typer.Option("--base-update", help="Part of a merge for the base model; default: the one beside it.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the adapter; 0: as large as needed, nothing is lost.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a trained adapter for other programs: one PEFT folder, one without patterns (vLLM), or the whole merged model.

    Example: [cyan]anyrank export runs/mine --format merged --out model[/cyan]
    """
    from anyrank.cli import exporting

    exporting.check(out, format, rank)
    adapter, below, base = exporting.parts(source, base_update, base, format)
    from anyrank.aggregation.exports import export as write
    from anyrank.cli import console

    _use_all_cores()
    with console.Preparing("layers", quiet=as_json) as progress:
        done = write(adapter, out, format, below, base, rank, progress)
    if as_json:
        return _print_json(done)
    console.out.print(exporting.table(done))


@app.command()
def inspect(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER_DIR ...", help="PEFT adapter folders.")],
    as_json: Json = False,
) -> None:
    """Show ranks, scaling, norms, spectrum, effective rank and energy past each rank of adapters, layer by layer.

    Example: [cyan]anyrank inspect merged/global merged/rank-4[/cyan]
    """
    from anyrank.cli import arguments

    arguments.adapters(adapters)
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
    """List the methods: what each one does, what it trains, which ranks it takes, and its paper.

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
    """Explain a key of the configuration: its meaning, type, values and default, and its names in other libraries.

    KEY is a path, a name without its section, a section, or the name in PEFT, transformers or Flower.

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
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="A private run; or use the options below.")
    ] = None,
    overrides: Set = [],  # noqa: B006
    examples: Annotated[int, typer.Option("--examples", help="Number of examples of one client.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Average number of examples that a step draws.")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Number of steps of the client in the whole run.")] = 0,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Privacy budget; prints the noise for it.")] = 0.0,
    noise_multiplier: Annotated[float, typer.Option("--noise-multiplier", help="Noise; prints the epsilon for it.")] = 0.0,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Delta of the budget, default 1e-5; of --spent, default the smallest delta of its runs."),
    ] = None,
    accountant: Annotated[str, typer.Option("--accountant", help="pld, prv or rdp.")] = "pld",
    spent: Annotated[
        str | None,
        typer.Option(
            "--spent", metavar="DATA", help="What all private runs on a file, a folder or a configuration's data spent."
        ),
    ] = None,
    ceiling: Annotated[
        float | None,
        typer.Option(
            "--ceiling", help="With --spent and --delta: the most epsilon for one example of all runs on it; 0: no limit."
        ),
    ] = None,
    statement: Annotated[
        bool, typer.Option("--statement", help="Print the privacy statement of a configuration, or of the run in a folder.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="With --statement: also write it there, as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Compute the noise for a privacy budget, or the budget for a noise, before a run; or what was spent. Trains nothing.

    Example: [cyan]anyrank privacy --examples 1000 --batch-size 50 --steps 400 --epsilon 6[/cyan]
    """
    from anyrank.cli import arguments, console, plans, private

    private.check(config, spent, ceiling, statement, out)
    if spent is not None:
        told = private.spent(spent, config, overrides, ceiling, delta, as_json)
        return _print_json(told) if as_json else _print_parts(private.spent_tables(told))
    if statement:
        facts = private.facts(config, overrides, as_json)
        written = private.write(facts, out) if out else None
        if as_json:
            return _print_json(private.statement_object(facts) | {"out": str(written) if written else None})
        return _print_parts(private.statement_tables(facts))
    if config is None:
        budget = (examples, batch_size, steps, epsilon, noise_multiplier, 1e-5 if delta is None else delta, accountant)
        figures = arguments.budget(*budget)
    else:
        chosen = arguments.configuration(config, overrides)
        with console.Preparing("preparing", quiet=as_json) as preparing:
            figures = _budget_of(chosen, preparing)
    if as_json:
        return _print_json(figures)
    console.out.print(plans.privacy_table(figures))


@app.command()
def audit(
    config: ConfigFile,
    rounds: Annotated[
        int,
        typer.Option("--rounds", help="Rounds whose noise is audited. 0: the first three, or all if there are fewer.", min=0),
    ] = 0,
    canaries: Annotated[
        int,
        typer.Option(
            "--canaries",
            help="Instead: so many examples with wrong labels, each included by a coin toss that is guessed from the uploads.",
            min=0,
        ),
    ] = 0,
    noise_factor: Annotated[
        float,
        typer.Option(
            "--noise-factor", help="Multiply the actual noise, but not the planned noise, to test whether the audit notices."
        ),
    ] = 1.0,
    confidence: Annotated[
        float, typer.Option("--confidence", help="At most one minus this share of audits of honest noise refute it.")
    ] = 0.99,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Train privately, compare the noise of every release with the promised noise, and test whether ε can be refuted.

    It trains on the clients' data, here, and discards what it trains. Its figures are those of the noise. With --canaries, they
    are counts of right guesses about the data itself, which no ε covers.

    Example: [cyan]anyrank audit private.toml[/cyan]
    """
    from anyrank.cli import arguments

    chosen = arguments.configuration(config, overrides)
    from anyrank.cli import audits, console, tables

    audits.check(canaries, rounds, noise_factor, confidence)
    if not as_json:
        console.err.print(audits.OF_GUESSES if canaries else audits.OF_NOISE)
    if canaries:
        from anyrank.studies import audit

        with console.Rounds(chosen.run.rounds, "audit", quiet=as_json) as progress:
            verdict = audit.audit(chosen, canaries, noise_factor, confidence, on_round=lambda metrics: progress("", metrics))
    else:
        from anyrank.studies import noise_audit

        with console.Preparing("audit", quiet=as_json) as preparing:
            verdict = noise_audit.audit(chosen, rounds, noise_factor, confidence, on_round=preparing)
    if as_json:
        return _print_json(verdict)
    console.out.print((tables.audit_table if canaries else audits.noise_table)(verdict))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR ...", help="Run folders, or folders of a comparison.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; default: report.html in the first folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report again, from the files of one or more runs.

    Example: [cyan]anyrank report runs/demo[/cyan]
    """
    from anyrank.runs.finding import find_runs

    found = [run for folder in runs for run in find_runs(folder)]
    from anyrank import report as reports
    from anyrank.cli import console

    page = reports.build(found, out or runs[0] / "report.html")
    if as_json:
        return _print_json({"report": str(page)})
    console.out.print(f"report  {console.shown(page)}", soft_wrap=True)


app.command()(serving.serve)


def _compare(cells: list[Cell], out: Path, jobs: int, resume: bool, quiet: bool) -> Results:
    from anyrank import report
    from anyrank.cli import console
    from anyrank.studies import comparison, spending

    with console.Preparing("preparing", quiet) as preparing:
        planned = comparison.check(cells, out, resume, preparing)
    _tell(spending.before(planned), quiet)
    rounds = console.Rounds(sum(cell.config.run.rounds for cell in cells), "rounds", quiet)
    with rounds:
        tell = lambda label, seed, metrics: rounds(f"{label} seed {seed}", metrics)  # noqa: E731
        results = comparison.execute(cells, out, jobs, tell)
    _tell(spending.after(cells), quiet)
    report.build(_started(cells), out / "report.html")
    report.figure(_started(cells), out / "figure.png")
    return results


def _tell(lines: Sequence[str], quiet: bool) -> None:
    from anyrank.cli import console

    for line in () if quiet else lines:
        console.err.print(line, soft_wrap=True)


def _show_comparison(results: Results, out: Path, as_json: bool, title: str) -> None:
    from anyrank.cli import console, tables

    rows, seeds = results.rows, max(row["seeds"] for row in results.rows)
    if as_json:
        _print_json({"rows": rows, "failures": results.failures, "out": str(out), "report": str(out / "report.html")})
    else:
        console.out.print(
            tables.comparison_table(rows, f"{title} ({f'{seeds} seeds, mean ± std' if seeds > 1 else 'one seed'})")
        )
        told = console.shown(out)
        console.out.print(f"report  {told}/report.html\nfigure  {told}/figure.png", soft_wrap=True)
    _raise_failures(results.failures, len(results.failures) + sum(row["seeds"] for row in rows))


def _raise_failures(failures: list[dict[str, Any]], runs: int) -> None:
    """Raise `RunFailed` if runs of a grid failed; the results of the other runs have been shown and are kept."""
    from anyrank.errors import RunFailed
    from anyrank.studies import grid

    if failures:
        reasons = "; ".join(grid.failed(failure) for failure in failures)
        raise RunFailed(f"{len(failures)} of {runs} runs failed and are not in the table: {reasons}")


def _started(cells: Sequence[Cell]) -> list[Path]:
    """The run folders that there are: a run that failed before its first round may have none, or one with nothing in it."""
    from anyrank.runs.names import CONFIG

    return [cell.out for cell in cells if (cell.out / CONFIG).is_file()]


def _budget_of(config: Config, progress) -> dict[str, Any]:
    from anyrank import simulation
    from anyrank.studies import budget

    built = simulation.build(config, progress)
    built.close()
    return budget.of_run(built)


def _use_all_cores() -> None:
    import torch

    torch.set_num_threads(cores())


def _print_parts(parts: Sequence[Any]) -> None:
    from anyrank.cli import console

    for part in parts:
        console.out.print(part, soft_wrap=isinstance(part, str))


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
