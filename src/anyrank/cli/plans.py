"""The tables of `anyrank plan` and `anyrank privacy`: what a run would take, before it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from anyrank.cli.console import megabytes, shown
from anyrank.cli.folding import folded
from anyrank.privacy.statement import in_words


def plan_tables(figures: Mapping[str, Any]) -> list[Table]:
    """What a run would take: one table of its ranks, one of the whole."""
    ranks = folded(f"{figures['name']}: {figures['method']}", "rank", *_by_rank(figures["levels"]), justify="right")
    memory = {name.replace("_", " "): size for name, size in figures["memory_bytes"].items() if size}
    rows = {
        "task": figures["task"],
        "clients": f"{figures['clients']:,} registered, {figures['cohort']:,} per round",
        **({"chosen ranks": shown("; ".join(figures["chosen_ranks"]))} if figures["chosen_ranks"] else {}),
        "rounds": f"{figures['rounds']:,}, of {figures['local_steps']:.4g} local steps",
        "traffic per round": f"{_both_ways(figures, '_a_round')}, expected",
        "traffic in total": f"{_both_ways(figures, '')}, expected",
        "memory": f"{megabytes(sum(memory.values()))} MB: " + ", ".join(f"{k} {megabytes(v)}" for k, v in memory.items()),
        **({"privacy": _promise(figures["privacy"])} if figures["privacy"] else {}),
        **({"spent": "\n".join(map(_spent_with, figures["data_sets"]))} if figures["data_sets"] else {}),
        "guard": _guard(figures["guard"], figures["cohort"]),
        "training": "not measured" if figures["training_s"] is None else _guess(figures),
    }
    whole = Table(show_header=False)
    whole.add_column(style="dim")
    whole.add_column()
    for name, value in rows.items():
        whole.add_row(name, value)
    return [*ranks, whole]


def _by_rank(levels: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the ranks, and the cells of each column."""
    columns = {
        "clients": [f"{level['clients']:,}" for level in levels],
        "per round": [f"{level['a_round']:.4g}" for level in levels],
        "parameters": [f"{level['trainable_parameters']:,}" for level in levels],
        "MB up": [f"{level['upload_bytes'] / 1e6:.3f}" for level in levels],
        "MB down": [f"{level['download_bytes'] / 1e6:.3f}" for level in levels],
        "ms / step": ["–" if level["step_s"] is None else f"{1e3 * level['step_s']:.1f}" for level in levels],
    }
    return [f"{level['rank']}" for level in levels], columns


def _guard(guard: Mapping[str, Any], cohort: int) -> str:
    """The limits on one client, and what a round needs, in one line."""
    parts = [
        _limits(guard),
        f"{guard['rest']} rounds of rest after {guard['offences']} rejected uploads"
        if guard["rest"] and guard["offences"]
        else "",
        f"rounds need {guard['uploads']:,} of {cohort:,} uploads",
        f"deadline {guard['deadline_s']:g} s" if guard["deadline_s"] else "",
        f"{guard['dropout']:.4g} of the clients send nothing" if guard["dropout"] else "",
        "" if guard["rollback"] else "a merge that is not finite ends the run",
    ]
    return "; ".join(part for part in parts if part)


def _limits(guard: Mapping[str, Any]) -> str:
    if guard["off"]:
        return f"no limit on steps ({guard['off']})"
    limits = [
        "" if guard["norm"] is None else f"steps at most {guard['norm']:g} x the median",
        "" if guard["far"] is None else f"more than {guard['far']:g} x rejected",
        "" if guard["owner"] is None else f"single owners at most {guard['owner']:g}",
        guard["rule"] or "",
    ]
    return ", ".join(limit for limit in limits if limit) or "no limit on steps (switched off)"


def _promise(budget: Mapping[str, Any]) -> str:
    noises = sorted(row["noise_multiplier"] for row in budget["counts"])
    noise = f"{noises[0]:.4g}" if len(set(noises)) == 1 else f"{noises[0]:.4g} to {noises[-1]:.4g}"
    return (
        f"epsilon {budget['epsilon']:.4g} at delta {budget['delta']:g} for one {budget['level']}, noise multiplier {noise}"
        f"{_where(budget)}, for {budget['max_rounds']} rounds per client"
    )


def _spent_with(row: Mapping[str, Any]) -> str:
    """What is spent on a data set, without and with the run."""
    told = f"{shown(row['name'])}: epsilon {in_words(row['spent'])} so far, {in_words(row['together'])} with this run"
    return f"{told}, at delta {row['delta']:g} for one example"


def _where(budget: Mapping[str, Any]) -> str:
    return " at the server" if budget.get("noise_at") == "server" else ""


def privacy_table(figures: Mapping[str, Any]) -> Table:
    """The noise and epsilon of a run: a row for each number of examples that clients declare."""
    title = f"epsilon {figures['epsilon']:.4g} at delta {figures['delta']:g} for one {figures['level']}"
    title += f" ({figures['accountant']})" + (f", noise{_where(figures)}" if _where(figures) else "")
    if "drawn" in figures:
        least, most = figures["drawn"]["least"], figures["drawn"]["most"]
        title = f"{shown(figures['name'])}: {title}\n{figures['max_rounds']} of {figures['rounds']} rounds per client; "
        title += f"the seed draws each client in {least} to {most} rounds"
    table = Table(title=title, title_justify="left", header_style="bold")
    units = "persons" if figures["level"] == "person" else "examples"
    correlated = "bands" in figures["counts"][0]
    kind = ("bands", "rate", "draws") if correlated else ("sampling rate", "steps")
    for heading in (units, "clients", *kind, "noise multiplier", "epsilon"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["counts"]:
        counts = (f"{row['num_examples']:,}", f"{row['clients']:,}")
        counts += (f"{row['bands']}",) if correlated else ()
        counts += (f"{row['sampling_rate']:.4g}", f"{row['steps']:,}")
        table.add_row(*counts, f"{row['noise_multiplier']:.4g}", f"{row['epsilon']:.4g}")
    return table


def _both_ways(figures: Mapping[str, Any], over: str) -> str:
    return ", ".join(f"{megabytes(figures[f'{way}load_bytes{over}'])} MB {way}" for way in ("up", "down"))


def _guess(figures: Mapping[str, Any]) -> str:
    whole = figures["training_s"]
    text = f"{whole:.0f} s" if whole < 600 else f"{whole / 3600:.1f} h"
    return f"{text}, {figures['round_s']:.2g} s per round: estimated from one step of each rank, without scoring and merging"
